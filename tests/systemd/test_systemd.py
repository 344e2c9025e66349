"""The units, `systemd/install`, and the two scripts under them, in a real systemd with the real agent.

Every test boots a machine of its own (a third of a second), installs on it as an administrator does, and points it at
a fake Buildkite out here.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fake_buildkite import FakeBuildkite
from machine import Machine, wait_for
from processes import ROOT, RedisServer, StackProcesses, agent_path, free_port

AGENT_TOKEN = "bkct_the-agent-token-of-the-cluster"
#: Said by a job's command; the file that it waits for.
BUSY = "touch /tmp/begun; while [ ! -e /tmp/go ]; do sleep 0.05; done"
SCHEDULER, WORKER = "stack-scheduler.service", "stack-worker@1.service"


class Stack:
    """A machine with the scheduler and workers installed, and the Buildkite that they serve."""

    def __init__(self, machine: Machine, fake: FakeBuildkite):
        self.machine, self.fake, self.port = machine, fake, free_port()
        self.drop_ins = 0

    def install(self, workers: int = 1) -> None:
        """Install, and do what an administrator is told to do next, but start nothing."""
        self.machine.copy_project()
        self.machine.install("scheduler")
        self.machine.install("worker", str(workers))
        self.machine.write("/etc/stack/agent-token", AGENT_TOKEN + "\n")
        self.point_at_the_fake()

    def point_at_the_fake(self) -> None:
        self.set("scheduler", BUILDKITE_AGENT_ENDPOINT=self.fake.url, POLL_INTERVAL="200ms")
        self.set("worker", BUILDKITE_AGENT_ENDPOINT=self.fake.url, WORKER_POLL_INTERVAL="200ms")
        self.set("worker", WORKER_API_SERVER=f"http://127.0.0.1:{self.port}")
        self.drop_in("stack-scheduler.socket", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{self.port}\n")

    def set(self, script: str, **settings: str) -> None:
        """Append to /etc/stack/<script>.env: of two lines the last one holds."""
        with open(self.machine.path(f"/etc/stack/{script}.env"), "a") as file:
            file.writelines(f"{name}={text}\n" for name, text in settings.items())

    def drop_in(self, unit: str, text: str) -> None:
        """Of two that set the same, the last one holds."""
        self.drop_ins += 1
        self.machine.write(f"/etc/systemd/system/{unit}.d/{self.drop_ins:02}.conf", text)
        self.machine.run("systemctl", "daemon-reload")

    def start(self) -> None:
        self.machine.run("systemctl", "start", "stack-scheduler", "stack-workers.target")

    @property
    def token(self) -> str:
        return self.machine.path("/etc/stack/api-token").read_text().strip()

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        return requests.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=10).json()

    def run_job(self, command: str = "echo hi") -> str:
        """The uuid of a job that was run and passed."""
        uuid = self.fake.add_job(command=command)
        self.passed(uuid)
        return uuid

    def passed(self, uuid: str) -> None:
        self.fake.wait_for(lambda: self.fake.jobs[uuid].state == "finished", 30)
        assert self.fake.jobs[uuid].exit_status == 0, self.fake.dump()

    def busy_job(self) -> str:
        """The uuid of a job whose command runs, until `go`."""
        uuid = self.fake.add_job(command=BUSY)
        wait_for(self.machine.path("/tmp/begun").exists, "the job's command runs")
        return uuid

    def go(self) -> None:
        self.machine.write("/tmp/go", "")

    def canceled(self, uuid: str, timeout: float = 30) -> None:
        """Wait until the job's agent has ended it before its command did."""
        self.fake.wait_for(lambda: self.fake.jobs[uuid].state == "finished", timeout)
        assert self.fake.jobs[uuid].exit_status != 0
        wait_for(lambda: self.processes_of_builds() == [], "no process of the build is left")

    def processes_of_builds(self) -> list[str]:
        return self.machine.run("pgrep", "-u", "buildkite-agent", "-a", check=False).splitlines()

    def main_pid(self, unit: str) -> int:
        return int(self.machine.show(unit, "MainPID"))

    def journal(self, *arguments: str) -> str:
        return self.machine.run("journalctl", "-a", "-o", "cat", "-u", "stack-*", *arguments, check=False)

    def wait_for_line(self, *parts: str, timeout: float = 30) -> str:
        """The first line of the journal that has all the parts."""

        def found() -> str | None:
            return next((line for line in self.journal().splitlines() if all(part in line for part in parts)), None)

        line: str = wait_for(found, f"a line with {parts} in the journal", timeout)
        return line

    def wait_for_state(self, unit: str, state: str, timeout: float = 30) -> None:
        """`state` as in "active/running"."""
        names = ("ActiveState", "SubState")
        wait_for(lambda: "/".join(self.machine.show(unit, name) for name in names) == state, f"{unit} {state}", timeout)

    def wait_for_property(self, unit: str, name: str, value: str) -> None:
        wait_for(lambda: self.machine.show(unit, name) == value, f"{name}={value} of {unit}")

    def wait_for_successor(self, unit: str, pid: int) -> None:
        """Wait until the unit's process is another one."""
        wait_for(lambda: self.main_pid(unit) not in (0, pid), f"{unit} has been started again")


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Boots a machine; its journal is shown when the test fails."""
    machines: list[Machine] = []

    def boot_one(release: str = "bookworm", agent: str = "") -> Machine:
        directory = tmp_path / f"machine-{len(machines)}"
        directory.mkdir()
        machines.append(Machine(directory, agent or agent_path("v3"), release))
        return machines[-1]

    yield boot_one
    for machine in machines:
        print(machine.journal_tail())
        machine.close()


@pytest.fixture
def machine(boot: Callable[..., Machine]) -> Machine:
    return boot()


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite(token=AGENT_TOKEN) as fake:
        yield fake


@pytest.fixture
def installed(machine: Machine, fake: FakeBuildkite) -> Stack:
    """Ready to be started, with one worker."""
    stack = Stack(machine, fake)
    stack.install()
    return stack


@pytest.fixture
def stack(installed: Stack) -> Stack:
    """Started, with one worker."""
    installed.start()
    return installed


# Start, status, journal


def test_start_units_are_ready_and_say_how_it_goes(stack: Stack) -> None:
    counts = r"0 ready, 0 leased, %s running; last poll \d+\.\d s ago"

    def status(unit: str) -> str:
        return stack.machine.show(unit, "StatusText")

    wait_for(lambda: re.fullmatch(counts % 0, status(SCHEDULER)), "the scheduler says that it has nothing to do")
    assert stack.machine.show(SCHEDULER, "WatchdogUSec") == "30s"
    waiting = "waiting for a job for queue=default"
    wait_for(lambda: status(WORKER) == waiting, "the worker says that it waits")
    uuid = stack.busy_job()
    wait_for(lambda: status(WORKER) == f"running job {uuid}", "the worker says what it runs")
    wait_for(lambda: re.fullmatch(counts % 1, status(SCHEDULER)), "the scheduler says that a job runs")
    stack.go()
    stack.passed(uuid)
    wait_for(lambda: status(WORKER) == waiting, "the worker says that it waits again")


def test_open_page_of_the_installed_scheduler_shows_the_file_that_was_installed(stack: Stack) -> None:
    page = requests.get(f"http://127.0.0.1:{stack.port}/", timeout=10)
    assert (page.status_code, page.content) == (200, (ROOT / "page.html").read_bytes())
    assert stack.machine.run("stat", "-c", "%a %U", "/opt/stack/page.html").strip() == "644 root"
    documents = {stack.machine.show(unit, "Documentation").removeprefix("file://") for unit in (SCHEDULER, WORKER)}
    assert [stack.machine.path(path).read_text().partition("\n")[0] for path in documents] == [
        "# Install it and keep it running"
    ]


def test_install_scheduler_without_the_page_says_so_to_whoever_opens_it(installed: Stack) -> None:
    for directory in ("/root/agent-stack", "/opt/stack"):
        installed.machine.path(f"{directory}/page.html").unlink()
    installed.machine.install("scheduler")
    installed.start()
    page = requests.get(f"http://127.0.0.1:{installed.port}/", timeout=10)
    assert (page.status_code, page.json()["error"]) == (404, "no_page")
    assert "/opt/stack/page.html" in page.json()["message"]


def test_start_target_reaches_every_worker_that_is_enabled(machine: Machine, fake: FakeBuildkite) -> None:
    stack = Stack(machine, fake)
    stack.install(workers=3)
    stack.start()
    workers = [f"stack-worker@{n}" for n in (1, 2, 3)]
    pids = [stack.main_pid(worker) for worker in workers]
    assert all(pids)
    assert {row["name"] for row in stack.get("/stats")["workers"]} <= {"build-1", "build-2", "build-3"}
    machine.run("systemctl", "restart", "stack-workers.target")
    for worker, pid in zip(workers, pids, strict=True):
        stack.wait_for_successor(worker, pid)
    machine.run("systemctl", "stop", "stack-workers.target")
    for worker in workers:
        stack.wait_for_state(f"{worker}.service", "inactive/dead")
    assert machine.show(SCHEDULER, "ActiveState") == "active"


def test_start_worker_with_settings_of_its_own_takes_them_before_those_of_all(machine: Machine) -> None:
    machine.copy_project()
    machine.install("worker", "2")
    machine.write("/etc/stack/worker-2.env", "WORKER_AGENT_QUERY_RULES=queue=gpu\n")
    machine.run("systemctl", "start", "stack-workers.target")

    def started(number: int) -> str | None:
        lines = machine.run("journalctl", "-o", "cat", "-u", f"stack-worker@{number}").splitlines()
        return next((line for line in lines if line.startswith("started ")), None)

    for number, queue in (1, "default"), (2, "gpu"):
        line = wait_for(functools.partial(started, number), f"worker {number} says what it runs with")
        assert f'worker_agent_query_rules="queue={queue}"' in line


def test_start_scheduler_without_its_socket_opens_the_port_itself(installed: Stack) -> None:
    installed.machine.run("systemctl", "disable", "--now", "stack-scheduler.socket")
    installed.set("scheduler", LISTEN=f"127.0.0.1:{installed.port}")
    installed.start()
    assert installed.machine.show("stack-scheduler.socket", "ActiveState") == "inactive"
    installed.run_job()


def test_serve_every_interface_needs_a_token(stack: Stack) -> None:
    machine, token = stack.machine, stack.token
    elsewhere = f"http://127.0.0.2:{stack.port}/stats"
    with pytest.raises(requests.ConnectionError):
        requests.get(elsewhere, timeout=10)
    example = machine.path("/root/agent-stack/systemd/every-interface.conf").read_text()
    stack.drop_in("stack-scheduler.socket", example.replace("18888", str(stack.port)))
    machine.write("/etc/stack/api-token", "")
    machine.run("systemctl", "restart", "stack-scheduler.socket", "stack-scheduler", check=False)
    stack.wait_for_line("STACK_API_TOKEN is required")
    stack.wait_for_state(SCHEDULER, "failed/failed")
    assert machine.show(SCHEDULER, "ExecMainStatus") == "78"
    machine.write("/etc/stack/api-token", token)
    machine.run("systemctl", "restart", "stack-scheduler.socket", "stack-scheduler")
    assert requests.get(elsewhere, timeout=10).status_code == 401
    stack.run_job()


def test_grep_journal_for_a_job_tells_its_whole_life(stack: Stack) -> None:
    uuid = stack.run_job()
    stack.wait_for_line("ran job=", uuid)
    told = stack.journal("--grep", uuid).splitlines()
    words = [line.split(" ", 1)[0] for line in told]
    life = ["put", "ready", "claimed", "started", "output", "exited", "completed", "ran"]
    assert sorted(set(words) & set(life), key=words.index) == life, told
    # A line that systemd tells the priority of does not begin with it.
    entries = [json.loads(line) for line in stack.journal("--grep", uuid, "-o", "json").splitlines()]
    assert {(entry["PRIORITY"], entry["_SYSTEMD_UNIT"]) for entry in entries} == {("6", SCHEDULER), ("6", WORKER)}


# Watchdog, restarts, signals


def test_hang_scheduler_makes_the_watchdog_restart_it(installed: Stack) -> None:
    installed.drop_in(SCHEDULER, "[Service]\nWatchdogSec=2s\nTimeoutAbortSec=1s\nRestartSec=100ms\n")
    installed.start()
    installed.machine.run("kill", "-STOP", str(installed.main_pid(SCHEDULER)))
    installed.wait_for_line("stack-scheduler.service: Failed with result 'watchdog'")
    installed.wait_for_state(SCHEDULER, "active/running")
    installed.run_job()
    assert installed.machine.show(SCHEDULER, "NRestarts") == "1"


def test_abort_scheduler_leaves_the_stack_of_every_thread_in_the_journal(stack: Stack) -> None:
    stack.machine.run("kill", "-ABRT", str(stack.main_pid(SCHEDULER)))
    stack.wait_for_line("Fatal Python error: Aborted")
    stack.wait_for_line("serve_forever")
    stack.wait_for_property(SCHEDULER, "NRestarts", "1")


def test_feed_watchdog_of_a_scheduler_without_buildkite_goes_on(installed: Stack) -> None:
    installed.drop_in(SCHEDULER, "[Service]\nWatchdogSec=1s\n")
    installed.start()
    pid = installed.main_pid(SCHEDULER)
    installed.fake.set_fault("stacks", hang=60)
    installed.wait_for_line("failed", "no answer", timeout=40)
    assert (installed.main_pid(SCHEDULER), installed.machine.show(SCHEDULER, "NRestarts")) == (pid, "0")
    installed.fake.clear_faults()


class ParkedWorkers:
    """Claim clients on threads, each as a worker: a job that it gets is run at Buildkite at once, and completed."""

    def __init__(self, stack: Stack, count: int):
        self.stack, self.token = stack, stack.token
        self.claimed: Counter[str] = Counter()
        self.troubles: list[str] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[f"client-{n}"]) for n in range(count)]

    def _run(self, name: str) -> None:
        while not self._ending.is_set():
            try:
                self._claim({"X-Worker-ID": name, "X-Worker-Session": name, "Authorization": f"Bearer {self.token}"})
            except (OSError, http.client.HTTPException) as error:
                self.troubles.append(repr(error))
                self._ending.wait(0.1)

    def _claim(self, headers: dict[str, str]) -> None:
        status, job = self._ask("GET", "/jobs?query=queue=default&wait=5", headers)
        if status == 200:
            self.claimed[job["uuid"]] += 1
            with self.stack.fake.changed:
                fake_job = self.stack.fake.all_jobs[job["uuid"]]
                assert fake_job.state == "reserved"
                self.stack.fake.move(fake_job, "finished", "finished", headers["X-Worker-ID"])
            body = json.dumps({"claim": job["claim"], "exit_status": 0})
            while (told := self._ask("POST", f"/jobs/{job['uuid']}/complete", headers, body))[0] == 503:
                self._ending.wait(0.1)
            if told[0] != 200:
                self.troubles.append(f"complete: {told}")
        elif status not in (204, 503):
            self.troubles.append(f"{status} {job}")

    def _ask(self, method: str, path: str, headers: dict[str, str], body: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def __enter__(self) -> ParkedWorkers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)


def test_restart_scheduler_under_load_refuses_no_connection_and_loses_no_job(stack: Stack) -> None:
    fake, machine = stack.fake, stack.machine
    uuids: list[str] = []

    def all_but(left: int) -> bool:
        return sum(fake.jobs[uuid].state == "finished" for uuid in uuids) >= len(uuids) - left

    with ParkedWorkers(stack, 20) as parked:
        wait_for(lambda: len(stack.get("/stats")["workers"]) >= 20, "20 workers wait")
        for _ in range(2):
            uuids += [fake.add_job() for _ in range(60)]
            fake.wait_for(lambda: all_but(40))
            machine.run("systemctl", "restart", "stack-scheduler")
        fake.wait_for(lambda: all_but(0), 60)
    assert parked.troubles == []
    assert machine.show(SCHEDULER, "NRestarts") == "0"
    # The real worker had some of the jobs; none was run twice.
    assert max(parked.claimed.values()) == 1
    assert {fake.jobs[uuid].happened("finished") for uuid in uuids} == {1}


def test_restart_scheduler_answers_every_worker_that_waits(stack: Stack) -> None:
    head = f"Host: build\r\nAuthorization: Bearer {stack.token}\r\n"
    with contextlib.ExitStack() as opened:
        parked = []
        for number in range(500):
            parked.append(opened.enter_context(socket.create_connection(("127.0.0.1", stack.port), 10)))
            claim = f"GET /jobs?query=queue=other&wait=60 HTTP/1.1\r\n{head}X-Worker-ID: parked-{number}\r\n\r\n"
            parked[-1].sendall(claim.encode())
        wait_for(lambda: len(stack.get("/stats")["workers"]) >= 500, "500 workers wait")
        stack.machine.run("systemctl", "restart", "stack-scheduler")
        assert Counter(each.recv(12) for each in parked) == {b"HTTP/1.1 204": 500}


@pytest.mark.parametrize("unit", [SCHEDULER, WORKER])
def test_kill_unit_again_and_again_never_fails_it_for_good(installed: Stack, unit: str) -> None:
    installed.drop_in(unit, "[Service]\nRestartSec=50ms\n")
    installed.start()
    # By default five starts in ten seconds are the most.
    for times in range(1, 7):
        installed.machine.run("kill", "-KILL", str(installed.main_pid(unit)))
        installed.wait_for_property(unit, "NRestarts", str(times))
        installed.wait_for_state(unit, "active/running")
    installed.run_job()


def test_start_with_wrong_settings_is_not_tried_again(installed: Stack) -> None:
    machine = installed.machine
    installed.set("scheduler", POLL_INTERVAL="never")
    installed.set("worker", WORKER_WAIT="never")
    machine.run("systemctl", "start", "stack-scheduler", check=False)
    machine.run("systemctl", "start", WORKER, check=False)
    for unit, problem in (SCHEDULER, "POLL_INTERVAL: 'never'"), (WORKER, "WORKER_WAIT: 'never'"):
        assert machine.show(unit, "ExecMainStatus") == "78"
        installed.wait_for_state(unit, "failed/failed")
        installed.wait_for_line(problem)
    # A worker that knocks must not start it again and again.
    installed.wait_for_state("stack-scheduler.socket", "inactive/dead")
    with pytest.raises(requests.ConnectionError):
        installed.get("/stats")
    assert machine.show(SCHEDULER, "NRestarts") == "0"
    installed.set("scheduler", POLL_INTERVAL="200ms")
    installed.set("worker", WORKER_WAIT="5s")
    machine.run("systemctl", "start", "stack-scheduler", WORKER)
    assert machine.show("stack-scheduler.socket", "ActiveState") == "active"
    installed.run_job()


def test_start_worker_whose_slot_is_taken_is_tried_again(installed: Stack) -> None:
    machine = installed.machine
    machine.run("mkdir", "-p", "/var/lib/stack-worker")
    hold = "exec flock /var/lib/stack-worker/build-1.lock sleep 600"
    machine.run("systemd-run", "--unit=holder", "sh", "-c", hold)
    machine.run("systemctl", "start", "--no-block", WORKER)
    installed.wait_for_line("another worker on this host is called build-1")
    wait_for(lambda: machine.show(WORKER, "NRestarts") != "0", "a second try")
    assert machine.show(WORKER, "ExecMainStatus") in ("0", "75")
    machine.run("systemctl", "stop", "holder")
    installed.wait_for_state(WORKER, "active/running")


def test_reload_units_takes_over_the_log_level_and_says_what_needs_a_restart(stack: Stack) -> None:
    pids = [stack.main_pid(unit) for unit in (SCHEDULER, WORKER)]
    stack.run_job()
    assert "answered method=" not in stack.journal() and "touched" not in stack.journal()
    stack.set("scheduler", LOG_LEVEL="debug")
    stack.set("worker", LOG_LEVEL="debug")
    stack.machine.run("systemctl", "reload", SCHEDULER, WORKER)
    for unit in (SCHEDULER, WORKER):
        stack.wait_for_state(unit, "active/running")
    reloaded = [line for line in stack.journal().splitlines() if line.startswith("reloaded ")]
    assert len(reloaded) == 2
    assert all("log_level=debug" in line and "STACK_API_TOKEN" in line for line in reloaded)
    stack.run_job()
    stack.wait_for_line("answered method=", "/complete")
    assert pids == [stack.main_pid(unit) for unit in (SCHEDULER, WORKER)]


def test_reload_scheduler_takes_over_the_freeze_windows_of_a_file_in_etc(stack: Stack) -> None:
    file = "/etc/stack/stack.toml"
    stack.machine.write(file, "")
    stack.set("scheduler", STACK_FILE=file)
    stack.machine.run("systemctl", "restart", SCHEDULER)
    stack.wait_for_state(SCHEDULER, "active/running")
    window = '[[freeze]]\nname = "a century"\nfrom = 2000-01-01\nuntil = 2100-01-01\nzone = "Europe/Berlin"\n'
    stack.machine.write(file, window)
    stack.machine.run("systemctl", "reload", SCHEDULER)
    stack.wait_for_line("reloaded ")
    uuid = stack.fake.add_job()
    stack.wait_for_line("ready job=", uuid, "held=frozen", 'window="a century"', "until=2099-12-31T23:00:00.000Z")
    server = f"http://127.0.0.1:{stack.port}"
    assert "a century" in stack.machine.run("stackctl", "freezes", "--server", server)
    stack.machine.write(file, "")
    stack.machine.run("systemctl", "reload", SCHEDULER)
    stack.passed(uuid)


#: Uses what a sandbox might keep from it: threads, processes, files of its own, the time zones of the system.
SANDBOXED_POLICY = """
import os, subprocess, tempfile, threading
def decide(job, fleet):
    kind = job.env["KIND"]
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
    assert subprocess.run(["true"]).returncode == 0
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
    if kind == "hang":
        while True: pass
    if kind == "raise":
        raise KeyError(kind)
    if kind == "refuse":
        return refuse("not at " + fleet.now("Europe/Berlin").strftime("%Y"))
    return run(require=["worker=*"]) if len(fleet.workers()) == 1 else hold("nobody is there", seconds=5)
