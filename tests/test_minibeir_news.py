"""The news world: photos, captions, stories, and the wall between training and testing."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from traceir.errors import InputError
from traceir.minibeir import news, photos
from traceir.minibeir.draft import CandidateDraft, Split
from traceir.minibeir.encyclopedia import NAMES, WORDS

ROWS = {name: getattr(news, name) for name in news.row_names()}


def show(draft: CandidateDraft) -> tuple[str | None, str | None]:
    return draft.text, draft.sketch.key if draft.sketch else None


def read_scene(key: str) -> photos.Scene:
    """The scene behind a picture's key, which holds its parts in lower case."""
    _, left, right, event, place, time, _ = key.split("-")
    return photos.Scene(left.capitalize(), right.capitalize(), event.replace("_", " "), place.capitalize(), time)


def find_split(caption: str) -> Split:
    """The split of the scene of a caption, found by reading which names stand in it."""
    people = sorted((name for name in photos.PERSONS if name in caption), key=caption.index)
    [event] = [event for event in photos.EVENTS if f"at the {event}" in caption]
    [place] = [place for place in photos.PLACES if place in caption]
    [time] = [time for time, words in news.TIME_WORDS.items() if words in caption.lower()]
    return news.assign_split(photos.Scene(people[0], people[1], event, place, time))


def test_names_and_looks_are_all_different() -> None:
    names = [*photos.PERSONS, *photos.PLACES, *(name for kind in NAMES.values() for name in kind)]
    lowered = [name.lower() for name in names]
    assert len(set(lowered)) == len(names) == 16 + 12 + 202
    assert not set(lowered) & {word for words in WORDS.values() for word in words}
    assert len(set(photos.PERSONS.values())) == 16
    assert len(set(photos.PLACES.values())) == len(photos.PLACE_PENS) == 12


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_deterministic_and_follow_the_seed(row: str, split: Split) -> None:
    first, again, other = (list(ROWS[row](split, 30, seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other
    assert len(first) == 30
    assert all(draft.steps == 0 and draft.reasoning is None for draft in first)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_answer_is_a_composition_of_its_split(split: Split) -> None:
    for row in ("visualnews_task0", "edis_task2"):
        for draft in ROWS[row](split, 120, 1):
            sketch = draft.positives[0].sketch
            assert sketch is not None and news.assign_split(read_scene(sketch.key)) == split
    for draft in news.visualnews_task3(split, 120, 1):
        caption = draft.positives[0].text
        assert caption is not None and find_split(caption) == split
        assert draft.sketch is not None and news.assign_split(read_scene(draft.sketch.key)) == split


def test_lessons_show_training_compositions_and_answer_truly() -> None:
    drafts = list(news.lessons(300, 2))
    told = Counter(lesson.prompt == "describe the photo" for lesson in drafts)
    assert 0.6 < told[True] / 300 < 0.8
    for lesson in drafts:
        assert lesson.sketch is not None
        scene = read_scene(lesson.sketch.key)
        assert news.assign_split(scene) == "train"
        assert lesson.target in (news.write_caption(scene, 0), *list_parts(scene))
        if lesson.prompt == "who is on the right":
            assert lesson.target == scene.right


def list_parts(scene: photos.Scene) -> tuple[str, ...]:
    return scene.left, scene.right, scene.event, scene.place, scene.time


def test_splits_are_about_80_5_15() -> None:
    dice = random.Random(0)
    people = tuple(photos.PERSONS)
    counts: Counter[str] = Counter()
    for _ in range(4000):
        left, right = dice.sample(people, 2)
        place, event, time = dice.choice(tuple(photos.PLACES)), dice.choice(photos.EVENTS), dice.choice(photos.TIMES)
        counts[news.assign_split(photos.Scene(left, right, event, place, time))] += 1
    assert counts["train"] / 4000 == pytest.approx(0.80, abs=0.03)
    assert counts["test"] / 4000 == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("row", ROWS)
def test_twins_are_many_near_and_never_right(row: str) -> None:
    for draft in ROWS[row]("test", 60, 0):
        twins = {show(twin) for twin in draft.distractors}
        assert len(twins) >= 8
        assert not twins & {show(positive) for positive in draft.positives}


def test_a_story_twin_differs_in_photo_or_headline_only() -> None:
    for draft in news.edis_task2("test", 40, 0):
        text, key = show(draft.positives[0])
        changes = Counter((twin.text != text, show(twin)[1] != key) for twin in draft.distractors)
        assert set(changes) == {(True, False), (False, True)}


def test_training_families_differ_in_one_part_of_the_photo() -> None:
    drafts = list(news.visualnews_task0("train", 40, 0))
    for start in range(0, 40, 4):
        keys = [show(draft.positives[0])[1] or "" for draft in drafts[start : start + 4]]
        scenes = [read_scene(key) for key in keys]
        first = list_parts(scenes[0])
        assert len(set(scenes)) == 4
        for scene in scenes[1:]:
            differing = [place for place, part in enumerate(list_parts(scene)) if part != first[place]]
            assert len(differing) == 1 or differing == [0, 1]
    assert all(draft.distractors == () for draft in drafts)


def test_pools_hold_one_rendering_and_one_caption_of_a_composition() -> None:
    keys: dict[photos.Scene, set[str]] = {}
    for split in ("val", "test"):
        for draft in news.visualnews_task0(split, 60, 0):
            for candidate in (*draft.positives, *draft.distractors):
                assert candidate.sketch is not None
                keys.setdefault(read_scene(candidate.sketch.key), set()).add(candidate.sketch.key)
    assert all(len(of_scene) == 1 for of_scene in keys.values())


def test_pool_fill_matches_the_row_and_refuses_others() -> None:
    assert all(fill.text is None and fill.sketch for fill in news.pool_fill("visualnews_task0", 5, 0))
    assert all(fill.text and fill.sketch is None for fill in news.pool_fill("visualnews_task3", 5, 0))
    assert sum(bool(fill.text and fill.sketch) for fill in news.pool_fill("edis_task2", 5, 0)) == 5
    with pytest.raises(InputError, match="edis_task2"):
        next(news.pool_fill("webqa_task1", 1, 0))


def test_equal_keys_have_equal_pixels_and_parts_show() -> None:
    scene = photos.Scene("Hupu", "Vupi", "race", "Wobbis", "day")
    photo = photos.sketch_photo(scene, 3).draw()
    assert (photo.size, photo.mode) == ((192, 192), "RGB")
    assert photo.tobytes() == photos.sketch_photo(scene, 3).draw().tobytes()
    assert photo.tobytes() != photos.sketch_photo(scene, 4).draw().tobytes()
    dice = random.Random(0)
    for part in (*news.PARTS, "swap"):
        altered = news.alter_scene(scene, part, dice)
        assert altered != scene
        small, other = photo.resize((48, 48)), photos.draw_photo(altered, 3).resize((48, 48))
        assert sum(abs(a - b) > 40 for a, b in zip(small.tobytes(), other.tobytes(), strict=True)) > 150
