"""Periodic builds: when they are due, what Buildkite is asked for, and that each due time is done once."""

from __future__ import annotations

import collections
import datetime
import itertools
import math
import re
import signal
import subprocess
import sys
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import graphql
import pytest
import requests

import scheduler
from conftest import LONG_RUN, REDIS, STORES, Clock
from fake_buildkite import FakeBuild, FakeBuildkite
from processes import TESTS, Process, RedisServer, StackProcesses, agent_path, compiled, wait_until
from scheduler import (
    OPERATOR,
    Fenced,
    GraphApi,
    Leadership,
    OperatorAct,
    Periodic,
    PeriodicBuilds,
    PeriodicRow,
    RedisRows,
    RestApi,
    SettingsError,
    StackFile,
    Store,
    due_times,
    spread,
)

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def at(text: str) -> float:
    """Unix seconds of a time with its offset, as "2026-03-29T03:00+02:00"; without one it is UTC."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def shown(seconds: float) -> str:
    """As the clock of Berlin shows it."""
    return datetime.datetime.fromtimestamp(seconds, BERLIN).isoformat(timespec="minutes")


def first_due(line: str, after: str, count: int) -> list[str]:
    return [shown(due) for due in itertools.islice(due_times(line, BERLIN, at(after)), count)]


# --- Due times ---


def test_due_in_the_hour_that_the_clock_leaves_out_is_when_it_is_set_forward() -> None:
    assert first_due("30 2 * * *", "2026-03-28T12:00+01:00", 2) == ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]
    # Also where several times are left out.
    assert first_due("0,30 2 * * *", "2026-03-29T01:00+01:00", 2) == [
        "2026-03-29T03:00+02:00",
        "2026-03-30T02:00+02:00",
    ]
    assert first_due("0 2,3 * * *", "2026-03-29T01:00+01:00", 2) == ["2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"]


def test_due_in_the_hour_that_the_clock_shows_twice_is_once_a_day_and_twice_each_hour() -> None:
    assert first_due("30 2 * * *", "2026-10-24T12:00+02:00", 2) == ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]
    assert first_due("30 * * * *", "2026-10-25T01:00+02:00", 4) == [
        "2026-10-25T01:30+02:00",
        "2026-10-25T02:30+02:00",
        "2026-10-25T02:30+01:00",
        "2026-10-25T03:30+01:00",
    ]


@pytest.mark.parametrize("since", ["2026-10-25T02:30+02:00", "2026-10-25T02:10+01:00", "2026-10-25T02:30+01:00"])
def test_due_after_a_moment_within_the_hour_that_is_shown_twice_is_never_before_it(since: str) -> None:
    assert first_due("30 2 * * *", since, 1) == ["2026-10-26T02:30+01:00"]


@pytest.mark.parametrize("line", ["30 2 * * *", "*/20 * * * *", "0,30 1-3 * * *", "15 */2 * * 0"])
@pytest.mark.parametrize("day", ["2026-03-28T00:00", "2026-10-24T00:00"])
def test_due_times_are_the_same_from_wherever_one_begins_to_count(line: str, day: str) -> None:
    """A scheduler begins at any moment: what it finds next must not depend on when it was started."""
    begin = at(day)
    every = list(itertools.takewhile(lambda due: due <= begin + 3 * 86400, due_times(line, BERLIN, begin)))
    assert every == sorted(set(every))
    for minutes in range(0, 3 * 24 * 60, 10):
        since = begin + minutes * 60
        following = next((due for due in every if due > since), None)
        if following:
            assert next(due_times(line, BERLIN, since)) == following, shown(since)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ],
)
def test_spread_of_a_word_is_its_line(word: str, line: str) -> None:
    assert spread(word, "nightly") == line


def test_spread_of_h_depends_on_the_name_and_each_field_has_its_own() -> None:
    assert spread("H 2 * * *", "nightly") == spread("H 2 * * *", "nightly")
    lines = [spread("H H H H H", f"job {number}").split() for number in range(2000)]
    for column, (low, high) in zip(zip(*lines, strict=True), scheduler.CRON_FIELDS.values(), strict=True):
        assert {int(text) for text in column} == {*range(low, high + 1)}
    # The same name does not put the same number into all fields.
    assert sum(minute == hour for minute, hour, *_ in lines) < 200


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("H(10-12)", {"10", "11", "12"}),
        ("H/15", {f"{first}-59/15" for first in range(15)}),
        ("H(0-29)/10", {f"{first}-29/10" for first in range(10)}),
        ("30,h(40-41)", {"30,40", "30,41"}),
    ],
)
def test_spread_of_h_with_a_range_or_a_step_stays_within_it(field: str, allowed: set[str]) -> None:
    assert {spread(f"{field} * * * *", f"job {number}").split()[0] for number in range(500)} == allowed


@pytest.mark.parametrize("field", ["HH", "H(5)", "H(9-5)", "H(0-60)", "H/0", "H/61", "H(0-4)/6", "H-5", "H(1-2", "H5"])
def test_spread_of_what_is_no_h_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"write it like H, H\(0-59\) or H/2"):
        spread(f"{field} * * * *", "nightly")


def periodic(cron: str = "H 2 * * *", **more: object) -> Periodic:
    return Periodic("nightly", "app", cron, BERLIN, **more)  # type: ignore[arg-type]


def test_last_due_of_a_year_without_a_scheduler_is_found_at_once() -> None:
    began = at("2025-11-29T12:00:30")
    assert periodic("* * * * *").last_due(began, began + 366 * 86400) == began + 366 * 86400 - 30
    assert shown(periodic("0 4 1 1 *").last_due(began, began + 366 * 86400) or 0) == "2026-01-01T04:00+01:00"
    assert periodic("0 4 29 2 *").last_due(began, began + 366 * 86400) is None
    assert shown(periodic("0 4 29 2 *").last_due(0.0, began) or 0) == "2024-02-29T04:00+01:00"


def test_last_due_does_not_count_the_moment_that_it_begins_after() -> None:
    due = at("2026-11-29T12:00")
    each_minute = periodic("* * * * *")
    assert each_minute.last_due(due, due + 59) is None
    assert each_minute.last_due(due, due + 60) == due + 60


# --- The file ---

NIGHTLY = """\
organization = "acme"

