"""Training data as Examples: an M-BEIR folder's train split joined with its reasoning labels, in batches fixed by (seed, number).

A batch comes from one task, so that its in-batch negatives are hard; tasks alternate by their shares (the paper's task-aware
sampling). Neighbours in a train file stay together in hard-negative groups, since builders write near twins side by side. The
same samples written inline, for data too large for memory, are read by cot.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from traceir.data import mbeir
from traceir.data.settings import check_choices
from traceir.errors import DataError, TrainError
from traceir.images import ImageInput
from traceir.items import Item, Query
from traceir.prompts import completion_text
from traceir.rerank_prompts import asked_to_describe

CLOSING_TAG: Final = " </answer>"
UNSCORED: Final = 0.5
"""Share of a reranker's queries that it learns without the first stage's scores."""
WINDOW: Final = 4096
"""Lines of a pretraining task within which they are sorted by length."""


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn from; its texts are as in the files.

    A pair has a `query`, a `candidate` and `right`, the dids of all positives of the query, in the pool or not; a pretraining
    example has no candidate, and its completion ends the chat turn instead of asking for an embedding. `completion` is what the
    query's model writes before `<|emb|>`, `described` what the candidate's writes ("": `<|emb|>` at once). `negatives` are
    further candidates that are wrong for this query, none of them in `right`. `similarities` are the first-stage scores of the
    candidate and the negatives, () where they are not known, or left out.
    """

    query: Query
    completion: str
    candidate: Item | None
    right: frozenset[str]
    negatives: tuple[Item, ...] = ()
    described: str = ""
    similarities: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One training query with its label and its candidates. `positives` are those in the pool, at least one."""

    record: mbeir.Record
    label: mbeir.Label | None
    positives: tuple[mbeir.Candidate, ...]
    negatives: tuple[mbeir.Candidate, ...]

    @property
    def contents(self) -> tuple[mbeir.Record | mbeir.Candidate, ...]:
        return (self.record, *self.positives, *self.negatives)


@dataclass(frozen=True, slots=True)
class Supervision:
    """What of a Sample goes into its Example; the fields are those of TrainConfig. TrainError for values that mean nothing."""

    cot: Literal["both", "reasoning", "answer", "tagged", "none"] = "both"
    candidates: Literal["direct", "answer", "reason"] = "direct"
    reasoned: float = 1.0
    negatives: int = 0
    any_target: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
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
        return completion(label, self.cot) if label and keeps_reasoning(label.qid, self.reasoned, self.seed) else ""

    def description(self, label: mbeir.Label | None) -> str:
        """What a positive of the label's query writes, whatever `cot` and `reasoned` are."""
        if label is None or self.candidates == "direct":
            return ""
        return completion(label, "answer" if self.candidates == "answer" else "both")


def completion(label: mbeir.Label, cot: str) -> str:
    """What a complex query writes before `<|emb|>`; "" for a simple one (paper, Table 5).

    `both` is reasoning and answer; `tagged` closes it with the answer's closing tag in plain text, so that the state before
    `<|emb|>` is the tag's (Table 4). A label without an answer makes a simple query of `answer`.
    """
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


@dataclass(eq=False)
class TaskData:
    """All examples of one task, made on demand. `root` is the folder that image paths start from."""

    name: str
    rows: Sequence[Any] = field(repr=False)
    root: Path = Path()

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, number: int, draw: np.random.Generator) -> Example:
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """Every text, for training a tokenizer."""
        raise NotImplementedError

    def image_paths(self) -> Iterator[str]:
        """Every image that an example can show, relative to `root`."""
        raise NotImplementedError


