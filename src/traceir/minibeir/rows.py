"""The 16 rows of MiniBEIR, what a world hands to the builder for them, and the stable hashes behind seeds and splits."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, Literal

from PIL import Image

from traceir.data.mbeir import OfTask, Split

Scale = Literal["small", "full"]
SCALES: Final[tuple[Scale, ...]] = ("small", "full")
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
WORLDS: Final = ("scenes", "garments", "news", "entities")
GROUP: Final = 4
"""A world yields training queries in hard-negative groups of this many; a group is never torn apart."""
TWINS: Final = 8
"""Distractors that every test query has at least."""
PRETRAINING_FOLDER: Final = "lessons"
HELD_OUT_WORLDS: Final = frozenset({"scenes", "garments", "news"})
"""Worlds whose test answers never occur among training answers; the encyclopedia of `entities` must be known before."""
VARIANTS: Final = 1000
"""Renderings of a scene or a garment."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """An image that can be drawn (RGB, 192 x 192): `key` names it for ever (equal key = equal pixels)."""

    key: str
    draw: Callable[[], Image.Image] = field(compare=False, hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class CandidateDraft:
    """A candidate: a text, an image, or both. Equal drafts are one candidate of a pool."""

    text: str | None = None
    sketch: Sketch | None = None


@dataclass(frozen=True, slots=True)
class QueryDraft:
    """A query with its labels; `distractors` belong in the pool beside the `positives` and are never right.

    `steps` counts the dependent steps that the query needs, 0 to 4; from two on it carries `reasoning` and `answer`.
    """

    text: str | None
    sketch: Sketch | None
    positives: tuple[CandidateDraft, ...]
    distractors: tuple[CandidateDraft, ...] = ()
    steps: int = 0
    reasoning: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class PretrainingDraft:
    """One pretraining example of a training composition: given an optional image and a prompt, write `target`.

    Those of one `kind` of a world are one task. They give the small model what a pretrained one has: names of what it sees.
    """

    sketch: Sketch | None
    prompt: str
    target: str
    kind: str


RowFunction = Callable[[Split, int, int], Iterator[QueryDraft]]
"""(split, count, seed) -> that many drafts."""


@dataclass(frozen=True)
class DrawnWorld:
    """What makes drafts: one function for each row by name, one for further candidates of a row's pool that are right for
    no query (row, count, seed), one for pretraining examples (count, seed)."""

    rows: Mapping[str, RowFunction]
    pool_fill: Callable[[str, int, int], Iterator[CandidateDraft]]
    pretraining: Callable[[int, int], Iterator[PretrainingDraft]]


@dataclass(frozen=True)
class DrawnRow(OfTask):
    """One row: a data set in miniature and a task id."""

    dataset: str
    dataset_id: int
    task_id: int
    world: str
    train_full: int

    @property
    def name(self) -> str:
        return f"{self.dataset}_task{self.task_id}"

    @property
    def split_pools(self) -> bool:
        """Whether val and test have pools of their own, as MSCOCO's rows do."""
        return self.dataset == "mscoco"

    def count(self, scale: Scale, split: Split) -> int:
        """Queries of a split."""
        return self.train_full if (scale, split) == ("full", "train") else COUNTS[scale][split]


def read_data(name: str) -> Any:
    """The content of a JSON file of this package."""
    return json.loads(resources.files("traceir.minibeir").joinpath(name).read_text(encoding="utf-8"))


WORDS: Final[Mapping[str, Any]] = read_data("words.json")
"""Names, facts, phrases; lists of single words are strings of them."""
_SIZES: Final = read_data("rows.json")
COUNTS: Final[Mapping[Scale, Mapping[Split, int]]] = _SIZES["counts"]
"""Queries of a row; of train at full scale each row has its own number."""
POOLS: Final[Mapping[Scale, tuple[int, int]]] = _SIZES["pools"]
"""The least and the aimed-at greatest size of a pool; twins may push it beyond."""
PRETRAINING: Final[Mapping[Scale, Mapping[str, int]]] = _SIZES["lessons"]
"""Pretraining examples of each world."""
ROWS: Final = tuple(DrawnRow(*fields) for fields in _SIZES["rows"])
"""In the order of M-BEIR's 16 evaluation rows."""


def load_worlds() -> dict[str, DrawnWorld]:
    return {name: importlib.import_module(f"traceir.minibeir.{name}").WORLD for name in WORLDS}


def derive_seed(*parts: object) -> int:
    """A 64-bit seed from the parts' text: the same on every machine and in every process."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def hash_stably(text: str) -> int:
    """A 32-bit number that depends on the text alone, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest(), "big")


def share_split(number: int) -> Split:
    """The split that owns a composition of this stable hash: 80 % train, 5 % val, 15 % test."""
    remainder = number % 100
    return "train" if remainder < 80 else "val" if remainder < 85 else "test"
