"""The 13 columns in the order of the paper's zero-shot table (table 3), then others, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.errors import InputError
from traceir.evaluation.unseen import readers
from traceir.evaluation.unseen.task import LeftOut, Missing, UnseenTask, settle
from traceir.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class UnseenSet:
    """One task: its title, its folder below the root, its reader and which part that reads, and its metrics (the first: `main`).

    `published` is TRACE's score on the real set, by the same metric, in per cent (arXiv 2603.02929v2, table 3).
    """

    title: str
    folder: str
    read: Callable[[Path, str], readers.UnseenData]
    part: str
    metrics: tuple[str, ...]
    main: str
    published: float | None = None
    by_group: bool = False


_HITS: Final = ("hit@1", "hit@5", "hit@10")
_FIQ: Final = ("hit@10", "hit@50")
SETS: Final[Mapping[str, UnseenSet]] = {
    "sharegpt4v_t2i": UnseenSet("ShareGPT4V t-i", "sharegpt4v", readers.read_sharegpt4v, "t2i", _HITS, "hit@1", 94.9),
    "urban1k_t2i": UnseenSet("Urban-1K t-i", "Urban1k", readers.read_urban1k, "t2i", _HITS, "hit@1", 94.8),
    "flickr30k_t2i": UnseenSet("Flickr30K t-i", "flickr", readers.read_flickr30k, "t2i", _HITS, "hit@1", 84.5),
    "sharegpt4v_i2t": UnseenSet("ShareGPT4V i-t", "sharegpt4v", readers.read_sharegpt4v, "i2t", _HITS, "hit@1", 89.1),
    "urban1k_i2t": UnseenSet("Urban-1K i-t", "Urban1k", readers.read_urban1k, "i2t", _HITS, "hit@1", 94.1),
    "flickr30k_i2t": UnseenSet("Flickr30K i-t", "flickr", readers.read_flickr30k, "i2t", _HITS, "hit@1", 94.5),
    "circo": UnseenSet("CIRCO", "circo", readers.read_circo, "val", ("map@5", "map@10", "map@25", "map@50"), "map@5", 34.8),
    "genecis": UnseenSet("GeneCIS", "genecis", readers.read_genecis, "", ("hit@1", "hit@2", "hit@3"), "hit@1", 20.5, True),
    "visdial": UnseenSet("VisDial", "visdial", readers.read_visdial, "", _HITS, "hit@1", 65.4),
    "vist": UnseenSet("VIST", "vist", readers.read_vist, "", _HITS, "hit@1", 25.8),
    "mtfiq": UnseenSet("MT-FIQ", "multiturnfashion", readers.read_mtfiq, "", ("hit@5", "hit@8", "hit@10"), "hit@5", 63.2),
    "ccneg": UnseenSet("CC-Neg", "ccneg", readers.read_ccneg, "", ("accuracy",), "accuracy", 84.1),
    "sugarcrepe": UnseenSet("SugarCrepe", "sugar-crepe", readers.read_sugarcrepe, "", ("accuracy",), "accuracy", 87.5),
    "cirr": UnseenSet("CIRR R@K", "cirr", readers.read_cirr, "", ("hit@1", "hit@2", "hit@5", "hit@10", "hit@50"), "hit@5"),
    "cirr_subset": UnseenSet("CIRR R_subset@K", "cirr", readers.read_cirr, "subset", ("hit@1", "hit@2", "hit@3"), "hit@1"),
    "fashioniq_dress": UnseenSet("FashionIQ dress", "fashion-iq", readers.read_fashioniq, "dress", _FIQ, "hit@10"),
    "fashioniq_shirt": UnseenSet("FashionIQ shirt", "fashion-iq", readers.read_fashioniq, "shirt", _FIQ, "hit@10"),
    "fashioniq_toptee": UnseenSet("FashionIQ toptee", "fashion-iq", readers.read_fashioniq, "toptee", _FIQ, "hit@10"),
}
TASKS: Final = tuple(SETS)
COLUMNS: Final = TASKS[:13]
CIRCO_TEST: Final = UnseenSet("CIRCO", "circo", readers.read_circo, "test", SETS["circo"].metrics, "map@5")
"""Without truth: for a submission to the authors' server."""


def find_columns(root: Path) -> list[str]:
    """The tasks whose folder is below `root`, in the order of the table. Nothing is read."""
    return [name for name, about in SETS.items() if (root / about.folder).is_dir()]


def read_columns(root: Path, names: Iterable[str], missing: Missing = "stop") -> Iterator[UnseenTask]:
    """The tasks of the named columns, each read when its turn comes, so that only one set is in memory."""
    chosen = list(names)
    if unknown := [name for name in chosen if name not in SETS]:
        raise InputError(f"columns {unknown} are unknown{did_you_mean(unknown[0], TASKS)}; choose from {', '.join(TASKS)}")
    for name in chosen:
        yield read_set(root, name, SETS[name], missing)


def read_set(root: Path, name: str, about: UnseenSet, missing: Missing = "stop") -> UnseenTask:
    """One set as a task. Raises DataError for broken files, and by `missing` for what is not there."""
    data = about.read(root, about.part)
    shape = data.source, tuple(data.cases), data.pool, about.metrics, about.main, about.by_group, LeftOut(files=data.absent)
    return settle(UnseenTask(name, about.title, *shape), missing)
