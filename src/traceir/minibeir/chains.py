"""What the worlds of edits share: chains of edits, hard-negative groups and targets of a split, and the posing of queries.

Scenes and garments are such worlds. Nothing here knows what a composition shows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from traceir.data.mbeir import Split
from traceir.minibeir.rows import (
    GROUP,
    VARIANTS,
    WORDS,
    CandidateDraft,
    DrawnWorld,
    PretrainingDraft,
    QueryDraft,
    Sketch,
    derive_seed,
    share_split,
)

TWINS = 10  # near twins beside the target of a chain of edits
BESIDE = 14  # what stands beside the target of a plain row


class Composition(Protocol):
    """An image's content: everything that must be told apart, and nothing else.

    `code` names it for ever in a few letters; `twins` differ from it in one attribute; `near` is what stands beside a target of a
    plain row; in a chain that it grows no state repeats, and nothing written is overwritten unread or set back.
    """

    styles: ClassVar[int]
    """Phrasings of a caption."""
    longest: ClassVar[int]
    """Edits of the longest chain."""
    shares: ClassVar[tuple[float, float, float]]
    """Of the pretraining examples: to be named; to be named or described; these or edited in words alone."""
    noun: ClassVar[str]

    @property
    def code(self) -> str: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...
    def state(self) -> str: ...
    @property
    def slots(self) -> dict[str, str]: ...
    def sketch(self, variant: int) -> Sketch: ...
    def twins(self, rng: random.Random) -> list[Self]: ...
    def near(self, rng: random.Random) -> list[Self]: ...
    def grow(self, steps: int, rng: random.Random) -> Chain[Self]: ...
    @classmethod
    def invent(cls, rng: random.Random) -> Self: ...

    @classmethod
    def draw(cls, rng: random.Random, split: Split | None = None) -> Self:
        """A random composition, of one split or of any."""
        while True:
            composition = cls.invent(rng)
            if split is None or composition.split == split:
                return composition

    def caption(self, style: int) -> str:
        """In one of the phrasings, which name `slots`."""
        template: str = WORDS["captions"][type(self).__name__][style]
        return template.format_map(self.slots)

    @property
    def split(self) -> Split:
        """The split that owns this composition."""
        return share_split(derive_seed("split", self.code))

    @property
    def candidate(self) -> CandidateDraft:
        """In the one rendering in which a composition stands in pools, so that no pool holds it twice."""
        return CandidateDraft(sketch=self.sketch(derive_seed("canonical", self.code) % VARIANTS))


C = TypeVar("C", bound=Composition)


@dataclass(slots=True)
class Chain(Generic[C]):
    """A source and the edits upon it: `states` has one more entry than `ops` (resolved) and `words` (as asked)."""

    states: list[C]
    ops: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def add(self, state: C, op: str, words: str) -> None:
        self.states.append(state)
        self.ops.append(op)
        self.words.append(words)

    def is_whole(self, steps: int) -> bool:
        """Whether it has so many edits, and no state twice."""
        return len(self.ops) == steps and len({state.code for state in self.states}) == steps + 1

    @property
    def target(self) -> C:
        return self.states[-1]

    @property
    def reasoning(self) -> str:
        """Source state, then op and state in turn, up to the last op; the last state is the answer."""
        written = [f"{op}; {state.state()}" for op, state in zip(self.ops[:-1], self.states[1:-1], strict=True)]
        return "; ".join([f"see {self.states[0].state()}", *written, self.ops[-1]])


def count_differences(composition: Composition, other: Composition) -> int:
    """In how many attributes two compositions differ."""
    return sum(a != b for a, b in zip(composition.attributes, other.attributes, strict=True))


def keep_apart(target: Composition, others: Iterable[C]) -> list[C]:
    """`others` in their order, without repeats and without what equals the target."""
    unique = {other.code: other for other in others}
    unique.pop(target.code, None)
    return list(unique.values())


# --- chains -----------------------------------------------------------------------------------------------------------


def _pose_chain(chain: Chain[C], query: Sketch | None, distractors: Iterable[C] = ()) -> QueryDraft:
    """The query of a chain of edits; from two edits on it carries reasoning and answer."""
    beside = tuple(other.candidate for other in keep_apart(chain.target, distractors))
    written = (chain.reasoning, chain.target.state()) if len(chain.ops) >= 2 else (None, None)
    return QueryDraft(", then ".join(chain.words), query, (chain.target.candidate,), beside, len(chain.ops), *written)


def _grow_group(kind: type[C], lengths: Sequence[int], rng: random.Random) -> list[Chain[C]]:
    """Chains of the given lengths that are hard against each other, every source and target a training composition.

    They share a source; their targets are stations of one chain, or near each other, or one is the others' source.
    """
    while True:
        source, mode = kind.draw(rng, "train"), rng.randrange(3)
        group: list[Chain[C]] = []
        longest = source.grow(max(lengths), rng)
        for index, length in enumerate(lengths):
            taken = {chain.target.code for chain in group}
            if mode == 2 and index == 0:
                options = [kind.draw(rng, "train").grow(length, rng)]
                source = options[0].target
            elif mode == 0 and length not in lengths[:index]:
                options = [Chain(longest.states[: length + 1], longest.ops[:length], longest.words[:length])]
            else:
                options = [source.grow(length, rng) for _ in range(8)]
            options = [each for each in options if each.target.code not in taken and each.target.split == "train"]
            if not options:
                break
            anchor = group[0].target if group else longest.target
            group.append(min(options, key=lambda option: count_differences(option.target, anchor)))
        if len(group) == len(lengths):
            return group


def _draw_chain(kind: type[C], split: Split, length: int, seen: set[str], rng: random.Random) -> tuple[Chain[C], list[C]]:
    """For val and test: a chain whose target is of the split and not in `seen`, and three other outcomes of its source."""
    while True:
        chain = kind.draw(rng).grow(length, rng)
        if chain.target.split == split and chain.target.code not in seen:
            break
    seen.add(chain.target.code)
    others: dict[str, C] = {}
    taken = {state.code for state in chain.states}
    while len(others) < 3:
        other = chain.states[0].grow(rng.randint(1, 3), rng).target
        if other.code not in taken:
            others[other.code] = other
    return chain, list(others.values())


def pose_chains(
    kind: type[C], split: Split, lengths: Sequence[int], rng: random.Random, *, shuffled: bool
) -> Iterator[QueryDraft]:
    """Image and a chain of edits to image; in train in groups of four, whose lengths are `shuffled` or stay in order."""
    if split == "train":
        for start in range(0, len(lengths), GROUP):
            steps = lengths[start : start + GROUP]
            for chain in _grow_group(kind, rng.sample(steps, len(steps)) if shuffled else steps, rng):
                yield _pose_chain(chain, chain.states[0].sketch(rng.randrange(VARIANTS)))
        return
    seen: set[str] = set()
    for length in lengths:
        chain, others = _draw_chain(kind, split, length, seen, rng)
        near = [*chain.states[:-1], *others, *chain.target.twins(rng)[:TWINS]]
        yield _pose_chain(chain, chain.states[0].candidate.sketch, near)


# --- plain rows -------------------------------------------------------------------------------------------------------


def _draw_group(kind: type[C], rng: random.Random) -> list[C]:
    """Four training compositions of which three differ from the first in one or two attributes."""
    base = kind.draw(rng, "train")
    group = {base.code: base}
    while len(group) < GROUP:
        twin = rng.choice(list(group.values())).twins(rng)[0]
        if twin.split == "train" and count_differences(base, twin) <= 2:
            group[twin.code] = twin
    return list(group.values())


def draw_targets(kind: type[C], split: Split, count: int, rng: random.Random) -> Iterator[C]:
    """Targets of plain rows: in train in groups of four near ones, else all unlike."""
    if split == "train":
        groups = (_draw_group(kind, rng) for _ in itertools.count())
        yield from itertools.islice(itertools.chain.from_iterable(groups), count)
        return
    seen: set[str] = set()
    while len(seen) < count:
        target = kind.draw(rng, split)
        if target.code not in seen:
            seen.add(target.code)
            yield target


def pose_captions(kind: type[C], split: Split, count: int, rng: random.Random) -> Iterator[QueryDraft]:
    """Image to text. The distractors speak in the positive's phrasing; none is right for another query of the row."""
    targets = draw_targets(kind, split, count, rng)
    if split != "train":
        targets = iter(chosen := list(targets))
        taken = {target.code for target in chosen}
    style = 0
    for index, target in enumerate(targets):
        if split != "train" or index % GROUP == 0:
            style = rng.randrange(kind.styles)
        others = [] if split == "train" else [other for other in target.near(rng) if other.code not in taken][:BESIDE]
        positive, *texts = (CandidateDraft(each.caption(style)) for each in (target, *others))
        yield QueryDraft(None, target.sketch(rng.randrange(VARIANTS)), (positive,), tuple(texts))


