"""What the scheduler makes of hosts in trouble, unfit workers, and workers that come and go; on both stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import scheduler
from conftest import Clock
from scheduler import Finding, Hold, Holds, Settings, Store, WorkerRow
from test_api import OTHER, UUID, Bench

QUERY = "/jobs?query=queue=default"
MINUTE = 60.0


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        yield bench


def slot(name: str, host: str, session: str = "s1") -> dict[str, str]:
    return {"X-Worker-ID": name, "X-Worker-Session": session, "X-Worker-Host": host, "X-Worker-Machine": f"of-{host}"}


def uuid(number: int) -> str:
    return f"018f0000-0000-4000-8000-{number:012}"


def complete(bench: Bench, who: dict[str, str], exit_status: int, *, answered: bool = True, lasts: float = 0) -> None:
    """Whoever it is claims the next job, and its agent ends without acquiring it."""
    bench.clock.advance(0.001)
    claim = bench.claim(who)
    until = bench.clock.now() + lasts
    while bench.clock.now() < until:
        bench.clock.advance(min(20, until - bench.clock.now()))
        bench.store.touch(scheduler.Holder(claim["uuid"], claim["claim"]), bench.clock.now())
    now = bench.clock.now()
    if answered:
        bench.store.answered("default", now)
    body = {"claim": claim["claim"], "exit_status": exit_status, "free": 1000, "strays": 2}
    assert bench.call("POST", f"/jobs/{claim['uuid']}/complete", body, who).status == 200
    bench.store.confirm([claim["uuid"]], bench.store.sequence(), now + 900, now)


def fail(bench: Bench, name: str, host: str, exit_status: int = 1, **how: Any) -> None:
    complete(bench, slot(name, host), exit_status, **how)


def run_one(bench: Bench, who: dict[str, str]) -> None:
    """Its agent acquires the next job, and runs it to its end."""
    bench.clock.advance(0.001)
    claim = bench.claim(who)
    bench.learn(claim["uuid"], Finding.ACQUIRED, "running")
    bench.learn(claim["uuid"], Finding.OVER, "finished")


def quarantines(bench: Bench) -> list[Hold]:
    return [hold for hold in bench.store.rows.holds().rows if scheduler.is_quarantine(hold)]


def targets(bench: Bench) -> list[str]:
    return [hold.target for hold in quarantines(bench)]


def is_given_a_job(bench: Bench, who: dict[str, str]) -> bool:
    return bench.call("GET", QUERY, headers=who).status == 200


def see(bench: Bench, *hosts: str) -> None:
    """These hosts are there: one slot of each has asked for a job."""
    for host in hosts:
        assert bench.call("GET", QUERY, headers=slot(f"{host}-1", host)).status == 204


def worker(bench: Bench, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(w for w in bench.call("GET", "/stats").json["workers"] if w["name"] == name)
    return found


# --- Quarantine ---


def test_fail_three_times_on_three_slots_of_a_host_quarantines_it_and_no_other(bench: Bench) -> None:
    see(bench, "good", "bad", "fine")
    bench.make_ready()
    for number in (1, 2):
        fail(bench, f"bad-{number}", "bad")
    assert targets(bench) == []
    fail(bench, "bad-3", "bad")
    (hold,) = quarantines(bench)
    assert (hold.target, hold.owner, hold.reason) == ("host:bad", "machine", "quarantined")
    assert hold.until == bench.clock.now() + 5 * MINUTE
    assert hold.note == "agents of bad-1, bad-2, bad-3 ended without acquiring their jobs, 3 in a row"
    assert not is_given_a_job(bench, slot("bad-4", "bad"))
    told = worker(bench, "bad-4")
    assert told["state"] == "failing"
    assert is_given_a_job(bench, slot("good-1", "good"))


def test_fail_three_times_on_the_only_slot_of_a_host_quarantines_it(bench: Bench) -> None:
    see(bench, "good")
    bench.make_ready()
    for _ in range(3):
        assert targets(bench) == []
        bench.clock.advance(10)
        fail(bench, "bad-1", "bad")
    assert targets(bench) == ["host:bad"]


def test_fail_three_times_on_one_of_several_slots_holds_that_slot_alone(bench: Bench) -> None:
    see(bench, "good", "bad")
    bench.make_ready()
    for _ in range(4):
        bench.clock.advance(30)
        fail(bench, "bad-2", "bad")
    assert targets(bench) == []
    assert worker(bench, "bad-2")["state"] == "failing"


def test_fail_with_a_job_that_ran_between_begins_anew(bench: Bench) -> None:
    see(bench, "good")
    for number in range(1, 9):
        bench.make_ready(uuid(number))
    for number in (1, 2):
        fail(bench, f"bad-{number}", "bad")
    run_one(bench, slot("bad-3", "bad"))
    fail(bench, "bad-4", "bad")
    assert targets(bench) == []
    for number in (5, 6):
        fail(bench, f"bad-{number}", "bad")
    assert targets(bench) == ["host:bad"]


def test_fail_at_long_intervals_is_not_in_a_row(bench: Bench) -> None:
    see(bench, "good")
    bench.make_ready()
    for number in (1, 2, 3):
        bench.clock.advance(6 * MINUTE)
        fail(bench, f"bad-{number}", "bad")
    assert targets(bench) == []


@pytest.mark.parametrize(
    ("exit_status", "answered"),
    [(27, True), (0, True), (1, False)],
    ids=["rejected", "buildkite answered 404, 409, 429 or 5xx", "buildkite did not answer us either"],
)
def test_end_an_agent_by_what_is_not_its_hosts_fault_never_counts(
    bench: Bench, exit_status: int, answered: bool
) -> None:
    see(bench, "good")
    for number in range(9):
        bench.clock.advance(20)
        bench.make_ready(uuid(number))
        fail(bench, f"bad-{number}", "bad", exit_status, answered=answered, lasts=60)
    assert targets(bench) == []
    assert all(row.faults == 0 for row in bench.store.workers())


def test_end_agents_sooner_than_buildkite_is_asked_again_quarantines_their_host_all_the_same(bench: Bench) -> None:
    see(bench, "good")
    bench.make_ready()
    for _ in range(3):
        assert targets(bench) == []
        bench.clock.advance(10)
        fail(bench, "bad-1", "bad", answered=False, lasts=0.05)
    assert targets(bench) == ["host:bad"]


def test_fail_holds_the_worker_until_buildkite_has_said_that_no_agent_had_the_job(bench: Bench) -> None:
    for number in range(1, 4):
        bench.make_ready(uuid(number))
    who = slot("bad-1", "bad")
    claim = bench.claim(who)
    body = {"claim": claim["claim"], "exit_status": 1, "free": 1000, "strays": 0}
    assert bench.call("POST", f"/jobs/{claim['uuid']}/complete", body, who).status == 200
    ended_at = scheduler.rfc3339(bench.clock.now())
    for seconds in (0, 9):
        bench.clock.advance(seconds)
        assert not is_given_a_job(bench, who)
        (told,) = bench.call("GET", "/fleet").json["hosts"][0]["workers"]
        assert (told["state"], told["holds"][0]["since"]) == ("failing", ended_at)
    now = bench.clock.now()
    bench.store.confirm([claim["uuid"]], bench.store.sequence(), now + 900, now)
    bench.clock.advance(1.9)
    assert not is_given_a_job(bench, who)
    bench.clock.advance(0.1)
    assert is_given_a_job(bench, who)


def test_lose_the_answers_to_claims_never_counts(bench: Bench) -> None:
    see(bench, "good")
    bench.make_ready()
    for number in range(5):
        bench.claim(slot(f"bad-{number}", "bad"))
        bench.clock.advance(31)
        now = bench.clock.now()
        bench.store.answered("default", now)
        bench.store.expire(["default"], now)
        bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    assert targets(bench) == []


def test_fail_a_job_after_its_agent_has_acquired_it_never_counts(bench: Bench) -> None:
    see(bench, "good")
    for number in range(1, 6):
        bench.make_ready(uuid(number))
        who = slot(f"bad-{number}", "bad")
        claim = bench.claim(who)
        bench.learn(claim["uuid"], Finding.ACQUIRED, "running")
        body = {"claim": claim["claim"], "exit_status": 1}
        assert bench.call("POST", f"/jobs/{claim['uuid']}/complete", body, who).status == 200
        bench.learn(claim["uuid"], Finding.OVER, "failed")
    assert targets(bench) == []


def test_fail_on_more_than_a_fifth_of_all_hosts_quarantines_none_and_is_the_first_problem(bench: Bench) -> None:
    see(bench, *(f"host{number}" for number in range(6)))
    bench.make_ready(rules=("=nonsense",))  # another problem, which is told before by the alphabet and by its place
    bench.make_ready(OTHER)
    for number in (1, 2, 3):
        fail(bench, f"bad-{number}", "bad")
    assert targets(bench) == ["host:bad"]
    bench.clock.advance(2)
    assert "agents_cannot_acquire" not in str(bench.call("GET", "/health").json["problems"])
    fail(bench, "host0-1", "host0")
    assert targets(bench) == []
    bench.clock.advance(2)
    problems = bench.call("GET", "/health").json["problems"]
    assert problems[0].startswith("agents_cannot_acquire: on 2 of 7 hosts agents ended within the last 10 min")
    assert len(problems) == 2
    assert bench.call("GET", "/fleet").json["problems"] == problems
    bench.clock.advance(10 * MINUTE)
    assert "agents_cannot_acquire" not in str(bench.call("GET", "/health").json["problems"])


def test_fail_on_a_fifth_of_all_hosts_quarantines_each(bench: Bench) -> None:
    see(bench, *(f"host{number}" for number in range(8)))
    for number in range(1, 4):
        bench.make_ready(uuid(number))
    for host in ("bad", "worse"):
        for number in (1, 2, 3):
            fail(bench, f"{host}-{number}", host)
    assert targets(bench) == ["host:bad", "host:worse"]


def quarantined(bench: Bench) -> float:
    """Quarantine a host with four slots; when that ends."""
    see(bench, "good")
    for number in range(1, 9):
        bench.make_ready(uuid(number))
    for number in (1, 2, 3):
        fail(bench, f"bad-{number}", "bad")
    until = quarantines(bench)[0].until
    assert until is not None
    return until


def test_wait_for_the_end_of_a_quarantine_lets_one_claim_try_and_holds_the_others_for_twice_as_long(
    bench: Bench,
) -> None:
    until, seconds = quarantined(bench), []
    for _ in range(6):
        bench.clock.advance(until - bench.clock.now() - 1)
        bench.dispatcher.follow_holds()
        assert not is_given_a_job(bench, slot("bad-4", "bad"))
        bench.clock.advance(1)
        bench.dispatcher.follow_holds()
        began_at = bench.clock.now()
        fail(bench, "bad-4", "bad")
        assert not is_given_a_job(bench, slot("bad-5", "bad"))
        (hold,) = quarantines(bench)
        until = hold.until or 0.0
        seconds.append(round(until - began_at))
    assert seconds == [600, 1200, 2400, 3600, 3600, 3600]


def test_try_after_a_quarantine_and_acquire_ends_it_and_what_was_held_against_the_slots(bench: Bench) -> None:
    bench.clock.advance(quarantined(bench) - bench.clock.now())
    claim = bench.claim(slot("bad-4", "bad"))
    assert not is_given_a_job(bench, slot("bad-1", "bad")), "one claim tries"
    bench.learn(claim["uuid"], Finding.ACQUIRED, "running")
    assert targets(bench) == []
    assert is_given_a_job(bench, slot("bad-1", "bad"))
    assert [(row.faults, row.failures, row.held_until) for row in bench.store.workers()] == [(0, 0, 0.0)] * 5
    fail(bench, "bad-2", "bad")
    assert targets(bench) == [], "the next failure is the first of three"


def test_acquire_a_job_that_was_claimed_before_the_quarantine_does_not_end_it(bench: Bench) -> None:
    for number in range(1, 9):
        bench.make_ready(uuid(number))
    before = bench.claim(slot("bad-9", "bad"))
    for number in (1, 2, 3):
        fail(bench, f"bad-{number}", "bad")
    assert targets(bench) == ["host:bad"]
    bench.learn(before["uuid"], Finding.ACQUIRED, "running")
    assert targets(bench) == ["host:bad"]


def test_resume_a_quarantined_host_needs_quarantine_and_gives_it_jobs_at_once(bench: Bench) -> None:
    quarantined(bench)
    assert bench.call("DELETE", "/holds/host:bad").refusal == (409, "still_held")
    reply = bench.call("DELETE", "/holds/host:bad?quarantine=1")
    assert reply.status == 200 and "host:bad was quarantined by the machine" in reply.json["message"]
    assert targets(bench) == []
    assert is_given_a_job(bench, slot("bad-4", "bad"))
    assert bench.store.acts(1)[0].target == "host:bad"


def test_pause_by_a_person_is_not_ended_by_the_machine(bench: Bench) -> None:
    assert bench.call("GET", QUERY, headers=slot("bad-4", "bad")).status == 204
    until = quarantined(bench)
    assert bench.call("POST", "/holds", {"target": "host:bad", "note": "disk swap"}).status == 200
    bench.clock.advance(until - bench.clock.now())
    bench.dispatcher.follow_holds()
    assert not is_given_a_job(bench, slot("bad-4", "bad"))
    assert worker(bench, "bad-4")["state"] == "paused"


def test_forget_a_quarantine_that_nobody_tries_to_end_after_a_day(bench: Bench) -> None:
    bench.clock.advance(quarantined(bench) - bench.clock.now())
    bench.store.end_holds(bench.clock.now() + 86399)
    assert targets(bench) == ["host:bad"]
    bench.store.end_holds(bench.clock.now() + 86400)
    assert targets(bench) == []


def test_judge_hosts_without_names_quarantines_none() -> None:
    now = 1000.0
    rows = [WorkerRow(f"w{n}", faults=3, fault_at=now, heard_at=now) for n in range(2)]
    others = [WorkerRow(f"x{n}", heard_at=now) for n in range(20)]
    assert scheduler.quarantine_changes(scheduler.find_host_failures(rows + others, now), Holds(1, ()), now) == ([], [])


# --- Unfit workers ---


def tell(bench: Bench, who: dict[str, str], state: str, reason: str = "", **more: str) -> Any:
    reply = bench.call("POST", f"/workers/{who['X-Worker-ID']}", {"state": state, "reason": reason, **more}, who)
    assert reply.status == 200
    return reply.json


def test_tell_of_being_unfit_is_why_jobs_wait_and_names_the_host_and_what_is_free(bench: Bench) -> None:
    who = slot("a-1", "a")
    bench.call("GET", QUERY, headers=who)
    tell(bench, who, "unfit", "/builds has 3 MiB free, less than WORKER_MIN_FREE (1.0 GiB)")
    bench.make_ready()
    told = bench.call("GET", f"/jobs/{UUID}").json
    assert told["why"] == "workers_unfit"
    text = "all matching workers are unfit: 1; a-1 on a: /builds has 3 MiB free, less than WORKER_MIN_FREE (1.0 GiB)"
    assert told["why_text"] == text
    assert worker(bench, "a-1")["state"] == "unfit"
    # It claims again, so it is fit.
    assert is_given_a_job(bench, who)
    assert worker(bench, "a-1")["state"] == "working"


def test_tell_of_being_unfit_before_any_claim_makes_the_worker_known_with_what_it_can_run(bench: Bench) -> None:
    who = slot("a-1", "a")
    path, body = "/workers/a-1", {"state": "unfit", "reason": "no serial line"}
    assert bench.call("POST", path, body, who).refusal == (404, "unknown_worker")
    refused = bench.call("POST", path, body | {"query": "queue=a,queue=b"}, who)
    assert refused.refusal == (400, "bad_query")
    tell(bench, who, "unfit", "no serial line", query="queue=default,board=rpi4")
    bench.make_ready(rules=("board=rpi4",))
    told = bench.call("GET", f"/jobs/{UUID}").json
    assert (told["why"], told["why_text"]) == (
        "workers_unfit",
        "all matching workers are unfit: 1; a-1 on a: no serial line",
    )
    other = slot("a-1", "elsewhere", "s2")
    reply = bench.call("POST", path, body | {"query": "queue=default"}, other)
    assert reply.refusal == (409, "worker_name_taken"), "the name has an owner now"
    assert bench.call("GET", f"{QUERY},board=rpi4", headers=who).status == 200
    assert worker(bench, "a-1")["state"] == "working"


def test_release_a_job_as_unfit_is_no_attempt_and_blames_nobody(bench: Bench) -> None:
    bench.make_ready()
    who = slot("a-1", "a")
    claim = bench.claim(who)["claim"]
    bench.clock.advance(1000)  # as if it had had all its time
    bench.store.touch(scheduler.Holder(UUID, claim), bench.clock.now())
    bench.store.answered("default", bench.clock.now())
    body = {"claim": claim, "reason": "the host is unfit: no space", "code": "unfit"}
    assert bench.call("POST", f"/jobs/{UUID}/release", body, who).status == 200
    job = bench.store.get(UUID)
    assert job and (job.attempts, job.tries[-1]["code"], job.tries[-1]["counted"]) == (0, "unfit", False)
    now = bench.clock.now()
    bench.store.confirm([UUID], bench.store.sequence(), now + 900, now)
    (row,) = bench.store.workers()
    assert (row.failures, row.held_until) == (0, 0.0)


def test_tell_that_a_person_must_look_is_a_hold_of_the_machine_until_an_operator_resumes(bench: Bench) -> None:
    who = slot("a-1", "a")
    bench.call("GET", QUERY, headers=who)
    assert tell(bench, who, "unfit", "no serial line", held="7c1f0e2a") == {"name": "a-1"}
    (told,) = bench.call("GET", "/fleet").json["hosts"][0]["workers"]
    assert (told["state"], told["reason"]) == ("unfit", "no serial line")
    assert [(h["target"], h["owner"], h["reason"], h["note"]) for h in told["holds"]] == [
        ("worker:a-1", "machine", "workers_unfit", "no serial line")
    ]
    bench.call("DELETE", "/holds/worker:a-1")  # without quarantine: what operators set
    assert tell(bench, who, "unfit", "no serial line", held="7c1f0e2a") == {"name": "a-1"}
    assert bench.call("DELETE", "/holds/host:a?quarantine=1").status == 200
    assert tell(bench, who, "unfit", "no serial line", held="7c1f0e2a") == {"name": "a-1", "resumed": "7c1f0e2a"}
    # Found again: another run, which nobody has resumed yet.
    tell(bench, who, "unfit", "no serial line", held="00c0ffee")
    (told,) = bench.call("GET", "/fleet").json["hosts"][0]["workers"]
    assert told["holds"] != []
    tell(bench, who, "idle")
    bench.clock.advance(10)
    (told,) = bench.call("GET", "/fleet").json["hosts"][0]["workers"]
    assert told["holds"] == []


# --- Workers that go ---


def test_silence_of_two_minutes_is_offline_since_when_and_with_its_last_words(bench: Bench) -> None:
    who = slot("a-1", "a")
    bench.call("GET", QUERY, headers=who)
    bench.clock.advance(10)
    tell(bench, who, "stopped", "the worker was stopped")
    told_at = scheduler.rfc3339(bench.clock.now())
    bench.clock.advance(119)
    assert worker(bench, "a-1")["state"] == "away"
    bench.clock.advance(1)
    (told,) = bench.call("GET", "/fleet").json["hosts"][0]["workers"]
    assert (told["state"], told["since"], told["reason"]) == ("offline", told_at, "the worker was stopped")
    counts = bench.call("GET", "/fleet").json["counts"]["workers"]
    assert (counts["offline"], counts["away"]) == (1, 0)
    assert 'stack_workers{state="offline"} 1.0' in bench.call("GET", "/metrics").text.decode()
    assert bench.call("GET", QUERY, headers=who).status == 204
    assert worker(bench, "a-1")["state"] == "away"


def test_wait_for_workers_that_are_offline_says_how_many_match_and_since_when(bench: Bench) -> None:
    for name in ("a-1", "b-1"):
        bench.call("GET", QUERY, headers=slot(name, name[0]))
        bench.clock.advance(1)
    bench.make_ready()
    bench.clock.advance(120)
    told = bench.call("GET", f"/jobs/{UUID}").json
    since = scheduler.rfc3339_seconds(bench.clock.now() - 121)
    assert (told["why"], told["why_text"]) == (
        "workers_offline",
        f"2 workers match, both offline since {since}; the last was b-1 on b",
    )
    metrics = bench.call("GET", "/metrics").text.decode()
    assert 'stack_unmatched_jobs{queue="default",rules="queue=default"} 1.0' in metrics


def test_silence_since_the_start_of_a_scheduler_is_offline_only_after_two_minutes_of_it(
    bench: Bench, settings: Callable[..., Settings]
) -> None:
    bench.call("GET", QUERY, headers=slot("a-1", "a"))
    bench.clock.advance(5000)
    fresh = scheduler.Dispatcher(bench.store, bench.clock.now)
    assert [m.doing for m in scheduler.Fleet(bench.store, fresh, bench.clock.now()).members] == ["away"]
    bench.clock.advance(120)
    fleet = scheduler.Fleet(bench.store, fresh, bench.clock.now())
    assert [m.doing for m in fleet.members] == ["offline"]
    # What it offers is still known, though it has not claimed here.
    rules = scheduler.RuleSet.of("default", ())
    assert fleet.why(rules, True).why == "workers_offline"


def test_silence_of_a_worker_with_a_job_that_it_touched_is_offline_and_of_one_that_never_did_is_not(
    bench: Bench,
) -> None:
    bench.make_ready()
    bench.make_ready(OTHER)
    touching, other = slot("a-1", "a"), slot("b-1", "b")
    claim = bench.claim(touching)
    bench.claim(other)
    for each in (UUID, OTHER):
        bench.learn(each, Finding.ACQUIRED, "running")
    bench.store.touch(scheduler.Holder(claim["uuid"], claim["claim"]), bench.clock.now())
    bench.clock.advance(121)
    assert (worker(bench, "a-1")["state"], worker(bench, "b-1")["state"]) == ("offline", "working")


def test_say_goodbye_is_forgotten_at_once_and_gives_back_what_was_never_started(bench: Bench) -> None:
    who = slot("a-1", "a")
    bench.make_ready()
    bench.claim(who)
    tell(bench, who, "gone")
    assert bench.call("GET", "/stats").json["workers"] == []
    assert bench.state() == "reserving"
    job = bench.store.get(UUID)
    assert job and job.attempts == 0 and "its worker has ended" in job.reason
    assert bench.call("POST", "/workers/a-1", {"state": "gone"}, who).refusal == (404, "unknown_worker")


def test_say_goodbye_of_another_session_is_refused_and_changes_nothing(bench: Bench) -> None:
    bench.make_ready()
    bench.claim(slot("a-1", "a"))
    old = slot("a-1", "elsewhere", "s0")
    assert bench.call("POST", "/workers/a-1", {"state": "gone"}, old).refusal == (409, "worker_name_taken")
    assert bench.state() == "leased"
    assert worker(bench, "a-1")["state"] == "working"


def test_forget_workers_after_seven_days_of_silence(bench: Bench) -> None:
    bench.call("GET", QUERY, headers=slot("a-1", "a"))
    day = 86400.0
    bench.store.prune(bench.clock.now() + 7 * day - day)
    assert len(bench.store.workers()) == 1
    bench.store.prune(bench.clock.now() + 7 * day - day + 1)
    assert bench.store.workers() == []


# --- What hosts tell after their jobs ---


def test_complete_tells_how_a_job_left_its_host_in_stats_and_metrics(bench: Bench) -> None:
    bench.make_ready()
    for _ in range(2):
        bench.clock.advance(400)
        complete(bench, slot("a-1", "a"), 27, lasts=200)
    bench.clock.advance(30)
    told = worker(bench, "a-1")
    assert (told["free_bytes"], told["strays"], told["idle_seconds"]) == (1000, 4, 30.0)
    metrics = bench.call("GET", "/metrics").text.decode()
    for line in ('stack_host_free_bytes{host="a"} 1000.0', 'stack_host_strays_total{host="a"} 4.0'):
        assert line in metrics
    assert re.search(r'^stack_host_idle_seconds\{host="a"\} 30.0$', metrics, re.MULTILINE)


@pytest.mark.parametrize(
    "figures", [{}, {"free": None}, {"free": "much", "strays": "none"}, {"free": -1, "strays": -5}]
)
def test_complete_with_figures_that_are_none_is_taken_without_them(bench: Bench, figures: dict[str, Any]) -> None:
    bench.make_ready()
    who = slot("a-1", "a")
    claim = bench.claim(who)["claim"]
    body = {"claim": claim, "exit_status": 0} | figures
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, who).status == 200
    told = worker(bench, "a-1")
    assert (told["free_bytes"] or 0, told["strays"]) == (0, 0)


def test_idle_of_a_host_counts_from_the_end_of_a_job_and_from_a_restart(bench: Bench) -> None:
    bench.make_ready()
    who = slot("a-1", "a")
    claim = bench.claim(who)
    bench.learn(claim["uuid"], Finding.ACQUIRED, "running")
    bench.clock.advance(7200)
    body = {"claim": claim["claim"], "exit_status": 0, "free": 1000, "strays": 0}
    assert bench.call("POST", f"/jobs/{UUID}/complete", body, who).status == 200
    bench.learn(UUID, Finding.OVER, "finished")
    bench.clock.advance(60)
    assert bench.call("GET", "/stats").json["hosts"] == [{"host": "a", "idle_seconds": 60.0}]
    bench.clock.advance(7200)
    assert bench.call("GET", QUERY, headers=slot("a-1", "a", "s2")).status == 204
    bench.clock.advance(5)
    assert bench.call("GET", "/stats").json["hosts"] == [{"host": "a", "idle_seconds": 5.0}]
    bench.clock.advance(200)
    assert bench.call("GET", "/stats").json["hosts"] == [], "of hosts that are offline nothing is told"


def test_wait_tells_by_rules_how_many_jobs_no_live_worker_matches_whatever_holds_them(bench: Bench) -> None:
    see(bench, "a")
    bench.make_ready(uuid(1), rules=("queue=default", "gpu=a100"))
    bench.make_ready(uuid(2), rules=("queue=default", "gpu=a100"))
    bench.make_ready(uuid(3))
    assert bench.call("GET", "/stats").json["unmatched"] == {"queue=default,gpu=a100": 2}
    assert bench.call("POST", "/holds", {"target": "queue:default", "note": "moving"}).status == 200
    assert bench.call("GET", "/stats").json["unmatched"] == {"queue=default,gpu=a100": 2}
    bench.clock.advance(31)
    assert bench.call("GET", "/stats").json["unmatched"] == {"queue=default,gpu=a100": 2, "queue=default": 1}


def test_idle_of_a_host_is_nothing_while_a_slot_of_it_has_a_job(bench: Bench) -> None:
    see(bench, "a")
    bench.make_ready()
    bench.claim(slot("a-2", "a"))
    bench.clock.advance(50)
    assert 'stack_host_idle_seconds{host="a"} 0.0' in bench.call("GET", "/metrics").text.decode()
