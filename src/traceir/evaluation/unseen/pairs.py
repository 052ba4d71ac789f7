"""A picture and two captions of which one is wrong: CC-Neg (arXiv 2403.20312) and SugarCrepe (arXiv 2306.14610).

The picture is the query and the two captions are its gallery. It is right only where the true caption scores strictly higher.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import Entry, below, read_object
from traceir.evaluation.unseen.task import Case, LeftOut, Missing, Source, Task, settle

METRICS: Final = ("accuracy",)
CCNEG_ITEMS: Final = 40_000
"""The authors evaluate on the last 40,000 of 228,246 items and train on the others."""
CCNEG_PREFIX: Final = "datasets/cc3m/"
SUGARCREPE_FILES: Final = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
"""In the order of the authors' table."""


def read_ccneg(root: Path, missing: Missing = "stop") -> Task:
    """CC-Neg: the caption against its negation. Commas are removed from the negation, and from it alone, as by the authors."""
    source = root / "ccneg" / "ccneg_preprocessed.pt"
    data = Entry(_load_tensors(source), str(source))
    paths, annotations = data.values("image_paths"), data.values("annotations")
    if len(paths) != len(annotations):
        raise DataError(f"{source}: {len(paths)} image_paths, {len(annotations)} annotations; download the file again")
    first = max(0, len(paths) - CCNEG_ITEMS)
    pairs = _ccneg_pairs(source, root / "ccneg" / "cc3m", paths[first:], annotations[first:], first)
    return _choose("ccneg", "CC-Neg", source, pairs, LeftOut(), missing)


def read_sugarcrepe(root: Path, missing: Missing = "stop") -> Task:
    """SugarCrepe, its files as groups. The authors give one accuracy a file; ours in one number is over all items."""
    folder = root / "sugar-crepe" / "data"
    if not folder.is_dir():
        folder = folder.parent  # the authors' folder `data` by itself
    absent = tuple(path for kind in SUGARCREPE_FILES if not (path := folder / f"{kind}.json").is_file())
    pairs = _sugarcrepe_pairs(folder, root / "sugar-crepe" / "val2017")
    return _choose("sugarcrepe", "SugarCrepe", folder, pairs, LeftOut(files=absent), missing)


_Pair = tuple[str, str, Path, str, str]
"""Id, group, picture, true caption, wrong caption."""


def _choose(name: str, column: str, source: Path, pairs: Iterable[_Pair], left_out: LeftOut, missing: Missing) -> Task:
    cases: list[Case] = []
    pool: dict[str, Source] = {}
    for id, group, image, true, wrong in pairs:
        gallery = (f"{id}/true", f"{id}/wrong")
        pool |= dict(zip(gallery, (true, wrong), strict=True))
        cases.append(Case(id, (image,), gallery[:1], target="text", gallery=gallery, group=group))
    return settle(Task(name, column, source, tuple(cases), pool, METRICS, "accuracy", left_out=left_out), missing)


def _sugarcrepe_pairs(folder: Path, images: Path) -> Iterator[_Pair]:
    for kind in SUGARCREPE_FILES:
        path = folder / f"{kind}.json"
        if not path.is_file():
            continue  # reported by settle
        whole = read_object(path)
        for key in whole.fields:
            entry = whole.entry(key)
            image = below(images, entry.text("filename"), entry.where)
            yield f"{kind}/{key}", kind, image, entry.text("caption"), entry.text("negative_caption")


def _ccneg_pairs(source: Path, folder: Path, paths: list[Any], annotations: list[Any], first: int) -> Iterator[_Pair]:
    for number, (name, annotation) in enumerate(zip(paths, annotations, strict=True), start=first):
        where = f"{source}, entry {number}"
        if not isinstance(name, str) or CCNEG_PREFIX not in name:
            raise DataError(f"{where}: image_paths holds {name!r}; it must be a path through {CCNEG_PREFIX}")
        image = below(folder, name.rpartition(CCNEG_PREFIX)[2], where)
        entry = Entry(annotation, where)
        true, wrong = entry.entry("json").text("caption"), entry.entry("sop_data").text("negative-prompt")
        yield str(number), "", image, true, wrong.replace(",", "")


def _load_tensors(path: Path) -> object:
    """The content of a file written by torch.save, where it is plain data: nothing that the file names is ever run."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error.__context__ or error)[:200]
        raise DataError(
            f"{path}: is refused ({reason}): reading anything but plain lists, dicts and texts could run code. "
            "Download it from its authors, or load it where that is safe and save its lists again"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: is not a whole file of torch.save: {str(error)[:200] or 'it ends too early'}; download it again"
        ) from error
    return content
