"""Job acquisition tokens: a worker without the cluster's token gets one with each job, or no job."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import scheduler
from conftest import Clock
from fake_buildkite import Call, FakeBuildkite, Token
from processes import StackProcesses, agent_path
from scheduler import Api, Dispatcher, Intake, Job, Leadership, RedisRows, Settings, Stack, Store
from test_api import PATIENCE, W1, W2, Bench, Connection, Reply
from test_stats import why

CLAIM = "/jobs?query=queue=default&token=1"


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeBuildkite]:
    with FakeBuildkite(clock=clock.now) as server:
        yield server


class Desk(Bench):
    """The API with a queue at a fake Buildkite, whose tokens are asked for by their own thread, as in life."""

    def __init__(self, store: Store, clock: Clock, settings: Settings, fake: FakeBuildkite):
        self.fake = fake
        super().__init__(store, clock, settings)
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        self.intake = Intake(stack, Leadership(store), self.dispatcher, settings, clock.now, pytest.fail)
        # Not at its making: an intake needs the dispatcher that is made with it.
        self.server.api = Api(store, self.dispatcher, {"default": self.intake}, settings, clock.now)
        self.intake.list.run_once()
        self.intake.tokens.task.start()

    def add_ready(self, count: int = 1) -> list[str]:
        """Jobs that Buildkite has confirmed as ours; offered to whoever waits."""
        uuids = [self.fake.add_job() for _ in range(count)]
        self.take_in()
        return uuids

    def take_in(self) -> None:
        self.intake.list.run_once()
        self.intake.reserve.run_once()

    def job(self, uuid: str) -> Job:
        job = self.store.get(uuid)
        assert job
        return job

    def token_calls(self) -> list[Call]:
        return self.fake.calls_to("job-tokens")

    def __exit__(self, *arguments: object) -> None:
        self.intake.tokens.task.stop()
        super().__exit__(*arguments)
        assert self.intake.tokens.task.join(PATIENCE)


@pytest.fixture
def desk(store: Store, clock: Clock, settings: Callable[..., Settings], fake: FakeBuildkite) -> Iterator[Desk]:
    with Desk(store, clock, settings(), fake) as desk:
        yield desk


def claim_aside(desk: Desk, path: str, headers: dict[str, str]) -> tuple[threading.Thread, list[Reply]]:
    """A claim on a thread and a connection of its own; its answer comes into the list."""
    replies: list[Reply] = []
    connection = Connection(desk.port)

    def run() -> None:
        replies.append(connection.call("GET", path, headers=headers))
        connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, replies


def until(true: Callable[[], object]) -> None:
    ends_at = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < ends_at, "it did not become so"
        time.sleep(0.005)


def test_claim_with_token_gets_one_for_its_job_alone(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    reply = desk.call("GET", CLAIM, headers=W1)
    assert (reply.status, reply.json["uuid"]) == (200, uuid)
    good_for = desk.fake.tokens[reply.json["token"]]
    assert (good_for.kind, good_for.subject) == ("job-acquisition", uuid)
    assert desk.token_calls()[0].json == {"job_uuids": [uuid], "token_lifetime_seconds": 180}
    assert desk.job(uuid).state == "leased"


@pytest.mark.parametrize("asked", ["", "&token=0", "&token="])
def test_claim_that_asks_for_no_token_gets_none(desk: Desk, asked: str) -> None:
    desk.add_ready()
    reply = desk.call("GET", f"/jobs?query=queue=default{asked}", headers=W1)
    assert "token" not in reply.json
    assert desk.token_calls() == []


def test_claim_delivered_again_gets_a_new_token(desk: Desk) -> None:
    desk.add_ready()
    first, second = (desk.call("GET", CLAIM, headers=W1).json for _ in range(2))
    assert (first["claim"], first["attempt"]) == (second["claim"], second["attempt"])
    assert first["token"] != second["token"]


def test_claim_keeps_its_token_out_of_log_store_and_other_answers(
    desk: Desk, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.DEBUG):
        (uuid,) = desk.add_ready()
        token = desk.call("GET", CLAIM, headers=W1).json["token"]
        told = desk.call("GET", f"/jobs/{uuid}").text + desk.call("GET", "/stats").text
    assert token.encode() not in told
    assert token not in caplog.text
    assert token.encode() not in kept(desk.store, tmp_path / "state")


def kept(store: Store, directory: Path) -> bytes:
    """All that the store holds of its jobs, wherever it holds it."""
    if isinstance(store.rows, RedisRows):
        line = store.rows._redis
        keys = line.server("KEYS", f"{line.prefix}job:*")
        assert keys
        return repr([line.server("HGETALL", key) for key in keys]).encode()
    return b"".join(file.read_bytes() for file in directory.iterdir())


def test_claim_of_job_without_token_is_given_back_and_is_no_attempt(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    desk.fake.lapse(uuid)
    desk.fake.reserve_for(uuid, "somebody-else")
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    job = desk.job(uuid)
    assert (job.state, job.attempts, [end["counted"] for end in job.tries]) == ("reserving", 0, [False])
    assert "Buildkite issues no token for this job" in job.reason
    # Its state is asked for before its turn, and the next claim is served.
    desk.intake.states.run_once()
    assert uuid in desk.fake.calls_to("get-states")[0].json["job_uuids"]
    (other,) = desk.add_ready()
    assert desk.call("GET", CLAIM, headers=W1).json["uuid"] == other


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lambda uuid: uuid, "no reason given"),
        (lambda uuid: {"job_uuid": uuid, "reason": "not_reserved"}, "not_reserved"),
        (lambda uuid: {"uuid": uuid, "error": "limit", "message": "too many tokens"}, "limit: too many tokens"),
    ],
    ids=["a text", "an object", "an object with two"],
)
def test_claim_of_job_that_is_not_issued_a_token_tells_buildkite_s_words(
    desk: Desk, caplog: pytest.LogCaptureFixture, told: Callable[[str], Any], words: str
) -> None:
    (uuid,) = desk.add_ready()
    body = {"job_acquisition_tokens": [], "not_issued": [told(uuid)]}
    desk.fake.set_fault("job-tokens", status=201, body=body)
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    (said,) = [record for record in caplog.records if record.getMessage().startswith("not_issued ")]
    assert said.levelname == "WARNING" and words in said.getMessage() and uuid in said.getMessage()
    answer = desk.call("GET", f"/jobs/{uuid}").json
    assert (answer["why"], answer["held_by"], answer["held_reason"]) == ("no_tokens", "machine", "no_tokens")
    assert f"Buildkite issues no token for this job: {words}" in answer["why_text"]
    counted = f'stack_tokens_not_issued_total{{queue="default",reason="{words}"}} 1.0'
    assert counted in desk.call("GET", "/metrics").text.decode()
    # And when its time has come it is tried again, and nothing holds it any more.
    desk.fake.clear_faults()
    desk.clock.advance(2)
    desk.take_in()
    assert desk.call("GET", CLAIM, headers=W1).json["uuid"] == uuid
    assert desk.job(uuid).held_by is None


def test_claim_whose_client_is_gone_when_no_token_comes_takes_no_other_job(desk: Desk) -> None:
    desk.fake.set_fault("job-tokens", body={"job_acquisition_tokens": [], "not_issued": []}, hang=PATIENCE, times=1)
    first, second = desk.add_ready(2)
    with socket.create_connection(("127.0.0.1", desk.port), PATIENCE) as client:
        client.sendall(f"GET {CLAIM}&wait=60 HTTP/1.1\r\nHost: localhost\r\nX-Worker-ID: w1\r\n\r\n".encode())
        until(desk.token_calls)
    desk.fake.release_hangs()
    until(lambda: "reserving" in (desk.job(first).state, desk.job(second).state))
    until(lambda: not desk.server.unanswered)
    assert {desk.job(first).claims, desk.job(second).claims} == {0, 1}


def test_claim_whose_tokens_are_slow_to_be_denied_is_answered_in_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not tried again with the next job when its time is over."""
    monkeypatch.setattr(scheduler, "TOKEN_SECONDS", 0.4)
    desk.fake.set_fault("job-tokens", body={"job_acquisition_tokens": [], "not_issued": []}, delay=0.25)
    uuids = desk.add_ready(3)
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    assert 1 <= sum(desk.job(uuid).claims for uuid in uuids) < 3


