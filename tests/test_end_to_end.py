"""The main job end to end, in real processes: Buildkite → scheduler.py → worker.py → the agent → Buildkite."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fake_buildkite import FakeBuildkite, Request
from processes import ROOT, Process, StackProcesses, agent_path, command, free_port
from test_docs import blocks


@pytest.fixture(params=["fake", "v3", "v4"])
def stack(request: pytest.FixtureRequest, fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path(request.param)) as processes:
        yield processes


def all_in(fake: FakeBuildkite, uuids: list[str], *states: str) -> bool:
    return all(fake.jobs[uuid].state in states for uuid in uuids)


WORKERS = {
    "linux-1": {"queue=default", "os=linux", "arch=amd64"},
    "linux-2": {"queue=default", "os=linux", "arch=arm64"},
    "docker-1": {"queue=default", "os=linux", "arch=amd64", "docker=true"},
    "mac-1": {"queue=default", "os=mac", "arch=arm64"},
    "mac-2": {"queue=default", "os=mac", "arch=arm64", "xcode=16"},
}


def test_run_thirty_jobs_on_five_workers_runs_each_once_where_it_matches(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    wanted = [["os=linux"], ["os=mac"], ["arch=arm64"], ["queue=default", "docker=true"], ["xcode=16"], []]
    jobs = {
        fake.add_job(rules=wanted[n % 6], priority=n % 3, command=f"echo this is job {n}; exit {n % 4}"): n
        for n in range(30)
    }
    stack.start_scheduler()
    for name, tags in WORKERS.items():
        stack.start_worker(name, ",".join(sorted(tags)))
    fake.wait_for(lambda: all_in(fake, list(jobs), "finished"), timeout=90)
    for uuid, n in jobs.items():
        job = fake.jobs[uuid]
        assert job.happened("acquired") == 1
        assert job.happened("acquire_rejected") == 0
        assert set(wanted[n % 6]) <= WORKERS[job.agent_name or ""]
        assert job.exit_status == n % 4
        assert f"this is job {n}" in job.log
    assert {fake.jobs[uuid].agent_name for uuid in jobs} == set(WORKERS)


def test_cancel_running_job_cancels_it_and_the_worker_goes_on(stack: StackProcesses, fake: FakeBuildkite) -> None:
    first = fake.add_job(command="echo begun; exec sleep 300")
    second = fake.add_job(command="echo next", priority=-1)
    stack.start_scheduler()
    stack.start_worker("only")
    fake.wait_for(lambda: "begun" in fake.jobs[first].log, timeout=30)
    fake.cancel_job(first)
    fake.wait_for(lambda: all_in(fake, [first], "canceled") and all_in(fake, [second], "finished"), timeout=30)
    assert fake.jobs[first].happened("acquired") == 1
    assert fake.jobs[second].exit_status == 0


@pytest.mark.long
@pytest.mark.parametrize("version", ["v3", "v4"])
def test_wait_for_an_agent_that_is_paused_at_buildkite_is_told_of_until_it_is_resumed(
    fake: FakeBuildkite, tmp_path: Path, version: str
) -> None:
    with StackProcesses(fake, tmp_path, agent_path(version)) as stack:
        first = fake.add_job(command="echo one")
        scheduler = stack.start_scheduler()
        fake.ping = {"action": "pause", "message": "maintenance"}
        stack.start_worker("only")
        fake.wait_for(lambda: all_in(fake, [first], "finished"), timeout=30)
        scheduler.wait_for_line("ran", first)
        second = fake.add_job(command="echo two")
        scheduler.wait_for_line("ready", second)

        def told() -> Any:
            answer = requests.get(f"{stack.url}/fleet", timeout=10).json()
            (worker,) = answer["hosts"][0]["workers"]
            return worker if "paused at Buildkite" in (worker["reason"] or "") else None

        worker = fake.wait_for(told, timeout=60)
        assert (worker["state"], worker["name"]) == ("working", "only")
        assert fake.jobs[second].happened("acquired") == 0
        fake.ping = {}
        fake.wait_for(lambda: all_in(fake, [second], "finished"), timeout=30)
        assert fake.jobs[first].happened("acquired") == 1


def test_cancel_waiting_job_never_starts_it(stack: StackProcesses, fake: FakeBuildkite) -> None:
    waiting = fake.add_job(command="echo never", rules=["os=linux"])
    scheduler = stack.start_scheduler()
    fake.wait_for(lambda: fake.jobs[waiting].state == "reserved")
    fake.cancel_job(waiting)
    scheduler.wait_for_line("dropped", waiting)
    other = fake.add_job(command="echo instead", rules=["os=linux"])
    stack.start_worker("late", "queue=default,os=linux")
    fake.wait_for(lambda: all_in(fake, [other], "finished"), timeout=30)
    assert fake.jobs[waiting].happened("acquired") == 0
    assert fake.jobs[waiting].happened("acquire_rejected") == 0
    assert fake.jobs[waiting].state == "canceled"


@pytest.fixture
def quick_stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    """With the stand-in agent: for what does not depend on the agent."""
    with StackProcesses(fake, tmp_path, agent_path("fake"), SCHEDULER_QUEUES="default,gpu") as processes:
        yield processes


def test_pause_queue_hands_out_nothing_until_it_is_resumed(quick_stack: StackProcesses, fake: FakeBuildkite) -> None:
    held = fake.add_job(command="echo held")
    scheduler = quick_stack.start_scheduler()
    scheduler.wait_for_line("ready", held)
    fake.pause_queue("default")
    scheduler.wait_for_line("paused", "queue=default")
    late = fake.add_job(command="echo late")
    other = fake.add_job(command="echo other", queue="gpu", rules=["queue=gpu"])
    quick_stack.start_worker("cpu")
    quick_stack.start_worker("gpu", "queue=gpu")
    fake.wait_for(lambda: all_in(fake, [other], "finished"))
    assert fake.jobs[held].happened("acquired") == 0
    assert fake.jobs[late].happened("reserved") == 0
    fake.resume_queue("default")
    fake.wait_for(lambda: all_in(fake, [held, late], "finished"))


def test_claim_by_order_runs_priority_first_then_age(quick_stack: StackProcesses, fake: FakeBuildkite) -> None:
    now = fake.clock()
    wanted = [(5, 30), (5, 10), (0, 90), (0, 20), (-1, 99)]
    uuids = [fake.add_job(priority=priority, scheduled_at=now - age) for priority, age in reversed(wanted)]
    scheduler = quick_stack.start_scheduler()
    for uuid in uuids:
        scheduler.wait_for_line("ready", uuid)
    quick_stack.start_worker("only")
    fake.wait_for(lambda: all_in(fake, uuids, "finished"), timeout=30)
    acquired = {uuid: next(at for at, what, _ in fake.jobs[uuid].history if what == "acquired") for uuid in uuids}
    assert sorted(uuids, key=acquired.__getitem__) == list(reversed(uuids))


def test_wait_for_job_nobody_can_run_stands_in_no_ones_way(quick_stack: StackProcesses, fake: FakeBuildkite) -> None:
    stuck = fake.add_job(rules=["os=plan9"], priority=100)
    good = fake.add_job(rules=["os=linux"])
    quick_stack.start_scheduler()
    quick_stack.start_worker("linux", "os=linux")
    fake.wait_for(lambda: all_in(fake, [good], "finished"))
    assert fake.jobs[stuck].state == "reserved"
    fake.wait_for(lambda: quick_stack.stats()["queues"] == {"queue=default,os=plan9": 1})  # once it knows of the other


def test_run_jobs_that_are_listed_oddly_runs_each_that_has_an_id(
    quick_stack: StackProcesses, fake: FakeBuildkite
) -> None:
    fields: list[dict[str, object]] = [
        {"scheduled_at": "0001-01-01T00:00:00+10:00"},
        {"scheduled_at": "9999-12-31T23:59:59-10:00"},
        {"step": {"key": "build", "label": "x" * 1_500_000}, "build": {"branch": "x" * 1_500_000}},
        {"priority": "5", "agent_query_rules": None, "scheduled_at": "soon"},
        {"agent_query_rules": ["queue=default", "*=gpu"], "priority": 7},
        {},
    ]
    odd = {fake.add_job(command="echo hi"): each for each in fields}
    *fine, unread, _ = odd

    def answer(request: Request) -> Any:
        page = fake.answer(request).body
        for job in page["jobs"]:
            job.update(odd[job["id"]])
        page["jobs"].insert(0, {"id": None})
        return page

    fake.set_fault("list", body=answer)
    scheduler = quick_stack.start_scheduler()
    quick_stack.start_worker("only")
    fake.wait_for(lambda: all_in(fake, [uuid for uuid in odd if uuid != unread], "finished"), timeout=30)
    assert all(fake.jobs[uuid].happened("acquired") == 1 for uuid in fine)
    assert (fake.jobs[unread].state, quick_stack.job(unread)["why"]) == ("reserved", "rules_not_understood")
    problems = requests.get(f"{quick_stack.url}/health", timeout=30).json()["problems"]
    assert [problem for problem in problems if "listed jobs that are skipped: 1" in problem]
    assert [problem for problem in problems if "queue=default,*=gpu" in problem]
    assert not [line for line in scheduler.lines if "a bug of the scheduler" in line]
    assert max(map(len, scheduler.lines)) < 2_000


def test_read_log_of_a_job_tells_its_whole_life(quick_stack: StackProcesses, fake: FakeBuildkite) -> None:
    uuid = fake.add_job(command="echo hello")
    scheduler = quick_stack.start_scheduler()
    worker = quick_stack.start_worker("only")
    scheduler.wait_for_line(" ran ", uuid)
    words = [match[1] for line in scheduler.lines if (match := re.search(rf" (\w+) job={uuid}", line))]
    assert [word for word in words if word != "running"] == ["put", "ready", "claimed", "completed", "ran"]
    worker.wait_for_line("completed", uuid)
    words = [match[1] for line in worker.lines if (match := re.search(rf" (\w+) job={uuid}", line))]
    assert [word for word in words if word != "output"] == ["claimed", "started", "exited", "completed"]


def test_start_processes_puts_the_token_on_no_command_line(quick_stack: StackProcesses, fake: FakeBuildkite) -> None:
    uuid = fake.add_job(command="cat /proc/[0-9]*/cmdline | tr '\\0' ' ' || true; env")
    scheduler = quick_stack.start_scheduler()
    worker = quick_stack.start_worker("only")
    fake.wait_for(lambda: all_in(fake, [uuid], "finished"))
    assert "worker.py" in fake.jobs[uuid].log
    logs = "\n".join([*scheduler.lines, *worker.lines])
    assert fake.token not in fake.jobs[uuid].log + logs


def test_run_the_worker_of_the_api_document_serves_one_job_after_the_other(fake: FakeBuildkite, tmp_path: Path) -> None:
    (text,) = blocks("py")
    (tmp_path / "mine.py").write_text(text)
    with StackProcesses(fake, tmp_path, agent_path("fake"), STACK_API_TOKEN="secret-1", LEASE_SECONDS="3") as stack:
        stack.start_scheduler()
        uuids = [fake.add_job(command=command) for command in ("sleep 2", "true")]
        stack.worker_command = [sys.executable, str(tmp_path / "mine.py")]
        place = str(tmp_path / "builds")
        stack.start_worker("mine", BUILDKITE_AGENT_TOKEN="", STACK_API_TOKEN="secret-1", BUILDKITE_BUILD_PATH=place)
        fake.wait_for(lambda: all_in(fake, uuids, "finished"))
        assert [fake.jobs[uuid].exit_status for uuid in uuids] == [0, 0]
        headers = {"Authorization": "Bearer secret-1"}
        known = [requests.get(f"{stack.url}/jobs/{uuid}", headers=headers, timeout=30).json() for uuid in uuids]
        assert [(job["claims"], job["worker"]) for job in known] == [(1, "mine-1")] * 2


# --- What the README tells a newcomer to run ---


def test_run_demo_ends_well_and_shows_every_job() -> None:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("BUILDKITE_")}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "demo.py"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Every job ended as it should." in run.stdout
    assert re.search(r"^failing +0 +os=linux +linux-\d .* 3$", run.stdout, re.MULTILINE)
    assert re.search(r"^nobody +0 +os=plan9 +- .* waiting$", run.stdout, re.MULTILINE)
    assert re.search(r"^legacy 3 +0 +queue=legacy,os=linux +legacy-1 .* 0$", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_run_pair_serves_jobs_until_interrupted(fake: FakeBuildkite, tmp_path: Path, number: int) -> None:
    port = free_port()
    settings = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "BUILDKITE_AGENT_TOKEN": fake.token,
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "BUILDKITE_AGENT_PATH": agent_path("fake"),
        "STATE_DIRECTORY": str(tmp_path / "scheduler"),
        "WORKER_STATE": str(tmp_path / "worker"),
        "LISTEN": f"127.0.0.1:{port}",
        "WORKER_API_SERVER": f"http://127.0.0.1:{port}",
    }
    uuid = fake.add_job(command="echo hi")
    pair = Process(command("tests/run_pair.py"), settings, tmp_path, tmp_path / "log")
    try:
        fake.wait_for(lambda: fake.jobs[uuid].state == "finished", timeout=30)
        pair.wait_for_line("ran", f"job={uuid}")  # until the scheduler knows that too, the stack holds a job
        token = tmp_path / "scheduler" / "api-token"
        assert token.stat().st_mode & 0o777 == 0o600
        stats, shown = f"http://127.0.0.1:{port}/stats", {"Authorization": f"Bearer {token.read_text().strip()}"}
        assert [requests.get(stats, headers=headers, timeout=30).status_code for headers in ({}, shown)] == [401, 200]
        operators = tmp_path / "scheduler" / "operator-token"
        assert operators.stat().st_mode & 0o777 == 0o600
        environ = settings | {"OPERATOR_TOKEN_FILE": str(operators)}
        subprocess.run([*command("scheduler.py"), "status"], env=environ, check=True, timeout=30)
        for secret in (token, operators):
            assert secret.read_text().strip() not in "\n".join(pair.lines)
        # As a terminal does at Ctrl-C and at its end: the worker shares the process group, the scheduler does not.
        worker = int(pair.wait_for_line("worker.py has pid").rpartition(" ")[2])
        os.kill(worker, number)
        pair.send_signal(number)
        assert pair.ended() == 0
    finally:
        pair.kill()
    assert fake.calls_to("deregister")


def test_run_pair_without_a_token_says_what_to_do(tmp_path: Path) -> None:
    if (ROOT / ".env").exists():
        pytest.skip("this checkout has a .env")
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "run_pair.py"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 78
    assert "install -m 600 .env.example .env" in run.stderr
