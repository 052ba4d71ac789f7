"""Resized images in one memory-mapped file, so that no run decodes an image twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from traceir.batch import Pixels, Processor
from traceir.errors import DataError, ImageError
from traceir.images import ImageInput


class PixelStore(Mapping[str, Pixels]):
    """Resized images of a folder, uint8 of shape [height, width, 3], by their full paths.

    Lies in `<cache>/<budget>/`: pixels.bin (uint8), names.json [[path, offset, height, width], ...] written last.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.flat = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        listed = json.loads((folder / "names.json").read_text())
        self.entries = {str(root / name): (offset, height, width) for name, offset, height, width in listed}

    def __getitem__(self, name: str) -> Pixels:
        offset, height, width = self.entries[name]
        return self.flat[offset : offset + height * width * 3].reshape(height, width, 3)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def pixel_store(root: Path, cache: Path, processor: Processor, names: Sequence[str]) -> PixelStore:
    """The PixelStore for these images (paths relative to root) at the processor's budget, built or completed if needed.

    What it holds already is taken over as it is, whether or not its file is still there.
    """
    budget = processor.image
    folder = cache / f"{budget.patch * budget.merge}-{budget.min_pixels}-{budget.max_pixels}"
    known: Mapping[str, Pixels] = PixelStore(folder, root) if (folder / "names.json").is_file() else {}
    if isinstance(known, PixelStore) and all(str(root / name) in known for name in names):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    pixels_fresh, names_fresh = (folder / f"{part}.{os.getpid()}.tmp" for part in ("pixels", "names"))
    listed: list[tuple[str, int, int, int]] = []
    offset, wanted = 0, sorted({*names, *(str(Path(name).relative_to(root)) for name in known)})
    with pixels_fresh.open("wb") as stream:
        for name in tqdm(wanted, desc="decoding images", unit="image", mininterval=2.0):
            file = root / name
            try:
                pixels = known[str(file)] if str(file) in known else processor.pixels(ImageInput.open(file))
            except ImageError as error:
                raise DataError(f"{file}: {error}") from error
            stream.write(pixels.tobytes())
            listed.append((name, offset, pixels.shape[0], pixels.shape[1]))
            offset += pixels.size
    names_fresh.write_text(json.dumps(listed))
    (folder / "names.json").unlink(missing_ok=True)
    os.replace(pixels_fresh, folder / "pixels.bin")
    os.replace(names_fresh, folder / "names.json")
    return PixelStore(folder, root)
