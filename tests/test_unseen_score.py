"""Scores of zero-shot tasks: ties, masks, galleries, mean average precision by hand, groups, submissions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder
from PIL import Image

from traceir.errors import DataError, InputError, ModelError
from traceir.evaluation import embedder
from traceir.evaluation.unseen import score as scoring
from traceir.evaluation.unseen.circo import write_submission
from traceir.evaluation.unseen.score import rank_pool, score
from traceir.evaluation.unseen.task import Case, LeftOut, Source, Task
from traceir.items import Content, Encoding, Item, Query, Route

CLOCK = [(1.0, 0.0), (0.9, 0.4358899), (0.6, 0.8), (0.0, 1.0), (-0.6, 0.8), (-1.0, 0.0)]
"""Unit vectors ever further away from the first."""


class Compass:
    """An encoder that looks its vectors up by text; queries point along the first direction unless they are named too."""

    fingerprint = "compass"
    prompt_version = "p1"
    width = 2

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self.vectors = vectors
        self.calls: list[str] = []

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        self.calls.append("items")
        return [self._encode(item) for item in items]

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        self.calls.append(route)
        return [self._encode(query) for query in queries]

    def _encode(self, content: Content) -> Encoding:
        vector = np.array(self.vectors.get(content.text, CLOCK[0]), dtype=np.float32)
        return Encoding(vector, "direct", "", 0, 1.0, False)


def task(cases: Sequence[Case], pool: Mapping[str, Source], *metrics: str, **changes: Any) -> Task:
    made = Task(
        "sample", "Sample", Path("sample.json"), tuple(cases), dict(pool), metrics or ("hit@1",), (metrics or ("hit@1",))[0]
    )
    return replace(made, **changes)


def compass(texts: str) -> Compass:
    """Each letter points further away from the query than the one before."""
    return Compass(dict(zip(texts, CLOCK, strict=False)))


def pool(texts: str) -> dict[str, Source]:
    return {text: text for text in texts}


def values(outcomes: Sequence[scoring.Outcome], metric: str) -> list[float]:
    return [round(outcome.values[metric], 6) for outcome in outcomes]


def test_average_precision_by_hand() -> None:
    cases = [Case("x", ("q",), ("a", "c", "f")), Case("y", ("q",), ("b",)), Case("z", ("q",), tuple("abcdef"))]
    outcomes, summary = score(compass("abcdef"), task(cases, pool("abcdef"), "map@5", "map@2"))
    assert values(outcomes, "map@5") == [round((1 + 2 / 3) / 3, 6), 0.5, 1.0]
    assert values(outcomes, "map@2") == [0.5, 0.5, 1.0]
    assert summary["metrics"]["map@5"] == round((5 / 9 + 0.5 + 1.0) / 3, 4) == summary["value"]
    assert [outcome.rank for outcome in outcomes] == [1, 2, 1] and summary["pool"] == 6


def test_masked_candidates_are_as_if_they_were_not_there() -> None:
    cases = [Case("x", ("q",), ("c",), masked=("a", "b")), Case("y", ("q",), ("c",)), Case("z", ("q",), ("a",), masked=("a",))]
    outcomes, _ = score(compass("abcdef"), task(cases, pool("abcdef"), "hit@1", "hit@50"))
    assert [outcome.rank for outcome in outcomes] == [1, 3, 7]
    assert values(outcomes, "hit@1") == [1, 0, 0]
    assert values(outcomes, "hit@50") == [1, 1, 0], "a right picture that may not be found is a miss at any depth"


def test_ties_count_against_the_query() -> None:
    encoder = Compass({"true": CLOCK[1], "wrong": CLOCK[1], "worse": CLOCK[2]})
    cases = [Case("tie", ("q",), ("true",), gallery=("true", "wrong")), Case("won", ("q",), ("true",), gallery=("true", "worse"))]
    outcomes, summary = score(encoder, task(cases, pool("") | {n: n for n in ("true", "wrong", "worse")}, "accuracy"))
    assert values(outcomes, "accuracy") == [0, 1] and summary["value"] == 0.5


def test_a_gallery_is_all_that_is_ranked() -> None:
    cases = [Case("x", ("q",), ("e",), gallery=("e", "f", "f")), Case("y", ("q",), ("f",), gallery=("f", "e", "e")),
             Case("z", ("q",), ("c",), gallery=("c", "c", "d"))]  # fmt: skip
    outcomes, _ = score(compass("abcdef"), task(cases, pool("abcdef"), "hit@1", "hit@2", "hit@3"))
    assert [outcome.rank for outcome in outcomes] == [1, 3, 1], "what stands twice counts twice, the target never against itself"


def test_galleries_of_different_sizes_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BLOCK", 2)
    galleries = [None, None, None, ("c", "b"), ("c", "d"), ("c", "a"), ("c", "a", "b"), None]
    cases = [Case(str(number), ("q",), ("c",), gallery=gallery) for number, gallery in enumerate(galleries)]
    outcomes, _ = score(compass("abcdef"), task(cases, pool("abcdef")))
    assert [outcome.rank for outcome in outcomes] == [3, 3, 3, 2, 1, 2, 3, 3]
    assert [outcome.case for outcome in outcomes] == [case.id for case in cases]


def test_groups_and_their_mean() -> None:
    cases = [Case(str(n), ("q",), (right,), group=group) for n, (group, right) in enumerate([("g", "a"), ("g", "a"), ("h", "b")])]
    whole = task(cases, pool("ab"), "hit@1")
    _, summary = score(compass("ab"), whole)
    assert summary["groups"] == {"g": {"queries": 2, "hit@1": 1.0}, "h": {"queries": 1, "hit@1": 0.0}}
    assert summary["mean_over_groups"] == {"hit@1": 0.5} and summary["value"] == summary["metrics"]["hit@1"] == 0.6667
    assert score(compass("ab"), replace(whole, by_group=True))[1]["value"] == 0.5


def test_what_was_left_out_is_in_the_summary_by_number_and_name() -> None:
    lost = LeftOut(pictures=(Path("gone.jpg"),), cases=tuple(str(n) for n in range(150)))
    _, summary = score(compass("ab"), task([Case("x", ("q",), ("a",))], pool("ab"), left_out=lost))
    assert summary["left_out"]["pictures"] == {"count": 1, "names": ["gone.jpg"]}
    assert summary["left_out"]["queries"]["count"] == 150 and len(summary["left_out"]["queries"]["names"]) == scoring.NAMED


def test_the_pool_is_encoded_once_in_pieces_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedder, "AT_ONCE", 4)
    encoder, asked = compass("abcdef"), task([Case(str(n), ("q",), ("a",)) for n in range(5)], pool("abcdef"))
    plain = score(encoder, asked, route="direct")
    assert encoder.calls == ["items", "items", "direct", "direct"]
    assert score(encoder, asked, route="direct", cache=tmp_path) == plain == score(encoder, asked, route="direct", cache=tmp_path)
    assert encoder.calls == ["items", "items", "direct", "direct"] * 2, "the second time all of it comes from the cache"


def test_vectors_that_are_not_finite_and_unknown_metrics_are_refused() -> None:
    cases = [Case("x", ("q",), ("a",))]
    with pytest.raises(ModelError, match="not finite"):
        score(Compass({"a": (float("nan"), 0.0)}), task(cases, pool("ab")))
    with pytest.raises(InputError, match=r"metrics \['ndcg@5'\] are unknown"):
        score(compass("ab"), task(cases, pool("ab"), "ndcg@5"))


def test_a_submission_holds_fifty_image_ids_best_first(tmp_path: Path) -> None:
    angles = np.linspace(0, np.pi / 2, 60)
    encoder = Compass({f"p{n}": (float(np.cos(a)), float(np.sin(a))) for n, a in enumerate(angles)})
    images: dict[str, Source] = {str(1000 + n): f"p{n}" for n in range(60)}
    unanswered = task([Case("0", ("q",), ()), Case("1", ("q",), (), masked=("1001",))], images, "map@5")
    with pytest.raises(InputError, match="query 0 has no right candidate"):
        score(encoder, unanswered)
    rankings = rank_pool(encoder, unanswered, 50)
    path = tmp_path / "out" / "submission.json"
    write_submission(path, rankings)
    written = json.loads(path.read_text())
    assert written["0"] == list(range(1000, 1050)) and written["1"] == [1000, *range(1002, 1051)]
    assert [file.name for file in path.parent.iterdir()] == ["submission.json"]
    with pytest.raises(DataError, match="query 0: 49 different images"):
        write_submission(path, {"0": rankings["0"][:49]})
    with pytest.raises(InputError, match="galleries of their own"):
        rank_pool(encoder, task([Case("x", ("q",), (), gallery=("1000",))], images), 1)


def test_images_are_read_and_equal_content_is_found(tmp_path: Path) -> None:
    files: dict[str, Source] = {}
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 20, 90)).save(tmp_path / f"{number}.png")
        files[str(number)] = tmp_path / f"{number}.png"
    cases = [Case(str(n), (tmp_path / f"{n}.png",), (str(n),), instruction="find it") for n in range(4)]
    outcomes, summary = score(FakeEncoder(), task(cases, files))
    assert [outcome.rank for outcome in outcomes] == [1, 1, 1, 1] and summary["reasoned"] == 0.0
    mixed = cases[0].query()
    assert mixed.instruction == "find it" and mixed.modality == "image" and mixed.target == "image"
