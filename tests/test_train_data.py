"""What becomes of samples: labels, negatives and shares by hand, batches by rule, and the same Examples from every format."""

from __future__ import annotations

import json
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import image_of
from hypothesis import given, settings
from hypothesis import strategies as st
from train_folder import make_folder, query, tiny_model, write_lines

from traceir.data import mbeir
from traceir.data.cot import PoolFile, is_cot, read_cot, write_cot
from traceir.data.image_store import pixel_store
from traceir.data.samples import (
    Example,
    Pairs,
    Schedule,
    TaskData,
    completion,
    keeps_reasoning,
    read_pairs,
    read_pretraining,
    task_shares,
)
from traceir.errors import DataError, InputError, TrainError
from traceir.items import Query
from traceir.prompts import render_query


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "m")


def named(tasks: list[Any], name: str) -> Pairs:
    (task,) = [known for known in tasks if known.name == name]
    assert isinstance(task, Pairs)
    return task


def examples(task: TaskData) -> list[Example]:
    return [task.example(number, np.random.default_rng((5, number))) for number in range(len(task))]


# Labels


def test_what_a_query_writes_by_hand() -> None:
    label = mbeir.Label("8:1", 2, 1, "see red; make blue.", "a blue cube")
    written = {cot: completion(label, cot) for cot in ("both", "reasoning", "answer", "tagged", "none")}
    assert written == {
        "both": "see red; make blue. a blue cube",
        "reasoning": "see red; make blue.",
        "answer": "a blue cube",
        "tagged": "see red; make blue. a blue cube </answer>",
        "none": "",
    }
    assert completion(replace(label, answer=None), "answer") == ""
    assert completion(mbeir.Label("8:1", 1, 0, None, None), "tagged") == ""


def test_reasoned_shares_are_kept_in_expectation_and_nested() -> None:
    qids = [f"8:{number}" for number in range(4000)]
    quarter, half = ({q for q in qids if keeps_reasoning(q, share, 3)} for share in (0.25, 0.5))
    assert quarter < half and abs(len(quarter) / 4000 - 0.25) < 0.03 and abs(len(half) / 4000 - 0.5) < 0.03
    assert half != {q for q in qids if keeps_reasoning(q, 0.5, 4)}, "another seed keeps other queries"
    assert all(keeps_reasoning(q, 1.0, 3) and not keeps_reasoning(q, 0.0, 3) for q in qids)


def test_reading_joins_labels_and_leaves_out_what_is_not_reasoned(folder: Path) -> None:
    tasks = read_pairs(folder)
    assert [(task.name, len(task)) for task in tasks] == [("nights_task4", 5), ("cirr_task3", 8), ("cirr_task7", 8)]
    taught = examples(named(tasks, "cirr_task7"))
    assert [e.completion for e in taught[:4]] == ["see 15; thing 15", "", "see 3; thing 3", ""]
    assert all(e.query.instruction in ("change it", "edit it") and e.query.target == "image" for e in taught)
    shown = render_query(taught[2].query, "brief-1").show()
    assert "it.\n" in shown and "Make it white." in shown, "the prompt puts texts into M-BEIR's form"
    assert taught[1].right == {"8:102", "8:101", "8:999"}, "right names positives that are not in the pool, too"
    assert {e.candidate.id for e in taught if e.candidate} <= {"8:101", *(f"8:{n + 101}" for n in range(16))}
    kept = {e.query.id for e in examples(named(read_pairs(folder, reasoned=0.5, seed=1), "cirr_task7")) if e.completion}
    assert kept == {f"8:{n + 1}" for n in (3, 7, 11, 15) if keeps_reasoning(f"8:{n + 1}", 0.5, 1)}
    assert not any(e.completion for e in examples(named(read_pairs(folder, cot="none"), "cirr_task7")))
    assert all(e.query.target is None for e in examples(named(read_pairs(folder, any_target=1.0), "cirr_task7")))


def test_candidates_write_what_the_first_query_by_number_tells(folder: Path) -> None:
    answer, reason = (named(read_pairs(folder, cot="none", candidates=kind), "cirr_task7") for kind in ("answer", "reason"))
    assert (answer.descriptions["8:104"], reason.descriptions["8:104"]) == ("thing 3", "see 3; thing 3")
    assert answer.descriptions["8:101"] == "thing 3", "8:4 comes before 8:12 and 8:16"
    assert "8:102" not in answer.descriptions, "its only label is of a simple query"
    for example in examples(answer):
        assert example.candidate and example.described == answer.descriptions.get(example.candidate.id or "", "")
    assert not any(e.described for e in examples(named(read_pairs(folder), "cirr_task7")))


