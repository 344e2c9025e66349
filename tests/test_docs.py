"""The documents and .env.example cannot lie: their settings, routes, codes, commands, examples and links are real."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import scheduler
import worker
from conftest import ROUTES
from processes import program

ROOT = Path(__file__).parent.parent
#: What people read. A test looks for a table or a block in all of them, wherever it stands.
DOCUMENTS = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "API.md",
        "CHANGELOG.md",
        "systemd/README.md",
        "systemd/coming-from.md",
        "systemd/policies/README.md",
        "bench/README.md",
    )
}
TEXT = "\n".join(DOCUMENTS.values())
EXAMPLE = (ROOT / ".env.example").read_text()
SETTINGS = {"scheduler": scheduler.Settings, "worker": worker.Settings}


def table_after(header: str) -> list[list[str]]:
    """The cells of the one table of all documents whose header begins with these cells."""
    lines = TEXT.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith(f"| {header} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def defaults(cls: type) -> dict[str, str]:
    """Each variable's default as a reader sees it."""
    shown = {None: "required", "": "empty"}
    fields = {field.name.upper(): field.metadata["default"] for field in dataclasses.fields(cls)}
    return {name: shown.get(default, default) for name, default in fields.items()}


@pytest.mark.parametrize("script", SETTINGS)
def test_read_settings_table_of_the_documents_matches_the_code(script: str) -> None:
    documented = {row[0].strip("`"): row[1].strip("`") for row in table_after(f"{script} | default")}
    assert documented == defaults(SETTINGS[script])


def test_read_env_example_has_every_variable_with_its_default() -> None:
    written = dict(re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
    known = defaults(scheduler.Settings) | defaults(worker.Settings)
    assert set(written) == set(known)
    # Made up at start, different in the two scripts, or for a person to fill in.
    free = {"WORKER_NAME", "BUILDKITE_BUILD_PATH", "BUILDKITE_AGENT_ENDPOINT", "BUILDKITE_AGENT_TOKEN"}
    assert {name: text or "empty" for name, text in written.items() if name not in free} == {
        name: text for name, text in known.items() if name not in free
    }
    assert not any(written[name] for name in free)


def test_load_env_example_with_a_token_is_accepted_by_both_scripts(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(EXAMPLE.replace("BUILDKITE_AGENT_TOKEN=\n", "BUILDKITE_AGENT_TOKEN=bkct_x\n"))
    for script, cls in SETTINGS.items():
        code = f"import {script} as s; print(s.read_settings(s.Settings, s.environment()).log_level)"
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.stdout, run.stderr, cls.__name__) == ("info\n", "", "Settings")


@pytest.mark.parametrize("script", SETTINGS)
def test_help_of_a_script_lists_every_variable_and_default(script: str) -> None:
    run = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True, check=True)
    for name, default in defaults(SETTINGS[script]).items():
        assert re.search(rf"^  {name} .*\({re.escape(default)}\)$", run.stdout, re.MULTILINE), name


