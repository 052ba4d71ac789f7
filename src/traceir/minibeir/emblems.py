"""Emblems: the picture by which an entity of the encyclopedia is recognised.

The outline tells the kind of entity; field colour, charge and charge colour together tell which one. All parts are
drawn once, kept, and pasted; a picture takes about a millisecond after that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from PIL import Image, ImageChops, ImageDraw

from traceir.minibeir.draft import Sketch
from traceir.minibeir.encyclopedia import KINDS, Entity, find_entity, hash_stably, list_entities
from traceir.minibeir.pen import COLOURS, RIM, SIZE, Colour, Pen, Point, cast_shadow, paste_centred, tabulate_light

FIELDS = ("red", "yellow", "green", "blue", "purple", "white")
CHARGE_COLOURS = ("red", "yellow", "green", "blue", "white", "black")
CHARGES = ("star", "ring", "moon", "tower", "tree", "heart", "fish", "bolt")
PALE_PAIRS = frozenset({("yellow", "white"), ("white", "yellow"), ("blue", "black"), ("purple", "black"), ("purple", "blue")})
"""(field, charge) colours too close to tell apart in a small picture."""

OUTLINES: dict[str, str] = {
    "town": "shield",
    "river": "lozenge",
    "founder": "roundel",
    "land": "square",
    "sea": "hexagon",
    "master": "banner",
    "ruler": "cross",
}


def turn_points(points: Sequence[Point], x: float, y: float, size: float) -> list[Point]:
    """Points of the unit square (-1 to 1), enlarged to `size` and moved to (x, y)."""
    return [(x + px * size, y + py * size) for px, py in points]


def _trace_shield() -> list[Point]:
    side = [(math.cos(step / 12 * math.pi / 2), 0.05 + 0.95 * math.sin(step / 12 * math.pi / 2)) for step in range(13)]
    right = [(0.92 * x, y) for x, y in side]
    return [(-0.92, -0.95), (0.92, -0.95), *right, *[(-x, y) for x, y in reversed(right)]]


def _trace_circle(corners: int, phase: float = 0.0, radius: float = 1.0) -> list[Point]:
    turns = [phase + corner * 2 * math.pi / corners for corner in range(corners)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _trace_cross() -> list[Point]:
    arm = 0.52
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


OUTLINE_POINTS: dict[str, Callable[[], list[Point]]] = {
    "shield": _trace_shield,
    "lozenge": lambda: [(0, -1.06), (1.06, 0), (0, 1.06), (-1.06, 0)],
    "roundel": partial(_trace_circle, 72, 0.0, 0.97),
    "square": lambda: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "hexagon": partial(_trace_circle, 6, 0.0, 1.04),
    "banner": lambda: [(-0.72, -1.0), (0.72, -1.0), (0.72, 1.0), (0, 0.62), (-0.72, 1.0)],
    "cross": _trace_cross,
}
CHARGE_PLACES: dict[str, tuple[float, float]] = {
    "shield": (-8, 92),
    "lozenge": (0, 78),
    "banner": (-12, 90),
    "cross": (0, 86),
}
"""Height of the charge's middle and its size, in pixels; (0, 106) for the other outlines."""


@lru_cache(maxsize=176)
def _draw_outline(outline: str, field: str, size: int) -> Image.Image:
    pen = Pen(size + 20, size + 20)
    middle, half = (size + 20) / 2, size / 2
    points = OUTLINE_POINTS[outline]()
    pen.fill_polygon(turn_points(points, middle, middle, half), RIM)
    pen.fill_polygon(turn_points(points, middle, middle, half * 0.965), (214, 176, 92))
    pen.fill_polygon(turn_points(points, middle, middle, half * 0.905), RIM)
    pen.fill_polygon(turn_points(points, middle, middle, half * 0.885), COLOURS[field])
    face = pen.finish(gloss=0.2)
    shadow = cast_shadow(face)
    ground = Image.new("RGBA", face.size, (0, 0, 0, 0))
    ground.paste(shadow, (2, 5))
    return Image.alpha_composite(ground, face)


def _draw_star(pen: Pen, colour: Colour) -> None:
    turns = [(-math.pi / 2 + step * math.pi / 5, 46 if step % 2 == 0 else 20) for step in range(10)]
    pen.fill_polygon([(48 + radius * math.cos(turn), 51 + radius * math.sin(turn)) for turn, radius in turns], colour)


def _draw_ring(pen: Pen, colour: Colour) -> None:
    pen.fill_ellipse(6, 6, 90, 90, colour)
    pen.cut_ellipse(28, 28, 68, 68)


def _draw_moon(pen: Pen, colour: Colour) -> None:
    pen.fill_ellipse(8, 6, 92, 90, colour)
    pen.cut_ellipse(36, 0, 106, 70)


def _draw_tower(pen: Pen, colour: Colour) -> None:
    pen.fill_polygon([(24, 34), (72, 34), (78, 90), (18, 90)], colour)
    pen.fill_box(14, 22, 82, 44, colour)
    for left in (14, 39, 64):
        pen.fill_box(left, 6, left + 18, 26, colour)
    pen.fill_box(40, 64, 56, 90, RIM, radius=7)


def _draw_tree(pen: Pen, colour: Colour) -> None:
    pen.fill_box(41, 60, 55, 92, colour)
    for top, half in ((4, 24), (24, 33), (44, 42)):
        pen.fill_polygon([(48, top), (48 + half, top + 34), (48 - half, top + 34)], colour)


