"""Pictures read with care: checked before they are decoded, always handed out as upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from traceir.errors import PictureError

MAX_PIXELS: Final = 64_000_000
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_ASPECT_RATIO: Final = 200.0
"""Qwen's smart resize refuses pictures whose longer side is more than 200 times the shorter one."""
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIX_OF: Final = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+:/|data:)")
_ORIENTATION_TAG = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged input; OSError includes UnidentifiedImageError.
_DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    NotImplementedError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What a picture may be at most; checked from the file's size and header, before any pixel is decoded."""

    pixels: int = MAX_PIXELS
    file_bytes: int = MAX_FILE_BYTES
    aspect_ratio: float = MAX_ASPECT_RATIO


DEFAULT_LIMITS: Final = PictureLimits()


class Picture:
    """One picture: a file that is read when needed, encoded bytes, or pixels.

    Equal content makes equal pictures. Thread-safe: every `load` decodes afresh and returns an image of its own.
    A file that changes between two reads is an error, so that a hash and the pixels it stands for never disagree.
    """

    __slots__ = ("_data", "_image", "_lock", "_name", "_path", "_sha256")

    def __init__(
        self, *, path: Path | None = None, data: bytes | None = None, image: Image.Image | None = None, name: str = ""
    ) -> None:
        if sum(source is not None for source in (path, data, image)) != 1:
            raise PictureError(f"picture {name!r} needs exactly one source; use Picture.open, from_bytes or from_image")
        self._path = path
        self._data = data
        self._image = image
        self._name = name
        self._sha256: str | None = None
        self._lock = Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Picture:
        """A picture in a file, which is not touched before `sha256` or `load`. Network addresses are refused."""
        text = os.fspath(path)
        if _ADDRESS.match(text):
            raise PictureError(f"picture {text[:200]!r} is an address, not a file; save it first and give its path")
        if not text or "\0" in text or not _is_file_name(text):
            raise PictureError(f"picture path {text!r} is not a file name; give the path of a picture file")
        return cls(path=Path(text), name=Path(text).name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "") -> Picture:
        """A picture from the bytes of a file (JPEG, PNG, WebP, GIF, BMP or TIFF); checked at `load`."""
        return cls(data=bytes(data), name=name)

    @classmethod
    def from_image(cls, image: Image.Image, name: str = "") -> Picture:
        """A picture from pixels, which are copied and made RGB now. Raises PictureError beyond the default limits."""
        label = _label(None, name)
        _check_size(image.size, label, DEFAULT_LIMITS)
        try:
            return cls(image=_as_rgb(image).copy(), name=name)
        except _DECODER_ERRORS as error:
            raise PictureError(f"{label} cannot be read: {error}; give an image that Pillow can load") from error

    @property
    def name(self) -> str:
        return self._name

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file's bytes; of size and RGB pixels for a picture made by `from_image`."""
        with self._lock:
            known = self._sha256
        if known is not None:
            return known
        if self._image is not None:
            return self._remember(_hash_pixels(self._image))
        return self._remember(hashlib.sha256(self._read(DEFAULT_LIMITS)).hexdigest())

    def encoded(self, limits: PictureLimits = DEFAULT_LIMITS) -> tuple[bytes, str]:
        """The bytes of the picture's file as they are, and the suffix of their format (".jpg"); PNG for one made by `from_image`.

        Raises PictureError where the picture is missing, of no known format, or beyond `limits.file_bytes`.
        """
        if self._image is not None:
            buffer = BytesIO()
            self._image.save(buffer, "PNG")
            return buffer.getvalue(), ".png"
        data = self._read(limits)
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return data, SUFFIX_OF[str(image.format)]
        except _DECODER_ERRORS as error:
            raise PictureError(f"{_label(self._path, self._name)} cannot be read: {error}; save it anew") from error

    def load(self, shrink_to: int | None = None, limits: PictureLimits = DEFAULT_LIMITS) -> Image.Image:
        """The upright picture as 8-bit RGB, transparency composited on white, the first frame of an animation.

        `shrink_to` lets a large JPEG be decoded at 1/2, 1/4 or 1/8 of its size while its short side stays at least
        that many pixels. Raises PictureError where the picture is missing, damaged, or beyond `limits`.
        """
        if shrink_to is not None and shrink_to < 1:
            raise PictureError(f"shrink_to is {shrink_to}; give a number of pixels of at least 1")
        label = _label(self._path, self._name)
        if self._image is not None:
            _check_size(self._image.size, label, limits)
            return self._image.copy()
        data = self._read(limits)
        self._remember(hashlib.sha256(data).hexdigest())
        return _decode(data, label, shrink_to, limits)

    def _read(self, limits: PictureLimits) -> bytes:
        label = _label(self._path, self._name)
        data = self._data if self._data is not None else _read_file(self._path, label, limits.file_bytes)
        if not data:
            raise PictureError(f"{label} is empty (0 bytes); replace or remove it")
        if len(data) > limits.file_bytes:
            raise PictureError(_too_many_bytes(label, len(data), limits.file_bytes))
        return data

    def _remember(self, sha256: str) -> str:
        with self._lock:
            if self._sha256 is None:
                self._sha256 = sha256
            known = self._sha256
        if known != sha256:
            label = _label(self._path, self._name)
            raise PictureError(f"{label} changed while in use; open it again once nothing writes it any more")
        return known

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Picture) and self.sha256 == other.sha256)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Picture({str(self._path or self._name or 'in memory')!r})"


