"""Faults that are known and not mended yet, each shown from outside: by processes, HTTP and the fake Buildkite.

A test here fails today, for the reason that its mark names. When the fault is mended the test passes, and the strict
mark turns that into a failure: then take the mark off, and move the test to where its neighbours are.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path
from scheduler import FROZEN_SECONDS, UPKEEP_SECONDS

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


def test_touch_sent_in_time_to_frozen_scheduler_keeps_the_lease(fake: FakeBuildkite, stack: StackProcesses) -> None:
    # Several jobs, so that some touch is read after the leases were looked at, whichever thread wakes first. A lease
    # of one second, the shortest, could end on a busy machine before all are claimed.
    jobs, lease_seconds = 5, 2
    for _ in range(jobs):
        fake.add_job()
    scheduler = stack.start_scheduler(LEASE_SECONDS=str(lease_seconds))
    wait_until_ready(stack, jobs)
    claims = [claim(stack).json() for _ in range(jobs)]
    with ExitStack() as cleanup:
        scheduler.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        touches = []
        for each in claims:
            connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=PATIENCE)
            cleanup.enter_context(closing(connection))
            body = json.dumps({"claim": each["claim"]})
            connection.request("POST", f"/jobs/{each['uuid']}/touch", body, {"Content-Type": "application/json"})
            touches.append(connection)
        # The freeze itself: it must outlast the leases, and be one that upkeep tells from a busy machine.
        time.sleep(max(0.0, frozen_at + lease_seconds + 2 * UPKEEP_SECONDS + FROZEN_SECONDS - time.monotonic()))
        scheduler.send_signal(signal.SIGCONT)
        assert [connection.getresponse().status for connection in touches] == [200] * jobs
    assert stack.stats()["states"]["leased"] == jobs


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


# --- Clients without bounds, and clients that are gone ---


def resident_bytes(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def claim_with_distinct_tags(stack: StackProcesses, numbers: range) -> None:
    """One claim for each number, by a worker with a tag of its own; on one connection, a hundred at a time."""
    with ExitStack() as cleanup:
        connection = cleanup.enter_context(socket.create_connection(("127.0.0.1", stack.port), PATIENCE))
        answers = cleanup.enter_context(connection.makefile("rb"))
        for start in numbers[::100]:
            queries = [f"GET /jobs?query=tag{number}=1" for number in range(start, start + 100)]
            connection.sendall("".join(f"{query} HTTP/1.1\r\nHost: localhost\r\n\r\n" for query in queries).encode())
            for query in queries:
                # An answer without a job has no body.
                if not (first := answers.readline()).startswith(b"HTTP/1.1 204 "):
                    raise ValueError(f"{query}: {first!r}")
                while answers.readline() != b"\r\n":
                    pass


@known_fault("every distinct query is remembered for an hour")
def test_claim_with_many_distinct_queries_leaves_the_size_bounded(stack: StackProcesses) -> None:
    scheduler = stack.start_scheduler()
    claim_with_distinct_tags(stack, range(1_000))
    before = resident_bytes(scheduler.pid)
    claim_with_distinct_tags(stack, range(1_000, 21_000))
    assert resident_bytes(scheduler.pid) - before < 15_000_000


@known_fault("a query may have any number of tags that fits into the request's head")
def test_claim_with_thousands_of_tags_is_refused_and_told_how_many_are_allowed(stack: StackProcesses) -> None:
    stack.start_scheduler()
    answer = get(stack, "/jobs?query=" + ",".join(f"t{number}" for number in range(2_000)))
    assert answer.status_code == 400
    assert any(0 < int(number) < 2_000 for number in re.findall(r"\d+", answer.json()["message"]))


@known_fault("a parked claim whose client is gone counts as an idle worker until its wait is over")
def test_claim_and_vanish_without_a_name_is_soon_no_idle_worker(stack: StackProcesses) -> None:
    stack.start_scheduler()
    with ExitStack() as cleanup:
        for _ in range(6):
            park_claim(stack, cleanup)
        wait_until(lambda: idle_workers(stack) == 6)
    assert becomes_true(lambda: idle_workers(stack) == 0, 4)


@known_fault("a named worker whose client is gone is shown as idle until its claim's wait is over")
def test_claim_and_vanish_with_a_name_is_soon_shown_as_away(stack: StackProcesses) -> None:
    stack.start_scheduler()

    def state() -> str:
        return "".join(each["state"] for each in stack.stats()["workers"])

    with ExitStack() as cleanup:
        park_claim(stack, cleanup, **{"X-Worker-ID": "w1", "X-Worker-Session": "s"})
        wait_until(lambda: state() == "idle")
    assert becomes_true(lambda: state() == "away", 4)
