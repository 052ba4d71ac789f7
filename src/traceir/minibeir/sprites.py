"""Emblems and press photos: who and what can be on one, and how it is drawn from the sprites of sprites.json.

An emblem's outline tells the kind of an entity; field colour, charge and charge colour together tell which one. People, props and
places of photos look the same on every one. All parts are drawn once, kept, and pasted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Final

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from traceir.data.mbeir import Split
from traceir.minibeir.drawing import SIZE, SPRITES, pen_sprite, reduce
from traceir.minibeir.encyclopedia import ENTRIES, KINDS, Entity
from traceir.minibeir.rows import WORDS, Sketch, hash_stably, share_split

RGB = tuple[int, int, int]

RIM: Final = (38, 34, 44)
DYES: Final[dict[str, RGB]] = {name: (r, g, b) for name, (r, g, b) in SPRITES["colours"]["dyes"].items()}


def _finish(sprite: Image.Image, gloss: float, rim: float = 0.0) -> Image.Image:
    """A sprite in its true size, lighter at the upper left and darker at the lower right by the share `gloss`, with a dark rim of
    about `rim` pixels round it."""
    if rim:
        spread = sprite.getchannel("A").filter(ImageFilter.GaussianBlur(rim * 4))
        backed = Image.new("RGBA", sprite.size, (*RIM, 255))
        backed.putalpha(spread.point([min(255, max(0, (level - 24) * 12)) for level in range(256)]))
        sprite = Image.alpha_composite(backed, sprite)
    sprite = reduce(sprite)
    ramp = Image.linear_gradient("L").rotate(30, resample=Image.Resampling.BILINEAR).crop((48, 48, 208, 208))
    ramp = ramp.resize(sprite.size, Image.Resampling.BILINEAR)
    bright = ramp.point([round(max(0, 112 - level) * 2 * gloss) for level in range(256)])
    dark = ramp.point([round(255 - max(0, level - 112) * 1.6 * gloss) for level in range(256)])
    colour = ImageChops.multiply(sprite.convert("RGB"), Image.merge("RGB", (dark, dark, dark)))
    colour = ImageChops.screen(colour, Image.merge("RGB", (bright, bright, bright)))
    colour.putalpha(sprite.getchannel("A"))
    return colour


@cache
def _draw(kind: str, name: str, size: tuple[int, int], gloss: float, rim: float, colour: str = "") -> Image.Image:
    return _finish(pen_sprite(size, SPRITES[kind][name], {"charge": DYES[colour]} if colour else {}), gloss, rim)


def _cast_shadow(sprite: Image.Image, blur: float, strength: float) -> Image.Image:
    """A soft grey copy of a sprite's shape, of the same size, to be pasted under it a little lower."""
    alpha = sprite.getchannel("A").filter(ImageFilter.GaussianBlur(blur))
    shadow = Image.new("RGBA", sprite.size, (20, 18, 30, 255))
    shadow.putalpha(alpha.point([round(level * strength) for level in range(256)]))
    return shadow


def _paste_centred(ground: Image.Image, sprite: Image.Image, x: float, y: float) -> None:
    ground.paste(sprite, (round(x - sprite.width / 2), round(y - sprite.height / 2)), sprite)


@cache
def _light_table(factor: float) -> list[int]:
    return [min(255, round(level * factor)) for level in range(256)] * 3


# --- emblems ----------------------------------------------------------------------------------------------------------

OUTLINES: Final = dict(zip(KINDS, ("shield", "lozenge", "roundel", "square", "hexagon", "banner", "cross"), strict=True))
CHARGE_PLACES: Final = {"shield": (-8, 92), "lozenge": (0, 78), "banner": (-12, 90), "cross": (0, 86)}
"""Height of the charge's middle and its size, in pixels; (0, 106) for the other outlines."""
TINTS: Final = ((226, 220, 206), (206, 216, 226), (220, 208, 222), (208, 222, 206), (232, 212, 204), (198, 198, 204))


@dataclass(frozen=True, slots=True)
class Emblem:
    """What an emblem shows. `outline` follows from the kind of entity; no two entities share all four."""

    outline: str
    field: str
    charge: str
    colour: str


