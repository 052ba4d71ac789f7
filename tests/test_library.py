"""Published models of every kind: the vectors of sentence-transformers itself, by whichever road they are asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import published
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from starlette.testclient import TestClient
from test_evaluate import FASHION_ROW, TEXT_ROW, candidate, query, write_lines, write_row
from transformers import AutoProcessor, Siglip2Model

import traceir
from traceir import Encoder, Item, Query, load_encoder, open_index
from traceir.checkpoint import bundled_model, is_library
from traceir.cli import main
from traceir.errors import InputError, ModelError, PictureError
from traceir.items import Encoding, Vector
from traceir.library import LibraryEncoder
from traceir.pictures import Picture
from traceir.serve.batch_worker import BatchWorker
from traceir.serve.jobs import FAILURES, UnavailableError
from traceir.serve.run import ServeConfig, make_application, make_server
from traceir.serve.scheduler import Scheduler

TEXT = "a red cube on the left"
LONG = "a green ball and a red cube on the left of the table"
ASKED = "Find a picture of the same thing."


def run(*arguments: object) -> int:
    return main([str(one) for one in arguments])


def pixels(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    width, height = (int(side) for side in draw.integers(33, 70, 2))
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def far(found: Any, wanted: Any) -> float:
    """The greatest difference between two lists of vectors."""
    return float(np.abs(np.asarray(found, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)).max())


def vectors(encodings: Sequence[Encoding]) -> Vector:
    return np.stack([one.vector for one in encodings])


def queries_of(model: SentenceTransformer, inputs: Sequence[Any], **options: Any) -> Vector:
    found: Vector = model.encode_query(list(inputs), normalize_embeddings=True, **options)
    return found


def documents_of(model: SentenceTransformer, inputs: Sequence[Any]) -> Vector:
    found: Vector = model.encode_document(list(inputs), normalize_embeddings=True)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind."""
    root = tmp_path_factory.mktemp("published")
    published.save_clip(root / "clip")
    published.save_old_clip(root / "old-clip")
    published.save_siglip(root / "siglip-bare")
    published.save_qwen(root / "qwen")
    published.save_bert(root / "bert")
    published.save_gemma(root / "gemma")
    bare = published.Transformer(
        str(root / "siglip-bare"), processing_kwargs={"text": {"padding": "max_length", "max_length": 64, "truncation": True}}
    )
    SentenceTransformer(modules=[bare]).save_pretrained(str(root / "siglip"))
    return root


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """A folder of pictures and texts."""
    root = tmp_path / "things"
    root.mkdir()
    for number in range(4):
        pixels(number).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(" ".join(published.WORDS[number : number + 4]))
    return root


PICTURES = ("clip", "old-clip", "siglip", "qwen")
EVERY = (*PICTURES, "bert", "gemma")


@pytest.mark.parametrize("kind", EVERY)
def test_the_command_line_gives_the_library_s_vectors(
    kind: str, places: Path, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, index = SentenceTransformer(str(places / kind)), tmp_path / "index"
    code = run("index", "add", things, "--index", index, "--model", places / kind)
    told = capsys.readouterr()
    if kind in PICTURES:
        assert code == 0 and "added 8" in told.out
    else:
        assert code == 1 and "added 4" in told.out and told.err.count("is a picture, which") == 4
    texts = {f"{number}.txt": (things / f"{number}.txt").read_text() for number in range(4)}
    files = {f"{number}.png": Image.open(things / f"{number}.png") for number in range(4)} if kind in PICTURES else {}
    wanted = dict(zip([*texts, *files], [*documents_of(own, list(texts.values())), *_pictures(own, files)], strict=True))
    with open_index(index) as opened:
        stored = opened.get(list(wanted), with_vectors=True)
    assert far([stored[name].vector for name in wanted], list(wanted.values())) < 1e-6
    assert run("search", TEXT, "--index", index, "--model", places / kind, "--json", "-k", 8) == 0
    asked = queries_of(own, [TEXT])[0]
    found = {hit["id"]: hit["score"] for hit in json.loads(capsys.readouterr().out)["hits"]}
    assert far([found[name] for name in wanted], [float(asked @ vector) for vector in wanted.values()]) < 1e-5


def _pictures(model: SentenceTransformer, files: dict[str, Image.Image]) -> list[Vector]:
    return list(documents_of(model, [image.convert("RGB") for image in files.values()])) if files else []


@pytest.mark.parametrize("kind", ("clip", "qwen", "gemma"))
def test_the_server_gives_the_library_s_vectors(kind: str, places: Path, things: Path, tmp_path: Path) -> None:
    own, index = SentenceTransformer(str(places / kind)), tmp_path / "index"
    run("index", "add", things, "--index", index, "--model", places / kind)
    server = make_server(ServeConfig(index=str(index)), lambda: load_encoder(places / kind))
    with TestClient(make_application(ServeConfig(index=str(index)), server), base_url="http://127.0.0.1:8080") as client:
        _wait(client)
        asked = {"input": [TEXT, LONG], "model": "traceir"}
        answer = client.post("/v1/embeddings", json=asked).json()
        assert far([one["embedding"] for one in answer["data"]], documents_of(own, [TEXT, LONG])) < 1e-6
        hits = client.post("/search", json={"text": TEXT, "k": 4, "modality": "text"}).json()["hits"]
        texts = [(things / hit["id"]).read_text() for hit in hits]
        assert far([hit["score"] for hit in hits], documents_of(own, texts) @ queries_of(own, [TEXT])[0]) < 1e-5
        refused = client.post("/search", json={"text": TEXT, "route": "reason"})
        assert refused.status_code == 400 and "cannot reason" in refused.text


def _wait(client: TestClient) -> None:
    for _ in range(200):
        if client.get("/ready").status_code == 200:
            return
    raise AssertionError("the server did not come up")
