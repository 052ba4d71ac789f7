"""MT-FIQ, multi-turn FashionIQ: a garment sought over several turns of picture and feedback (Yuan and Lam, arXiv 2106.04128)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import Entry, as_name, read_entries, read_list
from traceir.evaluation.unseen.task import Case, Missing, Source, Task, settle

GARMENT_WANTED: Final = "Find me a similar fashion image based on the following multi-round modifications."
METRICS: Final = ("hit@5", "hit@8", "hit@10")


def read_mtfiq(root: Path, missing: Missing = "stop", images: Path | None = None) -> Task:
    """All categories together, over the names of the validation split. `images` is another folder for M-BEIR's pictures."""
    source = root / "multiturnfashion" / "data" / "all.val.json"
    folder = images or root / "mbeir_images" / "fashioniq_images"
    pool = read_names(root / "multiturnfashion" / "image_splits" / "split.all.val.json", folder)
    cases = tuple(_case(str(number), entry, folder) for number, entry in enumerate(read_entries(source)))
    return settle(Task("mtfiq", "MT-FIQ", source, cases, pool, METRICS, "hit@5"), missing)


def read_names(path: Path, folder: Path) -> dict[str, Path]:
    """The pool that a split file lists: name -> picture. A name that is listed twice is one garment."""
    pool: dict[str, Path] = {}
    for number, value in enumerate(read_list(path)):
        name = as_name(value)
        if name is None:
            raise DataError(f"{path}, entry {number}: is {value!r}; it must be the name of a picture; download the file again")
        pool[name] = folder / f"{name}.jpg"
    return pool


def join_feedback(texts: list[str]) -> str:
    """What is said of one picture, as one text; "" where nothing is."""
    return " and ".join(text.strip() for text in texts if text.strip())


def _case(id: str, entry: Entry, folder: Path) -> Case:
    target = entry.values("target")
    name = as_name(target[1]) if len(target) == 2 else None
    if name is None:
        raise entry.fail("target", "a list of an address and a name")
    turns = entry.values("reference")
    if not turns:
        raise entry.fail("reference", "a list of at least one turn")
    parts = [part for turn in turns for part in _turn(turn, entry, folder)]
    return Case(id, tuple(parts), (name,), instruction=GARMENT_WANTED)


def _turn(turn: Any, entry: Entry, folder: Path) -> list[Source]:
    """One turn, published as [address, texts, name]: the picture, then what is said of it."""
    wanted = isinstance(turn, list) and len(turn) == 3 and isinstance(turn[1], list)
    name = as_name(turn[2]) if wanted else None
    if name is None or not all(isinstance(text, str) for text in turn[1]):
        raise entry.fail("reference", "a list of turns [address, [texts], name]")
    said = join_feedback(turn[1])
    image = folder / f"{name}.jpg"
    return [image, said] if said else [image]
