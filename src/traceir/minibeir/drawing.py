"""Images of scenes and garments, and the pen that draws every sprite.

Sprites are drawn at four times their size, reduced once and cached; an image (192 x 192, RGB) is a few pastes. A `variant` sets
background, light, place and scale, and never what is depicted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from traceir.minibeir.rows import derive_seed

SIZE = 192
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 38),
    "yellow": (252, 208, 30),
    "green": (38, 168, 66),
    "blue": (32, 92, 230),
    "purple": (150, 52, 192),
    "white": (248, 248, 244),
}
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
Point = tuple[float, float]
Colour = str | int | tuple[int, ...]


class Pen:
    """Draws on a transparent ground of `width` x `height` pixels, in those units and at four times the size."""

    def __init__(self, width: int = SIZE, height: int = SIZE, mode: str = "RGBA") -> None:
        self.size = (width, height)
        self.image = Image.new(mode, (width * _OVER, height * _OVER), 0)
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self._draw.polygon([(x * _OVER, y * _OVER) for x, y in points], fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        self._draw.line([(x * _OVER, y * _OVER) for x, y in points], fill=fill, width=round(width * _OVER), joint="curve")

    def ellipse(self, box: Sequence[float], fill: Colour) -> None:
        self._draw.ellipse([side * _OVER for side in box], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def box(self, box: Sequence[float], fill: Colour, radius: float = 0) -> None:
        self._draw.rounded_rectangle([side * _OVER for side in box], radius * _OVER, fill=fill)

    def play(self, commands: Sequence[Sequence[Any]], palette: Mapping[str, Colour]) -> None:
        """Draws a sprite of sprites.json: [polygon, colour, x, y, ...], [line, colour, width, x, y, ...], [ellipse, colour, left,
        top, right, bottom], [box, colour, left, top, right, bottom, radius]. No colour makes transparent again."""
        for shape, colour, *numbers in commands:
            fill = palette.get(colour, colour) if colour else (0, 0, 0, 0)
            if shape == "polygon":
                self.polygon(pair(numbers), fill)
            elif shape == "line":
                self.line(pair(numbers[1:]), fill, numbers[0])
            elif shape == "ellipse":
                self.ellipse(numbers, fill)
            else:
                self.box(numbers[:4], fill, *numbers[4:])

    def reduce(self) -> Image.Image:
        """What was drawn, in its true size."""
        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def pair(numbers: Sequence[float]) -> list[Point]:
    """Points from x, y, x, y and so on."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


# --- light and background ---------------------------------------------------------------------------------------------


def _blend_rows(colour: tuple[int, int, int], top: int, bottom: int, rows: int) -> FloatArray:
    """A colour made lighter by `top` at the top and by `bottom` at the bottom."""
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    upper, lower = (np.asarray([part + by for part in colour], np.float32) for by in (top, bottom))
    return np.asarray(upper * (1 - share) + lower * share)


def _glow(centre: Point, strength: float) -> FloatArray:
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    distance = np.hypot(xs - centre[0], ys - centre[1]) / SIZE
    return np.asarray(1 + strength * (0.5 - distance), np.float32)[:, :, None]


def _to_image(pixels: FloatArray) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


@cache
def _paint_table(wall: int, table: int, layout: int) -> Image.Image:
    """A wall above a table top; `layout` (0 to 3) sets the table's edge and where the light falls."""
    edge = (54, 58, 62, 66)[layout]
    pixels = np.empty((SIZE, SIZE, 3), np.float32)
    pixels[:edge] = _blend_rows(_WALLS[wall], -14, 10, edge)
    pixels[edge:] = _blend_rows(_TABLES[table], 4, -26, SIZE - edge)
    pixels[edge - 1 : edge + 2] *= 0.86
    return _to_image(pixels * _glow(((30, 20), (160, 20), (96, 60), (60, 120))[layout], 0.22))


@cache
def _paint_backdrop(wall: int, layout: int) -> Image.Image:
    """A plain soft backdrop, lighter where the light falls."""
    pixels = _blend_rows(_WALLS[wall], -44, -64, SIZE) * np.ones((1, SIZE, 1), np.float32)
    return _to_image(pixels * _glow(((40, 40), (150, 40), (96, 90), (96, 150))[layout], 0.3))


