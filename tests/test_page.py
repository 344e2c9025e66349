"""The page, in a real Chromium, served by a real scheduler.

It shows what is, every act changes what a worker then gets, and nothing that came from outside becomes anything but
text. The workers are made up: they ask over HTTP, as real ones do.
"""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from fake_buildkite import FakeBuildkite
from processes import ROOT, Process, StackProcesses, program, wait_until
from scheduler import JobState, Outcome, WorkerState
from test_browser import LOAD, SEND, Site, browser, site

__all__ = ["browser", "site"]  # fixtures

PAGE = (ROOT / "page.html").read_text()
#: Seconds within which what is waited for is seen: the page asks every two seconds.
PATIENCE = 20.0
WORKER, OPERATOR, VIEWER = "worker-secret", "operator-secret", "viewer-secret"
#: Each test has a queue of its own, so that one scheduler serves all of them.
QUEUES = [f"q{number}" for number in range(30)]
#: Whose jobs these are, and a window that holds those of the last queue.
STACK_FILE = f"""
organization = "acme"
[[freeze]]
name = "the long night"
queues = ["{QUEUES[-1]}"]
from = 2026-01-01
until = 2099-01-01
zone = "UTC"
"""
#: Text that does harm where it is taken for HTML, and long enough to break a line.
HOSTILE = '<img src=x onerror="window.harm=1">'


# --- A scheduler, workers, and somebody who looks ---


class MadeUp:
    """A worker without an agent: it claims, and says what a test wants it to."""

    def __init__(self, stack: StackProcesses, name: str, queue: str, host: str = "", tags: str = ""):
        self.queue = queue
        self.stack, self.name, self.query = stack, name, f"queue={queue}" + (f",{tags}" if tags else "")
        self.headers = {
            "Authorization": f"Bearer {WORKER}",
            "X-Worker-ID": name,
            "X-Worker-Session": f"session of {name}",
            "X-Worker-Host": host or name,
            "X-Worker-Machine": f"machine of {host or name}",
        }

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(method, self.stack.url + path, headers=self.headers, timeout=PATIENCE, **options)

    def claim(self, wait: float = 0) -> str:
        """The job that it is given, by its uuid; empty for none."""
        answer = self.ask("GET", "/jobs", params={"query": self.query, "wait": wait})
        assert answer.status_code in (200, 204), answer.text
        if answer.status_code == 204:
            return ""
        job = answer.json()
        self.claimed: str = job["claim"]
        uuid: str = job["uuid"]
        return uuid

    def claims(self, uuid: str) -> None:
        """It is given this job, as soon as the scheduler has it."""
        wait_until(lambda: self.claim() == uuid)

    def say(self, state: str, reason: str) -> None:
        body = {"agent": "3.137.0", "state": state, "reason": reason}
        assert self.ask("POST", f"/workers/{self.name}", json=body).status_code == 200

    def complete(self, uuid: str, exit_status: int = 0) -> None:
        body = {"claim": self.claimed, "exit_status": exit_status}
        assert self.ask("POST", f"/jobs/{uuid}/complete", json=body).status_code == 200


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeBuildkite]:
    # Each queue is listed on its own, which is more than Buildkite would take.
    with FakeBuildkite(queues=QUEUES, rate_limits=False) as fake:
        yield fake


def serve(fake: FakeBuildkite, directory: Path, queues: list[str]) -> StackProcesses:
    settings = {"STACK_API_TOKEN": WORKER, "OPERATOR_TOKEN": OPERATOR, "VIEWER_TOKEN": VIEWER}
    (directory / "stack.toml").write_text(STACK_FILE)
    settings |= {"SCHEDULER_QUEUES": ",".join(queues), "STACK_FILE": str(directory / "stack.toml")}
    return StackProcesses(fake, directory, "/bin/false", **settings)


@pytest.fixture(scope="module")
def stack(fake: FakeBuildkite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackProcesses]:
    with serve(fake, tmp_path_factory.mktemp("stack"), QUEUES) as stack:
        stack.start_scheduler()
        yield stack


NUMBERS = itertools.count()


@pytest.fixture
def queue() -> str:
    return QUEUES[next(NUMBERS)]


