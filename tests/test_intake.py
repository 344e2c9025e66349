"""`Intake`: what is asked of Buildkite and when, and what its answers do to the jobs in the store.

Everything is real but the time: the tests call the duties themselves and move the clock between.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import scheduler
from conftest import Clock
from fake_buildkite import FakeBuildkite, Request, listed
from scheduler import (
    AgentEnd,
    BuildkiteError,
    Dispatcher,
    Finding,
    Holder,
    Intake,
    Job,
    JobFinding,
    Leadership,
    PeriodicTask,
    Profile,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
    Worker,
)

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
UNKNOWN = "018f0000-0000-4000-8000-0000000000ff"


class Bench:
    """One queue's intake and what it works with."""

    def __init__(self, fake: FakeBuildkite, clock: Clock, store: Store, settings: Settings):
        self.fake, self.clock, self.store = fake, clock, store
        self.token = fake.token
        self.given_up: list[str] = []
        stack = Stack(fake.url, lambda: self.token, "test-default", "default")
        self.dispatcher = Dispatcher(store, clock.now)
        self.lead = Leadership(store)
        self.intake = Intake(stack, self.lead, self.dispatcher, settings, clock.now, self.given_up.append)

    def begin_another_term(self) -> None:
        answered_at = self.intake.answered_at
        self.lead.end()
        self.lead.begin(self.store.with_rows(self.store.rows), answered_at)

    # The four duties, as their threads call them

    def list_jobs(self) -> float:
        return self.intake.list_jobs(self.clock.now())

    def reserve(self) -> float | None:
        return self.intake.reserve_jobs(self.clock.now())

    def check_states(self) -> float | None:
        """Ask about every job: its last look is long enough ago."""
        self.clock.advance(5)
        return self.intake.check_states(self.clock.now())

    def finish(self) -> float:
        return self.intake.finish_jobs(self.clock.now())

    def take_in(self) -> None:
        """List, and reserve all that waits for it."""
        self.list_jobs()
        while self.reserve() == 0:
            pass

    # What a test does and sees

    def add_ready(self, **about: Any) -> str:
        uuid = self.fake.add_job(**about)
        self.take_in()
        assert self.state(uuid) == "ready"
        return uuid

    def add_running(self) -> str:
        uuid = self.add_ready()
        assert self.claim()
        self.fake.set_state(uuid, "running")
        self.check_states()
        assert self.state(uuid) == "running"
        return uuid

    def job(self, uuid: str) -> Job:
        job = self.store.get(uuid)
        assert job, f"job {uuid} is not in the store"
        return job

    def state(self, uuid: str) -> str:
        """The job's state, or its outcome when it is done; "" where it is not known."""
        job = self.store.get(uuid)
        return str(job.outcome or job.state) if job else ""

    def claim(self, name: str = "w1", query: str = "queue=default") -> Job | None:
        return self.dispatcher.claim(Worker(name, f"session of {name}", Profile.of(query)), 0)

    def fail(self, name: str) -> Job:
        """The worker claims a job, and its agent ends without acquiring it."""
        job = self.claim(name)
        assert job
        self.check_states()
        end = AgentEnd(1, f"cannot run it on {name}")
        self.store.answered("default", self.clock.now())
        return self.store.complete(Holder(job.uuid, job.claim), end, self.clock.now())

    def calls(self, endpoint: str) -> int:
        return len(self.fake.calls_to(endpoint))

    def batches(self, endpoint: str) -> list[list[str]]:
        return [call.json["job_uuids"] for call in self.fake.calls_to(endpoint)]


