"""The entity rows: questions whose answer is one passage of the encyclopedia, up to two hops and one emblem away.

A step is one thing to find out before it is known whose passage is asked for: recognising an emblem is one, following a relation
is one. What may be asked where is decided by the path (an entity, the relations to follow, the facet), not by the row: a path of
the test split is asked in no training query of any row. Beyond that some (town, relation) edges are held out: training states
them, as passages and pretraining examples, and never asks for them nor through them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final

from traceir.data.mbeir import Split
from traceir.minibeir.encyclopedia import FACETS, INTRO, RELATIONS, Entity, Passage, list_entities, list_passages
from traceir.minibeir.rows import GROUP, WORDS, CandidateDraft, DrawnWorld, PretrainingDraft, QueryDraft, hash_stably
from traceir.minibeir.sprites import find_emblem, sketch_emblem

HELD_OUT_PERCENT: Final = 18
PHRASINGS: Final = 3
TWINS: Final = 14


@dataclass(frozen=True, slots=True)
class Path:
    """A question without its words: start at an entity, follow the relations, read the facet of where you arrive."""

    start: Entity
    hops: tuple[str, ...]
    facet: str

    def walk(self) -> tuple[Entity, ...]:
        """The entities passed, the start first and the one asked about last."""
        return tuple(itertools.accumulate(self.hops, Entity.follow, initial=self.start))

    @property
    def target(self) -> Passage:
        """The passage that answers."""
        return self.walk()[-1].passage(self.facet)

    @property
    def answer(self) -> str:
        """The fact asked for: what the right passage begins with or says."""
        return self.walk()[-1].fact(self.facet)

    def explain(self, *, seen: bool) -> str:
        """What to think before the answer: what the emblem is, where it is `seen`, and the fact behind every hop."""
        facts = [f"this is {self.start.name.lower()}"] if seen else []
        return "; ".join(facts + [entity.fact(hop) for entity, hop in zip(self.walk(), self.hops, strict=False)])

    @property
    def held_out(self) -> bool:
        """Whether no training query may ask for the first relation of the path, or the relation it asks for."""
        relation = self.hops[0] if self.hops else self.facet
        if self.start.kind != "town" or relation not in RELATIONS:
            return False
        return hash_stably(f"edge {self.start.name} {relation}") % 100 < HELD_OUT_PERCENT

    @property
    def split(self) -> Split:
        """Where the path may be asked: 75 % train, 5 % val, 20 % test; over held-out edges 20 % val, 80 % test."""
        bucket = hash_stably(f"path {self.start.name} {' '.join(self.hops)} {self.facet}") % 100
        if self.held_out:
            return "val" if bucket < 20 else "test"
        return "train" if bucket < 75 else "val" if bucket < 80 else "test"

    def ask(self, phrasing: int, *, seen: bool) -> str:
        """The question in one of three phrasings; `seen`: beside the start's emblem, and not naming it."""
        phrasing %= PHRASINGS
        if self.facet == INTRO and not self.hops:
            return str(WORDS["naming"][phrasing])
        phrase = (f"its {self.hops[0]}" if self.hops else f"this {self.start.kind}") if seen else self.start.name.lower()
        for hop in self.hops[seen:]:
            phrase = WORDS["flowing"][hop] if seen and phrasing == 0 else f"the {hop} of {phrase}"
        general = ("what is the {f} of {x}", "name the {f} of {x}")
        patterns = WORDS["about"] if self.facet == INTRO else (WORDS["questions"][self.facet], *general)
        return str(patterns[phrasing]).format(f=self.facet, x=phrase)


@dataclass(frozen=True, slots=True)
class Group:
    """Paths of one kind in a row: the number of hops, whether they end at introductions, and from towns only or not."""

    hops: int
    intro: bool = False
    towns: bool = False

    def list(self) -> tuple[Path, ...]:
        paths = [Path(start, (), INTRO) for start in list_entities("town" if self.towns else None)]
        for _ in range(self.hops):
            onward = ((path, hop) for path in paths for hop in FACETS[path.walk()[-1].kind] if hop in RELATIONS)
            paths = [Path(path.start, (*path.hops, hop), INTRO) for path, hop in onward]
        facets = {kind: (INTRO,) if self.intro else FACETS[kind] for kind in FACETS}
        return tuple(replace(path, facet=facet) for path in paths for facet in facets[path.walk()[-1].kind])


@cache
def list_allowed(group: Group, split: Split, held_out: bool) -> tuple[Path, ...]:
    """The paths of a group that a split may ask, either all over held-out edges or none.

    An emblem to be named (no hop, introduction) is in every split: there the renderings differ.
    """
    if group.intro and not group.hops:
        return () if held_out else group.list()
    return tuple(path for path in group.list() if path.split == split and path.held_out == held_out)


