"""The fakes keep Buildkite's rules: the server over real HTTP, the agents against it.

The real agents are run when REAL_AGENT_V3 and REAL_AGENT_V4 name their binaries; what they do here is what
`fake_agent.py` must do as well.
"""

from __future__ import annotations

import http.client
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import agent_path

TESTS = Path(__file__).parent
STACK = {"key": "vm1", "type": "custom", "queue_key": "default", "metadata": {}}
UNKNOWN = "00000000-0000-4000-8000-000000000000"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeBuildkite]:
    """A server with one stack, `vm1`, registered for `default`."""
    with FakeBuildkite(clock=clock) as server:
        assert call(server, "POST", "/stacks/register", STACK).status_code == 201
        yield server


def call(fake: FakeBuildkite, method: str, path: str, json: Any = None, token: str = "") -> requests.Response:
    headers = {"Authorization": f"Token {token or fake.token}"}
    return requests.request(method, fake.url + path, json=json, headers=headers, timeout=30)


def listing(fake: FakeBuildkite, query: str = "queue_key=default", key: str = "vm1") -> Any:
    response = call(fake, "GET", f"/stacks/{key}/scheduled-jobs?{query}")
    assert response.status_code == 200, response.text
    return response.json()


def listed(fake: FakeBuildkite, query: str = "queue_key=default") -> list[str]:
    return [job["id"] for job in listing(fake, query)["jobs"]]


def reserve(fake: FakeBuildkite, *uuids: str, key: str = "vm1", **more: Any) -> requests.Response:
    body = {"job_uuids": uuids, **more}
    return call(fake, "PUT", f"/stacks/{key}/scheduled-jobs/batch-reserve", body)


def finish(fake: FakeBuildkite, uuid: str, **body: Any) -> requests.Response:
    return call(fake, "POST", f"/stacks/vm1/jobs/{uuid}/finish", {"detail": "no worker", **body})


def job_token(fake: FakeBuildkite, uuid: str, **more: Any) -> str:
    body = {"job_uuids": [uuid], **more}
    response = call(fake, "POST", "/stacks/vm1/job-acquisition-tokens", body)
    assert response.status_code == 201, response.text
    return str(response.json()["job_acquisition_tokens"][0]["job_acquisition_token"])


def session(fake: FakeBuildkite, token: str = "") -> str:
    """Register an agent and answer its access token."""
    response = call(fake, "POST", "/register", {"name": "w1", "meta_data": ["queue=default"]}, token)
    assert response.status_code == 200, response.text
    return str(response.json()["access_token"])


def acquire(fake: FakeBuildkite, uuid: str, token: str = "") -> requests.Response:
    headers = {"Authorization": f"Token {token or session(fake)}", "X-Buildkite-Lock-Acquire-Job": "1"}
    return requests.put(f"{fake.url}/jobs/{uuid}/acquire", headers=headers, timeout=30)


# --- Stacks API -------------------------------------------------------------------------------------------


def test_register_new_key_is_created_and_again_updated(fake: FakeBuildkite) -> None:
    body = {**STACK, "key": "vm2", "queue_key": "_default", "metadata": {"host": "vm2"}}
    first, second = (call(fake, "POST", "/stacks/register", body) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["cluster_queue_key"] == "_default"
    assert first.json()["metadata"] == {"host": "vm2"}
    assert first.json()["state"] == "connected"
    assert first.json()["id"] == second.json()["id"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "has.dot"},
        {"key": "k" * 81},
        {"key": None},
        {"type": "vm"},
        {"queue_key": ""},
        {"metadata": None},
        {"metadata": {"pid": 7}},
        {"metadata": {"k" * 65: ""}},
        {"metadata": {str(n): "" for n in range(101)}},
    ],
)
def test_register_with_bad_field_is_refused(fake: FakeBuildkite, wrong: dict[str, Any]) -> None:
    response = call(fake, "POST", "/stacks/register", {**STACK, **wrong})
    assert response.status_code == 422
    assert response.json()["message"]


def test_register_over_stack_limit_is_refused_until_one_deregisters(fake: FakeBuildkite) -> None:
    fake.stack_limit = 1
    assert call(fake, "POST", "/stacks/register", {**STACK, "key": "vm2"}).status_code == 403
    assert call(fake, "POST", "/stacks/register", STACK).status_code == 200
    assert call(fake, "POST", "/stacks/vm1/deregister").status_code == 204
    assert call(fake, "POST", "/stacks/register", {**STACK, "key": "vm2"}).status_code == 201


def test_call_of_unregistered_stack_is_not_found(fake: FakeBuildkite) -> None:
    assert call(fake, "GET", "/stacks/nobody/scheduled-jobs?queue_key=default").status_code == 404
    assert call(fake, "POST", "/stacks/vm1/deregister").status_code == 204
    assert call(fake, "GET", "/stacks/vm1/scheduled-jobs?queue_key=default").status_code == 404


