"""`GET /metrics`, letter by letter; that Prometheus' own tools take it; and Buildkite's numbers beside ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

import scheduler
from conftest import Clock
from fake_buildkite import FakeBuildkite
from processes import StackProcesses, free_port
from scheduler import (
    AgentEnd,
    Api,
    ClusterMetrics,
    Dispatcher,
    Finding,
    Holder,
    Intake,
    Job,
    Leadership,
    Metrics,
    Part,
    Settings,
    Stack,
    Store,
    StoreUnavailable,
)
from test_api import OTHER, UNPRINTABLE, UUID, W1, W1_AGAIN, W2, Bench, Reply
from test_docs import blocks, table_after

#: Seconds. No wait of a test is longer.
PATIENCE = 30.0


def uuid(number: int) -> str:
    return f"018f0000-0000-4000-8000-{number:012}"


class Measured(Bench):
    """The API over a store that is measured."""

    def __init__(self, store: Store, clock: Clock, settings: Settings, intakes: dict[str, Intake] | None = None):
        self.metrics, self.intakes = Metrics(), intakes or {}
        store.on_move, store.on_timed = self.metrics.on_move, self.metrics.timed
        super().__init__(store, clock, settings, intakes)
        self.settings = settings
        self.serve()

    def serve(self, parts: Sequence[Part] = ()) -> None:
        """Serve these parts too."""
        arguments = self.store, self.dispatcher, self.intakes, self.settings, self.clock.now, self.metrics
        self.server.api = Api(*arguments, parts=[self.freezes, *parts])

    def scrape(self) -> str:
        reply = self.call("GET", "/metrics")
        assert reply.status == 200
        return reply.text.decode()

    def samples(self, name: str) -> list[str]:
        """The lines of that metric, less its name."""
        return [line.removeprefix(name) for line in self.scrape().splitlines() if re.match(rf"{name}[{{ ]", line)]

    def confirm(self, number: int) -> None:
        now = self.clock.now()
        self.store.confirm([uuid(number)], self.store.sequence(), now + 900, now)


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings]) -> Iterator[Measured]:
    with Measured(store, clock, settings()) as bench:
        yield bench


# --- The text ---

LEVELS_OF_NOTHING = """\
# HELP stack_store_up Whether the store could be read.
# TYPE stack_store_up gauge
stack_store_up 1.0
# HELP stack_build_info The version of this scheduler, always 1.
# TYPE stack_build_info gauge
stack_build_info{version="1.0.0"} 1.0
# HELP stack_jobs Jobs that are not done.
# TYPE stack_jobs gauge
# HELP stack_jobs_waiting Waiting jobs, by reason.
# TYPE stack_jobs_waiting gauge
# HELP stack_oldest_wait_seconds Longest wait of a job.
# TYPE stack_oldest_wait_seconds gauge
# HELP stack_unmatched_jobs Waiting jobs that no live worker matches.
# TYPE stack_unmatched_jobs gauge
# HELP stack_workers Known workers, by state.
# TYPE stack_workers gauge
stack_workers{state="working"} 0.0
stack_workers{state="paused"} 0.0
stack_workers{state="failing"} 0.0
stack_workers{state="unfit"} 0.0
stack_workers{state="idle"} 0.0
stack_workers{state="away"} 0.0
stack_workers{state="offline"} 0.0
# HELP stack_host_free_bytes Free space for builds, after the last jobs.
# TYPE stack_host_free_bytes gauge
# HELP stack_host_strays_total Processes that jobs left behind.
# TYPE stack_host_strays_total counter
# HELP stack_host_idle_seconds Time since a worker of the host had a job.
# TYPE stack_host_idle_seconds gauge
# HELP stack_queue_paused 1 for each paused queue.
# TYPE stack_queue_paused gauge
# HELP stack_jobs_done_total Jobs done since the store was made.
# TYPE stack_jobs_done_total counter
# HELP stack_poll_age_seconds Time since the queue was last listed, or since the start.
# TYPE stack_poll_age_seconds gauge
# HELP stack_notifications_total Texts for build pages.
# TYPE stack_notifications_total counter
# HELP stack_frozen_jobs Jobs that a freeze window holds.
# TYPE stack_frozen_jobs gauge
# HELP stack_freeze_ends_timestamp_seconds When a freeze window in force ends.
# TYPE stack_freeze_ends_timestamp_seconds gauge
# HELP stack_moves_total Jobs moved, by verb and reason.
# TYPE stack_moves_total counter
# HELP stack_stretch_seconds How long each stretch of a job's life took.
# TYPE stack_stretch_seconds histogram
# HELP stack_buildkite_calls_total Calls to Buildkite, by endpoint and HTTP status; 0: no answer.
# TYPE stack_buildkite_calls_total counter
# HELP stack_odd_jobs_total Listed jobs with a wrong value in a field; with a wrong `id` they cannot be run.
# TYPE stack_odd_jobs_total counter
# HELP stack_tokens_not_issued_total Claims for whose job Buildkite issued no job acquisition token, by its reason.
# TYPE stack_tokens_not_issued_total counter
# HELP stack_unauthorized_total Requests that were refused because they had no valid token.
# TYPE stack_unauthorized_total counter
stack_unauthorized_total 0.0
# HELP stack_store_seconds Time that the store took to write, by verb.
# TYPE stack_store_seconds histogram
"""


def without_store_seconds(text: str) -> str:
    """The text less what differs each time."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("stack_store_seconds"))