def stand_beside(split: Split, target: Composition, rng: random.Random) -> tuple[CandidateDraft, ...]:
    """The images that stand beside a target in val and test; in train none."""
    return () if split == "train" else tuple(other.candidate for other in target.near(rng)[:BESIDE])


# --- worlds -----------------------------------------------------------------------------------------------------------


def make_world(kind: type[C], rows: Mapping[str, Callable[[Split, int, random.Random], Iterator[QueryDraft]]]) -> DrawnWorld:
    """The world of a kind of composition; a row is made from (split, count, random numbers)."""

    def make(name: str, split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
        return rows[name](split, count, random.Random(derive_seed(name, split, seed)))

    return DrawnWorld({name: partial(make, name) for name in rows}, partial(_fill_pool, kind), partial(_teach, kind))


def _fill_pool(kind: type[C], row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """Unlike training compositions in the row's modality: they are no answer to any val or test query."""
    rng = random.Random(derive_seed("fill", row, seed))
    seen: set[str] = set()
    while len(seen) < count:
        composition = kind.draw(rng, "train")
        if composition.code not in seen:
            seen.add(composition.code)
            text = composition.caption(rng.randrange(kind.styles))
            yield CandidateDraft(text) if row.endswith("_task3") else composition.candidate


def _teach(kind: type[C], count: int, seed: int) -> Iterator[PretrainingDraft]:
    """Naming and describing images, and editing from the image or in words alone; all of training."""
    rng = random.Random(derive_seed(f"{kind.__name__.lower()} lessons", seed))
    named, described, worded = kind.shares
    for _ in range(count):
        draw = rng.random()
        if draw < described:
            composition = kind.draw(rng, "train")
            sketch = composition.sketch(rng.randrange(VARIANTS))
            if draw < named:
                yield PretrainingDraft(sketch, f"name the {kind.noun}", composition.state(), "naming")
            else:
                yield PretrainingDraft(sketch, "describe the picture", composition.caption(rng.randrange(kind.styles)), "naming")
            continue
        while True:
            chain = kind.draw(rng, "train").grow(rng.randint(1, kind.longest), rng)
            if chain.target.split == "train":
                break
        text, goal = ", then ".join(chain.words), f"{chain.reasoning}; {chain.target.state()}"
        if draw < worded:
            yield PretrainingDraft(None, f"{chain.states[0].state()}: {text}", goal, "edits")
        else:
            yield PretrainingDraft(chain.states[0].sketch(rng.randrange(VARIANTS)), text, goal, "views")
