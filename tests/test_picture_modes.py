"""Every mode as its header says: range, polarity and transparency, against files written by hand from the specifications."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiffs import FLOAT, SHORT, float_tiff, grey_tiff, tiff

from traceir.errors import ImageError
from traceir.image_modes import as_rgb
from traceir.images import ImageInput

WIDTH, HEIGHT = 50, 40
RAMP = np.linspace(0.0, 1.0, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
"""Black to white, row by row."""
WANTED = 255.0 * RAMP


def shown(data: bytes) -> np.ndarray:
    return np.asarray(ImageInput.from_bytes(data).load(), dtype=float)


def off(data: bytes, wanted: np.ndarray) -> float:
    """How far the picture is from the levels at most, in steps of 255."""
    return float(np.abs(shown(data) - (wanted if wanted.ndim == 3 else wanted[..., None])).max())


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of any number of bits, most significant first, each row filled up to a byte."""
    shifts = np.arange(bits - 1, -1, -1)
    planes = (values[..., None].astype(int) >> shifts & 1).astype(np.uint8).reshape(values.shape[0], -1)
    return np.packbits(planes, axis=1).tobytes()


def png(depth: int, colour: int, rows: bytes, width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    row = len(rows) // height
    lines = b"".join(b"\0" + rows[start : start + row] for start in range(0, len(rows), row))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    told = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_field_report_07_grey_tiff_of_every_depth_spans_black_to_white(bits: int, packed: bool) -> None:
    levels = np.rint(RAMP * (2**bits - 1))
    pixels = levels.astype("<u2").tobytes() if bits == 16 else packed_bits(levels, bits)
    for photometric in (1, 0):
        if (bits, photometric) == (12, 0):
            continue  # none that Pillow reads
        tags = {258: (SHORT, (bits,)), 262: (SHORT, (photometric,))}
        wanted = np.rint(levels * 255 / (2**bits - 1))
        assert off(tiff(WIDTH, HEIGHT, pixels, packed=packed, tags=tags), wanted if photometric else 255 - wanted) <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "order"), [(kind, order) for kind in ("i1", "i2", "i4", "f4") for order in "<>"] + [("u4", "<")]
)
def test_field_report_07_signed_long_and_float_samples_in_either_byte_order(kind: str, order: str, packed: bool) -> None:
    lowest, highest = (-3.0, 700.0) if kind == "f4" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = lowest + RAMP * (float(highest) - float(lowest))
    assert off(grey_tiff(values, kind, order=order, packed=packed), WANTED) <= 1
    if kind == "f4":
        assert off(grey_tiff(values, kind, order=order, packed=packed, photometric=0), 255 - WANTED) <= 1
    if kind != "i1":
        assert off(grey_tiff(np.rint(WANTED), kind, order=order, packed=packed), np.rint(WANTED)) == 0


def test_field_report_07_floats_of_0_to_1_and_of_0_to_255_keep_their_range() -> None:
    half = np.full((HEIGHT, WIDTH), 0.5)
    assert off(grey_tiff(half, "f4"), 255 * half) <= 0.5
    assert off(grey_tiff(0.25 + RAMP / 2, "f4"), 255 * (0.25 + RAMP / 2)) <= 0.5
    assert off(grey_tiff(100 + RAMP, "f4"), 100 + RAMP) <= 0.5
    assert off(grey_tiff(RAMP * 1e30, "f4"), WANTED) <= 0.5
    stated = {"t340": (FLOAT, (-1.0,)), "t341": (FLOAT, (3.0,))}
    assert off(grey_tiff(RAMP, "f4", **stated), 255 * (RAMP + 1) / 4) <= 0.5
    assert off(grey_tiff(RAMP, "f4", photometric=0, **stated), 255 - 255 * (RAMP + 1) / 4) <= 0.5
    assert off(grey_tiff(RAMP, "f4", t340=(FLOAT, (3.0,)), t341=(FLOAT, (float("nan"),))), WANTED) <= 0.5
    assert off(grey_tiff(RAMP * 4095, "u2", t280=(SHORT, (0,)), t281=(SHORT, (4095,))), 255 * RAMP * 4095 / 65535) <= 1
    odd = RAMP * 1000
    odd[0, :3] = np.nan, np.inf, -np.inf
    levels = shown(grey_tiff(odd, "f4"))[..., 0]
    assert levels[0, :3].tolist() == [0, 255, 0] and np.abs(levels - WANTED)[1:].max() <= 1
    assert off(grey_tiff(np.full((4, 4), np.nan), "f4"), np.zeros((4, 4))) == 0


