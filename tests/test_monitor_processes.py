"""Jobs outside of clusters in real processes: both sources at once, the real agent, a policy, Redis, and kills."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from conftest import LONG_RUN
from fake_buildkite import FakeBuildkite
from processes import Process, RedisServer, StackProcesses, agent_path, wait_until
from test_chaos import wait_until_finished
from test_settings import run

FILE = 'organization = "acme"\n[monitor]\nqueue = "legacy"\n'


@contextmanager
def watching(
    directory: Path, kind: str = "fake", file: str = FILE, **settings: str
) -> Iterator[tuple[FakeBuildkite, StackProcesses]]:
    """A fake Buildkite with pipelines outside of the cluster, and a stack that watches them."""
    (directory / "stack.toml").write_text(file)
    with FakeBuildkite(lost_after=6) as fake:
        for slug in ("app", "docs"):
            fake.add_pipeline(slug, clustered=False)
        told = {
            "STACK_FILE": str(directory / "stack.toml"),
            "BUILDKITE_API_TOKEN": fake.api_token,
            "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url,
        }
        with StackProcesses(fake, directory, agent_path(kind), **(told | settings)) as stack:
            yield fake, stack


def start_legacy(stack: StackProcesses, name: str = "legacy-1", tags: str = "", **settings: str) -> Process:
    """A worker of the monitor's queue, with the token of an agent outside of clusters."""
    token = {"BUILDKITE_AGENT_TOKEN": stack.fake.unclustered_token}
    return stack.start_worker(name, f"queue=legacy{tags}", **(token | settings))


def finished(fake: FakeBuildkite, *uuids: str, timeout: float = 60) -> None:
    fake.wait_for(lambda: all(fake.all_jobs[uuid].state == "finished" for uuid in uuids), timeout)
    for uuid in uuids:
        assert fake.jobs[uuid].happened("acquired") == 1, fake.jobs[uuid]


def problems(stack: StackProcesses) -> str:
    return str(requests.get(f"{stack.url}/health", timeout=30).json()["problems"])


@pytest.mark.parametrize("kind", ["fake", "v3"])
def test_run_jobs_that_nobody_can_reserve_by_an_agent_with_a_token_of_its_own(kind: str, tmp_path: Path) -> None:
    """The monitor alone: there is no cluster, and no token of one. A worker without a token gets no job."""
    with watching(tmp_path, kind, BUILDKITE_AGENT_TOKEN="") as (fake, stack):
        uuids = [fake.add_job(pipeline="app", command=f"echo job {n}; exit {n}", rules=[]) for n in range(3)]
        scheduler = stack.start_scheduler()
        stack.start_worker("no-token", "queue=legacy", BUILDKITE_AGENT_TOKEN="")
        scheduler.wait_for_line("ready", uuids[2])
        told = fake.wait_for(lambda: stack.job(uuids[0])["why"] != "no_worker" and stack.job(uuids[0]), timeout=30)
        assert told["why"] == "no_tokens"
        start_legacy(stack)
        finished(fake, *uuids)
        assert [fake.jobs[uuid].exit_status for uuid in uuids] == [0, 1, 2]
        assert {fake.jobs[uuid].agent_name for uuid in uuids} == {"legacy-1"}
        assert {call.endpoint for call in fake.calls if call.token == "cluster"} == set()
        assert problems(stack) == "[]"


