"""The store's contract, for every store; then its verbs in any order, against a model; then what is SQLite's own."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import scheduler
from conftest import LONG_RUN, REDIS, STORE_NAMES, STORES, Clock, lead, make_settings, open_sqlite, the_redis
from processes import RedisServer
from scheduler import (
    MOVES,
    AgentEnd,
    Fenced,
    Finding,
    Holder,
    Job,
    JobFinding,
    JobState,
    Move,
    Outcome,
    Profile,
    RedisRows,
    Refusal,
    RuleSet,
    Settings,
    SettingsError,
    SqliteRows,
    StaleClaim,
    Store,
    StoreInUse,
    StoreUnavailable,
    UnknownJob,
    Worker,
    WorkerHeld,
    WorkerNameTaken,
    WorkerRow,
)

RESERVING, READY, LEASED, RUNNING, DONE = JobState
ACQUIRED, OVER, GONE, LAPSED = Finding

LEASE, ACQUIRE, RESERVATION = 30.0, 120.0, 900.0
MAX_ATTEMPTS = 3
#: Longer than a slot's session may be silent.
SILENCE = 301.0
#: Longer than one worker alone must have tried a job before it is finished.
QUARTER = 901.0


def uuid(number: int) -> str:
    return f"018f0000-0000-4000-8000-{number:012}"


def listed(
    number: int = 1, *, queue: str = "default", rules: Iterable[str] = (), priority: int = 0, age: int = 0
) -> Job:
    """A job as Buildkite lists it; `age` in seconds makes it older."""
    raw = {
        "id": uuid(number),
        "priority": priority,
        "scheduled_at": f"2026-11-21T07:{59 - age // 60:02}:{59 - age % 60:02}Z",
        "agent_query_rules": list(rules),
        "pipeline": {"slug": "app"},
        "build": {"number": number},
        "step": {"key": "test"},
    }
    return Job.from_api(queue, raw, 1_800_000_000.0)


def worker(name: str = "w1", session: str = "s1", query: str = "queue=default") -> Worker:
    return Worker(name, session, Profile.of(query))


W1, W2, NOBODY = worker(), worker("w2"), worker("", "")


class Desk:
    """A store and its clock, with what comes to a scheduler as one word each."""

    def __init__(self, store: Store, clock: Clock):
        self.store, self.clock = store, clock

    @property
    def now(self) -> float:
        return self.clock.now()

    def job(self, number: int = 1) -> Job:
        found = self.store.get(uuid(number))
        assert found
        return found

    # Buildkite's answers, to questions asked just now.

    def put(self, *jobs: Job) -> list[Job]:
        return self.store.put(jobs, self.store.sequence(), self.now)

    def confirm(self, *numbers: int) -> list[Job]:
        uuids = [uuid(number) for number in numbers]
        return self.store.confirm(uuids, self.store.sequence(), self.now + RESERVATION, self.now)

    def learn(self, number: int, finding: Finding, word: str = "a word") -> list[Job]:
        return self.store.learn({uuid(number): JobFinding(finding, word)}, self.store.sequence(), self.now)

    # Workers; unless told otherwise, Buildkite has answered us just now.

    def claim(self, who: Worker = W1) -> Job:
        job = self.store.claim(who, self.now)
        assert job
        return job

    def claims_nothing(self, who: Worker = W1) -> bool:
        return self.store.claim(who, self.now) is None

    def touch(self, job: Job, who: Worker | None = None) -> Job:
        return self.store.touch(Holder(job.uuid, job.claim, who), self.now)

    def answer(self, *queue_keys: str) -> None:
        """Buildkite answers us about these queues."""
        for queue_key in queue_keys or ("default", "linux"):
            self.store.answered(queue_key, self.now)

    def release(self, job: Job, who: Worker | None = None, reason: str = "no room") -> Job:
        self.answer()
        return self.store.release(Holder(job.uuid, job.claim, who), reason, self.now)

    def complete(self, job: Job, exit_status: int = 1, last_words: str = "", who: Worker | None = None) -> Job:
        self.answer()
        return self.store.complete(Holder(job.uuid, job.claim, who), AgentEnd(exit_status, last_words), self.now)

    def expire(self) -> list[Job]:
        self.answer()
        return self.store.expire(["default", "linux"], self.now)

    # Several of these.

    def make_ready(self, *jobs: Job) -> None:
        self.put(*jobs)
        self.store.confirm([job.uuid for job in jobs], self.store.sequence(), self.now + RESERVATION, self.now)

    def lease(self, number: int = 1, who: Worker = W1) -> Job:
        self.make_ready(listed(number))
        return self.claim(who)

    def fail(self, who: Worker = W1, exit_status: int = 1, seconds: float = 1.0) -> Job:
        """An attempt that counts: the job is claimed, and the agent ends without acquiring it."""
        self.clock.advance(SILENCE)  # whatever held the worker is over
        job = self.claim(who)
        self.clock.advance(seconds)
        return self.complete(job, exit_status, "cannot connect")

    def bring(self, state: JobState, number: int = 1) -> Job:
        """A job in that state."""
        self.put(listed(number))
        if state in (READY, LEASED):
            self.confirm(number)
        if state is LEASED:
            self.claim(worker(f"w{number}"))
        if state in (RUNNING, DONE):
            self.learn(number, {RUNNING: ACQUIRED, DONE: OVER}[state])
        job = self.job(number)
        assert job.state is state
        return job

    def bring_one_of_each(self, first: int = 1) -> dict[JobState, int]:
        """A job in every state; their numbers."""
        numbers = {state: number for number, state in enumerate((LEASED, READY, RESERVING, RUNNING, DONE), first)}
        for state, number in numbers.items():
            self.bring(state, number)
        return numbers


@pytest.fixture
def desk(open_store: Callable[..., Store], clock: Clock) -> Desk:
    return Desk(open_store(MAX_ATTEMPTS=MAX_ATTEMPTS), clock)


# --- put ---


def test_put_new_jobs_writes_them_down_as_reserving(desk: Desk) -> None:
    job = listed(1, rules=["arch=amd64"], priority=-2)
    before = desk.store.sequence()
    assert [put.uuid for put in desk.put(job, listed(2))] == [uuid(1), uuid(2)]
    stored = desk.job(1)
    assert stored.state is RESERVING
    assert (stored.claim, stored.attempts, stored.outcome, stored.reserved_at) == (None, 0, None, None)
    assert stored == dataclasses.replace(job, version=stored.version)
    assert desk.store.sequence() > before


def test_put_of_no_jobs_changes_nothing(desk: Desk) -> None:
    assert desk.put() == []
    assert desk.store.unfinished("default") == []


def test_put_of_one_job_twice_in_one_list_writes_it_once(desk: Desk) -> None:
    assert len(desk.put(listed(1), listed(1))) == 1
    assert desk.store.unfinished("default") == [uuid(1)]


@pytest.mark.parametrize("state", [RESERVING, READY, RUNNING])
def test_put_of_job_that_is_held_takes_it_back_to_reserving_and_returns_nothing(desk: Desk, state: JobState) -> None:
    desk.bring(state)
    assert desk.put(listed(1)) == []
    assert desk.job().state is RESERVING


@pytest.mark.parametrize("state", [READY, RUNNING])
def test_put_of_job_that_is_held_keeps_its_place(desk: Desk, state: JobState) -> None:
    desk.bring(state)
    desk.make_ready(listed(2, age=60))
    desk.put(listed(1, age=120))
    assert desk.store.unconfirmed("default", 0, 10) == [uuid(1)]
    desk.confirm(1)
    assert [desk.claim(W1).uuid, desk.claim(W2).uuid] == [uuid(2), uuid(1)]


@pytest.mark.parametrize("state", [RESERVING, READY, RUNNING])
def test_put_of_job_with_another_priority_takes_that_over(desk: Desk, state: JobState) -> None:
    desk.bring(state)
    desk.make_ready(listed(2, age=60))
    desk.put(listed(1, priority=9))
    desk.confirm(1)
    assert [desk.claim(W1).uuid, desk.claim(W2).uuid] == [uuid(1), uuid(2)]


def test_put_of_leased_job_keeps_its_holder_and_makes_it_due(desk: Desk) -> None:
    job = desk.lease()
    assert desk.store.unconfirmed("default", desk.now, 10) == []
    assert desk.put(listed(1)) == []
    assert (desk.job().state, desk.job().claim) == (LEASED, job.claim)
    assert desk.store.unconfirmed("default", desk.now, 10) == [uuid(1)]
    assert desk.touch(job).state is LEASED


def test_put_of_done_job_puts_it_again_and_keeps_its_history(desk: Desk) -> None:
    job = desk.lease()
    desk.complete(job, 1, "out of disk")
    desk.learn(1, GONE, "limited")
    assert [put.uuid for put in desk.put(listed(1, priority=7))] == [uuid(1)]
    again = desk.job()
    assert (again.state, again.outcome, again.done_at, again.priority) == (RESERVING, None, None, 7)
    assert (again.attempts, again.claims, len(again.tries)) == (0, 1, 1)
    desk.confirm(1)
    assert desk.claim(W2).uuid == uuid(1)


@pytest.mark.parametrize("state", [READY, LEASED, RUNNING, DONE])
def test_put_of_job_that_changed_since_the_question_leaves_it_alone(desk: Desk, state: JobState) -> None:
    asked = desk.store.sequence()
    before = desk.bring(state)
    assert desk.store.put([listed(1)], asked, desk.now) == []
    assert desk.job() == before


# --- confirm ---


def test_confirm_of_reserving_job_makes_it_ready(desk: Desk) -> None:
    desk.put(listed(1), listed(2))
    assert [(job.uuid, job.state) for job in desk.confirm(1)] == [(uuid(1), READY)]
    assert (desk.job(1).reserved_at, desk.job(1).reservation_expires_at) == (desk.now, desk.now + RESERVATION)
    assert desk.job(2).state is RESERVING


@pytest.mark.parametrize("state", [READY, LEASED])
def test_confirm_of_job_that_is_reserved_renews_it_in_its_place(desk: Desk, state: JobState) -> None:
    before = desk.bring(state)
    desk.clock.advance(100)
    assert desk.confirm(1) == []
    assert desk.job() == dataclasses.replace(before, reservation_expires_at=desk.now + RESERVATION)


@pytest.mark.parametrize("state", [RUNNING, DONE])
def test_confirm_of_job_that_waits_for_nothing_leaves_it_alone(desk: Desk, state: JobState) -> None:
    before = desk.bring(state)
    assert desk.confirm(1) == []
    assert desk.job() == before


def test_confirm_of_unknown_job_does_nothing(desk: Desk) -> None:
    assert desk.confirm(1) == []
    assert desk.store.get(uuid(1)) is None


@pytest.mark.parametrize("state", [RESERVING, READY, LEASED])
def test_confirm_of_job_that_changed_since_the_question_leaves_it_alone(desk: Desk, state: JobState) -> None:
    asked = desk.store.sequence()
    before = desk.bring(state)
    assert desk.store.confirm([uuid(1)], asked, desk.now + 2 * RESERVATION, desk.now) == []
    assert desk.job() == before


def test_confirm_asked_before_a_release_does_not_make_the_job_ready(desk: Desk) -> None:
    job = desk.lease()
    asked = desk.store.sequence()
    desk.release(job)
    assert desk.store.confirm([uuid(1)], asked, desk.now + RESERVATION, desk.now) == []
    assert desk.job().state is RESERVING
    assert desk.claims_nothing(W2)


def test_confirm_after_release_puts_the_job_in_its_old_place(desk: Desk) -> None:
    desk.make_ready(listed(1, age=30), listed(2, age=20), listed(3, age=10))
    desk.release(desk.claim(W1))
    desk.confirm(1)
    assert desk.claim(W2).uuid == uuid(1)


# --- learn ---

LEARNED: dict[tuple[JobState, Finding], tuple[JobState, Outcome | None]] = {
    (RESERVING, ACQUIRED): (RUNNING, None),
    (RESERVING, OVER): (DONE, Outcome.DROPPED),
    (RESERVING, GONE): (DONE, Outcome.DROPPED),
    (RESERVING, LAPSED): (RESERVING, None),
    (READY, ACQUIRED): (RUNNING, None),
    (READY, OVER): (DONE, Outcome.DROPPED),
    (READY, GONE): (DONE, Outcome.DROPPED),
    (READY, LAPSED): (RESERVING, None),
    (LEASED, ACQUIRED): (RUNNING, None),
    (LEASED, OVER): (DONE, Outcome.DROPPED),
    (LEASED, GONE): (DONE, Outcome.DROPPED),
    (LEASED, LAPSED): (LEASED, None),
    (RUNNING, ACQUIRED): (RUNNING, None),
    (RUNNING, OVER): (DONE, Outcome.RAN),
    (RUNNING, GONE): (DONE, Outcome.DROPPED),
    (RUNNING, LAPSED): (RUNNING, None),
    (DONE, ACQUIRED): (DONE, Outcome.DROPPED),
    (DONE, OVER): (DONE, Outcome.DROPPED),
    (DONE, GONE): (DONE, Outcome.DROPPED),
    (DONE, LAPSED): (DONE, Outcome.DROPPED),
}


def test_learn_table_has_every_state_and_finding() -> None:
    assert list(LEARNED) == list(itertools.product(JobState, Finding))


@pytest.mark.parametrize(("state", "finding"), LEARNED)
def test_learn_in_each_state_does_as_the_table_says(desk: Desk, state: JobState, finding: Finding) -> None:
    before = desk.bring(state)
    desk.clock.advance(1)
    changed = desk.learn(1, finding, "another word")
    after = desk.job()
    assert (after.state, after.outcome) == LEARNED[state, finding]
    if after.state is state:
        assert (changed, after) == ([], before)
    else:
        assert (changed, after.reason == before.reason) == ([after], False)
        assert after.state in MOVES[state]
    if after.state is RUNNING and state is not RUNNING:
        assert after.acquired_at == desk.now
    if after.state is DONE and state is not DONE:
        assert after.done_at == desk.now


@pytest.mark.parametrize(("state", "finding"), LEARNED)
def test_learn_of_job_that_changed_since_the_question_leaves_it_alone(
    desk: Desk, state: JobState, finding: Finding
) -> None:
    asked = desk.store.sequence()
    before = desk.bring(state)
    assert desk.store.learn({uuid(1): JobFinding(finding, "a word")}, asked, desk.now) == []
    assert desk.job() == before


@pytest.mark.parametrize(
    ("word", "outcome"),
    [
        ("finished", Outcome.RAN),
        ("passed", Outcome.RAN),
        ("failed", Outcome.RAN),
        ("timed_out", Outcome.RAN),
        ("canceled", Outcome.DROPPED),
        ("expired", Outcome.DROPPED),
        ("skipped", Outcome.DROPPED),
    ],
)
def test_learn_of_claimed_job_that_is_over_goes_by_the_word(desk: Desk, word: str, outcome: Outcome) -> None:
    desk.lease()
    desk.learn(1, OVER, word)
    assert (desk.job().outcome, desk.job().reason) == (outcome, word)


def test_learn_of_job_that_nobody_claimed_and_is_over_is_dropped(desk: Desk) -> None:
    desk.bring(READY)
    desk.learn(1, OVER, "finished")
    assert desk.job().outcome is Outcome.DROPPED


def test_learn_that_completed_job_is_running_hands_it_to_nobody(desk: Desk) -> None:
    desk.complete(desk.lease(), 0)
    desk.learn(1, ACQUIRED, "running")
    assert desk.job().state is RUNNING
    assert desk.confirm(1) == []
    assert desk.claims_nothing(W2)


def test_learn_of_several_jobs_returns_those_that_changed(desk: Desk) -> None:
    desk.bring(READY, 1)
    desk.bring(DONE, 2)
    findings = {uuid(number): JobFinding(OVER, "canceled") for number in (1, 2, 3)}
    changed = desk.store.learn(findings, desk.store.sequence(), desk.now)
    assert [(job.uuid, job.state) for job in changed] == [(uuid(1), DONE)]


# --- claim ---


def test_claim_of_ready_job_leases_it(desk: Desk) -> None:
    desk.make_ready(listed(1))
    desk.clock.advance(5)
    job = desk.claim(W1)
    assert job == desk.job()
    assert (job.state, job.worker, job.session) == (LEASED, "w1", "s1")
    assert (job.claimed_at, job.lease_expires_at, job.touched_at) == (desk.now, desk.now + LEASE, None)
    assert job.claim and job.claims == 1 and job.attempts == 0


def test_claim_with_no_job_returns_none(desk: Desk) -> None:
    assert desk.claims_nothing()


@pytest.mark.parametrize("state", [RESERVING, LEASED, RUNNING, DONE])
def test_claim_of_job_that_is_not_ready_returns_none(desk: Desk, state: JobState) -> None:
    desk.bring(state)
    assert desk.claims_nothing(W2)


def test_claim_of_several_jobs_goes_by_priority_then_age_then_uuid(desk: Desk) -> None:
    jobs = [
        listed(6, priority=10, age=1),
        listed(5, priority=9, age=99),
        listed(2, priority=0, age=60),
        listed(3, priority=0, age=60),
        listed(1, priority=0, age=59),
        listed(4, priority=-1, age=99),
    ]
    desk.make_ready(*reversed(jobs))
    claimed = [desk.claim(worker(f"w{number}")).uuid for number in range(len(jobs))]
    assert claimed == [job.uuid for job in jobs]
    assert desk.claims_nothing(NOBODY)


def test_claim_of_jobs_with_the_largest_priorities_goes_by_their_last_digit(desk: Desk) -> None:
    priorities = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53, 1, -1, -(2**53), -(2**53) - 1, 2 - 2**63, 1 - 2**63]
    jobs = [listed(number, priority=priority) for number, priority in enumerate(priorities, 1)]
    desk.make_ready(*reversed(jobs))
    assert [desk.claim(NOBODY).priority for _ in priorities] == priorities


def test_claim_over_several_rule_sets_goes_by_the_same_order(desk: Desk) -> None:
    rules = [["arch=amd64"], [], ["arch=*"], ["arch=amd64", "os=linux"], ["os"]]
    jobs = [
        listed(number, rules=rules[number % 5], priority=number % 4 - 2, age=number * 7 % 20) for number in range(1, 21)
    ]
    desk.make_ready(*jobs)
    wide = [worker(f"w{number}", query="arch=amd64,os=linux,gpu") for number in range(20)]
    claimed = [desk.claim(who).uuid for who in wide]
    assert claimed == [job.uuid for job in sorted(jobs, key=lambda job: job.order)]


def test_claim_with_first_job_for_others_takes_the_next(desk: Desk) -> None:
    desk.make_ready(listed(1, rules=["gpu=a100"], priority=9), listed(2, queue="linux", priority=8), listed(3))
    assert desk.claim(W1).uuid == uuid(3)
    assert desk.claims_nothing(W2)
    assert desk.claim(worker("w3", query="gpu=a100")).uuid == uuid(1)
    assert desk.claim(worker("w4", query="queue=linux")).uuid == uuid(2)


def test_claim_by_new_profile_after_others_sees_all_ready_jobs(desk: Desk) -> None:
    desk.make_ready(listed(1, rules=["arch=arm64"]))
    assert desk.claims_nothing(W1)
    desk.make_ready(listed(2, rules=["arch=*"], age=50))
    arm = "arch=arm64"
    assert desk.claim(worker("a1", query=arm)).uuid == uuid(2)
    assert desk.claim(worker("a2", query=arm)).uuid == uuid(1)


def test_claim_of_default_queue_goes_to_workers_of_default(desk: Desk) -> None:
    desk.make_ready(listed(1, queue="_default"), listed(2, queue="_default", age=9))
    assert desk.claims_nothing(worker("w1", query="queue=linux"))
    assert desk.claim(worker("w2", query="queue=default")).uuid == uuid(2)
    assert desk.claim(worker("w3", query="queue=_default")).uuid == uuid(1)


def test_claim_of_each_job_is_given_once(desk: Desk) -> None:
    desk.make_ready(*(listed(number) for number in range(1, 4)))
    jobs = [desk.claim(NOBODY) for _ in range(3)]
    assert desk.claims_nothing(NOBODY)
    assert len({job.uuid for job in jobs}) == 3
    assert len({job.claim for job in jobs}) == 3


def test_claim_by_many_threads_gives_each_job_to_one(desk: Desk) -> None:
    count, lists = 200, 8
    desk.make_ready(*(listed(number, rules=[f"n={number % 3}"]) for number in range(1, count + 1)))
    taken: list[list[str]] = [[] for _ in range(lists)]
    who = worker("", "", "n=0,n=1,n=2")

    def take(mine: list[str]) -> None:
        while job := desk.store.claim(who, desk.now):
            mine.append(job.uuid)

    threads = [threading.Thread(target=take, args=[mine]) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*taken)) == [uuid(number) for number in range(1, count + 1)]
    assert desk.store.stats()["states"][LEASED] == count


# claim: the answer was lost


def test_claim_again_by_same_session_returns_the_same_claim_and_no_new_attempt(desk: Desk) -> None:
    desk.make_ready(listed(1), listed(2))
    first = desk.claim(W1)
    desk.clock.advance(10)
    again = desk.claim(W1)
    assert (again.uuid, again.claim, again.attempts, again.claims) == (first.uuid, first.claim, 0, 1)
    assert again.lease_expires_at == desk.now + LEASE
    assert desk.job(2).state is READY
    assert desk.touch(again).state is LEASED


def test_claim_again_after_the_agent_acquired_takes_another_job(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2))
    desk.claim(W1)
    desk.learn(1, ACQUIRED)
    assert desk.claim(W1).uuid == uuid(2)


def test_claim_again_after_release_takes_another_job(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2))
    desk.release(desk.claim(W1))
    assert desk.claim(W1).uuid == uuid(2)


def test_claim_again_without_a_name_takes_another_job(desk: Desk) -> None:
    desk.make_ready(listed(1), listed(2))
    assert desk.claim(NOBODY).uuid != desk.claim(NOBODY).uuid
    assert desk.claims_nothing(NOBODY)
    assert (desk.job(1).worker, desk.store.workers()) == (None, [])


def test_claim_again_while_held_still_returns_the_same_claim(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2))
    desk.complete(desk.claim(W1))
    desk.clock.advance(scheduler.UNJUDGED_SECONDS)
    second = desk.claim(W1)
    desk.confirm(1)  # now the first job's end holds the worker
    assert desk.claim(W1).claim == second.claim


def test_claim_again_on_paused_queue_still_returns_the_same_claim(desk: Desk) -> None:
    first = desk.lease()
    desk.store.pause("default", True, desk.now)
    assert desk.claim(W1).claim == first.claim


# claim: the worker was started again


def test_claim_by_new_session_gives_the_old_session_s_job_back(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2))
    desk.claim(worker(session="old"))
    fresh = desk.claim(worker(session="new"))
    assert fresh.uuid == uuid(2)
    back = desk.job(1)
    assert (back.state, back.claim, back.attempts) == (RESERVING, None, 0)
    assert [row.name for row in desk.store.workers()] == ["w1"]


def test_claim_by_new_session_leaves_a_running_job_alone(desk: Desk) -> None:
    desk.make_ready(listed(1))
    desk.claim(worker(session="old"))
    desk.learn(1, ACQUIRED)
    assert desk.claims_nothing(worker(session="new"))
    assert desk.job().state is RUNNING


def test_claim_by_new_session_with_no_job_waiting_still_gives_back(desk: Desk) -> None:
    desk.lease(who=worker(session="old"))
    assert desk.claims_nothing(worker(session="new"))
    assert desk.job().state is RESERVING


def test_claim_by_new_session_leaves_other_workers_jobs_alone(desk: Desk) -> None:
    desk.lease(1, W2)
    desk.claims_nothing(worker(session="old"))
    desk.claims_nothing(worker(session="new"))
    assert (desk.job().state, desk.job().worker) == (LEASED, "w2")


CALLS: dict[str, Callable[[Desk, Job, Worker], object]] = {
    "claim": lambda desk, _, who: desk.store.claim(who, desk.now),
    "touch": lambda desk, job, who: desk.touch(job, who),
    "release": lambda desk, job, who: desk.release(job, who),
    "complete": lambda desk, job, who: desk.complete(job, 0, who=who),
}


@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_of_old_session_after_new_one_claimed_is_refused(desk: Desk, verb: str) -> None:
    old, new = worker(session="old"), worker(session="new")
    job = desk.lease(1, old)
    desk.learn(1, ACQUIRED)
    desk.claims_nothing(new)
    before = desk.job()
    with pytest.raises(WorkerNameTaken) as refused:
        CALLS[verb](desk, job, old)
    assert (refused.value.status, refused.value.code) == (409, "worker_name_taken")
    assert desk.job() == before


@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_of_old_session_while_new_one_is_heard_stays_refused(desk: Desk, verb: str) -> None:
    old, new = worker(session="old"), worker(session="new")
    job = desk.lease(1, old)
    desk.learn(1, ACQUIRED)
    for _ in range(4):
        desk.claims_nothing(new)
        desk.clock.advance(SILENCE - 2)
        with pytest.raises(WorkerNameTaken):
            CALLS[verb](desk, job, old)


@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_of_old_session_after_new_one_fell_silent_is_served(desk: Desk, verb: str) -> None:
    old, new = worker(session="old"), worker(session="new")
    job = desk.lease(1, old)
    desk.learn(1, ACQUIRED)
    desk.claims_nothing(new)
    desk.clock.advance(SILENCE)
    CALLS[verb](desk, job, old)
    desk.clock.advance(10)
    assert desk.touch(job, old).state is RUNNING


@pytest.mark.parametrize("verb", ["touch", "release", "complete"])
def test_every_verb_of_new_session_about_its_claim_keeps_the_old_one_out(desk: Desk, verb: str) -> None:
    old, new = worker(session="old"), worker(session="new")
    desk.claims_nothing(old)
    job = desk.lease(1, new)
    desk.learn(1, ACQUIRED)
    desk.clock.advance(SILENCE - 2)
    CALLS[verb](desk, job, new)
    desk.clock.advance(SILENCE - 2)
    with pytest.raises(WorkerNameTaken):
        desk.store.claim(old, desk.now)


def test_claim_by_old_session_after_new_one_fell_silent_takes_the_slot_back(desk: Desk) -> None:
    old, new = worker(session="old"), worker(session="new")
    desk.claims_nothing(old)
    job = desk.lease(1, new)
    desk.clock.advance(SILENCE)
    assert desk.claims_nothing(old)
    assert desk.job().state is RESERVING
    with pytest.raises(WorkerNameTaken):
        desk.touch(job, new)


def test_claim_by_old_session_of_one_slot_does_not_concern_another(desk: Desk) -> None:
    desk.claims_nothing(worker("w1", "old"))
    desk.claims_nothing(worker("w1", "new"))
    desk.make_ready(listed(1))
    assert desk.claim(worker("w2", "old")).uuid == uuid(1)


# claim: a worker whose agents end without acquiring


def test_claim_after_the_agent_did_not_acquire_is_held_for_two_seconds(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2))
    desk.complete(desk.claim(W1), 0)
    desk.confirm(1)
    with pytest.raises(WorkerHeld) as held:
        desk.store.claim(W1, desk.now)
    assert held.value.until == desk.now + 2
    desk.clock.advance(1.9)
    with pytest.raises(WorkerHeld):
        desk.store.claim(W1, desk.now)
    assert desk.claim(W2).uuid == uuid(1)
    desk.clock.advance(0.1)
    assert desk.claim(W1).uuid == uuid(2)


@pytest.mark.parametrize(("exit_status", "is_held"), [(0, False), (1, True), (-9, True), (27, False)])
def test_claim_before_buildkite_has_spoken_is_held_if_the_agent_failed(
    desk: Desk, exit_status: int, is_held: bool
) -> None:
    desk.complete(desk.lease(), exit_status)
    with pytest.raises(WorkerHeld) if is_held else contextlib.nullcontext():
        desk.store.claim(W1, desk.now)


@pytest.mark.parametrize(
    ("how", "is_held"),
    [("complete 1", True), ("complete 0", True), ("complete 27", False), ("release", False), ("release late", True)],
)
def test_claim_after_confirm_is_held_if_the_agent_had_its_chance(desk: Desk, how: str, is_held: bool) -> None:
    job = desk.lease()
    if how.startswith("complete"):
        desk.complete(job, int(how.split()[1]))
    else:
        desk.clock.advance(ACQUIRE if how == "release late" else ACQUIRE - 1)
        desk.release(job)
    desk.confirm(1)
    with pytest.raises(WorkerHeld) if is_held else contextlib.nullcontext():
        desk.store.claim(W1, desk.now)


def test_claim_after_expired_lease_is_not_held(desk: Desk) -> None:
    desk.touch(desk.lease())
    desk.clock.advance(LEASE)
    desk.expire()
    desk.confirm(1)
    assert desk.claim(W1).uuid == uuid(1)


def blame(desk: Desk, number: int, who: Worker = W1) -> float:
    """Let a worker's agent end without acquiring; for how many seconds it is held."""
    desk.make_ready(listed(number))
    desk.clock.advance(SILENCE)
    desk.complete(desk.claim(who), 1)
    desk.confirm(number)
    with pytest.raises(WorkerHeld) as held:
        desk.store.claim(who, desk.now)
    desk.learn(number, OVER, "canceled")
    return held.value.until - desk.now


