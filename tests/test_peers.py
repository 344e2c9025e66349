"""Several schedulers on one Redis: who talks to Buildkite, who is woken, and what is left when one of them fails."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

from conftest import STORES
from fake_buildkite import FakeBuildkite
from processes import Process, Proxy, RedisServer, Sentinels, StackProcesses, agent_path, program, wait_until
from scheduler import (
    Clock,
    Dispatcher,
    Fenced,
    Intake,
    Job,
    Leadership,
    Peers,
    PeriodicTask,
    Profile,
    RedisConnections,
    RedisRows,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
    Worker,
    redis_address,
)
from test_docs import TEXT
from test_service import Systemd

#: Longer than any test: a claim that was given stays given.
PATIENT = {"LEASE_SECONDS": "300"}
#: Within this time another scheduler leads when the leader has died.
TAKEOVER_SECONDS = 5.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture
def stack(fake: FakeBuildkite, redis: RedisServer, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake"), REDIS_ADDR=redis.address, **PATIENT) as processes:
        yield processes


def start(stack: StackProcesses, count: int = 2) -> list[Process]:
    """So many schedulers, of which the first leads."""
    first = stack.start_scheduler(0)
    first.wait_for_line("leading")
    others = [stack.start_scheduler(number) for number in range(1, count)]
    for other in others:
        other.wait_for_line("following")
    return [first, *others]


def claim(
    stack: StackProcesses,
    number: int,
    wait: int = 30,
    slot: str = "",
    session: str = "a",
    query: str = "queue=default",
    **more: str,
) -> requests.Response:
    headers = {"X-Worker-ID": slot, "X-Worker-Session": session} if slot else {}
    asked = {"query": query, "wait": str(wait), **more}
    return requests.get(f"{stack.urls[number]}/jobs", params=asked, headers=headers, timeout=wait + 30)


def tell(stack: StackProcesses, number: int, job: dict[str, Any], verb: str, **fields: Any) -> requests.Response:
    url = f"{stack.urls[number]}/jobs/{job['uuid']}/{verb}"
    return requests.post(url, json={"claim": job["claim"]} | fields, timeout=30)


# -- one scheduler's view, without Buildkite


class Bench:
    """One scheduler's view of its peers, on a Redis of keys of its own. Duties run when they are called."""

    def __init__(self, settings: Settings):
        leader = STORES["redis"](settings).rows
        assert isinstance(leader, RedisRows)
        leader.leave()
        self.rows = leader.with_token("")
        self.store = Store(self.rows, settings)
        self.clock = Clock(self.rows.wall_clock)
        self.dispatcher = Dispatcher(self.store, self.clock.now)
        self.lead = Leadership(self.store, self.rows)
        stack = Stack("http://127.0.0.1:1", lambda: "t", "test-default", "default")
        self.intake = Intake(stack, self.lead, self.dispatcher, settings, self.clock.now, pytest.fail)
        intakes = {"default": self.intake}
        self.peers = Peers(self.rows, self.clock, self.dispatcher, self.lead, intakes, self.with_token)

    def with_token(self, token: str) -> Store:
        return self.store.with_rows(self.rows.with_token(token))

    def tick(self) -> Store | None:
        """The store of our term, if we have one then."""
        self.peers.tick(self.clock.now())
        return self.lead.store()


@pytest.fixture
def bench(settings: Callable[..., Settings]) -> Iterator[Bench]:
    made = Bench(settings())
    yield made
    made.store.close()


def make_ready(store: Store, now: float) -> Job:
    raw = {"id": "018f0000-0000-4000-8000-000000000001", "scheduled_at": None}
    store.put([Job.from_api("default", raw, now)], store.sequence(), now)
    [job] = store.confirm([raw["id"] or ""], store.sequence(), now + 900, now)
    return job


def test_tick_takes_the_turn_and_gives_it_up_when_another_has_taken_it(bench: Bench) -> None:
    term = bench.tick()
    assert term and bench.tick() is term
    bench.rows._redis.call("SET", "leader", "another")
    bench.rows._redis.call("SET", "fence", "its token")
    assert bench.tick() is None
    with pytest.raises(Fenced):
        term.prune(0.0)
    bench.rows._redis.call("DEL", "leader")
    again = bench.tick()
    assert again and again is not term
    assert again.prune(0.0) == 0


def test_tick_after_all_was_lost_begins_a_term_in_which_the_one_before_writes_nothing(bench: Bench) -> None:
    term = bench.tick()
    assert term
    bench.rows._redis.server("DEL", *bench.rows._redis.server("KEYS", f"{bench.rows._redis.prefix}*"))
    with pytest.raises(Fenced):
        term.prune(0.0)
    again = bench.tick()
    assert again and again is not term
    with pytest.raises(Fenced):
        term.prune(0.0)


