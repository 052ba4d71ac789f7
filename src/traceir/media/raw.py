"""Raw photographs as cameras write them: the preview within, or, where that is small or missing, the developed pixels."""

from __future__ import annotations

import struct
from io import BytesIO
from threading import Lock
from typing import Any, Final

from PIL import Image, JpegImagePlugin

from traceir.errors import ImageError
from traceir.media.file import package

SUFFIXES: Final = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw"
    " .x3f".split()
)
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
LEAST_SIDE: Final = 640
"""Pixels of the longer side of a preview that is taken as the photograph."""
_ORIENTATION: Final = 0x0112
_OF_FLIP: Final = {3: 3, 5: 8, 6: 6}
"""EXIF's orientation of LibRaw's."""
_START: Final = b"\xff\xd8"
_DEVELOPING: Final = Lock()
"""One at a time, which bounds memory."""
_OTHERS: Final = (_START, b"\x89PNG", b"GIF8", b"RIFF", b"BM")


def preview(data: bytes, label: str, pixels: int) -> bytes:
    """An image file of the photograph: its JPEG preview with the orientation in its EXIF, else developed pixels as BMP.

    Bytes that are no raw photograph are returned as they are. ImageError for a damaged one, or one of more than `pixels`.
    """
    if data.startswith(_OTHERS):
        return data
    rawpy = package("rawpy", label)
    try:
        with rawpy.imread(BytesIO(data)) as raw:
            if small := _thumbnail(rawpy, raw):
                return small
            if raw.sizes.raw_width * raw.sizes.raw_height > 2 * pixels:
                raise ImageError(
                    f"{label} is {raw.sizes.raw_width} x {raw.sizes.raw_height} pixels, too many; convert it to JPEG"
                )
            with _DEVELOPING:
                return _bmp(raw.postprocess(half_size=True, use_camera_wb=True))
    except rawpy.LibRawFileUnsupportedError:
        return data
    except (rawpy.LibRawError, rawpy.NotSupportedError, ValueError, TypeError, MemoryError) as error:
        why = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        raise ImageError(f"{label} is damaged, or no raw photograph that LibRaw reads: {why}; convert it to JPEG") from error


def _thumbnail(rawpy: Any, raw: Any) -> bytes:
    """b"" where there is none, or a small one."""
    try:
        found = raw.extract_thumb()
        if found.format != rawpy.ThumbFormat.JPEG:
            return _bmp(found.data) if max(found.data.shape[:2]) >= LEAST_SIDE else b""
        with JpegImagePlugin.JpegImageFile(BytesIO(found.data)) as image:
            if max(image.size) < LEAST_SIDE:
                return b""
            orientation = _OF_FLIP.get(raw.sizes.flip, 1)
            is_turned = orientation > 4 and image.height > image.width
            if orientation == 1 or is_turned or ("exif" in image.info and image.getexif().get(_ORIENTATION)):
                return bytes(found.data)
            return _with_orientation(bytes(found.data), orientation)
    except (rawpy.LibRawError, OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return b""


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """With an EXIF segment of that alone, before any other."""
    exif = b"Exif\0\0" + struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
    return _START + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[len(_START) :]


def _bmp(pixels: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "BMP")
    return buffer.getvalue()
