#!/usr/bin/env python3
"""`make bench`: how fast the two scripts are, beside the Go demo they replace and beside yardsticks, in one run.

The scripts run as processes and are asked over HTTP, against the fake Buildkite of the tests; load.go makes the load.
Everything is on loopback, bounded in count and time, and ended when it is over. README.md says what each figure means.

    bench.py                          measure everything, print the table, write it to results/ as JSON
    bench.py claims starts            measure these parts alone, and write nothing
    bench.py --before PATH            compare with the scheduler.py at PATH, by turns: claims and rounds
    bench.py --demo PATH              the demo's program; without it, its figures are left out
    bench.py --quick                  everything once on tiny figures, in seconds: for the tests
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import http.client
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SCHEDULER, WORKER = ROOT / "scheduler.py", ROOT / "worker.py"
sys.path[:0] = [str(ROOT / "tests")]

from fake_buildkite import Call, FakeBuildkite  # noqa: E402

Process = subprocess.Popen[str]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: counts, and of how many runs a figure is the median."""

    runs: int = 5
    claims: int = 2000
    rounds: int = 800
    #: Seconds for which jobs arrive, and how many queues are measured that were idle before.
    dispatch_seconds: float = 60.0
    idle_queues: int = 4
    idle_gap: tuple[float, float] = (8.0, 12.0)
    empty_jobs: int = 200
    empty_runs: int = 3
    parked: tuple[int, ...] = (100, 5000)
    wakes: int = 70
    shared_runs: int = 3
    starts: int = 10
    intake: int = 20_000
    policy: int = 10_000
    waiting: tuple[int, int] = (100, 100_000)
    rule_sets: tuple[int, int] = (1, 1000)
    growth_claims: int = 60
    growth_turns: int = 5
    #: A fleet whose page is open: workers, jobs that wait, how many have it open, and of how many updates is the mean.
    page_workers: int = 2000
    page_jobs: int = 10_000
    pages: int = 50
    page_updates: int = 10


QUICK = Scale(
    runs=1,
    claims=30,
    rounds=8,
    dispatch_seconds=1.5,
    idle_queues=1,
    idle_gap=(0.5, 1.0),
    empty_jobs=4,
    empty_runs=1,
    parked=(5,),
    wakes=3,
    shared_runs=1,
    starts=1,
    intake=100,
    policy=100,
    waiting=(30, 200),
    rule_sets=(1, 4),
    growth_claims=5,
    growth_turns=1,
    page_workers=20,
    page_jobs=100,
    pages=3,
    page_updates=1,
)

CONNECTIONS = (1, 8, 64)
#: Requests before those that are measured: the first ones of a process find nothing prepared.
WARM_UP = 20
#: Workers of a queue whose dispatch is measured (what the demo's compose file starts), and of the empty jobs.
WORKERS, EMPTY_WORKERS = 5, 8


# --- The table ---

#: Who is measured, in the order of the columns.
SQLITE, REDIS, DEMO = "SQLite", "Redis", "Go demo"
BEFORE = {SQLITE: "before, SQLite", REDIS: "before, Redis"}


@dataclasses.dataclass(slots=True)
class Row:
    """One figure of each side, and of a yardstick if there is one."""

    figure: str
    unit: str
    values: dict[str, float]
    yardstick: str = ""
    yardstick_value: float = 0.0
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


