"""`make bench` measures all that it promises. How fast anything is, no test says: that depends on the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

#: What the table must show, at any scale.
FIGURES = [
    "claims, connections: 1",
    "claims, connections: 8",
    "claims, connections: 64",
    "claims beside a queue, connections: 64",
    "p99 of a claim, connections: 64",
    "claim and complete, 8 named workers",
    "idle claims, connections: 64",
    "ready → answer, 1 parked, p50",
    "ready → answer, 10 parked, p99",
    "ready → answer, 10 parked, 10 jobs at once, p99",
    "memory with 10 parked",
    "threads with 10 parked",
    "worker: start → first claim",
    "scheduler: start → port answers",
    "memory of an idle worker",
    "intake of 1,500 jobs",
    "a claim, 1,000 waiting",
    "a claim, 10 rule sets that match",
    "a claim, 10 rule sets of others",
    "restart with 1,000 jobs → first claim",
    "claims, 1 scheduler on Redis",
    "claims, 3 schedulers on Redis",
    "reserved → answer, 2 schedulers on Redis, p99",
    "scheduled → agent starts, default poll",
    "scheduled → agent starts, with a webhook",
    "6 jobs of 0.3 s on 2 workers",
    "a worker idle between two of them",
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a run at the smallest scale wrote and printed."""
    for tool in ("go", "beanstalkd", "redis-server"):
        if not shutil.which(tool):
            if os.environ.get("CI"):
                pytest.fail(f"{tool} is not installed")
            pytest.skip(f"{tool} is not installed")
    results = tmp_path_factory.mktemp("results")
    environment = os.environ | {"BENCH_SCALE": "tiny", "BENCH_RESULTS": str(results)}
    command = [sys.executable, str(ROOT / "bench" / "bench.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    (written,) = results.iterdir()
    found: dict[str, Any] = json.loads(written.read_text())
    return found, run.stdout


def test_bench_writes_every_figure_beside_its_yardstick(bench: tuple[dict[str, Any], str]) -> None:
    rows = {row["figure"]: row for row in bench[0]["rows"]}
    assert set(FIGURES) <= set(rows)
    for row in rows.values():
        assert row["value"] > 0
        assert row["yardstick"]
        assert row["yardstick_value"] > 0
        assert row["ratio"] == row["value"] / row["yardstick_value"]


def test_bench_prints_the_rows_that_it_writes(bench: tuple[dict[str, Any], str]) -> None:
    printed = re.findall(r"^\| (.+?) \|", bench[1], re.MULTILINE)
    assert printed[2:] == [row["figure"] for row in bench[0]["rows"]]


def test_bench_says_what_it_ran_on(bench: tuple[dict[str, Any], str]) -> None:
    machine = bench[0]["machine"]
    assert machine["cores"] == os.cpu_count()
    for name in ("cpu", "kernel", "python", "sqlite"):
        assert machine[name]
    assert bench[0]["revision"]


def test_bench_ends_leaving_nothing_behind(bench: tuple[dict[str, Any], str]) -> None:
    assert not list(ROOT.glob(".bench-*"))


def test_bench_without_go_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "bench.py")]
    run = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "apt install golang-go" in run.stderr