def test_settings_that_mean_nothing_are_refused(folder: Path) -> None:
    for wrong in ({"cot": "some"}, {"candidates": "all"}, {"reasoned": 1.5}, {"negatives": -1}, {"any_target": -0.1}):
        with pytest.raises((InputError, TrainError), match=next(iter(wrong))):
            read_pairs(folder, **wrong)


# Negatives


def test_negatives_are_never_right_and_each_once(folder: Path) -> None:
    met: Counter[str] = Counter()
    for task in read_pairs(folder, negatives=3):
        for number, sample in enumerate(task.rows):
            listed = {candidate.did for candidate in sample.negatives}
            assert not listed & set(sample.record.positives) and listed <= set(sample.record.negatives)
            for seed in range(8):
                dids = [item.id or "" for item in task.example(number, np.random.default_rng(seed)).negatives]
                assert set(dids) <= listed and len(set(dids)) == len(dids) == min(3, len(listed))
                met.update(dids)
    assert met["8:500"] and len(met) > 8
    plain, more = (named(read_pairs(folder, negatives=n), "cirr_task7") for n in (0, 2))
    assert [replace(e, negatives=()) for e in examples(more)] == examples(plain), "negatives change no other draw"


def test_what_the_pool_lacks_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "m")
    file = root / "query/train/mbeir_nights_train.jsonl"
    write_lines(file, [query("4:0", 4, "mbeir_images/0.png", None, ["8:101"], ["8:777"])])
    assert named(read_pairs(root), "nights_task4").rows[0].negatives == ()
    for reading in (lambda: read_pairs(root, negatives=1), lambda: write_cot(root, tmp_path / "cot")):
        with pytest.raises(DataError, match=r"query 4:0: negative 8:777"):
            reading()
    assert not is_cot(tmp_path / "cot")
    write_lines(file, [query("4:1", 4, "mbeir_images/1.png", None, ["8:999"], [])])
    with pytest.raises(DataError, match=r"query 4:1: no positive \(8:999\)"):
        read_pairs(root)


# Schedule


def test_shares_by_hand() -> None:
    sizes, weights = [100, 400, 900], [1.0, 2.0, 0.0]
    assert task_shares(sizes, weights) == pytest.approx([1 / 3, 2 / 3, 0])
    assert task_shares(sizes, weights, "proportional") == pytest.approx([1 / 9, 8 / 9, 0])
    assert task_shares(sizes, weights, "temperature", 2.0) == pytest.approx([1 / 5, 4 / 5, 0])
    assert task_shares(sizes, [1.0] * 3, "temperature", 1.0) == pytest.approx(task_shares(sizes, [1.0] * 3, "proportional"))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(TrainError, match="above 0"):
            task_shares(sizes, weights, "temperature", temperature)
    for wrong in ([0.0] * 3, [1.0, -1.0, 1.0]):
        with pytest.raises(TrainError, match="weights"):
            task_shares(sizes, wrong)


class Numbered(TaskData):
    def example(self, number: int, draw: np.random.Generator) -> Example:
        return Example(Query.of(text=f"{self.name} {number}"), "", None, frozenset())


