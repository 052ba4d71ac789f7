"""The garments of MiniBEIR: splits, relative captions read from their words alone, labels, distractors, pictures."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from traceir.errors import InputError
from traceir.minibeir import garments
from traceir.minibeir.draft import CandidateDraft, QueryDraft, Sketch
from traceir.minibeir.drawing import COLOURS, GARMENT_TYPES, SIZE, draw_garment, split_of

Look = dict[str, str]  # kind, base, figure, second, length, sleeves, collar, belt; figure and second are "" if plain
ROWS = {
    "fashion200k_task0": garments.fashion200k_task0,
    "fashion200k_task3": garments.fashion200k_task3,
    "fashioniq_task7": garments.fashioniq_task7,
}
FIGURES = ("stripes", "dots", "checks")
SLEEVES = ("sleeveless", "short sleeves", "long sleeves")
COLLARS = ("round neck", "v-neck", "high neck")
COLOUR = "|".join(COLOURS)
FIGURE = "|".join(FIGURES)


def decode(sketch: Sketch | None) -> Look:
    """The look a sketch's key speaks of."""
    assert sketch is not None
    kind, base, second, figure, length, sleeves, collar, belt = tuple(sketch.key.split("_")[1])
    return {
        "kind": next(name for name in GARMENT_TYPES if name[0] == kind),
        "base": next(name for name in COLOURS if name[0] == base),
        "second": "" if second == "x" else next(name for name in COLOURS if name[0] == second),
        "figure": "" if figure == "x" else next(name for name in FIGURES if name[0] == figure),
        "length": {"s": "short", "l": "long"}[length],
        "sleeves": SLEEVES["nsl".index(sleeves)],
        "collar": next(name for name in COLLARS if name[0] == collar),
        "belt": {"b": "belt", "x": ""}[belt],
    }


def code_of(look: Look) -> str:
    sleeves = "nsl"[SLEEVES.index(look["sleeves"])]
    pattern = look["second"][:1] + look["figure"][:1] or "xx"
    tail = look["length"][0] + sleeves + look["collar"][0] + ("b" if look["belt"] else "x")
    return look["kind"][0] + look["base"][0] + pattern + tail


def read_state(text: str) -> Look:
    head, pattern, sleeves, collar, *belt = text.split(", ")
    length, base, kind = head.split()
    second, figure = ("", "") if pattern == "plain" else pattern.split()
    assert belt in ([], ["belt"])
    look = {"kind": kind, "base": base, "second": second, "figure": figure, "length": length}
    return look | {"sleeves": sleeves, "collar": collar, "belt": "".join(belt)}


def read_caption(text: str) -> Look:
    """A description in any phrasing, by looking for its words."""
    pattern = re.search(rf"({COLOUR}) ({FIGURE})", text)
    rest = text.replace(pattern[0], "") if pattern else text
    (base,) = re.findall(COLOUR, rest)
    bare = "no sleeves" in text or "sleeveless" in text
    sleeves = "sleeveless" if bare else next(name for name in SLEEVES[1:] if name in text)
    (length,) = re.findall(r"\b(?:short|long)\b", rest if bare else rest.replace(sleeves, ""))
    return {
        "kind": next(name for name in GARMENT_TYPES if name in text),
        "base": base,
        "second": pattern[1] if pattern else "",
        "figure": pattern[2] if pattern else "",
        "length": length,
        "sleeves": sleeves,
        "collar": next(name for name in COLLARS if name in text),
        "belt": "" if "no belt" in text else "belt",
    }


def content_of(candidate: CandidateDraft) -> Look:
    return decode(candidate.sketch) if candidate.text is None else read_caption(candidate.text)


