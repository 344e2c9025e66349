"""worker.py as a process, against a scripted scheduler and a scripted agent, both written here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.server
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import worker  # noqa: E402
from processes import children, process_1, python  # noqa: E402
from test_service import Systemd  # noqa: E402

#: Seconds. No wait of a test is longer; what is waited for takes milliseconds.
PATIENCE = 30.0
AGENT_TOKEN = "agent-token-that-nobody-may-see"
STACK_TOKEN = "stack-token-that-nobody-may-see"
UUID = "018f0000-0000-4000-8000-000000000001"
OTHER = "018f0000-0000-4000-8000-000000000002"


# --- A scripted scheduler ---


@dataclasses.dataclass
class Call:
    verb: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    client: Any


@dataclasses.dataclass
class Answer:
    """What one call gets. `before` runs ahead of the answer; `hang` gives none at all."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    before: Callable[[], None] | None = None
    hang: bool = False


class FakeScheduler:
    """Answers from a queue for each verb, in order; without one, as a scheduler that has no job."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.changed = threading.Condition()
        self.calls: list[Call] = []
        #: What workers told of themselves, apart from what jobs need.
        self.introductions: list[Call] = []
        self.answers: dict[str, deque[Answer]] = defaultdict(deque)
        self.closing = False
        self.server: http.server.ThreadingHTTPServer | None = None
        self.port = port
        self.open()

    def open(self) -> None:
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: two would wait for each other for 40 ms

            def do_GET(self) -> None:
                fake.handle(self)

            def do_POST(self) -> None:
                fake.handle(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass

        self.closing = False
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        if self.tls:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.server:
            self.server.shutdown()
            self.server.server_close()
        self.server = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def put(self, verb: str, *answers: Answer) -> None:
        with self.changed:
            self.answers[verb].extend(answers)
            self.changed.notify_all()

    def put_job(self, uuid: str = UUID, **fields: Any) -> None:
        job = {"uuid": uuid, "queue_key": "default", "claim": f"claim-{uuid[-1]}", "lease_seconds": 30}
        self.put("claim", Answer(body=job | fields))

    def handle(self, http_call: http.server.BaseHTTPRequestHandler) -> None:
        length = int(http_call.headers.get("Content-Length") or 0)
        body = json.loads(http_call.rfile.read(length) or b"{}")
        verb = {"/jobs": "claim", "/health": "health"}.get(urlsplit(http_call.path).path)
        verb = "introduce" if http_call.path.startswith("/workers/") else verb
        call = Call(
            verb or http_call.path.rpartition("/")[2],
            http_call.path,
            dict(http_call.headers.items()),
            body,
            time.monotonic(),
            http_call.client_address,
        )
        self.note(call)
        answer = self.next_answer(call, http_call.connection)
        if answer is None:
            http_call.close_connection = True
            return
        if answer.before:
            answer.before()
        self.reply(http_call, answer)

    def note(self, call: Call) -> None:
        with self.changed:
            (self.introductions if call.path.startswith("/workers/") else self.calls).append(call)
            self.changed.notify_all()

    def next_answer(self, call: Call, connection: socket.socket) -> Answer | None:
        """The scripted answer; a claim without one is parked until its client has gone."""
        while True:
            with self.changed:
                if self.closing:
                    return None
                found = self.answers[call.verb]
                if found and not found[0].hang:
                    self.changed.notify_all()
                    return found.popleft()
                if not found and call.verb != "claim":
                    return Answer(body={"state": "running", "stop": False, "lease_seconds": 30})
                self.changed.wait(0.01)
            if self.gone(connection):
                self.note(dataclasses.replace(call, verb=f"{call.verb} closed"))
                return None

    def gone(self, connection: socket.socket) -> bool:
        if not select.select([connection], [], [], 0)[0]:
            return False
        try:
            return not (connection.recv(1) if self.tls else connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return True

    @staticmethod
    def reply(http_call: http.server.BaseHTTPRequestHandler, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body or {}).encode()
        data = b"" if answer.status == 204 else body
        with contextlib.suppress(OSError):
            http_call.send_response(answer.status)
            for name, value in answer.headers.items():
                http_call.send_header(name, value)
            if answer.status != 204:
                http_call.send_header("Content-Length", str(len(data)))
            http_call.end_headers()
            http_call.wfile.write(data)

    def wait_for(self, verb: str, count: int = 1) -> list[Call]:
        """The calls of one verb, as soon as there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.calls_to(verb)) >= count, PATIENCE), (
                f"no {count} calls to {verb}: {[call.verb for call in self.calls]}"
            )
            return self.calls_to(verb)

    def calls_to(self, verb: str) -> list[Call]:
        return [call for call in self.introductions + self.calls if call.verb == verb]

    def verbs(self) -> list[str]:
        return [call.verb for call in self.calls]


def refusal(status: int, code: str = "broken", **headers: str) -> Answer:
    return Answer(status, {"error": code, "message": f"scripted {code}"}, headers)


STOP = Answer(body={"state": "leased", "stop": True, "lease_seconds": 0.3})
GO_ON = Answer(body={"state": "running", "stop": False, "lease_seconds": 0.3})


# --- Workers and agents ---


class WorkerProcess:
    """A worker.py, its log as lines, and bounded waits for them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self.changed:
                self.lines.append(line.decode().rstrip("\n"))
                self.changed.notify_all()

    def wait_for_line(self, pattern: str, count: int = 1) -> str:
        def found() -> list[str]:
            return [line for line in self.lines if re.search(pattern, line)]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, PATIENCE), (
                f"no {count} lines {pattern!r} in:\n" + "\n".join(self.lines)
            )
            return found()[count - 1]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status

    @property
    def log(self) -> str:
        return "\n".join(self.lines)


AGENT = """#!/bin/sh
cd {dir}
if [ "$1" = --version ]; then echo "buildkite-agent version {version}"; exit 0; fi
printf '%s\\n' "$@" > arguments
env > environment
echo $$ > pid.new; mv pid.new pid
await() {{ while [ ! -e "$1" ]; do sleep 0.01; done; }}
{body}
"""


class Bench:
    """One test's directory, its agent, its scheduler and the workers that it started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.agent_path = directory / "agent"
        self.scheduler = FakeScheduler()
        self.workers: list[WorkerProcess] = []
        #: What runs worker.py.
        self.python = os.environ.get("WORKER_PYTHON") or sys.executable
        self.write_agent("exit 0")

    def write_agent(self, body: str, version: str = "3.137.0+fake") -> None:
        """What the agent does after it has written down its arguments, environment and pid."""
        new = self.directory / "agent.new"
        new.write_text(AGENT.format(dir=self.directory, body=body, version=version))
        new.chmod(0o755)
        new.rename(self.agent_path)

    def environment(self, **settings: str) -> dict[str, str]:
        base = {
            "PATH": os.environ["PATH"],
            "WORKER_API_SERVER": self.scheduler.url,
            "WORKER_STATE": str(self.state),
            "WORKER_NAME": "host-1",
            "WORKER_POLL_INTERVAL": "20ms",
            "BUILDKITE_AGENT_PATH": str(self.agent_path),
            "BUILDKITE_AGENT_TOKEN": AGENT_TOKEN,
            "STACK_API_TOKEN": STACK_TOKEN,
            "LOG_LEVEL": "debug",
        }
        return {name: text for name, text in (base | settings).items() if text}

    def command(self, constants: dict[str, float | str]) -> list[str]:
        """worker.py; with constants, the same with these in place of its own, for what takes minutes."""
        if not constants:
            return [self.python, str(ROOT / "worker.py")]
        changes = "".join(f"worker.{name} = {value}; " for name, value in constants.items())
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import worker; {changes}"
        return [self.python, "-c", code + "sys.exit(worker.main([]))"]

    def start(
        self, constants: dict[str, float | str] | None = None, container: Sequence[str] = (), **settings: str
    ) -> WorkerProcess:
        process = subprocess.Popen(
            [*container, *self.command(constants or {})],
            cwd=self.directory,
            env=self.environment(**settings),
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self.workers.append(WorkerProcess(process))
        return self.workers[-1]

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, str(ROOT / "worker.py"), *arguments],
            cwd=self.directory,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def file(self, name: str) -> str:
        """The text of a file that the agent writes, as soon as it is there."""
        path = self.directory / name
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline, f"no {name}: {sorted(os.listdir(self.directory))}"
            time.sleep(0.005)
        return path.read_text()

    def touch(self, name: str) -> None:
        (self.directory / name).touch()

    def agent_pid(self) -> int:
        return int(self.file("pid"))

    def close(self) -> None:
        for one in self.workers:
            if one.process.poll() is None:
                one.process.kill()
            one.exit_status()
            assert one.process.stderr
            one.process.stderr.close()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.directory / "pid").read_text()), signal.SIGKILL)
        self.scheduler.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()
    for one in made.workers:
        assert AGENT_TOKEN not in one.log and STACK_TOKEN not in one.log


def settings(**environ: str) -> worker.Settings:
    return worker.read_settings(worker.Settings, {"BUILDKITE_AGENT_TOKEN": AGENT_TOKEN} | environ)


# --- A job's life ---


def test_work_one_job_claims_starts_completes_and_claims_again(bench: Bench) -> None:
    bench.write_agent("exit 3")
    bench.scheduler.put_job()
    one = bench.start()
    complete = bench.scheduler.wait_for("complete")[0]
    bench.scheduler.wait_for("claim", 2)
    assert bench.scheduler.verbs()[:3] == ["claim", "complete", "claim"]
    assert complete.path == f"/jobs/{UUID}/complete"
    free = complete.body.pop("free")
    assert free > 0
    assert complete.body == {"claim": "claim-1", "exit_status": 3, "last_words": "", "strays": 0}
    for word in ("claimed", "started", "exited", "completed"):
        one.wait_for_line(rf"{word} job={UUID}")
    assert not (bench.state / "host-1.agent").exists()


def test_claim_always_tells_who_asks_and_for_what(bench: Bench) -> None:
    bench.start(WORKER_AGENT_QUERY_RULES="arch=amd64, queue=linux,os=a b", WORKER_WAIT="12s")
    claim = bench.scheduler.wait_for("claim")[0]
    query = parse_qs(urlsplit(claim.path).query)
    assert query == {"query": ["queue=linux,arch=amd64,os=a b"], "wait": ["12"]}
    assert claim.headers["X-Worker-ID"] == "host-1"
    assert re.fullmatch("[0-9a-f]{16}", claim.headers["X-Worker-Session"])
    assert claim.headers["Authorization"] == f"Bearer {STACK_TOKEN}"


def test_claim_tells_the_host_and_a_hash_of_the_machine_s_id(bench: Bench) -> None:
    bench.start(WORKER_NAME="w1")
    bench.start(WORKER_NAME="w2", WORKER_HOST="rack3-7")
    first, second = sorted(bench.scheduler.wait_for("claim", 2), key=lambda call: call.headers["X-Worker-ID"])
    hosts = [call.headers["X-Worker-Host"] for call in (first, second)]
    assert hosts == [os.uname().nodename, "rack3-7"]
    assert [call.headers["X-Worker-Machine"] for call in (first, second)] == [worker.machine()] * 2


@pytest.mark.parametrize(
    ("text", "has_id"),
    [("0123456789abcdef0123456789abcdef\n", True), ("uninitialized\n", False), ("", False), (None, False)],
)
def test_machine_is_a_keyed_hash_of_its_id_or_empty_without_one(tmp_path: Path, text: str | None, has_id: bool) -> None:
    path = tmp_path / "machine-id"
    if text is not None:
        path.write_text(text)
    told = worker.machine(str(path))
    assert bool(re.fullmatch("[0-9a-f]{32}", told)) is has_id
    assert told == worker.machine(str(path))
    assert not text or text.strip() not in told


@pytest.mark.parametrize(("name", "is_good"), [("rack3-7.example", True), ("a b", False), ("-a", False), ("é", False)])
def test_read_the_host_takes_what_a_header_can_hold(name: str, is_good: bool) -> None:
    if is_good:
        assert settings(WORKER_HOST=name).host == name
    else:
        with pytest.raises(worker.SettingsError, match="WORKER_HOST: .* is not a host's name"):
            settings(WORKER_HOST=name)


