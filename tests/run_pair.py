"""`make run`: the scheduler and one worker on this machine, with the token of .env, until Ctrl-C.

Ctrl-C reaches the worker alone, which finishes its job; then the scheduler is stopped. A second Ctrl-C cancels the job.
A terminal that is closed does what one Ctrl-C does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parent.parent


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
    agent = known.get("BUILDKITE_AGENT_PATH") or shutil.which("buildkite-agent")
    if agent:
        os.environ["BUILDKITE_AGENT_PATH"] = agent
    # A session of its own: the terminal's Ctrl-C is for the worker.
    scheduler = subprocess.Popen([sys.executable, "scheduler.py"], start_new_session=True)
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
