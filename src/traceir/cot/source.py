"""Where the questions of M-BEIR-CoT come from: the train split of an M-BEIR folder, in parts that can be read alone.

A DataPart is a slice of consecutive lines of one data set's train file: the unit of work, of resuming, of sharing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import CotCase
from traceir.cot.files import json_lines
from traceir.data import mbeir
from traceir.data.cot import PoolFile
from traceir.data.samples import join, task_prompts
from traceir.errors import DataError, InputError
from traceir.prompts import normalise
from traceir.suggest import did_you_mean

COMPOSED: Final = (6, 7, 8)
"""Ids of the tasks whose queries are an image and a text."""


@dataclass(frozen=True, slots=True)
class DataPart:
    """Lines `first` to `first + lines - 1` (from 1, blank ones counted) of a data set's train file; `start`: their first byte."""

    dataset: str
    number: int
    first: int
    lines: int
    start: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.number:05d}"


def find_parts(root: Path, size: int) -> list[DataPart]:
    """All parts of a folder's train split in file order. Reads every line's length, not its content."""
    parts: list[DataPart] = []
    for dataset in mbeir.train_datasets(root):
        with mbeir.train_path(root, dataset).open("rb") as stream:
            lines = iter(tqdm(stream, desc=f"finding parts of {dataset}", unit="line", delay=2.0))
            start = first = 0
            while lengths := [len(raw) for raw in islice(lines, size)]:
                parts.append(DataPart(dataset, first // size, first + 1, len(lengths), start))
                start, first = start + sum(lengths), first + len(lengths)
    if not parts:
        raise DataError(f"{root} has no training queries below query/train; give the root of a folder in M-BEIR's layout")
    return parts


class CaseSource:
    """The cases of a folder, part by part. Of the pool only the offsets of its lines are in memory.

    `tasks`: names such as `cirr_task7` to take, all where it is empty.
    """

    def __init__(self, root: Path, tasks: Collection[str] = ()) -> None:
        self.root, self.tasks = root, frozenset(tasks)
        self.instructions = mbeir.read_instructions(root)
        self.pool = PoolFile(mbeir.train_pool_path(root))

    def cases(self, part: DataPart) -> list[CotCase]:
        """The cases of one part, in file order. Raises DataError with `file:line` for a broken line."""
        path, cases = mbeir.train_path(self.root, part.dataset), list[CotCase]()
        try:
            with path.open("rb") as stream:
                stream.seek(part.start)
                for number, raw in enumerate(islice(stream, part.lines), part.first):
                    record = mbeir.to_record(mbeir.Line.read(raw, f"{path}:{number}")) if raw.strip() else None
                    if record and (not self.tasks or f"{part.dataset}_task{record.task_id}" in self.tasks):
                        sample = join(record, None, self.pool, str(self.pool.path), negatives=False)
                        instruction = normalise(task_prompts(self.instructions, record.qid, record.task_id)[0])
                        task = f"{part.dataset}_task{record.task_id}"
                        cases.append(CotCase(record, task, instruction, sample.positives, self.root))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error
        return cases

    def close(self) -> None:
        self.pool.close()


def read_train(root: Path) -> Iterator[tuple[str, mbeir.Record]]:
    """Every training query of a folder, after its task, such as `cirr_task7`."""
    for dataset in mbeir.train_datasets(root):
        for record in tqdm(mbeir.read_train(root, dataset), desc=f"reading {dataset}", unit="query", delay=2.0):
            yield f"{dataset}_task{record.task_id}", record


def check_tasks(root: Path, wanted: Sequence[str]) -> None:
    """Raises InputError for a task that no training query belongs to. Reads the queries only where one is wanted."""
    missing = set(wanted)
    for dataset in mbeir.train_datasets(root):
        if any(task.rpartition("_task")[0] == dataset for task in missing):
            missing -= {f"{dataset}_task{record.task_id}" for record in mbeir.read_train(root, dataset)}
    if unknown := next((task for task in wanted if task in missing), None):
        known = sorted({task for task, _ in read_train(root)})
        raise InputError(
            f"task {unknown!r} has no training query in {root}{did_you_mean(unknown, known)}; there are {', '.join(known)}"
        )


def find_captions(root: Path, file: Path | None) -> dict[str, str]:
    """Image path -> what it shows in words, for the images of composed queries and of their targets.

    From `file`, JSON lines `{"img_path", "caption"}`, and else from the train pairs of image and text (tasks 0 and 3) of the
    folder itself, of several the first of the shortest. Real M-BEIR has none of its own for CIRR and FashionIQ. Reads the whole
    train split twice.
    """
    wanted = _composed_images(root)
    halves: dict[str, list[tuple[str | None, str | None]]] = {}  # did -> image and text of the queries it belongs to
    captions: dict[str, str] = {}
    for _, record in read_train(root):
        if (record.task_id == 3 and record.image_path in wanted) or (record.task_id == 0 and record.text and wanted):
            half = (record.image_path, None) if record.task_id == 3 else (None, record.text)
            for did in record.positives:
                halves.setdefault(did, []).append(half)
    for item in mbeir.read_pool(mbeir.train_pool_path(root)) if halves else ():
        for image, text in halves.get(item.did, ()):
            path, caption = image or item.image_path, text or item.text
            if path in wanted and caption and len(caption) < len(captions.get(path, caption + " ")):
                captions[path] = caption
    return captions | ({} if file is None else read_captions(file, wanted))


def _composed_images(root: Path) -> set[str]:
    images: set[str] = set()
    targets: set[str] = set()
    for _, record in read_train(root):
        if record.task_id in COMPOSED and record.image_path:
            images.add(record.image_path)
            targets.update(record.positives if record.task_id == 7 else ())
    pool = mbeir.read_pool(mbeir.train_pool_path(root)) if targets else ()
    return images | {item.image_path for item in pool if item.did in targets and item.image_path}


def read_captions(file: Path, wanted: Collection[str] | None = None) -> dict[str, str]:
    """The captions of a file, of the `wanted` images only where they are given. Raises DataError with `file:line`."""

    def read(row: dict[str, Any]) -> tuple[str, str]:
        if not isinstance(row["img_path"], str):
            raise TypeError(f"img_path {str(row['img_path'])[:80]!r}")
        return row["img_path"], str(row["caption"])

    rows = json_lines(file, read, 'give a file of JSON lines {"img_path": ..., "caption": ...}')
    return {path: caption for path, caption in rows if wanted is None or path in wanted}