def _is_file_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _label(path: Path | None, name: str) -> str:
    return f"picture {path}" if path is not None else f"picture {name}" if name else "picture (in memory)"


def _too_many_bytes(label: str, size: int, limit: int) -> str:
    return f"{label} has {size} bytes, more than the limit of {limit}; shrink it or raise PictureLimits.file_bytes"


def _read_file(path: Path | None, label: str, limit: int) -> bytes:
    assert path is not None
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(f"{label} is not a regular file; give the path of a picture file")
        if status.st_size > limit:
            raise PictureError(_too_many_bytes(label, status.st_size, limit))
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError as error:
        raise PictureError(f"{label} does not exist; check the path") from error
    except OSError as error:
        raise PictureError(f"{label} cannot be read: {error.strerror or error}; check the path and rights") from error


def _decode(data: bytes, label: str, shrink_to: int | None, limits: PictureLimits) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, label, limits)
            _check_complete(data, image.format or "", label)
            if shrink_to is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, (shrink_to, shrink_to))
            image.load()
            _check_size(image.size, label, limits)
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _as_rgb(image)
            return rgb.transpose(turn) if turn is not None else rgb
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise PictureError(f"{label} is not a picture TraceIR reads ({known}); convert or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{label} is too large to decode safely: {error}; shrink it") from error
    except _DECODER_ERRORS as error:
        raise PictureError(f"{label} is damaged or truncated: {error}; replace or remove it") from error


def _check_size(size: tuple[int, int], label: str, limits: PictureLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PictureError(f"{label} is {width} x {height} pixels; it needs at least one pixel")
    if width * height > limits.pixels:
        raise PictureError(
            f"{label} is {width} x {height} pixels, more than the limit of {limits.pixels}; "
            "shrink it or raise PictureLimits.pixels"
        )
    ratio = max(width, height) / min(width, height)
    if ratio > limits.aspect_ratio:
        raise PictureError(
            f"{label} is {width} x {height} pixels, an aspect ratio of {ratio:.0f}, more than {limits.aspect_ratio:g}; "
            "crop or pad it"
        )


def _check_complete(data: bytes, format_name: str, label: str) -> None:
    """Refuse files whose end is missing, which decoders would fill with grey or accept without a word."""
    if format_name in ("JPEG", "MPO"):
        complete = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    elif format_name == "PNG":
        complete = b"IEND" in data[-4096:] or data.rfind(b"IEND") > data.rfind(b"IDAT")
    elif format_name == "WEBP":
        complete = len(data) >= int.from_bytes(data[4:8], "little") + 8
    elif format_name == "GIF":
        complete = data.rstrip(b"\0").endswith(b";")
    else:
        complete = True
    if not complete:
        raise PictureError(f"{label} is truncated: the end of the {format_name} file is missing; replace or remove it")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1  # unreadable EXIF says nothing about rotation; the pixels are still good
    return value if isinstance(value, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey divided by 257; 32-bit integers and floats, whose range no header states, stretched min to max."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        values = values / 257.0
    else:
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (255.0 / (high - low)) if high > low else np.clip(values, 0.0, 255.0)
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _hash_pixels(image: Image.Image) -> str:
    digest = hashlib.sha256(f"RGB {image.width} {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
