"""TraceIR inside sentence-transformers: one module that is a whole SentenceTransformer.

    model = as_sentence_transformer(bundled_model())
    model.encode_query({"text": "the same in red", "image": "shoe.png"}, prompt="Find the product.", route="auto", target="image")
    model.encode_document(["shoe-1.png", "a red shoe"])

`encode_query` takes an instruction as its `prompt`; `route` and `target` are its own arguments. `encode_document`, and `encode`,
which names no task, embed candidates: they never reason and take no instruction. A text is a str, a picture a PIL image or the
path of an existing picture file, both together a dict {"text", "image"}.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import InputModule

from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.items import MODALITIES, Encoding, Item, Modality, Part, Query, Route, as_image, check_route
from traceir.model import load, save

log = logging.getLogger(__name__)

_CONFIG: Final = "config_sentence_transformers.json"
_KEPT: Final = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
"""What a saved SentenceTransformer says beside its modules."""


class TraceModule(InputModule):
    """An Encoder as the only module of a SentenceTransformer. `route` and `target` are the defaults of `encode_query`."""

    config_file_name = "sentence_traceir.json"
    config_keys: ClassVar[list[str]] = ["route", "target"]
    forward_kwargs: ClassVar[set[str]] = {"task", "route", "target"}

    def __init__(self, encoder: Encoder, *, route: Route = "auto", target: Modality | None = None) -> None:
        super().__init__()
        _check_options(route, target)
        self.encoder = encoder
        self.network = encoder.model.network  # registered, so that `to` and `parameters` reach the weights
        self.route: Route = route
        self.target: Modality | None = target

    @property
    def tokenizer(self) -> Any:
        return self.encoder.model.processor.tokenizer

    @property
    def modalities(self) -> list[Any]:
        """As the library counts them; "message" admits batches that mix texts and pictures, conversations are refused."""
        return ["text", "image", ("image", "text"), "message"]

    def get_embedding_dimension(self) -> int:
        return self.encoder.width

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Queries under task "query", with `prompt` as their instruction, else Items."""
        if options.get("task") == "query":
            target = options.get("target") or self.target
            return {"contents": [_query(one, prompt or None, target) for one in inputs]}
        return {"contents": _items(inputs, prompt, options)}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D] and, one value a row, `reasoned`, `tokens`, `emb_probability` and `truncated`."""
        found = self.encode_contents(features["contents"], options.get("route"))
        return {
            "sentence_embedding": torch.from_numpy(np.stack([one.vector for one in found])).to(self.encoder.model.device),
            "reasoned": torch.tensor([one.route == "reason" for one in found]),
            "tokens": torch.tensor([one.tokens for one in found]),
            "emb_probability": torch.tensor([one.emb_probability for one in found]),
            "truncated": torch.tensor([one.truncated for one in found]),
        }

    def encode_contents(self, contents: Sequence[Query | Item], route: Route | None) -> list[Encoding]:
        """Encodings of what `preprocess` made: all queries, or all items."""
        queries = [one for one in contents if isinstance(one, Query)]
        if queries:
            return self.encoder.encode_queries(queries, route=route or self.route)
        return self.encoder.encode_items([one for one in contents if isinstance(one, Item)])

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """The checkpoint, as `traceir.model.save` writes it, into a folder that has files of the library already."""
        if not safe_serialization:
            raise InputError("TraceIR writes safetensors only; leave safe_serialization at its default")
        target = Path(output_path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".traceir.") as folder:
            fresh = save(self.encoder.model, Path(folder) / "checkpoint")
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == "traceir.json"):
                os.replace(file, target / file.name)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> TraceModule:
        """What the library calls for a saved folder or a hub id; `model_kwargs` may hold `dtype` and `profile`."""
        source = Path(model_name_or_path) / subfolder if subfolder else model_name_or_path
        config = cls.load_config(
            model_name_or_path, subfolder, **{key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
        )
        chosen = {key: value for key, value in (options.get("model_kwargs") or {}).items() if key in ("dtype", "profile")}
        return cls(Encoder(load(source, **chosen)), **config)


_HUB_OPTIONS: Final = ("token", "cache_folder", "revision", "local_files_only")


def as_sentence_transformer(
    source: str | Path | Encoder,
    *,
    route: Route | None = None,
    target: Modality | None = None,
    prompts: Mapping[str, str] | None = None,
    device: str = "cpu",
    **options: Any,
) -> SentenceTransformer:
    """A SentenceTransformer over an Encoder, or over a checkpoint folder or hub id with or without the library's files.

    `prompts` names instructions for `prompt_name=`; the one called "query" is `encode_query`'s default. What a folder saved by
    the library says about route, prompts and similarity holds where nothing else is given. `options` go to `traceir.model.load`.
    """
    told: dict[str, Any] = {}
    if isinstance(source, Encoder):
        encoder, defaults = source, {}
    else:
        encoder = Encoder(load(source, device=device, **options))
        folder = Path(source)
        defaults = _read_json(folder / TraceModule.config_file_name)
        told = {key: value for key, value in _read_json(folder / _CONFIG).items() if key in _KEPT}
    module = TraceModule(encoder, route=route or defaults.get("route", "auto"), target=target or defaults.get("target"))
    told["prompts"] = {**told.get("prompts", {}), **(prompts or {})}
    told.setdefault("similarity_fn_name", "cosine")
    return SentenceTransformer(modules=[module], device=str(encoder.model.device), **told)


def encode_with_reasoning(
    model: SentenceTransformer,
    inputs: Any,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    route: Route | None = None,
    target: Modality | None = None,
) -> list[Encoding]:
    """Like `encode_query`, but whole Encodings in the order of the inputs: vector, route, reasoning, tokens.

    `encode_query(..., output_value=None)` gives the same without the text, because the library passes on only tensors by row.
    """
    module = model[0]
    if not isinstance(module, TraceModule):
        raise InputError(f"the first module is a {type(module).__name__}; make the model with as_sentence_transformer")
    if prompt is None:
        prompt = model.prompts.get(prompt_name or "query")
        if prompt is None and prompt_name is not None:
            raise InputError(f"prompt name {prompt_name!r} is unknown; the model has {sorted(model.prompts)}")
    _check_options(route or "auto", target)
    asked = [inputs] if model.is_singular_input(inputs) else list(inputs)
    return module.encode_contents(module.preprocess(asked, prompt, task="query", target=target)["contents"], route)


def _items(inputs: Sequence[Any], prompt: str | None, options: Mapping[str, Any]) -> list[Item]:
    if prompt:
        raise InputError(f"a candidate takes no instruction, but prompt is {prompt[:80]!r}; use encode_query for queries")
    for name in ("route", "target"):
        if options.get(name) is not None:
            raise InputError(f"a candidate takes no {name}, because candidates never reason; use encode_query for queries")
    return [one if isinstance(one, Item) else Item(_parts(one)) for one in inputs]


def _query(one: Any, instruction: str | None, target: Modality | None) -> Query:
    return one if isinstance(one, Query) else Query(_parts(one), instruction=instruction, target=target)


def _parts(one: Any) -> tuple[Part, ...]:
    """The parts of one input, the picture before the text as in M-BEIR; a list under a key gives several."""
    if not isinstance(one, Mapping):
        return (_part(one),)
    if unknown := set(one) - {"text", "image"}:
        raise InputError(f"an input has the keys {sorted(map(str, unknown))}; TraceIR takes text and image")
    parts: list[Part] = []
    for key in ("image", "text"):
        value = one.get(key)
        for single in value if isinstance(value, list | tuple) else [value]:
            if key == "image" and single is not None:
                parts.append(_image(single))
            elif isinstance(single, str) and single.strip():
                parts.append(single)
            elif single is not None and not isinstance(single, str):
                raise InputError(f"the text of an input is a {type(single).__name__}; give a str")
    return tuple(parts)


def _part(one: Any) -> Part:
    """A str is a picture where it names a picture file that exists, as the library has it."""
    if isinstance(one, list | tuple):
        raise InputError("an input is a list; TraceIR takes a text, a picture or a dict of both, no conversations and no pairs")
    if isinstance(one, str) and not is_image_url_or_path(one):
        return one
    return _image(one)


def _image(one: Any) -> ImageInput:
    try:
        return as_image(one)
    except TypeError as error:
        raise InputError(str(error)) from error


def _check_options(route: Route, target: Modality | None) -> None:
    check_route(route)
    if target is not None and target not in MODALITIES:
        raise InputError(f"target modality {target!r} is unknown; choose one of {', '.join(MODALITIES)}")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
