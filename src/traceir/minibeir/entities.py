"""The entity rows: questions whose answer is one passage of the encyclopedia, up to two hops and one emblem away.

Rows: `webqa_task1`, `webqa_task2` (text questions), `oven_task6`, `oven_task8` (what is this; what belongs to it),
`infoseek_task6`, `infoseek_task8` (an emblem and a question about what it stands for). A step is one thing to find out
before it is known whose passage is asked for: recognising an emblem is one, following a relation is one.

What may be asked where is decided by the path (an entity, the relations to follow, the facet), not by the row: a path
of the test split is asked in no training query of any row. Beyond that some (town, relation) edges are held out:
training states them, as passages and lessons, and never asks for them nor through them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from traceir.errors import InputError
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Split
from traceir.minibeir.emblems import find_emblem, sketch_emblem
from traceir.minibeir.encyclopedia import (
    FACETS,
    INTRO,
    RELATIONS,
    Entity,
    Passage,
    follow_relation,
    hash_stably,
    list_entities,
    list_facets,
    list_passages,
    state_fact,
    write_passage,
)

HELD_OUT_PERCENT = 18
PHRASINGS = 3
TWINS = 14

SPECIAL: dict[str, str] = {
    "river": "which river runs through {x}",
    "founder": "who was the founder of {x}",
    "land": "in which land is {x}",
    "food": "what food do they eat in {x}",
    "festival": "which festival is held in {x}",
    "gate": "what is the gate of {x} made of",
    "sea": "what sea does {x} flow into",
    "fish": "what fish lives in {x}",
    "bridge": "what kind of bridge crosses {x}",
    "master": "who was the master of {x}",
    "tool": "what tool did {x} use",
    "pet": "what pet did {x} keep",
    "ruler": "who is the ruler of {x}",
    "tree": "what tree grows in {x}",
    "stone": "what stone is found in {x}",
    "wind": "what wind blows over {x}",
    "monster": "what monster lives in {x}",
    "island": "which island lies in {x}",
    "craft": "what craft did {x} teach",
    "instrument": "what instrument did {x} play",
    "beast": "what beast does {x} keep",
    "crown": "what crown does {x} wear",
}
FLOWING: dict[str, str] = {
    "sea": "the sea its river flows into",
    "master": "the master who taught its founder",
    "ruler": "the ruler of its land",
}
NAMING: tuple[str, ...] = ("what is this", "what is the name of this", "whose emblem is this")
ABOUT: tuple[str, ...] = ("tell me about {x}", "what is {x} like", "describe {x}")
"""Questions for an introduction; unlike those for a relation, whose answer is the passage that states the relation."""


@dataclass(frozen=True, slots=True)
class Path:
    """A question without its words: start at an entity, follow the relations, read the facet of where you arrive."""

    start: Entity
    hops: tuple[str, ...]
    facet: str

    def walk(self) -> tuple[Entity, ...]:
        """The entities passed, the start first and the one asked about last."""
        entities = [self.start]
        for hop in self.hops:
            entities.append(follow_relation(entities[-1], hop))
        return tuple(entities)

    def find_target(self) -> Passage:
        """The passage that answers."""
        return write_passage(self.walk()[-1], self.facet)

    def explain(self, *, seen: bool) -> str:
        """What to think before the answer: what the emblem is, where it is `seen`, and the fact behind every hop."""
        facts = [f"this is {self.start.name.lower()}"] if seen else []
        facts += [state_fact(entity, hop) for entity, hop in zip(self.walk(), self.hops, strict=False)]
        return "; ".join(facts)

    def answer(self) -> str:
        """The fact asked for: what the right passage begins with or says."""
        return state_fact(self.walk()[-1], self.facet)


# -------------------------------------------------------------------------------------------------------------- splits


def is_held_out(entity: Entity, relation: str) -> bool:
    """Whether no training query asks for this edge or passes through it; about 18 % of the edges of towns."""
    if entity.kind != "town" or relation not in RELATIONS:
        return False
    return hash_stably(f"edge {entity.name} {relation}") % 100 < HELD_OUT_PERCENT


def uses_held_out(path: Path) -> bool:
    """Whether the first relation of a path, or the relation it asks for, is held out."""
    return is_held_out(path.start, path.hops[0] if path.hops else path.facet)


def assign_split(path: Path) -> Split:
    """Where a path may be asked: 75 % train, 5 % val, 20 % test; over held-out edges 20 % val, 80 % test."""
    bucket = hash_stably(f"path {path.start.name} {' '.join(path.hops)} {path.facet}") % 100
    if uses_held_out(path):
        return "val" if bucket < 20 else "test"
    return "train" if bucket < 75 else "val" if bucket < 80 else "test"


@dataclass(frozen=True, slots=True)
class Group:
    """Paths of one kind in a row: the number of hops, whether they end at introductions, and from towns only or not."""

    hops: int
    intro: bool = False
    towns: bool = False


@cache
def _list_paths(group: Group) -> tuple[Path, ...]:
    starts = list_entities("town" if group.towns else None)
    routes: list[tuple[Entity, tuple[str, ...], Entity]] = [(start, (), start) for start in starts]
    for _ in range(group.hops):
        routes = [
            (start, (*hops, facet), follow_relation(end, facet))
            for start, hops, end in routes
            for facet in FACETS[end.kind]
            if facet in RELATIONS
        ]
    return tuple(
        Path(start, hops, facet) for start, hops, end in routes for facet in ((INTRO,) if group.intro else FACETS[end.kind])
    )


@cache
def list_paths(group: Group, split: Split, held_out: bool) -> tuple[Path, ...]:
    """The paths of a group that a split may ask, either all over held-out edges or none.

    An emblem to be named (no hop, introduction) is in every split: there the renderings differ.
    """
    paths = _list_paths(group)
    if group.intro and not group.hops:
        return () if held_out else paths
    return tuple(path for path in paths if assign_split(path) == split and uses_held_out(path) == held_out)


# --------------------------------------------------------------------------------------------------------------- words


def _name_place(path: Path, phrasing: int, seen: bool) -> str:
    """The thing asked about, in words that start from the name, or from the picture where it is `seen`."""
    if not seen:
        words = path.start.name.lower()
        for hop in path.hops:
            words = f"the {hop} of {words}"
        return words
    if not path.hops:
        return f"this {path.start.kind}"
    words = f"its {path.hops[0]}"
    for hop in path.hops[1:]:
        words = FLOWING[hop] if phrasing == 0 else f"the {hop} of {words}"
    return words


def ask_path(path: Path, phrasing: int, *, seen: bool) -> str:
    """The question in one of three phrasings; `seen`: beside the start's emblem, and not naming it."""
    phrasing %= PHRASINGS
    if path.facet == INTRO:
        if not path.hops:
            return NAMING[phrasing]
        return ABOUT[phrasing].format(x=_name_place(path, phrasing, seen))
    place = _name_place(path, phrasing, seen)
    patterns = (SPECIAL[path.facet], "what is the {f} of {x}", "name the {f} of {x}")
    return patterns[phrasing].format(f=path.facet, x=place)


