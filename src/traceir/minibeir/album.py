"""The picture files of a MiniBEIR folder: each picture is drawn once, by several processes, and written whole or not at all."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tqdm import tqdm

from traceir.errors import DataError
from traceir.minibeir.draft import Sketch

JPEG_QUALITY: Final = 92

_PENDING = 8192  # pictures drawn at a time: bounds memory and the number of forks
_SAFE_KEY = re.compile(r"[a-z0-9][a-z0-9_.,=-]{0,99}")


class Album:
    """The picture files: each (world, key) is drawn once and shared by all rows, pools and lessons that show it."""

    def __init__(self, root: Path, workers: int) -> None:
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        self.root = root
        self.workers = workers if can_fork else 1
        self.paths: dict[tuple[str, str], str] = {}
        self.pending: list[tuple[Sketch, Path]] = []

    def place(self, sketch: Sketch | None, world: str, folder: str) -> str | None:
        """The picture's path relative to the root; new pictures are queued for drawing."""
        if sketch is None:
            return None
        known = self.paths.get((world, sketch.key))
        if known is not None:
            return known
        name = f"mbeir_images/{folder}/{_file_name(sketch.key)}"
        self.paths[world, sketch.key] = name
        if not (self.root / name).exists():
            self.pending.append((sketch, self.root / name))
        if len(self.pending) >= _PENDING:
            self.draw()
        return name

    def draw(self) -> None:
        """Draws what is queued. What a worker leaves undone is drawn here, so that its error is raised here.

        This process draws a share of its own: forks inherit what the worlds have cached of earlier drawing.
        """
        for folder in {path.parent for _, path in self.pending}:
            folder.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork" if self.workers > 1 else None)
        shards = [self.pending[start :: self.workers] for start in range(self.workers)]
        processes = [fork.Process(target=_draw_shard, args=(shard, os.getpid())) for shard in shards[1:] if shard]
        for process in processes:
            process.start()
        for sketch, path in tqdm(shards[0], desc="pictures", unit="picture", leave=False, disable=None):
            _draw(sketch, path)
        for process in processes:
            process.join()
        for sketch, path in self.pending:
            if not path.exists():
                _draw(sketch, path)
        self.pending.clear()


def _draw_shard(shard: Sequence[tuple[Sketch, Path]], parent: int) -> None:
    for sketch, path in shard:
        if os.getppid() != parent:
            return  # the build was killed; leave the rest to the next one
        _draw(sketch, path)


def _draw(sketch: Sketch, path: Path) -> None:
    image = sketch.draw()
    if image.mode != "RGB":
        raise DataError(f"sketch {sketch.key!r} draws a picture of mode {image.mode}; it must be RGB")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="JPEG", quality=JPEG_QUALITY)
    temporary.replace(path)


def _file_name(key: str) -> str:
    """The key itself where every file system takes it, else its digest."""
    stem = key if _SAFE_KEY.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()[:32]
    return f"{stem}.jpg"
