"""The scenes of MiniBEIR: splits, edits read back from their words alone, labels, distractors, pictures."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from traceir.errors import InputError
from traceir.minibeir import scenes
from traceir.minibeir.draft import CandidateDraft, QueryDraft, Sketch
from traceir.minibeir.drawing import COLOURS, SHAPES, SIZE, _object_sprite, derive_seed, draw_scene, split_of

Objects = list[tuple[str, str]]
ROWS = {
    "mscoco_task0": scenes.mscoco_task0,
    "mscoco_task3": scenes.mscoco_task3,
    "nights_task4": scenes.nights_task4,
    "cirr_task7": scenes.cirr_task7,
}
COLOUR_OF = {name[0]: name for name in COLOURS}
SHAPE_OF = {"c": "cube", "b": "ball", "n": "cone", "o": "ring", "s": "star", "m": "mug"}
PLACES = ("left", "middle", "right")


def decode(sketch: Sketch | None) -> Objects:
    """The objects a sketch's key speaks of."""
    assert sketch is not None
    code = sketch.key.split("_")[1]
    return [(COLOUR_OF[code[i]], SHAPE_OF[code[i + 1]]) for i in (0, 2, 4)]


def code_of(objects: Objects) -> str:
    letters = {shape: letter for letter, shape in SHAPE_OF.items()}
    return "".join(colour[0] + letters[shape] for colour, shape in objects)


def read_state(text: str) -> Objects:
    return [(part.split()[0], part.split()[1]) for part in text.split(", ")]


def read_caption(text: str) -> Objects:
    found = [(m[1], m[2]) for m in re.finditer(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)]
    return [found[1], found[0], found[2]] if " between " in text else found


def content_of(candidate: CandidateDraft) -> Objects:
    return decode(candidate.sketch) if candidate.text is None else read_caption(candidate.text)


def find(objects: Objects, ref: str) -> int:
    """The one slot that words refer to."""
    words = set(ref.split())
    for slot, place in enumerate(PLACES):
        if place in words:
            return slot
    fits = [s for s, (c, f) in enumerate(objects) if words & set(COLOURS) <= {c} and words & set(SHAPES) <= {f}]
    assert len(fits) == 1 and words & {*COLOURS, *SHAPES}, f"{ref!r} does not name one of {objects}"
    return fits[0]


def obey(objects: Objects, words: str) -> Objects:
    """Carry out one edit from its words, with no help from the library."""
    result = list(objects)
    pair = {"the left two": (0, 1), "the right two": (1, 2), "the outer two": (0, 2)}
    if match := re.fullmatch(r"(?:swap|exchange|let) (.*?)(?: trade places)?", words):
        if match[1] in pair:
            one, other = pair[match[1]]
        else:
            one, other = (find(objects, ref) for ref in match[1].split(" and "))
        result[one], result[other] = objects[other], objects[one]
        return result
    if match := re.fullmatch(r"(?:give|make) (.*) the (?:same )?(colour|shape) (?:of|as) (.*)", words):
        slot, origin = find(objects, match[1]), find(objects, match[3])
        value = objects[origin][match[2] == "shape"]
    else:
        match = re.fullmatch(r"(?:make|paint|turn|change) (.*?)(?: into)?(?: a)? (\w+)", words)
        assert match, words
        slot, value = find(objects, match[1]), match[2]
    colour, shape = objects[slot]
    result[slot] = (value, shape) if value in COLOURS else (colour, value)
    return result


def obey_op(objects: Objects, op: str) -> Objects:
    words = op.split()
    result = list(objects)
    if words[0] == "swap":
        one, other = PLACES.index(words[1]), PLACES.index(words[2])
        result[one], result[other] = objects[other], objects[one]
    else:
        slot = PLACES.index(words[0])
        colour, shape = objects[slot]
        result[slot] = (words[1], shape) if words[1] in COLOURS else (colour, words[1])
    return result


