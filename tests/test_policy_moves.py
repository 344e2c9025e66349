"""What a policy decides, as moves of rows: without any store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scheduler
from scheduler import Decision, Finding, Frozen, Job, JobFinding, JobState, Move, Outcome, RuleSet
from test_moves import (
    DONE,
    LEASE,
    LEASED,
    MAX_ATTEMPTS,
    NOW,
    READY,
    RESERVING,
    ROW,
    RUNNING,
    W1,
    WORD,
    by_operator,
    in_state,
    made,
)

V1, V2 = "a" * 12, "b" * 12
KNOWN = {"parallel_job": 1, "retry_count": 2, "chain": "c" * 32}
RUN = Decision("run")
UNDECIDED = {"held_by": "policy", "held_reason": "undecided", "policy_step": "ask", "policy_step_at": 0.0}


def undecided() -> Job:
    """A job that Buildkite has confirmed while a policy is in force."""
    return made(scheduler.confirm(in_state(RESERVING), None, NOW + 900, MAX_ATTEMPTS, NOW, V1)).job


def decided(decision: Decision, job: Job | None = None, policy: str = V1, now: float = NOW) -> Job:
    return made(scheduler.decide(job or undecided(), decision, policy, KNOWN, now)).job


def failed(job: Job | None = None, policy: str = V1, now: float = NOW) -> Job:
    return made(scheduler.fail_to_decide(job or undecided(), "KeyError at policy.py:2", policy, 1.0, now)).job


def confirmed(job: Job, policy: str | None, now: float = NOW) -> Job:
    return made(scheduler.confirm(job, None, now + 900, MAX_ATTEMPTS, now, policy)).job


def has(job: Job, **fields: Any) -> bool:
    return {name: getattr(job, name) for name in fields} == fields


def lapsed(job: Job) -> Job:
    return made(scheduler.learn(job, None, JobFinding(Finding.LAPSED, "scheduled"), NOW)).job


# -- what it has not decided


def test_confirm_with_a_policy_holds_the_job_until_it_is_decided() -> None:
    assert has(undecided(), state=READY, decision=None, **UNDECIDED)
    # Also one that another scheduler, without the policy, had confirmed before.
    move = made(scheduler.confirm(in_state(READY), None, NOW + 900, MAX_ATTEMPTS, NOW, V1))
    assert (move.verb, move.code) == ("review", "undecided")
    assert has(move.job, state=READY, **UNDECIDED)
    assert has(confirmed(in_state(RESERVING), None), held_by=None, policy_step=None)


@pytest.mark.parametrize("state", [RESERVING, LEASED, RUNNING, DONE])
def test_decide_a_job_that_is_not_ready_changes_nothing(state: JobState) -> None:
    assert scheduler.decide(in_state(state), RUN, V1, KNOWN, NOW) is None
    assert scheduler.fail_to_decide(in_state(state), "x", V1, 1.0, NOW) is None
    assert scheduler.review(in_state(state), V1, NOW) is None


def test_decide_a_job_that_people_have_let_pass_or_stopped_or_that_others_hold_changes_nothing() -> None:
    allowed = made(scheduler.allow(undecided(), WORD)).job
    assert has(allowed, held_by=None, policy_step=None)
    stopped = made(scheduler.stop(undecided(), WORD)).job
    frozen = dataclasses.replace(undecided(), held_by="freeze", held_reason="frozen")
    for job in (allowed, stopped, frozen):
        assert scheduler.decide(job, Decision("refuse", "no"), V1, KNOWN, NOW) is None
        assert scheduler.fail_to_decide(job, "x", V1, 1.0, NOW) is None
    # And it is not held again.
    assert confirmed(lapsed(allowed), V1).held_by is None


# -- what it decides


def test_decide_run_frees_the_job_with_its_rules_and_our_priority() -> None:
    job = decided(Decision("run", "", 20.0, ("trust=low",), ("host=a",), 7))
    assert has(job, state=READY, held_by=None, priority=7, listed_priority=0, **KNOWN)
    assert has(job, policy_step="end_avoid", policy_step_at=NOW + 20)
    assert job.rule_set == "queue=default,os=linux,+trust=low,-host=a"
    assert job.agent_query_rules == ("os=linux",)
    assert job.decision
    assert (job.decision["verb"], job.decision["policy"], job.decision["at"]) == ("run", V1, NOW)
    # Another decision takes the place of all that.
    again = decided(RUN, dataclasses.replace(job, policy_step="ask"), V2)
    assert has(again, priority=0, rule_set="queue=default,os=linux", policy_step=None, policy_step_at=None)


LED = decided(Decision("run", "", 20.0, require=("trust=low",), avoid=("host=a",), priority=7))


@pytest.mark.parametrize(
    "later",
    [
        lambda: decided(Decision("hold", "later", 30.0), LED, V2),
        lambda: failed(LED, V2),
        lambda: made(scheduler.review(failed(LED, V2), None, NOW)).job,
    ],
    ids=["hold", "failed", "policy off"],
)
def test_decide_anew_takes_back_the_rules_and_the_priority_of_the_decision_before(later: Callable[[], Job]) -> None:
    before, after = undecided(), later()
    assert (LED.priority, RuleSet.read(LED.rule_set).is_by_policy) == (7, True)
    assert has(after, rule_set=before.rule_set, priority=before.priority)
    again = decided(RUN, after, V2) if after.held_by else after
    assert has(again, rule_set=before.rule_set, priority=before.priority, held_by=None)


def test_decide_run_of_a_job_that_an_operator_put_first_leaves_it_first() -> None:
    first = made(scheduler.first(undecided(), WORD)).job
    job = decided(Decision("run", priority=7), first)
    assert (job.priority, job.listed_priority) == (first.priority, 0)
    # The other way round Buildkite's own priority stays known too.
    assert made(scheduler.first(decided(Decision("run", priority=7)), WORD)).job.listed_priority == 0


def test_put_of_another_priority_leaves_ours_and_remembers_buildkites() -> None:
    job = made(scheduler.expire(decided(Decision("run", priority=7)), NOW, NOW + 1000)).job
    listed = dataclasses.replace(in_state(RESERVING), priority=3)
    job = made(scheduler.put(job, listed, job.version, NOW)).job
    assert (job.priority, job.listed_priority) == (7, 3)
    assert decided(RUN, confirmed(job, V1)).priority == 3


def test_end_avoid_before_its_time_changes_nothing_and_then_lets_all_have_the_job() -> None:
    job = decided(Decision("run", "", 20.0, ("gpu=*",), ("host=a",)))
    assert scheduler.end_avoid(job, NOW + 19) is None
    after = made(scheduler.end_avoid(job, NOW + 20)).job
    assert has(after, rule_set="queue=default,os=linux,+gpu=*", policy_step=None)
    assert scheduler.end_avoid(after, NOW + 20) is None


def test_decide_hold_holds_the_job_until_it_is_asked_about_again() -> None:
    job = decided(Decision("hold", "zone b is empty", 30.0))
    assert has(job, state=READY, held_by="policy", held_reason="held_by_policy", held_until=NOW + 30)
    assert has(job, policy_step="ask", policy_step_at=NOW + 30)
    # Nothing but a word of the policy ends it, whatever happens meanwhile.
    for now in (NOW + 1, NOW + 31):
        assert confirmed(lapsed(job), V1, now).held_by == "policy"
        assert confirmed(job, V1, now).held_by == "policy"
        assert scheduler.review(job, V1, now) is None
    again = decided(Decision("hold", "still", 30.0), job, now=NOW + 31)
    assert again.decision and again.decision["held_since"] == NOW
    assert decided(RUN, again).held_by is None


@pytest.mark.parametrize(
    ("verb", "status", "outcome"), [("refuse", -1, Outcome.REFUSED), ("succeed", 0, Outcome.SUCCEEDED)]
)
def test_decide_to_end_a_job_writes_an_intent_that_is_kept_until_buildkite_has_heard(
    verb: str, status: int, outcome: Outcome
) -> None:
    job = decided(Decision(verb, "not here"))
    assert has(job, state=RESERVING, finish_detail="not here", held_by=None)
    assert scheduler.finish_status(job) == status
    assert scheduler.confirm(job, None, NOW + 900, MAX_ATTEMPTS, NOW, V1) is None
    assert has(made(scheduler.finish(job, NOW)).job, state=DONE, outcome=outcome)
    # Its answer was lost.
    assert made(scheduler.learn(job, None, JobFinding(Finding.OVER, "finished"), NOW)).job.outcome is outcome
    # An operator has the last word.
    stopped = made(scheduler.stop(job, WORD)).job
    assert (scheduler.finish_status(stopped), made(scheduler.finish(stopped, NOW)).job.outcome) == (-1, "stopped")


def test_decide_to_end_a_job_that_an_agent_got_asks_again_should_it_come_back() -> None:
    job = made(
        scheduler.learn(decided(Decision("refuse", "no")), None, JobFinding(Finding.ACQUIRED, "running"), NOW)
    ).job
    assert has(job, state=RUNNING, finish_detail=None)
    back = made(scheduler.put(job, in_state(RESERVING), job.version, NOW)).job
    assert has(confirmed(back, V1), decision=None, **UNDECIDED)


def test_put_again_of_a_job_that_was_over_asks_again() -> None:
    done = made(scheduler.learn(decided(RUN), None, JobFinding(Finding.GONE, "limited"), NOW)).job
    again = made(scheduler.put(done, in_state(RESERVING), done.version, NOW)).job
    assert has(again, decision=None, policy_step=None)
    assert has(confirmed(again, V1), **UNDECIDED)


# -- where it fails


def test_fail_to_decide_holds_the_job_for_a_minute_and_then_longer_up_to_an_hour() -> None:
    job, now, pauses = undecided(), NOW, []
    for _ in range(9):
        job = failed(job, now=now)
        assert has(job, held_by="policy", held_reason="policy_failed", policy_step="ask_again")
        assert job.held_until == job.policy_step_at
        pauses.append((job.held_until or 0) - now)
        now = job.held_until or 0.0
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert job.decision and job.decision["failures"] == 9
    assert job.decision["reason"] == "KeyError at policy.py:2"
    # Another version of the policy begins anew.
    assert (failed(job, V2, now).held_until or 0) - now == 60
    assert decided(RUN, job).held_by is None


def test_review_of_a_job_that_others_hold_asks_nothing_until_their_hold_is_over() -> None:
    held = ("held_by", "held_reason", "held_until", "policy_step", "policy_step_at", "decision")
    for job in (undecided(), decided(Decision("hold", "x", 30.0)), failed(failed())):
        frozen = dataclasses.replace(job, held_by="freeze", held_reason="frozen", held_until=NOW + 60)
        after = made(scheduler.review(frozen, V1, NOW)).job
        assert has(after, held_by="freeze", policy_step=None)
        assert scheduler.review(after, V1, NOW) is None
        # What the policy said before stands, to its own time.
        thawed = dataclasses.replace(after, **scheduler.NOT_HELD)
        assert has(made(scheduler.review(thawed, V1, NOW)).job, **{name: getattr(job, name) for name in held})
        later = made(scheduler.review(thawed, V2, NOW)).job
        assert has(later, held_by="policy", decision=job.decision, policy_step="ask", policy_step_at=0.0)
    # What it let run is not asked about again, and what it avoids is avoided for its time.
    avoids = decided(Decision("run", "", 20.0, avoid=("host=a",)))
    frozen = dataclasses.replace(avoids, held_by="freeze", held_reason="frozen", held_until=NOW + 60)
    assert scheduler.review(frozen, V1, NOW) is None
    assert "-host=a" not in made(scheduler.end_avoid(frozen, NOW + 20)).job.rule_set
    assert scheduler.review(decided(RUN), V1, NOW) is None


# -- when the policy changes


@pytest.mark.parametrize(
    "job",
    [
        decided(RUN),
        decided(Decision("run", "", 20.0, avoid=("host=a",))),
        decided(Decision("hold", "x", 30.0)),
        failed(),
    ],
    ids=["runs", "avoids", "held", "failed"],
)
def test_review_with_another_version_asks_again_and_leaves_the_decision_until_then(job: Job) -> None:
    assert scheduler.review(job, V1, NOW) is None
    move = made(scheduler.review(job, V2, NOW))
    assert has(move.job, policy_step="ask", policy_step_at=0.0)
    same = ("held_by", "held_reason", "held_until", "decision", "rule_set", "priority")
    assert has(move.job, **{name: getattr(job, name) for name in same})
    assert scheduler.review(move.job, V2, NOW) is None
    # A restart meanwhile changes none of it.
    assert has(confirmed(lapsed(job), V2), policy_step="ask", **{name: getattr(job, name) for name in same})


def test_review_without_a_policy_frees_what_waits_for_its_word_and_no_more() -> None:
    for waits in (undecided(), failed()):
        move = made(scheduler.review(waits, None, NOW))
        assert (move.code, move.is_state_change) == ("freed", True)
        assert has(move.job, held_by=None, held_until=None, policy_step=None, decision=None)
        assert has(confirmed(lapsed(waits), None), held_by=None)
    held = decided(Decision("hold", "x", 30.0))
    assert scheduler.review(held, None, NOW + 29) is None
    assert made(scheduler.review(held, None, NOW + 30)).job.held_by is None
    # And what ran so is asked about once there is a policy again.
    freed = made(scheduler.review(undecided(), None, NOW)).job
    assert has(made(scheduler.review(freed, V1, NOW)).job, **UNDECIDED)


def test_review_without_a_policy_of_a_job_that_was_to_be_asked_again_keeps_what_was_said() -> None:
    avoids = made(scheduler.review(decided(Decision("run", "", 20.0, avoid=("host=a",))), V2, NOW)).job
    kept = made(scheduler.review(avoids, None, NOW)).job
    assert has(kept, policy_step="end_avoid", policy_step_at=NOW + 20, rule_set="queue=default,os=linux,-host=a")
    runs = made(scheduler.review(decided(RUN), V2, NOW)).job
    assert has(made(scheduler.review(runs, None, NOW)).job, policy_step=None)


def test_allow_lets_workers_that_are_avoided_have_the_job_and_keeps_added_rules() -> None:
    job = made(scheduler.allow(decided(Decision("run", "", 20.0, ("trust=low",), ("host=a",))), WORD)).job
    assert has(job, rule_set="allow:queue=default,os=linux,+trust=low", policy_step=None)


# -- any sequence


class World:
    """One job, a policy that comes, goes and changes, and what it said last."""

    def __init__(self) -> None:
        self.now = NOW
        self.policy: str | None = None
        self.job = in_state(RESERVING)
        #: The job was made ready, or reviewed, with a policy since the last time that there was none.
        self.is_gated = False

    def apply(self, move: Move | None) -> None:
        if move is None:
            return
        before, self.job = self.job, move.job
        if move.verb in ("confirm", "review", "freeze", "thaw") and move.code != "avoid_over":
            self.is_gated = self.policy is not None
        self.check(before)

    def check(self, before: Job) -> None:
        job = self.job
        is_free = job.state is READY and not job.held_by
        if is_free and self.is_gated and not job.allow:
            assert job.decision and job.decision["verb"] == "run"
        # Whatever waits for the policy is found by its duties.
        assert (job.held_by == "policy" and job.state is READY) <= (job.policy_step in ("ask", "ask_again"))
        assert bool(RuleSet.read(job.rule_set).avoided and job.state is READY) <= bool(job.policy_step)
        assert not (job.finish_detail and job.state in (READY, LEASED, RUNNING))
        assert before.allow in (None, job.allow) and before.stop in (None, job.stop)
        if job.outcome is Outcome.SUCCEEDED:
            assert job.decision and job.decision["verb"] == "succeed" and not job.stop

    def claim(self) -> None:
        if self.job.state is READY and not scheduler.blocked(self.job, ROW, (), self.now):
            lease = scheduler.leased(W1, "c", LEASE, self.now)
            self.apply(scheduler.make_move("claim", self.job, claims=self.job.claims + 1, **lease))


DECISIONS = [
    RUN,
    Decision("run", "", 20.0, ("trust=low",), ("host=a",), 5),
    Decision("hold", "x", 30.0),
    Decision("refuse", "no"),
    Decision("succeed", "yes"),
]
FOUND = [
    JobFinding(Finding.ACQUIRED, "running"),
    JobFinding(Finding.OVER, "canceled"),
    JobFinding(Finding.GONE, "limited"),
    JobFinding(Finding.LAPSED, "scheduled"),
]
steps = st.one_of(
    st.tuples(st.just("decide"), st.sampled_from(DECISIONS)),
    st.tuples(st.just("policy"), st.sampled_from([None, V1, V2])),
    st.tuples(st.just("learn"), st.sampled_from(FOUND)),
    st.tuples(st.just("freeze"), st.sampled_from([Frozen("w", NOW + 60), None])),
    st.tuples(st.just("advance"), st.sampled_from([1.0, 31.0, 1000.0])),
    st.tuples(
        st.sampled_from(
            ["fail", "review", "end_avoid", "put", "confirm", "claim", "expire", "finish", "stop", "allow", "first"]
        ),
        st.none(),
    ),
)


def take_step(world: World, verb: str, what: Any) -> None:
    job, now, policy = world.job, world.now, world.policy
    asked = policy if job.policy_step in scheduler.ASKING_STEPS else None
    calls: dict[str, Callable[[], Move | None]] = {
        "decide": lambda: scheduler.decide(job, what, asked, KNOWN, now) if asked else None,
        "fail": lambda: scheduler.fail_to_decide(job, "x", asked, 1.0, now) if asked else None,
        "review": lambda: scheduler.review(job, policy, now),
        "freeze": lambda: scheduler.freeze(job, what, policy, now),
        "end_avoid": lambda: scheduler.end_avoid(job, now),
        "learn": lambda: scheduler.learn(job, ROW, what, now),
        "put": lambda: scheduler.put(job, in_state(RESERVING), job.version, now),
        "confirm": lambda: scheduler.confirm(job, None, now + 900, MAX_ATTEMPTS, now, policy),
        "expire": lambda: scheduler.expire(job, now, now),
        "finish": lambda: scheduler.finish(job, now),
        **{act: lambda act=act: by_operator(getattr(scheduler, act), job) for act in ("stop", "allow", "first")},  # type: ignore[misc]
    }
    if verb == "policy":
        world.policy = what
    elif verb == "advance":
        world.now += what
    elif verb == "claim":
        world.claim()
    else:
        world.apply(calls[verb]())


@given(st.lists(steps, max_size=60))
def test_any_sequence_with_a_policy_runs_nothing_undecided_and_forgets_nothing(sequence: list[tuple[str, Any]]) -> None:
    world = World()
    for verb, what in sequence:
        take_step(world, verb, what)
    # Whatever happened, the job ends once the policy lets it run, or is gone.
    world.now += 1e6
    for policy in (V1, None):
        last = World()
        last.__dict__ |= world.__dict__ | {"policy": policy, "now": world.now}
        end = ["expire", "learn", "put", "confirm", "freeze", "review", "decide", "end_avoid", "finish", "claim"]
        for verb in end:
            what = {"learn": FOUND[1], "decide": RUN}.get(verb)
            if verb != "learn" or last.job.state is RUNNING:
                take_step(last, verb, what)
        assert last.job.state is LEASED or last.job.outcome
