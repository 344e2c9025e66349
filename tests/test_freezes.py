"""Freeze windows and the file that they stand in: read, exact in time, kept by the stores, and in real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import re
import signal
import subprocess
import sys
import threading
import time
import zoneinfo
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

import processes
import scheduler
from conftest import Clock, make_settings, the_redis
from fake_buildkite import FakeBuildkite
from processes import ROOT, Process, RedisServer, StackProcesses, agent_path, command, wait_until
from scheduler import (
    Finding,
    Freeze,
    Freezes,
    FreezeWindows,
    Frozen,
    Job,
    JobFinding,
    JobState,
    Leadership,
    Notifier,
    Settings,
    SettingsError,
    Span,
    Stack,
    Store,
    StoreUnavailable,
)
from test_api import OTHER, PATIENCE, UUID, W1, Bench
from test_store import MEASURED, cost_in_redis, cost_of_claim, crowded, crowded_redis

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
QUEUE, OTHER_QUEUE = "deploy", "default"


def at(text: str, zone: str = "Europe/Berlin") -> float:
    """Unix seconds of a time without an offset in that zone, or of one with an offset."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=zoneinfo.ZoneInfo(zone))).timestamp()


def window(begins: str, ends: str, zone: str = "Europe/Berlin", name: str = "w", **scope: Any) -> Freeze:
    """A window as the file has it: of weekdays, or of dates."""

    def edge(text: str) -> scheduler.Edge:
        return scheduler.an_edge(text if text[0].isalpha() else datetime.datetime.fromisoformat(text))

    return Freeze(name, edge(begins), edge(ends), zoneinfo.ZoneInfo(zone), **scope)


def listed(queue: str = QUEUE, pipeline: str | None = "app", branch: str | None = "main") -> Job:
    row = {
        "id": "01890000-0000-4000-8000-000000000001",
        "pipeline": {"slug": pipeline},
        "build": {"branch": branch},
        "scheduled_at": "2026-11-27T12:00:00Z",
    }
    return Job.from_api(queue, row, at("2026-11-27T12:00:00Z"))


# --- Windows as functions of time ---


@pytest.mark.parametrize(
    ("now", "is_in_force"),
    [
        ("2026-11-27T15:59:59.999", False),  # a Friday
        ("2026-11-27T16:00:00", True),
        ("2026-11-29T12:00:00", True),
        ("2026-11-30T07:59:59.999", True),
        ("2026-11-30T08:00:00", False),
        ("2026-12-02T00:00:00", False),
    ],
)
def test_span_of_a_weekend_begins_with_its_first_moment_and_ends_before_its_last(now: str, is_in_force: bool) -> None:
    weekend = window("Fri 16:00", "Mon 08:00")
    expected = Span(at("2026-11-27T16:00:00"), at("2026-11-30T08:00:00")) if is_in_force else None
    assert weekend.span_at(at(now)) == expected


@pytest.mark.parametrize(
    ("begins", "ends", "now", "span"),
    [
        # Within one day, and nearly all of a week.
        ("Wed 09:00", "Wed 10:30", "2026-12-02T09:30:00", ("2026-12-02T09:00:00", "2026-12-02T10:30:00")),
        ("Wed 10:30", "Wed 09:00", "2026-12-01T09:30:00", ("2026-11-25T10:30:00", "2026-12-02T09:00:00")),
        # From one month, and from one year, into the next: 2026-12-31 is a Thursday.
        ("Thu 18:00", "Mon 06:00", "2027-01-01T00:00:00", ("2026-12-31T18:00:00", "2027-01-04T06:00:00")),
        ("2026-12-23T18:00:00", "2027-01-04T06:00:00", "2026-12-31T23:59:59", None),
        ("2026-12-23T18:00:00", "2027-01-04T06:00:00", "2027-01-01T00:00:00", None),
        # A date alone is its first moment.
        ("2026-12-24", "2026-12-27", "2026-12-26T23:59:59", ("2026-12-24T00:00:00", "2026-12-27T00:00:00")),
    ],
)
def test_span_of_a_window_is_what_the_clock_of_its_zone_shows(
    begins: str, ends: str, now: str, span: tuple[str, str] | None
) -> None:
    begins_at, ends_at = span or (begins, ends)
    assert window(begins, ends).span_at(at(now)) == Span(at(begins_at), at(ends_at))


def test_span_of_a_window_in_another_zone_is_of_that_zone() -> None:
    # 16:00 on Friday in Auckland is 04:00 in Berlin.
    assert window("Fri 16:00", "Fri 17:00", "Pacific/Auckland").span_at(at("2026-11-27T04:30:00")) == Span(
        at("2026-11-27T03:00:00+00:00"), at("2026-11-27T04:00:00+00:00")
    )


#: In Berlin the clock goes from 02:00 to 03:00 on Sunday 2026-03-29, at 01:00 UTC, and from 03:00 back to 02:00 on
#: Sunday 2026-10-25, at 01:00 UTC.
SPRING = at("2026-03-29T01:00:00+00:00")
AUTUMN = at("2026-10-25T01:00:00+00:00")
HOUR = 3600.0


@pytest.mark.parametrize(
    ("begins", "ends", "span"),
    [
        # Around the change a window is an hour shorter, or longer, than its clock says.
        ("Sat 22:00", "Sun 06:00", (SPRING - 4 * HOUR, SPRING + 3 * HOUR)),
        # What the clock leaves out is the moment at which it is set.
        ("Sun 02:30", "Sun 06:00", (SPRING, SPRING + 3 * HOUR)),
        ("Sat 22:00", "Sun 02:30", (SPRING - 4 * HOUR, SPRING)),
        ("Sat 22:00", "Sun 02:00", (SPRING - 4 * HOUR, SPRING)),
        ("Sat 22:00", "Sun 03:00", (SPRING - 4 * HOUR, SPRING)),
        ("Sun 01:59", "Sun 03:01", (SPRING - 60, SPRING + 60)),
    ],
)
def test_span_over_a_clock_set_forward_is_exact(begins: str, ends: str, span: tuple[float, float]) -> None:
    assert next(window(begins, ends).spans(SPRING - 5 * HOUR)) == Span(*span)


def test_span_that_the_clock_leaves_out_wholly_is_not_in_force_that_week() -> None:
    night = window("Sun 02:10", "Sun 02:50")
    week = 7 * 24 * HOUR
    assert [span.begins_at for _, span in zip(range(2), night.spans(SPRING - week), strict=False)] == [
        at("2026-03-22T02:10:00"),
        at("2026-04-05T02:10:00"),
    ]
    assert night.span_at(SPRING) is None


