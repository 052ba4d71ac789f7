"""Small random checkpoints in the layouts in which models are published for sentence-transformers, saved by that library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.processing_utils import ProcessorMixin

WORDS = "a red cube and a green ball on the left of the table".split()
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


class ImagesOnlyProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its part for videos, the only one that needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImagesOnlyConfig(Qwen3VLConfig):
    """Under which the library finds that processor."""

    model_type = "pictures_only"


AutoProcessor.register(ImagesOnlyConfig, ImagesOnlyProcessor)


def tokenizer(special: Sequence[str], end: str, length: int, **named: Any) -> PreTrainedTokenizerFast:
    """Bytes and a few words; `end` is put behind every text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [" ".join(WORDS)], trainers.BpeTrainer(vocab_size=300, special_tokens=[*special, "<unk>"], initial_alphabet=alphabet)
    )
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, unk_token="<unk>", model_max_length=length, **named)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """As sentence-transformers 6 saves CLIP: one Transformer module, no Normalize."""
    bare = save_bare_clip(folder.with_name(f"{folder.name}-bare"), seed)
    SentenceTransformer(modules=[Transformer(str(bare))]).save_pretrained(str(folder))
    return folder


def save_bare_clip(folder: Path, seed: int = 0) -> Path:
    """As openai/clip-vit-base-patch32: no modules.json."""
    torch.manual_seed(seed)
    words = tokenizer(("<pad>", "<s>", "</s>"), "</s>", 20, pad_token="</s>", bos_token="<s>")
    text = {**SMALL, "vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return folder


def save_old_clip(folder: Path, seed: int = 0) -> Path:
    """As sentence-transformers/clip-ViT-B-32 lies on the hub: a CLIPModel module in a folder of its own, none in the root."""
    save_bare_clip(folder / "0_CLIPModel", seed)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([module]))
    versions = {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"__version__": versions}))
    return folder


def save_siglip(folder: Path) -> Path:
    """As google/siglip2-base-patch16-naflex: no modules.json, texts of a fixed length of 64."""
    torch.manual_seed(0)
    words = tokenizer(("<pad>", "<s>", "</s>"), "</s>", 64, pad_token="<pad>", model_input_names=["input_ids"])
    text = {**SMALL, "vocab_size": 300, "max_position_embeddings": 64, "projection_size": 32, "eos_token_id": 2}
    text |= {"bos_token_id": 1, "pad_token_id": 0}
    vision = {**SMALL, "patch_size": 16, "num_patches": 16}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    images = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    Siglip2Processor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    """As Qwen/Qwen3-VL-Embedding-2B: a chat template, whose system message is the prompt, the last token, unit length."""
    torch.manual_seed(0)
    words = tokenizer(QWEN_SPECIAL, "<|endoftext|>", 512, pad_token="<|endoftext|>", padding_side="right")
    ids = {token: words.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**SMALL, "vocab_size": 300, "num_key_value_heads": 2, "head_dim": 8, "rope_scaling": rope}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    bare = folder.with_name(f"{folder.name}-bare")
    Qwen3VLModel(config).save_pretrained(bare)
    images = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    ImagesOnlyProcessor(images, words, chat_template=QWEN_TEMPLATE).save_pretrained(bare)
    first = Transformer(str(bare), processing_kwargs={"chat_template": {"add_generation_prompt": True}})
    prompts = {"query": "Represent the user's input.", "document": "Represent the user's input."}
    SentenceTransformer(modules=[first, Pooling(32, "lasttoken"), Normalize()], prompts=prompts).save_pretrained(str(folder))
    return folder


def save_bert(folder: Path, *, pooling: str = "mean", prompts: dict[str, str] | None = None) -> Path:
    """As sentence-transformers/all-MiniLM-L6-v2: texts alone, mean pooling, unit length."""
    torch.manual_seed(0)
    bare = folder.with_name(f"{folder.name}-bare")
    words = tokenizer(("[PAD]", "[CLS]", "[SEP]"), "[SEP]", 32, pad_token="[PAD]")
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=32, **SMALL)).save_pretrained(bare)
    words.save_pretrained(bare)
    modules = [Transformer(str(bare)), Pooling(32, pooling), Normalize()]
    SentenceTransformer(modules=modules, prompts=prompts).save_pretrained(str(folder))
    return folder


def save_gemma(folder: Path) -> Path:
    """As google/embeddinggemma-300m: prompts, mean pooling, two dense layers, unit length, made to be truncated."""
    torch.manual_seed(0)
    bare = folder.with_name(f"{folder.name}-bare")
    words = tokenizer(("<pad>", "<bos>", "<eos>"), "<eos>", 64, pad_token="<pad>")
    config = Gemma3TextConfig(
        vocab_size=300, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=16, **SMALL
    )
    Gemma3TextModel(config).save_pretrained(bare)
    words.save_pretrained(bare)
    dense = [Dense(32, 48, bias=False, activation_function=torch.nn.Identity()), Dense(48, 32, bias=False)]
    modules = [Transformer(str(bare)), Pooling(32, "mean"), *dense, Normalize()]
    SentenceTransformer(modules=modules, prompts=GEMMA_PROMPTS).save_pretrained(str(folder))
    return folder
