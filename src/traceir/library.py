"""Published models as encoders: whatever sentence-transformers loads, prompted, pooled and truncated as its own files say.

    encoder = load_encoder("sentence-transformers/clip-ViT-B-32")

The library makes the vectors; here its models are found, refused where they cannot be loaded safely, given their inputs and named
by a fingerprint. None of TraceIR's templates plays a part, and such a model never reasons: its only route is `direct`. Only
safetensors are loaded, and no code that comes with a model. Shapes: D width.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from traceir.checkpoint import (
    ADAPTER,
    MODULES,
    OWN_MODULE,
    PREFIX,
    REMEDY,
    SINGLE,
    WEIGHT_LIKE,
    bundled_model,
    digest,
    fetch,
    is_library,
    module_types,
    modules_of,
    plain_name,
    read_object,
    weight_files,
)
from traceir.errors import InputError, ModelError
from traceir.items import MODALITIES, Encoding, Item, Modality, Part, Query, Route, Vector, check_route

if TYPE_CHECKING:
    import torch

    from traceir.encoder import Encoder
    from traceir.profiles import Profile

log = logging.getLogger(__name__)

VERSION: Final = "library-1"
"""How inputs are handed to the library; to be changed with what `_prompt` or `_input` do."""
_ASKED: Final = re.compile(r"(.*\bInstruct: ?)(.+?)(\n *\w+: ?)", re.DOTALL)
"""A query prompt with a place for an instruction, "Instruct: ...\\nQuery:", as E5, GTE and Qwen3-Embedding have it."""
_FIXED_LENGTH: Final = ("siglip", "siglip2")
"""Model types whose text tower reads the last position, whatever stands there, and was trained on padded texts alone
(transformers' page on SigLIP 2). Where such a checkpoint has no modules.json the library pads to the longest text of a batch."""
_DECIDING: Final = frozenset(
    """modules.json config.json config_sentence_transformers.json special_tokens_map.json added_tokens.json tokenizer.json
    vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json""".split()
)
"""Files that decide a vector beside the weights, in the model's folder and in its modules'; so do those named *_config.json."""
_REMEDIES: Final = {
    "torchvision": "its image or video processor needs torchvision; pip install torchvision",
    "trust_remote_code": "it needs code that comes with it, and TraceIR runs none",
}
"""Remedies, by a word in the long error message of the library."""
_KINDS: Final[dict[Modality, str]] = {"text": "a text", "image": "an image", "image,text": "an image and a text together"}


def load_encoder(
    source: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    profile: Profile | str | Path | None = None,
    dim: int | None = None,
) -> Encoder | LibraryEncoder:
    """The encoder of a checkpoint folder or hub id, of the fitting kind; the bundled miniature where none is named.

    `st:NAME`, or a folder or repository with a modules.json that is not TraceIR's, gives a LibraryEncoder; anything else, and
    what `profile` is given for, an Encoder. `dim` keeps the first so many components of each vector, of an Encoder only a number
    that its checkpoint was trained for. Raises ModelError, InputError.
    """
    name = str(source or bundled_model())
    if is_library(name) and (profile is None or not _foreign(module_types(plain_name(name)))):
        if profile is not None:
            raise InputError(f"{name} is a model of sentence-transformers, read as its own files say; leave out the profile")
        return LibraryEncoder.from_pretrained(name, device=device, dtype=dtype, dim=dim)
    from traceir.encoder import Encoder
    from traceir.model import load

    return Encoder(load(name, device=device, dtype=dtype, profile=profile, inference=True), dim=dim)


class LibraryEncoder:
    """Queries and items to Encodings by one SentenceTransformer. Thread-safe: the library encodes for one thread at a time.

    `dim` keeps the first so many components of each vector, for models trained to allow that. A batch holds at most `batch_rows`
    texts, or a quarter as many inputs with images, which are decoded together. A batch of n equals n singles up to
    floating-point rounding.
    """

    run_settings: Final[dict[str, str | int | float | None]] = dict.fromkeys(
        ("token_budget", "threshold", "max_reasoning_tokens")
    )

    def __init__(self, model: Any, name: str, fingerprint: str, *, dim: int | None = None, batch_rows: int = 32) -> None:
        self.model, self.name, self.fingerprint, self.batch_rows = model, name, fingerprint, batch_rows
        self._lock = threading.Lock()
        self._warned = False
        self._reads_messages = "message" in model.modalities
        self.modalities: tuple[Modality, ...] = tuple(
            kind for kind in MODALITIES if model.supports(("image", "text") if kind == "image,text" else kind)
        )
        whole = model.get_embedding_dimension() or len(model.encode(self._probe()))
        if dim is not None and not 1 <= dim <= whole:
            raise InputError(f"vectors of {name} have {whole} components and cannot be truncated to {dim}; give 1 to {whole}")
        self.width: int = dim or whole
        self.dim = dim if dim != whole else None
        self.prompt_version = VERSION if self.dim is None else f"{VERSION}, first {self.dim}"
        self.vector_settings = {"dtype": str(model.dtype), "max_text_tokens": model.max_seq_length}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None, dim: int | None = None
    ) -> LibraryEncoder:
        """The model of a folder or hub id, in float32 unless told otherwise.

        Raises ModelError where it cannot be had, has other weights than safetensors, or needs code of its own.
        """
        name = plain_name(str(source))
        folder, fingerprint = checked_folder(name, "SentenceTransformer")
        shown = folder.resolve().name if Path(name).is_dir() else name  # clients of a server are told no paths
        return cls(_load(folder, name, device, dtype), shown, fingerprint, dim=dim)

    def as_written(self, text: str) -> str:
        return text

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        """Candidates, by the model's `encode_document`. Raises InputError for a modality that it lacks."""
        return self._encode(items, [None] * len(items), self.model.encode_document)

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Queries, by the model's `encode_query`; `route` is `auto` or `direct`, which are the same here."""
        if check_route(route) == "reason":
            raise InputError(f"{self.name} writes nothing before its vector, so it cannot reason; use route direct or auto")
        return self._encode(queries, [self._prompt(query) for query in queries], self.model.encode_query)

    def _encode(
        self, contents: Sequence[Item | Query], prompts: Sequence[str | None], encode: Callable[..., Any]
    ) -> list[Encoding]:
        for content in contents:
            self._check(content)
        done: dict[int, Encoding] = {}
        for numbers in _batches(contents, prompts, self.batch_rows):
            prompt = prompts[numbers[0]]
            vectors = self._vectors([contents[number] for number in numbers], prompt, encode)
            for number, vector in zip(numbers, vectors, strict=True):
                cut = self._cut(contents[number], prompt)
                limit = self.model.max_seq_length if cut else None
                done[number] = Encoding(vector, "direct", "", 0, 1.0, False, cut=cut, text_limit=limit)
        return [done[number] for number in range(len(contents))]

    def _vectors(self, contents: Sequence[Item | Query], prompt: str | None, encode: Callable[..., Any]) -> Vector:
        """Unit vectors [B, D] of one batch. What the library refuses is an InputError, so that the rest of a batch can go on."""
        inputs = [self._input(content) for content in contents]
        options = {"batch_size": len(inputs), "truncate_dim": self.dim, "show_progress_bar": False}
        try:
            with self._lock:
                vectors = np.asarray(encode(inputs, prompt=prompt, normalize_embeddings=True, **options), dtype=np.float32)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            who = _who(contents[0]) if len(contents) == 1 else f"one of {len(contents)} inputs"
            raise InputError(f"{who}: sentence-transformers cannot encode it by {self.name}: {one_line(error)}") from error
        if vectors.shape != (len(inputs), self.width):
            raise ModelError(f"{self.name} returned vectors of shape {list(vectors.shape)}, not [{len(inputs)}, {self.width}]")
        if not np.isfinite(vectors).all():
            raise ModelError(f"{self.name} returned a vector that is not finite; load it with dtype float32")
        return vectors

    def _check(self, content: Item | Query) -> None:
        """Raises InputError for a modality that the model lacks, and for several images or texts where it reads no messages."""
        known = content.modality in self.modalities
        if known and (_form(content) != "message" or self._reads_messages):
            return
        what = "several parts" if known else _KINDS[content.modality]
        taken = ", ".join(_KINDS[kind] for kind in self.modalities)
        raise InputError(f"{_who(content)} is {what}, which {self.name} cannot encode; give it {taken}, or use another model")

    def _prompt(self, query: Query) -> str | None:
        """The instruction where a prompt of the model or its chat template has a place for one; None: the model's own prompt."""
        asked = (query.instruction or "").strip()
        if not asked or not query.parts:
            return None
        for own in (self.model.prompts.get("query"), *self.model.prompts.values()):
            if match := _ASKED.fullmatch(own or ""):
                return f"{match[1]}{asked}{match[3]}"
        if self._reads_messages:
            return asked
        if not self._warned:
            self._warned = True
            log.warning("%s has no place for an instruction: the instructions of queries are left out", self.name)
        return None

    def _input(self, content: Item | Query) -> Any:
        """The content as the library takes it: a text, an image, a dict of both, or a message of parts in reading order."""
        parts = [part if isinstance(part, str) else part.load() for part in _parts(content)]
        if len(parts) == 1:
            return self._text(parts[0]) if isinstance(parts[0], str) else parts[0]
        named = [("text" if isinstance(part, str) else "image", part) for part in parts]
        if _form(content) != "message":
            return dict(named)
        return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in named]}]

    def _text(self, text: str) -> Any:
        """A text so that it stays one: the library would open a str that is a path or an address of an image."""
        from sentence_transformers.base.modality import infer_modality

        return text if infer_modality(text, supported_modalities=self.model.modalities) == "text" else {"text": text}

    def _cut(self, content: Item | Query, prompt: str | None) -> int:
        """Tokens of a text beyond the model's limit. Not counted where a chat template surrounds it."""
        limit, tokenizer = self.model.max_seq_length, getattr(self.model, "tokenizer", None)
        text = _text_of(content)
        if not limit or self._reads_messages or not callable(tokenizer) or len(text.encode()) < limit // 2:
            return 0
        role = "query" if isinstance(content, Query) else "document"
        whole = (self.model.prompts.get(role) or "") if prompt is None else prompt
        with self._lock:
            tokens = len(tokenizer(whole + text, truncation=False, verbose=False)["input_ids"])
        return max(0, tokens - int(limit))

    def _probe(self) -> Any:
        """An input for a model that does not tell its width."""
        from PIL import Image

        return "a" if "text" in self.modalities else Image.new("RGB", (32, 32))


