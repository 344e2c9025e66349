"""Each row of the table for those who come from Screwdriver's queue service, in real processes, by its command and its
route. All rows are asked of one scheduler."""

from __future__ import annotations

import datetime
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import StackProcesses, agent_path, wait_until
from test_commands import ask_stack
from test_deaths import until_file
from test_docs import table_after

WEBHOOK = {"X-Buildkite-Token": "hook-secret"}
PERIODIC = '[[periodic]]\nname = "nightly"\npipeline = "app"\ncron = "0 0 1 1 *"\nzone = "UTC"\n'
FREEZE = '[[freeze]]\nname = "a century"\nbranches = ["release"]\nfrom = 2000-01-01\nuntil = 2100-01-01\nzone = "UTC"\n'


class Verbs(StackProcesses):
    """A scheduler that looks for jobs by itself once in a quarter of a minute, and one worker."""

    def __init__(self, fake: FakeBuildkite, directory: Path):
        self.stack_file = directory / "stack.toml"
        self.stack_file.write_text('organization = "acme"\n')
        settings = {
            "STACK_FILE": str(self.stack_file),
            "BUILDKITE_API_TOKEN": fake.api_token,
            "BUILDKITE_API_ENDPOINT": fake.rest_url,
            "BUILDKITE_GRAPHQL_ENDPOINT": fake.graphql_url,
            "WEBHOOK_TOKEN": WEBHOOK["X-Buildkite-Token"],
            "POLL_INTERVAL": "60s",
        }
        super().__init__(fake, directory, agent_path("fake"), **settings)
        fake.add_pipeline("app")

    def add(self, **about: Any) -> str:
        """A job that Buildkite schedules, and tells of."""
        uuid = self.fake.add_job(**about)
        self.tell_of(uuid)
        return uuid

    def tell_of(self, uuid: str) -> None:
        """Have Buildkite's webhook tell of a job, and wait until it was listed."""
        told = {"event": "job.scheduled", "job": {"id": uuid, "agent_query_rules": self.fake.jobs[uuid].rules}}
        assert requests.post(f"{self.url}/webhook", json=told, headers=WEBHOOK, timeout=30).status_code == 200
        wait_until(lambda: "state" in self.job(uuid))

    def add_waiting(self, **about: Any) -> str:
        """One that no worker can run."""
        uuid = self.add(rules=["queue=default", "gpu=a100"], **about)
        wait_until(lambda: self.job(uuid)["state"] == "ready")
        return uuid

    def get(self, path: str) -> Any:
        return requests.get(f"{self.url}{path}", timeout=30).json()

    def ran(self, *words: str) -> dict[str, Any]:
        """What the command answers; it is done."""
        status, told = ask_stack(self, *words)
        assert status == 0, told
        return told

    def reload(self, text: str) -> None:
        self.stack_file.write_text(f'organization = "acme"\n{text}')
        assert self.scheduler
        self.scheduler.send_signal(signal.SIGHUP)

    def names(self) -> list[str]:
        """Those of the schedules, as the command and the route tell them."""
        by_command, by_route = (
            [row["name"] for row in told["periodic"]] for told in (self.ran("periodic"), self.get("/periodic"))
        )
        assert by_command == by_route
        return by_route


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verbs]:
    with FakeBuildkite() as fake, Verbs(fake, tmp_path_factory.mktemp("verbs")) as stack:
        stack.start_scheduler()
        stack.start_worker("w1").wait_for_line("started")
        yield stack


def start(stack: Verbs) -> None:
    began = datetime.datetime.now(datetime.UTC).timestamp()
    uuid = stack.add()
    stack.fake.wait_for(lambda: stack.fake.jobs[uuid].state == "finished", timeout=30)
    listed = [call.at for call in stack.fake.calls_to("list") if call.at >= began]
    assert listed[0] - began < 5  # it did not wait for its next look by itself
    assert uuid in [job["uuid"] for job in stack.ran("jobs", "--state", "done")["jobs"]]


