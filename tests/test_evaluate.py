"""evaluate() end to end on a hand-written folder of two rows: ranks, labels, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, image_of
from evaluations import (
    FASHION_ROW,
    TEXT_ROW,
    Planned,
    asks,
    candidate,
    planned_folder,
    write,
    write_instructions,
    write_row,
)

from traceir.data import mbeir
from traceir.errors import DataError, InputError, StoreError
from traceir.evaluation.embeddings import EmbeddingStore
from traceir.evaluation.evaluate import evaluate as evaluate_share
from traceir.evaluation.results import average, read_outcomes, table

BOTH: dict[str, Any] = {"routes": ["auto", "direct"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text row of 10 queries over 30 passages and a fashion row of 6 queries over 24 images; steps 0 to 3."""
    root, draw = tmp_path_factory.mktemp("mbeir"), np.random.default_rng(11)
    (root / "mbeir_images").mkdir()
    for number in range(24):
        image_of(number).load().save(root / f"mbeir_images/{number}.png")

    def words(number: int) -> str:
        return " ".join(["show", *(["then"] * (number % 2)), *draw.choice(WORDS[:-1], int(draw.integers(3, 9)))])

    asked = [asks(f"2:{n}", words(n), [f"2:{n * 2}", f"2:{n * 2 + 1}"]) for n in range(10)]
    write_row(root, TEXT_ROW, asked, [candidate(f"2:{number}", text=words(0)) for number in range(30)])
    edits = [asks(f"7:{n}", words(n), [f"7:{n + 6}"], 7, f"mbeir_images/{n}.png") for n in range(6)]
    write_row(root, FASHION_ROW, edits, [candidate(f"7:{n}", image=f"mbeir_images/{n}.png") for n in range(24)])
    labels = [{"qid": f"7:{n}", "steps": n % 4, "z": int(n % 4 > 1), "reasoning": "one red" if n % 4 > 1 else None,
               "answer": "red cube" if n % 4 > 1 else None} for n in range(6)]  # fmt: skip
    write(root / f"cot/test/mbeir_{FASHION_ROW}_test_cot.jsonl", *labels)
    write_instructions(root, "Find it")
    write(root / "meta.json", '{"fingerprint": "two-rows"}')
    return root


def evaluate(data: Path, out: Path, encoder: Planned | None = None, **options: Any) -> dict[str, Any]:
    """The results of an evaluation that is not one share of several."""
    results = evaluate_share(encoder or Planned(), data, out, progress=False, **options)
    assert results is not None
    return results


def ranks_in(file: Path) -> dict[str, int]:
    return {outcome.qid: outcome.rank for outcome in read_outcomes(file)}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by two routes that was never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(data, out, **BOTH)
    return out


def test_ranks_equal_a_naive_oracle_and_labelled_rows_are_grouped_by_steps(data: Path, whole: Path) -> None:
    results, encoder = json.loads((whole / "results.json").read_text()), Planned()
    outcomes = {(outcome.row, outcome.qid): outcome for outcome in read_outcomes(whole / "queries-auto.jsonl")}
    for task in mbeir.find_tasks(data, "test"):
        records, pool = list(mbeir.read_queries(task.query_path)), list(mbeir.read_pool(task.pool_path))
        items = [mbeir.to_item(candidate, data) for candidate in pool]
        encodings = encoder.encode_items(items)
        hits = {1: 0, 5: 0, 10: 0}
        for record in records:
            (alone,) = encoder.encode_queries([mbeir.to_query(record, "Find it", data)])
            scores = {item.id: float(alone.vector @ encoded.vector) for item, encoded in zip(items, encodings, strict=True)}
            order = sorted(scores, key=lambda did: -scores[did])
            rank = 1 + min(order.index(did) for did in record.positives)
            # M-BEIR's positives beyond the best do not push it down: only wrong ones above it count.
            rank -= sum(did in record.positives for did in order[: rank - 1])
            outcome = outcomes.pop((task.name, record.qid))
            assert (outcome.rank, outcome.route, outcome.reasoning) == (rank, alone.route, alone.reasoning)
            hits = {depth: count + (rank <= depth) for depth, count in hits.items()}
        row = results["routes"]["auto"][task.name]
        assert {depth: row[f"hit@{depth}"] for depth in hits} == {d: round(n / len(records), 4) for d, n in hits.items()}
        depth = 10 if task.name == FASHION_ROW else 5
        assert (row["metric_k"], row["pool"], row["queries"]) == (depth, len(pool), len(records)) and row["reasoned"] == 0.5
    own = [results["routes"]["auto"][TEXT_ROW]["hit@5"], results["routes"]["auto"][FASHION_ROW]["hit@10"]]
    assert results["average"]["auto"] == {"mean": round(sum(own) / 2, 4), "lowest": min(own)}
    assert results["data"] == "two-rows" and not outcomes and "by_steps" not in results["routes"]["auto"][TEXT_ROW]
    groups = results["routes"]["auto"][FASHION_ROW]["by_steps"]
    assert {steps: group["queries"] for steps, group in groups.items()} == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert groups["0"]["exact"] is None and groups["2"]["exact"] == 0.0
    assert {row["reasoned"] for row in results["routes"]["direct"].values()} == {0.0}


