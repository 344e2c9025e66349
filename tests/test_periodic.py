"""Periodic builds: when they are due, what Buildkite is asked for, and that each due time is done once."""

from __future__ import annotations

import datetime
import itertools
import zoneinfo
from collections.abc import Callable
from pathlib import Path

import pytest

import scheduler
from scheduler import Periodic, SettingsError, due_times, spread

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
        "line 4: cron is 'H 2 * *'; it has five fields, or is one of @yearly, @annually, @monthly, @weekly, @daily, "
        "@midnight, @hourly",
        "line 5: zone is 'Europe/Berln', which is no time zone; the nearest is 'Europe/Berlin'",
        "line 6: if_runing is no key of [periodic]; the nearest is if_running",
        "line 8: [periodic] has no pipeline",
        "line 10: cron is '61 2 * * *', which cannot be read: Bad minute",
        "line 12: if_running is 'wait'; it may be skip, start",
        "line 13: missed is 'all'; it may be once, none",
        "line 14: env is {'A': 1}; it is a table of texts like { NAME = \"value\" }",
        "line 15: meta_data has stack-start, which the scheduler sets itself",
        "line 20: cron is '0 0 31 2 *', which cannot be read: Bad day-of-month",
    ]
    twice = NIGHTLY + NIGHTLY.partition("\n")[2]
    assert problems_of(stack_file, twice) == ["line 10: name is 'nightly', as of another schedule: give each its own"]


def test_read_line_that_is_never_due_is_refused(stack_file: Callable[[str], scheduler.StackFile]) -> None:
    text = NIGHTLY.replace("H 2 * * *", "0 0 * 2 mon#5")
    (due,) = stack_file(text).periodic
    assert due.due_after(at("2026-11-29T12:00")) > at("2027-02-01T00:00")
    never = NIGHTLY.replace("H 2 * * *", "0 0 */28 2 mon#2")
    assert problems_of(stack_file, never) == ["line 6: cron is '0 0 */28 2 mon#2', which is never due"]


def test_read_schedule_without_cronsim_says_what_to_install(
    stack_file: Callable[[str], scheduler.StackFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cronsim", None)
    assert problems_of(stack_file, NIGHTLY) == [
        "line 6: cron needs cronsim: pip install cronsim, or Debian 13's python3-cronsim"
    ]
    assert stack_file('organization = "acme"\n').periodic == ()


def test_read_schedule_without_an_api_token_is_refused(
    settings: Callable[..., scheduler.Settings], tmp_path: Path
) -> None:
    (tmp_path / "stack.toml").write_text(NIGHTLY)
    (problem,) = settings(STACK_FILE=tmp_path / "stack.toml").problems()
    assert problem == "BUILDKITE_API_TOKEN: is required for the [[periodic]] of STACK_FILE"
    assert settings(STACK_FILE=tmp_path / "stack.toml", BUILDKITE_API_TOKEN="bkua_x").problems() == []
