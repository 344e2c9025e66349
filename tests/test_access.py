"""Who gets in: API tokens on every route and while they are exchanged, TLS with real certificates, and no secret in
anything that others can read."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import os
import queue
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

import scheduler
from conftest import ROUTES, Clock, sqlite_only
from fake_buildkite import FakeBuildkite
from processes import RedisServer, StackProcesses, agent_path, compiled, free_port, wait_until
from scheduler import Dispatcher, JobState, Leadership, Scheduler, Settings, SettingsError, Store
from test_api import PATIENCE, UUID, Bench, Connection, waits
from test_service import Systemd, systemd

__all__ = ["systemd", "waits"]  # fixtures

# --- Tokens ---

PATHS = [(route.method, re.sub(r"\{\w+\}", UUID, route.path), route.who == scheduler.ANYONE) for route in ROUTES]
GUARDED = [(method, path) for method, path, is_readable_by_all in PATHS if not is_readable_by_all]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def status_of(bench: Bench, method: str, path: str, headers: dict[str, str]) -> int:
    return bench.call(method, path, {} if method == "POST" else None, headers).status


@pytest.fixture
def guarded(store: Store, clock: Clock, settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "policy.py").touch()
    policy = scheduler.Policy(str(tmp_path / "policy.py"), Leadership(store), Dispatcher(store, clock.now), clock.now)
    nowhere = "http://127.0.0.1:9", lambda: "t"
    apis = scheduler.RestApi(*nowhere), scheduler.GraphApi(*nowhere)
    periodic = scheduler.PeriodicBuilds(scheduler.StackFile, Leadership(store), *apis, clock.now)
    with Bench(store, clock, settings(), token="old-token", parts=[policy, periodic]) as bench:
        bench.make_ready()
        yield bench


def test_list_open_routes_finds_health_and_what_has_a_guard_of_its_own() -> None:
    assert {path for _, path, is_readable_by_all in PATHS if is_readable_by_all} <= {"/", "/health", "/webhook"}


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_call_of_every_route_lets_in_the_tokens_of_the_moment_alone(guarded: Bench, method: str, path: str) -> None:
    def statuses() -> dict[str, int]:
        given = {"none": {}, "wrong": bearer("wrong")} | {name: bearer(f"{name}-token") for name in ("old", "new")}
        return {name: status_of(guarded, method, path, headers) for name, headers in given.items()}

    def refused() -> set[str]:
        return {name for name, status in statuses().items() if status == 401}

    assert refused() == {"none", "wrong", "new"}
    guarded.server.api_tokens = ("new-token", "old-token")
    assert refused() == {"none", "wrong"}
    guarded.server.api_tokens = ("new-token",)
    assert refused() == {"none", "wrong", "old"}


@sqlite_only
@pytest.mark.parametrize("length", ["Content-Length: 60000", "Content-Length: -1", "Transfer-Encoding: chunked"])
def test_call_without_token_is_refused_before_its_body_is_read(guarded: Bench, length: str) -> None:
    head = f"POST /jobs/{UUID}/complete HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n"
    reply = guarded.send(head.encode())  # the answer comes though the body never does
    assert reply.refusal == (401, "unauthorized")
    assert reply.headers["Connection"] == "close"


@sqlite_only
def test_call_without_token_is_counted_each_time_and_logged_once_in_a_while(
    guarded: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        guarded.call("GET", "/queue?token=hidden", headers=bearer("wrong"))
    counted = guarded.call("GET", "/metrics", headers=bearer("old-token")).text.decode()
    assert "stack_unauthorized_total 3.0\n" in counted
    later = time.monotonic() + scheduler.REFUSALS_SECONDS
    for now in (later, later + 1):
        guarded.server.api.unauthorized("10.0.0.1", "/stats", "no token", now)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("unauthorized")]
    assert [re.sub(" reason=.*(?= requests)", "", line) for line in told] == [
        "unauthorized client=127.0.0.1 path=/queue requests=1",
        "unauthorized client=10.0.0.1 path=/stats requests=3",
    ]


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer("old-token")], ids=str)
def test_health_is_open_to_everybody(guarded: Bench, headers: dict[str, str]) -> None:
    assert guarded.call("GET", "/health", headers=headers).status == 200


@pytest.mark.parametrize("tokens", [("a", "b"), ("b", "a")])
def test_call_is_compared_with_every_token(
    guarded: Bench, tokens: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(given: bytes, right: bytes) -> bool:
        compared.append(right)
        return given == right

    monkeypatch.setattr(scheduler.hmac, "compare_digest", compare)  # type: ignore[attr-defined]
    guarded.server.api_tokens = tokens
    assert guarded.call("GET", "/stats", headers=bearer("a")).status == 200
    assert sorted(compared) == [b"a", b"b"]


@sqlite_only
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  ", "Basic ", "", "Bearer", "Bearer x "])
def test_call_with_token_is_let_in_however_its_scheme_is_written(guarded: Bench, scheme: str) -> None:
    """The case of a scheme does not count (RFC 9110, 11.1)."""
    status = guarded.call("GET", "/stats", headers={"Authorization": f"{scheme}old-token"}).status
    assert status == (200 if scheme.lower().rstrip(" ") == "bearer" and scheme.endswith(" ") else 401)


@pytest.mark.parametrize("text", ["a,b", "a\nb\n", " a , b ", "a,\n\nb,a\r\n"], ids=ascii)
def test_read_several_tokens_takes_commas_and_lines(settings: Callable[..., Settings], text: str) -> None:
    assert settings(STACK_API_TOKEN=text).stack_api_token == ("a", "b")


@pytest.mark.parametrize("text", [",", "secret words", "s\u00e9cret", "good,secret words"], ids=ascii)
def test_read_unusable_tokens_is_refused_without_showing_them(settings: Callable[..., Settings], text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(STACK_API_TOKEN=text)
    assert str(caught.value).startswith("STACK_API_TOKEN: ")
    assert "cret" not in str(caught.value)


# --- Browsers ---

#: What a browser says of a page that is not the scheduler's own. `same-site` is another port, or another name.
OTHER_SITES = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "whatever comes"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
]
OTHER_HOSTS = ["evil.example", "evil.example:18888", "localhost.evil.example", "192.0.2.1", "0.0.0.0", "xlocalhost"]
OTHER_HOSTS += ["127.0.0.1.evil.example", "localhost:x@evil.example", "[::1", "[2001:db8::1]:1", "[::ffff:1.1.1.1]"]
OUR_HOSTS = ["localhost", "LOCALHOST:18888", "127.0.0.1:1", "127.8.8.8", "[::1]:18888", "stack.localhost", "localhost."]
OUR_HOSTS += ["[::ffff:127.0.0.1]:18888", ""]


@pytest.fixture
def unguarded(settings: Callable[..., Settings], store: Store, clock: Clock) -> Iterator[Bench]:
    with Bench(store, clock, settings()) as bench:
        bench.make_ready()
        yield bench


@sqlite_only
@pytest.mark.parametrize("headers", OTHER_SITES, ids=str)
@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in PATHS] + [("OPTIONS", "/jobs")])
def test_call_for_a_page_of_another_site_is_refused_on_every_route(
    unguarded: Bench, method: str, path: str, headers: dict[str, str]
) -> None:
    body: dict[str, str] | None = {} if method == "POST" else None
    assert unguarded.call(method, path, body, headers).refusal == (403, "other_site")
    unguarded.server.api_tokens = ("good",)
    assert unguarded.call(method, path, body, headers | bearer("good")).refusal == (403, "other_site")


@sqlite_only
@pytest.mark.parametrize("host", OTHER_HOSTS)
@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in PATHS])
def test_call_for_another_host_is_refused_on_every_route_without_a_token(
    unguarded: Bench, method: str, path: str, host: str
) -> None:
    """A page may have its own name lead to this machine: then it is no other site for the browser."""
    body: dict[str, str] | None = {} if method == "POST" else None
    page = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for headers in ({"Host": host}, page):
        assert unguarded.call(method, path, body, headers).refusal == (403, "other_host")
    unguarded.server.api_tokens = unguarded.server.operator_tokens = ("good",)
    assert unguarded.call(method, path, body, {"Host": host} | bearer("good")).status not in (401, 403)


@sqlite_only
@pytest.mark.parametrize("host", OUR_HOSTS)
def test_call_for_this_machine_by_name_is_served(unguarded: Bench, host: str) -> None:
    own_page = {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"} if host else {}
    for headers in ({}, {"Sec-Fetch-Site": "none"}, own_page):
        assert unguarded.call("GET", "/stats", headers={"Host": host} | headers).status == 200


def test_claim_for_a_page_of_another_site_claims_nothing(unguarded: Bench) -> None:
    for headers in [*OTHER_SITES, {"Host": "evil.example"}]:
        assert unguarded.call("GET", "/jobs?query=queue=default&token=1", headers=headers).status == 403
    assert unguarded.state() == "ready"


# --- Room for those with a token ---

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
STATS = HEALTH.replace(b"/health", b"/stats").replace(b"Host: ", b"Authorization: Bearer old-token\r\nHost: ")


def status(connection: socket.socket, request: bytes) -> int:
    connection.sendall(request)
    return int(connection.recv(65536).split()[1])


def ends(connection: socket.socket) -> bool:
    """Wait until the other side closes it, much sooner than for a client that is silent."""
    connection.settimeout(scheduler.ARRIVAL_SECONDS / 2)
    drain(connection)
    return True


@sqlite_only
def test_call_without_a_token_closes_the_connection_until_one_was_shown(guarded: Bench) -> None:
    for request in (HEALTH, HEALTH.replace(b"/health", b"/stats"), STATS.replace(b"old", b"new")):
        with connect(guarded.port) as stranger:
            assert status(stranger, request) in (200, 401)
            assert ends(stranger)
    with connect(guarded.port) as known:
        assert [status(known, request) for request in (STATS, HEALTH, STATS)] == [200] * 3


@sqlite_only
def test_connect_while_strangers_take_the_room_is_served_and_known_ones_stay(
    guarded: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    limit, most = guarded.server.limit, 16
    limit.max_connections = most
    with ExitStack() as stack:
        known = [stack.enter_context(connect(guarded.port)) for _ in range(3)]
        assert [status(connection, STATS) for connection in known] == [200] * 3
        # They send nothing, or half of a request, for as long as they like.
        strangers = []
        for number in range(5 * most):
            strangers.append(stack.enter_context(connect(guarded.port)))
            strangers[-1].sendall(HEALTH[: number % 3])
        wait_until(lambda: limit.connections <= most * (1 - scheduler.KEPT_PART) + 1)
        assert all(map(ends, strangers[:-most]))
        # Connections are accepted in turn: once this one is answered, or turned away, all strangers were.
        with connect(guarded.port) as last, suppress(OSError):
            status(last, STATS)
        for _ in range(10):
            # With so little room the threads of those that were ended may hold it for a moment.
            wait_until(lambda: limit.connections < most)
            with connect(guarded.port) as worker:
                assert status(worker, STATS) == 200
        assert [status(connection, STATS) for connection in known] == [200] * 3
    assert len([record for record in caplog.records if "many connections: each new one" in record.getMessage()]) == 1
    wait_until(lambda: limit.connections == 0 and not limit._strangers)


@sqlite_only
def test_connect_of_many_workers_at_once_ends_none_of_them_while_there_is_room(guarded: Bench) -> None:
    guarded.server.limit.max_connections = 40
    with ExitStack() as stack:
        known = []
        for _ in range(32):
            known.append(stack.enter_context(connect(guarded.port)))
            assert status(known[-1], STATS) == 200
        back = [stack.enter_context(connect(guarded.port)) for _ in range(5)]
        assert [status(connection, STATS) for connection in back] == [200] * 5


@sqlite_only
def test_connect_where_all_have_shown_a_token_and_the_room_is_full_is_refused(guarded: Bench) -> None:
    guarded.server.limit.max_connections = 4
    with ExitStack() as stack:
        known = []
        for _ in range(4):
            known.append(stack.enter_context(connect(guarded.port)))
            assert status(known[-1], STATS) == 200
        with connect(guarded.port) as one_more:
            assert b'"too_many_connections"' in one_more.recv(4096)
        assert [status(connection, STATS) for connection in known] == [200] * 4


def test_connect_over_tls_and_dawdle_is_ended_when_the_room_is_scarce(secure: Live, pki: Pki) -> None:
    secure.server.limit.max_connections = 4
    with ExitStack() as stack:
        plain = [stack.enter_context(connect(secure.port)) for _ in "123"]
        dawdling = [stack.enter_context(pki.client().wrap_socket(plain[0], server_hostname="127.0.0.1")), *plain[1:]]
        for oldest in dawdling:
            wait_until(lambda: secure.server.limit.connections == 3)
            stack.enter_context(connect(secure.port))
            assert ends(oldest)
        wait_until(lambda: secure.server.limit.connections == 3)
        assert get(secure.port, pki.client(), "/stats") == 401


# --- A scheduler whose secrets are exchanged ---


class Live:
    """A Scheduler that serves in this process and asks Buildkite nothing; its secrets are in files."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **settings: str):
        self.token = directory / "token"
        self.token.write_text("old-token\n")
        environ = {
            "BUILDKITE_AGENT_TOKEN": "bkct_x",
            "STACK_KEY": "test",
            "STATE_DIRECTORY": str(directory / "state"),
            "LISTEN": "127.0.0.1:0",
            "STACK_API_TOKEN_FILE": str(self.token),
            **settings,
        }
        for name, text in environ.items():
            monkeypatch.setenv(name, text)
        self.scheduler = Scheduler(scheduler.read_settings(Settings, os.environ), os.environ)
        [self.server], self.store = self.scheduler._servers, self.scheduler._store
        self.dispatcher, self.port = self.scheduler._dispatcher, self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.dispatcher.stop()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(PATIENCE)
        self.store.close()
        self.scheduler._woken.close()
        self.scheduler._waker.close()

    def make_ready(self, **about: object) -> None:
        now = time.time()
        job = scheduler.Job.from_api("default", {"id": UUID, **about}, now)
        self.store.put([job], self.store.sequence(), now)
        self.dispatcher.offer(self.store.confirm([UUID], self.store.sequence(), now + 900, now))


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    live = Live(tmp_path, monkeypatch)
    yield live
    live.close()


