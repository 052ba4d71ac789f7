"""What the pictures of the unseen sets show: the test compositions of three worlds, and what can be seen of them.

Only compositions of MiniBEIR's test split occur, as answers, as distractors and as references, so that nothing that is
searched for or shown here was ever the answer of a training query.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

from traceir.errors import DataError
from traceir.minibeir import garments, scenes
from traceir.minibeir.draft import Sketch
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, SHAPES, VARIANTS, derive_seed, split_of
from traceir.minibeir.garments import COLLARS, LENGTHS, PATTERNS, SLEEVES, Garment
from traceir.minibeir.news import assign_split
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES, TIMES, sketch_photo
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import SLOTS, Scene

State = Scene | Garment | Photo
H = TypeVar("H", bound=Hashable)

Item = tuple[str, str]
"""Colour and shape of an object."""
ITEMS: tuple[Item, ...] = tuple(itertools.product(COLOUR_NAMES, SHAPES))


@dataclass(slots=True)
class Part:
    """One unseen set, ready to be written.

    `files` maps paths to their content: a string is written as it is, anything else as JSON (or by torch, where the path
    ends in .pt). `pictures` maps paths to what they show. Paths are relative to the root of all sets.
    """

    queries: int
    candidates: int
    files: dict[str, object] = field(default_factory=dict)
    images: dict[str, Sketch] = field(default_factory=dict)


# --- compositions -----------------------------------------------------------------------------------------------------


@cache
def list_scenes() -> Mapping[Scene, None]:
    """Every scene of the test split; a mapping, to be asked for membership and run through in a fixed order."""
    every = (Scene(items) for items in itertools.product(ITEMS, repeat=3))
    return {scene: None for scene in every if split_of(scene.code) == "test"}


@cache
def list_garments() -> Mapping[Garment, None]:
    """Every garment of the test split."""
    looks = [(colour, "plain") for colour in COLOUR_NAMES]
    looks += [(base, f"{colour} {figure}") for base in COLOUR_NAMES for colour in COLOUR_NAMES for figure in PATTERNS]
    every = (
        Garment(kind, colour, pattern, length, sleeves, collar, belt)
        for kind, (colour, pattern), length, sleeves, collar, belt in itertools.product(
            GARMENT_TYPES, looks, LENGTHS, SLEEVES, COLLARS, (True, False)
        )
        if not pattern.startswith(colour)
    )
    return {garment: None for garment in every if split_of(garment.code) == "test"}


@cache
def list_photos() -> Mapping[Photo, None]:
    """Every press photo of the test split."""
    people = list(itertools.permutations(PERSONS, 2))
    parts = itertools.product(people, EVENTS, PLACES, TIMES)
    every = (Photo(left, right, event, town, hour) for (left, right), event, town, hour in parts)
    return {photo: None for photo in every if assign_split(photo) == "test"}


def depict(state: State) -> Sketch:
    """The one picture in which a composition stands in the unseen sets."""
    if isinstance(state, Photo):
        return sketch_photo(state, derive_seed("unseen", state) % 100_000)
    return state.sketch(derive_seed("unseen", state.code) % VARIANTS)


def find_state(key: str) -> State:
    """What the picture of this key shows. Raises DataError where that is no composition of the test split."""
    state = _states_by_stem().get(_stem(key))
    if state is None:
        raise DataError(f"picture {key!r} shows no composition of the test split; draw it from `states.py`")
    return state


@cache
def _states_by_stem() -> Mapping[str, State]:
    every: Iterator[State] = itertools.chain(list_scenes(), list_garments(), list_photos())
    return {_stem(depict(state).key): state for state in every}


def _stem(key: str) -> str:
    return re.sub(r"[_-]\d+$", "", key)


def near_scenes(scene: Scene, rng: random.Random) -> list[Scene]:
    """The test scenes that differ from this one in one attribute or in the order of two objects, shuffled."""
    swapped = [scene.swap(one, other) for one, other in ((0, 1), (1, 2), (0, 2))]
    near = dict.fromkeys(twin for twin in (*swapped, *scenes.list_twins(scene, rng)) if twin in list_scenes())
    near.pop(scene, None)
    return rng.sample(list(near), len(near))


def near_garments(garment: Garment, rng: random.Random) -> list[Garment]:
    """The test garments that differ from this one in one attribute, shuffled."""
    return [twin for twin in garments.list_twins(garment, rng) if twin in list_garments()]


def near_photos(photo: Photo, rng: random.Random) -> list[Photo]:
    """The test photos that differ from this one in one part, or in who stands on which side, shuffled."""
    near = [replace(photo, left=photo.right, right=photo.left)]
    near += [replace(photo, left=person) for person in PERSONS if person not in (photo.left, photo.right)]
    near += [replace(photo, right=person) for person in PERSONS if person not in (photo.left, photo.right)]
    near += [replace(photo, event=event) for event in EVENTS if event != photo.event]
    near += [replace(photo, place=town) for town in PLACES if town != photo.place]
    near += [replace(photo, time=time) for time in TIMES if time != photo.time]
    near = [twin for twin in near if twin in list_photos()]
    rng.shuffle(near)
    return near


def draw_clusters(every: Collection[H], near: Callable[[H, random.Random], list[H]], count: int, rng: random.Random) -> list[H]:
    """`count` different compositions: one at random and up to three near it, again and again; shuffled."""
    choices = list(every)
    chosen: dict[H, None] = {}
    while len(chosen) < count:
        first = rng.choice(choices)
        for state in (first, *near(first, rng)[:3])[: count - len(chosen)]:
            chosen[state] = None
    return rng.sample(list(chosen), count)


# --- what can be seen -------------------------------------------------------------------------------------------------


def at(scene: Scene, place: str) -> Item:
    """The object on the left, in the middle, on the right."""
    return scene.objects[SLOTS.index(place)]


def name_item(item: Item) -> str:
    return f"a {item[0]} {item[1]}"


def fits(item: Item, thing: str) -> bool:
    """Whether an object is "a red cube", "a red object", "a cube"."""
    return all(word == "object" or word in item for word in thing.split()[1:])


def shows(scene: Scene, things: Sequence[str]) -> bool:
    """Whether all things are seen, each in an object of its own; "no red cube" is seen where no object is one."""
    wanted = [thing for thing in things if thing.startswith("a ")]
    for thing in things:
        if not thing.startswith("a ") and any(fits(item, thing) for item in scene.objects):
            return False
    orders = itertools.permutations(scene.objects, len(wanted))
    return any(all(map(fits, order, wanted)) for order in orders)


def is_beside(scene: Scene, thing: str, side: str, other: str) -> bool:
    """Whether some object that is `thing` stands anywhere to that side of some object that is `other`."""
    for left, right in itertools.combinations(scene.objects, 2):
        one, two = (left, right) if side == "left" else (right, left)
        if fits(one, thing) and fits(two, other):
            return True
    return False


def has_trim(garment: Garment, trim: str) -> bool:
    """Whether a garment has "white dots", "long sleeves", "a v-neck", "a belt", or has them not: "no white dots"."""
    if trim == "no sleeves":
        return garment.sleeves == "sleeveless"
    name = trim.removeprefix("no ").removeprefix("a ")
    there = name in (garment.pattern, garment.sleeves, garment.collar) or (name == "belt" and garment.belt)
    return there != trim.startswith("no ")


def tell_look(garment: Garment) -> str:
    return "no pattern" if garment.figure is None else garment.pattern


def tell_sleeves(garment: Garment) -> str:
    return "no sleeves" if garment.sleeves == "sleeveless" else garment.sleeves


def tell_belt(garment: Garment) -> str:
    return "a belt" if garment.belt else "no belt"
