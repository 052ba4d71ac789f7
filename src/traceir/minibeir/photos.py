"""Press photos: who and what can be on one, and how it is drawn.

People, props and places are drawn once, kept, and pasted onto a sky; whoever is on a photo looks the same on every one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from PIL import Image, ImageChops

from traceir.minibeir.draft import Sketch
from traceir.minibeir.pen import COLOURS, RIM, SIZE, Colour, Pen, cast_shadow, paste_centred, tabulate_light

SKIN: tuple[Colour, ...] = ((246, 206, 172), (206, 150, 108), (140, 92, 62))


@dataclass(frozen=True, slots=True)
class Look:
    """How a person always looks: clothes, hair (colour, shape) and hat (colour, shape; shape "" for none)."""

    clothes: str
    hair: str
    cut: str
    hat: str
    brim: str
    skin: int


PERSONS: dict[str, Look] = {
    "Hupu": Look("red", "yellow", "long", "", "", 0),
    "Drinu": Look("red", "black", "short", "black", "tall", 1),
    "Vravo": Look("yellow", "black", "round", "", "", 2),
    "Klulu": Look("yellow", "red", "long", "blue", "cap", 0),
    "Knino": Look("green", "orange", "long", "", "", 0),
    "Snimo": Look("green", "black", "short", "white", "wide", 2),
    "Sneki": Look("blue", "yellow", "round", "", "", 0),
    "Vrapu": Look("blue", "black", "short", "red", "cap", 1),
    "Klepu": Look("purple", "white", "long", "", "", 1),
    "Blepo": Look("purple", "black", "short", "yellow", "wide", 2),
    "Frivo": Look("white", "black", "long", "", "", 1),
    "Zwimu": Look("white", "red", "short", "green", "tall", 0),
    "Kreni": Look("black", "orange", "round", "", "", 0),
    "Zwevu": Look("black", "white", "short", "white", "tall", 1),
    "Skomi": Look("orange", "green", "spiky", "", "", 1),
    "Vupi": Look("orange", "black", "short", "purple", "wide", 0),
}
PLACES: dict[str, str] = {
    "Wobbis": "bridge",
    "Shendar": "tower",
    "Quaspar": "harbour",
    "Shurkis": "mountain",
    "Chandoa": "dome",
    "Yurkar": "mill",
    "Jarkur": "temple",
    "Shubboa": "pyramid",
    "Querkis": "castle",
    "Jabbey": "lighthouse",
    "Jorkoa": "forest",
    "Wundar": "wheel",
}
EVENTS: tuple[str, ...] = ("race", "prize", "concert", "wedding", "reading", "match", "garden show", "fair")
TIMES: tuple[str, ...] = ("day", "dusk", "night")


@dataclass(frozen=True, slots=True)
class Scene:
    """What a press photo shows; `left` and `right` are two different people."""

    left: str
    right: str
    event: str
    place: str
    time: str


def _draw_bridge(pen: Pen) -> None:
    pen.fill_box(0, 104, 192, 124, (70, 140, 200))
    for pier in (56, 136):
        pen.fill_box(pier - 5, 20, pier + 5, 112, (214, 60, 40))
    pen.fill_box(0, 84, 192, 95, (214, 60, 40))
    for start, end in ((-24, 56), (56, 136), (136, 216)):
        sag = [(start + (end - start) * step / 12, 80 - 54 * (2 * step / 12 - 1) ** 2) for step in range(13)]
        pen.draw_line(sag, (170, 40, 30), 4)
        for x, y in sag[1:-1:2]:
            pen.draw_line([(x, y), (x, 86)], (170, 40, 30), 1.6)


def _draw_tower(pen: Pen) -> None:
    pen.fill_box(74, 40, 118, 124, (150, 158, 176))
    pen.fill_polygon([(68, 44), (96, 2), (124, 44)], (36, 110, 120))
    pen.fill_ellipse(79, 48, 113, 82, RIM)
    pen.fill_ellipse(82, 51, 110, 79, (255, 250, 220))
    pen.draw_line([(96, 55), (96, 66), (104, 70)], RIM, 3)
    for left, top in ((4, 74), (36, 86), (122, 84), (156, 70)):
        pen.fill_box(left, top, left + 34, 124, (176, 132, 110))
        pen.fill_polygon([(left - 3, top + 2), (left + 17, top - 16), (left + 37, top + 2)], (130, 76, 64))


def _draw_harbour(pen: Pen) -> None:
    pen.fill_box(0, 88, 192, 124, (40, 120, 190))
    for x, size, sail in ((96, 1.0, (250, 250, 250)), (32, 0.72, (250, 206, 36)), (160, 0.72, (220, 60, 60))):
        pen.fill_polygon([(x - 2, 92 - 84 * size), (x - 2, 90), (x - 34 * size, 90)], sail)
        pen.fill_polygon([(x + 2, 92 - 72 * size), (x + 2, 90), (x + 30 * size, 90)], sail)
        hull = [(x - 38 * size, 92), (x + 38 * size, 92), (x + 26 * size, 108), (x - 26 * size, 108)]
        pen.fill_polygon(hull, (110, 66, 40))


def _draw_mountain(pen: Pen) -> None:
    for x, top, half in ((34, 40, 60), (160, 46, 60), (96, 8, 84)):
        pen.fill_polygon([(x, top), (x + half, 124), (x - half, 124)], (104, 110, 140))
        snow = 0.36 * (124 - top)
        ratio = half / (124 - top)
        edge = [
            (x + snow * ratio, top + snow),
            (x + 8, top + snow * 0.75),
            (x - 4, top + snow),
            (x - 12, top + snow * 0.7),
        ]
        pen.fill_polygon([(x, top), *edge, (x - snow * ratio, top + snow)], (250, 252, 255))


def _draw_dome(pen: Pen) -> None:
    pen.fill_box(18, 78, 174, 124, (240, 226, 196))
    for x in range(28, 170, 18):
        pen.fill_box(x, 90, x + 8, 124, (190, 164, 130), radius=4)
    pen.fill_ellipse(50, 16, 142, 120, (240, 184, 40))
    pen.fill_box(46, 76, 146, 90, (214, 190, 150))
    pen.draw_line([(96, 4), (96, 20)], (240, 184, 40), 5)


def _draw_mill(pen: Pen) -> None:
    pen.fill_ellipse(-40, 92, 110, 160, (120, 170, 60))
    pen.fill_ellipse(80, 96, 240, 160, (100, 150, 56))
    pen.fill_polygon([(80, 50), (112, 50), (124, 124), (68, 124)], (150, 84, 44))
    pen.fill_polygon([(74, 52), (96, 30), (118, 52)], (96, 48, 30))
    for turn in (0.5, 2.07, 3.64, 5.21):
        along, across = (math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))
        corners = ((8, 0), (50, 0), (50, 17), (8, 17))
        points = [(96 + a * along[0] + b * across[0], 52 + a * along[1] + b * across[1]) for a, b in corners]
        pen.fill_polygon(points, (252, 250, 240))
        pen.draw_line([(96, 52), points[1]], (90, 60, 40), 3)


def _draw_temple(pen: Pen) -> None:
    pen.fill_polygon([(14, 52), (96, 12), (178, 52)], (236, 228, 236))
    pen.fill_polygon([(46, 47), (96, 22), (146, 47)], (60, 90, 170))
    pen.fill_box(18, 52, 174, 62, (206, 196, 210))
    for x in (24, 54, 86, 118, 150):
        pen.fill_box(x, 62, x + 18, 112, (240, 234, 240), radius=2)
    pen.fill_box(8, 110, 184, 124, (206, 196, 210))


def _draw_pyramid(pen: Pen) -> None:
    for x, top, half in ((28, 66, 50), (170, 60, 56), (96, 14, 92)):
        pen.fill_polygon([(x, top), (x + half, 124), (x - half, 124)], (236, 192, 92))
        pen.fill_polygon([(x, top), (x + half, 124), (x + half * 0.2, 124)], (176, 124, 52))


def _draw_castle(pen: Pen) -> None:
    stone = (128, 120, 124)
    pen.fill_box(20, 66, 172, 124, stone)
    for x in range(20, 172, 16):
        pen.fill_box(x, 56, x + 9, 70, stone)
    for x, top in ((30, 30), (96, 22), (162, 30)):
        pen.fill_box(x - 18, top, x + 18, 124, (104, 96, 102))
        pen.fill_polygon([(x - 22, top + 2), (x, top - 26), (x + 22, top + 2)], (190, 44, 60))
    pen.fill_box(84, 84, 108, 124, (60, 40, 34), radius=12)


def _draw_lighthouse(pen: Pen) -> None:
    pen.fill_box(0, 100, 192, 124, (44, 128, 170))
    pen.fill_ellipse(54, 90, 138, 150, (98, 92, 90))
    for band in range(5):
        top, bottom = 34 + band * 14, 48 + band * 14
        wide, wider = 13 + band * 2.2, 15.2 + band * 2.2
        colour = (224, 44, 44) if band % 2 == 0 else (252, 250, 248)
        pen.fill_polygon([(96 - wide, top), (96 + wide, top), (96 + wider, bottom), (96 - wider, bottom)], colour)
    pen.fill_polygon([(108, 20), (192, 2), (192, 44), (108, 30)], (255, 244, 170))
    pen.fill_box(84, 16, 108, 34, (255, 236, 120))
    pen.fill_polygon([(80, 18), (96, 2), (112, 18)], RIM)


def _draw_forest(pen: Pen) -> None:
    for x, top in ((20, 34), (58, 40), (134, 36), (172, 30), (96, 10)):
        pen.fill_box(x - 5, 100, x + 5, 124, (110, 70, 40))
        for step in range(3):
            height, half = top + step * 24, 18 + step * 8
            pen.fill_polygon([(x, height), (x + half, height + 40), (x - half, height + 40)], (24, 110 + 12 * step, 62))


def _draw_wheel(pen: Pen) -> None:
    pen.fill_polygon([(96, 60), (66, 124), (74, 124), (96, 76), (118, 124), (126, 124)], (90, 90, 110))
    pen.fill_ellipse(42, 6, 150, 114, (220, 60, 130))
    pen.cut_ellipse(49, 13, 143, 107)
    for spoke in range(8):
        turn = spoke * math.pi / 4 + 0.2
        x, y = 96 + 51 * math.cos(turn), 60 + 51 * math.sin(turn)
        pen.draw_line([(96, 60), (x, y)], (220, 60, 130), 3)
        pen.fill_box(x - 9, y - 8, x + 9, y + 9, ((250, 206, 36), (50, 190, 200))[spoke % 2], radius=4)
    for left, colour in ((6, (60, 120, 210)), (146, (240, 140, 40))):
        pen.fill_polygon([(left, 96), (left + 20, 74), (left + 40, 96)], colour)
        pen.fill_box(left + 3, 96, left + 37, 124, (250, 244, 230))


PLACE_PENS: dict[str, Callable[[Pen], None]] = {
    "bridge": _draw_bridge,
    "tower": _draw_tower,
    "harbour": _draw_harbour,
    "mountain": _draw_mountain,
    "dome": _draw_dome,
    "mill": _draw_mill,
    "temple": _draw_temple,
    "pyramid": _draw_pyramid,
    "castle": _draw_castle,
    "lighthouse": _draw_lighthouse,
    "forest": _draw_forest,
    "wheel": _draw_wheel,
}


def _draw_flag(pen: Pen) -> None:
    pen.fill_box(8, 2, 14, 84, (150, 100, 60))
    for row in range(4):
        for column in range(4):
            colour = COLOURS["black"] if (row + column) % 2 == 0 else COLOURS["white"]
            pen.fill_box(14 + column * 12, 4 + row * 12, 26 + column * 12, 16 + row * 12, colour)


def _draw_cup(pen: Pen) -> None:
    gold = (250, 196, 30)
    for left in (2, 38):
        pen.fill_ellipse(left, 10, left + 24, 38, gold)
        pen.cut_ellipse(left + 6, 16, left + 18, 32)
    pen.fill_polygon([(12, 6), (52, 6), (48, 34), (38, 48), (26, 48), (16, 34)], gold)
    pen.fill_box(28, 46, 36, 66, gold)
    pen.fill_box(14, 64, 50, 82, (110, 60, 40), radius=3)


def _draw_guitar(pen: Pen) -> None:
    pen.draw_line([(24, 58), (54, 8)], (110, 66, 36), 8)
    pen.fill_box(47, 2, 62, 14, (60, 36, 24), radius=3)
    pen.fill_ellipse(2, 42, 44, 84, (222, 70, 40))
    pen.fill_ellipse(18, 32, 48, 62, (222, 70, 40))
    pen.fill_ellipse(18, 46, 36, 64, (60, 30, 24))


def _draw_cake(pen: Pen) -> None:
    for left, top, right in ((2, 58, 62), (12, 36, 52), (20, 16, 44)):
        pen.fill_box(left, top, right, top + 26, (255, 250, 248), radius=3)
        pen.fill_box(left, top, right, top + 8, (250, 150, 190), radius=3)
    pen.fill_ellipse(24, 2, 40, 18, (224, 40, 60))


def _draw_book(pen: Pen) -> None:
    pen.fill_polygon([(0, 22), (32, 32), (64, 22), (64, 76), (32, 86), (0, 76)], (36, 84, 200))
    pen.fill_polygon([(5, 16), (31, 26), (31, 78), (5, 68)], (252, 248, 232))
    pen.fill_polygon([(59, 16), (33, 26), (33, 78), (59, 68)], (252, 248, 232))
    for y in (34, 46, 58):
        pen.draw_line([(10, y - 6), (27, y)], (120, 120, 140), 2.4)
        pen.draw_line([(54, y - 6), (37, y)], (120, 120, 140), 2.4)


def _draw_ball(pen: Pen) -> None:
    pen.fill_ellipse(2, 20, 62, 80, (250, 250, 250))
    spots = [(32, 50)] + [(32 + 25 * math.cos(0.6 + i * 1.257), 50 + 25 * math.sin(0.6 + i * 1.257)) for i in range(5)]
    for x, y in spots:
        pen.fill_polygon([(x + 8 * math.cos(i * 1.257), y + 8 * math.sin(i * 1.257)) for i in range(5)], COLOURS["black"])


def _draw_flower(pen: Pen) -> None:
    pen.fill_box(29, 34, 35, 64, (40, 150, 60))
    pen.fill_ellipse(8, 46, 32, 60, (40, 150, 60))
    for petal in range(6):
        x, y = 32 + 15 * math.cos(petal * 1.047), 22 + 15 * math.sin(petal * 1.047)
        pen.fill_ellipse(x - 10, y - 10, x + 10, y + 10, (236, 70, 170))
    pen.fill_ellipse(22, 12, 42, 32, (250, 210, 40))
    pen.fill_polygon([(12, 60), (52, 60), (45, 86), (19, 86)], (190, 96, 50))


def _draw_balloons(pen: Pen) -> None:
    for x, y, colour in ((14, 26, (222, 44, 48)), (50, 26, (40, 96, 220)), (32, 18, (250, 206, 36))):
        pen.draw_line([(x, y + 16), (32, 86)], (70, 70, 80), 2)
        pen.fill_ellipse(x - 14, y - 17, x + 14, y + 19, colour)


PROP_PENS: dict[str, Callable[[Pen], None]] = {
    "race": _draw_flag,
    "prize": _draw_cup,
    "concert": _draw_guitar,
    "wedding": _draw_cake,
    "reading": _draw_book,
    "match": _draw_ball,
    "garden show": _draw_flower,
    "fair": _draw_balloons,
}


def _draw_hair_behind(pen: Pen, look: Look) -> None:
    colour = COLOURS[look.hair]
    if look.cut == "long":
        pen.fill_box(9, 12, 55, 66, colour, radius=17)
    elif look.cut == "round":
        pen.fill_ellipse(4, 2, 60, 52, colour)
    elif look.cut == "spiky":
        for x, y in ((8, 14), (20, 3), (32, 0), (44, 3), (56, 14)):
            pen.fill_polygon([(x, y), (44, 34), (20, 34)], colour)
    else:
        pen.fill_box(14, 14, 50, 40, colour, radius=14)


def _draw_hat(pen: Pen, look: Look) -> None:
    colour = COLOURS.get(look.hat, RIM)
    if look.brim == "tall":
        pen.fill_box(16, 0, 48, 24, colour, radius=3)
        pen.fill_box(7, 20, 57, 27, colour, radius=3)
    elif look.brim == "wide":
        pen.fill_ellipse(15, 4, 49, 34, colour)
        pen.fill_ellipse(0, 17, 64, 30, colour)
    elif look.brim == "cap":
        pen.fill_box(12, 2, 52, 26, colour, radius=15)
        pen.fill_box(12, 16, 52, 27, colour)
        pen.fill_box(30, 20, 64, 28, colour, radius=4)


@cache
def _draw_person(name: str) -> Image.Image:
    look = PERSONS[name]
    clothes, skin = COLOURS[look.clothes], SKIN[look.skin]
    pen = Pen(64, 130)
    _draw_hair_behind(pen, look)
    pen.fill_box(18, 98, 30, 129, (62, 60, 76), radius=3)
    pen.fill_box(34, 98, 46, 129, (62, 60, 76), radius=3)
    pen.fill_box(4, 58, 17, 100, clothes, radius=6)
    pen.fill_box(47, 58, 60, 100, clothes, radius=6)
    pen.fill_box(26, 44, 38, 60, skin)
    pen.fill_polygon([(12, 54), (52, 54), (52, 100), (58, 112), (6, 112), (12, 100)], clothes)
    pen.fill_ellipse(5, 94, 16, 106, skin)
    pen.fill_ellipse(48, 94, 59, 106, skin)
    pen.fill_ellipse(15, 14, 49, 52, skin)
    if look.cut != "spiky":
        pen.fill_polygon([(15, 28), (18, 17), (32, 12), (46, 17), (49, 28), (40, 22), (24, 22)], COLOURS[look.hair])
    _draw_hat(pen, look)
    for x in (25, 39):
        pen.fill_ellipse(x - 2.4, 32, x + 2.4, 37, RIM)
    pen.draw_line([(27, 43), (32, 45), (37, 43)], (150, 50, 50), 2)
    return pen.finish(gloss=0.22, rim=1.0)


@cache
def _draw_prop(event: str) -> Image.Image:
    pen = Pen(66, 90)
    PROP_PENS[event](pen)
    return pen.finish(gloss=0.16, rim=1.0)


SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((86, 170, 240), (214, 238, 252)),
    "dusk": ((150, 66, 140), (255, 160, 80)),
    "night": ((10, 14, 44), (38, 48, 104)),
}
DIMMING: dict[str, Colour] = {"day": (255, 255, 255), "dusk": (250, 214, 206), "night": (194, 198, 224)}
GROUNDS: dict[str, Colour] = {"day": (196, 190, 172), "dusk": (150, 124, 124), "night": (70, 74, 100)}


@cache
def _draw_sky(time: str) -> Image.Image:
    upper, lower = SKIES[time]
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE))
    sky = Image.composite(Image.new("RGB", ramp.size, lower), Image.new("RGB", ramp.size, upper), ramp.point(_steepen))
    pen = Pen(SIZE, 60)
    if time == "day":
        pen.fill_ellipse(10, 6, 44, 40, (255, 236, 110))
        for x, y in ((140, 18), (158, 12), (172, 20)):
            pen.fill_ellipse(x - 16, y - 8, x + 16, y + 10, (255, 255, 255))
    elif time == "dusk":
        pen.fill_ellipse(8, 26, 48, 66, (255, 96, 60))
    else:
        pen.fill_ellipse(12, 6, 44, 38, (250, 246, 214))
        pen.cut_ellipse(24, 0, 56, 32)
        for star in range(16):
            x, y = 52 + (star * 37) % 136, 4 + (star * 23) % 46
            pen.fill_ellipse(x - 1.6, y - 1.6, x + 1.6, y + 1.6, (255, 255, 255))
    shine = pen.finish(gloss=0.0)
    sky.paste(shine, (0, 0), shine)
    return sky


def _steepen(level: int) -> int:
    return min(255, int(level * 1.7))


@cache
def _draw_place(place: str) -> Image.Image:
    pen = Pen(SIZE, 124)
    PLACE_PENS[PLACES[place]](pen)
    return pen.finish(gloss=0.18, rim=0.7)


@lru_cache(maxsize=36)
def _draw_backdrop(place: str, time: str) -> Image.Image:
    """Sky, place and ground in one picture, a little larger than the photo so that it can be shifted."""
    margin = 6
    building = _draw_place(place)
    dimmed = ImageChops.multiply(building.convert("RGB"), Image.new("RGB", building.size, DIMMING[time]))
    ground = _draw_sky(time).copy()
    ground.paste(dimmed, (0, 8), building.getchannel("A"))
    colour = GROUNDS[time]
    floor = Image.linear_gradient("L").resize((SIZE, 66)).point([255 - level // 4 for level in range(256)])
    soil = ImageChops.multiply(Image.new("RGB", floor.size, colour), Image.merge("RGB", (floor, floor, floor)))
    ground.paste(soil, (0, 126))
    return ground.resize((SIZE + 2 * margin, SIZE + 2 * margin), Image.Resampling.BICUBIC)


@lru_cache(maxsize=256)
def _stand(sprite: str, is_prop: bool, step: int) -> tuple[Image.Image, Image.Image]:
    """A person or prop at one of four scales, and its shadow."""
    image = _draw_prop(sprite) if is_prop else _draw_person(sprite)
    scale = 0.95 + 0.036 * step
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image, cast_shadow(image, blur=3.0, strength=0.35)


def draw_photo(scene: Scene, variant: int) -> Image.Image:
    """An RGB picture of 192 x 192 pixels. `variant` shifts, scales and lights; it never changes what is shown."""
    dice = random.Random(variant * 6007 + 5)
    left, top = 6 + dice.randint(-4, 4), 6 + dice.randint(-4, 4)
    photo = _draw_backdrop(scene.place, scene.time).crop((left, top, left + SIZE, top + SIZE))
    for name, is_prop, x, foot in (
        (scene.left, False, 32, 190),
        (scene.right, False, 160, 190),
        (scene.event, True, 96, 186),
    ):
        sprite, shadow = _stand(name, is_prop, dice.randrange(4))
        x, foot = x + dice.randint(-2, 2), foot + dice.randint(-3, 1)
        middle = foot - sprite.height / 2
        paste_centred(photo, shadow, x + 3, middle + 2)
        paste_centred(photo, sprite, x, middle)
    return photo.point(tabulate_light(dice.choice((0.9, 0.96, 1.0, 1.06))))


def sketch_photo(scene: Scene, variant: int) -> Sketch:
    """The photo of a scene under one rendering."""
    parts = (scene.left, scene.right, scene.event.replace(" ", "_"), scene.place, scene.time, str(variant))
    return Sketch(key="photo-" + "-".join(parts).lower(), draw=partial(draw_photo, scene, variant))
