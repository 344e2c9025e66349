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
BENCH = [sys.executable, str(ROOT / "bench" / "bench.py")]

#: What the table must show, at any scale, and whose figures.
FIGURES = {
    "claims, 1 connection": {"SQLite", "Redis"},
    "claims, 8 connections": {"SQLite", "Redis"},
    "claims, 64 connections": {"SQLite", "Redis"},
    "CPU: claims, 64 connections": {"SQLite", "Redis"},
    "claim and complete, 8 workers": {"SQLite", "Redis"},
    "CPU: touches, 8 workers": {"SQLite", "Redis"},
    "scheduled → agent starts, a queue in use, mean": {"SQLite"},
    "scheduled → agent starts, a queue that was idle, p95": {"SQLite"},
    "4 empty jobs, 8 workers": {"SQLite"},
    "CPU: an empty job, of scheduler and workers": {"SQLite"},
    "reserved → answer, 5 parked, p99": {"SQLite"},
    "memory with 5 parked": {"SQLite"},
    "claims, 3 schedulers, 24 connections": {"Redis"},
    "worker: start → first claim": {"SQLite"},
    "scheduler: start → port answers": {"SQLite"},
    "memory of an idle worker": {"SQLite"},
    "intake of 100 jobs": {"SQLite"},
    "100 jobs that a policy lets run → all can be claimed": {"SQLite"},
    "CPU: a job that a policy lets run, beside one without": {"SQLite"},
    "a claim, 200 waiting": {"SQLite"},
    "restart with 200 jobs → first claim": {"SQLite"},
    "a claim, 4 rule sets that match": {"SQLite"},
    "CPU: /fleet, 20 workers, 100 waiting": {"SQLite"},
    "/fleet compressed, 20 workers, 100 waiting": {"SQLite"},
    "a claim beside 3 open pages": {"SQLite"},
}


def run_bench(*arguments: str, results: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    for tool in ("go", "redis-server"):
        if not shutil.which(tool):
            if os.environ.get("CI"):
                pytest.fail(f"{tool} is not installed")
            pytest.skip(f"{tool} is not installed")
    environment = {name: text for name, text in os.environ.items() if name not in ("BENCH_DEMO", "REAL_AGENT_V3")}
    environment["BENCH_RESULTS"] = str(results)
    run = subprocess.run(
        [*BENCH, "--quick", *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == status, run.stderr
    return run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """What a run at the smallest scale wrote, printed and said."""
    results = tmp_path_factory.mktemp("results")
    run = run_bench(results=results)
    (written,) = results.iterdir()
    found: dict[str, Any] = json.loads(written.read_text())
    return found, run.stdout, run.stderr


@pytest.mark.long
def test_bench_writes_every_figure(bench: tuple[dict[str, Any], str, str]) -> None:
    rows = {row["figure"]: row for row in bench[0]["rows"]}
    assert {figure: set(rows[figure]["values"]) for figure in FIGURES} == FIGURES
    # CPU time is counted in 10 ms, which so few requests may not take.
    for figure, row in rows.items():
        assert all(value > 0 or figure.startswith("CPU") for value in row["values"].values()), figure
        assert row["yardstick_value"] > 0 or not row["yardstick"] or figure.startswith("CPU"), figure


@pytest.mark.long
def test_bench_prints_the_rows_that_it_writes(bench: tuple[dict[str, Any], str, str]) -> None:
    printed = re.findall(r"^\| (.+?) \|", bench[1], re.MULTILINE)
    assert printed[2:] == [row["figure"] for row in bench[0]["rows"]]


@pytest.mark.long
def test_bench_says_what_it_ran_on(bench: tuple[dict[str, Any], str, str]) -> None:
    machine = bench[0]["machine"]
    assert machine["cores"] == os.cpu_count()
    for name in ("cpu", "kernel", "python", "sqlite"):
        assert machine[name]
    assert bench[0]["revision"]


@pytest.mark.long
def test_bench_without_the_demo_says_so(bench: tuple[dict[str, Any], str, str]) -> None:
    assert "the Go demo is left out" in bench[2]
    assert "Go demo" not in bench[1]


@pytest.mark.long
def test_bench_ends_leaving_nothing_behind(bench: tuple[dict[str, Any], str, str]) -> None:
    assert not list(ROOT.glob(".bench-*"))


@pytest.mark.long
def test_bench_beside_another_scheduler_shows_both_and_writes_nothing(tmp_path: Path) -> None:
    run = run_bench("rounds", "--before", str(ROOT / "scheduler.py"), results=tmp_path)
    assert "| SQLite | Redis | before, SQLite | before, Redis |" in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_bench_beside_a_scheduler_that_does_not_start_has_the_other_figures_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("import sys; sys.exit('too old for this machine')")
    results = tmp_path / "results"
    run = run_bench("rounds", "--before", str(tmp_path / "old.py"), results=results, status=1)
    assert re.search(r"^\| claim and complete, 8 workers \| /s \| [\d,.]+ \| [\d,.]+ \|", run.stdout, re.MULTILINE)
    assert "| SQLite | Redis | yardstick |" in run.stdout
    assert "before, SQLite is measured no more:" in run.stderr and "too old for this machine" in run.stderr
    assert "not measured to the end: before, SQLite, before, Redis" in run.stderr
    assert not results.exists()


def test_bench_without_go_says_what_to_install(tmp_path: Path) -> None:
    run = subprocess.run(BENCH, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "apt install golang-go" in run.stderr