"""


def test_ask_a_policy_inside_the_sandbox_decides_as_outside_and_has_no_secret(installed: Stack) -> None:
    installed.machine.write("/etc/stack/policy.py", SANDBOXED_POLICY)
    installed.machine.path("/etc/stack/policy.py").chmod(0o644)
    installed.set("scheduler", POLICY_FILE="/etc/stack/policy.py", LOG_LEVEL="debug")
    installed.start()
    fake = installed.fake
    jobs = {kind: fake.add_job(env={"KIND": kind}) for kind in ("hang", "raise", "refuse", "run")}
    installed.passed(jobs["run"])
    fake.wait_for(lambda: fake.jobs[jobs["refuse"]].state == "finished", 30)
    assert (fake.jobs[jobs["refuse"]].finish_detail or "").startswith("not at 20")
    wait_for(
        lambda: [installed.get(f"/jobs/{jobs[kind]}")["why"] for kind in ("hang", "raise")] == ["policy_failed"] * 2,
        "the policy has failed in two jobs",
    )
    assert "took too long at policy.py:12" in installed.get(f"/jobs/{jobs['hang']}")["why_text"]
    assert found_in(installed, AGENT_TOKEN) == []
    # A reload asks again; a stop leaves no process behind.
    installed.machine.write("/etc/stack/policy.py", "def decide(job, fleet):\n    return run()\n")
    installed.machine.run("systemctl", "reload", SCHEDULER)
    for kind in ("hang", "raise"):
        installed.passed(jobs[kind])
    installed.machine.run("systemctl", "stop", "stack-scheduler.socket", SCHEDULER)
    assert installed.machine.show(SCHEDULER, "Result") == "success"
    assert installed.machine.run("pgrep", "-f", "policy-child", check=False) == ""


# Stopping a worker


def test_stop_busy_worker_lets_its_job_finish(stack: Stack) -> None:
    uuid = stack.busy_job()
    stack.machine.run("systemctl", "stop", "--no-block", WORKER)
    stack.wait_for_line("stopping", "signal=SIGTERM")
    stack.wait_for_state(WORKER, "deactivating/stop-sigterm")
    later = stack.fake.add_job()
    stack.go()
    stack.passed(uuid)
    stack.wait_for_state(WORKER, "inactive/dead")
    assert stack.machine.show(WORKER, "Result") == "success"
    stack.wait_for_line("ran job=", uuid)
    stack.machine.run("systemctl", "start", WORKER)
    stack.passed(later)


def test_restart_busy_worker_lets_its_job_finish_and_goes_on(stack: Stack) -> None:
    uuid, pid = stack.busy_job(), stack.main_pid(WORKER)
    stack.machine.run("systemctl", "restart", "--no-block", WORKER)
    stack.wait_for_line("stopping", "signal=SIGTERM")
    stack.go()
    stack.passed(uuid)
    stack.run_job()
    assert stack.main_pid(WORKER) != pid
    assert stack.fake.jobs[uuid].happened("acquired") == 1


def test_stop_busy_worker_cancels_its_job_when_its_time_is_over(installed: Stack) -> None:
    installed.set("worker", WORKER_STOP_TIMEOUT="1s")
    installed.start()
    uuid = installed.busy_job()
    installed.machine.run("systemctl", "stop", WORKER)
    installed.canceled(uuid)
    assert installed.machine.show(WORKER, "Result") == "success"


def test_quit_busy_worker_cancels_its_job_at_once(stack: Stack) -> None:
    uuid = stack.busy_job()
    stack.machine.run("systemctl", "stop", "--no-block", WORKER)
    stack.wait_for_line("stopping", "signal=SIGTERM")
    stack.machine.run("systemctl", "kill", "--kill-who=main", "-s", "SIGQUIT", WORKER)
    stack.canceled(uuid)
    stack.wait_for_state(WORKER, "inactive/dead")
    assert stack.machine.show(WORKER, "Result") == "success"


def test_run_job_over_its_time_cancels_it(installed: Stack) -> None:
    installed.set("worker", WORKER_JOB_TIMEOUT="2s")
    installed.start()
    installed.canceled(installed.busy_job())
    installed.run_job()


def test_start_worker_with_limits_sets_them_or_says_why_it_cannot(installed: Stack) -> None:
    installed.set("worker", WORKER_JOB_TASKS="100")
    installed.start()
    if "pids" in installed.machine.path("/sys/fs/cgroup/cgroup.controllers").read_text().split():
        installed.run_job("cat /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/pids.max >/tmp/limit")
        assert installed.machine.path("/tmp/limit").read_text() == "100\n"
    else:
        installed.wait_for_line("WORKER_JOB_MEMORY, _CPUS, _TASKS: pids.max cannot be set on this host")
        assert installed.machine.show(WORKER, "ExecMainStatus") == "78"


def test_kill_worker_ends_its_agent_and_the_job_is_accounted_for(stack: Stack) -> None:
    uuid, pid = stack.busy_job(), stack.main_pid(WORKER)
    wait_for(lambda: stack.get(f"/jobs/{uuid}")["state"] == "running", "the scheduler knows that it runs")
    assert stack.processes_of_builds()
    stack.machine.run("kill", "-KILL", str(pid))
    stack.wait_for_successor(WORKER, pid)
    assert stack.processes_of_builds() == []
    # The next job is not held up by it, and it is not handed out again: Buildkite has not said that it is over.
    stack.run_job()
    assert stack.get(f"/jobs/{uuid}")["state"] == "running"
    stack.fake.lose_agent(uuid)
    wait_for(lambda: stack.get(f"/jobs/{uuid}")["state"] == "done", "the scheduler knows that it is over")
    assert stack.fake.jobs[uuid].happened("acquired") == 1


DAEMONS = {
    "setsid": "(setsid nohup sh -c 'touch /tmp/daemon; exec sleep 31337' >/dev/null 2>&1 &)",
    "double-fork": """python3 -c 'import os
