"""The images of the page in docs/: `python -m benchmarks.screenshots --pictures FOLDER [FOLDER ...]`.

Two servers, driven in Chromium. The demonstration's: a search with an image and two edits (page.png), and beside it the route
without reasoning (page-compare.png). And one over 2,000 of the pictures below the folders, as somebody's own: as it begins, a
search that is filtered (page-pictures.png), details, dark and narrow (page-dark-narrow.png). Its encoder stands in for a large
one: it knows the words of a file's name and the colours of a picture; dates, cameras and bursts are drawn (seed 0). `--all
FOLDER` keeps every view there, to look at.
Needs the extra `dev` and a `chromium` on the PATH.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageEnhance
from playwright.sync_api import expect, sync_playwright

from benchmarks.serve import server
from traceir.errors import ImageError, InputError
from traceir.index import open_index
from traceir.items import Content, Encoding, Item, Query, Route, Vector
from traceir.lab.fixture import unpack
from traceir.serve.access import Limits
from traceir.serve.run import ServeConfig, make_application, make_server

DOCS = Path(__file__).parents[1] / "docs"
SCENE = "mbeir_images/cirr_images/scene_wbpopm_815.jpg"
EDITS = "Make the one in the middle yellow, then make the right one the same shape as the one that is now yellow."
COUNT = 2000
CAMERAS = ("Pixel 8", "iPhone 15", "Canon EOS R6", "Fujifilm X-T5")
WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
NARROW: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


class NameEncoder:
    """Vectors of the words in a file's name, or of a text, and of the colours of a picture."""

    fingerprint, prompt_version, width = "names-and-colours", "none", 4096 + 64

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        return [self._encode(query) for query in queries]

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return [self._encode(item) for item in items]

    def _encode(self, content: Content) -> Encoding:
        vector = np.zeros(self.width)
        names = [re.sub(r"_\d+$", "", Path(image.path or image.name or "").stem) for image in content.images]
        for word in re.findall(r"[^\W\d_]+", f"{content.text} {' '.join(names)}".lower()):
            for piece in (word, *(word[at : at + 4] for at in range(len(word) - 3))):
                place = int.from_bytes(hashlib.sha256(piece.encode()).digest()[:4], "little") % 4096
                vector[place] += 3.0 if piece == word else 1.0
        vector /= np.linalg.norm(vector) or 1.0
        for image in content.images:
            colours = np.asarray(image.load(shrink_to=64).convert("RGB").resize((32, 32))) // 64
            counts = np.bincount((colours.reshape(-1, 3) @ [16, 4, 1]).ravel(), minlength=64)
            vector[4096:] += 0.9 * counts / np.linalg.norm(counts)
        unit: Vector = (vector / (np.linalg.norm(vector) or 1.0)).astype(np.float32)
        return Encoding(unit, "direct", "", 0, 1.0, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True, help="folders of pictures, the first ones first")
    parser.add_argument("--all", type=Path, help="keep every view in this folder")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise InputError("there is no chromium on the PATH; install it, for instance with apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        work, views = Path(folder), Views(args.all)
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with own_pictures(work, args.pictures) as url:
            for name, how in (("light", WIDE), ("dark", {**WIDE, "color_scheme": "dark"}), ("narrow", NARROW)):
                look_around(browser, url, name, how, views)
        compare_routes(browser, work, views)
        browser.close()
    return 0


def own_files(folders: Sequence[Path], out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """COUNT pictures as a camera would leave them, with fields: those of a large side become bursts of three at most."""
    draw = random.Random(0)
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".jpg", ".png", ".webp")]
    made: list[tuple[Path, dict[str, Any]]] = []
    for file in files:
        if len(made) >= COUNT:
            break
        try:
            with Image.open(file) as opened:
                opened.draft("RGB", (1600, 1600))
                picture = opened.convert("RGBA" if max(opened.size) < 200 else "RGB")
        except (OSError, ValueError, ImageError):
            continue
        picture.thumbnail((1200, 1200))
        taken = datetime.datetime(2019, 1, 1) + datetime.timedelta(minutes=draw.randrange(60 * 24 * 2500))
        camera, folder = draw.choice(CAMERAS), out / str(taken.year) / ("phone" if taken.month % 3 else "holiday")
        folder.mkdir(parents=True, exist_ok=True)
        for shot in range(draw.choice((1, 1, 2, 3)) if picture.mode == "RGB" else 1):
            path = folder / f"{file.stem.lower()}{f'_{shot}' if shot else ''}{'.jpg' if picture.mode == 'RGB' else '.png'}"
            shown = ImageEnhance.Brightness(picture).enhance(1 + 0.03 * shot) if shot else picture
            shown.save(path)
            when = (taken + datetime.timedelta(seconds=2 * shot)).isoformat()
            fields = {"date": when, "camera": camera, "name": path.name, "width": picture.width, "height": picture.height}
            made.append((path, fields if picture.mode == "RGB" else {**fields, "kind": "drawing"}))
    return made[:COUNT]