def test_start_without_name_is_called_after_the_host_that_was_set(bench: Bench) -> None:
    bench.start(WORKER_NAME="", WORKER_HOST="rack3-7")
    assert bench.scheduler.wait_for("claim")[0].headers["X-Worker-ID"] == "rack3-7-1"


def test_claim_without_stack_token_sends_no_authorization(bench: Bench) -> None:
    bench.start(STACK_API_TOKEN="")
    assert "Authorization" not in bench.scheduler.wait_for("claim")[0].headers


def test_call_again_keeps_the_connection_and_the_session(bench: Bench) -> None:
    bench.scheduler.put("claim", Answer(204))
    bench.scheduler.put_job()
    bench.start()
    claims = bench.scheduler.wait_for("claim", 3)
    complete = bench.scheduler.wait_for("complete")[0]
    assert len({call.client for call in [*claims, complete]}) == 1
    assert len({call.headers["X-Worker-Session"] for call in [*claims, complete]}) == 1


def test_start_with_restarted_worker_uses_a_new_session(bench: Bench) -> None:
    for _ in range(2):
        one = bench.start()
        one.wait_for_line("started version=")
        bench.scheduler.wait_for("claim", len(bench.workers))
        one.send(signal.SIGTERM)
        assert one.exit_status() == 0
    first, second = bench.scheduler.calls_to("claim")
    assert first.headers["X-Worker-Session"] != second.headers["X-Worker-Session"]


def test_start_agent_gives_arguments_and_environment_without_what_is_ours(bench: Bench) -> None:
    bench.scheduler.put_job(queue_key="linux")
    bench.start(
        WORKER_QUEUE="linux",
        WORKER_AGENT_QUERY_RULES="arch=amd64",
        WORKER_TAGS="rack=7,arch=amd64",
        BUILDKITE_AGENT_ENDPOINT="http://127.0.0.1:1/v3",
        BUILDKITE_AGENT_TAGS="queue=other",
        BUILDKITE_AGENT_REFLECT_EXIT_STATUS="true",
        BUILDKITE_HOOKS_PATH="/hooks",
        NOTIFY_SOCKET="/run/none",
        CREDENTIALS_DIRECTORY="/run/none",
        LISTEN_FDS="1",
        WATCHDOG_USEC="1",
        INVOCATION_ID="1",
    )
    bench.scheduler.wait_for("complete")
    assert bench.file("arguments").splitlines() == [
        *("start", "--acquire-job", UUID, "--spawn", "1", "--queue", "linux"),
        *("--tags", "arch=amd64,rack=7", "--name", "host-1"),
    ]
    environ = dict(line.split("=", 1) for line in bench.file("environment").splitlines())
    assert environ["BUILDKITE_AGENT_TOKEN"] == AGENT_TOKEN
    assert environ["BUILDKITE_AGENT_ENDPOINT"] == "http://127.0.0.1:1/v3"
    assert environ["BUILDKITE_BUILD_PATH"] == str(bench.state / "builds")
    assert environ["BUILDKITE_AGENT_PING_MODE"] == "poll-only"
    assert environ["BUILDKITE_HOOKS_PATH"] == "/hooks"
    inherited = {name for name in environ if not name.startswith("BUILDKITE_")}
    assert inherited <= {"PATH", "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
    assert not {"BUILDKITE_AGENT_TAGS", "BUILDKITE_AGENT_REFLECT_EXIT_STATUS"} & set(environ)


def test_arguments_for_default_queue_without_tags_leave_both_out() -> None:
    job = worker.Job(UUID, "c", "_default", 30.0)
    assert worker.agent_arguments(settings(), "host-1", job) == [
        *("/usr/local/bin/buildkite-agent", "start", "--acquire-job", UUID, "--spawn", "1"),
        *("--name", "host-1"),
    ]


def test_environment_with_ping_mode_and_no_endpoint_keeps_the_users_and_sets_none() -> None:
    given = {
        "BUILDKITE_AGENT_PING_MODE": "auto",
        "BUILDKITE_AGENT_TOKEN_FILE": "/secret",
        "LOG_LEVEL": "debug",
    }
    made = worker.agent_environment(settings(WORKER_STATE="/s"), given, AGENT_TOKEN)
    assert made == {
        "BUILDKITE_AGENT_PING_MODE": "auto",
        "BUILDKITE_AGENT_TOKEN": AGENT_TOKEN,
        "BUILDKITE_BUILD_PATH": "/s/builds",
    }


def test_start_agent_leaves_its_input_empty(bench: Bench) -> None:
    bench.write_agent("read -r line; echo read $? $line")
    bench.scheduler.put_job()
    bench.start()
    assert bench.scheduler.wait_for("complete")[0].body["last_words"] == "read 1\n"


def test_complete_after_agent_died_of_signal_says_128_and_its_number(bench: Bench) -> None:
    bench.write_agent("kill -9 $$")
    bench.scheduler.put_job()
    bench.start()
    assert bench.scheduler.wait_for("complete")[0].body["exit_status"] == 137


# --- The agent's output ---


def test_output_of_agent_is_logged_line_by_line_with_the_job(bench: Bench) -> None:
    bench.write_agent("echo first line; printf '\\033[31mred\\033[0m\\tand\\007 \\377\\n' >&2; printf tail")
    bench.scheduler.put_job()
    one = bench.start()
    complete = bench.scheduler.wait_for("complete")[0]
    one.wait_for_line(f'output job={UUID} text="first line"$')
    assert one.wait_for_line("red").endswith(f'output job={UUID} text="red\\tand \\ufffd"')
    one.wait_for_line(f"output job={UUID} text=tail$")
    assert complete.body["last_words"] == "first line\nred\tand \ufffd\ntail\n"


def test_output_of_overlong_line_is_cut_into_chunks(bench: Bench) -> None:
    bench.write_agent("head -c 20000 /dev/zero | tr '\\0' z; echo")
    bench.scheduler.put_job()
    one = bench.start()
    complete = bench.scheduler.wait_for("complete")[0]
    one.wait_for_line("completed")
    lines = [line for line in one.lines if " output " in line]
    assert sum(line.count("z") for line in lines) == 20000
    assert max(map(len, lines)) < worker.LINE_CHARACTERS + 200
    assert len(complete.body["last_words"]) == worker.LAST_WORDS


def test_output_naming_a_secret_is_redacted(bench: Bench) -> None:
    bench.write_agent("echo token is $BUILDKITE_AGENT_TOKEN.")
    bench.scheduler.put_job()
    one = bench.start()
    complete = bench.scheduler.wait_for("complete")[0]
    one.wait_for_line(r'output .*"token is \[REDACTED\]\."')
    assert AGENT_TOKEN not in json.dumps(complete.body)


class Pipe:
    """An Output over a pipe, and what it logs."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        reader, self.writer = os.pipe()
        os.set_blocking(reader, False)
        self.output = worker.Output(reader)
        self.output.secrets = {AGENT_TOKEN, STACK_TOKEN}

    def logged(self, *writes: bytes) -> list[str]:
        """The texts of the lines that come of these writes, each read before the next."""
        self.caplog.clear()
        for data in writes:
            os.write(self.writer, data)
            while self.output.read():
                pass
        self.output.drain()
        return [record.getMessage().partition(" text=")[2].strip('"') for record in self.caplog.records]


@pytest.fixture
def pipe(caplog: pytest.LogCaptureFixture) -> Iterator[Pipe]:
    caplog.set_level(logging.INFO)
    made = Pipe(caplog)
    yield made
    os.close(made.output.fifo)
    os.close(made.writer)


def test_output_of_secret_anywhere_in_an_overlong_line_is_redacted_whole(pipe: Pipe) -> None:
    end = worker.LINE_CHARACTERS
    for before in range(end - len(AGENT_TOKEN) - 1, end + 2):
        lines = pipe.logged(b"z" * before + AGENT_TOKEN.encode() + b"y" * 100 + b"\n")
        assert "".join(lines) == "z" * before + "[REDACTED]" + "y" * 100
        assert max(map(len, lines)) <= end


def test_output_of_secret_that_comes_in_two_parts_of_an_unfinished_line_is_redacted_whole(pipe: Pipe) -> None:
    for length in range(1, len(AGENT_TOKEN)):
        first, second = AGENT_TOKEN[:length].encode(), AGENT_TOKEN[length:].encode()
        lines = pipe.logged(b"z" * worker.LINE_CHARACTERS + first, second + b"y")
        assert "".join(lines) == "z" * worker.LINE_CHARACTERS + "[REDACTED]y"


def test_output_of_what_only_began_like_a_secret_is_logged_in_the_end(pipe: Pipe) -> None:
    beginning = AGENT_TOKEN[:-1]
    assert "".join(pipe.logged(b"z" * worker.LINE_CHARACTERS + beginning.encode())).endswith(f"z{beginning}")


def test_output_cut_within_a_character_keeps_it_whole(pipe: Pipe) -> None:
    data = "€".encode()
    assert pipe.logged(b"5 " + data[:1], data[1:]) == ["5 \\u20ac"]
    assert pipe.logged(b"torn " + data[:1]) == ["torn \\ufffd"]
    assert pipe.logged(b"next") == ["next"]


def test_output_naming_the_token_that_the_agent_has_is_redacted_also_after_another_came(bench: Bench) -> None:
    token = bench.directory / "agent-token"
    token.write_text(AGENT_TOKEN)
    bench.write_agent("touch ready; await go; echo token is $BUILDKITE_AGENT_TOKEN.")
    bench.scheduler.put_job()
    one = bench.start(BUILDKITE_AGENT_TOKEN="", BUILDKITE_AGENT_TOKEN_FILE=str(token))
    bench.file("ready")
    replace_file(token, "another-token")
    one.send(signal.SIGHUP)
    one.wait_for_line("reloaded")
    bench.touch("go")
    one.wait_for_line(r'output .*"token is \[REDACTED\]\."')


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_stop_while_claim_is_parked_closes_it_and_exits(bench: Bench, number: int) -> None:
    one = bench.start(WORKER_POLL_INTERVAL="30s")
    bench.scheduler.wait_for("claim")
    sent_at = time.monotonic()
    one.send(number)
    assert one.exit_status() == 0
    closed = bench.scheduler.wait_for("claim closed")[0]
    assert closed and time.monotonic() - sent_at < 10  # the claim would last for three times as long
    assert bench.scheduler.verbs() == ["claim", "claim closed"]


def test_stop_as_a_job_arrives_releases_it(bench: Bench) -> None:
    one = bench.start()
    bench.scheduler.wait_for("claim")
    # Stopped, the worker finds both when it goes on: the answer and the signal.
    one.send(signal.SIGSTOP)
    bench.scheduler.put_job()
    one.send(signal.SIGTERM)
    with bench.scheduler.changed:
        assert bench.scheduler.changed.wait_for(lambda: not bench.scheduler.answers["claim"], PATIENCE)
    wait_until_answered(one.process.pid)
    one.send(signal.SIGCONT)
    assert one.exit_status() == 0
    release = bench.scheduler.wait_for("release")[0]
    assert release.body["claim"] == "claim-1" and "stop" in release.body["reason"]
    assert bench.scheduler.verbs() == ["claim", "release"]
    assert not (bench.directory / "pid").exists()


def wait_until_answered(pid: int) -> None:
    """Until bytes wait in the receive queue of a TCP connection of the process (it is stopped)."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[9] in inodes and not fields[4].endswith(":00000000"):
                return
    raise AssertionError("the answer never reached the worker")


def test_stop_once_while_agent_runs_lets_it_finish_and_completes(bench: Bench) -> None:
    bench.write_agent("trap 'touch signalled' TERM INT QUIT; await go; exit 5")
    bench.scheduler.put_job()
    one = bench.start()
    bench.agent_pid()
    one.send(signal.SIGTERM)
    one.wait_for_line("stopping signal=SIGTERM")
    bench.touch("go")
    assert one.exit_status() == 0
    assert bench.scheduler.verbs() == ["claim", "complete"]
    assert bench.scheduler.calls_to("complete")[0].body["exit_status"] == 5
    assert not (bench.directory / "signalled").exists()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGQUIT]])
