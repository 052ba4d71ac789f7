"""benchmarks/train.py: shapes as published, a plain loop that computes what our step does, made-up batches as long as stated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gradcache import examples

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.train import agree
from benchmarks.train_shapes import SHAPES, Lengths, build, empty_network, made_up_batch
from benchmarks.train_sides import Ours, Plain
from traceir.data.samples import Example, Schedule, TaskData
from traceir.errors import TraceError
from traceir.lab.mini_presets import PRESETS
from traceir.train.batches import TrainBatches


def test_a_shape_has_as_many_parameters_as_the_published_weights() -> None:
    for shape, parameters in (("2b", 2_208_985_600), ("3b", 3_754_622_976), ("7b", 8_292_166_656)):
        network = empty_network(SHAPES[shape], "meta")
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


class Made(TaskData):
    """Pairs of unlike lengths: some reason, some show an image, some share their target."""

    def example(self, number: int, draw: np.random.Generator) -> Example:
        return examples()[number]


@pytest.mark.slow
def test_the_plain_loop_computes_what_our_step_does() -> None:
    config = replace(PRESETS["mini"](), batch=8, chunk_tokens=120)
    ours_model, plain_model = (build("mini", "cpu", lora=False, precision="float32") for _ in range(2))
    schedule = Schedule([Made("made", range(8))], [1.0], batch=8, group=4, batches=1, seed=0)
    batches = TrainBatches(schedule, ours_model.processor, "brief-1", config.chunk_tokens)
    ours, plain = Ours(ours_model, batches, config, "cpu"), Plain(plain_model, schedule, config, "cpu")
    assert len(batches[0].queries) > 1 and batches[0].collision_BN.sum() > 8
    assert agree(ours, plain, "float32")["gradient"] < 1e-4
    plain.config = replace(config, temperature=0.05)
    with pytest.raises(TraceError, match="do not compute the same"):
        agree(ours, plain, "float32")


def test_a_made_up_batch_has_the_stated_lengths() -> None:
    model = build("mini", "cpu", lora=True, precision="bf16")
    lengths = Lengths(query=30, image=16, reasoning=5, candidate=33)
    batch = made_up_batch(model, 7, lengths, chunk_tokens=80)
    assert lengths.sides == (4, 3)
    for chunks, width in ((batch.queries, 35), (batch.candidates, 33)):
        assert {chunk.batch.ids.shape[1] for chunk in chunks} == {width}
        assert torch.cat([chunk.rows for chunk in chunks]).tolist() == list(range(7))
    assert batch.tokens == 7 * 6 == sum(int((chunk.batch.targets >= 0).sum()) for chunk in batch.chunks)
