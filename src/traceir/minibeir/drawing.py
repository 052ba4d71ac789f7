"""Images of scenes and garments, and how every sprite is drawn: at four times its size, then reduced once and cached.

An image (192 x 192, RGB) is a few pastes. A `variant` sets background, light, place and scale, and never what is depicted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from traceir.minibeir.rows import derive_seed, read_data

SIZE = 192
SPRITES = read_data("sprites.json")
"""Drawing commands: [polygon, colour, x, y, ...], [line, colour, width, x, y, ...], [ellipse, colour, left, top, right, bottom],
[box, colour, left, top, right, bottom, radius]. No colour makes transparent again."""

COLOURS: dict[str, tuple[int, int, int]] = {name: (r, g, b) for name, (r, g, b) in SPRITES["colours"]["scenes"].items()}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("cube", "ball", "cone", "ring", "star", "mug")
GARMENT_TYPES = ("dress", "shirt", "coat", "jumpsuit")

_OVER = 4  # oversampling of sprites
_CANVAS = 80  # side of an object's sprite, in image pixels, shadow included
_SCALES = (0.94, 0.97, 1.0, 1.03, 1.06)
_WALLS = ((188, 200, 214), (210, 200, 184), (184, 206, 194), (208, 190, 198), (176, 188, 210), (214, 208, 200))
_TABLES = ((164, 138, 110), (120, 128, 140), (150, 126, 108), (112, 128, 124), (166, 150, 130), (132, 120, 134))
_INK = (26, 24, 32)

FloatArray = NDArray[np.floating[Any]]
Relief = tuple[FloatArray, FloatArray, FloatArray]
"""Mask, shade and shine of an object at four times its size: coverage, factor on the colour, share of white mixed in."""


def pen_sprite(
    size: tuple[int, int],
    commands: Sequence[Sequence[Any]],
    palette: Mapping[str, tuple[int, ...]] | None = None,
    mode: str = "RGBA",
) -> Image.Image:
    """What the commands draw on a transparent ground of `size` pixels, at four times that size; `palette` names colours."""
    image = Image.new(mode, (size[0] * _OVER, size[1] * _OVER), 0)
    draw = ImageDraw.Draw(image)
    for shape, colour, *numbers in commands:
        fill = (palette or {}).get(colour, colour) if colour else (0, 0, 0, 0)
        scaled = [number * _OVER for number in numbers]
        if shape == "polygon":
            draw.polygon(scaled, fill=fill)
        elif shape == "line":
            draw.line(scaled[1:], fill=fill, width=round(scaled[0]), joint="curve")
        elif shape == "ellipse":
            draw.ellipse(scaled, fill=fill)
        else:
            draw.rounded_rectangle(scaled[:4], scaled[4] if scaled[4:] else 0, fill=fill)
    return image


def reduce(image: Image.Image) -> Image.Image:
    return image.resize((image.width // _OVER, image.height // _OVER), Image.Resampling.LANCZOS)


# --- light and background ---------------------------------------------------------------------------------------------


def _to_image(pixels: FloatArray) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


@cache
def _paint_ground(
    bands: tuple[tuple[tuple[int, int, int], int, int, int], ...], centre: tuple[int, int], strength: float
) -> Image.Image:
    """Bands of a colour, lighter by two steps at their tops and bottoms, each so many rows high, and light round a centre."""
    parts = []
    for colour, top, bottom, rows in bands:
        share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
        upper, lower = (np.asarray([part + by for part in colour], np.float32) for by in (top, bottom))
        parts.append((upper * (1 - share) + lower * share) * np.ones((1, SIZE, 1), np.float32))
    pixels = np.concatenate(parts)
    if len(parts) > 1:
        edge = bands[0][3]
        pixels[edge - 1 : edge + 2] *= 0.86
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    distance = np.hypot(xs - centre[0], ys - centre[1]) / SIZE
    return _to_image(pixels * np.asarray(1 + strength * (0.5 - distance), np.float32)[:, :, None])


@cache
def _light_table(light: int) -> list[int]:
    """A lookup table for `Image.point`: one of nine lights, brightness within 6 % and warmth within 2 %."""
    brightness = (0.95, 1.0, 1.04)[light % 3]
    warmth = (-0.02, 0.0, 0.02)[light // 3]
    gains = (brightness * (1 + warmth), brightness, brightness * (1 - warmth))
    return [min(255, round(value * gain)) for gain in gains for value in range(256)]


# --- objects of a scene -----------------------------------------------------------------------------------------------


def _stack_faces(faces: Sequence[tuple[float, ...]]) -> Relief:
    """Flat faces, each (shade, shine, x, y, ...) from the middle; later ones cover earlier ones."""
    mask, shade, shine = (np.zeros((_CANVAS * _OVER, _CANVAS * _OVER), np.float32) for _ in range(3))
    for tone, gloss, *numbers in faces:
        face = pen_sprite((_CANVAS, _CANVAS), [["polygon", 255, *(number + _CANVAS / 2 for number in numbers)]], mode="L")
        covered = np.asarray(face, np.float32) / 255
        mask = np.maximum(mask, covered)
        shade = np.where(covered > 0, np.float32(tone), shade)
        shine = np.where(covered > 0, np.float32(gloss), shine)
    return mask, shade, shine


def _light_round(mask: NDArray[Any], nx: FloatArray, ny: FloatArray) -> Relief:
    """A round surface from the x and y of its normal, light from the upper left."""
    nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0, 1))
    facing = np.clip(-0.45 * nx - 0.55 * ny + 0.70 * nz, 0, 1)
    shine = np.asarray(0.55 * np.clip(facing, 0, 1) ** 14, np.float32)
    return mask.astype(np.float32), np.asarray(0.50 + 0.55 * facing, np.float32), shine


def _raise_shape(shape: str) -> Relief:
    if shape in SPRITES["faces"]:
        return _stack_faces(SPRITES["faces"][shape])
    ys, xs = np.mgrid[0 : _CANVAS * _OVER, 0 : _CANVAS * _OVER].astype(np.float32)
    xs, ys = ((axis + 0.5) / _OVER - _CANVAS / 2 for axis in (xs, ys))  # image pixels, the origin in the middle
    radius = np.hypot(xs, ys)
    if shape == "ball":
        return _light_round(radius <= 26, xs / 26, ys / 26)
    if shape == "ring":
        across = (radius - 19.5) / 7.5
        return _light_round(np.abs(across) <= 1, across * xs / np.maximum(radius, 1), across * ys / np.maximum(radius, 1))
    if shape == "cone":
        bowl = ((xs / 26) ** 2 + ((ys - 19) / 7) ** 2 <= 1).astype(np.float32)
        flat = _stack_faces([(0, 0, 0, -28, 26, 19, -26, 19)])[0]
        across = np.clip(xs / np.maximum(26 * (np.minimum(ys, 19) + 28) / 47, 1), -1, 1)
        mask, shade, shine = _light_round(np.maximum(flat, bowl), across * 0.95, np.zeros_like(xs) - 0.25)
        return mask, shade, np.asarray(shine * 0.8, np.float32)
    across = (xs + 8) / 19  # a mug
    body = (np.abs(across) <= 1) & (ys >= -18) & (ys <= 19 + 7 * np.sqrt(np.clip(1 - across**2, 0, 1)))
    handle = (np.abs(np.hypot((xs - 10.5) / 0.95, ys - 2) - 12) <= 3.6) & ~body
    rim = across**2 + ((ys + 18) / 8.5) ** 2 <= 1
    mouth = ((xs + 8) / 15.5) ** 2 + ((ys + 18) / 6) ** 2 <= 1
    mask, shade, shine = _light_round(handle | body | rim, np.clip(across, -1, 1) * 0.95, np.zeros_like(xs) - 0.2)
    for where, tone in ((handle, 0.68), (rim, 1.0), (mouth, 0.26)):
        shade = np.where(where, np.float32(tone), shade)
    return mask, shade, np.where(rim & ~mouth, np.float32(0.35), np.where(mouth | handle, np.float32(0), shine))


@cache
def _shape_relief(shape: str) -> tuple[Relief, Image.Image]:
    """The relief of a shape with a darkened outline, and its soft shadow on the table."""
    mask, shade, shine = _raise_shape(shape)
    solid = Image.fromarray((mask * 255).astype(np.uint8))
    inner = np.asarray(solid.filter(ImageFilter.MinFilter(2 * _OVER - 1)), np.float32) / 255
    shade = np.where(inner > 0.5, shade, shade * np.float32(0.62))
    shadow = pen_sprite((_CANVAS, _CANVAS), [["ellipse", 120, 13, 60, 72, 71]], mode="L")
    return (mask, shade, shine * inner), shadow.filter(ImageFilter.GaussianBlur(2.5 * _OVER))


@cache
def object_sprite(colour: str, shape: str, scale: float) -> Image.Image:
    """An object and its shadow."""
    (mask, shade, shine), shadow = _shape_relief(shape)
    base = np.asarray(COLOURS[colour], np.float32)
    pixels = np.clip(base * shade[:, :, None], 0, 255) * (1 - shine[:, :, None]) + 255 * shine[:, :, None]
    sprite = Image.new("RGBA", shadow.size, (*_INK, 0))
    sprite.putalpha(shadow)
    sprite.paste(_to_image(pixels).convert("RGBA"), (0, 0), Image.fromarray((mask * 255).astype(np.uint8)))
    side = round(_CANVAS * scale)
    return sprite.resize((side, side), Image.Resampling.LANCZOS)


def draw_scene(objects: tuple[tuple[str, str], ...], variant: int) -> Image.Image:
    """Three (colour, shape) objects side by side on a table before a wall, centred near x = 32, 96, 160 and y = 98."""
    rng = random.Random(derive_seed("scene", objects, variant))
    wall, table, layout = _WALLS[rng.randrange(6)], _TABLES[rng.randrange(6)], rng.randrange(4)
    edge, centre = (54, 58, 62, 66)[layout], ((30, 20), (160, 20), (96, 60), (60, 120))[layout]
    image = _paint_ground(((wall, -14, 10, edge), (table, 4, -26, SIZE - edge)), centre, 0.22).copy()
    for position, (colour, shape) in enumerate(objects):
        sprite = object_sprite(colour, shape, rng.choice(_SCALES))
        x = 32 + 64 * position + rng.randint(-4, 4) - sprite.width // 2
        y = 98 + rng.randint(-4, 4) - sprite.height // 2
        image.paste(sprite, (x, y), sprite)
    return image.point(_light_table(rng.randrange(9)))


# --- garments ---------------------------------------------------------------------------------------------------------


@cache
def _fold_shade() -> Image.Image:
    """Light on cloth (RGB factors): brightest left of the middle, with soft folds below the waist."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    across = (xs - 88) / 80
    below = np.clip((ys - 98) / 80, 0, 1)
    fan = (xs - 96) / (1 + 0.9 * below)
    shade = 1 - 0.22 * across * across - 0.08 * below * (1 + np.sin(fan * 0.42))
    return Image.merge("RGB", [_to_image(np.asarray(shade * 255, np.float32))] * 3)