# ----------------------------------------------------------------------------------------------------- queries of a row


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a row is made: shares of path groups, an emblem in the query or not, an emblem beside each passage or not."""

    name: str
    shares: tuple[tuple[Group, float], ...]
    seen: bool
    illustrated: bool

    def count_steps(self, group: Group) -> int:
        return group.hops + int(self.seen)


_WEBQA = ((Group(0), 0.35), (Group(1), 0.30), (Group(2), 0.35))
_OVEN = ((Group(0, intro=True), 0.60), (Group(1, intro=True), 0.40))
_INFOSEEK = ((Group(0, towns=True), 0.30), (Group(1, towns=True), 0.35), (Group(2, towns=True), 0.35))
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("webqa_task1", _WEBQA, seen=False, illustrated=False),
        Recipe("webqa_task2", _WEBQA, seen=False, illustrated=True),
        Recipe("oven_task6", _OVEN, seen=True, illustrated=False),
        Recipe("oven_task8", _OVEN, seen=True, illustrated=True),
        Recipe("infoseek_task6", _INFOSEEK, seen=True, illustrated=False),
        Recipe("infoseek_task8", _INFOSEEK, seen=True, illustrated=True),
    )
}
RENDERINGS: dict[str, int] = {"pool": 0, "train": 1_000_000, "val": 2_000_000, "test": 3_000_000, "lessons": 4_000_000}
"""Where the variants of emblems begin: no two of these ever show the same rendering."""


def offer_passage(passage: Passage, illustrated: bool) -> CandidateDraft:
    """The one candidate that a passage makes, alone or beside a rendering of its entity's emblem fixed for ever."""
    if not illustrated:
        return CandidateDraft(passage.text)
    variant = hash_stably(f"rendering {passage.entity.name} {passage.facet}") % 100_000
    return CandidateDraft(passage.text, sketch_emblem(passage.entity, RENDERINGS["pool"] + variant))


def _spread_groups(shares: Sequence[tuple[Group, float]], count: int) -> list[Group]:
    """Groups in their shares, evenly mixed: always the one that lags behind most."""
    given = [0.0] * len(shares)
    order = []
    for place in range(1, count + 1):
        which = max(range(len(shares)), key=lambda index: shares[index][1] * place - given[index])
        given[which] += 1
        order.append(shares[which][0])
    return order


