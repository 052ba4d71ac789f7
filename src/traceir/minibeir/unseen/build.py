"""Writes the miniatures of the 13 zero-shot columns: `build_unseen`.

A build is a function of scale and seed: equal bytes on every run with the same libraries. It is written beside its place
and renamed when it is whole and checked; `unseen.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image
from tqdm import tqdm

from traceir.errors import DataError, InputError
from traceir.minibeir.album import JPEG_QUALITY
from traceir.minibeir.drawing import derive_seed
from traceir.minibeir.rows import SCALES, Scale
from traceir.minibeir.unseen.captions import make_flickr, make_sharegpt4v, make_urban
from traceir.minibeir.unseen.dialogs import make_visdial
from traceir.minibeir.unseen.edits import make_circo, make_genecis
from traceir.minibeir.unseen.pairs import make_ccneg, make_sugarcrepe
from traceir.minibeir.unseen.states import Part
from traceir.minibeir.unseen.turns import make_multiturn, make_vist
from traceir.minibeir.unseen.verify import IMAGES_FILE, read_torch, verify_unseen

FORMAT: Final = 1
MANIFEST: Final = "unseen.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Set:
    """One unseen set: what makes it, and the count it is given at each scale."""

    make: Callable[[int, random.Random], Part]
    small: int
    full: int

    def count(self, scale: Scale) -> int:
        return self.full if scale == "full" else self.small


SETS: Final[Mapping[str, _Set]] = {
    "sharegpt4v": _Set(make_sharegpt4v, 12, 500),
    "urban1k": _Set(make_urban, 12, 500),
    "flickr": _Set(make_flickr, 12, 300),
    "circo": _Set(make_circo, 12, 300),
    "genecis": _Set(make_genecis, 3, 100),
    "visdial": _Set(make_visdial, 12, 400),
    "vist": _Set(make_vist, 12, 300),
    "multiturnfashion": _Set(make_multiturn, 12, 300),
    "ccneg": _Set(make_ccneg, 12, 400),
    "sugarcrepe": _Set(make_sugarcrepe, 2, 60),
}
"""Three of these sets are searched both ways, which makes 13 columns. GeneCIS counts for each of four files, SugarCrepe of
seven."""


def build_unseen(out: Path, *, scale: Scale, seed: int, progress: bool = True) -> Path:
    """Writes all sets into `out` and returns it; a folder that holds this very build already is left as it is.

    Raises InputError where `out` holds something else, DataError where a set breaks a rule. `progress` shows bars on
    stderr, if that is a terminal.
    """
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    if seed < 0:
        raise InputError(f"seed is {seed}; give an integer of at least 0")
    plan = {"name": "MiniBEIR unseen", "format": FORMAT, "scale": scale, "seed": seed}
    if _is_there(out, plan):
        return out
    quiet = None if progress else True
    chosen = tqdm(SETS.items(), desc="unseen: queries", unit="set", leave=False, disable=quiet)
    parts = {name: each.make(each.count(scale), _dice(name, seed)) for name, each in chosen}
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    work = place.with_name(f".{place.name}.building")
    shutil.rmtree(work, ignore_errors=True)  # what a killed build left
    for part in parts.values():
        for name, content in part.files.items():
            _write_file(work / name, content)
    _draw_images(work, parts, quiet)
    verify_unseen(work, progress=progress)
    counts = {
        name: {"queries": part.queries, "candidates": part.candidates, "pictures": len(part.images)}
        for name, part in parts.items()
    }
    _write_file(work / MANIFEST, plan | {"sets": counts, "fingerprint": fingerprint(work)})
    if place.exists():
        place.rmdir()
    os.replace(work, place)
    logger.info("the unseen sets (%s) are complete in %s", scale, out)
    return out


def fingerprint(root: Path) -> str:
    """SHA-256 (hex) over names and contents of all files but pictures and the manifest.

    A torch file counts by the JSON of what it holds, because its bytes may differ between versions of torch.
    """
    digest = hashlib.sha256()
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".pt")]
    for name in sorted(set(names) - {MANIFEST}):
        path = root / name
        content = _dump(read_torch(path)).encode() if path.suffix == ".pt" else path.read_bytes()
        digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _dice(name: str, seed: int) -> random.Random:
    return random.Random(derive_seed("unseen", name, seed))


def _is_there(out: Path, plan: Mapping[str, Any]) -> bool:
    """Whether `out` holds this very build. Raises InputError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / MANIFEST
    if not path.is_file():
        raise InputError(f"{out} is not empty and holds no {MANIFEST}; give a new or an empty folder")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON ({error}); remove the folder and build again") from error
    for key, wanted in plan.items():
        if not isinstance(found, dict) or found.get(key) != wanted:
            shown = found.get(key) if isinstance(found, dict) else found
            raise InputError(
                f"{path}: the folder holds {key} {shown!r}, asked for is {wanted!r}; give another folder or remove this one"
            )
    return True


def _write_file(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        import torch

        torch.save(content, path)
    else:
        text = content if isinstance(content, str) else _dump(content) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")


def _dump(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)


def _draw_images(root: Path, parts: Mapping[str, Part], quiet: bool | None) -> None:
    """Draws every picture, and writes down what each shows."""
    sketches = {name: sketch for part in parts.values() for name, sketch in part.images.items()}
    for folder in {(root / name).parent for name in sketches}:
        folder.mkdir(parents=True, exist_ok=True)
    shown = tqdm(sketches.items(), desc="unseen: pictures", unit="picture", leave=False, disable=quiet)
    for name, sketch in shown:
        _save_image(sketch.draw(), root / name)
    lines = [_dump({"path": name, "key": sketches[name].key}) + "\n" for name in sorted(sketches)]
    _write_file(root / IMAGES_FILE, "".join(lines))


def _save_image(image: Image.Image, path: Path) -> None:
    if path.suffix == ".jpg":
        image.save(path, format="JPEG", quality=JPEG_QUALITY)
    else:
        image.save(path)