def obey_colours(look: Look, words: str) -> Look | None:
    """Carry out an edit of base and pattern from its words; None if it is about something else."""
    base, second, figure = look["base"], look["second"], look["figure"]

    def change(base: str = base, second: str = second, figure: str = figure) -> Look:
        return look | {"base": base, "second": second, "figure": figure}

    named = re.search(FIGURE, words)
    if words in ("swap its two colours", "base and pattern trade colours"):
        return change(second, base)
    if words == "is plain in the colour of its pattern":
        return change(second, "", "")
    if words in ("has no pattern", "is plain"):
        return change(base, "", "")
    if m := re.fullmatch(rf"(?:loses the|has no) ({FIGURE})", words):
        assert m[1] == figure
        return change(base, "", "")
    if m := re.fullmatch(rf"is ({COLOUR}) with ({FIGURE}) in its old colour", words):
        assert not figure
        return change(m[1], base, m[2])
    if m := re.fullmatch(rf"is ({COLOUR}) with ({COLOUR}) ({FIGURE})", words):
        return change(m[1], m[2], m[3])
    if m := re.fullmatch(rf"(?:has|gets|add) ({COLOUR}) ({FIGURE})( instead)?", words):
        assert bool(m[3]) == bool(figure)
        return change(base, m[1], m[2])
    if m := re.fullmatch(rf"the ({FIGURE}) become ({FIGURE})|has ({FIGURE}) instead of ({FIGURE})", words):
        assert figure == (m[1] or m[4])
        return change(figure=m[2] or m[3])
    if re.search(r"base colour that of the pattern|base takes the colour of", words):
        assert named is None or named[0] == figure
        return change(second, words.split()[-1])
    if re.search(r"pattern colour that of the base|take the colour of the base", words):
        assert named is None or named[0] == figure
        return change(words.split()[-1], base)
    if m := re.fullmatch(rf"(?:has a|make the|the) (?:({COLOUR}) base|base (?:becomes )?({COLOUR}))", words):
        assert figure
        return change(m[1] or m[2])
    if m := re.fullmatch(rf"(?:the|make the) (pattern|{FIGURE}) (?:becomes? )?({COLOUR})", words):
        assert figure and m[1] in ("pattern", figure)
        return change(second=m[2])
    if m := re.fullmatch(rf"(?:is|make it) ({COLOUR})(?: instead)?", words):
        assert not figure
        return change(m[1])
    return None


def obey(look: Look, words: str) -> Look:
    """Carry out one relative caption from its words, with no help from the library."""
    if (changed := obey_colours(look, words)) is not None:
        return changed
    if m := re.fullmatch(r"(?:has|make the) sleeves one size (longer|shorter)", words):
        return look | {"sleeves": SLEEVES[SLEEVES.index(look["sleeves"]) + (1 if m[1] == "longer" else -1)]}
    if words in ("is sleeveless", "has no sleeves"):
        return look | {"sleeves": "sleeveless"}
    if m := re.fullmatch(r"(?:has|with) ((?:short|long) sleeves)(?: instead)?", words):
        return look | {"sleeves": m[1]}
    if words == "has the other length":
        return look | {"length": {"short": "long", "long": "short"}[look["length"]]}
    if m := re.fullmatch(r"(?:is|make it) (longer|shorter)", words):
        goal = m[1].removesuffix("er")
        assert look["length"] != goal
        return look | {"length": goal}
    if m := re.fullmatch(r"(?:has|with|gets) a (round neck|v-neck|high neck)(?: instead)?", words):
        return look | {"collar": m[1]}
    if m := re.fullmatch(r"(has a|gets a|add a|has no|loses the) belt", words):
        assert bool(look["belt"]) == (m[1] in ("has no", "loses the"))
        return look | {"belt": "" if look["belt"] else "belt"}
    m = re.fullmatch(rf"(?:is|turn it into) a ({'|'.join(GARMENT_TYPES)})(?: instead)?", words)
    assert m, words
    return look | {"kind": m[1]}


def check_told(told: list[str], edits: list[str], start: Look) -> Look:
    """Walk `see state; op; state; ...`: each state is what the words ask, and the op says so too."""
    assert read_state(told[0].removeprefix("see ")) == start
    now, passed = start, [start]
    for place, (words, op) in enumerate(zip(edits, told[1::2], strict=True)):
        then = obey(now, words)
        second, figure, base = now["second"], now["figure"], now["base"]
        for part in op.split(", "):
            head, _, tail = part.partition(" ")
            if part == "swap colours":
                base, second = second, base
            elif head == "base":
                base = tail
            elif head == "pattern":
                second, figure = (tail, figure) if tail in COLOURS else (second, tail)
            elif tail in FIGURES:
                second, figure = head, tail
            elif part == "plain":
                second = figure = ""
            else:
                assert part in (*then.values(), "no belt") and (part != "no belt" or not then["belt"])
        assert (then["base"], then["second"], then["figure"]) == (base, second, figure)
        assert then not in passed and then["base"] != then["second"]
        if 2 * place + 2 < len(told):
            assert read_state(told[2 * place + 2]) == then
        now = then
        passed.append(now)
    return now


