"""The real scheduler.py and worker.py as processes on loopback, for tests that need all of them."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import requests

from fake_buildkite import FakeBuildkite

#: What worker.py must run on.
OLDEST_PYTHON = "3.9"
TESTS = Path(__file__).parent
ROOT = TESTS.parent


@functools.cache
def installed_agent() -> tuple[str, str]:
    """The path and kind of this machine's buildkite-agent; empty if there is none."""
    path = shutil.which("buildkite-agent", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/bin")
    if path is None:
        return "", ""
    told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    major = re.search(r"version (\d+)\.", told)
    return path, f"v{major[1]}" if major else ""


def agent_path(kind: str) -> str:
    """The agent of that kind: "fake", "v3" or "v4". A real one that is missing skips; in CI v3 must be there."""
    if kind == "fake":
        return str(TESTS / "fake_agent.py")
    variable = f"REAL_AGENT_{kind.upper()}"
    path = os.environ.get(variable, "")
    if not path and installed_agent()[1] == kind:
        path = installed_agent()[0]
    if not os.access(path, os.X_OK):
        why = f"{variable} names no buildkite-agent and none is installed" if not path else f"{variable}: no {path}"
        if kind == "v3" and os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return path


#: Each process of the tests has its own ports, below those that the system gives to connections, so that none is taken
#: between the moment it is found free and the moment a server listens there.
PORTS_EACH = 2000
PORTS = itertools.count(os.getpid())


def free_port() -> int:
    """A port on which nothing listens. The same process gets each of its ports once in PORTS_EACH calls."""
    first = 10_000 + PORTS_EACH * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10)
    for number in itertools.islice(PORTS, PORTS_EACH):
        port = first + number % PORTS_EACH
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port is free from {first} to {first + PORTS_EACH - 1}")


def command(script: str) -> list[str]:
    """One of our scripts, run by the interpreter that runs the tests."""
    return [sys.executable, str(ROOT / script)]


@functools.cache
def compiled(script: str) -> list[str]:
    """The same as command(), but compiled once for all: compiling is half of what a start of scheduler.py costs."""
    directory = Path(tempfile.mkdtemp(prefix="compiled-"))
    atexit.register(shutil.rmtree, directory)
    code = directory / f"{script}c"
    py_compile.compile(str(ROOT / script), str(code), doraise=True)
    (directory / "page.html").symlink_to(ROOT / "page.html")  # the scheduler looks for it beside itself
    return [sys.executable, str(code)]


def wait_until(true: Callable[[], object], why: str = "it did not become so", seconds: float = 30.0) -> None:
    ends_at = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends_at, why
        time.sleep(0.02)


def program(name: str) -> str:
    """The path of a program. If it is missing, the test is skipped; in CI it fails."""
    path = shutil.which(name)
    if path is None:
        why = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return path