def test_stop_twice_or_quit_while_agent_runs_cancels_through_the_agent(
    bench: Bench, numbers: list[signal.Signals]
) -> None:
    bench.write_agent("trap 'echo cancelled; exit 0' QUIT; touch ready; await never")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    for count, number in enumerate(numbers, 1):
        one.send(number)
        one.wait_for_line("stopping", count)
    assert one.exit_status() == 0
    one.wait_for_line(f"signalled job={UUID} .*signal=SIGQUIT")
    one.wait_for_line(f"output job={UUID} text=cancelled")
    assert bench.scheduler.verbs() == ["claim", "complete"]


def test_stop_a_third_time_sends_the_agent_nothing_more(bench: Bench) -> None:
    bench.write_agent("trap 'echo got QUIT' QUIT; trap 'echo got TERM' TERM; touch ready; await go")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    for count in range(1, 5):
        one.send(signal.SIGTERM)
        one.wait_for_line("stopping", count)
    one.wait_for_line("got QUIT")
    bench.touch("go")
    assert one.exit_status() == 0
    assert (one.log.count('text="got QUIT'), one.log.count("got TERM")) == (1, 0)


# --- Slots ---


def test_start_second_worker_of_a_name_is_refused(bench: Bench) -> None:
    bench.start()
    bench.scheduler.wait_for("claim")
    second = bench.run()
    assert second.returncode == worker.EXIT_LATER
    assert "another worker on this host is called host-1" in second.stderr
    assert bench.scheduler.verbs() == ["claim"]


def test_start_without_name_takes_the_first_free_number(bench: Bench) -> None:
    host = os.uname().nodename
    for count in (1, 2):
        bench.start(WORKER_NAME="")
        bench.scheduler.wait_for("claim", count)
    names = [call.headers["X-Worker-ID"] for call in bench.scheduler.calls]
    assert names == [f"{host}-1", f"{host}-2"]
    bench.workers[0].send(signal.SIGTERM)
    bench.workers[0].exit_status()
    bench.start(WORKER_NAME="")
    assert bench.scheduler.wait_for("claim", 3)[2].headers["X-Worker-ID"] == f"{host}-1"


def test_restart_after_kill_waits_for_the_agent_that_lives_on(bench: Bench) -> None:
    bench.write_agent("echo before; await killed; echo between; touch between; await go; echo after; touch over")
    bench.scheduler.put_job()
    one = bench.start()
    one.wait_for_line("text=before")
    one.process.kill()
    one.exit_status()
    bench.touch("killed")
    bench.file("between")  # written with no worker there to read it
    bench.scheduler.put_job(OTHER)
    two = bench.start()
    two.wait_for_line(f"waiting job={UUID} pid={bench.agent_pid()}")
    two.wait_for_line(f"output job={UUID} text=between")
    assert bench.scheduler.verbs().count("claim") == 1
    bench.touch("go")
    two.wait_for_line(f"output job={UUID} text=after")
    two.wait_for_line(f"gone job={UUID}")
    assert (bench.directory / "over").exists()
    bench.scheduler.wait_for("claim", 2)
    two.wait_for_line(f"claimed job={OTHER}")


def test_wait_for_an_earlier_agent_is_reported_again_and_again_until_it_ends(bench: Bench) -> None:
    bench.write_agent("touch ready; await go")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    one.process.kill()
    one.exit_status()
    two = bench.start({"REPORT_SECONDS": 0.02})
    told = bench.scheduler.wait_for("introduce", 3)
    assert {(call.body["state"], call.body["reason"]) for call in told} == {
        ("earlier_agent", f"the agent of an earlier process of this worker still runs job {UUID}")
    }
    assert bench.scheduler.verbs().count("claim") == 1
    bench.touch("go")
    bench.scheduler.put("claim", Answer(204))
    bench.scheduler.wait_for("claim", 3)
    assert bench.scheduler.introductions[-1].body["state"] == "idle"
    two.wait_for_line("gone job=")


def test_wait_for_an_agent_that_stays_up_after_its_job_is_reported_as_paused_at_buildkite(bench: Bench) -> None:
    bench.write_agent("await go")
    bench.scheduler.put("touch", GO_ON, *[Answer(body={"state": "done", "stop": False, "lease_seconds": 0.3})] * 20)
    bench.scheduler.put_job(lease_seconds=0.3)
    bench.start({"PAUSED_SECONDS": 0.1})
    told = bench.scheduler.wait_for("introduce", 2)
    assert {(call.body["state"], call.body["reason"][:25]) for call in told} == {
        ("paused", "agent paused at Buildkite")
    }
    bench.touch("go")
    assert bench.scheduler.wait_for("complete")[0].body["exit_status"] == 0
    bench.scheduler.wait_for("claim", 2)


def test_wait_for_an_earlier_agent_goes_on_while_the_scheduler_hangs(bench: Bench) -> None:
    bench.write_agent("touch ready; await go; echo late")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    one.process.kill()
    one.exit_status()
    bench.scheduler.put("introduce", Answer(hang=True))
    two = bench.start()
    bench.scheduler.wait_for("introduce")
    bench.touch("go")
    two.wait_for_line("text=late")
    bench.scheduler.wait_for("claim", 2)


def test_wait_for_an_earlier_agent_leaves_no_descriptor_of_it(bench: Bench) -> None:
    bench.write_agent("touch ready; await go")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    one.process.kill()
    one.exit_status()
    two = bench.start()
    two.wait_for_line("waiting job=")
    bench.touch("go")
    two.wait_for_line("gone job=")
    bench.scheduler.wait_for("claim", 2)
    files = [os.readlink(path) for path in Path(f"/proc/{two.process.pid}/fd").iterdir() if path.is_symlink()]
    assert files and "anon_inode:[pidfd]" not in files


def test_read_the_record_of_an_agent_leaves_no_descriptor_of_it(tmp_path: Path) -> None:
    slot = worker.Slot(str(tmp_path), "w1")
    before = len(os.listdir("/proc/self/fd"))
    for started in ("of another process", worker.start_time(os.getpid())):
        slot.record(worker.Agent(os.getpid(), started, worker.Job(UUID, "claim-1", "default", 30.0)))
        assert (slot.recorded() is None) == (started == "of another process")
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(slot.lock)


def test_run_jobs_as_process_1_leaves_no_zombie_of_what_builds_left_behind(bench: Bench) -> None:
    container = process_1()
    # Each in a session of its own, where the end of the agent's process group does not reach it.
    leave = "setsid sh -c 'touch begun-'$$-$n'; sleep 0.1; exec touch left-'$$-$n & await begun-$$-$n"
    bench.write_agent(f"for n in 1 2 3; do {leave}; done; exit 7")
    bench.scheduler.put_job()
    bench.scheduler.put_job(OTHER)
    one = bench.start(container=container)
    ended = [call.body["exit_status"] for call in bench.scheduler.wait_for("complete", 2)]
    assert ended == [7, 7]  # which nobody took from those who wait for it
    [pid] = children(one.process.pid)
    until = time.monotonic() + PATIENCE
    # At once, also while the worker waits for the next job.
    while len(list(bench.directory.glob("left-*"))) < 6 or children(pid):
        assert time.monotonic() < until, children(pid)
        time.sleep(0.01)
    assert len(bench.scheduler.calls_to("claim")) == 3
    os.kill(pid, signal.SIGTERM)
    assert one.exit_status() == 0


def test_start_of_agent_whose_worker_dies_before_recording_it_never_happens(bench: Bench) -> None:
    bench.scheduler.put_job()
    one = bench.start({"Slot.record": "lambda *_: worker.os.kill(worker.os.getpid(), 9)"})
    assert one.exit_status() == -9
    two = bench.start()
    bench.scheduler.wait_for("claim", 2)
    assert "waiting" not in two.log
    assert not (bench.directory / "arguments").exists()


def test_restart_after_kill_with_stop_twice_cancels_the_agent_that_lives_on(bench: Bench) -> None:
    bench.write_agent("trap 'touch cancelled; exit 0' QUIT; touch ready; await never")
    bench.scheduler.put_job()
    one = bench.start()
    bench.file("ready")
    one.process.kill()
    one.exit_status()
    two = bench.start()
    two.wait_for_line("waiting")
    bench.scheduler.wait_for("touch")
    two.send(signal.SIGQUIT)
    assert two.exit_status() == 0
    bench.file("cancelled")
    assert set(bench.scheduler.verbs()) == {"claim", "touch"}


@pytest.mark.parametrize(
    "record",
    [
        '{"pid": 1, "started": "other", "job": "x"}',
        "{",
        "{}",
        '{"pid": 99999999, "started": "1", "job": "x"}',
        '{"pid": 99999999, "started": "", "job": "x"}',
    ],
)
def test_restart_with_record_of_no_living_agent_claims_at_once(bench: Bench, record: str) -> None:
    bench.state.mkdir()
    (bench.state / "host-1.agent").write_text(record)
    one = bench.start()
    bench.scheduler.wait_for("claim")
    assert "waiting" not in one.log
    if record in ("{", "{}"):
        one.wait_for_line("it is not a record of an agent")
    else:
        assert "it is not a record of an agent" not in one.log
    assert not (bench.state / "host-1.agent").exists()


