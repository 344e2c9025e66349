"""What people are told: why jobs wait, who works, one job's story, the queue page by page, and totals that last."""

from __future__ import annotations

import dataclasses
import datetime
import queue
import sqlite3
import zoneinfo
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scheduler
from conftest import Clock, make_settings, open_sqlite, sqlite_only
from fake_buildkite import FakeBuildkite
from scheduler import (
    Finding,
    Hold,
    Holder,
    Intake,
    Job,
    JobState,
    Leadership,
    Profile,
    RuleSet,
    Settings,
    SqliteRows,
    Stack,
    Store,
    Worker,
)
from test_api import OTHER, UUID, W1, W2, Bench, park, waits
from test_docs import table_after

__all__ = ["waits"]  # a fixture

#: RFC 3339 of the test clock's start, and of so many seconds later.
T0, T10 = "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:10.000Z"


def uuid(number: int) -> str:
    return f"018f0000-0000-4000-8000-{number:012}"


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        yield bench


def put(bench: Bench, number: int, *rules: str, priority: int = 0) -> Job:
    """A job that Buildkite has listed and not yet reserved."""
    now = bench.clock.now()
    raw = {"id": uuid(number), "agent_query_rules": list(rules), "priority": priority}
    (job,) = bench.store.put([Job.from_api("default", raw, now)], bench.store.sequence(), now)
    return job


def waiting(bench: Bench) -> list[Any]:
    rows: list[Any] = bench.call("GET", "/stats").json["waiting"]
    return rows


def why(bench: Bench) -> tuple[str, str]:
    """Why the one rule set waits."""
    (row,) = waiting(bench)
    return (row["why"], row["why_text"])


# --- Why does it wait? ---


def test_stats_name_the_rule_that_no_live_worker_has(bench: Bench) -> None:
    bench.make_ready(rules=("os=mac", "gpu", "arch=arm64"))
    assert why(bench) == ("no_worker", "no live worker serves queue default")
    bench.call("GET", "/jobs?query=arch=arm64", headers=W1)
    assert why(bench) == ("no_worker", "no live worker of queue default has os=mac, gpu=*")
    bench.call("GET", "/jobs?query=os=mac,gpu=a100", headers=W2)
    text = "no live worker has all of queue=default,arch=arm64,gpu=*,os=mac"
    assert why(bench) == ("no_worker", text)


