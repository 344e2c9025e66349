"""The monitor: jobs outside of clusters, listed by GraphQL, taken without a reservation, each once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import graphql
import pytest

import scheduler
from conftest import Clock
from fake_buildkite import FakeBuildkite, node_id
from scheduler import (
    Api,
    BuildkiteError,
    GraphApi,
    Intake,
    Job,
    Leadership,
    Monitor,
    Points,
    Settings,
    Store,
    Watched,
)
from test_api import PATIENCE, W1, W2, Bench, Connection, Reply

NOW = 1_800_000_000.0
FIELDS = [scheduler.STATE_FIELDS, scheduler.SPEC_FIELDS, scheduler.NEW_JOB_FIELDS]
QUERIES = {
    "organization": scheduler.ORGANIZATION_QUERY,
    "pipeline by slug": scheduler.PIPELINE_BY_SLUG,
    "pipeline by id": scheduler.PIPELINE_BY_ID,
    "list": scheduler.LIST_QUERY,
    **{f"count {n}": scheduler.count_query(n) for n in (1, scheduler.MONITOR_SCOPES)},
    **{f"{fields[:5]} of {n}": scheduler.jobs_query(n, fields) for fields in FIELDS for n in (1, 100)},
}


@pytest.fixture
def fake() -> Iterator[FakeBuildkite]:
    """With a pipeline in the cluster, and two outside of it."""
    with FakeBuildkite() as buildkite:
        buildkite.add_pipeline("demo")
        for slug in ("app", "docs"):
            buildkite.add_pipeline(slug, clustered=False)
        yield buildkite


@pytest.fixture
def watch(fake: FakeBuildkite) -> Callable[..., Monitor]:
    """A monitor of these pipelines."""

    def made(*pipelines: str, queue: str = "legacy", organization: str = "acme") -> Monitor:
        api = GraphApi(fake.graphql_url, lambda: fake.api_token)
        api._pace = scheduler.RateLimiter(1000)
        return Monitor(api, organization, Watched(pipelines=pipelines, queue=queue))

    return made


def all_pages(monitor: Monitor) -> list[scheduler.ListPage]:
    """What one poll lists, page by page."""
    pages = [monitor.list_jobs(None, NOW)]
    while pages[-1].next_cursor:
        pages.append(monitor.list_jobs(pages[-1].next_cursor, NOW))
    return pages


def listed(monitor: Monitor) -> list[str]:
    return [job.uuid for page in all_pages(monitor) for job in page.jobs]


def cost_of(fake: FakeBuildkite, act: Callable[[], object]) -> tuple[int, int]:
    """How many calls something makes, and how many points they cost."""
    calls, points = len(fake.calls_to("graphql")), fake.points_used
    act()
    return len(fake.calls_to("graphql")) - calls, fake.points_used - points


# --- What is asked ---


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_ask_only_what_is_valid_in_buildkites_schema(query: str) -> None:
    schema = graphql.build_schema((Path(__file__).parent / "buildkite.graphql").read_text())
    assert graphql.validate(schema, graphql.parse(query)) == []
    assert graphql.validate(
        schema, graphql.parse(query.replace("{ id", "{ idd").replace("uuid", "idd").replace("state", "idd"))
    )


# --- List ---


def test_list_gives_what_the_stacks_api_would_of_each_job_outside_of_clusters(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    fake.add_job(pipeline="demo")
    uuid = fake.add_job(
        pipeline="app", build_number=7, branch="fix", rules=["arch=arm64"], priority=3, step_key="test",
        scheduled_at=NOW - 60,
    )  # fmt: skip
    [page] = all_pages(watch())
    [job] = page.jobs
    build = fake.all_builds["app", 7]
    assert (job.uuid, job.queue_key, job.agent_query_rules) == (uuid, "legacy", ("arch=arm64",))
    assert (job.priority, job.scheduled_at) == (3, NOW - 60)
    assert job.about == {
        "pipeline": {"slug": "app", "uuid": fake.pipelines["app"].uuid},
        "build": {"uuid": build.uuid, "number": 7, "branch": "fix"},
        "step": {"key": "test"},
    }
    assert (page.paused, page.skipped) == (None, [])


def test_list_takes_jobs_of_its_queue_of_default_and_of_none_alone(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    ours = [fake.add_job(pipeline="app", rules=rules) for rules in ([], ["queue=default"], ["queue=legacy", "os=mac"])]
    fake.add_job(pipeline="app", rules=["queue=mac"])
    monitor = watch()
    assert sorted(listed(monitor)) == sorted(ours)
    assert listed(monitor) == []  # the fourth is counted, and known


def test_list_reads_all_pages_and_then_counts_alone_until_something_is_new(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    uuids = {fake.add_job(pipeline="app", build_number=n % 7) for n in range(230)}
    monitor = watch()
    pages = all_pages(monitor)
    assert [len(page.jobs) for page in pages] == [100, 100, 30]
    assert {job.uuid for page in pages for job in page.jobs} == uuids
    assert cost_of(fake, lambda: all_pages(monitor)) == (1, 4)
    new = {fake.add_job(pipeline="docs")}
    assert cost_of(fake, lambda: new.difference_update(listed(monitor)))[0] == 3  # a count, a page, what is new
    assert not new


def test_list_of_many_new_jobs_uses_no_more_than_half_of_the_points(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    fake.points = {"RateLimit": 20_000, "RateLimit-User": 1000}
    uuids = [fake.add_job(pipeline="app") for _ in range(200)]
    monitor, got = watch(), list[str]()
    while not monitor.pause():
        got += [job.uuid for job in monitor.list_jobs(None, NOW).jobs]
    assert 30 <= len(got) < len(uuids)
    assert fake.points_used + len(got) * scheduler.JOB_POINTS <= 600  # a page begun is read to its end


def test_list_without_jobs_costs_a_call_of_two_points(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    monitor = watch()
    all_pages(monitor)
    assert cost_of(fake, lambda: all_pages(monitor)) == (1, 2)


def test_list_watches_the_named_pipelines_alone_by_slug_and_by_id(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    fake.add_pipeline("web", clustered=False)
    app, docs, _ = (fake.add_job(pipeline=slug) for slug in ("app", "docs", "web"))
    monitor = watch("app", node_id("Pipeline", fake.pipelines["docs"].uuid))
    assert sorted(listed(monitor)) == sorted([app, docs])
    monitor.use(Watched(pipelines=("app",), queue="legacy"))
    monitor._whole_list_at = 0.0
    assert listed(monitor) == [app]


def test_reload_of_the_pipelines_while_they_are_looked_for_watches_the_new_ones(
    fake: FakeBuildkite, watch: Callable[..., Monitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_pipeline("old", clustered=False)
    uuid = fake.add_job(pipeline="app")
    monitor = watch("old")
    find = monitor._found

    def reloaded(names: Sequence[str]) -> list[scheduler.Scope]:
        found = find(names)
        monitor.use(Watched(pipelines=("app",), queue="legacy"))
        return found

    monkeypatch.setattr(monitor, "_found", reloaded)
    monitor.register()
    monkeypatch.undo()
    assert listed(monitor) == [uuid]


@pytest.mark.parametrize("state", ["running", "failing", "scheduled", "canceling", "blocked"])
def test_list_takes_jobs_of_builds_that_go_on_alone(
    fake: FakeBuildkite, watch: Callable[..., Monitor], state: str
) -> None:
    fake.add_build("app", 1, forced_state=state)
    uuid = fake.add_job(pipeline="app")
    assert listed(watch()) == ([uuid] if state in ("running", "failing", "scheduled") else [])


def test_list_tells_which_jobs_have_left_it(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    uuids = [fake.add_job(pipeline="app") for _ in range(3)]
    monitor = watch()
    assert {uuid for page in all_pages(monitor) for uuid in page.gone} == set()
    fake.cancel_job(uuids[1])
    assert {uuid for page in all_pages(monitor) for uuid in page.gone} == {uuids[1]}
    again = fake.all_jobs[uuids[1]]
    fake.set_state(again.uuid, "scheduled")
    assert again.uuid in listed(monitor)


def test_list_of_many_is_not_read_again_because_one_has_left_until_it_is_time(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    uuids = [fake.add_job(pipeline="app") for _ in range(scheduler.MONITOR_PAGE + 1)]
    monitor = watch()
    all_pages(monitor)
    fake.cancel_job(uuids[1])
    assert cost_of(fake, lambda: all_pages(monitor)) == (1, 4)
    monitor._whole_list_at = 0.0
    assert {uuid for page in all_pages(monitor) for uuid in page.gone} == {uuids[1]}


def test_list_finds_a_job_that_came_as_another_went(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    first, _ = (fake.add_job(pipeline="app") for _ in range(2))
    monitor = watch()
    all_pages(monitor)
    fake.cancel_job(first)
    new = fake.add_job(pipeline="app")
    assert new in listed(monitor)


def test_list_that_grows_shorter_is_not_read_whole_again_and_again(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    """As while workers take jobs, of which the states tell."""
    uuids = [fake.add_job(pipeline="app") for _ in range(20)]
    monitor = watch()
    all_pages(monitor)
    fake.cancel_job(uuids[1])
    assert cost_of(fake, lambda: all_pages(monitor))[0] == 2
    fake.cancel_job(uuids[2])
    assert cost_of(fake, lambda: all_pages(monitor))[0] == 1


def test_list_finds_a_job_that_was_created_before_those_that_wait(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    first = fake.add_job(pipeline="app", state="waiting")
    taken, last = (fake.add_job(pipeline="app") for _ in range(2))
    monitor = watch()
    assert sorted(listed(monitor)) == sorted([taken, last])
    fake.set_state(taken, "running")  # and its place in the count is another's
    monitor.states([taken])
    fake.set_state(first, "scheduled")
    assert first in listed(monitor)


def test_list_goes_on_without_a_pipeline_that_is_not_there_until_it_is(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    uuid = fake.add_job(pipeline="app")
    monitor = watch("app", "web")
    assert listed(monitor) == [uuid]
    [problem] = monitor.problems
    assert "pipeline web of [monitor]: Buildkite shows no such pipeline of acme" in problem
    fake.add_pipeline("web", clustered=False)
    later = fake.add_job(pipeline="web")
    monitor._whole_list_at = 0.0
    assert later in listed(monitor)
    assert monitor.problems == []


def test_list_that_fails_between_its_pages_goes_on_where_it_was(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    uuids = {fake.add_job(pipeline="app") for _ in range(150)}
    monitor = watch()
    got = {job.uuid for job in monitor.list_jobs(None, NOW).jobs}
    fake.set_fault("graphql", status=502, times=1)
    with pytest.raises(BuildkiteError, match=r"list on queue legacy: 502"):
        monitor.list_jobs(None, NOW)
    assert got | set(listed(monitor)) == uuids


# --- Jobs by their uuids ---


def test_reserve_names_the_jobs_that_no_agent_has(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    free, taken, over, odd = (fake.add_job(pipeline="app") for _ in range(4))
    for uuid, state in ((taken, "running"), (over, "canceled"), (odd, "limited")):
        fake.set_state(uuid, state)
    unknown = "018f0000-0000-4000-8000-000000000000"
    monitor = watch()
    assert monitor.reserve([free, taken, over, odd, unknown], 900) == ({free}, {taken, over, odd, unknown})
    assert monitor.states([free, taken, over, unknown]) == {free: "scheduled", taken: "running", over: "canceled"}
    assert fake.jobs[free].state == "scheduled"  # nothing was reserved


def test_finish_cancels_a_job_that_waits_and_leaves_one_alone_that_an_agent_has(
    fake: FakeBuildkite, watch: Callable[..., Monitor]
) -> None:
    waits, runs = (fake.add_job(pipeline="app") for _ in range(2))
    fake.set_state(runs, "running")
    monitor = watch()
    monitor.finish(waits, "no worker")
    monitor.finish(waits, "no worker")  # the answer was lost: it is heard again
    with pytest.raises(BuildkiteError, match="it(s state)? is running") as refused:
        monitor.finish(runs, "no worker")
    assert refused.value.status == 422
    assert (fake.jobs[waits].state, fake.jobs[runs].state) == ("canceled", "running")


def test_show_job_needs_no_call_for_a_job_that_was_listed_for_a_policy(
    fake: FakeBuildkite, watch: Callable[..., Monitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (fake.add_job(pipeline="app", command=f"make {n}", env={"A": f"b=c{n}"}) for n in "12")
    monitor = watch()
    monitor.keeps_specs = True
    monkeypatch.setattr(scheduler, "KEPT_SPECS_BYTES", 1000)  # room for one of them
    all_pages(monitor)
    calls = {}
    for uuid in (first, second):
        spec = monitor.show_job(uuid)
        assert (spec.command, spec.env["A"]) in {("make 1", "b=c1"), ("make 2", "b=c2")}
        calls[uuid] = cost_of(fake, lambda uuid=uuid: monitor.show_job(uuid))  # type: ignore[misc]
    assert sorted(calls.values()) == [(0, 0), (1, 1)]
    with pytest.raises(BuildkiteError, match="shows no such job") as missing:
        monitor.show_job("018f0000-0000-4000-8000-000000000000")
    assert missing.value.status == 404


# --- What is wrong ---


def test_register_names_what_is_not_there(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    needs = "; BUILDKITE_API_TOKEN must have full GraphQL access"
    wrong = {
        watch(organization="nobody"): f"organization nobody: Buildkite shows no such organization{needs}",
        watch("nope"): f"pipeline nope of \\[monitor\\]: Buildkite shows no such pipeline of acme{needs}",
        watch("UGlwZWxpbmU="): "pipeline UGlwZWxpbmU= of",
        watch("demo"): "pipeline demo of .* is in a cluster: name its queue in SCHEDULER_QUEUES",
    }
    for monitor, told in wrong.items():
        with pytest.raises(BuildkiteError, match=told):
            monitor.register()
    watch("app", "docs").register()


def test_register_in_an_organization_of_clusters_alone_says_so() -> None:
    with FakeBuildkite() as fake:
        fake.add_pipeline("demo")
        monitor = Monitor(GraphApi(fake.graphql_url, lambda: fake.api_token), "acme", Watched(queue="legacy"))
        with pytest.raises(BuildkiteError, match="no pipeline outside of clusters .* \\[monitor\\]"):
            monitor.register()


@pytest.mark.parametrize(
    ("fault", "status", "told"),
    [
        ({"status": 401, "body": {"message": "Authentication required"}}, 401, "refuses BUILDKITE_API_TOKEN"),
        ({"status": 403, "body": {"message": "no GraphQL"}}, 403, "no GraphQL; BUILDKITE_API_TOKEN must have full"),
        ({"body": {"data": None, "errors": [{"message": "Query has complexity"}]}}, 422, "it: Query has complexity"),
        ({"body": {"data": {"s0": None}}}, 404, "list organization acme: Buildkite shows it no more"),
        ({"body": {"data": {"s0": {"jobs": {"count": "x"}}}}}, 404, "shows it no more"),
        ({"status": 429, "headers": {"RateLimit-User-Reset": "90"}}, 429, "429 from Buildkite"),
        ({"garbage": True}, 0, "not JSON"),
    ],
    ids=str,
)
def test_list_that_is_refused_says_why(
    fake: FakeBuildkite, watch: Callable[..., Monitor], fault: dict[str, Any], status: int, told: str
) -> None:
    monitor = watch()
    all_pages(monitor)
    fake.set_fault("graphql", **fault)
    with pytest.raises(BuildkiteError, match=told) as refused:
        monitor.list_jobs(None, NOW)
    assert refused.value.status == status


def test_list_with_odd_jobs_passes_them_over(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    """Whatever Buildkite sends in place of what its schema says, others are listed."""
    uuid = fake.add_job(pipeline="app")
    monitor = watch()
    edges: list[Any] = [None, {}, {"node": None}, {"node": {}}, {"node": {"uuid": 5}}, {"node": {"uuid": uuid}}]
    page = {"count": 2, "pageInfo": None, "edges": edges}

    def answer(request: Any) -> dict[str, Any]:
        query = json.loads(request.body)["query"]
        if "organization(slug" in query:
            return {"data": {"organization": {"id": "x", "pipelines": {"count": 1}}}}
        if "job(uuid" in query:
            return {"data": {"j0": {"uuid": uuid, "state": "SCHEDULED", "build": {"state": "RUNNING"}, "env": [None]}}}
        return {"data": {"s0": {"jobs": page}, "node": {"jobs": page}}}

    fake.set_fault("graphql", body=answer)
    assert listed(monitor) == [uuid]


# --- Points ---


def headers(left: int, resets_in: int, cost: int, user_left: int = 10**6) -> dict[str, str]:
    told = {"RateLimit-Remaining": left, "RateLimit-Reset": resets_in, "RateLimit-Complexity-Actual": cost}
    told |= {"RateLimit-User-Remaining": user_left, "RateLimit-User-Reset": resets_in}
    return {name: str(value) for name, value in told.items()}


def test_pause_spreads_half_of_the_points_that_are_left_over_the_time_until_they_begin_anew() -> None:
    points, now, left, used = Points(), 0.0, 1000, 0
    while now < 300:
        left, used = left - 10, used + 10
        points.heard(headers(left, round(300 - now), 10), now)
        now += max(1.0, points.pause(now))
    assert 400 <= used <= 500  # of 1,000
    points.heard(headers(1000, 300, 10), now)
    assert points.pause(now) < 10


def test_pause_leaves_alone_what_others_need() -> None:
    points = Points()
    points.heard(headers(4000, 300, 5), 0.0)
    little = points.pause(0.0)
    points.heard(headers(40, 300, 5), 0.0)  # others have used them up
    assert points.pause(0.0) > 20 * little
    points.heard(headers(40, 300, 5, user_left=0), 10.0)
    assert 280 < points.pause(10.0) <= 300


def test_pause_ends_when_the_points_begin_anew_however_few_were_left() -> None:
    for spent in range(480, 501):
        points = Points()
        points.heard(headers(1000, 300, 0), 0.0)
        points.heard(headers(1000 - spent, 200, spent), 100.0)
        points.heard(headers(990 - spent, 190, 10), 110.0)
        assert 100 < points.pause(110.0) <= 190
        points.heard(headers(1000, 300, 2), 301.0)
        assert points.pause(301.0) == 0


def test_pause_counts_what_the_jobs_that_were_taken_in_will_cost() -> None:
    points = Points()
    points.heard(headers(1000, 300, 10), 0.0)
    points.promise(490)
    points.heard(headers(990, 300, 10), 1.0)
    assert points.pause(1.0) > 250  # half of the points are promised
    points.heard(headers(800, 300, 190), 2.0, is_promised=True)
    points.heard(headers(1000, 300, 1), 400.0)  # a new window: what is still promised is so there too
    assert points.pause(400.0) == 0
    points.promise(201)
    points.heard(headers(999, 300, 1), 401.0)
    assert points.pause(401.0) > 250


@pytest.mark.parametrize("told", [{}, {"RateLimit-Remaining": "x", "RateLimit-Reset": "1"}, {"RateLimit-Reset": "1"}])
def test_pause_without_headers_that_can_be_read_is_none(told: dict[str, str]) -> None:
    points = Points()
    points.heard(told, 0.0)
    assert points.pause(0.0) == 0


def test_pause_that_is_long_is_a_problem_until_it_is_over(fake: FakeBuildkite, watch: Callable[..., Monitor]) -> None:
    fake.points = {"RateLimit": 20_000, "RateLimit-User": 100}
    for _ in range(5):
        fake.add_job(pipeline="app")
    monitor = watch()
    assert monitor.problems == []
    all_pages(monitor)
    assert monitor.pause() > scheduler.SLOW_LIST_SECONDS
    [problem] = monitor.problems
    assert "queue legacy: is listed less often" in problem
    monitor._api.points = Points()
    monitor._slow_until = 0.0
    assert monitor.pause() == 0
    assert monitor.problems == []


# --- Intake and claims ---

CLAIM = "/jobs?query=queue=legacy"


class Desk(Bench):
    """The API with the monitor's queue at a fake Buildkite; claims are proved by their own thread, as in life."""

    def __init__(self, store: Store, clock: Clock, settings: Settings, fake: FakeBuildkite):
        self.fake, self.clock = fake, clock
        super().__init__(store, clock, settings)
        graph = GraphApi(fake.graphql_url, lambda: fake.api_token)
        graph._pace = scheduler.RateLimiter(1000)
        self.monitor = Monitor(graph, "acme", Watched(queue="legacy"))
        self.intake = Intake(self.monitor, Leadership(store), self.dispatcher, settings, clock.now, pytest.fail)
        self.server.api = Api(store, self.dispatcher, {"legacy": self.intake}, settings, clock.now)
        store.on_move = lambda move, now: self.intake.on_move(move)
        self.intake._proofs.task.start()

    def take_in(self, *, whole: bool = False) -> None:
        self.monitor._whole_list_at = 0.0 if whole else self.monitor._whole_list_at
        self.intake.list.run_once()
        self.intake.reserve.run_once()
        self.intake.states.run_once()

    def add_ready(self, count: int = 1, **about: Any) -> list[str]:
        uuids = [self.fake.add_job(pipeline="app", **about) for _ in range(count)]
        self.take_in()
        assert {self.job(uuid).state for uuid in uuids} == {"ready"}
        return uuids

    def job(self, uuid: str) -> Job:
        job = self.store.get(uuid)
        assert job
        return job

    def __exit__(self, *arguments: object) -> None:
        self.intake._proofs.task.stop()
        super().__exit__(*arguments)
        assert self.intake._proofs.task.join(PATIENCE)


