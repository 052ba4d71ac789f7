"""The 16 rows of MiniBEIR: their worlds, sizes and instruction prompts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from traceir.data.mbeir import TASK_MODALITIES
from traceir.errors import DataError, InputError
from traceir.items import Modality
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Sketch, Split

Scale = Literal["small", "full"]
SCALES: Final[tuple[Scale, ...]] = ("small", "full")
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
WORLDS: Final = ("scenes", "garments", "news", "entities")
FAMILY: Final = 4
"""A world yields training queries in families of this many that share a source; a family is never torn apart."""
TWINS: Final = 8
"""Distractors that every test query has at least."""
LESSON_FOLDER: Final = "lessons"

HELD_OUT_WORLDS: Final = frozenset({"scenes", "garments", "news"})
"""Worlds whose test answers never occur among training answers; the encyclopedia of `entities` must be known before."""


RowMaker = Callable[[Split, int, int], Iterator[QueryDraft]]
"""(split, count, seed) -> that many drafts."""
FillMaker = Callable[[str, int, int], Iterator[CandidateDraft]]
"""(name of a row, count, seed) -> further candidates for the row's pool, right for no query."""
LessonMaker = Callable[[int, int], Iterator[LessonDraft]]
"""(count, seed) -> lessons."""


@dataclass(frozen=True)
class World:
    """What makes drafts: one function for each row by the row's name, one for pool fill, one for lessons."""

    rows: Mapping[str, RowMaker]
    pool_fill: FillMaker
    lessons: LessonMaker


@dataclass(frozen=True)
class Sizes:
    """Queries for each split and the least and the aimed-at greatest size of a pool (twins may push it beyond)."""

    train: int
    val: int
    test: int
    pool_least: int
    pool_most: int

    def queries(self, split: Split) -> int:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


@dataclass(frozen=True)
class Row:
    """One row: a data set in miniature and a task id. `title` is the data set's name in M-BEIR's instructions."""

    dataset: str
    title: str
    dataset_id: int
    task_id: int
    world: str
    train_full: int
    prompts: tuple[str, str, str, str]

    @property
    def name(self) -> str:
        return f"{self.dataset}_task{self.task_id}"

    @property
    def query_modality(self) -> Modality:
        return TASK_MODALITIES[self.task_id][0]

    @property
    def cand_modality(self) -> Modality:
        return TASK_MODALITIES[self.task_id][1]

    @property
    def split_pools(self) -> bool:
        """Whether val and test have pools of their own, as MSCOCO's rows do."""
        return self.dataset == "mscoco"

    def sizes(self, scale: Scale) -> Sizes:
        if scale == "full":
            return Sizes(train=self.train_full, val=100, test=320, pool_least=1_000, pool_most=4_000)
        return Sizes(train=64, val=8, test=24, pool_least=120, pool_most=240)


ROWS: Final[tuple[Row, ...]] = (
    Row(
        "visualnews", "VisualNews", 0, 0, "news", 7_000,
        ("Find the news photo of this caption.", "Show the photo of this news.",
         "Which photo tells this news?", "Find a picture of this event."),
    ),
    Row(
        "mscoco", "MSCOCO", 9, 0, "scenes", 10_000,
        ("Find the scene of this caption.", "Show the picture of these words.",
         "Which picture is described?", "Find a picture of this scene."),
    ),
    Row(
        "fashion200k", "Fashion200K", 1, 0, "garments", 6_000,
        ("Find the garment of these words.", "Show the garment described.",
         "Which garment is described?", "Find a picture of this garment."),
    ),
    Row(
        "webqa", "WebQA", 2, 1, "entities", 5_000,
        ("Find the passage that answers this question.", "Which passage tells the answer?",
         "Find the text with the answer.", "Answer this question with a passage."),
    ),
    Row(
        "edis", "EDIS", 3, 2, "news", 7_000,
        ("Find the photo and headline of this news.", "Which news photo with headline is described?",
         "Show the headline and photo of this event.", "Find a picture and text of this news."),
    ),
    Row(
        "webqa", "WebQA", 2, 2, "entities", 5_000,
        ("Find the picture and passage that answer this.", "Which picture with passage tells the answer?",
         "Find the picture and text with the answer.", "Answer this with a picture and a passage."),
    ),
    Row(
        "visualnews", "VisualNews", 0, 3, "news", 7_000,
        ("Find the caption of this news photo.", "Tell the news of this photo.",
         "Which caption tells this photo?", "Find the words of this event."),
    ),
    Row(
        "mscoco", "MSCOCO", 9, 3, "scenes", 8_000,
        ("Find the caption of this scene.", "Tell the words of this picture.",
         "Which caption describes the picture?", "Find the words of this scene."),
    ),
    Row(
        "fashion200k", "Fashion200K", 1, 3, "garments", 6_000,
        ("Find the words of this garment.", "Tell the words of this picture.",
         "Which words describe the garment?", "Find the text of this garment."),
    ),
    Row(
        "nights", "NIGHTS", 4, 4, "scenes", 5_000,
        ("Find the picture most like this.", "Show a picture like this.",
         "Which picture is most like this?", "Find the same scene again."),
    ),
    Row(
        "oven", "OVEN", 5, 6, "entities", 4_000,
        ("Find the passage about this picture.", "Which passage is about the picture?",
         "Find the text that answers this.", "Tell the passage of this emblem."),
    ),
    Row(
        "infoseek", "INFOSEEK", 6, 6, "entities", 9_000,
        ("Find the passage that answers about this.", "Which passage answers about the picture?",
         "Find the text with the answer.", "Answer about the picture with a passage."),
    ),
    Row(
        "fashioniq", "FashionIQ", 7, 7, "garments", 14_000,
        ("Find this garment with the change.", "Show the garment after the change.",
         "Which garment is like this but changed?", "Change the garment as told."),
    ),
    Row(
        "cirr", "CIRR", 8, 7, "scenes", 24_000,
        ("Find this scene with the change.", "Show the scene after the change.",
         "Which picture is like this but changed?", "Change the scene as told."),
    ),
    Row(
        "oven", "OVEN", 5, 8, "entities", 4_000,
        ("Find the picture and passage about this.", "Which picture with passage is about this?",
         "Find the picture and text that answer this.", "Tell the picture and passage of this emblem."),
    ),
    Row(
        "infoseek", "INFOSEEK", 6, 8, "entities", 9_000,
        ("Find the picture and passage that answer.", "Which picture with passage answers about this?",
         "Find the picture and text with the answer.", "Answer with a picture and a passage."),
    ),
)  # fmt: skip
"""In the order of M-BEIR's 16 evaluation rows."""

