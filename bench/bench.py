#!/usr/bin/env python3
"""`make bench`: how fast the two scripts are, each figure beside a yardstick that was measured in the same minute.

It drives them from outside: as processes, over HTTP, against the fake Buildkite of the tests. The load comes from
load.go, the yardsticks from bare_server.py, polling_pair.py, beanstalkd and Python itself; what several schedulers
share is a real Redis. Everything is on loopback, bounded in count and time, and ended when it is over. What it prints
it also writes to bench/results/ as JSON.

BENCH_SCALE=tiny measures nothing worth knowing, but everything once, in seconds: for the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import itertools
import json
import os
import platform
import random
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
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import scheduler  # noqa: E402
from fake_buildkite import Call, FakeBuildkite  # noqa: E402

Process = subprocess.Popen[str]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: counts, and how many runs of each a median is taken over."""

    runs: int = 3
    claims: int = 2000
    idle_seconds: float = 0.5
    parked: tuple[int, ...] = (1, 100, 1000, 5000)
    wakes: int = 70
    starts: int = 10
    intake: int = 20_000
    waiting: tuple[int, ...] = (100, 10_000, 100_000)
    rule_sets: tuple[int, ...] = (1, 100, 1000)
    growth_claims: int = 60
    growth_turns: int = 5
    single_jobs: int = 10
    backlog: int = 500
    polled_backlog: int = 100
    workers: int = 20


TINY = Scale(
    runs=1,
    claims=100,
    idle_seconds=0.05,
    parked=(1, 10),
    wakes=4,
    starts=1,
    intake=1500,
    waiting=(100, 1000),
    rule_sets=(1, 10),
    growth_claims=20,
    growth_turns=2,
    single_jobs=1,
    backlog=6,
    polled_backlog=4,
    workers=2,
)

CONNECTIONS = (1, 8, 64)
#: What each job of the backlog does, in seconds.
JOB_SECONDS = 0.3


# --- The table ---


@dataclasses.dataclass(slots=True)
class Row:
    """One figure beside its yardstick. `goal` is the bound of their ratio, or of the figure if it has a unit."""

    figure: str
    value: float
    unit: str
    yardstick: str
    yardstick_value: float
    goal: str = ""
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.value / self.yardstick_value

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one. Goals read like "ratio >= 0.5" or "value <= 250"."""
        if not self.goal:
            return None
        subject, comparison, bound = self.goal.split()
        measured = self.ratio if subject == "ratio" else self.value
        return measured >= float(bound) if comparison == ">=" else measured <= float(bound)


def text_of(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def table(rows: Iterable[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| figure | measured | yardstick, in the same run | | ratio | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        verdict = {None: "", True: f"{row.goal}: met", False: f"{row.goal}: **missed**"}[row.met]
        cells = [
            row.figure,
            text_of(row.value, row.unit),
            row.yardstick,
            text_of(row.yardstick_value, row.unit),
            f"{row.ratio:.3g}",
            verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Processes ---


class Missing(Exception):
    """Something that the bench needs is not installed."""


class Bench:
    """The directory of one run, and what is started in it: everything ends with the `with` that started it."""

    def __init__(self, directory: Path, scale: Scale):
        self.directory, self.scale = directory, scale
        self._numbers = itertools.count(1)
        self.load_path = str(directory / "load")
        subprocess.run(["go", "build", "-o", self.load_path, str(BENCH / "load.go")], check=True)

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
        try:
            yield process
        finally:
            end(process)

    def load(self, command: str, **options: object) -> dict[str, Any]:
        """Run the load generator to its end: what it reports."""
        run = subprocess.run(self.load_command(command, **options), capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"load {command} {options}: {run.stderr}")
        answer: dict[str, Any] = json.loads(run.stdout)
        return answer

    def load_command(self, command: str, **options: object) -> list[str]:
        return [self.load_path, command, *(f"-{name}={value}" for name, value in options.items())]


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


def status_of(pid: int) -> dict[str, int]:
    """`rss_kb` and `threads` of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {"rss_kb": int(fields["VmRSS"].split()[0]), "threads": int(fields["Threads"])}


