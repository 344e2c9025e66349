#!/usr/bin/env python3
"""A worker of the stack: one slot of a build machine, which runs one Buildkite job at a time.

It asks scheduler.py for a job whose rules it meets, starts `buildkite-agent start --acquire-job <uuid>`
for it, touches the claim while the agent runs, says how the agent ended, and asks again.

    claim ──204, no job yet──▶ claim
      │    the host is unfit: no claim; one that waits is withdrawn, and a job that has come is released
      │200
      ▼
    start the agent ──it cannot be started──▶ release ──▶ look at the agent again until it can be
      │
      ▼  each third of the lease: touch
      │    200 stop      SIGTERM, and SIGKILL if 30 s later a touch still says so ──▶ release
      │    200 cancel    SIGQUIT: the agent cancels its job, and ends
      │    404, 409      the claim is lost: no more touches, nothing to complete
      │    401, 5xx, …   touch again; the agent never notices
      ▼
    the agent has exited ──▶ complete, repeated until the scheduler has answered ──▶ claim

SIGTERM or SIGINT once: claim no more, let the agent end, exit 0. Twice, or SIGQUIT, or once WORKER_STOP_TIMEOUT is
over: it cancels its job. SIGHUP: read the secrets' files and LOG_LEVEL again.

An agent outlives its worker: its output goes to a FIFO, and its pid, start time and claim to a file, both in
WORKER_STATE; the next worker of the slot logs its lines, touches its claim and waits for it to end before it claims.

Under systemd each job has a cgroup of its own: what it leaves behind is killed before the next job is claimed, or
named in the log where that fails.

Two threads, one Scheduler (a connection) each: the main thread owns everything; a thread of Touches lives as
long as an agent does, one of Reports while an earlier worker's agent, or the health command, is waited for.
Signals, touches and the end of an agent wake the main thread through one pipe. A scheduler's name is looked up on
a thread of its own, so that a name server that hangs holds up nobody.

Whatever it waits for but a job, it reports to the scheduler at least every 30 s. A worker with WORKER_MAX_JOBS,
WORKER_IDLE_TIMEOUT or WORKER_MAX_UPTIME ends by itself, between two jobs, and says goodbye.

The sections, in order: Settings and logs, Worker settings, Scheduler client, Signals, Slot, Cgroup, Agent,
Health, Work loop, Main.

Start at `main`, then follow `Worker.run`.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    # For this line Python reads the whole file, down to 3.6, which RHEL 8 has: hence no :=, and annotations in quotes.
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
    from _blake2 import blake2s  # without the rest of hashlib, which takes 0.6 MB
except ImportError:
    from hashlib import blake2s

# http.client imports ssl where it is there, which takes 5 MB. Only a worker with an https scheduler needs it.
if __name__ == "__main__":
    sys.modules["ssl"] = None  # type: ignore[assignment]
import http.client  # noqa: E402

if __name__ == "__main__":
    del sys.modules["ssl"]
if TYPE_CHECKING:
    import ssl

log = logging.getLogger("worker")

#: sysexits.h EX_USAGE: an argument that is none of ours.
EXIT_USAGE = 64
#: sysexits.h EX_TEMPFAIL: another worker holds the slot, or one of PASSING. A later start may succeed.
EXIT_LATER = 75
#: What the host is short of for a while: disk, files, memory, processes, locks; or its file server was restarted.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EAGAIN,
           errno.ENOLCK, errno.ESTALE)  # fmt: skip
#: Older agents are refused: some of them exit 0 when Buildkite rejected the job.
OLDEST_AGENT = (3, 99, 0)
#: When minor lines of the agent were first released: one that is not here has the date of the one before it, one
#: beyond the last is not known. Buildkite supports each for a year, and all that it then still served until 2027.
#: Source: https://buildkite.com/docs/agent/version-support-policy
RELEASED = {
    (3, 116): "2026-01-29", (3, 117): "2026-02-03", (3, 118): "2026-02-16", (3, 122): "2026-04-09",
    (3, 125): "2026-05-04", (3, 130): "2026-07-01", (3, 131): "2026-07-06", (3, 133): "2026-07-17",
    (3, 134): "2026-07-23", (3, 135): "2026-07-29", (3, 136): "2026-08-04", (3, 137): "2026-08-11",
    (3, 138): "2026-09-03", (4, 0): "2026-09-01", (4, 1): "2026-10-01", (4, 2): "2026-10-06", (4, 5): "2026-10-15",
    (4, 8): "2026-10-22", (4, 10): "2026-11-06", (4, 12): "2026-11-19",
}  # fmt: skip
FIRST_END = "2027-01-01"
#: Seconds. An agent that is supported for no longer than this is warned of.
SUPPORT_SECONDS = 60 * 86400.0
#: Seconds. An address that cannot be connected to in this time counts as down; a name may have several. Looking it up,
#: all its addresses and TLS have the second time together.
CONNECT_SECONDS, CONNECTED_SECONDS = 5.0, 10.0
#: Seconds for a whole call, beyond what a claim waits. A touch must fail well before its lease ends.
ANSWER_SECONDS = 10.0
#: Seconds that the rest of an answer has when a stop comes in the middle of it: there may be a job in it.
REST_SECONDS = 1.0
#: Seconds. As short as WORKER_WAIT can be.
SHORTEST_WAIT = 1.0
#: Bytes. A longer answer is cut, and then is not JSON: no answer of ours comes near.
ANSWER_BYTES = 1 << 20
#: Seconds. The longest pause between tries; a larger value finds a restarted scheduler later.
LONGEST_PAUSE = 30.0
#: Seconds. What the worker waits for is reported again after this: with what a look at the agent, or an answer, takes,
#: at least every 30 s.
REPORT_SECONDS = 15.0
#: An agent that is still up so long after its job was over is taken for paused at Buildkite.
PAUSED_SECONDS = 15.0
#: A trouble that stays the same is logged again at every so many tries.
REPEATS_PER_LINE = 10
#: Seconds without claims after another worker has shown up under our name.
NAME_TAKEN_SECONDS = 300.0
#: Seconds from SIGTERM to SIGKILL for an agent that never acquired its job.
STOP_SECONDS = 30.0
#: Seconds that a worker which is to stop goes on telling a scheduler that does not answer how its job ended.
LAST_TRIES_SECONDS = 30.0
#: Seconds for what a job left behind to be gone after SIGKILL; only a process in the kernel's hands takes longer.
KILL_SECONDS = 10.0
#: What a job left behind is named in the log, up to so many processes.
NAMED_PROCESSES = 10
#: Seconds. While an agent runs, the most that passes before what had no wake-up of its own is noticed.
TICK_SECONDS = 1.0
#: Seconds that output waits for more of it, so that lines are read together. The FIFO takes what comes meanwhile.
OUTPUT_SECONDS = 0.05
#: Buffers of output that are logged before the worker looks at its signals again.
READS = 4
#: Seconds. While a claim waits, the host is looked at this often; a larger value lets more jobs come to an unfit one.
LOOK_SECONDS = 5.0
#: Below 1 in so many free inodes, or below this part of the memory available, no job is claimed.
FREE_INODES, FREE_MEMORY = 100, 0.05
#: Seconds. That the agent's user can write its builds is believed for so long, as long as no owner or mode has changed.
WAY_SECONDS = 60.0
#: Seconds that WORKER_HEALTH_COMMAND has. An answer that is not "fit" is asked for again after the second of these,
#: doubled each time in a row up to WORKER_HEALTH_INTERVAL.
HEALTH_SECONDS, HEALTH_AGAIN_SECONDS = 60.0, 2.0
#: Bytes of its output that are kept, and letters of its first line that are told.
HEALTH_BYTES, REASON_LETTERS = 4096, 300
#: What its cgroup is given, where the host has it. Source: the kernel's cgroup-v2.rst
HEALTH_LIMITS = {"memory.max": str(512 << 20), "pids.max": "256"}
#: Seconds between two tries to take the lock under which the command runs.
LOCK_SECONDS = 0.2
#: Seconds for Buildkite to have said whether an agent had acquired its job, and between two questions for it.
KNOWN_SECONDS, KNOWN_AGAIN_SECONDS = 20.0, 0.5
#: Seconds for emptying a /tmp of our own.
EMPTY_SECONDS = 60.0
#: Seconds for a word that the scheduler can do without.
LAST_WORD_SECONDS = 2.0
#: Seconds for `buildkite-agent --version`.
VERSION_SECONDS = 10.0
#: Characters of the agent's output that make one log line at most; longer lines are cut into several. The journal
#: itself cuts at 48 KiB, of which a character may take 12 bytes, escaped.
LINE_CHARACTERS = 4000
#: Characters of the agent's last output that go with complete.
LAST_WORDS = 2048
#: Bytes that the FIFO holds while no worker reads it (Linux). When it is full, the agent blocks.
FIFO_BYTES = 1 << 20
#: Linux's <fcntl.h>; Python has a name for it since 3.10.
F_SETPIPE_SZ = 1031

# --- Settings and logs ---
# (The same text in scheduler.py and worker.py: each is copied alone. A test keeps them equal.)

S = TypeVar("S")

#: The version of both scripts, which are released together: what is new in it stands in CHANGELOG.md.
VERSION = "1.0.0"

#: sysexits.h EX_CONFIG: the settings are wrong, and a restart cannot help.
EXIT_SETTINGS = 78


class SettingsError(Exception):
    """Everything that is wrong with the settings: one problem a line."""


def setting(default: Any, parse: Callable[[str], Any], text: str, *, secret: bool = False) -> Any:
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


#: Patterns of an address. What libraries would refuse does not match: their errors quote it, password and all.
IPV6 = r"[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}(?:%[A-Za-z0-9_.-]{1,15})?"
HOST = rf"(?:\[{IPV6}\]|[A-Za-z0-9_-]{{1,63}}(?:\.[A-Za-z0-9_-]{{1,63}})*\.?)"
PORT = "(?:6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
#: With its path, which holds no @: that would end a password with a slash in it.
PLACE = rf"{HOST}(?::{PORT})?(?:/[!\"$->A-Z^-~]*)?"
#: The letters of a URL's user and password. Source: RFC 3986, 3.2.1
LOGIN = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})*"
PROXY = rf"(?:(?:https?|socks4a?|socks5h?)://)?(?:{LOGIN}@)?{PLACE}"


def http_url(text: str) -> str:
    """A base URL without a slash at its end. One that is none is not quoted: a secret may stand in it."""
    if not is_match(f"https?://{PLACE}", text):
        raise ValueError("is not an http or https URL of host, port and path alone, like http://localhost:18888/path")
    scheme, separator, place = text.partition("://")
    return scheme.lower() + separator + place.rstrip("/")


def wrong_proxies(environ: Mapping[str, str]) -> list[str]:
    """The variables of proxies that hold none. A login may stand in these; NO_PROXY is a list of hosts."""
    told = []
    for name, text in environ.items():
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and text and not is_match(PROXY, text):
            form = "write it like http://user:password@proxy:3128, with %2F for a / in the password, and so on"
            told.append(f"{name}: is not the address of a proxy; {form}")
        if name.lower() == "no_proxy" and re.search("[@?#]|//", text):
            told.append(f"{name}: is not a list of hosts; write it like localhost,.example.com,10.0.0.0/8")
    return told


def is_match(pattern: str, text: str) -> bool:
    """Whether all of the text matches, in any case, and an IPv6 address in brackets is one."""
    try:
        for address in re.findall(r"\[([^]%]*)", text):
            socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):
        return False
    return bool(re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII))


def without_login(text: str) -> str:
    """An address, or a library's words that may quote one, as it may leave us: without user and password."""
    return re.sub(r"(?<![^\s/?#])[^\s/?#]+@", "", text)


def text_of(path: str) -> str:
    """What the file holds; raises SettingsError, which names it, when it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None


def read_variable(name: str, secret: bool, environ: Mapping[str, str]) -> str:
    """The variable's text, "" when unset. A secret may be a file, <NAME>_FILE or a systemd credential, if not empty."""
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    path = environ.get(f"{name}_FILE") or (credential if os.path.exists(credential) else "")
    return (text_of(path).strip() if secret and path else "") or environ.get(name, "").strip()


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
        except (ValueError, SettingsError) as error:
            problems.append(f"{name}: {error}")
    problems += wrong_proxies(environ)
    if problems:
        raise SettingsError("\n".join(problems + unknown_settings(cls, environ)))
    return cls(**values)


def unknown_settings(cls: type[Any], environ: Mapping[str, str]) -> list[str]:
    """What looks like a setting of `cls` and is none, with the nearest one: POLL_INTERVALL, say."""
    fields = dataclasses.fields(cls)
    known = {f.name.upper() for f in fields} | {f"{f.name.upper()}_FILE" for f in fields if f.metadata["secret"]}
    told = []
    for name in sorted(environ.keys() - known):
        differences = ((*difference(name.upper(), each), each) for each in sorted(known))
        more, less, nearest = min(differences, key=lambda found: len(found[0] + found[1]))
        is_misspelt = len(more + less) <= 2 or sorted(more) == sorted(less)
        # POLL_INTERVAL for WORKER_POLL_INTERVAL. Where that is set too, the other is another program's.
        is_short = not more and "_" in name and 2 * len(name) > len(nearest) and nearest not in environ
        is_long = "_" in nearest and name.startswith(nearest)  # REDIS_ADDRESS
        if is_misspelt or is_short or is_long or name.startswith(cls.PREFIXES):
            told.append(f"{name}: is no setting of {log.name}.py, and does not count; the nearest is {nearest}")
    return told