def number(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown; sides without any figure get no column."""
    sides = [side for side in (SQLITE, REDIS, *BEFORE.values(), DEMO) if any(side in row.values for row in rows)]
    lines = [
        f"| figure | unit | {' | '.join(sides)} | yardstick |",
        "| --- | --- |" + " ---: |" * len(sides) + " --- |",
    ]
    for row in rows:
        values = [number(row.values[side]) if side in row.values else "" for side in sides]
        yardstick = f"{number(row.yardstick_value)} {row.yardstick}" if row.yardstick else ""
        lines.append("| " + " | ".join([row.figure, row.unit, *values, yardstick]) + " |")
    return "\n".join(lines)


# --- Processes ---


class Missing(Exception):
    """Something that the bench needs is not installed."""


class Bench:
    """The directory of one run, and what is started in it: everything ends with the `with` that started it."""

    def __init__(self, directory: Path, scale: Scale, demo: str = "", before: str = ""):
        self.directory, self.scale, self.demo, self.before = directory, scale, demo, before
        self._numbers = itertools.count(1)
        #: The sides that failed once, which are measured no more.
        self.lost: list[str] = []
        self._logs: dict[int, Path] = {}
        self.load_path = str(directory / "load")
        subprocess.run(["go", "build", "-o", self.load_path, str(BENCH / "load.go")], check=True)
        #: The agent of the empty jobs.
        self.agent = os.environ.get("REAL_AGENT_V3") or self.load_path

    def place(self, what: str) -> Path:
        """A new directory."""
        path = self.directory / f"{what}-{next(self._numbers)}"
        path.mkdir()
        return path

    @contextmanager
    def process(self, command: Sequence[object], env: dict[str, str] | None = None) -> Iterator[Process]:
        """A process whose standard output is read line by line; its log goes to a file."""
        arguments = [str(word) for word in command]
        where = self.place(Path(arguments[-1] if arguments[0] == sys.executable else arguments[0]).stem or "process")
        with open(where / "log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                arguments, env=clean_environment() | (env or {}), cwd=where,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._logs[process.pid] = where / "log"
        try:
            yield process
        finally:
            end(process)

    def check_alive(self, process: Process) -> None:
        """RuntimeError, with the end of its log, when it has ended by itself."""
        if process.poll() is not None:
            words = self._logs[process.pid].read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {words}")

    @contextmanager
    def trying(self, side: str) -> Iterator[None]:
        """What fails in here costs this side its figures, and no other side."""
        try:
            yield
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"{side} is measured no more: {error}", file=sys.stderr)
            self.lost.append(side)

    def load(self, command: str, **options: object) -> dict[str, Any]:
        """Run the load generator to its end: what it reports."""
        run = subprocess.run(self.load_command(command, **options), capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"load {command} {options}: {run.stderr}")
        answer: dict[str, Any] = json.loads(run.stdout)
        return answer

    def load_command(self, command: str, **options: object) -> list[str]:
        return [self.load_path, command, *(f"-{name}={value}" for name, value in options.items())]


@contextmanager
def ended_together(processes: Sequence[Process]) -> Iterator[None]:
    """Tell all of them to end before the first is waited for: the demo's workers take two seconds."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()


def end(process: Process) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


def clean_environment() -> dict[str, str]:
    """No setting of whoever runs the bench reaches what is measured."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8"}


def first_line(process: Process) -> str:
    assert process.stdout
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended before it was ready")
    return line


def wait_until(condition: Callable[[], T], what: str, seconds: float = 60.0, pause: float = 0.02) -> T:
    """The condition's first true value; RuntimeError after so many seconds."""
    ends_at = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > ends_at:
            raise RuntimeError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def status_of(pid: int) -> dict[str, int]:
    """`rss_kb` and `threads` of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {"rss_kb": int(fields["VmRSS"].split()[0]), "threads": int(fields["Threads"])}


def cpu_seconds(process: Process) -> float:
    """CPU time that the process has taken, without that of its children."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    utime, stime = int(fields[11]), int(fields[12])
    return (utime + stime) / os.sysconf("SC_CLK_TCK")


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def share(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


# --- The sides: schedulers, each with its store and a Buildkite ---


class StampingFake(FakeBuildkite):
    """The fake, which notes when each job's reservation was answered (CLOCK_MONOTONIC, ns), and keeps no calls."""

    def __init__(self) -> None:
        super().__init__(rate_limits=False)
        self.confirmed: dict[str, int] = {}

    def answered(self, call: Call, status: int) -> None:
        if call.endpoint == "reserve":
            now = time.monotonic_ns()
            for job in call.json["job_uuids"]:
                self.confirmed.setdefault(job, now)
        super().answered(call, status)
        with self.changed:
            self.calls.clear()


@dataclasses.dataclass(slots=True)
class Served:
    """A scheduler that runs."""

    process: Process
    address: str
    queue: str
    environment: dict[str, str]

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=70)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def ready(self) -> int:
        """How many jobs can be claimed. The demo has no states: all that it keeps are ready."""
        stats = self.get("/stats")[1]
        count: int = stats["states"]["ready"] if "states" in stats else stats["total"]
        return count

    def idle_workers(self) -> int:
        return sum(worker["state"] == "idle" for worker in self.get("/stats")[1]["workers"])

    def answers(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def path(self, wait: int = 0, tags: str = "") -> str:
        # The demo has one queue, and does not read `wait`.
        return f"/jobs?query=queue={self.queue}{tags}&wait={wait}"


#: Starts a side for a queue; its CPU time can be read from the process.
Start = Callable[[Bench, FakeBuildkite, str], AbstractContextManager[Served]]

#: What is claimed here is never touched, and stays claimed; the CPU time is that of claims, not of texts for builds.
LONG_LEASES = {"LEASE_SECONDS": "3600", "RESERVATION_SECONDS": "3600", "STACK_NOTIFICATIONS": "off"}


def settings_of(bench: Bench, fake: FakeBuildkite, queues: str, **more: str) -> dict[str, str]:
    return {
        "BUILDKITE_AGENT_TOKEN": fake.token,
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "SCHEDULER_QUEUES": queues,
        "STACK_KEY": "bench",
        "STATE_DIRECTORY": str(bench.place("store")),
        "LISTEN": f"127.0.0.1:{free_port()}",
        **more,
    }


@contextmanager
def serve(bench: Bench, environment: dict[str, str], command: Sequence[object] = ()) -> Iterator[Served]:
    """A scheduler with these settings, as soon as it answers."""
    with bench.process(command or [sys.executable, SCHEDULER], environment) as process:
        served = Served(process, environment["LISTEN"], environment["SCHEDULER_QUEUES"], environment)

        def answers() -> bool:
            bench.check_alive(process)
            return served.answers()

        wait_until(answers, f"the port of {process.args!r}", pause=0.005)
        yield served


@contextmanager
def redis_server(bench: Bench) -> Iterator[str]:
    """A Redis as the README has it: an append-only file, on the disk within a second."""
    port, directory = free_port(), bench.place("redis")
    options = {"port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes"}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    with bench.process(command):
        wait_until(lambda: connects(port), "Redis's port", pause=0.01)
        yield f"127.0.0.1:{port}"


def side(script: str | Path, on_redis: bool) -> Start:
    """Our scheduler, on one of its stores."""

    @contextmanager
    def start(bench: Bench, fake: FakeBuildkite, queue: str) -> Iterator[Served]:
        with ExitStack() as stack:
            more = {"REDIS_ADDR": stack.enter_context(redis_server(bench))} if on_redis else {}
            environment = settings_of(bench, fake, queue, **LONG_LEASES, **more)
            yield stack.enter_context(serve(bench, environment, [sys.executable, script]))

    return start


@contextmanager
def demo_side(bench: Bench, fake: FakeBuildkite, queues: str) -> Iterator[Served]:
    """The demo's server, with a Redis of its own."""
    with redis_server(bench) as redis:
        environment = settings_of(bench, fake, queues, REDIS_ADDR=redis)
        with serve(bench, environment, [bench.demo, "server"]) as served:
            yield served


def all_sides(bench: Bench) -> dict[str, Start]:
    sides: dict[str, Start] = {SQLITE: side(SCHEDULER, False), REDIS: side(SCHEDULER, True)}
    if bench.before:
        sides |= {BEFORE[SQLITE]: side(bench.before, False), BEFORE[REDIS]: side(bench.before, True)}
    sides |= {DEMO: demo_side} if bench.demo else {}
    return {name: start for name, start in sides.items() if name not in bench.lost}


@contextmanager
def started(bench: Bench, sides: dict[str, Start], jobs: int) -> Iterator[dict[str, Served]]:
    """Every side with so many jobs ready, each in a queue of its own; less those that come to nothing."""
    with StampingFake() as fake, ExitStack() as stack:
        served = {}
        for name, start in sides.items():
            queue = bench.place("queue").name
            for _ in range(jobs):
                fake.add_job(queue)
            with bench.trying(name):
                served[name] = stack.enter_context(start(bench, fake, queue))
        for name, each in served.items():
            with bench.trying(name):
                wait_until(lambda each=each: each.ready() == jobs, f"{jobs} jobs ready at {name}", pause=0.1)  # type: ignore[misc]
        yield {name: each for name, each in served.items() if name not in bench.lost}


@contextmanager
def frozen(processes: Iterable[Process]) -> Iterator[None]:
    """These processes stand still meanwhile, so that what they do in the background is not measured in others."""
    stopped = list(processes)
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)


# --- Claims ---


@dataclasses.dataclass(slots=True)
class Turn:
    """What one side did in one run."""

    rate: float
    cpu_us: float
    p50_us: float
    p99_us: float


def take_turn(bench: Bench, served: Served, command: str, **options: object) -> Turn:
    """One load on one side; CPU time for each request of it."""
    asked = {"addr": served.address, "path": served.path(), "seconds": 20, **options}
    before = cpu_seconds(served.process)
    run = bench.load(command, **asked)
    cpu = cpu_seconds(served.process) - before
    if set(run["statuses"]) != {"200"}:
        raise RuntimeError(f"{command} at {served.process.args!r}: {run['statuses']}")
    return Turn(run["rate"], cpu / run["count"] * 1e6, run["p50_us"], run["p99_us"])


def warm_up(bench: Bench, served: Served) -> None:
    bench.load("claims", addr=served.address, path=served.path(), count=WARM_UP, seconds=5)


@contextmanager
def bare_server(bench: Bench, size: int) -> Iterator[Served]:
    with bench.process([sys.executable, BENCH / "bare_server.py", size]) as process:
        yield Served(process, f"127.0.0.1:{first_line(process)}", "bare", {})


def in_turns(names: Iterable[str], turn: int) -> list[str]:
    """The names, each run beginning with another one."""
    listed = list(names)
    return listed[turn % len(listed) :] + listed[: turn % len(listed)]


#: A turn's figures by side, run for run.
Turns = dict[str, list[Turn]]


def claim_turns(bench: Bench, n: int) -> Turns:
    """Claims on n connections at every side and the bare server. All are new in each run: nothing is claimed there."""
    turns: Turns = {}
    for run in range(bench.scale.runs):
        with started(bench, all_sides(bench), bench.scale.claims + WARM_UP) as served, bare_server(bench, 450) as bare:
            everyone = served | {"bare server": bare}
            for name in in_turns(everyone, run):
                with bench.trying(name):
                    warm_up(bench, everyone[name])
                    turn = take_turn(bench, everyone[name], "claims", n=n, count=bench.scale.claims)
                    turns.setdefault(name, []).append(turn)
    return turns


def turn_rows(bench: Bench, what: str, turns: Turns, rate_too: bool = True) -> Iterator[Row]:
    """The rate and the CPU time, medians over the runs. CPU time is counted in 10 ms, so its runs are added up."""
    turns = {name: each for name, each in turns.items() if name not in bench.lost}
    detail = {name: [dataclasses.asdict(turn) for turn in each] for name, each in turns.items()}
    yardstick = "bare server" if "bare server" in turns else ""
    kinds: list[tuple[str, str, Callable[[list[Turn]], float]]] = [
        (what, "/s", lambda each: median(turn.rate for turn in each)),
        (f"CPU: {what}", "µs each", lambda each: statistics.mean(turn.cpu_us for turn in each)),
    ]
    for figure, unit, of in kinds if rate_too else kinds[1:]:
        values = {name: of(each) for name, each in turns.items()}
        yield Row(figure, unit, values, yardstick, values.pop(yardstick, 0.0), detail if unit == "/s" else {})


def claims(bench: Bench) -> Iterator[Row]:
    """A job claimed: by nobody in particular, on 1, 8 and 64 connections."""
    for n in CONNECTIONS:
        yield from turn_rows(bench, f"claims, {n} connection{'s' * (n > 1)}", claim_turns(bench, n))


def rounds(bench: Bench) -> Iterator[Row]:
    """A named worker's claim and complete; and touches, of which the demo has none."""
    n, count = CONNECTIONS[1], bench.scale.rounds
    completed: Turns = {}
    touched: Turns = {}
    for run in range(bench.scale.runs):
        with started(bench, all_sides(bench), count + WARM_UP + n) as served:
            for name in in_turns(served, run):
                with bench.trying(name):
                    warm_up(bench, served[name])
                    options = {"n": n, "count": count}
                    turn = take_turn(bench, served[name], "claims", complete=True, **options)
                    completed.setdefault(name, []).append(turn)
                    if name != DEMO:
                        touched.setdefault(name, []).append(take_turn(bench, served[name], "touch", **options))
    yield from turn_rows(bench, f"claim and complete, {n} workers", completed)
    yield from turn_rows(bench, f"touches, {n} workers", touched)


# --- Dispatch: from scheduled to an agent that starts ---

#: Tells a pair that there is a new job; most must find that out by themselves.
Tell = Callable[[], None]


def worker_settings(bench: Bench, fake_url: str, server: str, name: str, queue: str) -> dict[str, str]:
    return {
        "BUILDKITE_AGENT_TOKEN": "bkct_test",
        "BUILDKITE_AGENT_ENDPOINT": fake_url,
        "BUILDKITE_AGENT_PATH": bench.load_path,
        "WORKER_API_SERVER": server,
        "WORKER_NAME": name,
        "WORKER_QUEUE": queue,
        "WORKER_STATE": str(bench.directory / "workers"),
        "BUILDKITE_BUILD_PATH": str(bench.directory / "builds"),
        "BENCH_STAMPS": str(bench.directory / "stamps"),
    }


@dataclasses.dataclass(slots=True)
class Pair:
    """A scheduler and its workers, which wait for jobs."""

    scheduler: Process
    workers: list[Process]
    tell: Tell = lambda: None

    def cpu(self) -> tuple[float, float]:
        return cpu_seconds(self.scheduler), sum(map(cpu_seconds, self.workers))


@contextmanager
def our_pair(
    bench: Bench, fake: FakeBuildkite, queues: Sequence[str], workers: int, agent: str = "", **more: str
) -> Iterator[Pair]:
    """Both at their defaults."""
    agent_path = {"BUILDKITE_AGENT_PATH": agent or bench.load_path}
    with serve(bench, settings_of(bench, fake, ",".join(queues), **more)) as served, ExitStack() as stack:
        pair = Pair(served.process, [])
        for name, queue in ((f"{queue}-{number}", queue) for queue in queues for number in range(workers)):
            settings = worker_settings(bench, fake.url, f"http://{served.address}", name, queue)
            pair.workers.append(stack.enter_context(bench.process([sys.executable, WORKER], settings | agent_path)))
        wait_until(lambda: served.idle_workers() == workers * len(queues), "workers waiting")
        if "WEBHOOK_TOKEN" in more:
            pair.tell = lambda: post_webhook(served)
        with ended_together(pair.workers):
            yield pair


def post_webhook(served: Served) -> None:
    """What Buildkite sends when a job is scheduled, as far as the scheduler reads it."""
    connection = http.client.HTTPConnection(served.address, timeout=10)
    try:
        headers = {"X-Buildkite-Token": served.environment["WEBHOOK_TOKEN"], "Content-Type": "application/json"}
        connection.request("POST", "/webhook", json.dumps({"event": "job.scheduled"}), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"the webhook was answered {answer.status}: {answer.read()!r}")
    finally:
        connection.close()


@contextmanager
def demo_pair(
    bench: Bench, fake: FakeBuildkite, queues: Sequence[str], workers: int, agent: str = ""
) -> Iterator[Pair]:
    """The demo's server and its workers at their defaults: they ask Buildkite each second, and the server every two."""
    with demo_side(bench, fake, ",".join(queues)) as served, ExitStack() as stack:
        pair = Pair(served.process, [])
        for queue in (queue for queue in queues for _ in range(workers)):
            settings = worker_settings(bench, fake.url, f"http://{served.address}", "", queue) | {
                "BUILDKITE_AGENT_PATH": agent or bench.load_path,
                # What the worker claims with; with a WORKER_QUEUE it would ask for the queue twice, and get nothing.
                "WORKER_AGENT_QUERY_RULES": f"queue={queue}",
                "WORKER_QUEUE": "",
            }
            # They were not all started at the same moment, so neither are their ticks.
            time.sleep(random.random() * 0.2)
            pair.workers.append(stack.enter_context(bench.process([bench.demo, "worker"], settings)))
        time.sleep(min(2.5, bench.scale.dispatch_seconds))  # until each has had its first tick
        with ended_together(pair.workers):
            yield pair


def agent_starts(bench: Bench) -> dict[str, float]:
    """When each job's agent started (Unix seconds), of those that have ended."""
    path = bench.directory / "stamps"
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    words = (line.split() for line in lines)
    return {job: float(started) for job, _, started, _ in words}


def arrivals(scale: Scale) -> list[tuple[float, int]]:
    """When a job comes, and to which queue: to queue 0 each second on average, to the others now and then."""
    found, at = [(0.0, 0)], 0.0
    while (at := at + random.expovariate(1.0)) < scale.dispatch_seconds:
        found.append((at, 0))
    for queue in range(1, scale.idle_queues + 1):
        at = 0.0
        while (at := at + random.uniform(*scale.idle_gap)) < scale.dispatch_seconds:
            found.append((at, queue))
    return sorted(found)


def dispatch(bench: Bench) -> Iterator[Row]:
    """Jobs that come at the same moments to all pairs: to a queue in use, and to queues that were idle."""
    count = 1 + bench.scale.idle_queues
    plain, webhook = "our pair", "our pair with a webhook"
    queues = {
        name: [f"dispatch-{at}-{number}" for number in range(count)] for at, name in enumerate((plain, webhook, DEMO))
    }
    with StampingFake() as fake, ExitStack() as stack:
        pairs = {plain: stack.enter_context(our_pair(bench, fake, queues[plain], WORKERS))}
        with_webhook = our_pair(bench, fake, queues[webhook][:2], WORKERS, WEBHOOK_TOKEN="bench")
        pairs[webhook] = stack.enter_context(with_webhook)
        if bench.demo:
            pairs[DEMO] = stack.enter_context(demo_pair(bench, fake, queues[DEMO], WORKERS))
        begun = time.monotonic()
        added: dict[str, tuple[str, bool, float]] = {}
        for at, queue in arrivals(bench.scale):
            time.sleep(max(0.0, begun + at - time.monotonic()))
            for name, pair in pairs.items():
                if queue < (2 if name == webhook else count):
                    added[fake.add_job(queues[name][queue], command="true")] = name, queue > 0, time.time()
                    pair.tell()
        wait_until(lambda: agent_starts(bench).keys() >= added.keys(), "the agents of all jobs")
    starts = agent_starts(bench)
    for idle, what in ((False, "a queue in use"), (True, "a queue that was idle")):
        waits = {
            name: [starts[job] - at for job, (of, was_idle, at) in added.items() if (of, was_idle) == (name, idle)]
            for name in pairs
        }
        columns = {plain: SQLITE, DEMO: DEMO}
        for part, of in (("mean", statistics.mean), ("p50", median), ("p95", lambda each: share(each, 0.95))):
            values = {name: of(each) * 1000 for name, each in waits.items() if each}
            kept = {columns[name]: value for name, value in values.items() if name in columns}
            told = {"jobs": {name: len(each) for name, each in waits.items()}}
            hooked = ("with a webhook", values[webhook]) if webhook in values else ("", 0.0)
            yield Row(f"scheduled → agent starts, {what}, {part}", "ms", kept, *hooked, detail=told)


# --- Empty jobs ---


def run_empty_jobs(bench: Bench, pair: Callable[..., AbstractContextManager[Pair]]) -> dict[str, float]:
    """So many jobs that do nothing: seconds until the last has finished, and CPU milliseconds for each."""
    queue, count = bench.place("empty").name, bench.scale.empty_jobs
    with StampingFake() as fake, pair(bench, fake, [queue], EMPTY_WORKERS, bench.agent) as running:
        before, fakes = running.cpu(), time.process_time()
        begun = time.time()
        for _ in range(count):
            fake.add_job(queue, command="true")
        jobs = fake.jobs.values()
        wait_until(lambda: all(job.state == "finished" for job in jobs), f"{count} jobs", 240, pause=0.05)
        scheduler, workers = (after - earlier for after, earlier in zip(running.cpu(), before, strict=True))
        cpu = {"scheduler": scheduler, "workers": workers, "fake": time.process_time() - fakes}
        return finished(fake, begun) | {f"{name}_cpu_ms": seconds / count * 1000 for name, seconds in cpu.items()}


def finished(fake: FakeBuildkite, begun: float) -> dict[str, float]:
    jobs = fake.jobs.values()
    acquired = min(at for job in jobs for at, what, _ in job.history if what == "acquired")
    last = max(job.finished_at or 0.0 for job in jobs)
    return {"seconds": last - begun, "until_first_s": acquired - begun, "from_first_s": last - acquired}


def floor_of_empty_jobs(bench: Bench) -> dict[str, float]:
    """The same agents with nobody who dispatches: xargs starts the next when one has ended."""
    with StampingFake() as fake:
        jobs = [fake.add_job("floor", command="true", state="reserved") for _ in range(bench.scale.empty_jobs)]
        settings = worker_settings(bench, fake.url, "", "", "floor")
        environment = {name: text for name, text in settings.items() if not name.startswith("WORKER_")}
        # As worker.py has it.
        environment |= {"BUILDKITE_AGENT_PING_MODE": "poll-only"}
        command = [
            "xargs",
            "-P",
            str(EMPTY_WORKERS),
            "-I{}",
            bench.agent,
            "start",
            "--acquire-job",
            "{}",
            "--spawn",
            "1",
        ]
        command += ["--queue", "floor", "--name", "floor-{}"]
        fakes, begun = time.process_time(), time.time()
        with open(bench.place("floor") / "log", "wb") as log:
            subprocess.run(
                command, input="\n".join(jobs), text=True, env=clean_environment() | environment,
                stdout=log, stderr=log, check=True, timeout=240,
            )  # fmt: skip
        fake_cpu = (time.process_time() - fakes) / len(jobs) * 1000
        return finished(fake, begun) | {"fake_cpu_ms": fake_cpu}


def empty_jobs(bench: Bench) -> Iterator[Row]:
    """Jobs that do nothing. The demo is run once: its workers need two seconds for each."""
    ours, floor = [], []
    for _ in range(bench.scale.empty_runs):
        ours.append(run_empty_jobs(bench, our_pair))
        floor.append(floor_of_empty_jobs(bench))
    demo = [run_empty_jobs(bench, demo_pair)] if bench.demo else []
    detail = {"ours": ours, "floor": floor, "demo": demo, "agent": Path(bench.agent).name}
    what = f"{bench.scale.empty_jobs} empty jobs, {EMPTY_WORKERS} workers"
    for key, figure in (("seconds", what), ("from_first_s", f"{what}, from the first one acquired")):
        values = {SQLITE: median(run[key] for run in ours)} | ({DEMO: demo[0][key]} if demo else {})
        yield Row(figure, "s", values, f"xargs -P {EMPTY_WORKERS}", median(run[key] for run in floor), detail)
        detail = {}
    cpu = {
        name: median(run["scheduler_cpu_ms"] + run["workers_cpu_ms"] for run in runs)
        for name, runs in ((SQLITE, ours), (DEMO, demo))
        if runs
    }
    yield Row("CPU: an empty job, of scheduler and workers", "ms each", cpu)


# --- Parked workers ---

#: Jobs that come at once to parked workers: one full batch of Buildkite's.
MOST_AT_ONCE = 1000


class Parked:
    """Claims that wait, and what became of them."""

    def __init__(self, *processes: Process):
        self._changed = threading.Condition()
        self.answered: dict[str, int] = {}
        for process in processes:
            threading.Thread(target=self._read, args=[process], daemon=True).start()

    def _read(self, process: Process) -> None:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("waiting"):
                continue
            job, _, at = line.partition(" ")
            with self._changed:
                self.answered[job] = int(at) if job != "lost" else -1
                self._changed.notify_all()

    def wait_for(self, jobs: Sequence[str], seconds: float = 60.0) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: "lost" in self.answered or self.answered.keys() >= {*jobs}, seconds)
        if not found or "lost" in self.answered:
            raise RuntimeError(f"{len(jobs)} jobs for parked workers: {len(self.answered)} answers came")


