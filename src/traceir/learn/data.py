"""Training data as Examples: an M-BEIR folder's train split joined with its reasoning labels, in batches fixed by (seed, step).

A batch comes from one task, so that its in-batch negatives are hard; tasks take turns by weight (the paper's task-aware
sampling). Neighbours in a train file stay together in families, since builders write near twins side by side; a batch of lessons
is one run of neighbours, which are of like length.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.batch import ImageBudget, Pixels, Processor
from traceir.errors import DataError, PictureError, TrainError
from traceir.items import Item, Query
from traceir.learn import mbeir
from traceir.pictures import Picture
from traceir.prompts import completion_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from.

    A pair has a `query`, a `candidate` and `right`, the dids of all its positives; a lesson has no candidate, and its completion
    ends the turn instead of asking for an embedding.
    """

    query: Query
    completion: str
    candidate: Item | None
    right: frozenset[str]


class TaskData:
    """All examples of one task, materialised on demand from plain records (a few hundred bytes each)."""

    def __init__(self, name: str, records: Sequence[object]) -> None:
        self.name = name
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def example(self, number: int, draw: np.random.Generator) -> Example:
        raise NotImplementedError


class PairData(TaskData):
    """Query-candidate pairs of one M-BEIR task."""

    def __init__(
        self,
        name: str,
        records: Sequence[mbeir.Record],
        root: Path,
        prompts: Sequence[str],
        candidates: Mapping[str, mbeir.Candidate],
        labels: Mapping[str, mbeir.Label],
        any_target: float = 0.0,
    ) -> None:
        super().__init__(name, records)
        self.pairs, self.root, self.prompts = records, root, prompts
        self.candidates, self.labels = candidates, labels
        self.any_target = any_target

    def example(self, number: int, draw: np.random.Generator) -> Example:
        record = self.pairs[number]
        prompt = self.prompts[int(draw.integers(len(self.prompts)))] if self.prompts else None
        chosen = record.positives[int(draw.integers(len(record.positives)))]
        if chosen not in self.candidates:
            raise DataError(f"query {record.qid}: positive {chosen} is not in the train pool of {self.root}")
        label = self.labels.get(record.qid)
        completion = completion_text(label.reasoning, label.answer) if label and label.z else ""
        query = mbeir.to_query(record, prompt, self.root)
        if self.any_target and draw.random() < self.any_target:
            query = replace(query, target=None)
        return Example(
            query,
            completion,
            mbeir.to_item(self.candidates[chosen], self.root),
            frozenset(record.positives),
        )


class LessonData(TaskData):
    """Pretraining lessons: picture and prompt in, text out (format: lessons/*.jsonl, docs/formats.md)."""

    def __init__(self, name: str, root: Path, lines: Sequence[tuple[str | None, str, str]]) -> None:
        super().__init__(name, lines)
        self.lines, self.root = lines, root

    def example(self, number: int, draw: np.random.Generator) -> Example:
        image, prompt, target = self.lines[number]
        picture = Picture.open(self.root / image) if image else None
        return Example(Query.of(text=prompt or None, image=picture), target, None, frozenset())


def read_pairs(root: Path, *, reasoning: bool, any_target: float = 0.0) -> list[PairData]:
    """The train split of an M-BEIR folder, one PairData a task; `reasoning` false drops the labels (the direct baseline).

    `any_target` is the share of examples that do not say which modality they look for.
    """
    pool_file = root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"
    candidates = {candidate.did: candidate for candidate in mbeir.read_pool(pool_file)}
    instructions = mbeir.read_instructions(root)
    found: list[PairData] = []
    for dataset in mbeir.train_datasets(root):
        label_file = root / "cot" / "train" / f"mbeir_{dataset}_train_cot.jsonl"
        labels = mbeir.read_labels(label_file) if reasoning and label_file.is_file() else {}
        by_task: dict[int, list[mbeir.Record]] = {}
        for record in mbeir.read_train(root, dataset):
            by_task.setdefault(record.task_id, []).append(record)
        for task_id, records in sorted(by_task.items()):
            asked, sought = mbeir.TASK_MODALITIES[task_id]
            prompts = instructions.prompts(int(records[0].qid.split(":")[0]), asked, sought)
            found.append(PairData(f"{dataset}_task{task_id}", records, root, prompts, candidates, labels, any_target))
    if not found:
        raise TrainError(f"{root} has no query/train/*.jsonl; build or download the train split first")
    return found