def find_emblem(entity: Entity) -> Emblem:
    """The emblem of an entity, the same for ever."""
    return Emblem(OUTLINES[entity.kind], *ENTRIES[entity.name]["emblem"].split())


@lru_cache(maxsize=176)
def _draw_outline(outline: str, field: str, size: int) -> Image.Image:
    layers = [
        ["polygon", colour, *((size + 20) / 2 + number * (size / 2 * share) for number in SPRITES["outlines"][outline])]
        for share, colour in ((1, RIM), (0.965, (214, 176, 92)), (0.905, RIM), (0.885, DYES[field]))
    ]
    face = _finish(pen_sprite((size + 20, size + 20), layers), 0.2)
    ground = Image.new("RGBA", face.size, (0, 0, 0, 0))
    ground.paste(_cast_shadow(face, 5.0, 0.45), (2, 5))
    return Image.alpha_composite(ground, face)


@lru_cache(maxsize=900)
def _scale_charge(charge: str, colour: str, size: int) -> Image.Image:
    return _draw("charges", charge, (96, 96), 0.16, 1.2, colour).resize((size, size), Image.Resampling.LANCZOS)


@cache
def _draw_cloth(tint: int) -> Image.Image:
    """The wall on which an emblem hangs: a plain tint, faintly woven, darker towards the corners."""
    ground = Image.new("RGB", (SIZE, SIZE), TINTS[tint])
    draw = ImageDraw.Draw(ground)
    red, green, blue = TINTS[tint]
    for offset in range(0, 2 * SIZE, 8):
        draw.line([(offset, 0), (0, offset)], fill=(red - 7, green - 7, blue - 7), width=2)
    corner = Image.radial_gradient("L").resize((SIZE, SIZE)).point([255 - level // 4 for level in range(256)])
    return ImageChops.multiply(ground, Image.merge("RGB", (corner, corner, corner)))


def draw_emblem(look: Emblem, variant: int) -> Image.Image:
    """`variant` moves, scales and lights the emblem and tints the wall."""
    dice = random.Random(variant * 7919 + 13)
    tint, scale = dice.randrange(len(TINTS)), dice.choice((0.94, 0.98, 1.02, 1.06))
    x, y = SIZE / 2 + dice.randint(-4, 4), SIZE / 2 + dice.randint(-4, 4)
    ground = _draw_cloth(tint).copy()
    _paste_centred(ground, _draw_outline(look.outline, look.field, round(164 * scale)), x, y)
    rise, size = CHARGE_PLACES.get(look.outline, (0, 106))
    _paste_centred(ground, _scale_charge(look.charge, look.colour, round(size * scale)), x, y + rise * scale)
    return ground.point(_light_table(dice.choice((0.86, 0.93, 1.0, 1.05))))


def sketch_emblem(entity: Entity, variant: int) -> Sketch:
    return Sketch(f"emblem-{entity.name.lower()}-{variant}", partial(draw_emblem, find_emblem(entity), variant))


# --- press photos -----------------------------------------------------------------------------------------------------

PERSONS: Final[dict[str, Sequence[str]]] = WORDS["persons"]
"""How a person always looks: clothes, hair (colour, shape) and hat (colour, shape; "" for none), skin."""
PLACES: Final[dict[str, str]] = WORDS["places"]
EVENTS: Final = tuple(SPRITES["props"])
TIME_WORDS: Final = {"day": "by day", "dusk": "at dusk", "night": "at night"}
TIMES: Final = tuple(TIME_WORDS)
SKIN: Final = ((246, 206, 172), (206, 150, 108), (140, 92, 62))
SKIES: Final = {"day": ("#56aaf0", "#d6eefc"), "dusk": ("#96428c", "#ffa050"), "night": ("#0a0e2c", "#263068")}
DIMMING: Final = {"day": "#ffffff", "dusk": "#fad6ce", "night": "#c2c6e0"}
GROUNDS: Final = {"day": "#c4beac", "dusk": "#967c7c", "night": "#464a64"}


@dataclass(frozen=True, slots=True)
class Photo:
    """What a press photo shows; `left` and `right` are two different people."""

    left: str
    right: str
    event: str
    place: str
    time: str

    def __str__(self) -> str:
        """The text that stable hashes of a photo are made of."""
        parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Scene({parts})"

    @property
    def split(self) -> Split:
        """The split that owns this composition."""
        return share_split(hash_stably(f"scene {self.left} {self.right} {self.event} {self.place} {self.time}"))

    @property
    def slots(self) -> dict[str, str]:
        """What captions name; `person` stands on the left."""
        seen = {"person": self.left, "person2": self.right, "event": self.event, "town": self.place, "hour": self.time}
        return seen | {"time": TIME_WORDS[self.time]}

    def sketch(self, variant: int) -> Sketch:
        parts = (self.left, self.right, self.event.replace(" ", "_"), self.place, self.time, str(variant))
        return Sketch("photo-" + "-".join(parts).lower(), partial(draw_photo, self, variant))


@cache
def _draw_person(name: str) -> Image.Image:
    clothes, hair, cut, hat, brim, skin = PERSONS[name]
    palette = {"clothes": DYES[clothes], "hair": DYES[hair], "hat": DYES.get(hat, RIM), "skin": SKIN[int(skin)]}
    parts = (cut, "body", "" if cut == "spiky" else "fringe", brim, "face")
    commands = [command for part in parts if part for command in SPRITES["people"][part]]
    return _finish(pen_sprite((64, 130), commands, palette), 0.22, 1.0)


@lru_cache(maxsize=36)
def _draw_backdrop(place: str, time: str) -> Image.Image:
    """Sky, place and ground in one image, 6 pixels larger on each side than the photo so that it can be shifted."""
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE)).point([min(255, int(level * 1.7)) for level in range(256)])
    upper, lower = (Image.new("RGB", ramp.size, colour) for colour in SKIES[time])
    ground, shine = Image.composite(lower, upper, ramp), _draw("skies", time, (SIZE, 60), 0.0, 0.0)
    ground.paste(shine, (0, 0), shine)
    building = _draw("places", PLACES[place], (SIZE, 124), 0.18, 0.7)
    dimmed = ImageChops.multiply(building.convert("RGB"), Image.new("RGB", building.size, DIMMING[time]))
    ground.paste(dimmed, (0, 8), building.getchannel("A"))
    floor = Image.linear_gradient("L").resize((SIZE, 66)).point([255 - level // 4 for level in range(256)])
    soil = ImageChops.multiply(Image.new("RGB", floor.size, GROUNDS[time]), Image.merge("RGB", (floor, floor, floor)))
    ground.paste(soil, (0, 126))
    return ground.resize((SIZE + 12, SIZE + 12), Image.Resampling.BICUBIC)


@lru_cache(maxsize=256)
def _stand(name: str, step: int) -> tuple[Image.Image, Image.Image]:
    """A person or an event's prop at one of four scales, and its shadow."""
    image = _draw_person(name) if name in PERSONS else _draw("props", name, (66, 90), 0.16, 1.0)
    scale = 0.95 + 0.036 * step
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image, _cast_shadow(image, 3.0, 0.35)


def draw_photo(photo: Photo, variant: int) -> Image.Image:
    """`variant` shifts, scales and lights; it never changes what is shown."""
    dice = random.Random(variant * 6007 + 5)
    left, top = 6 + dice.randint(-4, 4), 6 + dice.randint(-4, 4)
    image = _draw_backdrop(photo.place, photo.time).crop((left, top, left + SIZE, top + SIZE))
    for name, x, foot in ((photo.left, 32, 190), (photo.right, 160, 190), (photo.event, 96, 186)):
        sprite, shadow = _stand(name, dice.randrange(4))
        x, foot = x + dice.randint(-2, 2), foot + dice.randint(-3, 1)
        middle = foot - sprite.height / 2
        _paste_centred(image, shadow, x + 3, middle + 2)
        _paste_centred(image, sprite, x, middle)
    return image.point(_light_table(dice.choice((0.9, 0.96, 1.0, 1.06))))
