"""Ten questions and answers that fix a picture (VisDial). No query of MiniBEIR asks anything of the picture it looks for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES, TIMES
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.unseen.language import Phrase, S, Slots, read
from traceir.minibeir.unseen.states import (
    Part,
    at,
    depict,
    draw_clusters,
    fits,
    is_beside,
    list_photos,
    list_scenes,
    name_item,
    near_photos,
    near_scenes,
)

ROUNDS = 10


def _answer(holds: bool) -> str:
    return "yes" if holds else "no"


def _share(scene: Scene, w: Slots) -> bool:
    return bool(set(at(scene, w["place"])) & set(at(scene, w["place2"])) & set(SHAPES if w["trait"] == "shape" else COLOUR_NAMES))


def _name_other(photo: Photo, person: str) -> str:
    return {photo.left: photo.right, photo.right: photo.left}.get(person, "no one")


def _count(scene: Scene, colour: str) -> str:
    return ("no one", "one", "two", "three")[sum(item[0] == colour for item in scene.objects)]


SCENE_QUESTIONS: Sequence[Phrase[Scene, str]] = (
    Phrase("what is the {place} one", lambda s, w: name_item(at(s[-1], w["place"]))),
    Phrase("what colour is the {place} one", lambda s, w: at(s[-1], w["place"])[0]),
    Phrase("what shape is it", lambda s, w: at(s[-1], w["place"])[1]),
    Phrase("is the {trait} of the {place} one that of the {place2} one", lambda s, w: _answer(_share(s[-1], w))),
    Phrase("is any object {colour}", lambda s, w: _answer(any(item[0] == w["colour"] for item in s[-1].objects))),
    Phrase("is any object {thing}", lambda s, w: _answer(any(fits(item, w["thing"]) for item in s[-1].objects))),
    Phrase("how many objects have the colour {colour}", lambda s, w: _count(s[-1], w["colour"])),
    Phrase("is {thing} {side} of {thing2}", lambda s, w: _answer(is_beside(s[-1], w["thing"], w["side"], w["thing2"]))),
)
"""Questions and their answers; "it" is what was spoken of last, so that slots are carried from round to round."""

PHOTO_QUESTIONS: Sequence[Phrase[Photo, str]] = (
    Phrase("who is on the {side}", lambda s, w: s[-1].left if w["side"] == "left" else s[-1].right),
    Phrase("who is with {person}", lambda s, w: _name_other(s[-1], w["person"])),
    Phrase("where is this", lambda s, w: s[-1].place),
    Phrase("what time is it", lambda s, w: s[-1].time),
    Phrase("what is between these two", lambda s, w: f"the {s[-1].event}"),
    Phrase("is {person} in the photo", lambda s, w: _answer(w["person"] in (s[-1].left, s[-1].right))),
    Phrase("is this {town}", lambda s, w: _answer(s[-1].place == w["town"])),
    Phrase("is it {hour}", lambda s, w: _answer(s[-1].time == w["hour"])),
    Phrase("do they go to a {event}", lambda s, w: _answer(s[-1].event == w["event"])),
    Phrase("what colour does {person} wear", lambda s, w: PERSONS[w["person"]].clothes),
)


def hold_dialog(bank: Sequence[Phrase[S, str]], questions: Sequence[str], state: S) -> list[str]:
    """What a picture answers to the questions, asked in this order."""
    carried: dict[str, str] = {}
    answers = []
    for question in questions:
        reading = read(bank, question)
        carried |= reading.slots
        answers.append(reading.phrase.mean((state,), carried))
    return answers


def _ask_scene(scene: Scene, rng: random.Random) -> list[str]:
    """Questions that fix all three objects, some by comparison, among others that anything may be answered to."""
    blocks: list[list[str]] = []
    asked: list[str] = []
    for place in rng.sample(SLOTS, 3):
        same = [other for other in asked if at(scene, other)[0] == at(scene, place)[0]]
        colour = f"is the colour of the {place} one that of the {same[0]} one" if same else f"what colour is the {place} one"
        blocks.append([f"what is the {place} one"] if rng.random() < 0.3 else [colour, "what shape is it"])
        asked.append(place)
    fixed = sum(map(len, blocks))
    others = rng.sample(list(_list_scene_questions(scene)), ROUNDS - fixed)
    return _mix(blocks, others, rng)


def _list_scene_questions(scene: Scene) -> Iterator[str]:
    yield from (f"is any object {colour}" for colour in COLOUR_NAMES)
    yield from (f"is any object a {shape}" for shape in SHAPES)
    yield from (f"how many objects have the colour {colour}" for colour in COLOUR_NAMES)
    for place, place2 in (("left", "right"), ("middle", "left"), ("right", "middle")):
        yield from (f"is the {trait} of the {place} one that of the {place2} one" for trait in ("colour", "shape"))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        first, second = (f"a {scene.objects[place][1]}" for place in (one, other))
        yield from (f"is {first} {side} of {second}" for side in ("left", "right"))


def _ask_photo(photo: Photo, rng: random.Random) -> list[str]:
    """Questions that fix all five parts, among others."""
    people = [photo.left, photo.right]
    first, second = rng.sample(("left", "right"), 2)
    met = photo.left if first == "left" else photo.right
    whom = rng.choice((f"who is on the {second}", f"who is with {met}"))
    blocks = [[f"who is on the {first}", whom], ["where is this"], ["what time is it"], ["what is between these two"]]
    others = [f"is {person} in the photo" for person in rng.sample(list(PERSONS), 3)]
    others += [f"is this {town}" for town in rng.sample(list(PLACES), 2)] + [f"is it {hour}" for hour in TIMES]
    others += [f"do they go to a {event}" for event in rng.sample(EVENTS, 2)]
    others += [f"what colour does {person} wear" for person in people]
    return _mix(blocks, rng.sample(others, ROUNDS - 5), rng)


def _mix(blocks: list[list[str]], others: list[str], rng: random.Random) -> list[str]:
    """All questions; blocks keep their order, and nothing comes between the questions of a block."""
    places = sorted(rng.sample(range(len(blocks) + len(others)), len(blocks)))
    mixed = [[question] for question in others]
    for place, block in zip(places, blocks, strict=True):
        mixed.insert(place, block)
    return [question for group in mixed for question in group]


def make_visdial(count: int, rng: random.Random) -> Part:
    """A dialog for each picture; scenes and photos by turns."""
    scenes = draw_clusters(list_scenes(), near_scenes, count - count // 2, rng)
    photos = draw_clusters(list_photos(), near_photos, count // 2, rng)
    part = Part(count, count)
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs = []
    for place in range(count):
        if place % 2 == 0:
            scene = scenes[place // 2]
            asked, sketch = _ask_scene(scene, rng), depict(scene)
            told = hold_dialog(SCENE_QUESTIONS, asked, scene)
        else:
            photo = photos[place // 2]
            asked, sketch = _ask_photo(photo, rng), depict(photo)
            told = hold_dialog(PHOTO_QUESTIONS, asked, photo)
        rounds = [
            {"question": questions.setdefault(question, len(questions)), "answer": answers.setdefault(answer, len(answers))}
            for question, answer in zip(asked, told, strict=True)
        ]
        number = 300 + 11 * place
        part.images[f"visdial/VisualDialog_val2018/VisualDialog_val2018_{number:012}.jpg"] = sketch
        dialogs.append({"image_id": number, "dialog": rounds})
    data = {"questions": list(questions), "answers": list(answers), "dialogs": dialogs}
    part.files["visdial/visdial_1.0_val.json"] = {"version": "1.0", "split": "val", "data": data}
    return part
