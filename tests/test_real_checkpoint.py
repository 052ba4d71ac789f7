"""A checkpoint with the field names of Qwen2.5-VL-7B's own config.json, not its sizes, saved by transformers, by `--model`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, picture
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.cli.main import main
from traceir.encoder import Encoder
from traceir.items import Item, Query
from traceir.prompts import EMB, render_query
from traceir.train.small import train_tokenizer

# The keys of the published config.json of Qwen2.5-VL-7B-Instruct, text fields flat at the top as there; sizes and ids shrunk.
PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2,
    "vision_start_token_id": 3, "vision_end_token_id": 4, "vision_token_id": 6, "image_token_id": 5, "video_token_id": 6,
    "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96,
    "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 3, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [2], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": 640,
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-tiny"
    draw = np.random.default_rng(0)
    tokenizer = train_tokenizer([" ".join(draw.choice(WORDS, 8)) for _ in range(200)], 400)
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] != EMB]
    text["model"]["vocab"][f"spare {EMB}"] = text["model"]["vocab"].pop(EMB)
    (folder.parent / "config.json").write_text(json.dumps(PUBLISHED))
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder.parent))
    network.save_pretrained(folder)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)), eos_token="<|im_end|>",
                            pad_token="<|endoftext|>").save_pretrained(folder)  # fmt: skip
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}).save_pretrained(folder)
    # What the hub ships in generation_config.json would make embeddings random if anything sampled.
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 5.0}))
    return folder


def test_it_loads_adds_emb_and_keeps_the_padded_rows(published: Path) -> None:
    encoder = Encoder.from_pretrained(published)
    network, processor = encoder.model.network, encoder.model.processor
    assert network.get_input_embeddings().weight.shape[0] == 640
    assert processor.emb_id == len(processor.tokenizer) - 1 < 640
    assert encoder.prompt_version == "trace-1" and encoder.width == 64
    assert processor.image.max_pixels == 28 * 28 * 64


def test_windowed_vision_takes_the_stock_road_with_equal_results(published: Path) -> None:
    """Pictures larger than the attention window, several at once, against the stock forward of the whole model."""
    model = Encoder.from_pretrained(published).model
    queries = [Query.of(image=picture(n, 200, 150 + 60 * n), text="make one red") for n in range(3)]
    batch = model.processor.collate([model.processor.lay_out(render_query(q, "trace-1")) for q in queries])
    types = (batch.ids == model.network.config.image_token_id).int()
    with torch.no_grad():
        ours = model.hidden(batch)
        stock = model.network.model(
            input_ids=batch.ids, attention_mask=batch.mask, mm_token_type_ids=types,
            pixel_values=batch.patches, image_grid_thw=batch.grids,
        ).last_hidden_state  # fmt: skip
    shown = batch.mask.bool()
    assert torch.allclose(ours[shown], stock[shown], atol=2e-5)


def test_encoding_is_greedy_whatever_the_checkpoint_says(published: Path) -> None:
    encoder = Encoder.from_pretrained(published, max_reasoning_tokens=5)
    queries = [Query.of(text="find a red cube", image=picture(1, 120, 90))]
    first, second = (encoder.encode_queries(queries, route="reason")[0] for _ in range(2))
    assert first.reasoning == second.reasoning and np.array_equal(first.vector, second.vector)
    items = encoder.encode_items([Item.of(image=picture(n, 90 + n, 60)) for n in range(3)])
    assert all(item.route == "direct" for item in items)


def test_it_indexes_and_searches_from_the_command_line(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    for number in range(4):
        picture(number, 80, 60).load().save(gallery / f"{number}.png")
    index = str(tmp_path / "index")
    assert main(["index", "add", str(gallery), "--index", index, "--model", str(published)]) == 0
    capsys.readouterr()
    arguments = ["search", "--index", index, "--model", str(published), "--image", str(gallery / "2.png"), "-k", "2"]
    assert main([*arguments, "--route", "direct", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["hits"]) == 2 and found["route"] == "direct"