def checked_folder(name: str, kind: Literal["SentenceTransformer", "CrossEncoder"]) -> tuple[Path, str]:
    """Folder and fingerprint of a model of the library; ModelError where it is of another kind, has other weights than
    safetensors, or needs code of its own."""
    _check_modules(name, module_types(name))
    folder = fetch(name)
    stated = _object(folder / "config_sentence_transformers.json").get("model_type")
    if stated not in (None, kind):  # the library would convert it with hardly a warning
        lacks = "makes no vectors that could be indexed" if kind == "SentenceTransformer" else "scores no pairs"
        raise ModelError(f"{name} is a {stated}, which {lacks}; use a {kind}")
    return folder, _fingerprint(folder)


def _load(folder: Path, name: str, device: str, dtype: torch.dtype | None) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    options = {"dtype": dtype or torch.float32, "use_safetensors": True}
    try:
        model = SentenceTransformer(
            str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=options
        )
    except Exception as error:  # its modules and transformers raise many kinds
        remedies = (remedy for word, remedy in _REMEDIES.items() if word in str(error).lower())
        raise ModelError(f"sentence-transformers cannot load {name}: {next(remedies, one_line(error))}") from error
    if not (folder / MODULES).is_file():  # nothing says how it is read
        config: Any = getattr(model[0], "config", None)
        if getattr(config, "model_type", "") in _FIXED_LENGTH:
            length = config.text_config.max_position_embeddings
            model[0].processing_kwargs["text"] = {"padding": "max_length", "max_length": length, "truncation": True}
        if len(model) > 1:
            log.warning("%s has no %s: it is pooled by the library's default, not as its publisher may have meant", name, MODULES)
    if model.similarity_fn_name == "dot" and type(model[-1]).__name__ != "Normalize":
        log.warning("%s asks for dot products of vectors of any length; TraceIR ranks by cosine", name)
    return model


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _batches(contents: Sequence[Item | Query], prompts: Sequence[str | None], rows: int) -> Iterator[list[int]]:
    """Numbers of inputs of one form and prompt, of like length, in batches of at most `rows`, or a quarter of that."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, content in enumerate(contents):
        groups.setdefault((_form(content), prompts[number]), []).append(number)
    for (form, _), group in groups.items():
        group.sort(key=lambda number: len(_text_of(contents[number])))
        most = rows if form == "text" else max(1, rows // 4)
        for first in range(0, len(group), most):
            yield group[first : first + most]


def _parts(content: Item | Query) -> tuple[Part, ...]:
    """The parts that say something, or their text where there are no images; of a query without any, its instruction."""
    if not content.images:
        return (_text_of(content),)
    return tuple(part for part in content.parts if not isinstance(part, str) or part.strip())


def _text_of(content: Item | Query) -> str:
    return content.text or ((content.instruction or "") if isinstance(content, Query) and not content.parts else "")


def _form(content: Item | Query) -> str:
    """The modality, or "message" where there is more than one image and one text. A batch of both would be read as neither."""
    return content.modality if len(_parts(content)) == len(content.modality.split(",")) else "message"


def _who(content: Item | Query) -> str:
    kind = "query" if isinstance(content, Query) else "item"
    return f"{kind} {content.id or '(no id)'}"


def _check_modules(name: str, types: Sequence[str]) -> None:
    """Raises ModelError where a module would be code from elsewhere than the library."""
    if list(types) == [OWN_MODULE]:
        raise ModelError(f"{name} is a checkpoint of TraceIR itself; leave out {PREFIX}")
    if foreign := _foreign(types):
        raise ModelError(
            f"{name} needs code of its own ({foreign[0]} in {MODULES}), and TraceIR runs none that comes with a checkpoint; "
            "use another model, or --profile where there is one for it"
        )


def _foreign(types: Sequence[str]) -> list[str]:
    return [kind for kind in types if not kind.startswith("sentence_transformers.")]


def _fingerprint(folder: Path) -> str:
    """Over all that decides a vector: the weights of every module, tokenizers, prompts, pooling and templates."""
    modules = _module_folders(folder)
    beside = {file for module in (folder, *modules) for file in module.iterdir() if file.is_file()}
    files = {file for file in beside if file.name in _DECIDING or file.name.endswith("_config.json")}
    for module in modules:
        if (module / ADAPTER).is_file() or "model_type" in _object(module / "config.json"):
            files.update(weight_files(module))
        else:
            like = sorted(file for file in module.iterdir() if file.suffix in WEIGHT_LIKE)
            files.update(own := [file for file in like if file.suffix == ".safetensors"])
            if like and module / SINGLE not in own:
                raise ModelError(f"{module} holds no {SINGLE}, only {', '.join(file.name for file in like[:3])}. {REMEDY}")
        if (module / ADAPTER).is_file():  # over another checkpoint
            files.update(weight_files(fetch(str(read_object(module / ADAPTER).get("base_model_name_or_path")))))
    inside = ((file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name) for file in sorted(files))
    return digest(zip(inside, sorted(files), strict=True))


def _object(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _module_folders(folder: Path) -> list[Path]:
    """Those of its modules, also of those behind a router, which are checked alike; without modules.json the folder itself."""
    if not (folder / MODULES).is_file():
        return [folder]
    folders: list[Path] = []
    for path in modules_of(folder / MODULES, "path"):
        module = folder / _inside(path, folder)
        routers = (_object(module / file).get("types") for file in ("router_config.json", "config.json"))
        types = next((types for types in routers if isinstance(types, dict)), {})
        _check_modules(str(module), list(map(str, types.values())))
        folders += [module, *(module / _inside(key, module) for key in types)]
    return sorted({module for module in folders if module.is_dir()})


def _inside(path: str, folder: Path) -> str:
    if Path(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ModelError(f"{folder / MODULES} names the folder {path!r}, which is not below its own; copy the checkpoint again")
    return path
