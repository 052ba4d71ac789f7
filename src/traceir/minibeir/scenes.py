"""The world of table-top scenes: three objects side by side; captions, near-identical pairs, and chains of edits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from traceir.data.mbeir import Split
from traceir.minibeir import chains
from traceir.minibeir.chains import Chain, Composition
from traceir.minibeir.drawing import COLOUR_NAMES, COLOURS, SHAPES, draw_scene
from traceir.minibeir.rows import VARIANTS, WORDS, CandidateDraft, QueryDraft, Sketch, derive_seed

SLOTS = ("left", "middle", "right")
PAIRS = {"left two": (0, 1), "right two": (1, 2), "outer two": (0, 2)}
_PLACES = ("on the left", "in the middle", "on the right")
_LETTERS = dict(zip((*COLOUR_NAMES, *SHAPES), "rygbpwcbnosm", strict=True))


@dataclass(frozen=True, slots=True)
class Scene(Composition):
    """Three (colour, shape) objects, left to right."""

    styles = 4
    longest = 4
    shares = (0.2, 0.25, 0.85)
    noun = "objects"

    objects: tuple[tuple[str, str], ...]

    @property
    def code(self) -> str:
        return "".join(_LETTERS[value] for value in self.attributes)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(value for item in self.objects for value in item)

    @property
    def slots(self) -> dict[str, str]:
        """What captions name; numbered from left to right."""
        named: dict[str, str] = {}
        for (colour, shape), number in zip(self.objects, ("", "2", "3"), strict=True):
            named |= {f"thing{number}": f"a {colour} {shape}", f"colour{number}": colour, f"shape{number}": shape}
        return named

    def state(self) -> str:
        return ", ".join(f"{colour} {shape}" for colour, shape in self.objects)

    def sketch(self, variant: int) -> Sketch:
        return Sketch(f"scene_{self.code}_{variant}", partial(draw_scene, self.objects, variant))

    def put(self, slot: int, item: tuple[str, str]) -> Scene:
        return Scene((*self.objects[:slot], item, *self.objects[slot + 1 :]))

    def alter(self, slot: int, value: str) -> Scene:
        """The scene with another colour or shape in a slot."""
        colour, shape = self.objects[slot]
        return self.put(slot, (value, shape) if value in COLOURS else (colour, value))

    def swap(self, slot: int, other: int) -> Scene:
        return self.put(slot, self.objects[other]).put(other, self.objects[slot])

    @classmethod
    def invent(cls, rng: random.Random) -> Scene:
        return cls(tuple((rng.choice(COLOUR_NAMES), rng.choice(SHAPES)) for _ in SLOTS))

    def twins(self, rng: random.Random) -> list[Scene]:
        """All 30, shuffled."""
        twins = chains.keep_apart(self, [self.alter(slot, value) for slot in range(3) for value in (*COLOUR_NAMES, *SHAPES)])
        rng.shuffle(twins)
        return twins

    def near(self, rng: random.Random) -> list[Scene]:
        """The same objects in another order, and the twins."""
        return chains.keep_apart(self, [*(self.swap(*pair) for pair in PAIRS.values()), *self.twins(rng)])

    def grow(self, steps: int, rng: random.Random) -> Chain[Scene]:
        while True:
            growth = _Growth(Chain([self]), rng)
            for _ in range(25 * steps):
                growth.propose()
                if len(growth.chain.ops) == steps:
                    break
            if growth.chain.is_whole(steps):
                return growth.chain


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Growth:
    """A chain in the making: where each of the source's objects stands now, and what was written on it.

    `leans` tells whether the words drawn last can be understood only after the edits before.
    """

    chain: Chain[Scene]
    rng: random.Random
    order: list[int] = field(default_factory=lambda: [0, 1, 2])
    written: set[tuple[int, str]] = field(default_factory=set)
    swapped: set[tuple[int, int]] = field(default_factory=set)
    leans: bool = False

    @property
    def objects(self) -> tuple[tuple[str, str], ...]:
        return self.chain.target.objects

    def propose(self) -> None:
        """Adds one more edit, unless it would undo or overwrite an earlier one."""
        touched = [slot for slot in range(3) if self._has_moved(slot) or any(who == self.order[slot] for who, _ in self.written)]
        slot = self.rng.choice(touched) if touched and self.rng.random() < 0.9 else self.rng.randrange(3)
        draw = self.rng.random()
        if draw < (0.12 if touched else 0.25):
            self._propose_swap(slot)
        else:
            self._propose_value(slot, draw < 0.5)

    def _has_moved(self, slot: int) -> bool:
        return any(slot in pair for pair in self.swapped)

    def _other(self, slot: int) -> int:
        return self.rng.choice([other for other in range(3) if other != slot])

    def _refer(self, slot: int) -> str:
        """Words for the object now in a slot, which fit no other; where they can, they need the edits before."""
        colour, shape = self.objects[slot]
        colours, shapes = zip(*self.objects, strict=True)
        moved = self._has_moved(slot)
        plain: list[str] = []
        bound: list[str] = []
        loose = bound if moved else plain
        if moved:
            bound += [f"the one now {_PLACES[slot]}", f"the one that is now {_PLACES[slot]}"]
        else:
            plain += [f"the {SLOTS[slot]} one", f"the one {_PLACES[slot]}"]
        if colours.count(colour) == 1:
            if (self.order[slot], "colour") in self.written:
                bound += [f"the one that is now {colour}", f"the new {colour} one"]
            else:
                loose.append(f"the {colour} one")
        if shapes.count(shape) == 1:
            if (self.order[slot], "shape") in self.written:
                bound += [f"the one that is now a {shape}", f"the new {shape}"]
            else:
                loose.append(f"the {shape}")
        elif colours.count(colour) > 1 and self.objects.count((colour, shape)) == 1:
            loose.append(f"the {colour} {shape}")
        if bound and (not plain or self.rng.random() < 0.85):
            self.leans = True
            return self.rng.choice(bound)
        return self.rng.choice(plain)

    def _propose_swap(self, slot: int) -> None:
        other = self._other(slot)
        pair = (min(slot, other), max(slot, other))
        if self.objects[slot] == self.objects[other] or pair in self.swapped or len(self.swapped) == 2:
            return
        both = next(f"the {name}" for name, slots in PAIRS.items() if slots == pair)
        if self.rng.random() < 0.4:
            both = " and ".join([self._refer(slot) for slot in self.rng.sample(pair, 2)])
        words = self.rng.choice((f"swap {both}", f"exchange {both}", f"let {both} trade places"))
        self.swapped.add(pair)
        self.order[slot], self.order[other] = self.order[other], self.order[slot]
        self.chain.add(self.chain.target.swap(*pair), f"swap {SLOTS[pair[0]]} {SLOTS[pair[1]]}", words)

    def _propose_value(self, slot: int, copies: bool) -> None:
        """Another colour or shape in a slot (or, half the time, copied from it); mostly one that leans on earlier edits."""
        kind = self.rng.choice(("colour", "shape"))
        self.leans = False
        if copies:
            origin = self._other(slot)
            if self.rng.random() < 0.5:
                slot, origin = origin, slot
            value = self.objects[origin][kind == "shape"]
            ref, model = self._refer(slot), self._refer(origin)
            words = self.rng.choice((f"give {ref} the {kind} of {model}", f"make {ref} the same {kind} as {model}"))
            self.leans |= (self.order[origin], kind) in self.written
        else:
            value = self.rng.choice(COLOUR_NAMES if kind == "colour" else SHAPES)
            ref = self._refer(slot)
            colours = (f"make {ref} {value}", f"paint {ref} {value}", f"turn {ref} {value}")
            shapes = (f"make {ref} a {value}", f"turn {ref} into a {value}", f"change {ref} into a {value}")
            words = self.rng.choice(colours if kind == "colour" else shapes)
        mark = (self.order[slot], kind)
        if mark in self.written or value in self.objects[slot]:
            return
        if self.chain.ops and not self.leans and self.rng.random() < 0.85:
            return
        self.written.add(mark)
        self.chain.add(self.chain.target.alter(slot, value), f"{SLOTS[slot]} {value}", words)


# --- indirect descriptions --------------------------------------------------------------------------------------------

Parts = list[list[str | int]]
"""Colours and shapes by slot: a word, or the slot whose colour or shape it is."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A scene described by reference. `order` lists the slots so that every reference points to an earlier one."""

    order: list[int]
    parts: Parts

    def solve(self) -> Scene:
        colours, shapes = ([str(part) for part in parts] for parts in self.parts)
        for values, parts in ((colours, self.parts[0]), (shapes, self.parts[1])):
            for slot in self.order:
                part = parts[slot]
                values[slot] = values[part] if isinstance(part, int) else part
        return Scene(tuple(zip(colours, shapes, strict=True)))

    def pose(self, style: int, distractors: tuple[CandidateDraft, ...]) -> QueryDraft:
        """The reasoning resolves the objects one by one, each after those it refers to."""
        scene = self.solve()
        reasoning = "; ".join(f"{SLOTS[slot]} {' '.join(scene.objects[slot])}" for slot in self.order)
        steps = sum(isinstance(part, int) for parts in self.parts for part in parts)
        text = WORDS["captions"]["Riddle"][style].format(*(self._describe(slot) for slot in range(3)))
        return QueryDraft(text, None, (scene.candidate,), distractors, steps, reasoning, scene.state())

    def _describe(self, slot: int) -> str:
        colour, shape = self.parts[0][slot], self.parts[1][slot]
        if isinstance(colour, int) and isinstance(shape, int):
            return f"an object with the colour of the {SLOTS[colour]} one and the shape of the {SLOTS[shape]} one"
        if isinstance(colour, int):
            return f"a {shape} in the colour of the {SLOTS[colour]} one"
        return f"the same shape as the {SLOTS[shape]} one in {colour}" if isinstance(shape, int) else f"a {colour} {shape}"


