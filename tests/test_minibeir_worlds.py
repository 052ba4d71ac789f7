"""The four worlds of MiniBEIR: frozen drafts, splits, hard negatives, edits and questions read back from their words alone."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from traceir.data.mbeir import Split
from traceir.minibeir import chains, encyclopedia, entities, news, sprites
from traceir.minibeir.drawing import COLOURS, GARMENT_TYPES, SHAPES, SIZE, draw_garment, draw_scene, object_sprite
from traceir.minibeir.garments import PATTERNS, Garment
from traceir.minibeir.rows import GROUP, HELD_OUT_WORLDS, ROWS, CandidateDraft, PretrainingDraft, QueryDraft, Sketch, load_worlds
from traceir.minibeir.scenes import PAIRS, SLOTS, Scene
from traceir.minibeir.unseen.states import State

WORLDS = load_worlds()
WORLD_OF = {row.name: row.world for row in ROWS}


@cache
def drafts(row: str, split: Split, count: int = 24) -> tuple[QueryDraft, ...]:
    return tuple(WORLDS[WORLD_OF[row]].rows[row](split, count, 3))


def state_of(sketch: Sketch | None) -> State:
    """What an image shows: what it would be drawn from."""
    drawing: Any = sketch and sketch.draw
    if isinstance(drawing.args[0], sprites.Photo):
        return drawing.args[0]
    return Scene(drawing.args[0]) if drawing.func is draw_scene else drawing.func.__self__


def read_state(text: str) -> Scene | Garment:
    """The composition that a state of reasoning describes."""
    first, *rest = text.removeprefix("see ").split(", ")
    if len(first.split()) == 2:
        return Scene(tuple((part.split()[0], part.split()[1]) for part in (first, *rest)))
    length, colour, kind = first.split()
    return Garment(kind, colour, rest[0], length, rest[1], rest[2], rest[3:] == ["belt"])


def test_the_benchmark_stays_as_published() -> None:
    """What every row, pool fill and pretraining task is made of; the digest changes only with a new version of the benchmark."""
    digest = hashlib.sha256()
    for row in ROWS:
        world = WORLDS[row.world]
        made = [draft for split in ("train", "val", "test") for draft in world.rows[row.name](split, 4, 1)]
        digest.update(str([made, list(itertools.islice(world.pool_fill(row.name, 4, 1), 4))]).encode())
    digest.update(str([list(world.pretraining(12, 1)) for world in WORLDS.values()]).encode())
    assert digest.hexdigest()[:16] == "e3e3ddc52efc1894"
    again, other = (list(WORLDS["scenes"].rows["cirr_task7"]("test", 8, seed)) for seed in (1, 2))
    assert again != other


@pytest.mark.parametrize("row", [row.name for row in ROWS])
def test_answers_keep_to_their_split_and_stand_among_near_twins(row: str) -> None:
    pools: dict[State, CandidateDraft] = {}
    keys: dict[str, State] = {}
    for split in ("train", "val", "test"):
        for draft in drafts(row, split):
            assert draft.steps <= 4 and (draft.steps >= 2) == bool(draft.reasoning) == bool(draft.answer)
            assert not set(draft.positives) & set(draft.distractors)
            assert len(set(draft.distractors)) >= 8 if split == "test" else split == "val" or not draft.distractors
            if WORLD_OF[row] in HELD_OUT_WORLDS:
                answer = state_of(draft.sketch if "task3" in row else draft.positives[0].sketch)
                assert answer.split == split
                assert split != "train" or draft.sketch is None or state_of(draft.sketch).split == "train"
                beside = [(state_of(each.sketch), each) for each in (*draft.positives, *draft.distractors) if each.sketch]
                assert all(keys.setdefault(each.sketch.key, state) == state for state, each in beside if each.sketch)
                for state, each in beside if row != "edis_task2" and split == "test" else ():
                    assert pools.setdefault(state, each) == each  # a composition has one rendering in all pools
                if WORLD_OF[row] != "news" and split == "test" and beside:
                    assert sum(chains.count_differences(answer, state) == 1 for state, _ in beside) >= 8
    groups = [drafts(row, "train")[start : start + GROUP] for start in range(0, 24, GROUP)]
    assert all(len({draft.positives for draft in group}) == GROUP for group in groups)


# --- edits ------------------------------------------------------------------------------------------------------------


def find(scene: Scene, ref: str) -> int:
    """The only slot that words refer to."""
    words = set(ref.split())
    fits = [slot for slot, word in enumerate(SLOTS) if word in words] or [
        slot
        for slot, (colour, shape) in enumerate(scene.objects)
        if words & set(COLOURS) <= {colour} and words & set(SHAPES) <= {shape} and words & {*COLOURS, *SHAPES}
    ]
    assert len(fits) == 1, f"{ref!r} does not name one of {scene}"
    return fits[0]


def obey(scene: Scene, words: str) -> Scene:
    """Carries out one edit from its words alone."""
    if match := re.fullmatch(r"(?:swap|exchange|let) (?:the (\w+ two)|(.*?) and (.*?))(?: trade places)?", words):
        return scene.swap(*(PAIRS[match[1]] if match[1] else (find(scene, match[2]), find(scene, match[3]))))
    if match := re.fullmatch(r"(?:give|make) (.*) the (?:same )?(colour|shape) (?:of|as) (.*)", words):
        return scene.alter(find(scene, match[1]), scene.objects[find(scene, match[3])][match[2] == "shape"])
    match = re.fullmatch(r"(?:make|paint|turn|change) (.*?)(?: into)?(?: a)? (\w+)", words)
    assert match, words
    return scene.alter(find(scene, match[1]), match[2])


def check_chain(start: State, text: str, written: list[str]) -> State:
    """Walks `see state; op; state; ...`: each state is what the words ask and what the op makes; returns the last."""
    passed, edits = [start], text.split(", then ")
    states = [read_state(state) for state in written[::2]]
    for words, op in zip(edits, written[1::2], strict=True):
        now = passed[-1]
        passed.append(obey(now, words) if isinstance(now, Scene) else now.apply(op))
    assert states == passed[:-1] and len(set(passed)) == len(passed)
    return passed[-1]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("row", "steps"), [("cirr_task7", {1: 10, 2: 10, 3: 10, 4: 10}), ("fashioniq_task7", {1: 8, 2: 6, 3: 6})]
)
def test_edits_do_what_their_words_say(row: str, steps: dict[int, int], split: Split) -> None:
    queries = drafts(row, split, sum(steps.values()))
    assert Counter(query.steps for query in queries) == steps
    for query in queries:
        source, target, text = state_of(query.sketch), state_of(query.positives[0].sketch), query.text or ""
        if query.reasoning and query.answer:
            assert check_chain(source, text, query.reasoning.split("; ")) == read_state(query.answer) == target
            if split == "test":
                assert CandidateDraft(sketch=query.sketch) in query.distractors
                assert {state_of(each.sketch) for each in query.distractors} >= set(
                    map(read_state, query.reasoning.split("; ")[2::2])
                )
        else:
            assert target != source and (not isinstance(source, Scene) or obey(source, text) == target)


# --- entities ---------------------------------------------------------------------------------------------------------


@cache
def list_questions() -> dict[tuple[str, str | None], entities.Path]:
    """Every question that can be asked, with the name whose emblem stands beside it, and the path it asks."""
    questions: dict[tuple[str, str | None], entities.Path] = {}
    for seen, groups in {(recipe.seen, tuple(recipe.shares)): None for recipe in entities.RECIPES.values()}:
        for path, phrasing in itertools.product(itertools.chain(*(group.list() for group in groups)), range(entities.PHRASINGS)):
            asked = path.ask(phrasing, seen=seen), path.start.name.lower() if seen else None
            assert questions.setdefault(asked, path) == path, f"{asked} asks for two things"
    return questions


def trace(draft: QueryDraft) -> entities.Path:
    """The path of a query, known from its words and its image alone."""
    return list_questions()[draft.text or "", draft.sketch.key.split("-")[1] if draft.sketch else None]


def test_the_encyclopedia_is_whole_and_its_emblems_differ() -> None:
    passages = list(encyclopedia.list_passages())
    assert len({passage.text for passage in passages}) == len(passages) >= 1050
    assert all(each.entity.fact(each.facet) in each.text.lower() for each in passages)
    looks = [sprites.find_emblem(entity) for entity in encyclopedia.list_entities()]
    assert len(set(looks)) == len(looks) == 202
    pale = {"yellow white", "white yellow", "blue black", "purple black", "purple blue"}
    assert not any(look.field == look.colour or f"{look.field} {look.colour}" in pale for look in looks)
    towns = encyclopedia.list_entities("town")
    held = [entities.Path(town, (), relation).held_out for town in towns for relation in ("river", "founder", "land")]
    assert sum(held) / len(held) == pytest.approx(0.18, abs=0.05)


@pytest.mark.parametrize("row", entities.RECIPES)
def test_questions_lead_to_their_passage_and_training_never_asks_what_is_held_out(row: str) -> None:
    facts = " ".join(passage.text.lower() for passage in encyclopedia.list_passages())
    for split in ("train", "test"):
        for draft in drafts(row, split):
            path = trace(draft)
            assert draft.positives[0].text == path.target.text and draft.steps == len(path.hops) + bool(draft.sketch)
            if draft.reasoning and draft.answer:
                written = draft.reasoning.split("; ")
                assert not draft.sketch or written.pop(0) == f"this is {draft.sketch.key.split('-')[1]}"
                assert all(fact in facts for fact in written) and draft.answer in (draft.positives[0].text or "").lower()
            if path.hops or path.facet != encyclopedia.INTRO:
                assert path.split == split and not (split == "train" and path.held_out)
    held = [trace(draft).held_out for draft in drafts(row, "test") if draft.steps >= 2]
    assert sum(held) / len(held) == pytest.approx(0.5, abs=0.15)
    pool = set(WORLDS["entities"].pool_fill(row, 1, 0))
    assert {each for draft in drafts(row, "test") for each in (*draft.positives, *draft.distractors)} <= pool


# --- pretraining and images -------------------------------------------------------------------------------------------


def check_example(example: PretrainingDraft) -> None:
    if path := list_questions().get((example.prompt, None)):
        assert path.split == "train" and example.target.endswith(path.answer)
    elif example.kind in ("edits", "views"):
        state, _, text = example.prompt.rpartition(": ")
        start = state_of(example.sketch) if example.sketch else read_state(state)
        written, _, answer = example.target.rpartition("; ")
        final = check_chain(start, text, written.split("; "))
        assert final == read_state(answer) and {start.split, final.split} == {"train"}
    elif example.sketch and not example.sketch.key.startswith("emblem"):
        assert state_of(example.sketch).split == "train"
        assert not example.prompt.startswith("name the ") or read_state(example.target) == state_of(example.sketch)


KINDS = {
    "scenes": {"naming", "edits", "views"},
    "garments": {"naming", "edits", "views"},
    "news": {"naming"},
    "entities": {"facts", "naming", "chains"},
}


@pytest.mark.parametrize(("world", "kinds"), KINDS.items())
def test_pretraining_examples_are_true_and_of_training_compositions(world: str, kinds: set[str]) -> None:
    pretraining = list(WORLDS[world].pretraining(60, 2))
    assert {example.kind for example in pretraining} == kinds
    for example in pretraining:
        check_example(example)


def test_a_key_stands_for_its_pixels() -> None:
    photo, town = sprites.Photo("Hupu", "Vupi", "race", "Wobbis", "day"), encyclopedia.list_entities("town")[3]
    sketches = [news.alter_photo(photo, part, random.Random(0)).sketch(3) for part in (*news.PARTS, "swap")]
    for shown in (photo, Scene.draw(random.Random(1)), Garment.draw(random.Random(1))):
        sketches += [shown.sketch(variant) for variant in (3, 4)]
    sketches += [sprites.sketch_emblem(town, variant) for variant in (5, 6)]
    images = {sketch.key: sketch.draw() for sketch in sketches}
    assert {(image.mode, image.size) for image in images.values()} == {("RGB", (SIZE, SIZE))}
    assert all(images[sketch.key].tobytes() == sketch.draw().tobytes() for sketch in sketches)
    assert len({image.resize((48, 48)).tobytes() for image in images.values()}) == len(images) == 14


def count_colours(pixels: np.ndarray) -> Counter[str]:
    """How many pixels lie close to each colour of the palette."""
    distance = np.linalg.norm(pixels.reshape(-1, 1, 3) - np.array(list(COLOURS.values()), float), axis=2)
    return Counter(list(COLOURS)[each.argmin()] for each in distance if each.min() < 110)


def test_colours_and_objects_can_be_told_apart_when_small() -> None:
    for variant, (base, second) in enumerate(itertools.pairwise([*COLOURS, "red"])):
        look = (GARMENT_TYPES[variant % 4], base, (PATTERNS[variant % 3], second), ("short", "long")[variant % 2])
        small = count_colours(np.asarray(draw_garment(*look, "short", "round", False, variant).reduce(4), float)[14:28, 15:33])
        assert min(small[base], small[second]) >= 30, (look, small)
    for shape, colour in zip(SHAPES, COLOURS, strict=True):
        row = ((colour, shape),) * 3
        assert count_colours(np.asarray(draw_scene(row, 1).reduce(4), float)[17:33, 17:31])[colour] >= 10, row
        sprite = object_sprite(colour, shape, 1.06)
        columns = np.flatnonzero((np.asarray(sprite.getchannel("A")) > 150).any(axis=0))
        assert max(sprite.width / 2 - columns[0], columns[-1] + 1 - sprite.width / 2) <= 29  # neighbours never overlap
