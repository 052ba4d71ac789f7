"""The page in a real browser, over the bundled model and a small index; what it shows is held to a Searcher's answers."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import IN_BROWSER, image_of, serving
from playwright.sync_api import expect
from published import save_clip

from traceir.background import choose_queries
from traceir.checkpoint import bundled_model
from traceir.cli import main as cli
from traceir.encoder import Encoder
from traceir.images import ImageInput
from traceir.items import Item, Query, Route
from traceir.lab import demo
from traceir.retrieval.search import Searcher

ATTACK = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><u>zorvex</u> & </p>"
PAGE = 24
WATCH = """() => {
  window.written = [];
  new MutationObserver(() => {
    const text = document.querySelector(".steps .writing")?.parentNode.textContent;
    if (text && text !== window.written.at(-1)) window.written.push(text);
  }).observe(document.getElementById("columns"), {subtree: true, childList: true, characterData: true, attributes: true});
  window.said = [];
  new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
    .observe(document.getElementById("live"), {childList: true});
}"""
"""Keeps what the page shows of a reasoning while it is being written, and what it tells screen readers."""
LOW_CONTRAST = """async () => {
  for (let frame = 0; frame < 2; frame += 1) await new Promise(requestAnimationFrame);
  await Promise.all(document.getAnimations().map(({finished}) => finished));
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paint = (css) => {
    context.fillStyle = css;
    context.fillRect(0, 0, 1, 1);
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = () => {
    const [red, green, blue] = [...context.getImageData(0, 0, 1, 1).data].map(linear);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const isSeen = element.checkVisibility({opacityProperty: true}) && !element.closest(".unseen, :disabled");
    if (!isSeen || !texts.currentNode.data.trim()) continue;
    const grounds = ["white"];
    for (let at = element; at; at = at.parentElement) grounds.splice(1, 0, getComputedStyle(at).backgroundColor);
    grounds.forEach(paint);
    const ground = light();
    paint(getComputedStyle(element).color);
    const ratio = (Math.max(light(), ground) + 0.05) / (Math.min(light(), ground) + 0.05);
    if (ratio < 4.5) low.push([ratio.toFixed(2), element.className || element.tagName, texts.currentNode.data.slice(0, 40)]);
  }
  return low;
}"""
"""Visible texts whose contrast (WCAG 2.2, 1.4.3) is below 4.5."""

pytestmark = IN_BROWSER


@dataclass(frozen=True, slots=True)
class Service:
    """A running server's address, the same search without it, and queries that people might ask."""

    url: str
    searcher: Searcher
    questions: list[demo.Question]

    def asked(self, row: str, steps: int) -> demo.Question:
        return next(question for question in self.questions if (question.row, question.steps) == (row, steps))

    @property
    def caption(self) -> Query:
        """A simple query of words alone."""
        return self.asked("mscoco_task0", 0).query

    def ids(self, query: Query, k: int = PAGE, route: Route = "auto") -> list[str]:
        return [hit.id for hit in self.searcher.search(query, k=k, route=route).hits]


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[Service]:
    out = tmp_path_factory.mktemp("page")
    shutil.copytree(folder, out / "minibeir", copy_function=os.link)  # the demonstration finds it built
    pool, questions = demo.prepare(out)
    index, _ = demo.fill(pool, out, encoder, progress=False)
    evil = Item.of(text=ATTACK, id=f"evil/{ATTACK}", fields={"<img src=x onerror='window.pwned = 3'>": ATTACK, "lines": "a\nb"})
    index.upsert([evil], encoder.encode_items([evil])[0].vector[None])
    with serving(Path(index.info().uri)) as url:
        yield Service(url, Searcher(encoder, index), questions)
    index.close()


def shown_ids(page: Any, column: int = 0) -> list[str]:
    """The ids of the hits of a column, once its search is over."""
    expect(page.locator(".trace").nth(column)).to_have_attribute("data-status", "done")
    cards = page.locator(".grid").nth(column).locator(".card[data-id]")
    return [str(id) for id in cards.evaluate_all("all => all.map((card) => card.dataset.id)")]


def encoded(image: ImageInput) -> str:
    assert image.path is not None
    return base64.b64encode(image.path.read_bytes()).decode()


def drop(page: Any, *files: ImageInput | str) -> None:
    """Files dropped on the page together, as the browser would tell it; a name is a text file's."""
    dropped = [(file, "", "text/plain") if isinstance(file, str) else (file.name, encoded(file), "image/jpeg") for file in files]
    page.evaluate(
        """(files) => {
          const dataTransfer = new DataTransfer();
          for (const [name, data, type] of files) {
            dataTransfer.items.add(new File([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], name, {type}));
          }
          for (const kind of ["dragenter", "dragover", "drop"]) {
            document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer}));
          }
        }""",
        dropped,
    )


def ask(page: Any, query: Query) -> None:
    """Types a query into the search box and sends it; its image is dropped."""
    for image in query.images:
        drop(page, image)
        expect(page.locator("#preview")).to_have_js_property("complete", True)
    page.locator("#text").fill(query.text)
    if not page.locator("#panel").is_visible():
        page.locator("#open-panel").click()
    page.locator("#instruction").fill(query.instruction or "")
    page.locator(f'input[name="modality"][value="{query.target or ""}"]').check()
    page.locator("#text").press("Enter")


def answering(event: str, data: Any) -> Callable[[Any], None]:
    """A handler that answers a search with this event alone; a text is sent as it is."""
    body = f"event: {event}\ndata: {data if isinstance(data, str) else json.dumps(data)}\n\n"
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def test_a_dropped_image_is_edited_reasoned_over_and_refined(
    service: Service, encoder: Encoder, open_page: Callable[..., Any]
) -> None:
    question = service.asked("cirr_task7", 2)
    page = open_page(service.url)
    assert encoder.world is not None
    expect(page.locator("#notice")).to_contain_text(encoder.world.says)
    expect(page.locator("#collection")).to_contain_text("pictures")
    page.evaluate(WATCH)
    ask(page, question.query)
    expected = service.searcher.search(question.query, k=PAGE)
    first, encoding = expected.hits[0], expected.encoding
    steps = encoding.reasoning.split("; ")
    assert shown_ids(page) == service.ids(question.query) and first.id in question.right
    expect(page.locator(".trace .badge")).to_have_text("reasoned")
    assert page.locator(".steps li").all_inner_texts()[-1] == steps[-1]
    expect(page.locator(".trace [role=meter]")).to_have_attribute("aria-valuenow", f"{encoding.emb_probability:.3f}")
    expect(page.locator(".trace .total")).to_have_text(re.compile(rf"^{encoding.tokens} tokens · [\d.]+ m?s$"))
    expect(page.locator("#live")).to_contain_text(f"{PAGE} hits")
    announced = page.evaluate("window.said.join(' ')")
    assert all(words in announced for words in ("Searching.", "reasons first", *steps, f"{PAGE} hits")), announced
    expect(page.locator(".frame img").first).not_to_have_js_property("naturalWidth", 0)
    assert page.url == f"{service.url}/", "a picture of one's own cannot be in an address"
    sizes = [len(text) for text in page.evaluate("window.written")]
    assert len(sizes) > 1 and sizes == sorted(sizes), "it was shown as it was written"

    page.locator(".card").first.hover()
    page.get_by_role("button", name="Now make it … with hit 1", exact=True).click()
    expect(page.locator("#text")).to_be_focused()
    assert page.locator("#text").input_value() == ""
    page.keyboard.type("Swap the left two.")
    page.keyboard.press("Enter")
    expect(page.locator(".crumb")).to_have_count(2)
    image = ImageInput.open(str(first.image))
    refined = service.ids(
        Query.of(text="Swap the left two.", image=image, instruction=question.query.instruction, target="image")
    )
    assert shown_ids(page) == refined != service.ids(question.query)
    assert f"item={first.id.replace(':', '%3A')}" in page.url

    page.locator("#text").fill("Swap the outer two.")
    page.keyboard.press("Enter")
    expect(page.locator(".crumb")).to_have_text(["Turn 1: " + question.query.text, "Turn 2: Swap the outer two."])
    shown_ids(page)
    page.go_back()
    assert shown_ids(page) == refined
    page.locator("#back").click()
    assert shown_ids(page) == service.ids(question.query)
    expect(page.locator("#text")).to_have_value(question.query.text)
    page.go_back()
    assert shown_ids(page) == refined
    expect(page.locator(".crumb[aria-current=step]")).to_contain_text("Swap the left two.")


def test_both_routes_side_by_side_mark_what_moved(service: Service, open_page: Callable[..., Any]) -> None:
    query = service.asked("cirr_task7", 3).query
    page = open_page(service.url)
    ask(page, query)
    shown_ids(page)
    page.get_by_role("button", name="Compare without reasoning").click()
    reasoned, direct = service.ids(query, route="reason"), service.ids(query, route="direct")
    assert (shown_ids(page, 1), shown_ids(page, 0)) == (direct, reasoned) and reasoned != direct
    moved = [reasoned.index(id) - position if id in reasoned else None for position, id in enumerate(direct)]
    expected = ["only here" if by is None else f"▲ {by}" if by > 0 else f"▼ {-by}" if by < 0 else "=" for by in moved]
    assert page.locator(".grid").nth(1).locator(".move").all_inner_texts() == expected
    shared, kept = sum(by is not None for by in moved), sum(by == 0 for by in moved)
    expect(page.locator("#verdict")).to_contain_text(f"They share {shared} of {PAGE}: {kept} in the same place")
    assert page.locator(".badge").all_inner_texts() == ["reasoned", "skipped reasoning"]
    page.keyboard.press("Escape")
    expect(page.locator(".column")).to_have_count(1)
    assert shown_ids(page) == reasoned and page.locator(".move:visible").count() == 0


def test_the_keyboard_reaches_everything(service: Service, open_page: Callable[..., Any]) -> None:
    page = open_page(service.url, viewport={"width": 1300, "height": 900})
    query = Query.of(text=service.caption.text)

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def opener(index: int) -> Any:
        return page.locator(".card").nth(index).locator(".opener")

    press("Tab", "?")
    expect(page.locator("#help")).to_be_visible()
    press("Escape", "/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type(query.text)
    press("Enter")
    first = shown_ids(page)
    assert first == service.ids(query)
    page.get_by_role("button", name=re.compile(r"^Hit 1, score 0\.\d{3}, ")).focus()
    press("ArrowRight", "ArrowRight")
    expect(opener(2)).to_be_focused()
    press("ArrowDown")
    below = page.evaluate("document.activeElement.closest('.card').getBoundingClientRect().top")
    assert below > page.locator(".card").nth(2).bounding_box()["y"]
    press("ArrowUp", "Home", "Enter")
    expect(page.locator("#details")).to_contain_text(first[0])
    press("ArrowRight")
    expect(page.locator("#details h2")).to_have_text(re.compile("^Hit 2: "))
    press("Escape")
    expect(opener(1)).to_be_focused()
    press("Tab")
    expect(page.get_by_role("button", name="Now make it … with hit 2", exact=True)).to_be_focused()
    press("Tab")
    expect(page.get_by_role("button", name="Show more")).to_be_focused()
    press("Enter")
    expect(page.locator(".card[data-id]")).to_have_count(2 * PAGE)
    assert shown_ids(page) == service.ids(query, k=2 * PAGE)
    expect(opener(PAGE)).to_be_focused()


def test_text_from_data_is_only_ever_text(service: Service, open_page: Callable[..., Any]) -> None:
    config = {"title": ATTACK, "instructions": [ATTACK], "count": {ATTACK: 1}, "examples": [{"title": ATTACK, "text": ATTACK}]}
    page = open_page(service.url, before=lambda page: page.route("**/page/config", lambda route: route.fulfill(json=config)))
    page.get_by_role("button", name=ATTACK).filter(has=page.locator(".asked")).click()
    assert f"evil/{ATTACK}" in shown_ids(page)
    page.locator(".card", has_text="zorvex").locator(".opener").click()
    assert page.locator(".whole-text").inner_text() == ATTACK
    facts = page.locator(".facts div").all_inner_texts()
    for words in ({"onerror='window.pwned = 3'", ATTACK}, {f"evil/{ATTACK}"}):
        assert any(all(word in fact for word in words) for fact in facts)
    page.get_by_role("button", name="Search with this").click()
    shown_ids(page)
    page.locator("#open-history").click()
    expect(page.locator("#past")).to_contain_text("zorvex")
    assert page.evaluate("window.pwned") is None
    assert page.locator("body script, u, img[src='x']").count() == 0


def test_a_server_with_keys_asks_for_one(service: Service, open_page: Callable[..., Any]) -> None:
    seen: list[str] = []

    def answer(route: Any) -> None:
        held = route.request.headers.get("authorization")
        seen.append(f"{held} {route.request.url.removeprefix(service.url)}")
        if held == "Bearer tir_right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "a key is needed", "type": "authentication_error"}})

    def locked(page: Any) -> None:
        for path in ("page/config", "search**", "items/**", "pictures/**"):
            page.route(f"{service.url}/{path}", answer)

    page = open_page(service.url, before=locked, refusals=True)
    expect(page.locator("#key")).to_be_visible()
    page.locator("#key-value").fill("tir_right")
    page.keyboard.press("Enter")
    expect(page.locator("#collection")).to_contain_text("pictures")
    ask(page, service.caption)
    assert shown_ids(page) == service.ids(service.caption)
    expect(page.locator(".frame img").first).to_have_attribute("src", re.compile("^blob:"))
    expect(page.locator(".frame img").first).not_to_have_js_property("naturalWidth", 0)
    assert all(request.startswith("Bearer tir_right ") for request in seen[1:])
    assert page.evaluate("[sessionStorage.length, Object.values({...localStorage}).join().includes('tir_')]") == [1, False]
    page.evaluate("sessionStorage.setItem('traceir.key', 'tir_old')")
    page.locator("#text").press("Enter")
    expect(page.locator("#key")).to_be_visible()
    page.locator("#key-value").fill("tir_right")
    page.get_by_role("button", name="Use this key").click()
    assert shown_ids(page) == service.ids(service.caption), "the search that was refused goes on"
    page.locator("#open-key").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("#key")).to_be_hidden()
    assert not page.evaluate("sessionStorage.getItem('traceir.key')") and page.locator("#open-key").is_hidden()


def test_errors_are_told_and_can_be_tried_again(service: Service, open_page: Callable[..., Any]) -> None:
    page = open_page(service.url, refusals=True)
    state, again = page.locator(".state"), page.get_by_role("button", name="Try again")

    def busy(route: Any) -> None:
        error = {"message": "the queue is full <b>", "type": "rate_limit_error", "param": None, "code": None}
        route.fulfill(status=429, json={"error": error}, headers={"retry-after": "3"})

    def failing(kind: str) -> Callable[[Any], None]:
        return answering("error", {"error": {"message": "so it is", "type": kind}})

    for number, (answer, shown) in enumerate((
        (busy, "The server is busythe queue is full <b>Try again in 3 s."),
        (lambda route: route.abort(), "No connection"),
        (answering("route", {"route": "reason", "emb_probability": 0.1}), "The connection ended before the hits came."),
        (failing("invalid_request_error"), "The server refused this searchso it is"),
        (failing("rate_limit_error"), "The server is busyso it is"),
        (failing("server_error"), "The search failedso it is"),
        (answering("hits", "{"), "an event that is not JSON"),
    )):  # fmt: skip
        page.unroute_all()
        page.route("**/search/stream", answer)
        again.click() if number else ask(page, service.caption)
        expect(state).to_contain_text(shown)
        expect(state).to_have_attribute("role", "alert")
    page.unroute_all()
    again.click()
    assert shown_ids(page) == service.ids(service.caption)
    expect(state).to_be_hidden()


def test_a_search_can_be_stopped_and_a_new_one_ends_the_old(service: Service, open_page: Callable[..., Any]) -> None:
    other = service.asked("edis_task2", 0).query
    page = open_page(service.url)
    held: list[Any] = []
    gone: list[str] = []
    page.on("requestfailed", lambda request: gone.append(json.loads(request.post_data)["text"]))
    # Two are never answered.
    page.route("**/search/stream", lambda route: held.append(route) if len(held) < 2 else route.continue_())
    ask(page, service.caption)
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".state")).to_contain_text("Stopped")
    expect(page.locator("#go")).to_be_visible()
    ask(page, service.caption)
    ask(page, other)
    assert shown_ids(page) == service.ids(other) and gone[:2] == [service.caption.text] * 2
    expect(page.locator(".crumb")).to_have_count(1)


