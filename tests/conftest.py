"""Shared by several test files: a clock, settings, the stores, and an environment without our variables."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fakeredis
import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import scheduler  # noqa: E402
from fake_buildkite import FakeBuildkite  # noqa: E402
from processes import RedisServer  # noqa: E402

#: Whether to run all tests, and random ones as long as in CI; otherwise less, so that `make test` is short.
LONG_RUN = bool(os.environ.get("CI") or os.environ.get("LONG"))
#: Why a test is skipped at home.
TAKES_LONG = "takes long: it runs in CI, and with LONG=1"

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


#: Files with the longest tests. They begin early, after tests marked as long; begun last, one would run alone.
LONGEST = (
    "test_chaos.py",
    "test_bench.py",
    "test_openapi.py",
    "test_acts.py",
    "test_peers.py",
    "test_deaths.py",
    "test_periodic.py",
)

# A shell makes background commands ignore these signals, and all processes of the tests would inherit that.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in () if LONG_RUN else items:
        on_redis = not {"redis", "fakeredis"}.isdisjoint(map(str, getattr(item, "callspec", NO_CALL).params.values()))
        if item.get_closest_marker("long") or (on_redis and item.get_closest_marker("large")):
            item.add_marker(pytest.mark.skip(reason=TAKES_LONG))
    items.sort(key=turn)


def turn(item: pytest.Item) -> tuple[bool, int]:
    place = LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
    return item.get_closest_marker("long") is None, place


def pytest_collection_finish() -> None:
    # Thousands of test objects live as long as the process, so the garbage collector need not check them again.
    gc.collect()
    gc.freeze()


#: For a test that has no parameters.
NO_CALL = types.SimpleNamespace(params={})


class Spread(LoadScopeScheduling):  # type: ignore[misc]
    """Gives the processes of `pytest -n` single tests, but all tests of a file with expensive fixtures to one process.

    Such fixtures: a run of the bench; a browser with a scheduler; a scheduler for all verbs.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(("test_bench.py", "test_page.py", "test_verbs.py")) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Spread:
    return Spread(config, log)


@pytest.fixture(autouse=True)
def every_child_is_waited_for() -> Iterator[None]:
    """A child process that was not waited for fails the test that left it, not a later one."""
    yield
    left = []
    with suppress(ChildProcessError):  # this process has no children
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            left.append(ended.si_pid)
    assert left == []


#: Every route of every part.
ROUTES = [route for part in scheduler.Part.__subclasses__() if part.__module__ == "scheduler" for route in part.routes]


class Clock:
    """Unix time that stands still until a test moves it."""

    def __init__(self) -> None:
        self._now = 1_800_000_000.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_settings(directory: Path, **overrides: object) -> scheduler.Settings:
    """Settings as a user would write them: MAX_ATTEMPTS=2."""
    environ = {"BUILDKITE_AGENT_TOKEN": "test-token", "STACK_KEY": "test", "STATE_DIRECTORY": str(directory)}
    return scheduler.read_settings(
        scheduler.Settings, environ | {name: str(value) for name, value in overrides.items()}
    )


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., scheduler.Settings]:
    """make_settings() with a state directory of the test's own."""
    return lambda **overrides: make_settings(tmp_path / "state", **overrides)


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite() as buildkite:
        yield buildkite


