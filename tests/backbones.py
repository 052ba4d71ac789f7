"""Small random checkpoints of the backbones, saved by transformers in the form in which Qwen publishes its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from conftest import WORDS
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.prompts import IMAGE_PAD, PAD, SPECIAL_TOKENS, TURN_END, VIDEO_PAD, VISION_END, VISION_START

FACTOR: Final = 32
VISION: Final = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip
TEXT: Final = {
    "vocab_size": 640, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
KINDS: Final[dict[str, dict[str, Any]]] = {
    "qwen3_vl": {
        "text_config": {
            **TEXT, "num_hidden_layers": 3, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        "vision_config": {**VISION, "deepstack_visual_indexes": [0, 1]},
    },
    # One period of three Gated DeltaNets and one attention.
    "qwen3_5": {
        "text_config": {
            **TEXT, "num_hidden_layers": 4, "head_dim": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": VISION,
    },
}  # fmt: skip
# The keys of the published config.json of Qwen2.5-VL-7B-Instruct, text fields flat at the top as there; sizes shrunk.
FLAT: Final[dict[str, Any]] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96,
    "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "use_cache": True,
    "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vocab_size": 640,
    "vision_config": {
        "depth": 3, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": 64, "patch_size": 16, "spatial_merge_size": 2, "spatial_patch_size": 16, "window_size": 128,
        "fullatt_block_indexes": [2], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
ALL: Final = {**KINDS, "qwen2_5_vl": FLAT}


def published(folder: Path, kind: str, *, tied: bool = True, bare: bool = False) -> Path:
    """The checkpoint, made in `folder`: a tokenizer without `<|emb|>`, spare rows for it, images of 2 to 12 tokens.

    `bare` leaves out the output matrix and the prefix `model.` of every name, as a model without a head is saved.
    """
    tokenizer = qwen_tokenizer()
    ids = {
        "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD, "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }  # fmt: skip
    named = {field: tokenizer.convert_tokens_to_ids(token) for field, token in ids.items()}
    config = AutoConfig.for_model(kind, **ALL[kind], **named, tie_word_embeddings=tied)
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # as far apart as those of a trained model: every norm, bias and gate says something
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    (network.model if bare else network).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": 2 * FACTOR**2, "longest_edge": 12 * FACTOR**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    # What the hub ships in generation_config.json would make embeddings random if anything sampled.
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 5.0}))
    return folder


def qwen_tokenizer(*extra: str) -> Qwen2Tokenizer:
    """Qwen's tokenizer over a small vocabulary, with its special tokens, without `<|emb|>`, and with further tokens."""
    draw = np.random.default_rng(0)
    made = Qwen2Tokenizer()
    core = Tokenizer(BPE())
    core.pre_tokenizer = made.backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator([" ".join(draw.choice(WORDS, 8)) for _ in range(200)], trainer)
    learnt = json.loads(core.to_str())["model"]
    made = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    made.add_tokens(list(extra))
    made.eos_token, made.pad_token, made.padding_side = TURN_END, PAD, "left"
    return made
