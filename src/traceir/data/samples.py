"""Training data as Examples: an M-BEIR folder's train split joined with its reasoning labels, in batches fixed by (seed, step).

A batch comes from one task, so that its in-batch negatives are hard; tasks take turns by their shares (the paper's task-aware
sampling). Neighbours in a train file stay together in families, since builders write near twins side by side; a batch of lessons
is one run of neighbours, which are of like length. The same samples written inline, for data too large for memory, are read by
cot.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from traceir.data import mbeir
from traceir.errors import DataError, TrainError
from traceir.images import ImageInput
from traceir.items import Item, Query
from traceir.prompts import completion_text

COTS: Final = ("both", "reasoning", "answer", "tagged", "none")
CANDIDATES: Final = ("direct", "answer", "reason")
SAMPLINGS: Final = ("balanced", "proportional", "temperature")
CLOSING_TAG: Final = " </answer>"

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from.

    A pair has a `query`, a `candidate` and `right`, the dids of all positives of the query, in the pool or not; a lesson has no
    candidate, and its completion ends the turn instead of asking for an embedding. `completion` is what the query's model writes
    before `<|emb|>`, `described` what the candidate's writes ("": `<|emb|>` at once). `negatives` are further candidates that
    are wrong for this query, none of them in `right`.
    """

    query: Query
    completion: str
    candidate: Item | None
    right: frozenset[str]
    negatives: tuple[Item, ...] = ()
    described: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training query with its label and its candidates. `positives` are those in the pool, at least one."""

    record: mbeir.Record
    label: mbeir.Label | None
    positives: tuple[mbeir.Candidate, ...]
    negatives: tuple[mbeir.Candidate, ...]


@dataclass(frozen=True, slots=True)
class Teaching:
    """What of a Sample goes into its Example.

    `cot`: what a complex query writes (`completion`). `candidates`: what candidates write (`description`). `reasoned`: share of
    the complex queries that keep their reasoning; the others are taught as simple ones. `negatives`: hard negatives of a query,
    fewer where its list is shorter. `any_target`: share of Examples whose query does not say which modality it looks for.
    """

    cot: str = "both"
    candidates: str = "direct"
    reasoned: float = 1.0
    negatives: int = 0
    any_target: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("cot", self.cot, COTS)
        _check_choice("candidates", self.candidates, CANDIDATES)
        for name, share in (("reasoned", self.reasoned), ("any_target", self.any_target)):
            if not 0.0 <= share <= 1.0:
                raise TrainError(f"{name} is {share}; it is a share from 0 to 1")
        if self.negatives < 0:
            raise TrainError(f"negatives is {self.negatives}; give 0 or more for each query")

    @property
    def labelled(self) -> bool:
        """Whether labels have any part in it."""
        return self.cot != "none" or self.candidates != "direct"

    def completion(self, label: mbeir.Label | None) -> str:
        """What the label's query writes; "" for a simple one and for one that `reasoned` leaves without its reasoning."""
        if label is None or not keeps_reasoning(label.qid, self.reasoned, self.seed):
            return ""
        return completion(label, self.cot)

    def description(self, label: mbeir.Label | None) -> str:
        """What a positive of the label's query writes, whatever `cot` and `reasoned` are."""
        if label is None or self.candidates == "direct":
            return ""
        return completion(label, "answer" if self.candidates == "answer" else "both")


def completion(label: mbeir.Label, cot: str) -> str:
    """What a complex query writes before `<|emb|>`; "" for a simple one (paper, Table 5).

    `both` is reasoning and answer; `tagged` closes it with the answer's closing tag in plain text, so that the state before
    `<|emb|>` is the tag's (Table 4). A label without an answer makes a simple query of `answer`. Raises TrainError for an unknown
    `cot`.
    """
    _check_choice("cot", cot, COTS)
    if not label.z or cot == "none":
        return ""
    text = completion_text(None if cot == "answer" else label.reasoning, None if cot == "reasoning" else label.answer)
    return text + CLOSING_TAG if cot == "tagged" and text else text