[[periodic]]
name = "nightly"
pipeline = "app"
cron = "H 2 * * *"
zone = "Europe/Berlin"
"""


@pytest.fixture
def stack_file(tmp_path: Path) -> Callable[[str], scheduler.StackFile]:
    """Reads a file; a SettingsError has all that is wrong with it."""

    def read(text: str) -> scheduler.StackFile:
        path = tmp_path / "stack.toml"
        path.write_text(text)
        tables: scheduler.StackFile = scheduler.read_stack_file(str(path), at("2026-11-29T12:00")).tables
        return tables

    return read


def problems_of(read: Callable[[str], object], text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(text)
    return [line.partition(", ")[2] for line in str(caught.value).splitlines()]


def test_read_schedule_takes_what_is_not_named_as_its_default(
    stack_file: Callable[[str], scheduler.StackFile],
) -> None:
    (nightly,) = stack_file(NIGHTLY).periodic
    assert nightly == Periodic("nightly", "app", "H 2 * * *", BERLIN)
    assert (nightly.branch, nightly.commit, nightly.message, nightly.env, nightly.meta_data) == (
        "main",
        "HEAD",
        "",
        None,
        None,
    )
    assert (nightly.if_running, nightly.missed) == ("skip", "once")
    more = 'branch = "dev"\ncommit = "abc"\nmessage = "m"\nif_running = "start"\nmissed = "none"\nenv = { A = "1" }\n'
    (nightly,) = stack_file(NIGHTLY + more + '[periodic.meta_data]\nb = "2"\n').periodic
    assert (nightly.branch, nightly.commit, nightly.message, nightly.env, nightly.meta_data) == (
        "dev",
        "abc",
        "m",
        {"A": "1"},
        {"b": "2"},
    )
    assert (nightly.if_running, nightly.missed) == ("start", "none")


def test_read_schedules_with_many_faults_tells_each_with_its_line(
    stack_file: Callable[[str], scheduler.StackFile],
) -> None:
    text = """\
[[periodic]]
name = "one"
pipeline = "acme/app"
cron = "H 2 * *"
zone = "Europe/Berln"
if_runing = "skip"

[[periodic]]
name = "two"
cron = "61 2 * * *"
zone = "UTC"
if_running = "wait"
missed = "all"
env = { A = 1 }
meta_data = { stack-start = "mine" }

