#!/usr/bin/env python3
"""Makes the pictures of the page beside this file: a fleet that has each kind of trouble, in light and in dark.

    .venv/bin/python tests/screenshots/make.py        needs chromium and chromedriver; takes about three minutes

The scheduler and its store are real, Buildkite and the workers are made up. What ran in the hours before is
written into the store by its own verbs, with times of then.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import requests  # noqa: E402

from conftest import Clock, make_settings, open_sqlite  # noqa: E402
from fake_buildkite import FakeBuildkite  # noqa: E402
from processes import StackProcesses, program, wait_until  # noqa: E402
from scheduler import Dispatcher, Finding, Job, JobFinding, Profile, Worker, rfc3339  # noqa: E402
from test_page import OPERATOR, PATIENCE, WORKER, MadeUp  # noqa: E402

QUEUES = ["default", "linux", "devices", "deploy"]
STACK_FILE = """
organization = "acme"
[[freeze]]
name = "no deploys over the holidays"
queues = ["deploy"]
from = 2026-01-01
until = 2099-01-01
zone = "UTC"
"""
#: Slots, as (name, host, queue, tags).
LINUX = [(f"linux-{host}-{n}", f"linux-{host}", "linux", "arch=amd64") for host in (1, 2, 3, 4) for n in (1, 2, 3, 4)]
RACK = [("rack3-fpga-1", "rack3", "devices", "board=fpga"), ("rack3-phone-1", "rack3", "devices", "board=phone")]
MACS = [("mac-1", "mac-1", "default", "os=mac"), ("mac-2", "mac-2", "default", "os=mac")]
GONE = [("old-1", "old", "default", "os=windows")]
STEPS = ("lint", "unit", "browser", "package", "docs")


class Past:
    """What ran before the scheduler was started."""

    def __init__(self, directory: Path, hours: float):
        self.clock, self._hours = Clock(), hours
        self.clock._now = time.time() - hours * 3600
        self.store = open_sqlite(make_settings(directory / "scheduler"))
        self.dispatcher = Dispatcher(self.store, self.clock.now)
        self.random = random.Random(21)
        self._holds: dict[str, str] = {}

    def write(self, slots: list[tuple[str, str, str, str]]) -> None:
        events: list[tuple[float, Callable[[], None]]] = []
        for slot in slots:
            at = time.time() - self._hours * 3600 + self.random.uniform(0, 1200)
            while True:
                waits, runs = self.random.uniform(20, 500), self.random.choice([180, 300, 420, 900, 1500])
                if at + waits + runs > time.time() - 300:
                    break
                events.append((at, lambda slot=slot: self._put(slot)))  # type: ignore[misc]
                events.append((at + waits, lambda slot=slot: self._claim(slot)))  # type: ignore[misc]
                events.append((at + waits + runs, lambda slot=slot: self._end(slot)))  # type: ignore[misc]
                at += waits + runs + self.random.choice([5, 5, 30, 900])
        for at, event in sorted(events, key=lambda each: each[0]):
            self.clock._now = at
            event()
        self.dispatcher.stop()
        self.store.close()

    def _put(self, slot: tuple[str, str, str, str]) -> None:
        now = self.clock.now()
        raw = {
            "id": str(uuid_of(self.random)),
            "agent_query_rules": [f"queue={slot[2]}", slot[3]],
            "scheduled_at": rfc3339(now),
            "pipeline": {"slug": "app"},
            "build": {"number": 400 + int(now) % 97, "branch": "main"},
            "step": {"key": self.random.choice(STEPS)},
        }
        job = Job.from_api(slot[2], raw, now)
        self.store.put([job], self.store.sequence(), now)
        self.store.confirm([job.uuid], self.store.sequence(), now + 900, now)

    def _claim(self, slot: tuple[str, str, str, str]) -> None:
        name, host, queue, tags = slot
        worker = Worker(name, "before", Profile.of(f"queue={queue},{tags}"), host=host, machine=host)
        if job := self.dispatcher.claim(worker, 0.0, lambda: False):
            self._holds[name] = job.uuid
            self._learn(job.uuid, Finding.ACQUIRED, "running")

    def _end(self, slot: tuple[str, str, str, str]) -> None:
        if uuid := self._holds.pop(slot[0], ""):
            self._learn(uuid, Finding.OVER, "finished")

    def _learn(self, uuid: str, finding: Finding, word: str) -> None:
        self.store.learn({uuid: JobFinding(finding, word, "")}, self.store.sequence(), self.clock.now())


def uuid_of(source: random.Random) -> str:
    digits = f"{source.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class Keeper:
    """Keeps made-up workers as they are: those with a job touch it, those without wait for one."""

    def __init__(self, stack: StackProcesses):
        self.stack, self._ended = stack, threading.Event()
        self._threads: list[threading.Thread] = []

    def keep(self, once: Callable[[], object]) -> None:
        def work() -> None:
            while not self._ended.is_set():
                try:
                    once()
                except (requests.RequestException, AssertionError):
                    return  # the scheduler is stopped
                self._ended.wait(0.5)

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def end(self) -> None:
        self._ended.set()


def introduce(worker: MadeUp, state: str = "idle", reason: str = "", until: str = "2099-01-01") -> None:
    body = {"agent": "3.137.0", "agent_supported_until": until, "state": state, "reason": reason}
    worker.ask("POST", f"/workers/{worker.name}", json=body)


def trouble(stack: StackProcesses, fake: FakeBuildkite, keeper: Keeper) -> str:
    """Makes the fleet. Returns a job that nobody can run."""
    workers = {slot[0]: MadeUp(stack, slot[0], slot[2], slot[1], slot[3]) for slot in (*LINUX, *RACK, *MACS)}
    for worker in workers.values():
        worker.claim()
        introduce(worker)
    free = ("linux-2-3", "linux-2-4", "linux-3-")
    busy = [worker for name, worker in workers.items() if name.startswith("linux-") and not name.startswith(free)]
    for number, worker in enumerate(busy):
        uuid = fake.add_job(
            "linux", ["queue=linux", "arch=amd64"], pipeline="app", build_number=481, step_key=STEPS[number % 5]
        )
        worker.claims(uuid)
        fake.set_state(uuid, "running")
        keeper.keep(lambda w=worker, u=uuid: w.ask("POST", f"/jobs/{u}/touch", json={"claim": w.claimed}))  # type: ignore[misc]
    keeper.keep(
        lambda: introduce(workers["mac-2"], "unfit", "/var/lib/stack-worker has 310 MB free of the 1 GiB that it needs")
    )
    for title, body in (
        ("host:linux-3", {"note": "disk swap", "seconds": 7200}),
        ("host:linux-2", {"note": "new kernel", "reason": "drained"}),
        ("queue:devices", {"note": "recabling the rack"}),
    ):
        act(stack, {"target": title, **body})
    job = fake.add_job("default", ["queue=default", "os=mac"], pipeline="app", build_number=482, step_key="mac")
    for index in range(18):
        fake.add_job("linux", ["queue=linux", "arch=amd64"], pipeline="app", build_number=483 + index, step_key="unit")
    fake.add_job("devices", ["queue=devices", "board=fpga"], pipeline="firmware", build_number=12, step_key="flash")
    fake.add_job("deploy", ["queue=deploy"], pipeline="app", build_number=480, step_key="deploy")
    lost = fake.add_job(
        *("default", ["queue=default", "os=linux", "gpu=a100"]),
        **{"pipeline": "models", "build_number": 77, "step_key": "train", "scheduled_at": time.time() - 900},  # type: ignore[arg-type]
    )
    for worker in workers.values():
        if worker not in busy and not worker.name.startswith("mac"):
            keeper.keep(lambda w=worker: w.ask("GET", "/jobs", params={"query": w.query, "wait": 5}))  # type: ignore[misc]
    # The worker that was last heard of hours ago counts as gone two minutes after the scheduler's start.
    wait_until(lambda: "offline" in states(stack), "no worker is offline", 180)
    # One whose agents end before they acquire a job.
    for _ in range(4):
        wait_until(lambda: workers["mac-1"].claim() == job)
        workers["mac-1"].complete(job, 1)
    return lost


def states(stack: StackProcesses) -> set[str]:
    headers = {"Authorization": f"Bearer {OPERATOR}"}
    fleet = requests.get(f"{stack.url}/fleet", headers=headers, timeout=PATIENCE).json()
    return {worker["state"] for host in fleet["hosts"] for worker in host["workers"]}


def act(stack: StackProcesses, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {OPERATOR}", "X-Operator": "ann@build1"}
    requests.post(f"{stack.url}/holds", json=body, headers=headers, timeout=PATIENCE).raise_for_status()


@contextmanager
def chromium() -> Iterator[Any]:
    from selenium import webdriver  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def take(browser: Any, stack: StackProcesses, job: str) -> None:
    where = Path(__file__).resolve().parent

    def open_page(view: str, colours: str, width: int, height: int) -> None:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get("about:blank")
        browser.get(f"{stack.url}/{view}")
        wait_until(lambda: browser.execute_script("return document.querySelector('#timeline svg rect')"))

    browser.get(f"{stack.url}/health")
    browser.execute_script("sessionStorage.setItem('token', arguments[0])", OPERATOR)
    browser.execute_script("sessionStorage.setItem('name', 'ann@laptop')")
    for name, view, colours, width, height, section in (
        ("fleet-light", "", "light", 1100, 900, ""),
        ("fleet-dark", "", "dark", 1100, 900, ""),
        ("job-light", f"#job={job}", "light", 1100, 620, ""),
        ("timeline-dark", "#hours=3", "dark", 1100, 640, "timeline-title"),
        ("telephone-light", "", "light", 390, 844, ""),
    ):
        open_page(view, colours, width, height)
        if section:
            browser.execute_script("document.getElementById(arguments[0]).scrollIntoView()", section)
        if "job=" in view:
            wait_until(lambda: browser.execute_script("return document.querySelector('#panel ol li')"))
        browser.execute_async_script("setTimeout(arguments[0], 600)")
        browser.save_screenshot(str(where / f"{name}.png"))
        print(f"{name}.png: {(where / f'{name}.png').stat().st_size // 1000} KB")


def main() -> None:
    with ExitStack() as stack_of, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "stack.toml").write_text(STACK_FILE)
        Past(place, 3.2).write([*LINUX, *RACK, *MACS, *GONE])
        fake = stack_of.enter_context(FakeBuildkite(queues=QUEUES))
        settings = {"SCHEDULER_QUEUES": ",".join(QUEUES), "STACK_FILE": str(place / "stack.toml")}
        settings |= {"STACK_API_TOKEN": WORKER, "OPERATOR_TOKEN": OPERATOR}
        stack = stack_of.enter_context(StackProcesses(fake, place, "/bin/false", **settings))
        stack.start_scheduler()
        keeper = Keeper(stack)
        stack_of.callback(keeper.end)
        job = trouble(stack, fake, keeper)
        wait_until(lambda: {"failing", "unfit", "offline", "paused", "working", "idle"} <= states(stack))
        with chromium() as browser:
            take(browser, stack, job)


if __name__ == "__main__":
    main()