def read_lessons(root: Path) -> list[LessonData]:
    """lessons/*.jsonl of a folder, each file one task: of NAME.jsonl comes `lessons_NAME`.

    Each is shuffled once by a fixed seed, then sorted by length within windows of 4,096, so that neighbours are of like length
    and a family as large as the batch gives batches with little padding.
    """
    kinds: dict[str, list[tuple[str | None, str, str]]] = {}
    for file in sorted((root / "lessons").glob("*.jsonl")):
        lessons = kinds.setdefault(f"lessons_{file.stem}", [])
        with file.open() as stream:
            for number, line in enumerate(stream, 1):
                try:
                    found = json.loads(line)
                    lessons.append((found["img_path"], found["prompt"], found["target"]))
                except (json.JSONDecodeError, KeyError) as error:
                    raise DataError(f"{file}:{number}: not a lesson ({error}); rebuild the folder") from error
    if not kinds:
        raise TrainError(f"{root} has no lessons; only folders built by `traceir minibeir build` do")
    found_tasks = []
    for name, lines in sorted(kinds.items()):
        mixed = [lines[place] for place in np.random.default_rng(0).permutation(len(lines))]
        windows = [mixed[first : first + 4096] for first in range(0, len(mixed), 4096)]
        found_tasks.append(LessonData(name, root, [one for window in windows for one in sorted(window, key=_lesson_length)]))
    return found_tasks


def _lesson_length(line: tuple[str | None, str, str]) -> tuple[bool, int]:
    image, prompt, target = line
    return image is not None, len(prompt) + len(target)