def wake(fake: StampingFake, parked: Parked, queue: str, times: int) -> list[str]:
    """One job after the other, each when the last has been answered."""
    jobs: list[str] = []
    for _ in range(times):
        jobs.append(fake.add_job(queue))
        parked.wait_for(jobs[-1:])
    return jobs


def milliseconds(jobs: Iterable[str], begun: dict[str, int], ended: dict[str, int]) -> list[float]:
    return sorted((ended[job] - begun[job]) / 1e6 for job in jobs)


def python_memory(bench: Bench) -> int:
    """KiB of a Python that has nothing to do."""
    with bench.process([sys.executable, "-c", "print('up', flush=True); input()"]) as process:
        first_line(process)
        return status_of(process.pid)["rss_kb"]


def parked_workers(bench: Bench) -> Iterator[Row]:
    """Claims that wait: from Buildkite's answer that a job is reserved until a worker has read it; and memory."""
    python_kb = python_memory(bench)
    for n in bench.scale.parked:
        yield from parked_rows(bench, n, python_kb)


def parked_rows(bench: Bench, n: int, python_kb: int) -> Iterator[Row]:
    with ExitStack() as stack:
        fake = stack.enter_context(StampingFake())
        environment = settings_of(bench, fake, "parked", POLL_INTERVAL="200ms", **LONG_LEASES)
        served = stack.enter_context(serve(bench, environment))
        command = bench.load_command("wait", addr=served.address, path=served.path(wait=60), n=n)
        waiters = stack.enter_context(bench.process(command))
        first_line(waiters)
        wait_until(lambda: status_of(served.process.pid)["threads"] > n, f"{n} parked claims", 180)
        time.sleep(0.5 + n / 5000)  # the last of them have to come from their thread's start to their wait
        memory = status_of(served.process.pid)
        parked = Parked(waiters)
        wake(fake, parked, "parked", 3)
        jobs = wake(fake, parked, "parked", bench.scale.wakes)
        crowd = [fake.add_job("parked") for _ in range(min(n, MOST_AT_ONCE))]
        parked.wait_for(crowd)
    one, many = (milliseconds(each, fake.confirmed, parked.answered) for each in (jobs, crowd))
    yield Row(f"reserved → answer, {n} parked, p50", "ms", {SQLITE: share(one, 0.5)})
    yield Row(f"reserved → answer, {n} parked, p99", "ms", {SQLITE: share(one, 0.99)})
    yield Row(f"reserved → answer, {n} parked, {len(crowd)} jobs at once, p99", "ms", {SQLITE: share(many, 0.99)})
    if n == max(bench.scale.parked):
        python = "python3 -c pass"
        yield Row(f"memory with {n} parked", "MB", {SQLITE: memory["rss_kb"] / 1024}, python, python_kb / 1024)


