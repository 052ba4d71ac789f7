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
_DEVELOPING: Final = Lock()
"""One at a time, which bounds memory."""
_OTHERS: Final = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM")


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
    except ImageError:
        raise
    except rawpy.LibRawFileUnsupportedError:
        return data
    except (rawpy.LibRawError, rawpy.NotSupportedError, ValueError, TypeError, MemoryError) as error:
        why = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        raise ImageError(f"{label} is damaged, or no raw photograph that LibRaw reads: {why}; convert it to JPEG") from error


def _thumbnail(rawpy: Any, raw: Any) -> bytes:
    """b"" where there is none, a small one, or one that is no JPEG. LibRaw gives one without EXIF that of the camera."""
    try:
        found = raw.extract_thumb()
        if found.format != rawpy.ThumbFormat.JPEG:
            return b""
        with JpegImagePlugin.JpegImageFile(BytesIO(found.data)) as image:
            return bytes(found.data) if max(image.size) >= LEAST_SIDE else b""
    except (rawpy.LibRawError, OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return b""


def _bmp(pixels: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "BMP")
    return buffer.getvalue()