def test_tick_after_news_was_lost_offers_what_became_ready(bench: Bench) -> None:
    leading = bench.tick()
    assert leading
    worker = Worker("w1", "a", Profile.of("queue=default"))
    with ThreadPoolExecutor() as threads:
        parked = threads.submit(bench.dispatcher.claim, worker, 30)
        wait_until(lambda: bench.dispatcher._parked)
        job = make_ready(leading, bench.clock.now())
        assert not parked.done()  # nobody listens to news here
        bench.tick()
        assert not parked.done()  # nor on the thread that must renew the turn
        bench.peers.offer(bench.clock.now())
        given = parked.result(30)
    assert given and given.uuid == job.uuid


def test_tick_without_redis_keeps_the_turn_for_as_long_as_it_may_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> NoReturn:
        raise StoreUnavailable("away")

    assert bench.tick()
    monkeypatch.setattr(bench.rows, "heartbeat", away)
    with pytest.raises(StoreUnavailable):
        bench.tick()
    assert bench.lead.store()
    bench.peers._turn_ends_at = time.monotonic()
    with pytest.raises(StoreUnavailable):
        bench.tick()
    assert bench.lead.store() is None


def test_duty_that_finds_its_term_over_has_no_problem_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    ticks: list[float] = []

    def refused_once(now: float) -> float:
        ticks.append(now)
        if len(ticks) == 1:
            raise Fenced("another leads")
        return 60.0

    duty = PeriodicTask("default list", refused_once, time.time)
    duty.start()
    wait_until(lambda: len(ticks) == 2)
    assert (duty.problem, duty.failures) == ("", 0)
    assert [record.levelname for record in caplog.records if "fenced" in record.message] == ["WARNING"]
    duty.stop()
    assert duty.join(30)


def test_tick_that_missed_offers_has_them_made_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    leading = bench.tick()
    assert leading
    offered: list[object] = []
    monkeypatch.setattr(bench.dispatcher, "offer_again", offered.append)
    bench.peers.offer(0.0)
    assert offered == [None]  # what became ready before we came
    make_ready(leading, bench.clock.now())
    for _ in range(3):
        bench.tick()
    for _ in range(3):
        bench.peers.offer(0.0)
    assert offered == [None, None]


def test_offer_whose_store_failed_is_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[object] = []

    def fails_once(rule_sets: object) -> None:
        offered.append(rule_sets)
        if len(offered) == 1:
            raise StoreUnavailable("away")

    monkeypatch.setattr(bench.dispatcher, "offer_again", fails_once)
    bench.tick()
    with pytest.raises(StoreUnavailable):
        bench.peers.offer(0.0)
    bench.peers.offer(0.0)
    assert offered == [None, None]


# -- schedulers of another version


def newer(bench: Bench) -> RedisRows:
    """Another scheduler's store on the same keys: what it tells is for the test to say."""
    return RedisRows(bench.rows._settings, "newer")


