"""Image files for tests: of Pillow, and TIFF files written by hand from the specification (TIFF 6.0)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO

import numpy as np
from PIL import Image

SHORT, LONG, FLOAT = 3, 4, 11
_FORMS = {SHORT: "H", LONG: "I", FLOAT: "f"}
Tags = Mapping[int, tuple[int, tuple[float, ...]]]


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(
    width: int, height: int, pixels: bytes, *, tags: Tags, order: str = "<", packed: bool = False, pieces: tuple[int, ...] = ()
) -> bytes:
    """The header, then one strip, deflated where `packed`, or strips of `pieces` bytes.

    `tags`: number -> (SHORT, LONG or FLOAT, values), beside or over the usual ones.
    """
    body = zlib.compress(pixels, 9) if packed else pixels
    header: dict[int, tuple[int, tuple[float, ...]]] = {
        256: (LONG, (width,)), 257: (LONG, (height,)), 259: (SHORT, (8 if packed else 1,)), 262: (SHORT, (1,)),
        273: (LONG, (0,) * len(pieces or "1")), 277: (SHORT, (1,)), 278: (LONG, (height,)),
        279: (LONG, pieces or (len(body),)), **tags,
    }  # fmt: skip
    beyond = 8 + 2 + 12 * len(header) + 4
    entries, values_beyond = b"", b""
    data_of = {tag: struct.pack(f"{order}{len(values)}{_FORMS[kind]}", *values) for tag, (kind, values) in header.items()}
    start = beyond + sum(len(data) for data in data_of.values() if len(data) > 4)
    starts = [start + sum(pieces[:number]) for number in range(len(pieces) or 1)]
    data_of[273] = struct.pack(f"{order}{len(starts)}I", *starts)
    for tag, (kind, values) in sorted(header.items()):
        entries += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(data_of[tag]) > 4:
            entries += struct.pack(f"{order}I", beyond + len(values_beyond))
            values_beyond += data_of[tag]
        else:
            entries += data_of[tag].ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(header))
    return head + entries + bytes(4) + values_beyond + body


def grey_tiff(
    values: np.ndarray, kind: str, *, order: str = "<", packed: bool = False, photometric: int = 1, **more: object
) -> bytes:
    """Grey of numpy's `kind` ("u2", "i2", "f4", ...). `more`: further tags as `t340=(FLOAT, (0.0,))`."""
    stored = values.astype(np.dtype(kind).newbyteorder(order))
    sample = {"u": 1, "i": 2, "f": 3}[kind[0]]
    tags = {258: (SHORT, (stored.itemsize * 8,)), 262: (SHORT, (photometric,)), 339: (SHORT, (sample,))}
    tags |= {int(name[1:]): value for name, value in more.items()}
    return tiff(values.shape[1], values.shape[0], stored.tobytes(), order=order, packed=packed, tags=tags)


def float_tiff(side: int) -> bytes:
    """A square of floats, which deflate makes a thousand times smaller: 5600 pixels a side are a file of 0.14 MB."""
    values = np.zeros((side, side), dtype=np.float32)
    values[0] = np.linspace(0.0, 1.0, side)
    return grey_tiff(values, "f4", packed=True)
