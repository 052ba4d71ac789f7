"""An image and two captions of which one is true: CC-Neg, where "no" makes the difference, and SugarCrepe's small edits.

MiniBEIR's captions tell all of an image. Here a caption tells a part, and the false one differs by a negation, or by a word that
is added, replaced, or has changed places with another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.scenes import Scene
from traceir.minibeir.sprites import EVENTS, PERSONS, Photo
from traceir.minibeir.unseen.states import SIDES, State, StatePart, demand, is_beside, name_item, shows, tests

PREFIX: Final = "/authors/datasets/cc3m/"
"""Stands before the image names of CC-Neg, as the folder of its authors does in the published file."""
_FRAMES: Final = ("{} and {}", "a table with {} and {}", "{} and {} on a table")

Draft = tuple[State, str, str]
"""What an image shows, a caption that should be true of it, and one that should be false."""


def is_true(caption: str, state: State) -> bool:
    """Whether a caption of this module is true of an image; "no race" is true where there is none."""
    name, side, other = [*re.split(r" (left|right) of ", caption), "", ""][:3]
    if isinstance(state, Scene):
        if side:
            return is_beside(state, name, side, other)
        return shows(state, caption.removeprefix("a table with ").removesuffix(" on a table").split(" and "))
    if isinstance(state, Garment):
        head, trims = caption.split(" with ")
        return set(head.split()[1:]) <= {state.kind, state.colour} and all(has_trim(state, trim) for trim in trims.split(" and "))
    seen = {state.left, state.right, f"the {state.event}", state.event, state.place}
    if side:
        person, town = other.split(" in ")
        pair = (name, person) if side == "left" else (person, name)
        return (*pair, town) == (state.left, state.right, state.place)
    parts = re.split(" at | in | and | with ", caption.removeprefix("a photo of "))
    return all((part[3:] not in seen) if part.startswith("no ") else part in seen for part in parts)


def has_trim(garment: Garment, trim: str) -> bool:
    """Whether a garment has "white dots", "long sleeves", "a v-neck", "a belt", or has them not: "no white dots"."""
    has = {garment.pattern, garment.sleeves, garment.collar, "belt" if garment.belt else ""}
    return trim[3:] not in has if trim.startswith("no ") else trim.removeprefix("a ") in has


def _draw_scene(rng: random.Random) -> tuple[Scene, list[tuple[str, str]]]:
    scene = rng.choice(list(tests(Scene)))
    return scene, rng.sample(scene.objects, 3)


def _draw_garment(rng: random.Random) -> tuple[Garment, list[str]]:
    """A garment and what it has, in any order."""
    garment = rng.choice(list(tests(Garment)))
    slots = garment.slots
    trims = [trim for trim in (slots["look"], slots["sleeves"], f"a {garment.collar}", slots["belt"]) if trim[:3] != "no "]
    return garment, rng.sample(trims, len(trims))


def _draw_photo(rng: random.Random) -> tuple[Photo, list[str]]:
    photo = rng.choice(list(tests(Photo)))
    return photo, rng.sample((photo.left, photo.right), 2)


def _unlike(rng: random.Random, words: Sequence[str], *taken: str) -> str:
    return rng.choice([word for word in words if word not in taken])


def _draw_true(draw: Callable[[str, random.Random], Draft], kind: str, rng: random.Random) -> Draft:
    """A draft whose caption is true and whose other caption is false; a draft that is not is drawn again."""
    while True:
        state, caption, negative = draw(kind, rng)
        if is_true(caption, state) and not is_true(negative, state):
            return state, caption, negative


# --- CC-Neg -----------------------------------------------------------------------------------------------------------


def _negate(kind: str, rng: random.Random) -> Draft:
    """A part of a caption is denied."""
    state: State
    if kind == "scene":
        state, items = _draw_scene(rng)
        parts, frame = [name_item(item) for item in items[:2]], rng.choice(_FRAMES)
        index = rng.randrange(2)
    elif kind == "garment":
        state, trims = _draw_garment(rng)
        parts = trims[:2]
        index = rng.randrange(len(parts))
        head = f"a {state.kind}" if rng.random() < 0.5 else f"a {state.colour} {state.kind}"
        frame = f"{head} with {' and '.join('{}' for _ in parts)}"
    else:
        state, (person, other) = _draw_photo(rng)
        town = state.place
        frames = {f"{person} and {{}} in {town}": other, f"a photo of {town} with {{}}": person}
        frames[f"{person} at {{}} in {town}"] = f"the {state.event}"
        frame, part = rng.choice(list(frames.items()))
        parts, index = [part], 0
    denied = list(parts)  # "a red cube" becomes "no red cube", "white dots" "no white dots"
    denied[index] = f"no {parts[index].removeprefix('a ').removeprefix('the ')}"
    return state, frame.format(*parts), frame.format(*denied)


def make_ccneg(count: int, rng: random.Random) -> StatePart:
    """Captions and their negations; scenes, garments and photos by turns. No caption has a comma: readers remove them."""
    part = StatePart(count, 2 * count)
    paths, annotations = [], []
    for number in range(count):
        state, caption, negative = _draw_true(_negate, ("scene", "garment", "photo")[number % 3], rng)
        part.shown[f"ccneg/cc3m/{number:09}.jpg"] = state
        paths.append(f"{PREFIX}{number:09}.jpg")
        annotations.append({"json": {"caption": caption}, "sop_data": {"negative-prompt": negative}})
    part.files["ccneg/ccneg_preprocessed.pt"] = {"image_paths": paths, "annotations": annotations}
    return part


def check_ccneg(part: StatePart) -> None:
    for name, notes in zip(part.shown, part.files["ccneg/ccneg_preprocessed.pt"]["annotations"], strict=True):
        caption, negative = notes["json"]["caption"], notes["sop_data"]["negative-prompt"]
        demand("," not in caption + negative, name, "a caption has a comma, which readers remove from one side only")
        once = f" {negative}".count(" no ") == 1 and " no " not in f" {caption}"
        demand(once, name, f"{negative!r} does not negate once")
        _check_pair(part, name, caption, negative)


def _check_pair(part: StatePart, name: str, caption: str, negative: str) -> None:
    demand(is_true(caption, part.shown[name]), name, f"{caption!r} is false")
    demand(not is_true(negative, part.shown[name]), name, f"{negative!r} is true")


# --- SugarCrepe -------------------------------------------------------------------------------------------------------

KINDS: Final = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
"""The seven files; two worlds by turns in each."""


def _edit_scene(kind: str, rng: random.Random) -> Draft:
    scene, ((colour, shape), other, _) = _draw_scene(rng)
    first, second = f"a {colour} {shape}", name_item(other)
    if kind == "add_obj":
        added = name_item((rng.choice(COLOUR_NAMES), rng.choice(SHAPES)))
        return scene, f"{first} and {second}", f"{first} and {second} and {added}"
    if kind == "replace_rel":
        side, wrong = rng.sample(SIDES, 2)
        return scene, f"{first} {side} of {second}", f"{first} {wrong} of {second}"
    if kind == "swap_obj":
        side = rng.choice(SIDES)
        return scene, f"{first} {side} of {second}", f"{second} {side} of {first}"
    frame = rng.choice(_FRAMES)
    if kind == "add_att":
        return scene, frame.format(f"a {shape}", second), frame.format(f"a {rng.choice(COLOUR_NAMES)} {shape}", second)
    if kind == "replace_att":
        return scene, frame.format(first, second), frame.format(f"a {_unlike(rng, COLOUR_NAMES, colour)} {shape}", second)
    if kind == "replace_obj":
        return scene, frame.format(first, second), frame.format(f"a {colour} {_unlike(rng, SHAPES, shape)}", second)
    return scene, frame.format(first, second), frame.format(f"a {other[0]} {shape}", f"a {colour} {other[1]}")


def _edit_garment(kind: str, rng: random.Random) -> Draft:
    if kind == "swap_att":
        garment = rng.choice([garment for garment in tests(Garment) if garment.figure is not None])
        second, figure = garment.pattern.split()
        caption = f"a {garment.colour} {garment.kind} with {second} {figure}"
        return garment, caption, f"a {second} {garment.kind} with {garment.colour} {figure}"
    garment, trims = _draw_garment(rng)
    new = _unlike(rng, COLOUR_NAMES, garment.colour, *garment.slots["look"].split())
    old = "a" if kind == "add_att" else f"a {garment.colour}"
    return garment, f"{old} {garment.kind} with {trims[0]}", f"a {new} {garment.kind} with {trims[0]}"


def _edit_photo(kind: str, rng: random.Random) -> Draft:
    photo, (person, other) = _draw_photo(rng)
    side, wrong = SIDES if person == photo.left else SIDES[::-1]
    if kind == "add_obj":
        added = _unlike(rng, tuple(PERSONS), person, other)
        return photo, f"{person} at the {photo.event}", f"{person} and {added} at the {photo.event}"
    if kind == "replace_rel":
        return photo, f"{person} {side} of {other} in {photo.place}", f"{person} {wrong} of {other} in {photo.place}"
    if kind == "swap_obj":
        return photo, f"{person} {side} of {other} in {photo.place}", f"{other} {side} of {person} in {photo.place}"
    with_whom, event = other, photo.event
    if rng.random() < 0.5:
        with_whom = _unlike(rng, tuple(PERSONS), person, other)
    else:
        event = _unlike(rng, EVENTS, event)
    return photo, f"{person} and {other} at the {photo.event}", f"{person} and {with_whom} at the {event}"


def is_small_edit(kind: str, caption: str, negative: str) -> bool:
    """Whether the false caption differs as its file says: words added, one part replaced, or the same words reordered."""
    old, new = caption.split(), negative.split()
    if kind.startswith("swap"):
        return old != new and sorted(old) == sorted(new)
    if kind.startswith("add"):
        rest = iter(new)
        return all(word in rest for word in old) and 0 < len(new) - len(old) <= 4
    same = [[a == b for a, b in zip(old[::way], new[::way], strict=False)] for way in (1, -1)]
    return max(len(old), len(new)) - sum([*each, False].index(False) for each in same) in (1, 2)


def make_sugarcrepe(count: int, rng: random.Random) -> StatePart:
    """Seven files of `count` images with a true caption and a false one that is a small edit away."""
    part = StatePart(7 * count, 14 * count)
    ids: dict[State, int] = {}
    for kind in KINDS:
        entries = part.files[f"sugar-crepe/data/{kind}.json"] = {}
        for number in range(count):
            draw = _edit_scene if number % 2 == 0 else _edit_garment if kind.endswith("att") else _edit_photo
            state, caption, negative = _draw_true(draw, kind, rng)
            name = f"{ids.setdefault(state, 139 + 13 * len(ids)):012}.jpg"
            part.shown[f"sugar-crepe/val2017/{name}"] = state
            entries[str(number)] = {"filename": name, "caption": caption, "negative_caption": negative}
    return part


def check_sugarcrepe(part: StatePart) -> None:
    for kind in KINDS:
        for entry in part.files[f"sugar-crepe/data/{kind}.json"].values():
            name, caption, negative = (entry[key] for key in ("filename", "caption", "negative_caption"))
            _check_pair(part, f"sugar-crepe/val2017/{name}", caption, negative)
            demand(is_small_edit(kind, caption, negative), name, f"{negative!r} is no small edit of {caption!r}")
