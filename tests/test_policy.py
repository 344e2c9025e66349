"""The policy: what a policy file sees and answers, and the process that runs it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import scheduler
from processes import wait_until
from scheduler import Decision, PolicyFailed, PolicyProcess
from test_docs import blocks

SECRET = "hunter2-in-the-environment"
FLEET: dict[str, Any] = {
    "time": 1_800_000_000.0,
    "age": 0.0,
    "counts": {"ready": 2, "running": 1},
    "waiting": {"queue=default,arch=amd64": 2},
    "workers": [
        ["a-1", "a", "idle", ["default"], ["zone=a", "arch=amd64"]],
        ["b-1", "b", "working", ["deploy"], ["zone=b"]],
    ],
}


def question(**more: Any) -> dict[str, Any]:
    """A job as the scheduler tells a policy of it."""
    job = {
        "uuid": "018f0000-0000-4000-8000-000000000001",
        "queue": "default",
        "rules": ["queue=default", "arch=amd64"],
        "priority": 3,
        "scheduled_at": 1_800_000_000.0,
        "pipeline": "app",
        "branch": "main",
        "build_number": 7,
        "step_key": "test",
        "env": {"BUILDKITE_BRANCH": "main", "PASSWORD": SECRET},
        "command": "make test",
        "retry_count": 0,
        "parallel_job": None,
        "previous": [],
        "held_for": 0.0,
    }
    return job | more


Start = Callable[..., PolicyProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start and load a policy of this text; all are ended with the test."""
    processes: list[PolicyProcess] = []

    def started(text: str, **how: Any) -> PolicyProcess:
        path = tmp_path / "policy.py"
        path.write_text(textwrap.dedent(text))
        process = PolicyProcess(str(path), path.read_bytes(), lambda: FLEET, **how)
        processes.append(process)
        process.load()
        return process

    yield started
    for process in processes:
        process.close()


def answer(start: Start, body: str, **job: Any) -> Decision:
    """What `decide` with this body answers."""
    return start("def decide(job, fleet):\n" + textwrap.indent(textwrap.dedent(body), "    ")).ask(question(**job))


def trouble(start: Start, body: str, **job: Any) -> str:
    """What is told of what goes wrong in it."""
    with pytest.raises(PolicyFailed) as failed:
        answer(start, body, **job)
    return str(failed.value.trouble)


# -- what it answers


@pytest.mark.parametrize(
    ("written", "decision"),
    [
        ("run()", Decision("run")),
        ("run(require=['trust=low', 'host=a', 'gpu'])", Decision("run", require=("gpu=*", "host=a", "trust=low"))),
        ("run(avoid=['host=a'], for_seconds=20)", Decision("run", seconds=20.0, avoid=("host=a",))),
        ("run(priority=-5)", Decision("run", priority=-5)),
        ("hold('zone b is empty', seconds=30)", Decision("hold", "zone b is empty", 30.0)),
        ("hold('later')", Decision("hold", "later", 60.0)),
        ("refuse('not here')", Decision("refuse", "not here")),
        ("succeed('nothing to do')", Decision("succeed", "nothing to do")),
    ],
)
def test_decide_with_each_answer_gives_that_decision(start: Start, written: str, decision: Decision) -> None:
    assert answer(start, f"return {written}") == decision


@pytest.mark.parametrize(
    "written",
    [
        "run(require='trust=low')",
        "run(require=['queue=other'])",
        "run(require=['=low'])",
        "run(require=['*'])",
        "run(require=['a=b'] * 40)",
        "run(require=['a=' + 'b' * 600])",
        "run(require=['a=b\\n'])",
        "run(require=[1])",
        "run(avoid=['host=a'], for_seconds=0.5)",
        "run(avoid=['host=a'], for_seconds=float('nan'))",
        "run(priority=1.5)",
        "run(priority=True)",
        "run(priority=10**12)",
        "hold('')",
        "hold(b'no')",
        "hold('x' * 5000)",
        "hold('x', seconds=4)",
        "hold('x', seconds=3601)",
        "hold('x', seconds='60')",
        "refuse(None)",
        "succeed('  ')",
    ],
)
def test_decide_with_what_no_worker_or_page_could_use_fails_at_its_line(start: Start, written: str) -> None:
    assert trouble(start, f"return {written}") == "ValueError at policy.py:2"


@pytest.mark.parametrize("written", ["None", "True", "'run'", "run", "{'verb': 'run'}", "job"])
def test_decide_with_what_is_no_answer_fails_and_names_the_function(start: Start, written: str) -> None:
    assert trouble(start, f"return {written}") == "TypeError at policy.py:1"


