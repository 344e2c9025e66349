"""Several schedulers on one Redis: who talks to Buildkite, who is woken, and what is left when one of them fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import Process, RedisServer, StackProcesses, agent_path

QUICK = {"LEASE_SECONDS": "3", "ACQUIRE_SECONDS": "20"}
#: Within this time another scheduler leads when the leader has died.
TAKEOVER_SECONDS = 5.0


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite() as buildkite:
        yield buildkite


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--appendonly", "yes")
    yield server
    server.stop()


@pytest.fixture
def stack(fake: FakeBuildkite, redis: RedisServer, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake"), REDIS_ADDR=redis.address, **QUICK) as processes:
        yield processes


def start(stack: StackProcesses, count: int = 2) -> list[Process]:
    """So many schedulers, of which the first leads."""
    first = stack.start_scheduler(0)
    first.wait_for_line("leading")
    others = [stack.start_scheduler(number) for number in range(1, count)]
    for other in others:
        other.wait_for_line("following")
    return [first, *others]


def claim(stack: StackProcesses, number: int, wait: int = 10, slot: str = "", session: str = "") -> requests.Response:
    headers = {"X-Worker-ID": slot, "X-Worker-Session": session} if slot else {}
    query = {"query": "queue=default", "wait": str(wait)}
    return requests.get(f"{stack.urls[number]}/jobs", params=query, headers=headers, timeout=30)


def tell(stack: StackProcesses, number: int, job: dict[str, Any], verb: str, **fields: Any) -> requests.Response:
    url = f"{stack.urls[number]}/jobs/{job['uuid']}/{verb}"
    return requests.post(url, json={"claim": job["claim"]} | fields, timeout=10)


def wait_until(true: Callable[[], Any], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, true
        time.sleep(0.02)


# -- one talks to Buildkite


def test_start_of_second_scheduler_leaves_buildkite_to_the_first(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = start(stack)
    uuid = fake.add_job()
    job = claim(stack, 1).json()
    assert job["uuid"] == uuid
    assert not any("registered" in line for line in second.lines)
    assert tell(stack, 0, job, "touch").json()["state"] == "leased"
    assert tell(stack, 1, job, "touch").json()["state"] == "leased"
    assert tell(stack, 0, job, "release", reason="no room").status_code == 200
    first.wait_for_line("ready", uuid)
    assert claim(stack, 0).json()["uuid"] == uuid
