"""What must stay true of the two scripts as texts: shared parts are equal, and each map names the sections."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from processes import program

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
    assert len([line for line in texts[0][0].splitlines() if line.strip()]) <= 220


#: Below these, faults are known by which a server that is asked can hurt whoever asks.
SAFE = ["urllib3>=2.6.0", "requests>=2.32.4"]
#: A package of a lock: its name, its version, and the hashes of its files.
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+)[^\n]*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.MULTILINE)


def test_read_lock_of_a_venv_names_safe_versions_with_the_hashes_of_their_files() -> None:
    text = (ROOT / "systemd" / "requirements.lock").read_text()
    versions = dict(LOCKED.findall(text))
    # Nothing stands there in another form.
    assert len(versions) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    needed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    for requirement in map(Requirement, needed + SAFE):
        assert requirement.specifier.contains(versions[requirement.name]), f"{requirement}: {versions}"
    # Needed before Python 3.11.3, as Debian 12 has it.
    assert "async-timeout" in versions


def test_read_map_of_a_script_names_its_sections_in_order(source: str) -> None:
    listed = re.search(
        r"The sections, in order: (.*?)\.\n", (ast.get_docstring(ast.parse(source)) or "") + "\n", re.DOTALL
    )
    assert listed
    banners = re.findall(r"^# --- (.+) ---$", source, re.MULTILINE)
    assert re.split(r",\s+", listed[1]) == banners
    assert len(banners) <= 20


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
    [("scheduler.py", {"requests", "redis", "dotenv", "prometheus_client", "cronsim"}), ("worker.py", {"dotenv"})],
)
def test_import_of_a_script_needs_only_the_packages_it_may(script: str, packages: set[str]) -> None:
    foreign = imported((ROOT / script).read_text()) - set(sys.stdlib_module_names)
    assert foreign == packages


def test_parse_worker_for_python_3_6_finds_nothing_that_it_cannot_read() -> None:
    tree = ast.parse((ROOT / "worker.py").read_text(), feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]


#: A Go that can only say which versions are served.
BROKEN_GO = """#!/bin/sh
[ "$1" = list ] && [ "$V4" ] && echo "$V4" && exit
[ "$1" = mod ]
"""


@pytest.mark.parametrize(
    ("built", "served", "status"), [("", "", 1), ("v3.138.1", "v4.0.0", 1), ("v3.138.1", "", 0)], ids=repr
)
def test_build_agents_that_do_not_build_fails_but_for_one_that_is_not_served(
    tmp_path: Path, built: str, served: str, status: int
) -> None:
    for name, text in {"go": BROKEN_GO, f"buildkite-agent-{built}": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STACK_CI_CACHE": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "V4": served,
    }
    script = [program("bash"), str(ROOT / ".ci" / "build-agents")]
    done = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "V4" in done.stdout) == (status, False)
    assert ("no such module" in done.stderr) == (status == 0)


def test_list_top_level_python_files_finds_the_two_scripts() -> None:
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
