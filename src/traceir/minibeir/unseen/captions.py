"""Pictures and captions of unseen kinds: long ones (ShareGPT4V, Urban-1K) and five to a picture (Flickr30K).

MiniBEIR's captions are one sentence of a few fixed phrasings. Here a scene or a photo is told at length, partly by what
holds between its parts and by what is missing, or in five phrasings that training does not have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.news import TIME_WORDS
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.unseen.language import Phrase, S, Slots
from traceir.minibeir.unseen.states import (
    Part,
    State,
    at,
    depict,
    draw_clusters,
    fits,
    is_beside,
    list_garments,
    list_photos,
    list_scenes,
    name_item,
    near_garments,
    near_photos,
    near_scenes,
    tell_belt,
    tell_look,
    tell_sleeves,
)

FIVE = 5
"""Captions of a picture in Flickr30K."""
_MORE = 3  # sentences of a long caption beyond those that fix the picture

# --- long captions ----------------------------------------------------------------------------------------------------


def _trait(scene: Scene, w: Slots, place: str) -> str:
    return at(scene, w[place])[w["trait"] == "shape"]


LONG_SCENE: Mapping[str, Phrase[Scene, bool]] = {
    "table": Phrase("this is a picture of three objects on a table", lambda s, w: True),
    "one": Phrase("the {place} one is {thing}", lambda s, w: fits(at(s[-1], w["place"]), w["thing"])),
    "side": Phrase("{thing} is on the {side}", lambda s, w: fits(at(s[-1], w["side"]), w["thing"])),
    "middle": Phrase("in the middle is {thing}", lambda s, w: fits(at(s[-1], "middle"), w["thing"])),
    "colour": Phrase("the colour of the {place} object is {colour}", lambda s, w: at(s[-1], w["place"])[0] == w["colour"]),
    "shape": Phrase("the shape of the {place} object is {thing}", lambda s, w: fits(at(s[-1], w["place"]), w["thing"])),
    "between": Phrase(
        "{thing} is between {thing2} and {thing3}",
        lambda s, w: all(map(fits, s[-1].objects, (w["thing2"], w["thing"], w["thing3"]))),
    ),
    "beside": Phrase("{thing} is {side} of {thing2}", lambda s, w: is_beside(s[-1], w["thing"], w["side"], w["thing2"])),
    "same": Phrase(
        "the {place} one has the same {trait} as the {place2} one",
        lambda s, w: _trait(s[-1], w, "place") == _trait(s[-1], w, "place2"),
    ),
    "two": Phrase(
        "two objects have the colour {colour}", lambda s, w: sum(item[0] == w["colour"] for item in s[-1].objects) == 2
    ),
    "none": Phrase("no object is {colour}", lambda s, w: all(item[0] != w["colour"] for item in s[-1].objects)),
    "absent": Phrase("no object is {thing}", lambda s, w: not any(fits(item, w["thing"]) for item in s[-1].objects)),
}
"""Sentences of ShareGPT4V's captions."""

LONG_PHOTO: Mapping[str, Phrase[Photo, bool]] = {
    "town": Phrase("this photo was made in {town}", lambda s, w: s[-1].place == w["town"]),
    "town2": Phrase("the town in the photo is {town}", lambda s, w: s[-1].place == w["town"]),
    "hour": Phrase("it is {hour}", lambda s, w: s[-1].time == w["hour"]),
    "hour2": Phrase("the time of the photo is {hour}", lambda s, w: s[-1].time == w["hour"]),
    "event": Phrase("the two are at the {event}", lambda s, w: s[-1].event == w["event"]),
    "event2": Phrase("between these two is the {event}", lambda s, w: s[-1].event == w["event"]),
    "person": Phrase("the one on the {side} is {person}", lambda s, w: _stands(s[-1], w["side"]) == w["person"]),
    "person2": Phrase("{person} is to the {side}", lambda s, w: _stands(s[-1], w["side"]) == w["person"]),
    "wore": Phrase(
        "{person} wore {dye}",
        lambda s, w: w["person"] in (s[-1].left, s[-1].right) and PERSONS[w["person"]].clothes == w["dye"],
    ),
    "building": Phrase(
        "the {building} of {town} is behind them", lambda s, w: s[-1].place == w["town"] and PLACES[w["town"]] == w["building"]
    ),
    "beside": Phrase(
        "{person} is {side} of {person2}",
        lambda s, w: _stands(s[-1], w["side"]) == w["person"] and w["person2"] in (s[-1].left, s[-1].right),
    ),
    "absent": Phrase("{person} is not in this photo", lambda s, w: w["person"] not in (s[-1].left, s[-1].right)),
    "nothing": Phrase("this is no {event}", lambda s, w: s[-1].event != w["event"]),
    "elsewhere": Phrase("this is not {town}", lambda s, w: s[-1].place != w["town"]),
}
"""Sentences of Urban-1K's captions."""