@pytest.mark.parametrize("script", SETTINGS)
def test_version_of_a_script_is_that_of_the_other_of_the_changelog_and_of_the_description_of_the_api(
    script: str,
) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--version"], capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == (f"{script}.py {scheduler.VERSION}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+", scheduler.VERSION)
    assert scheduler.VERSION == worker.VERSION
    assert json.loads((ROOT / "tests" / "openapi.json").read_text())["info"]["version"] == scheduler.VERSION
    versions = re.findall(r"^## (\S+)", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == scheduler.VERSION
    assert versions == sorted(set(versions), key=lambda text: [int(n) for n in text.split(".")], reverse=True)


def test_read_the_newest_schemas_of_the_changelog_are_those_that_are_written() -> None:
    told = re.findall(r"store goes from schema \d+ to (\d+).*?keys in Redis from \d+ to (\d+)", TEXT, re.DOTALL)
    assert told[0] == (str(scheduler.SCHEMA_VERSION), str(scheduler.REDIS_SCHEMA))


def test_read_routes_of_the_documents_are_those_that_are_served() -> None:
    documented = [re.match(r"`(GET|POST|DELETE) ([^?`]+)", row[0]) for row in table_after("route")]
    paths = {(found[1], found[2]) for found in documented if found}
    assert paths == {(route.method, route.path) for route in ROUTES}


def test_read_error_codes_of_the_documents_are_those_of_the_code() -> None:
    documented = {code for row in table_after("status") for code in re.findall(r"`([a-z_]+)`", row[1])}
    source = (ROOT / "scheduler.py").read_text()
    used = set(re.findall(r'(?:code="|"code": "|"error": "|status, code = \d+, ")([a-z_]+)"', source))
    assert documented == used


def test_read_exit_statuses_of_the_documents_are_those_of_the_code() -> None:
    rows = {int(row[0]): row[1:] for row in table_after("exit status")}
    assert {status for status, row in rows.items() if row[0]} == {
        scheduler.EXIT_UNDONE,
        scheduler.EXIT_WRONG,
        scheduler.EXIT_USAGE,
        scheduler.EXIT_IO,
        scheduler.EXIT_BUSY,
        scheduler.EXIT_SETTINGS,
    }
    assert {status for status, row in rows.items() if row[1]} == {
        worker.EXIT_USAGE,
        worker.EXIT_LATER,
        worker.EXIT_SETTINGS,
    }


def test_read_names_in_the_documents_exist_in_the_code() -> None:
    named = re.findall(r"`([A-Z][a-z]\w+)\.(\w+)`", TEXT)
    assert named
    for owner, name in named:
        assert hasattr(getattr(scheduler, owner), name), f"{owner}.{name}"


#: Settings of Buildkite's agent and of systems that people come from, and variables that a job or a command has.
OTHERS_VARIABLES = {"BUILDKITE_AGENT_CONFIG", "BUILDKITE_PULL_REQUEST_REPO", "BUILDKITE_PLUGINS"}


def test_read_variables_in_the_documents_are_settings_of_the_scripts() -> None:
    known = {*defaults(scheduler.Settings), *defaults(worker.Settings)} | OTHERS_VARIABLES
    named = re.findall(r"\b(?:STACK|SCHEDULER|WORKER|BUILDKITE|OPERATOR|VIEWER|POLICY|TLS)_[A-Z_]+[A-Z]\b", TEXT)
    assert {name.removesuffix("_FILE") if name not in known else name for name in named} <= known


def anchors(text: str) -> set[str]:
    """Where a link can lead within a document, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_follow_links_of_a_document_finds_each_file_and_heading(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", blocks("toml"))
def test_read_stack_file_of_the_documents_finds_nothing_wrong(text: str, tmp_path: Path) -> None:
    (tmp_path / "stack.toml").write_text(text)
    assert scheduler.read_stack_file(str(tmp_path / "stack.toml"), time.time()).warnings == ()


def test_read_settings_files_in_the_documents_name_settings_of_a_worker() -> None:
    written = [line.partition("=")[0] for text in blocks("ini") for line in text.splitlines()]
    assert written and {*written} - {"BOARD"} <= defaults(worker.Settings).keys()


def test_read_commands_and_routes_within_the_text_of_the_documents_exist() -> None:
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
    for words in (shlex.split(each) for each in inline if each.startswith(("stackctl ", "sudo stackctl "))):
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        command = scheduler.COMMANDS[words[words.index("stackctl") + 1]]
        assert all(option in f"{command.usage} {scheduler.COMMON_OPTIONS}" for option in options), words
    shapes = {(route.method, scheduler.shape_of(route.path)[0]) for route in ROUTES}
    asked = [re.fullmatch(r"(GET|POST|DELETE) (/[^?\s]*)\S*", each) for each in inline]
    ours = [found for found in asked if found and not found[2].startswith("/v1/")]
    assert ours and {(found[1], scheduler.shape_of(found[2])[0]) for found in ours} <= shapes


def openssl_commands() -> list[str]:
    return subprocess.run(["openssl", "list", "-commands"], capture_output=True, text=True, check=True).stdout.split()


def commands(text: str = TEXT) -> list[str]:
    """What the documents tell people to run, each once."""
    lines = [line.strip() for block in blocks("console", text) for line in block.splitlines()]
    return [*dict.fromkeys(line[2:] for line in lines if line.startswith("$ "))]


def units() -> set[str]:
    """What systemctl may be told: with and without suffix, and the template with any instance."""
    names = {path.name for path in (ROOT / "systemd").glob("stack-*.*")}
    return names | {name.removesuffix(".service") for name in names}


def made_by_installer(path: str) -> bool:
    """Whether a person who edits this file finds one."""
    return path == ".env" or path.replace("/etc/stack/", '"$etc/') + '"' in (ROOT / "systemd" / "install").read_text()


def read_by_a_worker(path: str) -> bool:
    """Whether a worker's unit reads this file where a person has made it."""
    unit = (ROOT / "systemd" / "stack-worker@.service").read_text()
    return f"EnvironmentFile=-{re.sub('worker-.+[.]env$', 'worker-%i.env', path)}\n" in unit


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> str | None:
    """The version of TLS that both agree on, in memory; raises what either finds wrong with the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="scheduler"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for end in ends * 2:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return ends[1].version()


def run_shell(command: str, directory: Path) -> None:
    subprocess.run(command, shell=True, cwd=directory, check=True, capture_output=True, timeout=60)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A directory with what the openssl commands of the documents make, but for the CA's certificate made anew."""
    program("openssl")
    for command in commands():
        if re.match(r"openssl |\(umask 077 && openssl ", command) and command != worker.CA_ANEW:
            run_shell(f"umask 022; {command}", tmp_path)
    return tmp_path


def strict_client(directory: Path) -> ssl.SSLContext:
    """As worker.py verifies from Python 3.13 on, whatever runs it here."""
    client = worker.tls_context(worker_settings(WORKER_CA_FILE=str(directory / "ca.crt")))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    return client


def server_of(directory: Path) -> ssl.SSLContext:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return server


def worker_settings(**environ: str) -> worker.Settings:
    return worker.read_settings(worker.Settings, environ)


def test_verify_certificates_of_the_documents_strictly_takes_them(certificates: Path) -> None:
    assert handshake(server_of(certificates), strict_client(certificates)) == "TLSv1.3"


def test_verify_certificate_of_a_ca_without_key_usage_is_refused_until_it_is_made_anew(certificates: Path) -> None:
    # As the documents had it before: the same key, no key usage.
    run_shell(worker.CA_ANEW.replace("-addext keyUsage=critical,keyCertSign,cRLSign", ""), certificates)
    with pytest.raises(ssl.SSLCertVerificationError, match="key usage") as caught:
        handshake(server_of(certificates), strict_client(certificates))
    assert worker.describe_error(caught.value).endswith(f": {worker.CA_ANEW}")
    assert worker.CA_ANEW in commands()
    run_shell(worker.CA_ANEW, certificates)
    assert handshake(server_of(certificates), strict_client(certificates)) == "TLSv1.3"


def test_run_openssl_commands_of_the_documents_makes_a_certificate_for_tls(certificates: Path) -> None:
    secrets = [certificates / "api-token", *certificates.glob("*.key")]
    assert [path.name for path in secrets if path.stat().st_mode & 0o077] == []
    made = {"TLS_CERT": "tls.crt", "TLS_KEY": "tls.key", "TLS_CLIENT_CA": "ca.crt", "STACK_API_TOKEN_FILE": "api-token"}
    environ = {name: str(certificates / file) for name, file in made.items()}
    settings = scheduler.read_settings(scheduler.Settings, environ | {"BUILDKITE_AGENT_TOKEN": "x", "LISTEN": ":18888"})
    assert settings.problems() == []
    assert len(settings.stack_api_token[0]) == 64


def check_install(words: list[str]) -> None:
    """What `install` puts where: drop-ins, what tls.conf reads, and secrets, private from their first moment."""
    drop_in = re.fullmatch(r"(?:image)?/etc/systemd/system/(.+)\.d/(.+)", words[-1])
    if drop_in:
        assert drop_in[1] in units() and words[-2] == f"systemd/{drop_in[2]}" and (ROOT / words[-2]).exists()
    elif words[1:3] == ["-m", "755"]:
        assert words[-2] == worker_settings().buildkite_agent_path or (ROOT / words[-2]).stat().st_mode & 0o111
    else:
        assert words[1:3] == ["-m", "644" if words[-1].endswith(".crt") else "600"]
        in_tls = f":{words[-1]}\n" in (ROOT / "systemd" / "tls.conf").read_text()
        assert in_tls or words[-2] == "/dev/null" or (ROOT / words[-2]).exists() or made_by_installer(words[-2])


@functools.cache
def help_of(shell: str, script: str) -> str:
    return subprocess.run([shell, str(ROOT / script), "--help"], capture_output=True, text=True, check=True).stdout


def check_script(words: list[str]) -> None:
    """One of ours can be run, and its help knows the arguments."""
    assert (ROOT / words[0]).stat().st_mode & 0o111
    shell = sys.executable if words[0].endswith(".py") else "sh"
    known = help_of(shell, words[0])
    assert all(word in known for word in words[1:] if not word.isdigit())


def check_systemctl(words: list[str]) -> None:
    named = {re.sub(r"@[^.]*", "@", word) for word in words[2:] if word.startswith("stack-")}
    assert words[1] == "daemon-reload" or (named and named <= units())


def check_stackctl(words: list[str]) -> None:
    scheduler.parse(words[2:], scheduler.COMMANDS[words[1]].usage)


def check_packages(words: list[str]) -> None:
    """Debian's packages are those of requirements.txt, as the installer names them."""
    needed = re.findall(r"^([a-z][a-z-]*)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert {word.removeprefix("python3-") for word in words[2:]} == {
        name.removeprefix("python-") for name in needed if name not in ("cronsim", "tzdata")
    }


def check_program(words: list[str]) -> None:
    """A Python file of ours is there, and knows the words that it is given."""
    text = (ROOT / words[1]).read_text()
    paths = [word for word in words[2:] if "/" in word]
    assert all(f'"{word}"' in text or f"{word}:" in text for word in words[2:] if word not in paths)


def check_editor(words: list[str]) -> None:
    for path in [word.removeprefix("image") for word in words[1:]]:
        assert path in ("agent-token", "/etc/stack/check-board") or made_by_installer(path) or read_by_a_worker(path)


def check_of_an_image(words: list[str]) -> None:
    """tests/systemd/test_hosts.py runs these."""
    assert any("image" in word for word in words)


CHECKS = {
    "install": check_install,
    "systemctl": check_systemctl,
    "stackctl": check_stackctl,
    "apt-get": check_packages,
    ".venv/bin/python": check_program,
    "$EDITOR": check_editor,
} | dict.fromkeys(("debootstrap", "cp", "chroot", "rm", "systemd-nspawn"), check_of_an_image)


@pytest.mark.parametrize("command", commands())
def test_read_command_of_the_documents_names_what_exists(command: str) -> None:
    words = shlex.split(command.rpartition(" | ")[2].removeprefix("sudo "), comments=True)
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert {name, name.removesuffix("_FILE")} & {*defaults(scheduler.Settings), *defaults(worker.Settings)}
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].startswith("./"):
        check_script(words)
    elif words[0] == "curl":
        path = re.search(r"http://127\.0\.0\.1:18888([^?]+)", words[-1])
        assert path and scheduler.shape_of(path[1])[0] in {scheduler.shape_of(route.path)[0] for route in ROUTES}
    elif words[0] in CHECKS:
        CHECKS[words[0]](words)
    elif words[0] == "journalctl":
        pattern = words[words.index("-u") + 1]
        assert pattern == "stack-*" or pattern in units()
    elif "openssl" in words:
        assert not shutil.which("openssl") or words[words.index("openssl") + 1] in openssl_commands()
    else:
        assert words[0] in ("tee", "loginctl") and "buildkite-agent" in shlex.split(command)


def test_read_settings_files_of_systemd_name_what_exists_with_its_default() -> None:
    for script, cls in SETTINGS.items():
        text = (ROOT / "systemd" / f"{script}.env").read_text()
        written = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", text, re.MULTILINE))
        known = defaults(cls)
        # Examples of what has no default, and the same address in other words.
        for name in [name for name in written if name.startswith("WORKER_JOB_")] + ["WORKER_API_SERVER"]:
            written.pop(name, None)
            known.pop(name, None)
        assert written == {name: known[name].replace("empty", "") for name in written}


def test_read_makefile_describes_every_target_for_people() -> None:
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r'echo "make (\w+)', text))
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony
    assert described <= set(phony[1].split())
    assert {"demo", "run", "test", "check"} <= described