def test_run_jobs_of_both_sources_by_the_workers_of_each(tmp_path: Path) -> None:
    """And what a policy and an operator do to those that cannot be reserved."""
    policy = tmp_path / "policy.py"
    policy.write_text(
        'def decide(job, fleet):\n    kind = job.env.get("KIND")\n    assert job.command and job.pipeline\n'
        '    return refuse("no") if kind == "refuse" else succeed("yes") if kind == "succeed" else run()\n'
    )
    with watching(tmp_path, POLICY_FILE=str(policy), LEASE_SECONDS="2") as (fake, stack):
        ours = [fake.add_job(pipeline=slug) for slug in ("app", "docs")]
        clustered = [fake.add_job() for _ in range(2)]
        refused, succeeded = (fake.add_job(pipeline="app", env={"KIND": kind}) for kind in ("refuse", "succeed"))
        stopped = fake.add_job(pipeline="app", rules=["os=plan9"])
        runs = fake.add_job(pipeline="app", command="echo begun; exec sleep 100")
        scheduler = stack.start_scheduler()
        stack.start_worker("clustered", "queue=default", BUILDKITE_AGENT_TOKEN="")
        for name in ("legacy-1", "legacy-2"):
            start_legacy(stack, name)
        finished(fake, *ours, *clustered)
        assert {fake.jobs[uuid].agent_name for uuid in clustered} == {"clustered"}
        assert {fake.jobs[uuid].agent_name for uuid in ours} <= {"legacy-1", "legacy-2"}
        fake.wait_for(lambda: fake.all_jobs[refused].state == "canceled")
        scheduler.wait_for_line("finished", refused, "outcome=refused")
        scheduler.wait_for_line("decided", succeeded, "it decided succeed, but jobs of queue legacy can only be")
        assert fake.jobs[succeeded].state == "scheduled"
        assert f"jobs held because POLICY_FILE failed for them: 1; the first is {succeeded}" in problems(stack)
        # The policy cost no call: what each job would run came with the list.
        assert not any("{ env command }" in call.json["query"] for call in fake.calls_to("graphql"))
        fake.wait_for(lambda: "begun" in fake.all_jobs[runs].log)
        for uuid in (stopped, runs):
            answer = requests.post(f"{stack.url}/jobs/{uuid}/stop", json={"note": "wrong branch"}, timeout=30)
            assert answer.status_code == 200
            fake.wait_for(lambda uuid=uuid: fake.all_jobs[uuid].state == "canceled")  # type: ignore[misc]
        assert fake.jobs[stopped].happened("acquired") == 0
        scheduler.wait_for_line("finished", stopped, "outcome=stopped")


def test_lead_by_a_scheduler_that_knows_no_monitor_leaves_its_jobs_to_the_next_that_does(tmp_path: Path) -> None:
    """As while one after the other is upgraded, or gets a new STACK_FILE."""
    redis = RedisServer(tmp_path)
    try:
        with watching(tmp_path, REDIS_ADDR=redis.address, LEASE_SECONDS="2") as (fake, stack):
            uuids = [fake.add_job(pipeline="app") for _ in range(3)]
            knows = stack.start_scheduler(0)
            for uuid in uuids:
                knows.wait_for_line("ready", uuid)
            stack.start_scheduler(1, STACK_FILE="")
            knows.kill()
            knows.ended()
            wait_until(lambda: redis.leader_pid() == stack.schedulers[1].pid)
            clustered = fake.add_job()
            stack.schedulers[1].wait_for_line("ready", clustered)
            # A worker that asks it may get a job, as free as it was when that was last asked: the agent finds out.
            start_legacy(stack, WORKER_API_SERVER=stack.urls[1])
            stack.start_worker("no-token", "queue=legacy", BUILDKITE_AGENT_TOKEN="", WORKER_API_SERVER=stack.urls[1])
            stack.start_scheduler(0)
            stack.schedulers[1].kill()
            stack.schedulers[1].ended()
            for name in ("legacy-2", "legacy-3"):
                start_legacy(stack, name)
            finished(fake, *uuids)
            assert "no-token" not in {fake.jobs[uuid].agent_name for uuid in uuids}
    finally:
        redis.stop()


