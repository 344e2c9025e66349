"""The operator's desk: people hold workers, hosts, queues and tags, and every scheduler obeys from the answer on."""

from __future__ import annotations

import dataclasses
import functools
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

import scheduler
from conftest import REDIS, STORES, Clock, open_sqlite, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path, wait_until
from scheduler import (
    AgentEnd,
    Dispatcher,
    Finding,
    Hold,
    Holder,
    Job,
    JobFinding,
    Leadership,
    OperatorAct,
    Profile,
    Settings,
    Store,
    Upkeep,
    Worker,
    WorkerHeld,
)
from test_access import Live, bearer
from test_api import PATIENCE, UUID, W1, W2, Connection, Reply
from test_api import Bench as ApiBench
from test_dispatch import Bench, waits
from test_peers import redis, stack, start

__all__ = ["redis", "stack", "waits"]  # fixtures

ANN = {"X-Operator": "ann@build1"}
SWAP = {"note": "disk swap"}

# --- The store ---


def held(target: str, now: float, seconds: float | None = None, **changes: Any) -> Hold:
    until = None if seconds is None else now + seconds
    return dataclasses.replace(Hold(target, "operator", "paused", now, until, "ann@build1", "disk swap"), **changes)


def act_of(hold: Hold, act: str = "pause") -> OperatorAct:
    return OperatorAct(hold.since or 0.0, hold.by, act, hold.target, hold.note)


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


def test_open_a_store_of_the_schema_before_keeps_its_holds(settings: Callable[..., Settings]) -> None:
    path = Path(settings().state_directory) / "jobs.sqlite3"
    with closing(open_sqlite(settings())) as store:
        store.pause("default", True, 5.0)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            'DROP TABLE acts; ALTER TABLE holds DROP COLUMN "by"; ALTER TABLE holds DROP COLUMN note; '
            "PRAGMA user_version = 3"
        )
    with closing(open_sqlite(settings())) as store:
        assert store.known_holds() == (Hold("queue:default", "buildkite", "queue_paused", 5.0),)
        hold(store, held("worker:w1", 6.0))
        assert [each.by for each in store.acts(9)] == ["ann@build1"]


def test_acts_beyond_500_are_forgotten(store: Store, clock: Clock) -> None:
    for number in range(503):
        store.act(OperatorAct(clock.now(), "ann", "first", f"job:{number}", ""))
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


@pytest.mark.parametrize("open_store", [REDIS], indirect=True)
@pytest.mark.parametrize("target", ["worker:w1", "queue:default"])
def test_hold_and_resume_bind_the_next_claim_at_a_scheduler_that_has_heard_nothing(
    store: Store, clock: Clock, settings: Callable[..., Settings], target: str
) -> None:
    now = clock.now()
    ready(store, now)
    with closing(STORES[REDIS](settings())) as other:
        assert not claims(other, now, query="queue=linux")  # it has read all that claims are decided with
        wanted = held(target, now)
        hold(store, wanted)
        assert other.known_holds() == ()
        assert not claims(other, now)
        store.lift(target, ["operator"], act_of(wanted))
        assert other.known_holds() == (wanted,)
        assert claims(other, now)


@pytest.fixture
def failing(store: Store, clock: Clock) -> Store:
    """The agents of two workers of build1 and of one of build2 have just ended without acquiring."""
    now = clock.now()
    for name, host in (("w1", "build1"), ("w2", "build1"), ("w3", "build2")):
        worker = Worker(name, "s", Profile.of("queue=default,gpu=a100"), host=host)
        ready(store, now)
        job = store.claim(worker, now)
        assert job
        store.complete(Holder(UUID, job.claim, worker), AgentEnd(1), now)
        store.learn({UUID: JobFinding(Finding.GONE, "limited")}, store.sequence(), now)
    ready(store, now)
    return store


