"""The closed world behind the entity rows: 202 invented entities, what is true of them, and what is written of it.

A town lies on a river, in a land, and has a founder; the river flows into a sea, the founder learned from a master, the land
obeys a ruler. All else about an entity is one word from a short list. Each (entity, facet) has exactly one passage and each
entity one more to introduce it. The world is the same at every scale and for every seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from traceir.minibeir.rows import WORDS, hash_stably

INTRO: Final = "intro"
NAMES: Final[dict[str, tuple[str, ...]]] = {kind: tuple(names.split()) for kind, names in WORDS["names"].items()}
KINDS: Final = tuple(NAMES)
RELATIONS: Final = KINDS[1:]
"""Facets whose value is another entity, of the kind of that name; no relation leads to a town."""
FACETS: Final[dict[str, tuple[str, ...]]] = {kind: tuple(facets.split()) for kind, facets in WORDS["facets"].items()}


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a name and an emblem. `name` is capitalised; sentences of facts use it in lower case."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of the encyclopedia: what is said of one facet of one entity (`intro`: what it is)."""

    entity: Entity
    facet: str
    text: str


@cache
def list_entities(kind: str | None = None) -> tuple[Entity, ...]:
    """All entities, or those of one kind, in a fixed order."""
    return tuple(Entity(name, of) for of in (KINDS if kind is None else (kind,)) for name in NAMES[of])


@cache
def _entities_by_name() -> dict[str, Entity]:
    return {entity.name: entity for entity in list_entities()}


def find_entity(name: str) -> Entity:
    """The entity of this (capitalised) name."""
    return _entities_by_name()[name]


@cache
def _assign_values() -> dict[tuple[Entity, str], str]:
    """Deals out the value of every facet, each value about equally often."""
    values: dict[tuple[Entity, str], str] = {}
    for kind, facets in FACETS.items():
        holders = list_entities(kind)
        for facet in facets:
            choices = NAMES[facet] if facet in RELATIONS else WORDS["words"][facet].split()
            dealt = [choices[place % len(choices)] for place in range(len(holders))]
            random.Random(hash_stably(f"values of {kind} {facet}")).shuffle(dealt)
            values.update(((holder, facet), value) for holder, value in zip(holders, dealt, strict=True))
    return values


def state_value(entity: Entity, facet: str) -> str:
    """The value of a facet: a word, or for a relation the capitalised name of an entity."""
    return _assign_values()[entity, facet]


def follow_relation(entity: Entity, relation: str) -> Entity:
    """The entity one hop away."""
    return find_entity(state_value(entity, relation))


def state_fact(entity: Entity, facet: str) -> str:
    """The one sentence in which this fact is always told, in lower case: "the river of torvale is lind"."""
    name = entity.name.lower()
    return f"{name} is a {entity.kind}" if facet == INTRO else f"the {facet} of {name} is {state_value(entity, facet).lower()}"


@cache
def write_passage(entity: Entity, facet: str) -> Passage:
    """The passage on one facet. It contains `state_fact` word for word but for capitals."""
    if facet != INTRO:
        return Passage(entity, facet, f"{entity.name}: the {facet} of {entity.name} is {state_value(entity, facet)}.")
    looks, habits = WORDS["traits"][entity.kind]
    dice = random.Random(hash_stably(f"trait of {entity.name}"))
    copula = {"founder": "who was", "master": "who was", "ruler": "who is"}.get(entity.kind, "that is")
    text = f"{entity.name} is a {entity.kind} {copula} {dice.choice(looks)} and {dice.choice(habits)}."
    return Passage(entity, facet, text)


def list_facets(entity: Entity) -> tuple[str, ...]:
    """All that has a passage: the introduction first, then the facets."""
    return (INTRO, *FACETS[entity.kind])


def list_passages() -> Iterator[Passage]:
    """The whole encyclopedia, entity by entity."""
    return (write_passage(entity, facet) for entity in list_entities() for facet in list_facets(entity))
