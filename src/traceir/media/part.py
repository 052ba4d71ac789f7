"""Images within files of other kinds, by name: `paper.pdf#page=3`, `clip.mp4#t=12.5`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from traceir.media import pdf, video
from traceir.media.file import digest_of

PDF_SUFFIXES: Final = frozenset({".pdf"})
_FORM = re.compile(r"(.*(\.[A-Za-z0-9]+))#(?:page=([1-9]\d{0,6})|t=(\d{1,7}(?:\.\d{1,3})?))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A page, counted from 1, or the frame at a second."""

    file: Path
    page: int | None = None
    second: float = 0.0

    @property
    def name(self) -> str:
        return f"page={self.page}" if self.page else f"t={self.second:.3f}".rstrip("0").rstrip(".")

    @property
    def path(self) -> Path:
        return Path(f"{self.file}#{self.name}")

    @property
    def key(self) -> bytes:
        """What its hash is of: its file's hash and its name, nothing being drawn. Raises ImageError."""
        return f"{digest_of(self.file)}#{self.name}".encode()

    def size(self) -> tuple[int, int]:
        """Width and height in pixels. Raises ImageError."""
        return pdf.page_size(self.file, self.page) if self.page else video.frame_size(self.file)

    def draw(self, shrink_to: int | None, pixels: int) -> Image.Image:
        """RGB pixels, not more than `pixels` of a video; of a page smaller ones where `shrink_to` allows. Raises ImageError."""
        return pdf.draw_page(self.file, self.page, shrink_to) if self.page else video.draw_frame(self.file, self.second, pixels)


def part_of(path: Path) -> FilePart | None:
    """What a path names within a file; None where it names the file."""
    form = _FORM.fullmatch(str(path))
    if form is None:
        return None
    file, suffix, page, second = form.groups()
    if page:
        return FilePart(Path(file), page=int(page)) if suffix.lower() in PDF_SUFFIXES else None
    return FilePart(Path(file), second=float(second)) if suffix.lower() in video.SUFFIXES else None


def file_of(path: str) -> str:
    """The path of the file that holds what a path names."""
    part = part_of(Path(path))
    return path if part is None else str(part.file)