@pytest.fixture
def worker(stack: StackProcesses, queue: str) -> MadeUp:
    """A worker of the test's queue, which the scheduler knows, on a host of its own."""
    worker = MadeUp(stack, f"{queue}-1", queue, f"host-{queue}")
    assert worker.claim() == ""
    return worker


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Look]]:
    """Opens the page of a scheduler, in a tab that has a token."""

    def open_page(stack: StackProcesses, view: str = "", token: str = OPERATOR) -> Look:
        browser.get(f"{stack.url}/health")
        script = "sessionStorage.clear(); if (arguments[0]) sessionStorage.setItem('token', arguments[0]);"
        browser.execute_script(script + "sessionStorage.setItem('name', 'ann@laptop')", token)
        browser.get(f"{stack.url}/{view}")
        return Look(browser, stack)

    yield open_page
    browser.get("about:blank")  # so that it asks no scheduler that is gone


class Look:
    """The open page, and somebody who clicks on it."""

    def __init__(self, browser: Any, stack: StackProcesses):
        self.browser, self.stack = browser, stack

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def text(self, css: str) -> str:
        """What stands in the first such element that is shown; empty while there is none."""
        found: str = self.js(
            "const e = [...document.querySelectorAll(arguments[0])].find(e => e.checkVisibility());"
            "return e ? e.textContent : ''",
            css,
        )
        return found

    def sees(self, css: str, text: str = "") -> None:
        wait_until(lambda: text in self.text(css) and self.has(css), f"{css} does not say {text!r}: {self.text(css)!r}")

    def has(self, css: str) -> bool:
        return bool(self.js("return document.querySelector(arguments[0])", css))

    def click(self, css: str) -> None:
        wait_until(lambda: self.has(css), f"there is no {css}")
        self.js("document.querySelector(arguments[0]).click()", css)

    def act(self, verb: str, target: str, note: str = "", seconds: str = "", **also: str) -> str:
        """Do an act as a person does: the button, the dialog, and what the server answered."""
        self.click(f'[data-act="{verb}"][data-target="{target}"]')
        self.sees("#ask[open]")
        for name, value in (also | {"note": note, "duration": seconds}).items():
            if value:
                self.js("document.querySelector('#ask-form').elements[arguments[0]].value = arguments[1]", name, value)
        self.click("#ask-form .primary")
        wait_until(lambda: self.text("#answer"), "the server has not answered")
        answer = self.text("#answer")
        self.click("#ask-form [data-close]")
        return answer

    def ask(self, method: str, path: str, token: str = OPERATOR, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(method, self.stack.url + path, headers=headers, timeout=PATIENCE, **options)

    def hold(self, target: str) -> dict[str, Any]:
        """The one hold of a target."""
        holds: list[dict[str, Any]] = []

        def is_told() -> bool:  # the fleet is written once a second
            holds[:] = [hold for hold in self.ask("GET", "/fleet").json()["holds"] if hold["target"] == target]
            return bool(holds)

        wait_until(is_told)
        (hold,) = holds
        return hold


def state_of(page: Look, uuid: str) -> str:
    told: str = page.ask("GET", f"/jobs/{uuid}").json().get("state", "")
    return told


def row_of(worker: MadeUp, css: str) -> str:
    return f'#hosts tr:has([data-view="worker"][data-value="{worker.name}"]) {css}'


@pytest.fixture
def job(stack: StackProcesses, queue: str) -> str:
    """A job that is ready, in the test's queue."""
    return ready(stack, queue)


def ready(stack: StackProcesses, queue: str, **fields: Any) -> str:
    uuid = stack.fake.add_job(queue, **fields)
    url, key = f"{stack.url}/jobs/{uuid}", {"Authorization": f"Bearer {OPERATOR}"}
    wait_until(lambda: requests.get(url, headers=key, timeout=PATIENCE).json().get("state") == "ready")
    return uuid


# --- Acts: each changes what a worker then gets ---


def test_pause_of_a_worker_until_a_time_keeps_jobs_from_it_until_it_is_resumed(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, queue: str
) -> None:
    page, target = look(stack), f"worker:{worker.name}"
    page.click(f'[data-act="pause"][data-target="{target}"]')
    page.sees("#binds", "It holds 1 worker, 1 host now, and later ones that match.")
    page.click("#ask-form [data-close]")
    answer = page.act("pause", target, "disk swap", "1800")
    assert answer.startswith(f"Done: {target} is paused by ann@laptop since ")
    hold = page.hold(target)
    assert (hold["by"], hold["note"], hold["reason"]) == ("ann@laptop", "disk swap", "paused")
    lasts = datetime.fromisoformat(hold["until"]) - datetime.fromisoformat(hold["since"])
    assert lasts.total_seconds() == 1800
    page.sees(row_of(worker, ".state.paused"), "paused")
    uuid = ready(stack, queue)
    assert worker.claim() == ""
    assert page.act("resume", target).startswith(f"Done: {target} was paused by ann@laptop")
    worker.claims(uuid)


@pytest.mark.long
def test_drain_of_a_host_says_how_many_jobs_are_left_and_when_none_is(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    worker.claims(job)
    page, target = look(stack), f"host:{worker.headers['X-Worker-Host']}"
    assert page.act("drain", target, "new kernel").startswith(f"Done: {target} is drained by ann@laptop")
    held = f"#held li:has([data-target='{target}'])"
    page.sees(held, "new kernel (1 job left)")
    stack.fake.set_state(job, "finished")
    worker.complete(job)
    page.sees(held, "new kernel (no job runs there any more)")
    another = ready(stack, worker.queue)
    assert worker.claim() == ""
    page.act("resume", target)
    worker.claims(another)


@pytest.mark.long
def test_pause_of_a_queue_and_allow_of_one_job_hands_out_that_job_alone(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, queue: str, job: str
) -> None:
    another, page = ready(stack, queue), look(stack)
    assert "It holds 1 queue, 2 jobs now" in page.act("pause", f"queue:{queue}", "recabling")
    page.sees("#tiles", f"queue {queue} held")
    assert worker.claim() == ""
    assert page.act("allow", f"job:{another}", "a release").startswith("Done: holds of operators")
    worker.claims(another)
    worker.complete(another)
    assert worker.claim() == ""
    page.act("resume", f"queue:{queue}")
    worker.claims(job)


@pytest.mark.long
def test_pause_of_a_tag_that_is_typed_says_what_it_binds_and_what_is_unknown(
    look: Callable[..., Look], stack: StackProcesses, queue: str
) -> None:
    tagged = MadeUp(stack, f"{queue}-t", queue, tags=f"gpu={queue}")
    assert tagged.claim() == ""
    page, target = look(stack), f"tag:gpu={queue}"
    assert page.act("pause", "", "thermal", what=f"tag:gpu={queue}x").startswith("Refused (404): nothing here matches")
    assert "It holds 1 worker, 1 host now" in page.act("pause", "", "thermal", what=target)
    uuid = ready(stack, queue)
    assert tagged.claim() == ""
    page.act("resume", target)
    tagged.claims(uuid)


@pytest.mark.long
def test_stop_of_a_waiting_job_finishes_it_with_the_note_and_hands_it_to_nobody(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    page = look(stack, f"#job={job}")
    page.sees("#panel h2", "demo #1")
    assert page.act("stop", f"job:{job}", "wrong branch") == "Done: the scheduler finishes it at Buildkite"
    wait_until(lambda: state_of(page, job) == "done")
    assert worker.claim() == ""
    page.sees("#panel", "wrong branch")
    page.sees("#panel .stopped", "stopped")
    wait_until(lambda: not page.has(f'[data-act="stop"][data-target="job:{job}"]'), "it can still be stopped")


@pytest.mark.long
def test_first_of_a_job_hands_it_out_before_an_older_one(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, queue: str, job: str
) -> None:
    younger, page = ready(stack, queue), look(stack)
    assert page.act("first", f"job:{younger}", "a release") == "Done: it is first in line"
    worker.claims(younger)
    worker.complete(younger)
    worker.claims(job)


@pytest.mark.long
def test_forget_of_a_worker_takes_it_off_the_page_until_it_claims_again(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp
) -> None:
    page = look(stack)
    assert page.act("forget", f"worker:{worker.name}").startswith("Done: ")
    wait_until(lambda: not page.has(row_of(worker, "td")))
    assert worker.claim() == ""
    page.sees(row_of(worker, "td"))


@pytest.mark.long
def test_act_that_is_refused_shows_what_the_server_said_and_changes_nothing(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    page = look(stack)
    page.sees(f'[data-act="first"][data-target="job:{job}"]')
    page.js("window.fetch = (path, options) => Promise.reject(new TypeError('the line is cut'))")
    answer = page.act("first", f"job:{job}", "a release")
    assert answer == (
        "Refused (no answer): no answer: the line is cut. It may or may not be done: look, then try again."
    )
    worker.claims(job)


def test_open_page_with_a_viewer_s_token_is_read_only_and_the_server_refuses_acts(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    page = look(stack, f"#job={job}", VIEWER)
    page.sees("#role", "read-only")
    page.sees("#panel", "Its life")
    page.sees(row_of(worker, "td"))
    assert not page.has("[data-act]")
    body = {"target": f"worker:{worker.name}", "note": "none"}
    for path, said in (("/holds", body), (f"/jobs/{job}/stop", {"note": "none"})):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {VIEWER}"}
        options = {"method": "POST", "body": json.dumps(said), "headers": headers}
        _, status, text = page.browser.execute_async_script(SEND, path, options)
        assert (status, "OPERATOR_TOKEN" in text) == (403, True)
    worker.claims(job)


# --- The token ---


@pytest.mark.long
def test_token_that_is_typed_is_kept_for_its_tab_alone(look: Callable[..., Look], stack: StackProcesses) -> None:
    page = look(stack, token="")
    page.sees("#ask[open]", "OPERATOR_TOKEN may act")
    page.sees("#gone", "The scheduler requires a token")
    page.js("const f = document.getElementById('ask-form'); f.elements.token.value = arguments[0]", "not it")
    page.click("#ask-form .primary")
    page.sees("#ask[open]", "Token")
    page.js("const f = document.getElementById('ask-form'); f.elements.token.value = arguments[0]", OPERATOR)
    page.click("#ask-form .primary")
    page.sees("#role", "operator")
    assert not page.js("return document.getElementById('gone').checkVisibility()")
    kept = page.js("return [localStorage.length, document.cookie, location.href.includes(arguments[0])]", OPERATOR)
    assert kept == [0, "", False]
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    try:
        page.browser.get(f"{stack.url}/")
        page.sees("#ask[open]", "Token")
        assert page.text("#hosts") == ""
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)


# --- What comes from outside stays text ---


def test_show_hostile_names_notes_and_reasons_keeps_them_text(
    look: Callable[..., Look], stack: StackProcesses, queue: str
) -> None:
    worker = MadeUp(stack, f"{HOSTILE}{queue}", queue, f"{HOSTILE}-{queue}", f"t={HOSTILE}")
    worker.claim()
    worker.say("no_agent", f"{HOSTILE} it cannot be run")
    fields = {"pipeline": HOSTILE, "branch": HOSTILE, "step_key": HOSTILE}
    uuid = ready(stack, queue, rules=[f"queue={queue}", f"os={HOSTILE}"], **fields)
    page = look(stack, f"#job={uuid}")
    body = {"target": f"queue:{queue}", "note": f"{HOSTILE} note"}
    assert page.ask("POST", "/holds", json=body).status_code == 200
    page.sees("#held", f"{HOSTILE} note")
    page.sees("#hosts", f"{HOSTILE} it cannot be run")
    page.sees("#hosts h3", f"{HOSTILE}-{queue}")
    page.sees("#jobs", f"{HOSTILE} #1 {HOSTILE}")
    page.sees("#panel h2", f"{HOSTILE} #1 {HOSTILE}")
    page.sees("#panel", f"os={HOSTILE}")
    page.click(f'[data-act="stop"][data-target="job:{uuid}"]')
    page.sees("#ask-title", HOSTILE)
    page.click("#ask-form [data-close]")
    assert page.js("return [window.harm, document.images.length, document.scripts.length]") == [None, 0, 1]
    page.ask("DELETE", f"/holds/queue:{queue}")


@pytest.mark.long
def test_show_words_that_the_page_does_not_know_shows_them_as_they_are(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    """A newer scheduler may have states and reasons that this page has never heard of."""
    page = look(stack)
    page.sees(row_of(worker, "td"))
    page.js(
        """
        const real = window.fetch;
        window.fetch = async (path, options) => {
          const answer = await real(path, options);
          if (path !== "/fleet" || answer.status !== 200) return answer;
          const fleet = await answer.json();
          const worker = fleet.hosts.flatMap(host => host.workers).find(worker => worker.name === arguments[0]);
          worker.state = "moon_struck";
          fleet.counts.workers.moon_struck = 1;
          fleet.jobs.find(job => job.uuid === arguments[1]).why = "the_moon";
          fleet.holds.push({ target: "moon:full", owner: "moon", reason: "eclipsed", by: "", note: "" });
          return new Response(JSON.stringify(fleet), { headers: answer.headers });
        };
        """,
        worker.name,
        job,
    )
    assert page.ask("POST", f"/jobs/{job}/allow", json={"note": "news"}).status_code == 200
    page.sees(row_of(worker, ".state"), "moon struck")
    page.sees("#tiles", "Moon struck workers1")
    page.sees("#jobs", "the moon")
    page.sees("#held", "moon:full: eclipsed by moon")


@pytest.fixture
def in_tokyo(browser: Any) -> Iterator[None]:
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    yield
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


@pytest.mark.long
def test_show_of_a_freeze_window_says_how_many_jobs_it_holds_until_when_by_the_clock_of_who_looks(
    look: Callable[..., Look], stack: StackProcesses, in_tokyo: None
) -> None:
    uuid = ready(stack, QUEUES[-1])
    page = look(stack, f"#job={uuid}")
    page.sees("#held", "freeze window the long night: until 2099-01-01 09:00:00, 1 job held")
    page.sees("#tiles", "1 frozen")
    card = f'#queues .card:has([data-target="queue:{QUEUES[-1]}"])'
    page.sees(card, "freeze window the long night: until 2099-01-01 09:00:00")
    other = f'#queues .card:has([data-target="queue:{QUEUES[0]}"])'
    assert "freeze window" not in page.text(other)
    page.sees("#panel", "holds it until 2099-01-01 09:00:00")
    page.sees("#panel", "waits: frozen")
    page.sees(f'#jobs tr:has([data-value="{uuid}"])', "frozen")


@pytest.mark.long
def test_show_of_a_job_leads_to_its_address_at_buildkite(
    look: Callable[..., Look], stack: StackProcesses, job: str
) -> None:
    page = look(stack, f"#job={job}")
    address = f'a[href="https://buildkite.com/acme/demo/builds/1#{job}"][rel="noreferrer"]'
    page.sees(f"#panel {address}", "at Buildkite")
    page.sees(f"#jobs {address}", "at Buildkite")


# --- Other origins, and what the page itself may do ---


@pytest.mark.long
def test_page_of_another_origin_can_neither_act_nor_read_nor_frame_it(
    browser: Any, site: Site, stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    browser.get(f"http://127.0.0.1:{site.port}/")
    key = {"Authorization": f"Bearer {OPERATOR}", "Content-Type": "application/json"}
    body = json.dumps({"target": f"worker:{worker.name}", "note": "harm"})
    for path, options in (
        ("/", {}),
        ("/fleet", {"headers": key}),
        ("/history", {"headers": key}),
        ("/holds", {"method": "POST", "headers": key, "body": body}),
        ("/holds", {"method": "POST", "mode": "no-cors", "body": body}),
        (f"/jobs/{job}/stop", {"method": "POST", "headers": key, "body": body}),
    ):
        _, status, text = browser.execute_async_script(SEND, stack.url + path, options)
        assert (status, "Agent stack" in text, worker.name in text) == (0, False, False), path
    browser.execute_async_script(LOAD, "iframe", f"{stack.url}/")
    browser.switch_to.frame(0)
    assert "Agent stack" not in browser.page_source
    browser.switch_to.default_content()
    worker.claims(job)


WATCH_POLICY = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event => violations.push(event.violatedDirective));
"""


@pytest.fixture
def watched(browser: Any) -> Iterator[None]:
    """Every page that is opened counts what its policy forbade, in `violations`."""
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH_POLICY})
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def use_all_of_it(page: Look, worker: MadeUp, job: str) -> None:
    page.sees(row_of(worker, "td"))
    page.sees("#timeline svg")
    page.sees("#panel", "Its life")
    page.click(f'[data-act="pause"][data-target="worker:{worker.name}"]')
    page.sees("#binds", "It holds 1 worker")
    page.click("#ask-form [data-close]")
    for which in ("leased", "running", "done", "waiting"):
        page.click(f'#job-states [data-value="{which}"]')
        page.sees(f'#job-states [data-value="{which}"][aria-pressed="true"]')


@pytest.mark.long
def test_use_of_the_page_breaks_no_rule_of_its_policy_which_blocks_a_script_put_into_it(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str, watched: None
) -> None:
    page = look(stack, f"#job={job}")
    use_all_of_it(page, worker, job)
    assert page.js("return violations") == []
    put = "const s = document.createElement('script'); s.textContent = 'window.harm = 1'; document.body.append(s);"
    page.js(put + "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harm=1\">')")
    wait_until(lambda: {"script-src-elem", "script-src-attr"} <= set(page.js("return violations")))
    assert page.js("return window.harm") is None


@pytest.mark.long
def test_use_of_the_page_asks_nobody_but_its_scheduler(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, job: str
) -> None:
    page = look(stack, f"#job={job}")
    page.browser.get_log("performance")  # what was before
    page.browser.refresh()
    use_all_of_it(page, worker, job)
    told = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in told if m["method"] == "Network.requestWillBeSent"}
    asked -= {url for url in asked if url.startswith("data:")}
    assert {f"{stack.url}/", f"{stack.url}/fleet", f"{stack.url}/health"} <= asked
    assert [url for url in asked if not url.startswith(f"{stack.url}/")] == []


# --- For everybody ---


def axe() -> str:
    """axe-core's script, whose path AXE_CORE is: CI installs it, a home that has none skips."""
    path = os.environ.get("AXE_CORE", "")
    if not path:
        why = "AXE_CORE names no axe.min.js; `npm install axe-core` has one"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return Path(path).read_text()


def scheme(page: Look, name: str) -> None:
    features = {"features": [{"name": "prefers-color-scheme", "value": name}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)


@pytest.fixture
def narrow(browser: Any) -> Iterator[None]:
    """The narrowest telephone."""
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def trouble(stack: StackProcesses, queue: str) -> str:
    """A job that waits in a fleet where something of each kind is wrong."""
    for number in (1, 2):
        worker = MadeUp(stack, f"{queue}-a-{number}", queue, f"host-a-{queue}", f"os=linux,long={'x' * 200}")
        worker.claim()
    worker.say("no_agent", "there is no buildkite-agent at " + "/a" * 90)
    running = ready(stack, queue, rules=[f"queue={queue}", "os=linux"])
    MadeUp(stack, f"{queue}-b", queue, tags="os=linux").claims(running)
    uuid = ready(stack, queue, rules=[f"queue={queue}", f"os={'y' * 200}"], scheduled_at=time.time() - 900)
    body = {"target": f"queue:{queue}", "note": "n" * 300}
    headers = {"Authorization": f"Bearer {OPERATOR}"}
    assert requests.post(f"{stack.url}/holds", json=body, headers=headers, timeout=PATIENCE).status_code == 200
    return uuid


@pytest.fixture
def axed(look: Callable[..., Look], stack: StackProcesses, trouble: str) -> Iterator[Look]:
    source = axe()
    page = look(stack, f"#job={trouble}")
    page.sees("#panel", "Its life")
    page.sees("#timeline svg")
    page.js(source)
    yield page
    scheme(page, "")


AXE_RUN = """
const done = arguments[0];
axe.run(document, { resultTypes: ["violations"] }).then(
  told => done(told.violations.map(each => [each.id, each.nodes.map(node => node.html.slice(0, 200))])),
  error => done([["error", String(error)]]));
"""


@pytest.mark.long
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_on_the_page_its_panel_and_its_dialogs(axed: Look, trouble: str, colours: str) -> None:
    scheme(axed, colours)
    assert axed.browser.execute_async_script(AXE_RUN) == []
    axed.click(f'[data-act="stop"][data-target="job:{trouble}"]')
    axed.sees("#ask[open]")
    assert axed.browser.execute_async_script(AXE_RUN) == []
    axed.click("#ask-form [data-close]")
    axed.js("location.hash = '#jobs=done&hours=1'")
    axed.click("#sign")
    axed.sees("#ask[open]", "Token")
    assert axed.browser.execute_async_script(AXE_RUN) == []


@pytest.mark.long
def test_axe_finds_nothing_on_a_telephone(axed: Look, narrow: None) -> None:
    axed.js("location.hash = ''")
    assert axed.browser.execute_async_script(AXE_RUN) == []


@pytest.mark.long
def test_nothing_scrolls_sideways_on_the_narrowest_telephone(
    look: Callable[..., Look], stack: StackProcesses, trouble: str, narrow: None
) -> None:
    page = look(stack)
    page.sees("#jobs", "no worker")
    page.sees("#timeline svg")
    wide = """
      const shown = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility());
      const over = shown.filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("svg, .spoken"));
      return [innerWidth, document.documentElement.scrollWidth, over.map(e => e.outerHTML.slice(0, 120))];
    """
    assert page.js(wide) == [360, 360, []]
    for view, shown in ((f"#job={trouble}", "#panel ol"), ("#jobs=leased", "#jobs td")):
        page.js("location.hash = arguments[0]", view)
        page.sees(shown)
        wait_until(lambda: page.js("return document.getAnimations().length") == 0)
        assert page.js(wide) == [360, 360, []]
    page.js("location.hash = ''")
    page.click("#held-note [data-act=pause]")
    page.sees("#ask[open]")
    assert page.js("const d = document.getElementById('ask'); return [d.scrollWidth <= d.clientWidth, innerWidth]") == [
        True,
        360,
    ]


# --- Live ---


def test_update_keeps_focus_selection_and_scroll(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, queue: str
) -> None:
    page = look(stack)
    page.sees(row_of(worker, "td"))
    page.browser.set_window_size(1000, 500)
    page.js(
        """
        const row = document.querySelector(arguments[0]), button = row.querySelector("[data-act=drain]");
        window.kept = { row, button };
        getSelection().selectAllChildren(row.querySelector("a"));
        button.focus({ preventScroll: true });
        scrollTo(0, 150);
        """,
        f"#hosts tr:has([data-value='{worker.name}'])",
    )
    beside = MadeUp(stack, f"{queue}-2", queue, f"host-{queue}")
    assert beside.claim() == ""
    page.sees(row_of(beside, "td"))
    assert page.js(
        "return [kept.row.isConnected, document.activeElement === kept.button, String(getSelection()), scrollY]"
    ) == [True, True, worker.name, 150]


@pytest.mark.long
def test_page_in_a_hidden_tab_asks_nothing_until_it_is_seen_again(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp
) -> None:
    page = look(stack)
    page.sees(row_of(worker, "td"))
    page.js(
        """
        window.asked = 0; window.when = [];
        const real = window.fetch;
        window.fetch = (...all) => { asked += 1; return real(...all); };
        // Called before the page's own.
        addEventListener("visibilitychange", () => when.push([document.visibilityState, asked]), true);
        """
    )
    wait_until(lambda: page.js("return asked") > 1)
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    # Twice the pause between two questions about the fleet: what does not happen cannot be waited for.
    page.browser.execute_async_script("setTimeout(arguments[0], 4500)")
    page.browser.close()
    page.browser.switch_to.window(first)
    wait_until(lambda: len(page.js("return when")) == 2)
    (hidden, before), (seen, after) = page.js("return when")
    assert (hidden, seen, after - before) == ("hidden", "visible", 0)
    wait_until(lambda: page.js("return asked") > after)


@pytest.mark.long
def test_kill_of_the_scheduler_is_told_and_what_it_said_stays_dimmed_until_it_is_back(
    look: Callable[..., Look], tmp_path: Path
) -> None:
    with FakeBuildkite(queues=["default"]) as fake, serve(fake, tmp_path, ["default"]) as stack:
        scheduler = stack.start_scheduler()
        worker = MadeUp(stack, "w1", "default")
        assert worker.claim() == ""
        page = look(stack)
        page.sees(row_of(worker, "td"))
        scheduler.send_signal(signal.SIGKILL)
        scheduler.ended()
        page.sees("#gone", "The scheduler does not answer since ")
        assert re.search(r"since \d\d:\d\d:\d\d \(\d+ s\)", page.text("#gone"))
        page.sees("#live", "not live")
        page.sees(row_of(worker, "td"), "w1")
        assert float(page.js("return getComputedStyle(document.getElementById('shown')).opacity")) < 1
        stack.start_scheduler()
        beside = MadeUp(stack, "w2", "default")
        assert beside.claim() == ""
        page.sees(row_of(beside, "td"))
        page.sees("#live", "live, ")
        assert page.js("return [document.getElementById('gone').hidden, document.body.className]") == [True, ""]


# --- A view is an address ---


@pytest.mark.long
def test_open_address_of_a_view_shows_it(
    look: Callable[..., Look], stack: StackProcesses, worker: MadeUp, queue: str
) -> None:
    other = MadeUp(stack, f"{queue}-o", queue, f"other-{queue}")
    assert other.claim() == ""
    job = ready(stack, queue)
    shown = "#hosts .host"
    page = look(stack, f"#host=host-{queue}")
    page.sees(f"{shown} h3", f"host-{queue}")
    assert page.js("return document.querySelectorAll(arguments[0]).length", shown) == 1
    page = look(stack, f"#find={queue}-o")
    page.sees(row_of(other, "td"))
    assert page.js("return document.querySelectorAll(arguments[0]).length", shown) == 1
    assert page.js("return document.getElementById('find').value") == f"{queue}-o"
    page = look(stack, f"#worker={worker.name}")
    page.sees("#hosts tr.chosen a", worker.name)
    page = look(stack, f"#job={job}")
    page.sees("#panel .uuid", job)
    page = look(stack, f"#jobs=running&hours=6&find={queue}")
    page.sees('#job-states [aria-pressed="true"]', "running")
    page.sees('#hours [aria-pressed="true"]', "6 h")
    worker.claims(job)
    stack.fake.set_state(job, "running")
    page.sees("#jobs", worker.name)


@pytest.mark.long
def test_click_and_back_change_the_address_and_the_view(
    look: Callable[..., Look], stack: StackProcesses, job: str
) -> None:
    page = look(stack)
    page.click(f'#jobs [data-view="job"][data-value="{job}"]')
    page.sees("#panel", "Its life")
    assert page.js("return [location.hash, document.activeElement.id]") == [f"#job={job}", "panel"]
    page.js("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
    wait_until(lambda: not page.js("return document.getElementById('panel').checkVisibility()"))
    assert page.js("return document.activeElement.dataset.value") == job
    page.js("history.back()")
    page.sees("#panel", "Its life")


# --- The file ---


def test_scheduler_without_its_page_says_so_and_does_all_else(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "scheduler.py", alone)
    with FakeBuildkite(queues=["default"]) as fake, serve(fake, tmp_path, ["default"]) as stack:
        settings = {
            "STACK_KEY": "test",
            "LISTEN": f"127.0.0.1:{stack.port}",
            "STATE_DIRECTORY": str(tmp_path / "state"),
        }
        environment = stack.environment(**settings, **stack.scheduler_settings)
        started = Process([sys.executable, str(alone / "scheduler.py")], environment, tmp_path, tmp_path / "log")
        stack.schedulers[0] = started
        started.wait_for_line("started")
        answer = requests.get(f"{stack.url}/", timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]) == (404, "no_page")
        assert f"{alone / 'page.html'}: No such file or directory; copy page.html" in answer.json()["message"]
        worker = MadeUp(stack, "w1", "default")
        worker.claims(fake.add_job("default"))
        for path in ("/fleet", "/history", "/stats"):
            told = requests.get(stack.url + path, headers={"Authorization": f"Bearer {VIEWER}"}, timeout=PATIENCE)
            assert told.status_code == 200


#: Elements that the script makes.
MADE_IDS = re.findall(r'\bid: "([a-z-]+)"', PAGE)


class Outline(html.parser.HTMLParser):
    """What a page's elements are: which are open, which ids there are, and what refers to one."""

    EMPTY = ("meta", "link", "input", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.named: set[str] = set()
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attributes:
            if name == "style" or name.startswith("on"):
                self.wrong.append(f"<{tag} {name}>: the policy allows none")
            if name in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.wrong.append(f"<{tag} {name}={value}> is loaded from elsewhere")
            if name == "id":
                self.ids.append(value or "")
            if name in ("for", "aria-labelledby", "data-to"):
                self.named.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()} closes nothing")


def outline(text: str) -> Outline:
    parsed = Outline()
    parsed.feed(text)
    parsed.close()
    return parsed


def test_read_page_is_whole_html_that_loads_nothing() -> None:
    page = outline(PAGE)
    assert (page.wrong, page.open) == ([], [])
    assert sorted(set(page.ids)) == sorted(page.ids)
    assert page.named <= {*page.ids, *MADE_IDS}
    assert PAGE.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("<p></b>", "closes nothing"),
        ("<p style='x'></p>", "the policy allows none"),
        ("<script src='https://a'></script>", "is loaded from elsewhere"),
    ],
)
def test_read_html_that_is_not_right_says_what_is_wrong(wrong: str, what: str) -> None:
    assert any(what in each for each in outline(wrong).wrong)


def test_read_script_of_the_page_is_javascript_whose_every_element_is_there(tmp_path: Path) -> None:
    (script,) = re.findall("<script>(.*?)</script>", PAGE, re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    done = subprocess.run(
        [program("node"), "--check", "page.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r'\$\("([a-z-]+)"\)', script)) <= {*outline(PAGE).ids, *MADE_IDS}
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "eval(" not in script


def test_read_script_of_the_page_uses_every_function_and_class_of_its_own() -> None:
    """What nobody calls any more goes."""
    (script,) = re.findall("<script>(.*?)</script>", PAGE, re.DOTALL)
    (style,) = re.findall("<style>(.*?)</style>", PAGE, re.DOTALL)
    names = re.findall(r"^(?:async )?function\*? ([A-Za-z$]+)", script, re.MULTILINE)
    assert [name for name in names if len(re.findall(rf"(?<![\w$]){re.escape(name)}(?![\w$])", script)) < 2] == []
    body = PAGE.partition("</style>")[2]
    selectors = set(re.findall(r"\.([a-z][a-z-]+)", re.sub(r"\{[^{}]*\}", "{}", style)))
    told = {*WorkerState, *JobState, *Outcome, "drained", "unfit", "offline", "succeeded"}
    assert [name for name in sorted(selectors - told) if not re.search(rf"\b{name}\b", body)] == []
