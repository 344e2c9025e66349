"""One test for each row of "When things die": what dies, what happens then, and that nothing is lost or run twice."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NoReturn

import pytest
import requests

import scheduler
from conftest import REDIS, open_sqlite
from fake_buildkite import FakeBuildkite
from processes import Process, RedisServer, StackProcesses, agent_path, compiled, free_port, wait_until
from scheduler import (
    FROZEN_SECONDS,
    UPKEEP_SECONDS,
    Clock,
    Dispatcher,
    Holder,
    Intake,
    Job,
    Leadership,
    Profile,
    RedisRows,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
    Upkeep,
    Worker,
    read_settings,
)

UUID = "018f0000-0000-4000-8000-000000000001"
QUICK = {"LEASE_SECONDS": "1", "ACQUIRE_SECONDS": "5"}


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake"), **QUICK) as processes:
        yield processes


def over(fake: FakeBuildkite, *uuids: str) -> None:
    fake.wait_for(lambda: all(fake.jobs[uuid].state == "finished" for uuid in uuids), timeout=60)
    for uuid in uuids:
        assert fake.jobs[uuid].happened("acquired") == 1, fake.jobs[uuid]


def begun(fake: FakeBuildkite, uuid: str) -> None:
    fake.wait_for(lambda: "begun" in fake.jobs[uuid].log, timeout=30)


def until_file(path: Path) -> str:
    """A job's command that runs until the test makes a file."""
    return f"echo begun; while [ ! -e {path} ]; do sleep 0.05; done"


def claim(
    stack: StackProcesses, query: str = "queue=default", wait: int = 30, slot: str = "", session: str = ""
) -> requests.Response:
    headers = {"X-Worker-ID": slot, "X-Worker-Session": session} if slot else {}
    asked = {"query": query, "wait": str(wait)}
    return requests.get(f"{stack.url}/jobs", params=asked, headers=headers, timeout=wait + 30)


# -- scheduler killed


def test_kill_scheduler_while_a_job_runs_and_others_wait_loses_nothing(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path: Path
) -> None:
    running = fake.add_job(command=until_file(tmp_path / "end"), priority=9)
    waiting = [fake.add_job(priority=8 - n) for n in range(5)]
    scheduler = stack.start_scheduler()
    worker = stack.start_worker("only")
    begun(fake, running)
    for uuid in waiting:
        scheduler.wait_for_line("ready", uuid)
    scheduler.kill()
    scheduler.ended()
    (tmp_path / "end").touch()
    over(fake, running)
    scheduler = stack.start_scheduler()
    over(fake, *waiting)
    worker.wait_for_line("completed", running)
    scheduler.wait_for_line(" claimed ", waiting[-1])
    order = [line.split("job=")[1].split()[0] for line in scheduler.lines if " claimed " in line]
    assert order == waiting


def test_kill_scheduler_at_any_of_its_calls_loses_nothing(stack: StackProcesses, fake: FakeBuildkite) -> None:
    """The point between a call to Buildkite and what is written of its answer, for each call in turn."""
    for endpoint in ("register", "list", "reserve", "get-states"):
        uuid = fake.add_job(command="echo hi")
        fake.set_fault(endpoint, delay=2.0, times=1)
        before = len(fake.calls_to(endpoint))
        scheduler = stack.start_scheduler()
        fake.wait_for(lambda e=endpoint, n=before: len(fake.calls_to(e)) > n, timeout=30)  # type: ignore[misc]
        scheduler.kill()
        scheduler.ended()
        fake.clear_faults()
        scheduler = stack.start_scheduler()
        answer = claim(stack)
        assert (answer.status_code, answer.json()["uuid"]) == (200, uuid)
        fake.cancel_job(uuid)
        scheduler.wait_for_line("dropped", uuid)
        scheduler.kill()
        scheduler.ended()


# -- worker killed before its agent acquired the job