@sqlite_only
def test_stats_of_many_rule_sets_and_profiles_compare_each_with_few(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 100
    for number in range(many):
        bench.make_ready(uuid(number), rules=("os=linux", f"host=h{2 * number}"))
        worker = Worker(f"w{number}", "s", Profile.of(f"queue=default,os=linux,host=h{number}"))
        bench.dispatcher._seen[worker.name] = scheduler.WorkerSighting(bench.clock.now(), worker, waits=False)
    matches, compared = Profile.matches, list[RuleSet]()

    def noted(self: Profile, rules: RuleSet) -> bool:
        compared.append(rules)
        return matches(self, rules)

    monkeypatch.setattr(Profile, "matches", noted)
    reasons = [row["why"] for row in waiting(bench)]
    assert (reasons.count("ahead"), reasons.count("no_worker")) == (many // 2, many // 2)
    assert len(compared) < 10 * many


def test_stats_count_on_no_worker_that_was_silent_for_long(bench: Bench) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    bench.make_ready()
    bench.clock.advance(scheduler.LIVE_SECONDS)
    assert why(bench) == ("ahead", "next in line: 1 matching worker is free")
    bench.clock.advance(1)
    assert why(bench) == (
        "workers_offline",
        "1 worker matches, it is offline since 2027-01-15T08:00:00Z; the last was w1",
    )


def test_stats_say_next_in_line_while_a_worker_without_a_name_waits(
    bench: Bench, waits: queue.SimpleQueue[str]
) -> None:
    park(bench, waits, "")
    bench.make_ready()
    assert why(bench) == ("ahead", "next in line: 1 matching worker is free")


def test_stats_say_how_many_matching_workers_are_busy(bench: Bench) -> None:
    bench.make_ready()
    bench.make_ready(OTHER)
    bench.claim(W1)
    bench.claim(W2)
    bench.make_ready(uuid(3))
    # A job that its worker holds keeps it live, however long it takes.
    bench.clock.advance(3600)
    assert why(bench) == ("workers_busy", "all matching workers are busy: 2")


def test_stats_say_that_the_only_worker_fails(bench: Bench) -> None:
    bench.make_ready()
    claim = bench.claim(W1)["claim"]
    bench.call("POST", f"/jobs/{UUID}/complete", {"claim": claim, "exit_status": 1}, W1)
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    text = "all matching workers are failing: 1; w1: its last agent ended without acquiring a job; it gets none before "
    text += "2027-01-15T08:00:02.000Z"
    assert why(bench) == ("workers_failing", text)


def test_stats_say_that_buildkite_is_asked_or_that_the_queue_is_paused(bench: Bench) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    put(bench, 1)
    assert why(bench) == ("reserving", "Buildkite must confirm that the job may be handed out")
    bench.store.pause("default", True, bench.clock.now())
    assert why(bench) == ("queue_paused", "queue default is paused")


# Each makes job UUID wait for one reason.


def wait_for_its_turn(bench: Bench) -> None:
    see(bench, W1)
    bench.make_ready()


def wait_for_an_answer(bench: Bench) -> None:
    see(bench, W1)
    put(bench, 1)


def wait_for_buildkite_to_resume_the_queue(bench: Bench) -> None:
    wait_for_its_turn(bench)
    bench.store.pause("default", True, bench.clock.now())


def wait_for_an_operator_to_resume_the_queue(bench: Bench) -> None:
    wait_for_its_turn(bench)
    pause(bench, "queue:default")


def wait_for_a_hold_of_a_newer_scheduler(bench: Bench) -> None:
    wait_for_its_turn(bench)
    bench.dispatcher.hold(Hold("rack:1", "inventory", "being_moved"))


def wait_until_it_is_runnable(bench: Bench) -> None:
    see(bench, W1)
    now = bench.clock.now()
    raw = {"id": UUID, "runnable_at": scheduler.rfc3339(now + 100)}
    bench.store.put([Job.from_api("default", raw, now)], bench.store.sequence(), now)


def wait_aside_after_claims_that_could_not_be_answered(bench: Bench) -> None:
    bench.make_ready()
    for _ in range(3):
        holder = Holder(UUID, bench.claim(W1)["claim"])
        now = bench.clock.now()
        bench.store.withdraw(holder, "no answer could be made", "unanswerable", now)
        bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)


def wait_for_the_end_of_a_freeze_window(bench: Bench) -> None:
    see(bench, W1)
    days = (datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1))
    bench.store.windows.use((scheduler.Freeze("a century", *days, zoneinfo.ZoneInfo("UTC")),))
    bench.make_ready()


def wait_for_rules_that_nobody_understands(bench: Bench) -> None:
    see(bench, W1)
    bench.make_ready(rules=("=gpu",))


def wait_for_a_worker(bench: Bench) -> None:
    see(bench, W1, "queue=linux")
    bench.make_ready()


def wait_for_workers_that_work(bench: Bench) -> None:
    bench.make_ready(OTHER)
    bench.claim(W1)
    bench.make_ready()


def wait_for_workers_that_an_operator_paused(bench: Bench) -> None:
    wait_for_its_turn(bench)
    pause(bench, "worker:w1")


def wait_for_workers_whose_agents_failed(bench: Bench) -> None:
    bench.make_ready()
    claim = bench.claim(W1)["claim"]
    bench.call("POST", f"/jobs/{UUID}/complete", {"claim": claim, "exit_status": 1}, W1)
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)


def wait_for_workers_that_are_unfit(bench: Bench) -> None:
    wait_for_its_turn(bench)
    told = {"state": "unfit", "reason": "/builds has 3 MiB free"}
    assert bench.call("POST", "/workers/w1", told, W1).status == 200


