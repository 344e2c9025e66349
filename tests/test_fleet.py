"""What operators look at: who each worker is, what it does and waits for, and `GET /fleet`, which tells all of it."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

import scheduler
import worker
from conftest import Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path
from scheduler import Finding, Hold, Holder, Job, RuleSet, Settings, Store
from test_api import OTHER, UUID, W1, W2, Bench, park, waits
from test_deaths import until_file

__all__ = ["waits"]  # a fixture

#: RFC 3339 of the test clock's start, and of so many seconds later.
T0, T10 = "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:10.000Z"
A = {"X-Worker-Host": "build-a", "X-Worker-Machine": "1a"}
B = {"X-Worker-Host": "build-b", "X-Worker-Machine": "2b"}
QUERY = "/jobs?query=queue=default"


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        yield bench


def fleet(bench: Bench) -> Any:
    """The fleet as it is now: time passes, so that it is made again."""
    bench.clock.advance(scheduler.OVERVIEW_AGE_SECONDS)
    reply = bench.call("GET", "/fleet")
    assert reply.status == 200
    return reply.json


def workers(bench: Bench) -> dict[str, Any]:
    return {worker["name"]: worker for host in fleet(bench)["hosts"] for worker in host["workers"]}


def say(bench: Bench, state: str, reason: str = "", who: dict[str, str] | None = None) -> Any:
    return bench.call("POST", "/workers/w1", {"agent": "3.137.0", "state": state, "reason": reason}, who or (W1 | A))


def put(
    bench: Bench, number: int, *, queue_key: str = "default", rules: tuple[str, ...] = (), priority: int = 0
) -> Job:
    """A job that Buildkite has listed and not yet reserved."""
    now = bench.clock.now()
    raw = {
        "id": f"018f0000-0000-4000-8000-{number:012}",
        "agent_query_rules": list(rules),
        "priority": priority,
        "scheduled_at": scheduler.rfc3339(now),
    }
    (job,) = bench.store.put([Job.from_api(queue_key, raw, now)], bench.store.sequence(), now)
    return job


def fail(bench: Bench, uuid: str, who: dict[str, str]) -> None:
    """An attempt that counts: the agent ends without acquiring the job, and Buildkite says that it is still free."""
    bench.clock.advance(scheduler.MAX_HOLD_SECONDS)
    claim = bench.claim(who)["claim"]
    now = bench.clock.now()
    bench.store.answered("default", now)
    bench.call("POST", f"/jobs/{uuid}/complete", {"claim": claim, "exit_status": 1}, who)
    bench.store.confirm([uuid], bench.store.sequence(), now + 900, now)


# --- Who a worker is ---


def test_claim_tells_host_and_machine_which_the_store_keeps_until_they_change(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1)
    bench.call("GET", QUERY, headers=W1 | A)  # the same session: its scheduler may have been older
    (row,) = bench.store.workers()
    assert (row.host, row.machine) == ("build-a", "1a")
    bench.call("GET", QUERY, headers=W1 | B | {"X-Worker-Session": "another"})
    (row,) = bench.store.workers()
    assert (row.host, row.machine, row.retired) == ("build-b", "2b", (W1["X-Worker-Session"],))


def test_claim_with_a_host_that_is_too_long_or_not_printable_is_refused(bench: Bench) -> None:
    for name in A:
        for wrong in ("x" * (scheduler.NAME_LETTERS + 1), "a\x07b"):
            assert bench.call("GET", QUERY, headers=W1 | {name: wrong}).refusal == (400, "bad_header")


def test_claim_that_ends_keeps_its_host_in_the_tries_of_its_job(bench: Bench) -> None:
    bench.make_ready()
    fail(bench, UUID, W1 | A)
    fail(bench, UUID, W2)
    told = bench.call("GET", f"/jobs/{UUID}").json
    assert [(ended["worker"], ended["host"]) for ended in told["tries"]] == [("w1", "build-a"), ("w2", None)]


@pytest.mark.parametrize(("second", "is_over"), [(W2 | A, False), (W2 | B, True)], ids=["one host", "two hosts"])
def test_confirm_of_a_job_that_failed_often_finishes_it_when_two_hosts_have_tried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, second: dict[str, str], is_over: bool
) -> None:
    monkeypatch.setattr(scheduler, "ONE_HOST_SECONDS", 3600.0)
    monkeypatch.setattr(scheduler, "QUARANTINE_AFTER", 10)
    bench.make_ready()
    for number in range(5):
        fail(bench, UUID, second if number == 2 else W1 | A)
    job = bench.store.get(UUID)
    assert job and job.attempts == 5
    assert bool(job.finish_detail) == is_over
    assert ("worker w2 on build-b" in (job.finish_detail or "")) == is_over


@pytest.mark.parametrize(
    ("tries", "is_over"),
    [
        ([("w1", "a"), ("w2", "a")], False),
        ([("w1", "a"), ("w1", "b")], True),
        ([("w1", None), ("w2", None)], True),  # they tell no host: their names count
        ([("w1", None), ("w1", None)], False),
    ],
)
def test_fail_too_often_is_a_matter_of_hosts(tries: list[tuple[str, str | None]], is_over: bool) -> None:
    job = Job.from_api("default", {"id": UUID}, 1000.0)
    ended = tuple({"worker": w, "host": host, "counted": True, "claimed_at": 1000.0} for w, host in tries)
    job = dataclasses.replace(job, attempts=len(tries), tries=ended)
    assert scheduler.failed_too_often(job, 2, 1010.0) is is_over
    assert scheduler.failed_too_often(job, 2, 1000.0 + scheduler.ONE_HOST_SECONDS)
    assert not scheduler.failed_too_often(job, 3, 1e9)


def test_two_machines_under_one_host_s_name_are_a_problem_until_one_is_gone(bench: Bench) -> None:
    copied = {"X-Worker-Host": "build-a", "X-Worker-Machine": "3c"}
    bench.call("GET", QUERY, headers=W1 | A)
    bench.call("GET", QUERY, headers=W2 | B)
    assert fleet(bench)["problems"] == bench.call("GET", "/health").json["problems"] == []
    bench.call("GET", QUERY, headers={"X-Worker-ID": "w3"} | copied)
    bench.clock.advance(scheduler.MACHINES_SECONDS)
    (problem,) = bench.call("GET", "/health").json["problems"]
    assert problem.startswith("2 machines have the host name build-a: those of workers w1, w3; set WORKER_HOST")
    told = fleet(bench)
    assert told["problems"] == [problem]
    assert {host["host"]: host["machines"] for host in told["hosts"]} == {"build-a": 2, "build-b": 1}
    bench.clock.advance(scheduler.MACHINE_SECONDS)
    bench.call("GET", QUERY, headers=W1 | A)
    assert bench.call("GET", "/health").json["problems"] == fleet(bench)["problems"] == []


# --- What a worker says of itself ---


def test_introduce_worker_that_waits_tells_why_until_it_claims(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    assert say(bench, "no_agent", "it is not there").json == {"name": "w1"}
    bench.clock.advance(20)
    say(bench, "no_agent", "it cannot be run")
    told = workers(bench)["w1"]
    assert (told["state"], told["since"], told["reason"]) == ("failing", T0, "it cannot be run")
    bench.call("GET", QUERY, headers=W1 | A)
    told = workers(bench)["w1"]
    assert (told["state"], told["reason"]) == ("away", None)


def test_introduce_worker_whose_word_is_over_a_minute_old_counts_as_away(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    say(bench, "earlier_agent", "a reason")
    bench.clock.advance(scheduler.REPORTED_SECONDS - scheduler.OVERVIEW_AGE_SECONDS)
    assert workers(bench)["w1"]["state"] == "working"
    told = workers(bench)["w1"]
    assert (told["state"], told["since"], told["reason"]) == ("away", T0, None)


def test_introduce_worker_with_an_unknown_state_is_refused_with_those_that_are_known(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    reply = say(bench, "bored")
    assert reply.refusal == (400, "bad_body")
    assert "`state` is 'bored'; it may be idle, earlier_agent, no_agent" in reply.json["message"]
    assert workers(bench)["w1"]["agent"] is None


@pytest.mark.parametrize(
    ("place", "status"),
    [(A, 200), ({}, 409), ({"X-Worker-Host": "build-a"}, 409), (A | {"X-Worker-Machine": "9f"}, 409), (B, 409)],
)
def test_introduce_worker_that_has_not_claimed_yet_is_heard_on_the_machine_of_its_name_alone(
    bench: Bench, place: dict[str, str], status: int
) -> None:
    bench.make_ready()
    claim = bench.claim(W1 | A)["claim"]
    restarted = {"X-Worker-ID": "w1", "X-Worker-Session": "not yet claimed", **place}
    assert say(bench, "earlier_agent", "its agent lives", restarted).status == status
    (row,) = bench.store.workers()
    assert (row.told_state == "earlier_agent", row.session) == (status == 200, W1["X-Worker-Session"])
    # It has taken nothing over: the job is its holder's.
    assert bench.call("POST", f"/jobs/{UUID}/touch", {"claim": claim}, W1 | A).status == 200


def test_introduce_worker_that_was_replaced_is_refused_on_the_same_machine_too(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    bench.call("GET", QUERY, headers=W1 | A | {"X-Worker-Session": "the next"})
    assert say(bench, "idle", "", W1 | A).refusal == (409, "worker_name_taken")


def test_stats_of_a_job_whose_workers_wait_for_earlier_agents_say_that_all_are_busy(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    say(bench, "earlier_agent")
    bench.make_ready()
    bench.clock.advance(scheduler.LIVE_SECONDS + 1)
    (row,) = bench.call("GET", "/stats").json["waiting"]
    assert (row["why"], row["why_text"]) == ("workers_busy", "all matching workers are busy: 1")
    say(bench, "no_agent")
    (row,) = bench.call("GET", "/stats").json["waiting"]
    assert row["why"] == "workers_failing"


def test_forget_silent_workers_keeps_one_that_still_tells_of_itself(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=W1 | A)
    bench.call("GET", QUERY, headers=W2 | B)
    bench.clock.advance(100_000)
    say(bench, "earlier_agent")
    bench.store.prune(bench.clock.now() - 86400)
    assert len(bench.store.workers()) == 2
    bench.clock.advance(7 * 86400 - 100_000 + 1)
    bench.store.prune(bench.clock.now() - 86400)
    assert [row.name for row in bench.store.workers()] == ["w1"]


# --- GET /fleet ---


def test_fleet_without_workers_and_jobs_is_empty(bench: Bench) -> None:
    assert fleet(bench) == {
        "now": "2027-01-15T08:00:05.000Z",
        "problems": [],
        "wrong": [],
        "counts": {
            "waiting": 0,
            "oldest_wait_seconds": None,
            "running": 0,
            "leased": 0,
            "workers": dict.fromkeys(["working", "failing", "unfit", "idle", "away", "paused", "offline"], 0),
        },
        "queues": [],
        "hosts": [],
        "jobs": [],
        "stuck": [],
        "holds": [],
        "freezes": [],
        "acts": [],
    }


def test_fleet_tells_queues_with_what_waits_and_runs_in_each_and_who_serves_it(bench: Bench) -> None:
    bench.make_ready()
    bench.make_ready(OTHER)
    bench.claim(W1 | A)
    put(bench, 3)
    put(bench, 4, queue_key="mac")
    bench.store.pause("mac", True, bench.clock.now())
    told = fleet(bench)
    hold = {
        "target": "queue:mac",
        "owner": "buildkite",
        "reason": "queue_paused",
        "by": "",
        "note": "",
        "since": T0,
        "until": None,
    }
    assert told["queues"] == [
        {
            "queue": "default",
            "waiting": 2,
            "ready": 1,
            "reserving": 1,
            "leased": 1,
            "running": 0,
            "oldest_wait_seconds": 64.8,
            "holds": [],
            "workers": 1,
        },
        {
            "queue": "mac",
            "waiting": 1,
            "ready": 0,
            "reserving": 1,
            "leased": 0,
            "running": 0,
            "oldest_wait_seconds": 5.0,
            "holds": [hold],
            "workers": 0,
        },
    ]
    assert told["holds"] == [hold]
    counts = told["counts"]
    assert {name: counts[name] for name in ("waiting", "leased", "running")} == {
        "waiting": 3,
        "leased": 1,
        "running": 0,
    }
    assert counts["oldest_wait_seconds"] == 64.8


def test_fleet_tells_jobs_in_line_each_with_its_place_in_its_queue_and_why_it_waits(bench: Bench) -> None:
    put(bench, 1)
    put(bench, 2, queue_key="mac", priority=9)
    put(bench, 3, priority=5)
    told = fleet(bench)["jobs"]
    assert [(job["uuid"][-1], job["place"]) for job in told] == [("2", 1), ("3", 1), ("1", 2)]
    assert {job["wait_seconds"] for job in told} == {5.0}
    assert (told[0]["why"], told[0]["why_text"]) == ("no_worker", "no live worker serves queue mac")
    (listed,) = bench.call("GET", "/queue?state=reserving&queue=mac").json["jobs"]
    assert {name: told[0][name] for name in listed} == listed


def test_fleet_of_a_long_line_tells_the_first_of_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "OVERVIEW_JOBS", 2)
    for number in (3, 4):
        put(bench, number)
    bench.make_ready(priority=3)
    told = fleet(bench)
    assert [job["uuid"][-1] for job in told["jobs"]] == [UUID[-1], "3"]
    assert told["counts"]["waiting"] == 3


def test_fleet_of_a_long_line_counts_what_only_a_person_can_help_wherever_it_stands(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "OVERVIEW_JOBS", 2)
    bench.call("GET", QUERY, headers=W1)
    for number, rules in ((1, ("gpu=*",)), (2, ("gpu=*",)), (3, ("os=mac",)), (4, ("=gpu",))):
        put(bench, number, rules=rules)
    for number in (5, 6, 7):
        put(bench, number, priority=9)
    bench.clock.advance(scheduler.WRONG_SECONDS - 10)
    told = fleet(bench)
    assert (told["stuck"], told["wrong"]) == ([], [])
    bench.clock.advance(5)
    told = fleet(bench)
    assert [job["uuid"][-1] for job in told["jobs"]] == ["5", "6"]
    assert [(row["why"], row["jobs"], row["uuid"][-1]) for row in told["stuck"]] == [
        ("no_worker", 3, "1"),
        ("rules_not_understood", 1, "4"),
    ]
    first, second = told["wrong"]
    text = f"see `why {told['stuck'][0]['uuid']}`: 3 jobs cannot run: no_worker: no live worker of queue default has"
    assert (first.startswith(text), "1 job cannot run: rules_not_understood: " in second) == (True, True)


def test_fleet_of_a_long_line_counts_a_job_put_aside_beside_others_with_its_rules(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "OVERVIEW_JOBS", 2)
    bench.make_ready()
    for ends in (1, 2, 3):
        holder = Holder(UUID, bench.claim(W1)["claim"])
        now = bench.clock.now()
        bench.store.withdraw(holder, "no answer could be made", "unanswerable", now)
        if ends < 3:
            bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    for number in (5, 6, 7):
        bench.make_ready(f"018f0000-0000-4000-8000-{number:012}", priority=9)
    bench.clock.advance(scheduler.WRONG_SECONDS - 20)
    told = fleet(bench)
    assert UUID not in [job["uuid"] for job in told["jobs"]]
    assert [(row["why"], row["jobs"], row["uuid"]) for row in told["stuck"]] == [("put_aside", 1, UUID)]


def test_fleet_tells_workers_by_host_and_since_when_each_is_what_it_is(
    bench: Bench, waits: queue.SimpleQueue[str]
) -> None:
    bench.make_ready()
    bench.claim(W1 | A)
    bench.clock.advance(5)
    park(bench, waits, "w2")
    told = fleet(bench)
    assert [(host["host"], host["machines"]) for host in told["hosts"]] == [("", 0), ("build-a", 1)]
    assert told["hosts"][1]["workers"] == [
        {
            "name": "w1",
            "state": "working",
            "tags": "",
            "queues": ["_default", "default"],
            "job": UUID,
            "claims": 1,
            "jobs_done": 0,
            "last_seen_at": T0,
            "version": None,
            "agent": None,
            "agent_supported_until": None,
            "free_bytes": None,
            "strays": 0,
            "host": "build-a",
            "since": T0,
            "reason": None,
            "by": None,
            "holds": [],
        }
    ]
    (idle,) = told["hosts"][0]["workers"]
    assert (idle["name"], idle["state"], idle["since"]) == ("w2", "idle", "2027-01-15T08:00:05.000Z")
    counts = told["counts"]["workers"]
    assert counts == {"working": 1, "idle": 1, **dict.fromkeys(["failing", "unfit", "away", "paused", "offline"], 0)}


@pytest.mark.parametrize(("silent", "since"), [(30, T0), (31, "2027-01-15T08:00:31.000Z")])
def test_fleet_tells_of_an_idle_worker_since_when_it_has_asked_in_vain(
    bench: Bench, waits: queue.SimpleQueue[str], silent: float, since: str
) -> None:
    bench.call("GET", QUERY, headers=W1)
    bench.clock.advance(silent)
    park(bench, waits, "w1")
    told = workers(bench)["w1"]
    assert (told["state"], told["since"]) == ("idle", since)


def test_fleet_tells_of_an_idle_worker_since_its_last_job_was_over(bench: Bench, waits: queue.SimpleQueue[str]) -> None:
    bench.call("GET", QUERY, headers=W1)
    bench.make_ready()
    bench.claim(W1)
    bench.learn(UUID, Finding.OVER, "finished")
    bench.clock.advance(10)
    park(bench, waits, "w1")
    assert workers(bench)["w1"]["since"] == T10


def test_fleet_tells_of_a_failing_worker_since_when_why_and_until_when(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "QUARANTINE_AFTER", 10)
    bench.make_ready()
    for _ in range(3):
        fail(bench, UUID, W1 | A)
    failed_at = scheduler.rfc3339(bench.clock.now())
    told = workers(bench)["w1"]
    until = scheduler.rfc3339(bench.clock.now() - 5 + 8)
    assert (told["state"], told["since"]) == ("failing", failed_at)
    text = f"3 of its agents in a row ended without acquiring a job; it gets none before {until}"
    assert told["reason"] == text
    (hold,) = told["holds"]
    assert (hold["target"], hold["owner"], hold["until"]) == ("worker:w1", "machine", until)


@pytest.mark.parametrize("is_working", [True, False])
def test_fleet_tells_of_a_worker_that_people_hold_who_and_why_once_its_job_is_over(
    bench: Bench, is_working: bool
) -> None:
    if is_working:
        bench.make_ready()
    bench.call("GET", QUERY, headers=W1 | A)
    bench.call("GET", QUERY, headers=W2 | B)
    fleet(bench)
    bench.clock.advance(1)
    wanted = {"target": "host:build-a", "note": "disk swap", "seconds": 3600}
    assert bench.call("POST", "/holds", wanted, {"X-Operator": "ann"}).status == 200
    told = bench.call("GET", "/fleet").json  # at once: a hold is a change
    first, second = told["hosts"]
    (held,), (free,) = first["workers"], second["workers"]
    hold = {
        "target": "host:build-a",
        "owner": "operator",
        "reason": "paused",
        "by": "ann",
        "note": "disk swap",
        "since": "2027-01-15T08:00:06.000Z",
        "until": "2027-01-15T09:00:06.000Z",
    }
    assert told["holds"] == first["holds"] == held["holds"] == [hold]
    assert second["holds"] == free["holds"] == []
    shown = {name: held[name] for name in ("state", "since", "reason", "by")}
    if is_working:
        assert shown == {"state": "working", "since": T0, "reason": None, "by": None}
    else:
        assert shown == {"state": "paused", "since": hold["since"], "reason": "disk swap", "by": "ann"}
    assert told["counts"]["workers"]["paused"] == (not is_working)
    act = {"at": hold["since"], "by": "ann", "act": "pause", "target": "host:build-a", "note": "disk swap"}
    assert told["acts"] == [act]


def test_fleet_that_has_not_changed_is_not_sent_again(bench: Bench) -> None:
    first = bench.call("GET", "/fleet")
    etag = first.headers["ETag"]
    for known in (etag, f'"other", W/{etag}'):
        bench.clock.advance(2 * scheduler.OVERVIEW_AGE_SECONDS)
        again = bench.call("GET", "/fleet", headers={"If-None-Match": known})
        assert (again.status, again.text, again.headers["ETag"]) == (304, b"", etag)
    assert bench.call("GET", "/fleet", headers={"If-None-Match": '"other"'}).text == first.text
    # The connection goes on: a 304 has no body.
    put(bench, 1)
    bench.clock.advance(1)
    changed = bench.call("GET", "/fleet", headers={"If-None-Match": etag})
    assert (changed.status, changed.json["counts"]["waiting"]) == (200, 1)
    assert changed.headers["ETag"] != etag


@sqlite_only
def test_fleet_is_made_once_a_second_at_most_and_only_when_something_has_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[float]()

    class Counted(scheduler.Fleet):
        def __init__(self, store: Store, dispatcher: scheduler.Dispatcher, now: float):
            made.append(now)
            super().__init__(store, dispatcher, now)

    monkeypatch.setattr(scheduler, "Fleet", Counted)

    def ask_again_after(seconds: float) -> int:
        bench.clock.advance(seconds)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: bench.connect().call("GET", "/fleet"), range(4)))
        return len(made)

    assert ask_again_after(0) == 1
    assert ask_again_after(2) == 1
    put(bench, 1)
    assert ask_again_after(0.5) == 2
    put(bench, 2)
    assert ask_again_after(0.5) == 2
    assert ask_again_after(0.5) == 3
    bench.call("GET", QUERY, headers=W1)
    assert ask_again_after(1) == 4
    bench.dispatcher.hold(Hold("tokens:default", "machine", "no_tokens"))
    assert ask_again_after(1) == 5


@sqlite_only
def test_fleet_shows_what_time_alone_changes_within_seconds(bench: Bench) -> None:
    bench.make_ready()
    fail(bench, UUID, W1 | A)

    def states() -> dict[str, int]:
        counts: dict[str, int] = bench.call("GET", "/fleet").json["counts"]["workers"]
        return {state: count for state, count in counts.items() if count}

    assert states() == {"failing": 1}
    bench.clock.advance(scheduler.OVERVIEW_AGE_SECONDS)
    assert states() == {"away": 1}  # 2 s after its agent has failed it may claim again


def test_fleet_after_a_restart_knows_who_each_worker_is_and_what_it_waits_for(
    open_store: Callable[..., Store], clock: Clock, settings: Callable[..., Settings]
) -> None:
    with Bench(open_store(), clock, settings()) as before:
        before.call("GET", QUERY, headers=W1 | A)
        say(before, "earlier_agent", "its agent lives")
    with Bench(open_store(), clock, settings()) as after:
        told = workers(after)["w1"]
    assert (told["host"], told["state"], told["reason"]) == ("build-a", "working", "its agent lives")


def test_fleet_needs_the_token(store: Store, clock: Clock, settings: Callable[..., Settings]) -> None:
    with Bench(store, clock, settings(), token="right") as bench:
        assert bench.call("GET", "/fleet").refusal == (401, "unauthorized")
        assert bench.call("GET", "/fleet", headers={"Authorization": "Bearer right"}).status == 200


def test_hold_of_a_worker_is_the_one_that_keeps_jobs_from_it(bench: Bench) -> None:
    """What `/fleet` lists as a worker's holds is what its claim is refused by."""
    bench.make_ready()
    fail(bench, UUID, W1 | A)
    view = scheduler.Fleet(bench.store, bench.dispatcher, bench.clock.now())
    (member,) = view.members
    (row,) = bench.store.workers()
    assert view.holds_of(member) == [scheduler.blocked(RuleSet.of("default", ()), row, (), bench.clock.now())]


