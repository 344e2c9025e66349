#!/usr/bin/env python3
"""The scheduler of a Buildkite custom stack: it reserves jobs and hands each to a worker whose tags match.

A job's life, Buildkite's words above and ours below (`JobState`):

    at Buildkite:  scheduled ─────reserve─────▶ reserved ──acquire (by the agent)──▶ running ─▶ finished
    in the store:         reserving ────▶ ready ──claim──▶ leased ────────▶ running ────────────▶ done
                              ▲                              │
                              └── release, expire, complete ─┘   (without proof that an agent had it)

Threads, and what each owns:

    main            settings, start, signals, stop
    <queue> list    L  asks Buildkite for scheduled jobs and puts them into the store as `reserving`
    <queue> reserve L  batch-reserves what is `reserving`, renews the rest, and offers what became `ready`
    <queue> states  L  asks what became of every job that is not `done`
    <queue> finish  L  ends, at Buildkite, jobs that no agent could take
    <queue> tokens  asks for the job acquisition tokens that claims wait for
    <queue> notify  tells, on the build page, where each job stands
    upkeep          watches the wall clock; L: expires leases, prunes
    metrics         asks for Buildkite's own metrics, while somebody reads ours
    peers           with Redis: takes and renews the turn to talk to Buildkite, or follows the scheduler that has it
    news            with Redis: hears what other schedulers tell, and of jobs that became ready
    offers          with Redis: offers these to the workers that wait here
    http            accepts; one more thread for each connection, on which its claim waits

Each of a queue's six talks to one endpoint of Buildkite, so one that hangs delays no other. All share the store,
whose verbs are atomic, and the dispatcher, which knows the workers that wait. Of several schedulers on one Redis one
leads at a time. What is marked L asks `Lead` at each tick, and does nothing while another scheduler leads.

The sections, in order: Settings and logs, Vocabulary, Scheduler settings, Buildkite client, Store protocol,
SQLite store, Redis store, Dispatch, Intake, HTTP API, Metrics, Main.

Start at `main`, then follow a job: `Intake.list_jobs`, `Intake.reserve_jobs`, `Dispatcher.offer`, `Store.claim`,
`Api.complete`, `Intake.look`.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import email.message
import faulthandler
import fcntl
import functools
import hashlib
import hmac
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar, cast

try:
    import prometheus_client
    import requests
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    sys.stderr.write(
        f"scheduler.py needs {error.name}: pip install -r requirements.txt, or Debian's python3-requests and "
        "python3-prometheus-client\n"
    )
    sys.exit(78)  # EX_CONFIG, as below

log = logging.getLogger("scheduler")

# --- Settings and logs ---
# (The same text in scheduler.py and worker.py: each is copied alone. A test keeps them equal.)

S = TypeVar("S")

#: sysexits.h EX_CONFIG: the settings are wrong, and a restart cannot help.
EXIT_SETTINGS = 78


class SettingsError(Exception):
    """Everything that is wrong with the settings, found in one pass: one problem a line."""


def setting(default: str | None, parse: Callable[[str], Any], text: str, *, secret: bool = False) -> Any:
    """Declare one field of a Settings class: its default as written (None: required), parser and help."""
    return dataclasses.field(metadata={"default": default, "parse": parse, "text": text, "secret": secret})


def duration(text: str) -> float:
    """Seconds, from "500ms", "2s", "5m" or "1h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration; write it like 500ms, 2s, 5m or 1h")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2]]


def in_range(parse: Callable[[str], Any], low: str, high: str) -> Callable[[str], Any]:
    """A parser that accepts what `parse` reads from `low` to `high`, both written as a user would."""

    def checked(text: str) -> Any:
        if not parse(low) <= parse(text) <= parse(high):
            raise ValueError(f"{text!r} is out of range; it may be {low} to {high}")
        return parse(text)

    return checked


def read_variable(name: str, secret: bool, environ: Mapping[str, str]) -> str:
    """The variable's text, "" when unset. A secret may be a file, <NAME>_FILE or a systemd credential, if not empty."""
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    path = environ.get(f"{name}_FILE") or (credential if os.path.exists(credential) else "")
    if not (secret and path):
        return environ.get(name, "").strip()
    with open(path, encoding="utf-8") as file:
        return file.read().strip() or environ.get(name, "").strip()


def read_settings(cls: type[S], environ: Mapping[str, str]) -> S:
    """Build `cls` from its variables; raises SettingsError with every problem at once."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, meta = field.name.upper(), field.metadata
        try:
            text = read_variable(name, meta["secret"], environ) or meta["default"]
            if text is None:
                raise ValueError(f"is required: {meta['text']}")
            values[field.name] = meta["parse"](text)
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return cls(**values)


def environment() -> dict[str, str]:
    """The process's environment over the .env file of the working directory, where there is one."""
    if not os.path.exists(".env"):
        return dict(os.environ)
    try:
        from dotenv import dotenv_values  # noqa: PLC0415  worker.py must run without it
    except ImportError:
        sys.stderr.write(".env is not read: python-dotenv is not installed\n")
        return dict(os.environ)
    return {name: text or "" for name, text in dotenv_values(".env").items()} | dict(os.environ)


def help_text(cls: type, usage: str) -> str:
    """`usage`, then every variable of `cls` with its default and what it is."""
    rows = [(f.name.upper(), f.metadata["default"], f.metadata["text"]) for f in dataclasses.fields(cls)]
    width = max(len(name) for name, _, _ in rows)
    shown = {None: "required", "": "empty"}
    lines = [f"  {name:{width}}  {text} ({shown.get(default, default)})" for name, default, text in rows]
    return usage + "\n\nSettings (environment or .env; default in brackets):\n" + "\n".join(lines) + "\n"


#: Whether standard error goes to journald; a process that logs elsewhere inherits the variable too. systemd.exec(5)
IN_JOURNAL = os.path.exists(2) and os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.stat(2))


class LogFormatter(logging.Formatter):
    """One event a line. Under journald: a priority prefix and no time; elsewhere: time and level."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += " traceback=" + json.dumps(self.formatException(record.exc_info))
        if IN_JOURNAL:
            priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            return f"<{priority}>{text}"
        return f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {text}"


def event(word: str, **fields: object) -> str:
    """A log line: a word, then key=value. A value that could break the line is written as JSON."""
    texts = ((key, str(value)) for key, value in fields.items() if value is not None)
    return " ".join([word] + [f"{k}={v if PLAIN.fullmatch(v) else json.dumps(v)}" for k, v in texts])


PLAIN = re.compile(r'[^\s"=\x00-\x1f\x7f-\x9f]+')


def complain(text: str) -> None:
    """Say what is wrong before there is a log: on standard error, for journald with the priority of an error."""
    mark = "<3>" if IN_JOURNAL else ""
    sys.stderr.write("".join(f"{mark}{line}\n" for line in text.splitlines()))


def tell_systemd(text: str) -> None:
    """Tell systemd how it goes: "READY=1", "STATUS=3 ready". Without systemd nobody is told."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.settimeout(1)
            systemd.sendto(text.encode(errors="replace"), re.sub("^@", "\0", address))
    except OSError:
        pass  # a systemd that does not listen is no reason to stop


def reload(settings: S, environ: Mapping[str, str], accept: Callable[[S], None]) -> None:
    """What SIGHUP does: give `accept` the settings, with the secrets and LOG_LEVEL read again.

    When these are wrong, or it raises SettingsError because it cannot use them, all stays as it is.
    """
    tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    copied = environ.get("CREDENTIALS_DIRECTORY")
    try:
        # systemd copied them when it started us: what it copied from may have changed since.
        needs_restart = ",".join(os.listdir(copied)) if copied else None
        fresh = read_again(settings, environ)
        accept(fresh)
    except (SettingsError, OSError, ValueError) as error:
        log.error(event("unreloaded", problem=error, now="the settings stay as they were"))
    else:
        level: str = fresh.log_level  # type: ignore[attr-defined]
        log.setLevel(level.upper())
        log.info(event("reloaded", log_level=level, needs_restart=needs_restart))
    tell_systemd("READY=1")


def read_again(settings: S, environ: Mapping[str, str]) -> S:
    """The secrets as they are now, and LOG_LEVEL from SETTINGS_FILE: nobody can change a process's environment."""
    path: str = settings.settings_file  # type: ignore[attr-defined]
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            levels = re.findall(r"^\s*LOG_LEVEL=[\"']?(\w+)", file.read(), re.MULTILINE)
        environ = {**environ, "LOG_LEVEL": levels[-1]} if levels else environ
    fresh = read_settings(type(settings), environ)
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    names = [field.name for field in fields if field.metadata["secret"] or field.name == "log_level"]
    return dataclasses.replace(settings, **{name: getattr(fresh, name) for name in names})  # type: ignore[type-var]


# (End of the text that both files share.)


# --- Vocabulary ---


class JobState(StrEnum):
    """Where a job is in our store; the words are those of the API, the metrics and the log."""

    RESERVING = "reserving"  # Buildkite must still say whether it is ours and free; never handed out
    READY = "ready"  # reserved for us, waits for a worker
    LEASED = "leased"  # one claim holds it; no agent is known to have acquired it
    RUNNING = "running"  # an agent has it at Buildkite: never handed out again, never stopped by us
    DONE = "done"  # over for us, with an Outcome


#: Every legal move; the store makes no other.
MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.RESERVING: frozenset({JobState.READY, JobState.RUNNING, JobState.DONE}),
    JobState.READY: frozenset({JobState.LEASED, JobState.RESERVING, JobState.RUNNING, JobState.DONE}),
    JobState.LEASED: frozenset({JobState.RESERVING, JobState.RUNNING, JobState.DONE}),
    # Back to `reserving` only when Buildkite lists it as scheduled again: then no agent has it.
    JobState.RUNNING: frozenset({JobState.DONE, JobState.RESERVING}),
    # A `done` job that is listed again is put again.
    JobState.DONE: frozenset({JobState.RESERVING}),
}


class Outcome(StrEnum):
    """How a job became `done`. Whether the build passed is Buildkite's to know, not ours."""

    RAN = "ran"
    DROPPED = "dropped"
    FAILED = "failed"  # we finished it at Buildkite, with a reason


class Finding(StrEnum):
    """What a look at Buildkite proved about a job."""

    ACQUIRED = "acquired"  # an agent has it
    OVER = "over"
    GONE = "gone"  # not ours, or not to be run now; the list brings it back if it should
    LAPSED = "lapsed"  # scheduled: our reservation no longer holds


#: Buildkite's job states and what they prove. `scheduled` and `reserved` prove nothing by themselves, and a
#: word that is not here counts as ACQUIRED: what we do not understand we do not start again.
#: Source: https://buildkite.com/docs/pipelines/configure/defining-steps#job-states
FINDINGS: Mapping[str, Finding | None] = {
    **dict.fromkeys(("scheduled", "reserved"), None),
    **dict.fromkeys(("assigned", "accepted", "running", "canceling", "timing_out"), Finding.ACQUIRED),
    **dict.fromkeys(
        ("pending", "waiting", "limiting", "limited", "platform_limiting", "platform_limited"), Finding.GONE
    ),
    **dict.fromkeys(("blocked", "unblocked"), Finding.GONE),
    **dict.fromkeys(("finished", "passed", "failed", "canceled", "timed_out", "expired"), Finding.OVER),
    **dict.fromkeys(("skipped", "broken", "waiting_failed", "blocked_failed", "unblocked_failed"), Finding.OVER),
}

#: End states that only a job which an agent ran can reach.
RAN_WORDS = frozenset({"finished", "passed", "failed", "timed_out"})


#: How many rule sets, and how many of workers' profiles, are kept at hand once they were read.
MANY_PROFILES = 16384


@dataclasses.dataclass(frozen=True, slots=True)
class RuleSet:
    """What a job asks of a worker: its queue, tags that must be equal, and keys that must be there."""

    queue_key: str
    tags: frozenset[str]
    keys: frozenset[str]

    @classmethod
    def of(cls, queue_key: str, agent_query_rules: Iterable[str]) -> RuleSet:
        """Read a job's agent query rules. A `queue` rule is left out: Buildkite listed by it already."""
        tags, keys = set(), set()
        for rule in agent_query_rules:
            key, _, value = (part.strip() for part in rule.partition("="))
            if key in ("queue", "*", ""):
                continue
            if value in ("", "*"):
                keys.add(key)
            else:
                tags.add(f"{key}={value}")
        return cls(queue_key, frozenset(tags), frozenset(keys))

    @classmethod
    @functools.lru_cache(maxsize=MANY_PROFILES)
    def read(cls, text: str) -> RuleSet:
        """The other way: the rule set of its text."""
        queue, *rules = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in WRITTEN_RULE.findall(text))
        return cls.of(queue.partition("=")[2], rules)

    def __str__(self) -> str:
        """One text for one rule set, whatever order its rules came in: "queue=default,arch=amd64,gpu=*"."""
        rules = sorted([*self.tags, *(f"{key}=*" for key in self.keys)])
        # A comma inside a rule must not read as two rules: jobs are indexed by this text.
        return ",".join(rule.replace("\\", "\\\\").replace(",", "\\,") for rule in (f"queue={self.queue_key}", *rules))