def _stands(photo: Photo, side: str) -> str:
    return photo.left if side == "left" else photo.right


def split_caption(caption: str) -> list[str]:
    """The sentences of a long caption."""
    return caption.removesuffix(".").split(". ")


def _join(sentences: Sequence[str]) -> str:
    return ". ".join(sentences) + "."


def _describe_scene(scene: Scene, rng: random.Random) -> str:
    """All three objects in any order, each in one of three ways, then some sentences that follow from them."""
    say = LONG_SCENE
    sentences = [say["table"].say()]
    for place in rng.sample(SLOTS, 3):
        colour, shape = at(scene, place)
        thing = name_item((colour, shape))
        style = rng.randrange(3)
        if style == 0:
            sentences.append(say["one"].say(place=place, thing=thing))
        elif style == 1:
            sentences.append(say["middle"].say(thing=thing) if place == "middle" else say["side"].say(side=place, thing=thing))
        else:
            sentences.append(say["colour"].say(place=place, colour=colour))
            sentences.append(say["shape"].say(place=place, thing=f"a {shape}"))
    return _join([*sentences, *_add_true(LONG_SCENE, list(_propose_scene(scene)), scene, rng)])


def _propose_scene(scene: Scene) -> Iterator[tuple[str, dict[str, str]]]:
    """Names of phrases and their slots: what may be added, where it is true."""
    left, middle, right = (name_item(item) for item in scene.objects)
    yield "between", {"thing": middle, "thing2": left, "thing3": right}
    for one, other in ((left, middle), (middle, right), (left, right)):
        yield "beside", {"thing": one, "side": "left", "thing2": other}
        yield "beside", {"thing": other, "side": "right", "thing2": one}
    for place, place2 in (("left", "right"), ("middle", "left"), ("right", "middle")):
        yield from (("same", {"place": place, "place2": place2, "trait": trait}) for trait in ("colour", "shape"))
    yield from (("two", {"colour": colour}) for colour in COLOUR_NAMES)
    yield from (("none", {"colour": colour}) for colour in COLOUR_NAMES)
    yield from (("absent", {"thing": f"a {shape}"}) for shape in SHAPES)


def _describe_photo(photo: Photo, rng: random.Random) -> str:
    """Everything that a photo shows, in any order and in one of two ways, then what follows from it."""
    told = [
        ("town", {"town": photo.place}),
        ("hour", {"hour": photo.time}),
        ("event", {"event": photo.event}),
        ("person", {"person": photo.left, "side": "left"}),
        ("person", {"person": photo.right, "side": "right"}),
    ]
    rng.shuffle(told)
    sentences = [LONG_PHOTO[name + rng.choice(("", "2"))].say(**slots) for name, slots in told]
    return _join([*sentences, *_add_true(LONG_PHOTO, list(_propose_photo(photo)), photo, rng)])


def _propose_photo(photo: Photo) -> Iterator[tuple[str, dict[str, str]]]:
    people = (photo.left, photo.right)
    yield from (("wore", {"person": person, "dye": PERSONS[person].clothes}) for person in people)
    yield "building", {"building": PLACES[photo.place], "town": photo.place}
    yield "beside", {"person": photo.left, "side": "left", "person2": photo.right}
    yield "beside", {"person": photo.right, "side": "right", "person2": photo.left}
    yield from (("absent", {"person": person}) for person in PERSONS)
    yield from (("nothing", {"event": event}) for event in EVENTS)
    yield from (("elsewhere", {"town": town}) for town in PLACES)


def _add_true(
    bank: Mapping[str, Phrase[S, bool]], proposals: Sequence[tuple[str, dict[str, str]]], state: S, rng: random.Random
) -> list[str]:
    """Some true sentences, no two of one phrase."""
    true: dict[str, list[str]] = {}
    for name, slots in proposals:
        if bank[name].mean((state,), slots):
            true.setdefault(name, []).append(bank[name].say(**slots))
    return [rng.choice(true[name]) for name in rng.sample(list(true), min(_MORE, len(true)))]


# --- five captions ----------------------------------------------------------------------------------------------------
# The slots of a scene are numbered from left to right; `person` stands on the left, `person2` on the right.


