"""Images read with care: checked before they are decoded, always handed out as upright 8-bit RGB."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import math
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Final

from PIL import Image, ImageFile, UnidentifiedImageError

from traceir.errors import ImageError
from traceir.image_formats import FORMATS, MAX_SCANS, Format, decodable, extent_of, is_cut, largest_block, open_image
from traceir.image_formats import SUFFIXES as PLAIN_SUFFIXES
from traceir.image_modes import as_rgb, is_deep
from traceir.media.metadata import Fields, image_fields, raw_fields
from traceir.media.part import PDF_SUFFIXES, FilePart, part_of
from traceir.media.raw import MAX_FILE_BYTES as MAX_RAW_BYTES
from traceir.media.raw import SUFFIXES as RAW_SUFFIXES
from traceir.media.raw import preview
from traceir.media.video import SUFFIXES as VIDEO_SUFFIXES

SUFFIXES: Final = PLAIN_SUFFIXES | RAW_SUFFIXES
MAX_PIXELS: Final = 64_000_000
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_ASPECT_RATIO: Final = 200.0
"""Qwen's smart resize refuses images whose longer side is more than 200 times the shorter one."""

MAX_DECODING_BYTES: Final = 512 * 1024 * 1024
"""Memory that all decoding in a process may take at a time, estimated from the headers; further images wait."""

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
_TOO_LARGE: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_DECODER_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError),
    *(AttributeError, RuntimeError, struct.error, zlib.error, *_TOO_LARGE),
)
"""What Pillow's decoders raise on damaged input; OSError includes UnidentifiedImageError."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be at most, by its file's size and header. A quarter of `pixels` holds for samples of 32 bits and TIFF
    files of more than 32 bits a pixel."""

    pixels: int = MAX_PIXELS
    file_bytes: int = MAX_FILE_BYTES
    aspect_ratio: float = MAX_ASPECT_RATIO


DEFAULT_LIMITS: Final = ImageLimits()


class _Memory:
    """Bytes that decoding may hold at a time in this process; a caller that needs more than are left waits. Thread-safe."""

    def __init__(self, whole: int) -> None:
        self._whole = self._left = whole
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def taking(self, wanted: int) -> Iterator[None]:
        """Holds `wanted` bytes within the block, or all where it is more than there are."""
        taken = min(wanted, self._whole)
        with self._freed:
            self._freed.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            if taken >= _WORTH_TRIMMING:  # glibc keeps freed memory for each thread that ever decoded; this gives it back
                with contextlib.suppress(AttributeError, OSError, TypeError):
                    ctypes.CDLL(None).malloc_trim(0)
            with self._freed:
                self._left += taken
                self._freed.notify_all()


_WORTH_TRIMMING: Final = 64 * 1024 * 1024
_BYTES_OF_PIXEL: Final = {"JPEG": 12, "PNG": 8, "WEBP": 16, "GIF": 8, "BMP": 8, "TIFF": 16, "HEIF": 16, "AVIF": 16}
"""What decoding takes for each pixel at most, the result included, as measured."""
_MEMORY: Final = _Memory(MAX_DECODING_BYTES)


