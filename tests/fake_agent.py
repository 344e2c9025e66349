#!/usr/bin/env python3
"""A small fake of buildkite-agent: `start --acquire-job UUID`, with the same variables as the real one:
BUILDKITE_AGENT_TOKEN, BUILDKITE_AGENT_ENDPOINT, BUILDKITE_BUILD_PATH.

It exits as the real one does: 0 when a job ran, whatever became of it, and when the acquisition came to
nothing; 27 when Buildkite refused it; 1 when it could not register. SIGTERM or SIGINT once: a running job
may finish, an acquisition is given up; twice, or SIGQUIT: the job is cancelled. Knobs for tests:
    FAKE_AGENT_EXIT=7               exit with 7 at once, having called nobody
    FAKE_AGENT_HANG=before-acquire  register, connect, and wait for a signal
    FAKE_AGENT_IGNORE_TERM=1        ignore SIGTERM
    FAKE_AGENT_VERSION=3.98.2       what --version says
"""

import argparse
import gzip
import http.client
import json
import os
import select
import signal
import sys
import time
from contextlib import closing
from datetime import datetime, timezone
from subprocess import PIPE, Popen
from typing import Any
from urllib.parse import urlsplit

VERSION = os.environ.get("FAKE_AGENT_VERSION", "3.137.0+fake")
#: Tries of a call, tries of a call of a running job, and seconds between tries; the real agent tries for minutes.
TRIES, PATIENT_TRIES, RETRY_DELAY = 4, 100, 0.2
#: Seconds between two checks of the job's state; between SIGTERM and SIGKILL for a cancelled job.
INTERVAL, CANCEL_GRACE = 1.0, 9.0


def now() -> str:
    return datetime.now(timezone.utc).isoformat()


class Refused(Exception):
    """Buildkite answered a call with an error: (status, message); status 0: it did not answer."""