LESSONS: Final[Mapping[Scale, Mapping[str, int]]] = {
    "small": {"scenes": 64, "garments": 64, "news": 64, "entities": 64},
    "full": {"scenes": 60_000, "garments": 30_000, "news": 12_000, "entities": 24_000},
}
"""Pretraining lessons for each world."""


def row_named(name: str) -> Row:
    for row in ROWS:
        if row.name == name:
            return row
    raise InputError(f"row {name!r} is unknown; choose one of {', '.join(row.name for row in ROWS)}")


def datasets() -> tuple[str, ...]:
    """The ten data sets, by dataset id."""
    return tuple(dict.fromkeys(row.dataset for row in sorted(ROWS, key=lambda row: row.dataset_id)))


def load_worlds() -> dict[str, World]:
    """The worlds of this package, whose modules name each row's function after the row."""
    worlds = {}
    for name in WORLDS:
        module = importlib.import_module(f"traceir.minibeir.{name}")
        makers = {row.name: getattr(module, row.name) for row in ROWS if row.world == name}
        worlds[name] = World(rows=makers, pool_fill=module.pool_fill, lessons=module.lessons)
    return worlds


def instructions_table() -> str:
    """The text of `instructions/query_instructions.tsv`."""
    header = ("query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{n}" for n in range(1, 5)))
    ordered = sorted(ROWS, key=lambda row: (row.dataset_id, row.task_id))
    lines = [(row.query_modality, row.cand_modality, row.title, str(row.dataset_id), *row.prompts) for row in ordered]
    return "".join("\t".join(line) + "\n" for line in (header, *lines))


def check_query(draft: QueryDraft, row: Row, where: str) -> None:
    """Raises DataError where a draft breaks the rules of `draft.py` or of its row."""
    if _modality(draft.text, draft.sketch) != row.query_modality:
        raise DataError(f"{where} is {_modality(draft.text, draft.sketch)}; the row asks for {row.query_modality}")
    if not 0 <= draft.steps <= 4:
        raise DataError(f"{where} has {draft.steps} steps; it must have 0 to 4")
    if draft.steps >= 2 and not (draft.reasoning and draft.answer):
        raise DataError(f"{where} has {draft.steps} steps; queries of two and more need reasoning and answer")
    if not draft.positives:
        raise DataError(f"{where} has no positive; give at least one")
    for candidate in (*draft.positives, *draft.distractors):
        check_candidate(candidate, row, where)
    both = set(draft.positives) & set(draft.distractors)
    if both:
        raise DataError(f"{where}: {both.pop()} is both positive and distractor; make them differ")


def check_candidate(draft: CandidateDraft, row: Row, where: str) -> None:
    if _modality(draft.text, draft.sketch) != row.cand_modality:
        found = _modality(draft.text, draft.sketch)
        raise DataError(f"{where} of {row.name}: a candidate is {found}; the row asks for {row.cand_modality}")


def _modality(text: str | None, sketch: Sketch | None) -> str:
    has_text = bool(text and text.strip())
    return ("image,text" if has_text else "image") if sketch else "text" if has_text else "empty"
