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
    "Find the scene of this caption.",
    "Find this scene with the change.",
    "Find the picture most like this.",
    "Find the passage that answers about this.",
    "Find the photo and headline of this news.",
)
"""Those of the bundled model's training; a larger model takes any words."""
EXAMPLES: Final = (
    SearchIn(
        text="On the left a white ring, in the middle a blue ring, on the right a purple ring.",
        instruction=INSTRUCTIONS[0],
        modality="image",
    ),
    SearchIn(
        text="Left: a blue ball; middle: a mug in the colour of the left one; right: a ring in the colour of the left one.",
        instruction=INSTRUCTIONS[0],
        modality="image",
    ),
)


def page_config(title: str, model: ModelOut, counts: Mapping[str, int]) -> PageConfig:
    return PageConfig(
        title=title, instructions=list(INSTRUCTIONS), modalities=list(MODALITIES), model=model, count=dict(counts),
        examples=list(EXAMPLES),
    )  # fmt: skip


@cache
def page_html() -> bytes:
    return (STATIC / "index.html").read_bytes()