@pytest.fixture(autouse=True)
def no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls come as fast as the test makes them."""
    monkeypatch.setattr(scheduler, "CALLS_PER_SECOND", dict.fromkeys(scheduler.CALLS_PER_SECOND, 10_000))


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeBuildkite]:
    with FakeBuildkite(clock=clock.now, rate_limits=False) as server:
        yield server


@pytest.fixture
def bench(fake: FakeBuildkite, clock: Clock, store: Store, settings: Callable[..., Settings]) -> Bench:
    return Bench(fake, clock, store, settings())


# --- List and reserve ---


def test_list_new_job_puts_it_and_reserve_makes_it_ready(bench: Bench) -> None:
    uuid = bench.fake.add_job(priority=2)
    bench.list_jobs()
    assert bench.state(uuid) == "reserving"
    assert bench.fake.jobs[uuid].state == "scheduled"
    assert bench.claim() is None
    bench.reserve()
    assert bench.state(uuid) == "ready"
    assert (bench.fake.jobs[uuid].state, bench.fake.jobs[uuid].reserved_by) == ("reserved", "test-default")
    job = bench.job(uuid)
    assert (job.reserved_at, job.reservation_expires_at) == (bench.clock.now(), bench.clock.now() + 900)
    given = bench.claim()
    assert given and given.uuid == uuid


def test_list_first_of_all_registers_the_stack(bench: Bench) -> None:
    assert (bench.reserve(), bench.check_states()) == (None, None)
    assert bench.fake.calls == []
    bench.list_jobs()
    assert [call.endpoint for call in bench.fake.calls] == ["register", "list"]
    assert bench.intake.registered


def test_list_reserved_page_brings_nothing_twice(bench: Bench) -> None:
    uuid = bench.add_ready()
    job = bench.job(uuid)
    for _ in range(3):
        bench.take_in()
    assert bench.calls("reserve") == 1
    assert bench.job(uuid) == job


def test_list_full_page_stays_on_it_while_it_brings_anything_new(bench: Bench) -> None:
    for n in range(1500):
        bench.fake.add_job(scheduled_at=bench.clock.now() - 5000 + n)
    bench.list_jobs()
    assert (bench.calls("list"), len(bench.store.unfinished("default"))) == (1, 1000)
    bench.reserve()
    bench.list_jobs()
    assert (bench.calls("list"), len(bench.store.unfinished("default"))) == (2, 1500)


def test_list_full_page_that_brought_nothing_goes_on_to_the_next(bench: Bench) -> None:
    for n in range(1500):
        bench.fake.add_job(scheduled_at=bench.clock.now() - 5000 + n)
    bench.list_jobs()
    bench.fake.set_fault("reserve", status=503)
    with pytest.raises(BuildkiteError):
        bench.reserve()
    bench.list_jobs()
    assert (bench.calls("list"), len(bench.store.unfinished("default"))) == (3, 1500)


def test_list_partial_page_that_brought_nothing_ends_there(bench: Bench) -> None:
    bench.fake.add_job()
    bench.list_jobs()
    bench.list_jobs()
    assert bench.calls("list") == 2


@pytest.mark.large
def test_reserve_many_jobs_asks_in_batches_of_1000_first_in_line_first(bench: Bench) -> None:
    uuids = [bench.fake.add_job(scheduled_at=bench.clock.now() - 5000 + n) for n in range(2500)]
    urgent = bench.fake.add_job(priority=1)
    bench.list_jobs()
    bench.list_jobs()
    bench.list_jobs()
    bench.list_jobs()
    while bench.reserve() == 0:
        pass
    line = [urgent, *uuids]
    assert bench.batches("reserve") == [line[:1000], line[1000:2000], line[2000:]]
    assert {bench.state(uuid) for uuid in line} == {"ready"}


def test_list_with_jobs_that_cannot_be_run_puts_the_others_and_is_a_problem_until_they_are_gone(bench: Bench) -> None:
    good, odd = bench.fake.add_job(), bench.fake.add_job()
    fields = {"priority": "high", "agent_query_rules": "queue=default", "scheduled_at": "soon"}
    page = [None, {"id": "x"}, listed(bench.fake.jobs[odd]) | fields, listed(bench.fake.jobs[good]), 7]
    bench.fake.set_fault("list", body={"jobs": page}, times=1)
    bench.take_in()
    assert (bench.state(good), bench.state(odd)) == ("ready", "ready")
    assert bench.store.unfinished("default") == sorted([good, odd])
    told = "queue default: listed jobs that are skipped: 3; the first: it is a NoneType, not an object"
    assert bench.intake.problems == [told]
    bench.list_jobs()
    assert bench.intake.problems == []


def test_list_pages_without_end_lists_the_first_in_every_look_and_the_others_in_turn(bench: Bench) -> None:
    cursors: list[str | None] = []

    def page(request: Request) -> Any:
        cursors.append(request.query.get("after"))
        return {"jobs": [], "page_info": {"has_next_page": True, "end_cursor": f"page {len(cursors)}"}}

    bench.fake.set_fault("list", body=page)
    for _ in range(3):
        bench.list_jobs()
    looks = [cursors[start : start + scheduler.LOOK_PAGES] for start in range(0, len(cursors), scheduler.LOOK_PAGES)]
    assert [look[0] for look in looks] == [None, None, None]
    # Each goes on where the one before has ended.
    assert looks[1][1] == f"page {scheduler.LOOK_PAGES}"
    assert looks[2][1] == f"page {2 * scheduler.LOOK_PAGES}"
    assert None not in {cursor for look in looks for cursor in look[1:]}
    # And from the second page again once it has come to the last.
    bench.fake.clear_faults()
    bench.list_jobs()
    bench.fake.set_fault("list", body=page)
    del cursors[:]
    bench.list_jobs()
    assert cursors[:2] == [None, "page 1"]


def test_list_of_many_pages_comes_to_the_last_though_the_first_keeps_bringing_jobs(bench: Bench) -> None:
    last, seen, looks = 3 * scheduler.LOOK_PAGES, set[int](), 0

    def page(request: Request) -> Any:
        nonlocal looks
        number = int(request.query.get("after", 1))
        seen.add(number)
        looks += number == 1
        # Jobs that may not run yet stay listed; in every second look there is a new one on the first page.
        jobs = [listed(bench.fake.jobs[bench.fake.add_job()])] if number == 1 and looks % 2 else []
        return {"jobs": jobs, "page_info": {"has_next_page": number < last, "end_cursor": str(number + 1)}}

    bench.fake.set_fault("list", body=page)
    for _ in range(10):
        bench.list_jobs()
    assert seen == set(range(1, last + 1))


def test_list_further_page_that_buildkite_refuses_begins_anew(bench: Bench) -> None:
    def page(request: Request) -> Any:
        return {"jobs": [], "page_info": {"has_next_page": True, "end_cursor": str(bench.calls("list"))}}

    bench.fake.set_fault("list", body=page)
    bench.list_jobs()
    bench.fake.clear_faults()
    bench.fake.set_fault("list", status=400, match=lambda _, request: "after" in request.query)
    bench.fake.set_fault("list", body=page)
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    bench.fake.clear_faults()
    uuid = bench.add_ready()
    assert bench.state(uuid) == "ready"


# --- Jobs that may not run yet ---


def listed_with(bench: Bench, uuid: str, **fields: object) -> None:
    """From now on Buildkite lists the job with these fields; "": as it is."""

    def answer(request: Request) -> Any:
        page = bench.fake.answer(request).body
        for job in page["jobs"]:
            job.update(fields if job["id"] == uuid else {})
        return page

    bench.fake.clear_faults()
    bench.fake.set_fault("list", body=answer)


def in_seconds(bench: Bench, seconds: float) -> str | None:
    return scheduler.rfc3339(bench.clock.now() + seconds)


def why_of(bench: Bench, uuid: str) -> tuple[str, str]:
    return scheduler.Fleet(bench.store, bench.dispatcher, bench.clock.now()).why_of(bench.job(uuid))[:2]


def test_list_job_that_may_run_later_reserves_it_then_and_not_before(bench: Bench) -> None:
    early, late = bench.fake.add_job(), bench.fake.add_job()
    at = in_seconds(bench, 100)
    listed_with(bench, late, runnable_at=at)
    bench.take_in()
    assert (bench.state(early), bench.state(late)) == ("ready", "reserving")
    held = bench.job(late)
    assert (held.held_by, held.held_reason, held.held_until) == ("buildkite", "runnable_at", bench.clock.now() + 100)
    assert why_of(bench, late) == ("runnable_at", f"Buildkite says that it may not run before {at}")
    bench.clock.advance(99)
    bench.take_in()
    assert bench.fake.jobs[late].state == "scheduled"
    bench.clock.advance(1)
    bench.take_in()
    assert (bench.state(late), bench.job(late).held_by, bench.job(late).held_until) == ("ready", None, None)
    assert {job.uuid for job in [bench.claim("w1"), bench.claim("w2")] if job} == {early, late}


def test_list_job_whose_time_to_run_has_come_is_not_held(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    listed_with(bench, uuid, runnable_at=in_seconds(bench, 0))
    bench.take_in()
    assert bench.state(uuid) == "ready"


@pytest.mark.parametrize("seconds", [10.0, None], ids=["sooner", "now"])
def test_list_job_again_with_another_time_to_run_follows_it(bench: Bench, seconds: float | None) -> None:
    uuid = bench.fake.add_job()
    listed_with(bench, uuid, runnable_at=in_seconds(bench, 100))
    bench.take_in()
    listed_with(bench, uuid, runnable_at=in_seconds(bench, seconds) if seconds else None)
    bench.list_jobs()
    bench.clock.advance(seconds or 0)
    bench.take_in()
    assert bench.state(uuid) == "ready"


def test_reserve_on_paused_queue_leaves_a_job_alone_whose_time_to_run_has_come(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    listed_with(bench, uuid, runnable_at=in_seconds(bench, 100))
    bench.take_in()
    bench.fake.clear_faults()
    bench.fake.pause_queue("default")
    bench.clock.advance(100)
    bench.take_in()
    assert bench.fake.jobs[uuid].state == "scheduled"
    bench.fake.resume_queue("default")
    bench.take_in()
    assert bench.state(uuid) == "ready"


def test_look_at_job_that_may_run_later_and_was_cancelled_drops_it(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    listed_with(bench, uuid, runnable_at=in_seconds(bench, 100))
    bench.take_in()
    bench.fake.cancel_job(uuid)
    bench.check_states()
    assert (bench.state(uuid), bench.job(uuid).held_by) == ("dropped", None)


def test_list_job_again_with_another_priority_takes_it_over_unless_it_is_reserved(bench: Bench) -> None:
    first, second = bench.fake.add_job(priority=1), bench.fake.add_job(priority=1)
    for uuid in (first, second):
        listed_with(bench, uuid, runnable_at=in_seconds(bench, 10))
        bench.list_jobs()
    listed_with(bench, second, priority=5)
    bench.list_jobs()
    bench.clock.advance(10)
    bench.take_in()
    assert [bench.job(uuid).priority for uuid in (first, second)] == [1, 5]
    claimed = bench.claim("w1")
    assert claimed and claimed.uuid == second
    # Its reservation has lapsed: it is listed once more. The other's holder keeps it as it is.
    bench.fake.lapse(first)
    listed_with(bench, first, priority=7)
    bench.take_in()
    assert (bench.state(first), bench.job(first).priority) == ("ready", 7)


def test_list_with_half_a_letter_in_a_rule_keeps_the_other_jobs(bench: Bench) -> None:
    good = bench.fake.add_job()
    odd = listed(bench.fake.jobs[good]) | {"id": UNKNOWN, "agent_query_rules": ["os=\ud83d"]}
    bench.fake.set_fault("list", body={"jobs": [odd, listed(bench.fake.jobs[good])]})
    bench.list_jobs()
    bench.reserve()
    assert bench.state(good) == "ready"


def test_list_done_job_that_is_scheduled_again_puts_it_again(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.fake.set_state(uuid, "waiting")
    bench.check_states()
    assert bench.state(uuid) == "dropped"
    bench.fake.set_state(uuid, "scheduled")
    bench.take_in()
    assert bench.state(uuid) == "ready"


def test_list_running_job_that_is_scheduled_again_confirms_it(bench: Bench) -> None:
    uuid = bench.add_running()
    bench.fake.set_state(uuid, "scheduled")
    bench.list_jobs()
    assert bench.state(uuid) == "reserving"
    bench.reserve()
    assert bench.state(uuid) == "ready"


def test_list_leased_job_that_is_scheduled_again_renews_it_and_keeps_its_holder(bench: Bench) -> None:
    uuid = bench.add_ready()
    held = bench.claim()
    assert held
    bench.fake.lapse(uuid)
    bench.take_in()
    job = bench.job(uuid)
    assert (job.state, job.claim, job.reservation_expires_at) == ("leased", held.claim, bench.clock.now() + 900)
    assert bench.fake.jobs[uuid].state == "reserved"


# --- A paused queue ---


def test_list_paused_queue_puts_nothing_and_hands_out_nothing_until_resumed(bench: Bench) -> None:
    before = bench.add_ready()
    bench.fake.pause_queue("default")
    during = bench.fake.add_job()
    bench.take_in()
    assert bench.calls("list") == 2
    assert (bench.state(before), bench.state(during)) == ("ready", "")
    assert bench.fake.jobs[during].state == "scheduled"
    assert bench.claim() is None
    bench.fake.resume_queue("default")
    bench.take_in()
    assert (bench.state(before), bench.state(during)) == ("ready", "ready")
    assert bench.claim()


def test_reserve_on_paused_queue_renews_what_was_reserved_and_takes_nothing_new(bench: Bench) -> None:
    before, late = bench.add_ready(), bench.fake.add_job()
    bench.list_jobs()
    bench.fake.pause_queue("default")
    bench.list_jobs()
    bench.clock.advance(500)
    bench.reserve()
    assert bench.fake.jobs[before].reservation_expires_at == bench.clock.now() + 900
    assert bench.fake.jobs[late].state == "scheduled"
    bench.fake.lapse(before)
    bench.check_states()
    assert bench.state(before) == "reserving"
    bench.reserve()
    assert (bench.state(before), bench.state(late)) == ("ready", "reserving")


def test_list_paused_queue_leaves_what_was_claimed_alone(bench: Bench) -> None:
    uuid = bench.add_ready()
    held = bench.claim()
    assert held
    bench.fake.pause_queue("default")
    bench.take_in()
    bench.check_states()
    assert bench.store.touch(Holder(uuid, held.claim), bench.clock.now()).state == "leased"
    again = bench.claim()
    assert again and again.claim == held.claim


@pytest.mark.parametrize("queue", [{}, None, {"dispatch_paused": None}], ids=str)
def test_list_that_does_not_say_whether_it_is_paused_keeps_what_was_last_said(bench: Bench, queue: object) -> None:
    before = bench.add_ready()
    bench.fake.pause_queue("default")
    bench.list_jobs()
    during = bench.fake.add_job()
    answer = {"jobs": [listed(bench.fake.jobs[during])], "cluster_queue": queue}
    bench.fake.set_fault("list", body=answer)
    bench.take_in()
    assert bench.fake.jobs[during].state == "scheduled"
    assert bench.claim() is None
    bench.fake.clear_faults()
    bench.fake.resume_queue("default")
    bench.take_in()
    assert (bench.state(before), bench.state(during)) == ("ready", "ready")


def test_list_resumed_queue_wakes_a_claim_that_waits(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.fake.pause_queue("default")
    bench.list_jobs()
    answers: list[Job | None] = []
    worker = Worker("w1", "s1", Profile.of("queue=default"))
    thread = threading.Thread(target=lambda: answers.append(bench.dispatcher.claim(worker, PATIENCE)))
    thread.start()
    bench.fake.resume_queue("default")
    bench.list_jobs()
    bench.reserve()  # woken by that; it offers
    thread.join(PATIENCE / 2)  # before the claim would look once more by itself
    assert [job.uuid for job in answers if job] == [uuid]


# --- Renewal ---


def test_reserve_renews_each_reservation_before_half_its_time_is_gone(bench: Bench) -> None:
    ready, leased = bench.add_ready(priority=1), bench.add_ready()
    held = bench.claim()
    assert held and held.uuid == ready
    for _ in range(450):
        bench.clock.advance(1)
        bench.reserve()
    for uuid in (ready, leased):
        assert bench.fake.jobs[uuid].happened("reservation_extended") == 1
        assert bench.job(uuid).reservation_expires_at == bench.fake.jobs[uuid].reservation_expires_at


def test_reserve_leaves_fresh_reservations_alone(bench: Bench) -> None:
    bench.add_ready()
    bench.clock.advance(300)
    bench.reserve()
    assert bench.calls("reserve") == 1


def test_reserve_leaves_running_and_done_jobs_alone(bench: Bench) -> None:
    bench.add_running()
    bench.fake.cancel_job(bench.add_ready())
    bench.check_states()
    before = bench.calls("reserve")
    bench.clock.advance(880)
    bench.reserve()
    assert bench.calls("reserve") == before


@pytest.mark.large
def test_reserve_renews_thousands_in_batches_of_1000(bench: Bench) -> None:
    uuids = {bench.fake.add_job() for _ in range(2500)}
    while len(bench.store.unfinished("default")) < 2500:
        bench.take_in()
    before = bench.calls("reserve")
    bench.clock.advance(460)
    while bench.reserve() == 0:
        pass
    batches = bench.batches("reserve")[before:]
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert set(itertools.chain(*batches)) == uuids
    assert {bench.fake.jobs[uuid].reservation_expires_at for uuid in uuids} == {bench.clock.now() + 900}


def test_reserve_counts_the_reservation_from_when_it_was_asked_for(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()
    asked_at = bench.clock.now()

    def slowly(_: Request) -> Any:
        bench.clock.advance(7)
        return {"reserved": [uuid], "not_reserved": []}

    bench.fake.set_fault("reserve", body=slowly)
    bench.reserve()
    assert bench.job(uuid).reservation_expires_at == asked_at + 900


# --- Batches that Buildkite refuses ---


@pytest.mark.parametrize("status", [400, 422])
def test_reserve_refused_batch_is_halved_until_the_bad_job_stands_alone(bench: Bench, status: int) -> None:
    uuids = [bench.fake.add_job() for _ in range(16)]
    bad = uuids[5]
    bench.fake.set_fault("reserve", status=status, match=lambda _, request: bad.encode() in request.body)
    bench.list_jobs()
    bench.reserve()
    assert {bench.state(uuid) for uuid in uuids if uuid != bad} == {"ready"}
    assert bench.state(bad) == "dropped"
    assert str(status) in bench.job(bad).reason
    assert [len(batch) for batch in bench.batches("reserve") if bad in batch] == [16, 8, 4, 2, 1]
    assert sum(len(batch) for batch in bench.batches("reserve") if bad not in batch) == 15


@pytest.mark.parametrize("status", [400, 422])
def test_reserve_refused_whatever_it_names_gives_up_soon_and_drops_nothing(bench: Bench, status: int) -> None:
    uuids = [bench.fake.add_job() for _ in range(500)]
    bench.list_jobs()
    bench.fake.set_fault("reserve", status=status)
    with pytest.raises(BuildkiteError, match=str(status)):
        bench.reserve()
    assert bench.calls("reserve") <= 3 * scheduler.MAX_REFUSED
    bench.fake.clear_faults()
    bench.reserve()
    assert {bench.state(uuid) for uuid in uuids} == {"ready"}


@pytest.mark.large
def test_reserve_refused_many_of_a_batch_takes_the_others(bench: Bench) -> None:
    uuids = [bench.fake.add_job() for _ in range(500)]
    bad = set(uuids[:200])
    bench.fake.set_fault(
        "reserve", status=422, match=lambda _, request: any(uuid.encode() in request.body for uuid in bad)
    )
    bench.list_jobs()
    bench.reserve()
    assert {uuid: bench.state(uuid) for uuid in uuids} == {
        uuid: "dropped" if uuid in bad else "ready" for uuid in uuids
    }


def test_reserve_of_forgotten_stack_offers_what_became_ready_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fake.add_job()
    bench.list_jobs()
    offered: list[int] = []

    def fail_once(jobs: Iterable[Job]) -> None:
        offered.append(len(list(jobs)))
        if len(offered) == 1:
            raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(bench.intake._dispatcher, "offer", fail_once)
    with pytest.raises(StoreUnavailable):
        bench.reserve()
    bench.fake.set_fault("list", status=404, times=1)
    bench.clock.advance(scheduler.REGISTER_SECONDS)
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    assert not bench.intake.registered
    assert bench.reserve() is None
    assert offered == [1, 1]


def test_reserve_refused_job_does_not_come_back_with_every_list(bench: Bench) -> None:
    bad = bench.fake.add_job()
    bench.fake.set_fault("reserve", status=422)
    bench.take_in()
    asked = bench.calls("reserve")
    for _ in range(20):
        bench.clock.advance(1)
        bench.take_in()
    assert bench.calls("reserve") == asked
    assert bench.state(bad) == "dropped"
    bench.fake.clear_faults()
    bench.clock.advance(60)
    bench.take_in()
    assert bench.state(bad) == "ready"


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_reserve_failed_batch_is_not_halved_and_loses_nothing(bench: Bench, status: int) -> None:
    uuids = [bench.fake.add_job() for _ in range(4)]
    bench.list_jobs()
    bench.fake.set_fault("reserve", status=status, times=1)
    with pytest.raises(BuildkiteError):
        bench.reserve()
    assert bench.calls("reserve") == 1
    assert {bench.state(uuid) for uuid in uuids} == {"reserving"}
    bench.reserve()
    assert {bench.state(uuid) for uuid in uuids} == {"ready"}


def test_reserve_whose_answer_was_lost_is_repeated(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()
    bench.fake.set_fault("reserve", drop_after=True, times=1)
    with pytest.raises(BuildkiteError):
        bench.reserve()
    assert (bench.state(uuid), bench.fake.jobs[uuid].state) == ("reserving", "reserved")
    bench.reserve()
    assert bench.state(uuid) == "ready"


# --- Jobs that Buildkite did not reserve ---


@pytest.mark.parametrize(
    ("happen", "state"),
    [
        (lambda fake, uuid: fake.reserve_for(uuid, "another-stack"), "dropped"),
        (lambda fake, uuid: fake.set_state(uuid, "running"), "running"),
        (lambda fake, uuid: fake.cancel_job(uuid), "dropped"),
        (lambda fake, uuid: fake.set_state(uuid, "limited"), "dropped"),
    ],
    ids=["somebody else has it", "an agent has it", "it is over", "it is not ready"],
)
def test_reserve_not_reserved_job_is_asked_about_and_not_reserved_again_before(
    bench: Bench, happen: Callable[[FakeBuildkite, str], object], state: str
) -> None:
    uuid, other = bench.fake.add_job(), bench.fake.add_job()
    bench.list_jobs()
    happen(bench.fake, uuid)
    bench.reserve()
    assert (bench.state(uuid), bench.state(other)) == ("reserving", "ready")
    bench.reserve()
    assert bench.calls("reserve") == 1
    bench.check_states()
    assert (bench.state(uuid), bench.state(other)) == (state, "ready")


def test_reserve_not_reserved_job_that_is_listed_on_does_not_come_back_with_every_list(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.fake.set_fault("reserve", body={"reserved": [], "not_reserved": [uuid]})
    bench.take_in()
    bench.check_states()
    assert bench.state(uuid) == "dropped"
    asked = bench.calls("reserve")
    for _ in range(20):
        bench.clock.advance(1)
        bench.take_in()
    assert bench.calls("reserve") == asked
    bench.fake.clear_faults()
    bench.clock.advance(60)
    bench.take_in()
    assert bench.state(uuid) == "ready"


def test_reserve_not_reserved_job_that_buildkite_does_not_know_is_tried_three_times(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()
    bench.fake.set_fault("reserve", body={"reserved": [], "not_reserved": [uuid]})
    bench.fake.set_fault("get-states", body={"states": {}})
    states = []
    for _ in range(3):
        bench.reserve()
        bench.check_states()
        states.append(bench.state(uuid))
    assert states == ["reserving", "reserving", "dropped"]


# --- What Buildkite's words for a state do ---

WITH_AGENT = "assigned accepted running canceling timing_out".split()
NOT_READY = "pending waiting limiting limited platform_limiting platform_limited blocked unblocked".split()
RAN = "finished passed failed timed_out".split()
NEVER_RAN = "canceled expired skipped broken waiting_failed blocked_failed unblocked_failed".split()

#: Buildkite's word → what becomes of a job that is ready, leased, running: its outcome where it is settled by that.
TABLE: dict[str, tuple[str, str, str]] = {
    "scheduled": ("reserving", "leased", "running"),
    "reserved": ("ready", "leased", "running"),
    **dict.fromkeys(WITH_AGENT, ("running", "running", "running")),
    **dict.fromkeys(NOT_READY, ("dropped", "dropped", "done")),
    **dict.fromkeys(RAN, ("dropped", "ran", "ran")),
    **dict.fromkeys(NEVER_RAN, ("dropped", "dropped", "ran")),
    "quantum": ("running", "running", "running"),
}


def test_look_table_names_every_word_that_is_known() -> None:
    assert set(TABLE) - {"quantum"} == set(scheduler.FINDINGS)


@pytest.mark.parametrize("word", TABLE)
def test_look_at_job_moves_it_by_the_table(bench: Bench, word: str) -> None:
    running, leased = bench.add_running(), bench.add_ready()
    assert bench.claim("w2")
    ready = bench.add_ready()
    for uuid in (ready, leased, running):
        bench.fake.set_state(uuid, word)
    bench.check_states()
    for uuid, becomes in zip((ready, leased, running), TABLE[word], strict=True):
        assert becomes in (bench.state(uuid), bench.job(uuid).state)


@pytest.mark.parametrize("word", ["scheduled", "reserved"])
def test_look_at_reserving_job_that_is_free_proves_nothing(bench: Bench, word: str) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()
    bench.fake.set_state(uuid, word)
    bench.check_states()
    assert bench.state(uuid) == "reserving"


@pytest.mark.large
def test_look_at_thousands_asks_about_each_in_batches_of_1000_every_5_seconds(bench: Bench) -> None:
    uuids = {bench.fake.add_job() for _ in range(2500)}
    while len(bench.store.unfinished("default")) < 2500:
        bench.take_in()
    for sweep in (1, 2):
        pause = bench.check_states()
        while pause == 0:
            pause = bench.intake.check_states(bench.clock.now())
        assert pause and pause <= 5
        batches = bench.batches("get-states")[-3:]
        assert bench.calls("get-states") == 3 * sweep
        assert sorted(map(len, batches)) == [500, 1000, 1000]
        assert set(itertools.chain(*batches)) == uuids


@pytest.mark.large
def test_look_at_a_long_line_asks_about_what_a_worker_has_every_time_and_the_others_in_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "SWEEP_WAITING", 1000)
    waiting = {bench.fake.add_job() for _ in range(2500)}
    while len(bench.store.unfinished("default")) < 2500:
        bench.take_in()
    held = bench.claim()
    assert held
    asked: list[set[str]] = []
    for _ in range(3):
        before = bench.calls("get-states")
        pause = bench.check_states()
        while pause == 0:
            pause = bench.intake.check_states(bench.clock.now())
        asked.append(set(itertools.chain(*bench.batches("get-states")[before:])))
    assert all(held.uuid in each and len(each) <= 1001 for each in asked)
    assert set().union(*asked) == waiting


def test_look_soon_asks_about_the_job_before_its_turn(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.check_states()
    bench.fake.set_state(uuid, "running")
    bench.intake.check_soon(uuid)
    bench.intake.check_states(bench.clock.now())
    assert bench.state(uuid) == "running"


def test_look_at_unknown_words_says_each_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    uuids = [bench.add_ready() for _ in range(3)]
    for uuid, word in zip(uuids, ["quantum", "quantum", "entangled"], strict=True):
        bench.fake.set_state(uuid, word)
    bench.check_states()
    bench.check_states()
    assert {bench.state(uuid) for uuid in uuids} == {"running"}
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unknown ")]
    assert sorted(line.split()[1] for line in said) == ["state=entangled", "state=quantum"]


def test_look_at_job_in_unknown_state_for_an_hour_drops_it(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.fake.set_state(uuid, "quantum")
    bench.check_states()
    bench.clock.advance(3590)
    bench.check_states()
    assert bench.state(uuid) == "running"
    bench.check_states()
    assert bench.job(uuid).state == "done"


def test_look_at_job_that_came_back_from_an_unknown_state_starts_its_hour_anew(bench: Bench) -> None:
    uuid = bench.add_ready()
    for word in ("quantum", "running", "quantum"):
        bench.fake.set_state(uuid, word)
        bench.check_states()
        bench.clock.advance(2000)
    bench.check_states()
    assert bench.state(uuid) == "running"


def test_look_at_job_missing_three_times_in_a_row_drops_it(bench: Bench) -> None:
    uuid, other = bench.add_ready(), bench.add_ready()
    bench.fake.set_fault("get-states", body={"states": {other: "reserved"}})
    states = []
    for _ in range(3):
        bench.check_states()
        states.append(bench.state(uuid))
    assert states == ["ready", "ready", "dropped"]
    assert bench.state(other) == "ready"


def test_look_at_job_missing_now_and_then_keeps_it(bench: Bench) -> None:
    uuid = bench.add_ready()
    for missing in (True, True, False, True, True, False):
        if missing:
            bench.fake.set_fault("get-states", body={"states": {}}, times=1)
        bench.check_states()
    assert bench.state(uuid) == "ready"


def test_look_that_fails_changes_nothing_and_counts_for_nothing(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.fake.set_fault("get-states", status=503, times=5)
    for _ in range(5):
        with pytest.raises(BuildkiteError):
            bench.check_states()
    assert bench.store.looked_at("default") == 0  # so no agent is stopped because of what we do not know
    bench.check_states()
    assert bench.state(uuid) == "ready"
    assert bench.store.looked_at("default") == bench.clock.now()


# --- Answers that come too late ---


def test_look_answered_after_the_job_was_claimed_is_not_applied(bench: Bench) -> None:
    uuid = bench.add_ready()

    def claimed_meanwhile(_: Request) -> Any:
        assert bench.claim()
        return {"states": {uuid: "canceled"}}

    bench.fake.set_fault("get-states", body=claimed_meanwhile, times=1)
    bench.check_states()
    assert bench.state(uuid) == "leased"


def test_reserve_answered_after_an_agent_was_seen_is_not_applied(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()

    def acquired_meanwhile(_: Request) -> Any:
        bench.store.learn({uuid: JobFinding(Finding.ACQUIRED, "running")}, bench.store.sequence(), bench.clock.now())
        return {"reserved": [uuid], "not_reserved": []}

    bench.fake.set_fault("reserve", body=acquired_meanwhile, times=1)
    bench.reserve()
    assert bench.state(uuid) == "running"
    assert bench.claim() is None


def test_reserve_answered_after_the_job_was_given_back_is_not_applied(bench: Bench) -> None:
    uuid = bench.add_ready()
    held = bench.claim()
    assert held
    bench.clock.advance(500)

    def released_meanwhile(_: Request) -> Any:
        bench.store.release(Holder(uuid, held.claim), "no disk", bench.clock.now())
        return {"reserved": [uuid], "not_reserved": []}

    bench.fake.set_fault("reserve", body=released_meanwhile, times=1)
    bench.reserve()
    assert bench.state(uuid) == "reserving"
    bench.reserve()
    assert bench.state(uuid) == "ready"


def test_list_answered_after_the_job_was_claimed_is_not_applied(bench: Bench) -> None:
    uuid = bench.add_ready()
    job = listed(bench.fake.jobs[uuid])

    def claimed_meanwhile(_: Request) -> Any:
        assert bench.claim()
        return {"jobs": [job]}

    bench.fake.set_fault("list", body=claimed_meanwhile, times=1)
    bench.list_jobs()
    assert bench.state(uuid) == "leased"
    assert bench.job(uuid).reservation_expires_at == bench.clock.now() + 900


# --- Reservations that lapse ---


def test_look_at_lapsed_reservation_confirms_the_job_in_its_old_place(bench: Bench) -> None:
    now = bench.clock.now()
    first, second = bench.add_ready(scheduled_at=now - 60), bench.add_ready(scheduled_at=now - 30)
    bench.fake.lapse(first)
    bench.check_states()
    assert (bench.state(first), bench.state(second)) == ("reserving", "ready")
    bench.reserve()
    assert bench.state(first) == "ready"
    given = bench.claim()
    assert given and given.uuid == first


def test_look_after_buildkite_was_away_confirms_before_handing_out(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.clock.advance(1000)
    bench.check_states()
    assert bench.state(uuid) == "reserving"
    assert bench.claim() is None
    bench.fake.reserve_for(uuid, "another-stack")
    bench.reserve()
    bench.check_states()
    assert bench.state(uuid) == "dropped"


# --- Finish ---


@pytest.fixture
def strict(
    fake: FakeBuildkite,
    clock: Clock,
    settings: Callable[..., Settings],
    open_store: Callable[..., Store],
) -> Bench:
    """A bench that gives a job up after two attempts."""
    return Bench(fake, clock, open_store(MAX_ATTEMPTS=2), settings(MAX_ATTEMPTS=2))


def given_up(bench: Bench) -> str:
    """A job that two workers failed, with the intent to finish it."""
    uuid = bench.add_ready()
    for name in ("w1", "w2"):
        assert bench.fail(name).uuid == uuid
        bench.reserve()
    assert [job.uuid for job in bench.store.intents("default")] == [uuid]
    return uuid


def test_finish_job_that_was_given_up_ends_it_with_what_was_tried(strict: Bench) -> None:
    uuid = given_up(strict)
    assert strict.calls("finish") == 0
    strict.finish()
    assert (strict.job(uuid).state, strict.state(uuid)) == ("done", "failed")
    job = strict.fake.jobs[uuid]
    assert (job.state, job.exit_status, job.signal_reason) == ("finished", -1, "stack_error")
    for words in ("2 attempts", "w1", "w2", "cannot run it on w1", "cannot run it on w2", "2027-01-15T08:"):
        assert words in (job.finish_detail or "")
    strict.finish()
    assert strict.calls("finish") == 1


def test_claim_job_that_was_given_up_gets_nothing(strict: Bench) -> None:
    uuid = given_up(strict)
    strict.fake.set_fault("finish", status=503)
    for pause in (0, 400, 400):
        strict.clock.advance(pause)
        with pytest.raises(BuildkiteError):
            strict.finish()
        strict.take_in()
        assert strict.claim("w3") is None
        assert strict.state(uuid) == "reserving"


def test_fail_once_gives_nothing_up(strict: Bench) -> None:
    uuid = strict.add_ready()
    strict.fail("w1")
    strict.reserve()
    strict.finish()
    assert (strict.state(uuid), strict.calls("finish")) == ("ready", 0)


def test_finish_refused_because_an_agent_has_it_leaves_the_job_to_it(strict: Bench) -> None:
    uuid = given_up(strict)
    strict.fake.set_state(uuid, "running")
    strict.finish()
    assert strict.fake.calls_to("finish")[0].status == 422
    strict.intake.check_states(strict.clock.now())
    assert strict.state(uuid) == "running"
    assert strict.store.intents("default") == []
    strict.fake.set_state(uuid, "finished")
    strict.check_states()
    assert strict.state(uuid) == "ran"


def test_finish_refused_because_it_is_over_is_settled_by_its_state(strict: Bench) -> None:
    uuid = given_up(strict)
    strict.fake.cancel_job(uuid)
    strict.finish()
    strict.intake.check_states(strict.clock.now())
    assert strict.job(uuid).state == "done"
    assert strict.store.intents("default") == []


def test_finish_refused_is_tried_again_but_not_at_once(strict: Bench) -> None:
    uuid = given_up(strict)
    strict.fake.set_fault("finish", status=422, times=1)
    strict.finish()
    strict.check_states()
    strict.finish()
    assert strict.calls("finish") == 1
    assert strict.state(uuid) == "reserving"
    strict.clock.advance(120)
    strict.finish()
    assert strict.state(uuid) == "failed"


def test_finish_whose_answer_was_lost_is_repeated_until_it_is_known(strict: Bench) -> None:
    uuid = given_up(strict)
    strict.fake.set_fault("finish", drop_after=True, times=1)
    with pytest.raises(BuildkiteError):
        strict.finish()
    assert strict.state(uuid) == "reserving"
    strict.finish()
    strict.intake.check_states(strict.clock.now())
    assert strict.state(uuid) == "failed"
    assert strict.fake.jobs[uuid].happened("finish_by_stack") == 1


# --- Registration ---


def forget_stack(bench: Bench) -> None:
    with bench.fake.changed:
        bench.fake.stacks.clear()


@pytest.mark.parametrize("duty", ["list_jobs", "reserve", "check_states"])
def test_register_again_after_404_with_the_next_list(bench: Bench, duty: str) -> None:
    bench.add_ready()
    bench.clock.advance(500)
    forget_stack(bench)
    with pytest.raises(BuildkiteError):
        getattr(bench, duty)()
    bench.list_jobs()
    assert (bench.calls("register"), list(bench.fake.stacks)) == (2, ["test-default"])


def test_register_again_happens_at_most_once_a_minute(bench: Bench) -> None:
    for _ in range(200):
        with suppress(BuildkiteError):
            bench.list_jobs()
        bench.clock.advance(1)
        forget_stack(bench)
    times = [call.at for call in bench.fake.calls_to("register")]
    assert len(times) >= 3
    assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(times))


def test_register_refused_with_401_at_first_gives_up_and_names_the_token(bench: Bench) -> None:
    bench.token = "bkct_wrong"
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    (reason,) = bench.given_up
    assert "BUILDKITE_AGENT_TOKEN" in reason
    assert "bkct_wrong" not in reason


def test_register_refused_with_401_after_other_failures_gives_up(bench: Bench) -> None:
    bench.token = "bkct_wrong"
    bench.fake.set_fault("register", status=503, times=1)
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    assert bench.given_up == []
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    assert len(bench.given_up) == 1


@pytest.mark.parametrize("status", [403, 404, 422, 429, 500, 503])
def test_register_refused_otherwise_does_not_give_up(bench: Bench, status: int) -> None:
    bench.fake.set_fault("register", status=status, times=1)
    with pytest.raises(BuildkiteError):
        bench.list_jobs()
    bench.list_jobs()
    assert (bench.given_up, bench.intake.registered) == ([], True)


def test_list_refused_with_401_later_goes_on_and_recovers_with_the_new_token(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    uuid = bench.add_ready()
    bench.fake.replace_token("bkct_new")
    bench.clock.advance(100)
    assert bench.intake.list.run_once() > 0
    assert bench.given_up == []
    (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "BUILDKITE_AGENT_TOKEN" in said.getMessage()
    given = bench.claim()
    assert given and given.uuid == uuid
    bench.token = "bkct_new"
    bench.list_jobs()
    assert bench.calls("register") == 1


# --- Who leads ---


def test_tick_while_another_leads_asks_nothing_and_a_term_begins_with_the_registration(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.lead.end()
    bench.fake.add_job()
    bench.fake.lapse(uuid)
    before = len(bench.fake.calls)
    pauses = {bench.list_jobs(), bench.reserve(), bench.check_states(), bench.finish()}
    assert pauses == {scheduler.FOLLOWING_SECONDS}
    assert len(bench.fake.calls) == before
    bench.begin_another_term()
    assert (bench.reserve(), bench.check_states()) == (None, None)
    bench.list_jobs()
    assert [call.endpoint for call in bench.fake.calls[before:]] == ["register", "list"]


def test_reserve_that_outlives_its_term_puts_nothing_into_what_the_next_one_knows(bench: Bench) -> None:
    uuid = bench.fake.add_job()
    bench.list_jobs()

    def another_term_begins(_: Request) -> Any:
        bench.begin_another_term()
        return {"reserved": [], "not_reserved": [uuid]}

    bench.fake.set_fault("reserve", body=another_term_begins, times=1)
    bench.reserve()
    bench.list_jobs()
    bench.reserve()  # at once, not after its state has been asked for
    assert bench.state(uuid) == "ready"


def test_begin_of_a_term_knows_when_buildkite_answered_the_leader_before(bench: Bench) -> None:
    bench.list_jobs()
    answered_at = bench.intake.answered_at
    assert answered_at == bench.clock.now()
    bench.clock.advance(60)
    bench.begin_another_term()
    assert bench.intake.answered_at == answered_at


# --- How often a queue is listed ---


@pytest.mark.parametrize(("interval", "busy"), [("1s", 0.25), ("60s", 15.0), ("200ms", 0.2)])
def test_list_that_brought_something_is_followed_by_others_soon_for_a_while(
    bench: Bench, settings: Callable[..., Settings], interval: str, busy: float
) -> None:
    bench = Bench(bench.fake, bench.clock, bench.store, settings(POLL_INTERVAL=interval))
    idle = scheduler.duration(interval)
    assert bench.list_jobs() == idle
    for _ in range(2):
        bench.fake.add_job()
        assert bench.list_jobs() == scheduler.HINT_SECONDS
        assert [bench.list_jobs() for _ in range(scheduler.BUSY_LISTS + 1)] == [busy] * scheduler.BUSY_LISTS + [idle]


# --- On their threads ---


@pytest.fixture
def running(
    fake: FakeBuildkite, store: Store, settings: Callable[..., Settings]
) -> Iterator[Callable[[], tuple[Intake, Dispatcher]]]:
    """Starts an intake that would list once a minute if nothing woke it."""
    duties: list[PeriodicTask] = []

    def start() -> tuple[Intake, Dispatcher]:
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        dispatcher = Dispatcher(store, fake.clock)
        intake = Intake(stack, Leadership(store), dispatcher, settings(POLL_INTERVAL="60s"), fake.clock, pytest.fail)
        duties.extend(intake.tasks)
        for duty in intake.tasks:
            duty.start()
        return intake, dispatcher

    yield start
    for duty in duties:
        duty.stop()
    for duty in duties:
        assert duty.join(PATIENCE)


@pytest.mark.large
def test_run_with_long_backlog_takes_it_in_without_waiting_for_the_next_poll(
    running: Callable[[], tuple[Intake, Dispatcher]], fake: FakeBuildkite
) -> None:
    uuids = [fake.add_job() for _ in range(2500)]
    running()
    fake.wait_for(lambda: all(fake.all_jobs[uuid].state == "reserved" for uuid in uuids), PATIENCE)


def test_run_with_parked_claim_gives_it_the_job_that_was_listed(
    running: Callable[[], tuple[Intake, Dispatcher]], fake: FakeBuildkite
) -> None:
    intake, dispatcher = running()
    fake.wait_for(lambda: any(call.endpoint == "list" and call.status for call in fake.calls))
    uuid = fake.add_job()
    intake.list.wake()
    job = dispatcher.claim(Worker("w1", "s1", Profile.of("queue=default")), PATIENCE)
    assert job and job.uuid == uuid


def test_run_with_not_reserved_job_asks_about_it_at_once(
    running: Callable[[], tuple[Intake, Dispatcher]], fake: FakeBuildkite, store: Store
) -> None:
    uuid = fake.add_job()
    asked = threading.Event()

    def elsewhere(_: Request) -> Any:
        fake.set_state(uuid, "running")
        return {"reserved": [], "not_reserved": [uuid]}

    def word(request: Request) -> Any:
        asked.set()
        return {"states": {uuid: "running"}}

    fake.set_fault("reserve", body=elsewhere)
    fake.set_fault("get-states", body=word, match=lambda _, request: uuid in json.loads(request.body)["job_uuids"])
    running()
    assert asked.wait(PATIENCE)


# --- Duty ---


class Script:
    """A tick that does what it is told, one thing for each call: return a pause, or raise."""

    def __init__(self, *steps: float | None | Exception):
        self.steps = list(steps)
        self.called_at: list[float] = []
        self.changed = threading.Condition()
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, now: float) -> float | None:
        with self.changed:
            self.called_at.append(time.monotonic())
            self.changed.notify_all()
            step = self.steps.pop(0) if self.steps else 3600.0
        assert self.may_end.wait(PATIENCE)
        if isinstance(step, Exception):
            raise step
        return step

    def wait_for_calls(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.called_at) >= count, PATIENCE)


@pytest.fixture
def start_duty(clock: Clock) -> Iterator[Callable[[Script], PeriodicTask]]:
    duties: list[PeriodicTask] = []

    def start(script: Script) -> PeriodicTask:
        duties.append(PeriodicTask("test duty", script, clock.now))
        duties[-1].start()
        return duties[-1]

    yield start
    for duty in duties:
        duty.stop()
        assert duty.join(PATIENCE)


def test_run_once_answers_the_pause_of_the_tick(clock: Clock) -> None:
    duty = PeriodicTask("test duty", Script(0.0, 2.5), clock.now)
    assert [duty.run_once(), duty.run_once()] == [0.0, 2.5]
    assert (duty.failures, duty.problem) == (0, "")


def test_run_once_failing_again_and_again_backs_off_to_a_minute_with_jitter(clock: Clock) -> None:
    pauses = []
    for _ in range(20):
        duty = PeriodicTask("test duty", Script(*[BuildkiteError("503 from Buildkite", 503)] * 10), clock.now)
        pauses.append([duty.run_once() for _ in range(10)])
    for number, most in enumerate([1, 2, 4, 8, 16, 32, 60, 60, 60, 60]):
        column = [row[number] for row in pauses]
        assert most / 2 <= min(column) <= max(column) <= most
        assert len(set(column)) > 1


@pytest.mark.parametrize("asked", [0.5, 8.0, 600.0])
def test_run_once_told_how_long_to_wait_waits_that_long(clock: Clock, asked: float) -> None:
    duty = PeriodicTask("test duty", Script(*[BuildkiteError("slow down", 429, asked)] * 3), clock.now)
    assert [duty.run_once() for _ in range(3)] == [asked] * 3


def test_run_once_told_to_wait_for_ages_waits_what_a_thread_can(clock: Clock) -> None:
    duty = PeriodicTask("test duty", Script(BuildkiteError("slow down", 429, 1e12)), clock.now)
    assert duty.run_once() <= threading.TIMEOUT_MAX


@pytest.mark.parametrize(
    ("failure", "level"),
    [
        (BuildkiteError("no answer"), logging.WARNING),
        (BuildkiteError("401 from Buildkite", 401), logging.ERROR),
        (StoreUnavailable("the disk is full"), logging.ERROR),
        (ZeroDivisionError("a bug"), logging.ERROR),
    ],
    ids=repr,
)
def test_run_once_failing_logs_once_and_says_when_it_recovered(
    clock: Clock, caplog: pytest.LogCaptureFixture, failure: Exception, level: int
) -> None:
    caplog.set_level(logging.INFO)
    duty = PeriodicTask("test duty", Script(failure, failure, 1.0, 1.0), clock.now)
    assert duty.run_once() <= 1.0
    assert duty.problem
    assert max(record.levelno for record in caplog.records) == level
    duty.run_once()
    assert duty.failures == 2
    caplog.clear()
    assert (duty.run_once(), duty.run_once()) == (1.0, 1.0)
    assert [record.getMessage() for record in caplog.records] == ['recovered task="test duty" failures=2']
    assert (duty.failures, duty.problem) == (0, "")


def test_run_once_that_could_not_be_tried_is_no_recovery(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    duty = PeriodicTask("test duty", Script(BuildkiteError("no answer"), None, 1.0), clock.now)
    duty.run_once()
    assert duty.run_once() == scheduler.UNTRIED_SECONDS
    assert (duty.failures, duty.problem) == (1, "no answer")
    assert "recovered" not in caplog.text
    duty.run_once()
    assert (duty.failures, duty.problem) == (0, "")
    assert "recovered" in caplog.text


def test_run_once_failing_and_recovering_is_true_of_the_duty_before_the_log_says_so(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = []
    duty = PeriodicTask("test duty", Script(BuildkiteError("no answer"), 1.0), clock.now)
    monkeypatch.setattr(scheduler.log, "handle", lambda record: known.append((record.msg.split()[0], duty.problem)))
    duty.run_once()
    duty.run_once()
    assert known == [("failed", "no answer"), ("recovered", "")]


def test_wake_makes_the_next_tick_come_now(start_duty: Callable[[Script], PeriodicTask]) -> None:
    script = Script(3600.0, 3600.0)
    duty = start_duty(script)
    script.wait_for_calls(1)
    duty.wake()
    script.wait_for_calls(2)


def test_wake_during_the_tick_makes_another_one_follow(start_duty: Callable[[Script], PeriodicTask]) -> None:
    script = Script(3600.0)
    script.may_end.clear()
    duty = start_duty(script)
    script.wait_for_calls(1)
    duty.wake()
    script.may_end.set()
    script.wait_for_calls(2)


def test_wake_while_backing_off_does_not_shorten_it(start_duty: Callable[[Script], PeriodicTask]) -> None:
    script = Script(BuildkiteError("slow down", 429, 0.3))
    duty = start_duty(script)
    script.wait_for_calls(1)
    duty.wake()
    script.wait_for_calls(2)
    first, second = script.called_at
    assert second - first >= 0.29


def test_start_anew_while_backing_off_ticks_at_once_and_forgets_what_failed(
    start_duty: Callable[[Script], PeriodicTask], caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(BuildkiteError("slow down", 429, 3600.0))
    duty = start_duty(script)
    script.wait_for_calls(1)
    duty.restart()
    script.wait_for_calls(2)
    assert (duty.problem, duty.failures) == ("", 0)
    assert "recovered" not in caplog.text  # nobody has tried again: it is another term


def test_stop_while_backing_off_ends_it_at_once(start_duty: Callable[[Script], PeriodicTask]) -> None:
    script = Script(BuildkiteError("slow down", 429, 3600.0))
    duty = start_duty(script)
    script.wait_for_calls(1)
    duty.stop()
    assert duty.join(PATIENCE)
    assert len(script.called_at) == 1


def test_run_with_unexpected_exception_goes_on(
    start_duty: Callable[[Script], PeriodicTask], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "FIRST_BACKOFF_SECONDS", 0.01)
    script = Script(ZeroDivisionError("a bug"), KeyError("another"), RecursionError("a third"))
    start_duty(script)
    script.wait_for_calls(4)
    assert "ZeroDivisionError: a bug" in caplog.text


def test_reserve_refused_renewal_hands_the_job_to_nobody_until_its_state_is_known(bench: Bench) -> None:
    uuid = bench.add_ready()
    bench.fake.lapse(uuid)
    bench.fake.reserve_for(uuid, "other-stack")
    bench.clock.advance(450)
    bench.reserve()
    assert bench.job(uuid).state == "reserving"
    assert bench.claim() is None


# --- Another scheduler with our stack's key ---


def begin(bench: Bench) -> None:
    """What a scheduler's start does to a store, and who hears of moves."""
    bench.store.on_move = lambda move, _: bench.intake.on_move(move)
    bench.clock.advance(1)
    bench.store.restart_leases(bench.clock.now(), confirm=True)
    bench.clock.advance(1)


