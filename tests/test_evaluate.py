"""evaluate() end to end on a hand-written folder of two rows: ranks, labels, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, both_roads, picture, random_model

from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError, StoreError
from traceir.evaluation.embeddings import EmbeddingStore
from traceir.evaluation.evaluate import evaluate as evaluate_share
from traceir.evaluation.judged import average, read_judged, table
from traceir.items import Encoding, Item, Query, Vector

HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"
TEXT_ROW, FASHION_ROW = "webqa_task1", "fashioniq_task7"


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def words(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(WORDS, int(draw.integers(3, 9))))


def query(qid: str, text: str, positives: list[str], task: int, image: str | None = None) -> dict[str, Any]:
    modality = "image,text" if image else "text"
    return {"qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality,
            "pos_cand_list": positives, "neg_cand_list": [], "task_id": task}  # fmt: skip


def candidate(did: str, text: str | None = None, image: str | None = None) -> dict[str, Any]:
    return {"did": did, "txt": text, "img_path": image, "modality": "image" if image else "text"}


def write_row(root: Path, row: str, queries: list[dict[str, Any]], pool: list[dict[str, Any]]) -> None:
    write_lines(root / f"query/test/mbeir_{row}_test.jsonl", queries)
    write_lines(root / f"cand_pool/local/mbeir_{row}_cand_pool.jsonl", pool)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text row of 10 queries over 30 passages and a fashion row of 6 queries over 24 pictures; steps 0 to 3."""
    root, draw = tmp_path_factory.mktemp("mbeir"), np.random.default_rng(11)
    for number in range(24):
        file = root / f"mbeir_images/{number}.png"
        file.parent.mkdir(exist_ok=True)
        picture(number).load().save(file)
    passages = [candidate(f"2:{number}", text=words(draw)) for number in range(30)]
    asked = [query(f"2:{n}", words(draw), [f"2:{n * 2}", f"2:{n * 2 + 1}"], 1) for n in range(10)]
    write_row(root, TEXT_ROW, asked, passages)
    garments = [candidate(f"7:{number}", image=f"mbeir_images/{number}.png") for number in range(24)]
    edits = [query(f"7:{n}", words(draw), [f"7:{n + 6}"], 7, f"mbeir_images/{n}.png") for n in range(6)]
    write_row(root, FASHION_ROW, edits, garments)
    labels = [
        {"qid": f"7:{n}", "steps": n % 4, "z": int(n % 4 > 1), "reasoning": "one red" if n % 4 > 1 else None,
         "answer": "red cube" if n % 4 > 1 else None} for n in range(6)
    ]  # fmt: skip
    write_lines(root / f"cot/test/mbeir_{FASHION_ROW}_test_cot.jsonl", labels)
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        f"{HEADER}text\ttext\tWebQA\t2\tFind the text\nimage,text\timage\tFashionIQ\t7\tFind the image\n", encoding="utf-8"
    )
    (root / "meta.json").write_text('{"fingerprint": "two-rows"}', encoding="utf-8")
    return root


def read_inputs(data: Path, name: str) -> tuple[list[mbeir.Record], list[Query], list[mbeir.Candidate]]:
    task = next(task for task in mbeir.find_tasks(data, "test") if task.name == name)
    records = list(mbeir.read_queries(task.query_path))
    prompt = "Find the text" if name == TEXT_ROW else "Find the image"
    return records, [mbeir.to_query(one, prompt, data) for one in records], list(mbeir.read_pool(task.pool_path))


@pytest.fixture(scope="module")
def encoder(data: Path) -> Encoder:
    """A random model that bypasses every other query."""
    asked = [one for name in (TEXT_ROW, FASHION_ROW) for one in read_inputs(data, name)[1]]
    return Encoder(both_roads(random_model(), asked))


