"""The world of table-top scenes: three objects side by side; captions, near-identical pairs, and chains of edits.

Rows: mscoco_task0 (text to picture), mscoco_task3 (picture to text), nights_task4 (picture to picture) and cirr_task7
(picture and edits to picture).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

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
    COLOURS,
    SHAPES,
    VARIANTS,
    canonical_variant,
    derive_seed,
    draw_scene,
    split_of,
)

SLOTS = ("left", "middle", "right")
_PLACES = ("on the left", "in the middle", "on the right")
_PAIRS = {(0, 1): "the left two", (1, 2): "the right two", (0, 2): "the outer two"}
_COLOUR_LETTERS = dict(zip(COLOUR_NAMES, "rygbpw", strict=True))
_SHAPE_LETTERS = dict(zip(SHAPES, "cbnosm", strict=True))
_STYLES = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """Three (colour, shape) objects, left to right."""

    objects: tuple[tuple[str, str], ...]

    @property
    def code(self) -> str:
        """Six letters, colour and shape by turns: the composition's name for ever."""
        return "".join(_COLOUR_LETTERS[colour] + _SHAPE_LETTERS[shape] for colour, shape in self.objects)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(value for item in self.objects for value in item)

    def state(self) -> str:
        return ", ".join(f"{colour} {shape}" for colour, shape in self.objects)

    def caption(self, style: int) -> str:
        """The scene in one of four phrasings."""
        a, b, c = (f"a {colour} {shape}" for colour, shape in self.objects)
        return (
            f"{a}, {b} and {c} on a table",
            f"from left to right: {a}, {b}, {c}",
            f"{b} between {a} on the left and {c} on the right",
            f"on the left {a}, in the middle {b}, on the right {c}",
        )[style % _STYLES]

    def sketch(self, variant: int) -> Sketch:
        return Sketch(f"scene_{self.code}_{variant}", partial(draw_scene, self.objects, variant))

    def alter(self, slot: int, value: str) -> Scene:
        """The scene with another colour or shape (told by the word) in a slot."""
        colour, shape = self.objects[slot]
        item = (value, shape) if value in COLOURS else (colour, value)
        return Scene((*self.objects[:slot], item, *self.objects[slot + 1 :]))

    def swap(self, one: int, other: int) -> Scene:
        items = list(self.objects)
        items[one], items[other] = items[other], items[one]
        return Scene(tuple(items))

    def apply(self, op: str) -> Scene:
        """The scene after a resolved op: `swap left middle`, `left green` or `middle star`."""
        words = op.split()
        if words[0] == "swap":
            return self.swap(SLOTS.index(words[1]), SLOTS.index(words[2]))
        return self.alter(SLOTS.index(words[0]), words[1])


def draw_composition(rng: random.Random, split: Split | None = None) -> Scene:
    """A random scene, of one split or of any."""
    while True:
        scene = Scene(tuple((rng.choice(COLOUR_NAMES), rng.choice(SHAPES)) for _ in SLOTS))
        if split is None or split_of(scene.code) == split:
            return scene


def list_twins(scene: Scene, rng: random.Random) -> list[Scene]:
    """The 30 scenes that differ from this one in one attribute, shuffled."""
    every = [scene.alter(slot, value) for slot in range(3) for value in (*COLOUR_NAMES, *SHAPES)]
    twins = keep_apart(scene, every)
    rng.shuffle(twins)
    return twins


# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Progress:
    """A chain in the making: where each of the source's objects stands now, and what was written on it.

    `leans` tells whether the words drawn last can be understood only after the edits before.
    """

    scene: Scene
    order: list[int] = field(default_factory=lambda: [0, 1, 2])
    written: set[tuple[int, str]] = field(default_factory=set)
    swapped: set[tuple[int, int]] = field(default_factory=set)
    leans: bool = False

    def is_touched(self, slot: int) -> bool:
        return self.has_moved(slot) or any(who == self.order[slot] for who, _ in self.written)

    def has_moved(self, slot: int) -> bool:
        return any(slot in pair for pair in self.swapped)


