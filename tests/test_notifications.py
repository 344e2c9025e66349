"""What users read on the build page of a job that waits, and what it may cost: next to nothing."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scheduler
from conftest import Clock
from fake_buildkite import FakeBuildkite, listed
from processes import StackProcesses, agent_path
from scheduler import (
    AgentEnd,
    BuildkiteError,
    Dispatcher,
    Holder,
    Intake,
    Job,
    Leadership,
    Move,
    Profile,
    Settings,
    Stack,
    Store,
    Worker,
    WorkerRow,
    WorkerSighting,
)
from test_intake import fake, no_pace

__all__ = ["fake", "no_pace"]  # fixtures

#: Seconds. No wait of a test is longer.
PATIENCE = 30.0
LINUX = "queue=default,os=linux"
ALONE = "first of its rules in line."


class Bench:
    """One queue's intake over a store that is watched; the test moves the clock and calls the duties."""

    def __init__(self, fake: FakeBuildkite, clock: Clock, store: Store, settings: Settings):
        self.fake, self.clock = fake, clock
        #: Whether what happens to jobs is heard here.
        self.leads = True
        self.store = store
        store.on_move = self.on_move
        self.dispatcher = Dispatcher(store, clock.now)
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        self.lead = Leadership(store)
        self.intake = Intake(stack, self.lead, self.dispatcher, settings, clock.now, pytest.fail)
        self.notifier = self.intake.notifier

    def on_move(self, move: Move, now: float) -> None:
        if self.leads:
            self.notifier.on_move(move, now)

    def take_in(self) -> None:
        self.intake.list_jobs(self.clock.now())
        while self.intake.reserve_jobs(self.clock.now()) == 0:
            pass

    def add(self, count: int = 1, **about: Any) -> list[str]:
        uuids = [self.fake.add_job(**about) for _ in range(count)]
        self.take_in()
        return uuids

    def pass_time(self, seconds: float) -> None:
        """Let seconds pass, and the notifier do what is due then."""
        self.clock.advance(seconds)
        while (pause := self.intake.notify_users(self.clock.now())) != 1:
            assert pause is not None

    def told(self, uuid: str) -> list[str]:
        """What the job's build page says since it was last read."""
        shown = self.fake.jobs[uuid].notifications
        texts = [each["detail"] for each in shown]
        shown.clear()
        return texts

    def learn(self, finished: Job, running: Job) -> None:
        """Buildkite says of these that they are, and of the others that no agent has them."""
        self.fake.set_state(finished.uuid, "finished")
        self.fake.set_state(running.uuid, "running")
        self.intake.check_states(self.clock.now())
        self.take_in()

    def claim(self, name: str = "w1", query: str = LINUX) -> Job:
        job = self.look_for_work(name, query)
        assert job
        return job

    def look_for_work(self, name: str = "w1", query: str = LINUX) -> Job | None:
        return self.dispatcher.claim(Worker(name, f"session of {name}", Profile.of(query)), 0)

    def calls(self) -> int:
        return len(self.fake.calls_to("notifications"))


@pytest.fixture
def bench(fake: FakeBuildkite, clock: Clock, store: Store, settings: Callable[..., Settings]) -> Bench:
    return Bench(fake, clock, store, settings())


# --- What is told, and when ---


def test_notify_of_job_that_waits_tells_how_many_are_ahead(bench: Bench) -> None:
    first, *_ = sorted(bench.add(4, priority=1))
    (last,) = bench.add()
    bench.pass_time(1)
    assert bench.told(last) == []
    bench.pass_time(1)
    assert bench.told(first) == [f"Reserved by stack test-default: {ALONE}"]
    assert bench.told(last) == ["Reserved by stack test-default: 4 with the same rules ahead."]