def test_addresses_and_history_bring_a_search_back(service: Service, open_page: Callable[..., Any]) -> None:
    query = service.asked("mscoco_task0", 2).query
    expected = service.ids(query)
    page = open_page(service.url)
    ask(page, query)
    assert shown_ids(page) == expected
    address = page.url
    page.reload()
    assert shown_ids(page) == expected
    page.locator("#text").fill("Another question.")
    page.locator("#text").press("Enter")
    expect(page).to_have_title(re.compile("Another"))
    page.reload()
    shown_ids(page)
    page.go_back()
    expect(page.locator("#text")).to_have_value(query.text)
    assert shown_ids(page) == expected, "what was before a reload is not taken for a turn after it"
    page.locator("#home").click()
    drop(page, service.asked("cirr_task7", 2).query.images[0])
    page.locator("#text").press("Enter")
    shown_ids(page)
    page.locator("#open-history").click()
    expect(page.locator("#past li")).to_have_count(2)
    page.locator("#past button", has_text=query.text).click()
    assert shown_ids(page) == expected
    fresh = open_page(address)
    assert shown_ids(fresh) == expected
    expect(fresh.locator("#instruction")).to_have_value(query.instruction)
    fresh.locator("#open-history").click()
    fresh.get_by_role("button", name="Clear history").click()
    expect(fresh.locator("#past")).to_have_text("Nothing yet.")


