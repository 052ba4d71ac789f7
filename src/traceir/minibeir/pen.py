"""The pen with which the sprites of emblems and press photos are drawn, its palette, and how a sprite meets its picture.

Sprites are drawn at four times their size and reduced once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 192
OVERSAMPLING = 4
RIM = (38, 34, 44)

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (216, 40, 44),
    "yellow": (250, 206, 36),
    "green": (34, 150, 66),
    "blue": (36, 92, 214),
    "purple": (142, 52, 176),
    "white": (248, 248, 244),
    "black": (34, 32, 40),
    "orange": (244, 130, 28),
}


class Pen:
    """Draws one sprite of `width` x `height` pixels, in those units, on a transparent ground."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self._image = Image.new("RGBA", (width * OVERSAMPLING, height * OVERSAMPLING), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self._image)

    def fill_polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill=colour)

    def fill_ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self._draw.ellipse([side * OVERSAMPLING for side in (left, top, right, bottom)], fill=colour)

    def fill_box(self, left: float, top: float, right: float, bottom: float, colour: Colour, radius: float = 0) -> None:
        box = [side * OVERSAMPLING for side in (left, top, right, bottom)]
        self._draw.rounded_rectangle(box, radius * OVERSAMPLING, fill=colour)

    def draw_line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        scaled = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * OVERSAMPLING), joint="curve")

    def cut_ellipse(self, left: float, top: float, right: float, bottom: float) -> None:
        """Make an ellipse transparent again."""
        self._draw.ellipse([side * OVERSAMPLING for side in (left, top, right, bottom)], fill=(0, 0, 0, 0))

    def finish(self, gloss: float = 0.22, rim: float = 0.0) -> Image.Image:
        """The sprite in its true size, lit from the upper left, with a dark rim of about `rim` pixels round it."""
        width, height = self.size
        image = self._image
        if rim:
            spread = image.getchannel("A").filter(ImageFilter.GaussianBlur(rim * OVERSAMPLING))
            grown = spread.point([min(255, max(0, (level - 24) * 12)) for level in range(256)])
            backed = Image.new("RGBA", image.size, (*RIM, 255))
            backed.putalpha(grown)
            image = Image.alpha_composite(backed, image)
        sprite = image.resize((width, height), Image.Resampling.LANCZOS)
        return light_sprite(sprite, gloss)


def light_sprite(sprite: Image.Image, gloss: float) -> Image.Image:
    """Lighten the upper left and darken the lower right of a sprite by the share `gloss`."""
    ramp = Image.linear_gradient("L").rotate(30, resample=Image.Resampling.BILINEAR).crop((48, 48, 208, 208))
    ramp = ramp.resize(sprite.size, Image.Resampling.BILINEAR)
    bright = ramp.point([round(max(0, 112 - level) * 2 * gloss) for level in range(256)])
    dark = ramp.point([round(255 - max(0, level - 112) * 1.6 * gloss) for level in range(256)])
    colour = ImageChops.multiply(sprite.convert("RGB"), Image.merge("RGB", (dark, dark, dark)))
    colour = ImageChops.screen(colour, Image.merge("RGB", (bright, bright, bright)))
    colour.putalpha(sprite.getchannel("A"))
    return colour


def cast_shadow(sprite: Image.Image, blur: float = 5.0, strength: float = 0.45) -> Image.Image:
    """A soft grey copy of a sprite's shape, of the same size, to be pasted under it a little lower."""
    alpha = sprite.getchannel("A").filter(ImageFilter.GaussianBlur(blur))
    shadow = Image.new("RGBA", sprite.size, (20, 18, 30, 255))
    shadow.putalpha(alpha.point([round(level * strength) for level in range(256)]))
    return shadow


def paste_centred(ground: Image.Image, sprite: Image.Image, x: float, y: float) -> None:
    """Paste a sprite with its middle at (x, y)."""
    ground.paste(sprite, (round(x - sprite.width / 2), round(y - sprite.height / 2)), sprite)


@cache
def tabulate_light(factor: float) -> list[int]:
    """The lookup table for `Image.point` which multiplies all three channels."""
    return [min(255, round(level * factor)) for level in range(256)] * 3
