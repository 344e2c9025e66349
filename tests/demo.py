"""`make demo`: the main job end to end on this machine, without an account.

A fake Buildkite, the real scheduler.py, four real worker.py with different tags, and two dozen jobs over two queues;
and a second organization, without clusters, whose jobs the same scheduler takes by GraphQL, and a fifth worker.
The agent is the real one when BUILDKITE_AGENT_PATH or PATH has it, else tests/fake_agent.py.
Shows the jobs' events, then a table; exits 1 if a job did not end as expected.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fake_buildkite import FakeBuildkite, FakeJob

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "bkct_demo"

WORKERS = {
    "linux-1": "queue=default,os=linux,arch=amd64",
    "linux-2": "queue=default,os=linux,arch=amd64,docker",
    "mac-1": "queue=default,os=mac,arch=arm64",
    "rack-1": "queue=devices,board=fpga,board=phone",
    "legacy-1": "queue=legacy,os=linux",
}
#: The queue of the jobs outside of clusters.
LEGACY = "legacy"


@dataclass(frozen=True)
class Wanted:
    """A job of the demo and its expected end: the agent's exit status, "canceled", or "waiting" (never runs)."""

    name: str
    rules: tuple[str, ...]
    command: str = "echo done"
    priority: int = 0
    end: str = "0"

    @property
    def queue(self) -> str:
        return next((rule.removeprefix("queue=") for rule in self.rules if rule.startswith("queue=")), "default")


def wanted_jobs() -> list[Wanted]:
    jobs = [Wanted(f"build {n}", ("queue=default", "os=linux"), f"sleep 0.{n}; echo built {n}") for n in range(1, 8)]
    jobs += [Wanted(f"any {n}", (), f"echo whoever you are, {n}") for n in range(1, 4)]
    jobs += [Wanted(f"app {n}", ("os=mac",), "sleep 0.4; echo signed") for n in range(1, 4)]
    jobs += [Wanted(f"image {n}", ("os=linux", "docker=*"), "sleep 0.2; echo pushed") for n in range(1, 3)]
    jobs += [Wanted(f"urgent {n}", ("arch=amd64",), "echo first", priority=10) for n in range(1, 3)]
    jobs += [Wanted(f"flash {n}", ("queue=devices", "board=fpga"), "sleep 0.3; echo flashed") for n in range(1, 4)]
    jobs += [
        Wanted("phone", ("queue=devices", "board=phone"), "echo ringing"),
        Wanted("failing", ("os=linux",), "echo this one fails; exit 3", end="3"),
        Wanted("canceled", ("queue=devices", "board=fpga"), "echo never", priority=-1, end="canceled"),
        Wanted("nobody", ("os=plan9",), "echo never", end="waiting"),
    ]
    if importlib.util.find_spec("graphql"):
        rules = (f"queue={LEGACY}", "os=linux")
        jobs += [Wanted(f"legacy {n}", rules, f"sleep 0.{n}; echo not in a cluster") for n in range(1, 4)]
    else:
        print("graphql-core is not installed, so the organization without clusters is left out.")
    return jobs


class Story:
    """Prints the scheduler's events as one line each, with the names of the jobs."""

    WORDS = {"put": "listed", "ready": "reserved", "claimed": "claimed by", "ran": "over", "dropped": "dropped"}

    def __init__(self, names: dict[str, str]):
        self._names = names
        self._started = time.monotonic()
        self.done = threading.Condition()
        self.ended: set[str] = set()

    def follow(self, scheduler: subprocess.Popen[str]) -> None:
        assert scheduler.stderr
        for line in scheduler.stderr:
            found = re.match(r"\S+ (\w+)\s+(\w+) (?:.*?\b)?job=(\S+)(?:.* worker=(\S+))?", line)
            if not found:
                if " info " not in line:
                    print("   scheduler:", line.strip())
                continue
            _, word, uuid, worker = found.groups()
            if word in self.WORDS:
                seconds = time.monotonic() - self._started
                by = worker if word == "claimed" and worker else ""
                print(
                    f"{seconds:6.2f} s  {self._names.get(uuid, uuid):10} {self.WORDS[word]} {by}".rstrip(), flush=True
                )
            if word in ("ran", "dropped"):
                with self.done:
                    self.ended.add(uuid)
                    self.done.notify_all()

    def wait(self, uuids: set[str], seconds: float) -> bool:
        with self.done:
            return self.done.wait_for(lambda: uuids <= self.ended, seconds)


