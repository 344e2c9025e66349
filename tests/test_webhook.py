"""`POST /webhook`: who may send it, what it makes of an event, and that it never hurries Buildkite too much."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

import scheduler
import worker
from conftest import Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import StackProcesses, wait_until
from scheduler import Dispatcher, Intake, Leadership, Part, Settings, Stack, Store
from test_api import PATIENCE, Bench, Reply

TOKEN = "webhook-secret-1"
GOOD = {"X-Buildkite-Token": TOKEN}
SCHEDULED = {"event": "job.scheduled", "job": {"id": "x", "agent_query_rules": ["queue=linux", "os=any"]}}


class Hooked(Bench):
    """The API with two queues, and what was asked to list soon."""

    def __init__(self, store: Store, clock: Clock, settings: Settings, parts: Sequence[Part] = ()):
        intakes = {}
        self.listed: list[str] = []
        for key in ("default", "linux"):
            stack = Stack("http://127.0.0.1:9/v3", lambda: "t", f"test-{key}", key)
            intakes[key] = Intake(
                stack, Leadership(store), Dispatcher(store, clock.now), settings, clock.now, pytest.fail
            )
            intakes[key].list.wake = lambda key=key: self.listed.append(key)  # type: ignore[method-assign,misc]
        self.intakes = intakes
        super().__init__(store, clock, settings, intakes, "".join(settings.stack_api_token), parts)

    def hook(self, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        text = body if isinstance(body, bytes) else json.dumps(SCHEDULED if body is None else body).encode()
        return self.call("POST", "/webhook", text, GOOD if headers is None else headers)

    def signed(self, body: bytes, seconds_ago: float = 0, token: str = TOKEN) -> dict[str, str]:
        """The header that Buildkite sends with this body."""
        at = int(self.clock.now() - seconds_ago)
        signature = hmac.new(token.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
        return {"X-Buildkite-Signature": f"timestamp={at},signature={signature}"}


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Hooked]:
    with Hooked(store, clock, settings(WEBHOOK_TOKEN=TOKEN, STACK_API_TOKEN="api-secret-1")) as bench:
        yield bench


BODY = json.dumps(SCHEDULED).encode()

# --- Who may send it ---


@sqlite_only
def test_webhook_with_the_token_lists_the_queue_of_its_job(bench: Hooked) -> None:
    reply = bench.hook()
    assert (reply.status, reply.json) == (200, {"listed": ["linux"]})
    assert bench.listed == ["linux"]


@sqlite_only
@pytest.mark.parametrize("seconds_ago", [0, 299, -299])
def test_webhook_with_a_signature_is_taken(bench: Hooked, seconds_ago: float) -> None:
    assert bench.hook(BODY, bench.signed(BODY, seconds_ago)).json == {"listed": ["linux"]}


@sqlite_only
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Buildkite-Token": ""},
        {"X-Buildkite-Token": "wrong"},
        {"X-Buildkite-Token": TOKEN[:-1]},
        {"X-Buildkite-Token": TOKEN + "x"},
        {"X-Buildkite-Token": "\xff\xfe"},
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": "Bearer api-secret-1"},
        {"X-Buildkite-Signature": ""},
        {"X-Buildkite-Signature": "timestamp=,signature="},
        {"X-Buildkite-Signature": "timestamp=1800000000"},
        {"X-Buildkite-Signature": "timestamp=1800000000,signature="},
        {"X-Buildkite-Signature": "timestamp=1800000000,signature=\xff"},
        {"X-Buildkite-Signature": f"timestamp=1800000000,signature={'0' * 64}"},
        {"X-Buildkite-Signature": f"timestamp=nan,signature={'0' * 64}"},
        # One that is wrong does not fall back to the other.
        {"X-Buildkite-Signature": "timestamp=1800000000,signature=0", "X-Buildkite-Token": TOKEN},
    ],
    ids=ascii,
)
def test_webhook_of_anybody_else_is_refused(bench: Hooked, headers: dict[str, str]) -> None:
    reply = bench.hook(headers=headers)
    assert reply.refusal == (401, "unauthorized")
    assert bench.listed == []
    assert b"secret" not in reply.text


@sqlite_only
@pytest.mark.parametrize("what", ["old", "from the future", "other body", "other token", "other time"])
def test_webhook_whose_signature_does_not_hold_is_refused(bench: Hooked, what: str) -> None:
    seconds_ago = {"old": 301, "from the future": -302}.get(what, 0)
    headers = bench.signed(BODY, seconds_ago, "another-token" if what == "other token" else TOKEN)
    if what == "other time":
        headers = {name: text.replace("timestamp=1800000000", "timestamp=1800000001") for name, text in headers.items()}
    assert bench.hook(BODY + b" " if what == "other body" else BODY, headers).refusal == (401, "unauthorized")
    assert bench.listed == []


@sqlite_only
def test_webhook_without_its_token_set_is_not_there(
    store: Store, clock: Clock, settings: Callable[..., Settings]
) -> None:
    with Hooked(store, clock, settings()) as bench:
        for headers in ({}, {"X-Buildkite-Token": ""}, bench.signed(BODY, token="")):
            assert bench.hook(headers=headers).refusal == (404, "not_found")
        assert bench.listed == []


@sqlite_only
def test_webhook_token_opens_nothing_else(bench: Hooked) -> None:
    for headers in (GOOD, {"Authorization": f"Bearer {TOKEN}"}):
        assert bench.call("GET", "/stats", headers=headers).refusal == (401, "unauthorized")


def test_start_agent_from_an_env_that_both_scripts_read_hides_the_webhook_token() -> None:
    settings = worker.read_settings(worker.Settings, {"BUILDKITE_AGENT_TOKEN": "t"})
    left = worker.agent_environment(settings, {"WEBHOOK_TOKEN": TOKEN, "WEBHOOK_TOKEN_FILE": "/x", "MINE": "1"}, "t")
    assert left.keys() & {"WEBHOOK_TOKEN", "WEBHOOK_TOKEN_FILE", "MINE"} == {"MINE"}


# --- What it makes of an event ---


@sqlite_only
@pytest.mark.parametrize(
    ("body", "listed"),
    [
        (SCHEDULED, ["linux"]),
        ({"event": "job.activated", "job": {"agent_query_rules": [" queue = default "]}}, ["default"]),
        ({"event": "job.scheduled", "job": {"agent_query_rules": ["queue=somebody-elses"]}}, []),
        ({"event": "job.scheduled", "job": {"agent_query_rules": ["os=any"]}}, ["default", "linux"]),
        ({"event": "job.scheduled", "job": {}}, ["default", "linux"]),
        ({"event": "job.scheduled", "job": {"agent_query_rules": [None, 3, {}]}}, ["default", "linux"]),
        ({"event": "job.scheduled", "job": {"agent_query_rules": "queue=linux"}}, ["default", "linux"]),
        ({"event": "job.scheduled"}, ["default", "linux"]),
        ({"event": "build.scheduled", "build": {"number": 1}}, ["default", "linux"]),
        ({"event": "build.running"}, ["default", "linux"]),
        ({"event": "ping", "service": {}}, []),
        ({"event": "job.finished", "job": {"agent_query_rules": ["queue=linux"]}}, []),
        ({"event": "agent.connected"}, []),
        ({"event": 3}, []),
        ({"event": ["job.scheduled"]}, []),
        ({}, []),
    ],
    ids=str,
)
def test_webhook_lists_the_queues_that_the_event_may_be_about(bench: Hooked, body: Any, listed: list[str]) -> None:
    reply = bench.hook(body)
    assert (reply.status, reply.json) == (200, {"listed": listed})
    assert bench.listed == listed


@sqlite_only
@pytest.mark.parametrize("body", [b"[1]", b"{", b"\xff", b"event=job.scheduled"])
def test_webhook_that_is_no_json_object_is_refused(bench: Hooked, body: bytes) -> None:
    assert bench.hook(body).refusal == (400, "bad_body")
    assert bench.listed == []


@sqlite_only
def test_webhook_takes_no_other_method(bench: Hooked) -> None:
    assert bench.call("GET", "/webhook", headers=GOOD).refusal == (405, "method_not_allowed")


@sqlite_only
def test_webhook_lists_the_default_queue_whatever_name_the_job_has_for_it(bench: Hooked) -> None:
    bench.server.api._intakes = {"_default" if key == "default" else key: i for key, i in bench.intakes.items()}
    body = {"event": "job.scheduled", "job": {"agent_query_rules": ["queue=main"]}}
    assert bench.hook(body).json == {"listed": ["_default"]}


# --- Its bounds ---


@sqlite_only
def test_webhook_as_large_as_it_may_be_is_taken_and_one_larger_is_refused(bench: Hooked) -> None:
    largest = json.dumps(SCHEDULED | {"x": "y" * (scheduler.WEBHOOK_BYTES - len(BODY) - 9)}).encode()
    assert len(largest) == scheduler.WEBHOOK_BYTES
    assert bench.hook(largest, bench.signed(largest)).status == 200
    length = scheduler.WEBHOOK_BYTES + 1
    assert bench.send(head_of(length, GOOD)).refusal == (413, "body_too_large")


@sqlite_only
def test_webhook_that_is_refused_is_logged_once_in_a_while(bench: Hooked, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert bench.hook({"event": "job.scheduled"}, {"X-Buildkite-Token": "wrong"}).refusal == (401, "unauthorized")
    [said] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unauthorized")]
    told = 'path=/webhook reason="X-Buildkite-Token is not WEBHOOK_TOKEN" requests=1'
    assert said == f"unauthorized client=127.0.0.1 {told}"


@sqlite_only
def test_webhook_of_somebody_else_is_refused_before_its_body_is_read(bench: Hooked) -> None:
    reply = bench.send(head_of(scheduler.WEBHOOK_BYTES, {}))  # the answer comes though the body never does
    assert reply.refusal == (401, "unauthorized")


@sqlite_only
def test_webhook_with_a_wrong_signature_is_not_parsed(bench: Hooked) -> None:
    deep = b"[" * 100_000
    assert bench.hook(deep, bench.signed(deep)).refusal == (400, "bad_body")
    assert bench.hook(deep, bench.signed(b"another")).refusal == (401, "unauthorized")


@sqlite_only
def test_webhook_holds_its_room_until_it_is_answered(bench: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a body takes more memory than the body."""
    room: list[int] = []
    loads = json.loads

    def parse(text: bytes) -> Any:
        room.append(bench.server.limit.webhooks._value)
        return loads(text)

    monkeypatch.setattr(scheduler.json, "loads", parse)  # type: ignore[attr-defined]
    for body in (BODY, BODY.ljust(scheduler.BODY_BYTES + 1)):
        assert bench.hook(body).status == 200
    assert room == [scheduler.WEBHOOKS, scheduler.WEBHOOKS - 1]
    assert bench.server.limit.webhooks._value == scheduler.WEBHOOKS


