"""The world of garments: one garment a picture; descriptions both ways, and chains of relative captions.

Rows: fashion200k_task0 (text to picture), fashion200k_task3 (picture to text) and fashioniq_task7 (picture and relative
captions to picture).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from traceir.errors import InputError
from traceir.minibeir.chains import (
    TWINS,
    Chain,
    draw_chains,
    draw_targets,
    grow_family,
    keep_apart,
    pose_beside,
    pose_candidate,
    pose_captions,
    pose_chain,
    teach_chain,
)
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Sketch, Split
from traceir.minibeir.drawing import (
    COLOUR_NAMES,
    GARMENT_TYPES,
    VARIANTS,
    canonical_variant,
    derive_seed,
    draw_garment,
    split_of,
)

PATTERNS = ("stripes", "dots", "checks")
LENGTHS = ("short", "long")
SLEEVES = ("sleeveless", "short sleeves", "long sleeves")
COLLARS = ("round neck", "v-neck", "high neck")
_STYLES = 3
_STEPS = (1, 2, 3, 1, 2, 3, 1, 2, 3, 1)  # 40, 30 and 30 %


@dataclass(frozen=True, slots=True)
class Garment:
    """One garment; `pattern` is "plain", or a colour and a pattern: "white dots"."""

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
        """Eight letters: the composition's name for ever."""
        pattern = "xx" if self.figure is None else self.pattern[0] + self.figure[0]
        sleeves, belt = "nsl"[SLEEVES.index(self.sleeves)], "b" if self.belt else "x"
        return f"{self.kind[0]}{self.colour[0]}{pattern}{self.length[0]}{sleeves}{self.collar[0]}{belt}"

    @property
    def attributes(self) -> tuple[str, ...]:
        belt = "belt" if self.belt else "no belt"
        return self.kind, self.colour, self.pattern, self.length, self.sleeves, self.collar, belt

    def state(self) -> str:
        parts = [f"{self.length} {self.colour} {self.kind}", self.pattern, self.sleeves, self.collar]
        return ", ".join([*parts, "belt"] if self.belt else parts)

    def caption(self, style: int) -> str:
        """The garment in one of three phrasings."""
        sleeves = "no sleeves" if self.sleeves == "sleeveless" else self.sleeves
        look = "no pattern" if self.figure is None else self.pattern
        belt = "a belt" if self.belt else "no belt"
        return (
            f"a {self.length} {self.colour} {self.kind} with {look}, {sleeves}, a {self.collar} and {belt}",
            f"{self.kind} in {self.colour}, {self.length}, {self.pattern}, {self.sleeves}, {self.collar}, {belt}",
            f"{self.length} {self.kind} with a {self.collar}, {sleeves} and {belt}, {self.colour} with {look}",
        )[style % _STYLES]

    def sketch(self, variant: int) -> Sketch:
        return Sketch(f"garment_{self.code}_{variant}", partial(self._draw, variant))

    def _draw(self, variant: int) -> Image.Image:
        sleeves, collar = self.sleeves.split()[0], self.collar.replace("-", " ").split()[0]
        figure = self.figure or "plain"
        return draw_garment(self.kind, self.colour, figure, self.figure_colour, self.length, sleeves, collar, self.belt, variant)

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
        if part in GARMENT_TYPES:
            return replace(self, kind=part)
        if part in LENGTHS:
            return replace(self, length=part)
        if part in SLEEVES:
            return replace(self, sleeves=part)
        if part in COLLARS:
            return replace(self, collar=part)
        return replace(self, pattern=part)


def draw_composition(rng: random.Random, split: Split | None = None) -> Garment:
    """A random garment, of one split or of any; one in four is plain."""
    while True:
        colour = rng.choice(COLOUR_NAMES)
        figure = rng.choice(("plain", *PATTERNS))
        other = rng.choice([name for name in COLOUR_NAMES if name != colour])
        garment = Garment(
            rng.choice(GARMENT_TYPES),
            colour,
            figure if figure == "plain" else f"{other} {figure}",
            rng.choice(LENGTHS),
            rng.choice(SLEEVES),
            rng.choice(COLLARS),
            rng.random() < 0.5,
        )
        if split is None or split_of(garment.code) == split:
            return garment