@pytest.mark.parametrize(
    ("begins", "ends", "span"),
    [
        ("Sat 22:00", "Sun 06:00", (AUTUMN - 5 * HOUR, AUTUMN + 4 * HOUR)),
        # What the clock shows twice begins with the first time and ends with the last.
        ("Sun 02:30", "Sun 06:00", (AUTUMN - HOUR / 2, AUTUMN + 4 * HOUR)),
        ("Sat 22:00", "Sun 02:30", (AUTUMN - 5 * HOUR, AUTUMN + HOUR / 2)),
        ("Sun 02:10", "Sun 02:20", (AUTUMN - 3000, AUTUMN + 1200)),
        ("Sat 22:00", "Sun 02:00", (AUTUMN - 5 * HOUR, AUTUMN)),
        ("Sat 22:00", "Sun 03:00", (AUTUMN - 5 * HOUR, AUTUMN + HOUR)),
    ],
)
def test_span_over_a_clock_set_back_is_exact(begins: str, ends: str, span: tuple[float, float]) -> None:
    assert next(window(begins, ends).spans(AUTUMN - 6 * HOUR)) == Span(*span)


def test_span_with_a_date_that_its_zone_never_had_is_the_moment_of_the_change() -> None:
    # Samoa went from the end of 2011-12-29 to 2011-12-31.
    span = next(window("2011-12-30T12:00:00", "2012-01-02T00:00:00", "Pacific/Apia").spans(0.0))
    assert span.begins_at == at("2011-12-30T10:00:00+00:00")


@pytest.mark.parametrize(
    "zone",
    [
        "Europe/Berlin",
        *(
            pytest.param(zone, marks=pytest.mark.long)
            for zone in ("America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC")
        ),
    ],
)
def test_span_of_any_week_is_that_of_a_clock_that_is_read_each_minute(zone: str) -> None:
    """Compared with what people do: look at the clock on the wall, over both changes of 2026."""
    night = window("Sat 23:17", "Sun 04:43", zone)
    info, minutes = zoneinfo.ZoneInfo(zone), range(int(at("2026-01-01", "UTC")), int(at("2027-01-01", "UTC")), 60)
    for now in minutes[:: 7 * 3]:  # 21 divides no day: each minute of a day is met
        shown = datetime.datetime.fromtimestamp(now, info)
        minute = (shown.weekday() * 24 + shown.hour) * 60 + shown.minute
        is_night = (5 * 24 + 23) * 60 + 17 <= minute < (6 * 24 + 4) * 60 + 43
        assert (night.span_at(now) is not None) is is_night, shown


def test_next_edge_of_a_window_is_its_next_begin_or_end() -> None:
    weekend = window("Fri 16:00", "Mon 08:00")
    friday, monday = at("2026-11-27T16:00:00"), at("2026-11-30T08:00:00")
    assert [weekend.next_edge(now) for now in (friday - 1, friday, monday - 0.001, monday)] == [
        friday,
        monday,
        monday,
        at("2026-12-04T16:00:00"),
    ]
    assert window("2026-12-23", "2026-12-24").next_edge(at("2026-12-24")) == float("inf")


# --- Which window holds a job ---


@pytest.mark.parametrize(
    ("scope", "is_matched"),
    [
        ({}, True),
        ({"queues": ("deploy",)}, True),
        ({"queues": ("build", "dep*")}, True),
        ({"queues": ("Deploy",)}, False),
        ({"queues": ("eploy",)}, False),
        ({"queues": ("deplo?",)}, False),
        ({"pipelines": ("a*",)}, True),
        ({"pipelines": ("b*",)}, False),
        ({"branches": ("main", "release/*")}, True),
        ({"branches": ("release/*",)}, False),
        ({"queues": ("deploy",), "branches": ("release/*",)}, False),
        ({"queues": ("deploy",), "pipelines": ("app",), "branches": ("m*n",)}, True),
    ],
)
def test_match_of_a_job_needs_each_kind_of_glob_that_is_named(scope: dict[str, Any], is_matched: bool) -> None:
    assert window("Fri 16:00", "Mon 08:00", **scope).matches(listed()) is is_matched


def test_match_of_a_job_without_pipeline_and_branch_is_by_a_star_alone() -> None:
    bare = dataclasses.replace(listed(), about={})
    for job in (bare, listed(pipeline=None, branch=None)):
        assert window("Fri 16:00", "Mon 08:00", pipelines=("*",), branches=("*",)).matches(job)
        assert not window("Fri 16:00", "Mon 08:00", pipelines=("app",)).matches(job)


def holding(freezes: list[Freeze], now: str) -> Frozen | None:
    return scheduler.frozen_by(listed(), scheduler.in_force(freezes, at(now)))


def test_frozen_by_overlapping_windows_names_the_one_that_ends_last() -> None:
    freezes = [
        window("2026-12-01", "2026-12-03", name="long"),
        window("2026-12-02", "2026-12-04", name="longer"),
        window("2026-12-02", "2026-12-05", name="of others", queues=("default",)),
        window("2026-12-02", "2026-12-04", name="as long"),
    ]
    assert [holding(freezes, f"2026-12-0{day}T12:00:00") for day in (1, 2, 3, 4)] == [
        Frozen("long", at("2026-12-03")),
        Frozen("longer", at("2026-12-04")),
        Frozen("longer", at("2026-12-04")),
        None,
    ]


@pytest.mark.parametrize("day", ["2026-12-02", "2026-03-29", "2026-10-25"])
def test_frozen_by_adjoining_windows_leaves_no_moment_between_them(day: str) -> None:
    """Also where they meet in an hour that the clock leaves out, or shows twice."""
    freezes = [window(f"{day}T00:00:00", f"{day}T02:30:00", name="one"), window(f"{day}T02:30:00", f"{day}T05:00:00")]
    meets = at(f"{day}T00:00:00")
    while now := next((span.ends_at for _, span in scheduler.in_force(freezes, meets)), 0.0):
        meets = now
    assert meets == at(f"{day}T05:00:00")


# --- The file ---


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


NOW = at("2026-11-29T12:00:00")
WEEKEND = """\
[[freeze]]
name = "no deploys over the weekend"
queues = ["deploy"]
from = "Fri 16:00"
until = "Mon 08:00"
zone = "Europe/Berlin"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., scheduler.ReadFile]:
    return lambda text, **how: scheduler.read_stack_file(write(tmp_path / "stack.toml", text), NOW, **how)


@pytest.fixture
def problems_of(read: Callable[..., scheduler.ReadFile], tmp_path: Path) -> Callable[..., list[str]]:
    """The problems of a file, less what each begins with."""

    def problems(text: str, **how: object) -> list[str]:
        with pytest.raises(SettingsError) as caught:
            read(text, **how)
        start = f"STACK_FILE: {tmp_path}/stack.toml, "
        lines = str(caught.value).splitlines()
        assert all(line.startswith(start) for line in lines), lines
        return [line.removeprefix(start) for line in lines]

    return problems


def test_read_file_of_the_issue_gives_its_windows(read: Callable[..., scheduler.ReadFile]) -> None:
    christmas = """
[[freeze]]
name = "Christmas"
pipelines = ["app-*"]
branches = [
    "main",  # and no other
]
from = 2026-12-23T18:00:00
until = 2027-01-04
zone = "UTC"
"""
    found = read(f'organization = "acme"\n{WEEKEND}{christmas}')
    assert (found.tables.organization, found.warnings) == ("acme", ())
    weekend, winter = found.tables.freeze
    assert weekend == window("Fri 16:00", "Mon 08:00", name="no deploys over the weekend", queues=("deploy",))
    assert winter == window(
        "2026-12-23T18:00:00", "2027-01-04", "UTC", "Christmas", pipelines=("app-*",), branches=("main",)
    )
    assert read("").tables == scheduler.StackFile("", ())


def test_read_file_with_many_problems_tells_all_with_line_and_nearest_key(
    problems_of: Callable[..., list[str]],
) -> None:
    text = """\