def test_start_time_of_gone_process_is_empty_and_of_living_ones_stable() -> None:
    child = subprocess.Popen(["sleep", "60"])
    born = worker.start_time(child.pid)
    assert born and born == worker.start_time(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert worker.start_time(child.pid) == ""  # a zombie is gone, too
    child.wait()
    assert worker.start_time(child.pid) == ""


# --- An agent that cannot be used ---


def test_claim_with_missing_agent_waits_until_it_appears(bench: Bench) -> None:
    hidden = bench.agent_path.rename(bench.directory / "hidden")
    one = bench.start()
    one.wait_for_line("error   retrying what=agent problem=.BUILDKITE_AGENT_PATH: .*No such file")
    assert bench.scheduler.verbs() == []
    hidden.rename(bench.agent_path)
    bench.scheduler.wait_for("claim")
    one.wait_for_line("agent path=.* version=3.137.0")


def test_wait_for_a_missing_agent_is_reported_with_each_look_at_it(bench: Bench) -> None:
    hidden = bench.agent_path.rename(bench.directory / "hidden")
    bench.start()
    for told in bench.scheduler.wait_for("introduce", 3):
        assert (told.path, told.body["state"]) == ("/workers/host-1", "no_agent")
        assert "No such file" in told.body["reason"]
        assert told.headers["X-Worker-Host"] == os.uname().nodename
    hidden.rename(bench.agent_path)
    bench.scheduler.put("claim", Answer(204))
    bench.scheduler.wait_for("claim", 2)
    assert bench.scheduler.introductions[-1].body["state"] == "idle"


def test_wait_for_what_fails_on_is_reported_within_30_seconds() -> None:
    """The longest pause, a look at an agent that hangs, and a report that is answered late."""
    backoff = worker.Backoff("agent", 2.0, worker.REPORT_SECONDS)
    pauses = [backoff.failed("gone") for _ in range(20)]
    assert max(pauses) + worker.VERSION_SECONDS <= 30
    assert worker.REPORT_SECONDS + worker.ANSWER_SECONDS <= 30


def test_wait_for_an_agent_that_cannot_be_started_is_reported(bench: Bench) -> None:
    bench.write_agent("exit 127")
    bench.scheduler.put_job()
    bench.start()
    bench.scheduler.wait_for("release")
    told = bench.scheduler.wait_for("introduce")
    assert "no_agent" in [call.body["state"] for call in told]


@pytest.mark.parametrize(
    ("version", "mode", "says"),
    [
        ("3.98.2", 0o755, "before 3.99.0 are unreliable"),
        ("3.137.0", 0o644, "Permission denied"),
        ("3.137.0; kill -11 $$", 0o755, "exited with -11"),
        ("nonsense", 0o755, "and printed"),
    ],
)
def test_claim_with_unusable_agent_waits_until_it_is_replaced(bench: Bench, version: str, mode: int, says: str) -> None:
    bench.write_agent("exit 0")
    text = bench.agent_path.read_text()
    bench.agent_path.write_text(
        text.replace('version 3.137.0+fake"', f'version {version}"').replace('; kill -11 $$"', '"; kill -11 $$')
    )
    bench.agent_path.chmod(mode)
    one = bench.start()
    one.wait_for_line(f"retrying what=agent .*{says}")
    assert bench.scheduler.verbs() == []
    bench.write_agent("exit 0")
    bench.scheduler.wait_for("claim")


NEW_YEAR = 1_798_761_600.0  # 2027-01-01


@pytest.mark.parametrize(
    ("version", "until"),
    [
        ("3.99.0", "2027-01-01"),
        ("3.115.4+10.abc", "2027-01-01"),
        ("3.116.0", "2027-01-29"),
        ("3.120.1", "2027-02-16"),  # as the line before it that is known
        ("3.138.3", "2027-09-03"),
        ("4.0.9", "2027-09-01"),
        ("4.13.0", ""),
        ("5.0.0", ""),
    ],
)
def test_support_of_an_agent_ends_a_year_after_its_lines_release_but_not_before_2027(version: str, until: str) -> None:
    assert worker.supported_until(version) == until


def test_outdated_agent_is_said_from_sixty_days_before_the_end_of_its_support() -> None:
    day = 86400.0
    assert worker.support_warning("3.116.0", NEW_YEAR - 33 * day) == ""
    assert "supports this version only until 2027-01-29" in worker.support_warning("3.116.0", NEW_YEAR - 32 * day)
    assert "supports this version only until 2027-01-29" in worker.support_warning("3.116.0", NEW_YEAR + 27 * day)
    assert "has not supported this version since 2027-01-29" in worker.support_warning("3.116.0", NEW_YEAR + 28 * day)
    assert worker.support_warning("4.13.0", NEW_YEAR + 3650 * day) == ""


@pytest.mark.parametrize(("version", "is_warned"), [("3.100.0", True), ("999.0.0", False)])
def test_start_and_check_warn_of_an_agent_out_of_support(bench: Bench, version: str, is_warned: bool) -> None:
    bench.write_agent("exit 0", version)
    one = bench.start()
    one.wait_for_line(f"info    agent .*version={version}")
    if is_warned:
        one.wait_for_line("warning outdated")
    bench.scheduler.wait_for("claim")
    checked = bench.run("--check")
    assert checked.returncode == 0
    assert ["warning outdated" in log for log in (one.log, checked.stderr)] == [is_warned] * 2


def test_introduce_after_the_first_claim_tells_the_agent_once_and_again_when_it_has_changed(bench: Bench) -> None:
    bench.write_agent("exit 0", "3.137.0+7.abc")
    bench.scheduler.put("claim", Answer(204), Answer(204))
    bench.start()
    (told,) = bench.scheduler.wait_for("introduce")
    assert (told.path, told.body) == (
        "/workers/host-1",
        {"version": worker.VERSION, "agent": "3.137.0+7.abc", "agent_supported_until": "2027-08-11"}
        | {"state": "idle", "reason": "", "query": "queue=default"},
    )
    assert told.headers["X-Worker-Session"] == bench.scheduler.calls[0].headers["X-Worker-Session"]
    bench.scheduler.wait_for("claim", 3)
    assert bench.scheduler.calls[0].at < told.at and len(bench.scheduler.introductions) == 1
    bench.write_agent("exit 0", "999.0.0")
    bench.scheduler.put_job()
    bench.scheduler.wait_for("complete")
    bench.scheduler.put("claim", Answer(204))
    again = bench.scheduler.wait_for("introduce", 2)[1].body
    assert (again["agent"], again["agent_supported_until"]) == ("999.0.0", "")


@pytest.mark.parametrize(("answer", "times"), [(refusal(404, "not_found"), 1), (refusal(503, "store_unavailable"), 2)])
def test_introduce_to_who_refuses_is_left_and_to_who_cannot_now_is_repeated(
    bench: Bench, answer: Answer, times: int
) -> None:
    bench.scheduler.put("introduce", answer)
    bench.scheduler.put("claim", *[Answer(204)] * 3)
    one = bench.start()
    bench.scheduler.wait_for("claim", 4)
    assert len(bench.scheduler.introductions) == times
    assert "warning" not in one.log.replace("warning unconfined", "")


def test_ask_an_agent_that_hangs_for_its_version_ends_all_that_it_started(bench: Bench) -> None:
    bench.agent_path.write_text(
        f"#!/bin/sh\ncd {bench.directory}\nsleep 1000 &\necho $! >pid.new; mv pid.new pid\nwait\n"
    )
    one = bench.start({"VERSION_SECONDS": 5.0}, WORKER_POLL_INTERVAL="30s")
    hangs = bench.agent_pid()
    one.wait_for_line("retrying what=agent .*timed out after 5.0 seconds")
    deadline = time.monotonic() + PATIENCE
    while worker.start_time(hangs):
        assert time.monotonic() < deadline, f"{hangs} still runs"
        time.sleep(0.005)


def test_start_of_agent_that_vanished_releases_with_the_reason(bench: Bench) -> None:
    one = bench.start()
    bench.scheduler.wait_for("claim")
    hidden = bench.agent_path.rename(bench.directory / "hidden")
    bench.scheduler.put_job()
    release = bench.scheduler.wait_for("release")[0]
    assert release.body["claim"] == "claim-1" and release.body["code"] == "unfit"
    assert release.body["reason"] == f"the host is unfit: {bench.agent_path} does not exist or is not executable"
    one.wait_for_line("retrying what=agent")
    assert bench.scheduler.verbs() == ["claim", "release"]
    hidden.rename(bench.agent_path)
    bench.scheduler.wait_for("claim", 2)


# --- A scheduler in trouble ---


def test_claim_while_scheduler_is_down_retries_with_growing_pauses(bench: Bench) -> None:
    bench.scheduler.close()
    one = bench.start({"REPEATS_PER_LINE": 1}, WORKER_POLL_INTERVAL="60ms")
    first = one.wait_for_line("warning retrying what=claim .*refused.* times=1 pause_s=0.[01]$")
    later = one.wait_for_line("retrying .*times=5 pause_s=")
    assert float(later.rpartition("=")[2]) >= 0.6 > float(first.rpartition("=")[2])
    bench.scheduler.open()
    bench.scheduler.wait_for("claim")
    bench.scheduler.put("claim", Answer(204))
    one.wait_for_line("recovered what=claim")


def test_pause_grows_from_the_first_to_thirty_seconds_with_jitter() -> None:
    backoff = worker.Backoff("claim", 2.0)
    pauses = [backoff.failed("down") for _ in range(12)]
    for expected, pause in zip([2, 4, 8, 16, 30, 30], pauses, strict=False):
        assert 0.7 * expected <= pause <= expected
    assert max(pauses) <= worker.LONGEST_PAUSE and len(set(pauses)) == 12
    backoff.succeeded()
    assert backoff.failed("down") <= 2
    assert backoff.failed("busy", at_least=20) >= 20
    assert backoff.failed("busy", at_least=86400) <= worker.LONGEST_PAUSE


def test_trouble_that_repeats_is_logged_on_change_and_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    backoff = worker.Backoff("claim", 0.1)
    with caplog.at_level(logging.INFO):
        for text in ["down"] * 20 + ["busy"]:
            backoff.failed(text)
    told = [re.sub(r" pause_s=.*", "", record.getMessage()) for record in caplog.records]
    assert told == [
        "retrying what=claim problem=down times=1",
        "retrying what=claim problem=down times=10",
        "retrying what=claim problem=down times=20",
        "retrying what=claim problem=busy times=21",
    ]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (refusal(401, "unauthorized"), "error   retrying what=claim problem=.401 unauthorized"),
        (refusal(400, "bad_query"), "error   retrying what=claim problem=.400 bad_query"),
        (refusal(503, "stopping"), "warning retrying what=claim problem=.503 stopping"),
        (Answer(200, [1]), "warning retrying what=claim problem=.*not the scheduler's JSON"),
        (Answer(200, b"[" * 100_000), "warning retrying what=claim problem=.*not the scheduler's JSON"),
        (Answer(503, headers={"Retry-After": "\u00b2"}), "warning retrying what=claim problem=.*503"),
        (Answer(200, b""), "warning retrying what=claim problem=.*not the scheduler's JSON"),
        (Answer(200, {"uuid": UUID, "queue_key": "q", "claim": "c"}), 'has no usable lease_seconds" '),
        (Answer(200, {"claim": "c", "lease_seconds": 1}), "no usable uuid and queue_key"),
        (Answer(200, {"uuid": UUID, "claim": None, "queue_key": "q"}), r"no usable claim \('None'\)"),
        (Answer(200, {"uuid": UUID, "claim": "c", "queue_key": "q", "lease_seconds": 10**400}), "lease_seconds .'1000"),
        (Answer(200, {"uuid": "../x", "claim": "c", "queue_key": "q", "lease_seconds": 1}), "no usable uuid .'../x'"),
        (Answer(200, {"uuid": "\u00e91", "claim": "c", "queue_key": "q", "lease_seconds": 1}), "no usable uuid"),
    ],
)
def test_claim_with_useless_answer_is_logged_and_repeated(bench: Bench, answer: Answer, says: str) -> None:
    bench.scheduler.put("claim", answer)
    one = bench.start({"LONGEST_PAUSE": 0.05})
    one.wait_for_line(says)
    bench.scheduler.wait_for("claim", 2)
    assert set(bench.scheduler.verbs()) == {"claim"}
    assert "Error(" not in one.log


class Blunt:
    """A server that sends one text to whoever connects, and hangs up."""

    def __init__(self, text: bytes) -> None:
        self.server, self.text = socket.create_server(("127.0.0.1", 0)), text
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self.server.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(self.text)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer: the answer is not HTTP: SSH-2.0-OpenSSH_9.2"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, "no answer: the answer is not HTTP: got more than 100 headers"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
            "no answer: the connection ended within the answer",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "200: the answer is not the scheduler's JSON"),
        (b"", "no answer: Remote end closed connection without response"),
    ],
)
def test_ask_what_is_no_scheduler_says_so_in_words(text: bytes, says: str) -> None:
    blunt = Blunt(text)
    scheduler = worker.Scheduler(settings(WORKER_API_SERVER=blunt.url), "w", "s", lambda: "")
    with contextlib.closing(scheduler), pytest.raises(worker.SchedulerError, match=re.escape(says)):
        scheduler.ask("GET", "/health")
    blunt.close()


# What the Go demo answers: no claim, no lease, and nothing at all to complete.
WITHOUT_CLAIM = Answer(body={"uuid": UUID, "queue_key": "default", "agent_query_rules": ["queue=default"]})


@pytest.mark.parametrize("answer", [Answer(body=b""), Answer(body=b"thanks"), Answer()], ids=repr)
def test_work_job_without_a_claim_runs_it_untouched_and_completes_with_an_empty_body(
    bench: Bench, answer: Answer
) -> None:
    bench.write_agent("await end")
    bench.scheduler.put("claim", WITHOUT_CLAIM)
    bench.scheduler.put("complete", answer)
    one = bench.start({"TICK_SECONDS": 0.01})
    bench.agent_pid()
    bench.touch("end")
    one.wait_for_line(f"completed job={UUID} exit_status=0")
    bench.scheduler.wait_for("claim", 2)
    assert bench.scheduler.verbs() == ["claim", "complete", "claim"]
    complete = bench.scheduler.calls_to("complete")[0]
    assert (complete.headers["Content-Length"], complete.headers["X-Worker-ID"]) == ("0", "host-1")


def test_complete_job_without_a_claim_is_repeated_until_it_was_heard(bench: Bench) -> None:
    bench.scheduler.put("claim", WITHOUT_CLAIM)
    bench.scheduler.put("complete", Answer(500, b"internal server error"))
    one = bench.start()
    one.wait_for_line("retrying what=complete .*500")
    bench.scheduler.wait_for("complete", 2)
    bench.scheduler.wait_for("claim", 2)


def test_release_job_without_a_claim_is_said_and_asks_nobody(bench: Bench) -> None:
    bench.scheduler.put("claim", WITHOUT_CLAIM)
    one = bench.start(WORKER_JOB_TOKENS="1")
    one.wait_for_line("error   not_released .*the job has no claim")
    one.wait_for_line("retrying what=start .*set BUILDKITE_AGENT_TOKEN")
    assert set(bench.scheduler.verbs()) == {"claim"}