def list_twins(garment: Garment, rng: random.Random) -> list[Garment]:
    """Garments that differ from this one in one attribute, a different attribute each time round."""
    patterns = ["plain", *(f"{c} {p}" for c in COLOUR_NAMES for p in PATTERNS if c != garment.colour)]
    bases = [f"base {colour}" for colour in COLOUR_NAMES if colour != garment.figure_colour]
    groups = [list(GARMENT_TYPES), bases, patterns, list(LENGTHS), list(SLEEVES), list(COLLARS), ["belt", "no belt"]]
    for group in groups:
        rng.shuffle(group)
    if garment.figure is not None:  # those that share the pattern's colour or figure come first
        patterns.sort(key=lambda pattern: not set(pattern.split()) & set(garment.pattern.split()))
    rng.shuffle(groups)
    turns = [group[turn] for turn in range(max(map(len, groups))) for group in groups if turn < len(group)]
    return keep_apart(garment, [garment.apply(op) for op in turns])


def _vary(garment: Garment, rng: random.Random) -> Garment:
    return list_twins(garment, rng)[0]


def _list_near(garment: Garment, rng: random.Random) -> list[Garment]:
    """What stands beside a target: the garment with its two colours swapped, and its twins."""
    swapped = [] if garment.figure is None else [garment.apply("swap colours")]
    return [*swapped, *list_twins(garment, rng)]


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Edit:
    """An edit that may come next: what it needs to know (`reads`) and what it sets (`writes`), by letters.

    Letters: b(ase colour), f(igure), c(olour of the figure), k(ind), l(ength), s(leeves), n(eck), w(aist).
    """

    op: str
    words: tuple[str, ...]
    reads: str
    writes: str


def _list_plain_edits(garment: Garment, rng: random.Random) -> list[_Edit]:
    """What can be done to the colours of a garment without a pattern."""
    one, two = rng.sample([c for c in COLOUR_NAMES if c != garment.colour], 2)
    figure, base = rng.choice(PATTERNS), garment.colour
    return [
        _Edit(f"base {one}", (f"is {one}", f"is {one} instead", f"make it {one}"), "", "b"),
        _Edit(f"{one} {figure}", (f"has {one} {figure}", f"gets {one} {figure}", f"add {one} {figure}"), "", "fc"),
        _Edit(f"base {one}, {two} {figure}", (f"is {one} with {two} {figure}",), "", "bfc"),
        _Edit(f"base {one}, {base} {figure}", (f"is {one} with {figure} in its old colour",), "b", "bfc"),
    ]


def _list_pattern_edits(garment: Garment, rng: random.Random) -> list[_Edit]:
    """What can be done to the colours of a garment with a pattern."""
    base, second, figure = garment.colour, garment.figure_colour, garment.figure
    one, two = rng.sample([c for c in COLOUR_NAMES if c not in (base, second)], 2)
    other = rng.choice([p for p in PATTERNS if p != figure])
    return [
        _Edit(f"base {one}", (f"has a {one} base", f"make the base {one}", f"the base becomes {one}"), "", "b"),
        _Edit(f"pattern {one}", (f"the {figure} become {one}", f"make the {figure} {one}"), "f", "c"),
        _Edit(f"pattern {one}", (f"the pattern becomes {one}", f"make the pattern {one}"), "", "c"),
        _Edit(f"pattern {other}", (f"the {figure} become {other}", f"has {other} instead of {figure}"), "f", "f"),
        _Edit(f"{one} {other}", (f"has {one} {other} instead", f"gets {one} {other} instead"), "", "fc"),
        _Edit(f"base {one}, {two} {other}", (f"is {one} with {two} {other}",), "", "bfc"),
        _Edit("plain", ("has no pattern", "is plain"), "", "fc"),
        _Edit("plain", (f"loses the {figure}", f"has no {figure}"), "f", "fc"),
        _Edit(f"base {second}, plain", ("is plain in the colour of its pattern",), "c", "bfc"),
        _Edit("swap colours", ("swap its two colours", "base and pattern trade colours"), "bc", "bc"),
        _Edit(
            f"base {second}, pattern {one}",
            (
                f"make the base colour that of the pattern and the pattern {one}",
                f"the base takes the colour of the {figure} and the {figure} become {one}",
            ),
            "c",
            "bc",
        ),
        _Edit(
            f"base {one}, pattern {base}",
            (
                f"make the pattern colour that of the base and the base {one}",
                f"the {figure} take the colour of the base and the base becomes {one}",
            ),
            "b",
            "bc",
        ),
    ]


