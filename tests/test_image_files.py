"""Where image files end: whole ones are read whatever stands behind them, cut ones are refused whatever does."""

from __future__ import annotations

import random
import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiffs import SHORT, encode, tiff

from traceir import image_formats
from traceir.errors import ImageError
from traceir.image_formats import FORMATS, SUFFIXES, extent_of, open_image
from traceir.images import ImageInput


def scene(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(3).integers(0, 40, (height, width))
    return Image.fromarray(np.stack([x * 2 + noise, y * 3 + noise, (x + y) + noise], -1).astype(np.uint8))


def pixels(data: bytes) -> bytes:
    return ImageInput.from_bytes(data).load().tobytes()


def refused(data: bytes, why: str = "truncated") -> None:
    with pytest.raises(ImageError, match=why):
        ImageInput.from_bytes(data, "cut").load()


def with_thumbnail(**options: object) -> bytes:
    """A JPEG whose EXIF holds a whole small JPEG, as cameras write it."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(scene(16, 12), "JPEG")
    return encode(scene(), "JPEG", exif=exif, **options)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def scans_of(jpeg: bytes) -> list[int]:
    """Where the scans of the image itself start, not those of its thumbnail."""
    behind = jpeg.index(b"\xff\xd9") if b"Exif" in jpeg else 0
    return [offset for offset in range(behind, len(jpeg)) if jpeg[offset : offset + 2] == b"\xff\xda"]


JPEGS = {
    "one scan": with_thumbnail(),
    "no subsampling": encode(scene(), "JPEG", subsampling=0, optimize=True),
    "grey": encode(scene().convert("L"), "JPEG"),
    "four inks": encode(scene().convert("CMYK"), "JPEG"),
    "restarts": encode(scene(), "JPEG", restart_marker_rows=1),
    "progressive": with_thumbnail(progressive=True),
}
VIDEO = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + random.Random(5).randbytes(300_000)
BEHIND = {
    "start of a scan": b"\xff\xda",
    "zeros": bytes(5000),
    "video": VIDEO,
    "half another": encode(scene(40, 40), "JPEG")[:500],
    "another": encode(scene(40, 40), "JPEG"),
    "trailer": b"\0\0\x01\x0a\x08\0\0\0MotionPhoto_Data\xff\xd9SEFH\0\0SEFT",
    "an end": b"junk\xff\xd9",
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_ends_where_its_structure_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut one is refused, but for the last blocks, and the last scan of a progressive file: junk could stand for these."""
    whole = JPEGS[name]
    shown = Image.open(BytesIO(whole)).convert("RGB").tobytes()
    for tail in (b"", *BEHIND.values()):
        assert extent_of(whole + tail).end == len(whole) and pixels(whole + tail) == shown
    first, *_, last = [*scans_of(whole), len(whole) - 64]
    last = scans_of(whole)[-1] if name == "progressive" else last
    for size in random.Random(0).sample(range(first + 14, last), 12):
        for tail in BEHIND.values():
            refused(whole[:size] + tail)
    for size in range(3, len(whole), 23):
        refused(whole[:size])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    refused(whole[:-2])


def test_a_progressive_jpeg_cut_between_its_scans_is_refused() -> None:
    whole = JPEGS["progressive"]
    starts = scans_of(whole)
    assert len(starts) == extent_of(whole).scans > 5
    for start in starts[1:]:
        for end in (b"", b"\xff\xd9", b"\xff\xd9\xff\xd9 and more"):
            refused(whole[:start] + end)


def test_filling_and_odd_segments_do_no_harm_and_a_video_counts_as_no_scans() -> None:
    whole = encode(scene(), "JPEG")
    frame = whole.index(b"\xff\xc0")
    odd_segments = [
        *(b"\xff\xff\xff", b"\xff\xfe\0\2", b"\xff\xfe\0\0", b"\0\0\0"),
        *(segment(0xFE, b"\xff\xd9\xff\xda"), segment(0xE5, b"\xff\xd8\xff" * 999 + b"\xff\xd9"), segment(0xDC, b"\0\x40")),
    ]
    for odd in odd_segments:
        data = whole[:frame] + odd + whole[frame:]
        assert extent_of(data).end == len(data) and pixels(data) == pixels(whole)
    assert pixels(whole[:-2] + b"\xff\xff\xff\xff\xd9") == pixels(whole)
    for odd in (b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\xff\xff" + whole,
                b"\xff\xd8" + whole[frame:][:60] + b"\xff\xd9"):  # fmt: skip
        refused(odd)
    moving = whole + VIDEO + b"\xff\xda" * 500
    assert extent_of(moving).scans == 1 and pixels(moving) == pixels(whole)


def test_the_other_formats_end_where_their_structure_does() -> None:
    frames = {"save_all": True, "append_images": [scene(64, 96).resize((96, 64))]}
    wholes = [encode(scene(), format) for format in FORMATS if format != "JPEG"]
    wholes += [encode(scene(), format, **frames) for format in ("GIF", "PNG", "WEBP")]
    wholes += [encode(scene(), "WEBP", lossless=True), encode(scene(), "TIFF", compression="tiff_lzw")]
    for whole in wholes:
        for tail in BEHIND.values():
            assert pixels(whole + tail) == pixels(whole)
        for size in range(4, len(whole), len(whole) // 30):
            refused(whole[:size], "cut")
    for whole in wholes[:3]:  # PNG, WebP and GIF tell their end themselves
        for tail in (b";", b"IEND", b"\0\0\0\0IEND\xaeB`\x82", whole[-20:]):
            refused(whole[: len(whole) // 2] + tail, "cut")


def test_a_tiff_cut_within_compressed_pixels_is_refused() -> None:
    """Fax and JPEG decoders would fill up what is missing."""
    for image, way in ((scene().convert("1"), "group4"), (scene().convert("1"), "group3"), (scene(), "tiff_lzw")):
        packed = encode(image, "TIFF", compression=way)
        with open_image(packed) as opened:
            header = opened.tag_v2
        start, size = header[273][0], header[279][0]
        tags = {tag: (SHORT, tuple(np.atleast_1d(header[tag]).tolist())) for tag in (258, 259, 262, 277, 317) if tag in header}
        whole = tiff(96, 64, packed[start : start + size], tags=tags)
        assert pixels(whole) == image.convert("RGB").tobytes()
        for lost in (1, 10, size // 2, size - 1):
            refused(whole[:-lost])


def test_a_file_of_nothing_but_segments_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_formats, "MAX_PARTS", 100)
    jpeg, png = encode(scene(), "JPEG"), encode(scene(), "PNG")
    for count, read in ((50, True), (200, False)):
        for data in (jpeg[:2] + b"\xff\xfe\0\2" * count + jpeg[2:], png[:33] + b"\0\0\0\0teXt\0\0\0\0" * count + png[33:]):
            assert (extent_of(data).end == len(data)) is read


def test_every_suffix_of_a_format_is_read() -> None:
    assert {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")} <= SUFFIXES