def evaluate(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The results of an evaluation that is not one share of several."""
    found = evaluate_share(*arguments, **options)
    assert found is not None
    return found


class PlannedEncoder(Encoder):
    """Gives every text the vector planned for it (of its last word), and queries the reasoning planned for them."""

    def __init__(self, plan: dict[str, list[float]], reasoning: dict[str, str] | None = None) -> None:
        super().__init__(random_model())
        rest = [0.0] * (self.width - 2)
        self.plan = {name: np.array([*vector, *rest], dtype=np.float32) for name, vector in plan.items()}
        self.said = reasoning or {}

    def encode_items(self, items: Sequence[Item], *, progress: bool = False) -> list[Encoding]:
        return [Encoding(self._vector(item.text), "direct", "", 0, 1.0, False) for item in items]

    def encode_queries(self, queries: Sequence[Query], *, route: Any = "auto", progress: bool = False) -> list[Encoding]:
        said = [self.said.get(query.id or "", "") for query in queries]
        return [
            Encoding(self._vector(query.text), "reason" if text else "direct", text, len(text.split()), 0.5, False)
            for query, text in zip(queries, said, strict=True)
        ]

    def _vector(self, text: str) -> Vector:
        return self.plan[text.rstrip(".").split()[-1].lower()]


def planned_folder(root: Path, queries: list[dict[str, Any]], pool: list[dict[str, Any]]) -> Path:
    write_row(root, TEXT_ROW, queries, pool)
    (root / "instructions").mkdir()
    line = "text\ttext\tWebQA\t2\tFind the text\n"
    (root / "instructions/query_instructions.tsv").write_text(HEADER + line, encoding="utf-8")
    return root


def untimed(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    for rows in results["routes"].values():
        for row in rows.values():
            del row["queries_per_second"], row["candidates_per_second"]
    return results


@pytest.mark.parametrize("route", ["auto", "reason"])
def test_ranks_equal_a_naive_oracle(data: Path, encoder: Encoder, tmp_path: Path, route: Any) -> None:
    results = evaluate(encoder, data, tmp_path, routes=[route], progress=False)
    judged = {(one.row, one.qid): one for one in read_judged(tmp_path / f"queries-{route}.jsonl")}
    assert len(judged) == 16
    roads = set()
    for name, k in ((TEXT_ROW, 5), (FASHION_ROW, 10)):
        records, queries, pool = read_inputs(data, name)
        items = [(one.did, encoder.encode_items([mbeir.to_item(one, data)])[0].vector) for one in pool]
        hits = {1: 0, 5: 0, 10: 0}
        for record, asked in zip(records, queries, strict=True):
            alone = encoder.encode_queries([asked], route=route)[0]
            scores = {did: float(np.dot(alone.vector.astype(np.float64), vector)) for did, vector in items}
            order = sorted(scores, key=lambda did: -scores[did])
            rank = 1 + min(order.index(did) for did in record.positives)
            # M-BEIR's positives beyond the best do not push it down: only wrong ones above it count.
            rank -= sum(did in record.positives for did in order[: rank - 1])
            one = judged[name, record.qid]
            assert (one.rank, one.route, one.reasoning) == (rank, alone.route, alone.reasoning)
            roads.add(one.route)
            for depth in hits:
                hits[depth] += rank <= depth
        row = results["routes"][route][name]
        assert {depth: row[f"hit@{depth}"] for depth in hits} == {d: round(n / len(records), 4) for d, n in hits.items()}
        assert (row["metric_k"], row["pool"], row["queries"]) == (k, len(pool), len(records))
    assert roads == ({"direct", "reason"} if route == "auto" else {"reason"})
    own = [results["routes"][route][TEXT_ROW]["hit@5"], results["routes"][route][FASHION_ROW]["hit@10"]]
    assert results["average"][route] == {"mean": round(sum(own) / 2, 4), "lowest": min(own)}
    assert results["data"] == "two-rows"


def test_rows_without_labels_have_no_steps_and_labelled_ones_are_grouped(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    results = evaluate(encoder, data, tmp_path, progress=False)["routes"]["auto"]
    assert "by_steps" not in results[TEXT_ROW]
    groups = results[FASHION_ROW]["by_steps"]
    assert {steps: group["queries"] for steps, group in groups.items()} == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert groups["0"]["exact"] is None and groups["2"]["exact"] == 0.0
    steps = {one.qid: one.steps for one in read_judged(tmp_path / "queries-auto.jsonl")}
    assert steps["2:0"] is None and [steps[f"7:{n}"] for n in range(6)] == [0, 1, 2, 3, 0, 1]


def test_ties_count_against_the_query_and_foreign_positives_never_count(tmp_path: Path) -> None:
    plan = {"east": [1.0, 0.0], "north": [0.0, 1.0], "between": [0.6, 0.8]}
    pool = [candidate("2:1", "a east"), candidate("2:2", "b east"), candidate("2:3", "c between"), candidate("2:4", "d north")]
    asked = [
        query("2:10", "east", ["2:1"], 1),  # the twin 2:2 scores the same
        query("2:11", "east", ["2:1", "2:2"], 1),  # both twins are right
        query("2:12", "north", ["9:77", "2:3"], 1),  # 9:77 is no candidate of this pool
        query("2:13", "north", ["9:77"], 1),
    ]
    data = planned_folder(tmp_path / "data", asked, pool)
    qrels = tmp_path / "data" / f"qrels/test/mbeir_{TEXT_ROW}_test_qrels.txt"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("2:10 0 2:1 1 1\n2:11 0 2:1 1 1\n2:12 0 9:77 1 1\n2:13 0 2:4 0 1\n", encoding="utf-8")
    evaluate(PlannedEncoder(plan), data, tmp_path / "out", progress=False)
    ranks = {one.qid: one.rank for one in read_judged(tmp_path / "out" / "queries-auto.jsonl")}
    assert ranks == {"2:10": 2, "2:11": 1, "2:12": 2, "2:13": 5}


def test_written_reasoning_is_compared_with_its_label(tmp_path: Path) -> None:
    plan = {"east": [1.0, 0.0]}
    asked = [query(f"2:{n}", "east", ["2:1"], 1) for n in range(4)]
    data = planned_folder(tmp_path / "data", asked, [candidate("2:1", "east")])
    label = {"steps": 2, "z": 1, "reasoning": "Make one red;", "answer": "Red cube"}
    simple = {"qid": "2:3", "steps": 0, "z": 0, "reasoning": None, "answer": None}
    write_lines(data / f"cot/test/mbeir_{TEXT_ROW}_test_cot.jsonl", [{"qid": f"2:{n}", **label} for n in range(3)] + [simple])
    encoder = PlannedEncoder(plan)
    processor = encoder.model.processor
    right, other = (processor.decode(processor.plain_ids(f"make one {colour}; red cube")) for colour in ("red", "blue"))
    encoder.said = {"2:0": right, "2:1": other, "2:3": right}
    evaluate(encoder, data, tmp_path / "out", progress=False)
    found = {one.qid: (one.exact, one.answer_exact) for one in read_judged(tmp_path / "out" / "queries-auto.jsonl")}
    assert found == {"2:0": (True, True), "2:1": (False, True), "2:2": (False, False), "2:3": (None, None)}


def test_limit_takes_the_first_queries_and_rows_name_rows_or_data_sets(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    results = evaluate(encoder, data, tmp_path, rows=["fashioniq"], limit=2, progress=False)
    assert list(results["routes"]["auto"]) == [FASHION_ROW]
    assert [one.qid for one in read_judged(tmp_path / "queries-auto.jsonl")] == ["7:0", "7:1"]
    assert results["routes"]["auto"][FASHION_ROW]["pool"] == 24, "the pool stays whole"


@pytest.fixture(scope="module")
def whole(data: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by two routes that was never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(encoder, data, out, routes=["auto", "direct"], progress=False)
    return out


def assert_same_files(out: Path, whole: Path) -> None:
    names = sorted(file.relative_to(whole).as_posix() for file in whole.rglob("*") if "embeddings" not in file.parts)
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if "embeddings" not in file.parts) == names
    for name in names:
        if (whole / name).suffix in (".jsonl", ".txt"):
            assert (out / name).read_text() == (whole / name).read_text(), name
    assert untimed(out) == untimed(whole)


def test_rows_scored_before_are_kept_and_nothing_is_encoded_twice(
    data: Path, encoder: Encoder, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(encoder, data, tmp_path, rows=[TEXT_ROW], routes=["auto", "direct"], progress=False)
    encoded: list[str] = []
    write = EmbeddingStore._write

    def spy(self: EmbeddingStore, key: str, chunk: Any, encodings: Any, seconds: float) -> None:
        encoded.append(f"{self.maker.kind} {len(chunk)}")
        write(self, key, chunk, encodings, seconds)

    monkeypatch.setattr(EmbeddingStore, "_write", spy)
    evaluate(encoder, data, tmp_path, routes=["auto", "direct"], progress=False)
    assert encoded == ["candidates 24", "queries-auto 6", "queries-direct 6"], "only the other row is encoded"
    assert_same_files(tmp_path, whole)
    evaluate(encoder, data, tmp_path / "again", routes=["auto", "direct"], cache=tmp_path / "embeddings", progress=False)
    assert len(encoded) == 3, "a cache serves any number of evaluations"


@pytest.mark.parametrize("call", [0, 1, 2, 4, 5])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    data: Path, encoder: Encoder, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write, calls = EmbeddingStore._write, iter(range(99))

    def interrupted(self: EmbeddingStore, *arguments: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        write(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EmbeddingStore, "_write", interrupted)
        evaluate(encoder, data, tmp_path, routes=["auto", "direct"], progress=False)
    evaluate(encoder, data, tmp_path, routes=["auto", "direct"], progress=False)
    assert_same_files(tmp_path, whole)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_share_the_encoding_and_the_last_one_scores(
    data: Path, encoder: Encoder, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    found = [
        evaluate_share(encoder, data, tmp_path, routes=["auto", "direct"], shard=(number, shards), progress=False)
        for number in range(shards)
    ]
    assert found[0] is None and found[-1] is not None and (tmp_path / "results.json").is_file()
    assert_same_files(tmp_path, whole)


def test_the_global_pool_is_all_local_pools_and_counts_positives_anywhere(tmp_path: Path) -> None:
    """A text row and a second one share a candidate; a positive of the other pool counts in the global pool only."""
    plan = {"east": [1.0, 0.0], "north": [0.0, 1.0], "between": [0.6, 0.8], "west": [-1.0, 0.0]}
    data = planned_folder(
        tmp_path / "data", [query("2:10", "north", ["9:7"], 1)], [candidate("2:1", "a east"), candidate("2:3", "c between")]
    )
    write_row(data, "edis_task1", [query("2:20", "west", ["2:1"], 1)], [candidate("9:7", "d north"), candidate("2:1", "a east")])
    results = evaluate(PlannedEncoder(plan), data, tmp_path / "out", pools=["local", "global"], progress=False)
    ranks = [{one.qid: one.rank for one in read_judged(tmp_path / "out" / f"queries-auto{end}.jsonl")} for end in ("", "-global")]
    assert ranks == [{"2:10": 3, "2:20": 2}, {"2:10": 1, "2:20": 3}]
    assert results["global"]["auto"][TEXT_ROW]["pool"] == 3 and results["routes"]["auto"][TEXT_ROW]["pool"] == 2
    run = (tmp_path / "out/runs" / f"{TEXT_ROW}-auto-global.txt").read_text().splitlines()
    assert [line.split()[2] for line in run] == ["9:7", "2:3", "2:1"] and run[0].split()[:2] == ["2:10", "Q0"]
    only = evaluate(PlannedEncoder(plan), data, tmp_path / "one", pools=["global"], rows=[TEXT_ROW], progress=False)
    assert only["global"]["auto"][TEXT_ROW] == results["global"]["auto"][TEXT_ROW] | {
        name: only["global"]["auto"][TEXT_ROW][name] for name in ("queries_per_second", "candidates_per_second")
    }, "pools of rows that are not scored are in the global pool all the same"


def test_the_instruction_is_the_first_one_drawn_or_each_in_turn(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    prompts = "Find it\tShow a red one\tOne cube then\tAny green ball"
    (folder / "instructions/query_instructions.tsv").write_text(
        f"{HEADER}text\ttext\tWebQA\t2\t{prompts}\nimage,text\timage\tFashionIQ\t7\t{prompts}\n", encoding="utf-8"
    )
    every = evaluate(encoder, folder, tmp_path / "all", prompt="all", progress=False)
    seeded = evaluate(encoder, folder, tmp_path / "seed1", prompt="seeded", seed=1, progress=False)
    row = every["routes"]["auto"][TEXT_ROW]
    ranks = [{one.qid: one.rank for one in read_judged(tmp_path / "all" / f"queries-auto-prompt{n}.jsonl")} for n in (1, 2, 3, 4)]
    each = [round(sum(own[f"2:{n}"] <= 5 for n in range(10)) / 10, 4) for own in ranks]
    assert row["prompts"] == each and row["hit@5"] == pytest.approx(sum(each) / 4, abs=1e-4)
    assert row["prompt_spread"] == pytest.approx(max(each) - min(each), abs=1e-9)
    drawn = {one.qid: one.rank for one in read_judged(tmp_path / "seed1" / "queries-auto.jsonl")}
    assert all(any(own[qid] == rank for own in ranks) for qid, rank in drawn.items())
    assert len({tuple(own.items()) for own in ranks}) > 1, "the instructions make a difference to this encoder"
    assert every["prompt"] == "all" and seeded["prompt"] == "seeded 1"


def test_a_broken_folder_is_told_by_file_and_line_or_scored_without_the_broken_parts(
    data: Path, encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    pool = folder / f"cand_pool/local/mbeir_{FASHION_ROW}_cand_pool.jsonl"
    lines = pool.read_text().splitlines()
    lines[22] = '{"did": "7:22", "txt": '
    pool.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"{FASHION_ROW}_cand_pool\.jsonl:23: not JSON .*--on-error skip"):
        evaluate(encoder, folder, tmp_path / "out", progress=False)
    (folder / "mbeir_images/23.png").unlink()
    (folder / "mbeir_images/5.png").unlink()
    qrels = folder / f"qrels/test/mbeir_{FASHION_ROW}_test_qrels.txt"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("7:0 0 7:6 1 7\n7:77 0 7:6 1 7\n")
    results = evaluate(encoder, folder, tmp_path / "out", on_error="skip", progress=False)
    row, found = results["routes"]["auto"][FASHION_ROW], results["problems"]
    assert row["pool"] == 24 - 3 and row["queries"] == 5, "7:22, 7:23 and 7:5 left the pool, query 7:5 left the row"
    assert found["broken_lines"] == 2 and found["missing_pictures"] == 3
    assert any("7:77" in text and "_test_qrels.txt:2" in text for text in found["first"])
    block = next((tmp_path / "out" / "embeddings").glob("candidates-*/blocks/*/vectors.npy"))
    block.write_bytes(block.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"vectors\.npy .* bytes long|vectors\.npy cannot be read"):
        evaluate(encoder, data, tmp_path / "whole", cache=tmp_path / "out" / "embeddings", progress=False)
        evaluate(encoder, folder, tmp_path / "out", rows=[FASHION_ROW], progress=False)
    mended = evaluate(encoder, folder, tmp_path / "out", on_error="skip", progress=False)
    assert mended["routes"]["auto"][FASHION_ROW]["hit@10"] == row["hit@10"]
    lines[22] = json.dumps(candidate("7:22", image="mbeir_images/22.png"))
    pool.write_text("\n".join(lines) + "\n")
    qrels.unlink()
    with pytest.raises(DataError, match=r"3 (pictures|images) are missing: .*7:5: mbeir_images/5\.png"):
        evaluate(encoder, folder, tmp_path / "other", progress=False)


def test_results_of_another_model_or_limit_are_not_mixed_in(data: Path, encoder: Encoder, whole: Path, tmp_path: Path) -> None:
    evaluate(encoder, data, tmp_path, rows=[TEXT_ROW], limit=1, progress=False)
    before = (tmp_path / "results.json").read_bytes()
    other = Encoder(random_model())
    other.model.settings = replace(other.model.settings, fingerprint="other")
    with pytest.raises(InputError, match=r"results\.json holds results of another model; choose another --out"):
        evaluate(other, data, tmp_path, limit=1, progress=False)
    with pytest.raises(InputError, match="another limit"):
        evaluate(encoder, data, tmp_path, progress=False)
    with pytest.raises(InputError, match="another threshold"):
        evaluate(Encoder(encoder.model, threshold=0.5), data, tmp_path, limit=1, progress=False)
    assert (tmp_path / "results.json").read_bytes() == before


def test_unknown_rows_are_refused_by_name(data: Path, encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows \['mars_task9'\] are not in .*'webqa_task1'"):
        evaluate(encoder, data, tmp_path / "out", rows=[TEXT_ROW, "mars_task9"], progress=False)
    assert not (tmp_path / "out").exists()


def test_empty_files_are_refused_by_name(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="query/test"):
        evaluate(encoder, tmp_path, tmp_path / "out", progress=False)
    data = planned_folder(tmp_path / "data", [query("2:1", "east", ["2:1"], 1)], [])
    with pytest.raises(DataError, match=r"webqa_task1_cand_pool\.jsonl holds no candidate"):
        evaluate(encoder, data, tmp_path / "out", progress=False)
    write_row(data, TEXT_ROW, [], [candidate("2:1", "east")])
    with pytest.raises(DataError, match=r"webqa_task1_test\.jsonl: the file has no query"):
        evaluate(encoder, data, tmp_path / "out", progress=False)


def test_table_and_average_by_hand() -> None:
    row = {"pool": 40, "queries": 8, "hit@1": 0.25, "hit@5": 0.5, "hit@10": 0.75, "reasoned": 0.125, "tokens_per_query": 1.5,
           "queries_per_second": 10.0}  # fmt: skip
    rows = {TEXT_ROW: row | {"metric_k": 5}, FASHION_ROW: row | {"metric_k": 10}}
    assert average(rows) == {"mean": 0.625, "lowest": 0.5}
    lines = table({"routes": {"auto": rows}, "average": {"auto": average(rows)}}).splitlines()
    assert lines[2] == f"| {TEXT_ROW} | auto | local 40 | 8 | 25.0 | **50.0** | 75.0 | 12 % | 1.5 | 10 |"
    assert lines[3].startswith(f"| {FASHION_ROW} | auto | local 40 | 8 | 25.0 | 50.0 | **75.0** |")
    assert "**62.5**" in lines[4]