def _refer(progress: _Progress, slot: int, rng: random.Random) -> str:
    """Words for the object now in a slot, which fit no other; where they can, they need the edits before."""
    colour, shape = progress.scene.objects[slot]
    colours, shapes = zip(*progress.scene.objects, strict=True)
    moved = progress.has_moved(slot)
    plain: list[str] = []
    bound: list[str] = []
    if moved:
        bound += [f"the one now {_PLACES[slot]}", f"the one that is now {_PLACES[slot]}"]
    else:
        plain += [f"the {SLOTS[slot]} one", f"the one {_PLACES[slot]}"]
    if colours.count(colour) == 1:
        if (progress.order[slot], "colour") in progress.written:
            bound += [f"the one that is now {colour}", f"the new {colour} one"]
        else:
            (bound if moved else plain).append(f"the {colour} one")
    if shapes.count(shape) == 1:
        if (progress.order[slot], "shape") in progress.written:
            bound += [f"the one that is now a {shape}", f"the new {shape}"]
        else:
            (bound if moved else plain).append(f"the {shape}")
    elif colours.count(colour) > 1 and progress.scene.objects.count((colour, shape)) == 1:
        (bound if moved else plain).append(f"the {colour} {shape}")
    if bound and (not plain or rng.random() < 0.85):
        progress.leans = True
        return rng.choice(bound)
    return rng.choice(plain)


def _say_swap(progress: _Progress, pair: tuple[int, int], rng: random.Random) -> str:
    both = _PAIRS[pair]
    if rng.random() < 0.4:
        one, other = (_refer(progress, slot, rng) for slot in rng.sample(pair, 2))
        both = f"{one} and {other}"
    return rng.choice((f"swap {both}", f"exchange {both}", f"let {both} trade places"))


def _say_value(progress: _Progress, slot: int, value: str, rng: random.Random) -> str:
    ref = _refer(progress, slot, rng)
    if value in COLOURS:
        return rng.choice((f"make {ref} {value}", f"paint {ref} {value}", f"turn {ref} {value}"))
    return rng.choice((f"make {ref} a {value}", f"turn {ref} into a {value}", f"change {ref} into a {value}"))


def _say_copy(progress: _Progress, slot: int, origin: int, kind: str, rng: random.Random) -> str:
    ref, model = _refer(progress, slot, rng), _refer(progress, origin, rng)
    return rng.choice((f"give {ref} the {kind} of {model}", f"make {ref} the same {kind} as {model}"))


def _propose_swap(progress: _Progress, slot: int, rng: random.Random) -> tuple[str, str] | None:
    other = rng.choice([place for place in range(3) if place != slot])
    pair = (min(slot, other), max(slot, other))
    alike = progress.scene.objects[slot] == progress.scene.objects[other]
    if alike or pair in progress.swapped or len(progress.swapped) == 2:
        return None
    words = _say_swap(progress, pair, rng)
    progress.swapped.add(pair)
    progress.order[slot], progress.order[other] = progress.order[other], progress.order[slot]
    return f"swap {SLOTS[pair[0]]} {SLOTS[pair[1]]}", words


def _propose_value(progress: _Progress, slot: int, copies: bool, rng: random.Random) -> tuple[str, str] | None:
    """Another colour or shape in a slot (or, half the time, copied from it); mostly one that leans on earlier edits."""
    kind = rng.choice(("colour", "shape"))
    late = bool(progress.written or progress.swapped)
    progress.leans = False
    if copies:
        origin = rng.choice([place for place in range(3) if place != slot])
        if rng.random() < 0.5:
            slot, origin = origin, slot
        value = progress.scene.objects[origin][kind == "shape"]
        words = _say_copy(progress, slot, origin, kind, rng)
        progress.leans |= (progress.order[origin], kind) in progress.written
    else:
        value = rng.choice(COLOUR_NAMES if kind == "colour" else SHAPES)
        words = _say_value(progress, slot, value, rng)
    mark = (progress.order[slot], kind)
    if mark in progress.written or value in progress.scene.objects[slot]:
        return None
    if late and not progress.leans and rng.random() < 0.85:
        return None
    progress.written.add(mark)
    return f"{SLOTS[slot]} {value}", words


def _propose(progress: _Progress, rng: random.Random) -> tuple[str, str] | None:
    """One more edit as (resolved op, words), noted in `progress`; None if it would undo or overwrite an earlier one."""
    touched = [slot for slot in range(3) if progress.is_touched(slot)]
    slot = rng.choice(touched) if touched and rng.random() < 0.9 else rng.randrange(3)
    draw = rng.random()
    if draw < (0.12 if touched else 0.25):
        return _propose_swap(progress, slot, rng)
    return _propose_value(progress, slot, draw < 0.5, rng)


def grow_chain(source: Scene, steps: int, rng: random.Random) -> Chain[Scene]:
    """A chain of edits in which no state repeats, no written attribute is overwritten, and no swap is undone."""
    while True:
        progress = _Progress(source)
        states, ops, words = [source], [], []
        for _ in range(25 * steps):
            edit = _propose(progress, rng)
            if edit is None:
                continue
            progress.scene = progress.scene.apply(edit[0])
            states.append(progress.scene)
            ops.append(edit[0])
            words.append(edit[1])
            if len(ops) == steps:
                break
        if len(ops) == steps and len({state.code for state in states}) == steps + 1:
            return Chain(tuple(states), tuple(ops), tuple(words))


