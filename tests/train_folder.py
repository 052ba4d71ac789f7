"""Invented training data in M-BEIR's layout, small enough to be written for every module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import image_of

from traceir.model import TraceModel, TraceSettings
from traceir.train.small import SmallSize, small_model, train_tokenizer

TINY = SmallSize(hidden=32, layers=1, heads=2, inner=48, vision_hidden=32, vision_layers=1, vision_heads=2,
                 vision_inner=32, vocabulary=420)  # fmt: skip
COLOURS = ("red", "green", "blue", "white", "black", "pink")


def tiny_model() -> TraceModel:
    return small_model(train_tokenizer(["red a thing x"], 300), TINY, TraceSettings(prompt_version="brief-1"), 0)


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def query(qid: str, task_id: int, image: str, text: str | None, right: list[str], wrong: list[str]) -> dict[str, Any]:
    return {"qid": qid, "query_txt": text, "query_img_path": image, "query_src_content": None, "task_id": task_id,
            "query_modality": "image,text" if text else "image", "pos_cand_list": right, "neg_cand_list": wrong}  # fmt: skip


def make_folder(root: Path) -> Path:
    """8 images to be named and 8 to be changed, in one file in turn; 5 to be matched; 40 pretraining examples without images.

    Query 8:N+1 is right at 8:101+N and, if it is a change, at 8:101 and at 8:999, which is not in the pool. Of the changes,
    every other one is complex.
    """
    (root / "mbeir_images").mkdir(parents=True)
    queries, labels = [], []
    pool: list[dict[str, Any]] = [{"did": "8:500", "txt": "a wrong thing", "img_path": None, "modality": "text"}]
    for number in range(16):
        name, composed = f"mbeir_images/{number}.png", number % 2 == 1
        image_of(number).load().save(root / name)
        text = f"make it {COLOURS[number % 6]}" if composed else None
        right = [f"8:{number + 101}", *(["8:101", "8:999"] if composed else [])]
        wrong = [f"8:{other + 101}" for other in (number, (number + 1) % 16, (number + 2) % 16)] + ["8:500", "8:500"]
        queries.append(query(f"8:{number + 1}", 7 if composed else 3, name, text, right, wrong[: number % 6]))
        pool.append({"did": f"8:{number + 101}", "txt": f"thing {number}", "img_path": name, "modality": "image,text"})
        if composed:
            z = number // 2 % 2
            label = {"reasoning": f"see {number}", "answer": f"thing {number}"} if z else {"reasoning": None, "answer": None}
            labels.append({"qid": f"8:{number + 1}", "steps": 1 + z, "z": z, **label})
    queries.insert(0, queries.pop())  # the file is not in the order of qids
    write_lines(root / "query/train/mbeir_cirr_train.jsonl", queries)
    write_lines(root / "cot/train/mbeir_cirr_train_cot.jsonl", labels)
    matches = [query(f"4:{n}", 4, f"mbeir_images/{n}.png", None, [f"8:{n + 101}"], []) for n in range(5)]
    write_lines(root / "query/train/mbeir_nights_train.jsonl", matches)
    write_lines(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool)
    lines = [{"img_path": None, "prompt": f"count {n}", "target": " ".join(["one"] * (n % 7 + 1))} for n in range(40)]
    write_lines(root / "lessons/counting.jsonl", lines)
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
        "image\ttext\tcirr\t8\tname it\tsay it\nimage,text\timage\tcirr\t8\tchange it\tedit it\nimage\timage\tnights\t4\tmatch\n"
    )
    return root
