"""What a policy decides, on both stores: who finds the jobs, who may claim them, and what is left after a restart."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import scheduler
from conftest import Clock
from scheduler import Decision, Dispatcher, Fenced, Fleet, Job, Move, Profile, Store, WaitReason, Worker
from test_dispatch import PATIENCE, Claim

V1, V2 = "a" * 12, "b" * 12
RUN = Decision("run")


def uuid(number: int) -> str:
    return f"018f0000-0000-4000-8000-{number:012}"


@pytest.fixture
def gated(open_store: Callable[..., Store]) -> Callable[..., Store]:
    """Opens the store, with this version of a policy in force."""

    def opened(policy: str | None = V1) -> Store:
        store = open_store()
        store.policy = lambda now: policy
        return store

    return opened


def put(store: Store, now: float, *numbers: int, rules: Iterable[str] = (), **more: Any) -> None:
    """Jobs that Buildkite lists and reserves."""
    raw = {"agent_query_rules": [*rules], "build": {"uuid": "b"}, "step": {"key": "test"}, "scheduled_at": None} | more
    jobs = [Job.from_api("default", raw | {"id": uuid(number)}, now + number / 1000) for number in numbers]
    store.put(jobs, store.sequence(), now)
    store.confirm([job.uuid for job in jobs], store.sequence(), now + 900, now)


def decide(store: Store, number: int, decision: Decision, now: float, chain: str | None = None) -> list[Job]:
    known = {"parallel_job": None, "retry_count": 0, "chain": chain}
    move = functools.partial(scheduler.decide, decision=decision, policy=V1, known=known, now=now)
    return store.decide({uuid(number): move}, now)


def fail(store: Store, number: int, now: float) -> list[Job]:
    def move(job: Job) -> Move | None:
        return scheduler.fail_to_decide(job, "KeyError at policy.py:2", V1, 1.0, now)

    return store.decide({uuid(number): move}, now)


def claim(store: Store, name: str, now: float, host: str = "", query: str = "queue=default") -> str | None:
    job = store.claim(Worker(name, f"s-{name}", Profile.of(query), host=host), now)
    return job.uuid if job else None


def steps(store: Store, step: str, now: float, limit: int = 10) -> list[int]:
    return [int(found[-12:]) for found in store.policy_steps("default", step, now, limit)]


def test_confirm_with_a_policy_keeps_jobs_from_every_worker_until_they_are_decided(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2)
    assert claim(store, "w1", now) is None
    (job,) = decide(store, 2, RUN, now)
    assert job.decision and job.decision["policy"] == V1
    assert claim(store, "w1", now) == uuid(2)
    assert claim(store, "w2", now) is None
    assert store.stats()["states"]["ready"] == 1


def test_find_undecided_jobs_gives_them_in_line_and_those_that_are_held_in_time(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    put(store, now, 5, 3, 4)
    put(store, now, 9, priority=1)
    assert steps(store, "ask", now) == [9, 3, 4, 5]
    assert steps(store, "ask", now, limit=2) == [9, 3]
    decide(store, 9, Decision("hold", "x", 30.0), now)
    fail(store, 3, now)
    decide(store, 4, Decision("run", "", 20.0, avoid=("host=a",)), now)
    store.first(uuid(5), scheduler.operator_note("ann", "x", now), now)
    assert steps(store, "ask", now) == [5]
    assert steps(store, "ask", now + 30) == [5, 9]
    assert (steps(store, "ask_again", now + 59), steps(store, "ask_again", now + 60)) == ([], [3])
    assert (steps(store, "end_avoid", now + 19), steps(store, "end_avoid", now + 20)) == ([], [4])
    # What is claimed or over is not asked about.
    assert claim(store, "w1", now, host="b") == uuid(4)
    decide(store, 5, Decision("refuse", "no"), now)
    assert (steps(store, "end_avoid", now + 20), steps(store, "ask", now)) == ([], [])


def test_decide_with_added_rules_gives_the_job_to_those_who_match_them(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2, 3)
    decide(store, 1, Decision("run", require=("host=b",)), now)
    decide(store, 2, Decision("run", require=("worker=w3",)), now)
    decide(store, 3, Decision("run", require=("trust=low",)), now)
    assert claim(store, "w1", now, "a") is None
    assert claim(store, "w2", now, "b") == uuid(1)
    assert claim(store, "w3", now, "a") == uuid(2)
    assert claim(store, "w4", now, "a", "queue=default,trust=high") is None
    assert claim(store, "w5", now, "a", "queue=default,trust=low") == uuid(3)


def test_avoid_keeps_the_job_from_a_host_for_its_time_and_not_longer(gated: Callable[..., Store], clock: Clock) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2)
    for number in (1, 2):
        decide(store, number, Decision("run", "", 20.0, avoid=("host=a",)), now)
    assert claim(store, "w1", now, "a") is None
    assert claim(store, "w2", now, "b") == uuid(1)
    assert store.end_avoid([uuid(2)], now + 19) == []
    assert [job.uuid for job in store.end_avoid([uuid(2)], now + 20)] == [uuid(2)]
    assert claim(store, "w1", now + 20, "a") == uuid(2)


def test_decide_an_end_makes_an_intent_and_counts_its_outcome(gated: Callable[..., Store], clock: Clock) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2)
    decide(store, 1, Decision("refuse", "no"), now)
    decide(store, 2, Decision("succeed", "yes"), now)
    assert [(job.finish_detail, scheduler.finish_status(job)) for job in store.intents("default")] == [
        ("no", -1),
        ("yes", 0),
    ]
    for number in (1, 2):
        store.finish(uuid(number), now)
    assert {word: count for word, count in store.stats()["outcomes"].items() if count} == {"refused": 1, "succeeded": 1}


def test_reopen_keeps_each_decision_and_asks_nothing_twice(gated: Callable[..., Store], clock: Clock) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2, 3, 4)
    decide(store, 1, Decision("run", "", 20.0, ("gpu=*",), ("host=a",), 5), now)
    decide(store, 2, Decision("hold", "zone b is empty", 30.0), now)
    fail(store, 3, now)
    before = {number: store.get(uuid(number)) for number in (1, 2, 3, 4)}
    store = gated()
    store.restart_leases(now, confirm=True)
    assert claim(store, "w1", now, "b", "queue=default,gpu=a100") is None
    store.confirm(list(map(uuid, before)), store.sequence(), now + 900, now)
    for number, job in before.items():
        after = store.get(uuid(number))
        assert job and after
        for name in ("decision", "rule_set", "priority", "held_by", "held_reason", "held_until", "policy_step"):
            assert getattr(after, name) == getattr(job, name)
    assert (steps(store, "ask", now), steps(store, "ask", now + 30)) == ([4], [4, 2])
    assert claim(store, "w1", now, "b", "queue=default,gpu=a100") == uuid(1)


def test_review_after_a_reload_asks_about_all_that_wait_and_frees_nothing(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    put(store, now, 1, 2, 3)
    decide(store, 1, RUN, now)
    decide(store, 2, Decision("hold", "x", 30.0), now)
    store.policy = lambda now: V2
    changed = store.review(list(map(uuid, (1, 2, 3))), now)
    assert {job.uuid for job in changed} == {uuid(1), uuid(2)}
    assert steps(store, "ask", now) == [1, 2, 3]
    assert claim(store, "w1", now) == uuid(1)
    assert claim(store, "w2", now) is None
    store.policy = lambda now: None
    assert [job.uuid for job in store.review([uuid(2), uuid(3)], now) if not job.held_by] == [uuid(3)]
    assert claim(store, "w2", now) == uuid(3)


def test_find_earlier_jobs_gives_those_of_the_same_chain_the_newest_last(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    for number in (1, 2, 3, 4):
        put(store, now + number, number)
        decide(store, number, RUN, now + number, chain="other" if number == 3 else "same")
    assert [job.uuid for job in store.chained("same", 10)] == [uuid(1), uuid(2), uuid(4)]
    assert [job.uuid for job in store.chained("same", 2)] == [uuid(2), uuid(4)]
    assert store.chained("none", 10) == []
    # Also of what is over, until it is forgotten.
    store.learn({uuid(1): scheduler.JobFinding(scheduler.Finding.OVER, "canceled")}, store.sequence(), now + 5)
    assert len(store.chained("same", 10)) == 3
    store.prune(now + 6)
    assert [job.uuid for job in store.chained("same", 10)] == [uuid(2), uuid(4)]


def test_decide_by_a_scheduler_that_does_not_lead_any_more_changes_nothing(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    if isinstance(store.rows, scheduler.SqliteRows):
        return  # a single scheduler
    put(store, now, 1)
    old = store.with_rows(store.rows.with_token("an-older-one"))
    with pytest.raises(Fenced):
        decide(old, 1, RUN, now)
    assert steps(store, "ask", now) == [1]


# -- who is woken, and why a job waits


def waiting(dispatcher: Dispatcher, name: str, host: str) -> Claim:
    claim = Claim(dispatcher, Worker(name, f"s-{name}", Profile.of("queue=default"), host=host), 60.0)
    ends_at = time.monotonic() + PATIENCE
    while name not in {waiter.worker.name for waiter in parked(dispatcher)}:
        assert time.monotonic() < ends_at
    return claim


def parked(dispatcher: Dispatcher) -> list[Any]:
    with dispatcher._lock:
        return [waiter for group in dispatcher._parked.values() for waiter in group.values()]


def test_offer_a_job_with_added_rules_wakes_the_worker_on_that_host_behind_others_that_offer_the_same(
    gated: Callable[..., Store], clock: Clock
) -> None:
    store, now = gated(), clock.now()
    dispatcher = Dispatcher(store, clock.now)
    claims = {name: waiting(dispatcher, name, name[0]) for name in ("a-1", "a-2", "b-1", "c-1")}
    put(store, now, 1, 2, 3)
    jobs = decide(store, 1, Decision("run", require=("host=c",)), now)
    jobs += decide(store, 2, Decision("run", require=("worker=a-2",)), now)
    jobs += decide(store, 3, Decision("run", "", 20.0, avoid=("host=a",)), now)
    dispatcher.offer(jobs)
    given = {name: claims[name].answer() for name in ("c-1", "a-2", "b-1")}
    assert {name: job and job.uuid for name, job in given.items()} == {"c-1": uuid(1), "a-2": uuid(2), "b-1": uuid(3)}
    assert [waiter.worker.name for waiter in parked(dispatcher)] == ["a-1"]
    dispatcher.stop()
    assert claims["a-1"].answer() is None


def why(store: Store, dispatcher: Dispatcher, number: int, now: float) -> tuple[WaitReason, str]:
    job = store.get(uuid(number))
    assert job
    reason = Fleet(store, dispatcher, now).why_of(job)
    return reason.why, reason.text


def test_why_a_job_waits_names_the_policy_and_its_reason(gated: Callable[..., Store], clock: Clock) -> None:
    store, now = gated(), clock.now()
    dispatcher = Dispatcher(store, clock.now)
    put(store, now, 1, 2, 3, 4)
    decide(store, 2, Decision("hold", "zone b is empty", 30.0), now)
    fail(store, 3, now)
    decide(store, 4, Decision("run", "", 20.0, avoid=("host=a",)), now)
    claim = waiting(dispatcher, "a-1", "a")
    assert why(store, dispatcher, 1, now)[0] is WaitReason.UNDECIDED
    assert why(store, dispatcher, 2, now) == (
        WaitReason.HELD_BY_POLICY,
        "the policy holds it until 2027-01-15T08:00:30.000Z: zone b is empty",
    )
    assert why(store, dispatcher, 3, now) == (
        WaitReason.POLICY_FAILED,
        "the policy failed for this job, and is asked again after 2027-01-15T08:01:00.000Z: KeyError at policy.py:2",
    )
    assert why(store, dispatcher, 4, now) == (
        WaitReason.PREFERS_ELSEWHERE,
        "for a time, the policy keeps it from workers with host=a",
    )
    dispatcher.stop()
    claim.answer()


@pytest.mark.parametrize(
    "decision", [Decision("run", require=("host=a",)), Decision("run", "", 1e4, avoid=("host=b",))]
)
def test_why_a_job_that_a_policy_let_run_waits_for_silent_workers_is_that_they_are_offline(
    gated: Callable[..., Store], clock: Clock, decision: Decision
) -> None:
    store = gated()
    dispatcher = Dispatcher(store, clock.now)
    assert claim(store, "a-1", clock.now(), host="a") is None
    put(store, clock.now(), 1)
    decide(store, 1, decision, clock.now())
    clock.advance(scheduler.OFFLINE_SECONDS + 1)
    assert why(store, dispatcher, 1, clock.now())[0] is WaitReason.WORKERS_OFFLINE
