"""Healthy, throw-away and device hosts, in a real systemd with the real agent."""

# ruff: noqa: F811  what is imported are fixtures, which tests take as arguments

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from conftest import LONG_RUN
from fake_buildkite import FakeBuildkite
from machine import Machine, debian, wait_for
from processes import ROOT, StackProcesses, agent_path
from test_systemd import WORKER, Stack, boot, fake, installed, machine, stack  # noqa: F401  fixtures

README = (ROOT / "systemd" / "README.md").read_text()
API_TOKEN = "the-api-token"


@pytest.fixture
def scheduler(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    """A scheduler out here: its workers' machines come and go."""
    with StackProcesses(fake, tmp_path, agent_path("fake"), STACK_API_TOKEN=API_TOKEN) as processes:
        processes.start_scheduler()
        yield processes


def worker_env(url: str, fake: FakeBuildkite) -> str:
    return f"WORKER_API_SERVER={url}\nBUILDKITE_AGENT_ENDPOINT={fake.url}\nWORKER_POLL_INTERVAL=200ms\n"


def commands_below(heading: str, text: str = README) -> list[str]:
    """The commands below a heading of systemd/README.md, or of another text."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    return [line[2:] for line in section.splitlines() if line.startswith("$ ")]


def ini_below(heading: str) -> str:
    text: str = re.findall(r"```ini\n(.*?)```", README.split(f"\n## {heading}\n")[1], re.DOTALL)[0]
    return text


# --- What the top README tells a newcomer to do ---


def test_follow_the_readme_from_the_installation_to_a_bad_night_does_what_it_says(
    machine: Machine, fake: FakeBuildkite
) -> None:
    top, lab = (ROOT / "README.md").read_text(), Stack(machine, fake)
    machine.copy_project()
    for command in commands_below("Install it", top):
        words = shlex.split(command.removeprefix("sudo "))
        if words == ["$EDITOR", "/etc/stack/agent-token"]:
            machine.write(words[1], fake.token + "\n")
        elif words[0] == "$EDITOR":
            lab.point_at_the_fake()
            lab.set("scheduler", LISTEN=f"127.0.0.1:{lab.port}")  # where stackctl asks, too
        elif words[0] == "stackctl":
            wait_for(lambda: machine.status("stackctl", "status") == 0, machine.run("stackctl", "status", check=False))
        elif words[0] != "apt-get":  # the machine has these packages
            machine.run("sh", "-c", f"cd /root/agent-stack && {shlex.join(words)}")
    lab.run_job()
    assert fake.token not in lab.journal()

    status, why, pause, resume, stop = commands_below("Look after it", top)
    machine.run("sh", "-c", run_as_root(pause, "host:build1", "host:build"))
    one, other = fake.add_job(command="true"), fake.add_job(command="true")
    in_short = "018f2c1a-0000-4000-8000-000000000001"
    wait_for(lambda: "disk swap" in machine.run("sh", "-c", run_as_root(why, in_short, one), check=False), "why")
    machine.run("sh", "-c", run_as_root(stop, in_short, other))
    fake.wait_for(lambda: fake.jobs[other].state == "finished", 30)
    assert "disk swap" in machine.run("sh", "-c", run_as_root(status), check=False)
    machine.run("sh", "-c", run_as_root(resume, "host:build1", "host:build"))
    lab.passed(one)


def run_as_root(command: str, name: str = "", real_name: str = "") -> str:
    """A command of a document, with what it names there put right for this machine."""
    assert name in command
    command = command.removeprefix("sudo ")
    return command.replace(name, real_name) if name else command


# --- Throw-away machines ---


def test_boot_the_image_of_the_readme_runs_one_job_and_turns_itself_off(
    scheduler: StackProcesses,
    fake: FakeBuildkite,
    tmp_path: Path,
) -> None:
    image = make_image(tmp_path, scheduler.url, fake)
    for number in (1, 2):
        directory = tmp_path / f"machine-{number}"
        directory.mkdir()
        # What one machine leaves in its files the next does not see.
        uuid = fake.add_job(command="! [ -e /var/tmp/was-here ] && touch /var/tmp/was-here")
        with Machine(directory, agent_path("v3"), tree=image, hostname=f"job-{number}") as booted_machine:
            booted_machine.ended()
        assert (fake.jobs[uuid].state, fake.jobs[uuid].exit_status) == ("finished", 0), fake.dump()
    told = requests.get(f"{scheduler.url}/stats", headers={"Authorization": f"Bearer {API_TOKEN}"}, timeout=10).json()
    assert told["workers"] == [], "both have said goodbye"


def make_image(directory: Path, url: str, fake: FakeBuildkite) -> Path:
    """Do what the README says, with a Debian that is there already."""
    image, files, agent = directory / "image", directory / "files", agent_path("v3")
    make, *commands, boot = [command.removeprefix("sudo ") for command in commands_below("Throw-away machines")]
    assert make.startswith("debootstrap ") and boot.startswith("systemd-nspawn ")
    subprocess.run(["cp", "-a", debian("bookworm"), image], check=True)
    shutil.copytree(ROOT / "systemd", files / "systemd")
    for name in ("scheduler.py", "worker.py", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, files)
    (directory / "api-token").write_text(API_TOKEN + "\n")
    here = {"/usr/local/bin/buildkite-agent": agent, "/etc/stack/api-token": str(directory / "api-token")}
    for command in commands:
        words = [re.sub("^image(?=/|$)", str(image), here.get(word, word)) for word in shlex.split(command)]
        if words[0] == "$EDITOR":
            with open(words[1], "a") as settings:
                settings.write(worker_env(url, fake))
        else:
            subprocess.run(words, cwd=files, check=True, timeout=60)
    return image


def test_kill_the_worker_of_a_throw_away_machine_turns_it_off(
    machine: Machine, scheduler: StackProcesses, fake: FakeBuildkite
) -> None:
    throw_away(machine, scheduler, fake)
    machine.run("kill", "-9", machine.show(WORKER, "MainPID"))
    machine.ended()


def test_start_a_throw_away_machine_with_wrong_settings_turns_it_off(
    machine: Machine, scheduler: StackProcesses, fake: FakeBuildkite
) -> None:
    throw_away(machine, scheduler, fake, WORKER_WAIT="nonsense")
    machine.ended()


def throw_away(machine: Machine, scheduler: StackProcesses, fake: FakeBuildkite, **settings: str) -> None:
    machine.copy_project()
    machine.install("worker")
    machine.write("/etc/stack/api-token", API_TOKEN + "\n")
    more = "".join(f"{name}={text}\n" for name, text in settings.items())
    with open(machine.path("/etc/stack/worker.env"), "a") as file:
        file.write(worker_env(scheduler.url, fake) + more)
    drop_in = (ROOT / "systemd" / "throw-away.conf").read_text()
    machine.write("/etc/systemd/system/stack-worker@.service.d/throw-away.conf", drop_in)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "--no-block", "stack-workers.target")
    if not settings:
        wait_for(lambda: machine.show(WORKER, "ActiveState") == "active", "the worker runs")


# --- Device labs ---


def test_put_a_device_lab_together_as_the_readme_says_checks_each_board_and_waits_for_a_person(
    machine: Machine, fake: FakeBuildkite
) -> None:
    lab = Stack(machine, fake)
    lab.install(workers=0)
    lab.set("scheduler", SCHEDULER_QUEUES="default,boards")
    settings = ini_below("Device labs").replace("/dev/serial/by-id/usb-FTDI_board7", "/srv/board7")
    assert "WORKER_HEALTH_COMMAND=/etc/stack/check-board\nBOARD=/srv/board7\n" in settings
    machine.write("/etc/stack/worker-board-7.env", settings)
    machine.write("/srv/board7", "login:\n")
    lab.start()
    for command in commands_below("Device labs"):
        words = shlex.split(command.removeprefix("sudo "))
        if words[0] in ("install", "systemctl"):
            machine.run("sh", "-c", f"cd /root/agent-stack && {shlex.join(words)}")
    rules = ["queue=boards", "board=rpi4"]
    one = fake.add_job(queue="boards", rules=rules, command='[ "$BOARD" = /srv/board7 ]')
    lab.passed(one)
    # The board is unplugged, and plugged in again.
    machine.run("mv", "/srv/board7", "/srv/unplugged")
    machine.run("systemctl", "restart", "stack-worker@board-7")
    assert "/srv/board7 is not there" in lab.wait_for_line("retrying what=health")
    machine.run("mv", "/srv/unplugged", "/srv/board7")
    lab.passed(fake.add_job(queue="boards", rules=rules, command="true"))
    # It hangs, and is mended. That alone does not count: a person has to say so.
    machine.run("sh", "-c", "rm /srv/board7; mkdir /srv/board7")
    machine.run("systemctl", "restart", "stack-worker@board-7")
    assert "does not answer" in lab.wait_for_line("health", "status=3")
    machine.run("sh", "-c", "rmdir /srv/board7; echo login: >/srv/board7")
    last = fake.add_job(queue="boards", rules=rules, command="true")
    machine.run("systemctl", "restart", "stack-worker@board-7")
    lab.wait_for_line("retrying what=health", "does not answer")
    server = ["--server", f"http://127.0.0.1:{lab.port}"]

    def why() -> str:
        return " ".join(machine.run("stackctl", "why", last, *server).split())

    wait_for(lambda: re.search("workers_unfit: .*build-board-7 on build: /srv/board7 does not answer", why()), "why")
    machine.run("stackctl", "resume", "--quarantine", "build-board-7", *server)
    lab.passed(last)


# --- The health command ---


#: Many processes, of which each would stay for hours.
MANY = "i=0; while [ $i -lt 100 ]; do setsid sleep 31337 & i=$((i + 1)); done"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"{MANY}; sleep 31337", "did not end within 2 s"),
        (f"{MANY}; id -un; exit 1", "buildkite-agent"),
    ],
    ids=["hangs", "ends"],
)
def test_run_a_health_command_in_a_cgroup_of_its_own_leaves_nothing(
    installed: Stack, command: str, reason: str
) -> None:
    start_with_check(installed, command)
    assert reason in installed.wait_for_line("retrying what=health", timeout=30)
    wait_for(lambda: "sleep 31337" not in installed.machine.run("ps", "-eo", "args"), "nothing of it is left")
    unit = installed.machine.show(WORKER, "ControlGroup")
    wait_for(lambda: not installed.machine.path(f"/sys/fs/cgroup{unit}/job-health").exists(), "nor its cgroup")


def test_run_a_health_command_that_takes_too_much_is_ended_or_says_why_there_is_no_limit(installed: Stack) -> None:
    start_with_check(installed, "head -c 700M /dev/zero | tail -c 699M | wc -c; exit 1", "60.0")
    line = installed.wait_for_line("retrying what=health", timeout=30)
    has_memory = "memory" in installed.machine.path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert ("732954624" in line) is not has_memory
    assert ("unlimited what=WORKER_HEALTH_COMMAND" in installed.journal()) is not has_memory
    assert installed.machine.show(WORKER, "ActiveState") == "active"


def start_with_check(installed: Stack, command: str, seconds: str = "2.0") -> None:
    """Start a worker with this health command, and with so much time for it."""
    script = installed.machine.path("/opt/stack/worker.py")
    text, count = re.subn(
        "^HEALTH_SECONDS, (.*) = 60.0,", rf"HEALTH_SECONDS, \1 = {seconds},", script.read_text(), flags=re.M
    )
    assert count == 1
    script.write_text(text)
    installed.machine.write("/etc/stack/check", f"#!/bin/sh\n{command}\n")
    installed.machine.run("chmod", "755", "/etc/stack/check")
    installed.set("worker", WORKER_HEALTH_COMMAND="/etc/stack/check")
    installed.start()


# --- What jobs leave ---

#: Where workers keep their state, and builds are.
BUILDS = "/var/lib/stack-worker"


def test_run_jobs_by_the_drop_in_without_root_gives_each_an_empty_tmp(installed: Stack) -> None:
    installed.drop_in("stack-worker@.service", (ROOT / "systemd" / "no-root.conf").read_text())
    installed.machine.write("/tmp/of-the-machine", "")
    installed.start()
    # The agent has files of its own there too.
    installed.run_job(
        "mkdir -p /tmp/a/b /var/tmp/c; echo x > /tmp/a/b/file; chmod 0 /tmp/a/b/file; ln -s /etc /tmp/etc"
    )
    installed.run_job("! ls -d /tmp/a /tmp/etc /var/tmp/c")
    assert installed.machine.path("/tmp/of-the-machine").exists()
    assert installed.machine.path("/etc/passwd").exists()


def test_run_jobs_that_leave_processes_and_files_in_tmp_leaves_the_host_as_clean_as_after_the_tenth(
    installed: Stack,
) -> None:
    installed.drop_in("stack-worker@.service", (ROOT / "systemd" / "no-root.conf").read_text())
    # On a file system of its own, so that nobody else's files count.
    installed.machine.run("mkdir", "-p", BUILDS)
    installed.machine.run("mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "tmpfs", BUILDS)
    installed.set("worker", WORKER_MIN_FREE="16M")
    installed.start()
    # It waits until the other is in a session of its own: before, the end of the job's terminal would end it.
    command = "setsid sh -c 'touch /tmp/there; exec sleep 31337' >/dev/null 2>&1 &\n"
    command += "while [ ! -e /tmp/there ]; do sleep 0.01; done\n"
    command += "head -c 1M /dev/zero >/tmp/left-$$; head -c 1M /dev/zero >kept"

    def figures() -> dict[str, int]:
        unit = installed.machine.show(WORKER, "ControlGroup")
        pid = installed.main_pid(WORKER)
        cgroups = installed.machine.path(f"/sys/fs/cgroup{unit}")
        return {
            "processes of builds": len(installed.processes_of_builds()),
            "processes of the unit": sum(len(path.read_text().split()) for path in cgroups.rglob("cgroup.procs")),
            "cgroups": len([path for path in cgroups.iterdir() if path.is_dir()]),
            "files": len(installed.machine.run("ls", f"/proc/{pid}/fd").split()),
            "mounts": len(installed.machine.run("cat", f"/proc/{pid}/mountinfo").splitlines()),
            "left in /tmp": installed.machine.run("find", "/tmp", "-name", "left-*").count("left"),
            "files of builds": len(installed.machine.run("find", BUILDS, "-xdev").split()),
            "free": int(installed.machine.run("stat", "--file-system", "--format", "%f", BUILDS)),
        }

    def memory() -> int:
        status = installed.machine.run("cat", f"/proc/{installed.main_pid(WORKER)}/status")
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])

    def run(count: int) -> dict[str, int]:
        uuids = [installed.fake.add_job(command=command) for _ in range(count)]
        done = installed.fake.jobs
        installed.fake.wait_for(lambda: all(done[uuid].state == "finished" for uuid in uuids), 900)
        wait_for(lambda: installed.processes_of_builds() == [], "no process of a build is left")
        return figures()

    before, used = run(10), memory()
    wait_for(lambda: figures() == before, "nothing changes while nothing runs")
    run(90 if LONG_RUN else 10)
    wait_for(lambda: figures() == before, f"the same as after job 10: {before}")
    print(f"after job 10 and the last: {before}; memory of the worker: {used} kB, then {memory()} kB")
    assert memory() <= used + 2048
    assert before["processes of builds"] == before["left in /tmp"] == 0
    assert (before["processes of the unit"], before["cgroups"]) == (1, 1)
    assert before["files of builds"] > 3, "they are on that file system"
    told = installed.get("/stats")["workers"][0]
    assert told["strays"] == (100 if LONG_RUN else 20)


def test_run_jobs_by_the_plain_unit_leaves_the_machines_tmp_alone(stack: Stack) -> None:
    stack.run_job("touch /tmp/kept")
    stack.run_job("[ -e /tmp/kept ]")