@dataclass(eq=False)
class Pairs(TaskData):
    """Query-candidate pairs of one M-BEIR task, wherever its samples lie: equal samples and draws make equal Examples.

    `rows` are Samples, `prompts` instructions; `descriptions` says what a candidate writes, by did, where a label tells.
    """

    prompts: Sequence[str] = ()
    supervision: Supervision = Supervision()
    descriptions: Mapping[str, str] = field(default_factory=dict, repr=False)

    def example(self, number: int, draw: np.random.Generator) -> Example:
        """The Example of one sample: `draw` picks instruction, positive, whether the target is named, then the negatives."""
        sample: Sample = self.rows[number]
        record, supervision = sample.record, self.supervision
        prompt = self.prompts[int(draw.integers(len(self.prompts)))] if self.prompts else None
        chosen = sample.positives[int(draw.integers(len(sample.positives)))]
        unnamed = bool(supervision.any_target) and draw.random() < supervision.any_target
        count = min(supervision.negatives, len(sample.negatives))
        wrong = draw.choice(len(sample.negatives), size=count, replace=False).tolist() if count else []
        query = Query.of(
            text=_worded(record.text),
            image=mbeir.open_image(record.image_path, self.root),
            instruction=_worded(prompt),
            target=None if unnamed else mbeir.TASK_MODALITIES[record.task_id][1],
            id=record.qid,
        )
        return Example(
            query,
            supervision.completion(sample.label),
            self._item(chosen),
            frozenset(record.positives),
            tuple(self._item(sample.negatives[index]) for index in wrong),
            self.descriptions.get(chosen.did, ""),
            self._similarities(sample, chosen, wrong, draw),
        )

    def _similarities(
        self, sample: Sample, chosen: mbeir.Candidate, wrong: Sequence[int], draw: np.random.Generator
    ) -> tuple[float, ...]:
        """Those of every other query, by chance: a reranker learns to add to them, and to do without."""
        if not sample.record.scores or draw.random() < UNSCORED:
            return ()
        dids = [chosen.did, *(sample.negatives[index].did for index in wrong)]
        return tuple(map(sample.record.scores.__getitem__, dids)) if sample.record.scores.keys() >= set(dids) else ()

    def _item(self, candidate: mbeir.Candidate) -> Item:
        image = mbeir.open_image(candidate.image_path, self.root)
        return Item.of(text=_worded(candidate.text), image=image, id=candidate.did)

    def texts(self) -> Iterator[str]:
        """Of each label the whole, whatever part of it is taught."""
        yield from self.prompts
        for sample in self.rows:
            yield from (content.text for content in sample.contents if content.text)
            if sample.label and sample.label.z:
                yield completion(sample.label, "both")

    def image_paths(self) -> Iterator[str]:
        return (content.image_path for sample in self.rows for content in sample.contents if content.image_path)


def _worded(text: str | None) -> str | None:
    """The text as it is, which the prompt normalises; None where that would leave nothing."""
    return text if text and text.strip().strip('"') else None


def join(
    record: mbeir.Record, label: mbeir.Label | None, pool: Mapping[str, mbeir.Candidate], where: str, *, negatives: bool
) -> Sample:
    """The Sample of a record: its positives in the pool, and on demand its negatives, each once, without its positives.

    Positives may be absent from the pool (those of OVEN and InfoSeek name each other's candidates), but not all of them; of the
    negatives none may. Raises DataError that names query, did and `place`, the pool.
    """
    positives = tuple(pool[did] for did in record.positives if did in pool)
    if not positives:
        shown = ", ".join(record.positives[:3]) or "none given"
        raise DataError(f"query {record.qid}: no positive ({shown}) is in {where}; complete the pool or remove the query")
    wrong = [did for did in dict.fromkeys(record.negatives) if did not in record.positives] if negatives else []
    if missing := next((did for did in wrong if did not in pool), None):
        raise DataError(f"query {record.qid}: negative {missing} is not in {where}; complete the pool, or leave out negatives")
    return Sample(record, label, positives, tuple(pool[did] for did in wrong))


def descriptions_of(samples: Iterable[Sample], supervision: Supervision) -> dict[str, str]:
    """did -> what the first query that has it among its positives says of it; those that nothing is said of are left out.

    First by qid, compared part by part, numbers by value ("8:9" before "8:10"), whatever the order of the samples.
    """
    first: dict[str, tuple[list[tuple[int, str]], str]] = {}
    for sample in samples:
        key = [(len(part), part) for part in sample.record.qid.split(":")]
        description = supervision.description(sample.label)
        for did in sample.record.positives if description else ():
            if did not in first or key < first[did][0]:
                first[did] = (key, description)
    return {did: description for did, (_, description) in first.items()}