def test_the_schedule_keeps_shares_groups_and_epochs() -> None:
    tasks = [Numbered("a", range(16)), Numbered("b", range(8))]
    schedule = Schedule(tasks, [3.0, 1.0], batch=8, group=4, batches=40, seed=1)
    names = [schedule.task(number).name for number in range(40)]
    assert names.count("a") == 30 and names.count("b") == 10
    rows = [[int(e.query.text.split()[1]) for e in schedule.examples(n)] for n in range(40) if names[n] == "a"]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert sorted(first + second) == list(range(16)), "two batches of 8 make one epoch of 16"
    for group in (batch[start : start + 4] for batch in rows for start in (0, 4)):
        assert group == list(range(group[0], group[0] + 4)) and group[0] % 4 == 0
    again = Schedule(tasks, [3.0, 1.0], batch=8, group=4, batches=40, seed=1)
    assert [e.query for e in again.examples(17)] == [e.query for e in schedule.examples(17)], "a batch needs no history"


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), group=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_example_is_seen_in_every_epoch(size: int, group: int, groups: int, seed: int) -> None:
    epoch = -(-size // group) * group
    count = 3 * -(-size // group)
    schedule = Schedule([Numbered("a", range(size))], [1.0], batch=group * groups, group=group, batches=count, seed=seed)
    rows = [row for number in range(count) for row in schedule.rows(number)]
    for start in range(0, len(rows), epoch):
        assert set(rows[start : start + epoch]) == set(range(size))
    if size >= group:
        starts = range(0, len(rows), group)
        assert all(len(set(rows[start : start + group])) == group for start in starts), "no example beside itself"


def test_schedule_refuses_what_cannot_be() -> None:
    with pytest.raises(TrainError, match="multiple of group"):
        Schedule([Numbered("a", range(9))], [1.0], batch=9, group=2, batches=1, seed=0)
    with pytest.raises(TrainError, match="task a has no examples"):
        Schedule([Numbered("a", range(0))], [1.0], batch=8, group=2, batches=1, seed=0)


def test_pretraining_examples_are_sorted_by_length_within_a_window(folder: Path, tmp_path: Path) -> None:
    (counting,) = read_pretraining(folder)
    lengths = [len(prompt) + len(target) for _, prompt, target in counting.rows]
    assert counting.name == "lessons_counting" and lengths == sorted(lengths) and len(lengths) == 40
    assert set(counting.texts()) == {f"count {n} {' '.join(['one'] * (n % 7 + 1))}" for n in range(40)}
    write_lines(tmp_path / "lessons/counting.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"counting\.jsonl:1: not a pretraining example"):
        read_pretraining(tmp_path)


# M-BEIR-CoT


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_both_formats_give_the_examples_of_the_folder(
    folder: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reading local files asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    manifest = write_cot(folder, tmp_path / "cot", format=format, rows_per_file=8)
    assert [file["name"] for file in manifest["files"]] == [f"train-0000{n}-of-00003.{format}" for n in range(3)]
    assert manifest["samples"] == 21 and sum(file["rows"] for file in manifest["files"]) == 21
    assert manifest["tasks"]["cirr_task7"] == {"samples": 8, "complex": 4, "negatives": 11, "positives_outside_pool": 8}
    assert is_cot(tmp_path / "cot") and not is_cot(folder)
    for taught in (
        {"cot": "tagged", "negatives": 2, "any_target": 0.5},
        {"cot": "reasoning", "candidates": "reason", "reasoned": 0.5, "seed": 1},
        {"cot": "none", "candidates": "answer", "negatives": 1},
        {"cot": "none"},
    ):
        for plain, inline in zip(read_pairs(folder, **taught), read_cot(tmp_path / "cot", **taught), strict=True):
            assert (plain.name, len(plain), plain.root.resolve()) == (inline.name, len(inline), inline.root.resolve())
            assert examples(plain) == examples(inline)
            assert list(plain.image_paths()) == list(inline.image_paths()) and list(plain.texts()) == list(inline.texts())


def test_one_file_is_read_with_a_root(folder: Path, tmp_path: Path) -> None:
    write_cot(folder, tmp_path / "cot", rows_per_file=8, negatives=False)
    file = tmp_path / "alone.parquet"
    (tmp_path / "cot/train-00002-of-00003.parquet").rename(file)
    assert is_cot(file)
    (task3, task7) = read_cot(file, root=folder, cache=tmp_path / "cache", negatives=2)
    assert (len(task3), len(task7)) == (3, 2) and not any(e.negatives for e in examples(task7))
    with pytest.raises(DataError, match=r"no manifest\.json; give the folder"):
        read_cot(file)
    with pytest.raises(DataError, match=r"train-00002.* is missing"):
        read_cot(tmp_path / "cot")


@pytest.fixture(scope="module")
def lines_of_cot(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cot")
    write_cot(folder, out, format="jsonl", rows_per_file=8)
    return out


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"query_modality": "sound"}, "query_modality is 'sound'"),
        ({"reasoning": None, "z": 1}, "reasoning is None; it must be a text where z is 1"),
        ({"positives": []}, "at least one candidate"),
        ({"negatives": [{"did": "8:101", "txt": "thing", "img_path": None, "modality": "text"}]}, "8:101 is a positive"),
        ({"task": "cirr_task3"}, "do not agree"),
        ({"z": "many"}, "not a row"),
        ({"colour": "red"}, "not known: .'colour'"),
        ("{broken", "not a row"),
    ],
)
def test_a_broken_line_is_named(folder: Path, lines_of_cot: Path, tmp_path: Path, line: dict[str, Any] | str, why: str) -> None:
    file = lines_of_cot / "train-00001-of-00003.jsonl"
    whole = file.read_text()
    lines = whole.splitlines()
    row = json.loads(lines[3])
    assert row["qid"] == "8:6" and row["task"] == "cirr_task7"
    lines[3] = line if isinstance(line, str) else json.dumps(row | line)
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"train-00001-of-00003\.jsonl:4: .*{why}"):
        read_cot(lines_of_cot, cache=tmp_path)
    file.write_text(whole)


