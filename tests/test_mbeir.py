"""The reader of M-BEIR's layout: fields, null rules, discovery, pools, instructions, errors with places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from traceir.data import mbeir
from traceir.data.mbeir import Candidate, Record
from traceir.errors import DataError

HEADER = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4\n"


def query(qid: str, **changes: Any) -> dict[str, Any]:
    line = {
        "qid": qid,
        "query_txt": "two cups",
        "query_img_path": None,
        "query_modality": "text",
        "query_src_content": None,
        "pos_cand_list": ["9:2"],
        "neg_cand_list": [],
        "task_id": 0,
    }
    return line | changes


def candidate(did: str, **changes: Any) -> dict[str, Any]:
    line = {"txt": None, "img_path": "mbeir_images/a.jpg", "modality": "image", "did": did, "src_content": None}
    return line | changes


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def first_query(tmp_path: Path, **changes: Any) -> Record:
    return next(mbeir.read_queries(write(tmp_path / "q.jsonl", query("9:6", **changes))))


def test_a_real_line_is_read_field_by_field(tmp_path: Path) -> None:
    image = "mbeir_images/mscoco_images/val2014/COCO_val2014_000000391895.jpg"
    positives = ["9:2", "9:3", "9:4", "9:5", "9:6"]
    record = first_query(
        tmp_path, query_txt=None, query_img_path=image, query_modality="image", pos_cand_list=positives, task_id=3
    )
    assert record == Record("9:6", None, image, "image", tuple(positives), (), 3)


@pytest.mark.parametrize("given", [["9:2", "9:3"], [{"did": "9:2"}, {"did": "9:3"}], [{"did": "9:2"}, "9:3"]])
def test_both_shapes_of_candidate_lists(tmp_path: Path, given: list[object]) -> None:
    assert first_query(tmp_path, pos_cand_list=given, neg_cand_list=given).positives == ("9:2", "9:3")
    assert first_query(tmp_path, pos_cand_list=given, neg_cand_list=None).negatives == ()


def test_the_readme_spelling_of_the_mixed_modality(tmp_path: Path) -> None:
    assert first_query(tmp_path, query_img_path="a.jpg", query_modality="text,image").modality == "image,text"


def test_pool_lines_with_nulls(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pool.jsonl",
        candidate("9:1"),
        candidate("9:2", txt="a dog", img_path=None, modality="text"),
        candidate("9:3", txt="a dog", modality="image,text"),
    )
    assert list(mbeir.read_pool(path)) == [
        Candidate("9:1", None, "mbeir_images/a.jpg", "image"),
        Candidate("9:2", "a dog", None, "text"),
        Candidate("9:3", "a dog", "mbeir_images/a.jpg", "image,text"),
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
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
    ],
)
def test_broken_fields_name_file_line_and_value(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = write(tmp_path / "q.jsonl", query("9:1"), "", query("9:2") | changes)
    with pytest.raises(DataError, match=rf"q\.jsonl:3: {named}; it must be"):
        list(mbeir.read_queries(path))


@pytest.mark.parametrize("broken", ['{"qid": ', "[1]", "null", "[" * 100_000])
def test_lines_that_are_no_objects(tmp_path: Path, broken: str) -> None:
    path = write(tmp_path / "q.jsonl", query("9:1"), broken)
    with pytest.raises(DataError, match=r"q\.jsonl:2: "):
        list(mbeir.read_queries(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(json.dumps(candidate("9:1")).encode() + b'\n{"did": "\xff"}\n')
    with pytest.raises(DataError, match=r"pool\.jsonl:2: not UTF-8"):
        list(mbeir.read_pool(path))


def test_an_id_met_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl:2: qid '9:1' occurs a second time"):
        list(mbeir.read_queries(write(tmp_path / "q.jsonl", query("9:1"), query("9:1"))))
    with pytest.raises(DataError, match=r"p\.jsonl:2: did '9:1' occurs a second time"):
        list(mbeir.read_pool(write(tmp_path / "p.jsonl", candidate("9:1"), candidate("9:1"))))


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        list(mbeir.read_pool(tmp_path / "absent.jsonl"))


def test_qrels_keep_positive_relevance_only(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.txt", "9:1 0 9:2 1 0", "9:1 0 9:3 0 0", "9:1 0 5:4 2 0", "9:2 0 9:2 1")
    assert mbeir.read_qrels(path) == {"9:1": {"9:2", "5:4"}, "9:2": {"9:2"}}


@pytest.mark.parametrize("line", ["9:1 0 9:2", "9:1 0 9:2 yes 0"])
def test_broken_qrels(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"qrels\.txt:2: "):
        mbeir.read_qrels(write(tmp_path / "qrels.txt", "9:1 0 9:2 1 0", line))


def test_tasks_come_in_the_papers_order_then_by_name(tmp_path: Path) -> None:
    for name in ("zebra_task4", "emoji_task0", "infoseek_task8", "fashioniq_task7", "visualnews_task0"):
        write(tmp_path / f"query/test/mbeir_{name}_test.jsonl", query("7:1"))
    tasks = mbeir.find_tasks(tmp_path, "test")
    expected = ["visualnews_task0", "fashioniq_task7", "infoseek_task8", "emoji_task0", "zebra_task4"]
    assert [task.name for task in tasks] == expected
    fashion = tasks[1]
    assert (fashion.dataset, fashion.dataset_id, fashion.task_id, fashion.metric_k) == ("fashioniq", 7, 7, 10)
    assert (fashion.query_modality, fashion.cand_modality) == ("image,text", "image")
    assert [task.metric_k for task in tasks] == [5, 10, 5, 5, 5]


def test_there_are_sixteen_rows_of_eight_kinds() -> None:
    assert len(set(mbeir.EVAL_ROWS)) == 16
    assert {int(row[-1]) for row in mbeir.EVAL_ROWS} == {0, 1, 2, 3, 4, 6, 7, 8}


def test_a_folder_without_queries(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="M-BEIR's layout"):
        mbeir.find_tasks(tmp_path, "val")


def test_only_the_first_query_is_read_in_discovery(tmp_path: Path) -> None:
    path = write(tmp_path / "query/test/mbeir_cirr_task7_test.jsonl", query("8:1"), "broken")
    assert mbeir.find_tasks(tmp_path, "test")[0].query_path == path


def test_mscoco_has_pools_for_each_split(tmp_path: Path) -> None:
    local = tmp_path / "cand_pool/local"
    for name in ("mscoco_task0_val", "mscoco_task0_test", "cirr_task7"):
        write(local / f"mbeir_{name}_cand_pool.jsonl", candidate("9:1"))
    assert mbeir.pool_path(tmp_path, "mscoco", 0, "val") == local / "mbeir_mscoco_task0_val_cand_pool.jsonl"
    assert mbeir.pool_path(tmp_path, "mscoco", 0, "test") == local / "mbeir_mscoco_task0_test_cand_pool.jsonl"
    assert mbeir.pool_path(tmp_path, "cirr", 7, "val") == local / "mbeir_cirr_task7_cand_pool.jsonl"


def test_relevance_falls_back_on_the_queries(tmp_path: Path) -> None:
    write(tmp_path / "query/test/mbeir_cirr_task7_test.jsonl", query("8:1", pos_cand_list=["8:5"]))
    task = mbeir.find_tasks(tmp_path, "test")[0]
    assert mbeir.read_relevant(task) == {"8:1": {"8:5"}}
    write(task.qrels_path, "8:1 0 8:6 1 7")
    assert mbeir.read_relevant(task) == {"8:1": {"8:6"}}


def test_training_files_mix_tasks(tmp_path: Path) -> None:
    write(tmp_path / "query/train/mbeir_mscoco_train.jsonl", query("9:1"), query("9:2", task_id=3))
    write(tmp_path / "query/train/mbeir_emoji_train.jsonl", query("31:1"))
    write(tmp_path / "query/train/mbeir_visualnews_train.jsonl", query("0:1"))
    assert mbeir.train_datasets(tmp_path) == ["visualnews", "mscoco", "emoji"]
    assert [record.task_id for record in mbeir.read_train(tmp_path, "mscoco")] == [0, 3]


def test_instructions_skip_the_header_and_empty_columns(tmp_path: Path) -> None:
    path = tmp_path / "instructions/query_instructions.tsv"
    write(path, HEADER + "text\timage\tMSCOCO\t9\tFind it.\tShow it.\t\t\r", "image\ttext\tMSCOCO\t9\tName it.")
    instructions = mbeir.read_instructions(tmp_path)
    assert instructions.prompts(9, "text", "image") == ("Find it.", "Show it.")
    assert instructions.prompts(9, "image", "text") == ("Name it.",)
    with pytest.raises(DataError, match="no instructions for dataset 8"):
        instructions.prompts(8, "text", "image")


@pytest.mark.parametrize(
    "line",
    ["text\timage\tMSCOCO\t9", "text\tsmell\tMSCOCO\t9\tFind", "text\timage\tMSCOCO\tx\tF", "text\timage\tM\t9\t "],
)
def test_broken_instructions(tmp_path: Path, line: str) -> None:
    write(tmp_path / "instructions/query_instructions.tsv", HEADER + line)
    with pytest.raises(DataError, match=r"query_instructions\.tsv:2: "):
        mbeir.read_instructions(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", "A dog."),
        (' "a\r dog" ', "A dog."),
        ("what is it?", "What is it?"),
        ("Stop!", "Stop!"),
        ("éclair", "Éclair."),
        ("", ""),
        (None, ""),
        ('"', ""),
    ],
)
def test_the_normaliser(text: str | None, expected: str) -> None:
    assert mbeir.normalise(text) == expected


def test_query_text_joins_prompt_and_text(tmp_path: Path) -> None:
    assert mbeir.query_text(first_query(tmp_path), "find it") == "Find it. two cups."
    picture = first_query(tmp_path, query_txt=None, query_img_path="a.jpg", query_modality="image", task_id=3)
    assert mbeir.query_text(picture, "name it") == "Name it."


def test_records_become_queries_and_items(tmp_path: Path) -> None:
    record = first_query(tmp_path, query_img_path="mbeir_images/a.jpg", query_modality="image,text", task_id=8)
    made = mbeir.to_query(record, "find it", tmp_path)
    assert (made.id, made.instruction, made.target, made.text) == ("9:6", "Find it.", "image,text", "Two cups.")
    assert [picture.path for picture in made.images] == [tmp_path / "mbeir_images/a.jpg"]
    item = mbeir.to_item(Candidate("9:2", "a dog", None, "text"), tmp_path)
    assert (item.id, item.text, item.modality) == ("9:2", "A dog.", "text")


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "cot.jsonl"
    assert mbeir.read_labels(path) == {}
    simple = {"qid": "8:1", "steps": 1, "z": 0, "reasoning": None, "answer": None}
    hard = {"qid": "8:2", "steps": 3, "z": 1, "reasoning": "first, then", "answer": "a red ball"}
    write(path, simple, hard)
    assert mbeir.read_labels(path)["8:2"] == mbeir.Label("8:2", 3, 1, "first, then", "a red ball")
    write(path, simple, hard | {"reasoning": None})
    with pytest.raises(DataError, match=r"cot\.jsonl:2: reasoning is None"):
        mbeir.read_labels(path)
    write(path, simple | {"answer": "a cup"})
    with pytest.raises(DataError, match=r"cot\.jsonl:1: answer is 'a cup'"):
        mbeir.read_labels(path)
