"""The operators' commands: what they ask of a scheduler, what they say, and what they end with."""

from __future__ import annotations

import http.server
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
import requests

import scheduler
from fake_buildkite import FakeBuildkite
from processes import ROOT, StackProcesses, agent_path, compiled, program, wait_until
from test_desk import set_clock

__all__ = ["set_clock"]  # a fixture

JOB = "018f0000-0000-4000-8000-000000000001"
OTHER = "018f0000-0000-4000-8000-000000000002"
#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0


def hold(target: str, **more: Any) -> dict[str, Any]:
    """As the scheduler tells of one: set at 14:02 of today, as the clock of this machine shows it."""
    since = time.strftime("%Y-%m-%dT14:02:00%z")
    told = {"target": target, "owner": "operator", "reason": "paused", "by": "ann@build1", "note": "disk swap"}
    return told | {"since": since, "until": None} | more


def worker(name: str, host: str = "build1", state: str = "idle", **more: Any) -> dict[str, Any]:
    told = {"name": name, "host": host, "state": state, "since": time.strftime("%Y-%m-%dT13:00:00%z"), "reason": ""}
    offer = {"job": None, "tags": "arch=amd64,os=linux", "queues": ["_default", "default"], "holds": [], "by": ""}
    agent = {"version": "1.0.0", "agent": "3.137.0", "agent_supported_until": "2027-09-03", "last_seen_at": None}
    return told | offer | agent | {"claims": 0, "jobs_done": 0} | more


def job(
    uuid: str = JOB, why: str | None = "workers_busy", text: str = "all matching workers are busy: 3", **more: Any
) -> Any:
    told = {"uuid": uuid, "queue_key": "default", "agent_query_rules": ["queue=default", "os=linux"], "priority": 0}
    place = {"place": 1, "wait_seconds": 90.0, "why": why, "why_text": text, "reason": "reserved"}
    return told | place | {"state": "ready", "scheduled_at": "2026-11-21T07:41:00.000Z", "worker": None} | more


def waiting(jobs: int = 1, why: str = "workers_busy", **more: Any) -> dict[str, Any]:
    """What /stats tells of the jobs of one rule set."""
    told = {"rules": "queue=default,os=linux", "jobs": jobs, "oldest_wait_seconds": 90.0, "why": why}
    return told | {"why_text": "all matching workers are busy: 3", "by": None, "uuid": OTHER} | more


