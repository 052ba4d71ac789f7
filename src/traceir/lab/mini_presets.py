"""Training configurations of the miniature (mini_presets.toml), beside those of train/presets.py: `--preset` knows both."""

from __future__ import annotations

import tomllib
from functools import partial
from pathlib import Path
from typing import Any, Final

from traceir.train import presets
from traceir.train.config import TrainConfig
from traceir.train.small import SmallSize

_SOURCE: Final = tomllib.loads(Path(__file__).with_name("mini_presets.toml").read_text(encoding="utf-8"))


def preset(name: str) -> TrainConfig:
    """One of mini_presets.toml."""
    fields = _fields(name)
    size = SmallSize(**_SOURCE["sizes"][fields["size"]])
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return TrainConfig(**fields | lists | {"size": size})


def _fields(name: str) -> dict[str, Any]:
    own: dict[str, Any] = dict(_SOURCE["presets"][name])
    return _fields(own.pop("base")) | own if "base" in own else own


PRESETS: Final[presets.Presets] = {**{name: partial(preset, name) for name in _SOURCE["presets"]}, **presets.PRESETS}


def resolve(name: str, **paths: Any) -> TrainConfig:
    """As `presets.resolve`, for all presets."""
    return presets.resolve(name, presets=PRESETS, **paths)


def stages_before(name: str) -> list[str]:
    """As `presets.stages_before`, for all presets."""
    return presets.stages_before(name, PRESETS)
