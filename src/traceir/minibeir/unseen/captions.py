"""Images in words: long captions (ShareGPT4V, Urban-1K), five to an image (Flickr30K), questions and answers (VisDial).

MiniBEIR's captions are one sentence of a few fixed phrasings. Here a scene or a photo is described at length, partly by what
holds between its parts and by what is missing, in five phrasings that training does not have, or by ten questions and answers.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.rows import WORDS
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.sprites import EVENTS, PERSONS, PLACES, TIMES, Photo
from traceir.minibeir.unseen.states import (
    SIDES,
    State,
    StatePart,
    at,
    demand,
    draw_by_turns,
    draw_clusters,
    is_beside,
    name_item,
    shuffle,
)

FIVE: Final = 5
"""Captions of an image in Flickr30K."""
ROUNDS: Final = 10
_MORE: Final = 3  # sentences of a long caption beyond those that fix the image
_ON_TABLE: Final = "this is a picture of three objects on a table"
_COMPARED: Final = (("left", "right"), ("middle", "left"), ("right", "middle"))
_TRAITS: Final = ("colour", "shape")


# --- long captions ----------------------------------------------------------------------------------------------------

Sentences = list[list[str]]


def _list_sentences(state: Any) -> tuple[list[Sentences], Sentences]:
    """Each part of a scene or a photo in one of some ways, and groups of further sentences that are true of the image."""
    if isinstance(state, Photo):
        left, right = state.left, state.right
        ways = [[[way.format_map(state.slots)] for way in part] for part in WORDS["long captions of photos"]]
        return ways, [
            [f"{person} wore {PERSONS[person][0]}" for person in (left, right)],
            [f"the {PLACES[state.place]} of {state.place} is behind them"],
            [f"{left} is left of {right}", f"{right} is right of {left}"],
            [f"{person} is not in this photo" for person in PERSONS if person not in (left, right)],
            [f"this is no {event}" for event in EVENTS if event != state.event],
            [f"this is not {town}" for town in PLACES if town != state.place],
        ]
    ways = []
    for slot, (colour, shape) in zip(SLOTS, state.objects, strict=True):
        beside = f"in the middle is a {colour} {shape}" if slot == "middle" else f"a {colour} {shape} is on the {slot}"
        apart = [f"the colour of the {slot} object is {colour}", f"the shape of the {slot} object is a {shape}"]
        ways.append([[f"the {slot} one is a {colour} {shape}"], [beside], apart])
    left, middle, right = map(name_item, state.objects)
    counts = Counter(colour for colour, _ in state.objects)
    same = [(a, trait, b) for a, b in _COMPARED for trait in _TRAITS if _is_same(state, a, trait, b)]
    return ways, [
        [f"{middle} is between {left} and {right}"],
        [
            sentence
            for a, b in ((left, middle), (middle, right), (left, right))
            for sentence in (f"{a} is left of {b}", f"{b} is right of {a}")
        ],
        [f"the {a} one has the same {trait} as the {b} one" for a, trait, b in same],
        [f"two objects have the colour {colour}" for colour in COLOUR_NAMES if counts[colour] == 2],
        [f"no object is {colour}" for colour in COLOUR_NAMES if not counts[colour]],
        [f"no object is a {shape}" for shape in SHAPES if shape not in state.attributes],
    ]


def describe(state: Scene | Photo, rng: random.Random) -> str:
    """All parts in any order, each in any way, then some sentences that follow from them, no two of one group."""
    ways, groups = _list_sentences(state)
    ways = rng.sample(ways, 3) if isinstance(state, Scene) else shuffle(ways, rng)
    sentences = [_ON_TABLE] if isinstance(state, Scene) else []
    for way in ways:
        sentences += rng.choice(way)
    more = [group for group in groups if group]
    return ". ".join([*sentences, *(rng.choice(group) for group in rng.sample(more, min(_MORE, len(more))))]) + "."


@cache
def _list_facts(state: State) -> frozenset[str]:
    ways, groups = _list_sentences(state)
    return frozenset([_ON_TABLE]).union(*itertools.chain.from_iterable(ways), *groups)


def make_sharegpt4v(count: int, rng: random.Random) -> StatePart:
    """Long captions and scenes, one to one."""
    part = StatePart(count, count)
    pairs = part.files["sharegpt4v/datas_for_validation.json"] = []
    for number, scene in enumerate(draw_clusters(Scene, count, rng)):
        part.shown[f"sharegpt4v/val_data/scene_{number:06}.jpg"] = scene
        pairs.append({"image_name": f"scene_{number:06}.jpg", "caption": describe(scene, rng)})
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
        sentences = set(caption.strip().removesuffix(".").split(". "))
        right = [other for other, state in part.shown.items() if sentences <= _list_facts(state)]
        demand(right == [name], name, f"{caption!r} is true of {right}")


# --- five captions ----------------------------------------------------------------------------------------------------


def list_five(state: Any) -> list[str]:
    return [template.format_map(state.slots) for template in WORDS["five captions"][type(state).__name__]]


def make_flickr(count: int, rng: random.Random) -> StatePart:
    """Five captions to an image; scenes, garments and photos by turns."""
    states = draw_by_turns((Scene, Garment, Photo), count, rng)
    captions = list(itertools.chain.from_iterable(rng.sample(list_five(state), FIVE) for state in states))
    shown = {f"flickr/images/{number}.png": state for number, state in enumerate(states)}
    return StatePart(FIVE * count, count, {"flickr/flickr_text.json": captions}, shown)


def check_flickr(part: StatePart) -> None:
    """Every caption is true of its own image and of no other."""
    captions = part.files["flickr/flickr_text.json"]
    names, fives = list(part.shown), {name: set(list_five(state)) for name, state in part.shown.items()}
    for number, text in enumerate(captions):
        right = [name for name, five in fives.items() if text in five]
        demand(right == [names[number // FIVE]], f"flickr: caption {number}", f"{text!r} is true of {right}")
    demand(len(set(captions)) == len(captions), "flickr", "a caption stands twice")


# --- dialogs ----------------------------------------------------------------------------------------------------------


def _is_same(scene: Scene, slot: str, trait: str, other: str) -> bool:
    return at(scene, slot)[trait == "shape"] == at(scene, other)[trait == "shape"]


@cache
def _list_answers(state: Any) -> Mapping[str, str | bool]:
    """All questions to a scene or a photo and their answers."""
    answers: dict[str, str | bool] = {}
    if isinstance(state, Photo):
        people = {state.left: state.right, state.right: state.left}
        answers |= {"where is this": state.place, "what time is it": state.time}
        answers |= {"who is on the left": state.left, "who is on the right": state.right}
        answers["what is between these two"] = f"the {state.event}"
        for person, look in PERSONS.items():
            answers[f"who is with {person}"] = people.get(person, "no one")
            answers[f"is {person} in the photo"] = person in people
            answers[f"what colour does {person} wear"] = look[0]
        answers |= {f"is this {town}": town == state.place for town in PLACES}
        answers |= {f"is it {hour}": hour == state.time for hour in TIMES}
        return answers | {f"do they go to a {event}": event == state.event for event in EVENTS}
    for slot, (colour, shape) in zip(SLOTS, state.objects, strict=True):
        answers[f"what is the {slot} one"] = f"a {colour} {shape}"
        answers |= {f"what colour is the {slot} one": colour, f"what shape is the {slot} one": shape}
    for (a, b), trait in itertools.product(itertools.permutations(SLOTS, 2), _TRAITS):
        answers[f"is the {trait} of the {a} one that of the {b} one"] = _is_same(state, a, trait, b)
    counts = Counter(colour for colour, _ in state.objects)
    answers |= {f"is any object {colour}": counts[colour] > 0 for colour in COLOUR_NAMES}
    numbers = ("no one", "one", "two", "three")
    answers |= {f"how many objects have the colour {colour}": numbers[counts[colour]] for colour in COLOUR_NAMES}
    answers |= {f"is any object a {shape}": shape in state.attributes for shape in SHAPES}
    beside = itertools.product([f"a {shape}" for shape in SHAPES], SIDES, [f"a {shape}" for shape in SHAPES])
    return answers | {f"is {a} {side} of {b}": is_beside(state, a, side, b) for a, side, b in beside}


def hold_dialog(questions: Sequence[str], state: State) -> list[str]:
    """What an image answers to the questions, asked in this order; "it" is the object spoken of just before."""
    answers = _list_answers(state)
    dialog = []
    for before, question in itertools.pairwise(["", *questions]):
        spoken = re.search(r"the (\w+) one", before)
        whole = question.replace("shape is it", f"shape is the {spoken[1]} one") if spoken else question
        answer = answers[whole]
        dialog.append(answer if isinstance(answer, str) else "yes" if answer else "no")
    return dialog


def _ask_scene(scene: Scene, rng: random.Random) -> tuple[list[list[str]], list[str]]:
    """Questions that fix all three objects, some by comparison, among others that anything may be answered to."""
    blocks: list[list[str]] = []
    slots = rng.sample(SLOTS, 3)
    for number, slot in enumerate(slots):
        same = [other for other in slots[:number] if _is_same(scene, other, "colour", slot)]
        colour = f"is the colour of the {slot} one that of the {same[0]} one" if same else f"what colour is the {slot} one"
        blocks.append([f"what is the {slot} one"] if rng.random() < 0.3 else [colour, "what shape is it"])
    others = [f"is any object {name}" for name in (*COLOUR_NAMES, *(f"a {shape}" for shape in SHAPES))]
    others += [f"how many objects have the colour {colour}" for colour in COLOUR_NAMES]
    others += [f"is the {trait} of the {a} one that of the {b} one" for a, b in _COMPARED for trait in _TRAITS]
    first, middle, last = (f"a {shape}" for _, shape in scene.objects)
    pairs = ((first, middle), (middle, last), (first, last))
    return blocks, others + [f"is {a} {side} of {b}" for a, b in pairs for side in SIDES]


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
    part = StatePart(count, count)
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    dialogs = []
    for number, state in zip(itertools.count(300, 11), draw_by_turns((Scene, Photo), count, rng), strict=False):
        blocks, others = _ask_photo(state, rng) if isinstance(state, Photo) else _ask_scene(state, rng)
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
        alike = [other for other, state in part.shown.items() if type(state) is type(own)]
        right = [other for other in alike if hold_dialog(questions, part.shown[other]) == answers]
        demand(right == [name] and not repeated, name, f"{right} give the answers of its dialog")
