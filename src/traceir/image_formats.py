"""What the bytes of an image file say before a pixel is decoded: its format and where it ends.

A file is whole where its own structure reaches its end; bytes behind that end (the video of a phone's motion photo, the second
image of a stereo camera) are no part of it. Formats are named as Pillow names them, but for MPO: that is a JPEG here.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from traceir.errors import ImageError
from traceir.media.file import package

MAX_SCANS: Final = 64
"""Scans of a JPEG; ten are usual. Each is a pass over all pixels, so a small file of thousands of them would take minutes."""
MAX_PARTS: Final = 50_000
"""Segments of a JPEG, chunks of a PNG; a few thousand are many. Pillow takes microseconds for each."""
JPEG_START: Final = b"\xff\xd8\xff"
# Appended to the file's last scan while it is decoded: 64 one bits, which are no Huffman code.
_NO_MORE: Final = b"\xff\x00" * 8
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""A marker that is neither a stuffed byte, a restart, nor the filling before another one."""
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_BEHIND_SCAN: Final = frozenset({0xC4, 0xCC, *range(0xD9, 0xDE), *range(0xE0, 0xF0), 0xFE})
"""What may stand behind a scan: tables, another scan, the number of lines, a comment, the end. All else is foreign."""


@dataclass(frozen=True, slots=True)
class Format:
    """The suffixes of one format, the first of them the one we write, and its media type."""

    suffixes: tuple[str, ...]
    media_type: str


FORMATS: Final = {
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "image/jpeg"),
    "PNG": Format((".png", ".apng"), "image/png"),
    "WEBP": Format((".webp",), "image/webp"),
    "GIF": Format((".gif",), "image/gif"),
    "BMP": Format((".bmp",), "image/bmp"),
    "TIFF": Format((".tif", ".tiff"), "image/tiff"),
    "HEIF": Format((".heic", ".heif", ".hif", ".heics", ".heifs"), "image/heic"),
    "AVIF": Format((".avif", ".avifs"), "image/avif"),
}
_OF_PILLOW: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_HEIF_BRANDS: Final = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
)
_BOXES: Final = frozenset((b"ftyp", b"meta", b"mdat", b"moov", b"free", b"skip", b"uuid", b"wide"))
SUFFIXES: Final = frozenset(suffix for known in FORMATS.values() for suffix in known.suffixes)


@dataclass(frozen=True, slots=True)
class Extent:
    """`end`: one past the image's last byte, None where that is missing. The rest is of a JPEG: its scans, and where the data
    of a single one ends, 0 where there are several or they are not Huffman-coded in sequence."""

    end: int | None
    scans: int = 1
    scan_end: int = 0


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The file's header, read by Pillow; `format` is one of FORMATS. Raises what Pillow raises."""
    if data.startswith(JPEG_START):
        # Not by Image.open, which makes another format of a JPEG that has a second one behind it.
        return JpegImagePlugin.JpegImageFile(BytesIO(data))
    if brands := _brands(data):
        return _open_boxed(data, brands)
    image = Image.open(BytesIO(data), formats=_OF_PILLOW)
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparent_sample(image, depth=data[24])
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _read_planes_whole(image)
    return image


def _brands(data: bytes) -> set[bytes]:
    """What an ISO media file (ISO/IEC 14496-12) is by its own words; nothing of a file of another kind."""
    end = int.from_bytes(data[:4], "big")
    return {data[8:12], *(data[start : start + 4] for start in range(16, min(end, 256), 4))} if data[4:8] == b"ftyp" else set()


def _open_boxed(data: bytes, brands: set[bytes]) -> ImageFile.ImageFile:
    """AVIF by Pillow, HEIC by pillow-heif, which turn 10 and 12 bits to 8; of a sequence, the primary image."""
    if not brands.isdisjoint((b"avif", b"avis")):
        try:
            from PIL import AvifImagePlugin
        except ImportError as error:
            raise ImageError("AVIF needs a newer Pillow; pip install -U 'pillow>=11.3'") from error
        return AvifImagePlugin.AvifImageFile(BytesIO(data))
    if brands.isdisjoint(_HEIF_BRANDS):
        raise UnidentifiedImageError(f"its brands are {', '.join(sorted(map(repr, brands)))}")
    plugin: Any = importlib.import_module("pillow_heif.as_plugin") if package("pillow_heif", "HEIC") else None
    image: ImageFile.ImageFile = plugin.HeifImageFile(BytesIO(data))
    return image


def _scale_transparent_sample(image: ImageFile.ImageFile, depth: int) -> None:
    """Scales a PNG's transparent grey or colour to 8 bits, as Pillow does with the samples (but 16-bit grey) and not with it."""
    clear, most = image.info["transparency"], 2**depth - 1
    if image.mode == "L":
        image.info["transparency"] = (clear & most) * 255 // most
    elif image.mode == "RGB":
        image.info["transparency"] = tuple((sample & most) >> (depth - 8) for sample in clear)


def _read_planes_whole(image: TiffImagePlugin.TiffImageFile) -> None:
    """Pillow reads uncompressed planes of 16-bit samples as planes of bytes."""
    order = "B" if image.tag_v2.prefix.startswith(b"MM") else "L"
    if image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))[0] == 16:
        for number, tile in enumerate(image.tile):
            if isinstance(tile.args, tuple) and len(tile.args[0]) == 1:
                image.tile[number] = tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """The header of a TIFF, an empty one of all else."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def largest_block(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height of the largest piece that is decoded at once: a TIFF's tiles may be larger than its image."""
    tile = tiff_tags(image).get(TiffImagePlugin.TILEWIDTH, 0), tiff_tags(image).get(TiffImagePlugin.TILELENGTH, 0)
    return max(image.size, tile, key=math.prod)


