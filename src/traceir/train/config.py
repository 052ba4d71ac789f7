"""The configuration of a training run: every field, what may change when it goes on, and the names of earlier releases."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from traceir.batch import PoolingPosition
from traceir.data.samples import Sampling
from traceir.data.settings import check_choices
from traceir.errors import InputError, TrainError
from traceir.files import write_whole
from traceir.precision import WIDEST, bfloat16_on
from traceir.prompts import PromptVersion
from traceir.train.small import SmallSize

log = logging.getLogger(__name__)

FREE: Final = frozenset(
    """threads log_every cache device workers report_to precheck keep shard chunk_tokens save_every grad_cache checkpointing
    diverged""".split()
)
"""Fields that may change when a run goes on: they decide where and how it runs, not what it learns."""
FORMER_KEYS: Final = {"family": "group", "read_out": "pooling_position"}
FORMER_VALUES: Final = {("teach", "lessons"): "pretraining"}
REMEDY: Final = "start it with torchrun, and set shard=true to divide weights, gradients and AdamW's state among the processes"
REFUSED: Final = {"fsdp": "FSDP's settings file", "deepspeed": "DeepSpeed"}
"""Settings of earlier releases that never ran."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. `--set key=value` overrides any field; the resolved whole goes into meta.json."""

    data: str
    out: str
    cache: str = ""  # Folder for resized images, shared by runs on the same data; `pixels` in the run's own folder if empty.
    init: str = "random"  # `random`, or the checkpoint to start from.
    teach: Literal["pairs", "pretraining", "both", "rerank", "describe"] = "pairs"
    """The TRACE objective, language-model loss on lessons/, or both. For rerankers: `describe`, the same loss on the answers of
    labels behind their candidates; `rerank`, yes or no to a query and a candidate together, by a softmax over each query's
    positive and its `negatives`, the query with what its label says that it writes."""
    cot: Literal["both", "reasoning", "answer", "tagged", "none"] = "both"
    """What a complex query writes before `<|emb|>` (paper, Table 5): reasoning and answer (`both`), `reasoning`, `answer`;
    `tagged` is both and the closing tag in plain text (Table 4); `none` trains the baseline that never reasons."""
    candidates: Literal["direct", "answer", "reason"] = "direct"  # What candidates write (Table 6); `direct`: nothing.
    reasoned: float = 1.0  # Share of the complex queries that keep their reasoning; the others are taught as simple ones.
    pooling_position: PoolingPosition = "before_token"
    """Which state is the embedding (Table 4): the one that predicts `<|emb|>`, or `at_token`, that of `<|emb|>` itself."""
    steps: int = 1000
    epochs: float = 0.0  # If above 0, as many steps as draw that many times the number of pairs; `steps` says nothing then.
    batch: int = 32  # Pairs of one InfoNCE batch over all processes, all of one task: its in-batch negatives.
    accumulate: int = 1  # Batches, of different tasks as far as the rotation goes, whose gradients make one step.
    group: int = 4
    """Hard-negative group: neighbours in a train file that stay together in a batch; builders write near twins side by side."""
    negatives: int = 0  # Hard negatives of a query, from its neg_cand_list.
    sampling: Sampling = "balanced"  # A task's share of batches: its weight times size^0, size, or size^(1/temperature).
    sampling_temperature: float = 2.0
    grad_cache: bool = False  # Two passes over chunks, in the memory of one chunk whatever the batch (gradcache.py).
    chunk_tokens: int = 8192  # Padded tokens of one forward.
    checkpointing: bool = False  # Activations are computed again in the backward pass: less memory, a third more work.
    learning_rate: float = 7e-4
    warmup: int = 200
    curve: Literal["hold", "cosine"] = "hold"
    """After the warm-up: `hold`, then a linear fall to zero over the last `decay` of the steps; or `cosine` to zero (paper)."""
    decay: float = 0.2
    weight_decay: float = 0.01
    beta: float = 0.98  # AdamW's second beta; the first is 0.9.
    clip: float = 1.0
    temperature: float = 0.04
    learn_temperature: bool = False  # Its logarithm trains too, at the rate of everything else, from `temperature` on.
    lambda_gen: float = 1.0
    lambda_ret: float = 1.0
    symmetric: bool = False  # Candidates look for their queries as well; the mean of both directions.
    distil: float = 0.0  # Weight of 1 - cosine between a reasoning query's prefill state and its embedding (not in the paper).
    direct_ret: float = 0.0  # Weight of InfoNCE from that prefill state (not in the paper).
    matryoshka_dims: tuple[int, ...] = ()
    """Widths that vectors may be cut to (not in the paper): InfoNCE is the sum over the first so many components, and the full
    width with weight 1 where it is not among them. `matryoshka_weights` weighs them in the same order; 1 each if empty."""
    matryoshka_weights: tuple[float, ...] = ()
    lora_rank: int = 0  # 0 trains all weights; otherwise LoRA on the language model's linears, and the row of `<|emb|>`.
    lora_alpha: int = 256
    lora_dropout: float = 0.0
    train_vision: bool = True  # False freezes the vision encoder (paper); with LoRA it is always frozen.
    train_projector: bool = True
    any_target: float = 0.1  # Share of queries that do not name the modality they look for, as a search may not.
    min_pixels: int = 0  # Image budget in pixels; 0 keeps the checkpoint's own.
    max_pixels: int = 0
    augment: int = 0  # Images are shifted by up to this many pixels (of the model's view) in training.
    weights: dict[str, float] = field(default_factory=dict)  # Of a task in the rotation; 1 if not named, 0 leaves it out.
    seed: int = 0
    mixed_precision: Literal["auto"] | bool = "auto"
    """Forward and backward in bfloat16; weights that train stay float32. `auto`: where the device is faster in it (precision.py),
    decided at the first start and kept for the whole run."""
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of the weights in memory; bfloat16 halves a frozen base under LoRA.
    device: Literal["cpu", "auto"] = "cpu"  # `auto`: the accelerator that is there.
    threads: int = 1
    workers: int = 0  # Processes that decode images and lay out batches ahead of the loop; 0 does it in the loop.
    store_pixels: bool = True  # All images are decoded once, before the first step, into `cache`; False: as they come.
    precheck: bool = True  # A trial of the longest samples first, so that memory runs out in the first minute or not at all.
    diverged: float = 10.0  # A loss this many times a task's usual one (at least 1) stops the run; 0 never does.
    report_to: tuple[str, ...] = ()  # Trackers that accelerate knows: tensorboard, trackio, wandb and others, if installed.
    shard: bool = False  # Weights, gradients and AdamW's state are divided among the processes (FSDP2) instead of DDP.
    save_every: int = 500
    keep: tuple[int, ...] = ()  # Steps whose checkpoints are kept for good; of the others only the newest is.
    log_every: int = 20
    size: SmallSize = field(default_factory=SmallSize)
    prompt_version: PromptVersion = "brief-1"
    max_reasoning_tokens: int = 96
    max_text_tokens: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "teach", FORMER_VALUES.get(("teach", self.teach), self.teach))

    @staticmethod
    def modern_setting(key: str, value: str) -> tuple[str, str]:
        """A setting under its name of today, with a notice (data/settings.py); InputError for one that never ran."""
        if key in REFUSED:
            raise InputError(f"--set {key}={value}: {REFUSED[key]} is not supported; {REMEDY}")
        ((new_key, new_value),) = modern({key: value}).items()
        if (new_key, new_value) != (key, value):
            log.warning("--set %s=%s is now --set %s=%s", key, value, new_key, new_value)
        return new_key, new_value

    def rate(self, step: int) -> float:
        """Learning-rate factor in [0, 1] of steps 0, 1 ...: a linear warm-up, then `hold` and a linear fall, or `cosine`."""
        if self.curve == "cosine":
            warm = min(self.warmup, self.steps)
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        falling = max(1, round(self.steps * self.decay))
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling))


