"""The closed world behind the entity rows: 202 invented entities, what is true of them, and what is written of it.

A town lies on a river, in a land, and has a founder; the river flows into a sea, the founder learned from a master, the land
obeys a ruler. All else about an entity is one word from a short list. Each (entity, facet) has exactly one passage and each
entity one more to introduce it. The world, encyclopedia.json, is the same at every scale and for every seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

from traceir.minibeir.rows import read_data

INTRO: Final = "intro"
KINDS: Final = ("town", "river", "founder", "land", "sea", "master", "ruler")
RELATIONS: Final = KINDS[1:]
"""Facets whose value is another entity, of the kind of that name; no relation leads to a town."""
ENTRIES: Final[dict[str, dict[str, str]]] = read_data("encyclopedia.json")
"""Of each entity by its (capitalised) name: kind, emblem (colour of the field, charge, its colour), introduction, facets."""
FACETS: Final = {entry["kind"]: tuple(entry)[3:] for entry in ENTRIES.values()}


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of the encyclopedia: what is said of one facet of one entity (`intro`: what it is)."""

    entity: Entity
    facet: str
    text: str


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a name and an emblem. `name` is capitalised; sentences of facts use it in lower case."""

    name: str
    kind: str

    @property
    def facets(self) -> tuple[str, ...]:
        """All that has a passage: the introduction first, then the facets."""
        return (INTRO, *FACETS[self.kind])

    def follow(self, relation: str) -> Entity:
        """The entity one hop away."""
        return Entity(ENTRIES[self.name][relation], relation)

    def fact(self, facet: str) -> str:
        """The one sentence in which this fact always stands, in lower case: "the river of torvale is lind"."""
        name = self.name.lower()
        return f"{name} is a {self.kind}" if facet == INTRO else f"the {facet} of {name} is {ENTRIES[self.name][facet].lower()}"

    def passage(self, facet: str) -> Passage:
        """The passage on one facet. It contains its fact word for word but for capitals."""
        value = ENTRIES[self.name][facet]
        return Passage(self, facet, value if facet == INTRO else f"{self.name}: the {facet} of {self.name} is {value}.")


@cache
def list_entities(kind: str | None = None) -> tuple[Entity, ...]:
    """All entities, or those of one kind, in a fixed order."""
    return tuple(Entity(name, entry["kind"]) for name, entry in ENTRIES.items() if kind in (None, entry["kind"]))


def list_passages() -> Iterator[Passage]:
    """The whole encyclopedia, entity by entity."""
    return (entity.passage(facet) for entity in list_entities() for facet in entity.facets)
