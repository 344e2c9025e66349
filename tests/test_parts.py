"""A part of the scheduler is a class and a line: its thread, routes, metrics and problems are there with it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import scheduler
from conftest import Clock, make_settings, sqlite_only
from scheduler import Answer, Api, Part, PeriodicTask, Refusal, Request, Route, Settings, Store
from test_api import PATIENCE, Bench


class Bells(Part):
    """What a feature adds."""

    def __init__(self, now: Callable[[], float]):
        self.rung: list[tuple[str, str]] = []
        self.has_ticked = threading.Event()
        self.tasks = [PeriodicTask("bells", self.tick, now)]

    @property
    def problems(self) -> list[str]:
        return [*super().problems, *(f"bell {name} is cracked" for name, _ in self.rung if name == "old")]

    def metrics(self, now: float) -> Iterable[Any]:
        return [scheduler.gauge("stack_bells", "Bells rung.", [], [((), len(self.rung))])]

    def tick(self, now: float) -> float:
        self.has_ticked.set()
        raise scheduler.BuildkiteError("no bell tower")

    def show(self, request: Request) -> Answer:
        """GET /bells"""
        return Answer(200, {"rung": len(self.rung)})

    def ring(self, request: Request) -> Answer:
        """POST /bells/{name}/ring {"note"}"""
        if request.named == "none":
            raise Refusal("there is no bell none", status=404, code="unknown_bell")
        self.rung.append((request.named, request.text("note")))
        return Answer(200, {"name": request.named})

    def page(self, request: Request) -> Answer:
        """GET /belfry"""
        return Answer(200, b"<p>Bells</p>", {"Content-Type": "text/html; charset=utf-8"})

    routes = (
        Route("GET", "/belfry", page, scheduler.ANYONE),
        Route("GET", "/bells", show, scheduler.VIEWER),
        Route("POST", "/bells/{name}/ring", ring, scheduler.OPERATORS),
    )


@pytest.fixture
def bells(clock: Clock) -> Bells:
    return Bells(clock.now)


@pytest.fixture
def bench(store: Store, clock: Clock, settings: Callable[..., Settings], bells: Bells) -> Iterator[Bench]:
    with Bench(store, clock, settings(), token="worker-token") as bench:
        bench.server.operator_tokens = ["operator-token"]
        bench.server.api = Api(store, bench.dispatcher, {}, settings(), clock.now, parts=[bells])
        yield bench


def bearer(party: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {party}-token"}


@sqlite_only
def test_call_route_of_a_part_serves_it_to_whom_it_names_and_nobody_else(bench: Bench, bells: Bells) -> None:
    ring = ("POST", "/bells/big%20one/ring", {"note": "noon"})
    assert bench.call(*ring, bearer("operator")).json == {"name": "big one"}
    assert bench.call(*ring, bearer("worker")).refusal == (403, "operators_only")
    assert bench.call(*ring).refusal == (401, "unauthorized")
    assert bells.rung == [("big one", "noon")]
    assert bench.call("GET", "/bells", headers=bearer("worker")).json == {"rung": 1}
    assert bench.call("HEAD", "/bells", headers=bearer("worker")).status == 200
    page = bench.call("GET", "/belfry")
    assert (page.status, page.headers["Content-Type"], page.text) == (200, "text/html; charset=utf-8", b"<p>Bells</p>")
    refused = bench.call("POST", "/bells/none/ring", {"note": "noon"}, bearer("operator"))
    assert refused.refusal == (404, "unknown_bell")
    wrong = bench.call("DELETE", "/bells/old/ring", headers=bearer("operator"))
    assert (wrong.refusal, wrong.headers["Allow"]) == ((405, "method_not_allowed"), "POST")


@sqlite_only
@pytest.mark.parametrize("path", ["/bells/", "/bells//ring", "/bells/old", "/bells/old/ring/loud", "/bells/{}/{}"])
def test_call_path_like_that_of_a_part_is_not_found(bench: Bench, path: str) -> None:
    assert bench.call("GET", path, headers=bearer("operator")).refusal == (404, "not_found")


@sqlite_only
def test_add_part_whose_route_another_serves_is_refused(
    store: Store, clock: Clock, settings: Callable[..., Settings], bells: Bells
) -> None:
    with pytest.raises(ValueError, match="both serve GET /"):
        Api(store, scheduler.Dispatcher(store, clock.now), {}, settings(), clock.now, parts=[bells, Bells(clock.now)])


@sqlite_only
def test_read_problems_and_metrics_of_a_part_beside_all_others(bench: Bench, bells: Bells) -> None:
    assert bench.call("GET", "/health").json["problems"] == []
    bench.call("POST", "/bells/old/ring", {"note": "noon"}, bearer("operator"))
    assert bench.call("GET", "/health").json["problems"] == ["bell old is cracked"]
    metrics = bench.call("GET", "/metrics", headers=bearer("worker")).text.decode()
    assert re.search(r"^stack_bells 1\.0$", metrics, re.MULTILINE)
    assert "stack_store_up 1.0" in metrics


def test_start_scheduler_with_one_more_part_runs_it_and_tells_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the last part, which the scheduler has in one line."""
    monkeypatch.setattr(scheduler, "ClusterMetrics", lambda _, now: Bells(now))
    settings = make_settings(tmp_path, LISTEN="127.0.0.1:0", BUILDKITE_AGENT_ENDPOINT="http://127.0.0.1:1/v3")
    with ExitStack() as stack:
        whole = scheduler.Scheduler(settings, {})
        stack.callback(whole._store.close)
        stack.enter_context(closing(whole._servers[0].socket))
        for connection in (whole._woken, whole._waker):
            stack.enter_context(closing(connection))
        (bells,) = (part for part in whole._api.parts if isinstance(part, Bells))
        (duty,) = (duty for duty in whole._tasks if duty.name == "bells")
        duty.start()
        stack.callback(duty.join, PATIENCE)
        stack.callback(duty.stop)
        assert bells.has_ticked.wait(PATIENCE)
        assert whole._servers[0].api.served["/bells"]["GET"] == (bells, Bells.routes[1])