def test_notify_after_taking_over_tells_of_what_waited_before(bench: Bench) -> None:
    bench.take_in()
    bench.lead.end()
    bench.pass_time(0)
    bench.leads = False
    uuid = bench.fake.add_job()
    bench.fake.reserve_for(uuid, "test-default")
    store = bench.lead.always
    store.put([Job.from_api("default", listed(bench.fake.jobs[uuid]), bench.clock.now())], 0, bench.clock.now())
    store.confirm([uuid], store.sequence(), bench.clock.now() + 900, bench.clock.now())
    bench.pass_time(scheduler.SECOND_LOOK_SECONDS)
    assert bench.told(uuid) == []
    bench.lead.begin(store, 0.0)
    bench.intake.list_jobs(bench.clock.now())
    bench.pass_time(0)
    bench.pass_time(scheduler.THIRD_LOOK_SECONDS)
    assert bench.told(uuid) == [f"Waiting (no_worker): no live worker serves queue default; {ALONE}"]


def test_notify_of_job_that_is_handed_out_at_once_tells_only_to_whom(bench: Bench) -> None:
    (uuid,) = bench.add()
    bench.claim()
    bench.pass_time(600)
    bench.pass_time(0)
    assert bench.told(uuid) == []  # too old to be true
    (uuid,) = bench.add()
    bench.claim("w2")
    bench.pass_time(3)
    assert bench.told(uuid) == ["Handed to worker w2."]


def test_notify_of_job_that_no_worker_matches_tells_the_rule_ever_more_rarely(bench: Bench) -> None:
    bench.look_for_work(query="queue=default,os=linux")
    (uuid,) = bench.add(rules=["queue=default", "os=mac"])
    bench.pass_time(2)
    bench.told(uuid)
    times = []
    for second in range(10, 12 * 3600, 10):
        bench.clock.advance(8 if second == 10 else 10)
        if second % 100 == 0:
            bench.look_for_work(query="queue=default,os=linux")
        bench.pass_time(0)
        if texts := bench.told(uuid):
            assert texts == [f"Waiting (no_worker): no live worker of queue default has os=mac; {ALONE}"]
            times.append(second)
    assert times == [30, 600, 1200, 2400, 4800, 9600, 19200, 38400]


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("busy", f"Waiting (workers_busy): all matching workers are busy: 1; {ALONE}"),
        ("free", f"Waiting (ahead): next in line: 1 matching worker is free; {ALONE}"),
        ("gone", f"Waiting (no_worker): no live worker serves queue default; {ALONE}"),
    ],
)
def test_notify_after_half_a_minute_tells_why_it_waits(bench: Bench, why: str, text: str) -> None:
    if why == "busy":
        bench.add(priority=1)
        bench.claim()
    (uuid,) = bench.add()
    bench.pass_time(20)
    bench.told(uuid)
    if why == "free":
        # It claims for another queue, so nothing is handed out: only the look counts.
        bench.dispatcher._seen["w9"] = WorkerSighting(
            bench.clock.now(), Worker("w9", "", Profile.of(LINUX)), waits=False
        )
        bench.store.workers = lambda: [WorkerRow("w9")]  # type: ignore[method-assign]
    bench.pass_time(10)
    assert bench.told(uuid) == [text]


def test_notify_when_the_queue_is_paused_tells_those_who_wait_soon(bench: Bench, fake: FakeBuildkite) -> None:
    early, late = sorted(bench.add(2))
    bench.pass_time(100)
    assert bench.told(early) and bench.told(late)
    fake.pause_queue("default")
    bench.take_in()
    bench.pass_time(1)
    assert bench.told(early) == [f"Waiting (queue_paused): queue default is paused; {ALONE}"]
    assert bench.told(late) == ["Waiting (queue_paused): queue default is paused; 1 with the same rules ahead."]
    bench.pass_time(10)
    assert bench.told(early) == []


def test_notify_of_claim_that_is_given_back_tells_who_and_why(bench: Bench) -> None:
    (uuid,) = bench.add()
    job = bench.claim()
    bench.clock.advance(1)
    now = bench.clock.now()
    bench.store.answered("default", now)
    bench.store.complete(Holder(uuid, job.claim), AgentEnd(1, "cannot connect"), now)
    bench.take_in()
    bench.clock.advance(2)
    job = bench.claim("w2")
    bench.store.release(Holder(uuid, job.claim), "no disk", bench.clock.now())
    bench.take_in()
    bench.claim("")
    bench.pass_time(31)
    bench.store.answered("default", bench.clock.now())
    bench.store.expire(["default"], bench.clock.now())
    bench.take_in()
    bench.pass_time(1)
    assert bench.told(uuid) == [
        "Handed to worker w1.",
        "Given back by worker w1: agent exited 1: cannot connect",
        "Handed to worker w2.",
        "Given back by worker w2: no disk",
        "Handed to a worker without a name.",
        "Given back by a worker without a name: its lease expired",
    ]