@pytest.mark.parametrize(
    ("target", "ended"),
    [
        ("worker:w1", ["w1"]),
        ("host:build1", ["w1", "w2"]),
        ("tag:gpu=*", ["w1", "w2", "w3"]),
        ("worker:w9", []),
        ("queue:*", []),
        ("other:w1", []),
    ],
)
def test_lift_what_the_machine_set_ends_the_backoff_of_the_workers_that_the_target_means(
    failing: Store, clock: Clock, target: str, ended: list[str]
) -> None:
    now, query = clock.now(), "queue=default,gpu=a100"
    resumed = OperatorAct(now, "ann", "resume", target, "")
    version = failing.rows.holds().version
    assert failing.lift(target, ["operator"], resumed) == []
    assert {row.name for row in failing.workers() if row.held_until > now} == {"w1", "w2", "w3"}
    lifted = failing.lift(target, ["operator", "machine"], resumed)
    assert sorted(hold.target for hold in lifted) == [f"worker:{name}" for name in ended]
    assert {(hold.owner, hold.reason) for hold in lifted} <= {("machine", "workers_failing")}
    assert {row.name for row in failing.workers() if row.held_until > now} == {"w1", "w2", "w3"} - {*ended}
    assert {row.failures for row in failing.workers() if row.name in ended} <= {0}
    # Schedulers that are told nothing see that there is something new.
    assert (failing.rows.holds().version != version, len(failing.acts(9))) == (bool(ended), int(bool(ended)))
    assert claims(failing, now, "w1", "build1", query) is ("w1" in ended)


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


@pytest.mark.parametrize("target", ["worker:w1", "queue:default"])
def test_allow_a_job_gives_it_to_a_claim_that_people_hold(bench: Bench, target: str) -> None:
    job, other = bench.make_ready(), bench.make_ready()
    hold(bench.store, held(target, bench.clock.now()))
    claim = bench.park("w1")
    bench.dispatcher.offer([job, other])
    assert claim.is_alive()
    allowed = bench.store.allow(job.uuid, {"at": bench.clock.now(), "by": "ann", "note": "now"}, bench.clock.now())
    bench.dispatcher.offer([allowed])
    assert bench.given(claim) == job.uuid
    assert bench.store.get(other.uuid).state == "ready"  # type: ignore[union-attr]


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
    upkeep = Upkeep(Leadership(store), time_of_day, {}, Dispatcher(store, time_of_day.now))
    hold(store, held("host:*", clock.now(), 3600))
    upkeep.tick(time_of_day.now())
    assert len(store.known_holds()) == 1
    clock.advance(4000)
    upkeep.tick(time_of_day.now())
    assert store.known_holds() == ()


# --- POST /holds, DELETE /holds/{target} ---