def test_metrics_of_nothing_name_every_metric_in_the_text_format(bench: Measured) -> None:
    reply: Reply = bench.call("GET", "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    assert without_store_seconds(reply.text.decode()) == LEVELS_OF_NOTHING


def test_metrics_tell_levels_as_they_are_now(bench: Measured) -> None:
    bench.make_ready(rules=("os=linux",))
    bench.make_ready(OTHER)
    bench.claim(W1)
    bench.call("GET", "/jobs?query=queue=other", headers=W2)
    bench.clock.advance(100)
    bench.store.pause("default", True, bench.clock.now())
    assert bench.samples("stack_jobs") == [
        '{queue="default",rules="queue=default",state="leased"} 1.0',
        '{queue="default",rules="queue=default,os=linux",state="ready"} 1.0',
    ]
    assert bench.samples("stack_oldest_wait_seconds") == ['{queue="default",rules="queue=default,os=linux"} 159.75']
    assert bench.samples("stack_jobs_waiting") == ['{queue="default",why="queue_paused"} 1.0']
    counts = {"working": 1, "paused": 0, "failing": 0, "unfit": 0, "idle": 0, "away": 1, "offline": 0}
    assert bench.samples("stack_workers") == [f'{{state="{state}"}} {count}.0' for state, count in counts.items()]
    assert bench.samples("stack_queue_paused") == ['{queue="default"} 1.0']
    bench.learn(UUID, Finding.GONE, "limited")
    assert bench.samples("stack_oldest_wait_seconds") == bench.samples("stack_jobs_waiting") == []
    assert bench.samples("stack_jobs_done_total") == [
        '{outcome="ran",queue="default"} 0.0',
        '{outcome="dropped",queue="default"} 1.0',
        '{outcome="failed",queue="default"} 0.0',
        '{outcome="stopped",queue="default"} 0.0',
        '{outcome="refused",queue="default"} 0.0',
        '{outcome="succeeded",queue="default"} 0.0',
    ]


def test_metrics_count_every_move_with_one_of_few_reasons(bench: Measured) -> None:
    for number in range(1, 6):
        bench.make_ready(uuid(number), priority=-number)
    first = bench.claim(W1)
    bench.clock.advance(1)
    assert bench.claim(W1)["claim"] == first["claim"]  # the same again is no new claim
    bench.call("POST", f"/jobs/{uuid(1)}/release", {"claim": first["claim"], "reason": "x" * 99}, W1)
    second = bench.claim(W1)
    for _ in range(2):  # the second is no news
        bench.call("POST", f"/jobs/{uuid(2)}/complete", {"claim": second["claim"], "exit_status": 27}, W1)
        bench.clock.advance(1)
    third = bench.claim(W1)
    bench.store.touch(Holder(uuid(3), third["claim"]), bench.clock.now())
    bench.clock.advance(31)
    bench.store.answered("default", bench.clock.now())
    bench.store.expire(["default"], bench.clock.now())
    bench.learn(uuid(1), Finding.GONE, "reserved, but not for us", "not_ours")
    bench.learn(uuid(2), Finding.GONE, "a word that nobody knows")
    bench.learn(uuid(4), Finding.OVER, "canceled")
    bench.confirm(3)
    bench.claim(W1)
    bench.learn(uuid(3), Finding.ACQUIRED, "running")
    bench.learn(uuid(3), Finding.OVER, "finished")
    bench.learn(uuid(5), Finding.LAPSED, "scheduled")
    assert sorted(bench.samples("stack_moves_total")) == sorted(
        f'{{queue="default",reason="{reason}",verb="{verb}"}} {count}.0'
        for verb, reason, count in [
            ("put", "", 5),
            ("confirm", "", 6),
            ("claim", "", 4),
            ("claim", "again", 1),
            ("release", "excused", 1),
            ("complete", "rejected", 1),
            ("expire", "attempt", 1),
            ("drop", "not_ours", 1),
            ("drop", "other", 1),
            ("drop", "canceled", 1),
            ("acquire", "running", 1),
            ("run", "finished", 1),
            ("lapse", "lapsed", 1),
        ]
    )


def test_metrics_count_a_claim_that_ended_when_its_worker_was_restarted(bench: Measured) -> None:
    bench.make_ready()
    bench.claim(W1)
    bench.call("GET", "/jobs?query=queue=default", headers=W1_AGAIN)
    for _ in range(2):
        bench.clock.advance(1)
        bench.store.answered("default", bench.clock.now())
        bench.store.expire(["default"], bench.clock.now())
    assert '{queue="default",reason="excused",verb="expire"} 1.0' in bench.samples("stack_moves_total")


@pytest.mark.parametrize("status", [0, 1])
def test_metrics_of_agent_that_exited_before_its_job_was_looked_at_count_no_failed_attempt(
    bench: Measured, status: int
) -> None:
    bench.make_ready()
    claim = bench.claim(W1)["claim"]
    bench.store.answered("default", bench.clock.now())
    bench.store.complete(Holder(UUID, claim), AgentEnd(status), bench.clock.now())
    bench.learn(UUID, Finding.OVER, "finished")
    moves = bench.samples("stack_moves_total")
    assert '{queue="default",reason="exited",verb="complete"} 1.0' in moves
    assert '{queue="default",reason="finished",verb="run"} 1.0' in moves
    assert not [line for line in moves if "attempt" in line]


def test_metrics_count_a_finish_once(bench: Measured) -> None:
    bench.make_ready()
    for number in range(5):
        claim = bench.claim({"X-Worker-ID": f"w{number}", "X-Worker-Session": "s"})["claim"]
        bench.store.answered("default", bench.clock.now())
        bench.store.complete(Holder(UUID, claim), AgentEnd(1), bench.clock.now())
        bench.confirm(1)
    for _ in range(2):
        bench.store.finish(UUID, bench.clock.now())
    moves = bench.samples("stack_moves_total")
    assert '{queue="default",reason="failed_too_often",verb="confirm"} 1.0' in moves
    assert '{queue="default",reason="failed_too_often",verb="finish"} 1.0' in moves


def test_metrics_measure_each_stretch_of_a_life(bench: Measured) -> None:
    now = bench.clock.now()
    bench.store.put([Job.from_api("default", {"id": UUID}, now)], bench.store.sequence(), now)
    steps: list[tuple[float, Callable[[], object]]] = [
        (2, lambda: bench.confirm(1)),
        (20, lambda: bench.claim(W1)),
        (5, lambda: bench.learn(UUID, Finding.ACQUIRED, "running")),
        (4000, lambda: bench.learn(UUID, Finding.OVER, "finished")),
    ]
    for seconds, step in steps:
        bench.clock.advance(seconds)
        step()
    sums = {
        "scheduled_to_reserved": 2.0,
        "reserved_to_claimed": 20.0,
        "claimed_to_running": 5.0,
        "running_to_done": 4e3,
    }
    assert bench.samples("stack_stretch_seconds_sum") == [
        f'{{queue="default",stretch="{name}"}} {seconds}' for name, seconds in sums.items()
    ]
    in_bucket = [line for line in bench.samples("stack_stretch_seconds_bucket") if 'le="30.0"' in line]
    assert [line.split()[-1] for line in in_bucket] == ["1.0", "1.0", "1.0", "0.0"]


def test_metrics_measure_the_store_by_verb_failures_too(bench: Measured) -> None:
    bench.call("GET", "/jobs?query=queue=default", headers=W1)
    bench.call("POST", f"/jobs/{UUID}/touch", {"claim": "x"}, W1)
    counts = dict(line.split() for line in bench.samples("stack_store_seconds_count"))
    assert (counts['{verb="claim"}'], counts['{verb="touch"}'], counts['{verb="put"}']) == ("1.0", "1.0", "0.0")


def test_metrics_label_at_most_a_hundred_rule_sets_and_who_has_a_label_keeps_it(bench: Measured) -> None:
    def ready(numbers: range) -> None:
        for number in numbers:
            bench.make_ready(uuid(number), rules=(f"n={number:04}",))

    def labels() -> dict[str, str]:
        lines = bench.samples("stack_jobs")
        return dict(re.search(r'rules="([^"]*)".* (\S+)$', line).groups() for line in lines)  # type: ignore[union-attr,misc]

    ready(range(1000, 1099))
    first = labels()
    assert len(first) == 99
    ready(range(0, 10))  # these sort before, and come later
    assert labels().keys() == first.keys() | {"queue=default,n=0000", "other"}
    assert labels()["other"] == "9.0"
    for number in range(1000, 1003):
        bench.learn(uuid(number), Finding.GONE, "limited")
    after = labels()
    assert len(after) == 101
    assert first.keys() - after.keys() == {f"queue=default,n={number}" for number in range(1000, 1003)}


def test_metrics_label_a_few_of_buildkites_words_and_count_all(bench: Measured) -> None:
    metrics = bench.server.api._metrics
    for number in range(30):
        metrics.not_issued("default", f"job {number} is not reserved")
        metrics.odd("default", "priority")
    counted = bench.samples("stack_tokens_not_issued_total")
    assert len(counted) == scheduler.WORDS_LABELS + 1
    assert counted[-1] == '{queue="default",reason="other"} 10.0'
    assert bench.samples("stack_odd_jobs_total") == ['{field="priority",queue="default"} 30.0']


def test_metrics_with_odd_rules_escape_them(bench: Measured) -> None:
    bench.make_ready(rules=('name="a\\b c"', "é=ü"))
    (line,) = bench.samples("stack_jobs")
    assert 'rules="queue=default,name=\\"a\\\\\\\\b c\\",é=ü"' in line


@pytest.mark.parametrize("letter", list(UNPRINTABLE[:-2]), ids=ascii)
def test_metrics_with_rules_that_cannot_be_printed_count_them_as_other(bench: Measured, letter: str) -> None:
    bench.make_ready(rules=("queue=default", f"os={letter}linux"))
    (line,) = bench.samples("stack_jobs")
    assert 'rules="other"' in line and letter not in line


def test_metrics_of_cluster_whose_name_cannot_be_printed_escape_it() -> None:
    metrics = scheduler.Metrics()
    text = metrics.text([scheduler.gauge("x", "Text.", ["cluster"], [(("a\u202eb",), 1.0)])]).decode()
    assert 'x{cluster="a\\\\u202eb"} 1.0' in text


def test_metrics_cut_the_label_of_a_long_rule_and_count_its_likes_together(bench: Measured) -> None:
    for number in range(2):
        bench.make_ready(uuid(number), rules=("n=" + "x" * 100_000 + str(number),))
    (line,) = bench.samples("stack_jobs")
    assert line.endswith(" 2.0")
    assert len(line) < 400


def test_metrics_while_the_store_fails_tell_the_rest(bench: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.make_ready()

    def fail(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(bench.store, "stats", fail)
    assert bench.samples("stack_store_up") == [" 0.0"]
    assert bench.samples("stack_build_info") == ['{version="1.0.0"} 1.0']
    assert bench.samples("stack_moves_total") != []


def test_listener_of_moves_that_fails_costs_nobody_a_job(bench: Measured, caplog: pytest.LogCaptureFixture) -> None:
    bench.make_ready()
    bench.store.on_move = lambda move, now: print(1 // 0)
    assert bench.claim(W1)["uuid"] == UUID
    assert "a bug of the scheduler" in caplog.text


# --- Calls to Buildkite, and its own numbers ---


@pytest.fixture
def fake(clock: Clock) -> Iterator[FakeBuildkite]:
    with FakeBuildkite(clock=clock.now) as server:
        yield server


@pytest.fixture
def stack(fake: FakeBuildkite) -> Stack:
    return Stack(fake.url, lambda: fake.token, "test-default", "default")


@pytest.fixture
def polling(
    fake: FakeBuildkite, stack: Stack, store: Store, clock: Clock, settings: Callable[..., Settings]
) -> Iterator[Measured]:
    intake = Intake(stack, Leadership(store), Dispatcher(store, clock.now), settings(), clock.now, pytest.fail)
    with Measured(store, clock, settings(), {"default": intake}) as bench:
        stack.on_call = bench.metrics.called
        yield bench


@pytest.fixture
def cluster(polling: Measured, stack: Stack, clock: Clock) -> ClusterMetrics:
    cluster = ClusterMetrics(stack, clock.now)
    polling.serve([cluster])
    return cluster


def test_metrics_count_calls_by_endpoint_and_status_and_the_time_since_a_good_poll(
    polling: Measured, fake: FakeBuildkite, clock: Clock
) -> None:
    intake = polling.intakes["default"]
    clock.advance(7)
    assert polling.samples("stack_poll_age_seconds") == ['{queue="default"} 7.0']
    intake.list.run_once()
    clock.advance(3)
    fake.set_fault("list", status=503, times=1)
    intake.list.run_once()
    fake.set_fault("list", reset=True)
    intake.list.run_once()
    assert polling.samples("stack_poll_age_seconds") == ['{queue="default"} 3.0']
    assert polling.samples("stack_buildkite_calls_total") == [
        f'{{endpoint="{endpoint}",queue="default",status="{status}"}} 1.0'
        for endpoint, status in [("register", 201), ("list", 200), ("list", 503), ("list", 0)]
    ]


def test_metrics_ask_buildkite_for_its_numbers_only_while_somebody_reads_them(
    polling: Measured, cluster: ClusterMetrics, fake: FakeBuildkite, clock: Clock
) -> None:
    cluster.task.run_once()
    assert fake.calls_to("metrics") == []
    assert "buildkite_queues" not in polling.scrape()
    assert cluster.task.run_once() == scheduler.ASK_SECONDS
    assert len(fake.calls_to("metrics")) == 1
    clock.advance(scheduler.READ_SECONDS + 1)
    assert cluster.task.run_once() == scheduler.READ_SECONDS
    assert len(fake.calls_to("metrics")) == 1
    assert "buildkite_queues" not in polling.scrape()  # too old by now


def test_metrics_have_the_eight_numbers_of_buildkite_by_queue_and_in_total(
    polling: Measured, cluster: ClusterMetrics, fake: FakeBuildkite
) -> None:
    fake.add_job()
    fake.add_job(state="limited")
    fake.add_job(queue="gpu", state="running")
    busy = {"idle": 1, "busy": 2, "total": 3}
    polling.scrape()
    fake.set_fault(
        "metrics",
        times=1,
        body={
            "organization": {"slug": "acme"},
            "cluster": {"name": "c"},
            "jobs": {"scheduled": 1, "total": 5, "queues": {"a": {"scheduled": 1, "waiting": "many"}, "b": None}},
            "agents": busy | {"queues": {"a": busy}},
        },
    )
    cluster.task.run_once()
    lines = [line for line in polling.scrape().splitlines() if line.startswith("buildkite_")]
    expected = []
    for name, total, a in [
        ("scheduled_jobs_count", 1, 1),
        ("running_jobs_count", 0, 0),
        ("unfinished_jobs_count", 5, 0),
        ("waiting_jobs_count", 0, 0),
        ("idle_agent_count", 1, 1),
        ("busy_agent_count", 2, 2),
        ("total_agent_count", 3, 3),
        ("busy_agent_percentage", 66, 66),
    ]:
        expected.append(f'buildkite_total_{name}{{cluster="c"}} {total}.0')
        expected += [f'buildkite_queues_{name}{{cluster="c",queue="{q}"}} {n}.0' for q, n in [("a", a), ("b", 0)]]
    assert lines == expected
    cluster.task.run_once()
    assert polling.samples("buildkite_queues_running_jobs_count") == [
        '{cluster="test",queue="default"} 0.0',
        '{cluster="test",queue="gpu"} 1.0',
    ]


def test_metrics_ask_buildkite_no_sooner_than_it_wants(
    polling: Measured, cluster: ClusterMetrics, fake: FakeBuildkite
) -> None:
    polling.scrape()
    fake.metrics_poll_seconds = 120
    assert cluster.task.run_once() == 120
    fake.metrics_poll_seconds = 10**9
    assert cluster.task.run_once() == scheduler.MAX_ASKED_SECONDS


@pytest.mark.parametrize("count", [10**400, -1, 1e400, "7", None], ids=["huge", "negative", "inf", "text", "null"])
def test_metrics_with_a_number_of_buildkite_that_counts_nothing_have_0(
    polling: Measured, cluster: ClusterMetrics, fake: FakeBuildkite, count: Any
) -> None:
    queue = {"scheduled": count, "running": 3}
    fake.set_fault("metrics", body={"jobs": {**queue, "queues": {"default": queue}}, "agents": {"total": count}})
    polling.scrape()
    cluster.task.run_once()
    assert polling.samples("buildkite_total_scheduled_jobs_count") == ['{cluster=""} 0.0']
    assert polling.samples("buildkite_total_running_jobs_count") == ['{cluster=""} 3.0']
    assert polling.samples("buildkite_queues_scheduled_jobs_count") == ['{cluster="",queue="default"} 0.0']


@pytest.mark.parametrize("answer", [{}, {"jobs": [], "agents": 3}, {"jobs": {"queues": [1]}, "cluster": "x"}])
def test_metrics_of_an_odd_answer_are_zeros(
    polling: Measured, cluster: ClusterMetrics, fake: FakeBuildkite, answer: Any
) -> None:
    polling.scrape()
    fake.set_fault("metrics", body=answer, headers={"Buildkite-Agent-Metrics-Poll-Duration": "soon"})
    assert cluster.task.run_once() == scheduler.ASK_SECONDS
    assert polling.samples("buildkite_total_running_jobs_count") == ['{cluster=""} 0.0']


# --- Prometheus itself ---


def real(program: str) -> str:
    """Where the program is. One that is missing skips; in CI it must be there."""
    path = shutil.which(program)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    return path


def promtool_says(text: str) -> str:
    check = [real("promtool"), "check", "metrics"]
    done = subprocess.run(check, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_ours(polling: Measured, cluster: ClusterMetrics) -> None:
    polling.make_ready()
    polling.claim(W1)
    text = polling.scrape()
    assert promtool_says(text) == ""
    assert "stack_bad" in promtool_says("# TYPE stack_bad counter\nstack_bad 1\n")  # it does look


def test_promtool_finds_only_buildkites_own_names_odd(polling: Measured, cluster: ClusterMetrics) -> None:
    polling.scrape()
    cluster.task.run_once()
    said = promtool_says(polling.scrape()).splitlines()
    # Names that end in _count are those of Buildkite's exporter: dashboards know them.
    assert all(line.startswith("buildkite_") for line in said), said


def test_read_metrics_of_the_documents_are_those_that_are_told(bench: Measured) -> None:
    documented = {row[0].strip("`") for row in table_after("metric")}
    with_policy = {"stack_policy_loaded", "stack_policy_failed_jobs"}
    with_periodic = {name for name in documented if name.startswith("stack_periodic_")}
    assert len(with_periodic) == 3  # tests/test_periodic.py scrapes these
    assert documented - with_policy - with_periodic == set(re.findall(r"^# TYPE (\S+)", bench.scrape(), re.MULTILINE))


def test_promtool_takes_the_alerts_of_the_documents_and_scrape_config(tmp_path: Path) -> None:
    scrape, alerts = blocks("yaml")
    rules = "groups:\n- name: stack\n  rules:\n" + textwrap.indent(alerts, "  ")
    scrape = scrape.replace("/etc/prometheus/stack-api-token", str(tmp_path / "token"))
    (tmp_path / "token").write_text("x")
    for kind, text, count in [("rules", rules, "6 rules found"), ("config", scrape, "is valid")]:
        path = tmp_path / f"{kind}.yml"
        path.write_text(text)
        check = [real("promtool"), "check", kind, str(path)]
        done = subprocess.run(check, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, count in done.stdout) == (0, True), done


ALERTS = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - {{series: 'stack_workers{{state="{state}"}}', values: '{values}'}}
  - {{series: 'stack_moves_total{{queue="default",verb="complete",reason="exited"}}', values: '0+600x20'}}
  alert_rule_test:
  - {{eval_time: 20m, alertname: {alert}, exp_alerts: [{fires}]}}
"""


ALERT_OF = {"failing": "AgentsDoNotAcquire", "offline": "WorkersAreOffline", "unfit": "WorkersAreUnfit"}


@pytest.mark.parametrize(
    ("state", "values", "fires"),
    [
        ("failing", "0x20", False),  # ten short jobs a second
        ("failing", "0 0 1 0 0 0 1 0 0 0 0 1 0 0 0 0 0 1 0 0 0", False),  # one is held for a moment now and then
        ("failing", "0 0 0 0 0 0 1 0 1 1 0 1 1 1 0 1 1 1 1 1 1", True),  # its agents never acquire, held ever longer
        ("offline", "0 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1", False),  # a reboot takes a while
        ("offline", "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 2 2 1 1 1 1", True),
        ("unfit", "0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 0 0 0 1 1 1", False),  # a full disk that was cleared
        ("unfit", "0 0 0 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", True),
    ],
)
def test_prometheus_alerts_of_workers_that_do_not_work_and_not_of_what_passes(
    tmp_path: Path, state: str, values: str, fires: bool
) -> None:
    _, alerts = blocks("yaml")
    rules = tmp_path / "rules.yml"
    rules.write_text("groups:\n- name: stack\n  rules:\n" + textwrap.indent(alerts, "  "))
    test = tmp_path / "test.yml"
    expected = f"{{exp_labels: {{state: {state}}}}}" * fires
    test.write_text(ALERTS.format(rules=rules, state=state, values=values, alert=ALERT_OF[state], fires=expected))
    check = [real("promtool"), "test", "rules", str(test)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done


CONFIG = """\
global: {{scrape_interval: 200ms}}
scrape_configs:
- job_name: stack
  authorization: {{credentials: secret-1}}
  static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def answer_of(url: str, query: str) -> list[Any]:
    try:
        reply = requests.get(f"{url}/api/v1/query", params={"query": query}, timeout=30)
    except (requests.ConnectionError, requests.Timeout):  # it is still starting
        return []
    if reply.status_code == 503:  # so it says, as text, until it has read its storage
        return []
    return [(row["metric"], row["value"][1]) for row in reply.json()["data"]["result"]]


def test_prometheus_reads_the_scheduler_and_knows_what_waits(tmp_path: Path) -> None:
    program, port = real("prometheus"), free_port()
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, agent="", STACK_API_TOKEN="secret-1") as stack:
        process = stack.start_scheduler()
        process.wait_for_line("ready", fake.add_job(rules=["queue=default", "os=mac"]))
        (tmp_path / "prometheus.yml").write_text(CONFIG.format(port=stack.port))
        arguments = [
            program,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with open(tmp_path / "prometheus.log", "wb") as log, subprocess.Popen(arguments, stderr=log) as prometheus:
            try:
                url, ends_at = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
                found: list[Any] = []
                while not found and time.monotonic() < ends_at:
                    found = answer_of(url, 'stack_jobs{state="ready"}')
                    time.sleep(0.1)
                assert [(each["rules"], value) for each, value in found] == [("queue=default,os=mac", "1")], json.dumps(
                    (tmp_path / "prometheus.log").read_text()[-2000:]
                )
            finally:
                prometheus.terminate()
                prometheus.wait(PATIENCE)