def test_notify_of_job_that_is_put_aside_tells_until_when_and_why(bench: Bench) -> None:
    (uuid,) = bench.add()
    for _ in range(3):
        job = bench.claim()
        bench.store.withdraw(Holder(uuid, job.claim), "no answer could be made", "unanswerable", bench.clock.now())
        bench.take_in()
    until = scheduler.rfc3339(bench.clock.now() + 60)
    bench.pass_time(1)
    assert bench.told(uuid)[-2:] == ["Handed to worker w1.", f"Put aside until {until}: no answer could be made"]


def test_notify_of_claim_that_ended_waits_for_proof_that_no_agent_had_the_job(bench: Bench) -> None:
    bench.add(3)
    finished, running, unstarted = [bench.claim(f"w{number}") for number in range(3)]
    for job in (finished, running, unstarted):
        bench.store.answered("default", bench.clock.now())
        bench.store.complete(Holder(job.uuid, job.claim), AgentEnd(0), bench.clock.now())
    bench.pass_time(1)
    assert bench.told(unstarted.uuid) == ["Handed to worker w2."]
    bench.told(finished.uuid), bench.told(running.uuid)
    bench.learn(finished, running)
    bench.pass_time(1)
    assert bench.told(finished.uuid) == bench.told(running.uuid) == []
    assert bench.told(unstarted.uuid) == ["Given back by worker w2: agent exited 0"]
    assert not any(look.end for look in bench.notifier._plans.values())


def test_notify_of_claim_whose_worker_was_restarted_tells_so(bench: Bench) -> None:
    (uuid,) = bench.add()
    bench.claim()
    bench.store.claim(Worker("w1", "a new session", Profile.of(LINUX)), bench.clock.now())
    bench.pass_time(1)
    bench.store.answered("default", bench.clock.now())
    bench.store.expire(["default"], bench.clock.now())
    bench.take_in()
    bench.pass_time(1)
    assert bench.told(uuid) == ["Handed to worker w1.", "Given back by worker w1: its worker was restarted"]


def test_notify_at_a_scheduler_that_does_not_lead_finds_out_whether_an_agent_had_the_job(bench: Bench) -> None:
    bench.add(3)
    finished, running, unstarted = [bench.claim(f"w{number}") for number in range(3)]
    for job in (finished, running, unstarted):
        bench.store.release(Holder(job.uuid, job.claim), "no disk", bench.clock.now())
    bench.leads = False
    bench.pass_time(1)
    for number, job in enumerate((finished, running, unstarted)):
        assert bench.told(job.uuid) == [f"Handed to worker w{number}."]
    bench.learn(finished, running)
    bench.pass_time(5)
    assert bench.told(finished.uuid) == bench.told(running.uuid) == []
    assert bench.told(unstarted.uuid) == ["Given back by worker w2: no disk"]
    assert not any(look.end for look in bench.notifier._plans.values())
    bench.fake.set_state(unstarted.uuid, "canceled")
    bench.clock.advance(5)
    bench.intake.check_states(bench.clock.now())
    bench.pass_time(60)
    assert bench.notifier._texts.keys() == {running.uuid}  # nothing is kept of what is done


def test_notify_at_a_scheduler_that_does_not_lead_tells_of_a_claim_that_ended_before_the_next(bench: Bench) -> None:
    (uuid,) = bench.add()
    job = bench.claim()
    bench.store.release(Holder(uuid, job.claim), "no disk", bench.clock.now())
    bench.leads = False
    bench.take_in()
    bench.leads = True
    bench.claim("w2")
    bench.pass_time(1)
    assert bench.told(uuid) == [
        "Handed to worker w1.",
        "Given back by worker w1: no disk",
        "Handed to worker w2.",
    ]
    assert not any(look.end for look in bench.notifier._plans.values())


