"""What TraceIR keeps beside a checkpoint's weights: traceir.json (docs/formats.md, section 1), image settings, tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from traceir.batch import ImageBudget, PoolingPosition, Processor
from traceir.checkpoint import MODULES, OWN_MODULE, read_object
from traceir.errors import InputError, ModelError
from traceir.profiles import JSON_KEYS, Profile, profile_of
from traceir.prompts import PromptVersion
from traceir.rerank_prompts import DESCRIBE, RERANK
from traceir.world import World, world_of

log = logging.getLogger(__name__)

FORMAT: Final = 1
SETTINGS: Final = "traceir.json"
PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSORS: Final = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}
"""Model type -> the processor that transformers makes for it."""
_OPTIONAL: Final = ("candidates_write", "matryoshka_dims", "rerank", "rerank_temperature", "world", "profile")
"""Fields that are left out where they are not used, so that earlier releases read the file too."""


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What traceir.json holds: how the checkpoint was taught to read and to be read. Raises InputError for unknown words."""

    prompt_version: PromptVersion = "trace-1"
    pooling_position: PoolingPosition = "before_token"
    candidates_write: bool = False
    """Whether candidates may write too, as no checkpoint of TRACE does; the paper's Table 6 tries it."""
    matryoshka_dims: tuple[int, ...] = ()
    """Widths that its vectors may be cut to, the full one among them, as it was trained by nested losses; () if it was not."""
    rerank: Literal["", "rerank-1", "describe-1"] = ""
    """What it was trained for as a reranker: to answer yes or no, or to put candidates in words; "" for an encoder."""
    rerank_temperature: float = 0.0
    """Of the first stage's cosines that its scores are added to; 0 where it learnt to do without."""
    max_reasoning_tokens: int = 256
    max_text_tokens: int = 1024
    closing: str = ""
    fingerprint: str = ""
    world: World | None = None
    """The only things that it knows; None for a model without such bounds."""
    profile: Profile | None = None
    """How a checkpoint of another project is prompted and read; where it is given, `prompt_version` says nothing."""

    def __post_init__(self) -> None:
        versions = (self.prompt_version, get_args(PromptVersion)), (self.rerank, ("", RERANK, DESCRIBE))
        for value, known in (*versions, (self.pooling_position, get_args(PoolingPosition))):
            if value not in known:
                raise InputError(f"{value!r} in {SETTINGS} is unknown; this release has {', '.join(known)}")
        dims = self.matryoshka_dims
        if not isinstance(dims, list | tuple) or not all(type(dim) is int and dim > 0 for dim in dims):
            raise InputError(f"matryoshka_dims {dims!r} in {SETTINGS} is no list of widths; copy the checkpoint again")
        object.__setattr__(self, "matryoshka_dims", tuple(dims))

    def vector_version(self, dim: int | None = None) -> str:
        """The prompt version and all that changes every vector beside it: pooling position, profile, components left out."""
        version: str = self.prompt_version
        if self.profile is not None:
            version = self.profile.version
        elif self.pooling_position != "before_token":
            version = f"{version}, read {self.pooling_position}"
        return version if dim is None else f"{version}, first {dim}"

    def checked_dim(self, dim: int | None, width: int) -> int | None:
        """`dim`, or None for the whole `width`; InputError for a width that the checkpoint was not trained for."""
        if dim in (None, width):
            return None
        if dim in self.widths(width):
            return dim
        known = f"it was trained for {', '.join(map(str, self.matryoshka_dims))}; choose one of these"
        none = f"its {SETTINGS} names no shorter width (`traceir train --set matryoshka_dims=...`); leave dim out"
        which = f"vectors of {self.fingerprint or 'this model'} have {width} components and cannot be cut to {dim}"
        raise InputError(f"{which}: {known if self.matryoshka_dims else none}")

    def widths(self, width: int) -> tuple[int, ...]:
        """Those that vectors of `width` may be cut to, it among them, the widest first."""
        return tuple(sorted({width, *(dim for dim in self.matryoshka_dims if dim < width)}, reverse=True))

    def under(self, profile: Profile) -> TraceSettings:
        """Those of another project's checkpoint, as its profile says."""
        return replace(
            self,
            profile=profile,
            pooling_position=profile.pooling_position,
            max_text_tokens=profile.max_text_tokens or self.max_text_tokens,
            max_reasoning_tokens=profile.max_reasoning_tokens or self.max_reasoning_tokens,
        )

    def overridden(self, values: Mapping[str, Any]) -> TraceSettings:
        """With other values for some fields. Raises ModelError for unknown ones."""
        named = {_FIELDS.get(name, name): value for name, value in values.items()}
        if renamed := sorted(set(values) - set(named)):
            log.warning("%s is now called %s", renamed[0], _FIELDS[renamed[0]])
        known = {field.name for field in fields(TraceSettings)}
        if unknown := sorted(named.keys() - known):
            raise ModelError(f"unknown settings {unknown}; {SETTINGS} has {sorted(known)}")
        return replace(self, **named)