def test_claim_refused_in_words_meant_for_systemd_gives_it_one_line_and_goes_on(bench: Bench) -> None:
    systemd = Systemd(str(bench.directory / "notify"))
    bench.scheduler.put("claim", Answer(503, {"error": "x", "message": "down\nMAINPID=1\r\nSTOPPING=1 \ud800"}))
    bench.start(NOTIFY_SOCKET=str(bench.directory / "notify"))
    assert systemd.wait_for("STATUS=no job").endswith("503 x: down MAINPID=1 STOPPING=1 \\ud800")
    bench.scheduler.wait_for("claim", 2)
    systemd.close()
    assert not {"MAINPID=1", "STOPPING=1"} & set(systemd.told)


def test_claim_without_any_answer_is_given_up_and_repeated(bench: Bench) -> None:
    bench.scheduler.put("claim", Answer(hang=True))
    one = bench.start({"ANSWER_SECONDS": 0.1}, WORKER_WAIT="1s")
    one.wait_for_line(r"retrying what=claim .*no answer: none within 1\.1 s")
    bench.scheduler.wait_for("claim", 2)


GATEWAY = Answer(504, b"<html>504 Gateway Time-out</html>")


def test_claim_ended_by_a_proxy_without_patience_says_so_and_waits_for_less(
    bench: Bench, second: FakeScheduler
) -> None:
    bench.scheduler.put("claim", GATEWAY, GATEWAY)
    second.put("claim", Answer(204))
    # No scheduler has failed, so none is left for the other one, and nothing pauses. The second answer comes when
    # there is nothing to shorten any more.
    one = bench.start(WORKER_POLL_INTERVAL="20ms", WORKER_API_SERVER=f"{bench.scheduler.url},{second.url}")
    one.wait_for_line("warning impatient problem=.*a proxy at 127.0.0.1:.* answered 504 after 0.0 s; .* after 30 s")
    one.wait_for_line("claims wait 1 s from now on; lower WORKER_WAIT, or raise the proxy's timeout")
    first, then = bench.scheduler.wait_for("claim", 2)[:2]
    assert [parse_qs(urlsplit(call.path).query)["wait"] for call in (first, then)] == [["30"], ["1"]]
    moved = second.wait_for("claim")[0]
    assert parse_qs(urlsplit(moved.path).query)["wait"] == ["1"]
    one.wait_for_line(
        "moved to=.* problem=.*504: the answer is not the scheduler's JSON; it may be a proxy's .Server: "
    )


def test_claim_ended_by_a_proxy_waits_for_four_fifths_of_its_patience_then() -> None:
    scheduler = worker.Scheduler(settings(), "w1", "session", str)
    assert [scheduler.shorter_wait(seconds) for seconds in (59.9, 20.0, 1.4, 0.0)] == [47, 16, 1, 1]


@pytest.mark.parametrize(
    ("answer", "wait"),
    [(GATEWAY, 0.0), (GATEWAY, 1.0), (refusal(504), 30.0), (Answer(502, b"bad"), 30.0)],
)
def test_call_refused_by_a_proxy_for_another_reason_is_no_matter_of_timeout(
    bench: Bench, answer: Answer, wait: float
) -> None:
    bench.scheduler.put("claim", answer)
    alone = dataclasses.replace(settings(), worker_api_server=(bench.scheduler.url,))
    with pytest.raises(worker.SchedulerError, match=str(answer.status)):
        worker.Scheduler(alone, "w1", "session", str).ask("GET", "/jobs", seconds=wait + worker.ANSWER_SECONDS)


def test_claim_answered_204_at_once_is_not_repeated_in_a_busy_loop(bench: Bench) -> None:
    bench.scheduler.put("claim", *[Answer(204)] * 3)
    bench.start(WORKER_POLL_INTERVAL="100ms")
    first, *_, last = bench.scheduler.wait_for("claim", 4)
    assert last.at - first.at >= 0.25


@pytest.mark.parametrize("answer", [refusal(500), refusal(401, "unauthorized"), refusal(503)])
def test_touch_refused_for_a_while_leaves_the_agent_alone_and_completes(bench: Bench, answer: Answer) -> None:
    bench.write_agent("trap 'touch signalled' TERM INT QUIT; await go; exit 0")
    bench.scheduler.put("touch", answer, answer, GO_ON)
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    bench.scheduler.wait_for("touch", 3)
    one.wait_for_line(f"recovered what=touch job={UUID}")
    bench.touch("go")
    complete = bench.scheduler.wait_for("complete")[0]
    assert complete.body["exit_status"] == 0
    assert not (bench.directory / "signalled").exists()


@pytest.fixture
def second(bench: Bench) -> Iterator[FakeScheduler]:
    """A scheduler beside the bench's, which the worker of slot w2 is with first."""
    fake = FakeScheduler()
    yield fake
    fake.close()


def start_with_both(bench: Bench, second: FakeScheduler) -> WorkerProcess:
    return bench.start(WORKER_API_SERVER=f"{bench.scheduler.url}, {second.url}", WORKER_NAME="w2")


def test_claim_at_one_of_two_schedulers_stays_with_it(bench: Bench, second: FakeScheduler) -> None:
    second.put("claim", Answer(204), Answer(204))
    start_with_both(bench, second)
    second.wait_for("claim", 3)
    assert bench.scheduler.calls == []


@pytest.mark.parametrize("failure", ["refused connection", "503", "500"])
def test_claim_at_scheduler_that_fails_moves_to_the_other_at_once_and_stays(
    bench: Bench, second: FakeScheduler, failure: str
) -> None:
    if failure == "refused connection":
        second.close()
    else:
        second.put("claim", refusal(int(failure)))
    bench.scheduler.put("claim", Answer(204), Answer(204))
    one = start_with_both(bench, second)
    bench.scheduler.wait_for("claim", 3)
    one.wait_for_line(f"moved to=127.0.0.1:{bench.scheduler.port}")
    assert "retrying" not in one.log
    assert len(second.calls) <= 1


def test_claim_refused_for_what_it_says_is_not_asked_elsewhere(bench: Bench, second: FakeScheduler) -> None:
    second.put("claim", refusal(400, "bad_query"))
    start_with_both(bench, second)
    second.wait_for("claim", 2)
    assert bench.scheduler.calls == []


def test_claim_while_all_schedulers_fail_pauses_and_tries_all_again(bench: Bench, second: FakeScheduler) -> None:
    second.put("claim", refusal(503), refusal(503))
    bench.scheduler.put("claim", refusal(503))
    one = start_with_both(bench, second)
    bench.scheduler.wait_for("claim", 2)
    one.wait_for_line("retrying what=claim")


def test_touch_and_complete_of_a_job_go_to_the_other_scheduler_when_its_own_has_gone(
    bench: Bench, second: FakeScheduler
) -> None:
    bench.write_agent("await end")
    second.put_job(lease_seconds=0.3)
    one = start_with_both(bench, second)
    second.wait_for("claim")
    one.wait_for_line("claimed")
    second.close()
    touch = bench.scheduler.wait_for("touch")[0]
    bench.touch("end")
    complete = bench.scheduler.wait_for("complete")[0]
    assert touch.body["claim"] == complete.body["claim"]


def test_touch_that_hangs_delays_neither_output_nor_exit(bench: Bench) -> None:
    bench.write_agent("await go; echo going; exit 0")
    bench.scheduler.put("touch", Answer(hang=True))
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    bench.scheduler.wait_for("touch")
    bench.touch("go")
    one.wait_for_line("text=going")
    bench.scheduler.wait_for("complete")
    assert bench.scheduler.verbs()[:3] == ["claim", "touch", "complete"]


def test_touch_while_agent_runs_renews_each_third_of_the_lease(bench: Bench) -> None:
    bench.write_agent("await go; exit 0")
    bench.scheduler.put("touch", *[GO_ON] * 5)
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    touches = bench.scheduler.wait_for("touch", 5)
    bench.touch("go")
    bench.scheduler.wait_for("complete")
    assert touches[0].path == f"/jobs/{UUID}/touch" and touches[0].body == {"claim": "claim-1"}
    assert 0.3 <= touches[4].at - touches[0].at < 10
    assert len({touch.client for touch in touches}) == 1
    one.wait_for_line(f"debug   touched job={UUID} state=running stop=False")


@pytest.mark.parametrize(("status", "code"), [(409, "stale_claim"), (404, "unknown_job")])
def test_touch_of_lost_claim_waits_for_the_agent_and_completes_nothing(bench: Bench, status: int, code: str) -> None:
    bench.write_agent("trap 'touch signalled' TERM INT QUIT; await go; exit 0")
    bench.scheduler.put("touch", refusal(status, code))
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    one.wait_for_line(f"lost job={UUID} problem=.{status} {code}")
    assert bench.scheduler.verbs() == ["claim", "touch"]
    bench.touch("go")
    bench.scheduler.wait_for("claim", 2)
    assert bench.scheduler.verbs() == ["claim", "touch", "claim"]
    assert not (bench.directory / "signalled").exists()


def test_touch_under_a_taken_name_leaves_the_agent_alone_and_pauses(bench: Bench) -> None:
    bench.write_agent("trap 'touch signalled' TERM INT QUIT; await go; exit 0")
    bench.scheduler.put("touch", refusal(409, "worker_name_taken"))
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start({"NAME_TAKEN_SECONDS": 0.5})
    one.wait_for_line(f"lost job={UUID}")
    bench.touch("go")
    one.wait_for_line("error   name_taken worker=host-1")
    again = bench.scheduler.wait_for("claim", 2)[1]
    assert again.at - bench.scheduler.calls_to("touch")[0].at >= 0.5
    assert bench.scheduler.verbs() == ["claim", "touch", "claim"]
    assert not (bench.directory / "signalled").exists()


def test_claim_under_a_taken_name_pauses_and_still_stops_at_once(bench: Bench) -> None:
    bench.scheduler.put("claim", refusal(409, "worker_name_taken"))
    one = bench.start()
    one.wait_for_line("name_taken .*pause_s=300")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert bench.scheduler.verbs() == ["claim"]


def test_reload_under_a_taken_name_does_not_cut_its_pause_short(bench: Bench) -> None:
    bench.scheduler.put("claim", refusal(409, "worker_name_taken"))
    one = bench.start({"NAME_TAKEN_SECONDS": 1.0})
    one.wait_for_line("name_taken .*pause_s=1")
    one.send(signal.SIGHUP)
    one.wait_for_line("reloaded log_level=debug")
    first, second = bench.scheduler.wait_for("claim", 2)
    assert second.at - first.at >= 1.0


# --- A scheduler that answers a little at a time, or a name server that never does ---


class Trickle:
    """A server that answers each request with these bytes, then with one more of them again and again."""

    def __init__(self, start: bytes, then: bytes, pause: float = 0.05) -> None:
        self.start, self.then, self.pause = start, then, pause
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        #: Set once an answer has begun; until `goes_on` is set, no more than its start comes.
        self.has_begun, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()
        self.requests: list[bytes] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=[self.server.accept()[0]], daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                self.requests.append(data)
                connection.sendall(self.start)
                self.has_begun.set()
                self.goes_on.wait(PATIENCE)
                for byte in self.then:
                    connection.sendall(bytes([byte]))
                    time.sleep(self.pause)

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


@pytest.fixture
def trickle(request: pytest.FixtureRequest) -> Iterator[Trickle]:
    made = Trickle(*request.param)
    yield made
    made.close()