[[periodic]]
name = "two"
pipeline = "app"
cron = "0 0 31 2 *"
zone = "UTC"
"""
    assert problems_of(stack_file, text) == [
        'line 1: [[periodic]] needs the organization\'s slug at the top: organization = "acme"',
        "line 3: pipeline is 'acme/app'; write its slug alone, like \"app\": the last part of its address",
        "line 4: cron is 'H 2 * *'; it must have five fields, or be one of @yearly, @annually, @monthly, @weekly, "
        "@daily, @midnight, @hourly",
        "line 5: zone is 'Europe/Berln', which is not a time zone; the nearest is 'Europe/Berlin'",
        "line 6: if_runing is not a key of [periodic]; the nearest is if_running",
        "line 8: [periodic] has no pipeline",
        "line 10: cron is '61 2 * * *', which cannot be read: Bad minute",
        "line 12: if_running is 'wait'; it must be skip or start",
        "line 13: missed is 'all'; it must be once or none",
        "line 14: env is {'A': 1}; it is a table of texts like { NAME = \"value\" }",
        "line 15: meta_data has stack-start, which the scheduler sets itself",
        "line 20: cron is '0 0 31 2 *', which cannot be read: Bad day-of-month",
    ]
    twice = NIGHTLY + NIGHTLY.partition("\n")[2]
    assert problems_of(stack_file, twice) == ["line 10: name is 'nightly', like another schedule: give each its own"]


def test_read_line_that_is_never_due_is_refused(stack_file: Callable[[str], scheduler.StackFile]) -> None:
    text = NIGHTLY.replace("H 2 * * *", "0 0 * 2 mon#5")
    (due,) = stack_file(text).periodic
    assert due.due_after(at("2026-11-29T12:00")) > at("2027-02-01T00:00")
    never = NIGHTLY.replace("H 2 * * *", "0 0 */28 2 mon#2")
    assert problems_of(stack_file, never) == ["line 6: cron is '0 0 */28 2 mon#2', which is never due"]


def test_read_schedule_without_cronsim_says_what_to_install(
    stack_file: Callable[[str], scheduler.StackFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    assert problems_of(stack_file, NIGHTLY) == [
        "line 6: cron needs cronsim: pip install cronsim, or Debian 13's python3-cronsim"
    ]
    assert stack_file('organization = "acme"\n').periodic == ()


def test_read_schedule_without_an_api_token_is_refused(
    settings: Callable[..., scheduler.Settings], tmp_path: Path
) -> None:
    (tmp_path / "stack.toml").write_text(NIGHTLY)
    (problem,) = settings(STACK_FILE=tmp_path / "stack.toml").problems()
    assert problem == "BUILDKITE_API_TOKEN: is required for [[periodic]] in STACK_FILE"
    assert settings(STACK_FILE=tmp_path / "stack.toml", BUILDKITE_API_TOKEN="bkua_x").problems() == []


# --- The table in the store ---


def row_of(store: Store, name: str = "nightly") -> PeriodicRow:
    row = store.timetable().of(name)
    assert row
    return row


def test_change_row_is_there_when_the_store_is_opened_again(open_store: Callable[..., Store]) -> None:
    store = open_store()
    assert store.timetable().rows == ()
    row = PeriodicRow("nightly", "17 2 * * *, Europe/Berlin", 12.5, {"mark": "m", "asked_at": None}, failures=3)
    assert store.change_periodic("nightly", lambda before: row if before is None else None) == row
    other = PeriodicRow("a daily", build={"number": 7})
    assert store.change_periodic("a daily", lambda _: other) == other
    store = open_store()
    assert store.timetable().rows == (other, row)
    assert store.change_periodic("nightly", lambda before: None) is None
    store.forget_periodic("a daily")
    store.forget_periodic("a daily")
    assert open_store().timetable().rows == (row,)


def test_change_row_that_another_has_changed_meanwhile_is_decided_again(store: Store) -> None:
    seen = []

    def step(row: PeriodicRow | None) -> PeriodicRow:
        seen.append(row.failures if row else 0)
        if len(seen) == 1:  # another scheduler is quicker
            store.rows.write_periodic(
                store.timetable().version, "nightly", PeriodicRow("nightly", failures=5), None, OPERATOR
            )
        return PeriodicRow("nightly", failures=seen[-1] + 1)

    store.change_periodic("nightly", step)
    assert (seen, row_of(store).failures) == ([0, 5], 6)


def test_change_row_keeps_the_act_that_was_its_cause(store: Store) -> None:
    act = OperatorAct(1.0, "ann@build1", "run", "periodic:nightly", "try it")
    store.change_periodic("nightly", lambda _: PeriodicRow("nightly"), act, OPERATOR)
    assert store.acts(5) == [act]
    store.change_periodic("nightly", lambda _: None, act, OPERATOR)
    assert store.acts(5) == [act]


# --- What Buildkite is asked ---


@pytest.mark.parametrize("query", [scheduler.BUILD_QUERY, scheduler.BUILDS_QUERY, scheduler.PIPELINE_QUERY])
def test_read_what_graphql_is_asked_about_builds_is_valid_in_buildkites_schema(query: str) -> None:
    schema = graphql.build_schema((Path(__file__).parent / "buildkite.graphql").read_text())
    assert graphql.validate(schema, graphql.parse(query)) == []
    assert graphql.validate(schema, graphql.parse(re.sub(r"\b(state|slug) (?=[m}])", "status ", query)))


class Times:
    """The periodic builds of one scheduler, against the fake."""

    def __init__(self, store: Store, clock: Clock, fake: FakeBuildkite):
        self.store, self.clock, self.fake = store, clock, fake
        self.file = StackFile()
        fake.add_pipeline("app")
        self.begin()

    def begin(self) -> None:
        """A scheduler that has just been started: it remembers nothing."""
        token, lead = lambda: self.fake.api_token, Leadership(self.store)
        rest, graph = RestApi(self.fake.rest_url, token), GraphApi(self.fake.graphql_url, token)
        self.part = PeriodicBuilds(lambda: self.file, lead, rest, graph, self.clock.now)

    def use(self, *periodics: Periodic) -> None:
        self.file = StackFile("acme", (), periodics)
        self.part.tick(self.clock.now())

    def tick(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.part.tick(self.clock.now())

    @property
    def builds(self) -> list[FakeBuild]:
        return [*self.fake.all_builds.values()]

    @property
    def row(self) -> PeriodicRow:
        return row_of(self.store)

    @property
    def told(self) -> list[dict[str, Any]]:
        """What GET /periodic answers."""
        request: Any = None
        body: Any = self.part.get_builds(request).body
        return list(body["periodic"])


@pytest.fixture
def times(store: Store, clock: Clock) -> Iterator[Times]:
    with FakeBuildkite(clock=clock.now) as fake:
        yield Times(store, clock, fake)


HOUR = 3600.0


def hourly(**more: object) -> Periodic:
    return Periodic("nightly", "app", "0 * * * *", zoneinfo.ZoneInfo("UTC"), **more)  # type: ignore[arg-type]


def test_start_when_due_asks_for_a_build_with_all_that_is_set(times: Times) -> None:
    """The clock of the tests begins at a full hour: a new schedule is not due at that moment."""
    more = {"branch": "dev", "commit": "abc", "env": {"A": "1"}, "meta_data": {"b": "2"}, "message": "Nightly"}
    times.use(hourly(**more))
    times.tick(HOUR - 1)
    assert times.builds == []
    times.tick(3)
    (build,) = times.builds
    assert (build.pipeline, build.branch, build.commit, build.message) == ("app", "dev", "abc", "Nightly")
    assert (build.env, build.source) == ({"A": "1"}, "api")
    assert times.row.build
    mark = times.row.build["mark"]
    assert build.meta_data == {"b": "2", "stack-start": mark, "stack-periodic": "nightly"}
    times.tick(1)
    assert len(times.builds) == 1
    (told,) = times.told
    assert told["build"] == {
        "mark": mark,
        "due_at": scheduler.rfc3339(times.clock.now() - 3),
        "by": "",
        "uuid": build.uuid,
        "number": 1,
        "url": "https://buildkite.com/acme/app/builds/1",
        "state": "scheduled",
        "started_at": scheduler.rfc3339(times.clock.now() - 1),
    }
    assert told["next_at"] == scheduler.rfc3339(times.clock.now() - 3 + HOUR)
    assert (told["start"], told["unstarted"], told["problem"]) == (None, None, None)


def test_start_without_a_message_says_why_there_is_a_build(times: Times) -> None:
    times.use(hourly())
    times.tick(HOUR)
    assert times.builds[0].message == "nightly, due at 2027-01-15T09:00:00Z"


def test_start_is_written_down_before_buildkite_is_asked(times: Times) -> None:
    times.use(hourly())
    seen: list[Any] = []
    times.fake.set_fault("create-build", body=lambda _: seen.append(times.row.start), status=503, times=1)
    times.tick(HOUR)
    assert seen[0]["asked_at"] == times.clock.now()


@pytest.mark.parametrize("missed", ["once", "none"])
def test_start_after_an_outage_makes_one_build_or_none(times: Times, missed: str) -> None:
    times.use(hourly(missed=missed))
    times.clock.advance(5 * HOUR + 61)
    times.begin()
    times.tick()
    assert len(times.builds) == (missed == "once")
    assert times.row.looked_at == times.clock.now() - 61
    if missed == "none":
        assert times.row.unstarted
        assert times.row.unstarted["what"] == "missed"
        times.tick(HOUR - 61)
        assert len(times.builds) == 1
    else:
        assert times.row.build
        assert times.row.build["due_at"] == times.row.looked_at


def test_start_just_after_it_was_due_is_not_missed(times: Times) -> None:
    times.use(hourly(missed="none"))
    times.clock.advance(HOUR + 59)
    times.begin()
    times.tick()
    assert len(times.builds) == 1


@pytest.mark.parametrize(("step", "builds"), [(-HOUR, 1), (-23 * HOUR, 1), (HOUR / 2, 1), (HOUR, 2), (3 * HOUR, 2)])
def test_start_over_a_step_of_the_clock_does_each_due_time_once(times: Times, step: float, builds: int) -> None:
    times.use(hourly(if_running="start"))
    times.tick(HOUR + 2)
    due = times.row.looked_at
    times.tick(step)
    assert (len(times.builds), times.row.looked_at >= due) == (builds, True)
    while times.clock.now() < due + 2:  # its time comes again
        times.tick(600)
    assert len(times.builds) == builds


def test_start_by_a_clock_that_was_wrong_by_days_begins_anew(times: Times) -> None:
    times.use(hourly(if_running="start"))
    times.tick(48 * HOUR)
    assert len(times.builds) == 1
    times.tick(-47.5 * HOUR)
    assert (len(times.builds), times.row.looked_at) == (1, times.clock.now())
    times.tick(HOUR / 2)
    assert len(times.builds) == 2


def test_change_of_a_schedule_makes_nothing_due_that_is_past(times: Times) -> None:
    times.use(hourly())
    times.tick(HOUR / 2)
    times.use(Periodic("nightly", "app", "*/20 * * * *", zoneinfo.ZoneInfo("UTC")))
    times.tick(60)
    assert times.builds == []
    times.tick(HOUR / 6)
    assert len(times.builds) == 1


def test_remove_schedule_and_set_it_again_makes_nothing_due_that_is_past(times: Times) -> None:
    times.use(hourly())
    times.use()
    assert times.store.timetable().rows == ()
    times.tick(3.5 * HOUR)
    times.use(hourly())
    times.tick(60)
    assert times.builds == []


# -- the last build


@pytest.mark.parametrize(
    ("state", "is_skipped"),
    [("running", True), ("failing", True), ("scheduled", True), ("canceling", True), ("creating", True)]
    + [(state, False) for state in ("passed", "failed", "canceled", "skipped", "not_run", "blocked")],
)
def test_start_while_the_last_build_is_not_over_is_skipped(times: Times, state: str, is_skipped: bool) -> None:
    times.use(hourly())
    times.tick(HOUR)
    times.builds[0].forced_state = state
    times.tick(HOUR)
    assert len(times.builds) == (1 if is_skipped else 2)
    if is_skipped:
        assert times.row.start is None
        assert times.row.unstarted
        assert (times.row.unstarted["what"], times.row.unstarted["reason"]) == (
            "skipped",
            "build 1 of this schedule is not over",
        )
        assert times.part.problems == []
        times.builds[0].forced_state = "passed"
        times.tick(HOUR)
        assert len(times.builds) == 2
        assert times.told[0]["unstarted"] is None


@pytest.mark.usefixtures("hasty")
def test_start_while_nobody_knows_if_the_last_build_is_over_waits_for_that(times: Times) -> None:
    times.use(hourly())
    times.tick(HOUR)
    times.builds[0].forced_state = "passed"
    times.fake.set_fault("graphql", status=401)
    times.tick(HOUR)
    times.tick(1)
    assert len(times.builds) == 1
    (problem,) = times.part.problems
    assert "it refuses BUILDKITE_API_TOKEN" in problem
    assert "there may be a build" not in problem
    times.fake.clear_faults()
    times.tick(1)
    assert (len(times.builds), times.part.problems) == (2, [])


def test_start_beside_the_last_build_where_the_file_says_so(times: Times) -> None:
    times.use(hourly(if_running="start"))
    for _ in range(3):
        times.tick(HOUR)
    assert len(times.builds) == 3


def test_start_whose_last_build_buildkite_does_not_show_any_more_is_not_skipped(times: Times) -> None:
    times.use(hourly())
    times.tick(HOUR)
    times.fake.all_builds.clear()
    times.tick(HOUR)
    assert len(times.builds) == 1


def test_follow_of_the_last_build_is_told_with_its_state(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "FOLLOW_SECONDS", 0.0)
    times.use(hourly())
    times.tick(HOUR)
    for state in ("running", "blocked", "passed"):
        times.builds[0].forced_state = state
        times.tick(1)
        assert times.row.build
        assert times.row.build["state"] == state
    asked = len(times.fake.calls_to("graphql"))
    times.tick(1)
    assert len(times.fake.calls_to("graphql")) == asked  # it is over


def test_follow_of_many_builds_asks_about_one_at_a_tick_in_turn(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    utc = zoneinfo.ZoneInfo("UTC")
    times.use(*(Periodic(f"{number}", "app", "0 * * * *", utc) for number in range(3)))
    times.tick(HOUR)
    assert len(times.builds) == 3
    for build in times.builds:
        build.forced_state = "running"
    asked = []
    for _ in range(4):
        times.tick(1)
        asked.append(len(times.fake.calls_to("graphql")))
        times.fake.calls.clear()
    # The tick that started them has asked about the first.
    assert asked in ([1, 1, 1, 0], [1, 1, 0, 0])
    assert {row.build["state"] for row in times.store.timetable().rows if row.build} == {"running"}


def test_tick_says_when_the_next_is_due_and_at_least_once_a_second(times: Times) -> None:
    assert times.part.tick(times.clock.now()) == 1
    times.use(hourly())
    assert times.part.tick(times.clock.now()) == 1
    times.clock.advance(HOUR - 0.25)
    assert times.part.tick(times.clock.now()) == 0.25


# -- unclear answers


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look for the build follows at once."""
    monkeypatch.setattr(scheduler, "UNCLEAR_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "backoff_seconds", lambda *_: 0.0)


UNCLEAR: list[dict[str, Any]] = [
    {"drop_after": True},
    {"reset": True},
    {"status": 500},
    {"status": 408},
    {"garbage": True},
]


@pytest.mark.parametrize("fault", UNCLEAR, ids=str)
def test_start_with_an_unclear_answer_asks_for_no_second_build_before_the_first_would_be_shown(
    times: Times, fault: dict[str, Any]
) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", **fault, times=1)
    times.tick(HOUR)
    assert times.row.start
    assert times.row.start["problem"].endswith(
        "the build may exist: the scheduler searches for it before it asks again"
    )
    for _ in range(3):
        times.tick(1)
        times.begin()  # a restart does not cut the wait short
        times.tick(3 * HOUR)  # nor does a step of the clock
    assert len(times.fake.calls_to("create-build")) == 1
    assert times.fake.calls_to("graphql") == []


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", UNCLEAR, ids=str)
def test_start_with_an_unclear_answer_finds_its_build_by_its_mark_or_asks_again(
    times: Times, fault: dict[str, Any]
) -> None:
    times.use(hourly())
    for number in range(3):  # others of the same schedule and pipeline, by which it is not deceived
        times.fake.add_build("app", meta_data={"stack-start": str(number), "stack-periodic": "nightly"})
    times.fake.set_fault("create-build", **fault, times=1)
    times.tick(HOUR)
    times.tick(1)
    made = [build for build in times.builds if build.source == "api"]
    assert len(made) == 1
    assert times.row.build
    assert (times.row.build["uuid"], times.row.start) == (made[0].uuid, None)
    assert made[0].meta_data["stack-start"] == times.row.build["mark"]
    assert len(times.fake.calls_to("create-build")) == (1 if "drop_after" in fault else 2)
    assert times.row.failures == 1


@pytest.mark.usefixtures("hasty")
def test_look_for_a_build_reads_all_pages(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.tick(HOUR)
    for _ in range(2 * scheduler.BUILDS_A_PAGE):
        times.fake.add_build("app", meta_data={"stack-periodic": "nightly"})
    times.fake.add_build("app", branch="other")
    times.tick(1)
    assert len(times.fake.calls_to("graphql")) == 3
    assert times.row.build
    assert times.row.build["number"] == 1
    assert len(times.fake.calls_to("create-build")) == 1


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("step", [-HOUR, 0, HOUR])
def test_look_for_a_build_finds_it_where_the_clock_was_wrong_when_it_was_asked_for(times: Times, step: float) -> None:
    """Buildkite's own clock is right: it is ours as it is afterwards."""
    times.use(hourly())
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.tick(HOUR)
    times.builds[0].created_at += step
    times.builds[0].shown_at += step
    times.tick(step)
    assert times.row.build
    assert (len(times.builds), times.row.build["number"]) == (1, 1)


@pytest.mark.usefixtures("hasty")
def test_look_for_a_build_that_fails_is_made_again_before_anything_is_asked_for(times: Times) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.tick(HOUR)
    for fault in ({"status": 503}, {"body": {"data": {"pipeline": None}}}, {"body": {"errors": [{"message": "no"}]}}):
        times.fake.set_fault("graphql", **fault, times=1)
        times.tick(1)
        assert times.part.problems
        assert len(times.builds) == 1
    times.tick(1)
    assert (times.row.start, times.part.problems, len(times.builds)) == (None, [], 1)


@pytest.mark.usefixtures("hasty")
def test_start_while_one_is_unclear_waits_until_that_is_known(times: Times) -> None:
    """Two due times and an operator's word come meanwhile: the last due time follows, and the word is refused."""
    times.use(hourly(if_running="start"))
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.fake.set_fault("graphql", status=503)
    times.tick(HOUR)
    assert times.row.start
    mark = times.row.start["mark"]
    times.tick(HOUR)
    times.tick(HOUR)
    assert (times.row.start["mark"], len(times.builds)) == (mark, 1)
    assert (
        times.store.change_periodic("nightly", lambda row: scheduler.wanted(row or PeriodicRow(""), "m", None)) is None
    )
    times.fake.clear_faults()
    times.tick(1)
    times.tick(1)
    assert len(times.builds) == 2
    assert times.row.looked_at == times.clock.now() - 2


@pytest.mark.usefixtures("hasty")
def test_start_whose_build_is_shown_too_late_makes_a_second_one(times: Times) -> None:
    """What cannot be helped, as the API takes no key by which it would know that it was asked before."""
    times.use(hourly())
    times.fake.build_delay = 10.0
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.tick(HOUR)
    times.tick(9)
    assert len(times.builds) == 2
    assert times.builds[0].meta_data == times.builds[1].meta_data


def test_start_whose_build_is_shown_late_but_in_time_is_found(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times.use(hourly())
    times.fake.build_delay = 59.0
    times.fake.set_fault("create-build", drop_after=True, times=1)
    times.tick(HOUR)
    times.tick(59)
    monkeypatch.setattr(scheduler, "UNCLEAR_SECONDS", 0.0)
    monkeypatch.setattr(times.part, "_tries", {})
    times.tick(1)
    assert (len(times.builds), times.row.start) == (1, None)


# -- refusals


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"status": 401}, "it refuses BUILDKITE_API_TOKEN"),
        (
            {"status": 403},
            "403 from Buildkite: fault set on create-build; BUILDKITE_API_TOKEN needs the scope write_builds",
        ),
        ({"status": 404}, "404 from Buildkite: fault set on create-build; check `organization` and `pipeline`"),
        ({"status": 429}, "429 from Buildkite"),
    ],
    ids=str,
)
def test_start_that_is_refused_for_now_says_what_to_do_and_is_tried_again(
    times: Times, fault: dict[str, Any], told: str
) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", **fault)
    times.tick(HOUR)
    times.begin()
    times.tick(1)
    (problem,) = times.part.problems
    assert problem.startswith("periodic nightly: start a build of acme/app: ")
    assert told in problem
    assert "bkua_test" not in problem
    assert len(times.fake.calls_to("create-build")) == 2
    times.fake.clear_faults()
    times.tick(1)
    assert (len(times.builds), times.part.problems, times.row.failures) == (1, [], 2)
    assert times.fake.calls_to("graphql") == []  # such an answer is clear


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("status", [400, 413, 422])
def test_start_that_is_refused_for_what_it_asks_is_not_tried_again(times: Times, status: int) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", status=status, body={"message": "Branches have been disabled"}, times=1)
    times.tick(HOUR)
    times.tick(HOUR / 2)
    (problem,) = times.part.problems
    assert "Branches have been disabled" in problem
    assert ("check `branch`, `commit`" in problem) is (status == 422)
    assert len(times.fake.calls_to("create-build")) == 1
    assert times.told[0]["unstarted"]["what"] == "refused"
    times.tick(HOUR / 2)
    assert (len(times.builds), times.part.problems) == (1, [])


