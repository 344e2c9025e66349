"""The real scheduler.py and worker.py as processes on loopback, for tests that need all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import requests

from fake_buildkite import FakeBuildkite

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def agent_path(kind: str) -> str:
    """The agent of that kind: "fake", "v3" or "v4". A real one that is missing skips; in CI v3 must be there."""
    if kind == "fake":
        return str(TESTS / "fake_agent.py")
    variable = f"REAL_AGENT_{kind.upper()}"
    path = os.environ.get(variable, "")
    if not os.access(path, os.X_OK):
        why = f"{variable} does not name a buildkite-agent: {path!r}"
        if kind == "v3" and os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(script: str) -> list[str]:
    """One of our scripts, run by the interpreter that runs the tests."""
    return [sys.executable, str(ROOT / script)]


class Process(subprocess.Popen[bytes]):
    """A script of ours whose log can be waited for, line by line."""

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

    def wait_for_line(self, *parts: str, timeout: float = 20) -> str:
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


class StackProcesses:
    """One scheduler and its workers against a fake Buildkite; a context manager that leaves nothing running."""

    def __init__(self, fake: FakeBuildkite, directory: Path, agent: str, **scheduler_settings: str):
        self.fake, self.directory, self.agent = fake, directory, agent
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.scheduler_settings = scheduler_settings
        self.workers: list[Process] = []
        self.scheduler: Process | None = None

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            # The stand-in agent is started by the interpreter that runs the tests.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "BUILDKITE_AGENT_TOKEN": self.fake.token,
            "BUILDKITE_AGENT_ENDPOINT": self.fake.url,
            **settings,
        }

    def start_scheduler(self) -> Process:
        settings = {
            "STACK_KEY": "test",
            "LISTEN": f"127.0.0.1:{self.port}",
            "STATE_DIRECTORY": str(self.directory / "scheduler"),
            "POLL_INTERVAL": "200ms",
        }
        environment = self.environment(**(settings | self.scheduler_settings))
        self.scheduler = Process(command("scheduler.py"), environment, self.directory, self.directory / "scheduler.log")
        self.scheduler.wait_for_line("started")
        return self.scheduler

    def start_worker(self, name: str, rules: str = "queue=default", **settings: str) -> Process:
        environment = self.environment(
            WORKER_API_SERVER=self.url,
            WORKER_AGENT_QUERY_RULES=rules,
            WORKER_NAME=name,
            WORKER_STATE=str(self.directory / "workers"),
            WORKER_POLL_INTERVAL="200ms",
            BUILDKITE_AGENT_PATH=self.agent,
        )
        worker = Process(command("worker.py"), environment | settings, self.directory, self.directory / f"{name}.log")
        self.workers.append(worker)
        return worker

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = requests.get(f"{self.url}/stats", timeout=10).json()
        return answer

    def job(self, uuid: str) -> dict[str, Any]:
        answer: dict[str, Any] = requests.get(f"{self.url}/jobs/{uuid}", timeout=10).json()
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        processes = [*self.workers, *([self.scheduler] if self.scheduler else [])]
        for process in processes:
            if process.poll() is None:
                # Twice: a job that still runs is cancelled, so that no agent outlives the test.
                process.send_signal(signal.SIGQUIT if process in self.workers else signal.SIGTERM)
        for process in processes:
            try:
                process.ended(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.ended()
        if error:
            for process in processes:
                print("\n".join([f"--- {process.args!r}", *process.lines[-60:]]))