@pytest.fixture
def api(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[ApiBench]:
    """Two workers of one host, and one of another, have claimed; there is nothing for them."""
    with ApiBench(store, clock, settings()) as bench:
        for name, host, query in FLEET:
            headers = {"X-Worker-ID": name, "X-Worker-Session": "s", "X-Worker-Host": host}
            assert bench.call("GET", f"/jobs?query={query}", headers=headers).status == 204
        yield bench


FLEET = [
    ("w1", "build1", "queue=default,gpu=a100"),
    ("w2", "build1", "queue=default"),
    ("W 3/c", "build2", "queue=default"),
]


def post(api: ApiBench, target: str, **body: Any) -> Reply:
    return api.call("POST", "/holds", {"target": target, **SWAP, **body}, ANN)


def delete(api: ApiBench, target: str, query: str = "") -> Reply:
    return api.call("DELETE", f"/holds/{quote(target, safe='')}{query}", headers=ANN)


@sqlite_only
@pytest.mark.parametrize(
    ("target", "workers", "hosts", "queues", "jobs"),
    [
        ("worker:w1", 1, 1, 0, 0),
        ("worker:W 3/c", 1, 1, 0, 0),
        ("worker:w*", 2, 1, 0, 0),
        ("host:build1", 2, 1, 0, 0),
        ("host:build*", 3, 2, 0, 0),
        ("tag:gpu=*", 1, 1, 0, 0),
        ("queue:default", 0, 0, 1, 1),
        ("queue:*", 0, 0, 1, 1),
    ],
)
def test_post_hold_answers_what_it_binds_and_delete_ends_it(
    api: ApiBench, target: str, workers: int, hosts: int, queues: int, jobs: int
) -> None:
    api.make_ready()
    told = post(api, target)
    assert told.status == 200
    at, bound = "2027-01-15T08:00:00.000Z", {"workers": workers, "hosts": hosts, "queues": queues, "jobs": jobs}
    hold = {"target": target, "owner": "operator", "reason": "paused", "by": "ann@build1", "since": at, "until": None}
    assert told.json.pop("message").startswith(
        f"{target} is paused by ann@build1 since 2027-01-15T08:00:00Z: disk swap"
    )
    assert {**told.json, "message": ""} == {"hold": hold | SWAP, "already": False, "binds": bound, "message": ""}
    lifted = delete(api, target)
    assert (lifted.status, lifted.json["lifted"]) == (200, [hold | SWAP])
    assert (delete(api, target).status, delete(api, target).json["lifted"]) == (200, [])
    assert [(each.act, each.target) for each in api.store.acts(9)] == [("resume", target), ("pause", target)]


@sqlite_only
def test_post_hold_again_says_who_holds_since_when_and_does_not_shorten_it(api: ApiBench, clock: Clock) -> None:
    post(api, "worker:w1", seconds=3600, reason="drained")
    clock.advance(60)
    told = post(api, "worker:w1", seconds=60).json
    assert (told["already"], told["hold"]["until"]) == (True, "2027-01-15T09:00:00.000Z")
    assert "worker:w1 is already drained by ann@build1 since 2027-01-15T08:00:00Z until" in told["message"]
    told = post(api, "worker:w1", until="2027-01-15T11:00:00+01:00").json
    assert (told["already"], told["hold"]["until"]) == (False, "2027-01-15T10:00:00.000Z")
    told = post(api, "worker:w1", seconds=60, replace=True).json
    assert (told["already"], told["hold"]["until"]) == (False, "2027-01-15T08:02:00.000Z")


@sqlite_only
def test_post_hold_to_try_it_tells_what_would_be_and_does_nothing(api: ApiBench) -> None:
    told = post(api, "host:build1", dry_run=True).json
    assert (told["binds"]["workers"], told["already"]) == (2, False)
    assert told["message"].startswith("host:build1 would be paused by ann@build1")
    assert (api.store.known_holds(), api.store.acts(1)) == ((), [])


@sqlite_only
@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("host:buidl1", ["host:build1", "host:build2"]),
        ("host:w2", ["worker:w2"]),
        ("worker:build2", ["host:build2"]),
        ("tag:gpu=h100", ["tag:gpu=a100"]),
        ("queue:zzzzzz", []),
        ("worker:W1", ["worker:w1"]),
    ],
)
def test_hold_and_resume_of_what_is_not_there_name_the_nearest(api: ApiBench, target: str, nearest: list[str]) -> None:
    for reply in post(api, target), delete(api, target):
        assert (reply.status, reply.json["error"]) == (404, "no_match")
        assert reply.json["nearest"][: len(nearest)] == nearest
        assert not nearest or nearest[0] in reply.json["message"]
    assert (api.store.known_holds(), api.store.acts(1)) == ((), [])


@sqlite_only
def test_resume_of_what_another_target_holds_names_that(api: ApiBench) -> None:
    post(api, "host:build*")
    reply = delete(api, "worker:w1")
    assert reply.refusal == (409, "still_held")
    assert "host:build* is paused by ann@build1" in reply.json["message"]
    post(api, "worker:w1")
    reply = delete(api, "worker:w1")
    assert reply.status == 200
    assert "Still, host:build* is paused" in reply.json["message"]


@sqlite_only
def test_resume_leaves_what_the_machine_set_unless_it_is_told_to(api: ApiBench, clock: Clock) -> None:
    unfit = Hold("worker:w1", "machine", "workers_unfit", clock.now())
    assert api.store.rows.change_holds(api.store.rows.holds().version, [unfit], [])
    post(api, "worker:w1")
    assert [each["owner"] for each in delete(api, "worker:w1").json["lifted"]] == ["operator"]
    assert api.store.known_holds() == (unfit,)
    assert [each["owner"] for each in delete(api, "worker:w1", "?quarantine=1").json["lifted"]] == ["machine"]
    assert api.store.known_holds() == ()