def head_of(length: int, headers: dict[str, str]) -> bytes:
    """A webhook without its body."""
    head = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(length)} | headers
    lines = "".join(f"{name}: {text}\r\n" for name, text in head.items())
    return f"POST /webhook HTTP/1.1\r\n{lines}\r\n".encode()


def made_up(bench: Hooked) -> dict[str, str]:
    """A signature by somebody without the token: that it is wrong shows only with the body."""
    return {"X-Buildkite-Signature": f"timestamp={bench.clock.now():.0f},signature={'0' * 64}"}


LARGE = BODY.ljust(scheduler.BODY_BYTES + 1)


@sqlite_only
def test_large_webhook_beyond_a_few_at_once_is_refused_and_room_is_made_again(bench: Hooked) -> None:
    with ExitStack() as stack:
        for _ in range(scheduler.WEBHOOKS):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", bench.port), PATIENCE))
            slow.sendall(head_of(len(LARGE), made_up(bench)))
        wait_until(lambda: bench.hook(LARGE).status == 503)
        assert bench.hook(LARGE).refusal == (503, "busy")
        # Most that Buildkite sends is small: it is none of their business.
        assert bench.hook(BODY, bench.signed(BODY)).status == 200
    wait_until(lambda: bench.hook(LARGE).status == 200)


