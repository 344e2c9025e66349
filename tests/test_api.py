"""The HTTP API as a worker sees it, letter by letter: every route's answer and refusals; and the process around it."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import logging
import os
import queue
import re
import signal
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import hypothesis
import pytest
from hypothesis import strategies as st

import scheduler
import worker
from conftest import LONG_RUN, Clock, sqlite_only
from fake_buildkite import FakeBuildkite, FakeJob
from processes import StackProcesses, compiled, wait_until
from scheduler import (
    Api,
    ConnectionLimit,
    Dispatcher,
    Finding,
    Fleet,
    Freezes,
    FreezeWindows,
    Intake,
    Job,
    JobFinding,
    Leadership,
    Part,
    Profile,
    RuleSet,
    Server,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
    WebPage,
    Worker,
    listening_sockets,
)

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
UUID = "018f0000-0000-4000-8000-000000000001"
OTHER = "018f0000-0000-4000-8000-000000000002"
UNKNOWN = "018f0000-0000-4000-8000-0000000000ff"
ABOUT = {
    "pipeline": {"slug": "demo", "uuid": "pipeline-uuid"},
    "build": {"uuid": "build-uuid", "number": 7, "branch": "main"},
    "step": {"key": "unit"},
}
STATES = {"reserving": 0, "ready": 0, "leased": 0, "running": 0, "done": 0}
#: A worker of the tests, and another process that took its name.
W1 = {"X-Worker-ID": "w1", "X-Worker-Session": "first-secret-session"}
W1_AGAIN = {"X-Worker-ID": "w1", "X-Worker-Session": "second-secret-session"}
W2 = {"X-Worker-ID": "w2", "X-Worker-Session": "third-secret-session"}


@dataclasses.dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    text: bytes

    @property
    def json(self) -> Any:
        assert self.headers["Content-Type"] == "application/json"
        return json.loads(self.text)

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code of an error, which says something to a person too."""
        assert set(self.json) == {"error", "message"}
        assert self.json["message"]
        return (self.status, self.json["error"])


class Connection(http.client.HTTPConnection):
    """One connection, kept open, as a worker has it."""

    def __init__(self, port: int):
        super().__init__("127.0.0.1", port, timeout=PATIENCE)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        text = json.dumps(body) if isinstance(body, dict) else body
        kind = {"Content-Type": "application/json"} if text else {}
        self.request(method, path, text, kind | (headers or {}))
        response = self.getresponse()
        return Reply(response.status, response.headers, response.read())


