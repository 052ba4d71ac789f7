"""Pictures and words by turns: stories of five pictures (VIST), and garments changed over several rounds (MT-FIQ).

A query of MiniBEIR has one picture. Here it has two to four, between the words that lead from one to the next, and may
look back: "has its old colour again".
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from traceir.minibeir.drawing import COLOUR_NAMES, SHAPES
from traceir.minibeir.garments import Garment
from traceir.minibeir.news import TIME_WORDS
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES, TIMES
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import SLOTS, Scene
from traceir.minibeir.unseen.edits import PAIRS
from traceir.minibeir.unseen.language import WORDS, Phrase, Reading, S, Slots, read
from traceir.minibeir.unseen.states import (
    Part,
    State,
    at,
    depict,
    fits,
    list_garments,
    list_photos,
    list_scenes,
    name_item,
    near_garments,
    shows,
)

IMAGES: Final = 5
"""Pictures of a story."""

# --- VIST -------------------------------------------------------------------------------------------------------------
# Meanings of changes get the pictures so far and return the next one.


def _set(scene: Scene, place: str, trait: str, item: tuple[str, str]) -> Scene:
    return scene.alter(SLOTS.index(place), item[trait == "shape"])


SCENE_CHANGES: Sequence[Phrase[Scene, Scene]] = (
    Phrase("then the {place} one becomes {colour}", lambda s, w: s[-1].alter(SLOTS.index(w["place"]), w["colour"])),
    Phrase("then the {place} one becomes a {shape}", lambda s, w: s[-1].alter(SLOTS.index(w["place"]), w["shape"])),
    Phrase("then the {pair} trade places", lambda s, w: s[-1].swap(*PAIRS[w["pair"]])),
    Phrase(
        "then the {place} one takes the {trait} of the {place2} one",
        lambda s, w: _set(s[-1], w["place"], w["trait"], at(s[-1], w["place2"])),
    ),
    Phrase(
        "then the {place} one has its old {trait} again",
        lambda s, w: _set(s[-1], w["place"], w["trait"], at(s[0], w["place"])),
    ),
)
SCENE_SIGHTS: Sequence[Phrase[Scene, bool]] = (
    Phrase("one day {thing} is on a table with {thing2} and {thing3}", lambda s, w: shows(s[-1], list(w.values()))),
    Phrase("now the {place} one is {thing}", lambda s, w: fits(at(s[-1], w["place"]), w["thing"])),
)
PHOTO_CHANGES: Sequence[Phrase[Photo, Photo]] = (
    Phrase("then it is {hour}", lambda s, w: replace(s[-1], time=w["hour"])),
    Phrase("then they go to {town}", lambda s, w: replace(s[-1], place=w["town"])),
    Phrase("then they are at a {event}", lambda s, w: replace(s[-1], event=w["event"])),
    Phrase("then {person} takes the place of {person2}", lambda s, w: _replace_person(s[-1], w["person2"], w["person"])),
    Phrase("then the two trade places", lambda s, w: replace(s[-1], left=s[-1].right, right=s[-1].left)),
)
PHOTO_SIGHTS: Sequence[Phrase[Photo, bool]] = (
    Phrase("one day {person} is with {person2} in {town}", lambda s, w: _sees(s[-1], w) and s[-1].place == w["town"]),
    Phrase("now {person} is at a {event} {time}", lambda s, w: _sees(s[-1], w) and _is_then(s[-1], w)),
)
"""Sentences of stories that tell what is seen instead of what changed."""


def _replace_person(photo: Photo, old: str, new: str) -> Photo:
    people = [new if person == old else person for person in (photo.left, photo.right)]
    return replace(photo, left=people[0], right=people[1])


def _sees(photo: Photo, w: Slots) -> bool:
    return {w["person"], w.get("person2", w["person"])} <= {photo.left, photo.right}


def _is_then(photo: Photo, w: Slots) -> bool:
    return (photo.event, TIME_WORDS[photo.time]) == (w["event"], w["time"])


def _list_scene_changes(story: Sequence[Scene]) -> Iterator[Reading[Scene, Scene]]:
    colours, shapes, swaps, copies, returns = SCENE_CHANGES
    yield from (Reading(swaps, {"pair": pair}) for pair in PAIRS)
    for place in SLOTS:
        yield from (Reading(colours, {"place": place, "colour": colour}) for colour in COLOUR_NAMES)
        yield from (Reading(shapes, {"place": place, "shape": shape}) for shape in SHAPES)
        for number, trait in enumerate(("colour", "shape")):
            others = (other for other in SLOTS if other != place)
            yield from (Reading(copies, {"place": place, "trait": trait, "place2": other}) for other in others)
            seen = list(dict.fromkeys(at(scene, place)[number] for scene in story))
            if len(seen) == 2 and at(story[-1], place)[number] == seen[1] and not _has_swap(story):
                yield Reading(returns, {"place": place, "trait": trait})


def _has_swap(story: Sequence[Scene]) -> bool:
    """Whether two objects ever changed places, so that "its old colour" could mean two things."""
    steps = itertools.pairwise(story)
    return any(sum(a != b for a, b in zip(one.objects, two.objects, strict=True)) > 1 for one, two in steps)


def _list_photo_changes(story: Sequence[Photo]) -> Iterator[Reading[Photo, Photo]]:
    hours, towns, events, people, swap = PHOTO_CHANGES
    yield Reading(swap, {})
    yield from (Reading(hours, {"hour": hour}) for hour in TIMES)
    yield from (Reading(towns, {"town": town}) for town in PLACES)
    yield from (Reading(events, {"event": event}) for event in EVENTS)
    here = (story[-1].left, story[-1].right)
    for old in here:
        yield from (Reading(people, {"person": new, "person2": old}) for new in PERSONS if new not in here)


def _tell_scene(scene: Scene, first: bool, rng: random.Random) -> str:
    things = [name_item(item) for item in rng.sample(scene.objects, 3)]
    place = rng.choice(SLOTS)
    if first:
        return SCENE_SIGHTS[0].say(thing=things[0], thing2=things[1], thing3=things[2])
    return SCENE_SIGHTS[1].say(place=place, thing=name_item(at(scene, place)))


def _tell_photo(photo: Photo, first: bool, rng: random.Random) -> str:
    person, other = rng.sample((photo.left, photo.right), 2)
    if first:
        return PHOTO_SIGHTS[0].say(person=person, person2=other, town=photo.place)
    return PHOTO_SIGHTS[1].say(person=person, event=photo.event, time=TIME_WORDS[photo.time])


def _grow_story(
    start: S,
    every: Mapping[S, None],
    list_changes: Callable[[Sequence[S]], Iterable[Reading[S, S]]],
    tell: Callable[[S, bool, random.Random], str],
    rng: random.Random,
) -> tuple[list[S], list[str]] | None:
    """Five pictures and their sentences; the last sentence tells a change, three in ten of the others what is seen.

    `every` holds what may still be used. None where the story cannot go on.
    """
    story, texts = [start], [tell(start, True, rng)]
    while len(story) < IMAGES:
        options: dict[str, list[tuple[str, S]]] = {}
        for change in list_changes(story):
            state = change.mean(*story)
            if state in every and state not in story:
                options.setdefault(change.phrase.template, []).append((change.say(), state))
        if not options:
            return None
        text, state = rng.choice(options[rng.choice(list(options))])
        seen = tell(state, False, rng)
        if len(story) < IMAGES - 1 and rng.random() < 0.3 and seen not in texts:
            text = seen
        story.append(state)
        texts.append(text)
    return story, texts


def _write_stories(
    every: Mapping[S, None],
    list_changes: Callable[[Sequence[S]], Iterable[Reading[S, S]]],
    tell: Callable[[S, bool, random.Random], str],
    count: int,
    rng: random.Random,
) -> list[tuple[list[S], list[str]]]:
    """Stories of which no two share a picture, so that every last picture is right once."""
    free = dict(every)
    starts = rng.sample(list(every), len(every))
    stories: list[tuple[list[S], list[str]]] = []
    while len(stories) < count:
        start = starts.pop()
        grown = _grow_story(start, free, list_changes, tell, rng) if start in free else None
        if grown is not None:
            stories.append(grown)
            for state in grown[0]:
                del free[state]
    return stories


def make_vist(count: int, rng: random.Random) -> Part:
    """Stories of five pictures of which the last is to be found; scenes and photos by turns, in three picture formats."""
    scenes = _write_stories(list_scenes(), _list_scene_changes, _tell_scene, count - count // 2, rng)
    photos = _write_stories(list_photos(), _list_photo_changes, _tell_photo, count // 2, rng)
    part = Part(count, IMAGES * count)
    annotations: list[list[dict[str, object]]] = []
    for story in range(count):
        told: tuple[Sequence[State], list[str]] = (scenes, photos)[story % 2][story // 2]
        for order, (state, text) in enumerate(zip(*told, strict=True)):
            number = str(500_000 + 3 * len(annotations))
            suffix = {7: "png", 13: "gif"}.get(len(annotations) % 20, "jpg")
            part.images[f"vist/images/{number}.{suffix}"] = depict(state)
            line = {"story_id": str(40_000 + story), "text": text, "photo_flickr_id": number}
            annotations.append([line | {"worker_arranged_photo_order": order}])
    part.files["vist/sis/val.story-in-sequence.json"] = {"annotations": annotations}
    return part


# --- multi-turn FashionIQ ---------------------------------------------------------------------------------------------

GARMENT_CHANGES: Sequence[Phrase[Garment, Garment]] = (
    Phrase("has a {colour} base", lambda s, w: replace(s[-1], colour=w["colour"])),
    Phrase("has {pattern}", lambda s, w: replace(s[-1], pattern=w["pattern"])),
    Phrase("has no pattern", lambda s, w: replace(s[-1], pattern="plain")),
    Phrase("is a {kind}", lambda s, w: replace(s[-1], kind=w["kind"])),
    Phrase("is {length}", lambda s, w: replace(s[-1], length=w["length"])),
    Phrase("has {sleeves}", lambda s, w: replace(s[-1], sleeves=w["sleeves"].replace("no sleeves", "sleeveless"))),
    Phrase("has a {collar}", lambda s, w: replace(s[-1], collar=w["collar"])),
    Phrase("has {belt}", lambda s, w: replace(s[-1], belt=w["belt"] == "a belt")),
)
GARMENT_RETURNS: Sequence[Phrase[Garment, Garment]] = (
    Phrase("has its old colour again", lambda s, w: replace(s[-1], colour=s[0].colour)),
    Phrase("has its old sleeves again", lambda s, w: replace(s[-1], sleeves=s[0].sleeves)),
    Phrase("has its old neck again", lambda s, w: replace(s[-1], collar=s[0].collar)),
)
"""Changes to the garment told of so far, after the references of the rounds before; a return goes to the first of them."""

_RETURNING: Final = (1, 4, 5)  # places in Garment.attributes of what the returns set


def _list_differences(one: Garment, other: Garment) -> set[int]:
    return {place for place, (a, b) in enumerate(zip(one.attributes, other.attributes, strict=True)) if a != b}


def _list_garment_changes(references: Sequence[Garment]) -> list[Reading[Garment, Garment]]:
    """What may be said of the last reference; returns only where "old" can mean one thing only."""
    changes: list[Reading[Garment, Garment]] = []
    for phrase in GARMENT_CHANGES:
        name = re.findall(r"\{(\w+)\}", phrase.template)
        words = WORDS[name[0]] if name else ("",)
        changes += [Reading(phrase, {name[0]: word} if name else {}) for word in words]
    for phrase, place in zip(GARMENT_RETURNS, _RETURNING, strict=True):
        seen = list(dict.fromkeys(garment.attributes[place] for garment in references))
        if len(seen) == 2 and references[-1].attributes[place] == seen[1]:
            changes.append(Reading(phrase, {}))
    return changes


def _draw_round(references: Sequence[Garment], rng: random.Random) -> tuple[list[str], Garment] | None:
    """One or two changes of different attributes, and the garment they lead to; None where none was found."""
    changes = _list_garment_changes(references)
    by_phrase: dict[str, list[Reading[Garment, Garment]]] = {}
    for change in changes:
        if _list_differences(references[-1], change.mean(*references)):
            by_phrase.setdefault(change.phrase.template, []).append(change)
    for _ in range(60):
        chosen = [rng.choice(by_phrase[name]) for name in rng.sample(list(by_phrase), rng.choice((1, 2, 2)))]
        touched = [_list_differences(references[-1], change.mean(*references)) for change in chosen]
        texts = [change.say() for change in chosen]
        after = apply_round(texts, references)
        if sum(map(len, touched)) == len(set().union(*touched)) and after in list_garments() and after not in references:
            return texts, after
    return None


def apply_round(texts: Sequence[str], references: Sequence[Garment]) -> Garment:
    """The garment after one round, given the references up to this round's."""
    garment = references[-1]
    for text in texts:
        garment = read((*GARMENT_CHANGES, *GARMENT_RETURNS), text).mean(*references, garment)
    return garment


