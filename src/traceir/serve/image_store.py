"""Images that stay: those that clients send with items, as files, and what a page is shown of any item's image."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.errors import ImageError, StoreError
from traceir.images import ImageInput, file_bytes
from traceir.serve.uploads import LIMITS

_OURS = re.compile(r"[0-9a-f]{2}/[0-9a-f]{40}/\.?[0-9a-f]{64}\.[a-z]+(\.[0-9a-f]{32})?")
LEFT_S: Final = 3600.0  # seconds after which a file that no item names is not on its way into the index any more
MAX_SIDE: Final = 2048  # pixels of the longer side of an image that is handed out, at most


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Uploaded images below `folder`: each item has a folder of its own, named by a hash of tenant and id, with one file in
    it: what was sent, named by its SHA-256. So the image of an item goes with the item, and no other's with it. `tidy` belongs
    to the one thread that writes the index, which calls `keep` again right before, for what was tidied meanwhile.
    """

    folder: Path
    tenant: str | None = None

    def keep(self, image: ImageInput, id: str) -> ImageInput:
        """The image as the item's own file that survives a crash; a file that is no upload stays where it is."""
        if image.path is not None and not image.path.is_relative_to(self.folder):
            return image
        data, format = image.encoded(LIMITS)
        place = self._place(id) / f"{image.sha256}{format.suffixes[0]}"
        if not place.exists():
            fresh = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with fresh.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(fresh, place)
                for folder in (place.parent, place.parent.parent, self.folder):
                    _sync(folder)
            except OSError as error:
                fresh.unlink(missing_ok=True)
                shown = f"the picture cannot be kept: {error.strerror or error}"
                raise StoreError(f"{shown}; free the disk, send it again") from error
        return image.moved_to(place)

    def tidy(self, id: str, kept: str | None) -> None:
        """Throws away the uploads of an item except the one that the index names."""
        place = self._place(id)
        for file in place.iterdir() if place.is_dir() else ():
            if str(file) != kept:
                file.unlink(missing_ok=True)
        if kept is None and place.is_dir():
            place.rmdir()

    def sweep(self, named: Iterable[str | None], older_s: float = LEFT_S) -> int:
        """Throws away what a server that was killed left behind: our files that no item names, of at least this age; how many.

        `named` are the images of all items that may have files here; so not for a folder that several indexes share.
        """
        kept = {path for path in named if path is not None}
        now, swept = time.time(), 0
        for file in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                ours = _OURS.fullmatch(file.relative_to(self.folder).as_posix()) is not None
                if ours and str(file) not in kept and now - file.stat().st_mtime >= older_s:
                    file.unlink()
                    swept += 1
                    file.parent.rmdir()  # refused while another file is in it
        return swept

    def _place(self, id: str) -> Path:
        owner = hashlib.sha256(f"{self.tenant or ''}\0{id}".encode()).hexdigest()[:40]
        return self.folder / owner[:2] / owner


def _sync(folder: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_jpeg(image: ImageInput, side: int = MAX_SIDE) -> bytes:
    """The image as JPEG, its longer side at most `side` pixels. Raises ImageError."""
    try:
        return file_bytes(image.load(shrink_to=side, limits=LIMITS), side=side)
    except OSError as error:
        raise ImageError(f"the image cannot be shown: {error}; add it anew") from error