def test_reload_while_workers_are_parked_keeps_their_claims_and_takes_the_new_token(
    live: Live, waits: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Connection(live.port)) as parked, closing(Connection(live.port)) as other:
        path = "/jobs?query=queue=default&wait=60"
        parked.request("GET", path, headers={"X-Worker-ID": "w1"} | bearer("old-token"))
        assert waits.get(timeout=PATIENCE) == "w1"
        live.token.write_text("new-token\nold-token\n")
        live.scheduler.reload()
        assert [other.call("GET", "/stats", headers=bearer(t)).status for t in ("old-token", "new-token")] == [200, 200]
        live.token.write_text("new-token\n")
        live.scheduler.reload()
        assert [other.call("GET", "/stats", headers=bearer(t)).status for t in ("old-token", "new-token")] == [401, 200]
        live.make_ready()
        response = parked.getresponse()
        assert (response.status, UUID.encode() in response.read()) == (200, True)
        assert parked.call("GET", path, headers=bearer("old-token")).refusal == (401, "unauthorized")
    assert not [record for record in caplog.records if "-token" in record.getMessage()]


@pytest.mark.parametrize("text", ["two secret words\n", ",\n"], ids=ascii)
def test_reload_with_unusable_token_keeps_the_old_one(live: Live, text: str, caplog: pytest.LogCaptureFixture) -> None:
    live.token.write_text(text)
    live.scheduler.reload()
    live.token.unlink()
    live.scheduler.reload()
    with closing(Connection(live.port)) as connection:
        assert connection.call("GET", "/stats", headers=bearer("old-token")).status == 200
        assert connection.call("GET", "/stats").status == 401
    told = [record.getMessage() for record in caplog.records if "unreloaded" in record.getMessage()]
    assert len(told) == 2
    assert "secret words" not in caplog.text


