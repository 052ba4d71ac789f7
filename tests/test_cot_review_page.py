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
from traceir.cot.review.review import Sampling, settle
from traceir.cot.review.review_server import serve_review

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ATTACK = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><b>hat</b> & </p>"

# The browser is a program of the system, not a package: where there is none, these cannot run.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")]


def serve(out: Path, count: int, port: int, tell: Connection) -> None:
    """The body of the server's process."""
    texts = [ATTACK, *[""] * (count - 1)]
    outcomes = [outcome(n, "language" if n == 2 else "", root=out.parent, text=text) for n, text in enumerate(texts)]
    address = "127.0.0.1:"
    serve_review(out, Sampling(count, strata=("task",)), port=port, outcomes=outcomes,
                 announce=lambda line: tell.send(int(line.partition(address)[2].partition("/")[0])))  # fmt: skip


@contextmanager
def server(out: Path, count: int, port: int = 0) -> Iterator[int]:
    """A server in its own process, and its port; ended by SIGKILL."""
    (out.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(min(count, 6)):
        Image.new("RGB", (160, 120), (40 * number, 90, 200)).save(out.parent / "pictures" / f"{number}.png")
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=serve, args=(out, count, port, sender), daemon=True)
    process.start()
    try:
        assert receiver.poll(60), "the server did not start"
        yield receiver.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def browser_page(**how: Any) -> Iterator[Any]:
    """A fresh page; whatever goes wrong in it, but for a server that is gone, fails the test."""
    wrong: list[str] = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(**how).new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console", lambda line: wrong.append(line.text) if line.type == "error" and "net::ERR_" not in line.text else None
        )
        yield page
        browser.close()
    assert not wrong, wrong


def wait_for(page: Any, number: int, done: int) -> None:
    """Until sample `number` (from 1) is shown and `done` are decided."""
    playwright.expect(page.locator("#at")).to_have_value(str(number))
    playwright.expect(page.locator("#progress")).to_contain_text(f"{done} of ")


def test_a_review_by_keyboard_survives_a_kill_and_shows_text_as_text(tmp_path: Path) -> None:
    out = tmp_path / "build"
    with browser_page() as page:
        with server(out, 6) as port:
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("#name").fill("ada")
            for key, number, done in (("Enter", 1, 0), ("k", 2, 1), ("d", 2, 1), ("2", 3, 2)):
                page.keyboard.press(key)
                wait_for(page, number, done)
            page.keyboard.press("e")
            page.locator("#edit-reasoning").fill("The hat is red. It becomes blue, n d k u ?")
            page.locator("#edit-answer").fill("a blue hat, kept by hand")
            for key, number, done in (
                ("Control+Enter", 4, 3),
                ("k", 5, 4),
                ("u", 4, 3),
                ("n", 5, 3),
                ("ArrowLeft", 4, 3),
                ("p", 3, 3),
            ):
                page.keyboard.press(key)
                wait_for(page, number, done)
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
            place = shown.index("7:0") + 1
            page.goto(f"http://127.0.0.1:{port}/?reviewer=bob&n={place}")
            wait_for(page, place, 0)
            assert page.locator("#query-text").inner_text() == ATTACK
            assert page.locator("main script, main b").count() == 0 and page.evaluate("window.pwned") is None
            playwright.expect(page.locator("#query-picture")).to_have_js_property("naturalWidth", 160)
            page.keyboard.press("]")
            playwright.expect(page.locator("#target-text")).to_have_text("a second hat")
    decided = {qid: (one.decision, one.why) for qid, one in read_decisions(out)["ada"].items()}
    assert decided == {shown[0]: ("keep", ""), shown[1]: ("drop", "wrong answer"), shown[2]: ("edit", "")}
    settled = settle(out, [outcome(n, "language" if n == 2 else "", text=ATTACK if n == 0 else "") for n in range(6)])
    assert (settled[shown[2]].decision, settled[shown[2]].answer) == ("keep", "a blue hat, kept by hand")


def test_a_narrow_dark_page_of_2000_by_buttons_loads_few_samples(tmp_path: Path) -> None:
    asked: list[str] = []
    dark = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    with server(tmp_path / "build", 2000) as port, browser_page(**dark) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/api/picture/**", lambda route: route.fulfill(status=204))  # only six are drawn
        page.goto(f"http://127.0.0.1:{port}/?reviewer=bob")
        wait_for(page, 1, 0)
        page.wait_for_load_state("networkidle")
        assert sum("/api/sample/" in url for url in asked) == 2, "the sample shown and the one after it"
        for names, number, done in ((("Drop", "hallucination"), 2, 1), (("Undo",), 1, 0), (("Edit", "Save"), 2, 1)):
            for name in names:
                page.get_by_role("button", name=name).click()
            wait_for(page, number, done)
        playwright.expect(page.locator("#live")).to_contain_text("Sample 1 edited. Now sample 2 of 2000")
        page.get_by_text("Progress by stratum").click()
        playwright.expect(page.locator("#strata")).to_contain_text("1 of 2000")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