def difference(one: str, other: str) -> tuple[str, str]:
    """What two words have between the start and the end that they share."""
    for _ in ("start", "end"):
        shared = len(os.path.commonprefix([one, other]))
        one, other = one[shared:][::-1], other[shared:][::-1]
    return one, other


#: A line of a file like .env that python-dotenv reads alike: empty, a comment, or NAME=value.
PLAIN_LINE = re.compile(r"""\s*(?:#.*)?|\s*(\w+)=(?:'([^'\\$]*)'\s*|"([^"\\$]*)"\s*|([^'"#$]*))""")


def read_file(path: str) -> dict[str, str]:
    """The variables of a file like .env; none where there is no file. Raises SettingsError."""
    if not os.path.lexists(path):
        return {}
    text = text_of(path)
    try:
        from dotenv import dotenv_values  # noqa: PLC0415  worker.py must run without it
    except ImportError:
        lines = [PLAIN_LINE.fullmatch(line) for line in text.split("\n")]
        if None in lines:
            number = lines.index(None) + 1
            raise SettingsError(f"{path}: line {number} is read only where python-dotenv is installed") from None
        return {line[1]: line[2] or line[3] or (line[4] or "").strip() for line in lines if line and line[1]}
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text)).items()}


def environment() -> dict[str, str]:
    """The process's environment over the .env file of the working directory. Raises SettingsError."""
    return {**read_file(".env"), **os.environ}


def help_text(cls: type, usage: str) -> str:
    """`usage`, then every variable of `cls` with its default and what it is."""
    rows = [(f.name.upper(), f.metadata["default"], f.metadata["text"]) for f in dataclasses.fields(cls)]
    width = max(len(name) for name, _, _ in rows)
    shown = {None: "required", "": "empty"}
    lines = [f"  {name:{width}}  {text} ({shown.get(default, default)})" for name, default, text in rows]
    return usage + "\n\nSettings (environment or .env; default in brackets):\n" + "\n".join(lines) + "\n"


def open_secrets(cls: type, environ: Mapping[str, str]) -> list[str]:
    """The files with secrets of `cls` that every user of this host can read, each with its setting and what to do."""
    names = [field.name.upper() for field in dataclasses.fields(cls) if field.metadata["secret"]]
    files = {name: environ.get(name) for name in [*(f"{each}_FILE" for each in names), "TLS_KEY", "WORKER_TLS_KEY"]}
    if any(environ.get(name) and name not in os.environ for name in names):
        files[".env"] = ".env"
    found = ((name, path) for name, path in files.items() if path and is_open(path))
    return [f"{name}: every user of this host can read the secret in {path}; chmod 600 it" for name, path in found]


def is_open(path: str) -> bool:
    """Whether every user of this host can read the file: it says so itself, and so do the directories above it."""
    path = os.path.realpath(path)
    above = [path[:end] or "/" for end, letter in enumerate(path) if letter == "/"]
    try:
        can_enter = all(os.stat(each).st_mode & stat.S_IXOTH for each in above)
        return can_enter and bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:
        return False  # whoever reads it says what is wrong


#: Whether standard error goes to journald; a process that logs elsewhere inherits the variable too. systemd.exec(5)
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
    """A log line: a word, then key=value. A value that is more than one plain word is written as JSON."""
    texts = ((key, str(value)[:VALUE_CHARACTERS]) for key, value in fields.items() if value is not None)
    return " ".join([word] + [f"{k}={v if PLAIN.fullmatch(v) else json.dumps(v)}" for k, v in texts])


#: What needs no quotes (no letter beyond ASCII: some turn a line around, or cannot be seen), and what is logged of it.
PLAIN, VALUE_CHARACTERS = re.compile("[!#-<>-~]+"), 4000


def visible(text: str) -> str:
    """One line for a terminal or a build page: what cannot be printed is escaped, like \\x1b or \\u202e; tabs stay."""
    shown = (c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return text if text.isprintable() else "".join(shown)


def complain(text: str) -> None:
    """Say what is wrong before there is a log: on standard error, for journald with the priority of an error."""
    mark = "<3>" if IN_JOURNAL else ""
    sys.stderr.write("".join(f"{mark}{visible(line)}\n" for line in text.splitlines()))


def tell_systemd(text: str) -> None:
    """Tell systemd how it goes: "READY=1", "STATUS=3 ready". Without systemd nobody is told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
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
    except (SettingsError, OSError) as error:
        log.error(event("unreloaded", problem=error, now="the settings stay as they were"))
    else:
        level: str = fresh.log_level  # type: ignore[attr-defined]
        log.setLevel(level.upper())
        log.info(event("reloaded", log_level=level, needs_restart=needs_restart))
    tell_systemd("READY=1")


def read_again(settings: S, environ: Mapping[str, str]) -> S:
    """The secrets as they are now, and LOG_LEVEL from SETTINGS_FILE: nobody can change a process's environment."""
    level = read_file(settings.settings_file).get("LOG_LEVEL")  # type: ignore[attr-defined]
    fresh = read_settings(type(settings), {**environ, "LOG_LEVEL": level} if level else environ)
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    names = [field.name for field in fields if field.metadata["secret"] or field.name == "log_level"]
    return dataclasses.replace(settings, **{name: getattr(fresh, name) for name in names})  # type: ignore[type-var]


# (End of the text that both files share.)


# --- Worker settings ---

#: Defaults that are made up at start: the words that --help shows for them.
NAME_DEFAULT = "<host>-<instance>"
BUILDS_DEFAULT = "<WORKER_STATE>/builds"
#: What is hashed with the machine's id, so that nobody else's hash of it is the same. Source: machine-id(5)
MACHINE_KEY = b"agent stack for systemd"


def agent_endpoint(text: str) -> str:
    return http_url(text) if text else ""


def server_urls(text: str) -> tuple[str, ...]:
    return tuple(http_url(url.strip()) for url in text.split(","))


def tags(text: str) -> tuple[str, ...]:
    """The tags of a comma-separated list, each once, in their order."""
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a control character; write tags like arch=amd64,gpu=true")
    return tuple(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))


def rules(text: str) -> tuple[str, ...]:
    """Tags of which at most one names a queue."""
    queues = [tag for tag in tags(text) if is_queue(tag)]
    if len(queues) > 1 or "queue=" in queues:
        raise ValueError(f"{text!r} must name one queue; run a worker for each queue")
    for tag in queues:
        queue_key(tag.removeprefix("queue="))
    return tags(text)


def matching(pattern: str, hint: str, shown: bool = True) -> Callable[[str], str]:
    """A parser of texts that match; `hint` says what they look like. Secrets are not shown."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{repr(text) if shown else 'the text'} {hint}")
        return text

    return checked


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that reads "" as None: no limit."""
    return lambda text: parse(text) if text else None


def whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def told_size(count: float) -> str:
    """Bytes for people: "96.5 MiB"."""
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
    """A user of this host, for the agent to run as."""

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
        raise ValueError("only a worker that runs as root can start its agent as a user")
    groups = tuple(os.getgrouplist(name, found.pw_gid))
    return Account(name, found.pw_uid, found.pw_gid, groups, found.pw_dir, found.pw_shell)


#: Source: https://buildkite.com/docs/pipelines/clusters/manage-queues
queue_key = matching("[A-Za-z0-9_-]*", "is not a queue's key: Buildkite takes letters from A to z, digits, - and _")
#: Good as a file's name, a header and an agent's name. No %: Buildkite would expand what follows it.
slot_name = matching(
    NAME_DEFAULT + "|[A-Za-z0-9][A-Za-z0-9._:@+-]{0,99}",
    "is not a worker's name; use at most 100 of A-Z a-z 0-9 . _ : @ + -",
)
log_level = matching("debug|info|warning|error", "is not a level; it may be debug, info, warning or error")
host_name = matching("([A-Za-z0-9][A-Za-z0-9._-]{0,99})?", "is not a host's name; use at most 100 of A-Z a-z 0-9 . _ -")
token = matching("[!-~]*", "holds a space, or a character beyond ASCII: it cannot be a token", shown=False)


def first_token(text: str) -> str:
    """The first of several, comma-separated or one a line: while tokens are exchanged a file may hold two."""
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
    #: A variable that begins so is meant for us. Others share a .env: STACK_KEY, say, is the scheduler's.
    PREFIXES: ClassVar = ("WORKER_",)

    worker_api_server: tuple[str, ...] = setting(
        "http://localhost:18888", server_urls, "the scheduler; or several, comma-separated, that share a Redis"
    )
    worker_agent_query_rules: tuple[str, ...] = setting("queue=default", rules, "what it matches with")
    worker_tags: tuple[str, ...] = setting("", tags, "more tags for the agent, not used in matching")
    worker_queue: str = setting("", queue_key, "its queue; a queue= in the rules is then ignored")
    worker_poll_interval: float = setting(
        "2s", in_range(duration, "10ms", "30s"), "pause after a failed request; grows to 30s"
    )
    worker_wait: float = setting("30s", in_range(duration, "1s", "60s"), "how long one claim waits")
    worker_name: str = setting(NAME_DEFAULT, slot_name, "its id, and the agent's name; unique, stable")
    worker_host: str = setting("", host_name, "the machine that it is on; empty: the host's name")
    worker_state: str = setting("./state", os.path.abspath, "lock files, and what is known of the agent")
    buildkite_agent_path: str = setting("/usr/local/bin/buildkite-agent", str, "the agent, 3.99.0 or newer")
    buildkite_build_path: str = setting(BUILDS_DEFAULT, str, "where the agent checks out and builds")
    buildkite_agent_endpoint: str = setting("", agent_endpoint, "the agent's API; empty: the agent's own default")
    buildkite_agent_token: str = setting(
        "", token, "the cluster's agent token; empty: the scheduler gives a token with each job", secret=True
    )
    worker_job_tokens: bool = setting("0", flag, "1: a token with each job, whatever BUILDKITE_AGENT_TOKEN holds")
    stack_api_token: str = setting("", first_token, "what the scheduler asks of its workers", secret=True)
    worker_ca_file: str = setting("", str, "CA (PEM) of an https scheduler; empty: those of the system")
    worker_tls_cert: str = setting("", str, "certificate (PEM) for a scheduler that asks for one")
    worker_tls_key: str = setting("", str, "its key (PEM)")
    worker_agent_user: "Account | None" = setting("", optional(account), "the agent runs as this user; only as root")
    worker_stop_timeout: float = setting("25m", duration, "a stop waits so long for the job, then cancels it")
    worker_cancel_grace: "float | None" = setting(
        "", optional(in_range(duration, "1s", "24h")), "a cancelled job has so long to end; empty: the agent's own 10s"
    )
    worker_job_memory: "int | None" = setting("", optional(in_range(size, "64M", "999T")), "a job's memory, like 4G")
    worker_job_cpus: "float | None" = setting("", optional(in_range(number, "0.01", "9999")), "a job's CPUs, like 2.5")
    worker_job_tasks: "int | None" = setting("", optional(in_range(whole, "64", "4194304")), "a job's processes")
    worker_job_timeout: "float | None" = setting("", optional(duration), "a job is cancelled after this, like 2h")
    worker_min_free: int = setting(
        "1GiB", in_range(size, "0K", "999T"), "free space for builds; with less, no job is claimed"
    )
    worker_health_command: str = setting(
        "", one_line, "run by sh before a claim: exit 0 fit, 1 unfit, 3 unfit until an operator resumes it"
    )
    worker_health_interval: float = setting(
        "60s", in_range(duration, "1s", "24h"), "the health command runs at most once in this, while idle"
    )
    worker_max_jobs: int = setting("0", in_range(whole, "0", "999999999"), "it ends after so many jobs; 0: no limit")
    worker_idle_timeout: "float | None" = setting("", optional(duration), "it ends when idle for this, like 10m")
    worker_max_uptime: "float | None" = setting("", optional(duration), "it ends, between jobs, after this, like 12h")
    log_level: str = setting("info", log_level, "debug, info, warning or error")
    settings_file: str = setting(".env", str, "where SIGHUP finds LOG_LEVEL again")

    @property
    def job_tokens(self) -> bool:
        """Whether each job must come with a token of its own; the cluster's is then never used."""
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
        """What a claim matches with: the queue, then the other rules."""
        return ",".join([f"queue={self.queue}", *no_queue(self.worker_agent_query_rules)])

    @property
    def agent_tags(self) -> str:
        """The rules and the other tags without any queue=, which --queue would refuse beside it."""
        return ",".join(dict.fromkeys(no_queue(self.worker_agent_query_rules + self.worker_tags)))

    @property
    def is_temporary(self) -> bool:
        """Whether the worker ends by itself some day; then its going is no loss, and the scheduler is to forget it."""
        return bool(self.worker_max_jobs or self.worker_idle_timeout or self.worker_max_uptime)

    @property
    def builds(self) -> str:
        return os.path.abspath(self.buildkite_build_path.replace("<WORKER_STATE>", self.worker_state))

    @property
    def limits(self) -> dict[str, str]:
        """What a job's cgroup is given, by the name of its file. Source: the kernel's cgroup-v2.rst"""
        texts = {
            "memory.max": self.worker_job_memory and str(self.worker_job_memory),
            # Microseconds of CPU time in each tenth of a second.
            "cpu.max": self.worker_job_cpus and f"{self.worker_job_cpus * 100_000:.0f} 100000",
            "pids.max": self.worker_job_tasks and str(self.worker_job_tasks),
        }
        return {name: text for name, text in texts.items() if text}

    def public(self) -> dict[str, Any]:
        """Every setting but the secrets, for the log."""
        fields = [field.name for field in dataclasses.fields(self) if not field.metadata["secret"]]
        values = ((name, getattr(self, name)) for name in fields)
        texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in values}
        return {name: "" if text is None else text for name, text in texts.items()}