class Bench:
    """The API on a port of its own, over a real store; nothing but its clock is made up, and no job comes by itself."""

    def __init__(  # noqa: PLR0913  what a scheduler would wire
        self,
        store: Store,
        clock: Clock,
        settings: Settings,
        intakes: dict[str, Intake] | None = None,
        token: str = "",
        parts: Sequence[Part] = (),
    ):
        self.store, self.clock = store, clock
        self.dispatcher = Dispatcher(store, clock.now)
        store.windows = FreezeWindows(clock.now)
        self.freezes = Freezes(settings, Leadership(store), self.dispatcher, ["default", "other"], clock.now)
        page = WebPage(store, lambda: Fleet(store, self.dispatcher, clock.now()), clock.now)
        api = Api(store, self.dispatcher, intakes or {}, settings, clock.now, parts=[self.freezes, page, *parts])
        self.server = Server(
            listening_sockets(("127.0.0.1", 0), {})[0], api, ConnectionLimit(6000), [token] if token else []
        )
        self.port = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True)
        self._thread.start()
        self._connections: list[Connection] = []
        self._first = self.connect()

    def connect(self) -> Connection:
        self._connections.append(Connection(self.port))
        return self._connections[-1]

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        return self._first.call(method, path, body, headers)

    def claim(self, headers: dict[str, str] | None = None, query: str = "query=queue=default") -> Any:
        reply = self.call("GET", f"/jobs?{query}", headers=headers)
        assert reply.status == 200, reply
        return reply.json

    def send(self, text: bytes, half_close: bool = False) -> Reply:
        """What the server answers to these bytes before it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            connection.sendall(text)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection)
            response.begin()
            reply = Reply(response.status, response.headers, response.read())
            assert connection.recv(1) == b""
            return reply

    def make_ready(self, uuid: str = UUID, priority: int = 3, rules: tuple[str, ...] = ("queue=default",)) -> Job:
        now = self.clock.now()
        raw = {
            "id": uuid,
            "priority": priority,
            "agent_query_rules": list(rules),
            "scheduled_at": "2027-01-15T07:59:00.250Z",
            **ABOUT,
        }
        self.store.put([Job.from_api("default", raw, now)], self.store.sequence(), now)
        (job,) = self.store.confirm([uuid], self.store.sequence(), now + 900, now)
        return job

    def learn(self, uuid: str, finding: Finding, word: str, code: str = "") -> None:
        self.store.learn({uuid: JobFinding(finding, word, code)}, self.store.sequence(), self.clock.now())

    def state(self, uuid: str = UUID) -> str:
        job = self.store.get(uuid)
        assert job
        return job.state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        self.dispatcher.stop()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(PATIENCE)


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        yield bench


@pytest.fixture
def held(bench: Bench) -> str:
    """The claim of a job that w1 holds."""
    bench.make_ready()
    claim: str = bench.claim(W1)["claim"]
    return claim


# --- GET /health ---


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeBuildkite]:
    with FakeBuildkite(clock=clock.now) as server:
        yield server


@pytest.fixture
def intake(fake: FakeBuildkite, store: Store, clock: Clock, settings: Callable[..., Settings]) -> Intake:
    stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
    return Intake(stack, Leadership(store), Dispatcher(store, clock.now), settings(), clock.now, pytest.fail)


@pytest.fixture
def polling(intake: Intake, store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    """An API with a queue that the test lists when it wants to."""
    with Bench(store, clock, settings(), {"default": intake}) as bench:
        yield bench


def test_health_before_the_first_poll_is_ok_and_strictly_stale(polling: Bench) -> None:
    plain, strict = polling.call("GET", "/health"), polling.call("GET", "/health?strict=1")
    assert (plain.status, strict.status) == (200, 503)
    assert plain.json == {
        "status": "ok",
        "version": "1.0.0",
        "last_poll_age_seconds": {"default": None},
        "problems": [],
    }
    assert strict.json == plain.json | {"status": "stale"}


def test_health_after_a_poll_tells_its_age_and_is_strictly_stale_after_a_minute(
    polling: Bench, intake: Intake, clock: Clock
) -> None:
    intake.list.run_once()
    reply = polling.call("GET", "/health?strict=1")
    assert (reply.status, reply.json["last_poll_age_seconds"]) == (200, {"default": 0.0})
    clock.advance(60)
    reply = polling.call("GET", "/health?strict=1")
    assert (reply.status, reply.json["last_poll_age_seconds"]) == (200, {"default": 60.0})
    clock.advance(0.5)
    assert polling.call("GET", "/health").status == 200
    reply = polling.call("GET", "/health?strict=1")
    assert (reply.status, reply.json["status"]) == (503, "stale")


def test_health_of_a_queue_that_is_rarely_listed_is_strictly_stale_after_three_polls(
    polling: Bench, intake: Intake, clock: Clock, settings: Callable[..., Settings]
) -> None:
    polling.server.api.use(settings(POLL_INTERVAL="60s"))
    intake.list.run_once()
    clock.advance(180)
    assert polling.call("GET", "/health?strict=1").status == 200
    clock.advance(0.5)
    assert polling.call("GET", "/health?strict=1").status == 503


def test_health_while_buildkite_fails_says_so_until_it_recovers(
    polling: Bench, intake: Intake, fake: FakeBuildkite
) -> None:
    fake.set_fault("list", status=503, body={"message": "back soon"}, times=1)
    intake.list.run_once()
    reply = polling.call("GET", "/health")
    assert reply.status == 200
    assert "503 from Buildkite: back soon" in reply.json["problems"][0]
    intake.list.run_once()
    assert polling.call("GET", "/health").json["problems"] == []


def fail(*_: object) -> None:
    raise StoreUnavailable("the disk is full")


def test_health_while_the_store_cannot_be_written_is_refused_until_it_can(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bench.store.rows, "probe", fail)
        bench.store.probe()
    assert bench.call("GET", "/health").refusal == (503, "store_unavailable")
    bench.store.probe()
    assert bench.call("GET", "/health").status == 200


def test_health_while_the_store_cannot_be_read_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.store.rows, "get", fail)
    assert bench.call("GET", "/health").refusal == (503, "store_unavailable")


def test_health_writes_nothing_to_the_store(bench: Bench) -> None:
    before = bench.store.sequence()
    for _ in range(3):
        assert bench.call("GET", "/health").status == 200
    assert bench.store.sequence() == before


# --- GET /jobs: claim ---


def test_claim_ready_job_answers_with_all_a_worker_needs(bench: Bench) -> None:
    bench.make_ready(rules=("queue=default", "arch=amd64"))
    reply = bench.call("GET", "/jobs?query=queue=default,arch=amd64&wait=30", headers=W1)
    assert reply.status == 200
    answer = reply.json
    assert re.fullmatch(r"[0-9a-f]{16,}", answer.pop("claim"))
    assert answer == {
        "uuid": UUID,
        "queue_key": "default",
        "agent_query_rules": ["queue=default", "arch=amd64"],
        "priority": 3,
        "scheduled_at": "2027-01-15T07:59:00.250Z",
        "reserved_at": "2027-01-15T08:00:00.000Z",
        "attempt": 1,
        "lease_seconds": 30,
        "pipeline": {"slug": "demo", "uuid": "pipeline-uuid"},
        "build": {"uuid": "build-uuid", "number": 7, "branch": "main"},
        "step": {"key": "unit"},
    }


@pytest.mark.parametrize("wait", ["", "&wait=0", "&wait=0.01", "&wait=.0"])
def test_claim_without_a_job_answers_204_without_body(bench: Bench, wait: str) -> None:
    reply = bench.call("GET", f"/jobs?query=queue=default{wait}", headers=W1)
    assert (reply.status, reply.text) == (204, b"")
    assert reply.headers["Content-Type"] is None


def test_claim_with_escaped_query_reads_it(bench: Bench) -> None:
    bench.make_ready(rules=("os=a b+c", "name=é"))
    query = quote("queue=default, os=a b+c, name=é")
    assert bench.claim(W1, f"wait=0&query={query}")["uuid"] == UUID


def test_claim_again_gets_the_same_job_and_claim(bench: Bench, held: str) -> None:
    bench.make_ready(OTHER)
    again = bench.claim(W1)
    assert (again["uuid"], again["claim"], again["attempt"]) == (UUID, held, 1)


def test_claim_without_worker_id_gets_a_job_each_time(bench: Bench) -> None:
    bench.make_ready()
    bench.make_ready(OTHER)
    assert {bench.claim()["uuid"], bench.claim()["uuid"]} == {UUID, OTHER}


@sqlite_only
@pytest.mark.parametrize(
    "query",
    [
        "",
        "?",
        "?query=",
        "?query=%20,%20,",
        "?wait=5",
        "?query=queue=a,queue=b",
        "?query=queue%3Da%2Cqueue%3Db",
        "?Query=queue=default",
        "?" + "a=1&" * 200 + "query=queue=default",
    ],
)
def test_claim_with_unusable_query_is_refused(bench: Bench, query: str) -> None:
    bench.make_ready()
    assert bench.call("GET", f"/jobs{query}").refusal == (400, "bad_query")
    assert bench.state() == "ready"


@sqlite_only
def test_claim_with_too_many_tags_is_refused_and_told_how_many_are_allowed(bench: Bench) -> None:
    bench.make_ready()
    reply = bench.call("GET", "/jobs?query=" + ",".join(f"t{number}" for number in range(2000)))
    assert reply.refusal == (400, "bad_query")
    assert reply.json["message"] == f"the query has 2000 tags; a worker may have {scheduler.MAX_TAGS}"


@sqlite_only
@pytest.mark.parametrize("wait", ["nan", "inf", "-inf", "-1", "-0.001", "61", "60.1", "1e9", "abc", "", "5s", "0x5"])
def test_claim_with_unusable_wait_is_refused(bench: Bench, wait: str) -> None:
    bench.make_ready()
    assert bench.call("GET", f"/jobs?query=queue=default&wait={wait}").refusal == (400, "bad_wait")
    assert bench.state() == "ready"


@sqlite_only
@pytest.mark.parametrize("name", ["X-Worker-ID", "X-Worker-Session"])
@pytest.mark.parametrize("value", ["x" * 201, "a\tb", "a\x7fb"], ids=["long", "tab", "delete"])
def test_claim_with_unusable_worker_header_is_refused(bench: Bench, name: str, value: str) -> None:
    bench.make_ready()
    reply = bench.call("GET", "/jobs?query=queue=default", headers={name: value})
    assert reply.refusal == (400, "bad_header")
    assert name in reply.json["message"]
    assert bench.state() == "ready"


# --- POST /jobs/{uuid}/touch ---


def test_touch_claim_renews_its_lease(bench: Bench, held: str) -> None:
    bench.clock.advance(20)
    reply = bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1)
    assert (reply.status, reply.json) == (200, {"state": "leased", "stop": False, "cancel": False, "lease_seconds": 30})
    job = bench.store.get(UUID)
    assert job and job.lease_expires_at == bench.clock.now() + 30


def test_touch_claim_that_does_not_acquire_says_stop_after_its_time(bench: Bench, held: str) -> None:
    stops = []
    for pause in (60, 60, 0.5, 20):
        bench.clock.advance(pause)
        bench.store.looked("default", bench.clock.now())
        stops.append(bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1).json["stop"])
    assert stops == [False, False, True, True]


def test_touch_claim_while_buildkite_does_not_say_who_acquired_never_says_stop(bench: Bench, held: str) -> None:
    bench.clock.advance(119)
    bench.store.looked("default", bench.clock.now())
    for pause in (10, 5000):  # an agent may have acquired it, and be at work
        bench.clock.advance(pause)
        assert not bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1).json["stop"]
    bench.store.looked("default", bench.clock.now())
    assert bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1).json["stop"]


def test_touch_claim_whose_agent_acquired_never_says_stop(bench: Bench, held: str) -> None:
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.clock.advance(5000)
    reply = bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1)
    assert (reply.status, reply.json) == (
        200,
        {"state": "running", "stop": False, "cancel": False, "lease_seconds": 30},
    )
    bench.learn(UUID, Finding.OVER, "finished")
    reply = bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1)
    assert (reply.status, reply.json) == (200, {"state": "done", "stop": False, "cancel": False, "lease_seconds": 30})


# --- POST /jobs/{uuid}/release ---


def test_release_claim_gives_the_job_back_with_the_reason(bench: Bench, held: str) -> None:
    reply = bench.call("POST", f"/jobs/{UUID}/release", {"claim": held, "reason": "no disk left"}, W1)
    assert (reply.status, reply.json) == (200, {"uuid": UUID, "released": True})
    job = bench.store.get(UUID)
    assert job and (job.state, job.claim) == ("reserving", None)
    assert "no disk left" in job.reason


def test_release_without_reason_is_accepted(bench: Bench, held: str) -> None:
    assert bench.call("POST", f"/jobs/{UUID}/release", {"claim": held}, W1).status == 200
    assert bench.state() == "reserving"


def test_release_job_that_an_agent_has_leaves_it_running(bench: Bench, held: str) -> None:
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": held}, W1)
    assert bench.state() == "running"


# --- POST /jobs/{uuid}/complete ---


def test_complete_claim_waits_for_buildkite_to_say_what_it_did(bench: Bench, held: str) -> None:
    body = {"claim": held, "exit_status": 1, "last_words": "fatal: no such token"}
    reply = bench.call("POST", f"/jobs/{UUID}/complete", body, W1)
    assert (reply.status, reply.json) == (200, {"uuid": UUID, "completed": True})
    job = bench.store.get(UUID)
    assert job and (job.state, job.exit_status) == ("reserving", 1)
    assert "fatal: no such token" in job.reason


@pytest.mark.parametrize("acquired", [False, True])
def test_complete_claim_again_and_again_gets_the_same_answer(bench: Bench, held: str, acquired: bool) -> None:
    if acquired:
        bench.learn(UUID, Finding.ACQUIRED, "running")
    replies = [bench.call("POST", f"/jobs/{UUID}/complete", {"claim": held, "exit_status": 0}, W1) for _ in range(3)]
    bench.learn(UUID, Finding.OVER, "finished")
    replies.append(bench.call("POST", f"/jobs/{UUID}/complete", {"claim": held, "exit_status": 0}, W1))
    assert [(reply.status, reply.json) for reply in replies] == [(200, {"uuid": UUID, "completed": True})] * 4
    job = bench.store.get(UUID)
    assert job and len(job.tries) == (0 if acquired else 1)


@pytest.mark.parametrize("body", [None, b"", b"{}", b" \r\n"], ids=ascii)
def test_complete_without_body_is_accepted_from_the_holder(bench: Bench, held: str, body: bytes | None) -> None:
    reply = bench.call("POST", f"/jobs/{UUID}/complete", body, W1)
    assert (reply.status, reply.json) == (200, {"uuid": UUID, "completed": True})
    assert bench.state() == "reserving"


#: A name alone is no proof: the session that claimed is known, and nobody else knows it.
NOT_W1 = [W2, {}, {"X-Worker-Session": W1["X-Worker-Session"]}, {"X-Worker-ID": W1["X-Worker-ID"]}, W1_AGAIN]


@pytest.mark.parametrize("headers", NOT_W1, ids=str)
def test_complete_without_body_is_refused_for_anybody_else(bench: Bench, held: str, headers: dict[str, str]) -> None:
    assert bench.call("POST", f"/jobs/{UUID}/complete", headers=headers).refusal == (409, "stale_claim")
    assert bench.state() == "leased"


def test_complete_without_body_of_worker_without_a_session_is_accepted(bench: Bench) -> None:
    bench.make_ready()
    named = {"X-Worker-ID": "w1"}
    bench.claim(named)
    assert bench.call("POST", f"/jobs/{UUID}/complete", headers=W2).refusal == (409, "stale_claim")
    assert bench.call("POST", f"/jobs/{UUID}/complete", headers=named).status == 200


@sqlite_only
@pytest.mark.parametrize("status", ["0", 1.5, True, None, [], 2**40], ids=repr)
def test_complete_with_unusable_exit_status_is_refused(bench: Bench, held: str, status: object) -> None:
    body = {"claim": held, "exit_status": status}
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, W1).refusal == (400, "bad_body")
    assert bench.state() == "leased"


# --- What the three have in common ---

ENDS = ("touch", "release", "complete")
every_end = pytest.mark.parametrize("verb", ENDS)


@every_end
def test_call_with_claim_that_does_not_hold_the_job_is_refused(bench: Bench, held: str, verb: str) -> None:
    bench.make_ready(OTHER)
    for uuid, claim in ((UUID, "0123456789abcdef"), (UUID, ""), (OTHER, held)):
        body = {"claim": claim, "exit_status": 0}
        assert bench.call("POST", f"/jobs/{uuid}/{verb}", body, W1).refusal == (409, "stale_claim")
    assert (bench.state(UUID), bench.state(OTHER)) == ("leased", "ready")


@every_end
def test_call_with_claim_that_was_given_back_is_refused(bench: Bench, held: str, verb: str) -> None:
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": held}, W1)
    bench.store.confirm([UUID], bench.store.sequence(), bench.clock.now() + 900, bench.clock.now())
    newer = bench.claim(W2)["claim"]
    body = {"claim": held, "exit_status": 0}
    assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, W1).refusal == (409, "stale_claim")
    job = bench.store.get(UUID)
    assert job and (job.state, job.claim) == ("leased", newer)


@every_end
def test_call_of_worker_that_was_started_again_elsewhere_is_refused(bench: Bench, held: str, verb: str) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1_AGAIN)
    body = {"claim": held, "exit_status": 0}
    assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, W1).refusal == (409, "worker_name_taken")


@pytest.mark.parametrize("uuid", [UNKNOWN, "7", "not-a-uuid", "%00", "%ff", "..", "é", "' OR 1=1 --", "x" * 300])
def test_call_for_unknown_job_is_refused(bench: Bench, held: str, uuid: str) -> None:
    for verb in ENDS:
        path = f"/jobs/{quote(uuid, safe='%')}/{verb}"
        assert bench.call("POST", path, {"claim": held, "exit_status": 0}, W1).refusal == (404, "unknown_job")


@sqlite_only
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nul",
        b"\xff\xfe",
        b"claim=1",
        b"[]",
        b'["claim"]',
        b'"claim"',
        b"7",
        b"null",
        b'{"exit_status": 0}',
        b'{"claim": null}',
        b'{"claim": 7}',
        b'{"claim": ["x"]}',
        pytest.param(b"[" * 60_000, id="nested too deep"),
    ],
    ids=ascii,
)
def test_call_with_unusable_body_is_refused(bench: Bench, held: str, body: bytes) -> None:
    for verb in ENDS:
        assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, W1).refusal == (400, "bad_body")
    assert bench.state() == "leased"


@sqlite_only
@pytest.mark.parametrize(("verb", "name"), [("release", "reason"), ("complete", "last_words")])
@pytest.mark.parametrize("value", [7, None, ["x"], {}], ids=repr)
def test_call_with_unusable_text_is_refused(bench: Bench, held: str, verb: str, name: str, value: object) -> None:
    body = {"claim": held, "exit_status": 0, name: value}
    assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, W1).refusal == (400, "bad_body")
    assert bench.state() == "leased"


@pytest.mark.parametrize(("verb", "name"), [("release", "reason"), ("complete", "last_words")])
@pytest.mark.parametrize(
    "text",
    ["\ud83d", "a\x00b\x1b[31m\n", "x" * 60_000, "❄" * 5000],
    ids=["half a letter", "control letters", "long", "letters of many bytes"],
)
def test_call_with_odd_text_ends_the_claim(bench: Bench, held: str, verb: str, name: str, text: str) -> None:
    body = {"claim": held, "exit_status": 1, name: text}
    assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, W1).status == 200
    assert bench.state() == "reserving"
    # However often it is given back, its row stays small: what a worker says is cut.
    assert len(bench.call("GET", f"/jobs/{UUID}").text) < 20_000


def test_call_with_uuid_in_capitals_finds_the_job(bench: Bench, held: str) -> None:
    reply = bench.call("POST", f"/jobs/{UUID.upper()}/touch", {"claim": held}, W1)
    assert (reply.status, reply.json["state"]) == (200, "leased")


# --- GET /jobs/{uuid} ---


def test_job_that_is_ready_tells_everything_known(bench: Bench) -> None:
    bench.make_ready(rules=("queue=default", "arch=amd64"))
    reply = bench.call("GET", f"/jobs/{UUID}")
    assert reply.status == 200
    assert {name: value for name, value in reply.json.items() if value is not None} == {
        "uuid": UUID,
        "queue_key": "default",
        "agent_query_rules": ["queue=default", "arch=amd64"],
        "rule_set": "queue=default,arch=amd64",
        "priority": 3,
        "scheduled_at": "2027-01-15T07:59:00.250Z",
        "put_at": "2027-01-15T08:00:00.000Z",
        "state": "ready",
        "reason": "reserved",
        "reserved_at": "2027-01-15T08:00:00.000Z",
        "reservation_expires_at": "2027-01-15T08:15:00.000Z",
        "claims": 0,
        "attempts": 0,
        "tries": [],
        "why": "no_worker",
        "why_text": "no live worker serves queue default",
        "ahead": 0,
        "story": [
            {"at": "2027-01-15T07:59:00.250Z", "what": "scheduled"},
            {"at": "2027-01-15T08:00:00.000Z", "what": "put"},
            {"at": "2027-01-15T08:00:00.000Z", "what": "reserved"},
        ],
        **ABOUT,
    }


def test_job_through_its_life_tells_times_and_tries_but_no_claim_or_session(bench: Bench, held: str) -> None:
    seen = [bench.call("GET", f"/jobs/{UUID}")]
    assert (seen[0].json["worker"], seen[0].json["lease_expires_at"]) == ("w1", "2027-01-15T08:00:30.000Z")
    bench.clock.advance(10)
    bench.call("POST", f"/jobs/{UUID}/complete", {"claim": held, "exit_status": 1, "last_words": "oops"}, W1)
    seen.append(bench.call("GET", f"/jobs/{UUID}"))
    (ended,) = seen[1].json["tries"]
    assert ended["worker"] == "w1"
    assert (ended["claimed_at"], ended["ended_at"]) == ("2027-01-15T08:00:00.000Z", "2027-01-15T08:00:10.000Z")
    assert (ended["how"], ended["exit_status"]) == ("complete", 1)
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    newer = bench.claim(W2)["claim"]
    bench.learn(UUID, Finding.ACQUIRED, "running")
    seen.append(bench.call("GET", f"/jobs/{UUID}"))
    bench.call("POST", f"/jobs/{UUID}/complete", {"claim": newer, "exit_status": 0}, W2)
    bench.learn(UUID, Finding.OVER, "finished")
    seen.append(bench.call("GET", f"/jobs/{UUID}"))
    assert [reply.json["state"] for reply in seen] == ["leased", "reserving", "running", "done"]
    assert (seen[3].json["outcome"], seen[3].json["done_at"]) == ("ran", "2027-01-15T08:00:10.000Z")
    for secret in (held, newer, "secret-session"):
        assert not any(secret.encode() in reply.text for reply in seen)


@pytest.mark.parametrize("uuid", [UNKNOWN, "not-a-uuid", "%00", "%ff"])
def test_job_that_is_unknown_is_refused(bench: Bench, uuid: str) -> None:
    assert bench.call("GET", f"/jobs/{uuid}").refusal == (404, "unknown_job")


# --- GET /stats ---


def test_stats_of_nothing_are_zeros(bench: Bench) -> None:
    reply = bench.call("GET", "/stats")
    assert reply.status == 200
    assert reply.json == {
        "queues": {},
        "total": 0,
        "waiting": [],
        "states": STATES,
        "outcomes": {"ran": 0, "dropped": 0, "failed": 0, "stopped": 0, "refused": 0, "succeeded": 0},
        "totals": dict.fromkeys(
            ("since_start", "all_time"),
            {"ran": 0, "dropped": 0, "failed": 0, "stopped": 0, "refused": 0, "succeeded": 0},
        ),
        "paused": [],
        "running": [],
        "workers": [],
        "hosts": [],
        "unmatched": {},
        "uptime_seconds": 0.0,
    }


def test_stats_count_what_waits_by_rule_set_and_who_works(bench: Bench) -> None:
    for n, rules in enumerate([("arch=amd64", "queue=default"), ("arch=amd64",), ("os=mac", "gpu"), ()]):
        bench.make_ready(f"018f0000-0000-4000-8000-00000000001{n}", rules=rules)
    bench.make_ready(priority=9)
    bench.make_ready(OTHER, priority=8)
    assert bench.claim(W1)["uuid"] == UUID
    bench.learn(UUID, Finding.ACQUIRED, "running")
    assert bench.claim(W2, "query=queue=default,os=linux")["uuid"] == OTHER
    bench.store.pause("default", True, bench.clock.now())
    bench.clock.advance(12)
    reply = bench.call("GET", "/stats")
    assert reply.json == {
        "queues": {"queue=default,arch=amd64": 2, "queue=default,gpu=*,os=mac": 1, "queue=default": 1},
        "total": 4,
        "waiting": [
            {
                "rules": rules,
                "jobs": jobs,
                "uuid": f"018f0000-0000-4000-8000-00000000001{oldest}",
                "oldest_wait_seconds": 71.8,
                "why": "queue_paused",
                "why_text": "queue default is paused",
                "by": "buildkite",
            }
            for rules, jobs, oldest in [
                ("queue=default", 1, 3),
                ("queue=default,arch=amd64", 2, 0),
                ("queue=default,gpu=*,os=mac", 1, 2),
            ]
        ],
        "states": STATES | {"ready": 4, "leased": 1, "running": 1},
        "outcomes": {"ran": 0, "dropped": 0, "failed": 0, "stopped": 0, "refused": 0, "succeeded": 0},
        "totals": dict.fromkeys(
            ("since_start", "all_time"),
            {"ran": 0, "dropped": 0, "failed": 0, "stopped": 0, "refused": 0, "succeeded": 0},
        ),
        "paused": ["default"],
        "running": [
            {"uuid": UUID, "worker": "w1", "queue_key": "default", "since": "2027-01-15T08:00:00.000Z"},
        ],
        "workers": [
            {
                "name": "w1",
                "state": "working",
                "tags": "",
                "queues": ["_default", "default"],
                "job": UUID,
                "claims": 1,
                "jobs_done": 0,
                "last_seen_at": "2027-01-15T08:00:00.000Z",
                "version": None,
                "agent": None,
                "agent_supported_until": None,
                "free_bytes": None,
                "strays": 0,
                "idle_seconds": 0.0,
            },
            {
                "name": "w2",
                "state": "working",
                "tags": "os=linux",
                "queues": ["_default", "default"],
                "job": OTHER,
                "claims": 1,
                "jobs_done": 0,
                "last_seen_at": "2027-01-15T08:00:00.000Z",
                "version": None,
                "agent": None,
                "agent_supported_until": None,
                "free_bytes": None,
                "strays": 0,
                "idle_seconds": 0.0,
            },
        ],
        "hosts": [],
        "unmatched": {"queue=default,arch=amd64": 2, "queue=default,gpu=*,os=mac": 1},
        "uptime_seconds": 12.0,
    }
    assert b"secret-session" not in reply.text


def test_stats_tell_idle_failing_and_absent_workers(bench: Bench, waits: queue.SimpleQueue[str]) -> None:
    bench.make_ready()
    for headers in (W1, W2):
        bench.call("GET", "/jobs?query=os=linux", headers=headers)
    claim = bench.claim(W1)["claim"]
    body = {"claim": claim, "exit_status": 1}
    bench.call("POST", f"/jobs/{UUID}/complete", body, W1)
    waiting = bench.connect()
    waiting.request("GET", "/jobs?query=os=mac&wait=60", headers={"X-Worker-ID": "w3"})
    assert waits.get(timeout=PATIENCE) == "w3"
    workers = bench.call("GET", "/stats").json["workers"]
    assert [(worker["name"], worker["state"]) for worker in workers] == [
        ("w1", "failing"),
        ("w2", "away"),
        ("w3", "idle"),
    ]


# --- Text that reaches logs, terminals and build pages ---

#: Letters that turn a line around, cannot be seen, or are orders to a terminal.
UNPRINTABLE = "\u202e\u2066\u200b\u200d\u2060\ufeff\u00ad\x1b\x07\x7f\x9b\u2028\ud800"


@sqlite_only
@pytest.mark.parametrize("letter", list(UNPRINTABLE), ids=ascii)
def test_call_with_text_that_cannot_be_printed_keeps_it_escaped(bench: Bench, held: str, letter: str) -> None:
    body = {"claim": held, "exit_status": 1, "last_words": f"gr\u00fcn\tone{letter}two\nthree"}
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, W1).status == 200
    told = bench.call("GET", f"/jobs/{UUID}").json["tries"][0]["reason"]
    assert letter not in told
    assert told.startswith("agent exited 1: gr\u00fcn\tone") and told.endswith("two\nthree")


@sqlite_only
def test_call_with_secret_in_its_query_logs_the_path_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "scheduler")
    bench.call("GET", "/stats?token=secret-1")
    monkeypatch.setattr(bench.store.rows, "get", lambda _: 1 / 0)
    assert bench.call("GET", "/health?token=secret-2").status == 500
    # It is logged after the answer has gone.
    wait_until(lambda: "answered method=GET path=/health status=500" in caplog.text)
    assert "answered method=GET path=/stats status=200" in caplog.text
    assert "secret" not in caplog.text


@sqlite_only
def test_call_with_long_nonsense_is_quoted_in_part(bench: Bench) -> None:
    for path in ("/" + "x" * 8000, f"/jobs?query=queue=default&wait={'x' * 8000}", f"/queue?state={'x' * 8000}"):
        assert len(bench.call("GET", path).text) < 2000


@pytest.mark.parametrize("script", [scheduler, worker])
@pytest.mark.parametrize("letter", [*UNPRINTABLE, "\u3164", "\n", "\r"], ids=ascii)
def test_log_text_that_cannot_be_printed_escapes_it(
    script: Any, letter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (f"one{letter}two", f"some one{letter}two more"):
        told = script.event("word", key=text)
        assert told.isprintable() and told.isascii()
        assert json.loads(told.removeprefix("word key=")) == text
    record = logging.LogRecord("other", logging.WARNING, "", 0, f"a library's one{letter}two", (), None)
    assert script.LogFormatter().format(record).isprintable() or letter == "\u3164"
    script.complain(f"wrong: one{letter}two")
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("script", [scheduler, worker])
def test_log_text_that_is_long_is_cut(script: Any) -> None:
    assert script.event("word", key="x" * 300_000) == "word key=" + "x" * script.VALUE_CHARACTERS
    assert script.event("word", key="plain", none=None, number=1) == "word key=plain number=1"


# --- Paths, methods, and what is no request at all ---


@sqlite_only
@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/job",
        "/jobs/",
        f"/jobs/{UUID}/",
        f"/jobs/{UUID}/steal",
        f"/jobs/{UUID}/touch/x",
        "/health/",
        "/Health",
        "/%68ealth",
        "/x?query=queue=default",
    ],
)
def test_call_unknown_path_is_refused(bench: Bench, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert bench.call(method, path).refusal == (404, "not_found")


@sqlite_only
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/jobs?query=queue=default", "GET"),
        ("DELETE", f"/jobs/{UUID}", "GET, HEAD"),
        ("PUT", "/stats", "GET, HEAD"),
        ("HEAD", "/webhook", "POST"),
        ("GET", f"/jobs/{UUID}/touch", "POST"),
        ("PUT", f"/jobs/{UUID}/release", "POST"),
        ("PATCH", f"/jobs/{UUID}/complete", "POST"),
        ("OPTIONS", "/jobs", "GET"),
    ],
)
def test_call_with_wrong_method_is_refused_with_the_right_one(
    bench: Bench, held: str, method: str, path: str, allow: str
) -> None:
    reply = bench.call(method, path, {"claim": held})
    assert reply.status == 405
    assert method == "HEAD" or reply.refusal == (405, "method_not_allowed")
    assert reply.headers["Allow"] == allow
    assert bench.state() == "leased"


@sqlite_only
@pytest.mark.parametrize("path", ["/health", f"/jobs/{UUID}", "/queue", "/stats", "/metrics", "/nowhere"])
def test_call_with_head_is_answered_as_get_without_the_body_and_keeps_the_connection(bench: Bench, path: str) -> None:
    bench.make_ready()
    told, head = bench.call("GET", path), bench.call("HEAD", path)
    assert (head.status, head.text) == (told.status, b"")
    assert head.headers["Content-Type"] == told.headers["Content-Type"]
    assert bench.call("GET", "/health").status == 200


def test_claim_with_head_is_refused_and_claims_nothing(bench: Bench) -> None:
    bench.make_ready()
    reply = bench.call("HEAD", "/jobs?query=queue=default")
    assert (reply.status, reply.headers["Allow"], reply.text) == (405, "GET", b"")
    assert bench.state() == "ready"


@sqlite_only
@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/stats", 200),
        ("HTTPS://127.0.0.1:18888/stats?x=http://y", 200),
        ("http://localhost", 200),
        ("http://localhost?strict=1", 200),
        ("http://elsewhere/stats", 403),
        ("http://localhost@elsewhere/stats", 404),
        ("ftp://localhost/stats", 404),
        ("*", 404),
        ("stats", 404),
    ],
)
def test_call_in_absolute_form_is_for_the_host_in_it(bench: Bench, target: str, status: int) -> None:
    """As a proxy sends it. What `Host` says then does not count (RFC 9112, 3.2.2)."""
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert bench.send(head.encode()).status == status


@sqlite_only
def test_claim_in_absolute_form_reads_its_query(bench: Bench) -> None:
    bench.make_ready()
    head = "GET http://localhost/jobs?query=queue=default HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert bench.send(head.encode()).json["uuid"] == UUID


@sqlite_only
def test_call_with_too_large_body_is_refused_before_it_is_read(bench: Bench, held: str) -> None:
    head = f"POST /jobs/{UUID}/touch HTTP/1.1\r\n{JSON_TYPE}Content-Length: 65537\r\n\r\n"
    reply = bench.send(head.encode())
    assert reply.refusal == (413, "body_too_large")
    assert reply.headers["Connection"] == "close"


def test_call_with_largest_body_is_served(bench: Bench, held: str) -> None:
    body = {"claim": held, "padding": ""}
    body["padding"] = "x" * (65536 - len(json.dumps(body)))
    assert bench.call("POST", f"/jobs/{UUID}/touch", body, W1).status == 200


@sqlite_only
@pytest.mark.parametrize(
    "header",
    [
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "Content-Length: abc",
        "Content-Length: -1",
        "Content-Length: 1_0",
        "Content-Length: +2",
        "Content-Length: 2, 2",
        "Content-Length: 9999999999999",
    ],
)
def test_call_without_usable_length_is_refused(bench: Bench, header: str) -> None:
    reply = bench.send(f"POST /jobs/{UUID}/touch HTTP/1.1\r\n{header}\r\n\r\n".encode())
    assert reply.refusal == (411, "length_required")
    assert reply.headers["Connection"] == "close"


#: What stands before the head's last line where a body follows.
JSON_TYPE = "Content-Type: application/json\r\n"
CHUNKED = f"POST /jobs/{UUID}/touch HTTP/1.1\r\n{JSON_TYPE}Transfer-Encoding: chunked\r\n\r\n".encode()


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


@sqlite_only
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_call_with_body_in_chunks_is_served_and_closed(bench: Bench, held: str, size: int) -> None:
    text = json.dumps({"claim": held}).encode()
    body = chunks(*(text[start : start + size] for start in range(0, len(text), size)))
    for sent in (body, body.replace(b"\r\n", b" ;a=b\r\n", 1), body[:-2] + b"Trailer: x\r\n\r\n"):
        # What follows is no request of this connection, whoever wrote it.
        reply = bench.send(CHUNKED + sent + b"GET /stats HTTP/1.1\r\n\r\n")
        assert (reply.status, reply.headers["Connection"]) == (200, "close")


@sqlite_only
@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (chunks(b"x" * 40_000, b"x" * 40_000), (413, "body_too_large")),
        (chunks(b"x" * 65_537), (413, "body_too_large")),
        (b"fffffff\r\n", (413, "body_too_large")),
        (b"ffffffff\r\n", (400, "bad_body")),
        (b"-1\r\n", (400, "bad_body")),
        (b"0x2\r\n{}\r\n0\r\n\r\n", (400, "bad_body")),
        (b"\r\n{}\r\n0\r\n\r\n", (400, "bad_body")),
        (b"2\n{}\n0\n\n", (400, "bad_body")),
        (b"2\r\n{}x\r\n0\r\n\r\n", (400, "bad_body")),
        (b"2;" + b"a" * 1000 + b"\r\n{}\r\n0\r\n\r\n", (400, "bad_body")),
        (b"2\r\n{", (400, "bad_body")),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_call_with_body_in_wrong_chunks_is_refused(bench: Bench, body: bytes, refusal: tuple[int, str]) -> None:
    assert bench.send(CHUNKED + body, half_close=True).refusal == refusal


@sqlite_only
@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/json-seq"])
def test_call_with_body_that_a_form_can_send_is_refused(bench: Bench, held: str, kind: str) -> None:
    body = json.dumps({"claim": held})
    headers = W1 | {"Content-Type": kind}
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, headers).refusal == (415, "unsupported_media_type")
    assert bench.state() == "leased"
    headers["Content-Type"] = "Application/JSON; charset=utf-8"
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, headers).status == 200


@sqlite_only
def test_call_whose_body_ends_early_is_refused(bench: Bench, held: str) -> None:
    head = f"POST /jobs/{UUID}/touch HTTP/1.1\r\n{JSON_TYPE}Content-Length: 50\r\n\r\n"
    reply = bench.send(head.encode() + b'{"claim"', half_close=True)
    assert reply.refusal == (400, "bad_body")


@sqlite_only
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /health HTTP/1.1 and more\r\n\r\n", 400),
        (b"GET /health FTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
        (b"GET /health HTTP/2.0\r\n\r\n", 505),
        (b"BREW /health HTTP/1.1\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nContent-Length : 3\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere\r\n\r\n", 400),
        (b"GET /health\0 HTTP/1.1\r\n\r\n", 400),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_call_that_is_no_request_is_refused_as_json(bench: Bench, text: bytes, status: int) -> None:
    reply = bench.send(text)
    assert reply.refusal == (status, "bad_request")
    assert reply.headers["Connection"] == "close"


@pytest.mark.parametrize("start", [b"GET /", b"GET /health HTTP/1.1\r\nA: "], ids=["line", "header"])
def test_call_with_too_large_head_is_refused_when_so_much_has_come(bench: Bench, start: bytes) -> None:
    reply = bench.send(start.ljust(scheduler.HEAD_BYTES, b"x"))
    assert reply.refusal == (431, "head_too_large")
    assert reply.headers["Connection"] == "close"
    assert bench.call("GET", "/health").status == 200


def test_call_of_older_http_is_served_and_closed(bench: Bench) -> None:
    assert bench.send(b"GET /health HTTP/1.0\r\n\r\n").json["status"] == "ok"


def test_call_that_asks_to_close_is_served_and_closed(bench: Bench) -> None:
    reply = bench.send(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert (reply.status, reply.headers["Connection"]) == (200, "close")


def test_call_again_and_again_keeps_one_connection_also_after_errors(bench: Bench) -> None:
    connection = bench.connect()
    connection.call("GET", "/health")
    port = connection.sock.getsockname()
    calls: list[tuple[str, str, Any, int]] = [
        ("GET", "/stats", None, 200),
        ("GET", "/nowhere", None, 404),
        ("DELETE", "/health", None, 405),
        ("POST", f"/jobs/{UNKNOWN}/touch", {"claim": "x"}, 404),
        ("POST", f"/jobs/{UNKNOWN}/touch", b"{", 400),
        ("POST", f"/jobs/{UNKNOWN}/touch", b"x" * 60_000, 400),
        ("GET", "/jobs?query=queue=default", None, 204),
        ("GET", "/jobs?query=", None, 400),
        ("HEAD", "/health", None, 200),
        ("GET", "/health", {"nobody": "wants this"}, 200),
    ]
    for method, path, body, status in calls * 3:
        assert connection.call(method, path, body).status == status
        assert connection.sock and connection.sock.getsockname() == port


@sqlite_only
@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/health", 405)])
def test_call_with_body_that_no_route_takes_is_answered_without_it(bench: Bench, path: str, status: int) -> None:
    reply = bench.send(f"POST {path} HTTP/1.1\r\nContent-Length: 60000\r\n\r\n".encode())
    assert (reply.status, reply.headers["Connection"]) == (status, "close")
    for _ in range(50):  # one that sends it all the same has its answer, not a connection that was reset
        assert bench.call("POST", path, b"x" * 60_000).status == status


def test_call_two_at_once_on_one_connection_answers_both_in_order(bench: Bench) -> None:
    text = b"GET /nowhere HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as connection:
        connection.sendall(text)
        with connection.makefile("rb") as answers:
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answers.read())
    assert statuses == [b"404", b"200"]


# --- The token ---


@pytest.fixture
def guarded(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings(), token="stack-secret-1") as bench:
        bench.make_ready()
        yield bench


ROUTES = [
    ("GET", "/jobs?query=queue=default"),
    ("GET", f"/jobs/{UUID}"),
    ("POST", f"/jobs/{UUID}/touch"),
    ("POST", f"/jobs/{UUID}/release"),
    ("POST", f"/jobs/{UUID}/complete"),
    ("GET", "/queue"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
]


@sqlite_only
@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer stack-secret-",
        "Bearer stack-secret-12",
        "Token stack-secret-1",
        "stack-secret-1",
        "Basic c3RhY2s6c2VjcmV0",
        "Bearer \xff\xfe",
    ],
    ids=ascii,
)
def test_call_without_the_right_token_is_refused(guarded: Bench, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in ROUTES:
        reply = guarded.call(method, path, {} if method == "POST" else None, headers)
        assert reply.refusal == (401, "unauthorized")
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert b"stack-secret" not in reply.text
    assert guarded.state() == "ready"


def test_call_with_the_right_token_is_served(guarded: Bench) -> None:
    right = {"Authorization": "Bearer stack-secret-1"}
    claim = guarded.claim(W1 | right)["claim"]
    for method, path in ROUTES[1:]:
        body = {"claim": claim, "exit_status": 0} if method == "POST" else None
        # After its release the claim is stale: that is no question of the token.
        assert guarded.call(method, path, body, right).status in (200, 409)


def test_health_needs_no_token(guarded: Bench) -> None:
    assert guarded.call("GET", "/health").status == 200


# --- Claims that wait ---


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """The name of each worker whose claim begins to wait, at that moment."""
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Waiter(scheduler.ParkedClaim):
        def __init__(self, worker: Worker, is_gone: Callable[[], bool]):
            super().__init__(worker, is_gone)
            wait = self.woken.wait

            def announced(timeout: float | None = None) -> bool:
                names.put(worker.name)
                return wait(timeout)

            self.woken.wait = announced  # type: ignore[method-assign]

    monkeypatch.setattr(scheduler, "ParkedClaim", Waiter)
    return names


def park(bench: Bench, waits: queue.SimpleQueue[str], name: str) -> Connection:
    """A connection whose claim has begun to wait."""
    connection = bench.connect()
    connection.request("GET", "/jobs?query=queue=default&wait=60", headers={"X-Worker-ID": name})
    assert waits.get(timeout=PATIENCE) == name
    return connection


def test_claim_that_waits_is_answered_when_a_job_is_offered(bench: Bench, waits: queue.SimpleQueue[str]) -> None:
    connection = park(bench, waits, "w1")
    bench.dispatcher.offer([bench.make_ready()])
    assert json.loads(connection.getresponse().read())["uuid"] == UUID
    assert connection.call("GET", "/health").status == 200


@pytest.mark.parametrize("linger", [b"", struct.pack("ii", 1, 0)], ids=["closed", "reset"])
def test_claim_whose_client_hangs_up_while_it_waits_swallows_no_job(
    bench: Bench, waits: queue.SimpleQueue[str], linger: bytes
) -> None:
    gone, there = park(bench, waits, "w1"), park(bench, waits, "w2")
    if linger:
        gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    gone.close()
    bench.dispatcher.offer([bench.make_ready()])
    answer = json.loads(there.getresponse().read())
    assert (answer["uuid"], answer["attempt"]) == (UUID, 1)


@pytest.mark.parametrize("parked", [False, True])
def test_claim_whose_answer_cannot_be_written_gives_the_job_back(
    bench: Bench, waits: queue.SimpleQueue[str], monkeypatch: pytest.MonkeyPatch, parked: bool
) -> None:
    connection, claim, withdraw = bench.connect(), bench.store.claim, bench.store.withdraw
    released = threading.Event()

    def broken_right_after(*arguments: Any) -> Job | None:
        if job := claim(*arguments):
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        return job

    def noted(*arguments: Any) -> Job:
        job = withdraw(*arguments)
        released.set()
        return job

    monkeypatch.setattr(bench.store, "claim", broken_right_after)
    monkeypatch.setattr(bench.store, "withdraw", noted)
    if not parked:
        bench.make_ready()
    connection.request("GET", "/jobs?query=queue=default&wait=60", headers=W1)
    if parked:
        waits.get(timeout=PATIENCE)
        bench.dispatcher.offer([bench.make_ready()])
    assert released.wait(PATIENCE)
    job = bench.store.get(UUID)
    assert job and (job.state, job.attempts) == ("reserving", 0)


def test_claim_that_waits_and_whose_client_does_not_read_holds_up_no_offer(
    bench: Bench, waits: queue.SimpleQueue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "DEPARTURE_SECONDS", PATIENCE / 3)
    words = "x" * 10_000_000  # more than the system holds for who does not read
    for bound in ("TEXT_BYTES", "CLAIM_BYTES"):
        monkeypatch.setattr(scheduler, bound, 2 * len(words))
    monkeypatch.setitem(ABOUT, "build", {"branch": words})
    connection = park(bench, waits, "w1")
    bench.dispatcher.offer([bench.make_ready()])
    assert bench.state() == "leased"
    answer = json.loads(connection.getresponse().read())
    assert (answer["uuid"], answer["build"]["branch"] == words) == (UUID, True)
    assert connection.call("POST", f"/jobs/{UUID}/touch", {"claim": answer["claim"]}, {}).status == 200


# --- Jobs whose claims cannot be answered ---


def break_answers(monkeypatch: pytest.MonkeyPatch, error: Exception, uuid: str = UUID) -> None:
    """No answer about this job can be made."""
    described = Api._described

    def broken(api: Api, job: Job) -> dict[str, Any]:
        if job.uuid == uuid:
            raise error
        return described(api, job)

    monkeypatch.setattr(Api, "_described", broken)


def confirm_again(bench: Bench) -> list[Job]:
    """Buildkite says of all that it is asked about that it is ours and free."""
    now = bench.clock.now()
    return bench.store.confirm(
        bench.store.unconfirmed("default", 0.0, 100, now), bench.store.sequence(), now + 900, now
    )


@pytest.mark.parametrize("error", [ValueError("year 0"), RecursionError(), MemoryError(), KeyError("slug")], ids=repr)
def test_claim_whose_answer_cannot_be_made_gets_the_next_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    break_answers(monkeypatch, error)
    bench.make_ready()
    bench.make_ready(OTHER, priority=0)
    assert bench.claim(W1)["uuid"] == OTHER
    job = bench.store.get(UUID)
    assert job and (job.state, job.attempts, job.held_by) == ("reserving", 0, None)
    assert [(end["code"], end["worker"], end["counted"]) for end in job.tries] == [("unanswerable", "w1", False)]
    assert type(error).__name__ in job.reason
    assert [r.levelname for r in caplog.records if r.getMessage().startswith("unanswerable")] == ["ERROR"]


def test_claim_too_large_for_a_worker_to_read_gets_the_next_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scheduler.CLAIM_BYTES < worker.ANSWER_BYTES
    monkeypatch.setattr(scheduler, "TEXT_BYTES", scheduler.CLAIM_BYTES)
    with monkeypatch.context() as patch:
        patch.setitem(ABOUT, "step", {"key": "x" * scheduler.CLAIM_BYTES})
        bench.make_ready()
    bench.make_ready(OTHER, priority=0)
    assert bench.claim(W1)["uuid"] == OTHER
    assert bench.state() == "reserving"


def test_claim_whose_answer_cannot_be_made_again_and_again_puts_the_job_aside_and_says_so(
    polling: Bench, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    polling.store.on_move = lambda move, _: intake.on_move(move)
    break_answers(monkeypatch, ValueError("year 0"))
    polling.make_ready()
    seconds = []
    for number in range(9):
        assert polling.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
        job = polling.store.get(UUID)
        assert job and (job.state, len(job.tries)) == ("reserving", number + 1)
        seconds.append(job.not_before - polling.clock.now() if job.not_before else 0)
        assert (job.held_reason == "put_aside") == (number >= 2)
        told = polling.call("GET", f"/jobs/{UUID}").json
        problems = polling.call("GET", "/health").json["problems"]
        if number >= 2:
            assert (told["why"], told["held_until"]) == ("put_aside", scheduler.rfc3339(job.held_until))
            assert "ValueError: year 0" in told["why_text"] and "ValueError: year 0" in problems[0]
            assert problems[0].startswith(f"queue default: jobs put aside: 1; the first is {UUID} until ")
            polling.clock.advance(job.not_before - polling.clock.now() - 1)
            assert confirm_again(polling) == []
            polling.clock.advance(1)
        else:
            assert (told["why"], problems) == ("reserving", [])
        assert [each.state for each in confirm_again(polling)] == ["ready"]
    assert seconds == [0, 0, 60, 120, 240, 480, 960, 1920, 3600]
    assert polling.call("GET", "/health").json["problems"] == []
    # What it was held for is gone with the fault.
    monkeypatch.undo()
    assert polling.claim(W1)["attempt"] == 10
    job = polling.store.get(UUID)
    assert job and (job.held_by, job.held_reason, job.held_until) == (None, None, None)


def test_claim_that_waits_and_whose_answer_cannot_be_made_waits_on_for_the_next_job(
    bench: Bench, waits: queue.SimpleQueue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_answers(monkeypatch, ValueError("year 0"))
    connections = [park(bench, waits, name) for name in ("w1", "w2", "w3")]
    third = "018f0000-0000-4000-8000-000000000003"
    bench.dispatcher.offer([bench.make_ready(), bench.make_ready(OTHER), bench.make_ready(third)])
    waits.get(timeout=PATIENCE)  # the one that got the first waits again
    assert bench.state() == "reserving"
    fourth = "018f0000-0000-4000-8000-000000000004"
    bench.dispatcher.offer([bench.make_ready(fourth)])
    given = [json.loads(connection.getresponse().read())["uuid"] for connection in connections]
    assert sorted(given) == [OTHER, third, fourth]


# --- Whatever Buildkite lists can be told ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("half a letter: \ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LONG = st.builds(
    lambda letter, count: letter * count, st.sampled_from("x\u00e9\x01,=*"), st.sampled_from([300, 600, 1100, 20_000])
)
TIMES = st.sampled_from(["0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00", "2027-01-15T08:00:00", "now"])
RULE = st.sampled_from(["queue=default", "arch=amd64", "gpu", "os=*", "*", "*=gpu", "=foo", " ", "a,b=c\\", "\x00=\n"])


def an_object_of(*members: str) -> st.SearchStrategy[Any]:
    return JSON | LONG | st.fixed_dictionaries({}, optional={name: JSON | LONG for name in (*members, "other")})


LISTED = st.fixed_dictionaries(
    {"id": st.just(UUID)},
    optional={
        "priority": JSON | LONG,
        "agent_query_rules": JSON | LONG | st.lists(RULE | LONG | JSON, max_size=5),
        "scheduled_at": JSON | TIMES | st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
        "runnable_at": JSON | TIMES,
        "pipeline": an_object_of("slug", "uuid"),
        "build": an_object_of("uuid", "number", "branch"),
        "step": an_object_of("key"),
        "other": JSON | LONG,
    },
)


def test_list_whatever_is_taken_in_can_be_answered_on_every_route(bench: Bench) -> None:
    """What a worker reads is within its bound, and what people read is small."""
    numbers = itertools.count(1)

    @hypothesis.settings(max_examples=200 if LONG_RUN else 20, deadline=None)
    @hypothesis.given(LISTED)
    def try_one(raw: dict[str, Any]) -> None:
        uuid = f"018f0000-0000-4000-8000-{next(numbers):012}"
        now = bench.clock.now()
        listed = Job.from_api("default", raw | {"id": uuid}, now)
        bench.store.put([listed], bench.store.sequence(), now)
        bench.clock.advance(max(0.0, listed.not_before - now) if listed.not_before < now + 1e6 else 0.0)
        assert bench.call("GET", f"/jobs/{uuid}").status == 200
        confirmed = confirm_again(bench)
        assert [job.uuid for job in confirmed] == ([uuid] if listed.not_before <= bench.clock.now() else [])
        for path in (f"/jobs/{uuid}", "/queue", "/queue?state=reserving", "/stats", "/metrics", "/health"):
            reply = bench.call("GET", path)
            assert (reply.status, len(reply.text) < 200_000) == (200, True), path
        rules = RuleSet.read(listed.rule_set)
        assert str(rules) == listed.rule_set
        fitting = Profile(frozenset({"default"}), rules.tags, rules.keys)
        job = bench.dispatcher.claim(Worker("w1", "s", fitting), 0)
        assert bool(job) is bool(confirmed and not rules.unread)
        if job:
            answer = bench.server.api._claimed(job, needs_token=False)
            assert answer and isinstance(answer.body, bytes) and len(answer.body) < worker.ANSWER_BYTES / 16
            assert json.loads(answer.body)["uuid"] == job.uuid == uuid
            answer.delivered()
        assert bench.call("GET", "/stats").status == 200
        bench.learn(uuid, Finding.OVER, "finished")
        assert bench.call("GET", f"/jobs/{uuid}").status == 200
        assert bench.state(uuid) == "done"

    try_one()


def test_health_tells_of_jobs_whose_rules_are_not_understood(bench: Bench) -> None:
    bench.make_ready(rules=("*=gpu",))
    bench.make_ready(OTHER, rules=(" ",))
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    text = "waiting jobs with rules that are not understood, so no worker matches them"
    assert bench.call("GET", "/health").json["problems"] == [f"{text}: 2; the first: queue=default,*=gpu"]
    told = bench.call("GET", f"/jobs/{UUID}").json
    assert told["why"] == "rules_not_understood"
    assert told["why_text"] == "the rule *=gpu is not understood, so no worker matches"
    bench.learn(UUID, Finding.OVER, "canceled")
    assert bench.call("GET", "/health").json["problems"] == [f"{text}: 1; the first: queue=default,="]


def test_health_of_many_jobs_whose_rules_are_not_understood_stays_short(bench: Bench) -> None:
    for number in range(50):
        bench.make_ready(f"018f0000-0000-4000-8000-{number:012}", rules=(f"=foo{number}", "x" * 400))
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    assert len(bench.call("GET", "/health").text) < 1000


def test_claim_of_hundreds_that_wait_gives_each_its_job(bench: Bench, waits: queue.SimpleQueue[str]) -> None:
    connections = [park(bench, waits, f"w{n}") for n in range(200)]
    jobs = [bench.make_ready(f"018f0000-0000-4000-8000-{n:012}") for n in range(200)]
    bench.dispatcher.offer(jobs)
    answers = [json.loads(connection.getresponse().read())["uuid"] for connection in connections]
    assert sorted(answers) == [job.uuid for job in jobs]


def test_claim_while_stopping_is_refused_and_those_that_wait_are_answered(
    bench: Bench, waits: queue.SimpleQueue[str], held: str
) -> None:
    connection = park(bench, waits, "w2")
    bench.dispatcher.stop()
    assert connection.getresponse().status == 204
    reply = bench.call("GET", "/jobs?query=queue=default&wait=60", headers=W1)
    assert reply.refusal == (503, "stopping")
    assert reply.headers["Retry-After"] == "1"
    assert bench.call("POST", f"/jobs/{UUID}/touch", {"claim": held}, W1).status == 200


# --- The process ---


@pytest.fixture
def reserved_at() -> dict[str, float]:
    """When Buildkite reserved each job, by the monotonic clock."""
    return {}


@pytest.fixture
def buildkite(reserved_at: dict[str, float]) -> Iterator[FakeBuildkite]:
    def note(job: FakeJob, what: str, _: str) -> None:
        if what == "reserved":
            reserved_at[job.uuid] = time.monotonic()

    with FakeBuildkite(on_event=note) as server:
        yield server


@pytest.fixture
def stack(buildkite: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(buildkite, tmp_path, agent="") as processes:
        yield processes


def wait_for_idle(stack: StackProcesses, count: int) -> None:
    """Until the claims of so many workers wait."""
    ends_at, pause = time.monotonic() + PATIENCE, threading.Event()
    while sum(worker["state"] == "idle" for worker in stack.stats()["workers"]) < count:
        assert time.monotonic() < ends_at
        pause.wait(0.02)


def test_serve_one_job_from_buildkite_to_its_end(stack: StackProcesses, buildkite: FakeBuildkite) -> None:
    process = stack.start_scheduler()
    uuid = buildkite.add_job(rules=["queue=default", "arch=amd64"], step_key="unit")
    with closing(Connection(stack.port)) as connection:
        answer = connection.call("GET", "/jobs?query=arch=amd64&wait=30", headers=W1).json
        assert (answer["uuid"], answer["attempt"], answer["step"]) == (uuid, 1, {"key": "unit"})
        assert connection.call("GET", "/health?strict=1").status == 200
        touch = connection.call("POST", f"/jobs/{uuid}/touch", {"claim": answer["claim"]}, W1)
        assert (touch.status, touch.json["stop"]) == (200, False)
        # Buildkite is asked what became of it as soon as its agent has ended, and not only in its turn.
        for state, word in (("running", "running"), ("finished", "ran")):
            buildkite.set_state(uuid, state)
            body = {"claim": answer["claim"], "exit_status": 0}
            assert connection.call("POST", f"/jobs/{uuid}/complete", body, W1).status == 200
            process.wait_for_line(f"{word} job={uuid}")
        job = connection.call("GET", f"/jobs/{uuid}").json
        assert (job["state"], job["outcome"], job["exit_status"]) == ("done", "ran", 0)
    process.send_signal(signal.SIGTERM)
    assert process.ended() == 0
    assert [call.status for call in buildkite.calls_to("deregister")] == [204]


def test_stop_with_parked_claims_answers_them_and_exits_0(stack: StackProcesses, buildkite: FakeBuildkite) -> None:
    process = stack.start_scheduler()
    connections = [Connection(stack.port) for _ in range(20)]
    for n, connection in enumerate(connections):
        headers = {"X-Worker-ID": f"w{n}", "X-Worker-Session": "s"}
        connection.request("GET", "/jobs?query=queue=default&wait=60", headers=headers)
    wait_for_idle(stack, 20)
    process.send_signal(signal.SIGTERM)
    for connection in connections:
        with closing(connection):
            assert connection.getresponse().status == 204
    assert process.ended() == 0
    process.wait_for_line("stopped")


def test_stop_with_jobs_left_stays_registered_and_goes_on_after_a_start(
    stack: StackProcesses, buildkite: FakeBuildkite
) -> None:
    process = stack.start_scheduler()
    uuid = buildkite.add_job()
    process.wait_for_line(f"ready job={uuid}")
    process.send_signal(signal.SIGTERM)
    assert process.ended() == 0
    assert buildkite.calls_to("deregister") == []
    stack.start_scheduler()
    with closing(Connection(stack.port)) as connection:
        assert connection.call("GET", "/jobs?query=queue=default&wait=30").json["uuid"] == uuid


@pytest.mark.parametrize("listen", [":18888", "0.0.0.0:18888", "[::]:18888", "192.0.2.1:18888"])
def test_start_beyond_loopback_without_token_exits_78(tmp_path: Path, listen: str) -> None:
    done = subprocess.run(
        compiled("scheduler.py"),
        env={"PATH": os.environ["PATH"], "BUILDKITE_AGENT_TOKEN": "bkct_test", "LISTEN": listen},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 78
    assert "LISTEN" in done.stderr and "STACK_API_TOKEN" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_start_beyond_loopback_with_token_serves_those_who_have_it(buildkite: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(buildkite, tmp_path, agent="", STACK_API_TOKEN="stack-secret") as stack:
        stack.scheduler_settings["LISTEN"] = f":{stack.port}"
        process = stack.start_scheduler()
        with closing(Connection(stack.port)) as connection:
            assert connection.call("GET", "/stats").refusal == (401, "unauthorized")
            assert connection.call("GET", "/stats", headers={"Authorization": "Bearer stack-secret"}).status == 200
            assert connection.call("GET", "/health").status == 200
    assert "stack-secret" not in "\n".join(process.lines)


def test_serve_parked_claims_within_milliseconds_of_the_reservation(
    stack: StackProcesses,
    buildkite: FakeBuildkite,
    reserved_at: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stack.start_scheduler()
    connections = [Connection(stack.port) for _ in range(20)]
    for n, connection in enumerate(connections):
        connection.request("GET", f"/jobs?query=n={n}&wait=60", headers={"X-Worker-ID": f"w{n}"})
    wait_for_idle(stack, 20)
    taken = []
    for n, connection in enumerate(connections):
        uuid = buildkite.add_job(rules=[f"n={n}"])
        with closing(connection):
            answer = json.loads(connection.getresponse().read())
            taken.append((time.monotonic() - reserved_at[uuid]) * 1000)
        assert answer["uuid"] == uuid
    with capsys.disabled():
        print(
            f"\nparked claims answered {statistics.median(taken):.1f} ms (median), {max(taken):.1f} ms (slowest of "
            f"{len(taken)}) after the job's reservation"
        )