@cache
def _light_table(light: int) -> list[int]:
    """A lookup table for `Image.point`: one of nine lights, brightness within 6 % and warmth within 2 %."""
    brightness = (0.95, 1.0, 1.04)[light % 3]
    warmth = (-0.02, 0.0, 0.02)[light // 3]
    gains = (brightness * (1 + warmth), brightness, brightness * (1 - warmth))
    return [min(255, round(value * gain)) for gain in gains for value in range(256)]


# --- objects of a scene -----------------------------------------------------------------------------------------------
# A relief is (mask, shade, shine) at four times the size: coverage, factor on the colour, share of white mixed in.

Relief = tuple[FloatArray, FloatArray, FloatArray]


def _grid() -> tuple[FloatArray, FloatArray]:
    """Coordinates of the sprite in image pixels, the origin in its middle."""
    ys, xs = np.mgrid[0 : _CANVAS * _OVER, 0 : _CANVAS * _OVER].astype(np.float32)
    return (xs + 0.5) / _OVER - _CANVAS / 2, (ys + 0.5) / _OVER - _CANVAS / 2


def _fill(points: Sequence[Point]) -> FloatArray:
    pen = Pen(_CANVAS, _CANVAS, "L")
    pen.polygon([(x + _CANVAS / 2, y + _CANVAS / 2) for x, y in points], 255)
    return np.asarray(pen.image, np.float32) / 255


def _stack(faces: Sequence[tuple[Sequence[Point], float, float]]) -> Relief:
    """Flat faces, each (points, shade, shine); later ones cover earlier ones."""
    mask, shade, shine = (np.zeros((_CANVAS * _OVER, _CANVAS * _OVER), np.float32) for _ in range(3))
    for points, tone, gloss in faces:
        face = _fill(points)
        mask = np.maximum(mask, face)
        shade = np.where(face > 0, np.float32(tone), shade)
        shine = np.where(face > 0, np.float32(gloss), shine)
    return mask, shade, shine


def _round_light(nx: FloatArray, ny: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Shade and shine of a round surface from the x and y of its normal, light from the upper left."""
    nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0, 1))
    facing = np.clip(-0.45 * nx - 0.55 * ny + 0.70 * nz, 0, 1)
    return np.asarray(0.50 + 0.55 * facing, np.float32), np.asarray(0.55 * np.clip(facing, 0, 1) ** 14, np.float32)


def _relief_cube() -> Relief:
    front = [(-26.0, -14.0), (14, -14), (14, 26), (-26, 26)]
    top = [(-26.0, -14.0), (-12, -26), (26, -26), (14, -14)]
    side = [(14.0, -14.0), (26, -26), (26, 13), (14, 26)]
    return _stack([(front, 0.94, 0.0), (top, 1.0, 0.38), (side, 0.56, 0.0)])


def _relief_ball() -> Relief:
    xs, ys = _grid()
    return (np.hypot(xs, ys) <= 26).astype(np.float32), *_round_light(xs / 26, ys / 26)


def _relief_cone() -> Relief:
    xs, ys = _grid()
    bowl = ((xs / 26) ** 2 + ((ys - 19) / 7) ** 2 <= 1).astype(np.float32)
    mask = np.maximum(_fill([(0, -28), (26, 19), (-26, 19)]), bowl)
    across = np.clip(xs / np.maximum(26 * (np.minimum(ys, 19) + 28) / 47, 1), -1, 1)
    shade, shine = _round_light(across * 0.95, np.zeros_like(xs) - 0.25)
    return mask, shade, np.asarray(shine * 0.8, np.float32)


def _relief_ring() -> Relief:
    xs, ys = _grid()
    radius = np.hypot(xs, ys)
    across = (radius - 19.5) / 7.5
    light = _round_light(across * xs / np.maximum(radius, 1), across * ys / np.maximum(radius, 1))
    return (np.abs(across) <= 1).astype(np.float32), *light


def _relief_star() -> Relief:
    radii = (29.0, 12.5)
    tips = [(math.sin(i * math.pi / 5) * radii[i % 2], 2 - math.cos(i * math.pi / 5) * radii[i % 2]) for i in range(10)]
    tones = (0.74, 0.62, 0.90, 0.58, 0.92, 0.66, 1.0, 0.72, 1.0, 1.0)
    return _stack([([(0, 2), tips[i], tips[(i + 1) % 10]], tones[i], 0.25 if i in (6, 8) else 0.0) for i in range(10)])


def _relief_mug() -> Relief:
    xs, ys = _grid()
    across = (xs + 8) / 19
    handle = np.abs(np.hypot((xs - 10.5) / 0.95, ys - 2) - 12) <= 3.6
    body = (np.abs(across) <= 1) & (ys >= -18) & (ys <= 19 + 7 * np.sqrt(np.clip(1 - across**2, 0, 1)))
    rim = across**2 + ((ys + 18) / 8.5) ** 2 <= 1
    mouth = ((xs + 8) / 15.5) ** 2 + ((ys + 18) / 6) ** 2 <= 1
    shade, shine = _round_light(np.clip(across, -1, 1) * 0.95, np.zeros_like(xs) - 0.2)
    for where, tone in ((handle & ~body, 0.68), (rim, 1.0), (mouth, 0.26)):
        shade = np.where(where, np.float32(tone), shade)
    shine = np.where(rim & ~mouth, np.float32(0.35), np.where(mouth | (handle & ~body), np.float32(0), shine))
    return (handle | body | rim).astype(np.float32), shade, shine


_RELIEFS: dict[str, Callable[[], Relief]] = dict(
    zip(SHAPES, (_relief_cube, _relief_ball, _relief_cone, _relief_ring, _relief_star, _relief_mug), strict=True)
)


@cache
def _shape_relief(shape: str) -> tuple[Relief, Image.Image]:
    """The relief of a shape with a darkened outline, and its soft shadow on the table."""
    mask, shade, shine = _RELIEFS[shape]()
    solid = Image.fromarray((mask * 255).astype(np.uint8))
    inner = np.asarray(solid.filter(ImageFilter.MinFilter(2 * _OVER - 1)), np.float32) / 255
    shade = np.where(inner > 0.5, shade, shade * np.float32(0.62))
    pen = Pen(_CANVAS, _CANVAS, "L")
    pen.ellipse((_CANVAS / 2 - 27, _CANVAS / 2 + 20, _CANVAS / 2 + 32, _CANVAS / 2 + 31), 120)
    return (mask, shade, shine * inner), pen.image.filter(ImageFilter.GaussianBlur(2.5 * _OVER))


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
    """Three (colour, shape) objects side by side on a table, centred near x = 32, 96, 160 and y = 98."""
    rng = random.Random(derive_seed("scene", objects, variant))
    image = _paint_table(rng.randrange(6), rng.randrange(6), rng.randrange(4)).copy()
    for place, (colour, shape) in enumerate(objects):
        sprite = object_sprite(colour, shape, rng.choice(_SCALES))
        x = 32 + 64 * place + rng.randint(-4, 4) - sprite.width // 2
        y = 98 + rng.randint(-4, 4) - sprite.height // 2
        image.paste(sprite, (x, y), sprite)
    return image.point(_light_table(rng.randrange(9)))


# --- garments ---------------------------------------------------------------------------------------------------------
# Half a cut is a list of points (x from the middle line, y from the top) in image pixels; the other half mirrors it.

_WAIST = 98
_WAISTS = {"dress": 25, "shirt": 34, "coat": 37, "jumpsuit": 29}
_HEMS = {
    "dress": {"short": (48, 136), "long": (66, 184)},
    "shirt": {"short": (35, 120), "long": (37, 150)},
    "coat": {"short": (45, 136), "long": (52, 184)},
    "jumpsuit": {"short": (40, 138), "long": (42, 184)},
}
"""Half the width of the hem and its height, by type and length."""


def _mirror(half: Sequence[Point]) -> list[Point]:
    """The closed outline from its right half, given from the top downwards."""
    return [(96 + x, y) for x, y in half] + [(96 - x, y) for x, y in reversed(half)]


def _body_outline(kind: str, length: str, sleeves: str) -> list[Point]:
    hem, bottom = _HEMS[kind][length]
    waist = _WAISTS[kind]
    bare: list[Point] = [(15, 33), (27, 36), (25, 48), (25, 58), (29, 68), (33, 74)]
    half = [*(bare if sleeves == "sleeveless" else [(15, 33), (38, 40), (34, 74)]), (waist, _WAIST)]
    if kind == "dress":
        half += [(waist + 0.42 * (hem - waist), _WAIST + 0.3 * (bottom - _WAIST))]
    if kind == "jumpsuit":
        half += [(36, 114), (hem, bottom), (11, bottom), (3, 116)]
    elif kind == "coat":
        half += [(hem, bottom), (1.2, bottom), (0, bottom - 8)]
    else:
        half += [(hem, bottom - 3), (hem * 0.5, bottom), (0, bottom + 1)]
    return _mirror(half)


def _collar_cut(collar: str) -> list[Point]:
    """What the neck opening shows of the inside; for a high collar the band that stands above the shoulders."""
    if collar == "v":
        return _mirror([(0, 31), (17, 31), (19, 34), (0, 78)])
    if collar == "round":
        arc = [(19 * math.cos(a * math.pi / 16), 33 + 19 * math.sin(a * math.pi / 16)) for a in range(9)]
        return _mirror([(0, 31), (17, 31), *arc])
    return _mirror([(0, 10), (15, 11), (16, 36), (10, 41), (0, 42)])


def _draw_closures(ink: Pen, kind: str, bottom: int, collar: str) -> None:
    top = {"v": 78, "round": 52, "high": 40}[collar]
    if kind == "coat":
        ink.line([(96, top), (96, bottom)], (*_INK, 240), 4.4)
        for y in range(82 if top < 80 else 84, bottom - 12, 17):
            for x in (82, 110):
                ink.disc(x, y, 3.6, (*_INK, 240))
                ink.disc(x - 0.8, y - 0.8, 1.4, (230, 225, 215, 255))
    if kind == "shirt":
        ink.line([(96, top), (96, bottom)], (*_INK, 80), 1.4)
        for y in range(84, bottom - 4, 11):
            ink.disc(99.5, y, 1.8, (*_INK, 200))


def _draw_trim(ink: Pen, kind: str, collar: str, belt: bool) -> None:
    """Collar and belt."""
    if collar == "high":
        ink.line([(80, 35), (88, 40.5), (96, 42), (104, 40.5), (112, 35)], (*_INK, 170), 2)
        ink.line([(82, 21), (96, 24), (110, 21)], (*_INK, 110), 1.6)
    else:
        cut = _collar_cut(collar)
        ink.polygon(cut, (58, 54, 64, 255))
        ink.line([*cut, cut[0]], (*_INK, 200), 1.6)
    if belt:
        half = _WAISTS[kind] + 1
        ink.polygon(_mirror([(half, _WAIST - 7), (half, _WAIST + 7)]), (18, 17, 22, 255))
        ink.line([(88, 93), (104, 93), (104, 103), (88, 103), (88, 92.2)], (232, 196, 96, 255), 2.6)


@cache
def _fold_shade() -> Image.Image:
    """Light on cloth (RGB factors): brightest left of the middle, with soft folds below the waist."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    across = (xs - 88) / 80
    below = np.clip((ys - _WAIST) / 80, 0, 1)
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
    mask, ink = Pen(mode="L"), Pen()
    outlines = [_body_outline(kind, length, sleeves)]
    if sleeves != "sleeveless":
        share = 0.4 if sleeves == "short" else 1.0
        sleeve = [(37.0, 40.0), (39 + 42 * share, 40 + 84 * share), (33 + 30 * share, 66 + 66 * share), (33, 74)]
        outlines = [[(96 + side * x, y) for x, y in sleeve] for side in (1, -1)] + outlines
    for outline in outlines:
        mask.polygon(outline, 255)
        closed = [*outline, outline[0]] if outline is outlines[-1] else outline
        ink.line(closed, (*_INK, 125), 3.2)
    if collar == "high":
        band = _collar_cut(collar)
        mask.polygon(band, 255)
        ink.line([*band, band[0]], (*_INK, 125), 3)
    _draw_closures(ink, kind, _HEMS[kind][length][1], collar)
    _draw_trim(ink, kind, collar, belt)
    small, small_ink = mask.reduce(), ink.reduce()
    alpha = ImageChops.multiply(ink.image.getchannel("A"), mask.image)
    small_ink.putalpha(alpha.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    shadow = small.filter(ImageFilter.GaussianBlur(5)).point([value * 2 // 5 for value in range(256)])
    box = shadow.getbbox() or (0, 0, SIZE, SIZE)
    return small.crop(box), small_ink.crop(box), shadow.crop(box), box


@cache
def _pattern_mask(pattern: str) -> Image.Image:
    pen = Pen(mode="L")
    if pattern == "stripes":
        for y in range(4, SIZE, 24):
            pen.polygon([(0, y), (SIZE, y), (SIZE, y + 8.5), (0, y + 8.5)], 255)
    elif pattern == "dots":
        for row, y in enumerate(range(7, SIZE, 20)):
            for x in range(16 * (row % 2), SIZE + 8, 32):
                pen.disc(x, y, 8, 255)
    else:
        for at in range(12, SIZE, 32):
            pen.polygon([(at - 3.5, 0), (at + 3.5, 0), (at + 3.5, SIZE), (at - 3.5, SIZE)], 255)
            pen.polygon([(0, at - 3.5), (0, at + 3.5), (SIZE, at + 3.5), (SIZE, at - 3.5)], 255)
    return pen.reduce()


def draw_garment(
    kind: str, colour: str, pattern: tuple[str, str | None], length: str, sleeves: str, collar: str, belt: bool, variant: int
) -> Image.Image:
    """One garment on a plain backdrop.

    `pattern` is (plain, None), or stripes, dots or checks and a colour; `sleeves` sleeveless, short or long; `collar` round, v or
    high.
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
    image = _paint_backdrop(rng.randrange(6), rng.randrange(4)).copy()
    image.paste(_INK, (x + 5, y + 5), shadow.resize(size, Image.Resampling.BILINEAR))
    image.paste(cloth.resize(size, Image.Resampling.BILINEAR), (x, y), mask.resize(size, Image.Resampling.BILINEAR))
    return image.point(_light_table(rng.randrange(9)))