def test_call_with_wrong_token_is_unauthorized(fake: FakeBuildkite) -> None:
    path = "/stacks/vm1/scheduled-jobs?queue_key=default"
    assert call(fake, "GET", path, token="bkct_other").status_code == 401
    assert call(fake, "GET", path, token=session(fake)).status_code == 401
    old = fake.token
    fake.replace_token("bkct_new")
    assert call(fake, "GET", path, token=old).status_code == 401
    assert call(fake, "GET", path).status_code == 200


def test_call_of_unknown_path_or_method_is_refused(fake: FakeBuildkite) -> None:
    assert call(fake, "GET", "/nowhere").status_code == 404
    assert call(fake, "DELETE", "/stacks/register").status_code == 405


def test_call_with_percent_escaped_key_finds_stack(fake: FakeBuildkite) -> None:
    assert call(fake, "GET", "/stacks/%76m1/scheduled-jobs?queue_key=default").status_code == 200


def test_deregister_with_chunked_empty_body_keeps_connection_usable(fake: FakeBuildkite) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", fake.port, timeout=30)
    headers = {"Authorization": f"Token {fake.token}"}
    connection.request("POST", "/v3/stacks/vm1/deregister", body=iter([]), headers=headers, encode_chunked=True)
    assert connection.getresponse().read() == b""
    connection.request("GET", "/v3/stacks/vm1/scheduled-jobs?queue_key=default", headers=headers)
    assert connection.getresponse().status == 404
    connection.close()
    assert fake.calls[-2].headers["transfer-encoding"] == "chunked"


def test_list_gives_every_documented_field(fake: FakeBuildkite, clock: Clock) -> None:
    uuid = fake.add_job(rules=["queue=default", "os=linux"], priority=3, step_key="unit", build_number=7)
    fake.add_job(queue="other")
    answer = listing(fake)
    (job,) = answer["jobs"]
    assert job["pipeline"].pop("uuid") and job["build"].pop("uuid")
    assert job == {
        "id": uuid,
        "priority": 3,
        "agent_query_rules": ["queue=default", "os=linux"],
        "scheduled_at": "2027-01-15T08:00:00.000Z",
        "pipeline": {"slug": "demo"},
        "build": {"number": 7, "branch": "main"},
        "step": {"key": "unit"},
    }
    assert answer["cluster_queue"].pop("id")
    assert answer["cluster_queue"] == {"dispatch_paused": False, "paused": False}
    assert answer["page_info"]["has_next_page"] is False


def test_list_in_pages_goes_from_oldest_to_newest_whatever_the_priority(fake: FakeBuildkite) -> None:
    new = fake.add_job(scheduled_at=30.0, priority=9)
    old = fake.add_job(scheduled_at=10.0)
    mid = fake.add_job(scheduled_at=20.0)
    first = listing(fake, "queue_key=default&limit=2")
    assert [job["id"] for job in first["jobs"]] == [old, mid]
    assert first["page_info"]["has_next_page"] is True
    cursor = first["page_info"]["end_cursor"]
    fake.add_job(scheduled_at=15.0)  # behind the cursor: this pass does not see it
    assert listed(fake, f"queue_key=default&after={quote(cursor)}") == [new]


@pytest.mark.parametrize(
    "query", ["", "queue_key=default&limit=0", "queue_key=default&limit=1001", "queue_key=default&after=x"]
)
def test_list_with_bad_query_is_refused(fake: FakeBuildkite, query: str) -> None:
    assert call(fake, "GET", f"/stacks/vm1/scheduled-jobs?{query}").status_code == 400


def test_list_of_paused_queue_says_so_and_still_lists(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    fake.pause_queue("_default")
    answer = listing(fake)
    assert answer["cluster_queue"]["dispatch_paused"] is answer["cluster_queue"]["paused"] is True
    assert [job["id"] for job in answer["jobs"]] == [uuid]
    fake.resume_queue("default")
    assert listing(fake)["cluster_queue"]["dispatch_paused"] is False


def test_list_of_queue_that_does_not_exist_is_not_found(clock: Clock) -> None:
    with FakeBuildkite(queues=["default"]) as fake:
        assert call(fake, "POST", "/stacks/register", STACK).status_code == 201
        assert listed(fake, "queue_key=__default__") == []
        assert call(fake, "GET", "/stacks/vm1/scheduled-jobs?queue_key=gone").status_code == 404


def test_reserve_takes_free_jobs_and_refuses_the_rest(fake: FakeBuildkite) -> None:
    free, theirs, running = fake.add_job(), fake.add_job(), fake.add_job(state="running")
    fake.reserve_for(theirs, "other-stack")
    answer = reserve(fake, free, theirs, running, UNKNOWN).json()
    assert answer == {"reserved": [free], "not_reserved": [theirs, running, UNKNOWN]}
    assert (fake.jobs[free].state, fake.jobs[free].reserved_by) == ("reserved", "vm1")
    assert listed(fake) == []


def test_reserve_again_extends_until_the_clock_lapses_it(fake: FakeBuildkite, clock: Clock) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid, reservation_expiry_seconds=10)
    clock.now += 9
    assert reserve(fake, uuid, reservation_expiry_seconds=10).json()["reserved"] == [uuid]
    clock.now += 9
    assert listed(fake) == []
    clock.now += 1
    assert listed(fake) == [uuid]
    events = [what for _, what, _ in fake.jobs[uuid].history]
    assert events == ["added", "reserved", "reservation_extended", "reservation_lapsed"]