def stop_queued(stack: Verbs) -> None:
    uuids = [stack.add_waiting() for _ in range(2)]
    assert stack.ran("stop", uuids[0], "--note", "wrong branch")["reachable"]
    told = requests.post(f"{stack.url}/jobs/{uuids[1]}/stop", json={"note": "wrong branch"}, timeout=30).json()
    assert told["reachable"]
    for uuid in uuids:
        stack.fake.wait_for(lambda uuid=uuid: stack.fake.jobs[uuid].state == "finished", timeout=30)  # type: ignore[misc]
        assert stack.fake.jobs[uuid].happened("acquired") == 0
        assert (stack.fake.jobs[uuid].finish_detail or "").endswith(": wrong branch")


def stop_running(stack: Verbs) -> None:
    for by_command in (True, False):
        uuid = stack.add(command=until_file(stack.directory / "never"))
        wait_until(lambda uuid=uuid: stack.job(uuid)["state"] == "running")  # type: ignore[misc]
        if by_command:
            stack.ran("stop", uuid, "--note", "it hangs")
        else:
            requests.post(f"{stack.url}/jobs/{uuid}/stop", json={"note": "it hangs"}, timeout=30)
        stack.fake.wait_for(lambda uuid=uuid: stack.fake.jobs[uuid].state == "canceled", timeout=30)  # type: ignore[misc]
        assert stack.fake.jobs[uuid].happened("cancel_requested") == 1


def status(stack: Verbs) -> None:
    assert stack.ran("status")["wrong"] == []
    assert stack.get("/health")["problems"] == []
    stack.reload("[[periodc]]\n")
    wait_until(lambda: stack.get("/health")["problems"])
    wait_until(lambda: ask_stack(stack, "status")[0] == 2)
    _, told = ask_stack(stack, "status")
    assert "periodc is not a key; the nearest is periodic" in str(told["wrong"])
    stack.reload("")
    wait_until(lambda: not stack.get("/health")["problems"])


def stats(stack: Verbs) -> None:
    uuid = stack.add_waiting()
    (waiting,) = (row for row in stack.get("/stats")["waiting"] if "gpu=a100" in row["rules"])
    assert (waiting["why"], waiting["jobs"]) == ("no_worker", 1)

    def told() -> dict[str, str | None]:
        return {job["uuid"]: job.get("why") for job in stack.ran("jobs", "--queue", "default")["jobs"]}

    wait_until(lambda: told().get(uuid) == "no_worker")
    stack.ran("stop", uuid, "--note", "enough")
    wait_until(lambda: stack.job(uuid)["state"] == "done")


def start_periodic(stack: Verbs) -> None:
    stack.reload("")
    wait_until(lambda: not stack.get("/periodic")["periodic"])
    stack.reload(PERIODIC)
    wait_until(lambda: stack.get("/periodic")["periodic"])
    assert stack.names() == ["nightly"]
    assert stack.get("/periodic")["periodic"][0]["next_at"].endswith("-01-01T00:00:00.000Z")


def run_periodic(stack: Verbs) -> None:
    """Its job is handed out like any other."""
    stack.reload(PERIODIC)
    wait_until(lambda: stack.get("/periodic")["periodic"])
    stack.fake.build_command = "echo nightly"
    told = stack.ran("run", "nightly", "--note", "again, with the mend")
    assert told["build"]["url"].startswith("https://buildkite.com/acme/app/builds/")
    answer = requests.post(f"{stack.url}/periodic/nightly/run", json={"note": "and again"}, timeout=30).json()
    wait_until(lambda: (stack.get("/periodic")["periodic"][0]["build"] or {}).get("mark") == answer["mark"])
    made = [build for build in stack.fake.builds.values() if build.pipeline == "app"]
    assert [build.message.partition(": ")[2] for build in made] == ["again, with the mend", "and again"]
    for build in made:
        for job in stack.fake.jobs_of(build):
            stack.tell_of(job.uuid)
        stack.fake.wait_for(lambda build=build: stack.fake.build_state(build) == "passed", timeout=60)  # type: ignore[misc]
    acts = [(act["act"], act["target"], act["note"]) for act in stack.get("/fleet")["acts"]]
    assert acts[:2] == [("run", "periodic:nightly", "and again"), ("run", "periodic:nightly", "again, with the mend")]
    code, refused = ask_stack(stack, "run", "nigthly", "--note", "x")
    assert (code, refused["error"], "the nearest: nightly" in refused["message"]) == (1, "unknown_periodic", True)