def test_reload_watches_the_pipelines_of_the_file_as_it_is_now(tmp_path: Path) -> None:
    with watching(tmp_path, file=f'{FILE}pipelines = ["app"]\n', BUILDKITE_AGENT_TOKEN="") as (fake, stack):
        app, docs = (fake.add_job(pipeline=slug) for slug in ("app", "docs"))
        scheduler = stack.start_scheduler()
        scheduler.wait_for_line("ready", app)
        (tmp_path / "stack.toml").write_text(f'{FILE}pipelines = ["docs", "nope"]\n')
        scheduler.send_signal(signal.SIGHUP)
        scheduler.wait_for_line("missing", "pipeline nope of [monitor]: Buildkite shows no such pipeline of acme")
        scheduler.wait_for_line("ready", docs)
        assert "pipeline nope" in problems(stack)
        (tmp_path / "stack.toml").write_text(f'{FILE}pipelines = ["docs"]\n')
        scheduler.send_signal(signal.SIGHUP)
        wait_until(lambda: "pipeline nope" not in problems(stack))
        (tmp_path / "stack.toml").write_text(FILE.replace("legacy", "other"))
        scheduler.send_signal(signal.SIGHUP)
        scheduler.wait_for_line("outdated", "[monitor]", "takes a restart")
        # It is no part of the list any more, but is held and watched like any other job.
        assert stack.job(app)["state"] == "ready"
        fake.cancel_job(app)
        claim = requests.get(f"{stack.url}/jobs?query=queue=legacy", timeout=30)
        assert claim.status_code == 200


def test_run_out_of_points_waits_until_they_begin_anew_and_says_so(tmp_path: Path) -> None:
    """Jobs of the other source go on meanwhile."""
    with watching(tmp_path) as (fake, stack):
        fake.points = {"RateLimit": 20_000, "RateLimit-User": 30}
        uuids = [fake.add_job(pipeline="app") for _ in range(10)]
        scheduler = stack.start_scheduler()
        stack.start_worker("clustered", "queue=default")
        start_legacy(stack)
        scheduler.wait_for_line("slow", "queue=legacy")
        scheduler.wait_for_line("failed", "429 from Buildkite")
        fake.wait_for(lambda: "429 from Buildkite" in problems(stack))
        finished(fake, fake.add_job())
        before = len(fake.calls_to("graphql"))
        fake.points["RateLimit-User"] = 5000
        # A new window; what waits for the old one to end starts anew with the next scheduler.
        scheduler.kill()
        scheduler.ended()
        stack.start_scheduler()
        finished(fake, *uuids)
        assert len(fake.calls_to("graphql")) > before


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        ('organization = "acme"\n[monitor]\n', {}, "line 2: queue is 'default', which is also in SCHEDULER_QUEUES"),
        ("[monitor]\n", {}, 'line 1: [monitor] needs the organization\'s slug at the top: organization = "acme"'),
        (FILE, {"BUILDKITE_API_TOKEN": ""}, "line 2: there is no api-token-file, and BUILDKITE_API_TOKEN is empty"),
        (f'{FILE}api-token-file = "/none"\n', {}, "line 4: api-token-file: /none cannot be read"),
        (f'{FILE}pipeline = ["app"]\n', {}, "line 4: pipeline is not a key of [monitor]; the nearest is pipelines"),
        (f'{FILE}pipelines = "app"\n', {}, "line 4: pipelines is 'app'; it is a list like"),
        (FILE.replace("legacy", "a,b"), {}, "line 3: queue is 'a,b'; it must be the key of one queue"),
        ('organization = "acme"\n', {"BUILDKITE_AGENT_TOKEN": ""}, "BUILDKITE_AGENT_TOKEN: is required"),
    ],
)
def test_start_with_a_monitor_that_cannot_be_used_exits_78(
    tmp_path: Path, file: str, settings: dict[str, str], told: str
) -> None:
    (tmp_path / "stack.toml").write_text(file)
    base = {"BUILDKITE_AGENT_TOKEN": "x", "BUILDKITE_API_TOKEN": "y", "STACK_FILE": "stack.toml"}
    ended = run(tmp_path, **(base | settings))
    assert ended.returncode == 78
    assert told in ended.stderr


def test_check_names_what_of_the_monitor_is_not_there(tmp_path: Path) -> None:
    with watching(tmp_path, file=f'{FILE}pipelines = ["app", "nope"]\n') as (fake, stack):
        (tmp_path / "token").write_text(f"{fake.api_token}\n")
        environment = stack.environment(**stack.scheduler_settings, STATE_DIRECTORY=str(tmp_path / "state"))
        for name in ("PATH", "HOME"):
            environment.pop(name)
        ended = run(tmp_path, "--check", **environment)
        assert (ended.returncode, "[monitor]: pipeline nope" in ended.stderr) == (78, True)
        (tmp_path / "stack.toml").write_text(f'{FILE}api-token-file = "{tmp_path}/token"\n')
        ended = run(tmp_path, "--check", **(environment | {"BUILDKITE_API_TOKEN": ""}))
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "Buildkite answers for default, legacy" in ended.stdout