# --- The scheduler, its store and its Buildkite ---


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
    directory: Path
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
        count: int = self.get("/stats")[1]["states"]["ready"]
        return count

    def idle_workers(self) -> int:
        return sum(worker["state"] == "idle" for worker in self.get("/stats")[1]["workers"])

    def answers(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False


def settings_of(fake: FakeBuildkite, state: Path, queue: str, **more: str) -> dict[str, str]:
    return {
        "BUILDKITE_AGENT_TOKEN": fake.token,
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "SCHEDULER_QUEUES": queue,
        "STACK_KEY": "bench",
        "STATE_DIRECTORY": str(state),
        "LISTEN": f"127.0.0.1:{free_port()}",
        # What is claimed here is never touched.
        "LEASE_SECONDS": "3600",
        "RESERVATION_SECONDS": "3600",
        **more,
    }


def prefill(
    state: Path, environment: dict[str, str], queue: str, rules: Sequence[Sequence[str]], count: int
) -> list[str]:
    """Write a store as a scheduler leaves it that has reserved so many jobs, their rules taken in turn; their uuids."""
    settings = scheduler.read_settings(scheduler.Settings, environment)
    now = time.time()
    listed = [
        {
            "id": str(uuid.uuid4()),
            "priority": 0,
            "agent_query_rules": [f"queue={queue}", *rules[number % len(rules)]],
            "scheduled_at": scheduler.rfc3339(now - count + number),
            "pipeline": {"slug": "bench", "uuid": str(uuid.uuid4())},
            "build": {"uuid": str(uuid.uuid4()), "number": number, "branch": "main"},
            "step": {"key": f"step-{number}"},
        }
        for number in range(count)
    ]
    store = scheduler.SqliteStore(str(state), settings)
    for start in range(0, count, 10_000):
        jobs = [scheduler.Job.from_api(queue, raw, now) for raw in listed[start : start + 10_000]]
        store.put(jobs, store.sequence(), now)
        store.confirm([job.uuid for job in jobs], store.sequence(), now + 3600, now)
    store.close()
    return [str(raw["id"]) for raw in listed]


@contextmanager
def serve(bench: Bench, environment: dict[str, str], script: Path = ROOT / "scheduler.py") -> Iterator[Served]:
    """A scheduler with these settings, as soon as it answers."""
    with bench.process([sys.executable, script], environment) as process:
        served = Served(process, environment["LISTEN"], Path(environment["STATE_DIRECTORY"]), environment)
        wait_until(served.answers, "the scheduler's port", pause=0.005)
        yield served


@contextmanager
def serve_prefilled(
    bench: Bench, fake: FakeBuildkite, count: int, rules: Sequence[Sequence[str]] = ((),), **more: str
) -> Iterator[Served]:
    """A scheduler that has so many jobs ready, in a queue of its own."""
    state = bench.place("store")
    queue = state.name
    environment = settings_of(fake, state, queue, **more)
    for job in prefill(state, environment, queue, rules, count):
        fake.add_job(queue, uuid=job, state="reserved")
    with serve(bench, environment) as served:
        wait_until(lambda: served.ready() == count, f"{count} jobs ready", pause=0.1)
        yield served


def jobs_path(queue: str, wait: int = 0, tags: str = "") -> str:
    return f"/jobs?query=queue={queue}{tags}&wait={wait}"


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


@contextmanager
def bare_server(bench: Bench, size: int) -> Iterator[str]:
    with bench.process([sys.executable, BENCH / "bare_server.py", size]) as process:
        yield f"127.0.0.1:{first_line(process)}"


@contextmanager
def beanstalkd(bench: Bench) -> Iterator[str]:
    """Debian's beanstalkd with a binlog, at its defaults: it fsyncs at most every 50 ms, for all jobs at once."""
    port = free_port()
    with bench.process(["beanstalkd", "-l", "127.0.0.1", "-p", port, "-b", bench.place("binlog")]):
        wait_until(lambda: connects(port), "beanstalkd's port", pause=0.01)
        yield f"127.0.0.1:{port}"


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def claim_rounds(bench: Bench, fake: FakeBuildkite, n: int, complete: bool) -> list[tuple[dict[str, Any], ...]]:
    """Rounds of (scheduler, bare server, beanstalkd), one after the other."""
    count = bench.scale.claims
    rounds: list[tuple[dict[str, Any], ...]] = []
    for _ in range(bench.scale.runs):
        with serve_prefilled(bench, fake, count + WARM_UP) as served:
            path = jobs_path(served.directory.name)
            warm_up(bench, served.address, path)
            asked = {"addr": served.address, "path": path, "n": n, "count": count, "seconds": 20}
            ours = bench.load("claims", **asked, complete=complete)
        if set(ours["statuses"]) != {"200"}:
            raise RuntimeError(f"claims ran dry: {ours['statuses']}")
        with bare_server(bench, ours["bytes"] or 450) as address:
            warm_up(bench, address, "/jobs")
            bare = bench.load("claims", addr=address, path="/jobs", n=n, count=count, seconds=20)
        with beanstalkd(bench) as address:
            queue = bench.load("beanstalkd", addr=address, n=n, count=count, size=ours["bytes"])
        rounds.append((ours, bare, queue))
    return rounds


#: Requests before those that are measured: the first of a process find nothing prepared.
WARM_UP = 20


def warm_up(bench: Bench, address: str, path: str) -> None:
    bench.load("claims", addr=address, path=path, count=WARM_UP, seconds=5)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def latencies(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of p50 and p99, and every rate, so that the spread can be seen."""
    return {
        "p50_us": median(run["p50_us"] for run in runs),
        "p99_us": median(run["p99_us"] for run in runs),
        "rates": [round(run["rate"]) for run in runs],
        "runs": len(runs),
    }


def claims(bench: Bench) -> Iterator[Row]:
    with StampingFake() as fake:
        for n in CONNECTIONS:
            ours, bare, queue = zip(*claim_rounds(bench, fake, n, complete=False), strict=True)
            rate = median(run["rate"] for run in ours)
            goal = "ratio >= 0.5" if n > 1 else ""
            detail = {"ours": latencies(ours), "bare": latencies(bare)}
            yield Row(
                f"claims, connections: {n}", rate, "/s", "bare server", median(r["rate"] for r in bare), goal, detail
            )
            verbs = {verb: latencies([run[verb] for run in queue]) for verb in ("put", "reserve", "delete")}
            reserved = median(run["reserve"]["rate"] for run in queue)
            yield Row(f"claims beside a queue, connections: {n}", rate, "/s", "beanstalkd reserve", reserved, "", verbs)
            p99, p50 = (median(run[p] for run in ours) / 1000 for p in ("p99_us", "p50_us"))
            yield Row(f"p99 of a claim, connections: {n}", p99, "ms", "its own p50", p50, "ratio <= 10")
        n = CONNECTIONS[1]
        ours, bare, queue = zip(*claim_rounds(bench, fake, n, complete=True), strict=True)
        rate, detail = median(run["rate"] for run in ours), {"ours": latencies(ours), "bare": latencies(bare)}
        bare_rate = median(run["rate"] for run in bare) / 2
        yield Row(
            f"claim and complete, {n} named workers", rate, "/s", "two requests, bare server", bare_rate, "", detail
        )


def idle_claims(bench: Bench) -> Iterator[Row]:
    with StampingFake() as fake, ExitStack() as stack:
        served = stack.enter_context(serve_prefilled(bench, fake, 0))
        bare_address = stack.enter_context(bare_server(bench, 0))
        for n in CONNECTIONS:
            ours: list[dict[str, Any]] = []
            bare: list[dict[str, Any]] = []
            for _ in range(bench.scale.runs):
                for address, runs in ((served.address, ours), (bare_address, bare)):
                    path = jobs_path(served.directory.name)
                    runs.append(bench.load("claims", addr=address, path=path, n=n, seconds=bench.scale.idle_seconds))
            rates = [median(run["rate"] for run in runs) for runs in (ours, bare)]
            detail = {"ours": latencies(ours), "bare": latencies(bare)}
            yield Row(f"idle claims, connections: {n}", rates[0], "/s", "bare server", rates[1], "", detail)


# --- Parked workers ---


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


def microseconds(jobs: Iterable[str], begun: dict[str, int], ended: dict[str, int]) -> list[float]:
    return sorted((ended[job] - begun[job]) / 1000 for job in jobs)


def share(values: Sequence[float], part: float) -> float:
    return values[int(part * (len(values) - 1))]


def stamps_in(path: Path) -> dict[str, int]:
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return {job: int(at) for job, at in (line.split() for line in lines)}


def parked_workers(bench: Bench) -> Iterator[Row]:
    python_kb = python_memory(bench)
    for n in bench.scale.parked:
        yield from parked_rows(bench, n, python_kb)


def parked_rows(bench: Bench, n: int, python_kb: int) -> Iterator[Row]:
    with ExitStack() as stack:
        fake = stack.enter_context(StampingFake())
        state = bench.place("store")
        stamps = state / "ready"
        environment = settings_of(fake, state, state.name, POLL_INTERVAL="200ms", BENCH_READY=str(stamps))
        served = stack.enter_context(serve(bench, environment, BENCH / "stamped_scheduler.py"))
        command = bench.load_command("wait", addr=served.address, path=jobs_path(state.name, wait=60), n=n)
        waiters = stack.enter_context(bench.process(command))
        first_line(waiters)
        wait_until(lambda: status_of(served.process.pid)["threads"] > n, f"{n} parked claims")
        time.sleep(0.5 + n / 5000)  # the last of them have to come from their thread's start to their wait
        memory = status_of(served.process.pid)
        parked = Parked(waiters)
        wake(fake, parked, state.name, 3)
        with round_trips_meanwhile(bench, n, seconds=max(0.5, bench.scale.wakes / 10)) as round_trips:
            jobs = wake(fake, parked, state.name, bench.scale.wakes)
        crowd = [fake.add_job(state.name) for _ in range(n)]
        parked.wait_for(crowd)
        # The stamps are written after the offers.
        wait_until(lambda: stamps_in(stamps).keys() >= {*crowd}, "the stamps of jobs that were ready")
        yield from woken_rows(n, jobs, crowd, round_trips, (fake.confirmed, stamps_in(stamps), parked.answered))
    if n >= min(1000, max(bench.scale.parked)):
        yield from memory_rows(n, memory, python_kb)


@contextmanager
def round_trips_meanwhile(bench: Bench, idle: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Round trips on loopback while something else is measured; the dict is filled when this is left."""
    found: dict[str, Any] = {}
    with bench.process([bench.load_path, "echo-server"]) as server:
        address = first_line(server)
        pings = threading.Thread(
            target=lambda: found.update(bench.load("echo", addr=address, idle=idle, seconds=seconds))
        )
        pings.start()
        yield found
        pings.join()


def memory_rows(n: int, memory: dict[str, int], python_kb: int) -> Iterator[Row]:
    goal = "value <= 250" if n == 5000 else ""
    detail = {"kb_per_worker": round((memory["rss_kb"] - python_kb) / n, 1)}
    python = "python3 -c pass"
    yield Row(f"memory with {n} parked", memory["rss_kb"] / 1024, "MB", python, python_kb / 1024, goal, detail)
    yield Row(f"threads with {n} parked", memory["threads"], "", python, 1)


def woken_rows(
    n: int, jobs: list[str], crowd: list[str], round_trips: dict[str, Any], moments: tuple[dict[str, int], ...]
) -> Iterator[Row]:
    confirmed, ready, answered = moments
    since_ready, since_confirmed = (microseconds(jobs, begun, answered) for begun in (ready, confirmed))
    at_once = microseconds(crowd, ready, answered)
    detail = {
        "round_trip_p99_us": round_trips["p99_us"],
        "from_buildkites_answer_p50_us": share(since_confirmed, 0.5),
        "from_buildkites_answer_p99_us": share(since_confirmed, 0.99),
        "wakes": len(jobs),
    }
    goal = {100: "ratio <= 10", 5000: "ratio <= 50"}.get(n, "")
    trip = "loopback round trip, p50"
    yield Row(
        f"ready → answer, {n} parked, p50", share(since_ready, 0.5), "µs", trip, round_trips["p50_us"], "", detail
    )
    yield Row(f"ready → answer, {n} parked, p99", share(since_ready, 0.99), "µs", trip, round_trips["p50_us"], goal)
    if n > 1:
        # Of each batch of up to 1,000 the last job is answered after all the others.
        detail = {"p50_us": share(at_once, 0.5), "p99_us": share(at_once, 0.99)}
        yield Row(
            f"ready → answer, {n} parked, {n} jobs at once, p99",
            share(at_once, 0.99),
            "µs",
            trip,
            round_trips["p50_us"],
            "",
            detail,
        )


# --- Several schedulers ---

#: Connections, and workers that wait, of all schedulers together.
SHARED_CONNECTIONS, SHARED_PARKED = 24, 30


@contextmanager
def redis_server(bench: Bench) -> Iterator[str]:
    """Debian's Redis as the README has it: an append-only file, on the disk within a second."""
    port, directory = free_port(), bench.place("redis")
    options = {"port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes"}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    with bench.process(command):
        wait_until(lambda: connects(port), "Redis's port", pause=0.01)
        yield f"127.0.0.1:{port}"


@contextmanager
def serve_together(bench: Bench, fake: FakeBuildkite, count: int) -> Iterator[tuple[str, list[Served]]]:
    """The queue of so many schedulers on one Redis, and they; 0: of one scheduler on SQLite."""
    with ExitStack() as stack:
        more = {"REDIS_ADDR": stack.enter_context(redis_server(bench))} if count else {}
        queue = bench.place("store").name
        places = [bench.place("store") for _ in range(max(1, count))]
        settings = [settings_of(fake, place, queue, POLL_INTERVAL="200ms", **more) for place in places]
        together = [stack.enter_context(serve(bench, each)) for each in settings]
        wait_until(lambda: fake.stacks, "registration")
        yield queue, together


def shared_claims(bench: Bench, fake: FakeBuildkite, queue: str, together: Sequence[Served]) -> float:
    """Claims per second at all of them, each asked on its part of the connections."""
    part = bench.scale.claims // len(together)
    for _ in range(part * len(together)):
        fake.add_job(queue)
    wait_until(lambda: together[0].ready() == part * len(together), "jobs to be claimed", pause=0.05)
    n = SHARED_CONNECTIONS // len(together)
    asked = {"path": jobs_path(queue), "n": n, "count": part, "seconds": 20}
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda served: bench.load("claims", addr=served.address, **asked), together))
    return float(sum(run["statuses"]["200"] for run in runs) / max(run["seconds"] for run in runs))