def all_queries() -> Iterator[tuple[str, str, QueryDraft]]:
    for (row, make), split in itertools.product(ROWS.items(), ("train", "val", "test")):
        for query in make(split, 100, 3):
            yield row, split, query


def count_changes(one: Look, other: Look) -> int:
    """Attributes that differ; a pattern and its colour count once."""
    plain = [key for key in one if key not in ("second", "figure")]
    pattern = (one["second"], one["figure"]) != (other["second"], other["figure"])
    return sum(one[key] != other[key] for key in plain) + pattern


def test_row_names_are_the_row_functions() -> None:
    assert garments.row_names() == tuple(ROWS)


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
                code = candidate.sketch.key.split("_")[1]
                assert keys.setdefault(code, candidate.sketch.key) == candidate.sketch.key


def test_distractors_hold_near_twins_and_never_the_answer() -> None:
    for row, split, query in all_queries():
        if split == "train":
            continue
        target = content_of(query.positives[0])
        others = [content_of(candidate) for candidate in query.distractors]
        assert target not in others
        assert len({code_of(other) for other in others}) == len(others)
        assert sum(count_changes(target, other) == 1 for other in others) >= 8, row
        assert all(other["base"] != other["second"] for other in others)


def test_descriptions_are_right_and_style_gives_nothing_away() -> None:
    queries = list(garments.fashion200k_task3("test", 300, 5))
    targets = [code_of(decode(query.sketch)) for query in queries]
    assert len(set(targets)) == 300
    for query, code in zip(queries, targets, strict=True):
        text = query.positives[0].text
        assert text is not None and code_of(read_caption(text)) == code
        for other in query.distractors:
            assert other.text is not None
            assert (" in " in other.text, other.text[:2] == "a ") == (" in " in text, text[:2] == "a ")
            assert code_of(read_caption(other.text)) not in targets
    for query in garments.fashion200k_task0("val", 60, 5):
        assert query.text is not None and query.steps == 0
        assert read_caption(query.text) == decode(query.positives[0].sketch)


@pytest.mark.parametrize("split", ["train", "test"])
def test_edits_do_what_their_words_say(split: str) -> None:
    queries = list(garments.fashioniq_task7(split, 400, 11))
    assert Counter(query.steps for query in queries) == {1: 160, 2: 120, 3: 120}
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
    for query in garments.fashioniq_task7("test", 80, 2):
        assert query.text is not None and query.sketch is not None
        assert CandidateDraft(sketch=query.sketch) in query.distractors
        others = [decode(candidate.sketch) for candidate in query.distractors]
        now = decode(query.sketch)
        for words in query.text.split(", then ")[:-1]:
            now = obey(now, words)
            assert now in others


def test_most_chains_depend_on_their_order() -> None:
    needed = total = 0
    for query in garments.fashioniq_task7("test", 300, 7):
        if query.steps < 2 or query.text is None:
            continue
        total += 1
        edits, source = query.text.split(", then "), decode(query.sketch)
        try:
            now = source
            for words in reversed(edits):
                now = obey(now, words)
            needed += now != decode(query.positives[0].sketch)
        except (AssertionError, IndexError):
            needed += 1
    assert needed / total > 0.5


def test_training_families_are_hard() -> None:
    queries = list(garments.fashioniq_task7("train", 120, 4))
    for start in range(0, 120, 4):
        family = queries[start : start + 4]
        assert len({query.positives for query in family}) == 4
        sources = [code_of(decode(query.sketch)) for query in family]
        assert len(set(sources[1:])) == 1
        assert sources[0] == sources[1] or code_of(decode(family[0].positives[0].sketch)) == sources[1]
    plain = list(garments.fashion200k_task0("train", 80, 4))
    for start in range(0, 80, 4):
        looks = [decode(query.positives[0].sketch) for query in plain[start : start + 4]]
        assert all(1 <= count_changes(looks[0], look) <= 2 for look in looks[1:])