def stop_periodic(stack: Verbs) -> None:
    stack.reload(PERIODIC)
    wait_until(lambda: stack.get("/periodic")["periodic"])
    assert stack.names() == ["nightly"]
    stack.reload("")
    wait_until(lambda: not stack.get("/periodic")["periodic"])
    assert stack.names() == []


def frozen(stack: Verbs) -> None:
    """Also the jobs of periodic builds."""
    stack.reload(FREEZE + PERIODIC + 'branch = "release"\n')
    wait_until(lambda: stack.get("/freezes")["freezes"] and stack.get("/periodic")["periodic"])
    stack.fake.build_command = "echo nightly"
    before = {*stack.fake.jobs}
    stack.ran("run", "nightly", "--note", "it is to be held")
    (uuid,) = {*stack.fake.jobs} - before
    stack.tell_of(uuid)
    wait_until(lambda: stack.job(uuid).get("why") == "frozen")
    assert stack.ran("freezes") == stack.get("/freezes")
    assert [(row["name"], row["jobs"]) for row in stack.get("/freezes")["freezes"]] == [("a century", 1)]
    assert stack.fake.jobs[uuid].state == "reserved"
    stack.reload("")
    stack.fake.wait_for(lambda: stack.fake.jobs[uuid].state == "finished", timeout=30)


def force_start(stack: Verbs) -> None:
    stack.reload(FREEZE)
    wait_until(lambda: stack.get("/freezes")["freezes"])
    uuids = [stack.add(branch="release") for _ in range(3)]
    for uuid in uuids:
        wait_until(lambda uuid=uuid: stack.job(uuid).get("why") == "frozen")  # type: ignore[misc]
    stack.ran("allow", uuids[0], "--note", "hotfix")
    requests.post(f"{stack.url}/jobs/{uuids[1]}/allow", json={"note": "hotfix"}, timeout=30)
    for uuid in uuids[:2]:
        stack.fake.wait_for(lambda uuid=uuid: stack.fake.jobs[uuid].state == "finished", timeout=30)  # type: ignore[misc]
    assert stack.job(uuids[2])["why"] == "frozen"
    stack.reload("")
    stack.fake.wait_for(lambda: stack.fake.jobs[uuids[2]].state == "finished", timeout=30)


#: By the first cell of a row: its test, and what it uses.
VERBS: dict[str, tuple[Callable[[Verbs], None], str, str]] = {
    "start": (start, "jobs", "POST /webhook"),
    "stop, of a build that is queued": (stop_queued, "stop <job> --note TEXT", "POST /jobs/{uuid}/stop"),
    "stop, of a build that runs": (stop_running, "stop <job> --note TEXT", "POST /jobs/{uuid}/stop"),
    "`GET /v1/status`": (status, "status", "GET /health"),
    "`GET /v1/queue/stats`": (stats, "jobs", "GET /stats"),
    "start periodic": (start_periodic, "periodic", "GET /periodic"),
    "a periodic build now": (run_periodic, "run <name> --note TEXT", "POST /periodic/{name}/run"),
    "stop periodic": (stop_periodic, "periodic", "GET /periodic"),
    "frozen": (frozen, "freezes", "GET /freezes"),
    "`[force start]` in the message": (force_start, "allow <job> --note TEXT", "POST /jobs/{uuid}/allow"),
}


def test_read_table_of_screwdrivers_verbs_has_the_rows_that_are_tried() -> None:
    rows = {verb: (command, route) for verb, _, command, route in table_after("verb")}
    assert rows == {verb: (f"`{command}`", f"`{route}`") for verb, (_, command, route) in VERBS.items()}


@pytest.mark.parametrize("verb", VERBS)
def test_do_what_a_verb_of_screwdrivers_did_by_command_and_route(stack: Verbs, verb: str) -> None:
    VERBS[verb][0](stack)
