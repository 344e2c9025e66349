"""Jobs through a policy, in real processes: each ends as it was decided, and nothing of what it would run is kept."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests

from conftest import LONG_RUN, ROUTES
from fake_buildkite import ROUTES as BUILDKITE
from fake_buildkite import Call, FakeBuildkite, FakeJob
from processes import ROOT, RedisServer, StackProcesses, agent_path, command
from scheduler import EXIT_WRONG, SPECS_AT_ONCE, JobState

EXAMPLES = ROOT / "systemd" / "policies"
SECRET = "hunter2-which-nobody-may-see"

#: Decides by a job's variable KIND. It prints, raises and tells the job's secret wherever it can.
POLICY = """
def decide(job, fleet):
    kind, secret = job.env.get("KIND", "run"), job.env.get("PASSWORD", "")
    print(secret)
    if kind == "route":
        return run(require=["host=h2"])
    if kind == "name":
        return run(require=["worker=w1"])
    if kind == "tag":
        return run(require=["trust=low"])
    if kind == "hold":
        return run() if job.held_for else hold("not yet: " + secret, seconds=5)
    if kind == "fleet":
        return run() if fleet.workers("trust=low") else hold("nobody is there", seconds=5)
    if kind == "refuse":
        return refuse(f"not on our machines: {secret!r}")
    if kind == "succeed":
        return succeed(secret)
    if kind == "raise":
        raise KeyError(secret)
    if kind == "odd":
        raise type(secret.replace("-", "_"), (Exception,), {})(secret)
    return run(priority=5 if kind == "early" else None)