def test_ties_count_against_the_query_and_foreign_positives_never_count(tmp_path: Path) -> None:
    plan = {"east": [1.0, 0.0], "north": [0.0, 1.0], "between": [0.6, 0.8]}
    texts = ("a east", "b east", "c between", "d north")
    asked = [
        asks("2:10", "east", ["2:1"]),  # the twin 2:2 scores the same
        asks("2:11", "east", ["2:1", "2:2"]),  # both twins are right
        asks("2:12", "north", ["9:77", "2:3"]),  # 9:77 is no candidate of this pool
        asks("2:13", "north", ["9:77"]),
    ]
    data = planned_folder(tmp_path / "data", asked, [candidate(f"2:{n}", text) for n, text in enumerate(texts, start=1)])
    judgements = "2:10 0 2:1 1 1\n2:11 0 2:1 1 1\n2:12 0 9:77 1 1\n2:13 0 2:4 0 1"
    write(data / f"qrels/test/mbeir_{TEXT_ROW}_test_qrels.txt", judgements)
    evaluate(data, tmp_path / "out", Planned(plan))
    assert ranks_in(tmp_path / "out" / "queries-auto.jsonl") == {"2:10": 2, "2:11": 1, "2:12": 2, "2:13": 5}


def test_written_reasoning_is_compared_with_its_label(tmp_path: Path) -> None:
    asked = [asks(f"2:{n}", "east", ["2:1"]) for n in range(4)]
    data = planned_folder(tmp_path / "data", asked, [candidate("2:1", "east")])
    label = {"steps": 2, "z": 1, "reasoning": "Make one red;", "answer": "Red cube"}
    simple = {"qid": "2:3", "steps": 0, "z": 0, "reasoning": None, "answer": None}
    write(data / f"cot/test/mbeir_{TEXT_ROW}_test_cot.jsonl", *({"qid": f"2:{n}", **label} for n in range(3)), simple)
    right, other = (f"make one {colour}; red cube" for colour in ("red", "blue"))
    evaluate(data, tmp_path / "out", Planned(**{"2:0": right, "2:1": other, "2:3": right}))
    outcomes = read_outcomes(tmp_path / "out" / "queries-auto.jsonl")
    assert {outcome.qid: (outcome.exact, outcome.answer_exact) for outcome in outcomes} == {
        "2:0": (True, True),
        "2:1": (False, True),
        "2:2": (False, False),
        "2:3": (None, None),
    }


def assert_same_files(out: Path, whole: Path) -> None:
    def contents(folder: Path) -> dict[str, Any]:
        files = [file for file in folder.rglob("*") if file.is_file() and "embeddings" not in file.parts]
        texts: dict[str, Any] = {str(file.relative_to(folder)): file.read_text() for file in files}
        texts["results.json"] = results = json.loads(texts["results.json"])
        for row in (row for rows in results["routes"].values() for row in rows.values()):
            del row["queries_per_second"], row["candidates_per_second"]
        return texts

    assert contents(out) == contents(whole)