@sqlite_only
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"target": "w1"}, "bad_target"),
        ({"target": "rack:7"}, "bad_target"),
        ({"target": "worker:"}, "bad_target"),
        ({"target": f"worker:{'w' * 513}"}, "bad_target"),
        ({"target": "tag:gpu"}, "bad_target"),
        ({"target": None}, "bad_body"),
        ({"note": ""}, "bad_body"),
        ({"note": " \n"}, "bad_body"),
        ({"note": "w" * 501}, "bad_body"),
        ({"note": None}, "bad_body"),
        ({"seconds": 0}, "bad_body"),
        ({"seconds": -1}, "bad_body"),
        ({"seconds": True}, "bad_body"),
        ({"seconds": "60"}, "bad_body"),
        ({"seconds": 1e300}, "bad_body"),
        ({"seconds": float("nan")}, "bad_body"),
        ({"seconds": float("inf")}, "bad_body"),
        ({"until": "2027-01-15T08:00:00Z"}, "bad_body"),
        ({"until": "tomorrow"}, "bad_body"),
        ({"until": 4e9}, "bad_body"),
        ({"until": "2028-01-01T00:00:00Z", "seconds": 5}, "bad_body"),
        ({"reason": "unfit"}, "bad_body"),
        ({"replace": "yes"}, "bad_body"),
        ({"dry_run": 1}, "bad_body"),
    ],
    ids=lambda each: ascii(each)[:40],
)
def test_post_hold_that_cannot_be_read_is_refused_and_holds_nothing(
    api: ApiBench, body: dict[str, Any], code: str
) -> None:
    reply = api.call("POST", "/holds", {"target": "worker:w1", **SWAP, **body}, ANN)
    assert reply.refusal == (400, code)
    assert api.store.known_holds() == ()


@sqlite_only
def test_delete_hold_wakes_a_claim_that_waits_at_once(waits: queue.SimpleQueue[str], api: ApiBench) -> None:
    api.make_ready()
    post(api, "worker:w1")
    parked = api.connect()
    parked.request("GET", "/jobs?query=queue=default&wait=60", headers={"X-Worker-ID": "w1", "X-Worker-Session": "s"})
    assert waits.get(timeout=PATIENCE) == "w1"
    delete(api, "worker:w1")
    assert parked.getresponse().status == 200


@sqlite_only
def test_why_of_a_job_whose_workers_are_paused_names_who_since_when_and_what_for(api: ApiBench) -> None:
    api.make_ready()

    def why() -> tuple[str, str]:
        told = api.call("GET", f"/jobs/{UUID}").json
        return told["why"], told["why_text"]

    def states() -> dict[str, str]:
        return {each["name"]: each["state"] for each in api.call("GET", "/stats").json["workers"]}

    who = "by ann@build1 since 2027-01-15T08:00:00Z: disk swap"
    post(api, "host:build1")
    assert why()[0] == "ahead"
    assert states() == {"w1": "paused", "w2": "paused", "W 3/c": "away"}
    post(api, "worker:W*")
    assert why()[0] == "workers_paused"
    assert why()[1].startswith("all matching workers are paused: 3, so ")
    assert why()[1].endswith(who)
    text = api.call("GET", "/metrics").text.decode()
    assert 'stack_workers{state="paused"} 3.0' in text
    assert "stack_queue_paused{" not in text
    post(api, "queue:d*")
    assert why() == ("queue_paused", f"queue default is paused {who}")
    assert 'stack_queue_paused{queue="default"} 1.0' in api.call("GET", "/metrics").text.decode()
    (row,) = api.call("GET", "/stats").json["waiting"]
    assert (row["why"], row["by"]) == ("queue_paused", "operator")


# --- Tokens ---

TOKENS = {"none": "", "wrong": "wrong", "worker": "w-token", "operator": "o-token", "viewer": "v-token"}


def statuses(api: ApiBench, method: str, path: str, body: Any = None) -> dict[str, tuple[int, str]]:
    """Status and code of an error, by the token that is presented."""
    told = {}
    for name, token in TOKENS.items():
        reply = api.call(method, path, body, W1 | (bearer(token) if token else {}))
        told[name] = reply.status, reply.json["error"] if reply.status >= 400 else ""
    return told


@pytest.fixture
def guarded(api: ApiBench) -> ApiBench:
    api.make_ready()
    api.server.api_tokens, api.server.operator_tokens = ["w-token", "w2-token"], ["o-token", "o2-token"]
    api.server.viewer_tokens = ["v-token"]
    return api