def test_claim_after_each_failure_in_a_row_is_held_twice_as_long_up_to_five_minutes(desk: Desk) -> None:
    holds = [blame(desk, number) for number in range(1, 12)]
    assert holds == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert [row.failures for row in desk.store.workers()] == [11]


def test_claim_after_others_failed_is_not_held(desk: Desk) -> None:
    blame(desk, 1, W1)
    desk.make_ready(listed(2))
    assert desk.claim(W2).uuid == uuid(2)


@pytest.mark.parametrize(("finding", "word"), [(ACQUIRED, "running"), (OVER, "finished")])
def test_claim_after_a_job_was_acquired_is_held_for_two_seconds_again(desk: Desk, finding: Finding, word: str) -> None:
    assert [blame(desk, number) for number in (1, 2, 3)] == [2, 4, 8]
    desk.clock.advance(SILENCE)
    desk.lease(4)
    desk.learn(4, finding, word)
    assert [row.failures for row in desk.store.workers()] == [0]
    assert blame(desk, 5) == 2


@pytest.mark.parametrize(("finding", "word"), [(ACQUIRED, "running"), (OVER, "finished")])
def test_claim_after_agent_failed_but_buildkite_says_it_had_the_job_is_not_held(
    desk: Desk, finding: Finding, word: str
) -> None:
    desk.complete(desk.lease(), 1)
    desk.learn(1, finding, word)
    desk.make_ready(listed(2))
    assert desk.claim(W1).uuid == uuid(2)


def test_claim_after_one_failure_is_held_for_it_once(desk: Desk) -> None:
    desk.complete(desk.lease(), 1)
    desk.confirm(1)
    desk.learn(1, LAPSED)
    desk.clock.advance(2)
    desk.confirm(1)
    assert desk.claim(W1).uuid == uuid(1)


# --- touch, release, complete ---


def test_touch_of_leased_job_renews_the_lease(desk: Desk) -> None:
    job = desk.lease()
    desk.clock.advance(20)
    touched = desk.touch(job, W1)
    assert touched == desk.job()
    assert (touched.touched_at, touched.lease_expires_at) == (desk.now, desk.now + LEASE)
    desk.clock.advance(20)
    assert desk.expire() == []


def test_touch_of_a_running_job_notes_when_it_was(desk: Desk) -> None:
    job = desk.lease()
    desk.learn(1, ACQUIRED)
    desk.clock.advance(20)
    before = desk.job()
    assert desk.touch(job) == dataclasses.replace(before, touched_at=desk.now) == desk.job()


def test_touch_of_a_job_that_is_over_returns_it_unchanged(desk: Desk) -> None:
    job = desk.lease()
    desk.learn(1, OVER)
    before = desk.job()
    assert desk.touch(job) == before == desk.job()


def test_release_of_leased_job_gives_it_back_with_the_reason(desk: Desk) -> None:
    job = desk.lease()
    back = desk.release(job, W1, "the disk is full")
    assert back == desk.job()
    assert (back.state, back.claim, back.lease_expires_at, back.attempts) == (RESERVING, None, None, 0)
    assert "the disk is full" in back.reason
    assert [(ended["worker"], ended["how"], ended["reason"]) for ended in back.tries] == [
        ("w1", "release", "the disk is full")
    ]


def test_release_of_running_job_leaves_it_running(desk: Desk) -> None:
    job = desk.lease()
    desk.learn(1, ACQUIRED)
    assert desk.release(job).state is RUNNING
    assert desk.job().state is RUNNING


def test_complete_of_leased_job_gives_it_back_for_buildkite_to_say(desk: Desk) -> None:
    job = desk.lease()
    back = desk.complete(job, 3, "no route to host", W1)
    assert back == desk.job()
    assert (back.state, back.claim, back.exit_status, back.attempts) == (RESERVING, None, 3, 1)
    assert "no route to host" in back.reason and "3" in back.reason


@pytest.mark.parametrize(("finding", "state"), [(ACQUIRED, RUNNING), (OVER, DONE)])
def test_complete_of_job_that_moved_on_notes_the_exit_status_alone(
    desk: Desk, finding: Finding, state: JobState
) -> None:
    job = desk.lease()
    desk.learn(1, finding)
    after = desk.complete(job, 3)
    assert (after.state, after.exit_status, after.attempts, after.tries) == (state, 3, 0, ())