def slots_of(state: State) -> dict[str, str]:
    """Everything that the five captions of a picture may name."""
    if isinstance(state, Scene):
        numbered = list(zip(state.objects, ("", "2", "3"), strict=True))
        slots = {f"thing{number}": name_item(item) for item, number in numbered}
        slots |= {f"colour{number}": item[0] for item, number in numbered}
        return slots | {f"shape{number}": item[1] for item, number in numbered}
    if isinstance(state, Photo):
        seen = {"person": state.left, "person2": state.right, "event": state.event, "town": state.place}
        return seen | {"hour": state.time, "time": TIME_WORDS[state.time]}
    cut = {"kind": state.kind, "length": state.length, "colour": state.colour, "collar": state.collar}
    return cut | {"look": tell_look(state), "sleeves": tell_sleeves(state), "belt": tell_belt(state)}


def _is_as_told(states: tuple[State, ...], slots: Slots) -> bool:
    return slots.items() <= slots_of(states[-1]).items()


FIVE_SCENE: Sequence[Phrase[Scene, bool]] = tuple(
    Phrase(template, _is_as_told)
    for template in (
        "{thing2} between two other objects, {thing} to its left and {thing3} to its right",
        "from right to left: {thing3}, {thing2}, {thing}",
        "the colours from left to right: {colour}, {colour2}, {colour3}; the shapes: {shape}, {shape2}, {shape3}",
        "this table has {thing2} in the middle, {thing3} on the right and {thing} on the left",
        "{thing2} is right of {thing} and left of {thing3}",
    )
)
FIVE_GARMENT: Sequence[Phrase[Garment, bool]] = tuple(
    Phrase(template, _is_as_told)
    for template in (
        "this {kind} is {length} and {colour}; it has {look}, {sleeves}, a {collar} and {belt}",
        "{belt}, a {collar} and {sleeves} on a {length} {kind}; it is {colour} with {look}",
        "{colour} is the colour of this {length} {kind}; {look}, {sleeves}, {belt}, {collar}",
        "the {kind} has {sleeves}, {belt} and a {collar}; its length is {length}, its base {colour}, its pattern {look}",
        "a {collar}, {look} and {sleeves}: a {colour} {kind} with {belt}, and it is {length}",
    )
)
FIVE_PHOTO: Sequence[Phrase[Photo, bool]] = tuple(
    Phrase(template, _is_as_told)
    for template in (
        "the {event} in {town} {time}, with {person} on the left and {person2} on the right",
        "{person2} is right of {person}; they are at the {event} in {town} {time}",
        "in this photo it is {hour} in {town}; on the left of the {event} is {person} and on the right {person2}",
        "a photo of {town} {time}: a {event}, {person} on its left, {person2} on its right",
        "to the left {person}, to the right {person2}, between these two the {event}; this is {town} {time}",
    )
)


# --- sets -------------------------------------------------------------------------------------------------------------


def make_sharegpt4v(count: int, rng: random.Random) -> Part:
    """Long captions and scenes, one to one."""
    part = Part(count, count)
    pairs = []
    for place, scene in enumerate(draw_clusters(list_scenes(), near_scenes, count, rng)):
        name = f"scene_{place:06}.jpg"
        part.images[f"sharegpt4v/val_data/{name}"] = depict(scene)
        pairs.append({"image_name": name, "caption": _describe_scene(scene, rng)})
    part.files["sharegpt4v/datas_for_validation.json"] = pairs
    return part


def make_urban(count: int, rng: random.Random) -> Part:
    """Long captions and press photos, one to one; numbered from 1, and only the first line of a caption file counts."""
    part = Part(count, count)
    for number, photo in enumerate(draw_clusters(list_photos(), near_photos, count, rng), start=1):
        part.images[f"Urban1k/image/{number}.jpg"] = depict(photo)
        part.files[f"Urban1k/caption/{number}.txt"] = _describe_photo(photo, rng) + "\n"
    return part


def make_flickr(count: int, rng: random.Random) -> Part:
    """Five captions to a picture; scenes, garments and photos by turns."""
    part = Part(FIVE * count, count)
    shares = [len(range(world, count, 3)) for world in range(3)]
    scenes = draw_clusters(list_scenes(), near_scenes, shares[0], rng)
    garments = draw_clusters(list_garments(), near_garments, shares[1], rng)
    photos = draw_clusters(list_photos(), near_photos, shares[2], rng)
    captions: list[str] = []
    for place in range(count):
        state: State = (scenes, garments, photos)[place % 3][place // 3]
        part.images[f"flickr/images/{place}.png"] = depict(state)
        five = [phrase.say(**slots_of(state)) for phrase in find_five(state)]
        captions += rng.sample(five, FIVE)
    part.files["flickr/flickr_text.json"] = captions
    return part


def find_five(state: State) -> Sequence[Phrase[Any, bool]]:
    """The five phrases that tell a picture of this world."""
    if isinstance(state, Scene):
        return FIVE_SCENE
    return FIVE_PHOTO if isinstance(state, Photo) else FIVE_GARMENT