# --- queries of a row -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a row is made: shares of path groups, an emblem in the query or not, an emblem beside each passage or not."""

    shares: dict[Group, float]
    seen: bool
    illustrated: bool


_WEBQA: Final = {Group(0): 0.35, Group(1): 0.30, Group(2): 0.35}
_OVEN: Final = {Group(0, intro=True): 0.60, Group(1, intro=True): 0.40}
_INFOSEEK: Final = {Group(0, towns=True): 0.30, Group(1, towns=True): 0.35, Group(2, towns=True): 0.35}
RECIPES: Final = {
    "webqa_task1": Recipe(_WEBQA, seen=False, illustrated=False),
    "webqa_task2": Recipe(_WEBQA, seen=False, illustrated=True),
    "oven_task6": Recipe(_OVEN, seen=True, illustrated=False),
    "oven_task8": Recipe(_OVEN, seen=True, illustrated=True),
    "infoseek_task6": Recipe(_INFOSEEK, seen=True, illustrated=False),
    "infoseek_task8": Recipe(_INFOSEEK, seen=True, illustrated=True),
}
RENDERINGS: Final = {"pool": 0, "train": 1_000_000, "val": 2_000_000, "test": 3_000_000, "lessons": 4_000_000}
"""Where the variants of emblems begin: no two of these ever show the same rendering."""


def _offer(passage: Passage, illustrated: bool) -> CandidateDraft:
    """The one candidate that a passage makes, alone or beside a rendering of its entity's emblem fixed for ever."""
    variant = RENDERINGS["pool"] + hash_stably(f"rendering {passage.entity.name} {passage.facet}") % 100_000
    return CandidateDraft(passage.text, sketch_emblem(passage.entity, variant) if illustrated else None)


def _spread(shares: dict[Group, float], count: int) -> Iterator[Group]:
    """Groups in their shares, evenly mixed: always the one that lags behind most."""
    dealt: Counter[Group] = Counter()
    for number in range(1, count + 1):
        group = max(shares, key=lambda group: shares[group] * number - dealt[group])
        dealt[group] += 1
        yield group


@cache
def _list_alike(entity: Entity) -> tuple[Entity, ...]:
    """The entities of the same kind, those with the most similar emblems first."""
    own = find_emblem(entity)

    def distance(other: Entity) -> tuple[int, int]:
        look = find_emblem(other)
        parts = ((own.field, look.field), (own.charge, look.charge), (own.colour, look.colour))
        return sum(a != b for a, b in parts), hash_stably(other.name)

    return tuple(sorted((other for other in list_entities(entity.kind) if other != entity), key=distance))


def _gather(path: Path, pool: Sequence[Path], dice: random.Random) -> list[Path]:
    """Four paths with different answers, hard against the given one, which is the first: another facet of the same thing, or the
    same facet of something like it."""
    alike = {entity: position for position, entity in enumerate(_list_alike(path.start))}
    rest = dice.sample(list(pool), min(24, len(pool)))
    same = [other for other in pool if other.start == path.start and other != path]
    near = [other for other in pool if other.start in alike and (other.hops, other.facet) == (path.hops, path.facet)]
    near = sorted(near, key=lambda other: alike[other.start])[:12]
    dice.shuffle(same)
    dice.shuffle(near)
    same.sort(key=lambda other: other.hops != path.hops)
    group: dict[Passage, Path] = {}
    for other in (path, *same[:1], *near[:2], *same[1:], *near[2:], *rest):
        if len(group) < GROUP:
            group.setdefault(other.target, other)
    return list(group.values())


def _deal(paths: Sequence[Path], dice: random.Random) -> Iterator[tuple[Path, int]]:
    """Paths in a random order, all, then all again in that order, each with how often it was dealt before."""
    shuffled = list(paths)
    dice.shuffle(shuffled)
    return ((path, number) for number in itertools.count() for path in shuffled)


def _list_held(recipe: Recipe, split: Split, count: int, dice: random.Random) -> Iterator[tuple[Path, int]]:
    """Val and test: complex queries alternate between held-out edges and seen ones; simple ones keep to seen edges."""
    decks = {(group, held): _deal(list_allowed(group, split, held), dice) for group in recipe.shares for held in (False, True)}
    asked: Counter[Group] = Counter()
    for group in _spread(recipe.shares, count):
        asked[group] += 1
        held = group.hops + recipe.seen >= 2 and asked[group] % 2 == 1
        yield next(decks[group, held if list_allowed(group, split, held) else not held])


