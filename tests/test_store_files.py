"""What a store's files may be when a scheduler starts or goes on, and what `--check` finds out about a store.

Whatever is not a whole store of ours is refused, named, and left as it is.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import scheduler
from conftest import Clock, lead, make_settings, open_sqlite, the_redis
from fake_buildkite import FakeBuildkite
from processes import Process, RedisServer, compiled, free_port
from scheduler import Settings, SettingsError, Store, StoreInUse, StoreUnavailable
from test_store import Desk, listed, rows_of, uuid, write_schema_1


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def jobs_in(state: Path) -> list[str]:
    with closing(open_sqlite(make_settings(state))) as store:
        return sorted(store.unfinished("default"))


def put_jobs(store: Store, clock: Clock, *numbers: int) -> None:
    Desk(store, clock).put(*(listed(number) for number in numbers))


def killed(state: Path, clock: Clock, *numbers: int) -> None:
    """Leave what a scheduler leaves that was killed: its jobs are still in the log."""
    running = state.with_name("running")
    with closing(open_sqlite(make_settings(running))) as store:
        put_jobs(store, clock, *numbers)
        shutil.copytree(running, state)
    shutil.rmtree(running)
    (state / "jobs.sqlite3-shm").unlink()


def contents(directory: Path) -> dict[str, object]:
    """All that is there, less the lock that a start takes and the index of the log, which SQLite makes to read it."""
    kept = [path for path in sorted(directory.iterdir()) if path.name not in ("scheduler.lock", "jobs.sqlite3-shm")]
    return {path.name: path.read_bytes() if path.is_file() else path.lstat().st_ino for path in kept}


@contextmanager
def small_disk(at: Path, kilobytes: int = 512) -> Iterator[Path]:
    """A file system of its own."""
    at.mkdir(parents=True)
    size = f"size={kilobytes}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", at], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


# --- Files that are no store of ours ---


def foreign(path: Path, application_id: int = 0) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE photos (id)")
        db.execute(f"PRAGMA application_id = {application_id}")
        db.execute("PRAGMA user_version = 3")
        db.commit()


def gone_with_its_log(file: Path) -> None:
    file.unlink()


def gone_with_a_journal(file: Path) -> None:
    file.unlink()
    Path(f"{file}-wal").rename(f"{file}-journal")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def a_text(file: Path) -> None:
    file.write_text("jobs: none\n" * 500)


def of_another_program(file: Path) -> None:
    file.unlink()
    Path(f"{file}-wal").unlink()
    foreign(file)


def named_for_another_program(file: Path) -> None:
    of_another_program(file)
    file.unlink()
    foreign(file, 0x0F055112)


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def a_link_to_nothing(file: Path) -> None:
    file.unlink()
    Path(f"{file}-wal").unlink()
    file.symlink_to("elsewhere")


def of_two_names(file: Path) -> None:
    os.link(file, file.with_name("backup"))


def with_a_journal(file: Path) -> None:
    Path(f"{file}-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))


def with_a_text_for_its_log(file: Path) -> None:
    Path(f"{file}-wal").write_text("a log\n" * 100)


def with_a_log_of_other_pages(file: Path) -> None:
    log = Path(f"{file}-wal")
    data = log.read_bytes()
    log.write_bytes(data[:8] + (8192).to_bytes(4, "big") + data[12:])


def with_the_log_of_another_program(file: Path) -> None:
    other = file.with_name("other")
    with closing(sqlite3.connect(other, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE photos (id)")
        db.execute("INSERT INTO photos VALUES (1)")
        shutil.copy(f"{other}-wal", f"{file}-wal")
    other.unlink()


def damaged(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(file.read_bytes())
    data[4096:16384] = os.urandom(12288)
    file.write_bytes(data)


#: What was done to the files of a killed scheduler's store, and what a start says.
ODD: dict[Callable[[Path], None], str] = {
    gone_with_its_log: r"jobs\.sqlite3 is missing, but .*jobs\.sqlite3-wal exists",
    gone_with_a_journal: r"jobs\.sqlite3 is missing, but .*jobs\.sqlite3-journal exists",
    empty: r"jobs\.sqlite3 is empty",
    a_text: r"jobs\.sqlite3 is no SQLite file",
    of_another_program: r"jobs\.sqlite3 is another program's SQLite file",
    named_for_another_program: r"jobs\.sqlite3 is another program's SQLite file",
    a_directory: r"jobs\.sqlite3 is not a regular file",
    a_pipe: r"jobs\.sqlite3 is not a regular file",
    a_link: r"jobs\.sqlite3 is not a regular file",
    a_link_to_nothing: r"jobs\.sqlite3 is not a regular file",
    of_two_names: r"jobs\.sqlite3 has several names",
    with_a_journal: r"jobs\.sqlite3-journal is not ours",
    with_a_text_for_its_log: r"jobs\.sqlite3-wal is not a log of",
    with_a_log_of_other_pages: r"jobs\.sqlite3-wal is not a log of",
    with_the_log_of_another_program: r"another program's|jobs\.sqlite3-wal is not a log of",
    damaged: r"malformed|invalid page|btreeInitPage|missing from index",
}


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_open_of_files_that_are_no_store_is_refused_and_leaves_them_as_they_are(
    state: Path, clock: Clock, change: Callable[[Path], None]
) -> None:
    killed(state, clock, 1, 2)
    change(state / "jobs.sqlite3")
    before = contents(state)
    for _ in range(2):
        with pytest.raises((StoreUnavailable, sqlite3.Error), match=ODD[change]):
            open_sqlite(make_settings(state))
        assert contents(state) == before
    # And as it is told to: what was moved away makes room for a new one.
    for path in [path for path in state.iterdir() if path.name.startswith("jobs.sqlite3")]:
        path.rename(state / f"away-{path.name}")
    assert jobs_in(state) == []


def test_open_after_a_kill_finds_what_is_in_the_log(state: Path, clock: Clock) -> None:
    killed(state, clock, 1, 2)
    assert jobs_in(state) == [uuid(1), uuid(2)]
    assert not (state / "jobs.sqlite3-wal").exists()


def test_open_of_a_backup_beside_the_log_of_the_file_before_is_refused(state: Path, clock: Clock) -> None:
    with closing(open_sqlite(make_settings(state))) as store:
        put_jobs(store, clock, *range(1, 30))
        with closing(sqlite3.connect(state / "backup")) as backup:
            rows_of(store)._db.backup(backup)
        put_jobs(store, clock, *range(30, 60))
        rows_of(store)._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        put_jobs(store, clock, *range(60, 65))
        log = (state / "jobs.sqlite3-wal").read_bytes()
    (state / "backup").rename(state / "jobs.sqlite3")
    (state / "jobs.sqlite3-wal").write_bytes(log)
    before = contents(state)
    with pytest.raises(sqlite3.DatabaseError, match=r"jobs\.sqlite3-wal does not belong to it: move that away"):
        open_sqlite(make_settings(state))
    assert contents(state) == before
    (state / "jobs.sqlite3-wal").rename(state / "away")
    assert len(jobs_in(state)) == 29


def test_open_after_a_start_that_was_cut_short_begins_anew(state: Path) -> None:
    state.mkdir()
    (state / "jobs.sqlite3.new").write_bytes(b"half")
    assert jobs_in(state) == []
    assert sorted(contents(state)) == ["jobs.sqlite3"]


def test_open_of_a_store_without_our_mark_is_taken_for_that_of_an_older_version(state: Path, clock: Clock) -> None:
    killed(state, clock, 1)
    with closing(sqlite3.connect(state / "jobs.sqlite3")) as db:
        db.execute("PRAGMA application_id = 0")
    assert jobs_in(state) == [uuid(1)]


def test_open_makes_files_that_others_cannot_read(state: Path) -> None:
    state.mkdir(mode=0o755)
    umask = os.umask(0)
    try:
        with closing(open_sqlite(make_settings(state))):
            modes = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
    finally:
        os.umask(umask)
    assert modes == dict.fromkeys(modes, 0o600)
    assert len(modes) == 4


def test_open_on_a_read_only_file_system_says_so_and_works_when_it_is_not(state: Path, clock: Clock) -> None:
    with small_disk(state):
        (state / "store").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", state], check=True)
        with pytest.raises(
            StoreUnavailable, match=r"Read-only file system: .*scheduler\.lock.*must be a directory that"
        ):
            open_sqlite(make_settings(state / "store"))
        subprocess.run(["mount", "-o", "remount,rw", state], check=True)
        assert jobs_in(state / "store") == []


def test_open_of_a_file_that_cannot_be_written_says_whose_it_is(state: Path, clock: Clock) -> None:
    killed(state, clock, 1)
    file = state / "jobs.sqlite3"
    bound = subprocess.run(["mount", "--bind", file, file], check=False, capture_output=True, text=True)
    if bound.returncode:
        pytest.skip(f"a file cannot be made read-only for root here: {bound.stderr}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", file], check=True)
        with pytest.raises(
            StoreUnavailable, match=rf"jobs\.sqlite3, owned by user {os.geteuid()}, cannot be read and written"
        ):
            open_sqlite(make_settings(state))
    finally:
        subprocess.run(["umount", "--lazy", file], check=True)
    assert jobs_in(state) == [uuid(1)]


def test_open_in_a_directory_that_is_a_file_names_it(state: Path) -> None:
    state.write_text("")
    with pytest.raises(StoreUnavailable, match=r"File exists: .*state'; STATE_DIRECTORY must be a directory"):
        open_sqlite(make_settings(state))


# --- While it is in use ---


@pytest.mark.parametrize("name", ["jobs.sqlite3", "jobs.sqlite3-wal", "jobs.sqlite3-shm", "scheduler.lock"])
def test_lose_a_file_while_it_is_in_use_is_refused_until_it_is_back(
    state: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_STORE_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "BESIDE_SECONDS", 0.0)
    with closing(open_sqlite(make_settings(state))) as store:
        put_jobs(store, clock, 1)
        (state / name).rename(state / "away")
        with pytest.raises(StoreUnavailable, match=rf"{name} was moved or deleted while in use"):
            put_jobs(store, clock, 2)
        with pytest.raises(StoreUnavailable, match=rf"{name} was moved or deleted while in use"):
            store.get(uuid(1))
        (state / "away").rename(state / name)
        put_jobs(store, clock, 2)
    assert jobs_in(state) == [uuid(1), uuid(2)]


@pytest.mark.parametrize("name", ["jobs.sqlite3-wal", "jobs.sqlite3-shm", "scheduler.lock"])
def test_stop_after_a_file_beside_the_store_was_deleted_saves_every_job(state: Path, clock: Clock, name: str) -> None:
    with closing(open_sqlite(make_settings(state))) as store:
        put_jobs(store, clock, 1, 2)
        (state / name).unlink()
    assert jobs_in(state) == [uuid(1), uuid(2)]


# --- Where it is not safe ---


def test_file_system_is_known_by_its_mount(state: Path) -> None:
    with small_disk(state):
        assert scheduler.file_system_of(state.stat().st_dev) == "tmpfs"
    assert scheduler.file_system_of(os.makedev(4095, 1)) == ""


def test_open_on_a_shared_file_system_is_said_at_the_start_and_found_by_check(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(state):
        settings = make_settings(state)
        for shared in (["nfs4", "tmpfs"], ["nfs4"]):
            monkeypatch.setattr(scheduler, "SHARED_FILE_SYSTEMS", shared)
            caplog.clear()
            scheduler.open_store(settings).close()
            said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
            told = scheduler.check_state_directory(settings)
            assert len(said) == len(told) == ("tmpfs" in shared)
            assert all(
                "its file system is tmpfs, where SQLite's log and locks do not work" in line for line in said + told
            )


def test_open_where_others_may_write_says_so(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = make_settings(state)
    scheduler.open_store(settings).close()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "begun" in caplog.records[0].getMessage()
    caplog.clear()
    scheduler.open_store(settings).close()
    assert caplog.records == []
    (state / "jobs.sqlite3").chmod(0o666)
    state.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(state / "jobs.sqlite3", 12345, -1)
    scheduler.open_store(settings).close()
    said = [record.getMessage() for record in caplog.records]
    assert f"every user of this machine can write {state}: " in said[0]
    assert (state / "jobs.sqlite3").stat().st_mode & 0o777 == 0o600  # what we can mend ourselves is not told
    if os.geteuid() == 0:
        assert f"{state / 'jobs.sqlite3'} belongs to user 12345" in said[1]


# --- What --check finds out ---


def check(settings: Settings) -> list[str]:
    return scheduler.check_redis(settings) if settings.redis_addr else scheduler.check_state_directory(settings)


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_check_of_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path: Path, clock: Clock) -> None:
    with small_disk(tmp_path / "small") as disk:
        state = disk / "state"
        assert check(make_settings(state)) == []
        assert list(disk.iterdir()) == []
        killed(state, clock, 1)
        assert check(make_settings(state)) == []
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * 4096)
        before = everything(disk)
        for settings in (make_settings(state), make_settings(disk / "new")):
            [problem] = check(settings)
            assert problem.startswith(f"STATE_DIRECTORY: {settings.state_directory} cannot be used: ")
            assert "free some space" in problem or "No space left" in problem
        assert everything(disk) == before
        (disk / "filler").unlink()
        assert check(make_settings(state)) == []


def test_check_of_a_store_after_a_kill_and_in_use_leaves_it_as_it_is(state: Path, clock: Clock) -> None:
    killed(state, clock, 1)
    before = everything(state)
    assert check(make_settings(state)) == []
    assert everything(state) == before
    with closing(open_sqlite(make_settings(state))) as store:
        put_jobs(store, clock, 2)
        before = everything(state)
        assert check(make_settings(state)) == []
        assert everything(state).keys() == before.keys()
        put_jobs(store, clock, 3)
        with pytest.raises(StoreInUse):
            open_sqlite(make_settings(state))
    assert jobs_in(state) == [uuid(1), uuid(2), uuid(3)]


def test_check_of_what_a_start_would_refuse_says_so(state: Path, clock: Clock) -> None:
    with closing(open_sqlite(make_settings(state))) as store:
        store.remember_stacks({"default": "vm1-default"})
        put_jobs(store, clock, 1)
    assert check(make_settings(state, STACK_KEY="vm1")) == []
    [problem] = check(make_settings(state, STACK_KEY="vm2"))
    assert "1 jobs of queue default are reserved as stack 'vm1-default'" in problem
    (state / "jobs.sqlite3").write_bytes(b"")
    [problem] = check(make_settings(state, STACK_KEY="vm1"))
    assert f"{state / 'jobs.sqlite3'} is empty" in problem
    [problem] = check(make_settings(state / "jobs.sqlite3"))
    assert "Not a directory" in problem


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def test_check_of_a_redis_that_cannot_be_written_says_why_and_leaves_nothing_behind(
    tmp_path: Path, redis: RedisServer
) -> None:
    settings = make_settings(tmp_path, REDIS_ADDR=redis.address)
    assert check(settings) == []
    assert redis.say("DBSIZE") == ":0\r\n"
    faults = {
        ("REPLICAOF", "127.0.0.1", "1"): ("it is a replica", ("REPLICAOF", "NO", "ONE")),
        ("CONFIG", "SET", "maxmemory", "1"): ("raise maxmemory", ("CONFIG", "SET", "maxmemory", "0")),
        ("CONFIG", "SET", "min-replicas-to-write", "1"): (
            "fewer replicas than",
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
        ),
    }
    # As its schedulers left it: a start would write nothing but what it writes for itself.
    for schema in ("", "2", "99"):
        if schema:
            redis.say("MSET", "stack:test:schema", schema, "stack:test:min_reader", "2")
        for breaking, (reason, mending) in faults.items():
            redis.say(*breaking)
            [problem] = check(settings)
            assert reason in problem
            redis.say(*mending)
        assert check(settings) == []
        assert redis.say("DBSIZE") == (":2\r\n" if schema else ":0\r\n")


def test_check_of_redis_finds_what_a_start_would_refuse(tmp_path: Path, clock: Clock) -> None:
    settings = make_settings(tmp_path, REDIS_ADDR=f"{the_redis().address}?prefix={tmp_path}:")
    with closing(lead(make_settings(tmp_path), the_redis().address)) as store:
        store.remember_stacks({"default": "vm1-default"})
        put_jobs(store, clock, 1)
    [problem] = check(settings)
    assert "1 jobs of queue default are reserved as stack 'vm1-default'" in problem
    the_redis().say("SET", f"{tmp_path}:schema", "a word")
    [problem] = check(settings)
    assert "another program wrote the keys" in problem
    with pytest.raises(SettingsError, match="another program wrote the keys"):
        scheduler.RedisRows(settings, "first")


def test_check_of_an_older_schema_in_redis_changes_nothing(tmp_path: Path, redis: RedisServer) -> None:
    settings = make_settings(tmp_path, REDIS_ADDR=redis.address)
    with closing(scheduler.RedisRows(settings, "first")) as rows:
        write_schema_1(rows._redis)
    keys = redis.say("DBSIZE")
    assert [problem for problem in check(settings) if "STACK_KEY" not in problem] == []
    assert (redis.say("DBSIZE"), redis.say("GET", "stack:test:schema")) == (keys, "$1\r\n1\r\n")


# --- As a process ---


def test_start_without_the_file_whose_log_is_there_exits_74_and_begins_one_when_told_to(
    state: Path, clock: Clock, fake: FakeBuildkite, tmp_path: Path
) -> None:
    killed(state, clock, 1)
    (state / "jobs.sqlite3").rename(tmp_path / "away")
    before = contents(state)
    settings = {
        "PATH": os.environ["PATH"],
        "BUILDKITE_AGENT_TOKEN": fake.token,
        "BUILDKITE_AGENT_ENDPOINT": fake.url,
        "STATE_DIRECTORY": str(state),
        "LISTEN": f"127.0.0.1:{free_port()}",
        "STACK_KEY": "test",
    }
    scheduler_log = tmp_path / "log"
    with Process(compiled("scheduler.py"), settings, tmp_path, scheduler_log) as refused:
        assert ended(refused) == 74
        refused.wait_for_line("stopped", "jobs.sqlite3 is missing", "jobs.sqlite3-wal exists", "Nothing was changed")
    assert contents(state) == before
    (state / "jobs.sqlite3-wal").rename(tmp_path / "away-wal")
    with Process(compiled("scheduler.py"), settings, tmp_path, scheduler_log) as begun:
        begun.wait_for_line("begun", "there was no store")
        begun.wait_for_line("started")
        begun.terminate()
        assert ended(begun) == 0


def ended(process: Process) -> int:
    """The exit status of a process that ends by itself; one that does not is killed."""
    try:
        return process.ended()
    finally:
        process.kill()
