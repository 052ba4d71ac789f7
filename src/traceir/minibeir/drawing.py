"""What the drawn worlds share: stable seeds and splits, the palette, and the pictures of scenes and of garments.

Sprites are drawn at four times their size, reduced once and cached; a picture (192 x 192, RGB) is a few pastes. A
`variant` sets background, light, place and scale, and never what is depicted.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from traceir.errors import InputError
from traceir.minibeir.draft import Split

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
VARIANTS = 1000

_OVER = 4  # oversampling of sprites
_CANVAS = 80  # side of an object's sprite, in picture pixels, shadow included
_SCALES = (0.94, 0.97, 1.0, 1.03, 1.06)
_WALLS = ((188, 200, 214), (210, 200, 184), (184, 206, 194), (208, 190, 198), (176, 188, 210), (214, 208, 200))
_TABLES = ((164, 138, 110), (120, 128, 140), (150, 126, 108), (112, 128, 124), (166, 150, 130), (132, 120, 134))
_INK = (26, 24, 32)

FloatArray = NDArray[np.floating[Any]]
Point = tuple[float, float]


def derive_seed(*parts: object) -> int:
    """A 64-bit seed from the parts' text: the same on every machine and in every process."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_of(code: str) -> Split:
    """The split that owns a composition: 80 % train, 5 % val, 15 % test, by a stable hash of its compact code."""
    place = derive_seed("split", code) % 100
    return "train" if place < 80 else "val" if place < 85 else "test"


def canonical_variant(code: str) -> int:
    """The one variant in which a composition stands in candidate pools, so that no pool holds it twice."""
    return derive_seed("canonical", code) % VARIANTS


# --- light and background ---------------------------------------------------------------------------------------------


def _blend_rows(top: tuple[int, int, int], bottom: tuple[int, int, int], rows: int) -> FloatArray:
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return np.asarray(top, np.float32) * (1 - share) + np.asarray(bottom, np.float32) * share