class Stop:
    """How often a signal asked to stop. While `waiting` the first one interrupts."""

    def __init__(self) -> None:
        self.asked, self.waiting = 0, False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self.signalled)
        if os.environ.get("FAKE_AGENT_IGNORE_TERM"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def signalled(self, number: int, _: object) -> None:
        self.asked += 2 if number == signal.SIGQUIT else 1
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt


class Buildkite:
    """The agent API. `token` is at first the registration token, then the session's."""

    def __init__(self, endpoint: str, token: str) -> None:
        url = urlsplit(endpoint)
        self.host, self.base, self.token = url.netloc, url.path.rstrip("/"), token

    def call(self, method: str, path: str, body: Any = None, token: str = "", tries: int = TRIES) -> Any:
        """The answer's JSON; Refused at once for a 4xx, after some tries for anything else."""
        for left in reversed(range(tries)):
            try:
                return self.call_once(method, path, body, token or self.token)
            except (OSError, http.client.HTTPException, ValueError, Refused) as error:
                refused = error if isinstance(error, Refused) else Refused(0, repr(error))
                if not left or (400 <= refused.args[0] < 500 and refused.args[0] not in (423, 429)):
                    raise refused from None
            time.sleep(RETRY_DELAY)

    def call_once(self, method: str, path: str, body: Any, token: str) -> Any:
        headers = {"Authorization": f"Token {token}", "X-Buildkite-Lock-Acquire-Job": "1"}
        if isinstance(body, bytes):
            headers["Content-Encoding"] = "gzip"
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        with closing(http.client.HTTPConnection(self.host, timeout=60)) as connection:
            connection.request(method, f"{self.base}/{path}", body=data, headers=headers)
            response = connection.getresponse()
            text = response.read()
        if response.status >= 300:
            raise Refused(response.status, text.decode(errors="replace"))
        return json.loads(text)


class Job:
    """The acquired job: its process, its log, its end."""

    def __init__(self, buildkite: Buildkite, job: dict[str, Any]) -> None:
        self.buildkite, self.token, self.path = buildkite, job["token"], f"jobs/{job['id']}"
        self.log, self.sequence, self.offset = b"", 0, 0
        self.stop_reason, self.kill_at = "", float("inf")
        self.command, self.env = job["env"]["BUILDKITE_COMMAND"], os.environ | job["env"]
        del self.env["BUILDKITE_AGENT_TOKEN"]

    def call(self, method: str, path: str = "", body: Any = None, tries: int = TRIES) -> Any:
        return self.buildkite.call(method, self.path + path, body, self.token, tries)

    def run(self, stop: Stop) -> None:
        self.call("PUT", "/start", {"started_at": now()})
        os.makedirs(directory := os.environ["BUILDKITE_BUILD_PATH"], exist_ok=True)
        shell = ["sh", "-c", f"exec 2>&1 </dev/null; {self.command}"]
        with Popen(shell, env=self.env, cwd=directory, stdout=PIPE, start_new_session=True) as process:
            self.follow(process, stop)
        self.finish(process.returncode)

    def follow(self, process: "Popen[bytes]", stop: Stop) -> None:
        """Stream the output until its end; every INTERVAL check whether the job is cancelled."""
        assert process.stdout is not None
        output, next_look = process.stdout.fileno(), time.monotonic() + INTERVAL
        while True:
            if select.select([output], [], [], 0.1)[0]:
                if not (data := os.read(output, 65536)):
                    return
                self.log += data
            reason = "agent_stop" if stop.asked >= 2 else ""
            if time.monotonic() >= next_look:
                reason, next_look = reason or self.look(), time.monotonic() + INTERVAL
            if reason and not self.stop_reason:
                self.stop_reason, self.kill_at = reason, time.monotonic() + CANCEL_GRACE
                os.killpg(process.pid, signal.SIGTERM)
            if time.monotonic() >= self.kill_at:
                os.killpg(process.pid, signal.SIGKILL)

    def look(self) -> str:
        """Upload output and send a heartbeat; return why the job must be cancelled, or ""."""
        self.upload()
        try:
            self.buildkite.call("POST", "heartbeat", {"sent_at": now()}, tries=1)
            state = self.call("GET", tries=1)["state"]
        except Refused as refused:
            state = "canceled" if refused.args[0] == 401 else "unknown"
        return "cancel" if state in ("canceling", "canceled", "timing_out", "timed_out") else ""

    def upload(self) -> None:
        while self.log:
            chunk, self.log = self.log[:100_000], self.log[100_000:]
            self.sequence += 1
            place = f"sequence={self.sequence}&offset={self.offset}&size={len(chunk)}"
            self.offset += len(chunk)
            self.call("POST", f"/chunks?{place}", gzip.compress(chunk), PATIENT_TRIES)

    def finish(self, status: int) -> None:
        self.upload()
        body = {"exit_status": str(max(status, -1)), "finished_at": now(), "chunks_failed_count": 0}
        if status < 0:
            body["signal"] = signal.Signals(-status).name
        if self.stop_reason:
            body |= {"exit_status": "-1", "signal_reason": self.stop_reason}
        self.call("PUT", "/finish", body, PATIENT_TRIES)


def run_one(buildkite: Buildkite, options: argparse.Namespace) -> int:
    stop, status = Stop(), 0
    tags = [tag for tag in options.tags.split(",") if tag] + [f"queue={options.queue}"] * bool(options.queue)
    about = {"name": options.name, "hostname": os.uname().nodename, "version": VERSION, "meta_data": tags}
    buildkite.token = buildkite.call("POST", "register", about)["access_token"]
    buildkite.call("POST", "connect")
    try:
        stop.waiting = not stop.asked
        while os.environ.get("FAKE_AGENT_HANG") == "before-acquire" and stop.waiting:
            signal.pause()
        job = buildkite.call("PUT", f"jobs/{options.acquire_job}/acquire") if stop.waiting else None
        stop.waiting = False
        if job is not None:
            Job(buildkite, job).run(stop)
    except (KeyboardInterrupt, Refused) as error:
        status = 27 if stop.waiting and error.args[:1] == (422,) else 0
        stop.waiting = False
        print(f"job {options.acquire_job} was not acquired, or not run: {error!r}", file=sys.stderr)
    buildkite.call("POST", "disconnect")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--acquire-job", "--name", "--queue", "--tags"):
        parser.add_argument(name, default="")
    parser.add_argument("--version", action="version", version=f"buildkite-agent version {VERSION}")
    options, _ = parser.parse_known_args()
    if "FAKE_AGENT_EXIT" in os.environ:
        return int(os.environ["FAKE_AGENT_EXIT"])
    buildkite = Buildkite(os.environ["BUILDKITE_AGENT_ENDPOINT"], os.environ["BUILDKITE_AGENT_TOKEN"])
    try:
        return run_one(buildkite, options)
    except Refused as refused:
        print(f"fatal: {refused}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
