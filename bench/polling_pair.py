#!/usr/bin/env python3
"""The yardstick of dispatch: a scheduler that asks Buildkite every second and workers that ask it every two.

That is how https://github.com/catkins/buildkite-stacks-api-demo does it: at each tick the scheduler lists and reserves,
the worker claims, runs the agent, completes, and waits for its next tick (one that was missed meanwhile comes at once).
Here as one process, with the workers as threads: kinder to the yardstick than a process each.

    polling_pair.py ENDPOINT TOKEN QUEUE WORKERS AGENT
"""

from __future__ import annotations

import collections
import http.client
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

SCHEDULER_SECONDS, WORKER_SECONDS = 1.0, 2.0
ENDPOINT, TOKEN, QUEUE, WORKERS, AGENT = sys.argv[1:]
JOBS: collections.deque[str] = collections.deque()


def each(seconds: float, work: Callable[[], None]) -> None:
    """Work at each tick, like Go's time.Ticker: of the ticks that pass meanwhile one is kept."""
    due = time.monotonic() + seconds
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        work()
        due = max(due + seconds, time.monotonic() - (time.monotonic() - due) % seconds)


def call(base: str, method: str, path: str, body: Any = None, **headers: str) -> Any:
    url = urllib.parse.urlsplit(base)
    connection = http.client.HTTPConnection(url.netloc, timeout=30)
    data = b"" if body is None else json.dumps(body).encode()
    connection.request(method, url.path + path, data, headers)
    text = connection.getresponse().read()
    connection.close()
    return json.loads(text) if text else None


def buildkite(method: str, path: str, body: Any = None) -> Any:
    return call(ENDPOINT, method, f"/stacks{path}", body, Authorization=f"Token {TOKEN}")


def list_and_reserve() -> None:
    cursor = ""
    while True:
        query = {"queue_key": QUEUE, "limit": "50"} | ({"after": cursor} if cursor else {})
        page = buildkite("GET", f"/polling/scheduled-jobs?{urllib.parse.urlencode(query)}")
        if uuids := [job["id"] for job in page["jobs"]]:
            body = {"job_uuids": uuids, "reservation_expiry_seconds": 900}
            JOBS.extend(buildkite("PUT", "/polling/scheduled-jobs/batch-reserve", body)["reserved"])
        if not page["page_info"]["has_next_page"]:
            return
        cursor = page["page_info"]["end_cursor"]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        body = json.dumps({"uuid": JOBS.popleft()}).encode() if JOBS else b""
        self.send_response(200 if body else 204)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def claim_and_run(server: str, name: str) -> None:
    if job := call(server, "GET", "/jobs"):
        arguments = [AGENT, "start", "--acquire-job", job["uuid"], "--name", name]
        environment = {"BUILDKITE_AGENT_ENDPOINT": ENDPOINT, "BUILDKITE_AGENT_TOKEN": TOKEN}
        subprocess.run(arguments, env=os.environ | environment, check=False)


def work(server: str, name: str) -> None:
    time.sleep(random.random() * WORKER_SECONDS)  # they were not all started at the same moment
    each(WORKER_SECONDS, lambda: claim_and_run(server, name))


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    buildkite("POST", "/register", {"key": "polling", "type": "custom", "queue_key": QUEUE, "metadata": {}})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for number in range(int(WORKERS)):
        threading.Thread(target=work, args=[url, f"polling-{number}"], daemon=True).start()
    each(SCHEDULER_SECONDS, list_and_reserve)


if __name__ == "__main__":
    main()