class Schedule:
    """Which examples make up step n: a pure function of (seed, step), so that resuming needs no sampler state."""

    def __init__(
        self, tasks: Sequence[TaskData], weights: Sequence[float], *, batch: int, family: int, steps: int, seed: int
    ) -> None:
        if batch % family:
            raise TrainError(f"batch {batch} is not a multiple of family {family}; change one of them")
        self.tasks, self.batch, self.family, self.seed = tasks, batch, family, seed
        total = sum(weights)
        if total <= 0:
            raise TrainError("all task weights are zero; give at least one task a weight")
        share = np.array(weights) / total
        # Smooth weighted round-robin: at every step the task furthest behind its share goes next.
        credit, chosen = np.random.default_rng(seed).random(len(tasks)) * share, np.empty(steps, dtype=np.int64)
        for step in range(steps):
            credit += share
            chosen[step] = int(credit.argmax())
            credit[chosen[step]] -= 1.0
        self.chosen = chosen
        self._orders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self.turn = np.zeros(steps, dtype=np.int64)
        seen = np.zeros(len(tasks), dtype=np.int64)
        for step, task in enumerate(chosen):
            self.turn[step] = seen[task]
            seen[task] += 1

    def task(self, step: int) -> TaskData:
        return self.tasks[int(self.chosen[step])]

    def examples(self, step: int) -> list[Example]:
        number, task = int(self.chosen[step]), self.task(step)
        family = self.batch if isinstance(task, LessonData) else self.family
        families = max(1, len(task) // family)
        need = self.batch // family
        first = int(self.turn[step]) * need
        places = []
        for place in range(first, first + need):
            epoch, within = divmod(place, families)
            places.append(int(self._order(number, epoch, families)[within]))
        draw = np.random.default_rng((self.seed, 1, step))
        rows = [place * family + offset for place in places for offset in range(family)]
        return [task.example(row % len(task), draw) for row in rows]

    def _order(self, task: int, epoch: int, families: int) -> npt.NDArray[np.int64]:
        """The order of a task's families in one epoch; the newest two epochs of each task are remembered."""
        key = (task, epoch)
        if key not in self._orders:
            for old in [known for known in self._orders if known[0] == task and known[1] < epoch - 1]:
                del self._orders[old]
            self._orders[key] = np.random.default_rng((self.seed, 2, task, epoch)).permutation(families)
        return self._orders[key]


class PixelStore(Mapping[str, Pixels]):
    """Resized pictures of a folder in one memory-mapped file, so that no run decodes a picture twice.

    Lies in `<cache>/<budget>/`: pixels.bin (uint8), names.json [[path, offset, height, width], ...]
    written last. Keys are the pictures' full paths.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.flat = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        listed = json.loads((folder / "names.json").read_text())
        self.places = {str(root / name): (offset, high, wide) for name, offset, high, wide in listed}

    def __getitem__(self, name: str) -> Pixels:
        offset, high, wide = self.places[name]
        return self.flat[offset : offset + high * wide * 3].reshape(high, wide, 3)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def pixel_store(root: Path, cache: Path, processor: Processor, names: Sequence[str]) -> PixelStore:
    """The PixelStore for these pictures (paths relative to root) at the processor's budget, built or completed if needed.

    What it holds already is taken over as it is, whether or not its file is still there.
    """
    folder = cache / _budget_name(processor.image)
    wanted, store = sorted(set(names)), None
    if (folder / "names.json").is_file():
        store = PixelStore(folder, root)
        if all(str(root / name) in store.places for name in wanted):
            return store
        wanted = sorted({*wanted, *(str(Path(name).relative_to(root)) for name in store)})
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[tuple[str, int, int, int]] = []
    offset, fresh = 0, folder / f"pixels.{os.getpid()}.tmp"
    with fresh.open("wb") as stream:
        for name in tqdm(wanted, desc="decoding pictures", unit="picture", mininterval=2.0):
            shown = store[str(root / name)] if store and str(root / name) in store.places else _decode(root / name, processor)
            stream.write(shown.tobytes())
            listed.append((name, offset, shown.shape[0], shown.shape[1]))
            offset += shown.size
    names_fresh = folder / f"names.{os.getpid()}.tmp"
    names_fresh.write_text(json.dumps(listed))
    (folder / "names.json").unlink(missing_ok=True)
    os.replace(fresh, folder / "pixels.bin")
    os.replace(names_fresh, folder / "names.json")
    return PixelStore(folder, root)


def _decode(file: Path, processor: Processor) -> Pixels:
    try:
        return processor.pixels(Picture.open(file))
    except PictureError as error:
        raise DataError(f"{file}: {error}") from error


def picture_names(tasks: Sequence[TaskData]) -> list[str]:
    """Paths, relative to the data folder, of every picture that the tasks can show."""
    names: set[str] = set()
    for task in tasks:
        if isinstance(task, PairData):
            for record in task.pairs:
                shown = [
                    record.image_path,
                    *(task.candidates[d].image_path for d in record.positives if d in task.candidates),
                ]
                names.update(name for name in shown if name)
        elif isinstance(task, LessonData):
            names.update(image for image, _, _ in task.lines if image)
    return sorted(names)


def texts(tasks: Sequence[TaskData]) -> Iterator[str]:
    """Every text of the tasks, for training a tokenizer."""
    for task in tasks:
        if isinstance(task, PairData):
            yield from task.prompts
            for record in task.pairs:
                label = task.labels.get(record.qid)
                shown = [record.text, *(task.candidates[d].text for d in record.positives if d in task.candidates)]
                yield from (text for text in shown if text)
                if label and label.z:
                    yield completion_text(label.reasoning, label.answer)
        elif isinstance(task, LessonData):
            for _, prompt, target in task.lines:
                yield f"{prompt} {target}"


def _budget_name(image: ImageBudget) -> str:
    return f"{image.patch * image.merge}-{image.min_pixels}-{image.max_pixels}"