@pytest.mark.parametrize("text", ["", "\n"], ids=ascii)
def test_reload_with_emptied_token_lets_nobody_in(live: Live, text: str, caplog: pytest.LogCaptureFixture) -> None:
    live.token.write_text(text)
    live.scheduler.reload()
    with closing(Connection(live.port)) as connection:
        assert connection.call("GET", "/stats").status == 401
        assert connection.call("GET", "/stats", headers=bearer("old-token")).status == 200
    assert "STACK_API_TOKEN: is empty now" in caplog.text


def test_start_without_token_warns_of_it_and_with_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Live(tmp_path, monkeypatch).close()
    assert "STACK_API_TOKEN is empty" not in caplog.text
    Live(tmp_path, monkeypatch, STACK_API_TOKEN_FILE="", STACK_API_TOKEN="").close()
    assert [record.levelname for record in caplog.records if "STACK_API_TOKEN is empty" in record.getMessage()] == [
        "WARNING"
    ]


@pytest.mark.parametrize(
    ("family", "address", "beyond"),
    [
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET, "127.8.8.8", False),
        (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET6, "::1", False),
        (socket.AF_INET6, "::", True),
        (socket.AF_INET6, "::ffff:127.0.0.1", False),
    ],
)
def test_beyond_loopback_looks_at_what_is_really_bound(family: int, address: str, beyond: bool) -> None:
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        assert scheduler.beyond_loopback(listener) == beyond


