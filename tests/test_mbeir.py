"""The reader of M-BEIR's layout: fields, null rules, discovery, pools, instructions, errors with places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluations import candidate, query, write

from traceir.data import mbeir
from traceir.data.mbeir import Candidate, Label, Record
from traceir.errors import DataError

HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"


def label(qid: str, **changes: Any) -> dict[str, Any]:
    return {"qid": qid, "steps": 1, "z": 0, "reasoning": None, "answer": None} | changes


def test_lines_are_read_field_by_field(tmp_path: Path) -> None:
    image, dids = "mbeir_images/mscoco_images/val2014/COCO_val2014_000000391895.jpg", ["9:2", {"did": "9:3"}]
    lines = [
        query("9:6", query_txt=None, query_img_path=image, query_modality="image", pos_cand_list=dids, neg_cand_list=dids),
        query("9:7", query_img_path="a.jpg", query_modality="text,image", neg_cand_list=None, task_id=8),
    ]
    assert list(mbeir.read_queries(write(tmp_path / "q.jsonl", *lines))) == [
        Record("9:6", None, image, "image", ("9:2", "9:3"), ("9:2", "9:3"), 1),
        Record("9:7", "two cups", "a.jpg", "image,text", (), (), 8),
    ]
    pool = [candidate("9:1", image="a.jpg"), candidate("9:2", "a dog"), candidate("9:3", "a dog", "a.jpg")]
    assert list(mbeir.read_pool(write(tmp_path / "pool.jsonl", *pool))) == [
        Candidate("9:1", None, "a.jpg", "image"),
        Candidate("9:2", "a dog", None, "text"),
        Candidate("9:3", "a dog", "a.jpg", "image,text"),
    ]
    hard = label("8:2", steps=3, z=1, reasoning="first, then", answer="a red ball")
    labels = mbeir.read_labels(write(tmp_path / "cot.jsonl", label("8:1"), hard))
    assert labels["8:2"] == Label("8:2", 3, 1, "first, then", "a red ball") and mbeir.read_labels(tmp_path / "absent") == {}


QUERY, POOL = (mbeir.read_queries, query("9:1")), (mbeir.read_pool, candidate("9:1", "a cup"))
LABELS, QRELS = (mbeir.read_labels, label("9:1")), (mbeir.read_qrels, "9:1 0 9:2 1 0")
BROKEN: list[tuple[tuple[Callable[..., Any], object], object, str]] = [
    *(
        (QUERY, query("9:2") | changes, f"{named}; it must be")
        for changes, named in (
            ({"qid": 7}, "qid is 7"),
            ({"query_txt": 3}, "query_txt is 3"),
            ({"query_txt": " "}, "query_txt is ' '"),
            ({"query_modality": "sound"}, "query_modality is 'sound'"),
            ({"query_modality": "image"}, "query_img_path is None"),
            ({"query_modality": "image", "query_img_path": "../a.jpg"}, "query_img_path is '../a.jpg'"),
            ({"query_modality": "image", "query_img_path": "/a.jpg"}, "query_img_path is '/a.jpg'"),
            ({"pos_cand_list": "9:1"}, "pos_cand_list is '9:1'"),
            ({"pos_cand_list": [9]}, r"pos_cand_list is \[9\]"),
            ({"task_id": 9}, "task_id is 9"),
            ({"task_id": True}, "task_id is True"),
            ({"task_id": "3"}, "task_id is '3'"),
        )
    ),
    *((QUERY, broken, "") for broken in ('{"qid": ', "[1]", "null", "[" * 100_000)),
    (QUERY, query("9:1"), "qid '9:1' occurs a second time"),
    (POOL, candidate("9:1", "a cup"), "did '9:1' occurs a second time"),
    (LABELS, label("9:2", z=1), "reasoning is None"),
    (LABELS, label("9:2", answer="a cup"), "answer is 'a cup'"),
    (QRELS, "9:1 0 9:2", "3 columns"),
    (QRELS, "9:1 0 9:2 yes 0", "relevance is 'yes'"),
]


@pytest.mark.parametrize(("kind", "line", "message"), BROKEN)
def test_broken_lines_are_named_or_left_out(tmp_path: Path, kind: Any, line: object, message: str) -> None:
    read, whole = kind
    path = write(tmp_path / "lines.jsonl", whole, "", line)
    with pytest.raises(DataError, match=rf"lines\.jsonl:3: {message}"):
        list(read(path))
    broken: list[DataError] = []
    assert len(list(read(path, broken.append))) == 1 == len(broken)


def test_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", candidate("9:1", "a cup"))
    path.write_bytes(path.read_bytes() + b'{"did": "\xff"}\n')
    for file, message in ((path, r"pool\.jsonl:2: not UTF-8"), (tmp_path / "absent.jsonl", r"absent\.jsonl")):
        with pytest.raises(DataError, match=message):
            list(mbeir.read_pool(file))


def test_qrels_keep_positive_relevance_and_fall_back_on_the_queries(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.txt", "9:1 0 9:2 1 0", "9:1 0 9:3 0 0", "9:1 0 5:4 2 0", "9:2 0 9:2 1")
    assert mbeir.read_qrels(path) == {"9:1": {"9:2": 1, "5:4": 3}, "9:2": {"9:2": 4}}
    write(tmp_path / "query/test/mbeir_cirr_task7_test.jsonl", query("8:1", pos_cand_list=["8:5"]))
    (task,) = mbeir.find_tasks(tmp_path, "test")
    assert mbeir.read_relevant(task) == {"8:1": {"8:5"}}
    write(task.qrels_path, "8:1 0 8:6 1 7")
    assert mbeir.read_relevant(task) == {"8:1": {"8:6"}}


def test_tasks_come_in_the_papers_order_then_by_name(tmp_path: Path) -> None:
    names = ["visualnews_task0", "fashioniq_task7", "infoseek_task8", "emoji_task0", "zebra_task4"]
    for name in reversed(names):
        write(tmp_path / f"query/test/mbeir_{name}_test.jsonl", query("7:1"), "broken, and not read in discovery")
    tasks = mbeir.find_tasks(tmp_path, "test")
    assert [(task.name, task.metric_k) for task in tasks] == list(zip(names, (5, 10, 5, 5, 5), strict=True))
    fashion = tasks[1]
    assert (fashion.dataset, fashion.dataset_id, fashion.task_id) == ("fashioniq", 7, 7)
    assert (fashion.query_modality, fashion.cand_modality) == ("image,text", "image")
    assert len(set(mbeir.EVAL_ROWS)) == 16 and {int(row[-1]) for row in mbeir.EVAL_ROWS} == {0, 1, 2, 3, 4, 6, 7, 8}
    with pytest.raises(DataError, match="M-BEIR's layout"):
        mbeir.find_tasks(tmp_path, "val")
    write(tmp_path / "query/val/mbeir_own_task9_val.jsonl", query("7:1"))
    with pytest.raises(DataError, match="no task id from 0 to 8"):
        mbeir.find_tasks(tmp_path, "val")


def test_mscoco_has_pools_for_each_split(tmp_path: Path) -> None:
    local = tmp_path / "cand_pool/local"
    for name in ("mscoco_task0_val", "mscoco_task0_test", "cirr_task7"):
        write(local / f"mbeir_{name}_cand_pool.jsonl", candidate("9:1", "a cup"))
    for dataset, task, name in (("mscoco", 0, "mscoco_task0_val"), ("cirr", 7, "cirr_task7")):
        row = mbeir.Task(f"{dataset}_task{task}", dataset, 9, task, "val", tmp_path)
        assert row.pool_path == local / f"mbeir_{name}_cand_pool.jsonl"


def test_training_files_mix_tasks(tmp_path: Path) -> None:
    for name in ("mscoco", "emoji", "visualnews"):
        write(mbeir.train_path(tmp_path, name), query("9:1"), query("9:2", task_id=3))
    assert mbeir.train_datasets(tmp_path) == ["visualnews", "mscoco", "emoji"]
    assert [record.task_id for record in mbeir.read_train(tmp_path, "mscoco")] == [1, 3]


def test_instructions_skip_the_header_and_empty_columns(tmp_path: Path) -> None:
    path = tmp_path / "instructions/query_instructions.tsv"
    write(path, HEADER, "text\timage\tMSCOCO\t9\tFind it.\tShow it.\t\t\r", "image\ttext\tMSCOCO\t9\tName it.")
    instructions = mbeir.read_instructions(tmp_path)
    assert instructions.prompts(9, "text", "image") == ("Find it.", "Show it.")
    assert instructions.prompts(9, "image", "text") == ("Name it.",)
    with pytest.raises(DataError, match="no instructions for dataset 8"):
        instructions.prompts(8, "text", "image")
    for line in ("text\timage\tM\t9", "text\tsmell\tM\t9\tFind", "text\timage\tM\tx\tF", "text\timage\tM\t9\t "):
        write(path, HEADER, line)
        with pytest.raises(DataError, match=r"query_instructions\.tsv:2: "):
            mbeir.read_instructions(tmp_path)


NORMAL = {"a dog": "A dog.", ' "a\r dog" ': "A dog.", "what is it?": "What is it?", "éclair": "Éclair.", None: "", '"': ""}


@pytest.mark.parametrize(("text", "expected"), NORMAL.items())
def test_records_become_queries_and_items_in_the_normal_form(tmp_path: Path, text: str | None, expected: str) -> None:
    made = mbeir.to_query(Record("9:6", text, "mbeir_images/a.jpg", "image,text", (), (), 8), "find it", tmp_path)
    assert (made.id, made.instruction, made.target, made.text) == ("9:6", "Find it.", "image,text", expected)
    assert [image.path for image in made.images] == [tmp_path / "mbeir_images/a.jpg"]
    item = mbeir.to_item(Candidate("9:2", text, "a.jpg", "image,text"), tmp_path)
    assert (item.id, item.text, item.modality) == ("9:2", expected, "image,text" if expected else "image")
