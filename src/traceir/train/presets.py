"""Training configurations by name (presets.toml)."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from traceir.data.settings import override
from traceir.errors import InputError
from traceir.suggest import did_you_mean
from traceir.train.config import TrainConfig

Presets = Mapping[str, Callable[[], TrainConfig]]
REMEDIES: Final = {"data/minibeir": "`traceir minibeir build --out data/minibeir --scale full`"}
"""Of data that a preset trains on, what makes it."""


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
