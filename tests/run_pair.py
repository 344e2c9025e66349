"""`make run`: the scheduler and one worker on this machine, with the token of .env, until Ctrl-C.

Ctrl-C reaches the worker alone, which finishes its job; then the scheduler is stopped. A second Ctrl-C cancels the job.
A terminal that is closed does what one Ctrl-C does.

Without an API token in .env, this makes one: otherwise every web page in a browser here could call the
scheduler. It also makes an operator token for the commands and the page; the worker does not get that one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parent.parent


def make_token(path: Path) -> Path:
    """The file of a token, readable only by its user. It is kept, so that `curl` can use it too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    return path


def is_set(name: str, known: Mapping[str, str | None]) -> bool:
    return bool(known.get(name) or known.get(f"{name}_FILE"))


def main() -> int:
    os.chdir(ROOT)
    if not Path(".env").exists() and "BUILDKITE_AGENT_TOKEN" not in os.environ:
        print(
            "make run needs your cluster's agent token: install -m 600 .env.example .env, and put it in",
            file=sys.stderr,
        )
        return 78
    if status := subprocess.run([sys.executable, "scheduler.py", "--check"], check=False).returncode:
        return status
    known = {**dotenv_values(".env"), **os.environ}
    state, of_scheduler = Path(known.get("STATE_DIRECTORY") or "state"), {}
    if not is_set("STACK_API_TOKEN", known):
        token = make_token(state / "api-token")
        os.environ["STACK_API_TOKEN_FILE"] = str(token)
        print(f"STACK_API_TOKEN is not set: the API's token is in {token}", file=sys.stderr)
    if not is_set("OPERATOR_TOKEN", known):
        token = make_token(state / "operator-token")
        of_scheduler["OPERATOR_TOKEN_FILE"] = str(token)
        print(f"OPERATOR_TOKEN is not set: the token of the page and of the commands is in {token}", file=sys.stderr)
    agent = known.get("BUILDKITE_AGENT_PATH") or shutil.which("buildkite-agent")
    if agent:
        os.environ["BUILDKITE_AGENT_PATH"] = agent
    # Its own session: the terminal's Ctrl-C is only for the worker.
    scheduler = subprocess.Popen(
        [sys.executable, "scheduler.py"], env=os.environ | of_scheduler, start_new_session=True
    )
    worker = subprocess.Popen([sys.executable, "worker.py"])
    print(f"scheduler.py has pid {scheduler.pid}, worker.py has pid {worker.pid}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: worker.terminate())
    status = worker.wait()
    scheduler.terminate()
    return status or scheduler.wait()


if __name__ == "__main__":
    sys.exit(main())