def wait_for_workers_that_are_offline(bench: Bench) -> None:
    wait_for_its_turn(bench)
    bench.clock.advance(scheduler.OFFLINE_SECONDS)


def wait_for_tokens(bench: Bench) -> None:
    see(bench, W1, "queue=default&token=1")
    bench.make_ready()
    bench.dispatcher.hold(Hold("tokens:default", "machine", "no_tokens"))


def wait_to_be_stopped(bench: Bench) -> None:
    wait_for_its_turn(bench)
    assert bench.call("POST", f"/jobs/{UUID}/stop", {"note": "wrong branch"}).status == 200


def wait_for_buildkite_to_answer(bench: Bench) -> None:
    wait_for_an_answer(bench)
    with FakeBuildkite(clock=bench.clock.now) as fake:
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        lead = Leadership(bench.store)
        intake = Intake(stack, lead, bench.dispatcher, bench.server.api._settings, bench.clock.now, pytest.fail)
        fake.set_fault("reserve", status=503)
        intake.list.run_once()
        assert told_of_job(bench)["why"] == "reserving"
        intake.reserve.run_once()


def see(bench: Bench, worker: dict[str, str], query: str = "queue=default") -> None:
    """The worker claims, and there is nothing for it."""
    assert bench.call("GET", f"/jobs?query={query}", headers=worker).status == 204


def pause(bench: Bench, target: str) -> None:
    assert bench.call("POST", "/holds", {"target": target, "note": "disk swap"}).status == 200


def told_of_job(bench: Bench) -> Any:
    return bench.call("GET", f"/jobs/{UUID}").json


REASONS: list[tuple[Callable[[Bench], None], str, str | None]] = [
    (wait_for_its_turn, "ahead", None),
    (wait_for_an_answer, "reserving", None),
    (wait_for_buildkite_to_resume_the_queue, "queue_paused", "buildkite"),
    (wait_for_an_operator_to_resume_the_queue, "queue_paused", "operator"),
    (wait_for_a_hold_of_a_newer_scheduler, "queue_paused", "inventory"),
    (wait_until_it_is_runnable, "runnable_at", None),
    (wait_aside_after_claims_that_could_not_be_answered, "put_aside", None),
    (wait_for_the_end_of_a_freeze_window, "frozen", None),
    (wait_for_rules_that_nobody_understands, "rules_not_understood", None),
    (wait_for_a_worker, "no_worker", None),
    (wait_for_workers_that_work, "workers_busy", None),
    (wait_for_workers_that_an_operator_paused, "workers_paused", None),
    (wait_for_workers_that_are_unfit, "workers_unfit", None),
    (wait_for_workers_whose_agents_failed, "workers_failing", None),
    (wait_for_workers_that_are_offline, "workers_offline", None),
    (wait_for_tokens, "no_tokens", None),
    (wait_to_be_stopped, "stopping", None),
    (wait_for_buildkite_to_answer, "upstream_down", None),
]


@pytest.mark.parametrize(
    ("make_it_wait", "why", "by"), REASONS, ids=lambda each: each.__name__ if callable(each) else str(each)
)
def test_job_that_waits_shows_its_reason_in_the_same_word_everywhere(
    bench: Bench, make_it_wait: Callable[[Bench], None], why: str, by: str | None
) -> None:
    make_it_wait(bench)
    job = told_of_job(bench)
    assert (job["why"], job["by"]) == (why, by), job["why_text"]
    (row,) = waiting(bench)
    assert (row["why"], row["by"]) == (why, by)
    metrics = bench.call("GET", "/metrics").text.decode()
    assert f'stack_jobs_waiting{{queue="default",why="{why}"}} 1.0' in metrics
    assert [(each["why"], each["by"]) for each in bench.call("GET", "/fleet").json["jobs"]] == [(why, by)]
    assert scheduler.why_job(job) == f"{why}: {job['why_text']}"