def make_multiturn(count: int, rng: random.Random) -> Part:
    """Two or three rounds of changes to a garment; the pool holds references, targets and garments near the targets."""
    entries: list[dict[str, object]] = []
    pool: dict[Garment, str] = {}
    for start in rng.sample(list(list_garments()), len(list_garments())):
        states, rounds = [start], []
        for _ in range(2 + len(entries) % 2):
            drawn = _draw_round(states, rng)
            if drawn is not None:
                rounds.append(drawn[0])
                states.append(drawn[1])
        if len(rounds) < 2 + len(entries) % 2:
            continue
        for garment in (*states, *near_garments(states[-1], rng)[:2]):
            pool[garment] = depict(garment).key
        reference = [[turn, texts, pool[garment]] for turn, (texts, garment) in enumerate(zip(rounds, states[:-1], strict=True))]
        entries.append({"reference": reference, "target": [len(rounds), pool[states[-1]]]})
        if len(entries) == count:
            break
    part = Part(count, len(pool))
    part.files["multiturnfashion/data/all.val.json"] = entries
    part.files["multiturnfashion/image_splits/split.all.val.json"] = sorted(pool.values())
    part.images = {f"mbeir_images/fashioniq_images/{name}.jpg": depict(garment) for garment, name in pool.items()}
    return part
