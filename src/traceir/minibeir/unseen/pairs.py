"""A picture and two captions of which one is true: CC-Neg, where "no" makes the difference, and SugarCrepe's small edits.

MiniBEIR's captions tell all of a picture and are compared with captions of other pictures. Here a caption tells a part,
and the false one differs by a negation, or by a word that is added, replaced, or has changed places with another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.news import TIME_WORDS
from traceir.minibeir.photos import EVENTS, PERSONS
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import Scene
from traceir.minibeir.unseen.language import Phrase, Slots, deny, read
from traceir.minibeir.unseen.states import (
    Part,
    State,
    depict,
    has_trim,
    is_beside,
    list_garments,
    list_photos,
    list_scenes,
    name_item,
    shows,
    tell_look,
    tell_sleeves,
)

PREFIX: Final = "/authors/datasets/cc3m/"
"""Stands before the picture names of CC-Neg, as the folder of its authors does in the published file."""


def _things(states: tuple[Scene, ...], w: Slots) -> bool:
    return shows(states[-1], list(w.values()))


def _wears(states: tuple[Garment, ...], w: Slots) -> bool:
    """Kind, colour and trims, as far as they are named."""
    garment = states[-1]
    plain = w.get("kind", garment.kind) == garment.kind and w.get("colour", garment.colour) == garment.colour
    return plain and all(has_trim(garment, w[name]) for name in w if name.startswith("trim"))


def _met(states: tuple[Photo, ...], w: Slots) -> bool:
    """Persons, event, town and time, as far as they are named; "no Hupu", "no race" are true where they are missing."""
    photo = states[-1]
    seen = {photo.left, photo.right, f"the {photo.event}"}
    named = [w[name] for name in w if name.rstrip("2") in ("person", "who", "deed")]
    there = all((name in seen) if not name.startswith("no ") else not {name[3:], f"the {name[3:]}"} & seen for name in named)
    where = w.get("town", photo.place) == photo.place and w.get("event", photo.event) == photo.event
    return there and where and w.get("time", TIME_WORDS[photo.time]) == TIME_WORDS[photo.time]


def _stands(states: tuple[Photo, ...], w: Slots) -> bool:
    people = (w["person"], w["person2"]) if w["side"] == "left" else (w["person2"], w["person"])
    return people == (states[-1].left, states[-1].right) and w["town"] == states[-1].place


SCENE_CAPTIONS: Sequence[Phrase[Scene, bool]] = (
    Phrase("{thing} and {thing2}", _things),
    Phrase("{thing} and {thing2} and {thing3}", _things),
    Phrase("a table with {thing} and {thing2}", _things),
    Phrase("{thing} and {thing2} on a table", _things),
    Phrase("{thing} {side} of {thing2}", lambda s, w: is_beside(s[-1], w["thing"], w["side"], w["thing2"])),
)
GARMENT_CAPTIONS: Sequence[Phrase[Garment, bool]] = (
    Phrase("a {kind} with {trim}", _wears),
    Phrase("a {kind} with {trim} and {trim2}", _wears),
    Phrase("a {colour} {kind} with {trim}", _wears),
    Phrase("a {colour} {kind} with {trim} and {trim2}", _wears),
)
PHOTO_CAPTIONS: Sequence[Phrase[Photo, bool]] = (
    Phrase("{person} at the {event}", _met),
    Phrase("{person} and {person2} at the {event}", _met),
    Phrase("{person} and {who} in {town}", _met),
    Phrase("a photo of {town} with {who}", _met),
    Phrase("{person} at {deed} in {town}", _met),
    Phrase("{person} at the {event} {time}", _met),
    Phrase("{person} {side} of {person2} in {town}", _stands),
)


def is_true(caption: str, state: State) -> bool:
    """Whether a caption of this module is true of a picture. Raises DataError where it is none."""
    if isinstance(state, Scene):
        return read(SCENE_CAPTIONS, caption).mean(state)
    if isinstance(state, Garment):
        return read(GARMENT_CAPTIONS, caption).mean(state)
    return read(PHOTO_CAPTIONS, caption).mean(state)


Draft = tuple[State, str, str]
"""What a picture shows, a caption that should be true of it, and one that should be false."""

_FRAMES: Final = ("{} and {}", "a table with {} and {}", "{} and {} on a table")


def _draw_scene(rng: random.Random) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene and its objects in any order."""
    scene = rng.choice(list(list_scenes()))
    return scene, rng.sample(scene.objects, 3)