class ImageInput:
    """One image: a file that is read when needed, encoded bytes, or pixels. Its `path` is None unless it is a file.

    A page of a document and a frame of a video are images, too: `paper.pdf#page=3`, `clip.mp4#t=12.5` (seconds).
    Equal content makes equal images. Thread-safe: every `load` decodes afresh and returns pixels of its own.
    A file that changes between two reads is an error, so that a hash and the pixels it stands for never disagree.
    """

    __slots__ = ("_data", "_image", "_lock", "_part", "_sha256", "name", "path")

    def __init__(
        self, *, path: Path | None = None, data: bytes | None = None, image: Image.Image | None = None, name: str = ""
    ) -> None:
        if sum(source is not None for source in (path, data, image)) != 1:
            raise ImageError(f"image {name!r} needs exactly one source; use ImageInput.open, from_bytes or from_pil")
        self.path, self.name = path, name
        self._part = None if path is None else part_of(path)
        self._data, self._image = data, image
        self._sha256: str | None = None
        self._lock = Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ImageInput:
        """An image in a file, which is not touched before `sha256` or `load`. Network addresses are refused."""
        text = os.fspath(path)
        if _ADDRESS.match(text):
            raise ImageError(f"image {text[:200]!r} is an address, not a file; save it first and give its path")
        try:
            usable = text != "" and b"\0" not in os.fsencode(text)
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise ImageError(f"image path {text!r} is not a file name; give the path of an image file")
        return cls(path=Path(text), name=Path(text).name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "") -> ImageInput:
        """An image from the bytes of a file (of one of FORMATS); checked at `load`."""
        return cls(data=bytes(data), name=name)

    @classmethod
    def from_pil(cls, image: Image.Image, name: str = "") -> ImageInput:
        """An image from pixels, which are copied and made RGB now. Raises ImageError beyond the default limits."""
        made = cls(image=image, name=name)
        _check_size(image.size, made._label, DEFAULT_LIMITS)
        with made._readable("give an image that Pillow can load"):
            image.load()
            rgb = as_rgb(image)
            made._image = rgb.copy() if rgb is image else rgb
        return made

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the file's bytes; of size and RGB pixels for an image made by `from_pil`; of that of its file and its
        name within it for a page or frame, nothing of which is drawn."""
        if self._sha256 is not None:
            return self._sha256
        if self._part is not None:
            return self._remember(self._part.key)
        if self._image is not None:
            size = f"RGB {self._image.width} {self._image.height}\n"
            return self._remember(size.encode(), self._image.tobytes())
        return self._remember(self._read(DEFAULT_LIMITS))

    def encoded(self, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[bytes, Format]:
        """The bytes of the file as they are, and their format; PNG for an image made by `from_pil`, JPEG for a page or frame, the
        preview of a raw photograph. Raises ImageError."""
        if self._image is not None:
            return file_bytes(self._image, "PNG"), FORMATS["PNG"]
        if self._part is not None:
            return file_bytes(self.load(limits=limits), quality=95), FORMATS["JPEG"]
        data = self._picture(limits)
        with self._readable(), open_image(data) as image:
            return data, FORMATS[str(image.format)]

    def moved_to(self, path: Path) -> ImageInput:
        """The same image in a file that was written from it; its hash is not computed again."""
        moved = ImageInput.open(path)
        moved._sha256 = self.sha256
        return moved

    def size(self, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
        """Width and height in pixels as the header says, nothing decoded; ImageError where there is none."""
        if self._image is not None:
            return self._image.size
        if self._part is not None:
            return self._part.size()
        with self._readable(), open_image(self._picture(limits)) as image:
            return image.size

    def check(self, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        """Raises what `load` would raise and can be known without decoding a pixel: format, size, truncation, limits."""
        if self._image is not None:
            _check_size(self._image.size, self._label, limits)
        elif self._part is not None:
            _check_size(self._part.size(), self._label, limits)
        else:
            with _opened(self._picture(limits), self._label, limits):
                pass

    def load(self, shrink_to: int | None = None, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
        """The upright image as 8-bit RGB, transparency composited on white, the first frame of an animation.

        `shrink_to` lets a large JPEG be decoded at 1/2, 1/4 or 1/8 of its size while its short side stays at least
        that many pixels. Raises ImageError where the image is missing, damaged, or beyond `limits`.
        """
        if shrink_to is not None and shrink_to < 1:
            raise ImageError(f"shrink_to is {shrink_to}; give a number of pixels of at least 1")
        if self._image is not None:
            _check_size(self._image.size, self._label, limits)
            return self._image.copy()
        if self._part is not None:
            if self._sha256 is not None:
                self._remember(self._part.key)
            return self._drawn(self._part, shrink_to, limits)
        data = self._picture(limits, hashed=True)
        with _opened(data, self._label, limits) as (image, block):
            if shrink_to is not None and image.format == "JPEG":
                image.draft(None, (shrink_to, shrink_to))
            with _MEMORY.taking(block * _BYTES_OF_PIXEL[str(image.format)]):
                image.load()
                _check_size(image.size, self._label, limits)
                return _upright(image)

    def metadata(self) -> Fields:
        """`date`, `camera`, `latitude`, `longitude`, `place`, `width` and `height` as far as the file's header says them.

        Raises ImageError for a file that cannot be read at all.
        """
        if self._image is not None or self._part is not None:
            return {}
        data = self._read(DEFAULT_LIMITS, hashed=True)
        with contextlib.suppress(*_DECODER_ERRORS), open_image(self._of_raw(data, DEFAULT_LIMITS)) as image:
            return {**image_fields(image), **(raw_fields(data) if self._is_raw else {})}
        return {}

    def _drawn(self, part: FilePart, shrink_to: int | None, limits: ImageLimits) -> Image.Image:
        size = part.size()
        _check_size(size, self._label, limits)
        with _MEMORY.taking(math.prod(size) * _BYTES_OF_PIXEL["WEBP"]):
            image = part.draw(shrink_to, limits.pixels)
        _check_size(image.size, self._label, limits)
        return image

    @property
    def _label(self) -> str:
        return f"image {self.path or self.name or '(in memory)'}"

    @contextlib.contextmanager
    def _readable(self, remedy: str = "save it anew") -> Iterator[None]:
        """Turns what Pillow raises on headers into an ImageError."""
        try:
            yield
        except ImageError:
            raise
        except _DECODER_ERRORS as error:
            raise ImageError(f"{self._label} cannot be read: {error}; {remedy}") from error

    @property
    def _is_raw(self) -> bool:
        return self.path is not None and self.path.suffix.lower() in RAW_SUFFIXES

    def _picture(self, limits: ImageLimits, *, hashed: bool = False) -> bytes:
        """The bytes that Pillow reads."""
        return self._of_raw(self._read(limits, hashed=hashed), limits)

    def _of_raw(self, data: bytes, limits: ImageLimits) -> bytes:
        return preview(data, self._label, limits.pixels) if self._is_raw else data

    def _read(self, limits: ImageLimits, *, hashed: bool = False) -> bytes:
        """The bytes of the file; the image's hash is remembered of them, too, where asked."""
        most, data = MAX_RAW_BYTES if self._is_raw else limits.file_bytes, self._data or b""
        size = len(data)
        if self.path is not None:
            size, data = self._read_file(self.path, most)
        if size > most:
            raise ImageError(
                f"{self._label} has {size} bytes, more than the limit of {most}; shrink it or raise ImageLimits.file_bytes"
            )
        if not data:
            raise ImageError(f"{self._label} is empty (0 bytes); replace or remove it")
        if hashed and self._data is None:
            self._remember(data)
        return data

    def _read_file(self, path: Path, most: int) -> tuple[int, bytes]:
        """Size and bytes of the file, which is not read where it has more than `most`."""
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{self._label} is not a regular file; give the path of an image file")
            if status.st_size > most:
                return status.st_size, b""
            with path.open("rb") as file:
                data = file.read(most + 1)
            return len(data), data
        except FileNotFoundError as error:
            raise ImageError(f"{self._label} does not exist; check the path") from error
        except OSError as error:
            raise ImageError(f"{self._label} cannot be read: {error.strerror or error}; check the path and rights") from error

    def _remember(self, *data: bytes) -> str:
        """The SHA-256 of the data, which an image has once and for all."""
        digest = hashlib.sha256()
        for part in data:
            digest.update(part)
        with self._lock:
            self._sha256 = self._sha256 or digest.hexdigest()
        if self._sha256 != digest.hexdigest():
            raise ImageError(f"{self._label} changed while in use; open it again once nothing writes it any more")
        return self._sha256

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ImageInput) and self.sha256 == other.sha256)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"ImageInput({str(self.path or self.name or 'in memory')!r})"


