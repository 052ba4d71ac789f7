"""Where a checkpoint is (bundled, a folder, an id on the Hugging Face hub), whether sentence-transformers is to load it, which of
its files are weights, and the fingerprint that names them. Imports no torch, so that a wrong name fails at once.

Only what a checkpoint itself names counts as its weights, in the order in which transformers and PEFT look for it. What lies
beside it (an optimiser's state, averaged or consolidated weights, another precision) is neither read nor fingerprinted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from traceir.catalogue import profile_for
from traceir.errors import ModelError

MODEL_VARIABLE: Final = "TRACEIR_MODEL"
CONFIG: Final = "config.json"
ADAPTER: Final = "adapter_config.json"
"""PEFT's file; a folder that holds it is an adapter over another checkpoint (adapter.py)."""
PREFIX: Final = "st:"
"""The prefix of a name that sentence-transformers is to load, whatever its folder holds."""
MODULES: Final = "modules.json"
"""sentence-transformers' list of a model's modules and their folders."""
OWN_MODULE: Final = "traceir.sentence.TraceModule"
"""The module type that TraceIR writes there, by which its own checkpoints are known."""
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
REMEDY: Final = (
    "TraceIR reads weights from .safetensors only, since other formats may hold pickles, which run code where they are read; "
    "load the checkpoint where that is safe and convert it with transformers: model.save_pretrained(FOLDER)"
)
WEIGHT_LIKE: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf"})
WHOLE_HASH_BYTES: Final = 256 * 2**20
_COMPANIONS: Final = ("*.json", "*.jinja", "*.txt")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_CONNECT_S: Final = 3.0
_TAKES: Final = "--model takes a Hugging Face checkpoint directory or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"


def bundled_model() -> Path:
    """The checkpoint used where none is named: $TRACEIR_MODEL, else the one that comes with the package."""
    if named := os.environ.get(MODEL_VARIABLE):
        return Path(named)
    folder = Path(__file__).parent / "models" / "mini"
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"there is no bundled checkpoint at {folder}; give --model DIR_OR_HUB_ID, or set {MODEL_VARIABLE}, "
            "or train one with `traceir train --preset mini`"
        )
    return folder


def check_model(name: str) -> None:
    """Raises ModelError for a name that cannot be a checkpoint: a missing folder, one without config.json, no hub id."""
    path = Path(name := plain_name(name))
    if path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG, ADAPTER, MODULES)):
            raise ModelError(f"{name} holds no {CONFIG}; {_TAKES}")
    elif path.exists():
        raise ModelError(f"{name} is a file; {_TAKES}")
    elif not is_hub_id(name):
        raise ModelError(f"there is no folder {name!r}; {_TAKES}")


def plain_name(name: str) -> str:
    """The folder or hub id of a name that may have `st:` before it."""
    return name.removeprefix(PREFIX)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder has the form OWNER/NAME, and OWNER is not a folder here in which NAME is only missing."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name.split("/")[0]).is_dir()


def is_library(name: str) -> bool:
    """Whether sentence-transformers is to load a checkpoint: asked for by `st:`, or told by the modules.json that lies there.

    For a hub id that file is looked up in the local cache, then on the hub. A hub id that has a profile here is read by the
    profile, whatever its modules.json names.
    """
    if name.startswith(PREFIX) or profile_for(name) is not None:
        return name.startswith(PREFIX)
    return module_types(name) not in ([], [OWN_MODULE])


def module_types(name: str) -> list[str]:
    """The types of module that the modules.json of a folder or hub repository names; [] where there is none."""
    if Path(name).is_dir() or not is_hub_id(name):
        return modules_of(Path(name) / MODULES, "type")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    known = try_to_load_from_cache(name, MODULES)
    if known is not None or not hub_answers():
        return modules_of(Path(known), "type") if isinstance(known, str) else []
    try:
        return modules_of(Path(hf_hub_download(name, MODULES)), "type")
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return []  # `fetch` says which repository is missing
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} cannot be had from the hub: {error}") from error


