"""TraceIR inside sentence-transformers: one module that is a whole SentenceTransformer.

    model = as_sentence_transformer(bundled_model())
    model.encode_query({"text": "the same in red", "image": "shoe.png"}, prompt="Find the product.", route="auto", target="image")
    model.encode_document(["shoe-1.png", "a red shoe"])

`encode_query` takes an instruction as its `prompt`; `route` and `target` are its own arguments. `encode_document`, and `encode`,
which names no task, embed candidates: they never reason and take no instruction. A text is a str, an image a PIL image or the
path of an existing image file, both together a dict {"text", "image"}.
"""

from __future__ import annotations

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

from traceir.checkpoint import read_object
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.items import MODALITIES, Encoding, Item, Modality, Part, Query, Route, as_image, check_route
from traceir.model import load, save

_CONFIG: Final = "config_sentence_transformers.json"
_KEPT: Final = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
"""What a saved SentenceTransformer says beside its modules."""
_HUB_OPTIONS: Final = ("token", "cache_folder", "revision", "local_files_only")


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
        """As the library counts them; "message" admits batches that mix texts and images, conversations are refused."""
        return ["text", "image", ("image", "text"), "message"]

    def get_embedding_dimension(self) -> int:
        return self.encoder.width

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Queries under task "query", with `prompt` as their instruction, else Items."""
        if options.get("task") == "query":
            about: dict[str, Any] = {"instruction": prompt or None, "target": options.get("target") or self.target}
            return {"contents": [each if isinstance(each, Query) else Query(_parts(each), **about) for each in inputs]}
        if prompt:
            raise InputError(f"a candidate takes no instruction, but prompt is {prompt[:80]!r}; use encode_query for queries")
        for name in ("route", "target"):
            if options.get(name) is not None:
                raise InputError(f"a candidate takes no {name}, because candidates never reason; use encode_query for queries")
        return {"contents": [each if isinstance(each, Item) else Item(_parts(each)) for each in inputs]}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D] and, one value a row, `reasoned`, `tokens`, `emb_probability` and `truncated`."""
        encodings = self.encode_contents(features["contents"], options.get("route"))
        vectors = np.stack([encoding.vector for encoding in encodings])
        rows = {name: torch.tensor([getattr(encoding, name) for encoding in encodings]) for name in _BY_ROW}
        reasoned = torch.tensor([encoding.route == "reason" for encoding in encodings])
        return {"sentence_embedding": torch.from_numpy(vectors).to(self.encoder.model.device), "reasoned": reasoned, **rows}

    def encode_contents(self, contents: Sequence[Query | Item], route: Route | None) -> list[Encoding]:
        """Encodings of what `preprocess` made: all queries, or all items."""
        queries = [content for content in contents if isinstance(content, Query)]
        if queries:
            return self.encoder.encode_queries(queries, route=route or self.route)
        return self.encoder.encode_items([content for content in contents if isinstance(content, Item)])

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
        hub = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
        chosen = {key: value for key, value in (options.get("model_kwargs") or {}).items() if key in ("dtype", "profile")}
        return cls(Encoder(load(source, **chosen)), **cls.load_config(model_name_or_path, subfolder, **hub))


_BY_ROW: Final = ("tokens", "emb_probability", "truncated")


def as_sentence_transformer(
    source: str | Path | Encoder,
    *,
    route: Route | None = None,
    target: Modality | None = None,
    prompts: Mapping[str, str] | None = None,
    truncate_dim: int | None = None,
    device: str = "cpu",
    **options: Any,
) -> SentenceTransformer:
    """A SentenceTransformer over an Encoder, or over a checkpoint folder or hub id with or without the library's files.

    `prompts` names instructions for `prompt_name=`; the one called "query" is `encode_query`'s default. What a folder saved by
    the library says about route, prompts and similarity holds where nothing else is given. `truncate_dim` is the `dim` of the
    Encoder that is made. `options` go to `traceir.model.load`.
    """
    if isinstance(source, Encoder) and truncate_dim not in (None, source.width):
        raise InputError(f"truncate_dim is {truncate_dim}, and the vectors of this Encoder have {source.width}; make it with dim")
    encoder = source if isinstance(source, Encoder) else Encoder(load(source, device=device, **options), dim=truncate_dim)
    files = () if isinstance(source, Encoder) else (Path(source, TraceModule.config_file_name), Path(source, _CONFIG))
    defaults, saved = (read_object(file) if file.is_file() else {} for file in files) if files else ({}, {})
    module = TraceModule(encoder, route=route or defaults.get("route", "auto"), target=target or defaults.get("target"))
    kept: dict[str, Any] = {"similarity_fn_name": "cosine"} | {key: saved[key] for key in _KEPT if key in saved}
    kept["prompts"] = {**kept.get("prompts", {}), **(prompts or {})}
    kept |= {} if encoder.dim is None else {"truncate_dim": encoder.dim}
    return SentenceTransformer(modules=[module], device=str(encoder.model.device), **kept)


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


def _parts(value: Any) -> tuple[Part, ...]:
    """The parts of one input, the image before the text as in M-BEIR; a list under a key gives several."""
    if isinstance(value, list | tuple):
        raise InputError("an input is a list; TraceIR takes a text, an image or a dict of both, no conversations and no pairs")
    if not isinstance(value, Mapping):
        return (value if isinstance(value, str) and not is_image_url_or_path(value) else _image(value),)
    if unknown := set(value) - {"text", "image"}:
        raise InputError(f"an input has the keys {sorted(map(str, unknown))}; TraceIR takes text and image")
    texts = [text for text in _listed(value.get("text")) if not isinstance(text, str) or text.strip()]
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"the text of an input is a {type(text).__name__}; give a str")
    return (*map(_image, _listed(value.get("image"))), *texts)


def _listed(value: Any) -> list[Any]:
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if each is not None]


def _image(value: Any) -> ImageInput:
    try:
        return as_image(value)
    except TypeError as error:
        raise InputError(str(error)) from error


def _check_options(route: Route, target: Modality | None) -> None:
    check_route(route)
    if target is not None and target not in MODALITIES:
        raise InputError(f"target modality {target!r} is unknown; choose one of {', '.join(MODALITIES)}")
