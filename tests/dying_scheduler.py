"""scheduler.py as it is, but killed at one point of a periodic build's start; its waits are short.

DIE_AT is like "before asked": on which side of which write, or of the answer ("answered"). DIE_OF: of which schedule.
A schedule that is new counts as looked at an hour ago, so that it is due at once where its time was in that hour.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scheduler  # noqa: E402
from scheduler import Build, PeriodicRow, RedisRows, RestApi, SqliteRows  # noqa: E402

SIDE, _, POINT = os.environ.get("DIE_AT", "").partition(" ")
NAME = os.environ.get("DIE_OF", "")


def die_if(side: str, point: str, name: str) -> None:
    if (side, point, name) == (SIDE, POINT, NAME):
        os.kill(os.getpid(), signal.SIGKILL)


def point_of(row: PeriodicRow | None) -> str:
    if row is None:
        return "gone"
    if row.start:
        return "wanted" if row.start["asked_at"] is None else "asked"
    return "built" if row.build else "begun"


def dying(write: Callable[..., bool]) -> Callable[..., bool]:
    def write_periodic(rows: Any, version: object, name: str, after: PeriodicRow | None, *more: Any) -> bool:
        die_if("before", point_of(after), name)
        is_written = write(rows, version, name, after, *more)
        die_if("after", point_of(after), name)
        return is_written

    return write_periodic


def create_build(api: RestApi, organization: str, pipeline: str, body: dict[str, Any]) -> Build:
    build = CREATE_BUILD(api, organization, pipeline, body)
    die_if("after", "answered", body["meta_data"][scheduler.NAME_KEY])
    return build


def begun(name: str, schedule: str, before: PeriodicRow | None, now: float) -> PeriodicRow:
    return BEGUN(name, schedule, before, now - 3600)


CREATE_BUILD, BEGUN = RestApi.create_build, scheduler.begun
for rows in (SqliteRows, RedisRows):
    setattr(rows, "write_periodic", dying(rows.write_periodic))  # noqa: B010  mypy knows it as a method
setattr(RestApi, "create_build", create_build)  # noqa: B010
scheduler.begun = begun
scheduler.UNCLEAR_SECONDS = 1.5

if __name__ == "__main__":
    sys.exit(scheduler.main(sys.argv[1:]))