def _list_sleeve_edits(garment: Garment, rng: random.Random) -> list[_Edit]:
    size = SLEEVES.index(garment.sleeves)
    goal = rng.choice([name for name in SLEEVES if name != garment.sleeves])
    words = ("is sleeveless", "has no sleeves") if goal == "sleeveless" else (f"has {goal}", f"with {goal} instead")
    edits = [_Edit(goal, words, "", "s")]
    if size < 2:
        relative = ("has sleeves one size longer", "make the sleeves one size longer")
        edits.append(_Edit(SLEEVES[size + 1], relative, "s", "s"))
    if size > 0:
        relative = ("has sleeves one size shorter", "make the sleeves one size shorter")
        edits.append(_Edit(SLEEVES[size - 1], relative, "s", "s"))
    return edits


def _list_cut_edits(garment: Garment, rng: random.Random) -> list[_Edit]:
    """Kind, length, collar and belt."""
    kind = rng.choice([name for name in GARMENT_TYPES if name != garment.kind])
    length = LENGTHS[garment.length == "short"]
    collar = rng.choice([name for name in COLLARS if name != garment.collar])
    more = "longer" if length == "long" else "shorter"
    belt = ("has no belt", "loses the belt") if garment.belt else ("has a belt", "gets a belt", "add a belt")
    return [
        _Edit(kind, (f"is a {kind} instead", f"turn it into a {kind}", f"is a {kind}"), "", "k"),
        _Edit(length, (f"is {more}", f"make it {more}", "has the other length"), "l", "l"),
        _Edit(collar, (f"has a {collar}", f"with a {collar} instead", f"gets a {collar}"), "", "n"),
        _Edit("no belt" if garment.belt else "belt", belt, "", "w"),
    ]


def _list_edits(garment: Garment, rng: random.Random) -> tuple[list[_Edit], list[_Edit]]:
    """(edits that later ones can build on, the others)."""
    colours = _list_plain_edits(garment, rng) if garment.figure is None else _list_pattern_edits(garment, rng)
    return [*colours, *_list_sleeve_edits(garment, rng)], _list_cut_edits(garment, rng)


def _values(garment: Garment) -> dict[str, str | None]:
    kind, colour, _, length, sleeves, collar, belt = garment.attributes
    values = (colour, garment.figure, garment.figure_colour, kind, length, sleeves, collar, belt)
    return dict(zip("bfcklsnw", values, strict=True))


def _fits(edit: _Edit, states: list[Garment], written: str) -> bool:
    """Whether an edit overwrites only what it reads, and sets nothing back to what it was."""
    overwrites = set(edit.writes) & set(written)
    if not overwrites:
        return True
    if not overwrites <= set(edit.reads) - {"f"}:
        return False
    after, before = _values(states[-1].apply(edit.op)), [_values(state) for state in states]
    return all(after[letter] != values[letter] for letter in overwrites for values in before)


def _choose_edit(states: list[Garment], written: str, alone: bool, rng: random.Random) -> _Edit | None:
    """An edit that fits after the states so far; if it can, one that builds on what was written."""
    rich, poor = _list_edits(states[-1], rng)
    fitting = [edit for edit in (*rich, *poor) if _fits(edit, states, written)]
    bound = [edit for edit in fitting if set(edit.reads) & set(written)]
    if bound and rng.random() < 0.85:
        return rng.choice(bound)
    if not alone and rng.random() < 0.8:
        fitting = [edit for edit in fitting if edit in rich] or fitting
    elif rng.random() < 0.5:  # colours have many edits, the cut has few
        fitting = [edit for edit in fitting if edit in poor] or fitting
    return rng.choice(fitting) if fitting else None