# --- Whatever dies ---

#: Jobs, builds and kills: with LONG=1, in CI, at home.
JOBS, BUILDS, KILLS = (1000, 100, 20) if os.environ.get("LONG") else (300, 30, 8) if LONG_RUN else (60, 12, 6)
SETTINGS = {"LEASE_SECONDS": "3", "RESERVATION_SECONDS": "60", "ACQUIRE_SECONDS": "20", "MAX_ATTEMPTS": "100"}


@contextmanager
def stores(name: str, directory: Path) -> Iterator[dict[str, str]]:
    with ExitStack() as after:
        if name == "sqlite":
            yield {}
            return
        redis = RedisServer(directory, "--appendonly", "yes")
        after.callback(redis.stop)
        yield {"REDIS_ADDR": redis.address}


@pytest.mark.parametrize("store", ["sqlite", pytest.param("redis", marks=pytest.mark.long)])
def test_run_jobs_of_both_sources_while_processes_die_runs_each_once(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On SQLite one scheduler is killed again and again, on Redis one of two; and workers."""
    dice = random.Random(1)
    with stores(store, tmp_path) as more, watching(tmp_path, **(SETTINGS | more)) as (fake, stack):
        fake.points = {"RateLimit": 10**6, "RateLimit-User": 10**6}
        numbers = (0, 1) if more else (0,)
        uuids: list[str] = []
        began = time.monotonic()
        for number in numbers:
            stack.start_scheduler(number)
        urls = {"WORKER_API_SERVER": ",".join(stack.urls[: len(numbers)])}
        workers: dict[str, Callable[[], Process]] = {}
        for n in range(4):
            workers[f"legacy-{n}"] = lambda n=n: start_legacy(stack, f"legacy-{n}", **urls)  # type: ignore[misc]
            workers[f"default-{n}"] = lambda n=n: stack.start_worker(f"default-{n}", **urls)  # type: ignore[misc]
        running = {name: start() for name, start in workers.items()}
        over, kills = threading.Event(), 0

        def feed() -> None:
            for n in range(JOBS):
                pipeline, build = ("app", "demo", "docs", "tools")[n % 4], n // 4 % (BUILDS // 4) + 1
                uuids.append(fake.add_job(pipeline=pipeline, build_number=build, command=f"echo {n}"))
                over.wait(0.02)

        feeder = threading.Thread(target=feed)
        feeder.start()
        for _ in range(KILLS):
            time.sleep(dice.uniform(0.3, 1.0) * (JOBS / KILLS / 25))
            kills += 1
            if dice.random() < 0.5:
                number = dice.choice(numbers)
                stack.schedulers[number].kill()
                stack.schedulers[number].ended()
                stack.start_scheduler(number)
            else:
                name = dice.choice(sorted(workers))
                running[name].kill()
                running[name].ended()
                running[name] = workers[name]()
        feeder.join()
        wait_until_finished(fake, uuids)
        jobs = [fake.jobs[uuid] for uuid in uuids]
        assert {job.happened("acquired") for job in jobs} == {1}
        assert {job.happened("finish_by_stack") + job.happened("canceled") for job in jobs} == {0}
        rejected, points = sum(job.happened("acquire_rejected") for job in jobs), fake.points_used
        monitored = sum(not fake.pipelines[job.pipeline].clustered for job in jobs)
        with capsys.disabled():
            print(
                f"\nmonitor, {store}: {len(jobs)} jobs, {monitored} of them outside of clusters, in "
                f"{len(fake.builds)} builds and {time.monotonic() - began:.0f} s; {kills} kills, {rejected} rejected "
                f"acquisitions, {points / max(monitored, 1):.1f} points a job"
            )
