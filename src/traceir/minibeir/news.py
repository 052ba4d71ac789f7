"""The news world: press photos of two known people at an event, somewhere, at some time of day; captions and headlines.

Rows: `visualnews_task0` (caption to photo), `visualnews_task3` (photo to caption), `edis_task2` (text to photo with
headline, where the headline says something that the photo does not). No query takes a step of reasoning; they are hard
because every wrong candidate differs from the right one in one thing only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from traceir.errors import InputError
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Split
from traceir.minibeir.encyclopedia import hash_stably, split_words
from traceir.minibeir.photos import EVENTS, PERSONS, PLACES, TIMES, Scene, sketch_photo

WEEKDAYS: tuple[str, ...] = split_words("monday tuesday wednesday thursday friday saturday sunday")
TOPICS: tuple[str, ...] = split_words("fishing cooking taxes schools weather trains music health")

TIME_WORDS: dict[str, str] = {"day": "by day", "dusk": "at dusk", "night": "at night"}
CAPTIONS: tuple[str, ...] = (
    "{left} and {right} at the {event} in {place} {time}",
    "{left} with {right} in {place} {time} at the {event}",
    "{time} in {place}: {left} and {right} at the {event}",
)


# -------------------------------------------------------------------------------------------------------- compositions


def assign_split(scene: Scene) -> Split:
    """The split to which a composition belongs: 80 % train, 5 % val, 15 % test, whatever the seed."""
    bucket = hash_stably(f"scene {scene.left} {scene.right} {scene.event} {scene.place} {scene.time}") % 100
    return "train" if bucket < 80 else "val" if bucket < 85 else "test"


def fix_variant(scene: Scene) -> int:
    """The one rendering under which a composition stands in the pools of val and test."""
    return hash_stably(f"rendering {scene}") % 1000


def write_caption(scene: Scene, phrasing: int) -> str:
    """One of the three captions of a scene; it starts with a capital and names the person on the left first."""
    text = CAPTIONS[phrasing % len(CAPTIONS)].format(
        left=scene.left, right=scene.right, event=scene.event, place=scene.place, time=TIME_WORDS[scene.time]
    )
    return text[0].upper() + text[1:]


def fix_caption(scene: Scene) -> str:
    """The one caption under which a composition stands in pools, so that no pool holds two right ones."""
    return write_caption(scene, hash_stably(f"phrasing {scene}"))


def _choose_other(dice: random.Random, choices: tuple[str, ...], *taken: str) -> str:
    return dice.choice([choice for choice in choices if choice not in taken])


def alter_scene(scene: Scene, part: str, dice: random.Random) -> Scene:
    """The same scene but for one part: left, right, event, place, time, or `swap` (the two people change sides)."""
    people = tuple(PERSONS)
    if part == "swap":
        return replace(scene, left=scene.right, right=scene.left)
    if part == "left":
        return replace(scene, left=_choose_other(dice, people, scene.left, scene.right))
    if part == "right":
        return replace(scene, right=_choose_other(dice, people, scene.left, scene.right))
    if part == "event":
        return replace(scene, event=_choose_other(dice, EVENTS, scene.event))
    if part == "place":
        return replace(scene, place=_choose_other(dice, tuple(PLACES), scene.place))
    if part == "time":
        return replace(scene, time=_choose_other(dice, TIMES, scene.time))
    raise InputError(f"a scene has no part {part!r}; choose from {', '.join(PARTS)}, swap")


PARTS: tuple[str, ...] = ("left", "right", "event", "place", "time")
TWIN_PARTS: tuple[str, ...] = ("left", "right", "swap", "event", "place", "time", "left", "right", "event", "place")


def _invent_scene(dice: random.Random) -> Scene:
    left, right = dice.sample(tuple(PERSONS), 2)
    return Scene(left, right, dice.choice(EVENTS), dice.choice(tuple(PLACES)), dice.choice(TIMES))


def _invent_scene_of(split: Split, dice: random.Random) -> Scene:
    while True:
        scene = _invent_scene(dice)
        if assign_split(scene) == split:
            return scene


def _list_twins(scene: Scene, dice: random.Random) -> list[Scene]:
    """Ten or nearly ten different scenes, each unlike `scene` in one part."""
    twins = dict.fromkeys(alter_scene(scene, part, dice) for part in TWIN_PARTS)
    while len(twins) < 9:
        twins[alter_scene(scene, dice.choice(PARTS), dice)] = None
    return list(twins)


def _group_family(dice: random.Random) -> list[Scene]:
    """Four training scenes: one, and three that differ from it in one part each."""
    while True:
        first = _invent_scene_of("train", dice)
        parts = dice.sample((*PARTS, "swap"), 3)
        family = [first, *(alter_scene(first, part, dice) for part in parts)]
        if all(assign_split(scene) == "train" for scene in family):
            return family


def _list_scenes(row: str, split: Split, count: int, seed: int) -> Iterator[tuple[Scene, random.Random]]:
    """The scenes of a row's queries: families of four in train, all different (if there are enough) elsewhere."""
    dice = random.Random(hash_stably(f"{row} {split} {seed}"))
    seen: set[Scene] = set()
    family: list[Scene] = []
    for _ in range(count):
        if split == "train":
            family = family or _group_family(dice)
            yield family.pop(0), dice
            continue
        for _attempt in range(60):
            scene = _invent_scene_of(split, dice)
            if scene not in seen:
                break
        seen.add(scene)
        yield scene, dice


# ---------------------------------------------------------------------------------------------------------------- rows