"""

KINDS = ("run", "route", "name", "tag", "hold", "fleet", "refuse", "succeed")


def write_policy(directory: Path, text: str = POLICY) -> str:
    path = directory / "policy.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def add(fake: FakeBuildkite, kind: str, **more: Any) -> str:
    env = {"KIND": kind, "PASSWORD": SECRET, "BUILDKITE_PARALLEL_JOB": "3"}
    return fake.add_job(env=env, step_key="test", command="echo ran", **more)


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake"), POLICY_FILE=write_policy(tmp_path)) as processes:
        yield processes


def start_workers(stack: StackProcesses, *urls: str) -> None:
    places = urls or (stack.url,)
    for number, (name, host, tags) in enumerate(
        [("w1", "h1", ""), ("w2", "h2", ""), ("w3", "h1", ",trust=low"), ("w4", "h3", "")]
    ):
        url = places[number % len(places)]
        stack.start_worker(name, f"queue=default{tags}", WORKER_HOST=host, WORKER_API_SERVER=url)


def is_as_decided(job: FakeJob, kind: str) -> bool:
    if job.state != "finished" or job.happened("acquired") > 1:
        return False
    by_stack = bool(job.happened("finish_by_stack"))
    match kind:
        case "refuse":
            return by_stack and job.exit_status == -1 and job.finish_detail == "not on our machines: '…'"
        case "succeed":
            return by_stack and job.exit_status == 0
        case "route":
            return job.agent_name == "w2"
        case "name":
            return job.agent_name == "w1"
        case "tag":
            return job.agent_name == "w3"
    return not by_stack and job.exit_status == 0


def wait_for_all(fake: FakeBuildkite, jobs: dict[str, str], timeout: float) -> None:
    """Until each job has ended as its kind is decided."""
    ends_at = time.monotonic() + timeout
    while left := [uuid for uuid in jobs if fake.jobs[uuid].state != "finished"]:
        assert time.monotonic() < ends_at, [(jobs[uuid], fake.jobs[uuid]) for uuid in left][:3]
        with fake.changed:
            fake.changed.wait(1.0)
    assert [fake.jobs[uuid] for uuid, kind in jobs.items() if not is_as_decided(fake.jobs[uuid], kind)] == []


def test_decide_jobs_of_each_kind_ends_each_as_it_was_decided(stack: StackProcesses, fake: FakeBuildkite) -> None:
    jobs = {add(fake, kind): kind for kind in KINDS for _ in range(2)}
    stack.start_scheduler()
    start_workers(stack)
    wait_for_all(fake, jobs, 60)
    told = {kind: stack.job(uuid) for uuid, kind in jobs.items()}
    assert told["refuse"]["outcome"] == "refused"
    assert told["succeed"]["outcome"] == "succeeded"
    assert told["route"]["decision"]["require"] == ["host=h2"]
    assert told["run"]["decision"]["policy"] == told["tag"]["decision"]["policy"]
    assert told["run"]["parallel_job"] == 3


# -- nothing of what a job would run is kept

#: What the routes that read take beside it. `GET /jobs` is a claim: the test says when one is made.
ASKED = {
    "/queue": [f"?state={state}" for state in JobState],
    "/health": ["", "?strict=1"],
    "/history": ["", "?host=h1"],
}
READ = [route.path for route in ROUTES if route.method == "GET" and route.path != "/jobs"]


def everywhere(
    stack: StackProcesses, fake: FakeBuildkite, numbers: Iterable[int] = (0,), redis: RedisServer | None = None
) -> dict[str, bytes]:
    """All that we wrote down, said and answered, by where."""
    told = {str(path): path.read_bytes() for path in stack.directory.rglob("*") if path.is_file()}
    told = {path: text for path, text in told.items() if "/builds/" not in path}
    named = {"/jobs/{uuid}": [f"/jobs/{uuid}" for uuid in fake.jobs]}
    paths = [f"{path}{more}" for each in READ for path in named.get(each, [each]) for more in ASKED.get(each, [""])]
    for number in numbers:
        for path in paths:
            answer = requests.get(f"{stack.urls[number]}{path}", timeout=10)
            assert answer.status_code == 200, (path, answer.text)
            told[f"{number} {path}"] = repr(answer.headers).encode() + answer.content
    for uuid, job in fake.jobs.items():
        told[f"build page of {uuid}"] = repr((job.notifications, job.finish_detail)).encode()
    calls = [
        call for call in [*fake.calls] if call.endpoint in BUILDKITE and BUILDKITE[call.endpoint].group == "stacks"
    ]
    told["calls to Buildkite"] = "\n".join(map(repr, calls)).encode()
    if redis:
        redis.say("CONFIG", "SET", "rdbcompression", "no")
        assert redis.say("SAVE").startswith("+OK")
        told["redis"] = (redis.directory / "dump.rdb").read_bytes()
        assert b"decision" in told["redis"]
    return told


def check_nothing_told(told: dict[str, bytes]) -> None:
    for place, text in told.items():
        for secret in (SECRET, SECRET.replace("-", "_"), "echo ran"):
            assert secret.encode() not in text, (place, secret)


def acted_on(url: str, run: str, first: str, stop: str) -> dict[str, bytes]:
    """What is answered to those who claim, to operators who act, and to Buildkite, which tells of the job too."""
    claimed = requests.get(f"{url}/jobs?query=queue=default", headers={"X-Worker-Host": "h1"}, timeout=10)
    assert claimed.json()["uuid"] == run
    claim = {"claim": claimed.json()["claim"]}
    job = {"id": run, "agent_query_rules": ["queue=default"], "command": "echo ran", "env": {"PASSWORD": SECRET}}
    posts: list[tuple[str, dict[str, Any]]] = [
        (f"/jobs/{run}/touch", claim),
        (f"/jobs/{run}/release", claim | {"reason": "x"}),
        (f"/jobs/{first}/first", {"note": "x"}),
        (f"/jobs/{stop}/stop", {"note": "x"}),
        ("/policy", {"state": "off", "dry_run": True, "note": "x"}),
        ("/webhook", {"event": "job.scheduled", "job": job, "build": {"env": job["env"]}}),
    ]
    told = {"claim": claimed.content}
    for path, body in posts:
        answer = requests.post(f"{url}{path}", json=body, headers={"X-Buildkite-Token": "w"}, timeout=10)
        assert answer.status_code == 200, (path, answer.text)
        told[path] = answer.content
    return told


def failing(stack: StackProcesses, uuid: str) -> bool:
    return bool(stack.job(uuid).get("held_reason") == "policy_failed")


@pytest.mark.parametrize("on", ["sqlite", "redis"])
def test_decide_with_a_secret_in_all_that_goes_wrong_tells_it_nowhere(
    stack: StackProcesses, fake: FakeBuildkite, tmp_path_factory: pytest.TempPathFactory, on: str
) -> None:
    redis = RedisServer(tmp_path_factory.mktemp("redis")) if on == "redis" else None
    try:
        if redis:
            stack.scheduler_settings["REDIS_ADDR"] = redis.address
        kinds = ("run", "refuse", "succeed", "hold", "raise", "odd")
        jobs = {kind: add(fake, kind) for kind in kinds}
        stack.start_scheduler(LOG_LEVEL="debug", WEBHOOK_TOKEN="w")
        wait(lambda: failing(stack, jobs["raise"]) and failing(stack, jobs["odd"]))
        wait(lambda: fake.jobs[jobs["refuse"]].state == fake.jobs[jobs["succeed"]].state == "finished")
        wait(lambda: "not yet: …" in stack.job(jobs["hold"])["why_text"])
        wait(lambda: not stack.job(jobs["run"])["held_by"])
        told = acted_on(stack.url, jobs["run"], jobs["raise"], jobs["hold"])
        wait(lambda: any("policy" in text["detail"] for text in fake.jobs[jobs["raise"]].notifications), 60)
        told |= everywhere(stack, fake, redis=redis)
        check_nothing_told(told)
        assert stack.job(jobs["raise"])["decision"]["reason"] == "KeyError at policy.py:20"
        assert stack.job(jobs["odd"])["decision"]["reason"].endswith(" at policy.py:22")
        assert fake.jobs[jobs["succeed"]].finish_detail == "(a variable of the job, which is not shown)"
        health = requests.get(f"{stack.url}/health", timeout=10)
        assert health.status_code == 200
        assert "queue default: jobs held because POLICY_FILE failed for them: 2; the first is" in health.text
        # The operator alone is told all of it, and only when he asks; nothing is changed by that.
        metrics = told["0 /metrics"].decode()
        assert "stack_policy_loaded 1.0" in metrics and 'stack_policy_failed_jobs{queue="default"} 2.0' in metrics
        before = stack.job(jobs["raise"])
        answer = requests.post(f"{stack.url}/jobs/{jobs['raise']}/decide", json={}, timeout=30).json()
        assert answer["failed"] == "KeyError at policy.py:20"
        assert SECRET in answer["traceback"] and answer["printed"] == f"{SECRET}\n"
        after = stack.job(jobs["raise"])
        changing = {"why_text", "reservation_expires_at", "story"}
        assert {n: v for n, v in after.items() if n not in changing} == {
            n: v for n, v in before.items() if n not in changing
        }
    finally:
        for scheduler in stack.schedulers.values():
            scheduler.terminate()
            scheduler.ended()
        if redis:
            redis.stop()


# -- whatever is killed


def kill_some(stack: StackProcesses, fake: FakeBuildkite, jobs: dict[str, str], times: int) -> None:
    """Kill a scheduler so many times while jobs are decided, and start it again each time."""
    random = Random(17)
    for number in range(times):
        # At another point of the work each time.
        wanted = len(jobs) * number // (times + 1)
        wait(lambda wanted=wanted: sum(job.state == "finished" for job in fake.jobs.values()) >= wanted, 120)  # type: ignore[misc]
        victim = random.choice(list(stack.schedulers))
        process = stack.schedulers.pop(victim)
        process.kill()
        process.ended()
        time.sleep(random.random())
        stack.start_scheduler(victim)


def add_all(fake: FakeBuildkite, count: int) -> dict[str, str]:
    return {add(fake, KINDS[number % len(KINDS)]): KINDS[number % len(KINDS)] for number in range(count)}


@pytest.mark.parametrize("agent", ["fake", pytest.param("v3", marks=pytest.mark.long)])
def test_decide_200_jobs_with_the_scheduler_killed_ten_times_ends_each_as_it_was_decided(
    fake: FakeBuildkite, tmp_path: Path, agent: str
) -> None:
    settings = {"POLICY_FILE": write_policy(tmp_path), "LEASE_SECONDS": "5"}
    jobs = add_all(fake, 200 if LONG_RUN else 40)
    with StackProcesses(fake, tmp_path, agent_path(agent), **settings) as stack:
        stack.start_scheduler()
        start_workers(stack)
        kill_some(stack, fake, jobs, 10 if LONG_RUN else 3)
        wait_for_all(fake, jobs, 300)
        check_nothing_told(everywhere(stack, fake))


def test_decide_200_jobs_at_two_schedulers_on_one_redis_that_are_killed_ends_each_as_it_was_decided(
    fake: FakeBuildkite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    settings = {"POLICY_FILE": write_policy(tmp_path), "LEASE_SECONDS": "5", "REDIS_ADDR": redis.address}
    jobs = add_all(fake, 200 if LONG_RUN else 24)
    try:
        with StackProcesses(fake, tmp_path, agent_path("v3"), **settings) as stack:
            for number in (0, 1):
                stack.start_scheduler(number)
            start_workers(stack, *stack.urls[:2])
            kill_some(stack, fake, jobs, 10 if LONG_RUN else 2)
            wait_for_all(fake, jobs, 300)
            check_nothing_told(everywhere(stack, fake, (0, 1), redis))
    finally:
        redis.stop()


# -- the examples


def run_where(stack: StackProcesses, env: dict[str, str], **more: Any) -> FakeJob:
    """Run a job, and how it ended."""
    uuid = stack.fake.add_job(env=env, **more)
    wait(lambda: stack.fake.jobs[uuid].state == "finished")
    return stack.fake.jobs[uuid]


def test_retry_a_job_by_the_example_runs_it_on_another_host(fake: FakeBuildkite, tmp_path: Path) -> None:
    """Both hosts wait each time. Without the policy it is a that gets a job: it has fewer tags."""
    policy = str(EXAMPLES / "retry_elsewhere.py")
    with StackProcesses(fake, tmp_path, agent_path("fake"), POLICY_FILE=policy) as stack:
        stack.start_scheduler()
        stack.start_worker("a-1", WORKER_HOST="a")
        stack.start_worker("b-1", "queue=default,zone=b", WORKER_HOST="b")

        def tried(parallel_job: int, retry_count: int) -> FakeJob:
            """What Buildkite makes of a step that is run, and run again: jobs alike but for uuid and count."""
            wait(lambda: [each["state"] for each in stack.stats()["workers"]] == ["idle", "idle"])
            env = {"BUILDKITE_PARALLEL_JOB": str(parallel_job), "BUILDKITE_RETRY_COUNT": str(retry_count)}
            return run_where(stack, env, step_key="test", command="exit 3")

        first, retry = tried(0, 0), tried(0, 1)
        assert [(job.agent_name, job.exit_status) for job in (first, retry)] == [("a-1", 3), ("b-1", 3)]
        told = stack.job(retry.uuid)
        assert told["decision"]["avoid"] == ["host=a"] and told["retry_count"] == 1
        # That of another parallel index retries none of these.
        assert tried(1, 0).agent_name == "a-1"


#: podman's stand-in runs the agent beside itself, with what it was told to pass on.
PODMAN = """#!/bin/sh
while [ "$1" != image ]; do shift; done
shift
exec env IN_CONTAINER=yes {agent} "$@"
"""


def test_run_jobs_by_the_example_for_containers_runs_each_in_one_or_on_the_host_or_not(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    podman = tmp_path / "podman"
    podman.write_text(PODMAN.format(agent=agent_path("fake")))
    podman.chmod(0o755)
    slot = {"BUILDKITE_AGENT_PATH": str(EXAMPLES / "agent-in-container"), "PODMAN": str(podman), "AGENT_IMAGE": "image"}
    policy = str(EXAMPLES / "container_or_host.py")
    with StackProcesses(fake, tmp_path, agent_path("fake"), POLICY_FILE=policy) as stack:
        stack.start_scheduler()
        stack.start_worker("h-1", "queue=default,runtime=host", WORKER_HOST="h")
        stack.start_worker("h-2", "queue=default,runtime=container", WORKER_HOST="h", **slot)
        command = "echo in a container: ${IN_CONTAINER:-no}"
        inside, host = (run_where(stack, {}, pipeline=pipeline, command=command) for pipeline in ("app", "deploy"))
        assert (inside.agent_name, inside.log.strip()) == ("h-2", "in a container: yes")
        assert (host.agent_name, host.log.strip()) == ("h-1", "in a container: no")
        refused = run_where(stack, {"BUILDKITE_PLUGINS": '[{"docker#v5.9.0": {"image": "x"}}]'})
        assert refused.finish_detail == "only trusted pipelines use Docker on our machines: ask the platform team"


# -- the file changes, or is no good


def reload(stack: StackProcesses, text: str) -> None:
    assert stack.scheduler
    write_policy(stack.directory, text)
    stack.scheduler.send_signal(signal.SIGHUP)


def problems(stack: StackProcesses) -> str:
    return "\n".join(requests.get(f"{stack.url}/health", timeout=10).json()["problems"])


ALL = "def decide(job, fleet):\n    return {}\n"


def test_reload_a_policy_asks_about_all_that_wait_and_a_bad_file_leaves_the_old_one_in_force(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    write_policy(stack.directory, ALL.format("hold('not today', seconds=3600)"))
    held = add(fake, "run")
    scheduler = stack.start_scheduler()
    wait(lambda: stack.job(held).get("held_reason") == "held_by_policy")
    version = stack.job(held)["decision"]["policy"]
    reload(stack, "def decide(job, fleet)\n")
    told = f"does not load: SyntaxError at policy.py:1; version {version} stays in force"
    wait(lambda: told in problems(stack))
    status = subprocess.run(
        [*command("scheduler.py"), "status", "--server", stack.url], capture_output=True, text=True, check=False
    )
    assert status.returncode == EXIT_WRONG and told in " ".join(status.stdout.split())
    later = add(fake, "run")
    wait(lambda: stack.job(later).get("held_reason") == "held_by_policy")
    assert stack.job(later)["decision"]["policy"] == version
    reload(stack, ALL.format("run(priority=4)"))
    wait(lambda: (stack.job(held)["decision"] or {}).get("priority") == 4 and not stack.job(held)["held_by"])
    assert stack.job(held)["decision"]["policy"] != version
    assert problems(stack) == ""
    assert stack.job(held)["priority"] == 0
    start_workers(stack)
    wait(lambda: all(job.state == "finished" for job in fake.jobs.values()), 30)
    assert scheduler.poll() is None


def test_reload_a_policy_of_which_only_an_import_changed_decides_by_that_from_then_on(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    helper = stack.directory / "helper.py"
    helper.write_text("PRIORITY = 1\n")
    write_policy(stack.directory, "import helper\n" + ALL.format("run(priority=helper.PRIORITY)"))
    scheduler, before = stack.start_scheduler(), add(fake, "run")
    scheduler.wait_for_line("loaded", "version=")
    wait(lambda: bool(stack.job(before).get("decision")))
    helper.write_text("PRIORITY = 2  # and longer, for what Python has compiled\n")
    scheduler.send_signal(signal.SIGHUP)
    wait(lambda: sum("loaded policy=" in line for line in scheduler.lines) == 2)
    after = add(fake, "run")
    wait(lambda: bool(stack.job(after).get("decision")))
    # What was decided stands, for the file itself is the same.
    assert [stack.job(uuid)["decision"]["priority"] for uuid in (before, after)] == [1, 2]


def test_decide_a_job_of_a_queue_that_is_paused_asks_nothing_until_it_is_resumed(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    stack.start_scheduler()
    held = {"target": "queue:default", "note": "x"}
    assert requests.post(f"{stack.url}/holds", json=held, timeout=10).status_code == 200
    job = add(fake, "run")
    wait(lambda: stack.job(job).get("state") == "ready")
    lists = len(fake.calls_to("list"))
    fake.wait_for(lambda: len(fake.calls_to("list")) > lists + 5)
    assert fake.calls_to("get-job") == []
    assert requests.delete(f"{stack.url}/holds/queue:default", timeout=10).status_code == 200
    wait(lambda: (stack.job(job)["decision"] or {}).get("verb") == "run")


def test_start_with_a_policy_that_does_not_load_runs_nothing_and_says_so(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    write_policy(stack.directory, "import there_is_no_such_module\n")
    job = add(fake, "run")
    stack.start_scheduler()
    start_workers(stack)
    wait(lambda: "does not load: ModuleNotFoundError at policy.py:1; its jobs wait, undecided" in problems(stack))
    wait(lambda: stack.job(job).get("why") == "undecided")
    done = subprocess.run(
        [*command("scheduler.py"), "policy", "off", "--note", "it does not load", "--for", "1h", "--server", stack.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the policy is off until " in done.stdout
    wait(lambda: fake.jobs[job].state == "finished", 30)
    done = subprocess.run(
        [*command("scheduler.py"), "policy", "on", "--note", "x", "--server", stack.url],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "the policy decides\n"
    acts = requests.get(f"{stack.url}/fleet", timeout=10).json()["acts"]
    assert [(act["act"], act["note"]) for act in acts] == [("policy_on", "x"), ("policy_off", "it does not load")]
    later = add(fake, "run")
    wait(lambda: stack.job(later).get("why") == "undecided")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "POLICY_FILE: {path} cannot be read: No such file or directory"),
        ("x = 1 / 0\n", "POLICY_FILE: {path} does not load: ZeroDivisionError at policy.py:1"),
    ],
)
def test_check_a_policy_that_cannot_be_used_exits_78_and_says_why(
    stack: StackProcesses, text: str | None, told: str
) -> None:
    path = stack.directory / "policy.py"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    environ = stack.environment(POLICY_FILE=str(path), STATE_DIRECTORY=str(stack.directory / "state"))
    done = subprocess.run(
        [*command("scheduler.py"), "--check"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert told.format(path=path) in done.stderr


def test_decide_by_command_prints_the_decision_and_all_that_goes_wrong_to_the_operator(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    jobs = {kind: add(fake, kind) for kind in ("route", "raise")}
    stack.start_scheduler()
    wait(lambda: all(stack.job(uuid).get("decision") for uuid in jobs.values()))
    asked = [*command("scheduler.py"), "decide", "--server", stack.url]
    done = subprocess.run([*asked, jobs["route"]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [f"job {jobs['route']}: run, require ['host=h2']", "printed:", f"  {SECRET}"],
    )
    done = subprocess.run([*asked, jobs["raise"]], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"job {jobs['raise']}: the policy failed: KeyError at policy.py:20\ntraceback:\n" in done.stdout
    assert f"KeyError: '{SECRET}'" in done.stdout


def test_share_a_redis_with_a_scheduler_that_has_another_policy_is_a_problem_until_it_is_reloaded(
    fake: FakeBuildkite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    (tmp_path / "other").mkdir()
    here, there = write_policy(tmp_path, ALL.format("run()")), write_policy(tmp_path / "other", ALL.format("hold('x')"))
    try:
        with StackProcesses(fake, tmp_path, agent_path("fake"), POLICY_FILE=here, REDIS_ADDR=redis.address) as stack:
            stack.start_scheduler()
            other = stack.start_scheduler(1, POLICY_FILE=there)
            wait(lambda: "has another POLICY_FILE (" in problems(stack))
            # One that follows has its file loaded too, and takes it over when that can be done.
            write_policy(tmp_path / "other", "x = 1 / 0\n")
            other.send_signal(signal.SIGHUP)
            other.wait_for_line("unloaded", "ZeroDivisionError at policy.py:1", "stays in force")
            write_policy(tmp_path / "other", ALL.format("run()"))
            other.send_signal(signal.SIGHUP)
            wait(lambda: problems(stack) == "")
    finally:
        redis.stop()


def test_suspend_the_policy_at_a_scheduler_that_follows_binds_the_one_that_leads(
    fake: FakeBuildkite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    write_policy(tmp_path, "x = 1 / 0\n")
    settings = {"POLICY_FILE": str(tmp_path / "policy.py"), "REDIS_ADDR": redis.address}
    try:
        with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
            leader = stack.start_scheduler()
            wait(lambda: redis.leader_pid() == leader.pid)
            stack.start_scheduler(1)
            job = add(fake, "run")
            wait(lambda: stack.job(job).get("why") == "undecided")
            told = {"state": "off", "note": "it does not load", "seconds": 3600}
            assert requests.post(f"{stack.urls[1]}/policy", json=told, timeout=10).status_code == 200
            # No worker claims, so nothing but the leader itself looks at what was said.
            wait(lambda: not stack.job(job)["held_by"])
            assert "the policy is suspended: policy_off by the operator" in problems(stack)
            told = {"state": "on", "note": "it is to be mended"}
            assert requests.post(f"{stack.urls[1]}/policy", json=told, timeout=10).json()["was"] == "off"
            wait(lambda: stack.job(job).get("why") == "undecided")
    finally:
        redis.stop()


# -- one job never holds up another


def test_decide_a_job_for_ever_delays_that_job_alone(stack: StackProcesses, fake: FakeBuildkite) -> None:
    text = "def decide(job, fleet):\n    while job.env['KIND'] == 'hang': pass\n    return run()\n"
    write_policy(stack.directory, text)
    hangs = [add(fake, "hang", priority=9) for _ in range(2)]
    others = [add(fake, "run") for _ in range(20)]
    stack.start_scheduler()
    start_workers(stack)
    wait(lambda: all(fake.jobs[uuid].state == "finished" for uuid in others), 30)
    for uuid in hangs:
        assert stack.job(uuid)["decision"]["reason"] == "took too long at policy.py:2"


class Impatient(StackProcesses):
    """Its scheduler asks again, after a failure of the policy, in a second and not in a minute."""

    def scheduler_command(self) -> list[str]:
        quick = "scheduler.FAILED_SECONDS = scheduler.MAX_FAILED_SECONDS = 1.0"
        return [
            *(sys.executable, "-c"),
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import scheduler; {quick}; sys.exit(scheduler.main([]))",
        ]


def test_decide_a_job_that_hung_asks_again_in_a_second_process_that_delays_no_other(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    write_policy(
        tmp_path,
        "import os, pathlib\ndef decide(job, fleet):\n"
        f"    here = pathlib.Path({str(tmp_path)!r})\n"
        "    (here / f'{job.env[\"KIND\"]}-{os.getpid()}').touch()\n"
        "    while job.env['KIND'] == 'hang' and not (here / 'mended').exists(): pass\n"
        "    return run()\n",
    )

    def processes(kind: str) -> set[str]:
        return {path.name.partition("-")[2] for path in tmp_path.glob(f"{kind}-*")}

    hangs = add(fake, "hang")
    with Impatient(fake, tmp_path, agent_path("fake"), POLICY_FILE=str(tmp_path / "policy.py")) as stack:
        stack.start_scheduler()
        start_workers(stack)
        wait(lambda: len(processes("hang")) == 2 and stack.job(hangs)["decision"]["failures"] >= 3)
        for _ in range(3):
            job = add(fake, "run")
            wait(lambda job=job: fake.jobs[job].state == "finished")  # type: ignore[misc]
        # All others are asked about in the process where it hung first, and in no third one.
        assert len(processes("run")) == 1
        assert processes("run") < processes("hang")
        assert stack.job(hangs)["why"] == "policy_failed"
        (tmp_path / "mended").touch()
        wait(lambda: fake.jobs[hangs].state == "finished")


def test_decide_beside_a_burst_of_another_queue_is_not_delayed(fake: FakeBuildkite, tmp_path: Path) -> None:
    burst = 200
    write_policy(
        tmp_path,
        "import time\ndef decide(job, fleet):\n    if job.queue == 'burst': time.sleep(0.05)\n    return run()\n",
    )
    for number in range(burst):
        add(fake, "run", queue="burst", scheduled_at=1_800_000_000.0 + number)
    # At first its specs do not come: then no more are asked for.
    fake.set_fault("get-job", hang=math.inf, match=lambda key, request: key == "test-burst")
    settings = {"POLICY_FILE": str(tmp_path / "policy.py"), "SCHEDULER_QUEUES": "burst,default"}
    with StackProcesses(fake, tmp_path, agent_path("fake"), **settings) as stack:
        stack.start_scheduler()
        start_workers(stack)
        fake.wait_for(lambda: unanswered(fake, "test-burst") == SPECS_AT_ONCE)
        job = add(fake, "run")
        wait(lambda: fake.jobs[job].state == "finished")
        assert unanswered(fake, "test-burst") == SPECS_AT_ONCE == 16
        fake.clear_faults()
        fake.release_hangs()
        # Now the policy takes 10 s for all of the burst: each of the others is asked about in turn with it.
        wait(lambda: len(asked_for(fake, "test-burst")) > 2 * SPECS_AT_ONCE)
        for _ in range(2):
            job = add(fake, "run")
            wait(lambda job=job: fake.jobs[job].state == "finished")  # type: ignore[misc]
        assert len(asked_for(fake, "test-burst")) < burst  # it was still under way


def asked_for(fake: FakeBuildkite, key: str) -> list[Call]:
    """The calls of this stack for specs."""
    return [call for call in fake.calls_to("get-job") if call.stack_key == key]


def unanswered(fake: FakeBuildkite, key: str) -> int:
    """How many of them have no answer yet."""
    return sum(call.status is None for call in asked_for(fake, key))


def test_decide_a_job_whose_spec_cannot_be_had_delays_that_job_alone(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    poison = add(fake, "run", priority=9)
    fake.set_fault("get-job", status=500, match=lambda key, request: request.params["uuid"] == poison)
    stack.start_scheduler()
    start_workers(stack)
    for _ in range(3):
        job = add(fake, "run")
        wait(lambda job=job: fake.jobs[job].state == "finished", 20)  # type: ignore[misc]
    assert stack.job(poison)["why"] == "undecided"
    fake.clear_faults()
    wait(lambda: fake.jobs[poison].state == "finished", 60)


def wait(true: Callable[[], bool], timeout: float = 20) -> None:
    ends_at = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < ends_at, true
        time.sleep(0.05)
