"""Every mode as its header says: range, polarity and transparency, against files written by hand from the specifications."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiffs import FLOAT, SHORT, encode, float_tiff, grey_tiff, png, tiff

from traceir.errors import ImageError
from traceir.image_modes import as_rgb
from traceir.images import ImageInput

SIZE = WIDTH, HEIGHT = 50, 40
RAMP = np.linspace(0.0, 1.0, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
"""Black to white, row by row."""
WANTED = 255.0 * RAMP


def shown(source: bytes | Image.Image) -> np.ndarray:
    image = ImageInput.from_bytes(source) if isinstance(source, bytes) else ImageInput.from_pil(source)
    return np.asarray(image.load(), dtype=float)


def off(source: bytes | Image.Image, wanted: np.ndarray | float) -> float:
    """How far the image is from the levels at most, in steps of 255."""
    levels = np.asarray(wanted, dtype=float)
    return float(np.abs(shown(source) - (levels[..., None] if levels.ndim == 2 else levels)).max())


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of any number of bits, most significant first, each row filled up to a byte."""
    planes = (values[..., None].astype(int) >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(values.shape[0], -1)
    return np.packbits(planes, axis=1).tobytes()


def of_samples(stored: np.ndarray, photometric: int, extra: Sequence[int] = (), **options: object) -> bytes:
    """A TIFF of interleaved samples [H, W, S]; `extra`: what the header calls a fourth one."""
    count = stored.shape[-1]
    tags = {258: (SHORT, (stored.itemsize * 8,) * count), 262: (SHORT, (photometric,)), 277: (SHORT, (count,))}
    return tiff(*SIZE, stored.tobytes(), tags={**tags, **({338: (SHORT, tuple(extra))} if extra else {})}, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_tiff_of_every_depth_spans_black_to_white(bits: int, packed: bool) -> None:
    levels = np.rint(RAMP * (2**bits - 1))
    pixels = levels.astype("<u2").tobytes() if bits == 16 else packed_bits(levels, bits)
    wanted = np.rint(levels * 255 / (2**bits - 1))
    for photometric in (1, 0) if bits != 12 else (1,):  # Pillow reads none of 12 bits with white at 0
        tags = {258: (SHORT, (bits,)), 262: (SHORT, (photometric,))}
        assert off(tiff(*SIZE, pixels, packed=packed, tags=tags), wanted if photometric else 255 - wanted) <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "order"), [*((kind, order) for kind in ("i1", "i2", "i4", "f4") for order in "<>"), ("u4", "<")]
)
def test_signed_long_and_float_samples_in_either_byte_order(kind: str, order: str, packed: bool) -> None:
    lowest, highest = (-3.0, 700.0) if kind == "f4" else (np.iinfo(kind).min, np.iinfo(kind).max)
    values = lowest + RAMP * (float(highest) - float(lowest))
    assert off(grey_tiff(values, kind, order=order, packed=packed), WANTED) <= 1
    if kind == "f4":
        assert off(grey_tiff(values, kind, order=order, packed=packed, photometric=0), 255 - WANTED) <= 1
    if kind != "i1":
        assert off(grey_tiff(np.rint(WANTED), kind, order=order, packed=packed), np.rint(WANTED)) == 0


def test_floats_of_0_to_1_and_of_0_to_255_keep_their_range_and_stated_ranges_hold() -> None:
    stated = {"t340": (FLOAT, (-1.0,)), "t341": (FLOAT, (3.0,))}
    spread = 255 * (RAMP + 1) / 4
    for data, wanted in (
        (grey_tiff(np.full((HEIGHT, WIDTH), 0.5), "f4"), np.full((HEIGHT, WIDTH), 127.5)),
        (grey_tiff(0.25 + RAMP / 2, "f4"), 255 * (0.25 + RAMP / 2)),
        (grey_tiff(100 + RAMP, "f4"), 100 + RAMP),
        (grey_tiff(RAMP * 1e30, "f4"), WANTED),
        (grey_tiff(RAMP, "f4", **stated), spread),
        (grey_tiff(RAMP, "f4", photometric=0, **stated), 255 - spread),
        (grey_tiff(RAMP, "f4", t340=(FLOAT, (3.0,)), t341=(FLOAT, (float("nan"),))), WANTED),
        (grey_tiff(RAMP * 4095, "u2", t280=(SHORT, (0,)), t281=(SHORT, (4095,))), 255 * RAMP * 4095 / 65535),
        (grey_tiff(np.full((4, 4), np.nan), "f4"), np.zeros((4, 4))),
    ):
        assert off(data, wanted) <= 0.5 + 0.5 * (wanted.max() < 20)
    with pytest.raises(ImageError, match="TIFF of samples TraceIR reads; save it with 8 or 16 bits"):
        shown(grey_tiff(RAMP, "f8"))
    odd = RAMP * 1000
    odd[0, :3] = np.nan, np.inf, -np.inf
    levels = shown(grey_tiff(odd, "f4"))[..., 0]
    assert levels[0, :3].tolist() == [0, 255, 0] and np.abs(levels - WANTED)[1:].max() <= 1


