"""Healthy hosts: the worker's gate, what the scheduler makes of it, and workers that end by themselves.

The first half runs worker.py against a scripted scheduler; the second the real pair against a fake Buildkite.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

import worker
from conftest import LONG_RUN
from fake_buildkite import FakeBuildkite
from processes import ROOT, StackProcesses, agent_path, children, command, program, wait_until
from test_worker import AGENT_TOKEN, OTHER, STACK_TOKEN, UUID, Answer, Bench, Call, bench, refusal, settings

__all__ = ["bench"]  # a fixture

MIB = 1 << 20
#: In place of what takes seconds.
QUICK: dict[str, float | str] = {"LOOK_SECONDS": 0.05, "HEALTH_AGAIN_SECONDS": 0.05}


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 64 MiB at that path; skips where this user may not mount one."""
    path.mkdir()
    mounted = subprocess.run(
        [program("mount"), "-t", "tmpfs", "-o", "size=64m,mode=1777", "tmpfs", str(path)], check=False, timeout=20
    )
    if mounted.returncode:
        assert not os.environ.get("CI"), "a file system cannot be mounted here"
        pytest.skip("this user may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run([program("umount"), "--lazy", str(path)], check=True, timeout=20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as path:
        yield path


def fill(disk: Path) -> Path:
    """Leave less than 10 MiB free; the file to be removed again."""
    found = os.statvfs(disk)
    big = disk / "big"
    big.write_bytes(b"x" * (found.f_bavail * found.f_frsize - 9 * MIB))
    return big


def told(bench: Bench, state: str) -> list[Call]:
    """What the worker has told of itself in that state so far."""
    return [call for call in bench.scheduler.calls_to("introduce") if call.body["state"] == state]


# --- What costs nothing to look at ---


@pytest.mark.parametrize(
    ("least", "says"), [("0K", ""), ("999T", r"/\S+ has [0-9.e+]+ GiB free, less than WORKER_MIN_FREE \(\d+.0 GiB\)")]
)
def test_look_for_space_says_how_much_is_free_and_how_little_is_enough(tmp_path: Path, least: str, says: str) -> None:
    found = settings(BUILDKITE_BUILD_PATH=str(tmp_path / "later/made"), WORKER_MIN_FREE=least)
    assert re.fullmatch(says, worker.space_problem(found))


@pytest.mark.parametrize(
    ("total", "available", "is_fit"), [(1000, 50, True), (1000, 49, False), (64 << 20, 1 << 20, False)]
)
def test_look_for_memory_wants_five_percent_of_it_available(
    tmp_path: Path, total: int, available: int, is_fit: bool
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
    assert bool(worker.memory_problem(str(tmp_path / "meminfo"))) is not is_fit
    assert worker.memory_problem(str(tmp_path / "none")) == ""


def test_look_for_inodes_wants_one_percent_of_them_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = settings(BUILDKITE_BUILD_PATH=str(tmp_path), WORKER_MIN_FREE="0K")

    def with_inodes(free: int, all_of_them: int) -> str:
        stat = os.statvfs_result((4096, 4096, 10, 10, 10, all_of_them, free, free, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: stat)
        return worker.space_problem(found)

    assert with_inodes(10, 1000) == ""
    assert with_inodes(0, 0) == ""  # as btrfs tells
    assert with_inodes(9, 1000).endswith("has 9 of 1000 inodes free, less than 1 %")


@pytest.mark.parametrize(("text", "count"), [("1GiB", 1 << 30), ("512M", 512 << 20), ("4KiB", 4096)])
def test_read_a_size_takes_it_with_and_without_ib(text: str, count: int) -> None:
    assert worker.size(text) == count
    with pytest.raises(ValueError, match="is not a size"):
        worker.size(text + "/s")


@pytest.mark.parametrize(
    ("count", "text"), [(100, "100 B"), (96.5 * MIB, "96.5 MiB"), (2048, "2 KiB"), (3 << 30, "3.0 GiB")]
)
def test_tell_a_size_is_short(count: float, text: str) -> None:
    assert worker.size_text(count) == text


def test_look_at_the_host_takes_less_than_a_millisecond(bench: Bench) -> None:
    found = settings(WORKER_STATE=str(bench.directory), BUILDKITE_AGENT_PATH=str(bench.agent_path), WORKER_NAME="a")
    os.makedirs(found.builds)
    health = worker.Health(found, worker.take_slot(found), worker.Signals(), None)
    health.unfit()
    began = time.process_time()
    for _ in range(200):
        assert health.unfit() == ""
    assert (time.process_time() - began) / 200 < 0.001


def test_fill_the_disk_while_a_claim_waits_withdraws_it_and_says_why_until_there_is_space(
    bench: Bench, disk: Path
) -> None:
    one = bench.start(QUICK, BUILDKITE_BUILD_PATH=str(disk), WORKER_MIN_FREE="10M")
    bench.scheduler.wait_for("claim")
    big = fill(disk)
    bench.scheduler.wait_for("claim closed")
    wait_until(lambda: len(told(bench, "unfit")) > 1, "the worker tells again and again that it is unfit")
    reason = told(bench, "unfit")[0].body["reason"]
    assert re.fullmatch(rf"{disk} has [0-9.]+ MiB free, less than WORKER_MIN_FREE \(10 MiB\)", reason)
    one.wait_for_line(r"^\S+ warning retrying what=health problem=.*MiB free")
    assert bench.scheduler.verbs().count("claim") == 1
    big.unlink()
    bench.scheduler.wait_for("claim", 2)
    one.wait_for_line("recovered what=health")


def test_claim_that_comes_to_a_host_that_is_unfit_by_then_is_released_as_unfit(bench: Bench, disk: Path) -> None:
    bench.start({"LOOK_SECONDS": 60.0}, BUILDKITE_BUILD_PATH=str(disk), WORKER_MIN_FREE="10M")
    bench.scheduler.wait_for("claim")
    big = fill(disk)
    bench.scheduler.put_job()
    release = bench.scheduler.wait_for("release")[0]
    assert release.body["code"] == "unfit" and "MiB free" in release.body["reason"]
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    assert bench.scheduler.verbs() == ["claim", "release"]
    assert not (bench.directory / "pid").exists(), "no agent was started"
    big.unlink()
    bench.scheduler.wait_for("claim", 2)


def test_run_the_job_that_fills_the_disk_lets_it_end_and_claims_no_other(bench: Bench, disk: Path) -> None:
    bench.write_agent(f"head -c 58M /dev/zero > {disk}/big; await go; exit 0")
    bench.scheduler.put_job(lease_seconds=0.3)
    bench.start(QUICK, BUILDKITE_BUILD_PATH=str(disk), WORKER_MIN_FREE="10M")
    wait_until(lambda: (disk / "big").exists() and os.statvfs(disk).f_bavail < 9 * MIB // 4096, "the disk is full")
    bench.scheduler.wait_for("touch", 2)
    bench.touch("go")
    complete = bench.scheduler.wait_for("complete")[0]
    assert complete.body["exit_status"] == 0
    assert complete.body["strays"] == 0 and complete.body["free"] < 10 * MIB
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    assert bench.scheduler.verbs().count("claim") == 1
    (disk / "big").unlink()
    bench.scheduler.wait_for("claim", 2)


@pytest.mark.parametrize("name", ["WORKER_STATE", "BUILDKITE_BUILD_PATH"])
def test_replace_a_directory_by_a_file_withdraws_the_claim_until_it_is_back(bench: Bench, name: str) -> None:
    builds = bench.directory / "builds"
    builds.mkdir()
    bench.start(QUICK, BUILDKITE_BUILD_PATH=str(builds))
    bench.scheduler.wait_for("claim")
    path = bench.state if name == "WORKER_STATE" else builds
    path.rename(bench.directory / "kept")
    path.touch()
    bench.scheduler.wait_for("claim closed")
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    assert told(bench, "unfit")[0].body["reason"] == f"{name}: this user cannot write {path}"
    path.unlink()
    (bench.directory / "kept").rename(path)
    bench.scheduler.wait_for("claim", 2)


@pytest.fixture
def daemons() -> Iterator[Bench]:
    """A bench of which the agent runs as `daemon`. Others than root can write only what is `daemon`'s."""
    if os.geteuid() != 0:
        pytest.skip("only root can start the agent as another user")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "daemons").mkdir()
        shutil.chown(Path(name) / "daemons", "daemon")
        made = Bench(Path(name) / "daemons")
        made.state = Path(name) / "state"
        yield made
        made.close()


def test_take_the_builds_away_from_the_agents_user_withdraws_the_claim_until_it_can_write_them(daemons: Bench) -> None:
    place = daemons.state.parent / "place"
    builds = place / "builds"
    daemons.start(QUICK, WORKER_AGENT_USER="daemon", BUILDKITE_BUILD_PATH=str(builds))
    daemons.scheduler.wait_for("claim")
    assert builds.owner() == "daemon"

    def closed(path: Path, mode: int, number: int) -> None:
        """Take a right of the path away, and give it back."""
        before = path.stat().st_mode
        path.chmod(mode)
        wait_until(lambda: told(daemons, "unfit")[number - 1 :], "the worker tells that it is unfit")
        reason = told(daemons, "unfit")[-1].body["reason"]
        assert reason == f"BUILDKITE_BUILD_PATH: daemon cannot write {builds}"
        claims = len(daemons.scheduler.calls_to("claim"))
        path.chmod(before)
        daemons.scheduler.wait_for("claim", claims + 1)

    closed(builds, 0o555, 1)
    closed(place, 0o700, len(told(daemons, "unfit")) + 1)
    shutil.chown(builds, "root")
    count = len(told(daemons, "unfit"))
    wait_until(lambda: told(daemons, "unfit")[count:], "root's own are no builds of daemon's")
    claims = len(daemons.scheduler.calls_to("claim"))
    builds.rmdir()  # then they are made anew
    daemons.scheduler.wait_for("claim", claims + 1)
    assert builds.owner() == "daemon"
    daemons.scheduler.put_job()
    assert daemons.scheduler.wait_for("complete")[0].body["exit_status"] == 0


def test_get_a_job_when_the_agents_user_cannot_write_its_builds_any_more_releases_it_as_unfit(daemons: Bench) -> None:
    builds = daemons.state.parent / "builds"
    daemons.start({"LOOK_SECONDS": 60.0}, WORKER_AGENT_USER="daemon", BUILDKITE_BUILD_PATH=str(builds))
    daemons.scheduler.wait_for("claim")
    builds.chmod(0o555)
    daemons.scheduler.put_job()
    release = daemons.scheduler.wait_for("release")[0]
    assert (release.body["code"], release.body["reason"]) == (
        "unfit",
        f"the host is unfit: BUILDKITE_BUILD_PATH: daemon cannot write {builds}",
    )


def test_look_at_the_builds_as_their_user_takes_a_process_only_now_and_then(
    daemons: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"WORKER_STATE": str(daemons.state), "BUILDKITE_AGENT_PATH": str(daemons.agent_path)}
    found = settings(WORKER_AGENT_USER="daemon", WORKER_NAME="a", **place)
    health = worker.Health(found, worker.take_slot(found), worker.Signals(), None)
    asked: list[str] = []
    as_agent = worker.as_agent

    def noted(settings: worker.Settings, *command: str) -> bool:
        asked.append(command[0])
        return as_agent(settings, *command)

    monkeypatch.setattr(worker, "as_agent", noted)

    def looks(count: int) -> int:
        """How many processes so many looks took."""
        asked.clear()
        assert [health.unfit() for _ in range(count)] == [""] * count
        return len(asked)

    assert looks(1) > 0
    began = time.process_time()
    assert looks(200) == 0
    assert (time.process_time() - began) / 200 < 0.001
    Path(found.builds).chmod(0o700)
    assert looks(3) == 1
    monkeypatch.setattr(worker, "BUILDS_SECONDS", 0.0)
    health.builds_good_until = 0.0
    assert looks(3) == 3


def test_start_with_little_space_warns_once_and_claims(bench: Bench, disk: Path) -> None:
    one = bench.start(QUICK, BUILDKITE_BUILD_PATH=str(disk), WORKER_MIN_FREE="40M")
    bench.scheduler.wait_for("claim")
    one.wait_for_line(
        rf"warning low path={disk} free=\"64 MiB\" now=\"below 40 MiB .WORKER_MIN_FREE. no job is claimed"
    )
    bench.scheduler.put("claim", *[Answer(204)] * 5)
    bench.scheduler.wait_for("claim", 6)
    assert one.log.count("warning low") == 1


def test_stop_while_unfit_ends_at_once(bench: Bench) -> None:
    one = bench.start(WORKER_MIN_FREE="999T")
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert bench.scheduler.verbs() == []


# --- The health command ---


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo 'fan 2 is dead'; echo more; exit 1", "fan 2 is dead"),
        ("exit 1", "WORKER_HEALTH_COMMAND exited with 1"),
        ("echo 'board is gone'; exit 3", "board is gone"),
        ("echo oops >&2; exit 7", "WORKER_HEALTH_COMMAND exited with 7: oops"),
        ("kill -9 $$", "WORKER_HEALTH_COMMAND exited with -9"),
        ("/nowhere/check", "WORKER_HEALTH_COMMAND exited with 127: .*not found"),
        ("echo begun; sleep 60", r"WORKER_HEALTH_COMMAND did not end within 0.3 s: begun"),
        (r"printf 'a\033[31mb\r\nc'; exit 1", r"a\\x1b\[31mb"),
        ("yes | head -c 10000000; exit 1", "y"),
        ("head -c 10000000 /dev/zero | tr '\\0' x; exit 1", "x{300}"),
        ("(setsid sleep 60 &); echo forked; exit 1", "forked"),
        ("exec >&- 2>&-; sleep 0.1; exit 1", "WORKER_HEALTH_COMMAND exited with 1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_run_a_health_command_that_does_not_say_fit_claims_nothing_and_tells_its_first_line(
    bench: Bench, command: str, reason: str
) -> None:
    seconds = 0.3 if reason.startswith("WORKER_HEALTH_COMMAND did not end") else 30.0
    one = bench.start(QUICK | {"HEALTH_SECONDS": seconds}, WORKER_HEALTH_COMMAND=command)
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    assert re.fullmatch(reason, told(bench, "unfit")[0].body["reason"])
    assert bench.scheduler.verbs() == []
    one.wait_for_line("warning health .*for=start reason=")


def test_run_a_health_command_that_hangs_leaves_no_process_of_it(bench: Bench) -> None:
    bench.start(
        QUICK | {"HEALTH_SECONDS": 0.2},
        WORKER_HEALTH_COMMAND="sleep 61.25 & echo $$ $! > pids; sleep 61.25".replace(
            "> pids", f"> {bench.directory}/pids.new; mv {bench.directory}/pids.new {bench.directory}/pids"
        ),
    )
    pids = bench.file("pids").split()
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), "what the command started has ended")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_run_a_health_command_that_fails_every_third_time_claims_after_the_others(bench: Bench) -> None:
    count = f"{bench.directory}/count"
    command = f"echo x >> {count}; [ $(($(wc -l < {count}) % 3)) != 0 ]"
    bench.scheduler.put("claim", *[Answer(204)] * 500)
    bench.start(QUICK, WORKER_HEALTH_COMMAND=command, WORKER_HEALTH_INTERVAL="1s")
    wait_until(lambda: told(bench, "unfit"), "the third answer counts")
    claims = len(bench.scheduler.calls_to("claim"))
    bench.scheduler.wait_for("claim", claims + 2)
    assert claims > 1


def test_run_the_health_command_at_the_start_when_idle_and_after_jobs_says_what_for(bench: Bench) -> None:
    words = f"echo $HEALTH_FOR $HEALTH_JOBS $HEALTH_JOBS_SINCE >> {bench.directory}/words"
    bench.scheduler.put_job(UUID)
    bench.scheduler.put_job(OTHER)
    bench.scheduler.put("claim", *[Answer(204)] * 200)
    bench.start(QUICK, WORKER_HEALTH_COMMAND=words, WORKER_HEALTH_INTERVAL="1s")

    def lines() -> list[str]:
        path = bench.directory / "words"
        return path.read_text().splitlines() if path.exists() else []

    wait_until(lambda: len(lines()) >= 3, "it has run three times")
    assert lines()[:3] == ["start 0 0", "after_job 2 2", "idle 2 0"]
    times = [call.at for call in bench.scheduler.calls_to("complete")]
    assert times[1] - times[0] < 1, "between two jobs within the interval it does not run"


@pytest.mark.parametrize("agent", ["exit 1", "(sleep 60 &) ; exit 0", "kill -9 $$"], ids=["failed", "left", "killed"])
def test_run_the_health_command_before_the_next_claim_after_an_agent_that_failed(bench: Bench, agent: str) -> None:
    bench.write_agent(agent)
    bench.scheduler.put_job()
    command = f"echo $HEALTH_FOR >> {bench.directory}/words; ! [ $HEALTH_FOR = after_failure ]"
    bench.start(QUICK, WORKER_HEALTH_COMMAND=command, WORKER_HEALTH_INTERVAL="1h")
    bench.scheduler.wait_for("complete")
    wait_until(lambda: told(bench, "unfit"), "the worker tells that it is unfit")
    words = (bench.directory / "words").read_text().split()
    assert words[:2] == ["start", "after_failure"]
    # Until it says "fit" it is asked for the same reason.
    wait_until(lambda: len((bench.directory / "words").read_text().split()) > 2, "it runs again")
    assert set((bench.directory / "words").read_text().split()[2:]) == {"after_failure"}
    assert bench.scheduler.verbs().count("claim") == 1


@pytest.mark.parametrize("agent", ["exit 0", "exit 27"])
def test_run_no_health_command_after_an_agent_that_did_its_part(bench: Bench, agent: str) -> None:
    bench.write_agent(agent)
    bench.scheduler.put_job()
    bench.start(QUICK, WORKER_HEALTH_COMMAND=f"echo x >> {bench.directory}/words", WORKER_HEALTH_INTERVAL="1h")
    bench.scheduler.wait_for("claim", 2)
    assert (bench.directory / "words").read_text() == "x\n"


def test_run_a_health_command_shows_it_no_secret_and_none_of_the_workers_own_settings(bench: Bench) -> None:
    command = f"env > {bench.directory}/seen.new; mv {bench.directory}/seen.new {bench.directory}/seen"
    bench.start(WORKER_HEALTH_COMMAND=command, BOARD="7")
    seen = bench.file("seen")
    assert AGENT_TOKEN not in seen and STACK_TOKEN not in seen and "WORKER_" not in seen
    assert "BUILDKITE_AGENT_TOKEN" not in seen
    assert "BOARD=7\n" in seen and "HEALTH_FOR=start\n" in seen


def test_run_the_health_command_of_many_slots_never_twice_at_once_and_shares_its_answer(bench: Bench) -> None:
    mark = bench.directory / "mark"
    twice, runs = bench.directory / "twice", bench.directory / "runs"
    command = f"mkdir {mark} || echo twice >> {twice}; echo x >> {runs}; sleep 0.2; rmdir {mark}"
    for number in range(8):
        bench.start(QUICK, WORKER_NAME=f"host-{number}", WORKER_HEALTH_COMMAND=command, WORKER_HEALTH_INTERVAL="1h")
    bench.scheduler.wait_for("claim", 8)
    assert not twice.exists()
    # Those that were started before a run began take its answer.
    assert 1 <= len(runs.read_text().split()) < 8


def test_run_the_health_commands_of_slots_that_differ_answers_each_for_itself(bench: Bench) -> None:
    command = '[ "$BOARD" != 7 ]'
    bench.start(QUICK, WORKER_NAME="board-6", WORKER_HEALTH_COMMAND=command, BOARD="6")
    bench.start(QUICK, WORKER_NAME="board-7", WORKER_HEALTH_COMMAND=command, BOARD="7")
    bench.scheduler.wait_for("claim")
    wait_until(lambda: told(bench, "unfit"), "board 7 is unfit")
    assert {call.headers["X-Worker-ID"] for call in bench.scheduler.calls_to("claim")} == {"board-6"}
    assert {call.headers["X-Worker-ID"] for call in told(bench, "unfit")} == {"board-7"}


def test_stop_while_the_health_command_runs_ends_both_at_once(bench: Bench) -> None:
    pid = f"{bench.directory}/pid"
    one = bench.start(WORKER_HEALTH_COMMAND=f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60")
    checking = bench.agent_pid()
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert not is_alive(checking)
    assert bench.scheduler.verbs() == []


def test_wait_for_a_health_command_that_takes_long_is_reported(bench: Bench) -> None:
    bench.start(
        {"REPORT_SECONDS": 0.1}, WORKER_HEALTH_COMMAND=f"while ! [ -e {bench.directory}/go ]; do sleep 0.05; done"
    )
    wait_until(lambda: len(told(bench, "unfit")) > 1, "it is told again and again")
    assert "has run for over" in told(bench, "unfit")[0].body["reason"]
    bench.touch("go")
    bench.scheduler.wait_for("claim")


def test_run_a_health_command_that_asks_for_a_person_waits_over_restarts_until_an_operator_resumes(
    bench: Bench,
) -> None:
    runs = bench.directory / "runs"
    command = f"echo x >> {runs}; [ -e {bench.directory}/mended ] || {{ echo 'no serial line'; exit 3; }}"
    quick = QUICK | {"REPORT_SECONDS": 0.1}
    one = bench.start(quick, WORKER_HEALTH_COMMAND=command)
    wait_until(lambda: len(told(bench, "unfit")) > 3, "the worker tells again and again that it is unfit")
    body = told(bench, "unfit")[-1].body
    assert body["reason"] == "no serial line" and re.fullmatch("[0-9a-f]{8}", body["held"])
    bench.touch("mended")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    before = len(told(bench, "unfit"))
    bench.start(quick, WORKER_HEALTH_COMMAND=command)
    wait_until(lambda: len(told(bench, "unfit")) > before + 2, "the next worker of the slot tells the same")
    assert {call.body["held"] for call in told(bench, "unfit")} == {body["held"]}
    assert runs.read_text() == "x\n", "it does not run again by itself"
    assert bench.scheduler.verbs() == []
    bench.scheduler.put("introduce", Answer(body={"resumed": "00000000"}), Answer(body={"resumed": body["held"]}))
    bench.scheduler.wait_for("claim")
    assert runs.read_text() == "x\nx\n"
    assert not (bench.state / "host-1.held").exists()


def test_run_a_health_command_without_a_place_to_share_its_answer_still_counts(bench: Bench) -> None:
    bench.state.mkdir()
    (bench.state / "health.json").mkdir()
    one = bench.start(WORKER_HEALTH_COMMAND="true")
    bench.scheduler.wait_for("claim")
    one.wait_for_line("warning unwritten path=.*health.json")


def test_run_a_health_command_whose_lock_cannot_be_opened_says_so_and_claims_nothing(bench: Bench) -> None:
    bench.state.mkdir()
    (bench.state / "health.lock").mkdir()
    one = bench.start(WORKER_HEALTH_COMMAND="true")
    wait_until(lambda: told(bench, "unfit"), "the worker is unfit")
    assert re.search(r"health\.lock cannot be used: Is a directory", told(bench, "unfit")[0].body["reason"])
    assert bench.scheduler.verbs().count("claim") == 0
    assert one.process.poll() is None


@pytest.mark.parametrize("text", ["nonsense", "[1, 2]", '{"a": 1}', '{"a": [0]}'])
def test_read_the_answers_of_other_slots_passes_over_what_is_none(bench: Bench, text: str) -> None:
    bench.state.mkdir()
    (bench.state / "health.json").write_text(text)
    (bench.state / "host-1.held").write_text(text)
    bench.start(WORKER_HEALTH_COMMAND="true")
    bench.scheduler.wait_for("claim")
    assert len(json.loads((bench.state / "health.json").read_text())) == 1


def test_settings_of_a_health_command_over_two_lines_are_refused() -> None:
    with pytest.raises(worker.SettingsError, match="WORKER_HEALTH_COMMAND: .*control character"):
        settings(WORKER_HEALTH_COMMAND="true\nfalse")


def test_check_names_a_full_disk_and_a_health_command_that_is_not_there(bench: Bench) -> None:
    bench.scheduler.put("health", Answer())
    bench.scheduler.put("check", refusal(404, "unknown_job"))
    done = bench.run("--check", WORKER_MIN_FREE="999T", WORKER_HEALTH_COMMAND="/nowhere/check board")
    assert done.returncode == 78
    assert re.search("BUILDKITE_BUILD_PATH: .* free, less than", done.stderr)
    assert "WORKER_HEALTH_COMMAND: the agent's user cannot run /nowhere/check" in done.stderr


# --- Workers that end by themselves ---


def test_run_as_many_jobs_as_the_worker_may_ends_it_with_goodbye(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.scheduler.put_job(f"{UUID[:-1]}{number}")
    bench.scheduler.put(UUID[:-1] + "1", Answer(body={"state": "done", "outcome": "ran"}))
    bench.scheduler.put(UUID[:-1] + "2", Answer(body={"state": "reserving"}), Answer(body={"state": "running"}))
    one = bench.start(WORKER_MAX_JOBS="2")
    assert one.exit_status() == 0
    assert bench.scheduler.verbs().count("claim") == 2
    assert [call.body["state"] for call in bench.scheduler.calls_to("introduce")][-1] == "gone"
    one.wait_for_line("info +over jobs=2")


def test_run_a_job_that_no_agent_acquired_does_not_count(bench: Bench) -> None:
    bench.write_agent("[ -e once ] && exit 0; touch once; exit 27")
    bench.scheduler.put_job(UUID)
    bench.scheduler.put_job(OTHER)
    bench.scheduler.put(OTHER, Answer(body={"state": "done", "outcome": "ran"}))
    one = bench.start(WORKER_MAX_JOBS="1")
    assert one.exit_status() == 0
    assert [call.body["exit_status"] for call in bench.scheduler.wait_for("complete", 2)] == [27, 0]


def test_run_a_job_that_buildkite_gave_to_nobody_does_not_count_though_its_agent_ended_with_0(bench: Bench) -> None:
    bench.scheduler.put_job(UUID)
    bench.scheduler.put_job(OTHER)
    bench.scheduler.put(UUID, Answer(body={"state": "ready"}))
    bench.scheduler.put(OTHER, Answer(body={"state": "done", "outcome": "ran"}))
    one = bench.start(WORKER_MAX_JOBS="1")
    assert one.exit_status() == 0
    assert bench.scheduler.verbs().count("complete") == 2


def test_run_a_job_of_which_nobody_can_say_whether_it_was_acquired_counts(bench: Bench) -> None:
    bench.scheduler.put_job(UUID)
    bench.scheduler.put(UUID, *[refusal(503)] * 1000)
    one = bench.start({"KNOWN_SECONDS": 0.2, "KNOWN_AGAIN_SECONDS": 0.05}, WORKER_MAX_JOBS="1")
    assert one.exit_status() == 0
    assert bench.scheduler.verbs().count("claim") == 1


@pytest.mark.parametrize("name", ["WORKER_IDLE_TIMEOUT", "WORKER_MAX_UPTIME"])
def test_wait_for_a_job_for_longer_than_the_worker_may_ends_it_with_goodbye(bench: Bench, name: str) -> None:
    bench.scheduler.put("claim", Answer(204, before=lambda: time.sleep(0.5)))  # as long as it asked for
    one = bench.start(None, (), **{name: "500ms"})
    assert one.exit_status() == 0
    waits = [re.search(r"wait=([0-9.e-]+)", call.path) for call in bench.scheduler.calls_to("claim")]
    assert all(found and float(found[1]) <= 0.5 for found in waits)
    assert [call.body["state"] for call in bench.scheduler.calls_to("introduce")][-1] == "gone"


def test_wait_for_a_job_after_a_job_counts_from_its_end_and_a_job_is_never_cut_short(bench: Bench) -> None:
    bench.write_agent("sleep 0.7; exit 0")
    bench.scheduler.put_job()
    bench.scheduler.put("claim", Answer(204, before=lambda: time.sleep(0.5)))
    one = bench.start(WORKER_IDLE_TIMEOUT="500ms", WORKER_MAX_UPTIME="1h")
    assert one.exit_status() == 0
    claims, complete = bench.scheduler.calls_to("claim"), bench.scheduler.calls_to("complete")[0]
    assert complete.body["exit_status"] == 0
    assert len(claims) >= 2 and claims[1].at > complete.at


def test_get_a_job_in_the_moment_in_which_the_worker_would_end_runs_it(bench: Bench) -> None:
    bench.scheduler.put_job()
    bench.scheduler.answers["claim"][0].before = lambda: time.sleep(0.6)
    one = bench.start(WORKER_MAX_UPTIME="500ms")
    assert one.exit_status() == 0
    assert bench.scheduler.verbs() == ["claim", "complete"]


def test_stop_a_worker_that_would_end_by_itself_says_goodbye_too(bench: Bench) -> None:
    one = bench.start(WORKER_IDLE_TIMEOUT="1h")
    bench.scheduler.wait_for("claim")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert [call.body["state"] for call in bench.scheduler.calls_to("introduce")] == ["gone"]


def test_stop_a_worker_that_stays_leaves_its_last_words(bench: Bench) -> None:
    bench.scheduler.put("claim", Answer(204))
    one = bench.start()
    bench.scheduler.wait_for("claim", 2)
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    last = bench.scheduler.calls_to("introduce")[-1].body
    assert (last["state"], last["reason"]) == ("stopped", "the worker was stopped")


def test_say_goodbye_to_a_scheduler_that_is_away_is_tried_again_and_given_up(bench: Bench) -> None:
    bench.scheduler.put("introduce", refusal(503), refusal(503))
    one = bench.start(WORKER_MAX_UPTIME="1ms")
    assert one.exit_status() == 0
    assert [call.body["state"] for call in bench.scheduler.calls_to("introduce")] == ["gone"] * 3
    bench.scheduler.close()
    began = time.monotonic()
    assert bench.start({"LAST_TRIES_SECONDS": 0.3}, WORKER_MAX_UPTIME="1ms").exit_status() == 0
    assert time.monotonic() - began < 10


# --- After each job ---


def test_end_a_job_that_leaves_processes_tells_how_many_and_how_much_space_is_free(bench: Bench) -> None:
    bench.write_agent("sleep 60 & exit 0")
    bench.scheduler.put_job()
    one = bench.start()
    body = bench.scheduler.wait_for("complete")[0].body
    found = os.statvfs(bench.directory)
    assert body["strays"] == 1
    assert abs(body["free"] - found.f_bavail * found.f_frsize) < 4 << 30  # others use this disk too
    one.wait_for_line(rf"exited job={UUID} pid=\d+ exit_status=0 strays=1 free={body['free']}")


@pytest.mark.parametrize(
    ("root", "is_own"),
    [
        ("/tmp/systemd-private-0123456789abcdef0123456789abcdef-stack-worker@1.service-Ab12Cd/tmp", True),
        ("/systemd-private-0123456789abcdef0123456789abcdef-stack-worker@board-7.service-Ab12Cd/tmp", True),
        ("/systemd-private-0123456789abcdef0123456789abcdef-other.service-Ab12Cd/tmp", False),
        ("/", False),
    ],
)
def test_read_the_mounts_knows_a_tmp_that_only_this_unit_has(tmp_path: Path, root: str, is_own: bool) -> None:
    mounts = tmp_path / "mountinfo"
    lines = ["1 2 0:1 / / rw - ext4 /dev/sda rw", f"36 35 98:0 {root} /tmp rw,noatime shared:1 - tmpfs tmpfs rw"]
    mounts.write_text("\n".join(lines) + "\n")
    assert worker.is_private("/tmp", str(mounts)) is is_own
    assert not worker.is_private("/var/tmp", str(mounts))
    assert not worker.is_private("/tmp", str(tmp_path / "none"))


# --- The pair, with many jobs ---

#: How many jobs: with LONG=1, in CI, at home.
COUNTS = (500, 100, 300, 1000) if os.environ.get("LONG") else (200, 40, 120, 300) if LONG_RUN else (36, 8, 24, 40)
MANY_JOBS, ONE_JOB_WORKERS, JOBS_BESIDE, JOBS_OF_ONE_SLOT = COUNTS


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    with FakeBuildkite() as buildkite:
        yield buildkite


@pytest.fixture
def stack(fake: FakeBuildkite, tmp_path: Path) -> Iterator[StackProcesses]:
    with StackProcesses(fake, tmp_path, agent_path("fake")) as processes:
        yield processes


def all_finished(fake: FakeBuildkite, uuids: list[str]) -> None:
    fake.wait_for(lambda: all(fake.jobs[uuid].state == "finished" for uuid in uuids), 900)


def times(fake: FakeBuildkite, uuid: str, word: str) -> list[float]:
    """When that happened to the job."""
    return [at for at, what, _ in fake.jobs[uuid].history if what == word]


def start_hosts(stack: StackProcesses, good: int, bad: int) -> None:
    for number in range(good):
        stack.start_worker(f"good{number}-1", WORKER_HOST=f"good{number}", LOG_LEVEL="warning")
    for number in range(bad):
        stack.start_worker(f"bad{number}-1", WORKER_HOST=f"bad{number}", LOG_LEVEL="warning", FAKE_AGENT_EXIT="1")


def fleet(stack: StackProcesses) -> dict[str, Any]:
    told: dict[str, Any] = requests.get(f"{stack.url}/fleet", timeout=10).json()
    return told


def longest_wait(stack: StackProcesses, fake: FakeBuildkite, count: int) -> float:
    """Run so many jobs, of a second each, four at a time; the longest wait of one for its agent, in seconds."""
    uuids: list[str] = []
    while len(uuids) < count:
        wait_until(lambda: sum(fake.jobs[uuid].state != "finished" for uuid in uuids) < 4, "a job ends", 120)
        uuids.append(fake.add_job(command="sleep 1"))
    all_finished(fake, uuids)
    assert [len(times(fake, uuid, "acquired")) for uuid in uuids] == [1] * count, "each ran once"
    return max(times(fake, uuid, "acquired")[0] - times(fake, uuid, "added")[0] for uuid in uuids)


def test_fill_the_disk_by_a_job_holds_the_next_says_where_and_goes_on_once_there_is_space(
    stack: StackProcesses, fake: FakeBuildkite, disk: Path
) -> None:
    stack.start_scheduler()
    where = {"BUILDKITE_BUILD_PATH": str(disk), "WORKER_MIN_FREE": "10M", "WORKER_HOST": "build1"}
    stack.start_worker("build1-1", **where)
    filling = fake.add_job(command=f"head -c 58M /dev/zero > {disk}/big")
    fake.wait_for(lambda: fake.jobs[filling].state == "finished", 60)
    assert fake.jobs[filling].exit_status == 0, "the job that filled it is unharmed"
    waiting = fake.add_job(command="true")
    wait_until(lambda: stack.job(waiting).get("why") == "workers_unfit", "the next waits", 60)
    text = rf"all matching workers are unfit: 1; build1-1 on build1: {disk} has [0-9.]+ MiB free, less than .*10 MiB.*"
    assert re.fullmatch(text, stack.job(waiting)["why_text"])
    assert stack.stats()["workers"][0]["state"] == "unfit"
    (disk / "big").unlink()
    fake.wait_for(lambda: fake.jobs[waiting].state == "finished", 60)
    assert stack.job(waiting)["attempts"] == 0


def test_start_on_a_host_that_was_never_fit_says_why_its_jobs_wait(stack: StackProcesses, fake: FakeBuildkite) -> None:
    stack.start_scheduler()
    agent = stack.directory / "agent"
    stack.start_worker("full-1", "disk=full", WORKER_MIN_FREE="999T", WORKER_HOST="full")
    stack.start_worker("bare-1", "agent=none", BUILDKITE_AGENT_PATH=str(agent), WORKER_HOST="bare")
    for name, rule, state, why in [
        ("full", "disk=full", "unfit", r"\S+ has [0-9.e+]+ GiB free, less than WORKER_MIN_FREE .*"),
        ("bare", "agent=none", "failing", rf"BUILDKITE_AGENT_PATH: .*{agent}.*"),
    ]:
        uuid = fake.add_job(rules=[rule], command="true")
        wait_until(lambda: stack.job(uuid).get("why") == f"workers_{state}", "it is known why it waits")  # noqa: B023
        text = rf"all matching workers are {state}: 1; {name}-1 on {name}: {why}"
        assert re.fullmatch(text, stack.job(uuid)["why_text"])
    agent.symlink_to(agent_path("fake"))
    fake.wait_for(lambda: fake.jobs[uuid].state == "finished", 60)


#: Checks of a host, as people write them on a bad day. `{here}` is a directory of the test's.
CHECKS = {
    "hangs": "[ -e {here}/mended ] || {{ echo asking the board; sleep 31337; }}",
    "forks": "i=0; while [ $i -lt 100 ]; do sleep 31337 & i=$((i + 1)); done",
    "prints": "yes 'fan 2 is dead' | head -c 10000000; [ -e {here}/mended ]",
    "fails": "echo x >>{here}/runs; [ $(($(wc -l <{here}/runs) % 3)) != 0 ] || {{ echo every third time; exit 1; }}",
}


def test_run_checks_that_hang_fork_print_much_and_fail_now_and_then_holds_their_own_host_alone(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    quick = "worker.HEALTH_SECONDS, worker.HEALTH_AGAIN_SECONDS = 1.0, 0.2"
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import worker; {quick}; sys.exit(worker.main([]))"
    stack.worker_command, workers = [sys.executable, "-c", run], {}
    stack.start_scheduler()
    for name, check in CHECKS.items():
        place = {"WORKER_HOST": name, "WORKER_STATE": str(stack.directory / name), "WORKER_HEALTH_INTERVAL": "1s"}
        place["WORKER_WAIT"] = "1s"
        command = check.format(here=stack.directory)
        workers[name] = stack.start_worker(f"{name}-1", f"check={name}", WORKER_HEALTH_COMMAND=command, **place)
    count = 60 if LONG_RUN else 5
    jobs = {name: [fake.add_job(rules=[f"check={name}"], command="true") for _ in range(count)] for name in CHECKS}
    all_finished(fake, jobs["forks"] + jobs["fails"])
    for name, why in {"hangs": "did not end within 1 s: asking the board", "prints": "fan 2 is dead"}.items():
        uuid = jobs[name][0]
        wait_until(functools.partial(waits_for, stack, uuid, "workers_unfit"), "the worker reports what it found")
        text = rf"all matching workers are unfit: 1; {name}-1 on {name}: (WORKER_HEALTH_COMMAND )?{why}"
        assert re.fullmatch(text, stack.job(uuid)["why_text"])
    (stack.directory / "mended").touch()
    uuids = list(itertools.chain.from_iterable(jobs.values()))
    all_finished(fake, uuids)
    assert [len(times(fake, uuid, "acquired")) for uuid in uuids] == [1] * len(uuids), "each ran once"
    assert [stack.job(uuid)["attempts"] for uuid in uuids] == [0] * len(uuids)
    workers["fails"].wait_for_line("warning health", 'reason="every third time"')
    wait_until(lambda: not any("sleep\x0031337" in line for line in command_lines()), "nothing of a check is left")


def waits_for(stack: StackProcesses, uuid: str, why: str) -> bool:
    return bool(stack.job(uuid).get("why") == why)


def command_lines() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            found.append((process / "cmdline").read_text(errors="replace"))
    return found


@pytest.mark.long
def test_run_many_jobs_beside_a_host_whose_agent_is_broken_quarantines_it_and_delays_none_for_long(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    stack.start_scheduler()
    start_hosts(stack, good=5, bad=0)
    wait_until(lambda: len(stack.stats()["workers"]) == 5, "all are there", 60)
    without = longest_wait(stack, fake, MANY_JOBS if LONG_RUN else 12)
    start_hosts(stack, good=0, bad=1)
    wait_until(lambda: len(stack.stats()["workers"]) == 6, "the broken one has come", 60)
    beside = longest_wait(stack, fake, MANY_JOBS)
    print(f"longest wait: {without:.1f} s without it, {beside:.1f} s beside it")
    assert beside <= without + 5
    assert [hold["target"] for hold in fleet(stack)["holds"] if hold["owner"] == "machine"] == ["host:bad0"]
    assert [worker["claims"] for worker in stack.stats()["workers"] if worker["name"] == "bad0-1"] == [3]
    assert "agents_cannot_acquire" not in str(fleet(stack)["problems"])


def test_run_jobs_where_all_agents_are_broken_quarantines_no_host_and_raises_the_alarm(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    stack.start_scheduler()
    start_hosts(stack, good=0, bad=4)
    wait_until(lambda: len(stack.stats()["workers"]) == 4, "all are there", 60)
    for _ in range(8):
        fake.add_job(command="true")

    def told() -> bool:
        problems = requests.get(f"{stack.url}/health", timeout=10).json()["problems"]
        return bool(problems) and re.match(r"agents_cannot_acquire: on [234] of 4 hosts", problems[0]) is not None

    wait_until(told, "the alarm is there", 60)
    wait_until(lambda: all(worker["claims"] >= 3 for worker in stack.stats()["workers"]), "each has failed", 120)
    assert [hold for hold in fleet(stack)["holds"] if hold["owner"] == "machine" and "host:" in hold["target"]] == []
    status = subprocess.run(
        [*command("scheduler.py"), "status", "--server", stack.url], capture_output=True, text=True, check=False
    )
    assert status.returncode == 2 and "agents_cannot_acquire" in status.stdout.splitlines()[0]


@pytest.mark.long
def test_run_one_job_workers_that_come_and_go_runs_each_job_once_and_leaves_none_of_them(
    stack: StackProcesses, fake: FakeBuildkite
) -> None:
    stack.start_scheduler()
    for number in range(2):
        stack.start_worker(f"stays-{number}", LOG_LEVEL="warning")
    uuids = [fake.add_job(command="true") for _ in range(JOBS_BESIDE)]
    for first in range(0, ONE_JOB_WORKERS, 10):
        batch = [
            stack.start_worker(f"once-{n}", WORKER_MAX_JOBS="1", WORKER_IDLE_TIMEOUT="20s", WORKER_HOST=f"once{n}")
            for n in range(first, min(first + 10, ONE_JOB_WORKERS))
        ]
        assert [one.ended(300) for one in batch] == [0] * len(batch)
    all_finished(fake, uuids)
    assert [len(times(fake, uuid, "acquired")) for uuid in uuids] == [1] * JOBS_BESIDE
    assert {worker["name"] for worker in stack.stats()["workers"]} == {"stays-0", "stays-1"}


def processes_in(directory: Path) -> list[str]:
    """Processes that work in that directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            found.append(os.readlink(process / "cwd"))
    return [path for path in found if Path(path).is_relative_to(directory)]


@pytest.mark.long
def test_run_many_jobs_on_one_slot_leaves_the_host_as_it_was(
    stack: StackProcesses, fake: FakeBuildkite, disk: Path
) -> None:
    stack.start_scheduler()
    where = {"WORKER_STATE": str(disk / "state"), "BUILDKITE_BUILD_PATH": str(disk / "builds"), "WORKER_MIN_FREE": "1M"}
    one = stack.start_worker("slot-1", LOG_LEVEL="warning", **where)

    def run(count: int) -> None:
        all_finished(fake, [fake.add_job(command="echo x > file") for _ in range(count)])
        wait_until(lambda: children(one.pid) == [], "no agent runs", 60)

    def figures() -> dict[str, int]:
        status = Path(f"/proc/{one.pid}/status").read_text()
        told = stack.stats()["workers"][0]
        return {
            "files": len(os.listdir(f"/proc/{one.pid}/fd")),
            "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
            "mounts": len(Path(f"/proc/{one.pid}/mountinfo").read_text().splitlines()),
            "state files": len(list(disk.rglob("*"))),
            "processes": len(processes_in(disk)),
            "free": os.statvfs(disk).f_bavail,
            "free as told": told["free_bytes"],
        }

    def memory() -> int:
        found = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{one.pid}/status").read_text())
        return int(found[0])

    run(10)
    wait_until(lambda: figures()["threads"] == 1, "only the main thread is left", 30)
    before, used = figures(), memory()
    run(JOBS_OF_ONE_SLOT - 10)
    wait_until(lambda: figures() == before, f"the same as after job 10: {before}", 30)
    print(f"memory of the worker: {used} kB after job 10, {memory()} kB after job {JOBS_OF_ONE_SLOT}")
    assert memory() <= used + 2048
