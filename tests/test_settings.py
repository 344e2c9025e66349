"""Settings of the scheduler: read from everywhere they may come from, refused all at once, tried by --check."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import scheduler
import worker
from fake_buildkite import FakeBuildkite
from processes import ROOT, Process, RedisServer, compiled, free_port, program, python
from scheduler import Settings, SettingsError, read_settings

TOKEN = {"BUILDKITE_AGENT_TOKEN": "bkct_secret"}


def run(
    directory: Path, *arguments: str, script: str = "scheduler", **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*compiled(f"{script}.py"), *arguments],
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
        ("SCHEDULER_QUEUES", "default,ü", "'ü' is not a queue's key"),
        ("SCHEDULER_QUEUES", "a/b", "'a/b' is not a queue's key: Buildkite allows A-Z a-z 0-9 - _"),
        ("SCHEDULER_QUEUES", "../x", "'../x' is not a queue's key"),
        ("LISTEN", "18888", "is not host:port; write it like 127.0.0.1:18888"),
        ("LISTEN", "127.0.0.1:99999", "is not host:port"),
        ("BUILDKITE_AGENT_ENDPOINT", "agent.buildkite.com", "is not an http(s) URL"),
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
    for name in (
        "BUILDKITE_AGENT_TOKEN: is required",
        "POLL_INTERVAL: 'x'",
        "LISTEN: is not host:port",
        "MAX_ATTEMPTS: 'z'",
    ):
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


def test_read_queues_of_every_letter_that_buildkite_takes_keeps_them() -> None:
    settings = read_settings(Settings, TOKEN | {"SCHEDULER_QUEUES": "_default,Linux-arm64, a_1"})
    assert settings.scheduler_queues == ("_default", "Linux-arm64", "a_1")


def test_read_dotenv_of_the_working_directory_yields_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("STACK_KEY=from-file\nLOG_LEVEL=debug\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_LEVEL", "error")
    environ = scheduler.environment()
    assert (environ["STACK_KEY"], environ["LOG_LEVEL"]) == ("from-file", "error")


SCRIPTS = {"scheduler": scheduler, "worker": worker}
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.mark.parametrize(
    ("script", "name", "nearest"),
    [
        ("scheduler", "POLL_INTERVALL", "POLL_INTERVAL"),
        ("scheduler", "POLL_INTREVAL", "POLL_INTERVAL"),
        ("scheduler", "poll_interval", "POLL_INTERVAL"),
        ("scheduler", "SCHEDULER_QUEUE", "SCHEDULER_QUEUES"),
        ("scheduler", "SCHEDULER_POLL_INTERVAL", "POLL_INTERVAL"),
        ("scheduler", "STACK_TOKEN", "STACK_API_TOKEN"),
        ("scheduler", "STACK_API_TOKENS_FILE", "STACK_API_TOKEN_FILE"),
        ("scheduler", "AGENT_TOKEN", "BUILDKITE_AGENT_TOKEN"),
        ("scheduler", "BUILDKITE_AGENT_TOKN", "BUILDKITE_AGENT_TOKEN"),
        ("scheduler", "REDIS_ADDRESS", "REDIS_ADDR"),
        ("scheduler", "STATE_DIR", "STATE_DIRECTORY"),
        ("scheduler", "LISTENS", "LISTEN"),
        ("scheduler", "LOG_LEVEL_FILE", "LOG_LEVEL"),
        ("worker", "POLL_INTERVAL", "WORKER_POLL_INTERVAL"),
        ("worker", "WORKER_QUEUES", "WORKER_QUEUE"),
        ("worker", "WORKER_TAG", "WORKER_TAGS"),
        ("worker", "API_TOKEN", "STACK_API_TOKEN"),
        ("worker", "BUILDKITE_AGENTPATH", "BUILDKITE_AGENT_PATH"),
    ],
)
def test_find_a_name_that_is_nearly_a_setting_tells_the_nearest(script: str, name: str, nearest: str) -> None:
    module = SCRIPTS[script]
    told = module.unknown_settings(module.Settings, {name: "2s", "HOME": "/root"})
    assert told == [f"{name}: is not a setting of {script}.py and is ignored; the nearest is {nearest}"]


#: Variables of others: of a shell, of systemd, of a Buildkite agent and its jobs, of other programs.
FOREIGN = """_ A PATH HOME USER SHELL TERM LANG LC_ALL PWD SHLVL LOGNAME NAME TOKEN HOST HOSTNAME TZ DEBUG CI EDITOR
    LISTEN_PID LISTEN_FDS LISTEN_FDNAMES NOTIFY_SOCKET CREDENTIALS_DIRECTORY RUNTIME_DIRECTORY LOGS_DIRECTORY
    BUILDKITE BUILDKITE_AGENT_NAME BUILDKITE_AGENT_TAGS BUILDKITE_AGENT_PRIORITY BUILDKITE_BIN_PATH BUILDKITE_BUILD_ID
    BUILDKITE_BUILD_NUMBER BUILDKITE_HOOKS_PATH BUILDKITE_PLUGINS_PATH BUILDKITE_GIT_MIRRORS_PATH BUILDKITE_LOG_FORMAT
    HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy REDIS_URL RUST_LOG_LEVEL SSL_CERT_FILE GITHUB_TOKEN API_KEY""".split()


@every_script
def test_find_names_of_other_programs_and_of_a_shared_file_tells_nothing(script: str) -> None:
    module = SCRIPTS[script]
    example = module.read_file(str(ROOT / ".env.example"))
    assert len(example) > 40
    assert module.unknown_settings(module.Settings, example | dict.fromkeys(FOREIGN, "1")) == []


@every_script
def test_start_with_an_unknown_name_in_dotenv_tells_it(script: str, tmp_path: Path) -> None:
    # It ends for another reason, and says both.
    (tmp_path / ".env").write_text("POLL_INTERVALL=2s\nWORKER_WAITS=2s\nLOG_LEVEL=loud\n")
    ended = run(tmp_path, script=script, **TOKEN)
    assert ended.returncode == 78
    nearest = {"scheduler": "POLL_INTERVAL", "worker": "WORKER_WAIT"}[script]
    assert f"the nearest is {nearest}\n" in ended.stderr and "LOG_LEVEL: 'loud'" in ended.stderr


def test_check_with_an_unknown_name_and_all_else_good_tells_it_and_exits_0(tmp_path: Path, fake: FakeBuildkite) -> None:
    (tmp_path / ".env").write_text("POLL_INTERVALL=2s\n")
    ended = run(tmp_path, "--check", BUILDKITE_AGENT_TOKEN=fake.token, BUILDKITE_AGENT_ENDPOINT=fake.url)
    assert ended.returncode == 0
    assert "warning ignored" in ended.stderr and "the nearest is POLL_INTERVAL" in ended.stderr


@every_script
def test_start_with_an_unreadable_dotenv_names_it_and_exits_78(script: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"# caf\xe9\nLOG_LEVEL=debug\n")
    ended = run(tmp_path, script=script, **TOKEN)
    assert (ended.returncode, "Traceback" in ended.stderr) == (78, False)
    assert ".env cannot be read: 'utf-8' codec can't decode byte 0xe9" in ended.stderr


def test_read_a_file_that_is_a_directory_or_a_broken_link_says_so(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path, why in (tmp_path, "Is a directory"), (tmp_path / "link", "No such file"):
        with pytest.raises(SettingsError, match=f"{path} cannot be read: .*{why}"):
            scheduler.read_file(str(path))


@every_script
def test_read_secret_from_a_file_that_is_not_text_names_variable_and_file(script: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"caf\xe9")
    module = SCRIPTS[script]
    with pytest.raises(module.SettingsError) as caught:
        module.read_settings(module.Settings, TOKEN | {"STACK_API_TOKEN_FILE": str(tmp_path / "token")})
    assert str(caught.value).startswith(f"STACK_API_TOKEN: {tmp_path / 'token'} cannot be read: ")


#: A file of all that is read alike with and without python-dotenv, and what is in it.
PLAIN = "\ufeffA=1\n\n# B=2\nD='a b # c'\nE=\"x y\"  \nF=queue=default,os=linux \nG=\nH=-v --depth 1\r\nA=3\n"


@pytest.mark.parametrize("is_installed", [True, False])
def test_read_a_file_of_plain_lines_needs_no_dotenv(
    is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_installed:
        monkeypatch.setitem(sys.modules, "dotenv", None)
    (tmp_path / ".env").write_text(PLAIN)
    read = {"A": "3", "D": "a b # c", "E": "x y", "F": "queue=default,os=linux", "G": "", "H": "-v --depth 1"}
    assert worker.read_file(str(tmp_path / ".env")) == read
    assert worker.read_file(str(tmp_path / "none")) == {}


@pytest.mark.parametrize("line", ["export A=1", "A", "A: 1", "A=${HOME}", "A='1", 'A="a\\nb"', "A=1 # one", "A = 1"])
def test_read_a_file_of_other_lines_without_dotenv_is_refused_by_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dotenv", None)
    (tmp_path / ".env").write_text(f"B=1\n{line}\n")
    with pytest.raises(worker.SettingsError, match="line 2 needs python-dotenv: install it"):
        worker.read_file(str(tmp_path / ".env"))


def test_start_with_settings_that_do_not_count_names_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("https_proxy", raising=False)
    (tmp_path / "token").write_text("of-the-file")
    environ = TOKEN | {
        "STACK_API_TOKEN": "of-the-variable",
        "STACK_API_TOKEN_FILE": str(tmp_path / "token"),
        "REDIS_ADDR": "redis",
        "STACK_KEY": "s",
        "STATE_DIRECTORY": "/var/lib/x",
        "SETTINGS_FILE": str(tmp_path / "none"),
    }
    told = scheduler.ignored_settings(read_settings(Settings, environ), environ)
    assert [text.partition(":")[0] for text in told] == ["STACK_API_TOKEN", "STATE_DIRECTORY", "SETTINGS_FILE"]
    assert "STACK_API_TOKEN_FILE" in told[0] and "of-the" not in told[0]
    good = TOKEN | {"STACK_API_TOKEN": "of-the-file", "STACK_API_TOKEN_FILE": str(tmp_path / "token")}
    assert scheduler.ignored_settings(read_settings(Settings, good), good) == []
    in_file = TOKEN | {"https_proxy": "http://user:secret@proxy"}
    (told_of_proxy,) = scheduler.ignored_settings(read_settings(Settings, in_file), in_file)
    assert told_of_proxy == "https_proxy: is ignored in .env; set it in the environment of this process"
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy")
    assert scheduler.ignored_settings(read_settings(Settings, in_file), in_file) == []
    # Under systemd the directory is set for every service that has one.
    service = environ | {"INVOCATION_ID": "1"}
    assert len(scheduler.ignored_settings(read_settings(Settings, service), service)) == 2


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
    first = Process(compiled("scheduler.py"), settings, tmp_path, tmp_path / "log")
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


# Addresses

#: Addresses with a secret where none can be, and some that are none. "cr3t" stands for what must not be shown.
URLS = [
    *("http://user:cr3t@h/v3", "http://cr3t@h/v3", "https://:cr3t@h", "https://h/v3?token=cr3t", "https://h?cr3t"),
    *("https://h/v3#cr3t", "HTTPS://u:cr3t@h", "http://u:cr3t", "http://u:1/cr3t@h", "http://u:s3/cr3t@h:1"),
    *("http://u:cr3t\u2100@h", "http://[cr3t]/", "http://[cr3t", "http://h\\@cr3t/", "http://h:1:cr3t", "u:cr3t@h"),
    *("ftp://u:cr3t@h", "http://h /cr3t", "//u:cr3t@h", "http://u:cr3t@[::1:3", "cr3t", "http:cr3t", "http:///cr3t"),
    *("http://\u017fcr3t", "http://cr3t..h", "http://h:0/cr3t", "http://h:65536/cr3t", "http://h/cr3t\x1b[0m"),
]
PROXIES = [
    *("http://u:s3/cr3t@h:1", "http://u:s3?cr3t@h:1", "http://u:s3#cr3t@h:1", "http://u:cr3t@[::1:3", "u:cr3t"),
    *("http://u:cr3t@a..b:1", "http://u:cr3t@h:99999", "http://u:cr3t@", "ftp://u:cr3t@h", "http://u:cr3t@h?x"),
    *("http://u:1/cr3t@h", "http://u:^cr3t@h", "http://u:%zzcr3t@h", "http://u:s3 cr3t@h", "http://h?cr3t"),
    *("http://[cr3t]", "http://u:cr3t\u2100@h", "://u:cr3t@h", "http://u:[cr3t]@h"),
]
HOST_LISTS = ["http://u:cr3t@h", "h,u:cr3t@h", "cr3t@h", "h?cr3t", "h#cr3t", "//cr3t"]
LISTENS = [
    *("http://u:cr3t@127.0.0.1:1", "u:cr3t@127.0.0.1:1", "cr3t@127.0.0.1:1", "127.0.0.1:cr3t", "127.0.0.1:1/cr3t"),
    *("h:1?cr3t", "a..cr3t:1", "cr3t", "[cr3t]:1", "h:1#cr3t", "\u017fcr3t:1"),
]
WRONG = {
    "scheduler": {"BUILDKITE_AGENT_ENDPOINT": URLS, "LISTEN": LISTENS},
    "worker": {
        "BUILDKITE_AGENT_ENDPOINT": URLS,
        "WORKER_API_SERVER": [*URLS, *(f"http://h,{url}" for url in URLS), "http://h,"],
    },
}
PROXY_NAMES = [each for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for each in (name, name.lower())]
FOR_PROXIES = dict.fromkeys(PROXY_NAMES, PROXIES) | dict.fromkeys(("NO_PROXY", "no_proxy"), HOST_LISTS)


@pytest.mark.parametrize(
    ("script", "name", "texts"),
    [(script, name, texts) for script in WRONG for name, texts in (WRONG[script] | FOR_PROXIES).items()],
)
def test_read_an_address_with_a_secret_where_none_can_be_is_refused_without_showing_it(
    script: str, name: str, texts: list[str]
) -> None:
    module = SCRIPTS[script]
    for text in texts:
        with pytest.raises(module.SettingsError) as caught:
            module.read_settings(module.Settings, TOKEN | {name: text})
        [problem] = str(caught.value).splitlines()
        assert problem.startswith(f"{name}: is not ") and "cr3t" not in problem, text


@every_script
def test_read_a_good_address_takes_it(script: str) -> None:
    module = SCRIPTS[script]
    for text in ("http://h", "https://[::1]:1/v3/", "HTTPS://a_b.c-d.:65535/v3/x;y=%20", "http://[fe80::1%eth0]:1"):
        scheme, _, rest = text.partition("://")
        assert module.http_url(text) == f"{scheme.lower()}://{rest.rstrip('/')}"
    logins = ("", "u:p@", "u@", ":p@", "u:p@q:r@", "u:%2F%E2%82%AC@")
    schemes = ("", "http://", "https://", "HTTP://", "socks4://", "socks4a://", "socks5://", "socks5h://")
    for text in (f"{scheme}{login}proxy:3128" for scheme in schemes for login in logins):
        assert module.wrong_proxies(dict.fromkeys(PROXY_NAMES, text)) == [], text
        assert module.without_login(text) == text.rpartition("://")[0] + "://" * ("://" in text) + "proxy:3128"
    for text in ("*", "localhost,.b.example:80, 10.0.0.0/8,[::1],::1", ""):
        assert module.wrong_proxies({"NO_PROXY": text, "no_proxy": text, "HTTP_PROXY": ""}) == []


def test_read_a_good_listen_address_takes_it() -> None:
    for text in (":0", "0.0.0.0:1", "[::]:65535", ":::1", "[::ffff:127.0.0.1]:1", "localhost:80", "fe80::1%eth0:1"):
        host, _, port = text.rpartition(":")
        assert scheduler.host_and_port(text) == (host.strip("[]"), int(port))


@every_script
def test_log_a_traceback_shows_no_login_that_a_library_quotes(script: str) -> None:
    try:
        raise ValueError("cannot parse 'http://user:cr3t@proxy:3128', or u:cr3t@proxy")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    text = SCRIPTS[script].LogFormatter().format(record)
    assert "http://proxy:3128" in text and "cr3t" not in text


# Redis


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis:6379", "redis://redis:6379/0"),
        ("redis", "redis://redis:6379/0"),
        ("redis://secret@h", "redis://h:6379/0"),
        ("redis://u:p%40ss@h:1/3", "redis://h:1/3"),
        ("rediss://:secret@h/0?ssl_ca_certs=/ca.pem", "rediss://h:6379/0"),
        ("redis://[::1]:6380", "redis://[::1]:6380/0"),
        ("redis+sentinel://u:secret@a:26379,b:26380/main/2", "redis+sentinel://a:26379,b:26380/main/2"),
        ("redis+sentinel://a:26379/main", "redis+sentinel://a:26379/main/0"),
        ("rediss+sentinel://:secret@a/main", "rediss+sentinel://a:26379/main/0"),
        ("redis+sentinel://a/main?sentinel_username=u&sentinel_password=secret", "redis+sentinel://a:26379/main/0"),
    ],
)
def test_read_redis_address_is_shown_without_its_password(text: str, shown: str) -> None:
    settings = read_settings(Settings, TOKEN | {"REDIS_ADDR": text, "STACK_KEY": "s"})
    assert str(settings.redis_addr) == shown
    assert "secret" not in repr(settings.redis_addr) and "p@ss" not in repr(settings.redis_addr)


@pytest.mark.parametrize(
    "text",
    [
        "http://:secret@h",
        "redis://u:secret@a,b",
        "redis://:secret@h/main",
        "redis+sentinel://:secret@a:1",
        "redis://:secret@h:x",
        "redis://:secret@",
        "redis://:secret@h?database=1",
        "redis+sentinel://:secret@a/main/x",
        "redis://h?sentinel_password=secret",
        "redis://:secret@h?ssl_ca_certs=/ca.pem",
        "redis://:secret\u2100@h:x",
        "redis://:sec/ret:secret@h",
        "redis://:secret@h/0#secret",
        "redis://h?secret",
        "redis://u:12?secret@h",
        "redis://u:12/secret@h",
        "redis+sentinel://u:12/secret@h/0",
        "rediss://h?ssl_cert_reqs=secret",
        "redis://:secret@a..b",
        "redis://:secret@h:99999",
    ],
)
def test_read_redis_address_that_is_none_is_refused_without_showing_it(text: str) -> None:
    [problem] = problems_of(REDIS_ADDR=text)
    assert problem.startswith("REDIS_ADDR: ")
    assert "secret" not in problem


def test_read_redis_address_of_a_file_is_a_secret(tmp_path: Path) -> None:
    (tmp_path / "address").write_text("redis://:secret@h\n")
    settings = read_settings(Settings, TOKEN | {"REDIS_ADDR_FILE": str(tmp_path / "address"), "STACK_KEY": "s"})
    assert settings.redis_addr and settings.redis_addr.options["password"] == "secret"
    assert settings.problems() == []


def test_start_on_redis_without_stack_key_is_refused(tmp_path: Path) -> None:
    ended = run(tmp_path, REDIS_ADDR="127.0.0.1:1", **TOKEN)
    assert (ended.returncode, ended.stderr.count("\n")) == (78, 1)
    assert "STACK_KEY: is required with REDIS_ADDR" in ended.stderr


def test_start_without_the_redis_package_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "redis.py").write_text("raise ImportError")
    ended = run(tmp_path, REDIS_ADDR="127.0.0.1:1", STACK_KEY="s", PYTHONPATH=str(tmp_path), **TOKEN)
    assert ended.returncode == 78
    assert "pip install 'redis>=" in ended.stderr
    settings = {"STATE_DIRECTORY": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    assert "redis" not in run(tmp_path, "--check", **settings, **TOKEN).stderr


def test_start_on_redis_that_is_not_there_says_so_and_exits_74(tmp_path: Path) -> None:
    settings = {"REDIS_ADDR": f"redis://:secret@127.0.0.1:{free_port()}", "STACK_KEY": "s"}
    ended = run(tmp_path, **settings, **TOKEN)
    assert ended.returncode == 74
    assert "Connection refused" in ended.stderr and "redis-cli -u redis://127.0.0.1" in ended.stderr
    assert "secret" not in ended.stderr


def test_check_of_redis_tries_its_password_and_its_settings(tmp_path: Path, fake: FakeBuildkite) -> None:
    redis = RedisServer(tmp_path)
    redis.say("ACL", "SETUSER", "bob", "on", ">secret", "~s:*", "&s:*", "+@all")
    base = {"BUILDKITE_AGENT_TOKEN": fake.token, "BUILDKITE_AGENT_ENDPOINT": fake.url, "STACK_KEY": "s"}
    good = {"REDIS_ADDR": f"redis://bob:secret@{redis.address}/0?prefix=s:"} | base
    try:
        for command in ([], ["--check"]):
            wrong = run(tmp_path, *command, REDIS_ADDR=f"redis://bob:wrong@{redis.address}/0", **base)
            assert wrong.returncode == 78
            assert "REDIS_ADDR" in wrong.stderr and "wrong@" not in wrong.stderr
        ended = run(tmp_path, "--check", **good)
        assert ended.returncode == 0
        assert "appendonly is no" in ended.stderr
        redis.say("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
        ended = run(tmp_path, "--check", **good)
        assert ended.returncode == 78
        assert "maxmemory-policy is allkeys-lru" in ended.stderr
    finally:
        redis.stop()


def test_start_on_redis_over_tls_checks_its_certificate(tmp_path: Path, fake: FakeBuildkite) -> None:
    make_certificate(tmp_path)
    port = free_port()
    tls = {
        "tls-port": str(port),
        "tls-cert-file": "cert.pem",
        "tls-key-file": "key.pem",
        "tls-ca-cert-file": "cert.pem",
    }
    arguments = [word for name, text in tls.items() for word in (f"--{name}", text)]
    redis = RedisServer(tmp_path, *arguments, "--tls-auth-clients", "no")
    base = {"BUILDKITE_AGENT_TOKEN": fake.token, "BUILDKITE_AGENT_ENDPOINT": fake.url, "STACK_KEY": "s"}

    def check(host: str, query: str) -> tuple[int, bool]:
        ended = run(tmp_path, "--check", REDIS_ADDR=f"rediss://{host}:{port}/0{query}", **base)
        return ended.returncode, "certificate verify failed" in ended.stderr

    try:
        assert check("127.0.0.1", "?ssl_ca_certs=cert.pem") == (0, False)
        assert check("127.0.0.1", "") == (78, True)
        # Another's name: not that of the certificate.
        assert check("localhost", "?ssl_ca_certs=cert.pem") == (78, True)
        assert check("localhost", "?ssl_ca_certs=cert.pem&ssl_check_hostname=no") == (0, False)
        assert check("localhost", "?ssl_cert_reqs=none") == (0, False)
    finally:
        redis.stop()


def make_certificate(directory: Path) -> None:
    command = [
        program("openssl"),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=60)


def help_with(version: str) -> subprocess.CompletedProcess[str]:
    command = [python(version), str(ROOT / "scheduler.py"), "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_start_with_python_3_10_says_in_one_line_what_it_needs_and_exits_78() -> None:
    ended = help_with("3.10")
    assert ended.returncode == 78
    assert re.fullmatch(r"scheduler\.py needs Python 3\.11 or newer; this is 3\.10\.\d+, \S+\n", ended.stderr)


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9"])
def test_start_with_a_python_that_cannot_read_it_shows_what_it_needs(version: str) -> None:
    ended = help_with(version)
    assert ended.returncode == 1  # Python's own: of the file nothing has run
    assert 'match "scheduler.py needs Python 3.11 or newer"' in ended.stderr


def test_start_without_the_packages_says_which_and_how_to_install_them() -> None:
    bare = [sys.executable, "-I", "-S", str(ROOT / "scheduler.py"), "--check"]  # sees the standard library alone
    ended = subprocess.run(bare, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 78
    assert "scheduler.py needs prometheus_client: pip install -r requirements.txt" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", [f.name.upper() for f in dataclasses.fields(Settings) if f.metadata["secret"]])
def test_environment_of_an_agent_has_no_secret_of_a_scheduler_that_shares_it(name: str) -> None:
    environ = {"BUILDKITE_AGENT_TOKEN": "for-the-agent", name: "a-secret", f"{name}_FILE": "/etc/stack/secret"}
    settings = worker.read_settings(worker.Settings, {})
    made = worker.agent_environment(settings, environ, "job-token")
    assert not {"a-secret", "/etc/stack/secret"} & set(made.values())
    assert made["BUILDKITE_AGENT_TOKEN"] == "job-token"


# --- What works, and lets somebody in ---


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user of this host can enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def unsafe(script: str, environ: dict[str, str]) -> list[str]:
    if script == "worker":
        return worker.unsafe(worker.read_settings(worker.Settings, environ), environ)
    return scheduler.unsafe(read_settings(Settings, TOKEN | environ), environ)


SECRET_FILES = [
    ("scheduler", "BUILDKITE_AGENT_TOKEN_FILE"),
    ("scheduler", "STACK_API_TOKEN_FILE"),
    ("scheduler", "WEBHOOK_TOKEN_FILE"),
    ("scheduler", "REDIS_ADDR_FILE"),
    ("scheduler", "TLS_KEY"),
    ("worker", "BUILDKITE_AGENT_TOKEN_FILE"),
    ("worker", "STACK_API_TOKEN_FILE"),
    ("worker", "WORKER_TLS_KEY"),
]


@pytest.mark.parametrize(("script", "name"), SECRET_FILES)
def test_read_secret_from_a_file_that_everybody_can_read_is_told(public: Path, script: str, name: str) -> None:
    file = public / "secret"
    file.write_text("localhost")
    environ = {name: str(file)}
    told = f"{name}: every user of this host can read the secret in {file}; chmod 600 it"
    assert unsafe(script, environ) == [told]
    file.chmod(0o640)
    assert unsafe(script, environ) == []


@pytest.mark.parametrize("script", ["scheduler", "worker"])
def test_read_secret_from_a_file_in_a_directory_that_others_cannot_enter_is_not_told(public: Path, script: str) -> None:
    file = public / "private" / "secret"
    file.parent.mkdir(mode=0o700)
    file.write_text("secret")
    assert unsafe(script, {"STACK_API_TOKEN_FILE": str(file)}) == []
    (public / "link").symlink_to(file)
    assert unsafe(script, {"STACK_API_TOKEN_FILE": str(public / "link")}) == []


@pytest.mark.parametrize("script", ["scheduler", "worker"])
def test_read_secret_from_an_env_file_that_everybody_can_read_is_told(
    public: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(public)
    (public / ".env").write_text("STACK_API_TOKEN=secret\n")
    assert unsafe(script, {"STACK_API_TOKEN": "secret"}) == [
        ".env: every user of this host can read the secret in .env; chmod 600 it"
    ]
    # What is of the environment is not of the file.
    monkeypatch.setenv("STACK_API_TOKEN", "secret")
    assert unsafe(script, {"STACK_API_TOKEN": "secret"}) == []


UNSAFE_ADDRESSES = [
    (
        "scheduler",
        "BUILDKITE_AGENT_ENDPOINT",
        "http://buildkite.example/v3",
        "the token crosses the network unencrypted",
    ),
    ("scheduler", "BUILDKITE_AGENT_ENDPOINT", "https://buildkite.example/v3", ""),
    ("scheduler", "BUILDKITE_AGENT_ENDPOINT", "http://127.0.0.1:18080/v3", ""),
    ("scheduler", "REDIS_ADDR", "redis:6379", "cross the network unencrypted, to redis"),
    ("scheduler", "REDIS_ADDR", "redis://:password@10.0.0.1", "cross the network unencrypted, to 10.0.0.1"),
    ("scheduler", "REDIS_ADDR", "redis+sentinel://127.0.0.1,s2/primary", "cross the network unencrypted, to s2"),
    ("scheduler", "REDIS_ADDR", "redis://[::1]:6379", ""),
    ("scheduler", "REDIS_ADDR", "rediss://redis", ""),
    ("scheduler", "REDIS_ADDR", "rediss://redis?ssl_cert_reqs=none", "can pose as Redis"),
    ("scheduler", "REDIS_ADDR", "rediss://redis?ssl_check_hostname=no", "can pose as Redis"),
    ("worker", "WORKER_API_SERVER", "http://localhost,http://b:18888", "cross the network unencrypted, to b"),
    ("worker", "WORKER_API_SERVER", "https://b", ""),
    ("worker", "WORKER_API_SERVER", "http://127.0.0.1:18888,http://[::1],http://127.1.2.3", ""),
    ("worker", "WORKER_API_SERVER", "http://127.0.0.1.example", "cross the network unencrypted, to 127.0.0.1.example"),
    ("worker", "BUILDKITE_AGENT_ENDPOINT", "HTTP://agent.example/v3", "cross the network unencrypted, to agent"),
    ("worker", "BUILDKITE_AGENT_ENDPOINT", "https://agent.example/v3", ""),
]


@pytest.mark.parametrize(("script", "name", "address", "told"), UNSAFE_ADDRESSES)
def test_read_address_that_lets_others_listen_is_told(script: str, name: str, address: str, told: str) -> None:
    found = unsafe(script, {name: address, "STACK_KEY": "s"})
    assert len(found) == bool(told)
    assert all(text.startswith(f"{name}: ") and told in text and "password@" not in text for text in found)


def test_read_address_of_redis_whose_key_everybody_can_read_is_told(public: Path) -> None:
    (public / "key").touch()
    [told] = unsafe("scheduler", {"REDIS_ADDR": f"rediss://redis?ssl_keyfile={public}/key", "STACK_KEY": "s"})
    assert told == f"REDIS_ADDR: every user of this host can read the secret in {public}/key; chmod 600 it"


@pytest.mark.parametrize("arguments", [["--check"], []], ids=str)
@pytest.mark.parametrize("script", ["scheduler", "worker"])
def test_start_or_check_with_an_open_secret_warns_of_it(
    public: Path, fake: FakeBuildkite, script: str, arguments: list[str]
) -> None:
    (public / "token").write_text(fake.token)
    settings = {
        "BUILDKITE_AGENT_TOKEN_FILE": str(public / "token"),
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "LISTEN": "127.0.0.1:0",
    }
    with Process([*compiled(f"{script}.py"), *arguments], settings, public, public / "log") as process:
        process.wait_for_line("unsafe", "BUILDKITE_AGENT_TOKEN_FILE: every user of this host can read")
        process.kill()
        process.ended()  # its log is read to the end before the pipe is closed
