"""The closed world behind the entity rows: 202 invented entities, what is true of them, and what is written of it.

A town lies on a river, in a land, and has a founder; the river flows into a sea, the founder learned from a master, the
land obeys a ruler. Everything else about an entity is one word from a short list. Each (entity, facet) has exactly one
passage and each entity one more to introduce it. The world is the same at every scale and for every seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from traceir.errors import InputError

INTRO = "intro"


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, as it is convenient to write long lists of them."""
    return tuple(text.split())


NAMES: dict[str, tuple[str, ...]] = {
    "town": split_words("""
        Dosteth Vrerzim Voldund Nelvale Veskund Grintim Verneth Hildost Himbosk Vriskub Divrane Kembim
        Piftund Nuskulf Fimbim Stimbim Pusketh Zelkale Kraldim Nurvick Borvick Pilkost Zwiskub Dalkost
        Nolvub Grulvub Nalvosk Thalkim Tiftorn Gavrorn Zulkorn Nirnub Pezzund Vaggorn Pulkulf Zirvim Nevrick
        Dirvost Lulvim Kovreth Verzorn Lalvund Telkund Mivrund Mildub Duntulf Grarnub Swilvub Gostulf
        Brorvub Feskim Kistorn Kuskost Hezzale Nastosk Brilvub Bilkund Doskulf Darnane Nirvosk Reldub
        Darvale Deggane Nintick Raldim Reftane Baskane Freldim Brazzub Vrovrim Kerzale Luzzost Solvick
        Duldim Pluftim Guskane Vildorn Dastick Vumbane Pravrim Hervulf Huzzulf Paldost Sontick Lirnorn
        Goskim Hintub Rarvick Pizzorn Tembick Solkorn Vroskim Plervub Bembale Vestub Felvane
        """),
    "river": split_words("""
        Pezh Lazh Vurb Zesk Prusk Tharb Blalv Knorg Frurt Brelv Drizh Swix Drolm Dralv Trazh Snolm Tholm Zwolv Prilm
        Plolm Thond Skizh Kruzh Knizh
        """),
    "founder": split_words("""
        Truvem Grunino Grezugo Gronuro Zwemugo Grovild Kniburo Zwazem Thiboth Bodoth Skarugo Ziboth Brudild Swumoth
        Lizem Pobem Vrizek Duvoth Klakoth Gilugo Skedugo Tekugo Frozoth Fralugo Snuvoth Tukild Lurild Klomem Truzugo
        Swivek Vomuro Pribax
        """),
    "land": split_words("""
        Gundova Krivea Bluzia Knuvuna Tubruna Klozea Lelduna Hargova Fovova Skozuna Ferguna Movuna Drendea Pozea Brozea
        Dazova
        """),
    "sea": split_words("Vraul Zeizz Skaum Zwooth Thaul Klaugg Preim Vroogg"),
    "master": split_words("Urdol Evlox Izbul Umpun Olkox Ugnush Ivlosh Egnux Agnish Elkun"),
    "ruler": split_words("""
        Ovolbu Ikinzo Uvanzo Ozolba Abinzu Ebilbu Athidro Akagme Ikolbo Izilbe Obidra Erilbe Eranze Othogma Uridro
        Ithagmo
        """),
}
KINDS: tuple[str, ...] = tuple(NAMES)

RELATIONS: dict[str, str] = {
    "river": "river",
    "founder": "founder",
    "land": "land",
    "sea": "sea",
    "master": "master",
    "ruler": "ruler",
}
"""Facets whose value is another entity, and the kind of that entity."""

FACETS: dict[str, tuple[str, ...]] = {
    "town": ("river", "founder", "land", "food", "festival", "gate"),
    "river": ("sea", "fish", "bridge"),
    "founder": ("master", "tool", "pet"),
    "land": ("ruler", "tree", "stone"),
    "sea": ("wind", "monster", "island"),
    "master": ("craft", "instrument"),
    "ruler": ("beast", "crown"),
}

WORDS: dict[str, tuple[str, ...]] = {
    "food": split_words("bread cheese soup honey plums noodles beans olives dumplings cake"),
    "festival": split_words("lanterns kites masks drums ribbons bells candles wheels"),
    "gate": split_words("iron oak brass marble copper glass ivory silver"),
    "fish": split_words("pike carp trout eel perch salmon bream sturgeon"),
    "bridge": split_words("rope timber chain plank brick log"),
    "tool": split_words("hammer compass spade saw plough needle chisel anvil"),
    "pet": split_words("raven cat tortoise ferret parrot hound goat monkey"),
    "tree": split_words("willow birch cedar elm maple pine yew poplar"),
    "stone": split_words("granite slate jade amber flint quartz basalt opal"),
    "wind": split_words("warm bitter dry wet wild soft salty lazy"),
    "monster": split_words("kraken serpent hydra siren dragon giant turtle ghost"),
    "island": split_words("pearl palm skull coral fog crab gull ember"),
    "craft": split_words("weaving pottery baking printing carving brewing sewing roofing gilding tanning"),
    "instrument": split_words("flute harp lute fiddle horn organ trumpet bagpipe zither gong"),
    "beast": split_words("lion bear wolf eagle boar stag lynx bison"),
    "crown": split_words("gold thorn laurel ruby bone feather tin flower"),
}