ACTS = [("POST", "/holds", {"target": "worker:w1", **SWAP}), ("DELETE", "/holds/worker:w1", None)]
CLAIMS = [
    ("GET", "/jobs?query=queue=linux", None),
    ("POST", f"/jobs/{UUID}/touch", {"claim": "x"}),
    ("POST", f"/jobs/{UUID}/release", {"claim": "x"}),
    ("POST", f"/jobs/{UUID}/complete", {"claim": "x"}),
    ("POST", "/workers/w1", {}),
]
NOBODY = {"none": (401, "unauthorized"), "wrong": (401, "unauthorized")}


@sqlite_only
@pytest.mark.parametrize(("method", "path", "body"), ACTS, ids=lambda each: str(each)[:12])
def test_act_is_for_operators_alone(guarded: ApiBench, method: str, path: str, body: Any) -> None:
    others = dict.fromkeys(["worker", "viewer"], (403, "operators_only"))
    assert statuses(guarded, method, path, body) == NOBODY | others | {"operator": (200, "")}


@sqlite_only
@pytest.mark.parametrize(("method", "path", "body"), CLAIMS, ids=lambda each: str(each)[:12])
def test_claim_and_what_follows_are_for_workers_alone(guarded: ApiBench, method: str, path: str, body: Any) -> None:
    told = statuses(guarded, method, path, body)
    assert told.pop("worker")[0] in (200, 204, 409)  # 409: let in, but it has no such claim
    assert told == NOBODY | dict.fromkeys(["operator", "viewer"], (403, "workers_only"))


@sqlite_only
def test_read_is_for_all_three_and_metrics_not_for_viewers(guarded: ApiBench) -> None:
    all_may = NOBODY | dict.fromkeys(["worker", "operator", "viewer"], (200, ""))
    for path in "/fleet", "/stats", "/queue", f"/jobs/{UUID}":
        assert statuses(guarded, "GET", path) == all_may
    refused = {name: guarded.call("GET", "/metrics", headers=bearer(TOKENS[name])).status for name in TOKENS}
    assert refused == {"none": 401, "wrong": 401, "worker": 200, "operator": 200, "viewer": 403}


@sqlite_only
def test_act_without_a_token_of_operators_set_is_refused_to_all_who_present_one(guarded: ApiBench) -> None:
    guarded.server.operator_tokens = ()
    for method, path, body in ACTS:
        told = statuses(guarded, method, path, body)
        assert told == NOBODY | dict.fromkeys(["worker", "viewer"], (403, "operators_only")) | {
            "operator": (401, "unauthorized")
        }
    reply = guarded.call("POST", "/holds", {}, bearer("w-token"))
    assert "OPERATOR_TOKEN: it is not set" in reply.json["message"]


@sqlite_only
def test_act_where_only_operators_have_a_token_needs_it_and_workers_need_none(guarded: ApiBench) -> None:
    guarded.server.api_tokens = ()
    method, path, body = ACTS[0]
    told = statuses(guarded, method, path, body)
    assert told == NOBODY | {"worker": (401, "unauthorized"), "viewer": (403, "operators_only"), "operator": (200, "")}
    assert guarded.call("GET", "/jobs?query=queue=linux", headers=W2).status == 204


@sqlite_only
def test_act_where_no_token_is_set_is_for_everybody_on_the_machine(api: ApiBench) -> None:
    for method, path, body in ACTS:
        assert api.call(method, path, body).status == 200


@pytest.mark.parametrize("one", ["STACK_API_TOKEN", "OPERATOR_TOKEN"])
def test_read_settings_with_one_token_for_two_parties_names_them(settings: Callable[..., Settings], one: str) -> None:
    assert settings(STACK_API_TOKEN="a,b", OPERATOR_TOKEN="c", VIEWER_TOKEN="d").problems() == []
    (problem,) = settings(
        **{"STACK_API_TOKEN": "a,b", "OPERATOR_TOKEN": "c", "VIEWER_TOKEN": "d,e"} | {one: "d"}
    ).problems()
    assert problem.startswith(f"VIEWER_TOKEN: has a token of {one} too")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """A scheduler whose tokens are in files: "worker-token", "operator-token", "viewer-token"."""
    files = {name: tmp_path / name for name in ("operator", "viewer")}
    for name, file in files.items():
        file.write_text(f"{name}-token")
    live = Live(tmp_path, monkeypatch, **{f"{name.upper()}_TOKEN_FILE": str(file) for name, file in files.items()})
    yield live
    live.close()