def test_lessons_are_true_and_of_training_compositions() -> None:
    kinds: Counter[str] = Counter()
    for lesson in garments.lessons(1200, 2):
        edits = "views" if lesson.sketch else "edits"
        assert lesson.kind == ("naming" if lesson.prompt == "name the garment" else edits)
        if lesson.sketch is not None:
            assert split_of(code_of(decode(lesson.sketch))) == "train"
        if lesson.prompt == "name the garment":
            kinds["name"] += 1
            assert read_state(lesson.target) == decode(lesson.sketch)
        else:
            state, _, text = lesson.prompt.rpartition(": ")
            kinds["picture" if lesson.sketch else "words"] += 1
            start = decode(lesson.sketch) if lesson.sketch else read_state(state)
            told, _, answer = lesson.target.rpartition("; ")
            final = check_told(told.split("; "), text.split(", then "), start)
            assert final == read_state(answer)
            assert {split_of(code_of(start)), split_of(code_of(final))} == {"train"}
    shares = {"name": 0.30, "words": 0.50, "picture": 0.20}
    assert all(kinds[kind] / 1200 == pytest.approx(share, abs=0.04) for kind, share in shares.items())


def test_pool_fill_is_unlike_and_right_for_no_held_out_query() -> None:
    for row in ROWS:
        fill = list(garments.pool_fill(row, 200, 1))
        assert len(set(fill)) == 200
        assert all((candidate.text is None) == (row != "fashion200k_task3") for candidate in fill)
        assert {split_of(code_of(content_of(candidate))) for candidate in fill} == {"train"}
    with pytest.raises(InputError, match="no_such_row"):
        next(garments.pool_fill("no_such_row", 1, 1))


def test_asking_for_more_than_a_split_holds_is_refused() -> None:
    with pytest.raises(InputError, match="smaller count"):
        list(garments.fashion200k_task3("val", 2000, 1))


@pytest.mark.parametrize("row", ROWS)
def test_rows_repeat_by_seed(row: str) -> None:
    make = ROWS[row]
    assert list(make("train", 30, 8)) == list(make("train", 30, 8)) != list(make("train", 30, 9))
    assert list(make("test", 30, 8)) == list(make("test", 30, 8)) != list(make("test", 30, 9))
    assert list(garments.lessons(30, 8)) == list(garments.lessons(30, 8))


def test_a_key_stands_for_its_pixels() -> None:
    seen: dict[str, bytes] = {}
    for query in garments.fashion200k_task0("test", 2, 1):
        for candidate in (*query.positives, *query.distractors):
            assert candidate.sketch is not None
            picture = candidate.sketch.draw()
            assert picture.mode == "RGB" and picture.size == (SIZE, SIZE)
            assert seen.setdefault(candidate.sketch.key, picture.tobytes()) == candidate.sketch.draw().tobytes()
    assert len(set(seen.values())) == len(seen)


def test_a_pattern_without_a_colour_is_refused() -> None:
    with pytest.raises(InputError, match="dots"):
        draw_garment("dress", "red", "dots", None, "short", "short", "round", True, 1)


def count_colours(pixels: np.ndarray) -> Counter[str]:
    """How many pixels lie close to each colour of the palette."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], float)
    distance = np.linalg.norm(pixels.reshape(-1, 1, 3) - palette, axis=2)
    near = zip(distance.argmin(axis=1), distance.min(axis=1), strict=True)
    return Counter(names[index] for index, far in near if far < 110)


@pytest.mark.parametrize("kind", GARMENT_TYPES)
def test_both_colours_can_be_told_apart(kind: str) -> None:
    """Both are there at 48 pixels, and the base covers more than the pattern, whatever the variant."""
    for variant, (base, second) in enumerate(itertools.permutations(COLOURS, 2)):
        figure = FIGURES[variant % 3]
        length = ("short", "long")[variant % 2]
        picture = draw_garment(kind, base, figure, second, length, "short", "round", False, variant)
        small = count_colours(np.asarray(picture.reduce(4), float)[14:28, 15:33])
        assert min(small[base], small[second]) >= 30, (base, second, figure, variant, small)
        full = count_colours(np.asarray(picture, float)[52:116, 64:128])
        assert full[base] > full[second], (base, second, figure, variant, full)