def test_reserve_without_expiry_lasts_fifteen_minutes(fake: FakeBuildkite, clock: Clock) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid)
    assert fake.jobs[uuid].reservation_expires_at == clock.now + 900
    fake.lapse(uuid)
    assert fake.jobs[uuid].state == "scheduled"


def test_reserve_with_malformed_uuid_spoils_the_batch(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    response = reserve(fake, uuid, "job-2")
    assert response.status_code == 422
    assert "job_uuids[1]" in response.json()["message"]
    assert fake.jobs[uuid].state == "scheduled"


def test_reserve_beyond_a_bound_is_refused(fake: FakeBuildkite) -> None:
    assert reserve(fake, *[UNKNOWN] * 1000).status_code == 200
    assert reserve(fake, *[UNKNOWN] * 1001).status_code == 422
    assert reserve(fake, UNKNOWN, reservation_expiry_seconds=3600).status_code == 200
    assert reserve(fake, UNKNOWN, reservation_expiry_seconds=3601).status_code == 422
    assert reserve(fake).status_code == 400


def test_lapse_of_very_many_reservations_at_once_returns_all(fake: FakeBuildkite, clock: Clock) -> None:
    for _ in range(3000):
        fake.reserve_for(fake.add_job(), "other-stack", 5)
    clock.now += 5
    assert {job.state for job in fake.jobs.values()} == {"scheduled"}


def test_get_job_gives_its_command_and_env(fake: FakeBuildkite) -> None:
    uuid = fake.add_job(command="make", env={"X": "1"})
    answer = call(fake, "GET", f"/stacks/vm1/jobs/{uuid}").json()
    assert (answer["id"], answer["command"], answer["env"]["X"]) == (uuid, "make", "1")
    assert call(fake, "GET", f"/stacks/vm1/jobs/{UNKNOWN}").status_code == 404


def test_get_states_leaves_unknown_jobs_out(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    fake.set_state(uuid, "platform_limited")
    response = call(fake, "POST", "/stacks/vm1/jobs/get-states", {"job_uuids": [uuid, UNKNOWN]})
    assert response.json() == {"states": {uuid: "platform_limited"}}


@pytest.mark.parametrize(("sent", "kept"), [({}, -1), ({"exit_status": 0}, 0)])
def test_finish_of_reserved_job_ends_it_once(fake: FakeBuildkite, sent: dict[str, int], kept: int) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid)
    assert finish(fake, uuid, **sent).status_code == 200
    job = fake.jobs[uuid]
    assert (job.state, job.exit_status, job.signal_reason) == ("finished", kept, "stack_error")
    assert job.finish_detail == "no worker"
    assert finish(fake, uuid).status_code == 422
    assert job.happened("finish_by_stack") == 1


def test_finish_of_job_with_agent_or_of_other_stack_is_refused(fake: FakeBuildkite) -> None:
    taken, theirs = fake.add_job(), fake.add_job()
    assert acquire(fake, taken).status_code == 200
    fake.reserve_for(theirs, "other-stack")
    assert finish(fake, taken).status_code == 422
    assert finish(fake, theirs).status_code == 422
    assert finish(fake, fake.add_job()).status_code == 422  # nobody has reserved it
    assert finish(fake, UNKNOWN).status_code == 404


def test_finish_with_detail_over_4096_bytes_is_refused(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid)
    assert finish(fake, uuid, detail="").status_code == 422
    assert finish(fake, uuid, detail="é" * 2049).status_code == 422
    assert finish(fake, uuid, detail="é" * 2048).status_code == 200


def test_notify_keeps_good_ones_and_names_the_bad(fake: FakeBuildkite, clock: Clock) -> None:
    uuid, over, new = fake.add_job(), fake.add_job(state="finished"), fake.add_job()
    reserve(fake, uuid)
    clock.now += 301
    sent = [
        {"job_uuid": uuid, "detail": "starting"},
        {"job_uuid": uuid, "detail": ""},
        {"job_uuid": uuid, "detail": "x" * 257},
        {"job_uuid": uuid},
        {"job_uuid": uuid, "detail": "early", "timestamp": "2001-01-01T00:00:00Z"},
        {"job_uuid": over, "detail": "late"},
        {"job_uuid": new, "detail": "nobody has reserved it"},
    ]
    response = call(fake, "POST", "/stacks/vm1/notifications", {"notifications": sent})
    assert response.json()["errors"] == [
        {"error": "detail is required", "indexes": [1, 3]},
        {"error": "detail exceeds its length limit of 256", "indexes": [2]},
        {"error": "timestamp is before the job was created", "indexes": [4]},
        {"error": "job finished too long ago", "indexes": [5]},
        {"error": "job is not reserved", "indexes": [6]},
    ]
    assert [kept["detail"] for kept in fake.jobs[uuid].notifications] == ["starting"]


def test_notify_beyond_hundred_of_a_job_is_refused(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid)
    sent = [{"job_uuid": uuid, "detail": "tick"}] * 101
    answer = call(fake, "POST", "/stacks/vm1/notifications", {"notifications": sent}).json()
    assert answer == {"errors": [{"error": "job stack notification count exceeded", "indexes": [100]}]}


def test_issue_job_tokens_gives_them_for_own_reservations_alone(fake: FakeBuildkite) -> None:
    mine, free, theirs = fake.add_job(), fake.add_job(), fake.add_job()
    reserve(fake, mine)
    fake.reserve_for(theirs, "other-stack")
    body = {"job_uuids": [mine, free, theirs], "token_lifetime_seconds": 60}
    response = call(fake, "POST", "/stacks/vm1/job-acquisition-tokens", body)
    assert response.status_code == 201
    (issued,) = response.json()["job_acquisition_tokens"]
    assert issued["job_uuid"] == mine
    assert issued["job_acquisition_token"].startswith("bkjat_")
    assert issued["expires_at"] == "2027-01-15T08:01:00.000Z"
    assert response.json()["not_issued"] == [free, theirs]


def test_issue_job_tokens_outside_the_stacks_queue_is_forbidden(fake: FakeBuildkite) -> None:
    uuid = fake.add_job(queue="other")
    assert reserve(fake, uuid).json()["reserved"] == [uuid]
    response = call(fake, "POST", "/stacks/vm1/job-acquisition-tokens", {"job_uuids": [uuid]})
    assert response.status_code == 403


def test_register_agent_with_job_token_fails_once_it_or_the_reservation_is_over(
    fake: FakeBuildkite, clock: Clock
) -> None:
    uuid = fake.add_job()
    reserve(fake, uuid)
    token = job_token(fake, uuid, token_lifetime_seconds=5)
    assert session(fake, token)
    clock.now += 5
    assert call(fake, "POST", "/register", {"name": "w1"}, token).status_code == 401
    token = job_token(fake, uuid)
    fake.lapse(uuid)
    assert call(fake, "POST", "/register", {"name": "w1"}, token).status_code == 401


def test_list_over_ten_a_second_is_limited_with_every_header(fake: FakeBuildkite) -> None:
    path = "/stacks/vm1/scheduled-jobs?queue_key=default"
    answers = [call(fake, "GET", path) for _ in range(30)]
    assert answers[0].headers["RateLimit-Scope"] == "list-scheduled-jobs"
    assert answers[0].headers["RateLimit-Limit"] == "10"
    assert answers[0].headers["RateLimit-Remaining"] == "9"
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"] == "1"
    assert refused.json()["scope"] == "list-scheduled-jobs"
    assert (refused.json()["limit"], refused.json()["reset"]) == (10, 1)
    assert reserve(fake, UNKNOWN).status_code == 200  # each endpoint has its own


def test_list_with_limits_off_is_never_limited(fake: FakeBuildkite) -> None:
    fake.rate_limits = False
    assert {call(fake, "GET", "/stacks/vm1/scheduled-jobs?queue_key=default").status_code for _ in range(15)} == {200}


# --- Agent API --------------------------------------------------------------------------------------------


def test_acquire_of_scheduled_or_reserved_job_succeeds_once(fake: FakeBuildkite) -> None:
    bare, reserved = fake.add_job(), fake.add_job()
    reserve(fake, reserved)
    for uuid in (bare, reserved):
        assert acquire(fake, uuid).json()["env"]["BUILDKITE_JOB_ID"] == uuid
        second = acquire(fake, uuid)
        assert second.status_code == 422
        assert "no longer eligible to be assigned an agent" in second.json()["message"]
        job = fake.jobs[uuid]
        assert (job.happened("acquired"), job.happened("acquire_rejected")) == (1, 1)


@pytest.mark.parametrize(("state", "status"), [("limited", 423), ("canceled", 422), ("running", 422)])
def test_acquire_of_job_that_is_not_free_is_refused(fake: FakeBuildkite, state: str, status: int) -> None:
    uuid = fake.add_job()
    fake.set_state(uuid, state)
    assert acquire(fake, uuid).status_code == status
    assert acquire(fake, UNKNOWN).status_code == 404


def test_acquire_with_job_token_takes_its_own_job_alone(fake: FakeBuildkite) -> None:
    mine, other = fake.add_job(), fake.add_job()
    reserve(fake, mine)
    token = session(fake, job_token(fake, mine))
    assert acquire(fake, other, token).status_code == 403
    assert fake.jobs[other].state == "scheduled"
    assert acquire(fake, mine, token).status_code == 200


def test_cancel_before_and_after_acquire_ends_in_canceled(fake: FakeBuildkite) -> None:
    waiting, running = fake.add_job(), fake.add_job()
    assert fake.cancel_job(waiting) == "canceled"
    token = acquire(fake, running).json()["token"]
    assert fake.cancel_job(running) == "canceling"
    assert call(fake, "GET", f"/jobs/{running}", token=token).json()["state"] == "canceling"
    body = {"exit_status": "-1", "signal": "SIGTERM", "signal_reason": "cancel"}
    assert call(fake, "PUT", f"/jobs/{running}/finish", body, token).status_code == 200
    assert (fake.jobs[running].state, fake.jobs[running].exit_status) == ("canceled", -1)


def test_finish_after_agent_was_lost_is_refused(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    token = acquire(fake, uuid).json()["token"]
    assert call(fake, "PUT", f"/jobs/{uuid}/start", {}, token).status_code == 200
    fake.lose_agent(uuid)
    assert (fake.jobs[uuid].state, fake.jobs[uuid].exit_status) == ("finished", -1)
    assert call(fake, "PUT", f"/jobs/{uuid}/finish", {"exit_status": "0"}, token).status_code == 422
    assert fake.jobs[uuid].exit_status == -1


def test_lose_agent_by_itself_after_silence(clock: Clock) -> None:
    with FakeBuildkite(clock=clock, lost_after=180) as fake:
        uuid = fake.add_job()
        acquire(fake, uuid)
        clock.now += 179
        assert fake.jobs[uuid].state == "accepted"
        clock.now += 1
        assert (fake.jobs[uuid].state, fake.jobs[uuid].happened("agent_lost")) == ("finished", 1)


def test_upload_out_of_order_is_joined_by_sequence(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    headers = {"Authorization": f"Token {acquire(fake, uuid).json()['token']}"}
    for sequence, text in ((2, b"world"), (1, b"hello ")):
        place = f"sequence={sequence}&offset=0&size={len(text)}"
        url = f"{fake.url}/jobs/{uuid}/chunks?{place}"
        assert requests.post(url, data=text, headers=headers, timeout=30).status_code == 201
    assert fake.jobs[uuid].log == "hello world"
    url = f"{fake.url}/jobs/{uuid}/chunks?sequence=3&offset=0&size=9"
    assert requests.post(url, data=b"short", headers=headers, timeout=30).status_code == 422


# --- GraphQL ----------------------------------------------------------------------------------------------


def ask(fake: FakeBuildkite, query: str, **variables: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {fake.api_token}"}
    return requests.post(fake.graphql_url, json={"query": query, "variables": variables}, headers=headers, timeout=30)


WAITING = """query ($first: Int, $after: String) { organization(slug: "acme") {
  jobs(clustered: false, state: [SCHEDULED], type: [COMMAND], first: $first, after: $after) {
    count pageInfo { hasNextPage endCursor } edges { node { ... on JobTypeCommand { uuid build { number state } } } }
  } } }"""


def test_ask_for_unclustered_jobs_gives_them_newest_first_a_page_at_a_time_and_no_others(fake: FakeBuildkite) -> None:
    fake.add_pipeline("legacy", clustered=False)
    clustered = fake.add_job()
    uuids = [fake.add_job(pipeline="legacy", build_number=number) for number in (1, 2, 3)]
    first = ask(fake, WAITING, first=2).json()["data"]["organization"]["jobs"]
    assert [edge["node"]["uuid"] for edge in first["edges"]] == [uuids[2], uuids[1]]
    assert (first["count"], first["pageInfo"]["hasNextPage"]) == (3, True)
    fake.cancel_job(uuids[1])
    second = ask(fake, WAITING, first=2, after=first["pageInfo"]["endCursor"]).json()["data"]["organization"]["jobs"]
    assert [edge["node"] for edge in second["edges"]] == [
        {"uuid": uuids[0], "build": {"number": 1, "state": "SCHEDULED"}}
    ]
    assert (second["count"], second["pageInfo"]["hasNextPage"]) == (2, False)
    assert listed(fake) == [clustered]  # the Stacks API shows those of the cluster alone


BUILDS = """query ($mark: [String!]) { pipeline(slug: "acme/app") { builds(metaData: $mark, first: 5) { edges { node {
  number state url metaData(first: 5) { edges { node { key value } } } } } } } }"""


def test_ask_for_builds_by_meta_data_gives_those_that_are_shown_by_now(fake: FakeBuildkite, clock: Clock) -> None:
    fake.add_build("app", meta_data={"other": "1"})
    fake.add_build("app", meta_data={"mark": "n1"}, shown_at=clock.now + 60)
    assert ask(fake, BUILDS, mark=["mark:n1"]).json()["data"]["pipeline"]["builds"]["edges"] == []
    clock.now += 60
    fake.add_job(pipeline="app", build_number=2, state="running")
    [edge] = ask(fake, BUILDS, mark=["mark:n1"]).json()["data"]["pipeline"]["builds"]["edges"]
    assert edge["node"] == {
        "number": 2,
        "state": "RUNNING",
        "url": "https://buildkite.com/acme/app/builds/2",
        "metaData": {"edges": [{"node": {"key": "mark", "value": "n1"}}]},
    }


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("query { viewer { nothing } }", "Cannot query field 'nothing' on type 'Viewer'."),
        (
            WAITING.replace("first: $first", "first: 20000"),
            "complexity of 60003, which exceeds max complexity of 50000",
        ),
    ],
)
def test_ask_what_is_not_valid_or_too_much_gets_an_error_within_200(fake: FakeBuildkite, query: str, told: str) -> None:
    query = query.replace("$first: Int, ", "")
    answer = ask(fake, query)
    assert (answer.status_code, "data" in answer.json()) == (200, False)
    assert told in answer.json()["errors"][0]["message"]


def test_ask_until_the_points_run_out_gets_429_until_they_begin_anew(fake: FakeBuildkite, clock: Clock) -> None:
    fake.points = {"RateLimit": 100, "RateLimit-User": 6}
    fake.add_pipeline("legacy", clustered=False)
    fake.add_job(pipeline="legacy")
    answer = ask(fake, WAITING, first=1)
    assert answer.status_code == 200
    names = ("RateLimit-Remaining", "RateLimit-User-Remaining", "RateLimit-User-Reset")
    assert [answer.headers[name] for name in names] == ["94", "0", "300"]
    clock.now += 299
    answer = ask(fake, WAITING, first=1)
    assert (answer.status_code, answer.headers["RateLimit-User-Reset"]) == (429, "1")
    clock.now += 1
    assert ask(fake, WAITING, first=1).status_code == 200


# --- Faults and looking -----------------------------------------------------------------------------------


def test_fault_with_status_hits_so_often_and_processes_nothing(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    fake.set_fault("reserve", status=503, times=2, headers={"Retry-After": "7"})
    first, second, third = (reserve(fake, uuid) for _ in range(3))
    assert (first.status_code, first.headers["Retry-After"]) == (503, "7")
    assert second.status_code == 503
    assert third.json()["reserved"] == [uuid]
    assert fake.jobs[uuid].happened("reserved") == 1


def test_fault_with_match_spares_other_stacks(fake: FakeBuildkite) -> None:
    call(fake, "POST", "/stacks/register", {**STACK, "key": "vm2"})
    fake.set_fault("stacks", status=500, match=lambda key, request: key == "vm2")
    assert reserve(fake, UNKNOWN, key="vm2").status_code == 500
    assert reserve(fake, UNKNOWN).status_code == 200
    fake.clear_faults()
    assert reserve(fake, UNKNOWN, key="vm2").status_code == 200


def test_fault_with_body_answers_it_instead(fake: FakeBuildkite) -> None:
    fake.set_fault("get-states", body=lambda request: {"states": dict.fromkeys(request.object()["job_uuids"], "odd")})
    response = call(fake, "POST", "/stacks/vm1/jobs/get-states", {"job_uuids": [UNKNOWN]})
    assert (response.status_code, response.json()) == (200, {"states": {UNKNOWN: "odd"}})
    fake.clear_faults()
    fake.set_fault("get-states", garbage=True)
    response = call(fake, "POST", "/stacks/vm1/jobs/get-states", {"job_uuids": [UNKNOWN]})
    assert response.status_code == 200
    with pytest.raises(requests.JSONDecodeError):
        response.json()


def test_fault_that_resets_loses_the_request_or_only_the_answer(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    fake.set_fault("reserve", reset=True, times=1)
    fake.set_fault("reserve", drop_after=True, times=1)
    with pytest.raises(requests.ConnectionError, match="reset"):
        reserve(fake, uuid)
    assert fake.jobs[uuid].state == "scheduled"
    with pytest.raises(requests.ConnectionError, match="reset"):
        reserve(fake, uuid)
    assert fake.jobs[uuid].state == "reserved"
    assert [made.status for made in fake.calls_to("reserve")] == [None, None]


def test_fault_that_hangs_processes_once_released_and_not_for_a_gone_client(fake: FakeBuildkite) -> None:
    patient, hasty = fake.add_job(), fake.add_job()
    fake.set_fault("reserve", hang=math.inf)
    with pytest.raises(requests.Timeout):
        url = f"{fake.url}/stacks/vm1/scheduled-jobs/batch-reserve"
        headers = {"Authorization": f"Token {fake.token}"}
        requests.put(url, json={"job_uuids": [hasty]}, headers=headers, timeout=0.1)
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(reserve(fake, patient)))
    thread.start()
    fake.wait_for(lambda: len(fake.calls_to("reserve")) == 2)
    assert fake.jobs[patient].state == "scheduled"
    fake.clear_faults()
    thread.join(30)
    assert answers[0].json()["reserved"] == [patient]
    assert fake.jobs[hasty].state == "scheduled"


def test_fault_that_trickles_or_delays_still_answers(fake: FakeBuildkite) -> None:
    fake.set_fault("list", trickle=0.0001, times=1)
    assert listed(fake) == []
    fake.set_fault("list", delay=60, times=1)
    answers: list[list[str]] = []
    thread = threading.Thread(target=lambda: answers.append(listed(fake)))
    thread.start()
    fake.wait_for(lambda: len(fake.calls_to("list")) == 2)
    fake.release_hangs()
    thread.join(30)
    assert answers == [[]]


def test_set_fault_on_unknown_endpoint_is_an_error(fake: FakeBuildkite) -> None:
    with pytest.raises(ValueError, match="no endpoint 'lists'"):
        fake.set_fault("lists", status=500)


def test_close_and_start_again_keeps_port_and_jobs(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    fake.close()
    with pytest.raises(requests.ConnectionError):
        reserve(fake, uuid)
    fake.start()
    assert listed(fake) == [uuid]


def test_wait_for_what_never_comes_dumps_jobs_and_calls(fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    listing(fake)
    with pytest.raises(AssertionError, match=f"job {uuid} scheduled.*\n.*\ncall GET .* -> 200"):
        fake.wait_for(lambda: False, timeout=0.01)


def test_record_of_calls_has_the_kind_of_token_and_never_its_value(fake: FakeBuildkite) -> None:
    token = session(fake)
    acquire(fake, fake.add_job(), token)
    call(fake, "GET", "/ping", token="bkct_guess")
    assert [made.token for made in fake.calls] == ["cluster", "cluster", "access", "unknown"]
    assert not any(secret in repr(fake.calls) for secret in (fake.token, token, "bkct_guess"))


def test_run_as_program_prints_where_it_listens_and_serves() -> None:
    program = [sys.executable, str(TESTS / "fake_buildkite.py"), "--token", "bkct_demo", "--jobs", "2"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("listening on ").strip()
        headers = {"Authorization": "Token bkct_demo"}
        answer = requests.post(f"{url}/stacks/register", json=STACK, headers=headers, timeout=30)
        assert answer.status_code == 201
        answer = requests.get(f"{url}/stacks/vm1/scheduled-jobs?queue_key=default", headers=headers, timeout=30)
        assert len(answer.json()["jobs"]) == 2
        process.terminate()


# --- Agents -----------------------------------------------------------------------------------------------


class Agents:
    """Starts agents with a clean environment, and ends those that a failed test leaves behind."""

    def __init__(self, program: str, directory: Path, fake: FakeBuildkite) -> None:
        self.program, self.directory, self.fake = program, directory, fake
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, uuid: str, *, token: str = "", **env: str) -> subprocess.Popen[bytes]:
        clean = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "BUILDKITE_AGENT_TOKEN": token or self.fake.token,
            "BUILDKITE_AGENT_ENDPOINT": self.fake.url,
            "BUILDKITE_BUILD_PATH": str(self.directory / "builds"),
        }
        flags = [
            "--acquire-job",
            uuid,
            "--name",
            "w1",
            "--queue",
            "default",
            "--tags",
            "os=linux",
            "--spawn",
            "1",
        ]
        with (self.directory / "agent.log").open("ab") as log:
            process = subprocess.Popen(
                [self.program, "start", *flags],
                env=clean | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def run(self, uuid: str, *, token: str = "", **env: str) -> int:
        """Run one to its end and answer its exit status."""
        return self.start(uuid, token=token, **env).wait(30)

    def output(self) -> str:
        return (self.directory / "agent.log").read_text()


@pytest.fixture(params=["fake", "v3", "v4"])
def agents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agents]:
    program = agent_path(request.param)
    with FakeBuildkite() as fake:
        assert call(fake, "POST", "/stacks/register", STACK).status_code == 201
        running = Agents(program, tmp_path, fake)
        yield running
        for process in running.started:
            process.kill()
            process.wait()


@pytest.fixture
def fake_agents(tmp_path: Path) -> Iterator[Agents]:
    with FakeBuildkite() as fake:
        yield Agents(agent_path("fake"), tmp_path, fake)


def running_job(agents: Agents) -> tuple[str, Callable[[], None], subprocess.Popen[bytes]]:
    """A job whose first words have arrived and that ends well once the callable was called, and its agent."""
    gate = agents.directory / "gate"
    uuid = agents.fake.add_job(command=f"echo sta''rted; while [ ! -e {gate} ]; do sleep 0.05; done; echo do''ne")
    process = agents.start(uuid)
    agents.fake.wait_for(lambda: "started" in agents.fake.jobs[uuid].log, 20)
    return uuid, gate.touch, process


def test_run_scheduled_job_brings_its_exit_status_and_log(agents: Agents) -> None:
    uuid = agents.fake.add_job(command='echo "out of $WORD"; exit 3', env={"WORD": "band"})
    assert agents.run(uuid) == 0
    job = agents.fake.jobs[uuid]
    assert (job.state, job.exit_status, job.agent_name) == ("finished", 3, "w1")
    assert "out of band" in job.log
    assert [what for _, what, _ in job.history] == ["added", "acquired", "started", "finished"]
    (agent,) = agents.fake.agents.values()
    assert (agent.tags, agent.queue, agent.disconnected) == (["os=linux", "queue=default"], "default", True)
    assert agents.fake.token not in agents.output()


def test_run_job_that_another_agent_has_exits_27(agents: Agents) -> None:
    uuid = agents.fake.add_job()
    acquire(agents.fake, uuid)
    assert agents.run(uuid) == 27
    assert agents.fake.jobs[uuid].happened("acquire_rejected") == 1
    assert agents.fake.jobs[uuid].happened("acquired") == 1


def test_run_unclustered_job_needs_the_token_of_an_unclustered_agent(agents: Agents) -> None:
    agents.fake.add_pipeline("legacy", clustered=False)
    uuid, clustered = agents.fake.add_job(pipeline="legacy", command="exit 4"), agents.fake.add_job()
    assert agents.run(uuid) == 0
    assert agents.run(clustered, token=agents.fake.unclustered_token) == 0
    assert {agents.fake.jobs[each].state for each in (uuid, clustered)} == {"scheduled"}
    assert agents.run(uuid, token=agents.fake.unclustered_token) == 0
    assert (agents.fake.jobs[uuid].state, agents.fake.jobs[uuid].exit_status) == ("finished", 4)


@pytest.mark.parametrize("status", [404, 423, 500])
def test_run_job_that_cannot_be_acquired_exits_0_all_the_same(agents: Agents, status: int) -> None:
    uuid = agents.fake.add_job()
    agents.fake.set_fault("acquire", status=status, headers={"Retry-After": "0.01"})
    assert agents.run(uuid) == 0
    assert agents.fake.jobs[uuid].state == "scheduled"
    assert (len(agents.fake.calls_to("acquire")) > 1) is (status != 404)


def test_run_with_wrong_token_exits_1(agents: Agents) -> None:
    assert agents.run(agents.fake.add_job(), token="bkct_wrong") == 1
    assert agents.fake.agents == {}


def test_cancel_running_job_stops_it(agents: Agents) -> None:
    uuid, _, process = running_job(agents)
    agents.fake.cancel_job(uuid)
    assert process.wait(30) == 0
    job = agents.fake.jobs[uuid]
    assert (job.state, job.exit_status, job.signal, job.signal_reason) == (
        "canceled",
        -1,
        "SIGTERM",
        "cancel",
    )


def test_run_with_job_token_takes_its_own_job_alone(agents: Agents) -> None:
    mine, other = agents.fake.add_job(), agents.fake.add_job()
    reserve(agents.fake, mine)
    token = job_token(agents.fake, mine)
    assert agents.run(other, token=token) == 0
    assert (agents.fake.jobs[other].state, agents.fake.jobs[other].log) == ("scheduled", "")
    assert agents.run(mine, token=token) == 0
    assert (agents.fake.jobs[mine].state, agents.fake.jobs[mine].exit_status) == ("finished", 0)


def test_stop_once_lets_running_job_finish(agents: Agents) -> None:
    uuid, release, process = running_job(agents)
    process.send_signal(signal.SIGTERM)
    release()
    assert process.wait(30) == 0
    assert agents.fake.jobs[uuid].exit_status == 0
    assert "done" in agents.fake.jobs[uuid].log


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGINT], [signal.SIGQUIT]])
def test_stop_twice_or_quit_cancels_running_job(agents: Agents, signals: list[signal.Signals]) -> None:
    uuid, _, process = running_job(agents)
    for number in signals:
        process.send_signal(number)
    assert process.wait(30) == 0
    job = agents.fake.jobs[uuid]
    assert (job.state, job.exit_status, job.signal_reason) == ("finished", -1, "agent_stop")


def test_stop_while_acquire_hangs_gives_up(agents: Agents) -> None:
    uuid = agents.fake.add_job()
    agents.fake.set_fault("acquire", hang=math.inf)
    process = agents.start(uuid)
    agents.fake.wait_for(lambda: agents.fake.calls_to("acquire"), 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    agents.fake.clear_faults()
    assert agents.fake.jobs[uuid].state == "scheduled"


def test_run_with_fake_exit_knob_calls_nobody(fake_agents: Agents) -> None:
    assert fake_agents.run(UNKNOWN, FAKE_AGENT_EXIT="7") == 7
    assert fake_agents.fake.calls == []


@pytest.mark.parametrize(("ignore", "status"), [("", 0), ("1", -signal.SIGKILL)])
def test_hang_with_fake_knobs_ends_by_term_or_only_by_kill(fake_agents: Agents, ignore: str, status: int) -> None:
    fake = fake_agents.fake
    process = fake_agents.start(fake.add_job(), FAKE_AGENT_HANG="before-acquire", FAKE_AGENT_IGNORE_TERM=ignore)
    fake.wait_for(lambda: fake.calls_to("connect"))
    process.send_signal(signal.SIGTERM)
    if ignore:
        process.kill()
    assert process.wait(30) == status
    assert fake.calls_to("acquire") == []


@pytest.mark.parametrize("version", ["3.137.0+fake", "3.98.2"])
def test_version_of_fake_agent_is_the_one_set(version: str) -> None:
    env = {"PATH": os.environ["PATH"], "FAKE_AGENT_VERSION": version}
    output = subprocess.run([TESTS / "fake_agent.py", "--version"], env=env, capture_output=True, check=True).stdout
    assert output.decode() == f"buildkite-agent version {version}\n"
