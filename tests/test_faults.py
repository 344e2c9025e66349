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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import requests

import worker
from fake_buildkite import FakeBuildkite, Request
from processes import StackProcesses, agent_path
from scheduler import FROZEN_SECONDS, UPKEEP_SECONDS

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 20.0
#: In line order: the first is listed, reserved and offered before the others.
FIRST, SECOND, THIRD = (f"018f0000-0000-4000-8000-00000000000{number}" for number in (1, 2, 3))
#: Unix seconds, for `scheduled_at`.
EARLY, LATER = 1_700_000_000.0, 1_700_000_001.0
#: As RFC 3339 these are times; in UTC they are before the year 1 and after the year 9999.
BEYOND_CALENDAR = ["0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00"]


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


def list_with(fake: FakeBuildkite, fields: Mapping[str, Mapping[str, object]]) -> None:
    """Let Buildkite list jobs with these fields in place of their own, by uuid."""

    def answer(request: Request) -> Any:
        page = fake.answer(request).body
        for job in page.get("jobs", []):
            job.update(fields.get(job["id"], {}))
        return page

    fake.set_fault("list", body=answer)


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


# --- Jobs that cannot be told ---


@pytest.mark.parametrize("scheduled_at", BEYOND_CALENDAR)
@known_fault("a job whose time is beyond the calendar in UTC is taken in, but its claim is answered 500")
def test_claim_of_job_scheduled_beyond_the_calendar_is_answered_and_so_is_the_next(
    fake: FakeBuildkite, stack: StackProcesses, scheduled_at: str
) -> None:
    list_with(fake, {FIRST: {"scheduled_at": scheduled_at, "priority": 1}})
    add_jobs(fake, FIRST, SECOND)
    stack.start_scheduler()
    wait_until_ready(stack, 2)
    answers = [claim(stack) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.json()["uuid"] for answer in answers] == [FIRST, SECOND]


@pytest.mark.parametrize("scheduled_at", BEYOND_CALENDAR)
@known_fault("a job whose time is beyond the calendar in UTC makes each route that shows it answer 500")
def test_show_job_scheduled_beyond_the_calendar_answers_200(
    fake: FakeBuildkite, stack: StackProcesses, scheduled_at: str
) -> None:
    list_with(fake, {FIRST: {"scheduled_at": scheduled_at}})
    add_jobs(fake, FIRST)
    stack.start_scheduler()
    wait_until_ready(stack, 1)
    statuses = {path: get(stack, path).status_code for path in ("/queue", f"/jobs/{FIRST}")}
    assert statuses == dict.fromkeys(statuses, 200)


@pytest.mark.parametrize("scheduled_at", BEYOND_CALENDAR)
@known_fault("a parked claim gets no job when its answer cannot be written, and the job stays leased to nobody")
def test_offer_job_scheduled_beyond_the_calendar_to_parked_claims_gives_each_a_job(
    fake: FakeBuildkite, stack: StackProcesses, scheduled_at: str
) -> None:
    list_with(fake, {FIRST: {"scheduled_at": scheduled_at, "priority": 1}})
    stack.start_scheduler()
    with ExitStack() as cleanup:
        parked = [park_claim(stack, cleanup) for _ in range(3)]
        wait_until(lambda: idle_workers(stack) == 3)
        add_jobs(fake, FIRST, SECOND, THIRD)
        answers = [connection.getresponse() for connection in parked]
        given = {json.loads(answer.read())["uuid"] for answer in answers if answer.status == 200}
    assert given == {FIRST, SECOND, THIRD}
    assert stack.stats()["states"]["leased"] == 3


