"""What both scripts owe to systemd, without one: notifications, inherited sockets, SIGHUP, limits, cgroups."""

from __future__ import annotations

import math
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

import scheduler
import worker
from fake_buildkite import FakeBuildkite
from processes import ROOT, Process, StackProcesses, agent_path, children, compiled, process_1, program

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
UUID = "018f0000-0000-4000-8000-000000000001"


class Systemd:
    """The socket behind NOTIFY_SOCKET, and all that came by it."""

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self.told: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while text := self._socket.recv(4096).decode():
            with self._changed:
                self.told += text.split("\n")
                self._changed.notify_all()

    def wait_for(self, start: str, count: int = 1) -> str:
        """The message that starts so, the first or a later one."""

        def found() -> list[str]:
            return [text for text in self.told if text.startswith(start)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, PATIENCE), f"no {count} {start} in {self.told}"
            return found()[count - 1]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._reader.join(PATIENCE)
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    service = Systemd(str(tmp_path / "notify"))
    yield service
    service.close()


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake"), NOTIFY_SOCKET=str(tmp_path / "notify")) as processes:
        yield processes


# --- Notifications of the scheduler ---


def test_notify_ready_waits_for_the_first_registration(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd
) -> None:
    fake.set_fault("register", hang=math.inf)
    stack.start_scheduler()
    fake.wait_for(lambda: fake.calls_to("register"))
    systemd.wait_for("STATUS=", 3)
    assert "READY=1" not in systemd.told
    fake.clear_faults()
    systemd.wait_for("READY=1")


def test_notify_ready_with_buildkite_down_comes_all_the_same_and_says_what_is_wrong(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd
) -> None:
    fake.set_fault("register", status=503, body={"message": "down\nMAINPID=1\r\nSTOPPING=1"})
    stack.start_scheduler()
    systemd.wait_for("READY=1")
    status = systemd.wait_for("STATUS=0 ready, 0 leased, 0 running; not polled yet; register")
    assert "503 from Buildkite: down MAINPID=1 STOPPING=1" in status
    assert not any(told.startswith(("MAINPID", "STOPPING")) for told in systemd.told)


def test_notify_with_a_wrong_token_never_says_ready(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd
) -> None:
    stack.scheduler_settings["BUILDKITE_AGENT_TOKEN"] = "wrong"
    assert stack.start_scheduler().ended() == 78
    assert "READY=1" not in systemd.told


def test_notify_status_counts_jobs_by_state(fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd) -> None:
    for _ in range(3):
        fake.add_job(rules=["queue=default"])
    stack.scheduler_settings["WATCHDOG_USEC"] = "300000"
    stack.start_scheduler()
    status = systemd.wait_for("STATUS=3 ready, 0 leased, 0 running; last poll ")
    assert status.endswith(" s ago")


