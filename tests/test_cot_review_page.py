"""The review page in a real browser, against a server in a process of its own, which is killed on the way."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import playwright.sync_api as playwright
import pytest
from PIL import Image
from test_cot_review import outcome

from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import settle
from traceir.cot.review.review_server import serve_review

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DEAD = tuple(f"Failed to load resource: net::ERR_{end}" for end in ("CONNECTION_REFUSED", "CONNECTION_RESET", "EMPTY_RESPONSE"))
"""What a browser says of a server that has just been killed, by the moment it notices."""
ATTACK = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><b>hat</b> & </p>"

# The browser is a program of the system, not a package: where there is none, these cannot run.
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")


def serve(out: str, count: int, port: int, tell: Connection) -> None:
    """The body of the server's process."""
    root = Path(out).parent / "data"
    outcomes = [outcome(n, "language" if n == 2 else "", root=root, text=ATTACK if n == 0 else "") for n in range(count)]
    serve_review(
        Path(out), port=port, per_stratum=count, strata=("task",), outcomes=outcomes, announce=lambda _: tell.send(port_of(_))
    )


def port_of(line: str) -> int:
    return int(line.partition("127.0.0.1:")[2].partition("/")[0])


@contextmanager
def server(out: Path, count: int, port: int = 0) -> Iterator[int]:
    """A server in its own process, and its port; ended by SIGKILL."""
    root = out.parent / "data" / "pictures"
    root.mkdir(parents=True, exist_ok=True)
    for number in range(min(count, 6)):
        Image.new("RGB", (160, 120), (40 * number, 90, 200 - 30 * number)).save(root / f"{number}.png")
    spawn = multiprocessing.get_context("spawn")
    ear, mouth = spawn.Pipe(duplex=False)
    process = spawn.Process(target=serve, args=(str(out), count, port, mouth), daemon=True)
    process.start()
    try:
        assert ear.poll(60), "the server did not start"
        yield ear.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def browser_page(**how: Any) -> Iterator[Any]:
    """A fresh page; whatever goes wrong in it fails the test."""
    wrong: list[str] = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(**how).new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda told: wrong.append(told.text) if told.type == "error" and told.text not in DEAD else None)
        yield page
        browser.close()
    assert not wrong, wrong


def wait_for(page: Any, number: int, done: int) -> None:
    """Until sample `number` (from 1) is shown and `done` are decided."""
    playwright.expect(page.locator("#at")).to_have_value(str(number))
    playwright.expect(page.locator("#progress")).to_contain_text(f"{done} of ")


def test_a_review_by_keyboard_survives_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "build"
    with browser_page() as page:
        with server(out, 6) as port:
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("#name").fill("ada")
            page.keyboard.press("Enter")
            wait_for(page, 1, 0)
            page.keyboard.press("k")
            wait_for(page, 2, 1)
            page.keyboard.press("d")
            playwright.expect(page.locator("#why")).to_be_visible()
            page.keyboard.press("2")
            wait_for(page, 3, 2)
            page.keyboard.press("e")
            page.locator("#edit-reasoning").fill("The hat is red. It becomes blue, n d k u ?")
            page.locator("#edit-answer").fill("a blue hat, kept by hand")
            page.keyboard.press("Control+Enter")
            wait_for(page, 4, 3)
            page.keyboard.press("k")
            wait_for(page, 5, 4)
            page.keyboard.press("u")
            wait_for(page, 4, 3)
            page.keyboard.press("n")
            wait_for(page, 5, 3)
            page.keyboard.press("ArrowLeft")
            page.keyboard.press("ArrowLeft")
            wait_for(page, 3, 3)
            playwright.expect(page.locator("#answer")).to_have_text("a blue hat, kept by hand")
        shown = [line["qid"] for line in json.loads((out / "review" / "sample.json").read_text())["samples"]]
        page.keyboard.press("k")
        playwright.expect(page.locator("#alert")).to_contain_text("nothing was saved")
        with server(out, 6, port):
            page.reload()
            wait_for(page, 3, 3)
            playwright.expect(page.locator("#mine")).to_have_text("you edited it")
            page.keyboard.press("ArrowLeft")
            playwright.expect(page.locator("#mine")).to_have_text("you dropped it: wrong answer")
    decided = {qid: (one.decision, one.why) for qid, one in read_decisions(out)["ada"].items()}
    assert decided == {shown[0]: ("keep", ""), shown[1]: ("drop", "wrong answer"), shown[2]: ("edit", "")}
    settled = settle(out, [outcome(n, "language" if n == 2 else "", text=ATTACK if n == 0 else "") for n in range(6)]).settled
    assert (settled[shown[2]].decision, settled[shown[2]].answer) == ("keep", "a blue hat, kept by hand")


def test_text_from_data_is_shown_as_text(tmp_path: Path) -> None:
    out = tmp_path / "build"
    with server(out, 3) as port, browser_page() as page:
        shown = [line["qid"] for line in json.loads((out / "review" / "sample.json").read_text())["samples"]]
        place = shown.index("7:0") + 1
        page.goto(f"http://127.0.0.1:{port}/?reviewer=ada&n={place}")
        wait_for(page, place, 0)
        assert page.locator("#query-text").inner_text() == ATTACK
        assert page.locator("main script, main b").count() == 0 and page.evaluate("window.pwned") is None
        playwright.expect(page.locator("#query-picture")).to_have_js_property("naturalWidth", 160)
        page.keyboard.press("]")
        playwright.expect(page.locator("#target-text")).to_have_text("a second hat")


def test_a_narrow_dark_page_of_2000_by_buttons_loads_few_samples(tmp_path: Path) -> None:
    out = tmp_path / "build"
    asked: list[str] = []
    with server(out, 2000) as port, browser_page(viewport={"width": 360, "height": 740}, color_scheme="dark") as page:
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/api/picture/**", lambda route: route.fulfill(status=204))  # only six are drawn
        page.goto(f"http://127.0.0.1:{port}/?reviewer=bob")
        wait_for(page, 1, 0)
        page.wait_for_load_state("networkidle")
        assert sum("/api/sample/" in url for url in asked) == 2, "the sample shown and the one after it"
        page.get_by_role("button", name="Drop").click()
        page.get_by_role("button", name="hallucination").click()
        wait_for(page, 2, 1)
        playwright.expect(page.locator("#live")).to_contain_text("Sample 1 dropped. Now sample 2 of 2000")
        page.get_by_role("button", name="Undo").click()
        wait_for(page, 1, 0)
        page.get_by_role("button", name="Edit").click()
        page.get_by_role("button", name="Save").click()
        wait_for(page, 2, 1)
        page.get_by_text("Progress by stratum").click()
        playwright.expect(page.locator("#strata")).to_contain_text("1 of 2000")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