def test_list_of_reasons_has_every_one_made_to_happen() -> None:
    # Those of a policy are made to happen in test_policy_store.
    by_policy = {"undecided", "held_by_policy", "policy_failed", "prefers_elsewhere"}
    assert {why for _, why, _ in REASONS} == {*scheduler.WaitReason} - by_policy


def test_stats_of_jobs_that_are_all_held_say_what_holds_them_until_one_is_not(bench: Bench) -> None:
    now, later = bench.clock.now(), bench.clock.now() + 100
    held = {"scheduled_at": scheduler.rfc3339(now - 50), "runnable_at": scheduler.rfc3339(later)}
    listed = [Job.from_api("default", {"id": uuid(number)} | held, now) for number in (1, 2)]
    bench.store.put(listed, bench.store.sequence(), now)
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    assert why(bench) == ("runnable_at", "Buildkite says that it may not run before 2027-01-15T08:01:40.000Z")
    bench.make_ready(uuid(3))
    assert why(bench)[0] == "ahead"


def test_stats_of_many_rule_sets_look_at_few_jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "HELD_LOOKS", 3)
    looked_at = list[str]()
    monkeypatch.setattr(bench.store, "get", looked_at.append)
    for number in range(1, 6):
        put(bench, number, f"a={number}")
        bench.clock.advance(1)
    bench.make_ready(uuid(6))
    assert [row["rules"] for row in waiting(bench)][1] == "queue=default,a=1"
    assert looked_at == [uuid(1), uuid(2), uuid(3)]


def test_stats_list_what_waits_longest_first(bench: Bench) -> None:
    put(bench, 1, "a=1")
    bench.clock.advance(5)
    put(bench, 2, "a=1")
    put(bench, 3, "b=2")
    bench.clock.advance(5)
    assert [(row["rules"], row["jobs"], row["oldest_wait_seconds"]) for row in waiting(bench)] == [
        ("queue=default,a=1", 2, 10.0),
        ("queue=default,b=2", 1, 5.0),
    ]


def test_read_the_reasons_of_the_documents_are_those_of_the_code() -> None:
    assert [row[0].strip("`") for row in table_after("why")] == list(scheduler.WaitReason)


TEXTS = st.text(alphabet=st.sampled_from(["a", "b", "=", ",", "\\", "*", "\n", "é", " "]), max_size=6)


@given(TEXTS.filter(bool), st.lists(TEXTS), st.booleans())
def test_read_the_text_of_a_rule_set_gives_the_rule_set(queue_key: str, rules: list[str], allowed: bool) -> None:
    rule_set = dataclasses.replace(RuleSet.of(queue_key, rules), allowed=allowed)
    assert RuleSet.read(str(rule_set)) == rule_set


# --- Workers ---


def test_stats_of_a_worker_tell_jobs_done_and_when_it_was_last_heard_of(bench: Bench) -> None:
    bench.make_ready()
    bench.make_ready(OTHER)
    bench.claim(W1)
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.learn(UUID, Finding.OVER, "finished")
    claim = bench.claim(W1)["claim"]
    bench.clock.advance(10)
    bench.call("POST", f"/jobs/{OTHER}/touch", {"claim": claim}, W1)
    bench.clock.advance(100)
    (worker,) = bench.call("GET", "/stats").json["workers"]
    assert worker == {
        "name": "w1",
        "state": "working",
        "tags": "",
        "queues": ["_default", "default"],
        "job": OTHER,
        "claims": 2,
        "jobs_done": 1,
        "last_seen_at": T10,
        "version": None,
        "agent": None,
        "agent_supported_until": None,
        "free_bytes": None,
        "strays": 0,
        "idle_seconds": 0.0,
    }


TOLD = {"version": "1.0.0", "agent": "3.137.0+1", "agent_supported_until": "2027-08-11"}


def agents(bench: Bench) -> list[dict[str, Any]]:
    """What `/stats` has of each worker's agent."""
    workers = bench.call("GET", "/stats").json["workers"]
    return [{name: worker[name] for name in TOLD} for worker in workers]


