"""Settings of the scheduler: read from everywhere they may come from, refused all at once, tried by --check."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scheduler
from fake_buildkite import FakeBuildkite
from processes import ROOT, Process, command, free_port
from scheduler import Settings, SettingsError, read_settings

TOKEN = {"BUILDKITE_AGENT_TOKEN": "bkct_secret"}


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite() as buildkite:
        yield buildkite


def run(directory: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scheduler.py"), *arguments],
        env={"PATH": os.environ["PATH"], **settings},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def problems_of(**settings: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read_settings(Settings, TOKEN | settings)
    return str(caught.value).splitlines()


def test_read_settings_with_a_token_takes_every_default() -> None:
    settings = read_settings(Settings, TOKEN)
    assert settings.scheduler_queues == ("default",)
    assert settings.listen == ("127.0.0.1", 18888)
    assert (settings.poll_interval, settings.reservation_seconds, settings.lease_seconds) == (1.0, 900, 30)
    assert settings.problems() == []


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("POLL_INTERVAL", "1", "'1' is not a duration; write it like 500ms, 2s, 5m or 1h"),
        ("POLL_INTERVAL", "100ms", "'100ms' is out of range; it may be 200ms to 60s"),
        ("SCHEDULER_QUEUES", "a,,a", "'a,,a' must name each queue once; write it like default,linux"),
        ("SCHEDULER_QUEUES", ",", "',' must name each queue once"),
        ("LISTEN", "18888", "'18888' is not host:port"),
        ("LISTEN", "127.0.0.1:99999", "'127.0.0.1:99999' is not host:port"),
        ("BUILDKITE_AGENT_ENDPOINT", "agent.buildkite.com", "is not an http or https URL"),
        ("RESERVATION_SECONDS", "3601", "'3601' is out of range; it may be 60 to 3600"),
        ("LEASE_SECONDS", "half", "'half' is not a whole number"),
        ("MAX_ATTEMPTS", "0", "'0' is out of range; it may be 1 to 100"),
        ("LOG_LEVEL", "loud", "'loud' is not a log level"),
    ],
)
def test_read_settings_with_a_bad_value_names_variable_value_and_range(name: str, text: str, hint: str) -> None:
    (problem,) = problems_of(**{name: text})
    assert problem.startswith(f"{name}: ")
    assert hint in problem


def test_start_with_several_problems_reports_all_and_exits_78(tmp_path: Path) -> None:
    ended = run(tmp_path, POLL_INTERVAL="x", LISTEN="y", MAX_ATTEMPTS="z")
    assert ended.returncode == 78
    for name in ("BUILDKITE_AGENT_TOKEN: is required", "POLL_INTERVAL: 'x'", "LISTEN: 'y'", "MAX_ATTEMPTS: 'z'"):
        assert name in ended.stderr
    assert not (tmp_path / "state").exists()


def test_start_with_unknown_argument_says_so_and_exits_64(tmp_path: Path) -> None:
    ended = run(tmp_path, "--verbose")
    assert ended.returncode == 64
    assert "--verbose" in ended.stderr


def test_read_secret_from_file_or_credential_takes_it_over_the_environment(tmp_path: Path) -> None:
    (tmp_path / "BUILDKITE_AGENT_TOKEN").write_text("bkct_credential\n")
    (tmp_path / "file").write_text("bkct_file\n")
    credential = TOKEN | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert read_settings(Settings, credential).buildkite_agent_token == "bkct_credential"
    both = credential | {"BUILDKITE_AGENT_TOKEN_FILE": str(tmp_path / "file")}
    assert read_settings(Settings, both).buildkite_agent_token == "bkct_file"


def test_read_secret_from_missing_file_names_it(tmp_path: Path) -> None:
    (problem,) = problems_of(STACK_API_TOKEN_FILE=str(tmp_path / "none"))
    assert problem.startswith("STACK_API_TOKEN: ")
    assert str(tmp_path / "none") in problem


@pytest.mark.parametrize(
    ("listen", "token", "refused"),
    [
        (":18888", "", True),
        ("0.0.0.0:18888", "", True),
        ("10.0.0.1:18888", "", True),
        ("127.0.0.1:18888", "", False),
        ("localhost:18888", "", False),
        ("[::1]:18888", "", False),
        (":18888", "secret", False),
    ],
)
def test_listen_beyond_loopback_without_api_token_is_refused(listen: str, token: str, refused: bool) -> None:
    found = read_settings(Settings, TOKEN | {"LISTEN": listen, "STACK_API_TOKEN": token}).problems()
    assert bool(found) == refused
    assert all("STACK_API_TOKEN" in problem and "openssl rand" in problem for problem in found)


@pytest.mark.parametrize(
    ("stack_key", "queue", "expected"),
    [
        ("ci", "default", "ci-default"),
        ("ci", "linux.arm 64", "ci-linux-arm-64"),
        ("ci", "_default", "ci-_default"),
        ("k" * 40, "q" * 39, "k" * 40 + "-" + "q" * 39),
    ],
)
def test_name_stack_of_a_queue_uses_only_letters_that_buildkite_allows(
    stack_key: str, queue: str, expected: str
) -> None:
    assert read_settings(Settings, TOKEN | {"STACK_KEY": stack_key}).stack_key_of(queue) == expected


def test_name_stack_over_80_bytes_cuts_it_and_keeps_it_distinct() -> None:
    settings = read_settings(Settings, TOKEN | {"STACK_KEY": "k" * 60})
    names = {settings.stack_key_of("q" * 30 + end) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) == 80 for name in names)


def test_name_stacks_of_two_queues_alike_is_refused() -> None:
    settings = read_settings(Settings, TOKEN | {"SCHEDULER_QUEUES": "a.b,a-b", "STACK_KEY": "ci"})
    assert ["ci-a-b" in problem for problem in settings.problems()] == [True]


def test_read_dotenv_of_the_working_directory_yields_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("STACK_KEY=from-file\nLOG_LEVEL=debug\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_LEVEL", "error")
    environ = scheduler.environment()
    assert (environ["STACK_KEY"], environ["LOG_LEVEL"]) == ("from-file", "error")


def test_check_with_good_settings_exits_0_and_registers_nothing_twice(tmp_path: Path, fake: FakeBuildkite) -> None:
    ended = run(tmp_path, "--check", BUILDKITE_AGENT_TOKEN=fake.token, BUILDKITE_AGENT_ENDPOINT=fake.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(fake.calls_to("register")) == 1


def test_check_with_wrong_token_names_it_and_exits_78_without_showing_it(tmp_path: Path, fake: FakeBuildkite) -> None:
    ended = run(tmp_path, "--check", BUILDKITE_AGENT_TOKEN="bkct_wrong", BUILDKITE_AGENT_ENDPOINT=fake.url)
    assert ended.returncode == 78
    assert "401" in ended.stderr
    assert "bkct_wrong" not in ended.stderr


def test_start_with_wrong_token_says_which_and_exits_78(tmp_path: Path, fake: FakeBuildkite) -> None:
    settings = {"BUILDKITE_AGENT_ENDPOINT": fake.url, "LISTEN": f"127.0.0.1:{free_port()}"}
    ended = run(tmp_path, BUILDKITE_AGENT_TOKEN="bkct_wrong", **settings)
    assert ended.returncode == 78
    assert "BUILDKITE_AGENT_TOKEN: Buildkite refuses it" in ended.stderr
    assert "bkct_wrong" not in ended.stderr


def test_start_second_scheduler_on_the_same_store_is_refused_and_the_first_goes_on(
    tmp_path: Path, fake: FakeBuildkite
) -> None:
    settings = {
        "PATH": os.environ["PATH"],
        "BUILDKITE_AGENT_TOKEN": fake.token,
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "LISTEN": f"127.0.0.1:{free_port()}",
        "STACK_KEY": "first",
    }
    first = Process(command("scheduler.py"), settings, tmp_path, tmp_path / "log")
    try:
        first.wait_for_line("started")
        second = run(tmp_path, **(settings | {"LISTEN": f"127.0.0.1:{free_port()}"}))
        assert second.returncode == 75
        assert "another scheduler has" in second.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        assert first.ended() == 0
    assert fake.calls_to("deregister")


def test_start_on_a_taken_port_says_which_and_exits_with_failure(tmp_path: Path, fake: FakeBuildkite) -> None:
    busy = fake.url.removeprefix("http://").partition("/")[0]
    ended = run(tmp_path, BUILDKITE_AGENT_TOKEN=fake.token, BUILDKITE_AGENT_ENDPOINT=fake.url, LISTEN=busy)
    assert ended.returncode not in (0, 78)
    assert busy in ended.stderr