@pytest.mark.parametrize(
    ("address", "token", "refused"), [("0.0.0.0", "", True), ("0.0.0.0", "t", False), ("127.0.0.1", "", False)]
)
def test_expose_a_socket_beyond_loopback_needs_a_token(
    settings: Callable[..., Settings], address: str, token: str, refused: bool
) -> None:
    with socket.socket() as listener:
        listener.bind((address, 0))
        expected = (
            pytest.raises(SettingsError, match=r"LISTEN: 0\.0\.0\.0 .* openssl rand -hex 32")
            if refused
            else nullcontext()
        )
        with expected:
            scheduler.check_exposure([listener], settings(STACK_API_TOKEN=token))


def run_script(script: str, directory: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A script that is to end by itself."""
    return subprocess.run(
        [*compiled(script), *arguments],
        env={"PATH": os.environ["PATH"], "BUILDKITE_AGENT_TOKEN": "x", **settings},
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- TLS ---


@dataclasses.dataclass
class Pki:
    """Certificates in a directory: two CAs, and below each one for the server and one for a client."""

    directory: Path

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def make(self, *names: str) -> None:
        new = ["-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout"]
        for ca in names:
            own = ["-days", "2", "-subj", f"/CN={ca}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
            self.openssl("req", "-x509", *new, f"{ca}.key", *own, "-out", f"{ca}.crt")
            for name in "server", "client":
                self.openssl("req", *new, f"{ca}-{name}.key", "-subj", f"/CN={name}", "-out", "request.csr")
                self.openssl(
                    *("x509", "-req", "-in", "request.csr", "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key"),
                    *("-CAcreateserial", "-days", "2", "-extfile", "names", "-out", f"{ca}-{name}.crt"),
                )

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True, timeout=PATIENCE)

    def client(self, ca: str = "one", *, cert: str = "") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.path(f"{ca}.crt"))
        if cert:
            context.load_cert_chain(self.path(f"{cert}.crt"), self.path(f"{cert}.key"))
        return context

    def settings(self, ca: str = "one", **more: str) -> dict[str, str]:
        return {"TLS_CERT": self.path(f"{ca}-server.crt"), "TLS_KEY": self.path(f"{ca}-server.key"), **more}


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    if not shutil.which("openssl"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs openssl to make certificates")
    pki = Pki(tmp_path_factory.mktemp("pki"))
    (pki.directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    pki.make("one", "two")
    pki.openssl("ec", "-in", "one-server.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key")
    return pki


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pki: Pki) -> Iterator[Live]:
    for kind in "crt", "key":
        shutil.copy(pki.path(f"one-server.{kind}"), tmp_path / f"server.{kind}")
    settings = {"TLS_CERT": str(tmp_path / "server.crt"), "TLS_KEY": str(tmp_path / "server.key")}
    live = Live(tmp_path, monkeypatch, **settings)
    yield live
    live.close()


def get(port: int, context: ssl.SSLContext, path: str = "/health") -> int:
    """The status that a new connection gets."""
    with (
        connect(port) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        return int(connection.recv(4096).split()[1])


def test_call_over_tls_is_served_to_those_who_trust_its_ca(secure: Live, pki: Pki) -> None:
    assert get(secure.port, pki.client("one")) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        get(secure.port, pki.client("two"))
    assert get(secure.port, pki.client("one"), "/stats") == 401


def test_claim_over_tls_whose_client_reads_late_is_answered_whole(
    secure: Live, pki: Pki, waits: queue.SimpleQueue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("TEXT_BYTES", "CLAIM_BYTES"):
        monkeypatch.setattr(scheduler, bound, 20_000_000)
    build = {"branch": "x" * 10_000_000}  # more than the system holds for who does not read
    connection = http.client.HTTPSConnection("127.0.0.1", secure.port, timeout=PATIENCE, context=pki.client())
    with closing(connection):
        connection.request("GET", "/jobs?query=queue=default&wait=60", headers=bearer("old-token"))
        waits.get(timeout=PATIENCE)
        secure.make_ready(build=build)
        assert json.loads(connection.getresponse().read())["build"] == build
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


@pytest.mark.parametrize(("version", "good"), [("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)])
def test_call_over_tls_takes_1_2_and_up(secure: Live, version: str, good: bool) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{secure.port}", version, "-cipher", "ALL:@SECLEVEL=0"]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=PATIENCE, check=False)
    assert (b"Cipher is (NONE)" not in done.stdout) == good, done.stdout + done.stderr


def test_call_over_tls_beside_handshakes_that_never_come_is_served_and_they_are_closed(
    secure: Live, pki: Pki, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler, "ARRIVAL_SECONDS", 1.0)
    with ExitStack() as cleanup:
        silent = [cleanup.enter_context(connect(secure.port)) for _ in range(20)]
        for connection, text in zip(silent, [b"", b"\x16\x03", b"GET /health HTTP/1.1\r\n\r\n"] * 7, strict=False):
            connection.sendall(text)
        assert get(secure.port, pki.client()) == 200
        for connection in silent:
            drain(connection)
    assert not [record for record in caplog.records if record.exc_info]


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def drain(connection: socket.socket) -> bytes:
    """Everything until the other side closes, in whatever way."""
    text = b""
    try:
        while data := connection.recv(65536):
            text += data
    except ConnectionError:
        pass
    return text


def test_claim_over_tls_whose_client_hangs_up_swallows_no_job(secure: Live, pki: Pki, waits: Any) -> None:
    with connect(secure.port) as plain:
        connection = pki.client().wrap_socket(plain, server_hostname="127.0.0.1")
        request = "GET /jobs?query=queue=default&wait=60 HTTP/1.1\r\nAuthorization: Bearer old-token\r\n\r\n"
        connection.sendall(request.encode())
        waits.get(timeout=PATIENCE)
        connection.close()
    secure.make_ready()
    job = secure.store.get(UUID)
    assert job and job.state is JobState.READY


def test_reload_certificate_serves_the_new_one_and_leaves_connections_alone(
    secure: Live, pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        connect(secure.port) as plain,
        pki.client("one").wrap_socket(plain, server_hostname="127.0.0.1") as open_before,
    ):
        for kind in "crt", "key":
            shutil.copy(pki.path(f"two-server.{kind}"), tmp_path / f"server.{kind}")
        secure.scheduler.reload()
        assert get(secure.port, pki.client("two")) == 200
        open_before.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert open_before.recv(4096).startswith(b"HTTP/1.1 200 ")
    shutil.copy(pki.path("one-server.key"), tmp_path / "server.key")  # does not belong to the certificate
    secure.token.write_text("new-token\n")
    caplog.clear()
    secure.scheduler.reload()
    assert [record.getMessage().split()[0] for record in caplog.records] == ["unreloaded"]
    assert secure.scheduler._settings.stack_api_token == ("old-token",)
    assert get(secure.port, pki.client("two")) == 200


def test_call_with_client_ca_needs_a_certificate_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    live = Live(tmp_path, monkeypatch, **pki.settings(TLS_CLIENT_CA=pki.path("one.crt")))
    with closing(live):
        assert get(live.port, pki.client("one", cert="one-client")) == 200
        for cert in "", "two-client":
            with pytest.raises(OSError, match=r"alert|reset|EOF"):
                get(live.port, pki.client("one", cert=cert))
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=str)
@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"TLS_CERT": "one-server.crt"}, "TLS needs both"),
        ({"TLS_KEY": "one-server.key"}, "TLS needs both"),
        ({"TLS_CLIENT_CA": "one.crt"}, "TLS_CLIENT_CA needs TLS"),
        ({"TLS_CERT": "none.crt", "TLS_KEY": "one-server.key"}, "none.crt"),
        ({"TLS_CERT": "one-server.crt", "TLS_KEY": "two-server.key"}, "two-server.key are not a certificate and"),
        ({"TLS_CERT": "names", "TLS_KEY": "one-server.key"}, "names and"),
        ({"TLS_CERT": "one-server.crt", "TLS_KEY": "locked.key"}, "locked.key"),
        ({"TLS_CERT": "one-server.crt", "TLS_KEY": "one-server.key", "TLS_CLIENT_CA": "names"}, "names is not a CA"),
    ],
    ids=str,
)
def test_start_with_unusable_tls_files_says_which_and_exits_78(
    tmp_path: Path, pki: Pki, files: dict[str, str], hint: str, arguments: list[str]
) -> None:
    done = run_script("scheduler.py", tmp_path, *arguments, **{name: pki.path(file) for name, file in files.items()})
    assert (done.returncode, done.stderr.startswith("scheduler.py: TLS_"), hint in done.stderr) == (78, True, True)


def test_run_job_over_mutual_tls_from_end_to_end(tmp_path: Path, pki: Pki) -> None:
    token = tmp_path / "token"
    token.write_text("good-token\nolder-token\n")
    tls = pki.settings(TLS_CLIENT_CA=pki.path("one.crt"), STACK_API_TOKEN_FILE=str(token))
    with FakeBuildkite() as fake, StackProcesses(fake, tmp_path, agent_path("fake"), **tls) as stack:
        uuid = fake.add_job()
        stack.start_scheduler()
        https = {
            "WORKER_API_SERVER": f"https://localhost:{stack.port}",
            "WORKER_CA_FILE": pki.path("one.crt"),
            "STACK_API_TOKEN": "older-token",
        }
        certificate = {
            "WORKER_TLS_CERT": pki.path("one-client.crt"),
            "WORKER_TLS_KEY": pki.path("one-client.key"),
        }
        stack.start_worker("stranger", **https).wait_for_line("retrying what=claim", "WORKER_TLS_CERT")
        stack.start_worker(
            "distrustful", **(https | certificate | {"WORKER_CA_FILE": pki.path("two.crt")})
        ).wait_for_line("CERTIFICATE_VERIFY_FAILED")
        good = stack.start_worker("good", BUILDKITE_AGENT_TOKEN="", **(https | certificate))
        fake.wait_for(lambda: fake.all_jobs[uuid].state == "finished", timeout=30)
        assert fake.jobs[uuid].agent_name == "good"
        good.wait_for_line("completed", f"job={uuid}")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("WORKER_CA_FILE", {"WORKER_CA_FILE": "none.crt"}),
        ("WORKER_TLS_CERT", {"WORKER_TLS_CERT": "one-client.crt"}),
        ("WORKER_TLS_CERT", {"WORKER_TLS_CERT": "one-client.crt", "WORKER_TLS_KEY": "two-client.key"}),
    ],
)
def test_start_worker_with_unusable_tls_files_names_them_and_exits_78(
    tmp_path: Path, pki: Pki, name: str, settings: dict[str, str]
) -> None:
    files = {variable: pki.path(file) for variable, file in settings.items()}
    done = run_script("worker.py", tmp_path, WORKER_API_SERVER="https://localhost:1", **files)
    assert (done.returncode, f"\n{name}" in done.stderr) == (78, True), done.stderr


# --- Nothing leaks ---

CLUSTER, STACK, OLD_STACK, WEBHOOK = "bkct_CLUSTERSECRET", "STACKSECRET1", "STACKSECRET2", "WEBHOOKSECRET"
SECRETS = [CLUSTER, STACK, OLD_STACK, WEBHOOK]


def processes_below(pid: int) -> list[int]:
    """The process and all that came of it, as far as /proc knows."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def proc_file(pid: int, name: str) -> bytes:
    """What /proc tells of a process; nothing when it has ended meanwhile, as the job's own sleeps do.

    Of one that just ends, users other than root are told that they may not look.
    """
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def leaks(text: bytes, secrets: list[str]) -> list[str]:
    return [secret for secret in secrets if secret.encode() in text]


def all_answers(url: str, uuid: str) -> bytes:
    """What every route says to those with the token and to those without."""
    text = b""
    for headers in ({}, bearer(STACK), bearer("wrong" + STACK)):
        for method, path, _ in PATHS:
            answer = requests.request(method, url + path.replace(UUID, uuid), headers=headers, json={}, timeout=30)
            text += repr(answer.headers).encode() + answer.content
    return text


@pytest.mark.parametrize("job_tokens", ["0", "1"], ids=["cluster token", "job tokens"])
@pytest.mark.parametrize("kind", ["fake", "v3", "v4"])
def test_sweep_while_a_job_runs_finds_no_secret(kind: str, job_tokens: str, tmp_path: Path) -> None:
    agent = agent_path(kind)
    shared = {
        "STACK_API_TOKEN": f"{STACK},{OLD_STACK}",
        "WEBHOOK_TOKEN": WEBHOOK,
        "LOG_LEVEL": "debug",
    }
    with FakeBuildkite(token=CLUSTER) as fake, StackProcesses(fake, tmp_path, agent, **shared) as stack:
        here = str(tmp_path)
        command = f"echo $$ >{here}/new; mv {here}/new {here}/job; env; while [ ! -e {here}/go ]; do sleep 0.05; done"
        uuid = fake.add_job(command=command)
        parent = stack.start_scheduler()
        worker = stack.start_worker("w1", WORKER_JOB_TOKENS=job_tokens, **shared)
        worker.wait_for_line("started", f"job={uuid}")
        fake.wait_for(lambda: (tmp_path / "job").exists() or fake.all_jobs[uuid].state == "finished", timeout=30)
        secrets = SECRETS + [value for value in fake.tokens if value.startswith("bkjat_")]
        assert len(secrets) == 4 + int(job_tokens)
        job_pid = int((tmp_path / "job").read_text())
        pids = processes_below(parent.pid) + processes_below(worker.pid)
        assert job_pid in pids
        for pid in pids:
            assert leaks(proc_file(pid, "cmdline"), secrets) == []
        assert b"BUILDKITE_JOB_ID" in proc_file(job_pid, "environ")
        for pid in processes_below(job_pid):
            environ = proc_file(pid, "environ")
            assert leaks(environ, secrets) == []
            assert b"BUILDKITE_AGENT_TOKEN=" not in environ
        assert leaks(all_answers(stack.url, uuid), secrets) == []
        (tmp_path / "go").touch()
        fake.wait_for(lambda: fake.all_jobs[uuid].state == "finished", timeout=30)
        worker.wait_for_line("completed", f"job={uuid}")
        assert "BUILDKITE_JOB_ID" in fake.jobs[uuid].log
        assert leaks(fake.jobs[uuid].log.encode(), secrets) == []
    assert leaks("\n".join(parent.lines + worker.lines).encode(), secrets) == []
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert leaks(file.read_bytes(), secrets) == [], file


@pytest.mark.parametrize("script", ["scheduler.py", "worker.py"])
@pytest.mark.parametrize("arguments", [["--help"], ["--check"], [], ["--wrong"]], ids=str)
def test_sweep_of_what_a_script_says_about_its_settings_finds_no_secret(
    script: str, arguments: list[str], tmp_path: Path
) -> None:
    environ = {
        "BUILDKITE_AGENT_TOKEN": f"{CLUSTER} with a space",
        "STACK_API_TOKEN": f"{STACK},{OLD_STACK} with a space",
        "WEBHOOK_TOKEN": f"{WEBHOOK} with a space",
        "BUILDKITE_AGENT_ENDPOINT": f"http://127.0.0.1:{free_port()}",
    }
    for variables in (environ, {name: text.removesuffix(" with a space") for name, text in environ.items()}):
        if not arguments and variables is not environ:
            continue  # it would serve
        done = run_script(script, tmp_path, *arguments, **variables)
        assert done.stdout + done.stderr
        assert leaks((done.stdout + done.stderr).encode(), SECRETS) == []


# --- Secrets in addresses ---

#: A user and a password, both not to be shown, as they stand in an address and as they are sent.
LOGIN, USER, PASSWORD = "USERSECRET:p%40ss@PASSSECRET", "USERSECRET", "p@ss@PASSSECRET"
IN_ADDRESSES = [USER, "PASSSECRET", base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()]


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_sweep_of_a_scheduler_behind_a_proxy_that_is_down_finds_nothing_of_its_login(
    name: str, fake: FakeBuildkite, systemd: Systemd, tmp_path: Path
) -> None:
    place = f"127.0.0.1:{free_port()}"
    more = {name: f"http://{LOGIN}@{place}", "LOG_LEVEL": "debug", "NOTIFY_SOCKET": str(tmp_path / "notify")}
    more["WATCHDOG_USEC"] = "300000"  # so it tells its status often
    if "HTTPS" in name:
        more["BUILDKITE_AGENT_ENDPOINT"] = "https://buildkite.invalid/v3"
    with StackProcesses(fake, tmp_path, "", **more) as stack:
        process = stack.start_scheduler()
        told = f"http://{place} ({name.upper()})"
        systemd.wait_for("STATUS=0 ready, 0 leased, 0 running; not polled yet; register")
        process.wait_for_line(f"no answer from Buildkite through the proxy {told}")
        answers = all_answers(stack.url, UUID)
        assert told.encode() in answers
        checked = run_script("scheduler.py", tmp_path, "--check", **stack.environment(**more))
    assert checked.returncode == 78 and told in checked.stderr
    seen = [answers, *(text.encode() for text in (*process.lines, *systemd.told, checked.stdout, checked.stderr))]
    assert told.encode() in b"".join(seen)
    for text in seen:
        assert leaks(text, IN_ADDRESSES) == []


def test_sweep_of_a_scheduler_on_redis_finds_nothing_of_its_login(fake: FakeBuildkite, tmp_path: Path) -> None:
    secrets = ["PASSSECRET", "OTHERSECRET"]
    redis = RedisServer(tmp_path, password="PASSSECRET")
    with ExitStack() as ends, StackProcesses(fake, tmp_path, "", LOG_LEVEL="debug") as stack:
        ends.callback(redis.kill)
        good, wrong = (f"redis://:{password}@{redis.address}/0" for password in secrets)
        uuid = fake.add_job()
        process = stack.start_scheduler(REDIS_ADDR=good)
        process.wait_for_line(f"ready job={uuid}")
        texts = [all_answers(stack.url, uuid)]
        lines = process.lines
        for arguments, address in ((["--check"], good), (["--check"], wrong), ([], wrong)):
            listen = f"127.0.0.1:{free_port()}"
            more = stack.environment(STACK_KEY="test", LISTEN=listen, REDIS_ADDR=address, LOG_LEVEL="debug")
            done = run_script("scheduler.py", tmp_path, *arguments, **more)
            assert done.returncode == (0 if address == good else 78), done.stderr
            texts += [done.stdout.encode(), done.stderr.encode()]
        redis.kill()
        process.wait_for_line(f"Redis at redis://{redis.address}/0 cannot be used")
        texts += [all_answers(stack.url, uuid)]
    assert f"redis://{redis.address}/0".encode() in texts[-1]
    for text in (*texts, *(line.encode() for line in lines)):
        assert leaks(text, secrets) == []


@pytest.mark.parametrize(
    "form",
    [
        *("redis://{0}@{1}/0", "redis://USERSECRET@{1}", "{0}@{1}", "rediss://{0}@{1}?ssl_cert_reqs=none"),
        "redis+sentinel://{0}@{1}/main/0?sentinel_username=USERSECRET&sentinel_password=OTHERSECRET",
    ],
)
def test_start_on_redis_that_is_down_shows_nothing_of_its_login(form: str) -> None:
    address = form.format(LOGIN, f"127.0.0.1:{free_port()}")
    environ = {"BUILDKITE_AGENT_TOKEN": CLUSTER, "STACK_KEY": "s", "REDIS_ADDR": address, "LOG_LEVEL": "debug"}
    settings = scheduler.read_settings(Settings, environ)
    told = "\n".join(scheduler.check_redis(settings))
    assert f"{settings.redis_addr} cannot be used" in told
    assert leaks(f"{told} {settings!r}".encode(), [*IN_ADDRESSES, "OTHERSECRET"]) == []


def test_sweep_of_a_worker_whose_agent_has_a_proxy_that_is_down_finds_nothing_of_its_login(
    fake: FakeBuildkite, tmp_path: Path
) -> None:
    place = f"127.0.0.1:{free_port()}"
    # No agent asks an address of this machine through a proxy.
    more = {"HTTP_PROXY": f"http://{LOGIN}@{place}", "BUILDKITE_AGENT_ENDPOINT": "http://buildkite.invalid/v3"}
    with StackProcesses(fake, tmp_path, agent_path("v3")) as stack:
        stack.start_scheduler()
        worker = stack.start_worker("w1", LOG_LEVEL="debug", **more)
        uuid = fake.add_job()
        worker.wait_for_line("proxyconnect", place)
        answers = all_answers(stack.url, uuid)
        settings = {"WORKER_API_SERVER": stack.url, "BUILDKITE_AGENT_PATH": stack.agent, **more}
        checked = run_script("worker.py", tmp_path, "--check", **settings)
    assert f"the agent calls it through the proxy http://{place}\n" in checked.stdout
    for text in (*worker.lines, checked.stdout, checked.stderr):
        assert leaks(text.encode(), IN_ADDRESSES) == []
    assert leaks(answers, IN_ADDRESSES) == []


@pytest.mark.parametrize(
    ("command", "name", "text"),
    [
        ("scheduler.py", "BUILDKITE_AGENT_ENDPOINT", "https://agent.buildkite.com/v3?token=PASSSECRET"),
        ("scheduler.py", "REDIS_ADDR", "redis://USERSECRET:12?PASSSECRET@h"),
        ("scheduler.py --check", "LISTEN", "http://USERSECRET:PASSSECRET@127.0.0.1:0"),
        ("scheduler.py --check", "HTTPS_PROXY", "http://USERSECRET:a/PASSSECRET@h:1"),
        ("worker.py", "BUILDKITE_AGENT_ENDPOINT", "https://USERSECRET:PASSSECRET@agent.buildkite.com/v3"),
        ("worker.py --check", "WORKER_API_SERVER", "http://USERSECRET:PASSSECRET"),
        ("worker.py --check", "all_proxy", "http://USERSECRET:a#PASSSECRET@h:1"),
        ("worker.py", "NO_PROXY", "USERSECRET:PASSSECRET@h"),
    ],
)
def test_start_with_a_secret_in_an_address_where_none_can_be_names_the_setting_alone_and_exits_78(
    command: str, name: str, text: str, tmp_path: Path
) -> None:
    script, *arguments = command.split()
    done = run_script(script, tmp_path, *arguments, STACK_API_TOKEN="x", STACK_KEY="s", **{name: text})
    assert (done.returncode, "Traceback" in done.stderr) == (78, False)
    assert f"{name}: " in done.stderr
    assert leaks((done.stdout + done.stderr).encode(), IN_ADDRESSES) == []