# --- Several schedulers ---

#: Connections, and workers that wait, of all schedulers together.
SHARED_CONNECTIONS, SHARED_PARKED = 24, 30


@contextmanager
def serve_together(bench: Bench, fake: FakeBuildkite, count: int) -> Iterator[list[Served]]:
    """So many schedulers on one Redis."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(bench))
        queue = bench.place("queue").name
        more = {"POLL_INTERVAL": "200ms", "REDIS_ADDR": redis} | LONG_LEASES
        together = [stack.enter_context(serve(bench, settings_of(bench, fake, queue, **more))) for _ in range(count)]
        wait_until(lambda: fake.stacks, "registration")
        yield together


def shared_claims(bench: Bench, fake: FakeBuildkite, together: Sequence[Served]) -> float:
    """Claims per second at all of them, each asked on its part of the connections."""
    part = bench.scale.claims // len(together)
    for _ in range(part * len(together)):
        fake.add_job(together[0].queue)
    wait_until(lambda: together[0].ready() == part * len(together), "jobs to be claimed", pause=0.05)
    n = SHARED_CONNECTIONS // len(together)
    asked = {"path": together[0].path(), "n": n, "count": part, "seconds": 20}
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda served: bench.load("claims", addr=served.address, **asked), together))
    return float(sum(run["statuses"]["200"] for run in runs) / max(run["seconds"] for run in runs))


def shared_wakes(bench: Bench, fake: StampingFake, together: Sequence[Served]) -> list[float]:
    """Milliseconds from Buildkite's answer that a job is reserved until a worker has it, who waits at any of them."""
    with ExitStack() as stack:
        n, path = SHARED_PARKED // len(together), together[0].path(wait=60)
        commands = [bench.load_command("wait", addr=served.address, path=path, n=n) for served in together]
        waiters = [stack.enter_context(bench.process(command)) for command in commands]
        for waiter in waiters:
            first_line(waiter)
        pids = [served.process.pid for served in together]
        wait_until(lambda: all(status_of(pid)["threads"] > n for pid in pids), f"{n} claims parked at each")
        parked = Parked(*waiters)
        queue = together[0].queue
        wake(fake, parked, queue, 3)
        return milliseconds(wake(fake, parked, queue, bench.scale.wakes // 2 + 1), fake.confirmed, parked.answered)


def several(bench: Bench) -> Iterator[Row]:
    """One Redis, one to three schedulers."""
    for count in (1, 2, 3):
        with StampingFake() as fake, serve_together(bench, fake, count) as together:
            rates = [shared_claims(bench, fake, together) for _ in range(bench.scale.shared_runs)]
            wakes = shared_wakes(bench, fake, together)
        what = f"{count} scheduler{'s' * (count > 1)}"
        yield Row(
            f"claims, {what}, {SHARED_CONNECTIONS} connections", "/s", {REDIS: median(rates)}, detail={"rates": rates}
        )
        detail = {"p99_ms": share(wakes, 0.99)}
        yield Row(f"reserved → answer, {what}, p50", "ms", {REDIS: share(wakes, 0.5)}, detail=detail)


# --- Starts ---


def python_seconds() -> float:
    """How long `python3 -c pass` takes."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], env=clean_environment(), check=True)
    return time.monotonic() - begun


def worker_start(bench: Bench) -> tuple[float, int]:
    """Seconds from a worker's start to its first claim at the scheduler, and its memory (KiB) while that waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        begun = time.monotonic()
        with bench.process([sys.executable, WORKER], worker_settings(bench, "", url, "idle", "x")) as process:
            server.settimeout(20)
            connection, _ = server.accept()
            with connection:
                assert b"/jobs" in connection.recv(4096)
                seconds = time.monotonic() - begun
                time.sleep(0.1)
                return seconds, status_of(process.pid)["rss_kb"]


def scheduler_start(bench: Bench, fake: FakeBuildkite) -> float:
    """Seconds from a scheduler's start, without jobs, until its port answers."""
    environment = settings_of(bench, fake, "start")
    begun = time.monotonic()
    with serve(bench, environment):
        return time.monotonic() - begun


def starts(bench: Bench) -> Iterator[Row]:
    """How long the two scripts take to start, and an idle worker's memory."""
    python, workers, schedulers = [], [], []
    with StampingFake() as fake:
        for _ in range(bench.scale.starts):
            python.append(python_seconds())
            workers.append(worker_start(bench))
            schedulers.append(scheduler_start(bench, fake))
    bare = "python3 -c pass", median(python) * 1000
    yield Row("worker: start → first claim", "ms", {SQLITE: median(run[0] for run in workers) * 1000}, *bare)
    yield Row("scheduler: start → port answers", "ms", {SQLITE: median(schedulers) * 1000}, *bare)
    memory, python_mb = median(run[1] for run in workers) / 1024, python_memory(bench) / 1024
    yield Row("memory of an idle worker", "MB", {SQLITE: memory}, bare[0], python_mb)


# --- Intake ---


def intake(bench: Bench) -> Iterator[Row]:
    """A long queue, from its first list until all of it can be claimed."""
    count = bench.scale.intake
    with StampingFake() as fake:
        for _ in range(count):
            fake.add_job("intake")
        with serve(bench, settings_of(bench, fake, "intake")) as served:
            wait_until(lambda: fake.stacks, "registration", pause=0.001)
            begun = time.monotonic()
            wait_until(lambda: len(fake.confirmed) == count, f"{count} jobs reserved", pause=0.01)
            wait_until(lambda: served.ready() == count, f"{count} jobs ready", pause=0.01)
            seconds = time.monotonic() - begun
    # Ten lists and ten reserves a second, of 1,000 jobs each, are Buildkite's limit, which the scheduler keeps.
    yield Row(f"intake of {count:,} jobs", "s", {SQLITE: seconds}, "Buildkite's limit", count / 1000 / 10)


# --- Policy ---

#: The least that a policy can do.
RUN_ALL = "def decide(job, fleet):\n    return run()\n"


def decided(served: Served) -> int:
    """How many jobs the policy has decided about."""
    connection = http.client.HTTPConnection(served.address, timeout=70)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return int(sum(map(float, re.findall(r'^stack_moves_total{.*verb="decide".*} (.*)$', text, re.MULTILINE))))


def decide_all(bench: Bench, count: int, **settings: str) -> tuple[float, float]:
    """Seconds and CPU seconds of a scheduler from its start until so many jobs can be claimed."""
    with StampingFake() as fake:
        for _ in range(count):
            fake.add_job("policy", env={"A": "x" * 100, "BUILDKITE_PLUGINS": "[]"}, step_key="test")
        with serve(bench, settings_of(bench, fake, "policy", STACK_NOTIFICATIONS="off", **settings)) as served:
            wait_until(lambda: fake.stacks, "registration", pause=0.001)
            begun = time.monotonic()
            wait_until(lambda: served.ready() == count, f"{count} jobs ready", 600, pause=0.1)
            if "POLICY_FILE" in settings:
                wait_until(lambda: decided(served) == count, f"{count} jobs decided", 600, pause=0.1)
            return time.monotonic() - begun, cpu_seconds(served.process)


def policy(bench: Bench) -> Iterator[Row]:
    """What it costs that a policy is asked about each of many jobs, beside the same jobs without one."""
    count = bench.scale.policy
    path = bench.place("policy") / "policy.py"
    path.write_text(RUN_ALL, encoding="utf-8")
    with_policy, without = (decide_all(bench, count, **more) for more in ({"POLICY_FILE": str(path)}, {}))
    # 1,000 of their specs a second are Buildkite's limit, which the scheduler keeps.
    limit = "Buildkite's limit", count / 1000
    detail = {"without": without}
    yield Row(
        f"{count:,} jobs that a policy lets run → all can be claimed", "s", {SQLITE: with_policy[0]}, *limit, detail
    )
    each = (with_policy[1] - without[1]) / count * 1e6
    yield Row("CPU: a job that a policy lets run, beside one without", "µs each", {SQLITE: each})


# --- Growth ---

#: A worker with ten tags matches 1,024 rule sets: every subset of them.
TAGS = tuple(f"t{number}=1" for number in range(10))


def subsets(count: int) -> list[list[str]]:
    return [[tag for bit, tag in enumerate(TAGS) if number >> bit & 1] for number in range(count)]


@contextmanager
def serve_waiting(bench: Bench, fake: FakeBuildkite, count: int, rules: Sequence[Sequence[str]]) -> Iterator[Served]:
    """A scheduler that has so many jobs ready, their rules taken in turn."""
    queue = bench.place("queue").name
    for number in range(count):
        fake.add_job(queue, rules=[f"queue={queue}", *rules[number % len(rules)]])
    environment = settings_of(bench, fake, queue, **LONG_LEASES)
    with serve(bench, environment) as served:
        wait_until(lambda: served.ready() == count, f"{count} jobs ready", 240, pause=0.1)
        yield served


def claim_cost(
    bench: Bench, served: Served, others: Iterable[Served], tags: Sequence[str] = TAGS, count: int = 0
) -> float:
    """Microseconds that one claim takes on one connection, while the others stand still."""
    path = served.path(tags="," + ",".join(tags))
    with frozen(other.process for other in others if other is not served):
        bench.load("claims", addr=served.address, path=path, count=WARM_UP, seconds=5)
        run = bench.load("claims", addr=served.address, path=path, count=count or bench.scale.growth_claims, seconds=5)
    if set(run["statuses"]) != {"200"}:
        raise RuntimeError(f"claims ran dry: {run['statuses']}")
    return float(run["seconds"] / run["count"] * 1e6)


def grown(bench: Bench, small: list[Served], large: Served) -> tuple[float, float]:
    """The large one's cost and the small one's, in turns; of the small a new one for each turn if its jobs are few."""
    costs: tuple[list[float], list[float]] = ([], [])
    everyone = [*small, large]
    for turn in range(bench.scale.growth_turns):
        costs[0].append(claim_cost(bench, large, everyone))
        costs[1].append(claim_cost(bench, small[turn % len(small)], everyone))
    return median(costs[0]), median(costs[1])


def growth(bench: Bench) -> Iterator[Row]:
    """What a claim costs when much more waits, or when there are many more rule sets; and a restart."""
    scale = bench.scale
    with StampingFake() as fake, ExitStack() as stack:

        def start(count: int, rules: Sequence[Sequence[str]] = ((),)) -> Served:
            return stack.enter_context(serve_waiting(bench, fake, count, rules))

        few, many = scale.waiting
        small, large = [start(few) for _ in range(scale.growth_turns)], start(many)
        cost, base = grown(bench, small, large)
        yield Row(f"a claim, {many:,} waiting", "µs", {SQLITE: cost}, f"with {few:,}", base)
        yield from restart(bench, large, many)
    with StampingFake() as fake, ExitStack() as stack:
        few, many = scale.rule_sets
        jobs = 2 * max(many, scale.growth_turns * (scale.growth_claims + WARM_UP))
        cost, base = grown(bench, [start(jobs, subsets(few))], start(jobs, subsets(many)))
        yield Row(f"a claim, {many:,} rule sets that match", "µs", {SQLITE: cost}, f"with {few:,}", base)


def restart(bench: Bench, served: Served, count: int) -> Iterator[Row]:
    """kill -9, start, and ask until a claim is answered with a job."""
    seconds, process = [], served.process
    with ExitStack() as stack:
        for _ in range(min(3, bench.scale.runs)):
            process.kill()
            process.wait()
            begun = time.monotonic()
            process = stack.enter_context(bench.process([sys.executable, SCHEDULER], served.environment))
            wait_until(lambda: first_claim(served), "the first claim after a restart", pause=0.005)
            seconds.append(time.monotonic() - begun)
    yield Row(f"restart with {count:,} jobs → first claim", "s", {SQLITE: median(seconds)}, detail={"seconds": seconds})


def first_claim(served: Served) -> bool:
    try:
        return served.get(served.path(wait=30))[0] == 200
    except OSError:
        return False


# --- The page ---

#: The jobs that wait have these rules in turn. The fleet's workers match none of them; who claims for the bench, all.
PAGE_TAGS = tuple(f"os=o{number}" for number in range(50))
#: What an open page asks while it is seen, and how often, in seconds: as in page.html.
PAGE_ASKS = {"/fleet": 2.0, "/health": 5.0, "/history?hours=3": 15.0}


def ask_as_worker(served: Served, number: int) -> None:
    """A claim of one of the fleet's workers, eight of which are on a host. There is nothing for it."""
    host = f"host-{number // 8:04}"
    headers = {
        "X-Worker-ID": f"{host}-{number % 8}",
        "X-Worker-Session": f"session-{number}",
        "X-Worker-Host": host,
        "X-Worker-Machine": host,
    }
    connection = http.client.HTTPConnection(served.address, timeout=70)
    try:
        connection.request("GET", served.path(tags=f",arch=amd64,rack=r{number // 80}"), headers=headers)
        if connection.getresponse().status != 204:
            raise RuntimeError("a worker that matches nothing was not told so")
    finally:
        connection.close()


class OpenPage(threading.Thread):
    """Asks what a page asks, on one connection, until it is closed."""

    def __init__(self, served: Served):
        super().__init__(daemon=True)
        self._address, self._closed = served.address, threading.Event()

    def run(self) -> None:
        due, etag = dict.fromkeys(PAGE_ASKS, 0.0), ""
        connection = http.client.HTTPConnection(self._address, timeout=70)
        while not self._closed.is_set():
            path = min(due, key=lambda path: due[path])
            if self._closed.wait(max(0.0, due[path] - time.monotonic())):
                break
            due[path] = time.monotonic() + PAGE_ASKS[path]
            headers = {"Accept-Encoding": "gzip"} | ({"If-None-Match": etag} if path == "/fleet" else {})
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            etag = answer.getheader("ETag") or etag
        connection.close()

    def close(self) -> None:
        self._closed.set()


@contextmanager
def open_pages(served: Served, count: int) -> Iterator[None]:
    pages = [OpenPage(served) for _ in range(count)]
    for each in pages:
        each.start()
    try:
        yield
    finally:
        for each in pages:
            each.close()
        for each in pages:
            each.join(80)


def fleet_cost(bench: Bench, served: Served, numbers: Iterator[int]) -> tuple[float, int]:
    """Milliseconds of CPU for one `/fleet` that is written anew, as a mean, and its bytes when compressed."""
    seconds, size, count = 0.0, 0, bench.scale.page_updates
    for _ in range(count):
        ask_as_worker(served, next(numbers))
        time.sleep(1.1)  # it is written once a second at most
        before = cpu_seconds(served.process)
        connection = http.client.HTTPConnection(served.address, timeout=70)
        connection.request("GET", "/fleet", headers={"Accept-Encoding": "gzip"})
        size = len(connection.getresponse().read())
        seconds += cpu_seconds(served.process) - before
        connection.close()
    return seconds / count * 1000, size


def page(bench: Bench) -> Iterator[Row]:
    """What a large fleet's page costs: the scheduler, those who claim beside it, and the browser."""
    scale = bench.scale
    numbers = itertools.count()
    fleet = f"{scale.page_workers:,} workers, {scale.page_jobs:,} waiting"
    with StampingFake() as fake, serve_waiting(bench, fake, scale.page_jobs, [[tag] for tag in PAGE_TAGS]) as served:
        for number in itertools.islice(numbers, scale.page_workers):
            ask_as_worker(served, number)
        milliseconds, size = fleet_cost(bench, served, numbers)
        yield Row(f"CPU: /fleet, {fleet}", "ms each", {SQLITE: milliseconds})
        yield Row(f"/fleet compressed, {fleet}", "KB", {SQLITE: size / 1000})
        with contextlib.suppress(Missing):
            yield from browser_rows(bench, served, numbers, fleet)
        alone, beside = [], []
        # What is claimed waits no more, so half of it is left at the end; `WARM_UP` is claimed too.
        count = scale.page_jobs // (4 * scale.growth_turns) - WARM_UP // 2
        for _ in range(scale.growth_turns):
            alone.append(claim_cost(bench, served, (), PAGE_TAGS, count))
            with open_pages(served, scale.pages):
                beside.append(claim_cost(bench, served, (), PAGE_TAGS, count))
        # Means: /fleet is written once a second, so few runs have much of it.
        cost, base = statistics.mean(beside), statistics.mean(alone)
        yield Row(f"a claim beside {scale.pages} open pages", "µs", {SQLITE: cost}, "none", base)


#: Notes when the hosts were first painted, in milliseconds since the page was asked for.
FIRST_HOSTS = """
new MutationObserver((_, observer) => {
  if (!document.querySelector("#hosts .host")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.firstHosts = performance.now(); }));
}).observe(document, { childList: true, subtree: true });
"""


@contextmanager
def chromium(bench: Bench) -> Iterator[Any]:
    """A browser without a window; Missing where there is none, or no selenium to drive it."""
    program, driver_program = (shutil.which(name) or "" for name in ("chromium", "chromedriver"))
    try:
        from selenium import webdriver  # noqa: PLC0415  only this part needs it
    except ImportError:
        raise Missing("selenium") from None
    if not program or not driver_program:
        raise Missing("chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = f"--user-data-dir={bench.place('chromium')}"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_program))
    try:
        yield driver
    finally:
        driver.quit()


def browser_rows(bench: Bench, served: Served, numbers: Iterator[int], fleet: str) -> Iterator[Row]:
    with chromium(bench) as browser:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FIRST_HOSTS})
        browser.execute_cdp_cmd("Performance.enable", {})
        browser.get(f"http://{served.address}/")
        painted = wait_until(lambda: browser.execute_script("return window.firstHosts"), "the page's hosts")
        yield Row(f"page: first paint of the hosts, {fleet}", "ms", {SQLITE: painted})
        scripting: list[float] = []
        for _ in range(bench.scale.page_updates):
            before, etag = script_seconds(browser), browser.execute_script("return state.etag")
            ask_as_worker(served, next(numbers))
            wait_until(lambda etag=etag: browser.execute_script("return state.etag") != etag, "an update")  # type: ignore[misc]
            scripting.append((script_seconds(browser) - before) * 1000)
        yield Row(f"page: scripting of an update, {fleet}", "ms", {SQLITE: median(scripting)})


def script_seconds(browser: Any) -> float:
    """How long the page's script has run, as Chromium counts it."""
    told = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(each["value"] for each in told if each["name"] == "ScriptDuration"))