def interrupt(patch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Notes what is encoded, and ends the process, so to say, at one call (-1: never)."""
    encoded: list[str] = []
    write_block = EmbeddingStore._write

    def noted(self: EmbeddingStore, key: str, chunk: Any, *rest: Any) -> None:
        if len(encoded) == call:
            raise KeyboardInterrupt
        encoded.append(f"{self.identity.kind} {len(chunk)}")
        write_block(self, key, chunk, *rest)

    patch.setattr(EmbeddingStore, "_write", noted)
    return encoded


def test_what_was_scored_or_encoded_before_an_interruption_is_kept(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(data, tmp_path, rows=[TEXT_ROW], **BOTH)
    for call in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, call)
            evaluate(data, tmp_path, **BOTH)
    encoded = interrupt(monkeypatch, -1)
    evaluate(data, tmp_path, **BOTH)
    assert encoded == ["queries-auto 6", "queries-direct 6"], "only what is left of the other row is encoded"
    assert_same_files(tmp_path, whole)
    evaluate(data, tmp_path / "again", cache=tmp_path / "embeddings", **BOTH)
    assert len(encoded) == 2, "a cache serves any number of evaluations"


def test_shards_share_the_encoding_and_the_last_one_scores(data: Path, whole: Path, tmp_path: Path) -> None:
    waiting = [evaluate_share(Planned(), data, tmp_path, shard=(n, 3), progress=False, **BOTH) is None for n in range(3)]
    assert waiting == [True, True, False]
    assert_same_files(tmp_path, whole)


def test_the_global_pool_is_all_local_pools_and_counts_positives_anywhere(tmp_path: Path) -> None:
    """A text row and a second one share a candidate; a positive of the other pool counts in the global pool only."""
    encoder = Planned({"east": [1.0, 0.0], "north": [0.0, 1.0], "between": [0.6, 0.8], "west": [-1.0, 0.0]})
    pool = [candidate("2:1", "a east"), candidate("2:3", "c between")]
    data = planned_folder(tmp_path / "data", [asks("2:10", "north", ["9:7"])], pool)
    write_row(data, "edis_task1", [asks("2:20", "west", ["2:1"])], [candidate("9:7", "d north"), candidate("2:1", "a east")])
    out = tmp_path / "out"
    results = evaluate(data, out, encoder, pools=["local", "global"])
    ranks = [ranks_in(out / f"queries-auto{ending}.jsonl") for ending in ("", "-global")]
    assert ranks == [{"2:10": 3, "2:20": 2}, {"2:10": 1, "2:20": 3}]
    row = results["global"]["auto"][TEXT_ROW]
    assert row["pool"] == 3 and results["routes"]["auto"][TEXT_ROW]["pool"] == 2
    run = (out / "runs" / f"{TEXT_ROW}-auto-global.txt").read_text().splitlines()
    assert [line.split()[2] for line in run] == ["9:7", "2:3", "2:1"] and run[0].split()[:2] == ["2:10", "Q0"]
    only = evaluate(data, tmp_path / "one", encoder, pools=["global"], rows=[TEXT_ROW])["global"]["auto"][TEXT_ROW]
    times = {name: only[name] for name in ("queries_per_second", "candidates_per_second")}
    assert only == row | times, "pools of rows that are not scored are in the global pool all the same"


def test_the_instruction_is_the_first_one_drawn_or_each_in_turn(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    write_instructions(folder, "Find it", "Show a red one", "One cube then", "Any green ball")
    every = evaluate(folder, tmp_path / "all", prompt="all")
    row = every["routes"]["auto"][TEXT_ROW]
    ranks = [ranks_in(tmp_path / "all" / f"queries-auto-prompt{n}.jsonl") for n in (1, 2, 3, 4)]
    each = [round(sum(own[f"2:{n}"] <= 5 for n in range(10)) / 10, 4) for own in ranks]
    assert row["prompts"] == each and row["hit@5"] == pytest.approx(sum(each) / 4, abs=1e-4)
    assert row["prompt_spread"] == pytest.approx(max(each) - min(each), abs=1e-9)
    assert len({tuple(own.items()) for own in ranks}) == 4, "the instructions make a difference to this encoder"
    seeded = evaluate(folder, tmp_path / "seed1", prompt="seeded", seed=1)
    drawn = ranks_in(tmp_path / "seed1" / "queries-auto.jsonl")
    assert all(any(own[qid] == rank for own in ranks) for qid, rank in drawn.items()) and drawn not in ranks
    assert every["prompt"] == "all" and seeded["prompt"] == "seeded 1"


def test_a_broken_folder_is_told_by_file_and_line_or_scored_without_the_broken_parts(data: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    pool = folder / f"cand_pool/local/mbeir_{FASHION_ROW}_cand_pool.jsonl"
    lines = pool.read_text().splitlines()
    whole_line, lines[22] = lines[22], '{"did": "7:22", "txt": '
    pool.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"{FASHION_ROW}_cand_pool\.jsonl:23: not JSON .*--on-error skip"):
        evaluate(folder, out)
    for number in (23, 5):
        (folder / f"mbeir_images/{number}.png").unlink()
    qrels = write(folder / f"qrels/test/mbeir_{FASHION_ROW}_test_qrels.txt", "7:0 0 7:6 1 7\n7:77 0 7:6 1 7")
    results = evaluate(folder, out, on_error="skip")
    row, problems = results["routes"]["auto"][FASHION_ROW], results["problems"]
    assert row["pool"] == 24 - 3 and row["queries"] == 5, "7:22, 7:23 and 7:5 left the pool, query 7:5 left the row"
    assert problems["broken_lines"] == 2 and problems["missing_pictures"] == 3
    assert any("7:77" in text and "_test_qrels.txt:2" in text for text in problems["first"])
    block = next((out / "embeddings").glob("candidates-*/blocks/*/vectors.npy"))
    block.write_bytes(block.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"vectors\.npy is damaged"):
        evaluate(data, tmp_path / "whole", cache=out / "embeddings")
        evaluate(folder, out, rows=[FASHION_ROW])
    assert evaluate(folder, out, on_error="skip")["routes"]["auto"][FASHION_ROW]["hit@10"] == row["hit@10"]
    lines[22] = whole_line
    pool.write_text("\n".join(lines) + "\n")
    qrels.unlink()
    with pytest.raises(DataError, match=r"3 images are missing: .*7:5: mbeir_images/5\.png"):
        evaluate(folder, tmp_path / "other")


def test_results_of_another_model_or_setting_are_not_mixed_in(data: Path, tmp_path: Path) -> None:
    evaluate(data, tmp_path, rows=[TEXT_ROW], limit=1)
    before = (tmp_path / "results.json").read_bytes()
    other = Planned()
    other.fingerprint = "other"
    for encoder, limit, what in (
        (other, 1, "model; choose another --out"),
        (None, None, "limit"),
        (Planned(threshold=0.5), 1, "th"),
    ):
        with pytest.raises(InputError, match=rf"results\.json holds results of another {what}"):
            evaluate(data, tmp_path, encoder, limit=limit)
    assert (tmp_path / "results.json").read_bytes() == before


def test_rows_and_limits_are_those_asked_for(data: Path, tmp_path: Path) -> None:
    results = evaluate(data, tmp_path, rows=["fashioniq"], limit=2)
    assert list(results["routes"]["auto"]) == [FASHION_ROW] and [*ranks_in(tmp_path / "queries-auto.jsonl")] == ["7:0", "7:1"]
    assert results["routes"]["auto"][FASHION_ROW]["pool"] == 24, "the pool stays whole"
    with pytest.raises(InputError, match=r"rows \['mars_task9'\] are not in .*'webqa_task1'"):
        evaluate(data, tmp_path / "out", rows=[TEXT_ROW, "mars_task9"])


@pytest.mark.parametrize(
    ("queries", "pool", "message"),
    [
        (["2:1"], [], r"webqa_task1_cand_pool\.jsonl holds no candidate"),
        ([], ["2:1"], r"webqa_task1_test\.jsonl: the file has no query"),
        (None, [], "query/test"),
    ],
)
def test_empty_files_are_refused_by_name(tmp_path: Path, queries: list[str] | None, pool: list[str], message: str) -> None:
    if queries is not None:
        planned_folder(tmp_path, [asks(qid, "east", ["2:1"]) for qid in queries], [candidate(did, "east") for did in pool])
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_instructions_are_told_before_anything_is_encoded(tmp_path: Path) -> None:
    folder = planned_folder(tmp_path / "data", [asks("2:1", "east", ["2:1"])], [candidate("2:1", "east")])
    instructions = folder / "instructions" / "query_instructions.tsv"
    write(instructions, instructions.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"instructions\.tsv: no instructions for dataset 2"):
        evaluate(folder, tmp_path / "out")
    instructions.unlink()
    with pytest.raises(DataError, match=r"instructions\.tsv: No such file"):
        evaluate(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_and_average_by_hand() -> None:
    row = {"pool": 40, "queries": 8, "hit@1": 0.25, "hit@5": 0.5, "hit@10": 0.75, "reasoned": 0.125, "tokens_per_query": 1.5,
           "queries_per_second": 10.0}  # fmt: skip
    rows = {TEXT_ROW: row | {"metric_k": 5}, FASHION_ROW: row | {"metric_k": 10}}
    assert average(rows) == {"mean": 0.625, "lowest": 0.5}
    lines = table({"routes": {"auto": rows}, "average": {"auto": average(rows)}}).splitlines()
    assert lines[2] == f"| {TEXT_ROW} | auto | local 40 | 8 | 25.0 | **50.0** | 75.0 | 12 % | 1.5 | 10 |"
    assert lines[3].startswith(f"| {FASHION_ROW} | auto | local 40 | 8 | 25.0 | 50.0 | **75.0** |") and "**62.5**" in lines[4]