TRAITS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "town": (
        ("quiet", "busy", "old", "steep", "windy", "neat", "crowded", "sunny"),
        (
            "lies on a hill",
            "has narrow streets",
            "wakes up early",
            "likes visitors",
            "has many stairs",
            "is easy to miss",
        ),
    ),
    "river": (
        ("slow", "wide", "shallow", "clear", "muddy", "cold"),
        ("turns often", "is full of reeds", "floods in spring", "makes little noise"),
    ),
    "founder": (
        ("tall", "patient", "stubborn", "cheerful", "shy", "loud"),
        ("was always late", "walked everywhere", "wrote long letters", "slept little", "never wore shoes"),
    ),
    "land": (
        ("flat", "green", "rocky", "rainy", "empty"),
        ("has few roads", "takes a week to cross", "has long winters", "is fond of songs"),
    ),
    "sea": (("grey", "deep", "calm", "rough"), ("has no far shore", "freezes in winter", "is hard to sail")),
    "master": (
        ("strict", "kind", "famous", "silent"),
        ("taught for many years", "had a small workshop", "left no books"),
    ),
    "ruler": (
        ("young", "clever", "vain", "gentle", "careful"),
        ("sits on a plain chair", "travels in summer", "rarely speaks", "eats alone"),
    ),
}


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


def hash_stably(text: str) -> int:
    """A 32-bit number that depends on the text alone, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest(), "big")


@cache
def list_entities(kind: str | None = None) -> tuple[Entity, ...]:
    """All entities, or those of one kind, in a fixed order."""
    kinds = KINDS if kind is None else (kind,)
    return tuple(Entity(name, of) for of in kinds for name in NAMES[of])


@cache
def _index_entities() -> dict[str, Entity]:
    return {entity.name: entity for entity in list_entities()}


def find_entity(name: str) -> Entity:
    """The entity of this (capitalised) name; `InputError` where there is none."""
    try:
        return _index_entities()[name]
    except KeyError:
        raise InputError(f"no entity is called {name!r}; the names are listed in encyclopedia.NAMES") from None


@cache
def _assign_values() -> dict[tuple[Entity, str], str]:
    """Deal out the value of every facet, each value about equally often."""
    values: dict[tuple[Entity, str], str] = {}
    for kind, facets in FACETS.items():
        holders = list_entities(kind)
        for facet in facets:
            choices = NAMES[RELATIONS[facet]] if facet in RELATIONS else WORDS[facet]
            dealt = [choices[place % len(choices)] for place in range(len(holders))]
            random.Random(hash_stably(f"values of {kind} {facet}")).shuffle(dealt)
            values.update(((holder, facet), value) for holder, value in zip(holders, dealt, strict=True))
    return values


def state_value(entity: Entity, facet: str) -> str:
    """The value of a facet: a word, or for a relation the capitalised name of an entity."""
    try:
        return _assign_values()[entity, facet]
    except KeyError:
        raise InputError(
            f"{entity.name} is a {entity.kind} and has no {facet!r}; it has {', '.join(FACETS[entity.kind])}"
        ) from None


def follow_relation(entity: Entity, relation: str) -> Entity:
    """The entity one hop away."""
    return find_entity(state_value(entity, relation))


def state_fact(entity: Entity, facet: str) -> str:
    """The one sentence in which this fact is always told, in lower case: "the river of torvale is lind"."""
    name = entity.name.lower()
    if facet == INTRO:
        return f"{name} is a {entity.kind}"
    return f"the {facet} of {name} is {state_value(entity, facet).lower()}"


def _write_intro(entity: Entity) -> str:
    looks, habits = TRAITS[entity.kind]
    dice = random.Random(hash_stably(f"trait of {entity.name}"))
    copula = {"founder": "who was", "master": "who was", "ruler": "who is"}.get(entity.kind, "that is")
    return f"{entity.name} is a {entity.kind} {copula} {dice.choice(looks)} and {dice.choice(habits)}."


@cache
def write_passage(entity: Entity, facet: str) -> Passage:
    """The passage on one facet. It contains `state_fact` word for word but for capitals."""
    if facet == INTRO:
        return Passage(entity, facet, _write_intro(entity))
    value = state_value(entity, facet)
    return Passage(entity, facet, f"{entity.name}: the {facet} of {entity.name} is {value}.")


def list_facets(entity: Entity) -> tuple[str, ...]:
    """All that has a passage: the introduction first, then the facets."""
    return (INTRO, *FACETS[entity.kind])


def list_passages() -> Iterator[Passage]:
    """The whole encyclopedia, entity by entity."""
    for entity in list_entities():
        for facet in list_facets(entity):
            yield write_passage(entity, facet)