def _measure_distance(one: Entity, other: Entity) -> int:
    """In how many parts two emblems differ, 0 to 4."""
    first, second = find_emblem(one), find_emblem(other)
    return sum(getattr(first, part) != getattr(second, part) for part in ("outline", "field", "charge", "colour"))


@cache
def _list_alike(entity: Entity) -> tuple[Entity, ...]:
    """The entities of the same kind, those with the most similar emblems first."""
    others = [other for other in list_entities(entity.kind) if other != entity]
    return tuple(sorted(others, key=lambda other: (_measure_distance(entity, other), hash_stably(other.name))))


def _rank_siblings(path: Path, pool: Sequence[Path], dice: random.Random) -> list[Path]:
    """Paths that are hard against one: another facet of the same thing, or the same facet of something like it."""
    alike = {entity: place for place, entity in enumerate(_list_alike(path.start))}
    same = [other for other in pool if other.start == path.start and other != path]
    near = [other for other in pool if other.start in alike and (other.hops, other.facet) == (path.hops, path.facet)]
    near.sort(key=lambda other: alike[other.start])
    near = near[:12]
    dice.shuffle(same)
    dice.shuffle(near)
    same.sort(key=lambda other: other.hops != path.hops)
    return [*same[:1], *near[:2], *same[1:], *near[2:]]


def _group_family(path: Path, pool: Sequence[Path], dice: random.Random) -> list[Path]:
    """Four paths with different answers, the given one first."""
    family = {path.find_target(): path}
    rest = dice.sample(list(pool), min(24, len(pool)))
    for other in (*_rank_siblings(path, pool, dice), *rest):
        if len(family) == 4:
            break
        family.setdefault(other.find_target(), other)
    return list(family.values())