def _draw_puzzle(rng: random.Random) -> Puzzle:
    """Two or three references; an object never takes both colour and shape from the same other."""
    order = rng.sample(range(3), 3)
    parts: Parts = [[rng.choice(COLOUR_NAMES) for _ in SLOTS], [rng.choice(SHAPES) for _ in SLOTS]]
    parts[0 if rng.random() < 0.5 else 1][order[1]] = order[0]
    origins = rng.sample(order[:2], 2)
    for values, origin, wanted in zip(parts, origins, rng.choice(((True, False), (False, True), (True, True))), strict=True):
        if wanted:
            values[order[2]] = origin
    return Puzzle(order, parts)


def _draw_puzzles(split: Split, rng: random.Random) -> Iterator[Puzzle]:
    """Riddles of the split without end; in train four at a time that differ in a word."""
    while True:
        base = _draw_puzzle(rng)
        if base.solve().split != split:
            continue
        group = {base.solve().code: base}
        while split == "train" and len(group) < 4:
            parts = [list(values) for values in base.parts]
            which, slot = rng.choice([(p, s) for p in range(2) for s in range(3) if isinstance(parts[p][s], str)])
            parts[which][slot] = rng.choice(SHAPES if which else COLOUR_NAMES)
            twin = Puzzle(base.order, parts)
            if twin.solve().split == "train":
                group[twin.solve().code] = twin
        yield from group.values()


