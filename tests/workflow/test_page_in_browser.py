"""The report in a real browser: headless Chromium, driven over the pipe of its DevTools protocol.

What is asserted is what a reader does: open, search, filter, sort, choose a board, follow a number to its run, by mouse
and by keyboard, on a phone, on paper and in the dark. No page may log an error or ask for anything but files beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.experiments import papers
from prunelab.paper_tables import __main__ as command
from tests.unit.paper_tables import test_paper_tables as made

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
PAPERS = ("zero_tprune", "tome", "lexrank")
PATIENCE = 90.0  # seconds that a crowded machine may take
MOVED = ("navigated or closed", "Cannot find context", "Could not find node")  # answers of a page that went on
EVIL = '<script>window.evil = 1</script><img src=x onerror="window.evil = 1">'
HEIGHT, DESKTOP, PHONE = 900, 1280, 390

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on PATH")


class NavigatedError(Exception):
    """The page went away while it was asked something."""


class Browser:
    """One headless Chromium with one page."""

    def __init__(self, profile: Path) -> None:
        ours_in, self._out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        self._in, ours_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())

        def wire() -> None:  # the protocol's two ends are descriptors 3 and 4
            os.dup2(ours_in, 3)
            os.dup2(ours_out, 4)

        switches = [
            "--headless=new",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
            "--remote-debugging-pipe",
        ]
        switches += [f"--user-data-dir={profile}", "--disable-background-networking", "--disable-dev-shm-usage"]
        if os.geteuid() == 0:
            switches.append("--no-sandbox")
        self._process = subprocess.Popen(
            [str(CHROMIUM), *switches, "about:blank"], close_fds=False, preexec_fn=wire,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours_in)
        os.close(ours_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(DESKTOP)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            assert chunk, "the browser said nothing for too long, or is gone"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                if any(said in str(answer.get("error")) for said in MOVED):
                    raise NavigatedError(answer)
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page from the file system, always anew, and wait until it stands."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + fragment)
        self.until("location.href.startsWith('file:') && document.readyState === 'complete'")

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._holds(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}"
            time.sleep(0.05)

    def _holds(self, condition: str) -> bool:
        try:
            return bool(self.js(condition))
        except NavigatedError:  # asked while the page went on to another
            return False

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32}.get(key, 0)
        also = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **also)
        self.call("Input.dispatchKeyEvent", type="keyUp", **also)

    def size(self, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, media: str = "", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def errors(self) -> list[Any]:
        """What went wrong on the page so far."""
        said = [(e.get("method"), e.get("params", {})) for e in self.events]
        return [
            p for method, p in said
            if method == "Runtime.exceptionThrown"
            or (method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"))
        ]  # fmt: skip

    def requests(self) -> list[str]:
        """What the page asked for so far, beside itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]  # a picture inside the page

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of three papers, from records made by hand; one reported row is hostile."""
    results = tmp_path_factory.mktemp("site") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "_testbed_hash", lambda name: "0" * 64)
        for key in ("assets", "scale", "papers", "results", "gpu", "imagenet", "duc"):
            patch.delenv(f"PRUNELAB_{key.upper()}", raising=False)
        config = lookup.settings({"papers": ",".join(PAPERS), "results": str(results)})
        made.fill(config)
        numbers = {slug: papers.reported(slug) for slug in papers.slugs()}
        first = numbers["zero_tprune"][0]
        hostile = replace(first, table="headline", row=EVIL, column=EVIL, unit=EVIL, source=EVIL)
        numbers["zero_tprune"] += (hostile,)
        patch.setattr(papers, "reported", lambda slug: numbers[slug])
        index, _ = command.build(config)
    return index.parent


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


SHOWN = "[...document.querySelectorAll('{} tbody tr')].filter(r => r.offsetParent !== null)"
TYPE = """
const f = document.forms[0], type = (field, value) => {
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
};
"""
WIDE = """[...document.querySelectorAll("main *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth && !e.closest("pre, .readme table, .unseen, svg"))
  .map((e) => e.outerHTML.slice(0, 90))"""
TITLES = SHOWN.format("#papers") + ".map(r => r.id)"


def test_every_page_stands_without_errors_or_requests(browser: Browser, site: Path) -> None:
    shared = [path for path in pages(site) if path.parent.name != "literature"]
    assert len(shared) == len(PAPERS) + 3 < len(pages(site))
    for path in pages(site):
        browser.open(path)
        assert browser.js(
            "document.querySelector('main h1').textContent.length + document.querySelectorAll('table').length > 5"
        )
        assert browser.js("document.querySelectorAll('h1').length") == 1
        assert not browser.errors(), path
        assert browser.requests() == [path.as_uri()]


def test_what_papers_bring_never_runs(browser: Browser, site: Path) -> None:
    browser.open(site / "zero_tprune" / "index.html")
    assert browser.js("document.body.textContent.includes('window.evil')"), "it is shown as text"
    assert browser.js(
        "window.evil === undefined && document.scripts.length === 1 && !document.querySelector('main img')"
    )
    # Were it ever let through, the page's policy would still stop it.
    browser.js(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.evil = 2'}))"
    )
    assert browser.js("window.evil === undefined")


def test_the_index_searches_filters_and_sorts(browser: Browser, site: Path) -> None:
    browser.open(site / "index.html")
    assert set(browser.js(TITLES)) == set(PAPERS)
    browser.js(TYPE + "type(f.elements.search, 'radev lexical')")
    assert browser.js(TITLES) == ["lexrank"]
    assert browser.js("document.querySelector('output').textContent") == "1 of 3"
    browser.js("f.elements.search.value = ''; type(f.querySelector('[data-key=family]'), 'vit')")
    assert set(browser.js(TITLES)) == {"zero_tprune", "tome"}
    browser.js("type(f.querySelector('[data-key=outcome]'), 'off')")
    assert browser.js(TITLES) == ["zero_tprune"]
    browser.js("type(f.elements.search, 'no such words')")
    assert browser.js(TITLES) == [] and browser.js("!document.querySelector('.nothing').hidden")
    browser.js("f.reset(); f.dispatchEvent(new Event('input'))")
    counts = SHOWN.format("#papers") + ".map(r => Number(r.cells[4].textContent))"
    click = "document.querySelector('#papers thead th:nth-child(5) button').click();"
    unsorted = browser.js(counts)
    assert browser.js(click + counts) == sorted(unsorted) != sorted(unsorted, reverse=True)
    assert browser.js("document.querySelector('#papers [aria-sort]').ariaSort") == "ascending"
    assert browser.js(click + counts) == sorted(unsorted, reverse=True)
    assert browser.js(click + counts) == unsorted and not browser.js("document.querySelector('[aria-sort]')")
    assert not browser.errors()


def test_a_paper_filters_its_rows_and_leads_to_its_runs(browser: Browser, site: Path) -> None:
    browser.open(site / "zero_tprune" / "index.html")
    rows = SHOWN.format("#rows")
    everything = browser.js(rows + ".length")
    assert browser.js("document.querySelectorAll('td[hidden], th[hidden]').length") == 0
    browser.js(TYPE + "type(f.elements.search, 'zero-tp-a gflops')")
    assert 0 < browser.js(rows + ".length") < everything
    assert browser.js(rows + ".every(r => r.textContent.includes('+Zero-TP-a'))")
    browser.js("document.querySelector('#rows td a[href^=\"#r-\"]').click()")
    browser.until(
        "location.hash.startsWith('#r-') && document.getElementById(location.hash.slice(1)).closest('details').open"
    )
    assert not browser.errors()


def test_anchors_of_the_one_page_report_still_lead_there(browser: Browser, site: Path) -> None:
    browser.open(site / "index.html", "#zero_tprune-deit-s-main")
    browser.until(
        "location.pathname.endsWith('/zero_tprune/index.html') && location.hash === '#zero_tprune-deit-s-main'"
    )
    assert browser.js("document.getElementById('zero_tprune-deit-s-main') !== null")


def test_a_board_is_chosen_and_sorted(browser: Browser, site: Path) -> None:
    browser.open(site / "boards.html")
    blocks = "[...document.querySelectorAll('.leaderboard .block')].filter(b => b.offsetParent !== null)"
    assert browser.js(blocks + ".length") == 1
    budgets = browser.js("[...document.querySelector('[name=budget]').options].map(o => o.value)")
    assert "0.5cost" in budgets
    browser.js(TYPE + "type(f.elements.budget, '0.5cost')")
    assert browser.js(blocks + ".map(b => b.dataset.budget)") == ["0.5cost"]
    value = SHOWN.format(".leaderboard") + ".map(r => Number(r.cells[2].dataset.v))"
    found = browser.js(value)
    assert len(found) > 2 and found == sorted(found, reverse=True), "best first"
    assert browser.js(SHOWN.format(".leaderboard") + "[0].cells[1].textContent") == "unpruned"
    assert browser.js("document.querySelectorAll('svg.interval .error').length > 0"), "values have their intervals"
    browser.js(blocks + "[0].querySelector('thead th:nth-child(3) button').click()")
    assert browser.js(value) == sorted(found)
    fragment = browser.js("location.hash")
    browser.open(site / "boards.html", fragment)
    assert browser.js(blocks + ".map(b => b.dataset.budget)") == ["0.5cost"], "a choice has an address"
    assert not browser.errors()


def test_the_keyboard_alone_is_enough(browser: Browser, site: Path) -> None:
    browser.open(site / "index.html")
    browser.press("Tab")
    assert browser.js("document.activeElement.className") == "skip"
    assert browser.js("document.activeElement.getBoundingClientRect().top >= 0"), "it shows once it has the focus"
    browser.press("Enter", "\r")
    browser.until("location.hash === '#main'")
    for _ in range(30):
        browser.press("Tab")
        assert browser.js("getComputedStyle(document.activeElement).outlineStyle !== 'none'"), "the focus is seen"
        if browser.js("document.activeElement.matches('#papers th:nth-child(3) button')"):
            break
    else:
        pytest.fail("no Tab reaches the button that sorts by year")
    browser.press(" ", " ")
    years = browser.js(SHOWN.format("#papers") + ".map(r => Number(r.cells[2].textContent))")
    assert years == sorted(years) and browser.js("document.activeElement.closest('th').ariaSort") == "ascending"
    named = (
        "[...document.querySelectorAll('input, select')].every(e => e.labels.length && e.labels[0].textContent.trim())"
    )
    assert browser.js(named)
    assert browser.js("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label'))")


def test_a_phone_never_scrolls_sideways(browser: Browser, site: Path) -> None:
    browser.size(PHONE)
    try:
        for path in pages(site):
            browser.open(path)
            assert browser.js("document.documentElement.scrollWidth") <= PHONE, (path, browser.js(WIDE))
        browser.open(site / "index.html")
        assert browser.js("document.querySelector('#papers thead button').getBoundingClientRect().width > 10"), (
            "it can still sort"
        )
    finally:
        browser.size(DESKTOP)


def test_dark_and_paper(browser: Browser, site: Path) -> None:
    def light(element: str) -> float:
        text = browser.js(f"getComputedStyle(document.querySelector('{element}')).backgroundColor")
        return sum(map(int, text[text.index("(") + 1 : -1].split(",")[:3])) / 3

    browser.open(site / "index.html")
    assert light("body") > 200
    browser.media(scheme="dark")
    assert light("body") < 60
    browser.media("print")
    assert light("body") == 255
    for hidden in (".site", ".controls", ".skip"):
        assert browser.js(f"getComputedStyle(document.querySelector('{hidden}')).display") == "none"
    browser.media()


CONTRASTS = """(() => {
  const channel = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => channel(Number(v)));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = (e) => {
    const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  };
  const texts = document.querySelectorAll("p, a, td, th, dt, dd, li, summary, label, output, .badge");
  return Math.min(...[...texts].map(ratio));
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, site: Path, scheme: str) -> None:
    browser.media(scheme=scheme)
    for path in pages(site):
        browser.open(path)
        assert browser.js(CONTRASTS) >= 4.5, "WCAG 2 AA"
    browser.media()


def test_without_the_script_everything_is_there(browser: Browser, site: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        for path in pages(site):
            browser.call("Page.navigate", url="about:blank")  # never what an earlier test left of the same page
            browser.call("Page.navigate", url=path.as_uri())
            for _ in range(200):  # what runs in the page is off, so the document is asked for from outside
                time.sleep(0.05)
                try:
                    root = browser.call("DOM.getDocument", depth=-1)["root"]
                    ends = browser.call("DOM.querySelectorAll", nodeId=root["nodeId"], selector="footer")["nodeIds"]
                except NavigatedError:
                    continue
                if ends and root["documentURL"] == path.as_uri():
                    break
            else:
                pytest.fail(f"{path} was not read")

            def found(selector: str) -> int:
                """A document may be handed out anew after it was read, and its nodes with it."""
                for _ in range(200):
                    try:
                        top = browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
                        return len(browser.call("DOM.querySelectorAll", nodeId=top, selector=selector)["nodeIds"])
                    except NavigatedError:
                        time.sleep(0.05)
                raise AssertionError(selector)

            assert found("tbody tr") > 1 and not found("tbody tr[hidden], .block[hidden], .leaderboard[hidden]")
            assert found("form") == found("form[hidden]")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