# --- Main ---


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part
    for part in (claims, rounds, dispatch, empty_jobs, parked_workers, several, starts, intake, policy, growth, page)
}


def machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "kind": f"{platform.system()}-{platform.machine()}-{os.cpu_count()}cpu".lower(),
        "cpu": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "go": output_of("go", "version").removeprefix("go version "),
        "redis": output_of("redis-server", "--version"),
        "load_average": os.getloadavg(),
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def revision() -> str:
    return output_of("git", "describe", "--always", "--dirty")


def needs() -> None:
    needed = {
        "go": "golang-go: the load generator is written in Go",
        "redis-server": "redis-server: one of the two stores",
    }
    if missing := [f"  {name}: apt install {package}" for name, package in needed.items() if not shutil.which(name)]:
        raise Missing("make bench needs what is not installed here:\n" + "\n".join(missing))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(bench: Bench, parts: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows of these parts, and the parts that could not be measured to their end."""
    rows, failed = [], []
    for name in parts:
        begun = time.monotonic()
        try:
            for row in PARTS[name](bench):
                rows.append(row)
                values = ", ".join(f"{side} {number(value)}" for side, value in row.values.items())
                print(f"{row.figure} ({row.unit}): {values}", file=sys.stderr)
        except (RuntimeError, OSError, subprocess.SubprocessError):
            traceback.print_exc()
            failed.append(name)
        print(f"    {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return rows, failed


def result(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "revision": revision(),
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one or more of {', '.join(PARTS)}")
    parser.add_argument("--before", default="", metavar="PATH", help="another scheduler.py")
    parser.add_argument(
        "--demo", default=os.environ.get("BENCH_DEMO", ""), metavar="PATH", help="the Go demo's program"
    )
    parser.add_argument("--quick", action="store_true", help="tiny figures")
    found = parser.parse_args(arguments)
    if unknown := set(found.parts) - PARTS.keys():
        parser.error(f"unknown parts {sorted(unknown)}; known are {', '.join(PARTS)}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure the named parts, or all; only a whole run is kept."""
    chosen = options(arguments)
    try:
        needs()
    except Missing as missing:
        sys.stderr.write(f"{missing}\n")
        return 1
    parts = chosen.parts or (["claims", "rounds"] if chosen.before else list(PARTS))
    demo = shutil.which(chosen.demo) or ""
    if not demo:
        print("the Go demo is left out: --demo or BENCH_DEMO names no program", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that every `with` ends what it started
    begun = time.monotonic()
    # Not in /tmp, which may be memory: what is durable costs a disk's time.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT) as directory:
        before = str(Path(chosen.before).resolve()) if chosen.before else ""
        bench = Bench(Path(directory), QUICK if chosen.quick else Scale(), str(demo and Path(demo).resolve()), before)
        rows, failed = measure(bench, parts)
        failed += bench.lost
    found = result(rows, time.monotonic() - begun)
    print(table(rows))
    if failed:
        print(f"not measured to the end: {', '.join(failed)}", file=sys.stderr)
        return 1
    if parts == list(PARTS):
        results = Path(os.environ.get("BENCH_RESULTS") or BENCH / "results")
        results.mkdir(exist_ok=True)
        path = results / f"{found['date'][:10]}-{found['machine']['kind']}.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
