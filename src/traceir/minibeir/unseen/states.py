"""What the images of the unseen sets show: the test compositions of three worlds, and what can be seen of them.

Only compositions of MiniBEIR's test split occur, as answers, as distractors and as references, so that nothing that is searched
for or shown here was ever the answer of a training query.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, TypeVar

from traceir.errors import DataError
from traceir.minibeir.drawing import COLOUR_NAMES, GARMENT_TYPES, SHAPES
from traceir.minibeir.garments import COLLARS, LENGTHS, PATTERNS, SLEEVES, Garment
from traceir.minibeir.news import PARTS, list_others, swap_sides
from traceir.minibeir.rows import VARIANTS, Sketch, derive_seed
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.sprites import EVENTS, PERSONS, PLACES, TIMES, Photo

State = Scene | Garment | Photo
S = TypeVar("S", bound=State)
T = TypeVar("T")

Item = tuple[str, str]
"""Colour and shape of an object."""
ITEMS: Final[tuple[Item, ...]] = tuple(itertools.product(COLOUR_NAMES, SHAPES))
LOOKS: Final = tuple(f"{colour} {figure}" for colour in COLOUR_NAMES for figure in PATTERNS)
SIDES: Final = ("left", "right")


@dataclass(slots=True)
class StatePart:
    """One unseen set, ready to be written.

    `files` maps paths to their content: a string is written as it is, anything else as JSON (or by torch, where the path ends in
    .pt). `shown` maps paths of images to what they show. Paths are relative to the root of all sets.
    """

    queries: int
    candidates: int
    files: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, State] = field(default_factory=dict)


def demand(holds: bool, where: str, what: str) -> None:
    """Raises DataError where a set breaks a rule."""
    if not holds:
        raise DataError(f"{where}: {what}; draw another query")


@cache
def _list_tests(kind: str) -> dict[Any, None]:
    every: Iterator[State]
    if kind == "Scene":
        every = (Scene(items) for items in itertools.product(ITEMS, repeat=3))
    elif kind == "Garment":
        looks = [(colour, "plain") for colour in COLOUR_NAMES]
        looks += [(base, look) for base in COLOUR_NAMES for look in LOOKS if not look.startswith(base)]
        cuts = itertools.product(GARMENT_TYPES, looks, LENGTHS, SLEEVES, COLLARS, (True, False))
        every = (Garment(garment, *look, length, sleeves, collar, belt) for garment, look, length, sleeves, collar, belt in cuts)
    else:
        people = itertools.permutations(PERSONS, 2)
        every = (Photo(*pair, *rest) for pair, *rest in itertools.product(people, EVENTS, PLACES, TIMES))
    return {state: None for state in every if state.split == "test"}


def tests(kind: type[S]) -> dict[S, None]:
    """Every composition of the test split, in a fixed order."""
    return _list_tests(kind.__name__)


def depict(state: State) -> Sketch:
    """The one image in which a composition stands in the unseen sets."""
    seed = derive_seed("unseen", state if isinstance(state, Photo) else state.code)
    return state.sketch(seed % (100_000 if isinstance(state, Photo) else VARIANTS))


def shuffle(items: Iterable[T], rng: random.Random) -> list[T]:
    shuffled = list(items)
    rng.shuffle(shuffled)
    return shuffled


def list_near(state: Any, rng: random.Random) -> list[Any]:
    """The test compositions that differ from this one in one attribute, or in the order of two objects or people, shuffled."""
    if isinstance(state, Photo):
        altered = [replace(state, **{part: choice}) for part in PARTS for choice in list_others(state, part)]
        return shuffle((photo for photo in (swap_sides(state), *altered) if photo in tests(Photo)), rng)
    if isinstance(state, Garment):
        return [twin for twin in state.twins(rng) if twin in tests(Garment)]
    near = [each for each in state.near(rng) if each in tests(Scene)]
    return rng.sample(near, len(near))


def draw_clusters(kind: type[S], count: int, rng: random.Random) -> list[S]:
    """`count` different compositions: one at random and up to three near it, again and again; shuffled."""
    choices = list(tests(kind))
    chosen: dict[S, None] = {}
    while len(chosen) < count:
        first = rng.choice(choices)
        chosen |= dict.fromkeys((first, *list_near(first, rng)[:3])[: count - len(chosen)])
    return rng.sample(list(chosen), count)


def draw_by_turns(kinds: Sequence[type[State]], count: int, rng: random.Random) -> list[Any]:
    """As `draw_clusters`, of these kinds by turns."""
    drawn = [draw_clusters(kind, len(range(start, count, len(kinds))), rng) for start, kind in enumerate(kinds)]
    return [drawn[number % len(kinds)][number // len(kinds)] for number in range(count)]


# --- what can be seen -------------------------------------------------------------------------------------------------


def at(scene: Scene, slot: str) -> Item:
    """The object on the left, in the middle, on the right."""
    return scene.objects[SLOTS.index(slot)]


def name_item(item: Iterable[str]) -> str:
    return f"a {' '.join(item)}"


def fits(item: Item, name: str) -> bool:
    """Whether an object is "a red cube", "a cube"."""
    return set(name.split()[1:]) <= set(item)


def shows(scene: Scene, names: Iterable[str]) -> bool:
    """Whether all is seen, each in an object of its own; "no red cube" is seen where no object is one."""
    wanted = [name for name in names if name.startswith("a ")]
    denied = any(fits(item, name) for item in scene.objects for name in names if not name.startswith("a "))
    return not denied and any(all(map(fits, order, wanted)) for order in itertools.permutations(scene.objects, len(wanted)))


def is_beside(scene: Scene, name: str, side: str, other: str) -> bool:
    """Whether some object of that name stands anywhere to that side of some object that is `other`."""
    names = (name, other) if side == "left" else (other, name)
    return any(all(map(fits, pair, names)) for pair in itertools.combinations(scene.objects, 2))