def test_start_that_is_refused_gives_its_place_to_the_next_due_time(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", status=403)
    for _ in range(3):
        times.tick(HOUR)
    times.fake.clear_faults()
    times.begin()
    times.tick(1)
    assert len(times.builds) == 1
    assert times.row.build
    assert times.row.build["due_at"] == times.clock.now() - 1


def test_start_of_one_that_fails_keeps_no_other_waiting(times: Times) -> None:
    utc = zoneinfo.ZoneInfo("UTC")
    times.use(Periodic("a", "none", "0 * * * *", utc), Periodic("b", "app", "0 * * * *", utc))
    times.tick(HOUR)
    assert [build.pipeline for build in times.builds] == ["app"]
    (problem,) = times.part.problems
    assert problem.startswith("periodic a: start a build of acme/none: 404 from Buildkite: No pipeline found; check")


def test_start_by_the_real_fake_without_the_scope_says_which_it_lacks(times: Times) -> None:
    times.fake.api_scopes.clear()
    times.use(hourly())
    times.tick(HOUR)
    (problem,) = times.part.problems
    assert "Missing required scope: write_builds" in problem


def test_tick_of_one_that_does_not_lead_asks_for_nothing(times: Times) -> None:
    times.use(hourly())
    times.part._lead.end()
    times.tick(HOUR)
    assert times.builds == []


# -- an operator's word


def want(times: Times, mark: str, note: str = "try it") -> PeriodicRow | None:
    """As POST /periodic/nightly/run does."""
    return times.store.change_periodic(
        "nightly", lambda row: scheduler.wanted(row or PeriodicRow("nightly"), mark, None, "ann", note), None, OPERATOR
    )


def test_run_starts_a_build_beside_one_that_goes_on_and_changes_no_due_time(times: Times) -> None:
    times.use(hourly())
    times.tick(HOUR)
    looked_at = times.row.looked_at
    want(times, "m1")
    times.tick(1)
    assert [build.message for build in times.builds] == [
        "nightly, due at 2027-01-15T09:00:00Z",
        "nightly, started by ann: try it",
    ]
    assert times.row.looked_at == looked_at
    assert times.row.build
    assert (times.row.build["mark"], times.row.build["by"], times.row.build["due_at"]) == ("m1", "ann", None)


def test_run_takes_the_place_of_a_start_that_was_refused_and_does_not_wait(times: Times) -> None:
    times.use(hourly())
    times.fake.set_fault("create-build", status=403, headers={"Retry-After": "3000"})
    times.tick(HOUR)
    times.fake.clear_faults()
    times.tick(1)
    assert times.builds == []
    want(times, "m1")
    times.tick(1)
    assert [build.meta_data["stack-start"] for build in times.builds] == ["m1"]
    times.tick(1)
    assert len(times.builds) == 1


def test_run_of_a_schedule_that_no_leader_has_seen_is_not_lost(times: Times) -> None:
    want(times, "m1")
    times.use(hourly())
    assert [build.meta_data["stack-start"] for build in times.builds] == ["m1"]
    times.tick(HOUR / 2)
    assert len(times.builds) == 1


# -- metrics, and who leads


def test_read_metrics_tells_last_start_delay_and_failures_of_each(times: Times) -> None:
    def told() -> dict[str, float]:
        families = times.part.metrics(times.clock.now())
        return {f"{each.name} {each.labels['schedule']}": each.value for family in families for each in family.samples}

    assert told() == {}
    times.use(hourly(if_running="start"))
    times.fake.set_fault("create-build", status=403, times=1)
    times.tick(HOUR + 2)
    assert told() == {"stack_periodic_failures_total nightly": 1}
    times.begin()
    times.tick(5)
    name = "stack_periodic_last_start_timestamp_seconds nightly"
    assert told() == {
        name: times.clock.now(),
        "stack_periodic_delay_seconds nightly": 7,
        "stack_periodic_failures_total nightly": 1,
    }
    want(times, "m1")
    times.tick(60)
    assert told() == {name: times.clock.now(), "stack_periodic_failures_total nightly": 1}


def test_change_row_by_a_leader_whose_term_is_over_is_refused(settings: Callable[..., scheduler.Settings]) -> None:
    """Also as the answer of Buildkite comes: who leads by now looks for the build."""
    leader = STORES[REDIS](settings())
    leader.change_periodic("nightly", lambda _: PeriodicRow("nightly"))
    assert isinstance(leader.rows, RedisRows)
    leader.rows._redis.call("SET", "fence", "of another")
    with pytest.raises(Fenced):
        leader.change_periodic("nightly", lambda _: PeriodicRow("nightly", failures=1))
    with pytest.raises(Fenced):
        leader.forget_periodic("nightly")
    assert row_of(leader).failures == 0
    leader.change_periodic("nightly", lambda _: PeriodicRow("nightly", failures=2), None, OPERATOR)
    assert row_of(leader).failures == 2
    leader.close()


def test_read_row_that_a_newer_scheduler_wrote_passes_over_what_is_not_known() -> None:
    told = {"name": "nightly", "failures": 2, "colour": "red"}
    assert scheduler.periodic_row_of(told) == PeriodicRow("nightly", failures=2)


# --- Real processes ---

#: How a scheduler dies in the start of a periodic build, in the order of its life.
DEATHS = (
    "before wanted",
    "after wanted",
    "before asked",
    "after asked",
    "while the call hangs",
    "while the answer is on its way",
    "after answered",
    "after built",
)


class Dying(StackProcesses):
    """Schedulers that have one schedule for each death, all due at once; each death is of its own schedule."""

    def __init__(self, fake: FakeBuildkite, directory: Path, deaths: Sequence[str], **settings: str):
        self.deaths = deaths
        due = datetime.datetime.now(datetime.UTC)
        tables = [
            f'[[periodic]]\nname = "{death}"\npipeline = "app"\nzone = "UTC"\ncron = "{due.minute} {due.hour} * * *"\n'
            for death in deaths
        ]
        (directory / "stack.toml").write_text("\n".join(['organization = "acme"', *tables]))
        fake.add_pipeline("app")
        more = {
            "STACK_FILE": str(directory / "stack.toml"),
            "BUILDKITE_API_TOKEN": fake.api_token,
            "BUILDKITE_API_ENDPOINT": fake.rest_url,
            "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url,
        }
        super().__init__(fake, directory, agent_path("fake"), **more, **settings)

    def scheduler_command(self) -> list[str]:
        return [sys.executable, str(TESTS / "dying_scheduler.py")]

    def start_to_die(self, turn: int) -> Process:
        """Start the scheduler that dies in this turn; after the last death one that lives."""
        death = self.deaths[turn] if turn < len(self.deaths) else ""
        if death.startswith("while"):
            named = f'"stack-periodic": "{death}"'.encode()
            fault = {"hang": math.inf} if death.endswith("hangs") else {"delay": 3600.0}
            self.fake.set_fault("create-build", **fault, times=1, match=lambda _, request: named in request.body)
        # It may die before it says that it has started.
        return self.start_scheduler(turn % len(self.ports), "" if death else "started", DIE_AT=death, DIE_OF=death)

    def await_death(self, process: Process, turn: int) -> None:
        death = self.deaths[turn]
        if death.startswith("while"):
            self.fake.wait_for(
                lambda: any(self.is_about(call.json, death) for call in self.fake.calls_to("create-build"))
            )
            if death.endswith("way"):
                self.fake.wait_for(lambda: any(self.is_about(vars(b), death) for b in self.fake.all_builds.values()))
            process.kill()
        assert process.ended(60) == -signal.SIGKILL
        self.fake.release_hangs()

    @staticmethod
    def is_about(told: Any, death: str) -> bool:
        return bool(told["meta_data"]["stack-periodic"] == death)

    def periodic(self, turn: int) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.urls[turn % len(self.ports)]}/periodic", timeout=30)
        return list(answer.json()["periodic"])

    def check(self, turn: int) -> None:
        """Each schedule has its build, and only one; each of these is the one that was asked for."""
        wait_until(lambda: all(row["build"] and not row["start"] for row in self.periodic(turn)), seconds=60)
        told = {row["name"]: (row["build"]["mark"], row["build"]["uuid"]) for row in self.periodic(turn)}
        made = [
            (build.meta_data["stack-periodic"], (build.meta_data["stack-start"], build.uuid))
            for build in self.fake.all_builds.values()
        ]
        assert sorted(made) == sorted(told.items())