WRITTEN_RULE = re.compile(r"(?:\\.|[^,\\])+", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What a worker offers: the queues it serves and its tags. Workers with equal tags share one."""

    queue_keys: frozenset[str]
    tags: frozenset[str]
    keys: frozenset[str]

    @classmethod
    @functools.lru_cache(maxsize=MANY_PROFILES)
    def of(cls, query: str) -> Profile:
        """Read "queue=default,arch=amd64,linux"; ValueError for none, or for two queues."""
        tags = [tag.strip() for tag in query.split(",") if tag.strip()]
        queues = {tag.partition("=")[2].strip() for tag in tags if tag.partition("=")[0].strip() == "queue"}
        if not tags:
            raise ValueError("the query is empty; write it like queue=default,arch=amd64")
        if queues & {"", "*"}:
            raise ValueError("the query has a queue without a name; write it like queue=default")
        if len(queues) > 1:
            raise ValueError(f"the query names {len(queues)} queues: {', '.join(sorted(queues))}; a worker serves one")
        queue = queues.pop() if queues else "default"
        pairs = [tuple(part.strip() for part in tag.partition("=")[::2]) for tag in tags]
        return cls(
            # `_default` is how a stack asks for the cluster's default queue; workers just call it default.
            frozenset({"default", "_default"} if queue == "default" else {queue}),
            frozenset(f"{key}={value}" for key, value in pairs if key != "queue"),
            frozenset(key for key, _ in pairs if key != "queue"),
        )

    @classmethod
    def noted(cls, queue_keys: Iterable[str], tags: str) -> Profile:
        """What the store remembers of a worker's profile: its tags, without its queue."""
        pairs = frozenset(tags.split(",")) if tags else frozenset()
        return cls(frozenset(queue_keys), pairs, frozenset(tag.partition("=")[0] for tag in pairs))

    def __str__(self) -> str:
        """A query that reads as this profile; it needs a queue."""
        # The greatest, since "default" is also called "_default".
        return ",".join([f"queue={max(self.queue_keys)}", *sorted(self.tags)])

    def matches(self, rules: RuleSet) -> bool:
        """Whether a job with these rules may go to this worker. More tags on the worker never hurt."""
        return rules.queue_key in self.queue_keys and rules.tags <= self.tags and rules.keys <= self.keys


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """Who claims. `name` is a slot, stable over restarts; `session` is random for each process; "" if not told."""

    name: str
    session: str
    profile: Profile


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One row of the store: everything known of a job. Times are Unix seconds of the scheduler's clock."""

    uuid: str
    queue_key: str
    agent_query_rules: tuple[str, ...]
    rule_set: str
    priority: int
    scheduled_at: float
    #: Buildkite's `pipeline`, `build` and `step` objects, as they were listed.
    about: dict[str, Any]
    put_at: float
    state: JobState = JobState.RESERVING
    outcome: Outcome | None = None
    #: Why it is where it is: the last word on it.
    reason: str = ""
    reserved_at: float | None = None
    #: Buildkite's deadline, counted from when the request was sent; 0 means that a renewal is due.
    reservation_expires_at: float = 0.0
    claim: str | None = None
    worker: str | None = None
    session: str | None = None
    claimed_at: float | None = None
    touched_at: float | None = None
    lease_expires_at: float | None = None
    acquired_at: float | None = None
    completed_claim: str | None = None
    exit_status: int | None = None
    #: How often it was claimed, and how many of these claims counted as attempts that failed.
    claims: int = 0
    attempts: int = 0
    #: The last claims that ended without an agent: {worker, claimed_at, ended_at, how, exit_status, reason, counted}.
    tries: tuple[dict[str, Any], ...] = ()
    #: Set: we decided to finish it at Buildkite with this text, and are not yet sure that it was heard.
    finish_detail: str | None = None
    done_at: float | None = None
    #: The store's sequence number of the row's last change of state or holder.
    version: int = 0

    @classmethod
    def from_api(cls, queue_key: str, raw: Any, now: float) -> Job:
        """Read one entry of `scheduled-jobs`; ValueError names the field that cannot be used."""
        if not isinstance(raw, dict):
            raise ValueError(f"it is {type(raw).__name__}, not an object")
        uuid, priority, rules = raw.get("id"), raw.get("priority") or 0, raw.get("agent_query_rules") or []
        if not isinstance(uuid, str) or not UUID.fullmatch(uuid):
            raise ValueError(f"`id` is {uuid!r}, not a uuid")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**63:
            raise ValueError(f"`priority` is {priority!r}, not a 64-bit number")
        if not isinstance(rules, list) or not all(isinstance(rule, str) and writable(rule) for rule in rules):
            raise ValueError(f"`agent_query_rules` is {rules!r}, not a list of texts")
        about: dict[str, Any] = {
            name: raw.get(name) if isinstance(raw.get(name), dict) else {} for name in ("pipeline", "build", "step")
        }
        return cls(
            uuid=uuid,
            queue_key=queue_key,
            agent_query_rules=tuple(rules),
            rule_set=str(RuleSet.of(queue_key, rules)),
            priority=priority,
            scheduled_at=unix_seconds(raw.get("scheduled_at"), default=now),
            about=about,
            put_at=now,
        )

    @property
    def order(self) -> tuple[int, float, str]:
        """Its place in line: priority, highest first; then age; then the uuid."""
        return (-self.priority, self.scheduled_at, self.uuid)


UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def writable(text: str) -> bool:
    """Whether it is whole Unicode: JSON may hold half a letter (a lone surrogate), which no store can write."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def unix_seconds(text: Any, default: float) -> float:
    """Unix seconds of an RFC 3339 text; `default` for null; ValueError for anything else."""
    if text is None:
        return default
    try:
        moment = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise ValueError(f"`scheduled_at` is {text!r}, not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise ValueError(f"`scheduled_at` is {text!r}, without a time zone")
    return moment.timestamp()


def rfc3339(seconds: float | None) -> str | None:
    """The other way: "2026-11-21T07:41:00.123Z", or None."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """How many jobs of one rule set are in one state, and when the oldest of them was scheduled."""

    state: JobState
    rule_set: str
    jobs: int
    oldest: float


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A job that a worker holds, `leased` or `running`: what is wanted of thousands of them at once."""

    uuid: str
    worker: str | None
    queue_key: str
    rule_set: str
    state: JobState
    scheduled_at: float
    claimed_at: float | None
    touched_at: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """Who says to hold a job: by the id of a claim, or, without one, by the worker's name."""

    uuid: str
    claim: str | None
    worker: Worker | None = None
    #: Set: only if the job has not changed since the store's sequence number was this.
    asked: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class AgentEnd:
    """How a worker's agent ended: its exit status (not the job's) and the end of its output."""

    exit_status: int
    last_words: str = ""


class Refusal(Exception):
    """A request that cannot be served; becomes the JSON error `code` with HTTP `status`."""

    status, code = 400, "bad_request"

    def __init__(self, message: str, *, status: int = 0, code: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code = status or self.status, code or self.code
        self.headers = dict(headers or {})

    @property
    def answer(self) -> Answer:
        return Answer(self.status, {"error": self.code, "message": str(self)}, self.headers)


class UnknownJob(Refusal):
    status, code = 404, "unknown_job"


class StaleClaim(Refusal):
    """The claim that a request names does not hold the job; nothing was changed."""

    status, code = 409, "stale_claim"


class WorkerNameTaken(Refusal):
    """Another process has claimed under this worker's name since."""

    status, code = 409, "worker_name_taken"


def unknown_job(uuid: str) -> UnknownJob:
    return UnknownJob(f"job {uuid} is not known here; it may have been done for over a day")


def stale_claim(holder: Holder, state: str, reason: str) -> StaleClaim:
    named = f"claim {holder.claim}" if holder.claim else "who names no claim"
    return StaleClaim(
        f"{named} does not hold job {holder.uuid} (which is {state}: {reason}); "
        "leave a running agent alone and claim again"
    )


def changed_meanwhile(holder: Holder) -> StaleClaim:
    return StaleClaim(f"job {holder.uuid} has changed meanwhile; nothing was done")


def completed_claim(holder: Holder) -> StaleClaim:
    return StaleClaim(f"claim {holder.claim} of job {holder.uuid} was completed; claim again")


def worker_name_taken(name: str, session: str | None) -> WorkerNameTaken:
    return WorkerNameTaken(
        f"worker {name!r} was started again elsewhere and claims as session {session}; "
        "give each worker a WORKER_NAME of its own"
    )


class StoreUnavailable(Refusal):
    """The store cannot be read or written now; nothing was changed."""

    status, code = 503, "store_unavailable"


class Fenced(Exception):
    """Another scheduler has taken over what this one was about to write; nothing was changed."""


class WorkerHeld(Exception):
    """The worker gets no job before `until` (Unix seconds): its agents ended without acquiring theirs."""

    def __init__(self, until: float):
        super().__init__(f"held until {until}")
        self.until = until


class BuildkiteError(Exception):
    """A call that Buildkite did not answer as documented. `status` 0: no answer that could be read."""

    def __init__(self, message: str, status: int = 0, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Clock:
    """Unix time that nobody can set back: read once, then advanced by the monotonic clock."""

    #: Further off than this and the wall clock was set, or the machine slept.
    STEP_SECONDS = 5.0

    def __init__(self, wall_clock: Callable[[], float] | None = None) -> None:
        """`wall_clock`: one that several schedulers share, instead of this machine's."""
        self._shared = wall_clock
        self._offset = self._wall_clock() - time.monotonic()

    def _wall_clock(self) -> float:
        return self._shared() if self._shared else time.time()

    def now(self) -> float:
        return time.monotonic() + self._offset

    def follow_wall_clock(self) -> float:
        """Take over the wall clock if it is off by a step; returns by how many seconds, or 0."""
        step = self._wall_clock() - self.now()
        if abs(step) <= self.STEP_SECONDS:
            # What is a trifle on one machine is a difference between several.
            self._offset += step if self._shared else 0.0
            return 0.0
        self._offset += step
        return step


# --- Scheduler settings ---


def whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def queue_keys(text: str) -> tuple[str, ...]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"{text!r} must name each queue once; write it like default,linux")
    return tuple(keys)


def http_url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not an http or https URL")
    return text.rstrip("/")


def host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port; write it like 127.0.0.1:18888, or :18888 for every IPv4 address")
    return host.strip("[]"), int(port)


def on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"{text!r} is neither on nor off")
    return text == "on"


def log_level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise ValueError(f"{text!r} is not a log level; it may be debug, info, warning or error")
    return text


def secret(text: str) -> str:
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("holds a space or a letter beyond ASCII, so it cannot be a token")
    return text


def api_tokens(text: str) -> tuple[str, ...]:
    """One token, or several while they are exchanged: separated by commas, or one a line."""
    found = tuple(token for part in text.splitlines() for token in map(str.strip, part.split(",")) if token)
    if text and not found:
        raise ValueError("holds separators and no token; make one with: openssl rand -hex 32")
    return tuple(dict.fromkeys(map(secret, found)))


def first_label_of_host() -> str:
    return socket.gethostname().partition(".")[0]


@dataclasses.dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is, and as whom it is asked. Its text is a URL without password and options."""

    text: str
    #: Redis itself; with a `service`, the Sentinels, which know where the primary of that name is.
    hosts: tuple[tuple[str, int], ...]
    service: str
    #: What every key begins with; "": made of STACK_KEY.
    prefix: str
    #: Settings of redis-py: user, password, database and TLS; and those for the Sentinels. Both may hold a password.
    options: dict[str, Any] = dataclasses.field(repr=False)
    sentinel_options: dict[str, Any] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.text


REDIS_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^][:,@/?#\s]+)(?::([0-9]{1,5}))?"
REDIS_URLS = (
    rf"(?:(?P<scheme>rediss?)://)?(?:(?P<login>[^/?#]*)@)?(?P<hosts>{REDIS_HOST})/?(?P<db>[0-9]{{0,3}})"
    r"(?:\?(?P<query>.*))?",
    rf"(?P<scheme>rediss?\+sentinel)://(?:(?P<login>[^/?#]*)@)?(?P<hosts>{REDIS_HOST}(?:,{REDIS_HOST})*)"
    r"/(?P<service>[^/?#]+)(?:/(?P<db>[0-9]{0,3}))?(?:\?(?P<query>.*))?",
)
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


def redis_address(text: str) -> RedisAddress | None:
    """Read "redis:6379", "rediss://user:password@redis:6379/0?prefix=stack:" or the Sentinels' form; None for ""."""
    if not text:
        return None
    found = re.fullmatch(REDIS_URLS[0], text) or re.fullmatch(REDIS_URLS[1], text)
    if not found:
        # What is wrong is not quoted: it may hold a password.
        raise ValueError(
            "is not the address of one Redis; write it like redis:6379, rediss://user:password@redis:6379/0 or "
            "redis+sentinel://s1:26379,s2:26379/primary"
        )
    parts = found.groupdict("")
    scheme, db, service = parts["scheme"] or "redis", int(parts["db"] or 0), parts.get("service", "")
    more = dict(urllib.parse.parse_qsl(parts["query"], keep_blank_values=True))
    known = ["prefix", *(TLS_OPTIONS if "rediss" in scheme else ()), *(SENTINEL_OPTIONS if service else ())]
    if unknown := sorted(more.keys() - set(known)):
        raise ValueError(f"has the option {unknown[0]!r}, unknown with {scheme}; known are {', '.join(known)}")
    tls: dict[str, Any] = {name: more[name] for name in TLS_OPTIONS if name in more}
    if "rediss" in scheme:
        # Some versions of redis-py check the name in a certificate only when they are told to.
        is_named = more.get("ssl_check_hostname") != "no" and more.get("ssl_cert_reqs") != "none"
        tls |= {"ssl": True, "ssl_check_hostname": is_named}
    default_port = 26379 if service else 6379
    hosts = [(host, int(port or default_port)) for host, port in re.findall(REDIS_HOST, parts["hosts"])]
    user, _, password = map(urllib.parse.unquote, parts["login"].partition(":"))
    place = ",".join(f"{host}:{port}" for host, port in hosts) + (f"/{service}" if service else "")
    return RedisAddress(
        text=f"{scheme}://{user}{'@' if user else ''}{place}/{db}",
        hosts=tuple((host.strip("[]"), port) for host, port in hosts),
        service=service,
        prefix=more.get("prefix", ""),
        options=tls | {"username": user or None, "password": password or None, "db": db},
        sentinel_options=tls
        | {name.removeprefix("sentinel_"): more[name] for name in SENTINEL_OPTIONS if name in more},
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What an administrator can set; one environment variable for each field, in upper case."""

    buildkite_agent_token: str = setting(None, secret, "cluster agent token", secret=True)
    buildkite_agent_endpoint: str = setting("https://agent.buildkite.com/v3", http_url, "base of the Stacks API")
    scheduler_queues: tuple[str, ...] = setting("default", queue_keys, "queue keys, comma-separated; a stack for each")
    stack_key: str = setting("", str, "stacks are called <STACK_KEY>-<queue>; empty: the host's first label")
    poll_interval: float = setting(
        "1s", in_range(duration, "200ms", "60s"), "how often each queue is listed; 4 times as often while it is in use"
    )
    redis_addr: RedisAddress | None = setting(
        "", redis_address, "Redis, where several schedulers share one store; empty: SQLite", secret=True
    )
    state_directory: str = setting("./state", str, "where the SQLite store is")
    listen: tuple[str, int] = setting("127.0.0.1:18888", host_and_port, "address for workers; :18888 is all of IPv4")
    stack_api_token: tuple[str, ...] = setting(
        "", api_tokens, "what workers must present, one of several; needed beyond loopback", secret=True
    )
    tls_cert: str = setting("", str, "certificate (PEM, with its chain) for LISTEN; empty: no TLS")
    tls_key: str = setting("", str, "its key (PEM)")
    tls_client_ca: str = setting("", str, "CA (PEM) of the certificates that clients must then have")
    max_connections: int = setting(
        "6000", in_range(whole, "1", "1000000"), "beyond this, or the open-file limit less 100, clients get 503"
    )
    webhook_token: str = setting("", secret, "guards POST /webhook, which is not there without it", secret=True)
    reservation_seconds: int = setting("900", in_range(whole, "60", "3600"), "how long Buildkite keeps a job for us")
    lease_seconds: int = setting("30", in_range(whole, "1", "3600"), "a claim without a touch ends after this")
    acquire_seconds: int = setting("120", in_range(whole, "5", "3600"), "an agent has this long to acquire its job")
    max_attempts: int = setting("5", in_range(whole, "1", "100"), "failed attempts before a job is finished")
    stack_notifications: bool = setting("on", on_or_off, "on or off: tell on the build page why a job waits")
    log_level: str = setting("info", log_level, "debug, info, warning or error")
    settings_file: str = setting(".env", str, "where SIGHUP finds LOG_LEVEL again")

    def stack_key_of(self, queue_key: str) -> str:
        """The queue's stack: letters that Buildkite does not allow become `-`; at most 80 bytes."""
        key = re.sub(r"[^A-Za-z0-9_-]", "-", f"{self.stack_key or first_label_of_host()}-{queue_key}")
        if len(key) <= 80:
            return key
        return f"{key[:71]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def problems(self) -> list[str]:
        """What no single variable shows."""
        found = []
        keys = collections.Counter(map(self.stack_key_of, self.scheduler_queues))
        for key, count in keys.items():
            if count > 1:
                found.append(f"SCHEDULER_QUEUES: {count} queues would share the stack {key!r}; serve them from two")
        if self.redis_addr and not self.stack_key:
            found.append("STACK_KEY: is required with REDIS_ADDR: all schedulers that share it are one stack")
        if not is_loopback(self.listen[0]) and not self.stack_api_token:
            found.append(needs_token(self.listen[0] or "every IPv4 address"))
        try:
            tls_context(self)
        except SettingsError as error:
            found.append(str(error))
        return found


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # the name of a host, or empty: every IPv4 address


def needs_token(address: str) -> str:
    return (
        f"LISTEN: {address} is beyond this machine, so STACK_API_TOKEN is required; make one with: openssl rand -hex 32"
    )


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What the TLS files make, read now; None without any. Raises SettingsError when they cannot be used."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if bool(cert) != bool(key) or (client_ca and not cert):
        raise SettingsError("TLS_CERT, TLS_KEY: TLS needs both, and TLS_CLIENT_CA needs TLS")
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # The password: of a key that has one OpenSSL would ask the terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise SettingsError(f"TLS_CERT, TLS_KEY: {cert} and {key} are no certificate and its key: {error}") from None
    try:
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise SettingsError(f"TLS_CLIENT_CA: {client_ca} is no CA: {error}") from None
    return context


# --- Buildkite client ---

#: A call ends within this many seconds in total, connecting and the body included.
CALL_SECONDS = 10.0
#: Jobs in one call; Buildkite's own limit for each of these endpoints.
BATCH = 1000
#: Of a text on a build page; Buildkite's limit is as many letters.
DETAIL_BYTES = 256
#: What is read of an answer at most, far over a page of 1,000 jobs; and at a time.
ANSWER_BYTES, ANSWER_PIECE = 64 * 1024 * 1024, 64 * 1024
#: A token that Buildkite refused is tried again after this: its file may have been replaced.
REFUSED_TOKEN_SECONDS = 60.0
#: Calls a second that Buildkite allows to a stack, by endpoint.
#: Source: https://buildkite.com/docs/apis/agent-api/stacks#rate-limits
CALLS_PER_SECOND = {
    "register": 10,
    "list": 10,
    "reserve": 10,
    "states": 20,
    "finish": 100,
    "deregister": 10,
    "notify": 200,
    "job-tokens": 10,  # not documented: no more than the others
    "metrics": 1,
}


class Pace:
    """Spreads calls so that no second sees more than `limit` of them."""

    def __init__(self, limit: int):
        self._lock = threading.Lock()  # guards _times
        self._times: collections.deque[float] = collections.deque([-math.inf] * limit, maxlen=limit)

    def delay(self, now: float) -> float:
        """Take the next place, and say in how many seconds it comes."""
        with self._lock:
            # A little over a second: Buildkite's window slides on its clock, between us lies a network.
            at = max(now, self._times[0] + 1.05)
            self._times.append(at)
            return at - now


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """One answer of the list: what could be read of it."""

    jobs: list[Job]
    paused: bool | None
    next_cursor: str | None


class Stack:
    """One of our stacks at Buildkite. Every method is one HTTP call; each raises BuildkiteError.

    Source of paths, fields and limits: https://buildkite.com/docs/apis/agent-api/stacks
    """

    def __init__(self, endpoint: str, token: Callable[[], str], key: str, queue_key: str):
        self.key, self.queue_key = key, queue_key
        #: Called after each call with the queue's key, the endpoint, and the status of the answer; 0: none.
        self.on_call: Callable[[str, str, int], None] = lambda *_: None
        self._endpoint, self._token = endpoint, token
        self._paces = {name: Pace(limit) for name, limit in CALLS_PER_SECOND.items()}
        self._local = threading.local()  # a requests.Session for each thread: it is not made to be shared
        self._skipped: set[str] = set()  # what is wrong with listed jobs, said once each

    def register(self) -> None:
        """Make the stack known, or renew it; must come before any other call."""
        body = {
            "key": self.key,
            "type": "custom",
            "queue_key": self.queue_key,
            "metadata": {"stack": "systemd"},
        }
        self._call("register", "POST", "/stacks/register", body)

    def deregister(self) -> None:
        self._call("deregister", "POST", f"/stacks/{self.key}/deregister")

    def list_jobs(self, cursor: str | None, now: float) -> Page:
        """List scheduled jobs that nobody has reserved, oldest first. A job that cannot be read is left out."""
        query = {"queue_key": self.queue_key, "limit": str(BATCH)} | ({"after": cursor} if cursor else {})
        path = f"/stacks/{self.key}/scheduled-jobs?{urllib.parse.urlencode(query)}"
        answer = self._call("list", "GET", path)
        raw_jobs = answer.get("jobs")
        if not isinstance(raw_jobs, list):
            raise BuildkiteError(f"list queue {self.queue_key}: the answer has no list `jobs`")
        queue = an_object(answer, "cluster_queue")
        info = an_object(answer, "page_info")
        # Buildkite's server says `dispatch_paused`; its own Go client reads `paused`.
        paused = queue.get("dispatch_paused", queue.get("paused"))
        more = info.get("has_next_page") is True and isinstance(info.get("end_cursor"), str)
        return Page(
            list(self._readable(raw_jobs, now)),
            paused if isinstance(paused, bool) else None,
            info["end_cursor"] if more and info["end_cursor"] else None,
        )

    def _readable(self, raw_jobs: list[Any], now: float) -> Iterator[Job]:
        for raw in raw_jobs:
            try:
                yield Job.from_api(self.queue_key, raw, now)
            except ValueError as error:
                name = raw.get("id") if isinstance(raw, dict) else None
                if (key := f"{name}: {error}") not in self._skipped and len(self._skipped) < 10_000:
                    self._skipped.add(key)
                    log.warning(event("skipped", queue=self.queue_key, job=name, reason=str(error)))

    def reserve(self, uuids: Sequence[str], seconds: int) -> tuple[set[str], set[str]]:
        """Reserve jobs, or renew their reservations, for `seconds`: those that are ours now, and those that are not.

        At most BATCH uuids. That none could be reserved is no error.
        """
        body = {"job_uuids": list(uuids), "reservation_expiry_seconds": seconds}
        answer = self._call("reserve", "PUT", f"/stacks/{self.key}/scheduled-jobs/batch-reserve", body)
        reserved = answer.get("reserved")
        if not isinstance(reserved, list):
            raise BuildkiteError(
                f"reserve {len(uuids)} jobs on queue {self.queue_key}: the answer has no list `reserved`"
            )
        ours = set(uuids).intersection(map(str, reserved))
        return ours, set(uuids) - ours

    def states(self, uuids: Sequence[str]) -> dict[str, str]:
        """Buildkite's word for the state of each job, at most BATCH; those it does not know are left out."""
        answer = self._call("states", "POST", f"/stacks/{self.key}/jobs/get-states", {"job_uuids": list(uuids)})
        states = answer.get("states")
        if not isinstance(states, dict):
            raise BuildkiteError(f"ask the states of {len(uuids)} jobs: the answer has no object `states`")
        return {uuid: states[uuid] for uuid in uuids if isinstance(states.get(uuid), str)}

    def finish(self, uuid: str, detail: str) -> None:
        """End a job that no agent took, as failed, with a text for its build page (cut to 4 KB)."""
        body = {"detail": cut(detail, 4096), "exit_status": -1}
        self._call("finish", "POST", f"/stacks/{self.key}/jobs/{uuid}/finish", body)

    def notify(self, details: Sequence[tuple[str, str]]) -> dict[str, int]:
        """Show texts on the build pages of jobs, at most BATCH pairs of uuid and text (cut to 256 bytes).

        Returns how many were refused for each of Buildkite's reasons; the others were taken.
        """
        told = [{"job_uuid": uuid, "detail": cut(detail, DETAIL_BYTES)} for uuid, detail in details]
        answer = self._call("notify", "POST", f"/stacks/{self.key}/notifications", {"notifications": told})
        errors = answer.get("errors")
        refused: dict[str, int] = {}
        for error in errors if isinstance(errors, list) else []:
            if isinstance(error, dict) and isinstance(error.get("indexes"), list):
                refused[str(error.get("error"))[:100]] = len(error["indexes"])
        return refused

    def metrics(self) -> tuple[dict[str, Any], float]:
        """What Buildkite counts of the whole cluster, and in how many seconds it may be asked again.

        Source: https://buildkite.com/docs/apis/agent-api/metrics
        """
        headers, answer = self._ask("metrics", "GET", "/metrics")
        with suppress(KeyError, ValueError):
            return answer, float(headers["Buildkite-Agent-Metrics-Poll-Duration"])
        return answer, 0.0

    def job_tokens(self, uuids: Sequence[str], seconds: int, ends_at: float) -> dict[str, str]:
        """For each job, at most BATCH, a token that an agent can acquire it with, and nothing else, for `seconds`.

        Jobs for which Buildkite issues none are left out. The call ends at `ends_at` of the monotonic clock.
        """
        body = {"job_uuids": list(uuids), "token_lifetime_seconds": seconds}
        answer = self._call("job-tokens", "POST", f"/stacks/{self.key}/job-acquisition-tokens", body, ends_at)
        issued = answer.get("job_acquisition_tokens")
        if not isinstance(issued, list):
            raise BuildkiteError(f"job-tokens on queue {self.queue_key}: no list `job_acquisition_tokens`")
        entries = [entry for entry in issued if isinstance(entry, dict)]
        tokens = {str(entry.get("job_uuid")): str(entry.get("job_acquisition_token") or "") for entry in entries}
        return {uuid: tokens[uuid] for uuid in uuids if re.fullmatch("[!-~]+", tokens.get(uuid, ""))}

    def _call(
        self, endpoint: str, method: str, path: str, body: Any = None, ends_at: float = math.inf
    ) -> dict[str, Any]:
        return self._ask(endpoint, method, path, body, ends_at)[1]

    def _ask(
        self, endpoint: str, method: str, path: str, body: Any = None, ends_at: float = math.inf
    ) -> tuple[Mapping[str, str], dict[str, Any]]:
        what = f"{endpoint} on queue {self.queue_key}"
        time.sleep(self._paces[endpoint].delay(time.monotonic()))
        seconds = max(0.01, min(CALL_SECONDS, ends_at - time.monotonic()))
        status = 0
        try:
            status, headers, text = self._exchange(method, path, body, seconds)
        except (requests.RequestException, OSError) as error:
            raise BuildkiteError(f"{what}: no answer from Buildkite ({plain_reason(error)})") from None
        finally:
            self.on_call(self.queue_key, endpoint, status)
        if status == 401:
            told = f"it refuses BUILDKITE_AGENT_TOKEN: {message_of(text)}"
            raise BuildkiteError(f"{what}: 401 from Buildkite: {told}", status, REFUSED_TOKEN_SECONDS)
        if status >= 300:
            raise BuildkiteError(
                f"{what}: {status} from Buildkite: {message_of(text)}", status, retry_after(headers, status)
            )
        if endpoint in ("finish", "deregister"):
            return headers, {}
        # Half an answer with tokens is no JSON, and may hold one all the same.
        shown = "not shown" if endpoint == "job-tokens" else repr(text[:80])
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise BuildkiteError(f"{what}: {status} from Buildkite, but not JSON: {shown}") from None
        if not isinstance(answer, dict):
            raise BuildkiteError(f"{what}: {status} from Buildkite, but not a JSON object: {shown}")
        return headers, answer

    def _exchange(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """One request: its answer's status, headers and body.

        It ends within `seconds`, however slowly the body comes. A head that comes byte by byte can take longer,
        because each byte starts the time-out anew: the watchdog ends a process whose call takes STUCK_SECONDS.
        """
        ends_at = time.monotonic() + seconds
        if not hasattr(self._local, "session"):
            self._local.session = Session()
        session: Session = self._local.session
        with (
            session.request(
                method,
                self._endpoint + path,
                json=body,
                headers={"User-Agent": "agent-stack-systemd"},
                # Not as a header: requests would replace it by what a .netrc has for the host.
                auth=self._authorize,
                # To connect, and for the head.
                timeout=(seconds / 3, seconds * 2 / 3),
                stream=True,
            ) as response,
            cut_off_at(ends_at, response),
        ):
            text = bytearray()
            for piece in response.iter_content(ANSWER_PIECE):
                text += piece
                if len(text) > ANSWER_BYTES:
                    raise OSError(f"its answer is over {ANSWER_BYTES} bytes")
            if time.monotonic() >= ends_at:
                raise TimeoutError(f"its answer was not complete after {seconds:.0f} s")
            return response.status_code, response.headers, bytes(text)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        token = self._token()
        if not re.fullmatch("[!-~]+", token):
            raise requests.exceptions.InvalidHeader("BUILDKITE_AGENT_TOKEN holds a letter that no token has")
        request.headers["Authorization"] = f"Token {token}"
        return request


class Session(requests.Session):
    """Follows no redirect: where the token goes is for the settings to say.

    allow_redirects=False would do that too, but then requests reads the whole body of a redirect, without a bound.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


@contextmanager
def cut_off_at(ends_at: float, response: requests.Response) -> Iterator[None]:
    """Shut the answer's connection down at that moment of the monotonic clock, so that reading from it ends.

    A time-out of requests cannot do this: it starts anew with every byte that comes.
    """
    connection = socket.socket(fileno=os.dup(response.raw.fileno()))
    timer = threading.Timer(max(0.0, ends_at - time.monotonic()), shut_down, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # the next call may use the same connection, and must not find the timer at work
        connection.close()


def cut(text: str, most: int) -> str:
    """The text, or as many whole letters of it as fit into so many bytes."""
    return text.encode()[:most].decode(errors="ignore")


def shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def an_object(answer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The member of that name, or {} where Buildkite sent something else."""
    value = answer.get(name)
    return value if isinstance(value, dict) else {}


def message_of(text: bytes) -> str:
    """Buildkite's own words in an error's body, or the start of whatever came instead."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(text)["message"])[:300]
    return repr(text[:80].decode(errors="replace"))


def retry_after(headers: Mapping[str, str], status: int) -> float | None:
    """Seconds that Buildkite asks us to wait: `Retry-After`, else, on a 429, `RateLimit-Reset`."""
    for name in ("Retry-After", "RateLimit-Reset")[: 2 if status == 429 else 1]:
        with suppress(KeyError, ValueError):
            if 0 <= (seconds := float(headers[name])) < math.inf:
                return seconds
    return None


def plain_reason(error: Exception) -> str:
    """The root of a requests exception: "Connection refused", not three nested reprs of objects."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return f"{type(error).__name__}: {error}"[:300]


# --- Store protocol ---


class Store(Protocol):
    """Where the jobs are. Every verb is atomic, and durable as design says for it; each may raise StoreUnavailable.

    What Buildkite says, `expire`, `pause`, `trust_no_clock` and `prune` are for the one scheduler that talks to it:
    from another they raise Fenced.

    `asked` is `sequence()` as it was when a question went to Buildkite: what the answer says is applied only to
    rows that have not changed since. Verbs return the jobs that they changed, as they are afterwards.
    """

    def sequence(self) -> int:
        """A number that grows with every change."""
        ...

    def put(self, jobs: Sequence[Job], asked: int, now: float) -> list[Job]:
        """Write down jobs that Buildkite listed as scheduled, as `reserving`; those that are new or over.

        One that we hold already was listed because its reservation lapsed: `ready` and `running` go back to
        `reserving` in their old place, `leased` keeps its holder and is due for renewal; none of these is returned.
        """
        ...

    def confirm(self, uuids: Collection[str], asked: int, expires_at: float, now: float) -> list[Job]:
        """Apply a batch-reserve's `reserved`: proof that each is ours, and that no agent has it.

        `reserving` → `ready`, unless it has failed too often: then its `finish_detail` is written, and it is
        never handed out again. `ready` and `leased` have their reservation renewed, and are not returned.
        """
        ...

    def learn(self, findings: Mapping[str, tuple[Finding, str]], asked: int, now: float) -> list[Job]:
        """Apply what Buildkite said of jobs, each with its word for it or a reason. An illegal move is left out."""
        ...

    def finish(self, uuid: str, now: float) -> list[Job]:
        """Buildkite has heard our finish: the job with the intent → `done`, `failed`."""
        ...

    def claim(self, worker: Worker, now: float) -> Job | None:
        """Lease the first job in line that matches, or None. Raises WorkerHeld and WorkerNameTaken.

        A worker that holds an unacquired job gets that one again, with the same claim: the answer was lost. If it
        was claimed by an older session, the worker was restarted: that job goes back to `reserving`.
        """
        ...

    def touch(self, holder: Holder, now: float) -> Job:
        """Renew the claim's lease. Raises UnknownJob, StaleClaim, WorkerNameTaken, as the next two do."""
        ...

    def release(self, holder: Holder, reason: str, answered_at: float, now: float) -> Job:
        """Give the job back: `leased` → `reserving`. `answered_at`: when Buildkite last answered us.

        It counts as an attempt only if the agent had all the time it gets to acquire the job.
        """
        ...

    def complete(self, holder: Holder, end: AgentEnd, answered_at: float, now: float) -> Job:
        """The agent has exited: `leased` → `reserving`, for Buildkite to say what it did; `running` stays.

        May be repeated. Without `claim`, the worker's name must be the holder's.
        """
        ...

    def expire(self, answered_at: Mapping[str, float], now: float) -> list[Job]:
        """Every lease that has run out: `leased` → `reserving`. `answered_at` by queue key of ours, as for release.

        So does `ready` whose reservation has run out, because Buildkite could not be asked; these are not returned.
        The jobs whose claims `claim` has ended since the last call are, as they were then.
        """
        ...

    def pause(self, queue_key: str, paused: bool) -> bool:
        """Remember whether the queue is paused; whether that is news. Nothing of a paused queue is claimed."""
        ...

    def trust_no_clock(self, now: float, *, confirm: bool) -> None:
        """At a start and after a clock step: leases get their full time, every reservation is due.

        `confirm`: what was `ready` is `reserving` until Buildkite has confirmed it.
        """
        ...

    def prune(self, before: float) -> int:
        """Forget jobs that were done before that time; how many."""
        ...

    def unconfirmed(self, queue_key: str, due_before: float, limit: int) -> list[str]:
        """Jobs for the next batch-reserve: `reserving` in order, then reservations that end before `due_before`.

        While the queue is paused, only what was reserved before.
        """
        ...

    def unfinished(self, queue_key: str) -> list[str]:
        """The uuids of all jobs that are not `done`."""
        ...

    def held(self, queue_key: str) -> list[str]:
        """The uuids of the jobs that a worker has: `leased` or `running`."""
        ...

    def intents(self, queue_key: str) -> list[Job]:
        """Jobs that we decided to finish, and have not yet finished."""
        ...

    def get(self, uuid: str) -> Job | None: ...

    def page(self, state: JobState, after: tuple[int, float, str] | None, limit: int) -> list[Job]:
        """The jobs in that state as they stand in line, from the first whose `order` comes after `after`."""
        ...

    def ahead(self, job: Job, most: int) -> int:
        """How many `ready` jobs of its rule set stand in line before it, counted up to `most`."""
        ...

    def stats(self) -> dict[str, Any]:
        """All that is counted: cheap enough to be asked for every few seconds, with 100,000 jobs.

        `levels`: a Level for each rule set and state that has jobs, but `done`; `waiting`: jobs that are `reserving`
        or `ready`, by rule set; `states` and `outcomes`: of the jobs that are kept; `totals`: by queue key and
        outcome, every job that ever became `done`; `paused`: queue keys; `held`: a Held for each leased and running.
        """
        ...

    def worker_rows(self) -> list[dict[str, Any]]:
        """Every worker that claimed, until it has been silent for long.

        Of each: name, tags, failures, held_until, claims, ran (jobs), last_claim_at.
        """
        ...

    def probe(self) -> None:
        """Write a trifle: raises StoreUnavailable when claims could not be served."""
        ...

    def close(self) -> None: ...


# --- SQLite store ---

SCHEMA_VERSION = 2

SCHEMA = """
CREATE TABLE jobs (
    uuid TEXT PRIMARY KEY, queue_key TEXT NOT NULL, agent_query_rules TEXT NOT NULL, rule_set TEXT NOT NULL,
    priority INTEGER NOT NULL, scheduled_at REAL NOT NULL, about TEXT NOT NULL, put_at REAL NOT NULL,
    state TEXT NOT NULL, outcome TEXT, reason TEXT NOT NULL, reserved_at REAL, reservation_expires_at REAL NOT NULL,
    claim TEXT, worker TEXT, session TEXT, claimed_at REAL, touched_at REAL, lease_expires_at REAL, acquired_at REAL,
    completed_claim TEXT, exit_status INTEGER, claims INTEGER NOT NULL, attempts INTEGER NOT NULL,
    tries TEXT NOT NULL, finish_detail TEXT, done_at REAL, version INTEGER NOT NULL
);
-- One index for each question, partial: a job is only in those that its state can be asked by.
CREATE INDEX jobs_ready ON jobs (rule_set, priority DESC, scheduled_at, uuid) WHERE state = 'ready';
CREATE INDEX jobs_reserving ON jobs (queue_key, priority DESC, scheduled_at, uuid, rule_set) WHERE state = 'reserving';
CREATE INDEX jobs_due ON jobs (queue_key, reservation_expires_at) WHERE state IN ('ready', 'leased');
CREATE INDEX jobs_leased ON jobs (lease_expires_at) WHERE state = 'leased';
CREATE INDEX jobs_held ON jobs (worker) WHERE state = 'leased';
CREATE INDEX jobs_unfinished ON jobs (queue_key, uuid) WHERE done_at IS NULL;
CREATE INDEX jobs_running ON jobs (uuid) WHERE state = 'running';
CREATE INDEX jobs_done ON jobs (done_at, outcome) WHERE state = 'done';
CREATE INDEX jobs_intents ON jobs (queue_key) WHERE finish_detail IS NOT NULL AND state = 'reserving';
CREATE TABLE workers (
    name TEXT PRIMARY KEY, session TEXT NOT NULL, retired TEXT NOT NULL, tags TEXT NOT NULL,
    failures INTEGER NOT NULL, held_until REAL NOT NULL, claims INTEGER NOT NULL, last_claim_at REAL,
    ran INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE paused_queues (queue_key TEXT PRIMARY KEY);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
-- Every job that ever became `done`: it outlives the jobs.
CREATE TABLE totals (queue_key TEXT, outcome TEXT, jobs INTEGER NOT NULL, PRIMARY KEY (queue_key, outcome));
"""

#: What makes of a file with the schema before it one with this; its `done` jobs are the first of the totals.
UPGRADE = {
    1: """
DROP INDEX jobs_reserving;
DROP INDEX jobs_done;
CREATE INDEX jobs_reserving ON jobs (queue_key, priority DESC, scheduled_at, uuid, rule_set) WHERE state = 'reserving';
CREATE INDEX jobs_running ON jobs (uuid) WHERE state = 'running';
CREATE INDEX jobs_done ON jobs (done_at, outcome) WHERE state = 'done';
CREATE TABLE totals (queue_key TEXT, outcome TEXT, jobs INTEGER NOT NULL, PRIMARY KEY (queue_key, outcome));
ALTER TABLE workers ADD COLUMN ran INTEGER NOT NULL DEFAULT 0;
INSERT INTO totals SELECT queue_key, outcome, count(*) FROM jobs WHERE state = 'done' GROUP BY queue_key, outcome;
"""
}

COLUMNS = tuple(field.name for field in dataclasses.fields(Job))
SELECT_JOB = f"SELECT {', '.join(COLUMNS)} FROM jobs"
INSERT_JOB = f"INSERT OR REPLACE INTO jobs VALUES ({', '.join('?' * len(COLUMNS))})"
#: The one write of a claim: only a job that is still ready is leased.
LEASE_JOB = f"""
UPDATE jobs SET state = 'leased', claim = ?, worker = ?, session = ?, claimed_at = ?, lease_expires_at = ?,
    touched_at = NULL, acquired_at = NULL, exit_status = NULL, claims = claims + 1, reason = 'claimed', version = ?
WHERE uuid = ? AND state = 'ready' RETURNING {", ".join(COLUMNS)}"""
FIRST_READY = """
SELECT -priority, scheduled_at, uuid FROM jobs WHERE state = 'ready' AND rule_set = ?
ORDER BY priority DESC, scheduled_at, uuid LIMIT 1"""
UNCONFIRMED = """
SELECT uuid FROM jobs WHERE state = 'reserving' AND queue_key = ? AND finish_detail IS NULL
    AND (reserved_at IS NOT NULL OR NOT ?)
ORDER BY priority DESC, scheduled_at, uuid LIMIT ?"""
DUE = """
SELECT uuid FROM jobs WHERE state IN ('ready', 'leased') AND queue_key = ? AND reservation_expires_at < ?
ORDER BY reservation_expires_at LIMIT ?"""
#: Counts what waits by the indexes alone, without reading a job.
WAITING = """
SELECT state, rule_set, count(*), min(scheduled_at) FROM jobs WHERE state = 'ready' GROUP BY rule_set
UNION ALL
SELECT state, rule_set, count(*), min(scheduled_at) FROM jobs WHERE state = 'reserving' GROUP BY rule_set"""
HELD_COLUMNS = tuple(field.name for field in dataclasses.fields(Held))
HELD = f"""
SELECT {", ".join(HELD_COLUMNS)} FROM jobs WHERE state = 'leased'
UNION ALL SELECT {", ".join(HELD_COLUMNS)} FROM jobs WHERE state = 'running'"""
PAGE = """
SELECT uuid FROM jobs WHERE state = '{state}' AND (-priority, scheduled_at, uuid) > (?, ?, ?)
ORDER BY priority DESC, scheduled_at, uuid LIMIT ?"""
#: A place in line before every job's.
FRONT = (-(2**63), 0.0, "")
AHEAD = """
SELECT count(*) FROM (
    SELECT 1 FROM jobs WHERE state = 'ready' AND rule_set = ? AND priority > ?
    UNION ALL
    SELECT 1 FROM jobs WHERE state = 'ready' AND rule_set = ? AND priority = ? AND (scheduled_at, uuid) < (?, ?)
    LIMIT ?)"""
ADD_TO_TOTAL = "INSERT INTO totals VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1"
#: Named with both states because the index is.
RUN_OUT = "state IN ('ready', 'leased') AND state = 'ready' AND queue_key = ? AND reservation_expires_at <= ?"

#: A worker whose agents end without acquiring gets no job for 2 s, doubled each time in a row up to 5 min.
HOLD_SECONDS, MAX_HOLD_SECONDS = 2.0, 300.0
#: A slot that another session has claimed under may be taken back once that one has been silent for this long.
SESSION_SECONDS = 300.0
#: With a single worker, a job is finished only if its attempts took at least this long.
ONE_WORKER_SECONDS = 900.0
#: The agent's exit status for "Buildkite did not give me this job": an accident of timing, nobody's fault.
EXIT_REJECTED = 27
#: How long a reservation is still believed in after the clock was set, when nobody knows how much of it is left.
GRACE_SECONDS = 30.0
#: How many ended claims a job remembers.
KEPT_TRIES = 20
#: How long SQLite waits for somebody else's lock, and how long nobody tries after a failure.
LOCK_SECONDS, RETRY_STORE_SECONDS = 1.0, 0.5
#: How many claims are written in one transaction at most.
CLAIMS_TOGETHER = 100


class PendingClaim:
    """One claim that waits for the store, and what came of it: a job, none, or an error to raise."""

    __slots__ = ("worker", "now", "is_over", "job", "error")

    def __init__(self, worker: Worker, now: float):
        self.worker, self.now, self.is_over = worker, now, False
        self.job: Job | None = None
        self.error: Exception | None = None


class SqliteStore:
    """The store of a single scheduler: one SQLite file, owned by one process."""

    def __init__(self, directory: str, settings: Settings):
        self._settings = settings
        self._pending: collections.deque[PendingClaim] = collections.deque()  # for whoever gets the lock next
        self._lock = threading.RLock()  # guards _db and what is below, but for _reader
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._owner = own(os.path.join(directory, "scheduler.lock"))
        self._path = os.path.join(directory, "jobs.sqlite3")
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._owner)
            raise
        self._reader_lock = threading.Lock()  # guards _reader, which never waits for a write
        self._reader = self._connect()
        self._identity = file_identity(self._path)
        self._retry_at, self._trouble = 0.0, ""
        self._durable: bool | None = None
        self._is_writing = False
        self._sequence: int = self._db.execute("SELECT coalesce(max(version), 0) FROM jobs").fetchone()[0]
        self._paused = {row[0] for row in self._db.execute("SELECT queue_key FROM paused_queues")}
        self._seen: dict[str, float] = {}
        self._ended: list[Job] = []  # by `claim`, for `expire` to return
        # The first ready job of each rule set, so that a claim need not search: `_stale` ones are read again.
        self._rule_sets: dict[str, RuleSet] = {}
        self._heads: dict[str, tuple[int, float, str]] = {}
        self._stale: set[str] = set()
        self._matching: dict[Profile, list[str]] = {}
        for queue_key, rules, rule_set in self._db.execute(
            "SELECT queue_key, agent_query_rules, rule_set FROM jobs WHERE state = 'ready' GROUP BY rule_set"
        ):
            self._know(rule_set, queue_key, json.loads(rules))

    def _open(self) -> sqlite3.Connection:
        db = self._connect()
        db.execute("PRAGMA journal_mode = WAL")
        # In KiB: the indexes of 100,000 jobs. With the default of 2 MiB a restart with that many takes twice as long.
        db.execute("PRAGMA cache_size = -65536")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version in UPGRADE:
            db.executescript(f"BEGIN; {UPGRADE[version]} PRAGMA user_version = {version + 1}; COMMIT;")
        elif version != SCHEMA_VERSION:
            db.close()
            raise SettingsError(
                f"STATE_DIRECTORY: {self._path} has schema {version}, this scheduler writes {SCHEMA_VERSION}; "
                "run the scheduler that wrote it until its jobs are done, or move the file away"
            )
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        return db

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=512
        )

    def close(self) -> None:
        with self._lock, self._reader_lock:
            self._reader.close()
            self._db.close()
            os.close(self._owner)

    # Every verb goes through `_write`; every row that changes, through `_change`.

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Around every use of _db: what SQLite cannot do becomes StoreUnavailable, with what to do about it."""
        with self._lock:
            if not self._is_writing:
                self._check_file()
            try:
                yield
            except sqlite3.Error as error:
                raise self._unavailable(f"{error}; {remedy(error)}") from error

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """The same around a read that need not wait for a write."""
        with self._reader_lock:
            self._check_file()
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise self._unavailable(f"{error}; {remedy(error)}") from error

    def _check_file(self) -> None:
        if time.monotonic() < self._retry_at:
            raise StoreUnavailable(self._trouble)
        if file_identity(self._path) != self._identity:
            raise self._unavailable(
                "the file was moved or deleted while in use; move it back, or restart the scheduler to begin an empty "
                "one: jobs that were in the old one come back as their reservations lapse"
            )

    def _unavailable(self, trouble: str) -> StoreUnavailable:
        # For a moment nobody else tries: each try may take as long as SQLite waits for a lock, one after the other.
        self._trouble = f"the store {self._path} cannot be used: {trouble}. It is tried again all the time"
        self._retry_at = time.monotonic() + RETRY_STORE_SECONDS
        return StoreUnavailable(self._trouble)

    @contextmanager
    def _write(self, *, durable: bool = False) -> Iterator[None]:
        """A transaction, or a part of one that is open: all or nothing. `durable`: it is on the disk, not just in the
        log, when this returns."""
        with self._guard():
            if self._is_writing:
                yield
                return
            if durable is not self._durable:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._db.execute("BEGIN IMMEDIATE")
            self._sequence += 1
            told = len(self._ended)
            self._is_writing = True
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                self._stale.update(self._rule_sets)  # some heads were read meanwhile
                del self._ended[told:]
                raise
            finally:
                self._is_writing = False

    def _change(self, job: Job, **changes: Any) -> Job:
        """Write the named columns of one job; a change of state must be a legal move."""
        state = changes.get("state", job.state)
        if state is not job.state and state not in MOVES[job.state]:
            raise ValueError(f"job {job.uuid}: {job.state} does not become {state}")
        changes["version"] = self._sequence
        names = ", ".join(f"{name} = ?" for name in changes)
        values = [encoded(value) for value in changes.values()]
        self._db.execute(f"UPDATE jobs SET {names} WHERE uuid = ?", [*values, job.uuid])
        if JobState.READY in (state, job.state):
            self._know(job.rule_set, job.queue_key, job.agent_query_rules)
        if state is JobState.DONE and job.state is not JobState.DONE:
            self._db.execute(ADD_TO_TOTAL, [job.queue_key, changes["outcome"]])
        return dataclasses.replace(job, **changes)

    def _select(self, uuid: str) -> Job | None:
        row = self._db.execute(f"{SELECT_JOB} WHERE uuid = ?", [uuid]).fetchone()
        return decoded(row) if row else None

    def _known(self, uuids: Iterable[str], asked: int) -> Iterator[Job]:
        """The rows that an answer may be applied to: those that have not changed since the question."""
        for uuid in uuids:
            job = self._select(uuid)
            if job and job.version <= asked:
                yield job

    # -- what Buildkite says

    def sequence(self) -> int:
        with self._lock:
            return self._sequence

    def put(self, jobs: Sequence[Job], asked: int, now: float) -> list[Job]:
        put: list[Job] = []
        with self._write(durable=True):
            for job in jobs:
                held = self._select(job.uuid)
                if held is None or (held.state is JobState.DONE and held.version <= asked):
                    # Its story goes on; what failed then does not count any more.
                    tries = tuple(ended | {"counted": False, "judged": True} for ended in held.tries) if held else ()
                    claims = held.claims if held else 0
                    fresh = dataclasses.replace(job, claims=claims, tries=tries, version=self._sequence)
                    self._db.execute(INSERT_JOB, [encoded(getattr(fresh, name)) for name in COLUMNS])
                    put.append(fresh)
                elif held.version <= asked and held.state is JobState.LEASED:
                    self._db.execute("UPDATE jobs SET reservation_expires_at = 0 WHERE uuid = ?", [job.uuid])
                elif held.version <= asked and held.state is not JobState.RESERVING:
                    self._change(held, state=JobState.RESERVING, reason="listed as scheduled again")
        return put

    def confirm(self, uuids: Collection[str], asked: int, expires_at: float, now: float) -> list[Job]:
        changed = []
        with self._write(durable=True):
            for job in self._known(uuids, asked):
                if job.state is JobState.RESERVING and job.finish_detail is None:
                    changed.append(self._confirm(job, expires_at, now))
                elif job.state in (JobState.READY, JobState.LEASED):
                    self._db.execute(
                        "UPDATE jobs SET reservation_expires_at = ? WHERE uuid = ?", [expires_at, job.uuid]
                    )
        return changed

    def _confirm(self, job: Job, expires_at: float, now: float) -> Job:
        reserved = {"reserved_at": job.reserved_at or now, "reservation_expires_at": expires_at} | self._blame(job, now)
        if failed_too_often(job, self._settings.max_attempts, now):
            return self._change(job, finish_detail=finish_detail(job), reason="failed too often", **reserved)
        holder = {"claim": None, "worker": None, "session": None, "lease_expires_at": None}
        return self._change(job, state=JobState.READY, reason="reserved", **reserved, **holder)

    def _blame(self, job: Job, now: float) -> dict[str, Any]:
        """Its last agent has ended and Buildkite says that none has it: that worker's agents do not acquire. What
        changes of the job by that."""
        if not job.tries or job.tries[-1]["judged"]:
            return {}
        last = job.tries[-1]
        self._db.execute(
            "UPDATE workers SET failures = failures + 1, held_until = ? + min(? * (1 << min(failures, 16)), ?) "
            "WHERE name = ?",
            [now, HOLD_SECONDS, MAX_HOLD_SECONDS, last["worker"]],
        )
        return {"tries": (*job.tries[:-1], last | {"judged": True})}

    def _absolve(self, job: Job) -> None:
        """Its agent did acquire: what was held against the worker is forgotten."""
        self._db.execute(
            "UPDATE workers SET failures = 0, held_until = 0 WHERE name = ? AND held_until > 0", [job.worker]
        )

    def learn(self, findings: Mapping[str, tuple[Finding, str]], asked: int, now: float) -> list[Job]:
        changed = []
        with self._write(durable=True):
            for job in self._known(findings, asked):
                if after := self._learn(job, *findings[job.uuid], now):
                    changed.append(after)
        return changed

    def _learn(self, job: Job, finding: Finding, word: str, now: float) -> Job | None:
        if job.state is JobState.DONE:
            return None
        if finding is Finding.LAPSED:
            if job.state is JobState.READY:
                return self._change(job, state=JobState.RESERVING, reason=f"its reservation lapsed: {word}")
            return None
        if finding is Finding.ACQUIRED:
            if job.state is JobState.RUNNING:
                return None
            self._absolve(job)
            changes = {"acquired_at": now, "reason": word, "finish_detail": None, **acquitted(job)}
            return self._change(job, state=JobState.RUNNING, **changes)
        ran = finding is Finding.OVER and (job.state is JobState.RUNNING or (job.claims > 0 and word in RAN_WORDS))
        ours = job.finish_detail is not None and word in RAN_WORDS  # our finish was heard, its answer lost
        outcome = Outcome.FAILED if ours else Outcome.RAN if ran else Outcome.DROPPED
        changes = {"outcome": outcome, "reason": word, "done_at": now}
        if outcome is Outcome.RAN:
            self._absolve(job)
            self._db.execute("UPDATE workers SET ran = ran + 1 WHERE name = ?", [job.worker])
            changes |= acquitted(job)
        return self._change(job, state=JobState.DONE, **changes)

    def finish(self, uuid: str, now: float) -> list[Job]:
        with self._write(durable=True):
            job = self._select(uuid)
            if job is None or job.finish_detail is None or job.state is not JobState.RESERVING:
                return []
            return [self._change(job, state=JobState.DONE, outcome=Outcome.FAILED, reason="finished", done_at=now)]

    # -- what workers ask

    def claim(self, worker: Worker, now: float) -> Job | None:
        pending = PendingClaim(worker, now)
        self._pending.append(pending)
        with self._lock:
            while not pending.is_over:
                self._claim_together()
        if pending.error:
            raise pending.error
        return pending.job

    def _claim_together(self) -> None:
        """Claims that came while the store was busy, in one transaction: it costs more than what each does in it."""
        claims = [self._pending.popleft() for _ in range(min(len(self._pending), CLAIMS_TOGETHER))]
        try:
            with self._guard(), self._write() if len(claims) > 1 else nullcontext():
                for each in claims:
                    self._try_claim(each)
        except Exception as error:  # none of them has been given a job
            for each in claims:
                each.job, each.error = None, error
        finally:
            for each in claims:
                each.is_over = True

    def _try_claim(self, pending: PendingClaim) -> None:
        try:
            pending.job = self._claim(pending.worker, pending.now)
        except StoreUnavailable:  # which all of them hear
            raise
        except (Refusal, WorkerHeld) as error:
            pending.error = error

    def _claim(self, worker: Worker, now: float) -> Job | None:
        self._enter(worker, now)
        if held := self._held_by(worker):
            with self._write():
                if now - (held.claimed_at or now) <= self._settings.acquire_seconds:
                    return self._change(held, lease_expires_at=now + self._settings.lease_seconds)
                # Its answers get lost for too long: others may have better luck with this one.
                ended = self._end(held, "its worker never got the answer", now)
            self._ended.append(ended)
        self._check_hold(worker, now)
        while uuid := self._first_for(worker.profile):
            with self._write():
                if job := self._lease(uuid, worker, now):
                    return job
        return None

    def _enter(self, worker: Worker, now: float) -> None:
        """Note who claims; a new session of a known slot means that the worker was restarted."""
        if not worker.name:
            return
        row = self._db.execute("SELECT session, retired FROM workers WHERE name = ?", [worker.name]).fetchone()
        session, retired = row if row else (None, "[]")
        if session != worker.session:
            self._refuse_retired(worker, session, json.loads(retired), now)
            with self._write():
                others = [old for old in (*json.loads(retired), session) if old and old != worker.session]
                ended = self._replace_session(worker, others, now)
            self._ended += ended
        self._seen[worker.name] = now

    def _refuse_retired(self, worker: Worker, session: str | None, retired: list[str], now: float) -> None:
        silent = now - self._seen.setdefault(worker.name, now) > SESSION_SECONDS
        if worker.session in retired and not silent:
            raise worker_name_taken(worker.name, session)

    def _replace_session(self, worker: Worker, retired: list[str], now: float) -> list[Job]:
        tags = ",".join(sorted(worker.profile.tags))
        self._db.execute(
            "INSERT INTO workers VALUES (?, ?, ?, ?, 0, 0, 0, NULL, 0) "
            "ON CONFLICT (name) DO UPDATE "
            "SET session = excluded.session, retired = excluded.retired, tags = excluded.tags",
            [worker.name, worker.session, json.dumps(retired[-8:]), tags],
        )
        rows = self._db.execute(f"{SELECT_JOB} WHERE state = 'leased' AND worker = ?", [worker.name]).fetchall()
        return [self._end(decoded(row), "its worker was restarted", now) for row in rows]

    def _end(self, job: Job, reason: str, now: float) -> Job:
        """End a claim because of another claim of its worker."""
        return self._give_back(job, "expire", reason, now, counted=False, judged=True)

    def _held_by(self, worker: Worker) -> Job | None:
        if not worker.name:
            return None
        row = self._db.execute(f"{SELECT_JOB} WHERE state = 'leased' AND worker = ?", [worker.name]).fetchone()
        return decoded(row) if row else None

    def _check_hold(self, worker: Worker, now: float) -> None:
        row = self._db.execute("SELECT held_until FROM workers WHERE name = ?", [worker.name]).fetchone()
        if row and row[0] > now:
            raise WorkerHeld(row[0])

    def _lease(self, uuid: str, worker: Worker, now: float) -> Job | None:
        lease = [
            secrets.token_hex(8),
            worker.name or None,
            worker.session or None,
            now,
            now + self._settings.lease_seconds,
        ]
        row = self._db.execute(LEASE_JOB, [*lease, self._sequence, uuid]).fetchone()
        if row is None:
            self._stale.update(self._rule_sets)  # the heads are wrong: read them all again
            return None
        job = decoded(row)
        self._stale.add(job.rule_set)
        self._db.execute("UPDATE workers SET claims = claims + 1, last_claim_at = ? WHERE name = ?", [now, worker.name])
        return job

    # -- the first ready job of each rule set

    def _know(self, rule_set: str, queue_key: str, agent_query_rules: Iterable[str]) -> None:
        """Mark a rule set's head as changed, and let profiles that match it know of it."""
        self._stale.add(rule_set)
        if rule_set in self._rule_sets:
            return
        rules = self._rule_sets[rule_set] = RuleSet.of(queue_key, agent_query_rules)
        for profile, matching in self._matching.items():
            if profile.matches(rules):
                matching.append(rule_set)

    def _first_for(self, profile: Profile) -> str | None:
        """The uuid of the first job in line that this profile may run, by a look at one head for each rule set."""
        while self._stale:
            rule_set = next(iter(self._stale))
            head = self._db.execute(FIRST_READY, [rule_set]).fetchone()
            if head and self._rule_sets[rule_set].queue_key not in self._paused:
                self._heads[rule_set] = head
            else:
                self._heads.pop(rule_set, None)
            self._stale.discard(rule_set)
        if profile not in self._matching:
            self._matching[profile] = [text for text, rules in self._rule_sets.items() if profile.matches(rules)]
        heads = self._heads
        first = min((heads[rule_set] for rule_set in self._matching[profile] if rule_set in heads), default=None)
        return first[2] if first else None

    # -- the end of a claim

    def _held(self, holder: Holder, now: float) -> Job:
        """The job that this claim holds, or held last; else a refusal that says which."""
        uuid, claim, worker = holder.uuid, holder.claim, holder.worker
        if worker and worker.name:
            row = self._db.execute("SELECT session, retired FROM workers WHERE name = ?", [worker.name]).fetchone()
            if row and row[0] != worker.session:
                self._refuse_retired(worker, row[0], json.loads(row[1]), now)
            else:
                self._seen[worker.name] = now
        job = self._select(uuid)
        if job is None:
            raise unknown_job(uuid)
        if claim is None and worker and worker.name and job.worker == worker.name and job.claim:
            return job
        if claim is None or claim not in (job.claim, job.completed_claim):
            raise stale_claim(holder, job.state, job.reason)
        return job

    def _held_now(self, holder: Holder, now: float) -> Job:
        """The same for what a claim that was completed cannot do any more."""
        job = self._held(holder, now)
        if holder.asked is not None and job.version > holder.asked:
            raise changed_meanwhile(holder)
        if holder.claim != job.claim:
            raise completed_claim(holder)
        return job

    def touch(self, holder: Holder, now: float) -> Job:
        with self._write():
            job = self._held_now(holder, now)
            if job.state is not JobState.LEASED:
                return job
            expires_at = now + self._settings.lease_seconds
            self._db.execute(
                "UPDATE jobs SET touched_at = ?, lease_expires_at = ? WHERE uuid = ?", [now, expires_at, job.uuid]
            )
            return dataclasses.replace(job, touched_at=now, lease_expires_at=expires_at)

    def release(self, holder: Holder, reason: str, answered_at: float, now: float) -> Job:
        with self._write():
            job = self._held_now(holder, now)
            if job.state is not JobState.LEASED:
                return job
            hung = now - (job.claimed_at or now) >= self._settings.acquire_seconds
            counted = hung and answered_at >= (job.claimed_at or now)
            return self._give_back(job, "release", reason, now, counted=counted, judged=not hung)

    def complete(self, holder: Holder, end: AgentEnd, answered_at: float, now: float) -> Job:
        with self._write():
            job = self._held(holder, now)
            ended = {"completed_claim": job.claim, "exit_status": end.exit_status}
            if holder.claim not in (None, job.claim) or job.claim in (None, job.completed_claim):
                return job  # said before
            if job.state is not JobState.LEASED:
                return self._change(job, **ended)
            rejected = end.exit_status == EXIT_REJECTED
            if end.exit_status not in (0, EXIT_REJECTED):
                # The agent itself failed: no other job for a moment, until Buildkite has said whether this one ran.
                self._db.execute(
                    "UPDATE workers SET held_until = max(held_until, ?) WHERE name = ?",
                    [now + HOLD_SECONDS, job.worker],
                )
            counted = not rejected and answered_at >= (job.claimed_at or now)
            reason = f"agent exited {end.exit_status}" + (f": {end.last_words}" if end.last_words else "")
            return self._give_back(job, "complete", reason, now, counted=counted, judged=rejected, **ended)

    def expire(self, answered_at: Mapping[str, float], now: float) -> list[Job]:
        query = f"{SELECT_JOB} WHERE state = 'leased' AND lease_expires_at <= ?"
        with self._guard():
            for queue_key in answered_at:
                self._expire_reservations(queue_key, now)
            expired: list[Job] = []
            if rows := self._db.execute(query, [now]).fetchall():
                with self._write():
                    expired = [self._expire(decoded(row), answered_at, now) for row in rows]
            ended, self._ended = self._ended, []
            return ended + expired

    def _expire_reservations(self, queue_key: str, now: float) -> None:
        """`ready` is not handed out on a reservation that has run out; what is leased stays with its holder."""
        if not self._db.execute(f"SELECT 1 FROM jobs WHERE {RUN_OUT} LIMIT 1", [queue_key, now]).fetchone():
            return
        with self._write():
            self._stale.update(self._rule_sets)
            self._db.execute(
                f"UPDATE jobs SET state = 'reserving', reason = 'its reservation ran out', version = ? WHERE {RUN_OUT}",
                [self._sequence, queue_key, now],
            )

    def _expire(self, job: Job, answered_at: Mapping[str, float], now: float) -> Job:
        # Never touched: the answer to the claim was lost, and nobody tried to run it.
        counted = job.touched_at is not None and answered_at.get(job.queue_key, 0.0) >= (job.claimed_at or 0.0)
        return self._give_back(job, "expire", "its lease expired", now, counted=counted, judged=True)

    def _give_back(
        self, job: Job, how: str, reason: str, now: float, *, counted: bool, judged: bool, **changes: Any
    ) -> Job:
        """`leased` → `reserving`, with the ended claim written to `tries`.

        `judged`: whether the worker is to blame is settled already, else Buildkite's next answer settles it.
        """
        ended = {
            "worker": job.worker,
            "claimed_at": job.claimed_at,
            "ended_at": now,
            "how": how,
            "exit_status": changes.get("exit_status"),
            "reason": reason,
            "counted": counted,
            "judged": judged,
        }
        return self._change(
            job,
            state=JobState.RESERVING,
            reason=f"{how}: {reason}"[:500],
            claim=None,
            lease_expires_at=None,
            attempts=job.attempts + counted,
            tries=(*job.tries, ended)[-KEPT_TRIES:],
            **changes,
        )

    # -- upkeep and reads

    def pause(self, queue_key: str, paused: bool) -> bool:
        with self._lock:
            if paused == (queue_key in self._paused):
                return False
            with self._write(durable=True):
                if paused:
                    self._db.execute("INSERT INTO paused_queues VALUES (?)", [queue_key])
                else:
                    self._db.execute("DELETE FROM paused_queues WHERE queue_key = ?", [queue_key])
            (self._paused.add if paused else self._paused.discard)(queue_key)
            self._stale.update(text for text, rules in self._rule_sets.items() if rules.queue_key == queue_key)
            return True

    def trust_no_clock(self, now: float, *, confirm: bool) -> None:
        with self._write(durable=True):
            lease = [now, now + self._settings.lease_seconds]
            self._db.execute("UPDATE jobs SET claimed_at = ?, lease_expires_at = ? WHERE state = 'leased'", lease)
            # Due at once; and should Buildkite not answer, `ready` soon goes back to `reserving`.
            due = [now + GRACE_SECONDS]
            self._db.execute("UPDATE jobs SET reservation_expires_at = ? WHERE state IN ('ready', 'leased')", due)
            self._db.execute("UPDATE workers SET held_until = min(held_until, ?)", [now + MAX_HOLD_SECONDS])
            self._seen = dict.fromkeys(self._seen, now)
            if confirm:
                self._stale.update(self._rule_sets)
                self._db.execute(
                    "UPDATE jobs SET state = 'reserving', reason = 'to be confirmed after a restart', version = ? "
                    "WHERE state = 'ready'",
                    [self._sequence],
                )

    def prune(self, before: float) -> int:
        with self._write():
            count = self._db.execute("DELETE FROM jobs WHERE state = 'done' AND done_at < ?", [before]).rowcount
            in_use = {row[0] for row in self._db.execute("SELECT DISTINCT rule_set FROM jobs WHERE state = 'ready'")}
            self._rule_sets = {text: rules for text, rules in self._rule_sets.items() if text in in_use}
            self._heads = {text: head for text, head in self._heads.items() if text in in_use}
            self._stale &= in_use
            self._matching.clear()
            self._forget_workers(before)
        return count

    def _forget_workers(self, before: float) -> None:
        unused = "SELECT name FROM workers WHERE coalesce(last_claim_at, 0) < ? AND held_until < ?"
        holders = "SELECT worker FROM jobs WHERE state IN ('leased', 'running') AND worker IS NOT NULL"
        names = self._db.execute(f"{unused} AND name NOT IN ({holders})", [before, before]).fetchall()
        silent = [row for row in names if self._seen.get(row[0], 0.0) < before]
        self._db.executemany("DELETE FROM workers WHERE name = ?", silent)
        # Who stays keeps its silence: else its old session, which may take the slot back, would be refused again.
        known = {row[0] for row in self._db.execute("SELECT name FROM workers")}
        self._seen = {name: at for name, at in self._seen.items() if name in known}

    def unconfirmed(self, queue_key: str, due_before: float, limit: int) -> list[str]:
        with self._read() as db:
            paused = queue_key in self._paused
            rows = db.execute(UNCONFIRMED, [queue_key, paused, limit]).fetchall()
            rows += db.execute(DUE, [queue_key, due_before, limit - len(rows)]).fetchall()
        return [row[0] for row in rows]

    def unfinished(self, queue_key: str) -> list[str]:
        with self._read() as db:
            rows = db.execute("SELECT uuid FROM jobs WHERE done_at IS NULL AND queue_key = ?", [queue_key]).fetchall()
        return [row[0] for row in rows]

    def held(self, queue_key: str) -> list[str]:
        query = "SELECT uuid FROM jobs WHERE state = '{}' AND queue_key = ?"
        with self._read() as db:
            return [uuid for state in ("leased", "running") for (uuid,) in db.execute(query.format(state), [queue_key])]

    def intents(self, queue_key: str) -> list[Job]:
        with self._read() as db:
            query = f"{SELECT_JOB} WHERE finish_detail IS NOT NULL AND state = 'reserving' AND queue_key = ?"
            return [decoded(row) for row in db.execute(query, [queue_key])]

    def get(self, uuid: str) -> Job | None:
        with self._read() as db:
            row = db.execute(f"{SELECT_JOB} WHERE uuid = ?", [uuid]).fetchone()
        return decoded(row) if row else None

    def page(self, state: JobState, after: tuple[int, float, str] | None, limit: int) -> list[Job]:
        first = f"{SELECT_JOB} WHERE uuid IN ({PAGE.format(state=state)})"  # the state as a literal, for its index
        with self._read() as db:
            rows = db.execute(first, [*(after or FRONT), limit]).fetchall()
        return sorted(map(decoded, rows), key=lambda job: job.order)

    def ahead(self, job: Job, most: int) -> int:
        with self._read() as db:
            line = [job.rule_set, job.priority]
            count: int = db.execute(AHEAD, [*line, *line, job.scheduled_at, job.uuid, most]).fetchone()[0]
        return count

    def stats(self) -> dict[str, Any]:
        with self._read() as db, db:
            db.execute("BEGIN")  # all of it as it was at one moment
            waiting = [Level(JobState(row[0]), *row[1:]) for row in db.execute(WAITING)]
            rows = [dict(zip(HELD_COLUMNS, row, strict=True)) for row in db.execute(HELD)]
            outcomes = db.execute("SELECT outcome, count(*) FROM jobs WHERE state = 'done' GROUP BY outcome").fetchall()
            totals = db.execute("SELECT queue_key, outcome, jobs FROM totals").fetchall()
        held = [Held(**row | {"state": JobState(row["state"])}) for row in rows]
        return stats_of(waiting, held, dict(outcomes), totals) | {"paused": sorted(self._paused)}

    def worker_rows(self) -> list[dict[str, Any]]:
        with self._read() as db:
            names = ("name", "tags", "failures", "held_until", "claims", "ran", "last_claim_at")
            rows = db.execute(f"SELECT {', '.join(names)} FROM workers ORDER BY name")
            return [dict(zip(names, row, strict=True)) for row in rows]

    def probe(self) -> None:
        with self._write():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('probed', datetime())")

    def remember_stacks(self, stack_keys: Mapping[str, str]) -> dict[str, int]:
        """Note under which stack each queue's jobs are reserved; refuse another while any of them is not done.

        Returns how many jobs are left of each queue that is not named.
        """
        with self._write(durable=True):
            query = "SELECT queue_key, count(*) FROM jobs WHERE done_at IS NULL GROUP BY queue_key"
            left = dict(self._db.execute(query))
            for queue_key, stack_key in stack_keys.items():
                name = f"stack of {queue_key}"
                row = self._db.execute("SELECT value FROM meta WHERE name = ?", [name]).fetchone()
                if row and row[0] != stack_key and queue_key in left:
                    raise SettingsError(
                        f"STACK_KEY: {left[queue_key]} jobs of queue {queue_key} are reserved as stack {row[0]!r}, not "
                        f"{stack_key!r}; set it back until they are done, or use another STATE_DIRECTORY"
                    )
                self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, stack_key])
            return {queue_key: count for queue_key, count in left.items() if queue_key not in stack_keys}