@sqlite_only
def test_webhook_is_taken_beside_many_made_up_ones_whose_bodies_hang(
    bench: Hooked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "SMALL_WEBHOOK_SECONDS", 1.0)
    with ExitStack() as stack:
        hanging = []
        for _ in range(3 * scheduler.WEBHOOKS):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", bench.port), PATIENCE))
            slow.sendall(head_of(len(BODY), made_up(bench)))
            hanging.append(slow)
        wait_until(lambda: bench.server.limit.connections >= len(hanging))
        assert bench.hook(BODY, bench.signed(BODY)).status == 200
        # And they are ended long before ARRIVAL_SECONDS.
        began_at = time.monotonic()
        assert all(b'"bad_body"' in slow.recv(4096) for slow in hanging)
        assert time.monotonic() - began_at < scheduler.ARRIVAL_SECONDS / 2


# --- What it does to the list ---


def test_webhook_makes_a_job_be_listed_at_once_and_a_storm_stays_within_the_rate_limit(tmp_path: Path) -> None:
    settings = {"WEBHOOK_TOKEN": TOKEN, "POLL_INTERVAL": "60s"}
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, agent="", **settings) as stack:
        process = stack.start_scheduler()
        fake.wait_for(lambda: fake.calls_to("list"), PATIENCE)
        with requests.Session() as session:
            uuid = fake.add_job()
            for _ in range(300):
                body = {"event": "job.scheduled", "job": {"agent_query_rules": ["queue=default"]}}
                assert session.post(f"{stack.url}/webhook", json=body, headers=GOOD, timeout=30).status_code == 200
        process.wait_for_line("ready", uuid)
        calls = fake.calls_to("list")
        assert 429 not in [call.status for call in calls]
        assert len(calls) < 100  # many of the 300 were one


