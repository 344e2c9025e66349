"""The operator's desk: people hold workers, hosts, queues and tags, and every scheduler obeys from the answer on."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

import scheduler
from conftest import Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import RedisServer, StackProcesses, agent_path
from scheduler import (
    Act,
    AgentEnd,
    Dispatcher,
    Hold,
    Holder,
    Job,
    Lead,
    Profile,
    Settings,
    Store,
    Upkeep,
    Worker,
    WorkerHeld,
)
from test_access import bearer
from test_api import UUID, W1, W2, Reply
from test_api import Bench as ApiBench
from test_dispatch import Bench, waits
from test_peers import claim, start, wait_until

__all__ = ["waits"]  # a fixture

ANN = {"X-Operator": "ann@build1"}
SWAP = {"note": "disk swap"}

# --- The store ---


def held(target: str, now: float, seconds: float | None = None, **changes: Any) -> Hold:
    until = None if seconds is None else now + seconds
    return dataclasses.replace(Hold(target, "operator", "paused", now, until, "ann@build1", "disk swap"), **changes)


def act_of(hold: Hold, act: str = "pause") -> Act:
    return Act(hold.since or 0.0, hold.by, act, hold.target, hold.note)


def hold(store: Store, wanted: Hold, *, replace: bool = False) -> tuple[Hold, Hold | None]:
    return store.hold(wanted, act_of(wanted), replace=replace, now=wanted.since or 0.0)


def ready(store: Store, now: float, *rules: str, queue_key: str = "default") -> Job:
    raw = {"id": UUID, "agent_query_rules": list(rules)}
    store.put([Job.from_api(queue_key, raw, now)], store.sequence(), now)
    (job,) = store.confirm([UUID], store.sequence(), now + 900, now)
    return job


def claims(store: Store, now: float, name: str = "w1", host: str = "build1", query: str = "queue=default") -> bool:
    """Whether the worker gets a job."""
    try:
        return store.claim(Worker(name, "s", Profile.of(query), host=host), now) is not None
    except WorkerHeld:
        return False


@pytest.mark.parametrize("target", ["worker:w1", "host:build1", "host:b*", "queue:default", "queue:*", "tag:gpu=*"])
def test_hold_keeps_the_job_from_who_it_binds_until_it_is_lifted(store: Store, clock: Clock, target: str) -> None:
    now, query = clock.now(), "queue=default,gpu=a100"
    ready(store, now)
    assert not claims(store, now, "w0", "other", "queue=linux")
    wanted = held(target, now)
    assert hold(store, wanted) == (wanted, None)
    assert not claims(store, now, query=query)
    assert not claims(store, now + 1e6, query=query)
    assert store.lift(target, ["machine"], act_of(wanted)) == []
    assert not claims(store, now, query=query)
    assert store.lift(target, ["operator"], act_of(wanted)) == [wanted]
    assert store.lift(target, ["operator"], act_of(wanted)) == []
    assert claims(store, now, query=query)


def test_hold_leaves_those_alone_that_it_does_not_bind(store: Store, clock: Clock) -> None:
    ready(store, clock.now())
    for target in ("worker:w2", "host:build2", "host:build1-*", "queue:linux", "tag:gpu=*"):
        hold(store, held(target, clock.now()))
    assert claims(store, clock.now())


def test_hold_leaves_a_claim_alone_that_was_handed_out_before(store: Store, clock: Clock) -> None:
    now, worker = clock.now(), Worker("w1", "s", Profile.of("queue=default"))
    ready(store, now)
    job = store.claim(worker, now)
    assert job
    hold(store, held("worker:w1", now))
    assert store.touch(Holder(UUID, job.claim, worker), now + 1).state == "leased"
    assert store.complete(Holder(UUID, job.claim, worker), AgentEnd(0), now + 2).completed_claim == job.claim


def test_hold_again_is_no_news_and_lasts_as_long_as_the_longer(store: Store, clock: Clock) -> None:
    now = clock.now()
    first = held("host:build1", now, 60)
    hold(store, first)
    assert hold(store, held("host:build1", now + 1, 30, by="bob")) == (first, first)
    longer, before = hold(store, held("host:build1", now + 2, 600, by="bob", note="reboot"))
    assert (before, longer.since, longer.until, longer.by) == (first, now, now + 602, "bob")
    assert hold(store, held("host:build1", now + 3, 30, by="bob"), replace=True)[0].until == now + 33
    assert [each.target for each in store.known_holds()] == ["host:build1"]
    assert [(each.by, each.note) for each in store.acts(10)] == [
        ("bob", "disk swap"),
        ("bob", "reboot"),
        ("ann@build1", "disk swap"),
    ]


def test_hold_without_an_act_writes_nothing(store: Store, clock: Clock) -> None:
    wanted = held("worker:w1", clock.now())
    assert store.hold(wanted, None, replace=False, now=clock.now()) == (wanted, None)
    assert (store.known_holds(), store.acts(10)) == ((), [])


def test_hold_by_people_and_by_buildkite_of_one_queue_are_lifted_each_alone(store: Store, clock: Clock) -> None:
    now = clock.now()
    ready(store, now)
    store.pause("default", True, now)
    wanted = held("queue:default", now)
    hold(store, wanted)
    assert store.stats()["paused"] == ["default"]
    store.pause("default", False, now)
    assert not claims(store, now)
    store.pause("default", True, now)
    store.lift("queue:default", ["operator", "machine"], act_of(wanted))
    assert not claims(store, now)
    assert store.stats()["paused"] == ["default"]


def test_hold_of_a_queue_by_people_leaves_its_jobs_reserved(store: Store, clock: Clock) -> None:
    now = clock.now()
    hold(store, held("queue:*", now))
    store.put([Job.from_api("default", {"id": UUID}, now)], store.sequence(), now)
    assert store.unconfirmed("default", now, 10) == [UUID]


def test_stats_with_a_hold_of_some_queues_name_those_that_it_means(store: Store, clock: Clock) -> None:
    ready(store, clock.now(), queue_key="linux-arm")
    hold(store, held("queue:linux-*", clock.now()))
    hold(store, held("queue:mac", clock.now()))
    assert store.stats()["paused"] == ["linux-arm", "mac"]


def test_holds_and_acts_before_and_after_reopen_are_the_same(open_store: Callable[..., Store], clock: Clock) -> None:
    store, now = open_store(), clock.now()
    ready(store, now)
    wanted = held("host:build1", now, 60, note="Platte tauschen: \N{LATIN SMALL LETTER U WITH DIAERESIS}ber Nacht")
    hold(store, wanted)
    hold(store, held("queue:linux", now, reason="drained"))
    acts = store.acts(10)
    store = open_store()
    assert store.end_holds(now).rows == (wanted, held("queue:linux", now, reason="drained"))
    assert store.acts(10) == acts
    assert len(acts) == 2
    assert not claims(store, now)
    assert claims(store, now, "w2", "build2")


def test_acts_beyond_500_are_forgotten(store: Store, clock: Clock) -> None:
    for number in range(503):
        store.act(Act(clock.now(), "ann", "first", f"job:{number}", ""))
    assert [each.target for each in store.acts(2)] == ["job:502", "job:501"]
    assert [each.target for each in store.acts(1000)] == [f"job:{number}" for number in range(502, 2, -1)]


@pytest.mark.parametrize("step", [-1e6, 0.0])
def test_end_holds_whose_time_is_over_ends_them_for_good(store: Store, clock: Clock, step: float) -> None:
    """`step`: then somebody sets the clock back."""
    now = clock.now()
    ready(store, now)
    hold(store, held("worker:*", now, 60))
    lasting = held("worker:w9", now)
    hold(store, lasting)
    assert len(store.end_holds(now + 59.9).rows) == 2
    assert not claims(store, now + 59.9)
    assert store.end_holds(now + 60).rows == (lasting,)
    assert claims(store, now + 60 + step)


def test_change_holds_with_an_old_version_changes_nothing(store: Store, clock: Clock) -> None:
    old = store.rows.holds().version
    wanted = held("worker:w1", clock.now())
    assert store.rows.change_holds(old, [wanted], [])
    assert not store.rows.change_holds(old, [], [wanted], act_of(wanted, "resume"))
    assert (store.rows.holds().rows, store.acts(10)) == ((wanted,), [])


# --- Claims that wait ---


@pytest.fixture
def bench(store: Store, clock: Clock, waits: queue.SimpleQueue[str]) -> Iterator[Bench]:
    bench = Bench(store, clock, waits)
    yield bench
    bench.end()


@pytest.mark.parametrize("target", ["worker:w1", "queue:default"])
def test_follow_holds_wakes_a_claim_whose_hold_was_lifted(bench: Bench, target: str) -> None:
    job, wanted = bench.make_ready(), held(target, bench.clock.now())
    hold(bench.store, wanted)
    claim = bench.park("w1")
    bench.dispatcher.follow_holds()
    assert claim.is_alive()
    bench.store.lift(target, ["operator"], act_of(wanted))
    bench.dispatcher.follow_holds()
    assert bench.given(claim) == job.uuid


@pytest.mark.parametrize("target", ["worker:w1", "queue:default"])
def test_follow_holds_wakes_a_claim_whose_hold_is_over_by_a_step_of_the_clock(bench: Bench, target: str) -> None:
    job = bench.make_ready()
    hold(bench.store, held(target, bench.clock.now(), 3600))
    claim = bench.park("w1")
    bench.clock.advance(3599)
    bench.dispatcher.follow_holds()
    assert claim.is_alive()
    bench.clock.advance(1)
    bench.dispatcher.follow_holds()
    assert bench.given(claim) == job.uuid


def test_claim_whose_hold_ends_while_it_waits_gets_the_job_then(bench: Bench) -> None:
    """By its own timer, to the millisecond."""
    job = bench.make_ready()
    hold(bench.store, held("worker:w1", bench.clock.now(), 0.05))
    claim = bench.park("w1")
    bench.clock.advance(0.05)
    assert bench.given(claim) == job.uuid


def test_offer_to_the_first_of_equals_that_a_hold_binds_reaches_the_next(bench: Bench) -> None:
    first, second = bench.park("w1"), bench.park("w2")
    hold(bench.store, held("worker:w1", bench.clock.now()))
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert bench.given(second) == job.uuid
    bench.await_wait("w1")
    assert first.is_alive()


def test_follow_holds_after_many_were_held_gives_each_job_to_the_worker_with_fewest_tags(bench: Bench) -> None:
    wanted = held("worker:*", bench.clock.now())
    hold(bench.store, wanted)
    scarce, plain = bench.park("w1", "queue=default,gpu=a100"), bench.park("w2")
    generic = bench.make_ready()
    bench.store.lift("worker:*", ["operator"], act_of(wanted))
    bench.dispatcher.follow_holds()
    assert bench.given(plain) == generic.uuid
    assert scarce.is_alive()


def test_follow_holds_while_the_store_fails_wakes_who_waits_the_next_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, wanted = bench.make_ready(), held("worker:w1", bench.clock.now())
    hold(bench.store, wanted)
    claim = bench.park("w1")
    bench.store.lift("worker:w1", ["operator"], act_of(wanted))
    with monkeypatch.context() as patch:
        error = scheduler.StoreUnavailable("disk full")

        def fail() -> Any:
            raise error

        patch.setattr(bench.store, "known_rule_sets", fail)
        with pytest.raises(scheduler.StoreUnavailable):
            bench.dispatcher.follow_holds()
    bench.dispatcher.follow_holds()
    assert bench.given(claim) == job.uuid


def test_tick_of_upkeep_after_a_step_of_the_clock_ends_holds_while_nobody_looks(store: Store, clock: Clock) -> None:
    time_of_day = scheduler.Clock(clock.now)  # the wall clock is the test's
    upkeep = Upkeep(Lead(store), time_of_day, {}, Dispatcher(store, time_of_day.now))
    hold(store, held("host:*", clock.now(), 3600))
    upkeep.tick(time_of_day.now())
    assert len(store.known_holds()) == 1
    clock.advance(4000)
    upkeep.tick(time_of_day.now())
    assert store.known_holds() == ()