def modern(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration on disk under their names and values of today."""
    return {
        FORMER_KEYS.get(key, key): FORMER_VALUES.get((key, value), value) if isinstance(value, str) else value
        for key, value in fields.items()
    }


def check(config: TrainConfig) -> TrainConfig:
    """The configuration itself; InputError for fields that do not go together."""
    check_choices(config)
    if config.dtype == "bfloat16" and not config.lora_rank:
        raise InputError("dtype bfloat16 is for a frozen base: set lora_rank, or dtype=float32 with mixed_precision=true")
    if config.pooling_position == "at_token" and (config.distil or config.direct_ret):
        raise InputError("distil and direct_ret compare with the state that predicts <|emb|>; set pooling_position=before_token")
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        raise InputError(f"min_pixels {config.min_pixels} is above max_pixels {config.max_pixels}; swap them")
    if config.teach == "rerank" and config.negatives < 1:
        raise InputError(
            "teach=rerank needs wrong candidates: set negatives=4, and data to a folder that `traceir mine` has made"
        )
    if config.lora_rank and config.init == "random":
        raise InputError("lora_rank adapts a checkpoint, and init is random; name one with --init")
    for name in ("temperature", "batch", "accumulate", "chunk_tokens", "learning_rate", "log_every", "save_every"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; give a value above 0")
    dims, weights = config.matryoshka_dims, config.matryoshka_weights
    if min(dims, default=1) < 1 or len({*dims}) < len(dims) or (weights and len(weights) != len(dims)):
        raise InputError(
            f"matryoshka_dims {dims} with weights {weights}: give each width once, from 1, and a weight for each or none"
        )
    if min(weights, default=1.0) <= 0:
        raise InputError(f"matryoshka_weights are {weights}; give values above 0, or leave the width out")
    if dims and (config.teach == "pretraining" or config.lambda_ret <= 0):
        raise InputError("matryoshka_dims nest the retrieval loss, and this run has none: teach pairs, or set lambda_ret")
    if config.epochs <= 0 and config.steps < 1:
        raise InputError(f"steps is {config.steps}; give at least 1, or epochs")
    return config


def nested_widths(config: TrainConfig, width: int) -> dict[int, float]:
    """The weights of nested InfoNCE by width, the widest first, for vectors of `width`; {} where it is not nested.

    Raises InputError for a width that the vectors do not have.
    """
    if not config.matryoshka_dims:
        return {}
    if (widest := max(config.matryoshka_dims)) > width:
        raise InputError(f"matryoshka_dims names {widest}, and vectors of this model have {width} components; give 1 to {width}")
    weights = config.matryoshka_weights or (1.0,) * len(config.matryoshka_dims)
    return dict(sorted(({width: 1.0} | dict(zip(config.matryoshka_dims, weights, strict=True))).items(), reverse=True))


def settled(config: TrainConfig, device: str, begun: Path) -> TrainConfig:
    """The configuration with `mixed_precision` true or false: as asked, else as the file `begun` says, else the faster one."""
    if config.mixed_precision != "auto":
        chosen, why = config.mixed_precision, "as asked"
    elif (before := begun_in(begun)) != "auto":
        chosen, why = bool(before), f"as {begun} says"
    else:
        speed = bfloat16_on(device, _width(config))
        chosen, why = speed.fast, speed.why
    log.info("%s: %s", "bfloat16" if chosen else "float32", why)
    half = [name for name, on in (("mixed_precision=true", chosen), ("dtype=bfloat16", config.dtype == "bfloat16")) if on]
    if half and (speed := bfloat16_on(device, _width(config))).slow:
        log.warning("%s is slow here: %s; float32 is the faster type for a new run", " and ".join(half), speed.why)
    return replace(config, mixed_precision=chosen)


def begun_in(file: Path) -> Any:
    """`mixed_precision` of a configuration on disk (config.json of a run, or the `base` of ablation.json); `auto` without one."""
    fields = json.loads(file.read_text()) if file.is_file() else {}
    return fields.get("base", fields).get("mixed_precision", "auto")


def claim(out: Path, config: TrainConfig) -> None:
    """Writes the configuration into an empty folder, or checks that the folder's own is the same."""
    file = out / "config.json"
    written = json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"
    if not file.is_file():
        write_whole(file, written)
        return
    old, new = modern(json.loads(file.read_text())), json.loads(written)
    changed = [key for key in sorted(new) if key in old and old[key] != new[key] and key not in FREE]
    if changed:
        pairs = ", ".join(f"{key}: {old[key]!r} -> {new[key]!r}" for key in changed)
        raise TrainError(f"{out} holds a run with another configuration ({pairs}); choose another --out")


def _width(config: TrainConfig) -> int:
    """Of the language model; that of a large one where the start is no folder with a config.json."""
    if config.init == "random":
        return config.size.hidden
    file = Path(config.init) / "config.json"
    fields = json.loads(file.read_text()) if file.is_file() else {}
    return int(fields.get("text_config", fields).get("hidden_size", WIDEST))