def test_complete_repeated_returns_the_same_and_counts_once(desk: Desk) -> None:
    job = desk.lease()
    first = desk.complete(job, 1, who=W1)
    assert desk.complete(job, 1, who=W1) == first == desk.job()
    assert first.attempts == 1


def test_complete_repeated_after_the_next_claim_leaves_that_one_alone(desk: Desk) -> None:
    job = desk.lease()
    desk.complete(job, 0)
    desk.confirm(1)
    held = desk.claim(W2)
    assert desk.complete(job, 0) == held == desk.job()


def test_complete_repeated_of_running_job_returns_it(desk: Desk) -> None:
    job = desk.lease()
    desk.learn(1, ACQUIRED)
    first = desk.complete(job, 0)
    assert desk.complete(job, 0) == first == desk.job()


@pytest.mark.parametrize("finding", [None, ACQUIRED])
def test_complete_without_claim_by_the_holder_is_accepted(desk: Desk, finding: Finding | None) -> None:
    desk.lease()
    if finding:
        desk.learn(1, finding)
    after = desk.store.complete(Holder(uuid(1), None, W1), AgentEnd(0), desk.now)
    assert (after.state, after.exit_status) == (RUNNING if finding else RESERVING, 0)


@pytest.mark.parametrize("who", [W2, NOBODY, None])
def test_complete_without_claim_by_others_is_refused(desk: Desk, who: Worker | None) -> None:
    before = desk.lease()
    with pytest.raises(StaleClaim):
        desk.store.complete(Holder(uuid(1), None, who), AgentEnd(0), desk.now)
    assert desk.job() == before


def test_complete_without_claim_of_nobody_s_job_is_refused(desk: Desk) -> None:
    before = desk.lease(1, NOBODY)
    for who in (NOBODY, W1, None):
        with pytest.raises(StaleClaim):
            desk.store.complete(Holder(uuid(1), None, who), AgentEnd(0), desk.now)
    assert desk.job() == before


@pytest.mark.parametrize("verb", ["touch", "release", "complete"])
def test_every_verb_of_job_that_is_not_known_is_refused(desk: Desk, verb: str) -> None:
    job = dataclasses.replace(listed(9), claim="c1")
    with pytest.raises(UnknownJob) as refused:
        CALLS[verb](desk, job, W1)
    assert (refused.value.status, refused.value.code) == (404, "unknown_job")


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("verb", ["touch", "release", "complete"])
def test_every_verb_with_a_made_up_claim_changes_nothing(desk: Desk, verb: str, state: JobState) -> None:
    before = desk.bring(state)
    with pytest.raises(StaleClaim) as refused:
        CALLS[verb](desk, dataclasses.replace(before, claim="made up"), W1)
    assert (refused.value.status, refused.value.code) == (409, "stale_claim")
    assert desk.job() == before


@pytest.mark.parametrize("verb", ["touch", "release", "complete"])
def test_every_verb_with_an_empty_claim_changes_nothing(desk: Desk, verb: str) -> None:
    before = desk.lease()
    for who in (W1, None):
        with pytest.raises(StaleClaim):
            CALLS[verb](desk, dataclasses.replace(before, claim=""), who or NOBODY)
    assert desk.job() == before


@pytest.mark.parametrize("ending", ["release", "expire", "listed again after done"])
@pytest.mark.parametrize("verb", ["touch", "release", "complete"])
def test_every_verb_with_the_claim_before_changes_nothing(desk: Desk, verb: str, ending: str) -> None:
    old = desk.lease()
    if ending == "release":
        desk.release(old)
    elif ending == "expire":
        desk.clock.advance(LEASE)
        desk.expire()
    else:
        desk.learn(1, GONE)
        desk.put(listed(1))
    with pytest.raises(StaleClaim):
        CALLS[verb](desk, old, W1)
    desk.confirm(1)
    before = desk.claim(W2)
    with pytest.raises(StaleClaim):
        CALLS[verb](desk, old, W1)
    assert desk.job() == before


@pytest.mark.parametrize("verb", ["touch", "release"])
def test_every_verb_after_complete_but_complete_changes_nothing(desk: Desk, verb: str) -> None:
    job = desk.lease()
    before = desk.complete(job, 0)
    with pytest.raises(StaleClaim):
        CALLS[verb](desk, job, W1)
    assert desk.job() == before


# --- expire ---


def test_expire_of_lease_that_ran_out_gives_the_job_back(desk: Desk) -> None:
    desk.lease(1, W1)
    desk.clock.advance(LEASE - 1)
    desk.lease(2, W2)
    assert desk.expire() == []
    desk.clock.advance(1)
    assert [(job.uuid, job.state) for job in desk.expire()] == [(uuid(1), RESERVING)]
    assert desk.job(1).claim is None
    assert desk.job(2).state is LEASED
    assert desk.expire() == []


def test_claim_by_new_session_tells_that_the_old_one_expired(desk: Desk) -> None:
    moves: list[Move] = []
    desk.lease(1, W1)
    desk.clock.advance(1)
    desk.store.on_move = lambda move, now: moves.append(move)
    desk.claims_nothing(worker(session="s2"))
    (move,) = moves
    assert (move.verb, move.code, move.job) == ("expire", "excused", desk.job())
    assert (move.job.state, move.job.reason) == (RESERVING, "expire: its worker was restarted")
    assert (move.job.tries[-1]["worker"], move.job.tries[-1]["ended_at"]) == ("w1", desk.now)
    assert desk.expire() == []


def test_claim_again_for_too_long_tells_that_the_claim_expired(desk: Desk) -> None:
    moves: list[Move] = []
    desk.lease(1, W1)
    desk.clock.advance(ACQUIRE + 1)
    desk.store.on_move = lambda move, now: moves.append(move)
    assert desk.claims_nothing(W1)
    assert [(move.verb, move.job.reason) for move in moves] == [("expire", "expire: its worker never got the answer")]
    assert desk.expire() == []


def test_expire_of_running_job_leaves_it_running(desk: Desk) -> None:
    desk.bring(RUNNING)
    desk.lease(2)
    desk.learn(2, ACQUIRED)
    desk.clock.advance(1e6)
    assert desk.expire() == []
    assert (desk.job(1).state, desk.job(2).state) == (RUNNING, RUNNING)


def test_expire_of_reservation_that_ran_out_hands_nothing_out_until_confirmed(desk: Desk) -> None:
    desk.make_ready(listed(1, age=9), listed(2, age=9))
    desk.clock.advance(RESERVATION - 1)
    desk.make_ready(listed(3))
    assert desk.expire() == []
    assert desk.job(1).state is READY
    desk.clock.advance(1)
    assert desk.expire() == []
    assert [desk.job(number).state for number in (1, 2, 3)] == [RESERVING, RESERVING, READY]
    assert desk.claim(W1).uuid == uuid(3)
    assert desk.store.unconfirmed("default", 0, 10) == [uuid(1), uuid(2)]
    desk.confirm(1, 2)
    assert desk.claim(W2).uuid == uuid(1)


def test_expire_of_reservation_that_ran_out_leaves_the_holder_its_job(desk: Desk) -> None:
    job = desk.lease()
    for _ in range(int(RESERVATION / LEASE) + 1):
        desk.clock.advance(LEASE - 1)
        desk.touch(job)
    desk.expire()
    assert desk.touch(job).state is LEASED


@pytest.mark.parametrize("step", [1e6, -1e6])
def test_expire_after_a_clock_step_leaves_it_ready_until_buildkite_has_had_time_to_answer(
    desk: Desk, step: float
) -> None:
    desk.make_ready(listed(1))
    desk.clock.advance(step)
    desk.store.restart_leases(desk.now, confirm=False)
    desk.clock.advance(29)
    desk.expire()
    assert desk.job().state is READY
    desk.clock.advance(1)
    desk.expire()
    assert desk.job().state is RESERVING


def test_claim_again_for_longer_than_an_agent_may_take_frees_the_job(desk: Desk) -> None:
    first = desk.lease(1)
    for _ in range(int(ACQUIRE / 20)):
        desk.clock.advance(20)
        again = desk.claim(W1)
        assert (again.claim, again.claims) == (first.claim, 1)
    desk.clock.advance(20)
    assert desk.claims_nothing(W1)
    assert (desk.job().state, desk.job().attempts) == (RESERVING, 0)


def test_learn_that_an_agent_had_it_after_all_acquits_the_claim_that_ended(desk: Desk) -> None:
    job = desk.lease(1)
    desk.complete(job, 1)
    assert desk.job().attempts == 1
    desk.learn(1, ACQUIRED, "assigned")
    desk.put(listed(1))
    desk.confirm(1)
    assert desk.job().attempts == 0
    assert [row.failures for row in desk.store.workers()] == [0]


@pytest.mark.parametrize(("word", "outcome"), [("finished", Outcome.FAILED), ("canceled", Outcome.DROPPED)])
def test_learn_of_job_with_intent_that_is_over_tells_our_finish_from_a_persons(
    desk: Desk, word: str, outcome: Outcome
) -> None:
    failed_job(desk)
    desk.learn(1, OVER, word)
    assert desk.job().outcome is outcome


def test_confirm_asked_before_a_reservation_ran_out_does_not_make_the_job_ready(desk: Desk) -> None:
    desk.make_ready(listed(1))
    asked = desk.store.sequence()
    desk.clock.advance(RESERVATION)
    desk.expire()
    assert desk.store.confirm([uuid(1)], asked, desk.now + 1, desk.now) == []
    assert desk.job().state is RESERVING


def test_expire_then_confirm_gives_the_job_to_another_worker(desk: Desk) -> None:
    old = desk.lease(1, W1)
    desk.clock.advance(LEASE)
    desk.expire()
    assert desk.claims_nothing(W2)
    desk.confirm(1)
    job = desk.claim(W2)
    assert (job.uuid, job.claims) == (old.uuid, 2)
    assert job.claim != old.claim


# --- Failed too often ---


def test_confirm_after_max_attempts_by_two_workers_writes_an_intent(desk: Desk) -> None:
    desk.make_ready(listed(1))
    for who in (W1, W1, W2):
        desk.fail(who)
        assert desk.store.intents("default") == []
        changed = desk.confirm(1)
    assert [(job.uuid, job.state) for job in changed] == [(uuid(1), RESERVING)]
    assert [job.uuid for job in desk.store.intents("default")] == [uuid(1)]
    assert desk.store.intents("linux") == []


def failed_job(desk: Desk) -> Job:
    """A job with an intent to finish it."""
    desk.make_ready(listed(1))
    for who, exit_status in ((W1, 1), (W2, 94), (W1, 255)):
        desk.fail(who, exit_status)
        desk.confirm(1)
    assert desk.job().finish_detail
    return desk.job()


def test_confirm_of_job_that_failed_too_often_tells_who_tried_and_what_was_said(desk: Desk) -> None:
    detail = failed_job(desk).finish_detail or ""
    for text in ("3 attempts", "worker w1", "worker w2", "agent exited 1", "agent exited 94", "cannot connect"):
        assert text in detail


def test_confirm_of_job_with_intent_never_hands_it_out(desk: Desk) -> None:
    before = failed_job(desk)
    desk.clock.advance(SILENCE)
    for _ in range(2):
        assert desk.confirm(1) == []
        assert desk.put(listed(1)) == []
        assert desk.claims_nothing(W1)
        assert desk.claims_nothing(worker("w3"))
    assert desk.job() == before
    assert desk.store.unconfirmed("default", math.inf, 10) == []
    assert desk.store.unfinished("default") == [uuid(1)]


def test_confirm_of_job_with_intent_holds_the_worker_as_well(desk: Desk) -> None:
    failed_job(desk)
    with pytest.raises(WorkerHeld):
        desk.store.claim(W1, desk.now)


def test_confirm_after_max_attempts_by_one_worker_waits_for_a_quarter_of_an_hour(desk: Desk) -> None:
    desk.make_ready(listed(1))
    started = desk.now + SILENCE
    for _ in range(MAX_ATTEMPTS):
        desk.fail(W1)
        desk.confirm(1)
    assert desk.now - started < QUARTER
    assert (desk.job().state, desk.job().attempts) == (READY, MAX_ATTEMPTS)
    desk.fail(W1)
    desk.confirm(1)
    assert desk.now - started > QUARTER
    assert desk.job().finish_detail


def test_confirm_after_max_attempts_by_nobody_waits_for_a_quarter_of_an_hour(desk: Desk) -> None:
    desk.make_ready(listed(1))
    for _ in range(MAX_ATTEMPTS):
        desk.fail(NOBODY)
        desk.confirm(1)
    assert desk.job().state is READY
    desk.fail(NOBODY)
    desk.confirm(1)
    assert desk.job().finish_detail


def end_uncounted(desk: Desk, how: str, who: Worker) -> None:
    """One claim that ends without an agent, in a way that is not the job's fault."""
    desk.clock.advance(SILENCE)
    job = desk.claim(who)
    holder = Holder(job.uuid, job.claim)
    if how == "agent exited 27":
        desk.complete(job, 27)
    elif how == "lost answer":
        desk.clock.advance(LEASE)
        desk.expire()
    elif how == "released at once":
        desk.release(job)
    elif how == "worker restarted":
        desk.store.claim(dataclasses.replace(who, session=f"s{desk.now}"), desk.now)
    elif how == "complete while Buildkite is silent":
        desk.store.complete(holder, AgentEnd(1), desk.now)
    elif how == "release while Buildkite is silent":
        desk.clock.advance(ACQUIRE)
        desk.store.release(holder, "the agent hung", desk.now)
    elif how == "expire while Buildkite is silent":
        desk.touch(job)
        desk.clock.advance(LEASE)
        desk.store.expire(["default"], desk.now)
    elif how == "expire while Buildkite answers for another queue":
        desk.touch(job)
        desk.clock.advance(LEASE)
        desk.answer("linux")
        desk.store.expire(["default", "linux"], desk.now)


@pytest.mark.parametrize(
    "how",
    [
        "agent exited 27",
        "lost answer",
        "released at once",
        "worker restarted",
        "complete while Buildkite is silent",
        "release while Buildkite is silent",
        "expire while Buildkite is silent",
        "expire while Buildkite answers for another queue",
    ],
)
def test_confirm_after_ends_that_do_not_count_hands_it_out_forever(desk: Desk, how: str) -> None:
    desk.make_ready(listed(1))
    for number in range(3 * MAX_ATTEMPTS):
        end_uncounted(desk, how, worker(f"w{number % 3}", f"s{number}"))
        assert desk.job().state is RESERVING
        desk.confirm(1)
        assert (desk.job().state, desk.job().attempts) == (READY, 0)
    assert desk.job().claims == 3 * MAX_ATTEMPTS


def test_confirm_after_max_attempts_by_one_worker_takes_no_other_that_did_not_count(desk: Desk) -> None:
    desk.make_ready(listed(1))
    end_uncounted(desk, "agent exited 27", W2)
    desk.confirm(1)
    for _ in range(MAX_ATTEMPTS):
        desk.fail(W1)
        desk.confirm(1)
    assert (desk.job().state, desk.job().attempts) == (READY, MAX_ATTEMPTS)


def test_expire_of_lost_answer_after_a_claim_that_was_touched_counts_nothing(desk: Desk) -> None:
    desk.touch(desk.lease())
    desk.clock.advance(LEASE)
    desk.expire()
    assert desk.job().attempts == 1
    desk.confirm(1)
    desk.claim(W2)
    desk.clock.advance(LEASE)
    desk.expire()
    assert desk.job().attempts == 1


@pytest.mark.parametrize("how", ["complete 0", "complete 1", "release late", "expire touched"])
def test_confirm_after_ends_that_count_writes_an_intent(desk: Desk, how: str) -> None:
    desk.make_ready(listed(1))
    for who in (W1, W2, W1):
        desk.clock.advance(SILENCE)
        job = desk.claim(who)
        if how.startswith("complete"):
            desk.complete(job, int(how.split()[1]))
        elif how == "release late":
            desk.clock.advance(ACQUIRE)
            desk.release(job)
        else:
            desk.touch(job)
            desk.clock.advance(LEASE)
            desk.expire()
        desk.confirm(1)
    assert desk.job().attempts == MAX_ATTEMPTS
    assert desk.job().finish_detail


def test_finish_of_job_with_intent_makes_it_failed(desk: Desk) -> None:
    detail = failed_job(desk).finish_detail
    desk.clock.advance(1)
    assert [job.uuid for job in desk.store.finish(uuid(1), desk.now)] == [uuid(1)]
    job = desk.job()
    assert (job.state, job.outcome, job.done_at, job.finish_detail) == (DONE, Outcome.FAILED, desk.now, detail)
    assert desk.store.intents("default") == []
    assert desk.store.finish(uuid(1), desk.now) == []


@pytest.mark.parametrize("state", JobState)
def test_finish_of_job_without_intent_does_nothing(desk: Desk, state: JobState) -> None:
    before = desk.bring(state)
    assert desk.store.finish(uuid(1), desk.now) == []
    assert desk.job() == before
    assert desk.store.finish(uuid(2), desk.now) == []


