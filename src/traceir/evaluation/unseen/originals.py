"""CIRR and FashionIQ from their authors' own files, scored as their authors score them.

M-BEIR holds both too, with its own pools and positives: its rows are another measurement (docs/unseen.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from traceir.evaluation.unseen.annotations import below, read_entries, read_object
from traceir.evaluation.unseen.circo import CHANGE_WANTED
from traceir.evaluation.unseen.mtfiq import join_feedback, read_names
from traceir.evaluation.unseen.task import Case, Missing, Task, settle

GARMENT_WANTED: Final = "Find a garment like the one in the image, with the described changes."
CIRR_METRICS: Final = ("hit@1", "hit@2", "hit@5", "hit@10", "hit@50")
CIRR_SUBSET_METRICS: Final = ("hit@1", "hit@2", "hit@3")
FASHIONIQ_METRICS: Final = ("hit@10", "hit@50")


def read_cirr(
    captions: Path, split: Path, images: Path, missing: Missing = "stop", instruction: str = CHANGE_WANTED
) -> tuple[Task, Task]:
    """CIRR (arXiv 2108.04024): R@K over the whole split, and R_subset@K over the other members of the query's image set.

    `captions` is cap.rc2.val.json, `split` is split.rc2.val.json, whose paths lie below `images`. Right is the hard target. The
    reference picture is no candidate of its own query.
    """
    names = read_object(split)
    pool = {name: below(images, names.text(name), names.where) for name in names.fields}
    cases: list[Case] = []
    subset: list[Case] = []
    for entry in read_entries(captions):
        id, reference, target = entry.name("pairid"), entry.name("reference"), entry.name("target_hard")
        if reference not in pool:
            raise entry.fail("reference", f"a picture of {split}")
        members = entry.entry("img_set").names("members")
        if target not in members or target == reference:
            raise entry.fail("target_hard", "another member of img_set than the reference")
        parts = (pool[reference], entry.text("caption"))
        others = tuple(member for member in members if member != reference)
        cases.append(Case(id, parts, (target,), instruction, masked=(reference,)))
        subset.append(Case(id, parts, (target,), instruction, gallery=others))
    return (
        settle(Task("cirr", "CIRR R@K", captions, tuple(cases), pool, CIRR_METRICS, "hit@5"), missing),
        settle(Task("cirr_subset", "CIRR R_subset@K", captions, tuple(subset), pool, CIRR_SUBSET_METRICS, "hit@1"), missing),
    )


def read_fashioniq(
    category: str, captions: Path, split: Path, images: Path, missing: Missing = "stop", instruction: str = GARMENT_WANTED
) -> Task:
    """FashionIQ (arXiv 1905.12794), one category over the pictures of its own split; the authors report the mean of the three.

    `captions` is cap.CATEGORY.val.json, `split` is split.CATEGORY.val.json, pictures are `images`/NAME.jpg. The two captions are
    joined by "and". Nothing is masked: the authors rank the reference picture too.
    """
    pool = read_names(split, images)
    cases: list[Case] = []
    for number, entry in enumerate(read_entries(captions)):
        texts = entry.values("captions")
        if not all(isinstance(text, str) for text in texts):
            raise entry.fail("captions", "a list of texts")
        said = join_feedback(texts)
        image = images / f"{entry.name('candidate')}.jpg"
        cases.append(Case(str(number), (image, said) if said else (image,), (entry.name("target"),), instruction))
    task = Task(f"fashioniq_{category}", f"FashionIQ {category}", captions, tuple(cases), pool, FASHIONIQ_METRICS, "hit@10")
    return settle(task, missing)
