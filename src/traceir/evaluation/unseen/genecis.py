"""GeneCIS: which of a small gallery is like the reference under a condition (Vaze et al., CVPR 2023, arXiv 2306.07969)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from traceir.evaluation.unseen.annotations import Entry, read_entries
from traceir.evaluation.unseen.circo import CHANGE_WANTED
from traceir.evaluation.unseen.task import Case, LeftOut, Missing, Source, Task, settle

FILES: Final = ("change_object", "focus_object", "change_attribute", "focus_attribute")
SAME_WANTED: Final = "I'm looking for an image with the same attributes as described."
METRICS: Final = ("hit@1", "hit@2", "hit@3")


def read_genecis(root: Path, missing: Missing = "stop") -> Task:
    """The four files as four groups; the result is the mean of their hit@1. Each query ranks its own target and gallery.

    A gallery picture that is the target itself counts as right wherever it stands; one that stands twice counts twice against it.
    """
    folder = root / "genecis" / "annotations"
    cases: list[Case] = []
    pool: dict[str, Source] = {}
    absent: list[Path] = []
    for kind in FILES:
        path = folder / f"{kind}.json"
        if not path.is_file():
            absent.append(path)
            continue
        for number, entry in enumerate(read_entries(path)):
            cases.append(_read_case(root / "genecis", kind, number, entry, pool))
    task = Task("genecis", "GeneCIS", folder, tuple(cases), pool, METRICS, "hit@1", True, LeftOut(files=tuple(absent)))
    return settle(task, missing)


def _read_case(folder: Path, kind: str, number: int, entry: Entry, pool: dict[str, Source]) -> Case:
    """One sample. Adds its target and gallery to the pool."""
    named = _name_images(folder, kind, number, entry)
    _, reference = next(named)
    gallery: list[str] = []
    for id, path in named:
        pool[id] = path
        gallery.append(id)
    return Case(
        f"{kind}/{number}",
        (reference, entry.text("condition")),
        (gallery[0],),
        instruction=SAME_WANTED if kind == "focus_attribute" else CHANGE_WANTED,
        gallery=tuple(gallery),
        group=kind,
    )


def _name_images(folder: Path, kind: str, number: int, entry: Entry) -> Iterator[tuple[str, Path]]:
    """Id and file of the reference, the target, and the gallery in order.

    Attribute samples name crops by image, sample and place (0 the reference, 1 the target), object samples whole COCO pictures.
    """
    for place, one in enumerate((entry.entry("reference"), entry.entry("target"), *entry.entries("gallery"))):
        if kind.endswith("_object"):
            name = f"{one.name('val_image_id'):0>12}.jpg"
            yield f"coco/{name}", folder / "val2017" / name
        else:
            name = f"{one.name('image_id')}_{number}_{place}.jpg"
            yield f"{kind}/{name}", folder / "visual_genome" / kind / name
