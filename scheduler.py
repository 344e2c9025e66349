#!/usr/bin/env python3
"""The scheduler of a Buildkite custom stack: it reserves jobs and hands each to a worker whose tags match.

A job's life, Buildkite's words above and ours below (`JobState`):

    at Buildkite:  scheduled ─────reserve─────▶ reserved ──acquire (by the agent)──▶ running ─▶ finished
    in the store:         reserving ────▶ ready ──claim──▶ leased ────────▶ running ────────────▶ done
                              ▲                              │
                              └── release, expire, complete ─┘   (without proof that an agent had it)

Threads, and what each owns:

    main            settings, start, signals, stop
    <queue> list    L  lists scheduled jobs at Buildkite and puts them into the store as `reserving`
    <queue> reserve L  batch-reserves `reserving` jobs, renews reservations, and offers jobs that became `ready`
    <queue> states  L  asks Buildkite for the state of every job that is not `done`
    <queue> finish  L  finishes, at Buildkite, jobs that no agent could acquire
    <queue> policy  L  with POLICY_FILE: asks the policy about jobs; a thread pool fetches their specs
    <queue> tokens  gets the job acquisition tokens that claims wait for
    <queue> notify  writes on the build page where each job stands
    <queue> proofs  for the monitor's queue, in place of tokens and notify: asks whether claimed jobs are still free
    freezes         L  holds jobs when a freeze window begins, and releases them when it ends
    policy          L  with POLICY_FILE: loads the file in its own process
    policy again    L  with POLICY_FILE: retries jobs for which the policy failed, in a second process
    upkeep          watches the wall clock; L: expires leases, prunes
    periodic        L  with [[periodic]] in STACK_FILE: starts builds that are due
    cancel          L  asks Buildkite to cancel running jobs that an operator stopped
    metrics         reads Buildkite's own metrics, while somebody reads ours
    peers           with Redis: takes and renews the leader's turn, or follows the scheduler that has it
    news            with Redis: receives other schedulers' reports and the jobs that became ready
    offers          with Redis: offers these jobs to the workers that wait here
    http            accepts connections; each has its own thread, on which its claim waits

Each of a queue's seven threads calls one endpoint of Buildkite, so an endpoint that hangs delays no other. They call
it through a `Source`: a `Stack` of the Stacks API for each of SCHEDULER_QUEUES, or the `Monitor`. All threads share
the store, whose verbs are atomic, and the dispatcher, which knows the waiting workers. Among the schedulers on one
Redis, one leads at a time. Tasks marked L do nothing while another scheduler leads: each asks `Leadership`.

The sections, in order: Settings and logs, Vocabulary, Moves, Scheduler settings, Policy files, Commands,
Stack file and freezes, Buildkite client, Monitor, Store, SQLite store, Redis store, Dispatch, Intake, Policy,
Periodic builds, HTTP API, Page, Metrics, Main.

A command (`scheduler.py status`; `COMMANDS` lists all) calls a running scheduler; its process never reads the sections
below "Commands".

Glossary:

    list, reserve   Buildkite's calls: which jobs are scheduled; reserve some of them for our stack for some minutes
    reservation     Buildkite's promise to give a job to nobody but our stack, until its deadline
    acquire, finish an agent takes a job at Buildkite; we end a job at Buildkite that no agent took
    put, confirm    write a listed job into the store; make it `ready` once Buildkite has reserved it
    claim, lease    a worker gets a job; for how long, unless the worker touches (renews) it
    release, expire the worker, or time, ends a claim: the job goes back to `reserving`
    complete        the worker reports that its agent has exited
    attempt         a claim that counts as failed; after MAX_ATTEMPTS of them we finish the job
    park            a claim waits here until a job is offered to it
    held            a job, worker, host or queue with a hold: a row that says "not now", with owner, reason and end
    rule set        the agent query rules of a job; jobs with equal rules wait in one line
    profile         the queues and tags of a worker
    session         one process of a worker; a restarted worker has the same name and a new session
    task            work repeated on its own thread (`PeriodicTask`)
    leader, term    the one scheduler whose tasks marked L work; the time during which it leads

Start at `LIFE`, the table of a job's life; each verb of `Store` makes the move of the same name. Then follow a job:

    list     `Intake.list_jobs` → `Store.put`
    reserve  `Intake.reserve_jobs` → `Store.confirm` → `Dispatcher.offer`, which wakes a parked claim
    http     `Api.claim` → `Dispatcher.claim` → `Store.claim` → `take` of the rows; then `Api.touch`, `Api.complete`
    states   `Intake.check_states` → `Store.learn`
    upkeep   `Upkeep.tick` → `Store.expire`, for each lease that has ended

`Scheduler._on_move` passes each move to its listeners. `Fleet.why_of` says why a job waits (`WaitReason`).
To add a setting, write a field of `Settings`; a route, a line of `routes` of its `Part` (often `Api`); a feature, a
`Part`: a class with its own threads, routes, metrics and problems, named in `Scheduler._other_parts`.
"""

from __future__ import annotations

import sys

# Python 3.9 and older cannot parse this file: their SyntaxError shows the next line.
match "scheduler.py needs Python 3.11 or newer":
    case needs if sys.version_info < (3, 11):  # noqa: UP036
        sys.stderr.write(f"{needs}; this is {sys.version.split()[0]}, {sys.executable}\n")
        sys.exit(78)  # EX_CONFIG, as below

import base64
import collections
import copy
import dataclasses
import datetime
import difflib
import email.message
import faulthandler
import fcntl
import fnmatch
import functools
import gzip
import hashlib
import heapq
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import tempfile
import textwrap
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from enum import StrEnum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

#: Commands (`scheduler.py status`) call a running scheduler. They need only Python, and exit below "Commands".
IS_COMMAND = __name__ == "__main__" and len(sys.argv) > 1 and not sys.argv[1].startswith("-")
if not IS_COMMAND:
    import concurrent.futures
    import http.server
    import sqlite3
    import subprocess
    import tomllib
    import zoneinfo

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

#: The version of both scripts, which are released together. CHANGELOG.md lists the changes.
VERSION = "1.0.0"

#: sysexits.h EX_CONFIG: the settings are wrong, and a restart cannot help.
EXIT_SETTINGS = 78


class SettingsError(Exception):
    """The settings are wrong: their problems, one per line."""


def setting(default: Any, parse: Callable[[str], Any], text: str, *, secret: bool = False, unless: str = "") -> Any:
    """Declare one field of a Settings class. `default` is text as a user writes it; None means required.

    `unless`: if the variable of this name is set, the setting may be absent, and `parse` gets "".
    """
    about = {"default": default, "parse": parse, "text": text, "secret": secret, "unless": unless}
    return dataclasses.field(metadata=about)


def duration(text: str) -> float:
    """Seconds, from "500ms", "2s", "5m" or "1h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration; write it like 500ms, 2s, 5m or 1h")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2]]


def in_range(parse: Callable[[str], Any], low: str, high: str) -> Callable[[str], Any]:
    """Return a parser: `parse`, limited to values from `low` to `high` (texts as a user writes them)."""

    def checked(text: str) -> Any:
        if not parse(low) <= parse(text) <= parse(high):
            raise ValueError(f"{text!r} is out of range; it may be {low} to {high}")
        return parse(text)

    return checked


#: Patterns of an address. They accept nothing that a library would refuse: its error would quote the password.
IPV6 = r"[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}(?:%[A-Za-z0-9_.-]{1,15})?"
HOST = rf"(?:\[{IPV6}\]|[A-Za-z0-9_-]{{1,63}}(?:\.[A-Za-z0-9_-]{{1,63}})*\.?)"
PORT = "(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
#: Host, port and path. The path holds no @: otherwise the end of a password with a slash would look like a path.
PLACE = rf"{HOST}(?::{PORT})?(?:/[!\"$->A-Z^-~]*)?"
#: Characters of the user and password in a URL. Source: RFC 3986, 3.2.1
LOGIN = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*"
PROXY = rf"(?:(?:https?|socks4a?|socks5h?)://)?(?:{LOGIN}@)?{PLACE}"


def http_url(text: str) -> str:
    """A base URL without a slash at its end. The error does not quote the text, because it may contain a secret."""
    if not is_match(f"https?://{PLACE}", text):
        raise ValueError("is not an http(s) URL with only host, port and path, like http://localhost:18888/path")
    scheme, separator, place = text.partition("://")
    return scheme.lower() + separator + place.rstrip("/")


def wrong_proxies(environ: Mapping[str, str]) -> list[str]:
    """Problems of the proxy variables. They may contain a login, so they are not quoted."""
    problems = []
    for name, text in environ.items():
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and text and not is_match(PROXY, text):
            form = "write it like http://user:password@proxy:3128, with %2F for a / in the password, and so on"
            problems.append(f"{name}: is not a proxy address; {form}")
        if name.lower() == "no_proxy" and re.search("[@?#]|//", text):
            problems.append(f"{name}: is not a list of hosts; write it like localhost,.example.com,10.0.0.0/8")
    return problems


def is_match(pattern: str, text: str) -> bool:
    """Whether the whole text matches (upper or lower case) and each address in brackets is valid IPv6."""
    try:
        for address in re.findall(r"\[([^]%]*)", text):
            socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):
        return False
    return bool(re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII))


def without_login(text: str) -> str:
    """Remove user and password from a URL, or from a library's error text that may quote a URL."""
    return re.sub(r"(?<![^\s/?#])[^\s/?#]+@", "", text)


def read_text_file(path: str) -> str:
    """The content of the file; raises SettingsError with its path when it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None


def read_variable(name: str, secret: bool, environ: Mapping[str, str]) -> str:
    """The variable's text, "" when unset. A secret comes from <NAME>_FILE or a systemd credential, if one has text."""
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    path = environ.get(f"{name}_FILE") or (credential if os.path.exists(credential) else "")
    return (read_text_file(path).strip() if secret and path else "") or environ.get(name, "").strip()


def read_settings(cls: type[S], environ: Mapping[str, str]) -> S:
    """Build `cls` from its variables; raises SettingsError with every problem at once."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, meta = field.name.upper(), field.metadata
        try:
            text = read_variable(name, meta["secret"], environ) or meta["default"]
            text = "" if text is None and environ.get(meta["unless"]) else text
            if text is None:
                raise ValueError(f"is required: {meta['text']}")
            values[field.name] = meta["parse"](text)
        except (ValueError, SettingsError) as error:
            problems.append(f"{name}: {error}")
    problems += wrong_proxies(environ)
    if problems:
        raise SettingsError("\n".join(problems + unknown_settings(cls, environ)))
    return cls(**values)


def unknown_settings(cls: type[Any], environ: Mapping[str, str]) -> list[str]:
    """Messages about variables that look like settings of `cls` but are none, each with the nearest setting."""
    fields = dataclasses.fields(cls)
    known = {f.name.upper() for f in fields} | {f"{f.name.upper()}_FILE" for f in fields if f.metadata["secret"]}
    problems = []
    for name in sorted(environ.keys() - known):
        differences = ((*difference(name.upper(), each), each) for each in sorted(known))
        more, less, nearest = min(differences, key=lambda found: len(found[0] + found[1]))
        is_misspelt = len(more + less) <= 2 or sorted(more) == sorted(less)
        # POLL_INTERVAL for WORKER_POLL_INTERVAL. If both are set, the short one belongs to another program.
        is_short = not more and "_" in name and 2 * len(name) > len(nearest) and nearest not in environ
        is_long = "_" in nearest and name.startswith(nearest)  # REDIS_ADDRESS
        if is_misspelt or is_short or is_long or name.startswith(cls.PREFIXES):
            problems.append(f"{name}: is not a setting of {log.name}.py and is ignored; the nearest is {nearest}")
    return problems


def difference(one: str, other: str) -> tuple[str, str]:
    """The parts in which two words differ, after removing their common start and end."""
    for _ in ("start", "end"):
        shared = len(os.path.commonprefix([one, other]))
        one, other = one[shared:][::-1], other[shared:][::-1]
    return one, other


#: The lines of a .env file that we read exactly as python-dotenv does: empty, a comment, or NAME=value.
PLAIN_LINE = re.compile(r"""\s*(?:#.*)?|\s*(\w+)=(?:'([^'\\$]*)'\s*|"([^"\\$]*)"\s*|([^'"#$]*))""")


def read_file(path: str) -> dict[str, str]:
    """The variables of a file like .env; empty when there is no file. Raises SettingsError."""
    if not os.path.lexists(path):
        return {}
    text = read_text_file(path)
    try:
        from dotenv import dotenv_values  # noqa: PLC0415  worker.py must run without it
    except ImportError:
        lines = [PLAIN_LINE.fullmatch(line) for line in text.split("\n")]
        if None in lines:
            number = lines.index(None) + 1
            raise SettingsError(f"{path}: line {number} needs python-dotenv: install it, or write NAME=value") from None
        return {line[1]: line[2] or line[3] or (line[4] or "").strip() for line in lines if line and line[1]}
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text)).items()}


def environment() -> dict[str, str]:
    """The .env file of the working directory, overridden by the process environment. Raises SettingsError."""
    return {**read_file(".env"), **os.environ}


def help_text(cls: type, usage: str) -> str:
    """`usage`, then every setting of `cls` with its meaning and default."""
    rows = [(f.name.upper(), f.metadata["default"], f.metadata["text"]) for f in dataclasses.fields(cls)]
    width = max(len(name) for name, _, _ in rows)
    shown = {None: "required", "": "empty"}
    lines = [f"  {name:{width}}  {text} ({shown.get(default, default)})" for name, default, text in rows]
    return usage + "\n\nSettings (environment or .env; default in brackets):\n" + "\n".join(lines) + "\n"


def readable_secrets(cls: type, environ: Mapping[str, str]) -> list[str]:
    """Warnings about secret files of `cls` that every user of this host can read."""
    names = [field.name.upper() for field in dataclasses.fields(cls) if field.metadata["secret"]]
    files = {name: environ.get(name) for name in [*(f"{each}_FILE" for each in names), "TLS_KEY", "WORKER_TLS_KEY"]}
    if any(environ.get(name) and name not in os.environ for name in names):
        files[".env"] = ".env"
    found = ((name, path) for name, path in files.items() if path and is_readable_by_all(path))
    return [f"{name}: every user of this host can read the secret in {path}; chmod 600 it" for name, path in found]


def is_readable_by_all(path: str) -> bool:
    """Whether every user of this host can read the file and enter the directories above it."""
    path = os.path.realpath(path)
    above = [path[:end] or "/" for end, letter in enumerate(path) if letter == "/"]
    try:
        can_enter = all(os.stat(each).st_mode & stat.S_IXOTH for each in above)
        return can_enter and bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False  # the code that reads the file reports the error


#: Whether stderr goes to journald. The variable alone does not prove it: child processes inherit it. systemd.exec(5)
IN_JOURNAL = os.path.exists(2) and os.environ.get("JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.stat(2))


class LogFormatter(logging.Formatter):
    """One event a line. Under journald: a priority prefix and no time; elsewhere: time and level."""

    def format(self, record: logging.LogRecord) -> str:
        text = visible(record.getMessage())
        if record.exc_info:
            text += " traceback=" + json.dumps(without_login(self.formatException(record.exc_info)))
        if IN_JOURNAL:
            priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            return f"<{priority}>{text}"
        return f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {text}"


def event(word: str, **fields: object) -> str:
    """A log line: the event's name, then key=value. A value that is not one plain word is written as JSON."""
    texts = ((key, str(value)[:VALUE_CHARACTERS]) for key, value in fields.items() if value is not None)
    return " ".join([word] + [f"{k}={v if PLAIN.fullmatch(v) else json.dumps(v)}" for k, v in texts])


#: Values that need no quotes (ASCII only: other characters may be invisible or reverse the line); the longest value.
PLAIN, VALUE_CHARACTERS = re.compile("[!#-<>-~]+"), 4000


def visible(text: str) -> str:
    """Escape unprintable characters except tabs (like \\x1b or \\u202e), for a terminal or a build page."""
    shown = (c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return text if text.isprintable() else "".join(shown)


def complain(text: str) -> None:
    """Write an error to stderr before logging is set up; under journald with the priority of an error."""
    mark = "<3>" if IN_JOURNAL else ""
    sys.stderr.write("".join(f"{mark}{visible(line)}\n" for line in text.splitlines()))


def tell_systemd(text: str) -> None:
    """Send systemd a state like "READY=1" or "STATUS=3 ready". Without systemd this does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.settimeout(1)
            systemd.sendto(text.encode(errors="replace"), re.sub("^@", "\0", address))
    except OSError:
        pass  # we go on when systemd does not receive it


def reload(settings: S, environ: Mapping[str, str], accept: Callable[[S], None]) -> None:
    """Handle SIGHUP: read the secrets and LOG_LEVEL again, and call `accept` with the new settings.

    If they are wrong, or `accept` raises SettingsError, the old settings stay.
    """
    tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    copied = environ.get("CREDENTIALS_DIRECTORY")
    try:
        # systemd copied the credentials when it started us. If their source changed, only a restart shows it.
        needs_restart = ",".join(os.listdir(copied)) if copied else None
        fresh = read_again(settings, environ)
        accept(fresh)
    except (SettingsError, OSError) as error:
        log.error(event("unreloaded", problem=error, now="the old settings stay"))
    else:
        level: str = fresh.log_level  # type: ignore[attr-defined]
        log.setLevel(level.upper())
        log.info(event("reloaded", log_level=level, needs_restart=needs_restart))
    tell_systemd("READY=1")


def read_again(settings: S, environ: Mapping[str, str]) -> S:
    """Read the secrets again, and LOG_LEVEL from SETTINGS_FILE (the environment of a process cannot change)."""
    level = read_file(settings.settings_file).get("LOG_LEVEL")  # type: ignore[attr-defined]
    fresh = read_settings(type(settings), {**environ, "LOG_LEVEL": level} if level else environ)
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    names = [field.name for field in fields if field.metadata["secret"] or field.name == "log_level"]
    return dataclasses.replace(settings, **{name: getattr(fresh, name) for name in names})  # type: ignore[type-var]


# (End of the text that both files share.)


# --- Vocabulary ---


class JobState(StrEnum):
    """The state of a job in our store; the API, the metrics and the log use these words."""

    RESERVING = "reserving"  # Buildkite must confirm that it is reserved for us and free; never handed out
    READY = "ready"  # reserved for us, waits for a worker
    LEASED = "leased"  # a worker has claimed it; we do not know that an agent has acquired it
    RUNNING = "running"  # an agent has it at Buildkite: not handed out, unless Buildkite lists it as scheduled again
    DONE = "done"  # over for us, with an Outcome


class Outcome(StrEnum):
    """How a job became `done`. It does not tell whether the job passed: only Buildkite knows that."""

    RAN = "ran"
    DROPPED = "dropped"
    FAILED = "failed"  # we finished it at Buildkite, with a reason
    STOPPED = "stopped"  # we finished it at Buildkite, because an operator stopped it
    REFUSED = "refused"  # we finished it at Buildkite, because the policy refused it
    SUCCEEDED = "succeeded"  # we finished it at Buildkite with exit status 0, because the policy said so


class Finding(StrEnum):
    """What Buildkite's answer proves about a job."""

    ACQUIRED = "acquired"  # an agent has it
    OVER = "over"
    GONE = "gone"  # not ours, or must not run now; a later list may bring it back
    LAPSED = "lapsed"  # scheduled: our reservation has ended


class JobFinding(NamedTuple):
    """A finding, Buildkite's state word or another reason, and a code for it ("": the reason is a key of FINDINGS)."""

    finding: Finding
    reason: str
    code: str = ""


#: Buildkite's job states and what they prove. `scheduled` and `reserved` prove nothing. A state that is not listed
#: counts as ACQUIRED, because we must not start such a job again.
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

#: End states of jobs that an agent ran.
RAN_WORDS = frozenset({"finished", "passed", "failed", "timed_out"})


# Limits for what clients send and what we store of it. More limits: "HTTP API" (requests), "Moves" (sessions).
#: Tags per worker, and characters per tag. Buildkite documents no limit; many tags would cost memory.
MAX_TAGS, TAG_LETTERS = 128, 512
#: Characters of a worker's name, and of its session.
NAME_LETTERS = 200
#: Stored workers. Beyond this, the workers silent for longest are forgotten. Each takes some KB.
MAX_WORKERS = 20_000
#: Sizes of the caches of parsed worker queries and rule sets. Parsing one again takes some microseconds.
KEPT_QUERIES, KEPT_RULE_SETS = 1024, 16384


@dataclasses.dataclass(frozen=True, slots=True)
class RuleSet:
    """What a job requires of a worker: its queue, exact tags, and keys with any value."""

    queue_key: str
    tags: frozenset[str]
    keys: frozenset[str]
    #: Rules that we do not understand. A job with such a rule goes to no worker.
    unread: frozenset[str] = frozenset()
    #: An operator allowed these jobs: holds set by people do not hold them. They wait in their own line.
    allowed: bool = False
    #: Rules of a policy, "key=value" or "key=*": `added` ones a worker must match too; workers that match an `avoided`
    #: one do not get these jobs for a time. Only these rules may also use `host=` and `worker=`.
    added: frozenset[str] = frozenset()
    avoided: frozenset[str] = frozenset()

    @classmethod
    def of(cls, queue_key: str, agent_query_rules: Iterable[str]) -> RuleSet:
        """Parse a job's agent query rules. It ignores `queue`: Buildkite has already listed the job by its queue."""
        tags, keys, unread = set(), set(), set()
        for rule in agent_query_rules:
            key, equals, value = (part.strip() for part in rule.partition("="))
            if key == "queue" or (key == "*" and not equals):
                continue
            if key in ("*", ""):
                unread.add(f"{key}={value}")
            elif value in ("", "*"):
                keys.add(key)
            else:
                tags.add(f"{key}={value}")
        return cls(queue_key, frozenset(tags), frozenset(keys), frozenset(unread))

    @classmethod
    @functools.lru_cache(maxsize=KEPT_RULE_SETS)
    def read(cls, text: str) -> RuleSet:
        """Parse the text that `str` makes of a rule set."""
        written = WRITTEN_RULE.findall(text.removeprefix(ALLOWED))
        queue, *rules = (re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in written)
        by_sign = {
            sign: [rule for rule, part in zip(rules, written[1:], strict=True) if part[0] == sign]
            for sign in (ADDED, AVOIDED)
        }
        own = [rule for rule, part in zip(rules, written[1:], strict=True) if part[0] not in by_sign]
        return dataclasses.replace(
            cls.of(queue.partition("=")[2], own),
            allowed=text.startswith(ALLOWED),
            added=frozenset(rule[1:] for rule in by_sign[ADDED]),
            avoided=frozenset(rule[1:] for rule in by_sign[AVOIDED]),
        )

    @property
    def needs(self) -> frozenset[str]:
        """The tags and keys that a worker must have; if there are none, the queue."""
        return self.tags | self.keys or frozenset({f"queue={self.queue_key}"})

    def __str__(self) -> str:
        """A canonical text, independent of the rules' order: "queue=default,arch=amd64,gpu=*"."""
        rules = sorted([*self.tags, *(f"{key}=*" for key in self.keys), *self.unread])
        # This text is an index key. Escape each rule, so that it cannot look like two rules or like a policy's rule.
        texts = [escaped(rule) for rule in (f"queue={self.queue_key}", *rules)]
        texts = [f"\\{text}" if text[:1] in (ADDED, AVOIDED) else text for text in texts]
        for sign, more in ((ADDED, self.added), (AVOIDED, self.avoided)):
            texts += [sign + escaped(rule) for rule in sorted(more)]
        return ALLOWED * self.allowed + ",".join(texts)

    @property
    def is_by_policy(self) -> bool:
        """Whether a policy's rules matter, so that workers with equal profiles may be treated differently."""
        return bool(self.added or self.avoided)

    def suits(self, worker: Worker) -> bool:
        """Whether the policy's rules let this worker have these jobs (its profile is matched elsewhere)."""
        return all(worker.meets(rule) for rule in self.added) and not any(worker.meets(rule) for rule in self.avoided)


def escaped(rule: str) -> str:
    return rule.replace("\\", "\\\\").replace(",", "\\,")


#: The text of an allowed rule set begins with this; other texts begin with "queue=".
ALLOWED = "allow:"
#: In that text, a policy's `added` and `avoided` rules begin with these signs.
ADDED, AVOIDED = "+", "-"
WRITTEN_RULE = re.compile(r"(?:\\.|[^,\\])+", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """The queues and tags of a worker. Workers with equal ones share a profile."""

    queue_keys: frozenset[str]
    tags: frozenset[str]
    keys: frozenset[str]

    @classmethod
    @functools.lru_cache(maxsize=KEPT_QUERIES)
    def of(cls, query: str) -> Profile:
        """Parse "queue=default,arch=amd64,linux". ValueError: empty, two queues, too many tags, or a tag too long."""
        pairs = [tuple(part.strip() for part in tag.partition("=")[::2]) for tag in query.split(",") if tag.strip()]
        queues = {value for key, value in pairs if key == "queue"}
        tags = frozenset(f"{key}={value}" for key, value in pairs if key != "queue")
        if not pairs:
            raise ValueError("the query is empty; write it like queue=default,arch=amd64")
        if len(tags) > MAX_TAGS:
            raise ValueError(f"the query has {len(tags)} tags; a worker may have {MAX_TAGS}")
        if long := [tag for tag in map("=".join, pairs) if len(tag.removesuffix("=")) > TAG_LETTERS]:
            raise ValueError(f"tag {long[0][:40]!r}... has {len(long[0])} letters; it may have {TAG_LETTERS}")
        if queues & {"", "*"}:
            raise ValueError("the query has a queue without a name; write it like queue=default")
        if len(queues) > 1:
            raise ValueError(f"the query names {len(queues)} queues: {', '.join(sorted(queues))}; a worker serves one")
        queue = queues.pop() if queues else "default"
        return cls(
            # In a stack's calls, the cluster's default queue is `_default`; workers call it default.
            frozenset({"default", "_default"} if queue == "default" else {queue}),
            tags,
            frozenset(key for key, _ in pairs if key != "queue"),
        )

    @classmethod
    def from_row(cls, queue_keys: Iterable[str], tags: str) -> Profile:
        """A profile from a worker's stored queues and tags."""
        pairs = frozenset(tags.split(",")) if tags else frozenset()
        return cls(frozenset(queue_keys), pairs, frozenset(tag.partition("=")[0] for tag in pairs))

    def __str__(self) -> str:
        """A query that parses to this profile."""
        # max() takes "default" rather than its other name "_default".
        return ",".join([f"queue={max(self.queue_keys)}", *sorted(self.tags)])

    @property
    def has(self) -> tuple[str, ...]:
        """Everything that `RuleSet.needs` may contain and this profile has."""
        return (*self.tags, *self.keys, *(f"queue={queue_key}" for queue_key in self.queue_keys))

    def matches(self, rules: RuleSet) -> bool:
        """Whether a job with these rules may go to this worker. Extra tags on the worker do not matter."""
        return (
            rules.queue_key in self.queue_keys
            and rules.tags <= self.tags
            and rules.keys <= self.keys
            and not rules.unread
        )


class RuleIndex:
    """Rule sets by their texts, each indexed by one of its needs (see `RuleSet.needs`).

    A profile is compared only with rule sets indexed by something that it has, not with all of them.
    """

    def __init__(self, texts: Iterable[str] = ()):
        self._needs: dict[str, str] = {}  # the index key of each text
        self._by_policy: set[str] = set()  # texts with rules of a policy
        self._files: dict[str, dict[str, RuleSet]] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._needs)

    def add(self, text: str) -> None:
        """Index the rule set by its rarest need: for example a host's tag rather than an operating system's."""
        rules = RuleSet.read(text)
        need = min(rules.needs, key=lambda each: len(self._files.get(each, ())))
        self._needs[text] = need
        self._files.setdefault(need, {})[text] = rules
        if rules.is_by_policy:
            self._by_policy.add(text)

    def remove(self, text: str) -> None:
        """Remove the rule set, if it is there."""
        if (need := self._needs.pop(text, None)) is None:
            return
        del self._files[need][text]
        self._by_policy.discard(text)
        if not self._files[need]:
            del self._files[need]

    def keep(self, texts: Collection[str]) -> None:
        """Replace the content by these texts."""
        for text in self._needs.keys() - texts:
            self.remove(text)
        for text in set(texts) - self._needs.keys():
            self.add(text)

    def matching(self, profile: Profile) -> Iterator[tuple[str, RuleSet]]:
        """The rule sets that match the profile, in no particular order."""
        files = self._files_of(profile)
        return ((text, rules) for file in files for text, rules in file.items() if profile.matches(rules))

    def matches(self, profile: Profile) -> bool:
        """Whether any rule set matches the profile."""
        for file in self._files_of(profile):
            for rules in file.values():
                if profile.matches(rules):
                    return True
        return False

    def has_by_policy(self, profile: Profile) -> bool:
        """Whether a rule set matches that, by a policy, not all workers with this profile may get."""
        return any(profile.matches(RuleSet.read(text)) for text in self._by_policy)

    def _files_of(self, profile: Profile) -> Collection[Mapping[str, RuleSet]]:
        files = self._files
        if len(files) <= len(profile.tags):
            return files.values()
        return [files[each] for each in profile.has if each in files]


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """The worker that calls. `name`: its slot, stable over restarts; `session`: random for each process; or ""."""

    name: str
    session: str
    profile: Profile
    #: It can run a job only if it gets a job acquisition token.
    needs_token: bool = False
    #: Its host name, and a hash of the machine id, which distinguishes machines with the same host name.
    host: str = ""
    machine: str = ""

    def meets(self, rule: str) -> bool:
        """Whether the worker matches a policy's rule "key=value" or "key=*"; `host` and `worker` are extra keys."""
        key, _, wanted = rule.partition("=")
        own = {"host": self.host, "worker": self.name}.get(key, "")
        if wanted == "*":
            return bool(own) or key in self.profile.keys
        return own == wanted or rule in self.profile.tags


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRow:
    """The stored row of a named worker."""

    name: str
    session: str = ""
    #: Earlier sessions, the latest last.
    retired: tuple[str, ...] = ()
    tags: str = ""
    #: How many of its agents in a row ended without acquiring; until when it gets no job because its last agent failed.
    failures: int = 0
    held_until: float = 0.0
    #: Jobs that it claimed, and how many of them ran to an end.
    claims: int = 0
    ran: int = 0
    last_claim_at: float | None = None
    heard_at: float = 0.0
    #: Its agent's version, and the first day (2027-09-03) on which Buildkite no longer supports it; "": unknown.
    agent: str = ""
    agent_supported_until: str = ""
    #: The version of its worker.py; "": not known.
    version: str = ""
    #: As `Worker` has them.
    host: str = ""
    machine: str = ""
    #: Its last report: a key of REPORTED_STATES, and why. Since when it reports this state; when it last did.
    told_state: str = ""
    told_reason: str = ""
    told_since: float | None = None
    told_at: float | None = None
    #: Queues that it serves, comma-separated.
    queues: str = ""
    #: How many of its agents in a row ended without acquiring, not because of Buildkite; when the last one did.
    faults: int = 0
    fault_at: float | None = None
    #: When Buildkite last said that a job of this worker has run and is over.
    ran_at: float | None = None
    #: When its current process first claimed or reported; when it last touched a job that is over, or completed a job.
    came_at: float | None = None
    worked_at: float | None = None
    #: Id of the run of its health command after which an operator must resume it; id of the run last resumed.
    needs_person: str = ""
    resumed: str = ""
    #: Free bytes for builds after its last job; number of processes that all its jobs left behind.
    free_bytes: int | None = None
    strays: int = 0
    #: With Redis: a count of changes. A write is refused if the row has changed since it was read.
    rev: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """The stored row of a job. Times are Unix seconds of the scheduler's clock."""

    uuid: str
    queue_key: str
    agent_query_rules: tuple[str, ...]
    rule_set: str
    priority: int
    scheduled_at: float
    #: Buildkite's `pipeline`, `build` and `step` objects, reduced to KEPT_MEMBERS.
    about: dict[str, Any]
    put_at: float
    state: JobState = JobState.RESERVING
    outcome: Outcome | None = None
    #: Why it is in this state, as text.
    reason: str = ""
    reserved_at: float | None = None
    #: The reservation's deadline, counted from when the request was sent; 0: renew it now.
    reservation_expires_at: float = 0.0
    claim: str | None = None
    worker: str | None = None
    session: str | None = None
    #: The host of that worker.
    host: str | None = None
    claimed_at: float | None = None
    touched_at: float | None = None
    lease_expires_at: float | None = None
    acquired_at: float | None = None
    completed_claim: str | None = None
    exit_status: int | None = None
    #: How often it was claimed, and how many of these claims counted as failed attempts.
    claims: int = 0
    attempts: int = 0
    #: The last claims that ended in state `leased`: {worker, host, claimed_at, ended_at, how, code, exit_status,
    #: reason, counted, judged}. Rows of older schedulers have no host.
    tries: tuple[dict[str, Any], ...] = ()
    #: If set: we must finish the job at Buildkite with this text, and Buildkite has not confirmed it yet.
    finish_detail: str | None = None
    done_at: float | None = None
    #: Before this time we ask Buildkite nothing about it; 0: no limit.
    not_before: float = 0.0
    #: If set, the job is held (may not be claimed): the hold's owner, reason and, if known, end. A held `reserving` job
    #: has the end also in `not_before`.
    held_by: str | None = None
    held_reason: str | None = None
    held_until: float | None = None
    #: The owner's name for the hold: the freeze window's name.
    held_note: str | None = None
    #: Acts of operators, each {at, by, note}: stop the job; let it pass people's holds; put it first in line, with
    #: Buildkite's `priority`. They survive every change of state. `stop` also has `cancelled_at`, when Buildkite
    #: accepted to cancel the job, or `problem`, why it did not.
    stop: dict[str, Any] | None = None
    allow: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    #: The policy's last decision: {verb, at, policy} and the fields of `Decision` that are set; `policy` is the version
    #: of the policy file. A hold adds {until, held_since}; a policy that failed adds {failures, reason}; a changed
    #: priority adds {listed_priority}.
    decision: dict[str, Any] | None = None
    #: While it is `ready`: the next step of the policy's tasks, one of POLICY_STEPS, and when it is due.
    policy_step: str | None = None
    policy_step_at: float | None = None
    #: From its spec: its index in a parallel step, and its number of retries. `chain`: equal for a job and its retries.
    parallel_job: int | None = None
    retry_count: int | None = None
    chain: str | None = None
    #: The store's sequence number when the job's state or worker last changed.
    version: int = 0

    @classmethod
    def from_api(
        cls, queue_key: str, raw: Any, now: float, tell: Callable[[str, str], None] = lambda field, what: None
    ) -> Job:
        """Read one entry of `scheduled-jobs`. ValueError: it has no usable id, so it cannot be run.

        A wrong value in any other field is replaced by the nearest valid one; `tell(field, problem)` reports it.
        """
        if not isinstance(raw, dict):
            raise ValueError(f"it is a {type(raw).__name__}, not an object")
        uuid = raw.get("id")
        if not isinstance(uuid, str) or not UUID.fullmatch(uuid):
            raise ValueError(f"`id` is {brief(uuid)}, not a uuid")
        priority, rules = whole_of(raw.get("priority")) or 0, rules_of(raw.get("agent_query_rules"))
        scheduled_at, runnable_at = moment_of(raw.get("scheduled_at")), moment_of(raw.get("runnable_at"))
        scheduled_at = now if scheduled_at is None else scheduled_at
        about = {name: members_of(raw.get(name), kinds) for name, kinds in KEPT_MEMBERS.items()}
        kept = {
            "priority": priority,
            "agent_query_rules": [*rules],
            "scheduled_at": scheduled_at,
            "runnable_at": runnable_at,
            **about,
        }
        for field, value in kept.items():
            if wrong := misfit(raw.get(field), value):
                tell(field, wrong)
        rule_set = RuleSet.of(queue_key, rules)
        if rule_set.unread:
            tell("agent_query_rules", f"{describe_rules(rule_set.unread)} not understood: the job goes to no worker")
        early = {
            "held_by": "buildkite",
            "held_reason": "runnable_at",
            "held_until": runnable_at,
            "not_before": runnable_at,
        }
        return cls(
            uuid=uuid,
            queue_key=queue_key,
            agent_query_rules=rules,
            rule_set=str(rule_set),
            priority=priority,
            scheduled_at=scheduled_at,
            about=about,
            put_at=now,
            **(early if runnable_at is not None and runnable_at > now else NOT_HELD),
        )

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key of the line: highest priority first, then oldest, then uuid."""
        return (-self.priority, self.scheduled_at, self.uuid)

    @property
    def listed_priority(self) -> int:
        """Its priority at Buildkite, without changes by operators or the policy."""
        if self.first:
            return int(self.first["priority"])
        return int((self.decision or {}).get("listed_priority", self.priority))


UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


#: The members that we keep of a listed job's objects, with their types.
KEPT_MEMBERS: Mapping[str, Mapping[str, type]] = {
    "pipeline": {"slug": str, "uuid": str},
    "build": {"uuid": str, "number": int, "branch": str},
    "step": {"key": str},
}
#: Largest stored text, rule, and sum of rules of a listed job, so that every answer about it stays small.
TEXT_BYTES, RULE_BYTES, RULES_BYTES = 1024, 512, 2048
#: Largest integer that both stores keep exactly; first and last second that RFC 3339 can express.
MAX_WHOLE = 2**63 - 1
FIRST_SECOND, LAST_SECOND = -62_135_596_800.0, 253_402_300_799.0


def whole_of(value: Any) -> int | None:
    """An integer from 5, "5" or 5.9, without its fraction and limited to ±MAX_WHOLE; None if it is not a number."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return int(max(-MAX_WHOLE, min(MAX_WHOLE, value)))


def rules_of(value: Any) -> tuple[str, ...]:
    """Agent query rules as stored. A rule that is too long, or not a text, becomes "=…", which matches no worker."""
    if isinstance(value, dict):
        value = [f"{key}={value if isinstance(value, str) else brief(value).lower()}" for key, value in value.items()]
    listed = value if isinstance(value, list) else [] if value is None else [value]
    rules: list[str] = []
    room = RULES_BYTES
    for rule in listed:
        text = rule if isinstance(rule, str) else f"={brief(rule)}"
        kept = cut(text, RULE_BYTES)
        rules.append(kept if kept == text else f"={kept}")
        room -= len(kept.encode()) + 1
        if room < 0:
            rules[-1] = f"=and {len(listed) - len(rules) + 1} more"
            break
    return tuple(rules)


def moment_of(value: Any) -> float | None:
    """Unix seconds from an RFC 3339 text (UTC if without a zone) or a number; None if it is not a time."""
    seconds = math.nan
    with suppress(ValueError, OverflowError):
        if isinstance(value, str):
            moment = datetime.datetime.fromisoformat(value)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
    return None if math.isnan(seconds) else min(max(seconds, FIRST_SECOND), LAST_SECOND)


def members_of(value: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The members of an object that we keep, each of the right type or None."""
    members = value if isinstance(value, dict) else {}
    return {name: member_of(members[name], kind) for name, kind in kinds.items() if name in members}


def member_of(value: Any, kind: type) -> str | int | None:
    if kind is int:
        return whole_of(value)
    return cut(value, TEXT_BYTES) if isinstance(value, str) else None


def misfit(value: Any, kept: Any) -> str:
    """Why a listed field is wrong, and which value replaces it; "" when it is right."""
    if value is None:
        return ""
    if isinstance(value, dict) and isinstance(kept, dict):
        wrong = ", ".join(name for name in kept if differs(value[name], kept[name]))
        return wrong and f"wrong type or too long: {wrong}"
    if isinstance(kept, float):  # a time
        is_well_formed = isinstance(value, str) and RFC3339.fullmatch(value)
        return "" if is_well_formed else f"it is {brief(value)}, not an RFC 3339 time: taken as {rfc3339(kept)}"
    return f"it is {brief(value)}: taken as {brief(kept)}" if differs(value, kept) else ""


def differs(value: Any, kept: Any) -> bool:
    return bool(value != kept or isinstance(value, bool))


RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def brief(value: object) -> str:
    """A value for a message, cut if it is large or deeply nested."""
    try:
        return cut(repr(value), 100)
    except RecursionError:
        return f"a deep {type(value).__name__}"


def describe_rules(rules: Collection[str]) -> str:
    """Rules in a sentence: "the rules *=gpu, =foo are"."""
    listed = cut(", ".join(sorted(rules)), 200)
    return f"the rule {listed} is" if len(rules) == 1 else f"the rules {listed} are"


def rfc3339(seconds: float | None) -> str | None:
    """Unix seconds as "2026-11-21T07:41:00.123Z", limited to what RFC 3339 can express; None for None."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(min(max(seconds, FIRST_SECOND), LAST_SECOND), datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def rfc3339_seconds(seconds: float) -> str:
    """Like `rfc3339`, without milliseconds: "2026-11-21T07:41:00Z"."""
    return re.sub(r"\.\d+", "", rfc3339(seconds) or "")


@dataclasses.dataclass(frozen=True, slots=True)
class RuleSetCount:
    """The number of jobs of one rule set in one state; when the oldest was scheduled, and its uuid."""

    state: JobState
    rule_set: str
    jobs: int
    oldest: float
    uuid: str = ""
    #: These jobs are `ready` and held.
    is_held: bool = False

    @property
    def queue_key(self) -> str:
        return RuleSet.read(self.rule_set).queue_key

    @property
    def waits(self) -> bool:
        return self.state in (JobState.RESERVING, JobState.READY)


@dataclasses.dataclass(frozen=True, slots=True)
class JobAtWorker:
    """A `leased` or `running` job, with few fields, because thousands of them are read at once."""

    uuid: str
    queue_key: str
    rule_set: str
    state: JobState
    scheduled_at: float
    worker: str | None = None
    claimed_at: float | None = None
    touched_at: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """A caller that says it has this job: by a claim's id or, without one, by its worker name."""

    uuid: str
    claim: str | None
    worker: Worker | None = None
    #: If set, the call is refused when the job changed after this sequence number of the store.
    asked: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class AgentEnd:
    """How a worker's agent ended: its exit status (not the job's) and the end of its output."""

    exit_status: int
    last_words: str = ""
    #: After the job: free bytes for builds (None: not reported), and the number of processes that it left behind.
    free_bytes: int | None = None
    strays: int = 0


class Refusal(Exception):
    """A request that cannot be served; becomes the JSON error `code` with HTTP `status`."""

    status, code = 400, "bad_request"

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ):
        """`more`: further fields of the answer."""
        super().__init__(message)
        self.status, self.code = status or self.status, code or self.code
        self.headers, self._more = dict(headers or {}), more or {}

    @property
    def answer(self) -> Answer:
        body = {"error": self.code, "message": str(self)[:MESSAGE_CHARACTERS], **self._more}
        return Answer(self.status, body, self.headers)


class UnknownJob(Refusal):
    status, code = 404, "unknown_job"


class JobDone(Refusal):
    """The job is over, so it cannot be changed."""

    status, code = 409, "job_done"


class UnknownWorker(Refusal):
    status, code = 404, "unknown_worker"


class WorkerBusy(Refusal):
    status, code = 409, "worker_busy"


class StaleClaim(Refusal):
    """The claim in the request is not the job's current claim; nothing was changed."""

    status, code = 409, "stale_claim"


class WorkerNameTaken(Refusal):
    """Another process now uses this worker's name."""

    status, code = 409, "worker_name_taken"


def unknown_job(uuid: str) -> UnknownJob:
    return UnknownJob(f"job {uuid} is unknown; the scheduler forgets jobs a day after they are done")


def stale_claim(holder: Holder, state: str, reason: str) -> StaleClaim:
    named = f"claim {holder.claim}" if holder.claim else "a worker without a claim"
    return StaleClaim(
        f"{named} no longer has job {holder.uuid} (which is {state}: {reason}); "
        "leave a running agent alone and claim again"
    )


def worker_name_taken(name: str, session: str | None) -> WorkerNameTaken:
    return WorkerNameTaken(
        f"another process is worker {name!r}, with session {session}; give each worker its own WORKER_NAME"
    )


class StoreUnavailable(Refusal):
    """The store cannot be read or written now; nothing was changed."""

    status, code = 503, "store_unavailable"


class Fenced(Exception):
    """Another scheduler leads now, so this scheduler's write was refused; nothing was changed."""


class WorkerHeld(Exception):
    """A hold keeps the worker from any job until `until` (Unix seconds; infinity: unknown)."""

    def __init__(self, until: float):
        super().__init__(f"held until {until}")
        self.until = until


class BuildkiteError(Exception):
    """A call to Buildkite that failed. `status`: 0 when there was no readable answer."""

    def __init__(self, message: str, status: int = 0, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Clock:
    """Unix time that does not follow small changes of the wall clock: read once, then advanced monotonically."""

    #: A difference above this means that the wall clock was set, or that the machine slept.
    STEP_SECONDS = 5.0

    def __init__(self, wall_clock: Callable[[], float] | None = None) -> None:
        """`wall_clock`: a clock shared by several schedulers (Redis), instead of this machine's."""
        self._shared = wall_clock
        self._offset = self._wall_clock() - time.monotonic()

    def _wall_clock(self) -> float:
        return self._shared() if self._shared else time.time()

    def now(self) -> float:
        return time.monotonic() + self._offset

    def follow_wall_clock(self) -> float:
        """Follow the wall clock if it has made a step; return the step in seconds, else 0."""
        step = self._wall_clock() - self.now()
        if abs(step) <= self.STEP_SECONDS:
            # Follow small drifts of a shared clock too, because the schedulers must agree on the time.
            self._offset += step if self._shared else 0.0
            return 0.0
        self._offset += step
        return step


# --- Moves ---
# The rules of a job's life, as plain functions of rows: without store, clock, lock or log. A move takes the current
# rows, the input of the verb, and the time. It returns the changed rows, or None if nothing changes, or raises a
# Refusal. `worker` is the row of the worker that has, or last had, the job.

#: A worker whose agents end without acquiring gets no job for 2 s, doubled each time in a row up to 5 min.
HOLD_SECONDS, MAX_HOLD_SECONDS = 2.0, 300.0
#: A worker whose agent failed gets no other job until Buildkite says whether the job ran, at most for this long.
UNJUDGED_SECONDS = 10.0
#: A replaced session may take its name back when the newer session has been silent for this long.
SESSION_SECONDS = 300.0
#: Number of earlier sessions in a worker's row.
KEPT_SESSIONS = 8
#: If all attempts were on one host, a job is finished only after this time: the host may be the cause.
ONE_HOST_SECONDS = 900.0
#: A worker's report is valid for this long. While it waits, the worker repeats the report at least every 30 s.
REPORTED_SECONDS = 60.0
#: The agent's exit status when Buildkite did not give it the job; this may happen on a healthy host.
EXIT_REJECTED = 27
#: A host is quarantined after QUARANTINE_AFTER agents in a row that ended without acquiring, on different workers (on
#: all, if it has fewer); each within FAULT_SECONDS of the one before.
QUARANTINE_AFTER, FAULT_SECONDS = 3, 600.0
#: An agent cannot fail within this time because Buildkite is away: it tries for longer than that.
QUICK_FAULT_SECONDS = 10.0
#: A quarantine's length: first, and at most (it doubles each time). Then one claim may test the host; without a test
#: the quarantine ends after TRY_SECONDS.
QUARANTINE_SECONDS, MAX_QUARANTINE_SECONDS, TRY_SECONDS = 300.0, 3600.0, 24 * 3600.0
#: If more than one host and this part of all hosts (seen within HOST_SECONDS) fail so, the hosts are not the cause.
WIDESPREAD, HOST_SECONDS = 0.2, 24 * 3600.0
#: After this silence a worker is offline; after the second it is forgotten.
OFFLINE_SECONDS, FORGET_SECONDS = 120.0, 7 * 24 * 3600.0
#: After a step of the clock we rely on reservations for this long, because the rest of their time is unknown.
GRACE_SECONDS = 30.0
#: Number of ended claims in a job's row.
KEPT_TRIES = 20
#: The code of a move that shows another scheduler with our stack's key: see `is_by_rival`.
BY_RIVAL = "by_rival"
#: A job that Buildkite did not reserve for us is not put again for this long, although each list contains it.
SHUN_SECONDS = 30.0
#: If Buildkite refuses to finish a job, try again after this.
REFUSED_FINISH_SECONDS = 60.0
#: If Buildkite does not answer the request to cancel a job within this, the worker must cancel it.
CANCEL_SECONDS = 30.0


def steps(text: str) -> frozenset[tuple[JobState | None, JobState]]:
    """Parse "new>reserving done>reserving" into pairs of states (from, to)."""
    pairs = (pair.split(">") for pair in text.split())
    return frozenset((None if start == "new" else JobState(start), JobState(end)) for start, end in pairs)


#: A job's life, in order: each verb, with the changes of state (from>to) that it may make. No other change is legal.
LIFE: Mapping[str, frozenset[tuple[JobState | None, JobState]]] = {
    # Buildkite lists the job as scheduled. We store it before we ask Buildkite to reserve it.
    "put": steps("new>reserving done>reserving"),
    # Buildkite says that the job is reserved: proof that it is ours and has no agent. A job with too many failed
    # attempts stays `reserving`, with a text to finish it, and is never handed out again.
    "confirm": steps("reserving>ready reserving>reserving"),
    # Buildkite says again that it is reserved. Or it lists a job that a worker has: its reservation must be renewed.
    # Or it lists a job that is not reserved yet, with a new priority or a new earliest start.
    "renew": steps("ready>ready leased>leased reserving>reserving"),
    # The reservation has ended, or we do not know: Buildkite must confirm it again. A running job that Buildkite
    # lists as scheduled has lost its agent.
    "lapse": steps("ready>reserving running>reserving"),
    # A worker claims it. If the answer was lost, the worker gets the same claim again.
    "claim": steps("ready>leased leased>leased"),
    "touch": steps("leased>leased running>running"),
    # A claim ends: by its worker, by the agent's exit, by time. Buildkite must then say what became of the job.
    "release": steps("leased>reserving"),
    "complete": steps("leased>reserving reserving>reserving running>running done>done"),
    "expire": steps("leased>reserving"),
    # Buildkite says that an agent has the job. It is not handed out, unless Buildkite lists it as scheduled again.
    "acquire": steps("reserving>running ready>running leased>running"),
    # Buildkite says that the job has run; or is not ours, or must not run now; or that we have finished it.
    "run": steps("reserving>done ready>done leased>done running>done"),
    "drop": steps("reserving>done ready>done leased>done running>done"),
    "finish": steps("reserving>done ready>done leased>done running>done"),
    # We ask Buildkite nothing about it before a later time.
    "defer": steps("reserving>reserving done>done"),
    # An operator stops it. We finish a `ready` job, which has no agent; for others the worker or Buildkite must act.
    "stop": steps("reserving>reserving ready>reserving leased>leased running>running"),
    # An operator lets it pass people's holds, or puts it first in line.
    "allow": steps("reserving>reserving ready>ready leased>leased running>running"),
    "first": steps("reserving>reserving ready>ready leased>leased running>running"),
    # A freeze window begins or ends to hold it.
    "freeze": steps("ready>ready"),
    "thaw": steps("ready>ready"),
    # The policy has decided: run, hold, or finish it. Or: the policy must be asked, or its decision no longer counts.
    "decide": steps("ready>ready ready>reserving"),
    "review": steps("ready>ready"),
    # We asked Buildkite to cancel a job that an operator stopped.
    "cancel": steps("running>running"),
}

#: Every legal change of state, without the verbs.
MOVES: Mapping[JobState, frozenset[JobState]] = {
    state: frozenset(end for verb in LIFE.values() for start, end in verb if start is state and end is not state)
    for state in JobState
}


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """The effect of a verb: the job's new row and, if it changes too, its worker's new row."""

    verb: str
    #: The reason, one word of a closed list; "" if the verb needs none.
    code: str
    job: Job
    worker: WorkerRow | None = None
    #: Whether the job's state or worker changes. If so, Buildkite's answers to earlier questions are ignored.
    is_state_change: bool = True


def make_move(
    verb: str, job: Job, code: str = "", by: WorkerRow | None = None, is_state_change: bool = True, **changes: Any
) -> Move:
    """The move that changes these fields of the job; ValueError if LIFE does not allow it.

    `by` is its worker's new row.
    """
    after = dataclasses.replace(job, **changes)
    if verb in LIFE and (job.state, after.state) not in LIFE[verb]:
        raise ValueError(f"job {job.uuid}: {verb} does not make {job.state} {after.state}")
    return Move(verb, code, after, by, is_state_change)


# -- verbs by Buildkite's answers


def put(job: Job | None, listed: Job, asked: int, now: float, *, is_reserved: bool = True) -> Move | None:
    """Buildkite listed a job as scheduled: store it if it is new or `done`. Else it has no reservation: it becomes
    `reserving`; a `leased` job stays, but its reservation must be renewed.

    `asked`: the store's sequence number before the call; a row that changed since is not touched. `is_reserved`: the
    source has reservations, so a listed job has none. (Without reservations, a job is listed until an agent has it.)
    """
    if job is None:
        return Move("put", "", listed)
    if job.version > asked:
        return None
    if job.state is JobState.DONE:
        return put_again(job, listed) if job.not_before <= now else None
    if not is_reserved and job.state in (JobState.READY, JobState.LEASED):
        return None
    if job.state is JobState.LEASED:
        return make_move("renew", job, is_state_change=False, reservation_expires_at=0.0)
    new = {name: value for name, value in listed_changes(job, listed).items() if getattr(job, name) != value}
    if job.state is JobState.RESERVING:
        return make_move("renew", job, is_state_change=False, **new) if new else None
    return make_move("lapse", job, "listed_again", state=JobState.RESERVING, reason="listed as scheduled again", **new)


#: The fields of a job's hold, with their values when there is none.
NOT_HELD: Mapping[str, Any] = dict.fromkeys(("held_by", "held_reason", "held_until", "held_note")) | {"not_before": 0.0}


def listed_changes(job: Job, listed: Job) -> dict[str, Any]:
    """Fields that a new list may change while the job is not reserved: its priority and its earliest start."""
    priority: dict[str, Any] = {"priority": listed.priority}
    if job.first:
        priority = {"first": job.first | priority}
    elif job.decision and "listed_priority" in job.decision:
        priority = {"decision": job.decision | {"listed_priority": listed.priority}}
    is_held = job.held_by not in (None, "buildkite", FREEZE)
    if job.finish_detail is not None or is_held or job.held_until == listed.held_until:
        return priority
    return {**priority, **{name: getattr(listed, name) for name in NOT_HELD}}


def put_again(job: Job, listed: Job) -> Move:
    """Put a job again that was done. Earlier claims and operators' acts stay; earlier failures no longer count."""
    tries = tuple(ended | {"counted": False, "judged": True} for ended in job.tries)
    again = dataclasses.replace(listed, claims=job.claims, tries=tries, version=job.version, stop=job.stop)
    if job.allow:
        again = dataclasses.replace(again, allow=job.allow, rule_set=allowed_rules(again))
    if job.first:
        again = dataclasses.replace(again, **put_first(again, job.first))
    return Move("put", "", again)


def confirm(  # noqa: PLR0913  all that is decided when a job becomes ready
    job: Job,
    worker: WorkerRow | None,
    expires_at: float,
    max_attempts: int,
    now: float,
    policy: str | None = None,
    *,
    frozen: Frozen | None = None,
) -> Move | None:
    """A batch-reserve returned the job as reserved until `expires_at`: it is ours, and no agent has it.

    A `reserving` job becomes `ready`, or gets a text to finish it if it was stopped or failed too often.
    `policy`: the version of the policy in force, if any. `frozen`: the freeze window that holds the job now. Both take
    effect in this move, so that the job cannot be claimed in between.
    """
    is_over = job.held_by not in PEOPLE and job.held_until is not None and job.held_until <= now
    lifted = NOT_HELD if is_over else {}
    if (reviewed := review(job, policy, now)) and reviewed.is_state_change:
        renewed = dataclasses.replace(reviewed.job, reservation_expires_at=expires_at)
        return dataclasses.replace(reviewed, job=renewed)
    if job.state in (JobState.READY, JobState.LEASED):
        return make_move("renew", job, is_state_change=False, reservation_expires_at=expires_at, **lifted)
    if job.state is not JobState.RESERVING or job.finish_detail is not None or job.not_before > now:
        return None
    changes: dict[str, Any] = {"reserved_at": job.reserved_at or now, "reservation_expires_at": expires_at, **lifted}
    if is_last_try_unjudged(job):  # the last agent ended without acquiring it: count a failure of that worker
        changes["tries"] = with_last_try_judged(job)
        worker = worker and count_failure(worker, job.tries[-1], now)
    else:
        worker = None
    if job.stop:
        changes |= {"finish_detail": stop_detail(job.stop), "reason": STOPPED}
        return make_move("confirm", job, "stopped", worker, **changes)
    if failed_too_often(job, max_attempts, now):
        changes |= {"finish_detail": finish_detail(job), "reason": "failed too often"}
        return make_move("confirm", job, "failed_too_often", worker, **changes)
    changes |= dict.fromkeys(("claim", "worker", "session", "host", "lease_expires_at")) | {"not_before": 0.0}
    frozen_or_not = freeze_changes(dataclasses.replace(job, **lifted), frozen, policy, now)
    return make_move("confirm", job, "", worker, state=JobState.READY, reason="reserved", **changes | frozen_or_not)


def learn(
    job: Job, worker: WorkerRow | None, found: JobFinding, now: float, claims_known_from: float = math.inf
) -> Move | None:
    """Buildkite told the job's state: a `ready` job may lapse, any job may have an agent (`running`) or be `done`.

    `claims_known_from`: claims before this time may be missing in the rows.
    """
    finding, reason, code = found
    code = code or (reason if reason in FINDINGS else "other")
    if is_by_rival(job, reason, claims_known_from, now):
        code = BY_RIVAL
    if job.state is JobState.DONE:
        return None
    if finding is Finding.LAPSED:
        if job.state is not JobState.READY:
            return None
        lapsed = f"its reservation lapsed: {reason}"
        return make_move("lapse", job, "lapsed", state=JobState.RESERVING, reason=lapsed)
    if finding is Finding.ACQUIRED:
        if job.state is JobState.RUNNING:
            return None
        changes: dict[str, Any] = {
            "acquired_at": now,
            "reason": reason,
            "finish_detail": None,
            **NOT_HELD,
            **without_failed_attempt(job),
        }
        return make_move("acquire", job, code, clear_failures(worker), state=JobState.RUNNING, **changes)
    return end(job, worker, JobFinding(finding, reason, code), now)


def is_by_rival(job: Job, word: str, claims_known_from: float, now: float) -> bool:
    """Whether an agent has, or had, a job reserved for our stack that none of our workers can have started.

    Then another scheduler with our stack's key, or a person, started an agent with this job's uuid.
    """
    if job.claims == 0:  # no worker of ours ever got it
        is_ours = job.state is JobState.READY and job.reservation_expires_at > now
        has_agent = word in RAN_WORDS or FINDINGS.get(word) is Finding.ACQUIRED
        return is_ours and has_agent and (job.reserved_at or 0.0) > claims_known_from
    # Buildkite refused the job to our only agent, and another agent runs it. `assigned` would prove nothing: Buildkite
    # may have given the job to our agent and the answer may have been lost.
    was_rejected = job.state is JobState.RESERVING and job.claims == len(job.tries) == 1
    tried = job.tries[0] if was_rejected else {}
    return word == "running" and tried.get("code") == "rejected" and tried["claimed_at"] > claims_known_from


def end(job: Job, worker: WorkerRow | None, found: JobFinding, now: float) -> Move:
    """Buildkite says that the job is over or gone: `ran` if it ran for us, else `dropped`."""
    finding, reason, code = found
    done: dict[str, Any] = {"state": JobState.DONE, "reason": reason, "done_at": now, **NOT_HELD}
    if job.finish_detail is not None and reason in RAN_WORDS:  # Buildkite got our finish; its answer was lost
        return finished(job, done)
    if finding is Finding.OVER and (job.state is JobState.RUNNING or (job.claims > 0 and reason in RAN_WORDS)):
        ran = None
        if worker:
            worked_at = max(worker.worked_at or 0.0, job.touched_at or 0.0) or None
            ran = dataclasses.replace(
                clear_failures(worker) or worker, ran=worker.ran + 1, ran_at=now, worked_at=worked_at
            )
        return make_move("run", job, code, ran, outcome=Outcome.RAN, **done, **without_failed_attempt(job))
    # A listed job that could not be reserved is not put again at once.
    not_before = now + SHUN_SECONDS if code in ("not_ours", "refused") else 0.0
    return make_move("drop", job, code, outcome=Outcome.DROPPED, **(done | {"not_before": not_before}))


def finish(job: Job, now: float) -> Move | None:
    """Buildkite confirmed that we finished the job."""
    if job.finish_detail is None or job.state is not JobState.RESERVING:
        return None
    done: dict[str, Any] = {"state": JobState.DONE, "reason": "finished", "done_at": now}
    return finished(job, done)


def finished(job: Job, done: Mapping[str, Any]) -> Move:
    """The job becomes `done`, because we finished it at Buildkite."""
    if job.stop:
        code, outcome = "stopped", Outcome.STOPPED
    elif ends := POLICY_ENDS.get((job.decision or {}).get("verb", "")):
        code, outcome = ends, ends
    else:
        code, outcome = "failed_too_often", Outcome.FAILED
    return make_move("finish", job, code, outcome=outcome, **done)


def finish_status(job: Job) -> int:
    """The exit status with which we finish the job at Buildkite: 0 if the policy decided `succeed`, else -1."""
    return 0 if not job.stop and job.decision and job.decision["verb"] == "succeed" else -1


def refuse_finish(job: Job, now: float) -> Move | None:
    """Buildkite refused to finish the job: it has an agent or is over. Buildkite's next answer about it shows which."""
    if job.finish_detail is None or job.state is not JobState.RESERVING:
        return None
    return make_move("defer", job, "finish_refused", is_state_change=False, not_before=now + REFUSED_FINISH_SECONDS)


# -- verbs by workers


def enter(row: WorkerRow | None, worker: Worker, now: float) -> WorkerRow:
    """A named worker claims: its row with its current session. A new session means that the worker was restarted.

    Raises WorkerNameTaken if a newer session has replaced this one.
    """
    offers = offers_of(worker.profile)
    if row is None:
        row = WorkerRow(worker.name, worker.session, heard_at=now, came_at=now)
        return dataclasses.replace(row, host=worker.host, machine=worker.machine, **offers)
    if (row.session, row.host, row.machine) == (worker.session, worker.host, worker.machine):
        return row
    row = dataclasses.replace(row, host=worker.host, machine=worker.machine)
    if row.session == worker.session:
        return row
    refuse_replaced(row, worker, now)
    retired = [old for old in (*row.retired, row.session) if old and old != worker.session]
    retired = retired[-KEPT_SESSIONS:]
    return dataclasses.replace(row, session=worker.session, retired=tuple(retired), came_at=now, **offers)


def offers_of(profile: Profile) -> dict[str, Any]:
    """The tags and queues for a worker's row."""
    return {"tags": ",".join(sorted(profile.tags)), "queues": ",".join(sorted(profile.queue_keys))}


def take_report(row: WorkerRow | None, worker: Worker, fields: Mapping[str, Any], now: float) -> WorkerRow:
    """A worker reports fields of its row. Raises a Refusal if this session may not report for the name.

    An unknown worker becomes known by its first report if that contains what it can run (`query`): an unfit worker may
    never claim. Otherwise allowed are the session that claimed last, and a later session on the same machine: there a
    lock lets only one process have the name, and the new process may have to wait before its first claim.
    """
    if row is None and worker.profile.queue_keys:
        row = enter(None, worker, now)
    if row is None:
        raise UnknownWorker(f"worker {worker.name!r} is unknown: it can report after its first claim, or with `query`")
    is_there = worker.host != "" and (row.host, row.machine) == (worker.host, worker.machine)
    if row.session != worker.session and (not is_there or worker.session in row.retired):
        raise worker_name_taken(row.name, row.session)
    if not fields.get("told_state"):
        return dataclasses.replace(row, **fields)
    fields = {"needs_person": ""} | dict(fields)
    since = row.told_since if reported_state(row, now) == fields["told_state"] else now
    return dataclasses.replace(row, **fields, told_since=since, told_at=now)


def reported_state(row: WorkerRow, now: float) -> str:
    """The state in a worker's last report; "" if the report is too old."""
    return row.told_state if row.told_at is not None and row.told_at >= now - REPORTED_SECONDS else ""


def leave(job: Job, worker: Worker, now: float) -> Move | None:
    """A worker ends while it has a `leased` job: it never got the answer to its claim, so the claim ends."""
    if job.state is not JobState.LEASED or (job.worker, job.session) != (worker.name, worker.session):
        return None
    return end_claim("expire", job, "excused", "its worker has ended", now)


def refuse_replaced(row: WorkerRow, worker: Worker, now: float) -> None:
    """Raise WorkerNameTaken if a newer session has replaced this one and was active lately."""
    if worker.session in row.retired and now - row.heard_at <= SESSION_SECONDS:
        raise worker_name_taken(row.name, row.session)


def leased(worker: Worker, claim: str, lease_seconds: float, now: float) -> dict[str, Any]:
    """The changed fields of a `ready` job that this worker claims. The store itself increments `claims`."""
    return {
        "state": JobState.LEASED,
        "reason": "claimed",
        "claim": claim,
        "worker": worker.name or None,
        "session": worker.session or None,
        "host": worker.host or None,
        "claimed_at": now,
        "lease_expires_at": now + lease_seconds,
        "touched_at": None,
        "acquired_at": None,
        "exit_status": None,
    }


def claim_again(job: Job, worker: Worker, lease_seconds: float, acquire_seconds: float, now: float) -> Move | None:
    """A worker claims although it already has this job: it gets the same claim again, because the answer was lost.

    The claim ends instead if the worker was restarted, or the job was stopped or claimed over `acquire_seconds` ago.
    """
    if job.state is not JobState.LEASED or job.worker != worker.name:
        return None
    if job.session != worker.session:
        return end_claim("expire", job, "excused", "its worker was restarted", now)
    if job.stop:
        return end_claim("expire", job, "excused", STOPPED, now)
    if now - (job.claimed_at or now) > acquire_seconds:
        # Its answers have been lost for too long: let another worker try this job.
        return put_aside_if_repeated(end_claim("expire", job, "unheard", "its worker never got the answer", now), now)
    return make_move("claim", job, "again", lease_expires_at=now + lease_seconds)


def check_holder(job: Job | None, row: WorkerRow | None, holder: Holder, now: float, *, completed_too: bool) -> Job:
    """The job that a call is about. Raises a Refusal unless the caller has the job, or had it last (`completed_too`).

    It also raises one if the job has changed since `holder.asked`. `row`: the calling worker's row, if it has one.
    """
    if row and holder.worker and row.session != holder.worker.session:
        refuse_replaced(row, holder.worker, now)
    if job is None:
        raise unknown_job(holder.uuid)
    # A worker that claimed without a session may call without one.
    is_named = (
        holder.claim is None
        and holder.worker is not None
        and holder.worker.name == job.worker
        and job.session in (None, holder.worker.session)
    )
    if not (is_named and job.claim) and (holder.claim is None or holder.claim not in (job.claim, job.completed_claim)):
        raise stale_claim(holder, job.state, job.reason)
    if holder.asked is not None and job.version > holder.asked:
        raise StaleClaim(f"job {holder.uuid} has changed meanwhile; nothing was changed")
    if holder.claim != job.claim and not completed_too:
        raise StaleClaim(f"claim {holder.claim} of job {holder.uuid} is already completed; claim again")
    return job


def touch(job: Job, lease_seconds: float, now: float) -> Move | None:
    """The worker still has the job: renew its lease. A running job needs no lease."""
    if job.state is JobState.RUNNING:
        return make_move("touch", job, is_state_change=False, touched_at=now)
    if job.state is not JobState.LEASED:
        return None
    return make_move("touch", job, is_state_change=False, touched_at=now, lease_expires_at=now + lease_seconds)


def release(  # noqa: PLR0913  what decides whether it was an attempt
    job: Job, reason: str, answered_at: float, acquire_seconds: float, now: float, *, is_unfit: bool = False
) -> Move | None:
    """The worker gives the job back. `answered_at`: when Buildkite last answered us about this queue.

    This counts as an attempt only if the agent had `acquire_seconds` and Buildkite answered meanwhile. It never counts
    after an operator's stop, or if the host was unfit, so that no agent was started.
    """
    if job.state is not JobState.LEASED:
        return None
    if is_unfit:
        return end_claim("release", job, "unfit", reason, now)
    hung = not job.stop and now - (job.claimed_at or now) >= acquire_seconds
    counted = hung and answered_at >= (job.claimed_at or now)
    return end_claim("release", job, "attempt" if counted else "excused", reason, now, counted=counted, judged=not hung)


def withdraw(job: Job, reason: str, code: str, now: float) -> Move | None:
    """The scheduler ends a claim that its worker cannot use. If that is repeated, the job is put aside."""
    if job.state is not JobState.LEASED:
        return None
    return put_aside_if_repeated(end_claim("release", job, code, reason, now), now)


def complete(
    job: Job, worker: WorkerRow | None, holder: Holder, ended: AgentEnd, answered_at: float, now: float
) -> Move | None:
    """The agent has exited. If it is not known to have had the job, the job becomes `reserving`: ask Buildkite.

    Until then this counts as a failed attempt, unless Buildkite rejected the agent or did not answer us meanwhile.
    """
    if holder.claim not in (None, job.claim) or job.claim in (None, job.completed_claim):
        return None  # a repeated call
    changes: dict[str, Any] = {"completed_claim": job.claim, "exit_status": ended.exit_status}
    if worker and ended.free_bytes is not None:
        strays = worker.strays + ended.strays
        worker = dataclasses.replace(worker, free_bytes=ended.free_bytes, strays=strays, worked_at=now)
    if job.state is not JobState.LEASED:
        return make_move("complete", job, "late", worker, **changes)
    rejected = ended.exit_status == EXIT_REJECTED
    if worker and not rejected and ended.exit_status:
        # The agent itself failed: the worker gets no other job until Buildkite says whether this one ran.
        worker = dataclasses.replace(worker, held_until=max(worker.held_until, now + UNJUDGED_SECONDS))
    counted = not rejected and answered_at >= (job.claimed_at or now)
    reason = f"agent exited {ended.exit_status}" + (f": {ended.last_words}" if ended.last_words else "")
    code = "rejected" if rejected else "exited"
    return end_claim("complete", job, code, reason, now, counted=counted, judged=rejected, by=worker, **changes)


# -- verbs by operators

#: The `reason` of a job that an operator has stopped.
STOPPED = "an operator stopped it"
#: Lowest priority of jobs that operators put first. A later `first` gets a higher priority.
FIRST_PRIORITY = 2**62
#: Owner of holds that operators set.
OPERATOR = "operator"
#: Owner of holds that freeze windows set, and their reason.
FREEZE, FROZEN = "freeze", "frozen"
#: Owners whose holds do not hold an allowed job ("people's holds").
PEOPLE = (OPERATOR, FREEZE, "policy")


def operator_note(by: str, note: str, now: float) -> dict[str, Any]:
    """The record of an operator's act: when, who (the caller's own statement) and why."""
    return {"at": now, "by": by, "note": note}


def stop(job: Job, note: Mapping[str, Any]) -> Move | None:
    """Stop the job. The stop stays in the row until Buildkite says that the job is over."""
    if job.stop:
        return None  # the first stop stays
    refuse_done(job)
    changes: dict[str, Any] = {"stop": dict(note)}
    if job.state is JobState.READY or job.finish_detail is not None:  # no agent has it
        changes |= {"state": JobState.RESERVING, "reason": STOPPED, "finish_detail": stop_detail(note), **NOT_HELD}
    elif job.held_by != "buildkite":  # a job held by Buildkite cannot be reserved yet
        changes |= NOT_HELD
    return make_move("stop", job, is_state_change=job.state is JobState.READY, **changes)


def is_to_cancel(job: Job) -> bool:
    """Whether to ask Buildkite to cancel the job: an agent has it, and Buildkite has not accepted that yet."""
    cancelled_at: float = (job.stop or {}).get("cancelled_at", -math.inf)  # may belong to an earlier agent
    return job.state is JobState.RUNNING and job.stop is not None and cancelled_at < (job.acquired_at or 0.0)


def is_worker_to_cancel(job: Job, has_api_token: bool, now: float) -> bool:
    """Whether the job's worker must make its agent cancel the job.

    With an API token we ask Buildkite first; the worker must act only if Buildkite has not accepted it for
    CANCEL_SECONDS.
    """
    if not has_api_token:
        return job.state is JobState.RUNNING and job.stop is not None
    return is_to_cancel(job) and now - max((job.stop or {})["at"], job.acquired_at or 0.0) >= CANCEL_SECONDS


def cancel(job: Job, problem: str, now: float) -> Move | None:
    """Buildkite answered our request to cancel: accepted (`problem` ""), or a problem, stored if new."""
    if not is_to_cancel(job) or (problem and (job.stop or {}).get("problem") == problem):
        return None
    kept = {name: value for name, value in (job.stop or {}).items() if name != "problem"}
    return make_move(
        "cancel", job, is_state_change=False, stop=kept | ({"problem": problem} if problem else {"cancelled_at": now})
    )


def stop_detail(note: Mapping[str, Any]) -> str:
    """The text on the build page of a job that an operator stopped."""
    by = f" by {note['by']}" if note["by"] else ""
    return f"Stopped{by} at {rfc3339(note['at'])}: {note['note']}"


def allow(job: Job, note: Mapping[str, Any]) -> Move | None:
    """Let the job pass all of people's holds."""
    if job.allow:
        return None  # the first one stays
    refuse_done(job)
    lifted = NOT_HELD if job.held_by in PEOPLE else {}
    is_state_change = job.state is JobState.READY  # it may be claimed now
    changes = {**lifted, **NO_STEP, "allow": dict(note), "rule_set": allowed_rules(job)}
    return make_move("allow", job, is_state_change=is_state_change, **changes)


def allowed_rules(job: Job) -> str:
    """The rule set of an allowed job: the policy's `avoided` rules are removed, its `added` rules stay."""
    return str(dataclasses.replace(RuleSet.read(job.rule_set), allowed=True, avoided=frozenset()))


def first(job: Job, note: Mapping[str, Any]) -> Move:
    """Put the job first in our line, before jobs that were put first earlier."""
    refuse_done(job)
    return make_move("first", job, is_state_change=False, **put_first(job, note))


def put_first(job: Job, note: Mapping[str, Any]) -> dict[str, Any]:
    place = FIRST_PRIORITY + round(note["at"] * 1000)
    return {"first": {**note, "priority": job.listed_priority}, "priority": place}


def refuse_done(job: Job) -> None:
    if job.state is JobState.DONE:
        raise JobDone(f"job {job.uuid} is already over: {job.outcome}, {job.reason}; nothing was changed")


# -- verbs by time


def freeze(job: Job, frozen: Frozen | None, policy: str | None, now: float) -> Move | None:
    """From now on, the given freeze window holds the job; None: no window does.

    Without a window, the job waits for the policy if the policy has not decided yet. An earlier decision stays valid.
    """
    changes = freeze_changes(job, frozen, policy, now) if job.state is JobState.READY else {}
    owner = changes.get("held_by", job.held_by)
    if FREEZE not in (owner, job.held_by) or all(getattr(job, name) == value for name, value in changes.items()):
        return None
    return make_move("freeze" if owner == FREEZE else "thaw", job, **changes)


def freeze_changes(job: Job, frozen: Frozen | None, policy: str | None, now: float) -> dict[str, Any]:
    """Fields of a `ready` job that freeze windows and the policy change. A policy's hold has the lowest rank."""
    changes: dict[str, Any] = {}
    if frozen and not job.allow and job.held_by in (None, FREEZE, "policy"):
        held = {"held_by": FREEZE, "held_reason": FROZEN, "held_until": frozen.until, "held_note": frozen.window}
        changes = {**NOT_HELD, **held}
    elif job.held_by == FREEZE:
        changes = dict(NOT_HELD)
    return changes | policy_changes(dataclasses.replace(job, **changes), policy, now)


def expire(job: Job, answered_at: float, now: float) -> Move | None:
    """End an expired lease, or an expired reservation (Buildkite could not be reached to renew it)."""
    if job.state is JobState.READY and job.reservation_expires_at <= now:
        return make_move("lapse", job, "ran_out", state=JobState.RESERVING, reason="its reservation ran out")
    if job.state is not JobState.LEASED or (job.lease_expires_at or 0.0) > now:
        return None
    # Never touched: the worker did not get the answer to its claim, so no agent was started.
    counted = job.touched_at is not None and answered_at >= (job.claimed_at or 0.0)
    return end_claim("expire", job, "attempt" if counted else "excused", "its lease expired", now, counted=counted)


def restarted(lease_seconds: float, *, confirm: bool, now: float) -> dict[JobState, dict[str, Any]]:
    """By state, the fields to change in every job at a start and after a step of the clock: we may have missed calls.

    Leases start again, and reservations must be renewed at once. If Buildkite does not answer, `ready` jobs soon lapse.
    `confirm`: `ready` jobs become `reserving` until Buildkite confirms them.
    """
    due = {"reservation_expires_at": now + GRACE_SECONDS}
    ready: dict[str, Any] = {"state": JobState.RESERVING, "reason": "to be confirmed after a restart"}
    return {
        JobState.LEASED: {"claimed_at": now, "lease_expires_at": now + lease_seconds, **due},
        JobState.READY: due | (ready if confirm else {}),
    }


def restarted_worker(worker: WorkerRow, now: float) -> WorkerRow:
    """A worker's row at a start and after a step of the clock: limit `held_until`, which may be too far ahead."""
    return dataclasses.replace(worker, held_until=min(worker.held_until, now + MAX_HOLD_SECONDS))


def last_sign_of(worker: WorkerRow) -> float:
    """The last time at which a worker was active or is held. Without a job, it is forgotten some time later."""
    signs = [worker.last_claim_at, worker.told_at, worker.worked_at, worker.held_until, worker.heard_at]
    return max(filter(None, signs), default=0.0)


# -- verbs by the policy

#: The next step of the policy's tasks for a `ready` job: ask the policy, ask it again after a failure (in the second
#: process), or remove the `avoided` rules.
FIRST_ASKED, ASKED_AGAIN, END_AVOID = "ask", "ask_again", "end_avoid"
ASKING_STEPS = (FIRST_ASKED, ASKED_AGAIN)
POLICY_STEPS = (*ASKING_STEPS, END_AVOID)
NO_STEP: Mapping[str, Any] = {"policy_step": None, "policy_step_at": None}
#: Why the policy holds a job: it was not asked yet, it decided to hold, or it failed.
UNDECIDED, HELD_BY_POLICY, POLICY_FAILED = "undecided", "held_by_policy", "policy_failed"
#: For decisions that hold a job: the hold's reason, and the next step when the hold ends.
POLICY_HOLDS: Mapping[str, tuple[str, str]] = {
    "hold": (HELD_BY_POLICY, FIRST_ASKED),
    "failed": (POLICY_FAILED, ASKED_AGAIN),
}
#: For decisions that end a job: its outcome.
POLICY_ENDS: Mapping[str, Outcome] = {"refuse": Outcome.REFUSED, "succeed": Outcome.SUCCEEDED}
#: After the policy failed for a job, ask again after this; doubled each time in a row up to the second.
FAILED_SECONDS, MAX_FAILED_SECONDS = 60.0, 3600.0


def policy_changes(job: Job, policy: str | None, now: float) -> dict[str, Any]:
    """Fields to change in a job that is, or becomes, `ready` while this version of the policy is in force.

    A decision of another version stays valid until the policy is asked again. `policy` None: there is no policy, or it
    is suspended. Then jobs without a decision may run by their own rules; a job that it decided to hold waits until the
    hold's end.
    """
    if job.allow:
        return {}
    if job.held_by not in (None, "policy"):  # another owner's hold comes first; we return here when it ends
        return step_after(job.decision or {}) if job.policy_step in ASKING_STEPS else {}
    if policy is None:
        return changes_without_policy(job, now)
    verb = str(job.decision["verb"]) if job.decision else ""
    changes: dict[str, Any] = {}
    if job.decision and verb in POLICY_HOLDS and not job.held_by:  # another hold came between, and ended
        reason, step = POLICY_HOLDS[verb]
        changes = held_by_policy(reason, job.decision["until"], step)
    elif job.decision is None or not (verb == "run" or job.held_by):
        held = {"held_by": "policy", "held_reason": UNDECIDED, "held_until": None, "decision": None}
        return {} if job.held_by else {**held, "policy_step": FIRST_ASKED, "policy_step_at": 0.0}
    if job.decision["policy"] != policy and (job.policy_step, job.policy_step_at) != (FIRST_ASKED, 0.0):
        changes |= {"policy_step": FIRST_ASKED, "policy_step_at": 0.0}
    return changes


def changes_without_policy(job: Job, now: float) -> dict[str, Any]:
    is_over = job.held_reason in (UNDECIDED, POLICY_FAILED) or (job.held_until is not None and job.held_until <= now)
    if job.held_by and is_over:
        return {**NOT_HELD, **NO_STEP, **own_rules(job), "decision": None}
    if not job.held_by and job.policy_step in ASKING_STEPS:  # the last decision stays
        return step_after(job.decision or {})
    return {}


def own_rules(job: Job) -> dict[str, Any]:
    """The job's rules and priority as Buildkite listed them, without changes by an earlier decision."""
    rules = dataclasses.replace(RuleSet.read(job.rule_set), added=frozenset(), avoided=frozenset())
    return {"rule_set": str(rules)} | ({} if job.first else {"priority": job.listed_priority})


def step_after(decision: Mapping[str, Any]) -> dict[str, Any]:
    """The next step of the policy's tasks after a decision that lets the job run."""
    if decision.get("avoid"):
        return {"policy_step": END_AVOID, "policy_step_at": decision["until"]}
    return dict(NO_STEP)


def review(job: Job, policy: str | None, now: float) -> Move | None:
    """Another version of the policy is in force, or none is: see `policy_changes`."""
    if job.state is not JobState.READY:
        return None
    changes = policy_changes(job, policy, now)
    if not changes:
        return None
    if "held_by" not in changes:
        return make_move("review", job, "to_be_asked", is_state_change=False, **changes)
    return make_move("review", job, changes["held_reason"] or "freed", **changes)


def is_to_be_decided(job: Job) -> bool:
    """Whether a decision of the policy would have an effect now."""
    return job.state is JobState.READY and not (job.allow or job.stop) and job.held_by in (None, "policy")


def decide(job: Job, decision: Decision, policy: str, known: Mapping[str, Any], now: float) -> Move | None:
    """This version of the policy has decided. `known`: fields of the job's row that come from its spec."""
    if not is_to_be_decided(job):
        return None
    result = {name: value for name, value in dataclasses.asdict(decision).items() if value and name != "seconds"}
    result |= {"policy": policy, "at": now}
    if decision.seconds:
        result["until"] = now + decision.seconds
    changes: dict[str, Any] = {**known, **NOT_HELD, **NO_STEP, **own_rules(job), "decision": result}
    match decision.verb:
        case "run":
            rules = RuleSet.read(job.rule_set)
            rules = dataclasses.replace(rules, added=frozenset(decision.require), avoided=frozenset(decision.avoid))
            changes |= {"rule_set": str(rules), **step_after(result)}
            if decision.priority is not None:
                result |= {"priority": decision.priority, "listed_priority": job.listed_priority}
                changes |= {} if job.first else {"priority": decision.priority}
        case "hold":
            result["held_since"] = held_since(job, now)
            changes |= held_by_policy(HELD_BY_POLICY, result["until"], FIRST_ASKED)
        case verb:
            changes |= {"state": JobState.RESERVING, "finish_detail": decision.reason}
            changes["reason"] = f"the policy decided {verb}: {decision.reason}"
    return make_move("decide", job, decision.verb, **changes)


def held_by_policy(reason: str, until: float, step: str) -> dict[str, Any]:
    held = {"held_by": "policy", "held_reason": reason, "held_until": until}
    return {**held, "policy_step": step, "policy_step_at": until}


def held_since(job: Job, now: float) -> float:
    """Since when the policy holds the job."""
    return float((job.decision or {}).get("held_since", now)) if job.held_by else now


def fail_to_decide(job: Job, trouble: str, policy: str, jitter: float, now: float) -> Move | None:
    """This version of the policy failed for this job: hold it, and ask again after a pause that grows each time.

    `jitter`: factor for the pause.
    """
    if not is_to_be_decided(job):
        return None
    before = job.decision if job.decision and job.decision["policy"] == policy else {}
    failures = before.get("failures", 0) + 1
    until = now + min(FAILED_SECONDS * 2.0 ** min(failures - 1, 16) * jitter, MAX_FAILED_SECONDS)
    result = {"verb": "failed", "reason": trouble, "policy": policy, "at": now, "until": until, "failures": failures}
    result["held_since"] = held_since(job, now)
    held = held_by_policy(POLICY_FAILED, until, ASKED_AGAIN)
    return make_move("decide", job, POLICY_FAILED, **{**NOT_HELD, **held, **own_rules(job)}, decision=result)


def end_avoid(job: Job, now: float) -> Move | None:
    """The time of the policy's `avoided` rules is over: remove them, so that all matching workers may get the job."""
    if job.state is not JobState.READY or job.policy_step != END_AVOID or (job.policy_step_at or 0.0) > now:
        return None
    rules = str(dataclasses.replace(RuleSet.read(job.rule_set), avoided=frozenset()))
    return make_move("review", job, "avoid_over", rule_set=rules, **NO_STEP)


# -- what several moves share


def end_claim(  # noqa: PLR0913  the ends of a claim differ in all of these
    verb: str,
    job: Job,
    code: str,
    reason: str,
    now: float,
    *,
    counted: bool = False,
    judged: bool = True,
    by: WorkerRow | None = None,
    **changes: Any,
) -> Move:
    """End a claim: `leased` → `reserving`, with the ended claim in `tries`.

    `counted`: it counts as a failed attempt. `judged`: False if Buildkite's next answer must still show whether this
    was a failure of the worker.
    """
    ended = {
        "worker": job.worker,
        "host": job.host,
        "claimed_at": job.claimed_at,
        "ended_at": now,
        "how": verb,
        "code": code,
        "exit_status": changes.get("exit_status"),
        "reason": reason,
        "counted": counted,
        "judged": judged,
    }
    changes |= {"state": JobState.RESERVING, "reason": f"{verb}: {reason}"[:500]}
    changes |= {"claim": None, "lease_expires_at": None}
    changes |= {"attempts": job.attempts + counted, "tries": (*job.tries, ended)[-KEPT_TRIES:]}
    return make_move(verb, job, code, by, **changes)


class RepeatedEnd(NamedTuple):
    """A rule to hold ("put aside") a job: after how many claims in a row with the same bad end, how long, and why."""

    reason: str
    after: int
    #: Doubled each time in a row.
    first_seconds: float
    most_seconds: float


PUT_ASIDE = RepeatedEnd("put_aside", 3, 60.0, 3600.0)
#: By the code of a claim's end: these ends would repeat with the next claim.
REPEATED_ENDS: Mapping[str, RepeatedEnd] = {
    "no_token": RepeatedEnd("no_tokens", 1, 2.0, 60.0),
    "unanswerable": PUT_ASIDE,
    "unheard": PUT_ASIDE,
}


def put_aside_if_repeated(back: Move, now: float) -> Move:
    """The end of a claim, plus a hold of its `reserving` job if enough claims in a row have ended in this way."""
    pause = REPEATED_ENDS.get(back.code)
    ends = (REPEATED_ENDS.get(ended["code"]) for ended in reversed(back.job.tries))
    in_a_row = sum(1 for _ in itertools.takewhile(lambda each: each is pause, ends))
    if pause is None or in_a_row < pause.after:
        return back
    until = now + min(pause.first_seconds * 2 ** (in_a_row - pause.after), pause.most_seconds)
    held = {"held_by": "machine", "held_reason": pause.reason, "held_until": until, "not_before": until}
    return dataclasses.replace(back, job=dataclasses.replace(back.job, **held))


def is_last_try_unjudged(job: Job) -> bool:
    """Whether we do not know yet if the last ended claim was a failure of its worker."""
    return bool(job.tries) and not job.tries[-1]["judged"]


def with_last_try_judged(job: Job, **changes: Any) -> tuple[dict[str, Any], ...]:
    return (*job.tries[:-1], job.tries[-1] | {"judged": True} | changes)


def without_failed_attempt(job: Job) -> dict[str, Any]:
    """Fields to change when an agent did acquire the job: its last ended claim was not a failed attempt."""
    if not is_last_try_unjudged(job):
        return {}
    return {"tries": with_last_try_judged(job, counted=False), "attempts": job.attempts - job.tries[-1]["counted"]}


def count_failure(worker: WorkerRow, ended: Mapping[str, Any], now: float) -> WorkerRow:
    """Count a failure of the worker: it gets no job for a time that grows. `ended`: the claim that failed."""
    held_until = now + hold_seconds(worker.failures)
    worker = dataclasses.replace(worker, failures=worker.failures + 1, held_until=held_until)
    if not is_hosts_fault(ended, now):
        return worker
    is_in_a_row = worker.fault_at is not None and now - worker.fault_at <= FAULT_SECONDS
    return dataclasses.replace(worker, faults=worker.faults + 1 if is_in_a_row else 1, fault_at=now)


def is_hosts_fault(ended: Mapping[str, Any], now: float) -> bool:
    """Whether an agent that did not acquire its job may have failed because of its host.

    Not if Buildkite did not answer us either. Not with exit status 0: the agent exits so after Buildkite answered 404,
    409, 429 or 5xx until the agent gave up. Source: the agent's agent_worker.go

    A broken agent ends quickly, maybe before our next call to Buildkite. So a quick failure counts too.
    """
    is_quick = ended["exit_status"] and now - ended["claimed_at"] <= QUICK_FAULT_SECONDS
    return bool(ended["counted"] or is_quick) and ended["exit_status"] != 0


def hold_seconds(failures: int) -> float:
    """Seconds for which a worker gets no job after one more failure; `failures`: those before it, in a row."""
    return min(HOLD_SECONDS * 2.0 ** min(failures, 16), MAX_HOLD_SECONDS)


def clear_failures(worker: WorkerRow | None) -> WorkerRow | None:
    """The worker's agent acquired a job: reset its failures. None if there are none."""
    if worker is None or not (worker.held_until > 0 or worker.faults):
        return None
    return dataclasses.replace(worker, failures=0, held_until=0.0, faults=0, fault_at=None)


def clear_machine_holds(worker: WorkerRow) -> WorkerRow:
    """An operator resumes the worker: end its backoff, and its wait for a person to look at it."""
    return dataclasses.replace(clear_failures(worker) or worker, resumed=worker.needs_person)


def failed_too_often(job: Job, max_attempts: int, now: float) -> bool:
    """Whether the job had enough failed attempts, and these were on several hosts or began ONE_HOST_SECONDS ago."""
    counted = [ended for ended in job.tries if ended["counted"]]
    if job.attempts < max_attempts or not counted:
        return False
    hosts = {ended.get("host") or ended["worker"] for ended in counted}  # some workers do not report a host
    return len(hosts) > 1 or now - counted[0]["claimed_at"] >= ONE_HOST_SECONDS


def finish_detail(job: Job) -> str:
    """The text on the build page of a job that we finish: each attempt, its worker, and the agent's last words."""
    lines = [f"No agent acquired this job in {job.attempts} attempts, so its stack gave up."]
    for ended in job.tries:
        if ended["counted"]:
            by = by_name(ended["worker"]) + (f" on {ended['host']}" if ended.get("host") else "")
            seconds = ended["ended_at"] - ended["claimed_at"]
            lines.append(f"{rfc3339(ended['claimed_at'])} {by}, {seconds:.0f} s: {ended['reason']}")
    return "\n".join(lines)


# -- holds: rows that say "not now"


class Frozen(NamedTuple):
    """The freeze window that holds a job: its name and its end."""

    window: str
    until: float


#: Target and reason of the hold that suspends the policy.
POLICY_TARGET, POLICY_OFF = "policy:*", "policy_off"
#: Reasons of operators' holds. `drained` means `paused`, and an operator waits until all jobs there have ended.
PAUSED, DRAINED = "paused", "drained"


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """Something that says "not now": its target, owner, reason, begin and, if known, end."""

    #: "job:<uuid>", "worker:<name>", "host:<name>", "queue:<key>", "tag:<key>=<value>", all but the first with `*` as
    #: a wildcard; "tokens:<queue>"; "policy:*", which suspends the policy. An unknown kind holds everything.
    target: str
    #: Only the owner may lift it: "buildkite", "machine", "operator"; for jobs also "freeze" and "policy".
    owner: str
    reason: str
    since: float | None = None
    until: float | None = None
    #: For an operator's hold: who (the caller's own statement) and why.
    by: str = ""
    note: str = ""

    def __str__(self) -> str:
        """For people: "paused by ann@build1 since 2026-11-21T14:02:00Z: disk swap"."""
        times = "".join(
            f" {word} {rfc3339_seconds(at)}" for word, at in (("since", self.since), ("until", self.until)) if at
        )
        return f"{self.reason} by {self.by or f'the {self.owner}'}{times}" + (f": {self.note}" if self.note else "")


#: In the list of acts: a hold of an operator has ended by itself.
EXPIRED = "expired"


class OperatorAct(NamedTuple):
    """One act of an operator, for the list of acts."""

    at: float
    #: The operator, by the caller's own statement.
    by: str
    #: The verb: "pause", "drain", "resume", "stop", "allow", "first", "run", "forget", "policy_off", "policy_on"; or
    #: EXPIRED, when the time of a hold is over.
    act: str
    target: str
    note: str


def hold_of(row: Mapping[str, Any]) -> Hold:
    """A hold from another scheduler's report. Unknown fields of a newer scheduler are ignored."""
    return Hold(**{field.name: row[field.name] for field in dataclasses.fields(Hold) if field.name in row})


def is_hold(row: object) -> bool:
    """Whether `hold_of` can read it."""
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("target", "owner", "reason"))


class Holds(NamedTuple):
    """The table of holds, and its version. A claim that was decided with an older version is decided again."""

    version: object
    rows: tuple[Hold, ...]

    def of(self, target: str, *owners: str) -> list[Hold]:
        """The holds of these owners on exactly this target."""
        return [hold for hold in self.rows if hold.target == target and hold.owner in owners]


def combine_holds(found: Hold | None, wanted: Hold, *, replace: bool, now: float) -> Hold:
    """The hold to store when `wanted` is set and `found` exists: it never ends earlier, unless `replace`."""
    if found is None or is_over(found, now) or replace:
        return wanted
    if found.until is None or (wanted.until is not None and wanted.until <= found.until):
        return found
    return dataclasses.replace(wanted, since=found.since)


def is_over(hold: Hold, now: float) -> bool:
    return hold.until is not None and hold.until <= now


def blocked(
    job: Job | RuleSet | None, worker: WorkerRow | Worker | None, holds: Iterable[Hold], now: float
) -> Hold | None:
    """The hold that keeps this job from this worker now, or None. A RuleSet stands for its jobs that are not held.

    Claims and the answers to "why does this job wait" both use it, so they never differ. It does not compare tags.
    """
    if isinstance(job, Job) and job.held_by and not is_passed(job, job.held_by):
        reason, note = job.held_reason or "", job.held_note or ""
        return Hold(f"job:{job.uuid}", job.held_by, reason, until=job.held_until, note=note)
    if isinstance(worker, WorkerRow) and worker.held_until > now:
        since = min(now, worker.held_until - hold_seconds(max(0, worker.failures - 1)))
        if worker.worked_at is not None and worker.worked_at + UNJUDGED_SECONDS == worker.held_until:
            since = worker.worked_at  # its agent has just failed, and Buildkite has not said yet whether the job ran
        return Hold(f"worker:{worker.name}", "machine", "workers_failing", since, worker.held_until)
    if isinstance(worker, WorkerRow) and worker.needs_person not in ("", worker.resumed):
        target = f"worker:{worker.name}"
        return Hold(target, "machine", "workers_unfit", worker.told_since, note=worker.told_reason)
    in_force = (hold for hold in holds if not is_over(hold, now) and not is_passed(job, hold.owner))
    return next((hold for hold in in_force if binds(hold, job, worker)), None)


# -- hosts with failures

#: The reason of a host's hold.
QUARANTINED = "quarantined"
#: Name of the problem that agents on many hosts end without acquiring.
CANNOT_ACQUIRE = "agents_cannot_acquire"


class HostFailures(NamedTuple):
    """Hosts on which agents lately ended without acquiring, where neither Buildkite nor the job was the cause."""

    #: By host: its workers whose last agent failed, since a job last ran on the host.
    slots: Mapping[str, Sequence[WorkerRow]]
    #: By host, for all hosts seen in the last day: its number of workers.
    sizes: Mapping[str, int]

    @property
    def is_widespread(self) -> bool:
        """Whether so many hosts have failures that the hosts are not the cause."""
        return len(self.slots) > max(1.0, WIDESPREAD * len(self.sizes))

    @property
    def text(self) -> str:
        """The problem as text; "" if it is not widespread."""
        if not self.is_widespread:
            return ""
        first = ", ".join(sorted(self.slots)[:5])
        return (
            f"{CANNOT_ACQUIRE}: on {len(self.slots)} of {len(self.sizes)} hosts agents ended within the last "
            f"{FAULT_SECONDS / 60:.0f} min without acquiring their jobs ({first}), so no host is quarantined: check "
            "the agents' last words (`why` shows them for a job), their version and their token"
        )


def find_host_failures(rows: Iterable[WorkerRow], now: float) -> HostFailures:
    """Find the hosts with failures. A worker without a host counts as its own host."""
    hosts: dict[str, list[WorkerRow]] = {}
    for row in rows:
        if last_sign_of(row) >= now - HOST_SECONDS:
            hosts.setdefault(row.host or row.name, []).append(row)
    slots = {}
    for host, members in hosts.items():
        since = max([now - FAULT_SECONDS, *(row.ran_at for row in members if row.ran_at)])
        if failed := [row for row in members if row.faults and (row.fault_at or 0.0) > since]:
            slots[host] = failed
    return HostFailures(slots, {host: len(members) for host, members in hosts.items()})


def quarantine_changes(found: HostFailures, holds: Holds, now: float) -> tuple[list[Hold], list[Hold]]:
    """The quarantines to set, and those to lift: all of them if the failures are widespread."""
    held = {hold.target: hold for hold in holds.rows if is_quarantine(hold)}
    if found.is_widespread:
        return [], list(held.values())
    new = []
    for host, failed in found.slots.items():
        enough = len(failed) >= min(QUARANTINE_AFTER, found.sizes[host])
        is_host = any(row.host for row in failed)
        if is_host and enough and sum(row.faults for row in failed) >= QUARANTINE_AFTER and f"host:{host}" not in held:
            names = ", ".join(sorted(row.name for row in failed)[:5])
            note = f"agents of {names} ended without acquiring their jobs, {QUARANTINE_AFTER} in a row"
            until = now + QUARANTINE_SECONDS
            new.append(Hold(f"host:{host}", "machine", QUARANTINED, now, until, note=note))
    return new, []


def is_quarantine(hold: Hold) -> bool:
    return (hold.owner, hold.reason) == ("machine", QUARANTINED)


def is_half_open(hold: Hold, now: float) -> bool:
    """Whether one claim may test if the host works again. The hold is still in the table, but holds nothing."""
    return is_quarantine(hold) and hold.until is not None and hold.until <= now < hold.until + TRY_SECONDS


def extend_quarantine(hold: Hold, now: float) -> Hold:
    """One claim tests the host: hold it again, twice as long as before. If that agent acquires, the hold ends."""
    seconds = min(2 * ((hold.until or now) - (hold.since or now)), MAX_QUARANTINE_SECONDS)
    return dataclasses.replace(hold, since=now, until=now + seconds)


def ended_quarantines(job: Job, holds: Holds) -> list[Hold]:
    """The quarantines that end because an agent acquired a job that was claimed after they began."""
    found = [hold for hold in holds.of(f"host:{job.host}", "machine") if is_quarantine(hold)]
    return [hold for hold in found if (job.claimed_at or 0.0) >= (hold.since or 0.0)]


def is_passed(job: Job | RuleSet | None, owner: str) -> bool:
    """Whether the job was allowed by an operator, so that this owner's holds do not hold it."""
    is_allowed = job.allowed if isinstance(job, RuleSet) else bool(job and job.allow)
    return is_allowed and owner in PEOPLE


def binds(hold: Hold, job: Job | RuleSet | None, worker: WorkerRow | Worker | None) -> bool:
    """Whether the hold's target includes this job or this worker."""
    kind, _, name = hold.target.partition(":")
    if kind == "policy":
        return False  # it only suspends the policy
    if kind == "queue":
        return job is not None and matches_pattern(job.queue_key, name)
    if kind == "tokens":  # Buildkite gives no tokens for this queue; only some workers need them
        return job is not None and name == job.queue_key and isinstance(worker, Worker) and worker.needs_token
    if kind in ("worker", "host"):
        named = worker and (worker.name if kind == "worker" else worker.host)
        return bool(named) and matches_pattern(named or "", name)
    if kind == "tag":
        return worker is not None and any(matches_pattern(tag, name) for tag in tags_of(worker))
    return True


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether the name equals the pattern. `*` is the only wildcard."""
    return name == pattern or ("*" in pattern and fnmatch.fnmatchcase(name, re.sub(r"[?[]", r"[\g<0>]", pattern)))


def tags_of(worker: WorkerRow | Worker) -> Collection[str]:
    """The worker's tags as key=value, without its queue."""
    return worker.tags.split(",") if isinstance(worker, WorkerRow) else worker.profile.tags


# -- periodic builds: from a due time to its build

#: Our word for a build that Buildkite does not show any more.
BUILD_GONE = "gone"
#: For `if_running`, a build in one of these states is over. A blocked one may wait forever for a person.
BUILD_OVER = frozenset({"passed", "failed", "canceled", "skipped", "not_run", BUILD_GONE, "blocked"})
#: A build stays in these states.
BUILD_ENDED = BUILD_OVER - {"blocked"}
#: After an unclear answer, search for the build only after this: by then Buildkite shows it.
UNCLEAR_SECONDS = 60.0
#: A due time is missed if its build was not begun within this.
MISSED_SECONDS = 60.0
#: If the clock goes back by more than this, it was wrong before, and times stored by it are ignored.
CLOCK_SECONDS_BACK = 24 * 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class PeriodicRow:
    """The stored row of a [[periodic]]."""

    name: str
    #: Its settings that determine the due times, as text.
    schedule: str = ""
    #: Due times up to this one are handled.
    looked_at: float = 0.0
    #: The start that is not finished: `mark`; `due_at`, None for one that an operator asked for, with `by` and `note`;
    #: `asked_at`: when we asked Buildkite, if it has not answered: there may be a build; `problem`.
    start: dict[str, Any] | None = None
    #: The last build: `mark`, `uuid`, `number`, `url`, `state`, `started_at`, `due_at`, `by`.
    build: dict[str, Any] | None = None
    #: The last start that made no build: `at`, `due_at`, `what` ("skipped", "missed", "refused"), `reason`.
    unstarted: dict[str, Any] | None = None
    #: How often Buildkite refused to make a build or gave no clear answer.
    failures: int = 0

    @property
    def is_unclear(self) -> bool:
        """Whether we asked Buildkite for a build and do not know if it exists."""
        return self.start is not None and self.start["asked_at"] is not None


class Timetable(NamedTuple):
    """The table of periodic builds, and its version. A change decided with an older version is decided again."""

    version: object
    rows: tuple[PeriodicRow, ...]

    def of(self, name: str) -> PeriodicRow | None:
        return next((row for row in self.rows if row.name == name), None)


def begun(name: str, schedule: str, before: PeriodicRow | None, now: float) -> PeriodicRow:
    """A schedule is new or was changed: earlier due times do not count. An unfinished start goes on."""
    return dataclasses.replace(before or PeriodicRow(name), schedule=schedule, looked_at=now)


def wanted(row: PeriodicRow, mark: str, due_at: float | None, by: str = "", note: str = "") -> PeriodicRow | None:
    """A build must be started: it is due, or an operator asks for it. It replaces an unfinished start.

    None: Buildkite may have made a build for the unfinished start, and we must know that first.
    """
    if row.is_unclear:
        return None
    start = {"mark": mark, "due_at": due_at, "by": by, "note": note, "asked_at": None, "problem": ""}
    return dataclasses.replace(row, start=start, looked_at=max(row.looked_at, due_at or 0.0))


def start_of(row: PeriodicRow | None, mark: str) -> tuple[PeriodicRow, dict[str, Any]] | None:
    """The row, and its unfinished start with this mark. None: another one has replaced it, or it is over."""
    return (row, row.start) if row and row.start and row.start["mark"] == mark else None


def asked(row: PeriodicRow | None, mark: str, now: float) -> PeriodicRow | None:
    """We are about to ask Buildkite for the build. None here and in the next three: as in `start_of`."""
    if not (found := start_of(row, mark)):
        return None
    row, start = found
    return dataclasses.replace(row, start=start | {"asked_at": now})


def built(row: PeriodicRow | None, mark: str, build: Mapping[str, Any], now: float) -> PeriodicRow | None:
    """Buildkite has made the build of this start."""
    if not (found := start_of(row, mark)):
        return None
    row, start = found
    kept = {name: start[name] for name in ("mark", "due_at", "by")}
    return dataclasses.replace(row, start=None, build={**kept, **build, "started_at": now}, unstarted=None)


def unanswered(row: PeriodicRow | None, mark: str, problem: str, *, is_clear: bool) -> PeriodicRow | None:
    """Buildkite did not make the build (`is_clear`), or may have made it. The start stays, to be tried again."""
    if not (found := start_of(row, mark)):
        return None
    row, start = found
    start = start | {"problem": problem} | ({"asked_at": None} if is_clear else {})
    return dataclasses.replace(row, start=start, failures=row.failures + 1)


def unstarted(row: PeriodicRow | None, mark: str, what: str, reason: str, now: float) -> PeriodicRow | None:
    """The start ends without a build."""
    if not (found := start_of(row, mark)):
        return None
    row, start = found
    ending = {"at": now, "due_at": start["due_at"], "what": what, "reason": reason}
    return dataclasses.replace(row, start=None, unstarted=ending)


def seen(row: PeriodicRow | None, uuid: str, state: str) -> PeriodicRow | None:
    """The last build has this state now. None: nothing changes."""
    if row is None or row.build is None or row.build["uuid"] != uuid or row.build["state"] == state:
        return None
    return dataclasses.replace(row, build=row.build | {"state": state})


# --- Scheduler settings ---


def whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def queue_keys(text: str) -> tuple[str, ...]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"{text!r} must name each queue once; write it like default,linux")
    # Source: https://buildkite.com/docs/pipelines/clusters/manage-queues
    if wrong := [key for key in keys if not re.fullmatch("[A-Za-z0-9_-]+", key)]:
        raise ValueError(f"{wrong[0]!r} is not a queue's key: Buildkite allows A-Z a-z 0-9 - _")
    return tuple(keys)


def host_and_port(text: str) -> tuple[str, int]:
    found = re.fullmatch(rf"({HOST}|{IPV6}|):(0|{PORT})", text)
    if not found:
        raise ValueError("is not host:port; write it like 127.0.0.1:18888, or :18888 for every IPv4 address")
    return found[1].strip("[]"), int(found[2])


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
        raise ValueError("holds a space or a character beyond ASCII: it cannot be a token")
    return text


def api_tokens(text: str) -> tuple[str, ...]:
    """One token, or several while they are replaced: separated by commas or lines."""
    found = tuple(token for part in text.splitlines() for token in map(str.strip, part.split(",")) if token)
    if text and not found:
        raise ValueError("holds only separators, no token; make one with: openssl rand -hex 32")
    return tuple(dict.fromkeys(map(secret, found)))


def first_label_of_host() -> str:
    return socket.gethostname().partition(".")[0]


@dataclasses.dataclass(frozen=True, slots=True)
class RedisAddress:
    """Address and login of Redis. `text` is a URL without user, password and options, for logs."""

    text: str
    #: Redis itself; with a `service`, the Sentinels, which know the address of the primary with that name.
    hosts: tuple[tuple[str, int], ...]
    service: str
    #: Prefix of every key; "": made from STACK_KEY.
    prefix: str
    #: Settings of redis-py: user, password, database and TLS; and those for the Sentinels. Both may hold a password.
    options: dict[str, Any] = dataclasses.field(repr=False)
    sentinel_options: dict[str, Any] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.text


REDIS_HOST = rf"({HOST})(?::({PORT}))?"
REDIS_URLS = (
    rf"(?:(?P<scheme>rediss?)://)?(?:(?P<login>[^/?#]*)@)?(?P<hosts>{REDIS_HOST})(?:/(?P<db>[0-9]{{0,3}}))?"
    r"(?:\?(?P<query>.*))?",
    rf"(?P<scheme>rediss?\+sentinel)://(?:(?P<login>[^/?#]*)@)?(?P<hosts>{REDIS_HOST}(?:,{REDIS_HOST})*)"
    r"/(?P<service>[A-Za-z0-9._-]+)(?:/(?P<db>[0-9]{0,3}))?(?:\?(?P<query>.*))?",
)
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


def redis_address(text: str) -> RedisAddress | None:
    """Read "redis:6379", "rediss://user:password@redis:6379/0?prefix=stack:" or the Sentinels' form; None for ""."""
    if not text:
        return None
    found = re.fullmatch(REDIS_URLS[0], text) or re.fullmatch(REDIS_URLS[1], text)
    if not found:
        # Do not quote the text, because it may contain a password.
        raise ValueError(
            "is not the address of one Redis; write it like redis:6379, rediss://user:password@redis:6379/0 or "
            "redis+sentinel://s1:26379,s2:26379/primary"
        )
    parts = found.groupdict("")
    scheme, db, service = parts["scheme"] or "redis", int(parts["db"] or 0), parts.get("service", "")
    more = dict(urllib.parse.parse_qsl(parts["query"], keep_blank_values=True))
    known = ["prefix", *(TLS_OPTIONS if "rediss" in scheme else ()), *(SENTINEL_OPTIONS if service else ())]
    if more.keys() - set(known):
        raise ValueError(f"has an option that is unknown with {scheme}; known are {', '.join(known)}")
    if more.get("ssl_cert_reqs", "none") not in ("none", "optional", "required"):
        raise ValueError("has an unknown ssl_cert_reqs; it may be none, optional or required")
    tls: dict[str, Any] = {name: more[name] for name in TLS_OPTIONS if name in more}
    if "rediss" in scheme:
        # Some versions of redis-py check the name in a certificate only on request.
        is_named = more.get("ssl_check_hostname") != "no" and more.get("ssl_cert_reqs") != "none"
        tls |= {"ssl": True, "ssl_check_hostname": is_named}
    default_port = 26379 if service else 6379
    hosts = [(host, int(port or default_port)) for host, port in re.findall(REDIS_HOST, parts["hosts"])]
    user, _, password = map(urllib.parse.unquote, parts["login"].partition(":"))
    place = ",".join(f"{host}:{port}" for host, port in hosts) + (f"/{service}" if service else "")
    return RedisAddress(
        text=f"{scheme}://{place}/{db}",
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

    #: A variable with this prefix must be a setting of ours. WORKER_ is the worker's, which may share our .env.
    PREFIXES: ClassVar = ("SCHEDULER_", "STACK_")

    buildkite_agent_token: str = setting(
        None, secret, "the cluster's agent token; not needed for [monitor] alone", secret=True, unless="STACK_FILE"
    )
    buildkite_agent_endpoint: str = setting("https://agent.buildkite.com/v3", http_url, "base URL of the Stacks API")
    scheduler_queues: tuple[str, ...] = setting("default", queue_keys, "queue keys, comma-separated; each gets a stack")
    stack_key: str = setting("", str, "stacks are called <STACK_KEY>-<queue>; empty: the host's first label")
    poll_interval: float = setting(
        "1s", in_range(duration, "200ms", "60s"), "how often each queue is listed; 4 times as often soon after new jobs"
    )
    redis_addr: RedisAddress | None = setting(
        "", redis_address, "Redis, for one or several schedulers that share a store; empty: SQLite", secret=True
    )
    state_directory: str = setting("./state", str, "where the SQLite store is")
    listen: tuple[str, int] = setting("127.0.0.1:18888", host_and_port, "address for workers; :18888 is all of IPv4")
    stack_api_token: tuple[str, ...] = setting(
        "", api_tokens, "token of workers, or several with commas; required if LISTEN is not loopback", secret=True
    )
    operator_token: tuple[str, ...] = setting(
        "", api_tokens, "token of operators, or several with commas; it cannot claim jobs", secret=True
    )
    viewer_token: tuple[str, ...] = setting(
        "", api_tokens, "token of people who only look, or several with commas", secret=True
    )
    buildkite_api_token: str = setting(
        "",
        secret,
        "API access token with full GraphQL access, for `stop` of running jobs; periodic builds also need its scope "
        "write_builds",
        secret=True,
    )
    buildkite_api_endpoint: str = setting(
        "https://api.buildkite.com/v2", http_url, "base URL of Buildkite's REST API, for periodic builds"
    )
    buildkite_graphql_endpoint: str = setting(
        "https://graphql.buildkite.com/v1", http_url, "URL of Buildkite's GraphQL API, for BUILDKITE_API_TOKEN"
    )
    tls_cert: str = setting("", str, "certificate (PEM, with its chain) for LISTEN; empty: no TLS")
    tls_key: str = setting("", str, "its key (PEM)")
    tls_client_ca: str = setting("", str, "CA (PEM); clients must then have a certificate from it")
    max_connections: int = setting(
        "6000", in_range(whole, "1", "1000000"), "above this, or the open-file limit minus 100, clients get 503"
    )
    webhook_token: str = setting("", secret, "token of Buildkite's webhook; empty: no POST /webhook", secret=True)
    reservation_seconds: int = setting("900", in_range(whole, "60", "3600"), "how long Buildkite keeps a job for us")
    lease_seconds: int = setting("30", in_range(whole, "1", "3600"), "a claim without a touch ends after this")
    acquire_seconds: int = setting("120", in_range(whole, "5", "3600"), "an agent has this long to acquire its job")
    max_attempts: int = setting("5", in_range(whole, "1", "100"), "failed attempts before a job is finished")
    policy_file: str = setting("", str, "your Python file that decides about each job before it may run; empty: none")
    stack_notifications: bool = setting("on", on_or_off, "on or off: show on the build page why a job waits")
    log_level: str = setting("info", log_level, "debug, info, warning or error")
    settings_file: str = setting(".env", str, "file from which SIGHUP reads LOG_LEVEL")
    stack_file: str = setting(
        "", str, "TOML with freeze windows, periodic builds and [monitor]; SIGHUP reads it again; empty: none"
    )

    def stack_key_of(self, queue_key: str) -> str:
        """The key of the queue's stack: characters that Buildkite does not allow become `-`; at most 80 characters."""
        key = re.sub(r"[^A-Za-z0-9_-]", "-", f"{self.stack_key or first_label_of_host()}-{queue_key}")
        if len(key) <= 80:
            return key
        return f"{key[:71]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    @property
    def stack_queues(self) -> tuple[str, ...]:
        """The queues that a stack is registered for: none without the cluster's token."""
        return self.scheduler_queues if self.buildkite_agent_token else ()

    def problems(self) -> list[str]:
        """Problems that no single variable shows."""
        found = []
        if self.redis_addr and not self.stack_key:
            found.append("STACK_KEY: is required with REDIS_ADDR: all schedulers that share it are one stack")
        if not is_loopback(self.listen[0]) and not self.stack_api_token:
            found.append(needs_token(self.listen[0] or "every IPv4 address"))
        found += shared_tokens(self)
        for read in (tls_context, stack_file_of):
            try:
                read(self)
            except SettingsError as error:
                found.append(str(error))
        if not found and not self.buildkite_agent_token and not stack_file_of(self).tables.monitor:
            found.append("BUILDKITE_AGENT_TOKEN: is required: cluster agent token; STACK_FILE has no [monitor]")
        return found


def is_loopback(host: str) -> bool:
    try:
        address = None if host == "localhost" else ipaddress.ip_address(host)
    except ValueError:
        return False  # a host's name, or empty: every IPv4 address
    return address is None or (getattr(address, "ipv4_mapped", None) or address).is_loopback


def needs_token(address: str) -> str:
    return (
        f"LISTEN: {address} is beyond this machine, so STACK_API_TOKEN is required; make one with: openssl rand -hex 32"
    )


def unsafe(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Warnings about settings that work but are not secure; each begins with the setting."""
    found = readable_secrets(Settings, environ)
    for name in ("buildkite_agent_endpoint", "buildkite_api_endpoint", "buildkite_graphql_endpoint"):
        endpoint = urllib.parse.urlsplit(getattr(settings, name))
        if endpoint.scheme == "http" and not is_loopback(endpoint.hostname or ""):
            problem = f"the token crosses the network unencrypted, to {endpoint.hostname}; use https"
            found.append(f"{name.upper()}: {problem}")
    monitor = stack_file_of(settings).tables.monitor
    if monitor and monitor.api_token_file and is_readable_by_all(monitor.api_token_file):
        found.append(
            f"STACK_FILE: every user of this host can read the secret in {monitor.api_token_file}; chmod 600 it"
        )
    return found + (unsafe_redis(settings.redis_addr) if settings.redis_addr else [])


def unsafe_redis(address: RedisAddress) -> list[str]:
    found = []
    if "ssl" not in address.options and (beyond := [host for host, _ in address.hosts if not is_loopback(host)]):
        found.append(f"jobs, and its password, cross the network unencrypted, to {beyond[0]}; use rediss")
    if address.options.get("ssl_check_hostname") is False:
        found.append("the certificate, or the name in it, is not checked: another server can pose as Redis")
    if (key := address.options.get("ssl_keyfile")) and is_readable_by_all(key):
        found.append(f"every user of this host can read the secret in {key}; chmod 600 it")
    return [f"REDIS_ADDR: {problem}" for problem in found]


def shared_tokens(settings: Settings) -> list[str]:
    """Problems: a token in two settings. A build that steals a worker's token could then act as an operator."""
    names = ("stack_api_token", "operator_token", "viewer_token")
    return [
        f"{other.upper()}: has a token of {one.upper()} too; give each its own, made with: openssl rand -hex 32"
        for one, other in itertools.combinations(names, 2)
        if {*getattr(settings, one)} & {*getattr(settings, other)}
    ]


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The context from the TLS files, read now; None without TLS_CERT. Raises SettingsError if they cannot be used."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if bool(cert) != bool(key) or (client_ca and not cert):
        raise SettingsError("TLS_CERT, TLS_KEY: TLS needs both, and TLS_CLIENT_CA needs TLS")
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password argument OpenSSL would ask at the terminal for the password of an encrypted key.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise SettingsError(f"TLS_CERT, TLS_KEY: {cert} and {key} are not a certificate and its key: {error}") from None
    try:
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise SettingsError(f"TLS_CLIENT_CA: {client_ca} is not a CA certificate: {error}") from None
    return context


# --- Policy files ---
# The classes and functions that a user's `decide(job, fleet)` uses, and its process: this file, started with
# POLICY_CHILD. That process needs only Python, and nothing that follows this section.

#: The argument that makes this file the child process of a policy; next comes the file descriptor for its answers.
POLICY_CHILD = "policy-child"
#: Exit status of that process if the file does not load, or if `decide` cannot be ended otherwise.
EXIT_POLICY = 1
#: Seconds for `decide`, per job; then it gets an exception. If it catches that, its process ends so much later.
DECIDE_SECONDS, STUBBORN_SECONDS = 1.0, 0.5
#: Seconds: limits and default of a policy's hold; limits and default of `avoid`.
HOLD_RANGE, HOLD_DEFAULT = (5.0, 3600.0), 60.0
AVOID_RANGE, AVOID_DEFAULT = (1.0, 3600.0), 60.0
#: Longest reason that a policy may give.
WHOLE_REASON_LETTERS = 4000
#: Characters of a reason that are stored; most rules to add or to avoid; largest priority.
REASON_LETTERS, ADDED_RULES, MOST_PRIORITY = 500, 32, 10**9
#: Characters of a name in a reported error, and of the traceback that `decide <job>` shows.
TROUBLE_LETTERS, TRACEBACK_LETTERS = 120, 16_384
#: Greatest age in seconds of the fleet that a policy sees.
FLEET_AGE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """A policy's decision about a job. Made by `run`, `hold`, `refuse` and `succeed`, which check it."""

    verb: str
    reason: str = ""
    #: Length of the hold, or of `avoid`.
    seconds: float = 0.0
    require: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    priority: int | None = None

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Decision:
        """A decision from the child process. Raises ValueError or TypeError."""
        match dict(data):
            case {"verb": "run", "require": list(require), "avoid": list(avoid), "seconds": seconds, **more}:
                return run(require, avoid, seconds or AVOID_DEFAULT, more.get("priority"))
            case {"verb": "hold", "reason": reason, "seconds": seconds}:
                return hold(reason, seconds)
            case {"verb": "refuse", "reason": reason}:
                return refuse(reason)
            case {"verb": "succeed", "reason": reason}:
                return succeed(reason)
        raise ValueError("it is not a decision")


def run(
    require: Sequence[str] = (),
    avoid: Sequence[str] = (),
    for_seconds: float = AVOID_DEFAULT,
    priority: int | None = None,
) -> Decision:
    """The job may run, on a worker that matches its own rules and those of `require`.

    For `for_seconds` (1 to 3600), workers that match a rule of `avoid` do not get it; then they may.
    These rules may also use `host=` and `worker=`. `priority` changes only our line; without it the job's own counts.
    """
    if priority is not None and (not is_whole(priority) or abs(priority) > MOST_PRIORITY):
        raise ValueError(f"priority: a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}")
    seconds = seconds_in(for_seconds, AVOID_RANGE, "for_seconds") if avoid else 0.0
    rules = added_rules(require, "require"), added_rules(avoid, "avoid")
    return Decision("run", "", seconds, *rules, priority)


def hold(reason: str, seconds: float = HOLD_DEFAULT) -> Decision:
    """The job waits for 5 to 3600 seconds, reserved and in its place. Then the policy is asked again."""
    return Decision("hold", reason_of(reason), seconds_in(seconds, HOLD_RANGE, "seconds"))


def refuse(reason: str) -> Decision:
    """The job ends as failed, with this text on its build page."""
    return Decision("refuse", reason_of(reason))


def succeed(reason: str) -> Decision:
    """The job ends with exit status 0, as if it had run, with this text on its build page."""
    return Decision("succeed", reason_of(reason))


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def seconds_in(value: object, bounds: tuple[float, float], name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"{name}: a number from {bounds[0]:g} to {bounds[1]:g}")
    return float(value)


def reason_of(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > WHOLE_REASON_LETTERS:
        raise ValueError(f"reason: a text of 1 to {WHOLE_REASON_LETTERS} letters")
    return value  # not cut here: `safe_reason` would not recognize a part of a secret


def added_rules(value: object, name: str) -> tuple[str, ...]:
    """A policy's rules, checked and sorted. ValueError: too many, or not usable."""
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"{name}: a list of rules, as ['trust=low']")
    if len(value) > ADDED_RULES:
        raise ValueError(f"{name}: at most {ADDED_RULES} rules")
    rules = []
    for rule in value:
        if not isinstance(rule, str) or not rule.isprintable() or len(rule.encode()) > RULE_BYTES:
            raise ValueError(f"{name}: each rule is a printable text of at most {RULE_BYTES} bytes")
        key, equals, wanted = (part.strip() for part in rule.partition("="))
        if key in ("", "*", "queue"):
            raise ValueError(f"{name}: a rule names a tag, as 'trust=low', and not the queue")
        rules.append(f"{key}={wanted if equals and wanted else '*'}")
    return tuple(sorted(set(rules)))


@dataclasses.dataclass(frozen=True, slots=True)
class EarlierJob:
    """An earlier job of the same build, step and parallel index that the policy decided: this job may be its retry."""

    uuid: str
    #: Host and worker of its last claim; "": none or unknown.
    host: str
    worker: str
    #: Whether an agent acquired it.
    acquired: bool
    #: Its state or, when it is over, its outcome for the stack: `ran`, `dropped`, `failed`, `stopped`, `refused`,
    #: `succeeded`. Only Buildkite knows whether its command failed.
    ended: str


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyJob:
    """The job that a policy must decide; read-only."""

    uuid: str
    queue: str
    #: Its agent query rules, as Buildkite lists them, and as a mapping: {"arch": "amd64"}.
    rules: tuple[str, ...]
    tags: Mapping[str, str]
    priority: int
    scheduled_at: datetime.datetime
    pipeline: str
    branch: str
    build_number: int | None
    step_key: str
    #: From its spec. `plugins` comes from BUILDKITE_PLUGINS, a list of {name: settings}.
    env: Mapping[str, str]
    command: str
    plugins: tuple[Any, ...]
    retry_count: int
    parallel_job: int | None
    #: The newest last.
    previous: tuple[EarlierJob, ...]
    #: For how many seconds the policy has held it without a break, by decisions or because it failed.
    held_for: float

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> PolicyJob:
        """A job from the scheduler's question."""
        env: Mapping[str, str] = types.MappingProxyType(data["env"])
        return cls(
            uuid=data["uuid"],
            queue=data["queue"],
            rules=tuple(data["rules"]),
            tags=types.MappingProxyType(dict(rule.partition("=")[::2] for rule in data["rules"])),
            priority=data["priority"],
            scheduled_at=datetime.datetime.fromtimestamp(data["scheduled_at"], datetime.UTC),
            pipeline=data["pipeline"] or "",
            branch=data["branch"] or "",
            build_number=data["build_number"],
            step_key=data["step_key"] or "",
            env=env,
            command=data["command"],
            plugins=plugins_of(env),
            retry_count=data["retry_count"] or 0,
            parallel_job=data["parallel_job"],
            previous=tuple(EarlierJob(**each) for each in data["previous"]),
            held_for=data["held_for"],
        )


def plugins_of(env: Mapping[str, str]) -> tuple[Any, ...]:
    """The plugins in a job's environment; empty if they cannot be read."""
    try:
        plugins = json.loads(env.get("BUILDKITE_PLUGINS") or "[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(plugins) if isinstance(plugins, list) else ()


@dataclasses.dataclass(frozen=True, slots=True)
class FleetWorker:
    """A live worker, for a policy."""

    name: str
    host: str
    #: A `WorkerState`: working, paused, failing, unfit, idle, away.
    state: str
    queues: frozenset[str]
    #: As "key=value".
    tags: frozenset[str]

    def matches(self, rule: str) -> bool:
        key, _, wanted = (part.strip() for part in rule.partition("="))
        if key == "queue":
            return wanted in self.queues
        own = {"host": self.host, "worker": self.name}.get(key)
        if wanted in ("", "*"):
            return bool(own) or any(tag.partition("=")[0] == key for tag in self.tags)
        return own == wanted or f"{key}={wanted}" in self.tags


class PolicyFleet:
    """The fleet, at most one second old; read from the scheduler only when a policy uses it. Read-only."""

    __slots__ = ("_ask", "_asked_at", "_told", "_workers")

    def __init__(self, ask: Callable[[], Mapping[str, Any]]):
        """`ask` gets it from the scheduler."""
        self._ask, self._asked_at = ask, -math.inf
        self._told: Mapping[str, Any] = {}
        self._workers: tuple[FleetWorker, ...] = ()

    def _known(self) -> Mapping[str, Any]:
        if time.monotonic() - self._asked_at > FLEET_AGE_SECONDS * 0.9:
            answer = self._ask()
            self._asked_at = time.monotonic() - answer["age"]
            self._told = answer
            self._workers = tuple(
                FleetWorker(name, host, state, frozenset(queues), frozenset(tags))
                for name, host, state, queues, tags in answer["workers"]
            )
        return self._told

    def workers(self, *rules: str) -> tuple[FleetWorker, ...]:
        """The live workers that match all of these rules: "zone=b", "gpu=*", "queue=deploy", "host=a", "worker=a-1"."""
        self._known()
        return tuple(each for each in self._workers if all(each.matches(rule) for rule in rules))

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of jobs by state: reserving, ready, leased, running."""
        return types.MappingProxyType(self._known()["counts"])

    @property
    def waiting(self) -> Mapping[str, int]:
        """The number of waiting jobs by rule set: {"queue=default,arch=amd64": 3}."""
        return types.MappingProxyType(self._known()["waiting"])

    @property
    def time(self) -> float:
        """Now, in Unix seconds of the scheduler's clock."""
        return float(self._known()["time"]) + time.monotonic() - self._asked_at

    def now(self, zone: str = "UTC") -> datetime.datetime:
        """The time in a zone: `fleet.now("Europe/Berlin").hour`."""
        import zoneinfo  # noqa: PLC0415  few policies need it

        return datetime.datetime.fromtimestamp(self.time, zoneinfo.ZoneInfo(zone))


class DecideTimeout(BaseException):
    """`decide` took too long. Not a subclass of Exception, so that `except Exception` does not catch it."""


class PolicyChild:
    """The child process: it loads a policy once, and decides about one job after the other until its input ends."""

    def __init__(self, answers: int):
        """`answers`: the file descriptor for answers. The policy's output goes elsewhere, and it cannot read our
        input."""
        os.set_inheritable(answers, False)
        self._answers = answers
        self._asks = os.fdopen(os.dup(0), "rb")
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        self._path = ""
        self._is_late = False
        self._fleet = PolicyFleet(self._ask_for_fleet)

    def run(self) -> int:
        # The scheduler kills us, or our input ends. Ignore other signals: a stop of the unit is no policy failure.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, self._late)
        question = self._next()
        if question is None:
            return 0
        self._path = question["path"]
        try:
            decide = loaded_policy(self._path, question["source"].encode("latin-1"))
        except BaseException as error:
            self._answer(self._trouble(error))
            return EXIT_POLICY
        self._answer({"loaded": True})
        while (question := self._next()) is not None:
            self._answer(self._decide(decide, question))
        return 0

    def _next(self) -> dict[str, Any] | None:
        line = self._asks.readline()
        return dict(json.loads(line)) if line.endswith(b"\n") else None

    def _answer(self, answer: Mapping[str, Any]) -> None:
        # Write out the policy's output before the answer.
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        text = memoryview(json.dumps(answer).encode() + b"\n")
        while text:
            text = text[os.write(self._answers, text) :]

    def _decide(
        self, decide: Callable[[PolicyJob, PolicyFleet], object], question: Mapping[str, Any]
    ) -> dict[str, Any]:
        try:
            try:
                self._start_timer()
                decision = decide(PolicyJob.read(question), self._fleet)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            if not isinstance(decision, Decision):
                raise TypeError(f"decide() returned {type(decision).__name__}; it must return run(), hold(), ...")
        except BaseException as error:  # also SystemExit: we must answer about the next job
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            return self._trouble(error, getattr(decide, "__code__", None))
        return {"decision": dataclasses.asdict(decision)}

    def _start_timer(self) -> None:
        self._is_late = False
        signal.setitimer(signal.ITIMER_REAL, DECIDE_SECONDS, STUBBORN_SECONDS)

    def _late(self, number: int, frame: object) -> None:
        if self._is_late:
            os._exit(EXIT_POLICY)  # the policy has caught DecideTimeout
        self._is_late = True
        raise DecideTimeout

    def _ask_for_fleet(self) -> Mapping[str, Any]:
        """Stop the timer while the scheduler answers: that time does not count for the policy."""
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0.0)
        self._answer({"fleet": True})
        answer = self._next()
        if answer is None:
            os._exit(0)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, STUBBORN_SECONDS)
        return answer

    def _trouble(self, error: BaseException, code: types.CodeType | None = None) -> dict[str, Any]:
        """An error's type, file and line; not its text, which may contain secrets. `traceback`: for operators."""
        import traceback  # noqa: PLC0415  most policies never need it

        place: tuple[str, int] | None = None
        if isinstance(error, SyntaxError) and error.filename == self._path:
            place = self._path, error.lineno or 0
        frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
        frames = [frame for frame in frames if os.path.exists(frame[0])]  # a policy can make up a file name
        own = [frame for frame in frames if frame[0] == self._path]
        in_code = [(code.co_filename, code.co_firstlineno)] if code else []
        file, line = place or (own or in_code or frames or [("?", 0)])[-1]
        text = "".join(traceback.format_exception(error))
        return {
            "trouble": {
                "type": "took too long" if isinstance(error, DecideTimeout) else name_of(type(error))[:TROUBLE_LETTERS],
                "file": os.path.basename(file)[:TROUBLE_LETTERS],
                "line": line,
            },
            "traceback": text[-TRACEBACK_LETTERS:],
        }


def name_of(error: type[BaseException]) -> str:
    """The name of the exception's class, or of its first base class, that exists in a module: others may be made up."""
    for kind in error.__mro__:
        found: object = sys.modules.get(kind.__module__)
        for name in kind.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is kind:
            return kind.__qualname__
    return "exception"


def loaded_policy(path: str, source: bytes) -> Callable[[PolicyJob, PolicyFleet], object]:
    """The function `decide` of a policy file with this source text. Raises the errors of the file."""
    import linecache  # noqa: PLC0415

    text = source.decode("utf-8", "replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    module = types.ModuleType("policy")
    module.__file__ = path
    vars(module).update(run=run, hold=hold, refuse=refuse, succeed=succeed)
    sys.modules["policy"] = module
    sys.path.insert(0, os.path.dirname(path))
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    decide = vars(module).get("decide")
    if not callable(decide):
        raise TypeError("there is no function decide(job, fleet)")
    return decide  # type: ignore[no-any-return]


if IS_COMMAND and sys.argv[1] == POLICY_CHILD:
    sys.exit(PolicyChild(int(sys.argv[2])).run())


# --- Commands ---
# A command calls a running scheduler over HTTP. It needs only Python, and nothing that follows this section.

#: Exit statuses of commands: not done (with a reason); for `status` (as for monitoring plugins): something is wrong;
#: unknown arguments. 0: done.
EXIT_UNDONE, EXIT_WRONG, EXIT_USAGE = 1, 2, 64
#: Timeout of a call, and seconds between two checks of `drain`.
DESK_SECONDS, WATCH_SECONDS = 10.0, 1.0
#: Timeout of a call for which the scheduler fetches a job's spec, loads the policy and asks it.
DECIDING_SECONDS = 60.0
#: How long `run` waits for its build, and seconds between two checks.
RUN_SECONDS, RUN_LOOK_SECONDS = 20.0, 0.2
#: Width of wrapped text without a terminal (tables are not cut then); least width of a column that is cut.
SCREEN_COLUMNS, CELL_LETTERS = 80, 6
#: Most rows of each kind in `status`, and of workers that cannot run a job in `why`, to fit one screen.
SCREEN_ROWS = 10
#: `status` warns about agents that Buildkite supports for at most so many more days.
SUPPORT_DAYS = 60
#: Worker states that need attention; reasons of waiting jobs that need it when a job is so many seconds old.
WRONG_STATES = ("failing", "unfit", "offline")
WRONG_WHYS, WRONG_SECONDS = ("no_worker", "rules_not_understood", "put_aside", "policy_failed"), 60
COLOURS = {
    **dict.fromkeys(("wrong", *WRONG_STATES, *WRONG_WHYS), "31"),
    **dict.fromkeys(("paused", "drained", "held"), "33"),
    **dict.fromkeys(("working", "fine"), "32"),
}


class CommandFailed(Exception):
    """A command failed. The message is for people; `code` is from the scheduler's answer or the command itself."""

    def __init__(self, message: str, code: str = "undone"):
        super().__init__(message)
        self.code = code


class SchedulerUnreachable(CommandFailed):
    """No scheduler answered, or it cannot answer now. Another try may work."""


#: A command's arguments: options by name ("1" for one without a value); its main argument has the name "".
Asked = Mapping[str, str]


class SchedulerClient:
    """A client for operators' calls to a scheduler."""

    def __init__(self, asked: Asked, environ: Mapping[str, str]):
        """Raises SettingsError and ValueError if the settings cannot be used."""
        self.server = server_of(asked, environ)
        self._parts = urllib.parse.urlsplit(self.server)
        self._tls = client_tls("--server" not in asked, environ) if self._parts.scheme == "https" else None
        names = ("OPERATOR_TOKEN", "VIEWER_TOKEN")
        tokens = (read_as(name, api_tokens, read_variable(name, True, environ)) for name in names)
        self._token = next((found[0] for found in tokens if found), "")
        self._operator = operator_name(environ).encode("ascii", "replace").decode()

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """The route's answer. Raises CommandFailed with the scheduler's message, and SchedulerUnreachable."""
        headers = {"X-Operator": self._operator}
        headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        try:
            with closing(self._connection(seconds or DESK_SECONDS)) as connection:
                data = json.dumps(body) if body is not None else None
                connection.request(method, self._parts.path.rstrip("/") + path, data, headers)
                response = connection.getresponse()
                status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise SchedulerUnreachable(
                f"no scheduler answers at {self.server}: {reason}; set its address with --server"
            ) from None
        try:
            answer = json.loads(text) if text.strip() else {}
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise CommandFailed(f"{method} {path}: {status} from {self.server}, which is not a scheduler's answer")
        if status >= 400:
            raise refusal_of(status, answer)
        return answer

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=seconds)
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=self._tls)

    def fleet(self) -> dict[str, Any]:
        return self.ask("GET", "/fleet")

    def job(self, uuid: str) -> dict[str, Any]:
        return self.ask("GET", f"/jobs/{uuid}")


def refusal_of(status: int, answer: Mapping[str, Any]) -> CommandFailed:
    """The scheduler's refusal as an error, with advice for the caller of the command."""
    code, message = str(answer.get("error", status)), str(answer.get("message", f"status {status}"))
    if status == 401:
        message += "; a command presents OPERATOR_TOKEN, or VIEWER_TOKEN (under the units: sudo stackctl)"
    if code == "not_found":
        message += "; is the scheduler older than this command?"
    if (nearest := answer.get("nearest")) and "the nearest" not in message:
        message += f"; the nearest: {', '.join(map(str, nearest))}"
    return (SchedulerUnreachable if status >= 500 else CommandFailed)(message, code)


def client_tls(is_here: bool, environ: Mapping[str, str]) -> ssl.SSLContext:
    """TLS for the call: a scheduler on this machine is known by its own certificate, another by WORKER_CA_FILE."""
    names = ("TLS_CERT", "TLS_CERT", "TLS_KEY") if is_here else ("WORKER_CA_FILE", "WORKER_TLS_CERT", "WORKER_TLS_KEY")
    anchor, certificate, key = (environ.get(name) for name in names)
    try:
        context = ssl.create_default_context(cafile=anchor or None)
        if certificate and key:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise SettingsError(f"{', '.join(dict.fromkeys(names))}: {error}") from None
    if is_here:
        # LISTEN is an address and the certificate has a name: compare the certificate itself instead.
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def operator_name(environ: Mapping[str, str]) -> str:
    """The operator's name for the list of acts: ann@build1, also under sudo."""
    name = environ.get("SUDO_USER") or ""
    with suppress(KeyError):
        name = name or pwd.getpwuid(os.getuid()).pw_name
    return f"{name or os.getuid()}@{first_label_of_host()}"


def read_as(name: str, parse: Callable[[str], Any], text: str) -> Any:
    """Parse the text of an option or variable; the ValueError contains its name."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def server_of(asked: Asked, environ: Mapping[str, str]) -> str:
    """The scheduler's URL: --server, else LISTEN's address. Raises ValueError."""
    if "--server" in asked:
        return http_url(asked["--server"])
    host, port = read_as("LISTEN", host_and_port, environ.get("LISTEN") or "127.0.0.1:18888")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{'https' if environ.get('TLS_CERT') else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


# -- output


class CommandResult(NamedTuple):
    """The result of a command: JSON for programs, lines for people, and the exit status."""

    answer: Mapping[str, Any]
    lines: Iterable[str]
    status: int = 0


def print_line(text: str) -> None:
    """Print a line. Control characters in texts of workers and notes are escaped."""
    parts = re.split(r"(\x1b\[(?:0|31|32|33)m)", text)
    line = "".join(part if number % 2 else plain(part) for number, part in enumerate(parts))
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def plain(value: object) -> str:
    """A value on one line, with `visible`; "" for None."""
    return "" if value is None else visible(str(value)).replace("\t", " ")


def coloured(text: str, word: str) -> str:
    colour = COLOURS.get(word)
    has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and has_colours else text


def columns() -> int | None:
    """The terminal's width; None if the output is not a terminal: then nothing needs to be cut."""
    return shutil.get_terminal_size((SCREEN_COLUMNS, 24)).columns if sys.stdout.isatty() else None


def table(header: Sequence[str], rows: Iterable[Sequence[object]], whole: Collection[str] = ()) -> Iterator[str]:
    """A table, cut to the terminal's width: widest columns first, none under CELL_LETTERS, none in `whole`."""
    cells = [list(header), *([plain(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    can_be_cut = [number for number, name in enumerate(header) if name not in whole]
    most = columns() or math.inf
    while sum(widths) + 2 * (len(widths) - 1) > most:
        widest = max(can_be_cut, key=lambda number: widths[number])
        if widths[widest] <= CELL_LETTERS:
            break
        widths[widest] -= 1
    for row in cells:
        cut_cells = [
            cell if len(cell) <= width else f"{cell[: width - 1]}…" for cell, width in zip(row, widths, strict=True)
        ]
        padded = [f"{text:{width}}" for text, width in zip(cut_cells, widths, strict=True)]
        padded[-1] = cut_cells[-1]
        yield "  ".join(coloured(text, cell.partition(":")[0]) for text, cell in zip(padded, row, strict=True))


def first_rows(header: Sequence[str], rows: Sequence[Sequence[object]], thing: str, where: str = "") -> Iterator[str]:
    """An empty line, a table of the first SCREEN_ROWS, and how many more there are and `where`."""
    yield ""
    yield from table(header, rows[:SCREEN_ROWS])
    if len(rows) > SCREEN_ROWS:
        yield f"and {counted(len(rows) - SCREEN_ROWS, thing)} more{where}"


def wrapped(word: str, text: str) -> Iterator[str]:
    """A word and a text, wrapped to the terminal's width."""
    width = columns() or SCREEN_COLUMNS
    lines = textwrap.wrap(plain(f"{word}: {text}"), width, subsequent_indent="  ", break_on_hyphens=False)
    yield coloured(word, word) + lines[0].removeprefix(word)
    yield from lines[1:]


def tell_json(answer: object) -> None:
    print_line(json.dumps(answer))


def clock_of(text: object) -> str:
    """A time from the scheduler in local time: 14:02, or 2026-11-21 14:02; "" for anything else."""
    try:
        at = datetime.datetime.fromisoformat(str(text)).astimezone()
    except ValueError:
        return ""
    return f"{at:%H:%M}" if at.date() == datetime.date.today() else f"{at:%Y-%m-%d %H:%M}"


def span(seconds: float | None) -> str:
    """ "45 s", "12 min", "3 h 5 min", "2 d 4 h"."""
    if seconds is None:
        return ""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def counted(count: int, thing: str) -> str:
    """ "1 worker", "2 workers"."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def hold_words(hold: Mapping[str, Any]) -> str:
    """ "paused by ann@build1 since 14:02 until 16:02: disk swap"."""
    words = [str(hold.get("reason") or "held"), "by", str(hold.get("by") or f"the {hold.get('owner')}")]
    for word in ("since", "until"):
        words += [word, clock_of(hold[word])] if hold.get(word) else []
    return " ".join(words) + (f": {hold['note']}" if hold.get("note") else "")


def holds_words(holds: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(f"{hold['target']} {hold_words(hold)}" for hold in holds)


# -- parts of the fleet


def workers_of(fleet: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every worker, by host and name."""
    return [worker for host in fleet["hosts"] for worker in host["workers"]]


def why_worker(worker: Mapping[str, Any]) -> str:
    """Why a worker is in its state, and who set it: its holds, else its reason."""
    reason = str(worker.get("reason") or "")
    by = str(worker.get("by") or "")
    return holds_words(worker.get("holds") or ()) or (f"{by}: {reason}" if by and reason else reason or by)


def nearest_of(name: str, known: Iterable[str]) -> str:
    """The names most similar to this one, as text: "; the nearest: build1-1"."""
    found = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; the nearest: {', '.join(found)}" if found else ""


def profile_of(worker: Mapping[str, Any]) -> Profile:
    return Profile.from_row(worker.get("queues") or (), worker.get("tags") or "")


def missing_tags(worker: Mapping[str, Any], rules: RuleSet) -> str:
    """Why a worker cannot run jobs with these rules, now or ever; "" if it can."""
    profile = profile_of(worker)
    if rules.queue_key not in profile.queue_keys:
        return f"it does not serve queue {rules.queue_key}"
    missing = sorted(rules.tags - profile.tags) + [f"{key}=*" for key in sorted(rules.keys - profile.keys)]
    as_worker = Worker(worker["name"], "", profile, host=worker.get("host") or "")
    missing += [f"{rule}, which the policy requires" for rule in sorted(rules.added) if not as_worker.meets(rule)]
    if missing or rules.unread:
        return f"it has no {', '.join([*missing, *sorted(rules.unread)])}"
    avoided = [rule for rule in sorted(rules.avoided) if as_worker.meets(rule)]
    return f"the policy avoids {', '.join(avoided)} for a time" if avoided else ""


def rules_of_job(job: Mapping[str, Any]) -> RuleSet:
    """A job's rules, including those of the policy."""
    return (
        RuleSet.read(job["rule_set"]) if job.get("rule_set") else RuleSet.of(job["queue_key"], job["agent_query_rules"])
    )


def why_job(job: Mapping[str, Any]) -> str:
    """ "workers_busy: all matching workers are busy: 3"; for a job that does not wait, its reason."""
    if not job.get("why"):
        return str(job.get("reason") or "")
    return f"{job['why']}: {job['why_text']}" if job.get("why_text") else str(job["why"])


# -- commands that only read


def show_status(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """One screen: first what is wrong and what to do. Ends with EXIT_WRONG if something is wrong."""
    try:
        fleet = desk.fleet()
    except CommandFailed as error:  # a monitor must not take this for "fine"
        answer = {"error": error.code, "message": str(error)}
        return CommandResult(answer, [coloured("wrong", "wrong") + f": {error}"], EXIT_WRONG)
    problems = fleet["wrong"]
    return CommandResult(fleet, status_lines(fleet, problems), EXIT_WRONG if problems else 0)


def status_lines(fleet: Mapping[str, Any], problems: Sequence[str]) -> Iterator[str]:
    for problem in problems[:SCREEN_ROWS]:
        yield from wrapped("wrong", problem)
    if len(problems) > SCREEN_ROWS:
        yield f"and {len(problems) - SCREEN_ROWS} more: -o json has them all"
    today = datetime.date.fromisoformat(fleet["now"][:10])
    for text in old_agents(fleet, str(today), str(today + datetime.timedelta(SUPPORT_DAYS + 1))):
        yield from wrapped("soon", text)
    counts = fleet["counts"]
    oldest = f", the oldest for {span(counts['oldest_wait_seconds'])}" if counts.get("oldest_wait_seconds") else ""
    word = "" if problems else coloured("fine", "fine") + ": "
    yield f"{word}{counts['waiting']} waiting{oldest}; {counts['leased']} leased, {counts['running']} running"
    queues = sorted(fleet["queues"], key=lambda queue: -(queue["oldest_wait_seconds"] or 0))
    yield from first_rows(QUEUE_HEADER, list(map(queue_row, queues)), "queue")
    hosts = sorted(map(host_row, fleet["hosts"]), key=lambda row: row[:2])
    yield from first_rows(HOST_HEADER, [row[1:] for row in hosts], "host", ": `workers` shows all")
    for hold in fleet["holds"][:SCREEN_ROWS]:
        yield f"held: {hold['target']} {hold_words(hold)}"
    for window in fleet.get("freezes", ())[:SCREEN_ROWS]:
        yield f"frozen: {window['name']} until {clock_of(window['until'])}, {counted(window['jobs'], 'job')} held"


QUEUE_HEADER = ("QUEUE", "WAITING", "AT WORK", "OLDEST", "WORKERS", "HELD")
HOST_HEADER = ("HOST", "WORKERS", "STATES", "HELD")


def queue_row(queue: Mapping[str, Any]) -> tuple[object, ...]:
    at_work, oldest = queue["leased"] + queue["running"], span(queue["oldest_wait_seconds"])
    return queue["queue"], queue["waiting"], at_work, oldest, queue["workers"], holds_words(queue["holds"])


def host_row(host: Mapping[str, Any]) -> tuple[bool, str, int, str, str]:
    """A sort key (first hosts with a hold, two machines, or a worker neither working nor idle), and the host's row."""
    states = collections.Counter(worker["state"] for worker in host["workers"])
    words = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    is_odd = states.keys() - {"working", "idle"} or host["holds"] or host["machines"] > 1
    return not is_odd, host["host"], len(host["workers"]), words, holds_words(host["holds"])


def fleet_problems(fleet: Mapping[str, Any]) -> list[str]:
    """Problems visible in the fleet, each as "what to do: what is wrong"."""
    found = []
    for state in WRONG_STATES:
        if workers := [worker for worker in workers_of(fleet) if worker["state"] == state]:
            first = workers[0]
            is_are = "is" if len(workers) == 1 else "are"
            why, since = first.get("reason") or why_worker(first), clock_of(first.get("since"))
            text = f"see `why {first['name']}`: {counted(len(workers), 'worker')} {is_are} {state}"
            if since:
                text += f" since {since}" if len(workers) == 1 else f", {first['name']} since {since}"
            found.append(f"{text}: {why}" if why else text)
    for row in fleet["stuck"]:
        found.append(f"see `why {row['uuid']}`: {counted(row['jobs'], 'job')} cannot run: {why_job(row)}")
    return found + old_agents(fleet, "0001-01-01", fleet["now"][:10])


def old_agents(fleet: Mapping[str, Any], first: str, end: str) -> list[str]:
    """Advice for agents whose support ends on a day from `first` to before `end`."""
    found: dict[tuple[str, str], list[str]] = {}
    for worker in workers_of(fleet):
        if first <= (until := worker.get("agent_supported_until") or "") < end:
            found.setdefault((worker["agent"], until), []).append(worker["name"])
    return [
        f"upgrade buildkite-agent {agent} of {counted(len(names), 'worker')}, like {names[0]}: its support ends {until}"
        for (agent, until), names in sorted(found.items())
    ]


def show_workers(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """All workers; with --why also what each can run, and why it has no job."""
    fleet = desk.fleet()
    workers = workers_of(fleet)
    if "--why" not in asked:
        return CommandResult({"workers": workers}, worker_table(workers))
    line = WaitingJobs.of(desk, fleet)
    return CommandResult({"workers": workers}, (text for worker in workers for text in worker_lines(worker, line)))


def worker_table(workers: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    header = ("WORKER", "HOST", "STATE", "SINCE", "AGENT", "JOB", "WHY")
    rows = (
        (w["name"], w["host"], w["state"], clock_of(w["since"]), w.get("agent"), w["job"], why_worker(w))
        for w in workers
    )
    return table(header, rows)


def show_jobs(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Jobs in line; with --state those in that state."""
    fleet = desk.fleet()
    jobs = fleet["jobs"]
    is_all = not asked.keys() & {"--queue", "--state"}
    if not is_all:
        known = {job["uuid"]: job for job in jobs}
        states = [asked["--state"]] if "--state" in asked else [JobState.READY, JobState.RESERVING]
        jobs = [known.get(job["uuid"], job) for state in states for job in page_all(desk, state, asked.get("--queue"))]
        if not jobs and "--queue" in asked:  # a queue of earlier settings may have jobs
            check_queue(asked["--queue"], [queue["queue"] for queue in fleet["queues"]])
    if since := SINCE.get(asked.get("--state", "")):
        header = ("JOB", "QUEUE", "SINCE", "WORKER", "LAST WORD")
        rows = ((j["uuid"], j["queue_key"], clock_of(j.get(since)), j.get("worker"), why_job(j)) for j in jobs)
        return CommandResult({"jobs": jobs}, table(header, rows, whole=("JOB", "SINCE")))
    jobs = sorted(jobs, key=lambda job: job.get("place") or math.inf)
    header = ("PLACE", "JOB", "QUEUE", "WAIT", "WHY")
    rows = ((j.get("place"), j["uuid"], j["queue_key"], span(j.get("wait_seconds")), why_job(j)) for j in jobs)
    waiting = fleet["counts"]["waiting"]
    rest = f"These are the first {len(jobs)} of {waiting}; --state ready shows all ready jobs."
    more = [rest] if is_all and waiting > len(jobs) else []
    return CommandResult({"jobs": jobs}, itertools.chain(table(header, rows, whole=("JOB", "WAIT")), more))


def check_queue(name: str, known: Collection[str]) -> None:
    """Raise CommandFailed if the scheduler has no queue of that name."""
    if name not in known:
        raise CommandFailed(f"there is no queue {name!r}{nearest_of(name, known)}", "no_match")


def show_freezes(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """The freeze windows, in force, next or over: which jobs each is for, and how many it holds."""
    answer = desk.ask("GET", "/freezes")
    header = ("WINDOW", "STATE", "FROM", "UNTIL", "JOBS", "OF", "WRITTEN")
    return CommandResult(answer, table(header, map(freeze_row, answer["freezes"]), whole=("STATE", "FROM", "UNTIL")))


def freeze_row(window: Mapping[str, Any]) -> tuple[object, ...]:
    kinds = (f"{name}: {', '.join(window[name])}" for name in ("queues", "pipelines", "branches") if window[name])
    state, times = window["state"].replace("_", " "), (clock_of(window["from"]), clock_of(window["until"]))
    return window["name"], state, *times, window["jobs"], "; ".join(kinds) or "all jobs", window["written"]


def show_periodic(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """The periodic builds: the next due time, the last build, and problems."""
    answer = desk.ask("GET", "/periodic")
    header = ("NAME", "PIPELINE", "NEXT", "LAST START", "STATE", "LAST BUILD", "PROBLEM")
    return CommandResult(
        answer, table(header, map(periodic_line, answer["periodic"]), whole=("NEXT", "LAST START", "LAST BUILD"))
    )


def periodic_line(row: Mapping[str, Any]) -> tuple[object, ...]:
    build, last_unstarted = row["build"] or {}, row["unstarted"] or {}
    problem = row["problem"] or (f"{last_unstarted['what']}: {last_unstarted['reason']}" if last_unstarted else "")
    times = clock_of(row["next_at"]), clock_of(build.get("started_at"))
    return row["name"], row["pipeline"], *times, build.get("state"), build.get("url"), problem


def run_periodic(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Start a periodic build now, and wait a while for Buildkite to make it."""
    name = asked[""]
    if "--dry-run" in asked:
        known = {row["name"]: row for row in desk.ask("GET", "/periodic")["periodic"]}
        if name not in known:
            raise CommandFailed(
                f"STACK_FILE has no [[periodic]] named {name!r}{nearest_of(name, known)}", "unknown_periodic"
            )
        return CommandResult(known[name], [f"{name}: a build of {known[name]['pipeline']} would be started"])
    path = f"/periodic/{urllib.parse.quote(name, safe='')}"
    answer = desk.ask("POST", f"{path}/run", {"note": asked["--note"]})
    ends_at = time.monotonic() + RUN_SECONDS
    while True:
        rows = [row for row in desk.ask("GET", "/periodic")["periodic"] if row["name"] == name]
        row: dict[str, Any] = rows[0] if rows else {}
        build, last_unstarted = row.get("build") or {}, row.get("unstarted") or {}
        start = row.get("start") or {}
        if build.get("mark") == answer["mark"]:
            return CommandResult(answer | {"build": build}, [f"{name}: build {build['number']}, {build['url']}"])
        if start.get("mark") != answer["mark"]:
            raise CommandFailed(
                f"{name}: {last_unstarted.get('reason') or 'another start has taken its place'}", "unstarted"
            )
        if start.get("problem") or time.monotonic() >= ends_at:
            text = f"{start.get('problem') or 'no answer yet'}; the scheduler tries again, see `periodic`"
            return CommandResult(answer | {"problem": text}, [f"{name}: {text}"], EXIT_UNDONE)
        time.sleep(RUN_LOOK_SECONDS)


#: The states of jobs that do not wait, and the field with the time of entering each.
SINCE: Mapping[str, str] = {"leased": "claimed_at", "running": "acquired_at", "done": "done_at"}


def page_all(desk: SchedulerClient, state: str, queue_key: str | None) -> Iterator[dict[str, Any]]:
    """All jobs in a state, in line order, page by page."""
    query: dict[str, object] = {"state": state, "limit": 1000} | ({"queue": queue_key} if queue_key else {})
    while True:
        page = desk.ask("GET", f"/queue?{urllib.parse.urlencode(query)}")
        yield from page["jobs"]
        if not page.get("next"):
            return
        query["after"] = page["next"]


def show_why(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """For a job: which workers could run it, and why they do not. For a worker or host: why it has no job."""
    about = asked[""]
    if UUID.fullmatch(about.lower()):
        job, fleet = desk.job(about.lower()), desk.fleet()
        workers = [worker | {"lacks": missing_tags(worker, rules_of_job(job))} for worker in workers_of(fleet)]
        could = [worker for worker in workers if not worker["lacks"]]
        return CommandResult(job | {"could_run": could}, job_lines(job, workers, could))
    fleet = desk.fleet()
    kind, _, name = worker_target(about).partition(":")
    if kind not in ("worker", "host"):
        raise CommandFailed(f"why takes a job, a worker or host:NAME, not {about}; `status` shows queues", "bad_target")
    hosts = {host["host"]: host for host in fleet["hosts"]}
    found = [worker for worker in workers_of(fleet) if worker["host" if kind == "host" else "name"] == name]
    if not found:
        known = hosts if kind == "host" else [worker["name"] for worker in workers_of(fleet)]
        raise CommandFailed(f"there is no {kind} {name!r}{nearest_of(name, known)}", "no_match")
    line = WaitingJobs.of(desk, fleet)
    answer: dict[str, Any] = {"workers": [worker | line.describe_rules(worker) for worker in found]}
    lines = [text for worker in found for text in worker_lines(worker, line)]
    if kind == "host":
        answer |= {"host": name, "holds": hosts[name]["holds"]}
        if (machines := hosts[name]["machines"]) > 1:
            lines.insert(0, f"host {name} is the name of {machines} machines: give each its own WORKER_HOST")
    return CommandResult(answer, lines)


class WaitingJobs(NamedTuple):
    """The waiting jobs: the first ones one by one, and all of them by rule set."""

    jobs: Sequence[Mapping[str, Any]]
    by_rules: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, desk: SchedulerClient, fleet: Mapping[str, Any]) -> WaitingJobs:
        """Read both from the scheduler: the fleet contains only the first jobs, which may all be for other workers."""
        return cls(fleet["jobs"], desk.ask("GET", "/stats")["waiting"])

    def first_for(self, worker: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Those of the first jobs that the worker can run."""
        return [job for job in self.jobs if not missing_tags(worker, rules_of_job(job))]

    def rules_for(self, worker: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The rows of `by_rules` whose jobs the worker can run."""
        return [row for row in self.by_rules if not missing_tags(worker, RuleSet.read(row["rules"]))]

    def describe_rules(self, worker: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker could run: which of the first jobs, and how many of all jobs."""
        count = sum(row["jobs"] for row in self.rules_for(worker))
        return {"could_run": self.first_for(worker), "could_run_jobs": count}


def worker_lines(worker: Mapping[str, Any], line: WaitingJobs) -> Iterator[str]:
    since = f" since {clock_of(worker['since'])}" if worker.get("since") else ""
    on = worker["host"] or "an unknown host"
    yield f"{worker['name']} on {on}: {coloured(worker['state'], worker['state'])}{since}"
    if worker.get("version"):
        yield f"  worker.py: {worker['version']}"
    if worker.get("agent"):
        until = worker.get("agent_supported_until")
        yield f"  agent: {worker['agent']}" + (f", supported until {until}" if until else "")
    queues = ", ".join(worker.get("queues") or ()) or "none known"
    yield f"  can run: jobs of queue {queues}, with {worker.get('tags') or 'no tags'}"
    yield f"  why: {why_it_has_nothing(worker, line)}"


def why_it_has_nothing(worker: Mapping[str, Any], line: WaitingJobs) -> str:
    if worker["job"]:
        return f"it has job {worker['job']}"
    if reason := why_worker(worker):
        return reason
    if worker["state"] == "away":
        return f"it does not claim; last seen {clock_of(worker.get('last_seen_at')) or 'never'}"
    rows = line.rules_for(worker)
    if not rows:
        waiting = sum(row["jobs"] for row in line.by_rules)
        return "no job waits" if not waiting else f"it can run none of the {counted(waiting, 'job')} in line"
    match = f"{counted(sum(row['jobs'] for row in rows), 'job')} in line would match"
    if jobs := line.first_for(worker):
        return f"{match}; the first, {jobs[0]['uuid']}: {why_job(jobs[0])}"
    return f"{match}, none of them among the first {len(line.jobs)}; the oldest, {rows[0]['uuid']}: {why_job(rows[0])}"


def job_lines(
    job: Mapping[str, Any], workers: Iterable[Mapping[str, Any]], could: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """`could`: the workers that could run the job; each of the others has the reason in `lacks`."""
    yield f"job {job['uuid']}: {job['state']}, {rules_of_job(job)}, priority {job['priority']}"
    if text := why_job(job):
        yield f"  why: {coloured(text, text.partition(':')[0])}"
    for act in ("stop", "allow", "first"):
        if word := job.get(act):
            texts = "; ".join(str(word[name]) for name in ("note", "message") if word.get(name))
            yield f"  {act}: said by {word['by'] or 'somebody'} at {clock_of(word['at'])}: {texts}"
    if job.get("ahead") is not None:
        yield f"  ahead of it, with the same rules: {job['ahead']}"
    if could:
        yield ""
        yield from worker_table(could)
    else:
        yield "  no worker could run it"
        nearly = [worker for worker in workers if worker["lacks"].startswith("it has no ")]
        for worker in sorted(nearly, key=lambda worker: worker["lacks"].count(","))[:SCREEN_ROWS]:
            yield f"  not {worker['name']}: {worker['lacks']}"
    yield ""
    for event in job.get("story", ()):
        by = f" by {event['worker']}" if event.get("worker") else ""
        reason = f": {event['reason']}" if event.get("reason") else ""
        yield f"  {clock_of(event['at'])} {event['what']}{by}{reason}"


# -- commands that act


def worker_target(text: str) -> str:
    """A target in the scheduler's form; a bare name is a worker. Raises CommandFailed."""
    kind, colon, name = text.partition(":")
    if not colon or kind not in ("worker", "host", "queue", "tag"):
        return f"worker:{text}"
    if not name or (kind == "tag" and "=" not in name):
        raise CommandFailed(
            f"{text!r} is not a target; write it like host:rack3-*, queue:linux or tag:gpu=a100", "bad_target"
        )
    return text


def pause_target(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Hold the target: from now on it gets no new jobs."""
    answer = set_hold(desk, asked, PAUSED)
    return CommandResult(answer, hold_lines(answer, asked))


def set_hold(desk: SchedulerClient, asked: Asked, reason: str) -> dict[str, Any]:
    body: dict[str, Any] = {"target": worker_target(asked[""]), "note": asked["--note"], "reason": reason}
    if "--for" in asked:
        body["seconds"] = duration(asked["--for"])
    body |= {name: True for option, name in {"--replace": "replace", "--dry-run": "dry_run"}.items() if option in asked}
    return desk.ask("POST", "/holds", body)


def hold_lines(answer: Mapping[str, Any], asked: Asked) -> Iterator[str]:
    hold, bound = answer["hold"], answer.get("binds") or {}
    word = "already " if answer.get("already") else "would be " if "--dry-run" in asked else ""
    yield f"{hold['target']}: {word}{hold_words(hold)}"
    parts = [counted(bound[f"{name}s"], name) for name in ("worker", "host", "queue", "job") if bound.get(f"{name}s")]
    yield f"  it holds {', '.join(parts) or 'nothing'} now, and later ones that match"


def drain_target(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Hold the target, and watch until no job is leased or running there."""
    target = worker_target(asked[""])
    if not target.startswith(("worker:", "host:")):
        raise CommandFailed(
            f"drain takes a worker or host:NAME, not {target}; pause holds queues and tags", "bad_target"
        )
    if "--cancel" in asked and "--deadline" not in asked:
        raise CommandFailed("--cancel is for the deadline: it needs --deadline", "bad_option")
    ends_at = time.monotonic() + duration(asked["--deadline"]) if "--deadline" in asked else math.inf
    answer, is_told = set_hold(desk, asked, DRAINED), "-o" not in asked
    lines = hold_lines(answer, asked)
    if "--detach" in asked or "--dry-run" in asked:
        return CommandResult(answer, lines)
    for line in lines if is_told else ():
        print_line(line)
    try:
        left, why_not = watch(desk, target, ends_at, is_told=is_told)
    except KeyboardInterrupt:
        raise CommandFailed(f"stopped watching; {target} stays drained until: resume {target}", "interrupted") from None
    stopped = [stop_job(desk, worker["job"], asked["--note"]) for worker in left if "--cancel" in asked]
    if why_not and is_told:
        for message in stopped:
            print_line(f"  {message}")
        raise CommandFailed(f"{target}: {why_not}")
    drained = f"{target}: drained, no job is leased or running there; it gets no jobs until: resume {target}"
    answer |= {"drained": not why_not, "message": why_not, "left": left, "stopped": stopped}
    return CommandResult(answer, [drained], EXIT_UNDONE if why_not else 0)


def watch(desk: SchedulerClient, target: str, ends_at: float, *, is_told: bool) -> tuple[list[dict[str, Any]], str]:
    """Wait until no worker held by `target` has a job. Else return the workers that have one, and why we gave up."""
    shown, has_begun = "", False
    left: list[dict[str, Any]] = []
    while True:
        try:
            fleet = desk.fleet()
            is_held = any(hold["target"] == target and hold["owner"] == OPERATOR for hold in fleet["holds"])
            if has_begun and not is_held:
                return [], "an operator has resumed it"
            has_begun = is_held  # the fleet's answer may be older than the hold
            bound = [w for w in workers_of(fleet) if any(hold["target"] == target for hold in w["holds"])]
            left = [worker for worker in bound if worker["job"]]
            if has_begun and not left:
                return [], ""
            text = f"{counted(len(left), 'job')} left: " + ", ".join(f"{w['job']} on {w['name']}" for w in left)
        except SchedulerUnreachable as error:  # for example it restarts: the hold stays
            text = f"{error}; tried again"
        if is_told and text != shown and (left or "tried again" in text):
            print_line(f"  {text}")
            shown = text
        if time.monotonic() >= ends_at:
            return left, f"the deadline is over; {text}"
        time.sleep(min(WATCH_SECONDS, max(0.0, ends_at - time.monotonic())))


def resume_target(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """End operators' holds of the target; with --quarantine also those that the machine set."""
    target, quarantine = worker_target(asked[""]), "--quarantine" in asked
    if "--dry-run" in asked:
        answer: dict[str, Any] = {"lifted": would_be_lifted(desk.fleet(), target, quarantine)}
    else:
        query = "?quarantine=1" if quarantine else ""
        answer = desk.ask("DELETE", f"/holds/{urllib.parse.quote(target, safe='')}{query}")
    if not answer["lifted"]:
        refuse_held_elsewhere(desk.fleet(), target)
        if "--dry-run" in asked:  # for an unknown target, this raises with similar names
            desk.ask("POST", "/holds", {"target": target, "note": "resume --dry-run", "dry_run": True})
    word = "would be resumed" if "--dry-run" in asked else "resumed"
    lines = [f"{hold['target']}: {word}; it was {hold_words(hold)}" for hold in answer["lifted"]]
    return CommandResult(answer, lines or [f"{target} is not held"])


def would_be_lifted(fleet: Mapping[str, Any], target: str, quarantine: bool) -> list[dict[str, Any]]:
    """The holds that a `resume` of the target would end."""
    owners = (OPERATOR, "machine") if quarantine else (OPERATOR,)
    held = [hold for hold in fleet["holds"] if hold["target"] == target and hold["owner"] in owners]
    for worker in bound_members(target, fleet) if quarantine else ():
        held += [h for h in worker["holds"] if h["owner"] == "machine" and h["target"].startswith("worker:")]
    return held


def bound_members(target: str, fleet: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The workers or queues of the fleet that a hold of this target holds."""
    hold = Hold(target, OPERATOR, "")
    if target.startswith("queue:"):
        return [queue for queue in fleet["queues"] if binds(hold, RuleSet.of(queue["queue"], ()), None)]
    as_workers = ((each, Worker(each["name"], "", profile_of(each), host=each["host"])) for each in workers_of(fleet))
    return [each for each, worker in as_workers if binds(hold, None, worker)]


def refuse_held_elsewhere(fleet: Mapping[str, Any], target: str) -> None:
    """Raise CommandFailed if workers or queues of the target are held by other holds."""
    if holds := {hold["target"]: hold for each in bound_members(target, fleet) for hold in each["holds"]}:
        message = f"no operator holds {target} itself, but: {holds_words(holds.values())}"
        raise CommandFailed(
            f"{message}; resume that target, with --quarantine if the machine set the hold", "held_elsewhere"
        )


def act_on_job(desk: SchedulerClient, asked: Asked, act: str) -> CommandResult:
    uuid = asked[""].lower()
    if not UUID.fullmatch(uuid):
        raise CommandFailed(f"{asked['']!r} is no job's uuid; `jobs` lists them", "bad_uuid")
    if "--dry-run" in asked:
        job = desk.job(uuid)
        answer: dict[str, Any] = {"uuid": uuid, "state": job["state"], "message": dry_run_lines(act, job)}
    else:
        answer = desk.ask("POST", f"/jobs/{uuid}/{act}", {"note": asked["--note"]})
    line = f"job {uuid} ({answer.get('state')}): {answer.get('message') or f'{act}: done'}"
    return CommandResult(answer, [line], EXIT_UNDONE if answer.get("reachable") is False else 0)


def stop_job(desk: SchedulerClient, uuid: str, note: str) -> str:
    """Stop one of several jobs; return the answer, or the failure, as text."""
    try:
        return f"job {uuid}: {desk.ask('POST', f'/jobs/{uuid}/stop', {'note': note}).get('message')}"
    except CommandFailed as error:
        return f"job {uuid} was not stopped: {error}"


#: The wait reasons that end when a job is allowed (besides a queue that operators paused).
PASSED_WHYS = ("undecided", "held_by_policy", "policy_failed", "prefers_elsewhere", "frozen", "workers_paused")


def dry_run_lines(act: str, job: Mapping[str, Any]) -> str:
    """What an act would do to a job now. Raises CommandFailed if the act would be refused."""
    state, worker = job["state"], job.get("worker") or "a worker without a name"
    if state == JobState.DONE:
        text = f"job {job['uuid']} is already over: {job.get('outcome')}, {job.get('reason')}; nothing would be changed"
        raise CommandFailed(text, "job_done")
    if act == "first":
        return "it would become the first in line"
    if act == "allow":
        text = "holds of operators, freezes and the policy would not hold it"
        is_held_so = job.get("why") in PASSED_WHYS or (job.get("why") == "queue_paused" and job.get("by") == OPERATOR)
        return text if is_held_so or not job.get("why") else f"{text}, but it waits for another reason: {why_job(job)}"
    return {
        JobState.LEASED: f"the claim of {worker} would be ended, and the job then finished at Buildkite",
        JobState.RUNNING: f"it would be cancelled, on {worker}",
    }.get(state, "it would be finished at Buildkite, with the note")


def decide_job(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """The policy's decision about a job; ends with 1 if the policy fails."""
    uuid = asked[""].lower()
    if not UUID.fullmatch(uuid):
        raise CommandFailed(f"{asked['']!r} is no job's uuid; `jobs` lists them", "bad_uuid")
    answer = ask_policy(desk, f"/jobs/{uuid}/decide", {})
    return CommandResult(answer, decision_lines(answer), EXIT_UNDONE if answer.get("failed") else 0)


def ask_policy(desk: SchedulerClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return desk.ask("POST", path, body, DECIDING_SECONDS)
    except CommandFailed as error:
        if error.code != "not_found":
            raise
        raise CommandFailed("POLICY_FILE is not set at the scheduler, so there is no policy", error.code) from None


def decision_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    if decision := answer.get("decision"):
        said = {name: value for name, value in decision.items() if value not in (None, "", []) and name != "verb"}
        if not said.get("seconds"):
            said.pop("seconds", None)
        yield f"job {answer['uuid']}: {decision['verb']}" + "".join(f", {n} {v}" for n, v in said.items())
    else:
        yield f"job {answer['uuid']}: the policy failed: {answer.get('failed')}"
    for name in ("traceback", "printed"):
        if text := str(answer.get(name) or "").strip():
            yield f"{name}:"
            yield from (f"  {line}" for line in text.splitlines())


def switch_policy(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Suspend the policy, or let it decide again."""
    body: dict[str, Any] = {"state": asked[""], "note": asked["--note"], "dry_run": "--dry-run" in asked}
    if "--for" in asked:
        body["seconds"] = duration(asked["--for"])
    answer = ask_policy(desk, "/policy", body)
    return CommandResult(answer, [("would be done: " if "--dry-run" in asked else "") + str(answer["message"])])


def forget_worker(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Forget a worker that is gone."""
    name = worker_target(asked[""]).removeprefix("worker:")
    if "--dry-run" in asked:
        known = [worker["name"] for worker in workers_of(desk.fleet())]
        if name not in known:
            raise CommandFailed(f"there is no worker {name!r}{nearest_of(name, known)}", "no_match")
        answer: dict[str, Any] = {"name": name, "message": "it would be forgotten"}
    else:
        answer = desk.ask("DELETE", f"/workers/{urllib.parse.quote(name, safe='')}")
    return CommandResult(answer, [f"worker {name}: {answer.get('message') or 'it is forgotten'}"])


# -- arguments and help


def show_commands(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """All commands."""
    listed = [(f"  {name} {each.usage}".rstrip(), f"      {each.text}") for name, each in COMMANDS.items()]
    return CommandResult(
        {"commands": [*COMMANDS]}, ["usage: scheduler.py COMMAND; for each: COMMAND --help", *sum(listed, ())]
    )


def show_completion(desk: SchedulerClient, asked: Asked) -> CommandResult:
    """Print the completion for bash, for the name that the installer gives this script (stackctl)."""
    cases = []
    for name, each in COMMANDS.items():
        options = [option for _, option, _ in OPTION.findall(f"{each.usage} {COMMON_OPTIONS}")]
        cases.append(f"        {name}) words='{' '.join(options)}' ;;")
    script = COMPLETION.format(commands=" ".join(COMMANDS), cases="\n".join(cases), states=" ".join(JobState))
    return CommandResult({"bash": script}, script.splitlines())


COMPLETION = """\
# Completion of stackctl for bash, as `stackctl completion` prints it.
_stackctl() {{
    local words='{commands}' number
    for ((number = 1; number < COMP_CWORD; number++)); do
        case ${{COMP_WORDS[number]}} in
{cases}
        *) continue ;;
        esac
        break
    done
    case ${{COMP_WORDS[COMP_CWORD - 1]}} in
    -o) words=json ;;
    --state) words='{states}' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}")
}}
complete -F _stackctl stackctl"""


class Command(NamedTuple):
    #: Its arguments and options; those in brackets are optional.
    usage: str
    text: str
    run: Callable[[SchedulerClient, Asked], CommandResult]


COMMANDS: Mapping[str, Command] = {
    "status": Command(
        "", "one screen: what is wrong, the oldest wait, queues, hosts; ends with 2 if something is wrong", show_status
    ),
    "workers": Command("[--why]", "each worker: host, state, since when, agent, job, why", show_workers),
    "jobs": Command("[--queue KEY] [--state STATE]", "jobs in line, with place, wait and reason", show_jobs),
    "freezes": Command("", "freeze windows: in force, next or over, until when, jobs held", show_freezes),
    "why": Command(
        "<job | worker | host:NAME>",
        "why a job waits, and which workers could run it; why a worker has no job",
        show_why,
    ),
    "pause": Command(
        "<target> --note TEXT [--for 2h] [--replace] [--dry-run]",
        "give no new jobs to a worker, host:NAME, queue:KEY or tag:KEY=VALUE; * is a wildcard",
        pause_target,
    ),
    "drain": Command(
        "<worker | host:NAME> --note TEXT [--deadline 1h] [--cancel] [--detach] [--dry-run]",
        "pause, and wait until no job runs there; ends with 1 at the deadline, --cancel stops the rest",
        drain_target,
    ),
    "resume": Command(
        "<target> [--quarantine] [--dry-run]",
        "end a pause or drain; with --quarantine also holds that the machine set",
        resume_target,
    ),
    **{
        act: Command("<job> --note TEXT [--dry-run]", text, functools.partial(act_on_job, act=act))
        for act, text in {
            "stop": "end a job; ends with 1 if it cannot be reached",
            "allow": "let a job run despite holds of operators, freezes and the policy",
            "first": "put a job first in our line",
        }.items()
    },
    "decide": Command(
        "<job>", "ask the policy about a job, and show its output and errors; changes nothing", decide_job
    ),
    "policy": Command(
        "<off | on> --note TEXT [--for 1h] [--dry-run]",
        "off: jobs that the policy has not decided run by their own rules, until that time or `on`",
        switch_policy,
    ),
    "periodic": Command("", "periodic builds: next time, last build, problems", show_periodic),
    "run": Command("<periodic> --note TEXT [--dry-run]", "start a periodic build now", run_periodic),
    "forget": Command("<worker> [--dry-run]", "forget a worker that is gone", forget_worker),
    "help": Command("", "lists the commands; each has --help", show_commands),
    "completion": Command("", "prints completion for bash", show_completion),
}
#: Options of every command.
COMMON_OPTIONS = "[--server URL] [-o json] [--help]"
OPTION = re.compile(r"(\[?)(--?[a-z-]+)(?: ([A-Za-z0-9]+))?")


def parse(words: Sequence[str], usage: str) -> dict[str, str]:
    """Parse a command's arguments. Raises ValueError."""
    takes_value = {name: bool(value) for _, name, value in OPTION.findall(f"{usage} {COMMON_OPTIONS}")}
    asked: dict[str, str] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "=", word)
        what = name or "what it is about"
        if name and name not in takes_value:
            raise ValueError(f"there is no option {name}{nearest_of(name, takes_value)}")
        if name in asked:
            raise ValueError(f"{what} is given twice: {asked[name]!r} and {value or name!r}")
        if takes_value.get(name, True):
            value = value if equals else (waiting or [""]).pop(0)
            if not value:
                raise ValueError(f"{what} is empty")
        elif equals:
            raise ValueError(f"{name} takes no value")
        asked[name] = value or "1"
    if "--help" not in asked:
        check_arguments(asked, usage)
    return asked


def check_arguments(asked: Asked, usage: str) -> None:
    """Raise ValueError if a required argument is missing, or a value is wrong."""
    for bracket, name, _ in OPTION.findall(usage):
        if not bracket and name not in asked:
            reason = ": the reason, for other operators" if name == "--note" else ""
            raise ValueError(f"{name} is missing{reason}")
    about = re.match(r"<(.+?)>", usage)
    if bool(about) is not ("" in asked):
        raise ValueError(f"name a {about[1]}" if about else f"{asked['']!r} is too much")
    for name, reads in (("--server", http_url), ("--for", duration), ("--deadline", duration)):
        if name in asked:
            read_as(name, reads, asked[name])
    for name, words in (("-o", ["json"]), ("--state", [*JobState])):
        if name in asked and asked[name] not in words:
            raise ValueError(f"{name} {asked[name]}: it may be {', '.join(words)}")


def command(words: Sequence[str]) -> int:
    """Run `scheduler.py status` and the like; returns the exit status: 0 only if it is done."""
    name, found = words[0], COMMANDS.get(words[0])
    if found is None:
        complain(f"scheduler.py: there is no command {name!r}{nearest_of(name, COMMANDS)}; `help` lists them")
        return EXIT_USAGE
    usage = f"usage: scheduler.py {' '.join(filter(None, (name, found.usage, COMMON_OPTIONS)))}"
    try:
        asked = parse(words[1:], found.usage)
    except ValueError as error:
        complain(f"scheduler.py {name}: {error}\n{usage}")
        return EXIT_USAGE
    if "--help" in asked:
        print_line(usage)
        print_line(found.text)
        return 0
    try:
        desk = SchedulerClient(asked, {**read_file(os.environ.get("SETTINGS_FILE") or ".env"), **os.environ})
    except (ValueError, SettingsError) as error:
        complain(f"scheduler.py {name}: {error}")
        return EXIT_SETTINGS
    try:
        return tell(found.run(desk, asked), "-o" in asked)
    except CommandFailed as error:
        if "-o" in asked:
            tell_json({"error": error.code, "message": str(error)})
        complain(f"{name}: {plain(error)}")
    except KeyboardInterrupt:
        complain(f"{name}: interrupted")
    except BrokenPipeError:  # the reader has ended: `jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_UNDONE


def tell(result: CommandResult, as_json: bool) -> int:
    if as_json:
        tell_json(result.answer)
    else:
        for line in result.lines:
            print_line(line)
    return result.status


if IS_COMMAND:
    sys.exit(command(sys.argv[1:]))


# --- Stack file and freezes ---
# STACK_FILE is TOML. Each of its tables is a dataclass below, and each key a field, declared with `key`.

#: A place in the file: ("freeze", 0, "from") is the key `from` of the first [[freeze]].
Place = tuple[str | int, ...]
#: A problem at a place of the file.
Problem = tuple[Place, str]


def key(parse: Callable[[Any], Any], default: Any = dataclasses.MISSING, *, name: str = "") -> Any:
    """Declare a key of a table: a parser of its TOML value, which may raise ValueError. Required without a default.

    `name`: the key, if it differs from the field's name.
    """
    return dataclasses.field(default=default, metadata={"parse": parse, "name": name})


def table_of(cls: type[Any]) -> Any:
    """Declare an optional [table]; the field is None without it."""
    return dataclasses.field(default=None, metadata={"table": cls, "is_list": False})


def tables_of(cls: type[Any]) -> Any:
    """Declare a [[table]] that may occur any number of times; the field is a tuple."""
    return dataclasses.field(default=(), metadata={"table": cls, "is_list": True})


def a_text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= STACK_FILE_LETTERS:
        raise ValueError(f"is {brief(value)}; it must be a text of 1 to {STACK_FILE_LETTERS} printable characters")
    return value


def a_list(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f'is {brief(value)}; it is a list like ["app", "docs"]')
    return tuple(dict.fromkeys(map(a_text, value)))


def a_queue_key(value: Any) -> str:
    """A queue's key."""
    keys = queue_keys(a_text(value))
    if len(keys) > 1:
        raise ValueError(f"is {value!r}; it must be the key of one queue")
    return keys[0]


def globs(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'is {brief(value)}; it is a list like ["deploy", "app-*"]; leave it out for all')
    return tuple(map(a_text, value))


#: Longest text in the file, except in `env` and `meta_data`.
STACK_FILE_LETTERS = 200
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
#: Years that are valid in every time zone.
FIRST_YEAR, LAST_YEAR = 1970, 9000


class WeekTime(NamedTuple):
    """A weekday (0 is Monday) and time."""

    weekday: int
    hour: int
    minute: int

    @property
    def minutes(self) -> int:
        """Minutes since Monday 00:00."""
        return (self.weekday * 24 + self.hour) * 60 + self.minute

    def __str__(self) -> str:
        return f"{WEEKDAYS[self.weekday]} {self.hour:02}:{self.minute:02}"


#: The begin or end of a window, in local time of its zone: each week, or once.
Edge = WeekTime | datetime.datetime


def an_edge(value: Any) -> Edge:
    """Parse "Fri 16:00", 2026-12-23T18:00:00, or 2026-12-23 (midnight at its begin)."""
    if isinstance(value, str) and (found := re.fullmatch(r"([A-Z][a-z]{2}) ([01]\d|2[0-3]):([0-5]\d)", value)):
        if found[1] in WEEKDAYS:
            return WeekTime(WEEKDAYS.index(found[1]), int(found[2]), int(found[3]))
    moment = value
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        moment = datetime.datetime.combine(value, datetime.time())
    if not isinstance(moment, datetime.datetime):
        raise ValueError(f'is {brief(value)}; write it like "Fri 16:00", or without quotes 2026-12-23T18:00:00')
    if moment.tzinfo:
        raise ValueError(f"is {value}; write it without an offset: it is a time of `zone`")
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"is {value}; its year may be {FIRST_YEAR} to {LAST_YEAR}")
    return moment


def a_zone(value: Any) -> zoneinfo.ZoneInfo:
    name = a_text(value)
    # ZoneInfo raises KeyError for most unknown names, but OSError for a directory like "Europe".
    with suppress(KeyError, ValueError, OSError):
        return zoneinfo.ZoneInfo(name)
    known = sorted(zoneinfo.available_timezones())
    if not known:
        raise ValueError(
            "cannot be found: this system has no time zone data; apt install tzdata, or pip install tzdata"
        )
    raise ValueError(f"is {name!r}, which is not a time zone; the nearest is {nearest_to(name, known)!r}")


def nearest_to(name: str, known: Iterable[str]) -> str:
    """The most similar name."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


class Span(NamedTuple):
    """A time span in Unix seconds, without its end."""

    begins_at: float
    ends_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Freeze:
    """A [[freeze]]: a window that holds the jobs that it matches."""

    name: str = key(a_text)
    begins: Edge = key(an_edge, name="from")
    ends: Edge = key(an_edge, name="until")
    #: The time zone of both times.
    zone: zoneinfo.ZoneInfo = key(a_zone)
    #: A job must match each of these three lists that is not empty.
    queues: tuple[str, ...] = key(globs, ())
    pipelines: tuple[str, ...] = key(globs, ())
    branches: tuple[str, ...] = key(globs, ())

    @property
    def scope(self) -> tuple[tuple[str, ...], ...]:
        return (self.queues, self.pipelines, self.branches)

    def matches(self, job: Job) -> bool:
        pipeline, build = job.about.get("pipeline") or {}, job.about.get("build") or {}
        names = (job.queue_key, pipeline.get("slug") or "", build.get("branch") or "")
        return all(
            not patterns or any(matches_pattern(name, pattern) for pattern in patterns)
            for name, patterns in zip(names, self.scope, strict=True)
        )

    def may_match(self, queue_key: str) -> bool:
        """Whether the window may match jobs of this queue."""
        return not self.queues or any(matches_pattern(queue_key, pattern) for pattern in self.queues)

    def spans(self, now: float) -> Iterator[Span]:
        """The spans in which the window is in force, in order, from the one that ends next after `now`.

        A span begins when the zone's clock first shows its begin, and ends when the clock last shows its end. So a
        local time that occurs twice (clock set back) never makes a window shorter. A local time that does not occur
        (clock set forward) means the moment of the change.
        """
        for begins, ends in self._shown(now):
            span = Span(shown_at(begins, self.zone, last=False), shown_at(ends, self.zone, last=True))
            if max(span.begins_at, now) < span.ends_at:
                yield span

    def _shown(self, now: float) -> Iterator[tuple[datetime.datetime, datetime.datetime]]:
        """Begins and ends in local time: one pair, or weekly from two weeks ago."""
        if isinstance(self.begins, datetime.datetime) and isinstance(self.ends, datetime.datetime):
            yield self.begins, self.ends
        elif isinstance(self.begins, WeekTime) and isinstance(self.ends, WeekTime):
            today = datetime.datetime.fromtimestamp(now, self.zone).date()
            monday = datetime.datetime.combine(today - datetime.timedelta(today.weekday()), datetime.time())
            minutes = (self.ends.minutes - self.begins.minutes) % WEEK_MINUTES
            for week in itertools.count(-2):
                begins = monday + datetime.timedelta(weeks=week, minutes=self.begins.minutes)
                yield begins, begins + datetime.timedelta(minutes=minutes)

    def span_at(self, now: float) -> Span | None:
        """The span that contains `now`, if any."""
        span = next(self.spans(now), None)
        return span if span and span.begins_at <= now else None

    def next_edge(self, now: float) -> float:
        """The next begin or end; infinity if there is none."""
        span = next(self.spans(now), None)
        return math.inf if span is None else span.ends_at if span.begins_at <= now else span.begins_at

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with it alone: the key, and what."""
        if isinstance(self.begins, WeekTime) is not isinstance(self.ends, WeekTime):
            yield (
                "until",
                f"is {self.ends} and `from` is {self.begins}; both must be a weekday and time, or both a date",
            )
        elif self.begins == self.ends and isinstance(self.begins, WeekTime):
            yield "until", f"is {self.ends}, and so is `from`: the window never ends"
        elif isinstance(self.begins, datetime.datetime) and not self.begins < self.ends:  # type: ignore[operator]
            yield "until", f"is {self.ends}, which is not after `from`, {self.begins}"


WEEK_MINUTES = 7 * 24 * 60


def shown_at(local: datetime.datetime, zone: zoneinfo.ZoneInfo, *, last: bool) -> float:
    """The Unix time at which the zone's clock first, or last, shows this local time.

    If it never does, the time at which the clock is set forward over it.
    """
    first, second = (local.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1))
    if first > second:
        return clock_set_at(local, zone, second, first)
    return second if last else first


def clock_set_at(local: datetime.datetime, zone: zoneinfo.ZoneInfo, before: float, after: float) -> float:
    """The Unix time between these two at which the zone's clock is set forward, in whole seconds."""
    low, high = int(before), int(after)
    while low < high:
        middle = (low + high) // 2
        if datetime.datetime.fromtimestamp(middle, zone).replace(tzinfo=None) < local:
            low = middle + 1
        else:
            high = middle
    return float(high)


def in_force(freezes: Iterable[Freeze], now: float) -> list[tuple[Freeze, Span]]:
    """The windows in force now, with their spans."""
    return [(freeze, span) for freeze in freezes if (span := freeze.span_at(now))]


def frozen_by(job: Job, windows: Iterable[tuple[Freeze, Span]]) -> Frozen | None:
    """The window that holds the job: the matching one that ends last; if equal, the first in the file."""
    matching = (Frozen(freeze.name, span.ends_at) for freeze, span in windows if freeze.matches(job))
    return max(matching, key=lambda frozen: frozen.until, default=None)


# -- periodic builds

#: The fields of a cron line, in order, each with the range for H (days that every month has).
CRON_FIELDS = {
    "minute": (0, 59),
    "hour": (0, 23),
    "day of the month": (1, 28),
    "month": (1, 12),
    "day of the week": (0, 6),
}
#: Words for a whole cron line, as in Buildkite's schedules.
#: Source: https://buildkite.com/docs/pipelines/configure/workflows/scheduled-builds
CRON_WORDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
SPREAD = re.compile(r"H(?:\((\d{1,2})-(\d{1,2})\))?(?:/(\d{1,2}))?")
#: How far back each try searches for the last due time: a cron line may be due each minute.
LOOK_BACK_SECONDS = (3600.0, 24 * 3600.0, 32 * 24 * 3600.0, 400 * 24 * 3600.0, math.inf)


def spread(line: str, name: str) -> str:
    """Replace each H of a cron line by a number that depends on the schedule's name and the field.

    `H(a-b)`: one number in this range; `H/n`: every n-th, beginning with one of the first n. Raises ValueError.
    """
    fields = CRON_WORDS.get(line, line).upper().split()
    if len(fields) != len(CRON_FIELDS):
        raise ValueError(f"is {line!r}; it must have five fields, or be one of {', '.join(CRON_WORDS)}")
    made = []
    for text, (kind, (low, high)) in zip(fields, CRON_FIELDS.items(), strict=True):
        number = int.from_bytes(hashlib.sha256(f"{kind} {name}".encode()).digest()[:8])
        terms = (spread_term(term, number, low, high) if term.startswith("H") else term for term in text.split(","))
        made.append(",".join(terms))
    return " ".join(made)


def spread_term(term: str, number: int, low: int, high: int) -> str:
    found = SPREAD.fullmatch(term)
    first, last = (int(found[1] or low), int(found[2] or high)) if found else (1, 0)
    step = int(found[3] or 0) if found else 0
    if found is None or not low <= first <= last <= high or (found[3] and not 1 <= step <= last - first + 1):
        raise ValueError(f"has {term!r}; write it like H, H({low}-{high}) or H/2; numbers here are {low} to {high}")
    if not step:
        return str(first + number % (last - first + 1))
    return f"{first + number % step}-{last}/{step}"


def due_times(line: str, zone: zoneinfo.ZoneInfo, after: float, written: str = "") -> Iterator[float]:
    """All due times of a cron line without H after a moment, in Unix seconds. Raises ValueError.

    A local time that does not occur (clock set forward) is due at the change; one that occurs twice is due once. If the
    line's minute or hour begins with "*", the first is never due, and the second is due twice. `written`: the line for
    errors.
    """
    try:
        import cronsim  # noqa: PLC0415  needed by those alone who set a schedule
    except ImportError:
        raise ValueError("needs cronsim: pip install cronsim, or Debian 13's python3-cronsim") from None
    try:
        for moment in cronsim.CronSim(line, datetime.datetime.fromtimestamp(after, zone)):
            # If it begins in the hour that occurs twice, cronsim may return times that are over.
            if (seconds := moment.timestamp()) > after:
                yield seconds
                after = seconds
    except cronsim.CronSimError as error:
        raise ValueError(f"is {(written or line)!r}, which cannot be read: {error}") from None


def a_cron(value: Any) -> str:
    line = a_text(value)
    try:
        next(due_times(spread(line, ""), zoneinfo.ZoneInfo("UTC"), 0.0, line))
    except StopIteration:
        raise ValueError(f"is {line!r}, which is never due") from None
    return line


def a_slug(value: Any) -> str:
    """A pipeline's slug, as in its URL."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", value):
        raise ValueError(f'is {brief(value)}; write its slug alone, like "app": the last part of its address')
    return value


def one_of(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"is {brief(value)}; it must be {' or '.join(words)}")
        return str(value)

    return parse


def texts_by_name(value: Any) -> dict[str, str]:
    """A table whose values are texts: { NAME = "value" }."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f'is {brief(value)}; it is a table of texts like {{ NAME = "value" }}')
    return dict(value)


def meta_data(value: Any) -> dict[str, str]:
    found = texts_by_name(value)
    if taken := found.keys() & {MARK_KEY, NAME_KEY}:
        raise ValueError(f"has {min(taken)}, which the scheduler sets itself")
    return found


#: The meta-data keys of each periodic build: our mark of its start, and the schedule's name.
MARK_KEY, NAME_KEY = "stack-start", "stack-periodic"


@dataclasses.dataclass(frozen=True, slots=True)
class Periodic:
    """A [[periodic]]: when to start a build, of which pipeline, and with which fields."""

    name: str = key(a_text)
    pipeline: str = key(a_slug)
    cron: str = key(a_cron)
    zone: zoneinfo.ZoneInfo = key(a_zone)
    branch: str = key(a_text, "main")
    commit: str = key(a_text, "HEAD")
    message: str = key(a_text, "")
    env: dict[str, str] | None = key(texts_by_name, None)
    meta_data: dict[str, str] | None = key(meta_data, None, name="meta_data")
    #: What to do at a due time while the last build of this schedule is not over.
    if_running: str = key(one_of("skip", "start"), "skip")
    #: What to do about a due time that passed over MISSED_SECONDS ago, as while no scheduler was running.
    missed: str = key(one_of("once", "none"), "once")

    def problems(self) -> Iterator[tuple[str, str]]:
        return iter(())

    @property
    def schedule(self) -> str:
        """The schedule as text: "17 2 * * *, Europe/Berlin"."""
        return f"{spread(self.cron, self.name)}, {self.zone}"

    def due_after(self, moment: float) -> float:
        """The next due time after that moment; infinity if there is none."""
        return next(due_times(spread(self.cron, self.name), self.zone, moment), math.inf)

    def last_due(self, after: float, until: float) -> float | None:
        """The last due time in that span, including its end."""
        for seconds in LOOK_BACK_SECONDS:
            times = due_times(spread(self.cron, self.name), self.zone, max(after, until - seconds))
            found = [*collections.deque(itertools.takewhile(lambda due: due <= until, times), maxlen=1)]
            if found or until - seconds <= after:
                return found[0] if found else None
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """The [monitor] table: pipelines outside of clusters whose jobs we take too."""

    #: File with an API access token; empty: use BUILDKITE_API_TOKEN.
    api_token_file: str = key(a_text, "", name="api-token-file")
    #: Slugs or GraphQL ids; empty: all pipelines outside of clusters.
    pipelines: tuple[str, ...] = key(a_list, ())
    #: The queue for their jobs: those whose rules name it, `default`, or no queue.
    queue: str = key(a_queue_key, "default")

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with it alone: the key, and what."""
        yield from ()

    def problems_with(self, settings: Settings) -> Iterator[Problem]:
        """Problems of this table together with the settings."""
        if self.queue in settings.stack_queues:
            problem = (
                f"queue is {self.queue!r}, which is also in SCHEDULER_QUEUES: give jobs outside of clusters another"
            )
            yield (
                ("monitor", "queue"),
                f"{problem} key, and their workers for example WORKER_QUEUE={self.queue}-unclustered",
            )
        try:
            if not self.api_token(settings):
                named = self.api_token_file or "there is no api-token-file, and BUILDKITE_API_TOKEN"
                yield ("monitor", "api-token-file"), f"{named} is empty: [monitor] needs an API access token"
        except SettingsError as error:
            yield ("monitor", "api-token-file"), f"api-token-file: {error}"

    @property
    def token_setting(self) -> str:
        """The place of the token, for errors."""
        return f"the token in {self.api_token_file}" if self.api_token_file else "BUILDKITE_API_TOKEN"

    def api_token(self, settings: Settings) -> str:
        """Raises SettingsError."""
        return read_text_file(self.api_token_file).strip() if self.api_token_file else settings.buildkite_api_token


@dataclasses.dataclass(frozen=True, slots=True)
class StackFile:
    """The content of STACK_FILE: its keys and tables."""

    organization: str = key(a_text, "")
    freeze: tuple[Freeze, ...] = tables_of(Freeze)
    periodic: tuple[Periodic, ...] = tables_of(Periodic)
    monitor: Watched | None = table_of(Watched)

    def problems(self, now: float) -> Iterator[Problem]:
        """Problems of several tables together. A table with its own problem is None here."""
        if not self.organization:
            needs = 'needs the organization\'s slug at the top: organization = "acme"'
            yield from [(("periodic", 0), f"[[periodic]] {needs}")] if self.periodic else []
            yield from [(("monitor",), f"[monitor] {needs}")] if self.monitor else []
        yield from same_names("freeze", self.freeze, "window")
        yield from same_names("periodic", self.periodic, "schedule")
        read = [(number, freeze) for number, freeze in enumerate(self.freeze) if freeze]
        for number, freeze in read:
            place = ("freeze", number, "name")
            alike = [other for _, other in read if other.scope == freeze.scope]
            weekly = [other for other in alike if isinstance(other.begins, WeekTime)]
            if weekly and freeze is weekly[-1] and not ends_ever(alike, now):
                yield place, f"window {freeze.name!r}, together with others for the same jobs, never ends"

    def warnings(self, now: float) -> Iterator[Problem]:
        """Warnings about tables without effect."""
        for index, freeze in enumerate(self.freeze):
            if not next(freeze.spans(now), None):
                warning = f"window {freeze.name!r} ended at {freeze.ends} in {freeze.zone}: it has no effect any more"
                yield ("freeze", index, "until"), warning


def same_names(table: str, rows: Sequence[Freeze | Periodic], kind: str) -> Iterator[Problem]:
    """Problems: tables of one kind with the same name."""
    names = [row.name if row else None for row in rows]
    for number, name in enumerate(names):
        if name in names[:number] and name is not None:
            yield (table, number, "name"), f"name is {name!r}, like another {kind}: give each its own"


def ends_ever(freezes: Sequence[Freeze], now: float) -> bool:
    """Whether the weekly ones of these windows leave any time free (windows for a date always end)."""
    weekly = [each for each in freezes if isinstance(each.begins, WeekTime)]
    # Weekly windows repeat, so two weeks are enough, even if the clock is set within them.
    ends_at = now
    while windows := in_force(weekly, ends_at):
        ends_at = max(span.ends_at for _, span in windows)
        if ends_at > now + 14 * 24 * 3600:
            return False
    return True


class FreezeWindows:
    """The freeze windows in force, for the store's decisions about jobs."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        # Held during a decision and until it is written, so that `settled` can wait for decisions with older windows.
        self._lock = threading.Lock()
        self._freezes: tuple[Freeze, ...] = ()

    @property
    def freezes(self) -> tuple[Freeze, ...]:
        return self._freezes

    def use(self, freezes: tuple[Freeze, ...]) -> None:
        with self._lock:
            self._freezes = freezes

    def settled(self) -> tuple[Freeze, ...]:
        """The windows, after all earlier decisions are written."""
        with self._lock:
            return self._freezes

    @contextmanager
    def deciding(self) -> Iterator[Callable[[Job], Frozen | None]]:
        """Context for a decision and its writing; yields a function that returns the window that holds a job now."""
        with self._lock:
            windows = in_force(self._freezes, self._now()) if self._freezes else []
            yield lambda job: frozen_by(job, windows)


class ReadFile(NamedTuple):
    """A file that was read: its tables, its warnings, and its canonical bytes for comparison."""

    tables: Any
    warnings: tuple[str, ...]
    canonical: bytes


def read_stack_file(
    path: str, now: float, cls: type[Any] = StackFile, more: Callable[[Any], Iterable[Problem]] = lambda made: ()
) -> ReadFile:
    """Read a TOML file into its dataclass. Raises SettingsError with all problems and their lines.

    `more`: a function that returns problems beyond the file alone.
    """
    try:
        text = read_text_file(path)
        document = tomllib.loads(text)
    except SettingsError as error:
        raise SettingsError(f"STACK_FILE: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"STACK_FILE: {path} is not TOML: {error}") from None
    problems: list[Problem] = []
    made = cls(**read_fields(cls, document, (), problems))
    problems += [*made.problems(now), *more(made)]
    if problems:
        raise SettingsError("\n".join(file_problem_lines(path, text, problems)))
    warnings = file_problem_lines(path, text, [*made.warnings(now)])
    return ReadFile(made, tuple(warnings), json.dumps(document, sort_keys=True, default=str).encode())


def read_table(cls: type[Any], keys: Mapping[str, Any], place: Place, problems: list[Problem]) -> Any:
    """A table as an object of its class; None if it has problems, which are appended to `problems`."""
    before = len(problems)
    fields = read_fields(cls, keys, place, problems)
    if len(problems) > before:
        return None
    made = cls(**fields)
    problems += (((*place, name), f"{name} {what}") for name, what in made.problems())
    return made if len(problems) == before else None


def read_fields(cls: type[Any], keys: Mapping[str, Any], place: Place, problems: list[Problem]) -> dict[str, Any]:
    """The class's fields, from the keys of a table or of the file itself."""
    fields = {field.metadata.get("name") or field.name: field for field in dataclasses.fields(cls)}
    for name in keys.keys() - fields.keys():
        where = f" of [{place[0]}]" if place else ""
        problems.append(((*place, name), f"{name} is not a key{where}; the nearest is {nearest_to(name, fields)}"))
    values = {}
    for name, field in fields.items():
        read = read_tables if "table" in field.metadata else read_key
        values[field.name] = read(field, keys, (*place, name), problems)
    return values


def read_key(field: dataclasses.Field[Any], keys: Mapping[str, Any], place: Place, problems: list[Problem]) -> Any:
    name = place[-1]
    if name not in keys:
        if field.default is dataclasses.MISSING:
            problems.append((place, f"[{place[0]}] has no {name}"))
        return field.default
    try:
        return field.metadata["parse"](keys[str(name)])
    except ValueError as error:
        problems.append((place, f"{name} {error}"))


def read_tables(field: dataclasses.Field[Any], keys: Mapping[str, Any], place: Place, problems: list[Problem]) -> Any:
    name, cls, is_list = str(place[-1]), field.metadata["table"], field.metadata["is_list"]
    if name not in keys:
        return field.default
    found = keys[name]
    if is_list and isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return tuple(read_table(cls, row, (*place, number), problems) for number, row in enumerate(found))
    if not is_list and isinstance(found, dict):
        return read_table(cls, found, place, problems)
    problems.append((place, f"{name} must be written as {f'[[{name}]]' if is_list else f'[{name}]'}"))
    return field.default


def file_problem_lines(path: str, text: str, problems: Sequence[Problem]) -> list[str]:
    """The problems or warnings as text, each with its line, in the order of the file."""
    lines = lines_of(text) if problems else {}
    by_line = sorted((line_of(lines, place), what) for place, what in problems)
    return [f"STACK_FILE: {path}, line {line}: {what}" for line, what in by_line]


def stack_file_of(settings: Settings) -> ReadFile:
    """Read STACK_FILE. Raises SettingsError."""
    if not settings.stack_file:
        return ReadFile(StackFile(), (), b"{}")
    file = read_stack_file(
        settings.stack_file,
        time.time(),
        more=lambda made: made.monitor.problems_with(settings) if made.monitor else (),
    )
    if file.tables.periodic and not settings.buildkite_api_token:
        raise SettingsError("BUILDKITE_API_TOKEN: is required for [[periodic]] in STACK_FILE")
    return file


def line_of(lines: Mapping[Place, int], place: Place) -> int:
    """The line of a key; if it is missing, the line of its table."""
    return next((lines[place[:length]] for length in range(len(place), 0, -1) if place[:length] in lines), 1)


def lines_of(text: str) -> dict[Place, int]:
    """The line of each table and key, in a valid TOML text.

    A statement of TOML is itself a valid document: so it ends at the first line where tomllib can parse it.
    """
    lines: dict[Place, int] = {}
    counts: collections.Counter[Place] = collections.Counter()
    rows, start, header = text.split("\n"), 0, Place()
    for end in range(1, len(rows) + 1):
        statement = "\n".join(rows[start:end])
        with suppress(tomllib.TOMLDecodeError):
            found = tomllib.loads(statement)
            is_header = statement.lstrip().startswith("[")
            header = place_of_header(found, counts) if is_header else header
            for place in [header] if is_header else [(*header, name) for name in found]:
                lines.setdefault(place, start + 1)
            start = end
    return lines


def place_of_header(found: Any, counts: collections.Counter[Place]) -> Place:
    """The place of a table from its header, by what tomllib makes of the header alone: {"freeze": [{}]}."""
    place = Place()
    while found:
        [(name, found)] = found.items()
        place = (*place, name)
        if isinstance(found, list):
            counts[place] += 1
            found = found[0]
        if counts[place]:
            place = (*place, counts[place] - 1)
    return place


# --- Buildkite client ---

#: Time limit of a call in seconds, including the connection and the whole body.
CALL_SECONDS = 10.0
#: Jobs in one call; Buildkite's own limit for each of these endpoints.
BATCH = 1000
#: Longest text for `notify`, in bytes; Buildkite's limit is the same number of characters.
DETAIL_BYTES = 256
#: Bytes read of an answer (a page of 1,000 jobs is much shorter), and bytes per read.
ANSWER_BYTES, ANSWER_PIECE = 64 * 1024 * 1024, 64 * 1024
#: After Buildkite refused a token, try again after this: the token's file may have been replaced.
REFUSED_TOKEN_SECONDS = 60.0
#: Number of wrong fields of listed jobs that we remember, to log each only once.
MANY_ODD = 10_000
#: Buildkite's limit of calls per second for a stack, by endpoint.
#: Source: https://buildkite.com/docs/apis/agent-api/stacks#rate-limits
CALLS_PER_SECOND = {
    "register": 10,  # not documented, like job-tokens: the same as the others
    "list": 10,
    "reserve": 10,
    "states": 20,
    "finish": 100,
    "deregister": 10,
    "notify": 200,
    "show-job": 1000,
    "job-tokens": 10,
    "metrics": 1,
}
#: Our limit of GraphQL calls per second, whatever they cost: see `Points`.
GRAPHQL_CALLS_PER_SECOND = 5


class RateLimiter:
    """Delays calls so that there are at most `limit` of them in any second."""

    def __init__(self, limit: int):
        self._lock = threading.Lock()  # guards _times
        self._times: collections.deque[float] = collections.deque([-math.inf] * limit, maxlen=limit)

    def delay(self, now: float) -> float:
        """Reserve the next free time for a call; return the seconds until then."""
        with self._lock:
            # A little over a second, because Buildkite counts by its own clock, and the network adds delay.
            at = max(now, self._times[0] + 1.05)
            self._times.append(at)
            return at - now


class JobSpec(NamedTuple):
    """What a job would run (environment and command). It is never stored, and its repr hides the content."""

    env: dict[str, str]
    command: str

    def __repr__(self) -> str:
        return "JobSpec(not shown)"

    @property
    def size(self) -> int:
        """Letters of all that it keeps."""
        return sum(map(len, (*self.env, *self.env.values(), self.command)))


@dataclasses.dataclass(frozen=True, slots=True)
class ListPage:
    """One page of the list."""

    jobs: list[Job]
    paused: bool | None
    next_cursor: str | None
    #: Why each skipped job was skipped.
    skipped: Sequence[str] = ()
    #: Jobs that were in the list before, and are no more. Empty for a source with reservations.
    gone: Collection[str] = ()


class Upstream:
    """One of Buildkite's APIs: its address and token. Raises BuildkiteError."""

    def __init__(self, url: str, token: Callable[[], str], setting: str, scheme: str, needs: str = ""):
        """`setting`: the token's place, for errors. `scheme`: the word before the token in the header. `needs`:
        requirements of the token, for the error when Buildkite refuses it.
        """
        self._url, self._token, self._setting, self._scheme, self._needs = url, token, setting, scheme, needs
        self._local = threading.local()  # one requests.Session per thread, because it is not thread-safe

    def call(  # noqa: PLR0913  a request has as many parts
        self, what: str, method: str, path: str, body: Any, seconds: float, heard: Callable[[int], None]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """The answer's status, headers and body. It ends within `seconds`.

        `what`: the call's name in errors. `heard` is called with the status of the answer; 0: no complete answer.
        """
        status = 0
        try:
            status, headers, text = self._exchange(method, path, body, seconds)
        except (requests.RequestException, OSError, ValueError) as error:  # ValueError: a login that cannot be sent
            raise BuildkiteError(f"{what}: no answer from {self._asked()} ({plain_reason(error)})") from None
        finally:
            heard(status)
        if status < 300:
            return status, headers, text
        problem, again = message_of(text), retry_after(headers, status)
        if status == 401:
            problem, again = f"it refuses {self._setting}: {problem}", REFUSED_TOKEN_SECONDS
        problem += self._needs if status in (401, 403) else ""
        raise BuildkiteError(f"{what}: {status} from {self._asked()}: {problem}", status, again)

    def object_of(self, what: str, status: int, text: bytes, *, is_secret: bool = False) -> dict[str, Any]:
        """The JSON object in an answer. `is_secret`: do not quote an unreadable answer, because it may hold tokens."""
        shown = "not shown" if is_secret else repr(text[:80])
        try:
            answer = read_json(text)
        except (ValueError, RecursionError):
            raise BuildkiteError(f"{what}: {status} from {self._asked()}, but not JSON: {shown}") from None
        if not isinstance(answer, dict):
            raise BuildkiteError(f"{what}: {status} from {self._asked()}, but not a JSON object: {shown}")
        return answer

    def _asked(self) -> str:
        """The server for an error's text: names the proxy, if there is one, because it may be the cause."""
        proxy = proxy_of(self._url)
        return f"Buildkite through the proxy {proxy}" if proxy else "Buildkite"

    def _exchange(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """One request: its answer's status, headers and body.

        It ends within `seconds`, even if the body comes slowly. A head that comes byte by byte may take longer,
        because each byte restarts the timeout; then the watchdog ends the process after STUCK_SECONDS.
        """
        ends_at = time.monotonic() + seconds
        if not hasattr(self._local, "session"):
            self._local.session = Session()
        session: Session = self._local.session
        with (
            session.request(
                method,
                self._url + path,
                json=body,
                # Accept no compressed answer: a few bytes may become a GB in memory.
                headers={"User-Agent": f"agent-stack-systemd/{VERSION}", "Accept-Encoding": "identity"},
                # By `auth`, because requests would replace the header with a login from .netrc.
                auth=self._authorize,
                # The timeout for connecting, and for each read of the head.
                timeout=(seconds / 3, seconds * 2 / 3),
                stream=True,
            ) as response,
            cut_off_at(ends_at, response),
        ):
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                unread = f"(encoded as {encoding[:40]}, which we did not ask for)"
                return response.status_code, response.headers, unread.encode()
            text = bytearray()
            for piece in response.iter_content(ANSWER_PIECE):
                text += piece
                if len(text) > ANSWER_BYTES:
                    raise OSError(f"its answer has more than {ANSWER_BYTES} bytes")
            if time.monotonic() >= ends_at:
                raise TimeoutError(f"its answer was not complete after {seconds:.0f} s")
            return response.status_code, response.headers, bytes(text)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        token = self._token()
        if not re.fullmatch("[!-~]+", token):
            raise requests.exceptions.InvalidHeader(f"{self._setting} contains a character that no token has")
        request.headers["Authorization"] = f"{self._scheme} {token}"
        return request


class Source:
    """A source of jobs for one queue: the only interface of Intake to Buildkite. Each call may raise BuildkiteError.

    The flags below tell what a source does not have; calls for that are never made.
    """

    #: Whether a reserved job is kept for us, and is no longer listed. If not, `reserve` only proves that jobs were free
    #: at the time of the call, and the list contains a job until an agent has it.
    has_reservations = True
    #: Whether texts can be shown on build pages, and whether there are job acquisition tokens.
    has_notifications, has_tokens = True, True
    #: Whether a job can be finished with exit status 0.
    can_succeed = True
    #: Most jobs in one call of `reserve` and of `states`.
    batch = BATCH
    #: The token's place, for errors: its variable, or "the token in <file>".
    token_setting = "BUILDKITE_AGENT_TOKEN"

    def __init__(self, key: str, queue_key: str):
        self.key, self.queue_key = key, queue_key
        #: Whether there is a policy, which needs the specs of all jobs.
        self.keeps_specs = False
        #: Called after each call with queue key, endpoint, and status of the answer; 0: no answer.
        self.on_call: Callable[[str, str, int], None] = lambda *_: None
        #: Called with queue key and field name for each wrong field of a listed job.
        self.on_odd: Callable[[str, str], None] = lambda *_: None
        # Wrong fields of jobs; each is logged and counted once.
        self._odd: dict[tuple[str, str], None] = {}

    @property
    def problems(self) -> Sequence[str]:
        """Problems that are no failure of a call."""
        return ()

    def list_anew(self) -> None:
        """The last page could not be stored: list it again."""

    def pause(self) -> float:
        """Seconds to wait before calls that are not urgent; 0: none."""
        return 0.0

    def register(self) -> None:
        """Register us, and check that we may make calls. Must be the first call."""
        raise NotImplementedError

    def list_jobs(self, cursor: str | None, now: float) -> ListPage:
        """One page of jobs that wait for an agent."""
        raise NotImplementedError

    def reserve(self, uuids: Sequence[str], seconds: int) -> tuple[set[str], set[str]]:
        """Reserve at most `batch` jobs for `seconds`; return those that are ours and without an agent, and the others.

        It is not an error if none is ours.
        """
        raise NotImplementedError

    def states(self, uuids: Sequence[str]) -> dict[str, str]:
        """Buildkite's state word of each job, at most `batch`; unknown jobs are left out."""
        raise NotImplementedError

    def finish(self, uuid: str, detail: str, exit_status: int = -1) -> None:
        """End a job that no agent took, with a text for its build page and an exit status (0: success).

        Errors 400, 404, 422: it has an agent, or is over.
        """
        raise NotImplementedError

    def show_job(self, uuid: str) -> JobSpec:
        """The job's environment and command."""
        raise NotImplementedError

    def notify(self, details: Sequence[tuple[str, str]]) -> dict[str, int]:
        """Show texts on build pages: at most BATCH pairs of job uuid and text (cut to 256 bytes).

        Returns the number of refused texts by Buildkite's reason; the others were accepted.
        """
        raise NotImplementedError

    def job_tokens(self, uuids: Sequence[str], seconds: int, ends_at: float) -> tuple[dict[str, str], dict[str, str]]:
        """For at most BATCH jobs, tokens with which an agent can acquire only that job, valid for `seconds`.

        Also returns Buildkite's reasons for jobs without a token, if it gives some.
        The call ends at `ends_at` (monotonic).
        """
        raise NotImplementedError

    def _read(self, raw_jobs: Iterable[Any], now: float) -> tuple[list[Job], list[str]]:
        """The jobs of a page, and why each of the others is skipped."""
        jobs: list[Job] = []
        skipped: list[str] = []
        for raw in raw_jobs:
            found = raw.get("id") if isinstance(raw, dict) else None
            name = cut(found, 100) if isinstance(found, str) else brief(found)
            tell = functools.partial(self._tell, "odd", name)
            try:
                jobs.append(Job.from_api(self.queue_key, raw, now, tell))
            except ValueError as error:
                skipped.append(str(error))
                self._tell("skipped", name, "id", f"{error}, so it cannot be run")
        return jobs, skipped

    def _tell(self, word: str, job: str, field: str, what: str) -> None:
        """Log and count, once per job and field, that a listed job has a wrong field."""
        if (job, field) in self._odd:
            return
        if len(self._odd) >= MANY_ODD:
            del self._odd[next(iter(self._odd))]
        self._odd[job, field] = None
        self.on_odd(self.queue_key, field)
        log.warning(event(word, queue=self.queue_key, job=job, field=field, reason=what))


class Stack(Source):
    """The jobs that the Stacks API lists for one queue of a cluster. Every method is one HTTP call.

    Source of paths, fields and limits: https://buildkite.com/docs/apis/agent-api/stacks
    """

    def __init__(self, endpoint: str, token: Callable[[], str], key: str, queue_key: str):
        super().__init__(key, queue_key)
        self._upstream = Upstream(endpoint, token, "BUILDKITE_AGENT_TOKEN", "Token")
        self._paces = {name: RateLimiter(limit) for name, limit in CALLS_PER_SECOND.items()}

    def register(self) -> None:
        """Register the stack, or renew it."""
        body = {
            "key": self.key,
            "type": "custom",
            "queue_key": self.queue_key,
            "metadata": {"stack": "systemd"},
        }
        self._call("register", "POST", "/stacks/register", body)

    def deregister(self) -> None:
        self._call("deregister", "POST", f"/stacks/{self.key}/deregister")

    def list_jobs(self, cursor: str | None, now: float) -> ListPage:
        """Scheduled jobs that are not reserved, oldest first. Jobs that cannot be run are skipped."""
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
        jobs, skipped = self._read(raw_jobs, now)
        return ListPage(
            jobs,
            paused if isinstance(paused, bool) else None,
            info["end_cursor"] if more and info["end_cursor"] else None,
            skipped,
        )

    def reserve(self, uuids: Sequence[str], seconds: int) -> tuple[set[str], set[str]]:
        """Reserve jobs, or renew their reservations."""
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
        answer = self._call("states", "POST", f"/stacks/{self.key}/jobs/get-states", {"job_uuids": list(uuids)})
        states = answer.get("states")
        if not isinstance(states, dict):
            raise BuildkiteError(f"ask the states of {len(uuids)} jobs: the answer has no object `states`")
        return {uuid: cut(states[uuid], 100) for uuid in uuids if isinstance(states.get(uuid), str)}

    def finish(self, uuid: str, detail: str, exit_status: int = -1) -> None:
        """The text is cut to 4 KB."""
        body = {"detail": cut(detail, 4096), "exit_status": exit_status}
        self._call("finish", "POST", f"/stacks/{self.key}/jobs/{uuid}/finish", body)

    def show_job(self, uuid: str) -> JobSpec:
        """Buildkite knows a job that is scheduled or reserved."""
        answer = self._call("show-job", "GET", f"/stacks/{self.key}/jobs/{uuid}")
        env, command = answer.get("env"), answer.get("command")
        if not isinstance(env, dict):
            raise BuildkiteError(f"show-job {uuid} on queue {self.queue_key}: the answer has no object `env`")
        texts = {str(name): value for name, value in env.items() if isinstance(value, str)}
        return JobSpec(texts, command if isinstance(command, str) else "")

    def notify(self, details: Sequence[tuple[str, str]]) -> dict[str, int]:
        notifications = [{"job_uuid": uuid, "detail": cut(detail, DETAIL_BYTES)} for uuid, detail in details]
        answer = self._call("notify", "POST", f"/stacks/{self.key}/notifications", {"notifications": notifications})
        errors = answer.get("errors")
        refused: dict[str, int] = {}
        for error in errors if isinstance(errors, list) else []:
            if isinstance(error, dict) and isinstance(error.get("indexes"), list):
                refused[str(error.get("error"))[:100]] = len(error["indexes"])
        return refused

    def metrics(self) -> tuple[dict[str, Any], float]:
        """Buildkite's metrics of the whole cluster, and the seconds until it may be asked again.

        Source: https://buildkite.com/docs/apis/agent-api/metrics
        """
        headers, answer = self._ask("metrics", "GET", "/metrics")
        with suppress(KeyError, ValueError):
            return answer, float(headers["Buildkite-Agent-Metrics-Poll-Duration"])
        return answer, 0.0

    def job_tokens(self, uuids: Sequence[str], seconds: int, ends_at: float) -> tuple[dict[str, str], dict[str, str]]:
        body = {"job_uuids": list(uuids), "token_lifetime_seconds": seconds}
        answer = self._call("job-tokens", "POST", f"/stacks/{self.key}/job-acquisition-tokens", body, ends_at)
        issued = answer.get("job_acquisition_tokens")
        if not isinstance(issued, list):
            raise BuildkiteError(f"job-tokens on queue {self.queue_key}: no list `job_acquisition_tokens`")
        entries = [entry for entry in issued if isinstance(entry, dict)]
        tokens = {str(entry.get("job_uuid")): str(entry.get("job_acquisition_token") or "") for entry in entries}
        usable = {uuid: tokens[uuid] for uuid in uuids if re.fullmatch("[!-~]+", tokens.get(uuid, ""))}
        return usable, words_on(answer.get("not_issued"))

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
        heard = functools.partial(self.on_call, self.queue_key, endpoint)
        status, headers, text = self._upstream.call(what, method, path, body, seconds, heard)
        if endpoint in ("finish", "deregister"):
            return headers, {}
        is_secret = endpoint in ("job-tokens", "show-job")  # tokens, or the job's environment
        return headers, self._upstream.object_of(what, status, text, is_secret=is_secret)


#: Our GraphQL queries. A test checks them against Buildkite's schema.
#: Source: https://buildkite.com/docs/apis/graphql/schemas/query/job and .../mutation/jobtypecommandcancel
JOB_QUERY = "query ($uuid: ID!) { job(uuid: $uuid) { ... on JobTypeCommand { id state } } }"
CANCEL_QUERY = "mutation ($id: ID!) { jobTypeCommandCancel(input: {id: $id}) { jobTypeCommand { state } } }"
CHECK_QUERY = "query { __typename }"


class PointsWindow:
    """One of the limits of GraphQL points, from the answer's headers, until it is reset."""

    def __init__(self) -> None:
        self.left_at_first, self.left, self.resets_at, self.ours = math.inf, math.inf, -math.inf, 0.0
        #: What the jobs that were taken in will cost before they are over.
        self.promised = 0.0
        #: Until when the points used so far would last, if we spread our points evenly until the reset.
        self.free_at = -math.inf

    def heard(self, left: float, resets_at: float, cost: float, now: float) -> None:
        if resets_at > self.resets_at + 5.0:
            self.left_at_first, self.resets_at, self.ours, self.free_at = left + cost, resets_at, 0.0, -math.inf
        self.left, self.ours = left, self.ours + cost
        seconds = max(self.resets_at - now, 0.0)
        share = cost * seconds / self.spare if self.spare >= 1 else math.inf
        self.free_at = min(max(self.free_at, now) + share, self.resets_at + BURST_SECONDS)

    @property
    def spare(self) -> float:
        """The points that we may use until the reset: at most half of those at its begin, and of those left now."""
        return min(self.left_at_first / 2 - self.ours, self.left / 2) - self.promised


class Points:
    """Spreads calls of the GraphQL API over time, so that its points are not used up.

    An answer costs a point per object in it. The organization has 20,000 points in 5 minutes, each user 5,000. We use
    at most half of what is left. Times are monotonic.
    Source: https://buildkite.com/docs/apis/graphql/graphql-resource-limits
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the windows
        self._windows = {name: PointsWindow() for name in ("RateLimit", "RateLimit-User")}

    def promise(self, points: float) -> None:
        """Keep these points for urgent calls. `heard` with `is_promised`: such a call was made."""
        with self._lock:
            for window in self._windows.values():
                window.promised += points

    def heard(self, headers: Mapping[str, str], now: float, *, is_promised: bool = False) -> None:
        """Read an answer's headers. Without its headers, a limit is as it was; at first there is none."""
        with suppress(ValueError), self._lock:
            cost = float(headers.get("RateLimit-Complexity-Actual", 0))
            for name, window in self._windows.items():
                window.promised = max(0.0, window.promised - cost) if is_promised else window.promised
                if {f"{name}-Remaining", f"{name}-Reset"} <= headers.keys():
                    left, resets_in = float(headers[f"{name}-Remaining"]), float(headers[f"{name}-Reset"])
                    window.heard(left, now + min(resets_in, MAX_RESET_SECONDS), cost, now)

    @property
    def spare(self) -> float:
        """The points that we may use before the limits are reset, to our knowledge."""
        with self._lock:
            return min(window.spare for window in self._windows.values())

    def pause(self, now: float) -> float:
        """Seconds to wait before calls that are not urgent."""
        with self._lock:
            return max(0.0, *(window.free_at - BURST_SECONDS - now for window in self._windows.values()))

    def __str__(self) -> str:
        with self._lock:
            least = min(self._windows.values(), key=lambda window: window.left)
            return f"{least.left:.0f} points are left"


#: Calls that do not wait for points: those about jobs that were put into the store.
PROMISED_CALLS = ("reserve", "states", "finish", "show-job")
#: The latest reset of a limit that we believe, whatever a header says.
MAX_RESET_SECONDS = 600.0
#: We may use the points of so many seconds at once, because many jobs may come at a time.
BURST_SECONDS = 30.0


#: Builds in one query, and meta-data of each: within the limit of 50,000 points per query.
#: Source: https://buildkite.com/docs/apis/graphql/graphql-resource-limits
BUILDS_A_PAGE = 100
PIPELINE_QUERY = "query ($slug: ID!) { pipeline(slug: $slug) { slug } }"
BUILD_QUERY = "query ($uuid: ID!) { build(uuid: $uuid) { state } }"
BUILDS_QUERY = """
query ($pipeline: ID!, $branch: [String!], $from: DateTime, $first: Int!, $after: String) {
  pipeline(slug: $pipeline) {
    builds(first: $first, after: $after, branch: $branch, createdAtFrom: $from) {
      pageInfo { hasNextPage endCursor }
      edges { node { uuid number url state metaData(first: $first) { edges { node { key value } } } } }
    }
  }
}"""


class Build(NamedTuple):
    """A build at Buildkite."""

    uuid: str
    number: int
    url: str
    #: Buildkite's state word, in lower case.
    state: str

    @classmethod
    def read(cls, data: Mapping[str, Any], uuid: str, url: str) -> Build | None:
        """Read a build from an answer; None if a field is missing."""
        build = cls(data.get(uuid, ""), data.get("number", 0), data.get(url, ""), str(data.get("state", "")).lower())
        is_whole = all(isinstance(text, str) and text for text in (build.uuid, build.url, build.state))
        return build if is_whole and isinstance(build.number, int) and build.number > 0 else None


class GraphApi:
    """Buildkite's GraphQL API: jobs outside of clusters, the cancelling of jobs, and builds. Raises BuildkiteError."""

    def __init__(self, url: str, token: Callable[[], str], setting: str = "BUILDKITE_API_TOKEN"):
        """`setting`: the token's place, for errors."""
        self.token_setting, self._token = setting, token
        #: The token's requirements, for errors when Buildkite refuses something.
        self.needs = f"; {setting} must have full GraphQL access, and be of a user who may build that pipeline"
        self._upstream = Upstream(url, token, setting, "Bearer", self.needs)
        self._pace = RateLimiter(GRAPHQL_CALLS_PER_SECOND)
        self.points = Points()
        #: Called after each call, like `Source.on_call`.
        self.on_call: Callable[[str, str, int], None] = lambda *_: None

    @property
    def has_token(self) -> bool:
        return bool(self._token())

    def check(self) -> None:
        """Make an empty query, to test the token."""
        self.ask("graphql", CHECK_QUERY, {})

    def cancel(self, uuid: str, queue_key: str) -> str:
        """Ask Buildkite to cancel a job and stop its agent; return Buildkite's word for the job's new state.

        Status 422 is about this job, any other status about the API or the token.
        """
        word, node_id = self._found(uuid, queue_key)
        if word == "canceling" or FINDINGS.get(word) is Finding.OVER:
            return word
        return self._cancel(uuid, node_id, queue_key)

    def cancel_waiting(self, uuid: str, queue_key: str) -> None:
        """Ask Buildkite to cancel a job without an agent. Status 422: an agent has it, or it is over."""
        word, node_id = self._found(uuid, queue_key)
        if word == "scheduled":
            word = self._cancel(uuid, node_id, queue_key)
        if word != "canceled":
            raise BuildkiteError(f"cancel job {uuid}: it does not wait for an agent; its state is {word}", 422)

    def _found(self, uuid: str, queue_key: str) -> tuple[str, str]:
        """Buildkite's word for a job's state, and the job's GraphQL id."""
        job = an_object(self.ask(f"cancel job {uuid}", JOB_QUERY, {"uuid": uuid}, queue_key), "job")
        if not isinstance(node_id := job.get("id"), str):
            raise BuildkiteError(f"cancel job {uuid}: Buildkite shows no such job{self.needs}", 422)
        return str(job.get("state")).lower(), node_id

    def _cancel(self, uuid: str, node_id: str, queue_key: str) -> str:
        what = f"cancel job {uuid}"
        payload = an_object(self.ask(what, CANCEL_QUERY, {"id": node_id}, queue_key), "jobTypeCommandCancel")
        if not (state := an_object(payload, "jobTypeCommand").get("state")):
            raise BuildkiteError(f"{what}: Buildkite's answer has no state of the job")
        return cut(str(state).lower(), 100)

    def check_pipeline(self, pipeline: str) -> None:
        """Check that the token may see that pipeline ("acme/app")."""
        if not an_object(self.ask("graphql", PIPELINE_QUERY, {"slug": pipeline}), "pipeline"):
            raise BuildkiteError(f"Buildkite shows no pipeline {pipeline}{self.needs}", 404)

    def build_state(self, uuid: str) -> str:
        """Buildkite's state word of a build, in lower case; "" if it shows no such build."""
        build = an_object(self.ask(f"ask for build {uuid}", BUILD_QUERY, {"uuid": uuid}), "build")
        return cut(str(build.get("state") or "").lower(), 100)

    def build_marked(
        self, pipeline: str, branch: str, mark: str, since: float, step: Callable[[], None]
    ) -> Build | None:
        """The build of that pipeline ("acme/app") and branch with our mark in its meta-data; None if there is none.

        It reads all builds created since then, newest first, page by page, and calls `step` before each. It compares
        the mark itself, because the API's filter by meta-data is not documented.
        """
        what, after = f"look for a build of {pipeline}", None
        while True:
            step()
            about = {"pipeline": pipeline, "branch": [branch], "from": rfc3339(since), "first": BUILDS_A_PAGE}
            answer = self.ask(what, BUILDS_QUERY, about | {"after": after})
            if not (found := an_object(answer, "pipeline")):
                raise BuildkiteError(f"{what}: Buildkite shows no such pipeline{self.needs}", 404)
            builds = an_object(found, "builds")
            for build in nodes_of(builds):
                marks = [
                    each.get("value") for each in nodes_of(an_object(build, "metaData")) if each.get("key") == MARK_KEY
                ]
                if mark in marks:
                    if read := Build.read(build, "uuid", "url"):
                        return read
                    raise BuildkiteError(f"{what}: the answer is incomplete")
            page = an_object(builds, "pageInfo")
            if page.get("hasNextPage") is not True or page.get("endCursor") == after:
                return None
            after = page.get("endCursor")

    def ask(  # noqa: PLR0913  what a call is about, and what it is counted as
        self,
        what: str,
        query: str,
        variables: Mapping[str, Any],
        queue_key: str = "",
        endpoint: str = "graphql",
        *,
        is_secret: bool = False,
    ) -> dict[str, Any]:
        """The answer's `data`. Raises BuildkiteError also for errors within status 200.

        `what`: the call's name in errors. `is_secret`: do not quote the answer.
        """
        time.sleep(self._pace.delay(time.monotonic()))
        body, heard = {"query": query, "variables": variables}, functools.partial(self.on_call, queue_key, endpoint)
        status, headers, text = self._upstream.call(what, "POST", "", body, CALL_SECONDS, heard)
        self.points.heard(headers, time.monotonic(), is_promised=endpoint in PROMISED_CALLS)
        answer = self._upstream.object_of(what, status, text, is_secret=is_secret)
        if answer.get("errors"):
            raise BuildkiteError(f"{what}: Buildkite refuses it: {message_of(text)}{self.needs}", 422)
        return an_object(answer, "data")


#: What to do when the REST API refuses to make a build, by the status of its answer.
BUILD_NEEDS = {
    403: "BUILDKITE_API_TOKEN needs the scope write_builds, and its user must be allowed to build the pipeline",
    404: "check `organization` and `pipeline` in STACK_FILE, and who may see the pipeline",
    422: "check `branch`, `commit`, `env` and `meta_data` in STACK_FILE, and the pipeline's settings",
}


class RestApi:
    """Buildkite's REST API, which creates builds. Raises BuildkiteError.

    Source: https://buildkite.com/docs/apis/rest-api/builds#create-a-build
    """

    def __init__(self, url: str, token: Callable[[], str]):
        self._upstream = Upstream(url, token, "BUILDKITE_API_TOKEN", "Bearer")
        #: Called after each call, like `Source.on_call`.
        self.on_call: Callable[[str, str, int], None] = lambda *_: None

    def create_build(self, organization: str, pipeline: str, body: Mapping[str, Any]) -> Build:
        """Create a build. After a status of 400 to 499, but not 408, there is none; else there may be one."""
        what = f"start a build of {organization}/{pipeline}"
        owner, slug = (urllib.parse.quote(part, safe="") for part in (organization, pipeline))
        path = f"/organizations/{owner}/pipelines/{slug}/builds"
        heard = functools.partial(self.on_call, "", "build")
        try:
            status, _, text = self._upstream.call(what, "POST", path, body, CALL_SECONDS, heard)
        except BuildkiteError as error:
            if needs := BUILD_NEEDS.get(error.status):
                raise BuildkiteError(f"{error}; {needs}", error.status, error.retry_after) from None
            raise
        build = Build.read(self._upstream.object_of(what, status, text), "id", "web_url")
        if build is None:
            raise BuildkiteError(f"{what}: the answer has no build")
        return build


class Session(requests.Session):
    """Follows no redirect, so that the token is sent only to the address in the settings.

    With allow_redirects=False, requests would read the whole body of a redirect, without a limit.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


@contextmanager
def cut_off_at(ends_at: float, response: requests.Response) -> Iterator[None]:
    """Within this context, shut down the answer's connection at `ends_at` (monotonic), so that reading ends.

    A timeout of requests does not work: it restarts with every byte.
    """
    connection = socket.socket(fileno=os.dup(response.raw.fileno()))
    timer = threading.Timer(max(0.0, ends_at - time.monotonic()), shut_down, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # so that the timer cannot cut off the next call on this connection
        connection.close()


def cut(text: str, most: int) -> str:
    """The text, cut to so many bytes of whole characters.

    Half a character (a lone surrogate from JSON), which stores and log cannot write, becomes "?".
    """
    return text[:most] if text.isascii() else text.encode(errors="replace")[:most].decode(errors="ignore")


def shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def number_of(digits: str) -> int | float:
    """An integer in JSON. Python refuses over 4,300 digits, and then the whole page would be unreadable."""
    return int(digits) if len(digits) <= 20 else float(digits)


def read_json(text: bytes) -> Any:
    """Parse JSON, with null for what is nested too deep. Raises ValueError."""
    try:
        return json.loads(text, parse_int=number_of)
    except RecursionError:  # one job with too deep JSON must not make the whole page unreadable
        return json.loads(flattened(text), parse_int=number_of)


def flattened(text: bytes) -> bytes:
    """The JSON text with null for each object and list below MAX_DEPTH."""
    kept, start, depth = bytearray(), 0, 0
    for found in JSON_TOKEN.finditer(text):
        if found[0] in (b"[", b"{"):
            depth += 1
            if depth == MAX_DEPTH + 1:
                kept += text[start : found.start()] + b"null"
        elif found[0] in (b"]", b"}"):
            if depth == MAX_DEPTH + 1:
                start = found.end()
            depth -= 1
    return bytes(kept) + (text[start:] if depth <= MAX_DEPTH else b"")


#: We read at most eleven levels of Buildkite's answers. A string matches as a whole, so brackets in it do not count.
MAX_DEPTH, JSON_TOKEN = 20, re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]', re.DOTALL)


def an_object(answer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object with that name, or {} if Buildkite sent something else."""
    value = answer.get(name)
    return value if isinstance(value, dict) else {}


def nodes_of(connection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The nodes of a connection of the GraphQL API."""
    edges = connection.get("edges")
    return [an_object(edge, "node") for edge in edges if isinstance(edge, dict)] if isinstance(edges, list) else []


def words_on(not_issued: Any) -> dict[str, str]:
    """Buildkite's reasons for jobs without a token, by uuid. The form is not documented: texts or objects."""
    words: dict[str, str] = {}
    for element in not_issued if isinstance(not_issued, list) else []:
        entry = element if isinstance(element, dict) else {"job_uuid": element}
        uuid = next((entry[name] for name in ("job_uuid", "uuid", "id") if isinstance(entry.get(name), str)), "")
        said = [entry[name] for name in ("code", "error", "reason", "message") if isinstance(entry.get(name), str)]
        words[uuid] = cut(": ".join(said), DETAIL_BYTES)
    return words


def message_of(text: bytes) -> str:
    """The message in an error's body, or the beginning of the body."""
    with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        answer = json.loads(text)
        return cut(str((answer["errors"][0] if answer.get("errors") else answer)["message"]), 300)
    return repr(text[:80].decode(errors="replace"))


def retry_after(headers: Mapping[str, str], status: int) -> float | None:
    """Seconds that Buildkite asks us to wait: `Retry-After`; else, on a 429, until its limits are reset.

    GraphQL has two limits (organization and user), and either may have been reached.
    """
    for names in (("Retry-After",), ("RateLimit-Reset", "RateLimit-User-Reset"))[: 2 if status == 429 else 1]:
        asked = []
        for name in names:
            with suppress(KeyError, ValueError):
                asked.append(float(headers[name]))
        if asked := [seconds for seconds in asked if 0 <= seconds < math.inf]:
            return max(asked)
    return None


def plain_reason(error: Exception) -> str:
    """The root cause of a requests exception, like "Connection refused", instead of nested reprs."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    # For a login that requests cannot send (not Latin-1), the error would quote a part of it.
    text = "a login has characters outside of Latin-1" if isinstance(error, UnicodeError) else without_login(str(error))
    return f"{type(error).__name__}: {text}"[:300]


def proxy_of(url: str) -> str:
    """The proxy for calls to this URL, without its login: "http://proxy:3128 (HTTPS_PROXY)"; "" if none."""
    proxies = requests.utils.get_environ_proxies(url)
    address = requests.utils.select_proxy(url, proxies)
    if not address:
        return ""
    [name, *_] = [name for name, each in proxies.items() if each == address]
    return f"{without_login(address)} ({name.upper()}_PROXY)"


# --- Monitor ---
# The second source of jobs: pipelines outside of clusters, by the GraphQL API.

#: Jobs per page of the monitor's list, and per query about jobs; pipelines per count.
#: A query may cost 50,000 points; a job costs 5.
MONITOR_PAGE, MONITOR_BATCH, MONITOR_SCOPES = 100, 100, 50
#: A page has at least so many jobs, and at most those that there are points for, if each of them is new.
MIN_MONITOR_PAGE, NEW_JOB_POINTS = 10, 10
#: The whole list is read again after this, to see which jobs have left it; or after so many seconds per job in it,
#: up to the third: with up to 500 jobs this takes a tenth of a user's points. In between, only new jobs are read.
WHOLE_LIST_SECONDS, WHOLE_LIST_SECONDS_A_JOB, MAX_WHOLE_LIST_SECONDS = 60.0, 1.2, 600.0
#: A list of one page that has grown shorter is read whole too, but at most this often.
SHORTER_LIST_SECONDS = 10.0
#: If a monitor must wait longer than the first before its next list, that is a problem, shown for the second.
SLOW_LIST_SECONDS, SLOW_NOTE_SECONDS = 5.0, 60.0
#: Points of a job from when it is put until it is done: to prove it free, once or twice, and to learn its end.
JOB_POINTS = 4
#: Bytes of all specs kept for the policy. Others are fetched again.
KEPT_SPECS_BYTES = 64 * 1024 * 1024
#: A scheduled job is taken only if its build is in one of these states.
BUILD_STATES = frozenset({"SCHEDULED", "RUNNING", "FAILING"})
#: The queue of an unclustered agent without a queue tag; a job with this rule counts as one without a queue.
DEFAULT_QUEUE = "default"

# The monitor's queries, built for a number of jobs or pipelines. Source: https://buildkite.com/docs/apis/graphql/schemas

#: Finds the organization; a pipeline by its slug and by its id.
ORGANIZATION_QUERY = """query ($slug: ID!) {
  organization(slug: $slug) { id pipelines(clustered: false, first: 1) { count } } }"""
PIPELINE_BY_SLUG = "query ($name: ID!) { pipeline(slug: $name) { id slug cluster { id } organization { slug } } }"
PIPELINE_BY_ID = (
    "query ($name: ID!) { node(id: $name) { ... on Pipeline { id slug cluster { id } organization { slug } } } }"
)
#: Waiting jobs of a pipeline, or of an organization outside of clusters: the same fields for both.
WAITING_JOBS = """... on Pipeline { jobs(type: [COMMAND], state: [SCHEDULED], %(page)s) { %(fields)s } }
  ... on Organization { jobs(clustered: false, type: [COMMAND], state: [SCHEDULED], %(page)s) { %(fields)s } }"""
PAGE_FIELDS = """count pageInfo { hasNextPage endCursor }
    edges { node { ... on JobTypeCommand { uuid agentQueryRules } } }"""
LIST_QUERY = f"""query ($id: ID!, $first: Int!, $after: String) {{ node(id: $id) {{
  {WAITING_JOBS % {"page": "first: $first, after: $after", "fields": PAGE_FIELDS}} }} }}"""
COUNT_FIELDS = "count edges { node { ... on JobTypeCommand { uuid } } }"
#: Fields of one job: its state; its spec; and all that we need of a new job.
STATE_FIELDS, SPEC_FIELDS = "state", "env command"
NEW_JOB_FIELDS = """uuid state env command agentQueryRules createdAt scheduledAt runnableAt
  priority { number } build { uuid number branch state } pipeline { uuid slug }"""


def count_query(scopes: int) -> str:
    """A query for so many pipelines or organizations: the number of waiting jobs, and the newest one."""
    waiting = WAITING_JOBS % {"page": "first: 1", "fields": COUNT_FIELDS}
    asked = " ".join(f"s{n}: node(id: $s{n}) {{ {waiting} }}" for n in range(scopes))
    return f"query ({', '.join(f'$s{n}: ID!' for n in range(scopes))}) {{ {asked} }}"


def jobs_query(jobs: int, fields: str) -> str:
    """A query for these fields of so many jobs."""
    asked = " ".join(f"j{n}: job(uuid: $j{n}) {{ ... on JobTypeCommand {{ {fields} }} }}" for n in range(jobs))
    return f"query ({', '.join(f'$j{n}: ID!' for n in range(jobs))}) {{ {asked} }}"


def monitor_key(organization: str) -> str:
    """The text that the store keeps as stack key of the monitor's queue."""
    return f"graphql:{organization}"


class Scope:
    """A pipeline, or all pipelines outside of clusters, with the waiting jobs that we have listed."""

    def __init__(self, node_id: str, name: str):
        self.id, self.name = node_id, name
        #: The jobs' uuids, including jobs that are not for us.
        self.jobs: set[str] = set()
        #: When the list may be read whole again because it has grown shorter; of the monotonic clock.
        self.whole_list_at = -math.inf


class Walk:
    """Reads the list of one scope, page by page, the newest job first."""

    def __init__(self, scope: Scope, is_whole: bool, wanted: int):
        #: `is_whole`: read to the end. `wanted`: at least so many jobs are new.
        self.scope, self.is_whole, self.wanted = scope, is_whole, wanted
        self.cursor: str | None = None
        self.seen: set[str] = set()

    def page_size(self, points: float) -> int:
        """How many jobs to list next. `points`: those that may be used."""
        most = int(max(MIN_MONITOR_PAGE, min(MONITOR_PAGE, points / NEW_JOB_POINTS)))
        return most if self.is_whole else max(MIN_MONITOR_PAGE, min(most, self.wanted + 5))


class Monitor(Source):
    """The jobs of pipelines outside of clusters, which only Buildkite's GraphQL API lists.

    There are no reservations: `reserve` only proves that no agent has a job at this moment, so it is checked again
    before the job is handed out. A poll counts the waiting jobs. If there are more than we know, or we do not know the
    newest, we list them with a few cheap fields, and then ask for the other fields of new jobs only.
    """

    has_reservations = has_notifications = has_tokens = can_succeed = False
    batch = MONITOR_BATCH

    def __init__(self, api: GraphApi, organization: str, watched: Watched):
        super().__init__(monitor_key(organization), watched.queue)
        self.token_setting = api.token_setting
        self._api, self._organization, self._pipelines = api, organization, watched.pipelines
        api.on_call = self._called
        self._lock = threading.Lock()  # guards what follows
        self._scopes: list[Scope] = []
        self._walks: list[Walk] = []
        self._whole_list_at = -math.inf  # monotonic
        self._pages = 0
        #: Each waiting job for us, in the form of the Stacks API's list.
        self._rows: dict[str, dict[str, Any]] = {}
        self._specs: dict[str, JobSpec] = {}
        self._specs_bytes = 0
        self._gone: set[str] = set()  # jobs that have left the list, for the next ListPage.gone
        self._missing: dict[str, str] = {}  # missing pipelines, and why
        self._is_slow, self._slow_until = False, -math.inf  # the latter of the monotonic clock

    def _called(self, queue_key: str, endpoint: str, status: int) -> None:
        self.on_call(queue_key, endpoint, status)

    def use(self, watched: Watched) -> None:
        """Use this [monitor] table from now on."""
        with self._lock:
            if watched.pipelines != self._pipelines:
                self._pipelines, self._scopes, self._walks, self._missing = watched.pipelines, [], [], {}

    @property
    def problems(self) -> list[str]:
        slow = f"{self._api.points} of the GraphQL API's limit, and we use only half of these"
        listed = [f"queue {self.queue_key}: is listed less often: {slow}"] if self._is_slow else []
        return [*self._missing.values(), *listed]

    def pause(self) -> float:
        now = time.monotonic()
        seconds = self._api.points.pause(now)
        if seconds > SLOW_LIST_SECONDS:
            self._slow_until = now + seconds + SLOW_NOTE_SECONDS
        if self._is_slow != (now < self._slow_until):
            self._is_slow = not self._is_slow
            word, pause = ("slow", f"{seconds:.0f}") if self._is_slow else ("as_usual", None)
            log.warning(event(word, queue=self.queue_key, pause_s=pause, points=self._api.points))
        return seconds

    # -- which pipelines

    def register(self) -> None:
        """Find the organization and the pipelines. Raises BuildkiteError, which names what is missing."""
        asked = f"organization {self._organization}"
        found = an_object(
            self._ask("register", asked, ORGANIZATION_QUERY, {"slug": self._organization}), "organization"
        )
        if not isinstance(found.get("id"), str):
            raise BuildkiteError(f"{asked}: Buildkite shows no such organization{self._api.needs}", 422)
        if not an_object(found, "pipelines").get("count"):
            problem = "no pipeline outside of clusters that the token may see, so [monitor] finds no jobs"
            raise BuildkiteError(f"{asked} has {problem}; jobs in clusters come by SCHEDULER_QUEUES", 422)
        names = self._pipelines
        scopes = self._found(names) if names else [Scope(found["id"], asked)]
        if not scopes:
            raise BuildkiteError(next(iter(self._missing.values())), 422)
        with self._lock:
            if names == self._pipelines:  # else `use` has changed them meanwhile, and they are looked for next
                self._scopes = scopes
        self.list_anew()

    def _found(self, names: Sequence[str]) -> list[Scope]:
        """The pipelines with these names that exist. Missing ones become problems, and do not stop the others."""
        scopes, missing = list[Scope](), dict[str, str]()
        for name in names:
            try:
                scopes.append(self._scope_of(name))
            except BuildkiteError as error:
                if error.status != 422:
                    raise
                missing[name] = str(error)
                if missing[name] != self._missing.get(name):
                    log.error(event("missing", queue=self.queue_key, pipeline=name, reason=missing[name]))
        self._missing = missing
        return scopes

    def list_anew(self) -> None:
        with self._lock:
            self._walks, self._whole_list_at = [], -math.inf

    def _scope_of(self, name: str) -> Scope:
        """A pipeline by its slug or its GraphQL id."""
        asked, slug = f"pipeline {name}", f"{self._organization}/{name}"
        # Every GraphQL id has an upper-case letter or "="; a slug never has.
        if re.fullmatch("[a-z0-9-]+", name):
            found = an_object(self._ask("register", asked, PIPELINE_BY_SLUG, {"name": slug}), "pipeline")
        else:
            found = an_object(self._ask("register", asked, PIPELINE_BY_ID, {"name": name}), "node")
        is_ours = an_object(found, "organization").get("slug") == self._organization
        if not isinstance(found.get("id"), str) or not is_ours:
            problem = f"Buildkite shows no such pipeline of {self._organization}"
            raise BuildkiteError(f"{asked} of [monitor]: {problem}{self._api.needs}", 422)
        if found.get("cluster"):
            problem = "is in a cluster: name its queue in SCHEDULER_QUEUES, and take it out of [monitor]"
            raise BuildkiteError(f"{asked} of [monitor] {problem}", 422)
        return Scope(found["id"], f"pipeline {found.get('slug')}")

    # -- list

    def list_jobs(self, cursor: str | None, now: float) -> ListPage:
        """A page of the newest jobs, if there are new ones; at times, a page of all waiting jobs."""
        if not self._scopes or (self._missing and time.monotonic() >= self._whole_list_at):
            self.register()
        if not self._walks:
            self._count()
        raw = self._next_page(self._walks[0]) if self._walks else []
        jobs, skipped = self._read(raw, now)
        self._pages += 1  # a cursor different from the last one means that there is more
        with self._lock:
            gone, self._gone = self._gone, set()
        return ListPage(jobs, None, str(self._pages) if self._walks else None, skipped, gone)

    def _count(self) -> None:
        """Count the waiting jobs of each scope, and begin a list if there is something new, or if it is time."""
        is_whole = time.monotonic() >= self._whole_list_at
        scopes, walks = self._scopes, list[Walk]()
        for start in range(0, len(scopes), MONITOR_SCOPES):
            part = scopes[start : start + MONITOR_SCOPES]
            found = self._ask("list", "", count_query(len(part)), {f"s{n}": each.id for n, each in enumerate(part)})
            for n, scope in enumerate(part):
                count, newest, _ = self._read_list(found, f"s{n}", scope)
                with self._lock:
                    known, is_known = len(scope.jobs), all(uuid in scope.jobs for uuid, _ in newest)
                # Fewer: jobs have left, and others may have come. That alone is no reason to read a long list.
                has_fewer = count < known <= MONITOR_PAGE and time.monotonic() >= scope.whole_list_at
                if has_fewer:
                    scope.whole_list_at = time.monotonic() + SHORTER_LIST_SECONDS
                if is_whole or has_fewer or count > known or not is_known:
                    walks.append(Walk(scope, is_whole or has_fewer, count - known))
        if is_whole:
            seconds = WHOLE_LIST_SECONDS_A_JOB * sum(len(scope.jobs) for scope in scopes)
            pause = min(max(WHOLE_LIST_SECONDS, seconds), MAX_WHOLE_LIST_SECONDS)
            self._whole_list_at = time.monotonic() + pause
        self._walks = walks

    def _next_page(self, walk: Walk) -> list[dict[str, Any]]:
        """The jobs for us on the next page."""
        scope = walk.scope
        asked = {"id": scope.id, "first": walk.page_size(self._api.points.spare), "after": walk.cursor}
        _, listed, cursor = self._read_list(self._ask("list", "", LIST_QUERY, asked), "node", scope)
        ours = [uuid for uuid, rules in listed if self._is_for_us(rules)]
        self._ask_about([uuid for uuid in ours if uuid not in self._rows])
        with self._lock:
            walk.cursor = cursor
            walk.seen |= {uuid for uuid, _ in listed}
            are_new = [uuid not in scope.jobs for uuid, _ in listed]
            walk.wanted -= sum(are_new)
            scope.jobs |= walk.seen
            if not cursor:  # all pages were read: jobs not among them have left
                left = scope.jobs - walk.seen
                self._gone |= left & self._rows.keys()
                for uuid in left:
                    self._forget(uuid)
            if not cursor or not (walk.is_whole or walk.wanted > 0 or are_new[-1:] == [True]):
                self._walks = [each for each in self._walks if each is not walk]
            return [self._rows[uuid] for uuid in ours if uuid in self._rows]

    def _read_list(
        self, data: Mapping[str, Any], name: str, scope: Scope
    ) -> tuple[int, list[tuple[str, list[Any]]], str | None]:
        """Read a page: the number of jobs in all, each job's uuid and rules, and the cursor of the next page."""
        jobs = an_object(an_object(data, name), "jobs")
        if not isinstance(count := jobs.get("count"), int):
            # 404 makes Intake register again, which looks for the pipeline again.
            raise BuildkiteError(f"list {scope.name}: Buildkite shows it no more{self._api.needs}", 404)
        listed = [
            (node["uuid"], node.get("agentQueryRules") or [])
            for node in nodes_of(jobs)
            if isinstance(node.get("uuid"), str)
        ]
        info = an_object(jobs, "pageInfo")
        return count, listed, (info.get("endCursor") or None) if info.get("hasNextPage") is True else None

    def _is_for_us(self, rules: Iterable[Any]) -> bool:
        """Whether a job belongs to our queue: its rules name it, `default`, or no queue."""
        pairs = (str(rule).partition("=") for rule in rules)
        return {value.strip() for name, _, value in pairs if name.strip() == "queue"} <= {self.queue_key, DEFAULT_QUEUE}

    def _ask_about(self, uuids: Sequence[str]) -> None:
        """Get all fields of new jobs."""
        for uuid, found in self._jobs("list", uuids, NEW_JOB_FIELDS, is_secret=True).items():
            build = an_object(found, "build")
            if found.get("state") != "SCHEDULED" or build.get("state") not in BUILD_STATES:
                continue
            spec = spec_of(found)
            row = {
                "id": uuid,
                "priority": an_object(found, "priority").get("number") or 0,
                "agent_query_rules": found.get("agentQueryRules"),
                "scheduled_at": found.get("scheduledAt") or found.get("createdAt"),
                "runnable_at": found.get("runnableAt"),
                "pipeline": an_object(found, "pipeline"),
                "build": build,
                "step": {"key": spec.env.get("BUILDKITE_STEP_KEY") or None},
            }
            self._api.points.promise(JOB_POINTS)
            with self._lock:
                self._rows[uuid] = row
                if self.keeps_specs and self._specs_bytes + spec.size <= KEPT_SPECS_BYTES:
                    self._specs[uuid], self._specs_bytes = spec, self._specs_bytes + spec.size

    def _forget(self, uuid: str) -> None:
        """The job does not wait any more. The caller holds the lock."""
        for scope in self._scopes:
            scope.jobs.discard(uuid)
        self._rows.pop(uuid, None)
        if spec := self._specs.pop(uuid, None):
            self._specs_bytes -= spec.size

    # -- jobs by their uuids

    def reserve(self, uuids: Sequence[str], seconds: int) -> tuple[set[str], set[str]]:
        free = {uuid for uuid, word in self._words("reserve", uuids).items() if word == "scheduled"}
        return free, set(uuids) - free

    def states(self, uuids: Sequence[str]) -> dict[str, str]:
        return self._words("states", uuids)

    def finish(self, uuid: str, detail: str, exit_status: int = -1) -> None:
        """Cancel the job: GraphQL has no other way to end it, and shows no text."""
        self._api.cancel_waiting(uuid, self.queue_key)

    def show_job(self, uuid: str) -> JobSpec:
        """The job's spec; usually it is already known from the list."""
        with self._lock:
            spec = self._specs.get(uuid)
        found = {} if spec else self._jobs("show-job", [uuid], SPEC_FIELDS, is_secret=True)
        if not spec and uuid not in found:
            raise BuildkiteError(f"show-job {uuid} on queue {self.queue_key}: Buildkite shows no such job", 404)
        return spec or spec_of(found[uuid])

    def _words(self, endpoint: str, uuids: Sequence[str]) -> dict[str, str]:
        """Buildkite's word for each job's state."""
        found = self._jobs(endpoint, uuids, STATE_FIELDS)
        words = {uuid: cut(str(job.get("state")).lower(), 100) for uuid, job in found.items()}
        with self._lock:
            for uuid in uuids:
                if words.get(uuid) != "scheduled":
                    self._forget(uuid)
        return words

    def _jobs(
        self, endpoint: str, uuids: Sequence[str], fields: str, *, is_secret: bool = False
    ) -> dict[str, dict[str, Any]]:
        """These fields of each job, without jobs that Buildkite does not show."""
        if not uuids:
            return {}
        variables = {f"j{n}": uuid for n, uuid in enumerate(uuids)}
        data = self._ask(endpoint, "", jobs_query(len(uuids), fields), variables, is_secret=is_secret)
        return {uuid: found for name, uuid in variables.items() if (found := an_object(data, name))}

    def _ask(
        self, endpoint: str, about: str, query: str, variables: Mapping[str, Any], *, is_secret: bool = False
    ) -> dict[str, Any]:
        what = f"{endpoint} {about}" if about else f"{endpoint} on queue {self.queue_key}"
        return self._api.ask(what, query, variables, self.queue_key, endpoint, is_secret=is_secret)


def spec_of(job: Mapping[str, Any]) -> JobSpec:
    """The spec of a job of the GraphQL API; its `env` is a list of NAME=value."""
    env, command = job.get("env"), job.get("command")
    pairs = (text.partition("=") for text in env if isinstance(text, str)) if isinstance(env, list) else ()
    return JobSpec({name: value for name, _, value in pairs}, command if isinstance(command, str) else "")


# --- Store ---
# The verbs, written once for both stores. SqliteRows and RedisRows know no rules: they read rows, and write a row only
# if it has not changed since it was read.


class MoveContext(NamedTuple):
    """What a move may read besides its job: rows of workers, and when Buildkite last answered about each queue."""

    workers: dict[str, WorkerRow]
    answers: Mapping[str, float]

    def worker(self, name: str | None) -> WorkerRow | None:
        """The row of the calling worker, or of a worker named in the job."""
        return self.workers.get(name or "")

    def answered_at(self, queue_key: str) -> float:
        """When Buildkite last answered us about that queue; 0: unknown."""
        return self.answers.get(queue_key, 0.0)


#: On whose behalf rows are changed: LEADER, OPERATOR, or a worker; None: a caller that names only a claim.
Speaker = Worker | str | None
LEADER = "leader"

#: Returns the move for a job's row, or None for no change. The row is None if the store has no such job.
Step = Callable[[str, "Job | None", MoveContext], "Move | None"]


class TakeResult(NamedTuple):
    """The result of `take`: a job, or the uuid of a job that the worker already has, or neither."""

    job: Job | None = None
    has: str | None = None
    #: The worker's row, the holds or the rule sets have changed: read them and decide again.
    is_stale: bool = False


class Counts(NamedTuple):
    """The counts of a store, from one moment; but with Redis the jobs of `held` are read just after the others."""

    waiting: list[RuleSetCount]
    at_work: list[JobAtWorker]
    outcomes: dict[str, int]
    #: By queue key and outcome: how often a job became `done`.
    totals: list[tuple[str, str, int]]


#: Maximum of jobs changed by one script of Redis or one transaction of upkeep: other writes wait meanwhile.
SLICE = 250
#: Number of operators' acts that are stored.
KEPT_ACTS = 500


class Store:
    """All jobs. Every verb is atomic for each job, and may raise StoreUnavailable.

    The verbs that change jobs by Buildkite's answers, freeze windows or the policy, and `expire`, `pause`, `prune`,
    `restart_leases` and `renew_leases`, are only for the leader: at another scheduler their writes raise Fenced.

    `asked`: the value of `sequence()` before a call to Buildkite; its answer is applied only to jobs whose `version`
    is not newer. Verbs on several jobs return those that they changed, with their new rows.
    """

    def __init__(self, rows: SqliteRows | RedisRows, settings: Settings):
        self.rows, self._settings = rows, settings
        #: Called with each written move whose `is_state_change` is true, and its time.
        self.on_move: Callable[[Move, float], None] = lambda move, now: None
        #: Returns the version of the policy in force at a time; None if there is none or it is suspended.
        self.policy: Callable[[float], str | None] = lambda now: None
        #: Called after each claim and each call of `_apply`, with the verb and the seconds that it took.
        self.on_timed: Callable[[str, float], None] = lambda verb, seconds: None
        #: The error of the last `probe`; "" if it worked.
        self._unwritable = ""
        #: Decides which freeze window, if any, holds a job.
        self.windows = FreezeWindows(time.time)
        self._lock = threading.Lock()  # guards the next two
        self._rule_sets_version: object = None
        self._rule_sets = RuleIndex()
        self._claims_known_from = math.inf  # earlier claims may be missing: restored backup, power loss, Redis restart

    def with_rows(self, rows: SqliteRows | RedisRows) -> Store:
        """The same store with other rows: those that write for a new term's leader."""
        store = copy.copy(self)
        store.rows = rows
        return store

    def _apply(self, verb: str, uuids: Collection[str], step: Step, now: float, by: Speaker = LEADER) -> list[Move]:
        started_at = time.perf_counter()
        try:
            moves = self.rows.apply(uuids, step, now, by)
        finally:
            self.on_timed(verb, time.perf_counter() - started_at)
        for move in moves:
            self._tell(move, now)
        return moves

    def _tell(self, move: Move, now: float) -> None:
        if move.is_state_change:
            try:
                self.on_move(move, now)
            except Exception:  # the change is written, so the caller must get its result
                log.exception(event("failed", job=move.job.uuid, reason="a bug of the scheduler; please report it"))

    # -- verbs by Buildkite's answers

    def sequence(self) -> int:
        """A number that grows with every change of a job's `version`."""
        return self.rows.sequence()

    def answered(self, queue_key: str, now: float) -> None:
        """Remember when Buildkite answered about that queue. A failed attempt counts only if it answered meanwhile."""
        self.rows.answered(queue_key, now)

    def looked(self, queue_key: str, now: float) -> None:
        """Remember when Buildkite was successfully asked for the states of that queue's jobs."""
        self.rows.answered(f"{queue_key} states", now)

    def looked_at(self, queue_key: str) -> float:
        return self.rows.answered_at(f"{queue_key} states")

    def put(self, jobs: Sequence[Job], asked: int, now: float, *, is_reserved: bool = True) -> list[Job]:
        """Store jobs that Buildkite listed as scheduled, as `reserving`; return those that were new or `done`.

        A job that we already have is listed because its reservation has ended: `ready` and `running` jobs become
        `reserving` again; a `leased` job stays, and its reservation must be renewed. These are not
        returned. If the source has no reservations (`is_reserved` is false), `ready` jobs stay too.
        """
        listed = {job.uuid: job for job in jobs}
        step: Step = lambda uuid, job, _: put(job, listed[uuid], asked, now, is_reserved=is_reserved)  # noqa: E731
        moves = self._apply("put", listed, step, now)
        return [move.job for move in moves if move.verb == "put"]

    def confirm(self, uuids: Collection[str], asked: int, expires_at: float, now: float) -> list[Job]:
        """Apply a batch-reserve's `reserved`: proof that each job is ours, and that no agent has it.

        `reserving` → `ready`; but a job that was stopped or failed too often stays `reserving` and gets a
        `finish_detail`, so it is not handed out. `ready` and `leased` jobs get their reservation renewed, and are not
        returned. A job that a freeze window matches, or that the policy has not decided, is held in the same move.
        """
        with self.windows.deciding() as frozen:
            policy = self.policy(now)

            def step(uuid: str, job: Job | None, facts: MoveContext) -> Move | None:
                if job is None or job.version > asked:
                    return None
                worker = facts.worker(job.tries[-1]["worker"]) if job.tries else None
                return confirm(job, worker, expires_at, self._settings.max_attempts, now, policy, frozen=frozen(job))

            moves = self._apply("confirm", dict.fromkeys(uuids), step, now)
        if any(move.worker and move.worker.fault_at == now for move in moves):
            self.judge_hosts(now)
        return self._changed_jobs(moves)

    def learn(
        self, findings: Mapping[str, JobFinding], asked: int, now: float, *, is_reserved: bool = True
    ) -> list[Job]:
        """Apply Buildkite's answers about jobs; return the jobs whose state changed.

        If the source has no reservations (`is_reserved` is false), any agent may take a job: no move is BY_RIVAL.
        """
        claims_known_from = self._claims_known_from if is_reserved else math.inf

        def step(uuid: str, job: Job | None, facts: MoveContext) -> Move | None:
            if job is None or job.version > asked:
                return None
            return learn(job, facts.worker(job.worker), findings[uuid], now, claims_known_from)

        moves = self._apply("learn", findings, step, now)
        for move in moves:
            if move.verb in ("acquire", "run") and (found := ended_quarantines(move.job, self.rows.known_holds())):
                self._end_quarantines(found, move.job.host, "an agent has acquired a job")
        return self._changed_jobs(moves)

    def finish(self, uuid: str, now: float) -> list[Job]:
        """Buildkite confirmed that we finished the job: `reserving` → `done`."""
        return self._changed_jobs(
            self._apply("finish", [uuid], lambda _, job, __: finish(job, now) if job else None, now)
        )

    def refuse_finish(self, uuid: str, now: float) -> None:
        """Buildkite refused to finish the job: do not try again for a while."""
        self._apply("finish", [uuid], lambda _, job, __: refuse_finish(job, now) if job else None, now)

    # -- verbs by the policy

    def policy_steps(self, queue_key: str, step: str, now: float, limit: int) -> list[str]:
        """Jobs for which this step of the policy's tasks is due, by due time, then in line order."""
        return self.rows.policy_steps(queue_key, step, now, limit)

    def decide(self, moves: Mapping[str, Callable[[Job], Move | None]], now: float) -> list[Job]:
        """Apply the policy's decisions. A job that must not be decided any more does not change."""
        step: Step = lambda uuid, job, _: moves[uuid](job) if job else None  # noqa: E731
        return [move.job for move in self._apply("decide", moves, step, now)]

    def review(self, uuids: Collection[str], now: float) -> list[Job]:
        """Adapt these jobs to the policy in force; return those that changed."""
        policy = self.policy(now)
        step: Step = lambda _, job, __: review(job, policy, now) if job else None  # noqa: E731
        return [move.job for move in self._apply("review", uuids, step, now)]

    def end_avoid(self, uuids: Collection[str], now: float) -> list[Job]:
        """Remove the policy's `avoided` rules from these jobs, if their time is over."""
        step: Step = lambda _, job, __: end_avoid(job, now) if job else None  # noqa: E731
        return [move.job for move in self._apply("review", uuids, step, now)]

    def chained(self, chain: str, limit: int) -> list[Job]:
        """The last jobs of the same build, step and parallel index for which the policy was asked, the newest last."""
        return sorted(self.rows.chained(chain, limit), key=lambda job: (job.put_at, job.scheduled_at, job.uuid))

    @staticmethod
    def _changed_jobs(moves: Sequence[Move]) -> list[Job]:
        return [move.job for move in moves if move.is_state_change]

    # -- verbs by workers

    def claim(self, worker: Worker, now: float, holds: Sequence[Hold] = ()) -> Job | None:
        """Lease the first matching job in line; None if there is none. Raises WorkerHeld and WorkerNameTaken.

        A worker that already has a `leased` job gets the same claim again, because the answer was lost. Or that claim
        ends, for example because an older session made it: see the move `claim_again`.
        `holds`: holds besides those of the table.
        """
        moves: list[Move] = []
        started_at = time.perf_counter()
        try:
            return self._claim(worker, now, holds, moves)
        finally:
            self.on_timed("claim", time.perf_counter() - started_at)
            for move in moves:
                self._tell(move, now)

    def _claim(self, worker: Worker, now: float, holds: Sequence[Hold], moves: list[Move]) -> Job | None:
        """Like `claim`; appends its moves to `moves`."""
        while True:
            row = self._enter(worker, now)
            table = self.rows.known_holds()
            all_holds = (*table.rows, *holds)
            failing = blocked(None, row, (), now)
            held = failing or blocked(None, worker, all_holds, now)
            # A worker held by operators may still get jobs that were allowed.
            rule_sets = [] if failing else self._matching_rule_sets(worker, all_holds, now)
            lease = leased(worker, secrets.token_hex(8), self._settings.lease_seconds, now)
            taken = self.rows.take(rule_sets, lease, row, table.version, now)
            if taken.job:
                moves.append(Move("claim", "", taken.job))
                self._extend_quarantines(worker, now)
                return taken.job
            if taken.has:
                moves += self._claim_again(taken.has, worker, now)
                if moves and moves[-1].verb == "claim":
                    return moves[-1].job
            elif not taken.is_stale:
                if held:
                    raise WorkerHeld(held.until or math.inf)
                return None

    def _enter(self, worker: Worker, now: float) -> WorkerRow | None:
        """The row of a named worker, updated with its current session."""
        return self._change_worker(worker, lambda row: enter(row, worker, now)) if worker.name else None

    def take_report(self, worker: Worker, fields: Mapping[str, Any], now: float) -> WorkerRow:
        """Store fields that a worker reported, and return its row. Raises UnknownWorker and WorkerNameTaken."""
        return self._change_worker(worker, lambda row: take_report(row, worker, fields, now))

    def leave(self, worker: Worker, now: float) -> list[Job]:
        """A worker has ended: forget it. A job that was leased to it goes back to `reserving`, and is returned.

        Raises UnknownWorker and WorkerNameTaken.
        """
        step: Step = lambda _, job, __: leave(job, worker, now) if job else None  # noqa: E731
        leased = [job.uuid for job in self.rows.counts().at_work if job.worker == worker.name]
        moves = self._apply("expire", leased, step, now, worker) if leased else []
        while True:
            before = self.rows.worker_of(worker)
            take_report(before, worker, {}, now)
            if self.rows.write_worker(before, None):
                return [move.job for move in moves]

    def _change_worker(self, worker: Worker, change: Callable[[WorkerRow | None], WorkerRow]) -> WorkerRow:
        while True:
            before = self.rows.worker_of(worker)
            after = change(before)
            if after is before or self.rows.write_worker(before, after):
                return after

    def _claim_again(self, uuid: str, worker: Worker, now: float) -> list[Move]:
        seconds = self._settings.lease_seconds, self._settings.acquire_seconds
        step: Step = lambda _, job, __: claim_again(job, worker, *seconds, now) if job else None  # noqa: E731
        return self.rows.apply([uuid], step, now, worker)

    def _matching_rule_sets(self, worker: Worker, holds: Sequence[Hold], now: float) -> list[str]:
        """The rule sets whose jobs the worker may have now."""
        version, known = self.rows.rule_sets()
        with self._lock:
            if version != self._rule_sets_version:
                self._rule_sets.keep(known)
                self._rule_sets_version = version
            matching = list(self._rule_sets.matching(worker.profile))
        suited = ((text, rules) for text, rules in matching if not rules.is_by_policy or rules.suits(worker))
        return [text for text, rules in suited if not (holds and blocked(rules, worker, holds, now))]

    def touch(self, holder: Holder, now: float) -> Job:
        """Renew the claim's lease. This and the next three raise UnknownJob, StaleClaim and WorkerNameTaken."""
        seconds = self._settings.lease_seconds
        return self._by_holder("touch", holder, now, lambda job, _: touch(job, seconds, now))

    def release(self, holder: Holder, reason: str, now: float, *, is_unfit: bool = False) -> Job:
        """Give the job back: `leased` → `reserving`.

        It counts as an attempt only if the agent had `acquire_seconds` to acquire the job.
        """
        seconds = self._settings.acquire_seconds

        def step(job: Job, facts: MoveContext) -> Move | None:
            return release(job, reason, facts.answered_at(job.queue_key), seconds, now, is_unfit=is_unfit)

        return self._by_holder("release", holder, now, step)

    def withdraw(self, holder: Holder, reason: str, code: str, now: float) -> Job:
        """End a claim that its worker cannot use."""
        return self._by_holder("release", holder, now, lambda job, _: withdraw(job, reason, code, now))

    def complete(self, holder: Holder, ended: AgentEnd, now: float) -> Job:
        """The agent has exited: `leased` → `reserving`, because Buildkite must tell the job's state; `running` stays.

        May be repeated. Without a claim's id, the worker's name must be that of the job's worker.
        """

        def step(job: Job, facts: MoveContext) -> Move | None:
            return complete(job, facts.worker(job.worker), holder, ended, facts.answered_at(job.queue_key), now)

        return self._by_holder("complete", holder, now, step, completed_too=True)

    def _by_holder(
        self,
        verb: str,
        holder: Holder,
        now: float,
        step: Callable[[Job, MoveContext], Move | None],
        *,
        completed_too: bool = False,
    ) -> Job:
        """Apply a verb by the worker that has the job; return the job, changed or not."""

        def checked(_: str, job: Job | None, facts: MoveContext) -> Move:
            row = facts.worker(holder.worker.name) if holder.worker else None
            job = check_holder(job, row, holder, now, completed_too=completed_too)
            return step(job, facts) or Move(verb, "", job, is_state_change=False)

        return self._apply(verb, [holder.uuid], checked, now, holder.worker)[0].job

    # -- verbs by operators

    def hold(self, wanted: Hold, act: OperatorAct | None, *, replace: bool, now: float) -> tuple[Hold, Hold | None]:
        """Hold a target: from now on, no scheduler hands out what the hold includes.

        Returns the resulting hold, and the earlier one of the same owner, if any. An earlier hold that does not end
        sooner stays, unless `replace`. Without an act nothing is written (dry run).
        """
        while True:
            table = self.rows.holds()
            found = next((hold for hold in table.of(wanted.target, wanted.owner) if not is_over(hold, now)), None)
            hold = combine_holds(found, wanted, replace=replace, now=now)
            if hold == found or act is None or self.rows.change_holds(table.version, [hold], [], act):
                return hold, found

    def lift(self, target: str, owners: Sequence[str], act: OperatorAct) -> list[Hold]:
        """End these owners' holds on exactly this target; return them.

        With owner "machine", also end the backoff of the target's workers, and their wait for a person.
        """
        ended = self._end_backoffs(target, act.at) if "machine" in owners else []
        while True:
            table = self.rows.holds()
            found = table.of(target, *owners)
            # Write also if only backoffs ended: this write wakes waiting claims at other schedulers.
            if not (found or ended) or self.rows.change_holds(table.version, [], found, act):
                return found + ended

    def _end_backoffs(self, target: str, now: float) -> list[Hold]:
        if target.partition(":")[0] not in ("worker", "host", "tag"):
            return []
        named, ended = Hold(target, "machine", ""), []
        for each in self.rows.workers():
            row: WorkerRow | None = each
            while row and binds(named, None, row) and clear_machine_holds(row) != row:
                hold = blocked(None, row, (), now)
                if self.rows.write_worker(row, clear_machine_holds(row)):
                    ended += [hold] if hold else []
                    break
                row = self.rows.worker_of(Worker(row.name, row.session, NO_PROFILE))
        return ended

    def act(self, act: OperatorAct) -> None:
        """Store an operator's act."""
        self.rows.act(act)

    def acts(self, limit: int) -> list[OperatorAct]:
        """The last acts of operators, the newest first."""
        return self.rows.acts(limit)

    def stop(self, uuid: str, note: Mapping[str, Any], now: float) -> Job:
        """Store that the job must end. Raises UnknownJob and JobDone, as `allow` and `first` do.

        A job without an agent is finished at Buildkite; a worker that has the job learns of the stop at its next touch.
        May be repeated.
        """
        return self._by_operator("stop", uuid, lambda job: stop(job, note), now)

    def to_cancel(self) -> list[Job]:
        """Stopped jobs that Buildkite must cancel. It reads all running jobs."""
        found: list[Job] = []
        after: tuple[int, float, str] | None = None
        while page := self.rows.page(JobState.RUNNING, after, SLICE):
            found += filter(is_to_cancel, page)
            after = page[-1].order
        return found

    def cancelled(self, uuid: str, problem: str, now: float) -> None:
        """Store Buildkite's answer to our request to cancel the job; `problem` "": accepted."""
        self._apply("cancel", [uuid], lambda _, job, __: cancel(job, problem, now) if job else None, now)

    def allow(self, uuid: str, note: Mapping[str, Any], now: float) -> Job:
        """Let the job pass all of people's holds. May be repeated."""
        return self._by_operator("allow", uuid, lambda job: allow(job, note), now)

    def first(self, uuid: str, note: Mapping[str, Any], now: float) -> Job:
        """Put the job first in our line."""
        return self._by_operator("first", uuid, lambda job: first(job, note), now)

    def _by_operator(self, verb: str, uuid: str, step: Callable[[Job], Move | None], now: float) -> Job:
        """Apply an operator's verb durably; return the job, changed or not."""

        def known(_: str, job: Job | None, __: MoveContext) -> Move:
            if job is None:
                raise unknown_job(uuid)
            return step(job) or Move(verb, "", job, is_state_change=False)

        return self._apply(verb, [uuid], known, now, OPERATOR)[0].job

    def forget(self, name: str) -> WorkerRow:
        """Forget a worker; return its last row. Raises UnknownWorker, and WorkerBusy while it has a job."""
        for job in self.rows.counts().at_work:
            if job.worker == name:
                raise WorkerBusy(
                    f"worker {name!r} has job {job.uuid}, which is {job.state}: stop it, or wait for its end"
                )
        while row := self.rows.worker_of(Worker(name, "", NO_PROFILE)):
            if self.rows.write_worker(row, None):
                return row
        raise UnknownWorker(f"worker {name!r} is unknown; it may be forgotten already")

    # -- hosts with failures

    def judge_hosts(self, now: float) -> None:
        """Quarantine hosts whose agents end without acquiring. If too many hosts do, lift all quarantines instead."""
        while True:
            table = self.rows.holds()
            new, over = quarantine_changes(find_host_failures(self.rows.workers(), now), table, now)
            if not (new or over) or self.rows.change_holds(table.version, new, over):
                break
        for hold in new:
            log.error(event("quarantined", target=hold.target, until=rfc3339(hold.until), reason=hold.note))
        for hold in over:
            reason = "agents on many hosts cannot acquire their jobs, so this host is not the cause"
            log.warning(event("lifted", target=hold.target, owner=hold.owner, reason=reason))

    def _extend_quarantines(self, worker: Worker, now: float) -> None:
        """A claim tests a host after its quarantine: other claims of the host must wait until this agent acquires."""
        while True:
            table = self.rows.known_holds()
            found = [hold for hold in table.rows if is_half_open(hold, now) and binds(hold, None, worker)]
            if not found or self.rows.change_holds(table.version, [extend_quarantine(hold, now) for hold in found], []):
                return

    def _end_quarantines(self, found: Sequence[Hold], host: str | None, reason: str) -> None:
        """The host works again: end its quarantine and its workers' backoffs."""
        table = self.rows.holds()
        left = [hold for hold in found if hold in table.rows]
        if not left or not self.rows.change_holds(table.version, [], left):
            return  # another scheduler has done it, or the next acquired job will
        log.info(event("lifted", target=f"host:{host}", owner="machine", reason=reason))
        for row in self.rows.workers():
            if row.host == host and (free := clear_failures(row)):
                self.rows.write_worker(row, free)

    # -- periodic builds

    def timetable(self) -> Timetable:
        return self.rows.timetable()

    def change_periodic(
        self,
        name: str,
        step: Callable[[PeriodicRow | None], PeriodicRow | None],
        act: OperatorAct | None = None,
        by: Speaker = LEADER,
    ) -> PeriodicRow | None:
        """Apply a move to the row of that name; store the result and the act durably. Returns the move's result."""
        while True:
            table = self.rows.timetable()
            before = table.of(name)
            after = step(before)
            if after is None or after == before or self.rows.write_periodic(table.version, name, after, act, by):
                return after

    def forget_periodic(self, name: str) -> None:
        while (table := self.rows.timetable()).of(name):
            if self.rows.write_periodic(table.version, name, None, None, LEADER):
                return

    # -- upkeep

    def end_holds(self, now: float) -> Holds:
        """Delete ended holds, so that a clock that is set back does not revive them; return the table.

        A quarantine that waits for its test stays.
        """
        while True:
            table = self.rows.holds()
            over = [hold for hold in table.rows if is_over(hold, now) and not is_half_open(hold, now)]
            if not over:
                return table
            hold = over[0]
            act = OperatorAct(hold.until or now, hold.by, EXPIRED, hold.target, hold.note)
            if self.rows.change_holds(table.version, [], [hold], act if hold.owner == OPERATOR else None):
                log.info(event("lifted", target=hold.target, owner=hold.owner, by=hold.by, reason="its time is over"))

    def expire(self, queue_keys: Collection[str], now: float) -> list[Job]:
        """End expired leases: `leased` → `reserving`; return these jobs.

        Also `ready` → `reserving` for jobs of these queues whose reservation has expired (Buildkite was unreachable).
        """

        def step(_: str, job: Job | None, facts: MoveContext) -> Move | None:
            return expire(job, facts.answered_at(job.queue_key), now) if job else None

        run_out, moves = self.rows.run_out(queue_keys, now), []
        for start in range(0, max(1, len(run_out)), SLICE):
            moves += self._apply("expire", run_out[start : start + SLICE], step, now)
        return [move.job for move in moves if move.verb == "expire"]

    def freeze(self, uuids: Collection[str], now: float) -> list[Job]:
        """Hold those of these jobs that a freeze window matches now; release the others, and return those now free."""
        with self.windows.deciding() as frozen:
            policy = self.policy(now)
            step: Step = lambda _, job, __: freeze(job, frozen(job), policy, now) if job else None  # noqa: E731
            moves = self._apply("freeze", uuids, step, now)
        return [move.job for move in moves if not move.job.held_by]

    def pause(self, queue_key: str, paused: bool, now: float) -> bool:
        """Store whether Buildkite paused the queue; return whether that changed. A paused queue hands out no job."""
        hold = Hold(f"queue:{queue_key}", "buildkite", "queue_paused", since=now)
        while True:
            table = self.rows.holds()
            found = table.of(hold.target, hold.owner)
            if paused is bool(found):
                return False
            if self.rows.change_holds(table.version, [hold] if paused else [], found):
                return True

    def restart_leases(self, now: float, *, confirm: bool) -> None:
        """We may have missed calls, or lost rows: leases get their full time, all reservations must be renewed.

        `confirm`: `ready` jobs become `reserving` until Buildkite confirms them.
        """
        self._claims_known_from = now
        changes = restarted(self._settings.lease_seconds, confirm=confirm, now=now)
        self.rows.restart(changes, lambda row: restarted_worker(row, now), now)

    def renew_leases(self, now: float) -> None:
        """Workers could not touch, because no scheduler could receive it: all leases get their full time."""
        self._claims_known_from = now
        self.rows.change_all({JobState.LEASED: {"lease_expires_at": now + self._settings.lease_seconds}})

    def prune(self, before: float) -> int:
        """Forget jobs that were done before that time, unused rule sets, and old workers; return the number of jobs."""
        count = 0
        while True:
            old = self.rows.done_before(before, SLICE)
            self.rows.delete(old)
            count += len(old)
            if len(old) < SLICE:
                break
        self.rows.forget_rule_sets()
        self._forget_workers(before + KEEP_DONE_SECONDS - FORGET_SECONDS)
        return count

    def _forget_workers(self, before: float) -> None:
        """Forget workers without a job that are silent since then; if there are too many, also the longest silent."""
        busy = {job.worker for job in self.rows.counts().at_work}
        rows = sorted((row for row in self.rows.workers() if row.name not in busy), key=last_sign_of)
        too_many = len(rows) + len(busy) - MAX_WORKERS * 9 // 10 if self.has_many_workers() else 0
        for index, row in enumerate(rows):
            if index < too_many or last_sign_of(row) < before:
                self.rows.write_worker(row, None)

    def has_many_workers(self) -> bool:
        """Whether there are too many workers, so that some must be forgotten early."""
        return self.rows.count_workers() > MAX_WORKERS

    def remember_stacks(self, stack_keys: Mapping[str, str]) -> dict[str, int]:
        """Store each queue's stack key. Raises SettingsError if it changed while the queue has unfinished jobs.

        Returns the number of unfinished jobs of each queue that is not in `stack_keys`.
        """
        known, left = self.rows.stacks()
        check_stacks(known, left, stack_keys)
        self.rows.remember_stacks(stack_keys)
        return {queue_key: count for queue_key, count in left.items() if count and queue_key not in stack_keys}

    # -- reads

    def stamp(self) -> object:
        """A value that changes with every change of a hold or of a job's `version`."""
        return self.rows.sequence(), self.rows.holds().version

    def known_rule_sets(self) -> Collection[str]:
        """The rule sets of jobs that wait or waited lately."""
        return self.rows.rule_sets(fresh=True)[1]

    def known_holds(self) -> Sequence[Hold]:
        """The table of holds, from a recent read."""
        return self.rows.known_holds().rows

    def unconfirmed(self, queue_key: str, due_before: float, limit: int, now: float = math.inf) -> list[str]:
        """Jobs for the next batch-reserve: `reserving` ones in order, then reservations that end before `due_before`.

        While Buildkite pauses the queue, only jobs that were reserved before. Without jobs deferred beyond `now`.
        """
        paused = any(
            hold.owner == "buildkite" and binds(hold, RuleSet.of(queue_key, ()), None)
            for hold in self.rows.holds().rows
        )
        first = self.rows.waiting(queue_key, now, limit, fresh=not paused)
        return first + self.rows.due(queue_key, due_before, limit - len(first))

    def unfinished(self, queue_key: str) -> list[str]:
        """The uuids of all jobs that are not `done`."""
        return self.rows.unfinished(queue_key)

    def leased_or_running(self, queue_key: str) -> list[str]:
        """The uuids of all `leased` and `running` jobs."""
        return self.rows.leased_or_running(queue_key)

    def intents(self, queue_key: str, now: float = math.inf) -> list[Job]:
        """Jobs that we must still finish at Buildkite, without those deferred beyond `now`."""
        return self.rows.intents(queue_key, now)

    def get(self, uuid: str) -> Job | None:
        return self.rows.get(uuid)

    def page(
        self, state: JobState, after: tuple[int, float, str] | None, limit: int, queue_key: str | None = None
    ) -> list[Job]:
        """The jobs in that state, of one queue or all, in line order, from the first whose `order` is above `after`."""
        return self.rows.page(state, after, limit, queue_key)

    def line(self, queue_key: str) -> list[str]:
        """The uuids of all `ready` jobs of the queue, held or not, in line order."""
        return self.rows.line(queue_key)

    def frozen(self, queue_key: str, until: float = math.inf) -> list[str]:
        """The uuids of jobs that a freeze window holds at most until that time, in line order."""
        return self.rows.held_by(FREEZE, queue_key, until)

    def count_frozen(self) -> dict[str, int]:
        """How many jobs each freeze window holds."""
        names = [freeze.name for freeze in self.windows.freezes]
        return self.rows.count_held(FREEZE, names) if names else {}

    def ahead(self, job: Job, most: int) -> int:
        """How many `ready` jobs of its rule set, without held ones, are ahead of it in line; counted up to `most`."""
        return self.rows.ahead(job, most)

    def stats(self) -> dict[str, Any]:
        """All counts. It is cheap enough to call every few seconds with 100,000 jobs.

        `levels`: a RuleSetCount for each rule set and state (without `done`); `waiting`: number of `reserving` and
        `ready` jobs by rule set; `states` and `outcomes`: numbers of stored jobs; `totals`: by queue key and outcome,
        how often a job became `done`; `paused`: queue keys; `held`: a JobAtWorker for each `leased` and `running`
        job; `holds`: the table of holds.
        """
        counts, holds = self.rows.counts(), self.rows.holds().rows
        stats = stats_of(counts)
        known = {*stats["totals"], *(level.queue_key for level in stats["levels"])}
        return stats | {"paused": paused_queues(holds, known), "holds": holds}

    def not_understood(self) -> dict[str, int]:
        """The number of waiting jobs for each rule set that we do not understand, so that no worker matches."""
        unread = [text for text in self.rows.rule_sets()[1] if RuleSet.read(text).unread]
        waiting = self.stats()["waiting"] if unread else {}
        return {text: waiting[text] for text in unread if text in waiting}

    def workers(self) -> list[WorkerRow]:
        """Every worker that is not forgotten yet, by name."""
        return sorted(self.rows.workers(), key=lambda row: row.name)

    def probe(self) -> None:
        """Test whether the store can be written, and remember the result for `check`."""
        try:
            self.rows.probe()
        except StoreUnavailable as error:
            self._unwritable = str(error)
        else:
            self._unwritable = ""

    def check(self) -> None:
        """Raise StoreUnavailable if the store cannot be read, or if the last `probe` could not write."""
        if self._unwritable:
            raise StoreUnavailable(self._unwritable)
        self.rows.get("")

    def close(self) -> None:
        self.rows.close()


def check_stacks(known: Mapping[str, str], left: Mapping[str, int], stack_keys: Mapping[str, str]) -> None:
    """Raise SettingsError if a queue has unfinished jobs from the time of another stack key."""
    for queue_key, stack_key in stack_keys.items():
        if left.get(queue_key) and known.get(queue_key, stack_key) != stack_key:
            raise SettingsError(
                f"STACK_KEY: {left[queue_key]} jobs of queue {queue_key} are reserved as stack {known[queue_key]!r}, "
                f"not {stack_key!r}; set it back until they are done, or use another STATE_DIRECTORY or ?prefix="
            )


def paused_queues(holds: Iterable[Hold], queue_keys: Iterable[str]) -> list[str]:
    """The queues with a hold: named by it, or known ones that match its `*`."""
    names = {hold.target.removeprefix("queue:") for hold in holds if hold.target.startswith("queue:")}
    return sorted(
        {each for each in names if "*" not in each}
        | {q for q in queue_keys if any(matches_pattern(q, n) for n in names)}
    )


def stats_of(counts: Counts) -> dict[str, Any]:
    """The part of `Store.stats` that comes from the counts."""
    levels = [*counts.waiting]
    by_rules: dict[tuple[JobState, str], list[float]] = {}
    for job in counts.at_work:
        by_rules.setdefault((job.state, job.rule_set), []).append(job.scheduled_at)
    levels += [RuleSetCount(*state_and_rules, len(times), min(times)) for state_and_rules, times in by_rules.items()]
    states = dict.fromkeys(JobState, 0) | {JobState.DONE: sum(counts.outcomes.values())}
    by_rule_set: collections.Counter[str] = collections.Counter()
    for level in levels:
        states[level.state] += level.jobs
    for level in counts.waiting:
        by_rule_set[level.rule_set] += level.jobs
    by_queue: dict[str, dict[str, int]] = {}
    for queue_key, outcome, jobs in counts.totals:
        by_queue.setdefault(queue_key, dict.fromkeys(Outcome, 0))[Outcome(outcome)] = jobs
    return {
        "levels": levels,
        "waiting": dict(by_rule_set),
        "states": states,
        "outcomes": dict.fromkeys(Outcome, 0) | {Outcome(word): count for word, count in counts.outcomes.items()},
        "totals": by_queue,
        "at_work": list(counts.at_work),
    }


#: Functions that read a stored field, by its declared type. SQLite stores numbers as numbers, Redis only texts.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "JobState": JobState,
    "Outcome": Outcome,
    "dict[str, Any]": json.loads,
    "tuple[str, ...]": lambda text: tuple(json.loads(text)),
    "tuple[dict[str, Any], ...]": lambda text: tuple(json.loads(text)),
}


R = TypeVar("R")


class Fields(Generic[R]):
    """Reads and writes the stored form of one row class, field by field. Unknown fields are ignored and kept."""

    def __init__(self, row_type: type[R]):
        self.row_type = row_type
        declared = {f.name: str(f.type) for f in dataclasses.fields(row_type)}  # type: ignore[arg-type]
        self.names = tuple(declared)
        self.kinds = {name: kind.removesuffix(" | None") for name, kind in declared.items()}
        self._readers = {name: READERS[kind] for name, kind in self.kinds.items()}
        plain = ("str", "int", "float")
        self._not_plain = [
            (index, READERS[kind]) for index, kind in enumerate(self.kinds.values()) if kind not in plain
        ]

    def read(self, written: Iterable[tuple[str, Any]]) -> R:
        """A row from stored (name, value) pairs; a missing field gets its default."""
        readers = self._readers
        known = ((name, value) for name, value in written if value is not None and name in readers)
        return self.row_type(**{name: readers[name](value) for name, value in known})

    def read_columns(self, values: Sequence[Any]) -> R:
        """A row from all its stored values in order (SQLite)."""
        row = list(values)
        for index, reader in self._not_plain:
            if row[index] is not None:
                row[index] = reader(row[index])
        return self.row_type(*row)

    def changed(self, before: R | None, after: R) -> dict[str, Any]:
        """The fields that differ, in stored form."""
        if before is None:
            return {name: encoded(getattr(after, name)) for name in self.names}
        differing = (name for name in self.names if getattr(before, name) != getattr(after, name))
        return {name: encoded(getattr(after, name)) for name in differing}


def encoded(value: Any) -> Any:
    """The stored form of a field's value."""
    return json.dumps(value) if isinstance(value, tuple | dict) else value


AT_WORK_FIELDS = Fields(JobAtWorker)
PERIODIC_FIELDS = Fields(PeriodicRow)


# --- SQLite store ---

#: The schema version that this scheduler writes, and the lowest scheduler schema that may read it.
SCHEMA_VERSION, SCHEMA_MIN_READER = 5, 5
#: application_id ("bkst") that identifies our SQLite files. Files with a schema up to 3 may not have it.
APPLICATION_ID = 0x626B7374

#: SQLite's column type by field type; all other fields are text (JSON or a word).
SQLITE_TYPES = {"int": "INTEGER", "float": "REAL"}

#: One partial index for each query: a job is only in the indexes of queries that can return it.
INDEXES = """
CREATE INDEX jobs_ready ON jobs (rule_set, priority DESC, scheduled_at, uuid) WHERE state = 'ready' AND held_by IS NULL;
CREATE INDEX jobs_line ON jobs (queue_key, priority DESC, scheduled_at, uuid) WHERE state = 'ready';
CREATE INDEX jobs_on_hold ON jobs (rule_set) WHERE state = 'ready' AND held_by IS NOT NULL;
CREATE INDEX jobs_held_by ON jobs (held_by, held_note, queue_key, held_until)
    WHERE state = 'ready' AND held_by IS NOT NULL;
CREATE INDEX jobs_reserving ON jobs (queue_key, priority DESC, scheduled_at, uuid, rule_set) WHERE state = 'reserving';
CREATE INDEX jobs_due ON jobs (queue_key, reservation_expires_at) WHERE state IN ('ready', 'leased');
CREATE INDEX jobs_leased ON jobs (lease_expires_at) WHERE state = 'leased';
CREATE INDEX jobs_unfinished ON jobs (queue_key, uuid) WHERE done_at IS NULL;
CREATE INDEX jobs_running ON jobs (uuid) WHERE state = 'running';
CREATE INDEX jobs_done ON jobs (done_at, outcome) WHERE state = 'done';
CREATE INDEX jobs_intents ON jobs (queue_key) WHERE finish_detail IS NOT NULL AND state = 'reserving';
CREATE INDEX jobs_policy ON jobs (queue_key, policy_step, policy_step_at, priority DESC, scheduled_at, uuid)
    WHERE state = 'ready' AND policy_step IS NOT NULL;
CREATE INDEX jobs_chain ON jobs (chain, put_at) WHERE chain IS NOT NULL;
"""
TABLES = """
CREATE TABLE holds (target TEXT, owner TEXT, reason TEXT, since REAL, until REAL, "by" TEXT NOT NULL DEFAULT '',
    note TEXT NOT NULL DEFAULT '', PRIMARY KEY (target, owner));
CREATE TABLE acts (number INTEGER PRIMARY KEY, at REAL, "by" TEXT, act TEXT, target TEXT, note TEXT);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
-- How often a job became `done`; kept when the jobs are deleted.
CREATE TABLE totals (queue_key TEXT, outcome TEXT, jobs INTEGER NOT NULL, PRIMARY KEY (queue_key, outcome));
"""

#: By schema version: the statements that upgrade a file to the next version. Missing columns are added separately.
UPGRADE = {
    1: """
CREATE TABLE totals (queue_key TEXT, outcome TEXT, jobs INTEGER NOT NULL, PRIMARY KEY (queue_key, outcome));
ALTER TABLE workers ADD COLUMN ran INTEGER NOT NULL DEFAULT 0;
INSERT INTO totals SELECT queue_key, outcome, count(*) FROM jobs WHERE state = 'done' GROUP BY queue_key, outcome;
""",
    2: """
CREATE TABLE holds (target TEXT, owner TEXT, reason TEXT, since REAL, until REAL, PRIMARY KEY (target, owner));
INSERT INTO holds SELECT 'queue:' || queue_key, 'buildkite', 'queue_paused', NULL, NULL FROM paused_queues;
DROP TABLE paused_queues;
""",
    3: """
ALTER TABLE holds ADD COLUMN "by" TEXT NOT NULL DEFAULT '';
ALTER TABLE holds ADD COLUMN note TEXT NOT NULL DEFAULT '';
CREATE TABLE acts (number INTEGER PRIMARY KEY, at REAL, "by" TEXT, act TEXT, target TEXT, note TEXT);
""",
    4: "",  # only new columns; but a scheduler of schema 4 would run jobs that the policy holds
}

#: Number of first ready jobs of a rule set that are read at once.
HEADS = 32
IN_LINE = "ORDER BY priority DESC, scheduled_at, uuid"
FIRST_READY = f"""
SELECT -priority, scheduled_at, uuid FROM jobs WHERE state = 'ready' AND held_by IS NULL AND rule_set = ?
{IN_LINE} LIMIT {HEADS}"""
#: Counts waiting jobs. Each part names the state as a literal, so that SQLite uses a partial index.
WAITING = " UNION ALL ".join(
    f"SELECT state, rule_set, count(*), min(scheduled_at), uuid, held_by IS NOT NULL FROM jobs WHERE {which} "
    "GROUP BY rule_set"
    for which in (
        "state = 'ready' AND held_by IS NULL",
        "state = 'ready' AND held_by IS NOT NULL",
        "state = 'reserving'",
    )
)
AT_WORK = f"""
SELECT {", ".join(AT_WORK_FIELDS.names)} FROM jobs WHERE state = 'leased'
UNION ALL SELECT {", ".join(AT_WORK_FIELDS.names)} FROM jobs WHERE state = 'running'"""
#: The states as literals, and `ready` in two parts, so that SQLite uses the partial indexes.
IN_STATE = {state: f"SELECT * FROM jobs WHERE state = '{state}'" for state in JobState} | {
    JobState.READY: " UNION ALL ".join(
        f"SELECT * FROM jobs WHERE state = 'ready' AND held_by IS {held}" for held in ("NULL", "NOT NULL")
    )
}
COUNT_HELD = """
SELECT held_note, count(*) FROM jobs WHERE state = 'ready' AND held_by IS NOT NULL AND held_by = ? GROUP BY held_note"""
#: A sort key before that of every job.
FRONT = (-(2**63), 0.0, "")
AHEAD = """
SELECT count(*) FROM (
    SELECT 1 FROM jobs WHERE state = 'ready' AND held_by IS NULL AND rule_set = ? AND priority > ?
    UNION ALL
    SELECT 1 FROM jobs WHERE state = 'ready' AND held_by IS NULL AND rule_set = ? AND priority = ?
        AND (scheduled_at, uuid) < (?, ?)
    LIMIT ?)"""
#: Columns by name, because a newer schema may have more.
HOLD_NAMES = 'target, owner, reason, since, until, "by", note'
ALL_HOLDS = f"SELECT {HOLD_NAMES} FROM holds ORDER BY target, owner"
ADD_TO_TOTAL = "INSERT INTO totals VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1"

#: Seconds: SQLite waits so long for another process's lock; after a failure we do not try again for so long.
LOCK_SECONDS, RETRY_STORE_SECONDS = 1.0, 0.5
#: Seconds between two checks that all files of the store still exist. Each call checks only the database file.
BESIDE_SECONDS = 1.0


class SqliteRows:
    """The rows in SQLite: one file, used by one scheduler.

    The docstrings apply to RedisRows too. Each write of a row is atomic; each call may raise StoreUnavailable. With
    Redis, a write "for the leader" raises Fenced when another scheduler leads. "Durable" means on disk (fsync); with
    Redis, as its own settings say.
    """

    def __init__(self, directory: str, job_type: type[Job] = Job):
        self._jobs, self._worker_fields = Fields(job_type), Fields(WorkerRow)
        self._lock = threading.RLock()  # guards _db and everything below except _reader
        self._path, lock_path = os.path.join(directory, "jobs.sqlite3"), os.path.join(directory, "scheduler.lock")
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._owner = own(lock_path)
        except OSError as error:
            advice = "STATE_DIRECTORY must be a directory that the scheduler can write to"
            raise StoreUnavailable(f"{error}; {advice}") from error
        try:
            with examined(self._path) as found:
                #: There was no store yet.
                self.is_new = found is None
            if self.is_new:
                self._begin()
            self._db = self._open()
        except BaseException:
            os.close(self._owner)
            raise
        self._select_job = f"SELECT {', '.join(self._jobs.names)} FROM jobs"
        self._reader_lock = threading.Lock()  # guards _reader, which never waits for a write
        self._reader = self._connect()
        self._retry_at, self._trouble = 0.0, ""
        self._durable: bool | None = None
        self._workers_before: dict[str, WorkerRow | None] = {}  # rows before this transaction, to undo it in memory
        self._sequence: int = self._db.execute("SELECT coalesce(max(version), 0) FROM jobs").fetchone()[0]
        self._workers = {row.name: row for row in self._read_workers()}
        self._holds = Holds(0, tuple(Hold(*row) for row in self._db.execute(ALL_HOLDS)))
        self._timetable = self._read_timetable()
        self._answered_at: dict[str, float] = {}
        # The first ready jobs of each rule set, so that a claim need not search. Those in `_stale` must be read again.
        rule_sets = self._db.execute("SELECT DISTINCT rule_set FROM jobs WHERE state = 'ready'")
        self._stale = {row[0] for row in rule_sets}
        self._rule_sets = set(self._stale)
        self._rule_sets_version = 0
        self._rule_sets_told = 0, frozenset(self._rule_sets)  # the last result of `rule_sets`
        self._heads: dict[str, collections.deque[tuple[int, float, str]]] = {}
        self._leased = self._read_leased()  # by worker: its leased job
        self._uncounted: set[str] = set()  # workers whose claim counts the next transaction must write
        in_use = (self._path, f"{self._path}-wal", f"{self._path}-shm", lock_path)
        self._identities = {path: file_identity(path) for path in in_use}
        self._all_there_at = -math.inf  # monotonic

    # -- the file

    def _begin(self) -> None:
        """Make a new store. It is renamed when complete, so an empty or incomplete file is never ours."""
        new = f"{self._path}.new"
        for path in (new, f"{new}-wal", f"{new}-shm", f"{new}-journal"):
            with suppress(FileNotFoundError):
                os.unlink(path)  # left by an interrupted start
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            self._migrate(db)
        os.rename(new, self._path)
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)

    def _open(self) -> sqlite3.Connection:
        make_private(self._path)
        db = self._connect()
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreUnavailable(f"SQLite cannot keep a log (WAL) beside {self._path}: {LOCAL_DISK}")
        # In KiB: enough for the indexes of 100,000 jobs. With the default (2 MiB) a restart takes twice as long.
        db.execute("PRAGMA cache_size = -65536")
        self._migrate(db)
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Upgrade the file to our schema; a file with a newer readable schema stays as it is."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION or (version == SCHEMA_VERSION and not self._missing_columns(db)):
            return
        with in_transaction(db):
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            if version == 0:
                run_all(db, TABLES)
            for older in range(version, SCHEMA_VERSION) if version else ():
                run_all(db, UPGRADE[older])
            for change in self._missing_columns(db):
                db.execute(change)
            names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql <> ''")]
            for name in names:
                db.execute(f"DROP INDEX {name}")
            run_all(db, INDEXES)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('min_reader', ?)", [str(SCHEMA_MIN_READER)])
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _missing_columns(self, db: sqlite3.Connection) -> list[str]:
        """The statements that add missing tables, and a column for every field that has none."""
        changes = []
        tables: tuple[tuple[str, Fields[Any], str], ...] = (
            ("jobs", self._jobs, "uuid"),
            ("workers", self._worker_fields, "name"),
            ("periodic", PERIODIC_FIELDS, "name"),
        )
        for table, fields, key in tables:
            present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            if not present:
                changes.append(f"CREATE TABLE {table} ({key} TEXT PRIMARY KEY)")
            for field in dataclasses.fields(fields.row_type):
                if field.name not in present | {key}:
                    changes.append(f"ALTER TABLE {table} ADD COLUMN {column(field, fields.kinds[field.name])}")
        return changes

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=512
        )

    def close(self) -> None:
        with self._lock, self._reader_lock:
            with suppress(StoreUnavailable), self._write():
                pass  # an empty transaction writes the workers' claim counts
            self._reader.close()
            self._db.close()
            if self._owner >= 0:
                os.close(self._owner)
                self._owner = -1

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """A connection for a read, which does not wait for writes. SQLite's errors become StoreUnavailable."""
        with self._reader_lock:
            self._check_file()
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise self._failed(error) from error

    @contextmanager
    def _write(self, *, durable: bool = False) -> Iterator[None]:
        """A transaction. `durable`: when it ends, SQLite's log is on disk (fsync), so a power loss does not undo it."""
        with self._lock:
            self._check_file()
            try:
                self._be_durable(durable)
                self._workers_before.clear()
                with in_transaction(self._db):
                    self._sequence += 1
                    # Write the workers' claims since the last transaction.
                    rows = [self._workers[name] for name in self._uncounted if name in self._workers]
                    counts = [(row.claims, row.last_claim_at, row.name) for row in rows]
                    self._db.executemany("UPDATE workers SET claims = ?, last_claim_at = ? WHERE name = ?", counts)
                    yield
                self._uncounted.clear()
            except BaseException as error:
                for name, row in self._workers_before.items():
                    self._keep_worker(name, row)
                self._stale.update(self._rule_sets)  # heads read during the failed transaction are wrong
                with suppress(sqlite3.Error):
                    self._leased = self._read_leased()
                if isinstance(error, sqlite3.Error):
                    raise self._failed(error) from error
                raise

    def _be_durable(self, durable: bool) -> None:
        if durable is not self._durable:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    def _check_file(self) -> None:
        now = time.monotonic()
        if now < self._retry_at:
            raise StoreUnavailable(self._trouble)
        is_due = now - self._all_there_at >= BESIDE_SECONDS
        for path in self._identities if is_due else (self._path,):
            if file_identity(path) != self._identities[path]:
                raise self._unavailable(f"{path} was moved or deleted while in use; {self._remedy_of_loss(path)}")
        if is_due:
            self._all_there_at = now

    def _remedy_of_loss(self, path: str) -> str:
        if path != self._path:
            return "move it back, or restart the scheduler; no data is lost"
        return (
            "move it back, or restart the scheduler with an empty store: the old store's jobs come back when their "
            "reservations expire"
        )

    def problems(self) -> list[str]:
        """Why it is not safe to have the store in this place."""
        return [f"{self._path}: {trouble}" for trouble in unsafe_file_system(self._path)]

    def warnings(self) -> list[str]:
        """Warnings that other users can change the store."""
        paths = (os.path.dirname(self._path), self._path)
        found = {path: os.stat(path) for path in paths}
        open_to_all = [path for path in paths if found[path].st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH]
        others = [path for path in paths if found[path].st_uid not in (0, os.geteuid())]
        return [f"every user of this machine can write {path}: chmod o-w it" for path in open_to_all] + [
            f"{path} belongs to user {found[path].st_uid}, not to the scheduler's: chown it, or run it as that user"
            for path in others
        ]

    def _unavailable(self, trouble: str) -> StoreUnavailable:
        # Other calls fail at once for a moment: each try may wait for SQLite's lock timeout, one after the other.
        self._trouble = f"the store {self._path} cannot be used: {trouble}. The scheduler keeps trying"
        self._retry_at = time.monotonic() + RETRY_STORE_SECONDS
        return StoreUnavailable(self._trouble)

    def _failed(self, error: sqlite3.Error) -> StoreUnavailable:
        return self._unavailable(f"{error}; {remedy(error)}")

    # -- writes

    def sequence(self) -> int:
        with self._lock:
            return self._sequence

    def apply(self, uuids: Collection[str], step: Step, now: float, by: Speaker) -> list[Move]:
        """Call `step` for each job's row, and write the changed fields of its move.

        If somebody else changed a row meanwhile, `step` is called again. Returns the written moves, whose jobs have
        their new versions. Writes of the leader and of operators are durable when this returns. If `by` is a worker
        with its current session, its `heard_at` becomes `now`.
        """
        if not uuids:
            return []
        with self._lock:
            if isinstance(by, Worker):
                self._hear(by, now)
            moves: list[Move] = []
            facts = MoveContext(self._workers, self._answered_at)
            with self._write(durable=by in (LEADER, OPERATOR)):
                for uuid in uuids:
                    job = self._select(self._db, uuid)
                    if move := step(uuid, job, facts):
                        moves.append(self._write_move(job, move))
            return moves

    def _select(self, db: sqlite3.Connection, uuid: str) -> Job | None:
        row = db.execute(f"{self._select_job} WHERE uuid = ?", [uuid]).fetchone()
        return self._jobs.read_columns(row) if row else None

    def _write_move(self, before: Job | None, move: Move) -> Move:
        job = dataclasses.replace(move.job, version=self._sequence) if move.is_state_change else move.job
        changes = self._jobs.changed(before, job)
        self._write_fields("jobs", "uuid", before.uuid if before else None, changes)
        if JobState.READY in (job.state, before and before.state):
            self._stale |= {job.rule_set, (before or job).rule_set}
            if job.rule_set not in self._rule_sets:
                self._rule_sets.add(job.rule_set)
                self._rule_sets_version += 1
        if before and before.state is JobState.LEASED and job.state is not JobState.LEASED:
            self._leased.pop(before.worker or "", None)
        if job.state is JobState.DONE and before and before.state is not JobState.DONE:
            self._db.execute(ADD_TO_TOTAL, [job.queue_key, job.outcome])
        if move.worker and (row := self._workers.get(move.worker.name)):
            self._write_worker(row, move.worker)
        return dataclasses.replace(move, job=job) if move.is_state_change else move

    def _write_fields(self, table: str, key: str, which: str | None, changes: Mapping[str, Any]) -> None:
        """Within a transaction: update that row of the table, or insert one."""
        if which is None:
            marks = ", ".join("?" * len(changes))
            self._db.execute(f"INSERT INTO {table} ({', '.join(changes)}) VALUES ({marks})", [*changes.values()])
        elif changes:
            self._db.execute(f"UPDATE {table} SET {assigned(changes)} WHERE {key} = ?", [*changes.values(), which])

    def delete(self, uuids: Collection[str]) -> None:
        """Delete `done` jobs; for the leader."""
        with self._write():
            self._db.executemany("DELETE FROM jobs WHERE uuid = ? AND state = 'done'", [(uuid,) for uuid in uuids])

    def change_all(self, changes: Mapping[JobState, Mapping[str, Any]]) -> None:
        """By state: write the same fields to all jobs in it; for the leader."""
        with self._write(durable=True):
            for state, fields in changes.items():
                written = {**fields, "version": self._sequence} if "state" in fields else fields
                self._db.execute(f"UPDATE jobs SET {assigned(written)} WHERE state = '{state}'", [*written.values()])
            self._stale.update(self._rule_sets)

    def restart(
        self, changes: Mapping[JobState, Mapping[str, Any]], worker: Callable[[WorkerRow], WorkerRow], now: float
    ) -> None:
        """Like `change_all`, and change all workers; for the leader.

        All workers get `heard_at` now. If a state changes, no job can be taken until everything is written.
        """
        with self._lock:
            self.change_all(changes)
            with self._write(durable=True):
                for row in list(self._workers.values()):
                    self._write_worker(row, dataclasses.replace(worker(row), heard_at=now))
            self._answered_at = {queue_key: min(at, now) for queue_key, at in self._answered_at.items()}

    # -- claims

    def take(
        self, rule_sets: Sequence[str], lease: Mapping[str, Any], row: WorkerRow | None, holds: object, now: float
    ) -> TakeResult:
        """Write the lease to the first `ready` job in line of these rule sets, and increment its `claims`.

        Takes a job only if the worker's row (None: no row) and the version of the table of holds have not changed, and
        the worker has no leased job.
        """
        with self._lock:
            if holds != self._holds.version or (row and self._workers.get(row.name) is not row):
                return TakeResult(is_stale=True)
            if row and (has := self._leased.get(row.name)):
                return TakeResult(has=has)
            self._check_file()
            try:
                if first := self._first_of(rule_sets):
                    return self._lease(first, lease, row, now)
            except sqlite3.Error as error:
                raise self._failed(error) from error
            if row:
                self._workers[row.name] = dataclasses.replace(row, heard_at=now)
            return TakeResult()

    def _read_leased(self) -> dict[str, str]:
        query = "SELECT worker, uuid FROM jobs WHERE state = 'leased' AND worker IS NOT NULL"
        return dict(self._db.execute(query).fetchall())

    def _lease(self, uuid: str, lease: Mapping[str, Any], row: WorkerRow | None, now: float) -> TakeResult:
        """Write the lease in one statement, without BEGIN and COMMIT: each call of SQLite may cause a thread switch."""
        self._be_durable(False)
        self._sequence += 1
        written = self._db.execute(
            f"UPDATE jobs SET {assigned(lease)}, claims = claims + 1, version = ? "
            f"WHERE uuid = ? AND state = 'ready' RETURNING {', '.join(self._jobs.names)}",
            [*lease.values(), self._sequence, uuid],
        ).fetchall()
        if not written:
            self._stale.update(self._rule_sets)  # the heads were wrong: read all of them again
            return TakeResult(is_stale=True)
        job = self._jobs.read_columns(written[0])
        line = self._heads[job.rule_set]
        line.popleft()
        if not line:
            self._stale.add(job.rule_set)
        if row:
            self._leased[row.name] = uuid
            self._workers[row.name] = dataclasses.replace(row, claims=row.claims + 1, last_claim_at=now, heard_at=now)
            self._uncounted.add(row.name)
        return TakeResult(job)

    def rule_sets(self, *, fresh: bool = False) -> tuple[object, Collection[str]]:
        """The rule sets of jobs that are or lately were `ready` (with Redis also `reserving`), and a version.

        The version changes when a rule set is added.

        From a recent read; `fresh`: read now.
        """
        with self._lock:
            if self._rule_sets_told[0] != self._rule_sets_version:
                self._rule_sets_told = self._rule_sets_version, frozenset(self._rule_sets)
            return self._rule_sets_told

    def _first_of(self, rule_sets: Sequence[str]) -> str | None:
        """The uuid of the first job in line, by comparing the first job of each rule set."""
        while self._stale:
            rule_set = next(iter(self._stale))
            first = collections.deque(self._db.execute(FIRST_READY, [rule_set]))
            if first:
                self._heads[rule_set] = first
            else:
                self._heads.pop(rule_set, None)
            self._stale.discard(rule_set)
        heads = self._heads
        head = min((heads[rule_set][0] for rule_set in rule_sets if rule_set in heads), default=None)
        return head[2] if head else None

    def forget_rule_sets(self) -> None:
        """Forget rule sets without `ready` jobs (with Redis: nor `reserving` ones)."""
        with self._lock:
            in_use = self._db.execute("SELECT DISTINCT rule_set FROM jobs WHERE state = 'ready'")
            self._rule_sets = {row[0] for row in in_use}
            self._rule_sets_version += 1
            self._heads = {text: head for text, head in self._heads.items() if text in self._rule_sets}
            self._stale &= self._rule_sets

    # -- workers

    def _read_workers(self) -> list[WorkerRow]:
        names = self._worker_fields.names
        rows = self._db.execute(f"SELECT {', '.join(names)} FROM workers")
        # `heard_at` is not stored. Until `restart` sets it, no worker counts as silent.
        return [dataclasses.replace(self._worker_fields.read_columns(row), heard_at=math.inf) for row in rows]

    def worker_of(self, worker: Worker) -> WorkerRow | None:
        """The row of the worker's name; from a recent read if it has the same session, else read now."""
        return self._workers.get(worker.name)

    def write_worker(self, before: WorkerRow | None, after: WorkerRow | None) -> bool:
        """Write a worker's row; None deletes it. False: the row is not `before` any more; nothing is written."""
        name = (before or after).name  # type: ignore[union-attr]
        with self._lock:
            if self._workers.get(name) is not before:
                return False
            if after != before:
                with self._write():
                    self._write_worker(before, after)
            return True

    def _write_worker(self, before: WorkerRow | None, after: WorkerRow | None) -> None:
        """Within a transaction. `heard_at` is kept only in memory, because it changes with each request."""
        name = (before or after).name  # type: ignore[union-attr]
        if after is None:
            self._db.execute("DELETE FROM workers WHERE name = ?", [name])
        else:
            changes = self._worker_fields.changed(before, after)
            changes.pop("heard_at", None)
            self._write_fields("workers", "name", name if before else None, changes)
        self._workers_before.setdefault(name, before)
        self._keep_worker(name, after)

    def _keep_worker(self, name: str, row: WorkerRow | None) -> None:
        if row:
            self._workers[name] = row
        else:
            self._workers.pop(name, None)

    def _hear(self, speaker: Worker, now: float) -> None:
        row = self._workers.get(speaker.name)
        if row and row.session == speaker.session:
            self._workers[row.name] = dataclasses.replace(row, heard_at=now)

    def workers(self) -> list[WorkerRow]:
        with self._lock:
            return list(self._workers.values())

    def count_workers(self) -> int:
        return len(self._workers)

    def answered(self, queue_key: str, now: float) -> None:
        self._answered_at[queue_key] = max(now, self._answered_at.get(queue_key, 0.0))

    def answered_at(self, queue_key: str) -> float:
        return self._answered_at.get(queue_key, 0.0)

    # -- holds

    def holds(self) -> Holds:
        return self._holds

    def known_holds(self) -> Holds:
        """The table from a recent read; `take` refuses a claim that was decided with an older version."""
        return self._holds

    def change_holds(
        self, version: object, added: Sequence[Hold], removed: Sequence[Hold], act: OperatorAct | None = None
    ) -> bool:
        """Write the table of holds and the act that caused it, durably. Every later `take` uses the new table.

        False: the table's version has changed, and nothing was written. Buildkite's holds are for the leader.
        """
        with self._lock:
            if version != self._holds.version:
                return False
            with self._write(durable=True):
                for hold in removed:
                    self._db.execute("DELETE FROM holds WHERE target = ? AND owner = ?", [hold.target, hold.owner])
                for hold in added:
                    row = dataclasses.astuple(hold)
                    self._db.execute(f"INSERT OR REPLACE INTO holds ({HOLD_NAMES}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                if act:
                    self._write_act(act)
                rows = self._db.execute(ALL_HOLDS).fetchall()
            self._holds = Holds(self._sequence, tuple(Hold(*row) for row in rows))
            return True

    def act(self, act: OperatorAct) -> None:
        with self._write(durable=True):
            self._write_act(act)

    def _write_act(self, act: OperatorAct) -> None:
        """Within a transaction."""
        self._db.execute('INSERT INTO acts (at, "by", act, target, note) VALUES (?, ?, ?, ?, ?)', act)
        self._db.execute(f"DELETE FROM acts WHERE number <= (SELECT max(number) FROM acts) - {KEPT_ACTS}")

    def acts(self, limit: int) -> list[OperatorAct]:
        query = 'SELECT at, "by", act, target, note FROM acts ORDER BY number DESC LIMIT ?'
        with self._read() as db:
            return [OperatorAct(*row) for row in db.execute(query, [limit])]

    # -- periodic builds

    def timetable(self) -> Timetable:
        return self._timetable

    def write_periodic(
        self, version: object, name: str, after: PeriodicRow | None, act: OperatorAct | None, by: Speaker
    ) -> bool:
        """Write or delete the row of that name, and the act that caused it, durably.

        False: the table's version has changed, and nothing was written.
        """
        with self._lock:
            if version != self._timetable.version:
                return False
            with self._write(durable=True):
                if after:
                    written = PERIODIC_FIELDS.changed(None, after)
                    self._db.execute("INSERT OR IGNORE INTO periodic (name) VALUES (?)", [name])
                    change = f"UPDATE periodic SET {assigned(written)} WHERE name = ?"
                    self._db.execute(change, [*written.values(), name])
                else:
                    self._db.execute("DELETE FROM periodic WHERE name = ?", [name])
                if act:
                    self._write_act(act)
                timetable = self._read_timetable()
            self._timetable = timetable
            return True

    def _read_timetable(self) -> Timetable:
        columns = self._db.execute(f"SELECT {', '.join(PERIODIC_FIELDS.names)} FROM periodic ORDER BY name")
        return Timetable(self._sequence, tuple(PERIODIC_FIELDS.read_columns(row) for row in columns))

    # -- reads

    def get(self, uuid: str) -> Job | None:
        with self._read() as db:
            return self._select(db, uuid)

    def _jobs_where(self, which: str, *values: object) -> list[Job]:
        with self._read() as db:
            return [self._jobs.read_columns(row) for row in db.execute(f"{self._select_job} WHERE {which}", values)]

    def _uuids_where(self, which: str, *values: object) -> list[str]:
        with self._read() as db:
            return [uuid for (uuid,) in db.execute(f"SELECT uuid FROM jobs WHERE {which}", values)]

    def unfinished(self, queue_key: str) -> list[str]:
        return self._uuids_where("done_at IS NULL AND queue_key = ?", queue_key)

    def leased_or_running(self, queue_key: str) -> list[str]:
        leased = self._uuids_where("state = 'leased' AND queue_key = ?", queue_key)
        return leased + self._uuids_where("state = 'running' AND queue_key = ?", queue_key)

    def waiting(self, queue_key: str, now: float, limit: int, *, fresh: bool) -> list[str]:
        """`reserving` jobs in order, not deferred, not to be finished; not `fresh`: only those reserved before."""
        asked = "state = 'reserving' AND queue_key = ? AND finish_detail IS NULL AND not_before <= ?"
        reserved = "(reserved_at IS NOT NULL OR ?)"
        return self._uuids_where(f"{asked} AND {reserved} {IN_LINE} LIMIT ?", queue_key, now, fresh, limit)

    def due(self, queue_key: str, before: float, limit: int) -> list[str]:
        """`ready` and `leased` jobs whose reservation ends before that time, soonest first."""
        asked = "state IN ('ready', 'leased') AND queue_key = ? AND reservation_expires_at < ?"
        return self._uuids_where(f"{asked} ORDER BY reservation_expires_at LIMIT ?", queue_key, before, limit)

    def run_out(self, queue_keys: Collection[str], now: float) -> list[str]:
        """Jobs with an expired lease, and `ready` jobs of these queues with an expired reservation."""
        found = self._uuids_where("state = 'leased' AND lease_expires_at <= ?", now)
        # The query names both states, as the partial index does.
        ready = "state IN ('ready', 'leased') AND state = 'ready' AND queue_key = ? AND reservation_expires_at <= ?"
        for queue_key in queue_keys:
            found += self._uuids_where(ready, queue_key, now)
        return found

    def policy_steps(self, queue_key: str, step: str, now: float, limit: int) -> list[str]:
        """`ready` jobs for which this step of the policy's tasks is due, by time, then in line order."""
        asked = "state = 'ready' AND queue_key = ? AND policy_step = ? AND policy_step_at <= ?"
        in_line = IN_LINE.replace("BY", "BY policy_step_at,")
        return self._uuids_where(f"{asked} {in_line} LIMIT ?", queue_key, step, now, limit)

    def chained(self, chain: str, limit: int) -> list[Job]:
        """The last jobs of this chain, in no particular order."""
        return self._jobs_where("chain = ? ORDER BY put_at DESC LIMIT ?", chain, limit)

    def intents(self, queue_key: str, now: float) -> list[Job]:
        intended = "finish_detail IS NOT NULL AND state = 'reserving' AND queue_key = ? AND not_before <= ?"
        return self._jobs_where(intended, queue_key, now)

    def done_before(self, before: float, limit: int) -> list[str]:
        return self._uuids_where("state = 'done' AND done_at < ? LIMIT ?", before, limit)

    def done_since(self, since: float, limit: int) -> list[Job]:
        """The last jobs that became `done`, the newest first."""
        return self._jobs_where("state = 'done' AND done_at >= ? ORDER BY done_at DESC LIMIT ?", since, limit)

    def page(
        self, state: JobState, after: tuple[int, float, str] | None, limit: int, queue_key: str | None = None
    ) -> list[Job]:
        which = "" if queue_key is None else "queue_key = ? AND"
        jobs = IN_STATE[state] if queue_key is None else f"SELECT * FROM jobs WHERE state = '{state}'"
        page = f"SELECT uuid FROM ({jobs}) WHERE {which} (-priority, scheduled_at, uuid) > (?, ?, ?) {IN_LINE} LIMIT ?"
        asked = [*([] if queue_key is None else [queue_key]), *(after or FRONT), limit]
        return sorted(self._jobs_where(f"uuid IN ({page})", *asked), key=lambda job: job.order)

    def line(self, queue_key: str) -> list[str]:
        """All `ready` jobs, in order."""
        return self._uuids_where(f"state = 'ready' AND queue_key = ? {IN_LINE}", queue_key)

    def held_by(self, owner: str, queue_key: str, until: float) -> list[str]:
        """`ready` jobs that this owner holds at most until that time, in order."""
        asked = "state = 'ready' AND held_by IS NOT NULL AND held_by = ? AND queue_key = ? AND held_until <= ?"
        return self._uuids_where(f"{asked} {IN_LINE}", owner, queue_key, until)

    def count_held(self, owner: str, notes: Sequence[str]) -> dict[str, int]:
        """The number of `ready` jobs that this owner holds, by `held_note`."""
        with self._read() as db:
            counts = dict(db.execute(COUNT_HELD, [owner]).fetchall())
        return {note: counts.get(note, 0) for note in notes}

    def ahead(self, job: Job, most: int) -> int:
        with self._read() as db:
            line = [job.rule_set, job.priority]
            count: int = db.execute(AHEAD, [*line, *line, job.scheduled_at, job.uuid, most]).fetchone()[0]
        return count

    def counts(self) -> Counts:
        with self._read() as db, db:
            db.execute("BEGIN")  # so that all reads are from one moment
            waiting = [RuleSetCount(JobState(row[0]), *row[1:]) for row in db.execute(WAITING)]
            at_work = [AT_WORK_FIELDS.read_columns(row) for row in db.execute(AT_WORK)]
            outcomes = db.execute("SELECT outcome, count(*) FROM jobs WHERE state = 'done' GROUP BY outcome").fetchall()
            totals = db.execute("SELECT queue_key, outcome, jobs FROM totals").fetchall()
        return Counts(waiting, at_work, dict(outcomes), totals)

    def stacks(self) -> tuple[dict[str, str], dict[str, int]]:
        """By queue: the stack key of its reservations, and the number of jobs that are not `done`."""
        with self._read() as db:
            return stacks_in(db)

    def remember_stacks(self, stack_keys: Mapping[str, str]) -> None:
        with self._write(durable=True):
            rows = [(f"stack of {queue_key}", stack_key) for queue_key, stack_key in stack_keys.items()]
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def probe(self) -> None:
        """Write something small, to test that it works."""
        with self._write():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('probed', datetime())")


def stacks_in(db: sqlite3.Connection) -> tuple[dict[str, str], dict[str, int]]:
    rows = db.execute("SELECT name, value FROM meta WHERE name LIKE 'stack of %'").fetchall()
    left = db.execute("SELECT queue_key, count(*) FROM jobs WHERE done_at IS NULL GROUP BY queue_key").fetchall()
    return {name.removeprefix("stack of "): value for name, value in rows}, dict(left)


@contextmanager
def examined(path: str) -> Iterator[sqlite3.Connection | None]:
    """Check the store's files without any change, and return a connection for reading; None if there is no store yet.

    Raises StoreUnavailable or sqlite3.Error if it is damaged, not ours, or cannot be written; SettingsError for a
    schema that we may not read. SQLite itself would delete a log without its file, and treat an empty file as new.
    """
    log_path = f"{path}-wal"
    if not os.path.lexists(path):
        for left in (log_path, f"{path}-journal"):
            if os.path.lexists(left):
                raise StoreUnavailable(f"{path} is missing, but {left} exists. {START_AFRESH}")
        yield None
        return
    check_files(path)
    has_log = os.path.exists(log_path) and os.path.getsize(log_path) > 0
    # If there is no log, `immutable` prevents SQLite from creating one.
    mode = "mode=ro" if has_log else "immutable=1"
    with closing(
        sqlite3.connect(f"file:{urllib.parse.quote(path)}?{mode}", uri=True, timeout=LOCK_SECONDS, isolation_level=None)
    ) as db:
        check_schema(path, db)
        # After a clean stop a quick check is enough. Otherwise the log may belong to another file; the indexes show it.
        damage = db.execute(f"PRAGMA {'integrity' if has_log else 'quick'}_check(1)").fetchone()[0]
        if damage != "ok":
            restored = f"; if {path} was restored from a backup, {log_path} does not belong to it: move that away"
            raise sqlite3.DatabaseError(damage + (restored if has_log else ""))
        yield db


def check_files(path: str) -> None:
    """Raise StoreUnavailable unless these are writable files that our store can have left."""
    for each in (path, f"{path}-wal", f"{path}-shm"):
        if os.path.lexists(each):
            found = os.lstat(each)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                # SQLite finds its log by the file's name; with a second name it would not.
                reason = "has several names (hard links)" if stat.S_ISREG(found.st_mode) else "is not a regular file"
                raise StoreUnavailable(f"{each} {reason}; the store needs regular files in STATE_DIRECTORY itself")
            if not os.access(each, os.R_OK | os.W_OK):
                advice = REMEDIES["SQLITE_READONLY"]
                raise StoreUnavailable(f"{each}, owned by user {found.st_uid}, cannot be read and written; {advice}")
    with open(path, "rb") as file:
        head = file.read(100)
    page_size = head[16:18] if head[16:18] != b"\0\1" else b"\0\0"
    if not head:
        raise StoreUnavailable(f"{path} is empty, but a store never is. {START_AFRESH}")
    if not head.startswith(b"SQLite format 3\0"):
        raise StoreUnavailable(f"{path} is no SQLite file. {START_AFRESH}")
    if os.path.exists(f"{path}-journal") and os.path.getsize(f"{path}-journal"):
        raise StoreUnavailable(f"{path}-journal is not ours, and SQLite would apply it. Move it away. {START_AFRESH}")
    if os.path.exists(f"{path}-wal"):
        with open(f"{path}-wal", "rb") as file:
            log_head = file.read(32)
        if log_head.strip(b"\0") and (log_head[:4] not in WAL_MAGIC or log_head[10:12] != page_size):
            raise StoreUnavailable(f"{path}-wal is not a log of {path}. {START_AFRESH}")


#: The first bytes of SQLite's log. Source: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
WAL_MAGIC = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")


def check_schema(path: str, db: sqlite3.Connection) -> None:
    """Raise StoreUnavailable for another program's file, SettingsError for a schema that we may not read."""
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if application not in (0, APPLICATION_ID) or not version or not {"jobs", "workers", "meta"} <= tables:
        raise StoreUnavailable(f"{path} is another program's SQLite file. {START_AFRESH}")
    if version <= SCHEMA_VERSION:
        return
    min_reader = db.execute("SELECT value FROM meta WHERE name = 'min_reader'").fetchone()
    if min_reader is None or int(min_reader[0]) > SCHEMA_VERSION:
        raise SettingsError(
            f"STATE_DIRECTORY: {path} has schema {version}, which this scheduler (schema {SCHEMA_VERSION}) cannot "
            "read; run the version that wrote it, or move the file away"
        )


#: Types of network file systems; some appear with the prefix "fuse.".
SHARED_FILE_SYSTEMS = frozenset(
    "9p afs beegfs ceph ceph-fuse cifs davfs gcsfuse gfs2 glusterfs goofys gpfs juicefs lustre nfs nfs4 ocfs2 rclone "
    "s3fs smb3 smbfs sshfs vboxsf vmhgfs vmhgfs-fuse".split()
)
LOCAL_DISK = "set STATE_DIRECTORY to a directory on a disk of this machine, or share a Redis (REDIS_ADDR)"


def unsafe_file_system(path: str) -> list[str]:
    kind = file_system_of(os.stat(path).st_dev)
    if kind.removeprefix("fuse.") not in SHARED_FILE_SYSTEMS:
        return []
    return [f"its file system is {kind}, where SQLite's log and locks do not work: {LOCAL_DISK}"]


def file_system_of(device: int) -> str:
    """The type of the file system with this device number (from stat); "" if unknown."""
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            about, _, source = line.partition(" - ")
            if about.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return source.split()[0]
    return ""


def column(field: dataclasses.Field[Any], kind: str) -> str:
    """The column definition of a field, with the default of its class."""
    text = f"{field.name} {SQLITE_TYPES.get(kind, 'TEXT')}"
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        return f"{text} NOT NULL DEFAULT {field.default}"
    if isinstance(field.default, str | tuple):
        return f"{text} NOT NULL DEFAULT '{encoded(field.default)}'"
    return text


def assigned(names: Iterable[str]) -> str:
    return ", ".join(f"{name} = ?" for name in names)


@contextmanager
def in_transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def run_all(db: sqlite3.Connection, script: str) -> None:
    """Like executescript, but without its commit of an open transaction."""
    for statement in script.split(";\n"):
        db.execute(statement)


def file_identity(path: str) -> tuple[int, int] | None:
    """The identity of a file (to detect that another file got its name); None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def make_private(path: str) -> None:
    """Let only our user read the store, because agents' output in it may contain anything."""
    for each in (path, f"{path}-wal", f"{path}-shm"):  # SQLite gives new files the mode of the first
        try:
            os.chmod(each, 0o600)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning(event("unsafe", store=each, reason=f"it cannot be made private: {error}"))


def remedy(error: sqlite3.Error) -> str:
    """What a person can do about an error, by SQLite's name of it."""
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    return remedy_among(REMEDIES, name) or "see the scheduler's log"


def remedy_among(remedies: Mapping[str, str], text: str) -> str:
    """The first remedy whose key is in the text; "" if none is."""
    return next((advice for word, advice in remedies.items() if word in text), "")


START_AFRESH = (
    "Nothing was changed. Restore a backup, or move these files away: then a new store is made, and the old store's "
    "jobs come back when their reservations expire"
)
REMEDIES = {
    "SQLITE_FULL": "free some space on its disk",
    "SQLITE_IOERR": "check the disk (see the kernel's log), or free some space on it",
    "SQLITE_BUSY": "another program has locked the file: end that program",
    "SQLITE_READONLY": "make the file and its directory writable for the scheduler",
    "SQLITE_CANTOPEN": "make the file and its directory readable for the scheduler",
    "SQLITE_CORRUPT": f"it is damaged. {START_AFRESH}",
    "SQLITE_NOTADB": f"it is damaged. {START_AFRESH}",
    "DatabaseError": f"it is damaged. {START_AFRESH}",
}


def own(path: str) -> int:
    """Lock a file for the life of this process. Raises StoreInUse if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreInUse(
            f"another scheduler has locked {path}; a SQLite store is for one scheduler: "
            "stop the other, or give this one its own STATE_DIRECTORY"
        ) from None
    return descriptor


class StoreInUse(Exception):
    """Another scheduler uses the store."""


# --- Redis store ---

#: The schema version of the keys, and the lowest scheduler schema that may read them.
#: Schema 3 has more sets, and outcomes that schedulers of schema 2 cannot read: `stopped`, `refused`, `succeeded`.
REDIS_SCHEMA, REDIS_MIN_READER = 3, 3
#: Timeout of a call to Redis; limit of one scheduler's simultaneous calls.
REDIS_SECONDS, REDIS_CALLS = 2.0, 32
#: If an answer took longer (for example because we were stopped), the time in it is not used.
CLOCK_SECONDS = 0.25
#: After so many seconds without data, redis-py pings on the connection for news, each second until data comes. With
#: more unanswered pings than this, the connection is opened again.
PING_SECONDS, UNANSWERED_PINGS = 5, 3
#: A leader loses its turn if it does not renew it for this long. It renews every second.
TURN_SECONDS = 3.5
#: A leader without an answer from Buildkite for so long gives up the turn, and does not take it again for a while.
UNANSWERED_SECONDS, MODEST_SECONDS = 15.0, 10.0
#: A scheduler without a heartbeat for this long does not count any more.
ALIVE_SECONDS = 10.0
#: How often schedulers report their workers to each other; a report is valid for four times as long.
SEEN_SECONDS = 5.0
#: After so long without a leader, or after a restart of Redis, `ready` jobs are confirmed before they are handed out.
TRUST_SECONDS = 60.0

# The keys, below the prefix. All are on one primary, so the scripts make their names from the prefix, KEYS[1].
#   job:<uuid>       hash: the fields of a Job as text, without None; `place`, its order as text; `standing`, a key of
#                    PLACES; `rev`, a count of its changes. The job is in the sorted sets of its `standing`
#   worker:<name>    hash: the fields of a WorkerRow, and `rev`; `workers` is the set of their names
#   rule_sets        rule sets with waiting jobs; rule_sets_version changes when one is added. queues  their queues
#   totals           hash: "<outcome> <queue>" → how often a job became `done`
#   holds            hash: "<target> <owner>" → JSON of a Hold; holds_version changes with it
#   acts             list of JSON of an OperatorAct, the newest first
#   periodic         hash: name → JSON of a PeriodicRow; periodic_version changes with it
#   answered_at      hash: queue, or "<queue> states" → when Buildkite last answered
#   stacks           hash: queue → its stack's key
#   sequence, offers counters: of changes, and of offers (jobs may be claimed now)
#   schema, min_reader  as REDIS_SCHEMA, REDIS_MIN_READER
#   leader, fence, trusted, alive, schedulers, notes    see HEARTBEAT     seen:<scheduler>  the workers that it reported

#: By `standing`: the sorted sets that a job is in, as key, score and member, with fields of its hash in {}.
LINE = ("line:{state}:{queue_key}", "0", "{place}")
WAITS = ("ages:{state}:{rule_set}", "{scheduled_at}", "{uuid}")
RESERVED = ("due:{queue_key}", "{reservation_expires_at}", "{uuid}")
POLICY = ("policy:{policy_step}:{queue_key}", "{policy_step_at}", "{place}")
CHAIN = ("chain:{chain}", "{put_at}", "{uuid}")
PLACES: Mapping[str, Sequence[tuple[str, str, str]]] = {
    # `reserving`: never reserved yet; reserved before; deferred; to be finished.
    "fresh": (LINE, WAITS, CHAIN, ("fresh:{queue_key}", "0", "{place}")),
    "back": (LINE, WAITS, CHAIN, ("back:{queue_key}", "0", "{place}")),
    "later": (LINE, WAITS, CHAIN, ("later:{queue_key}", "{not_before}", "{place}")),
    "intent": (LINE, WAITS, CHAIN, ("intents:{queue_key}", "{not_before}", "{uuid}")),
    "ready": (LINE, WAITS, CHAIN, POLICY, RESERVED, ("ready:{rule_set}", "0", "{place}")),
    # `ready` and held
    "held": (
        *(LINE, WAITS, CHAIN, POLICY, RESERVED),
        ("until:{held_by}:{queue_key}", "{held_until}", "{place}"),
        ("held:{held_by}:{held_note}", "0", "{uuid}"),
    ),
    "leased": (
        *(LINE, CHAIN, RESERVED, ("leases", "{lease_expires_at}", "{uuid}")),
        ("leased_to:{worker}", "0", "{uuid}"),
    ),
    "running": (LINE, CHAIN),
    "done": (LINE, CHAIN, ("done:{outcome}", "{done_at}", "{uuid}")),
}


def index_place(job: Job) -> str:
    """The `standing` of a job: a key of PLACES."""
    if job.state is JobState.READY:
        return "held" if job.held_by else "ready"
    if job.state is not JobState.RESERVING:
        return job.state
    if job.finish_detail is not None:
        return "intent"
    return "later" if job.not_before else "back" if job.reserved_at else "fresh"


PRELUDE = """
local prefix = KEYS[1]
local standings = {PLACES}

local function call(command, key, ...) return redis.call(command, prefix .. key, ...) end

local function hash(key)
    local found, flat = {}, call('HGETALL', key)
    for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
    return found
end

local function run_id()
    local info = redis.pcall('INFO', 'server')
    return type(info) == 'string' and string.match(info, 'run_id:(%w+)') or 'unknown'
end

-- Writes of the leader need the newest token; '*' is for writes that every scheduler may make.
local function fenced(token) return token ~= '*' and (token == '' or call('GET', 'fence') ~= token) end

-- A version. A time rather than a count, so that no version repeats after a loss of data.
local function stamp()
    local time = redis.call('TIME')
    return string.format('%d.%06d', time[1], time[2])
end

-- The sorted sets of a row: key → {score, member}. A set that needs a missing field is left out.
local function places(row)
    local found = {}
    for _, place in ipairs(standings[row.standing] or {}) do
        local filled, whole = {}, true
        for i, text in ipairs(place) do
            filled[i] = string.gsub(text, '{([a-z_]+)}', function(name)
                whole = whole and row[name]
                return row[name]
            end)
            if not whole then break end
        end
        if whole then found[filled[1]] = {filled[2], filled[3]} end
    end
    return found
end

-- One sequence number for all changes of this script.
local sequence

-- Change the row of a job or worker, and update its sorted sets.
-- `set`: fields and their values, `false` to delete one. `add`: fields and increments; these do not change `rev`.
-- Returns the new row.
local function write(key, change)
    local row, set, flat, none = hash(key), change.set or {}, {}, {}
    local before, was = places(row), row.standing
    if change.worker and not change.rev and not next(row) then return end -- it was forgotten meanwhile
    if change.news then
        sequence = sequence or string.format('%.17g', call('INCR', 'sequence'))
        set.version = sequence
    end
    if next(set) then set.rev = tostring((tonumber(row.rev) or 0) + 1) end
    for name, value in pairs(set) do
        row[name] = value or nil
        if value then flat[#flat + 1], flat[#flat + 2] = name, value else none[#none + 1] = name end
    end
    if #flat > 0 then call('HSET', key, unpack(flat)) end
    if #none > 0 then call('HDEL', key, unpack(none)) end
    for name, count in pairs(change.add or {}) do row[name] = call('HINCRBY', key, name, count) end
    if change.gone then
        call('DEL', key)
        row = {}
    end
    if change.worker then call(change.gone and 'SREM' or 'SADD', 'workers', change.worker) end
    local after = places(row)
    for place, member in pairs(before) do
        if not after[place] or after[place][2] ~= member[2] then call('ZREM', place, member[2]) end
    end
    for place, member in pairs(after) do
        local old = before[place] or {}
        if old[1] ~= member[1] or old[2] ~= member[2] then call('ZADD', place, member[1], member[2]) end
    end
    if row.standing == was and not set.rule_set or change.gone then return row end
    local is_over = row.standing == 'done'
    if is_over and was and was ~= 'done' then call('HINCRBY', 'totals', row.outcome .. ' ' .. row.queue_key, 1) end
    if not is_over and call('SADD', 'rule_sets', row.rule_set) == 1 then
        call('SADD', 'queues', row.queue_key)
        call('SET', 'rule_sets_version', stamp())
    end
    return row
end

-- Tell every scheduler that jobs of these rule sets may be claimed now.
local function offer(rule_sets)
    local news = {offer = call('INCR', 'offers'), rule_sets = rule_sets}
    redis.call('PUBLISH', prefix .. 'news', cjson.encode(news))
end
"""

#: Apply: makes each change whose rows (jobs, workers) have not changed since they were read, and publishes offers.
#: ARGV: the leader's token or '*', JSON {name: heard_at}, JSON of the rule sets in which jobs become ready, then for
#: each change the JSON of its rows: {key, rev or state as read, set, add, news, gone, worker: its name}, optional but
#: for key. Returns the sequence number of the changes, and the indexes of changes that were not made.
APPLY = """
if fenced(ARGV[1]) then return 'fenced' end
for name, heard_at in pairs(cjson.decode(ARGV[2])) do
    if call('EXISTS', 'worker:' .. name) == 1 then call('HSET', 'worker:' .. name, 'heard_at', heard_at) end
end
local answer = {'0'}
for i = 4, #ARGV do
    local rows, is_same = cjson.decode(ARGV[i]), true
    for _, row in ipairs(rows) do
        for _, name in ipairs({'rev', 'state'}) do
            if row[name] and row[name] ~= (call('HGET', row.key, name) or '0') then is_same = false end
        end
    end
    if not is_same then answer[#answer + 1] = i - 4 end
    for _, row in ipairs(is_same and rows or {}) do write(row.key, row) end
end
if ARGV[3] ~= '[]' then offer(cjson.decode(ARGV[3])) end
answer[1] = sequence or '0'
return answer
"""

#: Take: writes a lease to the first job in line, if nothing has changed since the claim was decided.
#: ARGV: rule_sets_version, holds_version, name, its rev, now, the lease (JSON of fields), then the rule sets.
#: Returns {'job', JSON of its fields}, {'has', uuid}, {'none'} or {'stale'}.
TAKE = """
local name, now, first = ARGV[3], ARGV[5], nil
local versions = call('MGET', 'rule_sets_version', prefix .. 'holds_version')
if (versions[1] or '') ~= ARGV[1] or (versions[2] or '') ~= ARGV[2] then return {'stale'} end
if name ~= '' then
    if (call('HGET', 'worker:' .. name, 'rev') or '0') ~= ARGV[4] then return {'stale'} end
    call('HSET', 'worker:' .. name, 'heard_at', now)
    local has = call('ZRANGE', 'leased_to:' .. name, 0, 0)[1]
    if has then return {'has', has} end
end
if call('GET', 'trusted') ~= run_id() then return {'none'} end
for i = 7, #ARGV do
    local head = call('ZRANGE', 'ready:' .. ARGV[i], 0, 0)[1]
    if head and (not first or head < first) then first = head end
end
if not first then return {'none'} end
local row = write('job:' .. string.sub(first, -36), {set = cjson.decode(ARGV[6]), add = {claims = 1}, news = true})
if name ~= '' then
    call('HINCRBY', 'worker:' .. name, 'claims', 1)
    call('HSET', 'worker:' .. name, 'last_claim_at', now)
end
return {'job', cjson.encode(row)}
"""

#: Change: writes holds and a new version of their table, if the version is still the given one; stores the act; and
#: publishes that jobs may be claimed now. ARGV: the leader's token or '*', holds_version, JSON of the act or '', then
#: field and value ('' to delete) of each hold. Returns 1, or 0 if the version has changed.
CHANGE_HOLDS = """
if fenced(ARGV[1]) then return 'fenced' end
if (call('GET', 'holds_version') or '') ~= ARGV[2] then return 0 end
for i = 4, #ARGV, 2 do
    if ARGV[i + 1] == '' then call('HDEL', 'holds', ARGV[i]) else call('HSET', 'holds', ARGV[i], ARGV[i + 1]) end
end
if ARGV[3] ~= '' then
    call('LPUSH', 'acts', ARGV[3])
    call('LTRIM', 'acts', 0, {KEPT_ACTS} - 1)
end
call('SET', 'holds_version', stamp())
offer({'*'})
return 1
"""

#: Write periodic: writes one row of periodic builds and a new version of their table, if the version is still the given
#: one; and stores the act. ARGV: the leader's token or '*', periodic_version, JSON of the act or '', the name, JSON of
#: the row or '' to delete. Returns 1, or 0 if the version has changed.
WRITE_PERIODIC = """
if fenced(ARGV[1]) then return 'fenced' end
if (call('GET', 'periodic_version') or '') ~= ARGV[2] then return 0 end
if ARGV[5] == '' then call('HDEL', 'periodic', ARGV[4]) else call('HSET', 'periodic', ARGV[4], ARGV[5]) end
if ARGV[3] ~= '' then
    call('LPUSH', 'acts', ARGV[3])
    call('LTRIM', 'acts', 0, {KEPT_ACTS} - 1)
end
call('SET', 'periodic_version', stamp())
return 1
"""

#: Forget: deletes rule sets without waiting jobs.
FORGET_RULE_SETS = """
for _, rule_set in ipairs(call('SMEMBERS', 'rule_sets')) do
    local key = ':' .. rule_set
    if call('EXISTS', 'ages:ready' .. key, prefix .. 'ages:reserving' .. key) == 0 then
        call('SREM', 'rule_sets', rule_set)
    end
end
"""

#: Trust: sets whether `ready` jobs may be handed out in this run of Redis. ARGV: the leader's token, '1' or '0', and
#: the lowest allowed value of `sequence`: Redis may have lost changes, and with a lower value old answers of Buildkite
#: would be applied to newer rows.
TRUST = """
if fenced(ARGV[1]) then return 'fenced' end
if ARGV[2] == '1' then call('SET', 'trusted', run_id(), 'PX', {TRUST_MS}) else call('DEL', 'trusted') end
if tonumber(call('GET', 'sequence') or 0) < tonumber(ARGV[3]) then call('SET', 'sequence', ARGV[3]) end
"""

#: Beat: a scheduler's heartbeat; takes or renews the leader's turn. Keys: `leader`: the leader's name, which expires;
#: `fence`: the newest token, new with every term; `trusted`: the run of Redis whose `ready` jobs may be handed out,
#: which expires; `alive` and `schedulers`: live schedulers with their settings; `notes`: the leader's notes.
#: ARGV: name, its settings, its notes, '' if it does not want the turn.
#: Returns the token or '', the leader, the rest of its turn in ms, `offers`, whether Redis is trusted, notes, Redis's
#: time, and JSON of each scheduler's name and settings.
HEARTBEAT = """
local name, time = ARGV[1], redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
call('ZADD', 'alive', ms + {ALIVE_MS}, name)
call('HSET', 'schedulers', name, ARGV[2])
for _, gone in ipairs(call('ZRANGEBYSCORE', 'alive', '-inf', ms)) do
    call('ZREM', 'alive', gone)
    call('HDEL', 'schedulers', gone)
end
local leader, token = call('GET', 'leader'), ''
if not leader and ARGV[4] ~= '' then
    leader = name
    call('SET', 'fence', stamp() .. ' ' .. name)
end
local trusted = call('GET', 'trusted') == run_id()
if leader == name and ARGV[4] ~= '' then
    call('SET', 'leader', name, 'PX', {TURN_MS})
    call('SET', 'notes', ARGV[3])
    token = call('GET', 'fence')
    if trusted then call('PEXPIRE', 'trusted', {TRUST_MS}) end
end
return {token, leader or '', call('PTTL', 'leader'), call('GET', 'offers') or '0', trusted and 1 or 0,
    call('GET', 'notes') or '{}', time, cjson.encode(hash('schedulers'))}
"""

#: Leave: gives up the turn, and publishes that. ARGV: name.
LEAVE = """
call('ZREM', 'alive', ARGV[1])
call('HDEL', 'schedulers', ARGV[1])
if call('GET', 'leader') == ARGV[1] then call('DEL', 'leader') end
redis.call('PUBLISH', prefix .. 'news', cjson.encode({left = ARGV[1]}))
"""

#: Try: writes a key, publishes an empty message, and deletes the key, to test permissions.
TRY = """
call('SET', 'tried', '1')
redis.call('PUBLISH', prefix .. 'news', '{}')
call('DEL', 'tried')
"""


#: The rows that one move changes, as APPLY takes them.
Change = list[dict[str, Any]]
#: Instead of a leader's token: for writes that every scheduler may make.
ANYBODY = "*"


def lua(body: str) -> str:
    """A script: PRELUDE and body, with our constants filled in."""
    constants: dict[str, object] = {
        "PLACES": lua_table(PLACES),
        "TURN_MS": int(TURN_SECONDS * 1000),
        "ALIVE_MS": int(ALIVE_SECONDS * 1000),
        "TRUST_MS": int(TRUST_SECONDS * 1000),
        "KEPT_ACTS": KEPT_ACTS,
    }
    return re.sub(r"\{([A-Z_]+)\}", lambda found: str(constants[found[1]]), PRELUDE + body)


def lua_table(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {lua_table(each)}" for name, each in value.items()) + "}"
    return "{" + ", ".join(map(lua_table, value)) + "}"


class RedisConnections:
    """One scheduler's connections to Redis. Errors become StoreUnavailable, with advice."""

    def __init__(self, address: RedisAddress, prefix: str):
        self.address, self.prefix = address, prefix
        self._client = connect_to_redis(address)
        # A separate client for the turn, so that its connection is not shared with other calls.
        self._turn_client = connect_to_redis(address)
        from redis import exceptions  # noqa: PLC0415  connect_to_redis has imported it already

        self._errors: Any = exceptions
        self._scripts: dict[str, Any] = {}
        # Limited, because one connection for each parked claim could be thousands.
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
        problem = error_text(error)
        if isinstance(error, self._errors.ReadOnlyError):
            # After a failover the address may lead to another server. Connections in use belong to other threads.
            self._client.connection_pool.disconnect(inuse_connections=False)
        self._trouble = (
            f"Redis at {self.address} cannot be used: {problem}; {remedy_of(problem, self.address)}. "
            "The scheduler keeps trying"
        )
        # Other calls fail at once for a moment, because each try may take REDIS_SECONDS.
        self._retry_at = time.monotonic() + RETRY_STORE_SECONDS
        return StoreUnavailable(self._trouble)

    def refuses_us(self, error: StoreUnavailable) -> bool:
        """Whether Redis refused our user or password."""
        cause = error.__cause__
        # redis-py 4 has no own exception for a wrong user.
        return isinstance(cause, self._errors.AuthenticationError) or str(cause).startswith("WRONGPASS")

    def run(self, body: str, *arguments: object, for_turn: bool = False) -> Any:
        """Run a script; may raise Fenced. It is sent as a hash, and only if Redis does not know it, as text."""
        if body not in self._scripts:
            self._scripts[body] = self._client.register_script(lua(body))
        with self._guard():
            client = self._turn_client if for_turn else self._client
            answer = self._scripts[body](keys=[self.prefix], args=[as_text(each) for each in arguments], client=client)
        if answer == "fenced":
            raise Fenced("another scheduler leads now")
        return answer

    def call(self, command: str, key: str, *arguments: object) -> Any:
        """Run a command on one of our keys."""
        return self.server(command, self.prefix + key, *map(as_text, arguments))

    def server(self, command: str, *arguments: str) -> Any:
        """Run a command as it is, for example about the server."""
        with self._guard():
            return self._client.execute_command(command, *arguments)

    def ask(self, *commands: Sequence[Any], for_turn: bool = False) -> list[Any]:
        """Run several commands on our keys atomically, in one round trip; return their answers."""
        if not commands:
            return []
        with self._guard():
            pipeline = (self._turn_client if for_turn else self._client).pipeline()
            for command, key, *arguments in commands:
                pipeline.execute_command(command, f"{self.prefix}{key}", *map(as_text, arguments))
            answers: list[Any] = pipeline.execute()
            return answers

    def scan(self) -> list[str]:
        """All our keys."""
        with self._guard():
            return list(self._client.scan_iter(match=f"{self.prefix}*", count=1000))

    def news(self, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Messages of schedulers until `is_over`; some may get lost. StoreUnavailable: the connection broke."""
        channel = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            channel.subscribe(f"{self.prefix}news")
            while not is_over():
                message = channel.get_message(timeout=1.0)
                if message and message["type"] == "message":
                    yield json.loads(message["data"])
                if channel.health_check_response_counter > UNANSWERED_PINGS:
                    raise TimeoutError("pings on this connection get no answer")
        except (self._errors.RedisError, OSError) as error:
            raise StoreUnavailable(f"no messages from Redis at {self.address}: {error_text(error)}") from error
        finally:
            channel.close()

    def close(self) -> None:
        self._client.close()
        self._turn_client.close()


def connect_to_redis(address: RedisAddress) -> Any:
    """A client of redis-py, which connects at its first use."""
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
        # No hidden retries: a script may have run although its answer was lost.
        "retry": Retry(NoBackoff(), 0),
        **address.options,
    }
    if not address.service:
        [(host, port)] = address.hosts
        return redis.Redis(host=host, port=port, **options)
    sentinels: Any = redis.sentinel  # has no type annotations
    asked_with = time_outs | address.sentinel_options
    return sentinels.Sentinel(address.hosts, sentinel_kwargs=asked_with, **options).master_for(address.service)


def error_text(error: Exception) -> str:
    """The error's text without the client's settings, which redis-py may include with their secrets."""
    return re.sub(r"<redis\..*> - ", "", str(error), flags=re.DOTALL) or type(error).__name__


def remedy_of(text: str, address: RedisAddress) -> str:
    """What a person can do about an error, by a word in Redis's error text."""
    command = "" if address.service else f": redis-cli -u {address} ping"
    return remedy_among(REDIS_REMEDIES, text) or f"check that it runs and can be reached from here{command}"


REDIS_REMEDIES = {
    "OOM": "it is out of memory, and our keys must not be evicted: raise maxmemory",
    "command not allowed when used memory": "it is out of memory: raise maxmemory",
    "READONLY": "it is a replica: a failover is under way, or REDIS_ADDR names the wrong server",
    "read only replica": "it is a replica: a failover is under way, or REDIS_ADDR names the wrong server",
    "LOADING": "it loads its data after a start, and answers when that is done",
    "loading the dataset": "it loads its data after a start, and answers when that is done",
    "MASTERDOWN": "it is a replica without a primary: a failover is under way",
    "MISCONF": "it cannot write its data to disk: check its log and its disk",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write requires",
    "BUSY": "another program's script runs for too long",
    "NOPERM": "its user may not do this: it needs all commands, keys and channels of the prefix",
    "AuthenticationError": "a Sentinel refuses us: see ?sentinel_password=",
    "No master found": "no Sentinel knows a primary of that name: a failover is under way, or the name is wrong",
}


def as_text(value: object) -> str:
    """A value as text; a number so that Lua and Python read it back unchanged; "" for None."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def placed(order: tuple[int, float, str]) -> str:
    """A job's sort key as text that sorts in the same order: non-negative numbers with leading zeros."""
    behind, scheduled_at, uuid = order
    # Buildkite's times have microseconds.
    micros = round(min(max(scheduled_at, -1e11), 8e11) * 1e6) + 10**17
    return f"{2**63 + behind:020}{micros:018}{uuid}"


@dataclasses.dataclass(frozen=True, slots=True)
class Heartbeat:
    """The answer to a scheduler's heartbeat."""

    #: The token of its term; "" if it does not lead.
    token: str
    leader: str
    #: Seconds until the leader's turn expires unless it is renewed.
    turn_seconds: float
    #: The count of offers so far. A scheduler that has received fewer has missed some.
    offers: int
    #: Whether `ready` jobs may be handed out: a leader has led lately, in this run of Redis.
    trusted: bool
    #: The leader's notes about each queue.
    notes: dict[str, Any]
    #: Every live scheduler, with its settings that must be equal, as JSON.
    schedulers: dict[str, str]


def texts(changes: Mapping[str, Any]) -> dict[str, str | bool]:
    """Fields as text for the scripts; False for None."""
    return {name: False if value is None else as_text(value) for name, value in changes.items()}


def holds_in(version: str | None, written: Mapping[str, str]) -> Holds:
    return Holds(version or "", tuple(hold_of(json.loads(text)) for _, text in sorted(written.items())))


def periodic_row_of(data: Mapping[str, Any]) -> PeriodicRow:
    """A row from its JSON. Unknown fields of a newer scheduler are ignored."""
    return PeriodicRow(**{field: data[field] for field in PERIODIC_FIELDS.names if field in data})


def rev_of(row: WorkerRow | None) -> str:
    """The row's `rev` as the scripts compare it; "0" without a row."""
    return str(row.rev if row else 0)


#: Fields of a worker's row whose changes do not change its `rev`: any scheduler may add to the first two, and overwrite
#: the others, without having read the row.
COUNTED_FIELDS, NOTED_FIELDS = ("claims", "ran"), ("heard_at", "last_claim_at")


@dataclasses.dataclass
class ClaimCache:
    """Recently read rows with which claims are decided. TAKE refuses a claim that was decided with outdated rows."""

    workers: dict[str, WorkerRow] = dataclasses.field(default_factory=dict)
    rule_sets: tuple[object, Collection[str]] = ("", ())
    holds: Holds = Holds("", ())
    highest_sequence: int = 0

    def remember(self, name: str, row: WorkerRow | None) -> None:
        if len(self.workers) >= MAX_WORKERS:
            self.workers.clear()  # limit the size
        if row:
            self.workers[name] = row
        else:
            self.workers.pop(name, None)


class RedisRows:
    """The rows in Redis, shared by several schedulers."""

    def __init__(self, settings: Settings, name: str, job_type: type[Job] = Job, *, for_check: bool = False):
        """`name`: of this scheduler, a new one at each start. `for_check`: write nothing here."""
        self._settings, self.name = settings, name
        #: Returns hashes of the files that should be equal at all schedulers, by setting.
        self.files: Callable[[], Mapping[str, str]] = lambda: {}
        address = settings.redis_addr
        assert address
        self._redis = RedisConnections(address, address.prefix or f"stack:{settings.stack_key}:")
        self._jobs, self._worker_fields = Fields(job_type), Fields(WorkerRow)
        self._token = ""
        # Redis's time minus our monotonic clock.
        self._offset = 0.0
        self._known = ClaimCache()
        try:
            self._follow_time(lambda: self._redis.server("TIME"))
        except StoreUnavailable as error:
            if self._redis.refuses_us(error):
                raise SettingsError(f"REDIS_ADDR: {error}") from None
            raise
        self._check_schema(for_check)

    def with_token(self, token: str) -> RedisRows:
        """The same rows for the leader with this token: its writes are refused when another scheduler leads."""
        rows = copy.copy(self)
        rows._token = token
        return rows

    def close(self) -> None:
        self._redis.close()

    @property
    def address(self) -> RedisAddress:
        return self._redis.address

    def _check_schema(self, for_check: bool) -> None:
        """Upgrade the keys to our schema. SettingsError: newer schema, another program's keys, older schedulers run."""
        (schema, min_reader, has_jobs) = self._redis.ask(
            ["GET", "schema"], ["GET", "min_reader"], ["EXISTS", "sequence"]
        )
        try:
            found = int(schema or (1 if has_jobs else REDIS_SCHEMA))
            lowest = int(min_reader or found)
        except ValueError:
            raise SettingsError(
                f"REDIS_ADDR: another program wrote the keys below {self._redis.prefix!r}; set another ?prefix="
            ) from None
        if found > REDIS_SCHEMA and lowest > REDIS_SCHEMA:
            raise SettingsError(
                f"REDIS_ADDR: the keys below {self._redis.prefix!r} have schema {found}, which this scheduler (schema "
                f"{REDIS_SCHEMA}) cannot read; run the version that wrote them, or set another ?prefix="
            )
        if found < REDIS_SCHEMA:
            refuse_older_schedulers(self._redis)
        if for_check or found > REDIS_SCHEMA:
            return
        if found == 1:
            migrate_redis(self._redis, self._jobs)
        self._redis.ask(["SET", "schema", REDIS_SCHEMA], ["SET", "min_reader", REDIS_MIN_READER])

    # -- what is written

    def sequence(self) -> int:
        number = int(self._redis.call("GET", "sequence") or 0)
        self._known.highest_sequence = max(self._known.highest_sequence, number)
        return number

    def apply(self, uuids: Collection[str], step: Step, now: float, by: Speaker) -> list[Move]:
        done, lost = self._apply([*uuids][:SLICE], step, now, by)
        left = lost + [*uuids][SLICE:]
        while left:
            made, lost = self._apply(left[:SLICE], step, now, by)
            done += made
            left = left[SLICE:] + lost
        return done

    def _apply(self, uuids: Sequence[str], step: Step, now: float, by: Speaker) -> tuple[list[Move], list[str]]:
        """The moves that were written, and the uuids of jobs to read again."""
        speaker = by if isinstance(by, Worker) else None
        found, facts = self._read(uuids, speaker)
        heard = {}
        if speaker and (row := facts.worker(speaker.name)) and row.session == speaker.session:
            heard = {speaker.name: as_text(now)}
        moves: list[Move] = []
        written: list[Change] = []
        try:
            for uuid in uuids:
                rev, before = found[uuid]
                if move := step(uuid, before, facts):
                    moves.append(move)
                    written.append(self._written(rev, before, move, facts))
        except Refusal:
            if heard:
                self._run_apply(ANYBODY, [], heard)
            raise
        ready = {m.job.rule_set for m in moves if index_place(m.job) == "ready" and m.is_state_change}
        token = self._token if by == LEADER else ANYBODY
        number, lost = self._run_apply(token, written, heard, sorted(ready))
        for name in {move.worker.name for move in moves if move.worker}:
            self._known.remember(name, facts.worker(name))
        made = [
            dataclasses.replace(move, job=dataclasses.replace(move.job, version=number))
            if move.is_state_change
            else move
            for index, move in enumerate(moves)
            if index not in lost
        ]
        return made, [moves[index].job.uuid for index in sorted(lost)]

    def _run_apply(
        self, token: str, written: Sequence[Change], heard: Mapping[str, str] | None = None, ready: Sequence[str] = ()
    ) -> tuple[int, set[int]]:
        """Run APPLY; return the sequence number, and the indexes of changes that were not written."""
        answer = self._redis.run(APPLY, token, json.dumps(heard or {}), json.dumps(ready), *map(json.dumps, written))
        return int(answer[0]), {int(index) for index in answer[1:]}

    def _read(
        self, uuids: Sequence[str], speaker: Worker | None
    ) -> tuple[dict[str, tuple[str, Job | None]], MoveContext]:
        """The rows of these jobs, each with its rev, and the rows of the workers named in them."""
        asked = [["HGETALL", "answered_at"], *(["HGETALL", f"job:{uuid}"] for uuid in uuids)]
        names = [speaker.name] if speaker and speaker.name else []
        answers = self._redis.ask(*asked, *(["HGETALL", f"worker:{name}"] for name in names))
        facts = MoveContext(
            self._worker_rows(answers[1 + len(uuids) :]), {q: float(at) for q, at in answers[0].items()}
        )
        rows: dict[str, tuple[str, Job | None]] = {}
        for uuid, found in zip(uuids, answers[1:], strict=False):
            rows[uuid] = (found["rev"], self._jobs.read(found.items())) if found else ("0", None)
        jobs = [job for _, job in rows.values() if job]
        named = {job.worker for job in jobs} | {job.tries[-1]["worker"] for job in jobs if job.tries}
        facts.workers.update(self._workers_called(sorted(name for name in named if name and name not in names)))
        return rows, facts

    def _workers_called(self, names: Iterable[str]) -> dict[str, WorkerRow]:
        return self._worker_rows(self._redis.ask(*(["HGETALL", f"worker:{name}"] for name in names)))

    def _worker_rows(self, found: Iterable[Mapping[str, str]]) -> dict[str, WorkerRow]:
        rows = [self._worker_fields.read(fields.items()) for fields in found if fields]
        return {row.name: row for row in rows}

    def _written(self, rev: str, before: Job | None, move: Move, facts: MoveContext) -> Change:
        """A move as APPLY takes it. It updates the worker's row in `facts` for later moves of this batch."""
        changes = self._jobs.changed(before, move.job)
        stands = {"place": placed(move.job.order), "standing": index_place(move.job)}
        if before:
            stood = {"place": placed(before.order), "standing": index_place(before)}
            stands = {name: text for name, text in stands.items() if text != stood[name]}
        written = texts(changes) | stands
        rows: Change = [{"key": f"job:{move.job.uuid}", "rev": rev, "set": written, "news": move.is_state_change}]
        if move.worker and (row := facts.worker(move.worker.name)):
            worker, facts.workers[row.name] = self._worker_written(row, move.worker)
            rows.append(worker)
        return rows

    def _worker_written(self, before: WorkerRow | None, after: WorkerRow) -> tuple[dict[str, Any], WorkerRow]:
        """A worker's row as APPLY takes it, and its new row."""
        changes = self._worker_fields.changed(before, after)
        counts = {name: changes.pop(name) - getattr(before, name, 0) for name in COUNTED_FIELDS if name in changes}
        changed = {name: text for name, text in texts(changes).items() if text is not False}
        if before:
            changed = {name: text for name, text in changed.items() if name not in NOTED_FIELDS}
        row = {"key": f"worker:{after.name}", "worker": after.name, "set": changed, "add": counts}
        if not changed:
            return row, after
        return {**row, "rev": rev_of(before)}, dataclasses.replace(after, rev=after.rev + 1)

    def delete(self, uuids: Collection[str]) -> None:
        gone = {"state": JobState.DONE, "gone": True}
        self._run_apply(self._token, [[{"key": f"job:{uuid}", **gone}] for uuid in uuids])

    def change_all(self, changes: Mapping[JobState, Mapping[str, Any]]) -> None:
        for state, fields in changes.items():
            is_state_change = "state" in fields
            new_fields = {
                "state": state,
                "set": texts(fields) | ({"standing": "back"} if is_state_change else {}),
                "news": is_state_change,
            }
            uuids = [uuid for queue_key in self._queues() for uuid in self._in_states([state], queue_key)]
            for start in range(0, max(1, len(uuids)), SLICE):
                some = uuids[start : start + SLICE]
                self._run_apply(self._token, [[{"key": f"job:{uuid}", **new_fields}] for uuid in some])

    def restart(
        self, changes: Mapping[JobState, Mapping[str, Any]], worker: Callable[[WorkerRow], WorkerRow], now: float
    ) -> None:
        confirm = any("state" in fields for fields in changes.values())
        if confirm:
            self._trust(False)
        self.change_all(changes)
        for name in self._redis.call("SMEMBERS", "workers"):
            while (before := self._read_worker(name)) and not self.write_worker(before, worker(before)):
                pass  # it changed meanwhile: read it and try again
        self._run_apply(self._token, [], dict.fromkeys((row.name for row in self.workers()), as_text(now)))
        self._redis.ask(*(["HSET", "answered_at", q, min(at, now)] for q, at in self._answered().items()))
        if confirm:
            self._trust(True)

    def _trust(self, trusted: bool) -> None:
        self._redis.run(TRUST, self._token, int(trusted), self._known.highest_sequence + 1)

    def _answered(self) -> dict[str, float]:
        return {queue_key: float(at) for queue_key, at in self._redis.call("HGETALL", "answered_at").items()}

    # -- claims

    def take(
        self, rule_sets: Sequence[str], lease: Mapping[str, Any], row: WorkerRow | None, holds: object, now: float
    ) -> TakeResult:
        version = self._known.rule_sets[0]
        fields = json.dumps(texts(lease) | {"standing": "leased"})
        who = [row.name if row else "", rev_of(row), now]
        match self._redis.run(TAKE, version, holds, *who, fields, *rule_sets):
            case ["job", text]:
                return TakeResult(self._jobs.read(json.loads(text).items()))
            case ["has", uuid]:
                return TakeResult(has=uuid)
            case ["none"]:
                return TakeResult()
        self._refresh(row.name if row else None)
        return TakeResult(is_stale=True)

    def _refresh(self, name: str | None) -> None:
        """Read the rows for claims again, each version and its table from one moment."""
        asked = [
            ["GET", "rule_sets_version"],
            ["SMEMBERS", "rule_sets"],
            ["GET", "holds_version"],
            ["HGETALL", "holds"],
        ]
        answers = self._redis.ask(*asked, *([["HGETALL", f"worker:{name}"]] if name else []))
        self._known.rule_sets = answers[0] or "", frozenset(answers[1])
        self._known.holds = holds_in(answers[2], answers[3])
        if name:
            self._known.remember(name, self._worker_rows(answers[4:]).get(name))

    def rule_sets(self, *, fresh: bool = False) -> tuple[object, Collection[str]]:
        if fresh:
            self._refresh(None)
        return self._known.rule_sets

    def forget_rule_sets(self) -> None:
        self._redis.run(FORGET_RULE_SETS)

    # -- workers

    def worker_of(self, worker: Worker) -> WorkerRow | None:
        row = self._known.workers.get(worker.name)
        return row if row and row.session == worker.session else self._read_worker(worker.name)

    def _read_worker(self, name: str) -> WorkerRow | None:
        self._refresh(name)
        return self._known.workers.get(name)

    def write_worker(self, before: WorkerRow | None, after: WorkerRow | None) -> bool:
        if after == before:
            return True
        row: dict[str, Any]
        if after:
            row, after = self._worker_written(before, after)
        else:
            assert before
            row = {"key": f"worker:{before.name}", "worker": before.name, "gone": True}
        _, lost = self._run_apply(ANYBODY, [[{**row, "rev": rev_of(before)}]])
        self._known.remember(row["worker"], None if lost else after)
        return not lost

    def workers(self) -> list[WorkerRow]:
        return [*self._workers_called(sorted(self._redis.call("SMEMBERS", "workers"))).values()]

    def count_workers(self) -> int:
        count: int = self._redis.call("SCARD", "workers")
        return count

    def answered(self, queue_key: str, now: float) -> None:
        self._redis.call("HSET", "answered_at", queue_key, now)

    def answered_at(self, queue_key: str) -> float:
        return float(self._redis.call("HGET", "answered_at", queue_key) or 0)

    def last_answer_at(self) -> float:
        """When Buildkite last answered any leader about any queue; 0: never."""
        return max(self._answered().values(), default=0.0)

    # -- holds

    def holds(self) -> Holds:
        return holds_in(*self._redis.ask(["GET", "holds_version"], ["HGETALL", "holds"]))

    def known_holds(self) -> Holds:
        return self._known.holds

    def change_holds(
        self, version: object, added: Sequence[Hold], removed: Sequence[Hold], act: OperatorAct | None = None
    ) -> bool:
        written = {f"{hold.target} {hold.owner}": "" for hold in removed}
        written |= {f"{hold.target} {hold.owner}": json.dumps(dataclasses.asdict(hold)) for hold in added}
        flat = itertools.chain.from_iterable(written.items())
        act_json = json.dumps(act._asdict()) if act else ""
        token = self._token if any(hold.owner == "buildkite" for hold in (*added, *removed)) else ANYBODY
        changed = self._redis.run(CHANGE_HOLDS, token, version, act_json, *flat)
        self._refresh(None)
        return bool(changed)

    def act(self, act: OperatorAct) -> None:
        act_json = json.dumps(act._asdict())
        self._redis.ask(["LPUSH", "acts", act_json], ["LTRIM", "acts", 0, KEPT_ACTS - 1])

    def acts(self, limit: int) -> list[OperatorAct]:
        found = self._redis.call("LRANGE", "acts", 0, limit - 1)
        return [OperatorAct(*(fields[name] for name in OperatorAct._fields)) for fields in map(json.loads, found)]

    # -- periodic builds

    def timetable(self) -> Timetable:
        version, written = self._redis.ask(["GET", "periodic_version"], ["HGETALL", "periodic"])
        return Timetable(version or "", tuple(periodic_row_of(json.loads(text)) for _, text in sorted(written.items())))

    def write_periodic(
        self, version: object, name: str, after: PeriodicRow | None, act: OperatorAct | None, by: Speaker
    ) -> bool:
        token = self._token if by == LEADER else ANYBODY
        act_json = json.dumps(act._asdict()) if act else ""
        row = json.dumps(dataclasses.asdict(after)) if after else ""
        return bool(self._redis.run(WRITE_PERIODIC, token, version, act_json, name, row))

    # -- reads

    def _jobs_of(self, uuids: Iterable[str]) -> list[Job]:
        found = self._redis.ask(*(["HGETALL", f"job:{uuid}"] for uuid in uuids))
        return [self._jobs.read(row.items()) for row in found if row]

    def get(self, uuid: str) -> Job | None:
        return next(iter(self._jobs_of([uuid])), None)

    def _queues(self) -> list[str]:
        return sorted(self._redis.call("SMEMBERS", "queues"))

    def unfinished(self, queue_key: str) -> list[str]:
        return self._in_states([state for state in JobState if state is not JobState.DONE], queue_key)

    def leased_or_running(self, queue_key: str) -> list[str]:
        return self._in_states([JobState.LEASED, JobState.RUNNING], queue_key)

    def _in_states(self, states: Sequence[JobState], queue_key: str) -> list[str]:
        lines = self._redis.ask(*(["ZRANGE", f"line:{state}:{queue_key}", 0, -1] for state in states))
        return [place[-36:] for line in lines for place in line]

    def waiting(self, queue_key: str, now: float, limit: int, *, fresh: bool) -> list[str]:
        until = min(now, 1e15)  # a finite number, because `now` may be inf
        fresh_line, back, later = self._redis.ask(
            ["ZRANGE", f"fresh:{queue_key}", 0, limit - 1],
            ["ZRANGE", f"back:{queue_key}", 0, limit - 1],
            ["ZRANGEBYSCORE", f"later:{queue_key}", "-inf", until, "LIMIT", 0, limit],
        )
        if not fresh and later:
            reserved_at = self._redis.ask(*(["HGET", f"job:{place[-36:]}", "reserved_at"] for place in later))
            later = [place for place, at in zip(later, reserved_at, strict=True) if at]
        return [place[-36:] for place in sorted([*back, *later, *(fresh_line if fresh else ())])[:limit]]

    def due(self, queue_key: str, before: float, limit: int) -> list[str]:
        return list(self._redis.call("ZRANGEBYSCORE", f"due:{queue_key}", "-inf", f"({before!r}", "LIMIT", 0, limit))

    def run_out(self, queue_keys: Collection[str], now: float) -> list[str]:
        run_id = self._redis.server("INFO", "server").get("run_id")
        lines: list[Sequence[Any]] = [["GET", "trusted"], ["ZRANGEBYSCORE", "leases", "-inf", now]]
        trusted, leases, *due = self._redis.ask(
            *lines, *(["ZRANGEBYSCORE", f"due:{queue_key}", "-inf", now] for queue_key in queue_keys)
        )
        # While Redis was away, workers could not touch: give leases their full time first.
        return list(dict.fromkeys(itertools.chain(leases, *due))) if trusted == run_id else []

    def policy_steps(self, queue_key: str, step: str, now: float, limit: int) -> list[str]:
        key = f"policy:{step}:{queue_key}"
        places = self._redis.call("ZRANGEBYSCORE", key, "-inf", repr(now), "LIMIT", 0, limit)
        return [place[-36:] for place in places]

    def chained(self, chain: str, limit: int) -> list[Job]:
        return self._jobs_of(self._redis.call("ZREVRANGE", f"chain:{chain}", 0, limit - 1))

    def intents(self, queue_key: str, now: float) -> list[Job]:
        return self._jobs_of(self._redis.call("ZRANGEBYSCORE", f"intents:{queue_key}", "-inf", min(now, 1e15)))

    def done_before(self, before: float, limit: int) -> list[str]:
        asked = (["ZRANGEBYSCORE", f"done:{word}", "-inf", f"({before!r}", "LIMIT", 0, limit] for word in Outcome)
        return list(itertools.chain.from_iterable(self._redis.ask(*asked)))[:limit]

    def done_since(self, since: float, limit: int) -> list[Job]:
        keys = [f"done:{word}" for word in Outcome]
        found = self._redis.ask(*(["ZREVRANGEBYSCORE", key, "+inf", since, "LIMIT", 0, limit] for key in keys))
        jobs = self._jobs_of(itertools.chain.from_iterable(found))
        return sorted(jobs, key=lambda job: job.done_at or 0.0, reverse=True)[:limit]

    def page(
        self, state: JobState, after: tuple[int, float, str] | None, limit: int, queue_key: str | None = None
    ) -> list[Job]:
        start = f"({placed(after)}" if after else "-"
        keys = [f"line:{state}:{each}" for each in (self._queues() if queue_key is None else [queue_key])]
        found = self._redis.ask(*(["ZRANGEBYLEX", key, start, "+", "LIMIT", 0, limit] for key in keys))
        return self._jobs_of(place[-36:] for place in sorted(itertools.chain.from_iterable(found))[:limit])

    def line(self, queue_key: str) -> list[str]:
        return self._in_states([JobState.READY], queue_key)

    def held_by(self, owner: str, queue_key: str, until: float) -> list[str]:
        places = self._redis.call("ZRANGEBYSCORE", f"until:{owner}:{queue_key}", "-inf", min(until, 1e15))
        return [place[-36:] for place in sorted(places)]

    def count_held(self, owner: str, notes: Sequence[str]) -> dict[str, int]:
        counts = self._redis.ask(*(["ZCARD", f"held:{owner}:{note}"] for note in notes))
        return dict(zip(notes, map(int, counts), strict=True))

    def ahead(self, job: Job, most: int) -> int:
        count: int = self._redis.call("ZLEXCOUNT", f"ready:{job.rule_set}", "-", f"({placed(job.order)}")
        return min(count, most)

    def counts(self) -> Counts:
        known = sorted(self._redis.call("SMEMBERS", "rule_sets"))
        waiting = [(state, text) for text in known for state in (JobState.RESERVING, JobState.READY)]
        ages = [f"ages:{state}:{text}" for state, text in waiting]
        held = [f"line:{state}:{q}" for state in (JobState.LEASED, JobState.RUNNING) for q in self._queues()]
        asked: list[Sequence[Any]] = [
            *(["ZCARD", key] for key in ages),
            *(["EXISTS", f"ready:{text}"] for text in known),
            *(["ZRANGE", key, 0, 0, "WITHSCORES"] for key in ages),
            *(["ZRANGE", key, 0, -1] for key in held),
            *(["ZCARD", f"done:{word}"] for word in Outcome),
            ["HGETALL", "totals"],
        ]
        answers = iter(self._redis.ask(*asked))
        jobs = [next(answers) for _ in ages]
        claimable = {text for text in known if next(answers)}
        oldest = [next(answers) for _ in ages]
        places = [place for _ in held for place in next(answers)]
        outcomes = {str(word): int(next(answers)) for word in Outcome}
        totals = [(*what.partition(" ")[::2][::-1], int(count)) for what, count in next(answers).items()]
        levels = [
            # Newer versions of redis-py return pairs of member and score.
            RuleSetCount(state, text, count, float(score), uuid, state is JobState.READY and text not in claimable)
            for (state, text), count, first in zip(waiting, jobs, oldest, strict=True)
            if count
            for uuid, score in [first if len(first) > 1 else first[0]]
        ]
        return Counts(levels, self._at_work(places), outcomes, totals)

    def _at_work(self, places: Sequence[str]) -> list[JobAtWorker]:
        rows = self._redis.ask(*(["HMGET", f"job:{place[-36:]}", *AT_WORK_FIELDS.names] for place in places))
        return [AT_WORK_FIELDS.read(zip(AT_WORK_FIELDS.names, row, strict=True)) for row in rows if row[0]]

    def stacks(self) -> tuple[dict[str, str], dict[str, int]]:
        known = self._redis.call("HGETALL", "stacks")
        return known, {queue_key: len(self.unfinished(queue_key)) for queue_key in self._queues()}

    def remember_stacks(self, stack_keys: Mapping[str, str]) -> None:
        self._redis.call("HSET", "stacks", *itertools.chain.from_iterable(stack_keys.items()))

    def probe(self) -> None:
        self._redis.call("SET", "probed", self.name)

    def try_to_write(self) -> None:
        """Do what our scripts do, and leave nothing behind. Raises StoreUnavailable."""
        self._redis.run(TRY)

    # -- several schedulers

    def wall_clock(self) -> float:
        """Redis's time, computed from its last answer and our monotonic clock."""
        return time.monotonic() + self._offset

    def _follow_time(self, ask: Callable[[], Any], at: int | None = None) -> Any:
        """Call `ask`; the time in its answer (at index `at`) counts as the time at the middle of the call."""
        sent = time.monotonic()
        answer = ask()
        heard = time.monotonic()
        if heard - sent <= CLOCK_SECONDS or not self._offset:
            seconds, micros = answer if at is None else answer[at]
            self._offset = int(seconds) + int(micros) / 1e6 - (sent + heard) / 2
        return answer

    def heartbeat(self, notes: Mapping[str, Any], *, lead: bool = True) -> Heartbeat:
        """Send this scheduler's heartbeat; with `lead`, take or renew the leader's turn if possible."""
        # Settings that must be equal at all schedulers; another version ignores names that it does not know.
        about = {"queues": ",".join(sorted(self._settings.scheduler_queues)), "files": self.files()}
        arguments = [self.name, json.dumps(about), json.dumps(notes), "lead" if lead else ""]
        answer = self._follow_time(lambda: self._redis.run(HEARTBEAT, *arguments, for_turn=True), 6)
        token, leader, left_ms, offers, trusted, noted, _, known = answer
        return Heartbeat(
            token, leader, left_ms / 1000, int(offers), bool(trusted), json.loads(noted), json.loads(known)
        )

    def leave(self) -> None:
        """Give up the turn at once."""
        self._redis.run(LEAVE, self.name, for_turn=True)

    def seen(self, workers: Mapping[str, Any], schedulers: Collection[str]) -> list[dict[str, Any]]:
        """Store this scheduler's report of its workers, and return the reports of the others."""
        command = ["SET", f"seen:{self.name}", json.dumps(workers), "PX", int(4 * SEEN_SECONDS * 1000)]
        asked = (["GET", f"seen:{name}"] for name in schedulers if name != self.name)
        _, *others = self._redis.ask(command, *asked, for_turn=True)
        return [json.loads(text) for text in others if text]

    def tell(self, **news: object) -> None:
        """Publish a message to every scheduler; it may get lost."""
        self._redis.server("PUBLISH", f"{self._redis.prefix}news", json.dumps(news))

    def news(self, is_over: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        return self._redis.news(is_over)

    def problems(self) -> list[str]:
        """Problems in Redis's configuration that would delete jobs, if it can be read."""
        info = self._redis.server("INFO", "memory")
        # Other policies evict only keys with an expiry. Of ours only the turn and similar keys have one, and we rewrite
        # them within seconds.
        if not info.get("maxmemory") or not info.get("maxmemory_policy", "").startswith("allkeys"):
            return []
        listed = f"maxmemory-policy is {info['maxmemory_policy']}"
        return [f"{listed}, so Redis deletes jobs when memory is short; set it to noeviction"]

    def warnings(self) -> list[str]:
        """Warnings about Redis's configuration: the last changes could get lost."""
        if self._redis.server("INFO", "persistence").get("aof_enabled") != 0:
            return []
        return ["appendonly is no, so a restart forgets the last changes, or all; set it to yes"]


#: Keys of schema 1 that schema 2 does not have, or has in another form.
OLD_KEYS = re.compile(
    r"(fresh|back|intents|ready|line|ages|due|unfinished):.*|leased|held|ended|done|counts|rule_sets(_version)?"
    r"|paused|answered_at|seen:.*"
)


def refuse_older_schedulers(line: RedisConnections) -> None:
    """Raise SettingsError while a scheduler of an older schema runs."""
    now_ms = int(line.server("TIME")[0]) * 1000
    if alive := line.call("ZRANGEBYSCORE", "alive", now_ms, "+inf"):
        raise SettingsError(
            f"REDIS_ADDR: schedulers of an older version still run ({', '.join(sorted(alive))}); stop them first; then "
            f"this version upgrades the keys below {line.prefix!r} to schema {REDIS_SCHEMA}"
        )


def migrate_redis(line: RedisConnections, jobs: Fields[Job]) -> None:
    """Upgrade from schema 1: convert its rows, which keep their keys, and replace its other keys."""
    paused = line.call("SMEMBERS", "paused")
    if not line.call("SET", "migrating", "1", "NX", "PX", 60_000):
        raise StoreUnavailable("another scheduler upgrades the keys in Redis to this version; start again in a moment")
    keys = [key.removeprefix(line.prefix) for key in line.scan()]
    line.ask(*(["DEL", key] for key in keys if OLD_KEYS.fullmatch(key)))
    for queue_key in paused:
        hold = Hold(f"queue:{queue_key}", "buildkite", "queue_paused")
        line.call("HSET", "holds", f"{hold.target} {hold.owner}", json.dumps(dataclasses.asdict(hold)))
    for key in keys:
        if key.startswith("worker:"):
            retired = (line.call("HGET", key, "retired") or "").split("\n")
            kept = json.dumps([each for each in retired if each])
            line.call("HSET", key, "name", key.removeprefix("worker:"), "retired", kept, "rev", 1)
        elif key.startswith("job:"):
            row = line.call("HGETALL", key)
            tries = [try_of_schema_1(each) for each in json.loads(row.get("tries", "[]"))]
            job = jobs.read((row | {"tries": json.dumps(tries)}).items())
            if job.finish_detail is not None:
                job = dataclasses.replace(job, finish_detail=finish_detail(job))
            fields = texts(jobs.changed(None, job)) | {"place": placed(job.order), "standing": index_place(job)}
            line.run(APPLY, ANYBODY, "{}", "[]", json.dumps([{"key": key, "rev": "0", "set": fields}]))
    line.call("DEL", "migrating")


def try_of_schema_1(ended: Mapping[str, Any]) -> dict[str, Any]:
    """A claim's end from schema 1, whose scripts wrote numbers as text and left out None."""
    numbers = {name: float(ended[name]) for name in ("claimed_at", "ended_at")}
    status = int(ended["exit_status"]) if "exit_status" in ended else None
    return {"worker": None, "code": "", **ended, **numbers, "exit_status": status}


# --- Dispatch ---


class ParkedClaim:
    """A claim that waits for a job: its worker, since when it waits, and its result."""

    def __init__(self, worker: Worker, is_gone: Callable[[], bool]):
        self.worker, self.is_gone = worker, is_gone
        self.since = time.monotonic()
        self.woken = threading.Event()
        self.job: Job | None = None
        #: Another thread is claiming for it now, and will wake it.
        self.taken = False
        #: It must end without a job: its client is gone, a newer claim came, or the scheduler stops.
        self.over = False


#: Workers that may get the same jobs: their profile, and whether they need a job token.
Group = tuple[Profile, bool]


class WorkerSighting(NamedTuple):
    """The last claim of a worker: when, by which worker, and whether it waits now."""

    at: float
    worker: Worker
    waits: bool
    #: Since when the worker claims without getting a job; None: it got one, or this is unknown.
    since: float | None = None


class PeerReports(NamedTuple):
    """The last reports of all other schedulers: their named workers, waiting nameless workers, and local holds.

    Those holds have no effect here; they only explain why jobs wait.
    """

    workers: dict[str, WorkerSighting]
    nameless: list[Worker]
    holds: list[Hold]


class Dispatcher:
    """Brings jobs and workers together: a claim takes a ready job, or waits until a job is offered."""

    def __init__(self, store: Store, now: Callable[[], float]):
        self._store, self._now = store, now
        self._lock = threading.Lock()  # guards everything below; never held during calls of the store
        self._parked: dict[Group, dict[int, ParkedClaim]] = {}  # in each group, the longest parked first
        self._not_eligible: dict[int, ParkedClaim] = {}  # claims of workers with a hold
        #: Holds that apply only at this scheduler, by target.
        self._holds: dict[str, Hold] = {}
        self._latest: dict[str, ParkedClaim] = {}  # each named worker's newest claim
        self._offers = 0
        self._holds_version: object = None  # version of the table of holds at the last `offer_again`
        self._stopping = False
        self._seen: dict[str, WorkerSighting] = {}  # named workers that claimed here, the longest silent first
        #: When this scheduler began to accept claims. An earlier silence of a worker proves nothing.
        self.began_at = now()
        #: Incremented with each change of workers and holds.
        self.changes = 0
        self._peer_reports = PeerReports({}, [], [])
        self._unreadable = False  # a part of other schedulers' reports cannot be read; logged when this begins
        #: By queue key: returns why Buildkite cannot be asked about the queue's jobs, "" when it can.
        self.upstream_problems: dict[str, Callable[[], str]] = {}

    def claim(self, worker: Worker, wait: float, is_gone: Callable[[], bool] = lambda: False) -> Job | None:
        """The worker's next job, or None after `wait` seconds. `is_gone` returns whether the client disconnected.

        A held worker waits too. None comes earlier if the client is gone, the scheduler stops, or the same worker
        claims again. Raises a Refusal when the scheduler is stopping, and the errors of `Store.claim`.
        """
        waiter = ParkedClaim(worker, is_gone)
        self._enter(waiter)
        try:
            while not waiter.over:
                left = waiter.since + wait - time.monotonic()
                offers, pause, is_eligible = self._offers, left, True
                try:
                    waiter.job = self._claim(waiter)
                except WorkerHeld as held:
                    is_eligible, pause = False, held.until - self._now()
                    if pause <= UNJUDGED_SECONDS:
                        pause = min(pause, HOLD_SECONDS)  # the hold ends early if Buildkite tells the job's state
                    pause = min(left, pause)
                if waiter.job or left <= 0:
                    break
                self._wait(waiter, max(0.0, pause), offers, is_eligible)
                if waiter.job or is_gone():
                    break
        finally:
            superseded = self._leave(waiter)
        # If a newer claim replaced this one, the newer claim gets the same job again from the store.
        return None if superseded else waiter.job

    def _enter(self, waiter: ParkedClaim) -> None:
        """Register the claim. A worker has one claim at a time, so its older claim ends without a job."""
        name = waiter.worker.name
        with self._lock:
            if self._stopping:
                raise Refusal("the scheduler is stopping; claim again in a moment", **STOPPING)
            if not name:
                return
            if older := self._latest.get(name):
                self._end(older)
            self._latest[name] = waiter
            now, seen = self._now(), self._seen.get(name)
            asks_already = seen is not None and seen.since is not None and now - seen.at <= LIVE_SECONDS
            self._record_sighting(
                WorkerSighting(now, waiter.worker, True, seen.since if seen and asks_already else now)
            )

    def _leave(self, waiter: ParkedClaim) -> bool:
        """Remove a claim that is about to be answered; return whether a newer claim of its worker has come."""
        name = waiter.worker.name
        with self._lock:
            if name and self._latest.get(name) is not waiter:
                return True
            if name:
                del self._latest[name]
                seen = self._seen.get(name)
                since = seen.since if seen and not waiter.job else None
                self._record_sighting(WorkerSighting(self._now(), waiter.worker, False, since))
            return False

    def _record_sighting(self, seen: WorkerSighting) -> None:
        self.changes += 1
        self._seen.pop(seen.worker.name, None)
        self._seen[seen.worker.name] = seen
        if len(self._seen) > MAX_WORKERS:
            del self._seen[next(iter(self._seen))]

    def _claim(self, waiter: ParkedClaim) -> Job | None:
        return self._store.claim(waiter.worker, self._now(), self.holds())

    def _wait(self, waiter: ParkedClaim, seconds: float, offers: int, is_eligible: bool) -> None:
        """Park until woken. Return at once if there was an offer after the store was asked: we may have missed it."""
        with self._lock:
            waiter.over = waiter.over or self._stopping
            if waiter.over or offers != self._offers:
                return
            waiter.woken.clear()
            group = self._parked.setdefault(group_of(waiter.worker), {}) if is_eligible else self._not_eligible
            group[id(waiter)] = waiter
        waiter.woken.wait(seconds)
        with self._lock:
            self._unpark(waiter)
            taken = waiter.taken
        if taken:
            waiter.woken.wait()

    def _unpark(self, waiter: ParkedClaim) -> None:
        self._not_eligible.pop(id(waiter), None)
        group = self._parked.get(group_of(waiter.worker), {})
        group.pop(id(waiter), None)
        if not group:
            self._parked.pop(group_of(waiter.worker), None)

    def _end(self, waiter: ParkedClaim) -> None:
        waiter.over = True
        self._unpark(waiter)
        if not waiter.taken:
            waiter.woken.set()

    def offer(self, jobs: Iterable[Job]) -> None:
        """Hand out jobs that became ready to parked claims."""
        offered: dict[str, set[str]] = {}
        for job in jobs:
            offered.setdefault(job.rule_set, set()).add(job.uuid)
        self._offer(RuleIndex(offered), offered)

    def offer_again(self, rule_sets: Collection[str] | None = None) -> None:
        """Let parked claims try again to get jobs of these rule sets; None: of all."""
        if rule_sets is not None:
            self._offer(RuleIndex(rule_sets), {})
            return
        wanted = RuleIndex(self._store.known_rule_sets())
        self._readmit()
        self._offer(wanted, {})

    def _readmit(self) -> None:
        """Park claims again whose workers are no longer held, in their place by waiting time."""
        now, holds = self._now(), self._store.known_holds()
        with self._lock:
            self._offers += 1  # so that a claim which is just about to wait asks the store again
            free = [each for each in self._not_eligible.values() if not blocked(None, each.worker, holds, now)]
            for waiter in free:
                del self._not_eligible[id(waiter)]
                self._parked.setdefault(group_of(waiter.worker), {})[id(waiter)] = waiter
            for group in {group_of(waiter.worker) for waiter in free}:
                self._parked[group] = dict(sorted(self._parked[group].items(), key=lambda item: item[1].since))

    def follow_holds(self) -> None:
        """Let parked claims try again if the table of holds has changed, or a hold has ended."""
        version = self._store.end_holds(self._now()).version
        if version != self._holds_version:
            self.offer_again()
            self._holds_version = version

    def _offer(self, wanted: RuleIndex, offered: Mapping[str, set[str]]) -> None:
        """Claim jobs of the rule sets `wanted` for parked claims: fewest tags first, then longest parked.

        Each gets the first job in line that it may have. The result is as if each job in line order went to its best
        free worker. `offered`: of these rule sets, only these jobs are new; after them the rule set is finished.
        """
        with self._lock:
            self._offers += 1
            groups = list(self._parked.items())
            held_back = list(self._not_eligible.values())
        for waiter in held_back:  # a held worker may still get a job that an operator allowed
            if any(rules.allowed for _, rules in wanted.matching(waiter.worker.profile)):
                waiter.woken.set()
        near = [(group, waiters) for group, waiters in groups if wanted.matches(group[0])]
        with self._lock:
            line = [turn_of(group, waiters) for group, waiters in near if waiters]
        heapq.heapify(line)
        while line and len(wanted):
            group = heapq.heappop(line)[-1]
            if self._offer_to(group, wanted, offered):
                with self._lock:
                    if waiters := self._parked.get(group):
                        heapq.heappush(line, turn_of(group, waiters))

    def _offer_to(self, group: Group, wanted: RuleIndex, offered: Mapping[str, set[str]]) -> bool:
        """Claim for the first of the group that may get a wanted job; return whether to try this group again.

        If a claim finds no job, its rule sets have no job left, so they are removed from `wanted`.
        """
        with self._lock:
            parked = list(self._parked.get(group, {}).values())
        # All workers of a group may get the same jobs, except by rules of a policy.
        is_by_policy = wanted.has_by_policy(group[0])
        near = parked if is_by_policy else parked[:1]
        waiter = next((each for each in near if self._may_claim(each, wanted)), None)
        if waiter is None:
            return False
        if not self._take(waiter):
            return True
        try:
            job = self._claim_for(waiter)
        except (WorkerHeld, WorkerNameTaken):
            return True  # this worker gets no job now; try the next one
        except StoreUnavailable:
            raise
        except Exception:
            # The claim's own thread will get the same error. Go on with the other claims and jobs.
            log.exception(event("failed", worker=waiter.worker.name, reason="a bug of the scheduler; please report it"))
            return True
        if not job:
            was_in_vain = not waiter.over  # else the client is gone, or the worker has a newer claim
            for text in list(self._free_for(waiter.worker, wanted)) if was_in_vain else ():
                wanted.remove(text)
            return is_by_policy or not was_in_vain
        if left := offered.get(job.rule_set):
            left.discard(job.uuid)
            if not left:
                wanted.remove(job.rule_set)
        return True

    def _may_claim(self, waiter: ParkedClaim, wanted: RuleIndex) -> bool:
        """Whether there may be a job for this claim. Also True if its worker is held: the claim then leaves the group,
        where it would block the others."""
        if blocked(None, waiter.worker, self._store.known_holds(), self._now()):
            return True
        return next(self._free_for(waiter.worker, wanted), None) is not None

    def _free_for(self, worker: Worker, wanted: RuleIndex) -> Iterator[str]:
        """The rule sets whose jobs the worker may have now, by the holds that this scheduler knows."""
        now, holds = self._now(), (*self._store.known_holds(), *self.holds())
        matching = wanted.matching(worker.profile)
        suited = ((text, rules) for text, rules in matching if not rules.is_by_policy or rules.suits(worker))
        return (text for text, rules in suited if not blocked(rules, worker, holds, now))

    def _take(self, waiter: ParkedClaim) -> bool:
        """Mark the claim as taken by this thread; False when it is not parked any more."""
        with self._lock:
            if not self._is_parked(waiter):
                return False
            self._unpark(waiter)
            waiter.taken = True
            return True

    def _is_parked(self, waiter: ParkedClaim) -> bool:
        group = self._parked.get(group_of(waiter.worker), {})
        return id(waiter) in group or id(waiter) in self._not_eligible

    def _claim_for(self, waiter: ParkedClaim) -> Job | None:
        """Claim a job for a parked claim and wake it. Without a job, its own thread asks the store again.

        Raises the errors of the store's claim. WorkerHeld and WorkerNameTaken concern only this worker.
        """
        job = None  # a local variable: once awake, the claim's own thread may change waiter.job
        try:
            if waiter.is_gone():
                waiter.over = True
            else:
                job = waiter.job = self._claim(waiter)
        finally:
            with self._lock:
                waiter.taken = False
                waiter.woken.set()
        return job

    def end_gone(self) -> None:
        """End the claims of disconnected clients. Until then each occupies a thread and counts as an idle worker."""
        with self._lock:
            waiting = self._waiting()
        for waiter in waiting:
            with self._lock:  # while a claim is parked, its connection stays open
                if self._is_parked(waiter) and waiter.is_gone():
                    self._end(waiter)

    def _waiting(self) -> list[ParkedClaim]:
        groups = [*self._parked.values(), self._not_eligible]
        return [waiter for group in groups for waiter in group.values()]

    # -- holds that apply only at this scheduler

    def holds(self) -> Sequence[Hold]:
        return tuple(self._holds.values())

    def all_holds(self) -> Sequence[Hold]:
        """The local holds of this scheduler and, from their reports, of the others."""
        return (*self.holds(), *self._peer_reports.holds)

    def hold(self, hold: Hold) -> None:
        """Add a local hold."""
        with self._lock:
            self._holds = self._holds | {hold.target: hold}
            self.changes += 1

    def lift(self, target: str) -> None:
        """Remove a local hold, and let parked claims try again."""
        with self._lock:
            lifted = self._holds.get(target)
            self._holds = {name: hold for name, hold in self._holds.items() if name != target}
            self.changes += 1
        if lifted:
            self.offer_again()

    # -- known workers

    def workers(self) -> dict[str, WorkerSighting]:
        """Each named worker that claimed, here or at another scheduler."""
        with self._lock:
            here, elsewhere = self._seen.copy(), self._peer_reports.workers
        return elsewhere | {
            name: seen for name, seen in here.items() if name not in elsewhere or elsewhere[name].at <= seen.at
        }

    def forget_worker(self, name: str) -> None:
        """Forget a worker, unless its claim waits."""
        with self._lock:
            if (seen := self._seen.get(name)) and not seen.waits:
                del self._seen[name]
                self.changes += 1

    def nameless(self) -> list[Worker]:
        """The workers without a name whose claims wait now, here or at another scheduler."""
        with self._lock:
            return [*self._nameless_here(), *self._peer_reports.nameless]

    def _nameless_here(self) -> list[Worker]:
        return [waiter.worker for waiter in self._waiting() if not waiter.worker.name]

    def reports(self, since: float) -> dict[str, Any]:
        """This scheduler's report to the others, as JSON: workers that claimed since or wait now, and local holds.

        A newer version may add fields to any of these objects; `receive_reports` ignores unknown fields.
        """
        with self._lock:
            live = {name: seen for name, seen in self._seen.items() if seen.waits or seen.at >= since}
            nameless = self._nameless_here()
        return {
            "workers": [
                {"name": name, "at": each.at, "waits": each.waits, "since": each.since, **offer_json(each.worker)}
                for name, each in live.items()
            ],
            "nameless": [offer_json(worker) for worker in nameless],
            "holds": [dataclasses.asdict(hold) for hold in self.holds()],
        }

    def receive_reports(self, peer_reports: Iterable[Any]) -> None:
        """Use these reports of the other schedulers in place of all earlier ones."""
        workers: dict[str, WorkerSighting] = {}
        nameless: list[Worker] = []
        holds: list[Hold] = []
        unreadable: list[object] = []
        for each in peer_reports:
            match each:
                case {"workers": [*named], "nameless": [*waiting], "holds": [*their_holds]}:
                    entries = [*named, *waiting]
                    holds += [hold_of(hold) for hold in their_holds if is_hold(hold)]
                case _:
                    entries = [each]
            for entry in entries:
                if (seen := read_sighting(entry)) is None:
                    unreadable.append(entry)
                elif not (name := seen.worker.name):
                    nameless.append(seen.worker)
                elif name not in workers or workers[name].at < seen.at:
                    workers[name] = seen
        lately = sorted(workers.items(), key=lambda item: item[1].at)[-MAX_WORKERS:]
        elsewhere = PeerReports(dict(lately), nameless[:MAX_WORKERS], holds)
        with self._lock:
            self.changes += elsewhere != self._peer_reports
            self._peer_reports = elsewhere
        if unreadable and not self._unreadable:
            reason = "this scheduler cannot read a part of another scheduler's report, and ignores it"
            log.warning(event("unread", count=len(unreadable), first=cut(repr(unreadable[0]), 200), reason=reason))
        self._unreadable = bool(unreadable)

    def leave(self, name: str) -> None:
        """A worker has reported its end: forget it."""
        with self._lock:
            if waiter := self._latest.pop(name, None):
                self._end(waiter)  # a waiting claim would add the worker again
            self._seen.pop(name, None)
            self.changes += 1

    def forget(self, before: float) -> None:
        """Forget workers that have not claimed since `before`."""
        with self._lock:
            self._seen = {name: seen for name, seen in self._seen.items() if seen.at >= before or seen.waits}

    def stop(self) -> None:
        """Refuse new claims, and end the waiting ones."""
        with self._lock:
            self._stopping = True
            for waiter in {*self._waiting(), *self._latest.values()}:
                self._end(waiter)


def group_of(worker: Worker) -> Group:
    return worker.profile, worker.needs_token


def turn_of(group: Group, waiters: Mapping[int, ParkedClaim]) -> tuple[int, float, int, Group]:
    """Sort key for offers to a group: number of tags, then waiting time of its first claim."""
    first, waiter = next(iter(waiters.items()))
    return len(group[0].tags), waiter.since, first, group


def offer_json(worker: Worker) -> dict[str, Any]:
    """A worker's profile, for other schedulers."""
    return {"query": str(worker.profile), "needs_token": worker.needs_token, "host": worker.host}


def read_sighting(entry: object) -> WorkerSighting | None:
    """A worker in another scheduler's report; None if it cannot be read."""
    try:
        match entry:
            case {"name": str(name), "at": int() | float() as at, "query": str(query), "waits": bool(waits), **more}:
                since: Any = more.get("since") if isinstance(more.get("since"), int | float) else None
                return WorkerSighting(at, offered_worker(name, query, more), waits, since)
            case {"query": str(query), **more} if "name" not in more:
                return WorkerSighting(0.0, offered_worker("", query, more), True)
    except ValueError:
        pass
    return None


def offered_worker(name: str, query: str, more: Mapping[Any, Any]) -> Worker:
    host = more.get("host")
    return Worker(name, "", Profile.of(query), more.get("needs_token") is True, host if isinstance(host, str) else "")


class WorkerState(StrEnum):
    """The state of a worker; the API and the metrics use these words."""

    WORKING = "working"  # it has a job
    PAUSED = "paused"  # an operator holds it
    FAILING = "failing"  # it, or its host, is held for a time: its agents ended without acquiring their jobs
    UNFIT = "unfit"  # it reports that its host cannot run a job now
    IDLE = "idle"  # its claim waits
    AWAY = "away"  # none of these: between two claims
    OFFLINE = "offline"  # no sign of it for two minutes


#: The last report of a worker that will not come back.
GONE = "gone"
#: The states that a worker may report, each with the WorkerState that it means; None: its claims decide.
REPORTED_STATES: Mapping[str, WorkerState | None] = {
    "idle": None,
    "earlier_agent": WorkerState.WORKING,  # the agent of an earlier process of this worker still runs its job
    "no_agent": WorkerState.FAILING,  # it cannot start its agent
    "no_answer": None,  # its calls were not answered
    "unfit": WorkerState.UNFIT,  # its host cannot run a job now
    "stopped": None,  # it got a signal to stop, and ends
    GONE: None,  # it has ended by itself: forget it
    "paused": WorkerState.WORKING,  # its agent is paused at Buildkite, so it still runs after its job
}


class WaitReason(StrEnum):
    """Why a job waits. The API, the metrics, the commands and the build page use these words."""

    AHEAD = "ahead"  # a matching worker is free: the job is next, or only jobs ahead of it come first
    RESERVING = "reserving"  # Buildkite must confirm that it is reserved for us and free
    QUEUE_PAUSED = "queue_paused"  # by Buildkite, or by an operator
    RUNNABLE_AT = "runnable_at"  # Buildkite says that it may not run before a time
    PUT_ASIDE = "put_aside"  # its claims could not be answered, or its hold is unknown to this scheduler
    FROZEN = "frozen"  # a freeze window holds it
    UNDECIDED = "undecided"  # the policy was not asked yet
    HELD_BY_POLICY = "held_by_policy"
    POLICY_FAILED = "policy_failed"  # it raised, hung or answered nonsense
    PREFERS_ELSEWHERE = "prefers_elsewhere"  # the policy keeps it from some workers for a time
    RULES_NOT_UNDERSTOOD = "rules_not_understood"
    NO_WORKER = "no_worker"
    WORKERS_BUSY = "workers_busy"
    WORKERS_PAUSED = "workers_paused"  # operators hold all matching workers
    WORKERS_UNFIT = "workers_unfit"  # all matching workers report it
    WORKERS_FAILING = "workers_failing"
    WORKERS_OFFLINE = "workers_offline"  # all matching workers are offline
    NO_TOKENS = "no_tokens"  # free workers need a job acquisition token, and Buildkite gives none
    STOPPING = "stopping"  # an operator stopped it, and Buildkite does not know yet
    UPSTREAM_DOWN = "upstream_down"  # like `reserving`, but Buildkite cannot be reached


class WaitExplanation(NamedTuple):
    """Why a job waits: a code, and a text for people."""

    why: WaitReason
    text: str
    #: For a paused queue, the owner of the hold: "buildkite" or "operator".
    by: str | None = None

    @property
    def as_json(self) -> dict[str, Any]:
        """The fields in the API's answers."""
        return {"why": self.why, "why_text": self.text, "by": self.by}


class WaitingRuleSet(NamedTuple):
    """The waiting jobs of one rule set: their number, when the oldest was scheduled, and why they wait."""

    rule_set: str
    jobs: int
    oldest: float
    reason: WaitExplanation
    #: The oldest job.
    uuid: str


#: For at most so many rule sets without a ready job we read the oldest job, to see its hold; each costs a read.
HELD_LOOKS = 100
#: The state of a worker with a machine-set hold, by the hold's reason.
OWN_HOLDS: Mapping[str, WorkerState] = {
    WaitReason.WORKERS_FAILING: WorkerState.FAILING,
    WaitReason.WORKERS_UNFIT: WorkerState.UNFIT,
}
#: A worker without a sign for this long does not count as live, unless it has a job or its claim waits.
LIVE_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class FleetMember:
    """A named worker with its current state."""

    worker: Worker
    row: WorkerRow
    doing: WorkerState
    #: The uuid of its job.
    job: str | None
    last_seen_at: float | None
    is_live: bool
    #: The hold that keeps it from all jobs.
    hold: Hold | None
    #: Since when it is in this state, why (if known), and who set it.
    since: float | None
    reason: str
    by: str

    @property
    def counted_as(self) -> WorkerState:
        """Its state for the question who could run a job: a worker that is not live counts as offline."""
        return self.doing if self.is_live else WorkerState.OFFLINE


class Fleet:
    """All workers at one moment, and why jobs wait. `stats`: `Store.stats` of the same moment."""

    def __init__(self, store: Store, dispatcher: Dispatcher, now: float):
        self.stats, self._store, self.now = store.stats(), store, now
        self._holds: Sequence[Hold] = (*self.stats["holds"], *dispatcher.all_holds())
        self._listening_since = dispatcher.began_at
        self._upstream_problems = {queue_key: ask() for queue_key, ask in dispatcher.upstream_problems.items()}
        self.in_force = [hold for hold in self._holds if not is_over(hold, now)]
        rows = {row.name: row for row in store.workers()}
        # A worker without a row was forgotten, unless it has claimed just now.
        seen = {n: s for n, s in dispatcher.workers().items() if n in rows or s.waits or now - s.at <= LIVE_SECONDS}
        held = {job.worker: job for job in self.stats["at_work"] if job.worker}
        names = sorted({*rows, *seen})
        self.members = [self._member(rows.get(name, WorkerRow(name)), seen.get(name), held.get(name)) for name in names]
        self.nameless = dispatcher.nameless()
        self.workers = [*(member.worker for member in self.members), *self.nameless]
        self.doing = collections.Counter(member.doing for member in self.members)
        self._counted_as = collections.Counter((group_of(m.worker), m.counted_as) for m in self.members)
        # For each group and state, the worker that was seen last.
        lately = sorted(self.members, key=lambda member: member.last_seen_at or 0.0)
        self._examples = {(group_of(member.worker), member.counted_as): member for member in lately}
        # For each group with workers held by operators, one of the holds.
        self._pauses = {group_of(m.worker): m.hold for m in self.members if m.hold and m.doing is WorkerState.PAUSED}
        for worker in self.nameless:
            hold, group = blocked(None, worker, self._holds, now), group_of(worker)
            doing = WorkerState.PAUSED if hold else WorkerState.IDLE
            self.doing[doing] += 1
            self._counted_as[group, doing] += 1
            if hold:
                self._pauses.setdefault(group, hold)

    def _member(self, row: WorkerRow, seen: WorkerSighting | None, job: JobAtWorker | None) -> FleetMember:
        if seen is None:
            # It has not claimed since the scheduler started, or not lately: use its stored queues and tags.
            queue_keys = [*filter(None, row.queues.split(",")), *([job.queue_key] if job else [])]
            seen = WorkerSighting(
                row.last_claim_at or 0.0, Worker(row.name, "", Profile.from_row(queue_keys, row.tags)), waits=False
            )
        worker = seen.worker
        if (worker.host, worker.machine) != (row.host, row.machine):
            worker = dataclasses.replace(worker, host=row.host, machine=row.machine)
        # A report before its last claim is out of date.
        is_latest = (row.told_at or 0.0) >= seen.at
        reported = reported_state(row, self.now) if is_latest else ""
        touched_at = (job.touched_at if job else None) or 0.0
        last_seen_at = max(seen.at, row.told_at or 0.0, row.worked_at or 0.0, touched_at) or None
        is_silent = not seen.waits and self.now - max(last_seen_at or 0.0, self._listening_since) >= OFFLINE_SECONDS
        # A worker that never touches its job is not our worker.py (but another client), so silence proves nothing.
        is_offline = is_silent and not (job and job.touched_at is None)
        hold = blocked(None, worker, self._holds, self.now)
        own, people = blocked(None, row, (), self.now), hold if hold and hold.owner != "machine" else None
        since, reason, by = row.told_since if reported else None, row.told_reason if reported else "", ""
        if is_offline and not people:
            doing, since, reason = WorkerState.OFFLINE, last_seen_at, row.told_reason if is_latest else ""
        elif job:
            doing, since = WorkerState.WORKING, job.claimed_at
        elif people:
            doing, since, reason = WorkerState.PAUSED, people.since, people.note or people.reason
            by = people.by or people.owner
        elif hold:
            doing, since, reason, by = WorkerState.FAILING, hold.since, f"host {hold}", hold.owner
        elif own:
            doing, since = OWN_HOLDS.get(own.reason, WorkerState.FAILING), own.since
            reason = own.note or reason or failing_text(row)
        elif as_told := REPORTED_STATES.get(reported):
            doing = as_told
        elif seen.waits:
            doing, since = WorkerState.IDLE, seen.since
        else:
            doing, since = WorkerState.AWAY, since or last_seen_at
        is_near = seen.waits or self.now - (last_seen_at or -math.inf) <= LIVE_SECONDS
        return FleetMember(
            worker=worker,
            row=row,
            doing=doing,
            job=job.uuid if job else None,
            last_seen_at=last_seen_at,
            is_live=is_near or (bool(job or REPORTED_STATES.get(reported)) and doing is not WorkerState.OFFLINE),
            hold=hold,
            since=since,
            reason=reason,
            by=by,
        )

    def holds_of(self, member: FleetMember) -> list[Hold]:
        """The holds that keep jobs from this worker now."""
        failing = blocked(None, member.row, (), self.now)
        bound = [hold for hold in self.in_force if binds(hold, None, member.worker)]
        return [failing, *bound] if failing else bound

    def holds_of_queue(self, queue_key: str) -> list[Hold]:
        """The holds that hold all jobs of this queue now."""
        return [hold for hold in self.in_force if binds(hold, RuleSet.of(queue_key, ()), None)]

    def waiting(self, since: float = math.inf) -> list[WaitingRuleSet]:
        """Waiting jobs by rule set, longest wait first; only those whose oldest was scheduled at `since` or earlier."""
        waiting: dict[str, list[RuleSetCount]] = {}
        for level in self.stats["levels"]:
            if level.state in (JobState.RESERVING, JobState.READY):
                waiting.setdefault(level.rule_set, []).append(level)
        looks = itertools.count()
        rows = []
        for rule_set, levels in waiting.items():
            oldest = min(levels, key=lambda level: level.oldest)
            if oldest.oldest > since:
                continue
            is_ready = any(level.state is JobState.READY and not level.is_held for level in levels)
            job = None if is_ready or next(looks) >= HELD_LOOKS else self._store.get(oldest.uuid)
            reason = self.why_of(job) if job else self.why(RuleSet.read(rule_set), is_ready)
            rows.append(
                WaitingRuleSet(rule_set, sum(level.jobs for level in levels), oldest.oldest, reason, oldest.uuid)
            )
        return sorted(rows, key=lambda row: (row.oldest, row.rule_set))

    def long_reserving(self, since: float) -> list[Job]:
        """For each rule set, the oldest job in state `reserving`, if it was scheduled at `since` or earlier."""
        levels = [level for level in self.stats["levels"] if level.state is JobState.RESERVING]
        oldest = sorted((level for level in levels if level.oldest <= since), key=lambda level: level.oldest)
        return [job for level in oldest[:HELD_LOOKS] if (job := self._store.get(level.uuid))]

    def why_of(self, job: Job) -> WaitExplanation:
        """Why this job waits."""
        if job.stop:
            return WaitExplanation(WaitReason.STOPPING, stop_detail(job.stop))
        if job.held_by and (job.state is JobState.READY or job.not_before > self.now):
            until, reason = rfc3339(job.held_until), job.reason
            match job.held_reason:
                case "runnable_at":
                    return WaitExplanation(WaitReason.RUNNABLE_AT, f"Buildkite says that it may not run before {until}")
                case "put_aside":
                    text = f"put aside until {until}, because its last claims ended with: {reason}"
                    return WaitExplanation(WaitReason.PUT_ASIDE, text)
                case "no_tokens":
                    return WaitExplanation(WaitReason.NO_TOKENS, f"not handed out before {until}: {reason}")
                case "frozen":
                    return WaitExplanation(WaitReason.FROZEN, f"freeze window {job.held_note!r} holds it until {until}")
                case WaitReason.UNDECIDED | WaitReason.HELD_BY_POLICY | WaitReason.POLICY_FAILED as why:
                    # The policy is not asked about jobs of a paused queue.
                    paused = self._why_paused(RuleSet.read(job.rule_set)) if why == WaitReason.UNDECIDED else None
                    return paused or WaitExplanation(WaitReason(why), why_by_policy(job))
                case _:
                    return WaitExplanation(
                        WaitReason.PUT_ASIDE, f"job {job.uuid} is held by {job.held_by}: {job.held_reason}"
                    )
        return self.why(RuleSet.read(job.rule_set), job.state is JobState.READY)

    def why(self, rules: RuleSet, is_ready: bool) -> WaitExplanation:
        """Why jobs with these rules wait. `is_ready`: one of them could be handed out."""
        if paused := self._why_paused(rules):
            return paused
        if rules.unread:
            text = f"{describe_rules(rules.unread)} not understood, so no worker matches"
            return WaitExplanation(WaitReason.RULES_NOT_UNDERSTOOD, text)
        matching, withheld = self._matching(rules)
        is_free = matching[WorkerState.IDLE] + matching[WorkerState.AWAY] > withheld
        if rules.avoided and not is_free and self._is_avoided(rules, matching):
            avoided = ", ".join(sorted(rules.avoided))
            text = f"for a time, the policy keeps it from workers with {avoided}"
            return WaitExplanation(WaitReason.PREFERS_ELSEWHERE, text)
        if not matching:
            return WaitExplanation(WaitReason.NO_WORKER, self._missing(rules))
        if matching.total() == matching[WorkerState.OFFLINE]:
            return WaitExplanation(WaitReason.WORKERS_OFFLINE, self._offline_text(rules, matching[WorkerState.OFFLINE]))
        if is_ready:
            return self._why_ready(rules, matching, withheld)
        if problem := self._upstream_problems.get(rules.queue_key):
            text = f"Buildkite cannot be asked whether the job may be handed out: {problem}"
            return WaitExplanation(WaitReason.UPSTREAM_DOWN, text)
        return WaitExplanation(WaitReason.RESERVING, "Buildkite must confirm that the job may be handed out")

    def _why_paused(self, rules: RuleSet) -> WaitExplanation | None:
        """Why a hold keeps jobs with these rules from all workers; None if there is no such hold."""
        hold = blocked(rules, None, self._holds, self.now)
        if hold is None:
            return None
        text = f"{hold.target} is held by {hold.owner}: {hold.reason}"
        if hold.reason == WaitReason.QUEUE_PAUSED:
            text = f"queue {rules.queue_key} is paused"
        elif hold.owner == OPERATOR and hold.target.startswith("queue:"):
            text = f"queue {rules.queue_key} is {hold}"
        return WaitExplanation(WaitReason.QUEUE_PAUSED, text, hold.owner)

    def _why_ready(self, rules: RuleSet, matching: Mapping[WorkerState, int], withheld: int) -> WaitExplanation:
        if free := matching[WorkerState.IDLE] + matching[WorkerState.AWAY] - withheld:
            text = f"next in line: {free} matching {'worker is' if free == 1 else 'workers are'} free"
            return WaitExplanation(WaitReason.AHEAD, text)
        if withheld:
            text = "Buildkite gives no job acquisition tokens, which all matching workers that are free need"
            return WaitExplanation(WaitReason.NO_TOKENS, f"{text}: {withheld}; see /health")
        if matching[WorkerState.WORKING]:
            others = (
                f"; {matching[each]} more {each}"
                for each in (WorkerState.FAILING, WorkerState.PAUSED)
                if matching[each]
            )
            text = f"all matching workers are busy: {matching[WorkerState.WORKING]}{''.join(others)}"
            return WaitExplanation(WaitReason.WORKERS_BUSY, text)
        if matching[WorkerState.PAUSED]:
            hold = next(hold for (profile, _), hold in self._pauses.items() if profile.matches(rules))
            failing = f"; {matching[WorkerState.FAILING]} more failing" if matching[WorkerState.FAILING] else ""
            text = f"all matching workers are paused: {matching[WorkerState.PAUSED]}, so {hold.target} {hold}{failing}"
            return WaitExplanation(WaitReason.WORKERS_PAUSED, text)
        if matching[WorkerState.UNFIT]:
            failing = f"; {matching[WorkerState.FAILING]} more failing" if matching[WorkerState.FAILING] else ""
            example = self._example(rules, WorkerState.UNFIT)
            text = f"all matching workers are unfit: {matching[WorkerState.UNFIT]}; {example}{failing}"
            return WaitExplanation(WaitReason.WORKERS_UNFIT, text)
        example = self._example(rules, WorkerState.FAILING)
        text = f"all matching workers are failing: {matching[WorkerState.FAILING]}; {example}"
        return WaitExplanation(WaitReason.WORKERS_FAILING, text)

    def _members_like(self, rules: RuleSet, doing: WorkerState) -> Iterator[FleetMember]:
        """One member in this state from each group that matches."""
        for (group, crew), member in self._examples.items():
            if crew is doing and group[0].matches(rules):
                yield member

    def _example(self, rules: RuleSet, doing: WorkerState) -> str:
        """One matching worker in this state, its host, and why: "w1 on build1: /builds has 3 MiB free"."""
        member = next(self._members_like(rules, doing))
        where = f" on {member.worker.host}" if member.worker.host else ""
        return f"{member.worker.name}{where}: {member.reason or 'it reported no reason'}"

    def _offline_text(self, rules: RuleSet, count: int) -> str:
        """ "2 workers match, both offline since 2026-11-21T14:02:00Z: w1 on build1: the worker was stopped"."""
        members = list(self._members_like(rules, WorkerState.OFFLINE))
        last = max(members, key=lambda member: member.last_seen_at or 0.0)
        since = f" since {rfc3339_seconds(last.last_seen_at)}" if last.last_seen_at else ""
        how = f"{count} workers match, {'both' if count == 2 else 'all'}" if count > 1 else "1 worker matches, it is"
        words = f": {last.reason}" if last.reason else ""
        where = f" on {last.worker.host}" if last.worker.host else ""
        return f"{how} offline{since}; the last was {last.worker.name}{where}{words}"

    def idle_seconds(self, member: FleetMember) -> float:
        """Seconds since the worker's last job or, without any, since it started; 0 while it has a job."""
        if member.job:
            return 0.0
        row = member.row
        since = [row.came_at, row.last_claim_at, row.worked_at, row.ran_at]
        return max(0.0, round(self.now - max(filter(None, since), default=self.now), 1))

    def idle_hosts(self) -> dict[str, float]:
        """By host: seconds since a worker had a job; 0 while one has. Hosts with only offline workers are left
        out: an autoscaler need not remove them.
        """
        idle: dict[str, float] = {}
        for member in self.members:
            if (host := member.worker.host) and member.doing is not WorkerState.OFFLINE:
                idle[host] = min(self.idle_seconds(member), idle.get(host, math.inf))
        return dict(sorted(idle.items()))

    def unmatched(self) -> list[RuleSetCount]:
        """The waiting jobs, by rule set, that no live worker matches."""
        found = []
        for level in self.stats["levels"]:
            if level.waits:
                matching, _ = self._matching(RuleSet.read(level.rule_set))
                if matching.total() == matching[WorkerState.OFFLINE]:
                    found.append(level)
        return found

    @functools.cached_property
    def _having(self) -> dict[str, list[tuple[Group, WorkerState, int]]]:
        """Index of worker groups by tag, key and queue, so that not all are compared with each rule set."""
        having: dict[str, list[tuple[Group, WorkerState, int]]] = {}
        for (group, doing), count in self._counted_as.items():
            for each in group[0].has:
                having.setdefault(each, []).append((group, doing, count))
        return having

    def _matching(self, rules: RuleSet) -> tuple[collections.Counter[WorkerState], int]:
        """The number of matching workers by state, and how many of the free ones may not get these jobs by a hold."""
        matching: collections.Counter[WorkerState] = collections.Counter()
        withheld = 0
        if rules.is_by_policy:  # a policy may treat workers with equal profiles differently
            return self._matching_by_policy(rules)
        for (profile, needs_token), doing, count in min((self._having.get(each, []) for each in rules.needs), key=len):
            if profile.matches(rules):
                matching[doing] += count
                is_free = doing in (WorkerState.IDLE, WorkerState.AWAY)
                if is_free and blocked(rules, Worker("", "", profile, needs_token), self._holds, self.now):
                    withheld += count
        return matching, withheld

    def _is_avoided(self, rules: RuleSet, matching: collections.Counter[WorkerState]) -> bool:
        """Whether a live worker would match without the policy's `avoided` rules."""
        all_matching, _ = self._matching(dataclasses.replace(rules, avoided=frozenset()))
        return (all_matching - matching).total() > (all_matching - matching)[WorkerState.OFFLINE]

    def _matching_by_policy(self, rules: RuleSet) -> tuple[collections.Counter[WorkerState], int]:
        known = [(member.worker, member.counted_as) for member in self.members]
        nameless = [
            (worker, WorkerState.IDLE) for worker in self.nameless if not blocked(None, worker, self._holds, self.now)
        ]
        found = [each for each in known + nameless if each[0].profile.matches(rules) and rules.suits(each[0])]
        free = [worker for worker, doing in found if doing in (WorkerState.IDLE, WorkerState.AWAY)]
        withheld = sum(1 for worker in free if blocked(rules, worker, self._holds, self.now))
        return collections.Counter(doing for _, doing in found), withheld

    def _missing(self, rules: RuleSet) -> str:
        """Why no live worker matches: none serves the queue, none has some tag, or none has all of them."""
        if f"queue={rules.queue_key}" not in self._having:
            return f"no live worker serves queue {rules.queue_key}"
        missing = [tag for tag in sorted(rules.tags) if not self._is_had(tag, rules.queue_key)]
        missing += [f"{key}=*" for key in sorted(rules.keys) if not self._is_had(key, rules.queue_key)]
        if missing:
            return f"no live worker of queue {rules.queue_key} has {', '.join(missing)}"
        return f"no live worker has all of {rules}"

    def _is_had(self, need: str, queue_key: str) -> bool:
        return any(queue_key in profile.queue_keys for (profile, _), _, _ in self._having.get(need, ()))


def why_by_policy(job: Job) -> str:
    """Why the policy holds a job, as text."""
    until, reason = rfc3339(job.held_until), (job.decision or {}).get("reason", "")
    if job.held_reason == HELD_BY_POLICY:
        return f"the policy holds it until {until}: {reason}"
    if job.held_reason == POLICY_FAILED:
        return f"the policy failed for this job, and is asked again after {until}: {reason}"
    return "the policy has not decided about this job yet; if the policy has a problem, /health shows it"


def failing_text(row: WorkerRow) -> str:
    """Why a worker gets no job for a time, as text."""
    times = f"{row.failures} of its agents in a row" if row.failures > 1 else "its last agent"
    return f"{times} ended without acquiring a job; it gets none before {rfc3339(row.held_until)}"


STOPPING: Mapping[str, Any] = {"status": 503, "code": "stopping", "headers": {"Retry-After": "1"}}


# --- Intake ---

#: Seconds between two checks of a job's state, and how many waiting jobs are checked in that time. The rest follow in
#: later sweeps: checking 100,000 jobs each time would slow claims, and few of them would have changed.
SWEEP_SECONDS, SWEEP_WAITING = 4.0, 10_000
#: Backoff after a call that failed: doubled each time, with jitter.
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 60.0
#: Longest Retry-After that we obey, in case Buildkite sends a wrong one.
MAX_ASKED_SECONDS = 3600.0
#: A job is dropped when so many answers in a row did not contain it, or when its state was unknown for so long.
MISSING_ANSWERS, UNKNOWN_SECONDS = 3, 3600.0
#: For how long after its last sign we report another scheduler with our stack's key: signs may be rare.
RIVAL_SECONDS = 3600.0
#: After the first, ask Buildkite again to cancel a job. After the second, check all running jobs, because the message
#: that an operator stopped one may get lost between two schedulers.
CANCEL_AGAIN_SECONDS, LOST_STOP_SECONDS = 15.0, 60.0
#: If Buildkite does not know our stack, we register it again, at most this often.
REGISTER_SECONDS = 60.0
KEEP_DONE_SECONDS = 24 * 3600.0
#: Time between two ticks of upkeep. If a tick comes later by FROZEN_SECONDS, this process could not receive touches.
UPKEEP_SECONDS, FROZEN_SECONDS = 1.0, 2.0
#: Seconds between two checks whether the clients of waiting claims are still connected. 6,000 take 20 ms.
GONE_SECONDS = 2.0
#: A task's step that takes longer than this counts as stuck. A call ends within CALL_SECONDS, except a DNS look-up,
#: which may take 30 s by resolv.conf.
STUCK_SECONDS = 60.0
#: Without a reservation, an answer that a job is free is valid for this long.
PROOF_SECONDS = 5.0
#: A claim waits this long for its job acquisition token. The call ends earlier, so that its error is known.
TOKEN_SECONDS, TOKEN_CALL_SECONDS = 5.0, 4.5
#: A token's lifetime is ACQUIRE_SECONDS plus this, up to Buildkite's limit.
TOKEN_GRACE_SECONDS, MAX_TOKEN_SECONDS = 60, 3600
#: Without any job, we ask for a token for this uuid, to see whether Buildkite issues tokens.
NO_JOB = "00000000-0000-4000-8000-000000000000"
#: Number of jobs put aside that /health remembers.
MANY_ASIDE = 1000
#: Pages listed per tick. New jobs come first on the first page.
LOOK_PAGES = 5
#: Shortest time between two lists, also when a webhook announces jobs. POLL_INTERVAL cannot be shorter.
HINT_SECONDS = 0.2
#: After a list with new jobs, the next BUSY_LISTS lists come BUSY_TIMES as often as POLL_INTERVAL says.
BUSY_LISTS, BUSY_TIMES = 20, 4
#: A task tries a failed store again after this. It is short, because everything waits for the store.
STORE_AGAIN_SECONDS = 1.0
#: A task tries again after this when its stack is not registered yet, or its term has just ended.
UNTRIED_SECONDS = 1.0
#: While another scheduler leads, the leader's tasks check again after this. A new term wakes them at once.
FOLLOWING_SECONDS = 60.0


def backoff_seconds(failures: int, asked: float | None) -> float:
    """Seconds to wait after so many failures in a row: `asked` by Buildkite, else growing, with jitter."""
    if asked:  # 0 names no delay
        return min(asked, MAX_ASKED_SECONDS)
    most = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10), MAX_BACKOFF_SECONDS)
    return most * random.uniform(0.5, 1.0)


class PeriodicTask:
    """Work that is repeated on its own thread.

    `tick(now)` does the work that is due and returns the seconds until the next tick; `wake` starts the next tick at
    once. If it returns None, nothing was attempted, and the failure count is kept.
    After a BuildkiteError the task backs off (growing, with jitter, or as Buildkite asks). An error with a status in
    `grave` is logged as error, because a person must act.
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
        self._no_backoff = threading.Event()  # also ends a backoff: `restart` or `stop` was called
        self._is_stopping = False
        self.failures = 0
        #: The last failure as text, "" while all is well.
        self.problem = ""
        #: When (monotonic) the current step began; None while the task waits for its next tick.
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def restart(self) -> None:
        """Forget failures and tick now, even during a backoff: the leader has changed."""
        self._no_backoff.set()
        self._wake.set()

    def stop(self) -> None:
        self._is_stopping = True
        self.restart()

    def step(self) -> None:
        """Called by the tick when it begins a new step, for example each call to Buildkite."""
        self._busy_since = time.monotonic()

    def stuck(self, now: float) -> bool:
        """Whether the thread has died, or its current step takes too long. `now`: monotonic seconds."""
        if self._is_stopping or self._thread.ident is None:
            return False  # stopped on purpose, or about to start
        busy_since = self._busy_since
        return not self._thread.is_alive() or (busy_since is not None and now - busy_since > STUCK_SECONDS)

    def join(self, seconds: float) -> bool:
        """Wait for the last tick to end; return whether it has ended (also True if never started)."""
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
            # `wake` does not end a backoff.
            (self._no_backoff if self.failures else self._wake).wait(seconds)

    def run_once(self) -> float:
        """One tick; returns the seconds until the next. It raises nothing: errors of the tick are handled here."""
        try:
            seconds = self._tick(self._now())
        except BuildkiteError as error:
            level = logging.ERROR if error.status in self._grave else logging.WARNING
            return self._failed(str(error), error.retry_after, level)
        except StoreUnavailable as error:
            return self._failed(str(error), STORE_AGAIN_SECONDS, logging.ERROR)
        except Fenced as error:
            log.warning(event("fenced", task=self.name, reason=str(error)))
            return UNTRIED_SECONDS
        except Exception:
            log.exception(event("failed", task=self.name, reason="a bug of the scheduler; please report it"))
            return self._failed("a bug of the scheduler; see the log", None, logging.ERROR)
        if seconds is None:
            return UNTRIED_SECONDS
        failures, self.failures, self.problem = self.failures, 0, ""
        if failures:
            log.warning(event("recovered", task=self.name, failures=failures))
        return seconds

    def _failed(self, problem: str, asked: float | None, level: int) -> float:
        self.failures += 1
        seconds = backoff_seconds(self.failures, asked)
        before, self.problem = self.problem, problem  # first, so that /health knows what the log says
        if problem != before or self.failures % 10 == 0:
            pause = f"{seconds:.1f}"
            log.log(level, event("failed", task=self.name, reason=problem, times=self.failures, retry_in_s=pause))
        return seconds


#: If so many single uuids were refused, and none was accepted yet, the uuids are not the cause.
MAX_REFUSED = 20


def call_in_halves(batch: Sequence[str], call: Callable[[Sequence[str]], None]) -> dict[str, str]:
    """Call for the batch. If Buildkite refuses it (400, 422), call for its halves, down to single uuids.

    Returns the refused uuids, each with Buildkite's message. Raises BuildkiteError if it refuses all uuids, or the
    first MAX_REFUSED: then the uuids are not the cause.
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
                # Shuffle, because bad uuids may be neighbours.
                mixed = random.sample(part, len(part))
                parts += [mixed[: len(part) // 2], mixed[len(part) // 2 :]]
            else:
                refused[part[0]] = str(error)
            if not is_some_taken and len(refused) == min(len(batch), MAX_REFUSED) > 1:
                raise
    return refused


class WaitingClaims(Generic[R]):
    """Claims that wait for one call to Buildkite, made by a task for the jobs of all of them. R: what each gets."""

    def __init__(self) -> None:
        #: Why Buildkite cannot be asked: then no claim waits. Written by the task.
        self.problem = ""
        self._lock = threading.Lock()  # guards the claims, each with its job's uuid
        self._asks: dict[Future[R], str] = {}

    def __len__(self) -> int:
        return len(self._asks)

    def ask(self, uuid: str, task: PeriodicTask) -> R:
        """Wait for the result. Raises BuildkiteError after a problem, or without a result within TOKEN_SECONDS."""
        answer = Future[R]()
        with self._lock:
            if self.problem:
                raise BuildkiteError(self.problem)
            self._asks[answer] = uuid
        task.wake()
        try:
            return answer.result(TOKEN_SECONDS)
        except TimeoutError:
            raise BuildkiteError(f"no answer within {TOKEN_SECONDS:g} s") from None
        finally:
            with self._lock:
                self._asks.pop(answer, None)

    def first(self, most: int) -> dict[Future[R], str]:
        """The claims to ask Buildkite about next."""
        with self._lock:
            return dict(itertools.islice(self._asks.items(), most))

    def answer(self, asks: Mapping[Future[R], str], result: Callable[[str], R]) -> None:
        """Give each of these claims (perhaps none) the result for its job, and forget the problem."""
        with self._lock:
            self.problem = ""
            for answer in asks:
                self._asks.pop(answer, None)
        for answer, uuid in asks.items():
            answer.set_result(result(uuid))

    def fail(self, problem: str) -> None:
        """Answer all waiting claims with the problem, because the next call comes only after a backoff."""
        with self._lock:
            asks, self._asks, self.problem = self._asks, {}, problem
        for answer in asks:
            answer.set_exception(BuildkiteError(problem))


class JobTokens:
    """Gets the job acquisition tokens of one queue, with one call for all claims that wait for tokens.

    While Buildkite issues none, a hold keeps jobs from workers that need a token, and we ask with backoff until
    Buildkite answers. A token goes to the claim that asked, and is not stored: a claim that is delivered again gets a
    new one.
    """

    def __init__(
        self,
        source: Source,
        lifetime_seconds: int,
        now: Callable[[], float],
        unfinished: Callable[[], Sequence[str]],
        dispatcher: Dispatcher,
    ):
        self._source, self._lifetime_seconds = source, lifetime_seconds
        self._unfinished, self._dispatcher = unfinished, dispatcher
        self._hold = Hold(f"tokens:{source.queue_key}", "machine", WaitReason.NO_TOKENS)
        self.task = PeriodicTask(f"{source.queue_key} tokens", self.issue, now, grave={401, 403, 404})
        #: Each gets the token; or None and Buildkite's message why it issues none.
        self.claims = WaitingClaims[tuple[str | None, str]]()
        if not source.has_tokens:  # permanently: workers that need a token never get a job of this queue
            self.claims.problem = f"Buildkite has no job tokens for queue {source.queue_key}"
            dispatcher.hold(self._hold)

    def ask(self, uuid: str) -> tuple[str | None, str]:
        """A token for a job that was just claimed; or None and Buildkite's message, if it issues none for this job.

        Raises BuildkiteError when Buildkite cannot be asked, or does not answer within TOKEN_SECONDS.
        """
        return self.claims.ask(uuid, self.task)

    def issue(self, now: float) -> float:
        """Ask Buildkite for the tokens that claims wait for; after a failure, for a test token that nobody uses."""
        asks, failed = self.claims.first(BATCH), self.claims.problem
        if not asks and not failed:
            return MAX_BACKOFF_SECONDS
        # A test uses another job each time, because Buildkite may always refuse a certain one.
        uuids = list({*asks.values()}) or random.choices(self._unfinished() or [NO_JOB])
        lifetime, ends_at = self._lifetime_seconds if asks else 1, time.monotonic() + TOKEN_CALL_SECONDS
        tokens: dict[str, str] = {}
        words: dict[str, str] = {}

        def ask(part: Sequence[str]) -> None:
            issued, not_issued = self._source.job_tokens(part, lifetime, ends_at)
            tokens.update(issued)
            words.update(not_issued)

        try:
            words |= call_in_halves(uuids, ask)
        except BuildkiteError as error:
            self._dispatcher.hold(self._hold)
            self.claims.fail(str(error))
            raise
        self.claims.answer(asks, lambda uuid: (tokens.get(uuid), words.get(uuid, "")))
        if failed:
            self._dispatcher.lift(self._hold.target)
        return 0.0 if self.claims else MAX_BACKOFF_SECONDS


class Proofs:
    """Asks Buildkite, just before a claim is answered, whether its job is still free: one call for all waiting claims.

    For a source without reservations, where another agent may take a job at any time.
    """

    def __init__(self, source: Source, now: Callable[[], float]):
        self._source, self._claims = source, WaitingClaims[bool]()
        self.task = PeriodicTask(f"{source.queue_key} proofs", self.prove, now)

    def is_free(self, uuid: str) -> bool:
        """Whether no agent has the job. Raises BuildkiteError without an answer within TOKEN_SECONDS."""
        return self._claims.ask(uuid, self.task)

    def prove(self, now: float) -> float:
        """Ask about the jobs of the waiting claims. After a failure and its backoff, claims may ask again."""
        asks, free = self._claims.first(self._source.batch), set[str]()
        if asks:
            try:
                free, _ = self._source.reserve([*{*asks.values()}], 0)
            except BuildkiteError as error:
                self._claims.fail(str(error))
                raise
        self._claims.answer(asks, lambda uuid: uuid in free)
        return 0.0 if self._claims else MAX_BACKOFF_SECONDS


class Leadership:
    """Whether this scheduler leads: only then the tasks marked L in the map work. They ask at each tick.

    With SQLite it always leads. With Redis `Peers` begins and ends its terms, and `tell` sends to the leader.
    """

    def __init__(self, store: Store, shared: RedisRows | None = None):
        """`shared`: how several schedulers reach each other. Without it, this one leads from now on."""
        #: For reads, and for writes that workers ask for: it works whoever leads.
        self.always = store
        self._store, self._shared = None if shared else store, shared
        #: When Buildkite had last answered any leader, at the begin of this term.
        self.answered_before = 0.0
        #: The tasks to restart whenever a term begins or ends.
        self.tasks: list[PeriodicTask] = []

    def store(self) -> Store | None:
        """The store for the leader's writes, a new object in each term; None while another scheduler leads.

        A task calls this once, at the start of its tick, and uses that object until the tick ends. A write after the
        end of the term is therefore refused: it raises Fenced.
        """
        return self._store

    def begin(self, store: Store, answered_before: float) -> None:
        self.answered_before = answered_before
        self._change(store)

    def end(self) -> None:
        self._change(None)

    def _change(self, store: Store | None) -> None:
        self._store = store
        for task in self.tasks:
            task.restart()

    def tell(self, **news: object) -> None:
        """Send a message to the leader. It may get lost."""
        if self._shared:
            with suppress(StoreUnavailable):
                self._shared.tell(**news)


#: Who may call a route, by the token in the request: see `Handler._parties`.
ANYONE, WORKER, OPERATORS = ("anyone",), ("worker",), ("operator",)
READER, VIEWER = (*WORKER, *OPERATORS), (*WORKER, *OPERATORS, "viewer")


class Route(NamedTuple):
    """An HTTP route and the method of its part that serves it."""

    method: str
    #: `/word`, `/word/{name}` or `/word/{name}/word`; the text at {name} becomes the request's `named`.
    path: str
    serve: Callable[[Any, Request], Answer]
    who: Collection[str]
    #: Whether a GET route also answers HEAD.
    has_head: bool = True


class Part:
    """A part of the scheduler, with its threads, routes, metrics and problems.

    To add a part, write a subclass and name it in `Scheduler._other_parts`. Override only what the part has.
    """

    routes: ClassVar[Sequence[Route]] = ()
    #: Its tasks, each with its own thread; they do not change during the life of the process.
    tasks: Sequence[PeriodicTask] = ()

    @property
    def problems(self) -> Sequence[str]:
        """Its current problems as text, for `/health` and `/fleet`."""
        return [task.problem for task in self.tasks if task.problem]

    def metrics(self, now: float) -> Iterable[Metric]:
        """Its metrics for `/metrics`, computed for each request. Names are unique among all parts."""
        return ()


class Term:
    """The state that the tasks of one queue keep during one term of this scheduler, and the term's store.

    Each term has its own object, so nothing is left from an earlier term. A tick that outlives its term goes on with
    the old object, which nothing else uses any more.
    """

    def __init__(self, store: Store, answered_at: float):
        self.store = store
        # Shared by the tasks and the API; guarded by the intake's lock.
        self.unreserved: set[str] = set()  # Buildkite did not reserve these jobs; their state decides
        self.asked_for: set[str] = set()  # jobs to check before the sweep reaches them
        self.relist = False
        self.answered_at = answered_at
        self.skipped: tuple[str, ...] = ()  # why the last tick of the list skipped jobs, one text per job
        self.registered_at: float | None = None
        # Used by the list task only.
        self.quiet_lists = BUSY_LISTS  # lists in a row without new jobs
        self.further: str | None = None  # the cursor to continue with, if the last tick reached LOOK_PAGES
        # Used by the reserve task only.
        self.to_offer: list[Job] = []
        # Used by the states task only.
        self.sweep: collections.deque[str] = collections.deque()
        self.unswept: collections.deque[str] = collections.deque()  # jobs for the sweeps after this one
        self.next_sweep_at = 0.0
        self.missing: collections.Counter[str] = collections.Counter()  # answers in a row without the job
        self.unknown: dict[str, float] = {}  # since when a job is in a state that we do not know

    def follow_clock(self, step: float) -> None:
        self.answered_at += step if self.answered_at else 0.0
        self.next_sweep_at += step
        if self.registered_at is not None:
            self.registered_at += step
        self.unknown.update({uuid: at + step for uuid, at in self.unknown.copy().items()})


class Intake(Part):
    """Everything that calls Buildkite for one queue: one task for each endpoint.

    The tasks tokens and notify run at every scheduler, the others only while this one leads.
    """

    def __init__(
        self,
        source: Source,
        lead: Leadership,
        dispatcher: Dispatcher,
        settings: Settings,
        now: Callable[[], float],
        give_up: Callable[[str], None],
    ):
        """`give_up(reason)` is called when Buildkite refuses the token and has never accepted it."""
        self.queue_key, self._source, self._lead, self._dispatcher = source.queue_key, source, lead, dispatcher
        self._settings, self._now, self._give_up = settings, now, give_up
        self.list = PeriodicTask(f"{source.queue_key} list", self.list_jobs, now)
        self.reserve = PeriodicTask(f"{source.queue_key} reserve", self.reserve_jobs, now)
        self.states = PeriodicTask(f"{source.queue_key} states", self.check_states, now)
        self.finish = PeriodicTask(f"{source.queue_key} finish", self.finish_jobs, now)
        lifetime = min(settings.acquire_seconds + TOKEN_GRACE_SECONDS, MAX_TOKEN_SECONDS)
        store, queue_key = lead.always, source.queue_key
        self.tokens = JobTokens(source, lifetime, now, lambda: store.unfinished(queue_key), dispatcher)
        self.notifier = Notifier(source, store, dispatcher)
        #: Asks the policy about the queue's jobs; None without a policy.
        self.asker: PolicyAsker | None = None
        self.notify = PeriodicTask(f"{source.queue_key} notify", self.notify_users, now)
        #: Whether we write on build pages where jobs stand.
        self.is_telling = settings.stack_notifications and source.has_notifications
        self.tasks = [self.list, self.reserve, self.states, self.finish]
        self.tasks += [self.tokens.task] if source.has_tokens else []
        self._proofs = Proofs(source, now)
        self.tasks += [] if source.has_reservations else [self._proofs.task]
        self.tasks += [self.notify] if self.is_telling else []
        # When the clock makes a step, `follow_clock` changes all times in here.
        self._lock = threading.Lock()  # guards the next two
        self._term: Term | None = None
        self._aside: dict[str, Job] = {}  # the last MANY_ASIDE jobs that were put aside here
        self._resumed, self._hinted = threading.Event(), threading.Event()
        #: When any leader last listed the queue.
        self.last_list_at = 0.0
        #: Problems that the leader reported to us, and its `upstream_problem`.
        self.problems_elsewhere: list[str] = []
        self._upstream_problem_elsewhere = ""
        self._has_unread_notes = False
        self._unknown_words: set[str] = set()  # used by the states task only
        self._rival, self._rival_at = (
            "",
            -math.inf,
        )  # sign of another scheduler with our stack; last seen
        self._watched_with: Store | None = None  # used by notify only: `Leadership.store()` at its last tick
        #: Called when Buildkite may have to cancel a job that an operator stopped.
        self.on_stop: Callable[[], None] = lambda: None
        lead.tasks += self.tasks
        dispatcher.upstream_problems[queue_key] = self.upstream_problem

    def use_policy(self, policy: Policy) -> None:
        """Let the policy decide about the queue's jobs. Called once, before any task starts."""
        self._source.keeps_specs = True
        self.asker = PolicyAsker(policy, self._source, self, self._lead, self._dispatcher, self._now)
        self.tasks = [*self.tasks, self.asker.task]
        self._lead.tasks.append(self.asker.task)

    def is_free(self, job: Job) -> bool:
        """Whether no other agent has a job that is about to be handed out. BuildkiteError: Buildkite did not answer.

        A reservation proves it. Without one, the answer that made the job `ready` is valid for PROOF_SECONDS; later,
        this asks Buildkite.
        """
        proved_at = job.reservation_expires_at - self._settings.reservation_seconds
        if self._source.has_reservations or 0 <= self._now() - proved_at <= PROOF_SECONDS:
            return True
        return self._proofs.is_free(job.uuid)

    @property
    def problems(self) -> list[str]:
        listed = [] if self._lead.store() else self.problems_elsewhere
        rival = [self._rival] if self._now() - self._rival_at < RIVAL_SECONDS else []
        failed = self.asker.problems if self.asker else []
        source = self._source.problems if self._lead.store() else []
        return list(dict.fromkeys([*listed, *rival, *super().problems, *source, *self._job_problems(), *failed]))

    def _job_problems(self) -> list[str]:
        """Problems of jobs that cannot be handed out: their number, and the reason of the first."""
        term, now, found = self._current_term(), self._now(), []
        if term and (reasons := term.skipped):
            found.append(
                f"queue {self.queue_key}: listed jobs that are skipped: {len(reasons)}; the first: {reasons[0]}"
            )
        with self._lock:
            aside = [job for job in self._aside.values() if job.not_before > now]
        if aside:
            first = f"the first is {aside[0].uuid} until {rfc3339(aside[0].held_until)}, {aside[0].reason}"
            found.append(f"queue {self.queue_key}: jobs put aside: {len(aside)}; {first}")
        return found

    # -- leadership

    def _current_term(self) -> Term | None:
        """The state for a whole tick; None while another scheduler leads.

        Only here a new term begins for this queue, with an empty state.
        """
        with self._lock:
            store = self._lead.store()
            if store is None:
                self._term = None
            elif self._term is None or self._term.store is not store:
                self._term = Term(store, self._lead.answered_before)
            return self._term

    @property
    def answered_at(self) -> float:
        """When Buildkite last answered us, or an earlier leader; 0 while another scheduler leads."""
        term = self._current_term()
        return term.answered_at if term else 0.0

    @property
    def registered(self) -> bool:
        """Whether Buildkite knows the stack, as far as we know. If another scheduler leads: whether it has listed."""
        term = self._current_term()
        return term.registered_at is not None if term else self.last_list_at > 0

    @property
    def was_registration_tried(self) -> bool:
        """Whether our first call to Buildkite has succeeded or failed."""
        return self.registered or self.list.failures > 0

    def upstream_problem(self) -> str:
        """Why Buildkite cannot confirm reservations now; "" if it can, to our knowledge."""
        term = self._current_term()
        if not term:
            return self._upstream_problem_elsewhere
        return self.reserve.problem or ("" if term.registered_at else self.list.problem)

    def notes(self) -> dict[str, Any]:
        """The leader's notes about the queue, for the other schedulers."""
        problems, upstream_problem = self.problems, self.upstream_problem()
        return {"last_list_at": self.last_list_at, "problems": problems, "upstream_problem": upstream_problem}

    def read_notes(self, notes: object) -> None:
        """Use the leader's notes about the queue."""
        match notes:
            case {"last_list_at": int() | float() as last_list_at, "problems": [*problems], **more}:
                self.last_list_at, self.problems_elsewhere = last_list_at, [str(problem) for problem in problems]
                self._upstream_problem_elsewhere = str(more.get("upstream_problem") or "")
            case _ if not self._has_unread_notes:
                self._has_unread_notes = True  # log this once
                reason = f"this scheduler cannot read the leader's notes: {cut(repr(notes), 200)}"
                log.warning(event("unread", queue=self.queue_key, reason=reason))

    # -- registration, by the list task

    def _register(self, term: Term, now: float) -> None:
        try:
            self._source.register()
        except BuildkiteError as error:
            if error.status == 401 and not term.answered_at:
                self._give_up(f"{self._source.token_setting}: Buildkite refuses it: {error}")
            raise
        term.registered_at = now
        self._answered(term, now)
        log.info(event("registered", queue=self.queue_key, stack=self._source.key))
        for task in (self.reserve, self.states):
            task.wake()  # they wait for the registration, and may have jobs to confirm after a restart

    @contextmanager
    def _registering_again(self, term: Term, now: float) -> Iterator[None]:
        """Around a call: a 404 means that Buildkite has forgotten the stack. Register it again, but not too often."""
        try:
            yield
        except BuildkiteError as error:
            if error.status == 404 and now - (term.registered_at or 0.0) >= REGISTER_SECONDS:
                term.registered_at = None
                self.list.wake()
            raise

    # -- list

    def list_jobs(self, now: float) -> float:
        """List the queue and put new jobs. The next page is listed only if a page is full and has no new job.

        Each tick begins with the first page and lists at most LOOK_PAGES; the next tick continues with the page where
        this one ended.

        After a list with new jobs, the next list comes after HINT_SECONDS. The BUSY_LISTS lists after that come
        BUSY_TIMES as often as POLL_INTERVAL says. In a simulation with POLL_INTERVAL=1s, 50 ms per call, and one job a
        second at random times, a job waits 0.20 s for the list that contains it, at 3.5 lists a second; with
        POLL_INTERVAL alone, 0.58 s. Buildkite allows 10 lists a second.
        """
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        if (seconds := self._source.pause()) > 0:
            return seconds
        if self._hinted.is_set():
            self._hinted.clear()
            if 0 < (seconds := self.last_list_at + HINT_SECONDS - now) <= HINT_SECONDS:
                return seconds
        if term.registered_at is None:
            self._register(term, now)
        cursor, further, term.further = None, term.further, None
        skipped: list[str] = []
        for _ in range(LOOK_PAGES):
            self.list.step()
            asked = term.store.sequence()
            with self._registering_again(term, now):
                page = self._source.list_jobs(cursor, now)
            self._answered(term, now)
            self.last_list_at = now
            skipped += page.skipped
            put = self._put(term, page, asked, now)
            if put:
                with self._lock:
                    term.relist = page.next_cursor is not None
                self.reserve.wake()
                further = cursor or further  # this page may have more new jobs; the first is always listed again
                break
            if page.paused or page.next_cursor in (None, cursor):
                further = None
                break
            cursor, further = further or page.next_cursor, None
        else:
            further = cursor
        term.further, term.skipped = further, tuple(skipped)
        return self._next_list_in(term, bool(put))

    def _put(self, term: Term, page: ListPage, asked: int, now: float) -> list[Job]:
        """Store what a page of the list says; return the jobs that were put."""
        if page.paused is not None:
            self._pause(term, page.paused, now)
        if page.gone:
            with self._lock:
                term.asked_for.update(page.gone)
            self.states.wake()
        if page.paused:
            return []
        try:
            return term.store.put(page.jobs, asked, now, is_reserved=self._source.has_reservations)
        except (StoreUnavailable, Fenced):
            self._source.list_anew()
            raise

    def _next_list_in(self, term: Term, has_brought: bool) -> float:
        if has_brought:
            term.quiet_lists = 0
            return HINT_SECONDS
        term.quiet_lists += 1
        times = BUSY_TIMES if term.quiet_lists <= BUSY_LISTS else 1
        return max(HINT_SECONDS, self._settings.poll_interval / times)

    def _pause(self, term: Term, paused: bool, now: float) -> None:
        if term.store.pause(self.queue_key, paused, now):
            log.warning(event("paused" if paused else "resumed", queue=self.queue_key))
            if paused:
                self.notifier.notify_soon()
            else:
                self._resumed.set()
            self.reserve.wake()

    def _answered(self, term: Term, now: float) -> None:
        term.store.answered(self.queue_key, now)
        with self._lock:
            term.answered_at = max(term.answered_at, now)

    # -- reserve

    def reserve_jobs(self, now: float) -> float | None:
        """Reserve `reserving` jobs, and renew reservations with less than half of their time left."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        self._offer(term)
        if term.registered_at is None:
            return None
        # The next tick comes after a poll interval, so renew now what becomes due until then.
        due_before = now + self._settings.reservation_seconds / 2 + self._settings.poll_interval
        with self._lock:
            waiting = term.unreserved.copy()
        listed = term.store.unconfirmed(self.queue_key, due_before, self._source.batch + len(waiting), now)
        batch = [uuid for uuid in listed if uuid not in waiting][: self._source.batch]
        if not batch:
            return self._settings.poll_interval
        asked = term.store.sequence()
        self._drop_refused(term, call_in_halves(batch, lambda part: self._reserve(term, part, now)), asked, now)
        with self._lock:
            relist, term.relist = term.relist, False
        if relist:
            self.list.wake()
        return 0.0 if len(batch) == self._source.batch else self._settings.poll_interval

    def _reserve(self, term: Term, batch: Sequence[str], now: float) -> None:
        self.reserve.step()
        asked = term.store.sequence()
        with self._registering_again(term, now):
            reserved, refused = self._source.reserve(batch, self._settings.reservation_seconds)
        self._answered(term, now)
        changed = term.store.confirm(reserved, asked, now + self._settings.reservation_seconds, now)
        term.to_offer += [job for job in changed if job.state is JobState.READY and not job.held_by]
        self._offer(term)
        if any(job.finish_detail for job in changed):
            self.finish.wake()
        if refused:
            # A `ready` job among them is not handed out until its state shows why it was not reserved.
            lapsed = JobFinding(Finding.LAPSED, "not reserved again")
            self._learn(term, dict.fromkeys(refused, lapsed), asked, now)
            with self._lock:
                term.unreserved |= refused
            self.states.wake()

    def _offer(self, term: Term) -> None:
        """Offer jobs that became ready; after a queue's pause, all. If the store fails, the next tick tries again."""
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
        """Drop jobs whose uuids Buildkite refuses."""
        with self._lock:
            term.unreserved -= refused.keys()
        findings = {
            uuid: JobFinding(Finding.GONE, f"Buildkite refuses it: {why}", "refused") for uuid, why in refused.items()
        }
        self._learn(term, findings, asked, now)

    def _learn(self, term: Term, findings: Mapping[str, JobFinding], asked: int, now: float) -> None:
        term.store.learn(findings, asked, now, is_reserved=self._source.has_reservations)

    # -- states

    def check_states(self, now: float) -> float | None:
        """Ask Buildkite for the states of jobs: first those of `check_soon` and not reserved ones, then a sweep."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        if term.registered_at is None:
            return None
        batch = self._next_batch(term, now)
        if batch:
            try:
                asked = term.store.sequence()
                self._drop_refused(
                    term, call_in_halves(batch, lambda part: self._check_batch(term, part, now)), asked, now
                )
            except BuildkiteError:
                term.sweep.extendleft(uuid for uuid in batch if uuid not in term.unreserved)  # they are still next
                raise
        with self._lock:
            urgent = bool(term.unreserved or term.asked_for)
        if term.sweep or (batch and urgent):
            return 0.0
        return min(max(0.0, term.next_sweep_at - now), SWEEP_SECONDS)

    def check_soon(self, uuid: str) -> None:
        """Check one job before the sweep reaches it."""
        if term := self._current_term():
            with self._lock:
                term.asked_for.add(uuid)
            self.states.wake()

    def _next_batch(self, term: Term, now: float) -> list[str]:
        # If the clock was set during a call, next_sweep_at may be far away.
        if not term.sweep and not now < term.next_sweep_at <= now + SWEEP_SECONDS:
            pause = self._source.pause()
            term.next_sweep_at = now + (min(pause, SWEEP_SECONDS) or SWEEP_SECONDS)
            if not pause:
                self._begin_sweep(term)
        with self._lock:
            batch = dict.fromkeys(itertools.islice((*term.unreserved, *term.asked_for), self._source.batch))
            term.asked_for -= batch.keys()
        while term.sweep and len(batch) < self._source.batch:
            batch[term.sweep.popleft()] = None
        return list(batch)

    def _begin_sweep(self, term: Term) -> None:
        """Queue the jobs of this sweep: every leased or running job, then the next SWEEP_WAITING others."""
        if not term.unswept:
            term.unswept.extend(term.store.unfinished(self.queue_key))
            left = set(term.unswept) if term.missing or term.unknown else set()
            for remembered in (term.missing, term.unknown):  # forget jobs that are done
                for uuid in remembered.keys() - left:
                    del remembered[uuid]
        held = term.store.leased_or_running(self.queue_key)
        # Without reservations, the list contains all waiting jobs, so they need no check here.
        waiting = SWEEP_WAITING if self._source.has_reservations else 0
        others = (term.unswept.popleft() for _ in range(min(len(term.unswept), waiting)))
        term.sweep.extend(dict.fromkeys((*held, *others)))

    def _check_batch(self, term: Term, batch: Sequence[str], now: float) -> None:
        self.states.step()
        asked = term.store.sequence()
        with self._lock:
            unreserved = term.unreserved.intersection(batch)
        with self._registering_again(term, now):
            states = self._source.states(batch)
        self._answered(term, now)
        findings = {}
        for uuid in batch:
            if finding := self._finding(term, uuid, states.get(uuid), uuid in unreserved, now):
                findings[uuid] = finding
        self._learn(term, findings, asked, now)
        term.store.looked(self.queue_key, now)
        with self._lock:
            term.unreserved -= unreserved

    def _finding(self, term: Term, uuid: str, word: str | None, unreserved: bool, now: float) -> JobFinding | None:
        """What Buildkite's word for a job's state proves; None: nothing. `word` None: the answer did not contain it."""
        if word is None:
            term.missing[uuid] += 1
            if term.missing[uuid] < MISSING_ANSWERS:
                return None
            del term.missing[uuid]
            return JobFinding(Finding.GONE, f"Buildkite does not know it, in {MISSING_ANSWERS} answers", "unknown_job")
        term.missing.pop(uuid, None)
        if word not in FINDINGS:
            return self._unknown_word(term, uuid, word, now)
        term.unknown.pop(uuid, None)
        if finding := FINDINGS[word]:
            return JobFinding(finding, word, "not_ours" if unreserved and finding is Finding.GONE else "")
        if not self._source.has_reservations and word == "scheduled":
            return None  # free; before it is handed out, it is checked again
        if unreserved:
            return JobFinding(Finding.GONE, f"{word}, but not for us", "not_ours")
        return JobFinding(Finding.LAPSED, word) if word == "scheduled" else None

    def _unknown_word(self, term: Term, uuid: str, word: str, now: float) -> JobFinding:
        if word not in self._unknown_words and len(self._unknown_words) < 100:
            self._unknown_words.add(word)
            reason = "unknown state, treated as running; logged once per state"
            log.warning(event("unknown", state=word, job=uuid, reason=reason))
        if now - term.unknown.setdefault(uuid, now) < UNKNOWN_SECONDS:
            return JobFinding(Finding.ACQUIRED, word)
        del term.unknown[uuid]
        return JobFinding(Finding.GONE, f"in the unknown state {word} for an hour", "unknown_state")

    # -- finish

    def finish_jobs(self, now: float) -> float:
        """Finish, at Buildkite, the jobs that have a finish_detail; repeat each until Buildkite confirms it."""
        term = self._current_term()
        if not term:
            return FOLLOWING_SECONDS
        for job in term.store.intents(self.queue_key, now):
            self._finish(term, job, now)
        return REFUSED_FINISH_SECONDS / 4

    def _finish(self, term: Term, job: Job, now: float) -> None:
        self.finish.step()
        try:
            self._source.finish(job.uuid, job.finish_detail or "", finish_status(job))
        except BuildkiteError as error:
            if error.status not in (400, 404, 422):
                raise
            # The job has an agent or is over: its state will show that, and the finish is then no longer needed.
            log.warning(event("refused", job=job.uuid, call="finish", reason=str(error)))
            term.store.refuse_finish(job.uuid, now)
            self.check_soon(job.uuid)
            return
        term.store.finish(job.uuid, now)

    # -- notify

    def notify_users(self, now: float) -> float | None:
        """Write on build pages: the leader about waiting jobs, each scheduler about the claims that it served."""
        if not self.registered:
            return None
        store = self._lead.store()
        if store is not self._watched_with:
            if store:
                self.notifier.watch_ready(now)
            else:
                self.notifier.stop_watching_ready()
            self._watched_with = store
        return self.notifier.tick(now)

    # -- calls from upkeep, the API and other schedulers

    def follow_clock(self, step: float) -> None:
        """The clock made a step: move every stored time with it."""
        with self._lock:
            if self._term:
                self._term.follow_clock(step)
            self.last_list_at += step if self.last_list_at else 0.0
            self._rival_at += step
        self.notifier.follow_clock(step)
        self.states.wake()

    def stop_soon(self, job: Job) -> None:
        """An operator stopped the job: the leader's tasks for it run at once."""
        self._tell_leader(stopped={"uuid": job.uuid})

    def list_soon(self) -> None:
        """A hint that there are new jobs: list at once, but not within HINT_SECONDS or during a backoff."""
        self._tell_leader(list_soon={})

    def on_move(self, move: Move) -> None:
        """Listener of moves. When a claim has ended, the leader at once asks for the job's state or reserves it."""
        with self._lock:
            self._aside.pop(move.job.uuid, None)
            if move.job.held_reason == PUT_ASIDE.reason:
                self._aside[move.job.uuid] = move.job
                if len(self._aside) > MANY_ASIDE:
                    del self._aside[next(iter(self._aside))]
        if self.asker:
            self.asker.on_move(move)
        if move.verb in ("release", "complete", "expire"):
            ended = {"uuid": move.job.uuid, "state": move.job.state, "code": move.code}
            self._tell_leader(returned=ended | {"exit_status": move.job.exit_status})
        if move.verb == "acquire" and move.job.stop:
            self.on_stop()
        if move.code == BY_RIVAL:
            self._note_rival(move.job)

    def _note_rival(self, job: Job) -> None:
        is_known, self._rival_at = self._now() - self._rival_at < RIVAL_SECONDS, self._now()
        self._rival = (
            f"another scheduler uses stack {self._source.key}: Buildkite reserved job {job.uuid} for this stack, but "
            "an agent has it that no worker of this scheduler started. Does a copy of this machine or of its state "
            "directory run elsewhere? Stop one of the two, or give it another STACK_KEY and an empty store. (A person "
            "who starts an agent for the job by hand causes the same message)"
        )
        if not is_known:
            log.error(event("rival", queue=self.queue_key, job=job.uuid, reason=self._rival))

    def _tell_leader(self, **news: Mapping[str, object]) -> None:
        """Act here while we lead, else send it to the leader. If that gets lost, its next check or list finds it."""
        if self._lead.store():
            self.receive(news)
        else:
            self._lead.tell(queue=self.queue_key, **news)

    def receive(self, news: Mapping[str, Any]) -> None:
        """As the leader, act on an event from here or from another scheduler. ValueError: it cannot be read."""
        match news:
            case {"list_soon": _}:
                self._hinted.set()
                self.list.wake()
            case {"stopped": {"uuid": str(uuid)}}:
                self.reserve.wake()
                self.finish.wake()
                self.on_stop()
                self.check_soon(uuid)
            case {"returned": {"uuid": str(uuid), "state": str(state), **more}}:
                # After exit status 0 the job has most likely run: check its state instead of reserving it again.
                has_likely_run = state == JobState.RUNNING or more.get("exit_status") == 0
                if has_likely_run or more.get("code") == "no_token":  # its state may show why there was no token
                    self.check_soon(uuid)
                elif state == JobState.RESERVING:
                    self.reserve.wake()
            case {"returned": _} | {"stopped": _}:
                raise ValueError(f"unknown form: {news!r}")


#: A waiting job gets a text after these seconds of waiting, then each time its wait has doubled. (A job that is handed
#: out at once needs no text about its wait.)
FIRST_LOOK_SECONDS, SECOND_LOOK_SECONDS, THIRD_LOOK_SECONDS = 2.0, 30.0, 600.0
#: A job whose claim has ended is checked after the first, then each time after the second, until we know if it ran.
FIRST_ENDED_SECONDS, ENDED_SECONDS = 1.0, 5.0
#: Texts per job, however often it is claimed and given back. Buildkite takes 100.
TEXTS_PER_JOB = 20
#: Limits: watched jobs, unsent texts, jobs handled per tick. Beyond the first two, texts are lost.
WATCHED_JOBS, OUTBOX, LOOKS = 10_000, 10_000, 200
#: Jobs whose texts are counted. Beyond this, the count of the job with the oldest text is forgotten.
COUNTED_JOBS = 10_000
#: A text that could not be sent for so long is dropped, because it is out of date.
STALE_SECONDS = 60.0
#: The reasons why jobs wait are computed at most this often.
FLEET_SECONDS = 5.0
#: If Buildkite permits no notifications at all, try again after this.
UNWANTED_SECONDS = 600.0
#: Refused texts are logged at most this often.
COMPLAIN_SECONDS = 600.0


class NoticePlan(NamedTuple):
    """When to write about a waiting job; and a text on how its claim ended, to send if no agent had it (or "")."""

    at: float
    end: str = ""


class Notifier:
    """Writes on the build page where a job stands: its place in line, why it waits, which worker has it or returned it.

    Nothing depends on it. Unsent texts are in memory only, limited in number, and dropped when too old. The times
    depend on how long a job has been reserved, so a restart repeats no text.
    """

    def __init__(self, source: Source, store: Store, dispatcher: Dispatcher):
        self._source, self._store, self._dispatcher = source, store, dispatcher
        self._lock = threading.Lock()  # guards the next three, and `counts`
        self._plans: dict[str, NoticePlan] = {}  # for each waiting job
        self._outbox: collections.deque[tuple[float, str, str]] = collections.deque(maxlen=OUTBOX)
        self._texts: dict[str, int] = {}  # number of texts for each job that is not done, latest text last
        self._fleet: Fleet | None = None  # not older than FLEET_SECONDS
        self._complained_at = -math.inf
        #: Texts that Buildkite took, refused, and that were never sent.
        self.counts = {"sent": 0, "refused": 0, "lost": 0}

    # -- listeners of moves; they must be fast, because each move waits for them

    def on_move(self, move: Move, now: float) -> None:
        """Listener of moves."""
        job = move.job
        with self._lock:
            look = self._plans.pop(job.uuid, None)
            if job.state is JobState.DONE:
                self._texts.pop(job.uuid, None)
        # `ready` again or claimed again proves that no agent had it in the claim before.
        if look and look.end and job.state in (JobState.READY, JobState.LEASED):
            self._queue_text(job.uuid, look.end, now)
        if job.state is JobState.READY:
            soon = now + FIRST_LOOK_SECONDS
            self._watch(job.uuid, NoticePlan(soon if move.verb == "freeze" else next_look(job, now)))
        elif move.verb == "claim" and move.code != "again":
            self._queue_text(job.uuid, f"Handed to {by_name(job.worker)}.", now)
        elif move.verb in ("release", "expire", "complete") and job.state is JobState.RESERVING:
            last = job.tries[-1]
            if job.held_reason == PUT_ASIDE.reason:
                self._queue_text(job.uuid, f"Put aside until {rfc3339(job.held_until)}: {last['reason']}", now)
                return
            end = f"Given back by {by_name(last['worker'])}: {last['reason'][:DETAIL_BYTES]}"
            # Its agent may have run the job nevertheless. Only the leader learns that from Buildkite; so this scheduler
            # checks the job's row later.
            self._watch(job.uuid, NoticePlan(now + FIRST_ENDED_SECONDS, end))

    def _watch(self, uuid: str, look: NoticePlan) -> None:
        with self._lock:
            if len(self._plans) < WATCHED_JOBS:
                self._plans[uuid] = look

    def watch_ready(self, now: float) -> None:
        """Watch all `ready` jobs, when we become the leader: until now the earlier leader watched them."""
        after: tuple[int, float, str] | None = None
        for _ in range(0, WATCHED_JOBS, PAGE_JOBS):
            jobs = self._store.page(JobState.READY, after, PAGE_JOBS, self._source.queue_key)
            for job in jobs:
                if job.uuid not in self._plans:
                    self._watch(job.uuid, NoticePlan(next_look(job, now)))
            if len(jobs) < PAGE_JOBS:
                return
            after = jobs[-1].order

    def stop_watching_ready(self) -> None:
        """Stop watching `ready` jobs: the new leader does. Keep those whose claims ended here: only we know that."""
        with self._lock:
            self._plans = {uuid: look for uuid, look in self._plans.items() if look.end}

    def _queue_text(self, uuid: str, detail: str, now: float) -> None:
        with self._lock:
            count = self._texts.pop(uuid, 0)
            self._texts[uuid] = min(count + 1, TEXTS_PER_JOB)
            if len(self._texts) > COUNTED_JOBS:  # jobs may stay here, because only the leader learns that a job is done
                del self._texts[next(iter(self._texts))]
            if count == TEXTS_PER_JOB:
                return
            # A full outbox drops its oldest text.
            self.counts["lost"] += len(self._outbox) == OUTBOX
            self._outbox.append((now, uuid, detail))

    def notify_soon(self) -> None:
        """The queue was paused: write about all waiting jobs soon."""
        with self._lock:
            self._plans = {uuid: look._replace(at=0.0) for uuid, look in self._plans.items()}
        self._fleet = None

    def follow_clock(self, step: float) -> None:
        with self._lock:
            self._plans = {uuid: look._replace(at=look.at + step) for uuid, look in self._plans.items()}
            self._outbox.clear()

    # -- the notify task

    def tick(self, now: float) -> float:
        """Make the texts that are due, and send texts with at most one call."""
        with self._lock:
            due = list(itertools.islice((uuid for uuid, look in self._plans.items() if look.at <= now), LOOKS))
        for uuid in due:
            self._notify(uuid, now)
        self._send(now)
        return 0.1 if len(due) == LOOKS or self._outbox else 1.0

    def _notify(self, uuid: str, now: float) -> None:
        job = self._store.get(uuid)
        with self._lock:
            if (look := self._plans.pop(uuid, None)) is None:
                return  # handed out meanwhile
            if job is None or job.state is JobState.DONE:
                self._texts.pop(uuid, None)
                return
        if look.end and job.state is JobState.RESERVING:
            self._watch(uuid, NoticePlan(now + ENDED_SECONDS, look.end))
        elif job.state in (JobState.RESERVING, JobState.READY):
            self._watch(uuid, NoticePlan(next_look(job, now)))
            self._queue_text(uuid, look.end or self._why(job, now), now)
        elif look.end and job.state is JobState.LEASED:
            self._queue_text(uuid, look.end, now)

    def _why(self, job: Job, now: float) -> str:
        ahead = self._store.ahead(job, COUNTED_AHEAD)
        many = f"{ahead} or more" if ahead == COUNTED_AHEAD else str(ahead)
        line = f"{many} with the same rules ahead" if ahead else "first of its rules in line"
        reason = self._reason(job, now)
        is_held = job.held_by is not None or reason.why is WaitReason.QUEUE_PAUSED
        if now - (job.reserved_at or now) < SECOND_LOOK_SECONDS and not is_held:
            return f"Reserved by stack {self._source.key}: {line}."
        return f"Waiting ({reason.why}): {reason.text}; {line}."

    def _reason(self, job: Job, now: float) -> WaitExplanation:
        fleet = self._fleet
        if fleet is None or not 0 <= now - fleet.now < FLEET_SECONDS:
            fleet = self._fleet = Fleet(self._store, self._dispatcher, now)
        return fleet.why_of(job)

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
            refused = self._source.notify(batch)
        except BuildkiteError as error:
            with self._lock:
                self.counts["lost"] += len(batch)  # no retry: later texts are more current
            if error.status == 403:
                text = f"{error}; build pages of this queue show no texts until the next try"
                raise BuildkiteError(text, error.status, UNWANTED_SECONDS) from None
            raise
        count = min(sum(refused.values()), len(batch))
        with self._lock:
            self.counts["refused"] += count
            self.counts["sent"] += len(batch) - count
        if refused and not 0 <= now - self._complained_at < COMPLAIN_SECONDS:
            self._complained_at = now
            reasons = "; ".join(f"{error} ({count})" for error, count in refused.items())
            log.warning(event("refused", call="notify", queue=self._source.queue_key, reason=reasons))


def by_name(worker: str | None) -> str:
    return f"worker {worker}" if worker else "a worker without a name"


def next_look(job: Job, now: float) -> float:
    """When to write about a waiting job: the next of the fixed times after its reservation."""
    reserved_at = job.reserved_at or now
    if reserved_at == now:
        return now + FIRST_LOOK_SECONDS
    after = SECOND_LOOK_SECONDS
    while reserved_at + after <= now:
        after = max(2 * after, THIRD_LOOK_SECONDS)
    return reserved_at + after


class Freezes(Part):
    """Holds jobs when a freeze window begins, and releases them when it ends, in line order. Only the leader does so.

    A job that becomes `ready` during a window is held in the same move: see `Store.confirm`.
    """

    def __init__(
        self,
        settings: Settings,
        lead: Leadership,
        dispatcher: Dispatcher,
        queue_keys: Sequence[str],
        now: Callable[[], float],
    ):
        """Reads STACK_FILE. Raises SettingsError."""
        self._settings, self._lead, self._dispatcher = settings, lead, dispatcher
        self._queue_keys, self._now = queue_keys, now
        self._windows = lead.always.windows
        self.task = PeriodicTask("freezes", self.tick, now)
        self.tasks = [self.task]
        lead.tasks += self.tasks
        self._file_problems: list[str] = []  # if the current STACK_FILE is wrong: why; the previous content is in force
        #: Canonical bytes of the file in force, to compare it with other schedulers' files.
        self.canonical = b""
        #: The content of the file in force.
        self.file = StackFile()
        # Used by the task only: store and windows of the last pass over the line, its time, and when the next is due.
        self._seen: tuple[Store, tuple[Freeze, ...]] | None = None
        self._looked_at, self._due_at = 0.0, 0.0
        self._offset = 0.0  # between our clock and the monotonic one
        self._use(stack_file_of(settings))  # its warnings are logged by `ignored_settings`

    @property
    def problems(self) -> list[str]:
        return [*super().problems, *self._file_problems]

    def metrics(self, now: float) -> list[Metric]:
        windows: list[dict[str, Any]] = []
        with suppress(StoreUnavailable):
            windows = [row for row in freezes_json(self._lead.always, now) if row["state"] == "in_force"]
        jobs = [((row["name"],), row["jobs"]) for row in windows]
        ends = [((row["name"],), moment_of(row["until"]) or 0.0) for row in windows]
        return [
            gauge("stack_frozen_jobs", "Jobs that a freeze window holds.", ["window"], jobs),
            gauge("stack_freeze_ends_timestamp_seconds", "When a freeze window in force ends.", ["window"], ends),
        ]

    def get_freezes(self, request: Request) -> Answer:
        """GET /freezes"""
        return Answer(200, {"freezes": freezes_json(self._lead.always, self._now())})

    routes = (Route("GET", "/freezes", get_freezes, READER),)

    def reload(self) -> None:
        """Read STACK_FILE again. If it has a problem, the windows do not change."""
        try:
            file = stack_file_of(self._settings)
            log_ignored(file.warnings)
            self._use(file)
        except SettingsError as error:
            problems = str(error).splitlines()
            self._file_problems = [f"{problem}; the previous file is in force" for problem in problems]
            log.error(event("unreloaded", problem=error, now="the previous STACK_FILE is in force"))

    def _use(self, file: ReadFile) -> None:
        self._windows.use(file.tables.freeze)
        self.file = file.tables
        self.canonical, self._file_problems = file.canonical, []
        self.task.wake()

    def tick(self, now: float) -> float:
        """Hold and release jobs that are due; return the seconds until the next tick."""
        store, freezes = self._lead.store(), self._windows.settled()
        if store is None:
            self._seen = None
            return FOLLOWING_SECONDS
        offset, before = now - time.monotonic(), self._offset
        is_new = self._seen != (store, freezes) or abs(offset - before) > Clock.STEP_SECONDS
        if is_new or now >= self._due_at:
            due_at = min((freeze.next_edge(now) for freeze in freezes), default=math.inf)
            looked_at = -math.inf if is_new else self._looked_at
            lines = [self._to_look_at(store, queue_key, freezes, looked_at, now) for queue_key in self._queue_keys]
            # Slices of all queues in turn, so that a long line of one queue does not delay the others.
            for start in range(0, max(map(len, lines), default=0), SLICE):
                for slice_ in filter(None, (uuids[start : start + SLICE] for uuids in lines)):
                    self.task.step()
                    self._dispatcher.offer(store.freeze(slice_, now))
            self._seen, self._looked_at, self._due_at = (store, freezes), now, due_at
        self._offset = offset
        # Tick every second, because the clock may be set.
        return min(max(0.0, self._due_at - self._now()), UPKEEP_SECONDS) if freezes else FOLLOWING_SECONDS

    def _to_look_at(
        self, store: Store, queue_key: str, freezes: Sequence[Freeze], looked_at: float, now: float
    ) -> list[str]:
        """All jobs in the queue's line if a window has begun since the last pass, else only the frozen jobs."""
        begun = [span for freeze, span in in_force(freezes, now) if freeze.may_match(queue_key)]
        if any(span.begins_at > looked_at for span in begun):
            return store.line(queue_key)
        return store.frozen(queue_key, math.inf if looked_at == -math.inf else now)


class Upkeep(Part):
    """Regular work that does not depend on Buildkite: the clock, leases, pruning, disconnected clients."""

    def __init__(self, lead: Leadership, clock: Clock, intakes: Mapping[str, Intake], dispatcher: Dispatcher):
        self._lead, self._clock, self._intakes, self._dispatcher = lead, clock, intakes, dispatcher
        self._next_prune_at = 0.0
        self._stepped = False
        self._ended_at = math.inf  # monotonic: end of the last tick; infinity if it failed
        self._was_late = False  # the last tick failed, or took so long that the process may have been frozen
        self._next_look_at = -math.inf  # monotonic: next check for disconnected clients
        self.tasks = [PeriodicTask("upkeep", self.tick, clock.now)]
        lead.tasks += self.tasks

    def tick(self, now: float) -> float:
        began_at = time.monotonic()
        if (seconds := began_at - self._ended_at - UPKEEP_SECONDS) > FROZEN_SECONDS:
            # This process was frozen. Touches that came in time may still wait to be read.
            log.warning(
                event("frozen", seconds=f"{seconds:.0f}", reason="this process did not run; all leases restart")
            )
            self._stepped = True
            now = self._clock.now()
        if began_at >= self._next_look_at:
            self._next_look_at = began_at + GONE_SECONDS
            self._dispatcher.end_gone()
        was_late, self._was_late = self._was_late, True  # until this tick has ended in time
        self._ended_at = math.inf  # if this tick fails, the task decides when the next one comes
        self._keep_up(now, was_late)
        self._ended_at = time.monotonic()
        self._was_late = self._ended_at - began_at > FROZEN_SECONDS
        return UPKEEP_SECONDS

    def _keep_up(self, now: float, was_late: bool) -> None:
        self._lead.always.probe()
        store = self._lead.store()
        if step := self._clock.follow_wall_clock():
            now = self._clock.now()
            reason = "all leases restart, and all reservations must be renewed" if store else None
            log.warning(event("clock", step_s=f"{step:.0f}", reason=reason))
            self._next_prune_at += step
            for each in self._intakes.values():
                each.follow_clock(step)
            self._stepped = True
        is_prune_due = now >= self._next_prune_at
        if is_prune_due:
            self._dispatcher.forget(now - FORGET_SECONDS)
        if store:  # only the leader does this, because all schedulers share the jobs
            if self._stepped:
                store.restart_leases(now, confirm=False)
            elif was_late:
                store.renew_leases(now)
            self._stepped = False  # only after the store has handled it
            store.expire(self._intakes.keys(), now)
            if is_prune_due or store.has_many_workers():
                store.prune(now - KEEP_DONE_SECONDS)
        if is_prune_due:
            self._next_prune_at = now + KEEP_DONE_SECONDS / 24
        self._stepped = False
        self._dispatcher.follow_holds()


class Canceller(Part):
    """Asks Buildkite to cancel running jobs that an operator stopped, until Buildkite accepts it."""

    def __init__(self, api: GraphApi, lead: Leadership, intakes: Mapping[str, Intake], now: Callable[[], float]):
        self._api, self._lead, self._intakes = api, lead, intakes
        self._refused: dict[str, str] = {}  # jobs that Buildkite does not cancel, with its message
        self.tasks = [PeriodicTask("cancel", self.tick, now, grave={401, 403})]
        lead.tasks += self.tasks
        for intake in intakes.values():
            intake.on_stop = self.tasks[0].wake

    @property
    def problems(self) -> list[str]:
        return [*super().problems, *self._refused.values()]

    def tick(self, now: float) -> float:
        store = self._lead.store()
        if not store or not self._api.has_token:
            return FOLLOWING_SECONDS
        refused: dict[str, str] = {}
        for job in store.to_cancel():
            self.tasks[0].step()
            try:
                word = self._api.cancel(job.uuid, job.queue_key)
            except BuildkiteError as error:
                store.cancelled(job.uuid, str(error), now)
                if error.status != 422:
                    raise
                refused[job.uuid] = str(error)
                if job.uuid not in self._refused:
                    log.warning(event("refused", job=job.uuid, call="cancel", reason=str(error)))
                continue
            store.cancelled(job.uuid, "", now)
            log.info(event("cancelled", job=job.uuid, queue=job.queue_key, state=word))
            if intake := self._intakes.get(job.queue_key):
                intake.check_soon(job.uuid)
        self._refused = refused
        return CANCEL_AGAIN_SECONDS if refused else LOST_STOP_SECONDS


class Peers(Part):
    """This scheduler among those that share one Redis.

    All of them serve workers. One leads: during its term its tasks marked L work, and their writes carry the term's
    token. The leader must renew its turn; when the turn expires, another scheduler takes it, and the old token is
    refused from then on. Redis publishes the jobs that became ready, and each scheduler offers them to its own waiting
    workers.

    Schedulers exchange JSON objects. Unknown fields and unknown kinds are ignored, so that a newer version may send
    more.
    """

    def __init__(
        self,
        rows: RedisRows,
        clock: Clock,
        dispatcher: Dispatcher,
        lead: Leadership,
        intakes: Mapping[str, Intake],
        with_token: Callable[[str], Store],
    ):
        """`with_token(token)` makes the store for the term with this token."""
        self._rows, self._clock, self._dispatcher = rows, clock, dispatcher
        self._lead, self._intakes, self._with_token = lead, intakes, with_token
        self.is_alone = True
        #: Redis answered a heartbeat, so we know the leader.
        self.has_heard = False
        self._token, self._leader = "", ""
        # Monotonic times.
        self._turn_ends_at, self._term_began_at, self._no_lead_before = 0.0, 0.0, 0.0
        self._reported_at = -math.inf  # monotonic: when we last reported our workers
        self._differences: dict[tuple[str, str], str] = {}  # problems by scheduler and setting
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the next two
        self._offers = -1  # Redis's count of offers that we have seen
        self._to_offer: set[str] = set()  # the rule sets to offer, or ALL
        self.turn = PeriodicTask("peers", self.tick, clock.now)
        self.news = PeriodicTask("news", self.listen, clock.now)
        # Offers have their own thread, because they take long with many waiting workers; the turn must be renewed.
        self.offers = PeriodicTask("offers", self.offer, clock.now)
        self.tasks = [self.turn, self.news, self.offers]

    @property
    def problems(self) -> list[str]:
        return [*super().problems, *sorted(self._differences.values())]

    @property
    def role(self) -> str:
        return "leads" if self._lead.store() else f"follows {self._leader or 'nobody'}"

    def stop(self) -> None:
        """Take no turn any more. A term that has begun goes on."""
        self._over.set()
        self.turn.stop()
        self.turn.join(2 * REDIS_SECONDS)
        self.is_alone = False
        with suppress(StoreUnavailable):
            # A scheduler that came since the last heartbeat may lead next, and needs the stacks.
            beat = self._rows.heartbeat(self._notes(), lead=self._lead.store() is not None)
            self.is_alone = beat.schedulers.keys() == {self._rows.name}
            self._rows.tell(stopping=self._rows.name)  # this message ends the blocking read of our own news thread

    def leave(self) -> None:
        """Give up the turn, so that another scheduler can lead at once."""
        with suppress(StoreUnavailable):
            self._rows.leave()

    # -- the turn

    def tick(self, now: float) -> float:
        """Send a heartbeat, take or renew the turn, and catch up on missed offers."""
        asked_at = time.monotonic()
        if self._is_unanswered(now):
            self._end_term("Buildkite does not answer this scheduler; it may answer another")
            self._no_lead_before = asked_at + MODEST_SECONDS
            self._rows.leave()
        heard = self._offers
        try:
            beat = self._rows.heartbeat(self._notes(), lead=asked_at >= self._no_lead_before)
        except StoreUnavailable:
            if self._lead.store() and asked_at >= self._turn_ends_at:
                self._end_term("the turn could not be renewed in Redis in time")
            raise
        self._turn_ends_at = asked_at + TURN_SECONDS
        if self._lead.store() and beat.token != self._token:
            self._end_term(f"{beat.leader or 'nobody'} has the turn")
        if beat.token:
            self._take_turn(beat)
        self._follow(beat)
        self._note_offers(beat.offers, heard)
        if asked_at - self._reported_at >= SEEN_SECONDS:
            self._reported_at = asked_at
            self._dispatcher.receive_reports(
                self._rows.seen(self._dispatcher.reports(now - LIVE_SECONDS), beat.schedulers)
            )
        # Tick once a second, however long this took. A follower ticks when the leader's turn expires.
        pause = 1.0 - (time.monotonic() - asked_at)
        return max(0.05, pause if self._lead.store() else min(pause, beat.turn_seconds + 0.01))

    def _take_turn(self, beat: Heartbeat) -> None:
        store = self._lead.store() or self._with_token(beat.token)
        if not beat.trusted:
            reason = "there was no leader, or Redis was restarted: ready jobs are confirmed before they are handed out"
            log.warning(event("distrusted", reason=reason))
        try:
            if not beat.trusted:
                store.restart_leases(self._clock.now(), confirm=True)
            if not self._lead.store():
                store.renew_leases(self._clock.now())  # workers may not have been able to touch without a leader
                answered_before = self._rows.last_answer_at()
                log.info(event("leading", scheduler=self._rows.name, term=beat.token))
                self._token, self._term_began_at = beat.token, time.monotonic()
                self._lead.begin(store, answered_before)
        except Fenced:
            return  # our turn expired meanwhile; the next heartbeat shows who leads

    def _end_term(self, reason: str) -> None:
        log.warning(event("deposed", scheduler=self._rows.name, term=self._token, reason=reason))
        self._lead.end()
        self._leader = ""

    def _is_unanswered(self, now: float) -> bool:
        """Whether we lead, another scheduler could, and Buildkite has not answered us for long."""
        if not self._lead.store() or self.is_alone or time.monotonic() - self._term_began_at < UNANSWERED_SECONDS:
            return False
        intakes = self._intakes.values()
        return all(each.list.failures and now - each.answered_at >= UNANSWERED_SECONDS for each in intakes)

    def _notes(self) -> dict[str, Any]:
        """As the leader: notes about each queue for the other schedulers."""
        intakes = self._intakes if self._lead.store() else {}
        return {queue_key: intake.notes() for queue_key, intake in intakes.items()}

    def _follow(self, beat: Heartbeat) -> None:
        if not self._lead.store():
            for queue_key, noted in beat.notes.items():
                if intake := self._intakes.get(queue_key):
                    intake.read_notes(noted)
            if beat.leader != self._leader:
                log.info(event("following", leader=beat.leader or "nobody"))
        self._leader = beat.leader
        self.has_heard = True
        self.is_alone = beat.schedulers.keys() == {self._rows.name}
        self._compare(beat.schedulers)

    def _compare(self, schedulers: Mapping[str, str]) -> None:
        """Find schedulers whose settings differ from ours although they must be equal."""
        ours = comparable_settings(schedulers.get(self._rows.name, ""))
        strangers = {}
        for name, text in schedulers.items():
            theirs = comparable_settings(text)
            for setting in sorted(ours.keys() & theirs.keys()):  # older versions report fewer
                if theirs[setting] != ours[setting]:
                    both = f"{setting} ({theirs[setting] or 'none'} there, {ours[setting] or 'none'} here)"
                    strangers[name, setting] = f"scheduler {name} has another {both}: {ALIKE[setting]}"
        for name, setting in sorted(strangers.keys() - self._differences.keys()):
            log.error(event("disagreed", scheduler=name, setting=setting, reason=strangers[name, setting]))
        self._differences = strangers

    # -- jobs that became ready

    def _note_offers(self, offers: int, heard: int) -> None:
        """Offer everything if an offer was lost. `offers`: Redis's count; `heard`: our count before we asked Redis.
        More may have come since."""
        with self._lock:
            if heard <= offers <= self._offers:
                return
            self._offers = offers  # before the offer itself, else the next heartbeat offers everything again
            self._to_offer.add(ALL)
        self.offers.wake()

    def offer(self, now: float) -> float:
        """Offer jobs that became ready to the claims parked here."""
        with self._lock:
            rule_sets, self._to_offer = self._to_offer, set()
        if rule_sets:
            try:
                self._dispatcher.offer_again(None if ALL in rule_sets else rule_sets)
            except StoreUnavailable:
                with self._lock:
                    self._to_offer |= rule_sets
                raise
        return MAX_BACKOFF_SECONDS

    # -- messages of other schedulers

    def listen(self, now: float) -> float:
        """Receive messages until the connection breaks."""
        try:
            for news in self._rows.news(self._is_over):
                self._receive(news)
        except StoreUnavailable as error:
            log.debug(event("unheard", reason=str(error)))
        return STORE_AGAIN_SECONDS

    def _is_over(self) -> bool:
        """Called before each read, which ends within a second."""
        self.news.step()
        return self._over.is_set()

    def _receive(self, news: Any) -> None:
        try:
            match news:
                case {"offer": int(offer), "rule_sets": rule_sets}:
                    self._receive_offer(offer, rule_sets)
                case {"offer": _}:
                    raise ValueError("its count or its rule sets are missing")
                case {"left": _}:
                    self.turn.wake()
                case {"queue": str(queue_key)} if self._lead.store() and queue_key in self._intakes:
                    self._intakes[queue_key].receive(news)
        except ValueError as error:
            log.warning(event("unread", news=cut(repr(news), 200), reason=str(error)))

    def _receive_offer(self, offer: int, rule_sets: object) -> None:
        # Also for offers of our own, because the answer of the script may have been lost.
        named = rule_sets if isinstance(rule_sets, list) else [ALL]
        with self._lock:
            self._to_offer.update(named)
            if offer == self._offers + 1:
                self._offers = offer
        self.offers.wake()


#: The store publishes this instead of rule sets when there are too many.
ALL = "*"


#: Settings that must be equal at all schedulers on one Redis, and the consequence if they differ.
ALIKE: Mapping[str, str] = {
    "SCHEDULER_QUEUES": "the leader serves only its own queues: set them equal",
    "STACK_FILE": "the leader uses its own file; make the files equal, and reload each scheduler (SIGHUP)",
    "POLICY_FILE": "the leader uses its own file; make the files equal, and reload each scheduler (SIGHUP)",
}


def comparable_settings(text: str) -> dict[str, str]:
    """From a scheduler's report, the settings that must be equal; empty if it cannot be read."""
    with suppress(ValueError):
        match json.loads(text):
            case {"queues": str(queues), **more}:
                files: Any = more.get("files")
                hashes = files if isinstance(files, dict) else {}
                return {"SCHEDULER_QUEUES": queues} | {name: str(hashes[name]) for name in hashes.keys() & ALIKE.keys()}
    return {}


# --- Policy ---
# The processes that run the policy, and the tasks that ask it about jobs.

#: Seconds for a policy file to load; and for an answer, before the process is killed.
LOAD_SECONDS, ANSWER_SECONDS = 30.0, DECIDE_SECONDS + STUBBORN_SECONDS + 1.5
#: Largest answer, and largest output of a policy that is kept for an operator.
POLICY_ANSWER_BYTES, PRINTED_BYTES = 256 * 1024, 16 * 1024
#: Seconds after which the policy is loaded again if no process runs it; and after which the second process is ended if
#: it was not used. A new version that does not load is not tried again while an older one runs.
RELOAD_SECONDS, IDLE_CHILD_SECONDS = 30.0, 300.0
#: Greatest age of the table of holds, for whether the policy is suspended.
HOLDS_AGE_SECONDS = 0.5
#: The variables of our environment for a policy's process: none that may be a secret.
CHILD_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONUTF8", "LD_LIBRARY_PATH")
#: Shorter values of a job's variables are not removed from a reason, because they occur in many words.
SHORT_VALUE = 6


class PolicyProblem(NamedTuple):
    """An error in a policy file, in a form that everybody may see."""

    #: The exception's type, or a short text.
    type: str
    file: str
    line: int

    def __str__(self) -> str:
        """ "KeyError at policy.py:12"."""
        return f"{self.type} at {self.file}:{self.line}" if self.line else f"{self.type} in {self.file}"


class PolicyFailed(Exception):
    """A policy raised, took too long, or returned something invalid. `traceback`, `printed`: only for operators."""

    def __init__(self, trouble: PolicyProblem, traceback: str = ""):
        super().__init__(str(trouble))
        self.trouble, self.traceback = trouble, traceback
        self.printed = ""


class PolicyUnavailable(Exception):
    """No process with the policy runs now."""


class PolicyProcess:
    """A process that runs one version of a policy file, and decides about one job at a time.

    It is started, not forked, so it has none of our memory; of our file descriptors it has only the two pipes.
    """

    def __init__(
        self, path: str, source: bytes, fleet: Callable[[], Mapping[str, Any]], *, keeps_printed: bool = False
    ):
        """`fleet` returns the fleet when the policy uses it. `keeps_printed`: keep its output; else it is
        dropped."""
        self.path, self._fleet = path, fleet
        self.policy = policy_hash(source)
        self.is_over = False
        self.used_at = time.monotonic()
        self._printed = bytearray()
        answers, theirs = os.pipe()
        out = subprocess.PIPE if keeps_printed else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), POLICY_CHILD, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                env={name: os.environ[name] for name in CHILD_VARIABLES if name in os.environ},
            )
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin
        self._asks, self._answers = self._process.stdin.fileno(), answers
        for descriptor in (self._asks, self._answers):
            os.set_blocking(descriptor, False)
        self._reader: threading.Thread | None = None
        if keeps_printed:
            self._reader = threading.Thread(target=self._read_printed, name="policy's output", daemon=True)
            self._reader.start()
        self._rest = b""
        self._source = source

    def load(self) -> None:
        """Load the file. Raises PolicyFailed."""
        try:
            answer = self._exchange({"path": self.path, "source": self._source.decode("latin-1")}, LOAD_SECONDS)
            if "loaded" not in answer:
                raise self._failed(answer)
        except PolicyFailed:
            self.close()
            raise

    def ask(self, question: Mapping[str, Any]) -> Decision:
        """The policy's decision. Raises PolicyFailed; the process may then have ended."""
        self.used_at = time.monotonic()
        answer = self._exchange(question, ANSWER_SECONDS)
        while "fleet" in answer:
            answer = self._exchange(self._fleet(), ANSWER_SECONDS)
        try:
            return Decision.read(answer["decision"])
        except (ValueError, TypeError, KeyError):
            raise self._failed(answer) from None

    def _failed(self, answer: Mapping[str, Any]) -> PolicyFailed:
        match answer:
            case {"trouble": {"type": str(kind), "file": str(file), "line": int(line)}, "traceback": str(traceback)}:
                return PolicyFailed(PolicyProblem(brief_word(kind), brief_word(file), line), traceback)
        return self._told("no decision")

    def _told(self, what: str) -> PolicyFailed:
        return PolicyFailed(PolicyProblem(what, os.path.basename(self.path), 0))

    def _exchange(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a question and wait for the answer. A process that does not answer is killed."""
        ends_at = time.monotonic() + seconds
        if self.is_over:
            raise self._told("its process has ended")
        try:
            self._send(json.dumps(question).encode() + b"\n", ends_at)
            answer = json.loads(self._receive(ends_at))
        except TimeoutError:
            self.close()
            raise self._told("took too long") from None
        except (OSError, EOFError):
            self.close()
            raise self._told("its process has ended") from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            raise self._told("no decision")
        return answer

    def _send(self, text: bytes, ends_at: float) -> None:
        left = memoryview(text)
        while left:
            wait_for(self._asks, select.POLLOUT, ends_at)
            with suppress(BlockingIOError):
                left = left[os.write(self._asks, left[:65536]) :]

    def _receive(self, ends_at: float) -> bytes:
        text = self._rest
        while b"\n" not in text:
            wait_for(self._answers, select.POLLIN, ends_at)
            with suppress(BlockingIOError):
                if not (piece := os.read(self._answers, 65536)):
                    raise EOFError
                text += piece
            if len(text) > POLICY_ANSWER_BYTES:
                raise ValueError("its answer is too long")
        line, _, self._rest = text.partition(b"\n")
        return line

    def _read_printed(self) -> None:
        assert self._process.stdout
        while piece := os.read(self._process.stdout.fileno(), 65536):
            self._printed += piece[: PRINTED_BYTES - len(self._printed)]

    def close(self) -> str:
        """End the process; return its output, if that was kept."""
        if not self.is_over:
            self.is_over = True
            self._process.kill()
            self._process.wait()
            if self._process.stdin:
                with suppress(OSError):
                    self._process.stdin.close()
            os.close(self._answers)
            if self._reader:
                # A process started by the policy may still have the output open.
                self._reader.join(1.0)
                if self._process.stdout and not self._reader.is_alive():
                    self._process.stdout.close()
        return bytes(self._printed).decode("utf-8", "replace")


def wait_for(descriptor: int, what: int, ends_at: float) -> None:
    """Wait until it can be read or written; TimeoutError at `ends_at` (monotonic)."""
    poll = select.poll()
    poll.register(descriptor, what)
    if not poll.poll(max(0.0, ends_at - time.monotonic()) * 1000):
        raise TimeoutError


def policy_hash(source: bytes) -> str:
    """The name of a policy file's version: a hash of its text."""
    return hashlib.sha256(source).hexdigest()[:12]


def brief_word(text: str) -> str:
    """A name that a policy may have chosen (exception, file), checked and cut."""
    return visible(cut(text, TROUBLE_LETTERS))


def safe_reason(text: str, spec: JobSpec, known: Collection[str]) -> str:
    """A policy's reason in the form for storage: without values of the job's variables and command, escaped, and cut.

    A value stays if it is public (`known`), like the branch. A short value stays unless it is the whole reason.
    Of a value's forms, only its escaped ones (repr, JSON) are recognized.
    """
    values = {spec.command, *spec.env.values()}
    hidden = {part.strip() for value in values for part in (value, *value.splitlines())} - set(known)
    if text.strip() in hidden:
        text = "(a variable of the job, which is not shown)"
    found = (value for value in hidden if SHORT_VALUE <= len(value) <= len(text))
    for value in sorted(found, key=len, reverse=True):
        for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1]):
            text = text.replace(form, "…")
    return visible(text)[:REASON_LETTERS]


class FairLock:
    """A fair lock: the thread that has waited longest gets it next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the next two
        self._is_taken = False
        self._waiting: collections.deque[threading.Event] = collections.deque()

    def __enter__(self) -> None:
        mine = threading.Event()
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False


class Policy(Part):
    """The policy in force, and its two processes: one for all jobs, one for jobs for which it failed before.

    They run while this scheduler leads. If a new file does not load, the previous one stays in force.
    """

    def __init__(self, path: str, lead: Leadership, dispatcher: Dispatcher, now: Callable[[], float]):
        """Raises SettingsError when the file cannot be read."""
        self.path, self._lead, self._dispatcher, self._now = os.path.abspath(path), lead, dispatcher, now
        self._lock = threading.Lock()  # guards what follows
        self._source = read_policy(path)
        self._wanted: bytes | None = None
        self._processes: dict[str, PolicyProcess] = {}
        self._turns = {step: FairLock() for step in ASKING_STEPS}
        self.task = PeriodicTask("policy", self.load, now)
        self.again = PeriodicTask("policy again", self.ask_again, now)
        #: The `PolicyAsker` of each queue.
        self.askers: list[PolicyAsker] = []
        #: The file's problem; "" if there is none.
        self.problem = ""
        self.tasks = [self.task, self.again]
        lead.tasks += self.tasks
        self._holds: Sequence[Hold] = ()
        self._holds_read_at = -math.inf  # monotonic

    @property
    def problems(self) -> list[str]:
        off = [f"POLICY_FILE: the policy is suspended: {hold}" for hold in self._suspended(self._now())]
        return [*filter(None, [self.problem]), *off, *super().problems]

    def metrics(self, now: float) -> list[Metric]:
        failed = [([asker.queue_key], float(asker.failed)) for asker in self.askers]
        return [
            gauge(
                "stack_policy_loaded",
                "Whether a policy runs here; it does if this scheduler leads.",
                [],
                [((), float(self.is_loaded))],
            ),
            gauge(
                "stack_policy_failed_jobs", "Jobs that are held because the policy failed for them.", ["queue"], failed
            ),
        ]

    def in_force(self, now: float) -> str | None:
        """The version in force; None while an operator has suspended the policy."""
        return None if self._suspended(now) else self.hash

    def _suspended(self, now: float) -> list[Hold]:
        return [hold for hold in self.holds() if hold.target == POLICY_TARGET and not is_over(hold, now)]

    def holds(self, max_age_seconds: float = HOLDS_AGE_SECONDS) -> Sequence[Hold]:
        """The table of holds, read again if the last read is older: another scheduler may have changed it."""
        read_at = time.monotonic()
        if read_at - self._holds_read_at > max_age_seconds:
            self._holds, self._holds_read_at = self._lead.always.rows.holds().rows, read_at
        return self._holds

    @property
    def hash(self) -> str:
        """The version in force."""
        return policy_hash(self._source)

    @property
    def is_loaded(self) -> bool:
        return FIRST_ASKED in self._processes

    def reload(self) -> None:
        """Use the current file, and what it imports, once it has loaded.

        Raises SettingsError when the file cannot be read.
        """
        source = read_policy(self.path)
        with self._lock:
            self._wanted = source
        self.task.wake()

    def load(self, now: float) -> float:
        """The task's tick: load a new version or start a missing process; end processes that are not needed."""
        is_leading = self._lead.store() is not None
        if not is_leading:
            self._close_all()
        with self._lock:
            wanted, self._wanted = self._wanted, None
            again = self._processes.get(ASKED_AGAIN)
        if again and time.monotonic() - again.used_at > IDLE_CHILD_SECONDS:
            with self._turns[ASKED_AGAIN]:
                self._end(again)
        if wanted is None and (self.is_loaded or not is_leading):
            return RELOAD_SECONDS if is_leading else FOLLOWING_SECONDS
        source = self._source if wanted is None else wanted
        try:
            process = self._started(source)
        except PolicyFailed as error:
            is_kept = self.is_loaded or not is_leading
            kept = f"; version {self.hash} stays in force" if is_kept else "; its jobs wait, undecided"
            self._note(f"POLICY_FILE: {self.path}: version {policy_hash(source)} does not load: {error}{kept}")
            return RELOAD_SECONDS
        with self._turns[FIRST_ASKED], self._turns[ASKED_AGAIN], self._lock:
            old, self._processes = self._processes, {FIRST_ASKED: process}
            self._source, self.problem = source, ""
        for each in old.values():
            each.close()
        if not is_leading:
            self._close_all()  # it was loaded only as a test
        log.info(event("loaded", policy=self.path, version=self.hash))
        for asker in self.askers:
            asker.task.wake()
        return 0.0 if self._wanted else RELOAD_SECONDS

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.error(event("unloaded", policy=self.path, reason=problem))
        self.problem = problem

    def _started(self, source: bytes) -> PolicyProcess:
        self.task.step()
        try:
            process = PolicyProcess(self.path, source, self._fleet)
        except OSError as error:
            raise PolicyFailed(PolicyProblem(f"no process could be started: {error}", self.path, 0)) from None
        process.load()
        return process

    def decide(self, question: Mapping[str, Any], step: str) -> tuple[Decision, str]:
        """The policy's decision, and the version that decided. Raises PolicyFailed, and PolicyUnavailable.

        The lock is fair, so queues take turns.
        """
        with self._turns[step]:
            process = self._process(step)
            try:
                return process.ask(question), process.policy
            finally:
                if process.is_over:
                    self._end(process)

    def _process(self, step: str) -> PolicyProcess:
        if not self.is_loaded:
            raise PolicyUnavailable
        found = self._processes.get(step)
        if found is None:  # the second process, only for jobs for which the policy failed
            try:
                found = self._started(self._source)
            except PolicyFailed as error:
                raise PolicyUnavailable from error
            with self._lock:
                self._processes[step] = found
        return found

    def _end(self, process: PolicyProcess) -> None:
        process.close()
        with self._lock:
            self._processes = {step: each for step, each in self._processes.items() if each is not process}
        self.task.wake()

    def ask_again(self, now: float) -> float:
        """Ask again about jobs for which the policy failed: a few of each queue, in turn."""
        if not self._lead.store():
            return FOLLOWING_SECONDS
        asked = [asker.ask_again(self.again) for asker in self.askers]
        return 0.0 if any(asked) else POLICY_LOOK_SECONDS

    def _fleet(self) -> Mapping[str, Any]:
        now = self._now()
        return fleet_json(Fleet(self._lead.always, self._dispatcher, now), now)

    def try_out(self, question: Mapping[str, Any]) -> tuple[Decision, str]:
        """For an operator: the decision of a separate process about a job, and its output. Changes nothing."""
        process = PolicyProcess(self.path, self._source, self._fleet, keeps_printed=True)
        try:
            process.load()
            decision = process.ask(question)
        except PolicyFailed as error:
            error.printed = process.close()
            raise
        return decision, process.close()

    def _close_all(self) -> None:
        """End both processes, but not during a question: its job would count as failed."""
        with self._turns[FIRST_ASKED], self._turns[ASKED_AGAIN], self._lock:
            processes, self._processes = self._processes, {}
        for process in processes.values():
            process.close()

    def stop(self) -> None:
        """End the processes. The tasks have stopped already."""
        for asker in self.askers:
            asker.stop()
        self._close_all()

    # -- routes

    def tell_decision(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/decide: the decision of the policy in force about a job. Changes nothing."""
        job = self._lead.always.get(request.uuid)
        asker = next((each for each in self.askers if job and each.queue_key == job.queue_key), None)
        if job is None or asker is None:
            raise unknown_job(request.uuid)
        answer: dict[str, Any] = {
            "uuid": job.uuid,
            "state": job.state,
            "decision": None,
            "failed": None,
            "traceback": None,
        }
        try:
            decision, answer["printed"] = asker.try_out(job, self._lead.always)
            answer["decision"] = dataclasses.asdict(decision)
        except BuildkiteError as error:
            message = f"job {job.uuid} was not decided: its spec cannot be fetched: {error}"
            raise Refusal(message, status=502, code="upstream_down") from None
        except PolicyFailed as error:
            answer |= {"failed": str(error), "traceback": error.traceback, "printed": error.printed}
        return Answer(200, answer)

    def switch(self, request: Request) -> Answer:
        """POST /policy {"state": "off" or "on", "note", "seconds" or "until", "dry_run"}"""
        now, state, note, store = self._now(), request.text("state"), note_of(request), self._lead.always
        if state not in ("off", "on"):
            raise Refusal(f"`state` is {state[:100]!r}; it may be off or on", code="bad_body")
        until, was = until_of(request.body, now), "off" if self._suspended(now) else "on"
        act = OperatorAct(now, request.operator, f"policy_{state}", POLICY_TARGET, note)
        wanted = Hold(POLICY_TARGET, OPERATOR, POLICY_OFF, now, until, request.operator, note)
        if not request.flag("dry_run"):
            if state == "off":
                store.hold(wanted, act, replace=True, now=now)
            else:
                store.lift(POLICY_TARGET, [OPERATOR], act)
            self._holds_read_at = -math.inf
            log.warning(event(act.act, by=request.operator, until=rfc3339(until), note=note))
        end = f"until {rfc3339_seconds(until)}" if until else "until somebody turns it on"
        message = "the policy decides" if was == "off" else "the policy was already on"
        if state == "off":
            message = f"the policy is off {end}: jobs that it has not decided run by their own rules"
        return Answer(200, {"state": state, "was": was, "message": message})

    routes = (
        Route("POST", "/jobs/{uuid}/decide", tell_decision, OPERATORS),
        Route("POST", "/policy", switch, OPERATORS),
    )


#: Specs that are fetched at the same time, for one queue; and per tick.
SPECS_AT_ONCE, SPECS_IN_A_TICK = 16, 64
#: Decisions written together; seconds that a tick waits for specs before it looks for other jobs.
DECIDED_TOGETHER, SPEC_PATIENCE_SECONDS = 20, 0.2
#: Jobs of a queue that are tried again in one turn after the policy failed for them.
AGAIN_IN_A_TURN = 4
#: Seconds between two checks whether a policy's hold, or the time of an `avoid`, is over.
POLICY_LOOK_SECONDS = 1.0
#: If a job's spec cannot be fetched, try again after this, doubled each time up to the second.
SPEC_AGAIN_SECONDS, MAX_SPEC_AGAIN_SECONDS = 2.0, 300.0
#: Number of earlier jobs that a policy sees.
EARLIER_JOBS = 20


class PolicyAsker:
    """Asks the policy about the jobs of one queue while this scheduler leads.

    A job's spec is asked of the source for each question, and not kept here.
    """

    def __init__(  # noqa: PLR0913  it needs all of these
        self,
        policy: Policy,
        source: Source,
        intake: Intake,
        lead: Leadership,
        dispatcher: Dispatcher,
        now: Callable[[], float],
    ):
        self.queue_key, self._policy, self._source, self._intake = source.queue_key, policy, source, intake
        self._lead, self._dispatcher, self._now = lead, dispatcher, now
        self.task = PeriodicTask(f"{source.queue_key} policy", self.ask, now)
        policy.askers.append(self)
        self._pool = concurrent.futures.ThreadPoolExecutor(SPECS_AT_ONCE, f"{source.queue_key} spec")
        # The store (of a term) and version of the policy to which all waiting jobs were last adapted.
        self._reviewed: tuple[Store, str | None] | None = None
        # Jobs whose specs are being fetched, by step; each used by one task only.
        self._fetching: dict[str, dict[concurrent.futures.Future[JobSpec | BuildkiteError], str]] = {
            step: {} for step in ASKING_STEPS
        }
        self._lock = threading.Lock()  # guards what follows
        self._put_off: dict[
            str, tuple[float, int]
        ] = {}  # jobs without a spec: until when to wait, and number of failures
        self._failed: dict[str, str] = {}  # jobs held because the policy failed for them, with its error

    @property
    def failed(self) -> int:
        """The number of jobs held because the policy failed for them, as far as this scheduler knows."""
        return len(self._failed)

    @property
    def problems(self) -> list[str]:
        with self._lock:
            failed = list(self._failed.items())
        if not failed:
            return []
        first = f"the first is {failed[0][0]}, {failed[0][1]}"
        return [f"queue {self.queue_key}: jobs held because POLICY_FILE failed for them: {len(failed)}; {first}"]

    def on_move(self, move: Move) -> None:
        """A job has moved."""
        job = move.job
        with self._lock:
            self._failed.pop(job.uuid, None)
            if job.state is JobState.READY and job.held_reason == POLICY_FAILED and len(self._failed) < MANY_ASIDE:
                self._failed[job.uuid] = (job.decision or {}).get("reason", "")
        if job.state is JobState.READY and job.held_reason == UNDECIDED:
            self.task.wake()

    def ask(self, now: float) -> float:
        """Adapt waiting jobs to the policy in force, and ask it about undecided jobs."""
        store = self._lead.store()
        if not store:
            return FOLLOWING_SECONDS
        self._review(store, now)
        over = store.policy_steps(self.queue_key, END_AVOID, now, SLICE)
        self._offer(store.end_avoid(over, now))
        if store.policy(now) is None:
            due = [uuid for step in ASKING_STEPS for uuid in store.policy_steps(self.queue_key, step, now, SLICE)]
            self._offer(store.review(due, now))
            return POLICY_LOOK_SECONDS
        return 0.0 if self._ask(store, FIRST_ASKED, SPECS_IN_A_TICK, self.task) else POLICY_LOOK_SECONDS

    def ask_again(self, task: PeriodicTask) -> bool:
        """Ask about jobs for which the policy has failed; return whether there were some."""
        store = self._lead.store()
        is_there = store is not None and store.policy(self._now()) is not None
        return bool(store and is_there and self._ask(store, ASKED_AGAIN, AGAIN_IN_A_TURN, task))

    def _review(self, store: Store, now: float) -> None:
        version = store, store.policy(now)
        if version == self._reviewed:
            return
        store.windows.settled()  # wait until decisions with the previous version are written
        after: tuple[int, float, str] | None = None
        while page := store.page(JobState.READY, after, SLICE, self.queue_key):
            self.task.step()
            self._offer(store.review([job.uuid for job in page], now))
            after = page[-1].order
        self._reviewed = version

    def _offer(self, jobs: Iterable[Job]) -> None:
        self._dispatcher.offer([job for job in jobs if job.state is JobState.READY and not job.held_by])

    def _ask(self, store: Store, step: str, limit: int, task: PeriodicTask) -> int:
        """Ask about the next jobs in line; return the number of jobs asked about or still being fetched."""
        if not self._policy.is_loaded:
            return 0
        uuids = self._next(store, step, limit)
        if self._is_held():  # read the holds after the jobs, so that a job of a held queue is not asked about
            return 0
        fetching = self._fetching[step]
        for uuid in uuids:
            fetching[self._pool.submit(self._fetch, uuid)] = uuid
        asked, failed = 0, list[BuildkiteError]()
        while fetching:
            task.step()
            done = concurrent.futures.wait(fetching, SPEC_PATIENCE_SECONDS, concurrent.futures.FIRST_COMPLETED).done
            if not done:
                break  # do not let new jobs wait for these
            specs = {fetching.pop(each): each.result() for each in list(fetching) if each in done}
            failed += [spec for spec in specs.values() if isinstance(spec, BuildkiteError)]
            asked += self._decide(store, specs, step, task)
        if failed and not asked and (len(failed) > 1 or failed[0].status in (0, 401, 429)):
            raise failed[0]  # the failure does not concern a single job
        return asked + len(fetching)

    def _decide(
        self, store: Store, specs: Mapping[str, JobSpec | BuildkiteError], step: str, task: PeriodicTask
    ) -> int:
        """Ask the policy about these jobs, and store its decisions; return the number of questions."""
        moves: dict[str, Callable[[Job], Move | None]] = {}
        asked = 0
        for uuid, spec in specs.items():
            if isinstance(spec, BuildkiteError):
                self._put_off_job(uuid, spec)
                continue
            if not ((job := store.get(uuid)) and is_to_be_decided(job)):
                continue
            task.step()
            try:
                moves[uuid] = self._decided(store, job, spec, step)
            except PolicyUnavailable:
                break  # the policy's task wakes us when its process runs again
            except (StoreUnavailable, Fenced):
                raise
            except Exception as error:  # go on with other jobs; do not log the text, which may contain secrets
                text = f"a bug of the scheduler ({type(error).__name__})"
                log.error(event("failed", job=uuid, reason=f"{text}; please report it"))
                moves[uuid] = self._failed_move(text)
            asked += 1
            if len(moves) >= DECIDED_TOGETHER:
                self._write(store, moves)
                moves = {}
        self._write(store, moves)
        return asked

    def _is_held(self) -> bool:
        """Whether operators or Buildkite hold the whole queue: then we ask nothing."""
        return blocked(RuleSet.of(self.queue_key, ()), None, self._policy.holds(0.0), self._now()) is not None

    def _next(self, store: Store, step: str, limit: int) -> list[str]:
        now = self._now()
        with self._lock:
            left = {uuid for uuid, (until, _) in self._put_off.items() if until > now}
        left |= {*self._fetching[step].values()}
        listed = store.policy_steps(self.queue_key, step, now, limit + len(left))
        return [uuid for uuid in listed if uuid not in left][: limit - len(self._fetching[step])]

    def _fetch(self, uuid: str) -> JobSpec | BuildkiteError:
        try:
            return self._source.show_job(uuid)
        except BuildkiteError as error:
            return error

    def _put_off_job(self, uuid: str, error: BuildkiteError) -> None:
        """The job's spec cannot be fetched: handle other jobs first."""
        with self._lock:
            failures = self._put_off.pop(uuid, (0.0, 0))[1] + 1
            seconds = min(SPEC_AGAIN_SECONDS * 2 ** min(failures - 1, 16), MAX_SPEC_AGAIN_SECONDS)
            self._put_off[uuid] = self._now() + seconds * random.uniform(1.0, 1.2), failures
            if len(self._put_off) > MANY_ASIDE:
                del self._put_off[next(iter(self._put_off))]
        log.warning(event("undecided", job=uuid, queue=self.queue_key, retry_in_s=f"{seconds:.0f}", reason=str(error)))
        if error.status == 404:
            self._intake.check_soon(uuid)

    def _decided(self, store: Store, job: Job, spec: JobSpec, step: str) -> Callable[[Job], Move | None]:
        """The move for the policy's decision."""
        try:
            question = question_of(job, spec, store, self._now())
            decision, version = self._policy.decide(question, step)
            if decision.verb == "succeed" and not self._source.can_succeed:
                return self._failed_move(
                    f"it decided succeed, but jobs of queue {self.queue_key} can only be cancelled"
                )
        except PolicyFailed as failed:
            reason = safe_reason(str(failed.trouble), spec, [])
            return self._failed_move(reason)
        finally:
            with self._lock:
                self._put_off.pop(job.uuid, None)
        kept = dataclasses.replace(decision, reason=safe_reason(decision.reason, spec, known_values(job)))
        known, decided_at = known_of(job, spec), self._now()
        return lambda job: decide(job, kept, version, known, decided_at)

    def _failed_move(self, reason: str) -> Callable[[Job], Move | None]:
        version, jitter, now = self._policy.hash, random.uniform(1.0, 1.2), self._now()
        return lambda job: fail_to_decide(job, reason, version, jitter, now)

    def _write(self, store: Store, moves: Mapping[str, Callable[[Job], Move | None]]) -> None:
        if not moves:
            return
        decided = store.decide(moves, self._now())
        self._offer(decided)
        if any(job.finish_detail is not None for job in decided):
            self._intake.finish.wake()

    def try_out(self, job: Job, store: Store) -> tuple[Decision, str]:
        """For an operator: the policy's decision about a job, and its output. Changes nothing.

        Raises BuildkiteError and PolicyFailed.
        """
        return self._policy.try_out(question_of(job, self._source.show_job(job.uuid), store, self._now()))

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def question_of(job: Job, spec: JobSpec, store: Store, now: float) -> dict[str, Any]:
    """A job in the form for the policy's process: see `PolicyJob`."""
    build, known = job.about.get("build", {}), known_of(job, spec)
    earlier = store.chained(known["chain"], EARLIER_JOBS + 1) if known["chain"] else []
    return {
        "uuid": job.uuid,
        "queue": job.queue_key,
        "rules": job.agent_query_rules,
        "priority": job.listed_priority,
        "scheduled_at": job.scheduled_at,
        "pipeline": job.about.get("pipeline", {}).get("slug"),
        "branch": build.get("branch"),
        "build_number": build.get("number"),
        "step_key": job.about.get("step", {}).get("key"),
        "env": spec.env,
        "command": spec.command,
        "retry_count": known["retry_count"],
        "parallel_job": known["parallel_job"],
        "previous": [earlier_job(each) for each in earlier if each.uuid != job.uuid and each.put_at <= job.put_at],
        "held_for": max(0.0, now - held_since(job, now)),
    }


def known_of(job: Job, spec: JobSpec) -> dict[str, Any]:
    """The stored fields from a job's spec, and `chain`, equal for a job and its retries (None: no step key)."""
    parallel_job, retry_count = (
        whole_of(spec.env.get(f"BUILDKITE_{name}")) for name in ("PARALLEL_JOB", "RETRY_COUNT")
    )
    build, step = job.about.get("build", {}).get("uuid"), job.about.get("step", {}).get("key")
    shared = f"{build} {parallel_job} {step}".encode(errors="replace")
    chain = hashlib.sha256(shared).hexdigest()[:32] if build and step else None
    return {"parallel_job": parallel_job, "retry_count": retry_count, "chain": chain}


def earlier_job(job: Job) -> dict[str, Any]:
    last = job.tries[-1] if job.tries and job.host is None else {}
    return {
        "uuid": job.uuid,
        "host": job.host or last.get("host") or "",
        "worker": job.worker or last.get("worker") or "",
        "acquired": job.acquired_at is not None,
        "ended": job.outcome or job.state,
    }


def known_values(job: Job) -> list[str]:
    """The public values of a job, which may also be in its variables."""
    values = [value for part in job.about.values() for value in part.values()]
    return [str(value) for value in (job.uuid, job.queue_key, *values) if value is not None]


def fleet_json(fleet: Fleet, now: float) -> dict[str, Any]:
    """The fleet in the form for the policy's process: see `PolicyFleet`."""
    states = fleet.stats["states"]
    return {
        "time": now,
        "age": 0.0,
        "counts": {state: states[state] for state in JobState if state is not JobState.DONE},
        "waiting": fleet.stats["waiting"],
        "workers": [
            [
                member.worker.name,
                member.worker.host,
                member.doing,
                sorted(member.worker.profile.queue_keys),
                sorted(member.worker.profile.tags),
            ]
            for member in fleet.members
            if member.is_live
        ],
    }


def read_policy(path: str) -> bytes:
    """A policy file's text. Raises SettingsError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"POLICY_FILE: {path} cannot be read: {error.strerror}") from None


def check_policy(path: str) -> list[str]:
    """Problems of a policy file, found by loading it in a separate process. Without a job there are no secrets, so the
    error's text can be shown."""
    try:
        process = PolicyProcess(os.path.abspath(path), read_policy(path), dict)
        process.load()
        process.close()
    except SettingsError as error:
        return [str(error)]
    except PolicyFailed as error:
        return [f"POLICY_FILE: {path} does not load: {error}", *error.traceback.splitlines()[-1:]]
    except OSError as error:
        return [f"POLICY_FILE: no process could be started to load it: {error}"]
    return []


# --- Periodic builds ---
# A start is stored as `wanted`, then as `asked` before we ask Buildkite for the build, and as `built` when the build
# exists. If a start is still `asked`, its build may exist: we search for it by its mark before we ask again.

#: Seconds between two checks of the last build of a schedule.
FOLLOW_SECONDS = 60.0
#: The search for a build begins so long before we asked for it, because our clock may have been fast.
LOOK_SECONDS_BACK = 2 * 3600.0
#: Refusals that may end without a change of the file: such starts are tried again.
PASSING_REFUSALS = frozenset({401, 403, 404, 429})


@dataclasses.dataclass
class Tries:
    """What this process remembers of a start. Times are monotonic: a step of the clock changes no wait."""

    #: Since when it is unknown if there is a build; or since when this process knows the start.
    unclear_since: float
    again_at: float = 0.0
    failures: int = 0


class PeriodicBuilds(Part):
    """Starts the builds of each [[periodic]] when they are due, while this scheduler leads."""

    def __init__(
        self, file: Callable[[], StackFile], lead: Leadership, rest: RestApi, graph: GraphApi, now: Callable[[], float]
    ):
        """`file`: returns the content of the STACK_FILE in force."""
        self._file, self._lead, self._rest, self._graph, self._now = file, lead, rest, graph, now
        self.task = PeriodicTask("periodic", self.tick, now)
        self.tasks = [self.task]
        lead.tasks += self.tasks
        # Used by the task only.
        self._file_seen: StackFile | None = None
        self._tries: dict[str, Tries] = {}  # by mark
        self._due: dict[str, tuple[str, float, float]] = {}  # by schedule: cache of its next due time
        self._followed_at: dict[str, float] = {}  # by the build's uuid, monotonic
        self._unfollowed: dict[str, str] = {}  # by the build's uuid: why its state is unknown

    # -- problems, metrics and routes

    @property
    def problems(self) -> list[str]:
        found = [*super().problems]
        with suppress(StoreUnavailable):
            for periodic, row in self._rows():
                uuid = row.build["uuid"] if row.build else ""
                if problem := problem_of(row) or self._unfollowed.get(uuid):
                    found.append(f"periodic {periodic.name}: {problem}")
        return found

    def _rows(self) -> list[tuple[Periodic, PeriodicRow]]:
        """Each [[periodic]] in the file, with its row."""
        periodics = self._file().periodic
        table = self._lead.always.timetable() if periodics else Timetable("", ())
        return [(periodic, table.of(periodic.name) or PeriodicRow(periodic.name)) for periodic in periodics]

    def metrics(self, now: float) -> list[Metric]:
        rows: list[PeriodicRow] = []
        with suppress(StoreUnavailable):
            rows = [row for _, row in self._rows()]
        builds = [((row.name,), row.build) for row in rows if row.build]
        started = [(name, build["started_at"]) for name, build in builds]
        delays = [(name, build["started_at"] - build["due_at"]) for name, build in builds if build["due_at"]]
        failures = [((row.name,), row.failures) for row in rows]
        label = ["schedule"]
        return [
            gauge("stack_periodic_last_start_timestamp_seconds", "When a periodic build last started.", label, started),
            gauge(
                "stack_periodic_delay_seconds", "Time from the due time of the last build to its start.", label, delays
            ),
            counter(
                "stack_periodic_failures",
                "How often Buildkite refused to make a periodic build, or gave no clear answer.",
                label,
                failures,
            ),
        ]

    def get_builds(self, request: Request) -> Answer:
        """GET /periodic"""
        now = self._now()
        return Answer(200, {"periodic": [periodic_json(periodic, row, now) for periodic, row in self._rows()]})

    def run(self, request: Request) -> Answer:
        """POST /periodic/{name}/run {"note"}"""
        refuse_dry_run(request)
        name, note, now = request.named, note_of(request), self._now()
        known = {periodic.name: periodic for periodic in self._file().periodic}
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3)
            message = f"STACK_FILE has no [[periodic]] named {name!r}"
            raise Refusal(message, status=404, code="unknown_periodic", more={"nearest": nearest})
        mark, act = secrets.token_hex(16), OperatorAct(now, request.operator, "run", f"periodic:{name}", note)

        def step(row: PeriodicRow | None) -> PeriodicRow | None:
            return wanted(row or begun(name, known[name].schedule, None, now), mark, None, request.operator, note)

        if self._lead.always.change_periodic(name, step, act, OPERATOR) is None:
            message = (
                f"{name}: Buildkite's answer to the last request for a build is not known yet; try again in a minute"
            )
            raise Refusal(message, status=409, code="start_unclear")
        log.warning(event("run", periodic=name, mark=mark, by=request.operator, note=note[:200]))
        self.task.wake()
        return Answer(200, {"name": name, "mark": mark, "message": "Buildkite is asked for a build"})

    routes = (
        Route("GET", "/periodic", get_builds, READER),
        Route("POST", "/periodic/{name}/run", run, OPERATORS),
    )

    # -- the task

    def tick(self, now: float) -> float:
        """Start builds that are due; return the seconds until the next tick."""
        store, file = self._lead.store(), self._file()
        if store is None:
            self._tries.clear()
            return FOLLOWING_SECONDS
        if not file.periodic and self._file_seen is file:
            return UPKEEP_SECONDS
        self._file_seen, rows = file, {row.name: row for row in store.timetable().rows}
        self._clean_up(store, rows, {periodic.name for periodic in file.periodic})
        for periodic in file.periodic:
            self.task.step()
            self._go_on(store, file.organization, periodic, rows.get(periodic.name))
        self._follow(store, rows)
        # Once a second, because the clock may be set.
        next_at = min((due_at for _, _, due_at in self._due.values()), default=math.inf)
        return min(max(0.0, next_at - self._now()), UPKEEP_SECONDS)

    def _clean_up(self, store: Store, rows: Mapping[str, PeriodicRow], names: Collection[str]) -> None:
        """Forget schedules that are not in the file any more, and the data of ended starts."""
        for name in rows.keys() - names:
            store.forget_periodic(name)
            log.info(event("forgotten", periodic=name, reason="it is not in STACK_FILE any more"))
        self._due = {name: due for name, due in self._due.items() if name in names}
        marks = {row.start["mark"] for row in rows.values() if row.start}
        self._tries = {mark: tries for mark, tries in self._tries.items() if mark in marks}

    def _go_on(self, store: Store, organization: str, periodic: Periodic, row: PeriodicRow | None) -> None:
        """Do what is due for one schedule. A failure of Buildkite does not delay the others."""
        now = self._now()
        row = self._begun(store, periodic, row, now)
        if not row.is_unclear and self._is_due(periodic, row, now):
            row = self._want(store, periodic, row, now)
        if row.start:
            self._start(store, organization, periodic, row)

    def _begun(self, store: Store, periodic: Periodic, row: PeriodicRow | None, now: float) -> PeriodicRow:
        """The schedule's row; made or reset if the schedule is new or has changed, or the clock went back by a day."""
        if row and row.schedule == periodic.schedule and row.looked_at <= now + CLOCK_SECONDS_BACK:
            return row
        begin = functools.partial(begun, periodic.name, periodic.schedule, now=now)
        made = store.change_periodic(periodic.name, begin)
        assert made
        log.info(event("begun", periodic=periodic.name, schedule=made.schedule, next=rfc3339(periodic.due_after(now))))
        return made

    def _is_due(self, periodic: Periodic, row: PeriodicRow, now: float) -> bool:
        known = self._due.get(periodic.name)
        if known is None or known[:2] != (row.schedule, row.looked_at):
            known = self._due[periodic.name] = (row.schedule, row.looked_at, periodic.due_after(row.looked_at))
        return known[2] <= now

    def _want(self, store: Store, periodic: Periodic, row: PeriodicRow, now: float) -> PeriodicRow:
        """Store that a build is due, or that its time was missed. Only the last of several due times counts."""
        due_at = periodic.last_due(row.looked_at, now)
        assert due_at
        mark, name = secrets.token_hex(16), periodic.name
        is_missed = periodic.missed == "none" and now - due_at > MISSED_SECONDS
        reason = f"no scheduler could start it within {MISSED_SECONDS:.0f} s after its due time"

        def step(row: PeriodicRow | None) -> PeriodicRow | None:
            due = wanted(row or PeriodicRow(name), mark, due_at)
            return unstarted(due, mark, "missed", reason, now) if is_missed else due

        after = store.change_periodic(name, step)
        word = "missed" if is_missed else "due"
        log.info(event(word, periodic=name, at=rfc3339(due_at), mark=None if is_missed else mark))
        return after or row

    def _start(self, store: Store, organization: str, periodic: Periodic, row: PeriodicRow) -> None:
        assert row.start
        mark, moment = row.start["mark"], time.monotonic()
        tries = self._tries.setdefault(mark, Tries(moment))
        if moment < tries.again_at or (row.is_unclear and moment < tries.unclear_since + UNCLEAR_SECONDS):
            return
        try:
            if row.is_unclear and (build := self._found(organization, periodic, row.start)):
                self._built(store, periodic.name, mark, build)
            elif not row.is_unclear and self._is_skipped(store, periodic, row):
                reason = f"build {row.build['number'] if row.build else ''} of this schedule is not over"
                store.change_periodic(periodic.name, lambda row: unstarted(row, mark, "skipped", reason, self._now()))
                log.info(event("skipped", periodic=periodic.name, mark=mark, reason=reason))
            else:
                self._ask(store, organization, periodic, row.start, tries)
        except BuildkiteError as error:
            self._failed(store, periodic.name, mark, error, is_clear=not row.is_unclear)

    def _is_skipped(self, store: Store, periodic: Periodic, row: PeriodicRow) -> bool:
        """Whether to skip a due build, because the schedule's last build is not over."""
        if not row.build or not row.start or row.start["due_at"] is None or periodic.if_running == "start":
            return False
        return (
            row.build["state"] not in BUILD_OVER and self._state(store, row.name, row.build["uuid"]) not in BUILD_OVER
        )

    def _found(self, organization: str, periodic: Periodic, start: Mapping[str, Any]) -> Build | None:
        """Search for the build of a start after an unclear answer; None if there is none."""
        pipeline, since = f"{organization}/{periodic.pipeline}", min(start["asked_at"], self._now()) - LOOK_SECONDS_BACK
        build = self._graph.build_marked(pipeline, periodic.branch, start["mark"], since, self.task.step)
        log.info(event("looked", periodic=periodic.name, mark=start["mark"], build=build.number if build else "none"))
        return build

    def _ask(self, store: Store, organization: str, periodic: Periodic, start: Mapping[str, Any], tries: Tries) -> None:
        """Ask Buildkite to make the build. From the first write on, the build may exist."""
        mark, name = start["mark"], periodic.name
        if not store.change_periodic(name, lambda row: asked(row, mark, self._now())):
            return  # another start has taken its place
        self.task.step()
        try:
            build = self._rest.create_build(organization, periodic.pipeline, build_body(periodic, start))
        except BuildkiteError as error:
            reason, tries.unclear_since = str(error), time.monotonic()
            is_clear = 400 <= error.status < 500 and error.status != http.HTTPStatus.REQUEST_TIMEOUT
            is_final = is_clear and error.status not in PASSING_REFUSALS
            self._failed(store, name, mark, error, is_clear=is_clear, is_final=is_final)
            if is_final:
                store.change_periodic(name, lambda row: unstarted(row, mark, "refused", reason, self._now()))
            return
        self._built(store, name, mark, build)

    def _built(self, store: Store, name: str, mark: str, build: Build) -> None:
        now = self._now()
        row = store.change_periodic(name, lambda row: built(row, mark, build._asdict(), now))
        if row is None or row.build is None:
            return  # another leader has found the build meanwhile
        due_at = row.build["due_at"]
        delay = f"{now - due_at:.1f}" if due_at else None
        log.info(event("started", periodic=name, mark=mark, build=build.number, url=build.url, delay_s=delay))

    def _failed(  # noqa: PLR0913  a start, and what Buildkite's answer means for it
        self, store: Store, name: str, mark: str, error: BuildkiteError, *, is_clear: bool, is_final: bool = False
    ) -> None:
        """Store the problem of a start; unless `is_final`, it is tried again later."""
        tries, problem = self._tries[mark], str(error)
        tries.failures += 1
        seconds = backoff_seconds(tries.failures, error.retry_after)
        tries.again_at = time.monotonic() + seconds
        if not is_clear:
            problem += "; the build may exist: the scheduler searches for it before it asks again"
        before = store.timetable().of(name)
        after = store.change_periodic(name, lambda row: unanswered(row, mark, problem, is_clear=is_clear))
        if after and (before is None or problem_of(before) != problem):
            needs_person = is_final or error.status in PASSING_REFUSALS - {http.HTTPStatus.TOO_MANY_REQUESTS}
            pause = None if is_final else f"{seconds:.1f}"
            level = logging.ERROR if needs_person else logging.WARNING
            log.log(level, event("failed", periodic=name, mark=mark, reason=problem, retry_in_s=pause))

    def _follow(self, store: Store, rows: Mapping[str, PeriodicRow]) -> None:
        """Check the last build of one schedule: the one that was checked longest ago.

        Only one per tick, so that a due schedule does not wait for many checks.
        """
        moment = time.monotonic()
        running = {row.build["uuid"]: row for row in rows.values() if row.build and is_followed(row)}
        self._followed_at = {uuid: self._followed_at.get(uuid, -math.inf) for uuid in running}
        self._unfollowed = {uuid: problem for uuid, problem in self._unfollowed.items() if uuid in running}
        uuid = min(self._followed_at, key=self._followed_at.__getitem__, default="")
        if not uuid or moment < self._followed_at[uuid] + FOLLOW_SECONDS:
            return
        self._followed_at[uuid], name = moment, running[uuid].name
        try:
            self._state(store, name, uuid)
        except BuildkiteError as error:
            self._unfollowed[uuid] = str(error)

    def _state(self, store: Store, name: str, uuid: str) -> str:
        """Get and store Buildkite's state of a build. Raises BuildkiteError."""
        self.task.step()
        state = self._graph.build_state(uuid) or BUILD_GONE
        self._unfollowed.pop(uuid, None)
        store.change_periodic(name, lambda row: seen(row, uuid, state))
        return state


def is_followed(row: PeriodicRow) -> bool:
    """Whether we must still check the last build."""
    return row.build is not None and row.start is None and row.build["state"] not in BUILD_ENDED


def problem_of(row: PeriodicRow) -> str:
    """The problem of a schedule as text; "" if there is none."""
    if row.start:
        return str(row.start["problem"])
    return str(row.unstarted["reason"]) if row.unstarted and row.unstarted["what"] == "refused" else ""


def build_body(periodic: Periodic, start: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the request for a build."""
    due_at = start["due_at"]
    cause = (
        f"due at {rfc3339_seconds(due_at)}" if due_at else f"started by {start['by'] or 'an operator'}: {start['note']}"
    )
    return {
        "commit": periodic.commit,
        "branch": periodic.branch,
        "message": periodic.message or cut(f"{periodic.name}, {cause}", DETAIL_BYTES),
        "env": periodic.env or {},
        "meta_data": {**(periodic.meta_data or {}), MARK_KEY: start["mark"], NAME_KEY: periodic.name},
    }


def periodic_json(periodic: Periodic, row: PeriodicRow, now: float) -> dict[str, Any]:
    """A schedule in the answer of GET /periodic."""
    next_at = periodic.due_after(max(now, row.looked_at))
    return {
        "name": periodic.name,
        "pipeline": periodic.pipeline,
        "branch": periodic.branch,
        "cron": periodic.cron,
        "schedule": periodic.schedule,
        "if_running": periodic.if_running,
        "missed": periodic.missed,
        "next_at": rfc3339(next_at) if next_at < math.inf else None,
        "start": with_times(row.start),
        "build": with_times(row.build),
        "unstarted": with_times(row.unstarted),
        "failures": row.failures,
        "problem": problem_of(row) or None,
    }


def with_times(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A copy with its times as RFC 3339."""
    if row is None:
        return None
    return {name: rfc3339(value) if name == "at" or name.endswith("_at") else value for name, value in row.items()}


# --- HTTP API ---

#: Limits of a request: its head, its body, and the wait of a claim.
HEAD_BYTES, BODY_BYTES, MAX_WAIT_SECONDS = 16 * 1024, 64 * 1024, 60.0
#: Limits of webhooks: size of a body (it may contain a build's jobs), bodies over BODY_BYTES that are read at once,
#: time to receive a smaller one, and age by its signature.
WEBHOOK_BYTES, WEBHOOKS, SMALL_WEBHOOK_SECONDS, WEBHOOK_SECONDS = 1024 * 1024, 8, 2.0, 300.0
#: Webhook events that may mean new jobs.
LISTED_AFTER = ("job.scheduled", "job.activated", "build.scheduled", "build.running")
#: Time limits of a connection: silence between two requests; and, each, the TLS handshake, the wait for the first byte,
#: and the whole request after its first byte.
SILENCE_SECONDS, ARRIVAL_SECONDS = 75.0, 10.0
#: How much of a refused body we still read and discard, and for how long.
UNREAD_BYTES, UNREAD_SECONDS = 4 * 1024 * 1024, 1.0
#: Seconds for a client to receive an answer.
DEPARTURE_SECONDS = 30.0
#: File descriptors reserved for other uses than connections: the store, Buildkite, the log.
OTHER_FILES = 100
#: Refused connections, and requests without a valid token, are each logged at most this often.
REFUSALS_SECONDS = 10.0
#: Characters stored of why a worker released a job, and of its agent's last words; bytes of a note on a job.
WORDS_LETTERS = 2048
#: Number of jobs to try for one claim, if a job is not free any more, gets no token, or its answer cannot be made.
CLAIM_TRIES = 3
#: The largest answer to a claim, so that the worker can read it.
CLAIM_BYTES = 512 * 1024
#: Characters stored of a version, of why a worker waits, and of the id of a health command's run.
VERSION_LETTERS, WAIT_LETTERS, RUN_LETTERS = 100, 500, 32
#: The largest number of processes on Linux, and so of a job's strays.
MOST_STRAYS = 4_194_304
#: Longest error message in an answer; it may quote what the client sent.
MESSAGE_CHARACTERS = 1000
#: If a token is needed, this part of all connections is reserved for clients that have sent one.
KEPT_PART = 1 / 4
#: Longest line before a chunk of a body: the chunk's length and extensions.
CHUNK_LINE_BYTES = 256
#: Most jobs per page of the queue. Jobs ahead of a job are counted up to the second number.
PAGE_JOBS, COUNTED_AHEAD = 1000, 1000
#: If the last good list is older than this, and than so many POLL_INTERVALs, `/health?strict=1` answers 503.
STALE_POLL_SECONDS, STALE_POLLS = 60.0, 3
#: `GET /fleet`: shortest and longest time between two computations (the states of workers change with time), and the
#: number of jobs and acts in it.
OVERVIEW_SECONDS, OVERVIEW_AGE_SECONDS, OVERVIEW_JOBS, OVERVIEW_ACTS = 1.0, 5.0, 200, 20
#: The computation may use 1 / OVERVIEW_SHARE of a core's time, more only to be ready after OVERVIEW_AGE_SECONDS.
OVERVIEW_SHARE = 40
#: How often the failures of hosts, and the machines of workers, are computed; and for how long after its last sign a
#: machine counts (a waiting worker gives a sign with each claim).
TROUBLE_SECONDS = 2.0
MACHINES_SECONDS, MACHINE_SECONDS = 30.0, MAX_WAIT_SECONDS + LIVE_SECONDS
#: At most so many problems of one kind are named.
NAMED_PROBLEMS = 10


class Api(Part):
    """The routes for workers and operators. They parse the request, call the store, and answer; rules are in Moves."""

    def __init__(  # noqa: PLR0913  what the routes are about
        self,
        store: Store,
        dispatcher: Dispatcher,
        intakes: Mapping[str, Intake],
        settings: Settings,
        now: Callable[[], float],
        metrics: Metrics | None = None,
        *,
        parts: Iterable[Part] = (),
        organization: Callable[[], str] = str,
    ):
        """`parts`: all parts except the intakes. `organization`: returns its slug at Buildkite, "" if unknown."""
        self._organization = organization
        self._store, self._dispatcher, self._intakes = store, dispatcher, intakes
        self._settings, self._now = settings, now
        self._metrics = metrics or Metrics()
        #: All parts; `/health` reports their problems.
        self.parts: Sequence[Part] = [*intakes.values(), *parts, self]
        self.served = routes_of(self.parts)
        self._started_at = now()
        self._unauthorized = RateLimitedLog("unauthorized", "requests", logging.WARNING)
        self._at_start = summed(store.stats()["totals"])
        self._clashes: list[str] = []
        self._clashes_at = -math.inf
        self._trouble, self._trouble_at = "", -math.inf
        self._overview = Overview(self._make_overview, self._overview_stamp)

    def use(self, settings: Settings) -> None:
        """Use the reloaded settings: WEBHOOK_TOKEN, and whether there is a BUILDKITE_API_TOKEN."""
        self._settings = settings

    def health(self, request: Request) -> Answer:
        """GET /health"""
        now = self._now()
        self._store.check()
        ages = {q: now - i.last_list_at if i.last_list_at else None for q, i in self._intakes.items()}
        most = max(STALE_POLL_SECONDS, STALE_POLLS * self._settings.poll_interval)
        stale = [q for q, age in ages.items() if age is None or age > most]
        strict = request.query.get("strict") == "1"
        body = {
            "status": "stale" if strict and stale else "ok",
            "version": VERSION,
            "last_poll_age_seconds": {q: None if age is None else round(age, 3) for q, age in ages.items()},
            "problems": self.all_problems(),
        }
        return Answer(503 if strict and stale else 200, body)

    def all_problems(self) -> list[str]:
        """The problems of all parts; the one that affects all hosts comes first."""
        problems = dict.fromkeys(problem for part in self.parts for problem in part.problems)
        return sorted(problems, key=lambda problem: not problem.startswith(CANNOT_ACQUIRE))

    @property
    def problems(self) -> list[str]:
        """Problems of hosts, and of jobs with rules that we do not understand."""
        now = self._now()
        if not 0 <= now - self._clashes_at < MACHINES_SECONDS:
            self._clashes, self._clashes_at = shared_hosts(machines_of(self._store.workers(), now)), now
        if not 0 <= now - self._trouble_at < TROUBLE_SECONDS:
            self._trouble, self._trouble_at = find_host_failures(self._store.workers(), now).text, now
        of_hosts = [*([self._trouble] if self._trouble else []), *self._clashes]
        unread = self._store.not_understood()
        if not unread:
            return of_hosts
        # Show only the first: there may be as many as jobs, and a rule set may have 2 KB.
        rule_set, what = min(unread), "waiting jobs with rules that are not understood, so no worker matches them"
        return [f"{what}: {sum(unread.values())}; the first: {cut(rule_set, 200)}", *of_hosts]

    def claim(self, request: Request) -> Answer:
        """GET /jobs?query=queue=default,arch=amd64&wait=30"""
        try:
            profile = Profile.of(request.query.get("query", ""))
        except ValueError as error:
            raise Refusal(str(error), code="bad_query") from None
        needs_token = request.query.get("token") == "1"
        worker = request.worker_with(profile, needs_token)
        wait = wait_of(request.query.get("wait", "0"))
        # The answer comes at most TOKEN_SECONDS after the wait; with a shorter wait, after at most twice TOKEN_SECONDS.
        began_at = time.monotonic()
        for number in range(CLAIM_TRIES):
            passed = time.monotonic() - began_at
            if number and (passed >= max(wait, TOKEN_SECONDS) or request.is_gone()):
                break
            job = self._dispatcher.claim(worker, max(0.0, wait - passed), request.is_gone)
            if job is None:
                break
            if answer := self._claimed(job, needs_token):
                return answer
        return Answer(204, None)

    def _claimed(self, job: Job, needs_token: bool) -> Answer | None:
        """The answer to a claim; None when the job was taken back (this counts as no attempt): try the next job.

        Any failure between the lease and the delivered answer takes the job back: no worker knows that it has the job.
        """
        try:
            if not self._is_free(job):
                return None
            token = self._token_for(job) if needs_token else None
            if needs_token and token is None:
                return None
            body = json_of(self._described(job) | ({"token": token} if token else {}))
            if len(body) > CLAIM_BYTES:
                raise ValueError(f"it has {len(body)} bytes, more than {CLAIM_BYTES}")
        except Exception as error:
            log.exception(event("unanswerable", job=job.uuid, reason="a bug of the scheduler; please report it"))
            reason = f"the scheduler could not make the answer to its claim: {type(error).__name__}: {error}"
            self._take_back(job, reason, "unanswerable")
            return None
        reason = "the answer to its claim could not be delivered"
        return Answer(
            200,
            body,
            delivered=lambda: self._log_claimed(job),  # after the answer, so that the worker does not wait for the log
            undelivered=lambda: self._take_back(job, reason, "undelivered"),
        )

    def _is_free(self, job: Job) -> bool:
        """Whether the job may be handed out; else it was taken back."""
        intake = self._intakes.get(job.queue_key)
        try:
            if intake is None or intake.is_free(job):
                return True
            reason, code = "Buildkite says that the job does not wait any more", "not_free"
        except BuildkiteError as error:
            reason, code = f"Buildkite cannot be asked whether it still waits: {error}", "unproved"
        self._take_back(job, reason, code)
        return False

    def _token_for(self, job: Job) -> str | None:
        """The job's token; None if there is none: then the job was taken back."""
        intake, reason, code = self._intakes.get(job.queue_key), "Buildkite issues no token for this job", "no_token"
        words = ""
        try:
            if intake:
                token, words = intake.tokens.ask(job.uuid)
                if token:
                    return token
        except BuildkiteError as error:
            reason, code = f"Buildkite issues no job acquisition tokens now: {error}", "no_tokens"
        else:
            words = words or "no reason given"
            self._metrics.not_issued(job.queue_key, words)
            log.warning(event("not_issued", job=job.uuid, queue=job.queue_key, reason=words))
            reason = f"{reason}: {words}"
        self._take_back(job, reason, code)
        return None

    def _log_claimed(self, job: Job) -> None:
        waited = f"{self._now() - job.scheduled_at:.1f}"
        names = {"queue": job.queue_key, "worker": job.worker, "claim": job.claim}
        log.info(event("claimed", job=job.uuid, **names, waited_s=waited))

    def _described(self, job: Job) -> dict[str, Any]:
        return {
            "uuid": job.uuid,
            "queue_key": job.queue_key,
            "agent_query_rules": job.agent_query_rules,
            "priority": job.listed_priority,
            "scheduled_at": rfc3339(job.scheduled_at),
            "reserved_at": rfc3339(job.reserved_at),
            "claim": job.claim,
            "attempt": job.claims,
            "lease_seconds": self._settings.lease_seconds,
            **job.about,
        }

    def _take_back(self, job: Job, reason: str, code: str) -> None:
        """End a claim that no worker knows. If the same worker got it again meanwhile, the claim stays."""
        holder = Holder(job.uuid, job.claim, asked=job.version)
        try:
            self._store.withdraw(holder, cut(reason, DETAIL_BYTES), code, self._now())
        except Refusal as refusal:
            log.warning(event("unreleased", job=job.uuid, claim=job.claim, reason=str(refusal)))

    def touch(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/touch {"claim"}"""
        job = self._store.touch(Holder(request.uuid, request.text("claim"), request.worker), self._now())
        is_due_at = (job.claimed_at or self._now()) + self._settings.acquire_seconds
        if job.stop:
            is_due_at = min(is_due_at, job.stop["at"])
        stop = job.state is JobState.LEASED and self._now() > is_due_at
        # Never stop an agent that may have the job: Buildkite must have told us since then that none has it.
        stop = stop and self._store.looked_at(job.queue_key) >= is_due_at
        cancel = is_worker_to_cancel(job, bool(self._settings.buildkite_api_token), self._now())
        answer = {"state": job.state, "stop": stop, "cancel": cancel, "lease_seconds": self._settings.lease_seconds}
        return Answer(200, answer | ({"reason": stop_detail(job.stop)} if job.stop else {}))

    def release(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/release {"claim", "reason", "code"}"""
        reason = request.text("reason", "no reason given")[:WORDS_LETTERS]
        holder = Holder(request.uuid, request.text("claim"), request.worker)
        is_unfit = request.text("code", "") == WorkerState.UNFIT
        job = self._store.release(holder, reason, self._now(), is_unfit=is_unfit)
        return Answer(200, {"uuid": job.uuid, "released": job.state is not JobState.RUNNING})

    def complete(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/complete {"claim", "exit_status", "last_words", "free", "strays"}; from the holder: {}"""
        status = request.body.get("exit_status", 0)
        if isinstance(status, bool) or not isinstance(status, int) or abs(status) > 2**31:
            raise Refusal(f"`exit_status` is {status!r}, not a whole number", code="bad_body")
        free, strays = (whole_of(request.body.get(name)) for name in ("free", "strays"))
        strays = min(max(0, strays or 0), MOST_STRAYS)
        end = AgentEnd(status, request.text("last_words", "")[-WORDS_LETTERS:], free and max(0, free), strays)
        holder = Holder(request.uuid, request.text("claim") if request.body else None, request.worker)
        job = self._store.complete(holder, end, self._now())
        return Answer(200, {"uuid": job.uuid, "completed": True})

    def take_report(self, request: Request) -> Answer:
        """POST /workers/{name} {"query", "version", "agent", "agent_supported_until", "state", "reason", "held"}"""
        try:
            query = request.text("query", "")
            worker = request.worker_with(Profile.of(query) if query else NO_PROFILE)
        except ValueError as error:
            raise Refusal(str(error), code="bad_query") from None
        if not worker.name or worker.name != request.named:
            raise Refusal(
                "a worker can report only about itself: X-Worker-ID must be the name in the path", code="bad_header"
            )
        until = request.text("agent_supported_until", "")
        if not re.fullmatch(r"(\d{4}-\d\d-\d\d)?", until, re.ASCII):
            raise Refusal(f"`agent_supported_until` is {until[:100]!r}; write it like 2027-09-03", code="bad_body")
        state = request.text("state", "")
        if state and state not in REPORTED_STATES:
            raise Refusal(f"`state` is {state[:100]!r}; it may be {', '.join(REPORTED_STATES)}", code="bad_body")
        fields = {name: request.text(name, "")[:VERSION_LETTERS] for name in ("version", "agent")}
        fields["agent_supported_until"] = until
        if state == GONE:
            return self._leave(worker)
        if state:
            reason, run = request.text("reason", "")[:WAIT_LETTERS], request.text("held", "")[:RUN_LETTERS]
            fields |= {"told_state": state, "told_reason": reason, "needs_person": run}
        row = self._store.take_report(worker, fields, self._now())
        return Answer(200, {"name": worker.name} | ({"resumed": row.resumed} if row.resumed else {}))

    def _leave(self, worker: Worker) -> Answer:
        """The worker has ended by itself: forget it."""
        given_back = self._store.leave(worker, self._now())
        self._dispatcher.leave(worker.name)
        log.info(
            event("left", worker=worker.name, host=worker.host, given_back=",".join(j.uuid for j in given_back) or None)
        )
        return Answer(200, {"name": worker.name})

    def hold(self, request: Request) -> Answer:
        """POST /holds {"target", "note", "seconds" or "until", "replace", "reason", "dry_run"}, from an operator"""
        now, target, reason = self._now(), target_of(request.text("target")), request.text("reason", PAUSED)
        if reason not in HOLDING_ACTS:
            raise Refusal(f"`reason` is {reason!r}; it may be {', '.join(HOLDING_ACTS)}", code="bad_body")
        replace, is_dry = request.flag("replace"), request.flag("dry_run")
        wanted = Hold(target, OPERATOR, reason, now, until_of(request.body, now), request.operator, note_of(request))
        fleet = self._fleet()
        bound = self._bound(fleet, target)
        if not any(bound.values()):
            raise self._no_match(fleet, target)
        act = None if is_dry else OperatorAct(now, wanted.by, HOLDING_ACTS[reason], target, wanted.note)
        hold, found = self._store.hold(wanted, act, replace=replace, now=now)
        if not is_dry:
            log.info(event("held", target=target, by=hold.by, until=rfc3339(hold.until), note=hold.note, was=found))
            self._follow_holds()
        counts = ", ".join(f"{n} {what if n > 1 else what[:-1]}" for what, n in bound.items() if n)
        done = "would be " if is_dry else "is already " if hold == found else "is "
        message = f"{target} {done}{hold}. This holds {counts} now, and later ones that match"
        answer = {"hold": hold_json(hold), "already": hold == found, "binds": bound, "message": message}
        return Answer(200, answer)

    def lift(self, request: Request) -> Answer:
        """DELETE /holds/{target}?quarantine=1, from an operator"""
        now, target = self._now(), request.named
        owners = [OPERATOR, *(["machine"] if request.query.get("quarantine") == "1" else [])]
        lifted = self._store.lift(target, owners, OperatorAct(now, request.operator, "resume", target, ""))
        for hold in lifted:
            log.info(event("lifted", target=hold.target, owner=hold.owner, by=request.operator, was=hold))
        if lifted:
            self._follow_holds()
        message = "; ".join(f"{hold.target} was {hold}" for hold in lifted) or f"{target} was not held"
        fleet = self._fleet()
        left = self._still_held(fleet, target if lifted else target_of(target))
        if left and not lifted:
            raise Refusal(
                f"{message} itself, but {holds_text(left)}: resume that target", status=409, code="still_held"
            )
        if not lifted and not any(self._bound(fleet, target).values()):
            raise self._no_match(fleet, target)
        message += f". Still, {holds_text(left)}" if left else ""
        return Answer(200, {"lifted": [hold_json(hold) for hold in lifted], "message": message})

    def _follow_holds(self) -> None:
        """Let parked claims try again now; if the store fails, upkeep does it within a second."""
        with suppress(StoreUnavailable):
            self._dispatcher.follow_holds()

    def _about(self, fleet: Fleet, target: str) -> tuple[list[Worker], list[str]]:
        """The workers and queues that a hold of this target holds now."""
        hold = Hold(target, OPERATOR, PAUSED)
        workers = [worker for worker in fleet.workers if binds(hold, None, worker)]
        return workers, [q for q in self._queue_keys(fleet) if binds(hold, RuleSet.of(q, ()), None)]

    def _bound(self, fleet: Fleet, target: str) -> dict[str, int]:
        """How many workers, hosts, queues and waiting jobs a hold of this target holds now."""
        workers, queues = self._about(fleet, target)
        waiting = [level for level in fleet.stats["levels"] if level.waits and level.queue_key in queues]
        return {
            "workers": len(workers),
            "hosts": len({worker.host for worker in workers if worker.host}),
            "queues": len(queues),
            "jobs": sum(level.jobs for level in waiting),
        }

    def _queue_keys(self, fleet: Fleet) -> set[str]:
        """Our queues, and the queues of jobs left from earlier settings."""
        return {*self._intakes, *(level.queue_key for level in fleet.stats["levels"])}

    def _still_held(self, fleet: Fleet, target: str) -> list[Hold]:
        """The holds that now hold something that the target matches."""
        workers, queues = self._about(fleet, target)
        holds, now = fleet.stats["holds"], self._now()
        found = [blocked(None, worker, holds, now) for worker in workers]
        found += [blocked(RuleSet.of(q, ()), None, holds, now) for q in queues]
        return sorted({hold for hold in found if hold}, key=lambda hold: (hold.target, hold.owner))

    def _no_match(self, fleet: Fleet, target: str) -> Refusal:
        """The error that nothing matches the target, with the nearest names."""
        known = {f"queue:{queue_key}" for queue_key in self._queue_keys(fleet)}
        for worker in fleet.workers:
            known |= {f"worker:{worker.name}", f"host:{worker.host}", *(f"tag:{tag}" for tag in worker.profile.tags)}
        known |= {hold.target for hold in fleet.stats["holds"]}
        # Compare names without the kind, because the kind may be wrong.
        by_name: dict[str, list[str]] = {}
        for each in sorted(known - {"worker:", "host:"}):
            by_name.setdefault(each.partition(":")[2].lower(), []).append(each)
        names = difflib.get_close_matches(target.partition(":")[2].lower(), by_name, 3)
        nearest = [each for name in names for each in by_name[name]][:3]
        hint = f"; the nearest: {', '.join(nearest)}" if nearest else ""
        message = f"nothing here matches {target}{hint}. Nothing was changed"
        return Refusal(message, status=404, code="no_match", more={"nearest": nearest})

    def job(self, request: Request) -> Answer:
        """GET /jobs/{uuid}"""
        job = self._store.get(request.uuid)
        if job is None:
            raise unknown_job(request.uuid)
        answer = job_json(job, self._organization()) | self._wait_of(job) | {"story": story(job)}
        if job.stop:
            answer["stop"] |= self._stopping(job)
        return Answer(200, answer)

    def stop(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/stop {"note"}"""
        note = self._operator_note(request)
        job = self._store.stop(request.uuid, note, self._now())
        if intake := self._intakes.get(job.queue_key):
            intake.stop_soon(job)
        return self._acted("stop", note, job, self._stopping(job))

    def allow(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/allow {"note"}"""
        note = self._operator_note(request)
        job = self._store.allow(request.uuid, note, self._now())
        if job.state is JobState.READY:
            self._dispatcher.offer([job])
        return self._acted(
            "allow", note, job, {"message": "holds of operators, freezes and the policy do not hold it now"}
        )

    def first(self, request: Request) -> Answer:
        """POST /jobs/{uuid}/first {"note"}"""
        note = self._operator_note(request)
        job = self._store.first(request.uuid, note, self._now())
        return self._acted("first", note, job, {"message": "it is first in line"})

    def _operator_note(self, request: Request) -> dict[str, Any]:
        refuse_dry_run(request)
        note = request.text("note").strip()
        if not note:
            raise Refusal("the body needs a `note` that says why", code="bad_body")
        return operator_note(request.operator, cut(note, WORDS_LETTERS), self._now())

    def _acted(self, act: str, note: Mapping[str, Any], job: Job, answer: Mapping[str, Any]) -> Answer:
        """Store and log the act, and answer. If an earlier act of this kind stays, the answer says so."""
        kept = getattr(job, act)
        self._store.act(OperatorAct(note["at"], note["by"], act, f"job:{job.uuid}", note["note"]))
        log.warning(event(act, job=job.uuid, by=note["by"], state=job.state, note=note["note"][:200]))
        if act != "first" and (kept["by"], kept["note"]) != (note["by"], note["note"]):
            before = stop_detail(kept) if act == "stop" else f"Allowed by {kept['by'] or 'an operator'}: {kept['note']}"
            answer = {**answer, "message": f"{before}; {answer['message']}"}
        return Answer(200, {"uuid": job.uuid, "state": job.state, **answer})

    def _stopping(self, job: Job) -> dict[str, Any]:
        """What happens next to a job that an operator stopped, as text; and whether we can reach it."""
        by, seconds = by_name(job.worker), self._settings.lease_seconds
        # A worker touches at least once in a third of the lease; before its start this scheduler took no touches.
        heard_at = max(job.touched_at or job.claimed_at or 0.0, self._started_at)
        is_reachable, text = True, ""
        match job.state:
            case JobState.RESERVING if job.finish_detail is not None:
                text = "the scheduler finishes it at Buildkite"
            case JobState.RESERVING if job.held_by:
                text = f"Buildkite says that it may not run before {rfc3339(job.held_until)}: we finish it then"
            case JobState.RESERVING:
                text = "the scheduler asks Buildkite whether an agent has it; if none has, it finishes the job"
            case JobState.LEASED:
                text = (
                    f"within {seconds} s, {by} ends its agent, which has not acquired the job, or its claim expires; "
                )
                text += "then the scheduler finishes it at Buildkite"
            case JobState.RUNNING if not is_to_cancel(job):
                text = f"Buildkite cancels it (asked {rfc3339((job.stop or {})['cancelled_at'])}), and tells its agent"
            case JobState.RUNNING if self._settings.buildkite_api_token:
                problem = (job.stop or {}).get("problem")
                is_reachable = not problem or self._now() - heard_at <= seconds
                text = (
                    f"the scheduler asks Buildkite to cancel it, then {by} after {CANCEL_SECONDS:.0f} s without success"
                )
                text += f"; the last try: {problem}" if problem else ""
            case JobState.RUNNING if self._now() - heard_at <= seconds:
                text = f"within {seconds} s, {by} makes its agent cancel it; the pipeline's retry rules may "
                text += "start it again as another job"
            case JobState.RUNNING:
                is_reachable = False
                text = (
                    f"it cannot be reached: {by} has not touched it since {rfc3339(heard_at)}; cancel it at Buildkite"
                )
            case JobState.DONE:
                text = f"it is over: {job.outcome}, {job.reason}"
        return {"reachable": is_reachable, "message": text}

    def forget(self, request: Request) -> Answer:
        """DELETE /workers/{name}"""
        by, row = request.operator, self._store.forget(request.named)
        self._dispatcher.forget_worker(row.name)
        self._store.act(OperatorAct(self._now(), by, "forget", f"worker:{row.name}", ""))
        log.warning(event("forget", worker=row.name, by=by))
        message = "it is forgotten"
        if (silent := self._now() - row.heard_at) <= LIVE_SECONDS:
            message += f"; its last sign is {max(0.0, silent):.0f} s old, so if it still runs, it will come back"
        return Answer(200, {"name": row.name, "message": message})

    def _wait_of(self, job: Job) -> dict[str, Any]:
        """For a waiting job: why it waits, and how many jobs of its rule set are ahead. Empty for other states."""
        if job.state not in (JobState.RESERVING, JobState.READY):
            return {}
        return self._fleet().why_of(job).as_json | {"ahead": self._store.ahead(job, COUNTED_AHEAD)}

    def queue(self, request: Request) -> Answer:
        """GET /queue?state=ready&queue=default&limit=100&after=<next of the page before>"""
        state, limit, after = request.query.get("state", JobState.READY), request.query.get("limit", "100"), None
        if state not in list(JobState):
            raise Refusal(f"state is {state!r}; it may be {', '.join(JobState)}", code="bad_query")
        if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= PAGE_JOBS:
            raise Refusal(f"limit is {limit!r}; it may be 1 to {PAGE_JOBS}", code="bad_query")
        if text := request.query.get("after"):
            after = place_of(text)
        jobs = self._store.page(JobState(state), after, int(limit), request.query.get("queue"))
        following = "{}:{!r}:{}".format(*jobs[-1].order) if len(jobs) == int(limit) else None
        return Answer(
            200, {"state": state, "jobs": [job_json(job, self._organization()) for job in jobs], "next": following}
        )

    def _fleet(self) -> Fleet:
        return Fleet(self._store, self._dispatcher, self._now())

    def stats(self, request: Request) -> Answer:
        """GET /stats"""
        now, fleet = self._now(), self._fleet()
        stats = fleet.stats
        all_time = summed(stats["totals"])
        # Never below 0: a Redis that lost its data begins to count from 0.
        since_start = {name: max(0, count - self._at_start[name]) for name, count in all_time.items()}
        running = [
            {"uuid": job.uuid, "worker": job.worker, "queue_key": job.queue_key, "since": rfc3339(job.claimed_at)}
            for job in stats["at_work"]
            if job.state is JobState.RUNNING
        ]
        return Answer(
            200,
            {
                "queues": stats["waiting"],
                "total": sum(stats["waiting"].values()),
                "waiting": [waiting_json(row, now) for row in fleet.waiting()],
                "unmatched": unmatched_json(fleet),
                "states": stats["states"],
                "outcomes": stats["outcomes"],
                "totals": {"since_start": since_start, "all_time": all_time},
                "paused": stats["paused"],
                "running": running,
                "workers": [worker_json(m) | {"idle_seconds": fleet.idle_seconds(m)} for m in fleet.members],
                "hosts": [{"host": host, "idle_seconds": idle} for host, idle in fleet.idle_hosts().items()],
                "uptime_seconds": round(now - self._started_at, 1),
            },
        )

    def fleet(self, request: Request) -> Answer:
        """GET /fleet, with `If-None-Match`: 304 when nothing has changed"""
        body, packed, etag = self._overview.at(self._now())
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        # The caller's role is in a header, because the body is the same for all.
        headers = {"ETag": etag, "X-Stack-Role": "operator" if request.may_act else "viewer"}
        if etag in known:
            return Answer(304, None, headers)
        headers["Vary"] = "Accept-Encoding"
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Answer(200, body, headers)
        return Answer(200, packed, headers | {"Content-Encoding": "gzip"})

    def _overview_stamp(self) -> object:
        return self._store.stamp(), self._dispatcher.changes, self.all_problems()

    def _make_overview(self, now: float) -> dict[str, Any]:
        fleet = Fleet(self._store, self._dispatcher, now)
        queues, hosts = queues_of_fleet(fleet, self._intakes, now), hosts_json(fleet, now)
        jobs = (self._store.page(state, None, OVERVIEW_JOBS) for state in (JobState.READY, JobState.RESERVING))
        first = sorted(itertools.chain.from_iterable(jobs), key=lambda job: job.order)[:OVERVIEW_JOBS]
        line = line_json(first, fleet, now, self._organization())
        overview: dict[str, Any] = {
            "now": rfc3339(now),
            "problems": self.all_problems(),
            "counts": fleet_counts(fleet, queues),
            "queues": queues,
            "hosts": hosts,
            "jobs": line,
            "stuck": stuck_json(fleet, line, now),
            "holds": [hold_json(hold) for hold in fleet.in_force],
            "freezes": [row for row in freezes_json(self._store, now) if row["state"] == "in_force"],
            "acts": [act._asdict() | {"at": rfc3339(act.at)} for act in self._store.acts(OVERVIEW_ACTS)],
        }
        return overview | {"wrong": [*overview["problems"], *fleet_problems(overview)]}

    def webhook(self, request: Request) -> Answer:
        """POST /webhook, after check_webhook: list its queues at once. Without a webhook, polling finds the jobs."""
        queue_keys = self._queues_of(request.body) if request.body.get("event") in LISTED_AFTER else []
        for queue_key in queue_keys:
            self._intakes[queue_key].list_soon()
        return Answer(200, {"listed": queue_keys})

    def unauthorized(self, client: str, path: str, message: str, now: float) -> None:
        """Log and count a request that was answered 401, so that a wrong token is noticed. `now`: monotonic seconds."""
        self._metrics.unauthorized.inc()
        self._unauthorized.tell(now, client=client, path=path, reason=message)

    def check_webhook(self, headers: email.message.Message, raw_body: bytes | None) -> None:
        """Refuse a webhook that is not from Buildkite. `raw_body` None: the body is not read yet, check the headers."""
        token = self._settings.webhook_token.encode()
        if not token:
            raise Refusal("'/webhook' is off: WEBHOOK_TOKEN is not set", status=404, code="not_found")
        signature = headers.get("X-Buildkite-Signature")
        if signature is None:
            given = headers.get("X-Buildkite-Token", "").encode(errors="replace")
            if not hmac.compare_digest(given, token):
                raise Refusal("X-Buildkite-Token is not WEBHOOK_TOKEN", status=401, code="unauthorized")
            return
        sent_at, given = signature_parts(signature)
        if not abs(self._now() - sent_at) <= WEBHOOK_SECONDS:
            message = f"its timestamp differs from our time by more than {WEBHOOK_SECONDS:.0f} s"
            raise Refusal(message, status=401, code="unauthorized")
        if raw_body is not None:
            wanted = hmac.new(token, b"%d.%b" % (sent_at, raw_body), hashlib.sha256).hexdigest()
            if not hmac.compare_digest(given, wanted.encode()):
                raise Refusal("X-Buildkite-Signature is not made with WEBHOOK_TOKEN", status=401, code="unauthorized")

    def _queues_of(self, body: Mapping[str, Any]) -> list[str]:
        """The queues that the event may concern: its job's queue, else all."""
        rules = an_object(body, "job").get("agent_query_rules")
        pairs = [rule.partition("=") for rule in rules if isinstance(rule, str)] if isinstance(rules, list) else []
        named = {value.strip() for key, _, value in pairs if key.strip() == "queue"}
        # `_default` is the cluster's default queue, whose real name we do not know.
        return [queue_key for queue_key in self._intakes if not named or queue_key in {*named, "_default"}]

    def scrape(self, request: Request) -> Answer:
        """GET /metrics"""
        now = self._now()
        try:
            levels = levels_of(self._fleet(), self._metrics.label, now)
        except StoreUnavailable:  # the other metrics do not need the store
            levels = [gauge("stack_store_up", "Whether the store could be read.", [], [((), 0.0)]), build_info()]
        ages, texts = [], []
        for queue_key, intake in sorted(self._intakes.items()):
            ages.append(((queue_key,), now - (intake.last_list_at or self._started_at)))
            texts += [((queue_key, outcome), count) for outcome, count in intake.notifier.counts.items()]
        families = [
            *levels,
            gauge(
                "stack_poll_age_seconds", "Time since the queue was last listed, or since the start.", ["queue"], ages
            ),
            counter("stack_notifications", "Texts for build pages.", ["queue", "outcome"], texts),
            *(family for part in self.parts for family in part.metrics(now)),
        ]
        return Answer(200, self._metrics.text(families), {"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    routes = (
        Route("GET", "/health", health, ANYONE),
        # No HEAD for claims: it would take a job without returning it.
        Route("GET", "/jobs", claim, WORKER, has_head=False),
        Route("GET", "/jobs/{uuid}", job, VIEWER),
        Route("POST", "/jobs/{uuid}/touch", touch, WORKER),
        Route("POST", "/jobs/{uuid}/release", release, WORKER),
        Route("POST", "/jobs/{uuid}/complete", complete, WORKER),
        Route("POST", "/jobs/{uuid}/stop", stop, OPERATORS),
        Route("POST", "/jobs/{uuid}/allow", allow, OPERATORS),
        Route("POST", "/jobs/{uuid}/first", first, OPERATORS),
        Route("POST", "/workers/{name}", take_report, WORKER),
        Route("DELETE", "/workers/{name}", forget, OPERATORS),
        Route("POST", "/holds", hold, OPERATORS),
        Route("DELETE", "/holds/{target}", lift, OPERATORS),
        Route("GET", "/queue", queue, VIEWER),
        Route("GET", "/fleet", fleet, VIEWER),
        Route("GET", "/stats", stats, VIEWER),
        Route("GET", "/metrics", scrape, READER),
        Route("POST", "/webhook", webhook, ANYONE),  # it has its own token
    )


def routes_of(parts: Iterable[Part]) -> dict[str, dict[str, tuple[Part, Route]]]:
    """The routes of all parts, by path (with {} for a name in it) and method."""
    served: dict[str, dict[str, tuple[Part, Route]]] = {}
    for part in parts:
        for route in part.routes:
            methods = served.setdefault(shape_of(route.path)[0], {})
            if (other := methods.setdefault(route.method, (part, route))) != (part, route):
                raise ValueError(f"{type(part)} and {type(other[0])} both serve {route.method} {route.path}")
            if route.method == "GET" and route.has_head:
                methods["HEAD"] = part, route
    return served


def shape_of(path: str) -> tuple[str, str]:
    """Split a path into its shape and the name in it: ("/jobs/{}/touch", <uuid>) or ("/health", "")."""
    words = path.split("/", 3)
    if len(words) < 3 or not words[2]:
        return path, ""
    named, words[2] = words[2], "{}"
    return "/".join(words), named


class Overview:
    """The answer of `GET /fleet`: computed after a change, at most once a second, and less often for a large fleet, so
    that open pages hardly slow claims."""

    #: Fields that change with time only.
    CLOCKS = ("now", "oldest_wait_seconds", "wait_seconds")

    def __init__(self, make: Callable[[float], dict[str, Any]], stamp: Callable[[], object]):
        """`stamp` returns another value when the result of `make` may have changed (other than by time)."""
        self._make, self._stamp_of = make, stamp
        self._lock = threading.Lock()  # guards the rest; held during `make`, so that all requests share one result
        self._stamp: object = None
        self._made_at, self._lasts = -math.inf, OVERVIEW_SECONDS
        self._still: object = None
        self._body, self._packed, self._etag = b"", b"", ""

    def at(self, now: float) -> tuple[bytes, bytes, str]:
        """The JSON, the same compressed by gzip, and its ETag."""
        with self._lock:
            age = now - self._made_at
            if not 0 <= age < self._lasts:
                stamp = self._stamp_of()
                if stamp != self._stamp or not 0 <= age < OVERVIEW_AGE_SECONDS:
                    began_at = time.thread_time()
                    self._write(self._make(now))
                    cost = time.thread_time() - began_at
                    self._lasts = min(max(OVERVIEW_SECONDS, OVERVIEW_SHARE * cost), OVERVIEW_AGE_SECONDS)
                    self._stamp, self._made_at = stamp, now
            return self._body, self._packed, self._etag

    def _write(self, overview: dict[str, Any]) -> None:
        rows = {name: [self._without_clocks(row) for row in overview[name]] for name in ("queues", "jobs", "stuck")}
        still = self._without_clocks(overview) | rows | {"counts": self._without_clocks(overview["counts"])}
        if still != self._still:
            self._still, self._body = still, json_of(overview)
            # Level 1 takes a fifth of the default level's time, and the result is only a few percent larger.
            self._packed = gzip.compress(self._body, 1, mtime=0)
            self._etag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'

    def _without_clocks(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self.CLOCKS}


def machines_of(rows: Iterable[WorkerRow], now: float) -> dict[str, dict[str, str]]:
    """By host name: the machines seen lately, each with one of its workers."""
    machines: dict[str, dict[str, str]] = {}
    for row in rows:
        heard_at = max(row.heard_at, row.last_claim_at or 0.0, row.told_at or 0.0)
        if row.host and row.machine and heard_at >= now - MACHINE_SECONDS:
            machines.setdefault(row.host, {}).setdefault(row.machine, row.name)
    return machines


def shared_hosts(machines: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Problems: host names that several machines use."""
    shared = sorted((host, found) for host, found in machines.items() if len(found) > 1)
    return [
        f"{len(found)} machines have the host name {host}: those of workers {', '.join(sorted(found.values())[:5])}"
        "; set WORKER_HOST to a different name on each"
        for host, found in shared[:NAMED_PROBLEMS]
    ]


def queues_of_fleet(fleet: Fleet, queue_keys: Iterable[str], now: float) -> list[dict[str, Any]]:
    """Each queue: its waiting and running jobs, and how many live workers serve it."""
    levels: list[RuleSetCount] = fleet.stats["levels"]
    jobs: collections.Counter[tuple[str, JobState]] = collections.Counter()
    oldest: dict[str, float] = {}
    for level in levels:
        jobs[level.queue_key, level.state] += level.jobs
        if level.waits:
            oldest[level.queue_key] = min(oldest.get(level.queue_key, math.inf), level.oldest)
    live = [member.worker for member in fleet.members if member.is_live] + fleet.nameless
    workers = collections.Counter(itertools.chain.from_iterable(worker.profile.queue_keys for worker in live))
    names = dict.fromkeys([*queue_keys, *sorted(level.queue_key for level in levels)])
    return [
        {
            "queue": name,
            "waiting": jobs[name, JobState.READY] + jobs[name, JobState.RESERVING],
            **{state: jobs[name, state] for state in JobState if state is not JobState.DONE},
            "oldest_wait_seconds": round(now - oldest[name], 1) if name in oldest else None,
            "holds": [hold_json(hold) for hold in fleet.holds_of_queue(name)],
            "workers": workers[name],
        }
        for name in names
    ]


def fleet_counts(fleet: Fleet, queues: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    waits = [queue["oldest_wait_seconds"] for queue in queues if queue["oldest_wait_seconds"] is not None]
    counts = {name: sum(queue[name] for queue in queues) for name in ("waiting", "running", "leased")}
    workers = {state: fleet.doing[state] for state in WorkerState}
    return counts | {"oldest_wait_seconds": max(waits, default=None), "workers": workers}


def hosts_json(fleet: Fleet, now: float) -> list[dict[str, Any]]:
    """The workers by host; workers without a host under ""."""
    machines = machines_of((member.row for member in fleet.members), now)
    hosts: dict[str, list[FleetMember]] = {}
    for member in fleet.members:
        hosts.setdefault(member.worker.host, []).append(member)
    rows = []
    for host, members in sorted(hosts.items()):
        workers = [member_json(member, fleet) for member in members]
        of_host = [hold for worker in workers for hold in worker["holds"] if hold["target"].startswith("host:")]
        holds = [hold for index, hold in enumerate(of_host) if hold not in of_host[:index]]
        rows.append({"host": host, "machines": len(machines.get(host, {})), "holds": holds, "workers": workers})
    return rows


def member_json(member: FleetMember, fleet: Fleet) -> dict[str, Any]:
    """A worker with its state, since when, and why."""
    holds = [hold_json(hold) for hold in fleet.holds_of(member)]
    more = {"since": rfc3339(member.since), "reason": member.reason or None, "by": member.by or None, "holds": holds}
    return worker_json(member) | {"host": member.worker.host} | more


def line_json(line: Iterable[Job], fleet: Fleet, now: float, organization: str) -> list[dict[str, Any]]:
    """Waiting jobs, each with its place in its queue's line, and why it waits."""
    places: collections.Counter[str] = collections.Counter()
    rows = []
    for job in line:
        places[job.queue_key] += 1
        wait = {"place": places[job.queue_key], "wait_seconds": round(now - job.scheduled_at, 1)}
        rows.append(job_json(job, organization) | wait | fleet.why_of(job).as_json)
    return rows


def stuck_json(fleet: Fleet, line: Iterable[Mapping[str, Any]], now: float) -> list[dict[str, Any]]:
    """For each reason in WRONG_WHYS: how many jobs, the oldest over WRONG_SECONDS old, wait for it; and the oldest.

    Jobs are counted by rule set. A job may wait for another reason than the others of its rule set; we see this only
    for jobs in `line` and for the oldest `reserving` job of each rule set (where a job put aside is).
    """
    since = now - WRONG_SECONDS
    waiting = [waiting_json(row, now) for row in fleet.waiting(since) if row.reason.why in WRONG_WHYS]
    rules = {row["rules"] for row in waiting}
    alone = {job["uuid"]: job for job in [*line, *line_json(fleet.long_reserving(since), fleet, now, "")]}
    others = [{**job, "jobs": 1, "oldest_wait_seconds": job["wait_seconds"]} for job in alone.values()]
    rows = waiting + [job for job in others if job["rule_set"] not in rules]
    found = []
    for why in WRONG_WHYS:
        matching = [row for row in rows if row["why"] == why and row["oldest_wait_seconds"] >= WRONG_SECONDS]
        if matching:
            oldest = max(matching, key=lambda row: row["oldest_wait_seconds"])
            row = {name: oldest[name] for name in ("why", "why_text", "uuid", "oldest_wait_seconds")}
            found.append(row | {"jobs": sum(row["jobs"] for row in matching)})
    return found


def job_url(job: Job, organization: str) -> str | None:
    """The URL of the job's page at Buildkite; None if organization, pipeline or build are unknown.

    Source: `web_url` of a job in a build, https://buildkite.com/docs/apis/rest-api/builds
    """
    slug, number = (job.about.get("pipeline") or {}).get("slug"), (job.about.get("build") or {}).get("number")
    if not organization or not slug or number is None:
        return None
    names = "/".join(urllib.parse.quote(name, safe="") for name in (organization, slug))
    return f"https://buildkite.com/{names}/builds/{number}#{job.uuid}"


def job_json(job: Job, organization: str) -> dict[str, Any]:
    """The public fields of a job, with times as RFC 3339."""
    row = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name not in HIDDEN_FIELDS}
    row |= job.about | {"priority": job.listed_priority}
    for act in ACTS:
        if note := row[act]:
            row[act] = note | {name: rfc3339(note[name]) for name in ("at", "cancelled_at") if name in note}
    if job.decision:
        moments = ("at", "until", "held_since")
        row["decision"] = {n: rfc3339(value) if n in moments else value for n, value in job.decision.items()}
    times = {name: rfc3339(value) for name, value in row.items() if name.endswith(("_at", "_until")) and value}
    tries = [{"host": None} | t | {name: rfc3339(t[name]) for name in ("claimed_at", "ended_at")} for t in job.tries]
    return row | times | {"tries": tries, "url": job_url(job, organization)}


def story(job: Job) -> list[dict[str, Any]]:
    """The events of a job, in order: {at, what} and, if known, `worker` and `reason`."""
    events: list[tuple[float | None, str, str | None, str | None]] = [
        (job.scheduled_at, "scheduled", None, None),
        (job.put_at, "put", None, None),
        (job.reserved_at, "reserved", None, None),
    ]
    for ended in job.tries:
        events.append((ended["claimed_at"], "claimed", ended["worker"], None))
        # Shortened here; `tries` has the whole reason.
        events.append((ended["ended_at"], ENDS[ended["how"]], ended["worker"], ended["reason"][:STORY_LETTERS]))
    if job.claimed_at not in [ended["claimed_at"] for ended in job.tries]:
        events.append((job.claimed_at, "claimed", job.worker, None))
    events.append((job.acquired_at, "acquired", job.worker, None))
    events.append((job.done_at, str(job.outcome), job.worker, job.reason))
    for act in ACTS:
        if note := getattr(job, act):
            by = note["by"] or "an operator"
            events.append((note["at"], act, None, f"{by}: {note['note']}"[:STORY_LETTERS]))
    # The sort is stable: events of the same moment keep the order above.
    happened = sorted((event for event in events if event[0]), key=lambda event: event[0] or 0.0)
    rows = [{"at": rfc3339(at), "what": what, "worker": by, "reason": reason} for at, what, by, reason in happened]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


STORY_LETTERS = 200
#: Acts of operators on a job: the names of the row's fields and of the routes.
ACTS = ("stop", "allow", "first")
ENDS = {"release": "released", "expire": "expired", "complete": "completed"}


def waiting_json(row: WaitingRuleSet, now: float) -> dict[str, Any]:
    waited = {"oldest_wait_seconds": round(now - row.oldest, 1)}
    return {"rules": row.rule_set, "jobs": row.jobs, "uuid": row.uuid} | waited | row.reason.as_json


def freezes_json(store: Store, now: float) -> list[dict[str, Any]]:
    """The freeze windows: first those in force, then the next ones, then those that are over; each by time."""
    counts = store.count_frozen()
    rows = []
    for freeze in store.windows.freezes:
        span = next(freeze.spans(now), None)
        state = "over" if span is None else "in_force" if span.begins_at <= now else "next"
        rows.append(
            {
                "name": freeze.name,
                "state": state,
                "from": rfc3339(span.begins_at) if span else None,
                "until": rfc3339(span.ends_at) if span else None,
                "written": f"{freeze.begins} to {freeze.ends}, {freeze.zone}",
                "queues": freeze.queues,
                "pipelines": freeze.pipelines,
                "branches": freeze.branches,
                "jobs": counts[freeze.name],
            }
        )
    return sorted(rows, key=lambda row: (("in_force", "next", "over").index(row["state"]), row["from"] or ""))


def worker_json(member: FleetMember) -> dict[str, Any]:
    return {
        "name": member.row.name,
        "state": member.doing,
        "tags": ",".join(sorted(member.worker.profile.tags)),
        "queues": sorted(member.worker.profile.queue_keys) or None,
        "job": member.job,
        "claims": member.row.claims,
        "jobs_done": member.row.ran,
        "last_seen_at": rfc3339(member.last_seen_at),
        "version": member.row.version or None,
        "agent": member.row.agent or None,
        "agent_supported_until": member.row.agent_supported_until or None,
        "free_bytes": member.row.free_bytes,
        "strays": member.row.strays,
    }


def unmatched_json(fleet: Fleet) -> dict[str, int]:
    """The number of waiting jobs that no live worker matches, by rule set."""
    jobs: collections.Counter[str] = collections.Counter()
    for level in fleet.unmatched():
        jobs[level.rule_set] += level.jobs
    return dict(jobs)


def summed(totals: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The sum over all queues, by outcome."""
    return {outcome: sum(of_queue[outcome] for of_queue in totals.values()) for outcome in Outcome}


def place_of(text: str) -> tuple[int, float, str]:
    """Parse the `next` of a page of the queue: the place in line where it ended. Raises a Refusal."""
    priority, _, rest = text.partition(":")
    scheduled_at, _, uuid = rest.partition(":")
    with suppress(ValueError):
        if abs(int(priority)) < 2**63 and math.isfinite(float(scheduled_at)) and UUID.fullmatch(uuid):
            return int(priority), float(scheduled_at), uuid
    raise Refusal(f"after is {text!r}; it may be the `next` of the page before", code="bad_query")


#: The act for each reason of an operator's hold.
HOLDING_ACTS: Mapping[str, str] = {PAUSED: "pause", DRAINED: "drain"}
#: Letters of a target's name, and of a note.
TARGET_LETTERS, NOTE_LETTERS = 512, 500


def target_of(text: str) -> str:
    """Check the target of a hold. Raises a Refusal."""
    kind, _, name = text.partition(":")
    if kind not in ("worker", "host", "queue", "tag") or not name.isprintable() or not 0 < len(name) <= TARGET_LETTERS:
        kinds = "worker:NAME, host:NAME, queue:KEY or tag:KEY=VALUE, with * for any letters"
        raise Refusal(f"the target is {text[:TARGET_LETTERS]!r}; it may be {kinds}", code="bad_target")
    if kind == "tag" and "=" not in name:
        raise Refusal(f"the target is {text!r}; write {text}=* for any value, or none", code="bad_target")
    return text


def refuse_dry_run(request: Request) -> None:
    """Refuse to try what can only be done, so that nobody does it by mistake."""
    if request.flag("dry_run"):
        raise Refusal("this route has no `dry_run`, so nothing was done", code="bad_body")


def note_of(request: Request) -> str:
    """The note of a hold, on one line. Raises a Refusal."""
    note = " ".join(request.text("note").split())
    if not note or not note.isprintable() or len(note) > NOTE_LETTERS:
        raise Refusal(f"`note` is {note[:100]!r}; write why, in 1 to {NOTE_LETTERS} letters", code="bad_body")
    return note


def until_of(body: Mapping[str, Any], now: float) -> float | None:
    """When a hold ends; None: only when an operator ends it. Raises a Refusal for a time that is not in the future."""
    seconds, until = body.get("seconds"), body.get("until")
    if seconds is None and until is None:
        return None
    if until is None and isinstance(seconds, int | float) and not isinstance(seconds, bool):
        if 0 < seconds <= LAST_SECOND - now:
            return float(now + seconds)
    moment = moment_of(until) if seconds is None and isinstance(until, str) else None
    if moment is None or moment <= now:
        given = f"`seconds` is {brief(seconds)} and `until` is {brief(until)}"
        raise Refusal(f"{given}; give one: seconds from now, or a time in the future (RFC 3339)", code="bad_body")
    return moment


def hold_json(hold: Hold) -> dict[str, Any]:
    return dataclasses.asdict(hold) | {"since": rfc3339(hold.since), "until": rfc3339(hold.until)}


def holds_text(holds: Sequence[Hold]) -> str:
    return "; ".join(f"{hold.target} is {hold}" for hold in holds[:3]) + (" and more" if len(holds) > 3 else "")


def json_of(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body) + "\n").encode()


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A route's answer. `delivered` is called after it was sent, `undelivered` if that failed."""

    status: int
    #: An object to write as JSON, or bytes: JSON too, unless `headers` has another Content-Type.
    body: dict[str, Any] | bytes | None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delivered: Callable[[], None] = lambda: None
    undelivered: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A request, for a route."""

    #: The name in the path: a job, a worker, a target.
    named: str
    query: Mapping[str, str]
    body: Mapping[str, Any]
    headers: email.message.Message
    is_gone: Callable[[], bool]
    #: Whether the caller has an operator's rights.
    may_act: bool = False

    @property
    def uuid(self) -> str:
        return self.named.lower()

    @property
    def operator(self) -> str:
        """The operator who calls, by the caller's own statement; "" if not given."""
        return self._name_in("X-Operator")

    @property
    def worker(self) -> Worker | None:
        worker = self.worker_with(NO_PROFILE)
        return worker if worker.name else None

    def worker_with(self, profile: Profile, needs_token: bool = False) -> Worker:
        """The worker that calls, from its headers; its name is "" if not given."""
        name, session = self._name_in("X-Worker-ID"), self._name_in("X-Worker-Session")
        host, machine = self._name_in("X-Worker-Host"), self._name_in("X-Worker-Machine")
        return Worker(name, session, profile, needs_token, host=host, machine=machine)

    def _name_in(self, header: str) -> str:
        value = self.headers.get(header.lower(), "")
        if len(value) > NAME_LETTERS:
            raise Refusal(f"{header} has {len(value)} letters; it may have {NAME_LETTERS}", code="bad_header")
        if not value.isprintable():
            raise Refusal(f"{header} is {value!r}; it may have only printable letters", code="bad_header")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A text field of the body. Raises a Refusal with its name."""
        value = self.body.get(name, default)
        if not isinstance(value, str):
            raise Refusal(f"the body needs `{name}`, a text; it is {value!r}", code="bad_body")
        # JSON may contain half a character (a lone surrogate), which neither store nor log can write, and control
        # characters, which terminals and build pages obey.
        return "\n".join(map(visible, value.splitlines()))

    def flag(self, name: str) -> bool:
        """A true/false field of the body, false if missing. Raises a Refusal with its name."""
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise Refusal(f"`{name}` is {brief(value)}; it may be true or false", code="bad_body")
        return value


#: Fields that `GET /jobs/{uuid}` does not show; for example, whoever knows a claim's id can end the claim.
HIDDEN_FIELDS = {"about", "version", "claim", "completed_claim", "session", "not_before"} | {
    *("policy_step", "policy_step_at", "chain"),
}
NO_PROFILE = Profile(frozenset(), frozenset(), frozenset())


def signature_parts(signature: str) -> tuple[int, bytes]:
    """Parse "timestamp=<seconds>,signature=<hex>". Raises a Refusal."""
    parts = dict(part.strip().partition("=")[::2] for part in signature.split(","))
    if not re.fullmatch("[0-9]{1,12}", parts.get("timestamp", ""), re.ASCII):
        raise Refusal("X-Buildkite-Signature has no timestamp", status=401, code="unauthorized")
    return int(parts["timestamp"]), parts.get("signature", "").encode(errors="replace")


@functools.lru_cache(maxsize=256)
def parameters(query: str) -> Mapping[str, str]:
    """Parse a query string. Cached, because a worker always sends the same ones."""
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


#: Headers that define the end of a request and its host. A request with one of them twice is ambiguous.
FRAMING = ("content-length", "transfer-encoding", "host")
#: A request target with the host in it (RFC 9112, 3.2.2): that host, and the path with its query.
ABSOLUTE = re.compile(r"https?://([^/?#@]+)([^#]*)", re.IGNORECASE)
#: The line before a chunk: its length, and perhaps an extension, which we ignore.
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,7})[ \t]*(?:;[^\r\n]*)?\r\n")


@functools.lru_cache(maxsize=64)
def is_loopback_host(host: str) -> bool:
    """Whether a `Host` header names this machine without any name server."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    return is_loopback(name) or name.endswith(".localhost")


def body_too_large(length: int, most: int) -> Refusal:
    return Refusal(f"the body has {length} bytes, more than {most}", status=413, code="body_too_large")


def body_ended_early() -> Refusal:
    return Refusal("the body ended early", code="bad_body")


#: Connections that wait for accept: a whole fleet may connect at once when the scheduler starts.
BACKLOG = 1024
#: The first socket that systemd passes. Source: sd_listen_fds(3)
FIRST_INHERITED_FD = 3


def is_inherited(environ: Mapping[str, str]) -> bool:
    """Whether a systemd socket unit passes sockets to this process (and not to its parent)."""
    return environ.get("LISTEN_PID") == str(os.getpid())


def listening_sockets(address: tuple[str, int], environ: Mapping[str, str]) -> list[socket.socket]:
    """The sockets that a systemd socket unit passes, else one bound to `address`."""
    if is_inherited(environ):
        return [inherited(FIRST_INHERITED_FD + number) for number in range(int(environ["LISTEN_FDS"]))]
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        # Not by http.server, which looks up our own name and can hang with a broken DNS.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"LISTEN: {address[0]}:{address[1]} cannot be bound: {error}") from error
    return [listener]


def inherited(descriptor: int) -> socket.socket:
    """One socket of the socket unit; SettingsError if it is not TCP."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type is not socket.SOCK_STREAM:
        raise SettingsError(
            f"the socket unit passes {listener.family.name} {listener.type.name}, but workers need TCP: "
            "use ListenStream= with a port"
        )
    return listener


class BoundedInput(io.RawIOBase):
    """A client's input with limits: a number of bytes, and a deadline for all of them together."""

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
            raise TimeoutError("the request did not arrive in time")
        if not self.bytes_left:
            raise Refusal(f"the request's head has more than {HEAD_BYTES} bytes", status=431, code="head_too_large")
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(memoryview(buffer)[: self.bytes_left])
        self.bytes_left -= count
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: parses requests, calls their routes, writes each answer as one packet."""

    server: Server
    protocol_version = "HTTP/1.1"  # keep-alive: a worker claims and touches on one connection
    disable_nagle_algorithm = True  # send each answer at once: it is one small packet

    def setup(self) -> None:
        """Make the TLS handshake on the connection's own thread, so that a slow client delays no other."""
        self._accepted = self.request
        if tls := self.server.tls:
            self.request.settimeout(ARRIVAL_SECONDS)
            self.request = tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
            self.server.limit.wrapped(self._accepted, self.request)
            try:
                self.request.do_handshake()
            except BaseException:
                self.request.close()
                raise
        super().setup()
        self.rfile.close()
        self._inbox = BoundedInput(self.connection)
        self.rfile = io.BufferedReader(self._inbox)
        self._silence = ARRIVAL_SECONDS
        #: The request's body was not read, so no other request can follow on this connection.
        self._is_unread = False
        #: The client has sent a valid token, or none is needed. Only then the connection stays open after a request.
        self._is_known = False

    def finish(self) -> None:
        super().finish()
        if self._is_unread:
            self._discard_body()
        self.server.shutdown_request(self.connection)  # with TLS this is not the socket that the server closes

    def handle_one_request(self) -> None:
        """The base class's method with limits of size and time, which it does not have for the head."""
        self.command = self.path = self._path = ""
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
            if refusal.status == 401:
                self.server.api.unauthorized(self.client_address[0], self._path, str(refusal), time.monotonic())
        except Exception:
            log.exception(
                event("failed", method=self.command, path=self._path, reason="a bug of the scheduler; please report it")
            )
            answer = Answer(500, {"error": "internal", "message": "the scheduler failed; see its log"})
        try:
            self._write(answer)
        except Exception as error:
            self.close_connection = True
            answer.undelivered()
            if not isinstance(error, OSError):
                reason = "the answer could not be written"
                log.exception(event("failed", method=self.command, path=self._path, reason=reason))
        else:
            answer.delivered()
        self.server.unanswered.discard(self.client_address)

    # The base class calls `do_` and the request's method. `_find` refuses those that a path does not allow.
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = do_QUERY = _serve

    def _route(self) -> Answer:
        host, query = self._check_form()
        self._check_sender(host)
        shown, parties = self._parties()
        if (shown or not self.server.api_tokens) and not self._is_known:
            self._is_known = True
            self.server.limit.keep(self._accepted)
        named, part, route = self._find(shown, parties)
        if route.serve is Api.webhook:
            return self._webhook(query)
        return route.serve(part, self._request(named, query, self._body(BODY_BYTES), may_act="operator" in parties))

    def _check_form(self) -> tuple[str, str]:
        """The request's host and query. Refuses an ambiguous request, and one with unprintable characters."""
        names = [name.lower() for name in self.headers]
        unclear = self.headers.defects or not self.path.isprintable() or any(names.count(name) > 1 for name in FRAMING)
        if unclear or ("transfer-encoding" in names and "content-length" in names):
            self.close_connection = True
            raise Refusal("the request's head is not well-formed HTTP")
        host, target = self.headers.get("Host", ""), self.path
        if absolute := ABSOLUTE.fullmatch(target):  # the form for proxies; some proxies pass it on unchanged
            host, target = absolute[1], "/" + absolute[2].removeprefix("/")
        self._path, _, query = target.partition("?")
        return host, query

    def _check_sender(self, host: str) -> None:
        """Refuse requests that a page of another site makes a browser send (CSRF), for every route.

        The browser may run on a machine that may call us; these headers tell which site sent the request. A page whose
        own name was made to resolve to our address (DNS rebinding) has its name in `Host`, and has no token.
        """
        site, origin = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Origin")
        if site not in ("same-origin", "none") or (origin is not None and origin.partition("://")[2] != host):
            headers = f"Origin {origin!r}, Sec-Fetch-Site {site!r}, Host {host!r}"
            message = f"a page of another site made a browser send this ({headers}); only our own page may"
            raise Refusal(message, status=403, code="other_site")
        if host and not self.server.api_tokens and not is_loopback_host(host):
            message = f"Host is {host!r}; without a STACK_API_TOKEN only localhost and 127.0.0.1 are answered"
            raise Refusal(message, status=403, code="other_host")

    def _find(self, shown: set[str], parties: set[str]) -> tuple[str, Part, Route]:
        """The name in the path, and the route. Refuses a caller without the right, before the body is read."""
        shape, named = shape_of(self._path)
        methods = self.server.api.served.get(shape)
        if methods is None:
            raise Refusal(f"there is no route {self._path!r}", status=404, code="not_found")
        if self.command not in methods:
            allowed = ", ".join(methods)
            message = f"{self._path} takes {allowed}, not {self.command}"
            raise Refusal(message, status=405, code="method_not_allowed", headers={"Allow": allowed})
        part, route = methods[self.command]
        if route.who != ANYONE and parties.isdisjoint(route.who):
            raise refused(route.who, shown, bool(self.server.operator_tokens))
        return named, part, route

    def _parties(self) -> tuple[set[str], set[str]]:
        """The parties whose token the request has, and the parties as which it may act.

        If workers need no token, every caller is a worker; and an operator too, if operators need none either.
        """
        server, (scheme, _, given) = self.server, self.headers.get("Authorization", "").partition(" ")
        token = given.strip().encode(errors="replace") if scheme.lower() == "bearer" else b""
        tokens = {"worker": server.api_tokens, "operator": server.operator_tokens, "viewer": server.viewer_tokens}
        # Compare with every token, so that the time does not show which one nearly matched.
        shown = {
            party
            for party, each in tokens.items()
            if any([hmac.compare_digest(token, known.encode()) for known in each])
        }
        if server.api_tokens:
            return shown, shown
        return shown, shown | ({"worker"} if server.operator_tokens else {"worker", "operator"})

    def _webhook(self, query: str) -> Answer:
        """A webhook, whose body may be large: check the sender first, and read only a few large bodies at a time.

        A signature can be checked only after the whole body is here. So an attacker may occupy the places for large
        bodies for a while; small ones need no place.
        """
        api = self.server.api
        api.check_webhook(self.headers, None)
        length = self.headers.get("Content-Length", "")
        is_small = len(length) < 9 and length.isdecimal() and int(length) <= BODY_BYTES
        if is_small:
            self._inbox.expect_within(SMALL_WEBHOOK_SECONDS)
        elif not self.server.limit.webhooks.acquire(blocking=False):
            raise Refusal("too many webhooks at once; polling will find the jobs", status=503, code="busy")
        try:
            body = self._body(WEBHOOK_BYTES)
            # Check before parsing, which takes many times its size in memory.
            api.check_webhook(self.headers, body)
            return api.webhook(self._request("", query, body))
        finally:
            if not is_small:
                self.server.limit.webhooks.release()

    def _body(self, most: int) -> bytes:
        """The whole body. It must be read, so that the next request on this connection begins in the right place."""
        coding, length = self.headers.get("Transfer-Encoding"), self.headers.get("Content-Length", "0")
        is_chunked = coding is not None and coding.lower() == "chunked" and self.request_version == "HTTP/1.1"
        if not is_chunked and (coding is not None or not re.fullmatch(r"[0-9]{1,12}", length)):
            raise Refusal("the body needs a Content-Length, or chunks", status=411, code="length_required")
        if not is_chunked and not int(length):
            return b""
        kind = self.headers.get("Content-Type", "")
        if (
            kind.partition(";")[0].strip().lower() != "application/json"
        ):  # an HTML form of another site cannot send JSON
            message = f"the body is {kind!r}; send JSON, with `Content-Type: application/json`"
            raise Refusal(message, status=415, code="unsupported_media_type")
        if not is_chunked and int(length) > most:
            raise body_too_large(int(length), most)
        try:
            return self._chunks(most) if is_chunked else self._whole(int(length))
        except OSError:  # connection reset, or timeout
            raise body_ended_early() from None

    def _whole(self, length: int) -> bytes:
        self._inbox.bytes_left = length
        body = self._read(length)
        self._is_unread = False
        return body

    def _chunks(self, most: int) -> bytes:
        """A chunked body (RFC 9112, 7.1). The connection is closed after it, so trailers are not read."""
        body = bytearray()
        self._inbox.bytes_left = UNREAD_BYTES
        while line := CHUNK_LINE.fullmatch(self.rfile.readline(CHUNK_LINE_BYTES)):
            size = int(line[1], 16)
            if not size:
                return bytes(body)
            if len(body) + size > most:
                raise body_too_large(len(body) + size, most)
            chunk = self._read(size + 2)
            if not chunk.endswith(b"\r\n"):
                raise Refusal("a chunk of the body does not end where it should", code="bad_body")
            body += chunk[:-2]
        raise Refusal("a chunk of the body does not begin with its length", code="bad_body")

    def _read(self, length: int) -> bytes:
        """Read exactly `length` bytes of the body."""
        data = self.rfile.read(length)
        if len(data) < length:
            raise body_ended_early()
        return data

    def _discard_body(self) -> None:
        """Read and discard the rest of a refused body. Closing the connection at once would reset it, and the client
        might lose the answer."""
        self._inbox.bytes_left = UNREAD_BYTES
        self._inbox.expect_within(UNREAD_SECONDS)
        with suppress(OSError, Refusal):
            self.connection.shutdown(socket.SHUT_WR)
            while self._inbox.readinto(bytearray(BODY_BYTES)):
                pass

    def _request(self, named: str, query: str, raw_body: bytes, *, may_act: bool = False) -> Request:
        try:
            body = json.loads(raw_body) if raw_body.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body is not JSON: {error}", code="bad_body") from None
        if not isinstance(body, dict):
            raise Refusal(f"the body is a JSON {type(body).__name__}, not an object", code="bad_body")
        return Request(urllib.parse.unquote(named), parameters(query), body, self.headers, self._is_gone, may_act)

    def _is_gone(self) -> bool:
        """Whether the client has disconnected; checked just before it gets a job."""
        poll = select.poll()
        poll.register(self.connection, HUNG_UP)
        return bool(poll.poll(0))

    def _write(self, answer: Answer) -> None:
        self.connection.settimeout(DEPARTURE_SECONDS)
        self.wfile.write(self._packet(answer))
        if log.isEnabledFor(logging.DEBUG):
            log.debug(event("answered", method=self.command, path=self._path, status=answer.status))

    def _packet(self, answer: Answer) -> bytes:
        body = json_of(answer.body) if isinstance(answer.body, dict) else answer.body or b""
        headers = answer.headers
        if answer.status not in (204, 304):
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        is_last = self._is_unread or self.server.stopping or not self._is_known
        self.close_connection = self.close_connection or is_last
        if self.close_connection:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        return head + (b"" if self.command == "HEAD" else body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer the base class's errors (bad request line or headers) as JSON."""
        self.close_connection = True
        with suppress(OSError):
            text = (message or http.HTTPStatus(code).phrase)[:MESSAGE_CHARACTERS]
            self._write(Answer(code, {"error": "bad_request", "message": text}))

    def log_message(self, format: str, *args: Any) -> None:
        """Disable the base class's log; we log events ourselves."""


def refused(who: Collection[str], known: Collection[str], has_operators: bool) -> Refusal:
    """The error for a caller that may not call a route: 401 without a token, 403 with another party's token."""
    names = {"worker": "STACK_API_TOKEN", "operator": "OPERATOR_TOKEN", "viewer": "VIEWER_TOKEN"}
    wanted = " or ".join(names[kind] for kind in who)
    if not known:
        message = f"this needs `Authorization: Bearer <token>` with a token from the scheduler's {wanted}"
        return Refusal(message, status=401, code="unauthorized", headers={"WWW-Authenticate": "Bearer"})
    if who == OPERATORS:
        how = "send such a token" if has_operators else "it is not set, so nobody can call this"
        message = f"only operators may do this, with a token from the scheduler's OPERATOR_TOKEN: {how}"
        return Refusal(message, status=403, code="operators_only")
    message = f"this token is for other routes; this route needs {wanted}"
    return Refusal(message, status=403, code="workers_only")


#: POLLRDHUP reports a client that has closed. On systems without it, only a broken connection is noticed.
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class RateLimitedLog:
    """Logs an event that clients can cause at will at most once in REFUSALS_SECONDS, with the number of times."""

    def __init__(self, word: str, counted: str, level: int):
        """`counted`: the name of the log field for the number of times."""
        self._word, self._counted, self._level = word, counted, level
        self._lock = threading.Lock()  # guards the next two
        self._count, self._reported_at = 0, -math.inf

    def tell(self, now: float, **fields: object) -> None:
        """The event has happened. `now`: monotonic seconds."""
        with self._lock:
            self._count += 1
            if now - self._reported_at < REFUSALS_SECONDS:
                return
            count, self._count, self._reported_at = self._count, 0, now
        log.log(self._level, event(self._word, **fields, **{self._counted: count}))


class ConnectionLimit:
    """Limits the connections of all listeners, and the large webhooks that are read at a time.

    If a token is needed, a connection is a stranger until it has sent a valid one. When there are many strangers, and
    only the reserved part of the connections is left, each new connection ends the oldest stranger: a client becomes
    known with its first request.
    """

    def __init__(self, connections: int):
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_connections = max(1, min(connections, files - OTHER_FILES))
        self.webhooks = threading.BoundedSemaphore(WEBHOOKS)
        self._lock = threading.Lock()  # guards the next two
        self.connections = 0
        #: Accepted socket → socket to shut down (another one with TLS), the oldest first.
        self._strangers: dict[socket.socket, socket.socket] = {}

    def enter(self, accepted: socket.socket, *, is_stranger: bool) -> tuple[bool, bool]:
        """Count a new connection. Return whether it may be served, and whether it ended a stranger."""
        with self._lock:
            kept, is_below = self.max_connections * KEPT_PART, self.connections < self.max_connections
            # A few strangers are normal, because workers of a busy fleet reconnect: then end none.
            is_scarce = self.connections >= self.max_connections - kept and len(self._strangers) >= kept / 2
            is_ending = self._strangers and (is_scarce or not is_below)
            oldest = self._strangers.pop(next(iter(self._strangers))) if is_ending else None
            self.connections += is_below
            if is_below and is_stranger:
                self._strangers[accepted] = accepted
        if oldest:
            shut_down(oldest)
        return is_below, oldest is not None

    def wrapped(self, accepted: socket.socket, connection: socket.socket) -> None:
        """The connection uses TLS now."""
        with self._lock:
            if accepted in self._strangers:
                self._strangers[accepted] = connection

    def keep(self, accepted: socket.socket) -> None:
        """The connection has sent a valid token: it is no stranger any more."""
        with self._lock:
            self._strangers.pop(accepted, None)

    def leave(self, accepted: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(accepted, None)
            self.connections -= 1


class Server(http.server.ThreadingHTTPServer):
    """A listener, with one thread per connection; a claim waits on its thread."""

    daemon_threads = True
    block_on_close = False  # at a stop all claims are answered already; do not wait for slow clients

    def __init__(
        self,
        listener: socket.socket,
        api: Api,
        limit: ConnectionLimit,
        api_tokens: Collection[str] = (),
    ):
        self.api, self.limit = api, limit
        #: The tokens of each party (workers: empty means that none is needed). Read for each request.
        self.api_tokens = api_tokens
        self.operator_tokens: Collection[str] = ()
        self.viewer_tokens: Collection[str] = ()
        #: Read for each handshake.
        self.tls: ssl.SSLContext | None = None
        #: If True, every answer closes its connection, so that the client reconnects to the next process.
        self.stopping = False
        #: When (monotonic) the accept loop last ran.
        self.accepting_at = time.monotonic()
        #: Clients whose request is not answered yet, and new connections.
        self.unanswered: set[Any] = set()
        self._refused = RateLimitedLog("refused", "connections", logging.ERROR)
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()  # the base class's own, which was never bound
        self.socket = listener

    def use(self, settings: Settings, tls: ssl.SSLContext | None) -> None:
        """Use the reloaded settings."""
        self.api.use(settings)
        self.api_tokens, self.tls = settings.stack_api_token, tls
        self.operator_tokens, self.viewer_tokens = settings.operator_token, settings.viewer_token

    def service_actions(self) -> None:
        """Called by the accept loop, twice a second and after each connection."""
        self.accepting_at = time.monotonic()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Without a free file descriptor, wait a moment: the connection stays in the backlog."""
        try:
            return super().get_request()
        except OSError as error:
            self._tell_refused(f"a connection cannot be accepted: {error}")
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread, if the limit allows it."""
        is_served, has_ended = self.limit.enter(request, is_stranger=bool(self.api_tokens))
        if has_ended:
            self._tell_refused("many connections: each new one ends the oldest one without a token")
        if not is_served:
            self._turn_away(request, f"there are {self.limit.max_connections} connections")
            return
        self.unanswered.add(client_address)
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # the system gives no more threads
            self._left(request, client_address)
            self._turn_away(request, str(error))

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left(request, client_address)

    def _left(self, request: Any, client_address: Any) -> None:
        self.unanswered.discard(client_address)
        self.limit.leave(request)

    def wait_for_answers(self, ends_at: float) -> None:
        """Wait until every request is answered, at most until `ends_at` (monotonic)."""
        while self.unanswered and time.monotonic() < ends_at:
            time.sleep(0.01)

    def _turn_away(self, request: socket.socket, reason: str) -> None:
        """Answer 503 (with TLS, only close) without waiting for the client, because this is the accept loop."""
        self._tell_refused(reason)
        request.setblocking(False)
        if not self.tls:
            with suppress(OSError):
                request.send(TURNED_AWAY)
        self.shutdown_request(request)

    def _tell_refused(self, reason: str) -> None:
        self._refused.tell(time.monotonic(), reason=reason)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections; log any other error, which is a bug."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception(event("failed", client=client_address, reason="a bug of the scheduler; please report it"))


BUSY = json.dumps({"error": "too_many_connections", "message": "too many connections; try again in a moment"})
TURNED_AWAY = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BUSY)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n{BUSY}"
).encode()


def check_exposure(listeners: Iterable[socket.socket], settings: Settings) -> None:
    """Raise SettingsError if a listener is reachable from other machines and no token is set."""
    for listener in filter(beyond_loopback, listeners):
        address = str(listener.getsockname()[0])
        if not settings.stack_api_token:
            raise SettingsError(needs_token(address))
        if not settings.tls_cert:
            log.warning(
                event("unencrypted", listen=address, reason="tokens cross the network unencrypted: set TLS_CERT")
            )


def beyond_loopback(listener: socket.socket) -> bool:
    """Whether other machines can reach this listener, by the socket's own address (it may be from systemd)."""
    return not is_loopback(listener.getsockname()[0].partition("%")[0])


# --- Page ---
# The web page: one file, and a route for recent jobs. The page gets all other data from the API's routes.

#: page.html, beside this script.
PAGE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
#: `GET /history`: default and longest time to look back. The store keeps `done` jobs for a day.
HISTORY_HOURS, MAX_HISTORY_HOURS = 3.0, 24.0
#: `GET /history`: most done jobs, points of the curve, and most `ready` and most `reserving` jobs.
HISTORY_JOBS, HISTORY_POINTS, HISTORY_WAITING = 2000, 120, 1000
#: Requests within this time get the same answer.
HISTORY_SECONDS = 5.0


class WebPage(Part):
    """The web page, and `GET /history` for its timeline."""

    def __init__(self, store: Store, fleet: Callable[[], Fleet], now: Callable[[], float], file: str = PAGE_FILE):
        """`file`: path of the page. If it is missing, everything else works."""
        self._store, self._fleet, self._now = store, fleet, now
        self._body, self._missing = b"", ""
        try:
            with open(file, "rb") as page:
                self._body = page.read()
        except OSError as error:
            self._missing = f"{file}: {error.strerror}; copy page.html beside scheduler.py and restart it"
        self._headers = page_headers(self._body)
        self._lock = threading.Lock()  # guards the rest; held while an answer is made, so that requests share it
        self._histories: dict[tuple[float, str], tuple[float, bytes]] = {}

    def page(self, request: Request) -> Answer:
        """GET /"""
        if self._missing:
            raise Refusal(f"there is no page: {self._missing}", status=404, code="no_page")
        return Answer(200, self._body, self._headers)

    def history(self, request: Request) -> Answer:
        """GET /history?hours=3&host=rack3: the runs of jobs, and the number of waiting and running jobs over time"""
        text, host = request.query.get("hours", str(HISTORY_HOURS)), request.query.get("host", "")
        hours = float(text) if re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", text) else 0.0
        if not 0 < hours <= MAX_HISTORY_HOURS:
            raise Refusal(f"hours is {text!r}; it may be over 0 up to {MAX_HISTORY_HOURS:.0f}", code="bad_query")
        now = self._now()
        with self._lock:
            self._histories = {
                key: kept for key, kept in self._histories.items() if 0 <= now - kept[0] < HISTORY_SECONDS
            }
            if (hours, host) not in self._histories:
                self._histories[hours, host] = now, json_of(self._make_history(now, hours, host))
            return Answer(200, self._histories[hours, host][1])

    def _make_history(self, now: float, hours: float, host: str) -> dict[str, Any]:
        since, fleet = now - hours * 3600, self._fleet()
        done = self._store.rows.done_since(since, HISTORY_JOBS)
        is_cut = len(done) == HISTORY_JOBS
        if is_cut:
            since = done[-1].done_at or since
        held = [job for found in fleet.stats["at_work"] if (job := self._store.get(found.uuid))]
        lines = (self._store.page(state, None, HISTORY_WAITING) for state in (JobState.READY, JobState.RESERVING))
        waiting = list(itertools.chain.from_iterable(lines))
        is_curve_cut = is_cut or len(waiting) < fleet.stats["states"]["ready"] + fleet.stats["states"]["reserving"]
        runs = [run for job in (*done, *held, *waiting) for run in runs_of(job) if run["host"] == host or not host]
        return {
            "now": rfc3339(now),
            "since": rfc3339(since),
            "truncated": is_cut,
            "runs": [run for run in runs if run["ended_at"] >= rfc3339(since)],
            "curve": curve_of([*done, *held, *waiting], since, now) | {"truncated": is_curve_cut},
            "holds": past_holds(self._store.acts(KEPT_ACTS), fleet.workers, since),
        }

    routes = (Route("GET", "/", page, ANYONE), Route("GET", "/history", history, VIEWER))


def page_headers(body: bytes) -> dict[str, str]:
    """The page's security headers: it may only run its own script and styles (by hash), and call this scheduler."""
    hashes = {}
    for tag in (b"script", b"style"):
        parts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        hashes[tag] = " ".join(f"'sha256-{each}'" for each in digests) or "'none'"
    allowed = (
        f"default-src 'none'; script-src {hashes[b'script']}; style-src {hashes[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": allowed,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def runs_of(job: Job) -> list[dict[str, Any]]:
    """The runs of a job on workers: claims that no agent acquired, and the last claim if the job is done."""
    names = {"uuid": job.uuid, "queue_key": job.queue_key} | {
        key: job.about.get(key) for key in ("pipeline", "build", "step")
    }
    runs = [
        names
        | {name: ended.get(name) for name in ("worker", "host", "reason")}
        | {"outcome": "lost", "claimed_at": rfc3339(ended["claimed_at"]), "ended_at": rfc3339(ended["ended_at"])}
        for ended in job.tries
    ]
    if job.done_at and job.claimed_at and job.claimed_at not in [ended["claimed_at"] for ended in job.tries]:
        times = {"claimed_at": rfc3339(job.claimed_at), "ended_at": rfc3339(job.done_at)}
        last = {"worker": job.worker, "host": job.host, "reason": job.reason, "outcome": job.outcome}
        runs.append(names | last | times)
    return runs


def curve_of(jobs: Iterable[Job], since: float, now: float) -> dict[str, Any]:
    """How many of these jobs waited, and how many were with workers, at points in time."""
    step = (now - since) / HISTORY_POINTS or 1.0
    changes = {"waiting": [0] * (HISTORY_POINTS + 1), "running": [0] * (HISTORY_POINTS + 1)}

    def point(at: float) -> int:
        """Index of the curve's first point at or after a time; HISTORY_POINTS if it has none."""
        return min(HISTORY_POINTS, max(0, math.ceil((at - since) / step)))

    def count(name: str, began_at: float, ended_at: float) -> None:
        if ended_at >= since:
            changes[name][point(began_at)] += 1
            changes[name][point(ended_at)] -= 1

    for job in jobs:
        over_at = job.done_at or now
        is_at_work = job.claimed_at is not None and job.state not in (JobState.RESERVING, JobState.READY)
        claimed_at = job.claimed_at if is_at_work and job.claimed_at else over_at
        count("waiting", job.put_at, claimed_at)
        if is_at_work:
            count("running", claimed_at, over_at)
    curves = {name: list(itertools.accumulate(deltas))[:-1] for name, deltas in changes.items()}
    return {"from": rfc3339(since), "every_seconds": round(step, 3), **curves}


def past_holds(acts: Iterable[OperatorAct], workers: Iterable[Worker], since: float) -> list[dict[str, Any]]:
    """Operators' holds that have ended since `since`: times and workers, computed from the last acts."""
    workers = list(workers)
    began: dict[str, float] = {}
    held = []
    for act in sorted(acts, key=lambda act: act.at):
        if act.act in HOLDING_ACTS.values():
            began.setdefault(act.target, act.at)
        elif act.act in ("resume", EXPIRED) and (began_at := began.pop(act.target, None)) and act.at >= since:
            hold = Hold(act.target, OPERATOR, PAUSED)
            names = [worker.name for worker in workers if worker.name and binds(hold, None, worker)]
            held.append({"target": act.target, "since": rfc3339(began_at), "until": rfc3339(act.at), "workers": names})
    return held


# --- Metrics ---

#: Limit of rule sets used as labels (all others are counted as "other"), and of a label's characters (rule sets with
#: the same beginning are counted together).
RULE_SET_LABELS, OTHER_RULE_SETS, LABEL_LETTERS = 100, "other", 300
#: Limit of Buildkite's reasons for not issuing a token that become labels: a reason may contain the job's uuid.
WORDS_LABELS = 20
#: Buckets in seconds of the histogram of a job's life; below, those of the store (STORE_BUCKETS).
STRETCH_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 24 * 3600)
#: The store's verbs whose times are shown from the start; others are shown when they were used.
TIMED_VERBS = (
    *("put", "confirm", "learn", "finish", "claim", "touch", "release", "complete", "expire", "freeze", "decide"),
)
STORE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """Counters and histograms of events since the start. Gauges are not stored: they are computed for each request.

    No global state and no blocking: all of it costs a claim some microseconds.
    """

    def __init__(self) -> None:
        self._events = prometheus_client.CollectorRegistry()
        self._moves = self._counter("stack_moves", "Jobs moved, by verb and reason.", "queue", "verb", "reason")
        self._stretches = self._histogram(
            "stack_stretch_seconds", "How long each stretch of a job's life took.", STRETCH_BUCKETS, "queue", "stretch"
        )
        calls = "Calls to Buildkite, by endpoint and HTTP status; 0: no answer."
        self._calls = self._counter("stack_buildkite_calls", calls, "queue", "endpoint", "status")
        odd = "Listed jobs with a wrong value in a field; with a wrong `id` they cannot be run."
        self._odd = self._counter("stack_odd_jobs", odd, "queue", "field")
        not_issued = "Claims for whose job Buildkite issued no job acquisition token, by its reason."
        self._not_issued = self._counter("stack_tokens_not_issued", not_issued, "queue", "reason")
        self._words: set[str] = set()  # label values of _not_issued
        #: Requests that were answered 401.
        self.unauthorized = self._counter(
            "stack_unauthorized", "Requests that were refused because they had no valid token."
        )
        self.store_seconds = self._histogram(
            "stack_store_seconds", "Time that the store took to write, by verb.", STORE_BUCKETS, "verb"
        )
        for verb in TIMED_VERBS:
            self.store_seconds.labels(verb)  # so that every verb is shown from the start
        self._lock = threading.Lock()  # guards _labels
        self._labels: set[str] = set()
        # Cache of the client's objects for label values: looking one up costs more than counting.
        self._child = functools.lru_cache(maxsize=4096)(lambda metric, *values: metric.labels(*values))

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(name, text, labels, registry=self._events)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(name, text, labels, buckets=buckets, registry=self._events)

    # Called by the rest of the scheduler

    def timed(self, verb: str, seconds: float) -> None:
        """The store has executed a verb, with or without success."""
        self._child(self.store_seconds, verb).observe(seconds)

    def called(self, queue_key: str, endpoint: str, status: int) -> None:
        """A call to Buildkite has ended; status 0: without an answer."""
        self._child(self._calls, queue_key, endpoint, str(status)).inc()

    def odd(self, queue_key: str, field: str) -> None:
        """A field of a listed job had a wrong value."""
        self._child(self._odd, queue_key, field).inc()

    def not_issued(self, queue_key: str, words: str) -> None:
        """Buildkite issues no token for a job."""
        if words not in self._words and len(self._words) >= WORDS_LABELS:
            words = OTHER_RULE_SETS
        self._words.add(words)
        self._child(self._not_issued, queue_key, words).inc()

    def on_move(self, move: Move, now: float) -> None:
        """Count a move, and the time of the stretch that it ends."""
        self._child(self._moves, move.job.queue_key, move.verb, move.code).inc()
        if took := stretch(move, now):
            self._child(self._stretches, move.job.queue_key, took[0]).observe(max(0.0, took[1]))

    def label(self, present: Collection[str]) -> Callable[[str], str]:
        """A function that returns a rule set's label. A rule set keeps its label until all labels are used and it has
        no jobs. An unprintable one gets "other": its escaped text might equal another's.
        """
        with self._lock:
            new = sorted(rule_set for rule_set in set(present) - self._labels if rule_set.isprintable())
            if len(self._labels) + len(new) > RULE_SET_LABELS:
                self._labels.intersection_update(present)
            self._labels.update(new[: RULE_SET_LABELS - len(self._labels)])
            labels = frozenset(self._labels)
        return lambda rule_set: rule_set[:LABEL_LETTERS] if rule_set in labels else OTHER_RULE_SETS

    def text(self, levels: Iterable[Metric]) -> bytes:
        """All metrics in the text format of Prometheus, the gauges (`levels`) first."""
        return prometheus_client.generate_latest(Families([*levels, *self._events.collect()]))


class Families(prometheus_client.registry.Collector):
    """A collector of given families, with escaped labels, and without `_created` samples, which double the text."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            family.samples = [
                sample._replace(labels={name: visible(value) for name, value in sample.labels.items()})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield family


def build_info() -> Metric:
    """The version as a label of a gauge with value 1, as is usual for Prometheus."""
    return gauge("stack_build_info", "The version of this scheduler, always 1.", ["version"], [((VERSION,), 1.0)])


def gauge(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """A gauge with a value for each combination of labels."""
    return with_values(GaugeMetricFamily(name, text, labels=labels), values)


def counter(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """A counter with a value for each combination of labels."""
    return with_values(CounterMetricFamily(name, text, labels=labels), values)


def with_values(
    family: GaugeMetricFamily | CounterMetricFamily, values: Iterable[tuple[Sequence[str], float]]
) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def levels_of(fleet: Fleet, label: Callable[[Collection[str]], Callable[[str], str]], now: float) -> list[Metric]:
    """The gauges of this moment, from the store and the workers' claims."""
    levels: list[RuleSetCount] = fleet.stats["levels"]
    labelled = label({level.rule_set for level in levels})
    jobs: collections.Counter[tuple[str, ...]] = collections.Counter()
    oldest: dict[tuple[str, ...], float] = {}
    for level in levels:
        where = (level.queue_key, labelled(level.rule_set))
        jobs[(level.state, *where)] += level.jobs
        if level.waits:
            oldest[where] = max(oldest.get(where, 0.0), now - level.oldest)
    totals = sorted(fleet.stats["totals"].items())
    done = [((queue_key, outcome), count) for queue_key, of_queue in totals for outcome, count in of_queue.items()]
    paused = [((queue_key,), 1.0) for queue_key in fleet.stats["paused"]]
    without: collections.Counter[tuple[str, ...]] = collections.Counter()
    for level in fleet.unmatched():
        without[level.queue_key, labelled(level.rule_set)] += level.jobs
    unmatched = sorted(without.items())
    waiting: collections.Counter[tuple[str, ...]] = collections.Counter()
    for row in fleet.waiting():
        waiting[RuleSet.read(row.rule_set).queue_key, row.reason.why] += row.jobs
    return [
        gauge("stack_store_up", "Whether the store could be read.", [], [((), 1.0)]),
        build_info(),
        gauge("stack_jobs", "Jobs that are not done.", ["state", "queue", "rules"], sorted(jobs.items())),
        gauge("stack_jobs_waiting", "Waiting jobs, by reason.", ["queue", "why"], sorted(waiting.items())),
        gauge("stack_oldest_wait_seconds", "Longest wait of a job.", ["queue", "rules"], sorted(oldest.items())),
        gauge("stack_unmatched_jobs", "Waiting jobs that no live worker matches.", ["queue", "rules"], unmatched),
        gauge("stack_workers", "Known workers, by state.", ["state"], [((d,), fleet.doing[d]) for d in WorkerState]),
        *levels_of_hosts(fleet),
        gauge("stack_queue_paused", "1 for each paused queue.", ["queue"], paused),
        counter("stack_jobs_done", "Jobs done since the store was made.", ["queue", "outcome"], done),
    ]


def levels_of_hosts(fleet: Fleet) -> list[Metric]:
    """For each host: free space for builds, processes left behind by jobs, and how long it has had no job."""
    free: dict[tuple[str, ...], float] = {}
    strays: collections.Counter[tuple[str, ...]] = collections.Counter()
    for member in fleet.members:
        if host := member.worker.host:
            strays[(host,)] += member.row.strays
            if (bytes_left := member.row.free_bytes) is not None:
                free[(host,)] = min(bytes_left, free.get((host,), math.inf))
    idle = [((host,), seconds) for host, seconds in sorted(fleet.idle_hosts().items())]
    return [
        gauge("stack_host_free_bytes", "Free space for builds, after the last jobs.", ["host"], sorted(free.items())),
        counter("stack_host_strays", "Processes that jobs left behind.", ["host"], sorted(strays.items())),
        gauge("stack_host_idle_seconds", "Time since a worker of the host had a job.", ["host"], idle),
    ]


def stretch(move: Move, now: float) -> tuple[str, float] | None:
    """The stretch of the job's life that this move ends, and its length in seconds; None if it ends none."""
    verb, job = move.verb, move.job
    if verb == "confirm" and job.reserved_at == now:
        return "scheduled_to_reserved", now - job.scheduled_at
    if verb == "claim" and move.code != "again" and job.reserved_at:
        return "reserved_to_claimed", now - job.reserved_at
    if verb == "acquire" and job.claimed_at:
        return "claimed_to_running", now - job.claimed_at
    if verb == "run" and job.acquired_at:
        return "running_to_done", now - job.acquired_at
    return None


#: We get Buildkite's own metrics at most every ASK_SECONDS, only if ours were read in the last READ_SECONDS, and show
#: them until they are OLD_SECONDS old.
ASK_SECONDS, READ_SECONDS, OLD_SECONDS = 15.0, 300.0, 300.0
#: Buildkite's numbers of jobs and agents, with the names of its own exporter.
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


class ClusterMetrics(Part):
    """Buildkite's own metrics of the whole cluster, with the names of Buildkite's exporter."""

    def __init__(self, stack: Stack, now: Callable[[], float]):
        self._stack = stack
        self._read_at = self._answered_at = -math.inf
        self._answer: dict[str, Any] = {}
        self.task = PeriodicTask("metrics", self.tick, now)
        self.tasks = [self.task]

    def tick(self, now: float) -> float:
        if now - self._read_at > READ_SECONDS:
            return READ_SECONDS  # a read of our metrics wakes the task
        self._answer, seconds = self._stack.metrics()
        self._answered_at = now
        return min(max(ASK_SECONDS, seconds), MAX_ASKED_SECONDS)

    def metrics(self, now: float) -> Iterable[Metric]:
        """The metrics, if known. This read keeps them up to date for the next minutes."""
        was_read, self._read_at = now - self._read_at <= READ_SECONDS, now
        if not was_read:
            self.task.wake()
        if now - self._answered_at <= OLD_SECONDS:
            cluster = str(an_object(self._answer, "cluster").get("name") or "")
            of_queues = queues_of(self._answer)
            for name, values in numbers(self._answer).items():
                yield gauge(f"buildkite_total_{name}", "Buildkite's own count.", ["cluster"], [((cluster,), values)])
                by_queue = [((queue_key, cluster), numbers(part)[name]) for queue_key, part in of_queues.items()]
                yield gauge(f"buildkite_queues_{name}", "Buildkite's own count.", ["queue", "cluster"], by_queue)


def queues_of(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each queue's part of the answer, in the same form as the whole."""
    maps = {kind: an_object(an_object(answer, kind), "queues") for kind in ("jobs", "agents")}
    keys = sorted({*maps["jobs"], *maps["agents"]})
    return {key: {kind: an_object(of_queues, key) for kind, of_queues in maps.items()} for key in keys}


def numbers(part: Mapping[str, Any]) -> dict[str, int]:
    """Buildkite's eight numbers; a missing or invalid one is 0."""
    found = {}
    for name, kind, field in CLUSTER_NUMBERS:
        value = an_object(part, kind).get(field)
        found[name] = value if isinstance(value, int) and 0 <= value < 2**63 else 0
    total = found["total_agent_count"]
    return found | {"busy_agent_percentage": 100 * found["busy_agent_count"] // total if total > 0 else 0}


# --- Main ---

USAGE = """usage: scheduler.py [--check | --help | --version | help | COMMAND ...]

Reserves Buildkite jobs through the Stacks API and hands them to workers over HTTP.

  --check   test settings, store and Buildkite (it registers each queue's stack), and exit: 0, or 78 with every problem
  --help    print this
  --version print the version
  help      list the commands for operators, like `status`; they call a running scheduler

Examples:
  BUILDKITE_AGENT_TOKEN=... ./scheduler.py
  SCHEDULER_QUEUES=default,linux STATE_DIRECTORY=/var/lib/stack ./scheduler.py
  curl 'http://127.0.0.1:18888/stats'"""

#: Exit statuses: another scheduler has the store; the store or the address cannot be used. See also EXIT_SETTINGS (78).
EXIT_BUSY, EXIT_IO = 75, 74
#: A stop waits so long, each, for tasks, deregistrations and answers. The next start repeats calls that took longer.
STOP_SECONDS = 5.0
#: How often systemd's status line is renewed; and how often we check for readiness at the start.
REPORT_SECONDS, READY_SECONDS = 5.0, 0.1


def main(arguments: Sequence[str]) -> int:
    if arguments in (["--help"], ["-h"], ["--version"]):
        sys.stdout.write(f"scheduler.py {VERSION}\n" if arguments == ["--version"] else help_text(Settings, USAGE))
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
        log_ignored(unknown_settings(Settings, environ) + ignored_settings(settings, environ))
        for reason in unsafe(settings, environ):
            log.warning(event("unsafe", reason=reason))
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
    """Creates and connects the parts, runs the main thread, and stops the parts in order."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]):
        self._settings, self._environ = settings, environ
        raise_open_file_limit()
        # Wakes the main thread. An Event would not work: the system may deliver a signal to any thread, and then the
        # main thread, waiting for a lock, is not interrupted. Python writes the signal's number to this socket.
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._ending = False
        self._exit_status = 0
        self._ready = False
        self._stacks, self._monitor = stacks_of(settings, environ), monitor_of(settings, environ)
        self._sources: list[Source] = [*self._stacks, *([self._monitor] if self._monitor else [])]
        self._store = open_store(settings)
        shared = self._store.rows if isinstance(self._store.rows, RedisRows) else None
        self._clock = Clock(shared.wall_clock if shared else None)
        now = self._clock.now
        self._metrics = Metrics()
        for source in self._sources:
            source.on_call, source.on_odd = self._metrics.called, self._metrics.odd
        self._begin_store()
        self._dispatcher = Dispatcher(self._store, now)
        if not shared:
            self._store.restart_leases(now(), confirm=True)
        self._lead = Leadership(self._store, shared)
        self._intakes = {
            source.queue_key: Intake(source, self._lead, self._dispatcher, settings, now, self._give_up)
            for source in self._sources
        }
        self._freezes = Freezes(settings, self._lead, self._dispatcher, list(self._intakes), now)
        self._policy = self._begin_policy() if settings.policy_file else None
        self._peers = self._begin_peers(shared) if shared else None
        self._api = Api(
            self._store,
            self._dispatcher,
            self._intakes,
            settings,
            now,
            self._metrics,
            parts=self._other_parts(),
            organization=lambda: self._freezes.file.organization,
        )
        self._servers = self._listen()

    def _begin_store(self) -> None:
        orphans = self._store.remember_stacks(stack_keys_of(self._settings))
        for queue_key, left in orphans.items():
            reason = "not in SCHEDULER_QUEUES, so nothing asks Buildkite about these jobs; add it until they are done"
            log.error(event("orphaned", queue=queue_key, jobs=left, reason=reason))
        self._store.on_move = self._on_move
        self._store.on_timed = self._metrics.timed
        self._store.windows = FreezeWindows(self._clock.now)

    def _begin_peers(self, shared: RedisRows) -> Peers:
        shared.files = self._files
        with_token = functools.partial(self._store_of_term, shared)
        return Peers(shared, self._clock, self._dispatcher, self._lead, self._intakes, with_token)

    def _other_parts(self) -> list[Part]:
        """All parts except the intakes and the API. Add a new part here."""
        now = self._clock.now
        graph_api = graph_api_of(self._settings, self._environ)
        rest_api = rest_api_of(self._settings, self._environ)
        graph_api.on_call = rest_api.on_call = self._metrics.called
        return [
            self._freezes,
            PeriodicBuilds(lambda: self._freezes.file, self._lead, rest_api, graph_api, now),
            Upkeep(self._lead, self._clock, self._intakes, self._dispatcher),
            Canceller(graph_api, self._lead, self._intakes, now),
            *([ClusterMetrics(self._stacks[0], now)] if self._stacks else []),
            *([self._policy] if self._policy else []),
            *([self._peers] if self._peers else []),
            WebPage(self._store, lambda: Fleet(self._store, self._dispatcher, now()), now),
        ]

    def _listen(self) -> list[Server]:
        settings, environ = self._settings, self._environ
        listeners = listening_sockets(settings.listen, environ)
        check_exposure(listeners, settings)
        if not settings.stack_api_token:
            log.warning(event("open", reason="STACK_API_TOKEN is empty, so every user of this machine can take jobs"))
        limit, tls = ConnectionLimit(settings.max_connections), tls_context(settings)
        servers = [Server(listener, self._api, limit) for listener in listeners]
        for server in servers:
            server.use(settings, tls)
        log_ignored(ignored_listen(settings, environ, [listener.getsockname() for listener in listeners]))
        if environ.get("MAX_CONNECTIONS") and limit.max_connections < settings.max_connections:
            log_ignored([f"MAX_CONNECTIONS: the open-file limit leaves {limit.max_connections}; raise LimitNOFILE="])
        return servers

    def _files(self) -> dict[str, str]:
        """Hashes of the files that should be equal at all schedulers on one Redis, by setting."""
        stack_file = keyed_hash(self._settings, self._freezes.canonical) if self._settings.stack_file else ""
        return {"POLICY_FILE": self._policy.hash if self._policy else "", "STACK_FILE": stack_file}

    def _begin_policy(self) -> Policy:
        """Create the policy, and let it decide about the jobs of all queues."""
        policy = Policy(self._settings.policy_file, self._lead, self._dispatcher, self._clock.now)
        self._store.policy = policy.in_force
        for intake in self._intakes.values():
            intake.use_policy(policy)
        return policy

    @property
    def _tasks(self) -> list[PeriodicTask]:
        return [task for part in self._api.parts for task in part.tasks]

    def _store_of_term(self, shared: RedisRows, token: str) -> Store:
        return self._store.with_rows(shared.with_token(token))

    def _on_move(self, move: Move, now: float) -> None:
        """Pass a move to its listeners."""
        log_move(move)
        self._metrics.on_move(move, now)
        if intake := self._intakes.get(move.job.queue_key):
            intake.on_move(move)
            if intake.is_telling:
                intake.notifier.on_move(move, now)

    def _give_up(self, reason: str) -> None:
        """Stop with EXIT_SETTINGS, because a restart cannot help."""
        log.error(event("stopped", reason=reason))
        self._exit_status = EXIT_SETTINGS
        self._ending = True
        self._waker.send(b"\0")

    def run(self) -> int:
        faulthandler.enable()  # a watchdog's SIGABRT then writes the stacks of all threads to the journal
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)
        accepting = [
            threading.Thread(target=server.serve_forever, name="http", daemon=True) for server in self._servers
        ]
        for thread in accepting:
            thread.start()
        for task in self._tasks:
            task.start()
        log.info(event("started", version=VERSION, **self._described()))
        while not self._ending:
            self._report()
            # Until we are ready, systemd waits for READY=1, so check more often.
            self._wait(report_seconds(self._environ) if self._ready else READY_SECONDS)
        tell_systemd("STOPPING=1\nSTATUS=stopping")
        self._shut_down(accepting)
        return self._exit_status

    def _wait(self, seconds: float) -> None:
        """Wait at most `seconds`, and handle signals."""
        self._woken.settimeout(seconds)
        with suppress(TimeoutError):
            for number in self._woken.recv(64):
                if number == signal.SIGHUP:
                    self.reload()
                elif number == signal.SIGCHLD:
                    reap_zombies()
                else:
                    self._ending = self._ending or number in (signal.SIGTERM, signal.SIGINT)

    def _report(self) -> None:
        """Report our state to systemd. The watchdog gets its message only if no thread is stuck."""
        if not self._ready and self._is_ready():
            tell_systemd("READY=1")
            self._ready = True
        if stuck := self._stuck(time.monotonic()):
            log.error(event("stuck", threads=", ".join(stuck), reason="systemd's watchdog gets no messages any more"))
            tell_systemd(f"STATUS=stuck: {', '.join(stuck)}")
        elif "NOTIFY_SOCKET" in self._environ:
            # Keep it on one line, whatever Buildkite's text in it is: systemd reads each line as a command.
            status = visible(" ".join(self._status(self._clock.now()).split()))
            tell_systemd(f"WATCHDOG=1\nSTATUS={status}")

    def _is_ready(self) -> bool:
        """Whether the first registration of each queue has succeeded or failed; as a follower, if Redis answered."""
        if self._lead.store():
            return all(intake.was_registration_tried for intake in self._intakes.values())
        return self._peers is not None and self._peers.has_heard

    def _stuck(self, now: float) -> list[str]:
        """The names of threads that are stuck. `now`: monotonic seconds."""
        deaf = ["http" for server in self._servers if now - server.accepting_at > STUCK_SECONDS]
        return deaf + [task.name for task in self._tasks if task.stuck(now)]

    def _status(self, now: float) -> str:
        """The status line for systemd: "12 ready, 3 leased, 8 running; last poll 0.4 s ago"."""
        try:
            states = self._store.stats()["states"]
            problems = self._api.all_problems()
        except StoreUnavailable as error:
            return str(error)
        unconfirmed = [f"{states['reserving']} reserving"] if states["reserving"] else []
        counts = ", ".join([f"{states[state]} {state}" for state in ("ready", "leased", "running")] + unconfirmed)
        polled_at = min(intake.last_list_at for intake in self._intakes.values())
        role = [self._peers.role] if self._peers else []
        poll = f"last poll {max(0.0, now - polled_at):.1f} s ago" if polled_at else "not polled yet"
        return "; ".join([counts, poll, *role, *problems[:1]])

    def reload(self) -> None:
        """SIGHUP: use new tokens, TLS files, STACK_FILE, POLICY_FILE, LOG_LEVEL. A file with a problem is not used."""
        reload(self._settings, self._environ, self._use)

    def _use(self, settings: Settings) -> None:
        """Use the reloaded settings. Raises SettingsError, before any change, when they cannot be used."""
        for name in ("stack_api_token", "operator_token"):
            if getattr(self._settings, name) and not getattr(settings, name):
                raise SettingsError(
                    f"{name.upper()}: is empty now, which would let everybody in; restart to allow that"
                )
        if problems := shared_tokens(settings):
            raise SettingsError("\n".join(problems))
        check_exposure([server.socket for server in self._servers], settings)
        tls = tls_context(settings)
        if self._policy:
            self._policy.reload()
        if settings.redis_addr != self._settings.redis_addr:
            log.warning(event("outdated", setting="REDIS_ADDR", reason="it has changed; restart to use it"))
            settings = dataclasses.replace(settings, redis_addr=self._settings.redis_addr)
        self._settings = settings
        self._freezes.reload()
        self._watch()
        for server in self._servers:
            server.use(settings, tls)

    def _watch(self) -> None:
        """Take over which pipelines [monitor] names now."""
        file, monitor = self._freezes.file, self._monitor
        was = monitor and (monitor.key, monitor.queue_key, monitor.token_setting)
        is_now = file.monitor and (monitor_key(file.organization), file.monitor.queue, file.monitor.token_setting)
        if was != is_now:
            reason = "more of it than its pipelines has changed, which takes a restart"
            log.warning(event("outdated", setting="[monitor]", reason=reason))
        elif monitor and file.monitor:
            monitor.use(file.monitor)

    def _described(self) -> dict[str, object]:
        """All settings except the secrets, with the address that is really bound."""
        settings = {
            f.name: getattr(self._settings, f.name) for f in dataclasses.fields(Settings) if not f.metadata["secret"]
        }
        bound = (server.server_address[:2] for server in self._servers)
        return settings | {
            "store": self._settings.redis_addr or "sqlite",
            "listen": ",".join(f"{host!s}:{port}" for host, port in bound),
            "inherited": is_inherited(self._environ) or None,
            "max_connections": self._servers[0].limit.max_connections,
            "proxy": proxy_of(self._settings.buildkite_agent_endpoint) or None,
            "scheduler_queues": ",".join(self._settings.scheduler_queues),
        }

    def _shut_down(self, accepting: Sequence[threading.Thread]) -> None:
        log.info(event("stopping"))
        # 1. No new claims; the waiting ones are answered. A socket of systemd stays open and keeps new connections for
        #    the next process; with our own socket we serve them until step 4.
        for server in self._servers:
            server.stopping = True
            if is_inherited(self._environ):
                server.shutdown()
        self._dispatcher.stop()
        # 2. No new calls to Buildkite; running calls end, or their jobs stay `reserving` in the store.
        self._stop_tasks()
        if self._policy:
            self._policy.stop()
        # 3. Stacks without jobs are deregistered; the others keep their reservations for the next start.
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

    def _stop_tasks(self) -> None:
        if self._peers:
            self._peers.stop()
        tasks = self._tasks
        for task in tasks:
            task.stop()
        ends_at = time.monotonic() + STOP_SECONDS
        for task in tasks:
            if not task.join(max(0.0, ends_at - time.monotonic())):
                log.warning(event("abandoned", task=task.name, reason="its call did not end; a restart repeats it"))

    def _take_down_stacks(self) -> None:
        if self._peers and not self._peers.is_alone:
            return  # the next leader needs them
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


def log_ignored(problems: Iterable[str]) -> None:
    for problem in problems:
        log.warning(event("ignored", problem=problem))


#: `requests` reads these from the environment of the process.
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


def ignored_settings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Messages about settings that are set but have no effect."""
    secret_names = [field.name.upper() for field in dataclasses.fields(Settings) if field.metadata["secret"]]
    problems = [
        f"{name}: is ignored, because {name}_FILE or the credential of this name is used"
        for name in secret_names
        if environ.get(name, "").strip() not in ("", read_variable(name, True, environ))
    ]
    # systemd sets STATE_DIRECTORY for each service that has one.
    if settings.redis_addr and settings.state_directory != "./state" and "INVOCATION_ID" not in environ:
        problems.append("STATE_DIRECTORY: is ignored, because with REDIS_ADDR the store is in Redis")
    in_file = [name for name in sorted(environ.keys() - os.environ) if name.upper() in PROXY_VARIABLES]
    problems += [f"{name}: is ignored in .env; set it in the environment of this process" for name in in_file]
    if "SETTINGS_FILE" in environ and not os.path.exists(settings.settings_file):
        problems.append(f"SETTINGS_FILE: {settings.settings_file} does not exist: SIGHUP finds no LOG_LEVEL")
    return [*problems, *stack_file_of(settings).warnings]


def ignored_listen(settings: Settings, environ: Mapping[str, str], bound: Sequence[tuple[Any, ...]]) -> list[str]:
    """A message that LISTEN is ignored, if systemd's socket unit passes another address."""
    anywhere = dict.fromkeys(("0.0.0.0", "::"), "") | {"localhost": "127.0.0.1"}
    places = [(anywhere.get(host, host), port) for host, port, *_ in [settings.listen, *bound]]
    if not is_inherited(environ) or not environ.get("LISTEN") or places[0] in places[1:]:
        return []
    where = ", ".join(f"{host}:{port}" for host, port, *_ in bound)
    return [
        f"LISTEN: {environ['LISTEN']} is ignored, because systemd's socket unit has the address, {where}; change it "
        "there (systemctl edit stack-scheduler.socket), or disable that unit"
    ]


def reap_zombies() -> None:
    """As process 1 of a container: reap orphaned processes, which would stay as zombies."""
    with suppress(ChildProcessError):
        while os.getpid() == 1 and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def report_seconds(environ: Mapping[str, str]) -> float:
    """Seconds between two reports to systemd: at most a third of the watchdog's time, if it watches this process."""
    watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    seconds = int(environ.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0
    return min(REPORT_SECONDS, seconds / 3) if seconds else REPORT_SECONDS


def open_store(settings: Settings) -> Store:
    """Open the store of the settings. Opening Redis reads its time, so this raises if Redis is unreachable."""
    rows: SqliteRows | RedisRows
    if settings.redis_addr:
        rows = RedisRows(settings, f"{first_label_of_host()}-{os.getpid()}-{secrets.token_hex(3)}")
    else:
        rows = SqliteRows(settings.state_directory)
        if rows.is_new:
            log.info(event("begun", store=settings.state_directory, reason="there was no store; a new one was made"))
    for level, found in ((logging.ERROR, rows.problems()), (logging.WARNING, rows.warnings())):
        for problem in found:
            log.log(level, event("unsafe", store=settings.redis_addr or "sqlite", reason=problem))
    return Store(rows, settings)


def log_move(move: Move) -> None:
    """Log a move on one line. Claims are logged when they are answered, operators' acts by their routes."""
    verb, job = move.verb, move.job
    about: dict[str, object] = {"job": job.uuid, "queue": job.queue_key}
    match verb:
        case "put":
            until = rfc3339(job.held_until)
            log.info(
                event("put", **about, rules=job.rule_set, priority=job.priority, held=job.held_reason, until=until)
            )
        case "confirm":
            held = {"held": job.held_reason, "window": job.held_note, "until": rfc3339(job.held_until)}
            log.info(event(job.state, **about, reason=job.reason, **held))
        case "freeze" | "thaw":
            held = {"window": job.held_note, "until": rfc3339(job.held_until)}
            log.info(event("frozen" if job.held_by else "thawed", **about, **held))
        case "release" | "expire" if job.held_reason == PUT_ASIDE.reason:
            log.warning(event(PUT_ASIDE.reason, **about, until=rfc3339(job.held_until), reason=job.reason))
        case "release" | "expire" | "complete":
            level = logging.WARNING if verb == "expire" else logging.INFO
            log.log(level, event(ENDS[verb], **about, worker=job.worker, state=job.state, reason=job.reason))
        case "finish":
            level = logging.INFO if job.outcome in POLICY_ENDS.values() else logging.ERROR
            log.log(level, event("finished", **about, outcome=job.outcome, reason=job.finish_detail))
        case "decide" | "review":
            log_decision(move, about)
        case "lapse" | "acquire" | "run" | "drop":
            log.info(event(job.outcome or job.state, **about, worker=job.worker, reason=job.reason))


def log_decision(move: Move, about: Mapping[str, object]) -> None:
    """Log a decision of the policy, or that the policy must be asked."""
    job, decision = move.job, move.job.decision or {}
    if move.verb == "review":
        log.info(event(move.code, **about, rules=job.rule_set))
        return
    level = logging.WARNING if move.code == POLICY_FAILED else logging.INFO
    more = {
        "reason": decision.get("reason"),
        "until": rfc3339(decision.get("until")),
        "priority": decision.get("priority"),
    }
    log.log(level, event("decided", **about, decision=decision.get("verb"), rules=job.rule_set, **more))


def raise_open_file_limit() -> None:
    """Raise the limit of open files: each parked claim needs one, and the usual soft limit is only 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keyed_hash(settings: Settings, content: bytes) -> str:
    """A hash of a file's content that schedulers with the same STACK_KEY compare, so that no content is sent."""
    return hmac.new(settings.stack_key.encode(), content, hashlib.sha256).hexdigest()[:32]


def stack_keys_of(settings: Settings) -> dict[str, str]:
    """The key of each queue's stack."""
    keys = {queue_key: settings.stack_key_of(queue_key) for queue_key in settings.stack_queues}
    file = stack_file_of(settings).tables
    return keys | ({file.monitor.queue: monitor_key(file.organization)} if file.monitor else {})


def stacks_of(settings: Settings, environ: Mapping[str, str]) -> list[Stack]:
    """A stack for each queue."""
    endpoint, token = settings.buildkite_agent_endpoint, token_source("buildkite_agent_token", settings, environ)
    return [Stack(endpoint, token, settings.stack_key_of(queue), queue) for queue in settings.stack_queues]


def monitor_of(settings: Settings, environ: Mapping[str, str]) -> Monitor | None:
    """The monitor of STACK_FILE's [monitor] table; None without one."""
    file = stack_file_of(settings).tables
    if not file.monitor:
        return None
    token = token_source("buildkite_api_token", settings, environ)
    if path := file.monitor.api_token_file:
        token = last_readable(lambda: read_text_file(path).strip(), read_text_file(path).strip())
    api = GraphApi(settings.buildkite_graphql_endpoint, token, file.monitor.token_setting)
    return Monitor(api, file.organization, file.monitor)


def last_readable(read: Callable[[], str], known: str) -> Callable[[], str]:
    """A function that returns the current token: read each time, so that its file can be replaced.

    While it cannot be read, the last one is used.
    """

    def current() -> str:
        nonlocal known
        with suppress(SettingsError):
            known = read() or known
        return known

    return current


def graph_api_of(settings: Settings, environ: Mapping[str, str]) -> GraphApi:
    return GraphApi(settings.buildkite_graphql_endpoint, token_source("buildkite_api_token", settings, environ))


def rest_api_of(settings: Settings, environ: Mapping[str, str]) -> RestApi:
    return RestApi(settings.buildkite_api_endpoint, token_source("buildkite_api_token", settings, environ))


def token_source(name: str, settings: Settings, environ: Mapping[str, str]) -> Callable[[], str]:
    """A function that returns the current token of that setting."""
    return last_readable(lambda: read_variable(name.upper(), True, environ), getattr(settings, name))


def check(settings: Settings, environ: Mapping[str, str]) -> int:
    """--check: test the store, the policy file, the address, and the tokens."""
    problems = check_redis(settings) if settings.redis_addr else check_state_directory(settings)
    problems += check_policy(settings.policy_file) if settings.policy_file else []
    try:
        socket.getaddrinfo(settings.listen[0] or None, settings.listen[1], flags=socket.AI_PASSIVE)
    except OSError as error:
        problems.append(f"LISTEN: {settings.listen[0]} has no address: {error}")
    for stack in stacks_of(settings, environ):
        try:
            stack.register()
            stack.list_jobs(None, time.time())
        except BuildkiteError as error:
            problems.append(f"queue {stack.queue_key}: {error}")
    if monitor := monitor_of(settings, environ):
        try:
            monitor.register()
            problems += [f"STACK_FILE: [monitor]: {problem}" for problem in monitor.problems]
        except BuildkiteError as error:
            problems.append(f"STACK_FILE: [monitor]: {error}")
    if settings.buildkite_api_token:
        graph = graph_api_of(settings, environ)
        try:
            graph.check()
        except BuildkiteError as error:
            problems.append(f"BUILDKITE_API_TOKEN: {error}")
        else:
            problems += check_periodic(stack_file_of(settings).tables, graph)
    if problems:
        raise SettingsError("\n".join(problems))
    proxy = proxy_of(settings.buildkite_agent_endpoint)
    way = f"through the proxy {proxy}" if proxy else "without a proxy"
    sys.stdout.write(f"the settings are good: Buildkite answers for {', '.join(stack_keys_of(settings))}, {way}\n")
    return 0


def check_periodic(tables: StackFile, api: GraphApi) -> list[str]:
    """Pipelines of [[periodic]] that the token cannot see, as problems. Only a build shows whether it may start one."""
    problems = []
    for periodic in tables.periodic:
        try:
            api.check_pipeline(f"{tables.organization}/{periodic.pipeline}")
        except BuildkiteError as error:
            problems.append(f"STACK_FILE: [[periodic]] {periodic.name}: {error}")
    return problems


def check_redis(settings: Settings) -> list[str]:
    """Problems that a start with this Redis would have. It tests reading and writing, and leaves nothing there."""
    address = settings.redis_addr
    try:
        with closing(RedisRows(settings, "check", for_check=True)) as store:
            for warning in store.warnings():
                log.warning(event("unsafe", store=address, reason=warning))
            store.try_to_write()
            check_stacks(*store.stacks(), stack_keys_of(settings))
            return [f"REDIS_ADDR: {address}: {problem}" for problem in store.problems()]
    except (StoreUnavailable, SettingsError) as error:
        return [f"{error}" if isinstance(error, SettingsError) else f"REDIS_ADDR: {error}"]


def check_state_directory(settings: Settings) -> list[str]:
    """Problems that a start with this directory would have. It tests with a temporary store beside the real one."""
    directory = os.path.abspath(settings.state_directory)
    try:
        with inspect_store(directory) as db:
            if db:
                check_stacks(*stacks_in(db), stack_keys_of(settings))
        while not os.path.lexists(directory):
            directory = os.path.dirname(directory)
        with tempfile.TemporaryDirectory(prefix=".check-", dir=directory) as aside:
            with closing(SqliteRows(aside)) as rows:
                rows.probe()
        return [f"STATE_DIRECTORY: {directory}: {trouble}" for trouble in unsafe_file_system(directory)]
    except SettingsError as error:
        return [str(error)]
    except (StoreUnavailable, sqlite3.Error, OSError) as error:
        advice = f"; {remedy(error)}" if isinstance(error, sqlite3.Error) else ""
        return [f"STATE_DIRECTORY: {settings.state_directory} cannot be used: {error}{advice}"]


@contextmanager
def inspect_store(directory: str) -> Iterator[sqlite3.Connection | None]:
    """Open the store in a directory with `examined`, while a scheduler may be using it."""
    lock_path, index_path = (os.path.join(directory, name) for name in ("scheduler.lock", "jobs.sqlite3-shm"))
    had_index, owner = os.path.exists(index_path), -1
    with suppress(OSError, StoreInUse):
        owner = own(lock_path) if os.path.exists(lock_path) else -1
    try:
        with examined(os.path.join(directory, "jobs.sqlite3")) as db:
            yield db
    finally:
        if owner >= 0:  # no scheduler uses the store, so remove the index that SQLite made for reading
            if not had_index:
                with suppress(FileNotFoundError):
                    os.unlink(index_path)
            os.close(owner)


def start_log(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # Our log lines contain no file, thread or process. Not collecting these saves a third of each log call.
    # Source: https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for noisy in ("urllib3", "requests"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
