"""The review page in a real browser, against a server in a process of its own, which is killed on the way."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conftest import IN_BROWSER
from PIL import Image
from playwright.sync_api import expect
from test_cot_review import outcome

from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import Sampling, settle
from traceir.cot.review.review_server import serve_review

ATTACK = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><b>hat</b> & </p>"
pytestmark = IN_BROWSER


def outcomes(count: int, root: Path) -> list[Any]:
    """The first has a hostile text, the third was dropped by a rule."""
    return [outcome(n, "language" if n == 2 else "", root=root, text="" if n else ATTACK) for n in range(count)]


def serve(out: Path, count: int, port: int, tell: Connection) -> None:
    """The body of the server's process."""

    def announce(line: str) -> None:
        tell.send(line.partition("http://")[2].partition(";")[0])

    sampling = Sampling(count, strata=("task",))
    serve_review(out, sampling, port=port, outcomes=outcomes(count, out.parent), announce=announce)


@contextmanager
def server(out: Path, count: int, port: int = 0) -> Iterator[str]:
    """A server in its own process, and its address; ended by SIGKILL."""
    (out.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(min(count, 6)):
        Image.new("RGB", (160, 120), (40 * number, 90, 200)).save(out.parent / "pictures" / f"{number}.png")
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=serve, args=(out, count, port, sender), daemon=True)
    process.start()
    try:
        assert receiver.poll(60), "the server did not start"
        yield f"http://{receiver.recv()}"
    finally:
        process.kill()
        process.join()


def wait_for(page: Any, number: int, done: int) -> None:
    """Until sample `number` (from 1) is shown and `done` are decided."""
    expect(page.locator("#at")).to_have_value(str(number))
    expect(page.locator("#progress")).to_contain_text(f"{done} of ")


def press(page: Any, *steps: tuple[str, int, int]) -> None:
    """Keys, each with the sample that is shown then and how many are decided."""
    for key, number, done in steps:
        page.keyboard.press(key)
        wait_for(page, number, done)


def test_a_review_by_keyboard_survives_a_kill_and_shows_text_as_text(open_page: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "build"
    with server(out, 6) as url:
        page = open_page(url, refusals=True)
        page.locator("#name").fill("ada")
        press(page, ("Enter", 1, 0), ("k", 2, 1), ("d", 2, 1), ("2", 3, 2))
        page.keyboard.press("e")
        page.locator("#edit-reasoning").fill("The hat is red. It becomes blue, n d k u ?")
        page.locator("#edit-answer").fill("a blue hat, kept by hand")
        press(page, ("Control+Enter", 4, 3), ("k", 5, 4), ("u", 4, 3), ("n", 5, 3), ("ArrowLeft", 4, 3), ("p", 3, 3))
        expect(page.locator("#answer")).to_have_text("a blue hat, kept by hand")
    shown = [line["qid"] for line in json.loads((out / "review" / "sample.json").read_text())["samples"]]
    page.keyboard.press("k")
    expect(page.locator("#alert")).to_contain_text("nothing was saved")
    with server(out, 6, int(url.rpartition(":")[2].strip("/"))):
        page.reload()
        wait_for(page, 3, 3)
        expect(page.locator("#mine")).to_have_text("you edited it")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#mine")).to_have_text("you dropped it: wrong answer")
        position = shown.index("7:0") + 1
        page.goto(f"{url}?reviewer=bob&n={position}")
        wait_for(page, position, 0)
        assert page.locator("#query-text").inner_text() == ATTACK
        assert page.locator("main script, main b").count() == 0 and page.evaluate("window.pwned") is None
        expect(page.locator("#query-picture")).to_have_js_property("naturalWidth", 160)
        page.keyboard.press("]")
        expect(page.locator("#target-text")).to_have_text("a second hat")
    decided = {qid: (decision.decision, decision.why) for qid, decision in read_decisions(out)["ada"].items()}
    assert decided == {shown[0]: ("keep", ""), shown[1]: ("drop", "wrong answer"), shown[2]: ("edit", "")}
    settled = settle(out, outcomes(6, tmp_path))[shown[2]]
    assert (settled.decision, settled.answer) == ("keep", "a blue hat, kept by hand")


def test_a_narrow_dark_page_of_2000_by_buttons_loads_few_samples(open_page: Callable[..., Any], tmp_path: Path) -> None:
    asked: list[str] = []

    def watch(page: Any) -> None:
        page.on("request", lambda request: asked.append(request.url))
        page.route("**/api/picture/**", lambda route: route.fulfill(status=204))  # only six are drawn

    with server(tmp_path / "build", 2000) as url:
        dark = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
        page = open_page(f"{url}?reviewer=bob", before=watch, **dark)
        wait_for(page, 1, 0)
        page.wait_for_load_state("networkidle")
        assert sum("/api/sample/" in url for url in asked) == 2, "the sample shown and the one after it"
        for names, number, done in ((("Drop", "hallucination"), 2, 1), (("Undo",), 1, 0), (("Edit", "Save"), 2, 1)):
            for name in names:
                page.get_by_role("button", name=name).click()
            wait_for(page, number, done)
        expect(page.locator("#live")).to_contain_text("Sample 1 edited. Now sample 2 of 2000")
        page.get_by_text("Progress by stratum").click()
        expect(page.locator("#strata")).to_contain_text("1 of 2000")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.close()  # before the server ends, which may still be answering