def test_field_report_07_sixteen_bits_with_transparency() -> None:
    grey = np.rint(RAMP * 65535).astype(np.uint16)
    key = int(grey[7, 7])
    keyed = np.where(grey == key, 255.0, WANTED)
    assert off(png(16, 0, grey.astype(">u2").tobytes(), WIDTH, HEIGHT, (b"tRNS", struct.pack(">H", key))), keyed) <= 1
    alpha = np.rint(RAMP[::-1] * 65535).astype(np.uint16)
    wanted = WANTED * RAMP[::-1] + 255 * (1 - RAMP[::-1])
    two = np.stack([grey, alpha], -1).astype(">u2").tobytes()
    assert off(png(16, 4, two, WIDTH, HEIGHT), wanted) <= 2
    four = np.stack([grey, grey, grey, alpha], -1).astype(">u2").tobytes()
    assert off(png(16, 6, four, WIDTH, HEIGHT), wanted) <= 2
    colour = np.stack([grey, grey // 2, grey // 3], -1).astype(">u2")
    clear = struct.pack(">3H", *colour[20, 20].tolist())
    seen = shown(png(16, 2, colour.tobytes(), WIDTH, HEIGHT, (b"tRNS", clear)))
    assert seen[20, 20].tolist() == [255, 255, 255] and np.abs(seen - colour / 257.0)[:10].max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_field_report_07_a_transparent_grey_of_few_bits_is_that_grey(depth: int) -> None:
    most = 2**depth - 1
    levels = np.rint(RAMP * most)
    for key in {0, 1, most // 2, most}:
        data = png(depth, 0, packed_bits(levels, depth), WIDTH, HEIGHT, (b"tRNS", struct.pack(">H", key)))
        assert off(data, np.where(levels == key, 255.0, levels * 255 / most)) == 0


def test_field_report_07_palettes_with_transparency() -> None:
    index = (np.arange(WIDTH * HEIGHT) % 4).reshape(HEIGHT, WIDTH).astype(np.uint8)
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [40, 40, 40]], dtype=float)
    for alphas in ([255] * 4, [0, 255, 255, 255], [255, 51, 0, 255]):
        data = png(8, 3, index.tobytes(), WIDTH, HEIGHT, (b"PLTE", bytes(colours.astype(np.uint8))), (b"tRNS", bytes(alphas)))
        share = np.array(alphas)[index][..., None] / 255
        assert off(data, colours[index] * share + 255 * (1 - share)) <= 1
    wide = np.round(colours.T * 257).astype(int)
    table = np.zeros((3, 256), dtype=int)
    table[:, :4] = wide
    told = {258: (SHORT, (8,)), 262: (SHORT, (3,)), 320: (SHORT, tuple(table.ravel().tolist()))}
    assert off(tiff(WIDTH, HEIGHT, index.tobytes(), tags=told), colours[index]) == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_field_report_07_colour_tiff_interleaved_and_in_planes(bits: int, planes: int, order: str, packed: bool) -> None:
    most = 2**bits - 1
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    stored = np.rint(colours * most).astype(f"{order}u{bits // 8}")
    if planes == 2:
        stored = np.moveaxis(stored, -1, 0)
    pixels = b"".join(zlib.compress(one.tobytes()) for one in stored) if packed and planes == 2 else stored.tobytes()
    if planes == 1:
        tags = {258: (SHORT, (bits,) * 3), 262: (SHORT, (2,)), 277: (SHORT, (3,))}
        assert off(tiff(WIDTH, HEIGHT, pixels, order=order, packed=packed, tags=tags), 255 * colours) <= 1
    elif not packed:
        plane = WIDTH * HEIGHT * bits // 8
        tags = {258: (SHORT, (bits,) * 3), 262: (SHORT, (2,)), 277: (SHORT, (3,)), 284: (SHORT, (2,))}
        data = tiff(WIDTH, HEIGHT, pixels, order=order, tags=tags, pieces=(plane,) * 3)
        assert off(data, 255 * colours) <= 1


@pytest.mark.parametrize(("extra", "bits"), [(0, 8), (1, 8), (2, 8), (1, 16), (2, 16)])
def test_field_report_07_a_tiffs_fourth_sample_is_what_its_header_calls_it(extra: int, bits: int) -> None:
    most, alpha = 2**bits - 1, 0.25 + 0.75 * RAMP[::-1]
    colour = np.stack([RAMP, RAMP / 2, RAMP / 3], -1)
    told = colour * alpha[..., None] if extra == 1 else colour
    stored = np.rint(np.dstack([told, alpha]) * most).astype(f"<u{bits // 8}")
    tags = {258: (SHORT, (bits,) * 4), 262: (SHORT, (2,)), 277: (SHORT, (4,)), 338: (SHORT, (extra,))}
    flat = 255 * colour if extra == 0 else 255 * (colour * alpha[..., None] + 1 - alpha[..., None])
    assert off(tiff(WIDTH, HEIGHT, stored.tobytes(), tags=tags), flat) <= 3


def test_field_report_07_inks_are_inverted_only_where_adobe_wrote_the_jpeg() -> None:
    out = BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(out, "JPEG", quality=95)
    adobe = out.getvalue()
    start = adobe.index(b"\xff\xee\0\x0eAdobe")
    plain = adobe[:start] + adobe[start + 16 :]
    assert np.abs(shown(adobe)[0, 0] - (255, 0, 0)).max() < 15
    assert np.abs(shown(plain)[0, 0] - (0, 0, 0)).max() < 15  # the inverse of no cyan, all magenta and yellow, no black
    ink = np.rint(np.stack([RAMP, RAMP, RAMP, RAMP * 0], -1) * 255).astype(np.uint8).tobytes()
    tags = {258: (SHORT, (8,) * 4), 262: (SHORT, (5,)), 277: (SHORT, (4,))}
    assert off(tiff(WIDTH, HEIGHT, ink, tags=tags), 255 - WANTED) <= 1


def test_field_report_07_lab_is_read_by_its_definition() -> None:
    """L* of 0 to 100 in 8 bits, a* and b* signed; grey where these are 0. L* 53.6 is sRGB 128."""
    lab = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    lab[..., 0] = round(53.6 * 2.55)
    tags = {258: (SHORT, (8,) * 3), 262: (SHORT, (8,)), 277: (SHORT, (3,))}
    assert off(tiff(WIDTH, HEIGHT, lab.tobytes(), tags=tags), np.full((HEIGHT, WIDTH), 128.0)) <= 2
    lab[..., 1] = 60
    red = shown(tiff(WIDTH, HEIGHT, lab.tobytes(), tags=tags))[0, 0]
    assert red[0] > 200 and red[1] < 110


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV", "LAB", "CMYK", "I", "F"])
def test_field_report_07_what_pillow_converts_from_grey_stays_that_grey(mode: str) -> None:
    grey = Image.fromarray(np.where(RAMP > 0.5, 255, 0).astype(np.uint8))
    if mode in ("L", "I", "F", "YCbCr", "RGB", "RGBX", "LAB"):
        grey = Image.fromarray(np.rint(WANTED * 0.8 + 20).astype(np.uint8))
    step = grey.convert("RGB") if mode in ("LAB", "HSV") else grey
    loaded = np.asarray(ImageInput.from_pil(step.convert(mode)).load(), dtype=float)
    assert np.abs(loaded - np.asarray(grey.convert("RGB"), dtype=float)).max() <= 2


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_field_report_07_every_mode_with_alpha_is_composited_on_white(mode: str) -> None:
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,))
    image = Image.new("LA", (4, 4), (100, 102))
    for step in ("RGBA", "PA") if mode == "PA" else steps:
        image = image.convert(step)
    assert image.mode == mode
    loaded = np.asarray(ImageInput.from_pil(image).load(), dtype=float)
    assert np.abs(loaded - (100 * 0.4 + 255 * 0.6)).max() <= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_field_report_07_sixteen_bit_images_of_either_byte_order(mode: str) -> None:
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes(mode, (WIDTH, HEIGHT), np.rint(RAMP * 65535).astype(f"{order}u2").tobytes())
    assert np.abs(np.asarray(ImageInput.from_pil(image).load(), dtype=float) - WANTED[..., None]).max() <= 1


def test_field_report_07_tiff_kinds_that_are_not_read_are_named() -> None:
    with pytest.raises(ImageError, match="TIFF of samples TraceIR reads; save it with 8 or 16 bits"):
        ImageInput.from_bytes(grey_tiff(RAMP, "f8")).load()


def test_field_report_17_strips_make_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.open(BytesIO(float_tiff(60))), Image.fromarray(np.rint(RAMP * 999).astype(np.int32))]
    images += [Image.fromarray(np.rint(WANTED).astype(np.uint8)).convert(mode) for mode in ("L", "P", "LA", "RGBA", "CMYK", "1")]
    whole = [as_rgb(image).tobytes() for image in images]
    monkeypatch.setattr("traceir.image_modes.STRIP_PIXELS", 333)
    assert [as_rgb(image).tobytes() for image in images] == whole