def test_png_of_every_depth_with_transparency_and_sixteen_bits_of_either_byte_order() -> None:
    for mode in ("I;16", "I;16B", "I;16L"):
        order = ">" if mode.endswith("B") else "<"
        assert off(Image.frombytes(mode, SIZE, np.rint(RAMP * 65535).astype(f"{order}u2").tobytes()), WANTED) <= 1
    grey, alpha = np.rint(RAMP * 65535).astype(np.uint16), np.rint(RAMP[::-1] * 65535).astype(np.uint16)
    key = int(grey[7, 7])
    keyed = png(*SIZE, 16, 0, grey.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", key)))
    assert off(keyed, np.where(grey == key, 255.0, WANTED)) <= 1
    wanted = WANTED * RAMP[::-1] + 255 * (1 - RAMP[::-1])
    for colour, samples in ((4, [grey, alpha]), (6, [grey, grey, grey, alpha])):
        assert off(png(*SIZE, 16, colour, np.stack(samples, -1).astype(">u2").tobytes()), wanted) <= 2
    for depth in (1, 2, 4, 8):
        most = 2**depth - 1
        levels = np.rint(RAMP * most)
        for key in {0, 1, most // 2, most}:
            data = png(*SIZE, depth, 0, packed_bits(levels, depth), (b"tRNS", struct.pack(">H", key)))
            assert off(data, np.where(levels == key, 255.0, levels * 255 / most)) == 0
    colours = np.stack([grey, grey // 2, grey // 3], -1).astype(">u2")
    seen = shown(png(*SIZE, 16, 2, colours.tobytes(), (b"tRNS", struct.pack(">3H", *colours[20, 20].tolist()))))
    assert seen[20, 20].tolist() == [255, 255, 255] and np.abs(seen - colours / 257.0)[:10].max() <= 1


def test_palettes_with_transparency() -> None:
    index = (np.arange(WIDTH * HEIGHT) % 4).reshape(HEIGHT, WIDTH).astype(np.uint8)
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [40, 40, 40]], dtype=float)
    for alphas in ([255] * 4, [0, 255, 255, 255], [255, 51, 0, 255]):
        data = png(*SIZE, 8, 3, index.tobytes(), (b"PLTE", bytes(colours.astype(np.uint8))), (b"tRNS", bytes(alphas)))
        share = np.array(alphas)[index][..., None] / 255
        assert off(data, colours[index] * share + 255 * (1 - share)) <= 1
    table = np.zeros((3, 256), dtype=int)
    table[:, :4] = np.round(colours.T * 257).astype(int)
    tags = {258: (SHORT, (8,)), 262: (SHORT, (3,)), 320: (SHORT, tuple(table.ravel().tolist()))}
    assert off(tiff(*SIZE, index.tobytes(), tags=tags), colours[index]) == 0
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert off(encode(image, "GIF"), np.full((8, 8, 3), (255, 0, 0))) == 0
    assert off(encode(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG", transparency=(255, 0, 0)), 255) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_colour_tiff_interleaved_and_in_planes(bits: int, order: str) -> None:
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    stored = np.rint(colours * (2**bits - 1)).astype(f"{order}u{bits // 8}")
    for packed in (False, True):
        assert off(of_samples(stored, 2, order=order, packed=packed), 255 * colours) <= 1
    tags = {258: (SHORT, (bits,) * 3), 262: (SHORT, (2,)), 277: (SHORT, (3,)), 284: (SHORT, (2,))}
    planes, pieces = np.moveaxis(stored, -1, 0).tobytes(), (WIDTH * HEIGHT * bits // 8,) * 3
    assert off(tiff(*SIZE, planes, order=order, tags=tags, pieces=pieces), 255 * colours) <= 1


@pytest.mark.parametrize(("extra", "bits"), [(0, 8), (1, 8), (2, 8), (1, 16), (2, 16)])
def test_a_tiffs_fourth_sample_is_what_its_header_calls_it(extra: int, bits: int) -> None:
    alpha, colour = 0.25 + 0.75 * RAMP[::-1], np.stack([RAMP, RAMP / 2, RAMP / 3], -1)
    kept = colour * alpha[..., None] if extra == 1 else colour
    stored = np.rint(np.dstack([kept, alpha]) * (2**bits - 1)).astype(f"<u{bits // 8}")
    flat = 255 * colour if extra == 0 else 255 * (colour * alpha[..., None] + 1 - alpha[..., None])
    assert off(of_samples(stored, 2, [extra]), flat) <= 3


def test_inks_are_inverted_only_where_adobe_wrote_the_jpeg_and_lab_is_read_by_its_definition() -> None:
    adobe = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    start = adobe.index(b"\xff\xee\0\x0eAdobe")
    assert np.abs(shown(adobe)[0, 0] - (255, 0, 0)).max() < 15
    plain = adobe[:start] + adobe[start + 16 :]  # the inverse of no cyan, all magenta and yellow, no black
    assert np.abs(shown(plain)[0, 0]).max() < 15
    assert off(of_samples(np.rint(np.stack([RAMP, RAMP, RAMP, RAMP * 0], -1) * 255).astype(np.uint8), 5), 255 - WANTED) <= 1
    lab = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)  # L* of 0 to 100 in 8 bits, a* and b* signed; L* 53.6 is sRGB 128
    lab[..., 0] = round(53.6 * 2.55)
    assert off(of_samples(lab, 8), np.full((HEIGHT, WIDTH), 128.0)) <= 2
    lab[..., 1] = 60
    red = shown(of_samples(lab, 8))[0, 0]
    assert red[0] > 200 and red[1] < 110


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV", "LAB", "CMYK", "I", "F"])
def test_what_pillow_converts_from_grey_stays_that_grey(mode: str) -> None:
    grey = Image.fromarray(np.where(RAMP > 0.5, 255, 0).astype(np.uint8))
    if mode in ("L", "I", "F", "YCbCr", "RGB", "RGBX", "LAB"):
        grey = Image.fromarray(np.rint(WANTED * 0.8 + 20).astype(np.uint8))
    step = grey.convert("RGB") if mode in ("LAB", "HSV") else grey
    assert off(step.convert(mode), np.asarray(grey)) <= 2


@pytest.mark.parametrize("steps", [("LA",), ("LA", "La"), ("RGBA", "PA"), ("RGBA",), ("RGBA", "RGBa")])
def test_every_mode_with_alpha_is_composited_on_white(steps: tuple[str, ...]) -> None:
    image = Image.new("LA", (4, 4), (100, 102))
    for mode in steps:
        image = image.convert(mode)
    assert image.mode == steps[-1] and off(image, 100 * 0.4 + 255 * 0.6) <= 2
    if image.mode in ("LA", "RGBA"):
        assert off(encode(image, "PNG"), 100 * 0.4 + 255 * 0.6) <= 2


def test_strips_make_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.open(BytesIO(float_tiff(60))), Image.fromarray(np.rint(RAMP * 999).astype(np.int32))]
    images += [Image.fromarray(np.rint(WANTED).astype(np.uint8)).convert(mode) for mode in ("L", "P", "LA", "RGBA", "CMYK", "1")]
    whole = [as_rgb(image).tobytes() for image in images]
    monkeypatch.setattr("traceir.image_modes.STRIP_PIXELS", 333)
    assert [as_rgb(image).tobytes() for image in images] == whole