def test_look_at_job_that_a_rival_runs_says_so_for_an_hour(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    begin(bench)
    first, second = bench.add_ready(), bench.add_ready()
    for uuid in (first, second):
        bench.fake.set_state(uuid, "running")  # an agent acquired it, which knew the uuid from another scheduler
    bench.check_states()
    [problem] = bench.intake.problems
    assert "another scheduler uses stack test-default" in problem
    assert first in problem or second in problem
    assert [record.levelname for record in caplog.records if "rival" in record.getMessage()] == ["ERROR"]
    bench.clock.advance(3500)
    assert bench.intake.problems == [problem]
    bench.clock.advance(100)
    assert bench.intake.problems == []


def test_look_at_jobs_of_workers_and_of_people_finds_no_rival(bench: Bench) -> None:
    begin(bench)
    bench.add_running()
    bench.fake.cancel_job(bench.add_ready())
    bench.check_states()
    assert bench.intake.problems == []


@pytest.mark.parametrize("is_confirmed", [True, False])
def test_look_after_start_on_a_backup_that_lacks_a_claim_finds_no_rival(bench: Bench, is_confirmed: bool) -> None:
    # To a worker that the backup knows nothing of.
    uuid = bench.add_ready()
    begin(bench)
    if is_confirmed:  # its agent was slow
        while bench.reserve() == 0:
            pass
        assert bench.state(uuid) == "ready"
    bench.fake.set_state(uuid, "running")
    bench.check_states()
    assert bench.state(uuid) == "running"
    assert bench.intake.problems == []