def _draw_garment(rng: random.Random) -> tuple[Garment, list[str]]:
    """A garment and what it has, in any order."""
    garment = rng.choice(list(list_garments()))
    trims = [tell_look(garment), tell_sleeves(garment), f"a {garment.collar}", *(["a belt"] if garment.belt else [])]
    trims = [trim for trim in trims if not trim.startswith("no ")]
    return garment, rng.sample(trims, len(trims))


def _draw_photo(rng: random.Random) -> tuple[Photo, list[str]]:
    """A photo and its people in any order."""
    photo = rng.choice(list(list_photos()))
    return photo, rng.sample((photo.left, photo.right), 2)


def _unlike(rng: random.Random, words: Sequence[str], *taken: str) -> str:
    return rng.choice([word for word in words if word not in taken])


# --- CC-Neg -----------------------------------------------------------------------------------------------------------


def _negate_scene(rng: random.Random) -> Draft:
    scene, items = _draw_scene(rng)
    things, frame = [name_item(item) for item in items[:2]], rng.choice(_FRAMES)
    place = rng.randrange(2)
    denied = [deny(thing) if at == place else thing for at, thing in enumerate(things)]
    return scene, frame.format(*things), frame.format(*denied)


def _negate_garment(rng: random.Random) -> Draft:
    garment, trims = _draw_garment(rng)
    trims = trims[:2]
    place = rng.randrange(len(trims))
    denied = [deny(trim) if at == place else trim for at, trim in enumerate(trims)]
    head = f"a {garment.kind}" if rng.random() < 0.5 else f"a {garment.colour} {garment.kind}"
    return garment, f"{head} with {' and '.join(trims)}", f"{head} with {' and '.join(denied)}"


def _negate_photo(rng: random.Random) -> Draft:
    photo, (one, other) = _draw_photo(rng)
    frame, part = rng.choice(
        (
            (f"{one} and {{}} in {photo.place}", other),
            (f"a photo of {photo.place} with {{}}", one),
            (f"{one} at {{}} in {photo.place}", f"the {photo.event}"),
        )
    )
    return photo, frame.format(part), frame.format(deny(part))


def make_ccneg(count: int, rng: random.Random) -> Part:
    """Captions and their negations; scenes, garments and photos by turns. No caption has a comma: readers remove them."""
    part = Part(count, 2 * count)
    draws = (_negate_scene, _negate_garment, _negate_photo)
    paths, annotations = [], []
    for place in range(count):
        state, caption, negative = _draw_pair(draws[place % 3], rng)
        name = f"{place:09}.jpg"
        part.images[f"ccneg/cc3m/{name}"] = depict(state)
        paths.append(PREFIX + name)
        annotations.append({"json": {"caption": caption}, "sop_data": {"negative-prompt": negative}})
    part.files["ccneg/ccneg_preprocessed.pt"] = {"image_paths": paths, "annotations": annotations}
    return part


def _draw_pair(draw: Callable[[random.Random], Draft], rng: random.Random) -> Draft:
    """A draft whose caption is true and whose other caption is false; a draft that is not is drawn again."""
    while True:
        state, caption, negative = draw(rng)
        if is_true(caption, state) and not is_true(negative, state):
            return state, caption, negative


# --- SugarCrepe -------------------------------------------------------------------------------------------------------


def _add_object_to_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    added = (rng.choice(COLOUR_NAMES), rng.choice(SHAPES))
    caption = f"{name_item(one)} and {name_item(other)}"
    return scene, caption, f"{caption} and {name_item(added)}"


def _add_person_to_photo(rng: random.Random) -> Draft:
    photo, (one, other) = _draw_photo(rng)
    added = _unlike(rng, tuple(PERSONS), one, other)
    return photo, f"{one} at the {photo.event}", f"{one} and {added} at the {photo.event}"


def _add_colour_to_scene(rng: random.Random) -> Draft:
    scene, ((_, shape), other, _) = _draw_scene(rng)
    frame, added = rng.choice(_FRAMES), rng.choice(COLOUR_NAMES)
    return scene, frame.format(f"a {shape}", name_item(other)), frame.format(f"a {added} {shape}", name_item(other))


def _add_colour_to_garment(rng: random.Random) -> Draft:
    garment, trims = _draw_garment(rng)
    added = _unlike(rng, COLOUR_NAMES, garment.colour, *tell_look(garment).split())
    return garment, f"a {garment.kind} with {trims[0]}", f"a {added} {garment.kind} with {trims[0]}"


def _replace_colour_in_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    frame, new = rng.choice(_FRAMES), _unlike(rng, COLOUR_NAMES, one[0])
    return scene, frame.format(name_item(one), name_item(other)), frame.format(name_item((new, one[1])), name_item(other))


