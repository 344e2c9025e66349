"""`Stack`, our client of the Stacks API, over real HTTP: what it sends, what it makes of every kind of answer."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import random
import re
import socketserver
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import graphql
import pytest

import scheduler
from fake_buildkite import FakeBuildkite, Request, Server, listed
from scheduler import BuildkiteError, GraphApi, ListPage, RateLimiter, RuleSet, Stack

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
NOW = 1_800_000_000.0
UUID = "018f0000-0000-4000-8000-000000000001"
OTHER = "018f0000-0000-4000-8000-000000000002"
KEY = "vm1-default"


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite(clock=lambda: NOW, rate_limits=False) as server:
        yield server


@pytest.fixture
def wire(fake: FakeBuildkite) -> list[Request]:
    """Every request as it arrived, with its query and its true headers."""
    requests: list[Request] = []

    def note(_: str | None, request: Request) -> bool:
        requests.append(request)
        return False

    fake.set_fault("*", match=note)
    return requests


@pytest.fixture
def stack(fake: FakeBuildkite, wire: list[Request]) -> Stack:
    """A stack that is registered, with nothing on the wire yet."""
    stack = Stack(fake.url, lambda: fake.token, KEY, "default")
    stack.register()
    wire.clear()
    return stack


#: One call of each kind.
CALLS: dict[str, Callable[[Stack], object]] = {
    "register": lambda stack: stack.register(),
    "list": lambda stack: stack.list_jobs(None, NOW),
    "reserve": lambda stack: stack.reserve([UUID], 900),
    "get-states": lambda stack: stack.states([UUID]),
    "finish": lambda stack: stack.finish(UUID, "nobody could run it"),
    "deregister": lambda stack: stack.deregister(),
}
every_call = pytest.mark.parametrize("name", CALLS)


def refusal_of(call: Callable[..., object], *arguments: object) -> BuildkiteError:
    with pytest.raises(BuildkiteError) as raised:
        call(*arguments)
    return raised.value


# --- What is sent ---


def test_register_sends_key_type_queue_and_metadata(fake: FakeBuildkite, wire: list[Request]) -> None:
    Stack(fake.url, lambda: fake.token, KEY, "default").register()
    assert [(request.method, request.path, request.query) for request in wire] == [("POST", "/v3/stacks/register", {})]
    assert json.loads(wire[0].body) == {
        "key": "vm1-default",
        "type": "custom",
        "queue_key": "default",
        "metadata": {"stack": "systemd"},
    }
    assert fake.stacks[KEY].queue_key == "default"


def test_register_twice_is_accepted(fake: FakeBuildkite, stack: Stack) -> None:
    stack.register()
    assert [call.status for call in fake.calls_to("register")] == [201, 200]


def test_list_first_page_sends_queue_and_limit_alone(stack: Stack, wire: list[Request]) -> None:
    stack.list_jobs(None, NOW)
    request = wire[0]
    assert (request.method, request.path) == ("GET", "/v3/stacks/vm1-default/scheduled-jobs")
    assert request.query == {"queue_key": "default", "limit": "1000"}
    assert request.body == b""


def test_list_with_cursor_sends_it_as_after(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    fake.set_fault("list", body={"jobs": []})
    stack.list_jobs("a+b/c==&x", NOW)
    assert wire[0].query == {"queue_key": "default", "limit": "1000", "after": "a+b/c==&x"}


def test_list_with_odd_queue_key_escapes_it(fake: FakeBuildkite, wire: list[Request]) -> None:
    stack = Stack(fake.url, lambda: fake.token, "vm1-odd", "a b&limit=1/é%")
    stack.register()
    stack.list_jobs(None, NOW)
    assert wire[1].path == "/v3/stacks/vm1-odd/scheduled-jobs"
    assert wire[1].query == {"queue_key": "a b&limit=1/é%", "limit": "1000"}


def test_reserve_sends_uuids_and_expiry(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    ours, theirs = fake.add_job(), fake.add_job()
    fake.reserve_for(theirs, "another-stack")
    assert stack.reserve([ours, theirs], 600) == ({ours}, {theirs})
    assert (wire[0].method, wire[0].path) == ("PUT", "/v3/stacks/vm1-default/scheduled-jobs/batch-reserve")
    assert json.loads(wire[0].body) == {"job_uuids": [ours, theirs], "reservation_expiry_seconds": 600}
    assert fake.jobs[ours].reservation_expires_at == NOW + 600


def test_states_sends_uuids_and_leaves_out_unknown_jobs(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    uuid = fake.add_job()
    assert stack.states([uuid, OTHER]) == {uuid: "scheduled"}
    assert (wire[0].method, wire[0].path) == ("POST", "/v3/stacks/vm1-default/jobs/get-states")
    assert json.loads(wire[0].body) == {"job_uuids": [uuid, OTHER]}


def test_finish_sends_detail_and_exit_status(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    uuid = fake.add_job()
    fake.reserve_for(uuid, KEY)
    stack.finish(uuid, "nobody could run it")
    assert (wire[0].method, wire[0].path) == ("POST", f"/v3/stacks/vm1-default/jobs/{uuid}/finish")
    assert json.loads(wire[0].body) == {"detail": "nobody could run it", "exit_status": -1}
    assert (fake.jobs[uuid].state, fake.jobs[uuid].exit_status) == ("finished", -1)


@pytest.mark.parametrize(
    ("detail", "sent"),
    [
        ("x" * 4097, "x" * 4096),
        ("é" * 3000, "é" * 2048),
        ("x" + "é" * 3000, "x" + "é" * 2047),
        ("x" * 4096, "x" * 4096),
    ],
)
def test_finish_with_long_detail_cuts_it_between_letters(
    fake: FakeBuildkite, stack: Stack, detail: str, sent: str
) -> None:
    uuid = fake.add_job()
    fake.reserve_for(uuid, KEY)
    stack.finish(uuid, detail)
    assert fake.jobs[uuid].finish_detail == sent


def test_finish_with_exit_status_0_sends_it_too(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    uuid = fake.add_job()
    fake.reserve_for(uuid, KEY)
    stack.finish(uuid, "nothing to do", 0)
    assert json.loads(wire[0].body) == {"detail": "nothing to do", "exit_status": 0}
    assert (fake.jobs[uuid].state, fake.jobs[uuid].exit_status) == ("finished", 0)


def test_show_job_reads_what_it_would_run_and_shows_none_of_it(fake: FakeBuildkite, stack: Stack) -> None:
    uuid = fake.add_job(command="make", env={"A": "secret-1"})
    spec = stack.show_job(uuid)
    assert (spec.env["A"], spec.command) == ("secret-1", "make")
    assert "secret-1" not in repr(spec)
    for body in ({"env": ["secret-1"]}, b'{"env": {"A": "secret-1"', b'"secret-1"'):
        fake.set_fault("get-job", status=200, body=body, times=1)
        assert "secret-1" not in str(refusal_of(stack.show_job, uuid))
    fake.set_fault("get-job", body={"env": {"A": "x", "B": 1, "C": None}, "command": None}, times=1)
    assert stack.show_job(uuid) == ({"A": "x"}, "")


def test_deregister_sends_no_body(fake: FakeBuildkite, stack: Stack, wire: list[Request]) -> None:
    stack.deregister()
    assert (wire[0].method, wire[0].path, wire[0].body) == ("POST", "/v3/stacks/vm1-default/deregister", b"")
    assert fake.stacks == {}


@every_call
def test_call_any_endpoint_carries_the_token_in_its_header_alone(
    fake: FakeBuildkite, stack: Stack, wire: list[Request], name: str
) -> None:
    fake.add_job(uuid=UUID)
    fake.reserve_for(UUID, KEY)
    CALLS[name](stack)
    (request,) = wire
    assert request.headers["authorization"] == "Token bkct_test"
    assert request.headers["user-agent"] == "agent-stack-systemd/1.0.0"
    elsewhere = {name: value for name, value in request.headers.items() if name != "authorization"}
    assert "bkct_test" not in repr((request.path, request.query, request.body, elsewhere))


@pytest.mark.parametrize("name", ["register", "reserve", "get-states", "finish"])
def test_call_with_body_says_that_it_is_json(fake: FakeBuildkite, stack: Stack, wire: list[Request], name: str) -> None:
    fake.add_job(uuid=UUID)
    fake.reserve_for(UUID, KEY)
    CALLS[name](stack)
    assert wire[0].headers["content-type"] == "application/json"


def test_call_after_the_token_was_replaced_uses_the_new_one(fake: FakeBuildkite, stack: Stack) -> None:
    fake.replace_token("bkct_new")
    stack.list_jobs(None, NOW)
    assert [call.status for call in fake.calls_to("list")] == [200]


def test_call_where_netrc_names_the_host_still_carries_our_token(
    stack: Stack, wire: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    stack.list_jobs(None, NOW)
    assert wire[0].headers["authorization"] == "Token bkct_test"


def test_call_several_times_keeps_its_connection(fake: FakeBuildkite, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted, accept = [], Server.process_request

    def note(server: Server, request: Any, client_address: Any) -> None:
        accepted.append(client_address)
        accept(server, request, client_address)

    monkeypatch.setattr(Server, "process_request", note)
    stack = Stack(fake.url, lambda: fake.token, KEY, "default")
    stack.register()
    stack.list_jobs(None, NOW)
    stack.states([UUID])
    refusal_of(stack.finish, UUID, "unknown")
    stack.deregister()
    assert len(accepted) == 1


# --- What a list says ---


def pages(stack: Stack) -> list[ListPage]:
    found, cursor = [], None
    while True:
        found.append(stack.list_jobs(cursor, NOW))
        cursor = found[-1].next_cursor
        if cursor is None:
            return found


def test_list_page_after_page_sees_every_job_once_oldest_first(fake: FakeBuildkite, stack: Stack) -> None:
    uuids = [fake.add_job(scheduled_at=NOW - 5000 + n) for n in range(2500)]
    found = pages(stack)
    assert [len(page.jobs) for page in found] == [1000, 1000, 500]
    assert [job.uuid for page in found for job in page.jobs] == uuids


def test_list_empty_queue_is_one_empty_page(stack: Stack) -> None:
    assert stack.list_jobs(None, NOW) == ListPage(jobs=[], paused=False, next_cursor=None, skipped=[])


def test_list_job_reads_every_field(fake: FakeBuildkite, stack: Stack) -> None:
    uuid = fake.add_job(
        rules=["queue=default", "arch=amd64", "gpu=*"],
        priority=-3,
        scheduled_at=NOW - 60.25,
        pipeline="web",
        build_number=7,
        branch="fix",
        step_key="unit",
    )
    (job,) = stack.list_jobs(None, NOW).jobs
    assert (job.uuid, job.queue_key, job.state) == (uuid, "default", "reserving")
    assert job.agent_query_rules == ("queue=default", "arch=amd64", "gpu=*")
    assert job.rule_set == "queue=default,arch=amd64,gpu=*"
    assert (job.priority, job.scheduled_at, job.put_at) == (-3, NOW - 60.25, NOW)
    assert job.about["pipeline"]["slug"] == "web"
    assert (job.about["build"]["number"], job.about["build"]["branch"]) == (7, "fix")
    assert job.about["step"] == {"key": "unit"}


@pytest.mark.parametrize(
    ("queue", "paused"),
    [
        ({"dispatch_paused": True}, True),
        ({"dispatch_paused": False}, False),
        ({"paused": True}, True),
        ({"paused": False}, False),
        ({"dispatch_paused": True, "paused": False}, True),
        ({"dispatch_paused": False, "paused": True}, False),
        ({"dispatch_paused": "true"}, None),
        ({"dispatch_paused": 1}, None),
        ({}, None),
        (None, None),
        ([True], None),
    ],
)
def test_list_reads_dispatch_paused_and_falls_back_to_paused(
    fake: FakeBuildkite, stack: Stack, queue: object, paused: bool | None
) -> None:
    fake.set_fault("list", body={"jobs": [], "cluster_queue": queue})
    assert stack.list_jobs(None, NOW).paused is paused


@pytest.mark.parametrize(
    ("info", "cursor"),
    [
        ({"has_next_page": True, "end_cursor": "bmV4dA=="}, "bmV4dA=="),
        ({"has_next_page": False, "end_cursor": "bmV4dA=="}, None),
        ({"has_next_page": True, "end_cursor": None}, None),
        ({"has_next_page": True, "end_cursor": ""}, None),
        ({"has_next_page": True, "end_cursor": 5}, None),
        ({"has_next_page": True}, None),
        ({"has_next_page": "yes", "end_cursor": "bmV4dA=="}, None),
        ({}, None),
        (None, None),
        ("page", None),
    ],
)
def test_list_goes_on_only_with_a_cursor_and_a_next_page(
    fake: FakeBuildkite, stack: Stack, info: object, cursor: str | None
) -> None:
    fake.set_fault("list", body={"jobs": [], "page_info": info})
    assert stack.list_jobs(None, NOW).next_cursor == cursor


PIPELINE = {"slug": "demo", "uuid": "x"}


def raw(uuid: str = UUID, **fields: Any) -> dict[str, Any]:
    job = {
        "id": uuid,
        "priority": 0,
        "agent_query_rules": ["queue=default"],
        "scheduled_at": "2027-01-15T07:59:00.000Z",
        "pipeline": PIPELINE,
        "build": {"uuid": "x", "number": 1, "branch": "main"},
        "step": {"key": None},
    }
    return job | fields


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"scheduled_at": None}, "scheduled_at", NOW),
        ({"scheduled_at": "2027-01-15T08:00:00+00:00"}, "scheduled_at", NOW),
        ({"scheduled_at": "2027-01-15T09:00:00.5+01:00"}, "scheduled_at", NOW + 0.5),
        ({"scheduled_at": ""}, "scheduled_at", NOW),
        ({"scheduled_at": "soon"}, "scheduled_at", NOW),
        ({"scheduled_at": [7]}, "scheduled_at", NOW),
        ({"scheduled_at": 1_700_000_000}, "scheduled_at", 1_700_000_000.0),
        ({"scheduled_at": "2027-01-15T08:00:01"}, "scheduled_at", NOW + 1),
        ({"scheduled_at": "0001-01-01T00:00:00+10:00"}, "scheduled_at", scheduler.FIRST_SECOND),
        ({"scheduled_at": "9999-12-31T23:59:59-10:00"}, "scheduled_at", scheduler.LAST_SECOND),
        ({"priority": None}, "priority", 0),
        ({"priority": 2**63 - 1}, "priority", 2**63 - 1),
        ({"priority": 2**63}, "priority", 2**63 - 1),
        ({"priority": -1e400}, "priority", 1 - 2**63),
        ({"priority": math.nan}, "priority", 0),
        ({"priority": "5"}, "priority", 5),
        ({"priority": "high"}, "priority", 0),
        ({"priority": True}, "priority", 0),
        ({"priority": 2.5}, "priority", 2),
        ({"priority": {"value": 5}}, "priority", 0),
        ({"agent_query_rules": None}, "agent_query_rules", ()),
        ({"agent_query_rules": "arch=amd64"}, "agent_query_rules", ("arch=amd64",)),
        ({"agent_query_rules": {"docker": True, "arch": "amd64"}}, "agent_query_rules", ("docker=true", "arch=amd64")),
        ({"agent_query_rules": ["a=1", None]}, "rule_set", "queue=default,=None,a=1"),
        ({"agent_query_rules": ["os=\ud83d"]}, "rule_set", "queue=default,=os=?"),
        ({"agent_query_rules": 7}, "rule_set", "queue=default,=7"),
        ({"runnable_at": "soon"}, "held_by", None),
        ({"runnable_at": "2027-01-15T08:00:00Z"}, "held_until", None),
        ({"runnable_at": "2027-01-15T08:00:01Z"}, "held_until", NOW + 1),
        ({"agent_query_rules": []}, "agent_query_rules", ()),
        ({"agent_query_rules": ["*"]}, "rule_set", "queue=default"),
        ({"pipeline": None, "build": "x", "step": []}, "about", {"pipeline": {}, "build": {}, "step": {}}),
        (
            {"build": {"uuid": 7, "number": "12", "branch": "main", "message": "x"}, "step": {}},
            "about",
            {"pipeline": PIPELINE, "build": {"uuid": None, "number": 12, "branch": "main"}, "step": {}},
        ),
        ({"unheard_of": {"a": [1]}}, "uuid", UUID),
    ],
)
def test_list_job_with_null_or_odd_field_reads_it(
    fake: FakeBuildkite, stack: Stack, fields: dict[str, Any], attribute: str, value: object
) -> None:
    fake.set_fault("list", body={"jobs": [raw(**fields)]})
    (job,) = stack.list_jobs(None, NOW).jobs
    assert getattr(job, attribute) == value


@pytest.mark.parametrize("missing", ["priority", "agent_query_rules", "scheduled_at", "pipeline", "build", "step"])
def test_list_job_without_a_field_reads_the_others(fake: FakeBuildkite, stack: Stack, missing: str) -> None:
    job = raw(priority=0, agent_query_rules=[])
    del job[missing]
    fake.set_fault("list", body={"jobs": [job]})
    assert [job.uuid for job in stack.list_jobs(None, NOW).jobs] == [UUID]


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        "job",
        [],
        {},
        raw(id=None),
        raw(id=7),
        raw(id="job-7"),
        raw(id=UUID + "\n"),
        raw(id=f"../{UUID}"),
        raw(id="x" * 100_000),
        raw(id=UUID.upper()),
    ],
    ids=repr,
)
def test_list_with_job_without_a_usable_id_passes_it_over_with_one_line_and_keeps_the_others(
    fake: FakeBuildkite, stack: Stack, bad: object, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = raw("018f0000-0000-4000-8000-00000000000a"), raw("018f0000-0000-4000-8000-00000000000b")
    odd: list[tuple[str, str]] = []
    stack.on_odd = lambda queue_key, field: odd.append((queue_key, field))
    fake.set_fault("list", body={"jobs": [first, bad, last]})
    for _ in range(3):
        page = stack.list_jobs(None, NOW)
        assert ([job.uuid for job in page.jobs], len(page.skipped)) == ([first["id"], last["id"]], 1)
    said = [record for record in caplog.records if record.name == "scheduler"]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert said[0].getMessage().startswith("skipped queue=default ")
    assert len(said[0].getMessage()) < 500
    assert odd == [("default", "id")]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"priority": "5"}, "priority", "it is '5': taken as 5"),
        ({"agent_query_rules": ["*=gpu", "a=1"]}, "agent_query_rules", "the rule *=gpu is not understood"),
        ({"agent_query_rules": {"a": "1"}}, "agent_query_rules", "it is {'a': '1'}: taken as ['a=1']"),
        ({"scheduled_at": "soon"}, "scheduled_at", "it is 'soon', not an RFC 3339 time: taken as 2027-01-15T08:00:00"),
        ({"runnable_at": 7}, "runnable_at", "it is 7, not an RFC 3339 time: taken as 1970-01-01T00:00:07"),
        ({"build": {"number": "12", "branch": 7}}, "build", "wrong type or too long: number, branch"),
        ({"step": "unit"}, "step", "it is 'unit': taken as {}"),
        ({"step": {"key": "x" * 1_500_000}}, "step", "wrong type or too long: key"),
    ],
)
def test_list_job_with_odd_field_says_and_counts_it_once(
    fake: FakeBuildkite,
    stack: Stack,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    field: str,
    said: str,
) -> None:
    odd: list[tuple[str, str]] = []
    stack.on_odd = lambda queue_key, field: odd.append((queue_key, field))
    fake.set_fault("list", body={"jobs": [raw(OTHER), raw(**fields)]})
    for _ in range(3):
        page = stack.list_jobs(None, NOW)
        assert ([job.uuid for job in page.jobs], page.skipped) == ([OTHER, UUID], [])
    (line,) = [record.getMessage() for record in caplog.records if record.name == "scheduler"]
    assert line.startswith(f"odd queue=default job={UUID} field={field} reason=")
    assert said in line and len(line) < 500
    assert odd == [("default", field)]


def test_list_ever_more_odd_jobs_remembers_a_bounded_number(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MANY_ODD", 3)
    odd: list[str] = []
    stack.on_odd = lambda _, field: odd.append(field)
    for number in range(5):
        stack._read([raw(f"018f0000-0000-4000-8000-{number:012}", priority="5")], NOW)
    assert (len(odd), len(stack._odd)) == (5, 3)


@pytest.mark.parametrize(
    "rules",
    [["a=" + "x" * 600], [f"key-{n}=" + "x" * 100 for n in range(50)], [{"a": "x" * 300_000}], ["é" * 300_000]],
    ids=["one long", "many", "no text", "letters of two bytes"],
)
def test_list_job_with_rules_beyond_the_bounds_keeps_a_part_that_no_worker_matches(rules: list[Any]) -> None:
    job = scheduler.Job.from_api("default", raw(agent_query_rules=rules), NOW)
    assert len(job.rule_set.encode()) < 3000
    kept = RuleSet.of("default", job.agent_query_rules)
    assert kept.unread and str(kept) == job.rule_set
    assert not scheduler.Profile(frozenset({"default"}), kept.tags, kept.keys).matches(kept)


def test_list_job_with_rules_within_the_bounds_keeps_them_whole() -> None:
    rules = ["a=" + "x" * 510, *(f"key-{n}=" + "x" * 90 for n in range(15))]
    job = scheduler.Job.from_api("default", raw(agent_query_rules=rules), NOW)
    assert list(job.agent_query_rules) == rules
    assert not RuleSet.of("default", job.agent_query_rules).unread


@pytest.mark.parametrize("digits", ["9" * 5000, "-" + "9" * 5000, "9" * 21])
def test_list_job_with_endless_number_keeps_the_others(fake: FakeBuildkite, stack: Stack, digits: str) -> None:
    body = json.dumps({"jobs": [raw(), raw(OTHER)]}).replace('"number": 1', f'"number": {digits}', 1)
    fake.set_fault("list", body=body.encode())
    assert [job.uuid for job in stack.list_jobs(None, NOW).jobs] == [UUID, OTHER]


# --- Odd answers to the other calls ---


def test_reserve_answered_with_strangers_and_nonsense_keeps_what_was_asked(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("reserve", body={"reserved": [UUID, "stranger", 5, None, {}], "not_reserved": [OTHER, "stranger"]})
    assert stack.reserve([UUID, OTHER], 900) == ({UUID}, {OTHER})


def test_reserve_answered_without_word_of_a_job_counts_it_as_not_reserved(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("reserve", body={"reserved": [UUID]})
    assert stack.reserve([UUID, OTHER], 900) == ({UUID}, {OTHER})


def test_reserve_answered_with_nothing_reserved_is_no_error(fake: FakeBuildkite, stack: Stack) -> None:
    uuid = fake.add_job(state="running")
    assert stack.reserve([uuid], 900) == (set(), {uuid})


def test_states_answered_with_strangers_and_nonsense_keeps_what_was_asked(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("get-states", body={"states": {UUID: "running", OTHER: None, "stranger": "running"}})
    assert stack.states([UUID, OTHER]) == {UUID: "running"}


def test_states_answered_with_words_that_cannot_be_kept_makes_them_so(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("get-states", body={"states": {UUID: "odd \ud83d", OTHER: "x" * 10_000}})
    assert stack.states([UUID, OTHER]) == {UUID: "odd ?", OTHER: "x" * 100}


@pytest.mark.parametrize(
    ("not_issued", "words"),
    [
        ([UUID], {UUID: ""}),
        (
            [{"job_uuid": UUID, "reason": "not_reserved", "message": "job is not reserved"}],
            "not_reserved: job is not reserved",
        ),
        ([{"uuid": UUID, "error": "gone"}], "gone"),
        ([{"id": UUID, "message": "x" * 10_000}], "x" * 256),
        ([None, 7, {"job_uuid": 7}, {}, []], {"": ""}),
        ("none", {}),
        (None, {}),
    ],
)
def test_job_tokens_not_issued_reads_buildkite_s_words_whatever_the_elements_are(
    fake: FakeBuildkite, stack: Stack, not_issued: Any, words: Any
) -> None:
    fake.set_fault("job-tokens", status=201, body={"job_acquisition_tokens": [], "not_issued": not_issued})
    tokens, told = stack.job_tokens([UUID], 60, math.inf)
    assert (tokens, told) == ({}, {UUID: words} if isinstance(words, str) else words)


@pytest.mark.parametrize("name", ["finish", "deregister"])
@pytest.mark.parametrize("body", [b"", b"{}", b"<html>fine</html>"])
def test_call_whose_answer_says_nothing_takes_any_body(
    fake: FakeBuildkite, stack: Stack, name: str, body: bytes
) -> None:
    fake.set_fault(name, body=body)
    CALLS[name](stack)


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>upstream connect error</body></html>",
        b"",
        b'{"jobs": [',
        b'{"jobs": "\xff"}',
        b"null",
        b"[]",
        b'"jobs"',
        b"7",
        pytest.param(b"[" * 100_000, id="nested too deep"),
    ],
)
def test_call_answered_200_with_no_json_object_raises(fake: FakeBuildkite, stack: Stack, body: bytes) -> None:
    fake.set_fault("stacks", body=body, headers={"Content-Type": "text/html"})
    for name in ("register", "list", "reserve", "get-states"):
        error = refusal_of(CALLS[name], stack)
        assert (error.status, error.retry_after) == (0, None)
        assert "on queue default" in str(error)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("list", {}),
        ("list", {"jobs": None}),
        ("list", {"jobs": {}}),
        ("list", {"jobs": "none"}),
        ("reserve", {}),
        ("reserve", {"reserved": None, "not_reserved": []}),
        ("reserve", {"reserved": UUID, "not_reserved": []}),
        ("reserve", {"reserved": {UUID: True}, "not_reserved": []}),
        ("get-states", {}),
        ("get-states", {"states": None}),
        ("get-states", {"states": []}),
        ("get-states", {"states": "running"}),
    ],
)
def test_call_answered_with_json_of_another_shape_raises(
    fake: FakeBuildkite, stack: Stack, name: str, body: object
) -> None:
    fake.set_fault(name, body=body)
    assert refusal_of(CALLS[name], stack).status == 0


# --- Refusals ---


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 502, 503, 504])
def test_call_refused_raises_with_status_and_words(fake: FakeBuildkite, stack: Stack, status: int) -> None:
    fake.set_fault("stacks", status=status, body={"message": "the reason for it"})
    for call in CALLS.values():
        error = refusal_of(call, stack)
        # A token that was refused is worth another try when its file may have been replaced.
        assert (error.status, error.retry_after) == (status, 60.0 if status == 401 else None)
        assert f"{status} from Buildkite: " in str(error)
        assert "the reason for it" in str(error)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>Bad Gateway</html>", "Bad Gateway"),
        (b"", ""),
        (b"\xff\xfe", ""),
        ([], "[]"),
        ({"error": "x"}, "error"),
        ({"message": None}, ""),
        (b"[" * 100_000, "[["),
    ],
    ids=["html", "empty", "not text", "list", "no message", "null message", "nested too deep"],
)
def test_call_refused_without_message_raises_with_what_came(
    fake: FakeBuildkite, stack: Stack, body: object, words: str
) -> None:
    fake.set_fault("list", status=502, body=body)
    error = refusal_of(stack.list_jobs, None, NOW)
    assert error.status == 502
    assert words in str(error)
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "8"}, 8.0),
        (429, {"Retry-After": "1.5"}, 1.5),
        (429, {"Retry-After": "0"}, 0.0),
        (503, {"Retry-After": "2.25"}, 2.25),
        (404, {"Retry-After": "3"}, 3.0),
        (429, {"RateLimit-Reset": "1"}, 1.0),
        (429, {"Retry-After": "5", "RateLimit-Reset": "1"}, 5.0),
        (429, {"Retry-After": "nan", "RateLimit-Reset": "1"}, 1.0),
        (503, {"RateLimit-Reset": "1"}, None),
        (422, {"RateLimit-Reset": "1"}, None),
        (429, {"Retry-After": "nan"}, None),
        (429, {"Retry-After": "-1"}, None),
        (429, {"Retry-After": "inf"}, None),
        (429, {"Retry-After": ""}, None),
        (429, {"Retry-After": "Fri, 15 Jan 2027 08:00:00 GMT"}, None),
        (429, {"RateLimit-Reset": "-1"}, None),
        (429, {}, None),
    ],
)
def test_call_refused_reads_how_long_to_wait(
    fake: FakeBuildkite, stack: Stack, status: int, headers: dict[str, str], seconds: float | None
) -> None:
    fake.set_fault("list", status=status, headers=headers)
    error = refusal_of(stack.list_jobs, None, NOW)
    assert (error.status, error.retry_after) == (status, seconds)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("name", ["list", "reserve"])
def test_call_redirected_is_not_followed(fake: FakeBuildkite, stack: Stack, name: str, status: int) -> None:
    with FakeBuildkite() as elsewhere:
        fake.set_fault(name, status=status, headers={"Location": f"{elsewhere.url}/stacks/x/scheduled-jobs"})
        assert refusal_of(CALLS[name], stack).status == status
        assert elsewhere.calls == []
    assert len(fake.calls_to(name)) == 1


@every_call
def test_call_refused_is_not_repeated_by_the_client(fake: FakeBuildkite, stack: Stack, name: str) -> None:
    before = len(fake.calls_to(name))
    fake.set_fault(name, status=503)
    refusal_of(CALLS[name], stack)
    assert len(fake.calls_to(name)) == before + 1


# --- No answer ---


def test_call_while_nobody_listens_raises_and_recovers(fake: FakeBuildkite, stack: Stack) -> None:
    fake.close()
    error = refusal_of(stack.list_jobs, None, NOW)
    assert (error.status, error.retry_after) == (0, None)
    assert "refused" in str(error)
    fake.start()
    assert stack.list_jobs(None, NOW).jobs == []


@every_call
def test_call_whose_connection_is_reset_raises_and_recovers(fake: FakeBuildkite, stack: Stack, name: str) -> None:
    fake.add_job(uuid=UUID)
    fake.reserve_for(UUID, KEY)
    fake.set_fault(name, reset=True, times=1)
    assert refusal_of(CALLS[name], stack).status == 0
    CALLS[name](stack)


def test_reserve_whose_answer_is_lost_raises_though_it_was_done(fake: FakeBuildkite, stack: Stack) -> None:
    uuid = fake.add_job()
    fake.set_fault("reserve", drop_after=True, times=1)
    assert refusal_of(stack.reserve, [uuid], 900).status == 0
    assert fake.jobs[uuid].state == "reserved"
    assert stack.reserve([uuid], 900) == ({uuid}, set())


@every_call
def test_call_that_is_never_answered_ends_with_its_time(
    fake: FakeBuildkite, stack: Stack, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CALL_SECONDS", 0.2)
    fake.set_fault(name, hang=math.inf)
    error = refusal_of(CALLS[name], stack)
    assert (error.status, error.retry_after) == (0, None)


@pytest.mark.parametrize("status", [200, 302, 503])
def test_call_answered_byte_by_byte_ends_with_its_time(
    fake: FakeBuildkite, stack: Stack, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each byte comes well within any time-out between two reads; all of them would take over ten seconds.
    headers = {"Location": "/elsewhere"} if status == 302 else {}
    fake.set_fault("list", status=status, headers=headers, body={"jobs": [], "message": "x" * 200}, trickle=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "CALL_SECONDS", 0.2)
        assert refusal_of(stack.list_jobs, None, NOW).status == 0
    fake.clear_faults()
    assert stack.list_jobs(None, NOW).jobs == []


# --- Proxies ---


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Sets up a proxy that gives every call this answer; with b"", one that is down. Returns its address."""
    servers: list[socketserver.TCPServer] = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def set_up(answer: bytes, name: str = "HTTP_PROXY", login: str = "user:secret@") -> str:
        class Answer(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.rfile.readline()
                self.wfile.write(answer)

        servers.append(socketserver.TCPServer(("127.0.0.1", 0), Answer))
        address = f"127.0.0.1:{servers[0].server_address[1]}"
        if answer:
            threading.Thread(target=servers[0].serve_forever, args=(0.01,), daemon=True).start()
        else:
            servers.pop().server_close()
        monkeypatch.setenv(name, f"http://{login}{address}")
        return f"http://{address}"

    yield set_up
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("endpoint", "name", "answer", "told"),
    [
        ("http", "HTTP_PROXY", b"", "no answer from {}"),
        ("https", "HTTPS_PROXY", b"", "no answer from {}"),
        ("https", "ALL_PROXY", b"", "no answer from {}"),
        ("https", "HTTPS_PROXY", b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n", "no answer from {}"),
        ("http", "HTTP_PROXY", b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n", "407 from {}"),
        ("http", "HTTP_PROXY", b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", "502 from {}"),
        ("http", "HTTP_PROXY", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200 from {}, but not JSON"),
        ("http", "HTTP_PROXY", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "200 from {}, but not a JSON object"),
        ("http", "HTTP_PROXY", b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "401 from {}"),
    ],
)
def test_call_that_fails_on_its_way_through_a_proxy_names_it_without_its_password(
    endpoint: str, name: str, answer: bytes, told: str, proxy: Callable[..., str]
) -> None:
    address = proxy(answer, name)
    error = refusal_of(Stack(f"{endpoint}://buildkite.invalid/v3", lambda: "t", KEY, "default").register)
    assert told.format(f"Buildkite through the proxy {address} ({name})") in str(error)
    assert "secret" not in str(error)


def test_call_that_fails_beside_a_proxy_names_none(
    fake: FakeBuildkite, stack: Stack, proxy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy(b"")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake.set_fault("list", status=503, times=1)
    assert "503 from Buildkite: " in str(refusal_of(stack.list_jobs, None, NOW))
    assert stack.list_jobs(None, NOW).jobs == []


#: As libraries take them: without a user, without a password, with an @ in it, in another script, quoted.
LOGINS = ["user:secret@", "secret@", ":secret@", "user:@secret@", "secret:%E2%82%ACsecret@", "us'er,=:(secret)@"]


@pytest.mark.parametrize("scheme", ["http://", "https://", "socks5h://", "HTTP://", ""])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_call_through_a_proxy_with_any_login_shows_nothing_of_it(
    name: str, scheme: str, proxy: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = proxy(b"", name).removeprefix("http://")
    for login in LOGINS:
        monkeypatch.setenv(name, f"{scheme}{login}{place}")
        assert scheduler.wrong_proxies(os.environ) == []
        error = str(refusal_of(Stack("http://buildkite.invalid/v3", lambda: "t", KEY, "default").register))
        assert f"through the proxy {scheme}{place} ({name.upper()})" in error
        assert not re.search("secret|us'?er|\\u20ac|\u20ac", error)


# --- The token stays where it belongs ---


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 401},
        {"status": 500},
        {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}},
        {"garbage": True},
        {"body": {}},
        {"reset": True},
        {"drop_after": True},
        {"hang": math.inf},
    ],
    ids=str,
)
def test_call_that_fails_shows_no_token(
    fake: FakeBuildkite, stack: Stack, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CALL_SECONDS", 0.2)
    fake.set_fault("list", **fault)
    error = refusal_of(stack.list_jobs, None, NOW)
    assert "bkct_test" not in "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("token", ["bkct_test\nsecond", "bkct_tést☃", "\x00bkct_test"], ids=ascii)
def test_call_with_token_that_no_header_can_hold_raises_without_showing_it(fake: FakeBuildkite, token: str) -> None:
    stack = Stack(fake.url, lambda: token, KEY, "default")
    error = refusal_of(stack.register)
    assert "bkct_t" not in "".join(traceback.format_exception(error)) + repr(error)


# --- Pace ---


@pytest.mark.parametrize("limit", [1, 10, 100])
def test_delay_under_any_arrivals_keeps_every_second_under_the_limit(limit: int) -> None:
    pace, now, chance = RateLimiter(limit), 5000.0, random.Random(limit)
    places = []
    for _ in range(2000):
        now += chance.choice([0, 0, 0, 0.001, 0.02, 0.3, 2.5])
        places.append(now + pace.delay(now))
    assert places == sorted(places)
    for first, after_limit in zip(places, places[limit:], strict=False):
        assert after_limit - first > 1.0


def test_delay_within_the_limit_is_nothing() -> None:
    pace = RateLimiter(3)
    assert [pace.delay(now) for now in (10.0, 10.0, 10.5)] == [0, 0, 0]
    assert pace.delay(10.5) > 0.5
    assert pace.delay(20.0) == 0


def test_call_more_often_than_allowed_waits_and_is_not_refused(wire: list[Request]) -> None:
    with FakeBuildkite() as strict:
        stack = Stack(strict.url, lambda: strict.token, KEY, "default")
        stack.register()
        for _ in range(11):
            stack.list_jobs(None, NOW)
        assert {call.status for call in strict.calls_to("list")} == {200}


def test_show_job_on_many_threads_keeps_the_limit_of_all_together(
    fake: FakeBuildkite, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scheduler.CALLS_PER_SECOND["show-job"] == 1000
    monkeypatch.setitem(stack._paces, "show-job", RateLimiter(12))
    uuid, begun_at = fake.add_job(env={"A": "x"}), time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        assert len([*threads.map(stack.show_job, [uuid] * 30)]) == 30
    assert len(fake.calls_to("get-job")) == 30
    assert time.monotonic() - begun_at > 2.0  # 12 at once, 12 a second later, and the last 6


# --- Odd answers over HTTP ---


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ({"status": 204, "body": b""}, 0),
        ({"body": b"not gzip", "headers": {"Content-Encoding": "gzip"}}, 0),
        ({"status": 599, "body": b"<html>proxy</html>"}, 599),
        ({"body": b"20\r\n{", "headers": {"Transfer-Encoding": "chunked", "Connection": "close"}}, 0),
    ],
    ids=["no content", "not gzip", "odd status", "broken off"],
)
def test_list_answered_oddly_raises_with_its_status(
    fake: FakeBuildkite, stack: Stack, fault: dict[str, Any], status: int
) -> None:
    fake.set_fault("list", **fault)
    error = refusal_of(stack.list_jobs, None, NOW)
    assert error.status == status
    assert "list on queue default" in str(error)
    assert "bkct_test" not in str(error)


def test_list_with_a_job_that_is_nested_too_deep_reads_the_others_and_that_one(
    fake: FakeBuildkite, stack: Stack
) -> None:
    deep, plain = fake.add_job(), fake.add_job()
    text = json.dumps({"jobs": [listed(fake.jobs[uuid]) | {"note": "DEEP"} for uuid in (deep, plain)]})
    nested = '[{"a]\\\\": "}\\"["},' * 50_000 + "7" + "]" * 50_000
    fake.set_fault("list", body=text.replace('"DEEP"', nested, 1).encode())
    page = stack.list_jobs(None, NOW)
    assert [job.uuid for job in page.jobs] == [deep, plain]
    assert page.jobs[0].about == page.jobs[1].about
    assert page.skipped == []


def test_list_from_a_server_without_tls_raises(fake: FakeBuildkite) -> None:
    stack = Stack(fake.url.replace("http://", "https://"), lambda: fake.token, KEY, "default")
    error = refusal_of(stack.list_jobs, None, NOW)
    assert error.status == 0
    assert "SSLError" in str(error)


def test_list_answered_well_but_with_retry_after_is_taken(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("list", body={"jobs": []}, headers={"Retry-After": "5"})
    assert stack.list_jobs(None, NOW).jobs == []


@pytest.mark.parametrize(("most", "is_read"), [(50_000, False), (200_000, True)])
def test_list_whose_answer_is_longer_than_the_bound_raises(
    fake: FakeBuildkite, stack: Stack, most: int, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ANSWER_BYTES", most)
    fake.set_fault("list", body=b'{"jobs": []' + b" " * 100_000 + b"}")
    if is_read:
        assert stack.list_jobs(None, NOW).jobs == []
    else:
        assert f"more than {most} bytes" in str(refusal_of(stack.list_jobs, None, NOW))


@pytest.mark.parametrize("name", CALLS)
def test_call_any_endpoint_asks_for_an_answer_that_is_not_encoded(
    stack: Stack, wire: list[Request], name: str, fake: FakeBuildkite
) -> None:
    fake.add_job(uuid=UUID)
    fake.reserve_for(UUID, KEY)
    CALLS[name](stack)
    assert [request.headers["accept-encoding"] for request in wire] == ["identity"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
@pytest.mark.parametrize("status", [200, 401, 502])
def test_list_answered_encoded_all_the_same_is_not_unpacked_and_keeps_its_status(
    fake: FakeBuildkite, stack: Stack, status: int, encoding: str
) -> None:
    packed = gzip.compress(b'{"jobs": []' + b" " * 10_000_000 + b"}")
    fake.set_fault("list", status=status, body=packed, headers={"Content-Encoding": encoding}, times=1)
    tracemalloc.start()
    try:
        error = refusal_of(stack.list_jobs, None, NOW)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
    assert error.status in (status, 0)  # 0: the answer of a 200 could not be used
    assert f"encoded as {encoding}, which we did not ask for" in str(error)
    assert stack.list_jobs(None, NOW).jobs == []


def test_list_answered_as_identity_is_taken(fake: FakeBuildkite, stack: Stack) -> None:
    fake.set_fault("list", body={"jobs": []}, headers={"Content-Encoding": "Identity"})
    assert stack.list_jobs(None, NOW).jobs == []


# --- GraphQL ---


@pytest.fixture
def graph(fake: FakeBuildkite, wire: list[Request]) -> GraphApi:
    return GraphApi(fake.graphql_url, lambda: fake.api_token)


@pytest.mark.parametrize("query", [scheduler.JOB_QUERY, scheduler.CANCEL_QUERY, scheduler.CHECK_QUERY])
def test_read_what_graphql_is_asked_is_valid_in_buildkites_schema(query: str) -> None:
    schema = graphql.build_schema((Path(__file__).parent / "buildkite.graphql").read_text())
    assert graphql.validate(schema, graphql.parse(query)) == []
    assert graphql.validate(schema, graphql.parse(query.replace("state", "status"))) or query == scheduler.CHECK_QUERY


def test_cancel_asks_for_the_id_and_sends_it_with_the_token_in_its_header_alone(
    fake: FakeBuildkite, graph: GraphApi, wire: list[Request]
) -> None:
    fake.add_job(uuid=UUID, state="scheduled")
    assert graph.cancel(UUID, "default") == "canceled"
    assert fake.jobs[UUID].state == "canceled"
    assert [(request.method, request.path) for request in wire] == [("POST", "/graphql/v1")] * 2
    node_id = "Sm9iVHlwZUNvbW1hbmQtLS0wMThmMDAwMC0wMDAwLTQwMDAtODAwMC0wMDAwMDAwMDAwMDE="
    assert [json.loads(request.body)["variables"] for request in wire] == [{"uuid": UUID}, {"id": node_id}]
    for request in wire:
        assert request.headers["authorization"] == "Bearer bkua_test"
        elsewhere = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert "bkua_test" not in repr((request.path, request.query, request.body, elsewhere))


@pytest.mark.parametrize("state", ["canceling", "finished", "canceled"])
def test_cancel_of_a_job_that_ends_already_asks_for_no_more(fake: FakeBuildkite, graph: GraphApi, state: str) -> None:
    fake.add_job(uuid=UUID)
    fake.set_state(UUID, state)
    assert graph.cancel(UUID, "default") == state
    assert len(fake.calls_to("graphql")) == 1


def test_cancel_of_a_job_that_the_token_may_not_see_says_what_it_needs(graph: GraphApi) -> None:
    error = refusal_of(graph.cancel, UUID, "default")
    assert (error.status, f"cancel job {UUID}: Buildkite shows no such job; BUILDKITE_API_TOKEN" in str(error)) == (
        422,
        True,
    )


@pytest.mark.parametrize(
    ("fault", "status", "told", "again"),
    [
        (
            {"status": 401, "body": {"errors": [{"message": "Authentication required"}]}},
            401,
            "refuses BUILDKITE_API_TOKEN: Authentication required; BUILDKITE_API_TOKEN must have full GraphQL access",
            60.0,
        ),
        ({"status": 403, "body": {"message": "no GraphQL"}}, 403, "no GraphQL; BUILDKITE_API_TOKEN must have", None),
        (
            {"body": {"data": None, "errors": [{"message": "read-only"}]}},
            422,
            "refuses it: read-only; BUILDKITE_",
            None,
        ),
        ({"body": {"errors": ["?"]}}, 422, "refuses it: ", None),
        ({"body": {"errors": [{"message": "cost"}], "data": {"job": {}}}}, 422, "refuses it: cost; BUILD", None),
        ({"status": 429, "headers": {"RateLimit-Reset": "7", "RateLimit-User-Reset": "90"}}, 429, "429 from", 90.0),
        ({"status": 429, "headers": {"Retry-After": "3", "RateLimit-User-Reset": "90"}}, 429, "429 from", 3.0),
        ({"status": 502, "headers": {"RateLimit-User-Reset": "90"}}, 502, "502 from Buildkite", None),
        ({"garbage": True}, 0, "200 from Buildkite, but not JSON", None),
        ({"reset": True}, 0, "no answer from Buildkite", None),
    ],
    ids=str,
)
def test_cancel_that_is_refused_names_what_to_do_and_shows_no_token(
    fake: FakeBuildkite, graph: GraphApi, fault: dict[str, Any], status: int, told: str, again: float | None
) -> None:
    fake.add_job(uuid=UUID)
    seen: list[tuple[str, str, int]] = []
    graph.on_call = lambda *call: seen.append(call)
    fake.set_fault("graphql", **fault)
    error = refusal_of(graph.cancel, UUID, "linux")
    assert (error.status, error.retry_after) == (status, again)
    assert told in str(error)
    assert "bkua_test" not in "".join(traceback.format_exception(error)) + repr(error)
    assert seen == [("linux", "graphql", {0: 200 if "garbage" in fault else 0, 422: 200}.get(status, status))]


def test_cancel_whose_mutation_names_no_state_is_no_success(fake: FakeBuildkite, graph: GraphApi) -> None:
    fake.add_job(uuid=UUID)
    fake.set_fault(
        "graphql", body={"data": {"jobTypeCommandCancel": None}}, match=lambda _, request: b"mutation" in request.body
    )
    assert "Buildkite's answer has no state of the job" in str(refusal_of(graph.cancel, UUID, "default"))