def is_cut(image: ImageFile.ImageFile, size: int) -> bool:
    """Whether a compressed strip or tile of a TIFF of `size` bytes ends behind the file, which some decoders accept silently."""
    tags = tiff_tags(image)
    starts = tags.get(TiffImagePlugin.STRIPOFFSETS) or tags.get(TiffImagePlugin.TILEOFFSETS) or ()
    lengths = tags.get(TiffImagePlugin.STRIPBYTECOUNTS) or tags.get(TiffImagePlugin.TILEBYTECOUNTS) or ()
    compressed = tags.get(TiffImagePlugin.COMPRESSION, 1) != 1
    return compressed and any(start + length > size for start, length in zip(starts, lengths, strict=False))


def extent_of(data: bytes) -> Extent:
    """Where the file's own structure ends. BMP and TIFF have no end of their own: `is_cut`, and their decoders, find the rest."""
    if data[4:8] == b"ftyp":
        return _walk_boxes(data)
    walk = next((walk for start, walk in _WALKS.items() if data.startswith(start)), None)
    if walk is not None:
        return walk(data)
    end = int.from_bytes(data[4:8], "little") + 8 if data.startswith(b"RIFF") else len(data)
    return Extent(end if end <= len(data) else None)


def decodable(data: bytes, extent: Extent) -> bytes:
    """The bytes to decode, so that an image with too little data is refused.

    At an end-of-image marker that comes too early, as in a file that was cut and closed again, libjpeg fills the rest with
    grey. Of a JPEG of one scan the data are therefore given without any marker behind them, where it asks for more in vain.
    """
    return data[: extent.scan_end] + _NO_MORE if extent.scan_end else data


def _walk_jpeg(data: bytes) -> Extent:
    """From marker to marker, as in ITU T.81, annex B. Between segments may stand zeros and filling, as some cameras leave them.

    Each component must have come to full precision in all its 64 coefficients: else scans of a progressive file are missing.
    """
    offset, frame, scans, scan_end, in_scan = 2, 0, 0, 0, False
    missing: dict[int, list[int]] = {}
    for _ in range(MAX_PARTS):
        marked = _MARKER.search(data, offset)
        if marked is None:
            break
        marker, skipped, offset = data[marked.end() - 1], data[offset : marked.start()], marked.end()
        if marker == _START or (scans and marker not in _BEHIND_SCAN) or (not in_scan and skipped.strip(b"\0\xff")):
            break
        if scans == 1 and not scan_end:
            scan_end = marked.start()
        in_scan = marker == _SCAN
        if marker == _END:
            whole = scans > 0 and not any(map(any, missing.values()))
            single = scans == 1 and frame in (0xC0, 0xC1)
            return Extent(offset if whole else None, scans, scan_end if single else 0)
        length = max(2, int.from_bytes(data[offset : offset + 2], "big"))
        body = data[offset + 2 : offset + length]
        offset += length
        if marker in _FRAMES:
            frame, missing = marker, {component: [1] * 64 for component in body[6::3]}
        elif in_scan:
            scans += 1
            _note_scan(body, missing, progressive=frame in _PROGRESSIVE)
    return Extent(None, scans)


def _note_scan(body: bytes, missing: dict[int, list[int]], *, progressive: bool) -> None:
    """Notes how many bits a scan leaves missing of its coefficients, for each of its components."""
    first, last, bits = body[-3:] if progressive and len(body) > 3 else (0, 63, 0)
    for component in body[1:-3:2]:
        if component in missing and first <= last <= 63:
            missing[component][first : last + 1] = [bits & 15] * (last + 1 - first)


def _walk_png(data: bytes) -> Extent:
    offset = 8
    for _ in range(MAX_PARTS):
        kind = data[offset + 4 : offset + 8]
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
        if offset > len(data):
            break
        if kind == b"IEND":
            return Extent(offset)
    return Extent(None)


def _walk_boxes(data: bytes) -> Extent:
    """From box to box. What phones append may be no box: after the one that describes the pictures, only known ones count."""
    offset, seen = 0, set()
    for _ in range(MAX_PARTS):
        size, kind = int.from_bytes(data[offset : offset + 4], "big"), data[offset + 4 : offset + 8]
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if kind not in _BOXES and b"meta" in seen:
            return Extent(offset)
        offset = len(data) if size == 0 and kind == b"mdat" else offset + size
        if size in range(1, 8) or offset > len(data) or (size == 0 and kind != b"mdat"):
            break
        seen.add(kind)
        if offset == len(data):
            return Extent(offset)
    return Extent(None)


def _walk_gif(data: bytes) -> Extent:
    """From block to block, zeros between them left out."""
    try:
        offset = 13 + _table_bytes(data[10])
        while (kind := data[offset]) != 0x3B:
            if kind == 0x2C:
                offset = _behind_blocks(data, offset + 11 + _table_bytes(data[offset + 9]))
            elif kind == 0x21:
                offset = _behind_blocks(data, offset + 2)
            elif kind == 0:
                offset += 1
            else:
                return Extent(None)
    except IndexError:
        return Extent(None)
    return Extent(offset + 1)


def _table_bytes(flags: int) -> int:
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, offset: int) -> int:
    while size := data[offset]:
        offset += 1 + size
    return offset + 1


_WALKS: Final[dict[bytes, Callable[[bytes], Extent]]] = {
    JPEG_START: _walk_jpeg,
    b"\x89PNG\r\n\x1a\n": _walk_png,
    b"GIF8": _walk_gif,
}