organisation = "acme"

[[freeze]]
name = "one"
queus = ["deploy"]
from = "Fri 25:00"
until = "Mon 08:00"
zone = "Europe/Berln"

[[freeze]]
branches = [
    "main",
    5,
]
pipelines = []
from = 2026-12-23T18:00:00Z
until = 5
zone = "Europe"

[[freeze]]
name = "one"
[freeze.more]

[[freeze]]
name = "two"
from = "Fri 16:00"
until = "Mon 08:00"
zone = "UTC"
[[freeze]]
name = "two"
from = "Mon 08:00"
until = "Fri 16:00"
zone = "UTC"
"""
    assert problems_of(text) == [
        "line 1: organisation is not a key; the nearest is organization",
        "line 5: queus is not a key of [freeze]; the nearest is queues",
        "line 6: from is 'Fri 25:00'; write it like \"Fri 16:00\", or without quotes 2026-12-23T18:00:00",
        "line 8: zone is 'Europe/Berln', which is not a time zone; the nearest is 'Europe/Berlin'",
        "line 10: [freeze] has no name",
        "line 11: branches is 5; it must be a text of 1 to 200 printable characters",
        'line 15: pipelines is []; it is a list like ["deploy", "app-*"]; leave it out for all',
        "line 16: from is 2026-12-23 18:00:00+00:00; write it without an offset: it is a time of `zone`",
        'line 17: until is 5; write it like "Fri 16:00", or without quotes 2026-12-23T18:00:00',
        "line 18: zone is 'Europe', which is not a time zone; the nearest is 'Europe/Rome'",
        "line 20: [freeze] has no from",
        "line 20: [freeze] has no until",
        "line 20: [freeze] has no zone",
        "line 22: more is not a key of [freeze]; the nearest is zone",
        "line 30: name is 'two', like another window: give each its own",
        "line 30: window 'two', together with others for the same jobs, never ends",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("freeze = 5\n", "line 1: freeze must be written as [[freeze]]"),
        ("\n[freeze]\n", "line 2: freeze must be written as [[freeze]]"),
        ("freeze = [1]\n", "line 1: freeze must be written as [[freeze]]"),
        ('[monitors]\nqueue = "x"\n', "line 1: monitors is not a key; the nearest is monitor"),
        ('organization = ""\n', "line 1: organization is ''; it must be a text of 1 to 200 printable characters"),
        (f"{WEEKEND}\n{WEEKEND}", "line 9: name is 'no deploys over the weekend', like another window"),
        (WEEKEND.replace("08:00", "24:00"), "line 5: until is 'Mon 24:00'; write it like"),
        (WEEKEND.replace("Mon 08:00", "Fri 16:00"), "line 5: until is Fri 16:00, and so is `from`: the window never"),
        (WEEKEND.replace('"Mon 08:00"', "2026-12-01"), "line 5: until is 2026-12-01 00:00:00 and `from` is Fri 16:00"),
        (WEEKEND.replace('until = "Mon 08:00"\n', ""), "line 1: [freeze] has no until"),
        (WEEKEND.replace('"Fri 16:00"', "1969-12-31"), "line 4: from is 1969-12-31; its year may be 1970 to 9000"),
        (WEEKEND.replace('"Fri 16:00"', '"Fre 16:00"'), "line 4: from is 'Fre 16:00'; write it like"),
        (WEEKEND.replace("Europe/Berlin", "../../etc/passwd"), "line 6: zone is '../../etc/passwd', which is not"),
    ],
)  # fmt: skip
def test_read_file_with_a_problem_names_it(problems_of: Callable[..., list[str]], text: str, problem: str) -> None:
    (found,) = problems_of(text)
    assert found.startswith(problem)


@pytest.mark.parametrize(("begins", "ends"), [("2026-12-02", "2026-12-02"), ("2026-12-03", "2026-12-02T23:59:59")])
def test_read_window_that_ends_before_it_begins_is_refused(
    problems_of: Callable[..., list[str]], begins: str, ends: str
) -> None:
    text = WEEKEND.replace('"Fri 16:00"', begins).replace('"Mon 08:00"', ends)
    (found,) = problems_of(text)
    assert found.startswith("line 5: until is 2026-12-02 ") and "not after `from`" in found


def weekly(name: str, begins: str, ends: str, zone: str = "Europe/Berlin", queue: str = "deploy") -> str:
    return f'[[freeze]]\nname = "{name}"\nqueues = ["{queue}"]\nfrom = "{begins}"\nuntil = "{ends}"\nzone = "{zone}"\n'


def test_read_windows_that_together_never_end_are_refused(
    problems_of: Callable[..., list[str]], read: Callable[..., scheduler.ReadFile]
) -> None:
    days = weekly("days", "Mon 00:00", "Fri 12:00") + weekly("weekend", "Fri 11:00", "Mon 00:00")
    dated = weekly("holiday", "x", "y").replace('"x"', "2027-12-24").replace('"y"', "2027-12-27")
    for text in (days, days + dated):
        assert problems_of(text) == ["line 8: window 'weekend', together with others for the same jobs, never ends"]
    # With one minute between them, and of other jobs.
    assert len(read(days.replace('until = "Mon 00:00"', 'until = "Sun 23:59"')).tables.freeze) == 2
    others = weekly("days", "Mon 00:00", "Fri 12:00") + weekly("weekend", "Fri 11:00", "Mon 00:00", queue="app")
    assert len(read(others).tables.freeze) == 2


def test_read_window_in_the_past_is_a_warning_and_its_file_is_taken(
    read: Callable[..., scheduler.ReadFile], tmp_path: Path
) -> None:
    past = WEEKEND.replace('"Fri 16:00"', "2025-12-24").replace('"Mon 08:00"', "2025-12-27T06:00:00")
    found = read(weekly("next", "Fri 16:00", "Mon 08:00") + past)
    assert found.warnings == (
        f"STACK_FILE: {tmp_path}/stack.toml, line 11: window 'no deploys over the weekend' ended at "
        "2025-12-27 06:00:00 in Europe/Berlin: it has no effect any more",
    )
    assert len(found.tables.freeze) == 2


def test_read_file_that_is_not_toml_says_where(tmp_path: Path) -> None:
    path = write(tmp_path / "stack.toml", 'organization = "acme"\nfreeze = [\n')
    with pytest.raises(SettingsError, match=r"stack.toml is not TOML: .*\(at end of document\)$"):
        scheduler.read_stack_file(path, NOW)
    with pytest.raises(SettingsError, match=r"is not TOML: .*\(at line 2, column 8\)$"):
        scheduler.read_stack_file(write(tmp_path / "stack.toml", 'organization = "acme"\nfrom = Fri 16:00\n'), NOW)
    with pytest.raises(SettingsError, match=r"^STACK_FILE: .*/none.toml cannot be read: .*No such file"):
        scheduler.read_stack_file(str(tmp_path / "none.toml"), NOW)


def test_read_file_that_differs_in_its_comments_alone_is_the_same_file(read: Callable[..., scheduler.ReadFile]) -> None:
    assert read(WEEKEND).canonical == read(f"# ours\n\n{WEEKEND.replace(' = ', '=')}").canonical
    assert read(WEEKEND).canonical != read(WEEKEND.replace("08:00", "08:01")).canonical


@dataclasses.dataclass(frozen=True, slots=True)
class Mirror:
    """A table as a later scheduler may have it."""

    token: str = scheduler.key(scheduler.a_text, name="api-token-file")
    queue: str = scheduler.key(scheduler.a_text, "default")

    def problems(self) -> list[tuple[str, str]]:
        return [("queue", "is taken")] if self.queue == "taken" else []


@dataclasses.dataclass(frozen=True, slots=True)
class LaterFile(scheduler.StackFile):
    mirror: Mirror | None = scheduler.table_of(Mirror)


def test_read_file_with_a_new_table_needs_one_class_and_one_line(
    read: Callable[..., scheduler.ReadFile], problems_of: Callable[..., list[str]]
) -> None:
    text = f'{WEEKEND}[mirror]\napi-token-file = "/t"\n'
    assert read(text, cls=LaterFile).tables.mirror == Mirror("/t", "default")
    assert read(WEEKEND, cls=LaterFile).tables.mirror is None
    assert problems_of(f'{text}queue = "taken"\napi_token = ""\n', cls=LaterFile) == [
        "line 10: api_token is not a key of [mirror]; the nearest is api-token-file"
    ]
    assert problems_of(f'{text}queue = "taken"\n', cls=LaterFile) == ["line 9: queue is taken"]
    assert problems_of("[[mirror]]\n", cls=LaterFile) == ["line 1: mirror must be written as [mirror]"]


def test_read_zone_on_a_system_without_zones_takes_those_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("tzdata")
    path = write(tmp_path / "stack.toml", WEEKEND)
    code = f"import scheduler as s; print(s.read_stack_file({path!r}, 0.0).tables.freeze[0].zone)"
    env = {"PYTHONPATH": str(ROOT), "PYTHONTZPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("Europe/Berlin\n", "")


# --- Held and released, on both stores ---


class Frost(Bench):
    """The API over a store, with freeze windows whose clock is that of the test."""

    def freeze(self, *freezes: Freeze) -> None:
        """These are the windows from now on."""
        self.store.windows.use(freezes)
        self.tick()

    def tick(self) -> float:
        return self.freezes.tick(self.clock.now())

    def wait(self, seconds: float) -> None:
        """So many seconds later, of which the duty is told as its thread would be."""
        self.clock.advance(seconds)
        self.tick()

    def window(self, begins: float, ends: float, name: str = "w", **scope: Any) -> Freeze:
        """From and until so many seconds from now."""
        now = self.clock.now()
        edges = [datetime.datetime.fromtimestamp(now + each, datetime.UTC) for each in (begins, ends)]
        first, last = (edge.replace(tzinfo=None) for edge in edges)
        return Freeze(name, first, last, zoneinfo.ZoneInfo("UTC"), **scope)

    def claimed(self, query: str = "queue=default") -> str | None:
        """The uuid that a claim without a name gets."""
        reply = self.call("GET", f"/jobs?query={query}")
        return reply.json["uuid"] if reply.status == 200 else None

    def told(self, uuid: str = UUID) -> Any:
        return self.call("GET", f"/jobs/{uuid}").json

    def confirm(self, uuid: str = UUID, now: float | None = None) -> None:
        at = self.clock.now() if now is None else now
        self.store.confirm([uuid], self.store.sequence(), at + 900, at)


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Frost]:
    with Frost(store, clock, settings()) as made:
        yield made


def test_window_that_begins_holds_what_waits_and_at_its_end_the_first_in_line_comes_first(bench: Frost) -> None:
    bench.make_ready(UUID, priority=1)
    bench.make_ready(OTHER, priority=2)
    bench.freeze(bench.window(2, 4))
    held: dict[str, Any] = {"held_by": "freeze", "held_reason": "frozen", "held_note": "w"}
    bench.wait(1.5)
    assert bench.told()["held_by"] is None
    bench.wait(0.5)
    assert bench.claimed() is None
    job = bench.told()
    assert {name: job[name] for name in held} == held
    assert (job["state"], job["held_until"], job["why"]) == ("ready", "2027-01-15T08:00:04.000Z", "frozen")
    assert job["why_text"] == "freeze window 'w' holds it until 2027-01-15T08:00:04.000Z"
    bench.wait(1.75)
    assert bench.claimed() is None
    bench.wait(0.25)
    assert [bench.claimed(), bench.claimed(), bench.claimed()] == [OTHER, UUID, None]
    assert bench.told()["held_note"] is None


def test_job_that_becomes_ready_in_a_window_is_never_claimable_before_its_end(bench: Frost) -> None:
    bench.freeze(bench.window(-10, 3, queues=("default",)))
    bench.make_ready()  # and nobody has looked at the line since
    assert bench.claimed() is None
    assert bench.told()["why"] == "frozen"
    bench.store.put([listed("other")], bench.store.sequence(), bench.clock.now())
    bench.confirm(listed().uuid)
    assert bench.claimed("queue=other") == listed().uuid
    bench.wait(3)
    assert bench.claimed() == UUID


def test_confirm_that_was_asked_before_a_window_began_is_decided_by_the_time_of_its_answer(bench: Frost) -> None:
    asked_at = bench.clock.now()
    bench.freeze(bench.window(1, 9))
    bench.store.put([Job.from_api("default", {"id": UUID}, asked_at)], bench.store.sequence(), asked_at)
    bench.clock.advance(2)
    bench.confirm(now=asked_at)
    assert (bench.claimed(), bench.told()["why"]) == (None, "frozen")


def test_window_that_begins_while_a_job_becomes_ready_holds_it_all_the_same(
    bench: Frost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was decided that no window holds it, which is not written yet as one begins."""
    now = bench.clock.now()
    bench.store.put([Job.from_api("default", {"id": UUID}, now)], bench.store.sequence(), now)
    bench.freeze(bench.window(1, 9))
    apply, decided, go_on = bench.store.rows.apply, threading.Event(), threading.Event()

    def slow(*asked: Any, **how: Any) -> Any:
        decided.set()
        assert go_on.wait(PATIENCE)
        return apply(*asked, **how)

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(bench.store.rows, "apply", slow)
        confirming = pool.submit(bench.confirm)
        assert decided.wait(PATIENCE)
        patch.setattr(bench.store.rows, "apply", apply)
        looking = pool.submit(bench.wait, 2)
        with pytest.raises(TimeoutError):
            looking.result(0.2)
        go_on.set()
        confirming.result(PATIENCE)
        looking.result(PATIENCE)
    assert (bench.claimed(), bench.told()["why"]) == (None, "frozen")


