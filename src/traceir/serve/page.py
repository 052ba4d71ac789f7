"""The page's files, and what it shows before the first search."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from traceir.items import MODALITIES
from traceir.serve.schemas import ModelOut, PageConfig, SearchIn

STATIC: Final = Path(__file__).parent / "static"
INSTRUCTIONS: Final = (
    "Find the picture after this change.",
    "Find a picture of this.",
    "Find the text that describes this picture.",
    "Find the text that answers this question.",
    "Find a picture like this one.",
)
EXAMPLES: Final = (
    SearchIn(text="a red ball left of a blue cube", modality="image"),
    SearchIn(text="the same with the two on the left swapped", modality="image", instruction=INSTRUCTIONS[0]),
)


def page_config(title: str, model: ModelOut, counts: Mapping[str, int]) -> PageConfig:
    return PageConfig(
        title=title, instructions=list(INSTRUCTIONS), modalities=list(MODALITIES), model=model, count=dict(counts),
        examples=list(EXAMPLES),
    )  # fmt: skip


@cache
def page_html() -> bytes:
    return (STATIC / "index.html").read_bytes()
