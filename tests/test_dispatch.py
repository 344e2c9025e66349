"""`Dispatcher`: which waiting claim gets which job, on real threads and over a real store."""

from __future__ import annotations

import queue
import random
import threading
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest

import scheduler
from conftest import Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from scheduler import (
    AgentEnd,
    Dispatcher,
    Finding,
    Hold,
    Holder,
    Intake,
    Job,
    JobFinding,
    JobState,
    Leadership,
    Profile,
    Refusal,
    RuleSet,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
    Worker,
    WorkerNameTaken,
)

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
#: Seconds a claim asks to wait: longer than any test, so that only being woken can end it.
LONG = 60.0


class Claim(threading.Thread):
    """A claim on a thread of its own, as each connection has one."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        worker: Worker,
        wait: float,
        is_gone: Callable[[], bool] = lambda: False,
    ):
        super().__init__(daemon=True)
        self._claim: Callable[[], Job | None] = lambda: dispatcher.claim(worker, wait, is_gone)
        self._job: Job | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._job = self._claim()
        except Exception as error:
            self._error = error

    def answer(self) -> Job | None:
        """What the claim was answered with, as soon as it is."""
        self.join(PATIENCE)
        assert not self.is_alive(), "the claim still waits"
        if self._error:
            raise self._error
        return self._job


class Bench:
    """A dispatcher, its store, and the claims that a test makes."""

    def __init__(self, store: Store, clock: Clock, waits: queue.SimpleQueue[str]):
        self.store, self.clock = store, clock
        self.dispatcher = Dispatcher(store, clock.now)
        self._waits = waits
        self._claims: list[Claim] = []

    def make_ready(self, *rules: str, priority: int = 0) -> Job:
        """Put a job and confirm its reservation, without offering it."""
        now = self.clock.now()
        raw = {"id": str(uuids.uuid4()), "agent_query_rules": list(rules), "priority": priority}
        (put,) = self.store.put([Job.from_api("default", raw, now)], self.store.sequence(), now)
        (job,) = self.store.confirm([put.uuid], self.store.sequence(), now + 900, now)
        return job

    def claim(
        self,
        name: str,
        query: str = "queue=default",
        wait: float = LONG,
        is_gone: Callable[[], bool] = lambda: False,
        needs_token: bool = False,
    ) -> Claim:
        worker = Worker(name, f"session of {name}" if name else "", Profile.of(query), needs_token)
        claim = Claim(self.dispatcher, worker, wait, is_gone)
        self._claims.append(claim)
        return claim

    def park(
        self,
        name: str,
        query: str = "queue=default",
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Claim:
        """A claim that has begun to wait."""
        claim = self.claim(name, query, is_gone=is_gone)
        self.await_wait(name)
        return claim

    def await_wait(self, name: str) -> None:
        """Until a claim of that worker begins to wait."""
        while self._waits.get(timeout=PATIENCE) != name:
            pass

    def state(self, job: Job) -> JobState:
        found = self.store.get(job.uuid)
        assert found
        return found.state

    def given(self, claim: Claim) -> str | None:
        job = claim.answer()
        return job.uuid if job else None

    def end(self) -> None:
        self.dispatcher.stop()
        for claim in self._claims:
            claim.join(PATIENCE)
            assert not claim.is_alive()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """The name of each worker whose claim begins to wait, at that moment."""
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Woken(threading.Event):
        def __init__(self, name: str):
            super().__init__()
            self._name = name

        def wait(self, timeout: float | None = None) -> bool:
            names.put(self._name)
            return super().wait(timeout)

    class Waiter(scheduler.ParkedClaim):
        def __init__(self, worker: Worker, is_gone: Callable[[], bool]):
            super().__init__(worker, is_gone)
            self.woken = Woken(worker.name)

    monkeypatch.setattr(scheduler, "ParkedClaim", Waiter)
    return names


@pytest.fixture
def bench(store: Store, clock: Clock, waits: queue.SimpleQueue[str]) -> Iterator[Bench]:
    bench = Bench(store, clock, waits)
    yield bench
    bench.end()


# --- Claims that find something, or nothing ---


def test_claim_with_ready_job_gets_it_at_once(bench: Bench) -> None:
    job = bench.make_ready()
    assert bench.given(bench.claim("w1")) == job.uuid
    assert bench.state(job) == "leased"


def test_claim_without_wait_and_job_is_answered_at_once(bench: Bench) -> None:
    assert bench.claim("w1", wait=0).answer() is None


def test_claim_whose_wait_is_over_is_answered_without_a_job(bench: Bench) -> None:
    assert bench.claim("w1", wait=0.05).answer() is None
    bench.dispatcher.offer([bench.make_ready()])
    assert bench.claim("w2", wait=0).answer()


def test_claim_with_job_for_others_alone_waits(bench: Bench) -> None:
    job = bench.make_ready("os=mac")
    claim = bench.park("w1", "os=linux")
    bench.dispatcher.offer([job])
    assert bench.state(job) == "ready"
    assert bench.given(bench.claim("w2", "os=mac")) == job.uuid
    assert claim.is_alive()


# --- Offers ---


def test_offer_wakes_a_parked_claim_with_the_job(bench: Bench) -> None:
    claim = bench.park("w1")
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    answer = claim.answer()
    assert answer and (answer.uuid, answer.state, answer.worker) == (job.uuid, "leased", "w1")


def test_offer_to_worker_without_a_name_works_too(bench: Bench) -> None:
    claims = [bench.park(""), bench.park("")]
    jobs = [bench.make_ready(), bench.make_ready()]
    bench.dispatcher.offer(jobs)
    assert {bench.given(claim) for claim in claims} == {job.uuid for job in jobs}


def test_offer_prefers_the_worker_with_fewest_tags(bench: Bench) -> None:
    claims = {
        name: bench.park(name, query)
        for name, query in (
            ("many", "os=linux,arch=amd64,docker=true"),
            ("few", "os=linux"),
            ("some", "os=linux,arch=amd64"),
        )
    }
    for name in ("few", "some", "many"):
        job = bench.make_ready("os=linux")
        bench.dispatcher.offer([job])
        assert bench.given(claims[name]) == job.uuid


@pytest.mark.parametrize(
    "queries",
    [["os=linux"] * 3, ["os=linux,a=1", "os=linux,a=2", "os=linux,a=3"]],
    ids=["with equal tags", "with equally many tags"],
)
def test_offer_among_equals_prefers_the_claim_parked_longest(bench: Bench, queries: list[str]) -> None:
    claims = [bench.park(f"w{n}", query) for n, query in enumerate(queries)]
    for claim in claims:
        job = bench.make_ready("os=linux")
        bench.dispatcher.offer([job])
        assert bench.given(claim) == job.uuid


def test_offer_generic_job_leaves_the_scarce_host_to_the_job_that_needs_it(bench: Bench) -> None:
    scarce, plain = bench.park("gpu-1", "os=linux,gpu=a100"), bench.park("cpu-1", "os=linux")
    generic, special = bench.make_ready("os=linux"), bench.make_ready("gpu=*")
    bench.dispatcher.offer([generic, special])
    assert bench.given(plain) == generic.uuid
    assert bench.given(scarce) == special.uuid


def test_offer_generic_job_with_only_the_scarce_host_free_uses_it(bench: Bench) -> None:
    scarce = bench.park("gpu-1", "os=linux,gpu=a100")
    job = bench.make_ready("os=linux")
    bench.dispatcher.offer([job])
    assert bench.given(scarce) == job.uuid


def test_offer_several_jobs_gives_each_worker_one(bench: Bench) -> None:
    claims = [bench.park(f"w{n}") for n in range(5)]
    jobs = [bench.make_ready() for _ in range(5)]
    bench.dispatcher.offer(jobs)
    assert sorted(bench.given(claim) or "" for claim in claims) == sorted(job.uuid for job in jobs)


def test_offer_more_jobs_than_workers_gives_out_the_first_in_line(bench: Bench) -> None:
    claims = [bench.park("w1"), bench.park("w2")]
    low, high, middle = (bench.make_ready(priority=priority) for priority in (-1, 5, 0))
    bench.dispatcher.offer([low, middle, high])
    assert [bench.given(claim) for claim in claims] == [high.uuid, middle.uuid]
    assert bench.state(low) == "ready"


def test_offer_with_a_better_job_in_the_store_gives_that_one_first(bench: Bench) -> None:
    claims = [bench.park("w1"), bench.park("w2")]
    better = bench.make_ready(priority=9)
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert [bench.given(claim) for claim in claims] == [better.uuid, job.uuid]


def test_offer_job_that_nobody_can_run_holds_up_no_other(bench: Bench) -> None:
    claim = bench.park("w1", "os=linux")
    stuck, good = bench.make_ready("os=plan9", priority=100), bench.make_ready("os=linux")
    bench.dispatcher.offer([stuck, good])
    assert bench.given(claim) == good.uuid


def test_offer_job_that_was_claimed_meanwhile_leaves_the_others_parked(bench: Bench) -> None:
    parked = bench.park("w1")
    job = bench.make_ready()
    assert bench.given(bench.claim("w2", wait=0)) == job.uuid
    bench.dispatcher.offer([job])
    later = bench.make_ready()
    bench.dispatcher.offer([later])
    assert bench.given(parked) == later.uuid


def test_offer_between_the_look_and_parking_is_not_missed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, jobs = bench.store.claim, list[Job]()

    def offered_right_after(worker: Worker, now: float, *holds: Any) -> Job | None:
        found = claim(worker, now, *holds)
        if not jobs:
            jobs.append(bench.make_ready())
            bench.dispatcher.offer(jobs)
        return found

    monkeypatch.setattr(bench.store, "claim", offered_right_after)
    assert bench.given(bench.claim("w1")) == jobs[0].uuid


def test_offer_again_after_a_pause_wakes_as_many_as_there_are_jobs(bench: Bench) -> None:
    bench.store.pause("default", True, bench.clock.now())
    jobs = [bench.make_ready(), bench.make_ready()]
    claims = [bench.park(f"w{n}") for n in range(3)]
    bench.store.pause("default", False, bench.clock.now())
    bench.dispatcher.offer_again()
    assert {bench.given(claim) for claim in claims[:2]} == {job.uuid for job in jobs}
    assert claims[2].is_alive()


def test_offer_again_of_some_rule_sets_asks_for_those_that_match_and_no_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    linux, other = bench.park("w1", "os=linux"), bench.park("w2", "os=bsd")
    job = bench.make_ready("os=linux")
    claim, asked = bench.store.claim, list[str]()

    def noted(worker: Worker, now: float, *holds: Any) -> Job | None:
        asked.append(worker.name)
        return claim(worker, now, *holds)

    monkeypatch.setattr(bench.store, "claim", noted)
    bench.dispatcher.offer_again(["queue=default,os=linux", "queue=default,os=plan9"])
    assert bench.given(linux) == job.uuid
    assert (asked, other.is_alive()) == (["w1"], True)


def test_offer_again_asks_once_in_vain_for_each_rule_set(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [bench.park(f"w{n}", f"host=w{n},os=linux") for n in range(4)]
    bsd = bench.park("bsd", "host=bsd,os=bsd")
    job, other = bench.make_ready("os=linux"), bench.make_ready("os=bsd")
    claim, asked = bench.store.claim, list[str]()

    def noted(worker: Worker, now: float, *holds: Any) -> Job | None:
        if threading.current_thread() is threading.main_thread():  # those who are woken ask once more for themselves
            asked.append(worker.name)
        return claim(worker, now, *holds)

    monkeypatch.setattr(bench.store, "claim", noted)
    bench.dispatcher.offer_again(["queue=default,os=linux", "queue=default,os=bsd"])
    assert bench.given(claims[0]) == job.uuid
    assert bench.given(bsd) == other.uuid
    assert asked == ["w0", "w1", "bsd"]
    assert all(each.is_alive() for each in claims[1:])


def park_many(dispatcher: Dispatcher, queries: Sequence[str], is_gone: Callable[[], bool] = lambda: False) -> None:
    """Claims that wait without a thread: whoever offers claims in their name."""
    for number, query in enumerate(queries):
        worker = Worker(f"w{number:04}", "s", Profile.of(query))
        waiter = scheduler.ParkedClaim(worker, is_gone)
        waiter.since = float(number)
        dispatcher._parked.setdefault(scheduler.group_of(worker), {})[id(waiter)] = waiter


def test_offer_that_fails_for_one_worker_gives_the_others_their_jobs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claims = [bench.park("w1"), bench.park("w2"), bench.park("mac", "os=mac")]
    claim = Store.claim

    def failing_for_w1(store: Store, worker: Worker, *arguments: Any) -> Job | None:
        if worker.name == "w1":
            raise KeyError("a fault")
        return claim(store, worker, *arguments)

    monkeypatch.setattr(Store, "claim", failing_for_w1)
    jobs = [bench.make_ready(), bench.make_ready("os=mac")]
    bench.dispatcher.offer(jobs)
    with pytest.raises(KeyError, match="a fault"):
        claims[0].answer()
    assert [bench.given(each) for each in claims[1:]] == [job.uuid for job in jobs]
    assert "worker=w1" in caplog.text


@pytest.mark.parametrize("again", [False, True])
@sqlite_only
def test_offer_to_many_profiles_compares_each_with_few_rule_sets(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    many = 200
    bench = Bench(store, clock, queue.SimpleQueue())
    # A tag for each host, as most fleets have it; half of the jobs are for hosts that are away.
    park_many(bench.dispatcher, [f"queue=default,os=linux,host=h{number}" for number in range(many)])
    jobs = [bench.make_ready("os=linux", f"host=h{2 * number}") for number in range(many)]
    matches, compared = Profile.matches, list[RuleSet]()

    def noted(self: Profile, rules: RuleSet) -> bool:
        compared.append(rules)
        return matches(self, rules)

    monkeypatch.setattr(Profile, "matches", noted)
    if again:
        bench.dispatcher.offer_again()
    else:
        bench.dispatcher.offer(jobs)
    held = {job.worker for job in map(store.get, [job.uuid for job in jobs]) if job and job.state == "leased"}
    assert held == {f"w{2 * number:04}" for number in range(many // 2)}
    assert len(compared) < 20 * many


def offered_one_by_one(workers: Sequence[Profile], jobs: Sequence[Job]) -> dict[str, int]:
    """Which worker each job should go to: in line order, to the free one with fewest tags, then parked longest."""
    free, given = list(range(len(workers))), dict[str, int]()
    for job in sorted(jobs, key=lambda job: job.order):
        rules = RuleSet.read(job.rule_set)
        fit = [number for number in free if workers[number].matches(rules)]
        if fit:
            best = min(fit, key=lambda number: (len(workers[number].tags), number))
            free.remove(best)
            given[job.uuid] = best
    return given


@pytest.mark.parametrize("seed", range(10))
@sqlite_only
def test_offer_of_many_jobs_gives_each_to_the_worker_that_it_would_get_alone(
    store: Store, clock: Clock, seed: int
) -> None:
    bench, chance, tags = Bench(store, clock, queue.SimpleQueue()), random.Random(seed), ["a=1", "b=1", "c=1", "d=1"]
    queries = [",".join(["queue=default", *chance.sample(tags, chance.randrange(5))]) for _ in range(12)]
    park_many(bench.dispatcher, queries)
    jobs = [
        bench.make_ready(*chance.sample(tags, chance.randrange(3)), priority=chance.randrange(3)) for _ in range(12)
    ]
    bench.dispatcher.offer(jobs)
    after = [job for job in map(store.get, [job.uuid for job in jobs]) if job and job.worker]
    given = {job.uuid: int(job.worker[1:]) for job in after if job.worker}
    assert given == offered_one_by_one([*map(Profile.of, queries)], jobs)


# --- Clients that are gone, and newer claims ---


def test_end_gone_answers_those_who_hung_up_and_leaves_the_others(bench: Bench, held: str) -> None:
    hung_up = threading.Event()
    gone = [bench.park("w1", is_gone=hung_up.is_set), bench.park("", is_gone=hung_up.is_set)]
    gone.append(bench.park(held, is_gone=hung_up.is_set))
    there = [bench.park("w2"), bench.park("")]
    bench.dispatcher.end_gone()
    assert all(claim.is_alive() for claim in gone)
    hung_up.set()
    bench.dispatcher.end_gone()
    assert [claim.answer() for claim in gone] == [None] * 3
    assert all(claim.is_alive() for claim in there)
    assert {name for name, seen in bench.dispatcher.workers().items() if seen.waits} == {"w2"}
    assert len(bench.dispatcher.nameless()) == 1


def test_offer_to_client_that_is_gone_gives_the_job_to_the_next(bench: Bench) -> None:
    gone, there = bench.park("w1", is_gone=lambda: True), bench.park("w2")
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert gone.answer() is None
    answer = there.answer()
    assert answer and (answer.uuid, answer.claims) == (job.uuid, 1)


def test_offer_to_clients_that_are_all_gone_keeps_the_job(bench: Bench) -> None:
    claims = [bench.park(f"w{n}", is_gone=lambda: True) for n in range(3)]
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert [claim.answer() for claim in claims] == [None] * 3
    assert bench.state(job) == "ready"


@pytest.mark.parametrize("again", [False, True])
def test_offer_to_a_worker_whose_name_was_taken_gives_the_job_to_the_next(bench: Bench, again: bool) -> None:
    taken, there = bench.park("w1"), bench.park("w2")
    # Its host died, say, and came back at another scheduler; here its connection still looks alive.
    bench.store.claim(Worker("w1", "newer", Profile.of("queue=default")), bench.clock.now())
    job = bench.make_ready()
    if again:
        bench.dispatcher.offer_again()
    else:
        bench.dispatcher.offer([job])
    assert bench.given(there) == job.uuid
    with pytest.raises(WorkerNameTaken):
        taken.answer()


def test_claim_again_answers_the_older_claim_without_a_job(bench: Bench) -> None:
    older = bench.park("w1")
    newer = bench.park("w1")
    assert older.answer() is None
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert bench.given(newer) == job.uuid


def test_claim_again_leaves_claims_of_other_workers_alone(bench: Bench) -> None:
    other, nameless = bench.park("w2"), bench.park("")
    bench.park("w1")
    bench.park("w1")
    bench.park("")
    assert other.is_alive() and nameless.is_alive()


def test_claim_again_while_the_older_one_is_answered_gets_the_same_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, newer = bench.store.claim, list[Claim]()
    job, first = bench.make_ready(), threading.Lock()

    def claimed_again_meanwhile(worker: Worker, now: float, *holds: Any) -> Job | None:
        found = claim(worker, now, *holds)
        if first.acquire(blocking=False):
            newer.append(bench.claim("w1"))
            newer[0].join(PATIENCE)
        return found

    monkeypatch.setattr(bench.store, "claim", claimed_again_meanwhile)
    assert bench.claim("w1").answer() is None
    answer = newer[0].answer()
    assert answer and (answer.uuid, answer.claims) == (job.uuid, 1)


def test_claim_again_while_a_job_is_given_to_the_older_one_gets_it(bench: Bench) -> None:
    newer = list[Claim]()

    def claimed_again_meanwhile() -> bool:
        newer.append(bench.claim("w1"))
        newer[0].join(PATIENCE)
        return False

    older = bench.park("w1", is_gone=claimed_again_meanwhile)
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert older.answer() is None
    answer = newer[0].answer()
    assert answer and (answer.uuid, answer.claims) == (job.uuid, 1)


# --- Workers that are held back ---


@pytest.fixture
def held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker that gets no job for a moment, since its agent ended without acquiring."""
    monkeypatch.setattr(scheduler, "HOLD_SECONDS", 0.3)
    monkeypatch.setattr(scheduler, "UNJUDGED_SECONDS", 0.3)
    job = bench.make_ready()
    given = bench.claim("failing").answer()
    now = bench.clock.now()
    assert given
    bench.store.answered("default", now)
    bench.store.complete(Holder(job.uuid, given.claim), AgentEnd(1), now)
    bench.store.learn({job.uuid: JobFinding(Finding.OVER, "canceled")}, bench.store.sequence(), now)
    return "failing"


