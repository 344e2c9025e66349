"""Clients that mean no good, on raw sockets: each is answered or closed within bounds, and an honest worker that claims
alongside does not notice."""

from __future__ import annotations

import errno
import http.server
import json
import logging
import random
import re
import resource
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

import pytest
import requests

import scheduler
from conftest import Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path, wait_until
from scheduler import KEPT_QUERIES, Settings, Store
from test_access import drain
from test_api import PATIENCE, UUID, W1, Bench, Connection

#: Seconds. What the bounds of the scheduler are in these tests, and what may pass until they have taken effect.
ARRIVAL, SILENCE, SLACK = 0.5, 1.5, 20.0


class Honest(threading.Thread):
    """A worker that claims, is given a job, completes it, and claims again, while others misbehave."""

    def __init__(self, bench: Bench):
        super().__init__(daemon=True)
        self.bench, self.jobs = bench, 0
        self.problem: BaseException | None = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        headers = {"X-Worker-ID": "honest", "X-Worker-Session": "s"}
        try:
            with closing(Connection(self.bench.port)) as connection:
                while not self._stop_asked.is_set():
                    self.serve_one(connection, headers)
        except BaseException as error:
            self.problem = error

    def serve_one(self, connection: Connection, headers: dict[str, str]) -> None:
        job = str(uuid.uuid4())
        connection.request("GET", "/jobs?query=queue=default&wait=30", headers=headers)
        self.bench.dispatcher.offer([self.bench.make_ready(job)])
        answer = json.loads(connection.getresponse().read())
        assert answer["uuid"] == job
        body = {"claim": answer["claim"], "exit_status": 0}
        assert connection.call("POST", f"/jobs/{job}/complete", body, headers).status == 200
        self.jobs += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop_asked.set()
        self.join(PATIENCE)
        assert kind or (self.problem, self.is_alive()) == (None, False)
        assert kind or self.jobs


@pytest.fixture
def bench(
    store: Store,
    clock: Clock,
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Bench]:
    monkeypatch.setattr(scheduler, "ARRIVAL_SECONDS", ARRIVAL)
    monkeypatch.setattr(scheduler, "SILENCE_SECONDS", SILENCE)
    with Bench(store, clock, settings()) as bench, Honest(bench) as honest:
        wait_until(lambda: honest.jobs or honest.problem)
        yield bench
        wait_until(lambda: bench.server.limit.connections <= 2)  # the honest worker's, and the bench's own
    faults = [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in faults] == []


