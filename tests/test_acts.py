"""What operators do to a job and to a worker: stop, allow, first and forget; on both stores, and in real processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from conftest import Clock
from fake_buildkite import FakeBuildkite
from processes import Process, RedisServer, StackProcesses, agent_path
from scheduler import WORDS_LETTERS, Finding, Hold, Settings, Store
from test_api import OTHER, PATIENCE, UNKNOWN, UUID, W1, W2, Bench, Reply

ANN = {"X-Operator": "ann@build1"}
WORD = {"at": "2027-01-15T08:00:00.000Z", "by": "ann@build1", "note": "wrong branch"}


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


def act(bench: Bench, verb: str, uuid: str = UUID, note: str = "wrong branch") -> Reply:
    return bench.call("POST", f"/jobs/{uuid}/{verb}", {"note": note}, ANN)


def told(bench: Bench, uuid: str = UUID) -> Any:
    return bench.call("GET", f"/jobs/{uuid}").json


def touch(bench: Bench, claim: str) -> Any:
    return bench.call("POST", f"/jobs/{UUID}/touch", {"claim": claim}, W1).json


@pytest.mark.parametrize("verb", ["stop", "allow", "first"])
def test_act_with_a_dry_run_that_its_route_does_not_have_is_refused_and_changes_nothing(
    bench: Bench, verb: str
) -> None:
    bench.make_ready()
    before = told(bench)
    answer = bench.call("POST", f"/jobs/{UUID}/{verb}", {"note": "wrong branch", "dry_run": True}, ANN)
    assert (answer.status, answer.json["error"]) == (400, "bad_body")
    assert "`dry_run`" in answer.json["message"]
    assert told(bench) == before


# --- Stop ---


def test_stop_of_a_waiting_job_is_to_be_finished_and_handed_to_nobody(bench: Bench) -> None:
    bench.make_ready()
    answer = act(bench, "stop")
    assert (answer.status, answer.json) == (
        200,
        {"uuid": UUID, "state": "reserving", "reachable": True, "message": "the scheduler finishes it at Buildkite"},
    )
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    job = told(bench)
    assert job["stop"] == WORD | {"reachable": True, "message": "the scheduler finishes it at Buildkite"}
    assert (job["why"], job["why_text"]) == ("stopping", f"Stopped by ann@build1 at {WORD['at']}: wrong branch")
    assert {"at": WORD["at"], "what": "stop", "reason": "ann@build1: wrong branch"} in job["story"]
    (intent,) = bench.store.intents("default")
    assert intent.finish_detail == job["why_text"]
    bench.store.finish(UUID, bench.clock.now())
    assert (told(bench)["outcome"], told(bench)["stop"]["message"]) == ("stopped", "it is over: stopped, finished")
    assert bench.call("GET", "/stats").json["totals"]["all_time"]["stopped"] == 1


def test_stop_of_a_job_whose_claim_no_agent_has_acquired_is_told_to_its_worker(bench: Bench, held: str) -> None:
    assert touch(bench, held)["stop"] is False
    assert act(bench, "stop").json["state"] == "leased"
    bench.clock.advance(1)
    assert touch(bench, held)["stop"] is False  # an agent may have it, until Buildkite has told since
    bench.store.looked("default", bench.clock.now())
    answer = touch(bench, held)
    assert (answer["stop"], answer["cancel"]) == (True, False)
    assert answer["reason"] == f"Stopped by ann@build1 at {WORD['at']}: wrong branch"
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": held, "reason": "stopped"}, W1)
    assert bench.store.intents("default") == []  # it is not proved free
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    assert [job.uuid for job in bench.store.intents("default")] == [UUID]


def test_stop_of_a_job_whose_answer_was_lost_does_not_hand_it_out_again(bench: Bench, held: str) -> None:
    act(bench, "stop")
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    assert (bench.state(), told(bench)["attempts"]) == ("reserving", 0)


def test_stop_of_a_running_job_tells_its_worker_to_cancel_it(bench: Bench, held: str) -> None:
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.clock.advance(20)
    assert touch(bench, held)["cancel"] is False
    answer = act(bench, "stop").json
    assert (answer["state"], answer["reachable"]) == ("running", True)
    assert "within 30 s, worker w1 makes its agent cancel it" in answer["message"]
    assert "retry rules may start it again" in answer["message"]
    answer = touch(bench, held)
    assert (answer["stop"], answer["cancel"]) == (False, True)
    bench.learn(UUID, Finding.OVER, "finished")
    assert (told(bench)["outcome"], told(bench)["stop"]["note"]) == ("ran", "wrong branch")


def test_stop_of_a_running_job_that_nobody_touches_says_that_it_cannot_be_reached(bench: Bench, held: str) -> None:
    bench.learn(UUID, Finding.ACQUIRED, "running")
    bench.clock.advance(20)
    touch(bench, held)
    bench.clock.advance(31)
    answer = act(bench, "stop").json
    assert (answer["reachable"], told(bench)["stop"]["reachable"]) == (False, False)
    assert answer["message"].startswith("it cannot be reached: worker w1 has not touched it since 2027-01-15T08:00:20")
    assert touch(bench, held)["cancel"] is True
    assert told(bench)["stop"]["reachable"] is True


@pytest.fixture
def with_api_token(bench: Bench, settings: Callable[..., Settings]) -> Bench:
    """A running job, and a scheduler that has an API token."""
    bench.server.api.use(settings(BUILDKITE_API_TOKEN="bkua_test"))
    bench.make_ready()
    bench.claim(W1)
    bench.learn(UUID, Finding.ACQUIRED, "running")
    return bench


def test_stop_of_a_running_job_with_an_api_token_is_for_buildkite_to_cancel(with_api_token: Bench) -> None:
    bench = with_api_token
    answer = act(bench, "stop").json
    assert (answer["state"], answer["reachable"]) == ("running", True)
    assert answer["message"] == "the scheduler asks Buildkite to cancel it, then worker w1 after 30 s without success"
    (job,) = bench.store.to_cancel()
    assert touch(bench, job.claim or "")["cancel"] is False
    bench.clock.advance(1)
    bench.store.cancelled(UUID, "", bench.clock.now())
    assert bench.store.to_cancel() == []
    stop = told(bench)["stop"]
    assert stop["cancelled_at"] == "2027-01-15T08:00:01.000Z"
    assert stop["message"] == "Buildkite cancels it (asked 2027-01-15T08:00:01.000Z), and tells its agent"
    bench.clock.advance(60)
    assert touch(bench, job.claim or "")["cancel"] is False


def test_stop_of_a_running_job_that_buildkite_does_not_cancel_is_told_to_its_worker_after_30_s(
    with_api_token: Bench,
) -> None:
    bench = with_api_token
    act(bench, "stop")
    bench.store.cancelled(UUID, "401 from Buildkite", bench.clock.now())
    (job,) = bench.store.to_cancel()
    bench.clock.advance(29)
    assert touch(bench, job.claim or "")["cancel"] is False
    assert told(bench)["stop"]["message"].endswith("without success; the last try: 401 from Buildkite")
    bench.clock.advance(1)
    assert touch(bench, job.claim or "")["cancel"] is True
    assert told(bench)["stop"]["reachable"] is True
    bench.clock.advance(31)
    assert told(bench)["stop"]["reachable"] is False


def test_stop_said_twice_keeps_the_first_word_and_says_whose_it_is(bench: Bench) -> None:
    bench.make_ready()
    act(bench, "stop")
    answer = bench.call("POST", f"/jobs/{UUID}/stop", {"note": "me too"}, {"X-Operator": "bob"})
    assert answer.json["message"] == (
        f"Stopped by ann@build1 at {WORD['at']}: wrong branch; the scheduler finishes it at Buildkite"
    )
    assert told(bench)["stop"]["by"] == "ann@build1"


@pytest.mark.parametrize("verb", ["stop", "allow", "first"])
def test_act_on_a_job_that_is_over_or_unknown_or_without_a_note_is_refused(bench: Bench, verb: str) -> None:
    bench.make_ready()
    assert act(bench, verb, UNKNOWN).refusal == (404, "unknown_job")
    for body in ({}, {"note": " "}, {"note": 7}):
        assert bench.call("POST", f"/jobs/{UUID}/{verb}", body, ANN).refusal == (400, "bad_body")
    bench.learn(UUID, Finding.OVER, "canceled")
    assert act(bench, verb).refusal == (409, "job_done")
    assert told(bench)[verb] is None


def test_stop_survives_a_restart_of_the_store(
    open_store: Callable[..., Store], clock: Clock, settings: Callable[..., Settings]
) -> None:
    with Bench(open_store(), clock, settings()) as before:
        before.make_ready()
        act(before, "stop")
        act(before, "first")
    with Bench(open_store(), clock, settings()) as after:
        assert [told(after)[verb]["by"] for verb in ("stop", "first")] == ["ann@build1"] * 2
        assert [job.uuid for job in after.store.intents("default")] == [UUID]


# --- Allow ---

PAUSED = Hold("queue:default", "operator", "paused")


def test_allow_hands_a_job_out_that_people_hold_and_no_other(bench: Bench) -> None:
    bench.dispatcher.hold(PAUSED)
    bench.make_ready(priority=9)
    bench.make_ready(OTHER)
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    answer = act(bench, "allow", OTHER)
    assert (answer.status, answer.json) == (
        200,
        {"uuid": OTHER, "state": "ready", "message": "holds of operators, freezes and the policy do not hold it now"},
    )
    assert told(bench, OTHER)["allow"] == WORD
    assert bench.claim(W1)["uuid"] == OTHER
    assert bench.call("GET", "/jobs?query=queue=default", headers=W2).status == 204
    assert (told(bench)["why"], bench.state(OTHER)) == ("queue_paused", "leased")


def test_allow_again_with_another_note_says_who_allowed_it_first(bench: Bench) -> None:
    bench.make_ready()
    act(bench, "allow", note="x" * 5000)
    assert "Allowed" not in act(bench, "allow", note="x" * 5000).json["message"]  # as long as a note is kept
    assert act(bench, "allow", note="hotfix").json["message"].startswith("Allowed by ann@build1: xxx")
    assert max(len(kept["note"]) for kept in bench.call("GET", "/fleet").json["acts"]) <= WORDS_LETTERS


def test_allow_passes_no_hold_of_buildkites(bench: Bench) -> None:
    bench.make_ready()
    bench.store.pause("default", True, bench.clock.now())
    act(bench, "allow")
    assert bench.call("GET", "/jobs?query=queue=default", headers=W1).status == 204
    bench.store.pause("default", False, bench.clock.now())
    assert bench.claim(W1)["uuid"] == UUID


def test_allow_of_a_ready_job_wakes_a_claim_that_waits(bench: Bench) -> None:
    bench.dispatcher.hold(PAUSED)
    bench.make_ready()
    waiting = bench.connect()
    waiting.request("GET", "/jobs?query=queue=default&wait=60", headers=W1)
    until = time.monotonic() + PATIENCE
    while not bench.dispatcher._parked:
        assert time.monotonic() < until
        time.sleep(0.001)
    act(bench, "allow")
    answer = waiting.getresponse()
    assert (answer.status, answer.read()[:9]) == (200, b'{"uuid": ')


# --- First ---


def test_first_puts_a_job_before_all_others_whatever_their_rules(bench: Bench) -> None:
    bench.make_ready(priority=1000)
    bench.make_ready(OTHER, priority=-5, rules=("queue=default", "os=linux"))
    answer = act(bench, "first", OTHER)
    assert (answer.status, answer.json) == (
        200,
        {"uuid": OTHER, "state": "ready", "message": "it is first in line"},
    )
    listed = bench.call("GET", "/queue").json["jobs"]
    assert [(job["uuid"], job["priority"]) for job in listed] == [(OTHER, -5), (UUID, 1000)]
    claimed = bench.claim(W1, "query=queue=default,os=linux")
    assert (claimed["uuid"], claimed["priority"]) == (OTHER, -5)


# --- Forget ---


def test_forget_worker_leaves_nothing_of_it(bench: Bench) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1 | {"X-Worker-ID": "Mac/1"})
    answer = bench.call("DELETE", "/workers/Mac%2F1", headers=ANN)
    assert (answer.status, answer.json["name"]) == (200, "Mac/1")
    assert "its last sign is 0 s old" in answer.json["message"]
    assert bench.call("GET", "/stats").json["workers"] == []
    assert bench.call("DELETE", "/workers/Mac%2F1", headers=ANN).refusal == (404, "unknown_worker")


def test_forget_worker_that_has_a_job_is_refused(bench: Bench, held: str) -> None:
    assert bench.call("DELETE", "/workers/w1", headers=ANN).refusal == (409, "worker_busy")
    bench.call("POST", f"/jobs/{UUID}/release", {"claim": held}, W1)
    assert bench.call("DELETE", "/workers/w1", headers=ANN).status == 200


# --- In real processes: the scheduler is killed once it has answered ---


class Killed(StackProcesses):
    """With SQLite it is started again; with Redis another one, which was told, takes its place."""

    def stop_and_kill(self, uuid: str) -> dict[str, Any]:
        said_to = max(self.schedulers)
        url = f"{self.urls[said_to]}/jobs/{uuid}/stop"
        answer = requests.post(url, json={"note": "wrong branch"}, headers=ANN, timeout=30)
        assert answer.status_code == 200, answer.text
        self.schedulers[0].kill()
        self.schedulers[0].ended()
        if said_to == 0:
            self.start_scheduler()
        self.url = self.urls[said_to]
        return dict(answer.json())

    def begin(self) -> Process:
        first = self.start_scheduler()
        if "REDIS_ADDR" in self.scheduler_settings:
            first.wait_for_line("leading")
            self.start_scheduler(1)
        return first

    def start_one(self, **settings: str) -> Process:
        servers = ",".join(self.urls[number] for number in self.schedulers)
        return self.start_worker("only", WORKER_API_SERVER=servers, **settings)


def in_ci(kinds: str) -> Any:
    return pytest.param(kinds, marks=pytest.mark.long)


#: At home each store and each agent is there once.
@pytest.fixture(params=["sqlite fake", in_ci("redis fake"), in_ci("sqlite v3"), "redis v3"])
def stack(request: pytest.FixtureRequest, fake: FakeBuildkite, tmp_path: Path) -> Iterator[Killed]:
    store, agent = request.param.split()
    settings = {"LEASE_SECONDS": "4"}
    redis = None
    if store == "redis":
        redis = RedisServer(tmp_path)
        settings["REDIS_ADDR"] = redis.address
    try:
        with Killed(fake, tmp_path, agent_path(agent), **settings) as processes:
            yield processes
    finally:
        if redis:
            redis.stop()


def finished_with_the_operators_words(stack: Killed, uuid: str) -> None:
    job = stack.fake.jobs[uuid]
    stack.fake.wait_for(lambda: job.state == "finished", timeout=30)
    assert (job.finish_detail or "").startswith("Stopped by ann@build1 at ")
    assert (job.finish_detail or "").endswith(": wrong branch")
    stack.fake.wait_for(lambda: stack.job(uuid)["outcome"] == "stopped", timeout=30)
    assert stack.job(uuid)["stop"]["note"] == "wrong branch"


@pytest.mark.parametrize("stack", ["sqlite fake", "redis fake"], indirect=True)  # it has no agent
def test_stop_of_a_waiting_job_outlives_the_scheduler_and_finishes_it(stack: Killed, fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    stack.begin().wait_for_line("ready", uuid)
    fake.set_fault("finish", status=503)
    answer = stack.stop_and_kill(uuid)
    assert (answer["state"], answer["reachable"]) == ("reserving", True)
    assert fake.jobs[uuid].state == "reserved"
    fake.clear_faults()
    finished_with_the_operators_words(stack, uuid)
    assert fake.jobs[uuid].happened("acquired") == 0


def test_stop_of_a_leased_job_outlives_the_scheduler_ends_the_claim_and_finishes_the_job(
    stack: Killed, fake: FakeBuildkite
) -> None:
    uuid = fake.add_job()
    fake.set_fault("acquire", status=503)
    stack.begin()
    worker = stack.start_one(FAKE_AGENT_HANG="before-acquire")
    worker.wait_for_line("started", uuid)
    fake.wait_for(lambda: fake.calls_to("connect"), timeout=30)
    assert stack.stop_and_kill(uuid)["state"] == "leased"
    worker.wait_for_line("signalled", "signal=SIGTERM", timeout=30)
    finished_with_the_operators_words(stack, uuid)
    assert fake.jobs[uuid].happened("acquired") == 0
    worker.wait_for_line("released", uuid)


def test_stop_of_a_running_job_outlives_the_scheduler_and_has_its_agent_cancel_it(
    stack: Killed, fake: FakeBuildkite
) -> None:
    uuid = fake.add_job(command="echo begun; exec sleep 300", priority=1)
    stack.begin()
    worker = stack.start_one()
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    fake.wait_for(lambda: stack.job(uuid)["state"] == "running", timeout=30)
    following = fake.add_job()
    assert stack.stop_and_kill(uuid)["reachable"]
    worker.wait_for_line("signalled", "signal=SIGQUIT", "Stopped by ann@build1", timeout=30)
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=30)
    assert (fake.jobs[uuid].exit_status, fake.jobs[uuid].signal_reason) == (-1, "agent_stop")
    fake.wait_for(lambda: stack.job(uuid)["outcome"] == "ran", timeout=30)
    assert stack.job(uuid)["stop"]["by"] == "ann@build1"
    fake.wait_for(lambda: fake.jobs[following].state == "finished", timeout=30)


@pytest.fixture
def with_graphql(stack: Killed, fake: FakeBuildkite) -> Killed:
    """The schedulers have an API token."""
    stack.scheduler_settings |= {
        "BUILDKITE_API_TOKEN": fake.api_token,
        "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url,
    }
    return stack


def test_stop_of_a_running_job_with_an_api_token_outlives_the_scheduler_until_buildkite_cancels_it(
    with_graphql: Killed, fake: FakeBuildkite
) -> None:
    stack, uuid = with_graphql, fake.add_job(command="echo begun; exec sleep 300")
    stack.begin()
    worker = stack.start_one()
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    fake.wait_for(lambda: stack.job(uuid)["state"] == "running", timeout=30)
    fake.set_fault("graphql", status=503)
    assert stack.stop_and_kill(uuid)["reachable"]
    fake.wait_for(lambda: "503 from Buildkite" in stack.job(uuid)["stop"].get("problem", ""), timeout=30)
    assert fake.jobs[uuid].state == "running"
    fake.clear_faults()
    fake.wait_for(lambda: fake.jobs[uuid].state == "canceled", timeout=60)
    assert fake.jobs[uuid].happened("cancel_requested") == 1
    fake.wait_for(lambda: stack.job(uuid)["outcome"] == "ran", timeout=30)
    stop = stack.job(uuid)["stop"]
    assert (stop["by"], stop["note"], "problem" in stop) == ("ann@build1", "wrong branch", False)
    assert stop["cancelled_at"]
    # Its agent ended it, because Buildkite said so, and not because the worker had it do that.
    assert not any("signalled" in line for line in worker.lines)
    fake.wait_for(lambda: stack.stats(max(stack.schedulers))["states"]["running"] == 0, timeout=30)


@pytest.mark.long
@pytest.mark.parametrize("stack", ["sqlite fake"], indirect=True)
def test_stop_of_a_running_job_with_a_token_that_buildkite_refuses_says_what_to_do_and_goes_on_with_a_good_one(
    stack: Killed, fake: FakeBuildkite, tmp_path: Path
) -> None:
    token = tmp_path / "api-token"
    token.write_text("bkua_old")
    stack.scheduler_settings |= {
        "BUILDKITE_API_TOKEN_FILE": str(token),
        "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url,
    }
    uuid = fake.add_job(command="echo begun; exec sleep 300")
    stack.begin()
    stack.start_one()
    fake.wait_for(lambda: stack.job(uuid).get("state") == "running", timeout=30)
    requests.post(f"{stack.url}/jobs/{uuid}/stop", json={"note": "wrong branch"}, headers=ANN, timeout=30)
    fake.wait_for(lambda: fake.calls_to("graphql"), timeout=30)
    fake.wait_for(lambda: "it refuses BUILDKITE_API_TOKEN" in stack.job(uuid)["stop"]["message"], timeout=30)
    problems = requests.get(f"{stack.url}/health", timeout=30).json()["problems"]
    assert any("BUILDKITE_API_TOKEN must have full GraphQL access" in each for each in problems)
    # Meanwhile its worker does it.
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=60)
    assert fake.jobs[uuid].signal_reason == "agent_stop"
    second = fake.add_job(command="echo begun; exec sleep 300")
    fake.wait_for(lambda: stack.job(second).get("state") == "running", timeout=30)
    token.write_text(fake.api_token)
    requests.post(f"{stack.url}/jobs/{second}/stop", json={"note": "wrong branch"}, headers=ANN, timeout=30)
    fake.wait_for(lambda: fake.jobs[second].state == "canceled", timeout=90)


@pytest.mark.parametrize("stack", ["sqlite fake", in_ci("sqlite v3")], indirect=True)
def test_stop_of_a_job_whose_worker_was_killed_reaches_it_through_the_next_one(
    stack: Killed, fake: FakeBuildkite
) -> None:
    uuid = fake.add_job(command="echo begun; exec sleep 300")
    stack.begin()
    worker = stack.start_one()
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)
    fake.wait_for(lambda: stack.job(uuid)["state"] == "running", timeout=30)
    worker.kill()
    worker.ended()
    answer = requests.post(f"{stack.url}/jobs/{uuid}/stop", json={"note": "wrong branch"}, headers=ANN, timeout=30)
    assert answer.status_code == 200
    fake.wait_for(lambda: stack.job(uuid)["stop"]["reachable"] is False, timeout=30)
    assert "cannot be reached: worker only has not touched it" in stack.job(uuid)["stop"]["message"]
    again = stack.start_one()
    again.wait_for_line("waiting", uuid)
    again.wait_for_line("signalled", "signal=SIGQUIT", "Stopped by ann@build1", timeout=30)
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=30)
    assert fake.jobs[uuid].signal_reason == "agent_stop"
    again.wait_for_line("gone", uuid)