def _replace_colour_in_garment(rng: random.Random) -> Draft:
    garment, trims = _draw_garment(rng)
    new = _unlike(rng, COLOUR_NAMES, garment.colour, *tell_look(garment).split())
    tail = f"{garment.kind} with {trims[0]}"
    return garment, f"a {garment.colour} {tail}", f"a {new} {tail}"


def _replace_object_in_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    frame, new = rng.choice(_FRAMES), _unlike(rng, SHAPES, one[1])
    return scene, frame.format(name_item(one), name_item(other)), frame.format(name_item((one[0], new)), name_item(other))


def _replace_name_in_photo(rng: random.Random) -> Draft:
    photo, (one, other) = _draw_photo(rng)
    frame = f"{one} and {{}} at the {{}}"
    if rng.random() < 0.5:
        return photo, frame.format(other, photo.event), frame.format(_unlike(rng, tuple(PERSONS), one, other), photo.event)
    return photo, frame.format(other, photo.event), frame.format(other, _unlike(rng, EVENTS, photo.event))


def _replace_side_in_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    sides = rng.sample(("left", "right"), 2)
    caption, negative = (f"{name_item(one)} {side} of {name_item(other)}" for side in sides)
    return scene, caption, negative


def _replace_side_in_photo(rng: random.Random) -> Draft:
    photo, (one, other) = _draw_photo(rng)
    sides = ("left", "right") if one == photo.left else ("right", "left")
    caption, negative = (f"{one} {side} of {other} in {photo.place}" for side in sides)
    return photo, caption, negative


def _swap_colours_in_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    frame = rng.choice(_FRAMES)
    swapped = (name_item((other[0], one[1])), name_item((one[0], other[1])))
    return scene, frame.format(name_item(one), name_item(other)), frame.format(*swapped)


def _swap_colours_in_garment(rng: random.Random) -> Draft:
    garment = rng.choice([garment for garment in list_garments() if garment.figure is not None])
    second, figure = garment.pattern.split()
    caption = f"a {garment.colour} {garment.kind} with {second} {figure}"
    return garment, caption, f"a {second} {garment.kind} with {garment.colour} {figure}"


def _swap_objects_in_scene(rng: random.Random) -> Draft:
    scene, (one, other, _) = _draw_scene(rng)
    middle = f"{rng.choice(('left', 'right'))} of"
    return scene, f"{name_item(one)} {middle} {name_item(other)}", f"{name_item(other)} {middle} {name_item(one)}"


def _swap_people_in_photo(rng: random.Random) -> Draft:
    photo, (one, other) = _draw_photo(rng)
    side = "left" if one == photo.left else "right"
    return photo, f"{one} {side} of {other} in {photo.place}", f"{other} {side} of {one} in {photo.place}"


KINDS: Mapping[str, Sequence[Callable[[random.Random], Draft]]] = {
    "add_att": (_add_colour_to_scene, _add_colour_to_garment),
    "add_obj": (_add_object_to_scene, _add_person_to_photo),
    "replace_att": (_replace_colour_in_scene, _replace_colour_in_garment),
    "replace_obj": (_replace_object_in_scene, _replace_name_in_photo),
    "replace_rel": (_replace_side_in_scene, _replace_side_in_photo),
    "swap_att": (_swap_colours_in_scene, _swap_colours_in_garment),
    "swap_obj": (_swap_objects_in_scene, _swap_people_in_photo),
}
"""The seven files of SugarCrepe; two worlds by turns in each."""


def is_small_edit(kind: str, caption: str, negative: str) -> bool:
    """Whether the false caption differs as its file says: words added, one part replaced, or the same words reordered."""
    old, new = caption.split(), negative.split()
    if kind.startswith("swap"):
        return old != new and sorted(old) == sorted(new)
    if kind.startswith("add"):
        rest = iter(new)
        return all(word in rest for word in old) and 0 < len(new) - len(old) <= 4
    head = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    tail = next((place for place, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), 0)
    return max(len(old), len(new)) - head - tail in (1, 2)


def make_sugarcrepe(count: int, rng: random.Random) -> Part:
    """Seven files of `count` pictures with a true caption and a false one that is a small edit away."""
    part = Part(7 * count, 14 * count)
    ids: dict[State, int] = {}
    for kind, draws in KINDS.items():
        entries: dict[str, dict[str, Any]] = {}
        for place in range(count):
            state, caption, negative = _draw_pair(draws[place % 2], rng)
            name = f"{ids.setdefault(state, 139 + 13 * len(ids)):012}.jpg"
            part.images[f"sugar-crepe/val2017/{name}"] = depict(state)
            entries[str(place)] = {"filename": name, "caption": caption, "negative_caption": negative}
        part.files[f"sugar-crepe/data/{kind}.json"] = entries
    return part