def grow_chain(source: Garment, steps: int, rng: random.Random) -> Chain[Garment]:
    """A chain of edits in which no state repeats and nothing written is overwritten unread or set back."""
    while True:
        states, ops, words = [source], [], []
        written = ""
        for _ in range(steps):
            edit = _choose_edit(states, written, steps == 1, rng)
            if edit is None:
                break
            states.append(states[-1].apply(edit.op))
            ops.append(edit.op)
            words.append(rng.choice(edit.words))
            written += edit.writes
        if len(ops) == steps and len({state.code for state in states}) == steps + 1:
            return Chain(tuple(states), tuple(ops), tuple(words))


# --- rows -------------------------------------------------------------------------------------------------------------


def _draw_garments(split: Split, count: int, rng: random.Random) -> Iterator[Garment]:
    return draw_targets(split, count, rng, partial(draw_composition, rng, split), partial(_vary, rng=rng))


def fashion200k_task0(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Description to picture."""
    rng = random.Random(derive_seed("fashion200k_task0", split, seed))
    for garment in _draw_garments(split, count, rng):
        beside = pose_beside(split, garment, partial(_list_near, rng=rng))
        text = garment.caption(rng.randrange(_STYLES))
        yield QueryDraft(text, None, (pose_candidate(garment),), beside, 0)


def fashion200k_task3(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Picture to description."""
    rng = random.Random(derive_seed("fashion200k_task3", split, seed))
    return pose_captions(split, _draw_garments(split, count, rng), partial(_list_near, rng=rng), _STYLES, rng)


def fashioniq_task7(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Picture and a chain of one to three relative captions to picture: 40, 30 and 30 % of the row."""
    rng = random.Random(derive_seed("fashioniq_task7", split, seed))
    lengths = [_STEPS[place % len(_STEPS)] for place in range(count)]
    if split == "train":
        for start in range(0, count, 4):
            draw = partial(draw_composition, rng, "train")
            for chain in grow_family(lengths[start : start + 4], draw, grow_chain, rng):
                yield pose_chain(chain, chain.states[0].sketch(rng.randrange(VARIANTS)))
        return
    for chain, others in draw_chains(split, lengths, draw_composition, grow_chain, rng):
        source, target = chain.states[0], chain.states[-1]
        near = [*chain.states[:-1], *others, *list_twins(target, rng)[:TWINS]]
        yield pose_chain(chain, source.sketch(canonical_variant(source.code)), near)


_ROWS: dict[str, Callable[[Split, int, int], Iterator[QueryDraft]]] = {
    "fashion200k_task0": fashion200k_task0,
    "fashion200k_task3": fashion200k_task3,
    "fashioniq_task7": fashioniq_task7,
}


def row_names() -> tuple[str, ...]:
    return tuple(_ROWS)


def pool_fill(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """Unlike training compositions in the row's modality: they are no answer to any val or test query."""
    if row not in _ROWS:
        raise InputError(f"row {row!r} is not of the garments: use one of {', '.join(_ROWS)}")
    rng = random.Random(derive_seed("fill", row, seed))
    seen: set[str] = set()
    while len(seen) < count:
        garment = draw_composition(rng, "train")
        if garment.code not in seen:
            seen.add(garment.code)
            text = garment.caption(rng.randrange(_STYLES))
            yield CandidateDraft(text=text) if row == "fashion200k_task3" else pose_candidate(garment)


def _draw_lesson_chain(rng: random.Random) -> Chain[Garment]:
    while True:
        chain = grow_chain(draw_composition(rng, "train"), rng.randint(1, 3), rng)
        if split_of(chain.states[-1].code) == "train":
            return chain


def lessons(count: int, seed: int) -> Iterator[LessonDraft]:
    """30 % naming, 50 % editing in words alone, 20 % editing from the picture; all of training."""
    rng = random.Random(derive_seed("garment lessons", seed))
    for _ in range(count):
        draw = rng.random()
        if draw < 0.3:
            garment = draw_composition(rng, "train")
            yield LessonDraft(garment.sketch(rng.randrange(VARIANTS)), "name the garment", garment.state(), "naming")
        else:
            chain = _draw_lesson_chain(rng)
            yield teach_chain(chain, None if draw < 0.8 else chain.states[0].sketch(rng.randrange(VARIANTS)))