def _list_train(recipe: Recipe, count: int, dice: random.Random) -> Iterator[tuple[Group, Path]]:
    for group in _spread_groups(recipe.shares, (count + 3) // 4):
        pool = list_paths(group, "train", False)
        yield from ((group, path) for path in _group_family(dice.choice(pool), pool, dice))


class _Deck:
    """Deals paths in a random order without repeating one before all have been dealt."""

    def __init__(self, paths: Sequence[Path], dice: random.Random) -> None:
        self._paths = list(paths)
        dice.shuffle(self._paths)
        self._dealt = 0

    def __bool__(self) -> bool:
        return bool(self._paths)

    def deal(self) -> tuple[Path, int]:
        """A path, and how often it was dealt before."""
        turn, place = divmod(self._dealt, len(self._paths))
        self._dealt += 1
        return self._paths[place], turn


def _list_held(recipe: Recipe, split: Split, count: int, dice: random.Random) -> Iterator[tuple[Group, Path, int]]:
    """Val and test: complex queries alternate between held-out edges and seen ones; simple ones keep to seen edges."""
    decks = {(group, held): _Deck(list_paths(group, split, held), dice) for group, _ in recipe.shares for held in (False, True)}
    given: dict[Group, int] = {}
    for group in _spread_groups(recipe.shares, count):
        given[group] = given.get(group, 0) + 1
        held = recipe.count_steps(group) >= 2 and given[group] % 2 == 1
        deck = decks[group, held] or decks[group, not held]
        path, turn = deck.deal()
        yield group, path, turn


def _list_twins(path: Path, dice: random.Random) -> list[Passage]:
    """Passages beside the right one: those of the way there, then other facets, then other entities."""
    walked = path.walk()
    target = path.find_target()
    way = [write_passage(entity, hop) for entity, hop in zip(walked, path.hops, strict=False)]
    way += [write_passage(entity, INTRO) for entity in walked]
    facets = [write_passage(walked[-1], facet) for facet in list_facets(walked[-1])]
    others = list(_list_alike(walked[-1]))
    others = others[:4] + dice.sample(others[4:], min(len(others) - 4, TWINS)) if len(others) > 4 else others
    same = [write_passage(entity, path.facet) for entity in others]
    origin = [write_passage(path.start, facet) for facet in list_facets(path.start)]
    neighbours = [write_passage(entity, facet) for entity in others for facet in list_facets(entity)]
    twins = dict.fromkeys((*way, *facets[:4], *same[:8], *origin, *neighbours))
    twins.pop(target, None)
    return list(twins)[:TWINS]


def _draft_query(recipe: Recipe, group: Group, path: Path, words: int, variant: int, twins: Sequence[Passage]) -> QueryDraft:
    steps = recipe.count_steps(group)
    return QueryDraft(
        text=ask_path(path, words, seen=recipe.seen),
        sketch=sketch_emblem(path.start, variant) if recipe.seen else None,
        positives=(offer_passage(path.find_target(), recipe.illustrated),),
        distractors=tuple(offer_passage(twin, recipe.illustrated) for twin in twins),
        steps=steps,
        reasoning=path.explain(seen=recipe.seen) if steps >= 2 else None,
        answer=path.answer() if steps >= 2 else None,
    )


def _make_row(name: str, split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    recipe = RECIPES[name]
    dice = random.Random(hash_stably(f"{name} {split} {seed}"))
    if split == "train":
        for place, (group, path) in enumerate(_list_train(recipe, count, dice)):
            if place == count:
                return
            variant = RENDERINGS[split] + dice.randrange(1_000_000)
            yield _draft_query(recipe, group, path, dice.randrange(PHRASINGS), variant, ())
        return
    for group, path, turn in _list_held(recipe, split, count, dice):
        variant = RENDERINGS[split] + dice.randrange(1_000_000)
        words = hash_stably(f"words {path}") + turn
        yield _draft_query(recipe, group, path, words, variant, _list_twins(path, dice))


def webqa_task1(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """A question to a passage; none, one or two hops."""
    return _make_row("webqa_task1", split, count, seed)


def webqa_task2(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """A question to a passage beside the emblem of what it is about."""
    return _make_row("webqa_task2", split, count, seed)


def oven_task6(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """An emblem to the introduction of its entity, or of one a hop away."""
    return _make_row("oven_task6", split, count, seed)


def oven_task8(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """As `oven_task6`, to an introduction beside another rendering of the emblem."""
    return _make_row("oven_task8", split, count, seed)


def infoseek_task6(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """The emblem of a town and a question to a passage; none, one or two hops after the emblem."""
    return _make_row("infoseek_task6", split, count, seed)


def infoseek_task8(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """As `infoseek_task6`, to a passage beside the emblem of what it is about."""
    return _make_row("infoseek_task8", split, count, seed)


def row_names() -> tuple[str, ...]:
    """The rows of this world."""
    return tuple(RECIPES)


def pool_fill(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """The whole encyclopedia whatever `count` is, in an order that depends on the seed."""
    if row not in RECIPES:
        raise InputError(f"the entity world has no row {row!r}; its rows are {', '.join(RECIPES)}")
    passages = list(list_passages())
    random.Random(hash_stably(f"fill {row} {seed}")).shuffle(passages)
    for passage in passages:
        yield offer_passage(passage, RECIPES[row].illustrated)


# -------------------------------------------------------------------------------------------------------------- lessons


def _tell_fact(passage: Passage, dice: random.Random) -> LessonDraft:
    """A fact of the encyclopedia, told under a heading, or as the answer to its question where training may ask it."""
    name, facet = passage.entity.name.lower(), passage.facet
    target = state_fact(passage.entity, facet)
    if facet == INTRO:
        return LessonDraft(None, f"tell me about {name}", target, "facts")
    path = Path(passage.entity, (), facet)
    if assign_split(path) == "train" and dice.random() < 0.5:
        return LessonDraft(None, ask_path(path, dice.randrange(PHRASINGS), seen=False), target, "facts")
    return LessonDraft(None, f"tell me about {name}: {facet}", target, "facts")


def _tell_chain(path: Path, dice: random.Random) -> LessonDraft:
    target = f"{path.explain(seen=False)}; {path.answer()}"
    return LessonDraft(None, ask_path(path, dice.randrange(PHRASINGS), seen=False), target, "chains")


def _tell_emblem(entity: Entity, dice: random.Random) -> LessonDraft:
    variant = RENDERINGS["lessons"] + dice.randrange(1_000_000)
    return LessonDraft(sketch_emblem(entity, variant), "what is this", f"this is {entity.name.lower()}", "naming")


def _list_lessons(kind: str, dice: random.Random) -> Iterator[LessonDraft]:
    """Endless lessons of one kind; everything there is comes up before anything is repeated."""
    if kind == "fact":
        passages = list(list_passages())
        dice.shuffle(passages)
        yield from (_tell_fact(passage, dice) for passage in itertools.cycle(passages))
    if kind == "emblem":
        entities = list(list_entities())
        dice.shuffle(entities)
        yield from (_tell_emblem(entity, dice) for entity in itertools.cycle(entities))
    one, two = (_Deck(list_paths(Group(hops), "train", False), dice) for hops in (1, 2))
    while True:
        yield _tell_chain((one if dice.random() < 0.5 else two).deal()[0], dice)


def lessons(count: int, seed: int) -> Iterator[LessonDraft]:
    """45 % facts of the whole encyclopedia, 35 % emblems to be named, 20 % chains over paths that training may ask."""
    dice = random.Random(hash_stably(f"entity lessons {seed}"))
    sources = {kind: _list_lessons(kind, dice) for kind in ("fact", "emblem", "chain")}
    for _ in range(count):
        kind = dice.choices(("fact", "emblem", "chain"), weights=(45, 35, 20))[0]
        yield next(sources[kind])