ENDLESS = b"a" * 10_000
IN_HEAD = (b"HTTP/1.1 200 OK\r\nX: ", ENDLESS)
IN_BODY = (b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", ENDLESS)
#: What a TLS record begins with; it is 16 KiB long.
IN_HANDSHAKE = (b"\x16\x03\x03\x40\x00", ENDLESS)


def scheduler_at(url: str) -> worker.Scheduler:
    return worker.Scheduler(settings(WORKER_API_SERVER=url), "w1", "session", str)


@pytest.mark.parametrize("trickle", [IN_HEAD, IN_BODY], indirect=True, ids=["head", "body"])
def test_ask_a_scheduler_that_answers_byte_by_byte_ends_in_time(trickle: Trickle) -> None:
    began_at = time.monotonic()
    with pytest.raises(worker.SchedulerError, match=r"GET /stats: no answer: none within 0\.5 s"):
        scheduler_at(trickle.url).ask("GET", "/stats", seconds=0.5)
    assert 0.4 < time.monotonic() - began_at < 20  # the whole answer would take 500 s


@pytest.mark.parametrize("trickle", [IN_HANDSHAKE], indirect=True)
def test_ask_a_scheduler_whose_handshake_comes_byte_by_byte_ends_in_time(
    trickle: Trickle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CONNECTED_SECONDS", 0.5)
    began_at = time.monotonic()
    with pytest.raises(worker.SchedulerError, match=r"no connection within 0\.5 s"):
        scheduler_at(trickle.url.replace("http:", "https:")).ask("GET", "/stats")
    assert time.monotonic() - began_at < 20


def test_ask_while_the_name_server_hangs_ends_in_time_and_leaves_no_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CONNECTED_SECONDS", 0.3)
    answers, looked_up, closed = threading.Event(), socket.getaddrinfo, threading.Event()

    def look_up(_: str, *arguments: Any, **more: Any) -> Any:
        assert answers.wait(PATIENCE)
        return looked_up("127.0.0.1", *arguments, **more)

    class Noted(socket.socket):
        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(worker.SchedulerError, match=r"no connection within 0\.3 s"):
        scheduler_at(bench.scheduler.url.replace("127.0.0.1", "scheduler.example")).ask("GET", "/health")
    monkeypatch.setattr(socket, "socket", Noted)
    answers.set()  # too late: nobody waits for it
    assert closed.wait(PATIENCE)


@pytest.mark.parametrize("has_begun", [False, True])
def test_wait_for_an_answer_whose_byte_comes_together_with_a_stop_hears_the_stop(has_begun: bool) -> None:
    """With each byte that comes the call would wait for its whole time again."""

    class Both:
        stops = 0

        def wait(self, files: list[object], seconds: float) -> list[object]:
            self.stops = 1
            return files

    deadline = worker.CallDeadline(30.0, Both(), stops=1)  # type: ignore[arg-type]
    deadline.has_begun = has_begun
    deadline.wait(object())
    assert deadline.left() <= worker.REST_SECONDS


@pytest.mark.parametrize("trickle", [IN_HEAD, IN_BODY], indirect=True, ids=["head", "body"])
def test_stop_while_a_claim_is_answered_byte_by_byte_is_heard(bench: Bench, trickle: Trickle) -> None:
    one = bench.start(WORKER_API_SERVER=trickle.url)
    assert trickle.has_begun.wait(PATIENCE)
    one.send(signal.SIGTERM)
    sent_at = time.monotonic()
    one.wait_for_line("stopping")
    assert one.exit_status() == 0
    assert time.monotonic() - sent_at < worker.REST_SECONDS + 10


def test_stop_while_the_name_server_hangs_is_heard_at_once(bench: Bench) -> None:
    server = bench.scheduler.url.replace("127.0.0.1", "scheduler.example")
    one = bench.start({"socket.getaddrinfo": "lambda *_, **__: worker.time.sleep(60)"}, WORKER_API_SERVER=server)
    one.wait_for_line(" started ")
    one.send(signal.SIGTERM)
    sent_at = time.monotonic()
    assert one.exit_status() == 0
    assert time.monotonic() - sent_at < 10


JOB = json.dumps({"uuid": UUID, "queue_key": "default", "claim": "claim-1", "lease_seconds": 30}).encode()


@pytest.mark.parametrize(
    "trickle", [(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{" % len(JOB), JOB[1:], 0.0)], indirect=True
)
def test_stop_in_the_middle_of_an_answer_with_a_job_releases_it(bench: Bench, trickle: Trickle) -> None:
    trickle.goes_on.clear()
    one = bench.start(WORKER_API_SERVER=trickle.url)
    assert trickle.has_begun.wait(PATIENCE)
    one.send(signal.SIGTERM)
    one.wait_for_line("stopping")
    trickle.goes_on.set()
    one.wait_for_line("claimed")
    assert one.exit_status() == 0
    assert any(request.startswith(f"POST /jobs/{UUID}/release ".encode()) for request in trickle.requests)


def test_stop_while_complete_hangs_is_heard_and_the_second_gives_up(bench: Bench) -> None:
    bench.scheduler.put("complete", Answer(hang=True))
    bench.scheduler.put_job()
    one = bench.start()
    bench.scheduler.wait_for("complete")
    one.send(signal.SIGTERM)
    one.wait_for_line("stopping signal=SIGTERM")
    one.send(signal.SIGTERM)
    one.wait_for_line(f"not_completed job={UUID} problem=.*the worker must stop now")
    assert one.exit_status() == 0


# --- Stop from the scheduler ---


def test_touch_saying_stop_terminates_and_releases(bench: Bench) -> None:
    bench.write_agent("trap 'touch terminated; exit 0' TERM; touch ready; await never")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    bench.file("ready")
    bench.scheduler.put("touch", *[STOP] * 2)
    release = bench.scheduler.wait_for("release")[0]
    bench.file("terminated")
    assert "did not acquire" in release.body["reason"]
    assert "SIGKILL" not in one.log and "complete" not in bench.scheduler.verbs()


def test_touch_saying_stop_to_an_agent_that_stays_kills_it_and_releases(bench: Bench) -> None:
    bench.write_agent("trap 'touch terminated' TERM; touch ready; await never")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start({"STOP_SECONDS": 0.5})
    bench.file("ready")
    bench.scheduler.put("touch", *[STOP] * 100)
    bench.scheduler.wait_for("release")
    bench.file("terminated")
    one.wait_for_line("signalled .*signal=SIGKILL")
    one.wait_for_line(f"exited job={UUID} .*exit_status=137")


def test_touch_no_longer_saying_stop_spares_the_agent_and_completes(bench: Bench) -> None:
    bench.write_agent("trap 'touch terminated' TERM; touch ready; await go; exit 0")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start({"STOP_SECONDS": 0.2})
    bench.file("ready")
    bench.scheduler.put("touch", STOP, *[GO_ON] * 100)
    bench.file("terminated")
    bench.scheduler.wait_for("touch", len(bench.scheduler.calls_to("touch")) + 6)
    bench.touch("go")
    bench.scheduler.wait_for("complete")
    assert "SIGKILL" not in one.log and "release" not in bench.scheduler.verbs()


def test_touch_saying_stop_then_failing_never_kills(bench: Bench) -> None:
    bench.write_agent("trap 'touch terminated' TERM; touch ready; await go; exit 0")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start({"STOP_SECONDS": 0.2})
    bench.file("ready")
    bench.scheduler.put("touch", STOP, *[refusal(500)] * 100)
    bench.file("terminated")
    bench.scheduler.wait_for("touch", len(bench.scheduler.calls_to("touch")) + 8)
    bench.touch("go")
    bench.scheduler.wait_for("release")
    assert "SIGKILL" not in one.log


CANCEL = Answer(
    body={"state": "running", "stop": False, "cancel": True, "reason": "Stopped by ann", "lease_seconds": 9}
)


def test_touch_saying_cancel_has_the_agent_cancel_its_job_once_and_completes(bench: Bench) -> None:
    bench.write_agent("trap 'echo heard >>heard' QUIT; touch ready; await go; exit 3")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start()
    bench.file("ready")
    bench.scheduler.put("touch", *[CANCEL] * 100)
    bench.file("heard")
    bench.scheduler.wait_for("touch", len(bench.scheduler.calls_to("touch")) + 3)
    bench.touch("go")
    assert bench.scheduler.wait_for("complete")[0].body["exit_status"] == 3
    one.wait_for_line("signalled .*signal=SIGQUIT .*the scheduler says cancel: Stopped by ann")
    assert ((bench.directory / "heard").read_text(), "SIGTERM" in one.log) == ("heard\n", False)


def test_touch_of_an_earlier_workers_claim_goes_on_at_once_and_hears_cancel(bench: Bench) -> None:
    bench.write_agent("trap 'touch heard; exit 0' QUIT; touch ready; await never")
    bench.scheduler.put_job(lease_seconds=600)
    one = bench.start()
    bench.file("ready")
    claim = json.loads((bench.state / "host-1.agent").read_text())["claim"]
    one.process.kill()
    one.exit_status()
    bench.scheduler.put("touch", CANCEL)
    two = bench.start()
    (touched,) = bench.scheduler.wait_for("touch")
    assert touched.body == {"claim": claim}
    bench.file("heard")
    two.wait_for_line(f"gone job={UUID}")


def test_read_the_record_of_an_older_worker_waits_for_its_agent_without_a_claim(tmp_path: Path) -> None:
    slot = worker.Slot(str(tmp_path), "w1")
    told = {"pid": os.getpid(), "started": worker.start_time(os.getpid()), "job": UUID}
    (tmp_path / "w1.agent").write_text(json.dumps(told))
    agent = slot.recorded()
    assert agent and (agent.pid, agent.job.uuid, agent.job.claim) == (os.getpid(), UUID, "")
    slot.record(agent)
    assert (tmp_path / "w1.agent").stat().st_mode & 0o777 == 0o600
    os.close(slot.lock)


def test_cancel_grace_reaches_the_agents_of_both_versions() -> None:
    given = {"PATH": "/bin", "BUILDKITE_SIGNAL_GRACE_PERIOD_SECONDS": "60", "BUILDKITE_CANCEL_GRACE_PERIOD": "70"}
    kept = worker.agent_environment(settings(WORKER_STATE="/s"), given, AGENT_TOKEN)
    assert given.items() <= kept.items()
    made = worker.agent_environment(settings(WORKER_STATE="/s", WORKER_CANCEL_GRACE="1m"), given, AGENT_TOKEN)
    assert (made["BUILDKITE_CANCEL_GRACE_PERIOD"], made["BUILDKITE_CANCEL_SIGNAL_TIMEOUT"]) == ("60", "60s")
    assert "BUILDKITE_SIGNAL_GRACE_PERIOD_SECONDS" not in made


# --- Complete ---


def test_complete_with_scheduler_down_is_repeated_until_it_is_back(bench: Bench) -> None:
    bench.write_agent("await go; exit 4")
    bench.scheduler.put_job()
    one = bench.start({"LONGEST_PAUSE": 0.05})
    bench.agent_pid()
    bench.scheduler.close()
    bench.touch("go")
    one.wait_for_line(f"retrying what=complete job={UUID} .*times=1 ")
    bench.scheduler.put("complete", refusal(500), refusal(401, "unauthorized"), Answer())
    bench.scheduler.open()
    assert bench.scheduler.wait_for("complete", 3)[2].body["exit_status"] == 4
    one.wait_for_line(f"completed job={UUID} exit_status=4")
    bench.scheduler.wait_for("claim", 2)


def test_stop_once_while_complete_is_repeated_goes_on_until_answered(bench: Bench) -> None:
    bench.scheduler.put("complete", *[refusal(500)] * 3)
    bench.scheduler.put_job()
    one = bench.start()
    bench.scheduler.wait_for("complete")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert bench.scheduler.verbs() == ["claim"] + ["complete"] * 4


def test_stop_once_while_scheduler_stays_gone_gives_up_after_the_last_tries(bench: Bench) -> None:
    bench.scheduler.put("complete", *[refusal(500)] * 1000)
    bench.scheduler.put_job()
    one = bench.start({"LAST_TRIES_SECONDS": 0.2})
    bench.scheduler.wait_for("complete")
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    one.wait_for_line(f"not_completed job={UUID}")


def test_stop_twice_while_complete_is_repeated_gives_up(bench: Bench) -> None:
    bench.scheduler.put("complete", *[refusal(500)] * 1000)
    bench.scheduler.put_job()
    one = bench.start()
    bench.scheduler.wait_for("complete")
    one.send(signal.SIGQUIT)
    assert one.exit_status() == 0
    one.wait_for_line(f"not_completed job={UUID}")


@pytest.mark.parametrize(
    "answer", [refusal(409, "stale_claim"), refusal(404, "unknown_job"), refusal(400, "bad_request")]
)
def test_complete_refused_for_good_is_not_repeated(bench: Bench, answer: Answer) -> None:
    bench.scheduler.put("complete", answer)
    bench.scheduler.put_job()
    bench.start()
    bench.scheduler.wait_for("claim", 2)
    assert bench.scheduler.verbs() == ["claim", "complete", "claim"]


def test_complete_under_a_taken_name_pauses(bench: Bench) -> None:
    bench.scheduler.put("complete", refusal(409, "worker_name_taken"))
    bench.scheduler.put_job()
    one = bench.start()
    one.wait_for_line("name_taken .*pause_s=300")
    assert bench.scheduler.verbs() == ["claim", "complete"]


def test_release_with_scheduler_down_is_given_up_when_the_lease_is_over(bench: Bench) -> None:
    one = bench.start()
    bench.scheduler.wait_for("claim")
    bench.agent_path.rename(bench.directory / "hidden")
    bench.scheduler.put("release", *[refusal(500)] * 1000)
    bench.scheduler.put_job(lease_seconds=0.3)
    one.wait_for_line(f"not_released job={UUID}")
    one.wait_for_line("retrying what=agent")


def test_complete_on_a_connection_that_was_closed_goes_over_a_new_one_at_once(bench: Bench) -> None:
    bench.write_agent("await go; exit 0")
    bench.scheduler.put_job()
    one = bench.start()
    bench.agent_pid()
    bench.scheduler.close()
    bench.scheduler.open()
    bench.touch("go")
    bench.scheduler.wait_for("complete")
    assert "retrying" not in one.log


# --- A disk that is full ---


def test_record_on_full_disk_is_repeated_and_the_job_goes_on(bench: Bench) -> None:
    bench.write_agent("await go; exit 0")
    bench.state.mkdir()
    blocker = bench.state / "host-1.agent.new"
    blocker.mkdir()  # writing fails here as it does on a full disk
    bench.scheduler.put_job()
    one = bench.start({"TICK_SECONDS": 0.05})
    one.wait_for_line("retrying what=record")
    blocker.rmdir()
    one.wait_for_line("recovered what=record")
    assert json.loads((bench.state / "host-1.agent").read_text())["pid"] == bench.agent_pid()
    bench.touch("go")
    bench.scheduler.wait_for("complete")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_log_on_full_disk_is_lost_and_the_worker_lives(bench: Bench) -> None:
    bench.scheduler.put_job()
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(bench.command({}), env=bench.environment(), stderr=full, cwd=bench.directory)
    bench.scheduler.wait_for("complete")
    bench.scheduler.wait_for("claim", 2)
    assert process.poll() is None
    process.terminate()
    process.wait(PATIENCE)


# --- TLS ---


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return context


def test_stop_while_claim_is_parked_over_tls_exits_at_once(bench: Bench, tls: ssl.SSLContext) -> None:
    # TLS 1.3 sends session tickets ahead of the answer: readable, and yet nothing to read.
    secure = FakeScheduler(tls=tls)
    one = bench.start(WORKER_API_SERVER=secure.url, SSL_CERT_FILE=str(bench.directory / "cert.pem"))
    secure.put_job()
    secure.wait_for("complete")
    secure.wait_for("claim", 2)
    one.send(signal.SIGTERM)
    sent_at = time.monotonic()
    assert one.exit_status() == 0
    assert time.monotonic() - sent_at < 10
    secure.close()


def test_claim_over_tls_with_unknown_certificate_is_refused(bench: Bench, tls: ssl.SSLContext) -> None:
    secure = FakeScheduler(tls=tls)
    one = bench.start(WORKER_API_SERVER=secure.url)
    one.wait_for_line("retrying what=claim .*CERTIFICATE_VERIFY_FAILED.*; set WORKER_CA_FILE")
    assert secure.verbs() == []
    secure.close()


# --- Tokens ---

JOB_TOKEN = "bkjat_that-nobody-may-see"


@pytest.mark.parametrize("cluster_token", [{"BUILDKITE_AGENT_TOKEN": ""}, {"WORKER_JOB_TOKENS": "1"}], ids=str)
def test_claim_for_job_tokens_gives_the_jobs_own_to_its_agent_alone(
    bench: Bench, cluster_token: dict[str, str]
) -> None:
    bench.write_agent("echo token is $BUILDKITE_AGENT_TOKEN.")
    bench.scheduler.put_job(token=JOB_TOKEN)
    one = bench.start({}, **cluster_token)
    complete = bench.scheduler.wait_for("complete")[0]
    assert parse_qs(urlsplit(bench.scheduler.calls_to("claim")[0].path).query)["token"] == ["1"]
    environ = bench.file("environment").splitlines()
    assert [line for line in environ if "TOKEN" in line] == [f"BUILDKITE_AGENT_TOKEN={JOB_TOKEN}"]
    one.wait_for_line(r'output .*"token is \[REDACTED\]\."')
    assert JOB_TOKEN not in json.dumps(complete.body)
    assert not [line for line in one.lines if JOB_TOKEN in line or AGENT_TOKEN in line]


def test_claim_with_the_clusters_token_asks_for_no_other(bench: Bench) -> None:
    bench.scheduler.put_job()
    bench.start()
    bench.scheduler.wait_for("complete")
    assert "token" not in bench.scheduler.calls_to("claim")[0].path
    assert f"BUILDKITE_AGENT_TOKEN={AGENT_TOKEN}" in bench.file("environment").splitlines()


def test_claim_for_job_tokens_without_one_in_the_answer_is_released(bench: Bench) -> None:
    bench.scheduler.put_job()
    one = bench.start(WORKER_JOB_TOKENS="1")
    assert "the scheduler sent no job token" in bench.scheduler.wait_for("release")[0].body["reason"]
    one.wait_for_line("error   retrying what=start .*sent no job token")
    assert not (bench.directory / "pid").exists()


@pytest.mark.parametrize("token", [7, None, "two words", "new\nline", ["bkjat_x"]], ids=repr)
def test_claim_answered_with_unusable_token_is_no_job_and_is_not_shown(bench: Bench, token: Any) -> None:
    bench.scheduler.put_job(token=token)
    one = bench.start(BUILDKITE_AGENT_TOKEN="")
    line = one.wait_for_line("retrying what=claim")
    assert "job" in line and "words" not in line and "bkjat" not in line
    assert not (bench.directory / "pid").exists()


def test_claim_refused_for_its_token_is_repeated_slowly_and_says_what_to_do(bench: Bench) -> None:
    bench.scheduler.put("claim", *[refusal(401, "unauthorized")] * 2)
    one = bench.start()
    one.wait_for_line(r"error   retrying what=claim .*set STACK_API_TOKEN of this worker.* pause_s=30\.0")
    assert bench.scheduler.verbs() == ["claim"]


def test_touch_refused_for_its_token_leaves_the_agent_alone(bench: Bench) -> None:
    bench.write_agent("await go; exit 0")
    bench.scheduler.put_job(lease_seconds=0.3)
    bench.scheduler.put("touch", *[refusal(401, "unauthorized")] * 3)
    one = bench.start()
    bench.scheduler.wait_for("touch", 4)
    one.wait_for_line("recovered what=touch")
    bench.touch("go")
    assert bench.scheduler.wait_for("complete")[0].body["exit_status"] == 0
    assert not [line for line in one.lines if "signalled" in line]


def test_claim_after_the_tokens_file_was_replaced_presents_the_new_one(bench: Bench) -> None:
    (bench.directory / "token").write_text("old-token\n")
    bench.scheduler.put("claim", refusal(401, "unauthorized"))
    one = bench.start({"LONGEST_PAUSE": 1.0}, STACK_API_TOKEN="", STACK_API_TOKEN_FILE=str(bench.directory / "token"))
    one.wait_for_line("retrying what=claim")
    (bench.directory / "token").write_text("new-token\nold-token\n")
    first, second = bench.scheduler.wait_for("claim", 2)[:2]
    assert (first.headers["Authorization"], second.headers["Authorization"]) == ("Bearer old-token", "Bearer new-token")


def test_claim_after_the_tokens_file_that_dotenv_names_was_replaced_presents_the_new_one(bench: Bench) -> None:
    (bench.directory / ".env").write_text("STACK_API_TOKEN_FILE=token\n")
    (bench.directory / "token").write_text("old-token\n")
    bench.scheduler.put("claim", Answer(204, before=lambda: replace_file(bench.directory / "token", "new-token\n")))
    bench.start(STACK_API_TOKEN="")
    first, second = bench.scheduler.wait_for("claim", 2)[:2]
    assert (first.headers["Authorization"], second.headers["Authorization"]) == ("Bearer old-token", "Bearer new-token")


def replace_file(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def test_touch_after_a_reload_presents_the_new_token_also_when_its_file_has_gone(bench: Bench) -> None:
    (bench.directory / "token").write_text("old-token\n")
    bench.write_agent("touch ready; await go")
    bench.scheduler.put_job(lease_seconds=0.3)
    one = bench.start(STACK_API_TOKEN="", STACK_API_TOKEN_FILE=str(bench.directory / "token"))
    bench.file("ready")
    replace_file(bench.directory / "token", "new-token\n")
    one.send(signal.SIGHUP)
    one.wait_for_line("reloaded")
    (bench.directory / "token").unlink()
    touch = bench.scheduler.wait_for("touch", len(bench.scheduler.calls_to("touch")) + 2)[-1]
    bench.touch("go")
    complete = bench.scheduler.wait_for("complete")[0]
    assert [call.headers["Authorization"] for call in (touch, complete)] == ["Bearer new-token"] * 2


def test_reload_with_emptied_token_presents_the_old_one(bench: Bench) -> None:
    (bench.directory / "token").write_text("old-token\n")
    one = bench.start(STACK_API_TOKEN="", STACK_API_TOKEN_FILE=str(bench.directory / "token"))
    bench.scheduler.wait_for("claim")
    replace_file(bench.directory / "token", "\n")
    one.send(signal.SIGHUP)
    one.wait_for_line("error   unreloaded problem=.STACK_API_TOKEN: is empty now")
    bench.scheduler.put("claim", Answer(204))
    assert bench.scheduler.wait_for("claim", 2)[1].headers["Authorization"] == "Bearer old-token"


@pytest.mark.parametrize("text", ["first,second", "first\nsecond\n", " first , second", "\nfirst\n"], ids=ascii)
def test_settings_with_several_api_tokens_present_the_first(text: str) -> None:
    assert settings(STACK_API_TOKEN=text).stack_api_token == "first"


# --- Settings and the command line ---


def test_start_with_wrong_settings_names_all_of_them_and_exits_78(bench: Bench) -> None:
    done = bench.run(
        BUILDKITE_AGENT_TOKEN="three other words",
        STACK_API_TOKEN="two words",
        WORKER_JOB_TOKENS="yes",
        WORKER_API_SERVER="scheduler:18888",
        WORKER_AGENT_QUERY_RULES="queue=a,queue=b",
        WORKER_POLL_INTERVAL="2",
        WORKER_WAIT="2m",
        WORKER_NAME="a/b",
        LOG_LEVEL="loud",
    )
    assert done.returncode == worker.EXIT_SETTINGS
    for name in (
        *("BUILDKITE_AGENT_TOKEN", "STACK_API_TOKEN", "WORKER_API_SERVER", "WORKER_AGENT_QUERY_RULES"),
        *("WORKER_POLL_INTERVAL", "WORKER_WAIT", "WORKER_NAME", "LOG_LEVEL", "WORKER_JOB_TOKENS"),
    ):
        assert re.search(rf"^{name}: ", done.stderr, re.MULTILINE), name
    assert "words" not in done.stderr


@pytest.mark.parametrize("name", ["../x", "a b", "%hostname", "x" * 101, ".hidden", "é"])
def test_settings_with_unusable_name_are_refused(name: str) -> None:
    with pytest.raises(worker.SettingsError, match="WORKER_NAME"):
        settings(WORKER_NAME=name)


BAD_URLS = ["http://user:secret@host", "ftp://host", "host:1", "http://", "http://h:x"]
#: What connecting, or the request, would fail with is neither OSError nor HTTPException.
BAD_NAMES = [
    "http://scheduler..lan:1",
    "http://.lan",
    f"http://{'x' * 64}.lan",
    "http://sched\u00fcler",
    "http://h/\u00fc",
]


@pytest.mark.parametrize("url", BAD_URLS + BAD_NAMES, ids=ascii)
def test_settings_with_unusable_server_are_refused_without_showing_it(url: str) -> None:
    with pytest.raises(worker.SettingsError, match="WORKER_API_SERVER") as refused:
        settings(WORKER_API_SERVER=url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://h", "https://scheduler.lan.:1/base/", "http://[::1]:18888", "http://10.0.0.1"])
def test_settings_with_usable_server_take_it_without_its_last_slash(url: str) -> None:
    assert settings(WORKER_API_SERVER=url).worker_api_server == (url.rstrip("/"),)


@pytest.mark.parametrize("url", BAD_NAMES, ids=ascii)
def test_ask_a_scheduler_of_impossible_name_is_an_error_like_any_other(url: str) -> None:
    alone = dataclasses.replace(settings(), worker_api_server=(url,))
    with pytest.raises(worker.SchedulerError, match="no answer"):
        worker.Scheduler(alone, "w1", "session", str).ask("GET", "/health")


@pytest.mark.parametrize(
    ("queue", "rules", "query"),
    [
        ("", "", "queue=default"),
        ("", "arch=arm64", "queue=default,arch=arm64"),
        ("", "arch=arm64,queue=a,arch=arm64", "queue=a,arch=arm64"),
        ("b", "queue=a,arch=arm64", "queue=b,arch=arm64"),
        ("_default", "", "queue=_default"),
    ],
)
def test_query_takes_the_queue_of_its_setting_then_of_the_rules(queue: str, rules: str, query: str) -> None:
    assert settings(WORKER_QUEUE=queue, WORKER_AGENT_QUERY_RULES=rules).query == query


@pytest.mark.parametrize(
    ("environ", "ignored"),
    [
        ({"WORKER_QUEUE": "b", "WORKER_AGENT_QUERY_RULES": "queue=a"}, ["queue=a"]),
        ({"WORKER_QUEUE": "b", "WORKER_AGENT_QUERY_RULES": "queue=b"}, []),
        ({"WORKER_QUEUE": "b"}, []),
        ({"WORKER_TAGS": "queue=a"}, ["queue=a"]),
    ],
)
def test_ignored_queue_is_named_only_where_somebody_wrote_it(environ: dict[str, str], ignored: list[str]) -> None:
    assert worker.ignored_queues(settings(**environ), environ) == ignored
    assert settings(**environ).agent_tags == ""


def test_start_with_ignored_queue_warns_once_and_shows_its_settings(bench: Bench) -> None:
    one = bench.start(WORKER_QUEUE="b", WORKER_AGENT_QUERY_RULES="queue=a")
    bench.scheduler.wait_for("claim")
    one.wait_for_line('warning ignored tag="queue=a"')
    up = one.wait_for_line("info    started version=")
    for field in dataclasses.fields(worker.Settings):
        assert (f" {field.name}=" in up) != field.metadata["secret"]


def test_start_with_token_in_a_file_reads_it(bench: Bench) -> None:
    (bench.directory / "token").write_text(f"{AGENT_TOKEN}\n")
    bench.scheduler.put_job()
    bench.start(BUILDKITE_AGENT_TOKEN="", BUILDKITE_AGENT_TOKEN_FILE=str(bench.directory / "token"))
    bench.scheduler.wait_for("complete")
    environ = bench.file("environment").splitlines()
    assert f"BUILDKITE_AGENT_TOKEN={AGENT_TOKEN}" in environ
    assert not [line for line in environ if line.startswith("BUILDKITE_AGENT_TOKEN_FILE")]


@pytest.mark.parametrize("key", ["\u00fc", "a/b", "../x", "a b"])
def test_settings_with_a_queue_that_buildkite_cannot_have_are_refused_by_its_key(key: str) -> None:
    for name, text in (("WORKER_QUEUE", key), ("WORKER_AGENT_QUERY_RULES", f"os=linux,queue={key}")):
        with pytest.raises(worker.SettingsError, match=f"^{name}: '{key}' is not a queue's key: Buildkite allows"):
            settings(**{name: text})


def test_start_with_settings_that_do_not_count_names_what_counts(bench: Bench) -> None:
    (bench.directory / "token").write_text(STACK_TOKEN)
    one = bench.start(
        STACK_API_TOKEN=f"{STACK_TOKEN}-old",
        STACK_API_TOKEN_FILE=str(bench.directory / "token"),
        BUILDKITE_AGENT_TAGS="os=linux",
        WORKER_CA_FILE="ca.crt",
        SETTINGS_FILE="none",
    )
    bench.scheduler.wait_for("claim")
    told = re.findall('warning ignored problem="(\\w+): (.*)"', one.log)
    assert [name for name, _ in told] == ["BUILDKITE_AGENT_TAGS", "STACK_API_TOKEN", "WORKER_CA_FILE", "SETTINGS_FILE"]
    assert "use WORKER_AGENT_QUERY_RULES and WORKER_TAGS" in told[0][1]


def test_start_with_plain_settings_ignores_nothing(bench: Bench) -> None:
    one = bench.start()
    bench.scheduler.wait_for("claim")
    assert "ignored" not in one.log


def test_start_with_unusable_state_directory_says_so(bench: Bench) -> None:
    (bench.directory / "file").touch()
    done = bench.run(WORKER_STATE=str(bench.directory / "file" / "state"))
    assert done.returncode == worker.EXIT_SETTINGS
    assert "WORKER_STATE" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("step", "name", "number", "status"),
    [
        ("fcntl.flock", "WORKER_STATE", errno.ENOLCK, 75),
        ("fcntl.flock", "WORKER_STATE", errno.EACCES, 78),
        ("make_builds", "BUILDKITE_BUILD_PATH", errno.ENOSPC, 75),
        ("make_builds", "BUILDKITE_BUILD_PATH", errno.ENFILE, 75),
        ("make_builds", "BUILDKITE_BUILD_PATH", errno.EAGAIN, 75),
        ("make_builds", "BUILDKITE_BUILD_PATH", errno.ESTALE, 75),
        ("make_builds", "BUILDKITE_BUILD_PATH", errno.EACCES, 78),
    ],
)
def test_start_that_fails_names_the_setting_and_exits_75_if_it_may_pass(
    bench: Bench, step: str, name: str, number: int, status: int
) -> None:
    one = bench.start({step: f"lambda *_: (_ for _ in ()).throw(OSError({number}, 'scripted'))"})
    assert one.exit_status() == status
    one.wait_for_line(f"^worker.py: {name}: /.* cannot be used: .*scripted")


def test_help_names_every_variable_and_its_default(bench: Bench) -> None:
    done = bench.run("--help", BUILDKITE_AGENT_TOKEN="")
    assert done.returncode == 0
    for field in dataclasses.fields(worker.Settings):
        assert field.name.upper() in done.stdout
    for default in ("http://localhost:18888", "queue=default", "2s", "<host>-<instance>", "empty"):
        assert f"({default})" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_run_with_unknown_argument_exits_64(bench: Bench) -> None:
    done = bench.run("--chek")
    assert (done.returncode, "--chek" in done.stderr) == (worker.EXIT_USAGE, True)


def test_check_with_all_well_exits_0_and_claims_nothing(bench: Bench) -> None:
    done = bench.run("--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert bench.scheduler.verbs() == ["health", "check"]
    assert not bench.state.exists()


def test_check_with_proxies_says_what_goes_through_which(bench: Bench) -> None:
    proxies = {"HTTPS_PROXY": "http://user:secret@proxy:3128", "HTTP_PROXY": "http://127.0.0.1:1"}
    done = bench.run("--check", **proxies)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{bench.scheduler.url}: this worker calls it without a proxy",
        "https://agent.buildkite.com/v3: the agent calls it through the proxy http://proxy:3128",
    ]
    done = bench.run("--check", NO_PROXY=".buildkite.com", **proxies)
    assert done.stdout.splitlines()[1:] == ["https://agent.buildkite.com/v3: the agent calls it without a proxy"]
    assert bench.run("--check").stdout == ""
    # The agent has what stands in .env too.
    (bench.directory / ".env").write_text("".join(f"{name}={text}\n" for name, text in proxies.items()))
    assert bench.run("--check").stdout.splitlines()[1:] == [
        "https://agent.buildkite.com/v3: the agent calls it through the proxy http://proxy:3128"
    ]


def test_check_with_nothing_well_names_each_problem(bench: Bench) -> None:
    bench.scheduler.close()
    (bench.directory / "file").touch()
    done = bench.run(
        "--check",
        BUILDKITE_AGENT_PATH="/nonexistent/agent",
        WORKER_STATE=str(bench.directory / "file" / "state"),
    )
    assert done.returncode == worker.EXIT_SETTINGS
    problems = [line.split(": ")[0] for line in done.stderr.splitlines()[1:]]
    assert problems == ["BUILDKITE_AGENT_PATH", "WORKER_STATE", "BUILDKITE_BUILD_PATH", "WORKER_API_SERVER"]
    assert "refused" in done.stderr and "No such file" in done.stderr


def test_check_with_scheduler_that_cannot_serve_says_what_it_answered(bench: Bench) -> None:
    bench.scheduler.put("health", refusal(503, "store_full"))
    done = bench.run("--check")
    assert done.returncode == worker.EXIT_SETTINGS
    assert "WORKER_API_SERVER" in done.stderr and "503 store_full" in done.stderr


def test_check_with_several_schedulers_asks_each_and_names_those_that_fail(bench: Bench, second: FakeScheduler) -> None:
    second.put("health", refusal(503, "store_full"))
    done = bench.run("--check", WORKER_API_SERVER=f"{bench.scheduler.url},{second.url}")
    assert done.returncode == worker.EXIT_SETTINGS
    assert re.findall("^WORKER_API_SERVER: (.*?): 503", done.stderr, re.MULTILINE) == [second.url]
    assert (bench.scheduler.verbs(), second.verbs()) == (["health", "check"], ["health"])


# --- What it costs ---


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_worker_takes_at_most_18_megabytes_more_than_its_interpreter(bench: Bench) -> None:
    one = bench.start()
    bench.scheduler.wait_for("claim")
    bare = [bench.python, "-c", "print(1, flush=True); input()"]
    with subprocess.Popen(bare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as interpreter:
        assert interpreter.stdout and interpreter.stdout.readline() == b"1\n"
        more = resident_bytes(one.process.pid) - resident_bytes(interpreter.pid)
        interpreter.communicate(b"\n", PATIENCE)
    assert more < 18 << 20


# --- Where it runs ---


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_work_one_job_with_each_python_touches_over_tls_completes_and_stops(
    bench: Bench, tls: ssl.SSLContext, version: str
) -> None:
    bench.python = python(version)
    bench.write_agent("await end; echo done; exit 3")
    secure = FakeScheduler(tls=tls)
    one = bench.start(WORKER_API_SERVER=secure.url, WORKER_CA_FILE=str(bench.directory / "cert.pem"))
    secure.put_job(lease_seconds=0.3)
    secure.wait_for("touch", 2)
    bench.touch("end")
    assert secure.wait_for("complete")[0].body["exit_status"] == 3
    one.wait_for_line("output job=.* text=done")
    secure.wait_for("claim", 2)  # parked, with nothing to read
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    assert "Traceback" not in one.log
    secure.close()


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_check_with_each_python_says_what_is_wrong_and_exits_78(bench: Bench, version: str) -> None:
    bench.python = python(version)
    assert bench.run("--check").returncode == 0
    done = bench.run("--check", BUILDKITE_AGENT_PATH="/nowhere", WORKER_POLL_INTERVAL="2")
    assert done.returncode == worker.EXIT_SETTINGS
    assert "WORKER_POLL_INTERVAL" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
def test_start_with_a_python_that_is_too_old_says_so_in_one_line_and_exits_78(bench: Bench, version: str) -> None:
    bench.python = python(version)
    done = bench.run()
    assert done.returncode == worker.EXIT_SETTINGS
    assert re.fullmatch(rf"worker\.py needs Python 3\.9 or newer; this is {version}\.\d+, \S+\n", done.stderr)
