"""Buildkite on loopback: the Stacks API, the agent API, a part of GraphQL, and REST's builds, over real HTTP.

It needs the standard library alone; GraphQL is answered by graphql-core, from the schema in buildkite.graphql.

As a program (`python tests/fake_buildkite.py --port 0 --jobs 5`) it prints where it listens and serves
until it is killed. In a test it is a context manager:

    with FakeBuildkite() as fake:
        uuid = fake.add_job(rules=["queue=default"], command="echo hi")
        ...  # point a scheduler, a worker or a real buildkite-agent at fake.url and fake.token
        fake.wait_for(lambda: fake.jobs[uuid].state == "finished")

A job's life, as Buildkite tells it:

    scheduled ──reserve (stack)──▶ reserved ──acquire (agent)──▶ accepted ─start─▶ running ─finish─▶ finished
        ▲                             │
        └───── the reservation lapses ┘      cancel_job: canceled at once, or canceling until its agent ends

What a test does with it:
    act as a user       add_pipeline, add_build, add_job, cancel_job, pause_queue, resume_queue
    act as Buildkite    lapse, reserve_for, set_state, lose_agent, replace_token
    break things        set_fault, clear_faults, release_hangs (see `Fault`), close and start again
    look                jobs, builds, pipelines, agents, stacks, calls, calls_to, wait_for, dump

Sections: Vocabulary, Faults, The fake, Stacks API, Agent API, GraphQL, REST, HTTP, Command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gzip
import heapq
import json
import math
import re
import socket
import struct
import sys
import threading
import time
import traceback
import uuid as uuids
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

with contextlib.suppress(ImportError):  # without it GraphQL is not answered
    import graphql
    from graphql import GraphQLError

#: Most jobs in one page, one reservation, one get-states, one token request; notifications in one request.
BATCH_LIMIT = 1000
#: Seconds a reservation or a job acquisition token lasts unless the stack says otherwise, and at most.
LIFETIME_DEFAULT, LIFETIME_MAX = 900, 3600
#: Bytes of a finish detail, characters of a notification, notifications of one job.
FINISH_DETAIL_MAX, NOTIFICATION_DETAIL_MAX, NOTIFICATIONS_PER_JOB = 4096, 256, 100
#: Seconds after its end in which a job still takes notifications.
NOTIFICATION_GRACE = 300
#: Bytes of one log chunk before compression. Zero would make an agent start a job and never finish it.
CHUNK_MAX = 102_400
#: Names that stand for the cluster's default queue.
DEFAULT_QUEUE_ALIASES = ("_default", "__default__")
#: Stands for the queue of jobs and agents outside of any cluster: the Stacks API shows nothing of them.
UNCLUSTERED = "(unclustered)"
ORGANIZATION = "acme"
#: What one GraphQL query may ask for, and how deep; how many objects a connection gives where the query does not say.
QUERY_POINTS, QUERY_DEPTH, CONNECTION_DEFAULT = 50_000, 15, 500
#: Points that the answers may cost in GRAPHQL_SECONDS: those of the organization, and of the token's user.
ORGANIZATION_POINTS, USER_POINTS, GRAPHQL_SECONDS = 20_000, 5_000, 300

# --- Vocabulary -------------------------------------------------------------------------------------------

FREE = frozenset({"scheduled", "reserved"})
NOT_READY = frozenset("pending waiting limiting limited platform_limiting platform_limited blocked unblocked".split())
WITH_AGENT = frozenset("assigned accepted running canceling timing_out".split())
OVER = frozenset(
    "finished canceled timed_out expired skipped broken waiting_failed blocked_failed unblocked_failed".split()
)


@dataclass
class FakeJob:
    """One job as Buildkite knows it. Times are seconds on the fake's clock."""

    uuid: str
    queue: str
    rules: list[str]
    priority: int
    scheduled_at: float
    created_at: float
    #: The order in which jobs were added; it settles equal `scheduled_at`.
    number: int
    command: str
    env: dict[str, str]
    pipeline: str
    build_number: int
    branch: str
    step_key: str | None
    state: str = "scheduled"
    reserved_by: str | None = None
    reservation_expires_at: float | None = None
    agent_id: str | None = None
    agent_name: str | None = None
    exit_status: int | None = None
    signal: str | None = None
    signal_reason: str | None = None
    finish_detail: str | None = None
    finished_at: float | None = None
    notifications: list[dict[str, Any]] = field(default_factory=list)
    chunks: dict[int, bytes] = field(default_factory=dict)
    #: What happened: (time, what, who), oldest first.
    history: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What the agent uploaded, in order; an agent's own time stamps (ESC _bk;t=… BEL) are left in."""
        return b"".join(chunk for _, chunk in sorted(self.chunks.items())).decode(errors="replace")

    def happened(self, what: str) -> int:
        """How often `what` occurs in the history."""
        return sum(event == what for _, event, _ in self.history)


@dataclass
class FakePipeline:
    slug: str
    #: The order in which pipelines were added.
    number: int
    clustered: bool = True

    @property
    def uuid(self) -> str:
        return stable_uuid(self.slug)


@dataclass
class FakeBuild:
    """One build of a pipeline. Its jobs are those that name the pipeline and the number."""

    pipeline: str
    number: int
    created_at: float
    #: The order in which builds were added.
    order: int
    branch: str = "main"
    commit: str = "HEAD"
    message: str = ""
    env: dict[str, str] = field(default_factory=dict)
    meta_data: dict[str, str] = field(default_factory=dict)
    #: What made it: "api", "webhook", "schedule", "ui".
    source: str = "webhook"
    #: If set: the build's state, independent of its jobs.
    forced_state: str | None = None
    #: The time from which lists, look-ups and GraphQL show it.
    shown_at: float = 0.0

    @property
    def uuid(self) -> str:
        return stable_uuid(f"{self.pipeline}/{self.number}")

    @property
    def web_url(self) -> str:
        return f"https://buildkite.com/{ORGANIZATION}/{self.pipeline}/builds/{self.number}"


@dataclass
class FakeAgent:
    """One registration. A new process, or the same one that registers again, is a new agent."""

    id: str
    name: str
    version: str
    hostname: str
    tags: list[str]
    queue: str
    #: Set when it registered with a job acquisition token: the one job it may acquire.
    only_job: str | None
    last_heartbeat: float
    connected: bool = False
    disconnected: bool = False
    lost: bool = False
    job: str | None = None


@dataclass
class FakeStack:
    """One registered stack key."""

    id: str
    key: str
    type: str
    queue_key: str
    metadata: dict[str, str]
    last_connected_on: float | None = None


@dataclass(frozen=True)
class Token:
    """The use of a token: `kind` is cluster, unclustered, job-acquisition, access, job, api, unknown or none."""

    kind: str
    #: The agent's id (access) or the job's uuid (job, job-acquisition).
    subject: str = ""
    #: Only of job-acquisition: the reserving stack and the end of the token's life.
    stack: str = ""
    expires_at: float = math.inf


@dataclass
class Call:
    """One request, recorded when it arrives; `status` stays None while, or if, it is not answered."""

    at: float
    endpoint: str
    method: str
    path: str
    stack_key: str | None
    #: The kind of token presented. Its value is in no record.
    token: str
    headers: dict[str, str]
    json: Any = None
    status: int | None = None


@dataclass
class Request:
    """A request as the API functions see it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    query: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    endpoint: str = "unknown"
    token: Token = Token("none")

    @property
    def key(self) -> str | None:
        """The stack key that the request names, if any."""
        if self.endpoint == "register":
            with contextlib.suppress(ApiError):
                return str(self.object().get("key"))
        return self.params.get("key")

    def object(self) -> dict[str, Any]:
        """The JSON object in the body."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            raise ApiError(400, "the request body is not JSON") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the request body is not a JSON object")
        return value


@dataclass
class Reply:
    """`body` is sent as JSON, bytes as they are, None not at all."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class ApiError(Exception):
    """An answer that refuses: `{"message": …}` and whatever else `body` holds."""

    def __init__(self, status: int, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.reply = Reply(status, {"message": message, **(body or {})})


# --- Faults -----------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A fault for requests to `endpoint`: a name in `ROUTES`, or "stacks", "agent", or "*"."""

    endpoint: str
    #: Answer with this status, without processing the request.
    status: int | None = None
    #: The answer: a JSON value, bytes, or a callable that gets the request. Alone it comes with status 200.
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    #: 200 with a page of HTML.
    garbage: bool = False
    #: Delay the request by so many seconds (`math.inf`: until `release_hangs`), and then process
    #: it, unless the client has disconnected by then.
    hang: float = 0
    #: Process it, then delay the answer by so many seconds.
    delay: float = 0
    #: Reset the connection instead of processing the request.
    reset: bool = False
    #: Process the request, then reset the connection: the answer is lost.
    drop_after: bool = False
    #: Send the answer's body byte by byte, so many seconds apart.
    trickle: float = 0
    #: How many requests it hits; None: until `clear_faults`.
    times: int | None = None
    #: Only requests for which match(stack key or None, request) is true.
    match: Callable[[str | None, Request], object] | None = None

    def hits(self, request: Request) -> bool:
        group = ROUTES[request.endpoint].group if request.endpoint in ROUTES else ""
        if self.endpoint not in ("*", group, request.endpoint) or self.times == 0:
            return False
        return self.match is None or bool(self.match(request.key, request))

    def reply(self, request: Request) -> Reply | None:
        """The answer that replaces the real one, if any."""
        if self.garbage:
            return Reply(200, b"<html><body>upstream connect error</body></html>", {"Content-Type": "text/html"})
        if self.status is None and self.body is None:
            return None
        body = self.body(request) if callable(self.body) else self.body
        if body is None:
            body = {"message": f"fault set on {self.endpoint}"}
        return Reply(self.status or 200, body, dict(self.headers))