def keeps_reasoning(qid: str, share: float, seed: int) -> bool:
    """Whether a query is among the `share` that keep their reasoning.

    Decided by a hash of seed and qid, so that it depends on no order, and what is kept of a share is kept of every larger one.
    """
    digest = hashlib.blake2b(f"{seed}:{qid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


class TaskData:
    """All examples of one task, materialised on demand from plain records (a few hundred bytes each)."""

    root = Path()
    """The folder that picture paths start from."""

    def __init__(self, name: str, records: Sized) -> None:
        self.name = name
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def example(self, number: int, draw: np.random.Generator) -> Example:
        raise NotImplementedError


class Pairs(TaskData):
    """Query-candidate pairs of one M-BEIR task, wherever its samples lie: equal samples and draws make equal Examples.

    `root` is the folder that picture paths are relative to, `prompts` the task's instructions.
    """

    def __init__(self, name: str, records: Sized, root: Path, prompts: Sequence[str], teaching: Teaching) -> None:
        super().__init__(name, records)
        self.root, self.prompts, self.teaching = root, prompts, teaching

    def sample(self, number: int) -> Sample:
        raise NotImplementedError

    def description(self, did: str) -> str:
        """What the candidate of this did writes before `<|emb|>`; "" where no label tells."""
        raise NotImplementedError

    def samples(self) -> Iterator[Sample]:
        """All samples in order."""
        return (self.sample(number) for number in range(len(self)))

    def example(self, number: int, draw: np.random.Generator) -> Example:
        """The Example of one sample: `draw` picks instruction, positive, whether the target is named, then the negatives."""
        sample, teaching = self.sample(number), self.teaching
        prompt = self.prompts[int(draw.integers(len(self.prompts)))] if self.prompts else None
        chosen = sample.positives[int(draw.integers(len(sample.positives)))]
        query = mbeir.to_query(sample.record, prompt, self.root)
        if teaching.any_target and draw.random() < teaching.any_target:
            query = replace(query, target=None)
        count = min(teaching.negatives, len(sample.negatives))
        wrong = draw.choice(len(sample.negatives), size=count, replace=False).tolist() if count else []
        return Example(
            query,
            teaching.completion(sample.label),
            mbeir.to_item(chosen, self.root),
            frozenset(sample.record.positives),
            tuple(mbeir.to_item(sample.negatives[place], self.root) for place in wrong),
            self.description(chosen.did),
        )


class PairData(Pairs):
    """Pairs of records, labels and a pool in memory."""

    def __init__(
        self,
        name: str,
        records: Sequence[mbeir.Record],
        root: Path,
        prompts: Sequence[str],
        candidates: Mapping[str, mbeir.Candidate],
        labels: Mapping[str, mbeir.Label],
        teaching: Teaching,
        descriptions: Mapping[str, str],
    ) -> None:
        super().__init__(name, records, root, prompts, teaching)
        self.pairs, self.candidates, self.labels, self.descriptions = records, candidates, labels, descriptions

    def sample(self, number: int) -> Sample:
        record = self.pairs[number]
        negatives = self.teaching.negatives > 0
        return join(record, self.labels.get(record.qid), self.candidates, f"the train pool of {self.root}", negatives=negatives)

    def description(self, did: str) -> str:
        return self.descriptions.get(did, "")


def join(
    record: mbeir.Record, label: mbeir.Label | None, pool: Mapping[str, mbeir.Candidate], place: str, *, negatives: bool
) -> Sample:
    """The Sample of a record: its positives in the pool, and on demand its negatives, each once, without its positives.

    Positives may be absent from the pool (those of OVEN and InfoSeek name each other's candidates), but not all of them; of the
    negatives none may. Raises DataError that names query, did and `place`, the pool.
    """
    positives = tuple(pool[did] for did in record.positives if did in pool)
    if not positives:
        shown = ", ".join(record.positives[:3]) or "none given"
        raise DataError(f"query {record.qid}: no positive ({shown}) is in {place}; complete the pool or remove the query")
    wrong = [did for did in dict.fromkeys(record.negatives) if did not in record.positives] if negatives else []
    if missing := next((did for did in wrong if did not in pool), None):
        raise DataError(f"query {record.qid}: negative {missing} is not in {place}; complete the pool, or leave out negatives")
    return Sample(record, label, positives, tuple(pool[did] for did in wrong))


def first_tellers(entries: Iterable[tuple[str, Iterable[str], Told]]) -> dict[str, Told]:
    """did -> what the first query that has it among its positives tells of it, from (qid, positives, what it tells).

    First by qid, compared part by part, numbers by value ("8:9" before "8:10"), whatever the order of the entries.
    """
    found: dict[str, tuple[list[tuple[int, str]], Told]] = {}
    for qid, dids, told in entries:
        key = [(len(part), part) for part in qid.split(":")]
        for did in dids:
            if did not in found or key < found[did][0]:
                found[did] = (key, told)
    return {did: told for did, (_, told) in found.items()}


class LessonData(TaskData):
    """Pretraining lessons: picture and prompt in, text out (format: lessons/*.jsonl, docs/formats.md)."""

    def __init__(self, name: str, root: Path, lines: Sequence[tuple[str | None, str, str]]) -> None:
        super().__init__(name, lines)
        self.lines, self.root = lines, root

    def example(self, number: int, draw: np.random.Generator) -> Example:
        name, prompt, target = self.lines[number]
        image = ImageInput.open(self.root / name) if name else None
        return Example(Query.of(text=prompt or None, image=image), target, None, frozenset())


def read_pairs(
    root: Path,
    *,
    cot: str = "both",
    candidates: str = "direct",
    reasoned: float = 1.0,
    negatives: int = 0,
    any_target: float = 0.0,
    seed: int = 0,
) -> list[PairData]:
    """The train split of an M-BEIR folder, one PairData a task; the settings are those of `Teaching`.

    M-BEIR-CoT has no labels for candidates, so the candidate side of the paper's Table 6 is taught from those of the queries: a
    candidate writes the answer (`candidates="answer"`), or reasoning and answer (`"reason"`), of the first complex query by qid
    that has it among its positives; one that no label describes writes `<|emb|>` at once.
    """
    teaching = Teaching(cot, candidates, reasoned, negatives, any_target, seed)
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(mbeir.train_pool_path(root))}
    instructions = mbeir.read_instructions(root)
    descriptions: dict[str, str] = {}
    found: list[PairData] = []
    for dataset in mbeir.train_datasets(root):
        labels = mbeir.read_labels(mbeir.train_labels_path(root, dataset)) if teaching.labelled else {}
        by_task: dict[int, list[mbeir.Record]] = {}
        for record in mbeir.read_train(root, dataset):
            by_task.setdefault(record.task_id, []).append(record)
        for task_id, records in sorted(by_task.items()):
            name = f"{dataset}_task{task_id}"
            prompts = task_prompts(instructions, records[0].qid, task_id)
            found.append(PairData(name, records, root, prompts, pool, labels, teaching, descriptions))
    if not found:
        raise TrainError(f"{root} has no query/train/*.jsonl; build or download the train split first")
    if teaching.candidates != "direct":
        told = ((r.qid, r.positives, teaching.description(task.labels.get(r.qid))) for task in found for r in task.pairs)
        descriptions.update(first_tellers(entry for entry in told if entry[2]))
    return found