def test_notify_watchdog_comes_thrice_in_its_time_and_not_for_another_process(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd
) -> None:
    stack.scheduler_settings["WATCHDOG_USEC"] = "300000"
    stack.start_scheduler()
    systemd.wait_for("WATCHDOG=1", 10)
    assert scheduler.report_seconds({"WATCHDOG_USEC": "300000"}) == pytest.approx(0.1)
    assert scheduler.report_seconds({"WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}) == scheduler.REPORT_SECONDS
    assert scheduler.report_seconds({}) == scheduler.REPORT_SECONDS


def test_notify_at_the_stop_says_stopping(stack: StackProcesses, systemd: Systemd) -> None:
    process = stack.start_scheduler()
    process.send_signal(signal.SIGTERM)
    systemd.wait_for("STOPPING=1")
    assert process.ended() == 0


def test_notify_an_abstract_address_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Systemd(f"\0stack-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@stack-test-{os.getpid()}")
    scheduler.tell_systemd("STATUS=1 ready")
    assert service.wait_for("STATUS=") == "STATUS=1 ready"
    service.close()


@pytest.mark.parametrize("script", [scheduler, worker])
def test_notify_of_what_utf_8_cannot_hold_sends_the_rest(
    systemd: Systemd, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    script.tell_systemd("STATUS=503 \ud800")
    assert systemd.wait_for("STATUS=") == "STATUS=503 ?"


@pytest.mark.parametrize("address", ["", "/nonexistent/notify"])
def test_notify_without_a_systemd_that_listens_goes_on(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    scheduler.tell_systemd("READY=1")


def test_abort_by_the_watchdog_leaves_every_stack_in_the_log(stack: StackProcesses, systemd: Systemd) -> None:
    process = stack.start_scheduler()
    systemd.wait_for("READY=1")
    process.send_signal(signal.SIGABRT)
    assert process.ended() == -signal.SIGABRT
    log = "\n".join(process.lines)
    assert "Fatal Python error: Aborted" in log
    assert log.count("in _run") >= 5


# --- What the watchdog asks ---


def test_watch_a_duty_whose_step_never_ends_finds_it_stuck() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def tick(_: float) -> float:
        begun.set()
        go_on.wait(PATIENCE)
        return 3600.0

    duty = scheduler.PeriodicTask("hung", tick, time.time)
    duty.start()
    assert begun.wait(PATIENCE)
    now = time.monotonic()
    assert not duty.stuck(now)
    assert duty.stuck(now + scheduler.STUCK_SECONDS + 1)
    duty.step()  # another call of the same tick: it gets on
    assert not duty.stuck(time.monotonic() + scheduler.STUCK_SECONDS - 1)
    go_on.set()
    duty.stop()
    assert duty.join(PATIENCE)


def test_watch_a_duty_that_waits_for_its_next_tick_is_content_for_ever() -> None:
    duty = scheduler.PeriodicTask("waiting", lambda _: 3600.0, time.time)
    duty.start()
    until = time.monotonic() + PATIENCE
    while duty.stuck(time.monotonic() + 1e6) and time.monotonic() < until:
        pass  # its tick has not ended yet
    assert not duty.stuck(time.monotonic() + 1e6)
    duty.stop()
    assert duty.join(PATIENCE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_watch_a_duty_whose_thread_has_ended_finds_it_stuck() -> None:
    def die(_: float) -> float:
        raise SystemExit

    duty = scheduler.PeriodicTask("ended", die, time.time)
    duty.start()
    assert duty.join(PATIENCE)
    assert duty.stuck(time.monotonic())


def test_watch_a_duty_that_was_stopped_on_purpose_is_content() -> None:
    duty = scheduler.PeriodicTask("stopped", lambda _: 0.0, time.time)
    assert not duty.stuck(time.monotonic() + 1e6)  # nor is one that is about to start
    duty.start()
    duty.stop()
    assert duty.join(PATIENCE)
    assert not duty.stuck(time.monotonic() + 1e6)


def test_join_a_duty_that_was_never_started_has_nothing_to_wait_for() -> None:
    duty = scheduler.PeriodicTask("idle", lambda _: 0.0, time.time)
    duty.stop()
    assert duty.join(0.0)


# --- Process 1 of a container ---


#: Leaves three processes, each in a session of its own, that end when they have made a file.
LEAVE_BEHIND = "for n in 1 2 3; do setsid sh -c 'sleep 0.1; exec touch left-'$$-$n & done"


def test_serve_as_process_1_leaves_no_zombie_of_what_was_left_to_it(
    stack: StackProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = process_1()
    monkeypatch.setattr("processes.compiled", lambda script: [*container, sys.executable, str(ROOT / script)])
    process = stack.start_scheduler()
    [pid] = children(process.pid)
    enter = [program("nsenter"), "--target", str(pid), "--pid", "--mount"]
    subprocess.run([*enter, "sh", "-c", f"cd {stack.directory}; {LEAVE_BEHIND}"], check=True, timeout=PATIENCE)
    until = time.monotonic() + PATIENCE
    while len(list(stack.directory.glob("left-*"))) < 3 or children(pid):
        assert time.monotonic() < until, children(pid)
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert process.ended() == 0


# --- Sockets that systemd hands over ---

#: Becomes the script, with the listening socket as descriptor 3, as systemd does.
HAND_OVER = """
import os, sys
if sys.argv[1] != "3":
    os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
handed_over = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execve(sys.executable, [sys.executable, *sys.argv[2:]], os.environ | handed_over)
"""


def start_with(listener: socket.socket, stack: StackProcesses) -> Process:
    settings = {"STACK_KEY": "test", "STATE_DIRECTORY": str(stack.directory / "state"), "POLL_INTERVAL": "200ms"}
    environment = stack.environment(**settings, **stack.scheduler_settings)
    command = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), str(ROOT / "scheduler.py")]
    log = stack.directory / "log"
    stack.schedulers[0] = Process(command, environment, stack.directory, log, pass_fds=[listener.fileno()])
    return stack.schedulers[0]


def test_start_with_a_socket_unit_that_hands_over_another_address_says_that_listen_does_not_count(
    stack: StackProcesses,
) -> None:
    stack.scheduler_settings["LISTEN"] = "127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = start_with(listener, stack)
        told = process.wait_for_line("warning ignored", "LISTEN: 127.0.0.1:1 is ignored")
        assert f"127.0.0.1:{listener.getsockname()[1]}; change it there" in told


@pytest.mark.parametrize(
    ("listen", "bound", "counts"),
    [
        ("127.0.0.1:18888", ("127.0.0.1", 18888), True),
        ("localhost:18888", ("127.0.0.1", 18888), True),
        (":18888", ("0.0.0.0", 18888), True),
        (":18888", ("::", 18888, 0, 0), True),
        (":18889", ("::", 18888, 0, 0), False),
        (":18888", ("127.0.0.1", 18888), False),
        ("", ("127.0.0.1", 18889), True),
    ],
)
def test_compare_listen_with_an_inherited_address_tells_it_where_they_differ(
    listen: str, bound: tuple[Any, ...], counts: bool
) -> None:
    environ = {"BUILDKITE_AGENT_TOKEN": "t", "LISTEN": listen, "LISTEN_PID": str(os.getpid())}
    settings = scheduler.read_settings(scheduler.Settings, environ)
    assert (scheduler.ignored_listen(settings, environ, [bound]) == []) == counts
    assert scheduler.ignored_listen(settings, environ | {"LISTEN_PID": "1"}, [bound]) == []


def test_restart_with_an_inherited_socket_refuses_no_connection(stack: StackProcesses) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        first = start_with(listener, stack)
        first.wait_for_line("started", f"listen={url.removeprefix('http://')}", "inherited=True")
        assert requests.get(f"{url}/health", timeout=PATIENCE).status_code == 200
        first.send_signal(signal.SIGTERM)
        assert first.ended() == 0
        # Nobody serves now; the connection waits in the backlog.
        answers: list[int] = []
        client = threading.Thread(
            target=lambda: answers.append(requests.get(f"{url}/health", timeout=PATIENCE).status_code)
        )
        client.start()
        start_with(listener, stack)
        client.join(PATIENCE)
        assert answers == [200]


def test_stop_with_a_parked_claim_ends_its_connection_for_the_successor(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stack.url = stack.urls[0] = f"http://127.0.0.1:{listener.getsockname()[1]}"
        first = start_with(listener, stack)
        answers: list[requests.Response] = []
        claim = threading.Thread(
            target=lambda: answers.append(
                requests.get(
                    f"{stack.url}/jobs?query=queue=default&wait=60", headers={"X-Worker-ID": "w1"}, timeout=PATIENCE
                )
            )
        )
        claim.start()
        fake.wait_for(lambda: [worker["state"] for worker in stack.stats()["workers"]] == ["idle"])
        first.send_signal(signal.SIGTERM)
        claim.join(PATIENCE)
        assert answers[0].status_code == 204
        assert answers[0].headers["Connection"] == "close"
        assert first.ended() == 0


def test_start_with_an_inherited_socket_beyond_loopback_is_refused_without_a_token(stack: StackProcesses) -> None:
    with socket.socket() as listener:  # bound, and never listens
        listener.bind(("0.0.0.0", 0))
        refused = start_with(listener, stack)
        assert refused.ended() == 78
        assert "LISTEN: 0.0.0.0 is beyond this machine, so STACK_API_TOKEN is required" in "\n".join(refused.lines)


def test_start_with_an_inherited_socket_of_another_kind_says_what_is_needed(
    stack: StackProcesses, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "unix"))
        refused = start_with(listener, stack)
        assert refused.ended() == 78
        assert "passes AF_UNIX SOCK_STREAM, but workers need TCP" in "\n".join(refused.lines)


def test_listen_with_descriptors_meant_for_another_process_binds_its_own() -> None:
    [listener] = scheduler.listening_sockets(("127.0.0.1", 0), {"LISTEN_PID": "1", "LISTEN_FDS": "1"})
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_stop_with_descriptors_meant_for_another_process_serves_its_own_socket_until_the_end(
    fake: FakeBuildkite, stack: StackProcesses
) -> None:
    stack.scheduler_settings |= {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    process = stack.start_scheduler()
    assert "inherited=" not in process.wait_for_line("started")
    fake.wait_for(lambda: fake.calls_to("list"))
    fake.set_fault("deregister", hang=math.inf)
    process.send_signal(signal.SIGTERM)
    fake.wait_for(lambda: fake.calls_to("deregister"))
    assert requests.get(f"{stack.url}/health", timeout=PATIENCE).json()
    fake.clear_faults()
    assert process.ended() == 0


# --- Logs ---


def complaint(script: str, log: Path, journal: str) -> str:
    """What the script says of an unknown argument, when JOURNAL_STREAM is `journal`: "{own}" is where it says it."""
    with open(log, "wb") as stderr:
        status = os.fstat(stderr.fileno())
        environ = {"JOURNAL_STREAM": journal.format(own=f"{status.st_dev}:{status.st_ino}")}
        subprocess.run([*compiled(script), "--chek"], env=environ, stderr=stderr, timeout=PATIENCE, check=False)
    return log.read_text()


@pytest.mark.parametrize("script", ["scheduler.py", "worker.py"])
def test_log_to_the_journal_has_priorities_and_elsewhere_none(script: str, tmp_path: Path) -> None:
    assert complaint(script, tmp_path / "log", "{own}").startswith("<3>")
    # Inherited from a parent that logs to the journal.
    assert complaint(script, tmp_path / "log", "8:4711").startswith(script)


@pytest.mark.parametrize("script", ["scheduler.py", "worker.py"])
def test_start_with_standard_error_closed_gets_as_far_as_with_it(script: str) -> None:
    closing = ["sh", "-c", '"$@" 2>&-', "sh", *compiled(script), "--help"]
    assert subprocess.run(closing, env={}, capture_output=True, timeout=PATIENCE, check=False).returncode == 0


# --- SIGHUP ---


def test_reload_scheduler_takes_over_token_file_and_log_level(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd, tmp_path: Path
) -> None:
    token, settings = tmp_path / "token", tmp_path / "stack.env"
    token.write_text("old\n")
    settings.write_text("LOG_LEVEL=info\n")
    stack.scheduler_settings |= {"STACK_API_TOKEN_FILE": str(token), "SETTINGS_FILE": str(settings)}
    process = stack.start_scheduler()
    systemd.wait_for("READY=1")
    token.write_text("new\n")
    # As python-dotenv reads it at the start.
    settings.write_text('OTHER=1\nexport LOG_LEVEL = "debug"  # for a while\n')
    process.send_signal(signal.SIGHUP)
    process.wait_for_line("reloaded", "log_level=debug")
    systemd.wait_for("READY=1", 2)
    assert systemd.told.index("RELOADING=1") < len(systemd.told) - systemd.told[::-1].index("READY=1")

    def stats_with(value: str) -> int:
        return requests.get(
            f"{stack.url}/stats", headers={"Authorization": f"Bearer {value}"}, timeout=PATIENCE
        ).status_code

    assert (stats_with("old"), stats_with("new")) == (401, 200)
    process.wait_for_line("answered", "path=/stats", "status=200")


def test_reload_scheduler_with_bad_settings_changes_nothing_and_says_so(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    stack.scheduler_settings |= {"STACK_API_TOKEN_FILE": str(token)}
    process = stack.start_scheduler()
    token.unlink()
    process.send_signal(signal.SIGHUP)
    process.wait_for_line("unreloaded", "STACK_API_TOKEN", "No such file")
    answer = requests.get(f"{stack.url}/stats", headers={"Authorization": "Bearer old"}, timeout=PATIENCE)
    assert answer.status_code == 200


def test_reload_with_credentials_says_that_they_need_a_restart(stack: StackProcesses, tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "STACK_API_TOKEN").write_text("copied")
    stack.scheduler_settings |= {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    process = stack.start_scheduler()
    process.send_signal(signal.SIGHUP)
    process.wait_for_line("reloaded", "needs_restart=STACK_API_TOKEN")


def test_reload_without_what_it_reads_changes_nothing_and_says_so(stack: StackProcesses, tmp_path: Path) -> None:
    credentials, settings = tmp_path / "credentials", tmp_path / "stack.env"
    credentials.mkdir()
    (credentials / "STACK_API_TOKEN").write_text("copied")
    stack.scheduler_settings |= {"CREDENTIALS_DIRECTORY": str(credentials), "SETTINGS_FILE": str(settings)}
    process = stack.start_scheduler()
    (credentials / "STACK_API_TOKEN").rename(tmp_path / "kept")
    credentials.rmdir()
    process.send_signal(signal.SIGHUP)
    process.wait_for_line("unreloaded", "No such file", "credentials")
    assert requests.get(f"{stack.url}/stats", timeout=PATIENCE).status_code == 401
    credentials.mkdir()
    (tmp_path / "kept").rename(credentials / "STACK_API_TOKEN")
    settings.write_bytes(b"# caf\xe9\nLOG_LEVEL=debug\n")
    process.send_signal(signal.SIGHUP)
    process.wait_for_line("unreloaded", "can't decode byte 0xe9")
    settings.write_text("LOG_LEVEL=debug")
    process.send_signal(signal.SIGHUP)
    process.wait_for_line(" reloaded ", "log_level=debug")


def test_reload_worker_presents_the_new_token_and_goes_on_waiting(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("right")
    stack.scheduler_settings |= {"STACK_API_TOKEN": "right", "NOTIFY_SOCKET": ""}
    stack.start_scheduler()
    token.write_text("wrong")
    one = stack.start_worker("one", STACK_API_TOKEN_FILE=str(token), NOTIFY_SOCKET=str(tmp_path / "notify"))
    one.wait_for_line("retrying", "401")
    assert "401" in systemd.wait_for("STATUS=no job can be claimed")
    token.write_text("right")
    one.send_signal(signal.SIGHUP)
    one.wait_for_line("reloaded")
    systemd.wait_for("STATUS=waiting for a job for queue=default")
    job = fake.add_job(rules=["queue=default"])
    fake.wait_for(lambda: fake.jobs[job].state == "finished")
    assert one.poll() is None


# --- The worker under systemd ---


def test_notify_of_a_worker_tells_what_it_does(
    fake: FakeBuildkite, stack: StackProcesses, systemd: Systemd, tmp_path: Path
) -> None:
    stack.scheduler_settings["NOTIFY_SOCKET"] = ""
    stack.start_scheduler()
    one = stack.start_worker("one", NOTIFY_SOCKET=str(tmp_path / "notify"))
    systemd.wait_for("READY=1")
    systemd.wait_for("STATUS=waiting for a job for queue=default")
    job = fake.add_job(rules=["queue=default"])
    systemd.wait_for(f"STATUS=running job {job}")
    systemd.wait_for("STATUS=waiting for a job for queue=default", 2)
    one.send_signal(signal.SIGTERM)
    systemd.wait_for("STOPPING=1")
    assert one.ended() == 0


def limits_of(**settings: str) -> dict[str, str]:
    return worker.read_settings(worker.Settings, {"BUILDKITE_AGENT_TOKEN": "t", **settings}).limits


def test_limit_a_job_writes_what_the_kernel_reads() -> None:
    assert limits_of() == {}
    assert limits_of(WORKER_JOB_MEMORY="4G", WORKER_JOB_CPUS="2.5", WORKER_JOB_TASKS="512") == {
        "memory.max": "4294967296",
        "cpu.max": "250000 100000",
        "pids.max": "512",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WORKER_JOB_MEMORY", "4"),
        ("WORKER_JOB_MEMORY", "1M"),
        ("WORKER_JOB_CPUS", "0"),
        ("WORKER_JOB_CPUS", "two"),
        ("WORKER_JOB_TASKS", "3"),
        ("WORKER_JOB_TASKS", "64.5"),
        ("WORKER_JOB_TIMEOUT", "2"),
        ("WORKER_STOP_TIMEOUT", "forever"),
        ("WORKER_AGENT_USER", "nobody-of-that-name"),
    ],
)
def test_limit_a_job_with_a_bad_value_names_variable_and_value(name: str, text: str) -> None:
    with pytest.raises(worker.SettingsError, match=rf"{name}: .*'{text}'"):
        limits_of(**{name: text})


@pytest.mark.parametrize("uid", [12345, pwd.getpwnam("daemon").pw_uid])
def test_run_agent_as_a_user_without_being_root_is_refused(uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also as that very user: only root may set the agent's groups.
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(worker.SettingsError, match="WORKER_AGENT_USER: only a worker that runs as root"):
        limits_of(WORKER_AGENT_USER="daemon")


class Tree:
    """A directory that looks like a delegated cgroup: what is written there can be read."""

    def __init__(self, directory: Path, delegated: bool = True):
        self.unit = directory / "system.slice" / "stack-worker@1.service"
        self.job = self.unit / f"job-{UUID}"
        for cgroup in (self.unit, self.unit / "worker", self.job):
            cgroup.mkdir(parents=True)
            for name in ("cgroup.procs", "cgroup.subtree_control", "cgroup.kill", "memory.max", "pids.max", "cpu.max"):
                (cgroup / name).write_text("")
        (self.unit / "cgroup.procs").write_text("4711\n")
        self.own = directory / "own"
        self.own.write_text("1:name=systemd:/x\n0::/system.slice/stack-worker@1.service\n")
        if delegated:
            os.setxattr(self.unit, "user.delegate", b"1")

    def found(self) -> str | None:
        return worker.delegated_cgroup(str(self.unit.parent.parent), str(self.own))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    try:
        return Tree(tmp_path)
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"this file system keeps no user attributes: {error}")


def test_find_a_delegated_cgroup_by_its_mark(tree: Tree) -> None:
    assert tree.found() == str(tree.unit)


def test_find_a_delegated_cgroup_from_the_subgroup_that_systemd_started_us_in(tree: Tree) -> None:
    tree.own.write_text("0::/system.slice/stack-worker@1.service/worker\n")
    assert tree.found() == str(tree.unit)


def test_find_a_cgroup_that_systemd_has_not_delegated_leaves_it_alone(tmp_path: Path) -> None:
    assert Tree(tmp_path, delegated=False).found() is None


def test_find_a_cgroup_of_version_1_leaves_it_alone(tree: Tree) -> None:
    tree.own.write_text("4:memory:/system.slice/stack-worker@1.service\n")
    assert tree.found() is None


def test_enter_a_job_moves_the_worker_aside_and_writes_its_limits(tree: Tree) -> None:
    cgroup = worker.Cgroup(str(tree.unit), {"memory.max": "4294967296", "pids.max": "512"})
    assert (tree.unit / "worker" / "cgroup.procs").read_text() == "4711"
    assert (tree.unit / "cgroup.subtree_control").read_text() == "+memory +pids"
    cgroup.enter(UUID, 815)
    written = {name: (tree.job / name).read_text() for name in ("memory.max", "pids.max", "cpu.max", "cgroup.procs")}
    assert written == {"memory.max": "4294967296", "pids.max": "512", "cpu.max": "", "cgroup.procs": "815"}


def test_confine_jobs_on_a_kernel_that_cannot_end_a_cgroup_is_refused_ahead_of_any_change(tree: Tree) -> None:
    (tree.unit / "worker" / "cgroup.kill").unlink()
    with pytest.raises(FileNotFoundError, match="cgroup.kill"):
        worker.Cgroup(str(tree.unit), {"pids.max": "512"})
    assert (tree.unit / "cgroup.subtree_control").read_text() == ""
    assert (tree.unit / "worker" / "cgroup.procs").read_text() == ""


def test_move_the_worker_aside_beside_a_process_that_ends_goes_on(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = worker.write_text

    def write_no_pid(path: str, text: str) -> None:
        if text == "4711":
            raise ProcessLookupError
        write_text(path, text)

    monkeypatch.setattr(worker, "write_text", write_no_pid)
    worker.Cgroup(str(tree.unit), {"pids.max": "512"})
    assert (tree.unit / "cgroup.subtree_control").read_text() == "+pids"


@pytest.mark.parametrize(("limits", "swap"), [({"memory.max": "1"}, "0"), ({"pids.max": "64"}, "max")], ids=str)
def test_enter_a_job_with_a_limit_of_memory_gives_it_no_swap(tree: Tree, limits: dict[str, str], swap: str) -> None:
    (tree.job / "memory.swap.max").write_text("max")
    worker.Cgroup(str(tree.unit), limits).enter(UUID, 815)
    assert (tree.job / "memory.swap.max").read_text().startswith(swap)


def test_enter_a_job_whose_limit_cannot_be_written_fails(tree: Tree) -> None:
    cgroup = worker.Cgroup(str(tree.unit), {"memory.max": "1"})
    (tree.job / "memory.max").unlink()
    with pytest.raises(FileNotFoundError):
        cgroup.enter(UUID, 815)


def test_enter_a_job_that_fails_leaves_no_cgroup_behind(tree: Tree) -> None:
    cgroup = worker.Cgroup(str(tree.unit), {})
    assert cgroup.left() == [UUID]
    # In a cgroup the file would be there, and refuse the process: one that has gone, say.
    with pytest.raises(FileNotFoundError):
        cgroup.enter("another", 815)
    assert cgroup.left() == [UUID]


def test_start_with_limits_and_no_cgroup_exits_78_and_says_why(
    fake: FakeBuildkite, stack: StackProcesses, tmp_path: Path
) -> None:
    if worker.delegated_cgroup():
        pytest.skip("these tests run in a delegated cgroup")
    one = stack.start_worker("one", WORKER_JOB_MEMORY="4G")
    assert one.ended() == 78
    told = "\n".join(one.lines)
    assert "memory.max cannot be set on this host" in told
    assert "Delegate=yes" in told


# --- Jobs that go on too long, and what they leave ---

#: An agent whose job ends when it is cancelled.
LONG_AGENT = """#!/bin/sh
[ "$1" = --version ] && echo "buildkite-agent version 3.137.0" && exit 0
trap 'touch {directory}/cancelled; exit 0' QUIT
touch {directory}/running
while :; do sleep 0.05; done
"""


def write_agent(directory: Path, text: str) -> str:
    path = directory / "agent"
    path.write_text(text.format(directory=directory))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def long_stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    """A scheduler with one job; agents that run until they are cancelled."""
    with StackProcesses(fake, tmp_path, write_agent(tmp_path, LONG_AGENT)) as processes:
        fake.add_job(rules=["queue=default"])
        processes.start_scheduler()
        yield processes


def test_stop_a_busy_worker_cancels_its_job_after_the_stop_timeout(
    fake: FakeBuildkite, long_stack: StackProcesses
) -> None:
    one = long_stack.start_worker("one", WORKER_STOP_TIMEOUT="100ms")
    fake.wait_for((long_stack.directory / "running").exists)
    assert not (long_stack.directory / "cancelled").exists()
    one.send_signal(signal.SIGTERM)
    one.wait_for_line("signalled", "SIGQUIT", "WORKER_STOP_TIMEOUT")
    assert one.ended() == 0
    assert (long_stack.directory / "cancelled").exists()


def test_run_a_job_beyond_its_timeout_cancels_it_and_claims_on(fake: FakeBuildkite, long_stack: StackProcesses) -> None:
    one = long_stack.start_worker("one", WORKER_JOB_TIMEOUT="1s")
    one.wait_for_line("signalled", "SIGQUIT", "WORKER_JOB_TIMEOUT")
    one.wait_for_line("exited", "exit_status=0")
    assert (long_stack.directory / "cancelled").exists()
    assert one.poll() is None


LEAVING_AGENT = """#!/bin/sh
[ "$1" = --version ] && echo "buildkite-agent version 3.137.0" && exit 0
sleep 1000 &
echo $! > {directory}/left
"""


def test_end_a_job_without_a_cgroup_ends_what_is_left_of_its_process_group(fake: FakeBuildkite, tmp_path: Path) -> None:
    if worker.delegated_cgroup():
        pytest.skip("these tests run in a delegated cgroup")
    with StackProcesses(fake, tmp_path, write_agent(tmp_path, LEAVING_AGENT)) as stack:
        fake.add_job(rules=["queue=default"])
        stack.start_scheduler()
        one = stack.start_worker("one")
        one.wait_for_line("unconfined", "Delegate=yes")
        one.wait_for_line("left", "the process group")
        left = int((tmp_path / "left").read_text())
        fake.wait_for(lambda: worker.start_time(left) == "")
        assert len([line for line in one.lines if "unconfined" in line]) == 1


WHOAMI_AGENT = """#!/bin/sh
[ "$1" = --version ] && echo "buildkite-agent version 3.137.0" && exit 0
id -un > {directory}/out/user
pwd > {directory}/out/directory
env > {directory}/out/environment
touch "$BUILDKITE_BUILD_PATH/mine" && echo yes > {directory}/out/builds
cat /proc/$PPID/environ > {directory}/out/stolen
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start the agent as another user")
def test_run_agent_as_another_user_gives_it_a_home_and_builds_and_nothing_of_the_workers(fake: FakeBuildkite) -> None:
    user = pwd.getpwnam("daemon")
    with tempfile.TemporaryDirectory() as name, StackProcesses(fake, Path(name), "") as stack:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "out").mkdir()
        os.chown(directory / "out", user.pw_uid, user.pw_gid)
        stack.agent = write_agent(directory, WHOAMI_AGENT)
        fake.add_job(rules=["queue=default"])
        stack.start_scheduler()
        one = stack.start_worker("one", WORKER_AGENT_USER="daemon", STACK_API_TOKEN="nobody-may-see")
        one.wait_for_line("exited")

        def told(what: str) -> str:
            return (directory / "out" / what).read_text()

        assert told("user") == "daemon\n"
        assert told("directory") == f"{user.pw_dir}\n"
        assert told("builds") == "yes\n"
        assert {
            *(f"HOME={user.pw_dir}", "USER=daemon", "LOGNAME=daemon"),
            f"BUILDKITE_AGENT_CONFIG={worker.agent_config(daemon())[0]}",
        } <= set(told("environment").splitlines())
        assert "nobody-may-see" not in told("environment")
        assert told("stolen") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start the agent as another user")
@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=str)
def test_start_with_builds_that_the_agents_user_cannot_write_names_both(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        builds = Path(name) / "builds"
        builds.mkdir()
        settings = {"WORKER_AGENT_USER": "daemon", "WORKER_STATE": name, "BUILDKITE_BUILD_PATH": str(builds)}

        def said(*arguments: str) -> tuple[int, str]:
            run = [*compiled("worker.py"), *arguments]
            done = subprocess.run(run, env=settings, capture_output=True, text=True, timeout=PATIENCE, check=False)
            return done.returncode, done.stderr

        status, text = said(*arguments)
        assert status == (78 if arguments else 75)
        assert f"BUILDKITE_BUILD_PATH: daemon cannot write {builds}\n" in text
        shutil.chown(builds, "daemon")
        assert "BUILDKITE_BUILD_PATH" not in said("--check")[1]


def daemon(**environ: str) -> worker.Settings:
    """Settings of a worker whose agent runs as `daemon`."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory for another user")
    return worker.read_settings(worker.Settings, {"WORKER_AGENT_USER": "daemon"} | environ)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's that others can enter; in it `roots`, which is root's too, and `daemons`, which is not."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory for another user")
    with tempfile.TemporaryDirectory() as name:
        for directory in (Path(name), Path(name, "roots"), Path(name, "daemons")):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)
        shutil.chown(Path(name, "daemons"), "daemon")
        yield Path(name)


def test_make_builds_where_root_alone_can_write_gives_them_to_the_agents_user(place: Path) -> None:
    builds = place / "roots" / "new" / "builds"
    for _ in range(2):
        worker.make_builds(daemon(BUILDKITE_BUILD_PATH=str(builds)))
    assert [builds.owner(), builds.parent.owner()] == ["daemon", "root"]
    assert os.listdir(builds.parent) == ["builds"]
    assert builds.stat().st_mode & 0o777 == 0o755


def test_make_builds_where_their_user_can_write_is_done_as_that_user(place: Path) -> None:
    builds = place / "daemons" / "new" / "builds"
    worker.make_builds(daemon(BUILDKITE_BUILD_PATH=str(builds)))
    assert [builds.owner(), builds.parent.owner()] == ["daemon", "daemon"]


def test_make_builds_through_a_link_of_a_builds_makes_and_gives_away_nothing(place: Path) -> None:
    (place / "daemons" / "link").symlink_to(place / "roots")
    for beyond in ("builds", "new/builds"):
        settings = daemon(BUILDKITE_BUILD_PATH=str(place / "daemons" / "link" / beyond))
        assert f"users other than root can write {place}/daemons, " in worker.problem_of_builds(settings)
        with pytest.raises(PermissionError, match=f"users other than root can write {place}/daemons, "):
            worker.make_builds(settings)
    assert os.listdir(place / "roots") == []
    assert (place / "roots").owner() == "root"


def test_make_builds_through_a_link_of_roots_makes_them_where_it_leads(place: Path) -> None:
    (place / "link").symlink_to("roots")
    settings = daemon(BUILDKITE_BUILD_PATH=str(place / "link" / "builds"))
    assert worker.problem_of_builds(settings) == ""
    worker.make_builds(settings)
    assert (place / "roots" / "builds").owner() == "daemon"


def test_make_builds_beside_another_worker_that_was_quicker_takes_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = daemon(BUILDKITE_BUILD_PATH=str(place / "roots" / "builds"))

    def chown(path: str, *_: Any, **__: Any) -> None:
        (place / "roots" / "builds" / "of-a-job").mkdir(parents=True)

    monkeypatch.setattr(os, "chown", chown)
    worker.make_builds(settings)
    assert [path.name for path in (place / "roots").iterdir()] == ["builds"]


@pytest.mark.parametrize(
    ("made", "asked", "found"),
    [
        ({}, "roots/missing/file", ""),
        ({"roots/file": (0, 0o644)}, "roots/file", ""),
        ({"roots/file": (0, 0o664)}, "roots/file", "roots/file"),
        ({"roots/file": (1, 0o644)}, "roots/file", "roots/file"),
        ({}, "daemons", "daemons"),
        ({"daemons/file": (0, 0o644)}, "daemons/file", "daemons"),
        # As in /tmp: what is root's there stays, a name that is not there yet may be anybody's.
        ({"roots": (0, 0o1777), "roots/file": (0, 0o644)}, "roots/file", ""),
        ({"roots": (0, 0o1777), "roots/file": (1, 0o644)}, "roots/file", "roots"),
        ({"roots": (0, 0o1777)}, "roots/missing", "roots"),
        ({"daemons": (1, 0o1777), "daemons/file": (0, 0o644)}, "daemons/file", "daemons"),
        ({"roots": (0, 0o775), "roots/file": (0, 0o644)}, "roots/file", "roots"),
        ({"roots/link": "../daemons/missing"}, "roots/link/file", "daemons"),
        ({"roots/link": "../roots"}, "roots/link/missing", ""),
        ({"daemons/link": "../roots"}, "daemons/link/missing", "daemons"),
    ],
)
def test_find_detour_on_the_way_to_a_path(
    place: Path, made: dict[str, tuple[int, int] | str], asked: str, found: str
) -> None:
    for name, what in made.items():
        if isinstance(what, str):
            (place / name).symlink_to(what)
            continue
        if not (place / name).exists():
            (place / name).touch()
        os.chown(place / name, what[0], what[0])
        (place / name).chmod(what[1])
    assert worker.unsafe_place(str(place / asked)) == (str(place / found) if found else "")


def test_find_detour_behind_links_that_lead_in_a_circle_ends(place: Path) -> None:
    (place / "roots" / "link").symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        worker.unsafe_place(str(place / "roots" / "link" / "file"))


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=str)
def test_start_with_a_state_directory_that_a_build_can_write_is_refused(place: Path, arguments: list[str]) -> None:
    (place / "daemons" / "state").symlink_to(place / "roots")
    done = subprocess.run(
        [*compiled("worker.py"), *arguments],
        env={"WORKER_AGENT_USER": "daemon", "WORKER_STATE": str(place / "daemons" / "state")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 78
    assert "WORKER_STATE: " in done.stderr and f"users other than root can write {place}/daemons, " in done.stderr
    assert os.listdir(place / "roots") == []


def test_check_builds_as_a_user_that_we_cannot_become_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> NoReturn:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(subprocess, "run", forbidden)
    settings = daemon(BUILDKITE_BUILD_PATH=str(place / "daemons"))
    assert "cannot be checked as daemon: Operation not permitted" in worker.problem_of_builds(settings)


# --- The agent's own configuration ---


@pytest.fixture
def configs(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where an agent looks for its configuration, beside its user's home: the first that is there counts."""
    (place / "roots" / "agent").touch()
    paths = [place / "roots" / "buildkite-agent.cfg", place / "daemons" / "buildkite-agent.cfg"]
    monkeypatch.setattr(worker, "AGENT_CONFIGS", (str(paths[1]),))
    return paths


def told_config(place: Path, **environ: str) -> str:
    settings = daemon(BUILDKITE_AGENT_PATH=str(place / "roots" / "agent"))
    return worker.agent_environment(settings, environ, "")["BUILDKITE_AGENT_CONFIG"]


def unsafe_config(place: Path, **environ: str) -> list[str]:
    return worker.unsafe(daemon(BUILDKITE_AGENT_PATH=str(place / "roots" / "agent")), environ)


def test_start_agent_as_a_user_takes_the_configuration_that_root_alone_can_write(
    place: Path, configs: list[Path]
) -> None:
    for path in configs:
        path.touch()
    assert told_config(place) == str(configs[0])


def test_start_agent_as_a_user_passes_over_a_configuration_that_a_build_can_write(
    place: Path, configs: list[Path]
) -> None:
    assert unsafe_config(place) == []
    configs[1].touch()
    assert told_config(place) == "/dev/null"
    [told] = unsafe_config(place)
    assert f"users other than root can write {configs[1]}: the agent gets /dev/null instead" in told


def test_start_agent_as_a_user_keeps_the_configuration_that_was_named(place: Path, configs: list[Path]) -> None:
    for path in configs:
        path.touch()
        assert told_config(place, BUILDKITE_AGENT_CONFIG=str(path)) == str(path)
    assert unsafe_config(place, BUILDKITE_AGENT_CONFIG=str(configs[0])) == []
    [told] = unsafe_config(place, BUILDKITE_AGENT_CONFIG=str(configs[1]))
    assert f"users other than root can write {configs[1]}" in told


def test_start_agent_as_the_workers_own_user_leaves_its_configuration_to_itself() -> None:
    settings = worker.read_settings(worker.Settings, {})
    assert "BUILDKITE_AGENT_CONFIG" not in worker.agent_environment(settings, {}, "")
