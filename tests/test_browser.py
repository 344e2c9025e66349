"""What a real browser may make the scheduler do: nothing for a page of another site, and nothing for a page whose own
name was made to lead to the scheduler. The pages are served by this test; Chromium runs them.
"""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Clock, open_sqlite
from processes import program
from scheduler import Settings, Store
from test_api import PATIENCE, UUID, W1, Bench

#: A name that the browser finds at 127.0.0.1, as it would the name of a page whose owner has its address changed
#: after the page was loaded.
REBOUND = "rebound.example"
BLANK = b"<!doctype html><title>a page</title>"


class Site:
    """A web server of somebody else on this machine: another origin. Each of its pages is empty."""

    def __init__(self) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(BLANK)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium without a window. It keeps its files in a directory of the test's own."""
    chromium, driver = program("chromium"), program("chromedriver")
    from selenium import webdriver  # noqa: PLC0415  slow, and of no use where there is no browser

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"),
        *(
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        ),
        f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
    ):
        options.add_argument(argument)
    # What the browser asked, and whom: some tests read it.
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    # The driver given by its path: selenium then asks nobody for one.
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver, env={**os.environ, "HOME": "/nonexistent"}))
    chrome.set_page_load_timeout(PATIENCE)
    chrome.set_script_timeout(PATIENCE)
    yield chrome
    chrome.quit()


@pytest.fixture(params=["", "secret"], ids=["no token", "token"])
def bench(
    request: pytest.FixtureRequest, settings: Callable[..., Settings], clock: Clock, tmp_path: Path
) -> Iterator[Bench]:
    store: Store = open_sqlite(settings())
    with Bench(store, clock, settings(), token=request.param) as bench:
        bench.make_ready()
        yield bench
    store.close()


@pytest.fixture
def unguarded(settings: Callable[..., Settings], clock: Clock) -> Iterator[Bench]:
    store = open_sqlite(settings())
    with Bench(store, clock, settings()) as bench:
        bench.make_ready()
        yield bench
    store.close()


#: Every way in which the script of a page can send a request, each ending in what it could learn of the answer.
SEND = """
const [url, options, done] = arguments;
fetch(url, options).then(async answer => done([answer.type, answer.status, await answer.text()]),
                         error => done(["error", 0, String(error)]));
"""
LOAD = """
const [kind, url, done] = arguments;
const part = document.createElement(kind);
part.onload = () => done("load");
part.onerror = () => done("error");
part[kind === "link" ? "href" : "src"] = url;
part.rel = "stylesheet";
document.body.append(part);
"""
#: A form of a page, its answer shown in a frame so that the page stays.
SUBMIT = """
const [url, kind, name, value, done] = arguments;
const [frame, form, field] = ["iframe", "form", "input"].map(kind => document.createElement(kind));
frame.name = "answer";
form.action = url; form.method = "post"; form.enctype = kind; form.target = "answer";
field.name = name; field.value = value;
form.append(field);
document.body.append(frame, form);
frame.onload = () => done("load");
form.submit();
"""
CLAIM = "/jobs?query=queue=default"


def is_untouched(bench: Bench) -> bool:
    return bench.state() == "ready" and bench.store.stats()["states"]["leased"] == 0


@pytest.fixture
def foreign(browser: Any, site: Site) -> Any:
    """The browser, on a page of another port of this machine: the same site, yet another origin."""
    browser.get(f"http://127.0.0.1:{site.port}/")
    return browser


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_claim_by_script_of_another_origin_claims_nothing(foreign: Any, bench: Bench, mode: str, host: str) -> None:
    url = f"http://{host}:{bench.port}{CLAIM}"
    kind, status, text = foreign.execute_async_script(SEND, url, {"mode": mode})
    assert (status, UUID in text) == (0, False), kind
    assert is_untouched(bench)