def test_kill_worker_before_its_agent_acquired_gives_the_job_to_another(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    uuid = fake.add_job()
    scheduler = stack.start_scheduler()
    first = claim(stack, slot="dead", session="1").json()
    assert first["uuid"] == uuid
    scheduler.wait_for_line("expired", uuid, "worker=dead")
    stack.start_worker("alive")
    over(fake, uuid)
    refused = requests.post(f"{stack.url}/jobs/{uuid}/touch", json={"claim": first["claim"]}, timeout=30)
    assert (refused.status_code, refused.json()["error"]) == (409, "stale_claim")


def test_restart_worker_before_its_agent_acquired_frees_its_job_at_once(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake"), LEASE_SECONDS="600") as stack:
        uuid = fake.add_job()
        stack.start_scheduler()
        assert claim(stack, slot="slot", session="1").json()["uuid"] == uuid
        again = claim(stack, slot="slot", session="2").json()
        assert (again["uuid"], again["attempt"]) == (uuid, 2)


# -- worker or host dies with a running agent


def test_kill_worker_with_running_agent_never_hands_the_job_out_again(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path: Path
) -> None:
    uuid = fake.add_job(command=until_file(tmp_path / "end"))
    scheduler = stack.start_scheduler()
    worker = stack.start_worker("dying")
    begun(fake, uuid)
    scheduler.wait_for_line("running", uuid)
    worker.kill()
    worker.ended()
    assert claim(stack, wait=3).status_code == 204  # three lease times
    restarted = stack.start_worker("dying")
    restarted.wait_for_line("waiting", uuid)
    (tmp_path / "end").touch()
    over(fake, uuid)
    restarted.wait_for_line("gone", uuid)
    scheduler.wait_for_line(" ran ", uuid)


def test_lose_host_with_running_agent_is_done_when_buildkite_says_so(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    uuid = fake.add_job()
    scheduler = stack.start_scheduler()
    assert claim(stack, slot="host", session="1").json()["uuid"] == uuid
    fake.set_state(uuid, "running")
    scheduler.wait_for_line("running", uuid)
    assert claim(stack, wait=2).status_code == 204
    fake.set_state(uuid, "finished")
    scheduler.wait_for_line(" ran ", uuid)


# -- the answer to a claim is lost on the way


def test_lose_answer_to_a_claim_gives_the_same_worker_the_same_claim(fake: FakeBuildkite, tmp_path: Path) -> None:
    # The lease must not end between the two claims.
    with StackProcesses(fake, tmp_path, agent_path("fake"), LEASE_SECONDS="600") as stack:
        fake.add_job()
        stack.start_scheduler()
        lost, again = [claim(stack, slot="slot", session="1").json() for _ in range(2)]
        assert (again["uuid"], again["claim"], again["attempt"]) == (lost["uuid"], lost["claim"], 1)


def test_lose_answer_to_a_claim_of_nobody_in_particular_expires(stack: StackProcesses, fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    stack.start_scheduler()
    first, second = claim(stack).json(), claim(stack).json()
    assert first["uuid"] == second["uuid"] == uuid
    assert first["claim"] != second["claim"]
    assert stack.job(uuid)["attempts"] == 0  # never touched: nobody tried


# -- an agent hangs before it has acquired


@pytest.mark.parametrize("kind", ["fake", "v3", "v4"])
def test_hang_agent_before_it_acquired_is_stopped_and_the_job_runs(
    kind: str, fake: FakeBuildkite, tmp_path: Path
) -> None:
    fake.set_fault("acquire", hang=math.inf, times=1)
    with StackProcesses(fake, tmp_path, agent_path(kind), LEASE_SECONDS="1", ACQUIRE_SECONDS="5") as stack:
        uuid = fake.add_job()
        stack.start_scheduler()
        worker = stack.start_worker("only")
        worker.wait_for_line("signalled", uuid, "SIGTERM", timeout=30)
        worker.wait_for_line("released", uuid)
        over(fake, uuid)
        assert stack.job(uuid)["tries"][0]["how"] == "release"


# -- Buildkite answers badly


@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 429}, {"garbage": True}, {"reset": True}, {"hang": math.inf}, {"body": []}],
    ids=lambda fault: next(iter(fault)) + str(next(iter(fault.values()))),
)
def test_break_every_call_to_buildkite_goes_on_serving_and_recovers(
    fault: dict[str, object], stack: StackProcesses, fake: FakeBuildkite
) -> None:
    served = fake.add_job()
    scheduler = stack.start_scheduler()
    scheduler.wait_for_line("ready", served)
    fake.set_fault("stacks", **fault)
    late = fake.add_job()
    assert claim(stack).json()["uuid"] == served
    scheduler.wait_for_line("failed", "default list", timeout=30)
    assert requests.get(f"{stack.url}/health", timeout=30).json()["problems"]
    fake.clear_faults()
    fake.release_hangs()
    scheduler.wait_for_line("recovered", "default list", timeout=60)
    stack.start_worker("only")
    over(fake, late)


def test_hang_one_queue_delays_no_other(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake"), SCHEDULER_QUEUES="stuck,good") as stack:
        fake.set_fault("stacks", hang=math.inf, match=lambda key, _: key == "test-stuck")
        uuid = fake.add_job(queue="good", rules=["queue=good"])
        stack.start_scheduler()
        stack.start_worker("only", "queue=good")
        over(fake, uuid)
        assert not any(call.stack_key == "test-stuck" and call.status == 200 for call in fake.calls_to("list"))


@pytest.mark.parametrize("endpoint", ["reserve", "get-states"])
def test_hang_one_endpoint_delays_no_other(endpoint: str, stack: StackProcesses, fake: FakeBuildkite) -> None:
    first, second = fake.add_job(priority=1), fake.add_job()
    scheduler = stack.start_scheduler()
    for uuid in (first, second):
        scheduler.wait_for_line("ready", uuid)
    fake.set_fault(endpoint, hang=math.inf)
    seen = len(fake.calls_to("list"))
    stack.start_worker("only")
    over(fake, first, second)
    fake.wait_for(lambda: len(fake.calls_to("list")) > seen + 3)


# -- Buildkite is away for longer than a reservation lasts


def test_lose_buildkite_for_longer_than_a_reservation_confirms_before_handing_out(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake"), RESERVATION_SECONDS="60", LEASE_SECONDS="600") as stack:
        leased, waiting = fake.add_job(priority=1), fake.add_job()
        scheduler = stack.start_scheduler()
        held = claim(stack).json()
        assert held["uuid"] == leased
        scheduler.wait_for_line("ready", waiting)
        fake.set_fault("reserve", status=503)
        fake.add_job(rules=["os=plan9"])  # else nothing is reserved before half of the reservations' time is over
        scheduler.wait_for_line("failed", "default reserve", timeout=60)
        fake.set_fault("stacks", status=503)
        # The reservation's end is a time in the store: moved there, not waited for.
        scheduler.kill()
        scheduler.ended()
        with sqlite3.connect(tmp_path / "scheduler" / "jobs.sqlite3") as db:
            db.execute("UPDATE jobs SET reservation_expires_at = 1 WHERE state != 'done'")
        db.close()
        stack.start_scheduler()
        assert claim(stack, wait=2).status_code == 204
        touched = requests.post(f"{stack.url}/jobs/{leased}/touch", json={"claim": held["claim"]}, timeout=30)
        assert (touched.status_code, touched.json()["state"]) == (200, "leased")
        fake.clear_faults()
        assert claim(stack, wait=60).json()["uuid"] == waiting


# -- 401, 403, 404


def test_refuse_token_later_names_it_goes_on_serving_and_takes_a_new_one(fake: FakeBuildkite, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(fake.token)
    settings = {"BUILDKITE_AGENT_TOKEN_FILE": str(token), "BUILDKITE_AGENT_TOKEN": ""}
    with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
        first = fake.add_job()
        scheduler = stack.start_scheduler()
        scheduler.wait_for_line("ready", first)
        fake.replace_token("bkct_rotated")
        line = scheduler.wait_for_line("error", "401", "BUILDKITE_AGENT_TOKEN")
        assert "bkct" not in line
        assert claim(stack).json()["uuid"] == first
        assert scheduler.poll() is None


def test_forget_stack_registers_it_again(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack:
        scheduler = stack.start_scheduler()
        scheduler.wait_for_line("registered")
        fake.wait_for(lambda: fake.calls_to("list"))
        fake.set_fault("list", status=404, times=1)
        scheduler.wait_for_line("failed", "404")
        uuid = fake.add_job()
        stack.start_worker("only")
        over(fake, uuid)


def test_refuse_one_queue_leaves_the_others_alone(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake"), SCHEDULER_QUEUES="none,good") as stack:
        fake.set_fault(
            "register", status=403, match=lambda _, request: (request.object() or {}).get("queue_key") == "none"
        )
        uuid = fake.add_job(queue="good", rules=["queue=good"])
        scheduler = stack.start_scheduler()
        stack.start_worker("only", "queue=good")
        over(fake, uuid)
        scheduler.wait_for_line("failed", "none list", "403")


# -- the store


def test_fill_disk_of_the_store_answers_503_and_recovers(fake: FakeBuildkite, tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", state], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr}")
    try:
        with StackProcesses(fake, tmp_path, agent_path("fake"), STATE_DIRECTORY=str(state)) as stack:
            first = fake.add_job()
            scheduler = stack.start_scheduler()
            scheduler.wait_for_line("ready", first)
            with open(state / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
                while True:
                    filler.write(b"x" * 4096)
            late = [fake.add_job(rules=[f"n={n}" * 200]) for n in range(200)]
            scheduler.wait_for_line("failed", "default list", "free some space", timeout=30)
            assert not any(fake.jobs[uuid].happened("reserved") for uuid in late)
            assert scheduler.poll() is None
            (state / "filler").unlink()
            fake.cancel_job(first)
            for uuid in late:
                fake.cancel_job(uuid)
            last = fake.add_job()
            stack.start_worker("only")
            over(fake, last)
    finally:
        subprocess.run(["umount", state], check=True)


def test_lock_store_from_outside_answers_503_and_recovers(stack: StackProcesses, fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    scheduler = stack.start_scheduler()
    scheduler.wait_for_line("ready", uuid)
    db = sqlite3.connect(stack.directory / "scheduler" / "jobs.sqlite3", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    refused = claim(stack)
    assert (refused.status_code, refused.json()["error"]) == (503, "store_unavailable")
    assert "another program has locked the file" in refused.json()["message"]
    assert requests.get(f"{stack.url}/health", timeout=30).status_code == 503
    db.execute("ROLLBACK")
    db.close()
    stack.start_worker("only")
    over(fake, uuid)


def test_delete_store_answers_503_until_it_is_back(stack: StackProcesses, fake: FakeBuildkite) -> None:
    uuid = fake.add_job()
    scheduler = stack.start_scheduler()
    scheduler.wait_for_line("ready", uuid)
    file = stack.directory / "scheduler" / "jobs.sqlite3"
    file.rename(file.with_suffix(".moved"))
    refused = claim(stack)
    assert (refused.status_code, refused.json()["error"]) == (503, "store_unavailable")
    assert "moved or deleted" in refused.json()["message"]
    assert requests.get(f"{stack.url}/health", timeout=30).status_code == 503
    file.with_suffix(".moved").rename(file)
    stack.start_worker("only")
    over(fake, uuid)


def test_corrupt_store_is_refused_at_the_start_and_left_as_it_is(stack: StackProcesses, fake: FakeBuildkite) -> None:
    fake.add_job()
    scheduler = stack.start_scheduler()
    scheduler.terminate()
    assert scheduler.ended() == 0
    file = stack.directory / "scheduler" / "jobs.sqlite3"
    data = bytearray(file.read_bytes())
    data[4096 : 4096 * 3] = os.urandom(4096 * 2)
    file.write_bytes(data)
    settings = {"STATE_DIRECTORY": str(file.parent), "LISTEN": f"127.0.0.1:{free_port()}", "STACK_KEY": "test"}
    environment = stack.environment(**settings)
    second = Process(compiled("scheduler.py"), environment, stack.directory, stack.directory / "second.log")
    assert second.ended() == 74
    second.wait_for_line("stopped", str(file), "it is damaged", "Nothing was changed")
    assert file.read_bytes() == data


def test_start_on_a_copy_of_the_store_beside_the_first_says_so(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path: Path
) -> None:
    stack.start_scheduler()
    assert stack.scheduler
    stack.scheduler.terminate()
    assert stack.scheduler.ended() == 0
    copy = shutil.copytree(tmp_path / "scheduler", tmp_path / "copy")
    first, second = stack.start_scheduler(), stack.start_scheduler(1, STATE_DIRECTORY=str(copy))
    # As chance has it now and then: both list a job before one of them has reserved it.
    fake.set_fault("reserve", hang=math.inf)
    uuid = fake.add_job(command=until_file(tmp_path / "end"))
    for each in (first, second):
        each.wait_for_line("put", uuid)
    fake.clear_faults()
    for each in (first, second):
        each.wait_for_line("ready", uuid)
    assert problems(stack, 0) == problems(stack, 1) == []
    stack.start_worker("only")
    begun(fake, uuid)
    second.wait_for_line("rival", uuid, "another scheduler uses stack test-default")
    assert any("another scheduler uses stack test-default" in problem for problem in problems(stack, 1))
    (tmp_path / "end").touch()
    over(fake, uuid)
    assert problems(stack, 0) == []


def problems(stack: StackProcesses, number: int) -> list[str]:
    told: list[str] = requests.get(f"{stack.urls[number]}/health", timeout=30).json()["problems"]
    return told


# -- worker cannot start its agent


def test_lose_agent_binary_releases_the_job_and_claims_nothing_until_it_is_back(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    agent = tmp_path / "agent"
    agent.symlink_to(agent_path("fake"))
    with StackProcesses(fake, tmp_path, str(agent)) as stack:
        stack.start_scheduler()
        worker = stack.start_worker("only")
        worker.wait_for_line("agent path=")
        agent.unlink()
        uuid = fake.add_job()
        worker.wait_for_line("retrying", "what=agent", "No such file")
        fake.wait_for(lambda: fake.jobs[uuid].state == "reserved")
        agent.symlink_to(agent_path("fake"))
        over(fake, uuid)
        wait_until(lambda: stack.job(uuid)["state"] == "done", "the scheduler hears that the job ran")
        assert stack.job(uuid)["attempts"] == 0


@pytest.mark.parametrize("knob", [{"FAKE_AGENT_EXIT": "1"}, {"FAKE_AGENT_EXIT": "0"}])
def test_break_agent_of_one_worker_does_not_fail_the_queue(
    knob: dict[str, str], stack: StackProcesses, fake: FakeBuildkite
) -> None:
    stack.start_scheduler()
    broken = stack.start_worker("broken", **knob)
    first = fake.add_job()
    broken.wait_for_line("completed", first)
    stack.start_worker("good")
    jobs = [fake.add_job() for _ in range(5)]
    over(fake, first, *jobs)
    assert all(fake.jobs[uuid].agent_name == "good" for uuid in (first, *jobs))


# -- stop of the scheduler


def test_stop_scheduler_with_parked_claims_answers_them_and_keeps_what_is_reserved(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    waiting = fake.add_job(rules=["os=plan9"])
    scheduler = stack.start_scheduler()
    scheduler.wait_for_line("ready", waiting)
    worker = stack.start_worker("only")
    worker.wait_for_line("agent path=")
    scheduler.send_signal(signal.SIGTERM)
    assert scheduler.ended() == 0
    assert not fake.calls_to("deregister")
    stack.start_scheduler()
    assert claim(stack, "queue=default,os=plan9").json()["uuid"] == waiting


# -- the clock is set


class SetClock:
    """A clock that a test sets, as an administrator or the time service would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.off = 0.0
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + self.off)


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_set_clock_by_an_hour_expires_nothing_and_stops_nothing(
    step: float, fake: FakeBuildkite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = SetClock(monkeypatch)
    settings = read_settings(Settings, {"BUILDKITE_AGENT_TOKEN": fake.token, "STATE_DIRECTORY": str(tmp_path)})
    clock = Clock()
    store = open_sqlite(settings)
    dispatcher = Dispatcher(store, clock.now)
    stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
    lead = Leadership(store)
    intake = Intake(stack, lead, dispatcher, settings, clock.now, pytest.fail)
    upkeep = Upkeep(lead, clock, {"default": intake}, dispatcher)
    held, waiting = fake.add_job(priority=1), fake.add_job()
    for duty in intake.tasks:
        duty.run_once()
    worker = Worker("w1", "s1", Profile.of("queue=default"))
    claim = store.claim(worker, clock.now())
    assert claim and claim.uuid == held
    answered_at, listed_at = clock.now() - intake.answered_at, clock.now() - intake.last_list_at
    wall.off = step
    upkeep.tick(clock.now())
    after = [store.get(uuid) for uuid in (held, waiting)]
    assert [job.state for job in after if job] == ["leased", "ready"]
    assert store.touch(Holder(held, claim.claim, worker), clock.now()).state == "leased"
    # Nothing that is remembered lies an hour ahead or behind.
    assert abs(clock.now() - intake.answered_at - answered_at) < 60
    assert abs(clock.now() - intake.last_list_at - listed_at) < 60
    pause = intake.check_states(clock.now())
    assert pause is not None and pause <= scheduler.SWEEP_SECONDS
    fake.cancel_job(waiting)
    clock_now = clock.now() + scheduler.SWEEP_SECONDS
    intake.check_states(clock_now)
    done = store.get(waiting)
    assert done and done.state == "done"
    store.close()


# -- the scheduler is frozen


class Keeper:
    """Upkeep of one job that is leased, by a clock that goes on when the test says so, and whoever holds the job."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        # Real time stands still: on a busy machine a tick would be late by itself.
        self._passed, real, wall = 0.0, time.monotonic(), time.time()
        monkeypatch.setattr(time, "monotonic", lambda: real + self._passed)
        monkeypatch.setattr(time, "time", lambda: wall + self._passed)
        self.store, self.clock = store, Clock()
        self.upkeep = Upkeep(Leadership(store), self.clock, {}, Dispatcher(store, self.clock.now))
        now = self.clock.now()
        store.put([Job.from_api("default", {"id": UUID}, now)], store.sequence(), now)
        store.confirm([UUID], store.sequence(), now + 3600, now)
        self.worker = Worker("w1", "s1", Profile.of("queue=default"))
        claimed = store.claim(self.worker, now)
        assert claimed
        self.claim = claimed.claim
        self.tick()

    def pass_time(self, seconds: float) -> None:
        self._passed += seconds

    def tick(self) -> None:
        self.upkeep.tick(self.clock.now())

    def state(self) -> str:
        job = self.store.get(UUID)
        assert job
        return job.state

    def touch(self) -> str:
        return self.store.touch(Holder(UUID, self.claim, self.worker), self.clock.now()).state


@pytest.fixture
def keeper(open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> Keeper:
    return Keeper(open_store(LEASE_SECONDS="30"), monkeypatch)


def test_upkeep_after_a_freeze_leaves_a_lease_to_the_touch_that_waited(
    keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(keeper.store.rows, RedisRows) and REDIS == "fakeredis":
        pytest.skip("fakeredis ends keys by the clock that this test sets, so it is no more trusted after 60 s")
    keeper.pass_time(90)
    keeper.tick()
    assert keeper.touch() == "leased"
    assert [record.message for record in caplog.records if "frozen" in record.message] == [
        "frozen seconds=89 reason=" + '"this process did not run; all leases restart"'
    ]
    for _ in range(29):
        keeper.pass_time(1)
        keeper.tick()
    assert keeper.state() == "leased"
    for _ in range(2):  # it had all its time again, and said nothing
        keeper.pass_time(1)
        keeper.tick()
    assert keeper.state() == "reserving"


def test_upkeep_that_was_frozen_between_reading_the_clock_and_its_tick_leaves_the_lease(keeper: Keeper) -> None:
    before = keeper.clock.now()
    keeper.pass_time(90)
    keeper.upkeep.tick(before)
    keeper.pass_time(1)
    keeper.tick()
    assert keeper.touch() == "leased"


@pytest.mark.parametrize("late", [False, True], ids=["before it expires leases", "after that"])
def test_upkeep_that_was_frozen_in_the_middle_leaves_a_lease_to_the_touch_that_waited(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    expire = keeper.store.expire

    def frozen(queue_keys: Collection[str], now: float) -> list[Job]:
        keeper.pass_time(0 if late else 90)
        done = expire(queue_keys, now)
        keeper.pass_time(90 if late else 0)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(keeper.store, "expire", frozen)
        keeper.tick()
    keeper.pass_time(1)
    keeper.tick()
    assert keeper.touch() == "leased"


def test_upkeep_whose_store_was_away_for_longer_than_a_lease_leaves_it_to_its_holder(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> NoReturn:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        for name in ("expire", "renew_leases", "restart_leases"):
            patch.setattr(keeper.store, name, away)
        for _ in range(40):
            keeper.pass_time(1)
            with pytest.raises(StoreUnavailable):
                keeper.tick()
    keeper.pass_time(1)
    keeper.tick()
    assert keeper.touch() == "leased"
    assert not [record for record in caplog.records if "frozen" in record.message]  # it was not


def test_upkeep_that_backed_off_after_a_fault_of_ours_was_not_frozen(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(*_: object) -> NoReturn:
        raise KeyError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(keeper.store, "expire", faulty)
        with pytest.raises(KeyError):
            keeper.tick()
    keeper.pass_time(60)  # as a duty backs off in the end
    keeper.tick()
    assert keeper.touch() == "leased"
    assert keeper.store.unconfirmed("default", keeper.clock.now() + 60, 10) == []  # no reservation is due for it
    assert not [record for record in caplog.records if "frozen" in record.message]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_touch_sent_in_time_to_frozen_scheduler_keeps_the_lease(fake: FakeBuildkite, tmp_path: Path, kind: str) -> None:
    # Several jobs, so that some touch is read after the leases were looked at, whichever thread wakes first. A short
    # lease could end on a busy machine before all are claimed.
    jobs, lease_seconds = 5, 5
    for _ in range(jobs):
        fake.add_job()
    with ExitStack() as cleanup:
        settings = {"LEASE_SECONDS": str(lease_seconds)}
        if kind == "redis":
            redis = RedisServer(tmp_path)
            cleanup.callback(redis.stop)
            settings["REDIS_ADDR"] = redis.address
        stack = cleanup.enter_context(StackProcesses(fake, tmp_path, "", **settings))
        scheduler = stack.start_scheduler()
        claims = [claim(stack).json() for _ in range(jobs)]
        scheduler.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        touches = []
        for each in claims:
            connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=30)
            cleanup.enter_context(closing(connection))
            body = json.dumps({"claim": each["claim"]})
            connection.request("POST", f"/jobs/{each['uuid']}/touch", body, {"Content-Type": "application/json"})
            touches.append(connection)
        # The freeze itself: it must outlast the leases, and be one that upkeep tells from a busy machine.
        frozen_until = frozen_at + lease_seconds + UPKEEP_SECONDS + FROZEN_SECONDS + 0.5
        time.sleep(max(0.0, frozen_until - time.monotonic()))
        scheduler.send_signal(signal.SIGCONT)
        assert [connection.getresponse().status for connection in touches] == [200] * jobs
        assert stack.stats()["states"]["leased"] == jobs


# -- a queue is taken out of the settings


def test_drop_queue_from_the_settings_with_jobs_left_says_so(fake: FakeBuildkite, tmp_path: Path) -> None:
    with StackProcesses(fake, tmp_path, agent_path("fake"), SCHEDULER_QUEUES="default,gpu") as stack:
        uuid = fake.add_job(queue="gpu", rules=["queue=gpu"])
        scheduler_process = stack.start_scheduler()
        scheduler_process.wait_for_line("ready", uuid)
        scheduler_process.terminate()
        assert scheduler_process.ended() == 0
        stack.scheduler_settings["SCHEDULER_QUEUES"] = "default"
        stack.start_scheduler().wait_for_line("error", "orphaned", "queue=gpu", "jobs=1")