def _list_twins(path: Path, dice: random.Random) -> list[Passage]:
    """Passages beside the right one: those of the way there, then other facets, then other entities."""
    walked = path.walk()
    way = [entity.passage(hop) for entity, hop in zip(walked, path.hops, strict=False)]
    way += [entity.passage(INTRO) for entity in walked]
    facets = [walked[-1].passage(facet) for facet in walked[-1].facets]
    others = list(_list_alike(walked[-1]))
    others = others[:4] + dice.sample(others[4:], min(len(others) - 4, TWINS)) if len(others) > 4 else others
    same = [entity.passage(path.facet) for entity in others]
    origin = [path.start.passage(facet) for facet in path.start.facets]
    neighbours = [entity.passage(facet) for entity in others for facet in entity.facets]
    twins = dict.fromkeys((*way, *facets[:4], *same[:8], *origin, *neighbours))
    twins.pop(path.target, None)
    return list(twins)[:TWINS]


def _make_row(name: str, split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    recipe = RECIPES[name]
    dice = random.Random(hash_stably(f"{name} {split} {seed}"))

    def draft(path: Path, variant: int, words: int, twins: Sequence[Passage] = ()) -> QueryDraft:
        steps = len(path.hops) + recipe.seen
        sketch = sketch_emblem(path.start, RENDERINGS[split] + variant) if recipe.seen else None
        positives, beside = (tuple(_offer(each, recipe.illustrated) for each in some) for some in ([path.target], twins))
        written = (path.explain(seen=recipe.seen), path.answer) if steps >= 2 else (None, None)
        return QueryDraft(path.ask(words, seen=recipe.seen), sketch, positives, beside, steps, *written)

    if split == "train":
        for made, group in enumerate(_spread(recipe.shares, -(-count // GROUP))):
            pool = list_allowed(group, "train", False)
            for path in _gather(dice.choice(pool), pool, dice)[: count - made * GROUP]:
                yield draft(path, dice.randrange(1_000_000), dice.randrange(PHRASINGS))
        return
    for path, number in _list_held(recipe, split, count, dice):
        yield draft(path, dice.randrange(1_000_000), hash_stably(f"words {path}") + number, _list_twins(path, dice))


def _fill_pool(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """The whole encyclopedia whatever `count` is, in an order that depends on the seed."""
    passages = list(list_passages())
    random.Random(hash_stably(f"fill {row} {seed}")).shuffle(passages)
    return (_offer(passage, RECIPES[row].illustrated) for passage in passages)


# --- pretraining ------------------------------------------------------------------------------------------------------


def _list_facts(dice: random.Random) -> Iterator[PretrainingDraft]:
    """Facts under a heading, or as the answer to a question that training may ask; all, then all again."""
    passages = list(list_passages())
    dice.shuffle(passages)
    for passage in itertools.cycle(passages):
        name, path = passage.entity.name.lower(), Path(passage.entity, (), passage.facet)
        heading = f"tell me about {name}" if passage.facet == INTRO else f"tell me about {name}: {passage.facet}"
        if passage.facet != INTRO and path.split == "train" and dice.random() < 0.5:
            heading = path.ask(dice.randrange(PHRASINGS), seen=False)
        yield PretrainingDraft(None, heading, path.answer, "facts")


def _list_emblems(dice: random.Random) -> Iterator[PretrainingDraft]:
    entities = list(list_entities())
    dice.shuffle(entities)
    for entity in itertools.cycle(entities):
        sketch = sketch_emblem(entity, RENDERINGS["lessons"] + dice.randrange(1_000_000))
        yield PretrainingDraft(sketch, "what is this", f"this is {entity.name.lower()}", "naming")


def _list_chains(dice: random.Random) -> Iterator[PretrainingDraft]:
    decks = [_deal(list_allowed(Group(hops), "train", False), dice) for hops in (1, 2)]
    while True:
        path, _ = next(decks[dice.random() >= 0.5])
        target = f"{path.explain(seen=False)}; {path.answer}"
        yield PretrainingDraft(None, path.ask(dice.randrange(PHRASINGS), seen=False), target, "chains")


def _teach(count: int, seed: int) -> Iterator[PretrainingDraft]:
    """45 % facts of the whole encyclopedia, 35 % emblems to be named, 20 % chains over paths that training may ask."""
    dice = random.Random(hash_stably(f"entity lessons {seed}"))
    sources = (_list_facts(dice), _list_emblems(dice), _list_chains(dice))
    for _ in range(count):
        yield next(dice.choices(sources, weights=(45, 35, 20))[0])


WORLD: Final = DrawnWorld({name: partial(_make_row, name) for name in RECIPES}, _fill_pool, _teach)
