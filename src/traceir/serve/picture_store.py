"""Pictures that stay: those that clients send with items, as files, and what a page is shown of any item's picture."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from traceir.errors import PictureError, StoreError
from traceir.pictures import Picture
from traceir.serve.intake import LIMITS

MAX_SIDE: Final = 2048
"""Pixels of the longer side of a picture that is handed out, at most."""


@dataclass(frozen=True, slots=True)
class PictureStore:
    """Uploaded pictures below `folder`, each a PNG named by the SHA-256 of what was sent."""

    folder: Path

    def keep(self, picture: Picture) -> Picture:
        """The picture as a file that survives a crash; equal pictures are one file, one that is a file already stays as it is."""
        if picture.path is not None:
            return picture
        place = self.folder / picture.sha256[:2] / f"{picture.sha256}.png"
        if not place.exists():
            fresh = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with fresh.open("wb") as stream:
                    picture.load(limits=LIMITS).save(stream, "PNG")
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(fresh, place)
            except OSError as error:
                fresh.unlink(missing_ok=True)
                shown = f"the picture cannot be kept: {error.strerror or error}"
                raise StoreError(f"{shown}; free the disk, send it again") from error
        return Picture.open(place)


def as_jpeg(picture: Picture, side: int = MAX_SIDE) -> bytes:
    """The picture as JPEG, its longer side at most `side` pixels. Raises PictureError."""
    image = picture.load(shrink_to=side, limits=LIMITS)
    image.thumbnail((side, side))
    buffer = BytesIO()
    try:
        image.save(buffer, "JPEG", quality=88)
    except OSError as error:
        raise PictureError(f"the picture cannot be shown: {error}; add it anew") from error
    return buffer.getvalue()