def check_told(told: list[str], edits: list[str], start: Objects) -> Objects:
    """Walk `see state; op; state; ...`: each op does what its words ask, each state is what the op makes."""
    assert told[0] == "see " + ", ".join(map(" ".join, start))
    now, passed = start, [start]
    for place, (words, op) in enumerate(zip(edits, told[1::2], strict=True)):
        then = obey(now, words)
        assert then == obey_op(now, op), f"{words!r} is not {op!r} in {now}"
        assert then not in passed
        if 2 * place + 2 < len(told):
            assert read_state(told[2 * place + 2]) == then
        now = then
        passed.append(now)
    return now


def all_queries() -> Iterator[tuple[str, str, QueryDraft]]:
    for (row, make), split in itertools.product(ROWS.items(), ("train", "val", "test")):
        for query in make(split, 120, 3):
            yield row, split, query


def test_row_names_are_the_row_functions() -> None:
    assert scenes.row_names() == tuple(ROWS)


def test_seeds_and_splits_are_the_same_in_every_process() -> None:
    assert derive_seed("scene", 1) == 6179826265488506237
    assert [split_of(code) for code in ("ysrnro", "bbynrs", "wcpbbo")] == ["train", "val", "test"]


def test_splits_share_out_the_compositions() -> None:
    counts = Counter(
        split_of(scenes.Scene(items).code)
        for items in itertools.islice(itertools.product(itertools.product(COLOURS, SHAPES), repeat=3), 20000)
    )
    assert counts["train"] / 20000 == pytest.approx(0.80, abs=0.01)
    assert counts["val"] / 20000 == pytest.approx(0.05, abs=0.01)
    assert counts["test"] / 20000 == pytest.approx(0.15, abs=0.01)


def test_targets_belong_to_their_split_and_training_sees_no_other() -> None:
    for row, split, query in all_queries():
        (positive,) = query.positives
        assert split_of(code_of(content_of(positive))) == split, row
        if split == "train":
            assert query.distractors == ()
            assert query.sketch is None or split_of(code_of(decode(query.sketch))) == "train"


def test_images_of_a_composition_stand_once_in_a_pool() -> None:
    keys: dict[str, str] = {}
    for _, _, query in all_queries():
        for candidate in (*query.positives, *query.distractors):
            if candidate.sketch is not None:
                code = code_of(decode(candidate.sketch))
                assert keys.setdefault(code, candidate.sketch.key) == candidate.sketch.key


def test_distractors_hold_near_twins_and_never_the_answer() -> None:
    for row, split, query in all_queries():
        if split == "train":
            continue
        target = content_of(query.positives[0])
        others = [content_of(candidate) for candidate in query.distractors]
        assert target not in others
        assert len({code_of(other) for other in others}) == len(others)
        values = list(itertools.chain.from_iterable(target))
        off = [sum(a != b for a, b in zip(values, itertools.chain.from_iterable(o), strict=True)) for o in others]
        assert off.count(1) >= 8, row


def test_captions_are_right_and_style_gives_nothing_away() -> None:
    queries = list(scenes.mscoco_task3("test", 300, 5))
    targets = [code_of(decode(query.sketch)) for query in queries]
    assert len(set(targets)) == 300
    for query, code in zip(queries, targets, strict=True):
        text = query.positives[0].text
        assert text is not None and code_of(read_caption(text)) == code
        blank = re.sub("|".join((*COLOURS, *SHAPES)), "x", text)
        for other in query.distractors:
            assert other.text is not None
            assert re.sub("|".join((*COLOURS, *SHAPES)), "x", other.text) == blank
            assert code_of(read_caption(other.text)) not in targets


def test_nights_show_the_same_thing_in_another_rendering() -> None:
    for query in scenes.nights_task4("test", 40, 1):
        positive = query.positives[0].sketch
        assert positive is not None and query.sketch is not None
        assert decode(positive) == decode(query.sketch)
        assert positive.key != query.sketch.key


@pytest.mark.parametrize("split", ["train", "test"])
def test_edits_do_what_their_words_say(split: str) -> None:
    queries = list(scenes.cirr_task7(split, 400, 11))
    assert Counter(query.steps for query in queries) == {1: 100, 2: 100, 3: 100, 4: 100}
    for query in queries:
        assert query.text is not None
        source, target = decode(query.sketch), decode(query.positives[0].sketch)
        edits = query.text.split(", then ")
        assert len(edits) == query.steps
        if query.steps == 1:
            assert query.reasoning is None and query.answer is None
            assert obey(source, edits[0]) == target != source
        else:
            assert query.reasoning is not None and query.answer is not None
            told = query.reasoning.split("; ")
            assert len(told) == 2 * query.steps
            assert check_told(told, edits, source) == read_state(query.answer) == target


