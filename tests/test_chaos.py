"""Nothing lost, nothing twice, whatever dies: kill -9 of everything and faults of Buildkite, seeded.

Once with one scheduler on SQLite, once with three on one Redis. CI runs 300 jobs with the one and 400 with the three,
`make test` 60 with the one or a few more, and `make chaos` CHAOS_JOBS with each. The same CHAOS_SEED kills the same
things in the same order.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import LONG_RUN
from fake_buildkite import FakeBuildkite, FakeJob
from processes import Process, RedisServer, StackProcesses, agent_path

SEED = int(os.environ.get("CHAOS_SEED", "1"))
JOBS = int(os.environ.get("CHAOS_JOBS", "300" if LONG_RUN else "60"))
FLEET_JOBS = int(os.environ.get("CHAOS_JOBS", "400"))
AGENT = os.environ.get("CHAOS_AGENT", "fake")
#: Jobs a second: under what the workers can run, so that a job that waits long was held up by something.
RATE = float(os.environ.get("CHAOS_RATE", "6"))
WORKERS = {f"w{n}": "queue=default,os=linux" if n % 2 else "queue=default,os=linux,big" for n in range(10)}

FAULTS: list[dict[str, Any]] = [
    {"status": 500, "times": 3},
    {"status": 503, "times": 2},
    {"status": 429, "times": 2, "headers": {"Retry-After": "0.5"}},
    {"hang": 3.0, "times": 1},
    {"garbage": True, "times": 2},
    {"reset": True, "times": 3},
    {"drop_after": True, "times": 2},
]
ENDPOINTS = ["list", "reserve", "get-states", "finish", "register", "acquire"]


class Chaos:
    """Keeps the stack running while it breaks it, and counts what it did."""

    #: What must have happened at least once before it is over.
    kinds = {"scheduler killed", "worker killed", "agent killed", "fault of Buildkite"}

    def __init__(self, stack: StackProcesses, fake: FakeBuildkite, seed: int):
        self.stack, self.fake = stack, fake
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.over = threading.Event()
        self.workers: dict[str, Process] = {}
        self.worker_settings: dict[str, str] = {}
        self.worker_count = 8
        #: What is done, and how often compared to the others.
        self.acts: list[tuple[Callable[[], None], int]] = [
            (self.kill_scheduler, 1),
            (self.kill_worker, 3),
            (self.kill_agent, 3),
            (self.break_buildkite, 4),
        ]

    def start(self) -> None:
        self.stack.start_scheduler()
        for name in list(WORKERS)[: self.worker_count]:
            self.start_worker(name)

    def start_worker(self, name: str) -> None:
        self.workers[name] = self.stack.start_worker(name, WORKERS[name], **self.worker_settings)

    def feed(self, jobs: int) -> list[str]:
        """Add jobs at a steady rate, from a random sequence of its own, so that the kills stay the same.

        There are more of them, if not all has been broken yet that is to be.
        """
        dice = random.Random(SEED)
        uuids: list[str] = []
        while len(uuids) < jobs or (not self.kinds <= set(self.done) and len(uuids) < jobs + 300):
            n = len(uuids)
            rules = dice.choice([["os=linux"], ["big"], []])
            seconds = dice.choice([0, 0, 0.2, 0.5, 1.5])
            uuids.append(
                self.fake.add_job(rules=rules, priority=dice.randrange(3), command=f"sleep {seconds}; echo {n}")
            )
            self.over.wait(1 / RATE)
        return uuids

    def breaking(self) -> None:
        """Break one thing after the other until it is over; the pauses are part of the sequence."""
        while not self.over.wait(self.random.uniform(0.1, 0.8)):
            acts, weights = zip(*self.acts, strict=True)
            self.random.choices(acts, weights)[0]()

    def kill_scheduler(self) -> None:
        down_for, number = self.random.uniform(0, 2), self.victim()
        self.stack.schedulers[number].kill()
        self.stack.schedulers[number].ended()
        self.done["scheduler killed"] += 1
        self.over.wait(down_for)
        self.stack.start_scheduler(number)

    def victim(self) -> int:
        return 0

    def kill_worker(self) -> None:
        name = self.random.choice(sorted(self.workers))
        self.workers[name].kill()
        self.workers[name].ended()
        self.done["worker killed"] += 1
        self.start_worker(name)  # as its supervisor would

    def kill_agent(self) -> None:
        name = self.random.choice(sorted(self.workers))
        with suppress(OSError, ValueError, ProcessLookupError):
            record = json.loads((self.stack.directory / "workers" / f"{name}.agent").read_text())
            os.kill(record["pid"], signal.SIGKILL)
            self.done["agent killed"] += 1

    def break_buildkite(self) -> None:
        endpoint, fault = self.random.choice(ENDPOINTS), self.random.choice(FAULTS)
        self.fake.set_fault(endpoint, **fault)
        self.done["fault of Buildkite"] += 1


class FleetChaos(Chaos):
    """The same with three schedulers on one Redis, which dies as well."""

    kinds = {"scheduler killed", "scheduler frozen", "Redis killed", "worker killed"}

    def __init__(self, stack: StackProcesses, fake: FakeBuildkite, seed: int, redis: RedisServer):
        super().__init__(stack, fake, seed)
        self.redis, self.worker_count = redis, 10
        self.worker_settings = {"WORKER_API_SERVER": ",".join(stack.urls)}
        self.acts += [(self.kill_scheduler, 1), (self.freeze_scheduler, 2), (self.kill_redis, 1)]

    def start(self) -> None:
        super().start()
        for number in (1, 2):
            self.stack.start_scheduler(number)

    def victim(self) -> int:
        """Which scheduler it meets: more often than not the leader, if Redis knows of one."""
        others, pid = self.random.randrange(3), self.redis.leader_pid()
        leader = [number for number, each in self.stack.schedulers.items() if each.pid == pid]
        return leader[0] if leader and self.random.random() < 0.7 else others

    def freeze_scheduler(self) -> None:
        frozen_for, scheduler = self.random.uniform(1, 6), self.stack.schedulers[self.victim()]
        scheduler.send_signal(signal.SIGSTOP)
        self.done["scheduler frozen"] += 1
        self.over.wait(frozen_for)
        scheduler.send_signal(signal.SIGCONT)

    def kill_redis(self) -> None:
        down_for = self.random.uniform(0, 2)
        self.redis.kill()
        self.done["Redis killed"] += 1
        self.over.wait(down_for)
        self.redis.start()


def longest_wait(jobs: list[FakeJob]) -> float:
    """Seconds that the unluckiest job stood still: from where it was added to where an agent acquired it."""
    times = [{what: at for at, what, _ in reversed(job.history)} for job in jobs]
    return max((at["acquired"] - at["added"] for at in times if "acquired" in at), default=math.nan)


def wait_until_finished(fake: FakeBuildkite, uuids: list[str]) -> None:
    """However long the line has grown, as long as it moves."""

    def finished() -> int:
        return sum(fake.jobs[uuid].state == "finished" for uuid in uuids)

    while (before := finished()) < len(uuids):
        fake.wait_for(lambda n=before: finished() > n, timeout=60)  # type: ignore[misc]


def wait_until_all_done(stack: StackProcesses, count: int, timeout: float = 60) -> None:
    """The scheduler comes to know of every end, and of nothing else."""
    deadline = time.monotonic() + timeout
    while (states := stack.stats()["states"])["done"] != count:
        assert time.monotonic() < deadline, states
        time.sleep(0.1)
    assert sum(states.values()) == count


#: Long enough that no reservation lapses, short enough that what a dead worker held comes back while the test runs.
SETTINGS = {"LEASE_SECONDS": "3", "RESERVATION_SECONDS": "60", "ACQUIRE_SECONDS": "20", "MAX_ATTEMPTS": "100"}


def run_chaos(chaos: Chaos, fake: FakeBuildkite, count: int) -> str:
    """Feed so many jobs while everything dies, and see that each ran once; what happened, in a line."""
    chaos.start()
    breaker = threading.Thread(target=chaos.breaking)
    breaker.start()
    try:
        started = time.monotonic()
        uuids = chaos.feed(count)
    finally:
        chaos.over.set()
        breaker.join(60)
    fake.clear_faults()
    wait_until_finished(fake, uuids)
    seconds = time.monotonic() - started
    jobs = [fake.jobs[uuid] for uuid in uuids]
    for job in jobs:
        assert job.happened("acquired") == 1, job
        assert job.happened("finish_by_stack") == 0, job
        assert job.happened("reservation_lapsed") == 0, job
    wait_until_all_done(chaos.stack, len(uuids))
    rejected = sum(job.happened("acquire_rejected") for job in jobs)
    lost = sum(job.happened("agent_lost") for job in jobs)
    kills = ", ".join(f"{times} × {what}" for what, times in sorted(chaos.done.items()))
    return (
        f"\nchaos: {len(jobs)} jobs in {seconds:.0f} s, seed {SEED}: {kills}; {rejected} rejected acquisitions, "
        f"{lost} jobs ended by a lost agent, longest wait {longest_wait(jobs):.1f} s"
    )


def test_run_jobs_while_everything_dies_finishes_each_exactly_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        FakeBuildkite(lost_after=6) as fake,
        StackProcesses(fake, tmp_path, agent_path(AGENT), **SETTINGS) as stack,
    ):
        chaos = Chaos(stack, fake, SEED)
        told = run_chaos(chaos, fake, JOBS)
        assert chaos.kinds <= set(chaos.done)
        with capsys.disabled():
            print(told)


@pytest.mark.long
def test_run_jobs_on_three_schedulers_while_everything_dies_finishes_each_exactly_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    redis = RedisServer(tmp_path, "--appendonly", "yes")
    settings = SETTINGS | {"REDIS_ADDR": redis.address}
    try:
        with (
            FakeBuildkite(lost_after=6) as fake,
            StackProcesses(fake, tmp_path, agent_path(AGENT), **settings) as stack,
        ):
            chaos = FleetChaos(stack, fake, SEED, redis)
            told = run_chaos(chaos, fake, FLEET_JOBS)
            assert chaos.kinds <= set(chaos.done)
            with capsys.disabled():
                print(told)
    finally:
        redis.stop()
