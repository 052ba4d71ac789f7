"""The images of the page in docs/: `python -m benchmarks.screenshots`.

Runs the demonstration in a temporary folder, serves its index, and drives Chromium: a search with an image and two edits, the
same beside the route without reasoning, and dark on a narrow screen. Needs the extra `dev` and a `chromium` on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

from benchmarks.serve import server
from traceir.errors import InputError
from traceir.lab.fixture import unpack

DOCS = Path(__file__).parents[1] / "docs"
SCENE = "mbeir_images/cirr_images/scene_wbpopm_815.jpg"
EDITS = "Make the one in the middle yellow, then make the right one the same shape as the one that is now yellow."


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise InputError("there is no chromium on the PATH; install it, for instance with apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "traceir", "demo"], cwd=work, stdout=subprocess.DEVNULL, check=True)
        (index,) = (work / "out" / "demo").glob("index-*")
        scene = unpack(work / "minibeir") / SCENE
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with server(index, "--remember", "0", "--requests-per-minute", "100000") as (url, _):
            wide = search(browser, url, scene, viewport={"width": 1280, "height": 800})
            keep(wide, "page.png")
            wide.get_by_role("button", name="Compare without reasoning").click()
            expect(wide.locator(".trace").nth(1)).to_have_attribute("data-status", "done")
            keep(wide, "page-compare.png")
            keep(search(browser, url, scene, viewport={"width": 360, "height": 800}, color_scheme="dark"), "page-dark-narrow.png")
        browser.close()
    return 0


def search(browser: Any, url: str, scene: Path, **how: Any) -> Any:
    """A page with the answer to the image and its edits."""
    page = browser.new_context(**how).new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    expect(page.locator("#collection")).to_contain_text("pictures", timeout=60_000)
    page.locator('input[type="file"]').first.set_input_files(scene)
    expect(page.locator("#preview")).to_have_js_property("complete", True)
    page.locator("#text").fill(EDITS)
    page.locator("#instruction").fill("Find this scene with the change.")
    page.locator('input[name="modality"][value="image"]').check()
    page.locator("#text").press("Enter")
    expect(page.locator(".trace")).to_have_attribute("data-status", "done", timeout=60_000)
    expect(page.locator(".frame img").last).to_have_js_property("complete", True)
    expect(page.locator(".trace .total")).to_have_text(re.compile("tokens"))
    return page


def keep(page: Any, name: str) -> None:
    """The whole page as a file of docs/."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / name, full_page=True, animations="disabled")


if __name__ == "__main__":
    sys.exit(main())
