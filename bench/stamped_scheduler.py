#!/usr/bin/env python3
"""scheduler.py as it is, but for one note: when jobs were ready, before anybody was woken for them.

For each it writes `<uuid> <CLOCK_MONOTONIC in ns>` into the file that BENCH_READY names. Nothing outside a scheduler
can see that moment: what can be seen, Buildkite's answer, comes before it is parsed and written down.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scheduler  # noqa: E402

offer = scheduler.Dispatcher.offer


def stamped_offer(self: Any, jobs: Iterable[scheduler.Job]) -> None:
    now, jobs = time.monotonic_ns(), list(jobs)
    offer(self, jobs)
    with open(os.environ["BENCH_READY"], "a", encoding="ascii") as file:
        file.writelines(f"{job.uuid} {now}\n" for job in jobs)


if __name__ == "__main__":
    scheduler.Dispatcher.offer = stamped_offer  # type: ignore[method-assign]
    sys.exit(scheduler.main([]))