def test_claim_of_held_worker_gets_no_job_before_its_time(bench: Bench, held: str) -> None:
    claim = bench.park(held)
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert bench.state(job) == "ready"
    assert claim.is_alive()
    bench.clock.advance(0.3)
    assert bench.given(claim) == job.uuid


def test_claim_of_a_worker_whose_last_job_ran_after_all_is_given_the_next_soon(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "HOLD_SECONDS", 0.05)
    job = bench.make_ready()
    given = bench.claim("w1").answer()
    assert given
    bench.store.complete(Holder(job.uuid, given.claim), AgentEnd(1), bench.clock.now())
    claim, following = bench.park("w1"), bench.make_ready()
    bench.dispatcher.offer([following])
    assert bench.state(following) == "ready" and claim.is_alive()
    bench.store.learn({job.uuid: JobFinding(Finding.OVER, "finished")}, bench.store.sequence(), bench.clock.now())
    assert bench.given(claim) == following.uuid


def test_claim_of_held_worker_leaves_the_job_to_another(bench: Bench, held: str) -> None:
    claim, other = bench.park(held), bench.park("good", "queue=default,extra=tag")
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert bench.given(other) == job.uuid
    assert claim.is_alive()


def test_claim_of_held_worker_without_wait_is_answered_at_once(bench: Bench, held: str) -> None:
    bench.make_ready()
    assert bench.claim(held, wait=0).answer() is None


