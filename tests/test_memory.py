"""What a training needs of a card: counts against real networks and adapters, chunks that fit, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from backbones import KINDS, published

from benchmarks.train_shapes import SHAPES
from traceir.adapter import attach
from traceir.errors import InputError
from traceir.lab import mini_presets
from traceir.model import load
from traceir.train.presets import GIB, PRESETS, STEPS, USABLE, empty, need_of, on_card, resolve


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_trains_and_what_is_frozen_is_what_an_adapter_makes_of_it(tmp_path: Path, kind: str) -> None:
    folder = published(tmp_path / kind, kind)
    need = need_of(replace(PRESETS["qwen3-vl-2b"](), init=str(folder), lora_rank=3), empty(str(folder)))
    model = load(folder)
    weights = sum(value.numel() for value in model.network.parameters())
    adapter = attach(model, rank=3, alpha=6, dropout=0.0, train_projector=True, seed=0)
    named = {name: value.numel() for name, value in adapter.named_parameters() if value.requires_grad}
    assert need.trained == 16 * sum(count for name, count in named.items() if "trainable_tokens" not in name)
    assert need.frozen == 2 * (weights - sum(count for name, count in named.items() if "modules_to_save" in name))
    asked = {"data": str(tmp_path), "init": str(folder), "card": 24}
    assert resolve("qwen3-vl-2b", **asked).chunk_tokens == STEPS[0]
    assert resolve("qwen3-vl-2b", **asked, settings=["chunk_tokens=512"]).chunk_tokens == 512, "settings count more"


def test_the_largest_chunks_that_fit_are_taken_and_what_does_not_fit_names_the_rank_that_does(tmp_path: Path) -> None:
    plans = {}
    for shape in ("3b", "7b"):
        (tmp_path / shape).mkdir()
        (tmp_path / shape / "config.json").write_text(json.dumps(SHAPES[shape].fields))
        plans[shape] = replace(PRESETS[SHAPES[shape].preset](), init=str(tmp_path / shape))
    plan = replace(plans["3b"], grad_cache=False, checkpointing=False)
    need = need_of(plan, empty(plan.init))
    for card, tokens in ((24, 8192), (80, 32768)):
        fitted = on_card(plan, card)
        assert fitted == replace(plan, chunk_tokens=tokens, grad_cache=True, checkpointing=True)
        assert need.total(tokens) <= card * GIB * USABLE < need.total(2 * tokens)
    # A token of a chunk, by the formula of docs/training.md.
    layers, width, inner, vocabulary = 36, 2048, 11008, 151936
    assert need.token == 2 * layers * width + 2 * (10 * width + 4 * inner) + 5 * vocabulary
    large = plans["7b"]
    assert on_card(replace(large, lora_rank=64), 24).chunk_tokens >= STEPS[-1]
    lacking = r"lora_rank=128 needs 23\.2 GiB .* 21\.6 of 24 GiB .* set lora_rank=64"
    for config, card, message in (
        (large, 24, lacking),
        (large, 12, "choose a smaller backbone"),
        (mini_presets.preset("emoji"), 24, "LoRA"),
    ):
        with pytest.raises(InputError, match=message):
            on_card(config, card)


def test_an_image_has_as_many_tokens_for_every_backbone() -> None:
    for preset, side in (("qwen2.5-vl-7b", 28), ("qwen3.5-4b", 32)):
        config = PRESETS[preset]()
        assert (config.min_pixels, config.max_pixels) == (4 * side**2, 300 * side**2) and config.out == f"out/runs/{preset}"