def test_introduce_worker_that_has_claimed_shows_its_agent_in_stats_until_it_tells_another(bench: Bench) -> None:
    assert bench.call("POST", "/workers/w1", TOLD, W1).refusal == (404, "unknown_worker")
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    assert bench.call("POST", "/workers/w1", TOLD, W1).json == {"name": "w1"}
    assert agents(bench) == [TOLD]
    later = {"version": "1.1.0", "agent": "5.0.0", "agent_supported_until": ""}
    assert bench.call("POST", "/workers/w1", later, W1).status == 200
    assert agents(bench) == [later | {"agent_supported_until": None}]


def test_introduce_worker_by_another_session_or_name_is_refused_and_changes_nothing(bench: Bench) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    bench.call("GET", "/jobs?query=queue=default", headers=W2)
    bench.call("POST", "/workers/w1", TOLD, W1)
    older = W1 | {"X-Worker-Session": "older"}
    lie = {"agent": "4.0.0"}
    assert bench.call("POST", "/workers/w1", lie, older).refusal == (409, "worker_name_taken")
    assert bench.call("POST", "/workers/w1", lie, W2).refusal == (400, "bad_header")
    assert bench.call("POST", "/workers/w1", lie, {}).refusal == (400, "bad_header")
    for wrong in ({"version": 1.0}, {"agent": 4}, {"agent": "4.0.0", "agent_supported_until": "soon"}):
        assert bench.call("POST", "/workers/w1", wrong, W1).refusal == (400, "bad_body")
    assert agents(bench) == [TOLD, dict.fromkeys(TOLD)]


def test_introduce_worker_and_restart_its_scheduler_still_knows_its_agent(
    open_store: Callable[..., Store], clock: Clock, settings: Callable[..., Settings]
) -> None:
    with Bench(open_store(), clock, settings()) as before:
        before.call("GET", "/jobs?query=queue=default", headers=W1)
        before.call("POST", "/workers/w1", TOLD, W1)
    with Bench(open_store(), clock, settings()) as after:
        assert agents(after) == [TOLD]


def test_stats_after_a_restart_still_know_what_a_busy_worker_offers(
    bench: Bench, clock: Clock, settings: Callable[..., Settings]
) -> None:
    bench.make_ready(rules=("os=mac",))
    bench.claim(W1, "query=os=mac,fast")
    bench.make_ready(OTHER, rules=("os=mac", "fast"))
    with Bench(bench.store, clock, settings()) as restarted:
        assert why(restarted) == ("workers_busy", "all matching workers are busy: 1")


# --- Totals ---


def end_one_of_each(bench: Bench) -> None:
    """One job that ran, one that was dropped, one that we finished."""
    for number in (1, 2, 3):
        bench.make_ready(uuid(number))
    bench.learn(uuid(1), Finding.ACQUIRED, "running")
    bench.learn(uuid(1), Finding.OVER, "finished")
    bench.learn(uuid(2), Finding.GONE, "limited")
    for number in range(5):
        worker = {"X-Worker-ID": f"f{number}", "X-Worker-Session": "s"}
        claim = bench.claim(worker)["claim"]
        bench.learn(uuid(9), Finding.GONE, "")
        now = bench.clock.now()
        bench.store.answered("default", now)
        bench.store.complete(scheduler.Holder(uuid(3), claim), scheduler.AgentEnd(1), now)
        bench.store.confirm([uuid(3)], bench.store.sequence(), now + 900, now)
    assert [job.uuid for job in bench.store.finish(uuid(3), bench.clock.now())] == [uuid(3)]