# --- indirect descriptions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Riddle:
    """A scene told by reference: `colours` and `shapes` hold a word, or the slot whose colour or shape it shares.

    `order` lists the slots so that every reference points to an earlier one.
    """

    order: tuple[int, ...]
    colours: tuple[str | int, ...]
    shapes: tuple[str | int, ...]

    @property
    def steps(self) -> int:
        return sum(isinstance(part, int) for part in (*self.colours, *self.shapes))

    def solve(self) -> Scene:
        found: dict[int, tuple[str, str]] = {}
        for slot in self.order:
            colour, shape = self.colours[slot], self.shapes[slot]
            found[slot] = (
                found[colour][0] if isinstance(colour, int) else colour,
                found[shape][1] if isinstance(shape, int) else shape,
            )
        return Scene(tuple(found[slot] for slot in range(3)))

    def reason(self) -> str:
        """The objects resolved one by one, each after those it refers to."""
        scene = self.solve()
        return "; ".join(f"{SLOTS[slot]} {' '.join(scene.objects[slot])}" for slot in self.order)

    def ask(self, style: int) -> str:
        a, b, c = (self._tell(slot) for slot in range(3))
        return (
            f"on the left {a}, in the middle {b}, on the right {c}",
            f"from left to right: {a}, {b}, {c}",
            f"left: {a}; middle: {b}; right: {c}",
        )[style % 3]

    def _tell(self, slot: int) -> str:
        colour, shape = self.colours[slot], self.shapes[slot]
        if isinstance(colour, int) and isinstance(shape, int):
            return f"an object with the colour of the {SLOTS[colour]} one and the shape of the {SLOTS[shape]} one"
        if isinstance(colour, int):
            return f"a {shape} in the colour of the {SLOTS[colour]} one"
        if isinstance(shape, int):
            return f"the same shape as the {SLOTS[shape]} one in {colour}"
        return f"a {colour} {shape}"


def _draw_riddle(rng: random.Random) -> Riddle:
    """Two or three references; an object never takes both colour and shape from the same other."""
    order = rng.sample(range(3), 3)
    colours: list[str | int] = [rng.choice(COLOUR_NAMES) for _ in SLOTS]
    shapes: list[str | int] = [rng.choice(SHAPES) for _ in SLOTS]
    (colours if rng.random() < 0.5 else shapes)[order[1]] = order[0]
    origins = rng.sample(order[:2], 2)
    wanted = rng.choice(((True, False), (False, True), (True, True)))
    for parts, origin, wants in zip((colours, shapes), origins, wanted, strict=True):
        if wants:
            parts[order[2]] = origin
    return Riddle(tuple(order), tuple(colours), tuple(shapes))


def _vary_riddle(riddle: Riddle, rng: random.Random) -> Riddle:
    """The riddle with one of its words replaced."""
    spots = [(place, slot) for place in range(2) for slot in range(3)]
    parts = [list(riddle.colours), list(riddle.shapes)]
    place, slot = rng.choice([(p, s) for p, s in spots if isinstance(parts[p][s], str)])
    parts[place][slot] = rng.choice(SHAPES if place else COLOUR_NAMES)
    return Riddle(riddle.order, tuple(parts[0]), tuple(parts[1]))


# --- rows -------------------------------------------------------------------------------------------------------------


def _draw_scenes(split: Split, count: int, rng: random.Random) -> Iterator[Scene]:
    draw = partial(draw_composition, rng, split)
    return draw_targets(split, count, rng, draw, lambda scene: list_twins(scene, rng)[0])


def _list_near(target: Scene, rng: random.Random) -> list[Scene]:
    """What stands beside a target of a plain row: the same objects in another order, and its twins."""
    mixed = [target.swap(one, other) for one, other in _PAIRS]
    return keep_apart(target, [*mixed, *list_twins(target, rng)])


def _pose_riddle(riddle: Riddle, style: int, distractors: tuple[CandidateDraft, ...]) -> QueryDraft:
    scene = riddle.solve()
    positive = (pose_candidate(scene),)
    return QueryDraft(
        riddle.ask(style), None, positive, distractors, riddle.steps, reasoning=riddle.reason(), answer=scene.state()
    )


def _draw_riddles(split: Split, rng: random.Random) -> Iterator[Riddle]:
    """Riddles of the split without end; in train four at a time that differ in a word."""
    while True:
        base = _draw_riddle(rng)
        if split_of(base.solve().code) != split:
            continue
        family = {base.solve().code: base}
        while split == "train" and len(family) < 4:
            twin = _vary_riddle(base, rng)
            if split_of(twin.solve().code) == "train":
                family[twin.solve().code] = twin
        yield from family.values()


