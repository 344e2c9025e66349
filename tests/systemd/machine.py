"""A Debian with a real systemd in a container, for tests of the units and of what the units run.

The container has processes, files, cgroups and users of its own, and this host's network: what listens on loopback
out here is reached from in there. Its root is a copy in memory of a tree that debootstrap makes once and a cache
keeps, so every machine starts clean and leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from conftest import LONG_RUN, TAKES_LONG

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("STACK_CI_CACHE") or Path.home() / ".cache" / "agent-stack-systemd")
#: What is installed beside a Debian's minimum.
WORKERS_PACKAGES = "systemd,systemd-sysv,dbus,procps,python3"
PACKAGES = {
    # Debian 12, with the packages of requirements.txt.
    "bookworm": f"{WORKERS_PACKAGES},python3-requests,python3-dotenv,python3-prometheus-client,python3-redis",
    # Debian 11, the oldest that a worker runs on: systemd 247, Python 3.9.
    "bullseye": WORKERS_PACKAGES,
}
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare", "setpriv")
#: With mounts and processes of its own, all of which end with the tests, however those end.
ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
#: Mounts a copy of the tree $2 in memory, at $1, and starts systemd in it, in the
#: cgroup $3: below the one that all machines would get, they would end each other's processes.
BOOT = """
mkdir "$3" && echo $$ >"$3/cgroup.procs" &&
mount -t tmpfs tmpfs "$1" && mkdir "$1/upper" "$1/work" "$1/root" &&
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$1/root" &&
shift 3 && exec systemd-nspawn "$@"
"""


def debian(release: str) -> Path:
    """The tree that every machine starts from. What is missing to have it skips; in CI it must be there.

    At home it skips too: each test boots a machine and installs on it, and the tree is a Debian to be downloaded.
    """
    missing = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if os.geteuid() == 0 else ["root"])
    if missing:
        why = f"a systemd in a container needs {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    if not LONG_RUN:
        pytest.skip(TAKES_LONG)
    tree = CACHE / f"{release}-{hashlib.sha256(PACKAGES[release].encode()).hexdigest()[:12]}"
    if not tree.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # these tests run in several processes, and one makes it for all
            if not tree.exists():
                make_tree(release, tree)
    return tree


def make_tree(release: str, tree: Path) -> None:
    new = Path(tempfile.mkdtemp(prefix=f"{release}-", dir=CACHE))
    new.chmod(0o755)
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES[release]}", release, str(new)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        shutil.rmtree(new)
        pytest.fail(f"debootstrap failed:\n{made.stdout[-2000:]}{made.stderr}")
    # debootstrap copies this host's.
    (new / "etc/hostname").write_text("build\n")
    new.rename(tree)


def own_cgroup() -> Path:
    """The directory of this process's cgroup (v2), which some hosts have beside v1."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next(mount[1] for mount in mounts if mount[2] == "cgroup2")
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path(root + own.removeprefix("0::"))


def remove_cgroup(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def wait_for(found: Callable[[], Any], what: str, timeout: float = 30) -> Any:
    """Ask again and again until the answer is true, and give it."""
    end = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < end, f"not so within {timeout} s: {what}"
        time.sleep(0.05)
    return value


class Machine:
    """One container, from its boot to its end; a context manager that leaves nothing running."""

    def __init__(
        self, directory: Path, agent: str, release: str = "bookworm", tree: Path | None = None, hostname: str = "build"
    ):
        """`directory`: an empty one, for the console's log and as a place to mount at. `agent` is a buildkite-agent.
        `tree`: a machine's files, in place of those of the release.
        """
        self.console = directory / "console.log"
        (directory / "root").mkdir()
        self._cgroup = own_cgroup() / f"machine-{directory.name}-{os.getpid()}-{id(self)}"
        with open(self.console, "wb") as console:
            self._nspawn = subprocess.Popen(
                [
                    *[
                        *ALONE,
                        "sh",
                        "-c",
                        BOOT,
                        "boot",
                        str(directory / "root"),
                        str(tree or debian(release)),
                        str(self._cgroup),
                    ],
                    *["--directory", str(directory / "root" / "root"), f"--hostname={hostname}", "--boot"],
                    *["--register=no", "--keep-unit", "--console=pipe"],
                    f"--bind-ro={agent}:/usr/local/bin/buildkite-agent",
                ],
                env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        try:
            #: Its systemd, as this host counts.
            self.pid: int = wait_for(self._process_one, "the machine has a systemd")
            wait_for(self._booted, "the machine has booted", 60)
        except BaseException:
            self.close()
            raise

    def _process_one(self) -> int | None:
        self._alive()
        try:
            return int((self._cgroup / "payload/init.scope/cgroup.procs").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _alive(self) -> bool:
        assert self._nspawn.poll() is None, f"the machine has ended:\n{self.console.read_text()[-2000:]}"
        return True

    def _booted(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).strip()
        return self._alive() and state in ("running", "degraded")

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """What the command says in there, on both of its outputs."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def status(self, *command: str) -> int:
        """The command's exit status."""
        return int(self.run("sh", "-c", '"$@" >/dev/null 2>&1; echo $?', "sh", *command))

    def path(self, path: str) -> Path:
        """A file of the machine, as this host sees it. Symbolic links in it that are absolute lead astray."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def copy_project(self) -> None:
        """What an administrator copies to a machine."""
        target = self.path("/root/agent-stack")
        target.mkdir(exist_ok=True)
        for name in ("scheduler.py", "worker.py", "page.html", "requirements.txt", "README.md", "API.md"):
            shutil.copy(ROOT / name, target)
        shutil.copytree(ROOT / "systemd", target / "systemd", dirs_exist_ok=True)

    def install(self, *arguments: str) -> str:
        return self.run("/root/agent-stack/systemd/install", *arguments)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal_tail(self) -> str:
        """The end of its journal, for a test that failed."""
        if self._nspawn.poll() is not None:
            return self.console.read_text()[-3000:]
        return self.run("journalctl", "--no-pager", "-n", "60", "-o", "short-precise", "-u", "stack-*", check=False)

    def ended(self, timeout: float = 60) -> None:
        """Wait until it has powered itself off."""
        self._nspawn.wait(timeout)

    def close(self) -> None:
        """Pull the plug."""
        if self._cgroup.exists():
            (self._cgroup / "cgroup.kill").write_text("1")
        else:
            self._nspawn.kill()
        self._nspawn.wait(30)
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            wait_for(functools.partial(remove_cgroup, directory), f"{directory} is empty")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