def shared_wakes(bench: Bench, fake: StampingFake, queue: str, together: Sequence[Served]) -> list[float]:
    """Microseconds from Buildkite's answer that a job is reserved until a worker has it, who waits at any of them."""
    with ExitStack() as stack:
        n = SHARED_PARKED // len(together)
        commands = [
            bench.load_command("wait", addr=served.address, path=jobs_path(queue, wait=60), n=n) for served in together
        ]
        waiters = [stack.enter_context(bench.process(command)) for command in commands]
        for waiter in waiters:
            first_line(waiter)
        pids = [served.process.pid for served in together]
        wait_until(lambda: all(status_of(pid)["threads"] > n for pid in pids), f"{n} claims parked at each")
        parked = Parked(*waiters)
        wake(fake, parked, queue, 3)
        return microseconds(wake(fake, parked, queue, bench.scale.wakes // 2), fake.confirmed, parked.answered)


def several(bench: Bench) -> Iterator[Row]:
    rates, wakes = {}, {}
    for count in (0, 1, 2, 3):
        with StampingFake() as fake, serve_together(bench, fake, count) as (queue, together):
            rates[count] = median(shared_claims(bench, fake, queue, together) for _ in range(bench.scale.runs))
            wakes[count] = shared_wakes(bench, fake, queue, together)
    for count in (1, 2, 3):
        what = f"{count} scheduler{'s' * (count > 1)} on Redis"
        yield Row(f"claims, {what}", rates[count], "/s", "one on SQLite", rates[0])
        for name, part in (("p50", 0.5), ("p99", 0.99)):
            ours, sqlite = (share(wakes[each], part) / 1000 for each in (count, 0))
            yield Row(f"reserved → answer, {what}, {name}", ours, "ms", "one on SQLite", sqlite)


# --- Starts ---


def python_seconds() -> float:
    """How long `python3 -c pass` takes."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], env=clean_environment(), check=True)
    return time.monotonic() - started


def python_memory(bench: Bench) -> int:
    """KiB of a Python that has nothing to do."""
    with bench.process([sys.executable, "-c", "print('up', flush=True); input()"]) as process:
        first_line(process)
        return status_of(process.pid)["rss_kb"]


def worker_settings(bench: Bench, fake_url: str, server: str, name: str, queue: str) -> dict[str, str]:
    return {
        "BUILDKITE_AGENT_TOKEN": "bkct_test",
        "BUILDKITE_AGENT_ENDPOINT": fake_url,
        "BUILDKITE_AGENT_PATH": bench.load_path,
        "WORKER_API_SERVER": server,
        "WORKER_NAME": name,
        "WORKER_QUEUE": queue,
        "WORKER_STATE": str(bench.directory / "workers"),
        "BENCH_STAMPS": str(bench.directory / f"stamps-{queue}"),
    }


def worker_start(bench: Bench) -> tuple[float, int]:
    """Seconds from a worker's start to its first claim at the scheduler, and its memory (KiB) while that waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with bench.process(
            [sys.executable, ROOT / "worker.py"], worker_settings(bench, "", url, "idle", "x")
        ) as process:
            server.settimeout(20)
            connection, _ = server.accept()
            with connection:
                assert b"/jobs" in connection.recv(4096)
                seconds = time.monotonic() - started
                time.sleep(0.1)
                return seconds, status_of(process.pid)["rss_kb"]


def scheduler_start(bench: Bench, fake: FakeBuildkite) -> float:
    """Seconds from a scheduler's start, without jobs, until its port answers."""
    state = bench.place("store")
    started = time.monotonic()
    with serve(bench, settings_of(fake, state, state.name)):
        return time.monotonic() - started


def starts(bench: Bench) -> Iterator[Row]:
    python, workers, schedulers = [], [], []
    with StampingFake() as fake:
        for _ in range(bench.scale.starts):
            python.append(python_seconds())
            workers.append(worker_start(bench))
            schedulers.append(scheduler_start(bench, fake))
    bare = median(python) * 1000
    runs = {"runs": len(python)}
    worker_ms, worker_mb = median(run[0] for run in workers) * 1000, median(run[1] for run in workers) / 1024
    yield Row("worker: start → first claim", worker_ms, "ms", "python3 -c pass", bare, "value <= 150", runs)
    scheduler_ms = median(schedulers) * 1000
    yield Row("scheduler: start → port answers", scheduler_ms, "ms", "python3 -c pass", bare, "", runs)
    python_mb = python_memory(bench) / 1024
    yield Row("memory of an idle worker", worker_mb, "MB", "python3 -c pass", python_mb, "value <= 25", runs)


# --- Intake ---


def replay(count: int) -> float:
    """Seconds that the fake itself needs: the same calls, without anybody who reads the answers."""
    with StampingFake() as fake:
        uuids = [fake.add_job("intake") for _ in range(count)]
        connection = http.client.HTTPConnection("127.0.0.1", fake.port)
        headers = {"Authorization": f"Token {fake.token}", "Content-Type": "application/json"}

        def call(method: str, path: str, body: Any = None) -> None:
            connection.request(method, f"/v3/stacks{path}", body and json.dumps(body), headers)
            connection.getresponse().read()

        call("POST", "/register", {"key": "replay", "type": "custom", "queue_key": "intake", "metadata": {}})
        started = time.monotonic()
        for start in range(0, count, 1000):
            call("GET", "/replay/scheduled-jobs?queue_key=intake&limit=1000")
            body = {"job_uuids": uuids[start : start + 1000], "reservation_expiry_seconds": 900}
            call("PUT", "/replay/scheduled-jobs/batch-reserve", body)
        seconds = time.monotonic() - started
        connection.close()
        return seconds


def intake(bench: Bench) -> Iterator[Row]:
    count = bench.scale.intake
    before = replay(count)
    with StampingFake() as fake:
        for _ in range(count):
            fake.add_job("intake")
        environment = settings_of(fake, bench.place("store"), "intake")
        with serve(bench, environment) as served:
            wait_until(lambda: fake.stacks, "registration", pause=0.001)
            started = time.monotonic()
            wait_until(lambda: len(fake.confirmed) == count, f"{count} jobs reserved", pause=0.01)
            wait_until(lambda: served.ready() == count, f"{count} jobs ready", pause=0.01)
            seconds = time.monotonic() - started
    after = replay(count)
    calls = 2 * count // scheduler.BATCH
    detail = {"fake_s": [before, after], "calls": calls, "jobs_per_s": count / seconds}
    yield Row(f"intake of {count:,} jobs", seconds, "s", "the fake's own time", (before + after) / 2, "", detail)
    # Ten lists and ten reserves a second are Buildkite's limit, which the scheduler keeps by itself.
    paced = count / scheduler.BATCH / 10
    yield Row(
        f"intake of {count:,} jobs beside the limit", seconds, "s", "ten batches a second, Buildkite's limit", paced
    )


# --- Growth ---

#: A worker with ten tags matches 1,024 rule sets: every subset of them.
TAGS = tuple(f"t{number}=1" for number in range(10))


def subsets(count: int) -> list[list[str]]:
    return [[tag for bit, tag in enumerate(TAGS) if number >> bit & 1] for number in range(count)]


def strangers(count: int) -> list[list[str]]:
    """Rule sets of which the worker matches one alone, that of every other job."""
    others = [["other=1", f"rack={number}"] for number in range(count - 1)]
    return [[], *itertools.chain.from_iterable((each, []) for each in others)]


def claim_cost(bench: Bench, served: Served, others: Iterable[Served]) -> float:
    """Microseconds that one claim takes on one connection, while the others stand still."""
    path = jobs_path(served.directory.name, tags="," + ",".join(TAGS))
    with frozen(other.process for other in others if other is not served):
        warm_up(bench, served.address, path)
        run = bench.load("claims", addr=served.address, path=path, count=bench.scale.growth_claims, seconds=5)
    if set(run["statuses"]) != {"200"}:
        raise RuntimeError(f"claims ran dry: {run['statuses']}")
    return float(run["seconds"] / run["count"] * 1e6)


def grown(bench: Bench, cases: dict[str, list[Served]], everyone: list[Served]) -> dict[str, list[float]]:
    """Each case's cost, in turns."""
    costs: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(bench.scale.growth_turns):
        for name, served in cases.items():
            costs[name].append(claim_cost(bench, served[turn % len(served)], everyone))
    return costs


def growth_rows(costs: dict[str, list[float]], limit: str) -> Iterator[Row]:
    (smallest, base), *others = costs.items()
    *_, largest = costs
    for name, each in others:
        goal = f"ratio <= {limit}" if name == largest else ""
        detail = {"us": each, "smallest_us": base}
        yield Row(f"a claim, {name}", median(each), "µs", smallest, median(base), goal, detail)


def growth(bench: Bench) -> Iterator[Row]:
    scale = bench.scale
    with StampingFake() as fake, ExitStack() as stack:

        def start(count: int, rules: Sequence[Sequence[str]] = ((),)) -> Served:
            return stack.enter_context(serve_prefilled(bench, fake, count, rules))

        smallest, *larger = scale.waiting
        # Of the smallest a new one for each turn: its jobs are few.
        waiting = {f"{smallest:,} waiting": [start(smallest) for _ in range(scale.growth_turns)]}
        waiting |= {f"{count:,} waiting": [start(count)] for count in larger}
        everyone = [served for each in waiting.values() for served in each]
        yield from growth_rows(grown(bench, waiting, everyone), "1.3")
        yield from restart(bench, waiting[f"{larger[-1]:,} waiting"][0], larger[-1])
    for words, make in (("that match", subsets), ("of others", strangers)):
        with StampingFake() as fake, ExitStack() as stack:
            jobs = 2 * max(*scale.rule_sets, scale.growth_turns * (scale.growth_claims + WARM_UP))
            cases = {
                f"{count:,} rule sets {words}": [stack.enter_context(serve_prefilled(bench, fake, jobs, make(count)))]
                for count in scale.rule_sets
            }
            everyone = [each[0] for each in cases.values()]
            yield from growth_rows(grown(bench, cases, everyone), "2")


def restart(bench: Bench, served: Served, count: int) -> Iterator[Row]:
    """kill -9, start, and ask until a claim is answered with a job."""
    seconds, reads = [], []
    process = served.process
    with ExitStack() as stack:
        for _ in range(bench.scale.runs):
            process.kill()
            process.wait()
            started = time.monotonic()
            for path in served.directory.glob("jobs.sqlite3*"):
                path.read_bytes()
            reads.append(time.monotonic() - started)
            started = time.monotonic()
            process = stack.enter_context(bench.process([sys.executable, ROOT / "scheduler.py"], served.environment))
            wait_until(lambda: first_claim(served), "the first claim after a restart", pause=0.005)
            seconds.append(time.monotonic() - started)
        detail = {"seconds": seconds, "read_s": reads, "runs": len(seconds)}
        figure = f"restart with {count:,} jobs → first claim"
        yield Row(figure, median(seconds), "s", "reading the file", median(reads), "value <= 2", detail)


def first_claim(served: Served) -> bool:
    try:
        return served.get(jobs_path(served.directory.name, wait=30))[0] == 200
    except OSError:
        return False


# --- End to end ---


def agent_stamps(bench: Bench, queue: str) -> dict[str, tuple[str, float, float]]:
    """Of each job whose agent has ended: the worker's name, and when the agent started and ended (Unix seconds)."""
    path = bench.directory / f"stamps-{queue}"
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    words = (line.split() for line in lines)
    return {job: (name, float(started), float(ended)) for job, name, started, ended in words}


#: Tells a pair that there is a new job; most must find that out by themselves.
Tell = Callable[[], None]


@contextmanager
def stack_of_ours(bench: Bench, fake: FakeBuildkite, queue: str, workers: int, **more: str) -> Iterator[Tell]:
    """The scheduler and its workers at their default settings."""
    environment = settings_of(fake, bench.place("store"), queue, LEASE_SECONDS="30", RESERVATION_SECONDS="900", **more)
    with serve(bench, environment) as served, ExitStack() as stack:
        for number in range(workers):
            settings = worker_settings(bench, fake.url, f"http://{served.address}", f"{queue}-{number}", queue)
            stack.enter_context(bench.process([sys.executable, ROOT / "worker.py"], settings))
        wait_until(lambda: served.idle_workers() == workers, f"{workers} workers waiting")
        yield lambda: post_webhook(served) if "WEBHOOK_TOKEN" in more else None


def stack_with_webhook(
    bench: Bench, fake: FakeBuildkite, queue: str, workers: int
) -> contextlib.AbstractContextManager[Tell]:
    return stack_of_ours(bench, fake, queue, workers, WEBHOOK_TOKEN="bench")


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
def polling_pair(bench: Bench, fake: FakeBuildkite, queue: str, workers: int) -> Iterator[Tell]:
    command = [sys.executable, BENCH / "polling_pair.py", fake.url, fake.token, queue, workers, bench.load_path]
    with bench.process(command, {"BENCH_STAMPS": str(bench.directory / f"stamps-{queue}")}):
        wait_until(lambda: "polling" in fake.stacks, "the polling scheduler")
        yield lambda: None


Pair = Callable[[Bench, FakeBuildkite, str, int], contextlib.AbstractContextManager[Tell]]


def agent_start(bench: Bench, queue: str, job: str) -> float:
    """When the job's agent started (Unix seconds); waits until it has ended."""
    wait_until(lambda: job in agent_stamps(bench, queue), "a job's agent")
    return agent_stamps(bench, queue)[job][1]


def single_jobs(bench: Bench) -> Iterator[Row]:
    """One job at a time, at any moment between two polls, to all pairs alike."""
    pairs: dict[str, Pair] = {"default poll": stack_of_ours, "with a webhook": stack_with_webhook, "": polling_pair}
    queues = {name: f"single-{number}" for number, name in enumerate(pairs)}
    waited: dict[str, list[float]] = {name: [] for name in pairs}
    with StampingFake() as fake, ExitStack() as stack:
        tell = {name: stack.enter_context(pair(bench, fake, queues[name], 1)) for name, pair in pairs.items()}
        time.sleep(2)
        for _ in range(bench.scale.single_jobs):
            time.sleep(random.random() * 2)
            added, jobs = {}, {}
            for name, queue in queues.items():
                added[name] = time.time()
                jobs[name] = fake.add_job(queue, command="true")
                tell[name]()
            for name, job in jobs.items():
                waited[name].append(agent_start(bench, queues[name], job) - added[name])
    polled = waited.pop("")
    for name, ours in waited.items():
        detail = {"ours_s": ours, "polled_s": polled, "runs": len(ours)}
        yield Row(f"scheduled → agent starts, {name}", median(ours), "s", "polling pair", median(polled), "", detail)


def run_backlog(bench: Bench, pair: Pair, queue: str, jobs: int) -> tuple[float, list[float]]:
    """Jobs per second, and how long workers stood idle between two jobs, in seconds."""
    with StampingFake() as fake, pair(bench, fake, queue, bench.scale.workers):
        added = time.time()
        for _ in range(jobs):
            fake.add_job(queue, command=f"sleep {JOB_SECONDS}")
        stamps = wait_until(
            lambda: len(found := agent_stamps(bench, queue)) == jobs and found, f"{jobs} jobs", 120, pause=0.1
        )
    assert stamps
    rate = jobs / (max(ended for _, _, ended in stamps.values()) - added)
    by_worker: dict[str, list[tuple[float, float]]] = {}
    for name, started, ended in stamps.values():
        by_worker.setdefault(name, []).append((started, ended))
    gaps = [later[0] - earlier[1] for each in by_worker.values() for earlier, later in itertools.pairwise(sorted(each))]
    return rate, sorted(gaps)


def backlog(bench: Bench) -> Iterator[Row]:
    scale = bench.scale
    rate, gaps = run_backlog(bench, stack_of_ours, "backlog", scale.backlog)
    polled_rate, polled_gaps = run_backlog(bench, polling_pair, "backlog-polled", scale.polled_backlog)
    what = f"{scale.backlog} jobs of {JOB_SECONDS} s on {scale.workers} workers"
    detail = {"most_possible": scale.workers / JOB_SECONDS, "polled_jobs": scale.polled_backlog}
    yield Row(what, rate, "jobs/s", "polling pair", polled_rate, "", detail)
    detail = {"p99_ms": share(gaps, 0.99) * 1000, "polled_p99_ms": share(polled_gaps, 0.99) * 1000, "gaps": len(gaps)}
    ours, polled = median(gaps) * 1000, median(polled_gaps) * 1000
    yield Row("a worker idle between two of them", ours, "ms", "polling pair", polled, "ratio <= 0.05", detail)


# --- Main ---

PARTS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    claims,
    idle_claims,
    parked_workers,
    several,
    starts,
    intake,
    growth,
    single_jobs,
    backlog,
)


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
        "beanstalkd": output_of("beanstalkd", "-v"),
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
        "beanstalkd": "beanstalkd: a yardstick",
        "redis-server": "redis-server: what several schedulers share",
    }
    if missing := [f"  {name}: apt install {package}" for name, package in needed.items() if not shutil.which(name)]:
        raise Missing("make bench needs what is not installed here:\n" + "\n".join(missing))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(bench: Bench, wanted: Sequence[str]) -> list[Row]:
    rows = []
    for part in PARTS:
        if wanted and part.__name__ not in wanted:
            continue
        started = time.monotonic()
        for row in part(bench):
            rows.append(row)
            print(f"{row.figure}: {text_of(row.value, row.unit)} ({row.ratio:.3g} of {row.yardstick})", file=sys.stderr)
        print(f"    {part.__name__}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def result(rows: Sequence[Row], seconds: float) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "revision": revision(),
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows],
    }


def main(wanted: Sequence[str]) -> int:
    """Measure the named parts, or all; only a whole run at full scale is kept."""
    scale = TINY if os.environ.get("BENCH_SCALE") == "tiny" else Scale()
    try:
        needs()
    except Missing as missing:
        sys.stderr.write(f"{missing}\n")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that every `with` ends what it started
    started = time.monotonic()
    # Not in /tmp, which may be memory: what is durable costs a disk's time.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT) as directory:
        rows = measure(Bench(Path(directory), scale), wanted)
    found = result(rows, time.monotonic() - started)
    results = Path(os.environ.get("BENCH_RESULTS") or BENCH / "results")
    print(table(rows))
    if not wanted:
        results.mkdir(exist_ok=True)
        path = results / f"{found['date'][:10]}-{found['machine']['kind']}.json"
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
