"""The entity world: its facts, emblems, questions, and what training is never asked."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from traceir.errors import InputError
from traceir.minibeir import emblems, encyclopedia, entities
from traceir.minibeir.draft import CandidateDraft, QueryDraft, Split
from traceir.minibeir.entities import Group, Path

ROWS = entities.row_names()
TRAIN = 600


@cache
def make(row: str, split: Split, count: int = 200) -> tuple[QueryDraft, ...]:
    return tuple(getattr(entities, row)(split, count, 7))


@cache
def list_questions() -> dict[tuple[str, str | None], Path]:
    """Every question that can be asked, with the name whose emblem stands beside it, and the path it asks."""
    found: dict[tuple[str, str | None], Path] = {}
    for recipe in entities.RECIPES.values():
        for group, _ in recipe.shares:
            for path in entities._list_paths(group):
                for phrasing in range(entities.PHRASINGS):
                    text = entities.ask_path(path, phrasing, seen=recipe.seen)
                    name = path.start.name.lower() if recipe.seen else None
                    assert found.setdefault((text, name), path) == path, f"{text!r} asks for two things"
    return found


def trace(draft: QueryDraft) -> Path:
    """The path of a query, known from its words and its picture alone."""
    name = draft.sketch.key.split("-")[1] if draft.sketch else None
    return list_questions()[draft.text or "", name]


def content(draft: CandidateDraft) -> tuple[str | None, str | None]:
    return draft.text, draft.sketch.key if draft.sketch else None


def test_the_encyclopedia_is_large_short_and_without_doubles() -> None:
    passages = list(encyclopedia.list_passages())
    assert len(passages) == len({passage.text for passage in passages}) >= 1050
    for passage in passages:
        assert len(passage.text.split()) <= 14
        assert encyclopedia.state_fact(passage.entity, passage.facet) in passage.text.lower()


def test_relations_lead_to_entities_of_the_right_kind() -> None:
    for kind, facets in encyclopedia.FACETS.items():
        for relation in (facet for facet in facets if facet in encyclopedia.RELATIONS):
            reached = {encyclopedia.follow_relation(entity, relation) for entity in encyclopedia.list_entities(kind)}
            assert reached == set(encyclopedia.list_entities(encyclopedia.RELATIONS[relation]))
    with pytest.raises(InputError, match="food"):
        encyclopedia.state_value(encyclopedia.list_entities("sea")[0], "food")
    with pytest.raises(InputError, match="Nowhere"):
        encyclopedia.find_entity("Nowhere")


def test_the_world_stays_as_published() -> None:
    texts = "\n".join(passage.text for passage in encyclopedia.list_passages())
    looks = "\n".join(str(emblems.find_emblem(entity)) for entity in encyclopedia.list_entities())
    assert (encyclopedia.hash_stably(texts), encyclopedia.hash_stably(looks)) == PUBLISHED


PUBLISHED = (2594738635, 805591435)
"""Changes only with a new version of the benchmark."""


def test_emblems_are_unique_and_never_tone_on_tone() -> None:
    looks = [emblems.find_emblem(entity) for entity in encyclopedia.list_entities()]
    assert len(set(looks)) == len(looks) == 202
    assert len({look.outline for look in looks}) == 7
    for look in looks:
        assert look.field != look.colour and (look.field, look.colour) not in emblems.PALE_PAIRS


def test_equal_keys_have_equal_pixels_and_variants_differ() -> None:
    entity = encyclopedia.list_entities("town")[3]
    picture = emblems.sketch_emblem(entity, 5).draw()
    assert (picture.size, picture.mode) == ((192, 192), "RGB")
    assert picture.tobytes() == emblems.sketch_emblem(entity, 5).draw().tobytes()
    assert picture.tobytes() != emblems.sketch_emblem(entity, 6).draw().tobytes()


def test_emblems_of_one_field_differ_at_48_pixels() -> None:
    pictures = [
        emblems.draw_emblem(emblems.Emblem("shield", "yellow", charge, "black"), 1).resize((48, 48)).tobytes()
        for charge in emblems.CHARGES
    ]
    for place, one in enumerate(pictures):
        for other in pictures[place + 1 :]:
            assert sum(abs(a - b) > 60 for a, b in zip(one, other, strict=True)) > 100


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_deterministic_and_follow_the_seed(row: str) -> None:
    for split in ("train", "val", "test"):
        maker = getattr(entities, row)
        first, again, other = (list(maker(split, 22, seed)) for seed in (1, 1, 2))
        assert first == again != other
        assert len(first) == 22


def test_a_question_asks_for_one_thing_only() -> None:
    assert len(list_questions()) > 5000


@pytest.mark.parametrize("row", ROWS)
def test_queries_lead_to_their_passage_in_the_stated_steps(row: str) -> None:
    for split in ("train", "test"):
        for draft in make(row, split):
            path = trace(draft)
            assert [positive.text for positive in draft.positives] == [path.find_target().text]
            assert draft.steps == len(path.hops) + (draft.sketch is not None)
            assert (draft.steps >= 2) == (draft.reasoning is not None) == (draft.answer is not None)


@pytest.mark.parametrize("row", ROWS)
def test_reasoning_and_answer_agree_with_the_passages(row: str) -> None:
    told = " ".join(passage.text.lower() for passage in encyclopedia.list_passages())
    for draft in make(row, "test"):
        if draft.reasoning is None or draft.answer is None:
            continue
        facts = draft.reasoning.split("; ")
        if draft.sketch:
            assert facts.pop(0) == f"this is {draft.sketch.key.split('-')[1]}"
        assert facts and all(fact in told for fact in facts)
        assert draft.answer in (draft.positives[0].text or "").lower()
        assert facts[-1].split()[-1] in draft.answer.split()


@pytest.mark.parametrize("row", ROWS)
def test_training_never_asks_for_a_held_out_edge_or_a_test_path(row: str) -> None:
    for draft in make(row, "train", TRAIN):
        path = trace(draft)
        assert not entities.uses_held_out(path)
        if path.hops or path.facet != encyclopedia.INTRO:
            assert entities.assign_split(path) == "train"


def test_questions_and_renderings_of_test_are_new() -> None:
    trained = {(draft.text, draft.sketch and draft.sketch.key) for row in ROWS for draft in make(row, "train", TRAIN)}
    paths = {trace(draft) for row in ROWS for draft in make(row, "train", TRAIN)}
    tested = {trace(draft) for row in ROWS for split in ("val", "test") for draft in make(row, split)}
    for row in ROWS:
        for draft in (*make(row, "val"), *make(row, "test")):
            assert (draft.text, draft.sketch and draft.sketch.key) not in trained
    assert all(path.facet == encyclopedia.INTRO and not path.hops for path in paths & tested)


@pytest.mark.parametrize("row", ROWS)
def test_half_of_the_complex_test_queries_use_held_out_edges(row: str) -> None:
    used = Counter((draft.steps >= 2, entities.uses_held_out(trace(draft))) for draft in make(row, "test"))
    assert used[True, True] / (used[True, True] + used[True, False]) == pytest.approx(0.5, abs=0.06)
    assert used[False, True] == 0


def test_about_18_percent_of_the_edges_are_held_out() -> None:
    towns = encyclopedia.list_entities("town")
    held = [entities.is_held_out(town, relation) for town in towns for relation in ("river", "founder", "land")]
    assert sum(held) / len(held) == pytest.approx(0.18, abs=0.05)
    assert not entities.is_held_out(encyclopedia.list_entities("river")[0], "sea")


@pytest.mark.parametrize("row", ROWS)
def test_twins_are_many_and_never_right(row: str) -> None:
    for draft in make(row, "test"):
        twins = {content(twin) for twin in draft.distractors}
        assert len(twins) >= 8
        assert not twins & {content(positive) for positive in draft.positives}


@pytest.mark.parametrize("row", ROWS)
def test_training_families_have_four_answers(row: str) -> None:
    drafts = make(row, "train", TRAIN)
    for start in range(0, TRAIN, 4):
        family = drafts[start : start + 4]
        assert len({draft.positives for draft in family}) == 4
        assert len({draft.steps for draft in family}) == 1
        assert all(draft.distractors == () for draft in family)


@pytest.mark.parametrize("row", ROWS)
def test_pool_fill_is_the_whole_encyclopedia_and_holds_every_answer(row: str) -> None:
    pool = {content(candidate) for candidate in entities.pool_fill(row, 10, 0)}
    assert len(pool) == len(list(encyclopedia.list_passages()))
    for draft in make(row, "test"):
        assert pool >= {content(candidate) for candidate in (*draft.positives, *draft.distractors)}
    with pytest.raises(InputError, match="infoseek_task6"):
        next(entities.pool_fill("cirr_task7", 1, 0))


def test_lessons_tell_every_fact_and_ask_only_training_questions() -> None:
    drafts = list(entities.lessons(4000, 3))
    imaged = sum(lesson.sketch is not None for lesson in drafts)
    chains = [lesson for lesson in drafts if "; " in lesson.target]
    assert imaged / 4000 == pytest.approx(0.35, abs=0.03)
    assert len(chains) / 4000 == pytest.approx(0.20, abs=0.03)
    facts = {lesson.target for lesson in drafts if not lesson.sketch and lesson not in chains}
    told = {encyclopedia.state_fact(passage.entity, passage.facet) for passage in encyclopedia.list_passages()}
    assert facts == told
    for lesson in drafts:
        path = list_questions().get((lesson.prompt, None))
        assert path is None or entities.assign_split(path) == "train"
        assert path is None or lesson.target.endswith(path.answer())
    assert all((lesson.prompt, None) in list_questions() for lesson in chains)


def test_groups_cover_the_paths_they_name() -> None:
    assert len(entities._list_paths(Group(0, intro=True))) == 202
    assert len(entities._list_paths(Group(2))) == 96 * (3 + 2 + 2)
    assert len(entities._list_paths(Group(1, towns=True))) == 96 * 9