def read_pairs(root: Path, **settings: Any) -> list[Pairs]:
    """The train split of an M-BEIR folder, one Pairs a task; the settings are the fields of Supervision.

    M-BEIR-CoT has no labels for candidates, so the candidate side of the paper's Table 6 is taught from those of the queries: a
    candidate writes the answer (`candidates="answer"`), or reasoning and answer (`"reason"`), of the first complex query by qid
    that has it among its positives; one that no label describes writes `<|emb|>` at once.
    """
    supervision, descriptions = Supervision(**settings), dict[str, str]()
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(mbeir.train_pool_path(root))}
    instructions = mbeir.read_instructions(root)
    tasks, where = list[Pairs](), f"the train pool of {root}"
    for dataset in mbeir.train_datasets(root):
        labels = mbeir.read_labels(mbeir.train_labels_path(root, dataset)) if supervision.labelled else {}
        by_task: dict[int, list[Sample]] = {}
        for record in mbeir.read_train(root, dataset):
            sample = join(record, labels.get(record.qid), pool, where, negatives=supervision.negatives > 0)
            by_task.setdefault(record.task_id, []).append(sample)
        for task_id, samples in sorted(by_task.items()):
            prompts = task_prompts(instructions, samples[0].record.qid, task_id)
            tasks.append(Pairs(f"{dataset}_task{task_id}", samples, root, prompts, supervision, descriptions))
    if not tasks:
        raise TrainError(f"{root} has no query/train/*.jsonl; build or download the train split first")
    descriptions.update(descriptions_of((sample for task in tasks for sample in task.rows), supervision))
    return tasks


def task_prompts(instructions: mbeir.Instructions, qid: str, task_id: int) -> tuple[str, ...]:
    """The instructions of a task, by the data set id in one of its qids."""
    return instructions.prompts(mbeir.dataset_id_in(qid, "the train split"), *mbeir.TASK_MODALITIES[task_id])


class PretrainingData(TaskData):
    """A pretraining task: image and prompt in, text out. Its rows are (image path, prompt, target)."""

    def example(self, number: int, draw: np.random.Generator) -> Example:
        name, prompt, target = self.rows[number]
        image = ImageInput.open(self.root / name) if name else None
        return Example(Query.of(text=prompt or None, image=image), target, None, frozenset())

    def texts(self) -> Iterator[str]:
        return (f"{prompt} {target}" for _, prompt, target in self.rows)

    def image_paths(self) -> Iterator[str]:
        return (name for name, _, _ in self.rows if name)


def read_pretraining(root: Path) -> list[PretrainingData]:
    """lessons/*.jsonl of a folder (docs/formats.md), each file one task: of NAME.jsonl comes `lessons_NAME`.

    Each is shuffled once by a fixed seed, then sorted by length within windows, so that neighbours are of like length and a
    group as large as the batch gives batches with little padding.
    """
    tasks = []
    for file in sorted((root / "lessons").glob("*.jsonl")):
        rows: list[tuple[str | None, str, str]] = []
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    fields = json.loads(line)
                    rows.append((fields["img_path"], fields["prompt"], fields["target"]))
                except (json.JSONDecodeError, KeyError) as error:
                    raise DataError(f"{file}:{number}: not a pretraining example ({error}); rebuild the folder") from error
        mixed = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
        windows = (mixed[first : first + WINDOW] for first in range(0, len(mixed), WINDOW))
        by_length = [row for window in windows for row in sorted(window, key=_length)]
        tasks.append(PretrainingData(f"lessons_{file.stem}", by_length, root))
    if not tasks:
        raise TrainError(f"{root} has no pretraining tasks (lessons/*.jsonl); only folders built by `traceir minibeir build` do")
    return tasks


def _length(row: tuple[str | None, str, str]) -> tuple[bool, int]:
    image, prompt, target = row
    return image is not None, len(prompt) + len(target)


class DescribedCandidates(PretrainingData):
    """A candidate in, the answer of a query that it is right for out. Its rows are (candidate, answer)."""

    def example(self, number: int, draw: np.random.Generator) -> Example:
        candidate, answer = self.rows[number]
        return Example(asked_to_describe(mbeir.to_item(candidate, self.root)), answer, None, frozenset())

    def texts(self) -> Iterator[str]:
        return (f"{candidate.text or ''} {answer}" for candidate, answer in self.rows)

    def image_paths(self) -> Iterator[str]:
        return (candidate.image_path for candidate, _ in self.rows if candidate.image_path)


def read_described(root: Path, most: int = 4000) -> list[DescribedCandidates]:
    """Of each task of `read_pairs` whose labels have answers, at most so many, drawn by a fixed seed."""
    tasks = []
    for task in read_pairs(root):
        rows = [(row.positives[0], row.label.answer) for row in task.rows if row.label and row.label.answer]
        mixed = np.random.default_rng(0).permutation(len(rows))[:most]
        tasks += [DescribedCandidates(task.name, [rows[index] for index in mixed], root)] if rows else []
    if not tasks:
        raise TrainError(f"{root} has no labels with answers (cot/train); teach=describe learns from those of complex queries")
    return tasks