def test_claim_that_was_handed_out_before_a_window_is_left_alone_and_frozen_when_it_comes_back(bench: Frost) -> None:
    bench.make_ready()
    claim = bench.claim(W1)["claim"]
    bench.freeze(bench.window(-1, 9))
    assert bench.call("POST", f"/jobs/{UUID}/touch", {"claim": claim}, W1).json["stop"] is False
    assert bench.state() == "leased"
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": claim, "reason": "no disk"}, W1)
    bench.confirm()
    assert (bench.claimed(), bench.told()["why"]) == (None, "frozen")


def test_frozen_job_stays_reserved_and_keeps_its_place(bench: Frost) -> None:
    now = bench.clock.now()
    bench.freeze(bench.window(-1, 9))
    bench.make_ready(UUID, priority=1)
    bench.make_ready(OTHER, priority=2)
    assert sorted(bench.store.unconfirmed("default", now + 901, 10)) == [UUID, OTHER]
    line = bench.call("GET", "/queue").json["jobs"]
    assert [job["uuid"] for job in line] == [OTHER, UUID]
    bench.confirm(now=now + 100)
    renewed = bench.store.get(UUID)
    assert renewed and renewed.reservation_expires_at == now + 1000
    # Its reservation runs out, and Buildkite confirms it again.
    bench.clock.advance(5)
    bench.store.expire(["default"], now + 901)
    assert (bench.state(OTHER), bench.told(OTHER)["why"]) == ("reserving", "no_worker")
    bench.confirm(OTHER)
    assert bench.told(OTHER)["why"] == "frozen"


