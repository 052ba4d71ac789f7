"""Which files of a folder are a checkpoint's weights, and the fingerprint that names them.

Only what the checkpoint itself names counts, in the order in which transformers and PEFT look for it. What lies beside it (an
optimiser's state, averaged or consolidated weights, another precision) is neither read nor part of the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from traceir.checkpoint import ADAPTER, CONFIG
from traceir.errors import ModelError

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
REMEDY: Final = (
    "TraceIR reads weights from .safetensors only, since other formats may hold pickles, which run code where they are read; "
    "load the checkpoint where that is safe and convert it with transformers: model.save_pretrained(FOLDER)"
)
WEIGHT_LIKE: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf"})
WHOLE_HASH_BYTES: Final = 256 * 2**20


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
    """What a JSON file of a checkpoint says; ModelError where it holds no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}; copy the checkpoint again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no JSON object; copy the checkpoint again")
    return found