@contextmanager
def own_pictures(work: Path, folders: Sequence[Path]) -> Iterator[str]:
    """The address of a server over the pictures, in a thread."""
    encoder, files = NameEncoder(), own_files(folders, work / "own")
    items = [Item.of(image=path, id=str(path.relative_to(work / "own")), fields=fields) for path, fields in files]
    with open_index(work / "own.index", encoder, create=True) as index:
        index.upsert(items, np.stack([encoding.vector for encoding in encoder.encode_items(items)]))
    config = ServeConfig(index=str(work / "own.index"), title="My pictures", requests_per_minute=100_000)
    made = make_server(config, NameEncoder)
    made.limits = Limits(None, None)
    running = uvicorn.Server(uvicorn.Config(make_application(config, made), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started or made.service is None:
            threading.Event().wait(0.1)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join()


class Views:
    """Keeps what a page shows."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def keep(self, page: Any, name: str, docs: str | None = None, *, whole: bool = False) -> None:
        page.mouse.move(0, 0)
        if whole:  # what is below is loaded as it is scrolled to
            page.mouse.wheel(0, 9999)
            page.wait_for_timeout(300)
            page.evaluate("scrollTo(0, 0)")
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        for path in ([self.folder / f"{name}.png"] if self.folder else []) + ([DOCS / docs] if docs else []):
            path.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=path, full_page=whole, animations="disabled")
            with Image.open(path) as shot:
                small = shot.convert("RGB").quantize(256)
            small.save(path, optimize=True)


def look_around(browser: Any, url: str, name: str, how: dict[str, Any], views: Views) -> None:
    """Every view of somebody's own pictures."""
    page = browser.new_context(**how).new_page()
    page.goto(url)
    expect(page.locator("#shelf img").first).to_be_visible()
    views.keep(page, f"{name}-start")
    page.locator("#text").fill("flower")
    page.locator("#text").press("Enter")
    expect(page.locator(".count")).to_contain_text("best first")
    views.keep(page, f"{name}-hits")
    page.locator("#open-panel").click()
    views.keep(page, f"{name}-panel")
    page.locator("#where").fill('camera~"P*')
    page.locator("#where").press("Enter")
    expect(page.locator("#where-error")).to_be_visible()
    views.keep(page, f"{name}-error")
    page.locator("#where").fill("date>=2019-06 and width>=500")
    page.locator("#where").press("Enter")
    page.locator("#term").fill("snow")
    page.locator("#less-of").click()
    page.locator("#open-panel").click()
    expect(page.locator("#on li")).to_have_count(3)
    views.keep(page, f"{name}-filtered", {"light": "page-pictures.png", "narrow": "page-dark-narrow.png"}.get(name))
    page.locator(".opener").first.click()
    expect(page.locator(".near button").first).to_be_visible()
    views.keep(page, f"{name}-details")
    page.keyboard.press("Escape")
    page.goto(f"{url}#where=camera%3DPixel+8&sort=-date")
    page.reload()
    expect(page.locator(".card[data-id]").first).to_be_visible()
    views.keep(page, f"{name}-browse")
    page.context.close()


def compare_routes(browser: Any, work: Path, views: Views) -> None:
    """The demonstration: a search with an image and two edits, and beside it the route without reasoning."""
    subprocess.run([sys.executable, "-m", "traceir", "demo"], cwd=work, stdout=subprocess.DEVNULL, check=True)
    (index,) = (work / "out" / "demo").glob("index-*")
    scene = unpack(work / "minibeir") / SCENE
    with server(index, "--remember", "0", "--requests-per-minute", "100000") as (url, _):
        page = browser.new_context(**WIDE).new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        expect(page.locator("#collection")).to_contain_text("pictures", timeout=60_000)
        views.keep(page, "demo-start")
        page.locator('input[type="file"]').first.set_input_files(scene)
        expect(page.locator("#preview")).to_have_js_property("complete", True)
        page.locator("#text").fill(EDITS)
        page.locator("#open-panel").click()
        page.locator("#instruction").fill("Find this scene with the change.")
        page.locator("#open-panel").click()
        page.locator('input[name="modality"][value="image"]').check()
        page.locator("#text").press("Enter")
        expect(page.locator(".trace")).to_have_attribute("data-status", "done", timeout=60_000)
        expect(page.locator(".trace .total")).to_have_text(re.compile("tokens"))
        views.keep(page, "demo-hits", "page.png")
        page.get_by_role("button", name="Compare without reasoning").click()
        expect(page.locator(".trace").nth(1)).to_have_attribute("data-status", "done")
        views.keep(page, "demo-compare", "page-compare.png", whole=True)
        page.context.close()


if __name__ == "__main__":
    sys.exit(main())
