"""The API's description, tests/openapi.json: it has every route and no other, real answers are as it says, and a
fuzzer that reads it finds nothing."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

import scheduler
from conftest import ROUTES, STORE_NAMES, Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import TESTS
from scheduler import (
    Dispatcher,
    Finding,
    GraphApi,
    JobState,
    Leadership,
    Periodic,
    PeriodicBuilds,
    Policy,
    PolicyAsker,
    RestApi,
    Settings,
    Stack,
    StackFile,
    Store,
)
from test_api import OTHER, UUID, W1, W2, Reply
from test_webhook import GOOD, SCHEDULED, TOKEN, Hooked

DESCRIPTION: dict[str, Any] = json.loads((TESTS / "openapi.json").read_text())
RIGHT = {"Authorization": "Bearer stack-secret-1"}
OPERATIONS = {
    (method.upper(), path): operation
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
}


@pytest.fixture
def policy(store: Store, clock: Clock, tmp_path: Path) -> Iterator[Policy]:
    path = tmp_path / "openapi_policy.py"
    path.write_text('def decide(job, fleet):\n    return run(require=["a=" + job.env["A"]], priority=3)\n')
    policy = Policy(str(path), Leadership(store), Dispatcher(store, clock.now), clock.now)
    yield policy
    policy.stop()


@pytest.fixture
def periodic(store: Store, clock: Clock, fake: FakeBuildkite) -> PeriodicBuilds:
    fake.add_pipeline("app")
    file = StackFile("acme", (), (Periodic("w1", "app", "@hourly", zoneinfo.ZoneInfo("UTC")),))
    rest = RestApi(fake.rest_url, lambda: fake.api_token)
    return PeriodicBuilds(
        lambda: file, Leadership(store), rest, GraphApi(fake.graphql_url, lambda: fake.api_token), clock.now
    )


@pytest.fixture
def guarded(  # noqa: PLR0913, PLR0917  all parts
    store: Store,
    clock: Clock,
    settings: Callable[..., Settings],
    policy: Policy,
    periodic: PeriodicBuilds,
    fake: FakeBuildkite,
) -> Iterator[Hooked]:
    made = settings(WEBHOOK_TOKEN=TOKEN, STACK_API_TOKEN="stack-secret-1")
    with Hooked(store, clock, made, [policy, periodic]) as bench:
        bench.server.operator_tokens = ["stack-secret-1"]  # one who may do all
        bench.make_ready()
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        stack.register()
        for uuid in (UUID, OTHER):
            fake.add_job(uuid=uuid, env={"A": "1"})
        intake = bench.intakes["default"]
        intake.asker = PolicyAsker(policy, stack, intake, Leadership(store), bench.dispatcher, clock.now)
        yield bench


def test_read_description_has_every_route_and_who_may_call_it() -> None:
    described = {
        (method, path, {"bearer": []} not in operation.get("security", [{"bearer": []}]))
        for (method, path), operation in OPERATIONS.items()
    }
    assert described == {(route.method, route.path, route.who == scheduler.ANYONE) for route in ROUTES}


class Checked:
    """Calls whose answers must be as they are described."""

    def __init__(self, bench: Hooked):
        self.bench = bench
        self.seen: set[tuple[str, str, int]] = set()

    def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *, query: str = ""
    ) -> Reply:
        reply = self.bench.call(
            method,
            path.replace("{uuid}", UUID).replace("{name}", "w1").replace("{target}", "worker:w1") + query,
            body,
            RIGHT if headers is None else headers,
        )
        return self.check(method, path, reply)

    def check(self, method: str, path: str, reply: Reply) -> Reply:
        described = OPERATIONS[method, path]["responses"][str(reply.status)]
        if "$ref" in described:
            described = DESCRIPTION["components"]["responses"][described["$ref"].rpartition("/")[2]]
        assert bool(reply.text) == ("content" in described)
        if reply.text:
            kind = reply.headers["Content-Type"].partition(";")[0]
            schema = described["content"][kind]["schema"] | {"components": DESCRIPTION["components"]}
            jsonschema_rs.validate(schema, reply.json if kind == "application/json" else reply.text.decode())
        self.seen.add((method, path, reply.status))
        return reply

    def check_states(self) -> None:
        """Everything that tells of the job."""
        state = self("GET", "/jobs/{uuid}").json["state"]
        (listed,) = self("GET", "/queue", query=f"?state={state}&limit=1").json["jobs"]
        assert listed["uuid"] == UUID
        self.bench.clock.advance(scheduler.OVERVIEW_SECONDS)
        etag = ""
        for path in "/stats", "/metrics", "/fleet":
            etag = self("GET", path).headers.get("ETag", "")
        self("GET", "/fleet", headers=RIGHT | {"If-None-Match": etag})


def ask_policy(call: Checked, policy: Policy, fake: FakeBuildkite) -> None:
    """What an operator asks of a policy: a job that it decides about, and one in which it fails."""
    assert call("POST", "/jobs/{uuid}/decide", {}).json["decision"]["require"] == ["a=1"]
    del fake.all_jobs[UUID].env["A"]
    assert call("POST", "/jobs/{uuid}/decide", {}).json["failed"] == "KeyError at openapi_policy.py:2"
    fake.set_fault("get-job", status=500)
    assert call("POST", "/jobs/{uuid}/decide", {}).status == 502
    call("POST", "/policy", {"state": "off", "note": "it holds all", "seconds": 60})
    call.check_states()
    assert call("POST", "/policy", {"state": "on", "note": "mended"}).json["was"] == "off"
    call("POST", "/policy", {"state": "on"})
    store, now = call.bench.store, call.bench.clock.now()
    for decision in (scheduler.hold("later"), scheduler.run()):
        move = functools.partial(scheduler.decide, decision=decision, policy=policy.hash, known={}, now=now)
        store.decide({UUID: move}, now)
        call.check_states()


def start_builds(call: Checked, periodic: PeriodicBuilds, fake: FakeBuildkite) -> None:
    """A periodic build that is made, one that is refused, and one of which nobody knows."""
    for fault in ({}, {"status": 422}, {"status": 403}, {"reset": True}):
        if fault:
            fake.set_fault("create-build", **fault, times=1)
        mark = call("POST", "/periodic/{name}/run", {"note": "try it"}).json["mark"]
        (row,) = call("GET", "/periodic").json["periodic"]
        assert row["start"]["mark"] == mark
        periodic.tick(call.bench.clock.now())
        (row,) = call("GET", "/periodic").json["periodic"]
        assert bool(row["problem"]) is bool(fault)
    assert row["build"]["number"] == 1
    assert call("POST", "/periodic/{name}/run", {"note": "try it"}).refusal == (409, "start_unclear")
    assert call("POST", "/periodic/{name}/run", {}).refusal == (400, "bad_body")


def test_call_through_a_jobs_life_is_answered_as_described(  # noqa: PLR0915  one long life
    guarded: Hooked, policy: Policy, periodic: PeriodicBuilds, fake: FakeBuildkite
) -> None:
    call, who = Checked(guarded), RIGHT | W1
    ask_policy(call, policy, fake)
    start_builds(call, periodic, fake)
    now = guarded.clock.now()
    call.check_states()
    job = guarded.store.get(UUID)
    assert job
    job = dataclasses.replace(job, state=JobState.RESERVING)
    claim = call("GET", "/jobs", headers=who, query="?query=queue=default").json["claim"]
    call("POST", "/jobs/{uuid}/touch", {"claim": claim}, who)
    call.check_states()
    call("POST", "/jobs/{uuid}/release", {"claim": claim, "reason": "why not"}, who)
    call.check_states()
    guarded.store.confirm([UUID], guarded.store.sequence(), now + 900, now)
    call.check_states()
    days = (datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1))
    guarded.store.windows.use((scheduler.Freeze("a century", *days, zoneinfo.ZoneInfo("UTC"), branches=("*",)),))
    assert guarded.store.freeze([UUID], now) == []
    call.check_states()
    assert call("GET", "/freezes").json["freezes"][0]["jobs"] == 1
    guarded.store.windows.use(())
    assert [job.uuid for job in guarded.store.freeze([UUID], now)] == [UUID]
    claim = call("GET", "/jobs", headers=who, query="?query=queue=default").json["claim"]
    guarded.learn(UUID, Finding.ACQUIRED, "running")
    call.check_states()
    call("POST", "/jobs/{uuid}/complete", {"claim": claim, "exit_status": 0, "last_words": "bye"}, who)
    guarded.learn(UUID, Finding.OVER, "finished")
    call.check_states()
    told = {
        "version": "1.0.0",
        "agent": "3.137.0+1",
        "agent_supported_until": "2027-08-11",
        "state": "no_agent",
        "reason": "it is gone",
    }
    call("POST", "/workers/{name}", told, who)
    call.check_states()
    hold = {"target": "worker:w1", "note": "disk swap", "seconds": 60}
    assert call("POST", "/holds", hold, RIGHT | {"X-Operator": "ann"}).json["binds"]["workers"] == 1
    call("GET", "/stats")
    assert call("DELETE", "/holds/{target}").json["lifted"]
    guarded.store.put([job], guarded.store.sequence(), now)
    for verb in ("stop", "allow", "first"):
        call("POST", f"/jobs/{{uuid}}/{verb}", {"note": "why not"})
        call.check_states()
    guarded.store.confirm([UUID], guarded.store.sequence(), now + 900, now)
    guarded.store.finish(UUID, now)
    call.check_states()
    call("DELETE", "/workers/{name}")
    call("POST", "/webhook", SCHEDULED, GOOD)
    call("GET", "/queue")
    call("GET", "/")
    assert call("GET", "/history").json["runs"]
    assert call("GET", "/history", query="?hours=25").status == 400
    call("GET", "/health")
    call("GET", "/health", query="?strict=1", headers={})
    call("GET", "/jobs", headers=who, query="?query=queue=default")
    # And what is refused.
    call("GET", "/jobs", query="?query=")
    call("GET", "/queue", query="?after=nothing")
    call("POST", "/jobs/{uuid}/touch", {"claim": "stale"}, RIGHT | W2)
    call("POST", "/jobs/{uuid}/release", b"{", who)
    call("GET", "/jobs", headers=who, query="?query=queue=default")  # so that it is known again
    call("POST", "/workers/{name}", {"agent": 4}, who)
    call("POST", "/holds", {"target": "worker:w2", "note": "disk swap"})
    call("POST", "/holds", {"target": "worker:w1"})
    call("POST", "/holds", hold | {"target": "worker:w*"})
    call("DELETE", "/holds/{target}")
    call("POST", "/workers/{name}", {}, RIGHT | W1 | {"X-Worker-Session": "another"})
    for (method, path), operation in OPERATIONS.items():
        if operation.get("security") != []:
            assert call(method, path, {} if method == "POST" else None, {}).status == 401
    assert {(method, path) for method, path, status in call.seen if status < 300} == set(OPERATIONS)


@sqlite_only
def test_webhook_is_taken_and_refused_as_described(guarded: Hooked, settings: Callable[..., Settings]) -> None:
    call = Checked(guarded)

    def send(*lines: str) -> None:
        head = ["POST /webhook HTTP/1.1", "Host: x", f"X-Buildkite-Token: {TOKEN}", "Content-Type: application/json"]
        text = "\r\n".join([*head, *lines, "", ""])
        call.check("POST", "/webhook", guarded.send(text.encode()))

    text = json.dumps(SCHEDULED).encode()
    assert call("POST", "/webhook", text, guarded.signed(text)).json == {"listed": ["linux"]}
    call("POST", "/webhook", b"[1]", GOOD)
    call("POST", "/webhook", text, guarded.signed(b"another"))
    call("POST", "/webhook", text, GOOD | {"Content-Type": "text/plain"})
    call("POST", "/webhook", text, GOOD | {"Origin": "http://elsewhere.example"})
    send("Transfer-Encoding: gzip")
    send(f"Content-Length: {scheduler.WEBHOOK_BYTES + 1}")
    send(*["A: b"] * 101)
    for _ in range(scheduler.WEBHOOKS):
        guarded.server.limit.webhooks.acquire()
    send(f"Content-Length: {scheduler.BODY_BYTES + 1}")
    guarded.server.api.use(settings())
    call("POST", "/webhook", text, GOOD)
    assert {str(status) for _, _, status in call.seen} == set(OPERATIONS["POST", "/webhook"]["responses"])


@pytest.mark.long
@pytest.mark.parametrize("open_store", STORE_NAMES, indirect=True)
def test_fuzz_every_route_finds_nothing_but_what_is_described(
    guarded: Hooked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """schemathesis as a process of its own: good and bad inputs for each route, the same with every run."""
    command = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not command:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs schemathesis")
    caplog.set_level(logging.INFO)
    guarded.make_ready(OTHER)
    for intake in guarded.intakes.values():
        intake.last_list_at = guarded.clock.now()  # else a 503 of /health would be right
    # So that no claim waits.
    monkeypatch.setattr(scheduler, "MAX_WAIT_SECONDS", 0.01)
    description = json.loads((TESTS / "openapi.json").read_text().replace('"maximum": 60', '"maximum": 0.01'))
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "unsupported_method,allow_header_conformance,ignored_auth"
    )
    done = subprocess.run(
        [
            *(command, "run", str(tmp_path / "openapi.json"), "--url", f"http://127.0.0.1:{guarded.port}"),
            *("--header", f"Authorization:{RIGHT['Authorization']}", "--header", f"X-Buildkite-Token:{TOKEN}"),
            *("--checks", checks, "--seed", "20261121"),
            *("--phases", "examples,coverage,fuzzing", "--generation-deterministic"),
            *("--max-examples", "60"),
            *("--no-shrink", "--suppress-health-check", "all", "--request-timeout", "10", "--warnings", "off"),
        ],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    tried = re.search(r"(\d+) generated", done.stdout)
    assert tried and int(tried[1]) >= 500, done.stdout[-1500:]
    with capsys.disabled():
        print(f"\nschemathesis: {tried[0]} inputs, nothing found")
    assert not [record for record in caplog.records if record.exc_info]