# -- what it sees


def test_read_job_shows_what_buildkite_listed_and_what_it_would_run(start: Start) -> None:
    env = {"BUILDKITE_PLUGINS": '[{"docker#v5": {"image": "x"}}]', "A": "1"}
    previous = [{"uuid": "u", "host": "a", "worker": "a-1", "acquired": True, "ended": "ran"}]
    body = """
        import datetime
        assert job.uuid.startswith("018f") and job.queue == "default"
        assert job.rules == ("queue=default", "arch=amd64") and job.tags["arch"] == "amd64"
        assert (job.priority, job.pipeline, job.branch, job.build_number, job.step_key) == (3, "app", "main", 7, "test")
        assert job.scheduled_at == datetime.datetime.fromtimestamp(1_800_000_000, datetime.timezone.utc)
        assert job.env["A"] == "1" and job.command == "make test" and job.plugins[0]["docker#v5"]["image"] == "x"
        assert (job.retry_count, job.parallel_job, job.held_for) == (2, 4, 61.5)
        earlier = job.previous[-1]
        assert (earlier.host, earlier.worker, earlier.acquired, earlier.ended) == ("a", "a-1", True, "ran")
        return run()
    """
    told = {"retry_count": 2, "parallel_job": 4, "held_for": 61.5, "previous": previous, "env": env}
    assert answer(start, body, **told) == Decision("run")


@pytest.mark.parametrize("written", ["not json", "{}", "[" * 100_000, ""])
def test_read_plugins_that_cannot_be_read_shows_none(start: Start, written: str) -> None:
    body = "assert job.plugins == (); return run()"
    assert answer(start, body, env={"BUILDKITE_PLUGINS": written}) == Decision("run")


@pytest.mark.parametrize(
    "written",
    ["job.queue = 'x'", "job.env['A'] = 'x'", "job.tags['A'] = 'x'", "fleet.counts['ready'] = 0", "fleet.x = 1"],
)
def test_change_what_a_policy_sees_is_refused(start: Start, written: str) -> None:
    assert trouble(start, written).endswith("at policy.py:2")


def test_ask_for_the_fleet_shows_live_workers_counts_and_the_time(start: Start) -> None:
    body = """
        assert [each.name for each in fleet.workers()] == ["a-1", "b-1"]
        assert [each.name for each in fleet.workers("zone=b")] == ["b-1"]
        assert fleet.workers("zone=b", "queue=default") == () and fleet.workers("zone=c") == ()
        assert fleet.workers("host=a")[0].state == "idle" and fleet.workers("worker=a-1", "arch=*")[0].host == "a"
        assert fleet.counts["ready"] == 2 and fleet.waiting["queue=default,arch=amd64"] == 2
        assert 0 <= fleet.time - 1_800_000_000 < 30
        assert fleet.now("Europe/Berlin").utcoffset().total_seconds() == 3600 and fleet.now().year == 2027
        return run()
    """
    assert answer(start, body) == Decision("run")


# -- what goes wrong