def test_allow_lets_a_job_pass_windows_that_hold_it_and_those_that_come(bench: Frost) -> None:
    bench.freeze(bench.window(-1, 3), bench.window(4, 9, name="later"))
    bench.make_ready(UUID)
    bench.make_ready(OTHER)
    bench.call("POST", f"/jobs/{UUID}/allow", {"note": "hotfix"}, {"X-Operator": "ann"})
    bench.wait(1)
    assert bench.told()["held_by"] is None
    bench.wait(3)
    assert (bench.told()["held_by"], bench.told(OTHER)["held_note"]) == (None, "later")
    assert [bench.claimed(), bench.claimed()] == [UUID, None]


def test_windows_that_overlap_or_adjoin_hold_without_a_moment_between_them(bench: Frost) -> None:
    bench.make_ready()
    bench.freeze(bench.window(1, 3, name="a"), bench.window(2, 4, name="b"), bench.window(4, 6, name="c"))
    notes = []
    for _ in range(5):
        bench.wait(1)
        assert bench.claimed() is None
        notes.append(bench.told()["held_note"])
    assert notes == ["a", "b", "b", "c", "c"]
    bench.wait(1)
    assert bench.claimed() == UUID


def test_windows_that_are_changed_hold_and_release_at_once(bench: Frost) -> None:
    bench.make_ready(UUID)
    bench.freeze(bench.window(-1, 99, name="old"))
    assert bench.told()["held_note"] == "old"
    bench.freeze(bench.window(-1, 99, name="new"))
    assert bench.told()["held_note"] == "new"
    bench.freeze(bench.window(-1, 99, name="of others", branches=("release/*",)))
    assert bench.told()["held_by"] is None
    bench.freeze(bench.window(-1, 99, name="of ours", branches=("m*",), pipelines=("demo",)))
    assert bench.told()["held_note"] == "of ours"
    bench.freeze()
    assert bench.claimed() == UUID


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_window_after_a_step_of_the_clock_is_what_the_clock_shows_now(bench: Frost, step: float) -> None:
    """Set forward beyond its end, or back before its begin; and back again."""
    bench.freeze(bench.window(-60, 60))
    bench.make_ready()
    bench.wait(step)
    assert bench.told()["held_by"] is None
    bench.wait(-step)
    assert (bench.told()["held_by"], bench.claimed()) == ("freeze", None)


def test_tick_while_another_leads_does_nothing_and_a_new_term_goes_through_the_line(bench: Frost) -> None:
    bench.make_ready()
    lead = Leadership(bench.store)
    bench.freezes._lead = lead
    lead.end()
    bench.freeze(bench.window(-1, 9))
    assert bench.tick() == scheduler.FOLLOWING_SECONDS
    assert bench.told()["held_by"] is None
    lead.begin(bench.store, 0.0)
    bench.tick()
    assert bench.told()["held_by"] == "freeze"


def test_tick_says_when_the_next_window_begins_or_ends_but_looks_at_the_clock_each_second(bench: Frost) -> None:
    bench.freeze(bench.window(0.25, 9))
    assert bench.tick() == pytest.approx(0.25, abs=1e-6)
    bench.wait(0.25)
    assert bench.tick() == 1.0
    bench.freeze()
    assert bench.tick() == scheduler.FOLLOWING_SECONDS


def test_worker_that_waits_gets_the_job_when_the_window_ends(bench: Frost) -> None:
    bench.freeze(bench.window(-1, 2))
    bench.make_ready()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(bench.connect().call, "GET", "/jobs?query=queue=default&wait=20")
        wait_until(bench.dispatcher.nameless)
        bench.wait(2)
        assert waiting.result(PATIENCE).json["uuid"] == UUID


def test_store_that_fails_while_the_line_is_gone_through_is_gone_through_again(
    bench: Frost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Job]:
        raise StoreUnavailable("no disk")

    bench.make_ready()
    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "freeze", broken)
        with pytest.raises(StoreUnavailable):
            bench.freeze(bench.window(-1, 9))
    bench.tick()
    assert bench.told()["held_by"] == "freeze"