def fleet(*workers: dict[str, Any], jobs: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
    names = dict.fromkeys(each["host"] for each in workers)
    hosts = [
        {"host": name, "machines": 1, "holds": [], "workers": [each for each in workers if each["host"] == name]}
        for name in names
    ]
    queue = {"queue": "default", "waiting": len(jobs), "ready": len(jobs), "reserving": 0, "leased": 0, "running": 1}
    queue |= {"oldest_wait_seconds": 90.0 if jobs else None, "holds": [], "workers": len(workers)}
    counts = {"waiting": len(jobs), "oldest_wait_seconds": queue["oldest_wait_seconds"], "running": 1, "leased": 0}
    told = {"now": "2026-11-21T07:41:00Z", "problems": [], "counts": counts | {"workers": {}}, "queues": [queue]}
    told |= {"hosts": hosts, "jobs": [*jobs], "stuck": [], "holds": [], "acts": []} | more
    return told | {"wrong": [*told["problems"], *scheduler.fleet_problems(told)]}


class FakeDesk(http.server.ThreadingHTTPServer):
    """Answers as the scheduler does; a context manager. Of several answers of a route the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        #: Method, path with its query, body and headers of each request.
        self.calls: list[tuple[str, Any, dict[str, str]]] = []

    def answer(self, route: str, *bodies: Any, status: int = 200) -> None:
        self.answers[route] = [(status, body) for body in bodies]

    def asked(self, start: str) -> list[Any]:
        """The bodies that came to the routes that begin so."""
        return [body for route, body, _ in self.calls if route.startswith(start)]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeDesk

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        route = f"{self.command} {self.path}"
        self.server.calls.append((route, json.loads(body) if body else None, dict(self.headers)))
        answers = self.server.answers.get(route) or self.server.answers.get(route.partition("?")[0])
        refusal = {"error": "not_found", "message": f"there is no {self.path!r} here"}
        status, answer = (answers.pop(0) if len(answers) > 1 else answers[0]) if answers else (404, refusal)
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def desk() -> Iterator[FakeDesk]:
    with FakeDesk() as server:
        yield server


#: What a command ended with, and what it wrote to standard output and error.
Ran = tuple[int, str, str]


@pytest.fixture
def run(
    desk: FakeDesk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Ran]:
    """Runs a command against the fake desk, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPERATOR_TOKEN", "secret")
    monkeypatch.setenv("SUDO_USER", "ann")
    monkeypatch.setattr(scheduler, "WATCH_SECONDS", 0.001)

    def ran(*words: str, server: str = "") -> Ran:
        status = scheduler.command([*words, "--server", server or desk.url])
        out, err = capsys.readouterr()
        return status, out, err

    return ran


# --- Who asks, and whom ---


def test_ask_presents_the_operators_token_and_who_it_is(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /fleet", fleet())
    assert run("workers")[0] == 0
    headers = desk.calls[0][2]
    assert headers["Authorization"] == "Bearer secret"
    assert headers["X-Operator"] == f"ann@{socket.gethostname().partition('.')[0]}"


@pytest.mark.parametrize(
    ("name", "text"),
    [("OPERATOR_TOKEN_FILE", "of-a-file\n"), ("VIEWER_TOKEN_FILE", "of-a-file"), (".env", "of-a-file")],
)
def test_ask_reads_the_token_as_every_secret_is_read(
    name: str, text: str, desk: FakeDesk, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OPERATOR_TOKEN")
    (tmp_path / "token").write_text(text)
    if name == ".env":
        (tmp_path / ".env").write_text(f"OPERATOR_TOKEN={text}\n")
    else:
        monkeypatch.setenv(name, str(tmp_path / "token"))
    desk.answer("GET /fleet", fleet())
    assert run("jobs")[0] == 0
    assert desk.calls[0][2]["Authorization"] == "Bearer of-a-file"


def test_ask_without_a_token_presents_none_and_with_two_the_operators(
    desk: FakeDesk, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.answer("GET /fleet", fleet())
    monkeypatch.setenv("VIEWER_TOKEN", "looks")
    run("workers")
    monkeypatch.delenv("OPERATOR_TOKEN")
    run("workers")
    monkeypatch.delenv("VIEWER_TOKEN")
    run("workers")
    assert [headers.get("Authorization") for _, _, headers in desk.calls] == ["Bearer secret", "Bearer looks", None]


@pytest.mark.parametrize(
    ("environ", "server"),
    [
        ({}, "http://127.0.0.1:18888"),
        ({"LISTEN": ":19000"}, "http://127.0.0.1:19000"),
        ({"LISTEN": "[::]:19000"}, "http://[::1]:19000"),
        ({"LISTEN": "10.0.0.1:80", "TLS_CERT": "tls.crt"}, "https://10.0.0.1:80"),
    ],
)
def test_find_the_server_without_an_option_takes_the_address_of_listen(environ: dict[str, str], server: str) -> None:
    assert scheduler.server_of({}, environ) == server
    assert scheduler.server_of({"--server": "http://a:1/"}, environ) == "http://a:1"


def test_ask_a_server_that_is_not_there_says_where_and_ends_with_1(run: Callable[..., Ran]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, out, err = run("workers", server=f"http://127.0.0.1:{port}")
    assert (status, out) == (1, "")
    assert f"no scheduler answers at http://127.0.0.1:{port}: " in err and "--server" in err


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, {"error": "unauthorized", "message": "no"}, "no; a command presents OPERATOR_TOKEN"),
        (403, {"error": "operators_only", "message": "set OPERATOR_TOKEN there"}, "set OPERATOR_TOKEN there"),
        (404, {"error": "not_found", "message": "nothing here"}, "is the scheduler older than this command?"),
        (503, {"error": "stopping", "message": "it stops"}, "it stops"),
        (200, b"<html>", "200 from http://127.0.0.1:"),
        (200, b"[]", "200 from http://127.0.0.1:"),
    ],
)
def test_ask_what_is_refused_tells_the_words_of_the_scheduler(
    status: int, body: Any, told: str, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer("GET /fleet", body, status=status)
    ended, out, err = run("workers")
    assert (ended, out) == (1, "")
    assert told in err
    assert "secret" not in err


def test_ask_with_json_tells_a_refusal_as_json(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /fleet", {"error": "unauthorized", "message": "no"}, status=401)
    status, out, err = run("workers", "-o", "json")
    assert (status, json.loads(out)["error"], "workers: no" in err) == (1, "unauthorized", True)


def test_ask_over_tls_knows_this_machines_scheduler_by_its_certificate_alone(
    desk: FakeDesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tls", "other"):
        made = ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt"]
        words = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2", *made]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    desk.socket = context.wrap_socket(desk.socket, server_side=True)
    desk.answer("GET /fleet", fleet(worker("w1")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LISTEN", f"127.0.0.1:{desk.server_port}")
    monkeypatch.setenv("TLS_CERT", "tls.crt")
    assert scheduler.command(["workers"]) == 0
    assert "w1" in capsys.readouterr().out
    monkeypatch.setenv("TLS_CERT", "other.crt")
    assert scheduler.command(["workers"]) == 1
    assert "certificate verify failed" in capsys.readouterr().err
    # Of another machine the name counts too.
    monkeypatch.setenv("WORKER_CA_FILE", "tls.crt")
    assert scheduler.command(["workers", "--server", f"https://127.0.0.1:{desk.server_port}"]) == 1
    assert "certificate verify failed" in capsys.readouterr().err
    monkeypatch.setenv("TLS_CERT", "none.crt")
    assert scheduler.command(["workers"]) == 78
    assert "TLS_CERT, TLS_KEY: " in capsys.readouterr().err


# --- What it was asked ---


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stauts"], "there is no command 'stauts'; the nearest: status"),
        (["workers", "--wyh"], "there is no option --wyh; the nearest: --why"),
        (["workers", "w1"], "'w1' is too much"),
        (["why"], "name a job | worker | host:NAME"),
        (["why", "a", "b"], "is given twice"),
        (["pause", "w1"], "--note is missing: the reason"),
        (["pause", "w1", "--note"], "--note is empty"),
        (["pause", "w1", "--note", ""], "--note is empty"),
        (["pause", "", "--note", "x"], "what it is about is empty"),
        (["pause", "w1", "--note", "x", "--for", "2 hours"], "--for: '2 hours' is not a duration"),
        (["pause", "w1", "--note", "x", "--replace=1"], "--replace takes no value"),
        (["jobs", "--state", "lost"], "--state lost: it may be reserving, ready"),
        (["jobs", "-o", "yaml"], "-o yaml: it may be json"),
        (["jobs", "--server", "build1"], "--server: is not an http(s) URL"),
    ],
)
def test_parse_what_is_wrong_names_it_and_ends_with_64(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scheduler.command(words) == scheduler.EXIT_USAGE
    out, err = capsys.readouterr()
    assert (out, told in err) == ("", True), err


def test_parse_options_in_any_order_and_form_reads_the_same() -> None:
    usage = scheduler.COMMANDS["pause"].usage
    wanted = {"": "tag:gpu=a100", "--note": "-5 °C", "--for": "2h", "-o": "json"}
    assert scheduler.parse(["tag:gpu=a100", "--note", "-5 °C", "--for", "2h", "-o", "json"], usage) == wanted
    assert scheduler.parse(["--for=2h", "-o=json", "--note=-5 °C", "tag:gpu=a100"], usage) == wanted


@pytest.mark.parametrize("name", scheduler.COMMANDS)
def test_help_of_a_command_shows_its_options_and_asks_nobody(
    name: str, run: Callable[..., Ran], desk: FakeDesk
) -> None:
    status, out, _ = run(name, "--help")
    assert (status, desk.calls) == (0, [])
    assert out.startswith(f"usage: scheduler.py {name} ") and "[-o json]" in out


def test_run_with_settings_that_cannot_be_read_ends_with_78(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPERATOR_TOKEN_FILE", "/nonexistent/token")
    status, _, err = run("workers")
    assert (status, "/nonexistent/token cannot be read" in err) == (78, True)


@pytest.mark.parametrize(("name", "text"), [("LISTEN", "18888"), ("OPERATOR_TOKEN", "a b"), ("VIEWER_TOKEN", ",")])
def test_run_with_a_setting_that_is_wrong_names_it_and_ends_with_78(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, text)
    assert scheduler.command(["workers"]) == 78
    err = capsys.readouterr().err
    assert err.startswith(f"scheduler.py workers: {name}: ") and "a b" not in err


# --- To look ---


def test_status_of_a_fleet_that_is_well_ends_with_0(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /fleet", fleet(worker("w1"), worker("w2", state="working", job=JOB), jobs=[job(OTHER)]))
    status, out, _ = run("status")
    assert status == 0
    assert out.splitlines()[0] == "fine: 1 waiting, the oldest for 1 min; 0 leased, 1 running"
    assert re.search(r"^default +1 +1 +1 min +2 +-$", out, re.MULTILINE)
    assert re.search(r"^build1 +2 +1 idle, 1 working +-$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("told", "first"),
    [
        (
            fleet(problems=["queue linux: 401 from Buildkite; renew the token"]),
            "wrong: queue linux: 401 from Buildkite",
        ),
        (
            fleet(worker("w1", state="failing", reason="its agent ended")),
            "wrong: see `why w1`: 1 worker is failing since",
        ),
        (
            fleet(stuck=[waiting(5000, "no_worker", why_text="none has gpu=*", uuid=JOB)]),
            f"wrong: see `why {JOB}`: 5000 jobs cannot run:",
        ),
    ],
    ids=["problem", "failing", "no worker"],
)
def test_status_of_what_is_wrong_says_first_what_to_do_and_ends_with_2(
    told: dict[str, Any], first: str, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer("GET /fleet", told)
    status, out, _ = run("status")
    assert (status, out.startswith(first)) == (2, True), out
    status, out, _ = run("status", "-o", "json")
    assert (status, len(json.loads(out)["wrong"])) == (2, 1)


@pytest.mark.parametrize(
    ("until", "start", "expected"),
    [
        ("2026-11-20", "wrong: upgrade buildkite-agent 3.116.0 of 2 workers, like w1: its support", 2),
        ("2026-11-21", "soon: upgrade buildkite-agent 3.116.0 of 2 workers, like w1: its support", 0),
        ("2027-01-20", "soon: upgrade", 0),
        ("2027-01-21", "fine: 0 waiting", 0),
        (None, "fine: 0 waiting", 0),
    ],
)
def test_status_of_an_agent_whose_support_ends_says_so_60_days_ahead_and_calls_it_wrong_afterwards(
    until: str | None, start: str, expected: int, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    old: dict[str, Any] = {"agent": "3.116.0", "agent_supported_until": until}
    desk.answer("GET /fleet", fleet(worker("w1", **old), worker("w2", **old), worker("w3")))
    status, out, _ = run("status")
    assert (status, out.startswith(start)) == (expected, True), out


def test_status_without_a_scheduler_is_wrong(run: Callable[..., Ran]) -> None:
    status, out, _ = run("status", server="http://127.0.0.1:1")
    assert (status, out.startswith("wrong: no scheduler answers at http://127.0.0.1:1: ")) == (2, True)
    status, out, _ = run("status", "-o", "json", server="http://127.0.0.1:1")
    assert (status, "no scheduler answers" in json.loads(out)["message"]) == (2, True)


def test_status_of_many_hosts_shows_those_first_that_are_not_as_usual(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    workers = [worker(f"w{n:02}", host=f"build{n:02}") for n in range(30)]
    workers[17]["state"] = "away"
    desk.answer("GET /fleet", fleet(*workers, holds=[hold("host:rack3-*")]))
    status, out, _ = run("status")
    rows = out.partition("HOST ")[2].splitlines()
    assert (status, rows[1].split()[0]) == (0, "build17")
    assert "and 20 hosts more: `workers` shows all" in out
    assert "held: host:rack3-* paused by ann@build1 since 14:02: disk swap" in out
    assert len(out.splitlines()) < 24


def test_list_workers_tells_state_since_job_agent_and_who_made_it_so(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    paused = worker("w1", state="paused", holds=[hold("host:build1")])
    desk.answer("GET /fleet", fleet(paused, worker("w2", host="build2", state="working", job=JOB)))
    status, out, _ = run("workers")
    header, first, second = out.splitlines()
    assert (status, header.split()) == (0, ["WORKER", "HOST", "STATE", "SINCE", "AGENT", "JOB", "WHY"])
    assert re.split("  +", first) == [
        *("w1", "build1", "paused", "13:00", "3.137.0", "-"),
        "host:build1 paused by ann@build1 since 14:02: disk swap",
    ]
    assert JOB in second
    assert [each["name"] for each in json.loads(run("workers", "-o", "json")[1])["workers"]] == ["w1", "w2"]


def test_list_workers_with_why_tells_what_each_can_run_and_why_it_has_nothing(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    workers = [
        worker("w1", state="paused", holds=[hold("worker:w1", until=time.strftime("%Y-%m-%dT16:02:00%z"))]),
        worker("w2", state="working", job=JOB),
        worker("w3", state="away", last_seen_at=time.strftime("%Y-%m-%dT11:11:00%z")),
        worker("w4", tags="os=windows"),
        worker("w5"),
        worker("w6", state="failing", reason="its last agent ended"),
    ]
    desk.answer("GET /fleet", fleet(*workers, jobs=[job(OTHER)]))
    desk.answer("GET /stats", {"waiting": [waiting()]})
    out = run("workers", "--why")[1]
    assert re.findall("why: (.*)", out) == [
        "worker:w1 paused by ann@build1 since 14:02 until 16:02: disk swap",
        f"it has job {JOB}",
        "it does not claim; last seen 11:11",
        "it can run none of the 1 job in line",
        f"1 job in line would match; the first, {OTHER}: workers_busy: all matching workers are busy: 3",
        "its last agent ended",
    ]
    assert "can run: jobs of queue _default, default, with os=windows" in out
    assert "  worker.py: 1.0.0\n  agent: 3.137.0, supported until 2027-09-03\n" in out


def test_why_of_a_worker_whose_jobs_stand_behind_those_of_others_counts_them(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    others = [job(agent_query_rules=["queue=default", "os=mac"]) for _ in range(3)]
    desk.answer("GET /fleet", fleet(worker("w1"), worker("w2", tags="os=windows"), jobs=others))
    desk.answer("GET /stats", {"waiting": [waiting(7000, rules="queue=default,os=mac"), waiting(2), waiting(1)]})
    text = f"3 jobs in line would match, none of them among the first 3; the oldest, {OTHER}: workers_busy: all"
    assert text in run("why", "w1")[1]
    assert "why: it can run none of the 7003 jobs in line\n" in run("why", "w2")[1]
    (told,) = json.loads(run("why", "w1", "-o", "json")[1])["workers"]
    assert (told["could_run"], told["could_run_jobs"]) == ([], 3)


def test_list_jobs_tells_place_wait_and_reason(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    told = fleet(jobs=[job(), job(OTHER, why="no_worker", text="none has gpu=*", place=2, wait_seconds=7500.0)])
    told["counts"]["waiting"] = 300
    desk.answer("GET /fleet", told)
    status, out, _ = run("jobs")
    rows = [re.split("  +", line) for line in out.splitlines()]
    assert (status, rows[0]) == (0, ["PLACE", "JOB", "QUEUE", "WAIT", "WHY"])
    assert rows[1] == ["1", JOB, "default", "1 min", "workers_busy: all matching workers are busy: 3"]
    assert rows[2] == ["2", OTHER, "default", "2 h 5 min", "no_worker: none has gpu=*"]
    assert rows[3] == ["These are the first 2 of 300; --state ready shows all ready jobs."]


def test_list_jobs_of_a_queue_reads_every_page_and_keeps_what_the_fleet_tells(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    bare = {name: value for name, value in job(OTHER).items() if name not in ("place", "why", "why_text")}
    desk.answer("GET /fleet", fleet(jobs=[job()]))
    pages = [{"jobs": [job(why=None)], "next": None}, {"jobs": [bare], "next": "0:1:x"}]
    desk.answer("GET /queue", *reversed(pages), {"jobs": [], "next": None})
    out = run("jobs", "--queue", "default")[1]
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["1", JOB], ["-", OTHER]]
    asked = [urllib.parse.parse_qs(route.partition("?")[2]) for route, _, _ in desk.calls if "/queue" in route]
    assert [each["state"] for each in asked] == [["ready"], ["ready"], ["reserving"]]
    assert asked[1] == {"state": ["ready"], "limit": ["1000"], "queue": ["default"], "after": ["0:1:x"]}


def test_list_jobs_of_a_queue_that_is_not_there_names_the_nearest(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /fleet", fleet())
    desk.answer("GET /queue", {"jobs": [], "next": None})
    assert run("jobs", "--queue", "default")[0] == 0
    status, out, err = run("jobs", "--queue", "defualt")
    assert (status, out, err) == (1, "", "jobs: there is no queue 'defualt'; the nearest: default\n")
    # One of earlier settings may have jobs all the same.
    desk.answer("GET /queue", {"jobs": [job(queue_key="old", state="done")], "next": None})
    assert run("jobs", "--queue", "old", "--state", "done")[0] == 0


def test_list_jobs_that_run_tells_since_when_and_on_which_worker(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    running = job(state="running", worker="w1", acquired_at=time.strftime("%Y-%m-%dT12:12:00%z"), why=None)
    desk.answer("GET /fleet", fleet())
    desk.answer("GET /queue", {"jobs": [running], "next": None})
    rows = [re.split("  +", line) for line in run("jobs", "--state", "running")[1].splitlines()]
    assert rows == [["JOB", "QUEUE", "SINCE", "WORKER", "LAST WORD"], [JOB, "default", "12:12", "w1", "reserved"]]


def test_why_of_a_job_tells_who_could_run_it_and_why_they_do_not(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    stop = {
        "at": time.strftime("%Y-%m-%dT15:00:00%z"),
        "by": "ann@build1",
        "note": "wrong branch",
        "message": "w1 is gone",
    }
    desk.answer(
        f"GET /jobs/{JOB}", job(ahead=2, stop=stop, story=[{"at": "2026-11-21T07:41:00Z", "what": "scheduled"}])
    )
    workers = [worker("w1", state="working", job=OTHER), worker("w2", tags="os=windows"), worker("w3", queues=["gpu"])]
    desk.answer("GET /fleet", fleet(*workers))
    status, out, _ = run("why", JOB.upper())
    assert status == 0
    assert "why: workers_busy: all matching workers are busy: 3" in out and "ahead of it, with the same rules: 2" in out
    assert "stop: said by ann@build1 at 15:00: wrong branch; w1 is gone" in out
    assert re.search(rf"^w1 .*{OTHER}", out, re.MULTILINE) and "w2" not in out and "w3" not in out
    assert "scheduled" in out.splitlines()[-1]
    told = json.loads(run("why", JOB, "-o", "json")[1])
    assert [each["name"] for each in told["could_run"]] == ["w1"]


def test_why_of_a_job_that_no_worker_matches_tells_what_each_lacks(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer(
        f"GET /jobs/{JOB}", job(agent_query_rules=["os=linux", "gpu=*"], why="no_worker", text="none has gpu=*")
    )
    desk.answer("GET /fleet", fleet(worker("w1", tags=""), worker("w2"), worker("w3", queues=["gpu"])))
    out = run("why", JOB)[1]
    assert re.findall("not (.*)", out) == ["w2: it has no gpu=*", "w1: it has no os=linux, gpu=*"]


def test_why_of_a_host_tells_of_its_workers_and_of_two_machines(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    told = fleet(worker("w1"), worker("w2", host="build2"))
    told["hosts"][0]["machines"] = 2
    desk.answer("GET /fleet", told)
    desk.answer("GET /stats", {"waiting": []})
    status, out, _ = run("why", "host:build1")
    assert status == 0
    assert out.startswith("host build1 is the name of 2 machines") and "w1 on build1: idle since 13:00" in out
    assert "w2" not in out and "w2 on build2" in run("why", "w2")[1]


@pytest.mark.parametrize("name", ["biuld1-1", "host:biuld1", "worker:build1-2"])
def test_why_of_what_is_not_there_names_the_nearest(name: str, desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /fleet", fleet(worker("build1-1")))
    status, _, err = run("why", name)
    assert (status, "; the nearest: build1" in err) == (1, True)


# --- To act ---


def held(target: str, *, already: bool = False, **more: Any) -> dict[str, Any]:
    bound = {"workers": 4, "hosts": 1, "queues": 0, "jobs": 12}
    return {"hold": hold(target, **more), "already": already, "binds": bound, "message": ""}


def test_pause_says_who_what_binds_and_until_when(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("worker:w1", until=time.strftime("%Y-%m-%dT16:02:00%z")))
    status, out, _ = run("pause", "w1", "--note", "disk swap", "--for", "2h", "--replace")
    assert status == 0
    assert out.splitlines() == [
        "worker:w1: paused by ann@build1 since 14:02 until 16:02: disk swap",
        "  it holds 4 workers, 1 host, 12 jobs now, and later ones that match",
    ]
    assert desk.asked("POST /holds") == [
        {"target": "worker:w1", "note": "disk swap", "reason": "paused", "seconds": 7200.0, "replace": True}
    ]


def test_pause_what_is_paused_says_so_and_is_done(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("host:rack3-1", already=True))
    status, out, _ = run("pause", "host:rack3-1", "--note", "again")
    assert status == 0
    assert out.startswith("host:rack3-1: already paused by ann@build1 since 14:02: disk swap\n")


def test_pause_dry_tells_the_scheduler_so(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("tag:gpu=a100"))
    status, out, _ = run("pause", "tag:gpu=a100", "--note", "x", "--dry-run", "-o", "json")
    assert (status, json.loads(out)["hold"]["target"]) == (0, "tag:gpu=a100")
    assert desk.asked("POST /holds")[0]["dry_run"] is True
    assert run("pause", "tag:gpu=a100", "--note", "x", "--dry-run")[1].startswith("tag:gpu=a100: would be paused by")


def test_pause_what_matches_nothing_names_the_nearest(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    refusal = {
        "error": "no_match",
        "message": "nothing here is host:rack3",
        "nearest": ["host:rack3-1", "host:rack3-2"],
    }
    desk.answer("POST /holds", refusal, status=404)
    status, _, err = run("pause", "host:rack3", "--note", "x")
    assert (status, err) == (1, "pause: nothing here is host:rack3; the nearest: host:rack3-1, host:rack3-2\n")


@pytest.mark.parametrize("target", ["host:", "tag:gpu"])
def test_pause_what_is_no_target_asks_nobody(target: str, desk: FakeDesk, run: Callable[..., Ran]) -> None:
    assert run("pause", target, "--note", "x")[0] == 1
    assert desk.calls == []


def drained(*workers: dict[str, Any], target: str = "host:build1") -> dict[str, Any]:
    """A fleet where the target is drained, and these workers are bound by that."""
    bound = [each | {"holds": [hold(target, reason="drained")]} for each in workers]
    return fleet(*bound, holds=[hold(target, reason="drained")])


def test_drain_ends_when_the_last_job_has_ended(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    busy, other = worker("w1", job=JOB), worker("w2", job=OTHER)
    desk.answer("POST /holds", held("host:build1", reason="drained"))
    overviews = [fleet(worker("w1"), worker("w2"))]  # of before the hold: it proves nothing
    overviews += [drained(busy, other), drained(busy, other), drained(busy, worker("w2")), drained(worker("w1"))]
    desk.answer("GET /fleet", *overviews)
    status, out, _ = run("drain", "host:build1", "--note", "disk swap")
    assert status == 0
    assert [line.strip() for line in out.splitlines()[2:]] == [
        f"2 jobs left: {JOB} on w1, {OTHER} on w2",
        f"1 job left: {JOB} on w1",
        "host:build1: drained, no job is leased or running there; it gets no jobs until: resume host:build1",
    ]
    assert desk.asked("POST /holds")[0]["reason"] == "drained"
    assert len(desk.asked("GET /fleet")) == 5


@pytest.mark.parametrize("cancel", [[], ["--cancel"]], ids=["left alone", "cancelled"])
def test_drain_at_its_deadline_says_what_is_left_and_ends_with_1(
    cancel: list[str], desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer("POST /holds", held("worker:w1", reason="drained"))
    desk.answer("GET /fleet", drained(worker("w1", job=JOB), target="worker:w1"))
    desk.answer(f"POST /jobs/{JOB}/stop", {"uuid": JOB, "state": "running", "message": "w1 was told to cancel it"})
    status, out, err = run("drain", "w1", "--note", "disk swap", "--deadline", "5ms", *cancel)
    assert (status, err) == (1, f"drain: worker:w1: the deadline is over; 1 job left: {JOB} on w1\n")
    assert (f"job {JOB}: w1 was told to cancel it" in out) is bool(cancel)
    assert desk.asked(f"POST /jobs/{JOB}/stop") == [{"note": "disk swap"}] * len(cancel)


def test_drain_with_json_tells_at_the_end_what_is_left(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("worker:w1", reason="drained"))
    desk.answer("GET /fleet", drained(worker("w1", job=JOB), target="worker:w1"))
    status, out, _ = run("drain", "w1", "--note", "x", "--deadline", "5ms", "-o", "json")
    told = json.loads(out)
    assert (status, told["drained"], [each["name"] for each in told["left"]]) == (1, False, ["w1"])


def test_drain_that_is_detached_does_not_watch(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("worker:w1", reason="drained"))
    assert run("drain", "w1", "--note", "x", "--detach")[0] == 0
    assert desk.asked("GET /fleet") == []


def test_drain_that_somebody_resumes_ends_with_1(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("host:build1", reason="drained"))
    desk.answer("GET /fleet", drained(worker("w1", job=JOB)), fleet(worker("w1", job=JOB)))
    status, _, err = run("drain", "host:build1", "--note", "x")
    assert (status, err) == (1, "drain: host:build1: an operator has resumed it\n")


def test_drain_while_the_scheduler_restarts_goes_on(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("POST /holds", held("host:build1", reason="drained"))
    desk.answers["GET /fleet"] = [(503, {"error": "stopping", "message": "it stops"}), (200, drained(worker("w1")))]
    status, out, _ = run("drain", "host:build1", "--note", "x")
    assert (status, "it stops; tried again" in out) == (0, True)


@pytest.mark.parametrize("words", [["queue:linux"], ["tag:gpu=*"], ["w1", "--cancel"]])
def test_drain_what_cannot_be_watched_asks_nobody(words: list[str], desk: FakeDesk, run: Callable[..., Ran]) -> None:
    assert run("drain", *words, "--note", "x")[0] == 1
    assert desk.calls == []


def test_resume_tells_what_it_was_and_with_quarantine_asks_for_more(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("DELETE /holds/tag%3Agpu%3Da100", {"lifted": [hold("tag:gpu=a100")], "message": ""})
    status, out, _ = run("resume", "tag:gpu=a100")
    assert (status, out) == (0, "tag:gpu=a100: resumed; it was paused by ann@build1 since 14:02: disk swap\n")
    run("resume", "tag:gpu=a100", "--quarantine")
    assert [route for route, _, _ in desk.calls] == [
        "DELETE /holds/tag%3Agpu%3Da100",
        "DELETE /holds/tag%3Agpu%3Da100?quarantine=1",
    ]


def test_resume_what_is_not_held_is_done(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("DELETE /holds/worker%3Aw1", {"lifted": [], "message": ""})
    desk.answer("GET /fleet", fleet(worker("w1")))
    assert run("resume", "w1") == (0, "worker:w1 is not held\n", "")


@pytest.mark.parametrize("options", [[], ["-o", "json"]])
def test_resume_a_worker_whose_host_is_held_is_not_done(
    options: list[str], desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer("DELETE /holds/worker%3Aw1", {"lifted": [], "message": ""})
    desk.answer("GET /fleet", drained(worker("w1")))
    status, out, err = run("resume", "w1", *options)
    assert (status, "host:build1 drained by ann@build1" in err) == (1, True)
    assert not out or json.loads(out)["error"] == "held_elsewhere"


def test_resume_dry_lifts_nothing(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    unfit = hold("host:build1", owner="machine", reason="unfit", by="")
    desk.answer("GET /fleet", fleet(holds=[hold("host:build1"), hold("host:build2"), unfit]))
    assert run("resume", "host:build1", "--dry-run")[1].count("would be resumed") == 1
    out = run("resume", "host:build1", "--dry-run", "--quarantine")[1]
    assert out.count("would be resumed") == 2 and "unfit by the machine" in out
    assert desk.asked("DELETE") == []


def test_resume_dry_with_quarantine_names_the_workers_whose_backoff_would_end(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    def failing(name: str, host: str) -> dict[str, Any]:
        backoff = hold(f"worker:{name}", owner="machine", reason="workers_failing", by="", note="")
        return worker(name, host=host, state="failing", holds=[backoff])

    desk.answer("GET /fleet", fleet(failing("w1", "build1"), failing("w2", "build2"), worker("w3")))
    status, out, _ = run("resume", "host:build1", "--dry-run", "--quarantine")
    assert (status, out) == (0, "worker:w1: would be resumed; it was workers_failing by the machine since 14:02\n")
    assert run("resume", "host:build2", "--dry-run")[0] == 1


def test_resume_dry_of_what_is_not_there_names_the_nearest_as_the_act_does(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer("GET /fleet", fleet(worker("w1")))
    desk.answer("POST /holds", held("worker:w1"))
    assert run("resume", "w1", "--dry-run") == (0, "worker:w1 is not held\n", "")
    desk.answer("POST /holds", {"error": "no_match", "message": "nothing here is worker:w2"}, status=404)
    assert run("resume", "w2", "--dry-run") == (1, "", "resume: nothing here is worker:w2\n")
    assert {body["dry_run"] for body in desk.asked("POST /holds")} == {True}


@pytest.mark.parametrize("target", ["queue:default", "queue:def*", "host:b*", "tag:os=linux"])
def test_resume_dry_of_what_somebody_else_holds_is_refused(
    target: str, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    told = fleet(worker("w1", holds=[hold("worker:w1")]))
    told["queues"][0]["holds"] = [hold("queue:default", owner="buildkite", reason="queue_paused", by="")]
    desk.answer("GET /fleet", told)
    status, out, err = run("resume", target, "--dry-run")
    assert (status, out) == (1, "")
    assert f"no operator holds {target} itself, but: " in err
    assert desk.asked("POST") == []


@pytest.mark.parametrize("act", ["stop", "allow", "first"])
def test_act_on_a_job_tells_the_words_of_the_scheduler(act: str, desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer(f"POST /jobs/{JOB}/{act}", {"uuid": JOB, "state": "running", "message": "w1 was told"})
    assert run(act, JOB.upper(), "--note", "wrong branch") == (0, f"job {JOB} (running): w1 was told\n", "")
    assert desk.asked(f"POST /jobs/{JOB}/{act}") == [{"note": "wrong branch"}]


def test_stop_what_cannot_be_reached_ends_with_1(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer(
        f"POST /jobs/{JOB}/stop", {"uuid": JOB, "state": "running", "reachable": False, "message": "w1 is gone"}
    )
    assert run("stop", JOB, "--note", "x")[0] == 1
    assert run("stop", JOB, "--note", "x", "-o", "json")[0] == 1


def test_act_on_what_is_no_job_asks_nobody(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    status, _, err = run("stop", "w1", "--note", "x")
    assert (status, "'w1' is no job's uuid" in err, desk.calls) == (1, True, [])


@pytest.mark.parametrize(
    ("act", "state", "told"),
    [
        ("stop", "ready", "it would be finished at Buildkite, with the note"),
        ("stop", "leased", "the claim of w1 would be ended"),
        ("stop", "running", "it would be cancelled, on w1"),
        ("allow", "ready", "holds of operators"),
        ("first", "ready", "it would become the first"),
    ],
)
def test_act_dry_on_a_job_says_what_would_be_done(
    act: str, state: str, told: str, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer(f"GET /jobs/{JOB}", job(state=state, worker="w1"))
    status, out, _ = run(act, JOB, "--note", "x", "--dry-run")
    assert (status, told in out, desk.asked("POST")) == (0, True, [])


@pytest.mark.parametrize("act", ["stop", "allow", "first"])
def test_act_dry_on_a_job_that_is_over_is_refused_as_the_act_is(
    act: str, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer(f"GET /jobs/{JOB}", job(state="done", outcome="ran", reason="finished", why=None))
    status, out, err = run(act, JOB, "--note", "x", "--dry-run")
    assert (status, out) == (1, "")
    assert err == f"{act}: job {JOB} is already over: ran, finished; nothing would be changed\n"
    assert json.loads(run(act, JOB, "--note", "x", "--dry-run", "-o", "json")[1])["error"] == "job_done"


@pytest.mark.parametrize(
    ("why", "by", "passes"),
    [
        ("queue_paused", "operator", True),
        ("queue_paused", "buildkite", False),
        ("frozen", None, True),
        ("workers_paused", None, True),
        ("no_worker", None, False),
        ("runnable_at", None, False),
    ],
)
def test_allow_dry_says_whether_it_passes_what_the_job_waits_for(
    why: str, by: str | None, passes: bool, desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    desk.answer(f"GET /jobs/{JOB}", job(why=why, text="it waits so", by=by))
    status, out, _ = run("allow", JOB, "--note", "x", "--dry-run")
    assert status == 0
    assert out.endswith("would not hold it\n" if passes else f", but it waits for another reason: {why}: it waits so\n")


def test_forget_a_worker_asks_by_its_name(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("DELETE /workers/a%2Fb", {"name": "a/b"})
    assert run("forget", "a/b") == (0, "worker a/b: it is forgotten\n", "")
    desk.answer("GET /fleet", fleet(worker("build1-1")))
    assert run("forget", "worker:build1-1", "--dry-run")[:2] == (0, "worker build1-1: it would be forgotten\n")
    status, _, err = run("forget", "build1-2", "--dry-run")
    assert (status, err) == (1, "forget: there is no worker 'build1-2'; the nearest: build1-1\n")


# --- Periodic builds ---


def periodic(name: str = "nightly", **more: Any) -> dict[str, Any]:
    build = {
        "mark": "m1",
        "due_at": None,
        "by": "",
        "uuid": "u",
        "number": 7,
        "url": "https://buildkite.com/a/app/builds/7",
    }
    build |= {"state": "passed", "started_at": time.strftime("%Y-%m-%dT02:17:01%z")}
    told: dict[str, Any] = {
        "name": name,
        "pipeline": "app",
        "branch": "main",
        "cron": "H 2 * * *",
        "schedule": "17 2 * * *, UTC",
    }
    told |= {"if_running": "skip", "missed": "once", "next_at": time.strftime("%Y-%m-%dT02:17:00%z"), "failures": 0}
    return told | {"start": None, "build": build, "unstarted": None, "problem": None} | more


def started(mark: str = "m2", problem: str = "") -> dict[str, Any]:
    return {"mark": mark, "due_at": None, "by": "ann", "note": "x", "asked_at": None, "problem": problem}


RUN = "POST /periodic/nightly/run"
ASKED_FOR = {"name": "nightly", "mark": "m2", "message": "Buildkite is asked for a build"}


def test_list_periodic_builds_tells_the_next_time_the_last_build_and_what_is_wrong(
    desk: FakeDesk, run: Callable[..., Ran]
) -> None:
    skipped = {"at": None, "due_at": None, "what": "skipped", "reason": "build 7 of this schedule is not over"}
    rows = [
        periodic(),
        periodic("new", build=None, problem="403 from Buildkite"),
        periodic("often", unstarted=skipped),
    ]
    desk.answer("GET /periodic", {"periodic": rows})
    status, out, _ = run("periodic")
    assert (status, [line.split("  ")[0] for line in out.splitlines()]) == (0, ["NAME", "nightly", "new", "often"])
    assert re.search(r"nightly +app +02:17.* +02:17.* +passed +https://buildkite.com/a/app/builds/7 +-\n", out)
    assert re.search(r"new +app +02:17[^-]* +- +- +- +403 from Buildkite\n", out)
    assert out.endswith("skipped: build 7 of this schedule is not over\n")
    assert json.loads(run("periodic", "-o", "json")[1]) == {"periodic": rows}


def test_run_a_periodic_build_waits_until_it_is_there(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer(RUN, ASKED_FOR)
    build = periodic()["build"] | {"mark": "m2", "number": 8}
    desk.answer("GET /periodic", *({"periodic": [each]} for each in (periodic(start=started()), periodic(build=build))))
    assert run("run", "nightly", "--note", "x") == (0, "nightly: build 8, https://buildkite.com/a/app/builds/7\n", "")
    assert desk.asked(RUN) == [{"note": "x"}]
    assert len(desk.asked("GET /periodic")) == 2
    assert json.loads(run("run", "nightly", "--note", "x", "-o", "json")[1]) == ASKED_FOR | {"build": build}


def test_run_a_periodic_build_that_is_not_made_ends_with_1(
    desk: FakeDesk, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.answer(RUN, ASKED_FOR)
    desk.answer("GET /periodic", {"periodic": [periodic(start=started(problem="403 from Buildkite"))]})
    told = "nightly: 403 from Buildkite; the scheduler tries again, see `periodic`\n"
    assert run("run", "nightly", "--note", "x") == (1, told, "")
    refused = {"at": None, "due_at": None, "what": "refused", "reason": "422 from Buildkite"}
    desk.answer("GET /periodic", {"periodic": [periodic(unstarted=refused)]})
    assert run("run", "nightly", "--note", "x") == (1, "", "run: nightly: 422 from Buildkite\n")
    desk.answer("GET /periodic", {"periodic": [periodic(start=started("m3"))]})
    assert run("run", "nightly", "--note", "x") == (1, "", "run: nightly: another start has taken its place\n")
    desk.answer("GET /periodic", {"periodic": []})
    assert run("run", "nightly", "--note", "x")[0] == 1
    monkeypatch.setattr(scheduler, "RUN_SECONDS", 0.0)
    desk.answer("GET /periodic", {"periodic": [periodic(start=started())]})
    assert run("run", "nightly", "--note", "x")[:2] == (
        1,
        "nightly: no answer yet; the scheduler tries again, see `periodic`\n",
    )


def test_run_a_periodic_build_dry_starts_nothing(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    desk.answer("GET /periodic", {"periodic": [periodic()]})
    assert run("run", "nightly", "--note", "x", "--dry-run")[:2] == (0, "nightly: a build of app would be started\n")
    told = "run: STACK_FILE has no [[periodic]] named 'nigthly'; the nearest: nightly\n"
    assert run("run", "nigthly", "--note", "x", "--dry-run") == (1, "", told)
    assert desk.asked("POST") == []
    assert run("run", "nightly")[0] == 64


# --- On the screen ---


def test_say_what_would_steer_a_terminal_shows_it_as_blanks(desk: FakeDesk, run: Callable[..., Ran]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2Jdisk\r\nswap\u202e"
    unfit = worker("w1", state="paused", reason=evil, holds=[hold("worker:w1", note=evil)])
    desk.answer("GET /stats", {"waiting": [waiting()]})
    desk.answer("GET /fleet", fleet(unfit, problems=[evil], holds=[hold("worker:w1", note=evil)]))
    for words in (["status"], ["workers"], ["workers", "--why"]):
        out = run(*words)[1]
        assert "disk" in out and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
        # Not even a line of its own.
        assert not any(line.startswith("swap") for line in out.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.4, "0 s"), (59.9, "60 s"), (60, "1 min"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_tell_a_time_in_the_words_of_people(seconds: float | None, text: str) -> None:
    assert scheduler.span(seconds) == text


def test_tell_a_moment_of_another_day_with_its_date() -> None:
    assert scheduler.clock_of("2026-01-02T12:00:00Z").startswith("2026-01-0")
    assert scheduler.clock_of(None) == ""


def on_a_terminal(words: Sequence[str], size: int, **environ: str) -> tuple[int, str]:
    """The exit status and the output of a command on a terminal that is so wide."""
    ours, theirs = pty.openpty()
    env = {"PATH": os.environ["PATH"], "COLUMNS": str(size), "TERM": "xterm", **environ}
    with subprocess.Popen([*compiled("scheduler.py"), *words], env=env, stdout=theirs, cwd="/") as process:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # EIO: it has ended
            while select.select([ours], [], [], PATIENCE)[0] and (part := os.read(ours, 65536)):
                text += part
        os.close(ours)
        return process.wait(PATIENCE), text.decode().replace("\r\n", "\n")


@pytest.fixture
def wide_fleet(desk: FakeDesk) -> None:
    """One whose names, reasons and notes are longer than a line."""
    workers = [
        worker(
            f"builder-of-rack-{n}-slot-1", host=f"rack-{n}.example.com", job=JOB, state=state, reason="disk full " * 9
        )
        for n, state in enumerate(["working", "failing", "paused"])
    ]
    told = fleet(*workers, jobs=[job(text="all matching workers are busy " * 5)], problems=["no answer " * 20])
    told["queues"][0]["holds"] = told["hosts"][0]["holds"] = [hold("queue:default", note="until further notice")]
    desk.answer("GET /fleet", told)


@pytest.mark.usefixtures("wide_fleet")
@pytest.mark.parametrize("words", ["status", "workers", "jobs"])
def test_show_tables_on_a_screen_of_80_columns_fits_them(
    words: str, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max(map(len, run(words)[1].splitlines())) > 80
    monkeypatch.setattr(scheduler, "columns", lambda: 80)
    out = run(words)[1]
    assert max(map(len, out.splitlines())) <= 80, out
    # Of a job the whole uuid, since one copies it.
    assert "…" in out and (words != "jobs" or JOB in out)


@pytest.mark.usefixtures("wide_fleet")
def test_show_on_a_terminal_fits_it_in_colours_unless_no_color(desk: FakeDesk) -> None:
    status, text = on_a_terminal(["workers", "--server", desk.url], 80)
    assert (status, "\x1b[31mfailing" in text, "\x1b[33mpaused" in text) == (0, True, True)
    bare = re.sub(r"\x1b\[[0-9]+m", "", text)
    assert max(map(len, bare.splitlines())) <= 80
    assert on_a_terminal(["workers", "--server", desk.url], 80, NO_COLOR="1") == (0, bare)


# --- In a process of its own ---


def scheduler_alone(directory: Path) -> list[str]:
    """The script as it is on a machine that has nothing but Python: no packages, and no other file of ours."""
    shutil.copy(ROOT / "scheduler.py", directory)
    return [sys.executable, "-S", "-E", str(directory / "scheduler.py")]


def test_run_on_a_machine_with_python_and_the_file_alone_needs_and_imports_no_more(
    desk: FakeDesk, tmp_path: Path
) -> None:
    desk.answer("GET /fleet", fleet(worker("w1")))
    words = [*scheduler_alone(tmp_path), "workers", "--server", desk.url]
    words.insert(1, "-Ximporttime")
    done = subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "w1" in done.stdout) == (0, True)
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "http.client" in loaded
    assert loaded & {"requests", "urllib3", "prometheus_client", "redis", "sqlite3", "http.server", "argparse"} == set()


def test_run_a_command_that_is_not_there_in_a_process_ends_with_64(tmp_path: Path) -> None:
    done = subprocess.run(
        [*scheduler_alone(tmp_path), "stauts"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "scheduler.py: there is no command 'stauts'; the nearest: status; `help` lists them\n"


def test_interrupt_a_drain_ends_the_watching_and_says_that_the_drain_stays(desk: FakeDesk, tmp_path: Path) -> None:
    desk.answer("POST /holds", held("worker:w1", reason="drained"))
    desk.answer("GET /fleet", drained(worker("w1", job=JOB), target="worker:w1"))
    words = [*compiled("scheduler.py"), "drain", "w1", "--note", "x", "--server", desk.url]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "1 job left" in line:
                break
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # else one that does not end is waited for without end
    assert (process.returncode, err) == (
        1,
        "drain: stopped watching; worker:w1 stays drained until: resume worker:w1\n",
    )
    assert desk.asked("DELETE") == []


def test_pipe_to_a_reader_that_has_enough_is_quiet(desk: FakeDesk, tmp_path: Path) -> None:
    desk.answer("GET /fleet", fleet(*(worker(f"w{n}") for n in range(3000))))
    words = [*compiled("scheduler.py"), "workers", "--server", desk.url]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(PATIENCE), process.stderr.read()) == (1, b"")


def test_complete_by_bash_offers_commands_options_and_their_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [*compiled("scheduler.py"), "completion"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    (tmp_path / "stackctl").write_text(done.stdout)

    def offered(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("stackctl", *words))
        code = f". ./stackctl; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _stackctl; echo ${{COMPREPLY[*]}}"
        run = [program("bash"), "-c", code]
        return subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=True).stdout.split()

    assert offered("") == list(scheduler.COMMANDS)
    assert offered("dr") == ["drain"]
    assert offered("drain", "w1", "--d") == ["--deadline", "--detach", "--dry-run"]
    assert offered("jobs", "--state", "r") == ["reserving", "ready", "running"]
    assert offered("workers", "-o", "") == ["json"]


# --- A real scheduler ---


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as processes:
        yield processes


def ask_stack(stack: StackProcesses, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit status of a command that asks the real scheduler, and its JSON."""
    run = [*compiled("scheduler.py"), *words, "-o", "json", "--server", stack.url]
    env = {"PATH": os.environ["PATH"], "SUDO_USER": "ann"}
    done = subprocess.run(run, cwd="/", env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout)


def test_act_on_a_job_that_a_real_scheduler_does_not_know_says_so(stack: StackProcesses) -> None:
    stack.start_scheduler()
    status, told = ask_stack(stack, "first", JOB, "--note", "x")
    assert status == 1
    assert told["error"] in ("not_found", "unknown_job")


def test_act_dry_on_a_job_of_a_real_scheduler_reads_it_as_it_is(fake: FakeBuildkite, stack: StackProcesses) -> None:
    uuid = fake.add_job(rules=["queue=default", "gpu=a100"])
    stack.start_scheduler()
    fake.wait_for(lambda: stack.job(uuid).get("state") == "ready")
    assert ask_stack(stack, "stop", uuid, "--note", "x", "--dry-run") == (
        0,
        {"uuid": uuid, "state": "ready", "message": "it would be finished at Buildkite, with the note"},
    )


def begin(stack: StackProcesses, name: str = "w1", **settings: str) -> None:
    """One scheduler and one worker of host build1, which waits for a job."""
    stack.start_scheduler()
    stack.start_worker(name, WORKER_HOST="build1", **settings).wait_for_line("started")


def job_that_waits(fake: FakeBuildkite, directory: Path) -> tuple[str, Path]:
    """A job that runs until the file is there."""
    go = directory / "go"
    return fake.add_job(command=f"echo begun; while [ ! -e {go} ]; do sleep 0.05; done"), go


def test_drain_at_a_real_scheduler_ends_when_its_job_ends(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    begin(stack)
    uuid, go = job_that_waits(fake, tmp_path)
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    words = [*compiled("scheduler.py"), "drain", "host:build1", "--note", "new kernel", "--server", stack.url]
    with subprocess.Popen(words, cwd="/", stdout=subprocess.PIPE, text=True) as drain:
        assert drain.stdout
        assert any(f"1 job left: {uuid} on w1" in line for line in drain.stdout)
        following = fake.add_job()
        fake.wait_for(lambda: stack.job(following).get("state") == "ready")
        assert drain.poll() is None
        go.touch()
        *_, last = drain.stdout
        assert drain.wait(PATIENCE) == 0
    assert last.startswith("host:build1: drained, no job is leased or running there")
    assert fake.jobs[uuid].exit_status == 0
    assert stack.job(following)["why"] == "workers_paused"
    status, told = ask_stack(stack, "resume", "host:build1")
    assert (status, [each["reason"] for each in told["lifted"]]) == (0, ["drained"])
    fake.wait_for(lambda: fake.jobs[following].state == "finished", timeout=30)


def test_drain_at_a_real_scheduler_with_a_deadline_leaves_the_job_alone_and_ends_with_1(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    begin(stack)
    uuid, go = job_that_waits(fake, tmp_path)
    fake.wait_for(lambda: stack.job(uuid).get("state") == "running", timeout=30)
    status, told = ask_stack(stack, "drain", "w1", "--note", "new kernel", "--deadline", "100ms")
    assert (status, told["drained"], [each["job"] for each in told["left"]]) == (1, False, [uuid])
    go.touch()
    fake.wait_for(lambda: fake.jobs[uuid].exit_status == 0, timeout=30)


def test_drain_with_cancel_at_a_real_scheduler_has_the_job_that_is_left_cancelled(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    stack.scheduler_settings |= {"LEASE_SECONDS": "4"}
    begin(stack)
    uuid, _ = job_that_waits(fake, tmp_path)
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    wait_until(lambda: stack.job(uuid)["state"] == "running")
    following = fake.add_job()
    words = ["drain", "host:build1", "--note", "new kernel", "--deadline", "100ms", "--cancel"]
    status, told = ask_stack(stack, *words)
    assert (status, told["drained"], [each["job"] for each in told["left"]]) == (1, False, [uuid])
    (said,) = told["stopped"]
    assert said.startswith(f"job {uuid}: within 4 s, worker w1 makes its agent cancel it")
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=30)
    assert (fake.jobs[uuid].exit_status, fake.jobs[uuid].signal_reason) == (-1, "agent_stop")
    # The host is drained all the same: said again, it is done.
    wait_until(lambda: stack.job(uuid)["state"] == "done")
    status, told = ask_stack(stack, "drain", "host:build1", "--note", "new kernel", "--deadline", "30s", "--cancel")
    assert (status, told["drained"], told["stopped"], told["already"]) == (0, True, [], True)
    assert fake.jobs[following].happened("acquired") == 0


def test_stop_at_a_real_scheduler_of_a_job_that_nobody_touches_any_more_ends_with_1(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    stack.scheduler_settings |= {"LEASE_SECONDS": "5"}
    begin(stack)
    uuid, go = job_that_waits(fake, tmp_path)
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    wait_until(lambda: stack.job(uuid)["state"] == "running")
    (worker,) = stack.workers
    worker.kill()  # its agent goes on
    worker.ended()
    words = ("stop", uuid, "--note", "wrong branch")
    status, told = ask_stack(stack, *words)
    assert (status, told["reachable"], "within 5 s, " in told["message"]) == (0, True, True)
    wait_until(lambda: ask_stack(stack, *words)[0] == 1)
    status, told = ask_stack(stack, *words)
    assert (status, told["state"], told["reachable"]) == (1, "running", False)
    assert "it cannot be reached: worker w1 has not touched it since" in told["message"]
    assert fake.jobs[uuid].state == "running"
    go.touch()
    fake.wait_for(lambda: fake.jobs[uuid].exit_status == 0, timeout=30)


def test_status_at_a_real_scheduler_of_two_machines_under_one_hosts_name_says_what_to_do(
    stack: StackProcesses, set_clock: Callable[[float], dict[str, Any]]
) -> None:
    process = stack.start_scheduler(**set_clock(0.0))

    def claim(name: str, host: str, machine: str) -> None:
        headers = {"X-Worker-ID": name, "X-Worker-Session": "a", "X-Worker-Host": host, "X-Worker-Machine": machine}
        reply = requests.get(f"{stack.url}/jobs?query=queue=default", headers=headers, timeout=PATIENCE)
        assert reply.status_code == 204

    claim("w1", "build1", "1a")
    claim("w2", "build1", "1a")
    claim("w3", "build2", "2b")
    wait_until(lambda: ask_stack(stack, "status")[0] == 0)
    claim("w4", "build1", "3c")
    # The machines are compared again when their time has come.
    set_clock(scheduler.MACHINES_SECONDS + 1)
    process.wait_for_line("clock", "step_s=31")
    problem = (
        "2 machines have the host name build1: those of workers w1, w4; set WORKER_HOST to a different name on each"
    )
    wait_until(lambda: problem in str(ask_stack(stack, "status")[1]["wrong"]))
    assert ask_stack(stack, "status")[0] == 2
    status, told = ask_stack(stack, "why", "host:build1")
    assert (status, [each["name"] for each in told["workers"]]) == (0, ["w1", "w2", "w4"])


def test_ask_a_real_scheduler_about_policy_and_windows_tells_it_as_json(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    days = 'from = 2000-01-01\nuntil = 2100-01-01\nzone = "UTC"\n'
    (tmp_path / "stack.toml").write_text(f'[[freeze]]\nname = "a century"\nbranches = ["release"]\n{days}')
    (tmp_path / "policy.py").write_text(
        'def decide(job, fleet):\n    print("asked")\n    return hold("not yet") if job.env.get("HOLD") else 7\n'
    )
    stack.scheduler_settings |= {
        "STACK_FILE": str(tmp_path / "stack.toml"),
        "POLICY_FILE": str(tmp_path / "policy.py"),
    }
    stack.start_scheduler()
    held, failed = fake.add_job(env={"HOLD": "1"}), fake.add_job()
    frozen = fake.add_job(branch="release")
    for uuid, why in ((held, "held_by_policy"), (failed, "policy_failed"), (frozen, "frozen")):
        wait_until(lambda uuid=uuid, why=why: stack.job(uuid).get("why") == why)  # type: ignore[misc]
    status, told = ask_stack(stack, "decide", held)
    decision = told["decision"]
    assert (status, decision["verb"], decision["reason"], told["printed"]) == (0, "hold", "not yet", "asked\n")
    status, told = ask_stack(stack, "decide", failed)
    assert (status, told.get("decision"), bool(told["failed"])) == (1, None, True)
    assert ask_stack(stack, "decide", JOB)[0] == 1
    status, told = ask_stack(stack, "freezes")
    (window,) = told["freezes"]
    assert (status, window["name"], window["state"], window["jobs"]) == (0, "a century", "in_force", 1)
    status, told = ask_stack(stack, "policy", "off", "--note", "it fails", "--dry-run")
    assert (status, bool(told["message"])) == (0, True)
    assert stack.job(failed)["why"] == "policy_failed"
    assert ask_stack(stack, "policy", "off", "--note", "it fails", "--for", "1h")[0] == 0
    wait_until(lambda: stack.job(failed).get("why") == "no_worker")
    assert ask_stack(stack, "policy", "on", "--note", "mended")[0] == 0
    following = fake.add_job(env={"HOLD": "1"})
    wait_until(lambda: stack.job(following).get("why") == "held_by_policy")


def test_look_and_try_at_a_real_scheduler_with_a_wrong_name_names_the_nearest(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    begin(stack)
    wait_until(lambda: ask_stack(stack, "why", "w1")[0] == 0)
    status, told = ask_stack(stack, "jobs", "--queue", "defualt")
    assert (status, told["message"]) == (1, "there is no queue 'defualt'; the nearest: default")
    assert ask_stack(stack, "jobs", "--queue", "default") == (0, {"jobs": []})
    for more in ([], ["--dry-run"]):
        status, told = ask_stack(stack, "resume", "w11", *more)
        assert (status, told["error"], "the nearest: worker:w1" in told["message"]) == (1, "no_match", True)
        assert ask_stack(stack, "resume", "w1", *more)[0] == 0
    uuid = fake.add_job()
    wait_until(lambda: stack.job(uuid).get("state") == "done")
    for act in ("stop", "allow", "first"):
        refused = [ask_stack(stack, act, uuid, "--note", "x", *more) for more in ([], ["--dry-run"])]
        assert [(status, told["error"]) for status, told in refused] == [(1, "job_done")] * 2
    paused = fake.add_job(rules=["queue=default", "gpu=a100"])
    wait_until(lambda: stack.job(paused).get("why") == "no_worker")
    fake.pause_queue("default")
    wait_until(lambda: stack.job(paused).get("why") == "queue_paused")
    status, told = ask_stack(stack, "allow", paused, "--note", "x", "--dry-run")
    assert (status, "but it waits for another reason: queue_paused: " in told["message"]) == (0, True)


LOOKS = [["status"], ["workers"], ["jobs"], ["why", "w1"]]
ACTS = [
    *(["pause", "w1"], ["drain", "w1", "--detach"], ["resume", "w1"], ["resume", "w1", "--quarantine"]),
    *(["first", "JOB"], ["allow", "JOB"], ["stop", "JOB"], ["forget", "w1"]),
]


def test_act_and_look_at_a_real_scheduler_are_for_those_whose_token_may(
    fake: FakeBuildkite, stack: StackProcesses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"operator": "o-token", "viewer": "v-token", "worker": "w-token"}
    stack.scheduler_settings |= {"OPERATOR_TOKEN": "o-token", "VIEWER_TOKEN": "v-token", "STACK_API_TOKEN": "w-token"}
    stack.start_scheduler()
    uuid = fake.add_job(rules=["queue=default", "gpu=a100"])
    worker = stack.start_worker("w1", STACK_API_TOKEN="w-token")
    worker.wait_for_line("started")

    def ran(who: str, words: list[str]) -> tuple[int, str]:
        """What the command ended with, and the code of its refusal."""
        monkeypatch.setenv("VIEWER_TOKEN" if who == "viewer" else "OPERATOR_TOKEN", tokens.get(who, who))
        note = ["--note", "x"] if words[0] not in ("resume", "forget") and words in ACTS else []
        words = [uuid if word == "JOB" else word for word in words]
        status = scheduler.command([*words, *note, "-o", "json", "--server", stack.url])
        monkeypatch.delenv("VIEWER_TOKEN" if who == "viewer" else "OPERATOR_TOKEN")
        return status, json.loads(capsys.readouterr().out).get("error", "")

    end = time.monotonic() + PATIENCE
    while ran("operator", ["why", "w1"])[0] or ran("operator", ["why", uuid])[0]:
        assert time.monotonic() < end
    for words in LOOKS:
        assert {who: ran(who, words) for who in ("operator", "viewer")} == dict.fromkeys(
            ("operator", "viewer"), (0, "")
        )
        assert ran("nobody's", words) == (2 if words == ["status"] else 1, "unauthorized")
    for words in ACTS:
        assert {who: ran(who, words) for who in ("viewer", "worker")} == dict.fromkeys(
            ("viewer", "worker"), (1, "operators_only")
        )
        assert ran("nobody's", words) == (1, "unauthorized")
    assert fake.jobs[uuid].state == "reserved"
    told = requests.get(f"{stack.url}/fleet", headers={"Authorization": "Bearer v-token"}, timeout=PATIENCE).json()
    assert (told["holds"], told["acts"]) == ([], [])
    # The same acts are done for an operator: it is the token that was refused.
    assert [ran("operator", words) for words in ACTS[:-1]] == [(0, "")] * (len(ACTS) - 1)
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=30)