def task_prompts(instructions: mbeir.Instructions, qid: str, task_id: int) -> tuple[str, ...]:
    """The instructions of a task, by the data set id in one of its qids."""
    return instructions.prompts(mbeir.dataset_id_in(qid, "the train split"), *mbeir.TASK_MODALITIES[task_id])


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


def task_shares(
    sizes: Sequence[int], weights: Sequence[float], sampling: str = "balanced", temperature: float = 2.0
) -> list[float]:
    """The share of the steps that each task gets, in sum 1: weight x size^0 (`balanced`), x size (`proportional`) or
    x size^(1 / temperature) (`temperature`).

    Whatever the shares, each InfoNCE batch is of one task (the paper's task-aware sampling). Raises TrainError for an unknown
    mode, a temperature that is not above 0, a negative weight, and where no task has a share.
    """
    _check_choice("sampling", sampling, SAMPLINGS)
    if sampling == "temperature" and not temperature > 0:
        raise TrainError(f"sampling_temperature is {temperature}; it must be above 0 (1: proportional; larger: more even)")
    if any(weight < 0 for weight in weights):
        raise TrainError(f"task weights are {list(weights)}; each must be at least 0")
    power = {"balanced": 0.0, "proportional": 1.0}.get(sampling, 1.0 / temperature if temperature else 0.0)
    parts = [weight * float(size) ** power for size, weight in zip(sizes, weights, strict=True)]
    if not sum(parts) > 0:
        raise TrainError("all task weights are zero; give at least one task a weight")
    return [part / sum(parts) for part in parts]