def test_learn_that_job_with_intent_is_over_makes_it_failed(desk: Desk) -> None:
    failed_job(desk)
    desk.learn(1, OVER, "finished")
    assert (desk.job().state, desk.job().outcome) == (DONE, Outcome.FAILED)
    assert desk.store.intents("default") == []


def test_learn_that_an_agent_has_the_job_takes_the_intent_back(desk: Desk) -> None:
    failed_job(desk)
    desk.learn(1, ACQUIRED, "running")
    assert (desk.job().state, desk.job().finish_detail) == (RUNNING, None)
    assert desk.store.intents("default") == []
    assert desk.store.finish(uuid(1), desk.now) == []
    desk.learn(1, OVER, "finished")
    assert desk.job().outcome is Outcome.RAN


def test_put_of_finished_job_starts_its_attempts_anew(desk: Desk) -> None:
    failed_job(desk)
    desk.store.finish(uuid(1), desk.now)
    assert len(desk.put(listed(1))) == 1
    assert (desk.job().attempts, desk.job().finish_detail) == (0, None)
    desk.confirm(1)
    desk.clock.advance(SILENCE)
    assert desk.claim(W1).uuid == uuid(1)


# --- pause ---


def test_pause_of_queue_stops_its_claims_until_it_ends(desk: Desk) -> None:
    desk.make_ready(listed(1), listed(2, queue="linux"))
    assert desk.store.pause("default", True, desk.now) is True
    assert desk.claims_nothing(W1)
    assert desk.claim(worker("w2", query="queue=linux")).uuid == uuid(2)
    assert desk.store.stats()["paused"] == ["default"]
    assert desk.store.pause("default", False, desk.now) is True
    assert desk.store.stats()["paused"] == []
    assert desk.claim(W1).uuid == uuid(1)


@pytest.mark.parametrize("paused", [True, False])
def test_pause_said_again_is_no_news(desk: Desk, paused: bool) -> None:
    desk.store.pause("default", True, desk.now)
    desk.store.pause("default", paused, desk.now)
    assert desk.store.pause("default", paused, desk.now) is False


def test_pause_holds_for_what_becomes_ready_later(desk: Desk) -> None:
    desk.store.pause("default", True, desk.now)
    desk.make_ready(listed(1))
    assert desk.claims_nothing(W1)


def test_pause_leaves_a_claim_alone(desk: Desk) -> None:
    job = desk.lease()
    desk.store.pause("default", True, desk.now)
    assert desk.touch(job).state is LEASED
    desk.learn(1, ACQUIRED)
    assert desk.complete(job, 0).state is RUNNING


def test_pause_before_and_after_reopen_stays_the_same(open_store: Callable[..., Store], clock: Clock) -> None:
    desk = Desk(open_store(), clock)
    desk.make_ready(listed(1))
    desk.store.pause("default", True, desk.now)
    desk.store.pause("linux", True, desk.now)
    desk.store.pause("linux", False, desk.now)
    desk = Desk(open_store(), clock)
    assert desk.store.stats()["paused"] == ["default"]
    assert desk.claims_nothing(W1)
    assert desk.store.pause("default", True, desk.now) is False
    desk.store.pause("default", False, desk.now)
    assert desk.claim(W1).uuid == uuid(1)


# --- restart_leases ---


def test_restart_leases_gives_leases_their_full_time_and_makes_reservations_due(desk: Desk) -> None:
    desk.lease(1)
    desk.make_ready(listed(2))
    desk.clock.advance(1e6)
    desk.store.restart_leases(desk.now, confirm=False)
    assert desk.expire() == []
    assert (desk.job(1).state, desk.job(1).lease_expires_at) == (LEASED, desk.now + LEASE)
    assert desk.job(2).state is READY
    assert sorted(desk.store.unconfirmed("default", desk.now + RESERVATION / 2, 10)) == [uuid(1), uuid(2)]
    desk.clock.advance(LEASE)
    assert len(desk.expire()) == 1


def test_restart_leases_with_confirm_hands_out_nothing_until_confirmed(desk: Desk) -> None:
    desk.make_ready(listed(1, age=1), listed(2, priority=1))
    asked = desk.store.sequence()
    desk.store.restart_leases(desk.now, confirm=True)
    assert desk.claims_nothing(W1)
    assert desk.store.unconfirmed("default", 0, 10) == [uuid(2), uuid(1)]
    assert desk.store.confirm([uuid(2)], asked, desk.now + RESERVATION, desk.now) == []
    desk.confirm(1, 2)
    assert desk.claim(W1).uuid == uuid(2)


@pytest.mark.parametrize("state", [RESERVING, LEASED, RUNNING, DONE])
def test_restart_leases_with_confirm_leaves_other_states_alone(desk: Desk, state: JobState) -> None:
    before = desk.bring(state)
    desk.store.restart_leases(desk.now, confirm=True)
    assert (desk.job().state, desk.job().claim) == (state, before.claim)


def test_restart_leases_after_the_clock_went_back_holds_nobody_for_longer_than_five_minutes(desk: Desk) -> None:
    blame(desk, 1)
    desk.make_ready(listed(2))
    desk.clock.advance(-1e6)
    desk.store.restart_leases(desk.now, confirm=False)
    desk.clock.advance(300)
    assert desk.claim(W1).uuid == uuid(2)


def test_restart_leases_after_the_clock_went_back_keeps_an_old_session_out_for_five_minutes(desk: Desk) -> None:
    old, new = worker(session="old"), worker(session="new")
    desk.claims_nothing(old)
    desk.claims_nothing(new)
    desk.clock.advance(-1e6)
    desk.store.restart_leases(desk.now, confirm=False)
    with pytest.raises(WorkerNameTaken):
        desk.store.claim(old, desk.now)
    desk.clock.advance(SILENCE)
    assert desk.claims_nothing(old)


# --- prune and the reads ---


def test_prune_forgets_only_what_was_done_before(desk: Desk) -> None:
    later = desk.bring(LEASED, 6)
    numbers = desk.bring_one_of_each()
    desk.clock.advance(10)
    desk.learn(6, OVER)
    assert desk.store.prune(desk.now) == 1
    assert [number for number in range(1, 7) if not desk.store.get(uuid(number))] == [numbers[DONE]]
    desk.clock.advance(1)
    assert desk.store.prune(desk.now) == 1
    assert desk.store.prune(desk.now) == 0
    with pytest.raises(UnknownJob):
        desk.touch(later)
    assert desk.claim(worker("w9")).uuid == uuid(numbers[READY])


def test_prune_between_claims_loses_no_job(desk: Desk) -> None:
    desk.make_ready(listed(1, rules=["a=1"]), listed(2, rules=["a=1"]))
    who = [worker(f"w{number}", query="a=1") for number in range(3)]
    desk.complete(desk.claim(who[0]), 0)
    desk.claim(who[1])
    desk.store.prune(desk.now)  # nothing of this rule set is ready now
    desk.confirm(1)
    assert desk.claim(who[2]).uuid == uuid(1)


def test_unconfirmed_is_reserving_in_order_then_what_is_due_soonest_first(desk: Desk) -> None:
    desk.make_ready(listed(1))
    desk.clock.advance(10)
    desk.make_ready(listed(2, priority=9))
    desk.claim(W1)  # the second
    desk.clock.advance(10)
    desk.make_ready(listed(3))
    desk.put(listed(4), listed(5, age=5), listed(6, priority=1), listed(7, queue="linux"))
    reserving, due_before = [uuid(6), uuid(5), uuid(4)], desk.now + RESERVATION
    assert desk.store.unconfirmed("default", 0, 10) == reserving
    assert desk.store.unconfirmed("default", due_before, 10) == [*reserving, uuid(1), uuid(2)]
    assert desk.store.unconfirmed("default", due_before - 15, 10) == [*reserving, uuid(1)]
    assert desk.store.unconfirmed("default", due_before, 4) == [*reserving, uuid(1)]
    assert desk.store.unconfirmed("default", due_before, 2) == reserving[:2]
    assert desk.store.unconfirmed("linux", due_before, 10) == [uuid(7)]


@pytest.mark.parametrize("state", [RUNNING, DONE])
def test_unconfirmed_of_job_that_waits_for_nothing_is_empty(desk: Desk, state: JobState) -> None:
    desk.bring(state)
    assert desk.store.unconfirmed("default", math.inf, 10) == []


def test_unconfirmed_of_paused_queue_is_only_what_was_reserved_before(desk: Desk) -> None:
    desk.release(desk.lease(1))
    desk.make_ready(listed(2))
    desk.put(listed(3))
    desk.store.pause("default", True, desk.now)
    assert desk.store.unconfirmed("default", math.inf, 10) == [uuid(1), uuid(2)]
    desk.store.pause("default", False, desk.now)
    assert desk.store.unconfirmed("default", math.inf, 10) == [uuid(1), uuid(3), uuid(2)]


def test_unfinished_is_everything_of_the_queue_that_is_not_done(desk: Desk) -> None:
    numbers = desk.bring_one_of_each()
    desk.put(listed(6, queue="linux"))
    left = [uuid(number) for state, number in numbers.items() if state is not DONE]
    assert sorted(desk.store.unfinished("default")) == left
    assert desk.store.unfinished("linux") == [uuid(6)]


def test_held_is_what_is_leased_or_running_of_the_queue(desk: Desk) -> None:
    numbers = desk.bring_one_of_each()
    assert sorted(desk.store.leased_or_running("default")) == sorted(
        uuid(numbers[state]) for state in (LEASED, RUNNING)
    )
    assert desk.store.leased_or_running("linux") == []


def test_get_of_unknown_job_is_none(desk: Desk) -> None:
    assert desk.store.get(uuid(1)) is None


def test_stats_of_empty_store_names_every_state_and_outcome(desk: Desk) -> None:
    stats = desk.store.stats()
    assert stats["states"] == dict.fromkeys(JobState, 0)
    assert stats["outcomes"] == dict.fromkeys(Outcome, 0)
    assert (stats["waiting"], stats["paused"], stats["at_work"]) == ({}, [], [])


def test_stats_counts_each_state_and_what_waits_by_rule_set(desk: Desk) -> None:
    numbers = desk.bring_one_of_each()
    desk.put(listed(6, rules=["b", "a=1"]), listed(7, rules=["a=1", "b=*"]))
    stats = desk.store.stats()
    assert stats["states"] == {RESERVING: 3, READY: 1, LEASED: 1, RUNNING: 1, DONE: 1}
    assert stats["outcomes"] == dict.fromkeys(Outcome, 0) | {Outcome.DROPPED: 1}
    assert stats["waiting"] == {"queue=default": 2, "queue=default,a=1,b=*": 2}
    assert sorted(job.uuid for job in stats["at_work"]) == [uuid(numbers[LEASED]), uuid(numbers[RUNNING])]


def test_workers_tells_of_every_worker_that_claimed(desk: Desk) -> None:
    desk.claims_nothing(worker("w2", query="queue=default,arch=amd64"))
    desk.lease()
    found = [(row.name, row.tags, row.claims, row.last_claim_at) for row in desk.store.workers()]
    assert found == [("w1", "", 1, desk.now), ("w2", "arch=amd64", 0, None)]
    assert {(row.failures, row.held_until, row.ran) for row in desk.store.workers()} == {(0, 0.0, 0)}


# --- A verb and a field that the store has never heard of ---


@dataclasses.dataclass(frozen=True, slots=True)
class PaintedJob(Job):
    """A job as a newer scheduler might know it."""

    colour: str | None = None
    coats: int = 0
    painters: tuple[str, ...] = ()


def paint(job: PaintedJob, colour: str, who: str) -> Move:
    painters = (*job.painters, who)
    return scheduler.make_move("paint", job, colour, colour=colour, coats=job.coats + 1, painters=painters)


OPEN_WITH: dict[str, Callable[[Settings, type[Job]], Store]] = {
    "sqlite": open_sqlite,
    "redis": lambda settings, job_type: lead(settings, the_redis().address, job_type=job_type),
}


def painted(store: Store, number: int = 1) -> PaintedJob:
    job = store.get(uuid(number))
    assert isinstance(job, PaintedJob)
    return job


@pytest.mark.parametrize("name", [each for each in OPEN_WITH if each in STORE_NAMES])
def test_made_up_verb_with_made_up_fields_needs_a_move_alone(
    name: str, settings: Callable[..., Settings], clock: Clock
) -> None:
    def step(_: str, job: Job | None, __: scheduler.MoveContext) -> Move | None:
        assert isinstance(job, PaintedJob)
        return paint(job, "red", "ann")

    with contextlib.closing(OPEN_WITH[name](settings(), PaintedJob)) as store:
        raw = {"id": uuid(1)}
        store.put([PaintedJob.from_api("default", raw, clock.now())], store.sequence(), clock.now())
        asked = store.sequence()
        for _ in range(2):
            (move,) = store.rows.apply([uuid(1)], step, clock.now(), scheduler.LEADER)
        assert (move.verb, move.code, move.job) == ("paint", "red", painted(store))
        assert (painted(store).colour, painted(store).coats, painted(store).painters) == ("red", 2, ("ann", "ann"))
        assert painted(store).version > asked
    # A scheduler that does not know these fields changes the row in its own ways: they survive.
    with contextlib.closing(OPEN_WITH[name](settings(), Job)) as older:
        desk = Desk(older, clock)
        desk.confirm(1)
        desk.touch(desk.claim(W1))
        desk.release(desk.job())
        desk.learn(1, GONE, "limited")
        desk.put(listed(1))
        assert type(desk.job()) is Job
    with contextlib.closing(OPEN_WITH[name](settings(), PaintedJob)) as store:
        assert (painted(store).state, painted(store).claims) == (RESERVING, 1)
        assert (painted(store).colour, painted(store).coats, painted(store).painters) == ("red", 2, ("ann", "ann"))


def hold(store: Store, reason: str | None, now: float) -> None:
    """A verb that is not there yet: hold a job that waits, or lift that."""
    by = "operator" if reason else None
    store.rows.apply(
        [uuid(1)],
        lambda _, job, __: scheduler.make_move("hold", job, held_by=by, held_reason=reason) if job else None,
        now,
        scheduler.LEADER,
    )


def test_claim_of_a_job_that_is_held_takes_the_next_until_it_is_lifted(desk: Desk) -> None:
    desk.make_ready(listed(1, age=9), listed(2))
    hold(desk.store, "out of paint", desk.now)
    assert desk.claim(W1).uuid == uuid(2)
    assert desk.claims_nothing(W2)
    stats = desk.store.stats()
    assert (stats["states"][READY], stats["waiting"]) == (1, {"queue=default": 1})
    assert desk.store.unconfirmed("default", math.inf, 10) == [uuid(1), uuid(2)]  # it stays reserved and renewed
    hold(desk.store, None, desk.now)
    assert desk.claim(W2).uuid == uuid(1)


def test_claim_decided_with_an_older_table_of_holds_takes_nothing(desk: Desk) -> None:
    desk.make_ready(listed(1))
    desk.claims_nothing(worker("w9", query="queue=other"))  # so that its row is known
    row = desk.store.rows.worker_of(worker("w9", query="queue=other"))
    table = desk.store.rows.known_holds()
    desk.store.pause("linux", True, desk.now)
    lease = scheduler.leased(W1, "c1", LEASE, desk.now)
    taken = desk.store.rows.take(["queue=default"], lease, row, table.version, desk.now)
    assert (taken.job, taken.is_stale, desk.job().state) == (None, True, READY)


# --- Reopen ---


def workers_of(desk: Desk) -> list[WorkerRow]:
    """Without when each was heard of, which one scheduler keeps for itself."""
    return [dataclasses.replace(row, heard_at=0.0) for row in desk.store.workers()]


def test_reopen_of_store_finds_every_job_and_worker_as_it_was(open_store: Callable[..., Store], clock: Clock) -> None:
    desk = Desk(open_store(MAX_ATTEMPTS=MAX_ATTEMPTS), clock)
    failed_job(desk)
    numbers = desk.bring_one_of_each(first=2)
    jobs, rows, stats = [desk.job(number) for number in range(1, 7)], workers_of(desk), desk.store.stats()
    desk = Desk(open_store(MAX_ATTEMPTS=MAX_ATTEMPTS), clock)
    assert [desk.job(number) for number in range(1, 7)] == jobs
    assert workers_of(desk) == rows
    assert desk.store.stats() == stats
    assert [job.uuid for job in desk.store.intents("default")] == [uuid(1)]
    assert desk.claim(worker("w9")).uuid == uuid(numbers[READY])


def test_reopen_between_claim_and_touch_keeps_the_claim(open_store: Callable[..., Store], clock: Clock) -> None:
    job = Desk(open_store(), clock).lease()
    desk = Desk(open_store(), clock)
    assert desk.claim(W1).claim == job.claim
    assert desk.touch(job, W1).state is LEASED
    assert desk.complete(job, 0, who=W1).state is RESERVING


