"""What a world hands to the builder: drafts of queries and candidates, before ids, files and pools exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

Split = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True)
class Sketch:
    """A picture that can be drawn: `key` names it for ever (equal key = equal pixels) and becomes its file name.

    `draw` returns an RGB picture of 192 x 192 pixels.
    """

    key: str
    draw: Callable[[], Image.Image] = field(compare=False, hash=False, repr=False)


@dataclass(frozen=True, slots=True)
class CandidateDraft:
    """A candidate: a text, a picture, or both. Equal drafts are one candidate of a pool."""

    text: str | None = None
    sketch: Sketch | None = None


@dataclass(frozen=True, slots=True)
class QueryDraft:
    """A query with its labels.

    `positives` are the right answers; `distractors` belong in the pool beside them (source picture, intermediate states, other
    edits, near twins) and are never right. `steps` counts the dependent steps the query needs, 0 to 4; queries of two and more
    steps carry the oracle's `reasoning` (what to write before the answer) and `answer` (a description of the target).
    """

    text: str | None
    sketch: Sketch | None
    positives: tuple[CandidateDraft, ...]
    distractors: tuple[CandidateDraft, ...]
    steps: int
    reasoning: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class LessonDraft:
    """One pretraining lesson: given an optional picture and an optional prompt text, write `target`.

    Lessons of one `kind` of a world exercise one skill, and are one task of training.

    Lessons give the small model what a pretrained Qwen2.5-VL has before TRACE's training starts: it can name what it sees and
    has read the encyclopedia. They come from training compositions only.
    """

    sketch: Sketch | None
    prompt: str
    target: str
    kind: str