@pytest.mark.long
def test_start_each_minute_is_within_two_seconds_of_it(fake: FakeBuildkite, tmp_path: Path) -> None:
    fake.add_pipeline("app")
    text = NIGHTLY.replace("H 2 * * *", "* * * * *") + 'if_running = "start"\n'
    (tmp_path / "stack.toml").write_text(text)
    settings = {"STACK_FILE": str(tmp_path / "stack.toml"), "BUILDKITE_API_TOKEN": fake.api_token}
    settings |= {"BUILDKITE_API_ENDPOINT": fake.rest_url, "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url}
    with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
        stack.start_scheduler()
        fake.wait_for(lambda: len(fake.all_builds) == 2, timeout=150)
        made = [build.created_at for build in fake.all_builds.values()]
        assert 58 < made[1] - made[0] < 62
        assert all(seconds % 60 < 2 for seconds in made), made
        print("delays", [seconds % 60 for seconds in made])


def test_kill_scheduler_at_any_point_of_a_start_makes_one_build_each(fake: FakeBuildkite, tmp_path: Path) -> None:
    """All builds are shown late, as they may be at Buildkite."""
    fake.build_delay = 0.5
    with Dying(fake, tmp_path, DEATHS) as stack:
        for turn in range(len(DEATHS)):
            stack.await_death(stack.start_to_die(turn), turn)
        turn = len(DEATHS)
        stack.start_to_die(turn)
        stack.check(turn)
        # The unclear ones were looked for: what had not arrived was asked for again, what had been made was found.
        marks = [call.json["meta_data"] for call in fake.calls_to("create-build")]
        asked = collections.Counter(about["stack-periodic"] for about in marks)
        assert asked == dict.fromkeys(DEATHS, 1) | {"while the call hangs": 2}
        assert len({about["stack-start"] for about in marks}) == len(DEATHS)


def test_check_of_schedules_names_pipelines_that_the_token_does_not_see(fake: FakeBuildkite, tmp_path: Path) -> None:
    tables = "".join(
        f"[[periodic]]\nname = {name!r}\npipeline = {name!r}\ncron = '@daily'\nzone = 'UTC'\n" for name in ("app", "ap")
    )
    (tmp_path / "stack.toml").write_text(f'organization = "acme"\n{tables}')
    fake.add_pipeline("app")
    with StackProcesses(fake, tmp_path, agent_path("fake"), STACK_FILE=str(tmp_path / "stack.toml")) as stack:

        def checked(**settings: str) -> list[str]:
            settings = {"STACK_FILE": str(tmp_path / "stack.toml"), "STACK_KEY": "test"} | settings
            environment = stack.environment(**settings)
            done = subprocess.run(
                [*compiled("scheduler.py"), "--check"],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == (78 if done.stderr else 0)
            return done.stderr.splitlines()

        api = {"BUILDKITE_API_TOKEN": fake.api_token, "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url}
        (problem,) = checked(**api)
        assert problem.startswith(
            "scheduler.py: STACK_FILE: [[periodic]] ap: Buildkite shows no pipeline acme/ap; BUILDKITE"
        )
        assert checked() == ["scheduler.py: BUILDKITE_API_TOKEN: is required for [[periodic]] in STACK_FILE"]
        fake.add_pipeline("ap")
        assert checked(**api) == []
        (tmp_path / "cronsim.py").write_text("raise ImportError\n")
        lacking = {problem.partition("toml, ")[2] for problem in checked(**api, PYTHONPATH=str(tmp_path))}
        assert lacking == {
            f"line {line}: cron needs cronsim: pip install cronsim, or Debian 13's python3-cronsim" for line in (5, 10)
        }
        assert checked(**api, PYTHONPATH=str(tmp_path), STACK_FILE="") == []


def test_reload_of_a_file_whose_schedules_cannot_be_used_leaves_the_old_ones_in_force(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    path = tmp_path / "stack.toml"
    path.write_text('organization = "acme"\n')
    fake.add_pipeline("app")
    for api in ({}, {"BUILDKITE_API_TOKEN": fake.api_token, "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url}):
        with StackProcesses(fake, tmp_path, agent_path("fake"), STACK_FILE=str(path), **api) as stack:
            process = stack.start_scheduler()

            def names(url: str = stack.url) -> list[str]:
                answer = requests.get(f"{url}/periodic", timeout=30).json()
                return [row["name"] for row in answer["periodic"]]

            path.write_text(NIGHTLY)
            process.send_signal(signal.SIGHUP)
            if not api:  # it would need a token
                process.wait_for_line("unreloaded", "BUILDKITE_API_TOKEN: is required for [[periodic]]")
                assert names() == []
                continue
            wait_until(lambda: names() == ["nightly"])
            path.write_text(NIGHTLY.replace("H 2", "H 25"))
            process.send_signal(signal.SIGHUP)
            process.wait_for_line("unreloaded", "line 6: cron is 'H 25 * * *', which cannot be read: Bad hour")
            assert names() == ["nightly"]


def test_stop_leader_while_buildkite_answers_has_another_find_the_build(fake: FakeBuildkite, tmp_path: Path) -> None:
    """The one that was stopped (SIGSTOP) gets the answer later, and writes nothing of it."""
    death = "while the answer is on its way"
    redis = RedisServer(tmp_path)
    try:
        with Dying(fake, tmp_path, [death], REDIS_ADDR=redis.address) as stack:
            first = stack.start_to_die(0)
            fake.wait_for(lambda: fake.all_builds, timeout=60)
            first.send_signal(signal.SIGSTOP)
            fake.clear_faults()
            stack.start_scheduler(1)
            stack.check(1)
            first.send_signal(signal.SIGCONT)
            first.wait_for_line("following")
            stack.check(1)
            assert not any(" started periodic=" in line for line in first.lines)
    finally:
        redis.stop()


def test_kill_leader_at_any_point_of_a_start_has_another_go_on_with_one_build_each(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    fake.build_delay = 0.5
    deaths = DEATHS if LONG_RUN else ("after wanted", "while the call hangs", "after answered")
    redis = RedisServer(tmp_path)
    try:
        with Dying(fake, tmp_path, deaths, REDIS_ADDR=redis.address) as stack:
            process = stack.start_to_die(0)
            for turn in range(len(deaths)):
                process.wait_for_line("leading")  # or the one that follows might lead before it
                following = stack.start_to_die(turn + 1)
                stack.await_death(process, turn)
                process = following
            stack.check(len(deaths))
    finally:
        redis.stop()