def test_stats_keep_totals_over_prune_and_restart(
    bench: Bench, open_store: Callable[..., Store], clock: Clock, settings: Callable[..., Settings]
) -> None:
    end_one_of_each(bench)
    once = {"ran": 1, "dropped": 1, "failed": 1, "stopped": 0, "refused": 0, "succeeded": 0}
    assert bench.call("GET", "/stats").json["totals"] == {"since_start": once, "all_time": once}
    clock.advance(100)
    bench.store.prune(clock.now())
    stats = bench.call("GET", "/stats").json
    assert (stats["states"]["done"], stats["totals"]["all_time"]) == (0, once)
    with Bench(open_store(), clock, settings()) as again:
        zero = dict.fromkeys(once, 0)
        assert again.call("GET", "/stats").json["totals"] == {"since_start": zero, "all_time": once}
        again.make_ready()
        again.learn(UUID, Finding.GONE, "limited")
        totals = again.call("GET", "/stats").json["totals"]
        assert totals == {"since_start": zero | {"dropped": 1}, "all_time": once | {"dropped": 2}}


# --- GET /jobs/{uuid} ---


def test_job_tells_its_whole_story_with_times_and_workers(bench: Bench) -> None:
    bench.make_ready()
    claim = bench.claim(W1)["claim"]
    bench.clock.advance(10)
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": claim, "reason": "no disk"}, W1)
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    bench.claim(W2)
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.clock.advance(10)
    bench.learn(UUID, Finding.OVER, "finished")
    job = bench.call("GET", f"/jobs/{UUID}").json
    assert job["story"] == [
        {"at": "2027-01-15T07:59:00.250Z", "what": "scheduled"},
        {"at": T0, "what": "put"},
        {"at": T0, "what": "reserved"},
        {"at": T0, "what": "claimed", "worker": "w1"},
        {"at": T10, "what": "released", "worker": "w1", "reason": "no disk"},
        {"at": T10, "what": "claimed", "worker": "w2"},
        {"at": T10, "what": "acquired", "worker": "w2"},
        {"at": "2027-01-15T08:00:20.000Z", "what": "ran", "worker": "w2", "reason": "finished"},
    ]
    assert not {"why", "why_text", "ahead"} & job.keys()


def test_job_that_waits_tells_why_and_how_many_are_ahead(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 5):
        bench.make_ready(uuid(number))
    bench.make_ready(uuid(5), priority=9)
    bench.make_ready(uuid(6), priority=9, rules=("os=mac",))
    job = bench.call("GET", f"/jobs/{uuid(4)}").json
    assert (job["why"], job["ahead"]) == ("no_worker", 4)
    assert bench.call("GET", f"/jobs/{uuid(5)}").json["ahead"] == 0
    monkeypatch.setattr(scheduler, "COUNTED_AHEAD", 3)
    assert bench.call("GET", f"/jobs/{uuid(4)}").json["ahead"] == 3


# --- GET /queue ---