def test_notify_of_ever_more_jobs_forgets_how_often_it_told_of_the_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "COUNTED_JOBS", 3)
    (uuid, *others) = bench.add(5)
    for each in (uuid, *others[:2], uuid, *others[2:]):
        bench.notifier._queue_text(each, "x", bench.clock.now())
    assert bench.notifier._texts == {uuid: 2, others[2]: 1, others[3]: 1}


def test_notify_of_long_reason_cuts_it_between_letters(bench: Bench) -> None:
    (uuid,) = bench.add()
    job = bench.claim()
    now = bench.clock.now()
    bench.store.release(Holder(uuid, job.claim), "x" + "❄" * 500, now)
    bench.take_in()
    bench.pass_time(1)
    text = bench.told(uuid)[-1]
    assert text.startswith("Given back by worker w1: x❄❄")
    assert 253 < len(text.encode()) <= 256
    assert bench.notifier.counts == {"sent": 2, "refused": 0, "lost": 0}


def test_notify_of_job_that_goes_round_and_round_stops_at_twenty_texts(bench: Bench) -> None:
    (uuid,) = bench.add()
    for _ in range(30):
        job = bench.claim()
        now = bench.clock.now()
        bench.store.release(Holder(uuid, job.claim), "no disk", now)
        bench.take_in()
        bench.pass_time(1)
    assert len(bench.told(uuid)) == scheduler.TEXTS_PER_JOB
    bench.fake.set_state(uuid, "canceled")
    bench.clock.advance(5)
    bench.intake.check_states(bench.clock.now())
    assert not bench.notifier._texts and not bench.notifier._plans  # nothing is kept of what is done


def test_notify_after_a_restart_repeats_nothing(
    bench: Bench, fake: FakeBuildkite, clock: Clock, settings: Callable[..., Settings]
) -> None:
    uuids = bench.add(50)
    bench.pass_time(2)
    bench.pass_time(28)
    assert all(len(bench.told(uuid)) == 2 for uuid in uuids)
    calls = bench.calls()
    bench.store.restart_leases(clock.now(), confirm=True)
    restarted = Bench(fake, clock, bench.store, settings())
    restarted.take_in()
    restarted.pass_time(500)
    assert bench.calls() == calls
    restarted.pass_time(70)  # ten minutes after its reservation it is time again
    assert all(len(restarted.told(uuid)) == 1 for uuid in uuids)


# --- What it costs, and what it never does ---


@pytest.mark.long
@pytest.mark.large
def test_notify_of_thousands_is_batched_and_names_each_once(bench: Bench) -> None:
    uuids = bench.add(2500)
    bench.take_in()
    bench.take_in()
    bench.pass_time(2)
    batches = [len(call.json["notifications"]) for call in bench.fake.calls_to("notifications")]
    assert sum(batches) == 2500 and max(batches) <= 1000
    assert all(len(bench.told(uuid)) == 1 for uuid in uuids)


def test_notify_beyond_its_bounds_loses_some_and_counts_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "WATCHED_JOBS", 3)
    bench.add(5)
    bench.pass_time(2)
    assert bench.notifier.counts == {"sent": 3, "refused": 0, "lost": 0}
    assert bench.notifier._outbox.maxlen == scheduler.OUTBOX
    monkeypatch.setattr(scheduler, "OUTBOX", 0)
    bench.claim()
    assert bench.notifier.counts["lost"] == 1