@pytest.fixture
def desk(store: Store, clock: Clock, settings: Callable[..., Settings], fake: FakeBuildkite) -> Iterator[Desk]:
    with Desk(store, clock, settings(), fake) as desk:
        yield desk


def test_claim_soon_after_the_proof_costs_no_call(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    desk.clock.advance(scheduler.PROOF_SECONDS - 0.1)
    replies: list[Reply] = []
    assert cost_of(desk.fake, lambda: replies.append(desk.call("GET", CLAIM, headers=W1))) == (0, 0)
    assert (replies[0].status, replies[0].json["uuid"]) == (200, uuid)


@pytest.mark.parametrize("state", ["running", "canceled", "limited"])
def test_claim_of_a_job_that_has_changed_since_gets_the_next_that_has_not(desk: Desk, state: str) -> None:
    (gone,) = desk.add_ready(priority=2)
    (free,) = desk.add_ready()
    desk.clock.advance(scheduler.PROOF_SECONDS + 1)
    desk.fake.set_state(gone, state)
    reply = desk.call("GET", CLAIM, headers=W1)
    assert (reply.status, reply.json["uuid"]) == (200, free)
    assert desk.job(gone).state == "reserving"
    assert desk.job(gone).attempts == 0
    desk.intake.reserve.run_once()
    desk.intake.states.run_once()
    assert desk.job(gone).state == ("running" if state == "running" else "done")
    assert not desk.intake.problems  # any agent may take it: this shows no second scheduler


def test_claim_while_buildkite_cannot_be_asked_gets_no_job_and_has_it_afterwards(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    desk.clock.advance(scheduler.PROOF_SECONDS + 1)
    desk.fake.set_fault("graphql", status=503)
    assert desk.call("GET", CLAIM, headers=W1).status == 204
    assert desk.job(uuid).state == "reserving"
    desk.fake.clear_faults()
    desk.intake.reserve.run_once()
    reply = desk.call("GET", CLAIM, headers=W2)
    assert (reply.status, reply.json["uuid"]) == (200, uuid)


def test_claims_that_wait_together_are_proved_by_one_call(desk: Desk) -> None:
    uuids = {*desk.add_ready(20)}
    desk.clock.advance(scheduler.PROOF_SECONDS + 1)
    desk.fake.set_fault("graphql", hang=1.0, times=1)
    got: list[str] = []

    def claim(number: int) -> None:
        connection = Connection(desk.port)
        got.append(
            connection.call("GET", CLAIM, headers={"X-Worker-ID": f"w{number}", "X-Worker-Session": "s"}).json["uuid"]
        )
        connection.close()

    before = len(desk.fake.calls_to("graphql"))
    threads = [threading.Thread(target=claim, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert {*got} == uuids
    assert len(desk.fake.calls_to("graphql")) - before <= 3


def test_claim_that_asks_for_a_token_never_gets_one_of_its_jobs(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    assert desk.call("GET", f"{CLAIM}&token=1", headers=W1).status == 204
    assert desk.job(uuid).state == "ready"
    assert desk.job(uuid).claims == 0
    assert desk.call("GET", CLAIM, headers=W2).json["uuid"] == uuid


def test_list_of_a_job_that_is_ready_or_has_a_worker_leaves_it_there(desk: Desk) -> None:
    taken, free = desk.add_ready(priority=2) + desk.add_ready()
    assert desk.call("GET", CLAIM, headers=W1).json["uuid"] == taken
    before = [desk.job(uuid).version for uuid in (taken, free)]
    desk.take_in(whole=True)
    assert [desk.job(uuid).state for uuid in (taken, free)] == ["leased", "ready"]
    assert [desk.job(uuid).version for uuid in (taken, free)] == before


def test_list_whose_jobs_could_not_be_written_down_lists_them_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid = desk.fake.add_job(pipeline="app")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", lambda *_, **__: (_ for _ in ()).throw(scheduler.StoreUnavailable("full")))
        desk.take_in()
    assert desk.store.get(uuid) is None
    desk.take_in()
    assert desk.job(uuid).state == "ready"


def test_look_at_a_job_that_has_left_the_list_ends_it(desk: Desk) -> None:
    gone, taken, free = desk.add_ready(3)
    desk.fake.cancel_job(gone)
    desk.fake.set_state(taken, "running")  # by another agent
    desk.take_in(whole=True)
    assert [desk.job(uuid).state for uuid in (gone, taken, free)] == ["done", "running", "ready"]
    assert not desk.intake.problems
    desk.fake.set_state(taken, "finished")
    desk.clock.advance(scheduler.SWEEP_SECONDS)
    desk.intake.states.run_once()
    assert desk.job(taken).state == "done"


def test_look_at_a_job_that_still_waits_leaves_it_ready_and_the_sweep_asks_about_those_of_workers_alone(
    desk: Desk,
) -> None:
    taken, free = desk.add_ready(priority=2) + desk.add_ready()
    assert desk.call("GET", CLAIM, headers=W1).json["uuid"] == taken
    desk.clock.advance(scheduler.SWEEP_SECONDS)
    assert cost_of(desk.fake, desk.intake.states.run_once) == (1, 1)
    desk.intake.check_soon(free)
    assert cost_of(desk.fake, desk.intake.states.run_once) == (1, 1)
    assert [desk.job(uuid).state for uuid in (taken, free)] == ["leased", "ready"]


def test_complete_without_an_agent_is_proved_anew_before_the_job_is_handed_out_again(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    reply = desk.call("GET", CLAIM, headers=W1)
    body = {"claim": reply.json["claim"], "exit_status": 1}
    desk.call("POST", f"/jobs/{uuid}/complete", body, headers=W1)
    assert desk.call("GET", CLAIM, headers=W2).status == 204
    calls, _ = cost_of(desk.fake, desk.intake.reserve.run_once)
    assert calls == 1
    assert desk.call("GET", CLAIM, headers=W2).json["uuid"] == uuid
    assert desk.job(uuid).attempts == 1


def test_finish_of_a_job_that_fails_too_often_cancels_it(desk: Desk) -> None:
    (uuid,) = desk.add_ready()
    for n in range(5):
        slot = {"X-Worker-ID": f"w{n}", "X-Worker-Session": "s", "X-Worker-Host": f"h{n}"}
        claim = desk.call("GET", CLAIM, headers=slot).json["claim"]
        desk.call("POST", f"/jobs/{uuid}/complete", {"claim": claim, "exit_status": 1}, headers=slot)
        desk.intake.reserve.run_once()
    assert desk.fake.jobs[uuid].state == "scheduled"
    desk.intake.finish.run_once()
    assert (desk.fake.jobs[uuid].state, desk.job(uuid).outcome) == ("canceled", "failed")