def mscoco_task0(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Text to picture: captions, and 12 % descriptions by reference."""
    rng = random.Random(derive_seed("mscoco_task0", split, seed))
    near = partial(_list_near, rng=rng)
    run = 4 if split == "train" else 1
    scenes, riddles = _draw_scenes(split, count, rng), _draw_riddles(split, rng)
    for place in range(count):
        unit = place // run
        if (unit + 1) * 12 // 100 > unit * 12 // 100:
            riddle = next(riddles)
            yield _pose_riddle(riddle, rng.randrange(3), pose_beside(split, riddle.solve(), near))
        else:
            scene = next(scenes)
            text, beside = scene.caption(rng.randrange(_STYLES)), pose_beside(split, scene, near)
            yield QueryDraft(text, None, (pose_candidate(scene),), beside, 0)


def mscoco_task3(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Picture to caption."""
    rng = random.Random(derive_seed("mscoco_task3", split, seed))
    return pose_captions(split, _draw_scenes(split, count, rng), partial(_list_near, rng=rng), _STYLES, rng)


def nights_task4(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Picture to picture: the same composition in another rendering."""
    rng = random.Random(derive_seed("nights_task4", split, seed))
    for scene in _draw_scenes(split, count, rng):
        variant = (canonical_variant(scene.code) + rng.randrange(1, VARIANTS)) % VARIANTS
        beside = pose_beside(split, scene, partial(_list_near, rng=rng))
        yield QueryDraft(None, scene.sketch(variant), (pose_candidate(scene),), beside, 0)


def cirr_task7(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Picture and a chain of one to four edits to picture; each length is a quarter of the row."""
    rng = random.Random(derive_seed("cirr_task7", split, seed))
    if split == "train":
        for start in range(0, count, 4):
            draw = partial(draw_composition, rng, "train")
            family = grow_family(rng.sample((1, 2, 3, 4), 4), draw, grow_chain, rng)
            for chain in family[: count - start]:
                yield pose_chain(chain, chain.states[0].sketch(rng.randrange(VARIANTS)))
        return
    lengths = [place % 4 + 1 for place in range(count)]
    for chain, others in draw_chains(split, lengths, draw_composition, grow_chain, rng):
        target = chain.states[-1]
        source = chain.states[0]
        near = [*chain.states[:-1], *others, *list_twins(target, rng)[:TWINS]]
        yield pose_chain(chain, source.sketch(canonical_variant(source.code)), near)


_ROWS: dict[str, Callable[[Split, int, int], Iterator[QueryDraft]]] = {
    "mscoco_task0": mscoco_task0,
    "mscoco_task3": mscoco_task3,
    "nights_task4": nights_task4,
    "cirr_task7": cirr_task7,
}


def row_names() -> tuple[str, ...]:
    return tuple(_ROWS)


def pool_fill(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """Unlike training compositions in the row's modality: they are no answer to any val or test query."""
    if row not in _ROWS:
        raise InputError(f"row {row!r} is not of the scenes: use one of {', '.join(_ROWS)}")
    rng = random.Random(derive_seed("fill", row, seed))
    seen: set[str] = set()
    while len(seen) < count:
        scene = draw_composition(rng, "train")
        if scene.code not in seen:
            seen.add(scene.code)
            text = scene.caption(rng.randrange(_STYLES))
            yield CandidateDraft(text=text) if row == "mscoco_task3" else pose_candidate(scene)


def _draw_lesson_chain(rng: random.Random) -> Chain[Scene]:
    while True:
        chain = grow_chain(draw_composition(rng, "train"), rng.randint(1, 4), rng)
        if split_of(chain.states[-1].code) == "train":
            return chain


def lessons(count: int, seed: int) -> Iterator[LessonDraft]:
    """20 % naming, 5 % describing, 60 % editing in words alone, 15 % editing from the picture; all of training."""
    rng = random.Random(derive_seed("scene lessons", seed))
    for _ in range(count):
        draw = rng.random()
        if draw < 0.25:
            scene = draw_composition(rng, "train")
            sketch = scene.sketch(rng.randrange(VARIANTS))
            if draw < 0.2:
                yield LessonDraft(sketch, "name the objects", scene.state(), "naming")
            else:
                yield LessonDraft(sketch, "describe the picture", scene.caption(rng.randrange(_STYLES)), "naming")
        else:
            chain = _draw_lesson_chain(rng)
            yield teach_chain(chain, None if draw < 0.85 else chain.states[0].sketch(rng.randrange(VARIANTS)))
