"""The network for inference against transformers' class: the same weights, the same numbers, without importing transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import both_routes, image_of, make_queries, random_model
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from traceir.checkpoint import bundled_model
from traceir.encoder import Encoder
from traceir.errors import ModelError
from traceir.items import Item
from traceir.model import TraceModel, load, save, wrap
from traceir.network import InferenceTokenizer, Network, fits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(both_routes(random_model(), make_queries()), tmp_path_factory.mktemp("network") / "checkpoint")


def windowed_model() -> TraceModel:
    """Real proportions in small: shared keys, windows of 2 x 2 visual tokens, one of three layers over the whole image."""
    made = random_model()
    whole = made.network.config.to_dict()
    whole["vision_config"] |= {"depth": 3, "window_size": 32, "fullatt_block_indexes": [1]}
    whole["text_config"] |= {"num_key_value_heads": 2, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}}  # fmt: skip
    torch.manual_seed(3)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(whole)).eval()
    image = replace(made.processor.image, min_pixels=16 * 16, max_pixels=160 * 160)
    return wrap(network, made.processor.tokenizer, made.settings, image)


@pytest.mark.parametrize("route", ["auto", "reason", "direct"])
def test_encodings_are_those_of_transformers(checkpoint: Path, route: str) -> None:
    stock, ours = Encoder(load(checkpoint)), Encoder.from_pretrained(checkpoint)
    assert isinstance(ours.model.network, Network) and not isinstance(stock.model.network, Network)
    for name in ("fingerprint", "prompt_version", "width", "vector_settings"):
        assert getattr(ours, name) == getattr(stock, name)
    queries = make_queries()
    for own, other in zip(ours.encode_queries(queries, route=route), stock.encode_queries(queries, route=route), strict=True):
        for name in ("route", "reasoning", "tokens", "truncated"):
            assert getattr(own, name) == getattr(other, name)
        assert float(own.vector @ other.vector) > 0.999999
        assert own.emb_probability == pytest.approx(other.emb_probability, abs=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (144, 112)], ids=str)
def test_windows_of_an_image_are_those_of_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    """Whole windows, windows cut at the right and at the bottom, images of one window, and several images at once."""
    model = windowed_model()
    ours = load(save(model, tmp_path / "checkpoint"), inference=True)
    items = [Item.of(image=image_of(number, *size), text="a red cube") for number in range(2)]
    batch = ours.processor.collate([ours.processor.lay_out(ours.prompt(item)) for item in [*items, Item.of(image=image_of(9))]])
    assert batch.patches is not None and batch.grids is not None
    with torch.no_grad():
        stock = torch.cat(model.network.model.get_image_features(batch.patches, batch.grids, return_dict=True).pooler_output)
        assert torch.allclose(ours.image_features(batch.patches, batch.grids)[0], stock, atol=2e-5)
        shown = batch.mask.bool()
        assert torch.allclose(ours.hidden(batch)[shown], model.hidden(batch)[shown], atol=5e-5)


def test_bfloat16_and_two_matrices_are_read_as_they_are(checkpoint: Path) -> None:
    stock, ours = (load(checkpoint, dtype=torch.bfloat16, inference=inference) for inference in (False, True))
    assert not torch.equal(ours.network.lm_head.weight, ours.network.model.language_model.embed_tokens.weight)
    vectors = [
        np.stack([own.vector for own in Encoder(model).encode_queries(make_queries(), route="direct")]) for model in (stock, ours)
    ]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.999
    assert ours.network.lm_head.weight.dtype == torch.bfloat16


def test_words_are_those_of_transformers(checkpoint: Path) -> None:
    for folder in (checkpoint, bundled_model()):
        stock, ours = AutoTokenizer.from_pretrained(folder), InferenceTokenizer(folder / "tokenizer.json")
        assert ours.get_added_vocab() == stock.get_added_vocab()
        for token in (*stock.get_vocab(), "no such token"):
            assert ours.convert_tokens_to_ids(token) == stock.convert_tokens_to_ids(token)
        ids = list(range(0, len(stock), 3))
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == stock.decode(ids, skip_special_tokens=skip)


def test_what_it_lacks_is_run_by_transformers(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert fits(config)
    for part, change in (
        (None, {"model_type": "qwen3_vl"}),
        (None, {"quantization_config": {}}),
        ("text_config", {"use_sliding_window": True}),
        ("text_config", {"hidden_act": "gelu"}),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "mrope_section": [1, 1, 1]}}),
    ):
        other = json.loads(json.dumps(config))
        (other if part is None else other[part]).update(change)
        assert not fits(other), change
    model = load(checkpoint, inference=True)
    with pytest.raises(ModelError, match="loaded for inference"):
        save(model, tmp_path / "no")


@pytest.mark.slow
def test_a_search_imports_neither_transformers_nor_torch_before_it_must(checkpoint: Path, tmp_path: Path) -> None:
    """All that costs time at the start; benchmarks/start.py has the times."""
    index, text = tmp_path / "index", tmp_path / "a.txt"
    text.write_text("a red cube")
    script = f"""
import sys
from traceir.cli.main import main
assert "torch" not in sys.modules
assert main(["index", "add", {str(text)!r}, "--index", {str(index)!r}, "--model", {str(checkpoint)!r}]) == 0
assert main(["search", "--text", "a red cube", "--index", {str(index)!r}, "--model", {str(checkpoint)!r}]) == 0
heavy = {{"transformers", "torch._dynamo", "scipy", "sympy", "torch.distributed.tensor", "matplotlib", "huggingface_hub"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