def test_reopen_between_two_completes_keeps_the_answer(open_store: Callable[..., Store], clock: Clock) -> None:
    desk = Desk(open_store(), clock)
    job = desk.lease()
    first = desk.complete(job, 0)
    assert Desk(open_store(), clock).complete(job, 0) == first


def test_reopen_after_two_sessions_still_refuses_the_old_one(open_store: Callable[..., Store], clock: Clock) -> None:
    desk = Desk(open_store(), clock)
    desk.claims_nothing(worker(session="old"))
    desk.claims_nothing(worker(session="new"))
    desk = Desk(open_store(), clock)
    with pytest.raises(WorkerNameTaken):
        desk.store.claim(worker(session="old"), clock.now())
    assert desk.claims_nothing(worker(session="new"))


def test_reopen_numbers_changes_on_from_where_it_was(open_store: Callable[..., Store], clock: Clock) -> None:
    desk = Desk(open_store(), clock)
    desk.bring(READY)
    desk = Desk(open_store(), clock)
    assert desk.store.sequence() >= desk.job().version
    assert [job.state for job in desk.learn(1, LAPSED)] == [RESERVING]


# --- Verbs in any order, against a model ---

#: What jobs there are: by queue and rules; and which of them each worker may have, by its query.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("default", ()),
    "arm": ("default", ("arch=arm64",)),
    "any arch": ("default", ("queue=default", "arch=*")),
    "linux": ("linux", ("arch=arm64",)),
}
SERVES: dict[str, set[str]] = {
    "queue=default": {"plain"},
    "arch=arm64": {"plain", "arm", "any arch"},
    "queue=default,arch=amd64,gpu=a100": {"plain", "any arch"},
    "queue=linux,arch=arm64": {"linux"},
}
JOBS = 7
SLOTS = dict(zip(("w1", "w2", "w3", "w4", ""), (*SERVES, "arch=arm64"), strict=True))
SESSIONS = ("a", "b", "c")
WORDS = {"running": ACQUIRED, "finished": OVER, "canceled": OVER, "limited": GONE, "scheduled": LAPSED}


def kind_of(number: int) -> str:
    return list(KINDS)[number % len(KINDS)]