# --- A store that fails ---


def failing(method: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The store's method, which fails so often first."""
    left = [times]
    lock = threading.Lock()

    def fail_first(*arguments: Any) -> Any:
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                raise StoreUnavailable("the disk is full")
        return method(*arguments)

    return fail_first


def test_claim_while_the_store_fails_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.store, "claim", failing(bench.store.claim, 1))
    with pytest.raises(StoreUnavailable):
        bench.claim("w1").answer()
    job = bench.make_ready()
    assert bench.given(bench.claim("w1")) == job.uuid


def test_offer_again_after_the_store_failed_serves_every_claim(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [bench.park(f"w{n}") for n in range(3)]
    jobs = [bench.make_ready() for _ in range(3)]
    monkeypatch.setattr(bench.store, "claim", failing(bench.store.claim, 1))
    with suppress(StoreUnavailable):
        bench.dispatcher.offer(jobs)
    bench.dispatcher.offer_again()
    assert {bench.given(claim) for claim in claims} == {job.uuid for job in jobs}


def test_reserve_while_the_store_fails_wakes_every_parked_claim_in_the_end(
    bench: Bench, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeBuildkite(clock=bench.clock.now) as fake:
        stack = Stack(fake.url, lambda: fake.token, "test-default", "default")
        intake = Intake(stack, Leadership(bench.store), bench.dispatcher, settings(), bench.clock.now, pytest.fail)
        uuids = {fake.add_job() for _ in range(3)}
        intake.list.run_once()
        claims = [bench.park(f"w{n}") for n in range(3)]
        monkeypatch.setattr(bench.store, "claim", failing(bench.store.claim, 1))
        monkeypatch.setattr(bench.store, "get", failing(bench.store.get, 1))
        for _ in range(3):
            for duty in intake.tasks:
                duty.run_once()
            bench.clock.advance(60)
    assert {bench.given(claim) for claim in claims} == uuids


# --- Stop ---


def test_stop_answers_all_that_wait_and_refuses_new_claims(bench: Bench, held: str) -> None:
    waiting = [bench.park("w1"), bench.park("w2", "os=linux"), bench.park(""), bench.park(held)]
    bench.dispatcher.stop()
    assert [claim.answer() for claim in waiting] == [None] * 4
    for name in ("w1", "w3", ""):
        with pytest.raises(Refusal) as refused:
            bench.claim(name).answer()
        assert (refused.value.status, refused.value.code) == (503, "stopping")
        assert refused.value.headers == {"Retry-After": "1"}


@pytest.mark.parametrize("name", ["w1", ""], ids=["with a name", "without a name"])
def test_stop_between_the_look_and_parking_is_not_missed(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = bench.store.claim

    def stopped_right_after(*arguments: Any) -> Job | None:
        found = claim(*arguments)
        bench.dispatcher.stop()
        return found

    monkeypatch.setattr(bench.store, "claim", stopped_right_after)
    assert bench.claim(name).answer() is None


# --- Who is there ---


def test_workers_tells_who_claimed_and_who_waits(bench: Bench) -> None:
    bench.make_ready()
    bench.claim("w1", "os=linux").answer()
    bench.clock.advance(5)
    bench.park("w2", "os=mac")
    bench.park("")
    now = bench.clock.now()
    assert bench.dispatcher.workers() == {
        "w1": (now - 5, Worker("w1", "session of w1", Profile.of("os=linux")), False, None),
        "w2": (now, Worker("w2", "session of w2", Profile.of("os=mac")), True, now),
    }
    assert bench.dispatcher.nameless() == [Worker("", "", Profile.of("queue=default"))]


def test_offer_to_a_worker_that_a_hold_binds_reaches_the_next(bench: Bench) -> None:
    bench.dispatcher.hold(Hold("tokens:default", "machine", "no_tokens"))
    held = bench.claim("", needs_token=True)
    bench.await_wait("")
    free = bench.park("w2", "queue=default,os=linux")
    job = bench.make_ready()
    bench.dispatcher.offer([job])
    assert bench.given(free) == job.uuid
    second = bench.make_ready()
    bench.dispatcher.offer([second])
    assert held.is_alive()
    bench.dispatcher.lift("tokens:default")
    assert bench.given(held) == second.uuid


def test_lift_of_a_hold_that_binds_others_leaves_those_who_wait(bench: Bench) -> None:
    bench.dispatcher.hold(Hold("tokens:default", "machine", "no_tokens"))
    bench.dispatcher.hold(Hold("tokens:linux", "machine", "no_tokens"))
    held = bench.claim("", needs_token=True)
    bench.await_wait("")
    bench.make_ready()
    bench.dispatcher.lift("tokens:linux")
    assert held.is_alive()


def test_forget_leaves_those_who_wait(bench: Bench) -> None:
    bench.claim("w1", wait=0).answer()
    bench.park("w2")
    bench.dispatcher.forget(bench.clock.now() + 1)
    assert list(bench.dispatcher.workers()) == ["w2"]


@sqlite_only
def test_claim_by_more_workers_than_are_remembered_forgets_those_that_were_silent_longest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WORKERS", 3)
    for name in ("w1", "w2", "w3", "w1", "w4"):
        bench.claim(name, wait=0).answer()
    assert sorted(bench.dispatcher.workers()) == ["w1", "w3", "w4"]


@sqlite_only
def test_hear_of_more_workers_than_are_remembered_keeps_those_that_claimed_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_WORKERS", 3)
    offer = {"query": "queue=default", "needs_token": False}
    workers = [{"name": f"w{number}", "at": float(number), "waits": True, **offer} for number in range(5)]
    bench.dispatcher.receive_reports([{"workers": workers, "nameless": [offer] * 5, "holds": []}])
    assert sorted(bench.dispatcher.workers()) == ["w2", "w3", "w4"]
    assert len(bench.dispatcher.nameless()) == 3


# --- All at once ---


def test_claim_by_thirty_workers_under_many_offers_hands_each_job_out_once(bench: Bench) -> None:
    chance = random.Random(300)
    rules: list[list[str]] = [[], ["os=linux"], ["os=linux", "gpu=*"], ["os=mac"]]
    queries = ["os=linux", "os=linux,gpu=a", "os=linux,gpu=b,x=1", "os=mac", "os=mac,gpu=c,os=linux"]
    given: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work(number: int) -> None:
        name = f"w{number}" if number % 3 else ""
        worker, turn = Worker(name, "s", Profile.of(queries[number % 5])), random.Random(number)
        try:
            while True:
                # Short and long waits, and clients that have hung up.
                gone = turn.random() < 0.1
                wait = turn.choice([0.0, 0.001, 0.01, LONG])
                if job := bench.dispatcher.claim(worker, wait, lambda gone=gone: gone):  # type: ignore[misc]
                    given.put(job.uuid)
                    bench.store.learn({job.uuid: JobFinding(Finding.ACQUIRED, "running")}, bench.store.sequence(), 0.0)
        except Refusal as refusal:
            assert refusal.code == "stopping"

    def offer(jobs: list[Job]) -> None:
        while jobs:
            some = [jobs.pop() for _ in range(min(len(jobs), chance.randint(1, 20)))]
            now = bench.clock.now()
            bench.store.put(some, bench.store.sequence(), now)
            uuids = [job.uuid for job in some]
            bench.dispatcher.offer(bench.store.confirm(uuids, bench.store.sequence(), now + 900, now))

    raws = [{"id": str(uuids.UUID(int=n)), "agent_query_rules": chance.choice(rules)} for n in range(300)]
    jobs = [Job.from_api("default", raw, bench.clock.now()) for raw in raws]
    workers = [threading.Thread(target=work, args=[number], daemon=True) for number in range(30)]
    intakes = [threading.Thread(target=offer, args=[jobs[part::2]], daemon=True) for part in (0, 1)]
    for thread in (*workers, *intakes):
        thread.start()
    handed_out = [given.get(timeout=PATIENCE) for _ in range(300)]
    bench.dispatcher.stop()
    for thread in (*workers, *intakes):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(handed_out) == sorted(job.uuid for job in map(bench.store.get, handed_out) if job)
    assert len(set(handed_out)) == 300
    assert given.empty()
    assert {job.claims for job in map(bench.store.get, handed_out) if job} == {1}


def test_offer_again_after_a_pause_reaches_a_worker_behind_jobs_that_nobody_parked_for(bench: Bench) -> None:
    bench.store.pause("default", True, bench.clock.now())
    for _ in range(3):
        bench.make_ready("arch=amd64", priority=9)
    wanted = bench.make_ready("arch=arm64")
    claim = bench.park("arm", "queue=default,arch=arm64")
    bench.store.pause("default", False, bench.clock.now())
    bench.dispatcher.offer_again()
    assert bench.given(claim) == wanted.uuid
