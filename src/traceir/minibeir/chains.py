"""What the worlds of edits share: chains of edits, families and targets of a split, and the posing of queries.

Scenes and garments are such worlds. Nothing here knows what a composition shows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from traceir.errors import InputError
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Sketch, Split
from traceir.minibeir.drawing import VARIANTS, canonical_variant, split_of

TWINS = 10  # near twins beside the target of a chain of edits
BESIDE = 14  # what stands beside the target of a plain row


class Composition(Protocol):
    """A picture's content: everything that must be told apart, and nothing else."""

    @property
    def code(self) -> str: ...

    @property
    def attributes(self) -> tuple[str, ...]: ...

    def state(self) -> str: ...

    def caption(self, style: int) -> str: ...

    def sketch(self, variant: int) -> Sketch: ...


C = TypeVar("C", bound=Composition)


@dataclass(frozen=True, slots=True)
class Chain(Generic[C]):
    """A source and the edits upon it: `states` has one more entry than `ops` (resolved) and `words` (as asked)."""

    states: tuple[C, ...]
    ops: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def steps(self) -> int:
        return len(self.ops)

    @property
    def text(self) -> str:
        return ", then ".join(self.words)

    @property
    def reasoning(self) -> str:
        """Source state, then op and state in turn, up to the last op; the last state is the answer."""
        told = [f"{op}; {state.state()}" for op, state in zip(self.ops[:-1], self.states[1:-1], strict=True)]
        return "; ".join([f"see {self.states[0].state()}", *told, self.ops[-1]])

    @property
    def answer(self) -> str:
        return self.states[-1].state()

    def cut(self, steps: int) -> Chain[C]:
        """The chain's first `steps` edits."""
        return Chain(self.states[: steps + 1], self.ops[:steps], self.words[:steps])


Grow = Callable[[C, int, random.Random], Chain[C]]


def pose_candidate(composition: Composition) -> CandidateDraft:
    """The picture in which a composition stands in every pool."""
    return CandidateDraft(sketch=composition.sketch(canonical_variant(composition.code)))


def count_differences(one: Composition, other: Composition) -> int:
    """In how many attributes two compositions differ."""
    return sum(a != b for a, b in zip(one.attributes, other.attributes, strict=True))


def keep_apart(target: Composition, others: Iterable[C]) -> list[C]:
    """`others` in their order, without repeats and without what equals the target."""
    unique = {other.code: other for other in others}
    unique.pop(target.code, None)
    return list(unique.values())


def pose_chain(chain: Chain[C], query: Sketch, distractors: Iterable[C] = ()) -> QueryDraft:
    """The query of a chain of edits; from two edits on it carries reasoning and answer."""
    target = chain.states[-1]
    complex_ = chain.steps >= 2
    return QueryDraft(
        text=chain.text,
        sketch=query,
        positives=(pose_candidate(target),),
        distractors=tuple(pose_candidate(other) for other in keep_apart(target, distractors)),
        steps=chain.steps,
        reasoning=chain.reasoning if complex_ else None,
        answer=chain.answer if complex_ else None,
    )


def grow_family(lengths: Sequence[int], draw: Callable[[], C], grow: Grow[C], rng: random.Random) -> list[Chain[C]]:
    """Chains of the given lengths that are hard against each other, every source and target a training composition.

    They share a source; their targets are stations of one chain, or near each other, or one is the others' source.
    """
    while True:
        source, mode = draw(), rng.randrange(3)
        family: list[Chain[C]] = []
        longest = grow(source, max(lengths), rng)
        for place, length in enumerate(lengths):
            taken = {chain.states[-1].code for chain in family}
            if mode == 2 and place == 0:
                options = [grow(draw(), length, rng)]
                source = options[0].states[-1]
            elif mode == 0 and length not in lengths[:place]:
                options = [longest.cut(length)]
            else:
                options = [grow(source, length, rng) for _ in range(8)]
            options = [o for o in options if o.states[-1].code not in taken and split_of(o.states[-1].code) == "train"]
            if not options:
                break
            anchor = family[0].states[-1] if family else longest.states[-1]
            family.append(min(options, key=lambda option: count_differences(option.states[-1], anchor)))
        if len(family) == len(lengths):
            return family


