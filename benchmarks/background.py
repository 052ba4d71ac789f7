"""The bundled model's own background: unlikely texts in the words of MiniBEIR, of which a collection holds parts at most.

`python -m benchmarks.background` writes models/mini/background.txt, with which `traceir index calibrate` calibrates by default.
Each text names things of several worlds at once (a garment between an object of a table and a person, say); no world has such.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from traceir.background import COUNT, FILE_NAME
from traceir.checkpoint import bundled_model
from traceir.minibeir import garments, scenes
from traceir.minibeir.encyclopedia import list_entities
from traceir.minibeir.sprites import EVENTS, PERSONS

FORMS: Final = (
    "on the left {0}, in the middle {1}, on the right {2}",
    "{0} between {1} on the left and {2} on the right",
    "{0}, {1} and {2} on a table",
    "{0} with {1} and {2}",
    "{0} with {1} at the {3}",
    "what is the name of {0} with {1}",
    "{0}, {1}, {2} by day",
)


def texts(seed: int = 0) -> Iterator[str]:
    """Texts without end, each once."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while True:
        objects = [_thing(world, draw) for world in draw.sample(range(4), 3)]
        text = draw.choice(FORMS).format(*objects, draw.choice(EVENTS))
        if text not in seen:
            seen.add(text)
            yield text


def _thing(world: int, draw: random.Random) -> str:
    colour = draw.choice(scenes.COLOUR_NAMES)
    if world == 0:
        return f"a {colour} {draw.choice(scenes.SHAPES)}"
    if world == 1:
        return f"a {draw.choice(garments.LENGTHS)} {colour} {draw.choice(garments.GARMENT_TYPES)}"
    return draw.choice(tuple(PERSONS)) if world == 2 else draw.choice(list_entities()).name.lower()


def write_background(folder: Path) -> None:
    (folder / FILE_NAME).write_text("".join(f"{text}\n" for text in islice(texts(), COUNT)), encoding="utf-8")


if __name__ == "__main__":
    write_background(bundled_model())