def send(port: int, text: bytes) -> bytes:
    """All that comes back for these bytes, until the scheduler closes the connection."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        try:
            connection.sendall(text)
        except ConnectionError:
            pass  # it was refused before it was all sent
        return drain(connection)


def statuses(text: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", text)]


HEAD = b"POST /jobs/%s/complete HTTP/1.1\r\nContent-Type: application/json\r\n" % UUID.encode()


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", [431]),
        (b"GET /health HTTP/1.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", [431]),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 5_000 + b"\r\n", [431]),
        (b"GET /health HTTP/1.1\r\n" + b" folded\r\n" * 5_000 + b"\r\n", [431]),
        (HEAD + b"Content-Length: 999999999999\r\n\r\n", [413]),
        (HEAD + b"Content-Length: 65537\r\n\r\n" + b"x" * 65537, [413]),
        (HEAD + b"Content-Length: -1\r\n\r\n", [411]),
        (HEAD + b"Content-Length: 0x10\r\n\r\n0123456789abcdef", [411]),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nhello", [400]),
        (HEAD + b"Content-Length: 5\x0b\r\n\r\nhello", [411]),
        (HEAD + b"Content-Length: 5, 5\r\n\r\nhello", [411]),
        (HEAD + b"Content-Length : 5\r\n\r\nhello", [400]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n", [400]),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"10\r\n0123456789abcdef\r\n" * 5_000, [413]),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello", [400]),
        (HEAD + b"Transfer-Encoding: gzip, identity\r\n\r\n", [411]),
        (HEAD + b"Content-Length: 8\r\n\r\n\xff\xfe\x00\x80\xc3\x28\xe2\x82GARBAGE / HTTP/1.1\r\n\r\n", [400, 501]),
        (HEAD + b"Content-Length: 5\r\n\r\nhel\x00oGET /health HTTP/1.1\r\nConnection: close\r\n\r\n", [400, 200]),
        (b"GET /health HTTP/1.1\r\n\r\n\x00\x00\x00\x00\r\n\r\n", [200, 400]),
        (b"GET /health HTTP/1.1\r\n\r\n" * 50 + b"\r\n", [200] * 50),
        (b"GET /\xff\xfe\x80 HTTP/1.1\r\n\r\n", [400]),
        (b"GET /jobs/\x00 HTTP/1.1\r\n\r\n", [400]),
        (b"GET /jobs/%00%ff%fe?%00=%ff HTTP/1.1\r\nConnection: close\r\n\r\n", [404]),
        (b"GET /health\x1b[31m HTTP/1.1\r\n\r\n", [400]),
        (b"GET /../../etc/passwd HTTP/1.1\r\nConnection: close\r\n\r\n", [404]),
        (b"GET /jobs/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nConnection: close\r\n\r\n", [404]),
        (b"GET //health HTTP/1.1\r\nConnection: close\r\n\r\n", [200]),
        (b"GET /health/../stats HTTP/1.1\r\nConnection: close\r\n\r\n", [404]),
        (b"GET http://elsewhere/health HTTP/1.1\r\nConnection: close\r\n\r\n", [403]),
        (b"CONNECT elsewhere:443 HTTP/1.1\r\n\r\n", [501]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), []),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
        (b"\r\n", []),
        (b"\r\n" * 20_000, []),
        (b"\x00", []),
        (b"", []),
        (b"GET", []),
        (b"GET /health HTTP/1.1\r\nHost", []),
    ],
    ids=lambda value: ascii(value)[:50],
)
@sqlite_only
def test_send_what_nobody_should_is_answered_or_closed(bench: Bench, text: bytes, answers: list[int]) -> None:
    started_at = time.monotonic()
    assert statuses(send(bench.port, text)) == answers
    assert time.monotonic() - started_at < SILENCE + SLACK


@sqlite_only
@pytest.mark.parametrize(
    "start",
    [b"", b"GET /health HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 60000\r\n\r\n"],
    ids=["line", "headers", "body"],
)
def test_send_byte_by_byte_is_ended_in_time(bench: Bench, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as connection:
        connection.settimeout(0.02)
        connection.sendall(start)
        started_at = time.monotonic()
        answer = None
        while answer is None:
            assert time.monotonic() - started_at < ARRIVAL + SLACK
            try:
                connection.sendall(b"x")  # each byte well before any pause could be called long
                answer = connection.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                answer = b""
        assert time.monotonic() - started_at > ARRIVAL / 2
        assert statuses(answer) in ([], [400])


@sqlite_only
def test_send_nothing_on_many_connections_closes_each_and_its_thread(bench: Bench) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", bench.port), PATIENCE)) for _ in range(300)]
        for connection in idle:
            assert drain(connection) == b""
    wait_until(lambda: threading.active_count() <= before + 2)


@sqlite_only
def test_send_requests_and_read_no_answer_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "DEPARTURE_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as connection:
        connection.settimeout(0.5)
        with pytest.raises(OSError):  # noqa: PT011 - it is full, or was reset
            for _ in range(20_000):
                connection.sendall(b"GET /stats HTTP/1.1\r\n\r\n" * 100)
        wait_until(lambda: bench.server.limit.connections <= 2)


def test_claim_and_vanish_is_soon_no_idle_worker_and_holds_no_thread(tmp_path: Path) -> None:
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, "") as stack:
        process = stack.start_scheduler()
        threads = status_field(process.pid, "Threads")

        def idle() -> int:
            text = requests.get(f"{stack.url}/metrics", timeout=PATIENCE).text
            return sum(map(int, re.findall(r'^stack_workers\{state="idle"\} (\d+)', text, re.MULTILINE)))

        with ExitStack() as clients:
            for name in ("", "", "w1"):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", stack.port), PATIENCE))
                header = f"X-Worker-ID: {name}\r\n" if name else ""
                client.sendall(f"GET /jobs?query=os=linux&wait=60 HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
            wait_until(lambda: idle() == 3)
        wait_until(lambda: idle() == 0)
        assert [worker["state"] for worker in stack.stats()["workers"]] == ["away"]
        wait_until(lambda: status_field(process.pid, "Threads") <= threads)


@pytest.mark.long
def test_claim_with_many_distinct_queries_leaves_the_size_bounded(tmp_path: Path) -> None:
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, "") as stack:
        process = stack.start_scheduler()
        claim_with_distinct_tags(stack.port, range(2 * KEPT_QUERIES))
        before = status_field(process.pid, "VmRSS")
        claim_with_distinct_tags(stack.port, range(2 * KEPT_QUERIES, 12 * KEPT_QUERIES))
        assert status_field(process.pid, "VmRSS") - before < 4 * 1024  # each query kept would be about 1 KiB


def claim_with_distinct_tags(port: int, numbers: range) -> None:
    """One claim for each number, by a worker with a tag of its own; on one connection, a hundred at a time."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection, connection.makefile("rb") as answers:
        for start in numbers[::100]:
            queries = [f"GET /jobs?query=tag{number}=1" for number in range(start, start + 100)]
            connection.sendall("".join(f"{query} HTTP/1.1\r\nHost: localhost\r\n\r\n" for query in queries).encode())
            for query in queries:
                assert answers.readline().startswith(b"HTTP/1.1 204 "), query
                while answers.readline() != b"\r\n":  # an answer without a job has no body
                    pass


