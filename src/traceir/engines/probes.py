"""Inputs that show whether a server sees images, and what of its answers to them names its model in a fingerprint.

Shapes: D width.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from traceir.images import ImageInput
from traceir.items import Item, Vector

SAME: Final = 0.99
"""Cosine from which two answers to a probe are one model's: another batch or precision stays above it, other weights below."""
WORDS: Final = ("A lighthouse on a cliff above a stormy sea.", "The quarterly tax return of a small bakery.")
TEXTS: Final = tuple(Item((text,)) for text in WORDS)
_KEPT: Final = 32
"""Components of a probe's vector that a fingerprint keeps."""
_LEAST: Final = 1e-3
"""What two different probes differ in at least, as 1 - cosine: more than one probe does between two batches in bfloat16."""


def probe_images() -> tuple[ImageInput, ImageInput, ImageInput]:
    """An image, the same pixels in other bytes, and another image of the same size.

    The second is told from the first earlier in its file than the third is. A server that reads the file as text therefore
    finds the equal ones different before it finds the different ones so, however much of it it reads.
    """
    height, width = np.mgrid[0:96, 0:96]
    wave = ((height + width) * 255 // 190).astype(np.uint8)
    first = np.stack([wave, 255 - wave, np.full_like(wave, 90)], axis=-1)
    disc = ((height - 48) ** 2 + (width - 48) ** 2 < 900)[..., None]
    other = np.where(disc, np.array([230, 40, 30]), np.array([20, 60, 160]))
    return _png(first), _png(first, "the same pixels in other bytes"), _png(other)


def _png(pixels: Any, comment: str = "") -> ImageInput:
    """A comment stands behind the header, before the pixels."""
    about, packed = PngInfo(), BytesIO()
    if comment:
        about.add_text("Comment", comment)
    Pillow.fromarray(pixels.astype(np.uint8)).save(packed, "PNG", pnginfo=about)
    return ImageInput.from_bytes(packed.getvalue())


def tells_apart(first: Vector, again: Vector, others: Sequence[Vector]) -> bool:
    """Whether the equal are much nearer to each other than to each of the others."""
    near = 1 - _cosine(first, again)
    return near < 1 - SAME and all(1 - _cosine(first, other) > _LEAST + 4 * near for other in others)


def kept(vector: Vector) -> str:
    """Some components of a probe's vector, evenly over its width, as bytes in base64 of URLs."""
    picked = vector[:: max(1, len(vector) // _KEPT)][:_KEPT]
    return base64.urlsafe_b64encode(np.round(picked / np.abs(picked).max() * 127).astype(np.int8).tobytes()).decode().rstrip("=")


def compared(code: str, other: str) -> list[float]:
    """Cosines of the probes kept in two fingerprints, [] where they are not of one shape."""
    ours, theirs = ([_unpacked(part) for part in text.split(".")] for text in (code, other))
    if [len(part) for part in ours] != [len(part) for part in theirs] or not all(part.any() for part in ours + theirs):
        return []
    return [_cosine(mine, yours) for mine, yours in zip(ours, theirs, strict=True)]


def _unpacked(code: str) -> Vector:
    try:
        raw = base64.urlsafe_b64decode(code + "=" * (-len(code) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    return np.frombuffer(raw, dtype=np.int8).astype(np.float32)


def _cosine(first: Vector, other: Vector) -> float:
    return float(first.astype(np.float64) @ other.astype(np.float64) / (np.linalg.norm(first) * np.linalg.norm(other)))
