"""A picture and words to pictures: CIRCO, where several pictures are right, and GeneCIS, where one word says what counts.

MiniBEIR's edits name one result. Here a change leaves something open, so that every picture within it is right; or only
one trait is to be kept or reached and all others may differ, and each query ranks a small gallery of its own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic

from traceir.minibeir.chains import count_differences
from traceir.minibeir.drawing import COLOUR_NAMES
from traceir.minibeir.garments import Garment
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.unseen.language import POSITIVE_TRIMS, WORDS, Phrase, Reading, S, Slots, read
from traceir.minibeir.unseen.states import (
    ITEMS,
    Part,
    depict,
    fits,
    has_trim,
    list_garments,
    list_scenes,
    name_item,
    near_scenes,
)

PAIRS: Final[Mapping[str, tuple[int, int]]] = {"left two": (0, 1), "right two": (1, 2), "outer two": (0, 2)}


def vary(scene: Scene, places: Sequence[int]) -> Iterator[Scene]:
    """The test scenes that have any objects at these places and are like `scene` elsewhere."""
    for items in itertools.product(ITEMS, repeat=len(places)):
        objects = list(scene.objects)
        for place, item in zip(places, items, strict=True):
            objects[place] = item
        varied = Scene(tuple(objects))
        if varied in list_scenes():
            yield varied


# --- CIRCO ------------------------------------------------------------------------------------------------------------
# Meanings get (reference, candidate). A reference is never an answer to its own query.


def _keeps(states: tuple[Scene, ...], places: Sequence[int]) -> bool:
    return all(states[0].objects[place] == states[-1].objects[place] for place in places)


def _others(*places: int) -> list[int]:
    return [place for place in range(3) if place not in places]


def _is_any(states: tuple[Scene, ...], w: Slots, value: str) -> bool:
    """One object became another one with this colour or shape, which it did not have; the others stayed."""
    place = SLOTS.index(w["place"])
    was, now = states[0].objects[place], states[-1].objects[place]
    return value not in was and value in now and _keeps(states, _others(place))


def _are_any(states: tuple[Scene, ...], w: Slots, value: str) -> bool:
    """Both others have this colour or shape now, and are not as they were."""
    place = SLOTS.index(w["place"])
    both = all(value in states[-1].objects[other] for other in _others(place))
    return both and _keeps(states, [place]) and states[0] != states[-1]


def _swaps(states: tuple[Scene, ...], w: Slots, value: str) -> bool:
    one, other = PAIRS[w["pair"]]
    rest = _others(one, other)[0]
    swapped = states[0].swap(one, other)
    return all(swapped.objects[place] == states[-1].objects[place] for place in (one, other)) and (
        value in states[-1].objects[rest] and value not in states[0].objects[rest]
    )


CONDITIONS: Sequence[Phrase[Scene, bool]] = (
    Phrase("any {shape} instead of the {place} one", lambda s, w: _is_any(s, w, w["shape"])),
    Phrase("any {colour} object instead of the {place} one", lambda s, w: _is_any(s, w, w["colour"])),
    Phrase("the same {place} one, but with any two {colour} objects", lambda s, w: _are_any(s, w, w["colour"])),
    Phrase("keep the {place} one and turn the other two into a {shape} of any colour", lambda s, w: _are_any(s, w, w["shape"])),
    Phrase("swap the {pair}, and the other one becomes any {shape}", lambda s, w: _swaps(s, w, w["shape"])),
    Phrase(
        "keep the {pair} and change the other one into any other object",
        lambda s, w: _keeps(s, PAIRS[w["pair"]]) and s[0] != s[-1],
    ),
)
"""What CIRCO's relative captions say of (reference, candidate)."""