def test_raise_in_a_policy_tells_type_file_and_line_and_keeps_the_rest_for_operators(start: Start) -> None:
    with pytest.raises(PolicyFailed) as failed:
        answer(start, "raise KeyError(job.env['PASSWORD'])")
    assert str(failed.value) == "KeyError at policy.py:2"
    assert SECRET in failed.value.traceback
    assert "raise KeyError(job.env['PASSWORD'])" in failed.value.traceback


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import json; json.loads('{')", "JSONDecodeError at policy.py:2"),
        ("raise SystemExit(0)", "SystemExit at policy.py:2"),
        ("return decide(job, fleet)", "RecursionError at policy.py:2"),
        ("class Odd(LookupError): pass\nraise Odd()", "LookupError at policy.py:3"),
        ("raise type(job.env['PASSWORD'], (OSError,), {})()", "OSError at policy.py:2"),
        ("compile('1 +', job.env['PASSWORD'], 'exec')", "SyntaxError at policy.py:2"),
        ("exec(compile('1 / 0', job.env['PASSWORD'], 'exec'))", "ZeroDivisionError at policy.py:2"),
    ],
)
def test_raise_anything_in_a_policy_tells_where_and_answers_the_next(start: Start, body: str, told: str) -> None:
    source = (
        f"def decide(job, fleet):\n    if job.queue == 'good':\n        return run()\n{textwrap.indent(body, '    ')}\n"
    )
    process = start(source)
    for _ in range(2):
        with pytest.raises(PolicyFailed) as failed:
            process.ask(question())
        assert str(failed.value).partition(":")[0] == told.partition(":")[0]
        assert process.ask(question(queue="good")) == Decision("run")


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_hang_in_a_policy_is_ended_after_a_second_and_the_next_is_answered(start: Start, body: str) -> None:
    process = start(f"def decide(job, fleet):\n    if job.queue == 'good':\n        return run()\n    {body}\n")
    began_at = time.monotonic()
    with pytest.raises(PolicyFailed) as failed:
        process.ask(question())
    assert str(failed.value) == "took too long at policy.py:4"
    assert time.monotonic() - began_at >= scheduler.DECIDE_SECONDS * 0.9
    assert not process.is_over
    assert process.ask(question(queue="good")) == Decision("run")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        # It catches what ends it; it ends its process; it stops it, so that nothing there ends it.
        (
            "import time\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
            "its process has ended",
        ),
        ("import os; os._exit(0)", "its process has ended"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "took too long"),
    ],
)
def test_hang_in_a_policy_that_nothing_in_it_ends_ends_its_process(start: Start, body: str, told: str) -> None:
    process = start(f"def decide(job, fleet):\n    {body}\n")
    with pytest.raises(PolicyFailed) as failed:
        process.ask(question())
    assert str(failed.value) == f"{told} in policy.py"
    assert process.is_over
    with pytest.raises(PolicyFailed, match="its process has ended"):
        process.ask(question())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def decide(job, fleet)\n    return run()\n", "SyntaxError at policy.py:1"),
        ("import there_is_no_such_module\n", "ModuleNotFoundError at policy.py:1"),
        ("\n\nx = 1 / 0\n", "ZeroDivisionError at policy.py:3"),
        ("decide = 3\n", "TypeError at scheduler.py"),
        ("import sys; sys.exit(0)\n", "SystemExit at policy.py:1"),
    ],
)
def test_load_a_file_that_cannot_be_used_tells_what_and_where(start: Start, text: str, told: str) -> None:
    with pytest.raises(PolicyFailed) as failed:
        start(text)
    assert str(failed.value).startswith(told)


def test_load_a_file_that_hangs_ends_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "LOAD_SECONDS", 1.0)
    with pytest.raises(PolicyFailed, match="took too long in policy.py"):
        start("while True: pass\n")


# -- what its process has