def stats_of(
    waiting: Sequence[Level],
    held: Sequence[Held],
    outcomes: Mapping[str, int],
    totals: Iterable[tuple[str, str, int]],
) -> dict[str, Any]:
    """What `Store.stats` answers, but for `paused`, from what a store counts."""
    levels = [*waiting]
    by_rules: dict[tuple[JobState, str], list[float]] = {}
    for job in held:
        by_rules.setdefault((job.state, job.rule_set), []).append(job.scheduled_at)
    levels += [Level(*state_and_rules, len(times), min(times)) for state_and_rules, times in by_rules.items()]
    states = dict.fromkeys(JobState, 0) | {JobState.DONE: sum(outcomes.values())}
    by_rule_set: collections.Counter[str] = collections.Counter()
    for level in levels:
        states[level.state] += level.jobs
    for level in waiting:
        by_rule_set[level.rule_set] += level.jobs
    by_queue: dict[str, dict[str, int]] = {}
    for queue_key, outcome, jobs in totals:
        by_queue.setdefault(queue_key, dict.fromkeys(Outcome, 0))[Outcome(outcome)] = jobs
    return {
        "levels": levels,
        "waiting": dict(by_rule_set),
        "states": states,
        "outcomes": dict.fromkeys(Outcome, 0) | dict(outcomes),
        "totals": by_queue,
        "held": list(held),
    }


def encoded(value: Any) -> Any:
    """A Job's field as SQLite keeps it."""
    return json.dumps(value) if isinstance(value, tuple | dict) else value


def decoded(row: Sequence[Any]) -> Job:
    """A row of SELECT_JOB as a Job."""
    values = dict(zip(COLUMNS, row, strict=True))
    values["agent_query_rules"] = tuple(json.loads(values["agent_query_rules"]))
    values["about"], values["tries"] = json.loads(values["about"]), tuple(json.loads(values["tries"]))
    values["state"] = JobState(values["state"])
    values["outcome"] = Outcome(values["outcome"]) if values["outcome"] else None
    return Job(**values)


def file_identity(path: str) -> tuple[int, int] | None:
    """What tells one file from another that takes its name; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def remedy(error: sqlite3.Error) -> str:
    """What a person can do about it, by SQLite's own name of the error."""
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    for start, advice in REMEDIES.items():
        if name.startswith(start):
            return advice
    return "see the scheduler's log"


START_AFRESH = (
    "the file is left as it is. Stop the scheduler and restore a backup, or move the file away: a new one is begun, "
    "and jobs that were in the old one come back as their reservations lapse"
)
REMEDIES = {
    "SQLITE_FULL": "free some space on its disk",
    "SQLITE_IOERR": "look at the disk (the kernel's log tells more), or free some space on it",
    "SQLITE_BUSY": "another program has the file locked: end it",
    "SQLITE_READONLY": "make the file and its directory writable for the scheduler",
    "SQLITE_CANTOPEN": "make the file and its directory readable for the scheduler",
    "SQLITE_CORRUPT": f"it is damaged: {START_AFRESH}",
    "SQLITE_NOTADB": f"it is damaged: {START_AFRESH}",
    "DatabaseError": f"it is damaged: {START_AFRESH}",
}


def own(path: str) -> int:
    """Lock a file for this process's life; SettingsError when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreInUse(
            f"another scheduler has {path} locked; a SQLite store serves one scheduler: "
            "stop that one, or give this one a STATE_DIRECTORY of its own"
        ) from None
    return descriptor


class StoreInUse(Exception):
    """Another process owns the store."""


def acquitted(job: Job) -> dict[str, Any]:
    """What changes when an agent had the job after all: its last ended claim was no failed attempt."""
    if not job.tries or job.tries[-1]["judged"]:
        return {}
    last = job.tries[-1]
    tries = (*job.tries[:-1], last | {"judged": True, "counted": False})
    return {"tries": tries, "attempts": job.attempts - last["counted"]}


def failed_too_often(job: Job, max_attempts: int, now: float) -> bool:
    """Enough attempts, by at least two workers, or by one over a quarter of an hour: it is not the worker's fault."""
    counted = [ended for ended in job.tries if ended["counted"]]
    if job.attempts < max_attempts or not counted:
        return False
    return len({ended["worker"] for ended in counted}) > 1 or now - counted[0]["claimed_at"] >= ONE_WORKER_SECONDS


def finish_detail(job: Job) -> str:
    """What the build page says of a job that we finish: what was tried, where, and the agent's last words."""
    lines = [f"No agent acquired this job in {job.attempts} attempts, so its stack gave up."]
    for ended in job.tries:
        if ended["counted"]:
            by = f"worker {ended['worker']}" if ended["worker"] else "a worker without a name"
            seconds = ended["ended_at"] - ended["claimed_at"]
            lines.append(f"{rfc3339(ended['claimed_at'])} {by}, {seconds:.0f} s: {ended['reason']}")
    return "\n".join(lines)


# --- Redis store ---

#: What the keys below the prefix look like; others are refused.
REDIS_SCHEMA = "1"
#: How long Redis may take to answer; how many calls of one scheduler may be under way.
REDIS_SECONDS, REDIS_CALLS = 2.0, 32
#: An answer that took longer (we were stopped, say) is no word on what time it is.
CLOCK_SECONDS = 0.25
#: Seconds without a word after which redis-py asks whether the line is whole. Then it asks each second: one by which
#: news come, and that has left more questions open than this, is opened again.
PING_SECONDS, UNANSWERED_PINGS = 5, 3
#: A leader that has not renewed its turn for this long has lost it. It renews every second.
TURN_SECONDS = 3.5
#: A leader that Buildkite has not answered for so long lets another try, and does not take the turn for a while.
UNANSWERED_SECONDS, MODEST_SECONDS = 15.0, 10.0
#: A scheduler that was not heard of for this long is not counted any more.
ALIVE_SECONDS = 10.0
#: How often schedulers tell each other what workers they have seen; what was told is believed for four times as long.
SEEN_SECONDS = 5.0
#: After so long without a leader, or in a Redis that was started since, `ready` is confirmed before it is handed out.
TRUST_SECONDS = 60.0
#: How many jobs one script changes at most, of which each is whole by itself: nobody else is served meanwhile.
SLICE = 250

# The keys, below the prefix. One primary carries them all, so the scripts make their names from KEYS[1], the prefix.
#   job:<uuid>         hash: the fields of a Job, as text; None is left out. `place` is its order as text
#   fresh:<queue>      zset of places: `reserving`, never reserved yet      back:<queue>  the same, reserved before
#   intents:<queue>    the same, to be finished                             ready:<rule set>  zset of places
#   line:<state>       zset of places: `leased`, `running`, `done`
#   ages:<state> <rule set>  zset by scheduled_at: `reserving`, `ready`
#   due:<queue>        zset by reservation_expires_at: `ready` and `leased`
#   leased             zset by lease_expires_at     held     hash: worker → the job that it has leased
#   ended              list: jobs whose claims CLAIM has ended, for EXPIRE to return
#   done               zset by done_at              unfinished:<queue>  set: not `done`
#   counts             hash: "outcome <outcome>", "reserving <rule set>" and "ready <rule set>" → how many
#   totals             hash: "<outcome> <queue>" → how many jobs ever became `done`
#   rule_sets          hash: rule set → its queue, a line's end, its rules; rule_sets_version changes when one is added
#   worker:<name>      hash, and `workers` the set of names    paused, queues  sets    stacks  hash: queue → its key
#   sequence, offers   counters: of changes, and of times that jobs became ready
#   answered_at        when Buildkite last answered whoever led
#   leader, fence, trusted, alive, schedulers, notes    see BEAT                seen:<scheduler>  see SEEN
PRELUDE = """
local prefix = KEYS[1]
local moves = {MOVES}
local ran_words = {RAN_WORDS}

local function call(command, key, ...) return redis.call(command, prefix .. key, ...) end

local function text(number) return string.format('%.17g', number) end

local function hash(key)
    local found, flat = {}, call('HGETALL', key)
    for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
    return found
end

local function flat(job)
    local listed = {}
    for name, value in pairs(job) do
        listed[#listed + 1] = name
        listed[#listed + 1] = value
    end
    return listed
end

local function job_of(uuid)
    local job = hash('job:' .. uuid)
    return job.uuid and job
end

-- The job, if an answer may be applied to it: it has not changed since the question.
local function known(uuid, asked)
    local job = job_of(uuid)
    return job and tonumber(job.version) <= tonumber(asked) and job
end

-- One number for all that this script changes.
local sequence
local function version()
    sequence = sequence or text(call('INCR', 'sequence'))
    return sequence
end

local function run_id()
    local info = redis.pcall('INFO', 'server')
    return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or 'unknown'
end

-- Only who has the newest token writes what a leader writes.
local function fenced(token) return (call('GET', 'fence') or '') ~= token end

-- The same for what Buildkite has answered, of which the moment is noted: whoever ends a claim has to know it.
local function fenced_answer(token, now)
    if fenced(token) then return true end
    call('SET', 'answered_at', now)
    return false
end

local function uuid_of(place) return string.sub(place, -36) end

local function count(what, by)
    if call('HINCRBY', 'counts', what, by) == 0 then call('HDEL', 'counts', what) end
end

-- Tell every scheduler that a job may be claimed now: which rule sets, or '*' for all.
local function offer(rule_sets)
    local news = {offer = call('INCR', 'offers'), rule_sets = rule_sets}
    redis.call('PUBLISH', prefix .. 'news', cjson.encode(news))
end

local function know_rule_set(job)
    local rules = job.queue_key .. '\\n' .. job.agent_query_rules
    if call('HSETNX', 'rule_sets', job.rule_set, rules) == 1 then
        -- A time, not a count: after a loss of data no number comes twice.
        local time = redis.call('TIME')
        call('SET', 'rule_sets_version', time[1] .. '.' .. time[2])
    end
end

-- Put a job into every index of its state, or take it out.
local function file(job, into)
    local queue, state, by = job.queue_key, job.state, into and 1 or -1
    local function zset(key, score, member)
        if into then call('ZADD', key, score, member) else call('ZREM', key, member) end
    end
    if state == 'reserving' then
        local line = job.finish_detail and 'intents:' or job.reserved_at and 'back:' or 'fresh:'
        zset(line .. queue, 0, job.place)
    elseif state == 'ready' then
        zset('ready:' .. job.rule_set, 0, job.place)
        zset('due:' .. queue, job.reservation_expires_at, job.uuid)
        if into then know_rule_set(job) end
    elseif state == 'leased' then
        zset('leased', job.lease_expires_at, job.uuid)
        zset('due:' .. queue, job.reservation_expires_at, job.uuid)
        if job.worker and into then call('HSET', 'held', job.worker, job.uuid) end
        if job.worker and not into then call('HDEL', 'held', job.worker) end
    elseif state == 'done' then
        zset('done', job.done_at, job.uuid)
        count('outcome ' .. job.outcome, by)
    end
    if state == 'reserving' or state == 'ready' then
        count(state .. ' ' .. job.rule_set, by)
        zset('ages:' .. state .. ' ' .. job.rule_set, job.scheduled_at, job.uuid)
    else
        zset('line:' .. state, 0, job.place)
    end
end

-- Write fields of a job, `false` for none; a change of state must be a legal move.
local function change(job, changes)
    local before, state = job.state, changes.state or job.state
    if state ~= before and not moves[before][state] then
        error('job ' .. job.uuid .. ': ' .. before .. ' does not become ' .. state)
    end
    file(job, false)
    changes.version = version()
    local set, gone = {}, {}
    for name, value in pairs(changes) do
        if value then
            set[#set + 1] = name
            set[#set + 1] = value
        else
            gone[#gone + 1] = name
        end
        job[name] = value or nil
    end
    call('HSET', 'job:' .. job.uuid, unpack(set))
    if #gone > 0 then call('HDEL', 'job:' .. job.uuid, unpack(gone)) end
    file(job, true)
    if state == 'done' and before ~= 'done' then
        call('SREM', 'unfinished:' .. job.queue_key, job.uuid)
        call('HINCRBY', 'totals', job.outcome .. ' ' .. job.queue_key, 1)
    end
    return job
end

local function renew(job, expires_at)
    call('HSET', 'job:' .. job.uuid, 'reservation_expires_at', expires_at)
    call('ZADD', 'due:' .. job.queue_key, expires_at, job.uuid)
end

local function is_worker(name) return name and call('EXISTS', 'worker:' .. name) == 1 end

-- `leased` to `reserving`, with the ended claim written to `tries`; `shown` becomes the job's reason.
local function give_back(job, ended, shown, changes)
    local tries = cjson.decode(job.tries)
    ended.worker, ended.claimed_at, ended.exit_status = job.worker, job.claimed_at, changes.exit_status
    tries[#tries + 1] = ended
    if #tries > {KEPT_TRIES} then table.remove(tries, 1) end
    changes.state, changes.reason, changes.tries = 'reserving', shown, cjson.encode(tries)
    changes.claim, changes.lease_expires_at = false, false
    if ended.counted then changes.attempts = text(job.attempts + 1) end
    return change(job, changes)
end

local function expire(job, reason, now, counted)
    local ended = {how = 'expire', reason = reason, ended_at = now, counted = counted, judged = true}
    return give_back(job, ended, 'expire: ' .. reason, {})
end

-- What changes when an agent had the job after all.
local function acquitted(job)
    local tries = cjson.decode(job.tries)
    local last = tries[#tries]
    if not last or last.judged then return {} end
    local attempts = text(job.attempts - (last.counted and 1 or 0))
    last.judged, last.counted = true, false
    return {tries = cjson.encode(tries), attempts = attempts}
end

local function absolve(name)
    if is_worker(name) and tonumber(call('HGET', 'worker:' .. name, 'held_until')) > 0 then
        call('HSET', 'worker:' .. name, 'failures', '0', 'held_until', '0')
    end
end

-- Whether a session that another one has replaced may not speak for the slot: that one was heard of lately.
local function is_refused(row, session, now)
    if tonumber(now) - tonumber(row.heard_at) > {SESSION_SECONDS} then return false end
    for retired in string.gmatch(row.retired, '[^\\n]+') do
        if retired == session then return true end
    end
    return false
end

-- Whether what a request names, '=<id>' or '' for nothing, is this claim.
local function is_claim(named, id) return id ~= nil and named == '=' .. id end

-- The job that this claim holds, or held last; else nil and a refusal.
local function held(uuid, claim, name, session, now)
    local row = name ~= '' and hash('worker:' .. name) or {}
    if row.session and row.session ~= session then
        if is_refused(row, session, now) then return nil, {'taken', row.session} end
    elseif row.session then
        call('HSET', 'worker:' .. name, 'heard_at', now)
    end
    local job = job_of(uuid)
    if not job then return nil, {'unknown'} end
    if claim == '' and name ~= '' and job.worker == name and job.claim then return job end
    if is_claim(claim, job.claim) or is_claim(claim, job.completed_claim) then return job end
    return nil, {'stale', job.state, job.reason}
end

-- The same for what a claim that was completed cannot do any more.
local function held_now(uuid, claim, name, session, now)
    local job, refusal = held(uuid, claim, name, session, now)
    if job and not is_claim(claim, job.claim) then return nil, {'completed'} end
    return job, refusal
end
"""

#: Put: writes down what is new or over, and sends back what was held, as one.
#: ARGV: token, asked, now, then each job as a JSON object of its fields, as text. Returns the jobs that were put.
PUT = """
if fenced_answer(ARGV[1], ARGV[3]) then return 'fenced' end
local put = {}
for i = 4, #ARGV do
    local job = cjson.decode(ARGV[i])
    local held = job_of(job.uuid)
    local unchanged = held and tonumber(held.version) <= tonumber(ARGV[2])
    if not held or (held.state == 'done' and unchanged) then
        if held then
            file(held, false)
            call('DEL', 'job:' .. job.uuid)
            job.claims = held.claims
            local tries = cjson.decode(held.tries)
            for _, ended in ipairs(tries) do ended.counted, ended.judged = false, true end
            if #tries > 0 then job.tries = cjson.encode(tries) end
        end
        job.version = version()
        call('HSET', 'job:' .. job.uuid, unpack(flat(job)))
        call('SADD', 'queues', job.queue_key)
        call('SADD', 'unfinished:' .. job.queue_key, job.uuid)
        file(job, true)
        put[#put + 1] = flat(job)
    elseif unchanged and held.state == 'leased' then
        renew(held, '0')
    elseif unchanged and held.state ~= 'reserving' then
        change(held, {state = 'reserving', reason = 'listed as scheduled again'})
    end
end
return put
"""

#: Confirm: makes `reserving` ready or writes its intent, renews the rest, and tells every scheduler, as one.
#: ARGV: token, asked, expires_at, now, MAX_ATTEMPTS, then uuids. Returns the jobs that changed.
CONFIRM = """
if fenced_answer(ARGV[1], ARGV[4]) then return 'fenced' end
local expires_at, now = ARGV[3], tonumber(ARGV[4])

local function blame(tries)
    local last = tries[#tries]
    if not last or last.judged then return end
    last.judged = true
    if is_worker(last.worker) then
        local failures = call('HINCRBY', 'worker:' .. last.worker, 'failures', 1)
        local hold = math.min({HOLD_SECONDS} * 2 ^ math.min(failures - 1, 16), {MAX_HOLD_SECONDS})
        call('HSET', 'worker:' .. last.worker, 'held_until', text(now + hold))
    end
end

local function failed_too_often(job, tries)
    local first, workers, distinct = nil, {}, 0
    for _, ended in ipairs(tries) do
        if ended.counted then
            first = first or ended
            local worker = ended.worker or ''
            if not workers[worker] then workers[worker], distinct = true, distinct + 1 end
        end
    end
    if not first or tonumber(job.attempts) < tonumber(ARGV[5]) then return false end
    return distinct > 1 or now - tonumber(first.claimed_at) >= {ONE_WORKER_SECONDS}
end

local changed, rule_sets, offered = {}, {}, {}
for i = 6, #ARGV do
    local job = known(ARGV[i], ARGV[2])
    if job and job.state == 'reserving' and not job.finish_detail then
        local tries = cjson.decode(job.tries)
        blame(tries)
        local changes = {reserved_at = job.reserved_at or ARGV[4], reservation_expires_at = expires_at}
        if #tries > 0 then changes.tries = cjson.encode(tries) end
        if failed_too_often(job, tries) then
            -- Its text is made of `tries` when it is read.
            changes.finish_detail, changes.reason = 'intended', 'failed too often'
        else
            changes.state, changes.reason = 'ready', 'reserved'
            changes.claim, changes.worker, changes.session, changes.lease_expires_at = false, false, false, false
            if not offered[job.rule_set] then
                offered[job.rule_set] = true
                rule_sets[#rule_sets + 1] = job.rule_set
            end
        end
        changed[#changed + 1] = flat(change(job, changes))
    elseif job and (job.state == 'ready' or job.state == 'leased') then
        renew(job, expires_at)
    end
end
if #rule_sets > 0 then offer(rule_sets) end
return changed
"""

#: Learn: applies what Buildkite said of jobs, as one.
#: ARGV: token, asked, now, then uuid, finding and word of each. Returns the jobs that changed.
LEARN = """
if fenced_answer(ARGV[1], ARGV[3]) then return 'fenced' end

local function learn(job, finding, word)
    if job.state == 'done' then return nil end
    if finding == 'lapsed' then
        if job.state ~= 'ready' then return nil end
        return change(job, {state = 'reserving', reason = 'its reservation lapsed: ' .. word})
    end
    if finding == 'acquired' then
        if job.state == 'running' then return nil end
        absolve(job.worker)
        local changes = acquitted(job)
        changes.state, changes.acquired_at, changes.reason, changes.finish_detail = 'running', ARGV[3], word, false
        return change(job, changes)
    end
    local claimed = tonumber(job.claims) > 0
    local ran = finding == 'over' and (job.state == 'running' or (claimed and ran_words[word]))
    local changes, outcome = {}, ran and 'ran' or 'dropped'
    -- Our finish was heard, its answer lost.
    if job.finish_detail and ran_words[word] then outcome = 'failed' end
    if outcome == 'ran' then
        absolve(job.worker)
        if is_worker(job.worker) then call('HINCRBY', 'worker:' .. job.worker, 'ran', 1) end
        changes = acquitted(job)
    end
    changes.state, changes.outcome, changes.reason, changes.done_at = 'done', outcome, word, ARGV[3]
    return change(job, changes)
end

local changed = {}
for i = 4, #ARGV, 3 do
    local job = known(ARGV[i], ARGV[2])
    local after = job and learn(job, ARGV[i + 1], ARGV[i + 2])
    if after then changed[#changed + 1] = flat(after) end
end
return changed
"""

#: Finish: the job with the intent is done, as one. ARGV: token, uuid, now. Returns the jobs that changed.
FINISH = """
if fenced(ARGV[1]) then return 'fenced' end
local job = job_of(ARGV[2])
if not job or not job.finish_detail or job.state ~= 'reserving' then return {} end
return {flat(change(job, {state = 'done', outcome = 'failed', reason = 'finished', done_at = ARGV[3]}))}
"""