def find_agent() -> str:
    for path in (os.environ.get("BUILDKITE_AGENT_PATH"), shutil.which("buildkite-agent")):
        if path and os.access(path, os.X_OK):
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip()
            print(f"The agent is the real one: {path}, {version}.")
            return path
    print(
        "There is no buildkite-agent in BUILDKITE_AGENT_PATH or PATH: a stand-in, tests/fake_agent.py, takes its place."
    )
    return str(ROOT / "tests" / "fake_agent.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def stack(fake: FakeBuildkite, legacy: FakeBuildkite, directory: str, agent: str, story: Story) -> Iterator[None]:
    """The scheduler and its workers as processes; all ended when this is left."""
    port = free_port()
    # The stand-in is started by the interpreter that runs this.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    common = {"PATH": path, "HOME": directory, "BUILDKITE_AGENT_ENDPOINT": fake.url}
    # The workers get no agent token: each job comes with a token that is valid only for it.
    settings = {
        "BUILDKITE_AGENT_TOKEN": TOKEN,
        "SCHEDULER_QUEUES": "default,devices",
        "STACK_KEY": "demo",
        "LISTEN": f"127.0.0.1:{port}",
        "STATE_DIRECTORY": f"{directory}/scheduler",
    }
    if legacy.pipelines:
        Path(directory, "stack.toml").write_text(f'organization = "acme"\n[monitor]\nqueue = "{LEGACY}"\n')
        settings |= {
            "STACK_FILE": f"{directory}/stack.toml",
            "BUILDKITE_API_TOKEN": legacy.api_token,
            "BUILDKITE_GRAPHQL_ENDPOINT": legacy.graphql_url,
        }
    scheduler = subprocess.Popen(
        [sys.executable, ROOT / "scheduler.py"], env=common | settings, cwd=directory, stderr=subprocess.PIPE, text=True
    )
    follower = threading.Thread(target=story.follow, args=[scheduler])
    follower.start()
    workers = []
    for name, rules in WORKERS.items():
        settings = {
            "WORKER_API_SERVER": f"http://127.0.0.1:{port}",
            "WORKER_AGENT_QUERY_RULES": rules,
            "WORKER_NAME": name,
            "WORKER_STATE": f"{directory}/workers",
            "BUILDKITE_AGENT_PATH": agent,
        }
        if name.startswith(LEGACY):  # of the other organization, which has no tokens for one job
            settings |= {
                "BUILDKITE_AGENT_TOKEN": legacy.unclustered_token,
                "BUILDKITE_AGENT_ENDPOINT": legacy.url,
            }
        with open(f"{directory}/{name}.log", "wb") as log:
            arguments = [sys.executable, str(ROOT / "worker.py")]
            workers.append(subprocess.Popen(arguments, env=common | settings, cwd=directory, stderr=log))
    try:
        yield
    finally:
        for process in workers:
            process.terminate()
        statuses = [process.wait(30) for process in workers]
        scheduler.terminate()
        statuses.append(scheduler.wait(30))
        follower.join()
        if any(statuses):
            print(f"The processes ended with {statuses}; their logs:")
            for name in WORKERS:
                print(Path(directory, f"{name}.log").read_text())


def run_demo(fake: FakeBuildkite, legacy: FakeBuildkite, directory: str) -> int:
    began, wanted = fake.clock(), wanted_jobs()
    if any(job.queue == LEGACY for job in wanted):
        legacy.add_pipeline("demo", clustered=False)
    jobs = {
        (legacy if job.queue == LEGACY else fake).add_job(
            queue=job.queue,
            rules=list(job.rules),
            priority=job.priority,
            command=job.command,
            step_key=job.name,
            scheduled_at=began + number / 1000,
        ): job
        for number, job in enumerate(wanted)
    }
    story = Story({uuid: job.name for uuid, job in jobs.items()})
    ends = {uuid for uuid, job in jobs.items() if job.end != "waiting"}
    with stack(fake, legacy, directory, find_agent(), story):
        canceled = next(uuid for uuid, job in jobs.items() if job.end == "canceled")
        fake.wait_for(lambda: fake.jobs[canceled].state == "reserved", timeout=10)
        fake.cancel_job(canceled)
        finished = story.wait(ends, 25)
        good = print_table(jobs, fake.jobs | legacy.jobs)
    if not finished:
        print("Not every job was over in 25 s.")
    print("Every job ended as it should." if finished and good else "Something went wrong: see above.")
    return 0 if finished and good else 1


def print_table(jobs: dict[str, Wanted], at_buildkite: dict[str, FakeJob]) -> bool:
    """Print one line per job; return whether each ended as expected, started once, and on a matching worker."""
    row = "{:10} {:3} {:26} {:8} {:>8} {:>7}  {}".format
    print("\n" + row("job", "pri", "rules", "worker", "waited", "ran", "exit"))
    good = True
    for uuid, wanted in jobs.items():
        job = at_buildkite[uuid]
        at = {what: moment for moment, what, _ in job.history}
        started, over = at.get("acquired"), at.get("finished")
        waited = f"{started - at['added']:.2f} s" if started else "-"
        ran = f"{over - started:.2f} s" if started and over else "-"
        end = "canceled" if job.state == "canceled" else "waiting" if not started else str(job.exit_status)
        worker = job.agent_name or "-"
        right = end == wanted.end and job.happened("acquired") == (0 if end in ("canceled", "waiting") else 1)
        good = good and right
        rules = ",".join(wanted.rules) or "(none)"
        print(
            row(
                wanted.name,
                wanted.priority,
                rules,
                worker,
                waited,
                ran,
                end + ("" if right else f"  WRONG: {wanted.end}"),
            )
        )
    print()
    return good


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as directory, FakeBuildkite(token=TOKEN) as fake, FakeBuildkite() as legacy:
        return run_demo(fake, legacy, directory)


if __name__ == "__main__":
    sys.exit(main())
