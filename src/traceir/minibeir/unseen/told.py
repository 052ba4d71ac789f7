"""Images told in words: long captions (ShareGPT4V, Urban-1K), five to an image (Flickr30K), questions and answers (VisDial).

MiniBEIR's captions are one sentence of a few fixed phrasings. Here a scene or a photo is told at length, partly by what holds
between its parts and by what is missing, in five phrasings that training does not have, or by ten questions and answers.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.rows import WORDS
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.sprites import EVENTS, PERSONS, PLACES, TIMES, Photo
from traceir.minibeir.unseen.states import SIDES, State, StatePart, at, demand, draw_clusters, is_beside, name_item

FIVE: Final = 5
"""Captions of an image in Flickr30K."""
ROUNDS: Final = 10
_MORE: Final = 3  # sentences of a long caption beyond those that fix the image
_COMPARED: Final = (("left", "right"), ("middle", "left"), ("right", "middle"))
_TRAITS: Final = ("colour", "shape")


# --- long captions ----------------------------------------------------------------------------------------------------
# `ways` tell the parts of an image, each in one of some ways; `more` are groups of further sentences that are true of it.

Sentences = list[list[str]]


def _tell_scene(scene: Scene) -> tuple[list[Sentences], Sentences]:
    ways = []
    for place, (colour, shape) in zip(SLOTS, scene.objects, strict=True):
        beside = f"in the middle is a {colour} {shape}" if place == "middle" else f"a {colour} {shape} is on the {place}"
        apart = [f"the colour of the {place} object is {colour}", f"the shape of the {place} object is a {shape}"]
        ways.append([[f"the {place} one is a {colour} {shape}"], [beside], apart])
    left, middle, right = map(name_item, scene.objects)
    pairs = ((left, middle), (middle, right), (left, right))
    counts = {colour: sum(item[0] == colour for item in scene.objects) for colour in COLOUR_NAMES}
    same = [(a, trait, b) for a, b in _COMPARED for trait in _TRAITS if _is_same(scene, a, trait, b)]
    return ways, [
        [f"{middle} is between {left} and {right}"],
        [told for a, b in pairs for told in (f"{a} is left of {b}", f"{b} is right of {a}")],
        [f"the {a} one has the same {trait} as the {b} one" for a, trait, b in same],
        [f"two objects have the colour {colour}" for colour in COLOUR_NAMES if counts[colour] == 2],
        [f"no object is {colour}" for colour in COLOUR_NAMES if not counts[colour]],
        [f"no object is a {shape}" for shape in SHAPES if shape not in scene.attributes],
    ]


def _tell_photo(photo: Photo) -> tuple[list[Sentences], Sentences]:
    left, right = photo.left, photo.right
    ways = [[[way.format_map(photo.slots)] for way in some] for some in WORDS["long captions of photos"]]
    return ways, [
        [f"{person} wore {PERSONS[person][0]}" for person in (left, right)],
        [f"the {PLACES[photo.place]} of {photo.place} is behind them"],
        [f"{left} is left of {right}", f"{right} is right of {left}"],
        [f"{person} is not in this photo" for person in PERSONS if person not in (left, right)],
        [f"this is no {event}" for event in EVENTS if event != photo.event],
        [f"this is not {town}" for town in PLACES if town != photo.place],
    ]


def _tell(state: State) -> tuple[list[Sentences], Sentences]:
    return _tell_photo(state) if isinstance(state, Photo) else _tell_scene(state) if isinstance(state, Scene) else ([], [])


def describe(state: Scene | Photo, rng: random.Random) -> str:
    """All parts in any order, each in any way, then some sentences that follow from them, no two of one group."""
    ways, more = _tell(state)
    if isinstance(state, Scene):
        ways, sentences = rng.sample(ways, 3), ["this is a picture of three objects on a table"]
    else:
        rng.shuffle(ways)
        sentences = []
    for some in ways:
        sentences += rng.choice(some)
    more = [group for group in more if group]
    return ". ".join([*sentences, *(rng.choice(group) for group in rng.sample(more, min(_MORE, len(more))))]) + "."


@cache
def _facts(state: State) -> frozenset[str]:
    ways, more = _tell(state)
    fixed = {sentence for way in ways for some in way for sentence in some}
    return frozenset(fixed.union(*more, ["this is a picture of three objects on a table"]))


def is_true(caption: str, state: State) -> bool:
    """Whether all sentences of a long caption are true of an image."""
    return set(caption.strip().removesuffix(".").split(". ")) <= _facts(state)


def make_sharegpt4v(count: int, rng: random.Random) -> StatePart:
    """Long captions and scenes, one to one."""
    part = StatePart(count, count)
    pairs = part.files["sharegpt4v/datas_for_validation.json"] = []
    for place, scene in enumerate(draw_clusters(Scene, count, rng)):
        part.shown[f"sharegpt4v/val_data/scene_{place:06}.jpg"] = scene
        pairs.append({"image_name": f"scene_{place:06}.jpg", "caption": describe(scene, rng)})
    return part


def make_urban(count: int, rng: random.Random) -> StatePart:
    """Long captions and press photos, one to one; numbered from 1, and only the first line of a caption file counts."""
    part = StatePart(count, count)
    for number, photo in enumerate(draw_clusters(Photo, count, rng), start=1):
        part.shown[f"Urban1k/image/{number}.jpg"] = photo
        part.files[f"Urban1k/caption/{number}.txt"] = describe(photo, rng) + "\n"
    return part


def check_long(part: StatePart) -> None:
    """Every caption is true of its own image and of no other."""
    pairs = part.files.get("sharegpt4v/datas_for_validation.json")
    captions = [each["caption"] for each in pairs] if pairs else part.files.values()
    for name, caption in zip(part.shown, captions, strict=True):
        right = [other for other, state in part.shown.items() if is_true(caption, state)]
        demand(right == [name], name, f"{caption!r} is true of {right}")


# --- five captions ----------------------------------------------------------------------------------------------------


def list_five(state: State) -> list[str]:
    return [template.format_map(state.slots) for template in WORDS["five captions"][type(state).__name__]]


def make_flickr(count: int, rng: random.Random) -> StatePart:
    """Five captions to an image; scenes, garments and photos by turns."""
    part = StatePart(FIVE * count, count)
    kinds: tuple[type[State], ...] = (Scene, Garment, Photo)
    worlds = [iter(draw_clusters(kind, len(range(place, count, 3)), rng)) for place, kind in enumerate(kinds)]
    captions = part.files["flickr/flickr_text.json"] = []
    for place in range(count):
        state = part.shown[f"flickr/images/{place}.png"] = next(worlds[place % 3])
        captions += rng.sample(list_five(state), FIVE)
    return part


def check_flickr(part: StatePart) -> None:
    """Every caption is true of its own image and of no other."""
    captions = part.files["flickr/flickr_text.json"]
    names, fives = list(part.shown), {name: set(list_five(state)) for name, state in part.shown.items()}
    for number, text in enumerate(captions):
        right = [name for name, five in fives.items() if text in five]
        demand(right == [names[number // FIVE]], f"flickr: caption {number}", f"{text!r} is true of {right}")
    demand(len(set(captions)) == len(captions), "flickr", "a caption stands twice")


# --- dialogs ----------------------------------------------------------------------------------------------------------


def _is_same(scene: Scene, one: str, trait: str, other: str) -> bool:
    return at(scene, one)[trait == "shape"] == at(scene, other)[trait == "shape"]


@cache
def _answers(state: State) -> Mapping[str, str | bool]:
    """All questions to an image and their answers."""
    if isinstance(state, Photo):
        people = {state.left: state.right, state.right: state.left}
        told: dict[str, str | bool] = {"where is this": state.place, "what time is it": state.time}
        told |= {"who is on the left": state.left, "who is on the right": state.right}
        told["what is between these two"] = f"the {state.event}"
        for person, look in PERSONS.items():
            told[f"who is with {person}"] = people.get(person, "no one")
            told[f"is {person} in the photo"] = person in people
            told[f"what colour does {person} wear"] = look[0]
        told |= {f"is this {town}": town == state.place for town in PLACES}
        told |= {f"is it {hour}": hour == state.time for hour in TIMES}
        return told | {f"do they go to a {event}": event == state.event for event in EVENTS}
    told = {}
    if isinstance(state, Scene):
        for place in SLOTS:
            colour, shape = at(state, place)
            told[f"what is the {place} one"] = f"a {colour} {shape}"
            told |= {f"what colour is the {place} one": colour, f"what shape is the {place} one": shape}
        for (one, other), trait in itertools.product(itertools.permutations(SLOTS, 2), _TRAITS):
            told[f"is the {trait} of the {one} one that of the {other} one"] = _is_same(state, one, trait, other)
        for colour in COLOUR_NAMES:
            count = sum(item[0] == colour for item in state.objects)
            told[f"is any object {colour}"] = count > 0
            told[f"how many objects have the colour {colour}"] = ("no one", "one", "two", "three")[count]
        told |= {f"is any object a {shape}": shape in state.attributes for shape in SHAPES}
        for one, side, other in itertools.product(SHAPES, SIDES, SHAPES):
            told[f"is a {one} {side} of a {other}"] = is_beside(state, f"a {one}", side, f"a {other}")
    return told


def hold_dialog(questions: Sequence[str], state: State) -> list[str]:
    """What an image answers to the questions, asked in this order; "it" is the object spoken of just before."""
    answers = _answers(state)
    told = []
    for before, question in itertools.pairwise(["", *questions]):
        spoken = re.search(r"the (\w+) one", before)
        whole = question.replace("shape is it", f"shape is the {spoken[1]} one") if spoken else question
        answer = answers[whole]
        told.append(answer if isinstance(answer, str) else "yes" if answer else "no")
    return told


def _ask_scene(scene: Scene, rng: random.Random) -> tuple[list[list[str]], list[str]]:
    """Questions that fix all three objects, some by comparison, among others that anything may be answered to."""
    blocks: list[list[str]] = []
    asked: list[str] = []
    for place in rng.sample(SLOTS, 3):
        same = [other for other in asked if at(scene, other)[0] == at(scene, place)[0]]
        colour = f"is the colour of the {place} one that of the {same[0]} one" if same else f"what colour is the {place} one"
        blocks.append([f"what is the {place} one"] if rng.random() < 0.3 else [colour, "what shape is it"])
        asked.append(place)
    others = [f"is any object {name}" for name in (*COLOUR_NAMES, *(f"a {shape}" for shape in SHAPES))]
    others += [f"how many objects have the colour {colour}" for colour in COLOUR_NAMES]
    others += [f"is the {trait} of the {a} one that of the {b} one" for a, b in _COMPARED for trait in _TRAITS]
    first, middle, last = (f"a {shape}" for _, shape in scene.objects)
    pairs = ((first, middle), (middle, last), (first, last))
    return blocks, others + [f"is {one} {side} of {other}" for one, other in pairs for side in SIDES]


def _ask_photo(photo: Photo, rng: random.Random) -> tuple[list[list[str]], list[str]]:
    """Questions that fix all five parts, among others."""
    first, second = rng.sample(SIDES, 2)
    whom = rng.choice((f"who is on the {second}", f"who is with {photo.left if first == 'left' else photo.right}"))
    blocks = [[f"who is on the {first}", whom], ["where is this"], ["what time is it"], ["what is between these two"]]
    others = [f"is {person} in the photo" for person in rng.sample(list(PERSONS), 3)]
    others += [f"is this {town}" for town in rng.sample(list(PLACES), 2)] + [f"is it {hour}" for hour in TIMES]
    others += [f"do they go to a {event}" for event in rng.sample(EVENTS, 2)]
    return blocks, others + [f"what colour does {person} wear" for person in (photo.left, photo.right)]


def make_visdial(count: int, rng: random.Random) -> StatePart:
    """A dialog for each image, whose answers are those of no other image; scenes and photos by turns."""
    scenes, photos = draw_clusters(Scene, count - count // 2, rng), draw_clusters(Photo, count // 2, rng)
    part = StatePart(count, count)
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs = []
    for place in range(count):
        number, which = 300 + 11 * place, place // 2
        state: State = photos[which] if place % 2 else scenes[which]
        blocks, others = _ask_photo(photos[which], rng) if place % 2 else _ask_scene(scenes[which], rng)
        mixed = [[question] for question in rng.sample(others, ROUNDS - sum(map(len, blocks)))]
        # Blocks keep their order, and nothing comes between the questions of a block.
        for at_place, block in zip(sorted(rng.sample(range(len(blocks) + len(mixed)), len(blocks))), blocks, strict=True):
            mixed.insert(at_place, block)
        name = f"visdial/VisualDialog_val2018/VisualDialog_val2018_{number:012}.jpg"
        asked, part.shown[name] = list(itertools.chain.from_iterable(mixed)), state
        rounds = [
            {"question": questions.setdefault(question, len(questions)), "answer": answers.setdefault(answer, len(answers))}
            for question, answer in zip(asked, hold_dialog(asked, state), strict=True)
        ]
        dialogs.append({"image_id": number, "dialog": rounds})
    data = {"questions": list(questions), "answers": list(answers), "dialogs": dialogs}
    part.files["visdial/visdial_1.0_val.json"] = {"version": "1.0", "split": "val", "data": data}
    return part


def check_visdial(part: StatePart) -> None:
    """The answers of a dialog are those of its own image and of no other."""
    data = part.files["visdial/visdial_1.0_val.json"]["data"]
    for dialog, (name, own) in zip(data["dialogs"], part.shown.items(), strict=True):
        questions, answers = ([data[f"{kind}s"][each[kind]] for each in dialog["dialog"]] for kind in ("question", "answer"))
        repeated = len(set(questions)) + questions.count("what shape is it") < ROUNDS
        alike = {other: state for other, state in part.shown.items() if type(state) is type(own)}
        right = [other for other, state in alike.items() if hold_dialog(questions, state) == answers]
        demand(right == [name] and not repeated, name, f"{right} give the answers of its dialog")