if not os.fork():
    os.setsid()
    if not os.fork():
        os.closerange(0, 3)
        open("/tmp/daemon", "w")
        os.execvp("sleep", ["sleep", "31337"])'""",
}


@pytest.mark.parametrize("how", DAEMONS)
def test_end_job_that_leaves_a_daemon_ends_it_and_names_it(stack: Stack, how: str) -> None:
    uuid = stack.run_job(DAEMONS[how] + "\nwhile [ ! -e /tmp/daemon ]; do sleep 0.05; done")
    line = stack.wait_for_line("left ", uuid)
    assert "sleep 31337" in line
    assert stack.processes_of_builds() == []
    stack.run_job()


def test_restart_worker_that_alone_was_killed_ends_what_earlier_jobs_have_left(installed: Stack) -> None:
    installed.drop_in(WORKER, "[Service]\nKillMode=process\n")
    installed.start()
    pid = installed.main_pid(WORKER)
    cgroup = f"/sys/fs/cgroup{installed.machine.show(WORKER, 'ControlGroup')}/job-earlier"
    installed.machine.path(cgroup).mkdir()
    daemon = 'setsid sleep 31337 >/dev/null 2>&1 & echo $! >"$1"/cgroup.procs'
    installed.machine.run("sh", "-c", daemon, "sh", cgroup)
    installed.machine.run("kill", "-KILL", str(pid))
    installed.wait_for_successor(WORKER, pid)
    assert "sleep 31337" in installed.wait_for_line("left ", "job=earlier")
    assert not installed.machine.path(cgroup).exists()
    installed.run_job()


