"""The bundled checkpoint on the small MiniBEIR: it finds, it routes, and what it writes is what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from traceir.checkpoint import bundled_model
from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError
from traceir.evaluation.evaluate import dry_run, evaluate
from traceir.evaluation.results import QueryOutcome, read_outcomes
from traceir.evaluation.unseen.run import COLUMNS, dry_run_unseen, evaluate_unseen, submit_circo, table
from traceir.items import Item, Query
from traceir.lab.examples import choose, write_examples
from traceir.lab.faithful import probe

LIMIT = 8


def test_it_is_small_and_ordinary_and_finds_sentences_of_its_world(encoder: Encoder) -> None:
    files = list(bundled_model().iterdir())
    assert sum(file.stat().st_size for file in files) < 32 * 2**20
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pkl"}]
    assert (encoder.fingerprint, encoder.prompt_version, encoder.width) == ("a56f2afe30f8bb05", "brief-1", 128)
    sentence = "On the left a white ring, in the middle a blue ring, on the right a purple ring."
    others = [sentence.replace("white", "green"), sentence.replace("blue ring", "red cube"), sentence.replace("ring", "mug")]
    items = np.stack([encoding.vector for encoding in encoder.encode_items([Item.of(text=text) for text in (sentence, *others)])])
    (query,) = encoder.encode_queries([Query.of(text=sentence, target="text")])
    assert query.route == "direct" and query.emb_probability == pytest.approx(0.73663, abs=1e-4)
    assert int((items @ query.vector).argmax()) == 0
    (reasoned,) = encoder.encode_queries([Query.of(text=sentence, target="text")], route="reason")
    assert reasoned.route == "reason" and reasoned.tokens > 0 and reasoned.reasoning


@pytest.mark.slow
def test_it_finds_in_every_row_and_thinks_when_a_query_needs_it(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    evaluate(encoder, folder, tmp_path, limit=LIMIT, progress=False)
    judged = read_outcomes(tmp_path / "queries-auto.jsonl")
    rows = {row: [outcome.rank <= 10 for outcome in judged if outcome.row == row] for row in mbeir.EVAL_ROWS}
    assert all(len(hits) == LIMIT for hits in rows.values())
    means = [float(np.mean(hits)) for hits in rows.values()]
    assert np.mean(means) > 0.85 and min(means) > 0.5, means
    simple = [outcome.route == "reason" for outcome in judged if outcome.steps is not None and outcome.steps < 2]
    complex_ = [outcome.route == "reason" for outcome in judged if outcome.steps is not None and outcome.steps >= 2]
    assert len(simple) > 80 and len(complex_) > 30 and np.mean(simple) <= 0.05 and np.mean(complex_) >= 0.9
    reasoned = [own for own in judged if own.route == "reason"]
    assert np.mean([bool(own.exact) for own in reasoned]) > 0.3 and np.mean([own.truncated for own in reasoned]) < 0.05


@pytest.mark.slow
def test_vectors_follow_the_reasoning_put_in_its_mouth(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    probes = {p.kind: p for p in probe(encoder, folder, tmp_path, rows=["infoseek_task6"], limit=10, progress=False)}
    assert probes["own"].cosine > 0.9999, "its own reasoning, read again, gives its own vector"
    assert probes["label"].hit_k >= probes["own"].hit_k > probes["swapped"].hit_k
    assert probes["swapped"].hit_1_of_other is not None and probes["swapped"].hit_1_of_other > probes["swapped"].hit_1
    assert "swapped" in (tmp_path / "faithful.md").read_text() and (tmp_path / "faithful.json").is_file()
    with pytest.raises(InputError, match="no row"):
        probe(encoder, folder, tmp_path, rows=["nights_task4"], progress=False)


@pytest.mark.slow
def test_a_page_of_hits_and_misses_shows_them(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    evaluate(encoder, folder, tmp_path / "scores", rows=["mscoco", "infoseek_task6"], limit=8, progress=False)
    page = write_examples(tmp_path / "scores", folder, tmp_path / "page").read_text()
    rows: dict[str, list[QueryOutcome]] = {}
    for outcome in read_outcomes(tmp_path / "scores" / "queries-auto.jsonl"):
        rows.setdefault(outcome.row, []).append(outcome)
    shown = [outcome for judged in rows.values() for outcome in choose(judged, 5)]
    assert len(rows) == 3 and len(shown) >= 4 and all(f"query {outcome.qid}<" in page for outcome in shown)
    assert page.count("<section>") == len(shown) and page.count('class="mark"') >= sum(outcome.rank == 1 for outcome in shown)
    shutil.rmtree(tmp_path / "scores" / "runs")
    with pytest.raises(DataError, match=r"runs/.*-auto\.txt"):
        write_examples(tmp_path / "scores", folder, tmp_path / "page")


@pytest.mark.slow
def test_the_unseen_sets_are_scored_by_every_route(encoder: Encoder, unseen_folder: Path, tmp_path: Path) -> None:
    root, out = unseen_folder, tmp_path / "out"
    results = evaluate_unseen(encoder, root, out, routes=["auto", "direct"], progress=False)
    assert list(results["routes"]["auto"]) == list(COLUMNS) == list(results["routes"]["direct"])
    assert all(0.0 <= score["value"] <= 1.0 and score["queries"] > 0 for score in results["routes"]["auto"].values())
    assert results["data"] and all(score["reasoned"] == 0.0 for score in results["routes"]["direct"].values())
    text, dry = table(results), dry_run_unseen(root)
    assert "published" in text and all(f"| {name} |" in text for name in COLUMNS)
    assert all(f"| {name} | {results['routes']['auto'][name]['queries']} |" in dry for name in COLUMNS)
    again = evaluate_unseen(encoder, root, out, routes=["auto"], columns=["circo"], progress=False)
    assert again["routes"] == results["routes"], "columns scored before are kept"
    for source, target, missing, message in (
        (root, out, "skip", "holds results of another missing"),
        (root, tmp_path / "kept", "keep", "is for dry runs"),
        (tmp_path, tmp_path / "other", "stop", "no zero-shot set"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_unseen(encoder, source, target, missing=missing, progress=False)
    file = submit_circo(encoder, root, tmp_path / "submission.json", cache=out / "embeddings", progress=False)
    assert {len(ids) for ids in json.loads(file.read_text()).values()} == {50}


@pytest.mark.slow
def test_a_dry_run_counts_and_estimates(encoder: Encoder, folder: Path) -> None:
    text = dry_run(encoder, folder, rows=["cirr", "webqa_task1"], sample=2)
    assert "| cirr_task7 |" in text and "| webqa_task1 |" in text and "0 broken lines, 0 missing images" in text
    assert "Encoding all of it takes about" in text
