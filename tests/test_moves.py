"""The rules of a job's life, without any store: each verb in each state, each refusal, and any sequence of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scheduler
from conftest import LONG_RUN
from scheduler import (
    LIFE,
    MOVES,
    AgentEnd,
    Finding,
    Fleet,
    Frozen,
    Hold,
    Holder,
    Job,
    JobDone,
    JobFinding,
    JobState,
    Move,
    Outcome,
    Profile,
    RuleSet,
    Settings,
    StaleClaim,
    Store,
    UnknownJob,
    WaitReason,
    Worker,
    WorkerHeld,
    WorkerNameTaken,
    WorkerRow,
    WorkerSighting,
)

RESERVING, READY, LEASED, RUNNING, DONE = JobState
NOW = 1_800_000_000.0
UUID = "018f0000-0000-4000-8000-000000000001"
LEASE, ACQUIRE, MAX_ATTEMPTS = 30.0, 120.0, 3
W1 = Worker("w1", "s1", Profile.of("queue=default"))
ROW = WorkerRow("w1", "s1", retired=("s0",), heard_at=NOW)


def listed() -> Job:
    return Job.from_api("default", {"id": UUID, "agent_query_rules": ["os=linux"]}, NOW - 60)


def in_state(state: JobState, **changes: Any) -> Job:
    """A job in that state, as the moves leave it."""
    job = listed()
    if state is not RESERVING:
        job = made(scheduler.confirm(job, None, NOW + 900, MAX_ATTEMPTS, NOW - 30)).job
    if state in (LEASED, RUNNING):
        job = dataclasses.replace(job, claims=1, **scheduler.leased(W1, "c1", LEASE, NOW - 20))
    if state is RUNNING:
        job = made(scheduler.learn(job, ROW, JobFinding(Finding.ACQUIRED, "running"), NOW - 10)).job
    if state is DONE:
        job = made(scheduler.learn(job, None, JobFinding(Finding.GONE, "limited"), NOW - 10)).job
    assert job.state is state
    return dataclasses.replace(job, **changes)


def made(move: Move | None) -> Move:
    assert move
    return move


# --- Each verb in each state ---

HOLDER = Holder(UUID, "c1", W1)
#: A freeze window, and the fields of a job that it holds.
WINDOW = Frozen("weekend", NOW + 60)
IN_WINDOW: dict[str, Any] = {
    "held_by": "freeze",
    "held_reason": "frozen",
    "held_until": NOW + 60,
    "held_note": "weekend",
}
CALLS: dict[str, Callable[[Job], Move | None]] = {
    "put": lambda job: scheduler.put(job, listed(), job.version, NOW),
    "confirm": lambda job: scheduler.confirm(job, ROW, NOW + 900, MAX_ATTEMPTS, NOW),
    "acquired": lambda job: scheduler.learn(job, ROW, JobFinding(Finding.ACQUIRED, "running"), NOW),
    "over": lambda job: scheduler.learn(job, ROW, JobFinding(Finding.OVER, "finished"), NOW),
    "gone": lambda job: scheduler.learn(job, ROW, JobFinding(Finding.GONE, "limited"), NOW),
    "lapsed": lambda job: scheduler.learn(job, ROW, JobFinding(Finding.LAPSED, "scheduled"), NOW),
    "finish": lambda job: scheduler.finish(job, NOW),
    "refuse_finish": lambda job: scheduler.refuse_finish(job, NOW),
    "claim_again": lambda job: scheduler.claim_again(job, W1, LEASE, ACQUIRE, NOW),
    "touch": lambda job: scheduler.touch(job, LEASE, NOW),
    "release": lambda job: scheduler.release(job, "no disk", NOW, ACQUIRE, NOW),
    "withdraw": lambda job: scheduler.withdraw(job, "client gone", "undelivered", NOW),
    "complete": lambda job: scheduler.complete(job, ROW, HOLDER, AgentEnd(1), NOW, NOW),
    "expire": lambda job: scheduler.expire(job, NOW, NOW + 1000),
    "stop": lambda job: by_operator(scheduler.stop, job),
    "allow": lambda job: by_operator(scheduler.allow, job),
    "first": lambda job: by_operator(scheduler.first, job),
    "freeze": lambda job: scheduler.freeze(job, WINDOW, None, NOW),
    "thaw": lambda job: scheduler.freeze(dataclasses.replace(job, **IN_WINDOW), None, None, NOW),
    "cancel": lambda job: scheduler.cancel(job, "", NOW),
}
WORD = scheduler.operator_note("ann@build1", "wrong branch", NOW)


def by_operator(act: Callable[[Job, dict[str, Any]], Move | None], job: Job) -> Move | None:
    """What an operator does to a job; nothing to one that is over, which is refused."""
    is_said = (act is scheduler.stop and job.stop) or (act is scheduler.allow and job.allow)
    if job.state is not DONE or is_said:  # what was said before may be said again
        return act(job, WORD)
    with pytest.raises(JobDone):
        act(job, WORD)
    return None


#: What each call does in each state: the verb of its move and the state that follows, or nothing.
EXPECTED: dict[str, dict[JobState, tuple[str, JobState]]] = {
    "put": {
        READY: ("lapse", RESERVING),
        LEASED: ("renew", LEASED),
        RUNNING: ("lapse", RESERVING),
        DONE: ("put", RESERVING),
    },
    "confirm": {RESERVING: ("confirm", READY), READY: ("renew", READY), LEASED: ("renew", LEASED)},
    "acquired": {state: ("acquire", RUNNING) for state in (RESERVING, READY, LEASED)},
    "over": {
        RESERVING: ("drop", DONE),
        READY: ("drop", DONE),
        LEASED: ("run", DONE),
        RUNNING: ("run", DONE),
    },
    "gone": {state: ("drop", DONE) for state in (RESERVING, READY, LEASED, RUNNING)},
    "lapsed": {READY: ("lapse", RESERVING)},
    "finish": {},
    "refuse_finish": {},
    "claim_again": {LEASED: ("claim", LEASED)},
    "touch": {LEASED: ("touch", LEASED), RUNNING: ("touch", RUNNING)},
    "release": {LEASED: ("release", RESERVING)},
    "withdraw": {LEASED: ("release", RESERVING)},
    "complete": {LEASED: ("complete", RESERVING), RUNNING: ("complete", RUNNING)},
    "expire": {READY: ("lapse", RESERVING), LEASED: ("expire", RESERVING)},
    "stop": {
        RESERVING: ("stop", RESERVING),
        READY: ("stop", RESERVING),
        LEASED: ("stop", LEASED),
        RUNNING: ("stop", RUNNING),
    },
    "allow": {state: ("allow", state) for state in (RESERVING, READY, LEASED, RUNNING)},
    "first": {state: ("first", state) for state in (RESERVING, READY, LEASED, RUNNING)},
    "freeze": {READY: ("freeze", READY)},
    "thaw": {READY: ("thaw", READY)},
    "cancel": {},
}


def test_call_table_has_every_call() -> None:
    assert CALLS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("call", CALLS)
def test_call_in_each_state_does_as_the_table_says_and_no_more(call: str, state: JobState) -> None:
    job = in_state(state)
    move = CALLS[call](job)
    assert (move and (move.verb, move.job.state)) == EXPECTED[call].get(state)
    assert job == in_state(state)  # a row is never changed in place


def test_put_of_a_job_that_is_new_writes_it_down() -> None:
    assert scheduler.put(None, listed(), 0, NOW) == Move("put", "", listed())


@pytest.mark.parametrize("state", [READY, LEASED, RUNNING, DONE])
def test_put_of_a_job_that_changed_since_the_question_leaves_it_alone(state: JobState) -> None:
    assert scheduler.put(in_state(state, version=8), listed(), 7, NOW) is None


def test_put_of_a_job_that_could_not_be_reserved_waits_for_its_time() -> None:
    dropped = made(
        scheduler.learn(in_state(RESERVING), None, JobFinding(Finding.GONE, "reserved", "not_ours"), NOW)
    ).job
    assert scheduler.put(dropped, listed(), 0, NOW + scheduler.SHUN_SECONDS - 1) is None
    assert made(scheduler.put(dropped, listed(), 0, NOW + scheduler.SHUN_SECONDS)).job.not_before == 0.0


@pytest.mark.parametrize("state", [READY, LEASED])
def test_put_of_a_job_that_its_source_lists_until_an_agent_has_it_leaves_it_alone(state: JobState) -> None:
    assert scheduler.put(in_state(state), listed(), 7, NOW, is_reserved=False) is None
    assert scheduler.put(in_state(state), listed(), 7, NOW) is not None  # elsewhere its reservation has lapsed


@pytest.mark.parametrize("state", [RUNNING, DONE])
def test_put_of_a_job_without_an_agent_sends_it_back_whatever_its_source(state: JobState) -> None:
    assert made(scheduler.put(in_state(state), listed(), 7, NOW, is_reserved=False)).job.state is RESERVING


def test_life_allows_every_move_of_the_table() -> None:
    moves = {(verb, start, end) for of_call in EXPECTED.values() for start, (verb, end) in of_call.items()}
    assert all((start, end) in LIFE[verb] for verb, start, end in moves)
    assert {verb for verb, _, _ in moves} | {"finish", "defer", "cancel", "decide", "review"} == LIFE.keys()


def test_moves_are_those_of_the_life_of_a_job() -> None:
    assert MOVES == {
        RESERVING: {READY, RUNNING, DONE},
        READY: {LEASED, RESERVING, RUNNING, DONE},
        LEASED: {RESERVING, RUNNING, DONE},
        RUNNING: {RESERVING, DONE},
        DONE: {RESERVING},
    }


def test_move_that_the_life_does_not_allow_is_a_fault() -> None:
    with pytest.raises(ValueError, match="confirm does not make running ready"):
        scheduler.make_move("confirm", in_state(RUNNING), state=READY)


# --- Jobs with an intent ---


def with_intent() -> Job:
    """One that failed too often."""
    job = in_state(RESERVING)
    for number in range(MAX_ATTEMPTS):
        confirmed = made(scheduler.confirm(job, ROW, NOW + 900, MAX_ATTEMPTS, NOW)).job
        who = dataclasses.replace(W1, name=f"w{number}")
        taken = dataclasses.replace(confirmed, **scheduler.leased(who, f"c{number}", LEASE, NOW))
        job = made(scheduler.complete(taken, ROW, Holder(UUID, f"c{number}"), AgentEnd(1), NOW, NOW)).job
    job = made(scheduler.confirm(job, ROW, NOW + 900, MAX_ATTEMPTS, NOW)).job
    assert job.finish_detail and job.state is RESERVING
    return job


INTENDED: dict[str, tuple[str, JobState] | None] = dict.fromkeys(CALLS) | {
    "acquired": ("acquire", RUNNING),
    "over": ("finish", DONE),
    "gone": ("drop", DONE),
    "finish": ("finish", DONE),
    "refuse_finish": ("defer", RESERVING),
    **{act: (act, RESERVING) for act in ("stop", "allow", "first")},
}


@pytest.mark.parametrize("call", CALLS)
def test_call_about_a_job_with_an_intent_never_hands_it_out(call: str) -> None:
    move = CALLS[call](with_intent())
    assert (move and (move.verb, move.job.state)) == INTENDED[call]


# --- Jobs that an operator stopped ---


def stopped(job: Job) -> Job:
    return made(scheduler.stop(job, WORD)).job


#: What each call does to a stopped job, where that differs from a job that nobody stopped.
STOPPED: dict[str, dict[JobState, tuple[str, JobState] | None]] = {
    "put": {READY: None},
    "confirm": {RESERVING: ("confirm", RESERVING), READY: None},
    "finish": {READY: ("finish", DONE)},
    "over": {READY: ("finish", DONE)},
    "lapsed": {READY: None},
    "refuse_finish": {READY: ("defer", RESERVING)},
    "claim_again": {LEASED: ("expire", RESERVING)},
    "expire": {READY: None},
    "stop": dict.fromkeys((RESERVING, READY, LEASED, RUNNING)),
    "allow": {READY: ("allow", RESERVING)},
    "first": {READY: ("first", RESERVING)},
    "freeze": {READY: None},
    "thaw": {READY: None},
    "cancel": {RUNNING: ("cancel", RUNNING)},
}


@pytest.mark.parametrize("state", [RESERVING, READY, LEASED, RUNNING])
@pytest.mark.parametrize("call", CALLS)
def test_call_about_a_stopped_job_never_hands_it_out_nor_forgets_the_stop(call: str, state: JobState) -> None:
    move = CALLS[call](stopped(in_state(state)))
    assert (move and (move.verb, move.job.state)) == (EXPECTED[call] | STOPPED.get(call, {})).get(state)
    assert move is None or (WORD.items() <= (move.job.stop or {}).items() and move.job.state not in (READY,))


def test_cancel_keeps_the_last_problem_until_buildkite_cancels_the_job_and_begins_anew_with_another_agent() -> None:
    job = stopped(in_state(RUNNING))
    refused = made(scheduler.cancel(job, "401 from Buildkite", NOW)).job
    assert refused.stop == WORD | {"problem": "401 from Buildkite"}
    assert scheduler.cancel(refused, "401 from Buildkite", NOW + 15) is None
    cancelled = made(scheduler.cancel(refused, "", NOW + 30)).job
    assert cancelled.stop == WORD | {"cancelled_at": NOW + 30}
    assert scheduler.cancel(cancelled, "", NOW + 31) is None
    assert scheduler.is_to_cancel(dataclasses.replace(cancelled, acquired_at=NOW + 60))


@pytest.mark.parametrize(
    ("has_api_token", "seconds", "cancelled", "expected"),
    [(False, 0, False, True), (True, 29, False, False), (True, 30, False, True), (True, 30, True, False)],
)
def test_worker_is_to_cancel_a_stopped_job_at_once_or_when_buildkite_has_not_answered_for_30_s(
    has_api_token: bool, seconds: float, cancelled: bool, expected: bool
) -> None:
    job = stopped(in_state(RUNNING))
    job = made(scheduler.cancel(job, "", NOW)).job if cancelled else job
    assert scheduler.is_worker_to_cancel(job, has_api_token, NOW + seconds) is expected
    assert not scheduler.is_worker_to_cancel(in_state(RUNNING), has_api_token, NOW + 1000)
    assert not scheduler.is_worker_to_cancel(stopped(in_state(LEASED)), has_api_token, NOW + 1000)


def test_stop_of_a_ready_job_is_to_be_finished_with_the_operators_words() -> None:
    job = stopped(in_state(READY, held_by="policy", held_until=NOW + 60))
    assert job.finish_detail == "Stopped by ann@build1 at 2027-01-15T08:00:00.000Z: wrong branch"
    assert (job.held_by, job.not_before) == (None, 0.0)
    over = made(scheduler.finish(job, NOW))
    assert (over.code, over.job.outcome) == ("stopped", Outcome.STOPPED)
    heard = made(scheduler.learn(job, None, JobFinding(Finding.OVER, "finished"), NOW))
    assert (heard.code, heard.job.outcome) == ("stopped", Outcome.STOPPED)
    ended = made(scheduler.learn(job, None, JobFinding(Finding.OVER, "canceled"), NOW))
    assert ended.job.outcome is Outcome.DROPPED


def test_stop_of_a_job_that_is_not_proved_free_is_finished_only_once_it_is() -> None:
    job = stopped(in_state(RESERVING))
    assert job.finish_detail is None and scheduler.finish(job, NOW) is None
    proved = made(scheduler.confirm(job, None, NOW + 900, MAX_ATTEMPTS, NOW))
    assert (proved.code, proved.job.state) == ("stopped", RESERVING)
    assert made(scheduler.finish(proved.job, NOW)).job.outcome is Outcome.STOPPED
    aside = in_state(RESERVING, held_by="machine", held_reason="put_aside", held_until=NOW + 60, not_before=NOW + 60)
    assert made(scheduler.confirm(stopped(aside), None, NOW + 900, MAX_ATTEMPTS, NOW)).job.finish_detail
    early = in_state(
        RESERVING, held_by="buildkite", held_reason="runnable_at", held_until=NOW + 60, not_before=NOW + 60
    )
    assert scheduler.confirm(stopped(early), None, NOW + 900, MAX_ATTEMPTS, NOW) is None


def test_stop_of_a_leased_job_counts_no_attempt_and_blames_nobody() -> None:
    job = stopped(in_state(LEASED))
    late = NOW + ACQUIRE
    assert made(scheduler.release(in_state(LEASED), "stopped", late, ACQUIRE, late)).job.attempts == 1
    released = made(scheduler.release(job, "stopped", late, ACQUIRE, late))
    assert (released.job.attempts, released.job.tries[-1]["judged"]) == (0, True)
    confirmed = made(scheduler.confirm(released.job, ROW, NOW + 900, MAX_ATTEMPTS, NOW))
    assert confirmed.job.finish_detail and confirmed.worker is None


def test_stop_stands_when_an_agent_has_the_job_after_all_and_when_it_comes_back() -> None:
    job = made(scheduler.learn(stopped(in_state(READY)), ROW, JobFinding(Finding.ACQUIRED, "running"), NOW)).job
    assert (job.state, job.stop, job.finish_detail) == (RUNNING, WORD, None)
    lost = made(scheduler.put(job, listed(), 0, NOW)).job
    assert (lost.state, lost.stop, lost.finish_detail) == (RESERVING, WORD, None)
    gone = made(scheduler.learn(lost, None, JobFinding(Finding.GONE, "limited"), NOW)).job
    again = made(scheduler.put(gone, listed(), 0, NOW)).job
    assert (again.state, again.stop) == (RESERVING, WORD)
    ran = made(scheduler.learn(job, ROW, JobFinding(Finding.OVER, "finished"), NOW)).job
    assert (ran.outcome, ran.stop) == (Outcome.RAN, WORD)


def test_stop_said_twice_keeps_the_first_word() -> None:
    assert scheduler.stop(stopped(in_state(READY)), scheduler.operator_note("bob", "me too", NOW)) is None


# --- Jobs that an operator allowed, or put first ---


def test_allow_lifts_the_jobs_hold_by_people_and_leaves_that_of_others() -> None:
    for owner in ("operator", "freeze", "policy"):
        job = in_state(READY, held_by=owner, held_reason="frozen", held_until=NOW + 60)
        move = made(scheduler.allow(job, WORD))
        assert (move.job.held_by, move.is_state_change) == (None, True)
    for owner in ("buildkite", "machine"):
        assert made(scheduler.allow(in_state(RESERVING, held_by=owner), WORD)).job.held_by == owner


def test_allow_stands_when_the_job_is_listed_again() -> None:
    job = made(scheduler.allow(in_state(READY), WORD)).job
    rules = RuleSet.read(job.rule_set)
    assert (rules.allowed, str(rules)) == (True, "allow:queue=default,os=linux")
    assert dataclasses.replace(rules, allowed=False) == RuleSet.of("default", ["os=linux"])
    gone = made(scheduler.learn(job, None, JobFinding(Finding.GONE, "limited"), NOW)).job
    again = made(scheduler.put(gone, listed(), 0, NOW)).job
    assert (again.allow, again.rule_set) == (WORD, job.rule_set)
    assert scheduler.allow(job, WORD) is None


def test_first_puts_the_last_one_at_the_head_and_keeps_its_priority_at_buildkite() -> None:
    urgent = in_state(READY, priority=2**31, scheduled_at=0.0)
    one = made(scheduler.first(in_state(READY, priority=-3), WORD)).job
    other = made(scheduler.first(in_state(READY), scheduler.operator_note("bob", "no, this", NOW + 1))).job
    assert sorted([urgent, one, other], key=lambda job: job.order) == [other, one, urgent]
    assert [job.listed_priority for job in (urgent, one, other)] == [2**31, -3, 0]
    again = made(scheduler.first(one, scheduler.operator_note("ann", "this", NOW + 2))).job
    assert again.order < other.order and again.listed_priority == -3


def test_first_stands_when_buildkite_lists_another_priority() -> None:
    job = made(scheduler.first(in_state(RESERVING), WORD)).job
    changed = made(scheduler.put(job, dataclasses.replace(listed(), priority=7), 0, NOW)).job
    assert (changed.order, changed.listed_priority) == (job.order, 7)
    gone = made(scheduler.learn(job, None, JobFinding(Finding.GONE, "limited"), NOW)).job
    again = made(scheduler.put(gone, dataclasses.replace(listed(), priority=9), 0, NOW)).job
    assert (again.order, again.listed_priority) == (job.order, 9)


def test_finish_that_buildkite_refuses_is_put_off() -> None:
    move = made(scheduler.refuse_finish(with_intent(), NOW))
    assert (move.job.not_before, move.is_state_change) == (NOW + scheduler.REFUSED_FINISH_SECONDS, False)


# --- Who may ---

REFUSALS: list[tuple[str, Holder, JobState | None, type[Exception] | None]] = [
    # what it shows, who speaks, the job's state (None: it is not known), the refusal
    ("the claim itself", Holder(UUID, "c1"), LEASED, None),
    ("the claim, by its worker", Holder(UUID, "c1", W1), LEASED, None),
    ("a claim that was never given", Holder(UUID, "c9", W1), LEASED, StaleClaim),
    ("an empty claim", Holder(UUID, "", W1), LEASED, StaleClaim),
    ("no claim, by its worker", Holder(UUID, None, W1), LEASED, StaleClaim),
    ("no claim, by another", Holder(UUID, None, dataclasses.replace(W1, name="w2")), LEASED, StaleClaim),
    ("no claim, by nobody", Holder(UUID, None), LEASED, StaleClaim),
    ("no claim, by a worker without a name", Holder(UUID, None, Worker("", "", W1.profile)), LEASED, StaleClaim),
    ("a session that was replaced", Holder(UUID, "c1", dataclasses.replace(W1, session="s0")), LEASED, WorkerNameTaken),
    ("a job that is not known", Holder(UUID, "c1", W1), None, UnknownJob),
    ("a job that nobody holds", Holder(UUID, "c1", W1), READY, StaleClaim),
    ("a job that changed since", Holder(UUID, "c1", asked=-1), LEASED, StaleClaim),
    ("a job that an agent has", Holder(UUID, "c1", W1), RUNNING, None),
]


@pytest.mark.parametrize(
    ("holder", "state", "refusal"), [each[1:] for each in REFUSALS], ids=[each[0] for each in REFUSALS]
)
def test_check_holder_lets_the_holder_of_the_claim_speak_alone(
    holder: Holder, state: JobState | None, refusal: type[Exception] | None
) -> None:
    job = in_state(state) if state else None
    if refusal:
        with pytest.raises(refusal):
            scheduler.check_holder(job, ROW, holder, NOW, completed_too=False)
    else:
        assert scheduler.check_holder(job, ROW, holder, NOW, completed_too=False) is job


def test_check_holder_of_a_claim_that_was_completed_lets_it_be_completed_again_alone() -> None:
    job = made(scheduler.complete(in_state(LEASED), ROW, HOLDER, AgentEnd(0), NOW, NOW)).job
    assert scheduler.check_holder(job, ROW, HOLDER, NOW, completed_too=True) is job
    with pytest.raises(StaleClaim):
        scheduler.check_holder(job, ROW, HOLDER, NOW, completed_too=False)


def test_check_holder_of_the_worker_s_name_alone_lets_it_complete() -> None:
    job, holder = in_state(LEASED), Holder(UUID, None, W1)
    assert scheduler.check_holder(job, ROW, holder, NOW, completed_too=True) is job


def test_enter_by_a_new_session_replaces_the_old_one_which_may_return_after_silence() -> None:
    new, old = dataclasses.replace(W1, session="s2"), W1
    row = scheduler.enter(ROW, new, NOW)
    assert (row.session, row.retired) == ("s2", ("s0", "s1"))
    with pytest.raises(WorkerNameTaken):
        scheduler.enter(row, old, NOW + scheduler.SESSION_SECONDS)
    assert scheduler.enter(row, old, NOW + scheduler.SESSION_SECONDS + 1).session == "s1"
    assert scheduler.enter(row, new, NOW) is row


# --- Who is to blame ---


ENDED = {"counted": True, "exit_status": 1, "claimed_at": NOW - 60}


def test_blame_doubles_the_time_up_to_five_minutes_and_absolve_forgets_it() -> None:
    row, seconds = WorkerRow("w1"), []
    for _ in range(10):
        row = scheduler.count_failure(row, ENDED, NOW)
        seconds.append(row.held_until - NOW)
    assert seconds == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    forgiven = scheduler.clear_failures(row)
    assert forgiven and (forgiven.failures, forgiven.held_until, forgiven.faults) == (0, 0.0, 0)
    assert scheduler.clear_failures(forgiven) is None


@pytest.mark.parametrize(
    ("changes", "is_hosts"),
    [
        ({}, True),
        ({"exit_status": 0}, False),
        ({"exit_status": None}, True),
        ({"counted": False}, False),
        ({"counted": False, "claimed_at": NOW - 11}, False),
        ({"counted": False, "claimed_at": NOW - 10}, True),
        ({"counted": False, "claimed_at": NOW - 10, "exit_status": 0}, False),
        ({"counted": False, "claimed_at": NOW - 10, "exit_status": None}, False),
    ],
)
def test_blame_takes_what_ends_before_buildkite_is_asked_again_for_the_hosts_fault(
    changes: dict[str, object], is_hosts: bool
) -> None:
    row = scheduler.count_failure(ROW, ENDED | changes, NOW)
    assert (row.failures, row.faults) == (ROW.failures + 1, int(is_hosts))


@pytest.mark.parametrize(
    ("status", "answered_at", "counted", "held"),
    [
        (1, NOW, True, True),
        (0, NOW, True, False),
        (27, NOW, False, False),
        (1, NOW - 100, False, True),
    ],
    ids=["failed", "said nothing", "rejected", "Buildkite was silent"],
)
def test_complete_counts_what_is_the_job_s_fault(status: int, answered_at: float, counted: bool, held: bool) -> None:
    move = made(scheduler.complete(in_state(LEASED), ROW, HOLDER, AgentEnd(status), answered_at, NOW))
    assert (move.job.attempts, move.job.tries[-1]["counted"]) == (int(counted), counted)
    assert bool(move.worker and move.worker.held_until > NOW) is held


def test_withdraw_without_a_token_waits_longer_each_time_in_a_row() -> None:
    job, waits = in_state(LEASED), []
    for _ in range(8):
        job = made(scheduler.withdraw(job, "no token", "no_token", NOW)).job
        waits.append(job.not_before - NOW)
        job = dataclasses.replace(job, **scheduler.leased(W1, "c1", LEASE, NOW))
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    job = made(scheduler.withdraw(job, "client gone", "undelivered", NOW)).job
    job = dataclasses.replace(job, **scheduler.leased(W1, "c1", LEASE, NOW))
    assert made(scheduler.withdraw(job, "no token", "no_token", NOW)).job.not_before - NOW == 2


@pytest.mark.parametrize("code", ["unanswerable", "undelivered", "no_tokens"])
def test_withdraw_of_what_cannot_be_answered_puts_the_job_aside_from_the_third_time_in_a_row(code: str) -> None:
    job, holds = in_state(LEASED), []
    for _ in range(12):
        job = made(scheduler.withdraw(job, "year 0", code, NOW)).job
        holds.append((job.held_reason, job.not_before - NOW if job.not_before else 0))
        assert (job.state, job.attempts, job.held_until) == (RESERVING, 0, job.not_before or None)
        job = dataclasses.replace(job, **scheduler.leased(W1, "c1", LEASE, NOW), **scheduler.NOT_HELD)
    aside = [("put_aside", seconds) for seconds in (60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600)]
    assert holds == ([(None, 0)] * 2 + aside if code == "unanswerable" else [(None, 0)] * 12)
    # Another end of a claim in between: the count begins anew.
    job = made(scheduler.release(job, "no disk", NOW, ACQUIRE, NOW)).job
    job = dataclasses.replace(job, **scheduler.leased(W1, "c1", LEASE, NOW))
    assert made(scheduler.withdraw(job, "year 0", code, NOW)).job.held_by is None


def test_claim_again_by_a_worker_that_never_got_the_answer_puts_the_job_aside_from_the_third_time_in_a_row() -> None:
    job, holds = in_state(LEASED), []
    for _ in range(4):
        late = NOW + ACQUIRE
        assert made(scheduler.claim_again(job, W1, LEASE, ACQUIRE, late - 20)).code == "again"
        job = made(scheduler.claim_again(job, W1, LEASE, ACQUIRE, late + 1)).job
        holds.append(job.held_reason)
        job = dataclasses.replace(job, **scheduler.leased(W1, "c1", LEASE, NOW), **scheduler.NOT_HELD)
    assert holds == [None, None, "put_aside", "put_aside"]


def test_confirm_before_a_hold_is_over_changes_nothing_and_lifts_it_then() -> None:
    held = in_state(RESERVING, held_by="machine", held_reason="put_aside", held_until=NOW + 60, not_before=NOW + 60)
    assert scheduler.confirm(held, None, NOW + 900, MAX_ATTEMPTS, NOW + 59) is None
    job = made(scheduler.confirm(held, None, NOW + 900, MAX_ATTEMPTS, NOW + 60)).job
    assert (job.state, job.held_by, job.held_reason, job.held_until) == (READY, None, None, None)
    # One that has no end, or whose end is to come, holds what is ready; one that an older scheduler left is lifted.
    for until, by in ((None, "policy"), (NOW + 1, "policy"), (NOW, None)):
        ready = in_state(READY, held_by="policy", held_until=until)
        assert made(scheduler.confirm(ready, None, NOW + 900, MAX_ATTEMPTS, NOW)).job.held_by == by


# --- Holds ---


def held(target: str, **changes: Any) -> Hold:
    """By people."""
    return dataclasses.replace(Hold(target, "operator", "paused", NOW, by="ann@build1", note="disk swap"), **changes)


PAUSED = Hold("queue:default", "buildkite", "queue_paused")
ON_GPU = Worker("w2", "s2", Profile.of("queue=default,gpu=a100,os=linux"), host="rack3-7")
GPU_ROW = WorkerRow("w2", "s2", tags="gpu=a100,os=linux", host="rack3-7")
HOLDS: list[tuple[str, Job | RuleSet, WorkerRow | Worker | None, list[Hold], str | None]] = [
    # what it shows, the job, the worker, the holds, what keeps them apart
    ("nothing", in_state(READY), ROW, [], None),
    ("a paused queue", in_state(READY), ROW, [PAUSED], "queue:default"),
    ("a paused queue, for a rule set", RuleSet.of("default", []), ROW, [PAUSED], "queue:default"),
    ("another queue", RuleSet.of("linux", []), ROW, [PAUSED], None),
    ("a hold that is over", in_state(READY), ROW, [dataclasses.replace(PAUSED, until=NOW)], None),
    ("a hold that will be over", in_state(READY), ROW, [dataclasses.replace(PAUSED, until=NOW + 1)], "queue:default"),
    ("a hold of the job", in_state(READY, held_by="policy"), ROW, [], f"job:{UUID}"),
    ("a worker that fails", in_state(READY), dataclasses.replace(ROW, held_until=NOW + 1), [], "worker:w1"),
    ("one that failed", in_state(READY), dataclasses.replace(ROW, held_until=NOW), [], None),
    ("no tokens", in_state(READY), W1, [Hold("tokens:default", "machine", "no_tokens")], None),
    (
        "no tokens for who needs one",
        in_state(READY),
        dataclasses.replace(W1, needs_token=True),
        [Hold("tokens:default", "machine", "no_tokens")],
        "tokens:default",
    ),
    (
        "a hold of people that an allowed job passes",
        dataclasses.replace(in_state(READY), allow=WORD, held_by="policy"),
        ROW,
        [dataclasses.replace(PAUSED, owner="operator")],
        None,
    ),
    (
        "a hold of people, for allowed rules",
        dataclasses.replace(RuleSet.of("default", []), allowed=True),
        ROW,
        [dataclasses.replace(PAUSED, owner="operator")],
        None,
    ),
    ("a hold of people", in_state(READY), ROW, [dataclasses.replace(PAUSED, owner="operator")], "queue:default"),
    ("no hold of Buildkite's", dataclasses.replace(in_state(READY), allow=WORD), ROW, [PAUSED], "queue:default"),
    ("a kind that is not known", in_state(READY), ROW, [Hold("rack:7", "robot", "moved")], "rack:7"),
    ("all queues", in_state(READY), ROW, [held("queue:*")], "queue:*"),
    ("some queues", RuleSet.of("linux-arm", []), ROW, [held("queue:linux-*")], "queue:linux-*"),
    ("some other queues", in_state(READY), ROW, [held("queue:linux-*")], None),
    ("a worker", in_state(READY), ON_GPU, [held("worker:w2")], "worker:w2"),
    ("a worker, by its row", in_state(READY), GPU_ROW, [held("worker:w2")], "worker:w2"),
    ("another worker", in_state(READY), ON_GPU, [held("worker:w")], None),
    ("a host", in_state(READY), ON_GPU, [held("host:rack3-7")], "host:rack3-7"),
    ("a host, by its row", in_state(READY), GPU_ROW, [held("host:rack3-7")], "host:rack3-7"),
    ("some hosts", in_state(READY), ON_GPU, [held("host:rack3-*")], "host:rack3-*"),
    ("all hosts, for a worker that tells none", in_state(READY), W1, [held("host:*")], None),
    (
        "all workers, for one without a name",
        in_state(READY),
        dataclasses.replace(W1, name=""),
        [held("worker:*")],
        None,
    ),
    ("a tag", in_state(READY), ON_GPU, [held("tag:gpu=a100")], "tag:gpu=a100"),
    ("a tag, by its row", in_state(READY), GPU_ROW, [held("tag:gpu=a100")], "tag:gpu=a100"),
    ("any value of a tag", in_state(READY), ON_GPU, [held("tag:gpu=*")], "tag:gpu=*"),
    ("another value of a tag", in_state(READY), ON_GPU, [held("tag:gpu=h100")], None),
    ("a tag, for who has none", in_state(READY), ROW, [held("tag:*=*")], None),
    ("letters that a glob might mean", in_state(READY), ON_GPU, [held("host:rack[0-9]-?"), held("host:rack?-*")], None),
    (
        "a name with such letters",
        in_state(READY),
        dataclasses.replace(W1, host="a[1]"),
        [held("host:a[1]")],
        "host:a[1]",
    ),
    ("a worker, when none is asked about", in_state(READY), None, [held("worker:*"), held("tag:*=*")], None),
    (
        "one of two holds that is over",
        in_state(READY),
        ON_GPU,
        [held("host:*", until=NOW), held("worker:w2")],
        "worker:w2",
    ),
]


@pytest.mark.parametrize(
    ("job", "worker", "holds", "target"), [each[1:] for each in HOLDS], ids=[each[0] for each in HOLDS]
)
def test_blocked_names_what_keeps_a_job_from_a_worker(
    job: Job | RuleSet, worker: WorkerRow | Worker | None, holds: list[Hold], target: str | None
) -> None:
    hold = scheduler.blocked(job, worker, holds, NOW)
    assert (hold and hold.target) == target


@pytest.mark.parametrize(
    ("found", "wanted", "replace", "until"),
    [
        (None, NOW + 60, False, NOW + 60),
        (NOW, NOW + 60, False, NOW + 60),  # it is over
        (NOW + 60, NOW + 120, False, NOW + 120),
        (NOW + 120, NOW + 60, False, NOW + 120),
        (math.inf, NOW + 60, False, math.inf),
        (NOW + 60, math.inf, False, math.inf),
        (NOW + 120, NOW + 60, True, NOW + 60),
        (math.inf, NOW + 60, True, NOW + 60),
    ],
)
def test_held_anew_shortens_no_hold_unless_it_replaces_it(
    found: float | None, wanted: float, replace: bool, until: float
) -> None:
    """Infinite: until somebody ends it."""
    first = None if found is None else held("worker:w1", since=NOW - 9, until=None if found == math.inf else found)
    second = held("worker:w1", until=None if wanted == math.inf else wanted, by="bob", note="reboot")
    hold = scheduler.combine_holds(first, second, replace=replace, now=NOW)
    assert (hold.until or math.inf) == until
    is_longer = first and not replace and found not in (until, NOW)
    assert hold == (first if until == found else dataclasses.replace(second, since=NOW - 9 if is_longer else NOW))


def test_show_a_hold_names_who_since_when_and_why() -> None:
    told = str(held("worker:w1", until=NOW + 60))
    assert told == "paused by ann@build1 since 2027-01-15T08:00:00Z until 2027-01-15T08:01:00Z: disk swap"
    assert str(Hold("worker:w1", "operator", "drained")) == "drained by the operator"


class PlainRows:
    """Rows in memory, for claims: the first `ready` job in line, and the holds of people, as they stand."""

    def __init__(self, jobs: list[Job], rows: list[WorkerRow], holds: tuple[Hold, ...]):
        self._jobs, self._workers = {job.uuid: job for job in jobs}, {row.name: row for row in rows}
        self._holds = scheduler.Holds(1, holds)

    def rule_sets(self, *, fresh: bool = False) -> tuple[object, set[str]]:
        return 1, {job.rule_set for job in self._jobs.values()}

    def worker_of(self, worker: Worker) -> WorkerRow | None:
        return self._workers.get(worker.name)

    def known_holds(self) -> scheduler.Holds:
        return self._holds

    holds = known_holds

    def take(
        self, rule_sets: list[str], lease: dict[str, Any], row: WorkerRow | None, holds: object, now: float
    ) -> scheduler.TakeResult:
        ready = [job for job in self._jobs.values() if job.rule_set in rule_sets and not job.held_by]
        return scheduler.TakeResult(min(ready, key=lambda job: job.order, default=None))

    def counts(self) -> scheduler.Counts:
        jobs = self._jobs.values()
        return scheduler.Counts([scheduler.RuleSetCount(READY, job.rule_set, 1, NOW) for job in jobs], [], {}, [])

    def workers(self) -> list[WorkerRow]:
        return [*self._workers.values()]


PUT_ASIDE: dict[str, Any] = {"held_by": "machine", "held_reason": "put_aside"}
HELD_KINDS: dict[int, dict[str, Any]] = {3: IN_WINDOW, 7: PUT_ASIDE}
#: What a policy says of some of them.
SAID = [
    scheduler.Decision("run", require=("host=rack1-1",)),
    scheduler.Decision("run", "", 60.0, avoid=("host=rack1-2", "worker=w0")),
    scheduler.Decision("run", "", 60.0, ("os=*",), ("host=rack1-1",)),
    scheduler.Decision("hold", "later", 60.0),
]


def said_of(job: Job, number: int) -> Job:
    match number % 7:
        case 4:
            return made(scheduler.review(job, "v1", NOW)).job
        case 5:
            return made(scheduler.fail_to_decide(job, "KeyError at policy.py:2", "v1", 1.0, NOW)).job
        case 6:
            return job
    return made(scheduler.decide(job, SAID[number % 7], "v1", {}, NOW)).job


#: Jobs of all kinds that fleets are made of.
POOL = [
    dataclasses.replace(
        Job.from_api(
            queue, {"id": UUID[:-4] + f"{number:04}", "agent_query_rules": rules, "priority": number % 3}, NOW
        ),
        state=READY,
        **HELD_KINDS.get(number % 8, {}),
    )
    for number, (queue, rules) in enumerate(
        itertools.product(["default", "linux"], [[], [], ["os=linux"], ["gpu=a100"], ["gpu=*"]] * 3)
    )
]


POOL += [
    said_of(dataclasses.replace(job, uuid=f"{job.uuid[:-6]}{number:06}"), number)
    for number, job in enumerate(POOL[::2], 900_000)
    if not job.held_by
]


def random_fleet(random: Random) -> tuple[list[Job], list[Worker], list[WorkerRow], list[Hold]]:
    jobs = random.sample(POOL, random.randint(1, 4))
    workers, rows = [], []
    for number in range(random.randint(1, 4)):
        tags = random.sample([",os=linux", ",gpu=a100", ",gpu=t4"], random.randint(0, 2))
        query = f"queue={random.choice(['default', 'linux'])}{''.join(tags)}"
        name = random.choice([f"w{number}", f"w{number}", ""])
        needs_token, host = random.random() < 0.3, random.choice(["", "rack1-1", "rack1-2", "rack2-1"])
        worker = Worker(name, "s", Profile.of(query), needs_token, host)
        workers.append(worker)
        if name:
            row = scheduler.enter(None, worker, NOW)
            needs_person = random.choice(["", "", "", "7c1f0e2a"])
            held_until = NOW + random.choice([-1, -1, -1, 1])
            rows.append(dataclasses.replace(row, held_until=held_until, needs_person=needs_person))
    targets = ["worker:w0", "worker:w*", "host:rack1-1", "host:rack1-*", "host:*", "queue:default", "queue:*"]
    targets += ["tag:gpu=a100", "tag:gpu=*", "tag:os=linux", "tokens:default", "tokens:linux", "rack:1"]
    weights = [8] * (len(targets) - 3) + [8, 8, 1]
    times = [None, NOW - 1, NOW, NOW + 1]
    count = random.choice([0, 1, 1, 2, 3])
    holds = [held(target, until=random.choice(times)) for target in random.choices(targets, weights, k=count)]
    return jobs, workers, rows, holds


def fleet_of(store: Store, workers: list[Worker], holds: list[Hold]) -> Fleet:
    """All of these workers wait."""
    seen = {worker.name: WorkerSighting(NOW, worker, True) for worker in workers if worker.name}
    nameless = [worker for worker in workers if not worker.name]
    there: Any = SimpleNamespace(
        all_holds=lambda: holds,
        workers=lambda: seen,
        nameless=lambda: nameless,
        upstream_problems={},
        began_at=NOW,
    )
    return Fleet(store, there, NOW)


def test_blocked_of_random_fleets_agrees_with_the_claim_and_with_why(settings: Callable[..., Settings]) -> None:
    random, made, told = Random(16), settings(), set()
    for _ in range(10_000 if LONG_RUN else 1000):
        jobs, workers, rows, holds = random_fleet(random)
        table = tuple(hold for hold in holds if not hold.target.startswith("tokens:"))
        here = [hold for hold in holds if hold not in table]
        store = Store(PlainRows(jobs, rows, table), made)  # type: ignore[arg-type]
        by_name = {row.name: row for row in rows}
        may: dict[str, set[str]] = {job.uuid: set() for job in jobs}
        for number, worker in enumerate(workers):
            row = by_name.get(worker.name)
            free = [
                job
                for job in jobs
                if worker.profile.matches(RuleSet.of(job.queue_key, job.agent_query_rules))
                and RuleSet.read(job.rule_set).suits(worker)
                and scheduler.blocked(job, worker, holds, NOW) is None
                and scheduler.blocked(job, row, (), NOW) is None
            ]
            for job in free:
                may[job.uuid].add(str(number))
            try:
                claimed = store.claim(worker, NOW, here)
            except WorkerHeld:
                claimed = None
            assert claimed == min(free, key=lambda job: job.order, default=None)
        fleet = fleet_of(store, workers, here)
        for job in jobs:
            why, text, by = fleet.why_of(job)
            assert (why is WaitReason.AHEAD) == bool(may[job.uuid]), (why, text, may)
            told.add(why)
            assert (by is not None) == (why is WaitReason.QUEUE_PAUSED)
            if why in (WaitReason.QUEUE_PAUSED, WaitReason.WORKERS_PAUSED) and "rack:1" not in text:
                assert "by ann@build1 since 2027-01-15T08:00:00Z" in text and text.endswith((": disk swap", "failing"))
    untold = {
        WaitReason.STOPPING,
        WaitReason.RUNNABLE_AT,
        WaitReason.RULES_NOT_UNDERSTOOD,
        WaitReason.RESERVING,
        WaitReason.WORKERS_BUSY,
    }
    assert told == {*WaitReason} - untold - {WaitReason.UPSTREAM_DOWN, WaitReason.WORKERS_OFFLINE}


# --- Any sequence of moves ---


class World:
    """One job, two workers, and what Buildkite has proved of the job."""

    def __init__(self) -> None:
        self.now, self.job = NOW, listed()
        self.rows = {name: WorkerRow(name, "s1") for name in ("w1", "w2")}
        #: A batch-reserve has named the job since its last claim or lapse.
        self.is_proved_free = False
        self.has_been_claimed: list[str] = []
        #: The freeze window that is in force for it.
        self.window: Frozen | None = None

    def apply(self, move: Move | None) -> None:
        if move is None:
            return
        before, self.job = self.job, move.job
        assert (before.state, move.job.state) in LIFE[move.verb]
        if move.verb == "confirm" and move.job.state is READY:
            self.is_proved_free = True
        elif move.job.state is not before.state:
            self.is_proved_free = False
        if move.worker:
            self.rows[move.worker.name] = move.worker
        self.check(before)

    def check(self, before: Job) -> None:
        job = self.job
        assert (job.state is READY) <= (self.is_proved_free and job.held_by in (None, "freeze"))
        if job.held_by == "freeze":
            assert job.state in (RESERVING, READY) and job.held_note == "weekend" and not job.allow
        else:
            assert bool(job.held_by) <= (job.state is RESERVING and job.held_until == job.not_before)
            assert job.held_note is None
        # An agent had it: only that Buildkite lists it again brings it back.
        assert not (before.state is RUNNING and job.state in (READY, LEASED))
        # What is to be finished is never handed out.
        assert not (job.finish_detail and job.state in (READY, LEASED, RUNNING))
        assert not (job.stop and job.state is READY)
        assert not (before.stop and job.state is LEASED and before.state is not LEASED)
        # What an operator said stands.
        assert (before.stop or {}).get("note") in (None, (job.stop or {}).get("note"))
        assert before.allow in (None, job.allow)
        assert RuleSet.read(job.rule_set).allowed is bool(job.allow)
        assert bool(job.first) >= bool(before.first) and bool(job.first) is (job.priority >= scheduler.FIRST_PRIORITY)
        assert bool(job.outcome) is (job.state is DONE)
        assert (job.state is LEASED) <= bool(job.claim and job.lease_expires_at)
        assert (job.claim is None) or job.state in (LEASED, RUNNING, DONE)
        assert job.attempts >= 0 and len(job.tries) <= scheduler.KEPT_TRIES
        if len(job.tries) < scheduler.KEPT_TRIES:
            assert job.attempts == sum(ended["counted"] for ended in job.tries)
        for row in self.rows.values():
            assert row.held_until <= self.now + scheduler.MAX_HOLD_SECONDS

    def claim(self, name: str) -> None:
        """As a store does it: only what is ready is taken."""
        if self.job.state is READY and not scheduler.blocked(self.job, self.rows[name], (), self.now):
            claim = f"c{len(self.has_been_claimed)}"
            lease = scheduler.leased(dataclasses.replace(W1, name=name), claim, LEASE, self.now)
            self.has_been_claimed.append(claim)
            self.apply(scheduler.make_move("claim", self.job, claims=self.job.claims + 1, **lease))

    def row(self) -> WorkerRow | None:
        return self.rows.get(self.job.worker or "")

    def blamed(self) -> WorkerRow | None:
        return self.rows.get(self.job.tries[-1]["worker"]) if self.job.tries else None


FOUND = [
    JobFinding(Finding.ACQUIRED, "running"),
    JobFinding(Finding.OVER, "finished"),
    JobFinding(Finding.OVER, "canceled"),
    JobFinding(Finding.GONE, "limited"),
    JobFinding(Finding.GONE, "scheduled, but not for us", "not_ours"),
    JobFinding(Finding.LAPSED, "scheduled"),
]
steps = st.one_of(
    st.tuples(st.just("claim"), st.sampled_from(["w1", "w2"])),
    st.tuples(st.just("learn"), st.sampled_from(FOUND)),
    st.tuples(st.just("complete"), st.sampled_from([0, 1, 27])),
    st.tuples(st.just("advance"), st.sampled_from([1.0, 31.0, 121.0, 1000.0])),
    st.tuples(
        st.sampled_from(
            ["put", "confirm", "finish", "refuse_finish", "cancel", "touch", "release", "withdraw", "expire"]
        ),
        st.booleans(),
    ),
    st.tuples(st.sampled_from(["stop", "allow", "first"]), st.booleans()),
    st.tuples(st.just("freeze"), st.sampled_from([None, WINDOW, Frozen("weekend", NOW + 500)])),
)


def take_step(world: World, verb: str, what: Any) -> None:
    job, now = world.job, world.now
    answered_at, code = (now, "no_token") if what else (0.0, "unanswerable")
    calls: dict[str, Callable[[], Move | None]] = {
        "learn": lambda: scheduler.learn(job, world.row(), what, now),
        "complete": lambda: scheduler.complete(job, world.row(), Holder(UUID, job.claim), AgentEnd(what), now, now),
        "put": lambda: scheduler.put(job, listed(), job.version, now),
        "confirm": lambda: scheduler.confirm(job, world.blamed(), now + 900, MAX_ATTEMPTS, now, frozen=world.window),
        "freeze": lambda: scheduler.freeze(job, world.window, None, NOW),
        "finish": lambda: scheduler.finish(job, now),
        "refuse_finish": lambda: scheduler.refuse_finish(job, now),
        "cancel": lambda: scheduler.cancel(job, "503" if what else "", now),
        "touch": lambda: scheduler.touch(job, LEASE, now),
        "release": lambda: scheduler.release(job, "no disk", answered_at, ACQUIRE, now),
        "withdraw": lambda: scheduler.withdraw(job, "of no use", code, now),
        "expire": lambda: scheduler.expire(job, answered_at, now),
        "stop": lambda: by_operator(scheduler.stop, job),
        "allow": lambda: by_operator(scheduler.allow, job),
        "first": lambda: by_operator(scheduler.first, job),
    }
    if verb == "freeze":
        world.window = what
    if verb == "advance":
        world.now += what
    elif verb == "claim":
        world.claim(what)
    else:
        world.apply(calls[verb]())


@given(st.lists(steps, max_size=60))
def test_any_sequence_of_moves_breaks_nothing_that_must_always_hold(sequence: list[tuple[str, Any]]) -> None:
    world = World()
    for verb, what in sequence:
        take_step(world, verb, what)
    # Whatever happened, the job can still be run: nothing that was reserved is forgotten.
    world.now += 1e6
    take_step(world, "freeze", None)
    if world.job.state is RUNNING:
        take_step(world, "learn", FOUND[1])
    elif world.job.state is LEASED:
        take_step(world, "expire", False)
    if world.job.state is DONE:
        take_step(world, "put", True)
    if world.job.state is RESERVING and not world.job.finish_detail:
        take_step(world, "confirm", True)
    if world.job.finish_detail and world.job.state is RESERVING:
        take_step(world, "finish", True)
        assert world.job.outcome is (Outcome.STOPPED if world.job.stop else Outcome.FAILED)
    else:
        world.now += 1e6
        world.claim("w1")
        assert world.job.state is LEASED


def test_complete_of_a_job_that_buildkite_listed_again_while_it_ran_is_noted() -> None:
    lapsed = made(scheduler.put(in_state(RUNNING), listed(), 0, NOW)).job
    move = made(scheduler.complete(lapsed, ROW, HOLDER, AgentEnd(1), NOW, NOW))
    assert (move.code, move.job.state, move.job.exit_status) == ("late", RESERVING, 1)


# --- Freeze windows ---


def test_confirm_in_a_freeze_window_holds_the_job_in_the_same_move() -> None:
    job = made(scheduler.confirm(in_state(RESERVING), None, NOW + 900, MAX_ATTEMPTS, NOW, frozen=WINDOW)).job
    assert (job.state, {name: getattr(job, name) for name in IN_WINDOW}) == (READY, IN_WINDOW)
    hold = scheduler.blocked(job, ROW, (), NOW)
    assert hold and (hold.owner, hold.reason, hold.until, hold.note) == ("freeze", "frozen", NOW + 60, "weekend")


@pytest.mark.parametrize("allow", [None, WORD], ids=["", "allowed"])
@pytest.mark.parametrize("later", [None, Frozen("Christmas", NOW + 99)], ids=["no window", "another window"])
def test_confirm_of_a_job_that_was_frozen_decides_anew(later: Frozen | None, allow: dict[str, Any] | None) -> None:
    job = in_state(RESERVING, **IN_WINDOW, allow=allow)
    job = made(scheduler.confirm(job, None, NOW + 900, MAX_ATTEMPTS, NOW, frozen=later)).job
    assert (job.held_by, job.held_note) == (("freeze", "Christmas") if later and not allow else (None, None))


def test_renew_of_a_frozen_job_leaves_the_end_of_the_window_to_who_offers_it_then() -> None:
    job = in_state(READY, **IN_WINDOW)
    renewed = made(scheduler.confirm(job, None, NOW + 999, MAX_ATTEMPTS, NOW + 61)).job
    assert (renewed.held_by, renewed.reservation_expires_at) == ("freeze", NOW + 999)


@pytest.mark.parametrize("owner", [None, "freeze", "policy"])
def test_freeze_of_a_ready_job_takes_the_place_of_what_comes_after_windows(owner: str | None) -> None:
    move = made(scheduler.freeze(in_state(READY, held_by=owner), WINDOW, None, NOW))
    assert (move.verb, move.job.held_by, move.job.held_note, move.is_state_change) == (
        "freeze",
        "freeze",
        "weekend",
        True,
    )
    assert scheduler.freeze(move.job, WINDOW, None, NOW) is None
    assert made(scheduler.freeze(move.job, WINDOW._replace(until=NOW + 61), None, NOW)).job.held_until == NOW + 61


@pytest.mark.parametrize("frozen", [None, WINDOW], ids=["no window", "a window"])
def test_freeze_of_a_job_that_somebody_else_holds_leaves_that_hold(frozen: Frozen | None) -> None:
    assert scheduler.freeze(in_state(READY, held_by="quota"), frozen, None, NOW) is None
    assert scheduler.freeze(in_state(READY, allow=WORD), frozen, None, NOW) is None


def test_window_that_ends_does_not_ask_the_policy_again_about_a_job_that_it_lets_run() -> None:
    undecided = made(scheduler.review(in_state(READY), "v1", NOW)).job
    job = made(scheduler.decide(undecided, scheduler.Decision("run", require=("trust=low",)), "v1", {}, NOW)).job
    frozen = made(scheduler.freeze(job, WINDOW, "v1", NOW)).job
    thawed = made(scheduler.freeze(frozen, None, "v1", NOW + 60)).job
    assert (frozen.held_by, thawed) == ("freeze", job)
    again = dataclasses.replace(frozen, state=RESERVING)
    confirmed = made(scheduler.confirm(again, None, NOW + 900, MAX_ATTEMPTS, NOW + 60, "v1")).job
    assert (confirmed.held_by, confirmed.policy_step, confirmed.decision) == (None, None, job.decision)


def test_window_over_a_job_that_the_policy_did_not_let_run_gives_its_hold_back_when_it_ends() -> None:
    undecided = made(scheduler.review(in_state(READY), "v1", NOW)).job
    held = made(scheduler.decide(undecided, scheduler.Decision("hold", "later", 90.0), "v1", {}, NOW)).job
    for job, reason, until in ((undecided, "undecided", None), (held, "held_by_policy", NOW + 90)):
        frozen = made(scheduler.freeze(job, WINDOW, "v1", NOW)).job
        assert (frozen.held_by, frozen.policy_step) == ("freeze", None)
        # Nobody asks about it meanwhile, and an answer that was under way does not count.
        assert scheduler.review(frozen, "v2", NOW) is None
        assert scheduler.decide(frozen, scheduler.Decision("run"), "v1", {}, NOW) is None
        thawed = made(scheduler.freeze(frozen, None, "v1", NOW + 60)).job
        told = (thawed.held_by, thawed.held_reason, thawed.held_until, thawed.policy_step, thawed.held_note)
        assert told == ("policy", reason, until, "ask", None)
        assert thawed.policy_step_at == (until or 0.0)


def test_confirm_in_a_window_with_a_policy_is_frozen_first() -> None:
    job = made(scheduler.confirm(in_state(RESERVING), None, NOW + 900, MAX_ATTEMPTS, NOW, "v1", frozen=WINDOW)).job
    assert (job.state, job.held_by, job.policy_step) == (READY, "freeze", None)


def test_put_of_a_lapsed_job_that_was_frozen_takes_over_from_when_it_may_run() -> None:
    early = dataclasses.replace(listed(), held_by="buildkite", held_until=NOW + 500, not_before=NOW + 500)
    move = made(scheduler.put(in_state(RESERVING, **IN_WINDOW), early, 0, NOW))
    assert (move.job.held_by, move.job.not_before, move.job.held_note) == ("buildkite", NOW + 500, None)


# --- What shows another scheduler ---


def rejected(**changes: Any) -> Job:
    """A job whose only claim ended because Buildkite did not give it to our agent."""
    ended = made(scheduler.complete(in_state(LEASED), ROW, HOLDER, AgentEnd(27), NOW, NOW - 5)).job
    return dataclasses.replace(ended, **changes)


KNOWN_FROM = NOW - 60
BY_RIVAL = {
    "nobody claimed it, and an agent gets it": (in_state(READY), "assigned"),
    "nobody claimed it, and an agent runs it": (in_state(READY), "running"),
    "nobody claimed it, and an agent ran it": (in_state(READY), "finished"),
    "our only agent did not get it, and another runs it": (rejected(), "running"),
}
NOT_BY_RIVAL = {
    "a person cancelled it": (in_state(READY), "canceled"),
    "we do not know the word": (in_state(READY), "a new word"),
    "our reservation has ended": (in_state(READY, reservation_expires_at=NOW), "running"),
    "it is not proven to be ours": (in_state(RESERVING), "running"),
    "claims of it may be missing": (in_state(READY, reserved_at=KNOWN_FROM), "running"),
    "a worker of ours has it": (in_state(LEASED), "running"),
    "a worker of ours had it before": (in_state(READY, claims=1), "running"),
    "our agent may have got it without hearing so": (rejected(), "assigned"),
    "an earlier agent of ours may have it": (rejected(claims=2), "running"),
    "that claim may have been repeated": (
        rejected(tries=(rejected().tries[0] | {"claimed_at": KNOWN_FROM},)),
        "running",
    ),
}


def code_of(job: Job, word: str) -> str:
    finding = scheduler.FINDINGS.get(word, Finding.ACQUIRED)
    assert finding
    return made(scheduler.learn(job, None, JobFinding(finding, word), NOW, KNOWN_FROM)).code


@pytest.mark.parametrize("situation", BY_RIVAL)
def test_learn_of_an_agent_that_no_worker_of_ours_can_have_started_is_by_a_rival(situation: str) -> None:
    assert code_of(*BY_RIVAL[situation]) == "by_rival"


@pytest.mark.parametrize("situation", NOT_BY_RIVAL)
def test_learn_of_an_agent_that_may_be_ours_or_anybodys_is_by_no_rival(situation: str) -> None:
    assert code_of(*NOT_BY_RIVAL[situation]) != "by_rival"
