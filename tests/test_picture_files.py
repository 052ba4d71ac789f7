"""Where picture files end: whole ones are read whatever stands behind them, cut ones are refused whatever does."""

from __future__ import annotations

import random
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiffs import LONG, SHORT, tiff

from traceir import image_formats as image_files
from traceir.errors import ImageError
from traceir.image_formats import FORMATS, SUFFIXES, extent_of, open_image
from traceir.images import ImageInput


def scene(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(3).integers(0, 40, (height, width))
    return Image.fromarray(np.stack([x * 2 + noise, y * 3 + noise, (x + y) + noise], -1).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_thumbnail(**options: object) -> bytes:
    """A JPEG whose EXIF holds a whole small JPEG, as cameras write it."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encode(scene(16, 12), "JPEG")
    return encode(scene(), "JPEG", exif=exif, **options)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def scans_of(jpeg: bytes) -> list[int]:
    """Where the scans of the picture itself start, not those of its thumbnail."""
    behind = jpeg.index(b"\xff\xd9") if b"Exif" in jpeg else 0
    return [place for place in range(behind, len(jpeg)) if jpeg[place : place + 2] == b"\xff\xda"]


JPEGS = {
    "one scan": lambda: with_thumbnail(),
    "no subsampling": lambda: encode(scene(), "JPEG", subsampling=0, optimize=True),
    "grey": lambda: encode(scene().convert("L"), "JPEG"),
    "four inks": lambda: encode(scene().convert("CMYK"), "JPEG"),
    "restarts": lambda: encode(scene(), "JPEG", restart_marker_rows=1),
    "progressive": lambda: with_thumbnail(progressive=True),
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
def test_field_report_05_a_jpeg_with_bytes_behind_its_end_is_read(name: str) -> None:
    whole = JPEGS[name]()
    shown = Image.open(BytesIO(whole)).convert("RGB").tobytes()
    assert extent_of(whole).end == len(whole) and ImageInput.from_bytes(whole).load().tobytes() == shown
    for tail in BEHIND.values():
        assert extent_of(whole + tail).end == len(whole)
        assert ImageInput.from_bytes(whole + tail).load().tobytes() == shown


@pytest.mark.parametrize("name", JPEGS)
def test_field_report_05_a_cut_jpeg_is_refused_whatever_stands_behind_it(name: str) -> None:
    """But for the last blocks, and the last scan of a progressive file: junk could stand for these."""
    whole = JPEGS[name]()
    first, *_, last = [*scans_of(whole), len(whole) - 64]
    last = scans_of(whole)[-1] if name == "progressive" else last
    for size in random.Random(0).sample(range(first + 14, last), 40):
        for tail in BEHIND.values():
            with pytest.raises(ImageError, match="truncated"):
                ImageInput.from_bytes(whole[:size] + tail).load()
    for size in range(3, len(whole), 7):
        with pytest.raises(ImageError, match="truncated"):
            ImageInput.from_bytes(whole[:size]).load()


def test_field_report_05_a_progressive_jpeg_cut_between_its_scans_is_refused() -> None:
    whole = JPEGS["progressive"]()
    starts = scans_of(whole)
    assert len(starts) == extent_of(whole).scans > 5
    for start in starts[1:]:
        for end in (b"", b"\xff\xd9", b"\xff\xd9\xff\xd9 and more"):
            with pytest.raises(ImageError, match="truncated"):
                ImageInput.from_bytes(whole[:start] + end).load()


def test_field_report_05_filling_odd_segments_and_junk_between_segments_do_no_harm() -> None:
    whole = encode(scene(), "JPEG")
    shown = ImageInput.from_bytes(whole).load().tobytes()
    frame = whole.index(b"\xff\xc0")
    for odd in (
        b"\xff\xff\xff", b"\xff\xfe\0\2", b"\xff\xfe\0\0", segment(0xFE, b"\xff\xd9\xff\xda"), b"\0\0\0",
        segment(0xE5, b"\xff\xd8\xff" * 999 + b"\xff\xd9"), segment(0xDC, b"\0\x40"),
    ):  # fmt: skip
        data = whole[:frame] + odd + whole[frame:]
        assert extent_of(data).end == len(data)
        assert ImageInput.from_bytes(data).load().tobytes() == shown
    closed = whole[:-2] + b"\xff\xff\xff\xff\xd9"
    assert ImageInput.from_bytes(closed).load().tobytes() == shown
    for odd in (
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\xff\xff" + whole,
        b"\xff\xd8" + whole[frame:][:60] + b"\xff\xd9",
    ):
        with pytest.raises(ImageError, match="truncated"):
            ImageInput.from_bytes(odd).load()


def test_field_report_05_the_video_of_a_motion_photo_counts_as_no_scans() -> None:
    moving = encode(scene(), "JPEG") + VIDEO + b"\xff\xda" * 500
    assert moving.count(b"\xff\xda") > 500 and extent_of(moving).scans == 1
    assert ImageInput.from_bytes(moving).load().size == (96, 64)


def test_field_report_05_the_other_formats_end_where_their_structure_does() -> None:
    frames = {"save_all": True, "append_images": [scene(64, 96).resize((96, 64))]}
    wholes = [encode(scene(), format) for format in FORMATS if format != "JPEG"]
    wholes += [encode(scene(), format, **frames) for format in ("GIF", "PNG", "WEBP")]
    wholes += [encode(scene(), "WEBP", lossless=True), encode(scene(), "TIFF", compression="tiff_lzw")]
    for whole in wholes:
        shown = ImageInput.from_bytes(whole).load().tobytes()
        for tail in BEHIND.values():
            assert ImageInput.from_bytes(whole + tail).load().tobytes() == shown
        for size in range(4, len(whole), len(whole) // 60):
            with pytest.raises(ImageError):
                ImageInput.from_bytes(whole[:size]).load()
    for whole in wholes[:3]:  # PNG, WebP and GIF tell their end themselves
        for tail in (b";", b"IEND", b"\0\0\0\0IEND\xaeB`\x82", whole[-20:]):
            with pytest.raises(ImageError):
                ImageInput.from_bytes(whole[: len(whole) // 2] + tail).load()


def test_field_report_05_a_tiff_cut_within_compressed_pixels_is_refused() -> None:
    """Fax and JPEG decoders would fill up what is missing."""
    for image, way in ((scene().convert("1"), "group4"), (scene().convert("1"), "group3"), (scene(), "tiff_lzw")):
        packed = encode(image, "TIFF", compression=way)
        with open_image(packed) as header:
            told = header.tag_v2
        start, size = told[273][0], told[279][0]
        tags = {tag: (SHORT, tuple(np.atleast_1d(told[tag]).tolist())) for tag in (258, 259, 262, 277, 317) if tag in told}
        whole = tiff(96, 64, packed[start : start + size], tags=tags)
        assert ImageInput.from_bytes(whole).load().tobytes() == image.convert("RGB").tobytes()
        for lost in (1, 10, size // 2, size - 1):
            with pytest.raises(ImageError, match="truncated"):
                ImageInput.from_bytes(whole[:-lost]).load()


def test_field_report_05_a_file_of_nothing_but_segments_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PARTS", 100)
    jpeg, png = encode(scene(), "JPEG"), encode(scene(), "PNG")
    chunk = b"\0\0\0\0teXt\0\0\0\0"
    for count, read in ((50, True), (200, False)):
        for data in (jpeg[:2] + b"\xff\xfe\0\2" * count + jpeg[2:], png[:33] + chunk * count + png[33:]):
            assert (extent_of(data).end == len(data)) is read


def test_a_missing_end_is_refused_though_all_pixels_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name, make in JPEGS.items():
        with pytest.raises(ImageError, match="truncated"):
            ImageInput.from_bytes(make()[:-2], name).load()


def test_field_report_06_formats_names_and_types_are_one_table() -> None:
    page = (Path(image_files.__file__).parent / "serve/static/index.html").read_text()
    script = (Path(image_files.__file__).parent / "serve/static/composer.js").read_text()
    kinds = [one.media_type for one in FORMATS.values()]
    assert f'accept="{",".join(kinds)}"' in page and all(f'"{kind}": ' in script for kind in kinds)
    assert [Image.MIME[name] for name in FORMATS] == kinds
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    assert known - SUFFIXES == set() and all(one.suffixes[0] in SUFFIXES for one in FORMATS.values())


def test_field_report_17_a_tile_larger_than_its_image_is_refused_unread() -> None:
    tile = {322: (LONG, (16_384,)), 323: (LONG, (16_384,)), 324: (LONG, (8,)), 325: (LONG, (9,)), 258: (SHORT, (8,))}
    with pytest.raises(ImageError, match="decoded 16384 x 16384 pixels at a time, more than the limit of 64000000"):
        ImageInput.from_bytes(tiff(16, 16, bytes(256), packed=True, tags=tile)).load()
