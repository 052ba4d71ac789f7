"""What tests of the reasoning factory share: a chat server, and a train split to be filled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Answer = tuple[int, dict[str, str], bytes]


def completion(text: str = "an invented reply", prompt: int = 100, finish: str = "stop") -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": 10}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": usage}).encode()


def failure(status: int, message: str, code: str = "invented", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message, "code": code}}).encode()


class Chat:
    """Answers chat completions by `script(number of the request, body)`; keeps what it saw."""

    def __init__(self) -> None:
        self.url, self.bodies = "", list[dict[str, Any]]()
        self.most_at_once = self._at_once = 0
        self.wait_s = 0.0
        self.script: Callable[[int, dict[str, Any]], Answer] = lambda number, body: (200, {}, completion())
        self.app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        status, headers, content = self.script(len(self.bodies), body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.wait_s)
        self._at_once -= 1
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Response(content, status, named, media_type="application/json")


def line(qid: str, text: str | None, image: str | None, positive: str, task_id: int) -> dict[str, Any]:
    """A query of a train file."""
    modality = ",".join(kind for kind, held in (("image", image), ("text", text)) if held)
    about = {"query_txt": text, "query_img_path": image, "query_modality": modality, "query_src_content": None}
    return {"qid": qid, **about, "pos_cand_list": [positive], "neg_cand_list": [], "task_id": task_id}


def candidate(did: str, text: str | None, image: str | None) -> dict[str, Any]:
    return {"did": did, "txt": text, "img_path": image, "modality": "image" if image else "text", "src_content": None}


def label(qid: str, reasoning: str | None = None, answer: str | None = None) -> dict[str, Any]:
    z = int(reasoning is not None)
    return {"qid": qid, "steps": 2 * z, "z": z, "reasoning": reasoning, "answer": answer}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_split(
    root: Path, dataset: str, queries: list[dict[str, Any]], pool: list[dict[str, Any]], labels: list[dict[str, Any]]
) -> Path:
    """A train split in M-BEIR's layout, its images painted; without labels they are such as cannot be sent as they are."""
    write(root / f"query/train/mbeir_{dataset}_train.jsonl", queries)
    write(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool)
    if labels:
        write(root / f"cot/train/mbeir_{dataset}_train_cot.jsonl", labels)
    (root / "mbeir_images").mkdir()
    paths = dict.fromkeys(path for row in [*queries, *pool] if (path := row.get("query_img_path") or row.get("img_path")))
    for shade, path in enumerate(paths):
        Image.new("RGB", (40, 40), (shade * 10, 255 - shade * 10, shade * 7)).convert("RGB" if labels else "P").save(root / path)
    number, modalities = queries[0]["qid"].split(":")[0], ("image", "text", "image,text")
    rows = [f"{asked}\t{shown}\t{dataset}\t{number}\tFind the {dataset} that is meant." for asked in modalities
            for shown in modalities[:2]]  # fmt: skip
    (root / "instructions").mkdir()
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    (root / "instructions/query_instructions.tsv").write_text("\n".join([header, *rows]) + "\n")
    return root