#: Claim: the slot's session, its hold, the job it holds already, and the lease of the first in line, as one.
#: ARGV: rule_sets_version, name, session, tags, now, id, lease_expires_at, ACQUIRE_SECONDS, then
#: queue and rule set of each that the worker matches. Returns {"job", fields}, {"none"}, {"rule sets"} when they
#: have changed, {"held", until} or {"taken", session}.
CLAIM = """
local name, session, now = ARGV[2], ARGV[3], ARGV[5]
if (call('GET', 'rule_sets_version') or '') ~= ARGV[1] then return {'rule sets'} end

-- End a claim because of another claim of its worker; whoever runs EXPIRE next tells of it.
local function end_claim(uuid, reason)
    call('RPUSH', 'ended', cjson.encode(flat(expire(job_of(uuid), reason, now, false))))
    call('LTRIM', 'ended', -{SLICE}, -1)
end

-- A new session of a known slot means that the worker was restarted.
local function replace_session(row)
    local retired, kept = {}, {}
    for old in string.gmatch((row.retired or '') .. '\\n' .. (row.session or ''), '[^\\n]+') do
        if old ~= session then retired[#retired + 1] = old end
    end
    for i = math.max(1, #retired - 7), #retired do kept[#kept + 1] = retired[i] end
    if not row.session then
        call('SADD', 'workers', name)
        call('HSET', 'worker:' .. name, 'failures', '0', 'held_until', '0', 'claims', '0', 'ran', '0')
    end
    call('HSET', 'worker:' .. name, 'session', session, 'retired', table.concat(kept, '\\n'), 'tags', ARGV[4])
    local uuid = call('HGET', 'held', name)
    if uuid then end_claim(uuid, 'its worker was restarted') end
end

if name ~= '' then
    local row = hash('worker:' .. name)
    if row.session ~= session then
        if row.session and is_refused(row, session, now) then return {'taken', row.session} end
        replace_session(row)
    end
    call('HSET', 'worker:' .. name, 'heard_at', now)
    local uuid = call('HGET', 'held', name)
    if uuid then
        local job = job_of(uuid)
        if now - job.claimed_at <= tonumber(ARGV[8]) then
            return {'job', flat(change(job, {lease_expires_at = ARGV[7]}))}
        end
        -- Its answers get lost for too long: others may have better luck with this one.
        end_claim(uuid, 'its worker never got the answer')
    end
    local held_until = call('HGET', 'worker:' .. name, 'held_until')
    if tonumber(held_until) > tonumber(now) then return {'held', held_until} end
end

if call('GET', 'trusted') ~= run_id() then return {'none'} end
local paused = {}
for _, queue in ipairs(call('SMEMBERS', 'paused')) do paused[queue] = true end
local first
for i = 9, #ARGV, 2 do
    if not paused[ARGV[i]] then
        local head = call('ZRANGE', 'ready:' .. ARGV[i + 1], 0, 0)[1]
        if head and (not first or head < first) then first = head end
    end
end
if not first then return {'none'} end
local job = job_of(uuid_of(first))
if name ~= '' then
    call('HINCRBY', 'worker:' .. name, 'claims', 1)
    call('HSET', 'worker:' .. name, 'last_claim_at', now)
end
return {'job', flat(change(job, {
    state = 'leased', reason = 'claimed', claim = ARGV[6], claims = text(job.claims + 1), claimed_at = now,
    worker = name ~= '' and name, session = session ~= '' and session, lease_expires_at = ARGV[7],
    touched_at = false, acquired_at = false, exit_status = false,
}))}
"""

#: Touch: renews the lease of who holds it, as one.
#: ARGV: uuid, claim, name, session, now, lease_expires_at. Returns {"job", fields} or why not.
TOUCH = """
local job, refusal = held_now(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
if not job then return refusal end
if job.state == 'leased' then
    job.touched_at, job.lease_expires_at = ARGV[5], ARGV[6]
    call('HSET', 'job:' .. job.uuid, 'touched_at', ARGV[5], 'lease_expires_at', ARGV[6])
    call('ZADD', 'leased', ARGV[6], job.uuid)
end
return {'job', flat(job)}
"""

#: Release: gives back the job of who holds it, as one.
#: ARGV: uuid, claim, name, session, now, asked or '', reason, the job's reason, answered_at, ACQUIRE_SECONDS.
#: Returns {"job", fields} or why not.
RELEASE = """
local now = ARGV[5]
local job, refusal = held(ARGV[1], ARGV[2], ARGV[3], ARGV[4], now)
if not job then return refusal end
if ARGV[6] ~= '' and tonumber(job.version) > tonumber(ARGV[6]) then return {'changed'} end
if not is_claim(ARGV[2], job.claim) then return {'completed'} end
if job.state == 'leased' then
    local hung = now - job.claimed_at >= tonumber(ARGV[10])
    local counted = hung and tonumber(ARGV[9]) >= tonumber(job.claimed_at)
    local ended = {how = 'release', reason = ARGV[7], ended_at = now, counted = counted, judged = not hung}
    give_back(job, ended, ARGV[8], {})
end
return {'job', flat(job)}
"""

#: Complete: notes the exit status, and gives back a job that no agent is known to have acquired, as one.
#: ARGV: uuid, claim, name, session, now, exit_status, reason, the job's reason, answered_at.
#: Returns {"job", fields} or why not.
COMPLETE = """
local now, exit_status = ARGV[5], ARGV[6]
local job, refusal = held(ARGV[1], ARGV[2], ARGV[3], ARGV[4], now)
if not job then return refusal end
local said_now = job.claim and job.claim ~= job.completed_claim and (ARGV[2] == '' or is_claim(ARGV[2], job.claim))
if not said_now then return {'job', flat(job)} end
local changes = {completed_claim = job.claim, exit_status = exit_status}
if job.state ~= 'leased' then return {'job', flat(change(job, changes))} end
local rejected = exit_status == '{EXIT_REJECTED}'
if exit_status ~= '0' and not rejected and is_worker(job.worker) then
    -- The agent itself failed: no other job for a moment, until Buildkite has said whether this one ran.
    local held_until = tonumber(call('HGET', 'worker:' .. job.worker, 'held_until'))
    call('HSET', 'worker:' .. job.worker, 'held_until', text(math.max(held_until, now + {HOLD_SECONDS})))
end
local counted = not rejected and tonumber(ARGV[9]) >= tonumber(job.claimed_at)
local ended = {how = 'complete', reason = ARGV[7], ended_at = now, counted = counted, judged = rejected}
return {'job', flat(give_back(job, ended, ARGV[8], changes))}
"""

#: Expire: gives back leases that have run out, and stops handing out reservations that have; up to SLICE of each.
#: ARGV: token, now, then queue and answered_at of each. Returns {whether there may be more, jobs that were leased};
#: among these are the ones whose claims CLAIM has ended since.
EXPIRE = """
if fenced(ARGV[1]) then return 'fenced' end
-- While Redis was away nobody could touch: leases get their full time first.
if call('GET', 'trusted') ~= run_id() then return {0, {}} end
local now, moved, answered_at, expired = ARGV[2], 0, {}, {}
for i = 3, #ARGV, 2 do
    answered_at[ARGV[i]] = tonumber(ARGV[i + 1])
    for _, uuid in ipairs(call('ZRANGEBYSCORE', 'due:' .. ARGV[i], '-inf', now)) do
        if moved == {SLICE} then break end
        if call('HGET', 'job:' .. uuid, 'state') == 'ready' then
            change(job_of(uuid), {state = 'reserving', reason = 'its reservation ran out'})
            moved = moved + 1
        end
    end
end
for _, uuid in ipairs(call('ZRANGEBYSCORE', 'leased', '-inf', now, 'LIMIT', 0, {SLICE})) do
    local job = job_of(uuid)
    -- Never touched: the answer to the claim was lost, and nobody tried to run it.
    local counted = job.touched_at and (answered_at[job.queue_key] or 0) >= tonumber(job.claimed_at)
    expired[#expired + 1] = flat(expire(job, 'its lease expired', now, counted and true or false))
end
local more = moved == {SLICE} or #expired == {SLICE}
for _, ended in ipairs(call('LRANGE', 'ended', 0, -1)) do expired[#expired + 1] = cjson.decode(ended) end
call('DEL', 'ended')
return {more and 1 or 0, expired}
"""

#: Pause: remembers whether the queue is paused, and tells every scheduler when it is no more, as one.
#: ARGV: token, queue, '1' or '0'. Returns whether it is news.
PAUSE = """
if fenced(ARGV[1]) then return 'fenced' end
local news = call(ARGV[3] == '1' and 'SADD' or 'SREM', 'paused', ARGV[2])
if news == 1 and ARGV[3] == '0' then offer({'*'}) end
return news
"""

#: Trust no clock: makes up to SLICE reservations due, with `confirm` none `ready`; with the last of them, full leases,
#: and, with `confirm`, trust in this run of Redis. Until then nothing is claimed, so it is one to whoever claims.
#: ARGV: token, now, lease_expires_at, reservation_expires_at, latest held_until, confirm, a number that was seen of
#: `sequence`, the schema. Returns whether there may be more.
TRUST_NO_CLOCK = """
if fenced(ARGV[1]) then return 'fenced' end
local now, due_at, confirm, left = ARGV[2], ARGV[4], ARGV[6] == '1', {SLICE}
-- After a loss of data: no answer that is under way may find a row older than it is.
if tonumber(call('GET', 'sequence') or 0) < tonumber(ARGV[7]) then call('SET', 'sequence', ARGV[7]) end
if confirm then
    call('DEL', 'trusted')
    for _, rule_set in ipairs(call('HKEYS', 'rule_sets')) do
        for _, place in ipairs(left > 0 and call('ZRANGE', 'ready:' .. rule_set, 0, left - 1) or {}) do
            local changes = {state = 'reserving', reason = 'to be confirmed after a restart'}
            changes.reservation_expires_at = due_at
            change(job_of(uuid_of(place)), changes)
            left = left - 1
        end
    end
end
for _, queue in ipairs(call('SMEMBERS', 'queues')) do
    for _, range in ipairs({{'-inf', '(' .. due_at}, {'(' .. due_at, '+inf'}}) do
        for _, uuid in ipairs(call('ZRANGEBYSCORE', 'due:' .. queue, range[1], range[2], 'LIMIT', 0, left)) do
            renew(job_of(uuid), due_at)
            left = left - 1
        end
    end
end
if left == 0 then return 1 end
for _, uuid in ipairs(call('ZRANGE', 'leased', 0, -1)) do
    call('HSET', 'job:' .. uuid, 'claimed_at', now, 'lease_expires_at', ARGV[3])
    call('ZADD', 'leased', ARGV[3], uuid)
end
for _, name in ipairs(call('SMEMBERS', 'workers')) do
    local held_until = math.min(tonumber(call('HGET', 'worker:' .. name, 'held_until')), tonumber(ARGV[5]))
    call('HSET', 'worker:' .. name, 'held_until', text(held_until), 'heard_at', now)
end
call('SET', 'schema', ARGV[8])
if confirm then call('SET', 'trusted', run_id(), 'PX', {TRUST_MS}) end
return 0
"""

#: Prune: forgets up to SLICE jobs that were done before, then silent workers and rule sets without a job, as one.
#: ARGV: token, before. Returns how many jobs.
PRUNE = """
if fenced(ARGV[1]) then return 'fenced' end
local before = ARGV[2]
local old = call('ZRANGEBYSCORE', 'done', '-inf', '(' .. before, 'LIMIT', 0, {SLICE})
for _, uuid in ipairs(old) do
    file(job_of(uuid), false)
    call('DEL', 'job:' .. uuid)
end
for _, rule_set in ipairs(call('HKEYS', 'rule_sets')) do
    if call('EXISTS', 'ready:' .. rule_set) == 0 then call('HDEL', 'rule_sets', rule_set) end
end
local busy = {}
for _, place in ipairs(call('ZRANGE', 'line:running', 0, -1)) do
    busy[call('HGET', 'job:' .. uuid_of(place), 'worker') or ''] = true
end
for _, name in ipairs(call('SMEMBERS', 'workers')) do
    local row = hash('worker:' .. name)
    local last = math.max(tonumber(row.last_claim_at or 0), tonumber(row.held_until), tonumber(row.heard_at))
    if last < tonumber(before) and not busy[name] and call('HEXISTS', 'held', name) == 0 then
        call('DEL', 'worker:' .. name)
        call('SREM', 'workers', name)
    end
end
return #old
"""

#: Unconfirmed: what the next batch-reserve is to name, read as one.
#: ARGV: queue, due_before, limit. Returns uuids.
UNCONFIRMED_OF = """
local queue, limit, uuids = ARGV[1], tonumber(ARGV[3]), {}
local places = call('ZRANGE', 'back:' .. queue, 0, limit - 1)
if call('SISMEMBER', 'paused', queue) == 0 then
    for _, place in ipairs(call('ZRANGE', 'fresh:' .. queue, 0, limit - 1)) do places[#places + 1] = place end
    table.sort(places)
end
for i = 1, math.min(#places, limit) do uuids[i] = uuid_of(places[i]) end
if #uuids < limit then
    local due = call('ZRANGEBYSCORE', 'due:' .. queue, '-inf', '(' .. ARGV[2], 'LIMIT', 0, limit - #uuids)
    for _, uuid in ipairs(due) do uuids[#uuids + 1] = uuid end
end
return uuids
"""

#: Reads the jobs of one line. ARGV: its key.
JOBS_OF = """
local jobs = {}
for i, place in ipairs(call('ZRANGE', ARGV[1], 0, -1)) do jobs[i] = flat(job_of(uuid_of(place))) end
return jobs
"""

#: Reads the uuids of a queue's jobs that are `leased` or `running`. ARGV: the queue.
HELD_IN = """
local uuids = {}
for _, line in ipairs({'line:leased', 'line:running'}) do
    for _, place in ipairs(call('ZRANGE', line, 0, -1)) do
        local uuid = uuid_of(place)
        if call('HGET', 'job:' .. uuid, 'queue_key') == ARGV[1] then uuids[#uuids + 1] = uuid end
    end
end
return uuids
"""

#: Page: reads the jobs in one state as they stand in line, from all its lines at once.
#: ARGV: the state, after which place ('-': from the front), limit.
PAGE_OF = """
local state, limit, keys, heads, jobs = ARGV[1], tonumber(ARGV[3]), {}, {}, {}
if state == 'ready' then
    for _, rule_set in ipairs(call('HKEYS', 'rule_sets')) do keys[#keys + 1] = 'ready:' .. rule_set end
elseif state == 'reserving' then
    for _, queue in ipairs(call('SMEMBERS', 'queues')) do
        for _, line in ipairs({'fresh:', 'back:', 'intents:'}) do keys[#keys + 1] = line .. queue end
    end
else
    keys = {'line:' .. state}
end

local function head_of(key, after)
    local place = call('ZRANGEBYLEX', key, after, '+', 'LIMIT', 0, 1)[1]
    return place and {place = place, key = key}
end

for _, key in ipairs(keys) do heads[#heads + 1] = head_of(key, ARGV[2]) end
table.sort(heads, function(one, other) return one.place < other.place end)
while #heads > 0 and #jobs < limit do
    local first = table.remove(heads, 1)
    jobs[#jobs + 1] = flat(job_of(uuid_of(first.place)))
    local head = head_of(first.key, '(' .. first.place)
    if head then
        -- Into its place among the others, of which those beyond the limit come to nothing.
        local low, high = 1, #heads + 1
        while low < high do
            local middle = math.floor((low + high) / 2)
            if heads[middle].place < head.place then low = middle + 1 else high = middle end
        end
        if low <= limit - #jobs then table.insert(heads, low, head) end
    end
end
return jobs
"""

#: Stats: reads all that is counted as one. Returns {state, rule set, jobs, oldest} of each that wait, outcomes, totals,
#: paused queues, and of each held job the HELD_COLUMNS.
STATS = """
local levels, outcomes, held, counts = {}, {}, {}, call('HGETALL', 'counts')
for i = 1, #counts, 2 do
    local kind, name = string.match(counts[i], '(%S+) (.*)')
    if kind == 'outcome' then
        outcomes[#outcomes + 1] = name
        outcomes[#outcomes + 1] = counts[i + 1]
    else
        local oldest = call('ZRANGE', 'ages:' .. counts[i], 0, 0, 'WITHSCORES')[2]
        levels[#levels + 1] = {kind, name, counts[i + 1], oldest}
    end
end
for _, state in ipairs({'leased', 'running'}) do
    for _, place in ipairs(call('ZRANGE', 'line:' .. state, 0, -1)) do
        held[#held + 1] = call('HMGET', 'job:' .. uuid_of(place), {HELD_COLUMNS})
    end
end
return {levels, outcomes, call('HGETALL', 'totals'), call('SMEMBERS', 'paused'), held}
"""

WORKER_COLUMNS = ("tags", "failures", "held_until", "claims", "ran", "last_claim_at")
#: Reads every worker as one: its name, then the WORKER_COLUMNS.
WORKERS = """
local rows, names = {}, call('SMEMBERS', 'workers')
for i, name in ipairs(names) do
    rows[i] = call('HMGET', 'worker:' .. name, {WORKER_COLUMNS})
    table.insert(rows[i], 1, name)
end
return rows
"""

#: Notes under which stack each queue's jobs are reserved; refuses another while any is not done, as one.
#: ARGV: the schema, then queue and stack key of each. Returns {"schema", found}, {"stack", queue, known, left}, or
#: {"left"} with queue and number of unfinished jobs of each queue that was not named.
REMEMBER_STACKS = """
local schema, named, left = call('GET', 'schema'), {}, {'left'}
if schema and schema ~= ARGV[1] then return {'schema', schema} end
for i = 2, #ARGV, 2 do
    local stack, unfinished = call('HGET', 'stacks', ARGV[i]), call('SCARD', 'unfinished:' .. ARGV[i])
    named[ARGV[i]] = true
    if stack and stack ~= ARGV[i + 1] and unfinished > 0 then return {'stack', ARGV[i], stack, unfinished} end
end
call('SET', 'schema', ARGV[1])
for i = 2, #ARGV, 2 do call('HSET', 'stacks', ARGV[i], ARGV[i + 1]) end
for _, queue in ipairs(call('SMEMBERS', 'queues')) do
    local unfinished = call('SCARD', 'unfinished:' .. queue)
    if not named[queue] and unfinished > 0 then
        left[#left + 1] = queue
        left[#left + 1] = unfinished
    end
end
return left
"""

#: Beat: says that a scheduler is alive, and takes or renews its turn to talk to Buildkite, as one.
#: `leader` is who has the turn, and ends by itself; `fence` the newest token, new with every turn; `trusted` the run of
#: Redis in which the last leader led; `alive` and `schedulers` who is there, with what settings; `notes` the leader's.
#: ARGV: name, its settings, lease_expires_at, its notes, '' if it does not want the turn.
#: Returns the token or '', the leader, for how many ms, `offers`, whether Redis is trusted, notes, Redis's time, and
#: name and settings of each scheduler.
BEAT = """
local name, time = ARGV[1], redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
call('ZADD', 'alive', ms + {ALIVE_MS}, name)
call('HSET', 'schedulers', name, ARGV[2])
for _, gone in ipairs(call('ZRANGEBYSCORE', 'alive', '-inf', ms)) do
    call('ZREM', 'alive', gone)
    call('HDEL', 'schedulers', gone)
end
local leader, token = call('GET', 'leader'), ''
if not leader and ARGV[5] ~= '' then
    leader = name
    -- A time, not a count: after a loss of data no token comes twice.
    call('SET', 'fence', time[1] .. '.' .. string.format('%06d', time[2]) .. ' ' .. name)
    -- Nobody could be told to touch while there was no leader's upkeep: leases get their full time.
    for _, uuid in ipairs(call('ZRANGEBYSCORE', 'leased', '-inf', '(' .. ARGV[3])) do
        call('HSET', 'job:' .. uuid, 'lease_expires_at', ARGV[3])
        call('ZADD', 'leased', ARGV[3], uuid)
    end
end
local trusted = call('GET', 'trusted') == run_id()
if leader == name and ARGV[5] ~= '' then
    call('SET', 'leader', name, 'PX', {TURN_MS})
    call('SET', 'notes', ARGV[4])
    token = call('GET', 'fence')
    if trusted then call('PEXPIRE', 'trusted', {TRUST_MS}) end
end
local offers, notes = call('GET', 'offers') or '0', call('GET', 'notes') or '{}'
local schedulers = call('HGETALL', 'schedulers')
return {token, leader or '', call('PTTL', 'leader'), offers, trusted and 1 or 0, notes, time, schedulers}
"""

#: Leave: gives the turn back, and tells the others, as one. ARGV: name.
LEAVE = """
call('ZREM', 'alive', ARGV[1])
call('HDEL', 'schedulers', ARGV[1])
if call('GET', 'leader') == ARGV[1] then call('DEL', 'leader') end
redis.call('PUBLISH', prefix .. 'news', cjson.encode({left = ARGV[1]}))
return 'OK'
"""


#: Seen: says what workers a scheduler has seen, and reads what the others have, as one. It ends by itself when the
#: scheduler does. ARGV: name, what it has seen. Returns what each other has.
SEEN = """
local others = {}
call('SET', 'seen:' .. ARGV[1], ARGV[2], 'PX', {SEEN_MS})
for _, name in ipairs(call('HKEYS', 'schedulers')) do
    if name ~= ARGV[1] then others[#others + 1] = call('GET', 'seen:' .. name) or nil end
end
return others
"""


def lua(body: str) -> str:
    """A script: the prelude before its body, our constants in both."""
    constants: dict[str, object] = {
        "MOVES": "{" + ", ".join(f"{state} = {lua_set(moves)}" for state, moves in MOVES.items()) + "}",
        "RAN_WORDS": lua_set(RAN_WORDS),
        "KEPT_TRIES": KEPT_TRIES,
        "SESSION_SECONDS": SESSION_SECONDS,
        "HOLD_SECONDS": HOLD_SECONDS,
        "MAX_HOLD_SECONDS": MAX_HOLD_SECONDS,
        "ONE_WORKER_SECONDS": ONE_WORKER_SECONDS,
        "EXIT_REJECTED": EXIT_REJECTED,
        "SLICE": SLICE,
        "TURN_MS": int(TURN_SECONDS * 1000),
        "ALIVE_MS": int(ALIVE_SECONDS * 1000),
        "TRUST_MS": int(TRUST_SECONDS * 1000),
        "SEEN_MS": int(4 * SEEN_SECONDS * 1000),
        "HELD_COLUMNS": ", ".join(f"'{name}'" for name in HELD_COLUMNS),
        "WORKER_COLUMNS": ", ".join(f"'{name}'" for name in WORKER_COLUMNS),
    }
    return re.sub(r"\{([A-Z_]+)\}", lambda found: str(constants[found[1]]), PRELUDE + body)


def lua_set(words: Iterable[str]) -> str:
    return "{" + ", ".join(f"{word} = true" for word in sorted(words)) + "}"