def test_a_narrow_dark_page_an_empty_index_and_no_hits(service: Service, open_page: Callable[..., Any]) -> None:
    config = {"title": "Shop", "count": {}, "instructions": ["Find it."]}
    narrow = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "reduced_motion": "reduce"}
    page = open_page(
        service.url, before=lambda page: page.route("**/page/config", lambda route: route.fulfill(json=config)), **narrow
    )
    expect(page.locator("#notice")).to_contain_text("The collection is empty")
    for name in ("History", "Help"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    assert page.title() == "Shop" and page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#open-panel").click()
    expect(page.locator("#instructions option")).to_have_attribute("value", "Find it.")
    page.locator("#instruction").fill("Find it.")
    expect(page.locator("#on")).to_have_text("Find it.")
    answer = {"hits": [], "trace": {"route": "direct", "reasoning": "", "tokens": 0, "seconds": {}}, "more": False}
    page.route("**/search/stream", answering("hits", answer))
    page.locator('input[name="modality"][value="text"]').check()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator(".state")).to_contain_text("No hits")
    page.unroute("**/search/stream")
    page.get_by_role("button", name="Look for anything").click()
    assert len(shown_ids(page)) == PAGE
    expect(page.locator('input[name="modality"][value=""]')).to_be_checked()
    page.get_by_role("button", name=re.compile("Compare")).click()
    shown_ids(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.mouse.move(0, 0)
        assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate("document.getAnimations().filter(({playState}) => playState === 'running').length") == 0


def test_images_come_by_drop_paste_and_from_the_collection(service: Service, open_page: Callable[..., Any]) -> None:
    image = service.asked("cirr_task7", 1).query.images[0]
    page = open_page(service.url, permissions=["clipboard-read", "clipboard-write"])
    about, complaint = page.locator("#about-picture"), page.locator("#complaint")
    kinds = "Give a picture as JPEG, PNG, WEBP, GIF, BMP, TIFF, HEIF, AVIF."
    for files, shown in (
        (["notes.txt"], f"“notes.txt” cannot be searched with. {kinds}"),
        (["notes.txt", "more.txt"], f"None of these 2 files can be searched with. {kinds}"),
    ):
        drop(page, *files)
        expect(complaint).to_have_text(shown)
    drop(page, "notes.txt", image, service.asked("cirr_task7", 2).query.images[0])
    expect(about).to_have_text(f"with {image.name}")
    expect(page.locator("#toast")).to_contain_text(f"One picture at a time: “{image.name}” was taken.")
    expect(complaint).to_be_hidden()
    page.evaluate(
        """async (data) => {
          const loaded = new Image();
          loaded.src = `data:image/jpeg;base64,${data}`;
          await loaded.decode();
          const canvas = Object.assign(document.createElement("canvas"), {width: 32, height: 32});
          canvas.getContext("2d").drawImage(loaded, 0, 0, 32, 32);
          const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
          await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        encoded(image),
    )
    page.locator("#text").press("Control+v")
    expect(about).to_have_text("with image.png")
    page.get_by_role("button", name="Remove the picture").click()
    page.locator("#shelf button").first.click()
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#preview")).not_to_have_js_property("naturalWidth", 0)
    page.keyboard.press("Enter")
    taken = re.sub(r".*item=([^&]+).*", r"\1", page.url).replace("%3A", ":")
    assert taken in shown_ids(page), "a picture finds itself"


def test_event_streams_are_read_however_they_are_cut(service: Service, open_page: Callable[..., Any]) -> None:
    stream = (
        "\ufeff: hello\r\nevent: route\r\ndata: {\"a\":\r\ndata:  1}\r\n\r\nid: 7\nretry: 5\ndata\n\n"
        "event: empty\n\nevent:x\rdata:ä 𝄞\r\rdata: one\n\n\ndata: never ended\n"
    )  # fmt: skip
    expected = [("route", '{"a":\n 1}'), ("message", ""), ("x", "ä 𝄞"), ("message", "one")]
    page = open_page(service.url)
    ways = page.evaluate(
        """async (stream) => {
          const {readEvents} = await import("/static/api.js");
          const bytes = new TextEncoder().encode(stream);
          const read = async (pieces) => {
            const events = [];
            const body = new ReadableStream({start(to) { pieces.forEach((piece) => to.enqueue(piece)); to.close(); }});
            for await (const {event, data} of readEvents(body)) events.push([event, data]);
            return JSON.stringify(events);
          };
          const cuts = Array.from(bytes, (_, at) => [bytes.slice(0, at), bytes.slice(at)]);
          return [...new Set(await Promise.all([Array.from(bytes, (byte) => Uint8Array.of(byte)), ...cuts].map(read)))];
        }""",
        stream,
    )
    assert [[tuple(event) for event in json.loads(way)] for way in ways] == [expected]


def test_a_search_for_what_is_not_there_finds_nothing(service: Service, open_page: Callable[..., Any]) -> None:
    """The last test of the service: from here on the index is calibrated, by another process than the server's."""
    page = open_page(service.url)
    ask(page, Query.of(text="a cat in a hat"))
    assert len(shown_ids(page)) == PAGE and page.locator("#cutoff").is_disabled()
    expect(page.locator("#cutoff-why")).to_contain_text("traceir index calibrate")
    searcher = Searcher(service.searcher.encoder, service.searcher.index)
    searcher.calibrate(choose_queries([], bundled_model(), count=400)[0])
    page = open_page(service.url)
    page.locator("#open-panel").click()
    slider = page.locator("#cutoff")
    expect(slider).to_be_enabled()
    assert slider.get_attribute("max") == "7", "a background of 400 queries tells no rate below 1 in 200"
    assert page.evaluate(LOW_CONTRAST) == []
    for _ in range(6):
        slider.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "1 in 100 false alarms")
    ask(page, Query.of(text="a cat in a hat", target="image"))
    assert shown_ids(page) == []
    state = page.locator(".state")
    expect(state).to_contain_text("Nothing found")
    expect(state).to_contain_text("1 in 100 queries find whose answer is not in the collection. The nearest scores 0.")
    expect(page.locator("#live")).to_contain_text("Nothing found")
    page.get_by_role("button", name="Show the nearest all the same").click()
    expect(page.locator(".card[data-id]")).to_have_count(PAGE)
    ask(page, service.caption)
    expected = [hit.id for hit in searcher.search(service.caption, k=PAGE, cutoff=0.01).hits]
    assert shown_ids(page) == expected != []
    if len(expected) < PAGE:
        expect(page.locator(".count")).to_contain_text("above the cut-off")
    page.get_by_role("radio", name="Words").check()
    expect(state).to_contain_text("No hits")  # and no refusal: there is no cut-off where words alone are looked for
    page.get_by_role("radio", name="Meaning").check()
    # The index is calibrated for texts alone, so a search with an image is shown what is nearest.
    ask(page, service.asked("cirr_task7", 2).query)
    assert len(shown_ids(page)) == PAGE


def test_the_page_of_a_published_model_shows_no_route(open_page: Callable[..., Any], tmp_path: Path) -> None:
    model, photos, index = str(save_clip(tmp_path / "clip")), tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for number in range(5):
        image_of(number, 60, 40).load().save(photos / f"{number}.png")
    assert cli.main(["index", "add", str(photos), "--index", str(index), "--model", model]) == 0
    with serving(index, "--model", model) as url:
        page = open_page(url)
        page.locator("#shelf button").first.click()
        assert page.locator("#notice, #examples-part").evaluate_all("all => all.every((part) => part.hidden)")
        page.locator("#text").press("Enter")
        assert shown_ids(page)[0] == "0.png", "a picture finds itself"
        page.locator("#open-panel").click()
        assert not page.locator("#route:visible, button.compare:visible, .trace:visible, .found > .note:visible").count()
        page.close()  # before the server ends, which its images may still be coming from
