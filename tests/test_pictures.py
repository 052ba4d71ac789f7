"""Pictures: every guard refuses what it should, and every readable mode becomes upright RGB."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiffs import SHORT, tiff

from traceir import images as pictures
from traceir.errors import ImageError, InputError
from traceir.images import MAX_FILE_BYTES, ImageInput, ImageLimits

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pixel(picture: ImageInput, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = picture.load()
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(format: str) -> None:
    image = ImageInput.from_bytes(encode(Image.new("RGB", (20, 10), RED), format)).load()
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(image, dtype=int) - RED).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    data = encode(noise(), format)
    cut = ImageInput.from_bytes(data[: int(len(data) * share)], name="cut")
    with pytest.raises(ImageError, match="cut"):
        cut.load()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_missing_end_is_refused_even_where_the_decoder_is_told_to_accept_it(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(noise(), format)
    tail = {"PNG": 12, "JPEG": 2, "WEBP": 8, "GIF": 1}[format]
    with pytest.raises(ImageError, match="truncated"):
        ImageInput.from_bytes(data[:-tail]).load()
    assert ImageInput.from_bytes(data).load().size == (64, 48)


def test_bytes_after_the_end_do_no_harm() -> None:
    for format in ("PNG", "JPEG"):
        assert ImageInput.from_bytes(encode(noise(), format) + b"\0" * 5000).load().size == (64, 48)


def test_bombs_are_refused_from_the_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for side in (8001, 12_000, 60_000):  # beyond our limit, Pillow's warning, Pillow's error
        with pytest.raises(ImageError, match=r"large|limit"):
            ImageInput.from_bytes(png_header(side, side)).load()


def test_limits_can_be_set_for_a_call() -> None:
    picture = ImageInput.from_bytes(encode(noise(64, 48), "PNG"), name="small.png")
    with pytest.raises(ImageError, match=r"small\.png is 64 x 48 pixels, more than the limit of 100"):
        picture.load(limits=ImageLimits(pixels=100))
    with pytest.raises(ImageError, match="bytes, more than the limit of 100"):
        picture.load(limits=ImageLimits(file_bytes=100))
    assert picture.load(limits=ImageLimits(pixels=64 * 48)).size == (64, 48)


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError, match=r"huge\.png has 67108865 bytes"):
        ImageInput.open(path).load()
    with pytest.raises(ImageError, match=r"huge\.png"):
        _ = ImageInput.open(path).sha256


def test_aspect_ratio_ends_at_200() -> None:
    assert ImageInput.from_bytes(encode(Image.new("RGB", (400, 2)), "PNG")).load().size == (400, 2)
    for size in ((401, 2), (1, 201)):
        with pytest.raises(ImageError, match="aspect ratio"):
            ImageInput.from_bytes(encode(Image.new("RGB", size), "PNG")).load()
    with pytest.raises(ImageError, match="aspect ratio"):
        ImageInput.from_pil(Image.new("RGB", (401, 2)))


def test_missing_empty_folder_and_garbage(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("these are only words")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [
        ("none.png", "does not exist"),
        ("empty.png", "is empty"),
        ("words.png", "not a picture"),
        ("", "not a regular file"),
        ("pipe.png", "not a regular file"),
    ]:
        path = tmp_path / name
        with pytest.raises(ImageError, match=reason) as caught:
            ImageInput.open(path).load()
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "address",
    ["http://a.example/b.png", "https://a.example/b.png", "file:///b.png", "s3://a/b.png", "data:image/png,x"],
)
def test_addresses_are_refused_at_once(address: str) -> None:
    with pytest.raises(ImageError, match="address"):
        ImageInput.open(address)


def test_other_pillow_formats_are_refused() -> None:
    for format in ("PPM", "PDF", "ICO"):
        with pytest.raises(ImageError, match="not a picture"):
            ImageInput.from_bytes(encode(Image.new("RGB", (32, 32)), format)).load()


def test_transparency_is_composited_on_white() -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert pixel(ImageInput.from_bytes(encode(half, "PNG"))) == (255, 127, 127)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert pixel(ImageInput.from_bytes(encode(clear, "PNG"))) == WHITE
    assert pixel(ImageInput.from_bytes(encode(clear, "WEBP", lossless=True))) == WHITE
    assert pixel(ImageInput.from_pil(clear)) == WHITE
    grey = Image.new("LA", (8, 8), (0, 0))
    assert pixel(ImageInput.from_bytes(encode(grey, "PNG"))) == WHITE


def test_palettes_with_and_without_a_transparent_entry() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(ImageInput.from_bytes(encode(palette, "PNG"))) == RED
    assert pixel(ImageInput.from_bytes(encode(palette, "PNG", transparency=1))) == WHITE
    assert pixel(ImageInput.from_bytes(encode(palette, "GIF"))) == RED
    keyed = encode(Image.new("RGB", (8, 8), RED), "PNG", transparency=RED)
    assert pixel(ImageInput.from_bytes(keyed)) == WHITE


def test_cmyk_grey_bilevel_and_sixteen_bits() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixel(ImageInput.from_bytes(encode(cmyk, "JPEG", quality=95)))
    assert red[0] > 240 and max(red[1:]) < 15
    assert pixel(ImageInput.from_bytes(encode(Image.new("L", (8, 8), 77), "PNG"))) == (77, 77, 77)
    assert pixel(ImageInput.from_bytes(encode(Image.new("1", (8, 8), 1), "PNG"))) == WHITE
    deep = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    assert pixel(ImageInput.from_bytes(encode(deep, "PNG"))) == (128, 128, 128)
    floats = Image.fromarray(np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8))
    stretched = np.asarray(ImageInput.from_bytes(encode(floats, "TIFF")).load())
    assert stretched.min() == 0 and stretched.max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = ImageInput.from_bytes(encode(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(picture.load()), np.asarray(upright))


def test_broken_exif_is_no_reason_to_refuse() -> None:
    data = encode(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert ImageInput.from_bytes(data).load().size == (16, 16)


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        red = pixel(ImageInput.from_bytes(data))
        assert red[0] > 250 and red[2] < 5


def test_a_large_jpeg_may_be_decoded_smaller_but_not_too_small() -> None:
    picture = ImageInput.from_bytes(encode(noise(800, 640), "JPEG"))
    assert picture.load().size == (800, 640)
    assert picture.load(shrink_to=160).size == (200, 160)
    assert picture.load(shrink_to=161).size == (400, 320)
    assert picture.load(shrink_to=10_000).size == (800, 640)
    with pytest.raises(ImageError, match="shrink_to"):
        picture.load(shrink_to=0)


def test_hashes_name_and_equality(tmp_path: Path) -> None:
    data = encode(noise(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    opened, given = ImageInput.open(path), ImageInput.from_bytes(data, name="b")
    assert opened.sha256 == given.sha256 == hashlib.sha256(data).hexdigest()
    assert (opened.name, opened.path, given.name, given.path) == ("a.png", path, "b", None)
    assert opened == given and hash(opened) == hash(given)
    drawn = ImageInput.from_pil(noise())
    assert drawn == ImageInput.from_pil(noise()) and drawn != ImageInput.from_pil(noise(seed=1)) and drawn != given
    tall = ImageInput.from_pil(Image.new("RGB", (2, 8)))
    assert tall != ImageInput.from_pil(Image.new("RGB", (8, 2)))


def test_a_image_does_not_change() -> None:
    source = Image.new("RGB", (8, 8), RED)
    picture = ImageInput.from_pil(source)
    source.paste(WHITE, (0, 0, 8, 8))
    picture.load().paste(WHITE, (0, 0, 8, 8))
    assert pixel(picture) == RED


def test_a_file_that_changes_under_a_known_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise(seed=1), "PNG"))
    picture = ImageInput.open(path)
    _ = picture.sha256
    path.write_bytes(encode(noise(seed=2), "PNG"))
    with pytest.raises(ImageError, match="changed while in use"):
        picture.load()


def test_threads_may_share_a_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(noise(), "JPEG"))
    picture = ImageInput.open(path)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: picture.load().tobytes(), range(16)))
    assert len(set(images)) == 1


def stereo() -> bytes:
    """What Pillow calls MPO: a JPEG with a second one behind it, as `.jpg` from a camera with two lenses."""
    return encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])


def test_field_report_06_a_jpeg_with_a_second_image_is_a_jpeg(tmp_path: Path) -> None:
    data = stereo()
    assert Image.open(BytesIO(data)).format == "MPO"
    (tmp_path / "two.jpg").write_bytes(data)
    for picture in (
        ImageInput.open(tmp_path / "two.jpg"),
        ImageInput.from_bytes(data),
        ImageInput.from_bytes(data + b"\xff\xda"),
    ):
        assert picture.encoded()[1].media_type == "image/jpeg" and data in picture.encoded()[0]
        assert picture.load().tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()
        assert picture.load(shrink_to=24).size == (32, 24)
    spoilt = data.replace(b"MPF\0II*\0", b"MPF\0II*\xff", 1)
    assert spoilt != data and ImageInput.from_bytes(spoilt).encoded()[1].suffixes[0] == ".jpg"
    assert ImageInput.from_pil(Image.open(BytesIO(data))).load().size == (64, 48)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_field_report_06_whatever_is_read_has_a_suffix_to_be_kept_under(format: str) -> None:
    data, known = ImageInput.from_bytes(encode(noise(), format)).encoded()
    assert Image.registered_extensions()[known.suffixes[0]] == format and Image.MIME[format] == known.media_type
    assert ImageInput.from_bytes(data).load().size == (64, 48)


def test_field_report_17_deep_images_have_lower_limits_judged_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    kinds = {"F": ((32,), 3, 1), "I": ((32,), 2, 1), "RGBA": ((16,) * 4, 1, 2), "RGB": ((8,) * 6, 1, 2)}
    for bits, sample, photometric in kinds.values():
        extra = {338: (SHORT, (0,) * (len(bits) - 3))} if len(bits) > 4 else {}
        tags = {258: (SHORT, bits), 262: (SHORT, (photometric,)), 277: (SHORT, (len(bits),)), 339: (SHORT, (sample,)), **extra}
        with pytest.raises(ImageError, match=r"5600 x 5600 pixels at a time, of 32-bit .* more than the limit of 16000000"):
            ImageInput.from_bytes(tiff(5600, 5600, b"", packed=True, tags=tags)).load()


MEASURE = """
import resource, sys, threading
from concurrent.futures import ThreadPoolExecutor
from traceir import images as pictures
from tiffs import float_tiff
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
data = float_tiff(1400)
pictures.ImageInput.from_bytes(float_tiff(50)).load()
start = peak()
def read(_): return pictures.ImageInput.from_bytes(data).load().getpixel((1399, 0))
assert read(0) == (255, 255, 255)
one = peak()
pictures._MEMORY = pictures._Memory(32 << 20)
with ThreadPoolExecutor(8) as pool: list(pool.map(read, range(8)))
print(one - start, peak() - start)
"""


def test_field_report_17_floats_are_converted_in_little_memory_also_eight_at_once() -> None:
    """Each is 8 MB of floats and 8 MB of RGB, 11 MiB more than at the start; whole in float64 it would be 42, and eight 355."""
    paths = [str(Path(pictures.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    one, eight = map(int, done.stdout.split())
    assert one < 30 and eight < 120


def test_field_report_17_no_more_is_decoded_at_a_time_than_memory_is_given() -> None:
    memory, held, most = pictures._Memory(100), [0], [0]
    lock = threading.Lock()

    def decode(wanted: int) -> None:
        with memory.taking(wanted):
            with lock:
                held[0] += min(wanted, 100)
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.002)
            with lock:
                held[0] -= min(wanted, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [30, 40, 1000, 20, 60, 90, 10, 50] * 4))
    assert 50 <= most[0] <= 100 and held[0] == 0
    with pytest.raises(ZeroDivisionError), memory.taking(80):
        raise ZeroDivisionError
    with memory.taking(100):
        pass
