"""The quality report of M-BEIR-CoT: every figure worked out by hand on invented outcomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from traceir.cot.ask import CotCase
from traceir.cot.outcomes import CotOutcome
from traceir.cot.products import page, summary
from traceir.cot.quality.quality import measure, read_quality, save_quality
from traceir.cot.quality.texts import diversity, introduced, longest_copy, near_duplicates
from traceir.cot.review.decisions import Decision
from traceir.cot.review.review import Settled, sample_hash
from traceir.data.mbeir import TASK_MODALITIES, Candidate, Record
from traceir.errors import DataError, InputError


def outcome(qid: str, reasoning: str = "", answer: str = "a thing", *, target: str | None = None, **more: Any) -> CotOutcome:
    """A kept sample of a task from image and text to an image, or to a text where `target` is given."""
    task_id = 7 if target is None else 6
    query, candidate = TASK_MODALITIES[task_id]
    positive = Candidate(qid, target, "b.png" if target is None else None, candidate)
    record = Record(qid, more.pop("text", "make it red"), "a.png", query, (qid,), (), task_id)
    case = CotCase(record, more.pop("task", f"invented_task{task_id}"), "Find it.", (positive,), Path())
    plain: dict[str, Any] = {
        "z": 1, "assessment": "", "confidence": 1.0, "reasoning": reasoning, "answer": answer, "raw": f"<{reasoning}>",
        "status": "kept", "rule": "", "detail": "", "verdict": True, "verdict_confidence": 0.9, "verdict_reason": "",
        "provenance": json.dumps({"teacher": "t", "prompts": "cot-1", "prompt_tokens": 100, "completion_tokens": 10}),
    }  # fmt: skip
    return CotOutcome(case=case, **{**plain, **more})


def dropped(qid: str, rule: str, verdict: bool | None = None, **more: Any) -> CotOutcome:
    confidence = -1.0 if verdict is None else 0.3
    detail = {"detail": f"why {qid}", "verdict": verdict, "verdict_confidence": confidence}
    return outcome(qid, "words", status="dropped", rule=rule, **{**detail, **more})


def test_funnel_rules_cost_and_what_people_settled() -> None:
    quality = measure(
        [
            outcome("1:1", "one two three four five"),
            outcome("1:2", "one two three four six"),
            outcome("1:3", z=0, status="direct", verdict=None, verdict_confidence=-1.0),
            dropped("1:4", "teacher", z=0),  # the assessment failed
            dropped("1:5", "teacher", raw=""),  # no reply
            dropped("1:6", "tags"),
            *(dropped(f"1:1{n}", "language") for n in range(5)),
            dropped("1:7", "verifier", verdict=False),
            dropped("1:8", "teacher", verdict=False),  # the verifier's reply could not be read
            dropped("1:9", "duplicate", verdict=True),
            outcome("2:1", "all is well", target="a long enough target text"),
        ],
    )
    own = quality.tasks["invented_task7"]
    assert list(own.funnel.items()) == [
        ("queries", 14), ("complex", 12), ("reasoned", 11), ("passed_rules", 5), ("verified", 3), ("kept", 2), ("curated", 2),
    ]  # fmt: skip
    assert own.kept_share == round(2 / 12, 4) and quality.overall.funnel["queries"] == 15
    drops = {"teacher": 3, "tags": 1, "language": 5, "duplicate": 1, "verifier": 1}
    assert {rule: n for rule, n in own.rules.items() if n} == drops
    assert [*own.rules][:2] == ["teacher", "refusal"] and [*own.rules][-2:] == ["verifier", "reviewer"]
    assert [example["qid"] for example in own.examples["language"]] == ["1:10", "1:11", "1:12"]
    assert own.examples["tags"] == [{"qid": "1:6", "task": "invented_task7", "detail": "why 1:6", "text": "<words>"}]
    assert own.confidence["yes"][18] == 2 and own.confidence["yes"][6] == 1 and own.confidence["no"][6] == 1
    assert sum(own.confidence["no"]) == 1  # what could not be read has no confidence
    assert quality.made_by["teacher"] == {"t": 15}
    assert quality.cost == {"prompt_tokens": 1500.0, "completion_tokens": 150.0}
    settled = {
        "1:2": Settled("drop", "to be dropped", "a thing", ("ann",)),
        "1:3": Settled("keep", "edited by a person", "a thing", ("ann",), True),
    }
    stream = [outcome("1:1", "as it was"), outcome("1:2", "to be dropped"), dropped("1:3", "verifier", verdict=False)]
    own = measure(stream, settled=settled).overall
    assert own.funnel["kept"] == 2 and own.funnel["curated"] == 2 and own.rules["reviewer"] == 1 and own.rules["verifier"] == 0
    assert [opening["words"] for opening in own.openings["top"]] == ["as it was", "edited by a person"]
    with pytest.raises(InputError, match="no outcome"):
        measure([])


def test_lengths_repetition_and_diversity() -> None:
    sentence = "the chair is red now and it stands on four thin legs"  # 12 words: 10 shingles
    near = f"{sentence} of oak"  # 12 shingles, 10 of them shared
    far = "the chair is red now but nothing else of what you see there stays the same"
    own = measure(outcome(f"1:{n}", text) for n, text in enumerate([sentence, sentence.upper() + "!", near, far])).overall
    lengths = own.lengths["reasoning_words"]
    assert (lengths["quantiles"]["0.50"], lengths["most"]) == (12, 16)
    assert lengths["histogram"] == [[12, 12, 2], [13, 13, 0], [14, 14, 1], [15, 15, 0], [16, 16, 1]]
    assert own.lengths["reasoning_tokens"]["mean"] == (12 + 13 + 14 + 16) / 4
    assert own.openings["top"] == [{"words": "the chair is red", "samples": 4}] and own.openings["share"] == 1.0
    assert own.duplicates["exact"] == {"samples": 4, "surplus": 1, "share": 0.25}
    assert own.duplicates["near"] == {"samples": 4, "surplus": 2, "share": 0.5, "threshold": 0.8}
    words = [f"w{n}" for n in range(20)]  # 18 shingles
    # 18 / 21 = 0.857; the third shares 16 of 20 with the first: 0.8
    assert near_duplicates([words, [*words, "more", "of", "it"], ["x", *words[1:-1], "y"]]) == [False, True, True]
    assert near_duplicates([words, ["x", "y", *words[2:-1], "z"]]) == [False, False]  # 15 of 21
    assert near_duplicates([["a", "b"], ["a", "b"], ["a", "c"], []]) == [False, True, False, False]
    measured = diversity([["a", "b", "a", "b"], ["a", "c"]])
    assert (measured["distinct_1"], measured["distinct_2"], measured["moving_ratio"]) == (0.5, 0.75, 0.5)
    assert diversity([["a"] * 50, ["b"]])["moving_ratio"] == (1 + 2) / 2 / 50 and diversity([])["distinct_1"] == 0.0


@pytest.mark.parametrize(
    ("text", "known", "terms"),
    [
        ("a white cube on a black dress from Turkey, baby blue, near a French press", "", set()),
        ("The women's black dress", "", {("gender", "women")}),
        ("an old white man with a male plug", "", {("age", "old"), ("gender", "man"), ("skin", "white")}),
        ("a potato with pale skin", "", set()),
        ("a nurse with pale skin", "", {("skin", "pale")}),
        ("she smiles", "a photo of two ladies", set()),
        ("the dark-skinned person", "a person in a dark coat", {("skin", "dark-skinned")}),
        ("the Japanese painter", "a painter from Japan", set()),
        ("the Japanese painter", "a painter", {("origin", "japanese")}),
        ("an African American woman", "a woman", {("origin", "african american")}),
        ("a black and white photo of the Isle of Man", "", set()),
        ("a Buddhist temple, then Muslim children", "the kids", {("religion", "muslim")}),
        ("The guest looks elderly", "", {("age", "elderly")}),
        ("HE WAITS", "the boy", set()),
    ],
)
def test_terms_about_people(text: str, known: str, terms: set[tuple[str, str]]) -> None:
    assert {(term.group, term.name) for term in introduced(text, known)} == terms


def test_people_by_what_the_data_tell() -> None:
    stream = [
        outcome("1:1", "an old man waits", target="a bench with an elderly guest"),  # tells the age
        outcome("1:2", "the woman waits", text="her hat in red", target="a hat on a shelf"),  # the query tells
        outcome("1:3", "nobody waits", target="a bench"),
        outcome("1:4", "a young woman waits"),  # the target is an image
        outcome("1:5", "a guy and a lady wait", task="invented_task6", target="a picture"),
    ]
    people = measure(stream).overall.people
    known, untold = people["told"], people["untold"]
    assert (known["samples"], known["holding"], known["share"]) == (4, 2, 0.5)
    assert {name: own["samples"] for name, own in known["groups"].items()} == {"gender": 2}
    terms = {term["term"]: term for term in known["groups"]["gender"]["terms"]}
    assert set(terms) == {"man", "guy", "lady"} and terms["man"]["samples"] == 1
    assert terms["man"]["examples"] == [{"qid": "1:1", "task": "invented_task6", "words": "man"}]
    assert (untold["samples"], untold["holding"]) == (1, 1) and set(untold["groups"]) == {"gender", "age"}
    captioned = measure(stream[3:4], captions={"b.png": "a girl on a bench"}).overall.people
    assert captioned["told"]["share"] == 0.0 and captioned["untold"]["samples"] == 0


def test_copies_of_the_target() -> None:
    target = "a b c d e f g h i j"
    assert longest_copy([["x", "c", "d", "e", "y"]], target.split(), []) == ["c", "d", "e"]
    assert longest_copy([target.split()], target.split(), ["c", "d", "e"]) == ["f", "g", "h", "i", "j"]
    assert longest_copy([["x"]], target.split(), []) == [] == longest_copy([["x"]], [], [])
    copies = measure(
        [
            outcome("1:1", "it is a b c d e f g h", target=target),  # 8 in a row
            outcome("1:2", "it is a b c d e f g x", target=target),  # 7
            outcome("1:3", "it is a b c d e f g h", text="what a b c d means", target=target),  # the query says four of them
            outcome("1:4", "so", answer="The red barn.", target="the red barn"),  # short, and said whole
            outcome("1:5", "so", answer="The red barn.", text="Where is the red barn", target="the red barn"),
            outcome("1:6", "so", answer="A barn.", target="barn"),  # a name
            outcome("1:7", "the target is a picture"),
        ]
    ).overall.copied
    assert (copies["samples"], copies["run"], copies["whole"], copies["either"], copies["share"]) == (6, 1, 1, 2, round(2 / 6, 4))
    assert copies["longest"]["most"] == 8 and [own["copied"] for own in copies["examples"]] == ["a b c d e f g h", "the red barn"]


def test_hallucination_is_estimated_from_random_reviews_of_kept_samples() -> None:
    first = [outcome(f"1:{n}", f"number {n} is it") for n in range(30)]
    second = [outcome(f"2:{n}", f"number {n} is it", target="some text") for n in range(10)]
    bad, unseen = dropped("4:1", "tags"), outcome("3:1", "never looked at", task="unseen_task7")

    def vote(sample: CotOutcome, decision: str, why: str = "", how: str = "random") -> Decision:
        return Decision(sample.case.record.qid, sample.case.task, decision, sample_hash(sample), why, how=how)

    votes = [vote(sample, "keep") for sample in first[:8]] + [vote(first[8], "drop", "hallucination"), vote(first[9], "edit")]
    votes += [vote(sample, "keep") for sample in second[:3]] + [vote(second[3], "drop", "vague")]
    votes += [vote(first[10], "drop", "hallucination", how="doubt"), vote(bad, "drop", "hallucination")]
    votes += [replace(vote(first[11], "drop", "hallucination"), sample="of another text")]
    decisions = {"ann": {own.qid: own for own in votes}, "bob": {"1:0": vote(first[0], "keep")}}
    quality = measure([*first, *second, unseen, bad], decisions=decisions)
    own, fault = quality.hallucination, quality.fault
    assert (own["reviewed"], own["wrong"], fault["wrong"]) == (14, 1, 3)
    assert own["share"] == round(0.75 * 1 / 10, 4) and fault["share"] == round(0.75 * 2 / 10 + 0.25 * 1 / 4, 4)
    assert own["covered"] == round(40 / 41, 4) and own["effective"] == round(1 / (0.75**2 / 10 + 0.25**2 / 4), 2)
    assert own["low"] < own["share"] < own["high"] and own["tasks"]["unseen_task7"]["share"] is None
    # Wilson (1927), as in Brown, Cai and DasGupta (2001)
    assert own["tasks"]["invented_task7"] == {"kept": 30, "reviewed": 10, "wrong": 1, "share": 0.1, "low": 0.0179, "high": 0.4042}


def test_figures_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<script>alert(1)</script> $x_1$ & an old man"
    quality = measure([outcome("1:1", evil, task="a<b>$c$|_task7"), replace(dropped("1:2", "tags"), raw=evil, detail=evil)])
    save_quality(tmp_path / "quality.json", quality)
    assert read_quality(tmp_path / "quality.json") == quality
    text = page(quality)
    assert text == page(read_quality(tmp_path / "quality.json"))
    assert "<script" not in text and "&lt;script&gt;" in text and "a&lt;b&gt;$c$" in text and "://" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and text.count("<svg") == 6
    assert "a\\<b\\>\\$c\\$\\|" in summary(quality) and "not reviewed" in summary(quality)
    (tmp_path / "quality.json").write_text('{"name": "M-BEIR-CoT quality", "format": 99}')
    with pytest.raises(DataError, match="format 1"):
        read_quality(tmp_path / "quality.json")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="TMPDIR"):
        measure([outcome("1:1")])