# Secrets, hardening


def found_in(stack: Stack, text: str) -> list[str]:
    """Where the text can be read: units, journal, and command lines and environments of all processes."""
    places = {
        "show": stack.machine.run("systemctl", "show", "stack-*"),
        "cat": stack.machine.run("systemctl", "cat", "stack-*"),
        "journal": stack.machine.run("journalctl", "-a", "-o", "export"),
    }
    for process in stack.machine.path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                command = (process / "cmdline").read_bytes().split(b"\0", 1)[0].decode()
                places[f"{name} of {command}"] = (process / name).read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
    return [place for place, content in places.items() if text in content]


def test_look_for_secrets_everywhere_finds_none(installed: Stack) -> None:
    for script in ("scheduler", "worker"):
        installed.set(script, LOG_LEVEL="debug")
    installed.start()
    installed.busy_job()
    assert {"show", "journal", "environ of python3"} <= set(found_in(installed, "/etc/stack/worker.env"))
    assert found_in(installed, installed.token) == []
    assert found_in(installed, AGENT_TOKEN) == []
    installed.go()


REDIS_PASSWORD = "the-password-of-redis"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--appendonly", "yes")
    # Not on its command line: a look at all processes is to find the password nowhere.
    server.say("CONFIG", "SET", "requirepass", REDIS_PASSWORD)
    yield server
    server.stop()


