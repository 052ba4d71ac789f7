"""Training configurations by name (presets.toml), and what fits one accelerator by the arithmetic of docs/training.md.

What a training needs follows from the configuration of the checkpoint that it starts from; no weight is read and nothing is
tried, so the factors of activations are estimates. The precheck tries the longest samples before the first step.
"""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from traceir.adapter import LINEARS, projectors
from traceir.checkpoint import fetch
from traceir.data.settings import override
from traceir.errors import InputError, ModelError
from traceir.model import network_class
from traceir.suggest import did_you_mean
from traceir.train.config import TrainConfig

log = logging.getLogger(__name__)

GIB: Final = 2**30
USABLE: Final = 0.9
"""Share of a card's memory; the rest is left to the context, workspaces and fragments."""
STEPS: Final = (65536, 32768, 16384, 8192, 4096, 2048)
"""Chunks that are tried. A row of two images and some text has up to 1,000 tokens: fewer would not hold two rows."""
WRITTEN: Final = 0.5
"""Share of a chunk's tokens that are supervised, at most: rows that write as much as they read."""
Presets = Mapping[str, Callable[[], TrainConfig]]
REMEDIES: Final = {"data/minibeir": "`traceir minibeir build --out data/minibeir --scale full`"}
"""By the data folder of a preset: the command that makes it."""


def _preset(name: str, init: str, chunk_tokens: int, side: int) -> Callable[[], TrainConfig]:
    """The paper's training over a backbone of whose images `side` x `side` pixels are one token."""
    area = side * side
    return partial(
        TrainConfig, **_DATA["paper"], out=f"out/runs/{name}", init=init, chunk_tokens=chunk_tokens, min_pixels=4 * area,
        max_pixels=300 * area,
    )  # fmt: skip


_DATA: Final = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PRESETS: Final[Presets] = {name: _preset(name, **row) for name, row in _DATA["presets"].items()}


def resolve(
    name: str,
    *,
    presets: Presets = PRESETS,
    data: str | None = None,
    out: str | None = None,
    init: str | None = None,
    settings: Sequence[str] = (),
    card: int | None = None,
) -> TrainConfig:
    """The preset with its paths and settings replaced; InputError where its data is not there.

    `card` fits it to one accelerator of so many GiB; what `settings` say counts more. Other data than the preset's get a pixel
    cache of their own run, unless `settings` name one.
    """
    if name not in presets:
        raise InputError(f"preset {name!r} is unknown{did_you_mean(name, presets)}; choose one of {', '.join(presets)}")
    preset = presets[name]()
    config = replace(preset, data=data, cache="") if data is not None and data != preset.data else preset
    config = override(replace(config, out=out or config.out, init=init or config.init), settings)
    if not Path(config.data).exists():
        remedy = REMEDIES.get(config.data, "--data DIR")
        raise InputError(f"data folder {config.data} does not exist; make it by or name another: {remedy}")
    before = Path(config.init).parent.name
    if config.init == preset.init and before in presets and not Path(config.init).is_dir():
        raise InputError(
            f"preset {name} starts from {config.init}, which is not there; train --preset {before} first, or name another start"
            " with --init"
        )
    return config if card is None else override(on_card(config, card), settings)


def stages_before(name: str, presets: Presets = PRESETS) -> list[str]:
    """The unfinished presets to train before this one, in order: each starts from the checkpoint of the one before."""
    start = Path(presets[name]().init)
    before = start.parent.name
    if before not in presets or (start / "traceir.json").is_file():
        return []
    return [*stages_before(before, presets), before]


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes: of weights that stay as they are, of those that train with gradient and AdamW, of embeddings and scores, and for
    each token of a chunk."""

    frozen: int
    trained: int
    scores: int
    token: int

    def total(self, chunk_tokens: int) -> int:
        return self.frozen + self.trained + self.scores + self.token * chunk_tokens


def on_card(config: TrainConfig, gib: int) -> TrainConfig:
    """The training on one card of `gib` GiB: GradCache, checkpointing, and the largest chunks that fit. It learns the same.

    Raises InputError where not even small chunks fit, naming the LoRA rank that would.
    """
    if config.init == "random" or not config.lora_rank:
        raise InputError("--card is for LoRA over a checkpoint: choose one of the Qwen presets, or set lora_rank and --init")
    network = empty(config.init)
    need = need_of(config, network)
    tokens = largest(need, gib)
    if not tokens:
        ranks = [rank for rank in (64, 32, 16, 8) if rank < config.lora_rank]
        fits = next((rank for rank in ranks if largest(need_of(replace(config, lora_rank=rank), network), gib)), 0)
        lower = f"set lora_rank={fits} and lora_alpha={2 * fits}, which learns less, or " if fits else ""
        raise InputError(
            f"{config.init} with lora_rank={config.lora_rank} needs {need.total(STEPS[-1]) / GIB:.1f} GiB at chunks of "
            f"{STEPS[-1]} tokens, and {gib * USABLE:.1f} of {gib} GiB can be used; {lower}choose a smaller backbone"
        )
    log.info(
        "one card of %d GiB: %.1f GB of weights, %.1f GB that trains, %.1f GB for chunks of %d tokens (by arithmetic, not tried)",
        gib, need.frozen / 1e9, need.trained / 1e9, need.token * tokens / 1e9, tokens,
    )  # fmt: skip
    return replace(config, chunk_tokens=tokens, grad_cache=True, checkpointing=True)


def largest(need: Need, gib: int) -> int:
    """The most tokens of a chunk that fit on a card, of STEPS; 0 where there are none."""
    return next((tokens for tokens in STEPS if need.total(tokens) <= gib * GIB * USABLE), 0)


def need_of(config: TrainConfig, network: Any) -> Need:
    """What LoRA over `network`, which may be without weights, needs with GradCache and checkpointing."""
    text = network.config.text_config
    width, inner, layers, vocabulary = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size
    projector = sum(_size(part.parameters()) for part in projectors(network).values()) if config.train_projector else 0
    trained = projector + config.lora_rank * sum(
        layer.in_features + layer.out_features
        for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear) and re.fullmatch(LINEARS, name)
    )  # fmt: skip
    rows = config.batch * (2 + config.negatives)
    activations = 2 * layers * width + 2 * (10 * width + 4 * inner)
    return Need(
        frozen=(2 if config.dtype == "bfloat16" else 4) * (_size(network.parameters()) - projector),
        trained=16 * trained,
        scores=20 * width * rows + 12 * config.batch * (rows - config.batch),
        token=int(activations + WRITTEN * 10 * vocabulary),
    )


def empty(source: str) -> Any:
    """The network of a checkpoint folder or hub id without its weights, of which only the configuration is read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(fetch(source, weights=False), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {source}: {error}") from error
    with torch.device("meta"):
        return network_class(config.model_type, source)(config)


def _size(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