def test_pools_hold_source_and_every_state_on_the_way() -> None:
    for query in scenes.cirr_task7("test", 80, 2):
        assert query.text is not None and query.sketch is not None
        assert CandidateDraft(sketch=query.sketch) in query.distractors
        others = [decode(candidate.sketch) for candidate in query.distractors]
        now = decode(query.sketch)
        for words in query.text.split(", then ")[:-1]:
            now = obey(now, words)
            assert now in others


def test_most_chains_cannot_be_read_on_the_source_alone() -> None:
    needed = total = 0
    for query in scenes.cirr_task7("test", 400, 7):
        if query.steps < 2 or query.text is None:
            continue
        total += 1
        source = decode(query.sketch)
        try:  # the second edit first
            first, second = query.text.split(", then ")[:2]
            needed += obey(obey(source, second), first) != obey(obey(source, first), second)
        except AssertionError:
            needed += 1
    assert needed / total > 0.6


def test_training_families_are_hard() -> None:
    queries = list(scenes.cirr_task7("train", 200, 4))
    for start in range(0, 200, 4):
        family = queries[start : start + 4]
        assert sorted(query.steps for query in family) == [1, 2, 3, 4]
        assert len({query.positives for query in family}) == 4
        sources = [code_of(decode(query.sketch)) for query in family]
        assert len(set(sources[1:])) == 1
        assert sources[0] in (sources[1], *sources) and (
            sources[0] == sources[1] or code_of(decode(family[0].positives[0].sketch)) == sources[1]
        )
    plain = list(scenes.nights_task4("train", 80, 4))
    for start in range(0, 80, 4):
        codes = [code_of(decode(query.sketch)) for query in plain[start : start + 4]]
        assert len(set(codes)) == 4
        assert all(sum(a != b for a, b in zip(codes[0], code, strict=True)) <= 2 for code in codes)