def test_window_that_ends_releases_the_jobs_of_all_queues_in_turn(
    bench: Frost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 of one queue take a minute: those of others come between them."""
    bench.freeze(bench.window(-1, 2))
    queues = {f"018f0000-0000-4000-8000-00000000000{number}": "default" for number in range(3, 6)} | {OTHER: "other"}
    for uuid, queue in queues.items():
        raw: dict[str, Any] = {"id": uuid, "scheduled_at": None, "agent_query_rules": []}
        bench.store.put([Job.from_api(queue, raw, bench.clock.now())], bench.store.sequence(), bench.clock.now())
        bench.confirm(uuid)
    released: list[str] = []
    monkeypatch.setattr(scheduler, "SLICE", 1)
    monkeypatch.setattr(bench.store, "on_move", lambda move, now: released.append(queues[move.job.uuid]))
    bench.wait(2)
    assert released == ["default", "other", "default", "default"]


def test_freezes_are_told_with_their_times_and_how_many_jobs_each_holds(bench: Frost) -> None:
    weekly = window("Mon 08:00", "Mon 10:00", "UTC", "weekly", queues=("other",))
    bench.freeze(weekly, bench.window(-9, -1, name="over"), bench.window(-1, 9, name="now", branches=("main",)))
    for number in range(3):
        bench.make_ready(f"018f0000-0000-4000-8000-00000000000{number}")
    answer = bench.call("GET", "/freezes").json
    expected: dict[str, Any] = {
        "name": "now",
        "state": "in_force",
        "from": "2027-01-15T07:59:59.000Z",
        "until": "2027-01-15T08:00:09.000Z",
        "written": "2027-01-15 07:59:59 to 2027-01-15 08:00:09, UTC",
        "queues": [],
        "pipelines": [],
        "branches": ["main"],
        "jobs": 3,
    }
    assert answer["freezes"][0] == expected
    assert [(row["name"], row["state"], row["from"], row["jobs"]) for row in answer["freezes"][1:]] == [
        ("weekly", "next", "2027-01-18T08:00:00.000Z", 0),
        ("over", "over", None, 0),
    ]
    assert bench.call("GET", "/fleet").json["freezes"] == [expected]
    metrics = bench.call("GET", "/metrics").text.decode()
    assert 'stack_frozen_jobs{window="now"} 3.0\n' in metrics
    [ends] = re.findall(r'^stack_freeze_ends_timestamp_seconds\{window="now"\} (.+)$', metrics, re.MULTILINE)
    assert float(ends) == bench.clock.now() + 9
    assert "weekly" not in metrics and 'window="over"' not in metrics


def test_stats_of_a_rule_set_say_frozen_while_none_of_its_jobs_can_be_handed_out(bench: Frost) -> None:
    bench.freeze(bench.window(-1, 9))
    bench.make_ready()
    bench.claimed()
    [row] = bench.call("GET", "/stats").json["waiting"]
    assert (row["why"], row["jobs"]) == ("frozen", 1)
    bench.freeze()
    [row] = bench.call("GET", "/stats").json["waiting"]
    assert row["why"] != "frozen"


def test_build_page_of_a_frozen_job_names_the_window_and_its_end(
    bench: Frost, fake: FakeBuildkite, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
    notifier = Notifier(stack, bench.store, bench.dispatcher)
    told: list[tuple[str, str]] = []

    def notify(batch: list[tuple[str, str]]) -> dict[str, int]:
        told.extend(batch)
        return {}

    monkeypatch.setattr(stack, "notify", notify)
    bench.store.on_move = notifier.on_move
    bench.freeze(bench.window(-1, 900, name="no deploys"))
    bench.make_ready()
    bench.clock.advance(2)
    notifier.tick(bench.clock.now())
    text = "Waiting (frozen): freeze window 'no deploys' holds it until 2027-01-15T08:15:00.000Z"
    assert told == [(UUID, f"{text}; first of its rules in line.")]
    # One that has waited for long is told soon, too.
    bench.freeze()
    bench.clock.advance(1000)
    bench.freeze(bench.window(-1, 900, name="no more"))
    bench.clock.advance(2)
    notifier.tick(bench.clock.now())
    assert told[-1][1].startswith("Waiting (frozen): freeze window 'no more' holds it until 2027-01-15T08:31:42.000Z")


def hold_many(store: Store, count: int, by: str, now: float) -> None:
    """So many more jobs in line that a window holds, or that wait for the policy's word."""
    store.windows = FreezeWindows(lambda: now)
    if by == "freeze":
        store.windows.use((window("2026-01-01", "2028-01-01", branches=("release",)),))
    else:
        store.policy = lambda _: "a" * 12
    uuids = [f"018f0000-0000-4000-8000-{number:012}" for number in range(10**6, 10**6 + count)]
    about = {"agent_query_rules": ["n=0"], "build": {"branch": "release"}}
    store.put([Job.from_api("default", {"id": uuid, **about}, now) for uuid in uuids], store.sequence(), now)
    store.confirm(uuids, store.sequence(), now + 900, now)
    assert {job.held_by for job in store.page(JobState.READY, None, 10_000) if job.uuid in uuids} == (
        {by} if count else set()
    )


@pytest.mark.parametrize("by", ["freeze", "policy"])
def test_claim_beside_many_held_jobs_costs_what_it_costs_without(tmp_path: Path, clock: Clock, by: str) -> None:
    costs, now = {}, clock.now()
    for held in (0, 1000):
        with contextlib.closing(crowded(make_settings(tmp_path / str(held)), clock, 100, 1)) as store:
            hold_many(store, held, by, now)
            first = store.claim(MEASURED, now)
            assert first
            store.learn({first.uuid: JobFinding(Finding.ACQUIRED, "running")}, store.sequence(), now)
            costs[held] = cost_of_claim(store, MEASURED, now)
    assert costs[1000].steps == costs[0].steps
    assert len(costs[1000].statements) == len(costs[0].statements)


@pytest.mark.parametrize("by", ["freeze", "policy"])
def test_claim_in_redis_beside_many_held_jobs_costs_what_it_costs_without(
    tmp_path: Path, clock: Clock, by: str
) -> None:
    costs = {}
    for held in (0, 1000):
        settings = make_settings(tmp_path / str(held))
        with contextlib.closing(crowded_redis(the_redis().address, settings, clock, 10, 1)) as store:
            hold_many(store, held, by, clock.now())
            costs[held] = cost_in_redis(store, MEASURED, clock.now())
    assert costs[1000] == costs[0]


# --- The file of a scheduler ---


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    path = tmp_path / "stack.toml"
    path.write_text(WEEKEND)
    return path


def test_reload_of_a_bad_file_leaves_the_old_one_in_force_and_is_a_problem(
    store: Store, clock: Clock, settings: Callable[..., Settings], stack_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = settings(STACK_FILE=stack_file)
    freezes = Freezes(made, Leadership(store), scheduler.Dispatcher(store, clock.now), ["default"], clock.now)
    before, canonical = store.windows.freezes, freezes.canonical
    assert ([each.name for each in before], freezes.problems) == (["no deploys over the weekend"], [])
    stack_file.write_text(WEEKEND.replace("queues", "queue").replace("Mon 08:00", "8 am"))
    freezes.reload()
    assert (store.windows.freezes, freezes.canonical) == (before, canonical)
    assert [problem.partition(", ")[2] for problem in freezes.problems] == [
        "line 3: queue is not a key of [freeze]; the nearest is queues; the previous file is in force",
        "line 5: until is '8 am'; write it like \"Fri 16:00\", or without quotes 2026-12-23T18:00:00; "
        "the previous file is in force",
    ]
    assert "unreloaded" in caplog.text
    stack_file.unlink()
    freezes.reload()
    assert "No such file" in freezes.problems[0]
    stack_file.write_text("")
    freezes.reload()
    assert (store.windows.freezes, freezes.problems) == ((), [])


def test_settings_with_a_bad_file_are_refused_with_all_that_is_wrong(
    settings: Callable[..., Settings], stack_file: Path
) -> None:
    assert settings(STACK_FILE=stack_file).problems() == []
    stack_file.write_text(WEEKEND.replace("queues", "queue").replace("Mon", "Mo"))
    [problems] = settings(STACK_FILE=stack_file, LISTEN="127.0.0.1:0").problems()
    assert len(problems.splitlines()) == 2


# --- In real processes ---


class Winter(StackProcesses):
    """Schedulers with a STACK_FILE: one with SQLite, or two with Redis, of which the first leads."""

    @property
    def file(self) -> Path:
        return self.directory / "stack.toml"

    @property
    def is_shared(self) -> bool:
        return "REDIS_ADDR" in self.scheduler_settings

    def begin(self, text: str = "") -> Process:
        self.file.write_text(text)
        first = self.start_scheduler(STACK_FILE=str(self.file))
        if self.is_shared:
            first.wait_for_line("leading")
            self.start_scheduler(1, STACK_FILE=str(self.file)).wait_for_line("following")
        return first

    def reload(self, text: str) -> None:
        self.file.write_text(text)
        for process in self.schedulers.values():
            process.send_signal(signal.SIGHUP)

    def kill_leader(self) -> int:
        """The number of the scheduler that leads then."""
        self.schedulers[0].kill()
        self.schedulers[0].ended()
        if self.is_shared:
            self.schedulers[1].wait_for_line("leading")
            return 1
        self.start_scheduler(STACK_FILE=str(self.file))
        return 0

    def claimed(self, number: int = 0, wait: float = 0) -> str | None:
        """The uuid that a claim without a name gets."""
        asked = {"query": "queue=default", "wait": str(wait)}
        answer = requests.get(f"{self.urls[number]}/jobs", asked, timeout=wait + 20)
        assert answer.status_code in (200, 204), answer.text
        return str(answer.json()["uuid"]) if answer.status_code == 200 else None

    def is_frozen(self, uuid: str, number: int = 0) -> bool:
        answer = requests.get(f"{self.urls[number]}/jobs/{uuid}", timeout=10).json()
        return bool(answer.get("why") == "frozen")

    def problems(self, number: int = 0) -> list[str]:
        answer = requests.get(f"{self.urls[number]}/health", timeout=10)
        assert answer.status_code == 200  # claims are served
        return list(answer.json()["problems"])

    def has_problems(self, number: int, count: int) -> bool:
        return len(self.problems(number)) == count


@pytest.fixture(params=["sqlite", "redis"])
def stack(request: pytest.FixtureRequest, fake: FakeBuildkite, tmp_path: Path) -> Iterator[Winter]:
    redis = RedisServer(tmp_path, "--appendonly", "yes") if request.param == "redis" else None
    try:
        with Winter(
            fake, tmp_path, agent_path("fake"), **({"REDIS_ADDR": redis.address} if redis else {})
        ) as processes:
            yield processes
    finally:
        if redis:
            redis.stop()


def assert_at_the_end(ends_at: float, answered_at: float) -> None:
    """A job was handed out when its window ended: not earlier than our clock and that of Redis may differ, and within a
    second, and as much more as the machine of the tests may be busy."""
    assert -scheduler.CLOCK_SECONDS <= answered_at - ends_at < 10


only_sqlite = pytest.mark.parametrize("stack", ["sqlite"], indirect=True)
only_redis = pytest.mark.parametrize("stack", ["redis"], indirect=True)


def span_of(begins_at: float, ends_at: float, name: str = "now", more: str = "") -> str:
    """A [[freeze]] from one moment until another, to the millisecond."""
    edges = (datetime.datetime.fromtimestamp(at, datetime.UTC) for at in (begins_at, ends_at))
    begins, ends = (edge.replace(tzinfo=None).isoformat(timespec="milliseconds") for edge in edges)
    return f'[[freeze]]\nname = "{name}"\nfrom = {begins}\nuntil = {ends}\nzone = "UTC"\n{more}'


def test_window_of_some_seconds_holds_over_a_kill_and_hands_out_in_line_order_when_it_ends(
    stack: Winter, fake: FakeBuildkite
) -> None:
    first = stack.begin()
    early, low = fake.add_job(priority=1), fake.add_job(priority=0)
    for uuid in (early, low):
        first.wait_for_line("ready", uuid)
    begins_at, ends_at = time.time() + 1, time.time() + 16
    stack.reload(span_of(begins_at, ends_at))
    first.wait_for_line("frozen", low)
    assert time.time() >= begins_at and stack.claimed() is None
    number = stack.kill_leader()
    late = fake.add_job(priority=2)
    wait_until(lambda: all(stack.is_frozen(uuid, number) for uuid in (early, low, late)))
    assert stack.claimed(number) is None and time.time() < ends_at
    uuids = [stack.claimed(number, 30)]
    answered_at = time.time()
    uuids += [stack.claimed(number, 5) for _ in range(2)]
    assert uuids == [late, early, low]
    assert_at_the_end(ends_at, answered_at)
    assert stack.claimed(number) is None


def test_window_that_ends_hands_out_all_within_a_second_oldest_first(stack: Winter, fake: FakeBuildkite) -> None:
    stack.begin()
    oldest = time.time() - 60
    line = [fake.add_job(scheduled_at=oldest + number) for number in (2, 1, 0)][::-1]
    wait_until(lambda: all(stack.job(uuid).get("state") == "ready" for uuid in line))
    ends_at = time.time() + 5
    stack.reload(span_of(time.time() - 60, ends_at))
    wait_until(lambda: all(stack.is_frozen(uuid) for uuid in line))
    with ThreadPoolExecutor() as threads:
        waits = threads.submit(stack.claimed, 0, 30)
        plain = threads.submit(answer_took, stack.url, ends_at)
        uuids = [waits.result(), stack.claimed(), stack.claimed()]
        answered_at = time.time()
    assert uuids == line
    # By the clock of Redis, which may differ. The machine may be busy: then it answers everybody late.
    assert -scheduler.CLOCK_SECONDS <= answered_at - ends_at < 1.0 + plain.result()


def answer_took(url: str, begin_at: float) -> float:
    """Seconds from this moment on until the answer to a request that is made then."""
    threading.Event().wait(begin_at - time.time())
    requests.get(f"{url}/health", timeout=30)
    return time.time() - begin_at


@only_sqlite
def test_window_that_ends_does_not_ask_the_policy_again(stack: Winter, fake: FakeBuildkite) -> None:
    policy = stack.directory / "policy.py"
    policy.write_text(
        "def decide(job, fleet):\n"
        "    return hold('not yet', seconds=3600) if job.branch == 'held' else run(priority=-1)\n"
    )
    stack.scheduler_settings["POLICY_FILE"] = str(policy)
    stack.begin()
    decided, held = fake.add_job(), fake.add_job(branch="held")
    wait_until(lambda: all(stack.job(uuid).get("decision") for uuid in (decided, held)))
    decisions = [stack.job(uuid)["decision"] for uuid in (decided, held)]
    begins_at = time.time() - 60
    stack.reload(span_of(begins_at, time.time() + 600))
    late = fake.add_job()
    wait_until(lambda: all(stack.is_frozen(uuid) for uuid in (decided, held, late)))
    assert sorted(asked_about(fake)) == sorted([decided, held])
    stack.reload(span_of(begins_at, time.time() + 2))
    # The one that came meanwhile is asked about now, as nothing but the window has held it.
    assert {stack.claimed(wait=30), stack.claimed(wait=20)} == {decided, late}
    wait_until(lambda: not stack.is_frozen(held))
    assert stack.job(held)["why"] == "held_by_policy"
    assert [stack.job(uuid)["decision"] for uuid in (decided, held)] == decisions
    assert sorted(asked_about(fake)) == sorted([decided, held, late])


def asked_about(fake: FakeBuildkite) -> list[str]:
    """The jobs whose specs were asked for."""
    return [call.path.rpartition("/")[2] for call in fake.calls_to("get-job")]


@only_redis
def test_worker_that_waits_at_the_scheduler_that_follows_gets_the_job_when_the_window_ends(
    stack: Winter, fake: FakeBuildkite
) -> None:
    ends_at = time.time() + 8
    stack.begin(span_of(time.time() - 60, ends_at))
    uuid = fake.add_job()
    wait_until(lambda: stack.job(uuid).get("state") == "ready")
    assert stack.is_frozen(uuid, 1)
    assert stack.claimed(1, 30) == uuid
    assert_at_the_end(ends_at, time.time())


@only_redis
def test_schedulers_with_different_files_are_a_problem_at_both_until_these_are_equal(stack: Winter) -> None:
    first = stack.begin(WEEKEND)
    assert not [problem for number in (0, 1) for problem in stack.problems(number)]
    other = stack.directory / "other.toml"
    other.write_text(WEEKEND.replace("08:00", "09:00"))
    third = stack.start_scheduler(2, STACK_FILE=str(other))
    first.wait_for_line("disagreed", "setting=STACK_FILE")
    for number, count in ((0, 1), (2, 2)):
        wait_until(functools.partial(stack.has_problems, number, count))
        assert all("has another STACK_FILE (" in p and "uses its own" in p for p in stack.problems(number))
    other.write_text(f"# the same\n{WEEKEND}")
    third.send_signal(signal.SIGHUP)
    for number in (0, 1, 2):
        wait_until(functools.partial(stack.has_problems, number, 0))


@only_sqlite
def test_file_that_is_changed_holds_and_releases_at_once_and_a_bad_one_changes_nothing(
    stack: Winter, fake: FakeBuildkite
) -> None:
    stack.begin()
    uuid = fake.add_job(branch="main")
    wait_until(lambda: stack.job(uuid).get("state") == "ready")
    window = span_of(time.time() - 60, time.time() + 600, more='branches = ["main"]\n')
    stack.reload(window)
    wait_until(lambda: stack.is_frozen(uuid))
    stack.reload(window.replace("branches", "branchs").replace("UTC", "UTCC"))
    wait_until(stack.problems)
    assert [problem.partition(", ")[2].partition(";")[0] for problem in stack.problems()] == [
        "line 5: zone is 'UTCC', which is not a time zone",
        "line 6: branchs is not a key of [freeze]",
    ]
    assert stack.is_frozen(uuid) and stack.claimed() is None
    status = ask(stack, "status")
    assert status.returncode == scheduler.EXIT_WRONG
    told = " ".join(status.stdout.split())
    assert "branchs is not a key of [freeze]; the nearest is branches; the previous file is in force" in told
    assert "frozen: now until " in told and ", 1 job held" in told
    listed = ask(stack, "freezes").stdout.splitlines()
    assert re.fullmatch(r"now +in force +\S.* 1 +branches: main +\S.*, UTC", listed[1])
    why = ask(stack, "why", uuid).stdout
    assert "why: frozen: freeze window 'now' holds it until " in why
    stack.reload(window.replace("main", "release"))
    wait_until(lambda: stack.problems() == [])
    assert stack.claimed(wait=10) == uuid


def ask(stack: Winter, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command("scheduler.py"), *words, "--server", stack.url],
        env=stack.environment(),
        cwd=stack.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["start", "check"])
@only_sqlite
def test_start_or_check_with_a_bad_file_ends_with_78_and_tells_all(stack: Winter, arguments: tuple[str, ...]) -> None:
    stack.file.write_text(WEEKEND.replace("queues", "queue").replace("until", "til"))
    done = subprocess.run(
        [*command("scheduler.py"), *arguments],
        env=stack.environment(STACK_FILE="stack.toml", LISTEN="127.0.0.1:0"),
        cwd=stack.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert [line.partition(", ")[2] for line in done.stderr.splitlines() if "STACK_FILE" in line] == [
        "line 1: [freeze] has no until",
        "line 3: queue is not a key of [freeze]; the nearest is queues",
        "line 5: til is not a key of [freeze]; the nearest is until",
    ]


@only_sqlite
def test_check_with_a_window_in_the_past_warns_and_is_good(stack: Winter) -> None:
    stack.file.write_text(span_of(1e9, 1e9 + 60, name="long ago"))
    done = subprocess.run(
        [*command("scheduler.py"), "--check"],
        env=stack.environment(STACK_FILE="stack.toml", STACK_KEY="test", LISTEN="127.0.0.1:0"),
        cwd=stack.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "line 4: window 'long ago' ended at 2001-09-09 01:47:40 in UTC" in done.stderr


#: Runs scheduler.py with a wall clock that is off by what stands in a file.
OFF_CLOCK = """
import runpy, sys, time
true_time, path, script = time.time, sys.argv[1], sys.argv[2]
time.time = lambda: true_time() + float(open(path).read())
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""


class OffClock:
    """The wall clock of the schedulers that are started meanwhile."""

    def __init__(self, directory: Path):
        self.path = directory / "off-by"

    def set_to(self, now: float) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(repr(now - time.time()))
        new.replace(self.path)


@pytest.fixture
def off_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OffClock:
    clock = OffClock(tmp_path)
    run = [sys.executable, "-c", OFF_CLOCK, str(clock.path), str(ROOT / "scheduler.py")]
    monkeypatch.setattr(processes, "compiled", lambda script: run)
    return clock


@only_sqlite
def test_scheduler_whose_clock_is_set_follows_it_into_a_window_and_out_of_it(
    stack: Winter, fake: FakeBuildkite, off_clock: OffClock
) -> None:
    friday = at("2026-11-27T12:00:00")
    off_clock.set_to(friday)
    stack.begin(WEEKEND.replace('"deploy"', '"default"'))
    uuid = fake.add_job()
    wait_until(lambda: stack.job(uuid).get("state") == "ready")
    assert not stack.is_frozen(uuid)
    off_clock.set_to(friday + 5 * 3600)
    wait_until(lambda: stack.is_frozen(uuid))
    assert stack.claimed() is None
    off_clock.set_to(friday)
    wait_until(lambda: not stack.is_frozen(uuid))
    off_clock.set_to(friday + 5 * 3600)
    wait_until(lambda: stack.is_frozen(uuid))
    off_clock.set_to(at("2026-11-30T08:00:01"))
    assert stack.claimed(wait=20) == uuid


@only_sqlite
def test_window_ends_as_the_clock_of_its_zone_shows_its_end_for_the_last_time(
    stack: Winter, fake: FakeBuildkite, off_clock: OffClock
) -> None:
    """In Berlin it is 02:00 at AUTUMN for the second time; an hour before, as it was so first, the window went on."""
    text = WEEKEND.replace('"deploy"', '"default"').replace("Fri 16:00", "Sat 22:00").replace("Mon 08:00", "Sun 02:00")
    off_clock.set_to(AUTUMN - 10)
    stack.begin(text)
    uuid = fake.add_job()
    wait_until(lambda: stack.is_frozen(uuid))
    assert stack.job(uuid)["held_until"] == "2026-10-25T01:00:00.000Z"
    assert stack.claimed() is None
    assert stack.claimed(wait=20) == uuid
    shown = time.time() + float(off_clock.path.read_text())
    assert_at_the_end(AUTUMN, shown)