def test_start_a_policy_gives_it_no_secret_no_descriptor_and_no_input(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILDKITE_AGENT_TOKEN", SECRET)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    body = """
        import os, sys
        assert "BUILDKITE_AGENT_TOKEN" not in os.environ and "CREDENTIALS_DIRECTORY" not in os.environ
        assert sys.stdin.read() == ""
        names = [name for name in os.listdir("/proc/self/fd") if name not in "012"]
        kinds = [os.readlink(f"/proc/self/fd/{name}") for name in names if os.path.exists(f"/proc/self/fd/{name}")]
        assert len(kinds) == 2 and all(kind.startswith("pipe:") for kind in kinds), kinds
        import subprocess
        theirs = subprocess.run(["ls", "/proc/self/fd"], capture_output=True, text=True).stdout.split()
        assert len(theirs) == 4, theirs
        return run()
    """
    try:
        assert answer(start, body) == Decision("run")
    finally:
        os.close(reading)
        os.close(writing)


def test_print_in_a_policy_goes_nowhere_unless_an_operator_asks(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    text = """
        import os, sys
        def decide(job, fleet):
            print(job.env["PASSWORD"])
            print(job.env["PASSWORD"], file=sys.stderr)
            os.system("echo from a shell")
            os.write(1, b'{"decision": {"verb": "refuse", "reason": "printed"}}\\n')
            return run()
    """
    assert start(text).ask(question()) == Decision("run")
    asked = start(text, keeps_printed=True)
    assert asked.ask(question()) == Decision("run")
    printed = asked.close()
    assert printed.count(SECRET) == 2
    assert "from a shell" in printed
    assert capfd.readouterr() == ("", "")


def test_print_without_end_in_a_policy_is_kept_up_to_a_bound(start: Start) -> None:
    asked = start("def decide(job, fleet):\n    while True: print('x' * 1000)\n", keeps_printed=True)
    with pytest.raises(PolicyFailed, match="took too long"):
        asked.ask(question())
    assert len(asked.close()) == scheduler.PRINTED_BYTES


def test_end_of_the_scheduler_ends_the_process(start: Start) -> None:
    process = start("def decide(job, fleet):\n    return run()\n")
    assert process._process.stdin
    process._process.send_signal(15)  # which systemd sends to all of a unit: it must not look like a fault
    assert process.ask(question()) == Decision("run")
    process._process.stdin.close()
    assert process._process.wait(10) == 0


def test_ask_with_a_spec_of_megabytes_is_answered(start: Start) -> None:
    body = "assert len(job.env['BIG']) == 4_000_000; return run()"
    assert answer(start, body, env={"BIG": "é" * 4_000_000}) == Decision("run")


def test_ask_from_several_queues_lets_the_one_that_has_waited_longest_be_next() -> None:
    turns, order = scheduler.FairLock(), []

    def take(name: str) -> None:
        with turns:
            order.append(name)

    with ThreadPoolExecutor() as threads:
        with turns:
            for number in range(3):
                threads.submit(take, f"queue {number}")
                wait_until(lambda number=number: len(turns._waiting) == number + 1)  # type: ignore[misc]
        take("the one that had it")
    assert order == ["queue 0", "queue 1", "queue 2", "the one that had it"]


# -- reasons


SPEC = scheduler.JobSpec(
    {"TOKEN": SECRET, "LINES": "first line\nsecond line", "BUILDKITE_BRANCH": "release-1", "SHORT": "abc"},
    "make all-of-it",
)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("zone b is empty", "zone b is empty"),
        (SECRET, "(a variable of the job, which is not shown)"),
        (f" {SECRET}\n", "(a variable of the job, which is not shown)"),
        ("abc", "(a variable of the job, which is not shown)"),
        ("abc is short", "abc is short"),
        (f"bad token {SECRET}!", "bad token …!"),
        (f"bad token {SECRET!r}", "bad token '…'"),
        ("bad 'first line\\nsecond line'", "bad '…'"),
        ("it runs make all-of-it", "it runs …"),
        ("branch release-1 is closed", "branch release-1 is closed"),
        ("two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
        ("it says second line", "it says …"),
        ("x" * 2000, "x" * scheduler.REASON_LETTERS),
    ],
)
def test_keep_a_reason_hides_values_of_the_job_and_what_cannot_be_printed(reason: str, told: str) -> None:
    assert scheduler.safe_reason(reason, SPEC, ["release-1"]) == told


# -- the examples

EXAMPLES = Path(scheduler.__file__).parent / "systemd" / "policies"


@pytest.fixture
def example(start: Start) -> Callable[[str], PolicyProcess]:
    return lambda name: start((EXAMPLES / name).read_text())


@pytest.mark.parametrize("text", blocks("python"))
def test_decide_by_the_policies_of_the_documents_does_what_they_say(start: Start, text: str) -> None:
    policy = start(text)
    fork = {"BUILDKITE_PULL_REQUEST_REPO": "git@github.com:stranger/app.git"}
    assert policy.ask(question(env=fork)) == LOW
    assert policy.ask(question(command="rm -rf /")) == Decision("refuse", "not on our machines: ask the platform team")
    assert policy.ask(question()) == Decision("run")


PULL = {"BUILDKITE_PULL_REQUEST": "7", "BUILDKITE_REPO": "git@github.com:ours/app.git"}
LOW = Decision("run", require=("trust=low",))


@pytest.mark.parametrize(
    ("env", "decision"),
    [
        ({"BUILDKITE_PULL_REQUEST": "false", "BUILDKITE_REPO": "git@github.com:ours/app.git"}, Decision("run")),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "https://github.com/Ours/app"}, Decision("run")),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "git://github.com/ours/app.git"}, Decision("run")),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "git://github.com/stranger/app.git"}, LOW),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "ssh://git@github.com:22/ours/app.git/"}, Decision("run")),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "git://github.com/stranger/ours/app.git"}, LOW),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "git://elsewhere.example/ours/app.git"}, LOW),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": "nonsense"}, LOW),
        (PULL | {"BUILDKITE_PULL_REQUEST_REPO": ""}, LOW),
        (PULL, LOW),
    ],
)
def test_decide_by_the_example_for_forks_sends_these_alone_to_low_trust(
    example: Callable[[str], PolicyProcess], env: dict[str, str], decision: Decision
) -> None:
    assert example("forks.py").ask(question(env=env)) == decision


def test_decide_by_the_example_for_retries_avoids_the_hosts_of_the_earlier_jobs(
    example: Callable[[str], PolicyProcess],
) -> None:
    process = example("retry_elsewhere.py")
    earlier = [
        {"uuid": "u", "host": host, "worker": f"{host}-1", "acquired": True, "ended": "ran"} for host in ("b", "a", "")
    ]
    assert process.ask(question(previous=earlier)) == Decision("run", seconds=120.0, avoid=("host=a", "host=b"))
    assert process.ask(question()) == Decision("run")


@pytest.mark.parametrize(
    ("told", "decision"),
    [
        ({}, Decision("run", require=("runtime=container",))),
        ({"pipeline": "deploy"}, Decision("run", require=("runtime=host",))),
        (
            {"env": {"BUILDKITE_PLUGINS": '[{"github.com/buildkite-plugins/docker-compose-buildkite-plugin#v5": {}}]'}},
            Decision("refuse", "only trusted pipelines use Docker on our machines: ask the platform team"),
        ),
        ({"env": {"BUILDKITE_PLUGINS": '["artifacts#v1"]'}}, Decision("run", require=("runtime=container",))),
    ],
)
def test_decide_by_the_example_for_containers_goes_by_what_the_job_would_run(
    example: Callable[[str], PolicyProcess], told: dict[str, Any], decision: Decision
) -> None:
    assert example("container_or_host.py").ask(question(**told)) == decision


def test_start_the_agent_in_a_container_passes_the_token_by_its_name_and_the_arguments_as_they_are(
    tmp_path: Path,
) -> None:
    podman = tmp_path / "podman"
    podman.write_text('#!/bin/sh\nprintf "%s\\n" "$BUILDKITE_AGENT_TOKEN" "$@"\n')
    podman.chmod(0o755)
    environ = {"PATH": os.defpath, "PODMAN": str(podman), "BUILDKITE_AGENT_TOKEN": SECRET, "AGENT_IMAGE": "agent:3"}
    arguments = [
        "start",
        "--acquire-job",
        "018f",
        "--spawn",
        "1",
        "--tags",
        "runtime=container,os=a b",
        "--name",
        "a-1",
    ]
    told = subprocess.run(
        [EXAMPLES / "agent-in-container", *arguments], env=environ, capture_output=True, text=True, check=True
    )
    token, *given = told.stdout.splitlines()
    assert token == SECRET
    assert SECRET not in given
    assert given[0] == "run"
    assert given[given.index("agent:3") + 1 :] == arguments
    assert {"--rm", "--init", "--pull=never", "--env=BUILDKITE_*", "--entrypoint=buildkite-agent"} <= {*given}


# -- rules that it adds


def by_policy(added: list[str], avoided: list[str] = [], rules: list[str] = []) -> scheduler.RuleSet:  # noqa: B006
    own = scheduler.RuleSet.of("default", rules)
    return dataclasses.replace(own, added=frozenset(added), avoided=frozenset(avoided))


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (by_policy(["trust=low", "host=a"]), "queue=default,+host=a,+trust=low"),
        (by_policy([], ["host=a"], ["arch=amd64"]), "queue=default,arch=amd64,-host=a"),
        (by_policy(["a=b,c\\d"], [], ["+x=1", "-y=2"]), "queue=default,\\+x=1,\\-y=2,+a=b\\,c\\\\d"),
        (dataclasses.replace(by_policy(["gpu=*"]), allowed=True), "allow:queue=default,+gpu=*"),
    ],
)
def test_write_added_rules_reads_as_the_same_beside_rules_that_look_so(rules: scheduler.RuleSet, text: str) -> None:
    assert str(rules) == text
    assert scheduler.RuleSet.read(text) == rules


@pytest.mark.parametrize(
    ("rules", "suited"),
    [
        (by_policy(["host=a"]), ["a-1", "a-2"]),
        (by_policy(["worker=b-1"]), ["b-1"]),
        (by_policy(["host=*"]), ["a-1", "a-2", "b-1"]),
        (by_policy(["trust=low"]), ["a-2"]),
        (by_policy(["trust=*", "host=b"]), []),
        (by_policy([], ["host=a"]), ["b-1", ""]),
        (by_policy([], ["trust=*"]), ["a-1", "b-1", ""]),
    ],
)
def test_match_added_rules_finds_workers_by_host_and_name_too(rules: scheduler.RuleSet, suited: list[str]) -> None:
    plain, low = scheduler.Profile.of("queue=default"), scheduler.Profile.of("queue=default,trust=low")
    named = [("a-1", plain, "a"), ("a-2", low, "a"), ("b-1", plain, "b"), ("", plain, "")]
    workers = [scheduler.Worker(name, "s", profile, host=host) for name, profile, host in named]
    assert [worker.name for worker in workers if rules.suits(worker)] == suited
    # A job's own rule of that name asks for a tag.
    assert not plain.matches(scheduler.RuleSet.of("default", ["host=a"]))