@contextlib.contextmanager
def _opened(data: bytes, label: str, limits: ImageLimits) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """The image, its header checked, and the pixels of the largest piece decoded at once; decoders' errors become ImageErrors."""
    try:
        extent = extent_of(data)
        if extent.scans > MAX_SCANS:
            raise ImageError(f"{label} is a JPEG of more than {MAX_SCANS} scans; save it anew")
        if extent.end is None:
            raise ImageError(f"{label} is truncated: the end of the file is missing; replace or remove it")
        with open_image(decodable(data, extent)) as image:
            yield image, _check_header(image, len(data), label, limits)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith((b"II*\0", b"MM\0*")):
            raise ImageError(f"{label} is no TIFF of samples TraceIR reads; save it with 8 or 16 bits a sample") from error
        known = ", ".join(FORMATS)
        if label.lower().endswith((*PDF_SUFFIXES, *VIDEO_SUFFIXES)):
            raise ImageError(
                f"{label} is no image itself; name a page or second of it: FILE.pdf#page=1, FILE.mp4#t=12.5"
            ) from error
        raise ImageError(f"{label} is not an image TraceIR reads ({known}); convert or remove it") from error
    except _TOO_LARGE as error:
        raise ImageError(f"{label} is too large to decode safely: {error}; shrink it") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{label} is damaged or truncated: {error}; replace or remove it") from error


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    transpose = None
    with contextlib.suppress(*_DECODER_ERRORS):  # unreadable EXIF says nothing about rotation; the pixels are still good
        transpose = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    rgb = as_rgb(image)
    if rgb is image:
        return image.copy() if transpose is None else image.transpose(transpose)
    image.close()  # its pixels are not kept beside both those of the result and those being turned
    return rgb if transpose is None else rgb.transpose(transpose)