def test_queue_lists_jobs_in_line_order_page_by_page(bench: Bench) -> None:
    for number, priority in [(1, 0), (2, 5), (3, 0), (4, -1), (5, 5)]:
        put(bench, number, priority=priority)
    seen, after = [], ""
    while True:
        page = bench.call("GET", f"/queue?state=reserving&limit=2{after}").json
        assert set(page) == {"state", "jobs", "next"}
        assert page["state"] == "reserving"
        seen += [job["uuid"] for job in page["jobs"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
        # What is put while somebody turns pages shifts nothing.
        put(bench, 10 + len(seen), priority=9)
    assert seen == [uuid(number) for number in (2, 5, 1, 3, 4)]


@pytest.mark.parametrize("state", ["reserving", "ready", "running"])
def test_queue_of_one_queue_lists_its_jobs_alone_page_by_page(bench: Bench, state: str) -> None:
    now = bench.clock.now()
    for number in range(1, 7):
        queue_key = "mac" if number % 2 else "default"
        job = Job.from_api(queue_key, {"id": uuid(number), "priority": -number, "agent_query_rules": []}, now)
        bench.store.put([job], bench.store.sequence(), now)
        if state != "reserving":
            bench.store.confirm([job.uuid], bench.store.sequence(), now + 900, now)
        if state == "running":
            bench.learn(job.uuid, Finding.ACQUIRED, "running")
    first = bench.call("GET", f"/queue?state={state}&queue=mac&limit=2").json
    assert [job["uuid"] for job in first["jobs"]] == [uuid(1), uuid(3)]
    rest = bench.call("GET", f"/queue?state={state}&queue=mac&limit=2&after={first['next']}").json
    assert [job["uuid"] for job in rest["jobs"]] == [uuid(5)]
    assert bench.call("GET", f"/queue?state={state}&queue=none").json["jobs"] == []
    assert len(bench.call("GET", f"/queue?state={state}").json["jobs"]) == 6


def test_queue_without_arguments_lists_what_is_ready_as_the_job_itself_tells(bench: Bench) -> None:
    bench.make_ready()
    put(bench, 2)
    page = bench.call("GET", "/queue").json
    job = bench.call("GET", f"/jobs/{UUID}").json
    of_one_alone = {"story", "why", "why_text", "by", "ahead"}
    assert page == {
        "state": "ready",
        "jobs": [{name: value for name, value in job.items() if name not in of_one_alone}],
        "next": None,
    }


@pytest.mark.parametrize("state", JobState)
def test_queue_of_any_state_lists_its_jobs_alone_and_no_secret(bench: Bench, state: JobState) -> None:
    bench.make_ready(uuid(1))
    bench.claim(W1)
    bench.make_ready(uuid(2))
    bench.learn(uuid(2), Finding.ACQUIRED, "running")
    bench.make_ready(uuid(3))
    put(bench, 4)
    put(bench, 5)
    bench.learn(uuid(5), Finding.GONE, "limited")
    numbers = {"leased": 1, "running": 2, "ready": 3, "reserving": 4, "done": 5}
    reply = bench.call("GET", f"/queue?state={state}&limit=1000")
    assert [job["uuid"] for job in reply.json["jobs"]] == [uuid(numbers[state])]
    assert b"secret-session" not in reply.text
    assert all("claim" not in job for job in reply.json["jobs"])


@sqlite_only
@pytest.mark.parametrize(
    "query",
    [
        "state=waiting",
        "state=",
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=ten",
        "limit=",
        "after=x",
        "after=1:2",
        f"after=1:nan:{UUID}",
        f"after=1:2:{UUID}x",
        f"after={'9' * 30}:2:{UUID}",
        "after=1:2:x' OR 1=1 --",
    ],
)
def test_queue_with_unusable_arguments_is_refused(bench: Bench, query: str) -> None:
    assert bench.call("GET", f"/queue?{query.replace(' ', '%20')}").refusal == (400, "bad_query")


# --- The store's own ---


def test_stats_and_pages_are_counted_by_index(tmp_path: Path, clock: Clock) -> None:
    made = make_settings(tmp_path)
    with closing(open_sqlite(made)) as store:
        statements: list[str] = []
        assert isinstance(store.rows, SqliteRows)
        reader = store.rows._reader
        reader.set_trace_callback(statements.append)
        store.stats()
        for state in JobState:
            store.page(state, None, 10)
        reader.set_trace_callback(None)
        for statement in statements:
            if statement.lstrip().startswith("SELECT") and "FROM jobs" in statement:
                plan = [row[3] for row in reader.execute(f"EXPLAIN QUERY PLAN {statement}")]
                scans = [each for each in plan if each.startswith("SCAN jobs") and "INDEX" not in each]
                # Done jobs are paged by a look at each.
                assert not scans, (statement, plan)


#: The first schema: what is below is all that a scheduler of that time left behind.
SCHEMA_1 = """
CREATE TABLE jobs (
    uuid TEXT PRIMARY KEY, queue_key TEXT NOT NULL, agent_query_rules TEXT NOT NULL, rule_set TEXT NOT NULL,
    priority INTEGER NOT NULL, scheduled_at REAL NOT NULL, about TEXT NOT NULL, put_at REAL NOT NULL,
    state TEXT NOT NULL, outcome TEXT, reason TEXT NOT NULL, reserved_at REAL, reservation_expires_at REAL NOT NULL,
    claim TEXT, worker TEXT, session TEXT, claimed_at REAL, touched_at REAL, lease_expires_at REAL, acquired_at REAL,
    completed_claim TEXT, exit_status INTEGER, claims INTEGER NOT NULL, attempts INTEGER NOT NULL,
    tries TEXT NOT NULL, finish_detail TEXT, done_at REAL, version INTEGER NOT NULL
);
CREATE INDEX jobs_ready ON jobs (rule_set, priority DESC, scheduled_at, uuid) WHERE state = 'ready';
CREATE INDEX jobs_reserving ON jobs (queue_key, priority DESC, scheduled_at, uuid) WHERE state = 'reserving';
CREATE INDEX jobs_due ON jobs (queue_key, reservation_expires_at) WHERE state IN ('ready', 'leased');
CREATE INDEX jobs_leased ON jobs (lease_expires_at) WHERE state = 'leased';
CREATE INDEX jobs_held ON jobs (worker) WHERE state = 'leased';
CREATE INDEX jobs_unfinished ON jobs (queue_key, uuid) WHERE done_at IS NULL;
CREATE INDEX jobs_done ON jobs (done_at) WHERE state = 'done';
CREATE INDEX jobs_intents ON jobs (queue_key) WHERE finish_detail IS NOT NULL AND state = 'reserving';
CREATE TABLE workers (
    name TEXT PRIMARY KEY, session TEXT NOT NULL, retired TEXT NOT NULL, tags TEXT NOT NULL,
    failures INTEGER NOT NULL, held_until REAL NOT NULL, claims INTEGER NOT NULL, last_claim_at REAL
);
CREATE TABLE paused_queues (queue_key TEXT PRIMARY KEY);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA user_version = 1;
"""


def schema_of(path: Path) -> set[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as db:
        names = db.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
        columns = db.execute("SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c")
        indexed = db.execute("SELECT m.name, c.name FROM sqlite_master m, pragma_index_info(m.name) c")
        return {*names, *columns, *indexed}


def test_open_a_store_of_the_first_schema_keeps_its_jobs_and_counts_those_done(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    with closing(sqlite3.connect(tmp_path / "old" / "jobs.sqlite3")) as db:
        db.executescript(SCHEMA_1)
        values = "'{}', 'default', '[]', 'queue=default', 0, 1, '{{}}', 1, '{}', {}, '', 1, 1"
        names = (
            "uuid, queue_key, agent_query_rules, rule_set, priority, scheduled_at, about, put_at, state, outcome, "
            "reason, reserved_at, reservation_expires_at, done_at, claims, attempts, tries, version"
        )
        for number, state, outcome, done_at in [(1, "ready", "NULL", "NULL"), (2, "done", "'ran'", 1)]:
            row = values.format(uuid(number), state, outcome)
            db.execute(f"INSERT INTO jobs ({names}) VALUES ({row}, {done_at}, 0, 0, '[]', {number})")
        db.execute("INSERT INTO workers VALUES ('w1', 's', '[]', '', 0, 0, 4, 1)")
        db.execute("INSERT INTO paused_queues VALUES ('linux')")
        db.commit()
    stores = {name: make_settings(tmp_path / name) for name in ("old", "new")}
    for _ in range(2):  # the second time there is nothing to do
        with closing(open_sqlite(stores["old"])) as store:
            stats = store.stats()
            assert (stats["states"]["ready"], stats["states"]["done"]) == (1, 1)
            assert stats["paused"] == ["linux"]
            assert stats["totals"] == {
                "default": {"ran": 1, "dropped": 0, "failed": 0, "stopped": 0, "refused": 0, "succeeded": 0}
            }
            assert [(row.claims, row.ran) for row in store.workers()] == [(4, 0)]
    open_sqlite(stores["new"]).close()
    old, new = (schema_of(tmp_path / name / "jobs.sqlite3") for name in ("old", "new"))
    assert old == new
