"""The page over somebody's own pictures, in a real browser: what narrows, orders, folds and weighs; a stand-in encodes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import uvicorn
from conftest import IN_BROWSER, image_of
from fakes import FakeEncoder
from playwright.sync_api import expect
from test_page import LOW_CONTRAST

from traceir.index import SqliteIndex, open_index
from traceir.items import Item
from traceir.serve.access import Limits
from traceir.serve.run import ServeConfig, make_application, make_server

pytestmark = IN_BROWSER
PAGE = 24
COUNT = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, SqliteIndex]]:
    """A server over 60 pictures of two cameras in two folders, a day apart, of which the last three are alike, and its index."""
    folder, encoder = tmp_path_factory.mktemp("own"), FakeEncoder(width=32)
    items: list[Item] = []
    for number in range(COUNT):
        path = folder / ("trip", "home")[number % 2] / f"IMG_{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        image_of(min(number, COUNT - 3), 40, 30).load().save(path)
        date = f"2023-{number // 28 + 1:02}-{number % 28 + 1:02}T12:00:00"
        fields = {"date": date, "camera": ("Pixel 8", "EOS (R6)")[number % 3 == 0], "name": path.name}
        items.append(Item.of(image=path, id=f"{path.parent.name}/{path.name}", fields=fields))
    with open_index(folder / "index", encoder, create=True) as index:
        index.upsert(items, np.stack([encoding.vector for encoding in encoder.encode_items(items)]))
        made = make_server(ServeConfig(index=str(folder / "index"), title="Own"), lambda: FakeEncoder(width=32))
        made.limits = Limits(None, None)
        running = uvicorn.Server(uvicorn.Config(make_application(made.config, made), port=0, log_level="warning"))
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            while not running.started or made.service is None:
                threading.Event().wait(0.05)
            yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/", index
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture
def page(home: tuple[str, SqliteIndex], open_page: Callable[..., Any]) -> Any:
    return opened(open_page, home[0])


def opened(open_page: Callable[..., Any], url: str, **how: Any) -> Any:
    """The page with all that it knows of the collection."""
    page = open_page(url, refusals=True, viewport={"width": 1280, "height": 800}, **how)
    page.locator("#facets .chip:visible, .card[data-id]:visible").first.wait_for()
    return page


def names(page: Any) -> list[str]:
    """Of the hits that are shown, once they are."""
    expect(page.locator(".count")).not_to_be_empty()
    return [str(name) for name in page.locator(".card .name").all_inner_texts()]


def hash_of(page: Any) -> dict[str, list[str]]:
    return parse_qs(page.url.partition("#")[2])


def filtered(page: Any, where: str) -> None:
    if not page.locator("#panel").is_visible():
        page.locator("#open-panel").click()
    page.locator("#where").fill(where)
    page.locator("#where").press("Enter")


def test_what_a_collection_suggests_leads_into_it_and_back(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 800})
    newest = page.locator("#shelf button").evaluate_all("all => all.map((one) => one.title)")
    assert newest[:2] == ["home/IMG_059.png", "trip/IMG_058.png"]
    headings = page.locator("#facets h3").all_inner_texts()
    assert headings == ["Folders", "Camera"], "one year is no choice"
    assert page.locator("#facets .chip").all_text_contents() == ["home/ 30", "trip/ 30", "Pixel 8 40", "EOS (R6) 20"]
    page.get_by_role("button", name="EOS (R6) 20").click()
    assert names(page) == [f"IMG_{number:03}.png" for number in range(57, 0, -3)] + ["IMG_000.png"]
    assert hash_of(page) == {"where": ['camera="EOS (R6)"'], "sort": ["-date"]}
    expect(page.locator(".count")).to_have_text("all 20 items, newest first")
    expect(page.locator("#on")).to_contain_text('camera="EOS (R6)"')
    assert page.locator(".score, .trace:visible").count() == 0, "nothing was searched"
    page.get_by_role("button", name='Remove camera="EOS (R6)"').click()
    expect(page.locator(".count")).to_contain_text("the first 24 items")
    page.go_back()
    expect(page.locator(".count")).to_contain_text("all 20 items")
    expect(page.locator("#where")).to_have_value('camera="EOS (R6)"')
    page.go_back()
    expect(page.locator("#shelf")).to_be_visible()


def test_a_filter_is_typed_picked_removed_and_mended(page: Any) -> None:
    filtered(page, 'id~"trip/*" and not camera=Pixel 8')
    assert names(page) == [f"IMG_{number:03}.png" for number in range(0, 60, 6)]
    page.locator("#from").fill("2023-01-07")
    expect(page.locator(".count")).to_contain_text("all 9 items")
    page.locator("#to").fill("2023-02-03")
    expect(page.locator("#on li")).to_have_text(['id~"trip/*"', "not camera=Pixel 8", "date>=2023-01-07", "date<=2023-02-03"])
    assert names(page) == [f"IMG_{number:03}.png" for number in range(6, 31, 6)], "the last day is in it"
    page.get_by_role("button", name="Remove date>=2023-01-07").click()
    expect(page.locator("#from")).to_have_value("")
    expect(page.locator("#to")).to_have_value("2023-02-03")
    filtered(page, "camera=Pixel 8 and (date>2023-02")
    expect(page.locator("#where-error")).to_contain_text("a parenthesis is not closed; close the one of character 20")
    expect(page.locator("#where")).to_have_attribute("aria-invalid", "true")
    assert hash_of(page)["where"] == ['id~"trip/*" and not camera=Pixel 8 and date<=2023-02-03'], "it was not applied"
    filtered(page, "date<=2023 and camera=Pixel 8 or name=IMG_003.png")
    expect(page.locator("#on li")).to_have_text(["date<=2023 and camera=Pixel 8 or name=IMG_003.png"])
    expect(page.locator("#where-error")).to_be_hidden()
    filtered(page, "(camera=Pixel 8) or (name=IMG_003.png)")
    page.locator("#to").fill("2023-01-05")
    expect(page.locator(".count")).to_contain_text("all 4 items")
    expect(page.locator("#where")).to_have_value("((camera=Pixel 8) or (name=IMG_003.png)) and date<=2023-01-05")
    page.locator("#where").fill("")
    page.locator("#where").press_sequentially("date<2024 and cam")
    options = page.locator("#filters option").evaluate_all("all => all.map((one) => one.value)")
    assert 'date<2024 and camera="EOS (R6)"' in options and 'date<2024 and id~"trip/*"' in options
    filtered(page, "camera=Nikon")
    expect(page.locator(".state")).to_contain_text("No hits")
    page.get_by_role("button", name="Search without the filter").click()
    expect(page.locator(".card[data-id]")).to_have_count(PAGE)


def test_pages_follow_a_cursor_without_gap_or_double(page: Any, home: tuple[str, SqliteIndex]) -> None:
    filtered(page, "date>=2023")
    page.locator("#sort").select_option("Oldest first")
    expect(page.locator(".count")).to_contain_text("oldest first")
    late = Item.of(image=image_of(99), id="trip/early.png", fields={"date": "2022-12-31", "name": "early.png"})
    home[1].upsert([late], np.eye(1, 32, dtype=np.float32))
    try:
        for count in (2 * PAGE, COUNT):
            page.get_by_role("button", name="Show more").click()
            expect(page.locator(".card[data-id]")).to_have_count(count)
        assert names(page) == [f"IMG_{number:03}.png" for number in range(COUNT)]
        assert page.locator(".rank").all_inner_texts() == [str(rank) for rank in range(1, COUNT + 1)]
        expect(page.get_by_role("button", name="Show more")).to_be_hidden()
        page.locator("#text").fill("whatever")
        page.locator("#text").press("Enter")
        page.wait_for_url("**text=whatever**")
        page.locator("#fold").uncheck()
        page.wait_for_url("**fold=false**")
        expect(page.locator(".count")).to_contain_text("the first 24 items")
        page.get_by_role("button", name="Show more").click()
        expect(page.locator(".card[data-id]")).to_have_count(2 * PAGE)
        page.get_by_role("button", name="Show more").click()
        expect(page.locator(".card[data-id]")).to_have_count(COUNT)
        assert len(set(names(page))) == COUNT
    finally:
        home[1].delete(["trip/early.png"])


def test_near_duplicates_are_folded_and_details_open_them(page: Any) -> None:
    page.locator("#text").fill("anything at all")
    page.locator("#text").press("Enter")
    for count in (PAGE, 2 * PAGE, COUNT - 2):
        expect(page.locator(".card[data-id]")).to_have_count(count)
        if count < COUNT - 2:
            page.get_by_role("button", name="Show more").click()
    page.get_by_role("button", name=re.compile("^2 near-duplicates of hit")).click()
    folded = page.get_by_role("region", name="Folded under it").locator("button")
    expect(folded).to_have_count(2)
    expect(page.get_by_role("region", name="Similar").locator("button").first).to_be_visible()
    title = str(folded.first.get_attribute("title"))
    folded.first.click()
    expect(page.locator("#details h2")).to_have_text(title.split("/")[1])
    expect(page.locator(".facts")).to_contain_text("2023-03-0")
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#details h2").evaluate("heading => { heading.textContent = 'Screenshot_'.repeat(20); }")
    assert page.locator("#details").evaluate("({scrollWidth, clientWidth}) => scrollWidth - clientWidth") == 0
    page.set_viewport_size({"width": 1280, "height": 800})
    page.keyboard.press("Escape")
    page.locator("#open-panel").click()
    page.locator("#fold").uncheck()
    page.wait_for_url("**fold=false**")
    expect(page.locator(".folded")).to_have_count(0)


def test_terms_mode_and_order_are_in_the_address(page: Any, home: tuple[str, SqliteIndex], open_page: Callable[..., Any]) -> None:
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.url.endswith("/search/stream") else None)
    page.locator("#text").fill("IMG")
    page.locator("#text").press("Enter")
    plain = names(page)
    assert float(page.locator(".score").first.inner_text()) < 1
    page.locator(".opener").first.click()
    page.get_by_role("button", name="Less like this").click()
    expect(page.locator(".chip.less")).to_contain_text(plain[0])
    expect(page.locator(".card .name").first).not_to_have_text(plain[0])
    page.locator("#home").focus()
    page.keyboard.press("f")
    expect(page.locator("#where")).to_be_focused()
    page.locator("#term").fill("red: door")
    page.locator("#more-of").click()
    page.get_by_label("Weight of red: door").select_option("×2")
    page.get_by_role("button", name=re.compile("^More of red: door")).click()
    page.wait_for_url("**-2**")
    terms = hash_of(page)["term"]
    assert terms[1] == "-2:text:red: door" and re.fullmatch(r"-0\.5:item:(trip|home)/IMG_\d+\.png", terms[0])
    assert [term["weight"] for term in asked[-1]["terms"]] == [-0.5, -2]
    page.get_by_role("radio", name="Words").check()
    page.wait_for_url("**mode=keyword**")
    page.locator("#sort").select_option("Newest first")
    page.wait_for_url("**sort=-date**")
    expect(page.locator(".count")).to_contain_text("newest first")
    address, shown = page.url, names(page)
    assert shown == sorted(shown, reverse=True) and asked[-1]["mode"] == "keyword" and asked[-1]["sort"] == "-date"
    again = opened(open_page, address)
    assert names(again) == shown and again.url == address
    expect(again.locator("#sort")).to_have_value("-date")
    expect(again.locator('input[name="mode"][value="keyword"]')).to_be_checked()
    expect(again.locator("#on li")).to_have_count(2)
    page.go_back()
    expect(page.locator("#sort")).to_have_value("")
    page.go_back()
    expect(page.locator('input[name="mode"][value="vector"]')).to_be_checked()


def test_hits_and_scores_are_above_the_fold_with_all_controls_open(page: Any) -> None:
    page.locator("#text").fill("a red door in the snow")
    page.locator("#text").press("Enter")
    filtered(page, 'date>=2023 and id~"*"')
    page.locator("#term").fill("people")
    page.locator("#less-of").click()
    expect(page.locator("#on li")).to_have_count(3)
    expect(page.locator(".card[data-id]").nth(5)).to_be_visible()
    foot = page.locator(".card").first.locator(".score").bounding_box()
    assert foot["y"] + foot["height"] < 800 and page.locator("#panel").is_visible()
    first = page.locator(".opener").first
    assert first.locator(".name").get_attribute("title").endswith(first.locator(".name").inner_text())
    expect(first.locator(".about-hit")).to_have_text(re.compile(r"2023.* · (Pixel 8|EOS \(R6\))"))
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.mouse.move(0, 0)
        assert page.evaluate(LOW_CONTRAST) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#open-panel").click()
    foot = page.locator(".card").first.locator(".score").bounding_box()
    assert foot["y"] + foot["height"] < 844


def test_a_picture_that_cannot_be_searched_with_is_told_when_it_is_chosen(page: Any, tmp_path: Path) -> None:
    complaint, chosen = page.locator("#complaint"), page.locator("#chosen")
    broken, apple, large = tmp_path / "broken.png", tmp_path / "IMG_1.heic", tmp_path / "large.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    apple.write_bytes(b"\0\0\0\x18ftypheic")
    large.write_bytes(b"\x89PNG" + bytes(17 * 2**20))
    assert ".heic" in page.locator("#file").get_attribute("accept").split(",")
    for file, told in (
        (broken, "“broken.png” cannot be searched with: "),
        (apple, "“IMG_1.heic” cannot be searched with: "),
        (large, "“large.png” has 17.0 MB, more than the 16 MB"),
    ):
        page.locator("#file").set_input_files(file)
        expect(complaint).to_contain_text(told)
        expect(chosen).to_be_hidden()
    good = tmp_path / "good.png"
    image_of(5, 40, 30).load().save(good)
    page.locator("#file").set_input_files(good)
    expect(chosen).to_be_visible()
    expect(complaint).to_be_hidden()
    page.locator("#text").press("Enter")
    assert names(page)[0] == "IMG_005.png"