def is_in_clear(url: str) -> bool:
    """Whether a network can read what is said to this address: it is plain http, and beyond this machine."""
    found = re.match(f"http://({HOST})", url)
    return bool(found and not re.fullmatch(r"localhost|127(\.[0-9]+){3}|\[::1\]", found[1]))


def tls_context(settings: Settings) -> "ssl.SSLContext":
    """Made anew for each connection: files that were replaced count from the next one on. Raises SettingsError."""
    import ssl  # noqa: PLC0415  see the top

    ca, cert, key = settings.worker_ca_file, settings.worker_tls_cert, settings.worker_tls_key
    if bool(cert) != bool(key):
        raise SettingsError("WORKER_TLS_CERT, WORKER_TLS_KEY: both or neither")
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        raise SettingsError(f"WORKER_CA_FILE: {ca} is no CA: {error}") from None
    try:
        if cert:
            # The password: of a key that has one OpenSSL would ask the terminal.
            context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        told = f"{cert} and {key} are no certificate and its key: {error}"
        raise SettingsError(f"WORKER_TLS_CERT, WORKER_TLS_KEY: {told}") from None
    return context


def machine(path: str = "/etc/machine-id") -> str:
    """What tells this machine from others of its name: a hash of its id, which is a secret; "" where it has none."""
    try:
        found = read_text(path).strip()
    except OSError:
        return ""
    if not re.fullmatch("[0-9a-f]{32}", found):
        return ""  # "uninitialized", say
    return blake2s(found.encode(), key=MACHINE_KEY, digest_size=16).hexdigest()


def is_queue(tag: str) -> bool:
    return tag.startswith("queue=")


def no_queue(found: Iterable[str]) -> list[str]:
    return [tag for tag in found if not is_queue(tag)]


def ignored_queues(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """The queue= tags that somebody wrote and that have no effect."""
    written = tags(environ.get("WORKER_AGENT_QUERY_RULES", "")) + settings.worker_tags
    return [tag for tag in written if is_queue(tag) and tag != f"queue={settings.queue}"]


#: Options of an agent that its environment cannot set here, with what sets them instead.
REPLACED = {
    "BUILDKITE_AGENT_TAGS": "WORKER_AGENT_QUERY_RULES and WORKER_TAGS",
    "BUILDKITE_AGENT_QUEUE": "WORKER_QUEUE",
    "BUILDKITE_AGENT_NAME": "WORKER_NAME",
}


def idle_settings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What is set and does not count, with what counts instead."""
    names = [name for name in REPLACED if name in environ]
    told = [f"{name}: the agent is not given it; what counts is {REPLACED[name]}" for name in names]
    for name in ("BUILDKITE_AGENT_TOKEN", "STACK_API_TOKEN"):
        if environ.get(name, "").strip() not in ("", read_variable(name, True, environ)):
            told.append(f"{name}: the variable does not count beside {name}_FILE, or the credential of its name")
    if not any(url.startswith("https:") for url in settings.worker_api_server):
        names = [name for name in ("WORKER_CA_FILE", "WORKER_TLS_CERT", "WORKER_TLS_KEY") if environ.get(name)]
        told += [f"{name}: does not count: WORKER_API_SERVER is no https address" for name in names]
    if "SETTINGS_FILE" in environ and not os.path.exists(settings.settings_file):
        told.append(f"SETTINGS_FILE: {settings.settings_file} is not there: SIGHUP finds no LOG_LEVEL")
    return told


# --- Scheduler client ---


class SchedulerError(Exception):
    """A call without a useful answer; `status` is 0 when there was none at all, `code` "" when it was none of ours."""

    def __init__(self, message: str, status: int = 0, code: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def lost(self) -> bool:
        """Whether the scheduler knows this claim no longer: nothing can be said for it any more."""
        return self.status in (404, 409)

    @property
    def elsewhere(self) -> bool:
        """Whether another scheduler may do better."""
        return self.status == 0 or self.status >= 500

    @property
    def level(self) -> int:
        """A warning heals by itself; an error waits for a person (a wrong token or setting)."""
        return logging.ERROR if 400 <= self.status < 500 else logging.WARNING


class Impatient(Exception):
    """A proxy in front of the scheduler has ended a claim that was still to wait, after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"504 after {seconds:.1f} s")
        self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """What a claim answered, as far as a worker needs it."""

    uuid: str
    #: "" from a server that knows none, as the Go demo's: it has forgotten the job by now.
    claim: str
    queue_key: str
    lease_seconds: float
    #: Good for acquiring this job alone; "" where none was asked for.
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
            told = " and ".join(name + shown.get(name, "") for name in bad)
            raise SchedulerError(f"the scheduler's job has no usable {told}")
        return cls(**texts, lease_seconds=float(seconds))


#: What these texts of a job may be. All but the token are logged, and the uuid becomes part of a path.
JOB_TEXTS = {
    **dict.fromkeys(("uuid", "queue_key"), re.compile(r"\w[\w.:-]*", re.ASCII)),
    "claim": re.compile(r"(\w[\w.:-]*)?", re.ASCII),
    "token": re.compile("[!-~]*"),
}


class Scheduler:
    """One connection to a scheduler, kept open between calls and used by one thread.

    Of several it stays with the first; one that fails goes to the end of the line.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        session: str,
        api_token: Callable[[], str],
        signals: "Signals | None" = None,
    ) -> None:
        """`api_token` is asked for each call: the token may be replaced at any time. `signals`: for the main thread."""
        self.settings, self.api_token, self.signals = settings, api_token, signals
        self.urls = collections.deque(map(urlsplit, settings.worker_api_server))
        # Slots start at different ones: w1 at the first, say, w2 at the second.
        self.urls.rotate(-sum(name.encode()))
        self.headers = {"X-Worker-ID": name, "X-Worker-Session": session}
        self.headers |= {"X-Worker-Host": settings.host, "X-Worker-Machine": machine()}
        self.sock: socket.socket | None = None
        #: Seconds that one claim waits: WORKER_WAIT, or less where a proxy in front of the scheduler has no patience.
        self.wait = settings.worker_wait
        #: Asked again and again while a claim waits: whether it is to be given up.
        self.give_up: Callable[[], bool] | None = None

    def claim(self, query: str, wait: float, give_up: Callable[[], bool]) -> "Job | None":
        """The next job; None when there was none in time. When a stop comes first, or it is to be given up, the claim
        is closed: the scheduler then keeps the job, or takes it back.
        """
        path = f"/jobs?query={quote(query, safe='')}&wait={wait:g}" + "&token=1" * self.settings.job_tokens
        self.give_up = give_up
        try:
            data = self.ask("GET", path, seconds=wait + ANSWER_SECONDS, stops=1)
        except Stopped:
            return None
        except Impatient as proxy:
            told = f"a proxy at {self.url.netloc} answers {proxy}, where the scheduler would after {wait:g} s"
            self.wait = self.shorter_wait(proxy.seconds)
            now = f"claims wait {self.wait:g} s from now on; WORKER_WAIT, or the proxy's time-out, can be changed"
            log.warning(event("impatient", problem=told, now=now))
            return None
        finally:
            self.give_up = None
        return Job.from_api(data) if data else None

    def shorter_wait(self, seconds: float) -> float:
        """How long a claim waits at a proxy that gives up after so many seconds. Whole ones, as an operator has it."""
        return max(SHORTEST_WAIT, math.floor(0.8 * seconds))

    def tell(self, job: Job, verb: str, **fields: object) -> dict[str, Any]:
        """touch, release or complete. One stop does not end it: what is told here is what a stop waits for."""
        path = f"/jobs/{job.uuid}/{verb}"
        try:
            return self.ask("POST", path, {"claim": job.claim} | fields if job.claim else None) or {}
        except Stopped:
            raise SchedulerError(f"{verb} was given up: the worker is to stop now") from None
        except SchedulerError as error:
            # A server without claims answers nothing, or its own words.
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
        """The answer's object; None for 204. Else raises SchedulerError, or Impatient; or Stopped at that stop, or any
        later one.

        A scheduler that cannot serve (no answer, or 5xx) is left for the next one at once, till all have failed.
        """
        problem, stops = "", max(stops, self.signals.stops + 1 if self.signals else 0)
        for others in reversed(range(len(self.urls))):
            try:
                answer = self.ask_one(method, path, body, Patience(seconds, self.signals, stops, self.give_up))
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
        self, method: str, path: str, body: "Mapping[str, object] | None", patience: "Patience"
    ) -> "dict[str, Any] | None":
        """The same of one scheduler.

        A kept connection may have been closed meanwhile, so its failure is tried again on a new one at once.
        """
        for new in (self.sock is None, True):
            sent_at = time.monotonic()
            try:
                return self.exchange(self.request(method, path, body), patience)
            except Stopped:
                self.close()
                raise
            except SchedulerError as error:
                waited, wait = time.monotonic() - sent_at, patience.seconds - ANSWER_SECONDS
                # Later than the scheduler's own answer was due, it is no matter of patience.
                if error.status == 504 and not error.code and waited < wait and self.shorter_wait(waited) < wait:
                    raise Impatient(waited) from None
                raise
            except (OSError, ValueError, http.client.HTTPException, SettingsError) as error:
                self.close()
                # Up to Python 3.9 what a socket raises is no TimeoutError.
                if new or isinstance(error, (TimeoutError, socket.timeout)):
                    raise SchedulerError(f"{method} {path.partition('?')[0]}: no answer: {told_of(error)}") from None
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

    def exchange(self, request: bytes, patience: "Patience") -> "dict[str, Any] | None":
        sock = self.sock = self.sock or self.connect(patience)
        sock.settimeout(patience.left())
        sock.sendall(request)
        # What the response needs of a socket is `makefile`.
        with http.client.HTTPResponse(Incoming(sock, patience)) as response:  # type: ignore[arg-type]
            response.begin()
            body = response.read(ANSWER_BYTES)
            if response.will_close or not response.isclosed():
                self.close()
            return decode(response, body)

    def connect(self, patience: "Patience") -> socket.socket:
        host, secure = self.url.hostname or "", self.url.scheme == "https"
        address, ends_at = (host, self.url.port or (443 if secure else 80)), time.monotonic() + CONNECTED_SECONDS

        def reach() -> socket.socket:
            return socket.create_connection(address, CONNECT_SECONDS)

        # A thread costs a quarter of a megabyte, and for these no name server is asked.
        sock = reach() if LITERAL.fullmatch(host) else Connecting(reach).result(patience, ends_at)
        if not secure:
            return sock
        try:
            return shake_hands(tls_context(self.settings), sock, host, patience, ends_at)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        if self.sock:
            self.sock.close()
        self.sock = None


#: OpenSSL's X509_V_ERR_ codes of what RFC 5280 forbids. Python looks for it from 3.13 on, whoever trusted such a
#: certificate before. Source: openssl/x509_vfy.h
NOT_RFC_5280 = range(80, 94)
#: What makes the certificate of a CA anew, as the README has it.
CA_ANEW = (
    "openssl req -x509 -key ca.key -days 3650 -subj /CN=stack-ca"
    " -addext keyUsage=critical,keyCertSign,cRLSign -out ca.crt"
)


def told_of(error: Exception) -> str:
    """An error in words, with the setting that it may be about."""
    text = str(error) or type(error).__name__
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended within it"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return f"what came is no HTTP: {text[:100]}"
    if "ssl" not in sys.modules:
        return text
    import ssl  # noqa: PLC0415  see the top

    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in NOT_RFC_5280:
        return (
            f"{text}; Python 3.13 and newer refuses such a certificate. Make it anew, a CA's (WORKER_CA_FILE) with its "
            f"key and subject, so that what it has signed stays good: {CA_ANEW}"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; WORKER_CA_FILE names who vouches for the scheduler"
    if isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in text.upper():
        return f"{text}; the scheduler wants a certificate of ours: WORKER_TLS_CERT"
    return text


class Stopped(Exception):
    """A call was given up, because the worker was told to stop, or is not to claim any more."""


class Patience:
    """What one call has: its time, however little of an answer comes at once; and an ear for signals meanwhile."""

    def __init__(
        self, seconds: float, signals: "Signals | None", stops: int, give_up: "Callable[[], bool] | None" = None
    ) -> None:
        self.seconds, self.ends_at = seconds, time.monotonic() + seconds
        self.signals, self.stops, self.give_up = signals, stops, give_up
        #: Something of the answer is here: a stop only shortens the wait for the rest.
        self.has_begun = False

    def left(self) -> float:
        """Seconds that are left; TimeoutError when there are none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"none within {self.seconds:g} s")
        return left

    def wait(self, file: Any, connected_by: float = math.inf) -> None:
        """Wait until it can be read. Raises Stopped, or TimeoutError at the end, or when `connected_by` is over."""
        while True:
            left = min(self.left(), connected_by - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"no connection within {CONNECTED_SECONDS:g} s")
            left = min(left, LOOK_SECONDS) if self.give_up else left
            ready = self.signals.wait([file], left) if self.signals else select.select([file], [], [], left)[0]
            if self.give_up and not ready and not self.has_begun and self.give_up():
                raise Stopped
            # Also when a byte came with it: of an answer that trickles in, one always has.
            if self.signals and self.signals.stops >= self.stops:
                if not self.has_begun and file not in ready:
                    raise Stopped
                self.ends_at, self.stops = min(self.ends_at, time.monotonic() + REST_SECONDS), sys.maxsize
            if file in ready:
                return


