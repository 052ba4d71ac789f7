"""The language of the unseen sets: phrases that are written from slots, and read back to what they mean.

A phrase is a template and its meaning. Texts are made with `say` and checked with `read`, so that what a file says is
held against what its picture shows, whatever the maker of the text believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Generic, TypeVar

from traceir.errors import DataError
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, SHAPES
from traceir.minibeir.garments import COLLARS, LENGTHS, PATTERNS
from traceir.minibeir.news import TIME_WORDS
from traceir.minibeir.pen import COLOURS as DYES
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES, TIMES
from traceir.minibeir.scenes import SLOTS

S = TypeVar("S")
R = TypeVar("R")

Slots = Mapping[str, str]

_LOOKS: Final = tuple(f"{colour} {figure}" for colour in COLOUR_NAMES for figure in PATTERNS)
_SLEEVES: Final = ("no sleeves", "short sleeves", "long sleeves")
_NAMES: Final = (*(f"{colour} {shape}" for colour in COLOUR_NAMES for shape in (*SHAPES, "object")), *SHAPES)
POSITIVE_TRIMS: Final = (*_LOOKS, *_SLEEVES[1:], *(f"a {collar}" for collar in COLLARS), "a belt")


def deny(part: str) -> str:
    """The part said to be missing: "a red cube" to "no red cube", "white dots" to "no white dots"."""
    return f"no {part.removeprefix('a ').removeprefix('the ')}"


WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "colour": COLOUR_NAMES,
    "shape": SHAPES,
    "trait": ("colour", "shape"),
    "place": SLOTS,
    "side": ("left", "right"),
    "pair": ("left two", "right two", "outer two"),
    "thing": tuple(f"{article} {name}" for article in ("a", "no") for name in _NAMES),
    "kind": GARMENT_TYPES,
    "length": LENGTHS,
    "look": ("no pattern", *_LOOKS),
    "pattern": _LOOKS,
    "sleeves": _SLEEVES,
    "collar": COLLARS,
    "belt": ("a belt", "no belt"),
    "trim": (*POSITIVE_TRIMS, *map(deny, POSITIVE_TRIMS)),
    "person": tuple(PERSONS),
    "who": (*PERSONS, *map(deny, PERSONS)),
    "event": EVENTS,
    "deed": tuple(f"{article} {event}" for article in ("the", "no") for event in EVENTS),
    "town": tuple(PLACES),
    "building": tuple(PLACES.values()),
    "hour": TIMES,
    "time": tuple(TIME_WORDS.values()),
    "dye": tuple(DYES),
}
"""What may stand in a slot, by the slot's name without its number."""


@dataclass(frozen=True, slots=True)
class Phrase(Generic[S, R]):
    """A template with slots such as {colour} and {colour2}, and what it means.

    `mean` gets the pictures told of, as states (the one in question last), and the slots. It returns whether a claim is
    true, what an edit leads to, or how a question is answered.
    """

    template: str
    mean: Callable[[tuple[S, ...], Slots], R]

    def say(self, **slots: str) -> str:
        return self.template.format_map(slots)


@dataclass(frozen=True, slots=True)
class Reading(Generic[S, R]):
    """A text that was understood."""

    phrase: Phrase[S, R]
    slots: Slots

    def say(self) -> str:
        return self.phrase.say(**self.slots)

    def mean(self, *states: S) -> R:
        return self.phrase.mean(states, self.slots)


def read(bank: Iterable[Phrase[S, R]], text: str) -> Reading[S, R]:
    """The one phrase of the bank that says `text`. Raises DataError where none or more than one does."""
    found = [Reading(phrase, match.groupdict()) for phrase in bank if (match := _pattern(phrase.template).fullmatch(text))]
    if len(found) != 1:
        raise DataError(f"{text!r} is said by {len(found)} phrases of its bank; it must be said by exactly one")
    return found[0]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    for place in range(1, len(parts), 2):
        words = "|".join(map(re.escape, WORDS[parts[place].rstrip("0123456789")]))
        parts[place] = f"(?P<{parts[place]}>{words})"
    return re.compile("".join(part if place % 2 else re.escape(part) for place, part in enumerate(parts)))