def _lighten(colour: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    return colour[0] + by, colour[1] + by, colour[2] + by


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
    pixels[:edge] = _blend_rows(_lighten(_WALLS[wall], -14), _lighten(_WALLS[wall], 10), edge)
    pixels[edge:] = _blend_rows(_lighten(_TABLES[table], 4), _lighten(_TABLES[table], -26), SIZE - edge)
    pixels[edge - 1 : edge + 2] *= 0.86
    return _to_image(pixels * _glow(((30, 20), (160, 20), (96, 60), (60, 120))[layout], 0.22))


@cache
def _paint_backdrop(wall: int, layout: int) -> Image.Image:
    """A plain soft backdrop, lighter where the light falls."""
    tint = _lighten(_WALLS[wall], -52)
    pixels = _blend_rows(_lighten(tint, 8), _lighten(tint, -12), SIZE) * np.ones((1, SIZE, 1), np.float32)
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
    """Coordinates of the sprite in picture pixels, the origin in its middle."""
    ys, xs = np.mgrid[0 : _CANVAS * _OVER, 0 : _CANVAS * _OVER].astype(np.float32)
    return (xs + 0.5) / _OVER - _CANVAS / 2, (ys + 0.5) / _OVER - _CANVAS / 2


def _fill(points: list[Point]) -> FloatArray:
    image = Image.new("L", (_CANVAS * _OVER, _CANVAS * _OVER), 0)
    moved = [((x + _CANVAS / 2) * _OVER, (y + _CANVAS / 2) * _OVER) for x, y in points]
    ImageDraw.Draw(image).polygon(moved, fill=255)
    return np.asarray(image, np.float32) / 255


def _layer(parts: list[tuple[FloatArray, float, float]]) -> Relief:
    """Stack flat faces, each (mask, shade, shine); later ones cover earlier ones."""
    mask, shade, shine = (np.zeros((_CANVAS * _OVER, _CANVAS * _OVER), np.float32) for _ in range(3))
    for face, tone, gloss in parts:
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
    front = _fill([(-26, -14), (14, -14), (14, 26), (-26, 26)])
    top = _fill([(-26, -14), (-12, -26), (26, -26), (14, -14)])
    side = _fill([(14, -14), (26, -26), (26, 13), (14, 26)])
    return _layer([(front, 0.94, 0.0), (top, 1.0, 0.38), (side, 0.56, 0.0)])


def _relief_ball() -> Relief:
    xs, ys = _grid()
    shade, shine = _round_light(xs / 26, ys / 26)
    return (np.hypot(xs, ys) <= 26).astype(np.float32), shade, shine


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
    shade, shine = _round_light(across * xs / np.maximum(radius, 1), across * ys / np.maximum(radius, 1))
    return (np.abs(across) <= 1).astype(np.float32), shade, shine


def _relief_star() -> Relief:
    radii = (29.0, 12.5)
    tips = [(math.sin(i * math.pi / 5) * radii[i % 2], 2 - math.cos(i * math.pi / 5) * radii[i % 2]) for i in range(10)]
    tones = (0.74, 0.62, 0.90, 0.58, 0.92, 0.66, 1.0, 0.72, 1.0, 1.0)
    faces = [(_fill([(0, 2), tips[i], tips[(i + 1) % 10]]), tones[i], 0.25 if i in (6, 8) else 0.0) for i in range(10)]
    return _layer(faces)


def _relief_mug() -> Relief:
    xs, ys = _grid()
    across = (xs + 8) / 19
    handle = np.abs(np.hypot((xs - 10.5) / 0.95, ys - 2) - 12) <= 3.6
    body = (np.abs(across) <= 1) & (ys >= -18) & (ys <= 19 + 7 * np.sqrt(np.clip(1 - across**2, 0, 1)))
    rim = across**2 + ((ys + 18) / 8.5) ** 2 <= 1
    mouth = ((xs + 8) / 15.5) ** 2 + ((ys + 18) / 6) ** 2 <= 1
    shade, shine = _round_light(np.clip(across, -1, 1) * 0.95, np.zeros_like(xs) - 0.2)
    shade = np.where(handle & ~body, np.float32(0.68), shade)
    shade = np.where(rim, np.float32(1.0), shade)
    shade = np.where(mouth, np.float32(0.26), shade)
    shine = np.where(rim & ~mouth, np.float32(0.35), np.where(mouth | (handle & ~body), np.float32(0), shine))
    return (handle | body | rim).astype(np.float32), shade, shine


_RELIEFS: dict[str, Callable[[], Relief]] = {
    "cube": _relief_cube,
    "ball": _relief_ball,
    "cone": _relief_cone,
    "ring": _relief_ring,
    "star": _relief_star,
    "mug": _relief_mug,
}


@cache
def _shape_relief(shape: str) -> tuple[Relief, Image.Image]:
    """The relief of a shape with a darkened outline, and its soft shadow on the table."""
    mask, shade, shine = _RELIEFS[shape]()
    solid = Image.fromarray((mask * 255).astype(np.uint8))
    inner = np.asarray(solid.filter(ImageFilter.MinFilter(2 * _OVER - 1)), np.float32) / 255
    shade = np.where(inner > 0.5, shade, shade * np.float32(0.62))
    shine = shine * inner
    shadow = Image.new("L", solid.size, 0)
    middle, floor = _CANVAS * _OVER / 2, (_CANVAS / 2 + 25) * _OVER
    ImageDraw.Draw(shadow).ellipse((middle - 27 * _OVER, floor - 5 * _OVER, middle + 32 * _OVER, floor + 6 * _OVER), fill=120)
    return (mask, shade, shine), shadow.filter(ImageFilter.GaussianBlur(2.5 * _OVER))


@cache
def _object_sprite(colour: str, shape: str, scale: float) -> Image.Image:
    (mask, shade, shine), shadow = _shape_relief(shape)
    base = np.asarray(COLOURS[colour], np.float32)
    pixels = np.clip(base * shade[:, :, None], 0, 255) * (1 - shine[:, :, None]) + 255 * shine[:, :, None]
    sprite = Image.new("RGBA", shadow.size, (*_INK, 0))
    sprite.putalpha(shadow)
    solid = _to_image(pixels).convert("RGBA")
    sprite.paste(solid, (0, 0), Image.fromarray((mask * 255).astype(np.uint8)))
    side = round(_CANVAS * scale)
    return sprite.resize((side, side), Image.Resampling.LANCZOS)


def draw_scene(objects: tuple[tuple[str, str], ...], variant: int) -> Image.Image:
    """Three (colour, shape) objects side by side on a table, centred near x = 32, 96, 160 and y = 98."""
    rng = random.Random(derive_seed("scene", objects, variant))
    image = _paint_table(rng.randrange(6), rng.randrange(6), rng.randrange(4)).copy()
    for place, (colour, shape) in enumerate(objects):
        sprite = _object_sprite(colour, shape, rng.choice(_SCALES))
        x = 32 + 64 * place + rng.randint(-4, 4) - sprite.width // 2
        y = 98 + rng.randint(-4, 4) - sprite.height // 2
        image.paste(sprite, (x, y), sprite)
    return image.point(_light_table(rng.randrange(9)))


# --- garments ---------------------------------------------------------------------------------------------------------
# Half a cut is a list of points (x from the middle line, y from the top) in picture pixels; the other half mirrors it.

GARMENT_TYPES = ("dress", "shirt", "coat", "jumpsuit")
_WAIST = 98
_WAISTS = {"dress": 25, "shirt": 34, "coat": 37, "jumpsuit": 29}
_HEMS = {
    ("dress", "short"): (48, 136),
    ("dress", "long"): (66, 184),
    ("shirt", "short"): (35, 120),
    ("shirt", "long"): (37, 150),
    ("coat", "short"): (45, 136),
    ("coat", "long"): (52, 184),
    ("jumpsuit", "short"): (40, 138),
    ("jumpsuit", "long"): (42, 184),
}


def _mirror(half: list[Point]) -> list[Point]:
    """The closed outline from its right half, given from the top downwards."""
    return [(96 + x, y) for x, y in half] + [(96 - x, y) for x, y in reversed(half)]


def _body_outline(kind: str, length: str, sleeves: str) -> list[Point]:
    hem, bottom = _HEMS[kind, length]
    if sleeves == "sleeveless":
        half: list[Point] = [(15, 33), (27, 36), (25, 48), (25, 58), (29, 68), (33, 74)]
    else:
        half = [(15, 33), (38, 40), (34, 74)]
    half.append((_WAISTS[kind], _WAIST))
    if kind == "dress":
        half += [(_WAISTS[kind] + 0.42 * (hem - _WAISTS[kind]), _WAIST + 0.3 * (bottom - _WAIST))]
    if kind == "jumpsuit":
        half += [(36, 114), (hem, bottom), (11, bottom), (3, 116)]
    elif kind == "coat":
        half += [(hem, bottom), (1.2, bottom), (0, bottom - 8)]
    else:
        half += [(hem, bottom - 3), (hem * 0.5, bottom), (0, bottom + 1)]
    return _mirror(half)


def _sleeve_outline(sleeves: str) -> list[Point]:
    """The right sleeve from the shoulder round to the armpit; the left one is its mirror image."""
    share = 0.4 if sleeves == "short" else 1.0
    outer = (39 + 42 * share, 40 + 84 * share)
    inner = (33 + 30 * share, 66 + 66 * share)
    return [(37, 40), outer, inner, (33, 74)]


def _collar_cut(collar: str) -> list[Point]:
    """What the neck opening shows of the inside; for a high collar the band that stands above the shoulders."""
    if collar == "v":
        return _mirror([(0, 31), (17, 31), (19, 34), (0, 78)])
    if collar == "round":
        arc = [(19 * math.cos(a * math.pi / 16), 33 + 19 * math.sin(a * math.pi / 16)) for a in range(9)]
        return _mirror([(0, 31), (17, 31), *arc])
    return _mirror([(0, 10), (15, 11), (16, 36), (10, 41), (0, 42)])


def _canvas(mode: str) -> Image.Image:
    return Image.new(mode, (SIZE * _OVER, SIZE * _OVER), 0)


def _polygon(image: Image.Image, points: list[Point], fill: int | tuple[int, ...]) -> None:
    ImageDraw.Draw(image).polygon([(x * _OVER, y * _OVER) for x, y in points], fill=fill)


def _stroke(image: Image.Image, points: list[Point], fill: tuple[int, ...], width: float) -> None:
    scaled = [(x * _OVER, y * _OVER) for x, y in points]
    ImageDraw.Draw(image).line(scaled, fill=fill, width=round(width * _OVER), joint="curve")


def _disc(image: Image.Image, x: float, y: float, radius: float, fill: tuple[int, ...] | int) -> None:
    corners = ((x - radius) * _OVER, (y - radius) * _OVER, (x + radius) * _OVER, (y + radius) * _OVER)
    ImageDraw.Draw(image).ellipse(corners, fill=fill)


def _reduce(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _draw_details(ink: Image.Image, kind: str, length: str, collar: str, belt: bool) -> None:
    """Paint closures, collar and belt over the cloth."""
    bottom = _HEMS[kind, length][1]
    top = {"v": 78, "round": 52, "high": 40}[collar]
    if kind == "coat":
        _stroke(ink, [(96, top), (96, bottom)], (*_INK, 240), 4.4)
        for y in range(82 if top < 80 else 84, bottom - 12, 17):
            for x in (82, 110):
                _disc(ink, x, y, 3.6, (*_INK, 240))
                _disc(ink, x - 0.8, y - 0.8, 1.4, (230, 225, 215, 255))
    if kind == "shirt":
        _stroke(ink, [(96, top), (96, bottom)], (*_INK, 80), 1.4)
        for y in range(84, bottom - 4, 11):
            _disc(ink, 99.5, y, 1.8, (*_INK, 200))
    if collar == "high":
        _stroke(ink, [(80, 35), (88, 40.5), (96, 42), (104, 40.5), (112, 35)], (*_INK, 170), 2)
        _stroke(ink, [(82, 21), (96, 24), (110, 21)], (*_INK, 110), 1.6)
    else:
        cut = _collar_cut(collar)
        _polygon(ink, cut, (58, 54, 64, 255))
        _stroke(ink, [*cut, cut[0]], (*_INK, 200), 1.6)
    if belt:
        half = _WAISTS[kind] + 1
        _polygon(ink, _mirror([(half, _WAIST - 7), (half, _WAIST + 7)]), (18, 17, 22, 255))
        _stroke(ink, [(88, 93), (104, 93), (104, 103), (88, 103), (88, 92.2)], (232, 196, 96, 255), 2.6)


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

    All three are cropped to `box`, (left, top, right, bottom) in picture pixels.
    """
    mask, ink = _canvas("L"), _canvas("RGBA")
    if sleeves != "sleeveless":
        for side in (1, -1):
            sleeve: list[Point] = [(96 + side * x, y) for x, y in _sleeve_outline(sleeves)]
            _polygon(mask, sleeve, 255)
            _stroke(ink, sleeve, (*_INK, 125), 3.2)
    body = _body_outline(kind, length, sleeves)
    _polygon(mask, body, 255)
    _stroke(ink, [*body, body[0]], (*_INK, 125), 3.2)
    if collar == "high":
        band = _collar_cut(collar)
        _polygon(mask, band, 255)
        _stroke(ink, [*band, band[0]], (*_INK, 125), 3)
    _draw_details(ink, kind, length, collar, belt)
    alpha = ImageChops.multiply(ink.getchannel("A"), mask)
    small_ink = _reduce(ink)
    small_ink.putalpha(_reduce(alpha))
    small = _reduce(mask)
    shadow = small.filter(ImageFilter.GaussianBlur(5)).point([value * 2 // 5 for value in range(256)])
    box = shadow.getbbox() or (0, 0, SIZE, SIZE)
    return small.crop(box), small_ink.crop(box), shadow.crop(box), box


@cache
def _pattern_mask(pattern: str) -> Image.Image:
    mask = _canvas("L")
    if pattern == "stripes":
        for y in range(4, SIZE, 24):
            _polygon(mask, [(0, y), (SIZE, y), (SIZE, y + 8.5), (0, y + 8.5)], 255)
    elif pattern == "dots":
        for row, y in enumerate(range(7, SIZE, 20)):
            for x in range(16 * (row % 2), SIZE + 8, 32):
                _disc(mask, x, y, 8, 255)
    else:
        for at in range(12, SIZE, 32):
            _polygon(mask, [(at - 3.5, 0), (at + 3.5, 0), (at + 3.5, SIZE), (at - 3.5, SIZE)], 255)
            _polygon(mask, [(0, at - 3.5), (0, at + 3.5), (SIZE, at + 3.5), (SIZE, at - 3.5)], 255)
    return _reduce(mask)


def draw_garment(
    kind: str,
    colour: str,
    pattern: str,
    pattern_colour: str | None,
    length: str,
    sleeves: str,
    collar: str,
    belt: bool,
    variant: int,
) -> Image.Image:
    """One garment on a plain backdrop.

    `pattern` is plain, stripes, dots or checks; `sleeves` sleeveless, short or long; `collar` round, v or high.
    """
    if (pattern == "plain") != (pattern_colour is None):
        raise InputError(f"pattern {pattern!r} with colour {pattern_colour!r}: give a colour exactly where there is a pattern")
    rng = random.Random(derive_seed("garment", kind, colour, pattern, pattern_colour, length, sleeves, collar, belt, variant))
    mask, ink, shadow, box = _garment_sprite(kind, length, sleeves, collar, belt)
    cloth = Image.new("RGB", mask.size, COLOURS[colour])
    if pattern_colour is not None:
        cloth.paste(COLOURS[pattern_colour], (0, 0), _pattern_mask(pattern).crop(box))
    cloth = ImageChops.multiply(cloth, _fold_shade().crop(box))
    cloth.paste(ink, (0, 0), ink)
    scale = rng.choice(_SCALES) * 0.95
    size = (round(mask.width * scale), round(mask.height * scale))
    x = round(96 + (box[0] - 96) * scale) + rng.randint(-4, 4)
    y = round(97 + (box[1] - 97) * scale) + rng.randint(-3, 3)
    image = _paint_backdrop(rng.randrange(6), rng.randrange(4)).copy()
    image.paste(_INK, (x + 5, y + 5), shadow.resize(size, Image.Resampling.BILINEAR))
    coverage = mask.resize(size, Image.Resampling.BILINEAR)
    image.paste(cloth.resize(size, Image.Resampling.BILINEAR), (x, y), coverage)
    return image.point(_light_table(rng.randrange(9)))
