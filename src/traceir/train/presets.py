"""Training configurations by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from traceir.data.settings import override
from traceir.errors import InputError
from traceir.suggest import did_you_mean
from traceir.train.config import TrainConfig

Presets = Mapping[str, Callable[[], TrainConfig]]
REMEDIES: Final = {"data/minibeir": "`traceir minibeir build --out data/minibeir --scale full`"}
"""Of data that a preset trains on, what makes it."""


def qwen2_5_vl_7b() -> TrainConfig:
    """The paper's training (section 2): LoRA 128/256, vision frozen, projector trained, AdamW 2e-4, cosine, 1 epoch, batch 1,024.

    Not stated there and chosen here: temperature .05, warm-up of 30 steps, image budget of 4 to 300 cells of 28 x 28 and 480
    text tokens (LamRA's), weight decay 0, AdamW's betas .9 and .999.
    """
    return TrainConfig(
        data="data/mbeir-cot",
        out="out/runs/qwen2.5-vl-7b",
        init="Qwen/Qwen2.5-VL-7B-Instruct",
        prompt_version="trace-1",
        max_reasoning_tokens=256,
        max_text_tokens=480,
        epochs=1.0,
        batch=1024,
        group=1,
        grad_cache=True,
        chunk_tokens=16384,
        checkpointing=True,
        learning_rate=2e-4,
        warmup=30,
        curve="cosine",
        weight_decay=0.0,
        beta=0.999,
        temperature=0.05,
        lora_rank=128,
        lora_alpha=256,
        min_pixels=4 * 28 * 28,
        max_pixels=300 * 28 * 28,
        dtype="bfloat16",
        device="auto",
        workers=8,
        store_pixels=False,
        save_every=100,
        log_every=1,
    )


def over(name: str, init: str, chunk_tokens: int, cell: int = 28) -> Callable[[], TrainConfig]:
    """The paper's training over another backbone, of whose images `cell` x `cell` pixels are one token."""

    def config() -> TrainConfig:
        area = cell * cell
        return replace(
            qwen2_5_vl_7b(), out=f"out/runs/{name}", init=init, chunk_tokens=chunk_tokens, min_pixels=4 * area,
            max_pixels=300 * area,
        )  # fmt: skip

    return config


PRESETS: Final[Presets] = {
    "qwen2-vl-2b": over("qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct", 32768),
    "qwen2.5-vl-3b": over("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", 32768),
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "qwen3-vl-2b": over("qwen3-vl-2b", "Qwen/Qwen3-VL-Embedding-2B", 32768, 32),
    "qwen3-vl-4b": over("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", 16384, 32),
    "qwen3-vl-8b": over("qwen3-vl-8b", "Qwen/Qwen3-VL-Embedding-8B", 16384, 32),
    "qwen3.5-2b": over("qwen3.5-2b", "Qwen/Qwen3.5-2B", 16384, 32),
    "qwen3.5-4b": over("qwen3.5-4b", "Qwen/Qwen3.5-4B", 16384, 32),
}
"""The paper's two, one that it does not try, and those of 2026. Where there is an embedding model of a size, training starts from
it: the start moves more than the method (docs/training.md)."""


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
    """The preset with its places and settings replaced; InputError where its data is not there.

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
    if card is None:
        return config
    from traceir.train.memory import on_card

    return override(on_card(config, card), settings)


def stages_before(name: str, presets: Presets = PRESETS) -> list[str]:
    """The unfinished presets to train before this one, in order: each starts from the checkpoint of the one before."""
    start = Path(presets[name]().init)
    before = start.parent.name
    if before not in presets or (start / "traceir.json").is_file():
        return []
    return [*stages_before(before, presets), before]
