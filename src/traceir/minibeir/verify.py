"""The checks at the end of a build: what MiniBEIR promises of its files, read back from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.minibeir.draft import Split
from traceir.minibeir.rows import HELD_OUT_WORLDS, LESSON_FOLDER, ROWS, TWINS, WORLDS, Scale

_Content = tuple[str | None, str | None]
"""Text and picture path of a candidate."""


def verify(root: Path, scale: Scale, splits: Sequence[Split]) -> dict[str, Any]:
    """Reads the files back, checks what the benchmark promises, and counts. Raises DataError naming the file."""
    counts: dict[str, Any] = {"rows": {row.name: {} for row in ROWS}, "lessons": 0}
    images: set[str] = set()
    trained, train_counts = _verify_train(root, images) if "train" in splits else ({}, Counter())
    for split in splits:
        for task in [] if split == "train" else mbeir.find_tasks(root, split):
            row = next(row for row in ROWS if row.name == task.name)
            seen = trained.get(row.world, set()) if split == "test" and row.world in HELD_OUT_WORLDS else set()
            counts["rows"][task.name][split] = _verify_task(task, row.sizes(scale).pool_least, seen, images)
    if "train" in splits:
        for row in ROWS:
            counts["rows"][row.name]["train"] = {"queries": train_counts[row.name]}
        counts["lessons"] = sum(1 for file in _lesson_files(root) for _ in file.open(encoding="utf-8"))
    counts["pictures"] = len(images)
    for name in sorted(images):
        if not (root / name).is_file():
            raise DataError(f"{root / name}: the picture is named by a file but missing; remove {root} and build again")
    return counts


def _verify_train(root: Path, images: set[str]) -> tuple[dict[str, set[_Content]], Counter[str]]:
    """World -> contents of its training answers and lesson pictures; training queries for each row."""
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(mbeir.train_pool_path(root))}
    trained: dict[str, set[_Content]] = {world: set() for world in WORLDS}
    counts: Counter[str] = Counter()
    for dataset in mbeir.train_datasets(root):
        world = next(row.world for row in ROWS if row.dataset == dataset)
        for record in mbeir.read_train(root, dataset):
            counts[f"{dataset}_task{record.task_id}"] += 1
            images.update(name for name in (record.image_path,) if name)
            for did in record.positives:
                if did not in pool:
                    raise DataError(f"{mbeir.train_pool_path(root)}: positive {did} of {record.qid} is not in the pool")
                trained[world].add((pool[did].text, pool[did].image_path))
    images.update(candidate.image_path for candidate in pool.values() if candidate.image_path)
    for file in _lesson_files(root):
        images.update(lesson["img_path"] for lesson in map(json.loads, file.open("rb")) if lesson["img_path"])
    return trained, counts


def _lesson_files(root: Path) -> list[Path]:
    return sorted((root / LESSON_FOLDER).glob("*.jsonl"))


def _verify_task(task: mbeir.Task, pool_least: int, trained: set[_Content], images: set[str]) -> dict[str, Any]:
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    images.update(candidate.image_path for candidate in pool.values() if candidate.image_path)
    relevant = mbeir.read_qrels(task.qrels_path)
    labels = mbeir.read_labels(task.labels_path)
    steps: Counter[int] = Counter()
    if len(pool) < pool_least:
        raise DataError(f"{task.pool_path}: {len(pool)} candidates, fewer than {pool_least}; make more pool fill")
    for record in mbeir.read_queries(task.query_path):
        where = f"{task.query_path}: query {record.qid}"
        images.update(name for name in (record.image_path,) if name)
        positives, negatives = set(record.positives), set(record.negatives)
        if not positives or relevant.get(record.qid) != positives:
            raise DataError(f"{where} has the positives {sorted(positives)}, its qrels differ; write both from one list")
        if not positives | negatives <= pool.keys():
            missing = sorted((positives | negatives) - pool.keys())[0]
            raise DataError(f"{where}: candidate {missing} is not in {task.pool_path.name}; add it to the pool")
        if positives & negatives:
            raise DataError(f"{where}: {min(positives & negatives)} is both positive and distractor; make them differ")
        if task.split == "test" and len(negatives) < TWINS:
            raise DataError(f"{where} has {len(negatives)} distractors, fewer than {TWINS}; make more near twins")
        leaked = [did for did in positives if (pool[did].text, pool[did].image_path) in trained]
        if leaked:
            raise DataError(f"{where}: positive {leaked[0]} is a training answer too; hold its composition out")
        steps[labels[record.qid].steps] += 1
    return {
        "queries": sum(steps.values()),
        "pool": len(pool),
        "steps": {str(count): steps[count] for count in sorted(steps)},
    }