def solve_riddle(text: str) -> Objects:
    """Read an indirect description, attribute by attribute, until nothing is open."""
    body = re.sub(r"^from left to right: |^on the left |^left: ", "", text)
    parts = re.split(r", in the middle |, on the right |; middle: |; right: |, ", body)
    found: dict[tuple[int, int], str] = {}
    while len(found) < 6:
        before = len(found)
        for slot, part in enumerate(parts):
            for kind, names in enumerate((COLOURS, SHAPES)):
                word = ("colour", "shape")[kind]
                if match := re.search(rf"{word} (?:of|as) the (\w+) one", part):
                    origin = (PLACES.index(match[1]), kind)
                    if origin in found:
                        found[slot, kind] = found[origin]
                else:
                    (name,) = (name for name in names if name in part.split())
                    found[slot, kind] = name
        assert len(found) > before, text
    return [(found[slot, 0], found[slot, 1]) for slot in range(3)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_indirect_descriptions_resolve_to_their_target(split: str) -> None:
    queries = list(scenes.mscoco_task0(split, 400, 9))
    riddles = [query for query in queries if query.steps]
    assert len(riddles) == 48
    for query in riddles:
        assert query.text is not None and query.reasoning is not None and query.answer is not None
        target = decode(query.positives[0].sketch)
        assert solve_riddle(query.text) == target == read_state(query.answer)
        assert query.steps == len(re.findall(r"(?:of|as) the \w+ one", query.text)) >= 2
        told = sorted(query.reasoning.split("; "))
        assert told == sorted(f"{p} {c} {s}" for p, (c, s) in zip(PLACES, target, strict=True))


def test_plain_captions_carry_no_reasoning() -> None:
    for query in scenes.mscoco_task0("val", 50, 9):
        if query.steps == 0:
            assert query.reasoning is None and query.answer is None and query.text is not None
            assert read_caption(query.text) == decode(query.positives[0].sketch)


def test_lessons_are_true_and_of_training_compositions() -> None:
    kinds: Counter[str] = Counter()
    for lesson in scenes.lessons(1500, 2):
        edits = "views" if lesson.sketch else "edits"
        assert lesson.kind == ("naming" if lesson.prompt in ("name the objects", "describe the picture") else edits)
        if lesson.sketch is not None:
            assert split_of(code_of(decode(lesson.sketch))) == "train"
        if lesson.prompt == "name the objects":
            kinds["name"] += 1
            assert read_state(lesson.target) == decode(lesson.sketch)
        elif lesson.prompt == "describe the picture":
            kinds["describe"] += 1
            assert read_caption(lesson.target) == decode(lesson.sketch)
        else:
            state, _, text = lesson.prompt.rpartition(": ")
            kinds["picture" if lesson.sketch else "words"] += 1
            start = decode(lesson.sketch) if lesson.sketch else read_state(state)
            told, _, answer = lesson.target.rpartition("; ")
            final = check_told(told.split("; "), text.split(", then "), start)
            assert final == read_state(answer)
            assert {split_of(code_of(start)), split_of(code_of(final))} == {"train"}
    shares = {"name": 0.20, "describe": 0.05, "words": 0.60, "picture": 0.15}
    assert all(kinds[kind] / 1500 == pytest.approx(share, abs=0.04) for kind, share in shares.items())


def test_pool_fill_is_unlike_and_right_for_no_held_out_query() -> None:
    for row in ROWS:
        fill = list(scenes.pool_fill(row, 200, 1))
        assert len(set(fill)) == 200
        assert all((candidate.text is None) == (row != "mscoco_task3") for candidate in fill)
        assert {split_of(code_of(content_of(candidate))) for candidate in fill} == {"train"}
    with pytest.raises(InputError, match="no_such_row"):
        next(scenes.pool_fill("no_such_row", 1, 1))


@pytest.mark.parametrize("row", ROWS)
def test_rows_repeat_by_seed(row: str) -> None:
    for split in ("train", "test"):
        first = list(ROWS[row](split, 30, 8))
        assert first == list(ROWS[row](split, 30, 8))
        assert first != list(ROWS[row](split, 30, 9))
        assert len(first) == 30
    assert list(scenes.lessons(30, 8)) == list(scenes.lessons(30, 8))


def test_a_key_stands_for_its_pixels() -> None:
    seen: dict[str, bytes] = {}
    for query in itertools.islice(scenes.nights_task4("test", 3, 1), 3):
        for sketch in (query.sketch, *(candidate.sketch for candidate in query.distractors)):
            assert sketch is not None
            picture = sketch.draw()
            assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
            assert seen.setdefault(sketch.key, picture.tobytes()) == sketch.draw().tobytes()
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("shape", SHAPES)
def test_colours_survive_every_rendering(shape: str) -> None:
    palette = np.array(list(COLOURS.values()), float)
    directions = palette / np.linalg.norm(palette, axis=1, keepdims=True)
    names = list(COLOURS)
    for variant, middle in itertools.product(range(6), names):
        row = ((names[variant], shape), (middle, shape), ("white", shape))
        pixels = np.asarray(draw_scene(row, variant).reduce(4), float)[17:33, 17:31].reshape(-1, 3)
        strong = pixels.max(axis=1) > 70
        nearest = (pixels[strong] / np.linalg.norm(pixels[strong], axis=1, keepdims=True)) @ directions.T
        if middle == "white":
            assert (pixels.min(axis=1) > 185).sum() >= 10, (shape, variant)
        else:
            index = names.index(middle)
            sure = (nearest.argmax(axis=1) == index) & (nearest[:, index] > 0.97)
            assert sure.sum() >= 25, (shape, middle, variant)


def test_objects_never_overlap() -> None:
    """Neighbours stand 64 pixels apart, less a jitter of 4 each."""
    reach_left, reach_right = [], []
    for shape in SHAPES:
        sprite = _object_sprite("red", shape, 1.06)
        columns = np.flatnonzero((np.asarray(sprite.getchannel("A")) > 150).any(axis=0))
        reach_left.append(sprite.width / 2 - columns[0])
        reach_right.append(columns[-1] + 1 - sprite.width / 2)
    assert max(reach_left) + max(reach_right) <= 64 - 8 + 1
    assert max(reach_left) <= 29 and max(reach_right) <= 29
