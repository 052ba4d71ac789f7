"""The news world: press photos of two known people at an event, somewhere, at some time of day; captions and headlines.

No query takes a step of reasoning; they are hard because every wrong candidate differs from the right one in one thing only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from traceir.data.mbeir import Split
from traceir.minibeir.rows import GROUP, WORDS, CandidateDraft, DrawnWorld, PretrainingDraft, QueryDraft, hash_stably
from traceir.minibeir.sprites import EVENTS, PERSONS, PLACES, TIMES, Photo

WEEKDAYS: Final = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
TOPICS: Final = tuple("fishing cooking taxes schools weather trains music health".split())
_PEOPLE: Final = tuple(PERSONS)
PARTS: Final = {"left": _PEOPLE, "right": _PEOPLE, "event": EVENTS, "place": tuple(PLACES), "time": TIMES}
"""What may stand in each part of a photo; no word is in two of them."""
_TWIN_PARTS: Final = ("left", "right", "swap", "event", "place", "time", "left", "right", "event", "place")


def write_caption(photo: Photo, phrasing: int) -> str:
    """One of three captions; it starts with a capital and names the person on the left first."""
    text = str(WORDS["captions"]["Photo"][phrasing % 3]).format(**photo.slots)
    return text[0].upper() + text[1:]


def swap_sides(photo: Photo) -> Photo:
    return replace(photo, left=photo.right, right=photo.left)


def list_others(photo: Photo, part: str) -> list[str]:
    """What could stand in a part of a photo instead."""
    shown = {getattr(photo, name) for name in PARTS}
    return [choice for choice in PARTS[part] if choice not in shown]


def alter_photo(photo: Photo, part: str, dice: random.Random) -> Photo:
    """The same photo but for one part, or, for `swap`, with its two people on each other's side."""
    return swap_sides(photo) if part == "swap" else replace(photo, **{part: dice.choice(list_others(photo, part))})


def _invent(dice: random.Random, split: Split | None = None) -> Photo:
    while True:
        left, right = dice.sample(PARTS["left"], 2)
        photo = Photo(left, right, *(dice.choice(PARTS[part]) for part in ("event", "place", "time")))
        if split is None or photo.split == split:
            return photo


def _list_twins(photo: Photo, dice: random.Random) -> list[Photo]:
    """Ten or nearly ten different photos, each unlike `photo` in one part."""
    twins = dict.fromkeys(alter_photo(photo, part, dice) for part in _TWIN_PARTS)
    while len(twins) < 9:
        twins[alter_photo(photo, dice.choice(tuple(PARTS)), dice)] = None
    return list(twins)


def _list_photos(split: Split, count: int, dice: random.Random) -> Iterator[Photo]:
    """The photos of a row's queries: in train groups of one and three that differ from it in one part each; else all different
    (if there are enough)."""
    seen: set[Photo] = set()
    while len(seen) < count and split == "train":
        first = _invent(dice, "train")
        group = [first, *(alter_photo(first, part, dice) for part in dice.sample((*PARTS, "swap"), 3))]
        if all(photo.split == "train" for photo in group):
            yield from group
    while len(seen) < count:
        photo = _invent(dice, split)
        if photo not in seen:
            seen.add(photo)
            yield photo


@dataclass(frozen=True, slots=True)
class Story:
    """A candidate of a row: a photo, its caption, or (EDIS) a photo with a headline whose weekday and topic it does not show."""

    photo: Photo
    weekday: str = ""
    topic: str = ""

    def offer(self, row: str, variant: int | None = None) -> CandidateDraft:
        """By default in the one rendering or caption under which it stands in pools, so that no pool holds two right ones."""
        if row == "visualnews_task3":
            return CandidateDraft(write_caption(self.photo, hash_stably(f"phrasing {self.photo}")))
        text = f"{self.weekday}: talks about {self.topic}" if self.topic else None
        chosen = hash_stably(f"rendering {self.photo}") % 1000 if variant is None else variant
        return CandidateDraft(text, self.photo.sketch(chosen))

    def alter_headline(self, dice: random.Random) -> list[Story]:
        """Two stories: another weekday, another topic."""
        weekday = dice.choice([choice for choice in WEEKDAYS if choice != self.weekday])
        return [replace(self, weekday=weekday), replace(self, topic=dice.choice([t for t in TOPICS if t != self.topic]))]


def _make_row(row: str, split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    dice = random.Random(hash_stably(f"{row} {split} {seed}"))
    for index, photo in enumerate(_list_photos(split, count, dice)):
        if index == count:
            return
        story = Story(photo)
        if row == "edis_task2":
            story = Story(photo, dice.choice(WEEKDAYS), dice.choice(TOPICS))
            if index % GROUP == 0:
                first = story
            if split == "train":
                story = (first, replace(first, photo=photo), *first.alter_headline(dice))[index % GROUP]
        variant = dice.randrange(100_000) if split == "train" or row == "visualnews_task3" else None
        twins = [] if split == "train" else [replace(story, photo=twin) for twin in _list_twins(photo, dice)]
        if row == "edis_task2" and twins:
            twins = twins[:6] + [twin for _ in range(3) for twin in story.alter_headline(dice)]
        beside = tuple(twin.offer(row) for twin in dict.fromkeys(twins))
        if row == "visualnews_task3":
            yield QueryDraft(None, photo.sketch(variant or 0), (story.offer(row),), beside)
            continue
        phrasing = dice.randrange(9 if row == "edis_task2" else 3)
        text = write_caption(story.photo, phrasing // 3 if row == "edis_task2" else phrasing)
        if row == "edis_task2":
            text = WORDS["captions"]["Story"][phrasing % 3].format(caption=text, topic=story.topic, weekday=story.weekday)
        yield QueryDraft(text, None, (story.offer(row, variant),), beside)


def _fill_pool(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """Compositions of any split, each in its one pool rendering."""
    dice = random.Random(hash_stably(f"fill {row} {seed}"))
    for _ in range(count):
        photo = _invent(dice)
        headline = (dice.choice(WEEKDAYS), dice.choice(TOPICS)) if row == "edis_task2" else ()
        yield Story(photo, *headline).offer(row)


def _teach(count: int, seed: int) -> Iterator[PretrainingDraft]:
    """Photos of training compositions: 70 % to be described, 30 % with one question about one thing in them."""
    dice = random.Random(hash_stably(f"news lessons {seed}"))
    questions = {"who is on the left": "left", "who is on the right": "right", "where is this": "place"}
    questions |= {"what time is it": "time", "what is happening": "event"}
    for _ in range(count):
        photo = _invent(dice, "train")
        sketch = photo.sketch(dice.randrange(100_000))
        if dice.random() < 0.7:
            yield PretrainingDraft(sketch, "describe the photo", write_caption(photo, 0), "naming")
        else:
            prompt, part = dice.choice(list(questions.items()))
            yield PretrainingDraft(sketch, prompt, getattr(photo, part), "naming")


_ROWS: Final = ("visualnews_task0", "visualnews_task3", "edis_task2")
WORLD: Final = DrawnWorld({row: partial(_make_row, row) for row in _ROWS}, _fill_pool, _teach)
