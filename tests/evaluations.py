"""What tests of evaluation share: files in M-BEIR's layout, and an encoder whose vectors and reasoning are planned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FakeEncoder, vector_of

from traceir.items import Encoding, Item, Query, Vector

TEXT_ROW, FASHION_ROW = "webqa_task1", "fashioniq_task7"


def write(file: Path, *lines: object) -> Path:
    """Lines as they are, or objects as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return file


def query(qid: str, **changes: Any) -> dict[str, Any]:
    line = {"qid": qid, "query_txt": "two cups", "query_img_path": None, "query_modality": "text", "query_src_content": None,
            "pos_cand_list": [], "neg_cand_list": [], "task_id": 1}  # fmt: skip
    return line | changes


def asks(qid: str, text: str, positives: list[str], task: int = 1, image: str | None = None) -> dict[str, Any]:
    modality = "image,text" if image else "text"
    return query(qid, query_txt=text, query_img_path=image, query_modality=modality, pos_cand_list=positives, task_id=task)


def candidate(did: str, text: str | None = None, image: str | None = None) -> dict[str, Any]:
    modality = ",".join(name for name, part in (("image", image), ("text", text)) if part)
    return {"txt": text, "img_path": image, "modality": modality, "did": did, "src_content": None}


def write_row(root: Path, row: str, queries: list[dict[str, Any]], pool: list[dict[str, Any]]) -> None:
    write(root / f"query/test/mbeir_{row}_test.jsonl", *queries)
    write(root / f"cand_pool/local/mbeir_{row}_cand_pool.jsonl", *pool)


def write_instructions(root: Path, *prompts: str) -> None:
    keys = ("text\ttext\tWebQA\t2", "image,text\timage\tFashionIQ\t7")
    head = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    write(root / "instructions/query_instructions.tsv", head, *("\t".join([key, *prompts]) for key in keys))


def planned_folder(root: Path, queries: list[dict[str, Any]], pool: list[dict[str, Any]]) -> Path:
    write_row(root, TEXT_ROW, queries, pool)
    write_instructions(root, "Find the text")
    return root


class Planned(FakeEncoder):
    """Vectors by content, or those planned for the last word of a text; reasoning by the word "then", or as planned by qid."""

    def __init__(
        self, plan: Mapping[str, Sequence[float]] | None = None, threshold: float | None = None, **reasoning: str
    ) -> None:
        super().__init__(width=len(next(iter(plan.values()))) if plan else 16)
        self.plan, self.reasoning, self.threshold = plan or {}, reasoning, threshold
        self.asked: list[Query] = []

    @property
    def run_settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "max_reasoning_tokens": 12}

    def as_written(self, text: str) -> str:
        return text.lower()

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return [Encoding(self._vector(item), "direct", "", 0, 1.0, False) for item in items]

    def encode_queries(self, queries: Sequence[Query], *, route: Any = "auto") -> list[Encoding]:
        self.asked += queries
        encodings = []
        for query in queries:
            text = self.reasoning.get(str(query.id), "first this" if "then" in query.text.split() and route != "direct" else "")
            way: Any = "reason" if text else "direct"
            encodings.append(Encoding(self._vector(query), way, text, len(text.split()), 0.5, False))
        return encodings

    def _vector(self, content: Item | Query) -> Vector:
        planned = self.plan.get(content.text.rstrip(".").split()[-1].lower()) if self.plan else None
        return vector_of(content.content_hash(), self.width) if planned is None else np.array(planned, dtype=np.float32)