def _draw_condition(phrase: Phrase[Scene, bool], reference: Scene, rng: random.Random) -> tuple[str, list[Scene], list[Scene]]:
    """A condition on the reference in words; the test scenes that fulfil it; some that vary in the same places and do not."""
    slots = {name: rng.choice(WORDS[name]) for name in ("place", "pair", "colour", "shape")}
    if "{pair}" in phrase.template:
        one, other = PAIRS[slots["pair"]]
        ground = reference.swap(one, other) if phrase.template.startswith("swap") else reference
        varied = _others(one, other)
    else:
        place = SLOTS.index(slots["place"])
        ground, varied = reference, [place] if "instead" in phrase.template else _others(place)
    right: list[Scene] = []
    wrong: list[Scene] = []
    for scene in vary(ground, varied):
        (right if phrase.mean((reference, scene), slots) else wrong).append(scene)
    return phrase.say(**slots), right, wrong


def make_circo(count: int, rng: random.Random) -> Part:
    """`count` val queries with their answers, and a fifth as many test queries without.

    The pool holds what the queries bring: reference, two to four answers, near misses. Right is whatever in the whole pool
    fulfils the condition.
    """
    queries: list[tuple[Scene, str]] = []
    pool: dict[Scene, None] = {}
    for reference in rng.sample(list(list_scenes()), len(list_scenes())):
        text, right, wrong = _draw_condition(CONDITIONS[len(queries) % len(CONDITIONS)], reference, rng)
        if len(right) < 2:
            continue
        right = rng.sample(right, min(len(right), rng.randint(2, 4)))
        pool |= dict.fromkeys([reference, *right, *rng.sample(wrong, min(1, len(wrong))), *near_scenes(right[0], rng)[:1]])
        queries.append((reference, text))
        if len(queries) == count + max(1, count // 5):
            break
    ids = {scene: 1000 + place for place, scene in enumerate(rng.sample(list(pool), len(pool)))}
    files = {scene: f"{name:012}.jpg" for scene, name in ids.items()}
    part = Part(count, len(pool))
    part.files["circo/annotations/val.json"] = [
        _enter_condition(number, *query, ids, True) for number, query in enumerate(queries[:count])
    ]
    part.files["circo/annotations/test.json"] = [
        _enter_condition(number, *query, ids, False) for number, query in enumerate(queries[count:])
    ]
    part.files["circo/annotations/image_info_unlabeled2017.json"] = {
        "images": [{"id": ids[scene], "file_name": files[scene]} for scene in sorted(ids, key=ids.__getitem__)]
    }
    part.images = {f"circo/unlabeled2017/{name}": depict(scene) for scene, name in files.items()}
    return part


def _enter_condition(number: int, reference: Scene, text: str, ids: Mapping[Scene, int], answered: bool) -> dict[str, Any]:
    """One entry of CIRCO's annotations; the answers only in val."""
    entry: dict[str, Any] = {"id": number, "reference_img_id": ids[reference], "relative_caption": text}
    if not answered:
        return entry
    condition = read(CONDITIONS, text)
    right = sorted(name for scene, name in ids.items() if condition.mean(reference, scene))
    return entry | {"target_img_id": right[0], "gt_img_ids": right}


# --- GeneCIS ----------------------------------------------------------------------------------------------------------

GALLERY: Final[Mapping[str, int]] = {"change_object": 14, "focus_object": 14, "change_attribute": 9, "focus_attribute": 9}
"""Wrong pictures of each query, as published."""


def _has_same(states: tuple[Scene, ...], shape: str) -> bool:
    """The candidate has the very object of this shape that the reference has."""
    mine = [item for item in states[0].objects if item[1] == shape]
    return len(mine) == 1 and mine[0] in states[-1].objects


def _gains(states: tuple[Scene, ...], thing: str) -> bool:
    """One object made way for the thing, and the two others stayed where they were."""
    pairs = list(zip(states[0].objects, states[-1].objects, strict=True))
    changed = [now for was, now in pairs if was != now]
    return len(changed) == 1 and fits(changed[0], thing)


SCENE_FOCUS: Mapping[str, Sequence[Phrase[Scene, bool]]] = {
    "focus_object": (Phrase("{shape}", lambda s, w: _has_same(s, w["shape"])),),
    "change_object": (Phrase("with {thing}", lambda s, w: _gains(s, w["thing"])),),
}
GARMENT_FOCUS: Mapping[str, Sequence[Phrase[Garment, bool]]] = {
    "focus_attribute": (
        Phrase("colour", lambda s, w: s[0].colour == s[-1].colour),
        Phrase("pattern", lambda s, w: s[0].pattern == s[-1].pattern),
        Phrase("sleeves", lambda s, w: s[0].sleeves == s[-1].sleeves),
        Phrase("neck", lambda s, w: s[0].collar == s[-1].collar),
    ),
    "change_attribute": (
        Phrase("{colour} base", lambda s, w: s[-1].kind == s[0].kind and s[-1].colour == w["colour"]),
        Phrase("{trim}", lambda s, w: s[-1].kind == s[0].kind and has_trim(s[-1], w["trim"])),
    ),
}
"""What a condition says of (reference, candidate)."""


@dataclass(frozen=True, slots=True)
class _Choice(Generic[S]):
    """A query of GeneCIS: the condition, the right picture, and the wrong ones of its gallery."""

    reference: S
    text: str
    target: S
    gallery: tuple[S, ...]

    @property
    def images(self) -> tuple[S, ...]:
        """Reference, target and gallery, in the order in which crops are numbered."""
        return self.reference, self.target, *self.gallery


def _fill_gallery(
    condition: Reading[S, bool], reference: S, target: S, groups: Sequence[Sequence[S]], size: int
) -> _Choice[S] | None:
    """Takes wrong pictures from the groups by turns; None where there are too few."""
    wrong: dict[S, None] = {}
    for turn in itertools.zip_longest(*groups):
        wrong |= {state: None for state in turn if state is not None and not condition.mean(reference, state)}
        wrong.pop(reference, None)
        if len(wrong) >= size:
            return _Choice(reference, condition.say(), target, tuple(wrong)[:size])
    return None


def _focus_object(rng: random.Random) -> _Choice[Scene] | None:
    """The same object among unlike ones; against the same company round another object."""
    reference = rng.choice(list(list_scenes()))
    place, held = rng.randrange(3), rng.randrange(3)
    item = reference.objects[place]
    condition = read(SCENE_FOCUS["focus_object"], item[1])
    ground = Scene(tuple(item if slot == held else reference.objects[slot] for slot in range(3)))
    company = [other for slot, other in enumerate(reference.objects) if slot != place]
    right = [scene for scene in vary(ground, _others(held)) if not set(company) & set(scene.objects)]
    right = [scene for scene in right if condition.mean(reference, scene)]
    if not right:
        return None
    near = list(vary(reference, [place]))
    loose = _shuffle(vary(reference, [place, rng.choice(_others(place))]), rng)
    tempting = [scene for scene in loose if any(fits(other, f"a {item[1]}") for other in scene.objects)]
    groups = (near, tempting, loose)
    return _fill_gallery(condition, reference, rng.choice(right), groups, GALLERY["focus_object"])


def _change_object(rng: random.Random) -> _Choice[Scene] | None:
    """One object made way for the named one; against the named one in other company, and the same company without it."""
    reference, place, item = rng.choice(list(list_scenes())), rng.randrange(3), rng.choice(ITEMS)
    target = Scene(tuple(item if slot == place else reference.objects[slot] for slot in range(3)))
    if item in reference.objects or target not in list_scenes():
        return None
    condition = read(SCENE_FOCUS["change_object"], f"with {name_item(item)}")
    moved = _shuffle(vary(target, [rng.choice(_others(place))]), rng)
    near = _shuffle(itertools.chain.from_iterable(vary(reference, [slot]) for slot in range(3)), rng)
    loose = _shuffle(vary(target, _others(place)), rng)
    return _fill_gallery(condition, reference, target, (moved, near, loose), GALLERY["change_object"])


def _focus_attribute(rng: random.Random) -> _Choice[Garment] | None:
    """A garment that shares the named trait and few others; against garments that share others and not the trait."""
    reference = rng.choice(list(list_garments()))
    condition = Reading(rng.choice(GARMENT_FOCUS["focus_attribute"]), {})
    if condition.say() == "pattern" and reference.figure is None:
        return None
    right = [other for other in list_garments() if condition.mean(reference, other)]
    right = [other for other in right if count_differences(reference, other) >= 4]
    near = _list_nearest(reference, rng)
    return _fill_gallery(condition, reference, rng.choice(right), (near,), GALLERY["focus_attribute"]) if right else None


def _change_attribute(rng: random.Random) -> _Choice[Garment] | None:
    """A garment of the same kind with the named value, whose other traits may differ; against the kind without the value,
    and against the value on other kinds that share less with the reference than the target does."""
    reference = rng.choice(list(list_garments()))
    words = [f"{colour} base" for colour in COLOUR_NAMES] if rng.random() < 0.4 else POSITIVE_TRIMS
    condition = read(GARMENT_FOCUS["change_attribute"], rng.choice(words))
    if condition.mean(reference, reference):
        return None
    near = _list_nearest(reference, rng)
    right = [other for other in near if condition.mean(reference, other) and count_differences(reference, other) in (2, 3)]
    if not right:
        return None
    target = rng.choice(right)
    less = [other for other in near if count_differences(reference, other) > count_differences(reference, target)]
    same = [other for other in near if other.kind == reference.kind]
    named = [other for other in less if condition.mean(other, other)]
    return _fill_gallery(condition, reference, target, (same, named), GALLERY["change_attribute"])


def _list_nearest(garment: Garment, rng: random.Random) -> list[Garment]:
    """All other garments, those that share most first."""
    others = _shuffle((other for other in list_garments() if other != garment), rng)
    return sorted(others, key=lambda other: count_differences(garment, other))


def _shuffle(states: Iterable[S], rng: random.Random) -> list[S]:
    shuffled = list(states)
    rng.shuffle(shuffled)
    return shuffled


def make_genecis(count: int, rng: random.Random) -> Part:
    """Four files of `count` queries: an object or a trait to look at, an object or a trait to be reached."""
    part = Part(4 * count, 4 * count + count * sum(GALLERY.values()))
    scenes = {"change_object": _change_object, "focus_object": _focus_object}
    ids: dict[Scene, int] = {}
    for name, draw in scenes.items():
        entries = []
        for choice in _draw_choices(draw, count, rng):
            for scene in choice.images:
                number = ids.setdefault(scene, 100 + 7 * len(ids))
                part.images[f"genecis/val2017/{number:012}.jpg"] = depict(scene)
            entries.append(_enter_choice(choice.text, [{"val_image_id": ids[scene]} for scene in choice.images]))
        part.files[f"genecis/annotations/{name}.json"] = entries
    garments = {"change_attribute": _change_attribute, "focus_attribute": _focus_attribute}
    numbers: dict[Garment, int] = {}
    for name, draw_garment in garments.items():
        entries = []
        for sample, worn in enumerate(_draw_choices(draw_garment, count, rng)):
            for crop, garment in enumerate(worn.images):
                number = numbers.setdefault(garment, 2_300_000 + len(numbers))
                part.images[f"genecis/visual_genome/{name}/{number}_{sample}_{crop}.jpg"] = depict(garment)
            entries.append(_enter_choice(worn.text, [{"image_id": numbers[garment]} for garment in worn.images]))
        part.files[f"genecis/annotations/{name}.json"] = entries
    return part


def _draw_choices(draw: Callable[[random.Random], _Choice[S] | None], count: int, rng: random.Random) -> list[_Choice[S]]:
    """`count` choices; a draw that fails is drawn again."""
    drawn = (draw(rng) for _ in itertools.count())
    return list(itertools.islice((choice for choice in drawn if choice is not None), count))


def _enter_choice(text: str, images: list[dict[str, int]]) -> dict[str, Any]:
    return {"reference": images[0], "target": images[1], "gallery": images[2:], "condition": text}
