"""What is indexed, asked, and answered: Item, Query, Encoding, Hit, Route.

An Item is what gets indexed, a Query is what asks; both are sequences of parts, each a text or an ImageInput, so that text,
image, image+text and interleaved inputs are one type.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.suggest import did_you_mean

Part = str | ImageInput
ImageLike = ImageInput | Image.Image | bytes | str | os.PathLike[str]
"""What stands for an image where one is asked for: itself, pixels, the bytes of a file, or the path of one."""
Modality = Literal["text", "image", "image,text"]
Route = Literal["auto", "reason", "direct"]
TakenRoute = Literal["reason", "direct"]
Ended = Literal["turn", "budget"] | None
MODALITIES: tuple[Modality, ...] = ("text", "image", "image,text")
ROUTES: tuple[Route, ...] = ("auto", "reason", "direct")
Vector = npt.NDArray[np.float32]
Scalar = str | int | float | bool | None
Value = Scalar | Sequence[Scalar]
"""What a field may hold: one value, or a list of them."""


@dataclass(frozen=True, slots=True)
class Content:
    """Parts in reading order: what Item and Query have in common. TypeError for a part that is neither text nor ImageInput."""

    parts: tuple[Part, ...] = ()

    def check_parts(self) -> None:
        if isinstance(self.parts, str | bytes | ImageInput):
            remedy = f"give a tuple, or write {type(self).__name__}.of(text=..., image=...)"
            raise TypeError(f"parts is one {type(self.parts).__name__}; {remedy}")
        object.__setattr__(self, "parts", tuple(self.parts))
        for number, part in enumerate(self.parts):
            if not isinstance(part, str | ImageInput):
                remedy = "give a str or a traceir.ImageInput (ImageInput.open, .from_pil)"
                raise TypeError(f"part {number} is a {type(part).__name__}; {remedy}")

    @property
    def modality(self) -> Modality:
        """`text` also where there are no parts: such a query consists of its instruction."""
        has_image = any(isinstance(part, ImageInput) for part in self.parts)
        return "text" if not has_image else "image,text" if self.text else "image"

    @property
    def text(self) -> str:
        return " ".join(part.strip() for part in self.parts if isinstance(part, str) and part.strip())

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImageInput))


@dataclass(frozen=True, slots=True)
class Item(Content):
    """One thing that can be found: parts in reading order, an id, and free fields kept beside it in an index."""

    id: str | None = None
    fields: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_parts()
        if not self.parts or all(isinstance(part, str) and not part.strip() for part in self.parts):
            raise InputError(f"item {self.id or '(no id)'} is empty: give it a text, an image, or both")

    @classmethod
    def of(
        cls,
        *,
        text: str | None = None,
        image: ImageLike | None = None,
        id: str | None = None,
        fields: Mapping[str, Value] | None = None,
    ) -> Item:
        """An item of at most one image and one text, the image first (the order of M-BEIR's `image,text`).

        `image` may be an ImageInput, a PIL image, the bytes of a file, or its path, which is read when the item is encoded.
        """
        return cls(_parts(text, image), id=id, fields=fields or {})

    def content_hash(self) -> str:
        """SHA-256 (hex) over the parts alone: equal content has an equal hash, whatever the id or fields."""
        return _content_hash(self.parts)


@dataclass(frozen=True, slots=True)
class Query(Content):
    """A question: an instruction that says what is wanted, and parts. `target` is the modality looked for (None: any)."""

    instruction: str | None = None
    target: Modality | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        self.check_parts()
        if self.instruction is not None and not isinstance(self.instruction, str):
            raise TypeError(f"instruction is a {type(self.instruction).__name__}; give a str or None")
        if not self.parts and not (self.instruction or "").strip():
            raise InputError(f"query {self.id or '(no id)'} is empty: give it a text, an image, or both")
        if self.target is not None and self.target not in MODALITIES:
            hint = did_you_mean(str(self.target), MODALITIES)
            raise InputError(f"target modality {self.target!r} is unknown{hint}; choose one of {', '.join(MODALITIES)}")

    @classmethod
    def of(
        cls,
        *,
        text: str | None = None,
        image: ImageLike | None = None,
        instruction: str | None = None,
        target: Modality | None = None,
        id: str | None = None,
    ) -> Query:
        """A query of at most one image and one text; `image` as in `Item.of`."""
        return cls(_parts(text, image), instruction=instruction, target=target, id=id)

    def content_hash(self) -> str:
        """SHA-256 (hex) over instruction, target and parts."""
        return _content_hash((self.instruction or "", self.target or "", *self.parts))


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the encoder returns for one input.

    `vector`: float32 [D], unit length. `reasoning`: the text written before `<|emb|>`, "" where `route` is direct, of
    `tokens` tokens. `emb_probability`: of `<|emb|>` at the first step. `truncated`: the model stopped before it wrote `<|emb|>`;
    `ended` says why, where that is known: it ended its answer ("turn"), or its token budget was spent. `cut`: text tokens of the
    input left out because the model reads no more than `text_limit` (None: not known).
    """

    vector: Vector
    route: TakenRoute
    reasoning: str
    tokens: int
    emb_probability: float
    truncated: bool
    cut: int = 0
    ended: Ended = None
    text_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item: what it was ranked by, its rank from 1, and what the index keeps of it.

    `score` is the cosine similarity to the query in [-1, 1], or BM25 where words alone were looked for, or what fused both;
    `scores` says what each (`vector`, `keyword`, `rerank`) gave. `similar`: ids of near-duplicates that are hidden behind it.
    """

    id: str
    score: float
    rank: int
    modality: Modality
    text: str | None
    image: str | None
    fields: Mapping[str, Value]
    scores: Mapping[str, float] = field(default_factory=dict)
    similar: tuple[str, ...] = ()


def _parts(text: str | None, image: ImageLike | None) -> tuple[Part, ...]:
    parts: list[Part] = []
    if image is not None:
        parts.append(as_image(image))
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; give a str or None")
    if text is not None and text.strip():
        parts.append(text)
    return tuple(parts)


def check_route(route: str) -> Route:
    """The route; InputError, with the nearest known one, for any other word."""
    if route in ROUTES:
        return ROUTES[ROUTES.index(route)]
    raise InputError(f"route {route!r} is unknown{did_you_mean(str(route), ROUTES)}; choose one of {', '.join(ROUTES)}")


def as_image(image: ImageLike) -> ImageInput:
    """What stands for an image, as one; TypeError for anything else. A path is not touched before the image is read."""
    if isinstance(image, ImageInput):
        return image
    if isinstance(image, Image.Image):
        return ImageInput.from_pil(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return ImageInput.from_bytes(bytes(image))
    if isinstance(image, str | os.PathLike):
        return ImageInput.open(image)
    raise TypeError(f"image is a {type(image).__name__}; give a traceir.ImageInput, a PIL image, bytes, or the path of a file")


def _content_hash(parts: tuple[Part, ...]) -> str:
    described = [["text", part] if isinstance(part, str) else ["image", part.sha256] for part in parts]
    return hashlib.sha256(json.dumps(described, ensure_ascii=False).encode()).hexdigest()