# --- The fake ---------------------------------------------------------------------------------------------


class FakeBuildkite:
    """One organization with one cluster, and with pipelines outside of it. One condition guards everything, and is
    notified at every change.

    clock        the clock for reservations, tokens and lost agents; rate limits use real time
    rate_limits  enforce them; if off, the headers are still sent
    queues       the queue keys that exist; None: every one that is asked for
    lost_after   seconds without a heartbeat after which a busy agent is lost; None: only by `lose_agent`
    on_event     gets every line of every job's history, as (job, what, who)
    """

    def __init__(  # noqa: PLR0913 - options, all with a default, all by name
        self,
        *,
        token: str = "bkct_test",
        api_token: str = "bkua_test",
        unclustered_token: str = "bkut_test",
        port: int = 0,
        clock: Callable[[], float] = time.time,
        rate_limits: bool = True,
        stack_limit: int = 30,
        default_queue: str = "default",
        queues: Iterable[str] | None = None,
        lost_after: float | None = None,
        on_event: Callable[[FakeJob, str, str], None] | None = None,
    ) -> None:
        self.token, self.api_token, self.port, self.clock = token, api_token, port, clock
        #: The registration token of agents outside of the cluster.
        self.unclustered_token = unclustered_token
        self.rate_limits, self.stack_limit = rate_limits, stack_limit
        self.default_queue, self.lost_after, self.on_event = default_queue, lost_after, on_event
        self.queues = None if queues is None else set(queues)
        self.changed = threading.Condition()  # guards everything below
        self.agents: dict[str, FakeAgent] = {}
        self.stacks: dict[str, FakeStack] = {}
        self.calls: list[Call] = []
        self.paused: set[str] = set()
        #: The answer to every ping of an agent; {"action": "pause"} pauses it.
        self.ping: dict[str, Any] = {}
        self.errors: list[str] = []
        self.tokens = {token: Token("cluster"), api_token: Token("api"), unclustered_token: Token("unclustered")}
        #: The token's scopes in REST.
        self.api_scopes = {"read_builds", "write_builds"}
        #: The queue and command of the one job that a build made by REST has; None: it has none.
        self.build_queue = default_queue
        self.build_command: str | None = None
        #: Seconds after which such a build is shown.
        self.build_delay = 0.0
        self.pipelines: dict[str, FakePipeline] = {}
        #: By pipeline and number.
        self.all_builds: dict[tuple[str, int], FakeBuild] = {}
        #: GraphQL points used since `points_since`; and the limits, by header name.
        self.points_used, self.points_since = 0, 0.0
        self.points = {"RateLimit": ORGANIZATION_POINTS, "RateLimit-User": USER_POINTS}
        #: Of each queue the jobs in state `scheduled`, oldest first: (scheduled_at, number, uuid).
        self.waiting: defaultdict[str, list[tuple[float, int, str]]] = defaultdict(list)
        self.all_jobs: dict[str, FakeJob] = {}
        #: Seconds that a reader of the metrics must wait before the next read.
        self.metrics_poll_seconds = 10
        self._faults: list[Fault] = []
        #: (reservation_expires_at, uuid); entries that were renewed meanwhile are skipped.
        self._deadlines: list[tuple[float, str]] = []
        self._windows: defaultdict[tuple[str, str], deque[float]] = defaultdict(deque)
        self._released = threading.Event()
        self._server: Server | None = None

    # Serving

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self.errors and kind is None:
            raise AssertionError("the fake itself failed:\n" + "\n".join(self.errors))

    @property
    def url(self) -> str:
        """What BUILDKITE_AGENT_ENDPOINT takes."""
        return f"http://127.0.0.1:{self.port}/v3"

    @property
    def rest_url(self) -> str:
        """What BUILDKITE_API_ENDPOINT takes, with `api_token` as BUILDKITE_API_TOKEN."""
        return f"http://127.0.0.1:{self.port}/v2"

    @property
    def graphql_url(self) -> str:
        """What BUILDKITE_GRAPHQL_ENDPOINT takes, with `api_token` as BUILDKITE_API_TOKEN."""
        return f"http://127.0.0.1:{self.port}/graphql/v1"

    def start(self) -> None:
        """Listen; after `close`, on the same port and with the same data."""
        self._server = Server(self, self.port)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop listening and break every connection; delayed requests are not processed any more."""
        if self._server is not None:
            self._server.closed = True
            self.release_hangs()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    # As a user

    def add_pipeline(self, slug: str, *, clustered: bool = True) -> FakePipeline:
        """Add a pipeline, in the cluster or outside of it; or return the one with that slug."""
        with self.changed:
            return self.pipelines.setdefault(slug, FakePipeline(slug, len(self.pipelines), clustered))

    def add_build(self, pipeline: str, number: int | None = None, **fields: Any) -> FakeBuild:
        """Add a build, by default with the next number; `fields` are FakeBuild's. Its pipeline is made if missing."""
        with self.changed:
            self.add_pipeline(pipeline)
            if number is None:
                number = 1 + max((n for slug, n in self.all_builds if slug == pipeline), default=0)
            build = FakeBuild(pipeline, number, self.clock(), len(self.all_builds), **fields)
            self.all_builds[pipeline, number] = build
            self.changed.notify_all()
            return build

    def add_job(  # noqa: PLR0913 - a job's fields, all with a default
        self,
        queue: str = "default",
        rules: Iterable[str] | None = None,
        priority: int = 0,
        scheduled_at: float | None = None,
        command: str = "echo hi",
        *,
        env: dict[str, str] | None = None,
        uuid: str | None = None,
        pipeline: str = "demo",
        build_number: int = 1,
        branch: str = "main",
        step_key: str | None = None,
        state: str = "scheduled",
    ) -> str:
        """Upload a job and return its uuid. Without `rules` it only has a rule for its queue.

        Its pipeline and build are made if missing. A job of a pipeline outside of the cluster
        has a queue only in its rules.
        """
        with self.changed:
            now = self.clock()
            uuid, scheduled_at = uuid or str(uuids.uuid4()), now if scheduled_at is None else scheduled_at
            rules = [f"queue={queue}"] if rules is None else list(rules)
            what = (command, dict(env or {}), pipeline, build_number, branch, step_key, "")
            number = len(self.all_jobs)
            if (pipeline, build_number) not in self.all_builds:
                self.add_build(pipeline, build_number, branch=branch)
            real_queue = self.real_queue(queue) if self.pipelines[pipeline].clustered else UNCLUSTERED
            job = FakeJob(uuid, real_queue, rules, priority, scheduled_at, now, number, *what)
            self.all_jobs[job.uuid] = job
            self.move(job, state, "added", job.queue)
            return job.uuid

    def cancel_job(self, uuid: str) -> str:
        """Cancel as a user would, and return the new state. A job that is over does not change."""
        with self.changed:
            job = self.all_jobs[uuid]
            if job.state in WITH_AGENT:
                self.move(job, "canceling", "cancel_requested", "user")
            elif job.state not in OVER:
                self.move(job, "canceled", "canceled", "user")
            return job.state

    def pause_queue(self, queue: str) -> None:
        with self.changed:
            self.paused.add(self.real_queue(queue))

    def resume_queue(self, queue: str) -> None:
        with self.changed:
            self.paused.discard(self.real_queue(queue))

    # As Buildkite

    def lapse(self, uuid: str) -> None:
        """End the job's reservation now, whatever the clock says."""
        with self.changed:
            job = self.all_jobs[uuid]
            if job.state != "reserved":
                raise ValueError(f"job {uuid} is {job.state}, not reserved")
            self.move(job, "scheduled", "reservation_lapsed", job.reserved_by or "")

    def reserve_for(self, uuid: str, stack: str, seconds: float = LIFETIME_DEFAULT) -> None:
        """Reserve the job, whatever its state, for a stack that need not be registered."""
        with self.changed:
            self.reserve(self.all_jobs[uuid], stack, seconds)

    def set_state(self, uuid: str, state: str) -> None:
        """Force any state word, known or not."""
        with self.changed:
            self.move(self.all_jobs[uuid], state, "state_forced", state)

    def lose_agent(self, uuid: str) -> None:
        """Declare the agent of this job lost: the job ends with exit status -1."""
        with self.changed:
            job = self.all_jobs[uuid]
            if job.agent_id is None or job.state not in WITH_AGENT:
                raise ValueError(f"job {uuid} is {job.state}: no agent to lose")
            self.agents[job.agent_id].lost = True
            job.exit_status = -1
            self.move(job, "finished", "agent_lost", job.agent_name or "")

    def replace_token(self, token: str) -> None:
        """Revoke the cluster token and make this one good instead."""
        with self.changed:
            del self.tokens[self.token]
            self.token = token
            self.tokens[token] = Token("cluster")

    # Breaking things

    def set_fault(self, endpoint: str, **how: Any) -> None:
        """Break an endpoint; `how` is `Fault`'s fields. Of several faults the oldest that hits is taken."""
        if endpoint not in ("*", "stacks", "agent", *ROUTES):
            raise ValueError(f"no endpoint {endpoint!r}; there are {', '.join(ROUTES)}")
        with self.changed:
            self._faults.append(Fault(endpoint, **how))

    def clear_faults(self) -> None:
        """Remove all faults, and release delayed requests."""
        with self.changed:
            self._faults.clear()
        self.release_hangs()

    def release_hangs(self) -> None:
        """Release delayed requests."""
        with self.changed:
            released, self._released = self._released, threading.Event()
        released.set()

    # Looking

    @property
    def jobs(self) -> dict[str, FakeJob]:
        """All jobs by uuid, after handling lapsed reservations and lost agents."""
        with self.changed:
            self._look_at_the_clock()
            return self.all_jobs

    @property
    def builds(self) -> dict[tuple[str, int], FakeBuild]:
        """All builds that are shown by now, by pipeline and number."""
        with self.changed:
            now = self.clock()
            return {place: build for place, build in self.all_builds.items() if build.shown_at <= now}

    def jobs_of(self, build: FakeBuild) -> list[FakeJob]:
        place = (build.pipeline, build.number)
        return [job for job in self.all_jobs.values() if (job.pipeline, job.build_number) == place]

    def build_state(self, build: FakeBuild) -> str:
        """The state of a build: scheduled, running, failing, passed, failed, canceled, or the forced one."""
        jobs = self.jobs_of(build)
        failed = any(job.state in OVER and job.exit_status != 0 for job in jobs)
        if build.forced_state:
            return build.forced_state
        if not any(job.state in WITH_AGENT or job.state in OVER for job in jobs):
            return "scheduled"
        if not all(job.state in OVER for job in jobs):
            return "failing" if failed else "running"
        if any(job.state == "canceled" for job in jobs):
            return "canceled"
        return "failed" if failed else "passed"

    def calls_to(self, endpoint: str) -> list[Call]:
        with self.changed:
            return [call for call in self.calls if call.endpoint == endpoint]

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 30) -> Any:
        """Wait until `predicate()` is true, and return its value; it is called at every change.

        After `timeout` real seconds raises AssertionError with all jobs and the last calls. The predicate
        must only read, and make no calls: the server waits while it runs.
        """
        end = time.monotonic() + timeout
        with self.changed:
            while not (value := predicate()):
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"not so within {timeout} s\n{self.dump()}")
                self._look_at_the_clock()
                due = self._deadlines[0][0] - self.clock() if self._deadlines else left
                self.changed.wait(min(left, max(due, 0.01)))
            return value

    def dump(self, last_calls: int = 30) -> str:
        """All jobs with their history, and the last calls, to be read by a person."""
        with self.changed:
            lines = [
                f"job {job.uuid} {job.state} exit={job.exit_status}: "
                + ", ".join(f"{what} {who}" for _, what, who in job.history)
                for job in self.all_jobs.values()
            ]
            for call in self.calls[-last_calls:]:
                lines.append(f"call {call.method} {call.path} {call.stack_key or call.token} -> {call.status}")
            return "\n".join(lines)

    # What the API functions share; the condition is held

    def real_queue(self, key: str) -> str:
        return self.default_queue if key in DEFAULT_QUEUE_ALIASES else key

    def known_queue(self, key: str) -> str:
        if self.queues is not None and self.real_queue(key) not in self.queues:
            raise ApiError(404, f"queue {key} not found")
        return self.real_queue(key)

    def move(self, job: FakeJob, state: str, what: str, who: str) -> None:
        """The one place where a job's state changes."""
        waiting, place = self.waiting[job.queue], (job.scheduled_at, job.number, job.uuid)
        if job.state == "scheduled":
            del waiting[bisect_left(waiting, place)]
        if state == "scheduled":
            insort(waiting, place)
        if state != "reserved":
            job.reserved_by = job.reservation_expires_at = None
        if state in OVER:
            job.finished_at = self.clock()
            if job.agent_id is not None:
                self.agents[job.agent_id].job = None
        job.state = state
        self.note(job, what, who)

    def note(self, job: FakeJob, what: str, who: str) -> None:
        job.history.append((self.clock(), what, who))
        if self.on_event is not None:
            self.on_event(job, what, who)
        self.changed.notify_all()

    def reserve(self, job: FakeJob, stack: str, seconds: float) -> None:
        """Reserve, or extend."""
        extends = job.state == "reserved" and job.reserved_by == stack
        self.move(job, "reserved", "reservation_extended" if extends else "reserved", stack)
        job.reserved_by, job.reservation_expires_at = stack, self.clock() + seconds
        heapq.heappush(self._deadlines, (job.reservation_expires_at, job.uuid))

    def new_token(self, prefix: str, token: Token) -> str:
        value = f"{prefix}_{uuids.uuid4().hex}"
        self.tokens[value] = token
        return value

    def _look_at_the_clock(self) -> None:
        """Lapse the reservations and lose the agents whose time is over."""
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self.all_jobs[heapq.heappop(self._deadlines)[1]]
            if job.reservation_expires_at is not None and job.reservation_expires_at <= now:
                self.lapse(job.uuid)
        if self.lost_after is not None:
            for agent in self.agents.values():
                if agent.job is not None and agent.last_heartbeat + self.lost_after <= now:
                    self.lose_agent(agent.job)

    # What the HTTP part calls

    def arrive(self, request: Request) -> tuple[Call, Fault | None, threading.Event]:
        """Record a request; return its fault, and the event that releases it if it hangs."""
        with self.changed:
            kind, _, value = request.headers.get("authorization", "").partition(" ")
            if value:
                request.token = self.tokens.get(value, Token("unknown"))
                if kind != ("Bearer" if request.token.kind == "api" else "Token"):
                    request.token = Token("unknown")
            headers = request.headers | ({"authorization": f"Token [{request.token.kind}]"} if value else {})
            call = Call(
                self.clock(),
                request.endpoint,
                request.method,
                request.path,
                request.key,
                request.token.kind,
                headers,
            )
            if request.endpoint != "chunks":
                with contextlib.suppress(ValueError):
                    call.json = json.loads(request.body)
            self.calls.append(call)
            self.changed.notify_all()
            fault = next((fault for fault in self._faults if fault.hits(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            return call, fault, self._released

    def answer(self, request: Request) -> Reply:
        """Process a request."""
        headers: dict[str, str] = {}
        with self.changed:
            self._look_at_the_clock()
            try:
                route = ROUTES.get(request.endpoint)
                if route is None:
                    raise ApiError(*no_route(request.method, request.path))
                if request.token.kind not in route.tokens.split():
                    raise ApiError(401, "the token is missing, unknown or of the wrong kind")
                if route.group == "stacks":
                    self._check_stack(request, route, headers)
                reply = route.answer(self, request)
            except ApiError as error:
                reply = error.reply
            except Exception:
                # A bug of the fake's own: answered, so that nothing hangs, and raised when the test ends.
                self.errors.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
                reply = Reply(500, {"message": "the fake itself failed"})
        reply.headers = headers | reply.headers
        return reply

    def answered(self, call: Call, status: int) -> None:
        with self.changed:
            call.status = status
            self.changed.notify_all()

    def _check_stack(self, request: Request, route: Route, headers: dict[str, str]) -> None:
        """The rate limit of this endpoint and stack, which fills `headers`; then the stack's key."""
        now, window = time.monotonic(), self._windows[route.scope, request.key or ""]
        while window and window[0] <= now - 1:
            window.popleft()
        refused = len(window) >= route.per_second and self.rate_limits
        if not refused:
            window.append(now)
        headers |= {
            "RateLimit-Scope": route.scope,
            "RateLimit-Limit": str(route.per_second),
            "RateLimit-Remaining": str(max(0, route.per_second - len(window))),
            "RateLimit-Reset": "1",
        }
        if refused:
            headers["Retry-After"] = "1"
            about = {"scope": route.scope, "limit": route.per_second, "current": len(window) + 1, "reset": 1}
            raise ApiError(429, "rate limit exceeded", about)
        if request.endpoint != "register" and request.key not in self.stacks:
            raise ApiError(404, f"stack {request.key} not found")


def no_route(method: str, path: str) -> tuple[int, str]:
    if any(route.pattern.fullmatch(path) for route in ROUTES.values()):
        return 405, f"{method} is not allowed here"
    return 404, "no such path"


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stable_uuid(name: str) -> str:
    return str(uuids.uuid5(uuids.NAMESPACE_DNS, name))


# --- Stacks API -------------------------------------------------------------------------------------------


def register_stack(fake: FakeBuildkite, request: Request) -> Reply:
    body = request.object()
    key, kind, queue_key, metadata = (body.get(name) for name in ("key", "type", "queue_key", "metadata"))
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key):
        raise ApiError(422, f"key {key!r} must be 1 to 80 letters, digits, _ or -")
    if kind not in ("kubernetes", "elastic", "custom"):
        raise ApiError(422, f"type {kind!r} must be kubernetes, elastic or custom")
    if not isinstance(queue_key, str) or not queue_key:
        raise ApiError(422, "queue_key is required")
    fake.known_queue(queue_key)
    metadata = checked_metadata(metadata)
    known = fake.stacks.get(key)
    if known is None and len(fake.stacks) >= fake.stack_limit:
        raise ApiError(403, f"the organization has reached its limit of {fake.stack_limit} stacks")
    last = known.last_connected_on if known else None
    stack = FakeStack(stable_uuid(f"stack {key}"), key, kind, queue_key, metadata, last)
    fake.stacks[key] = stack
    return Reply(
        200 if known else 201,
        {
            "id": stack.id,
            "organization_uuid": stable_uuid("acme"),
            "cluster_queue_key": queue_key,
            "key": key,
            "type": kind,
            "metadata": metadata,
            "last_connected_on": None if last is None else rfc3339(last),
            "state": "connected",
        },
    )


def checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ApiError(422, "metadata is required, and an object")
    if len(metadata) > 100:
        raise ApiError(422, "metadata has more than 100 keys")
    for name, value in metadata.items():
        if len(name) > 64 or not isinstance(value, str) or len(value) > 256:
            raise ApiError(422, f"metadata {name!r}: at most 64 characters, its value a string of at most 256")
    return metadata


def deregister_stack(fake: FakeBuildkite, request: Request) -> Reply:
    del fake.stacks[request.params["key"]]
    return Reply(204)


def list_scheduled_jobs(fake: FakeBuildkite, request: Request) -> Reply:
    """Oldest `scheduled_at` first, regardless of priority. A paused queue still lists its jobs."""
    if not (queue_key := request.query.get("queue_key")):
        raise ApiError(400, "queue_key is required")
    limit = request.query.get("limit", "100")
    if not limit.isdecimal() or not 1 <= int(limit) <= BATCH_LIMIT:
        raise ApiError(400, f"limit {limit!r} must be 1 to {BATCH_LIMIT}")
    queue = fake.known_queue(queue_key)
    fake.stacks[request.params["key"]].last_connected_on = fake.clock()
    waiting = fake.waiting[queue]
    start = bisect_right(waiting, cursor_place(request.query["after"])) if request.query.get("after") else 0
    page = waiting[start : start + int(limit)]
    paused = queue in fake.paused
    return Reply(
        200,
        {
            "jobs": [listed(fake.all_jobs[uuid]) for _, _, uuid in page],
            # The documented name, and the one that Buildkite's own client reads.
            "cluster_queue": {
                "id": stable_uuid(f"queue {queue}"),
                "dispatch_paused": paused,
                "paused": paused,
            },
            "page_info": {
                "has_next_page": start + len(page) < len(waiting),
                "end_cursor": base64.b64encode(json.dumps(page[-1]).encode()).decode() if page else None,
            },
        },
    )


def cursor_place(cursor: str) -> tuple[float, int, str]:
    try:
        scheduled_at, number, uuid = json.loads(base64.b64decode(cursor, validate=True))
        return float(scheduled_at), int(number), str(uuid)
    except (ValueError, TypeError):
        raise ApiError(400, f"after {cursor!r} is not a cursor") from None


def listed(job: FakeJob) -> dict[str, Any]:
    build = f"{job.pipeline}/{job.build_number}"
    return {
        "id": job.uuid,
        "priority": job.priority,
        "agent_query_rules": job.rules,
        "scheduled_at": rfc3339(job.scheduled_at),
        "pipeline": {"slug": job.pipeline, "uuid": stable_uuid(job.pipeline)},
        "build": {"uuid": stable_uuid(build), "number": job.build_number, "branch": job.branch},
        "step": {"key": job.step_key},
    }


def job_uuids(body: dict[str, Any]) -> list[str]:
    """The request's uuids. One malformed uuid makes the whole batch fail."""
    given = body.get("job_uuids")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "job_uuids is required")
    if len(given) > BATCH_LIMIT:
        raise ApiError(422, f"job_uuids has {len(given)} members, more than {BATCH_LIMIT}")
    for index, uuid in enumerate(given):
        if not isinstance(uuid, str) or not UUID_PATTERN.fullmatch(uuid):
            raise ApiError(422, f"job_uuids[{index}] is not a uuid: {uuid!r}")
    return [uuid.lower() for uuid in given]


UUID_PATTERN = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def seconds_of(body: dict[str, Any], name: str) -> int:
    seconds = body.get(name, LIFETIME_DEFAULT)
    if type(seconds) is not int or not 1 <= seconds <= LIFETIME_MAX:
        raise ApiError(422, f"{name} {seconds!r} must be 1 to {LIFETIME_MAX}")
    return seconds


def reserve_jobs(fake: FakeBuildkite, request: Request) -> Reply:
    body, stack = request.object(), request.params["key"]
    seconds = seconds_of(body, "reservation_expiry_seconds")
    reserved, not_reserved = [], []
    for uuid in job_uuids(body):
        job = fake.all_jobs.get(uuid)
        if job is not None and job.state in FREE and job.reserved_by in (None, stack):
            fake.reserve(job, stack, seconds)
            reserved.append(uuid)
        else:
            not_reserved.append(uuid)
    return Reply(200, {"reserved": reserved, "not_reserved": not_reserved})


def find_job(fake: FakeBuildkite, request: Request) -> FakeJob:
    job = fake.all_jobs.get(request.params["uuid"])
    if job is None:
        raise ApiError(404, f"job {request.params['uuid']} not found")
    return job


def get_job(fake: FakeBuildkite, request: Request) -> Reply:
    job = find_job(fake, request)
    return Reply(200, {"id": job.uuid, "env": job_env(fake, job, "", ""), "command": job.command})


def get_states(fake: FakeBuildkite, request: Request) -> Reply:
    """Unknown uuids are left out."""
    jobs = fake.all_jobs
    return Reply(200, {"states": {uuid: jobs[uuid].state for uuid in job_uuids(request.object()) if uuid in jobs}})


def finish_by_stack(fake: FakeBuildkite, request: Request) -> Reply:
    job, body, stack = find_job(fake, request), request.object(), request.params["key"]
    detail, exit_status = body.get("detail"), body.get("exit_status", -1)
    if not isinstance(detail, str) or not detail or len(detail.encode()) > FINISH_DETAIL_MAX:
        raise ApiError(422, f"detail is required, a string of at most {FINISH_DETAIL_MAX} bytes")
    if type(exit_status) is not int:
        raise ApiError(422, f"exit_status {exit_status!r} must be an integer")
    # The documentation speaks of jobs that the stack has reserved; nothing else is known to work.
    if job.state != "reserved" or job.reserved_by != stack:
        raise ApiError(422, f"job {job.uuid} is {job.state} and cannot be finished by stack {stack}")
    job.exit_status, job.finish_detail, job.signal_reason = exit_status, detail, "stack_error"
    fake.move(job, "finished", "finish_by_stack", stack)
    return Reply(200, {})


def create_notifications(fake: FakeBuildkite, request: Request) -> Reply:
    """The good ones are kept even when others are refused. Nothing is known to work for a job that nobody has ever
    reserved."""
    given = request.object().get("notifications")
    if not isinstance(given, list):
        raise ApiError(400, "notifications is required")
    if len(given) > BATCH_LIMIT:
        raise ApiError(422, f"notifications has {len(given)} members, more than {BATCH_LIMIT}")
    errors: defaultdict[str, list[int]] = defaultdict(list)
    for index, notification in enumerate(given):
        if error := keep_notification(fake, notification):
            errors[error].append(index)
    return Reply(200, {"errors": [{"error": error, "indexes": indexes} for error, indexes in errors.items()]})


def keep_notification(fake: FakeBuildkite, notification: Any) -> str | None:
    """Store it, or return what is wrong with it."""
    if not isinstance(notification, dict):
        return "notification is not an object"
    job, now = fake.all_jobs.get(str(notification.get("job_uuid"))), fake.clock()
    if job is None:
        return "job not found"
    try:
        timestamp = datetime.fromisoformat(notification.get("timestamp") or rfc3339(now)).timestamp()
    except (TypeError, ValueError):
        return "timestamp is invalid"
    detail = str(notification.get("detail") or "")
    checks = {
        "job is not reserved": job.state == "scheduled" and not job.happened("reserved"),
        "detail is required": not detail,
        f"detail exceeds its length limit of {NOTIFICATION_DETAIL_MAX}": len(detail) > NOTIFICATION_DETAIL_MAX,
        "timestamp is in the future": timestamp > now,
        # A millisecond is what the wire's format cuts off.
        "timestamp is before the job was created": timestamp < job.created_at - 0.001,
        "job finished too long ago": (job.finished_at or now) < now - NOTIFICATION_GRACE,
        "job stack notification count exceeded": len(job.notifications) >= NOTIFICATIONS_PER_JOB,
    }
    wrong = next((error for error, holds in checks.items() if holds), None)
    if wrong is None:
        job.notifications.append({"detail": detail, "timestamp": timestamp})
        fake.changed.notify_all()
    return wrong


def issue_job_tokens(fake: FakeBuildkite, request: Request) -> Reply:
    """One token for each job that this stack holds a reservation of."""
    body, stack = request.object(), fake.stacks[request.params["key"]]
    seconds, wanted = seconds_of(body, "token_lifetime_seconds"), job_uuids(body)
    expires_at = fake.clock() + seconds
    issued, not_issued = [], []
    for uuid in wanted:
        job = fake.all_jobs.get(uuid)
        if job is not None and job.queue != fake.real_queue(stack.queue_key):
            raise ApiError(403, f"job {uuid} is not in queue {stack.queue_key} of stack {stack.key}")
    for uuid in wanted:
        job = fake.all_jobs.get(uuid)
        if job is None or job.state != "reserved" or job.reserved_by != stack.key:
            not_issued.append(uuid)
            continue
        token = fake.new_token("bkjat", Token("job-acquisition", uuid, stack.key, expires_at))
        fake.note(job, "token_issued", stack.key)
        issued.append({"job_uuid": uuid, "job_acquisition_token": token, "expires_at": rfc3339(expires_at)})
    return Reply(201, {"job_acquisition_tokens": issued, "not_issued": not_issued})


# --- Agent API --------------------------------------------------------------------------------------------


def register_agent(fake: FakeBuildkite, request: Request) -> Reply:
    body, only_job = request.object(), None
    if request.token.kind == "job-acquisition":
        only_job = request.token.subject
        job = fake.all_jobs[only_job]
        # The token ends with its reservation, which an acquisition ends too.
        if request.token.expires_at <= fake.clock() or job.reserved_by != request.token.stack:
            raise ApiError(401, "the job acquisition token has expired")
    tags = body.get("meta_data") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ApiError(422, "meta_data must be a list of strings")
    queues = [tag.removeprefix("queue=") for tag in tags if tag.startswith("queue=")]
    if len(queues) > 1:
        raise ApiError(422, "an agent of a cluster belongs to one queue")
    hostname = str(body.get("hostname", ""))
    is_clustered = request.token.kind != "unclustered"
    agent = FakeAgent(
        id=str(uuids.uuid4()),
        name=str(body.get("name") or f"agent-{len(fake.agents) + 1}").replace("%hostname", hostname),
        version=str(body.get("version", "")),
        hostname=hostname,
        tags=tags,
        queue=fake.known_queue(queues[0] if queues else fake.default_queue) if is_clustered else UNCLUSTERED,
        only_job=only_job,
        last_heartbeat=fake.clock(),
    )
    fake.agents[agent.id] = agent
    return Reply(
        200,
        {
            "id": agent.id,
            "name": agent.name,
            "access_token": fake.new_token("bkaa", Token("access", agent.id)),
            "endpoint": "",
            # Seconds. An agent panics on 0.
            "ping_interval": 1,
            "job_status_interval": 1,
            "heartbeat_interval": 1,
            "meta_data": tags,
        },
    )


def agent_of(fake: FakeBuildkite, request: Request) -> FakeAgent:
    return fake.agents[request.token.subject]


def connect_agent(fake: FakeBuildkite, request: Request) -> Reply:
    agent_of(fake, request).connected = True
    return Reply(200, {})


def disconnect_agent(fake: FakeBuildkite, request: Request) -> Reply:
    agent = agent_of(fake, request)
    agent.connected, agent.disconnected = False, True
    return Reply(200, {})


def heartbeat(fake: FakeBuildkite, request: Request) -> Reply:
    agent_of(fake, request).last_heartbeat = fake.clock()
    return Reply(200, {"sent_at": request.object().get("sent_at"), "received_at": rfc3339(fake.clock())})


def cluster_metrics(fake: FakeBuildkite, request: Request) -> Reply:
    """Waiting and running jobs, and connected agents, in the whole cluster and by queue."""
    queues = sorted(
        ({job.queue for job in fake.all_jobs.values()} | {agent.queue for agent in fake.agents.values()})
        - {UNCLUSTERED}
    )
    jobs, agents = (
        {queue: job_counts(fake, {queue}) for queue in queues},
        {queue: agent_counts(fake, {queue}) for queue in queues},
    )
    body = {
        "organization": {"slug": "acme"},
        "cluster": {"name": "test"},
        "jobs": {**job_counts(fake, set(queues)), "queues": jobs},
        "agents": {**agent_counts(fake, set(queues)), "queues": agents},
    }
    return Reply(200, body, {"Buildkite-Agent-Metrics-Poll-Duration": str(fake.metrics_poll_seconds)})


def job_counts(fake: FakeBuildkite, queues: set[str]) -> dict[str, int]:
    states = [job.state for job in fake.all_jobs.values() if job.queue in queues]
    counts = {
        "scheduled": sum(state in FREE for state in states),
        "running": sum(state in WITH_AGENT for state in states),
        "waiting": sum(state in NOT_READY for state in states),
    }
    return {**counts, "total": sum(counts.values())}


def agent_counts(fake: FakeBuildkite, queues: set[str]) -> dict[str, int]:
    here = [a for a in fake.agents.values() if a.queue in queues and a.connected and not (a.disconnected or a.lost)]
    busy = sum(agent.job is not None for agent in here)
    return {"idle": len(here) - busy, "busy": busy, "total": len(here)}


def empty_object(fake: FakeBuildkite, request: Request) -> Reply:
    """An agent treats anything but a JSON object as a broken server."""
    return Reply(200, {})


def ping(fake: FakeBuildkite, request: Request) -> Reply:
    return Reply(200, fake.ping)


def no_stream(fake: FakeBuildkite, request: Request) -> Reply:
    """Without a stream an agent falls back to GET ping for good."""
    return Reply(404, {"code": "unimplemented"}, {"Connection": "close"})


def acquire_job(fake: FakeBuildkite, request: Request) -> Reply:
    """Scheduled and reserved jobs may be acquired, by any agent and whatever its tags; the first one wins.

    An agent outside of the cluster acquires no job of the cluster, and the other way round.
    """
    agent, job = agent_of(fake, request), find_job(fake, request)
    refusal = None
    if (agent.queue == UNCLUSTERED) is not (job.queue == UNCLUSTERED):
        refusal = ApiError(404, f"No job with id {job.uuid} found")
    elif agent.only_job not in (None, job.uuid):
        refusal = ApiError(403, f"this agent may acquire job {agent.only_job} alone")
    elif job.state in NOT_READY and "x-buildkite-lock-acquire-job" in request.headers:
        refusal = ApiError(423, f"Job {job.uuid} is not yet eligible to be assigned")
    elif job.state not in FREE:
        refusal = ApiError(422, f"Job {job.uuid} is no longer eligible to be assigned an agent")
    if refusal is not None:
        fake.note(job, "acquire_rejected", agent.name)
        raise refusal
    job.agent_id, job.agent_name = agent.id, agent.name
    agent.job, agent.last_heartbeat = job.uuid, fake.clock()
    fake.move(job, "accepted", "acquired", agent.name)
    return Reply(
        200,
        {
            "id": job.uuid,
            "state": job.state,
            "env": job_env(fake, job, agent.id, agent.name),
            "chunks_max_size_bytes": CHUNK_MAX,
            "chunks_interval_seconds": 1,
            "token": fake.new_token("bkaj", Token("job", job.uuid)),
            "priority": job.priority,
        },
    )


def job_env(fake: FakeBuildkite, job: FakeJob, agent_id: str, agent_name: str) -> dict[str, str]:
    """The variables that an agent requires of a job, and those that let it run one without git or a job API socket."""
    return {
        "BUILDKITE": "true",
        "CI": "true",
        "BUILDKITE_JOB_ID": job.uuid,
        "BUILDKITE_BUILD_ID": stable_uuid(f"{job.pipeline}/{job.build_number}"),
        "BUILDKITE_BUILD_NUMBER": str(job.build_number),
        "BUILDKITE_BUILD_URL": f"{fake.url}/acme/{job.pipeline}/builds/{job.build_number}",
        "BUILDKITE_ORGANIZATION_SLUG": "acme",
        "BUILDKITE_PIPELINE_SLUG": job.pipeline,
        "BUILDKITE_PIPELINE_PROVIDER": "git",
        "BUILDKITE_REPO": f"https://git.example/{job.pipeline}.git",
        "BUILDKITE_COMMIT": "HEAD",
        "BUILDKITE_COMMIT_RESOLVED": "true",
        "BUILDKITE_BRANCH": job.branch,
        "BUILDKITE_STEP_KEY": job.step_key or "",
        "BUILDKITE_AGENT_ID": agent_id,
        "BUILDKITE_AGENT_NAME": agent_name,
        "BUILDKITE_COMMAND": job.command,
        "BUILDKITE_SKIP_CHECKOUT": "true",
        "BUILDKITE_AGENT_NO_JOB_API": "true",
        **job.env,
    }


def job_of(fake: FakeBuildkite, request: Request) -> FakeJob:
    """The job in the path, if the token is the job's own or its agent's."""
    job = find_job(fake, request)
    if request.token.subject not in (job.uuid, job.agent_id):
        raise ApiError(401, f"the token is not good for job {job.uuid}")
    return job


def start_job(fake: FakeBuildkite, request: Request) -> Reply:
    job = job_of(fake, request)
    if job.state not in WITH_AGENT:
        raise ApiError(422, f"Job {job.uuid} is {job.state} and cannot be started")
    # A job that was cancelled meanwhile is started too: its agent learns of it by asking for its state.
    fake.move(job, "running" if job.state == "accepted" else job.state, "started", job.agent_name or "")
    return Reply(200, {})


def upload_chunk(fake: FakeBuildkite, request: Request) -> Reply:
    job = job_of(fake, request)
    try:
        sequence, size = int(request.query["sequence"]), int(request.query["size"])
        zipped = request.headers.get("content-encoding") == "gzip"
        data = gzip.decompress(request.body) if zipped else request.body
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ApiError(400, f"bad chunk: {error!r}") from None
    if len(data) != size or size > CHUNK_MAX:
        raise ApiError(422, f"chunk {sequence} says {size} bytes and has {len(data)}; {CHUNK_MAX} are allowed")
    job.chunks[sequence] = data
    fake.changed.notify_all()
    return Reply(201, {})


def job_state(fake: FakeBuildkite, request: Request) -> Reply:
    job = job_of(fake, request)
    return Reply(200, {"id": job.uuid, "state": job.state})


def finish_job(fake: FakeBuildkite, request: Request) -> Reply:
    job, body = job_of(fake, request), request.object()
    if job.state not in WITH_AGENT:
        fake.note(job, "finish_rejected", job.agent_name or "")
        raise ApiError(422, f"Job {job.uuid} is {job.state} and cannot be finished")
    try:
        job.exit_status = int(body["exit_status"])
    except (KeyError, ValueError, TypeError):
        raise ApiError(422, "exit_status must be a whole number, written as a string") from None
    job.signal, job.signal_reason = body.get("signal"), body.get("signal_reason")
    state = {"canceling": "canceled", "timing_out": "timed_out"}.get(job.state, "finished")
    fake.move(job, state, "finished", job.agent_name or "")
    return Reply(200, {})


# --- GraphQL ----------------------------------------------------------------------------------------------


def answer_graphql(fake: FakeBuildkite, request: Request) -> Reply:
    """Answer by Buildkite's own schema. Errors come within a status of 200; only points that ran out are a 429."""
    body = request.object()
    variables = body.get("variables") or {}
    try:
        document = read_query(str(body.get("query")))
        requested = points_of(document, variables)
    except GraphQLError as error:
        return Reply(200, {"errors": [error.formatted]}, points_told(fake))
    if requested > QUERY_POINTS:
        message = f"Query has complexity of {requested}, which exceeds max complexity of {QUERY_POINTS}"
        return Reply(200, {"errors": [{"message": message}]}, points_told(fake))
    if fake.clock() >= fake.points_since + GRAPHQL_SECONDS:
        fake.points_used, fake.points_since = 0, fake.clock()
    if fake.rate_limits and fake.points_used >= min(fake.points.values()):
        told = points_told(fake) | {"RateLimit-Complexity-Requested": str(requested)}
        return Reply(429, {"errors": [{"message": "Your complexity limit is exceeded. Try again later."}]}, told)
    result = graphql.execute_sync(
        graphql_schema(), document, query_node(fake), variable_values=variables, context_value=fake
    )
    actual = sum(map(objects_in, (result.data or {}).values()))
    fake.points_used += actual
    told = {"RateLimit-Complexity-Requested": str(requested), "RateLimit-Complexity-Actual": str(actual)}
    for each in result.errors or ():
        if each.original_error and not isinstance(each.original_error, GraphQLError):
            raise each.original_error
    return Reply(200, result.formatted, points_told(fake) | told)


def points_told(fake: FakeBuildkite) -> dict[str, str]:
    """The headers that say how many points are left, and when they begin anew."""
    reset = max(0, math.ceil(fake.points_since + GRAPHQL_SECONDS - fake.clock()))
    told: dict[str, str] = {}
    for name, points in fake.points.items():
        left = max(0, points - fake.points_used)
        told |= {f"{name}-Limit": str(points), f"{name}-Remaining": str(left), f"{name}-Reset": str(reset)}
    return told


def objects_in(data: Any) -> int:
    """What an answer costs: a point for each object in it."""
    if isinstance(data, list):
        return sum(map(objects_in, data))
    return 1 + sum(map(objects_in, data.values())) if isinstance(data, dict) else 0


@functools.cache
def graphql_schema() -> Any:
    return graphql.build_schema((Path(__file__).parent / "buildkite.graphql").read_text())


@functools.lru_cache(maxsize=100)
def read_query(query: str) -> Any:
    """The query; GraphQLError: it is not valid."""
    document = graphql.parse(query)
    for error in graphql.validate(graphql_schema(), document):
        raise error
    return document


def points_of(document: Any, variables: dict[str, Any]) -> int:
    """The points that a query asks for; GraphQLError: it is too deep."""
    costs = [cost_of(node, variables, 0, 1) for node in document.definitions]
    if (depth := max(depth for _, depth in costs)) > QUERY_DEPTH:
        raise GraphQLError(f"Query has depth of {depth}, which exceeds max depth of {QUERY_DEPTH}")
    return sum(points for points, _ in costs)


def cost_of(parent: Any, variables: dict[str, Any], depth: int, size: int) -> tuple[int, int]:
    """The points of what is asked of a node of the query, and its depth.

    An object costs one, and in a connection as often as it may come. `size`: how many edges the connection gives.
    """
    points, deepest = 0, depth
    for node in parent.selection_set.selections if parent.selection_set else ():
        if isinstance(node, graphql.InlineFragmentNode):
            inner, deep = cost_of(node, variables, depth, size)
        elif not node.selection_set:
            inner, deep = 0, depth + 1
        else:
            first = next((each.value for each in node.arguments or () if each.name.value == "first"), None)
            given = (
                variables.get(first.name.value) if isinstance(first, graphql.VariableNode) else first and first.value
            )
            inner, deep = cost_of(node, variables, depth + 1, int(given or CONNECTION_DEFAULT))
            inner = (inner + 1) * (size if node.name.value == "edges" else 1)
        points, deepest = points + inner, max(deepest, deep)
    return points, deepest


def node_id(kind: str, uuid: str) -> str:
    return base64.b64encode(f"{kind}---{uuid}".encode()).decode()


def enum_of(word: str) -> str:
    return word.upper()


def query_node(fake: FakeBuildkite) -> dict[str, Any]:
    """The root of all queries and mutations. A value that can be called is a field with arguments."""
    return {
        "organization": lambda info, slug=None, uuid=None: (
            organization_node(fake) if ORGANIZATION == slug or stable_uuid(ORGANIZATION) == uuid else None
        ),
        "pipeline": lambda info, slug=None, uuid=None: next(
            (
                pipeline_node(fake, each)
                for each in fake.pipelines.values()
                if f"{ORGANIZATION}/{each.slug}" == slug or each.uuid == uuid
            ),
            None,
        ),
        "build": lambda info, slug=None, uuid=None: next(
            (
                build_node(fake, each)
                for each in fake.builds.values()
                if f"{ORGANIZATION}/{each.pipeline}/{each.number}" == slug or each.uuid == uuid
            ),
            None,
        ),
        "job": lambda info, uuid: job_node(fake, fake.all_jobs[uuid]) if uuid in fake.all_jobs else None,
        "node": lambda info, id: any_node(fake, id),
        "viewer": {"__typename": "Viewer", "id": node_id("Viewer", stable_uuid("viewer"))},
        "jobTypeCommandCancel": lambda info, input: cancel_by_graphql(fake, input),
    }


def any_node(fake: FakeBuildkite, id: str) -> dict[str, Any] | None:
    """The job, organization, pipeline or build of that id."""
    try:
        kind, _, uuid = base64.b64decode(id).decode().partition("---")
    except ValueError:
        return None
    match kind:
        case "JobTypeCommand" if uuid in fake.all_jobs:
            return job_node(fake, fake.all_jobs[uuid])
        case "Organization" if uuid == stable_uuid(ORGANIZATION):
            return organization_node(fake)
        case "Pipeline":
            return next((pipeline_node(fake, each) for each in fake.pipelines.values() if each.uuid == uuid), None)
        case "Build":
            return next((build_node(fake, each) for each in fake.builds.values() if each.uuid == uuid), None)
    return None


def cancel_by_graphql(fake: FakeBuildkite, input: dict[str, Any]) -> dict[str, Any]:
    job = fake.all_jobs.get(base64.b64decode(input["id"]).decode().removeprefix("JobTypeCommand---"))
    if job is None or job.state in OVER:
        raise GraphQLError("No such job" if job is None else "This job can't be canceled")
    fake.cancel_job(job.uuid)
    return {"clientMutationId": input.get("clientMutationId"), "jobTypeCommand": job_node(fake, job)}


def organization_node(fake: FakeBuildkite) -> dict[str, Any]:
    def jobs(info: Any, clustered: bool = True, **args: Any) -> dict[str, Any]:
        found = [job for job in fake.all_jobs.values() if (job.queue != UNCLUSTERED) is clustered]
        return job_connection(fake, found, **args)

    def pipelines(info: Any, clustered: bool = True, **args: Any) -> dict[str, Any]:
        found = {each.number: each for each in fake.pipelines.values() if each.clustered is clustered}
        return connection(found, functools.partial(pipeline_node, fake), **args)

    return {
        "__typename": "Organization",
        "id": node_id("Organization", stable_uuid(ORGANIZATION)),
        "uuid": stable_uuid(ORGANIZATION),
        "slug": ORGANIZATION,
        "name": ORGANIZATION.title(),
        "jobs": jobs,
        "pipelines": pipelines,
    }


def pipeline_node(fake: FakeBuildkite, pipeline: FakePipeline) -> dict[str, Any]:
    def jobs(info: Any, **args: Any) -> dict[str, Any]:
        return job_connection(fake, [job for job in fake.all_jobs.values() if job.pipeline == pipeline.slug], **args)

    def builds(info: Any, **args: Any) -> dict[str, Any]:
        return build_connection(fake, [each for each in fake.builds.values() if each.pipeline == pipeline.slug], **args)

    return {
        "__typename": "Pipeline",
        "id": node_id("Pipeline", pipeline.uuid),
        "uuid": pipeline.uuid,
        "slug": pipeline.slug,
        "name": pipeline.slug.title(),
        "archived": False,
        "defaultBranch": "main",
        "url": f"https://buildkite.com/{ORGANIZATION}/{pipeline.slug}",
        "cluster": None if not pipeline.clustered else {"id": "c", "uuid": stable_uuid("cluster"), "name": "test"},
        "organization": lambda info: organization_node(fake),
        "jobs": jobs,
        "builds": builds,
    }


def build_node(fake: FakeBuildkite, build: FakeBuild) -> dict[str, Any]:
    def jobs(info: Any, **args: Any) -> dict[str, Any]:
        return job_connection(fake, fake.jobs_of(build), **args)

    def meta_data(info: Any, first: int = CONNECTION_DEFAULT, last: int | None = None) -> dict[str, Any]:
        pairs = dict(enumerate(build.meta_data.items()))
        return connection(pairs, lambda pair: {"key": pair[0], "value": pair[1]}, first=first)

    return {
        "__typename": "Build",
        "id": node_id("Build", build.uuid),
        "uuid": build.uuid,
        "number": build.number,
        "branch": build.branch,
        "commit": build.commit,
        "message": build.message,
        "env": [f"{name}={value}" for name, value in build.env.items()],
        "createdAt": rfc3339(build.created_at),
        "scheduledAt": rfc3339(build.created_at),
        "state": lambda info: enum_of(fake.build_state(build)),
        "url": build.web_url,
        "pipeline": lambda info: pipeline_node(fake, fake.pipelines[build.pipeline]),
        "organization": lambda info: organization_node(fake),
        "jobs": jobs,
        "metaData": meta_data,
    }


def job_node(fake: FakeBuildkite, job: FakeJob) -> dict[str, Any]:
    build = fake.all_builds[job.pipeline, job.build_number]
    return {
        "__typename": "JobTypeCommand",
        "id": node_id("JobTypeCommand", job.uuid),
        "uuid": job.uuid,
        "state": enum_of(job.state),
        "label": job.step_key,
        "command": job.command,
        "env": lambda info: [f"{name}={value}" for name, value in job_env(fake, job, "", "").items()],
        "agentQueryRules": job.rules,
        "priority": {"number": job.priority},
        "createdAt": rfc3339(job.created_at),
        "scheduledAt": rfc3339(job.scheduled_at),
        "runnableAt": None,
        "finishedAt": None if job.finished_at is None else rfc3339(job.finished_at),
        "exitStatus": None if job.exit_status is None else str(job.exit_status),
        "signal": job.signal,
        "passed": job.exit_status == 0,
        "softFailed": False,
        "retried": False,
        "retriesCount": 0,
        "step": {"__typename": "StepCommand", "key": job.step_key, "uuid": stable_uuid(f"step {job.step_key}")},
        "url": f"{build.web_url}#{job.uuid}",
        "build": lambda info: build_node(fake, build),
        "pipeline": lambda info: pipeline_node(fake, fake.pipelines[job.pipeline]),
        "clusterQueue": None if job.queue == UNCLUSTERED else {"key": job.queue, "dispatchPaused": False},
    }


def job_connection(
    fake: FakeBuildkite,
    jobs: Iterable[FakeJob],
    state: list[str] | None = None,
    type: list[str] | None = None,
    agentQueryRules: list[str] | None = None,  # noqa: N803  the schema's name
    order: str = "RECENTLY_CREATED",
    **args: Any,
) -> dict[str, Any]:
    """All jobs here are command jobs."""
    found = {
        job.number: job
        for job in jobs
        if (state is None or enum_of(job.state) in state)
        and (type is None or "COMMAND" in type)
        and set(agentQueryRules or ()) <= set(job.rules)
    }
    return connection(found, functools.partial(job_node, fake), **args)


def build_connection(  # noqa: PLR0913, PLR0917  the schema's arguments
    fake: FakeBuildkite,
    builds: Iterable[FakeBuild],
    state: list[str] | None = None,
    branch: list[str] | None = None,
    commit: list[str] | None = None,
    metaData: list[str] | None = None,  # noqa: N803
    createdAtFrom: str | None = None,  # noqa: N803
    **args: Any,
) -> dict[str, Any]:
    """`metaData` filters by "key:value"."""
    since = datetime.fromisoformat(createdAtFrom).timestamp() if createdAtFrom else 0.0
    found = {
        build.order: build
        for build in builds
        if (state is None or enum_of(fake.build_state(build)) in state)
        and (branch is None or build.branch in branch)
        and (commit is None or build.commit in commit)
        and build.created_at >= since
        and {*(metaData or ())} <= {f"{name}:{value}" for name, value in build.meta_data.items()}
    }
    return connection(found, functools.partial(build_node, fake), **args)


def connection(
    found: dict[int, Any], node: Callable[[Any], dict[str, Any]], first: int = CONNECTION_DEFAULT, **args: Any
) -> dict[str, Any]:
    """A page of a connection, newest first. `found`: each by its number, which is also what its cursor says."""
    numbers = sorted(found, reverse=True)
    after = args.get("after")
    start = next((n for n, number in enumerate(numbers) if number < int(after)), len(numbers)) if after else 0
    page = numbers[start : start + first]
    return {
        "count": len(numbers),
        "pageInfo": {
            "hasNextPage": start + len(page) < len(numbers),
            "hasPreviousPage": start > 0,
            "startCursor": str(page[0]) if page else None,
            "endCursor": str(page[-1]) if page else None,
        },
        "edges": lambda info: [{"cursor": str(number), "node": node(found[number])} for number in page],
    }


# --- REST -------------------------------------------------------------------------------------------------


def create_build(fake: FakeBuildkite, request: Request) -> Reply:
    """Make a build with one job. It is shown when `build_delay` seconds have passed; what hangs may come even later."""
    if "write_builds" not in fake.api_scopes:
        raise ApiError(403, "Forbidden. Missing required scope: write_builds")
    slug, body = request.params["pipeline"], request.object()
    if request.params["organization"] != ORGANIZATION or slug not in fake.pipelines:
        raise ApiError(404, "No pipeline found")
    texts: dict[str, Any] = {name: body.get(name) for name in ("commit", "branch", "message")}
    tables: dict[str, Any] = {name: body.get(name) or {} for name in ("env", "meta_data")}
    for name, value in texts.items():
        if not isinstance(value, str) or (not value and name != "message"):
            raise ApiError(422, "Validation Failed", {"errors": [{"field": name, "code": "missing"}]})
    for name, table in tables.items():
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise ApiError(422, f"{name} must be an object of strings")
    build = fake.add_build(slug, source="api", shown_at=fake.clock() + fake.build_delay, **texts, **tables)
    if fake.build_command is not None:
        job: dict[str, Any] = {"command": fake.build_command, "env": build.env, "branch": build.branch}
        fake.add_job(fake.build_queue, pipeline=slug, build_number=build.number, **job)
    told = {"id": build.uuid, "number": build.number, "state": fake.build_state(build), "web_url": build.web_url}
    return Reply(201, told | texts | tables)


# --- HTTP -------------------------------------------------------------------------------------------------


@dataclass
class Route:
    """One endpoint. Its name is what faults and recorded calls go by."""

    method: str
    #: With `:name` for each variable segment.
    path: str
    answer: Callable[[FakeBuildkite, Request], Reply]
    #: The kinds of token that it takes.
    tokens: str
    #: Of the Stacks API: each stack may make so many calls a second within each scope.
    scope: str = ""
    per_second: int = 0

    def __post_init__(self) -> None:
        self.pattern = re.compile(re.sub(r":(\w+)", r"(?P<\1>[^/]+)", self.path.replace(".", r"\.")))
        self.group = "stacks" if self.scope else "agent"


#: The documentation gives no limit for register and job-tokens: they get the smallest that any other has.
ROUTES = {
    name: Route(method, f"/v3/stacks{path}", answer, "cluster", scope, limit)
    for name, method, path, answer, scope, limit in (
        ("register", "POST", "/register", register_stack, "register", 10),
        ("deregister", "POST", "/:key/deregister", deregister_stack, "default", 10),
        ("list", "GET", "/:key/scheduled-jobs", list_scheduled_jobs, "list-scheduled-jobs", 10),
        ("reserve", "PUT", "/:key/scheduled-jobs/batch-reserve", reserve_jobs, "batch-reserve", 10),
        ("get-job", "GET", "/:key/jobs/:uuid", get_job, "show-job", 1000),
        ("get-states", "POST", "/:key/jobs/get-states", get_states, "batch-load-job-states", 20),
        ("finish", "POST", "/:key/jobs/:uuid/finish", finish_by_stack, "finish-job", 100),
        ("notifications", "POST", "/:key/notifications", create_notifications, "stack-notification", 200),
        (
            "job-tokens",
            "POST",
            "/:key/job-acquisition-tokens",
            issue_job_tokens,
            "job-acquisition-tokens",
            10,
        ),
    )
} | {
    "agent-register": Route("POST", "/v3/register", register_agent, "cluster unclustered job-acquisition"),
    "connect": Route("POST", "/v3/connect", connect_agent, "access"),
    "acquire": Route("PUT", "/v3/jobs/:uuid/acquire", acquire_job, "access"),
    "start": Route("PUT", "/v3/jobs/:uuid/start", start_job, "job access"),
    "chunks": Route("POST", "/v3/jobs/:uuid/chunks", upload_chunk, "job access"),
    "header-times": Route("POST", "/v3/jobs/:uuid/header_times", empty_object, "job access"),
    "job-state": Route("GET", "/v3/jobs/:uuid", job_state, "job access"),
    "agent-finish": Route("PUT", "/v3/jobs/:uuid/finish", finish_job, "job access"),
    "heartbeat": Route("POST", "/v3/heartbeat", heartbeat, "access"),
    "stream": Route("POST", "/agentedge.v1.AgentEdgeService/StreamPings", no_stream, "access none unknown"),
    "ping": Route("GET", "/v3/ping", ping, "access"),
    "disconnect": Route("POST", "/v3/disconnect", disconnect_agent, "access"),
    "metrics": Route("GET", "/v3/metrics", cluster_metrics, "cluster"),
    "graphql": Route("POST", "/graphql/v1", answer_graphql, "api"),
    "create-build": Route("POST", "/v2/organizations/:organization/pipelines/:pipeline/builds", create_build, "api"),
}


class Server(ThreadingHTTPServer):
    """A thread for each connection; all are broken when the server closes, as by a server that dies."""

    #: Connections that the kernel holds until they are accepted; the default of 5 resets a crowd of workers.
    request_queue_size = 1024
    daemon_threads = True

    def __init__(self, fake: FakeBuildkite, port: int) -> None:
        self.fake = fake
        self.connections: set[socket.socket] = set()
        self.closed = False
        super().__init__(("127.0.0.1", port), Handler)

    def server_bind(self) -> None:
        # HTTPServer would look its own name up, which a slow resolver makes slow.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET_ON_CLOSE:
            request.close()  # without the orderly end that a shutdown would be
        else:
            super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # OSError: the client has gone, or the server is closing
            self.fake.errors.append(traceback.format_exc())


#: SO_LINGER with no time to linger: close() sends RST.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, applies faults, and sends the answer."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    #: Buffered, so that an answer is one write.
    wbufsize = -1

    def do_GET(self) -> None:
        request = self.read_request()
        if request is None:
            return
        call, fault, released = self.server.fake.arrive(request)
        if fault is not None and (fault.reset or not self.hung(fault.hang, released)):
            self.reset()
            return
        reply = fault.reply(request) if fault is not None else None
        if reply is None:
            reply = self.server.fake.answer(request)
        if fault is not None:
            released.wait(fault.delay)
            if fault.drop_after:
                self.reset()
                return
        self.server.fake.answered(call, reply.status)
        self.send(reply, 0 if fault is None else fault.trickle)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def read_request(self) -> Request | None:
        """The request; None after answering one that is not HTTP."""
        parts = urlsplit(self.path)
        try:
            if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                body = self.read_chunks()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        except ValueError:
            self.close_connection = True
            self.send(Reply(400, {"message": "the request's body cannot be read"}))
            return None
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, parts.path, headers, body, dict(parse_qsl(parts.query)))
        for name, route in ROUTES.items():
            if request.method == route.method and (match := route.pattern.fullmatch(request.path)):
                request.endpoint = name
                request.params = {key: unquote(value) for key, value in match.groupdict().items()}
                break
        return request

    def read_chunks(self) -> bytes:
        """A body in chunks, down to the last trailer: Go sends even an empty one so."""
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def hung(self, seconds: float, released: threading.Event) -> bool:
        """Whether to go on after a delay: not if the server is closed or the client has disconnected."""
        if seconds == 0:
            return True
        released.wait(None if math.isinf(seconds) else seconds)
        self.connection.setblocking(False)
        try:
            return not self.server.closed and self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return not self.server.closed
        finally:
            self.connection.setblocking(True)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.close_connection = True

    def send(self, reply: Reply, trickle: float = 0) -> None:
        body = reply.body if isinstance(reply.body, bytes) else b""
        if reply.body is not None and not isinstance(reply.body, bytes):
            body = json.dumps(reply.body).encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json"} | reply.headers
        if reply.status != 204:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not trickle:
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.flush()
            time.sleep(trickle)
            self.wfile.write(bytes([byte]))

    def log_message(self, *_: object) -> None:
        """Log nothing, because `calls` records the requests."""


# --- Command line -----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="A Buildkite on loopback, to try a stack without an account.")
    parser.add_argument("--port", type=int, default=0, help="0, the default: a free one")
    parser.add_argument("--token", default="bkct_test", help="cluster agent token (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=0, help="how many demo jobs to add")
    parser.add_argument("--queue", default="default", help="queue of the demo jobs")
    parser.add_argument("--no-rate-limits", action="store_true", help="for benchmarks")
    parser.add_argument("--verbose", action="store_true", help="write what happens to each job to stderr")
    options = parser.parse_args()

    def say(job: FakeJob, what: str, who: str) -> None:
        print(f"{datetime.now():%H:%M:%S} job={job.uuid} {what} {who}", file=sys.stderr, flush=True)

    with FakeBuildkite(
        token=options.token,
        port=options.port,
        rate_limits=not options.no_rate_limits,
        on_event=say if options.verbose else None,
    ) as fake:
        print(f"listening on {fake.url}", flush=True)
        for number in range(1, options.jobs + 1):
            fake.add_job(options.queue, command=f"echo hello from job {number}", step_key=f"demo-{number}")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