class Schedule:
    """Which examples make up step n: a pure function of (seed, step), so that resuming needs no sampler state.

    In every epoch of a task every one of its examples is seen. Families begin at multiples of `family`; the last of a task whose
    length is no multiple is filled up with rows from other families, and from where moves on with the epoch, so that none is
    seen more often than another in the long run.
    """

    def __init__(
        self, tasks: Sequence[TaskData], weights: Sequence[float], *, batch: int, family: int, steps: int, seed: int
    ) -> None:
        if family < 1 or batch % family:
            raise TrainError(f"batch {batch} is not a multiple of family {family}; change one of them")
        if empty := next((task.name for task, weight in zip(tasks, weights, strict=True) if weight and not len(task)), None):
            raise TrainError(f"task {empty} has no examples; complete its files or give it the weight 0")
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

    def rows(self, step: int) -> list[int]:
        """The numbers, within its task, of the examples of a step: `batch` of them, family by family."""
        number, task = int(self.chosen[step]), self.task(step)
        family = self.batch if isinstance(task, LessonData) else self.family
        size, families = len(task), -(-len(task) // family)
        short = families * family - size
        others = (families - 1) * family or size  # where the last family is filled up from
        need = self.batch // family
        rows: list[int] = []
        for place in range(int(self.turn[step]) * need, (int(self.turn[step]) + 1) * need):
            epoch, within = divmod(place, families)
            start = int(self._order(number, epoch, families)[within]) * family
            rows += [row if row < size else (row - size + epoch * short) % others for row in range(start, start + family)]
        return rows

    def examples(self, step: int) -> list[Example]:
        """The examples of a step. Each has a generator of its own, so what one draws has no influence on the others."""
        task = self.task(step)
        return [
            task.example(row, np.random.default_rng((self.seed, 1, step, place))) for place, row in enumerate(self.rows(step))
        ]

    def _order(self, task: int, epoch: int, families: int) -> npt.NDArray[np.int64]:
        """The order of a task's families in one epoch; the newest two epochs of each task are remembered."""
        key = (task, epoch)
        if key not in self._orders:
            for old in [known for known in self._orders if known[0] == task and abs(known[1] - epoch) > 1]:
                del self._orders[old]
            self._orders[key] = np.random.default_rng((self.seed, 2, task, epoch)).permutation(families)
        return self._orders[key]


def image_names(tasks: Sequence[TaskData]) -> list[str]:
    """Paths, relative to the data folder, of every picture that the tasks can show."""
    names: set[str] = set()
    for task in tasks:
        if isinstance(task, Pairs):
            for sample in task.samples():
                shown: tuple[mbeir.Record | mbeir.Candidate, ...] = (sample.record, *sample.positives, *sample.negatives)
                names.update(one.image_path for one in shown if one.image_path)
        elif isinstance(task, LessonData):
            names.update(image for image, _, _ in task.lines if image)
    return sorted(names)


def texts(tasks: Sequence[TaskData]) -> Iterator[str]:
    """Every text of the tasks, for training a tokenizer; of each label the whole, whatever part of it is taught."""
    for task in tasks:
        if isinstance(task, Pairs):
            yield from task.prompts
            for sample in task.samples():
                shown: tuple[mbeir.Record | mbeir.Candidate, ...] = (sample.record, *sample.positives, *sample.negatives)
                yield from (one.text for one in shown if one.text)
                if sample.label and sample.label.z:
                    yield completion(sample.label, "both")
        elif isinstance(task, LessonData):
            for _, prompt, target in task.lines:
                yield f"{prompt} {target}"


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise TrainError(f"{name} is {value!r}; choose one of {', '.join(known)}")
