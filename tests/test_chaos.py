"""Nothing lost, nothing twice, whatever dies: kill -9 of everything and faults of Buildkite, seeded.

CI runs `CHAOS_JOBS` = 300; `make chaos` runs more. The same CHAOS_SEED kills the same things in the same order.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fake_buildkite import FakeBuildkite, FakeJob
from processes import Process, StackProcesses, agent_path

SEED = int(os.environ.get("CHAOS_SEED", "1"))
JOBS = int(os.environ.get("CHAOS_JOBS", "300"))
AGENT = os.environ.get("CHAOS_AGENT", "fake")
#: Jobs a second: under what the workers can run, so that a job that waits long was held up by something.
RATE = float(os.environ.get("CHAOS_RATE", "6"))
WORKERS = {f"w{n}": "queue=default,os=linux" if n % 2 else "queue=default,os=linux,big" for n in range(8)}

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

    def __init__(self, stack: StackProcesses, fake: FakeBuildkite, seed: int):
        self.stack, self.fake = stack, fake
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.over = threading.Event()
        self.workers: dict[str, Process] = {}
        self.scheduler: Process | None = None

    def start(self) -> None:
        self.scheduler = self.stack.start_scheduler()
        self.workers = {name: self.stack.start_worker(name, rules) for name, rules in WORKERS.items()}

    def feed(self, jobs: int) -> list[str]:
        """Add jobs at a steady rate, from a random sequence of its own, so that the kills stay the same."""
        dice = random.Random(SEED)
        uuids = []
        for n in range(jobs):
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
            act = self.random.choices(
                [self.kill_scheduler, self.kill_worker, self.kill_agent, self.break_buildkite], [1, 3, 3, 4]
            )[0]
            act()

    def kill_scheduler(self) -> None:
        down_for = self.random.uniform(0, 2)
        assert self.scheduler
        self.scheduler.kill()
        self.scheduler.ended()
        self.done["scheduler killed"] += 1
        self.over.wait(down_for)
        self.scheduler = self.stack.start_scheduler()

    def kill_worker(self) -> None:
        name = self.random.choice(sorted(WORKERS))
        self.workers[name].kill()
        self.workers[name].ended()
        self.done["worker killed"] += 1
        # As its supervisor would.
        self.workers[name] = self.stack.start_worker(name, WORKERS[name])

    def kill_agent(self) -> None:
        name = self.random.choice(sorted(WORKERS))
        with suppress(OSError, ValueError, ProcessLookupError):
            record = json.loads((self.stack.directory / "workers" / f"{name}.agent").read_text())
            os.kill(record["pid"], signal.SIGKILL)
            self.done["agent killed"] += 1

    def break_buildkite(self) -> None:
        endpoint, fault = self.random.choice(ENDPOINTS), self.random.choice(FAULTS)
        self.fake.set_fault(endpoint, **fault)
        self.done["fault of Buildkite"] += 1


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


def test_run_jobs_while_everything_dies_finishes_each_exactly_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"LEASE_SECONDS": "3", "RESERVATION_SECONDS": "60", "ACQUIRE_SECONDS": "20", "MAX_ATTEMPTS": "100"}
    with (
        FakeBuildkite(lost_after=6) as fake,
        StackProcesses(fake, tmp_path, agent_path(AGENT), **settings) as stack,
    ):
        chaos = Chaos(stack, fake, SEED)
        chaos.start()
        breaker = threading.Thread(target=chaos.breaking)
        breaker.start()
        try:
            started = time.monotonic()
            uuids = chaos.feed(JOBS)
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
        assert {"scheduler killed", "worker killed", "agent killed", "fault of Buildkite"} <= set(chaos.done)
        wait_until_all_done(stack, len(uuids))
        with capsys.disabled():
            rejected = sum(job.happened("acquire_rejected") for job in jobs)
            lost = sum(job.happened("agent_lost") for job in jobs)
            kills = ", ".join(f"{count} × {what}" for what, count in sorted(chaos.done.items()))
            print(
                f"\nchaos: {len(jobs)} jobs in {seconds:.0f} s, seed {SEED}: {kills}; "
                f"{rejected} rejected acquisitions, {lost} jobs ended by a lost agent, "
                f"longest wait {longest_wait(jobs):.1f} s"
            )
