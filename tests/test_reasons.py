"""Each reason why a job waits, made to happen with real processes, and read where people read it: from the job's route
and from the command `why`."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

import fake_buildkite
import scheduler
from fake_buildkite import FakeBuildkite, Reply, Request
from processes import StackProcesses, agent_path, compiled, wait_until
from test_desk import set_clock

__all__ = ["set_clock"]  # a fixture

POLICY = """
    def decide(job, fleet):
        if job.queue == "held_by_policy":
            return hold("not before noon", seconds=3600)
        if job.queue == "policy_failed":
            raise KeyError("no such thing")
        if job.queue == "prefers_elsewhere":
            return run(avoid=["host=h1"], for_seconds=600)
        return run()
"""
WINDOW = """
    [[freeze]]
    name = "a century"
    queues = ["frozen"]
    from = 2000-01-01
    until = 2100-01-01
    zone = "UTC"
"""


class Scene:
    """A scheduler, with one queue for each reason, and workers that are made up over HTTP. A queue has its reason's
    name, unless it is told otherwise."""

    def __init__(self, stack: StackProcesses):
        self.stack, self.fake = stack, stack.fake

    def add_job(self, queue: str, *rules: str, **more: Any) -> str:
        return self.fake.add_job(queue, [f"queue={queue}", *rules], **more)

    def ask(self, method: str, path: str, worker: str = "", body: Any = None) -> requests.Response:
        """`worker` claims, or tells of itself: w1 is on host h1, in a session of its own."""
        headers = {"X-Worker-ID": worker, "X-Worker-Session": "a", "X-Worker-Host": "h1"} if worker else {}
        reply = requests.request(method, f"{self.stack.url}{path}", json=body, headers=headers, timeout=90)
        assert reply.status_code in (200, 204), reply.text
        return reply

    def claim(self, queue: str, worker: str, wait: int = 0, more: str = "") -> Any:
        """The job that the worker gets, or None."""
        reply = self.ask("GET", f"/jobs?query=queue={queue}&wait={wait}{more}", worker)
        return reply.json() if reply.status_code == 200 else None

    def see(self, queue: str, more: str = "") -> str:
        """A worker of the queue has claimed, and there was nothing for it. Returns its name."""
        assert self.claim(queue, name := f"{queue}-w1", more=more) is None
        return name

    def wait_until_ready(self, uuid: str) -> None:
        wait_until(lambda: self.stack.job(uuid).get("state") == "ready", f"job {uuid} is not ready")

    def break_endpoint(self, endpoint: str, queue: str, **how: Any) -> None:
        """For this queue's stack alone."""
        self.fake.set_fault(endpoint, match=lambda key, _: key == f"test-{queue}", **how)

    def why(self, uuid: str) -> str:
        """What the command `why` writes, in a process of its own."""
        words = [*compiled("scheduler.py"), "why", uuid, "--server", self.stack.url]
        env = {"PATH": os.environ["PATH"], "TZ": "UTC"}
        done = subprocess.run(words, cwd="/", env=env, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def shows(self, uuid: str, why: str, by: str | None = None) -> str:
        """Job and command show this reason; returns what the job says of it."""
        told: Mapping[str, Any] = {}

        def is_told() -> bool:
            nonlocal told
            told = self.stack.job(uuid)
            return (told.get("why"), told.get("by")) == (why, by)

        wait_until(is_told, f"job {uuid} does not wait for {why}, by {by}")
        line = next(line for line in self.why(uuid).splitlines() if line.startswith("  why: "))
        assert line.startswith(f"  why: {why}: ")
        return str(told["why_text"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("reasons")
    settings = {"SCHEDULER_QUEUES": ",".join([*REASONS, "paused_by_us"]), "POLL_INTERVAL": "500ms"}
    settings["ACQUIRE_SECONDS"] = "5"
    for name, text in (("POLICY_FILE", POLICY), ("STACK_FILE", WINDOW)):
        (directory / name).write_text(textwrap.dedent(text))
        settings[name] = str(directory / name)
    # Real limits would make the registration of so many stacks take seconds.
    with (
        FakeBuildkite(rate_limits=False) as fake,
        StackProcesses(fake, directory, agent_path("fake"), **settings) as it,
    ):
        it.start_scheduler()
        yield Scene(it)


# Each makes a job wait, looks at it, and may look at what ends the wait.


def wait_for_its_turn(scene: Scene) -> None:
    scene.see("ahead")
    first, second = scene.add_job("ahead", priority=5), scene.add_job("ahead")
    scene.wait_until_ready(first)
    assert scene.shows(second, "ahead") == "next in line: 1 matching worker is free"
    wait_until(lambda: "ahead of it, with the same rules: 1" in scene.why(second))


def wait_for_buildkite_to_reserve_it(scene: Scene) -> None:
    scene.see("reserving")
    scene.break_endpoint("reserve", "reserving", hang=5)
    uuid = scene.add_job("reserving")
    scene.shows(uuid, "reserving")
    scene.shows(uuid, "ahead")


def wait_for_buildkite_to_answer(scene: Scene) -> None:
    scene.see("upstream_down")
    scene.break_endpoint("reserve", "upstream_down", status=503)
    assert "503 from Buildkite" in scene.shows(scene.add_job("upstream_down"), "upstream_down")


def wait_for_the_policy(scene: Scene) -> None:
    scene.see("undecided")
    scene.break_endpoint("get-job", "undecided", status=503)  # without its spec the policy cannot be asked
    scene.shows(scene.add_job("undecided"), "undecided")


def wait_because_the_policy_says_so(scene: Scene) -> None:
    scene.see("held_by_policy")
    text = scene.shows(scene.add_job("held_by_policy"), "held_by_policy")
    assert text.endswith(": not before noon")


def wait_because_the_policy_failed(scene: Scene) -> None:
    scene.see("policy_failed")
    text = scene.shows(scene.add_job("policy_failed"), "policy_failed")
    assert "KeyError" in text and "no such thing" not in text


def wait_for_another_worker_than_there_is(scene: Scene) -> None:
    scene.see("prefers_elsewhere")
    assert "host=h1" in scene.shows(scene.add_job("prefers_elsewhere"), "prefers_elsewhere")


def wait_for_the_end_of_a_window(scene: Scene) -> None:
    scene.see("frozen")
    text = scene.shows(scene.add_job("frozen"), "frozen")
    assert text == "freeze window 'a century' holds it until 2100-01-01T00:00:00.000Z"


def wait_for_the_queue(scene: Scene) -> None:
    """Paused at Buildkite, and another by an operator."""
    scene.see("queue_paused")
    uuid = scene.add_job("queue_paused")
    scene.wait_until_ready(uuid)
    scene.fake.pause_queue("queue_paused")
    assert scene.shows(uuid, "queue_paused", "buildkite") == "queue queue_paused is paused"
    scene.fake.resume_queue("queue_paused")
    scene.shows(uuid, "ahead")
    scene.see("paused_by_us")
    scene.ask("POST", "/holds", body={"target": "queue:paused_by_us", "note": "disk swap"})
    text = scene.shows(scene.add_job("paused_by_us"), "queue_paused", "operator")
    assert text.endswith(": disk swap")


def wait_until_it_is_runnable(scene: Scene) -> None:
    scene.see("runnable_at")
    at = scheduler.rfc3339(time.time() + 3600)

    def with_time(request: Request) -> Any:
        listed: Reply = fake_buildkite.list_scheduled_jobs(scene.fake, request)
        return listed.body | {"jobs": [job | {"runnable_at": at} for job in listed.body["jobs"]]}

    scene.break_endpoint("list", "runnable_at", body=with_time)
    text = scene.shows(scene.add_job("runnable_at"), "runnable_at")
    assert text == f"Buildkite says that it may not run before {at}"


def wait_with_rules_that_nobody_understands(scene: Scene) -> None:
    scene.see("rules_not_understood")
    uuid = scene.add_job("rules_not_understood", "=gpu")
    assert scene.shows(uuid, "rules_not_understood").endswith(" not understood, so no worker matches")


def wait_for_a_worker(scene: Scene) -> None:
    name = scene.see("no_worker")
    uuid = scene.add_job("no_worker", "gpu=a100")
    assert scene.shows(uuid, "no_worker") == "no live worker of queue no_worker has gpu=a100"
    wait_until(lambda: f"  not {name}: it has no gpu=a100" in scene.why(uuid))


def wait_for_workers_that_work(scene: Scene) -> None:
    scene.add_job("workers_busy")
    assert scene.claim("workers_busy", "workers_busy-w1", wait=30)
    assert scene.shows(scene.add_job("workers_busy"), "workers_busy") == "all matching workers are busy: 1"


def wait_for_workers_that_are_paused(scene: Scene) -> None:
    name = scene.see("workers_paused")
    scene.ask("POST", "/holds", body={"target": f"worker:{name}", "note": "disk swap"})
    text = scene.shows(scene.add_job("workers_paused"), "workers_paused")
    assert text.startswith(f"all matching workers are paused: 1, so worker:{name} paused by")


def wait_for_workers_that_are_unfit(scene: Scene) -> None:
    name = scene.see("workers_unfit")
    scene.ask("POST", f"/workers/{name}", name, {"state": "unfit", "reason": "/builds has 3 MiB free"})
    text = scene.shows(scene.add_job("workers_unfit"), "workers_unfit")
    assert text == f"all matching workers are unfit: 1; {name} on h1: /builds has 3 MiB free"


def wait_for_workers_whose_agents_failed(scene: Scene) -> None:
    uuid, name = scene.add_job("workers_failing"), "workers_failing-w1"
    for _ in range(3):  # 2 and 4 s without a job, and then 8: long enough to be looked at
        job = scene.claim("workers_failing", name, wait=30)
        scene.ask("POST", f"/jobs/{uuid}/complete", name, {"claim": job["claim"], "exit_status": 1})
    text = scene.shows(uuid, "workers_failing")
    assert text.startswith(f"all matching workers are failing: 1; {name} on h1: 3 of its agents in a row ended")


def wait_for_tokens(scene: Scene) -> None:
    scene.break_endpoint("job-tokens", "no_tokens", status=503, headers={"Retry-After": "60"})
    uuid = scene.add_job("no_tokens")
    assert scene.claim("no_tokens", "no_tokens-w1", wait=2, more="&token=1") is None
    assert scene.shows(uuid, "no_tokens").startswith("Buildkite gives no job acquisition tokens")


def wait_aside(scene: Scene) -> None:
    """Each answer to a claim gets lost, for longer than ACQUIRE_SECONDS, three times."""
    uuid = scene.add_job("put_aside")

    def is_put_aside() -> bool:
        scene.claim("put_aside", "put_aside-w1")
        return bool(scene.stack.job(uuid).get("why") == "put_aside")

    wait_until(is_put_aside, seconds=60)
    text = scene.shows(uuid, "put_aside")
    assert text.endswith("because its last claims ended with: expire: its worker never got the answer")


def wait_to_be_stopped(scene: Scene) -> None:
    scene.see("stopping")
    scene.break_endpoint("finish", "stopping", status=503)
    uuid = scene.add_job("stopping")
    scene.wait_until_ready(uuid)
    scene.ask("POST", f"/jobs/{uuid}/stop", body={"note": "wrong branch"})
    assert scene.shows(uuid, "stopping").endswith(": wrong branch")


REASONS: Mapping[str, Callable[[Scene], None]] = {
    "ahead": wait_for_its_turn,
    "reserving": wait_for_buildkite_to_reserve_it,
    "upstream_down": wait_for_buildkite_to_answer,
    "undecided": wait_for_the_policy,
    "held_by_policy": wait_because_the_policy_says_so,
    "policy_failed": wait_because_the_policy_failed,
    "prefers_elsewhere": wait_for_another_worker_than_there_is,
    "frozen": wait_for_the_end_of_a_window,
    "queue_paused": wait_for_the_queue,
    "runnable_at": wait_until_it_is_runnable,
    "rules_not_understood": wait_with_rules_that_nobody_understands,
    "no_worker": wait_for_a_worker,
    "workers_busy": wait_for_workers_that_work,
    "workers_paused": wait_for_workers_that_are_paused,
    "workers_unfit": wait_for_workers_that_are_unfit,
    "workers_failing": wait_for_workers_whose_agents_failed,
    "no_tokens": wait_for_tokens,
    "put_aside": wait_aside,
    "stopping": wait_to_be_stopped,
}
TAKES_LONG = ("put_aside",)


@pytest.mark.parametrize(
    "why", [pytest.param(why, marks=[pytest.mark.long] if why in TAKES_LONG else []) for why in REASONS]
)
def test_wait_of_a_job_shows_its_reason_at_the_route_and_in_the_command(scene: Scene, why: str) -> None:
    REASONS[why](scene)


def test_wait_of_a_job_whose_workers_fell_silent_shows_that_they_are_offline(
    fake: FakeBuildkite, tmp_path: Path, set_clock: Callable[[float], dict[str, Any]]
) -> None:
    """With a scheduler of its own, whose clock is set on."""
    with StackProcesses(fake, tmp_path, agent_path("fake")) as stack:
        process, scene = stack.start_scheduler(**set_clock(0.0)), Scene(stack)
        scene.see("default")
        uuid = scene.add_job("default")
        scene.shows(uuid, "ahead")
        set_clock(scheduler.OFFLINE_SECONDS + 1)
        process.wait_for_line("clock", f"step_s={scheduler.OFFLINE_SECONDS + 1:.0f}")
        text = scene.shows(uuid, "workers_offline")
        assert text.startswith("1 worker matches, it is offline since 2") and text.endswith("default-w1 on h1")
        status = [*compiled("scheduler.py"), "status", "--server", stack.url]
        told = subprocess.run(status, capture_output=True, text=True, timeout=60, check=False)
        assert told.returncode == 2
        assert re.search(
            r"^wrong: see `why default-w1`: 1 worker is offline since [\d: -]+\d$", told.stdout, re.MULTILINE
        )
        metrics = requests.get(f"{stack.url}/metrics", timeout=30).text
        assert 'stack_workers{state="offline"} 1.0' in metrics
        # It comes back.
        assert scene.claim("default", "default-w1", wait=30)["uuid"] == uuid


def test_list_of_reasons_has_every_one_made_to_happen() -> None:
    assert {*REASONS, "workers_offline"} == {*scheduler.WaitReason}
