#!/usr/bin/env python3
"""A worker of the stack: one slot of a build machine, which runs one Buildkite job at a time.

It claims a job from scheduler.py that its tags match, starts `buildkite-agent start --acquire-job <uuid>`
for it, touches the claim while the agent runs, reports how the agent ended, and claims again.

    claim ──204, no job yet──▶ claim
      │    the host is unfit: no claim; a waiting claim is closed, and a job that arrived is released
      │200
      ▼
    start the agent ──it cannot be started──▶ release ──▶ check the agent again until it can be started
      │
      ▼  each third of the lease: touch
      │    200 stop      SIGTERM, and SIGKILL if 30 s later a touch still says so ──▶ release
      │    200 cancel    SIGQUIT: the agent cancels its job, and ends
      │    404, 409      the claim is lost: no more touches, and no complete
      │    401, 5xx, …   touch again; the agent never notices
      ▼
    the agent has exited ──▶ complete, repeated until the scheduler has answered ──▶ claim

SIGTERM or SIGINT once: claim no more, let the agent end, exit 0. SIGTERM or SIGINT twice, SIGQUIT, or the end of
WORKER_STOP_TIMEOUT: the agent cancels its job. SIGHUP: read the secret files and LOG_LEVEL again.

An agent may outlive its worker. Its output goes to a FIFO in WORKER_STATE; its pid, start time and claim go to a file
there. The slot's next worker logs this output, touches the claim, and claims only when that agent has ended.

Under systemd each job has its own cgroup. Processes that a job left behind are killed before the next claim; if that
fails, the log names them.

Threads: the main thread owns everything. A `Touches` thread lives as long as an agent. A `Reports` thread lives while
the worker waits for an earlier worker's agent or for the health command. Each has its own `Scheduler` (a connection).
Signals (SIGCHLD: the agent has ended) and answers to touches wake the main thread through one pipe. If the scheduler
has a name, a short-lived thread looks it up and connects, because signals cannot interrupt a look-up.

While an unfit host, an agent that cannot be started, or an earlier worker's agent keeps the worker from claiming, it
reports this to the scheduler at least every 30 s. A worker with WORKER_MAX_JOBS, WORKER_IDLE_TIMEOUT or
WORKER_MAX_UPTIME ends by itself between two jobs, and reports `gone`.

The sections, in order: Settings and logs, Worker settings, Scheduler client, Signals, Slot, Cgroup, Agent,
Health, Work loop, Main.

Start at `main`, then follow `Worker.run`.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    # Python parses the whole file before it runs this line. To let 3.6 (RHEL 8) parse it, the file uses no :=.
    # Annotations with | are quoted, because 3.9 cannot evaluate them.
    sys.stderr.write(f"worker.py needs Python 3.9 or newer; this is {sys.version.split()[0]}, {sys.executable}\n")
    sys.exit(78)  # EX_CONFIG, as below

import codecs
import collections
import contextlib
import dataclasses
import errno
import fcntl
import io
import itertools
import json
import logging
import math
import os
import pwd
import random
import re
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

try:
    from _blake2 import blake2s  # saves 0.6 MB for the rest of hashlib
except ImportError:
    from hashlib import blake2s

# http.client imports ssl if it can, which takes 5 MB. Only a worker with an https scheduler needs ssl.
if __name__ == "__main__":
    sys.modules["ssl"] = None  # type: ignore[assignment]
import http.client  # noqa: E402

if __name__ == "__main__":
    del sys.modules["ssl"]
if TYPE_CHECKING:
    import ssl

log = logging.getLogger("worker")

#: sysexits.h EX_USAGE: an unknown argument.
EXIT_USAGE = 64
#: sysexits.h EX_TEMPFAIL: another worker has the slot, builds cannot be written, or an error of PASSING. A later start
#: may succeed.
EXIT_LATER = 75
#: Errors that may pass: no space, files, memory, processes or locks left, or the file server was restarted.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EAGAIN,
           errno.ENOLCK, errno.ESTALE)  # fmt: skip
#: Older agents are refused: some of them exit 0 when Buildkite rejected the job.
OLDEST_AGENT = (3, 99, 0)
#: First release of the agent's minor versions. A version between two entries counts as the earlier one; for a version
#: after the last entry the date is unknown. Buildkite supports each version for one year, but never ends support
#: before FIRST_END. Source: https://buildkite.com/docs/agent/version-support-policy
RELEASED = {
    (3, 116): "2026-01-29", (3, 117): "2026-02-03", (3, 118): "2026-02-16", (3, 122): "2026-04-09",
    (3, 125): "2026-05-04", (3, 130): "2026-07-01", (3, 131): "2026-07-06", (3, 133): "2026-07-17",
    (3, 134): "2026-07-23", (3, 135): "2026-07-29", (3, 136): "2026-08-04", (3, 137): "2026-08-11",
    (3, 138): "2026-09-03", (4, 0): "2026-09-01", (4, 1): "2026-10-01", (4, 2): "2026-10-06", (4, 5): "2026-10-15",
    (4, 8): "2026-10-22", (4, 10): "2026-11-06", (4, 12): "2026-11-19",
}  # fmt: skip
FIRST_END = "2027-01-01"
#: Seconds. The worker warns when Buildkite supports its agent for no longer than this.
SUPPORT_SECONDS = 60 * 86400.0
#: Seconds to connect to one address (a name may have several), and for name look-up, all addresses and TLS together.
CONNECT_SECONDS, CONNECTED_SECONDS = 5.0, 10.0
#: Seconds for a call; a claim adds the time it waits. A touch must fail well before its lease ends.
ANSWER_SECONDS = 10.0
#: Seconds to read the rest of an answer when a stop comes in the middle of it: it may contain a job.
REST_SECONDS = 1.0
#: Seconds: the minimum of WORKER_WAIT.
SHORTEST_WAIT = 1.0
#: Bytes read of an answer. The scheduler's answers are much shorter; a longer one is cut and fails as JSON.
ANSWER_BYTES = 1 << 20
#: Seconds: the longest pause between tries. With a larger value the worker notices a restarted scheduler later.
LONGEST_PAUSE = 30.0
#: Seconds between two reports of what the worker waits for. Checking the agent or calling the scheduler may add some
#: seconds, and the scheduler expects a report at least every 30 s.
REPORT_SECONDS = 15.0
#: Seconds. An agent still up so long after the end of its job is reported as paused at Buildkite.
PAUSED_SECONDS = 15.0
#: A failure that stays the same is logged again at every so many tries.
REPEATS_PER_LINE = 10
#: Seconds without claims after another worker claimed under our name.
NAME_TAKEN_SECONDS = 300.0
#: Seconds from SIGTERM to SIGKILL for an agent that never acquired its job.
STOP_SECONDS = 30.0
#: Seconds for which a stopping worker still tries to report how its job ended.
LAST_TRIES_SECONDS = 30.0
#: Seconds for processes to end after SIGKILL. Only a process blocked in the kernel takes longer.
KILL_SECONDS = 10.0
#: The log names at most so many of the processes that a job left behind.
NAMED_PROCESSES = 10
#: Seconds. While an agent runs, the main thread checks everything at least this often.
TICK_SECONDS = 1.0
#: Seconds to wait for more output, so that several lines are read at once. The FIFO keeps them meanwhile.
OUTPUT_SECONDS = 0.05
#: Buffers of output to log before the worker checks its signals again.
READS = 4
#: Seconds between host checks while a claim waits. With a larger value more jobs arrive at an unfit host.
LOOK_SECONDS = 5.0
#: No job is claimed when less than 1 in FREE_INODES inodes, or this fraction of memory, is available.
FREE_INODES, FREE_MEMORY = 100, 0.05
#: Seconds for which the worker trusts that the agent's user can write its builds, unless an owner or a mode changes.
BUILDS_SECONDS = 60.0
#: Seconds that WORKER_HEALTH_COMMAND may run, and to its next run after it did not say "fit". The second doubles with
#: each such run in a row, up to WORKER_HEALTH_INTERVAL.
HEALTH_SECONDS, HEALTH_AGAIN_SECONDS = 60.0, 2.0
#: Bytes kept of the command's output, and characters of its first line used as the reason.
HEALTH_BYTES, REASON_LETTERS = 4096, 300
#: Limits of the command's cgroup, if the host can set them. Source: the kernel's cgroup-v2.rst
HEALTH_LIMITS = {"memory.max": str(512 << 20), "pids.max": "256"}
#: Seconds between two tries to take the lock under which the command runs.
LOCK_SECONDS = 0.2
#: Seconds to wait until the scheduler knows whether the agent acquired its job, and between two questions.
KNOWN_SECONDS, KNOWN_AGAIN_SECONDS = 20.0, 0.5
#: Seconds to empty a private /tmp.
EMPTY_SECONDS = 60.0
#: Seconds for the report of a stop, which the scheduler does not depend on.
LAST_WORD_SECONDS = 2.0
#: Seconds for `buildkite-agent --version`.
VERSION_SECONDS = 10.0
#: Longest log line of the agent's output in characters; a longer one is logged as several. The journal cuts lines at
#: 48 KiB, and one escaped character takes up to 12 bytes.
LINE_CHARACTERS = 4000
#: Characters of the agent's last output that `complete` sends.
LAST_WORDS = 2048
#: Bytes that the FIFO holds while no worker reads it (Linux). When it is full, the agent blocks.
FIFO_BYTES = 1 << 20
#: From Linux's <fcntl.h>; Python has this name since 3.10.
F_SETPIPE_SZ = 1031

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


# --- Worker settings ---

#: Defaults that are computed at start, as --help shows them.
NAME_DEFAULT = "<host>-<instance>"
BUILDS_DEFAULT = "<WORKER_STATE>/builds"
#: Key for the hash of the machine id, so that it differs from other programs' hashes. Source: machine-id(5)
MACHINE_KEY = b"agent stack for systemd"


def agent_endpoint(text: str) -> str:
    return http_url(text) if text else ""


def server_urls(text: str) -> tuple[str, ...]:
    return tuple(http_url(url.strip()) for url in text.split(","))


def tags(text: str) -> tuple[str, ...]:
    """The tags of a comma-separated list, in order, without duplicates."""
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a control character; write tags like arch=amd64,gpu=true")
    return tuple(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))


def rules(text: str) -> tuple[str, ...]:
    """Tags, at most one of them a queue=."""
    queues = [tag for tag in tags(text) if is_queue(tag)]
    if len(queues) > 1 or "queue=" in queues:
        raise ValueError(f"{text!r} must name one queue; run a worker for each queue")
    for tag in queues:
        queue_key(tag.removeprefix("queue="))
    return tags(text)


def matching(pattern: str, hint: str, shown: bool = True) -> Callable[[str], str]:
    """Return a parser that accepts only a full match. The error ends with `hint`; `shown=False` hides the text."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{repr(text) if shown else 'the text'} {hint}")
        return text

    return checked


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that turns "" into None."""
    return lambda text: parse(text) if text else None


def whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def size_text(count: float) -> str:
    """A number of bytes as text: "96.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def size(text: str) -> int:
    """Bytes, from "512M", "4G" or "4GiB"."""
    match = re.fullmatch(r"([0-9]{1,9})([KMGT])(?:iB)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a size; write it like 512M or 4G")
    return int(match[1]) << {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


@dataclasses.dataclass(frozen=True)
class Account:
    """The user of this host that runs the agent."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str

    def __str__(self) -> str:
        return self.name


def account(name: str) -> Account:
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ValueError(f"there is no user {name!r} on this host") from None
    if os.geteuid() != 0:
        raise ValueError("only a worker that runs as root can start its agent as another user")
    groups = tuple(os.getgrouplist(name, found.pw_gid))
    return Account(name, found.pw_uid, found.pw_gid, groups, found.pw_dir, found.pw_shell)


#: Source: https://buildkite.com/docs/pipelines/clusters/manage-queues
queue_key = matching("[A-Za-z0-9_-]*", "is not a queue's key: Buildkite allows A-Z a-z 0-9 - _")
#: Valid as a file name, a header and an agent name. No %, because Buildkite expands %-codes in agent names.
slot_name = matching(
    NAME_DEFAULT + "|[A-Za-z0-9][A-Za-z0-9._:@+-]{0,99}",
    "is not a worker's name; use at most 100 of A-Z a-z 0-9 . _ : @ + -",
)
log_level = matching("debug|info|warning|error", "is not a level; it may be debug, info, warning or error")
host_name = matching("([A-Za-z0-9][A-Za-z0-9._-]{0,99})?", "is not a host's name; use at most 100 of A-Z a-z 0-9 . _ -")
token = matching("[!-~]*", "holds a space, or a character beyond ASCII: it cannot be a token", shown=False)


def first_token(text: str) -> str:
    """The first of several tokens, separated by commas or lines: while a token is replaced, a file may hold two."""
    return token(re.split(r"[,\r\n]", text.strip(", \r\n"), maxsplit=1)[0].strip())


def one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a control character; write it on one line")
    return text


def flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return text == "1"


@dataclasses.dataclass(frozen=True)
class Settings:
    #: A variable with this prefix must be a setting of ours. Others in a shared .env may be the scheduler's.
    PREFIXES: ClassVar = ("WORKER_",)

    worker_api_server: tuple[str, ...] = setting(
        "http://localhost:18888", server_urls, "URL of the scheduler; or several, if they share a Redis"
    )
    worker_agent_query_rules: tuple[str, ...] = setting("queue=default", rules, "tags that job rules are matched with")
    worker_tags: tuple[str, ...] = setting("", tags, "more tags for the agent, not used in matching")
    worker_queue: str = setting("", queue_key, "queue; replaces a queue= in the rules")
    worker_poll_interval: float = setting(
        "2s", in_range(duration, "10ms", "30s"), "pause after a failed request; grows to 30s"
    )
    worker_wait: float = setting("30s", in_range(duration, "1s", "60s"), "how long one claim waits for a job")
    worker_name: str = setting(NAME_DEFAULT, slot_name, "name of this worker and its agent; unique, stable")
    worker_host: str = setting("", host_name, "name of this machine; empty: the host name")
    worker_state: str = setting("./state", os.path.abspath, "directory for locks and the record of the running agent")
    buildkite_agent_path: str = setting("/usr/local/bin/buildkite-agent", str, "the agent, 3.99.0 or newer")
    buildkite_build_path: str = setting(BUILDS_DEFAULT, str, "where the agent checks out and builds")
    buildkite_agent_endpoint: str = setting("", agent_endpoint, "URL of Buildkite's Agent API; empty: agent's default")
    buildkite_agent_token: str = setting(
        "", token, "the cluster's agent token; empty: the scheduler sends a token with each job", secret=True
    )
    worker_job_tokens: bool = setting("0", flag, "1: use the scheduler's job tokens, even with BUILDKITE_AGENT_TOKEN")
    stack_api_token: str = setting("", first_token, "token that the scheduler requires of workers", secret=True)
    worker_ca_file: str = setting("", str, "CA (PEM) of an https scheduler; empty: the system's CAs")
    worker_tls_cert: str = setting("", str, "certificate (PEM) for a scheduler that asks for one")
    worker_tls_key: str = setting("", str, "its key (PEM)")
    worker_agent_user: "Account | None" = setting("", optional(account), "user for the agent, if the worker is root")
    worker_stop_timeout: float = setting("25m", duration, "a stop waits this long for the job, then cancels it")
    worker_cancel_grace: "float | None" = setting(
        "", optional(in_range(duration, "1s", "24h")), "a cancelled job may take this long to end; empty: 10s"
    )
    worker_job_memory: "int | None" = setting("", optional(in_range(size, "64M", "999T")), "memory per job, like 4G")
    worker_job_cpus: "float | None" = setting("", optional(in_range(number, "0.01", "9999")), "CPUs per job, like 2.5")
    worker_job_tasks: "int | None" = setting("", optional(in_range(whole, "64", "4194304")), "processes per job")
    worker_job_timeout: "float | None" = setting("", optional(duration), "a job is cancelled after this, like 2h")
    worker_min_free: int = setting(
        "1GiB", in_range(size, "0K", "999T"), "free space needed for builds; with less, it claims no job"
    )
    worker_health_command: str = setting(
        "", one_line, "run by sh before a claim: exit 0 fit, 1 unfit, 3 unfit until an operator resumes it"
    )
    worker_health_interval: float = setting(
        "60s", in_range(duration, "1s", "24h"), "time between two runs of the health command while idle"
    )
    worker_max_jobs: int = setting("0", in_range(whole, "0", "999999999"), "it ends after this many jobs; 0: no limit")
    worker_idle_timeout: "float | None" = setting("", optional(duration), "it ends when idle this long, like 10m")
    worker_max_uptime: "float | None" = setting("", optional(duration), "it claims no job after this, like 12h")
    log_level: str = setting("info", log_level, "debug, info, warning or error")
    settings_file: str = setting(".env", str, "file from which SIGHUP reads LOG_LEVEL")

    @property
    def job_tokens(self) -> bool:
        """Whether the worker asks for a job token with each job and never uses the cluster's token."""
        return self.worker_job_tokens or not self.buildkite_agent_token

    @property
    def host(self) -> str:
        return self.worker_host or re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename)[:100] or "localhost"

    @property
    def queue(self) -> str:
        ruled = [tag.removeprefix("queue=") for tag in self.worker_agent_query_rules if is_queue(tag)]
        return self.worker_queue or (ruled + ["default"])[0]

    @property
    def query(self) -> str:
        """The tags that a claim sends: the queue, then the other rules."""
        return ",".join([f"queue={self.queue}", *no_queue(self.worker_agent_query_rules)])

    @property
    def agent_tags(self) -> str:
        """The rules and the other tags, without queue=: the agent refuses a queue tag together with --queue."""
        return ",".join(dict.fromkeys(no_queue(self.worker_agent_query_rules + self.worker_tags)))

    @property
    def is_temporary(self) -> bool:
        """Whether the worker ends by itself some day. The scheduler then forgets it instead of showing it offline."""
        return bool(self.worker_max_jobs or self.worker_idle_timeout or self.worker_max_uptime)

    @property
    def builds(self) -> str:
        return os.path.abspath(self.buildkite_build_path.replace("<WORKER_STATE>", self.worker_state))

    @property
    def limits(self) -> dict[str, str]:
        """The limits of a job's cgroup: file name → text. Source: the kernel's cgroup-v2.rst"""
        texts = {
            "memory.max": self.worker_job_memory and str(self.worker_job_memory),
            # Microseconds of CPU time per 100,000 microseconds.
            "cpu.max": self.worker_job_cpus and f"{self.worker_job_cpus * 100_000:.0f} 100000",
            "pids.max": self.worker_job_tasks and str(self.worker_job_tasks),
        }
        return {name: text for name, text in texts.items() if text}

    def public(self) -> dict[str, Any]:
        """Every setting except the secrets, for the log."""
        fields = [field.name for field in dataclasses.fields(self) if not field.metadata["secret"]]
        values = ((name, getattr(self, name)) for name in fields)
        texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in values}
        return {name: "" if text is None else text for name, text in texts.items()}


