"""Model shapes for benchmarks/train.py, made-up batches of stated lengths, and how large a batch of them one device trains.

The 2b, 3b and 7b shapes have the sizes of published configurations and random weights, made on the device itself in bfloat16;
their tokenizer is the miniature's, whose ids are all within their vocabularies. `mini` is the bundled checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from traceir.adapter import attach
from traceir.batch import IGNORE, ImageBudget, Layout
from traceir.checkpoint import bundled_model
from traceir.errors import InputError
from traceir.lab.mini_presets import PRESETS
from traceir.model import TraceModel, load, wrap
from traceir.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from traceir.train.batches import Chunk, TrainBatch
from traceir.train.config import TrainConfig
from traceir.train.gradcache import Objective, Reader, recomputing, step

COMMON: Final[dict[str, Any]] = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 28,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION: Final[dict[str, Any]] = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one network: the fields of a published config.json (`source`), None for the bundled checkpoint. `preset` is the
    training configuration of that size."""

    source: str
    preset: str
    fields: dict[str, Any] | None = None


SHAPES: Final = {
    "mini": Shape("models/mini of this repository", "mini"),
    "2b": Shape("config.json of Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-2b", {
        **COMMON, "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }),
    "3b": Shape("config.json of Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b", {
        **COMMON, "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000, "vocab_size": 151936,
        "tie_word_embeddings": True, "vision_config": {**VISION, "out_hidden_size": 2048},
    }),
    "7b": Shape("config.json of Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b", {
        **COMMON, "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "vocab_size": 152064,
        "tie_word_embeddings": False, "vision_config": {**VISION, "out_hidden_size": 3584},
    }),
}  # fmt: skip
PEAKS: Final = (("PCIe", 756e12), ("H100", 989e12), ("H200", 989e12))
"""Part of a device's name -> dense bfloat16 FLOP/s: half of what NVIDIA's H100 and H200 data sheets give with sparsity."""


def empty_network(shape: Shape, device: str) -> Any:
    """The stock network of a published shape with random weights, made on `device` in bfloat16 from the start."""
    assert shape.fields is not None
    fields = {**shape.fields}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def build(name: str, device: str, *, lora: bool, precision: str, seed: int = 0) -> TraceModel:
    """A model of this shape in training mode: the paper's LoRA trains with `lora`, else all weights."""
    shape = SHAPES[name]
    bundled = load(bundled_model(), device=device, dtype=torch.bfloat16 if lora and precision == "bf16" else torch.float32)
    model = bundled
    if shape.fields is not None:
        torch.manual_seed(seed)
        network, tokenizer = empty_network(shape, device), bundled.processor.tokenizer
        for field, token in (
            ("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD),
            ("vision_start_token_id", VISION_START), ("vision_end_token_id", VISION_END),
        ):  # fmt: skip
            setattr(network.config, field, tokenizer.convert_tokens_to_ids(token))
        preset = PRESETS[shape.preset]()
        image = ImageBudget(min_pixels=preset.min_pixels, max_pixels=preset.max_pixels)
        settings = replace(bundled.settings, max_text_tokens=preset.max_text_tokens)
        model = wrap(network if precision == "bf16" else network.float(), tokenizer, settings, image)
    if lora:
        attach(model, rank=128, alpha=256, dropout=0.0, train_projector=True, seed=seed)
    else:
        model.network.requires_grad_(True)
    model.network.train()
    return model


def optimiser_of(module: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what trains, as the presets set it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=config.learning_rate / 10, betas=(0.9, config.beta), weight_decay=config.weight_decay
    )  # fmt: skip


def prepared(reader: Reader, device: str, precision: str) -> Any:
    """The reader as the loop hands it to our step: under autocast where the precision is bf16."""
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=device == "cpu").prepare_model(reader)


# Made-up batches


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a made-up pair: the query's prompt, of which so many are its image's, what it writes, and the candidate."""

    query: int = 300
    image: int = 256
    reasoning: int = 100
    candidate: int = 256

    @property
    def whole(self) -> int:
        """Tokens of a pair."""
        return self.query + self.reasoning + self.candidate

    @property
    def sides(self) -> tuple[int, int]:
        """Visual tokens on a side of a query's image and of a candidate's, the largest that leaves 24 tokens of text."""
        return _root(self.image), _root(max(1, self.candidate - 24))


def made_up_batch(model: TraceModel, batch: int, lengths: Lengths, chunk_tokens: int, seed: int = 0) -> TrainBatch:
    """A batch of `batch` pairs of random tokens and images, every row of a side of one length; no example of any data."""
    draw, (shown, offered) = np.random.default_rng(seed), lengths.sides
    unit = model.processor.image.patch * model.processor.image.merge
    if shown**2 != lengths.image or lengths.query < lengths.image + 4:
        raise InputError(f"{lengths.image} image tokens are no square within {lengths.query - 4} tokens of a query")
    images = {
        side: [draw.integers(0, 256, (side * unit, side * unit, 3), dtype=np.uint8) for _ in range(4)]
        for side in (shown, offered)
    }
    queries = [_row(model, draw, lengths.query, shown, images[shown][n % 4], lengths.reasoning) for n in range(batch)]
    candidates = [_row(model, draw, lengths.candidate, offered, images[offered][n % 4], None) for n in range(batch)]
    names = tuple(f"made up {number}" for number in range(batch))
    return TrainBatch(
        0, "made up", _chunks(model, queries, chunk_tokens), _chunks(model, candidates, chunk_tokens),
        torch.eye(batch, dtype=torch.bool), ((batch, 0),), names, batch * (lengths.reasoning + 1),
    )  # fmt: skip


def _row(
    model: TraceModel, draw: np.random.Generator, prompt: int, side: int, image: npt.NDArray[np.uint8], writes: int | None
) -> Layout:
    """Two tokens, an image, then text up to `prompt` tokens, and what is written behind it (None: a candidate)."""
    tokens, written = side * side, writes or 0
    ids = draw.integers(300, 1500, prompt + written)
    ids[2 : 2 + tokens] = model.processor.special[IMAGE_PAD]
    high, wide = np.divmod(np.arange(tokens), side)
    grid = np.stack([np.zeros(tokens, dtype=np.int64), high, wide]) + 2
    rest = np.arange(prompt + written - 2 - tokens) + 2 + side
    positions = np.concatenate([np.tile(np.arange(2), (3, 1)), grid, np.tile(rest, (3, 1))], axis=1)
    targets = np.full(len(ids), IGNORE)
    if writes is not None:
        targets[prompt - 1 :] = [*ids[prompt:], model.processor.emb_id]
    return Layout(ids, targets, positions, (image,), len(ids) - 1, 0)


def _chunks(model: TraceModel, layouts: Sequence[Layout], chunk_tokens: int) -> tuple[Chunk, ...]:
    rows = max(1, chunk_tokens // len(layouts[0]))
    starts = range(0, len(layouts), rows)
    return tuple(
        Chunk(model.processor.collate(layouts[at : at + rows], raw=True), torch.arange(at, min(at + rows, len(layouts))))
        for at in starts
    )


def _root(tokens: int) -> int:
    return int(tokens**0.5)


# FLOPs


def flops(model: TraceModel, pairs: int, lengths: Lengths) -> tuple[float, float]:
    """FLOPs that one made-up batch under LoRA is credited with, and those of one forward of all its rows.

    A parameter costs 2 FLOPs a token forward, 2 backward for the gradient of its input and, where it trains, 2 for its own. A
    frozen linear under LoRA is thus credited 4, what trains 6; the frozen vision tower, below everything that trains, 2.
    Attention scores and products and the embedding table are not counted, the head only where a token is supervised, and
    nothing that is computed again (GradCache's second forward, checkpointing's) is credited.
    """
    tokens = pairs * sum(side**2 for side in lengths.sides)
    seen = {"language_model": pairs * lengths.whole, "merger": tokens, "visual": tokens * model.processor.image.merge**2}
    text = model.network.config.text_config
    forward = 2.0 * text.vocab_size * text.hidden_size * pairs * (lengths.reasoning + 1)
    credited = 2 * forward
    for name, parameter in model.network.named_parameters():
        if "embed_tokens" in name or "lm_head" in name or ".original_module." in name:
            continue
        component = next(part for part in ("merger", "visual", "language_model") if part in name)
        work = 2.0 * parameter.numel() * seen[component]
        forward += work
        credited += work * (1 + (component != "visual") + parameter.requires_grad)
    return credited, forward


# Capacity


@dataclass(frozen=True, slots=True)
class Step:
    """One training step of a made-up batch: seconds None and `ended` set where memory ran out."""

    batch: int
    chunk_tokens: int
    checkpointing: bool
    seconds: float | None = None
    tokens_per_second: float | None = None
    pairs_per_second: float | None = None
    peak_gib: float | None = None
    share_of_peak: float | None = None
    share_with_recomputation: float | None = None
    ended: str = ""


class Capacity:
    """Training steps of growing made-up batches on one device, with GradCache and LoRA as in the paper."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.lengths, self.seed = options.device, options.lengths, options.seed
        self.config = PRESETS[SHAPES[options.shape].preset]()
        self.model = build(options.shape, self.device, lora=True, precision=options.precision, seed=self.seed)
        reader = Reader(self.model, self.config.temperature)
        self.optimiser = optimiser_of(reader, self.config)
        self.reader = prepared(reader.to(self.device), self.device, options.precision)
        self.peak = peak_flops(self.device)

    def measure(self, batch: int, chunk_tokens: int, checkpointing: bool) -> Step:
        """One step at this batch; the caller has run a smaller one before, so that nothing is set up while it is timed."""
        tried = Step(batch, chunk_tokens, checkpointing)
        seconds = self._run(batch, chunk_tokens, checkpointing)
        if seconds is None:
            gc.collect()
            torch.cuda.empty_cache()
            return replace(tried, ended="out of memory")
        credited, forward = flops(self.model, batch, self.lengths)
        tokens, again = batch * self.lengths.whole, credited + forward * (1 + checkpointing)
        return replace(
            tried,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            pairs_per_second=batch / seconds,
            peak_gib=peak_mib(self.device) / 2**10,
            share_of_peak=credited / seconds / self.peak if self.peak else None,
            share_with_recomputation=again / seconds / self.peak if self.peak else None,
        )

    def _run(self, batch: int, chunk_tokens: int, checkpointing: bool) -> float | None:
        made_up = made_up_batch(self.model, batch, self.lengths, chunk_tokens, self.seed)
        if checkpointing:
            self.model.network.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recomputing}
            )
        else:
            self.model.network.gradient_checkpointing_disable()
        reset_peak(self.device)
        started = time.perf_counter()
        try:
            batch_there = made_up.to(torch.device(self.device))
            step(self.reader, batch_there, Objective(), cache=True, seed=self.seed)
            torch.nn.utils.clip_grad_norm_([p for p in self.reader.parameters() if p.requires_grad], self.config.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.device != "cpu":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            self.optimiser.zero_grad()
            return None
        return time.perf_counter() - started


def capacity(options: argparse.Namespace) -> dict[str, Any]:
    """Chunk sizes with and without checkpointing at the smallest batch, then growing batches at the fastest of them.

    The batch doubles until a step takes `--seconds` or memory ends; after the first slow step only the last batch is still tried.
    """
    bench, sizes = Capacity(options), options.batch
    bench.measure(min(8, sizes[0]), options.chunk_tokens[-1], True)
    tried = [(tokens, again) for again in (True, False) for tokens in options.chunk_tokens]
    first = [bench.measure(sizes[0], *chunk) for chunk in tqdm(tried, desc="chunks")]
    fits = [measured for measured in first if measured.seconds is not None]
    if not fits:
        raise InputError(f"not even batch {sizes[0]} at {options.chunk_tokens[-1]} tokens a chunk fits; give smaller ones")
    best = max(fits, key=lambda measured: measured.tokens_per_second or 0.0)
    grown = [best]
    for batch in tqdm(sizes[1:], desc="batches"):
        slow = (grown[-1].seconds or 0.0) >= options.seconds
        if slow and batch != sizes[-1]:
            continue
        grown.append(bench.measure(batch, best.chunk_tokens, best.checkpointing))
        if grown[-1].seconds is None:
            break
    trained = sum(p.numel() for p in bench.reader.parameters() if p.requires_grad)
    return {
        "lengths": asdict(options.lengths),
        "parameters": sum(p.numel() for p in bench.reader.parameters()),
        "trained": trained,
        "peak_flops": bench.peak,
        "chunks": [asdict(measured) for measured in first],
        "batches": [asdict(measured) for measured in grown],
        "largest_batch": max(measured.batch for measured in grown if measured.seconds is not None),
    }


def capacity_table(run: dict[str, Any]) -> list[str]:
    """The steps as Markdown."""
    lengths = run["lengths"]
    lines = [
        f"Made-up batches: queries of {lengths['query']} tokens ({lengths['image']} of an image) and {lengths['reasoning']} of "
        f"reasoning, candidates of {lengths['candidate']}. {run['trained'] / 1e6:.1f} M of {run['parameters'] / 1e6:.0f} M "
        "parameters train (LoRA 128/256, projector, `<|emb|>`). GradCache; the step with its optimiser, not making the batch. "
        "Share of the peak: 4 FLOPs a frozen parameter and token, 6 a trained one, 2 in the vision tower; nothing computed again "
        "is credited, and what is computed again counts in the last column only.",
        "",
        "| batch | tokens a chunk | checkpointing | seconds | pairs/s | tokens/s | peak GiB | share of peak | with repeats |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for own in (*run["chunks"], *run["batches"][1:]):
        head = f"| {own['batch']} | {own['chunk_tokens']} | {'yes' if own['checkpointing'] else 'no'} |"
        if own["seconds"] is None:
            lines.append(f"{head} {own['ended']} | | | | | |")
            continue
        shares = [f"{100 * own[key]:.1f} %" if own[key] else "-" for key in ("share_of_peak", "share_with_recomputation")]
        lines.append(
            f"{head} {own['seconds']:.2f} | {own['pairs_per_second']:.1f} | {own['tokens_per_second']:.0f} "
            f"| {own['peak_gib']:.2f} | {shares[0]} | {shares[1]} |"
        )
    return lines


# The machine


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s by the data sheet; None for a device whose figure is not written down here."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS if part in name), None)


def machine(device: str) -> dict[str, Any]:
    return {
        "processor": _processor_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def resident_mib(device: str) -> float:
    """Memory in use now: of this process, or of the accelerator."""
    if device != "cpu":
        return float(torch.cuda.memory_allocated()) / 2**20
    return _status("VmRSS") or peak_mib(device)


def reset_peak(device: str) -> bool:
    """Forgets the peak so far; False where the system does not let us, and what was loaded before counts too."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib(device: str) -> float:
    """Peak memory. Linux's VmHWM is this program's own; ru_maxrss also remembers the process that started it."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _status(name: str) -> float | None:
    listed = Path("/proc/self/status")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), None)