@cache
def _garment_sprite(
    kind: str, length: str, sleeves: str, collar: str, belt: bool
) -> tuple[Image.Image, Image.Image, Image.Image, tuple[int, int, int, int]]:
    """(mask, ink, shadow, box): coverage (L), what is painted over the cloth (RGBA), the shadow it throws (L).

    All three are cropped to `box`, (left, top, right, bottom) in image pixels.
    """
    bare = sleeves == "sleeveless"
    body = [f"{kind} {length} bare"] if bare else [f"{sleeves} sleeves", f"{kind} {length}"]
    trim = [f"{kind} {length} {collar}", collar, f"{kind} belt" if belt else ""]
    parts = [SPRITES["garments"].get(name, {}) for name in (*body, "band" if collar == "high" else "", *trim)]
    cloth, details = ([command for part in parts for command in part.get(layer, [])] for layer in ("cloth", "ink"))
    mask, ink = pen_sprite((SIZE, SIZE), cloth, mode="L"), pen_sprite((SIZE, SIZE), details)
    small, small_ink = reduce(mask), reduce(ink)
    small_ink.putalpha(reduce(ImageChops.multiply(ink.getchannel("A"), mask)))
    shadow = small.filter(ImageFilter.GaussianBlur(5)).point([value * 2 // 5 for value in range(256)])
    box = shadow.getbbox() or (0, 0, SIZE, SIZE)
    return small.crop(box), small_ink.crop(box), shadow.crop(box), box


@cache
def _pattern_mask(pattern: str) -> Image.Image:
    return reduce(pen_sprite((SIZE, SIZE), SPRITES["patterns"][pattern], mode="L"))


def draw_garment(
    kind: str, colour: str, pattern: tuple[str, str | None], length: str, sleeves: str, collar: str, belt: bool, variant: int
) -> Image.Image:
    """One garment on a plain backdrop.

    `pattern` is plain, stripes, dots or checks, and a colour unless plain; `sleeves` sleeveless, short or long;
    `collar` round, v or high.
    """
    rng = random.Random(derive_seed("garment", kind, colour, *pattern, length, sleeves, collar, belt, variant))
    mask, ink, shadow, box = _garment_sprite(kind, length, sleeves, collar, belt)
    cloth = Image.new("RGB", mask.size, COLOURS[colour])
    if pattern[1] is not None:
        cloth.paste(COLOURS[pattern[1]], (0, 0), _pattern_mask(pattern[0]).crop(box))
    cloth = ImageChops.multiply(cloth, _fold_shade().crop(box))
    cloth.paste(ink, (0, 0), ink)
    scale = rng.choice(_SCALES) * 0.95
    size = (round(mask.width * scale), round(mask.height * scale))
    x = round(96 + (box[0] - 96) * scale) + rng.randint(-4, 4)
    y = round(97 + (box[1] - 97) * scale) + rng.randint(-3, 3)
    wall, centre = _WALLS[rng.randrange(6)], ((40, 40), (150, 40), (96, 90), (96, 150))[rng.randrange(4)]
    image = _paint_ground(((wall, -44, -64, SIZE),), centre, 0.3).copy()
    image.paste(_INK, (x + 5, y + 5), shadow.resize(size, Image.Resampling.BILINEAR))
    image.paste(cloth.resize(size, Image.Resampling.BILINEAR), (x, y), mask.resize(size, Image.Resampling.BILINEAR))
    return image.point(_light_table(rng.randrange(9)))