def is_in_clear(url: str) -> bool:
    """Whether requests to this URL cross a network unencrypted: plain http to another machine."""
    found = re.match(f"http://({HOST})", url)
    return bool(found and not re.fullmatch(r"localhost|127(\.[0-9]+){3}|\[::1\]", found[1]))


def tls_context(settings: Settings) -> "ssl.SSLContext":
    """A new context for each connection, so that replaced files are used from the next one on. Raises SettingsError."""
    import ssl  # noqa: PLC0415  see the top

    ca, cert, key = settings.worker_ca_file, settings.worker_tls_cert, settings.worker_tls_key
    if bool(cert) != bool(key):
        raise SettingsError("WORKER_TLS_CERT, WORKER_TLS_KEY: both or neither")
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        raise SettingsError(f"WORKER_CA_FILE: {ca} is not a CA certificate: {error}") from None
    try:
        if cert:
            # Without a password argument OpenSSL would ask at the terminal for the password of an encrypted key.
            context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        problem = f"{cert} and {key} are not a certificate and its key: {error}"
        raise SettingsError(f"WORKER_TLS_CERT, WORKER_TLS_KEY: {problem}") from None
    return context


def machine(path: str = "/etc/machine-id") -> str:
    """A hash of the machine id, which tells this machine from another with the same name; "" when there is no id.

    The id itself is confidential.
    """
    try:
        found = read_text(path).strip()
    except OSError:
        return ""
    if not re.fullmatch("[0-9a-f]{32}", found):
        return ""  # for example "uninitialized"
    return blake2s(found.encode(), key=MACHINE_KEY, digest_size=16).hexdigest()


def is_queue(tag: str) -> bool:
    return tag.startswith("queue=")


def no_queue(found: Iterable[str]) -> list[str]:
    return [tag for tag in found if not is_queue(tag)]