def listed_kind(number: int, priority: int = 0) -> Job:
    queue, rules = KINDS[kind_of(number)]
    return listed(number, queue=queue, rules=rules, priority=priority, age=number // 3)


KIND_BY_UUID = {uuid(number): kind_of(number) for number in range(JOBS)}
SERVED_BY_PROFILE = {Profile.of(query): kinds for query, kinds in SERVES.items()}


@dataclasses.dataclass
class Try:
    worker: str | None
    claimed_at: float
    counted: bool
    judged: bool


@dataclasses.dataclass
class Row:
    """A job in the model; `job` is as it was put."""

    job: Job
    changed: int
    claims: int = 0
    tries: list[Try] = dataclasses.field(default_factory=list)
    state: JobState = RESERVING
    outcome: Outcome | None = None
    is_reserved: bool = False
    reservation_expires_at: float = 0.0
    claim: str | None = None
    worker: str | None = None
    session: str | None = None
    claimed_at: float = 0.0
    is_touched: bool = False
    lease_expires_at: float = 0.0
    completed_claim: str | None = None
    attempts: int = 0
    has_intent: bool = False
    done_at: float = 0.0


@dataclasses.dataclass
class Slot:
    session: str
    retired: set[str] = dataclasses.field(default_factory=set)
    #: None: not since the start of the scheduler.
    heard_at: float | None = None
    failures: int = 0
    held_until: float = 0.0
    claims: int = 0


class Model:
    """The rules of the store, over a dict: every verb takes, returns and raises what the store's does."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.slots: dict[str, Slot] = {}
        self.paused: set[str] = set()
        #: When Buildkite last answered about each queue.
        self.answered: dict[str, float] = {}
        self.ticks = 0

    def sequence(self) -> int:
        return self.ticks

    def move(self, row: Row, state: JobState) -> None:
        self.ticks += 1
        row.state, row.changed = state, self.ticks

    def unchanged(self, uuids: Iterable[str], asked: int) -> list[Row]:
        return [self.rows[each] for each in uuids if each in self.rows and self.rows[each].changed <= asked]

    # Buildkite's answers

    def put(self, jobs: Iterable[Job], asked: int) -> list[str]:
        put = []
        for job in jobs:
            row = self.rows.get(job.uuid)
            if row is None or (row.state is DONE and row.changed <= asked):
                self.ticks += 1
                history = (
                    (row.claims, [Try(t.worker, t.claimed_at, False, True) for t in row.tries]) if row else (0, [])
                )
                self.rows[job.uuid] = Row(job, self.ticks, *history)
                put.append(job.uuid)
            elif row.changed <= asked and row.state is LEASED:
                row.reservation_expires_at = 0
            elif row.changed <= asked and row.state is not DONE:
                row.job = dataclasses.replace(row.job, priority=job.priority)
                if row.state is not RESERVING:
                    self.move(row, RESERVING)
        return put

    def confirm(self, uuids: Iterable[str], asked: int, expires_at: float, now: float) -> list[str]:
        changed = []
        for row in self.unchanged(uuids, asked):
            if row.state in (READY, LEASED):
                row.reservation_expires_at = expires_at
            elif row.state is RESERVING and not row.has_intent:
                row.is_reserved, row.reservation_expires_at = True, expires_at
                self.blame(row, now)
                row.has_intent = self.failed_too_often(row, now)
                if not row.has_intent:
                    row.claim = row.worker = row.session = None
                self.move(row, RESERVING if row.has_intent else READY)
                changed.append(row.job.uuid)
        return changed

    def blame(self, row: Row, now: float) -> None:
        if row.tries and not row.tries[-1].judged:
            row.tries[-1].judged = True
            if slot := self.slots.get(row.tries[-1].worker or ""):
                slot.failures += 1
                slot.held_until = now + min(2.0**slot.failures, 300)

    def failed_too_often(self, row: Row, now: float) -> bool:
        counted = [each for each in row.tries if each.counted]
        if row.attempts < MAX_ATTEMPTS:
            return False
        return len({each.worker for each in counted}) > 1 or now - counted[0].claimed_at >= 900

    def learn(self, findings: dict[str, JobFinding], asked: int, now: float) -> list[str]:
        return [
            row.job.uuid
            for row in self.unchanged(findings, asked)
            if self.learn_one(row, *findings[row.job.uuid][:2], now)
        ]

    def learn_one(self, row: Row, finding: Finding, word: str, now: float) -> bool:
        if row.state is DONE or (finding is LAPSED and row.state is not READY):
            return False
        if finding is LAPSED:
            self.move(row, RESERVING)
        elif finding is ACQUIRED:
            if row.state is RUNNING:
                return False
            row.has_intent = False
            self.absolve(row)
            self.acquit(row)
            self.move(row, RUNNING)
        else:
            ran = finding is OVER and (row.state is RUNNING or (word == "finished" and row.claims > 0))
            heard = row.has_intent and word == "finished"
            row.outcome = Outcome.FAILED if heard else Outcome.RAN if ran else Outcome.DROPPED
            row.done_at = now
            if row.outcome is Outcome.RAN:
                self.absolve(row)
                self.acquit(row)
            self.move(row, DONE)
        return True

    def absolve(self, row: Row) -> None:
        if slot := self.slots.get(row.worker or ""):
            slot.failures, slot.held_until = 0, 0.0

    def acquit(self, row: Row) -> None:
        if row.tries and not row.tries[-1].judged:
            row.attempts -= row.tries[-1].counted
            row.tries[-1].judged, row.tries[-1].counted = True, False

    def finish(self, uuid: str, now: float) -> list[str]:
        row = self.rows.get(uuid)
        if not row or row.state is not RESERVING or not row.has_intent:
            return []
        row.outcome, row.done_at = Outcome.FAILED, now
        self.move(row, DONE)
        return [uuid]

    # Workers

    def claim(self, who: Worker, now: float) -> Row | None:
        self.enter(who, now)
        slot = self.slots.get(who.name)
        for row in self.in_state(LEASED):
            if who.name and row.worker == who.name and now - row.claimed_at <= ACQUIRE:
                row.lease_expires_at = now + LEASE
                return row
            if who.name and row.worker == who.name:
                self.end(row)
        if slot and slot.held_until > now:
            raise WorkerHeld(slot.held_until)
        mine = [row for row in self.line() if KIND_BY_UUID[row.job.uuid] in SERVED_BY_PROFILE[who.profile]]
        if not mine:
            return None
        row = mine[0]
        self.move(row, LEASED)
        row.worker, row.session, row.claim, row.is_touched = who.name or None, who.session or None, None, False
        row.claimed_at, row.lease_expires_at = now, now + LEASE
        row.claims += 1
        if slot:
            slot.claims += 1
        return row

    def enter(self, who: Worker, now: float) -> None:
        if not who.name:
            return
        slot = self.slots.setdefault(who.name, Slot(who.session))
        if slot.session != who.session:
            self.refuse_retired(slot, who.session, now)
            for row in self.in_state(LEASED):
                if row.worker == who.name:
                    self.end(row)
            slot.retired = (slot.retired | {slot.session}) - {who.session}
            slot.session = who.session
        slot.heard_at = now

    def end(self, row: Row) -> None:
        self.give_back(row, counted=False, judged=True)

    def refuse_retired(self, slot: Slot, session: str, now: float) -> None:
        if session in slot.retired and now - (slot.heard_at or 0) <= 300:
            raise WorkerNameTaken("")

    def held(self, holder: Holder, now: float) -> Row:
        who = holder.worker
        if who and (slot := self.slots.get(who.name)):
            if who.session == slot.session:
                slot.heard_at = now
            else:
                self.refuse_retired(slot, who.session, now)
        row = self.rows.get(holder.uuid)
        if row is None:
            raise UnknownJob("")
        is_holder = who and who.name and (who.name, who.session) == (row.worker, row.session or who.session)
        if holder.claim is None and row.claim and is_holder:
            return row
        if holder.claim is None or holder.claim not in (row.claim, row.completed_claim):
            raise StaleClaim("")
        return row

    def held_now(self, holder: Holder, now: float) -> Row:
        row = self.held(holder, now)
        if holder.claim != row.claim:
            raise StaleClaim("")
        return row

    def touch(self, holder: Holder, now: float) -> Row:
        row = self.held_now(holder, now)
        if row.state is LEASED:
            row.is_touched, row.lease_expires_at = True, now + LEASE
        return row

    def was_answered(self, row: Row) -> bool:
        """Since the job was claimed."""
        return self.answered.get(row.job.queue_key, 0.0) >= row.claimed_at

    def release(self, holder: Holder, now: float) -> Row:
        row = self.held_now(holder, now)
        if row.state is LEASED:
            hung = now - row.claimed_at >= ACQUIRE
            self.give_back(row, counted=hung and self.was_answered(row), judged=not hung)
        return row

    def complete(self, holder: Holder, exit_status: int, now: float) -> Row:
        row = self.held(holder, now)
        if holder.claim not in (None, row.claim) or row.claim in (None, row.completed_claim):
            return row
        row.completed_claim = row.claim
        if row.state is LEASED:
            if exit_status not in (0, 27) and (slot := self.slots.get(row.worker or "")):
                slot.held_until = max(slot.held_until, now + 10)
            counted = exit_status != 27 and self.was_answered(row)
            self.give_back(row, counted=counted, judged=exit_status == 27)
        return row

    def give_back(self, row: Row, *, counted: bool, judged: bool) -> None:
        row.tries.append(Try(row.worker, row.claimed_at, counted, judged))
        row.attempts += counted
        row.claim = None
        self.move(row, RESERVING)

    def expire(self, now: float) -> list[str]:
        for row in self.in_state(READY):
            if row.reservation_expires_at <= now:
                self.move(row, RESERVING)
        over = [row for row in self.in_state(LEASED) if row.lease_expires_at <= now]
        for row in over:
            self.give_back(row, counted=row.is_touched and self.was_answered(row), judged=True)
        return [row.job.uuid for row in over]

    # Upkeep and reads

    def pause(self, queue_key: str, paused: bool) -> bool:
        before = set(self.paused)
        (self.paused.add if paused else self.paused.discard)(queue_key)
        return self.paused != before

    def restart_leases(self, now: float, *, confirm: bool) -> None:
        for row in self.in_state(LEASED, READY):
            row.lease_expires_at, row.reservation_expires_at = now + LEASE, now + 30
            row.claimed_at = now if row.state is LEASED else row.claimed_at
        for row in self.in_state(READY) if confirm else []:
            self.move(row, RESERVING)
        for slot in self.slots.values():
            slot.held_until = min(slot.held_until, now + 300)
            slot.heard_at = now
        self.answered = {queue_key: min(at, now) for queue_key, at in self.answered.items()}

    def prune(self, before: float) -> int:
        old = [row.job.uuid for row in self.in_state(DONE) if row.done_at < before]
        for each in old:
            del self.rows[each]
        return len(old)

    def in_state(self, *states: JobState, queue_key: str = "") -> list[Row]:
        """In order."""
        rows = [
            row for row in self.rows.values() if row.state in states and row.job.queue_key in (queue_key or QUEUE_KEYS)
        ]
        return sorted(rows, key=lambda row: (-row.job.priority, row.job.scheduled_at, row.job.uuid))

    def line(self) -> list[Row]:
        return [row for row in self.in_state(READY) if row.job.queue_key not in self.paused]

    def unconfirmed(self, queue_key: str) -> list[str]:
        rows = [row for row in self.in_state(RESERVING, queue_key=queue_key) if not row.has_intent]
        return [row.job.uuid for row in rows if row.is_reserved or queue_key not in self.paused]

    def due(self, queue_key: str, before: float) -> list[tuple[float, str]]:
        rows = self.in_state(READY, LEASED, queue_key=queue_key)
        ends = [(row.reservation_expires_at, row.job.uuid) for row in rows]
        return sorted(end for end in ends if end[0] < before)


QUEUE_KEYS = ("default", "linux")

numbers = st.sets(st.integers(0, JOBS - 1), min_size=1)
priorities = st.sampled_from([0, 5, -1])
holders = st.sampled_from(["holder", "holder", "nobody", "another session", "another slot"])


def outcome_of(call: Callable[[], Any]) -> object:
    """What a verb did, in words that the store and the model share."""
    try:
        result = call()
    except Refusal as refusal:
        return type(refusal)
    except WorkerHeld as held:
        return WorkerHeld, held.until
    if isinstance(result, Row):
        return result.job.uuid, result.state
    if isinstance(result, Job):
        return result.uuid, result.state
    if isinstance(result, list):
        return sorted(each.uuid if isinstance(each, Job) else each for each in result)
    return result


class StoreMachine(RuleBasedStateMachine):
    """Every verb, by several workers, at any time, with a restart between any two."""

    open_store: Callable[[Settings], Store]

    def __init__(self) -> None:
        super().__init__()
        with contextlib.ExitStack() as opened:  # also where the store cannot be opened
            directory = opened.enter_context(tempfile.TemporaryDirectory())
            self.settings = make_settings(Path(directory), MAX_ATTEMPTS=MAX_ATTEMPTS)
            self.store = self.open_store(self.settings)
            self.opened = opened.pop_all()
        self.model = Model()
        self.clock = Clock()
        self.claims: list[Job] = []
        self.asked = self.ask_now()
        self.states_before: dict[str, JobState] = {}

    def teardown(self) -> None:
        with self.opened:
            self.store.close()

    @property
    def now(self) -> float:
        return self.clock.now()

    @initialize(priorities=st.lists(priorities, min_size=JOBS, max_size=JOBS))
    def start(self, priorities: list[int]) -> None:
        """Queues that are at work: not every run should have to find its way there."""
        for number, priority in enumerate(priorities):
            self.put({number}, priority, True)
        for queue_key in QUEUE_KEYS:
            self.reserve(queue_key, 100)

    # When a question was sent: just now, or earlier, while other things happened.

    def ask_now(self) -> tuple[int, int]:
        return self.store.sequence(), self.model.sequence()

    @rule()
    def ask(self) -> None:
        self.asked = self.ask_now()

    def question(self, fresh: bool) -> tuple[int, int]:
        return self.ask_now() if fresh else self.asked

    # Buildkite's answers

    @rule(numbers=numbers, priority=priorities, fresh=st.booleans())
    def put(self, numbers: set[int], priority: int, fresh: bool) -> None:
        jobs = [listed_kind(number, priority) for number in numbers]
        asked = self.question(fresh)
        expected = sorted(self.model.put(jobs, asked[1]))
        assert outcome_of(lambda: self.store.put(jobs, asked[0], self.now)) == expected

    @rule(numbers=numbers, fresh=st.booleans())
    def confirm(self, numbers: set[int], fresh: bool) -> None:
        self.confirm_all([uuid(number) for number in numbers], self.question(fresh))

    @rule(queue_key=st.sampled_from(QUEUE_KEYS), limit=st.sampled_from([2, 100]))
    def reserve(self, queue_key: str, limit: int) -> None:
        self.confirm_all(self.store.unconfirmed(queue_key, self.now + RESERVATION / 2, limit), self.ask_now())

    def confirm_all(self, uuids: list[str], asked: tuple[int, int]) -> None:
        expires_at = self.now + RESERVATION
        expected = sorted(self.model.confirm(uuids, asked[1], expires_at, self.now))
        assert outcome_of(lambda: self.store.confirm(uuids, asked[0], expires_at, self.now)) == expected

    @rule(
        words=st.dictionaries(st.integers(0, JOBS - 1), st.sampled_from(list(WORDS)), max_size=3), fresh=st.booleans()
    )
    def learn(self, words: dict[int, str], fresh: bool) -> None:
        findings = {uuid(number): JobFinding(WORDS[word], word) for number, word in words.items()}
        asked = self.question(fresh)
        expected = sorted(self.model.learn(findings, asked[1], self.now))
        assert outcome_of(lambda: self.store.learn(findings, asked[0], self.now)) == expected

    @rule(number=st.integers(0, JOBS - 1), intended=st.sampled_from([True, True, False]))
    def finish(self, number: int, intended: bool) -> None:
        intents = [row.job.uuid for row in self.model.in_state(RESERVING) if row.has_intent and intended]
        target = intents[0] if intents else uuid(number)
        expected = self.model.finish(target, self.now)
        assert outcome_of(lambda: self.store.finish(target, self.now)) == expected

    # Workers

    def may_call(self, who: Worker | None) -> bool:
        """After a start, how long a slot has been silent is known once it was heard."""
        slot = self.model.slots.get(who.name) if who else None
        return not (who and slot and slot.heard_at is None and who.session in slot.retired)

    @rule(name=st.sampled_from(list(SLOTS)), session=st.sampled_from(SESSIONS))
    def claim(self, name: str, session: str) -> None:
        self.claim_as(worker(name, session if name else "", SLOTS[name]))

    @rule(name=st.sampled_from(list(SLOTS)))
    def claim_again(self, name: str) -> None:
        """By the slot's current session."""
        self.claim(name, self.model.slots[name].session if name in self.model.slots else SESSIONS[0])

    def claim_as(self, who: Worker) -> None:
        if not self.may_call(who):
            return
        was_ready = {row.job.uuid for row in self.model.in_state(READY)}
        expected = outcome_of(lambda: self.model.claim(who, self.now))
        jobs: list[Job] = []
        assert outcome_of(lambda: self.from_row(self.store.claim(who, self.now), jobs)) == expected
        for job in jobs:
            row = self.model.rows[job.uuid]
            if row.claim is None:
                assert job.uuid in was_ready
                assert job.claim not in {earlier.claim for earlier in self.claims}
                row.claim = job.claim
                self.claims.append(job)
            else:
                self.ask()  # whether handing the same claim out again is a change is not for this test
            assert job.claim == row.claim

    @staticmethod
    def from_row(job: Job | None, jobs: list[Job]) -> Job | None:
        jobs += [job] if job else []
        return job

    def a_holder(self, back: int, whose: str, with_claim: bool) -> Holder | None:
        """Who speaks of a claim that was given: one of the last ones, by its holder or somebody else."""
        if not self.claims:
            return None
        job = self.claims[-1 - back % len(self.claims)]
        name, session = job.worker or "", job.session or ""
        if whose == "another session" and name:
            session = SESSIONS[(SESSIONS.index(session) + 1) % len(SESSIONS)]
        elif whose == "another slot":
            name, session = ("w1", "a") if name != "w1" else ("w2", "a")
        who = None if whose == "nobody" else worker(name, session, SLOTS[name])
        return Holder(job.uuid, job.claim if with_claim else None, who) if self.may_call(who) else None

    def speak(self, holder: Holder, of_model: Callable[[], Row], of_store: Callable[[], Job]) -> None:
        state = self.model.rows[holder.uuid].state if holder.uuid in self.model.rows else None
        expected = outcome_of(of_model)
        assert outcome_of(of_store) == expected
        if state is not LEASED:
            self.ask()  # whether an exit status alone is a change is not for this test

    @precondition(lambda self: self.claims)
    @rule(back=st.integers(0, 4), whose=holders, with_claim=st.sampled_from([True, True, True, False]))
    def touch(self, back: int, whose: str, with_claim: bool) -> None:
        if holder := self.a_holder(back, whose, with_claim):
            self.speak(
                holder,
                lambda: self.model.touch(holder, self.now),
                lambda: self.store.touch(holder, self.now),
            )

    @precondition(lambda self: self.claims)
    @rule(back=st.integers(0, 4), whose=holders, silent=st.booleans())
    def release(self, back: int, whose: str, silent: bool) -> None:
        self.answer(() if silent else QUEUE_KEYS)
        if holder := self.a_holder(back, whose, True):
            self.speak(
                holder,
                lambda: self.model.release(holder, self.now),
                lambda: self.store.release(holder, "no room", self.now),
            )

    @precondition(lambda self: self.claims)
    @rule(
        back=st.integers(0, 4),
        whose=holders,
        with_claim=st.sampled_from([True, True, False]),
        exit_status=st.sampled_from([1, 0, 27]),
        silent=st.sampled_from([False, False, True]),
    )
    def complete(self, back: int, whose: str, with_claim: bool, exit_status: int, silent: bool) -> None:
        self.answer(() if silent else QUEUE_KEYS)
        if holder := self.a_holder(back, whose, with_claim):
            self.speak(
                holder,
                lambda: self.model.complete(holder, exit_status, self.now),
                lambda: self.store.complete(holder, AgentEnd(exit_status, "last words"), self.now),
            )

    @rule(name=st.sampled_from(list(SLOTS)))
    def claim_and_fail(self, name: str) -> None:
        """A worker whose agent cannot connect tries once nothing holds it; Buildkite says that nobody ran the job."""
        self.clock.advance(SILENCE)
        self.claim_again(name)
        if self.claims and self.claims[-1].claimed_at == self.now:
            self.complete(0, "holder", True, 1, False)
            self.confirm_all([self.claims[-1].uuid], self.ask_now())

    # Upkeep

    @rule(answered=st.sampled_from([("default", "linux"), ("linux",), ()]))
    def expire(self, answered: tuple[str, ...]) -> None:
        self.answer(answered)
        expected = sorted(self.model.expire(self.now))
        assert outcome_of(lambda: self.store.expire(QUEUE_KEYS, self.now)) == expected

    def answer(self, queue_keys: Iterable[str]) -> None:
        """Buildkite answers about these queues."""
        for queue_key in queue_keys:
            self.store.answered(queue_key, self.now)
            self.model.answered[queue_key] = self.now

    @rule(seconds=st.sampled_from([0.5, 1, 2, 10, 31, 121, SILENCE, 1000]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(queue_key=st.sampled_from(QUEUE_KEYS), paused=st.sampled_from([True, False, False]))
    def pause(self, queue_key: str, paused: bool) -> None:
        assert self.store.pause(queue_key, paused, self.now) is self.model.pause(queue_key, paused)

    @rule(seconds=st.sampled_from([0, 100]))
    def prune(self, seconds: float) -> None:
        before = self.now - seconds
        assert self.store.prune(before) == self.model.prune(before)
        # Which silent workers are forgotten is tested by itself; none that is held, or holds a job, may be.
        for name in self.model.slots.keys() - {row.name for row in self.store.workers()}:
            slot = self.model.slots.pop(name)
            assert slot.held_until < before
            assert name not in [row.worker for row in self.model.in_state(LEASED, RUNNING)]

    @rule()
    def distrust_clock(self) -> None:
        self.store.restart_leases(self.now, confirm=False)
        self.model.restart_leases(self.now, confirm=False)

    @rule(start=st.booleans())
    def restart(self, start: bool) -> None:
        self.store.close()
        self.store = self.open_store(self.settings)
        for slot in self.model.slots.values():
            slot.heard_at = None
        if isinstance(self.store.rows, SqliteRows):
            self.model.answered = {}
        if start:
            self.store.restart_leases(self.now, confirm=True)
            self.model.restart_leases(self.now, confirm=True)
        self.ask()  # no question outlives the process that asked

    # After each step

    @invariant()
    def every_job_is_as_in_the_model(self) -> None:
        for each in KIND_BY_UUID:
            job, row = self.store.get(each), self.model.rows.get(each)
            assert (job is None) is (row is None)
            if job and row:
                self.compare(job, row)

    def compare(self, job: Job, row: Row) -> None:
        assert (job.state, job.outcome, job.priority) == (row.state, row.outcome, row.job.priority)
        assert (job.claims, job.attempts, bool(job.finish_detail)) == (row.claims, row.attempts, row.has_intent)
        assert (job.claim, job.completed_claim) == (row.claim, row.completed_claim)
        if row.state in (READY, LEASED):
            assert job.reservation_expires_at == row.reservation_expires_at
        if row.state is LEASED:
            assert job.claim and (job.worker, job.lease_expires_at) == (row.worker, row.lease_expires_at)
        if row.state is READY:
            assert job.claim is None and job.worker is None

    @invariant()
    def every_move_was_legal(self) -> None:  # the model's states are the store's, by the check above
        for each, row in self.model.rows.items():
            before = self.states_before.get(each, row.state)
            assert row.state is before or row.state in MOVES[before]
        self.states_before = {each: row.state for each, row in self.model.rows.items()}

    @invariant()
    def no_worker_holds_two_jobs(self) -> None:
        holders = [job.worker for job in self.store.stats()["at_work"] if job.state is LEASED and job.worker]
        assert len(holders) == len(set(holders))

    @invariant()
    def stats_count_what_the_model_has(self) -> None:
        rows, stats = list(self.model.rows.values()), self.store.stats()
        waiting = [row.job.rule_set for row in rows if row.state in (RESERVING, READY)]
        assert stats["states"] == {state: sum(row.state is state for row in rows) for state in JobState}
        assert stats["outcomes"] == {outcome: sum(row.outcome is outcome for row in rows) for outcome in Outcome}
        assert stats["waiting"] == {text: waiting.count(text) for text in waiting}
        assert stats["paused"] == sorted(self.model.paused)
        assert {job.uuid for job in stats["at_work"]} == {row.job.uuid for row in self.model.in_state(LEASED, RUNNING)}

    @invariant()
    def workers_are_as_in_the_model(self) -> None:
        assert {row.name: (row.failures, row.held_until, row.claims) for row in self.store.workers()} == {
            name: (slot.failures, slot.held_until, slot.claims) for name, slot in self.model.slots.items()
        }

    @invariant()
    def every_list_is_as_in_the_model(self) -> None:
        for queue_key in QUEUE_KEYS:
            reserving = self.model.in_state(RESERVING, queue_key=queue_key)
            left = self.model.in_state(RESERVING, READY, LEASED, RUNNING, queue_key=queue_key)
            assert sorted(self.store.unfinished(queue_key)) == sorted(row.job.uuid for row in left)
            intents = {row.job.uuid for row in reserving if row.has_intent}
            assert {job.uuid for job in self.store.intents(queue_key)} == intents
            self.compare_unconfirmed(queue_key, self.now + RESERVATION / 2)

    def compare_unconfirmed(self, queue_key: str, due_before: float) -> None:
        got, first = self.store.unconfirmed(queue_key, due_before, 100), self.model.unconfirmed(queue_key)
        due = got[len(first) :]
        assert got[: len(first)] == first
        # Those that end at the same moment may come in any order.
        ends = [self.model.rows[each].reservation_expires_at for each in due]
        assert ends == sorted(ends)
        assert sorted(zip(ends, due, strict=True)) == self.model.due(queue_key, due_before)


def test_release_of_claim_that_was_handed_out_again_meanwhile_changes_nothing(desk: Desk) -> None:
    lost = desk.lease(1)
    again = desk.claim(W1)
    assert again.claim == lost.claim
    with pytest.raises(StaleClaim):
        desk.store.release(Holder(lost.uuid, lost.claim, asked=lost.version), "undelivered", desk.now)
    assert desk.job().state is LEASED
    desk.store.release(Holder(again.uuid, again.claim, asked=again.version), "undelivered", desk.now)
    assert desk.job().state is RESERVING


def test_prune_forgets_workers_that_were_silent_for_a_week(desk: Desk) -> None:
    desk.make_ready(listed(1), listed(2))
    desk.claim(worker("gone"))
    desk.learn(1, OVER)
    desk.claim(worker("busy"))
    desk.learn(2, ACQUIRED)
    desk.clock.advance(scheduler.FORGET_SECONDS)
    desk.store.prune(desk.now - scheduler.KEEP_DONE_SECONDS)
    assert sorted(row.name for row in desk.store.workers()) == ["busy", "gone"]
    desk.clock.advance(1)
    desk.claims_nothing(worker("here"))
    desk.store.prune(desk.now - scheduler.KEEP_DONE_SECONDS)
    assert sorted(row.name for row in desk.store.workers()) == ["busy", "here"]


def test_prune_of_more_workers_than_are_remembered_forgets_those_that_were_silent_longest(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WORKERS", 10)
    desk.make_ready(listed(1))
    desk.claim(worker("busy"))
    for number in range(9):
        desk.clock.advance(1)
        desk.claims_nothing(worker(f"w{number}"))
    assert not desk.store.has_many_workers()
    desk.clock.advance(1)
    desk.claims_nothing(worker("w9"))
    assert desk.store.has_many_workers()
    desk.store.prune(0.0)
    assert [row.name for row in desk.store.workers()] == ["busy", *(f"w{number}" for number in range(2, 10))]


def test_prune_of_worker_that_holds_a_job_remembers_how_long_it_was_silent(desk: Desk) -> None:
    old, new = worker(session="old"), worker(session="new")
    desk.claims_nothing(old)
    job = desk.lease(1, new)
    desk.clock.advance(SILENCE)
    desk.store.prune(desk.now)
    assert desk.claims_nothing(old)  # the slot is taken back, as it would have been before
    with pytest.raises(WorkerNameTaken):
        desk.touch(job, new)


@pytest.mark.parametrize("name", STORE_NAMES)
def test_every_verb_in_any_order_does_what_the_model_does(name: str) -> None:
    class Machine(StoreMachine):
        open_store = staticmethod(STORES[name])

    examples = 150 if LONG_RUN else 12
    run_state_machine_as_test(
        Machine, settings=hypothesis_settings(max_examples=examples, stateful_step_count=40, deadline=None)
    )


# --- What is SQLite's own ---


def test_count_claims_of_worker_survives_a_close_and_any_later_change(tmp_path: Path, clock: Clock) -> None:
    settings = make_settings(tmp_path)
    with contextlib.closing(open_sqlite(settings)) as store:
        desk = Desk(store, clock)
        desk.make_ready(listed(1), listed(2))
        desk.claim(W1)
        claims = "SELECT claims FROM workers WHERE name = 'w1'"
        assert rows_of(store)._reader.execute(claims).fetchone() == (0,)
        desk.claim(W2)
        store.put([], store.sequence(), clock.now())
        store.pause("default", True, clock.now())
        assert rows_of(store)._reader.execute(claims).fetchone() == (1,)
        store.pause("default", False, clock.now())
        desk.make_ready(listed(3))
        desk.claim(worker("w3"))
    with contextlib.closing(open_sqlite(settings)) as store:
        assert {row.name: row.claims for row in store.workers()} == {"w1": 1, "w2": 1, "w3": 1}


@pytest.fixture
def sqlite_store(settings: Callable[..., Settings]) -> Iterator[Store]:
    made = settings()
    store = open_sqlite(made)
    yield store
    store.close()


def test_open_by_second_scheduler_on_the_same_directory_is_refused(
    sqlite_store: Store, settings: Callable[..., Settings]
) -> None:
    with pytest.raises(StoreInUse, match=r"another scheduler has locked .*scheduler\.lock"):
        open_sqlite(settings())
    sqlite_store.close()
    open_sqlite(settings()).close()


def test_close_twice_is_as_good_as_once(open_store: Callable[..., Store], tmp_path: Path) -> None:
    store = open_store()
    store.close()
    with open(tmp_path / "file", "w") as file:  # takes a descriptor that the first close has given back
        store.close()
        file.write("it is open still")
        file.flush()
    open_store().close()


def test_open_of_two_directories_is_two_stores(sqlite_store: Store, tmp_path: Path, clock: Clock) -> None:
    made = make_settings(tmp_path / "other")
    other = open_sqlite(made)
    Desk(sqlite_store, clock).bring(READY)
    assert other.get(uuid(1)) is None
    other.close()


def database_of(settings: Settings) -> Path:
    return Path(settings.state_directory) / "jobs.sqlite3"


def test_open_of_newer_schema_goes_by_the_lowest_version_that_may_read_it(settings: Callable[..., Settings]) -> None:
    open_sqlite(settings()).close()
    with contextlib.closing(sqlite3.connect(database_of(settings()))) as db:
        db.execute("PRAGMA user_version = 99")
        db.execute("UPDATE meta SET value = '98' WHERE name = 'min_reader'")
        db.commit()
        before = database_of(settings()).read_bytes()
        with pytest.raises(SettingsError, match=r"ha(s|ve) schema 99, which this scheduler \(schema \d+\) cannot read"):
            open_sqlite(settings())
        assert database_of(settings()).read_bytes() == before
        db.execute("UPDATE meta SET value = ? WHERE name = 'min_reader'", [str(scheduler.SCHEMA_VERSION)])
        db.commit()
    open_sqlite(settings()).close()
    with contextlib.closing(sqlite3.connect(database_of(settings()))) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


def test_open_makes_a_directory_that_others_cannot_read(settings: Callable[..., Settings]) -> None:
    open_sqlite(settings()).close()
    assert Path(settings().state_directory).stat().st_mode & 0o777 == 0o700


def modes_of(path: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mode & 0o777 for each in path.parent.glob("jobs.sqlite3*")}


PRIVATE = {"jobs.sqlite3": 0o600, "jobs.sqlite3-wal": 0o600, "jobs.sqlite3-shm": 0o600}


def test_open_in_a_directory_that_others_can_read_makes_files_that_they_cannot(
    settings: Callable[..., Settings],
) -> None:
    path = database_of(settings())
    path.parent.mkdir(mode=0o755)
    with contextlib.closing(open_sqlite(settings())):
        assert modes_of(path) == PRIVATE


def test_open_of_files_that_others_can_read_makes_them_private_and_keeps_what_is_in_them(
    settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = database_of(settings())
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "make_private", lambda path: None)
        open_sqlite(settings()).close()
    path.chmod(0o644)
    with contextlib.closing(sqlite3.connect(path)) as other:  # which keeps the log of writes there
        other.execute("SELECT count(*) FROM jobs")
        assert modes_of(path) == dict.fromkeys(PRIVATE, 0o644)
        with contextlib.closing(open_sqlite(settings())) as store:
            assert modes_of(path) == PRIVATE
            assert Desk(store, clock).store.stats()["states"]["ready"] == 0


def test_open_of_a_file_that_cannot_be_made_private_says_so_and_goes_on(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.chmod", refuse)
    open_sqlite(settings()).close()
    assert f'unsafe store={database_of(settings())} reason="it cannot be made private' in caplog.text


def test_remember_stacks_under_another_key_is_refused_until_all_jobs_are_done(
    sqlite_store: Store, clock: Clock
) -> None:
    desk = Desk(sqlite_store, clock)
    sqlite_store.remember_stacks({"default": "vm1-default", "linux": "vm1-linux"})
    desk.bring(RUNNING)
    sqlite_store.remember_stacks({"default": "vm1-default", "linux": "vm2-linux"})
    with pytest.raises(SettingsError, match="1 jobs of queue default are reserved as stack 'vm1-default'"):
        sqlite_store.remember_stacks({"default": "vm2-default"})
    desk.learn(1, OVER)
    sqlite_store.remember_stacks({"default": "vm2-default"})
    desk.put(listed(2))
    with pytest.raises(SettingsError, match="vm2-default"):
        sqlite_store.remember_stacks({"default": "vm1-default"})


def test_remember_stacks_refused_for_one_queue_changes_none(sqlite_store: Store, clock: Clock) -> None:
    sqlite_store.remember_stacks({"default": "vm1-default", "linux": "vm1-linux"})
    Desk(sqlite_store, clock).put(listed(1, queue="linux"))
    with pytest.raises(SettingsError):
        sqlite_store.remember_stacks({"default": "vm2-default", "linux": "vm2-linux"})
    Desk(sqlite_store, clock).put(listed(2))
    sqlite_store.remember_stacks({"default": "vm1-default", "linux": "vm1-linux"})


def test_remember_stacks_survives_a_restart(settings: Callable[..., Settings], clock: Clock) -> None:
    store = open_sqlite(settings())
    store.remember_stacks({"default": "vm1-default"})
    Desk(store, clock).put(listed(1))
    store.close()
    store = open_sqlite(settings())
    with pytest.raises(SettingsError, match="vm1-default"):
        store.remember_stacks({"default": "vm2-default"})
    store.close()


def rows_of(store: Store) -> SqliteRows:
    assert isinstance(store.rows, SqliteRows)
    return store.rows


def pragma(store: Store, name: str) -> object:
    return rows_of(store)._db.execute(f"PRAGMA {name}").fetchone()[0]


def test_open_keeps_the_log_that_readers_do_not_wait_for(sqlite_store: Store) -> None:
    assert pragma(sqlite_store, "journal_mode") == "wal"


FULL, NORMAL = 2, 1


def test_every_answer_of_buildkite_is_on_the_disk_and_workers_do_not_wait_for_it(
    sqlite_store: Store, clock: Clock
) -> None:
    desk = Desk(sqlite_store, clock)
    steps: list[tuple[str, Callable[[], object], int]] = [
        ("put", lambda: desk.put(listed(1), listed(2)), FULL),
        ("claim", lambda: desk.claims_nothing(W1), NORMAL),
        ("confirm", lambda: desk.confirm(1, 2), FULL),
        ("claim", lambda: desk.claim(W1), NORMAL),
        ("learn", lambda: desk.learn(2, ACQUIRED), FULL),
        ("touch", lambda: desk.touch(desk.job(1)), NORMAL),
        ("pause", lambda: desk.store.pause("default", True, desk.now), FULL),
        ("complete", lambda: desk.complete(desk.job(1)), NORMAL),
        ("finish", lambda: desk.store.finish(uuid(1), desk.now), FULL),
    ]
    for verb, call, synchronous in steps:
        call()
        assert (verb, pragma(sqlite_store, "synchronous")) == (verb, synchronous)


def test_open_after_the_process_died_finds_all_that_was_written(
    sqlite_store: Store, settings: Callable[..., Settings], tmp_path: Path, clock: Clock
) -> None:
    desk = Desk(sqlite_store, clock)
    numbers = desk.bring_one_of_each()
    # What a killed process leaves: its files, with the log, and no word of farewell.
    shutil.copytree(settings().state_directory, tmp_path / "left")
    made = make_settings(tmp_path / "left")
    after = Desk(open_sqlite(made), clock)
    for number in numbers.values():
        assert after.job(number) == desk.job(number)
    after.store.close()


def test_put_into_a_full_disk_says_so_and_works_again_when_there_is_room(
    sqlite_store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_STORE_SECONDS", 0.0)
    desk = Desk(sqlite_store, clock)
    desk.bring(READY)
    many = [listed(number, rules=["x=" + "y" * 500]) for number in range(2, 200)]
    pragma(sqlite_store, f"max_page_count = {pragma(sqlite_store, 'page_count')}")
    with pytest.raises(StoreUnavailable, match="full; free some space") as refused:
        desk.put(*many)
    assert (refused.value.status, refused.value.code) == (503, "store_unavailable")
    assert desk.store.unfinished("default") == [uuid(1)]
    pragma(sqlite_store, "max_page_count = 100000")
    assert len(desk.put(*many)) == len(many)
    assert desk.claim(W1).uuid == uuid(1)


def test_claim_after_a_write_that_could_not_be_undone_is_refused_and_not_lost(
    sqlite_store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_STORE_SECONDS", 0.0)
    desk = Desk(sqlite_store, clock)
    desk.bring(READY)

    def only_begin(action: int, what: str | None, *_: object) -> int:
        is_end = action == sqlite3.SQLITE_TRANSACTION and what != "BEGIN"
        return sqlite3.SQLITE_DENY if is_end else sqlite3.SQLITE_OK

    rows_of(sqlite_store)._db.set_authorizer(only_begin)
    for who in (W1, W2):
        with pytest.raises(StoreUnavailable):
            desk.claim(who)
    rows_of(sqlite_store)._db.set_authorizer(None)
    assert desk.job().state is READY


def test_every_verb_of_a_store_that_was_closed_is_refused(sqlite_store: Store, clock: Clock) -> None:
    desk = Desk(sqlite_store, clock)
    desk.bring(READY)
    sqlite_store.close()
    for verb in (lambda: desk.claim(W1), lambda: desk.put(listed(2)), sqlite_store.check, desk.job):
        with pytest.raises(StoreUnavailable):
            verb()


# What a claim costs, counted in statements and in steps of SQLite's machine, not in time.


@dataclasses.dataclass
class Cost:
    statements: list[str] = dataclasses.field(default_factory=list)
    steps: int = 0


def cost_of_claim(store: Store, who: Worker, now: float) -> Cost:
    cost = Cost()

    def step() -> None:
        cost.steps += 1

    rows_of(store)._db.set_trace_callback(cost.statements.append)
    rows_of(store)._db.set_progress_handler(step, 1)
    job = store.claim(who, now)
    rows_of(store)._db.set_trace_callback(None)
    rows_of(store)._db.set_progress_handler(None, 1)
    assert job and job.rule_set == "queue=default,n=0"
    return cost


MEASURED = worker(query="n=0")


def crowded(settings: Settings, clock: Clock, jobs: int, rule_sets: int) -> Store:
    """A store with so many ready jobs of so many rule sets, the first of which suits the worker that is measured."""
    store = open_sqlite(settings)
    desk = Desk(store, clock)
    desk.make_ready(*(listed(number, rules=[f"n={number % rule_sets}"]) for number in range(jobs)))
    # A claim also looks once at each rule set that has changed since the last one: let that be over.
    store.learn({desk.claim(MEASURED).uuid: JobFinding(ACQUIRED, "running")}, store.sequence(), clock.now())
    return store


CROWDS = {"few": (100, 1), "many jobs": (1000, 1), "many rule sets": (600, 60), "many of both": (1000, 300)}


def test_claim_among_many_jobs_and_rule_sets_costs_what_it_costs_among_few(tmp_path: Path, clock: Clock) -> None:
    costs = {}
    for name, (jobs, rule_sets) in CROWDS.items():
        with contextlib.closing(crowded(make_settings(tmp_path / name), clock, jobs, rule_sets)) as store:
            costs[name] = cost_of_claim(store, MEASURED, clock.now())
    few = costs.pop("few")
    for name, cost in costs.items():
        assert (name, len(cost.statements)) == (name, len(few.statements))
        assert cost.steps == few.steps


def test_ahead_of_the_first_in_a_long_line_costs_what_it_costs_in_a_short_one(tmp_path: Path, clock: Clock) -> None:
    steps = collections.Counter[int]()
    for jobs in (100, 1000):
        with contextlib.closing(crowded(make_settings(tmp_path / str(jobs)), clock, jobs, 1)) as store:
            first = store.page(READY, None, 1)[0]

            def step(jobs: int = jobs) -> None:
                steps[jobs] += 1

            rows_of(store)._reader.set_progress_handler(step, 1)
            assert store.ahead(first, 1000) == 0
    assert steps[100] == steps[1000] > 0


def test_ahead_counts_those_of_the_same_rules_in_the_order_of_the_line_up_to_a_limit(desk: Desk) -> None:
    desk.make_ready(
        *(listed(number, priority=number // 4, age=60 * (number % 2)) for number in range(12)),
        listed(99, rules=["n=1"], priority=9),
    )
    line = sorted((desk.job(number) for number in range(12)), key=lambda job: job.order)
    assert [desk.store.ahead(job, 100) for job in line] == list(range(12))
    assert [desk.store.ahead(job, 5) for job in line] == [0, 1, 2, 3, 4, *[5] * 7]


def test_claim_reads_by_index_alone(tmp_path: Path, clock: Clock) -> None:
    with contextlib.closing(crowded(make_settings(tmp_path), clock, 300, 30)) as store:
        rows_of(store)._stale.add("queue=default,n=0")  # so that the first in line are read
        statements = cost_of_claim(store, MEASURED, clock.now()).statements
        plans = {
            statement: [row[3] for row in rows_of(store)._db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            for statement in statements
            if statement.lstrip().startswith(("SELECT", "UPDATE"))
        }
    assert len(plans) == 2
    for statement, plan in plans.items():
        assert plan and all(line.startswith("SEARCH") for line in plan), (statement, plan)
    [head] = [plan for statement, plan in plans.items() if "ORDER BY priority" in statement]
    assert len(head) == 1  # no sorting beside it
    assert head[0].endswith("INDEX jobs_ready (rule_set=?)")


def test_every_list_for_buildkite_is_read_by_index(sqlite_store: Store, clock: Clock) -> None:
    Desk(sqlite_store, clock).bring_one_of_each()
    statements: list[str] = []
    rows_of(sqlite_store)._reader.set_trace_callback(statements.append)
    sqlite_store.unconfirmed("default", clock.now(), 10, clock.now())
    sqlite_store.unfinished("default")
    sqlite_store.intents("default", clock.now())
    rows_of(sqlite_store)._reader.set_trace_callback(None)
    assert len(statements) == 4
    for statement in statements:
        plan = [row[3] for row in rows_of(sqlite_store)._reader.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert plan and all(line.startswith("SEARCH") for line in plan), (statement, plan)


# --- What is Redis's own ---


@pytest.fixture(params=[REDIS])
def join(request: pytest.FixtureRequest, settings: Callable[..., Settings]) -> Iterator[Callable[[str], RedisRows]]:
    """Opens the rows of one more scheduler of that name, which has heard nothing yet and leads nobody."""
    opened: list[Store] = []

    def another(name: str) -> RedisRows:
        opened.append(STORES[request.param](settings(MAX_ATTEMPTS=MAX_ATTEMPTS)))
        leader = opened[-1].rows
        assert isinstance(leader, RedisRows)
        leader.leave()
        rows = leader.with_token("")
        rows.name = name
        return rows

    yield another
    for store in opened:
        store.close()


def served_by(rows: RedisRows) -> Store:
    return Store(rows, rows._settings)


def take_turn(rows: RedisRows) -> Store:
    token = rows.heartbeat({}).token
    assert token
    return served_by(rows.with_token(token))


def test_beat_while_another_leads_gives_no_turn_until_that_one_leaves(join: Callable[[str], RedisRows]) -> None:
    first, second = join("first"), join("second")
    token = first.heartbeat({"default": [1.0, 2.0, []]}).token
    beat = second.heartbeat({})
    assert (beat.token, beat.leader, beat.notes) == ("", "first", {"default": [1.0, 2.0, []]})
    assert 0 < beat.turn_seconds <= scheduler.TURN_SECONDS
    assert beat.schedulers == dict.fromkeys(("first", "second"), '{"queues": "default", "files": {}}')
    assert first.heartbeat({}).token == token
    first.leave()
    other = second.heartbeat({})
    assert (other.leader, other.schedulers) == ("second", {"second": '{"queues": "default", "files": {}}'})
    assert other.token not in ("", token)
    assert first.heartbeat({}).token == ""


def test_beat_of_scheduler_that_does_not_want_the_turn_leaves_it_to_others(join: Callable[[str], RedisRows]) -> None:
    first, second = join("first"), join("second")
    assert first.heartbeat({}, lead=False).leader == ""
    assert second.heartbeat({}).leader == "second"


def test_beat_of_leader_that_does_not_want_the_turn_any_more_lets_it_run_out(join: Callable[[str], RedisRows]) -> None:
    first, second = join("first"), join("second")
    first.heartbeat({"default": [1.0, 2.0, []]})
    modest = first.heartbeat({"default": [9.0, 9.0, []]}, lead=False)
    assert (modest.token, modest.leader, modest.notes) == ("", "first", {"default": [1.0, 2.0, []]})
    turn_seconds = modest.turn_seconds
    deadline = time.monotonic() + 2 * scheduler.TURN_SECONDS
    while second.heartbeat({}).leader == "first":
        assert time.monotonic() < deadline
        left = first.heartbeat({}, lead=False).turn_seconds
        assert left <= turn_seconds
        turn_seconds = left
        time.sleep(0.05)


def test_renew_leases_by_who_takes_the_turn_gives_every_lease_its_full_time(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    first, second = join("first"), join("second")
    desk = Desk(take_turn(first), clock)
    before = desk.lease()
    clock.advance(LEASE - 1)
    first.leave()
    take_turn(second).renew_leases(clock.now())
    assert desk.job().lease_expires_at == clock.now() + LEASE
    assert desk.job().claimed_at == before.claimed_at


LEADERS_VERBS: dict[str, Callable[[Desk], object]] = {
    "put": lambda desk: desk.put(listed(9)),
    "put nothing": lambda desk: desk.put(),
    "confirm": lambda desk: desk.confirm(3),
    "confirm nothing": lambda desk: desk.confirm(),
    "learn": lambda desk: desk.learn(2, ACQUIRED),
    "finish": lambda desk: desk.store.finish(uuid(3), desk.now),
    "expire": lambda desk: desk.expire(),
    "pause": lambda desk: desk.store.pause("default", not desk.store.stats()["paused"], desk.now),
    "restart_leases": lambda desk: desk.store.restart_leases(desk.now, confirm=True),
    "prune": lambda desk: desk.store.prune(desk.now + 1),
}


@pytest.mark.parametrize("verb", LEADERS_VERBS)
def test_every_verb_of_former_leader_is_refused_and_changes_nothing(
    join: Callable[[str], RedisRows], clock: Clock, verb: str
) -> None:
    first, second = join("first"), join("second")
    old = Desk(take_turn(first), clock)
    old.bring_one_of_each()
    clock.advance(LEASE)
    first.leave()
    new = Desk(take_turn(second), clock)
    before = [new.store.get(uuid(number)) for number in range(1, 10)], new.store.stats(), new.store.sequence()
    with pytest.raises(Fenced):
        LEADERS_VERBS[verb](old)
    assert ([new.store.get(uuid(number)) for number in range(1, 10)], new.store.stats(), new.store.sequence()) == before
    LEADERS_VERBS[verb](new)
    with pytest.raises(Fenced):
        LEADERS_VERBS[verb](Desk(served_by(second.with_token("")), clock))


def test_every_verb_of_a_worker_is_served_by_who_does_not_lead(join: Callable[[str], RedisRows], clock: Clock) -> None:
    first, second = join("first"), join("second")
    leading, serving = Desk(take_turn(first), clock), Desk(served_by(second), clock)
    leading.make_ready(listed(1), listed(2, rules=["os=linux"]))
    job = serving.claim(W1)
    assert leading.claim(W1).claim == serving.claim(W1).claim == job.claim
    assert serving.touch(job, W1).state is leading.touch(job, W1).state is LEASED
    with pytest.raises(WorkerNameTaken):
        leading.claims_nothing(worker(session="new"))
        serving.claims_nothing(W1)
    # What either learned of rule sets is not all that there is.
    assert serving.claim(worker("w2", query="os=linux")).uuid == uuid(2)
    leading.make_ready(listed(3, rules=["os=bsd"]))
    assert serving.claim(worker("w3", query="os=bsd")).uuid == uuid(3)


def test_hold_and_pause_are_known_to_all(join: Callable[[str], RedisRows], clock: Clock) -> None:
    first, second = join("first"), join("second")
    leading, serving = Desk(take_turn(first), clock), Desk(served_by(second), clock)
    leading.make_ready(listed(1, age=9), listed(2))
    serving.complete(serving.claim(W1), 1)
    leading.confirm(1)
    with pytest.raises(WorkerHeld):
        serving.claims_nothing(W1)
    leading.store.pause("default", True, clock.now())
    assert serving.claims_nothing(W2)


def test_claim_while_redis_is_not_trusted_is_given_nothing_until_the_leader_has_confirmed(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    rows = join("first")
    store = take_turn(rows)
    desk = Desk(store, clock)
    desk.make_ready(listed(1), listed(2, priority=1))
    held = desk.claim(W1)
    rows._redis.call("SET", "trusted", "another run")
    assert desk.claims_nothing(W2)
    assert desk.claim(W1) == dataclasses.replace(held, version=desk.job(2).version)
    clock.advance(LEASE)
    assert desk.expire() == []  # nobody could touch while Redis was away
    assert rows.heartbeat({}).trusted is False
    store.restart_leases(desk.now, confirm=True)
    assert rows.heartbeat({}).trusted is True
    assert (desk.job(1).state, desk.job(2).state) == (RESERVING, LEASED)
    assert desk.claims_nothing(W2)
    desk.confirm(1)
    assert desk.claim(W2).uuid == uuid(1)


def test_restart_leases_after_all_was_lost_counts_on_from_what_was_seen(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    first = join("first")
    desk = Desk(take_turn(first), clock)
    desk.bring_one_of_each()
    asked = desk.store.sequence()
    keys = first._redis.server("KEYS", f"{first._redis.prefix}*")
    first._redis.server("DEL", *keys)
    with pytest.raises(Fenced):
        desk.put(listed(1))
    again = Desk(take_turn(first), clock)
    again.store.restart_leases(desk.now, confirm=True)
    assert again.store.sequence() > asked
    again.bring(READY)
    assert again.store.learn({uuid(1): JobFinding(OVER, "canceled")}, asked, desk.now) == []
    assert again.claim(W1).uuid == uuid(1)


def test_every_verb_of_more_jobs_than_a_slice_reaches_all(
    monkeypatch: pytest.MonkeyPatch, settings: Callable[..., Settings], clock: Clock
) -> None:
    monkeypatch.setattr(scheduler, "SLICE", 3)
    with contextlib.closing(STORES["redis"](settings())) as store:
        desk = Desk(store, clock)
        everything = [listed(number, rules=[f"n={number % 3}"]) for number in range(1, 11)]
        assert len(desk.put(*everything)) == 10
        assert len(desk.confirm(*range(1, 11))) == 10
        store.restart_leases(desk.now, confirm=False)
        assert len(store.unconfirmed("default", desk.now + RESERVATION / 2, 100)) == 10
        store.restart_leases(desk.now, confirm=True)
        assert store.stats()["states"][RESERVING] == 10
        desk.confirm(*range(1, 11))
        for number in range(5):
            desk.claim(worker(f"w{number}", query="n=0,n=1,n=2"))
        store.restart_leases(desk.now, confirm=True)
        assert (store.stats()["states"][RESERVING], store.stats()["states"][LEASED]) == (5, 5)
        clock.advance(LEASE)
        assert len(desk.expire()) == 5
        assert len(desk.confirm(*range(1, 11))) == 10
        clock.advance(RESERVATION)
        desk.expire()
        assert store.stats()["states"][RESERVING] == 10
        findings = {uuid(number): JobFinding(OVER, "canceled") for number in range(1, 11)}
        assert len(store.learn(findings, store.sequence(), desk.now)) == 10
        assert store.prune(desk.now + 1) == 10


def test_open_of_newer_schema_in_redis_goes_by_the_lowest_version_that_may_read_it(
    join: Callable[[str], RedisRows],
) -> None:
    rows = join("first")
    rows._redis.ask(["SET", "schema", "99"], ["SET", "min_reader", "98"])
    with pytest.raises(SettingsError, match=r"have schema 99, which this scheduler \(schema \d+\) cannot read"):
        join("second")
    rows._redis.call("SET", "min_reader", scheduler.REDIS_SCHEMA)
    join("second")
    assert rows._redis.call("GET", "schema") == "99"


#: What a scheduler of schema 1 left of three jobs: one that waits, one that a worker has, one to be finished.
SCHEMA_1_JOBS: list[dict[str, str]] = [
    {"state": "ready", "reason": "reserved", "tries": "[]"},
    {
        "state": "leased",
        "reason": "claimed",
        "claim": "c2",
        "worker": "w1",
        "session": "s1",
        "claimed_at": "1800000000.0",
        "lease_expires_at": "1800000030.0",
        "tries": '[{"how":"expire","reason":"its lease expired","ended_at":"1799999990.5","claimed_at":"1799999980.5",'
        '"counted":true,"judged":true,"worker":"w9"}]',
    },
    {
        "state": "reserving",
        "reason": "failed too often",
        "finish_detail": "intended",
        "tries": '[{"how":"complete","reason":"agent exited 1","ended_at":"1799999990.5","claimed_at":"1799999980.5",'
        '"exit_status":"1","counted":true,"judged":true,"worker":"w9"}]',
    },
]


def write_schema_1(line: scheduler.RedisConnections) -> None:
    line.ask(*(["DEL", key.removeprefix(line.prefix)] for key in line.scan()))
    for number, fields in enumerate(SCHEMA_1_JOBS, 1):
        row = {
            "uuid": uuid(number),
            "queue_key": "default",
            "agent_query_rules": '["os=linux"]',
            "rule_set": "queue=default,os=linux",
            "priority": "0",
            "scheduled_at": "1799999900.0",
            "about": '{"pipeline": {}, "build": {}, "step": {}}',
            "put_at": "1799999900.0",
            "reservation_expires_at": "1800000800.0",
            "reserved_at": "1799999901.0",
            "claims": "1",
            "attempts": "1",
            "version": str(number),
            "place": f"{2**63:020}{1799999900 * 10**6 + 10**17:018}{uuid(number)}",
        } | fields
        line.ask(["HSET", f"job:{uuid(number)}", *itertools.chain.from_iterable(row.items())])
        line.ask(
            ["SADD", "unfinished:default", uuid(number)], ["ZADD", "ready:queue=default,os=linux", 0, row["place"]]
        )
    worker_row = ["session", "s1", "retired", "s0\nold", "tags", "os=linux", "failures", "0", "held_until", "0"]
    line.ask(
        ["HSET", "worker:w1", *worker_row, "claims", "7", "ran", "5", "heard_at", "1800000000.0"],
        ["SADD", "workers", "w1"],
        ["SADD", "queues", "default"],
        ["SADD", "paused", "linux"],
        ["HSET", "stacks", "default", "vm1-default"],
        ["HSET", "totals", "ran default", 4],
        ["SET", "sequence", 3],
        ["SET", "schema", 1],
        ["SET", "answered_at", "1800000000.0"],
    )


def test_open_of_an_older_schema_in_redis_keeps_every_job_and_worker(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    write_schema_1(join("first")._redis)
    desk = Desk(take_turn(join("second")), clock)
    # The first leader has nothing that is ready handed out before Buildkite has confirmed it.
    assert [desk.job(number).state for number in (1, 2, 3)] == [RESERVING, LEASED, RESERVING]
    assert [job.uuid for job in desk.store.intents("default")] == [uuid(3)]
    assert "agent exited 1" in (desk.job(3).finish_detail or "")
    assert desk.job(2).tries[0]["claimed_at"] == 1799999980.5
    assert desk.store.stats()["paused"] == ["linux"]
    assert desk.store.stats()["totals"] == {"default": dict.fromkeys(Outcome, 0) | {Outcome.RAN: 4}}
    (row,) = desk.store.workers()
    assert (row.retired, row.claims, row.ran) == (("s0", "old"), 7, 5)
    desk.confirm(1)
    who = worker(query="os=linux")
    assert desk.claim(who).claim == "c2"  # it has that one
    desk.complete(desk.job(2), 0, who=who)
    assert desk.claim(worker("w2", query="os=linux")).uuid == uuid(1)
    rows = desk.store.rows
    assert isinstance(rows, RedisRows)
    assert rows._redis.ask(["GET", "schema"], ["GET", "min_reader"]) == ["3", "3"]


def test_open_of_an_older_schema_while_its_schedulers_run_is_refused(join: Callable[[str], RedisRows]) -> None:
    line = join("first")._redis
    write_schema_1(line)
    line.ask(["HSET", "schedulers", "vm1-older", "default"], ["ZADD", "alive", 1_900_000_000_000, "vm1-older"])
    with pytest.raises(SettingsError, match=r"older version still run \(vm1-older\); stop them first"):
        join("second")
    assert line.call("GET", "schema") == "1"


def test_open_of_schema_2_in_redis_changes_its_number_alone_once_its_schedulers_have_ended(
    join: Callable[[str], RedisRows],
) -> None:
    """Its schedulers cannot read the outcome of a job that an operator stopped."""
    line = join("first")._redis
    kept = {"rule_sets", "ready:queue=default", "line:ready:default"}  # as the change to schema 2 would remove them
    line.ask(["SET", "schema", 2], ["SET", "min_reader", 2], *(["SADD", key, "x"] for key in sorted(kept)))
    line.ask(["HSET", "schedulers", "vm1-older", "default"], ["ZADD", "alive", 1_900_000_000_000, "vm1-older"])
    with pytest.raises(SettingsError, match=r"older version still run \(vm1-older\); stop them first"):
        join("second")
    assert line.call("GET", "schema") == "2"
    line.call("ZREM", "alive", "vm1-older")
    join("second")
    assert line.ask(["GET", "schema"], ["GET", "min_reader"]) == ["3", "3"]
    assert kept <= {key.removeprefix(line.prefix) for key in line.scan()}


def test_remember_stacks_in_redis_under_another_key_is_refused_until_all_jobs_are_done(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    rows = join("first")
    store = take_turn(rows)
    desk = Desk(store, clock)
    store.remember_stacks({"default": "vm1-default", "linux": "vm1-linux"})
    desk.bring(RUNNING)
    assert store.remember_stacks({"linux": "vm2-linux"}) == {"default": 1}
    with pytest.raises(SettingsError, match="1 jobs of queue default are reserved as stack 'vm1-default'"):
        store.remember_stacks({"linux": "vm3-linux", "default": "vm2-default"})
    assert rows._redis.call("HGET", "stacks", "linux") == "vm2-linux"
    desk.learn(1, OVER)
    assert store.remember_stacks({"default": "vm2-default"}) == {}


def test_claim_in_redis_of_more_workers_than_are_kept_at_hand_finds_its_job(
    join: Callable[[str], RedisRows], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WORKERS", 4)
    rows = join("first")
    store = take_turn(rows)
    desk = Desk(store, clock)
    desk.make_ready(*(listed(number, rules=[f"n={number}"]) for number in range(10)))
    for number in range(10):
        assert desk.claim(worker(f"w{number}", query=f"n={number}")).uuid == uuid(number)
        assert len(rows._known.workers) <= 4


def test_complete_of_a_worker_that_is_forgotten_meanwhile_brings_no_part_of_its_row_back(
    join: Callable[[str], RedisRows], clock: Clock
) -> None:
    rows = join("first")
    desk = Desk(take_turn(rows), clock)
    desk.bring(LEASED)

    def step(_: str, job: Job | None, facts: scheduler.MoveContext) -> Move | None:
        assert job
        row = facts.worker(job.worker)
        assert row and rows.write_worker(row, None)
        return scheduler.make_move(
            "touch", job, by=dataclasses.replace(row, ran=1), is_state_change=False, touched_at=5.0
        )

    (move,) = rows.apply([uuid(1)], step, clock.now(), None)
    assert (desk.job().touched_at, move.job.touched_at) == (5.0, 5.0)
    assert (desk.store.workers(), rows._redis.call("KEYS", "worker:*")) == ([], [])


def commands_of_claim(store: Store, who: Worker, now: float) -> int:
    """How many commands a claim has Redis carry out."""

    def done() -> int:
        assert isinstance(store.rows, RedisRows)
        stats = store.rows._redis.server("INFO", "commandstats")
        return sum(each["calls"] for name, each in stats.items() if not name.startswith("cmdstat_info"))

    before = done()
    job = store.claim(who, now)
    assert job and who.profile.matches(RuleSet.read(job.rule_set))
    return done() - before


def crowded_redis(address: str, settings: Settings, clock: Clock, jobs: int, rule_sets: int) -> Store:
    """As `crowded`. It takes so long that the leader has to be heard of meanwhile."""
    store = lead(settings, address)
    for start in range(0, jobs, 10_000):
        numbers = range(start, min(jobs, start + 10_000))
        Desk(store, clock).make_ready(*(listed(number, rules=[f"n={number % rule_sets}"]) for number in numbers))
        assert isinstance(store.rows, RedisRows)
        beat = store.rows.heartbeat({})
        assert beat.trusted
        store = store.with_rows(store.rows.with_token(beat.token))  # another one where the turn ended meanwhile
    return store


def cost_in_redis(store: Store, who: Worker, now: float) -> int:
    """What a claim costs a worker that has claimed before."""
    first = store.claim(who, now)
    assert first
    store.learn({first.uuid: JobFinding(ACQUIRED, "running")}, store.sequence(), now)
    return commands_of_claim(store, who, now)


#: No command of a claim costs more than the logarithm of what its key holds.
CROWDS_IN_REDIS = CROWDS | {"very many jobs": (10_000, 1)}


@pytest.mark.long
def test_claim_in_redis_among_many_jobs_costs_what_it_costs_among_few(tmp_path: Path, clock: Clock) -> None:
    redis = RedisServer(tmp_path)
    try:
        costs = {}
        for name, (jobs, rule_sets) in CROWDS_IN_REDIS.items():
            settings = make_settings(tmp_path / name)
            with contextlib.closing(crowded_redis(redis.address, settings, clock, jobs, rule_sets)) as store:
                costs[name] = cost_in_redis(store, MEASURED, clock.now())
        assert set(costs.values()) == {costs["few"]}
        assert costs["few"] < 30
    finally:
        redis.stop()


def test_claim_in_redis_costs_one_look_for_each_rule_set_that_matches(tmp_path: Path, clock: Clock) -> None:
    settings = make_settings(tmp_path)
    with contextlib.closing(crowded_redis(the_redis().address, settings, clock, 300, 30)) as store:
        one, ten = (
            cost_in_redis(store, worker(f"w{count}", query=",".join(f"n={n}" for n in range(count))), clock.now())
            for count in (1, 10)
        )
    assert ten == one + 9