def _check_header(image: ImageFile.ImageFile, size: int, label: str, limits: ImageLimits) -> int:
    """Pixels of the largest piece that is decoded at once."""
    _check_size(image.size, label, limits)
    width, height = largest_block(image)
    kind, most = ("of 32-bit samples or more than 32 bits each, ", limits.pixels // 4) if is_deep(image) else ("", limits.pixels)
    if width * height > most:
        why = f"{kind}more than the limit of {most}; save it with 8 bits a sample, shrink it or raise ImageLimits.pixels"
        raise ImageError(f"{label} is decoded {width} x {height} pixels at a time, {why}")
    if is_cut(image, size):
        raise ImageError(f"{label} is truncated: the file ends within its pixels; replace or remove it")
    return width * height


def _check_size(size: tuple[int, int], label: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{label} is {width} x {height} pixels; it needs at least one pixel")
    if width * height > limits.pixels:
        why = f"more than the limit of {limits.pixels}; shrink it or raise ImageLimits.pixels"
        raise ImageError(f"{label} is {width} x {height} pixels, {why}")
    ratio = max(width, height) / min(width, height)
    if ratio > limits.aspect_ratio:
        why = f"an aspect ratio of {ratio:.0f}, more than {limits.aspect_ratio:g}; crop or pad it"
        raise ImageError(f"{label} is {width} x {height} pixels, {why}")


def file_bytes(image: Image.Image, format: str = "JPEG", *, side: int = 0, **options: Any) -> bytes:
    """Pixels as the bytes of a file, JPEG at quality 88 where `options` say no other; `side`: the longer one at most (0: any)."""
    if side and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = BytesIO()
    image.save(buffer, format, **({"quality": 88} | options if format == "JPEG" else options))
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/jpeg") -> str:
    """The bytes of a file as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
