"""Image files for tests: of Pillow, and PNG and TIFF files written by hand from their specifications (TIFF 6.0)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from io import BytesIO

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
SHORT, LONG, FLOAT = 3, 4, 11
_FORMS = {SHORT: "H", LONG: "I", FLOAT: "f"}
Tags = Mapping[int, tuple[int, tuple[float, ...]]]


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Unfiltered rows of samples; fewer than `height` of them where the file claims more than it holds."""
    row = width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7 >> 3
    lines = b"".join(b"\0" + rows[start : start + row] for start in range(0, len(rows), row))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


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
    starts_at = 8 + 2 + 12 * len(header) + 4
    data_of = {tag: struct.pack(f"{order}{len(values)}{_FORMS[kind]}", *values) for tag, (kind, values) in header.items()}
    start = starts_at + sum(len(data) for data in data_of.values() if len(data) > 4)
    starts = [start + sum(pieces[:number]) for number in range(len(pieces) or 1)]
    data_of[273] = struct.pack(f"{order}{len(starts)}I", *starts)
    entries = beyond = b""
    for tag, (kind, values) in sorted(header.items()):
        data = data_of[tag]
        if len(data) > 4:
            data, beyond = struct.pack(f"{order}I", starts_at + len(beyond)), beyond + data
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(header))
    return head + entries + bytes(4) + beyond + body


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
