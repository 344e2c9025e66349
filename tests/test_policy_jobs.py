"""Jobs through a policy, in real processes: each ends as it was decided, and nothing of what it would run is kept."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_buildkite import FakeBuildkite, FakeJob
from processes import StackProcesses, agent_path

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
