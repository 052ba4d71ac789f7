"""Resized pictures in one memory-mapped file, so that no run decodes a picture twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from traceir.batch import ImageBudget, Pixels, Processor
from traceir.errors import DataError, ImageError
from traceir.images import ImageInput


class PixelStore(Mapping[str, Pixels]):
    """Resized pictures of a folder, uint8 of shape [height, width, 3].

    Lies in `<cache>/<budget>/`: pixels.bin (uint8), names.json [[path, offset, height, width], ...]
    written last. Keys are the pictures' full paths.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.flat = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        listed = json.loads((folder / "names.json").read_text())
        self.places = {str(root / name): (offset, high, wide) for name, offset, high, wide in listed}

    def __getitem__(self, name: str) -> Pixels:
        offset, high, wide = self.places[name]
        return self.flat[offset : offset + high * wide * 3].reshape(high, wide, 3)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def pixel_store(root: Path, cache: Path, processor: Processor, names: Sequence[str]) -> PixelStore:
    """The PixelStore for these pictures (paths relative to root) at the processor's budget, built or completed if needed.

    What it holds already is taken over as it is, whether or not its file is still there.
    """
    folder = cache / _budget_name(processor.image)
    wanted, store = sorted(set(names)), None
    if (folder / "names.json").is_file():
        store = PixelStore(folder, root)
        if all(str(root / name) in store.places for name in wanted):
            return store
        wanted = sorted({*wanted, *(str(Path(name).relative_to(root)) for name in store)})
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[tuple[str, int, int, int]] = []
    offset, fresh = 0, folder / f"pixels.{os.getpid()}.tmp"
    with fresh.open("wb") as stream:
        for name in tqdm(wanted, desc="decoding pictures", unit="picture", mininterval=2.0):
            shown = store[str(root / name)] if store and str(root / name) in store.places else _decode(root / name, processor)
            stream.write(shown.tobytes())
            listed.append((name, offset, shown.shape[0], shown.shape[1]))
            offset += shown.size
    names_fresh = folder / f"names.{os.getpid()}.tmp"
    names_fresh.write_text(json.dumps(listed))
    (folder / "names.json").unlink(missing_ok=True)
    os.replace(fresh, folder / "pixels.bin")
    os.replace(names_fresh, folder / "names.json")
    return PixelStore(folder, root)


def _decode(file: Path, processor: Processor) -> Pixels:
    try:
        return processor.pixels(ImageInput.open(file))
    except ImageError as error:
        raise DataError(f"{file}: {error}") from error


def _budget_name(image: ImageBudget) -> str:
    return f"{image.patch * image.merge}-{image.min_pixels}-{image.max_pixels}"