Sampling = Literal["balanced", "proportional", "temperature"]


def task_shares(
    sizes: Sequence[int], weights: Sequence[float], sampling: Sampling = "balanced", temperature: float = 2.0
) -> list[float]:
    """The share of the batches that each task gets: weight x size^p, p = 0 (`balanced`), 1 (`proportional`), 1/T (`temperature`).

    Raises TrainError for a temperature that is not above 0, a negative weight, and where no task has a share.
    """
    if sampling == "temperature" and not temperature > 0:
        raise TrainError(f"sampling_temperature is {temperature}; it must be above 0 (1: proportional; larger: more even)")
    if any(weight < 0 for weight in weights):
        raise TrainError(f"task weights are {list(weights)}; each must be at least 0")
    power = {"balanced": 0.0, "proportional": 1.0, "temperature": 1.0 / (temperature or 1.0)}[sampling]
    parts = [weight * float(size) ** power for size, weight in zip(sizes, weights, strict=True)]
    if not sum(parts) > 0:
        raise TrainError("all task weights are zero; give at least one task a weight")
    return [part / sum(parts) for part in parts]


class Schedule:
    """Which examples make up batch n: a pure function of (seed, n), so that resuming needs no sampler state.

    In every epoch of a task every one of its examples is seen. Groups begin at multiples of `group`; the last of a task whose
    length is no multiple is filled up with rows from other groups, and from where moves on with the epoch, so that none is
    seen more often than another in the long run. A pretraining task's group is the whole batch: one run of neighbours.
    """

    def __init__(
        self, tasks: Sequence[TaskData], shares: Sequence[float], *, batch: int, group: int, batches: int, seed: int
    ) -> None:
        if group < 1 or batch % group:
            raise TrainError(f"batch {batch} is not a multiple of group {group}; change one of them")
        if empty := next((task.name for task, share in zip(tasks, shares, strict=True) if share and not len(task)), None):
            raise TrainError(f"task {empty} has no examples; complete its files or give it the weight 0")
        self.tasks, self.batch, self.group, self.seed = tasks, batch, group, seed
        share = np.array(shares) / sum(shares)
        self.chosen, self.nth = np.empty(batches, dtype=np.int64), np.empty(batches, dtype=np.int64)
        # Smooth weighted round-robin: at every batch the task furthest behind its share goes next.
        credit, seen = np.random.default_rng(seed).random(len(tasks)) * share, np.zeros(len(tasks), dtype=np.int64)
        for number in range(batches):
            credit += share
            task = int(credit.argmax())
            credit[task] -= 1.0
            self.chosen[number], self.nth[number] = task, seen[task]
            seen[task] += 1
        self._orders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def task(self, number: int) -> TaskData:
        return self.tasks[int(self.chosen[number])]

    def rows(self, number: int) -> list[int]:
        """The numbers, within its task, of the examples of a batch: group by group."""
        task = self.task(number)
        group = self.batch if isinstance(task, PretrainingData) else self.group
        size, groups = len(task), -(-len(task) // group)
        short = groups * group - size
        others = (groups - 1) * group or size  # where the last group is filled up from
        first, count = int(self.nth[number]) * (self.batch // group), self.batch // group
        rows: list[int] = []
        for position in range(first, first + count):
            epoch, within = divmod(position, groups)
            start = int(self._order(int(self.chosen[number]), epoch, groups)[within]) * group
            rows += [row if row < size else (row - size + epoch * short) % others for row in range(start, start + group)]
        return rows

    def examples(self, number: int) -> list[Example]:
        """The examples of a batch. Each has a generator of its own, so what one draws has no influence on the others."""
        task, draws = self.task(number), np.random.default_rng
        return [task.example(row, draws((self.seed, 1, number, position))) for position, row in enumerate(self.rows(number))]

    def _order(self, task: int, epoch: int, groups: int) -> npt.NDArray[np.int64]:
        """The order of a task's groups in one epoch; the newest two epochs of each task are remembered."""
        key = (task, epoch)
        if key not in self._orders:
            for old in [known for known in self._orders if known[0] == task and abs(known[1] - epoch) > 1]:
                del self._orders[old]
            self._orders[key] = np.random.default_rng((self.seed, 2, task, epoch)).permutation(groups)
        return self._orders[key]