class FakeRedis(fakeredis.FakeRedis):
    """fakeredis, plus the one command that it lacks."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[:2] == ("INFO", "server"):
            return {"run_id": "unknown"}  # as our scripts call a server that does not tell
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def fake_redis() -> Any:
    return FakeRedis(server=FAKE_SERVER, decode_responses=True)


FAKE_SERVER = fakeredis.FakeServer()


@functools.cache
def the_redis() -> RedisServer:
    """One real server for all tests that only need their own keys; it ends with the tests."""
    directory = tempfile.mkdtemp(prefix="redis-")
    atexit.register(shutil.rmtree, directory)
    server = RedisServer(Path(directory))
    atexit.register(server.stop)  # before its directory goes: the last one comes first
    return server


@functools.cache
def empty_store() -> Path:
    """The file of a SQLite store without jobs, closed. A copy of it is opened in a sixth of what a new store costs."""
    directory = Path(tempfile.mkdtemp(prefix="empty-store-"))
    atexit.register(shutil.rmtree, directory)
    scheduler.SqliteRows(str(directory)).close()
    return directory / "jobs.sqlite3"


def open_prepared_sqlite(settings: scheduler.Settings) -> scheduler.Store:
    """Like open_sqlite(), with a store that exists already."""
    directory = Path(settings.state_directory)
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True)
        shutil.copy(empty_store(), directory)
    return open_sqlite(settings)


def open_sqlite(settings: scheduler.Settings, job_type: type[scheduler.Job] = scheduler.Job) -> scheduler.Store:
    return scheduler.Store(scheduler.SqliteRows(settings.state_directory, job_type), settings)


def lead(
    settings: scheduler.Settings,
    address: str,
    connect: Callable[[Any], Any] = scheduler.connect_to_redis,
    job_type: type[scheduler.Job] = scheduler.Job,
) -> scheduler.Store:
    """A store in Redis, for the scheduler that leads. Equal state directories have equal prefixes."""
    redis_addr = scheduler.redis_address(f"{address}?prefix={settings.state_directory}:")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "connect_to_redis", connect)
        rows = scheduler.RedisRows(dataclasses.replace(settings, redis_addr=redis_addr), "the tests", job_type)
    beat = rows.heartbeat({})
    leader = scheduler.Store(rows.with_token(beat.token), settings)
    if not beat.trusted:
        leader.restart_leases(0.0, confirm=True)
    return leader


#: Opens a store, by its name. Equal settings open the same jobs.
STORES: dict[str, Callable[[scheduler.Settings], scheduler.Store]] = {
    "sqlite": open_prepared_sqlite,
    "fakeredis": lambda settings: lead(settings, "127.0.0.1:1", lambda _: fake_redis()),
    "redis": lambda settings: lead(settings, the_redis().address),
}

#: The Redis of the tests: the real one, which CI must have, or fakeredis on a machine without it.
REDIS = "redis" if os.environ.get("CI") or shutil.which("redis-server") else "fakeredis"
#: The stores with which the tests of `store` and `open_store` run.
STORE_NAMES = ("sqlite", REDIS)
#: For a test that does not reach the store, so that one store is enough.
sqlite_only = pytest.mark.parametrize("open_store", ["sqlite"], indirect=True)


@pytest.fixture(params=STORE_NAMES)
def open_store(
    request: pytest.FixtureRequest, settings: Callable[..., scheduler.Settings]
) -> Iterator[Callable[..., scheduler.Store]]:
    """A function that opens a store with the given settings; called again, it reopens the same store."""
    opened: list[scheduler.Store] = []

    def open_again(**overrides: object) -> scheduler.Store:
        while opened:
            opened.pop().close()
        opened.append(STORES[request.param](settings(**overrides)))
        return opened[0]

    yield open_again
    while opened:
        opened.pop().close()


@pytest.fixture
def store(open_store: Callable[..., scheduler.Store]) -> scheduler.Store:
    return open_store()


OUR_VARIABLES = {field.name.upper() for field in dataclasses.fields(scheduler.Settings)}
OUR_PREFIXES = ("BUILDKITE_", "STACK_", "WORKER_")
SYSTEMD_VARIABLES = ("CREDENTIALS_DIRECTORY", "JOURNAL_STREAM", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the user's own settings from the environment of the tests."""
    for name in os.environ:
        ours = name.startswith(OUR_PREFIXES) or name.removesuffix("_FILE") in OUR_VARIABLES
        if ours or name in SYSTEMD_VARIABLES:
            monkeypatch.delenv(name)