def test_webhook_right_after_a_list_waits_a_moment_and_then_is_heeded(
    store: Store, clock: Clock, settings: Callable[..., Settings]
) -> None:
    with FakeBuildkite(clock=clock.now) as fake:
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        intake = Intake(stack, Leadership(store), Dispatcher(store, clock.now), settings(), clock.now, pytest.fail)
        intake.list_soon()
        intake.list_jobs(clock.now())
        clock.advance(0.05)
        intake.list_soon()
        assert intake.list_jobs(clock.now()) == pytest.approx(0.15)
        assert len(fake.calls_to("list")) == 1
        clock.advance(0.15)
        intake.list_jobs(clock.now())
        assert len(fake.calls_to("list")) == 2
        # A list for any other reason is not held back.
        intake.list_jobs(clock.now())
        assert len(fake.calls_to("list")) == 3


def test_webhook_while_buildkite_fails_does_not_hurry_it(
    store: Store, clock: Clock, settings: Callable[..., Settings]
) -> None:
    with FakeBuildkite(clock=clock.now) as fake:
        fake.set_fault("*", status=503, headers={"Retry-After": "30"})
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        intake = Intake(stack, Leadership(store), Dispatcher(store, clock.now), settings(), clock.now, pytest.fail)
        intake.list.start()
        fake.wait_for(lambda: [call for call in fake.calls if call.status == 503], PATIENCE)
        ends_at = threading.Event()
        while not intake.list.failures:
            ends_at.wait(0.01)
        for _ in range(50):
            intake.list_soon()
        ends_at.wait(0.3)
        assert len(fake.calls) == 1
        intake.list.stop()
        assert intake.list.join(PATIENCE)