def _draw_heart(pen: Pen, colour: Colour) -> None:
    curve: list[Point] = []
    for step in range(60):
        turn = step / 60 * 2 * math.pi
        height = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        curve.append((48 + 2.65 * 16 * math.sin(turn) ** 3, 45 - 2.75 * height))
    pen.fill_polygon(curve, colour)


def _draw_fish(pen: Pen, colour: Colour) -> None:
    pen.fill_ellipse(2, 24, 68, 74, colour)
    pen.fill_polygon([(56, 49), (94, 20), (86, 49), (94, 78)], colour)
    pen.fill_ellipse(16, 38, 27, 49, RIM)


def _draw_bolt(pen: Pen, colour: Colour) -> None:
    pen.fill_polygon([(54, 2), (16, 54), (42, 54), (30, 94), (80, 38), (53, 38), (74, 2)], colour)


CHARGE_PENS: dict[str, Callable[[Pen, Colour], None]] = {
    "star": _draw_star,
    "ring": _draw_ring,
    "moon": _draw_moon,
    "tower": _draw_tower,
    "tree": _draw_tree,
    "heart": _draw_heart,
    "fish": _draw_fish,
    "bolt": _draw_bolt,
}


@cache
def _draw_charge(charge: str, colour: str) -> Image.Image:
    pen = Pen(96, 96)
    CHARGE_PENS[charge](pen, COLOURS[colour])
    return pen.finish(gloss=0.16, rim=1.2)


@lru_cache(maxsize=900)
def _scale_charge(charge: str, colour: str, size: int) -> Image.Image:
    return _draw_charge(charge, colour).resize((size, size), Image.Resampling.LANCZOS)


TINTS: tuple[Colour, ...] = (
    (226, 220, 206),
    (206, 216, 226),
    (220, 208, 222),
    (208, 222, 206),
    (232, 212, 204),
    (198, 198, 204),
)


@cache
def draw_cloth(tint: int) -> Image.Image:
    """The wall on which an emblem hangs: a plain tint, faintly woven, darker towards the corners."""
    colour = TINTS[tint % len(TINTS)]
    ground = Image.new("RGB", (SIZE, SIZE), colour)
    draw = ImageDraw.Draw(ground)
    thread = (colour[0] - 7, colour[1] - 7, colour[2] - 7)
    for offset in range(0, 2 * SIZE, 8):
        draw.line([(offset, 0), (0, offset)], fill=thread, width=2)
    corner = Image.radial_gradient("L").resize((SIZE, SIZE)).point([255 - level // 4 for level in range(256)])
    return ImageChops.multiply(ground, Image.merge("RGB", (corner, corner, corner)))


@dataclass(frozen=True, slots=True)
class Emblem:
    """What an emblem shows. `outline` follows from the kind of entity; no two entities share all four."""

    outline: str
    field: str
    charge: str
    colour: str


@cache
def _assign_emblems() -> dict[Entity, Emblem]:
    """Deal out emblems; within a kind every field and every charge comes up about equally often."""
    emblems: dict[Entity, Emblem] = {}
    for kind in KINDS:
        dice = random.Random(hash_stably(f"emblems of {kind}"))
        looks = [
            Emblem(OUTLINES[kind], field, charge, colour)
            for field in FIELDS
            for charge in CHARGES
            for colour in CHARGE_COLOURS
            if field != colour and (field, colour) not in PALE_PAIRS
        ]
        dice.shuffle(looks)
        used: dict[tuple[str, str], int] = {}
        for entity in list_entities(kind):
            best = min(looks, key=lambda look: _count_uses(look, used))
            looks.remove(best)
            emblems[entity] = best
            for part in _name_parts(best):
                used[part] = used.get(part, 0) + 1
    return emblems


def _name_parts(look: Emblem) -> tuple[tuple[str, str], ...]:
    pair = f"{look.field} {look.charge}"
    return (("field", look.field), ("charge", look.charge), ("colour", look.colour), ("pair", pair))


def _count_uses(look: Emblem, used: dict[tuple[str, str], int]) -> int:
    return sum(used.get(part, 0) * (8 if part[0] == "pair" else 1) for part in _name_parts(look))


def find_emblem(entity: Entity) -> Emblem:
    """The emblem of an entity, the same for ever."""
    return _assign_emblems()[entity]


def draw_emblem(look: Emblem, variant: int) -> Image.Image:
    """An RGB picture of 192 x 192 pixels. `variant` moves, scales and lights the emblem and tints the wall."""
    dice = random.Random(variant * 7919 + 13)
    tint, scale = dice.randrange(len(TINTS)), dice.choice((0.94, 0.98, 1.02, 1.06))
    x, y = SIZE / 2 + dice.randint(-4, 4), SIZE / 2 + dice.randint(-4, 4)
    brightness = dice.choice((0.86, 0.93, 1.0, 1.05))
    ground = draw_cloth(tint).copy()
    paste_centred(ground, _draw_outline(look.outline, look.field, round(164 * scale)), x, y)
    rise, size = CHARGE_PLACES.get(look.outline, (0, 106))
    paste_centred(ground, _scale_charge(look.charge, look.colour, round(size * scale)), x, y + rise * scale)
    return ground.point(tabulate_light(brightness))


def _draw_named(name: str, variant: int) -> Image.Image:
    return draw_emblem(find_emblem(find_entity(name)), variant)


def sketch_emblem(entity: Entity, variant: int) -> Sketch:
    """The picture of an entity's emblem under one rendering."""
    return Sketch(key=f"emblem-{entity.name.lower()}-{variant}", draw=partial(_draw_named, entity.name, variant))