# --- Real processes ---


def test_fleet_of_a_worker_that_waits_for_an_earlier_agent_says_so_before_it_has_claimed(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack:
        uuid = fake.add_job(command=until_file(tmp_path / "end"))
        log = stack.start_scheduler()
        first = stack.start_worker("w1", WORKER_HOST="build-a")
        log.wait_for_line("running", uuid)
        first.kill()
        first.ended()
        second = stack.start_worker("w1", WORKER_HOST="build-a")
        second.wait_for_line("waiting", uuid)

        def told() -> Any:
            fleet = requests.get(f"{stack.url}/fleet", timeout=30).json()
            (host,) = fleet["hosts"]
            (one,) = host["workers"]
            return host | {"worker": one, "fleet": fleet}

        deadline = time.monotonic() + 30
        while not told()["worker"]["reason"]:
            assert time.monotonic() < deadline, told()
            time.sleep(0.1)
        host = told()
        machines = len({worker.machine()} - {""})  # none where the machine has no id, as in some containers
        assert (host["host"], host["machines"], host["fleet"]["problems"]) == ("build-a", machines, [])
        reason = f"the agent of an earlier process of this worker still runs job {uuid}"
        assert (host["worker"]["state"], host["worker"]["job"]) == ("working", uuid)
        assert host["worker"]["reason"] == reason
        (tmp_path / "end").touch()
        second.wait_for_line("gone", uuid)
