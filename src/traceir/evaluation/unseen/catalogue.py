"""The 13 columns in the order of the paper's zero-shot table (table 3), by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from traceir.errors import InputError
from traceir.evaluation.unseen.captions import read_flickr30k, read_sharegpt4v, read_urban1k
from traceir.evaluation.unseen.circo import read_circo
from traceir.evaluation.unseen.genecis import read_genecis
from traceir.evaluation.unseen.mtfiq import read_mtfiq
from traceir.evaluation.unseen.originals import read_cirr, read_fashioniq
from traceir.evaluation.unseen.pairs import read_ccneg, read_sugarcrepe
from traceir.evaluation.unseen.task import Missing, Task
from traceir.evaluation.unseen.visdial import read_visdial
from traceir.evaluation.unseen.vist import read_vist
from traceir.suggest import did_you_mean

_READERS: Final[Mapping[str, tuple[str, Callable[[Path, Missing], Task]]]] = {
    "sharegpt4v_t2i": ("sharegpt4v", lambda root, missing: read_sharegpt4v(root, missing)[0]),
    "urban1k_t2i": ("Urban1k", lambda root, missing: read_urban1k(root, missing)[0]),
    "flickr30k_t2i": ("flickr", lambda root, missing: read_flickr30k(root, missing)[0]),
    "sharegpt4v_i2t": ("sharegpt4v", lambda root, missing: read_sharegpt4v(root, missing)[1]),
    "urban1k_i2t": ("Urban1k", lambda root, missing: read_urban1k(root, missing)[1]),
    "flickr30k_i2t": ("flickr", lambda root, missing: read_flickr30k(root, missing)[1]),
    "circo": ("circo", read_circo),
    "genecis": ("genecis", read_genecis),
    "visdial": ("visdial", read_visdial),
    "vist": ("vist", read_vist),
    "mtfiq": ("multiturnfashion", read_mtfiq),
    "ccneg": ("ccneg", read_ccneg),
    "sugarcrepe": ("sugar-crepe", read_sugarcrepe),
    "cirr": ("cirr", lambda root, missing: _read_cirr(root, missing)[0]),
    "cirr_subset": ("cirr", lambda root, missing: _read_cirr(root, missing)[1]),
    "fashioniq_dress": ("fashion-iq", lambda root, missing: _read_fashioniq("dress", root, missing)),
    "fashioniq_shirt": ("fashion-iq", lambda root, missing: _read_fashioniq("shirt", root, missing)),
    "fashioniq_toptee": ("fashion-iq", lambda root, missing: _read_fashioniq("toptee", root, missing)),
}
"""Name of the task -> its folder below the root, and its reader: the 13 columns of the paper, then others."""

TASKS: Final = tuple(_READERS)
COLUMNS: Final = TASKS[:13]


def find_columns(root: Path) -> list[str]:
    """The tasks whose folder is below `root`, in the order of the table. Nothing is read."""
    return [name for name, (folder, _) in _READERS.items() if (root / folder).is_dir()]


def read_columns(root: Path, names: Iterable[str], missing: Missing = "stop") -> Iterator[Task]:
    """The tasks of the named columns, each read when its turn comes, so that only one set is in memory."""
    chosen = list(names)
    if unknown := [name for name in chosen if name not in _READERS]:
        raise InputError(f"columns {unknown} are unknown{did_you_mean(unknown[0], TASKS)}; choose from {', '.join(TASKS)}")
    for name in chosen:
        yield _READERS[name][1](root, missing)


def _read_cirr(root: Path, missing: Missing) -> tuple[Task, Task]:
    folder = root / "cirr"
    return read_cirr(folder / "cap.rc2.val.json", folder / "split.rc2.val.json", folder / "images", missing)


def _read_fashioniq(category: str, root: Path, missing: Missing) -> Task:
    folder = root / "fashion-iq"
    captions, split = folder / f"cap.{category}.val.json", folder / f"split.{category}.val.json"
    return read_fashioniq(category, captions, split, folder / "images", missing)
