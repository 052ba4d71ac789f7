"""Where the questions of M-BEIR-CoT come from: the train split of an M-BEIR folder, in parts that can be read alone.

A Part is a slice of consecutive lines of one data set's train file: the unit of work, of resuming, and of sharing among machines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from tqdm import tqdm

from traceir.cot.ask import Case
from traceir.data import mbeir
from traceir.data.cot import PoolFile
from traceir.data.samples import join, task_prompts
from traceir.errors import DataError, InputError
from traceir.outside import read_json
from traceir.prompts import normalise
from traceir.suggest import did_you_mean

COMPOSED: Final = (6, 7, 8)
"""Ids of the tasks whose queries are a picture and a text."""


@dataclass(frozen=True, slots=True)
class Part:
    """Lines `first` to `first + lines - 1` (from 1, blank ones counted) of a data set's train file; `start`: their first byte."""

    dataset: str
    number: int
    first: int
    lines: int
    start: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.number:05d}"


def find_parts(root: Path, size: int) -> list[Part]:
    """All parts of a folder's train split in file order. Reads every line's length, not its content."""
    found: list[Part] = []
    for dataset in mbeir.train_datasets(root):
        path = mbeir.train_path(root, dataset)
        with path.open("rb") as stream:
            lines = iter(tqdm(stream, desc=f"finding parts of {dataset}", unit="line", delay=2.0))
            place = first = 0
            while lengths := [len(raw) for raw in islice(lines, size)]:
                found.append(Part(dataset, first // size, first + 1, len(lengths), place))
                place, first = place + sum(lengths), first + len(lengths)
    if not found:
        raise DataError(f"{root} has no training queries below query/train; give the root of a folder in M-BEIR's layout")
    return found


class Source:
    """The cases of a folder, part by part. Of the pool only the places of its lines are in memory.

    `tasks`: names such as `cirr_task7` to take, all where it is empty.
    """

    def __init__(self, root: Path, tasks: Collection[str] = ()) -> None:
        self.root, self.tasks = root, frozenset(tasks)
        self.instructions = mbeir.read_instructions(root)
        self.pool = PoolFile(mbeir.train_pool_path(root))

    def cases(self, part: Part) -> list[Case]:
        """The cases of one part, in file order. Raises DataError with `file:line` for a broken line."""
        return [case for record in _records(self.root, part) if (case := self._case(record, part.dataset)) is not None]

    def close(self) -> None:
        self.pool.close()

    def _case(self, record: mbeir.Record, dataset: str) -> Case | None:
        task = f"{dataset}_task{record.task_id}"
        if self.tasks and task not in self.tasks:
            return None
        sample = join(record, None, self.pool, str(self.pool.path), negatives=False)
        instruction = normalise(task_prompts(self.instructions, record.qid, record.task_id)[0])
        return Case(record, task, instruction, sample.positives, self.root)


def check_tasks(root: Path, wanted: Sequence[str]) -> None:
    """Raises InputError for a task that no training query belongs to. Reads all queries only where one is wanted."""
    if not wanted:
        return
    found: set[str] = set()
    for dataset in mbeir.train_datasets(root):
        missing = [task for task in wanted if task not in found]
        if any(task.rpartition("_task")[0] == dataset for task in missing):
            found |= {f"{dataset}_task{record.task_id}" for record in mbeir.read_train(root, dataset)}
    if unknown := next((task for task in wanted if task not in found), None):
        there = sorted(
            {f"{name}_task{record.task_id}" for name in mbeir.train_datasets(root) for record in mbeir.read_train(root, name)}
        )
        hint = did_you_mean(unknown, there)
        raise InputError(f"task {unknown!r} has no training query in {root}{hint}; there are {', '.join(there)}")


def find_captions(root: Path, file: Path | None) -> dict[str, str]:
    """Picture path -> what it shows in words, for the pictures of composed queries and of their targets.

    From `file`, JSON lines `{"img_path", "caption"}`, and else from the train pairs of picture and text (tasks 0 and 3) of the
    folder itself. Real M-BEIR has none of its own for CIRR and FashionIQ. Reads the whole train split twice.
    """
    wanted = _composed_images(root)
    return _paired_captions(root, wanted) | ({} if file is None else read_captions(file, wanted))


def read_captions(file: Path, wanted: Collection[str] | None = None) -> dict[str, str]:
    """The captions of a file, of the `wanted` pictures only where they are given. Raises DataError with `file:line`."""
    found: dict[str, str] = {}
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    told = read_json(line)
                    path, caption = told["img_path"], told["caption"]
                    if not isinstance(path, str):
                        raise TypeError(f"img_path {str(path)[:80]!r}")
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f'{file}:{number}: not a caption; write {{"img_path": ..., "caption": ...}}') from error
                if wanted is None or path in wanted:
                    found[path] = str(caption)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; give a file of JSON lines with img_path and caption") from error
    return found


def _composed_images(root: Path) -> set[str]:
    images: set[str] = set()
    targets: set[str] = set()
    for dataset in mbeir.train_datasets(root):
        for record in tqdm(mbeir.read_train(root, dataset), desc=f"pictures of {dataset}", unit="query", delay=2.0):
            if record.task_id in COMPOSED and record.image_path:
                images.add(record.image_path)
                if record.task_id == 7:
                    targets.update(record.positives)
    if targets:
        pool = mbeir.read_pool(mbeir.train_pool_path(root))
        images.update(one.image_path for one in pool if one.did in targets and one.image_path)
    return images


def _paired_captions(root: Path, wanted: set[str]) -> dict[str, str]:
    """Captions from the pairs of tasks 0 and 3; a picture with several keeps the first of its shortest texts."""
    needed: dict[str, list[tuple[str, bool]]] = {}
    found: dict[str, str] = {}

    def tell(path: str, text: str | None) -> None:
        if text and path in wanted and (path not in found or len(text) < len(found[path])):
            found[path] = text

    for dataset in mbeir.train_datasets(root):
        for record in mbeir.read_train(root, dataset):
            if record.task_id == 3 and record.image_path in wanted:
                for did in record.positives:
                    needed.setdefault(did, []).append((str(record.image_path), True))
            elif record.task_id == 0 and record.text and wanted:
                for did in record.positives:
                    needed.setdefault(did, []).append((record.text, False))
    if not needed:
        return found
    for candidate in mbeir.read_pool(mbeir.train_pool_path(root)):
        for told, is_image in needed.get(candidate.did, ()):
            if is_image:
                tell(told, candidate.text)
            elif candidate.image_path:
                tell(candidate.image_path, told)
    return found


def _records(root: Path, part: Part) -> Iterator[mbeir.Record]:
    path = mbeir.train_path(root, part.dataset)
    try:
        with path.open("rb") as stream:
            stream.seek(part.start)
            for number in range(part.first, part.first + part.lines):
                raw = stream.readline()
                if raw.strip():
                    yield mbeir.record_in(raw, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error