def who_may_resume(live: Live, *tokens: str) -> set[str]:
    """Of these tokens those that operators present: nothing is held."""
    with closing(Connection(live.port)) as connection:
        told = {token: connection.call("DELETE", "/holds/queue:default", headers=bearer(token)) for token in tokens}
    assert {reply.status for reply in told.values()} <= {200, 401, 403}
    return {token for token, reply in told.items() if reply.status == 200}


def test_start_with_tokens_lets_operators_act_and_reload_takes_the_new_one(live: Live, tmp_path: Path) -> None:
    tokens = ("old-token", "operator-token", "viewer-token", "new-token")
    assert who_may_resume(live, *tokens) == {"operator-token"}
    (tmp_path / "operator").write_text("new-token")
    live.scheduler.reload()
    assert who_may_resume(live, *tokens) == {"new-token"}
    with closing(Connection(live.port)) as connection:
        assert connection.call("GET", "/stats", headers=bearer("viewer-token")).status == 200


@pytest.mark.parametrize(
    ("text", "reason"), [("", "OPERATOR_TOKEN: is empty now"), ("old-token", "OPERATOR_TOKEN: has a")]
)
def test_reload_with_a_token_of_operators_that_lets_others_act_keeps_the_old_one(
    live: Live, tmp_path: Path, text: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "operator").write_text(text)
    live.scheduler.reload()
    assert reason in caplog.text
    assert who_may_resume(live, "old-token", "operator-token", "viewer-token") == {"operator-token"}


# --- Real processes ---


def act(stack: StackProcesses, number: int, target: str, **body: Any) -> dict[str, Any]:
    """What that scheduler answers to a hold."""
    reply = requests.post(
        f"{stack.urls[number]}/holds", json={"target": target, **SWAP, **body}, headers=ANN, timeout=30
    )
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def resume(stack: StackProcesses, number: int, target: str) -> None:
    reply = requests.delete(f"{stack.urls[number]}/holds/{target}", headers=ANN, timeout=30)
    assert (reply.status_code, len(reply.json()["lifted"])) == (200, 1), reply.text


def on_host(stack: StackProcesses, number: int, slot: str, host: str, wait: int) -> requests.Response:
    headers = {"X-Worker-ID": slot, "X-Worker-Session": "a", "X-Worker-Host": host}
    asked = {"query": "queue=default", "wait": str(wait)}
    return requests.get(f"{stack.urls[number]}/jobs", params=asked, headers=headers, timeout=wait + 30)