def test_notify_text_that_is_refused_is_counted_and_said_once(
    bench: Bench, fake: FakeBuildkite, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    good, full = bench.add(2)
    fake.jobs[full].notifications += [{"detail": "x"}] * 100
    bench.pass_time(2)
    bench.pass_time(30)
    assert bench.notifier.counts == {"sent": 2, "refused": 2, "lost": 0}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == ('refused call=notify queue=default reason="job stack notification count exceeded (1)"')
    assert len(bench.told(good)) == 2


@pytest.mark.parametrize("answer", [{}, {"errors": None}, {"errors": [1, {"error": 2}, {"indexes": [0, 1, 2]}]}])
def test_notify_with_odd_answer_is_taken_as_it_is(bench: Bench, fake: FakeBuildkite, answer: Any) -> None:
    bench.add()
    fake.set_fault("notifications", body=answer)
    bench.pass_time(2)
    assert sum(bench.notifier.counts.values()) == 1


def test_notify_that_buildkite_forbids_is_tried_again_in_ten_minutes(bench: Bench, fake: FakeBuildkite) -> None:
    (uuid,) = bench.add()
    fake.set_fault("notifications", status=403, times=1)
    bench.clock.advance(2)
    assert bench.intake.notify.run_once() == scheduler.UNWANTED_SECONDS
    assert "build pages of this queue show no texts" in bench.intake.notify.problem
    assert bench.notifier.counts["lost"] == 1
    # Nothing else has noticed.
    assert bench.claim().uuid == uuid
    bench.take_in()
    assert not any(duty.problem for duty in bench.intake.tasks if duty is not bench.intake.notify)
    bench.intake.notify.run_once()
    assert bench.told(uuid) == ["Handed to worker w1."]


@pytest.mark.parametrize(
    "fault",
    [*({"status": status} for status in (400, 404, 422, 429, 503)), {"reset": True}, {"garbage": True}],
    ids=str,
)
def test_notify_that_fails_backs_off_and_loses_the_batch(
    bench: Bench, fake: FakeBuildkite, fault: dict[str, Any]
) -> None:
    bench.add()
    fake.set_fault("notifications", **fault)
    bench.clock.advance(2)
    with pytest.raises(BuildkiteError):
        bench.intake.notify_users(bench.clock.now())
    assert bench.notifier.counts == {"sent": 0, "refused": 0, "lost": 1}
    assert 0 < bench.intake.notify.run_once() <= 1.0  # nothing is left to say


def test_claim_while_buildkite_hangs_on_a_notification_is_served(bench: Bench, fake: FakeBuildkite) -> None:
    bench.add(2)
    fake.set_fault("notifications", hang=60, times=1)
    bench.clock.advance(2)
    thread = threading.Thread(target=bench.intake.notify.run_once, daemon=True)
    thread.start()
    fake.wait_for(lambda: bench.fake.calls_to("notifications"), PATIENCE)
    assert bench.claim() and bench.claim("w2")
    fake.release_hangs()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_set_clock_moves_the_looks_with_it(bench: Bench) -> None:
    (uuid,) = bench.add()
    bench.clock.advance(3600)
    bench.intake.follow_clock(3600)
    bench.pass_time(0)
    assert bench.told(uuid) == []
    bench.pass_time(2)
    assert len(bench.told(uuid)) == 1


def test_intake_with_notifications_off_has_no_such_duty(
    fake: FakeBuildkite, clock: Clock, store: Store, settings: Callable[..., Settings]
) -> None:
    off = Bench(fake, clock, store, settings(STACK_NOTIFICATIONS="off"))
    assert off.intake.notify not in off.intake.tasks
    on = dataclasses.replace(settings(), stack_notifications=True)
    assert Bench(fake, clock, store, on).intake.notify.name == "default notify"


# --- The processes ---


@pytest.mark.parametrize("setting", ["on", "off"])
def test_serve_a_job_tells_its_build_page_who_has_it_unless_it_is_off(setting: str, tmp_path: Path) -> None:
    agent = agent_path("fake")
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, agent, STACK_NOTIFICATIONS=setting) as stack:
        stack.start_scheduler()
        uuid = fake.add_job()
        stack.start_worker("w1")
        job = fake.jobs[uuid]
        fake.wait_for(lambda: job.state == "finished", PATIENCE)
        if setting == "on":
            fake.wait_for(lambda: job.notifications, PATIENCE)
            assert "Handed to worker w1." in [each["detail"] for each in job.notifications]
        else:
            ends_at = time.monotonic() + PATIENCE
            while stack.job(uuid)["state"] != "done":
                assert time.monotonic() < ends_at
            assert fake.calls_to("notifications") == []