# --- rows -------------------------------------------------------------------------------------------------------------


def _describe(split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Text to image: captions, and 12 % descriptions by reference."""
    scenes, puzzles = chains.draw_targets(Scene, split, count, rng), _draw_puzzles(split, rng)
    for index in range(count):
        unit = index // 4 if split == "train" else index
        if (unit + 1) * 12 // 100 > unit * 12 // 100:
            puzzle, style = next(puzzles), rng.randrange(3)
            yield puzzle.pose(style, chains.stand_beside(split, puzzle.solve(), rng))
        else:
            scene = next(scenes)
            text, beside = scene.caption(rng.randrange(Scene.styles)), chains.stand_beside(split, scene, rng)
            yield QueryDraft(text, None, (scene.candidate,), beside)


def _find_again(split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Image to image: the same composition in another rendering."""
    for scene in chains.draw_targets(Scene, split, count, rng):
        variant = (derive_seed("canonical", scene.code) + rng.randrange(1, VARIANTS)) % VARIANTS
        beside = chains.stand_beside(split, scene, rng)
        yield QueryDraft(None, scene.sketch(variant), (scene.candidate,), beside)


def _edit(split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Image and a chain of one to four edits to image; each length is a quarter of the row."""
    return chains.pose_chains(Scene, split, [number % 4 + 1 for number in range(count)], rng, shuffled=True)


WORLD = chains.make_world(
    Scene,
    {
        "mscoco_task0": _describe,
        "mscoco_task3": partial(chains.pose_captions, Scene),
        "nights_task4": _find_again,
        "cirr_task7": _edit,
    },
)