def test_claim_of_job_that_never_gets_a_token_is_not_repeated_in_a_hot_loop(desk: Desk, clock: Clock) -> None:
    (uuid,) = desk.add_ready()
    nothing = {"job_acquisition_tokens": [], "not_issued": [uuid]}
    desk.fake.set_fault("job-tokens", body=nothing)
    seconds = []
    for _ in range(5):
        claims = desk.job(uuid).claims
        waited = 0
        while desk.job(uuid).claims == claims:
            clock.advance(1)
            waited += 1
            desk.take_in()
            assert desk.call("GET", CLAIM, headers=W1).status == 204
        seconds.append(waited)
    assert seconds == [1, 2, 4, 8, 16]
    assert desk.job(uuid).attempts == 0


def test_claim_while_tokens_fail_is_parked_and_others_are_served(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    (uuid,) = desk.add_ready()
    desk.fake.set_fault("job-tokens", status=503, body={"message": "no tokens today"})
    thread, replies = claim_aside(desk, CLAIM + "&wait=30", W1)
    until(lambda: desk.job(uuid).state == "reserving")
    assert (desk.job(uuid).attempts, desk.job(uuid).claims) == (0, 1)
    desk.take_in()
    assert desk.call("GET", "/jobs?query=queue=default", headers=W2).json["uuid"] == uuid
    # A probe with one job after the other, without claiming any, until Buildkite answers.
    (other,) = desk.add_ready()
    until(lambda: len(desk.token_calls()) >= 2)
    assert (desk.job(other).state, desk.job(other).claims, replies) == ("ready", 0, [])
    desk.fake.clear_faults()
    thread.join(PATIENCE)
    assert replies[0].json["uuid"] == other
    assert desk.fake.tokens[replies[0].json["token"]].subject == other
    told = [record for record in caplog.records if "no tokens today" in record.getMessage()]
    assert len([record for record in told if record.levelname == "WARNING"]) == 1


def test_claim_while_tokens_fail_claims_nothing_however_often_it_comes(desk: Desk) -> None:
    desk.fake.set_fault("job-tokens", status=503, headers={"Retry-After": "60"})
    uuids = desk.add_ready(3)
    for _ in range(200):
        assert desk.call("GET", CLAIM, headers=W1).status == 204
    desk.take_in()
    assert sum(desk.job(uuid).claims for uuid in uuids) == 1
    assert len(desk.token_calls()) == 1


@pytest.mark.parametrize("headers", [W1, {}], ids=["with a name", "without a name"])
def test_stats_while_tokens_fail_say_that_buildkite_gives_none(desk: Desk, headers: dict[str, str]) -> None:
    text = "Buildkite gives no job acquisition tokens, which all matching workers that are free need: 1; see /health"
    desk.fake.set_fault("job-tokens", status=503)
    desk.add_ready()
    assert desk.call("GET", CLAIM, headers=W2).status == 204
    desk.take_in()
    desk.clock.advance(scheduler.LIVE_SECONDS + 1)  # w2 is not heard of again
    assert why(desk)[0] == "workers_offline"
    thread, replies = claim_aside(desk, CLAIM + "&wait=60", headers)
    until(lambda: desk.dispatcher._parked)
    assert why(desk) == ("no_tokens", text)
    # Another that needs no token may have it; this one's claim goes on waiting.
    worker = scheduler.Worker("w3", "", scheduler.Profile.of("queue=default"))
    desk.dispatcher._seen["w3"] = scheduler.WorkerSighting(desk.clock.now(), worker, waits=False)
    assert why(desk) == ("ahead", "next in line: 1 matching worker is free")
    desk.fake.clear_faults()
    thread.join(PATIENCE)
    assert replies[0].status == 200


@pytest.mark.parametrize("status", [401, 403, 404])
def test_claim_while_tokens_are_refused_is_an_error_of_this_feature_alone(
    desk: Desk, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    desk.fake.set_fault("job-tokens", status=status, body={"message": "not for you"})
    desk.add_ready(2)
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    until(lambda: [r for r in caplog.records if r.levelname == "ERROR" and "not for you" in r.getMessage()])
    desk.take_in()
    assert desk.intake.list.problem == desk.intake.reserve.problem == ""
    assert desk.call("GET", "/jobs?query=queue=default", headers=W2).status == 200
    assert "not for you" in desk.call("GET", "/health").json["problems"][0]


@pytest.mark.parametrize(
    "answer",
    [
        b'{"job_acquisition_tokens": [{"job_acquisition_token": "bkjat_secret"',
        b'["bkjat_secret"]',
        b'{"job_acquisition_tokens": "bkjat_secret"}',
    ],
)
def test_claim_with_unreadable_tokens_is_given_back_and_shows_none_of_it(
    desk: Desk, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    (uuid,) = desk.add_ready()
    desk.fake.set_fault("job-tokens", status=201, body=answer)
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    assert desk.job(uuid).state == "reserving"
    until(lambda: desk.intake.tokens.task.problem)
    told = caplog.text + desk.job(uuid).reason + desk.call("GET", "/health").text.decode()
    assert "bkjat_secret" not in told


@pytest.mark.parametrize("token", [None, 7, "", "two words", "new\nline"], ids=repr)
def test_claim_with_unusable_token_is_given_back(desk: Desk, token: Any) -> None:
    (uuid,) = desk.add_ready()
    issued = [{"job_uuid": uuid, "job_acquisition_token": token}, None, {"job_uuid": "other"}]
    body = {"job_acquisition_tokens": issued, "not_issued": []}
    desk.fake.set_fault("job-tokens", status=201, body=body)
    reply = desk.call("GET", CLAIM, headers=W1)
    assert reply.status == (200 if token == 7 else 204)
    assert reply.status == 204 or reply.json["token"] == "7"


def test_claim_while_buildkite_hangs_is_given_back_in_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "TOKEN_SECONDS", 0.5)
    monkeypatch.setattr(scheduler, "TOKEN_CALL_SECONDS", 0.4)
    desk.fake.set_fault("job-tokens", hang=float("inf"))
    (uuid,) = desk.add_ready()
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    assert (desk.job(uuid).state, desk.job(uuid).attempts) == ("reserving", 0)
    until(desk.dispatcher.holds)


def test_claim_by_many_at_once_asks_for_their_tokens_together(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN_SECONDS", "TOKEN_CALL_SECONDS"):
        monkeypatch.setattr(scheduler, name, PATIENCE)
    uuids = desk.add_ready(40)
    desk.fake.set_fault("job-tokens", hang=math.inf, times=1)
    claims = [claim_aside(desk, CLAIM + "&wait=30", {"X-Worker-ID": f"w{n}"}) for n in range(40)]
    until(lambda: desk.token_calls() and len(desk.intake.tokens.claims) == 40)
    desk.fake.release_hangs()
    for thread, _ in claims:
        thread.join(PATIENCE)
    answers = [replies[0].json for _, replies in claims]
    assert {answer["uuid"] for answer in answers} == set(uuids)
    assert all(desk.fake.tokens[answer["token"]].subject == answer["uuid"] for answer in answers)
    first, second = (call.json["job_uuids"] for call in desk.token_calls())
    assert sorted(first + second) == sorted(uuids)


def test_claim_beside_a_job_that_buildkite_will_not_hear_of_gets_its_token(desk: Desk) -> None:
    desk.add_ready()
    desk.fake.set_fault("job-tokens", delay=1, times=1)
    claims = [claim_aside(desk, CLAIM, W2)]
    until(desk.token_calls)
    # These come while the first call is under way: the next one asks for all of them.
    good, bad, best = desk.add_ready(3)
    desk.fake.set_fault("job-tokens", status=422, match=lambda _, request: bad in request.object()["job_uuids"])
    claims += [claim_aside(desk, CLAIM, {"X-Worker-ID": f"beside-{n}"}) for n in range(3)]
    for thread, _ in claims:
        thread.join(PATIENCE)
    served = {replies[0].json["uuid"] for _, replies in claims if replies[0].status == 200}
    assert {good, best} < served and bad not in served
    assert (desk.job(bad).state, desk.job(bad).attempts) == ("reserving", 0)


def test_stop_while_claims_are_held_answers_them(desk: Desk) -> None:
    desk.fake.set_fault("job-tokens", status=503, headers={"Retry-After": "60"})
    desk.add_ready()
    thread, replies = claim_aside(desk, CLAIM + "&wait=60", {})
    until(lambda: desk.dispatcher._parked)
    desk.dispatcher.stop()
    thread.join(PATIENCE)
    assert replies[0].status in (204, 503)


def test_lift_before_a_claim_has_begun_to_wait_is_not_missed(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, asked = Dispatcher(store, clock.now), threading.Event()
    dispatcher.hold(scheduler.Hold("tokens:default", "machine", "no_tokens"))
    claim = store.claim

    def lifted_meanwhile(*arguments: Any) -> Job | None:
        job = claim(*arguments)
        if not asked.is_set():
            asked.set()
            dispatcher.lift("tokens:default")
        return job

    monkeypatch.setattr(store, "claim", lifted_meanwhile)
    now = clock.now()
    raw = {"id": "018f0000-0000-4000-8000-000000000001"}
    store.put([Job.from_api("default", raw, now)], store.sequence(), now)
    store.confirm([raw["id"]], store.sequence(), now + 900, now)
    worker = scheduler.Worker("w1", "s", scheduler.Profile.of("queue=default"), needs_token=True)
    job = dispatcher.claim(worker, PATIENCE)
    assert job and job.uuid == raw["id"]


@pytest.mark.parametrize("kind", ["fake", "v3", "v4"])
def test_run_jobs_with_acquisition_tokens_alone(kind: str, tmp_path: Path) -> None:
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, agent_path(kind)) as stack:
        uuids = [fake.add_job(command=f"echo job {n}") for n in range(4)]
        stack.start_scheduler()
        for name, cluster in ("w1", {"BUILDKITE_AGENT_TOKEN": ""}), ("w2", {"WORKER_JOB_TOKENS": "1"}):
            stack.start_worker(name, **cluster)
        fake.wait_for(lambda: all(fake.all_jobs[uuid].state == "finished" for uuid in uuids), timeout=40)
        jobs = [fake.jobs[uuid] for uuid in uuids]
        assert [job.exit_status for job in jobs] == [0] * 4
        assert {call.token for call in fake.calls_to("agent-register")} == {"job-acquisition"}
        assert sorted(str(agent.only_job) for agent in fake.agents.values()) == sorted(uuids)
        assert Token("cluster") in fake.tokens.values()