class RedisLine:
    """One scheduler's connections to Redis: whatever fails becomes StoreUnavailable, with what to do about it."""

    def __init__(self, address: RedisAddress, prefix: str):
        self.address, self.prefix = address, prefix
        self._client = connect_to_redis(address)
        from redis import exceptions  # noqa: PLC0415  it is there, or there were no client

        self._errors: Any = exceptions
        self._scripts: dict[str, Any] = {}
        # A call for each parked claim at once would be thousands of connections.
        self._places = threading.BoundedSemaphore(REDIS_CALLS)
        self._retry_at, self._trouble = 0.0, ""

    @contextmanager
    def _guard(self) -> Iterator[None]:
        if time.monotonic() < self._retry_at:
            raise StoreUnavailable(self._trouble)
        if not self._places.acquire(timeout=REDIS_SECONDS):
            raise StoreUnavailable(f"Redis at {self.address} is slow: {REDIS_CALLS} calls wait for it. Try again")
        try:
            yield
        except (self._errors.RedisError, OSError) as error:
            raise self._unavailable(error) from error
        finally:
            self._places.release()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        told = told_by(error)
        if isinstance(error, self._errors.ReadOnlyError):
            # Its address may mean another server by now. Those in use are in other threads' hands.
            self._client.connection_pool.disconnect(inuse_connections=False)
        self._trouble = (
            f"Redis at {self.address} cannot be used: {told}; {remedy_of(told, self.address)}. "
            "It is tried again all the time"
        )
        # For a moment nobody else tries: each try may take as long as Redis may to answer.
        self._retry_at = time.monotonic() + RETRY_STORE_SECONDS
        return StoreUnavailable(self._trouble)

    def refuses_us(self, error: StoreUnavailable) -> bool:
        """Whether it was the user or the password."""
        return isinstance(error.__cause__, self._errors.AuthenticationError)

    def run(self, body: str, *arguments: object) -> Any:
        """What the script answers. It is sent by its hash; a Redis that does not know it is sent the text."""
        if body not in self._scripts:
            self._scripts[body] = self._client.register_script(lua(body))
        with self._guard():
            return self._scripts[body](keys=[self.prefix], args=[as_text(each) for each in arguments])

    def call(self, command: str, key: str, *arguments: object) -> Any:
        """What one command answers that names one of our keys."""
        with self._guard():
            return self._client.execute_command(command, self.prefix + key, *map(as_text, arguments))

    def server(self, command: str, *arguments: str) -> Any:
        """What the server says of itself."""
        with self._guard():
            return self._client.execute_command(command, *arguments)

    def news(self, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """What schedulers tell each other, until it is over or the connection breaks; some may be lost."""
        channel = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            channel.subscribe(f"{self.prefix}news")
            while not is_over():
                message = channel.get_message(timeout=1.0)
                if message and message["type"] == "message":
                    yield json.loads(message["data"])
                if channel.health_check_response_counter > UNANSWERED_PINGS:
                    raise TimeoutError("the line was cut in silence")
        except (self._errors.RedisError, OSError) as error:
            raise StoreUnavailable(f"Redis at {self.address} tells no news: {told_by(error)}") from error
        finally:
            channel.close()

    def close(self) -> None:
        self._client.close()


def connect_to_redis(address: RedisAddress) -> Any:
    """A client, which connects when it is first used."""
    try:
        import redis.sentinel  # noqa: PLC0415  needed only where REDIS_ADDR is set
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415
    except ImportError:
        raise SettingsError(
            "REDIS_ADDR: the redis package is not installed; pip install 'redis>=4.3.4', or apt install python3-redis"
        ) from None
    time_outs = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
    options: dict[str, Any] = {
        **time_outs,
        "health_check_interval": PING_SECONDS,
        "decode_responses": True,
        # A script that may have run is not run again unseen.
        "retry": Retry(NoBackoff(), 0),
        **address.options,
    }
    if not address.service:
        [(host, port)] = address.hosts
        return redis.Redis(host=host, port=port, **options)
    sentinels: Any = redis.sentinel  # which has no types
    asked_with = time_outs | address.sentinel_options
    return sentinels.Sentinel(address.hosts, sentinel_kwargs=asked_with, **options).master_for(address.service)


def told_by(error: Exception) -> str:
    """The error's words, less the settings of the client, which redis-py names with all that they hold."""
    return re.sub(r"<redis\..*> - ", "", str(error), flags=re.DOTALL) or type(error).__name__


def remedy_of(told: str, address: RedisAddress) -> str:
    """What a person can do about it, by a word of what Redis said."""
    for word, advice in REDIS_REMEDIES.items():
        if word in told:
            return advice
    command = "" if address.service else f": redis-cli -u {address} ping"
    return f"see whether it runs and can be reached from here{command}"


REDIS_REMEDIES = {
    "OOM": "it is out of memory, which nothing of ours is ever evicted from: raise maxmemory",
    "command not allowed when used memory": "it is out of memory: raise maxmemory",
    "READONLY": "it is a replica: a failover is under way, or REDIS_ADDR names the wrong server",
    "read only replica": "it is a replica: a failover is under way, or REDIS_ADDR names the wrong server",
    "LOADING": "it reads its data after a start, and answers when it is done",
    "loading the dataset": "it reads its data after a start, and answers when it is done",
    "MASTERDOWN": "it is a replica without a primary: a failover is under way",
    "MISCONF": "it cannot write its data to disk: look at its log and its disk",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write asks for",
    "BUSY": "a script of somebody else runs for too long",
    "NOPERM": "its user may not do this: it needs all commands, keys and channels of the prefix",
    "AuthenticationError": "a Sentinel refuses us: see ?sentinel_password=",
    "No master found": "no Sentinel knows a primary of that name: a failover is under way, or the name is wrong",
}


def as_text(value: object) -> str:
    """A number as Lua and Python both read it back unchanged; "" for None."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def fields_of(job: Job) -> dict[str, str]:
    """A job as its hash: what is not None, as text, and its place in line, which sorts as text."""
    values = {name: encoded(getattr(job, name)) for name in COLUMNS}
    return {name: as_text(value) for name, value in values.items() if value is not None} | {"place": placed(job.order)}


def placed(order: tuple[int, float, str]) -> str:
    """A job's place in line as text that sorts as it does: zeros before, and nothing below zero."""
    behind, scheduled_at, uuid = order
    # Microseconds, which is what a time of Buildkite's has.
    micros = round(min(max(scheduled_at, -1e11), 8e11) * 1e6) + 10**17
    return f"{2**63 + behind:020}{micros:018}{uuid}"


WHOLE_FIELDS = {"priority", "exit_status", "claims", "attempts", "version", "failures", "ran"}
NO_TRY: Mapping[str, Any] = {"worker": None, "exit_status": None}


def job_of(flat: Sequence[str]) -> Job:
    """The job of a hash's fields and values."""
    values: dict[str, Any] = {name: value_of(name, text) for name, text in pairs(flat) if name != "place"}
    job = Job(**values)
    if job.finish_detail is None:
        return job
    return dataclasses.replace(job, finish_detail=finish_detail(job))


def fields_read(names: Sequence[str], texts: Sequence[str | None]) -> dict[str, Any]:
    """What was read of those names; None for what is not there."""
    return {name: None if text is None else value_of(name, text) for name, text in zip(names, texts, strict=True)}


def pairs(flat: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The fields of a hash with their values."""
    return zip(flat[::2], flat[1::2], strict=True)


def value_of(name: str, text: str) -> Any:
    if name in WHOLE_FIELDS:
        return int(text)
    if name.endswith("_at") or name == "held_until":
        return float(text)
    if name == "tries":
        return tuple(try_of(each) for each in json.loads(text))
    if name in ("state", "outcome"):
        return JobState(text) if name == "state" else Outcome(text)
    value = json.loads(text) if name in ("agent_query_rules", "about") else text
    return tuple(value) if name == "agent_query_rules" else value


def try_of(ended: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: float(ended[name]) for name in ("claimed_at", "ended_at")}
    status = {"exit_status": int(ended["exit_status"])} if "exit_status" in ended else {}
    return {**NO_TRY, **ended, **times, **status}


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """What a scheduler hears when it says that it is alive."""

    #: Of the turn that it has; "" while another talks to Buildkite.
    token: str
    leader: str
    #: In how many seconds the leader's turn ends unless it is renewed.
    turn_seconds: float
    #: How often jobs became ready so far: who has heard of fewer has missed some.
    offers: int
    #: Whether what is `ready` may be handed out: a leader has led, in this run of Redis, until lately.
    trusted: bool
    #: The leader's word on each queue.
    notes: dict[str, Any]
    #: Every scheduler that is alive, with those of its settings that must be equal, as JSON.
    schedulers: dict[str, str]


class RedisStore:
    """The store of several schedulers: one Redis, in which every verb is one script."""

    def __init__(self, settings: Settings, name: str):
        """`name` is this scheduler's own, a new one at each start."""
        self._settings, self.name = settings, name
        address = settings.redis_addr
        assert address
        self._line = RedisLine(address, address.prefix or f"stack:{settings.stack_key}:")
        self._token = ""
        self._lock = threading.Lock()  # guards the next four
        self._rule_sets: dict[str, RuleSet] = {}
        self._rule_sets_version = ""
        self._matching: dict[Profile, list[str]] = {}
        self._highest_sequence = 0
        # Redis's time, less our monotonic clock.
        self._offset = 0.0
        try:
            self._follow_time(lambda: self._line.server("TIME"))
        except StoreUnavailable as error:
            if self._line.refuses_us(error):
                raise SettingsError(f"REDIS_ADDR: {error}") from None
            raise

    def with_token(self, token: str) -> RedisStore:
        """The same store for who has that turn: what it writes is refused when the turn is over."""
        store = copy.copy(self)
        store._token = token
        return store

    def close(self) -> None:
        self._line.close()

    @property
    def address(self) -> RedisAddress:
        return self._line.address

    # -- what Buildkite says

    def _changed(self, body: str, common: Sequence[object], items: Sequence[object], width: int = 1) -> list[Job]:
        """The jobs that a verb of the leader's changed, which has `width` arguments for each; slice by slice."""
        starts = range(0, max(1, len(items)), SLICE * width)
        answers = [self._fenced(body, *common, *items[start : start + SLICE * width]) for start in starts]
        return [job_of(flat) for answer in answers for flat in answer]

    def _fenced(self, body: str, *arguments: object) -> Any:
        answer = self._line.run(body, self._token, *arguments)
        if answer == "fenced":
            raise Fenced("another scheduler talks to Buildkite by now")
        return answer

    def sequence(self) -> int:
        number = int(self._line.call("GET", "sequence") or 0)
        with self._lock:
            self._highest_sequence = max(self._highest_sequence, number)
        return number

    def put(self, jobs: Sequence[Job], asked: int, now: float) -> list[Job]:
        return self._changed(PUT, [asked, now], [json.dumps(fields_of(job)) for job in jobs])

    def confirm(self, uuids: Collection[str], asked: int, expires_at: float, now: float) -> list[Job]:
        return self._changed(CONFIRM, [asked, expires_at, now, self._settings.max_attempts], list(uuids))

    def learn(self, findings: Mapping[str, tuple[Finding, str]], asked: int, now: float) -> list[Job]:
        said = [text for uuid, finding in findings.items() for text in (uuid, *finding)]
        return self._changed(LEARN, [asked, now], said, 3)

    def finish(self, uuid: str, now: float) -> list[Job]:
        return self._changed(FINISH, [uuid, now], [])

    # -- what workers ask

    def claim(self, worker: Worker, now: float) -> Job | None:
        while True:
            version, matching = self._matching_rule_sets(worker.profile)
            tags = ",".join(sorted(worker.profile.tags))
            lease = [secrets.token_hex(8), now + self._settings.lease_seconds, self._settings.acquire_seconds]
            who = [worker.name, worker.session, tags]
            match self._line.run(CLAIM, version, *who, now, *lease, *matching):
                case ["job", flat]:
                    return job_of(flat)
                case ["none"]:
                    return None
                case ["held", until]:
                    raise WorkerHeld(float(until))
                case ["rule sets"]:
                    self._read_rule_sets()
                case refusal:
                    raise self._refusal(refusal, Holder("", None, worker))

    def _matching_rule_sets(self, profile: Profile) -> tuple[str, list[str]]:
        """Queue and rule set of each that the profile matches, one after the other, and as of when."""
        with self._lock:
            if profile not in self._matching:
                if len(self._matching) >= MANY_PROFILES:
                    self._matching.clear()  # workers came and went
                self._matching[profile] = [
                    text
                    for rule_set, rules in self._rule_sets.items()
                    if profile.matches(rules)
                    for text in (rules.queue_key, rule_set)
                ]
            return self._rule_sets_version, self._matching[profile]

    def _read_rule_sets(self) -> None:
        version = self._line.call("GET", "rule_sets_version") or ""
        found = self._line.call("HGETALL", "rule_sets")
        rule_sets = {}
        for rule_set, text in found.items():
            queue_key, _, rules = text.partition("\n")
            rule_sets[rule_set] = RuleSet.of(queue_key, json.loads(rules))
        with self._lock:
            # Read after its version: should it be newer, it is read again.
            self._rule_sets, self._rule_sets_version = rule_sets, version
            self._matching.clear()

    def rules_of(self, rule_sets: Iterable[str]) -> list[RuleSet]:
        """The rules of those rule sets that are known, or can be read."""
        with self._lock:
            is_known = self._rule_sets.keys() >= set(rule_sets)
        if not is_known:
            self._read_rule_sets()
        with self._lock:
            return [self._rule_sets[rule_set] for rule_set in rule_sets if rule_set in self._rule_sets]

    def touch(self, holder: Holder, now: float) -> Job:
        return self._held(TOUCH, holder, now, now + self._settings.lease_seconds)

    def release(self, holder: Holder, reason: str, answered_at: float, now: float) -> Job:
        shown, seconds = f"release: {reason}"[:500], self._settings.acquire_seconds
        return self._held(RELEASE, holder, now, holder.asked, reason, shown, answered_at, seconds)

    def complete(self, holder: Holder, end: AgentEnd, answered_at: float, now: float) -> Job:
        reason = f"agent exited {end.exit_status}" + (f": {end.last_words}" if end.last_words else "")
        return self._held(COMPLETE, holder, now, end.exit_status, reason, f"complete: {reason}"[:500], answered_at)

    def _held(self, body: str, holder: Holder, now: float, *arguments: object) -> Job:
        name, session = (holder.worker.name, holder.worker.session) if holder.worker else ("", "")
        claim = "" if holder.claim is None else f"={holder.claim}"
        answer = self._line.run(body, holder.uuid, claim, name, session, now, *arguments)
        if answer[0] != "job":
            raise self._refusal(answer, holder)
        return job_of(answer[1])

    def _refusal(self, answer: Sequence[str], holder: Holder) -> Refusal:
        match answer:
            case ["taken", session]:
                return worker_name_taken(holder.worker.name if holder.worker else "", session)
            case ["unknown"]:
                return unknown_job(holder.uuid)
            case ["stale", state, reason]:
                return stale_claim(holder, state, reason)
            case ["changed"]:
                return changed_meanwhile(holder)
            case _:
                return completed_claim(holder)

    # -- upkeep and reads

    def expire(self, answered_at: Mapping[str, float], now: float) -> list[Job]:
        expired: list[Job] = []
        more = 1
        while more:
            more, jobs = self._fenced(EXPIRE, now, *itertools.chain.from_iterable(answered_at.items()))
            expired += map(job_of, jobs)
        return expired

    def pause(self, queue_key: str, paused: bool) -> bool:
        return bool(self._fenced(PAUSE, queue_key, int(paused)))

    def trust_no_clock(self, now: float, *, confirm: bool) -> None:
        times = [now + self._settings.lease_seconds, now + GRACE_SECONDS, now + MAX_HOLD_SECONDS]
        while self._fenced(TRUST_NO_CLOCK, now, *times, int(confirm), self._highest_sequence + 1, REDIS_SCHEMA):
            pass  # there is more

    def prune(self, before: float) -> int:
        count = pruned = int(self._fenced(PRUNE, before))
        while pruned == SLICE:
            pruned = int(self._fenced(PRUNE, before))
            count += pruned
        return count

    def unconfirmed(self, queue_key: str, due_before: float, limit: int) -> list[str]:
        uuids: list[str] = self._line.run(UNCONFIRMED_OF, queue_key, due_before, limit)
        return uuids

    def unfinished(self, queue_key: str) -> list[str]:
        return list(self._line.call("SMEMBERS", f"unfinished:{queue_key}"))

    def held(self, queue_key: str) -> list[str]:
        return list(self._line.run(HELD_IN, queue_key))

    def intents(self, queue_key: str) -> list[Job]:
        return [job_of(flat) for flat in self._line.run(JOBS_OF, f"intents:{queue_key}")]

    def get(self, uuid: str) -> Job | None:
        fields = self._line.call("HGETALL", f"job:{uuid}")
        return job_of(list(itertools.chain.from_iterable(fields.items()))) if fields else None

    def page(self, state: JobState, after: tuple[int, float, str] | None, limit: int) -> list[Job]:
        return [job_of(flat) for flat in self._line.run(PAGE_OF, state, f"({placed(after)}" if after else "-", limit)]

    def ahead(self, job: Job, most: int) -> int:
        count: int = self._line.call("ZLEXCOUNT", f"ready:{job.rule_set}", "-", f"({placed(job.order)}")
        return min(count, most)

    def stats(self) -> dict[str, Any]:
        levels, outcomes, totals, paused, rows = self._line.run(STATS)
        waiting = [Level(JobState(state), rules, int(jobs), float(oldest)) for state, rules, jobs, oldest in levels]
        held = [Held(**fields_read(HELD_COLUMNS, row)) for row in rows]
        by_queue = [
            (queue_key, outcome, int(jobs))
            for what, jobs in pairs(totals)
            for outcome, _, queue_key in [what.partition(" ")]
        ]
        return stats_of(waiting, held, {Outcome(o): int(n) for o, n in pairs(outcomes)}, by_queue) | {
            "paused": sorted(paused)
        }

    def worker_rows(self) -> list[dict[str, Any]]:
        names = ("name", *WORKER_COLUMNS)
        return [fields_read(names, row) for row in sorted(self._line.run(WORKERS))]

    def probe(self) -> None:
        self._line.call("SET", "probed", self.name)

    def remember_stacks(self, stack_keys: Mapping[str, str]) -> dict[str, int]:
        """As SqliteStore's; SettingsError too when the keys there are of another schema."""
        named = itertools.chain.from_iterable(stack_keys.items())
        match self._line.run(REMEMBER_STACKS, REDIS_SCHEMA, *named):
            case ["schema", found]:
                raise SettingsError(
                    f"REDIS_ADDR: what is below {self._line.prefix!r} has schema {found}, this scheduler writes "
                    f"{REDIS_SCHEMA}; run the scheduler that wrote it until its jobs are done, or set another ?prefix="
                )
            case ["stack", queue_key, known, left]:
                raise SettingsError(
                    f"STACK_KEY: {left} jobs of queue {queue_key} are reserved as stack {known!r}, not "
                    f"{stack_keys[queue_key]!r}; set it back until they are done, or set another ?prefix="
                )
            case ["left", *rest]:
                return {queue_key: int(left) for queue_key, left in pairs(rest)}
        raise AssertionError("the script answers one of these")

    # -- several schedulers

    def wall_clock(self) -> float:
        """Redis's time as we last heard it, going on."""
        return time.monotonic() + self._offset

    def _follow_time(self, ask: Callable[[], Any], at: int | None = None) -> Any:
        """Ask, and take over the time that is in the answer, as of the middle between question and answer."""
        sent = time.monotonic()
        answer = ask()
        heard = time.monotonic()
        if heard - sent <= CLOCK_SECONDS or not self._offset:
            seconds, micros = answer if at is None else answer[at]
            self._offset = int(seconds) + int(micros) / 1e6 - (sent + heard) / 2
        return answer

    def beat(self, now: float, notes: Mapping[str, Any], *, lead: bool = True) -> Beat:
        """Say that this scheduler is alive, and take or renew the turn to talk to Buildkite if it can be had."""
        lease_expires_at = now + self._settings.lease_seconds
        # What must be equal at all of them; names that another version does not know are passed over there.
        about = json.dumps({"queues": ",".join(sorted(self._settings.scheduler_queues))})
        told = [self.name, about, lease_expires_at, json.dumps(notes), "lead" if lead else ""]
        answer = self._follow_time(lambda: self._line.run(BEAT, *told), 6)
        token, leader, left_ms, offers, trusted, noted, _, flat = answer
        schedulers = dict(pairs(flat))
        return Beat(token, leader, left_ms / 1000, int(offers), bool(trusted), json.loads(noted), schedulers)

    def leave(self) -> None:
        """Give the turn back at once."""
        self._line.run(LEAVE, self.name)

    def answered_at(self) -> float:
        """When Buildkite last answered whoever led; 0: never yet."""
        return float(self._line.call("GET", "answered_at") or 0)

    def seen(self, workers: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Say what workers this scheduler has seen, and hear what each of the others has."""
        return [json.loads(text) for text in self._line.run(SEEN, self.name, json.dumps(workers))]

    def tell(self, **news: object) -> None:
        """Say something to every scheduler; it may be lost."""
        self._line.server("PUBLISH", f"{self._line.prefix}news", json.dumps(news))

    def news(self, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        return self._line.news(is_over)

    def problems(self) -> list[str]:
        """What in Redis's own settings throws jobs away, as far as it tells."""
        info = self._line.server("INFO", "memory")
        # Others throw away what ends by itself: with us, who leads and the like, which is soon there again.
        if not info.get("maxmemory") or not info.get("maxmemory_policy", "").startswith("allkeys"):
            return []
        told = f"maxmemory-policy is {info['maxmemory_policy']}"
        return [f"{told}, so jobs are thrown away when memory is short; set it to noeviction"]

    def warnings(self) -> list[str]:
        """What in them could lose the last changes."""
        if self._line.server("INFO", "persistence").get("aof_enabled") != 0:
            return []
        return ["appendonly is no, so a restart forgets the last changes, or all; set it to yes"]


# --- Dispatch ---


class Waiter:
    """A claim that waits: whose it is, since when, and what became of it."""

    def __init__(self, worker: Worker, is_gone: Callable[[], bool]):
        self.worker, self.is_gone = worker, is_gone
        #: Whether it could do nothing with a job now; and whether that was so when it last asked for one.
        self.withheld: Callable[[], bool] = lambda: False
        self.is_withheld = False
        self.since = time.monotonic()
        self.woken = threading.Event()
        self.job: Job | None = None
        #: Somebody is claiming for it at this moment; they wake it.
        self.taken = False
        #: It ends without a job: its client is gone, a newer claim came, or the scheduler stops.
        self.over = False


class Seen(NamedTuple):
    """When a named worker last claimed, what it offers, whether a claim of it waits now, and that in vain."""

    at: float
    profile: Profile
    waits: bool
    withheld: bool


class Dispatcher:
    """Brings jobs and workers together: a claim takes what is ready, or waits until something is offered."""

    def __init__(self, store: Store, now: Callable[[], float]):
        self._store, self._now = store, now
        self._lock = threading.Lock()  # guards everything below; never held while the store is asked
        self._parked: dict[Profile, dict[int, Waiter]] = {}  # each group longest parked first
        self._held: dict[int, Waiter] = {}  # those that may not be given a job now
        self._latest: dict[str, Waiter] = {}  # each named worker's newest claim
        self._offers = 0
        self._stopping = False
        self._seen: dict[str, tuple[float, Profile]] = {}  # when each worker last claimed, and what it offered
        # The same of those at other schedulers, and what the nameless offer who wait there.
        self._elsewhere: dict[str, Seen] = {}
        self._nameless_elsewhere: list[tuple[Profile, bool]] = []
        self._unreadable = False  # some of what others told could not be read, which is logged when it begins

    def claim(
        self,
        worker: Worker,
        wait: float,
        is_gone: Callable[[], bool] = lambda: False,
        withheld: Callable[[], bool] = lambda: False,
    ) -> Job | None:
        """The worker's next job, or None after `wait` seconds. `is_gone` tells whether its client hung up, and
        `withheld` whether it could do nothing with a job now; `look_again` must be called when that is over."""
        waiter = Waiter(worker, is_gone)
        waiter.withheld = withheld
        self._enter(waiter)
        try:
            while not waiter.over:
                left = waiter.since + wait - time.monotonic()
                offers, pause = self._offers, left
                try:
                    waiter.job = self._claim(waiter)
                    may_have_one = not waiter.is_withheld
                except WorkerHeld as held:
                    may_have_one, pause = False, min(left, held.until - self._now())
                if waiter.job or left <= 0:
                    break
                self._wait(waiter, max(0.0, pause), offers, may_have_one)
                if waiter.job or is_gone():
                    break
        finally:
            superseded = self._leave(waiter)
        # What was claimed for a superseded request is redelivered to the newer one.
        return None if superseded else waiter.job

    def _enter(self, waiter: Waiter) -> None:
        """A worker has one claim at a time: an older one is answered without a job."""
        name = waiter.worker.name
        with self._lock:
            if self._stopping:
                raise Refusal("the scheduler is stopping; claim again in a moment", **STOPPING)
            if not name:
                return
            if older := self._latest.get(name):
                self._end(older)
            self._latest[name] = waiter
            self._seen[name] = (self._now(), waiter.worker.profile)

    def _leave(self, waiter: Waiter) -> bool:
        """Forget a claim that is about to be answered; whether a newer one of its worker has come."""
        name = waiter.worker.name
        with self._lock:
            if name and self._latest.get(name) is not waiter:
                return True
            if name:
                del self._latest[name]
                self._seen[name] = (self._now(), waiter.worker.profile)
            return False

    def _claim(self, waiter: Waiter) -> Job | None:
        waiter.is_withheld = waiter.withheld()
        return None if waiter.is_withheld else self._store.claim(waiter.worker, self._now())

    def _wait(self, waiter: Waiter, seconds: float, offers: int, may_have_one: bool) -> None:
        """Wait to be woken; parked, if it may be given a job. Not if an offer has come since the store was asked:
        that one could have been for it."""
        with self._lock:
            waiter.over = waiter.over or self._stopping
            if waiter.over or offers != self._offers:
                return
            waiter.woken.clear()
            group = self._parked.setdefault(waiter.worker.profile, {}) if may_have_one else self._held
            group[id(waiter)] = waiter
        waiter.woken.wait(seconds)
        with self._lock:
            self._unpark(waiter)
            taken = waiter.taken
        if taken:
            waiter.woken.wait()

    def _unpark(self, waiter: Waiter) -> None:
        self._held.pop(id(waiter), None)
        group = self._parked.get(waiter.worker.profile, {})
        group.pop(id(waiter), None)
        if not group:
            self._parked.pop(waiter.worker.profile, None)

    def _end(self, waiter: Waiter) -> None:
        waiter.over = True
        self._unpark(waiter)
        if not waiter.taken:
            waiter.woken.set()

    def offer(self, jobs: Iterable[Job]) -> None:
        """Give jobs that became ready to parked workers, first in line first."""
        with self._lock:
            self._offers += 1
        unwanted: set[str] = set()
        for job in sorted(jobs, key=lambda job: job.order):
            if job.rule_set not in unwanted and not self._give(job):
                unwanted.add(job.rule_set)

    def _give(self, job: Job) -> bool:
        """Give the job to the best parked worker that may have it; False when it stays where it is."""
        rules = RuleSet.of(job.queue_key, job.agent_query_rules)
        while waiter := self._take_best(lambda profile: profile.matches(rules)):
            try:
                given, was_in_vain = self._claim_for(waiter)
            except (WorkerHeld, WorkerNameTaken):
                continue  # not this one now: the next best
            if was_in_vain:
                # Either a claim that just came in has it, or nobody may have it now: its queue is paused.
                now_at = self._store.get(job.uuid)
                return now_at is None or now_at.state is not JobState.READY
            if given and given.uuid == job.uuid:
                return True
        return False

    def _take_best(self, suits: Callable[[Profile], bool]) -> Waiter | None:
        """The parked worker to serve: the one with the fewest tags, then the one parked longest."""
        with self._lock:
            firsts = [next(iter(group.values())) for profile, group in self._parked.items() if suits(profile)]
            best = min(firsts, key=lambda waiter: (len(waiter.worker.profile.tags), waiter.since), default=None)
            return self._take(best)

    def _take_first(self, profile: Profile) -> Waiter | None:
        """The parked worker with exactly this profile that waits longest."""
        with self._lock:
            return self._take(next(iter(self._parked.get(profile, {}).values()), None))

    def _take(self, waiter: Waiter | None) -> Waiter | None:
        if waiter:
            self._unpark(waiter)
            waiter.taken = True
        return waiter

    def _claim_for(self, waiter: Waiter) -> tuple[Job | None, bool]:
        """Claim in the waiter's name and wake it. Without a job, its own thread asks the store, and answers that.

        Returns the job, and whether the store was asked in vain. Raises what the claim raises: WorkerHeld and
        WorkerNameTaken are about this waiter alone.
        """
        job, was_in_vain = None, False  # once it is awake, its own thread changes what the waiter has
        try:
            if waiter.is_gone():
                waiter.over = True
            else:
                job = waiter.job = self._claim(waiter)
                was_in_vain = job is None and not waiter.is_withheld
        finally:
            with self._lock:
                waiter.taken = False
                waiter.woken.set()
        return job, was_in_vain

    def offer_again(self, rule_sets: Collection[RuleSet] | None = None) -> None:
        """Let parked workers look again, those with the fewest tags first: all, or those that match one of these."""
        with self._lock:
            self._offers += 1
            profiles = sorted(self._parked, key=lambda profile: len(profile.tags))
        left = None if rule_sets is None else set(rule_sets)  # those that may still have jobs
        for profile in profiles:
            while (left is None or any(map(profile.matches, left))) and (waiter := self._take_first(profile)):
                try:
                    _, was_in_vain = self._claim_for(waiter)
                    if was_in_vain:
                        left = left and {rules for rules in left if not profile.matches(rules)}
                        break  # nor is there anything for others like it
                except (WorkerHeld, WorkerNameTaken):
                    continue

    def look_again(self) -> None:
        """Let workers that are held ask again: what was withheld from them is there."""
        with self._lock:
            self._offers += 1
            for waiter in self._held.values():
                waiter.woken.set()

    def workers(self) -> dict[str, Seen]:
        """Each named worker that claimed, here or at another scheduler."""
        with self._lock:
            here, elsewhere = self._seen_here(), self._elsewhere
        return elsewhere | {
            name: seen for name, seen in here.items() if name not in elsewhere or elsewhere[name].at <= seen.at
        }

    def _seen_here(self) -> dict[str, Seen]:
        latest = self._latest
        return {
            name: Seen(at, profile, name in latest, name in latest and latest[name].is_withheld)
            for name, (at, profile) in self._seen.items()
        }

    def nameless(self) -> list[tuple[Profile, bool]]:
        """What the workers without a name offer whose claims wait now, here or at another scheduler, and whether that
        in vain."""
        with self._lock:
            return [*self._nameless_here(), *self._nameless_elsewhere]

    def _nameless_here(self) -> list[tuple[Profile, bool]]:
        groups = [*self._parked.values(), self._held]
        return [(w.worker.profile, w.is_withheld) for group in groups for w in group.values() if not w.worker.name]

    def told(self, since: float) -> dict[str, Any]:
        """For other schedulers, as JSON: the workers that claimed here since, and those whose claims wait.

        A later version may add names to any of these objects; `hear` passes over those that it does not know.
        """
        with self._lock:
            here, nameless = self._seen_here(), self._nameless_here()
        live = ((name, seen) for name, seen in here.items() if seen.waits or seen.at >= since)
        return {
            "workers": [
                {"name": name, "at": at, "query": str(profile), "waits": waits, "withheld": withheld}
                for name, (at, profile, waits, withheld) in live
            ],
            "nameless": [{"query": str(profile), "withheld": withheld} for profile, withheld in nameless],
        }

    def hear(self, told: Iterable[Any]) -> None:
        """Take over what every other scheduler has told; that of one that is not among them is forgotten."""
        elsewhere: dict[str, Seen] = {}
        nameless: list[tuple[Profile, bool]] = []
        unreadable: list[object] = []
        for each in told:
            match each:
                case {"workers": [*workers], "nameless": [*waiting]}:
                    entries = [*workers, *waiting]
                case _:
                    entries = [each]
            for entry in entries:
                try:
                    name, seen = seen_of(entry)
                except ValueError:
                    unreadable.append(entry)
                    continue
                if not name:
                    nameless.append((seen.profile, seen.withheld))
                elif name not in elsewhere or elsewhere[name].at < seen.at:
                    elsewhere[name] = seen
        with self._lock:
            self._elsewhere, self._nameless_elsewhere = elsewhere, nameless
        if unreadable and not self._unreadable:
            reason = "another scheduler tells of workers in a way that is not known here: these are passed over"
            log.warning(event("unread", count=len(unreadable), first=cut(repr(unreadable[0]), 200), reason=reason))
        self._unreadable = bool(unreadable)

    def forget(self, before: float) -> None:
        """Forget workers that have not claimed since."""
        with self._lock:
            self._seen = {name: seen for name, seen in self._seen.items() if seen[0] >= before or name in self._latest}

    def stop(self) -> None:
        """Refuse claims from now on, and answer those that wait."""
        with self._lock:
            self._stopping = True
            waiting = [waiter for group in self._parked.values() for waiter in group.values()]
            for waiter in {*waiting, *self._held.values(), *self._latest.values()}:
                self._end(waiter)


def seen_of(entry: object) -> tuple[str, Seen]:
    """A worker as another scheduler tells of it, and its name: "" for one without. ValueError: it cannot be read."""
    match entry:
        case {"name": str(name), "at": int() | float() as at, "query": str(query), "waits": bool(waits), **more}:
            return name, Seen(at, Profile.of(query), waits, more.get("withheld") is True)
        case {"query": str(query), "withheld": bool(withheld), **more} if "name" not in more:
            return "", Seen(0.0, Profile.of(query), True, withheld)
    raise ValueError(f"not a worker: {entry!r}")


class Doing(StrEnum):
    """What a worker does now; the words are those of the API and the metrics."""

    WORKING = "working"  # it holds a job
    FAILING = "failing"  # it gets none for a moment: its agents ended without acquiring theirs
    IDLE = "idle"  # its claim waits
    AWAY = "away"  # none of these: between two claims, or gone


class Why(StrEnum):
    """Why jobs of a rule set wait: the first of these that holds."""

    PAUSED = "paused"
    NO_WORKER = "no_worker"
    CONFIRMING = "confirming"  # Buildkite must still say that it is ours and free
    NEXT = "next"  # a matching worker is free: it takes moments
    NO_TOKENS = "no_tokens"  # those that are free need a job acquisition token, and Buildkite gives none
    BUSY = "busy"
    FAILING = "failing"


#: A worker that was not heard of for this long is not counted on, unless it holds a job or its claim waits.
LIVE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A named worker as it is now."""

    name: str
    doing: Doing
    profile: Profile
    #: Its claim waits in vain while no job acquisition tokens can be had.
    is_withheld: bool
    #: The uuid of the job that it holds.
    job: str | None
    claims: int
    #: Jobs of it that were done and had run.
    ran: int
    last_seen_at: float | None
    is_live: bool


class Fleet:
    """Who there is to run jobs, at one moment, and so why jobs wait. `stats` is the store's answer that it is from."""

    def __init__(self, store: Store, dispatcher: Dispatcher, now: float):
        self.stats = store.stats()
        seen = dispatcher.workers()
        held = {job.worker: job for job in self.stats["held"] if job.worker}
        rows = {row["name"]: row for row in store.worker_rows()}
        # Who could do nothing with a job never asked the store for one.
        names = sorted({*rows, *seen})
        self.members = [self._member(rows.get(n) or unknown_to_store(n), seen.get(n), held.get(n), now) for n in names]
        self.nameless = dispatcher.nameless()
        self._crews = collections.Counter((m.profile, m.doing, m.is_withheld) for m in self.members if m.is_live)
        self._crews.update((profile, Doing.IDLE, is_withheld) for profile, is_withheld in self.nameless)

    def _member(self, row: Mapping[str, Any], seen: Seen | None, job: Held | None, now: float) -> Member:
        claimed_at, profile, waits, is_withheld = seen or (
            # Not since its scheduler was started, or not lately: what it offers is what the store knows.
            row["last_claim_at"],
            Profile.noted([job.queue_key] if job else [], row["tags"]),
            False,
            False,
        )
        last_seen_at = max(claimed_at or 0.0, (job.touched_at or 0.0) if job else 0.0) or None
        is_held = row["held_until"] > now
        doing = Doing.WORKING if job else Doing.FAILING if is_held else Doing.IDLE if waits else Doing.AWAY
        return Member(
            name=row["name"],
            doing=doing,
            profile=profile,
            is_withheld=is_withheld and doing is Doing.IDLE,
            job=job.uuid if job else None,
            claims=row["claims"],
            ran=row["ran"],
            last_seen_at=last_seen_at,
            is_live=bool(job) or waits or now - (last_seen_at or -math.inf) <= LIVE_SECONDS,
        )

    def why(self, rules: RuleSet, is_ready: bool) -> tuple[Why, str]:
        """Why jobs with these rules wait, and the same for people. `is_ready`: one of them could be handed out."""
        if rules.queue_key in self.stats["paused"]:
            return Why.PAUSED, f"queue {rules.queue_key} is paused"
        matching: collections.Counter[Doing] = collections.Counter()
        withheld = 0
        for (profile, doing, is_withheld), count in self._crews.items():
            if profile.matches(rules):
                matching[doing] += count
                withheld += count if is_withheld else 0
        if not matching:
            return Why.NO_WORKER, self._missing(rules)
        if not is_ready:
            return Why.CONFIRMING, "Buildkite is being asked whether it may be handed out"
        if free := matching[Doing.IDLE] + matching[Doing.AWAY] - withheld:
            return Why.NEXT, f"next in line: {free} matching {'worker is' if free == 1 else 'workers are'} free"
        if withheld:
            text = "Buildkite gives no job acquisition tokens, which all matching workers that are free need"
            return Why.NO_TOKENS, f"{text}: {withheld}; see /health"
        if matching[Doing.WORKING]:
            held = f"; {matching[Doing.FAILING]} more failing" if matching[Doing.FAILING] else ""
            return Why.BUSY, f"all matching workers are busy: {matching[Doing.WORKING]}{held}"
        return Why.FAILING, f"all matching workers are failing: {matching[Doing.FAILING]}; see /stats"

    def _missing(self, rules: RuleSet) -> str:
        """What no live worker has: the queue, some rules, or all of them on one worker."""
        here = [profile for profile, *_ in self._crews if rules.queue_key in profile.queue_keys]
        if not here:
            return f"no live worker serves queue {rules.queue_key}"
        missing = [tag for tag in sorted(rules.tags) if not any(tag in profile.tags for profile in here)]
        missing += [f"{key}=*" for key in sorted(rules.keys) if not any(key in profile.keys for profile in here)]
        if missing:
            return f"no live worker of queue {rules.queue_key} has {', '.join(missing)}"
        return f"no live worker has all of {rules}"


def unknown_to_store(name: str) -> dict[str, Any]:
    """What the store's row of a worker would be that has claimed nothing from it yet."""
    return {"name": name, "tags": "", "held_until": 0.0, "claims": 0, "ran": 0, "last_claim_at": None}


STOPPING: Mapping[str, Any] = {"status": 503, "code": "stopping", "headers": {"Retry-After": "1"}}


# --- Intake ---

#: Between two looks at the state of the same job; and how many of those that wait are looked at in that time: of a line
#: that is longer, each in its turn. All of 100,000 every time would cost those who claim more than it tells anybody.
SWEEP_SECONDS, SWEEP_WAITING = 4.0, 10_000
#: Backoff after a call that failed: doubled each time, with jitter.
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0
#: The most that Buildkite may ask us to wait: a slip there must not stop us for a year.
MAX_ASKED_SECONDS = 3600.0
#: A job that so many answers in a row did not mention is dropped, as is one in an unknown state for so long.
MISSING_ANSWERS, UNKNOWN_SECONDS = 3, 3600.0
#: A stack that Buildkite says it does not know is registered again, no more often than this.
REGISTER_SECONDS = 60.0
#: Finishes that Buildkite refuses are tried again after this.
REFUSED_FINISH_SECONDS = 60.0
#: A listed job that Buildkite would not reserve is left alone for this long: it would come back with every list.
SHUN_SECONDS = 30.0
KEEP_DONE_SECONDS = 24 * 3600.0
#: A step that takes longer than this will never end: a call ends within CALL_SECONDS, but for a look-up in the DNS,
#: which resolv.conf may let take 30 s.
STUCK_SECONDS = 60.0
#: A claim waits this long for its job acquisition token; the call for it ends before, to tell what went wrong.
TOKEN_SECONDS, TOKEN_CALL_SECONDS = 5.0, 4.5
#: A token outlives the time that an agent has to acquire its job by this, up to Buildkite's own limit.
TOKEN_GRACE_SECONDS, MAX_TOKEN_SECONDS = 60, 3600
#: A job for which no token was issued is not reserved again before this, doubled each time.
FIRST_TOKENLESS_SECONDS, MAX_TOKENLESS_SECONDS = 2.0, 60.0
#: What is asked for to see whether tokens can be had while there is no job at all.
NO_JOB = "00000000-0000-4000-8000-000000000000"
#: Between a list and the next for which there was only a hint; POLL_INTERVAL cannot be shorter either.
HINT_SECONDS = 0.2
#: After a list that brought jobs, this many come sooner: so many times as often as POLL_INTERVAL says.
BUSY_LISTS, BUSY_TIMES = 20, 4
#: A store that failed is asked again after this: it costs nobody but us, and all wait for it.
STORE_AGAIN_SECONDS = 1.0
#: What waits for the stack to be registered looks again after this, and what found its term over.
UNTRIED_SECONDS = 1.0
#: A duty of the leader's looks again after this while another leads. A term that begins makes it look at once.
FOLLOWING_SECONDS = 60.0


class Duty:
    """One piece of work done again and again on a thread of its own.

    `tick(now)` does what is due and says in how many seconds it wants to be called again; `wake` makes it now. None:
    it could not be tried, so what failed before is as it was.
    A BuildkiteError backs off, growing, with jitter, or for as long as Buildkite asks; one with a status of `grave`
    is for a person to act upon.
    """

    def __init__(
        self,
        name: str,
        tick: Callable[[float], float | None],
        now: Callable[[], float],
        grave: Collection[int] = frozenset({401}),
    ):
        self.name, self._tick, self._now, self._grave = name, tick, now, grave
        self._wake = threading.Event()
        self._no_backoff = threading.Event()  # ends a backoff too: it is to start anew, or to stop
        self._is_stopping = False
        self.failures = 0
        #: The last failure's words, "" while all is well.
        self.problem = ""
        #: Since when (monotonic) one step of its work has been going on; None while it waits for its next tick.
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def start_anew(self) -> None:
        """Forget what failed and tick now, even while backing off: who leads has changed."""
        self._no_backoff.set()
        self._wake.set()

    def stop(self) -> None:
        self._is_stopping = True
        self.start_anew()

    def step(self) -> None:
        """Its tick begins something that ends soon: each call to Buildkite is one step."""
        self._busy_since = time.monotonic()

    def stuck(self, now: float) -> bool:
        """Whether it has died, or one step of it takes so long that it will never end. `now` is monotonic."""
        if self._is_stopping or self._thread.ident is None:
            return False  # stopped on purpose, or about to start
        busy_since = self._busy_since
        return not self._thread.is_alive() or (busy_since is not None and now - busy_since > STUCK_SECONDS)

    def join(self, seconds: float) -> bool:
        """Wait for its last tick to end; whether it did. One that was never started has."""
        if self._thread.ident is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._no_backoff.is_set():
                self._no_backoff.clear()
                self.failures, self.problem = 0, ""
            if self._is_stopping:
                return
            self.step()
            seconds = self.run_once()
            self._busy_since = None
            # Nothing that only wakes it cuts a backoff short.
            (self._no_backoff if self.failures else self._wake).wait(seconds)

    def run_once(self) -> float:
        """One tick; returns the seconds until the next."""
        try:
            seconds = self._tick(self._now())
        except BuildkiteError as error:
            level = logging.ERROR if error.status in self._grave else logging.WARNING
            return self._failed(str(error), error.retry_after, level)
        except StoreUnavailable as error:
            return self._failed(str(error), STORE_AGAIN_SECONDS, logging.ERROR)
        except Fenced as error:
            log.warning(event("fenced", duty=self.name, reason=str(error)))
            return UNTRIED_SECONDS
        except Exception:
            log.exception(event("failed", duty=self.name, reason="a fault of ours; please report it"))
            return self._failed("a fault of ours; see the log", None, logging.ERROR)
        if seconds is None:
            return UNTRIED_SECONDS
        failures, self.failures, self.problem = self.failures, 0, ""
        if failures:
            log.warning(event("recovered", duty=self.name, failures=failures))
        return seconds

    def _failed(self, problem: str, asked: float | None, level: int) -> float:
        self.failures += 1
        most = min(FIRST_BACKOFF_SECONDS * 2 ** min(self.failures - 1, 10), MAX_BACKOFF_SECONDS)
        # To be told "at once" again and again is not being told when.
        seconds = min(asked, MAX_ASKED_SECONDS) if asked else most * random.uniform(0.5, 1.0)
        before, self.problem = self.problem, problem  # first, so that /health knows what the log says
        if problem != before or self.failures % 10 == 0:
            pause = f"{seconds:.1f}"
            log.log(level, event("failed", duty=self.name, reason=problem, times=self.failures, retry_in_s=pause))
        return seconds


#: When so many of a batch were refused alone, and none was taken yet, it is not about them.
MAX_REFUSED = 20


def halved(batch: Sequence[str], call: Callable[[Sequence[str]], None]) -> dict[str, str]:
    """Call for the batch; where Buildkite refuses that (400, 422), for its halves, down to the uuids refused alone.

    Returns these, each with its words. When it refuses all, or the first MAX_REFUSED, they are not to blame: raises
    BuildkiteError.
    """
    refused: dict[str, str] = {}
    parts, is_some_taken = [batch], False
    while parts:
        part = parts.pop()
        try:
            call(part)
            is_some_taken = True
        except BuildkiteError as error:
            if error.status not in (400, 422):
                raise
            if len(part) > 1:
                # In no order: those that are refused may stand side by side.
                mixed = random.sample(part, len(part))
                parts += [mixed[: len(part) // 2], mixed[len(part) // 2 :]]
            else:
                refused[part[0]] = str(error)
            if not is_some_taken and len(refused) == min(len(batch), MAX_REFUSED) > 1:
                raise
    return refused


class TokenAsk:
    """A claim that waits for its job's token, and what it gets."""

    def __init__(self, uuid: str):
        self.uuid = uuid
        self.answered = threading.Event()
        self.token: str | None = None
        self.problem = ""


class JobTokens:
    """The job acquisition tokens of one queue: one call for all the claims that wait for theirs.

    While none can be had, claims that want one are to be held, and one is asked for with backoff until Buildkite has
    answered. A token goes to the claim that asked and is kept nowhere: a claim that is delivered again gets a new one.
    """

    def __init__(
        self,
        stack: Stack,
        lifetime_seconds: int,
        now: Callable[[], float],
        unfinished: Callable[[], Sequence[str]],
        look_again: Callable[[], None],
    ):
        self._stack, self._lifetime_seconds = stack, lifetime_seconds
        self._unfinished, self._look_again = unfinished, look_again
        self.duty = Duty(f"{stack.queue_key} tokens", self.issue, now, grave={401, 403, 404})
        self._lock = threading.Lock()  # guards the next two
        self._asks: list[TokenAsk] = []
        self._problem = ""

    @property
    def withheld(self) -> bool:
        return bool(self._problem)

    def ask(self, uuid: str) -> str | None:
        """A token for a job that was just claimed; None when Buildkite issues none for it.

        Raises BuildkiteError when it cannot be asked, or has not answered within TOKEN_SECONDS.
        """
        ask = TokenAsk(uuid)
        with self._lock:
            if self._problem:
                raise BuildkiteError(self._problem)
            self._asks.append(ask)
        self.duty.wake()
        answered = ask.answered.wait(TOKEN_SECONDS)
        with self._lock, suppress(ValueError):
            self._asks.remove(ask)
        if ask.problem or not answered:
            raise BuildkiteError(ask.problem or f"no answer within {TOKEN_SECONDS:g} s")
        return ask.token

    def issue(self, now: float) -> float:
        """Ask Buildkite for what is waited for; after a failure for one token that nobody gets, to see if it could."""
        with self._lock:
            asks, failed = self._asks[:BATCH], self._problem
        if not asks and not failed:
            return MAX_BACKOFF_SECONDS
        # Another job each time: with one that Buildkite will not hear of it would never end.
        uuids = list({ask.uuid for ask in asks}) or random.choices(self._unfinished() or [NO_JOB])
        lifetime, ends_at = self._lifetime_seconds if asks else 1, time.monotonic() + TOKEN_CALL_SECONDS
        tokens: dict[str, str] = {}
        try:
            halved(uuids, lambda part: tokens.update(self._stack.job_tokens(part, lifetime, ends_at)))
        except BuildkiteError as error:
            self._fail(str(error))
            raise
        self._answer(asks, tokens)
        return 0.0 if self._asks else MAX_BACKOFF_SECONDS

    def _fail(self, problem: str) -> None:
        """Nobody waits for a call that backs off."""
        with self._lock:
            asks, self._asks, self._problem = self._asks, [], problem
        for ask in asks:
            ask.problem = problem
            ask.answered.set()

    def _answer(self, asks: Sequence[TokenAsk], tokens: Mapping[str, str]) -> None:
        answered = set(asks)
        with self._lock:
            self._asks = [ask for ask in self._asks if ask not in answered]
            failed, self._problem = self._problem, ""
        for ask in asks:
            ask.token = tokens.get(ask.uuid)
            ask.answered.set()
        if failed:
            self._look_again()


class Lead:
    """Whether this scheduler is the one that talks to Buildkite. Every duty asks at each tick.

    With SQLite it always is. With Redis `Peers` begins and ends its terms, and `tell` reaches the one that leads.
    """

    def __init__(self, store: Store, shared: RedisStore | None = None):
        """`shared` is how several schedulers reach each other. Without it, this one leads from now on."""
        #: What to read from, and to write with what workers ask, whoever leads.
        self.always = store
        self._store, self._shared = None if shared else store, shared
        #: When Buildkite had last answered whoever led, as this term began.
        self.answered_before = 0.0
        #: Those that start anew whenever a term begins or ends.
        self.duties: list[Duty] = []

    def store(self) -> Store | None:
        """What to write with while this scheduler leads, another object in each term; None while another leads.

        A duty asks once, at the start of its tick, and uses that one object until the tick ends. So what a tick writes
        after its term is over is refused: it raises Fenced.
        """
        return self._store

    def begin(self, store: Store, answered_before: float) -> None:
        self.answered_before = answered_before
        self._change(store)

    def end(self) -> None:
        self._change(None)

    def _change(self, store: Store | None) -> None:
        self._store = store
        for duty in self.duties:
            duty.start_anew()

    def answered_at(self) -> float:
        """When Buildkite last answered whoever leads, as the shared store has it at this moment."""
        return self._shared.answered_at() if self._shared else 0.0

    def tell(self, **news: object) -> None:
        """Tell the scheduler that leads. It may be lost."""
        if self._shared:
            with suppress(StoreUnavailable):
                self._shared.tell(**news)


class Part(Protocol):
    """What works for itself beside the requests of workers: a scheduler is a list of these."""

    @property
    def duties(self) -> Sequence[Duty]:
        """What it does, each on a thread of its own; the same ones for the life of the process."""

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong with it now, in words for people."""


def problems_of(duties: Iterable[Duty]) -> list[str]:
    return [duty.problem for duty in duties if duty.problem]


class Term:
    """What the duties of one queue remember in one term of ours, and write with.

    Each term has its own, so nothing is known from an earlier one, while another led. A tick that outlives its term
    goes on with the old one, which nobody else reads any more.
    """

    def __init__(self, store: Store, answered_at: float):
        self.store = store
        # What the duties tell each other and the API; guarded by the intake's lock.
        self.unreserved: set[str] = set()  # Buildkite did not reserve these; their state decides
        self.asked_for: set[str] = set()  # to look at before the sweep comes to them
        self.relist = False
        self.answered_at = answered_at
        self.registered_at: float | None = None
        # The list's own.
        self.quiet_lists = BUSY_LISTS  # in a row, that brought nothing
        # Reserve's own.
        self.to_offer: list[Job] = []
        # The states' own.
        self.sweep: collections.deque[str] = collections.deque()
        self.unswept: collections.deque[str] = collections.deque()  # for the sweeps after this one
        self.next_sweep_at = 0.0
        self.missing: collections.Counter[str] = collections.Counter()  # answers in a row without the job
        self.unknown: dict[str, float] = {}  # since when a job is in a state that we do not know

    def follow_clock(self, step: float) -> None:
        self.answered_at += step if self.answered_at else 0.0
        self.next_sweep_at += step
        if self.registered_at is not None:
            self.registered_at += step
        self.unknown.update({uuid: at + step for uuid, at in self.unknown.copy().items()})


class Intake:
    """One queue's side towards Buildkite, for the life of the process: six duties, each with an endpoint of its own.

    Four of them work only while this scheduler leads. Tokens and notify do so at every scheduler.
    """

    def __init__(
        self,
        stack: Stack,
        lead: Lead,
        dispatcher: Dispatcher,
        settings: Settings,
        now: Callable[[], float],
        give_up: Callable[[str], None],
    ):
        """`give_up` is called, with the reason, when Buildkite refuses the token before it ever took it."""
        self.queue_key, self._stack, self._lead, self._dispatcher = stack.queue_key, stack, lead, dispatcher
        self._settings, self._now, self._give_up = settings, now, give_up
        self.list = Duty(f"{stack.queue_key} list", self.list_jobs, now)
        self.reserve = Duty(f"{stack.queue_key} reserve", self.reserve_jobs, now)
        self.states = Duty(f"{stack.queue_key} states", self.look, now)
        self.finish = Duty(f"{stack.queue_key} finish", self.finish_jobs, now)
        lifetime = min(settings.acquire_seconds + TOKEN_GRACE_SECONDS, MAX_TOKEN_SECONDS)
        store, queue_key = lead.always, stack.queue_key
        self.tokens = JobTokens(stack, lifetime, now, lambda: store.unfinished(queue_key), dispatcher.look_again)
        self.notifier = Notifier(stack, store, dispatcher)
        self.notify = Duty(f"{stack.queue_key} notify", self.notify_users, now)
        # Times in here follow the clock when it is set.
        self._lock = threading.Lock()  # guards the next four
        self._term: Term | None = None
        self._shunned: dict[str, float] = {}  # not to be put again before that time
        self._tokenless: dict[str, tuple[int, float]] = {}  # how often no token was issued; not to be reserved before
        self._finish_again_at: dict[str, float] = {}
        self._resumed, self._hinted = threading.Event(), threading.Event()
        #: When the queue was last listed, by whoever led.
        self.last_list_at = 0.0
        #: What is wrong at the scheduler that leads, as it told us.
        self.problems_elsewhere: list[str] = []
        self._unknown_words: set[str] = set()  # the states' own
        self._watched_with: Store | None = None  # notify's own: what we led with when it last looked
        lead.duties += self.duties

    @property
    def duties(self) -> list[Duty]:
        always = [self.list, self.reserve, self.states, self.finish, self.tokens.duty]
        return [*always, self.notify] if self._settings.stack_notifications else always

    @property
    def problems(self) -> list[str]:
        told = [] if self._lead.store() else self.problems_elsewhere
        return list(dict.fromkeys([*told, *problems_of(self.duties)]))

    # -- who leads

    def _current_term(self) -> Term | None:
        """What a tick works with from its start to its end; None while another scheduler leads.

        The one place where a term begins for this queue: what was known from an earlier one is forgotten.
        """
        with self._lock:
            store = self._lead.store()
            if store is None:
                self._term = None
            elif self._term is None or self._term.store is not store:
                self._term = Term(store, self._lead.answered_before)
                self._shunned, self._tokenless, self._finish_again_at = {}, {}, {}
            return self._term

    @property
    def answered_at(self) -> float:
        """When Buildkite last answered whoever leads.

        While that is another, the store is asked: what the leader told us is seconds old, and many a claim has ended
        by then.
        """
        term = self._current_term()
        return term.answered_at if term else self._lead.answered_at()

    @property
    def registered(self) -> bool:
        """Whether Buildkite knows the stack, as far as we do: while another leads, because that one lists the queue."""
        term = self._current_term()
        return term.registered_at is not None if term else self.last_list_at > 0

    @property
    def was_registration_tried(self) -> bool:
        """Whether Buildkite has answered our first call, or failed to."""
        return self.registered or self.list.failures > 0

    def note(self, last_list_at: float, problems: Sequence[str]) -> None:
        """Take over what the scheduler that leads knows of the queue."""
        self.last_list_at, self.problems_elsewhere = last_list_at, list(problems)

    # -- registration, which the list sees to

    def _register(self, term: Term, now: float) -> None:
        try:
            self._stack.register()
        except BuildkiteError as error:
            if error.status == 401 and not term.answered_at:
                self._give_up(f"BUILDKITE_AGENT_TOKEN: Buildkite refuses it: {error}")
            raise
        term.registered_at = now
        self._answered(term, now)
        log.info(event("registered", queue=self.queue_key, stack=self._stack.key))
        for duty in (self.reserve, self.states):
            duty.wake()  # they wait for this: a restart has jobs to confirm

    @contextmanager
    def _registering_again(self, term: Term, now: float) -> Iterator[None]:
        """A 404 means that Buildkite has forgotten the stack: it is registered again, but not at every call."""
        try:
            yield
        except BuildkiteError as error:
            if error.status == 404 and now - (term.registered_at or 0.0) >= REGISTER_SECONDS:
                term.registered_at = None
                self.list.wake()
            raise

    # -- list

    def list_jobs(self, now: float) -> float:
        """List the queue and put what is new. Only when a full page brought nothing is the next one listed.

        A list that brought something is followed by another after HINT_SECONDS, the next BUSY_LISTS that bring nothing
        come BUSY_TIMES as often as POLL_INTERVAL says, and after them it is as POLL_INTERVAL says. By a simulation with
        POLL_INTERVAL=1s and 50 ms a call, jobs that come at random, one a second, wait 0.20 s for the answer that names
        them, at 3.5 lists a second; with POLL_INTERVAL alone 0.58 s. Buildkite allows 10 lists a second.
        """
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        if self._hinted.is_set():
            self._hinted.clear()
            if 0 < (seconds := self.last_list_at + HINT_SECONDS - now) <= HINT_SECONDS:
                return seconds
        if term.registered_at is None:
            self._register(term, now)
        cursor: str | None = None
        while True:
            self.list.step()
            asked = term.store.sequence()
            with self._registering_again(term, now):
                page = self._stack.list_jobs(cursor, now)
            self._answered(term, now)
            self.last_list_at = now
            if page.paused is not None:
                self._pause(term, page.paused)
            wanted = [job for job in page.jobs if self._shunned.get(job.uuid, 0.0) <= now]
            put = [] if page.paused else term.store.put(wanted, asked, now)
            for job in put:
                log.info(event("put", job=job.uuid, queue=job.queue_key, rules=job.rule_set, priority=job.priority))
            if put:
                with self._lock:
                    term.relist = page.next_cursor is not None
                self.reserve.wake()
            if put or page.paused or page.next_cursor in (None, cursor):
                return self._next_list_in(term, bool(put))
            cursor = page.next_cursor

    def _next_list_in(self, term: Term, has_brought: bool) -> float:
        if has_brought:
            term.quiet_lists = 0
            return HINT_SECONDS
        term.quiet_lists += 1
        times = BUSY_TIMES if term.quiet_lists <= BUSY_LISTS else 1
        return max(HINT_SECONDS, self._settings.poll_interval / times)

    def _pause(self, term: Term, paused: bool) -> None:
        if term.store.pause(self.queue_key, paused):
            log.warning(event("paused" if paused else "resumed", queue=self.queue_key))
            if paused:
                self.notifier.look_again()
            else:
                self._resumed.set()
            self.reserve.wake()

    def _answered(self, term: Term, now: float) -> None:
        with self._lock:
            term.answered_at = max(term.answered_at, now)

    # -- reserve

    def reserve_jobs(self, now: float) -> float | None:
        """Reserve what is `reserving`, and renew what has less than half of its time left."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        self._offer(term)
        if term.registered_at is None:
            return None
        # Looked at once in a poll interval: what is due by the next look is due now.
        due_before = now + self._settings.reservation_seconds / 2 + self._settings.poll_interval
        with self._lock:
            waiting = term.unreserved | {uuid for uuid, (_, until) in self._tokenless.items() if until > now}
        listed = term.store.unconfirmed(self.queue_key, due_before, BATCH + len(waiting))
        batch = [uuid for uuid in listed if uuid not in waiting][:BATCH]
        if not batch:
            return self._settings.poll_interval
        asked = term.store.sequence()
        self._drop_refused(term, halved(batch, lambda part: self._reserve(term, part, now)), asked, now)
        with self._lock:
            relist, term.relist = term.relist, False
        if relist:
            self.list.wake()
        return 0.0 if len(batch) == BATCH else self._settings.poll_interval

    def _reserve(self, term: Term, batch: Sequence[str], now: float) -> None:
        self.reserve.step()
        asked = term.store.sequence()
        with self._registering_again(term, now):
            reserved, refused = self._stack.reserve(batch, self._settings.reservation_seconds)
        self._answered(term, now)
        for job in self._confirmed(term, reserved, asked, now):
            log.info(event(job.state, job=job.uuid, queue=self.queue_key, reason=job.reason))
        if refused:
            # What was ready is handed out to nobody until its state has told why.
            self._apply(term, dict.fromkeys(refused, (Finding.LAPSED, "not reserved again")), asked, now)
            with self._lock:
                term.unreserved |= refused
            self.states.wake()

    def _confirmed(self, term: Term, reserved: Collection[str], asked: int, now: float) -> list[Job]:
        expires_at = now + self._settings.reservation_seconds
        changed = term.store.confirm(reserved, asked, expires_at, now)
        term.to_offer += [job for job in changed if job.state is JobState.READY]
        self._offer(term)
        if any(job.finish_detail for job in changed):
            self.finish.wake()
        return changed

    def _offer(self, term: Term) -> None:
        """Offer what became ready, and after a pause all that is; again with the next tick if the store fails now."""
        if term.to_offer:
            self._dispatcher.offer(term.to_offer)
            term.to_offer = []
        if self._resumed.is_set():
            self._resumed.clear()
            try:
                self._dispatcher.offer_again()
            except StoreUnavailable:
                self._resumed.set()
                raise

    def _drop_refused(self, term: Term, refused: Mapping[str, str], asked: int, now: float) -> None:
        """Drop jobs that Buildkite will not hear of."""
        with self._lock:
            term.unreserved -= refused.keys()
        self._shun(term, refused, now)
        findings = {uuid: (Finding.GONE, f"Buildkite refuses it: {told}") for uuid, told in refused.items()}
        self._apply(term, findings, asked, now)

    def _shun(self, term: Term, uuids: Iterable[str], now: float) -> None:
        with self._lock:
            if term is self._term:
                shunned = {uuid: until for uuid, until in self._shunned.items() if until > now}
                self._shunned = shunned | dict.fromkeys(uuids, now + SHUN_SECONDS)

    # -- states

    def look(self, now: float) -> float | None:
        """Ask what became of the jobs: those somebody wants to know about first, then all in turn."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        if term.registered_at is None:
            return None
        batch = self._next_batch(term, now)
        if batch:
            try:
                asked = term.store.sequence()
                self._drop_refused(term, halved(batch, lambda part: self._look(term, part, now)), asked, now)
            except BuildkiteError:
                term.sweep.extendleft(uuid for uuid in batch if uuid not in term.unreserved)  # still their turn
                raise
        with self._lock:
            urgent = bool(term.unreserved or term.asked_for)
        if term.sweep or (batch and urgent):
            return 0.0
        return min(max(0.0, term.next_sweep_at - now), SWEEP_SECONDS)

    def look_soon(self, uuid: str) -> None:
        """Ask about one job before its turn."""
        if term := self._current_term():
            with self._lock:
                term.asked_for.add(uuid)
            self.states.wake()

    def _next_batch(self, term: Term, now: float) -> list[str]:
        # A clock that was set while a call was under way may have left a time that is far off.
        if not term.sweep and not now < term.next_sweep_at <= now + SWEEP_SECONDS:
            self._begin_sweep(term)
            term.next_sweep_at = now + SWEEP_SECONDS
        with self._lock:
            batch = dict.fromkeys(itertools.islice((*term.unreserved, *term.asked_for), BATCH))
            term.asked_for -= batch.keys()
        while term.sweep and len(batch) < BATCH:
            batch[term.sweep.popleft()] = None
        return list(batch)

    def _begin_sweep(self, term: Term) -> None:
        """All that a worker has, and the next of the others."""
        if not term.unswept:
            term.unswept.extend(term.store.unfinished(self.queue_key))
            self._forget_others(term, term.unswept)
        held = term.store.held(self.queue_key)
        others = (term.unswept.popleft() for _ in range(min(len(term.unswept), SWEEP_WAITING)))
        term.sweep.extend(dict.fromkeys((*held, *others)))

    def _forget_others(self, term: Term, uuids: Iterable[str]) -> None:
        """Remember nothing of jobs that are done."""
        remembered: Sequence[dict[str, Any]] = (term.missing, term.unknown, self._finish_again_at)
        if any(remembered):
            left = set(uuids)
            for notes in remembered:
                for uuid in set(notes) - left:
                    notes.pop(uuid, None)

    def _look(self, term: Term, batch: Sequence[str], now: float) -> None:
        self.states.step()
        asked = term.store.sequence()
        with self._lock:
            unreserved = term.unreserved.intersection(batch)
        with self._registering_again(term, now):
            states = self._stack.states(batch)
        self._answered(term, now)
        findings = {}
        for uuid in batch:
            if finding := self._finding(term, uuid, states.get(uuid), uuid in unreserved, now):
                findings[uuid] = finding
        self._shun(term, unreserved.intersection(findings), now)
        self._apply(term, findings, asked, now)
        with self._lock:
            term.unreserved -= unreserved

    def _finding(
        self, term: Term, uuid: str, word: str | None, unreserved: bool, now: float
    ) -> tuple[Finding, str] | None:
        """What the word that Buildkite has for a job's state proves; None: nothing."""
        if word is None:
            term.missing[uuid] += 1
            if term.missing[uuid] < MISSING_ANSWERS:
                return None
            del term.missing[uuid]
            return (Finding.GONE, f"Buildkite does not know it, in {MISSING_ANSWERS} answers")
        term.missing.pop(uuid, None)
        if word not in FINDINGS:
            return self._unknown_word(term, uuid, word, now)
        term.unknown.pop(uuid, None)
        if finding := FINDINGS[word]:
            return (finding, word)
        if unreserved:
            return (Finding.GONE, f"{word}, but not for us")
        return (Finding.LAPSED, word) if word == "scheduled" else None

    def _unknown_word(self, term: Term, uuid: str, word: str, now: float) -> tuple[Finding, str]:
        if word not in self._unknown_words and len(self._unknown_words) < 100:
            self._unknown_words.add(word)
            log.warning(event("unknown", state=word, job=uuid, reason="taken as running; this is said once"))
        if now - term.unknown.setdefault(uuid, now) < UNKNOWN_SECONDS:
            return (Finding.ACQUIRED, word)
        del term.unknown[uuid]
        return (Finding.GONE, f"in the unknown state {word} for an hour")

    def _apply(self, term: Term, findings: Mapping[str, tuple[Finding, str]], asked: int, now: float) -> None:
        for job in term.store.learn(findings, asked, now):
            word = job.outcome or job.state
            log.info(event(word, job=job.uuid, queue=self.queue_key, worker=job.worker, reason=job.reason))

    # -- finish

    def finish_jobs(self, now: float) -> float:
        """Finish, at Buildkite, the jobs that we gave up; again and again until each was answered."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        for job in term.store.intents(self.queue_key):
            if self._finish_again_at.get(job.uuid, 0.0) <= now:
                self._finish(term, job, now)
        return REFUSED_FINISH_SECONDS / 4

    def _finish(self, term: Term, job: Job, now: float) -> None:
        self.finish.step()
        try:
            self._stack.finish(job.uuid, job.finish_detail or "")
        except BuildkiteError as error:
            if error.status not in (400, 404, 422):
                raise
            # It has an agent, or is over: its state will say so, and that settles the intent.
            log.warning(event("refused", job=job.uuid, call="finish", reason=str(error)))
            with self._lock:
                if term is self._term:
                    self._finish_again_at[job.uuid] = now + REFUSED_FINISH_SECONDS
            self.look_soon(job.uuid)
            return
        self._finish_again_at.pop(job.uuid, None)
        for done in term.store.finish(job.uuid, now):
            log.error(event("finished", job=done.uuid, queue=self.queue_key, reason=done.finish_detail))

    # -- notify

    def notify_users(self, now: float) -> float | None:
        if not self.registered:
            return None
        store = self._lead.store()
        if store is not self._watched_with:
            if store:
                self.notifier.watch_ready(now)
            else:
                self.notifier.watch_no_more()
            self._watched_with = store
        return self.notifier.tick(now)

    # -- what upkeep, the API and other schedulers tell us

    def follow_clock(self, step: float) -> None:
        """The clock was set: every time that is remembered here moves with it."""
        with self._lock:
            if self._term:
                self._term.follow_clock(step)
            self.last_list_at += step if self.last_list_at else 0.0
            for times in (self._shunned, self._finish_again_at):
                times.update({uuid: at + step for uuid, at in times.copy().items()})
            self._tokenless = {uuid: (times, at + step) for uuid, (times, at) in self._tokenless.items()}
        self.notifier.follow_clock(step)
        self.states.wake()

    def list_soon(self) -> None:
        """Somebody says that there is something new: it is listed at once, but not in a storm, nor while that backs
        off."""
        self._tell_leader(list_soon={})

    def returned(self, job: Job) -> None:
        """A claim has ended: Buildkite is asked at once what it did."""
        if job.state in (JobState.RESERVING, JobState.RUNNING):
            self._tell_leader(returned={"uuid": job.uuid, "state": job.state})

    def not_issued(self, uuid: str) -> None:
        """No token was issued for a job that we took for ours: its state may tell why, and it is not handed out again
        at once, which would only go the same way."""
        self._tell_leader(not_issued={"uuid": uuid})

    def _tell_leader(self, **news: Mapping[str, str]) -> None:
        """Do it here while we lead, else have the scheduler do it that leads. Should that be lost, its next look, or
        its next list, finds the same."""
        if self._lead.store():
            self.hear(news)
        else:
            self._lead.tell(queue=self.queue_key, **news)

    def hear(self, news: Mapping[str, Any]) -> None:
        """What happened here or at another scheduler, for the one that leads. ValueError: it cannot be read."""
        match news:
            case {"list_soon": _}:
                self._hinted.set()
                self.list.wake()
            case {"returned": {"uuid": str(uuid), "state": str(state)}}:
                if state == JobState.RESERVING:
                    self.reserve.wake()
                elif state == JobState.RUNNING:
                    self.look_soon(uuid)
            case {"not_issued": {"uuid": str(uuid)}}:
                self._leave_alone(uuid, self._now())
                self.look_soon(uuid)
            case {"returned": _} | {"not_issued": _}:
                raise ValueError(f"not as it is told here: {news!r}")

    def _leave_alone(self, uuid: str, now: float) -> None:
        """Reserve the job no more for a while, longer each time."""
        with self._lock:
            kept = {uuid: seen for uuid, seen in self._tokenless.items() if seen[1] > now - MAX_TOKENLESS_SECONDS}
            times = kept[uuid][0] if uuid in kept else 0
            pause = min(FIRST_TOKENLESS_SECONDS * 2 ** min(times, 10), MAX_TOKENLESS_SECONDS)
            self._tokenless = kept | {uuid: (times + 1, now + pause)}


#: A job that waits is looked at after these seconds (a job that is handed out at once needs no word on its wait),
#: and from then on each time its wait has doubled.
FIRST_LOOK_SECONDS, SECOND_LOOK_SECONDS, THIRD_LOOK_SECONDS = 2.0, 30.0, 600.0
#: One whose claim has ended is looked at after the first, then every so often, until it is known if an agent had it.
FIRST_ENDED_SECONDS, ENDED_SECONDS = 1.0, 5.0
#: Texts for one job, however often it is claimed and given back. Buildkite takes 100.
TEXTS_PER_JOB = 20
#: Bounds: jobs that are watched, texts that wait to be sent, looks in one tick. Beyond the first two, some are lost.
WATCHED_JOBS, OUTBOX, LOOKS = 10_000, 10_000, 200
#: Jobs whose texts are counted: beyond this, the count of the one that was not told of for longest starts anew.
COUNTED_JOBS = 10_000
#: A text that could not be sent for so long says what is no longer so.
STALE_SECONDS = 60.0
#: A reason why jobs wait is worked out for all of them at most this often.
FLEET_SECONDS = 5.0
#: When Buildkite does not permit notifications at all, it is asked again after this.
UNWANTED_SECONDS = 600.0
#: Texts that Buildkite refuses are logged no more often than this.
COMPLAIN_SECONDS = 600.0


class Notifier:
    """Tells users, on the build page, where their job stands: in line, why it waits, who has it, who gave it back.

    Nothing depends on it. It keeps what it has to say in memory, within bounds, and loses it rather than be late;
    looks are timed by how long a job has been reserved, so a restart repeats none of them.
    """

    def __init__(self, stack: Stack, store: Store, dispatcher: Dispatcher):
        self._stack, self._store, self._dispatcher = stack, store, dispatcher
        self._lock = threading.Lock()  # guards the next five, and `counts`
        self._looks: dict[str, float] = {}  # when to look at each job that waits
        self._ends: dict[str, str] = {}  # of some of these: how their claim ended, to be told if no agent had them
        self._outbox: collections.deque[tuple[float, str, str]] = collections.deque(maxlen=OUTBOX)
        self._texts: dict[str, int] = {}  # said so far of each job that is not done, the last one told of last
        self._fleet_at = -math.inf
        self._fleet: Fleet | None = None
        self._complained_at = -math.inf
        #: Texts that Buildkite took, those it refused, and those that were never told.
        self.counts = {"sent": 0, "refused": 0, "lost": 0}

    # -- what happens to jobs; called by whoever moves them, so this takes microseconds

    def moved(self, verb: str, job: Job, now: float) -> None:
        """A verb of the store moved a job."""
        with self._lock:
            end = self._forget_wait(job.uuid)
            if job.state is JobState.DONE:
                self._texts.pop(job.uuid, None)
        # A claim that is followed by another was proved to be no agent's, by a leader that may be another scheduler.
        if end and job.state in (JobState.READY, JobState.LEASED):
            self._say(job.uuid, end, now)
        if job.state is JobState.READY:
            self._watch(job.uuid, next_look(job, now))
        elif verb == "claim":
            self._say(job.uuid, f"Handed to {by_name(job.worker)}.", now)
        elif verb in ("release", "expire", "complete"):
            last = job.tries[-1]
            end = f"Given back by {by_name(last['worker'])}: {last['reason'][:DETAIL_BYTES]}"
            # Its agent may have run it all the same, which Buildkite tells. With several schedulers only the one that
            # leads hears so: this one looks.
            self._watch(job.uuid, now + FIRST_ENDED_SECONDS, end)

    def _forget_wait(self, uuid: str) -> str | None:
        """Look at the job no more; how its last claim ended, if that was not told."""
        self._looks.pop(uuid, None)
        return self._ends.pop(uuid, None)

    def _watch(self, uuid: str, look_at: float, end: str | None = None) -> None:
        with self._lock:
            if len(self._looks) < WATCHED_JOBS:
                self._looks[uuid] = look_at
                if end:
                    self._ends[uuid] = end

    def watch_ready(self, now: float) -> None:
        """Watch what is `ready` already: another scheduler led when it became so, and has watched it until now."""
        after: tuple[int, float, str] | None = None
        for _ in range(0, WATCHED_JOBS, PAGE_JOBS):
            jobs = self._store.page(JobState.READY, after, PAGE_JOBS)
            for job in jobs:
                if job.queue_key == self._stack.queue_key and job.uuid not in self._looks:
                    self._watch(job.uuid, next_look(job, now))
            if len(jobs) < PAGE_JOBS:
                return
            after = jobs[-1].order

    def watch_no_more(self) -> None:
        """Another scheduler leads, and watches what is `ready`: keep what only we have seen, how claims here ended."""
        with self._lock:
            self._looks = {uuid: at for uuid, at in self._looks.items() if uuid in self._ends}

    def _say(self, uuid: str, detail: str, now: float) -> None:
        with self._lock:
            count = self._texts.pop(uuid, 0)
            self._texts[uuid] = min(count + 1, TEXTS_PER_JOB)
            if len(self._texts) > COUNTED_JOBS:  # only the leader hears that a job is done
                del self._texts[next(iter(self._texts))]
            if count == TEXTS_PER_JOB:
                return
            # A full outbox loses what is oldest.
            self.counts["lost"] += len(self._outbox) == OUTBOX
            self._outbox.append((now, uuid, detail))

    def look_again(self) -> None:
        """The queue was paused: those who wait are told soon."""
        with self._lock:
            self._looks = dict.fromkeys(self._looks, 0.0)
            self._fleet_at = -math.inf

    def follow_clock(self, step: float) -> None:
        with self._lock:
            self._looks = {uuid: at + step for uuid, at in self._looks.items()}
            self._outbox.clear()

    # -- what is said of it, on a thread of its own

    def tick(self, now: float) -> float:
        """Look at jobs that have waited long enough, and send what there is to say, one call at most."""
        with self._lock:
            due = list(itertools.islice((uuid for uuid, at in self._looks.items() if at <= now), LOOKS))
        for uuid in due:
            self._look(uuid, now)
        self._send(now)
        return 0.1 if len(due) == LOOKS or self._outbox else 1.0

    def _look(self, uuid: str, now: float) -> None:
        job = self._store.get(uuid)
        with self._lock:
            if uuid not in self._looks:
                return  # handed out meanwhile
            end = self._forget_wait(uuid)
            if job is None or job.state is JobState.DONE:
                self._texts.pop(uuid, None)
                return
        if end and job.state is JobState.RESERVING:
            self._watch(uuid, now + ENDED_SECONDS, end)
        elif job.state in (JobState.RESERVING, JobState.READY):
            self._watch(uuid, next_look(job, now))
            self._say(uuid, end or self._why(job, now), now)
        elif end and job.state is JobState.LEASED:
            self._say(uuid, end, now)

    def _why(self, job: Job, now: float) -> str:
        ahead = self._store.ahead(job, COUNTED_AHEAD)
        many = f"{ahead} or more" if ahead == COUNTED_AHEAD else str(ahead)
        line = f"{many} with the same rules ahead" if ahead else "first of its rules in line"
        if now - (job.reserved_at or now) < SECOND_LOOK_SECONDS and not self._is_paused(job, now):
            return f"Reserved by stack {self._stack.key}: {line}."
        rules = RuleSet.of(job.queue_key, job.agent_query_rules)
        return f"Waiting: {self._crew(now).why(rules, job.state is JobState.READY)[1]}; {line}."

    def _is_paused(self, job: Job, now: float) -> bool:
        return job.queue_key in self._crew(now).stats["paused"]

    def _crew(self, now: float) -> Fleet:
        if self._fleet is None or not 0 <= now - self._fleet_at < FLEET_SECONDS:
            self._fleet, self._fleet_at = Fleet(self._store, self._dispatcher, now), now
        return self._fleet

    def _send(self, now: float) -> None:
        batch: list[tuple[str, str]] = []
        with self._lock:
            while self._outbox and len(batch) < BATCH:
                at, uuid, detail = self._outbox.popleft()
                if now - at > STALE_SECONDS:
                    self.counts["lost"] += 1
                else:
                    batch.append((uuid, detail))
        if batch:
            self._deliver(batch, now)

    def _deliver(self, batch: Sequence[tuple[str, str]], now: float) -> None:
        try:
            refused = self._stack.notify(batch)
        except BuildkiteError as error:
            with self._lock:
                self.counts["lost"] += len(batch)  # not tried again: what is said next is truer
            if error.status == 403:
                told = f"{error}; build pages of this queue say nothing until it is tried again"
                raise BuildkiteError(told, error.status, UNWANTED_SECONDS) from None
            raise
        count = min(sum(refused.values()), len(batch))
        with self._lock:
            self.counts["refused"] += count
            self.counts["sent"] += len(batch) - count
        if refused and not 0 <= now - self._complained_at < COMPLAIN_SECONDS:
            self._complained_at = now
            reasons = "; ".join(f"{error} ({count})" for error, count in refused.items())
            log.warning(event("refused", call="notify", queue=self._stack.queue_key, reason=reasons))


def by_name(worker: str | None) -> str:
    return f"worker {worker}" if worker else "a worker without a name"


def next_look(job: Job, now: float) -> float:
    """When to look at a job that waits: the next of the set times after its reservation."""
    reserved_at = job.reserved_at or now
    if reserved_at == now:
        return now + FIRST_LOOK_SECONDS
    after = SECOND_LOOK_SECONDS
    while reserved_at + after <= now:
        after = max(2 * after, THIRD_LOOK_SECONDS)
    return reserved_at + after


class Upkeep:
    """What has to be done whether Buildkite answers or not."""

    def __init__(self, lead: Lead, clock: Clock, intakes: Mapping[str, Intake], dispatcher: Dispatcher):
        self._lead, self._clock, self._intakes, self._dispatcher = lead, clock, intakes, dispatcher
        self._next_prune_at = 0.0
        self._stepped = False
        self.duties = [Duty("upkeep", self.tick, clock.now)]
        lead.duties += self.duties

    @property
    def problems(self) -> list[str]:
        return problems_of(self.duties)

    def tick(self, now: float) -> float:
        store = self._lead.store()
        if step := self._clock.follow_wall_clock():
            now = self._clock.now()
            reason = "every lease starts anew, every reservation is due" if store else None
            log.warning(event("clock", step_s=f"{step:.0f}", reason=reason))
            self._next_prune_at += step
            for each in self._intakes.values():
                each.follow_clock(step)
            self._stepped = True
        is_prune_due = now >= self._next_prune_at
        if is_prune_due:
            self._dispatcher.forget(now - KEEP_DONE_SECONDS)
        if store:
            self._lead_on(store, is_prune_due, now)
        if is_prune_due:
            self._next_prune_at = now + KEEP_DONE_SECONDS / 24
        self._stepped = False
        return 1.0

    def _lead_on(self, store: Store, is_prune_due: bool, now: float) -> None:
        """What only the scheduler that leads does: the others would do the same to the same jobs."""
        if self._stepped:
            store.trust_no_clock(now, confirm=False)
            self._stepped = False  # not before the store has heard of it
        answered_at = {queue_key: intake.answered_at for queue_key, intake in self._intakes.items()}
        for job in store.expire(answered_at, now):
            log.warning(event("expired", job=job.uuid, queue=job.queue_key, worker=job.worker, reason=job.reason))
            if intake := self._intakes.get(job.queue_key):
                intake.returned(job)
        if is_prune_due:
            store.prune(now - KEEP_DONE_SECONDS)


class Peers:
    """The schedulers that share one Redis, as one of them sees it.

    All serve workers. One leads: it has a term, in which its intakes talk to Buildkite, and what they write carries
    the term's token. A leader that dies is followed by another when its turn has run out; one that was stopped and
    comes back finds its token refused. Of jobs that became ready each hears from the store, and offers them to the
    workers that wait at it.

    Whatever schedulers tell each other is JSON objects with names. Names and kinds of news that are not known are
    passed over, so that a scheduler of the next version can tell more.
    """

    def __init__(
        self,
        store: RedisStore,
        clock: Clock,
        dispatcher: Dispatcher,
        lead: Lead,
        intakes: Mapping[str, Intake],
        with_token: Callable[[str], Store],
    ):
        """`with_token` makes what is written with in the term that has this token."""
        self._store, self._clock, self._dispatcher = store, clock, dispatcher
        self._lead, self._intakes, self._with_token = lead, intakes, with_token
        self.is_alone = True
        #: A beat was answered, so we know who leads.
        self.has_heard = False
        self._token, self._leader = "", ""
        # Of the monotonic clock.
        self._turn_ends_at, self._term_began_at, self._no_lead_before = 0.0, 0.0, 0.0
        self._told_at = -math.inf  # of the monotonic clock: what workers were seen
        self._strangers: dict[str, str] = {}
        self._unread: set[str] = set()  # queues whose notes could not be read, said once each
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the next two
        self._offers = -1  # how often jobs became ready, as far as we have heard
        self._to_offer: set[str] = set()  # the rule sets to offer, or ALL of them
        self.turn = Duty("peers", self.tick, clock.now)
        self.news = Duty("news", self.listen, clock.now)
        # Not on the thread that renews the turn: it takes as long as the workers that wait are many.
        self.offers = Duty("offers", self.offer, clock.now)

    @property
    def duties(self) -> list[Duty]:
        return [self.turn, self.news, self.offers]

    @property
    def problems(self) -> list[str]:
        return problems_of(self.duties)

    @property
    def role(self) -> str:
        return "leads" if self._lead.store() else f"follows {self._leader or 'nobody'}"

    def stop(self) -> None:
        """Begin no term any more; the one that has begun goes on."""
        self._over.set()
        self.turn.stop()
        self.turn.join(2 * REDIS_SECONDS)
        self.is_alone = False
        with suppress(StoreUnavailable):
            # Who came since the last beat may lead next, and needs the stacks.
            beat = self._store.beat(self._clock.now(), self._notes(), lead=self._lead.store() is not None)
            self.is_alone = beat.schedulers.keys() == {self._store.name}
            self._store.tell(stopping=self._store.name)  # so that our own news thread need not wait for its read to end

    def leave(self) -> None:
        """Let another have the turn at once."""
        with suppress(StoreUnavailable):
            self._store.leave()

    # -- whose turn it is

    def tick(self, now: float) -> float:
        """Say that we are here, take or renew the turn, and hear what was missed."""
        asked_at = time.monotonic()
        if self._is_unanswered(now):
            self._end_term("Buildkite does not answer here; it may elsewhere")
            self._no_lead_before = asked_at + MODEST_SECONDS
            self._store.leave()
        heard = self._offers
        try:
            beat = self._store.beat(now, self._notes(), lead=asked_at >= self._no_lead_before)
        except StoreUnavailable:
            if self._lead.store() and asked_at >= self._turn_ends_at:
                self._end_term("Redis could not be told in time that we are here")
            raise
        self._turn_ends_at = asked_at + TURN_SECONDS
        if self._lead.store() and beat.token != self._token:
            self._end_term(f"{beat.leader or 'nobody'} has the turn")
        if beat.token:
            self._take_turn(beat)
        self._follow(beat)
        self._note_offers(beat.offers, heard)
        if asked_at - self._told_at >= SEEN_SECONDS:
            self._told_at = asked_at
            self._dispatcher.hear(self._store.seen(self._dispatcher.told(now - LIVE_SECONDS)))
        # When a leader falls silent, its turn is taken as soon as it has run out.
        return 1.0 if self._lead.store() else max(0.05, min(1.0, beat.turn_seconds + 0.01))

    def _take_turn(self, beat: Beat) -> None:
        store = self._lead.store() or self._with_token(beat.token)
        if not beat.trusted:
            reason = "nobody led, or Redis was started: what is ready is confirmed before it is handed out"
            log.warning(event("distrusted", reason=reason))
            try:
                store.trust_no_clock(self._clock.now(), confirm=True)
            except Fenced:
                return  # it took us longer than our turn; the next beat tells who leads
        if not self._lead.store():
            self._begin_term(store, beat.token)

    def _begin_term(self, store: Store, token: str) -> None:
        answered_at = self._store.answered_at()
        log.info(event("leading", scheduler=self._store.name, term=token))
        self._token, self._term_began_at = token, time.monotonic()
        self._lead.begin(store, answered_at)

    def _end_term(self, reason: str) -> None:
        log.warning(event("deposed", scheduler=self._store.name, term=self._token, reason=reason))
        self._lead.end()
        self._leader = ""

    def _is_unanswered(self, now: float) -> bool:
        """Whether we lead, others could, and Buildkite has long not answered us."""
        if not self._lead.store() or self.is_alone or time.monotonic() - self._term_began_at < UNANSWERED_SECONDS:
            return False
        intakes = self._intakes.values()
        return all(each.list.failures and now - each.answered_at >= UNANSWERED_SECONDS for each in intakes)

    def _notes(self) -> dict[str, Any]:
        """What the others are to know of each queue, from the one that leads."""
        intakes = self._intakes if self._lead.store() else {}
        return {q: {"last_list_at": i.last_list_at, "problems": i.problems} for q, i in intakes.items()}

    def _follow(self, beat: Beat) -> None:
        if not self._lead.store():
            for queue_key, noted in beat.notes.items():
                self._note(queue_key, noted)
            if beat.leader != self._leader:
                log.info(event("following", leader=beat.leader or "nobody"))
        self._leader = beat.leader
        self.has_heard = True
        self.is_alone = beat.schedulers.keys() == {self._store.name}
        self._compare(beat.schedulers)

    def _note(self, queue_key: str, noted: object) -> None:
        match self._intakes.get(queue_key), noted:
            case Intake() as intake, {"last_list_at": int() | float() as last_list_at, "problems": [*problems]}:
                intake.note(last_list_at, [str(problem) for problem in problems])
            case Intake(), _ if queue_key not in self._unread:
                self._unread.add(queue_key)
                reason = f"the leader tells of it in a way that is not known here: {cut(repr(noted), 200)}"
                log.warning(event("unread", queue=queue_key, reason=reason))

    def _compare(self, schedulers: Mapping[str, str]) -> None:
        """Name schedulers whose settings differ from ours where they must be equal."""
        queues = {name: queues_told(text) for name, text in schedulers.items()}
        mine = queues.get(self._store.name)
        strangers = {name: theirs for name, theirs in queues.items() if theirs != mine}
        for name in strangers.keys() - self._strangers.keys():
            reason = "SCHEDULER_QUEUES differ; whoever leads serves its own alone: set them equal"
            log.error(event("disagreed", scheduler=name, queues=strangers[name], ours=mine, reason=reason))
        self._strangers = strangers

    # -- what became ready

    def _note_offers(self, offers: int, heard: int) -> None:
        """Offer everything if some news was lost. `offers` is how many Redis told of, `heard` what of these we had
        heard before we asked; more may have come since."""
        with self._lock:
            if heard <= offers <= self._offers:
                return
            self._offers = offers  # first, or the next beat offers everything once more
            self._to_offer.add(ALL)
        self.offers.wake()

    def offer(self, now: float) -> float:
        """Offer what became ready to those who wait here."""
        with self._lock:
            rule_sets, self._to_offer = self._to_offer, set()
        if rule_sets:
            try:
                self._dispatcher.offer_again(None if ALL in rule_sets else self._store.rules_of(rule_sets))
            except StoreUnavailable:
                with self._lock:
                    self._to_offer |= rule_sets
                raise
        return MAX_BACKOFF_SECONDS

    # -- what the others say

    def listen(self, now: float) -> float:
        """Hear news for as long as the line holds."""
        try:
            for news in self._store.news(self._is_over):
                self._hear(news)
        except StoreUnavailable as error:
            log.debug(event("unheard", reason=str(error)))
        return STORE_AGAIN_SECONDS

    def _is_over(self) -> bool:
        """Asked before each read, which ends within a second."""
        self.news.step()
        return self._over.is_set()

    def _hear(self, news: Any) -> None:
        try:
            match news:
                case {"offer": int(offer), "rule_sets": rule_sets}:
                    self._hear_offer(offer, rule_sets)
                case {"offer": _}:
                    raise ValueError("its count or its rule sets are missing")
                case {"left": _}:
                    self.turn.wake()
                case {"queue": str(queue_key)} if self._lead.store() and queue_key in self._intakes:
                    self._intakes[queue_key].hear(news)
        except ValueError as error:
            log.warning(event("unread", news=cut(repr(news), 200), reason=str(error)))

    def _hear_offer(self, offer: int, rule_sets: object) -> None:
        # Ours as well: the answer that told us may have been lost.
        named = rule_sets if isinstance(rule_sets, list) else [ALL]
        with self._lock:
            self._to_offer.update(named)
            if offer == self._offers + 1:
                self._offers = offer
        self.offers.wake()


#: What the store tells instead of rule sets when they are too many.
ALL = "*"


def queues_told(text: str) -> str:
    """The queues of a scheduler, from what it tells of its settings; "" if that cannot be read."""
    with suppress(ValueError):
        match json.loads(text):
            case {"queues": str(queues)}:
                return queues
    return ""


# --- HTTP API ---

#: Bounds of a request: its head, its body, and the wait it may ask for.
HEAD_BYTES, BODY_BYTES, MAX_WAIT_SECONDS = 16 * 1024, 64 * 1024, 60.0
#: Bounds of a webhook: its body (with a build's jobs it is large), how many bodies are read at a time, and its age.
WEBHOOK_BYTES, WEBHOOKS, WEBHOOK_SECONDS = 1024 * 1024, 8, 300.0
#: Events after which there may be something new to list.
LISTED_AFTER = ("job.scheduled", "job.activated", "build.scheduled", "build.running")
#: How long a connection may be silent between two requests, and how long it may take to begin: the TLS handshake,
#: then the first byte. All of a request is here within the same time from its first byte.
SILENCE_SECONDS, ARRIVAL_SECONDS = 75.0, 10.0
#: How much of a body that was refused is heard out, and for how long.
UNREAD_BYTES, UNREAD_SECONDS = 4 * 1024 * 1024, 1.0
#: A client that reads slower than this is given up.
DEPARTURE_SECONDS = 30.0
#: Files that are left for everything but connections: the store, Buildkite, the log.
OTHER_FILES = 100
#: That connections are refused is logged no more often than this.
REFUSALS_SECONDS = 10.0
#: What is kept of a worker's reason and of its agent's last words.
WORDS_LETTERS = 2048
#: How often one claim is tried again with another job when no token was issued for the first.
TOKEN_TRIES = 3
#: Jobs on one page of the queue, and how far those ahead of a job are counted: this many may be more.
PAGE_JOBS, COUNTED_AHEAD = 1000, 1000
#: Beyond this age of the last good list, or so many times POLL_INTERVAL, `/health?strict=1` is 503.
STALE_POLL_SECONDS, STALE_POLLS = 60.0, 3


class Api:
    """The routes. Each takes a Request and returns what is to be answered as JSON; rules are the store's."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        intakes: Mapping[str, Intake],
        settings: Settings,
        now: Callable[[], float],
        metrics: Metrics | None = None,
    ):
        self._store, self._dispatcher, self._intakes = store, dispatcher, intakes
        self._settings, self._now = settings, now
        self._metrics = metrics or Metrics()
        #: Those whose problems `/health` tells.
        self.parts: Sequence[Part] = [*intakes.values()]
        self._started_at = now()
        self._webhook_refused_at = -math.inf  # monotonic: when that was logged last
        self._at_start = summed(store.stats()["totals"])

    def use(self, settings: Settings) -> None:
        """Take over what a reload can change: WEBHOOK_TOKEN."""
        self._settings = settings

    def health(self, request: Request) -> Answer:
        """GET /health"""
        now = self._now()
        self._store.probe()
        ages = {q: now - i.last_list_at if i.last_list_at else None for q, i in self._intakes.items()}
        problems = list(dict.fromkeys(problem for part in self.parts for problem in part.problems))
        most = max(STALE_POLL_SECONDS, STALE_POLLS * self._settings.poll_interval)
        stale = [q for q, age in ages.items() if age is None or age > most]
        strict = request.query.get("strict") == "1"
        body = {
            "status": "stale" if strict and stale else "ok",
            "last_poll_age_seconds": {q: None if age is None else round(age, 3) for q, age in ages.items()},
            "problems": problems,
        }
        return Answer(503 if strict and stale else 200, body)

    def claim(self, request: Request) -> Answer:
        """GET /jobs?query=queue=default,arch=amd64&wait=30"""
        try:
            profile = Profile.of(request.query.get("query", ""))
        except ValueError as error:
            raise Refusal(str(error), code="bad_query") from None
        worker = Worker(request.worker_name, request.worker_session, profile)
        wait = wait_of(request.query.get("wait", "0"))
        if request.query.get("token") == "1":
            return self._claim_with_token(worker, wait, request.is_gone)
        job = self._dispatcher.claim(worker, wait, request.is_gone)
        return Answer(204, None) if job is None else self._claimed(job)

    def _claim_with_token(self, worker: Worker, wait: float, is_gone: Callable[[], bool]) -> Answer:
        """A claim that is of no use without a token for its job: written first, and given back if there is none.

        It is answered at the latest TOKEN_SECONDS after its wait, or after twice that when it hardly waits.
        """
        began_at = time.monotonic()
        for _ in range(TOKEN_TRIES):
            passed = time.monotonic() - began_at
            if passed >= max(wait, TOKEN_SECONDS) or is_gone():
                break
            left = max(0.0, wait - passed)
            job = self._dispatcher.claim(worker, left, is_gone, lambda: self._are_tokens_withheld(worker.profile))
            if job is None:
                break
            if token := self._token_for(job):
                return self._claimed(job, token=token)
        return Answer(204, None)

    def _are_tokens_withheld(self, profile: Profile) -> bool:
        return any(self._intakes[key].tokens.withheld for key in profile.queue_keys if key in self._intakes)

    def _token_for(self, job: Job) -> str | None:
        """The job's token, or None: then the job was given back, which is no attempt."""
        intake, reason = self._intakes.get(job.queue_key), "no job acquisition token is issued for it"
        try:
            if intake and (token := intake.tokens.ask(job.uuid)):
                return token
            if intake:
                intake.not_issued(job.uuid)
        except BuildkiteError as error:
            reason = f"no job acquisition token can be had: {error}"
        self._take_back(job, reason)
        return None

    def _claimed(self, job: Job, **more: str) -> Answer:
        reason = "the answer to its claim could not be delivered"
        return Answer(
            200,
            self._described(job) | more,
            delivered=lambda: self._log_claimed(job),  # the worker need not wait for the log
            undelivered=lambda: self._take_back(job, reason),
        )

    def _log_claimed(self, job: Job) -> None:
        waited = f"{self._now() - job.scheduled_at:.1f}"
        names = {"queue": job.queue_key, "worker": job.worker, "claim": job.claim}
        log.info(event("claimed", job=job.uuid, **names, waited_s=waited))

    def _described(self, job: Job) -> dict[str, Any]:
        return {
            "uuid": job.uuid,
            "queue_key": job.queue_key,
            "agent_query_rules": job.agent_query_rules,
            "priority": job.priority,
            "scheduled_at": rfc3339(job.scheduled_at),
            "reserved_at": rfc3339(job.reserved_at),
            "claim": job.claim,
            "attempt": job.claims,
            "lease_seconds": self._settings.lease_seconds,
            **job.about,
        }

    def _take_back(self, job: Job, reason: str) -> None:
        """Nobody can use this claim. Where the same worker got it again meanwhile, it stays with it."""
        holder = Holder(job.uuid, job.claim, asked=job.version)
        try:
            self._returned("released", self._store.release(holder, reason, 0.0, self._now()))
        except Refusal as refusal:
            log.warning(event("unreleased", job=job.uuid, claim=job.claim, reason=str(refusal)))

    def touch(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/touch {"claim"}"""
        job = self._store.touch(Holder(request.uuid, request.text("claim"), request.worker), self._now())
        held_for = self._now() - (job.claimed_at or self._now())
        # Never for a job that an agent may have: its work is not ours to stop.
        stop = job.state is JobState.LEASED and held_for > self._settings.acquire_seconds
        return Answer(200, {"state": job.state, "stop": stop, "lease_seconds": self._settings.lease_seconds})

    def release(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/release {"claim", "reason"}"""
        reason = request.text("reason", "no reason given")[:WORDS_LETTERS]
        holder = Holder(request.uuid, request.text("claim"), request.worker)
        job = self._store.release(holder, reason, self._answered_at(request.uuid), self._now())
        self._returned("released", job)
        return Answer(200, {"uuid": job.uuid, "released": job.state is not JobState.RUNNING})

    def complete(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/complete {"claim", "exit_status", "last_words"}, or nothing, from the job's holder"""
        status = request.body.get("exit_status", 0)
        if isinstance(status, bool) or not isinstance(status, int) or abs(status) > 2**31:
            raise Refusal(f"`exit_status` is {status!r}, not a whole number", code="bad_body")
        end = AgentEnd(status, request.text("last_words", "")[-WORDS_LETTERS:])
        holder = Holder(request.uuid, request.text("claim") if request.body else None, request.worker)
        job = self._store.complete(holder, end, self._answered_at(request.uuid), self._now())
        self._returned("completed", job)
        return Answer(200, {"uuid": job.uuid, "completed": True})

    def _answered_at(self, uuid: str) -> float:
        job = self._store.get(uuid)
        intake = self._intakes.get(job.queue_key) if job else None
        return intake.answered_at if intake else 0.0

    def _returned(self, word: str, job: Job) -> None:
        log.info(event(word, job=job.uuid, queue=job.queue_key, worker=job.worker, state=job.state, reason=job.reason))
        if intake := self._intakes.get(job.queue_key):
            intake.returned(job)

    def job(self, request: Request) -> Answer:
        """GET /jobs/{uuid}"""
        job = self._store.get(request.uuid)
        if job is None:
            raise unknown_job(request.uuid)
        return Answer(200, job_told(job) | self._wait_of(job) | {"story": story(job)})

    def _wait_of(self, job: Job) -> dict[str, Any]:
        """Why a job that waits does so, and how many of its rule set are ahead: of others, nothing."""
        if job.state not in (JobState.RESERVING, JobState.READY):
            return {}
        ready = job.state is JobState.READY
        why, text = self._fleet().why(RuleSet.of(job.queue_key, job.agent_query_rules), ready)
        return {"why": why, "why_text": text, "ahead": self._store.ahead(job, COUNTED_AHEAD)}

    def queue(self, request: Request) -> Answer:
        """GET /queue?state=ready&limit=100&after=<next of the page before>"""
        state, limit, after = request.query.get("state", JobState.READY), request.query.get("limit", "100"), None
        if state not in list(JobState):
            raise Refusal(f"state is {state!r}; it may be {', '.join(JobState)}", code="bad_query")
        if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= PAGE_JOBS:
            raise Refusal(f"limit is {limit!r}; it may be 1 to {PAGE_JOBS}", code="bad_query")
        if text := request.query.get("after"):
            after = place_of(text)
        jobs = self._store.page(JobState(state), after, int(limit))
        following = "{}:{!r}:{}".format(*jobs[-1].order) if len(jobs) == int(limit) else None
        return Answer(200, {"state": state, "jobs": [job_told(job) for job in jobs], "next": following})

    def _fleet(self) -> Fleet:
        return Fleet(self._store, self._dispatcher, self._now())

    def stats(self, request: Request) -> Answer:
        """GET /stats"""
        now, fleet = self._now(), self._fleet()
        stats = fleet.stats
        return Answer(
            200,
            {
                "queues": stats["waiting"],
                "total": sum(stats["waiting"].values()),
                "waiting": waiting_by_rules(fleet, now),
                "states": stats["states"],
                "outcomes": stats["outcomes"],
                "totals": {
                    # Never below nothing: a Redis that lost its data counts from there.
                    "since_start": {
                        name: max(0, n - self._at_start[name]) for name, n in summed(stats["totals"]).items()
                    },
                    "all_time": summed(stats["totals"]),
                },
                "paused": stats["paused"],
                "running": [
                    {
                        "uuid": j.uuid,
                        "worker": j.worker,
                        "queue_key": j.queue_key,
                        "since": rfc3339(j.claimed_at),
                    }
                    for j in stats["held"]
                    if j.state is JobState.RUNNING
                ],
                "workers": [worker_told(member) for member in fleet.members],
                "uptime_seconds": round(now - self._started_at, 1),
            },
        )

    def webhook(self, request: Request) -> Answer:
        """POST /webhook, which check_webhook let in: there may be something new to list. Polling finds what this
        misses."""
        queue_keys = self._queues_of(request.body) if request.body.get("event") in LISTED_AFTER else []
        for queue_key in queue_keys:
            self._intakes[queue_key].list_soon()
        return Answer(200, {"listed": queue_keys})

    def check_webhook(self, headers: email.message.Message, raw_body: bytes | None) -> None:
        """Refuse what is not from Buildkite. Before the body was read (None), as far as the headers tell."""
        try:
            self._check_webhook(headers, raw_body)
        except Refusal as refusal:
            # Whoever sets it up must find out; whoever knocks all day must not fill the log.
            if refusal.status == 401 and time.monotonic() - self._webhook_refused_at >= REFUSALS_SECONDS:
                self._webhook_refused_at = time.monotonic()
                log.warning(event("refused", call="webhook", reason=refusal))
            raise

    def _check_webhook(self, headers: email.message.Message, raw_body: bytes | None) -> None:
        token = self._settings.webhook_token.encode()
        if not token:
            raise Refusal("there is no '/webhook' here: WEBHOOK_TOKEN is not set", status=404, code="not_found")
        signature = headers.get("X-Buildkite-Signature")
        if signature is None:
            given = headers.get("X-Buildkite-Token", "").encode(errors="replace")
            if not hmac.compare_digest(given, token):
                raise Refusal("X-Buildkite-Token is not WEBHOOK_TOKEN", status=401, code="unauthorized")
            return
        sent_at, given = signature_parts(signature)
        if not abs(self._now() - sent_at) <= WEBHOOK_SECONDS:
            raise Refusal(f"its timestamp is over {WEBHOOK_SECONDS:.0f} s off", status=401, code="unauthorized")
        if raw_body is not None:
            wanted = hmac.new(token, b"%d.%b" % (sent_at, raw_body), hashlib.sha256).hexdigest()
            if not hmac.compare_digest(given, wanted.encode()):
                raise Refusal("X-Buildkite-Signature is not made with WEBHOOK_TOKEN", status=401, code="unauthorized")

    def _queues_of(self, body: Mapping[str, Any]) -> list[str]:
        """Our queues that the event may be about: its job's, else all."""
        rules = an_object(body, "job").get("agent_query_rules")
        pairs = [rule.partition("=") for rule in rules if isinstance(rule, str)] if isinstance(rules, list) else []
        named = {value.strip() for key, _, value in pairs if key.strip() == "queue"}
        # `_default` is the cluster's default queue, whatever that one is called.
        return [queue_key for queue_key in self._intakes if not named or queue_key in {*named, "_default"}]

    def metrics(self, request: Request) -> Answer:
        """GET /metrics"""
        now = self._now()
        try:
            levels = levels_of(self._fleet(), self._metrics.label, now)
        except StoreUnavailable:  # what else is known is told all the same
            levels = [gauge("stack_store_up", "Whether the store could be read.", [], [((), 0.0)])]
        polled = {q: now - (intake.last_list_at or self._started_at) for q, intake in self._intakes.items()}
        told = {queue_key: intake.notifier.counts for queue_key, intake in self._intakes.items()}
        return Answer(200, self._metrics.text([*levels, *polls_of(polled), notifications_of(told)], now))


def job_told(job: Job) -> dict[str, Any]:
    """What may be said of a job, its times as RFC 3339."""
    row = {name: getattr(job, name) for name in COLUMNS if name not in UNTOLD}
    row |= job.about
    times = {name: rfc3339(value) for name, value in row.items() if name.endswith("_at") and value}
    tries = [t | {name: rfc3339(t[name]) for name in ("claimed_at", "ended_at")} for t in job.tries]
    return row | times | {"tries": tries}


def story(job: Job) -> list[dict[str, Any]]:
    """What happened to a job, in order: {at, what}, and `worker` and `reason` where there are such."""
    events: list[tuple[float | None, str, str | None, str | None]] = [
        (job.scheduled_at, "scheduled", None, None),
        (job.put_at, "put", None, None),
        (job.reserved_at, "reserved", None, None),
    ]
    for ended in job.tries:
        events.append((ended["claimed_at"], "claimed", ended["worker"], None))
        # `tries` has the whole reason.
        events.append((ended["ended_at"], ENDS[ended["how"]], ended["worker"], ended["reason"][:STORY_LETTERS]))
    if job.claimed_at not in [ended["claimed_at"] for ended in job.tries]:
        events.append((job.claimed_at, "claimed", job.worker, None))
    events.append((job.acquired_at, "acquired", job.worker, None))
    events.append((job.done_at, str(job.outcome), job.worker, job.reason))
    # Sorting leaves what happened at one moment as it is written above.
    happened = sorted((event for event in events if event[0]), key=lambda event: event[0] or 0.0)
    rows = [{"at": rfc3339(at), "what": what, "worker": by, "reason": reason} for at, what, by, reason in happened]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


STORY_LETTERS = 200
ENDS = {"release": "released", "expire": "expired", "complete": "completed"}


def waiting_by_rules(fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """What waits, by rule set, and why; the longest wait first."""
    waiting: dict[str, list[Level]] = {}
    for level in fleet.stats["levels"]:
        if level.state in (JobState.RESERVING, JobState.READY):
            waiting.setdefault(level.rule_set, []).append(level)
    rows = []
    for rule_set, levels in waiting.items():
        why, text = fleet.why(RuleSet.read(rule_set), any(level.state is JobState.READY for level in levels))
        rows.append(
            {
                "rules": rule_set,
                "jobs": sum(level.jobs for level in levels),
                "oldest_wait_seconds": round(now - min(level.oldest for level in levels), 1),
                "why": why,
                "why_text": text,
            }
        )
    return sorted(rows, key=lambda row: (-row["oldest_wait_seconds"], row["rules"]))


def worker_told(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "state": member.doing,
        "tags": ",".join(sorted(member.profile.tags)),
        "queues": sorted(member.profile.queue_keys) or None,
        "job": member.job,
        "claims": member.claims,
        "jobs_done": member.ran,
        "last_seen_at": rfc3339(member.last_seen_at),
    }


def summed(totals: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The totals of all queues, by outcome."""
    return {outcome: sum(of_queue[outcome] for of_queue in totals.values()) for outcome in Outcome}


def place_of(text: str) -> tuple[int, float, str]:
    """The place in line that a page ended at; a Refusal for what was never the `next` of one."""
    priority, _, rest = text.partition(":")
    scheduled_at, _, uuid = rest.partition(":")
    with suppress(ValueError):
        if abs(int(priority)) < 2**63 and math.isfinite(float(scheduled_at)) and UUID.fullmatch(uuid):
            return int(priority), float(scheduled_at), uuid
    raise Refusal(f"after is {text!r}; it may be the `next` of the page before", code="bad_query")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers; `delivered` is called when it was sent, `undelivered` when the client was gone."""

    status: int
    #: JSON; or a text as it is, in the format of Prometheus.
    body: dict[str, Any] | str | None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delivered: Callable[[], None] = lambda: None
    undelivered: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a route needs of a request."""

    uuid: str
    query: Mapping[str, str]
    body: Mapping[str, Any]
    worker_name: str
    worker_session: str
    is_gone: Callable[[], bool]

    @property
    def worker(self) -> Worker | None:
        if not self.worker_name:
            return None
        return Worker(self.worker_name, self.worker_session, NO_PROFILE)

    def text(self, name: str, default: str | None = None) -> str:
        """A text of the body, or a Refusal that names it."""
        value = self.body.get(name, default)
        if not isinstance(value, str):
            raise Refusal(f"the body needs `{name}`, a text; it is {value!r}", code="bad_body")
        # JSON may hold half a letter (a lone surrogate), which neither the store nor the log can write.
        return value.encode(errors="replace").decode()


#: What `GET /jobs/{uuid}` keeps to itself: who knows a claim's id can end it.
UNTOLD = {"about", "version", "claim", "completed_claim", "session"}
NO_PROFILE = Profile(frozenset(), frozenset(), frozenset())


def signature_parts(signature: str) -> tuple[int, bytes]:
    """When it was made, and what it is, of "timestamp=<seconds>,signature=<hex>"."""
    parts = dict(part.strip().partition("=")[::2] for part in signature.split(","))
    if not re.fullmatch("[0-9]{1,12}", parts.get("timestamp", ""), re.ASCII):
        raise Refusal("X-Buildkite-Signature has no timestamp", status=401, code="unauthorized")
    return int(parts["timestamp"]), parts.get("signature", "").encode(errors="replace")


def parameters(query: str) -> dict[str, str]:
    try:
        return dict(urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=20))
    except ValueError:
        raise Refusal("the query string has over 20 parameters", code="bad_query") from None


def wait_of(text: str) -> float:
    try:
        wait = float(text)
    except ValueError:
        wait = math.nan
    if not 0 <= wait <= MAX_WAIT_SECONDS:
        raise Refusal(f"wait is {text!r}; it may be 0 to {MAX_WAIT_SECONDS:.0f} seconds", code="bad_wait")
    return wait


#: Method, path, the Api's method, and whether it is open to those without the API token.
ROUTES: Sequence[tuple[str, re.Pattern[str], Callable[[Api, Request], Answer], bool]] = (
    ("GET", re.compile(r"/health"), Api.health, True),
    ("GET", re.compile(r"/jobs"), Api.claim, False),
    ("GET", re.compile(r"/jobs/([^/]+)"), Api.job, False),
    ("POST", re.compile(r"/jobs/([^/]+)/touch"), Api.touch, False),
    ("POST", re.compile(r"/jobs/([^/]+)/release"), Api.release, False),
    ("POST", re.compile(r"/jobs/([^/]+)/complete"), Api.complete, False),
    ("GET", re.compile(r"/queue"), Api.queue, False),
    ("GET", re.compile(r"/stats"), Api.stats, False),
    ("GET", re.compile(r"/metrics"), Api.metrics, False),
    ("POST", re.compile(r"/webhook"), Api.webhook, True),  # it has a token of its own
)


#: Connections that the system holds for us: workers of a whole fleet may come at once when the scheduler starts.
BACKLOG = 1024
#: The first socket that systemd passes on. Source: sd_listen_fds(3)
FIRST_INHERITED_FD = 3


def is_inherited(environ: Mapping[str, str]) -> bool:
    """Whether a systemd socket unit hands sockets over to this process, and not to the one that started it."""
    return environ.get("LISTEN_PID") == str(os.getpid())


def listening_sockets(address: tuple[str, int], environ: Mapping[str, str]) -> list[socket.socket]:
    """The sockets that a systemd socket unit hands over, else one that is bound to `address`."""
    if is_inherited(environ):
        return [inherited(FIRST_INHERITED_FD + number) for number in range(int(environ["LISTEN_FDS"]))]
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        # Without http.server's look-up of our own name, which can hang on a broken DNS.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"LISTEN: {address[0]}:{address[1]} cannot be bound: {error}") from error
    return [listener]


def inherited(descriptor: int) -> socket.socket:
    """One socket of the socket unit; SettingsError when workers cannot come by it."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type is not socket.SOCK_STREAM:
        raise SettingsError(
            f"the socket unit hands over {listener.family.name} {listener.type.name}; workers come by TCP: "
            "use ListenStream= with a port"
        )
    return listener


class Inbox(io.RawIOBase):
    """What a client sends: so many bytes at most, and until a moment, however slowly they come."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._ends_at, self.bytes_left = 0.0, HEAD_BYTES

    def expect_within(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._ends_at - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("it did not come in time")
        if not self.bytes_left:
            raise Refusal(f"the request's head is over {HEAD_BYTES} bytes", status=431, code="head_too_large")
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self.bytes_left])
        self.bytes_left -= count
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: parses requests, finds their route, writes the answer as one packet."""

    server: Server
    protocol_version = "HTTP/1.1"  # keep-alive: a worker claims and touches on one connection
    disable_nagle_algorithm = True  # the answer is one small packet that somebody waits for

    def setup(self) -> None:
        """The TLS handshake is made here, on the connection's own thread: who dawdles delays nobody else."""
        if tls := self.server.tls:
            self.request.settimeout(ARRIVAL_SECONDS)
            self.request = tls.wrap_socket(self.request, server_side=True)
        super().setup()
        self.rfile.close()
        self._inbox = Inbox(self.connection)
        self.rfile = io.BufferedReader(self._inbox)
        self._silence = ARRIVAL_SECONDS
        #: The request has a body that was not read, so nothing can follow it on this connection.
        self._is_unread = False

    def finish(self) -> None:
        super().finish()
        if self._is_unread:
            self._hear_out()
        self.server.shutdown_request(self.connection)  # under TLS it is not the socket that the server knows

    def handle_one_request(self) -> None:
        """The base class's, within bounds: it alone would wait for the next byte of a head again and again."""
        self.command = self.path = ""
        try:
            self._inbox.bytes_left = HEAD_BYTES
            self._inbox.expect_within(self._silence)
            if not self.rfile.peek(1):  # type: ignore[attr-defined]
                self.close_connection = True
                return
            self._inbox.expect_within(ARRIVAL_SECONDS)
            super().handle_one_request()
            self._silence = SILENCE_SECONDS
        except Refusal as refusal:
            self.close_connection = True
            self._write(refusal.answer)

    def _serve(self) -> None:
        self.server.unanswered.add(self.client_address)
        self._is_unread = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        try:
            answer = self._route()
        except Refusal as refusal:
            answer = refusal.answer
        except Exception:
            log.exception(
                event("failed", method=self.command, path=self.path, reason="a fault of ours; please report it")
            )
            answer = Answer(500, {"error": "internal", "message": "the scheduler failed; its log says how"})
        try:
            self._write(answer)
        except OSError:
            self.close_connection = True
            answer.undelivered()
        else:
            answer.delivered()
        self.server.unanswered.discard(self.client_address)

    # The base class looks for a method of each name; what is not allowed is said by _find.
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = do_QUERY = _serve

    def _route(self) -> Answer:
        self._check_form()
        path, _, query = self.path.partition("?")
        match, serve = self._find(path)
        if serve is Api.webhook:
            return self._webhook(match, query)
        return serve(self.server.api, self._request(match, query, self._body(BODY_BYTES)))

    def _find(self, path: str) -> tuple[re.Match[str], Callable[[Api, Request], Answer]]:
        """The route, if whoever asks may take it: who may not is refused before the body is read."""
        matching = [(route, m) for route in ROUTES if (m := route[1].fullmatch(path))]
        if not matching:
            raise Refusal(f"there is no {path!r} here", status=404, code="not_found")
        for (method, _, serve, is_open), match in matching:
            if method == self.command:
                if not is_open:
                    self._check_token()
                return match, serve
        methods = ", ".join(route[0] for route, _ in matching)
        message = f"{path} takes {methods}, not {self.command}"
        raise Refusal(message, status=405, code="method_not_allowed", headers={"Allow": methods})

    def _check_form(self) -> None:
        """Refuse what could be read in two ways, and what would not be fit for a log."""
        unclear = self.headers.defects or len(self.headers.get_all("Content-Length", [])) > 1
        if unclear or not self.path.isprintable():
            self.close_connection = True
            raise Refusal("the request's head is not well-formed HTTP")

    def _webhook(self, match: re.Match[str], query: str) -> Answer:
        """One whose body may be large: only from those who may send it, and a few at a time until each is answered."""
        api = self.server.api
        api.check_webhook(self.headers, None)
        if not self.server.limit.webhooks.acquire(blocking=False):
            raise Refusal("too many webhooks at once; polling finds what they tell", status=503, code="busy")
        try:
            body = self._body(WEBHOOK_BYTES)
            # Before it is parsed, which takes many times its size.
            api.check_webhook(self.headers, body)
            return api.webhook(self._request(match, query, body))
        finally:
            self.server.limit.webhooks.release()

    def _body(self, most: int) -> bytes:
        """The whole body, so that the next request on this connection starts where it should."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refusal("the body needs a Content-Length", status=411, code="length_required")
        if int(length) > most:
            raise Refusal(f"the body is {length} bytes, over {most}", status=413, code="body_too_large")
        self._inbox.bytes_left = int(length)
        try:
            body = self.rfile.read(int(length))
        except OSError:  # reset, or not here in time
            body = b""
        if len(body) < int(length):
            raise Refusal("the body ended early", code="bad_body")
        self._is_unread = False
        return body

    def _hear_out(self) -> None:
        """Take what a client still sends of a body that nobody reads: to close on it would reset the connection, and
        the client might lose the answer with it."""
        self._inbox.bytes_left = UNREAD_BYTES
        self._inbox.expect_within(UNREAD_SECONDS)
        with suppress(OSError, Refusal):
            self.connection.shutdown(socket.SHUT_WR)
            while self._inbox.readinto(bytearray(BODY_BYTES)):
                pass

    def _check_token(self) -> None:
        tokens, given = self.server.api_tokens, self.headers.get("Authorization", "").encode(errors="replace")
        # Each is compared, so that the time it takes does not tell which of them was nearly right.
        right = [hmac.compare_digest(given, f"Bearer {token}".encode()) for token in tokens]
        if tokens and not any(right):
            message = "this needs `Authorization: Bearer <token>` with a token of the scheduler's STACK_API_TOKEN"
            raise Refusal(message, status=401, code="unauthorized", headers={"WWW-Authenticate": "Bearer"})

    def _request(self, match: re.Match[str], query: str, raw_body: bytes) -> Request:
        try:
            body = json.loads(raw_body) if raw_body.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body is not JSON: {error}", code="bad_body") from None
        if not isinstance(body, dict):
            raise Refusal(f"the body is a JSON {type(body).__name__}, not an object", code="bad_body")
        name, session = self.headers.get("X-Worker-ID", ""), self.headers.get("X-Worker-Session", "")
        for value in (name, session):
            if len(value) > 200 or not value.isprintable():
                raise Refusal("X-Worker-ID and X-Worker-Session are at most 200 printable letters", code="bad_header")
        return Request(
            uuid=urllib.parse.unquote(match[1]).lower() if match.groups() else "",
            query=parameters(query),
            body=body,
            worker_name=name,
            worker_session=session,
            is_gone=self._is_gone,
        )

    def _is_gone(self) -> bool:
        """Whether the client hung up; asked just before a job is given to it."""
        poll = select.poll()
        poll.register(self.connection, HUNG_UP)
        return bool(poll.poll(0))

    def _write(self, answer: Answer) -> None:
        self.connection.settimeout(DEPARTURE_SECONDS)
        self.wfile.write(self._packet(answer))
        if log.isEnabledFor(logging.DEBUG):
            log.debug(event("answered", method=self.command, path=self.path, status=answer.status))

    def _packet(self, answer: Answer) -> bytes:
        text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body) + "\n"
        body = b"" if answer.body is None else text.encode()
        lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
        if answer.status != 204:
            kind = prometheus_client.CONTENT_TYPE_LATEST if text is answer.body else "application/json"
            lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        self.close_connection = self.close_connection or self._is_unread or self.server.stopping
        if self.close_connection:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        return head + (b"" if self.command == "HEAD" else body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request (its first line, its headers), as JSON too."""
        self.close_connection = True
        with suppress(OSError):
            self._write(Answer(code, {"error": "bad_request", "message": message or http.HTTPStatus(code).phrase}))

    def log_message(self, format: str, *args: Any) -> None:
        """Silence the base class: what matters is logged as an event."""


#: POLLRDHUP tells of a client that has closed; where the system lacks it, only a broken connection is noticed.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class ConnectionLimit:
    """Counts the connections of all listeners, and bounds them and the webhooks that are read at a time."""

    def __init__(self, connections: int):
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_connections = max(1, min(connections, files - OTHER_FILES))
        self.webhooks = threading.BoundedSemaphore(WEBHOOKS)
        self._lock = threading.Lock()  # guards the next one
        self.connections = 0

    def enter(self) -> bool:
        """Count one more connection, unless there are too many; whether it may be served."""
        with self._lock:
            is_below = self.connections < self.max_connections
            self.connections += is_below
            return is_below

    def leave(self) -> None:
        with self._lock:
            self.connections -= 1


class Server(http.server.ThreadingHTTPServer):
    """A listener, with a thread for each of its connections; on it, a claim waits."""

    daemon_threads = True
    block_on_close = False  # parked claims have been answered by then; a slow reader must not hold up the stop

    def __init__(
        self,
        listener: socket.socket,
        api: Api,
        limit: ConnectionLimit,
        api_tokens: Collection[str] = (),
        tls: ssl.SSLContext | None = None,
    ):
        """`api_tokens` (empty: none is needed) and `tls` may be exchanged while it serves: each request looks at the
        first, each handshake at the second."""
        self.api, self.limit, self.api_tokens, self.tls = api, limit, api_tokens, tls
        #: Every answer ends its connection: the client's next one goes to our successor.
        self.stopping = False
        #: When (monotonic) the accept loop last came round.
        self.accepting_at = time.monotonic()
        #: Whose request is still to be answered; of a new connection it has come, or is about to.
        self.unanswered: set[Any] = set()
        # The accept loop's own.
        self._refused, self._refusals_told_at = 0, -math.inf
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()  # the base class's own, which was never bound
        self.socket = listener

    def service_actions(self) -> None:
        """The accept loop comes by twice a second, or after each connection."""
        self.accepting_at = time.monotonic()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; when there is no file descriptor left, not again at once: the connection stays in the backlog."""
        try:
            return super().get_request()
        except OSError as error:
            self._tell_refused(f"a connection cannot be accepted: {error}")
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread, if there is room; those that are served already keep theirs."""
        if not self.limit.enter():
            self._turn_away(request, f"there are {self.limit.max_connections} connections")
            return
        self.unanswered.add(client_address)
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # the system gives no more threads
            self._left(client_address)
            self._turn_away(request, str(error))

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left(client_address)

    def _left(self, client_address: Any) -> None:
        self.unanswered.discard(client_address)
        self.limit.leave()

    def wait_for_answers(self, ends_at: float) -> None:
        """Wait until every request has its answer, or `ends_at` (monotonic): the process takes its threads along."""
        while self.unanswered and time.monotonic() < ends_at:
            time.sleep(0.01)

    def _turn_away(self, request: socket.socket, reason: str) -> None:
        """Answer 503 without waiting for anything: this is the accept loop."""
        self._tell_refused(reason)
        request.setblocking(False)
        if not self.tls:
            with suppress(OSError):
                request.send(TURNED_AWAY)
        self.shutdown_request(request)

    def _tell_refused(self, reason: str) -> None:
        self._refused += 1
        if time.monotonic() - self._refusals_told_at >= REFUSALS_SECONDS:
            log.error(event("refused", reason=reason, connections=self._refused))
            self._refused, self._refusals_told_at = 0, time.monotonic()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no event; anything else is a fault of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception(event("failed", client=client_address, reason="a fault of ours; please report it"))


BUSY = json.dumps({"error": "too_many_connections", "message": "the scheduler has no room; try again in a moment"})
TURNED_AWAY = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BUSY)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n{BUSY}"
).encode()


def check_exposure(listeners: Iterable[socket.socket], settings: Settings) -> None:
    """What is reachable from beyond this machine needs a token; raises SettingsError."""
    for listener in filter(beyond_loopback, listeners):
        address = str(listener.getsockname()[0])
        if not settings.stack_api_token:
            raise SettingsError(needs_token(address))
        if not settings.tls_cert:
            log.warning(event("unencrypted", listen=address, reason="tokens cross the network readable; see TLS_CERT"))


def beyond_loopback(listener: socket.socket) -> bool:
    """Whether others than this machine can reach it: asked of the socket itself, which may have been inherited."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


# --- Metrics ---

#: Rule sets that are labels at one time; the jobs of all others are counted together.
RULE_SET_LABELS, OTHER_RULE_SETS = 100, "other"
#: Seconds: the bounds of the histograms, of a job's life and of the store.
STRETCH_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 24 * 3600)
STORE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
#: Reasons that are no word of Buildkite's, by how they begin; a label is never free text.
REASON_LABELS = {
    "reserved, but not": "not_ours",
    "scheduled, but not": "not_ours",
    "its reservation lapsed": "lapsed",
    "Buildkite refuses": "refused",
    "Buildkite does not know": "unknown_job",
    "in the unknown state": "unknown_state",
}


class Metrics:
    """What happened since the start. Levels are not kept here: they are read when somebody asks.

    Nothing in here is global, and nothing waits: a claim pays some microseconds for all of it.
    """

    def __init__(self) -> None:
        self._events = prometheus_client.CollectorRegistry()
        self._moves = prometheus_client.Counter(
            "stack_moves", "Jobs moved, by verb and reason.", ["queue", "verb", "reason"], registry=self._events
        )
        self._stretches = prometheus_client.Histogram(
            "stack_stretch_seconds",
            "How long each stretch of a job's life took.",
            ["queue", "stretch"],
            buckets=STRETCH_BUCKETS,
            registry=self._events,
        )
        self._calls = prometheus_client.Counter(
            "stack_buildkite_calls",
            "Calls to Buildkite, by endpoint and HTTP status; 0: no answer.",
            ["queue", "endpoint", "status"],
            registry=self._events,
        )
        self.store_seconds = prometheus_client.Histogram(
            "stack_store_seconds",
            "How long the store took, by verb.",
            ["verb"],
            buckets=STORE_BUCKETS,
            registry=self._events,
        )
        #: More that is read when somebody asks: called with the time.
        self.sources: list[Callable[[float], Iterable[Metric]]] = []
        self._lock = threading.Lock()  # guards _labels
        self._labels: set[str] = set()
        # The children of the label values that were used: looking them up in the client costs more than counting.
        self._child = functools.lru_cache(maxsize=4096)(lambda metric, *values: metric.labels(*values))

    # What the rest of the scheduler tells

    def called(self, queue_key: str, endpoint: str, status: int) -> None:
        """A call to Buildkite was answered, or (0) was not."""
        self._child(self._calls, queue_key, endpoint, str(status)).inc()

    def moved(self, verb: str, job: Job, now: float) -> None:
        """A verb of the store moved a job."""
        self._child(self._moves, job.queue_key, verb, reason_label(verb, job)).inc()
        if took := stretch(verb, job, now):
            self._child(self._stretches, job.queue_key, took[0]).observe(max(0.0, took[1]))

    def label(self, present: Collection[str]) -> Callable[[str], str]:
        """How to label a rule set. Who has a label keeps it, until all are given and it has no jobs any more."""
        with self._lock:
            new = sorted(set(present) - self._labels)
            if len(self._labels) + len(new) > RULE_SET_LABELS:
                self._labels.intersection_update(present)
            self._labels.update(new[: RULE_SET_LABELS - len(self._labels)])
            labels = frozenset(self._labels)
        return lambda rule_set: rule_set if rule_set in labels else OTHER_RULE_SETS

    def text(self, levels: Iterable[Metric], now: float) -> str:
        """All of it in the text format of Prometheus, the levels first."""
        more = [family for source in self.sources for family in source(now)]
        families = Families([*levels, *more, *self._events.collect()])
        return prometheus_client.generate_latest(families).decode()


class Families(prometheus_client.registry.Collector):
    """A collector of what there is, without when each counter was made: nobody asks for it, and it doubles the text."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def gauge(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """A level, with a value for each combination of labels."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family


def levels_of(fleet: Fleet, label: Callable[[Collection[str]], Callable[[str], str]], now: float) -> list[Metric]:
    """What there is at this moment, from the store and the workers' claims."""
    levels: list[Level] = fleet.stats["levels"]
    labelled = label({level.rule_set for level in levels})
    jobs: collections.Counter[tuple[str, ...]] = collections.Counter()
    oldest: dict[tuple[str, ...], float] = {}
    for level in levels:
        where = (RuleSet.read(level.rule_set).queue_key, labelled(level.rule_set))
        jobs[level.state, *where] += level.jobs
        if level.state in (JobState.RESERVING, JobState.READY):
            oldest[where] = max(oldest.get(where, 0.0), now - level.oldest)
    doing = collections.Counter(member.doing for member in fleet.members)
    doing[Doing.IDLE] += len(fleet.nameless)
    totals = CounterMetricFamily("stack_jobs_done", "Jobs that are done, ever.", labels=["queue", "outcome"])
    for queue_key, of_queue in sorted(fleet.stats["totals"].items()):
        for outcome, count in of_queue.items():
            totals.add_metric([queue_key, outcome], count)
    paused = [((queue_key,), 1.0) for queue_key in fleet.stats["paused"]]
    return [
        gauge("stack_store_up", "Whether the store could be read.", [], [((), 1.0)]),
        gauge("stack_jobs", "Jobs that are not done.", ["state", "queue", "rules"], sorted(jobs.items())),
        gauge("stack_oldest_wait_seconds", "Longest wait of a job.", ["queue", "rules"], sorted(oldest.items())),
        gauge("stack_workers", "Workers that claimed in the last day.", ["state"], [((d,), doing[d]) for d in Doing]),
        gauge("stack_queue_paused", "1 for each queue that is paused.", ["queue"], paused),
        totals,
    ]


def polls_of(ages: Mapping[str, float]) -> list[Metric]:
    text = "Time since the queue was last listed, or since the start."
    return [gauge("stack_poll_age_seconds", text, ["queue"], [((q,), age) for q, age in sorted(ages.items())])]


def notifications_of(counts: Mapping[str, Mapping[str, int]]) -> Metric:
    family = CounterMetricFamily("stack_notifications", "Texts for build pages.", labels=["queue", "outcome"])
    for queue_key, of_queue in sorted(counts.items()):
        for outcome, count in of_queue.items():
            family.add_metric([queue_key, outcome], count)
    return family


class Watched:
    """A store of which every verb is measured and told of; all else is the store's own."""

    def __init__(self, store: Store, metrics: Metrics, tell: Callable[[str, Job, float], None]):
        self._store = store
        for verb in (name for name in vars(Store) if not name.startswith("_") and name not in ("sequence", "close")):
            observe = metrics.store_seconds.labels(verb).observe
            setattr(self, verb, watched(verb, getattr(store, verb), observe, tell))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def watch(store: Store, metrics: Metrics, tell: Callable[[str, Job, float], None]) -> Store:
    """The store with every verb measured. `tell` hears of each job that one moved: the verb, the job, and when."""
    return cast(Store, Watched(store, metrics, tell))


def watched(
    verb: str, call: Callable[..., Any], observe: Callable[[float], None], tell: Callable[[str, Job, float], None]
) -> Callable[..., Any]:
    clock, is_moving = time.perf_counter, verb in MOVING

    def measured(*arguments: Any, **options: Any) -> Any:
        start = clock()
        try:
            answer = call(*arguments, **options)
        finally:
            observe(clock() - start)
        if is_moving and answer:
            for job in answer if isinstance(answer, list) else (answer,):
                try:
                    if move := moved(verb, job, arguments[-1]):
                        tell(move, job, arguments[-1])
                except Exception:  # what was done is done: whoever asked for it must hear so
                    log.exception(event("failed", job=job.uuid, reason="a fault of ours; please report it"))
        return answer

    return measured


#: The verbs that answer with the jobs they moved; the last argument of each is the time.
MOVING = frozenset({"put", "confirm", "learn", "finish", "claim", "release", "complete", "expire"})


def moved(verb: str, job: Job, now: float) -> str | None:
    """What the verb did to the job that it answered with, in a word; None: nothing, this was said before."""
    if verb == "claim":
        return verb if job.claimed_at == now else None
    if verb in ("release", "complete"):
        return verb if job.tries and job.tries[-1]["ended_at"] == now else None
    if verb == "learn":
        ends = {Outcome.RAN: "run", Outcome.DROPPED: "drop", Outcome.FAILED: "finish"}
        return ends[job.outcome] if job.outcome else "acquire" if job.state is JobState.RUNNING else "lapse"
    return verb


def reason_label(verb: str, job: Job) -> str:
    """One of few words for why a job moved; "" where the verb says it all."""
    if job.finish_detail and verb in ("confirm", "finish"):
        return "failed_too_often"
    if verb in ("put", "claim", "confirm"):
        return ""
    if verb in ("release", "complete", "expire"):
        last = job.tries[-1]
        if verb == "complete":
            # Its agent may have run the job: Buildkite has not said yet.
            return "rejected" if last["exit_status"] == EXIT_REJECTED else "exited"
        # An attempt counts against the job, what is excused does not.
        return "attempt" if last["counted"] else "excused"
    if job.reason in FINDINGS:
        return job.reason
    return next((label for start, label in REASON_LABELS.items() if job.reason.startswith(start)), "other")


def stretch(verb: str, job: Job, now: float) -> tuple[str, float] | None:
    """The stretch of the job's life that this move ended, and its seconds."""
    if verb == "confirm" and job.reserved_at == now:
        return "scheduled_to_reserved", now - job.scheduled_at
    if verb == "claim" and job.reserved_at:
        return "reserved_to_claimed", now - job.reserved_at
    if verb == "acquire" and job.claimed_at:
        return "claimed_to_running", now - job.claimed_at
    if verb == "run" and job.acquired_at:
        return "running_to_done", now - job.acquired_at
    return None


#: Buildkite's own metrics are asked for while somebody reads ours, no more often than this, and are then told
#: for as long as they are not older than that.
ASK_SECONDS, READ_SECONDS, OLD_SECONDS = 15.0, 300.0, 300.0
#: Its numbers of jobs and of agents, as its own exporter calls them.
#: Source: https://github.com/buildkite/buildkite-agent-metrics
CLUSTER_NUMBERS = (
    ("scheduled_jobs_count", "jobs", "scheduled"),
    ("running_jobs_count", "jobs", "running"),
    ("unfinished_jobs_count", "jobs", "total"),
    ("waiting_jobs_count", "jobs", "waiting"),
    ("idle_agent_count", "agents", "idle"),
    ("busy_agent_count", "agents", "busy"),
    ("total_agent_count", "agents", "total"),
)


class ClusterMetrics:
    """Buildkite's own numbers for the whole cluster, under the names that its exporter gives them."""

    def __init__(self, stack: Stack, now: Callable[[], float]):
        self._stack = stack
        self._read_at = self._answered_at = -math.inf
        self._answer: dict[str, Any] = {}
        self.duty = Duty("metrics", self.tick, now)

    @property
    def duties(self) -> list[Duty]:
        return [self.duty]

    @property
    def problems(self) -> list[str]:
        return problems_of(self.duties)

    def tick(self, now: float) -> float:
        if now - self._read_at > READ_SECONDS:
            return READ_SECONDS  # until somebody reads: that wakes it
        self._answer, seconds = self._stack.metrics()
        self._answered_at = now
        return min(max(ASK_SECONDS, seconds), MAX_ASKED_SECONDS)

    def read(self, now: float) -> Iterable[Metric]:
        """The families, as far as they are known; from now on they are kept up to date for some minutes."""
        was_read, self._read_at = now - self._read_at <= READ_SECONDS, now
        if not was_read:
            self.duty.wake()
        if now - self._answered_at <= OLD_SECONDS:
            cluster = str(an_object(self._answer, "cluster").get("name") or "")
            of_queues = queues_of(self._answer)
            for name, values in numbers(self._answer).items():
                yield gauge(f"buildkite_total_{name}", "Buildkite's own count.", ["cluster"], [((cluster,), values)])
                by_queue = [((queue_key, cluster), numbers(part)[name]) for queue_key, part in of_queues.items()]
                yield gauge(f"buildkite_queues_{name}", "Buildkite's own count.", ["queue", "cluster"], by_queue)


def queues_of(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of each queue, in the shape that the whole has."""
    maps = {kind: an_object(an_object(answer, kind), "queues") for kind in ("jobs", "agents")}
    keys = sorted({*maps["jobs"], *maps["agents"]})
    return {key: {kind: an_object(of_queues, key) for kind, of_queues in maps.items()} for key in keys}


def numbers(part: Mapping[str, Any]) -> dict[str, int]:
    """Buildkite's eight numbers; one that it left out is 0."""
    found = {}
    for name, kind, field in CLUSTER_NUMBERS:
        value = an_object(part, kind).get(field)
        found[name] = value if isinstance(value, int) else 0
    total = found["total_agent_count"]
    return found | {"busy_agent_percentage": 100 * found["busy_agent_count"] // total if total > 0 else 0}


# --- Main ---

USAGE = """usage: scheduler.py [--check | --help]

Reserves Buildkite jobs through the Stacks API and hands them to workers over HTTP.

  --check   try the settings and what they name (it registers each queue's stack), and exit: 0, or 78 with every problem
  --help    print this

Examples:
  BUILDKITE_AGENT_TOKEN=... ./scheduler.py
  SCHEDULER_QUEUES=default,linux STATE_DIRECTORY=/var/lib/stack ./scheduler.py
  curl 'http://127.0.0.1:18888/stats'"""

#: Exit statuses: what a supervisor may conclude. 78 is in EXIT_SETTINGS.
EXIT_USAGE, EXIT_BUSY, EXIT_IO = 64, 75, 74
#: How long the stop waits for calls to Buildkite that are under way; the next start repeats what took longer.
STOP_SECONDS = 5.0
#: How often systemd's status line is renewed, and how soon it hears that we are ready.
REPORT_SECONDS, READY_SECONDS = 5.0, 0.1


def main(arguments: Sequence[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(help_text(Settings, USAGE))
        return 0
    if arguments not in ([], ["--check"]):
        complain(f"scheduler.py: unknown arguments {' '.join(arguments)!r}\n{USAGE}")
        return EXIT_USAGE
    try:
        environ = environment()
        settings = read_settings(Settings, environ)
        if problems := settings.problems():
            raise SettingsError("\n".join(problems))
        start_log(settings.log_level)
        if arguments:
            return check(settings, environ)
        return Scheduler(settings, environ).run()
    except SettingsError as error:
        complain("\n".join(f"scheduler.py: {line}" for line in str(error).splitlines()))
        return EXIT_SETTINGS
    except StoreInUse as error:
        log.error(event("stopped", reason=str(error)))
        return EXIT_BUSY
    except (sqlite3.Error, StoreUnavailable) as error:
        where = settings.redis_addr or os.path.join(settings.state_directory, "jobs.sqlite3")
        advice = f"; {remedy(error)}" if isinstance(error, sqlite3.Error) else ""
        log.error(event("stopped", store=where, reason=f"the store cannot be opened: {error}{advice}"))
        return EXIT_IO
    except OSError as error:
        log.error(event("stopped", reason=f"{error}"))
        return EXIT_IO


class Scheduler:
    """Wires the parts together, and takes them down in order."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]):
        self._settings, self._environ = settings, environ
        raise_open_file_limit()
        # What wakes the main thread. An Event would not do: the system may hand a signal to any thread, and then
        # nothing interrupts a main thread that waits for a lock. Python writes the signal's number here from each.
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._ending = False
        self._exit_status = 0
        self._ready = False
        self._stacks = stacks_of(settings, environ)
        self._store = open_store(settings)
        shared = self._store if isinstance(self._store, RedisStore) else None
        self._clock = Clock(shared.wall_clock if shared else None)
        now = self._clock.now
        orphans = self._store.remember_stacks({stack.queue_key: stack.key for stack in self._stacks})
        for queue_key, left in orphans.items():
            reason = "not in SCHEDULER_QUEUES, so nobody asks what became of them; name it until they are done"
            log.error(event("orphaned", queue=queue_key, jobs=left, reason=reason))
        self._metrics = Metrics()
        for stack in self._stacks:
            stack.on_call = self._metrics.called
        cluster = ClusterMetrics(self._stacks[0], now)
        self._metrics.sources.append(cluster.read)
        watched = self._watch(self._store)
        self._dispatcher = Dispatcher(watched, now)
        if not shared:
            self._store.trust_no_clock(now(), confirm=True)
        self._lead = Lead(watched, shared)
        self._intakes = {
            stack.queue_key: Intake(stack, self._lead, self._dispatcher, settings, now, self._give_up)
            for stack in self._stacks
        }
        #: All that works for itself.
        self._parts: list[Part] = [
            *self._intakes.values(),
            Upkeep(self._lead, self._clock, self._intakes, self._dispatcher),
            cluster,
        ]
        self._peers: Peers | None = None
        if shared:
            with_token = functools.partial(self._store_of_term, shared)
            self._peers = Peers(shared, self._clock, self._dispatcher, self._lead, self._intakes, with_token)
            self._parts.append(self._peers)
        api = Api(watched, self._dispatcher, self._intakes, settings, now, self._metrics)
        api.parts = self._parts
        listeners = listening_sockets(settings.listen, environ)
        check_exposure(listeners, settings)
        if not settings.stack_api_token:
            log.warning(event("open", reason="STACK_API_TOKEN is empty, so everybody on this machine can take jobs"))
        limit, tokens, tls = ConnectionLimit(settings.max_connections), settings.stack_api_token, tls_context(settings)
        self._servers = [Server(listener, api, limit, tokens, tls) for listener in listeners]

    @property
    def _duties(self) -> list[Duty]:
        return [duty for part in self._parts for duty in part.duties]

    def _watch(self, store: Store) -> Store:
        return watch(store, self._metrics, self._moved)

    def _store_of_term(self, shared: RedisStore, token: str) -> Store:
        return self._watch(shared.with_token(token))

    def _moved(self, verb: str, job: Job, now: float) -> None:
        """What hears of every job that moved."""
        self._metrics.moved(verb, job, now)
        if self._settings.stack_notifications and (intake := self._intakes.get(job.queue_key)):
            intake.notifier.moved(verb, job, now)

    def _give_up(self, reason: str) -> None:
        """A restart cannot help: end with the status that says so."""
        log.error(event("stopped", reason=reason))
        self._exit_status = EXIT_SETTINGS
        self._ending = True
        self._waker.send(b"\0")

    def run(self) -> int:
        faulthandler.enable()  # a watchdog's SIGABRT then leaves every thread's stack in the journal
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: None)
        accepting = [
            threading.Thread(target=server.serve_forever, name="http", daemon=True) for server in self._servers
        ]
        for thread in accepting:
            thread.start()
        for duty in self._duties:
            duty.start()
        log.info(event("started", **self._described()))
        while not self._ending:
            self._report()
            # Until it is ready, somebody waits to hear so.
            self._wait(report_seconds(self._environ) if self._ready else READY_SECONDS)
        tell_systemd("STOPPING=1\nSTATUS=stopping")
        self._shut_down(accepting)
        return self._exit_status

    def _wait(self, seconds: float) -> None:
        """Wait, and do what signals ask for."""
        self._woken.settimeout(seconds)
        with suppress(TimeoutError):
            for number in self._woken.recv(64):
                if number == signal.SIGHUP:
                    self.reload()
                else:
                    self._ending = self._ending or number in (signal.SIGTERM, signal.SIGINT)

    def _report(self) -> None:
        """Tell systemd that all is well, if it is: the watchdog is fed by threads that get on with their work."""
        if not self._ready and self._is_ready():
            tell_systemd("READY=1")
            self._ready = True
        if stuck := self._stuck(time.monotonic()):
            log.error(event("stuck", threads=", ".join(stuck), reason="the watchdog is not fed any more"))
            tell_systemd(f"STATUS=stuck: {', '.join(stuck)}")
        elif "NOTIFY_SOCKET" in self._environ:
            # On one line, whatever Buildkite's words in it are: the next one would be an order to systemd of its own.
            status = " ".join(self._status(self._clock.now()).split())
            tell_systemd(f"WATCHDOG=1\nSTATUS={status}")

    def _is_ready(self) -> bool:
        """Whether we serve: each queue's first registration was answered or failed, or another scheduler sees to it."""
        if self._lead.store():
            return all(intake.was_registration_tried for intake in self._intakes.values())
        return self._peers is not None and self._peers.has_heard

    def _stuck(self, now: float) -> list[str]:
        """Threads without which nothing goes on, and that do not come round any more. `now` is monotonic."""
        deaf = ["http" for server in self._servers if now - server.accepting_at > STUCK_SECONDS]
        return deaf + [duty.name for duty in self._duties if duty.stuck(now)]

    def _status(self, now: float) -> str:
        """What an operator wants to read: "12 ready, 3 leased, 8 running; last poll 0.4 s ago"."""
        try:
            states = self._store.stats()["states"]
        except StoreUnavailable as error:
            return str(error)
        unconfirmed = [f"{states['reserving']} reserving"] if states["reserving"] else []
        counts = ", ".join([f"{states[state]} {state}" for state in ("ready", "leased", "running")] + unconfirmed)
        polled_at = min(intake.last_list_at for intake in self._intakes.values())
        problems = [problem for part in self._parts for problem in part.problems]
        role = [self._peers.role] if self._peers else []
        poll = f"last poll {max(0.0, now - polled_at):.1f} s ago" if polled_at else "not polled yet"
        return "; ".join([counts, poll, *role, *problems[:1]])

    def reload(self) -> None:
        """SIGHUP: take over new tokens and TLS files. What cannot be used changes nothing."""
        reload(self._settings, self._environ, self._use)

    def _use(self, settings: Settings) -> None:
        """Raises SettingsError, ahead of any change, when they cannot be used."""
        if self._settings.stack_api_token and not settings.stack_api_token:
            raise SettingsError("STACK_API_TOKEN: is empty now, which would let everybody in; for that, restart")
        check_exposure([server.socket for server in self._servers], settings)
        tls = tls_context(settings)
        if settings.redis_addr != self._settings.redis_addr:
            log.warning(event("outdated", setting="REDIS_ADDR", reason="it has changed, which takes a restart"))
            settings = dataclasses.replace(settings, redis_addr=self._settings.redis_addr)
        self._settings = settings
        for server in self._servers:
            server.api.use(settings)
            server.api_tokens, server.tls = settings.stack_api_token, tls

    def _described(self) -> dict[str, object]:
        """All settings but the secrets, with the address that is really bound."""
        settings = {
            f.name: getattr(self._settings, f.name) for f in dataclasses.fields(Settings) if not f.metadata["secret"]
        }
        bound = (server.server_address[:2] for server in self._servers)
        return settings | {
            "store": self._settings.redis_addr or "sqlite",
            "listen": ",".join(f"{host!s}:{port}" for host, port in bound),
            "inherited": is_inherited(self._environ) or None,
            "max_connections": self._servers[0].limit.max_connections,
            "scheduler_queues": ",".join(self._settings.scheduler_queues),
        }

    def _shut_down(self, accepting: Sequence[threading.Thread]) -> None:
        log.info(event("stopping"))
        # 1. No new claims; those that wait are answered. A socket that systemd keeps open holds new connections for
        #    our successor; on our own they are served as long as can be.
        for server in self._servers:
            server.stopping = True
            if is_inherited(self._environ):
                server.shutdown()
        self._dispatcher.stop()
        # 2. No new calls to Buildkite; what is under way is settled, or stays written down as `reserving`.
        self._stop_duties()
        # 3. Stacks that hold nothing any more are taken down; others keep their reservations for the next start.
        if self._lead.store():
            self._take_down_stacks()
        if self._peers:
            self._peers.leave()
        # 4. No new requests; touches and completes were served until here.
        for server, thread in zip(self._servers, accepting, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        ends_at = time.monotonic() + STOP_SECONDS
        for server in self._servers:
            server.wait_for_answers(ends_at)
        # 5. The store last: everything above may write to it.
        self._store.close()
        log.info(event("stopped"))

    def _stop_duties(self) -> None:
        if self._peers:
            self._peers.stop()
        duties = self._duties
        for duty in duties:
            duty.stop()
        ends_at = time.monotonic() + STOP_SECONDS
        for duty in duties:
            if not duty.join(max(0.0, ends_at - time.monotonic())):
                log.warning(event("abandoned", duty=duty.name, reason="its call did not end; a restart repeats it"))

    def _take_down_stacks(self) -> None:
        if self._peers and not self._peers.is_alone:
            return  # who leads next needs them
        registered = [stack for stack in self._stacks if self._intakes[stack.queue_key].registered]
        left = [threading.Thread(target=self._deregister, args=[stack], daemon=True) for stack in registered]
        for thread in left:
            thread.start()
        ends_at = time.monotonic() + STOP_SECONDS
        for thread in left:
            thread.join(max(0.0, ends_at - time.monotonic()))

    def _deregister(self, stack: Stack) -> None:
        try:
            if not self._store.unfinished(stack.queue_key):
                stack.deregister()
                log.info(event("deregistered", queue=stack.queue_key, stack=stack.key))
        except (BuildkiteError, StoreUnavailable) as error:
            log.warning(event("failed", queue=stack.queue_key, call="deregister", reason=str(error)))


def report_seconds(environ: Mapping[str, str]) -> float:
    """How often systemd hears of us: thrice in the watchdog's time, if it watches this process."""
    watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0
    return min(REPORT_SECONDS, seconds / 3) if seconds else REPORT_SECONDS


def open_store(settings: Settings) -> SqliteStore | RedisStore:
    """The store that the settings name. Redis is asked for its time, so it is there."""
    if not settings.redis_addr:
        return SqliteStore(settings.state_directory, settings)
    store = RedisStore(settings, f"{first_label_of_host()}-{os.getpid()}-{secrets.token_hex(3)}")
    for problem in store.problems():
        log.error(event("unsafe", store=settings.redis_addr, reason=problem))
    for problem in store.warnings():
        log.warning(event("unsafe", store=settings.redis_addr, reason=problem))
    return store


def raise_open_file_limit() -> None:
    """Each parked worker is an open file; the usual soft limit of 1,024 would be all of the fleet."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stacks_of(settings: Settings, environ: Mapping[str, str]) -> list[Stack]:
    """A stack for each queue."""
    endpoint, token = settings.buildkite_agent_endpoint, token_source(settings, environ)
    return [Stack(endpoint, token, settings.stack_key_of(key), key) for key in settings.scheduler_queues]


def token_source(settings: Settings, environ: Mapping[str, str]) -> Callable[[], str]:
    """The agent token as it is now: where it comes from a file, the file is read each time, so it can be replaced."""

    def current() -> str:
        with suppress(OSError):
            return read_variable("BUILDKITE_AGENT_TOKEN", True, environ) or settings.buildkite_agent_token
        return settings.buildkite_agent_token

    return current


def check(settings: Settings, environ: Mapping[str, str]) -> int:
    """Try what the settings name: the store, the address, and the token for each queue."""
    problems: list[str] = []
    if settings.redis_addr:
        problems += check_redis(settings)
    else:
        problems += check_state_directory(settings)
    try:
        socket.getaddrinfo(settings.listen[0] or None, settings.listen[1], flags=socket.AI_PASSIVE)
    except OSError as error:
        problems.append(f"LISTEN: {settings.listen[0]} is no address of this host: {error}")
    for stack in stacks_of(settings, environ):
        try:
            stack.register()
            stack.list_jobs(None, time.time())
        except BuildkiteError as error:
            problems.append(f"queue {stack.queue_key}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    sys.stdout.write(f"the settings are good: Buildkite answers for {', '.join(settings.scheduler_queues)}\n")
    return 0


def check_redis(settings: Settings) -> list[str]:
    try:
        store = RedisStore(settings, "check")
        for warning in store.warnings():
            log.warning(event("unsafe", store=store.address, reason=warning))
        return [f"REDIS_ADDR: {store.address}: {problem}" for problem in store.problems()]
    except (StoreUnavailable, SettingsError) as error:
        return [f"{error}" if isinstance(error, SettingsError) else f"REDIS_ADDR: {error}"]


def check_state_directory(settings: Settings) -> list[str]:
    try:
        os.makedirs(settings.state_directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.state_directory):
            pass
    except OSError as error:
        return [f"STATE_DIRECTORY: {settings.state_directory} cannot be written: {error}"]
    return []


def start_log(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # What no line of ours tells need not be found out for each: a third of the price of a line, which every claim pays.
    # Source: https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for noisy in ("urllib3", "requests"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
