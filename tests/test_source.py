"""What must stay true of the two scripts as texts: shared parts are equal, and each map names the sections."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["scheduler.py", "worker.py"]
SHARED = re.compile(r"# --- Settings and logs ---\n.*?\n(?=# \(End of the text that both files share\.\)\n)", re.DOTALL)


@pytest.fixture(params=SCRIPTS)
def source(request: pytest.FixtureRequest) -> str:
    return Path(ROOT / request.param).read_text()


def test_compare_shared_text_of_both_scripts_finds_it_equal_and_short() -> None:
    texts = [SHARED.findall((ROOT / script).read_text()) for script in SCRIPTS]
    assert [len(found) for found in texts] == [1, 1]
    assert texts[0] == texts[1]
    assert len([line for line in texts[0][0].splitlines() if line.strip()]) <= 125


def test_read_map_of_a_script_names_its_sections_in_order(source: str) -> None:
    listed = re.search(
        r"The sections, in order: (.*?)\.\n", (ast.get_docstring(ast.parse(source)) or "") + "\n", re.DOTALL
    )
    assert listed
    banners = re.findall(r"^# --- (.+) ---$", source, re.MULTILINE)
    assert re.split(r",\s+", listed[1]) == banners
    assert len(banners) <= 12


def imported(source: str) -> set[str]:
    """Top-level names of every module that the source imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("script", "packages"),
    [("scheduler.py", {"requests", "redis", "dotenv", "prometheus_client"}), ("worker.py", {"dotenv"})],
)
def test_import_of_a_script_needs_only_the_packages_it_may(script: str, packages: set[str]) -> None:
    foreign = imported((ROOT / script).read_text()) - set(sys.stdlib_module_names)
    assert foreign == packages


def test_list_top_level_python_files_finds_the_two_scripts() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
