"""Pixels of every mode that Pillow gives as 8-bit RGB, in strips: range, polarity and transparency as the file's header says.

Where a header states no range, as for floats and 32-bit or signed integers, it is 0 to 1 or 0 to 255 where all values lie in it,
else from the least to the greatest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from traceir.image_formats import tiff_tags

STRIP_PIXELS: Final = 1 << 18
"""Pixels converted at a time, which bounds what conversion needs beside the image and its result."""
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT, _LEAST, _MOST = 258, 259, 262, 277, 339, 340, 341
_KEYED: Final = frozenset({"1", "L", "P", "RGB"})
"""Modes of which one colour, or entries of the palette, may be transparent."""


@dataclass(frozen=True, slots=True)
class _Samples:
    """What a header says of one sample a pixel: its numpy type, whether its bytes come swapped, its black, its white, and which
    value is transparent. `black` is above `white` where zero is white."""

    kind: str
    swapped: bool
    black: float = 0.0
    white: float = 0.0
    clear: int | None = None


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, transparency composited on white; the image itself where that is what it is."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    flatten = _flattener(image)
    if image.width * image.height <= STRIP_PIXELS:
        return flatten(image)
    flat = Image.new("RGB", image.size)
    for box in _strips(image):
        flat.paste(flatten(image.crop(box)), box)
    return flat


def is_deep(image: Image.Image) -> bool:
    """Whether it has samples of 32 bits, or as a TIFF more than 32 bits a pixel; known from the header."""
    bits = tiff_tags(image).get(_BITS, (1,))
    return image.mode in ("I", "F") or max(sum(bits), bits[0] * tiff_tags(image).get(_SAMPLES, 1)) > 32


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _flattener(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of a strip of this image."""
    if image.mode.startswith("I") or image.mode == "F" or _is_signed(image):
        samples = _samples(image)
        return lambda strip: _grey(strip, samples)
    if image.has_transparency_data and (image.mode in _KEYED or image.mode.upper().endswith("A")):
        return _on_white
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe's files hold the ink that is left out, and Pillow takes all for Adobe's.
        return lambda strip: ImageChops.invert(strip).convert("RGB")
    return lambda strip: strip.convert("RGB")


def _on_white(strip: Image.Image) -> Image.Image:
    layer = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _grey(strip: Image.Image, samples: _Samples) -> Image.Image:
    values = _values(strip, samples)
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.clip((values - samples.black) * (255.0 / (samples.white - samples.black)), 0.0, 255.0)
    levels[np.isnan(levels)] = 0.0
    if samples.clear is not None:
        levels[values == samples.clear] = 255.0
    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")


def _values(strip: Image.Image, samples: _Samples) -> npt.NDArray[np.float64]:
    stored = np.asarray(strip)
    kind = np.dtype(samples.kind or stored.dtype)
    read = stored.view(kind) if stored.dtype.itemsize == kind.itemsize else stored.astype(kind)
    return (read.byteswap() if samples.swapped else read).astype(np.float64)


def _samples(image: Image.Image) -> _Samples:
    tags = tiff_tags(image)
    bits, signed = tags.get(_BITS, (0,))[0], _is_signed(image)
    # Pillow reads 32 unsigned bits and 8 signed ones as if they were the other, and compressed samples of a big-endian file,
    # which libtiff has swapped already, once more.
    kind = "u4" if image.mode == "I" and bits == 32 and not signed else f"i{bits // 8}" if signed else ""
    swapped = tags.get(_COMPRESSION, 1) != 1 and getattr(tags, "prefix", b"")[:2] == b"MM" and image.mode in ("I", "F")
    samples = _Samples(kind, swapped)
    black, white = _range(image, samples, tags)
    if tags.get(_PHOTOMETRIC) == 0:
        black, white = white, black
    clear = image.info.get("transparency") if image.mode.startswith("I;16") else None
    return replace(samples, black=black, white=white, clear=clear if isinstance(clear, int) else None)


def _range(image: Image.Image, samples: _Samples, tags: Mapping[int, Any]) -> tuple[float, float]:
    """The values of black and white, were zero black. TIFF's Min- and MaxSampleValue are statistics by their definition."""
    stated = [float(tags[tag][0]) for tag in (_LEAST, _MOST) if tags.get(tag)]
    if len(stated) == 2 and all(map(math.isfinite, stated)) and stated[0] < stated[1]:
        return stated[0], stated[1]
    if image.mode.startswith("I;16"):
        return 0.0, 2.0 ** tags.get(_BITS, (16,))[0] - 1
    low, high = math.inf, -math.inf
    for box in _strips(image):
        values = _values(image.crop(box), samples)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    for full in (1.0, 255.0):
        if low >= 0.0 and high <= full:
            return 0.0, full
    return (low, high) if high > low else (0.0, 255.0)


def _is_signed(image: Image.Image) -> bool:
    return image.mode in ("I", "L") and tuple(tiff_tags(image).get(_SAMPLE_FORMAT, ()))[:1] == (2,)
