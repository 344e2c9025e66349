"""Faults that are known and not mended yet, each shown from outside: by processes, HTTP and the fake Buildkite.

A test here fails today, for the reason that its mark names. When the fault is mended the test passes, and the strict
mark turns that into a failure: then take the mark off, and move the test to where its neighbours are.
"""

from __future__ import annotations

import http.client
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 20.0
#: In line order: the first is listed, reserved and offered before the others.
FIRST, SECOND, THIRD = (f"018f0000-0000-4000-8000-00000000000{number}" for number in (1, 2, 3))
#: Unix seconds, for `scheduled_at`.
LATER = 1_700_000_001.0


def known_fault(reason: str) -> pytest.MarkDecorator:
    """Expect the test to fail, by one of its own assertions: any other exception is a failure of the test."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite() as buildkite:
        yield buildkite


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as processes:
        yield processes


def becomes_true(true: Callable[[], object], seconds: float) -> bool:
    """Ask until it is so, for at most `seconds`; whether it became so."""
    ends_at = time.monotonic() + seconds
    while not true():
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.01)
    return True


def wait_until(true: Callable[[], object]) -> None:
    """Wait for what must be so before the test can begin. That it is not so is not the fault that is tested."""
    if not becomes_true(true, PATIENCE):
        raise TimeoutError("the test could not be prepared")


def add_jobs(fake: FakeBuildkite, *uuids: str) -> None:
    """Add jobs that are listed together; the first is the first in line."""
    with fake.changed:
        for uuid in uuids:
            fake.add_job(uuid=uuid, scheduled_at=LATER)


def wait_until_ready(stack: StackProcesses, jobs: int) -> None:
    wait_until(lambda: stack.stats()["states"].get("ready", 0) == jobs)


def get(stack: StackProcesses, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{stack.url}{path}", headers=headers, timeout=PATIENCE)


def claim(stack: StackProcesses, **headers: str) -> requests.Response:
    """A claim that does not wait, by a worker without a name."""
    return get(stack, "/jobs?query=queue=default", **headers)


def park_claim(stack: StackProcesses, cleanup: ExitStack, **headers: str) -> http.client.HTTPConnection:
    """Send a claim that waits, and read no answer yet."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=PATIENCE)
    cleanup.enter_context(closing(connection))
    connection.request("GET", "/jobs?query=queue=default&wait=60", headers=headers)
    return connection


def idle_workers(stack: StackProcesses) -> int:
    """How many workers /metrics says are idle: those without a name too, once their claims are parked."""
    counts = re.findall(r'^stack_workers\{.*state="idle".*\} (\d+)', get(stack, "/metrics").text, re.MULTILINE)
    return sum(map(int, counts))


# --- Time that was lost ---


# --- Who asks ---


@known_fault("a page of another site, in a browser on this machine, can claim a job")
def test_claim_by_a_page_of_another_site_is_refused_and_claims_nothing(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Host": "evil.example"}
    add_jobs(fake, FIRST, SECOND, THIRD)
    stack.start_scheduler()
    wait_until_ready(stack, 3)
    statuses = {name: claim(stack, **{name: value}).status_code for name, value in foreign.items()}
    assert statuses == dict.fromkeys(foreign, 403)
    assert stack.stats()["states"]["ready"] == 3


@known_fault("HEAD /health, which many load balancers ask for, is answered 405")
def test_head_health_answers_200_without_a_body(stack: StackProcesses) -> None:
    stack.start_scheduler()
    with socket.create_connection(("127.0.0.1", stack.port), PATIENCE) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b""


@known_fault("the word Bearer is taken only with a capital letter, although HTTP does not tell the two apart")
def test_present_token_with_bearer_in_lower_case_is_let_in(stack: StackProcesses) -> None:
    stack.start_scheduler(STACK_API_TOKEN="secret")
    assert get(stack, "/stats", Authorization="bearer secret").status_code == 200