class Connecting:
    """A connection that is being made, on a thread of its own: a name's look-up has no deadline and hears no signal."""

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

    def result(self, patience: Patience, ends_at: float) -> socket.socket:
        """The connection. It is left behind, and closed when it is made after all, once nobody waits any more."""
        try:
            patience.wait(self.near, ends_at)
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


#: Hosts that no name server is asked for.
LITERAL = re.compile(r"localhost|[0-9.]+|.*:.*")


def shake_hands(
    context: "ssl.SSLContext", sock: socket.socket, host: str, patience: Patience, ends_at: float
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
                patience.wait(secure, ends_at)
    except BaseException:
        secure.close()
        raise


class Incoming(io.RawIOBase):
    """What a scheduler sends, as far as somebody has the patience to wait for it."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self.sock, self.patience = sock, patience
        sock.setblocking(False)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.patience.left():
            try:
                count = self.sock.recv_into(buffer)
            except OSError as error:
                # What makes a TLS socket readable may be no answer at all: then it raises ssl.SSLWantReadError.
                if not isinstance(error, BlockingIOError) and type(error).__name__ != "SSLWantReadError":
                    raise
                self.patience.wait(self.sock)
                continue
            self.patience.has_begun = True
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
    told = data if isinstance(data, dict) else not_ours
    after = response.headers.get("Retry-After", "")
    code, message = str(told.get("error", "")), str(told.get("message", ""))
    text = f"{response.status} {code}".rstrip() + f": {message}"
    pause = float(after) if after.isdecimal() else 0.0
    if response.status == 401:
        # Only a person can mend that.
        text, pause = f"{text}; set STACK_API_TOKEN of this worker to a token that the scheduler takes", LONGEST_PAUSE
    raise SchedulerError(text, response.status, code, pause)


class Trouble:
    """Something that fails again and again: how long to pause, and when to say so once more."""

    def __init__(self, what: str, first_pause: float, longest: float = LONGEST_PAUSE, **fields: object) -> None:
        self.what, self.fields = what, fields
        self.first_pause, self.longest = first_pause, longest
        self.times, self.told = 0, ""

    def again(self, problem: str, level: int = logging.WARNING, at_least: float = 0.0) -> float:
        """Note one more failure; seconds to pause. Jitter keeps many workers from coming back as one."""
        pause = min(self.longest, self.first_pause * 2.0 ** min(self.times, 16)) * random.uniform(0.7, 1)
        pause = max(pause, min(at_least, LONGEST_PAUSE))
        self.times += 1
        if problem != self.told or self.times % REPEATS_PER_LINE == 0:
            more = {"problem": problem, "times": self.times, "pause_s": f"{pause:.1f}"}
            log.log(level, event("retrying", what=self.what, **self.fields, **more))
        self.told = problem
        return pause

    def over(self) -> None:
        if self.times:
            log.info(event("recovered", what=self.what, **self.fields, times=self.times))
        self.times, self.told = 0, ""


# --- Signals ---


class Signals:
    """Everything that wakes the main thread, as bytes in one pipe: signals, and touches that heard something.

    The handlers do nothing: Python itself writes a signal's number into the pipe, where `wait` finds it.
    """

    def __init__(self) -> None:
        #: 0: go on. 1: claim no more and let the agent end. 2 and more: the agent cancels its job.
        self.stops = 0
        #: When (monotonic) the first stop came.
        self.stopped_at = math.inf
        #: What SIGHUP does, and how often it came.
        self.reload: Callable[[], None] = lambda: None
        self.reloads = 0
        #: The child that is waited for elsewhere; 0: none.
        self.child = 0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def wake(self) -> None:
        """From any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")

    def wait(self, files: list[Any], seconds: float) -> list[Any]:
        """Those of `files` that can be read, after `seconds` at the latest; a signal ends the wait."""
        ready, _, _ = select.select([self.reader, *files], [], [], seconds)
        for byte in os.read(self.reader, 4096) if self.reader in ready else b"":
            self.note(byte)
        return ready

    def note(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reloads += 1
            self.reload()
        if number == signal.SIGCHLD:
            self.bury()
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            self.stopped_at = min(self.stopped_at, time.monotonic())
            self.stops += 2 if number == signal.SIGQUIT else 1
            tell_systemd("STOPPING=1")
            log.info(event("stopping", signal=signal.Signals(number).name, now=self.stops > 1 or None))

    def bury(self) -> None:
        """As process 1 of a container: wait for what builds left to us, else it stays as a zombie. Not for `child`."""
        with contextlib.suppress(ChildProcessError):
            while os.getpid() == 1:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid == self.child:
                    return  # the child's turn comes first
                os.waitpid(ended.si_pid, 0)

    def stopped(self) -> bool:
        """Whether a stop has come, up to this moment."""
        self.wait([], 0)
        return self.stops > 0

    def pause(self, seconds: float, stops: int = 1) -> None:
        """Sleep, until so many stops have come, or new settings, with which it is worth another try."""
        until, reloads = time.monotonic() + seconds, self.reloads
        while seconds > 0 and self.stops < stops and self.reloads == reloads:
            self.wait([], seconds)
            seconds = until - time.monotonic()


# --- Slot ---


class SlotTaken(Exception):
    """Another worker of this host has the name."""


class Slot:
    """One worker's place on this host: a name held by a lock, the record of its agent, and its FIFO."""

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
        """The FIFO, for reading and writing: who holds it so is its own reader, and never gets SIGPIPE."""
        with contextlib.suppress(FileExistsError):
            os.mkfifo(f"{self.path}.out", 0o600)
        fifo = os.open(f"{self.path}.out", os.O_RDWR | flags)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                fcntl.fcntl(fifo, F_SETPIPE_SZ, FIFO_BYTES)
        return fifo

    def record(self, agent: "Agent") -> None:
        """Write down which process the agent is, and its claim; raises OSError when the disk does not let us."""
        told = {"pid": agent.pid, "started": agent.started, "job": agent.job.uuid}
        told |= {"claim": agent.job.claim, "lease_seconds": agent.job.lease_seconds}
        # Who knows the claim can end it.
        new = os.open(f"{self.path}.agent.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(new, "w", encoding="utf-8") as file:
            json.dump(told, file)
        os.replace(f"{self.path}.agent.new", f"{self.path}.agent")

    def forget(self) -> None:
        try:
            os.unlink(f"{self.path}.agent")
        except FileNotFoundError:
            pass
        except OSError as error:
            # Harmless: the record names a process that is no more.
            log.warning(event("unforgotten", problem=error))

    def recorded(self) -> "Agent | None":
        """The agent that an earlier worker of this slot left running."""
        try:
            with open(f"{self.path}.agent", encoding="utf-8") as file:
                data = json.load(file)
            # An older worker wrote no claim.
            told = {"uuid": data["job"], "claim": data.get("claim", ""), "lease_seconds": data.get("lease_seconds", 1)}
            agent = Agent(int(data["pid"]), str(data["started"]), Job.from_api({"queue_key": "none", **told}))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SchedulerError) as error:
            problem = error if isinstance(error, OSError) else "it is no record of an agent"
            log.warning(event("unreadable", path=f"{self.path}.agent", problem=problem, now="no agent is waited for"))
            return None
        return None if agent.exited() else agent


def take_slot(settings: Settings) -> Slot:
    """The slot of WORKER_NAME, or the first free one of this host. Raises OSError when WORKER_STATE cannot be used."""
    if settings.worker_agent_user:
        refuse_detours(settings.worker_state)
    if settings.worker_name != NAME_DEFAULT:
        return Slot(settings.worker_state, settings.worker_name)
    for number in itertools.count(1):
        with contextlib.suppress(SlotTaken):
            return Slot(settings.worker_state, f"{settings.host}-{number}")
    raise AssertionError("there is always a next number")


# --- Cgroup ---


class Cgroup:
    """The cgroup that systemd gave to our unit (Delegate=yes): the worker moves to one below it, each job gets another.

    A process may leave its parent, its session and its process group, but not its cgroup.
    """

    def __init__(self, path: str, limits: Mapping[str, str]) -> None:
        """Raises OSError when jobs cannot be confined here, or the limits not be set."""
        self.path, self.limits = path, limits
        os.makedirs(f"{path}/worker", exist_ok=True)
        os.stat(f"{path}/worker/cgroup.kill")  # what ends a job's cgroup is there since Linux 5.14
        # The kernel gives controllers only to cgroups below one that has no processes of its own.
        for pid in read_text(f"{path}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                write_text(f"{path}/worker/cgroup.procs", pid)
        self.control(limits)

    def control(self, limits: Iterable[str]) -> None:
        """See to it that these limits can be set in what is below; raises OSError when that cannot be."""
        controllers = sorted({name.partition(".")[0] for name in limits})
        if controllers:
            write_text(f"{self.path}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))

    def of(self, job: str) -> str:
        return f"{self.path}/job-{job}"

    def enter(self, job: str, pid: int, limits: "Mapping[str, str] | None" = None) -> None:
        """Put the process, and all that it will start, into the job's cgroup; raises OSError, and leaves none then.

        `limits`: its own, in place of those of jobs.
        """
        limits = self.limits if limits is None else limits
        os.makedirs(self.of(job), exist_ok=True)
        try:
            for name, text in limits.items():
                write_text(f"{self.of(job)}/{name}", text)
            if "memory.max" in limits:
                # What is over the limit would fill the host's swap. A kernel without swap has no such file.
                with contextlib.suppress(FileNotFoundError):
                    write_text(f"{self.of(job)}/memory.swap.max", "0")
            write_text(f"{self.of(job)}/cgroup.procs", str(pid))
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(self.of(job))
            raise

    def end(self, job: str) -> list[str]:
        """End all that is left of the job, and say what it was; raises OSError when something cannot be ended."""
        left = processes(pids(self.of(job)))
        deadline = time.monotonic() + KILL_SECONDS
        while "populated 1" in read_text(f"{self.of(job)}/cgroup.events"):
            write_text(f"{self.of(job)}/cgroup.kill", "1")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{KILL_SECONDS:g} s after SIGKILL there is still: {first_few(left, ', ')}")
            time.sleep(0.01)
        for directory, _, _ in os.walk(self.of(job), topdown=False):
            os.rmdir(directory)
        return left

    def left(self) -> list[str]:
        """The jobs that still have a cgroup here: of earlier workers."""
        return [name.removeprefix("job-") for name in os.listdir(self.path) if name.startswith("job-")]


def delegated_cgroup(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> "str | None":
    """The directory of the cgroup that systemd delegated to us; None with cgroup v1, or without a delegation.

    That we could write there would not be enough: root can in every cgroup, and most belong to systemd.
    """
    if not os.path.exists(own):
        return None
    found = re.search(r"^0::(/.*)$", read_text(own), re.MULTILINE)
    path = root + found[1].rstrip("/") if found else ""
    # With DelegateSubgroup= we start one below the cgroup that is ours.
    for each in (path, os.path.dirname(path)):
        if found and any(is_delegated(each, name) for name in ("user.delegate", "trusted.delegate")):
            return each
    return None


def is_delegated(path: str, attribute: str) -> bool:
    """Source: https://systemd.io/CGROUP_DELEGATION/"""
    try:
        return os.getxattr(path, attribute) == b"1"
    except OSError:
        return False


def pids(cgroup: str) -> list[int]:
    """Every process in it, and in those that a job has made below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):  # gone meanwhile
            found += map(int, read_text(f"{directory}/cgroup.procs").split())
    return found


def processes(found: list[int]) -> list[str]:
    """Processes for the log: "4711 sleep 600". Of many, the first with their commands: there may be thousands."""
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
    """For the files of a cgroup, which are there already."""
    with open(os.open(path, os.O_WRONLY), "w", encoding="utf-8") as file:
        file.write(text)


# --- Agent ---

#: What the agent must not inherit. The worker's own, and what systemd gave to the worker alone:
WORKERS_OWN = re.compile(
    r"STACK_.*|WORKER_.*|LOG_LEVEL|SETTINGS_FILE|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET|LISTEN_.*"
    r"|WATCHDOG_(PID|USEC)|JOURNAL_STREAM|INVOCATION_ID|SYSTEMD_EXEC_PID|MEMORY_PRESSURE_.*|FDSTORE"
    r"|(STATE|RUNTIME|CACHE|LOGS|CONFIGURATION)_DIRECTORY"
    # secrets of a scheduler that shares the environment
    r"|(WEBHOOK_TOKEN|REDIS_ADDR|OPERATOR_TOKEN|VIEWER_TOKEN|BUILDKITE_API_TOKEN)(_FILE)?"
    # token and endpoint, set afresh below; options that --queue and --spawn refuse beside them, or that our
    # arguments replace; options that change what an exit status means, or end the agent before its job.
    r"|BUILDKITE_AGENT_(TOKEN|TOKEN_FILE|ENDPOINT|ACQUIRE_JOB|QUEUE|TAGS|NAME|SPAWN|SPAWN_PER_CPU)"
    r"|BUILDKITE_AGENT_(REFLECT_EXIT_STATUS|DISCONNECT_AFTER_(JOB|UPTIME|IDLE_TIMEOUT))"
)
#: Waits for a line, then becomes the agent. The worker writes it when it has recorded the process; when it dies
#: before, the line never comes. So an agent lives unrecorded only where the disk takes no record.
GATE = ["/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "gate"]
#: What the agent reads, in this order, beside itself, in its user's home, and here. Source: the agent's agent_start.go
AGENT_CONFIG = "buildkite-agent.cfg"
AGENT_CONFIGS = (f"/usr/local/etc/buildkite-agent/{AGENT_CONFIG}", f"/etc/buildkite-agent/{AGENT_CONFIG}")
#: More links on the way to a file than Linux follows itself.
MOST_LINKS = 40
#: What the agent exits with when Buildkite did not give it the job: an accident of timing.
EXIT_REJECTED = 27
#: What a shell exits with when it cannot become the program. The agent itself has no such status.
NOT_STARTED = (126, 127)
#: Terminal control sequences, and any other control character but the tab.
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[P\]_^X][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def agent_arguments(settings: Settings, name: str, job: Job) -> list[str]:
    """Flags that v3 and v4 share. No secrets: everyone on the host can read them."""
    queue = [] if job.queue_key == "_default" else ["--queue", job.queue_key]
    more = ["--tags", settings.agent_tags] if settings.agent_tags else []
    start = [settings.buildkite_agent_path, "start", "--acquire-job", job.uuid, "--spawn", "1"]
    return [*start, *queue, *more, "--name", name]


def agent_environment(settings: Settings, environ: Mapping[str, str], token: str) -> dict[str, str]:
    """The worker's environment less the worker's own, and the token. A job inherits nearly all of it, not the token."""
    kept = {name: text for name, text in environ.items() if not WORKERS_OWN.fullmatch(name)}
    if settings.worker_cancel_grace:
        # Of v3 in whole seconds, of v4. The other one of v3 must be shorter, as it is by default.
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
    # An agent that acquires one job has nothing to stream; trying to costs it 0.2 s a job (measured).
    kept.setdefault("BUILDKITE_AGENT_PING_MODE", "poll-only")
    return kept


def identity(settings: Settings) -> dict[str, Any]:
    """Whom the agent runs as, and where: arguments of Popen."""
    user = settings.worker_agent_user
    if not user:
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": user.groups, "cwd": user.home}


def as_agent(settings: Settings, *command: str) -> bool:
    """Whether the command, run as the agent's user, succeeded; raises OSError when it cannot be run so."""
    here = identity(settings) | {"cwd": "/", "env": {"PATH": os.defpath}}
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False, **here).returncode == 0


def make_builds(settings: Settings) -> None:
    """Make the directory that the agent builds in: as its user, and only where that may not, as root."""
    user, path = settings.worker_agent_user, settings.builds
    if not user or os.path.exists(path) or as_agent(settings, "mkdir", "-p", "--", path):
        return
    refuse_detours(os.path.dirname(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # It gets its name when it is complete: other workers may be at it, and any of them may be killed.
    new = f"{path}.{os.urandom(8).hex()}"
    os.mkdir(new)
    os.chown(new, user.uid, user.gid, follow_symlinks=False)
    try:
        os.rename(new, path)
    except OSError:
        os.rmdir(new)
        if not os.path.exists(path):
            raise


def refuse_detours(path: str) -> None:
    """Raise PermissionError unless root alone decides where `path` leads: what root writes there, it writes there."""
    where = detour(path)
    if where:
        told = f"others than root can write {where}, and could make root write elsewhere; give that to root alone"
        raise PermissionError(errno.EPERM, f"{told}, or make another directory and name it")


def detour(path: str) -> str:
    """The first place on the way to `path`, or itself, that others than root can write: there may be, or come to be, a
    link of theirs. "" when there is none. What is still missing is made by root, and counts as root's.
    """
    here, names, links = "/", path.split("/")[::-1], 0
    while names:
        step = os.path.normpath(os.path.join(here, names.pop()))
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            break
        parent = os.lstat(here)
        # Where the sticky bit is set, as in /tmp, nobody exchanges what is root's.
        is_kept = parent.st_uid == 0 and parent.st_mode & stat.S_ISVTX and found.st_uid == 0
        if is_others(parent) and not is_kept:
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
    return here if is_others(os.lstat(here)) else ""


def is_others(found: os.stat_result) -> bool:
    """Whether others than root can write the file or directory. An ACL that lets them shows in the group's bits."""
    return found.st_uid != 0 or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def agent_config(settings: Settings) -> tuple[str, list[str]]:
    """The configuration file for an agent that runs as a user: where it would look itself, the first that root alone
    can write, else an empty one. And those that were passed over: there a build could have left what breaks, or
    redirects, every agent after it. Never its user's own.
    """
    beside = os.path.join(os.path.dirname(os.path.realpath(settings.buildkite_agent_path)), AGENT_CONFIG)
    found = [path for path in (beside, *AGENT_CONFIGS) if os.path.exists(path)]
    good = [path for path in found if not detour(path)]
    return (good or ["/dev/null"])[0], [path for path in found if path not in good]


def agent_version(settings: Settings) -> str:
    """What the agent's binary says it is; raises ValueError when it cannot be used."""
    path = settings.buildkite_agent_path
    environ = agent_environment(settings, os.environ, "")
    try:
        # A session of its own: Ctrl-C is not for it, and one that hangs is ended with all that it has started.
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
        raise ValueError(f"{path} --version ended with {asked.returncode} and said {said[:200]!r}")
    if tuple(map(int, found.groups())) < OLDEST_AGENT:
        oldest = ".".join(map(str, OLDEST_AGENT))
        raise ValueError(f"{path} has {found[0]}; exit statuses of agents before {oldest} cannot be trusted")
    return found[0].removeprefix("version ")


def supported_until(version: str) -> str:
    """The day from which on Buildkite does not support this agent, like 2027-09-03; "" when that is not known."""
    line = tuple(map(int, version.split(".")[:2]))
    if line > max(RELEASED):
        return ""
    released = [RELEASED[known] for known in sorted(RELEASED) if known <= line]
    if not released:
        return FIRST_END
    year, day = released[-1][:4], released[-1][4:]
    return max(f"{int(year) + 1}{day}", FIRST_END)


def outdated(version: str, now: float) -> str:
    """What to say of an agent whose support is over, or soon will be; else "". `now`: Unix seconds."""
    until = supported_until(version)
    today, soon = (time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (now, now + SUPPORT_SECONDS))
    if not until or soon < until:
        return ""
    how = "has not supported it since" if today >= until else "supports it only until"
    return f"Buildkite {how} {until}: install a newer buildkite-agent"


def start_time(pid: int) -> str:
    """When the process started: with the pid it names one process. "" when it is gone."""
    if sys.platform != "linux":
        done = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], env={"LC_ALL": "C", "PATH": os.defpath},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip()
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            # Fields 3 (state) and on: the second, the name in brackets, may hold anything.
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
        #: When the scheduler's stop was passed on; what else was sent, so that it is sent once.
        self.stopped_at: float | None = None
        self.killed = self.cancelled = False
        self.recorded = child is None
        #: Readable when the process ends. For a child there is none: SIGCHLD tells.
        self.ends: list[int] = []

    def exited(self) -> bool:
        if self.child:
            return self.child.poll() is not None
        # One that ended while its start was being written down has no start time.
        return not self.started or start_time(self.pid) != self.started

    @property
    def exit_status(self) -> "int | None":
        """As a shell has it: 128 + n when signal n ended it. None unless it was our child."""
        code = self.child.returncode if self.child else None
        return 128 - code if code is not None and code < 0 else code

    def send(self, number: signal.Signals, why: str) -> None:
        log.warning(event("signalled", job=self.job.uuid, pid=self.pid, signal=number.name, why=why))
        with contextlib.suppress(ProcessLookupError):
            if not self.exited():
                os.kill(self.pid, number)


def end_group(agent: Agent) -> list[str]:
    """End what is left of the process group of an agent that has just exited, and say so.

    Not of one that was no child of ours: its number may have become somebody else's.
    """
    if not agent.child:
        return []
    try:
        os.killpg(agent.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return []
    return [f"the process group {agent.pid}"]


class Output:
    """What the agent writes, line by line from the FIFO to our log, marked with the job."""

    def __init__(self, fifo: int) -> None:
        self.fifo = fifo
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        #: What must not reach the log; also what was replaced since: a running agent has what it was started with.
        self.secrets: set[str] = set()
        #: `rest` is the beginning of a line, of which the end is still to come.
        self.job, self.token, self.rest, self.last_words = "", "", "", ""

    def begin(self, job: str, token: str) -> None:
        """From here on the lines are this job's; what was still to be read belongs to the one before."""
        self.drain()
        self.job, self.token, self.last_words = job, token, ""

    def read(self) -> bool:
        """Log what can be read now, up to one buffer; False when there was nothing."""
        try:
            data = os.read(self.fifo, 65536)
        except BlockingIOError:
            return False
        *lines, self.rest = (self.rest + self.decoder.decode(data)).split("\n")
        for line in lines:
            self.say(self.cleaned(line))
        if len(self.rest) >= LINE_CHARACTERS:
            self.say_most()
        return True

    def say_most(self) -> None:
        """Log an overlong line's beginning. The end of that waits: it may be the beginning of a secret."""
        text = self.cleaned(self.rest)
        held = max(map(len, self.all_secrets()), default=1) - 1
        cut = max(0, len(text) - held)
        self.say(text[:cut])
        self.rest = text[cut:]

    def read_all(self, most: int) -> bool:
        """Log all that can be read now, up to so many buffers; True when that was all."""
        for _ in range(most):
            if not self.read():
                return True
        return False

    def drain(self) -> None:
        """Log all that is left. Bounded: what an agent left in the background may write for ever."""
        if self.read_all(2 * FIFO_BYTES // 65536):
            self.say(self.cleaned(self.rest + self.decoder.decode(b"", final=True)))
            self.rest = ""

    def all_secrets(self) -> list[str]:
        return sorted(filter(None, [*self.secrets, self.token]), key=len, reverse=True)

    def cleaned(self, line: str) -> str:
        """Without control characters and secrets: to be called before it is cut, which would hide half of one."""
        text = CONTROL.sub("", line)
        for secret in self.all_secrets():
            text = text.replace(secret, "[REDACTED]")
        return text

    def say(self, text: str) -> None:
        for start in range(0, len(text), LINE_CHARACTERS):
            piece = text[start : start + LINE_CHARACTERS].rstrip()
            if piece:
                self.last_words = f"{self.last_words}{piece}\n"[-LAST_WORDS:]
                log.info(event("output", job=self.job, text=piece))


# --- Health ---

#: What the health command says by its exit status; anything else is not known.
FIT, UNFIT, HELD = 0, 1, 3


class Verdict(NamedTuple):
    """What the health command has said of this host."""

    #: FIT, UNFIT, HELD; another status, or None, is not known.
    status: "int | None"
    reason: str
    #: When it was started: monotonic, a clock that all processes share until the host is booted again.
    began_at: float
    #: Which run it was: an operator who resumes a worker resumes it from that run.
    run: str


def no_space(settings: Settings) -> str:
    """Why builds have no space; "" when they have."""
    builds, least = settings.builds, settings.worker_min_free
    try:
        found = os.statvfs(nearest(builds))
    except OSError as error:
        return f"{builds} cannot be looked at: {error}"
    if found.f_flag & os.ST_RDONLY:
        return f"{builds} is on a file system that cannot be written now"
    free = found.f_bavail * found.f_frsize
    if free < least:
        return f"{builds} has {told_size(free)} free, less than WORKER_MIN_FREE ({told_size(least)})"
    # Some file systems make inodes as they need them, and tell of none.
    if found.f_favail * FREE_INODES < found.f_files:
        return f"{builds} has {found.f_favail} of {found.f_files} inodes free, less than 1 %"
    return ""


def free_space(settings: Settings) -> "int | None":
    """Bytes that builds can still use; None where nobody can tell."""
    try:
        found = os.statvfs(nearest(settings.builds))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def no_memory(path: str = "/proc/meminfo") -> str:
    """Why a job would have no memory; "" when it has, or nobody can tell."""
    try:
        found = dict(re.findall(r"^(\w+): +(\d+) kB", read_text(path), re.MULTILINE))
        total, free = int(found["MemTotal"]), int(found["MemAvailable"])
    except (OSError, KeyError):
        return ""
    if free < FREE_MEMORY * total:
        return f"{told_size(1024.0 * free)} of {told_size(1024.0 * total)} memory is available, less than 5 %"
    return ""


def no_file(settings: Settings) -> str:
    """What of the files that each job needs is not there, or cannot be used; "" when all is well."""
    if not can_write(settings.worker_state):
        return f"WORKER_STATE: {settings.worker_state} cannot be written by this user"
    agent = settings.buildkite_agent_path
    return "" if os.access(agent, os.X_OK) else f"{agent} is not there, or cannot be executed"


def owners(path: str) -> list[tuple[int, ...]]:
    """Of the path and what is above it, what says who may write there, all but ACLs."""
    found: list[tuple[int, ...]] = []
    while path:
        with contextlib.suppress(OSError):
            each = os.stat(path)
            found.append((each.st_dev, each.st_ino, each.st_mode, each.st_uid, each.st_gid))
        path = os.path.dirname(path).rstrip("/")
    return found


class Health:
    """Whether this host is fit to run a job. Only what is not running yet is ever kept from running.

    What costs nothing is looked at each time. The health command's answer is kept, and shared by the slots of this
    host that run it alike: it runs under a lock that all of them have, so never twice at once.
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
        #: The last answer; it is asked again from `look_at` on (monotonic).
        self.verdict = self.kept()
        self.look_at = 0.0
        #: Answers of runs that began before this (monotonic) do not count: they tell nothing of what was since.
        self.needed_since = time.monotonic()
        #: What it runs for, until it has said "fit": "start", "after_failure"; "": nothing special.
        self.purpose = "start"
        #: Jobs that agents ran since the start, and until the command's last run.
        self.jobs = self.jobs_seen = 0
        #: The run from which an operator has resumed this worker, as the scheduler has told.
        self.resumed = ""
        #: A run that could not be ended: until it is gone there is no other.
        self.stuck: subprocess.Popen[bytes] | None = None
        self.failures = 0
        self.is_low = False
        #: How it was on the way to the builds when the agent's user could last write them, and until when (monotonic)
        #: that counts.
        self.way_to_builds: list[tuple[int, ...]] = []
        self.way_known_until = 0.0

    def unfit(self) -> str:
        """Why no job may be started here now, as far as a look tells, which costs next to nothing; "" when one may."""
        self.warn_when_low()
        return no_space(self.settings) or no_memory() or no_file(self.settings) or self.no_way_to_builds()

    def no_way_to_builds(self) -> str:
        """Why the agent's user cannot build; "" when it can. To ask as that user takes a process: that is done only
        when something has changed, and now and then.
        """
        is_known = self.settings.worker_agent_user and time.monotonic() < self.way_known_until
        if is_known and owners(self.settings.builds) == self.way_to_builds:
            return ""
        try:
            make_builds(self.settings)  # somebody may have taken them away
        except OSError as error:
            return f"BUILDKITE_BUILD_PATH: {self.settings.builds} cannot be used: {error}"
        self.way_to_builds = owners(self.settings.builds)
        why = problem_of_builds(self.settings)
        self.way_known_until = 0.0 if why else time.monotonic() + WAY_SECONDS
        return why

    def warn_when_low(self) -> None:
        """Say once that space gets low, before no job is claimed any more."""
        least, free = self.settings.worker_min_free, free_space(self.settings)
        is_low = free is not None and free < 2 * least
        if free is not None and is_low and not self.is_low:
            now = f"below {told_size(least)} (WORKER_MIN_FREE) no job is claimed"
            log.warning(event("low", path=self.settings.builds, free=told_size(free), now=now))
        self.is_low = is_low

    # -- the health command

    def why(self) -> str:
        """Why no job may be started here, by the command's last answer; "" when it said fit, or there is none."""
        return self.verdict.reason if self.verdict and self.settings.worker_health_command else ""

    @property
    def held(self) -> str:
        """The run that said that a person must look at this host; "" for none."""
        return self.verdict.run if self.verdict and self.verdict.status == HELD else ""

    def is_due(self) -> bool:
        """Whether the command is to be run, or its answer to another slot to be read, before the next claim."""
        if not self.settings.worker_health_command:
            return False
        if self.held and self.held == self.resumed:
            log.warning(event("resumed", run=self.held, now="the health command runs again"))
            self.verdict, self.look_at, self.needed_since = None, 0.0, time.monotonic()
            self.keep()
        return not self.held and time.monotonic() >= self.look_at

    def suspect(self) -> None:
        """Something went wrong that may be the host's fault: the command runs before the next claim."""
        self.purpose, self.look_at, self.needed_since = self.purpose or "after_failure", 0.0, time.monotonic()

    def ask(self) -> None:
        """Get an answer: another slot's, if it is good, else one of our own. It takes as long as the command does."""
        path = f"{self.settings.worker_state}/health.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self.take(Verdict(None, f"{path} cannot be used: {error.strerror}", time.monotonic(), ""))
            return
        try:
            if self.is_locked(lock):
                self.take(self.shared() or self.own())
            elif not self.signals.stops:
                why = f"the health commands of other slots had no end within {HEALTH_SECONDS + KILL_SECONDS:g} s"
                self.take(Verdict(None, why, time.monotonic(), ""))
        finally:
            os.close(lock)

    def is_locked(self, lock: int) -> bool:
        """Take the lock; False when a stop comes first, or whoever has it should have ended long ago."""
        ends_at = time.monotonic() + HEALTH_SECONDS + KILL_SECONDS
        while not self.signals.stops and time.monotonic() < ends_at:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            self.signals.pause(LOCK_SECONDS)
        return False

    def take(self, verdict: Verdict) -> None:
        """The answer counts from now on, and for how long."""
        if self.signals.stops:
            return  # it was cut short
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
            self.keep()

    def shared(self) -> "Verdict | None":
        """What the command has told another slot, if that began late enough for us."""
        found = self.answers().get(self.key())
        now = time.monotonic()
        if found is None or found.run == self.resumed or found.began_at <= self.needed_since:
            return None
        return found if now - self.settings.worker_health_interval < found.began_at <= now else None

    def own(self) -> Verdict:
        """Run the command, and share what it said."""
        began_at = time.monotonic()
        status, said = self.run()
        text = visible(said.decode("utf-8", "replace").strip().partition("\n")[0].strip())[:REASON_LETTERS]
        reason = "" if status == FIT else text or f"WORKER_HEALTH_COMMAND ended with {status}"
        if status not in (FIT, UNFIT, HELD):
            ended = f"ended with {status}" if status is not None else f"did not end within {HEALTH_SECONDS:g} s"
            reason = f"WORKER_HEALTH_COMMAND {ended}" + (f": {text}" if text else "")
        verdict = Verdict(status, reason, began_at, os.urandom(4).hex())
        took = f"{time.monotonic() - began_at:.1f}"
        told = {"status": status, "for": self.for_what(), "reason": reason or None, "took_s": took}
        log.log(logging.DEBUG if status == FIT else logging.WARNING, event("health", **told))
        if not self.signals.stops:
            self.jobs_seen = self.jobs
            self.share(verdict)
        return verdict

    def run(self) -> "tuple[int | None, bytes]":
        """The command's exit status, None when it had to be ended; and the beginning of what it said."""
        if self.stuck and self.stuck.poll() is None:
            return None, f"process {self.stuck.pid} of an earlier run cannot be ended".encode()
        reader, writer = os.pipe()
        with open(reader, "rb", buffering=0) as said:
            try:
                child = subprocess.Popen(
                    [*GATE, "/bin/sh", "-c", self.settings.worker_health_command],
                    env=self.environment() | self.occasion(),
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
        """Let it go, and read until it has ended, or its time is over. What it says beyond the beginning is dropped."""
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
        """What it said at its very end."""
        os.set_blocking(said.fileno(), False)
        data = said.read(HEALTH_BYTES - length) if length < HEALTH_BYTES else b""
        return data or b""

    def end(self, child: "subprocess.Popen[bytes]") -> "int | None":
        """Its exit status, None when it had none yet. Whatever it has started is ended."""
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
                child.kill()  # where it came into no cgroup
            child.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.stuck = child
        self.signals.child = 0
        self.signals.bury()
        return status

    def environment(self) -> "dict[str, str]":
        """As a job's, without any token."""
        return {
            k: v for k, v in agent_environment(self.settings, os.environ, "").items() if k != "BUILDKITE_AGENT_TOKEN"
        }

    def occasion(self) -> "dict[str, str]":
        """What the command is told of why it runs: see the README."""
        since = self.jobs - self.jobs_seen
        return {"HEALTH_FOR": self.for_what(), "HEALTH_JOBS": str(self.jobs), "HEALTH_JOBS_SINCE": str(since)}

    def for_what(self) -> str:
        return self.purpose or ("after_job" if self.jobs > self.jobs_seen else "idle")

    # -- what is kept in files

    def key(self) -> str:
        """The same for all slots that run the same command, in the same way, for the same kind of jobs."""
        settings = self.settings
        boot = read_text("/proc/sys/kernel/random/boot_id") if sys.platform == "linux" else ""
        what = [settings.worker_health_command, settings.worker_agent_query_rules, settings.worker_tags, boot]
        return blake2s(json.dumps([*what, sorted(self.environment().items())]).encode(), digest_size=8).hexdigest()

    def answers(self) -> "dict[str, Verdict]":
        """The last answers on this host, by `key`. What cannot be read is no answer."""
        try:
            with open(f"{self.settings.worker_state}/health.json", encoding="utf-8") as file:
                return {key: Verdict(*told) for key, told in json.load(file).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def share(self, verdict: Verdict) -> None:
        """For the other slots; those whose interval is over are dropped. Only under the lock."""
        oldest = verdict.began_at - 2 * self.settings.worker_health_interval
        kept = {key: each for key, each in self.answers().items() if each.began_at > oldest}
        write_anew(f"{self.settings.worker_state}/health.json", kept | {self.key(): verdict})

    def keep(self) -> None:
        """A restart does not make an answer forgotten for which a person must come."""
        if self.held:
            write_anew(f"{self.slot.path}.held", self.verdict)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.slot.path}.held")

    def kept(self) -> "Verdict | None":
        try:
            with open(f"{self.slot.path}.held", encoding="utf-8") as file:
                verdict = Verdict(*json.load(file))
        except (OSError, ValueError, TypeError):
            return None
        return verdict if self.settings.worker_health_command else None


def write_anew(path: str, told: object) -> None:
    """Write what no reader sees half of. A full disk is no reason to stop: then it is not kept."""
    try:
        new = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(new, "w", encoding="utf-8") as file:
            json.dump(told, file)
        os.replace(f"{path}.new", path)
    except OSError as error:
        log.warning(event("unwritten", path=path, problem=error))


def empty_private_tmp(settings: Settings) -> None:
    """Empty /tmp and /var/tmp where systemd gave the worker its own (PrivateTmp=): so they are each job's own.

    As the agent's user, which may delete no more than a job may itself.
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
    """Whether systemd mounted a directory there that only this unit has. Source: proc_pid_mountinfo(5)"""
    try:
        found = [line.split()[3] for line in read_text(mounts).splitlines() if line.split()[4] == path]
    except (OSError, IndexError):
        return False
    return bool(found) and bool(
        re.search(r"/systemd-private-[0-9a-f]{32}-stack-worker@[^/]*\.service-[^/]+/tmp$", found[-1])
    )


# --- Work loop ---


class Touches:
    """Touches one claim from a thread of its own: a scheduler that hangs never delays the agent's output, a
    signal, or the agent's end. The main thread reads the attributes; each is written by the thread alone.
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
        """`at_once`: the lease has run for longer than is known here. `report` says what the slot waits for."""
        self.scheduler, self.job, self.signals, self.at_once = scheduler, job, signals, at_once
        self.report = report
        self.pause = job.lease_seconds / 3
        self.trouble = Trouble("touch", first_pause, self.pause, job=job.uuid)
        self.ended = threading.Event()
        #: When the last touch was sent, if its answer was to stop.
        self.stop_said_at: float | None = None
        #: Why the agent is to cancel its job, as the scheduler says; "": it is not.
        self.cancel = ""
        #: Why the claim is ours no more.
        self.lost: SchedulerError | None = None
        #: The scheduler has said that an agent has, or had, the job.
        self.is_acquired = False
        #: Since when the scheduler says that the job is over.
        self.over_since: float | None = None

    def __enter__(self) -> "Touches":
        # Where there is no claim, there is no lease.
        if self.job.claim:
            threading.Thread(target=self.run, name="touches", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Touch no more. Does not wait for a touch that is under way: nobody listens to it."""
        self.ended.set()

    def run(self) -> None:
        pause = 0.0 if self.at_once else self.pause
        while not self.ended.wait(pause) and not self.lost:
            sent_at = time.monotonic()
            pause = self.touch(sent_at) - (time.monotonic() - sent_at)
        self.scheduler.close()

    def touch(self, now: float) -> float:
        """Touch once; seconds from `now` to the next."""
        try:
            answer = self.scheduler.tell(self.job, "touch")
        except SchedulerError as error:
            return self.failed(error)
        self.trouble.over()
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
        """An agent that was paused at Buildkite stays up after its job, since v3.93.0. Its slot says so."""
        if self.over_since is None:
            self.over_since = now
        elif now - self.over_since >= PAUSED_SECONDS:
            self.report(self.scheduler, "paused", "agent paused at Buildkite: its job is over, and it stays up")

    def failed(self, error: SchedulerError) -> float:
        if not error.lost:
            return self.trouble.again(str(error), error.level)
        if not self.ended.is_set():
            log.warning(event("lost", job=self.job.uuid, problem=error, now="its agent is left alone"))
            self.lost = error
        return 0.0


class Reports:
    """Reports what the main thread waits for, from a thread of its own, which delays nothing: at once, then again."""

    def __init__(self, report: Callable[[Scheduler], object], scheduler: Scheduler, *, at_once: bool = True) -> None:
        """Not `at_once`: what is waited for may be over soon, so it is told later."""
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
    """The main thread: everything that happens to one slot, one step after the other."""

    def __init__(
        self, settings: Settings, slot: Slot, signals: Signals, cgroup: "Cgroup | None", environ: Mapping[str, str]
    ) -> None:
        self.settings, self.slot, self.signals, self.cgroup, self.environ = settings, slot, signals, cgroup, environ
        #: Tells this process from one that had the slot before: the scheduler then frees what that one held.
        self.session = os.urandom(8).hex()
        self.scheduler = Scheduler(settings, slot.name, self.session, self.api_token, signals)
        self.output = Output(slot.open_fifo(os.O_NONBLOCK))
        self.use(settings)
        #: What systemd was last told.
        self.status = ""
        self.claim_trouble = Trouble("claim", settings.worker_poll_interval)
        self.agent_trouble = Trouble("agent", settings.worker_poll_interval, REPORT_SECONDS)
        self.start_trouble = Trouble("start", settings.worker_poll_interval, REPORT_SECONDS)
        self.record_trouble = Trouble("record", TICK_SECONDS, TICK_SECONDS)
        #: The version of the agent, and which the scheduler was told.
        self.version = self.introduced = ""
        #: What the agent's file looked like when it was last found good.
        self.good_agent: tuple[int, ...] | None = None
        self.health = Health(settings, slot, signals, cgroup)
        self.health_trouble = Trouble("health", settings.worker_poll_interval, REPORT_SECONDS)
        #: When this worker came, and since when it has had no job (monotonic); jobs that an agent acquired.
        self.began_at = self.idle_since = time.monotonic()
        self.jobs = 0
        #: Processes that jobs left behind: of the last one.
        self.strays = 0

    def connection(self) -> Scheduler:
        """One more, to the scheduler that answered last."""
        connection = Scheduler(self.settings, self.slot.name, self.session, self.api_token)
        connection.urls = self.scheduler.urls.copy()
        return connection

    def api_token(self) -> str:
        """Where it comes from a file, the file is read each time, so that it can be replaced while the worker runs."""
        with contextlib.suppress(SettingsError, ValueError):
            return first_token(read_variable("STACK_API_TOKEN", True, self.environ)) or self.settings.stack_api_token
        return self.settings.stack_api_token

    def use(self, settings: Settings) -> None:
        """Take over what a reload can change. Raises SettingsError, ahead of any change, when it cannot be used."""
        if self.settings.stack_api_token and not settings.stack_api_token:
            raise SettingsError("STACK_API_TOKEN: is empty now, which the scheduler would refuse; for that, restart")
        self.settings = settings
        self.scheduler.settings = settings
        self.output.secrets |= {settings.buildkite_agent_token, settings.stack_api_token}

    def run(self) -> None:
        """Claim and work until a stop."""
        self.wait_for_earlier_agent()
        while not self.signals.stopped() and not self.is_over():
            job = self.claim() if self.agent_is_good() and self.is_fit() else None
            if job:
                self.work(job)
                self.idle_since = time.monotonic()
            self.introduce()
        self.say_goodbye()

    def is_over(self) -> bool:
        """Whether this worker has done its part, by WORKER_MAX_JOBS, _IDLE_TIMEOUT or _MAX_UPTIME."""
        has_run_all = 0 < self.settings.worker_max_jobs <= self.health.jobs
        if not has_run_all and self.time_left() > 0:
            return False
        log.info(event("over", jobs=self.health.jobs, up_s=f"{time.monotonic() - self.began_at:.0f}"))
        return True

    def time_left(self) -> float:
        """Seconds for which this worker may still wait for a job."""
        idle, up = self.settings.worker_idle_timeout or math.inf, self.settings.worker_max_uptime or math.inf
        return min(self.idle_since + idle, self.began_at + up) - time.monotonic()

    def say_goodbye(self) -> None:
        """The last word to the scheduler, which forgets a worker that ends by itself some day, and no other."""
        if self.signals.stops > 1:
            return
        if not self.settings.is_temporary:
            if self.introduced and not self.claim_trouble.times:
                self.report(self.scheduler, "stopped", "it was told to stop", seconds=LAST_WORD_SECONDS)
            return
        until = time.monotonic() + LAST_TRIES_SECONDS
        while not self.report(self.scheduler, "gone") and self.signals.stops < 2 and time.monotonic() < until:
            self.signals.pause(self.settings.worker_poll_interval, stops=self.signals.stops + 1)

    def tell(self, status: str) -> None:
        """What `systemctl status` shows. On one line: the next one would be an order to systemd of its own."""
        status = visible(" ".join(status.split()))
        if status != self.status:
            tell_systemd(f"STATUS={status}")
        self.status = status

    def wait_for_earlier_agent(self) -> None:
        """The slot's last worker may have died and its agent not: two agents never share a slot."""
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
        """Whether this host may have a job; else the scheduler has been told why not, and a pause is over."""
        why = self.health.unfit()
        if not why and self.health.is_due():
            said = f"WORKER_HEALTH_COMMAND has run for over {REPORT_SECONDS:g} s"
            told = self.health.why() or said
            with Reports(lambda scheduler: self.report(scheduler, "unfit", told), self.connection(), at_once=False):
                self.health.ask()
        why = why or self.health.why()
        if self.signals.stops:
            return False
        if not why:
            self.health_trouble.over()
            return True
        self.tell(f"unfit: {why}")
        pause = self.health_trouble.again(why)
        self.report(self.scheduler, "unfit", why)
        self.signals.pause(min(pause, max(0.0, self.time_left())))
        return False

    def agent_is_good(self) -> bool:
        """Whether the agent can be started; asked again only when its file has changed."""
        try:
            stat = os.stat(self.settings.buildkite_agent_path)
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_mode)
            if stamp != self.good_agent:
                self.version = agent_version(self.settings)
                self.log_agent()
        except (OSError, ValueError) as error:
            self.good_agent = None
            problem = f"BUILDKITE_AGENT_PATH: {error}; no job is claimed until a buildkite-agent is there"
            self.tell(problem)
            self.pause_without_agent(self.agent_trouble, problem)
            return False
        self.good_agent = stamp
        self.agent_trouble.over()
        return True

    def log_agent(self) -> None:
        until = supported_until(self.version) or None
        log.info(event("agent", path=self.settings.buildkite_agent_path, version=self.version, supported_until=until))
        why = outdated(self.version, time.time())
        if why:
            log.warning(event("outdated", agent=self.version, why=why))

    def introduce(self) -> None:
        """Tell the scheduler which agent this slot has, once it has answered a claim."""
        if self.introduced == self.version or self.claim_trouble.times or self.signals.stops:
            return
        if self.report(self.scheduler, "idle"):
            self.introduced = self.version

    def report(self, scheduler: Scheduler, state: str, reason: str = "", seconds: float = ANSWER_SECONDS) -> bool:
        """Tell the scheduler what this slot does or waits for, and its agent's version; whether it has heard it."""
        told = {"version": VERSION, "agent": self.version}
        told["agent_supported_until"] = self.version and supported_until(self.version)
        told |= {"state": state, "reason": reason, "query": self.settings.query}
        if state == "unfit" and self.health.held:
            told["held"] = self.health.held
        path = f"/workers/{quote(self.slot.name, safe='')}"
        try:
            answer = scheduler.ask("POST", path, told, seconds=seconds, stops=1)
        except Stopped:
            return False
        except SchedulerError as error:
            log.debug(event("unreported", state=state, problem=error))
            return not error.elsewhere  # a scheduler that refuses is older than this, or does not know the slot
        resumed = (answer or {}).get("resumed")
        if isinstance(resumed, str):
            self.health.resumed = resumed
        return True

    def pause_without_agent(self, trouble: Trouble, problem: str) -> None:
        pause = trouble.again(problem, logging.ERROR)
        if not self.signals.stopped():
            self.report(self.scheduler, "no_agent", problem)
        self.signals.pause(pause)

    def claim(self) -> "Job | None":
        """Wait for a job at the scheduler; None when there was none, or after a pause when that failed."""
        if not self.claim_trouble.times:
            self.tell(f"waiting for a job for {self.settings.query}")
        sent_at, wait = time.monotonic(), min(self.scheduler.wait, max(0.0, self.time_left()))
        try:
            job = self.scheduler.claim(self.settings.query, wait, lambda: bool(self.health.unfit()))
        except SchedulerError as error:
            self.claim_failed(error)
            return None
        self.claim_trouble.over()
        if job:
            log.info(event("claimed", job=job.uuid, queue=job.queue_key, claim=job.claim))
        elif time.monotonic() - sent_at < wait / 2:
            # "No job" long before its time, again and again, would be a busy loop of two.
            self.signals.pause(self.settings.worker_poll_interval)
        return job

    def claim_failed(self, error: SchedulerError) -> None:
        self.tell(f"no job can be claimed: {error}")
        self.introduced = ""  # it may be another scheduler, or one that has lost its store, which answers next
        if error.code == "worker_name_taken":
            self.name_taken(error)
        else:
            self.signals.pause(self.claim_trouble.again(str(error), error.level, error.retry_after))

    def name_taken(self, error: SchedulerError) -> None:
        """Another process claims under our name: two that take turns would each undo the other's claims."""
        log.error(event("name_taken", worker=self.slot.name, problem=error, pause_s=NAME_TAKEN_SECONDS))
        until = time.monotonic() + NAME_TAKEN_SECONDS
        # A reload ends a pause, but not this one: it brings no new name.
        while not self.signals.stops and time.monotonic() < until:
            self.signals.pause(until - time.monotonic())

    def work(self, job: Job) -> None:
        """One job, from its claim to its end."""
        if self.signals.stopped():
            self.release(job, "the worker was told to stop as the job arrived")
            return
        why = self.health.unfit()
        if why:
            self.release(job, f"the host is unfit: {why}", code="unfit")
            return
        if self.settings.job_tokens and not job.token:
            self.cannot_start(
                job, "it came without the token that was asked for; set BUILDKITE_AGENT_TOKEN, or upgrade the scheduler"
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
        self.settle(job, agent, touches, figures)
        empty_private_tmp(self.settings)  # it may take longer than the lease, which nobody renews any more
        self.judge(job, agent, touches)

    def judge(self, job: Job, agent: Agent, touches: Touches) -> None:
        """What the end of an agent says of this host, and whether it was one of WORKER_MAX_JOBS."""
        status = agent.exit_status
        has_failed = status not in (0, EXIT_REJECTED) and not touches.is_acquired
        if has_failed or agent.killed or self.strays:
            self.health.suspect()
        if status in (*NOT_STARTED, EXIT_REJECTED) or agent.stopped_at:
            return
        self.health.jobs += touches.is_acquired or not self.settings.worker_max_jobs or self.was_acquired(job)

    def was_acquired(self, job: Job) -> bool:
        """Whether an agent had the job, as Buildkite has told the scheduler. What nobody knows counts as one: a worker
        for one job that runs two would do worse than one that runs none.
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
        """Give the job back, and claim no more before the agent has been looked at again."""
        self.release(job, f"the agent cannot be started: {why}")
        self.good_agent = None
        self.pause_without_agent(self.start_trouble, why)

    def start(self, job: Job) -> Agent:
        """Start the agent for the job; raises OSError when not even a process can be."""
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
                # Ctrl-C at a terminal goes to every process of the session: it must reach only the worker.
                start_new_session=True,
                **identity(self.settings),
            )
        finally:
            os.close(fifo)
        self.signals.child = child.pid
        agent = Agent(child.pid, start_time(child.pid), job, child)
        agent.recorded = self.record(agent)
        assert child.stdin
        # Should the gate be gone already, its exit status tells.
        with contextlib.suppress(BrokenPipeError), child.stdin:
            self.confine(agent, child)
            child.stdin.write(b"go\n")
        log.info(event("started", job=job.uuid, pid=child.pid))
        return agent

    def confine(self, agent: Agent, child: subprocess.Popen[bytes]) -> None:
        """Put the agent that waits at its gate into the job's cgroup; raises OSError, and ends it, when that fails."""
        try:
            if self.cgroup:
                self.cgroup.enter(agent.job.uuid, agent.pid)
        except OSError:
            child.kill()
            child.wait()
            self.slot.forget()
            raise

    def watch(self, agent: Agent, touches: Touches) -> None:
        """Log the agent's output and pass on what it is told, until it has exited."""
        while not agent.exited():
            if self.output.fifo in self.signals.wait([self.output.fifo, *agent.ends], TICK_SECONDS):
                # The agent's end, or a signal, cuts this short.
                self.signals.wait(agent.ends, OUTPUT_SECONDS)
                self.output.read_all(READS)
            self.pass_on(agent, touches)
            agent.recorded = agent.recorded or self.record(agent)
        self.signals.child = 0
        self.strays = self.clean_up(agent.job.uuid, self.cgroup.end if self.cgroup else lambda _: end_group(agent))
        self.signals.bury()
        self.output.drain()

    def clean_up(self, job: str, end: Callable[[str], list[str]]) -> int:
        """End what the job has left running, so that the next one does not run beside it; how many there were."""
        try:
            left = end(job)
        except OSError as error:
            log.error(event("unended", job=job, problem=error))
            return 1
        if left:
            log.warning(event("left", job=job, processes=first_few(left), now="they were killed"))
        return len(left)

    def record(self, agent: Agent) -> bool:
        """Whether the slot's record names the agent. A full disk is no reason to disturb it."""
        try:
            self.slot.record(agent)
        except OSError as error:
            self.record_trouble.again(str(error))
            return False
        self.record_trouble.over()
        return True

    def pass_on(self, agent: Agent, touches: Touches) -> None:
        """Give the agent its signals: to cancel its job, and the scheduler's stop."""
        why = "" if agent.cancelled else touches.cancel or self.why_cancel(agent, time.monotonic())
        if why:
            agent.cancelled = True
            agent.send(signal.SIGQUIT, why)
        said_at = touches.stop_said_at
        if said_at is None:
            return
        if agent.stopped_at is None:
            agent.stopped_at = time.monotonic()
            agent.send(signal.SIGTERM, "the scheduler says stop: it has not acquired its job")
        elif said_at > agent.stopped_at + STOP_SECONDS and not agent.killed:
            agent.killed = True
            agent.send(signal.SIGKILL, f"it has not ended {STOP_SECONDS:g} s after SIGTERM")

    def why_cancel(self, agent: Agent, now: float) -> str:
        """Why the agent has to cancel its job; "" when it may go on. `now` is monotonic."""
        if self.signals.stops > 1:
            return "the worker was told to stop now"
        if now > self.signals.stopped_at + self.settings.worker_stop_timeout:
            return f"the worker was told to stop {self.settings.worker_stop_timeout:g} s ago (WORKER_STOP_TIMEOUT)"
        if now > agent.began_at + (self.settings.worker_job_timeout or math.inf):
            return f"the job has run for {self.settings.worker_job_timeout:g} s (WORKER_JOB_TIMEOUT)"
        return ""

    def settle(self, job: Job, agent: Agent, touches: Touches, figures: "dict[str, int | None]") -> None:
        """Tell the scheduler how the agent ended, and how it left the host, if it still wants to know."""
        if agent.exit_status not in NOT_STARTED:
            self.start_trouble.over()
        if touches.lost:
            self.lost(touches.lost)
        elif agent.exit_status in NOT_STARTED:
            self.cannot_start(job, self.output.last_words.strip())
        elif agent.stopped_at and touches.stop_said_at:
            self.release(job, "the agent was stopped: it did not acquire the job")
        else:
            ended = {"exit_status": agent.exit_status, "last_words": self.output.last_words, **figures}
            self.deliver(job, "complete", float("inf"), ended)

    def release(self, job: Job, reason: str, code: str = "") -> None:
        """Give the job back; when the scheduler cannot be told, the lease ends by itself."""
        if not job.claim:
            now = "Buildkite gives it out again when its reservation is over"
            return log.error(event("not_released", job=job.uuid, reason=reason, why="it came without a claim", now=now))
        fields = {"reason": reason} | ({"code": code} if code else {})
        self.deliver(job, "release", time.monotonic() + job.lease_seconds, fields)

    def deliver(self, job: Job, verb: str, until: float, fields: Mapping[str, object]) -> None:
        """Tell the scheduler until it has answered, `until` is over, or the operator insists.

        A worker that is to stop does not wait long for a scheduler that is gone: Buildkite knows how the job ended.
        """
        trouble = Trouble(verb, self.settings.worker_poll_interval, job=job.uuid)
        while True:
            try:
                self.scheduler.tell(job, verb, **fields)
                told = {k: v for k, v in fields.items() if k not in ("last_words", "strays", "free")}
                return log.info(event(f"{verb}d", job=job.uuid, **told))
            except SchedulerError as error:
                failure = error
            if failure.lost:
                # Nothing to deliver: the job is another's, or Buildkite has told the scheduler how it ended.
                log.warning(event("lost", job=job.uuid, problem=failure))
                return self.lost(failure)
            if self.signals.stops:
                until = min(until, time.monotonic() + LAST_TRIES_SECONDS)
            if self.signals.stops > 1 or time.monotonic() >= until or failure.status in (400, 413, 422):
                return log.error(event(f"not_{verb}d", job=job.uuid, problem=failure))
            pause = trouble.again(str(failure), failure.level, failure.retry_after)
            self.signals.pause(pause, stops=self.signals.stops + 1)

    def lost(self, error: SchedulerError) -> None:
        if error.code == "worker_name_taken":
            self.name_taken(error)


# --- Main ---

USAGE = """\
Usage: worker.py [--help | --version | --check]

Claims jobs from scheduler.py, and runs each with buildkite-agent start --acquire-job.
--check checks the settings, and what they name, and exits: 0 when all is well, else 78.

  STACK_API_TOKEN_FILE=/etc/worker/token ./worker.py
  WORKER_AGENT_QUERY_RULES=queue=linux,arch=arm64 ./worker.py
  WORKER_API_SERVER=http://scheduler:18888 ./worker.py --check"""


def check(settings: Settings) -> list[str]:
    """What is wrong with the things that the settings name."""
    problems = []
    try:
        why = outdated(agent_version(settings), time.time())
        if why:
            log.warning(event("outdated", agent=settings.buildkite_agent_path, why=why))
    except ValueError as error:
        problems.append(f"BUILDKITE_AGENT_PATH: {error}")
    if not can_write(settings.worker_state):
        problems.append(f"WORKER_STATE: {settings.worker_state} cannot be written by this user")
    elif settings.worker_agent_user:
        problems.append(problem_of_detours("WORKER_STATE", settings.worker_state))
    problems.append(problem_of_builds(settings))
    problems += problems_of_health(settings)
    for url in settings.worker_api_server:
        alone = dataclasses.replace(settings, worker_api_server=(url,))
        scheduler = Scheduler(alone, "check", "check", lambda: settings.stack_api_token)
        try:
            scheduler.ask("GET", "/health")
            scheduler.ask("GET", "/jobs/check")
        except SchedulerError as error:
            # That there is no such job is told only to those who have the token.
            if error.code != "unknown_job":
                problems.append(f"WORKER_API_SERVER: {url}: {error}")
        scheduler.close()
    return [problem for problem in problems if problem]


def problems_of_health(settings: Settings) -> list[str]:
    """Why this host would claim nothing now, and whether there is the health command's program."""
    why = no_space(settings)
    problems = [f"BUILDKITE_BUILD_PATH: {why}"] if why else []
    word = settings.worker_health_command.partition(" ")[0]
    if re.fullmatch(r"[\w./-]+", word) and not as_agent(settings, "sh", "-c", 'command -v "$1"', "sh", word):
        problems.append(f"WORKER_HEALTH_COMMAND: there is no {word} that the agent's user can run")
    return problems


def proxies(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Where proxies are set, for this process or in .env: what goes through which of them."""
    # It costs a start many ms.
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # noqa: PLC0415

    found = {name[:-6].lower(): text for name, text in environ.items() if name[-6:].lower() == "_proxy" and text}
    url = urlsplit(settings.buildkite_agent_endpoint or "https://agent.buildkite.com/v3")
    proxy = "" if proxy_bypass_environment(url.hostname or "", found) else found.get(url.scheme, "")
    way = f"through the proxy {without_login(proxy)}" if proxy else "without a proxy"
    told = [f"{server}: this worker asks it without a proxy" for server in settings.worker_api_server]
    return [*told, f"{url.geturl()}: the agent asks it {way}"] if found else []


def problem_of_builds(settings: Settings) -> str:
    """Why the agent can neither build where it is to, nor be given a directory there; "" when it can."""
    user, path = settings.worker_agent_user, settings.builds
    there = nearest(path)
    if not user:
        good = can_write(path)
    else:
        try:
            # As the user: root itself may write everywhere.
            good = as_agent(settings, "test", "-w", there, "-a", "-x", there)
        except OSError as error:
            return f"BUILDKITE_BUILD_PATH: {path} cannot be looked at as {user}: {error}"
        if not good and there != path:
            # Then root makes it.
            return problem_of_detours("BUILDKITE_BUILD_PATH", os.path.dirname(path))
    return "" if good else f"BUILDKITE_BUILD_PATH: {path} cannot be written by {user or 'this user'}"


def problem_of_detours(name: str, path: str) -> str:
    try:
        refuse_detours(path)
    except OSError as error:
        return f"{name}: {path} cannot be used: {error}"
    return ""


def nearest(path: str) -> str:
    """The path, or what of it is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def unsafe(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What works, and lets somebody in: for the log, with the setting that it is about."""
    found = open_secrets(Settings, environ)
    addresses = [("WORKER_API_SERVER", url) for url in settings.worker_api_server]
    for name, url in [*addresses, ("BUILDKITE_AGENT_ENDPOINT", settings.buildkite_agent_endpoint)]:
        if is_in_clear(url):
            found.append(f"{name}: tokens cross the network readable, to {urlsplit(url).hostname}; use https")
    given = environ.get("BUILDKITE_AGENT_CONFIG")
    if settings.worker_agent_user and given and detour(os.path.abspath(given)):
        found.append(f"BUILDKITE_AGENT_CONFIG: others than root can write {given}, and so break or redirect the agent")
    elif settings.worker_agent_user and not given:
        config, passed_over = agent_config(settings)
        for path in passed_over:
            told = f"the agent gets {config} instead; give {path} and its directory to root alone"
            found.append(f"BUILDKITE_AGENT_CONFIG: others than root can write {path}: {told}, or name another file")
    return found


def can_write(path: str) -> bool:
    """Whether we can write the directory, or make it."""
    there = nearest(path)
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def set_up_logs(name: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=name.upper(), handlers=[handler])
    # No line of ours tells these, so they need not be found out for each line: that is a third of its price.
    # Source: https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # A line that cannot be written (disk full, reader gone) is lost; the worker is not.
    logging.raiseExceptions = False


def problem(text: str, status: int) -> int:
    complain(f"worker.py: {text}")
    return status


def own_cgroup(settings: Settings) -> "Cgroup | None":
    """Where jobs are confined, if this host has it; SettingsError when limits are asked for that it cannot set."""
    path = delegated_cgroup()
    try:
        if path:
            return Cgroup(path, settings.limits)
        why = "systemd has delegated no cgroup (v2) to this worker: it needs a unit with Delegate=yes"
    except OSError as error:
        why = f"{path} cannot be used: {error}"
    if settings.limits:
        names = " and ".join(settings.limits)
        raise SettingsError(f"WORKER_JOB_MEMORY, _CPUS, _TASKS: {names} cannot be set on this host: {why}")
    log.warning(event("unconfined", why=why, now="after a job only its agent's process group is ended"))
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
        return problem(found, EXIT_LATER)  # what is to be mounted there may come later
    log.info(
        event("started", version=VERSION, **settings.public() | {"worker_name": slot.name, "session": worker.session})
    )
    for reason in unsafe(settings, environ):
        log.warning(event("unsafe", reason=reason))
    for tag in ignored_queues(settings, environ):
        log.warning(event("ignored", tag=tag, why=f"this worker's queue is {settings.queue}"))
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
    for told in unknown_settings(Settings, environ) + idle_settings(settings, environ):
        log.warning(event("ignored", problem=told))
    if not arguments:
        return serve(settings, environ)
    for reason in unsafe(settings, environ):
        log.warning(event("unsafe", reason=reason))
    sys.stdout.write("".join(f"{told}\n" for told in proxies(settings, environ)))
    problems = check(settings)
    if problems:
        return problem("the check failed:\n" + "\n".join(problems), EXIT_SETTINGS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
