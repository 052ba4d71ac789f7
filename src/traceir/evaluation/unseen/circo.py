"""CIRCO: a picture and a change, searched in the whole of COCO unlabeled2017, several right pictures each (arXiv 2303.15247).

The truth of the test split is held by the authors' server; for it there is `write_submission`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import Entry, below, read_entries, read_object
from traceir.evaluation.unseen.task import Case, Missing, Task, settle

CHANGE_WANTED: Final = "I'm looking for a similar everyday image with the described changes."
METRICS: Final = ("map@5", "map@10", "map@25", "map@50")
SUBMITTED: Final = 50
"""Images that the server takes for each query."""


def read_circo(root: Path, missing: Missing = "stop", split: Literal["val", "test"] = "val") -> Task:
    """CIRCO. The `test` split comes without right ids. Nothing is masked: the authors rank the reference picture too."""
    folder = root / "circo" / "annotations"
    pool = _read_images(folder / "image_info_unlabeled2017.json", root / "circo" / "unlabeled2017")
    source = folder / f"{split}.json"
    cases = tuple(_case(entry, pool, split) for entry in read_entries(source))
    return settle(Task("circo" if split == "val" else "circo_test", "CIRCO", source, cases, pool, METRICS, "map@5"), missing)


def write_submission(path: Path, rankings: Mapping[str, Sequence[str]]) -> None:
    """Writes the file that the authors' server takes, {query id: [50 image ids]}, whole or not at all.

    `rankings` maps query ids to at least 50 image ids, best first (`score.rankings`). Raises DataError where one has fewer, or
    an id twice.
    """
    for query, ids in rankings.items():
        if len(set(ids[:SUBMITTED])) != SUBMITTED:
            raise DataError(f"query {query}: {len(set(ids[:SUBMITTED]))} different images; the server takes {SUBMITTED} for each")
    content = {query: [int(id) for id in ids[:SUBMITTED]] for query, ids in rankings.items()}
    fresh = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text(json.dumps(content), encoding="utf-8")
    os.replace(fresh, path)


def _read_images(path: Path, folder: Path) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for entry in read_object(path).entries("images"):
        images[str(entry.number("id"))] = below(folder, entry.text("file_name"), entry.where)
    return images


def _case(entry: Entry, pool: Mapping[str, Path], split: str) -> Case:
    reference = entry.name("reference_img_id")
    if reference not in pool:
        raise entry.fail("reference_img_id", "one of the ids of image_info_unlabeled2017.json")
    relevant = entry.names("gt_img_ids") if split == "val" else ()
    if split == "val" and not relevant:
        raise entry.fail("gt_img_ids", "a list of at least one id")
    text = entry.text("relative_caption")
    return Case(entry.name("id"), (pool[reference], text), relevant, instruction=CHANGE_WANTED)
