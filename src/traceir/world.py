"""The limits of a miniature: the words and the image size that it knows, and the notice where it is used on anything else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from traceir.errors import ImageError, ModelError
from traceir.images import ImageInput
from traceir.items import Content, Hit

_WORD: Final = re.compile(r"[^\W\d_]+")
_FOR_PHOTOS: Final = "sentence-transformers/clip-ViT-B-32"
INSTEAD: Final = (
    f"traceir index add FOLDER --index photos.index --model {_FOR_PHOTOS}",
    f'traceir search "a red door" --index photos.index --model {_FOR_PHOTOS}',
)
"""The two commands that give useful hits for what is not of a miniature's world."""


@dataclass(frozen=True, slots=True)
class World:
    """The bounds of a model, as its traceir.json states them (docs/formats.md, section 1).

    `says` puts them in words for whoever searches with it. `words` are all that its training texts hold, in lower case, and
    `image` is the width and height in pixels of every image it has seen; where one is missing, nothing of the kind is known.
    """

    says: str
    words: frozenset[str] = field(default_factory=frozenset)
    image: tuple[int, int] | None = None

    def knows(self, content: Content) -> bool:
        """Whether all words of a content occur in the training, and its images have the size of those seen there."""
        return words_of(content.text) <= self.words and all(_size(image) in (None, self.image) for image in content.images)

    def knows_kept(self, text: str | None, image: str | None) -> bool:
        """The same of what an index keeps of an item: its text, and its image's path."""
        return words_of(text or "") <= self.words and (image is None or _size_of_file(image) in (None, self.image))

    @property
    def notice(self) -> str:
        """One line about anything else."""
        return f"{self.says} For your own images: {INSTEAD[0]}; then {INSTEAD[1]}"

    def as_json(self) -> dict[str, Any]:
        return {"says": self.says, "words": " ".join(sorted(self.words)), "picture": self.image}


def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case, without digits and punctuation."""
    return frozenset(word.lower() for word in _WORD.findall(text))


def world_of(value: object, source: str) -> World | None:
    """What the field `world` of a traceir.json states; a text alone, as earlier releases wrote it, leaves the rest unknown."""
    if not value or isinstance(value, str):
        return World(value) if isinstance(value, str) and value else None
    if not isinstance(value, dict) or not isinstance(value.get("says"), str):
        raise ModelError(f"{source}: world is {str(value)[:80]!r}; it is an object of `says`, `words` and `picture`")
    width, height = value.get("picture") or (0, 0)
    return World(value["says"], frozenset(str(value.get("words", "")).split()), (width, height) if width else None)


def notice(encoder: object, query: Content, hits: Iterable[Hit]) -> str | None:
    """The notice of the encoder's world, where the query or hits of a search are not of it."""
    world = getattr(encoder, "world", None)
    if world is None or (world.knows(query) and all(world.knows_kept(hit.text, hit.image) for hit in hits)):
        return None
    return str(world.notice)


def _size(image: ImageInput | str) -> tuple[int, int] | None:
    """Of an image or a path; None where it cannot be read, for which others raise."""
    try:
        return (ImageInput.open(image) if isinstance(image, str) else image).size()
    except ImageError:
        return None


_size_of_file: Final = lru_cache(maxsize=8192)(_size)  # since every search asks
