"""Freeze windows and the file that they stand in: read, exact in time, kept by the stores, and in real processes."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scheduler
from processes import ROOT
from scheduler import Freeze, Frozen, Job, SettingsError, Span

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


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"])
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
"""
    assert problems_of(text) == [
        "line 1: organisation is no key; the nearest is organization",
        "line 5: queus is no key of [freeze]; the nearest is queues",
        "line 6: from is 'Fri 25:00'; write it like \"Fri 16:00\", or without quotes 2026-12-23T18:00:00",
        "line 8: zone is 'Europe/Berln', which is no time zone; the nearest is 'Europe/Berlin'",
        "line 10: [freeze] has no name",
        "line 11: branches is 5; it is a text of 1 to 200 letters that can be printed",
        'line 15: pipelines is []; it is a list like ["deploy", "app-*"]; leave it out for all',
        "line 16: from is 2026-12-23 18:00:00+00:00; write it without an offset: it is a time of `zone`",
        'line 17: until is 5; write it like "Fri 16:00", or without quotes 2026-12-23T18:00:00',
        "line 18: zone is 'Europe', which is no time zone; the nearest is 'Europe/Rome'",
        "line 20: [freeze] has no from",
        "line 20: [freeze] has no until",
        "line 20: [freeze] has no zone",
        "line 22: more is no key of [freeze]; the nearest is zone",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("freeze = 5\n", "line 1: freeze is not written as [[freeze]]"),
        ("\n[freeze]\n", "line 2: freeze is not written as [[freeze]]"),
        ("freeze = [1]\n", "line 1: freeze is not written as [[freeze]]"),
        ('[monitor]\nqueue = "x"\n', "line 1: monitor is no key; the nearest is organization"),
        ('organization = ""\n', "line 1: organization is ''; it is a text of 1 to 200 letters that can be printed"),
        (f"{WEEKEND}\n{WEEKEND}", "line 9: name is 'no deploys over the weekend', as of another window"),
        (WEEKEND.replace("08:00", "24:00"), "line 5: until is 'Mon 24:00'; write it like"),
        (WEEKEND.replace("Mon 08:00", "Fri 16:00"), "line 5: until is Fri 16:00, and so is `from`: the window never"),
        (WEEKEND.replace('"Mon 08:00"', "2026-12-01"), "line 5: until is 2026-12-01 00:00:00 and `from` is Fri 16:00"),
        (WEEKEND.replace('until = "Mon 08:00"\n', ""), "line 1: [freeze] has no until"),
        (WEEKEND.replace('"Fri 16:00"', "1969-12-31"), "line 4: from is 1969-12-31; its year may be 1970 to 9000"),
        (WEEKEND.replace('"Fri 16:00"', '"Fre 16:00"'), "line 4: from is 'Fre 16:00'; write it like"),
        (WEEKEND.replace("Europe/Berlin", "../../etc/passwd"), "line 6: zone is '../../etc/passwd', which is no time"),
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
    assert problems_of(days) == ["line 8: window 'weekend', together with others of the same jobs, never ends"]
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
        "2025-12-27 06:00:00 in Europe/Berlin: it holds nothing any more",
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
class Monitor:
    """A table as a later scheduler may have it."""

    token: str = scheduler.key(scheduler.a_text, name="api-token-file")
    queue: str = scheduler.key(scheduler.a_text, "default")

    def problems(self) -> list[tuple[str, str]]:
        return [("queue", "is taken")] if self.queue == "taken" else []


@dataclasses.dataclass(frozen=True, slots=True)
class LaterFile(scheduler.StackFile):
    monitor: Monitor | None = scheduler.table(Monitor)


def test_read_file_with_a_new_table_needs_one_class_and_one_line(
    read: Callable[..., scheduler.ReadFile], problems_of: Callable[..., list[str]]
) -> None:
    text = f'{WEEKEND}[monitor]\napi-token-file = "/t"\n'
    assert read(text, cls=LaterFile).tables.monitor == Monitor("/t", "default")
    assert read(WEEKEND, cls=LaterFile).tables.monitor is None
    assert problems_of(f'{text}queue = "taken"\napi_token = ""\n', cls=LaterFile) == [
        "line 10: api_token is no key of [monitor]; the nearest is api-token-file"
    ]
    assert problems_of(f'{text}queue = "taken"\n', cls=LaterFile) == ["line 9: queue is taken"]
    assert problems_of("[[monitor]]\n", cls=LaterFile) == ["line 1: monitor is not written as [monitor]"]


def test_read_zone_on_a_system_without_zones_takes_those_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("tzdata")
    path = write(tmp_path / "stack.toml", WEEKEND)
    code = f"import scheduler as s; print(s.read_stack_file({path!r}, 0.0).tables.freeze[0].zone)"
    env = {"PYTHONPATH": str(ROOT), "PYTHONTZPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("Europe/Berlin\n", "")
