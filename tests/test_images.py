"""ImageInput: every check refuses what it should; orientation, hashes, limits and the memory that decoding takes."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import image_of
from PIL import Image, ImageFile
from tiffs import LONG, SHORT, encode, png, tiff

from traceir import images
from traceir.errors import ImageError, InputError
from traceir.image_formats import FORMATS
from traceir.images import MAX_FILE_BYTES, ImageInput, ImageLimits, data_url, file_bytes

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return image_of(seed, width, height).load()


def read(data: bytes) -> Image.Image:
    return ImageInput.from_bytes(data).load()


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where pixels are decoded."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_and_named(format: str) -> None:
    image = read(encode(Image.new("RGB", (20, 10), RED), format))
    assert (image.mode, image.size) == ("RGB", (20, 10)) and np.abs(np.asarray(image, dtype=int) - RED).max() <= 4
    _, known = ImageInput.from_bytes(encode(noise(), format)).encoded()
    assert (
        Image.registered_extensions()[known.suffixes[0]] == format
        and Image.MIME[format].replace("heif", "heic") == known.media_type
    )


@pytest.mark.usefixtures("undecoded")
def test_bombs_are_refused_from_the_header_alone() -> None:
    for side in (8001, 12_000, 60_000):  # beyond our limit, Pillow's warning, Pillow's error
        with pytest.raises(ImageError, match=r"large|limit"):
            read(png(side, side, 8, 2, bytes(9)))
    for bits, sample, photometric in (((32,), 3, 1), ((32,), 2, 1), ((16,) * 4, 1, 2), ((8,) * 6, 1, 2)):
        extra = {338: (SHORT, (0,) * (len(bits) - 3))} if len(bits) > 4 else {}
        tags = {258: (SHORT, bits), 262: (SHORT, (photometric,)), 277: (SHORT, (len(bits),)), 339: (SHORT, (sample,)), **extra}
        with pytest.raises(ImageError, match=r"5600 x 5600 pixels at a time, of 32-bit .* more than the limit of 16000000"):
            read(tiff(5600, 5600, b"", packed=True, tags=tags))
    tile = {322: (LONG, (16_384,)), 323: (LONG, (16_384,)), 324: (LONG, (8,)), 325: (LONG, (9,)), 258: (SHORT, (8,))}
    with pytest.raises(ImageError, match="decoded 16384 x 16384 pixels at a time, more than the limit of 64000000"):
        read(tiff(16, 16, bytes(256), packed=True, tags=tile))


@pytest.mark.usefixtures("undecoded")
def test_a_check_refuses_without_decoding_what_a_header_shows() -> None:
    data = encode(noise(), "PNG")
    ImageInput.from_bytes(data).check()
    assert ImageInput.from_bytes(data).size() == (64, 48)
    for wrong, why in ((data[:-12], "truncated"), (b"words", "not an image"), (png(401, 2, 8, 2, bytes(9)), "aspect ratio")):
        with pytest.raises(ImageError, match=why):
            ImageInput.from_bytes(wrong).check()


def test_limits_of_a_call_of_a_file_and_of_the_aspect_ratio(tmp_path: Path) -> None:
    image = ImageInput.from_bytes(encode(noise(64, 48), "PNG"), name="small.png")
    with pytest.raises(ImageError, match=r"small\.png is 64 x 48 pixels, more than the limit of 100"):
        image.load(limits=ImageLimits(pixels=100))
    with pytest.raises(ImageError, match="bytes, more than the limit of 100"):
        image.load(limits=ImageLimits(file_bytes=100))
    assert image.load(limits=ImageLimits(pixels=64 * 48)).size == (64, 48)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for use in (ImageInput.load, ImageInput.__hash__):
        with pytest.raises(ImageError, match=r"huge\.png has 67108865 bytes"):
            use(ImageInput.open(tmp_path / "huge.png"))
    assert read(encode(Image.new("RGB", (400, 2)), "PNG")).size == (400, 2)
    for size in ((401, 2), (1, 201)):
        with pytest.raises(ImageError, match="aspect ratio"):
            read(encode(Image.new("RGB", size), "PNG"))
        with pytest.raises(ImageError, match="aspect ratio"):
            ImageInput.from_pil(Image.new("RGB", size))


def test_what_is_no_image_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("these are only words")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("none.png", "does not exist"), ("empty.png", "is empty"), ("words.png", "not an image"),
        ("", "not a regular file"), ("pipe.png", "not a regular file"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=reason) as caught:
            ImageInput.open(tmp_path / name).load()
        assert str(tmp_path / name) in str(caught.value) and isinstance(caught.value, InputError)
    for address in ("http://a.example/b.png", "file:///b.png", "s3://a/b.png", "data:image/png,x"):
        with pytest.raises(ImageError, match="address"):
            ImageInput.open(address)
    for name in ("", "a\0b", "\ud800.png"):
        with pytest.raises(ImageError, match="not a file name"):
            ImageInput.open(name)
    for format in ("PPM", "PDF", "ICO"):
        with pytest.raises(ImageError, match="not an image"):
            read(encode(Image.new("RGB", (32, 32)), format))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    turn = Image.Transpose
    inverse = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_90,
               7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # fmt: skip
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(read(encode(stored, "PNG", exif=exif))), np.asarray(upright))


def test_broken_exif_is_no_reason_to_refuse_and_an_animation_gives_its_first_frame() -> None:
    data = encode(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read(data).size == (16, 16)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        moving = read(encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True))
        assert np.abs(np.asarray(moving, dtype=int) - RED).max() < 5


def test_a_large_jpeg_may_be_decoded_smaller_but_not_too_small() -> None:
    image = ImageInput.from_bytes(encode(noise(800, 640), "JPEG"))
    sizes = {shrink_to: image.load(shrink_to=shrink_to).size for shrink_to in (None, 160, 161, 10_000)}
    assert sizes == {None: (800, 640), 160: (200, 160), 161: (400, 320), 10_000: (800, 640)}
    with pytest.raises(ImageError, match="shrink_to"):
        image.load(shrink_to=0)


def test_hashes_and_equality_go_by_content(tmp_path: Path) -> None:
    data, path = encode(noise(), "PNG"), tmp_path / "a.png"
    path.write_bytes(data)
    opened, received = ImageInput.open(path), ImageInput.from_bytes(data, name="b")
    assert opened.sha256 == received.sha256 == received.moved_to(path).sha256 == hashlib.sha256(data).hexdigest()
    assert (opened.name, opened.path, received.name, received.path) == ("a.png", path, "b", None)
    assert opened == received and hash(opened) == hash(received)
    drawn = ImageInput.from_pil(noise())
    assert drawn == ImageInput.from_pil(noise()) and drawn != ImageInput.from_pil(noise(seed=1)) and drawn != received
    assert ImageInput.from_pil(Image.new("RGB", (2, 8))) != ImageInput.from_pil(Image.new("RGB", (8, 2)))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: opened.load().tobytes(), range(8)))) == 1
    path.write_bytes(encode(noise(seed=2), "PNG"))
    with pytest.raises(ImageError, match="changed while in use"):
        opened.load()


def test_pixels_are_copied_in_and_out() -> None:
    source = Image.new("RGB", (8, 8), RED)
    image = ImageInput.from_pil(source)
    source.paste(WHITE, (0, 0, 8, 8))
    image.load().paste(WHITE, (0, 0, 8, 8))
    assert image.load().getpixel((0, 0)) == RED
    assert read(file_bytes(noise(200, 100), side=50)).size == (50, 25) and read(file_bytes(noise(), "PNG")) == noise()
    assert data_url(b"x", "image/png") == f"data:image/png;base64,{base64.b64encode(b'x').decode()}"


def test_a_jpeg_with_a_second_image_behind_it_is_a_jpeg(tmp_path: Path) -> None:
    """What Pillow calls MPO: `.jpg` from a camera with two lenses."""
    data = encode(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    assert Image.open(BytesIO(data)).format == "MPO"
    (tmp_path / "two.jpg").write_bytes(data)
    for image in (ImageInput.open(tmp_path / "two.jpg"), ImageInput.from_bytes(data + b"\xff\xda")):
        assert image.encoded()[1].media_type == "image/jpeg" and data in image.encoded()[0]
        assert image.load().tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()
        assert image.load(shrink_to=24).size == (32, 24)
    spoilt = data.replace(b"MPF\0II*\0", b"MPF\0II*\xff", 1)
    assert spoilt != data and ImageInput.from_bytes(spoilt).encoded()[1].suffixes[0] == ".jpg"
    assert ImageInput.from_pil(Image.open(BytesIO(data))).load().size == (64, 48)


MEASURE = """
import resource
from concurrent.futures import ThreadPoolExecutor
from traceir import images
from tiffs import float_tiff
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
data = float_tiff(1400)
images.ImageInput.from_bytes(float_tiff(50)).load()
start = peak()
def read(_): return images.ImageInput.from_bytes(data).load().getpixel((1399, 0))
assert read(0) == (255, 255, 255)
one = peak()
images._MEMORY = images._Memory(32 << 20)
with ThreadPoolExecutor(8) as pool: list(pool.map(read, range(8)))
print(one - start, peak() - start)
"""


def test_floats_are_converted_in_little_memory_also_eight_at_once() -> None:
    """Each is 8 MB of floats and 8 MB of RGB, 11 MiB more than at the start; whole in float64 it would be 42, and eight 355."""
    paths = [str(Path(images.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    single, eight = map(int, done.stdout.split())
    assert single < 30 and eight < 120