def test_tick_beside_a_scheduler_that_tells_more_takes_what_it_knows(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    other, now = newer(bench), bench.clock.now()
    bench.tick()
    other.heartbeat({})
    other._redis.call("HSET", "schedulers", "newer", '{"queues": "default", "policy": "6f1e"}')
    known = {"name": "w1", "at": now, "query": "queue=default,os=linux", "waits": True, "needs_token": False}
    nameless = {"query": "queue=default", "needs_token": True, "since": now}
    malformed: list[Any] = [["w2", now], {"name": "w3"}, known | {"name": "w4", "at": "noon"}, 7]
    other.seen({"workers": [*malformed, known | {"host": "h1"}], "nameless": [nameless], "holds": [1]}, [])
    for _ in range(2):
        bench.peers._reported_at = -math.inf
        bench.tick()
    assert {name: seen.waits for name, seen in bench.dispatcher.workers().items()} == {"w1": True}
    assert bench.dispatcher.nameless() == [Worker("", "", Profile.of("queue=default"), needs_token=True)]
    assert [record.getMessage().split()[:2] for record in caplog.records if "unread" in record.message] == [
        ["unread", "count=4"]
    ]
    assert "disagreed" not in caplog.text
    other.close()


def test_hear_of_a_scheduler_that_tells_more_does_what_it_knows(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    other, uuid = newer(bench), "018f0000-0000-4000-8000-000000000001"
    bench.tick()
    bench.peers.news.start()
    wait_until(lambda: bench.rows._redis.server("PUBSUB", "NUMSUB", f"{bench.rows._redis.prefix}news")[1])
    other.tell(queue="default", frozen={"until": 1})
    other.tell(thawed=["default"])
    other.tell(queue="gpu", list_soon={})
    other.tell(queue="default", returned=[uuid, "running"])
    other.tell(offer="many")
    other.tell(queue="default", returned={"uuid": uuid, "state": "running", "by": "w1"}, trace="t1")
    term = bench.intake._current_term()
    assert term
    wait_until(lambda: term.asked_for == {uuid})
    assert [record.levelname for record in caplog.records if "unread" in record.message] == ["WARNING"] * 2
    assert bench.peers.problems == []
    bench.peers.stop()
    bench.peers.news.stop()
    assert bench.peers.news.join(30)
    other.close()


def test_follow_a_leader_that_tells_more_takes_what_it_knows(bench: Bench) -> None:
    other, now = newer(bench), bench.clock.now()
    told = {"last_list_at": now, "problems": ["Buildkite is away"], "frozen": True}
    assert other.heartbeat({"default": told, "gpu": told}).token
    assert bench.tick() is None
    assert (bench.intake.last_list_at, bench.intake.problems) == (now, ["Buildkite is away"])
    assert bench.intake.upstream_problem() == ""
    other.heartbeat({"default": told | {"upstream_problem": "reserve: 503"}})
    bench.tick()
    assert bench.intake.upstream_problem() == "reserve: 503"
    other.heartbeat({"default": [now + 1, []]})
    assert bench.tick() is None
    assert bench.intake.last_list_at == now
    other.close()


def test_serve_beside_a_scheduler_that_tells_more_has_no_fault(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite, settings: Callable[..., Settings]
) -> None:
    first = stack.start_scheduler(0)
    first.wait_for_line("leading")
    other = RedisRows(dataclasses.replace(settings(), redis_addr=redis_address(redis.address)), "newer")
    other.heartbeat({}, lead=False)
    worker = {
        "name": "w9",
        "at": time.time(),
        "query": "queue=default",
        "waits": True,
        "needs_token": False,
        "host": "h",
    }
    other.seen({"workers": [worker, ["w8", 1.0]], "nameless": [], "holds": []}, [])
    other.tell(queue="default", frozen={"until": 1})
    other.tell(queue="default", list_soon={"by": "a webhook"})
    wait_until(lambda: [each["name"] for each in stack.stats()["workers"]] == ["w9"])
    serves(stack, fake)
    assert not any("a bug of the scheduler" in line or "task=" in line for line in first.lines)
    other.close()


# -- one talks to Buildkite


def test_start_of_second_scheduler_leaves_buildkite_to_the_first(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = start(stack)
    uuid = fake.add_job()
    job = claim(stack, 1).json()
    assert job["uuid"] == uuid
    assert not any("registered" in line for line in second.lines)
    assert tell(stack, 0, job, "touch").json()["state"] == "leased"
    assert tell(stack, 1, job, "touch").json()["state"] == "leased"
    assert tell(stack, 0, job, "release", reason="no room").status_code == 200
    first.wait_for_line("ready", uuid)
    assert claim(stack, 0).json()["uuid"] == uuid


def test_start_of_scheduler_for_other_queues_is_an_error_at_both(stack: StackProcesses) -> None:
    first = stack.start_scheduler(0)
    first.wait_for_line("leading")
    second = stack.start_scheduler(1, SCHEDULER_QUEUES="default,linux")
    for each in (first, second):
        each.wait_for_line("disagreed", "setting=SCHEDULER_QUEUES")


def test_kill_leader_lets_another_lead_and_loses_nothing(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = start(stack)
    before = fake.add_job(priority=1)
    job = claim(stack, 0, slot="w1").json()
    assert job["uuid"] == before
    first.kill()
    first.ended()
    killed_at = time.monotonic()
    assert tell(stack, 1, job, "touch").json()["state"] == "leased"
    after = fake.add_job()
    second.wait_for_line("leading")
    assert time.monotonic() - killed_at < TAKEOVER_SECONDS
    assert claim(stack, 1, slot="w2").json()["uuid"] == after
    assert claim(stack, 1, slot="w1").json() | {"lease_seconds": 0} == job | {"lease_seconds": 0}


def test_stop_leader_lets_another_lead_and_keeps_the_stack(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = start(stack)
    first.send_signal(signal.SIGTERM)
    assert first.ended() == 0
    second.wait_for_line("leading")
    assert not any("deregistered" in line for line in first.lines)
    second.send_signal(signal.SIGTERM)
    assert second.ended() == 0
    second.wait_for_line("deregistered")


def test_stop_and_go_on_of_leader_finds_it_deposed_and_does_no_harm(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = start(stack)
    jobs = [fake.add_job() for _ in range(3)]
    for uuid in jobs:
        first.wait_for_line("ready", uuid)
    # In the middle of a call, whose answer it gets when it goes on: what it says is old by then.
    fake.set_fault("list", delay=1.0, times=1)
    calls = len(fake.calls_to("list"))
    fake.wait_for(lambda: len(fake.calls_to("list")) > calls)
    first.send_signal(signal.SIGSTOP)
    second.wait_for_line("leading")
    given = claim(stack, 1, slot="w1").json()["uuid"]
    first.send_signal(signal.SIGCONT)
    first.wait_for_line("deposed")
    assert claim(stack, 0, slot="w2").json()["uuid"] in set(jobs) - {given}
    states = [stack.job(uuid)["state"] for uuid in jobs]
    assert sorted(states) == ["leased", "leased", "ready"]


@pytest.mark.long
def test_lead_without_answers_of_buildkite_passes_to_another(
    redis: RedisServer, fake: FakeBuildkite, tmp_path: Path
) -> None:
    settings = {"REDIS_ADDR": redis.address} | PATIENT
    with (
        Proxy(int(fake.url.split(":")[2].partition("/")[0])) as line,
        StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack,
    ):
        first = stack.start_scheduler(0, BUILDKITE_AGENT_ENDPOINT=f"http://127.0.0.1:{line.port}/v3")
        first.wait_for_line("registered")
        second = stack.start_scheduler(1)
        second.wait_for_line("following")
        line.cut()
        uuid = fake.add_job()
        job = claim(stack, 0, wait=60).json()  # at the one that is cut off
        assert job["uuid"] == uuid
        first.wait_for_line("deposed", "Buildkite does not answer")
        second.wait_for_line("leading")


# -- what all of them know


def test_claim_at_follower_is_given_the_job_that_the_leader_reserves(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    start(stack, 3)
    for number in (1, 2):
        with ThreadPoolExecutor() as threads:
            parked = threads.submit(claim, stack, number, 30)
            uuid = fake.add_job()
            assert parked.result().json()["uuid"] == uuid


def test_claim_at_follower_that_hears_nothing_is_given_its_job_all_the_same(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    start(stack)
    with ThreadPoolExecutor() as threads:
        parked = [threads.submit(claim, stack, 1, 30, f"w{n}") for n in range(3)]
        for _ in parked:
            redis.say("CLIENT", "KILL", "TYPE", "pubsub")
            fake.add_job()
        given = {future.result().json()["uuid"] for future in parked}
    assert given == set(fake.jobs)


def test_health_of_follower_tells_the_age_of_the_leaders_list(stack: StackProcesses) -> None:
    start(stack)

    def age() -> float | None:
        answer = requests.get(f"{stack.urls[1]}/health?strict=1", timeout=30)
        told: float | None = answer.json()["last_poll_age_seconds"]["default"]
        return told if answer.status_code == 200 else None

    wait_until(lambda: age() is not None)
    assert age() is not None


@pytest.mark.long
@pytest.mark.parametrize(("asked", "parked"), [(0, 1), (1, 0)], ids=["at the leader", "at a follower"])
def test_stats_of_one_scheduler_know_who_waits_at_another(
    stack: StackProcesses, fake: FakeBuildkite, asked: int, parked: int
) -> None:
    start(stack)
    fake.set_fault("job-tokens", status=503, headers={"Retry-After": "1"})
    queries = {"w1": "queue=default,os=linux", "": "queue=default,os=bsd", "w3": "queue=default,os=vms"}

    def why(rule: str) -> list[str]:
        return [row["why"] for row in stack.stats(asked)["waiting"] if row["rules"] == f"queue=default,{rule}"]

    def doing() -> dict[str, str]:
        return {each["name"]: each["state"] for each in stack.stats(asked)["workers"]}

    with ThreadPoolExecutor(3) as pool:
        linux, bsd = (pool.submit(claim, stack, parked, 60, slot, "a", queries[slot]) for slot in ("w1", ""))
        vms = pool.submit(claim, stack, parked, 60, "w3", "a", queries["w3"], token="1")
        fake.add_job(rules=["queue=default", "os=mac"])
        wait_until(lambda: why("os=mac") == ["no_worker"])
        wait_until(lambda: doing() == {"w1": "idle", "w3": "idle"})
        fake.add_job(rules=["queue=default", "os=vms"])
        wait_until(lambda: why("os=vms") == ["no_tokens"])
        fake.clear_faults()
        assert vms.result(30).json()["token"]
        wait_until(lambda: doing() == {"w1": "idle", "w3": "working"})
        fake.add_job(rules=["queue=default", "os=vms"])
        wait_until(lambda: why("os=vms") == ["workers_busy"])
        fake.pause_queue("default")
        for rule in ("os=linux", "os=bsd"):
            fake.add_job(rules=["queue=default", rule])
        wait_until(lambda: why("os=mac") == ["queue_paused"])
        fake.resume_queue("default")
        assert linux.result(30).json()["uuid"] != bsd.result(30).json()["uuid"]
        wait_until(lambda: doing() == {"w1": "working", "w3": "working"})


def test_complete_at_follower_asks_buildkite_at_once(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, _ = start(stack)
    uuid = fake.add_job()
    job = claim(stack, 1, slot="w1").json()
    assert tell(stack, 1, job, "complete", exit_status=27).status_code == 200
    wait_until(lambda: sum(" ready " in line and uuid in line for line in first.lines) == 2)
    assert claim(stack, 0, slot="w1").json()["attempt"] == 2


def test_complete_at_follower_counts_if_buildkite_has_answered_the_leader_meanwhile(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    def asked_again() -> None:
        """Of three calls the second was sent when the first had been answered, and that was written down."""
        before = len(fake.calls_to("list"))
        fake.wait_for(lambda: len(fake.calls_to("list")) >= before + 3)

    start(stack)
    uuid = fake.add_job()
    job = claim(stack, 1, wait=20).json()
    asked_again()
    assert tell(stack, 1, job, "complete", exit_status=1).status_code == 200
    wait_until(lambda: stack.job(uuid)["state"] == "ready")
    fake.set_fault("stacks", status=503)
    asked_again()
    job = claim(stack, 1).json()
    assert tell(stack, 1, job, "complete", exit_status=1).status_code == 200
    assert [ended["counted"] for ended in stack.job(uuid)["tries"]] == [True, False]


def test_webhook_at_follower_has_the_leader_list_at_once(stack: StackProcesses, fake: FakeBuildkite) -> None:
    stack.scheduler_settings |= {"POLL_INTERVAL": "60s", "WEBHOOK_TOKEN": "hook"}
    start(stack)
    fake.wait_for(lambda: fake.calls_to("list"))
    uuid = fake.add_job()
    url, headers = f"{stack.urls[1]}/webhook", {"X-Buildkite-Token": "hook"}
    assert requests.post(url, json={"event": "job.scheduled"}, headers=headers, timeout=30).status_code == 200
    assert claim(stack, 1, wait=30).json()["uuid"] == uuid


def test_claim_with_token_at_follower_is_given_one_or_leaves_the_job_alone_for_a_while(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    first, _ = start(stack)
    uuid = fake.add_job()
    job = claim(stack, 1, slot="w1", token="1").json()
    good_for = fake.tokens[job["token"]]
    assert (job["uuid"], good_for.kind, good_for.subject) == (uuid, "job-acquisition", uuid)
    fake.set_fault("job-tokens", body={"job_acquisition_tokens": [], "not_issued": []})
    other = fake.add_job()
    first.wait_for_line("ready", other)
    assert claim(stack, 1, wait=1, slot="w2", token="1").status_code == 204
    # The leader heard of it: else it would have reserved it again, and it would have been claimed again, at once.
    assert stack.job(other)["claims"] == 1


def test_claim_at_follower_is_told_on_the_build_page_once(stack: StackProcesses, fake: FakeBuildkite) -> None:
    start(stack)
    uuid = fake.add_job()
    assert claim(stack, 1, slot="w1").json()["uuid"] == uuid
    fake.wait_for(lambda: fake.jobs[uuid].notifications)
    other = fake.add_job()
    assert claim(stack, 0, slot="w2").json()["uuid"] == other
    fake.wait_for(lambda: fake.jobs[other].notifications)
    assert [each["detail"] for each in fake.jobs[uuid].notifications] == ["Handed to worker w1."]
    assert [each["detail"] for each in fake.jobs[other].notifications] == ["Handed to worker w2."]


def metrics(stack: StackProcesses, number: int) -> dict[str, float]:
    lines = requests.get(f"{stack.urls[number]}/metrics", timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_of_follower_tell_of_all_jobs_and_count_what_it_did_itself(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    start(stack)
    fake.add_job()
    assert claim(stack, 1).status_code == 200
    leading, following = metrics(stack, 0), metrics(stack, 1)
    held = 'stack_jobs{queue="default",rules="queue=default",state="leased"}'
    claims = 'stack_moves_total{queue="default",reason="",verb="claim"}'
    assert (leading[held], following[held]) == (1, 1)
    assert (leading.get(claims, 0), following[claims]) == (0, 1)
    assert 'stack_moves_total{queue="default",reason="",verb="put"}' in leading.keys() - following.keys()
    age = 'stack_poll_age_seconds{queue="default"}'
    wait_until(lambda: metrics(stack, 1)[age] < 1)  # it is the leader's


def test_notify_of_follower_is_ready_is_watched_and_says_whom_it_follows(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path: Path
) -> None:
    service = Systemd(str(tmp_path / "notify"))
    try:
        stack.start_scheduler(0).wait_for_line("leading")
        stack.start_scheduler(1, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="300000")
        service.wait_for("READY=1")
        assert "; follows " in service.wait_for("STATUS=0 ready, 0 leased, 0 running; last poll ")
        service.wait_for("WATCHDOG=1", 10)
        stack.schedulers[0].kill()
        stack.schedulers[0].ended()
        wait_until(lambda: any(told.startswith("STATUS=") and "; leads" in told for told in service.told))
    finally:
        stack.schedulers[1].terminate()
        stack.schedulers[1].ended()
        service.close()


def test_user_of_redis_with_the_rights_that_the_readme_names_may_do_all_that_we_do(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    rights = re.search(r"`ACL SETUSER stack on >password (~stack:linux-fleet:.*?)`", TEXT, re.S)
    assert rights
    user = ["SETUSER", "stack", "on", ">password", *rights[1].split()]
    assert redis.say("ACL", *user) == "+OK\r\n"
    stack.scheduler_settings |= {"REDIS_ADDR": f"redis://stack:password@{redis.address}", "STACK_KEY": "linux-fleet"}
    first, second = start(stack)
    serves(stack, fake)
    assert requests.get(f"{stack.urls[1]}/queue", timeout=30).status_code == 200
    assert metrics(stack, 1)["stack_store_up"] == 1
    first.terminate()
    assert first.ended() == 0
    second.wait_for_line("leading")
    assert not any("NOPERM" in line or "failed" in line for line in first.lines + second.lines)


def test_reload_with_another_redis_address_says_that_it_takes_a_restart_and_serves_on(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite, tmp_path: Path
) -> None:
    address = tmp_path / "redis-address"
    address.write_text(redis.address)
    token = tmp_path / "token"
    token.write_text("old-token")
    files = {"REDIS_ADDR_FILE": str(address), "STACK_API_TOKEN_FILE": str(token)}
    stack.scheduler_settings |= {"REDIS_ADDR": "", **files}
    scheduler_process = stack.start_scheduler(0)
    scheduler_process.wait_for_line("leading")
    address.write_text(f"redis://:another-password@{redis.address}")
    token.write_text("new-token")
    scheduler_process.send_signal(signal.SIGHUP)
    scheduler_process.wait_for_line("outdated", "REDIS_ADDR")
    scheduler_process.wait_for_line("reloaded", "log_level")
    uuid = fake.add_job()
    url, headers = f"{stack.url}/jobs?query=queue=default&wait=10", {"Authorization": "Bearer new-token"}
    assert requests.get(url, headers=headers, timeout=30).json()["uuid"] == uuid
    assert not any("another-password" in line for line in scheduler_process.lines)


# -- Redis fails


def refused(stack: StackProcesses, number: int = 0) -> str:
    """Why a claim cannot be served; "" while it can."""
    answer = claim(stack, number, wait=0, query="queue=of-nobody")
    assert answer.status_code in (204, 503), answer.text
    told: str = answer.json()["message"] if answer.status_code == 503 else ""
    assert not told or answer.json()["error"] == "store_unavailable"
    return told


def serves(stack: StackProcesses, fake: FakeBuildkite) -> None:
    """A new job reaches whoever waits, at each scheduler."""
    for number in stack.schedulers:
        wait_until(lambda n=number: not refused(stack, n))  # type: ignore[misc]
        uuid = fake.add_job()
        assert claim(stack, number, wait=30, slot=f"s{uuid}").json()["uuid"] == uuid


FAULTS = {
    "out of memory": (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"], "raise maxmemory"),
    "replica": (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"], "it is a replica"),
    "paused": (["CLIENT", "PAUSE", "8000"], ["CLIENT", "UNPAUSE"], "Timeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_redis_that_cannot_write_is_said_and_served_again_when_it_can(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite, fault: str
) -> None:
    breaking, mending, reason = FAULTS[fault]
    first, _ = start(stack)
    serves(stack, fake)
    redis.say(*breaking)
    for number in (0, 1):
        wait_until(lambda n=number: reason in refused(stack, n))  # type: ignore[misc]
        assert requests.get(f"{stack.urls[number]}/health", timeout=30).status_code == 503
    listed = fake.add_job()
    first.wait_for_line("failed", "task=peers")
    assert fake.jobs[listed].state == "scheduled"  # nothing is reserved that could not be written down
    redis.say(*mending)
    wait_until(lambda: not refused(stack, 1))
    assert claim(stack, 1, wait=30, slot="w1").json()["uuid"] == listed
    serves(stack, fake)


def test_redis_without_our_scripts_is_given_them_again(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    start(stack)
    serves(stack, fake)
    redis.say("SCRIPT", "FLUSH")
    assert refused(stack, 1) == ""
    serves(stack, fake)


def test_kill_redis_that_keeps_its_data_loses_no_job(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    schedulers = start(stack)
    waiting = [fake.add_job(priority=9 - n) for n in range(3)]
    for uuid in waiting:
        schedulers[0].wait_for_line("ready", uuid)
    held = claim(stack, 1, slot="w1").json()
    redis.kill()
    wait_until(lambda: "redis-cli -u" in refused(stack, 0))
    redis.start()
    wait_until(lambda: any("distrusted" in line for each in schedulers for line in each.lines))
    wait_until(lambda: not refused(stack, 0))
    given = [claim(stack, 0, slot=f"w{n}").json()["uuid"] for n in (2, 3)]
    assert given == waiting[1:]
    assert tell(stack, 0, held, "touch").json()["state"] == "leased"
    serves(stack, fake)


@pytest.mark.long
def test_kill_redis_that_keeps_nothing_gets_the_jobs_back_through_the_list(fake: FakeBuildkite, tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    with StackProcesses(fake, tmp_path, agent_path("fake"), REDIS_ADDR=redis.address, **PATIENT) as stack:
        first, _ = start(stack)
        first.wait_for_line("unsafe", "appendonly is no")
        uuid = fake.add_job()
        first.wait_for_line("ready", uuid)
        redis.kill()
        redis.start()
        wait_until(lambda: refused(stack, 1) == "" and refused(stack, 0) == "")
        assert requests.get(f"{stack.url}/jobs/{uuid}", timeout=30).status_code == 404
        fake.lapse(uuid)
        assert claim(stack, 1, wait=30, slot="w1").json()["uuid"] == uuid
        serves(stack, fake)
    redis.stop()


def test_flush_of_redis_gets_the_jobs_back_through_the_list(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    schedulers = start(stack)
    uuids = [fake.add_job(), fake.add_job()]
    for uuid in uuids:
        schedulers[0].wait_for_line("ready", uuid)
    held = claim(stack, 1, slot="w1").json()
    redis.say("FLUSHALL")
    wait_until(lambda: sum("distrusted" in line for each in schedulers for line in each.lines) > 1)
    serves(stack, fake)
    assert tell(stack, 1, held, "touch").json()["error"] == "unknown_job"
    for uuid in uuids:
        fake.lapse(uuid)
    assert {claim(stack, n, wait=30, slot=f"l{n}").json()["uuid"] for n in (0, 1)} == set(uuids)
    assert min(stack.stats(1)["totals"]["since_start"].values()) >= 0


@pytest.mark.long
def test_slow_redis_serves_slowly_and_leaves_the_lead_where_it_is(
    redis: RedisServer, fake: FakeBuildkite, tmp_path: Path
) -> None:
    settings = {"REDIS_ADDR": redis.address} | PATIENT
    with Proxy(redis.port) as line, StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
        first = stack.start_scheduler(0, REDIS_ADDR=f"127.0.0.1:{line.port}")
        first.wait_for_line("leading")
        stack.start_scheduler(1).wait_for_line("following")
        line.delay = 0.3
        serves(stack, fake)
        assert not any("deposed" in log for log in first.lines)


def test_news_over_a_line_that_was_cut_in_silence_end_soon(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.PING_SECONDS", 1)
    with Proxy(redis.port) as proxy:
        address = redis_address(f"127.0.0.1:{proxy.port}")
        assert address
        line = RedisConnections(address, "p:")
        news = line.news(lambda: False)
        with ThreadPoolExecutor() as threads:
            first = threads.submit(next, news)
            wait_until(lambda: redis.say("PUBSUB", "NUMSUB", "p:news").endswith(":1\r\n"))
            time.sleep(6)  # longer than questions may stay open: these were answered
            redis.say("PUBLISH", "p:news", '{"n": 1}')
            assert first.result(30) == {"n": 1}
            second = threads.submit(next, news)
            proxy.cut()
            with pytest.raises(StoreUnavailable, match="get no answer"):
                second.result(30)
        line.close()


def test_redis_that_is_a_replica_is_no_fault_of_ours_to_any_thread(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.RETRY_STORE_SECONDS", 0.0)
    address = redis_address(redis.address)
    assert address
    line = RedisConnections(address, "p:")
    redis.say("REPLICAOF", "127.0.0.1", "1")

    def ask(number: int) -> str:
        try:
            return str(line.call("SET", "x", 1) if number % 4 == 0 else line.call("GET", "x"))
        except StoreUnavailable as error:
            return "it is a replica" if "it is a replica" in str(error) else str(error)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(4000))) == {"None", "it is a replica"}
    line.close()


def test_scheduler_that_is_cut_off_from_redis_steps_back_and_the_rest_carries_on(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    with Proxy(redis.port) as line:
        first = stack.start_scheduler(0, REDIS_ADDR=f"127.0.0.1:{line.port}")
        first.wait_for_line("leading")
        second = stack.start_scheduler(1)
        second.wait_for_line("following")
        line.cut()
        second.wait_for_line("leading")
        first.wait_for_line("deposed")
        assert refused(stack, 0)
        uuid = fake.add_job()
        assert claim(stack, 1, wait=30, slot="w1").json()["uuid"] == uuid
        line.mend()
        first.wait_for_line("following")
        serves(stack, fake)


@pytest.mark.long
def test_cut_of_one_from_redis_and_another_from_buildkite_leaves_the_rest_to_the_third(
    stack: StackProcesses, redis: RedisServer, fake: FakeBuildkite
) -> None:
    buildkite = int(fake.url.split(":")[2].partition("/")[0])
    with Proxy(redis.port) as to_redis, Proxy(buildkite) as to_buildkite:
        stack.start_scheduler(0, REDIS_ADDR=f"127.0.0.1:{to_redis.port}").wait_for_line("leading")
        stack.start_scheduler(1, BUILDKITE_AGENT_ENDPOINT=f"http://127.0.0.1:{to_buildkite.port}/v3")
        stack.schedulers[1].wait_for_line("following")
        to_redis.cut()
        to_buildkite.cut()
        stack.schedulers[1].wait_for_line("leading")
        third = stack.start_scheduler(2)
        uuids = {fake.add_job() for _ in range(2)}
        third.wait_for_line("leading", timeout=40)
        # Whoever is cut off from Buildkite goes on serving workers, whoever is cut off from Redis says that it cannot.
        assert {claim(stack, n, wait=30, slot=f"w{n}").json()["uuid"] for n in (1, 2)} == uuids
        assert refused(stack, 0)
        to_redis.mend()
        to_buildkite.mend()
        stack.schedulers[0].wait_for_line("following")
        serves(stack, fake)


def test_worker_of_a_scheduler_that_dies_goes_on_at_another(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path: Path
) -> None:
    schedulers = start(stack)
    worker = stack.start_worker("w2", WORKER_API_SERVER=",".join(stack.urls[:2]))
    running = fake.add_job(command=f"echo begun; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done")
    fake.wait_for(lambda: "begun" in fake.jobs[running].log, timeout=30)
    schedulers[0].kill()
    schedulers[0].ended()
    (tmp_path / "end").touch()
    worker.wait_for_line("completed", running)
    following = [fake.add_job() for _ in range(3)]
    fake.wait_for(lambda: all(fake.jobs[uuid].state == "finished" for uuid in following), timeout=30)
    assert all(fake.jobs[uuid].happened("acquired") == 1 for uuid in (running, *following))


# -- Sentinel


@pytest.mark.long
def test_failover_of_the_primary_is_followed_and_loses_no_job(fake: FakeBuildkite, tmp_path: Path) -> None:
    with Sentinels(tmp_path) as redis:
        settings = {"REDIS_ADDR": redis.address} | PATIENT
        with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
            first, _ = start(stack)
            waiting = [fake.add_job() for _ in range(5)]
            for uuid in waiting:
                first.wait_for_line("ready", uuid)
            running = claim(stack, 1, slot="w1").json()
            redis.wait_until_replicated()
            redis.primary.kill()
            wait_until(redis.has_moved, seconds=60)
            for number in (0, 1):
                wait_until(lambda n=number: refused(stack, n) == "", seconds=60)  # type: ignore[misc]
            assert tell(stack, 0, running, "touch").json()["state"] == "leased"
            given = [claim(stack, n % 2, 20, f"w{n}").json()["uuid"] for n in range(2, 6)]
            assert sorted([running["uuid"], *given]) == sorted(waiting)
            serves(stack, fake)


@pytest.mark.long
def test_failover_of_the_primary_while_workers_work_finishes_each_job_once(fake: FakeBuildkite, tmp_path: Path) -> None:
    with Sentinels(tmp_path) as redis:
        # What the replica had not heard of when the primary died comes back when its reservation lapses.
        settings = {"REDIS_ADDR": redis.address, "RESERVATION_SECONDS": "60", "LEASE_SECONDS": "5"}
        with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
            start(stack, 3)
            for number in range(4):
                stack.start_worker(f"w{number}", WORKER_API_SERVER=",".join(stack.urls))
            uuids = [fake.add_job(command="sleep 0.2; echo done") for _ in range(60)]

            def finished() -> int:
                return sum(fake.jobs[uuid].state == "finished" for uuid in uuids)

            fake.wait_for(lambda: finished() >= 10, timeout=60)
            redis.primary.kill()
            wait_until(redis.has_moved, seconds=60)
            fake.wait_for(lambda: finished() == len(uuids), timeout=150)
            assert {fake.jobs[uuid].happened("acquired") for uuid in uuids} == {1}


def test_sentinel_with_a_password_is_asked_with_it(tmp_path: Path) -> None:
    program("redis-sentinel")  # where it is missing the test is skipped, before anything is started
    redis = RedisServer(tmp_path, password="of redis")
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {redis.port} 1\nsentinel auth-pass main of-redis\n")
    sentinel = RedisServer(tmp_path, str(config), kind="redis-sentinel", password="of sentinels")
    try:
        address = f"redis+sentinel://:of%20redis@{sentinel.address}/main"
        for query, answers in (("", False), ("?sentinel_password=of%20sentinels", True)):
            parsed = redis_address(address + query)
            assert parsed
            line = RedisConnections(parsed, "p:")
            if answers:
                assert len(line.server("TIME")) == 2
            else:
                with pytest.raises(StoreUnavailable, match="No master found") as failed:
                    line.server("TIME")
                assert "of redis" not in str(failed.value) and "Connection(" not in str(failed.value)
            line.close()
    finally:
        sentinel.stop()
        redis.stop()