def modules_of(file: Path, key: str) -> list[str]:
    """What a modules.json says under `key`, `type` or `path`, of each module; [] where there is no such file."""
    try:
        return [str(module[key]) for module in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {file}: {error}; copy the checkpoint again") from error


def fetch(name: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: its own, or the one in the hub's local cache, filled now where it is not there yet.

    `weights` False leaves out what a tokenizer and settings do not need. Where the hub does not answer, what is in the cache is
    used at once. Raises ModelError where it is not there, and for a name with `st:`, which only library.py takes.
    """
    if name.startswith(PREFIX):
        raise ModelError(f"{name} is a model of sentence-transformers; here a checkpoint that TraceIR itself runs is needed")
    check_model(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    answers, wanted = hub_answers(), [*_COMPANIONS, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not answers))
    except (OSError, ValueError) as error:
        if answers:
            raise ModelError(f"{name} cannot be had from the hub: {error}") from error
        raise ModelError(
            f"{name} is no folder here and not in the local cache of the Hugging Face hub, which {_hub()} does not answer for; "
            "check the name and the connection"
        ) from error


def hub_answers() -> bool:
    """Whether the hub can be reached: one try to connect, of three seconds at most, in place of minutes of retries.

    Behind a proxy it is assumed to be.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(_hub())
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), _CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint or adapter folder; ModelError where there are none, or not all that it names."""
    if (folder / ADAPTER).is_file():
        names = {ADAPTER_WEIGHTS}
    elif named := read_object(folder / CONFIG).get("transformers_weights") if (folder / CONFIG).is_file() else None:
        names = _shards(folder / named) if str(named).endswith(".index.json") else {_checked(str(named), folder / CONFIG)}
    elif (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        names = _shards(folder / INDEX)
    else:
        names = {SINGLE}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing in ([SINGLE], [ADAPTER_WEIGHTS]):
        others = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_LIKE)
        only = f", only {', '.join(others[:3])}" if others else ""
        raise ModelError(f"{folder} holds no safetensors weights, {missing[0]}{only}. {REMEDY}")
    if missing:
        raise ModelError(f"{folder} lacks weights that it names: {', '.join(missing)}; copy it again")
    return [folder / name for name in sorted(names)]


def _shards(index: Path) -> set[str]:
    """The files that an index of sharded weights names."""
    try:
        return {_checked(str(name), index) for name in read_object(index)["weight_map"].values()}
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{index} maps no weights to files; copy the checkpoint again") from error


def _checked(name: str, where: Path) -> str:
    """The name itself; ModelError where it is that of no safetensors file in the same folder."""
    if Path(name).name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(f"{where} names {name!r}, which is no .safetensors file of its folder. {REMEDY}")
    return name


def fingerprint(folder: Path, files: Sequence[Path] | None = None) -> str:
    """16 hex digits that name the weights in a folder and its tokenizer, whatever the folder is called.

    `files` are other weights than those that the folder names. Files of up to 256 MB count whole; of larger ones the size, the
    header and 64 evenly spaced blocks of 64 KB.
    """
    counted = sorted([*(weight_files(folder) if files is None else files), *folder.glob("tokenizer.json")])
    return digest((file.name, file) for file in counted)


def digest(named: Iterable[tuple[str, Path]]) -> str:
    """16 hex digits over files and the names under which they count, in the order given."""
    sha = hashlib.sha256()
    for name, file in named:
        size = file.stat().st_size
        sha.update(f"{name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_HASH_BYTES:
                while block := stream.read(2**20):
                    sha.update(block)
            else:
                for part in range(64):
                    stream.seek(part * (size - 65536) // 63)
                    sha.update(stream.read(65536))
    return sha.hexdigest()[:16]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; ModelError where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}; copy the checkpoint again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; copy the checkpoint again")
    return content