def process_1() -> list[str]:
    """The begin of a command line to run as process 1 of its own PID namespace, as in a container; or skip."""
    container = [program("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip("this user cannot make a PID namespace")
    return container


def children(pid: int) -> list[int]:
    """The children of a process, including zombies."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@functools.cache
def python(version: str) -> str:
    """The path of that Python, like "3.9", from PATH or pyenv. One that is missing skips; in CI the oldest fails."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    paths = [shutil.which(f"python{version}"), *map(str, kept.glob(f"{version}.*/bin/python"))]
    for path in filter(None, paths):
        # One of pyenv's stand-ins may have nothing behind it.
        if subprocess.run([path, "-c", ""], capture_output=True, timeout=20, check=False).returncode == 0:
            return path
    why = f"there is no Python {version}, neither in PATH nor in {kept}"
    if version == OLDEST_PYTHON and os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


class RedisServer:
    """A real redis-server on a free port of loopback; it stores data in its directory, if configured."""

    def __init__(self, directory: Path, *arguments: str, kind: str = "redis-server", password: str = ""):
        self.directory, self._password = directory, password
        self._command = [program(kind), *arguments, "--bind", "127.0.0.1", "--dir", str(directory)]
        self._command += [] if kind == "redis-sentinel" else ["--save", ""]
        self._command += ["--requirepass", password] if password else []
        self.process: subprocess.Popen[bytes] | None = None
        for is_last in (False, False, True):
            self.port = free_port()
            self.address = f"127.0.0.1:{self.port}"
            try:
                self.start()
                break
            except ChildProcessError:  # another program has taken the port since
                if is_last:
                    raise

    def start(self) -> None:
        with open(self.directory / f"redis-{self.port}.log", "ab") as log:
            command = [*self._command, "--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise ChildProcessError(f"it does not answer: {command}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether this process answers: another program may have taken the port meanwhile."""
        assert self.process
        try:
            return self.say("PING").startswith("+PONG") and f"process_id:{self.process.pid}\r" in self.say("INFO")
        except OSError:
            return False

    def say(self, *words: str) -> str:
        """One command; the raw answer."""
        parts = [f"*{len(words)}\r\n", *(f"${len(word.encode())}\r\n{word}\r\n" for word in words)]
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            if self._password:
                connection.sendall(f'AUTH "{self._password}"\r\n'.encode())
                connection.recv(1 << 20)
            connection.sendall("".join(parts).encode())
            return connection.recv(1 << 20).decode()

    def leader_pid(self, prefix: str = "stack:test:") -> int:
        """The pid of the scheduler that leads, from its name; 0 if none leads."""
        found = re.search(r"-(\d+)-[0-9a-f]{6}\r\n", self.say("GET", f"{prefix}leader"))
        return int(found[1]) if found else 0

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()  # an error here must belong to this test, not to the next
                raise


class Sentinels:
    """A primary, its replica, and three Sentinels that promote the replica; a context manager."""

    def __init__(self, directory: Path):
        self._directory = directory
        #: Stops each started server, even if a later one does not start.
        self._started = ExitStack()

    def __enter__(self) -> Self:
        with self._started:
            self._start()
            self._started = self._started.pop_all()
        return self

    def _start(self) -> None:
        kept = ["--appendonly", "yes", "--appendfsync", "always"]
        self.primary = self._server("primary", *kept)
        follow = ["--replicaof", "127.0.0.1", str(self.primary.port), "--repl-diskless-sync-delay", "0"]
        self.replica = self._server("replica", *kept, *follow)
        sentinels = [self._sentinel(number) for number in range(3)]
        self.address = "redis+sentinel://" + ",".join(each.address for each in sentinels) + "/main/0"
        self._wait(lambda: all("slaves=1,sentinels=3" in each.say("INFO") for each in sentinels))
        self.wait_until_replicated()

    def _server(self, name: str, *arguments: str, kind: str = "redis-server") -> RedisServer:
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        server = RedisServer(directory, *arguments, kind=kind)
        self._started.callback(server.stop)
        return server

    def _sentinel(self, number: int) -> RedisServer:
        config = self._directory / f"sentinel{number}" / "sentinel.conf"
        config.parent.mkdir()
        config.write_text(
            f"sentinel monitor main 127.0.0.1 {self.primary.port} 2\n"
            "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n"
        )
        return self._server(config.parent.name, str(config), kind="redis-sentinel")

    def wait_until_replicated(self) -> None:
        self._wait(lambda: "master_link_status:up" in self.replica.say("INFO", "replication"))
        self._wait(lambda: self._offset(self.primary) == self._offset(self.replica))

    def has_moved(self) -> bool:
        return "role:master" in self.replica.say("INFO", "replication")

    @staticmethod
    def _offset(server: RedisServer) -> str:
        return server.say("INFO", "replication").partition("master_repl_offset:")[2].partition("\r\n")[0]

    @staticmethod
    def _wait(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, true
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._started.close()


class Proxy:
    """A proxy to a loopback port that can be cut: then packets get no answer, not even a refusal."""

    def __init__(self, to: int):
        self._to = to
        #: Seconds by which it delays data in both directions.
        self.delay = 0.0
        self._whole = threading.Event()
        self._whole.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        """Restore the line. Connections that were open before are lost."""
        self._close_all()
        self._whole.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay)
                if self._whole.is_set():
                    to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _close_all(self) -> None:
        while self._ends:
            end = self._ends.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._close_all()


class Process(subprocess.Popen[bytes]):
    """A process of one of our scripts; tests can wait for its log lines."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], directory: Path, log: Path, pass_fds: Sequence[int] = ()
    ):
        super().__init__(command, env=env, cwd=directory, stderr=subprocess.PIPE, pass_fds=pass_fds)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._log = log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.stderr
        with open(self._log, "ab") as log, self.stderr:
            for line in self.stderr:
                log.write(line)
                log.flush()
                with self._changed:
                    self.lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._changed.notify_all()

    def wait_for_line(self, *parts: str, timeout: float = 30) -> str:
        """The first log line that has all the parts."""

        def found() -> str | None:
            return next((line for line in self.lines if all(part in line for part in parts)), None)

        with self._changed:
            line = self._changed.wait_for(found, timeout)
        assert line, f"no line with {parts} in {timeout} s:\n" + "\n".join(self.lines[-40:])
        return line

    def ended(self, timeout: float = 30) -> int:
        status = self.wait(timeout)
        self._reader.join(timeout)
        return status

    def __exit__(self, *_: object) -> None:
        """Ends a process that a failed test left running. The reader closes the log: Popen would close it under it."""
        self.kill()
        self.ended()


class StackProcesses:
    """Schedulers and workers with a fake Buildkite; a context manager that ends all of them.

    It starts one scheduler. More can be started by number; they need a REDIS_ADDR.
    """

    def __init__(self, fake: FakeBuildkite, directory: Path, agent: str, **scheduler_settings: str):
        self.fake, self.directory, self.agent = fake, directory, agent
        self.ports = [free_port() for _ in range(3)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.port, self.url = self.ports[0], self.urls[0]
        self.scheduler_settings = scheduler_settings
        self.worker_command = compiled("worker.py")
        self.workers: list[Process] = []
        self.schedulers: dict[int, Process] = {}

    @property
    def scheduler(self) -> Process | None:
        return self.schedulers.get(0)

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            # The stand-in agent is started by the interpreter that runs the tests.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "BUILDKITE_AGENT_TOKEN": self.fake.token,
            "BUILDKITE_AGENT_ENDPOINT": self.fake.url,
            **settings,
        }

    def scheduler_command(self) -> list[str]:
        return compiled("scheduler.py")

    def start_scheduler(self, number: int = 0, awaited: str = "started", **more: str) -> Process:
        """Start that scheduler, and wait for this word in its log: "" waits for nothing."""
        settings = {
            "STACK_KEY": "test",
            "LISTEN": f"127.0.0.1:{self.ports[number]}",
            "STATE_DIRECTORY": str(self.directory / "scheduler"),
            "POLL_INTERVAL": "200ms",
        }
        environment = self.environment(**(settings | self.scheduler_settings | more))
        log = self.directory / f"scheduler{number or ''}.log"
        scheduler = self.schedulers[number] = Process(self.scheduler_command(), environment, self.directory, log)
        if awaited:
            scheduler.wait_for_line(awaited)
        return scheduler

    def start_worker(self, name: str, rules: str = "queue=default", **settings: str) -> Process:
        environment = self.environment(
            WORKER_API_SERVER=self.url,
            WORKER_AGENT_QUERY_RULES=rules,
            WORKER_NAME=name,
            WORKER_STATE=str(self.directory / "workers"),
            WORKER_POLL_INTERVAL="200ms",
            BUILDKITE_AGENT_PATH=self.agent,
        )
        worker = Process(self.worker_command, environment | settings, self.directory, self.directory / f"{name}.log")
        self.workers.append(worker)
        return worker

    def stats(self, number: int = 0) -> dict[str, Any]:
        answer: dict[str, Any] = requests.get(f"{self.urls[number]}/stats", timeout=30).json()
        return answer

    def job(self, uuid: str) -> dict[str, Any]:
        answer: dict[str, Any] = requests.get(f"{self.url}/jobs/{uuid}", timeout=30).json()
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        processes = [*self.workers, *self.schedulers.values()]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                # Twice: a job that still runs is cancelled, so that no agent outlives the test.
                process.send_signal(signal.SIGQUIT if process in self.workers else signal.SIGTERM)
        for process in processes:
            try:
                process.ended(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.ended()
        if error:
            for process in processes:
                print("\n".join([f"--- {process.args!r}", *process.lines[-60:]]))