def _offer_photo(scene: Scene, variant: int | None = None) -> CandidateDraft:
    return CandidateDraft(sketch=sketch_photo(scene, fix_variant(scene) if variant is None else variant))


def _offer_caption(scene: Scene) -> CandidateDraft:
    return CandidateDraft(text=fix_caption(scene))


def visualnews_task0(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Caption to photo."""
    for scene, dice in _list_scenes("visualnews_task0", split, count, seed):
        variant = dice.randrange(100_000) if split == "train" else None
        twins = () if split == "train" else tuple(_offer_photo(twin) for twin in _list_twins(scene, dice))
        text = write_caption(scene, dice.randrange(3))
        yield QueryDraft(text, None, (_offer_photo(scene, variant),), twins, steps=0)


def visualnews_task3(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Photo to caption."""
    for scene, dice in _list_scenes("visualnews_task3", split, count, seed):
        variant = dice.randrange(100_000)
        twins = () if split == "train" else tuple(_offer_caption(twin) for twin in _list_twins(scene, dice))
        yield QueryDraft(None, sketch_photo(scene, variant), (_offer_caption(scene),), twins, steps=0)


@dataclass(frozen=True, slots=True)
class Story:
    """A candidate of EDIS: a photo, and a headline with a weekday and a topic that the photo does not show."""

    scene: Scene
    weekday: str
    topic: str


def _offer_story(story: Story, variant: int | None = None) -> CandidateDraft:
    chosen = fix_variant(story.scene) if variant is None else variant
    return CandidateDraft(f"{story.weekday}: talks about {story.topic}", sketch_photo(story.scene, chosen))


STORY_QUESTIONS: tuple[str, ...] = (
    "{caption}; talks about {topic} on {weekday}",
    "{weekday}, talks about {topic}: {caption}",
    "{caption}, {weekday}, about {topic}",
)


def _ask_story(story: Story, phrasing: int) -> str:
    caption = write_caption(story.scene, phrasing // len(STORY_QUESTIONS))
    pattern = STORY_QUESTIONS[phrasing % len(STORY_QUESTIONS)]
    return pattern.format(caption=caption, topic=story.topic, weekday=story.weekday)


def _alter_headline(story: Story, part: str, dice: random.Random) -> Story:
    if part == "weekday":
        return replace(story, weekday=_choose_other(dice, WEEKDAYS, story.weekday))
    return replace(story, topic=_choose_other(dice, TOPICS, story.topic))


def _list_story_twins(story: Story, dice: random.Random) -> list[Story]:
    """Twelve or so stories: half differ in one part of the photo, half in one word of the headline."""
    twins = [replace(story, scene=scene) for scene in _list_twins(story.scene, dice)[:6]]
    twins += [_alter_headline(story, part, dice) for part in ("weekday", "topic") * 3]
    return list(dict.fromkeys(twins))


def _list_stories(split: Split, count: int, seed: int) -> Iterator[tuple[Story, random.Random]]:
    """In train, families of two photos and, for the first of them, two other headlines."""
    family: list[Story] = []
    for place, (scene, dice) in enumerate(_list_scenes("edis_task2", split, count, seed)):
        story = Story(scene, dice.choice(WEEKDAYS), dice.choice(TOPICS))
        if split == "train":
            if place % 4 == 0:
                family = [story]
            first = family[0]
            options = (
                first,
                replace(first, scene=scene),
                *(_alter_headline(first, p, dice) for p in ("weekday", "topic")),
            )
            story = options[place % 4]
        yield story, dice


def edis_task2(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
    """Text to photo with headline; photo and headline are both needed."""
    for story, dice in _list_stories(split, count, seed):
        variant = dice.randrange(100_000) if split == "train" else None
        twins = () if split == "train" else tuple(_offer_story(twin) for twin in _list_story_twins(story, dice))
        text = _ask_story(story, dice.randrange(len(CAPTIONS) * len(STORY_QUESTIONS)))
        yield QueryDraft(text, None, (_offer_story(story, variant),), twins, steps=0)


def row_names() -> tuple[str, ...]:
    """The rows of this world."""
    return ("visualnews_task0", "visualnews_task3", "edis_task2")


def pool_fill(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    """`count` candidates of the row's kind, from compositions of any split, each in its one pool rendering."""
    if row not in row_names():
        raise InputError(f"the news world has no row {row!r}; its rows are {', '.join(row_names())}")
    dice = random.Random(hash_stably(f"fill {row} {seed}"))
    for _ in range(count):
        scene = _invent_scene(dice)
        if row == "visualnews_task0":
            yield _offer_photo(scene)
        elif row == "visualnews_task3":
            yield _offer_caption(scene)
        else:
            yield _offer_story(Story(scene, dice.choice(WEEKDAYS), dice.choice(TOPICS)))


def lessons(count: int, seed: int) -> Iterator[LessonDraft]:
    """Photos of training compositions: 70 % to be described, 30 % with one question about one thing in them."""
    dice = random.Random(hash_stably(f"news lessons {seed}"))
    for _ in range(count):
        scene = _invent_scene_of("train", dice)
        sketch = sketch_photo(scene, dice.randrange(100_000))
        if dice.random() < 0.7:
            yield LessonDraft(sketch, "describe the photo", write_caption(scene, 0), "naming")
            continue
        answers = {
            "who is on the left": scene.left,
            "who is on the right": scene.right,
            "where is this": scene.place,
            "what time is it": scene.time,
            "what is happening": scene.event,
        }
        prompt = dice.choice(tuple(answers))
        yield LessonDraft(sketch, prompt, answers[prompt], "naming")