def test_a_broken_parquet_row_is_named_also_where_the_file_was_read_before(folder: Path, tmp_path: Path) -> None:
    write_cot(folder, tmp_path / "cot", rows_per_file=8)
    read_cot(tmp_path / "cot")
    file = tmp_path / "cot/train-00001-of-00003.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[4]["query_img_path"] = "../outside.png"
    for broken, message in (
        (pa.Table.from_pylist(rows, schema=table.schema), r":5: query_img_path"),
        (table.drop_columns(["steps"]), ": columns are missing.*steps"),
        (table.slice(0, 7), None),
    ):
        pq.write_table(broken, file)
        with pytest.raises(DataError, match=rf"{file.name}{message}" if message else "20 rows where 21 were written"):
            read_cot(tmp_path / "cot")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet: not a Parquet file"):
        read_cot(tmp_path / "cot")


def test_an_unfinished_folder_is_not_read_and_a_finished_one_not_overwritten(folder: Path, tmp_path: Path) -> None:
    whole = write_cot(folder, tmp_path / "whole", rows_per_file=8)
    out = tmp_path / "cot"
    (out / "writing").mkdir(parents=True)
    (out / "writing/00000.parquet").write_bytes(b"half")
    (out / "train-00000-of-00001.parquet").write_bytes(b"of a call that did not end")
    with pytest.raises(DataError, match="was not written to its end"):
        read_cot(out, root=folder)
    again = write_cot(folder, out, rows_per_file=8)
    assert again["files"] == whole["files"], "equal sources make equal bytes"
    assert sorted(file.name for file in out.iterdir()) == sorted(["manifest.json", *(file["name"] for file in again["files"])])
    with pytest.raises(DataError, match=r"holds a manifest\.json"):
        write_cot(folder, out)


def test_a_pool_file_is_the_pool(folder: Path, tmp_path: Path) -> None:
    path = mbeir.train_pool_path(folder)
    pool = PoolFile(path)
    assert dict(pool) == {candidate.did: candidate for candidate in mbeir.read_pool(path)}
    assert "8:999" not in pool and len(pool) == 17
    pool.close()
    twice = tmp_path / "pool.jsonl"
    for line, message in (
        ('{"did": "8:101", "txt": "again", "modality": "text"}\n', "'8:101' occurs a second time"),
        ('{"did": "8:1000"}\n', r"pool\.jsonl:18: modality"),
    ):
        twice.write_text(path.read_text() + line)
        with pytest.raises(DataError, match=message):
            PoolFile(twice)


def test_a_pixel_store_is_completed_without_what_it_holds_already(tmp_path: Path) -> None:
    model = tiny_model()
    for number in (1, 2):
        image_of(number).load().save(tmp_path / f"{number}.png")
    first = pixel_store(tmp_path, tmp_path / "cache", model.processor, ["1.png"])[str(tmp_path / "1.png")].copy()
    (tmp_path / "1.png").unlink()
    store = pixel_store(tmp_path, tmp_path / "cache", model.processor, ["2.png"])
    assert len(store) == 2 and (store[str(tmp_path / "1.png")] == first).all()
    assert (store[str(tmp_path / "2.png")] != first).any()
    with pytest.raises(DataError, match=r"3\.png"):
        pixel_store(tmp_path, tmp_path / "cache", model.processor, ["3.png"])
