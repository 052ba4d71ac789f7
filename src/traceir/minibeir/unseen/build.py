"""Writes the miniatures of the 13 zero-shot columns: `build_unseen`.

A build is a function of scale and seed: equal bytes on every run with the same libraries. It is checked, written beside its place
and renamed when it is whole; `unseen.json` is written last.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.files import write_whole
from traceir.minibeir.build import Album, check_plan, dump, fingerprint, holds
from traceir.minibeir.rows import Scale, derive_seed
from traceir.minibeir.unseen import captions, changes, pairs
from traceir.minibeir.unseen.states import StatePart, depict

FORMAT: Final = 1
MANIFEST: Final = "unseen.json"
IMAGES_FILE: Final = "unseen_pictures.jsonl"
"""Lines of {"path", "key"}: what each image shows, which no reader of the sets needs."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Set:
    """One unseen set: what makes it, what checks that its texts are right for its images alone, its count at each scale."""

    make: Callable[[int, random.Random], StatePart]
    check: Callable[[StatePart], None]
    small: int
    full: int


SETS: Final[Mapping[str, _Set]] = {
    "sharegpt4v": _Set(captions.make_sharegpt4v, captions.check_long, 12, 500),
    "urban1k": _Set(captions.make_urban, captions.check_long, 12, 500),
    "flickr": _Set(captions.make_flickr, captions.check_flickr, 12, 300),
    "circo": _Set(changes.make_circo, changes.check_circo, 12, 300),
    "genecis": _Set(changes.make_genecis, changes.check_genecis, 3, 100),
    "visdial": _Set(captions.make_visdial, captions.check_visdial, 12, 400),
    "vist": _Set(changes.make_vist, changes.check_vist, 12, 300),
    "multiturnfashion": _Set(changes.make_multiturn, changes.check_multiturn, 12, 300),
    "ccneg": _Set(pairs.make_ccneg, pairs.check_ccneg, 12, 400),
    "sugarcrepe": _Set(pairs.make_sugarcrepe, pairs.check_sugarcrepe, 2, 60),
}
"""Three of these sets are searched both ways, which makes 13 columns. GeneCIS counts for each of four files, SugarCrepe of
seven."""


def build_unseen(out: Path, *, scale: Scale, seed: int, progress: bool = True) -> Path:
    """Writes all sets into `out` and returns it; a folder that holds this very build already is left as it is.

    Raises InputError where `out` holds something else, DataError where a set breaks a rule. `progress` shows a bar on stderr, if
    that is a terminal.
    """
    check_plan(scale, seed)
    plan = {"name": "MiniBEIR unseen", "format": FORMAT, "scale": scale, "seed": seed}
    if holds(out, MANIFEST, plan):
        return out
    parts = {}
    for name, each in SETS.items():
        count = each.full if scale == "full" else each.small
        parts[name] = each.make(count, random.Random(derive_seed("unseen", name, seed)))
        each.check(parts[name])
    folder = out.resolve()
    work = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(work, ignore_errors=True)  # what a killed build left
    write_parts(work, parts, plan, progress)
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)
    logger.info("the unseen sets (%s) are complete in %s", scale, out)
    return out


def write_parts(root: Path, parts: Mapping[str, StatePart], plan: Mapping[str, object], progress: bool = False) -> None:
    """Files and images, a list of what each image shows, and the manifest."""
    for name, content in itertools.chain.from_iterable(part.files.items() for part in parts.values()):
        if name.endswith(".pt"):
            import torch

            (root / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, root / name)
        else:
            write_whole(root / name, content if isinstance(content, str) else dump(content) + "\n")
    album = Album(root, 1)
    sketches = {name: depict(state) for part in parts.values() for name, state in part.shown.items()}
    for name, sketch in sketches.items():
        album.add(sketch, name)
    album.draw(quiet=None if progress else True)
    lines = [dump({"path": name, "key": sketches[name].key}) + "\n" for name in sorted(sketches)]
    write_whole(root / IMAGES_FILE, "".join(lines))
    counts = {
        name: {"queries": part.queries, "candidates": part.candidates, "pictures": len(part.shown)}
        for name, part in parts.items()
    }
    write_whole(root / MANIFEST, dump({**plan, "sets": counts, "fingerprint": fingerprint(root, MANIFEST)}) + "\n")
