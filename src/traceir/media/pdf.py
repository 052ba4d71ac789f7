"""Pages of PDF documents, as pixels and as text, by PDFium."""

from __future__ import annotations

import atexit
import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final

from PIL import Image

from traceir.errors import ImageError
from traceir.media.file import Version, package, version_of
from traceir.media.metadata import date_of

PAGE_PIXELS: Final = 1_500_000
"""Of a rendered page, whatever its size on paper: about 130 dots per inch of a letter."""
MAX_ASPECT_RATIO: Final = 200.0
MAX_TEXT: Final = 20_000
"""Characters of a page's text that are kept: more than any model reads."""
_NO_PASSWORD: Final = 4  # FPDF_ERR_PASSWORD
_LOCK: Final = Lock()
"""PDFium is not thread-safe."""
_OPEN: Final[dict[tuple[Path, Version], Any]] = {}
"""The document that was read last."""
_BROKEN_WORD = re.compile("[\ufffe\x02-]\r?\n(?=[a-z\u00df-\u00ff])")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]+")


@dataclass(frozen=True, slots=True)
class Document:
    """What a document says of itself; `date` is ISO 8601, "" where it has none."""

    pages: int
    title: str
    date: str


def read_document(path: Path) -> Document:
    """Raises ImageError for a document that is encrypted, damaged, or has no page."""
    with _opened(path) as document:
        stated = document.get_metadata_dict()
        created = re.match(r"D:(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(?:([+-]\d\d)'?(\d\d)|(Z))?", stated.get("CreationDate", ""))
        date = ""
        if created:
            year, month, day, hour, minute, second, hours, minutes, utc = created.groups()
            date = date_of(
                f"{year}:{month}:{day} {hour}:{minute}:{second}", "+00:00" if utc else f"{hours or ''}:{minutes or ''}"
            )
        return Document(len(document), _clean(stated.get("Title", ""))[:500], date)


def page_text(path: Path, page: int) -> str:
    """The text of a page, counted from 1; "" where it has none, as a scanned one."""
    with _page(path, page) as shown:
        text = shown.get_textpage()
        try:
            return _clean(text.get_text_range(0, min(MAX_TEXT, text.count_chars())))
        finally:
            text.close()


def page_size(path: Path, page: int) -> tuple[int, int]:
    """Width and height in pixels of `draw_page`."""
    with _page(path, page) as shown:
        scale = _scale_of(shown, path, page)
        return math.ceil(shown.get_width() * scale), math.ceil(shown.get_height() * scale)


def draw_page(path: Path, page: int, shrink_to: int | None = None) -> Image.Image:
    """The page as RGB on white, smaller where its short side stays at least `shrink_to` pixels."""
    with _page(path, page) as shown:
        scale = _scale_of(shown, path, page)
        if shrink_to is not None:
            scale = min(scale, (shrink_to + 1) / min(shown.get_size()))
        bitmap = shown.render(scale=scale)
        try:
            image: Image.Image = bitmap.to_pil().convert("RGB")
            return image
        finally:
            bitmap.close()


def _scale_of(page: Any, path: Path, number: int) -> float:
    width, height = page.get_size()
    if not (math.isfinite(width * height) and width * height > 0 and max(width, height) <= MAX_ASPECT_RATIO * min(width, height)):
        raise ImageError(f"{path}#page={number} is {width:g} x {height:g} points; crop or remove the page")
    return float(math.sqrt(PAGE_PIXELS / (width * height)))


def _clean(text: str) -> str:
    return _CONTROL.sub(" ", _BROKEN_WORD.sub("", text)).encode(errors="ignore").decode().strip()


@contextlib.contextmanager
def _page(path: Path, number: int) -> Iterator[Any]:
    with _opened(path) as document:
        if number > len(document):
            raise ImageError(f"{path} has {len(document)} pages, not {number}; add it anew")
        page = document[number - 1]
        try:
            yield page
        finally:
            page.close()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The document, which stays open until another one is asked for: finding page 5,000 of many is slow the first time."""
    version = version_of(path)
    pdfium = package("pypdfium2", f"{path}")
    with _LOCK:
        try:
            if (path, version) not in _OPEN:
                _close()
                _OPEN[path, version] = document = pdfium.PdfDocument(path.absolute())
                document.init_forms()  # what is filled in is drawn, too
                atexit.unregister(_close)
                atexit.register(_close)
            yield _OPEN[path, version]
        except pdfium.PdfiumError as error:
            if getattr(error, "err_code", None) == _NO_PASSWORD:
                raise ImageError(f"{path} is encrypted; save it without its password") from error
            raise ImageError(f"{path} is damaged or has no pages: {error}; save it anew") from error
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error}; check its rights") from error


def _close() -> None:
    while _OPEN:
        _OPEN.popitem()[1].close()