def ignored_queues(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """The queue= tags in the settings that have no effect."""
    written = tags(environ.get("WORKER_AGENT_QUERY_RULES", "")) + settings.worker_tags
    return [tag for tag in written if is_queue(tag) and tag != f"queue={settings.queue}"]


#: Variables of buildkite-agent that the worker does not pass on, with the settings to use instead.
REPLACED = {
    "BUILDKITE_AGENT_TAGS": "WORKER_AGENT_QUERY_RULES and WORKER_TAGS",
    "BUILDKITE_AGENT_QUEUE": "WORKER_QUEUE",
    "BUILDKITE_AGENT_NAME": "WORKER_NAME",
}


def ignored_settings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Messages about variables that are set and have no effect: why, or what to use instead."""
    names = [name for name in REPLACED if name in environ]
    problems = [f"{name}: is not passed to the agent; use {REPLACED[name]}" for name in names]
    for name in ("BUILDKITE_AGENT_TOKEN", "STACK_API_TOKEN"):
        if environ.get(name, "").strip() not in ("", read_variable(name, True, environ)):
            problems.append(f"{name}: is ignored, because {name}_FILE or the credential of this name is used")
    if not any(url.startswith("https:") for url in settings.worker_api_server):
        names = [name for name in ("WORKER_CA_FILE", "WORKER_TLS_CERT", "WORKER_TLS_KEY") if environ.get(name)]
        problems += [f"{name}: is ignored, because no URL of WORKER_API_SERVER is https" for name in names]
    if "SETTINGS_FILE" in environ and not os.path.exists(settings.settings_file):
        problems.append(f"SETTINGS_FILE: {settings.settings_file} does not exist: SIGHUP finds no LOG_LEVEL")
    return problems


# --- Scheduler client ---


class SchedulerError(Exception):
    """A call that failed. `status`: 0 without a usable answer; `code`: "" when the answer was not the scheduler's."""

    def __init__(self, message: str, status: int = 0, code: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def lost(self) -> bool:
        """Whether the scheduler no longer knows this claim, so that further calls for it are useless."""
        return self.status in (404, 409)

    @property
    def elsewhere(self) -> bool:
        """Whether another scheduler may succeed."""
        return self.status == 0 or self.status >= 500

    @property
    def level(self) -> int:
        """WARNING if it may pass by itself; ERROR if a person must act (a wrong token or setting)."""
        return logging.ERROR if 400 <= self.status < 500 else logging.WARNING


class ProxyTimeout(Exception):
    """A proxy in front of the scheduler ended a waiting claim too early, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"504 after {seconds:.1f} s")
        self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """The fields of a claim's answer that a worker needs."""

    uuid: str
    #: "" from a server without claims, like the Go demo, which forgets a job when it hands it out.
    claim: str
    queue_key: str
    lease_seconds: float
    #: Can acquire only this job; "" if the scheduler sent none.
    token: str = dataclasses.field(default="", repr=False)

    @classmethod
    def from_api(cls, data: Mapping[str, Any]) -> "Job":
        texts = {name: data.get(name, "") for name in ("uuid", "queue_key", "claim", "token")}
        bad = [name for name, text in texts.items() if not isinstance(text, str) or not JOB_TEXTS[name].fullmatch(text)]
        seconds = data.get("lease_seconds", 0 if texts["claim"] else 1)
        if not isinstance(seconds, (int, float)) or not 0 < seconds < 86400:
            bad.append("lease_seconds")
        if bad:
            shown = {name: f" ({str(data[name])[:100]!r})" for name in bad if name in data and name != "token"}
            names = " and ".join(name + shown.get(name, "") for name in bad)
            raise SchedulerError(f"the scheduler's job has no usable {names}")
        return cls(**texts, lease_seconds=float(seconds))


#: Patterns of a job's texts. All except the token are logged, and the uuid becomes part of a URL path.
JOB_TEXTS = {
    **dict.fromkeys(("uuid", "queue_key"), re.compile(r"\w[\w.:-]*", re.ASCII)),
    "claim": re.compile(r"(\w[\w.:-]*)?", re.ASCII),
    "token": re.compile("[!-~]*"),
}


class Scheduler:
    """One connection to a scheduler, kept open between calls and used by one thread.

    With several schedulers it uses the first URL of its list; when a call fails, this URL moves to the end.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        session: str,
        api_token: Callable[[], str],
        signals: "Signals | None" = None,
    ) -> None:
        """`api_token` is called for each request, since the token may change. `signals`: only for the main thread."""
        self.settings, self.api_token, self.signals = settings, api_token, signals
        self.urls = collections.deque(map(urlsplit, settings.worker_api_server))
        # Workers with different names start at different schedulers.
        self.urls.rotate(-sum(name.encode()))
        self.headers = {"X-Worker-ID": name, "X-Worker-Session": session}
        self.headers |= {"X-Worker-Host": settings.host, "X-Worker-Machine": machine()}
        self.sock: socket.socket | None = None
        #: Seconds that one claim waits: WORKER_WAIT, or less when a proxy in front of the scheduler times out earlier.
        self.wait = settings.worker_wait
        #: Called repeatedly while a claim waits; True ends the claim.
        self.give_up: Callable[[], bool] | None = None

    def claim(self, query: str, wait: float, give_up: Callable[[], bool]) -> "Job | None":
        """The next job; None when none came within `wait` seconds.

        A stop, or `give_up` returning True, closes the connection; the scheduler then keeps the job or takes it back.
        """
        path = f"/jobs?query={quote(query, safe='')}&wait={wait:g}" + "&token=1" * self.settings.job_tokens
        self.give_up = give_up
        try:
            data = self.ask("GET", path, seconds=wait + ANSWER_SECONDS, stops=1)
        except Stopped:
            return None
        except ProxyTimeout as proxy:
            problem = f"a proxy at {self.url.netloc} answered {proxy}; the scheduler answers after {wait:g} s"
            self.wait = self.shorter_wait(proxy.seconds)
            now = f"claims wait {self.wait:g} s from now on; lower WORKER_WAIT, or raise the proxy's timeout"
            log.warning(event("impatient", problem=problem, now=now))
            return None
        finally:
            self.give_up = None
        return Job.from_api(data) if data else None

    def shorter_wait(self, seconds: float) -> float:
        """Seconds for a claim to wait behind a proxy that times out after `seconds`; a whole number, easy to read."""
        return max(SHORTEST_WAIT, math.floor(0.8 * seconds))

    def tell(self, job: Job, verb: str, **fields: object) -> dict[str, Any]:
        """Send touch, release or complete. The first stop does not cut it off, because a stop waits for these calls."""
        path = f"/jobs/{job.uuid}/{verb}"
        try:
            return self.ask("POST", path, {"claim": job.claim} | fields if job.claim else None) or {}
        except Stopped:
            raise SchedulerError(f"{verb} was cut off: the worker must stop now") from None
        except SchedulerError as error:
            # A server without claims sends an empty or different answer.
            if job.claim or error.status != 200:
                raise
        return {}

    def ask(
        self,
        method: str,
        path: str,
        body: "Mapping[str, object] | None" = None,
        *,
        seconds: float = ANSWER_SECONDS,
        stops: int = 2,
    ) -> "dict[str, Any] | None":
        """The JSON object of the answer; None for 204. Raises SchedulerError, ProxyTimeout, or Stopped at stop number
        `stops` (or at the next one, if so many have come already).

        After no answer or a 5xx it tries the next scheduler at once, until all have failed.
        """
        problem, stops = "", max(stops, self.signals.stops + 1 if self.signals else 0)
        for others in reversed(range(len(self.urls))):
            try:
                answer = self.ask_one(method, path, body, CallDeadline(seconds, self.signals, stops, self.give_up))
            except SchedulerError as error:
                if not error.elsewhere:
                    raise
                problem = f"{self.url.netloc}: {error}"
                self.close()
                self.urls.rotate(-1)
                if not others:
                    raise
                continue
            if problem:
                log.warning(event("moved", to=self.url.netloc, problem=problem))
            return answer
        raise AssertionError("the last one returns or raises")

    @property
    def url(self) -> SplitResult:
        return self.urls[0]

    def ask_one(
        self, method: str, path: str, body: "Mapping[str, object] | None", deadline: "CallDeadline"
    ) -> "dict[str, Any] | None":
        """Like `ask`, for the current scheduler only.

        The server may have closed a kept connection. If that connection fails, it tries a new one at once.
        """
        for new in (self.sock is None, True):
            sent_at = time.monotonic()
            try:
                return self.exchange(self.request(method, path, body), deadline)
            except Stopped:
                self.close()
                raise
            except SchedulerError as error:
                waited, wait = time.monotonic() - sent_at, deadline.seconds - ANSWER_SECONDS
                # Only a 504 before the scheduler's answer was due shows a proxy with a short timeout.
                if error.status == 504 and not error.code and waited < wait and self.shorter_wait(waited) < wait:
                    raise ProxyTimeout(waited) from None
                raise
            except (OSError, ValueError, http.client.HTTPException, SettingsError) as error:
                self.close()
                # Up to Python 3.9 socket.timeout is not a TimeoutError.
                if new or isinstance(error, (TimeoutError, socket.timeout)):
                    raise SchedulerError(
                        f"{method} {path.partition('?')[0]}: no answer: {describe_error(error)}"
                    ) from None
        raise AssertionError("the second try returns or raises")

    def request(self, method: str, path: str, body: "Mapping[str, object] | None") -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        headers = {"Host": self.url.netloc} | self.headers | sent
        token = self.api_token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {self.url.path}{path} HTTP/1.1\r\n{lines}\r\n".encode("ascii") + data

    def exchange(self, request: bytes, deadline: "CallDeadline") -> "dict[str, Any] | None":
        sock = self.sock = self.sock or self.connect(deadline)
        sock.settimeout(deadline.left())
        sock.sendall(request)
        # HTTPResponse needs only the method `makefile` of a socket.
        with http.client.HTTPResponse(ResponseStream(sock, deadline)) as response:  # type: ignore[arg-type]
            response.begin()
            body = response.read(ANSWER_BYTES)
            if response.will_close or not response.isclosed():
                self.close()
            return decode(response, body)

    def connect(self, deadline: "CallDeadline") -> socket.socket:
        host, secure = self.url.hostname or "", self.url.scheme == "https"
        address, ends_at = (host, self.url.port or (443 if secure else 80)), time.monotonic() + CONNECTED_SECONDS

        def reach() -> socket.socket:
            return socket.create_connection(address, CONNECT_SECONDS)

        # Addresses and localhost need no name server, so they need no thread (which costs 0.25 MB).
        sock = reach() if LITERAL.fullmatch(host) else ConnectionAttempt(reach).result(deadline, ends_at)
        if not secure:
            return sock
        try:
            return shake_hands(tls_context(self.settings), sock, host, deadline, ends_at)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        if self.sock:
            self.sock.close()
        self.sock = None


#: OpenSSL's X509_V_ERR_ codes for violations of RFC 5280. Python checks these from 3.13 on.
#: Source: openssl/x509_vfy.h
NOT_RFC_5280 = range(80, 94)
#: The README's command that renews a CA certificate.
CA_ANEW = (
    "openssl req -x509 -key ca.key -days 3650 -subj /CN=stack-ca"
    " -addext keyUsage=critical,keyCertSign,cRLSign -out ca.crt"
)


def describe_error(error: Exception) -> str:
    """The error as text, with the setting that may need a change."""
    text = str(error) or type(error).__name__
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended within the answer"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return f"the answer is not HTTP: {text[:100]}"
    if "ssl" not in sys.modules:
        return text
    import ssl  # noqa: PLC0415  see the top

    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in NOT_RFC_5280:
        return (
            f"{text}; Python 3.13 and newer refuse such a certificate. Renew it; renew a CA (WORKER_CA_FILE) with the "
            f"same key and subject, so that the certificates it signed stay valid: {CA_ANEW}"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; set WORKER_CA_FILE to the CA of the scheduler's certificate"
    if isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in text.upper():
        return f"{text}; the scheduler requires a client certificate: set WORKER_TLS_CERT"
    return text


class Stopped(Exception):
    """A call was cut off, because the worker must stop or must not claim any more."""


class CallDeadline:
    """The time limit of one whole call (not of each read). While the call waits, it also handles signals."""

    def __init__(
        self, seconds: float, signals: "Signals | None", stops: int, give_up: "Callable[[], bool] | None" = None
    ) -> None:
        self.seconds, self.ends_at = seconds, time.monotonic() + seconds
        self.signals, self.stops, self.give_up = signals, stops, give_up
        #: A part of the answer has arrived. A stop then only shortens the wait for the rest.
        self.has_begun = False

    def left(self) -> float:
        """The seconds left; raises TimeoutError when the time is over."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"none within {self.seconds:g} s")
        return left

    def wait(self, file: Any, connected_by: float = math.inf) -> None:
        """Wait until `file` is readable. Raises Stopped, or TimeoutError at the deadline or at `connected_by`."""
        while True:
            left = min(self.left(), connected_by - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"no connection within {CONNECTED_SECONDS:g} s")
            left = min(left, LOOK_SECONDS) if self.give_up else left
            ready = self.signals.wait([file], left) if self.signals else select.select([file], [], [], left)[0]
            if self.give_up and not ready and not self.has_begun and self.give_up():
                raise Stopped
            # Also if data came together with the stop: an answer may arrive slowly, byte by byte.
            if self.signals and self.signals.stops >= self.stops:
                if not self.has_begun and file not in ready:
                    raise Stopped
                self.ends_at, self.stops = min(self.ends_at, time.monotonic() + REST_SECONDS), sys.maxsize
            if file in ready:
                return


class ConnectionAttempt:
    """Connects on its own thread, because a name look-up has no time limit and cannot be interrupted by signals."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self.connect = connect
        self.near, self.far = socket.socketpair()
        self.lock = threading.Lock()  # guards the rest
        self.made: socket.socket | None = None
        self.error: Exception | None = None
        self.is_left = False
        threading.Thread(target=self.run, name="connect", daemon=True).start()

    def run(self) -> None:
        made, error = None, None
        try:
            made = self.connect()
        except Exception as problem:
            error = problem
        with self.lock:
            self.made, self.error = made, error
            if made and self.is_left:
                made.close()
        self.far.close()  # which makes the other end readable

    def result(self, deadline: CallDeadline, ends_at: float) -> socket.socket:
        """The connection. When the wait fails, the thread closes a connection that is made later."""
        try:
            deadline.wait(self.near, ends_at)
            if self.made is None:
                raise self.error or OSError("no connection")
            return self.made
        except BaseException:
            with self.lock:
                self.is_left = True
                if self.made:
                    self.made.close()
            raise
        finally:
            self.near.close()


#: Hosts that need no name server.
LITERAL = re.compile(r"localhost|[0-9.]+|.*:.*")


def shake_hands(
    context: "ssl.SSLContext", sock: socket.socket, host: str, deadline: CallDeadline, ends_at: float
) -> "ssl.SSLSocket":
    """The same connection under TLS."""
    import ssl  # noqa: PLC0415  see the top

    secure = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    secure.setblocking(False)
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                deadline.wait(secure, ends_at)
    except BaseException:
        secure.close()
        raise


class ResponseStream(io.RawIOBase):
    """The scheduler's answer as a stream that respects the call's deadline."""

    def __init__(self, sock: socket.socket, deadline: CallDeadline) -> None:
        self.sock, self.deadline = sock, deadline
        sock.setblocking(False)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.deadline.left():
            try:
                count = self.sock.recv_into(buffer)
            except OSError as error:
                # A TLS socket may be readable without application data; it then raises ssl.SSLWantReadError.
                if not isinstance(error, BlockingIOError) and type(error).__name__ != "SSLWantReadError":
                    raise
                self.deadline.wait(self.sock)
                continue
            self.deadline.has_begun = True
            return count
        return 0


def decode(response: http.client.HTTPResponse, body: bytes) -> "dict[str, Any] | None":
    if response.status == 204:
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if response.status == 200 and isinstance(data, dict):
        return data
    server = response.headers.get("Server", "no name")
    not_ours = {"message": f"the answer is not the scheduler's JSON; it may be a proxy's (Server: {server})"}
    error = data if isinstance(data, dict) else not_ours
    after = response.headers.get("Retry-After", "")
    code, message = str(error.get("error", "")), str(error.get("message", ""))
    text = f"{response.status} {code}".rstrip() + f": {message}"
    pause = float(after) if after.isdecimal() else 0.0
    if response.status == 401:
        # Only a person can fix that.
        text, pause = f"{text}; set STACK_API_TOKEN of this worker to a token that the scheduler takes", LONGEST_PAUSE
    raise SchedulerError(text, response.status, code, pause)


class Backoff:
    """A step that fails repeatedly: computes the pause before the next try, and logs some of the failures."""

    def __init__(self, what: str, first_pause: float, longest: float = LONGEST_PAUSE, **fields: object) -> None:
        self.what, self.fields = what, fields
        self.first_pause, self.longest = first_pause, longest
        self.times, self.last_problem = 0, ""

    def failed(self, problem: str, level: int = logging.WARNING, at_least: float = 0.0) -> float:
        """Count one more failure; return the seconds to pause. Jitter spreads the retries of many workers."""
        pause = min(self.longest, self.first_pause * 2.0 ** min(self.times, 16)) * random.uniform(0.7, 1)
        pause = max(pause, min(at_least, LONGEST_PAUSE))
        self.times += 1
        if problem != self.last_problem or self.times % REPEATS_PER_LINE == 0:
            more = {"problem": problem, "times": self.times, "pause_s": f"{pause:.1f}"}
            log.log(level, event("retrying", what=self.what, **self.fields, **more))
        self.last_problem = problem
        return pause

    def succeeded(self) -> None:
        if self.times:
            log.info(event("recovered", what=self.what, **self.fields, times=self.times))
        self.times, self.last_problem = 0, ""


# --- Signals ---


class Signals:
    """Signals and answers to touches, as bytes in one pipe, which wakes the main thread.

    The handlers do nothing: Python itself writes the signal's number into the pipe, where `wait` reads it.
    """

    def __init__(self) -> None:
        #: 0: go on. 1: claim no more and let the agent end. 2 and more: the agent cancels its job.
        self.stops = 0
        #: When (monotonic) the first stop came.
        self.stopped_at = math.inf
        #: The action of SIGHUP, and how often SIGHUP came.
        self.reload: Callable[[], None] = lambda: None
        self.reloads = 0
        #: Pid of the child whose owner waits for it (agent or health command); 0: none.
        self.child = 0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def wake(self) -> None:
        """Wake the main thread. May be called from any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")

    def wait(self, files: list[Any], seconds: float) -> list[Any]:
        """Wait at most `seconds` for a readable file, a signal or `wake`; return all that is readable."""
        ready, _, _ = select.select([self.reader, *files], [], [], seconds)
        for byte in os.read(self.reader, 4096) if self.reader in ready else b"":
            self.note(byte)
        return ready

    def note(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reloads += 1
            self.reload()
        if number == signal.SIGCHLD:
            self.reap_zombies()
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            self.stopped_at = min(self.stopped_at, time.monotonic())
            self.stops += 2 if number == signal.SIGQUIT else 1
            tell_systemd("STOPPING=1")
            log.info(event("stopping", signal=signal.Signals(number).name, now=self.stops > 1 or None))

    def reap_zombies(self) -> None:
        """As process 1 of a container: reap orphans of builds, which would stay as zombies. Does not reap `child`."""
        with contextlib.suppress(ChildProcessError):
            while os.getpid() == 1:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid == self.child:
                    return  # until its owner has reaped it, waitid returns only this child
                os.waitpid(ended.si_pid, 0)

    def stopped(self) -> bool:
        """Whether a stop has come until now."""
        self.wait([], 0)
        return self.stops > 0

    def pause(self, seconds: float, stops: int = 1) -> None:
        """Sleep. Ends early when the number of stops reaches `stops`, or after a reload: it may fix the problem."""
        until, reloads = time.monotonic() + seconds, self.reloads
        while seconds > 0 and self.stops < stops and self.reloads == reloads:
            self.wait([], seconds)
            seconds = until - time.monotonic()


# --- Slot ---


class SlotTaken(Exception):
    """Another worker of this host has the name."""


class Slot:
    """The files of one worker: the lock on its name, the record of its agent, and the FIFO of the agent's output."""

    def __init__(self, directory: str, name: str) -> None:
        """Raises SlotTaken, or OSError when the directory cannot be used."""
        self.name = name
        self.path = os.path.join(directory, name)
        os.makedirs(directory, exist_ok=True)
        self.lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise SlotTaken(f"another worker on this host is called {name}: {self.path}.lock is locked") from None

    def open_fifo(self, flags: int = 0) -> int:
        """Open the FIFO for reading and writing, so that a writer never lacks a reader (SIGPIPE)."""
        with contextlib.suppress(FileExistsError):
            os.mkfifo(f"{self.path}.out", 0o600)
        fifo = os.open(f"{self.path}.out", os.O_RDWR | flags)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                fcntl.fcntl(fifo, F_SETPIPE_SZ, FIFO_BYTES)
        return fifo

    def record(self, agent: "Agent") -> None:
        """Write the agent's pid, start time and claim to a file; raises OSError."""
        fields = {"pid": agent.pid, "started": agent.started, "job": agent.job.uuid}
        fields |= {"claim": agent.job.claim, "lease_seconds": agent.job.lease_seconds}
        # Only our user may read it: whoever knows the claim can end it.
        new = os.open(f"{self.path}.agent.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(new, "w", encoding="utf-8") as file:
            json.dump(fields, file)
        os.replace(f"{self.path}.agent.new", f"{self.path}.agent")

    def forget(self) -> None:
        try:
            os.unlink(f"{self.path}.agent")
        except FileNotFoundError:
            pass
        except OSError as error:
            # Harmless: the process in the record has ended.
            log.warning(event("unforgotten", problem=error))

    def recorded(self) -> "Agent | None":
        """The agent that an earlier worker of this slot left running; None if there is none."""
        try:
            with open(f"{self.path}.agent", encoding="utf-8") as file:
                data = json.load(file)
            # An older worker wrote no claim.
            fields = {
                "uuid": data["job"],
                "claim": data.get("claim", ""),
                "lease_seconds": data.get("lease_seconds", 1),
            }
            agent = Agent(int(data["pid"]), str(data["started"]), Job.from_api({"queue_key": "none", **fields}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SchedulerError) as error:
            problem = error if isinstance(error, OSError) else "it is not a record of an agent"
            now = "the worker does not wait for an agent"
            log.warning(event("unreadable", path=f"{self.path}.agent", problem=problem, now=now))
            return None
        return None if agent.exited() else agent


def take_slot(settings: Settings) -> Slot:
    """The slot of WORKER_NAME, or the first free one of this host. Raises OSError when WORKER_STATE cannot be used."""
    if settings.worker_agent_user:
        refuse_unsafe_path(settings.worker_state)
    if settings.worker_name != NAME_DEFAULT:
        return Slot(settings.worker_state, settings.worker_name)
    for number in itertools.count(1):
        with contextlib.suppress(SlotTaken):
            return Slot(settings.worker_state, f"{settings.host}-{number}")
    raise AssertionError("there is always a next number")


# --- Cgroup ---


class Cgroup:
    """The cgroup that systemd delegated to our unit (Delegate=yes). The worker and each job get their own below it.

    A process can leave its parent, session and process group, but not its cgroup.
    """

    def __init__(self, path: str, limits: Mapping[str, str]) -> None:
        """Raises OSError when jobs cannot be confined here, or the limits cannot be set."""
        self.path, self.limits = path, limits
        os.makedirs(f"{path}/worker", exist_ok=True)
        os.stat(f"{path}/worker/cgroup.kill")  # exists since Linux 5.14; we need it to end a job
        # The kernel enables controllers only below a cgroup that contains no processes itself.
        for pid in read_text(f"{path}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                write_text(f"{path}/worker/cgroup.procs", pid)
        self.control(limits)

    def control(self, limits: Iterable[str]) -> None:
        """Enable the controllers that these limits need in the cgroups below; raises OSError."""
        controllers = sorted({name.partition(".")[0] for name in limits})
        if controllers:
            write_text(f"{self.path}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))

    def of(self, job: str) -> str:
        return f"{self.path}/job-{job}"

    def enter(self, job: str, pid: int, limits: "Mapping[str, str] | None" = None) -> None:
        """Put the process, and all that it will start, into the job's cgroup. On OSError it removes the cgroup.

        `limits` replaces the limits of jobs.
        """
        limits = self.limits if limits is None else limits
        os.makedirs(self.of(job), exist_ok=True)
        try:
            for name, text in limits.items():
                write_text(f"{self.of(job)}/{name}", text)
            if "memory.max" in limits:
                # Without this the job would use swap beyond its limit. A kernel without swap has no such file.
                with contextlib.suppress(FileNotFoundError):
                    write_text(f"{self.of(job)}/memory.swap.max", "0")
            write_text(f"{self.of(job)}/cgroup.procs", str(pid))
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(self.of(job))
            raise

    def end(self, job: str) -> list[str]:
        """Kill all remaining processes of the job and return them for the log; raises OSError if one stays."""
        left = processes(pids(self.of(job)))
        deadline = time.monotonic() + KILL_SECONDS
        while "populated 1" in read_text(f"{self.of(job)}/cgroup.events"):
            write_text(f"{self.of(job)}/cgroup.kill", "1")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{KILL_SECONDS:g} s after SIGKILL these still run: {first_few(left, ', ')}")
            time.sleep(0.01)
        for directory, _, _ in os.walk(self.of(job), topdown=False):
            os.rmdir(directory)
        return left

    def left(self) -> list[str]:
        """The jobs of earlier workers that still have a cgroup here."""
        return [name.removeprefix("job-") for name in os.listdir(self.path) if name.startswith("job-")]


def delegated_cgroup(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> "str | None":
    """The directory of the cgroup that systemd delegated to us; None with cgroup v1, or without a delegation.

    Write permission would prove nothing: root can write to every cgroup, and most belong to systemd.
    """
    if not os.path.exists(own):
        return None
    found = re.search(r"^0::(/.*)$", read_text(own), re.MULTILINE)
    path = root + found[1].rstrip("/") if found else ""
    # With DelegateSubgroup= we start in a child of the cgroup that is ours.
    for each in (path, os.path.dirname(path)):
        if found and any(is_delegated(each, name) for name in ("user.delegate", "trusted.delegate")):
            return each
    return None


def is_delegated(path: str, attribute: str) -> bool:
    """Whether systemd marked this cgroup as delegated. Source: https://systemd.io/CGROUP_DELEGATION/"""
    try:
        return os.getxattr(path, attribute) == b"1"
    except OSError:
        return False


def pids(cgroup: str) -> list[int]:
    """Every process in the cgroup and in the cgroups below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):  # gone meanwhile
            found += map(int, read_text(f"{directory}/cgroup.procs").split())
    return found


def processes(found: list[int]) -> list[str]:
    """Processes for the log: "4711 sleep 600"; after the first NAMED_PROCESSES only pids: there may be thousands."""
    return [f"{pid} {command(pid)}" for pid in found[:NAMED_PROCESSES]] + [str(pid) for pid in found[NAMED_PROCESSES:]]


def first_few(left: list[str], separator: str = "; ") -> str:
    more = [f"and {len(left) - NAMED_PROCESSES} more"] if len(left) > NAMED_PROCESSES else []
    return separator.join(left[:NAMED_PROCESSES] + more)


def command(pid: int) -> str:
    try:
        words = read_text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        return words[:100] or read_text(f"/proc/{pid}/comm").strip()
    except OSError:
        return "(gone)"


def read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    """Write to an existing file, such as a file of a cgroup."""
    with open(os.open(path, os.O_WRONLY), "w", encoding="utf-8") as file:
        file.write(text)


# --- Agent ---

#: Variables that the agent must not inherit: the worker's own, and those that systemd set for the worker only.
WORKERS_OWN = re.compile(
    r"STACK_.*|WORKER_.*|LOG_LEVEL|SETTINGS_FILE|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|LISTEN_.*"
    r"|WATCHDOG_(PID|USEC)|JOURNAL_STREAM|INVOCATION_ID|SYSTEMD_EXEC_PID|MEMORY_PRESSURE_.*|FDSTORE"
    r"|(STATE|RUNTIME|CACHE|LOGS|CONFIGURATION)_DIRECTORY"
    # Secrets of a scheduler that shares the environment.
    r"|(WEBHOOK_TOKEN|REDIS_ADDR|OPERATOR_TOKEN|VIEWER_TOKEN|BUILDKITE_API_TOKEN)(_FILE)?"
    # Token and endpoint, set below; options that the agent refuses together with --queue and --spawn, or that our
    # arguments replace; options that change the meaning of exit statuses, or end the agent before its job.
    r"|BUILDKITE_AGENT_(TOKEN|TOKEN_FILE|ENDPOINT|ACQUIRE_JOB|QUEUE|TAGS|NAME|SPAWN|SPAWN_PER_CPU)"
    r"|BUILDKITE_AGENT_(REFLECT_EXIT_STATUS|DISCONNECT_AFTER_(JOB|UPTIME|IDLE_TIMEOUT))"
)
#: A shell that waits for a line, then becomes the agent. The worker writes the line after it has recorded the process.
#: If the worker dies before that, no agent starts. So an agent without a record exists only if the disk was full.
GATE = ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "gate"]
#: The agent reads the first that exists: this file beside its program, in its user's home, then AGENT_CONFIGS.
#: Source: the agent's agent_start.go
AGENT_CONFIG = "buildkite-agent.cfg"
AGENT_CONFIGS = (f"/usr/local/etc/buildkite-agent/{AGENT_CONFIG}", f"/etc/buildkite-agent/{AGENT_CONFIG}")
#: Linux follows at most so many symbolic links in one path.
MOST_LINKS = 40
#: The agent's exit status when Buildkite did not give it the job; this may happen on a healthy host.
EXIT_REJECTED = 27
#: Exit statuses of a shell that cannot run the program. The agent itself never uses them.
NOT_STARTED = (126, 127)
#: Terminal control sequences, and any other control character but the tab.
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[P\]_^X][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def agent_arguments(settings: Settings, name: str, job: Job) -> list[str]:
    """The agent's command line; all flags exist in v3 and v4. No secrets: every user can read a command line."""
    queue = [] if job.queue_key == "_default" else ["--queue", job.queue_key]
    more = ["--tags", settings.agent_tags] if settings.agent_tags else []
    start = [settings.buildkite_agent_path, "start", "--acquire-job", job.uuid, "--spawn", "1"]
    return [*start, *queue, *more, "--name", name]


def agent_environment(settings: Settings, environ: Mapping[str, str], token: str) -> dict[str, str]:
    """The worker's environment without the worker's own variables, plus the token.

    A job inherits nearly all of the agent's environment, but not the token.
    """
    kept = {name: text for name, text in environ.items() if not WORKERS_OWN.fullmatch(name)}
    if settings.worker_cancel_grace:
        # For v3 (whole seconds), then for v4. v3 needs the third to be shorter than the first; unset, it is.
        kept["BUILDKITE_CANCEL_GRACE_PERIOD"] = str(math.ceil(settings.worker_cancel_grace))
        kept["BUILDKITE_CANCEL_SIGNAL_TIMEOUT"] = f"{math.ceil(settings.worker_cancel_grace)}s"
        kept.pop("BUILDKITE_SIGNAL_GRACE_PERIOD_SECONDS", None)
    if settings.buildkite_agent_endpoint:
        kept["BUILDKITE_AGENT_ENDPOINT"] = settings.buildkite_agent_endpoint
    kept["BUILDKITE_AGENT_TOKEN"] = token
    kept["BUILDKITE_BUILD_PATH"] = settings.builds
    user = settings.worker_agent_user
    if user:
        kept |= {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
        kept["BUILDKITE_AGENT_CONFIG"] = kept.get("BUILDKITE_AGENT_CONFIG") or agent_config(settings)[0]
    # An agent for one job needs no streaming connection; trying to open one costs 0.2 s per job (measured).
    kept.setdefault("BUILDKITE_AGENT_PING_MODE", "poll-only")
    return kept


def identity(settings: Settings) -> dict[str, Any]:
    """Arguments of Popen: the agent's user, groups and directory."""
    user = settings.worker_agent_user
    if not user:
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": user.groups, "cwd": user.home}


def as_agent(settings: Settings, *command: str) -> bool:
    """Run the command as the agent's user; return whether it succeeded. Raises OSError when it cannot be run."""
    here = identity(settings) | {"cwd": "/", "env": {"PATH": os.defpath}}
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False, **here).returncode == 0


def make_builds(settings: Settings) -> None:
    """Make the build directory for WORKER_AGENT_USER: as this user if that is allowed, else as root."""
    user, path = settings.worker_agent_user, settings.builds
    if not user or os.path.exists(path) or as_agent(settings, "mkdir", "-p", "--", path):
        return
    refuse_unsafe_path(os.path.dirname(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Rename it only when it is complete: other workers may do the same now, and each may be killed.
    new = f"{path}.{os.urandom(8).hex()}"
    os.mkdir(new)
    os.chown(new, user.uid, user.gid, follow_symlinks=False)
    try:
        os.rename(new, path)
    except OSError:
        os.rmdir(new)
        if not os.path.exists(path):
            raise


def refuse_unsafe_path(path: str) -> None:
    """Raise PermissionError if another user could redirect what root writes to `path`, by a symbolic link."""
    where = unsafe_place(path)
    if where:
        problem = f"users other than root can write {where}, and could redirect what root writes"
        raise PermissionError(errno.EPERM, f"{problem}; let only root write it, or set another directory")


def unsafe_place(path: str) -> str:
    """The first part of `path` that users other than root can write, and so replace by a link; "" when there is none.

    Missing parts count as safe, because root will make them.
    """
    here, names, links = "/", path.split("/")[::-1], 0
    while names:
        step = os.path.normpath(os.path.join(here, names.pop()))
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            break
        parent = os.lstat(here)
        # In a directory with the sticky bit, like /tmp, others cannot replace root's files.
        is_kept = parent.st_uid == 0 and parent.st_mode & stat.S_ISVTX and found.st_uid == 0
        if can_others_write(parent) and not is_kept:
            break
        if not stat.S_ISLNK(found.st_mode):
            here = step
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(step)
        names += target.split("/")[::-1]
        here = "/" if target.startswith("/") else here
    return here if can_others_write(os.lstat(here)) else ""


def can_others_write(found: os.stat_result) -> bool:
    """Whether users other than root can write it. The group bits also show an ACL that allows it."""
    return found.st_uid != 0 or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def agent_config(settings: Settings) -> tuple[str, list[str]]:
    """The configuration file for an agent with WORKER_AGENT_USER, and the files that were refused.

    It is the first of the agent's own candidates that only root can write, else /dev/null. A build could change any
    other file, and so break or redirect all later agents; for this reason the one in the user's home is never used.
    """
    beside = os.path.join(os.path.dirname(os.path.realpath(settings.buildkite_agent_path)), AGENT_CONFIG)
    found = [path for path in (beside, *AGENT_CONFIGS) if os.path.exists(path)]
    good = [path for path in found if not unsafe_place(path)]
    return (good or ["/dev/null"])[0], [path for path in found if path not in good]


def agent_version(settings: Settings) -> str:
    """The version that the agent's program prints; raises ValueError when this agent cannot be used."""
    path = settings.buildkite_agent_path
    environ = agent_environment(settings, os.environ, "")
    try:
        # Its own session: Ctrl-C does not reach it, and if it hangs we can kill it with all its children.
        with subprocess.Popen(
            [path, "--version"], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True, **identity(settings),
        ) as asked:  # fmt: skip
            try:
                said, _ = asked.communicate(timeout=VERSION_SECONDS)
            except BaseException:
                os.killpg(asked.pid, signal.SIGKILL)
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{path} cannot be run: {error}") from None
    found = re.search(r"version v?(\d+)\.(\d+)\.(\d+)\S*", said)
    if asked.returncode != 0 or not found:
        raise ValueError(f"{path} --version exited with {asked.returncode} and printed {said[:200]!r}")
    if tuple(map(int, found.groups())) < OLDEST_AGENT:
        oldest = ".".join(map(str, OLDEST_AGENT))
        raise ValueError(f"{path} has {found[0]}; exit statuses of agents before {oldest} are unreliable")
    return found[0].removeprefix("version ")


def supported_until(version: str) -> str:
    """The first day without Buildkite's support for this agent version, like 2027-09-03; "" when unknown."""
    line = tuple(map(int, version.split(".")[:2]))
    if line > max(RELEASED):
        return ""
    released = [RELEASED[known] for known in sorted(RELEASED) if known <= line]
    if not released:
        return FIRST_END
    year, day = released[-1][:4], released[-1][4:]
    return max(f"{int(year) + 1}{day}", FIRST_END)


def support_warning(version: str, now: float) -> str:
    """A warning when the agent's support has ended or ends soon; else "". `now`: Unix seconds."""
    until = supported_until(version)
    today, soon = (time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (now, now + SUPPORT_SECONDS))
    if not until or soon < until:
        return ""
    how = "has not supported this version since" if today >= until else "supports this version only until"
    return f"Buildkite {how} {until}: install a newer buildkite-agent"


def start_time(pid: int) -> str:
    """When the process started; together with the pid this identifies a process. "" when it has ended."""
    if sys.platform != "linux":
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], env={"LC_ALL": "C", "PATH": os.defpath},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip()
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            # From field 3 (state) on. Field 2, the name in brackets, may contain spaces and brackets.
            fields = stat.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return "" if fields[0] in "ZX" else f"{fields[19]} {boot.read().strip()}"
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Agent:
    """A buildkite-agent process: our child, or one that an earlier worker of the slot started."""

    def __init__(self, pid: int, started: str, job: Job, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid, self.started, self.job, self.child = pid, started, job, child
        self.began_at = time.monotonic()
        #: When SIGTERM was sent after the scheduler's stop. Then: whether SIGKILL and SIGQUIT were sent.
        self.stopped_at: float | None = None
        self.killed = self.cancelled = False
        self.recorded = child is None
        #: File descriptors that become readable when the process ends. Empty for a child: SIGCHLD wakes us.
        self.ends: list[int] = []

    def exited(self) -> bool:
        if self.child:
            return self.child.poll() is not None
        # It has no start time if it ended before we read it.
        return not self.started or start_time(self.pid) != self.started

    @property
    def exit_status(self) -> "int | None":
        """As a shell reports it: 128 + n when signal n ended the agent. None if the agent was not our child."""
        code = self.child.returncode if self.child else None
        return 128 - code if code is not None and code < 0 else code

    def send(self, number: signal.Signals, why: str) -> None:
        log.warning(event("signalled", job=self.job.uuid, pid=self.pid, signal=number.name, why=why))
        with contextlib.suppress(ProcessLookupError):
            if not self.exited():
                os.kill(self.pid, number)


def end_group(agent: Agent) -> list[str]:
    """Kill the remaining process group of an agent that has just exited; return its name for the log.

    Only for our own child: another process group may have reused the number of an earlier worker's agent.
    """
    if not agent.child:
        return []
    try:
        os.killpg(agent.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return []
    return [f"the process group {agent.pid}"]


class Output:
    """Copies the agent's output, line by line, from the FIFO to our log, with the job's uuid."""

    def __init__(self, fifo: int) -> None:
        self.fifo = fifo
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        #: Texts to hide in the log. Replaced secrets stay here: a running agent still has the old ones.
        self.secrets: set[str] = set()
        #: `rest` is an incomplete line: its end has not been read yet.
        self.job, self.token, self.rest, self.last_words = "", "", "", ""

    def begin(self, job: str, token: str) -> None:
        """Log all output so far as the previous job's; later lines belong to this job."""
        self.drain()
        self.job, self.token, self.last_words = job, token, ""

    def read(self) -> bool:
        """Log what can be read now, at most one buffer; False when there was nothing."""
        try:
            data = os.read(self.fifo, 65536)
        except BlockingIOError:
            return False
        *lines, self.rest = (self.rest + self.decoder.decode(data)).split("\n")
        for line in lines:
            self.log_line(self.cleaned(line))
        if len(self.rest) >= LINE_CHARACTERS:
            self.log_overlong()
        return True

    def log_overlong(self) -> None:
        """Log the beginning of an overlong line. Keep its last characters: a secret may begin there."""
        text = self.cleaned(self.rest)
        held = max(map(len, self.all_secrets()), default=1) - 1
        cut = max(0, len(text) - held)
        self.log_line(text[:cut])
        self.rest = text[cut:]

    def read_all(self, most: int) -> bool:
        """Log all that can be read now, at most `most` buffers; True when nothing is left."""
        for _ in range(most):
            if not self.read():
                return True
        return False

    def drain(self) -> None:
        """Log all remaining output. Bounded, because a process left in the background may write forever."""
        if self.read_all(2 * FIFO_BYTES // 65536):
            self.log_line(self.cleaned(self.rest + self.decoder.decode(b"", final=True)))
            self.rest = ""

    def all_secrets(self) -> list[str]:
        return sorted(filter(None, [*self.secrets, self.token]), key=len, reverse=True)

    def cleaned(self, line: str) -> str:
        """Remove control characters and secrets. Call this before cutting the line: half a secret is not found."""
        text = CONTROL.sub("", line)
        for secret in self.all_secrets():
            text = text.replace(secret, "[REDACTED]")
        return text

    def log_line(self, text: str) -> None:
        for start in range(0, len(text), LINE_CHARACTERS):
            piece = text[start : start + LINE_CHARACTERS].rstrip()
            if piece:
                self.last_words = f"{self.last_words}{piece}\n"[-LAST_WORDS:]
                log.info(event("output", job=self.job, text=piece))


# --- Health ---

#: Exit statuses of the health command. HELD: unfit until an operator resumes the worker. Others: unknown.
FIT, UNFIT, HELD = 0, 1, 3


class Verdict(NamedTuple):
    """The result of one run of the health command."""

    #: FIT, UNFIT or HELD. Another status, or None (killed), means that the host's health is unknown.
    status: "int | None"
    reason: str
    #: When the run started: monotonic seconds, the same clock for all processes until the next boot.
    began_at: float
    #: Id of the run. An operator's `resume` names the run whose result no longer counts.
    run: str


def space_problem(settings: Settings) -> str:
    """Why there is not enough space for builds; "" when there is."""
    builds, least = settings.builds, settings.worker_min_free
    try:
        found = os.statvfs(nearest(builds))
    except OSError as error:
        return f"{builds} cannot be checked: {error}"
    if found.f_flag & os.ST_RDONLY:
        return f"{builds} is on a file system that is mounted read-only"
    free = found.f_bavail * found.f_frsize
    if free < least:
        return f"{builds} has {size_text(free)} free, less than WORKER_MIN_FREE ({size_text(least)})"
    # Some file systems create inodes on demand and report 0.
    if found.f_favail * FREE_INODES < found.f_files:
        return f"{builds} has {found.f_favail} of {found.f_files} inodes free, less than 1 %"
    return ""


def free_space(settings: Settings) -> "int | None":
    """Free bytes for builds; None when unknown."""
    try:
        found = os.statvfs(nearest(settings.builds))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def memory_problem(path: str = "/proc/meminfo") -> str:
    """Why there is not enough memory for a job; "" when there is, or when it is unknown."""
    try:
        found = dict(re.findall(r"^(\w+): +(\d+) kB", read_text(path), re.MULTILINE))
        total, free = int(found["MemTotal"]), int(found["MemAvailable"])
    except (OSError, KeyError):
        return ""
    if free < FREE_MEMORY * total:
        return f"{size_text(1024.0 * free)} of {size_text(1024.0 * total)} memory is available, less than 5 %"
    return ""


def file_problem(settings: Settings) -> str:
    """Why a file or directory that each job needs cannot be used, apart from the builds; "" when all is well."""
    if not can_write(settings.worker_state):
        return f"WORKER_STATE: this user cannot write {settings.worker_state}"
    agent = settings.buildkite_agent_path
    return "" if os.access(agent, os.X_OK) else f"{agent} does not exist or is not executable"


def permissions(path: str) -> list[tuple[int, ...]]:
    """Identity, mode and owner of the path and of each directory above it. ACLs do not show here."""
    found: list[tuple[int, ...]] = []
    while path:
        with contextlib.suppress(OSError):
            each = os.stat(path)
            found.append((each.st_dev, each.st_ino, each.st_mode, each.st_uid, each.st_gid))
        path = os.path.dirname(path).rstrip("/")
    return found


class Health:
    """Whether this host is fit to run a job. It never affects a job that already runs.

    The cheap built-in checks run each time. The result of the health command is stored, and shared by the slots with
    the same WORKER_STATE, command, tags and environment. Slots with the same WORKER_STATE run it one at a time.
    """

    def __init__(self, settings: Settings, slot: Slot, signals: Signals, cgroup: "Cgroup | None") -> None:
        self.settings, self.slot, self.signals, self.cgroup = settings, slot, signals, cgroup
        self.limits: Mapping[str, str] = {}
        if cgroup and settings.worker_health_command:
            try:
                cgroup.control(HEALTH_LIMITS)
                self.limits = HEALTH_LIMITS
            except OSError as error:
                log.warning(event("unlimited", what="WORKER_HEALTH_COMMAND", problem=error))
        #: The last result; a new one is needed from `look_at` on (monotonic).
        self.verdict = self.load_held()
        self.look_at = 0.0
        #: Results of runs that began before this (monotonic) are too old to use.
        self.needed_since = time.monotonic()
        #: Why the command must run, until it says "fit": "start" or "after_failure"; "": no special reason.
        self.purpose = "start"
        #: Number of jobs that agents ran since the start, and its value at the command's last run.
        self.jobs = self.jobs_seen = 0
        #: Id of the run after which an operator resumed this worker, as the scheduler reported it.
        self.resumed = ""
        #: A run that could not be killed. No other run starts until it has ended.
        self.stuck: subprocess.Popen[bytes] | None = None
        self.failures = 0
        self.is_low = False
        #: The permissions with which the agent's user could write the builds, and until when (monotonic) that counts.
        self.good_permissions: list[tuple[int, ...]] = []
        self.builds_good_until = 0.0

    def unfit(self) -> str:
        """Why no job may start here now, by the cheap built-in checks; "" when one may."""
        self.warn_when_low()
        return space_problem(self.settings) or memory_problem() or file_problem(self.settings) or self.builds_problem()

    def builds_problem(self) -> str:
        """Why the agent's user cannot build; "" when it can. Testing as another user needs a process, so the result
        is used again until BUILDS_SECONDS are over, or an owner or a mode has changed.
        """
        is_known = self.settings.worker_agent_user and time.monotonic() < self.builds_good_until
        if is_known and permissions(self.settings.builds) == self.good_permissions:
            return ""
        try:
            make_builds(self.settings)  # somebody may have removed the directory
        except OSError as error:
            return f"BUILDKITE_BUILD_PATH: {self.settings.builds} cannot be used: {error}"
        self.good_permissions = permissions(self.settings.builds)
        problem = problem_of_builds(self.settings)
        self.builds_good_until = 0.0 if problem else time.monotonic() + BUILDS_SECONDS
        return problem

    def warn_when_low(self) -> None:
        """Warn once when free space falls below twice WORKER_MIN_FREE."""
        least, free = self.settings.worker_min_free, free_space(self.settings)
        is_low = free is not None and free < 2 * least
        if free is not None and is_low and not self.is_low:
            now = f"below {size_text(least)} (WORKER_MIN_FREE) no job is claimed"
            log.warning(event("low", path=self.settings.builds, free=size_text(free), now=now))
        self.is_low = is_low

    # -- the health command

    def why(self) -> str:
        """Why no job may start here, by the health command's last result; "" when it was fit, or there is none."""
        return self.verdict.reason if self.verdict and self.settings.worker_health_command else ""

    @property
    def held(self) -> str:
        """Id of the run after which an operator must resume this worker; "" if none must."""
        return self.verdict.run if self.verdict and self.verdict.status == HELD else ""

    def is_due(self) -> bool:
        """Whether a new result of the health command is needed before the next claim."""
        if not self.settings.worker_health_command:
            return False
        if self.held and self.held == self.resumed:
            log.warning(event("resumed", run=self.held, now="the health command runs again"))
            self.verdict, self.look_at, self.needed_since = None, 0.0, time.monotonic()
            self.store_if_held()
        return not self.held and time.monotonic() >= self.look_at

    def suspect(self) -> None:
        """Run the command before the next claim: something failed, and the host may be the cause."""
        self.purpose, self.look_at, self.needed_since = self.purpose or "after_failure", 0.0, time.monotonic()

    def ask(self) -> None:
        """Get a new result: another slot's, if it is recent enough, else by running the command, which takes time."""
        path = f"{self.settings.worker_state}/health.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self.use(Verdict(None, f"{path} cannot be used: {error.strerror}", time.monotonic(), ""))
            return
        try:
            if self.is_locked(lock):
                self.use(self.verdict_of_other_slot() or self.run_and_share())
            elif not self.signals.stops:
                why = f"other slots' health commands did not end within {HEALTH_SECONDS + KILL_SECONDS:g} s"
                self.use(Verdict(None, why, time.monotonic(), ""))
        finally:
            os.close(lock)

    def is_locked(self, lock: int) -> bool:
        """Take the lock; False when a stop comes first, or after the longest time that a command can take."""
        ends_at = time.monotonic() + HEALTH_SECONDS + KILL_SECONDS
        while not self.signals.stops and time.monotonic() < ends_at:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            self.signals.pause(LOCK_SECONDS)
        return False

    def use(self, verdict: Verdict) -> None:
        """Use this result from now on, and compute when the next one is needed."""
        if self.signals.stops:
            return  # the stop cut the command short
        was, self.verdict = self.verdict, verdict
        self.needed_since = max(self.needed_since, verdict.began_at)
        self.look_at = verdict.began_at + self.settings.worker_health_interval
        self.failures = 0 if verdict.status == FIT else self.failures + 1
        if verdict.status == FIT:
            self.purpose = ""
        else:
            pause = HEALTH_AGAIN_SECONDS * 2.0 ** min(self.failures - 1, 16)
            self.look_at = time.monotonic() + min(pause, self.settings.worker_health_interval)
        if HELD in (verdict.status, was and was.status):
            self.store_if_held()

    def verdict_of_other_slot(self) -> "Verdict | None":
        """The last result of another slot, if its run began late enough for us."""
        found = self.answers().get(self.key())
        now = time.monotonic()
        if found is None or found.run == self.resumed or found.began_at <= self.needed_since:
            return None
        return found if now - self.settings.worker_health_interval < found.began_at <= now else None

    def run_and_share(self) -> Verdict:
        """Run the command, and store its result for the other slots."""
        began_at = time.monotonic()
        status, said = self.run()
        text = visible(said.decode("utf-8", "replace").strip().partition("\n")[0].strip())[:REASON_LETTERS]
        reason = "" if status == FIT else text or f"WORKER_HEALTH_COMMAND exited with {status}"
        if status not in (FIT, UNFIT, HELD):
            ended = f"exited with {status}" if status is not None else f"did not end within {HEALTH_SECONDS:g} s"
            reason = f"WORKER_HEALTH_COMMAND {ended}" + (f": {text}" if text else "")
        verdict = Verdict(status, reason, began_at, os.urandom(4).hex())
        took = f"{time.monotonic() - began_at:.1f}"
        fields = {"status": status, "for": self.run_purpose(), "reason": reason or None, "took_s": took}
        log.log(logging.DEBUG if status == FIT else logging.WARNING, event("health", **fields))
        if not self.signals.stops:
            self.jobs_seen = self.jobs
            self.share(verdict)
        return verdict

    def run(self) -> "tuple[int | None, bytes]":
        """Run the command; return its exit status (None when it had to be killed) and the beginning of its output."""
        if self.stuck and self.stuck.poll() is None:
            return None, f"process {self.stuck.pid} of an earlier run cannot be killed".encode()
        reader, writer = os.pipe()
        with open(reader, "rb", buffering=0) as said:
            try:
                child = subprocess.Popen(
                    [*GATE, "/bin/sh", "-c", self.settings.worker_health_command],
                    env=self.environment() | self.health_variables(),
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=writer,
                    stderr=writer,
                    start_new_session=True,
                    **identity(self.settings),
                )
            except OSError as error:
                return NOT_STARTED[0], str(error).encode()
            finally:
                os.close(writer)
            self.signals.child = child.pid
            try:
                head = self.watch(child, said)
            except OSError as error:
                self.end(child)
                return NOT_STARTED[0], f"it cannot be confined: {error}".encode()
            return self.end(child), head + self.rest(said, len(head))

    def watch(self, child: "subprocess.Popen[bytes]", said: io.FileIO) -> bytes:
        """Start the command, read its output until it ends or its time is over; return the first HEALTH_BYTES."""
        assert child.stdin
        with contextlib.suppress(BrokenPipeError), child.stdin:
            if self.cgroup:
                self.cgroup.enter("health", child.pid, self.limits)
            child.stdin.write(b"go\n")
        ends_at, head, files = time.monotonic() + HEALTH_SECONDS, b"", [said]
        while child.poll() is None and not self.signals.stops and time.monotonic() < ends_at:
            if said in self.signals.wait(files, max(0.0, ends_at - time.monotonic())):
                data = said.read(65536)
                files = files if data else []
                head = (head + (data or b""))[:HEALTH_BYTES]
        return head

    def rest(self, said: io.FileIO, length: int) -> bytes:
        """The output that was left to read when the command ended, cut to HEALTH_BYTES - `length`."""
        os.set_blocking(said.fileno(), False)
        data = said.read(HEALTH_BYTES - length) if length < HEALTH_BYTES else b""
        return data or b""

    def end(self, child: "subprocess.Popen[bytes]") -> "int | None":
        """Kill the command, if it still runs, and all that it started. Return its exit status; None if it still ran."""
        status = child.poll()
        try:
            if self.cgroup:
                self.cgroup.end("health")
            else:
                os.killpg(child.pid, signal.SIGKILL)
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, ProcessLookupError, PermissionError)):
                log.error(event("unended", job="health", problem=error))
        try:
            if status is None:
                child.kill()  # needed if it is not in the cgroup
            child.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.stuck = child
        self.signals.child = 0
        self.signals.reap_zombies()
        return status

    def environment(self) -> "dict[str, str]":
        """The agent's environment, without the token."""
        return {
            k: v for k, v in agent_environment(self.settings, os.environ, "").items() if k != "BUILDKITE_AGENT_TOKEN"
        }

    def health_variables(self) -> "dict[str, str]":
        """Variables that tell the command why it runs: see the README."""
        since = self.jobs - self.jobs_seen
        return {"HEALTH_FOR": self.run_purpose(), "HEALTH_JOBS": str(self.jobs), "HEALTH_JOBS_SINCE": str(since)}

    def run_purpose(self) -> str:
        return self.purpose or ("after_job" if self.jobs > self.jobs_seen else "idle")

    # -- results stored in files

    def key(self) -> str:
        """Key of shared results: equal for slots with the same command, tags and environment, until the next boot."""
        settings = self.settings
        boot = read_text("/proc/sys/kernel/random/boot_id") if sys.platform == "linux" else ""
        what = [settings.worker_health_command, settings.worker_agent_query_rules, settings.worker_tags, boot]
        return blake2s(json.dumps([*what, sorted(self.environment().items())]).encode(), digest_size=8).hexdigest()

    def answers(self) -> "dict[str, Verdict]":
        """The last shared results, by `key`; empty when the file cannot be read."""
        try:
            with open(f"{self.settings.worker_state}/health.json", encoding="utf-8") as file:
                return {key: Verdict(*fields) for key, fields in json.load(file).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def share(self, verdict: Verdict) -> None:
        """Store the result for the other slots, and drop old results. The caller has the lock."""
        oldest = verdict.began_at - 2 * self.settings.worker_health_interval
        kept = {key: each for key, each in self.answers().items() if each.began_at > oldest}
        write_anew(f"{self.settings.worker_state}/health.json", kept | {self.key(): verdict})

    def store_if_held(self) -> None:
        """Store a result that waits for an operator, so that it survives a restart; remove any other."""
        if self.held:
            write_anew(f"{self.slot.path}.held", self.verdict)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.slot.path}.held")

    def load_held(self) -> "Verdict | None":
        try:
            with open(f"{self.slot.path}.held", encoding="utf-8") as file:
                verdict = Verdict(*json.load(file))
        except (OSError, ValueError, TypeError):
            return None
        return verdict if self.settings.worker_health_command else None


def write_anew(path: str, content: object) -> None:
    """Replace a JSON file atomically. If that fails (disk full), log it and go on."""
    try:
        new = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(new, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(f"{path}.new", path)
    except OSError as error:
        log.warning(event("unwritten", path=path, problem=error))


def empty_private_tmp(settings: Settings) -> None:
    """Empty /tmp and /var/tmp between jobs, if systemd gave this worker private ones (PrivateTmp=).

    `find` runs as the agent's user, so it can delete no more than a job could.
    """
    private = [path for path in ("/tmp", "/var/tmp") if is_private(path)]
    if private:
        try:
            with subprocess.Popen(
                ["find", *private, "-xdev", "-mindepth", "1", "-delete"], env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **identity(settings) | {"cwd": "/"},
            ) as find:  # fmt: skip
                try:
                    find.wait(EMPTY_SECONDS)
                except subprocess.TimeoutExpired:
                    find.kill()
        except OSError as error:
            log.warning(event("unemptied", path=",".join(private), problem=error))


def is_private(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether systemd mounted a directory at `path` that only this unit sees. Source: proc_pid_mountinfo(5)"""
    try:
        found = [line.split()[3] for line in read_text(mounts).splitlines() if line.split()[4] == path]
    except (OSError, IndexError):
        return False
    return bool(found) and bool(
        re.search(r"/systemd-private-[0-9a-f]{32}-stack-worker@[^/]*\.service-[^/]+/tmp$", found[-1])
    )


# --- Work loop ---


class Touches:
    """Touches one claim from its own thread, so that a scheduler that hangs never delays the agent's output, a signal,
    or the agent's end. Only this thread writes the attributes; the main thread reads them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        job: Job,
        first_pause: float,
        signals: Signals,
        report: Callable[[Scheduler, str, str], object],
        *,
        at_once: bool = False,
    ) -> None:
        """`at_once`: touch now, because we do not know the age of the lease. `report` sends this slot's state."""
        self.scheduler, self.job, self.signals, self.at_once = scheduler, job, signals, at_once
        self.report = report
        self.pause = job.lease_seconds / 3
        self.backoff = Backoff("touch", first_pause, self.pause, job=job.uuid)
        self.ended = threading.Event()
        #: When the last touch was sent, if its answer said stop.
        self.stop_said_at: float | None = None
        #: Why the agent must cancel its job, as the scheduler says; "": it need not.
        self.cancel = ""
        #: The error by which the scheduler said that the claim is no longer ours.
        self.lost: SchedulerError | None = None
        #: The scheduler said that the job is `running` or `done`.
        self.is_acquired = False
        #: When the scheduler first said that the job is done.
        self.over_since: float | None = None

    def __enter__(self) -> "Touches":
        # A job without a claim has no lease.
        if self.job.claim:
            threading.Thread(target=self.run, name="touches", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop touching. It does not wait for a touch in progress: its answer is not needed."""
        self.ended.set()

    def run(self) -> None:
        pause = 0.0 if self.at_once else self.pause
        while not self.ended.wait(pause) and not self.lost:
            sent_at = time.monotonic()
            pause = self.touch(sent_at) - (time.monotonic() - sent_at)
        self.scheduler.close()

    def touch(self, now: float) -> float:
        """Touch once; return the seconds from `now` to the next touch."""
        try:
            answer = self.scheduler.tell(self.job, "touch")
        except SchedulerError as error:
            return self.failed(error)
        self.backoff.succeeded()
        said = {name: answer.get(name) for name in ("state", "stop", "cancel")}
        log.debug(event("touched", job=self.job.uuid, **said))
        self.stop_said_at = now if answer.get("stop") is True else None
        if answer.get("cancel") is True:
            self.cancel = f"the scheduler says cancel: {answer.get('reason')}"
        self.is_acquired = self.is_acquired or answer.get("state") in ("running", "done")
        self.signals.wake()
        if answer.get("state") == "done":
            self.job_is_over(now)
        return self.pause

    def job_is_over(self, now: float) -> None:
        """Report an agent that stays up after its job: since v3.93.0, one that is paused at Buildkite does so."""
        if self.over_since is None:
            self.over_since = now
        elif now - self.over_since >= PAUSED_SECONDS:
            self.report(self.scheduler, "paused", "agent paused at Buildkite: its job has ended, but it still runs")

    def failed(self, error: SchedulerError) -> float:
        if not error.lost:
            return self.backoff.failed(str(error), error.level)
        if not self.ended.is_set():
            log.warning(event("lost", job=self.job.uuid, problem=error, now="the agent goes on; no more touches"))
            self.lost = error
        return 0.0


class Reports:
    """Reports every REPORT_SECONDS, from its own thread, what the main thread waits for."""

    def __init__(self, report: Callable[[Scheduler], object], scheduler: Scheduler, *, at_once: bool = True) -> None:
        """`at_once=False`: the wait may be short, so the first report is sent after REPORT_SECONDS."""
        self.report, self.scheduler, self.at_once = report, scheduler, at_once
        self.ended = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self.run, name="reports", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def run(self) -> None:
        if self.at_once:
            self.report(self.scheduler)
        while not self.ended.wait(REPORT_SECONDS):
            self.report(self.scheduler)
        self.scheduler.close()


class Worker:
    """The main thread: all steps of one slot, one after the other."""

    def __init__(
        self, settings: Settings, slot: Slot, signals: Signals, cgroup: "Cgroup | None", environ: Mapping[str, str]
    ) -> None:
        self.settings, self.slot, self.signals, self.cgroup, self.environ = settings, slot, signals, cgroup, environ
        #: Random id of this process. A new id shows the scheduler that an earlier process of this name has ended.
        self.session = os.urandom(8).hex()
        self.scheduler = Scheduler(settings, slot.name, self.session, self.api_token, signals)
        self.output = Output(slot.open_fifo(os.O_NONBLOCK))
        self.use(settings)
        #: The last status sent to systemd.
        self.status = ""
        self.claim_backoff = Backoff("claim", settings.worker_poll_interval)
        self.agent_backoff = Backoff("agent", settings.worker_poll_interval, REPORT_SECONDS)
        self.start_backoff = Backoff("start", settings.worker_poll_interval, REPORT_SECONDS)
        self.record_backoff = Backoff("record", TICK_SECONDS, TICK_SECONDS)
        #: The agent's version, and the version last reported to the scheduler.
        self.version = self.reported_version = ""
        #: Inode, size, time and mode of the agent's file when it was last found usable.
        self.good_agent: tuple[int, ...] | None = None
        self.health = Health(settings, slot, signals, cgroup)
        self.health_backoff = Backoff("health", settings.worker_poll_interval, REPORT_SECONDS)
        #: When this worker started, and since when it has no job (monotonic).
        self.began_at = self.idle_since = time.monotonic()
        #: Number of processes that the last job left behind.
        self.strays = 0

    def connection(self) -> Scheduler:
        """A new connection, to the scheduler that answered last."""
        connection = Scheduler(self.settings, self.slot.name, self.session, self.api_token)
        connection.urls = self.scheduler.urls.copy()
        return connection

    def api_token(self) -> str:
        """The scheduler's token. A token file is read each time, so that it can be replaced while the worker runs."""
        with contextlib.suppress(SettingsError, ValueError):
            return first_token(read_variable("STACK_API_TOKEN", True, self.environ)) or self.settings.stack_api_token
        return self.settings.stack_api_token

    def use(self, settings: Settings) -> None:
        """Use the reloaded settings. Raises SettingsError, before any change, when they cannot be used."""
        if self.settings.stack_api_token and not settings.stack_api_token:
            raise SettingsError("STACK_API_TOKEN: is empty now; restart the worker if it shall use no token")
        self.settings = settings
        self.scheduler.settings = settings
        self.output.secrets |= {settings.buildkite_agent_token, settings.stack_api_token}

    def run(self) -> None:
        """Claim and work until a stop, or until `is_over`."""
        self.wait_for_earlier_agent()
        while not self.signals.stopped() and not self.is_over():
            job = self.claim() if self.agent_is_good() and self.is_fit() else None
            if job:
                self.work(job)
                self.idle_since = time.monotonic()
            self.report_version()
        self.say_goodbye()

    def is_over(self) -> bool:
        """Whether this worker must end, by WORKER_MAX_JOBS, _IDLE_TIMEOUT or _MAX_UPTIME."""
        has_run_all = 0 < self.settings.worker_max_jobs <= self.health.jobs
        if not has_run_all and self.time_left() > 0:
            return False
        log.info(event("over", jobs=self.health.jobs, up_s=f"{time.monotonic() - self.began_at:.0f}"))
        return True

    def time_left(self) -> float:
        """Seconds that this worker may still wait for a job."""
        idle, up = self.settings.worker_idle_timeout or math.inf, self.settings.worker_max_uptime or math.inf
        return min(self.idle_since + idle, self.began_at + up) - time.monotonic()

    def say_goodbye(self) -> None:
        """Report the end to the scheduler: `gone` from a temporary worker, which it then forgets, else `stopped`."""
        if self.signals.stops > 1:
            return
        if not self.settings.is_temporary:
            if self.reported_version and not self.claim_backoff.times:
                self.report(self.scheduler, "stopped", "the worker was stopped", seconds=LAST_WORD_SECONDS)
            return
        until = time.monotonic() + LAST_TRIES_SECONDS
        while not self.report(self.scheduler, "gone") and self.signals.stops < 2 and time.monotonic() < until:
            self.signals.pause(self.settings.worker_poll_interval, stops=self.signals.stops + 1)

    def tell(self, status: str) -> None:
        """Set the status that `systemctl status` shows. It must be one line: systemd reads each line as a command."""
        status = visible(" ".join(status.split()))
        if status != self.status:
            tell_systemd(f"STATUS={status}")
        self.status = status

    def wait_for_earlier_agent(self) -> None:
        """Wait for the agent of an earlier worker that died: two agents never share a slot."""
        agent = self.slot.recorded()
        if agent:
            job = agent.job
            log.warning(event("waiting", job=job.uuid, pid=agent.pid, why="an earlier worker's agent is alive"))
            self.output.job = job.uuid
            self.tell(f"an earlier worker's agent still runs job {job.uuid}")
            with contextlib.suppress(AttributeError, OSError):
                agent.ends.append(os.pidfd_open(agent.pid))
            first_pause = self.settings.worker_poll_interval
            reason = f"the agent of an earlier process of this worker still runs job {job.uuid}"
            with Reports(lambda scheduler: self.report(scheduler, "earlier_agent", reason), self.connection()):
                with Touches(self.connection(), job, first_pause, self.signals, self.report, at_once=True) as touches:
                    self.watch(agent, touches)
            for end in agent.ends:
                os.close(end)
            log.info(event("gone", job=job.uuid, pid=agent.pid))
        self.slot.forget()
        if self.cgroup:
            for left in self.cgroup.left():
                self.clean_up(left, self.cgroup.end)

    def is_fit(self) -> bool:
        """Whether this host is fit for a job. If not, report why to the scheduler, pause, and return False."""
        why = self.health.unfit()
        if not why and self.health.is_due():
            said = f"WORKER_HEALTH_COMMAND has run for over {REPORT_SECONDS:g} s"
            reason = self.health.why() or said
            with Reports(lambda scheduler: self.report(scheduler, "unfit", reason), self.connection(), at_once=False):
                self.health.ask()
        why = why or self.health.why()
        if self.signals.stops:
            return False
        if not why:
            self.health_backoff.succeeded()
            return True
        self.tell(f"unfit: {why}")
        pause = self.health_backoff.failed(why)
        self.report(self.scheduler, "unfit", why)
        self.signals.pause(min(pause, max(0.0, self.time_left())))
        return False

    def agent_is_good(self) -> bool:
        """Whether the agent can be started. It runs `--version` again only when the agent's file has changed."""
        try:
            stat = os.stat(self.settings.buildkite_agent_path)
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
            if stamp != self.good_agent:
                self.version = agent_version(self.settings)
                self.log_agent()
        except (OSError, ValueError) as error:
            self.good_agent = None
            problem = f"BUILDKITE_AGENT_PATH: {error}; the worker claims no job until this is fixed"
            self.tell(problem)
            self.pause_without_agent(self.agent_backoff, problem)
            return False
        self.good_agent = stamp
        self.agent_backoff.succeeded()
        return True

    def log_agent(self) -> None:
        until = supported_until(self.version) or None
        log.info(event("agent", path=self.settings.buildkite_agent_path, version=self.version, supported_until=until))
        why = support_warning(self.version, time.time())
        if why:
            log.warning(event("outdated", agent=self.version, why=why))

    def report_version(self) -> None:
        """Report the agent's version to the scheduler, after a successful claim call: only then it knows the slot."""
        if self.reported_version == self.version or self.claim_backoff.times or self.signals.stops:
            return
        if self.report(self.scheduler, "idle"):
            self.reported_version = self.version

    def report(self, scheduler: Scheduler, state: str, reason: str = "", seconds: float = ANSWER_SECONDS) -> bool:
        """Report this slot's state and its agent's version; return False if another try may succeed."""
        fields = {"version": VERSION, "agent": self.version}
        fields["agent_supported_until"] = self.version and supported_until(self.version)
        fields |= {"state": state, "reason": reason, "query": self.settings.query}
        if state == "unfit" and self.health.held:
            fields["held"] = self.health.held
        path = f"/workers/{quote(self.slot.name, safe='')}"
        try:
            answer = scheduler.ask("POST", path, fields, seconds=seconds, stops=1)
        except Stopped:
            return False
        except SchedulerError as error:
            log.debug(event("unreported", state=state, problem=error))
            return not error.elsewhere  # a scheduler that refuses is an older version, or does not know the slot
        resumed = (answer or {}).get("resumed")
        if isinstance(resumed, str):
            self.health.resumed = resumed
        return True

    def pause_without_agent(self, backoff: Backoff, problem: str) -> None:
        pause = backoff.failed(problem, logging.ERROR)
        if not self.signals.stopped():
            self.report(self.scheduler, "no_agent", problem)
        self.signals.pause(pause)

    def claim(self) -> "Job | None":
        """Claim a job from the scheduler; None when there was none, or (after a pause) when the call failed."""
        if not self.claim_backoff.times:
            self.tell(f"waiting for a job for {self.settings.query}")
        sent_at, wait = time.monotonic(), min(self.scheduler.wait, max(0.0, self.time_left()))
        try:
            job = self.scheduler.claim(self.settings.query, wait, lambda: bool(self.health.unfit()))
        except SchedulerError as error:
            self.claim_failed(error)
            return None
        self.claim_backoff.succeeded()
        if job:
            log.info(event("claimed", job=job.uuid, queue=job.queue_key, claim=job.claim))
        elif time.monotonic() - sent_at < wait / 2:
            # "No job" long before the wait is over: without a pause, worker and scheduler would loop at full speed.
            self.signals.pause(self.settings.worker_poll_interval)
        return job

    def claim_failed(self, error: SchedulerError) -> None:
        self.tell(f"no job can be claimed: {error}")
        self.reported_version = ""  # the next answer may come from another scheduler, or from one with an empty store
        if error.code == "worker_name_taken":
            self.name_taken(error)
        else:
            self.signals.pause(self.claim_backoff.failed(str(error), error.level, error.retry_after))

    def name_taken(self, error: SchedulerError) -> None:
        """Pause for long: another process uses our name, and each of us would end the claims of the other."""
        log.error(event("name_taken", worker=self.slot.name, problem=error, pause_s=NAME_TAKEN_SECONDS))
        until = time.monotonic() + NAME_TAKEN_SECONDS
        # A reload ends a pause, but not this one, because it cannot change the name.
        while not self.signals.stops and time.monotonic() < until:
            self.signals.pause(until - time.monotonic())

    def work(self, job: Job) -> None:
        """Run one claimed job until its end."""
        if self.signals.stopped():
            self.release(job, "a stop of the worker came together with the job")
            return
        why = self.health.unfit()
        if why:
            self.release(job, f"the host is unfit: {why}", code="unfit")
            return
        if self.settings.job_tokens and not job.token:
            self.cannot_start(
                job, "the scheduler sent no job token; set BUILDKITE_AGENT_TOKEN, or upgrade the scheduler"
            )
            return
        try:
            agent = self.start(job)
        except OSError as error:
            self.cannot_start(job, str(error))
            return
        self.tell(f"running job {job.uuid}")
        with Touches(self.connection(), job, self.settings.worker_poll_interval, self.signals, self.report) as touches:
            self.watch(agent, touches)
        self.slot.forget()
        figures = {"strays": self.strays, "free": free_space(self.settings)}
        log.info(event("exited", job=job.uuid, pid=agent.pid, exit_status=agent.exit_status, **figures))
        self.report_agent_end(job, agent, touches, figures)
        empty_private_tmp(self.settings)  # after complete, because it may take longer than the lease
        self.assess_host(job, agent, touches)

    def assess_host(self, job: Job, agent: Agent, touches: Touches) -> None:
        """After an agent's end: decide if the health command must run, and count the job for WORKER_MAX_JOBS."""
        status = agent.exit_status
        has_failed = status not in (0, EXIT_REJECTED) and not touches.is_acquired
        if has_failed or agent.killed or self.strays:
            self.health.suspect()
        if status in (*NOT_STARTED, EXIT_REJECTED) or agent.stopped_at:
            return
        self.health.jobs += touches.is_acquired or not self.settings.worker_max_jobs or self.was_acquired(job)

    def was_acquired(self, job: Job) -> bool:
        """Whether an agent acquired the job, by the scheduler's knowledge from Buildkite.

        Unknown counts as yes: for a one-job worker, a second job is worse than none.
        """
        until = time.monotonic() + KNOWN_SECONDS
        while not self.signals.stops and time.monotonic() < until:
            try:
                known = self.scheduler.ask("GET", f"/jobs/{job.uuid}") or {}
            except (SchedulerError, Stopped):
                known = {}
            if known.get("state") == "done":
                return bool(known.get("outcome") == "ran")
            if known.get("state") in ("ready", "leased", "running"):
                return bool(known["state"] == "running")
            self.signals.pause(KNOWN_AGAIN_SECONDS)
        return True

    def cannot_start(self, job: Job, why: str) -> None:
        """Release the job, and check the agent again before the next claim."""
        self.release(job, f"the agent cannot be started: {why}")
        self.good_agent = None
        self.pause_without_agent(self.start_backoff, why)

    def start(self, job: Job) -> Agent:
        """Start the agent for the job; raises OSError when no process can be started."""
        token = job.token if self.settings.job_tokens else self.settings.buildkite_agent_token
        self.output.begin(job.uuid, job.token)
        fifo = self.slot.open_fifo()
        try:
            child = subprocess.Popen(
                GATE + agent_arguments(self.settings, self.slot.name, job),
                env=agent_environment(self.settings, os.environ, token),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=fifo,
                stderr=fifo,
                # Its own session: Ctrl-C at a terminal must reach only the worker.
                start_new_session=True,
                **identity(self.settings),
            )
        finally:
            os.close(fifo)
        self.signals.child = child.pid
        agent = Agent(child.pid, start_time(child.pid), job, child)
        agent.recorded = self.record(agent)
        assert child.stdin
        # If the gate has ended already, its exit status shows it later.
        with contextlib.suppress(BrokenPipeError), child.stdin:
            self.confine(agent, child)
            child.stdin.write(b"go\n")
        log.info(event("started", job=job.uuid, pid=child.pid))
        return agent

    def confine(self, agent: Agent, child: subprocess.Popen[bytes]) -> None:
        """Put the agent, which still waits in GATE, into the job's cgroup. If this fails, kill it and raise OSError."""
        try:
            if self.cgroup:
                self.cgroup.enter(agent.job.uuid, agent.pid)
        except OSError:
            child.kill()
            child.wait()
            self.slot.forget()
            raise

    def watch(self, agent: Agent, touches: Touches) -> None:
        """Log the agent's output and send it signals, until it has exited. Then end what it left running."""
        while not agent.exited():
            if self.output.fifo in self.signals.wait([self.output.fifo, *agent.ends], TICK_SECONDS):
                # Collect more output for a short time; the agent's end or a signal ends this wait.
                self.signals.wait(agent.ends, OUTPUT_SECONDS)
                self.output.read_all(READS)
            self.pass_on(agent, touches)
            agent.recorded = agent.recorded or self.record(agent)
        self.signals.child = 0
        self.strays = self.clean_up(agent.job.uuid, self.cgroup.end if self.cgroup else lambda _: end_group(agent))
        self.signals.reap_zombies()
        self.output.drain()

    def clean_up(self, job: str, end: Callable[[str], list[str]]) -> int:
        """End the processes that the job left behind, and log them; return their number, 1 if that fails."""
        try:
            left = end(job)
        except OSError as error:
            log.error(event("unended", job=job, problem=error))
            return 1
        if left:
            log.warning(event("left", job=job, processes=first_few(left), now="they were killed"))
        return len(left)

    def record(self, agent: Agent) -> bool:
        """Record the agent on disk; return whether it worked. A full disk does not stop the agent."""
        try:
            self.slot.record(agent)
        except OSError as error:
            self.record_backoff.failed(str(error))
            return False
        self.record_backoff.succeeded()
        return True

    def pass_on(self, agent: Agent, touches: Touches) -> None:
        """Send the agent the signals that are due: to cancel its job, or to stop as the scheduler said."""
        why = "" if agent.cancelled else touches.cancel or self.why_cancel(agent, time.monotonic())
        if why:
            agent.cancelled = True
            agent.send(signal.SIGQUIT, why)
        said_at = touches.stop_said_at
        if said_at is None:
            return
        if agent.stopped_at is None:
            agent.stopped_at = time.monotonic()
            agent.send(signal.SIGTERM, "the scheduler says stop: the agent has not acquired its job")
        elif said_at > agent.stopped_at + STOP_SECONDS and not agent.killed:
            agent.killed = True
            agent.send(signal.SIGKILL, f"the agent has not ended {STOP_SECONDS:g} s after SIGTERM")

    def why_cancel(self, agent: Agent, now: float) -> str:
        """Why the agent must cancel its job; "" when it may go on. `now`: monotonic seconds."""
        if self.signals.stops > 1:
            return "the worker must stop now"
        if now > self.signals.stopped_at + self.settings.worker_stop_timeout:
            return f"the worker's stop began {self.settings.worker_stop_timeout:g} s ago (WORKER_STOP_TIMEOUT)"
        if now > agent.began_at + (self.settings.worker_job_timeout or math.inf):
            return f"the job has run for {self.settings.worker_job_timeout:g} s (WORKER_JOB_TIMEOUT)"
        return ""

    def report_agent_end(self, job: Job, agent: Agent, touches: Touches, figures: "dict[str, int | None]") -> None:
        """Report the agent's end to the scheduler (complete or release), unless the claim is lost."""
        if agent.exit_status not in NOT_STARTED:
            self.start_backoff.succeeded()
        if touches.lost:
            self.lost(touches.lost)
        elif agent.exit_status in NOT_STARTED:
            self.cannot_start(job, self.output.last_words.strip())
        elif agent.stopped_at and touches.stop_said_at:
            self.release(job, "the agent was stopped: it did not acquire the job")
        else:
            ended = {"exit_status": agent.exit_status, "last_words": self.output.last_words, **figures}
            self.tell_until_answered(job, "complete", float("inf"), ended)

    def release(self, job: Job, reason: str, code: str = "") -> None:
        """Give the job back to the scheduler. If the call keeps failing, the lease expires by itself."""
        if not job.claim:
            now = "Buildkite schedules the job again when its reservation expires"
            why = "the job has no claim"
            return log.error(event("not_released", job=job.uuid, reason=reason, why=why, now=now))
        fields = {"reason": reason} | ({"code": code} if code else {})
        self.tell_until_answered(job, "release", time.monotonic() + job.lease_seconds, fields)

    def tell_until_answered(self, job: Job, verb: str, until: float, fields: Mapping[str, object]) -> None:
        """Repeat the call until the scheduler answers, until `until` (monotonic), or until a second stop.

        A stopping worker does not try for long, because Buildkite also knows how the job ended.
        """
        backoff = Backoff(verb, self.settings.worker_poll_interval, job=job.uuid)
        while True:
            try:
                self.scheduler.tell(job, verb, **fields)
                logged = {k: v for k, v in fields.items() if k not in ("last_words", "strays", "free")}
                return log.info(event(f"{verb}d", job=job.uuid, **logged))
            except SchedulerError as error:
                failure = error
            if failure.lost:
                # Nothing to report: another worker has the job, or the scheduler already knows how it ended.
                log.warning(event("lost", job=job.uuid, problem=failure))
                return self.lost(failure)
            if self.signals.stops:
                until = min(until, time.monotonic() + LAST_TRIES_SECONDS)
            if self.signals.stops > 1 or time.monotonic() >= until or failure.status in (400, 413, 422):
                return log.error(event(f"not_{verb}d", job=job.uuid, problem=failure))
            pause = backoff.failed(str(failure), failure.level, failure.retry_after)
            self.signals.pause(pause, stops=self.signals.stops + 1)

    def lost(self, error: SchedulerError) -> None:
        if error.code == "worker_name_taken":
            self.name_taken(error)


# --- Main ---

USAGE = """\
Usage: worker.py [--help | --version | --check]

Claims jobs from scheduler.py and runs each with buildkite-agent start --acquire-job.
--check checks settings, agent, directories and scheduler, and exits with 0 if all is well, else 78.

  STACK_API_TOKEN_FILE=/etc/worker/token ./worker.py
  WORKER_AGENT_QUERY_RULES=queue=linux,arch=arm64 ./worker.py
  WORKER_API_SERVER=http://scheduler:18888 ./worker.py --check"""


def check(settings: Settings) -> list[str]:
    """Problems with the agent, directories and schedulers that the settings name."""
    problems = []
    try:
        why = support_warning(agent_version(settings), time.time())
        if why:
            log.warning(event("outdated", agent=settings.buildkite_agent_path, why=why))
    except ValueError as error:
        problems.append(f"BUILDKITE_AGENT_PATH: {error}")
    if not can_write(settings.worker_state):
        problems.append(f"WORKER_STATE: this user cannot write {settings.worker_state}")
    elif settings.worker_agent_user:
        problems.append(problem_of_unsafe_path("WORKER_STATE", settings.worker_state))
    problems.append(problem_of_builds(settings))
    problems += problems_of_health(settings)
    for url in settings.worker_api_server:
        alone = dataclasses.replace(settings, worker_api_server=(url,))
        scheduler = Scheduler(alone, "check", "check", lambda: settings.stack_api_token)
        try:
            scheduler.ask("GET", "/health")
            scheduler.ask("GET", "/jobs/check")
        except SchedulerError as error:
            # The answer "unknown_job" is good: only a caller with a valid token gets it.
            if error.code != "unknown_job":
                problems.append(f"WORKER_API_SERVER: {url}: {error}")
        scheduler.close()
    return [problem for problem in problems if problem]


def problems_of_health(settings: Settings) -> list[str]:
    """Whether there is too little space for builds, and whether the health command's program is missing."""
    why = space_problem(settings)
    problems = [f"BUILDKITE_BUILD_PATH: {why}"] if why else []
    word = settings.worker_health_command.partition(" ")[0]
    if re.fullmatch(r"[\w./-]+", word) and not as_agent(settings, "sh", "-c", 'command -v "$1"', "sh", word):
        problems.append(f"WORKER_HEALTH_COMMAND: the agent's user cannot run {word}")
    return problems


def proxies(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """If proxies are set (environment or .env): which calls use a proxy, one line each."""
    # Imported here because it slows the start by many ms.
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # noqa: PLC0415

    found = {name[:-6].lower(): text for name, text in environ.items() if name[-6:].lower() == "_proxy" and text}
    url = urlsplit(settings.buildkite_agent_endpoint or "https://agent.buildkite.com/v3")
    proxy = "" if proxy_bypass_environment(url.hostname or "", found) else found.get(url.scheme, "")
    way = f"through the proxy {without_login(proxy)}" if proxy else "without a proxy"
    lines = [f"{server}: this worker calls it without a proxy" for server in settings.worker_api_server]
    return [*lines, f"{url.geturl()}: the agent calls it {way}"] if found else []


def problem_of_builds(settings: Settings) -> str:
    """Why the agent cannot use BUILDKITE_BUILD_PATH, and we cannot make that directory; "" when all is well."""
    user, path = settings.worker_agent_user, settings.builds
    there = nearest(path)
    if not user:
        good = can_write(path)
    else:
        try:
            # Test as the agent's user, because root may write everywhere.
            good = as_agent(settings, "test", "-w", there, "-a", "-x", there)
        except OSError as error:
            return f"BUILDKITE_BUILD_PATH: {path} cannot be checked as {user}: {error}"
        if not good and there != path:
            # At start, root makes it if no other user can redirect that.
            return problem_of_unsafe_path("BUILDKITE_BUILD_PATH", os.path.dirname(path))
    return "" if good else f"BUILDKITE_BUILD_PATH: {user or 'this user'} cannot write {path}"


def problem_of_unsafe_path(name: str, path: str) -> str:
    try:
        refuse_unsafe_path(path)
    except OSError as error:
        return f"{name}: {path} cannot be used: {error}"
    return ""


def nearest(path: str) -> str:
    """The path, or its nearest parent that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def unsafe(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Warnings about settings that work but are not secure."""
    found = readable_secrets(Settings, environ)
    addresses = [("WORKER_API_SERVER", url) for url in settings.worker_api_server]
    for name, url in [*addresses, ("BUILDKITE_AGENT_ENDPOINT", settings.buildkite_agent_endpoint)]:
        if is_in_clear(url):
            found.append(f"{name}: tokens cross the network unencrypted, to {urlsplit(url).hostname}; use https")
    given = environ.get("BUILDKITE_AGENT_CONFIG")
    if settings.worker_agent_user and given and unsafe_place(os.path.abspath(given)):
        found.append(
            f"BUILDKITE_AGENT_CONFIG: users other than root can write {given}, and break or redirect the agent"
        )
    elif settings.worker_agent_user and not given:
        config, refused = agent_config(settings)
        for path in refused:
            advice = f"the agent gets {config} instead; let only root write {path} and its directory, or set another"
            found.append(f"BUILDKITE_AGENT_CONFIG: users other than root can write {path}: {advice} file")
    return found


def can_write(path: str) -> bool:
    """Whether we can write to the directory, or make it."""
    there = nearest(path)
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def set_up_logs(name: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=name.upper(), handlers=[handler])
    # Our log lines contain no file, thread or process. Not collecting these saves a third of each log call.
    # Source: https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # If a log line cannot be written (disk full, reader gone), drop it without an error.
    logging.raiseExceptions = False


def problem(text: str, status: int) -> int:
    complain(f"worker.py: {text}")
    return status


def own_cgroup(settings: Settings) -> "Cgroup | None":
    """The cgroup for jobs; None if the host has none. Raises SettingsError when limits are set but not possible."""
    path = delegated_cgroup()
    try:
        if path:
            return Cgroup(path, settings.limits)
        why = "systemd delegated no cgroup (v2) to this worker; its unit needs Delegate=yes"
    except OSError as error:
        why = f"{path} cannot be used: {error}"
    if settings.limits:
        names = " and ".join(settings.limits)
        raise SettingsError(f"WORKER_JOB_MEMORY, _CPUS, _TASKS: {names} cannot be set on this host: {why}")
    log.warning(event("unconfined", why=why, now="after a job, the worker ends only the agent's process group"))
    return None


def serve(settings: Settings, environ: Mapping[str, str]) -> int:
    signals = Signals()
    place = f"WORKER_STATE: {settings.worker_state}"
    try:
        slot = take_slot(settings)
        worker = Worker(settings, slot, signals, own_cgroup(settings), environ)
        place = f"BUILDKITE_BUILD_PATH: {settings.builds}"
        make_builds(settings)
    except SettingsError as error:
        return problem(f"the settings are wrong:\n{error}", EXIT_SETTINGS)
    except SlotTaken as taken:
        return problem(f"{taken}; give each worker its own WORKER_NAME", EXIT_LATER)
    except OSError as error:
        return problem(f"{place} cannot be used: {error}", EXIT_LATER if error.errno in PASSING else EXIT_SETTINGS)
    found = problem_of_builds(settings)
    if found:
        return problem(found, EXIT_LATER)  # a file system may be mounted there later
    log.info(
        event("started", version=VERSION, **settings.public() | {"worker_name": slot.name, "session": worker.session})
    )
    for reason in unsafe(settings, environ):
        log.warning(event("unsafe", reason=reason))
    for tag in ignored_queues(settings, environ):
        log.warning(event("ignored", tag=tag, why=f"the queue of this worker is {settings.queue}"))
    signals.reload = lambda: reload(worker.settings, environ, worker.use)
    tell_systemd("READY=1")
    worker.run()
    log.info(event("stopped", worker=slot.name))
    return 0


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text(Settings, USAGE))
        return 0
    if arguments == ["--version"]:
        sys.stdout.write(f"worker.py {VERSION}\n")
        return 0
    if arguments not in ([], ["--check"]):
        return problem(f"unknown arguments {arguments}; see worker.py --help", EXIT_USAGE)
    try:
        environ = environment()
        settings = read_settings(Settings, environ)
        if any(url.startswith("https:") for url in settings.worker_api_server):
            tls_context(settings)
    except SettingsError as error:
        return problem(f"the settings are wrong:\n{error}", EXIT_SETTINGS)
    set_up_logs(settings.log_level)
    for line in unknown_settings(Settings, environ) + ignored_settings(settings, environ):
        log.warning(event("ignored", problem=line))
    if not arguments:
        return serve(settings, environ)
    for reason in unsafe(settings, environ):
        log.warning(event("unsafe", reason=reason))
    sys.stdout.write("".join(f"{line}\n" for line in proxies(settings, environ)))
    problems = check(settings)
    if problems:
        return problem("the check failed:\n" + "\n".join(problems), EXIT_SETTINGS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