def test_start_scheduler_whose_redis_has_a_password_leads_and_shows_it_nowhere(
    installed: Stack, redis: RedisServer
) -> None:
    installed.set("scheduler", STACK_KEY="fleet", LOG_LEVEL="debug")
    installed.machine.write("/etc/stack/redis-addr", f"redis://:wrong-password@{redis.address}/0\n")
    installed.machine.run("systemctl", "start", "--no-block", "stack-scheduler")
    installed.wait_for_line("REDIS_ADDR", "WRONGPASS")
    installed.wait_for_state(SCHEDULER, "failed/failed")  # which only a person can mend
    installed.machine.write("/etc/stack/redis-addr", f"redis://:{REDIS_PASSWORD}@{redis.address}/0\n")
    installed.start()
    wait_for(lambda: "; leads" in installed.machine.show(SCHEDULER, "StatusText"), "it says that it leads")
    installed.run_job()
    assert not installed.machine.path("/var/lib/stack-scheduler/jobs.sqlite3").exists()
    assert found_in(installed, REDIS_PASSWORD) == found_in(installed, "wrong-password") == []


MAKE_CERTIFICATE = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2 -subj /CN=test \\
    -addext subjectAltName=IP:127.0.0.1 -keyout tls.key -out tls.crt
"""


def test_serve_tls_by_the_drop_in_takes_a_key_that_only_root_can_read(installed: Stack, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    subprocess.run(MAKE_CERTIFICATE, shell=True, cwd=tmp_path, check=True, capture_output=True)
    for name in ("tls.crt", "tls.key"):
        installed.machine.write(f"/etc/stack/{name}", (tmp_path / name).read_text())
    installed.machine.run("chmod", "600", "/etc/stack/tls.key")
    installed.drop_in(SCHEDULER, (ROOT / "systemd" / "tls.conf").read_text())
    installed.set(
        "worker", WORKER_API_SERVER=f"https://127.0.0.1:{installed.port}", WORKER_CA_FILE="/etc/stack/tls.crt"
    )
    installed.start()
    installed.run_job()
    answer = requests.get(f"https://127.0.0.1:{installed.port}/health", verify=str(tmp_path / "tls.crt"), timeout=10)
    assert answer.status_code == 200


LOOK_AROUND = """
set +e
exec >/tmp/seen 2>&1
id -un; echo $HOME
cat /etc/stack/api-token /etc/stack/agent-token
ls /run/credentials/*
cat /run/credentials/*/*
for process in /proc/[0-9]*; do
    [ $(stat -c %U $process) = buildkite-agent ] || cat $process/environ $process/fd/*
done
cat /var/lib/stack-scheduler/* /var/lib/private/stack-scheduler/*
cat /var/lib/stack-worker/build-1.*
curl -s http://127.0.0.1:$PORT/stats || python3 -c 'import os, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:%s/stats" % os.environ["PORT"]).read())'
echo seen
"""


def test_run_build_that_looks_for_secrets_reads_none(stack: Stack) -> None:
    stack.run_job(f"PORT={stack.port}; export PORT\n{LOOK_AROUND}")
    seen = stack.machine.path("/tmp/seen").read_text()
    assert seen.startswith("buildkite-agent\n/var/lib/buildkite-agent\n") and seen.endswith("seen\n")
    assert seen.count("Permission denied") > 5
    assert "401" in seen
    assert stack.token not in seen and AGENT_TOKEN not in seen


def test_run_build_that_writes_the_agents_configuration_changes_no_later_job(stack: Stack) -> None:
    # With these an agent would start two of itself, which --acquire-job refuses, and ask somebody else for its job.
    config = "spawn=2\nendpoint=http://127.0.0.1:9/v3\n"
    stack.run_job(f"mkdir -p ~/.buildkite-agent && printf '{config}' >~/.buildkite-agent/buildkite-agent.cfg")
    assert stack.machine.path("/var/lib/buildkite-agent/.buildkite-agent/buildkite-agent.cfg").read_text() == config
    stack.run_job()


def test_start_worker_beside_a_configuration_that_builds_can_write_says_that_it_is_passed_over(
    installed: Stack,
) -> None:
    # As Buildkite's own package for Debian leaves it.
    installed.machine.write("/etc/buildkite-agent/buildkite-agent.cfg", "spawn=2\n")
    installed.machine.run("chown", "-R", "buildkite-agent:", "/etc/buildkite-agent")
    installed.start()
    installed.wait_for_line("unsafe", "users other than root can write /etc/buildkite-agent", "gets /dev/null instead")
    installed.run_job()
    installed.machine.run("chown", "-R", "root:", "/etc/buildkite-agent")
    installed.machine.write("/etc/buildkite-agent/buildkite-agent.cfg", "tags=from=the-file\n")
    installed.machine.run("systemctl", "restart", WORKER)
    installed.run_job("echo $BUILDKITE_CONFIG_PATH >/tmp/config")
    assert installed.machine.path("/tmp/config").read_text() == "/etc/buildkite-agent/buildkite-agent.cfg\n"


LOOK_AT_ITSELF = """
grep -E '^(NoNewPrivs|CapBnd):' /proc/self/status >~/seen
grep -q ' /usr [^ ]* ro,' /proc/self/mounts && echo "/usr is read-only" >>~/seen
[ -e /tmp/of-somebody-else ] || echo "/tmp is its own" >>~/seen
python3 -c 'import socket
try: socket.socket(socket.AF_TIPC, socket.SOCK_DGRAM)
except OSError as error: print(error.strerror)' >>~/seen
"""
#: Their numbers. Source: the kernel's capability.h
CAPABILITIES = {"CHOWN": 0, "KILL": 5, "SETGID": 6, "SETUID": 7, "SYS_MODULE": 16, "SYS_ADMIN": 21}
CAPABILITIES |= {"SYS_TTY_CONFIG": 26, "AUDIT_WRITE": 29, "AUDIT_CONTROL": 30, "BLOCK_SUSPEND": 36}


def seen_by_build(stack: Stack) -> tuple[set[str], list[str]]:
    """The capabilities that a build's setuid programs may have, and what else it sees of its limits."""
    stack.run_job(LOOK_AT_ITSELF)
    lines = stack.machine.path("/var/lib/buildkite-agent/seen").read_text().splitlines()
    [mask] = [int(line.split()[1], 16) for line in lines if line.startswith("CapBnd:")]
    rest = [line.replace("\t", " ") for line in lines if not line.startswith("CapBnd:")]
    return {name for name, number in CAPABILITIES.items() if mask >> number & 1}, rest


def test_run_build_may_become_root_but_not_with_what_no_build_needs(stack: Stack) -> None:
    stack.machine.write("/tmp/of-somebody-else", "")
    capabilities, seen = seen_by_build(stack)
    assert capabilities == {"CHOWN", "KILL", "SETGID", "SETUID", "SYS_ADMIN", "AUDIT_WRITE"}
    assert seen[0] == "NoNewPrivs: 0" and not {"/usr is read-only", "/tmp is its own"} & set(seen)


def test_run_build_that_need_not_become_root_cannot_by_the_drop_in(installed: Stack) -> None:
    installed.machine.write("/tmp/of-somebody-else", "")
    installed.drop_in("stack-worker@.service", (ROOT / "systemd" / "no-root.conf").read_text())
    installed.start()
    capabilities, seen = seen_by_build(installed)
    assert capabilities == {"CHOWN", "KILL", "SETGID", "SETUID"}
    assert seen[0] == "NoNewPrivs: 1" and {"/usr is read-only", "/tmp is its own"} <= set(seen)
    assert seen[-1] == "Address family not supported by protocol"
    said = installed.machine.run("journalctl", "-o", "cat", "_PID=1").splitlines()
    assert [line for line in said if "no-root" in line or "gnoring" in line] == []
    # What the worker does for its jobs it still does.
    uuid = installed.run_job(DAEMONS["setsid"] + "\nwhile [ ! -e /tmp/daemon ]; do sleep 0.05; done")
    assert "sleep 31337" in installed.wait_for_line("left ", uuid)
    assert installed.machine.status("systemd-analyze", "security", "--threshold=70", WORKER) == 0


def test_start_units_have_a_limit_of_memory(stack: Stack) -> None:
    of_machine = int(re.findall(r"MemTotal: +(\d+)", stack.machine.path("/proc/meminfo").read_text())[0]) * 1024
    assert stack.machine.show(SCHEDULER, "MemoryMax") == str(2 << 30)
    assert 0.8 < int(stack.machine.show(WORKER, "MemoryMax")) / of_machine < 0.95


def test_score_scheduler_unit_is_two_or_lower(machine: Machine) -> None:
    machine.copy_project()
    machine.install("scheduler")
    # In tenths; systemd-analyze fails when it is higher.
    assert machine.status("systemd-analyze", "security", "--threshold=20", SCHEDULER) == 0
    assert machine.status("systemd-analyze", "security", "--threshold=5", SCHEDULER) != 0


# Shutdown


def test_power_off_lets_the_job_finish_before_scheduler_and_network_go(stack: Stack) -> None:
    machine = stack.machine
    sleep = "[Service]\nExecStart=sleep infinity\n"
    before = "[Unit]\nBefore=network.target\nWants=network.target\n"
    machine.write("/etc/systemd/system/network.service", before + sleep)
    machine.write("/etc/systemd/system/other.service", sleep)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "network", "other")
    uuid = stack.busy_job()
    machine.run("systemctl", "poweroff")
    stack.wait_for_state("other.service", "inactive/dead")
    stack.wait_for_state(WORKER, "deactivating/stop-sigterm")
    assert [machine.show(unit, "ActiveState") for unit in (SCHEDULER, "network")] == ["active", "active"]
    stack.go()
    machine.ended()
    stack.passed(uuid)
    # The scheduler heard of it: it takes its stack down only when it knows of no job that is not over.
    assert [call.status for call in stack.fake.calls_to("deregister")] == [204]


# Install, upgrade, uninstall


def test_install_again_on_a_live_machine_upgrades_and_keeps_what_was_set(stack: Stack) -> None:
    machine, pid = stack.machine, stack.main_pid(SCHEDULER)
    uuid = stack.busy_job()
    kept = {path: path.read_text() for path in machine.path("/etc/stack").iterdir()}
    for name in ("scheduler", "worker"):
        with open(machine.path(f"/root/agent-stack/{name}.py"), "a") as file:
            file.write("# a newer one\n")
    machine.run("systemctl", "disable", "stack-scheduler.socket")
    assert "systemctl restart stack-scheduler" in machine.install("scheduler")
    assert "systemctl restart stack-workers.target" in machine.install("worker")
    assert {path: path.read_text() for path in machine.path("/etc/stack").iterdir()} == kept
    assert machine.run("systemctl", "is-enabled", "stack-scheduler.socket", check=False).strip() == "disabled"
    for name in ("scheduler", "worker"):
        assert machine.path(f"/opt/stack/{name}.py").read_text().endswith("# a newer one\n")
    assert stack.main_pid(SCHEDULER) == pid
    machine.run("systemctl", "restart", "stack-scheduler")
    machine.run("systemctl", "restart", "--no-block", "stack-workers.target")
    stack.go()
    stack.passed(uuid)
    stack.run_job()


def test_install_makes_secrets_that_only_root_can_read(machine: Machine) -> None:
    machine.copy_project()
    machine.install("scheduler")
    machine.install("worker")
    shown = machine.run("sh", "-c", "stat -c '%n %a %U' /etc/stack/*").splitlines()
    assert shown == [
        "/etc/stack/agent-token 600 root",
        "/etc/stack/api-token 600 root",
        "/etc/stack/buildkite-api-token 600 root",
        "/etc/stack/operator-token 600 root",
        "/etc/stack/redis-addr 600 root",
        "/etc/stack/scheduler.env 644 root",
        "/etc/stack/viewer-token 600 root",
        "/etc/stack/webhook-token 600 root",
        "/etc/stack/worker.env 644 root",
    ]
    tokens = [machine.path(f"/etc/stack/{name}-token").read_text() for name in ("api", "operator")]
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
    assert tokens[0] != tokens[1]


def test_install_puts_the_commands_within_reach_and_keeps_them_compiled(machine: Machine) -> None:
    machine.copy_project()
    machine.install("scheduler")
    assert machine.run("readlink", "/usr/local/bin/stackctl").strip() == "/opt/stack/stackctl"
    for words in (["stackctl", "help"], ["stackctl"], ["stackctl", "--check"]):
        assert "  status\n" in machine.run(*words)
    assert list(machine.path("/opt/stack/__pycache__").glob("scheduler.*.pyc"))
    completion = machine.path("/usr/local/share/bash-completion/completions/stackctl").read_text()
    assert completion == machine.run("stackctl", "completion")
    # Nobody answers: that is wrong, and a monitor sees it.
    assert machine.status("stackctl", "status") == 2


def test_install_again_makes_secrets_private_that_others_could_read_and_says_so(machine: Machine) -> None:
    machine.copy_project()
    machine.install("scheduler")
    assert "could be read" not in machine.install("scheduler")
    machine.write("/etc/stack/agent-token", "bkct_x\n")
    machine.write("/etc/stack/tls.key", "key")
    machine.run("chmod", "640", "/etc/stack/agent-token", "/etc/stack/tls.key")
    machine.run("chown", "daemon", "/etc/stack/webhook-token")
    said = machine.install("scheduler")
    for name in ("agent-token", "tls.key", "webhook-token"):
        assert f"/etc/stack/{name} could be read by users other than root; that is fixed" in said
        assert machine.run("stat", "-c", "%a %U", f"/etc/stack/{name}") == "600 root\n"
    assert machine.path("/etc/stack/agent-token").read_text() == "bkct_x\n"
    assert "could be read" not in machine.install("scheduler")


def test_upgrade_scheduler_with_a_venv_brings_it_to_what_the_lock_says(machine: Machine) -> None:
    machine.copy_project()
    # In place of a Debian with python3-venv, and of PyPI.
    python = '#!/bin/sh\n[ "$1 $2" = "-m venv" ] || exec /usr/bin/python3 "$@"\n'
    for name, text in ("python3", python), ("pip", '#!/bin/sh\necho "$@" >/tmp/asked\n'):
        machine.write(f"/opt/stack/venv/bin/{name}", text)
        machine.run("chmod", "755", f"/opt/stack/venv/bin/{name}")
    machine.install("scheduler")
    asked = machine.path("/tmp/asked").read_text()
    assert asked.startswith("install ") and " --require-hashes --upgrade " in asked
    assert asked.endswith(" -r /root/agent-stack/systemd/requirements.lock\n")


def test_install_worker_before_scheduler_still_gives_the_api_a_token(machine: Machine, fake: FakeBuildkite) -> None:
    machine.copy_project()
    machine.install("worker")
    assert machine.path("/etc/stack/api-token").read_text() == ""
    machine.run("systemctl", "start", "stack-workers.target")
    assert "have no token, until: systemctl restart stack-workers.target" in machine.install("scheduler")
    token = machine.path("/etc/stack/api-token").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    stack = Stack(machine, fake)
    stack.install()
    assert machine.path("/etc/stack/api-token").read_text() == token
    machine.run("systemctl", "restart", "stack-scheduler", "stack-workers.target")
    stack.run_job()
    assert requests.get(f"http://127.0.0.1:{stack.port}/stats", timeout=10).status_code == 401


def test_install_worker_needs_no_python_package(machine: Machine, fake: FakeBuildkite) -> None:
    machine.run("sh", "-c", "rm -r /usr/lib/python3/dist-packages/*")
    machine.copy_project()
    assert "put the scheduler's /etc/stack/api-token" in machine.install("worker", "6")
    machine.run("systemctl", "start", "stack-workers.target")
    states = [machine.show(f"stack-worker@{n}", "ActiveState") for n in range(1, 8)]
    assert states == ["active"] * 6 + ["inactive"]


def test_run_job_on_the_oldest_systemd_and_python_ends_with_the_worker_that_was_stopped(
    boot: Callable[..., Machine], fake: FakeBuildkite, tmp_path: Path
) -> None:
    machine = boot("bullseye", agent_path("fake"))  # the real one that CI builds needs a newer C library
    machine.copy_project()
    machine.install("worker")
    with StackProcesses(fake, tmp_path, agent_path("fake"), STACK_API_TOKEN="the-api-token") as processes:
        processes.start_scheduler()
        machine.write("/etc/stack/api-token", "the-api-token\n")
        stack = Stack(machine, fake)
        stack.set("worker", WORKER_API_SERVER=processes.url, BUILDKITE_AGENT_ENDPOINT=fake.url)
        machine.run("systemctl", "start", "stack-workers.target")
        uuid = stack.busy_job()
        assert stack.processes_of_builds() != []  # so it did not start as root
        machine.run("systemctl", "stop", "--no-block", "stack-workers.target")
        stack.wait_for_line("stopping", "signal=SIGTERM")
        stack.go()
        stack.passed(uuid)
        stack.wait_for_state(WORKER, "inactive/dead")
    assert machine.run("python3", "-V").startswith("Python 3.9.")
    assert passed_over(machine) == []
    stack.drop_in("stack-worker@.service", "[Service]\nMemoryPressureWatch=skip\n")  # systemd 254
    machine.run("systemctl", "show", WORKER)  # loads it
    assert ["MemoryPressureWatch" in line for line in passed_over(machine)] == [True]


def passed_over(machine: Machine) -> list[str]:
    """What systemd says of directives of the worker's unit that it does not know."""
    said = machine.run("journalctl", "-o", "cat", "_PID=1").splitlines()
    return [line for line in said if "stack-worker@" in line and "ignoring" in line]


#: Where `pip install --user` of root's puts them, the unit does not look.
ELSEWHERE = "/root/.local/lib/python3.11/site-packages"


@pytest.mark.parametrize("remove", ["rm -r $packages", f"mkdir -p {ELSEWHERE} && mv $packages {ELSEWHERE}"])
def test_install_scheduler_without_packages_or_venv_says_what_to_install(machine: Machine, remove: str) -> None:
    machine.run("sh", "-c", f"packages=/usr/lib/python3/dist-packages/*; {remove}")
    machine.copy_project()
    said = machine.run("/root/agent-stack/systemd/install", "scheduler", check=False)
    assert "run: apt-get install python3-requests python3-dotenv python3-prometheus-client python3-redis" in said
    assert not machine.path("/opt/stack/venv").exists()
    assert not machine.path("/opt/stack/scheduler.py").exists()
    assert not machine.path("/etc/systemd/system/stack-scheduler.service").exists()


def test_upgrade_scheduler_whose_packages_cannot_be_had_leaves_the_version_before(machine: Machine) -> None:
    machine.copy_project()
    before = {"/opt/stack/venv/lib/package": "of the version before", "/opt/stack/scheduler.py": "the version before"}
    for path, text in before.items():
        machine.write(path, text)
    said = machine.run("/root/agent-stack/systemd/install", "scheduler", check=False)
    assert "install: pip cannot install them; the previous version stays installed" in said
    assert {path: machine.path(path).read_text() for path in before} == before


def test_uninstall_keeps_settings_and_state_until_it_is_told_to_purge(stack: Stack) -> None:
    machine = stack.machine
    stack.run_job()
    kept = ["/etc/stack/api-token", "/var/lib/private/stack-scheduler/jobs.sqlite3", "/var/lib/stack-worker/builds"]
    machine.install("uninstall")
    assert all(machine.path(path).exists() for path in kept)
    assert machine.run("systemctl", "list-units", "--all", "--no-legend", "stack-*").strip() == ""
    assert not machine.path("/opt/stack").exists()
    assert list(machine.path("/etc/systemd/system").rglob("stack-*.service")) == []
    # Installed again, it is as it was.
    machine.install("scheduler")
    machine.install("worker", "1")
    stack.start()
    stack.run_job()
    machine.install("uninstall", "--purge")
    assert machine.status("id", "buildkite-agent") != 0
    places = ["/etc", "/opt", "/var/lib", "/usr/local"]
    assert machine.run("find", *places, "(", "-name", "*stack*", "-o", "-nouser", ")") == ""


@pytest.mark.parametrize("arguments", [[], ["scheduler", "2"], ["worker", "00"], ["worker", "x"], ["uninstall", "all"]])
def test_install_with_unknown_arguments_explains_itself(arguments: list[str], tmp_path: Path) -> None:
    install = Path(__file__).parent.parent.parent / "systemd" / "install"
    run = subprocess.run(["sh", str(install), *arguments], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (64, "")
    assert "systemd/install uninstall [--purge]" in run.stderr