@pytest.mark.parametrize("kind", ["img", "script", "iframe", "link"])
def test_claim_by_part_of_a_page_of_another_origin_claims_nothing(foreign: Any, bench: Bench, kind: str) -> None:
    foreign.execute_async_script(LOAD, kind, f"http://127.0.0.1:{bench.port}{CLAIM}&token=1")
    assert is_untouched(bench)


def test_claim_by_navigation_of_a_page_of_another_origin_claims_nothing(foreign: Any, bench: Bench) -> None:
    foreign.execute_script("location.href = arguments[0]", f"http://127.0.0.1:{bench.port}{CLAIM}")
    assert UUID not in foreign.page_source
    assert is_untouched(bench)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_complete_by_form_of_another_origin_changes_nothing(foreign: Any, unguarded: Bench, kind: str) -> None:
    claim = unguarded.claim(W1)["claim"]
    # As plain text that is whole JSON, with the form's own `=` in it.
    text = f'{{"claim": "{claim}", "exit_status": 0, "x": "'
    url = f"http://127.0.0.1:{unguarded.port}/jobs/{UUID}/complete"
    foreign.execute_async_script(SUBMIT, url, kind, text, '"}')
    assert unguarded.state() == "leased"


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_complete_by_script_of_another_origin_changes_nothing(foreign: Any, unguarded: Bench, kind: str) -> None:
    claim = unguarded.claim(W1)["claim"]
    options = {
        "method": "POST",
        "mode": "no-cors" if kind == "text/plain" else "cors",
        "headers": {"Content-Type": kind},
        "body": f'{{"claim": "{claim}", "exit_status": 0}}',
    }
    url = f"http://127.0.0.1:{unguarded.port}/jobs/{UUID}/complete"
    assert foreign.execute_async_script(SEND, url, options)[1] == 0
    assert unguarded.state() == "leased"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_call_with_other_method_by_script_of_another_origin_fails_at_its_preflight(
    foreign: Any, unguarded: Bench, method: str
) -> None:
    url = f"http://127.0.0.1:{unguarded.port}/jobs/{UUID}"
    assert foreign.execute_async_script(SEND, url, {"method": method})[0] == "error"


def test_read_by_page_whose_name_leads_here_is_refused(browser: Any, unguarded: Bench) -> None:
    """DNS rebinding: for the browser, page and scheduler are one origin, so it shows the page every answer."""
    browser.get(f"http://{REBOUND}:{unguarded.port}/health")
    for path in (CLAIM, "/stats", "/queue", f"/jobs/{UUID}", "/metrics", "/health"):
        _, status, text = browser.execute_async_script(SEND, path, {})
        assert (status, "other_host" in text, UUID in text) == (403, True, False)
    options = {"method": "POST", "headers": {"Content-Type": "application/json", "X-Worker-ID": "w1"}, "body": "{}"}
    _, status, text = browser.execute_async_script(SEND, f"/jobs/{UUID}/complete", options)
    assert (status, "other_host" in text) == (403, True)
    assert is_untouched(unguarded)


def test_claim_by_page_whose_name_leads_here_needs_the_token(
    browser: Any, settings: Callable[..., Settings], clock: Clock
) -> None:
    store = open_sqlite(settings())
    with Bench(store, clock, settings(), token="secret") as bench:
        bench.make_ready()
        browser.get(f"http://{REBOUND}:{bench.port}/health")
        assert browser.execute_async_script(SEND, CLAIM, {})[1] == 401
        assert is_untouched(bench)
    store.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_read_by_the_schedulers_own_page_is_answered(browser: Any, unguarded: Bench, host: str) -> None:
    """What the browser shows as a page of the scheduler's may ask the scheduler, in every way."""
    browser.get(f"http://{host}:{unguarded.port}/health")
    assert '"ok"' in browser.page_source
    kind, status, text = browser.execute_async_script(SEND, "/stats", {})
    assert (kind, status, '"total": 1' in text) == ("basic", 200, True)
    claim = unguarded.claim(W1)["claim"]
    options = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": f'{{"claim": "{claim}"}}'}
    assert browser.execute_async_script(SEND, f"/jobs/{UUID}/touch", options)[1] == 200