def offer_rare_job(bench: Bench) -> None:
    """A job of a queue that the honest worker does not serve."""
    now = bench.clock.now()
    job = scheduler.Job.from_api("rare", {"id": UUID}, now)
    bench.store.put([job], bench.store.sequence(), now)
    bench.dispatcher.offer(bench.store.confirm([UUID], bench.store.sequence(), now + 900, now))


def test_send_claim_and_vanish_takes_no_job(bench: Bench) -> None:
    rare = scheduler.Profile.of("queue=rare")
    with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as connection:
        connection.sendall(b"GET /jobs?query=queue=rare&wait=60 HTTP/1.1\r\n\r\n")
        wait_until(lambda: (rare, False) in bench.dispatcher._parked)
    offer_rare_job(bench)
    assert bench.state(UUID) == "ready"


@pytest.mark.long
@sqlite_only
def test_send_random_bytes_by_the_thousand_is_answered_or_closed(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, tried, answered = random.Random(20261121), 0, 0
    pieces = [b"GET ", b"POST ", b"/health", b"/jobs/", b"?", b"%00", b" HTTP/1.1", b"\r\n", b"\n", b":", b"\0", b"{}"]
    pieces += [b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n", b"\xff", b"=", b"&wait=0"]
    ends_at = time.monotonic() + 15
    while tried < 2000 and time.monotonic() < ends_at:
        parts = [
            chance.choice(pieces) if chance.random() < 0.8 else chance.randbytes(8)
            for _ in range(chance.randint(1, 12))
        ]
        with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as connection:
            connection.sendall(b"".join(parts))
            connection.shutdown(socket.SHUT_WR)  # so that it waits for no more
            answered += bool(statuses(drain(connection)))
        tried += 1
    with capsys.disabled():
        print(f"\n{tried} random inputs sent, {answered} of them answered, the others closed")
    assert tried >= 200 and 0 < answered < tried


# --- More than there is room for ---


def test_connect_beyond_the_limit_is_refused_before_a_thread_and_a_parked_claim_stays(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Connection(bench.port)) as parked:
        parked.request("GET", "/jobs?query=queue=rare&wait=30", headers=W1)
        wait_until(lambda: (scheduler.Profile.of("queue=rare"), False) in bench.dispatcher._parked)
        bench.server.limit.max_connections = bench.server.limit.connections
        threads = threading.active_count()
        for _ in range(200):
            answer = send(bench.port, b"")
            assert statuses(answer) == [503]
            assert b'"too_many_connections"' in answer and b"Retry-After: 5\r\n" in answer
        assert threading.active_count() <= threads
        told = [record for record in caplog.records if "refused" in record.getMessage()]
        assert len(told) == 1
        caplog.clear()
        bench.server.limit.max_connections += 1
        assert statuses(send(bench.port, b"GET /health HTTP/1.0\r\n\r\n")) == [200]
        offer_rare_job(bench)
        assert json.loads(parked.getresponse().read())["uuid"] == UUID


def test_connect_beyond_the_limit_counts_what_other_listeners_serve(bench: Bench) -> None:
    (listener,) = scheduler.listening_sockets(("127.0.0.1", 0), {})
    server = scheduler.Server(listener, bench.server.api, bench.server.limit)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    health, port = b"GET /health HTTP/1.0\r\n\r\n", server.server_address[1]
    assert statuses(send(port, health)) == [200]
    most, bench.server.limit.max_connections = bench.server.limit.max_connections, 1  # the honest worker's
    assert statuses(send(port, b"")) == [503]
    bench.server.limit.max_connections = most
    assert statuses(send(port, health)) == [200]
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


@sqlite_only
def test_connect_without_a_file_descriptor_left_spins_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def accept(_: object) -> Any:
        tries.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(http.server.ThreadingHTTPServer, "get_request", accept)
        with socket.create_connection(("127.0.0.1", bench.port), PATIENCE) as waiting:
            wait_until(lambda: len(tries) >= 3)
            began_at, first = time.monotonic(), len(tries)
            wait_until(lambda: len(tries) >= first + 20)
            assert time.monotonic() - began_at > 20 * 0.05 * 0.9
            patch.undo()
            waiting.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # it stayed in the backlog
            assert statuses(drain(waiting)) == [200]
    assert len([record for record in caplog.records if "cannot be accepted" in record.getMessage()]) == 1
    caplog.clear()


def test_connect_without_a_thread_left_is_refused_and_served_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = bench.server.limit.connections

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert statuses(send(bench.port, b"")) == [503]
    assert bench.server.limit.connections == before
    assert statuses(send(bench.port, b"GET /health HTTP/1.0\r\n\r\n")) == [200]
    caplog.clear()


def status_field(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open 4,096 files, as many systems do not let it at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_flood_of_a_scheduler_leaves_its_workers_alone_and_its_size_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], many_files: None
) -> None:
    limits = {"MAX_CONNECTIONS": "300", "STACK_API_TOKEN": "secret"}
    with (
        FakeBuildkite() as fake,
        StackProcesses(fake, tmp_path, agent_path("fake"), **limits) as stack,
        ExitStack() as flood,
    ):
        process = stack.start_scheduler()
        stack.start_worker("w1", STACK_API_TOKEN="secret")
        uuids = [fake.add_job()]
        fake.wait_for(lambda: fake.all_jobs[uuids[0]].state == "finished", timeout=30)
        process.wait_for_line("ran", f"job={uuids[0]}")
        rude = [b"", b"GET /jobs HTTP/1.1\r\nX: y\r\n", b"GET /stats HTTP/1.1\r\n\r\n", b"\x16\x03\x01"]
        for number in range(1500):
            connection = flood.enter_context(socket.create_connection(("127.0.0.1", stack.port), PATIENCE))
            connection.sendall(rude[number % 4])
        threads, size = status_field(process.pid, "Threads"), status_field(process.pid, "VmHWM")
        uuids.append(fake.add_job())
        fake.wait_for(lambda: fake.all_jobs[uuids[1]].state == "finished", timeout=30)
        process.wait_for_line("refused")
        refused = sum("refused" in line for line in process.lines)
        with capsys.disabled():
            print(f"\n1500 connections at once: {threads} threads, {size // 1024} MiB at most, {refused} log lines")
        assert threads <= 300 + 20
        assert size < 150 * 1024
        assert 1 <= refused <= 5
        assert not [line for line in process.lines if "traceback" in line]
