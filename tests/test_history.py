"""`GET /history`, on both stores: what ran, how much waited and ran, when people held what; and the page's headers."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import scheduler
from conftest import Clock, sqlite_only
from scheduler import (
    Answer,
    Finding,
    Fleet,
    Hold,
    Job,
    JobState,
    OperatorAct,
    Refusal,
    Request,
    Settings,
    Store,
    WebPage,
    Worker,
)
from test_api import ABOUT, OTHER, UUID, W1, W2, Bench

A = {"X-Worker-Host": "build-a", "X-Worker-Machine": "1a"}
#: RFC 3339 of the test clock's start, and of so many seconds later.
T0, T10, T40 = (f"2027-01-15T08:00:{seconds:02}.000Z" for seconds in (0, 10, 40))
HOUR = 3600.0


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        yield bench


@pytest.fixture
def page(bench: Bench) -> WebPage:
    clock, store = bench.clock, bench.store
    return WebPage(store, lambda: Fleet(store, bench.dispatcher, clock.now()), clock.now)


def ask(page: WebPage, **query: str) -> Any:
    answer = page.history(Request("", query, {}, Message(), lambda: False))
    assert answer.status == 200
    assert isinstance(answer.body, bytes)
    return json.loads(answer.body)


def run(bench: Bench, uuid: str, who: dict[str, str], seconds: float) -> None:
    """A job that waited 10 s, and then ran for so long."""
    bench.make_ready(uuid)
    bench.clock.advance(10)
    assert bench.claim(who)["uuid"] == uuid
    bench.learn(uuid, Finding.ACQUIRED, "running")
    bench.clock.advance(seconds)
    bench.learn(uuid, Finding.OVER, "finished")


def test_history_tells_each_run_with_its_worker_and_outcome_of_one_host_or_all(bench: Bench, page: WebPage) -> None:
    run(bench, UUID, W1 | A, 30)
    run(bench, OTHER, W2, 30)
    told = ask(page)
    assert {run["uuid"]: (run["worker"], run["host"], run["outcome"]) for run in told["runs"]} == {
        UUID: ("w1", "build-a", "ran"),
        OTHER: ("w2", None, "ran"),
    }
    (run_on_a,) = ask(page, host="build-a")["runs"]
    assert (run_on_a["claimed_at"], run_on_a["ended_at"], run_on_a["queue_key"]) == (T10, T40, "default")
    assert (run_on_a["pipeline"]["slug"], run_on_a["build"]["number"], run_on_a["step"]["key"]) == ("demo", 7, "unit")
    assert ask(page, host="build-b")["runs"] == []
    assert not told["truncated"]


def test_history_tells_claims_that_ended_without_an_agent_also_of_a_job_that_waits(bench: Bench, page: WebPage) -> None:
    bench.make_ready()
    claim = bench.claim(W1 | A)["claim"]
    bench.clock.advance(10)
    bench.call("POST", f"/jobs/{UUID}/complete", {"claim": claim, "exit_status": 1}, W1)
    (lost,) = ask(page)["runs"]
    assert (lost["worker"], lost["outcome"], lost["claimed_at"], lost["ended_at"]) == ("w1", "lost", T0, T10)
    assert lost["reason"] == "agent exited 1"


def test_history_leaves_out_what_ended_before_it_begins(bench: Bench, page: WebPage) -> None:
    run(bench, UUID, W1, 30)
    bench.clock.advance(HOUR + 1)
    assert ask(page, hours="1")["runs"] == []
    told = ask(page, hours="1.5")
    assert [run["uuid"] for run in told["runs"]] == [UUID]
    assert told["since"] == scheduler.rfc3339(bench.clock.now() - 1.5 * HOUR)


def test_history_of_more_jobs_than_it_tells_begins_later_and_says_so(
    bench: Bench, page: WebPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bench, UUID, W1, 30)
    run(bench, OTHER, W1, 30)
    monkeypatch.setattr(scheduler, "HISTORY_JOBS", 1)
    told = ask(page)
    assert ([run["uuid"] for run in told["runs"]], told["truncated"]) == ([OTHER], True)
    assert told["since"] == scheduler.rfc3339(bench.clock.now())
    assert told["curve"]["truncated"]


def test_history_counts_at_each_moment_what_waited_and_ran(bench: Bench, page: WebPage) -> None:
    run(bench, UUID, W1, HOUR)
    bench.make_ready(OTHER)
    bench.clock.advance(HOUR)
    curve = ask(page)["curve"]
    assert (len(curve["waiting"]), len(curve["running"]), curve["every_seconds"]) == (120, 120, 90.0)
    assert curve["truncated"] is False
    # An hour of nothing, an hour in which a job ran, and one in which another waited: 40 points each.
    assert [curve["running"][index] for index in (20, 60, 100)] == [0, 1, 0]
    assert [curve["waiting"][index] for index in (20, 60, 100)] == [0, 0, 1]


@pytest.mark.parametrize("hours", ["", "0", "-1", "25", "nan", "1e3", "3h", "0.0000001"])
@sqlite_only
def test_history_of_no_time_is_refused_with_what_may_be(bench: Bench, page: WebPage, hours: str) -> None:
    with pytest.raises(Refusal) as refused:
        ask(page, hours=hours)
    assert (refused.value.status, refused.value.code) == (400, "bad_query")
    assert str(refused.value) == f"hours is {hours!r}; it may be over 0 up to 24"


def test_history_is_made_once_for_all_who_ask_within_seconds(
    bench: Bench, page: WebPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def done_since(*asked: float) -> list[Job]:
        made.append(asked)
        return []

    monkeypatch.setattr(bench.store.rows, "done_since", done_since)
    for _ in range(3):
        ask(page)
    ask(page, hours="6")
    assert len(made) == 2
    bench.clock.advance(scheduler.HISTORY_SECONDS)
    ask(page)
    assert len(made) == 3


def test_read_of_jobs_that_are_done_since_a_time_gives_the_newest_first_up_to_a_limit(bench: Bench) -> None:
    at = bench.clock.now()
    run(bench, UUID, W1, 30)
    bench.make_ready(OTHER)
    bench.clock.advance(10)
    bench.learn(OTHER, Finding.OVER, "canceled")  # another outcome
    rows = bench.store.rows
    assert [(job.uuid, job.outcome) for job in rows.done_since(at, 10)] == [(OTHER, "dropped"), (UUID, "ran")]
    bench.clock.advance(10)
    late = "018f0000-0000-4000-8000-000000000003"
    run(bench, late, W1, 30)
    assert [job.uuid for job in rows.done_since(at, 1)] == [late]
    assert [job.uuid for job in rows.done_since(bench.clock.now(), 10)] == [late]
    assert rows.done_since(bench.clock.now() + 1, 10) == []


# --- The rules, without a store ---


def job_of(**fields: Any) -> Job:
    return dataclasses.replace(Job.from_api("default", {"id": UUID}, 1000.0), **fields)


def test_runs_of_a_job_are_its_lost_claims_and_the_last_one_that_was_not() -> None:
    lost = {"worker": "w1", "host": "a", "reason": "agent exited 1", "claimed_at": 1010.0, "ended_at": 1020.0}
    done = {"state": JobState.DONE, "outcome": "ran", "done_at": 1100.0, "worker": "w2", "host": "b"}
    runs = scheduler.runs_of(job_of(tries=(lost,), claimed_at=1030.0, **done))
    assert [(run["worker"], run["host"], run["outcome"]) for run in runs] == [("w1", "a", "lost"), ("w2", "b", "ran")]
    # The claim that was lost is the last one: the job was then stopped, or dropped.
    assert len(scheduler.runs_of(job_of(tries=(lost,), claimed_at=1010.0, **done))) == 1
    assert scheduler.runs_of(job_of()) == []
    assert scheduler.runs_of(job_of(**done)) == []


def test_curve_of_a_job_that_was_claimed_since_counts_it_with_the_last_point() -> None:
    runs = job_of(put_at=1010.0, claimed_at=1120.5, state=JobState.RUNNING)
    curve = scheduler.curve_of([runs], 1000.0, 1120.0)
    assert (sum(curve["waiting"]), sum(curve["running"])) == (110, 0)


def test_curve_of_jobs_counts_none_outside_its_time() -> None:
    over = job_of(put_at=100.0, claimed_at=200.0, state=JobState.DONE, done_at=300.0)
    curve = scheduler.curve_of([over], 1000.0, 1120.0)
    assert (curve["every_seconds"], sum(curve["waiting"]), sum(curve["running"])) == (1.0, 0, 0)
    runs = job_of(put_at=900.0, claimed_at=1060.0, state=JobState.RUNNING)
    curve = scheduler.curve_of([runs], 1000.0, 1120.0)
    assert (curve["waiting"][:60], curve["waiting"][60:]) == ([1] * 60, [0] * 60)
    assert (curve["running"][:60], curve["running"][60:]) == ([0] * 60, [1] * 60)


def test_holds_of_the_past_are_those_that_were_lifted_with_the_workers_they_bound() -> None:
    a, b = (Worker(name, "", scheduler.NO_PROFILE, host=name) for name in "ab")

    def act(at: float, what: str, target: str) -> OperatorAct:
        return OperatorAct(at, "ann", what, target, "")

    acts = [
        act(10, "pause", "host:a"),
        act(20, "pause", "host:a"),  # again: it is held since the first
        act(30, "resume", "host:a"),
        act(40, "drain", "host:b"),  # it still is
        act(50, "resume", "worker:x"),  # of which no beginning is known
        act(60, "stop", "job:x"),
    ]
    (held,) = scheduler.past_holds(reversed(acts), [a, b], 0.0)
    assert held == {
        "target": "host:a",
        "since": scheduler.rfc3339(10),
        "until": scheduler.rfc3339(30),
        "workers": ["a"],
    }
    assert scheduler.past_holds(acts, [a, b], 31.0) == []


def test_hold_whose_time_is_over_is_a_hold_of_the_past_and_lifted_once(store: Store, clock: Clock) -> None:
    now = clock.now()
    paused = Hold("host:a", scheduler.OPERATOR, scheduler.PAUSED, now, now + 60, "ann", "disk")
    store.hold(paused, OperatorAct(now, "ann", "pause", "host:a", "disk"), replace=False, now=now)
    for wait in (59, 2, 60):
        clock.advance(wait)
        store.end_holds(clock.now())
    a = Worker("a", "", scheduler.NO_PROFILE, host="a")
    (held,) = scheduler.past_holds(store.acts(9), [a], 0.0)
    assert (held["until"], held["workers"]) == (scheduler.rfc3339(now + 60), ["a"])
    assert [each.act for each in store.acts(9)] == ["expired", "pause"]


@pytest.mark.parametrize(
    ("organization", "about", "url"),
    [
        ("acme", ABOUT, f"https://buildkite.com/acme/demo/builds/7#{UUID}"),
        ("", ABOUT, None),
        ("acme", {**ABOUT, "pipeline": {"slug": None}}, None),
        ("acme", {"pipeline": {"slug": "demo"}}, None),
        (
            "a b",
            {"pipeline": {"slug": "<img>/.."}, "build": {"number": 1}},
            f"https://buildkite.com/a%20b/%3Cimg%3E%2F../builds/1#{UUID}",
        ),
    ],
)
def test_address_of_a_job_is_told_where_all_of_it_is_known(
    organization: str, about: dict[str, Any], url: str | None
) -> None:
    assert scheduler.job_url(job_of(about=about), organization) == url


# --- What a browser is told ---


def directives(answer: Answer) -> dict[str, list[str]]:
    words = (part.split() for part in answer.headers["Content-Security-Policy"].split(";"))
    return {name: values for name, *values in words}


@sqlite_only
def test_page_comes_with_a_policy_that_allows_its_own_script_and_style_by_their_hashes(page: WebPage) -> None:
    answer = page.page(Request("", {}, {}, Message(), lambda: False))
    assert answer.status == 200 and isinstance(answer.body, bytes)
    policy = directives(answer)
    assert (policy["default-src"], policy["connect-src"]) == (["'none'"], ["'self'"])
    assert (policy["frame-ancestors"], policy["base-uri"], policy["form-action"]) == (["'none'"],) * 3
    for kind in ("script", "style"):
        (part,) = re.findall(f"<{kind}>(.*?)</{kind}>".encode(), answer.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part).digest()).decode()
        assert policy[f"{kind}-src"] == [f"'sha256-{digest}'"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"


@sqlite_only
def test_page_whose_file_is_missing_is_refused_with_what_to_do(bench: Bench, tmp_path: Path) -> None:
    nothing = WebPage(bench.store, pytest.fail, bench.clock.now, str(tmp_path / "page.html"))
    with pytest.raises(Refusal) as refused:
        nothing.page(Request("", {}, {}, Message(), lambda: False))
    assert (refused.value.status, refused.value.code) == (404, "no_page")
    assert str(refused.value) == (
        f"there is no page: {tmp_path / 'page.html'}: No such file or directory; copy page.html beside scheduler.py "
        "and restart it"
    )


@sqlite_only
def test_fleet_is_compressed_for_those_who_take_it_and_the_same(bench: Bench) -> None:
    bench.make_ready()
    plain = bench.call("GET", "/fleet")
    assert "Content-Encoding" not in plain.headers
    packed = bench.call("GET", "/fleet", headers={"Accept-Encoding": "br, gzip"})
    assert (packed.headers["Content-Encoding"], packed.headers["Vary"]) == ("gzip", "Accept-Encoding")
    assert gzip.decompress(packed.text) == plain.text
    assert packed.headers["ETag"] == plain.headers["ETag"]
    same = {"Accept-Encoding": "gzip", "If-None-Match": packed.headers["ETag"]}
    again = bench.call("GET", "/fleet", headers=same)
    assert (again.status, again.text) == (304, b"")


@sqlite_only
@pytest.mark.parametrize(("token", "role"), [("operator", "operator"), ("viewer", "viewer"), ("worker", "viewer")])
def test_fleet_says_what_the_token_may_do(bench: Bench, token: str, role: str) -> None:
    server = bench.server
    server.operator_tokens, server.viewer_tokens, server.api_tokens = ["operator"], ["viewer"], ["worker"]
    key = {"Authorization": f"Bearer {token}"}
    reply = bench.call("GET", "/fleet", headers=key)
    assert (reply.status, reply.headers["X-Stack-Role"]) == (200, role)
    again = bench.call("GET", "/fleet", headers=key | {"If-None-Match": reply.headers["ETag"]})
    assert (again.status, again.headers["X-Stack-Role"]) == (304, role)


@sqlite_only
def test_fleet_without_tokens_says_that_everybody_on_the_machine_may_act(bench: Bench) -> None:
    assert bench.call("GET", "/fleet").headers["X-Stack-Role"] == "operator"


@sqlite_only
def test_fleet_tells_of_a_worker_that_is_offline_what_to_do(bench: Bench) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    bench.clock.advance(scheduler.OFFLINE_SECONDS + 1)
    (wrong,) = bench.call("GET", "/fleet").json["wrong"]
    assert re.fullmatch("see `why w1`: 1 worker is offline since 2027-01-1[456] [0-9]{2}:[0-9]{2}", wrong), wrong


@sqlite_only
def test_fleet_tells_what_is_wrong_in_the_words_of_status(bench: Bench) -> None:
    bench.make_ready()
    bench.clock.advance(scheduler.WRONG_SECONDS)
    assert bench.call("GET", "/fleet").json["wrong"] == [
        f"see `why {UUID}`: 1 job cannot run: no_worker: no live worker serves queue default"
    ]