def draw_chains(
    split: Split, lengths: Iterable[int], draw: Callable[[random.Random], C], grow: Grow[C], rng: random.Random
) -> Iterator[tuple[Chain[C], list[C]]]:
    """For val and test: chains with unlike targets of the split, and with each three other outcomes of its source."""
    seen: set[str] = set()
    for length in lengths:
        for _ in range(2000):
            chain = grow(draw(rng), length, rng)
            if split_of(chain.states[-1].code) == split and chain.states[-1].code not in seen:
                break
        else:
            raise InputError(f"split {split!r} has no unlike targets left after {len(seen)}: ask for a smaller count")
        seen.add(chain.states[-1].code)
        others: dict[str, C] = {}
        taken = {state.code for state in chain.states}
        while len(others) < 3:
            other = grow(chain.states[0], rng.randint(1, 3), rng).states[-1]
            if other.code not in taken:
                others[other.code] = other
        yield chain, list(others.values())


def teach_chain(chain: Chain[C], sketch: Sketch | None) -> LessonDraft:
    """A lesson in editing: from the picture, or without one from the source's state in words."""
    prompt = chain.text if sketch is not None else f"{chain.states[0].state()}: {chain.text}"
    return LessonDraft(sketch, prompt, f"{chain.reasoning}; {chain.answer}", "views" if sketch is not None else "edits")


def draw_family(rng: random.Random, draw: Callable[[], C], vary: Callable[[C], C]) -> list[C]:
    """Four training compositions that differ from the first in one or two attributes."""
    base = draw()
    family = {base.code: base}
    while len(family) < 4:
        twin = vary(rng.choice(list(family.values())))
        if split_of(twin.code) == "train" and count_differences(base, twin) <= 2:
            family[twin.code] = twin
    return list(family.values())


def draw_targets(split: Split, count: int, rng: random.Random, draw: Callable[[], C], vary: Callable[[C], C]) -> Iterator[C]:
    """Targets of plain rows: in train in families of four near ones, else all unlike."""
    if split == "train":
        families = (draw_family(rng, draw, vary) for _ in itertools.count())
        yield from itertools.islice(itertools.chain.from_iterable(families), count)
        return
    seen: set[str] = set()
    for _ in range(count):
        target = draw()
        for _ in range(2000):
            if target.code not in seen:
                break
            target = draw()
        else:
            raise InputError(f"count {count} exceeds the compositions of split {split!r}: ask for a smaller count")
        seen.add(target.code)
        yield target


def pose_captions(
    split: Split, targets: Iterable[C], near: Callable[[C], list[C]], styles: int, rng: random.Random
) -> Iterator[QueryDraft]:
    """Picture to text. The distractors speak in the positive's phrasing; none is right for another query of the row."""
    chosen = targets if split == "train" else list(targets)
    taken = set() if split == "train" else {target.code for target in chosen}
    style = 0
    for place, target in enumerate(chosen):
        if split != "train" or place % 4 == 0:
            style = rng.randrange(styles)
        others = [] if split == "train" else [other for other in near(target) if other.code not in taken][:BESIDE]
        texts = tuple(CandidateDraft(text=other.caption(style)) for other in others)
        positive = CandidateDraft(text=target.caption(style))
        yield QueryDraft(None, target.sketch(rng.randrange(VARIANTS)), (positive,), texts, 0)


def pose_beside(split: Split, target: C, near: Callable[[C], list[C]]) -> tuple[CandidateDraft, ...]:
    """The pictures that stand beside a target in val and test; in train none."""
    return () if split == "train" else tuple(pose_candidate(other) for other in near(target)[:BESIDE])
