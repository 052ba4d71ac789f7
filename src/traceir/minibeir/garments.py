"""The world of garments: one garment an image; descriptions both ways, and chains of relative captions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from traceir.data.mbeir import Split
from traceir.minibeir import chains
from traceir.minibeir.chains import Chain, Composition
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, draw_garment
from traceir.minibeir.rows import WORDS, QueryDraft, Sketch

PATTERNS = ("stripes", "dots", "checks")
LENGTHS = ("short", "long")
SLEEVES = ("sleeveless", "short sleeves", "long sleeves")
COLLARS = ("round neck", "v-neck", "high neck")
_STEPS = (1, 2, 3, 1, 2, 3, 1, 2, 3, 1)  # 40, 30 and 30 %


@dataclass(frozen=True, slots=True)
class Edit:
    """An edit that may come next: what it needs to know (`reads`) and what it sets (`writes`), by letters.

    Letters: b(ase colour), f(igure), c(olour of the figure), k(ind), l(ength), s(leeves), n(eck), w(aist).
    """

    op: str
    words: tuple[str, ...]
    reads: str
    writes: str
    builds: bool
    """Whether later edits can build on it."""


@dataclass(frozen=True, slots=True)
class Garment(Composition):
    """One garment; `pattern` is "plain", or a colour and a pattern: "white dots"."""

    styles = 3
    longest = 3
    shares = (0.3, 0.3, 0.8)
    noun = "garment"

    kind: str
    colour: str
    pattern: str
    length: str
    sleeves: str
    collar: str
    belt: bool

    @property
    def figure(self) -> str | None:
        """The pattern without its colour; None if plain."""
        return None if self.pattern == "plain" else self.pattern.split()[1]

    @property
    def figure_colour(self) -> str | None:
        return None if self.pattern == "plain" else self.pattern.split()[0]

    @property
    def code(self) -> str:
        pattern = "xx" if self.figure is None else self.pattern[0] + self.figure[0]
        sleeves, belt = "nsl"[SLEEVES.index(self.sleeves)], "b" if self.belt else "x"
        return f"{self.kind[0]}{self.colour[0]}{pattern}{self.length[0]}{sleeves}{self.collar[0]}{belt}"

    @property
    def attributes(self) -> tuple[str, ...]:
        belt = "belt" if self.belt else "no belt"
        return self.kind, self.colour, self.pattern, self.length, self.sleeves, self.collar, belt

    @property
    def slots(self) -> dict[str, str]:
        """What captions name."""
        sleeves = "no sleeves" if self.sleeves == "sleeveless" else self.sleeves
        look, belt = "no pattern" if self.figure is None else self.pattern, "a belt" if self.belt else "no belt"
        cut = {"kind": self.kind, "length": self.length, "colour": self.colour, "collar": self.collar}
        return cut | {"look": look, "pattern": self.pattern, "sleeves": sleeves, "bare": self.sleeves, "belt": belt}

    def state(self) -> str:
        parts = [f"{self.length} {self.colour} {self.kind}", self.pattern, self.sleeves, self.collar]
        return ", ".join([*parts, "belt"] if self.belt else parts)

    def sketch(self, variant: int) -> Sketch:
        return Sketch(f"garment_{self.code}_{variant}", partial(self._draw, variant))

    def _draw(self, variant: int) -> Image.Image:
        sleeves, collar = self.sleeves.split()[0], self.collar.replace("-", " ").split()[0]
        pattern = (self.figure or "plain", self.figure_colour)
        return draw_garment(self.kind, self.colour, pattern, self.length, sleeves, collar, self.belt, variant)

    def apply(self, op: str) -> Garment:
        """The garment after a resolved op: one or more of `coat`, `base blue`, `white dots`, `plain`, `pattern dots`,
        `pattern white`, `swap colours`, `long`, `short sleeves`, `v-neck`, `belt`, `no belt`, joined by ", "."""
        result = self
        for part in op.split(", "):
            result = result._set(part)
        return result

    def _set(self, part: str) -> Garment:
        head, _, tail = part.partition(" ")
        second, figure = self.pattern.split() if self.figure else ("", "")
        if part == "swap colours":
            return replace(self, colour=second, pattern=f"{self.colour} {figure}")
        if head == "base":
            return replace(self, colour=tail)
        if head == "pattern":
            return replace(self, pattern=f"{tail} {figure}" if tail in COLOUR_NAMES else f"{second} {tail}")
        if part in ("belt", "no belt"):
            return replace(self, belt=part == "belt")
        fields = {"kind": GARMENT_TYPES, "length": LENGTHS, "sleeves": SLEEVES, "collar": COLLARS}
        changed: dict[str, Any] = {next((name for name, values in fields.items() if part in values), "pattern"): part}
        return replace(self, **changed)

    @classmethod
    def invent(cls, rng: random.Random) -> Garment:
        """One in four is plain."""
        colour = rng.choice(COLOUR_NAMES)
        figure = rng.choice(("plain", *PATTERNS))
        other = rng.choice([name for name in COLOUR_NAMES if name != colour])
        kind, pattern = rng.choice(GARMENT_TYPES), figure if figure == "plain" else f"{other} {figure}"
        return cls(kind, colour, pattern, rng.choice(LENGTHS), rng.choice(SLEEVES), rng.choice(COLLARS), rng.random() < 0.5)

    def twins(self, rng: random.Random) -> list[Garment]:
        """A different attribute each time round."""
        patterns = ["plain", *(f"{c} {p}" for c in COLOUR_NAMES for p in PATTERNS if c != self.colour)]
        bases = [f"base {colour}" for colour in COLOUR_NAMES if colour != self.figure_colour]
        groups = [list(GARMENT_TYPES), bases, patterns, list(LENGTHS), list(SLEEVES), list(COLLARS), ["belt", "no belt"]]
        for group in groups:
            rng.shuffle(group)
        if self.figure is not None:  # those that share the pattern's colour or figure come first
            patterns.sort(key=lambda pattern: not set(pattern.split()) & set(self.pattern.split()))
        rng.shuffle(groups)
        mixed = [op for ops in itertools.zip_longest(*groups) for op in ops if op is not None]
        return chains.keep_apart(self, [self.apply(op) for op in mixed])

    def near(self, rng: random.Random) -> list[Garment]:
        """The garment with its two colours swapped, and its twins."""
        swapped = [] if self.figure is None else [self.apply("swap colours")]
        return [*swapped, *self.twins(rng)]

    def grow(self, steps: int, rng: random.Random) -> Chain[Garment]:
        while True:
            chain, written = Chain([self]), ""
            while len(chain.ops) < steps and (edit := _choose_edit(chain.states, written, steps == 1, rng)):
                chain.add(chain.target.apply(edit.op), edit.op, rng.choice(edit.words))
                written += edit.writes
            if chain.is_whole(steps):
                return chain


# --- edits ------------------------------------------------------------------------------------------------------------


def _list_edits(garment: Garment, rng: random.Random) -> list[Edit]:
    """All edits that can be asked of a garment, with random goals."""
    base, second, figure, size = garment.colour, garment.figure_colour, garment.figure, SLEEVES.index(garment.sleeves)
    new = rng.sample([colour for colour in COLOUR_NAMES if colour not in (base, second)], 2)
    slots = {"base": base, "second": second, "figure": figure, "one": new[0], "two": new[1]}
    slots["other"] = rng.choice([pattern for pattern in PATTERNS if pattern != figure])
    slots["sleeves"] = rng.choice([name for name in SLEEVES if name != garment.sleeves])
    slots["kind"] = rng.choice([name for name in GARMENT_TYPES if name != garment.kind])
    slots["collar"] = rng.choice([name for name in COLLARS if name != garment.collar])
    slots |= {"length": LENGTHS[garment.length == "short"], "longer": SLEEVES[(size + 1) % 3], "shorter": SLEEVES[size - 1]}
    cases = {"plain" if figure is None else "pattern", "bare" if slots["sleeves"] == "sleeveless" else "sleeves", "cut"}
    cases |= {"belted" if garment.belt else "unbelted", "longer" if size < 2 else "cut", "shorter" if size > 0 else "cut"}
    return [
        Edit(op.format(**slots), tuple(word.format(**slots) for word in words), reads, writes, writes not in "klnw")
        for case, op, words, reads, writes in WORDS["garment edits"]
        if case in cases
    ]


def _values(garment: Garment) -> dict[str, str | None]:
    kind, colour, _, length, sleeves, collar, belt = garment.attributes
    values = (colour, garment.figure, garment.figure_colour, kind, length, sleeves, collar, belt)
    return dict(zip("bfcklsnw", values, strict=True))


def _fits(edit: Edit, states: list[Garment], written: str) -> bool:
    """Whether an edit overwrites only what it reads, and sets nothing back to what it was."""
    overwrites = set(edit.writes) & set(written)
    if not overwrites:
        return True
    if not overwrites <= set(edit.reads) - {"f"}:
        return False
    after, before = _values(states[-1].apply(edit.op)), [_values(state) for state in states]
    return all(after[letter] != values[letter] for letter in overwrites for values in before)


def _choose_edit(states: list[Garment], written: str, alone: bool, rng: random.Random) -> Edit | None:
    """An edit that fits after the states so far; if it can, one that builds on what was written."""
    fitting = [edit for edit in _list_edits(states[-1], rng) if _fits(edit, states, written)]
    bound = [edit for edit in fitting if set(edit.reads) & set(written)]
    if bound and rng.random() < 0.85:
        return rng.choice(bound)
    if not alone and rng.random() < 0.8:
        fitting = [edit for edit in fitting if edit.builds] or fitting
    elif rng.random() < 0.5:  # colours have many edits, the cut has few
        fitting = [edit for edit in fitting if not edit.builds] or fitting
    return rng.choice(fitting) if fitting else None


def _describe(split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Description to image."""
    for garment in chains.draw_targets(Garment, split, count, rng):
        beside = chains.stand_beside(split, garment, rng)
        text = garment.caption(rng.randrange(Garment.styles))
        yield QueryDraft(text, None, (garment.candidate,), beside)


def _edit(split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Image and a chain of one to three relative captions to image."""
    lengths = [_STEPS[number % len(_STEPS)] for number in range(count)]
    return chains.pose_chains(Garment, split, lengths, rng, shuffled=False)


WORLD = chains.make_world(
    Garment,
    {"fashion200k_task0": _describe, "fashion200k_task3": partial(chains.pose_captions, Garment), "fashioniq_task7": _edit},
)
