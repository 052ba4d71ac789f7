"""The checks at the end of a build: what MiniBEIR promises of its files, read back from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.minibeir.rows import HELD_OUT_WORLDS, LESSON_FOLDER, POOLS, ROWS, TWINS, DrawnRow, Scale

_Content = tuple[str | None, str | None]
"""Text and image path of a candidate."""


def verify(root: Path, scale: Scale, splits: Sequence[mbeir.Split]) -> dict[str, Any]:
    """Reads the files back, checks what the benchmark promises, and counts. Raises DataError naming the file."""
    counts: dict[str, Any] = {"rows": {row.name: {} for row in ROWS}, "lessons": 0}
    images: set[str | None] = set()
    trained: dict[str, set[_Content]] = {row.world: set() for row in ROWS}
    if "train" in splits:
        train_counts = _verify_train(root, trained, images)
        lessons = [json.loads(line) for file in (root / LESSON_FOLDER).glob("*.jsonl") for line in file.open("rb")]
        images.update(lesson["img_path"] for lesson in lessons)
        counts["lessons"] = len(lessons)
    for split in [split for split in splits if split != "train"]:
        for task, row in zip(mbeir.find_tasks(root, split), ROWS, strict=True):
            seen = trained[row.world] if split == "test" and row.world in HELD_OUT_WORLDS else set()
            counts["rows"][row.name][split] = _verify_task(task, row, scale, seen, images)
    for row in ROWS if "train" in splits else ():
        counts["rows"][row.name]["train"] = {"queries": train_counts[row.name]}
    images.discard(None)
    for name in sorted(map(str, images)):
        if not (root / name).is_file():
            raise DataError(f"{root / name}: the image is named by a file but missing; remove {root} and build again")
    return counts | {"pictures": len(images)}


def _verify_train(root: Path, trained: dict[str, set[_Content]], images: set[str | None]) -> Counter[str]:
    """Training queries for each row; adds the contents of training answers by world."""
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(mbeir.train_pool_path(root))}
    counts: Counter[str] = Counter()
    for dataset in mbeir.train_datasets(root):
        world = next(row.world for row in ROWS if row.dataset == dataset)
        for record in mbeir.read_train(root, dataset):
            counts[f"{dataset}_task{record.task_id}"] += 1
            images.add(record.image_path)
            for did in record.positives:
                if did not in pool:
                    raise DataError(f"{mbeir.train_pool_path(root)}: positive {did} of {record.qid} is not in the pool")
                trained[world].add((pool[did].text, pool[did].image_path))
    images.update(candidate.image_path for candidate in pool.values())
    return counts


def _verify_task(
    task: mbeir.Task, row: DrawnRow, scale: Scale, trained: set[_Content], images: set[str | None]
) -> dict[str, Any]:
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    relevant, labels = mbeir.read_qrels(task.qrels_path), mbeir.read_labels(task.labels_path)
    steps: Counter[int] = Counter()

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise DataError(what)

    def demand_modality(where: str, each: mbeir.Record | mbeir.Candidate, wanted: str) -> None:
        images.add(each.image_path)
        shown = ",".join(name for name, part in (("image", each.image_path), ("text", each.text)) if part)
        demand(shown == wanted, f"{where} is {shown}; the row asks for {wanted}")

    for did, candidate in pool.items():
        demand_modality(f"{task.pool_path}: candidate {did}", candidate, row.cand_modality)
    least = POOLS[scale][0]
    demand(len(pool) >= least, f"{task.pool_path}: {len(pool)} candidates, fewer than {least}; make more pool fill")
    for record in mbeir.read_queries(task.query_path):
        where = f"{task.query_path}: query {record.qid}"
        positives, negatives = set(record.positives), set(record.negatives)
        both, missing = positives & negatives, (positives | negatives) - pool.keys()
        leaked = [did for did in positives & pool.keys() if (pool[did].text, pool[did].image_path) in trained]
        demand_modality(where, record, row.query_modality)
        demand(bool(positives), f"{where} has no positive; give at least one")
        demand(relevant.get(record.qid) == positives, f"{where}: its qrels differ from its positives; write both from one list")
        demand(not missing, f"{where}: candidates {sorted(missing)} are not in {task.pool_path.name}; add them to the pool")
        demand(not both, f"{where}: {sorted(both)} is both positive and distractor; make them differ")
        twins = task.split != "test" or len(negatives) >= TWINS
        demand(twins, f"{where} has {len(negatives)} distractors, fewer than {TWINS}; make more near twins")
        demand(not leaked, f"{where}: positive {leaked} is a training answer too; hold its composition out")
        demand(labels[record.qid].steps <= 4, f"{where} has {labels[record.qid].steps} steps; it must have 0 to 4")
        steps[labels[record.qid].steps] += 1
    made, wanted = sum(steps.values()), row.count(scale, task.split)
    demand(made == wanted, f"{task.query_path}: world {row.world} makes {made} of {wanted} queries; make exactly as many")
    return {"queries": made, "pool": len(pool), "steps": {str(count): steps[count] for count in sorted(steps)}}
