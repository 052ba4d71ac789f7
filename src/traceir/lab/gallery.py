"""A contact sheet of searches: one HTML file with queries, routes, reasoning and hits, which opens anywhere, offline.

Images are inlined as small JPEGs, texts are escaped, and the page's own policy forbids scripts and outside addresses.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from traceir.data.report import render
from traceir.errors import ImageError
from traceir.files import write_whole
from traceir.images import ImageInput
from traceir.items import Encoding, Hit, Query

FILE_NAME: Final = "index.html"
THUMBNAIL: Final = 288
"""Longest side of an inlined image in pixels."""
CARDS: Final = 5
_ENDED: Final = {
    "turn": "ended its turn without <|emb|>",
    "budget": "cut off at the budget before <|emb|>",
    None: "ended without <|emb|>",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One search to show. `right` holds the ids that answer the query; empty where nobody knows."""

    title: str
    query: Query
    encoding: Encoding
    hits: Sequence[Hit]
    right: frozenset[str] = frozenset()
    note: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the first hit is a right one."""
        return first_right(self.hits, self.right) == 1


def write_gallery(entries: Sequence[Entry], out_dir: Path, *, title: str = "TraceIR: searches", intro: str = "") -> Path:
    """Writes `index.html` into the folder and returns its path; of each entry the first `CARDS` hits become cards.

    An image that cannot be read any more is shown as such; nothing is raised for it.
    """
    functions = {"cost": cost, "verdict": verdict, "steps": reasoning_steps, "thumbnail": _thumbnail, "open": ImageInput.open}
    page = render("lab/templates/gallery.html.j2", entries=entries, title=title, intro=intro, cards=CARDS, **functions)
    target = out_dir / FILE_NAME
    write_whole(target, page.encode("utf-8", "replace"))
    return target


def reasoning_steps(reasoning: str) -> list[str]:
    """A reasoning split into its steps at each "; ", without the blanks that a tokenizer leaves before punctuation."""
    joined = re.sub(r"\s+([,.;:?!])", r"\1", reasoning.strip())
    return [step for step in re.split(r";(?:\s+|$)", joined) if step]


def cost(encoding: Encoding) -> str:
    """What routing saw and what reasoning cost, in words."""
    tokens = f", {encoding.tokens} token{'' if encoding.tokens == 1 else 's'}" if encoding.tokens else ""
    stopped = f", {_ENDED[encoding.ended]}" if encoding.truncated else ""
    return f"P(<|emb|>) {encoding.emb_probability:.3f}{tokens}{stopped}"


def first_right(hits: Sequence[Hit], right: frozenset[str]) -> int | None:
    """Rank of the first right hit, from 1; None where none of them is."""
    return next((hit.rank for hit in hits if hit.id in right), None)


def verdict(hits: Sequence[Hit], right: frozenset[str]) -> str:
    """Where the right one came, in words."""
    rank = first_right(hits, right)
    if rank == 1:
        return "right one first"
    return f"wrong: the right one came at rank {rank}" if rank else f"wrong: no right one among the first {len(hits)}"


def _thumbnail(image: ImageInput) -> tuple[str, int, int] | str:
    """Data URL, width and height; why it cannot be read where it cannot."""
    try:
        small = image.load(shrink_to=THUMBNAIL)
    except ImageError as error:
        return str(error)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = BytesIO()
    small.save(stream, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", small.width, small.height