def test_pause_of_a_host_leaves_its_workers_without_a_job_and_why_names_who_over_a_kill(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack:
        killed = stack.start_scheduler()
        for slot in "a1", "a2":
            assert on_host(stack, 0, slot, "build1", 0).status_code == 204
        assert act(stack, 0, "host:build1")["binds"] == {"workers": 2, "hosts": 1, "queues": 0, "jobs": 0}
        killed.kill()
        killed.ended()
        stack.start_scheduler()
        uuid = fake.add_job()
        wait_until(lambda: stack.stats()["states"]["ready"] == 1)
        assert [on_host(stack, 0, slot, "build1", 0).status_code for slot in ("a1", "a2")] == [204, 204]
        told = stack.job(uuid)
        assert told["why"] == "workers_paused"
        assert "host:build1 paused by ann@build1 since 2" in told["why_text"]
        assert told["why_text"].endswith(": disk swap")
        with ThreadPoolExecutor(1) as pool:
            parked = pool.submit(on_host, stack, 0, "a1", "build1", 20)
            wait_until(lambda: "paused" in [each["state"] for each in stack.stats()["workers"]])
            resume(stack, 0, "host:build1")
            resumed_at = time.monotonic()
            assert parked.result().json()["uuid"] == uuid
            assert time.monotonic() - resumed_at < 10  # the claim would have waited twice as long


class Crowd:
    """64 workers of two hosts that claim at two schedulers, again and again; each completes what it gets."""

    def __init__(self, stack: StackProcesses):
        self.stack, self.over = stack, threading.Event()
        #: Of each claim: when it began, its host and scheduler, and whether it got a job.
        self.claims: list[tuple[float, str, int, bool]] = []
        self.threads = [threading.Thread(target=self.work, args=[number]) for number in range(64)]

    def work(self, number: int) -> None:
        at, host = number % 2, f"build{number // 2 % 2}"
        headers = {"X-Worker-ID": f"w{number}", "X-Worker-Session": "a", "X-Worker-Host": host}
        url, session = self.stack.urls[at], requests.Session()
        while not self.over.is_set():
            began_at = time.monotonic()
            reply = session.get(f"{url}/jobs?query=queue=default&wait=1", headers=headers, timeout=30)
            self.claims.append((began_at, host, at, reply.status_code == 200))
            if reply.status_code == 200:
                job = reply.json()
                session.post(
                    f"{url}/jobs/{job['uuid']}/release", json={"claim": job["claim"]}, headers=headers, timeout=30
                )

    def given(self, host: str, since: float) -> list[int]:
        """How many jobs that host got, at each scheduler, with claims that began since."""
        got = [at for began_at, where, at, is_given in self.claims if is_given and where == host and began_at >= since]
        return [got.count(0), got.count(1)]

    def wait_for(self, host: str, count: int) -> None:
        """Until it got so many more jobs at both."""
        since = time.monotonic()
        wait_until(lambda: min(self.given(host, since)) >= count, seconds=60)

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.long
def test_hold_said_to_one_scheduler_binds_every_later_claim_at_both_under_64_workers(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    start(stack)
    for _ in range(100):
        fake.add_job()
    with Crowd(stack) as crowd:
        for said_to in (0, 1, 0):
            crowd.wait_for("build1", 1)
            act(stack, said_to, "host:build1")
            acknowledged_at = time.monotonic()
            crowd.wait_for("build0", 10)  # long enough for what would slip through
            assert crowd.given("build1", acknowledged_at) == [0, 0]
            resume(stack, 1 - said_to, "host:build1")
        assert len(crowd.claims) > 100


@pytest.mark.parametrize("target", ["host:build1", "queue:default"])
def test_resume_and_expiry_at_one_scheduler_wake_claims_that_wait_at_the_other(
    stack: StackProcesses, fake: FakeBuildkite, target: str
) -> None:
    start(stack)
    assert on_host(stack, 1, "w0", "build1", 0).status_code == 204
    with ThreadPoolExecutor(1) as pool:
        act(stack, 0, target)
        first = fake.add_job()
        wait_until(lambda: stack.stats(1)["states"]["ready"] == 1)
        parked = pool.submit(on_host, stack, 1, "w1", "build1", 30)
        wait_until(lambda: "w1" in [each["name"] for each in stack.stats(1)["workers"]])
        resumed_at = time.monotonic()
        resume(stack, 0, target)
        assert parked.result().json()["uuid"] == first
        assert time.monotonic() - resumed_at < 10  # the claims would have waited three times as long
        second, held_at = fake.add_job(), time.monotonic()
        act(stack, 0, target, seconds=3)
        assert pool.submit(on_host, stack, 1, "w2", "build1", 30).result().json()["uuid"] == second
        assert 2.9 < time.monotonic() - held_at < 10


#: Python runs this at its start: the clock of the wall is off by what a file says, and the monotonic one is not.
SET_CLOCK = """
import os, time
wall_clock, path = time.time, os.environ["TEST_CLOCK"]
def stepped():
    with open(path) as file:
        return wall_clock() + float(file.read())
time.time = stepped
"""


@pytest.fixture
def set_clock(tmp_path: Path) -> Callable[[float], dict[str, Any]]:
    """Sets the clock of processes that are started with these variables, by so many seconds."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(SET_CLOCK)
    path = tmp_path / "clock"

    def set_by(seconds: float) -> dict[str, Any]:
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").replace(path)
        return {"PYTHONPATH": str(tmp_path / "python"), "TEST_CLOCK": str(path)}

    return set_by


@pytest.mark.parametrize("seconds", [1, 3600])
@pytest.mark.parametrize("target", ["worker:a1", "queue:default"])
def test_hold_expires_while_nobody_looks_by_time_or_by_a_step_of_the_clock_and_does_not_come_back(
    fake: FakeBuildkite, tmp_path: Path, set_clock: Callable[[float], dict[str, Any]], target: str, seconds: float
) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack, ThreadPoolExecutor(1) as pool:
        scheduler = stack.start_scheduler(**set_clock(0.0))
        assert on_host(stack, 0, "a1", "build1", 0).status_code == 204
        uuid = fake.add_job()
        wait_until(lambda: stack.stats()["states"]["ready"] == 1)
        act(stack, 0, target, seconds=seconds)
        claim = pool.submit(on_host, stack, 0, "a1", "build1", 30)
        if seconds > 60:
            wait_until(lambda: "a1" in [each["name"] for each in stack.stats()["workers"]])
            assert not claim.done()
            set_clock(seconds + 1)
            scheduler.wait_for_line("clock", f"step_s={seconds + 1:.0f}")
        scheduler.wait_for_line("lifted", f"target={target}", "its time is over")
        assert claim.result().json()["uuid"] == uuid
        set_clock(-3600.0)
        scheduler.wait_for_line("clock", f"step_s={-7201 if seconds > 60 else -3600}")
        assert requests.get(f"{stack.url}/fleet", timeout=10).json()["holds"] == []


def test_allow_of_a_job_hands_it_to_a_paused_worker_and_no_other_job(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack:
        stack.start_scheduler()
        stack.start_worker("a1").wait_for_line("started")
        wait_until(lambda: "a1" in [each["name"] for each in stack.stats()["workers"]])
        act(stack, 0, "worker:a1")
        held, allowed = fake.add_job(priority=9), fake.add_job()
        wait_until(lambda: stack.stats()["states"]["ready"] == 2)
        reply = requests.post(f"{stack.url}/jobs/{allowed}/allow", json={"note": "hotfix"}, headers=ANN, timeout=10)
        assert reply.status_code == 200
        fake.wait_for(lambda: fake.jobs[allowed].state == "finished", timeout=30)
        wait_until(lambda: stack.job(held).get("why") == "workers_paused")
        assert (stack.job(held)["state"], stack.job(held)["claims"]) == ("ready", 0)
        resume(stack, 0, "worker:a1")
        fake.wait_for(lambda: fake.jobs[held].state == "finished", timeout=30)


def is_back(stack: StackProcesses, uuid: str, failures: int) -> bool:
    job = stack.job(uuid)
    return (len(job["tries"]), job["state"]) == (failures, "ready")


def test_resume_with_quarantine_wakes_a_claim_that_waits_for_the_end_of_its_backoff(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    """With two schedulers: it is said to one, and the claim waits at the other."""
    start(stack)
    headers = {"X-Worker-ID": "a1", "X-Worker-Session": "a", "X-Worker-Host": "build1"}
    on_host(stack, 1, "a2", "build1", 0)  # a host with another slot is not quarantined for this one's failures
    uuid = fake.add_job()
    for failures in range(1, 5):  # 2, 4, 8 and then 16 s without a job
        job = on_host(stack, 1, "a1", "build1", 30).json()
        body = {"claim": job["claim"], "exit_status": 1}
        requests.post(f"{stack.urls[1]}/jobs/{job['uuid']}/complete", json=body, headers=headers, timeout=10)
        wait_until(functools.partial(is_back, stack, uuid, failures))
    with ThreadPoolExecutor(1) as pool:
        began_at = time.monotonic()
        claim = pool.submit(on_host, stack, 1, "a1", "build1", 30)
        wait_until(lambda: "failing" in [each["state"] for each in stack.stats(1)["workers"]])
        assert not claim.done()
        reply = requests.delete(f"{stack.urls[0]}/holds/host:build1?quarantine=1", headers=ANN, timeout=10)
        assert [hold["reason"] for hold in reply.json()["lifted"]] == ["workers_failing"]
        assert claim.result().json()["uuid"] == uuid
        assert time.monotonic() - began_at < 10
