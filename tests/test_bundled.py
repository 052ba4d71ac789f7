"""The bundled checkpoint on the small MiniBEIR: it finds, it routes, and what it writes is what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from traceir.cli import bundled_model
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.learn import mbeir
from traceir.learn.evaluate import evaluate
from traceir.learn.faithful import probe
from traceir.learn.judged import Judged, read_judged
from traceir.learn.minibeir.build import build

LIMIT = 12


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_pretrained(bundled_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("mini") / "data", scale="small", splits=("test",))


@pytest.fixture(scope="module")
def judged(encoder: Encoder, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Judged]]:
    out = tmp_path_factory.mktemp("scores")
    evaluate(encoder, folder, out, limit=LIMIT, progress=False)
    yield read_judged(out / "queries-auto.jsonl")


def test_it_finds_in_every_row(judged: list[Judged]) -> None:
    rows = {row: [one.rank <= 10 for one in judged if one.row == row] for row in mbeir.EVAL_ROWS}
    assert all(len(hits) == LIMIT for hits in rows.values())
    means = {row: float(np.mean(hits)) for row, hits in rows.items()}
    assert np.mean(list(means.values())) > 0.85, means
    assert min(means.values()) > 0.5, means


def test_it_thinks_when_a_query_needs_it(judged: list[Judged]) -> None:
    simple = [one.route == "reason" for one in judged if one.steps is not None and one.steps < 2]
    complex_ = [one.route == "reason" for one in judged if one.steps is not None and one.steps >= 2]
    assert len(simple) > 100 and len(complex_) > 30
    assert np.mean(simple) <= 0.05 and np.mean(complex_) >= 0.9


def test_some_reasoning_is_exactly_right_and_never_cut(judged: list[Judged]) -> None:
    reasoned = [one for one in judged if one.route == "reason"]
    assert np.mean([bool(one.exact) for one in reasoned]) > 0.3
    assert np.mean([one.truncated for one in reasoned]) < 0.05


def test_a_mixed_batch_equals_its_singles(encoder: Encoder, folder: Path) -> None:
    instructions = mbeir.read_instructions(folder)
    queries = []
    for task in mbeir.find_tasks(folder, "test"):
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        queries += [mbeir.to_query(record, prompt, folder) for record in list(mbeir.read_queries(task.query_path))[:4]]
    together = encoder.encode_queries(queries)
    assert {one.route for one in together} == {"direct", "reason"}
    for query, one in zip(queries, together, strict=True):
        alone = encoder.encode_queries([query])[0]
        assert alone.reasoning == one.reasoning
        assert float(alone.vector @ one.vector) >= 0.9999


def test_vectors_follow_the_reasoning_put_in_its_mouth(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    found = {one.kind: one for one in probe(encoder, folder, tmp_path, rows=["infoseek_task6"], limit=10, progress=False)}
    assert found["own"].cosine > 0.9999, "its own reasoning, read again, gives its own vector"
    assert found["label"].hit_k >= found["own"].hit_k > found["swapped"].hit_k
    assert found["swapped"].hit_1_of_other is not None and found["swapped"].hit_1_of_other > found["swapped"].hit_1
    assert "swapped" in (tmp_path / "faithful.md").read_text() and (tmp_path / "faithful.json").is_file()
    with pytest.raises(InputError, match="no row"):
        probe(encoder, folder, tmp_path, rows=["nights_task4"], progress=False)


def test_the_checkpoint_is_small_and_ordinary() -> None:
    files = list(bundled_model().iterdir())
    assert sum(file.stat().st_size for file in files) < 32 * 2**20
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pkl"}]
    assert torch.is_tensor(Encoder.from_pretrained(bundled_model()).model.network.lm_head.weight)