@known_fault("when the answer to one parked claim cannot be written, the rest of its batch waits for a back-off")
def test_offer_batch_with_job_scheduled_beyond_the_calendar_fails_no_duty(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    list_with(fake, {FIRST: {"scheduled_at": BEYOND_CALENDAR[0]}})
    scheduler = stack.start_scheduler()
    with ExitStack() as cleanup:
        parked = [park_claim(stack, cleanup) for _ in range(3)]
        wait_until(lambda: idle_workers(stack) == 3)
        add_jobs(fake, FIRST, SECOND, THIRD)
        for connection in parked:
            connection.getresponse().read()
    assert not [line for line in scheduler.lines if "a fault of ours" in line]


BIG_STEP = {"step": {"key": "build", "label": "x" * 1_500_000}}


@known_fault("the answer to a claim repeats the job's step whole, however large: a worker reads no more than a part")
def test_claim_of_job_with_big_step_is_answered_within_what_a_worker_reads(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    list_with(fake, {FIRST: BIG_STEP})
    add_jobs(fake, FIRST)
    stack.start_scheduler()
    wait_until_ready(stack, 1)
    answer = claim(stack)
    assert answer.json()["uuid"] == FIRST
    assert len(answer.content) <= worker.ANSWER_BYTES


@known_fault("a worker cannot read the answer to its claim of a job with a large step, so that job never runs")
def test_run_job_with_big_step_finishes(fake: FakeBuildkite, stack: StackProcesses) -> None:
    list_with(fake, {FIRST: BIG_STEP})
    add_jobs(fake, FIRST)
    stack.start_scheduler()
    wait_until_ready(stack, 1)
    process = stack.start_worker("w1")

    def has_failed() -> bool:
        return any("retrying what=claim" in line for line in process.lines)

    wait_until(lambda: fake.jobs[FIRST].state == "finished" or has_failed())
    assert fake.jobs[FIRST].state == "finished"


# --- Jobs that are listed in an odd form ---


@known_fault("a job whose priority is a text or no whole number is skipped for ever")
def test_list_jobs_with_odd_priorities_hands_them_out(fake: FakeBuildkite, stack: StackProcesses) -> None:
    list_with(fake, {FIRST: {"priority": "5"}, SECOND: {"priority": 2.5}})
    add_jobs(fake, FIRST, SECOND, THIRD)
    stack.start_scheduler()
    wait_until(lambda: stack.job(THIRD).get("state") == "ready")
    answers = [claim(stack) for _ in range(3)]
    assert {answer.json()["uuid"] for answer in answers if answer.status_code == 200} == {FIRST, SECOND, THIRD}


def add_jobs_with_odd_rules(fake: FakeBuildkite) -> list[str]:
    """A job for each rule that no worker can be said to match."""
    return [fake.add_job(rules=["queue=default", rule], scheduled_at=EARLY) for rule in ("*=gpu", "=foo", " ")]


@known_fault("a rule that is not understood is passed over, so the job goes to any worker of its queue")
def test_claim_with_jobs_whose_rules_are_not_understood_gets_the_job_behind_them(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    add_jobs_with_odd_rules(fake)
    add_jobs(fake, FIRST)
    stack.start_scheduler()
    wait_until(lambda: stack.job(FIRST).get("state") == "ready")
    assert claim(stack).json()["uuid"] == FIRST
    assert claim(stack).status_code == 204


@known_fault("nothing says of a job that one of its rules is not understood")
def test_show_job_whose_rule_is_not_understood_says_so(fake: FakeBuildkite, stack: StackProcesses) -> None:
    uuids = add_jobs_with_odd_rules(fake)
    add_jobs(fake, FIRST)
    stack.start_scheduler()
    wait_until(lambda: stack.job(FIRST).get("state") == "ready")
    answers = [get(stack, f"/jobs/{uuid}").text for uuid in uuids]
    assert ["rules_not_understood" in answer for answer in answers] == [True] * 3


# --- The list, and time that was lost ---


@known_fault("while each page of the list names another one, the first page is never listed again")
def test_list_pages_without_end_lists_the_first_again(fake: FakeBuildkite, stack: StackProcesses) -> None:
    cursors: list[str | None] = []

    def page(request: Request) -> Any:
        cursors.append(request.query.get("after"))
        info = {"has_next_page": True, "end_cursor": f"page {len(cursors)}"}
        return {"jobs": [], "cluster_queue": {"dispatch_paused": False}, "page_info": info}

    fake.set_fault("list", body=page)
    stack.start_scheduler()
    wait_until(lambda: len(cursors) > 1)
    is_listed_again = becomes_true(lambda: cursors.count(None) > 1, 4)
    fake.clear_faults()  # so that the scheduler can stop
    assert is_listed_again, f"{len(cursors)} pages in a row"


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