_FIELDS: Final = {key: field for field, key in JSON_KEYS.items()}


def read_settings(file: Path) -> TraceSettings | None:
    """What a traceir.json says, without the `base` of an adapter; None where there is no file."""
    if not file.is_file():
        return None
    values = read_object(file)
    if values.pop("format", None) != FORMAT:
        raise ModelError(f"{file}: format is not {FORMAT}; this checkpoint needs another release of traceir")
    values.pop("base", None)
    values["world"] = world_of(values.get("world"), str(file))
    if values.get("profile") is not None:
        values["profile"] = profile_of(values["profile"], str(file))
    try:
        return TraceSettings(**{_FIELDS.get(key, key): value for key, value in values.items()})
    except TypeError as error:
        raise ModelError(f"{file}: {error}") from error


def write_settings(settings: TraceSettings, folder: Path, **more: Any) -> None:
    """The folder's traceir.json, with `more` fields: an adapter's `base`."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values |= {name: value and value.as_json() for name, value in values.items() if name in ("world", "profile")}
    written = {JSON_KEYS.get(name, name): value for name, value in values.items() if value or name not in _OPTIONAL}
    (folder / SETTINGS).write_text(json.dumps({"format": FORMAT, **written, **more}, indent=2) + "\n")


def image_budget(file: Path, config: Any) -> ImageBudget:
    """What a preprocessor_config.json says. As in transformers, `min_pixels` and `max_pixels` at its top go before `size`."""
    vision = config.vision_config
    budget = ImageBudget(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    stated = read_object(file) if file.is_file() else {}
    size = stated.get("size") or {}
    return replace(
        budget,
        min_pixels=stated.get("min_pixels") or size.get("shortest_edge") or budget.min_pixels,
        max_pixels=stated.get("max_pixels") or size.get("longest_edge") or budget.max_pixels,
        mean=tuple(stated.get("image_mean", budget.mean)),
        std=tuple(stated.get("image_std", budget.std)),
    )


def write_companions(processor: Processor, kind: str, folder: Path) -> None:
    """Tokenizer, preprocessor_config.json and modules.json of a model of type `kind`.

    modules.json tells sentence-transformers which module reads the folder; without it the library would make a model of its own
    with other vectors.
    """
    processor.tokenizer.save_pretrained(folder)
    image = processor.image
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": PROCESSORS[kind],
        "patch_size": image.patch,
        "merge_size": image.merge,
        "temporal_patch_size": image.temporal,
        "size": {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        "min_pixels": image.min_pixels,
        "max_pixels": image.max_pixels,
        "image_mean": image.mean,
        "image_std": image.std,
    }
    module = {"idx": 0, "name": "0", "path": "", "type": OWN_MODULE}
    for name, content in ((PREPROCESSOR, preprocessor), (MODULES, [module])):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
