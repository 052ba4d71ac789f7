"""Small models from nothing: a tokenizer trained on a data folder's texts and a Qwen2.5-VL with few parameters.

The classes are the real ones; only the sizes are small, so a small checkpoint goes through all the code that a 7B one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from traceir.batch import ImageBudget
from traceir.forward import TraceModel, add_token, wrap
from traceir.prompts import (
    EMB,
    IMAGE_PAD,
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from traceir.settings import TraceSettings

# Qwen's chat layout in its shortest form, so that the stock processor can render a conversation too.
CHAT_TEMPLATE: Final = Path(__file__).with_name("chat_template.j2").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class SmallSize:
    """Sizes of a small Qwen2.5-VL. `pixels` is the side of the square the model sees; a visual token is 2 x `patch` px."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    inner: int = 512
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_inner: int = 256
    patch: int = 8
    pixels: int = 48
    vocabulary: int = 2048
    initial: float = 0.02
    """Standard deviation of the random weights."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE with Qwen's special tokens; whole words of the data become single tokens.

    `<|emb|>` is among them. Any text can be written in it: unseen words fall into pieces, at worst bytes.
    """
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
    )
    # Every piece begins with a blank; those before punctuation are not written back, so that text read again gives the same ids.
    core.decoder = decoders.Sequence(
        [decoders.ByteLevel(), *(decoders.Replace(f" {mark}", mark) for mark in ",;:.!?"), decoders.Replace(" - ", "-")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL_TOKENS, EMB],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, EMB)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=TURN_END, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, VISION_START, VISION_END, IMAGE_PAD, EMB]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_model(tokenizer: Any, size: SmallSize, settings: TraceSettings, seed: int) -> TraceModel:
    """A random TraceModel of the given size. The vocabulary is padded to a multiple of 64, as Qwen pads its own."""
    rotary = size.hidden // size.heads // 2
    # M-RoPE gives time the fastest frequencies, then height, then width. At Qwen's base of 1e6 and with few dimensions, width
    # would turn by a thousandth of a radian a token and left could not be told from right; base 100 and unequal sections
    # give a token of width about a quarter of a radian.
    time, high = max(1, rotary // 12), max(1, rotary // 5)
    sections = [time, high, rotary - time - high]
    id_of = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        tie_word_embeddings=True,
        image_token_id=id_of(IMAGE_PAD),
        video_token_id=id_of(VIDEO_PAD),
        vision_start_token_id=id_of(VISION_START),
        vision_end_token_id=id_of(VISION_END),
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_heads,
            "initializer_range": size.initial,
            "bos_token_id": id_of(PAD),
            "eos_token_id": id_of(TURN_END),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections},
            "tie_word_embeddings": True,
        },
        vision_config={
            "initializer_range": size.initial,
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_inner,
            "num_heads": size.vision_heads,
            "patch_size": size.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": size.patch * 16,
            "fullatt_block_indexes": list(range(size.vision_layers)),
            "out_hidden_size": size.hidden,
        },
    )
    config.text_config.pad_token_id = None
    area = size.pixels**2
    image = ImageBudget(patch=size.patch, merge=2, temporal=2, min_pixels=area, max_pixels=area)
    torch.manual_seed(seed)
    network = Qwen2_5_VLForConditionalGeneration(config)
    add_token(network, tokenizer, EMB)
    return wrap(network.eval(), tokenizer, settings, image)
