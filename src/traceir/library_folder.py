"""What lies in the folder of a model of sentence-transformers: its modules, their weights, and the fingerprint that names them.

Nothing here imports torch or the library. Only safetensors may be loaded, and no code that comes with a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from traceir.checkpoint import ADAPTER, MODULES, OWN_MODULE, PREFIX, fetch, module_paths
from traceir.errors import ModelError
from traceir.weights import REMEDY, SINGLE, WEIGHT_LIKE, digest, read_object, weight_files

NAMESPACE: Final = "sentence_transformers."
DECIDING: Final = frozenset(
    """modules.json config.json config_sentence_transformers.json special_tokens_map.json added_tokens.json tokenizer.json
    vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json""".split()
)
_CONFIG: Final = "_config.json"
"""Files of these names, or whose names end so, decide a vector beside the weights, in the model's folder and in its modules'."""


def check_modules(name: str, types: Sequence[str]) -> None:
    """Raises ModelError where a module would be code from elsewhere than the library."""
    if list(types) == [OWN_MODULE]:
        raise ModelError(f"{name} is a checkpoint of TraceIR itself; leave out {PREFIX}")
    if foreign := foreign_types(types):
        raise ModelError(
            f"{name} needs code of its own ({foreign[0]} in {MODULES}), and TraceIR runs none that comes with a checkpoint; "
            "use another model, or --profile where there is one for it"
        )


def check_kind(folder: Path, name: str) -> None:
    """Raises ModelError for the library's other kinds of model, which it would turn into one of this kind and say little."""
    kind = _about(folder / "config_sentence_transformers.json").get("model_type")
    if kind not in (None, "SentenceTransformer"):
        raise ModelError(f"{name} is a {kind}, which makes no vectors that could be indexed; use a SentenceTransformer")


def foreign_types(types: Sequence[str]) -> list[str]:
    return [kind for kind in types if not kind.startswith(NAMESPACE)]


def library_fingerprint(folder: Path) -> str:
    """Over all that decides a vector: the weights of every module, tokenizers, prompts, pooling and templates.

    The revision of a hub id is not in it: what it changes of a model is. Raises ModelError for weights that are no safetensors.
    """
    modules = _module_folders(folder)
    beside = {file for module in (folder, *modules) for file in module.iterdir() if file.is_file()}
    files = {file for file in beside if file.name in DECIDING or file.name.endswith(_CONFIG)}
    for module in modules:
        files.update(_weights(module))
        if (module / ADAPTER).is_file():  # over another checkpoint
            files.update(weight_files(fetch(str(read_object(module / ADAPTER).get("base_model_name_or_path")))))
    inside = [(file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name) for file in sorted(files)]
    return digest(zip(inside, sorted(files), strict=True))


def _about(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _module_folders(folder: Path) -> list[Path]:
    """Those of its modules, also of those behind a router; without modules.json the folder itself."""
    if not (folder / MODULES).is_file():
        return [folder]
    folders: list[Path] = []
    for path in module_paths(folder / MODULES):
        module = folder / _inside(path, folder)
        folders += [module, *(module / _inside(key, module) for key in _routed(module))]
    return sorted({module for module in folders if module.is_dir()})


def _routed(module: Path) -> Sequence[str]:
    """The folders of the modules behind a router, whose types are checked as those of modules.json are."""
    for file in ("router_config.json", "config.json"):
        types = _about(module / file).get("types")
        if isinstance(types, dict):
            check_modules(str(module), [str(kind) for kind in types.values()])
            return list(types)
    return []


def _inside(path: str, folder: Path) -> str:
    if Path(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ModelError(f"{folder / MODULES} names the folder {path!r}, which is not below its own; copy the checkpoint again")
    return path


def _weights(module: Path) -> list[Path]:
    """The weights of a module; ModelError where it has some and none as safetensors."""
    if (module / ADAPTER).is_file() or "model_type" in _about(module / "config.json"):
        return weight_files(module)
    like = sorted(file for file in module.iterdir() if file.suffix in WEIGHT_LIKE)
    own = [file for file in like if file.suffix == ".safetensors"]
    if like and module / SINGLE not in own:
        raise ModelError(f"{module} holds no {SINGLE}, only {', '.join(file.name for file in like[:3])}. {REMEDY}")
    return own
