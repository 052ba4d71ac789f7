"""Reads folders in M-BEIR's layout, real or miniature, unchanged: queries, pools, relevance, instructions, labels.

Format source: the released data set `TIGER-Lab/M-BEIR` as written by UniIR (`src/data/mbeir_data_generator.py`) and
read by UniIR and LamRA. Files are read line by line; what breaks the format is a DataError that names `file:line`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, TypeVar

from traceir.errors import DataError
from traceir.images import ImageInput
from traceir.items import Item, Modality, Query
from traceir.outside import read_json, valid
from traceir.prompts import normalise

Split = Literal["train", "val", "test"]
Parsed = TypeVar("Parsed")

TASK_MODALITIES: Final[Mapping[int, tuple[Modality, Modality]]] = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    5: ("image", "image,text"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
"""Task id -> modality of the query and of the candidate. Id 5 is declared by M-BEIR and used by none of its rows."""

EVAL_ROWS: Final[tuple[str, ...]] = tuple(
    "visualnews_task0 mscoco_task0 fashion200k_task0 webqa_task1 edis_task2 webqa_task2 visualnews_task3 mscoco_task3 "
    "fashion200k_task3 nights_task4 oven_task6 infoseek_task6 fashioniq_task7 cirr_task7 oven_task8 infoseek_task8".split()
)
"""The 16 rows in the order of the paper's Table 1, which is UniIR's order."""

FASHION: Final = frozenset({"fashion200k", "fashioniq"})
"""Data sets scored at 10 instead of 5."""

_MODALITY_NAMES: Final[Mapping[str, Modality]] = {
    "text": "text",
    "image": "image",
    "image,text": "image,text",
    "text,image": "image,text",  # printed so by M-BEIR's README in places
}
_NUMBER = re.compile(r"[0-9]{1,9}")
TASK_NAME = re.compile(r"(?P<dataset>.+)_task(?P<task>[0-8])")


class OfTask:
    """What belongs to one of M-BEIR's tasks, which says the modalities of its queries and candidates."""

    task_id: int

    @property
    def query_modality(self) -> Modality:
        return TASK_MODALITIES[self.task_id][0]

    @property
    def cand_modality(self) -> Modality:
        return TASK_MODALITIES[self.task_id][1]


@dataclass(frozen=True)
class Task(OfTask):
    """One evaluation row of a folder and where its files are; a path may name a file that does not exist."""

    name: str
    dataset: str
    dataset_id: int
    task_id: int
    split: Split
    root: Path

    @property
    def metric_k(self) -> int:
        return 10 if self.dataset in FASHION else 5

    @property
    def query_path(self) -> Path:
        return self.root / "query" / self.split / f"mbeir_{self.name}_{self.split}.jsonl"

    @property
    def pool_path(self) -> Path:
        """The local pool: the file of that split where there is one (MSCOCO), else the one val and test share."""
        folder = self.root / "cand_pool" / "local"
        own, shared = (folder / f"mbeir_{name}_cand_pool.jsonl" for name in (f"{self.name}_{self.split}", self.name))
        return own if own.exists() or (self.dataset == "mscoco" and not shared.exists()) else shared

    @property
    def qrels_path(self) -> Path:
        return self.root / "qrels" / self.split / f"mbeir_{self.name}_{self.split}_qrels.txt"

    @property
    def labels_path(self) -> Path:
        return self.root / "cot" / self.split / f"mbeir_{self.name}_{self.split}_cot.jsonl"


@dataclass(frozen=True, slots=True)
class Record:
    """One query line. `image_path` is relative to the root of the folder; `scores` are first-stage similarities of its candidates
    by did, which `traceir mine` writes."""

    qid: str
    text: str | None
    image_path: str | None
    modality: Modality
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task_id: int
    source: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of a candidate pool. `image_path` is relative to the root of the folder."""

    did: str
    text: str | None
    image_path: str | None
    modality: Modality


@dataclass(frozen=True, slots=True)
class Label:
    """The reasoning label of one query: its dependent steps, whether to reason (z), and what to write where z is 1."""

    qid: str
    steps: int
    z: int
    reasoning: str | None
    answer: str | None


@dataclass(frozen=True)
class Instructions:
    """The prompts of `instructions/query_instructions.tsv`, by data set id, query modality and candidate modality."""

    path: Path
    table: Mapping[tuple[int, Modality, Modality], tuple[str, ...]] = field(repr=False)

    def prompts(self, dataset_id: int, query_modality: Modality, cand_modality: Modality) -> tuple[str, ...]:
        """The prompts of one key, in file order, at least one. Raises DataError where the file has none."""
        prompts = self.table.get((dataset_id, query_modality, cand_modality))
        if prompts is None:
            raise DataError(
                f"{self.path}: no instructions for dataset {dataset_id}, query {query_modality!r}, candidate "
                f"{cand_modality!r}; add a line with these first, second and fourth columns"
            )
        return prompts


@dataclass(frozen=True, slots=True)
class Line:
    """One JSON object whose fields are read with checks: a DataError names `where`, the field, its value and what it must be."""

    fields: Mapping[str, Any]
    where: str

    @classmethod
    def read(cls, raw: bytes | str, where: str) -> Line:
        text = _decoded(raw, where) if isinstance(raw, bytes) else raw
        try:
            fields = read_json(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}): {text[:80].strip()!r}; write one object per line") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where}: {text[:80].strip()!r} is not an object; write one JSON object per line")
        return cls(fields, where)

    def wrong(self, name: str, wanted: str) -> DataError:
        shown = repr(self.fields[name])[:120] if name in self.fields else "missing"
        return DataError(f"{self.where}: {name} is {shown}; it must be {wanted}")

    def text(self, name: str) -> str | None:
        """A string, or None for null, an absent field and blank text."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string or null")
        return valid(value) if value and value.strip() else None

    def identifier(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or value.split() != [value]:
            raise self.wrong(name, 'a string without blanks such as "9:6"')
        return value

    def identifiers(self, name: str) -> tuple[str, ...]:
        """A list of dids, given as strings (M-BEIR's files) or as objects with a `did` (M-BEIR's README)."""
        entries = self.fields.get(name)
        if entries is not None and not isinstance(entries, list):
            raise self.wrong(name, "a list of dids")
        named = [entry.get("did") if isinstance(entry, dict) else entry for entry in entries or ()]
        dids = tuple(did for did in named if isinstance(did, str) and did.split() == [did])
        if len(dids) != len(named):
            raise self.wrong(name, 'a list of did strings such as "9:6", or of objects {"did": "9:6"}')
        return dids

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.fields.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}")
        return value

    def numbers(self, name: str) -> dict[str, float]:
        """An object of numbers, {} for null and an absent field."""
        value = self.fields.get(name) or {}
        if not isinstance(value, dict) or not all(type(number) in (int, float) for number in value.values()):
            raise self.wrong(name, "an object of numbers by did, or null")
        return value

    def image(self, name: str) -> str | None:
        value = self.text(name)
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise self.wrong(name, "a path below the root of the data folder, without '..'")
        return value

    def content(self, text_name: str, image_name: str, modality_name: str) -> tuple[str | None, str | None, Modality]:
        """Text, image path and modality; an image may lack the text beside it, but not a modality its image or its only text."""
        text, image, named = self.text(text_name), self.image(image_name), self.fields.get(modality_name)
        if not isinstance(named, str) or named not in _MODALITY_NAMES:
            raise self.wrong(modality_name, "one of text; image; image,text")
        modality = _MODALITY_NAMES[named]
        if modality != "text" and image is None:
            raise self.wrong(image_name, f"a path, because the modality is {modality}")
        if modality == "text" and text is None:
            raise self.wrong(text_name, "a text that is not blank, because the modality is text")
        return text, image, modality


def to_record(line: Line) -> Record:
    qid, source = line.identifier("qid"), line.fields.get("query_src_content")
    content = line.content("query_txt", "query_img_path", "query_modality")
    positives, negatives = line.identifiers("pos_cand_list"), line.identifiers("neg_cand_list")
    task_id = line.integer("task_id", 0, max(TASK_MODALITIES))
    scores = line.numbers("cand_scores")
    return Record(qid, *content, positives, negatives, task_id, source if isinstance(source, str) else None, scores)


def to_candidate(line: Line) -> Candidate:
    return Candidate(line.identifier("did"), *line.content("txt", "img_path", "modality"))


def to_label(line: Line) -> Label:
    qid, steps, z = line.identifier("qid"), line.integer("steps", 0, 99), line.integer("z", 0, 1)
    reasoning, answer = line.text("reasoning"), line.text("answer")
    if z and reasoning is None:
        raise line.wrong("reasoning", "a text where z is 1")
    if not z and (reasoning or answer):
        raise line.wrong("reasoning" if reasoning else "answer", "null where z is 0")
    return Label(qid, steps, z, reasoning, answer)


OnBroken = Callable[[DataError], None]
"""Told of each broken line, which is then left out; without one, the first broken line is raised."""


def read_queries(path: Path, on_broken: OnBroken | None = None) -> Iterator[Record]:
    """The queries of one file, streamed. Raises DataError on a broken line and on a qid met before."""
    return _objects(path, "qid", to_record, on_broken)


def read_pool(path: Path, on_broken: OnBroken | None = None) -> Iterator[Candidate]:
    """The candidates of one pool, streamed. Raises DataError on a broken line and on a did met before."""
    return _objects(path, "did", to_candidate, on_broken)


def read_labels(path: Path, on_broken: OnBroken | None = None) -> dict[str, Label]:
    """qid -> label, from lines `{"qid", "steps", "z", "reasoning", "answer"}`; {} where the file is absent."""
    return {label.qid: label for label in _objects(path, "qid", to_label, on_broken)} if path.exists() else {}


def read_qrels(path: Path, on_broken: OnBroken | None = None) -> dict[str, dict[str, int]]:
    """qid -> dids with a relevance above 0, each with the number of its first line, from `qid 0 did relevance task_id`.

    The last column may be absent, and so may dids from the local pool: the positives of OVEN and InfoSeek name each other's
    candidates.
    """
    relevant: dict[str, dict[str, int]] = {}
    for number, (qid, did, relevance) in _parsed(path, _judgement, on_broken):
        if relevance > 0:
            relevant.setdefault(qid, {}).setdefault(did, number)
    return relevant


def read_relevant(task: Task) -> dict[str, set[str]]:
    """qid -> positives of a task: its qrels where that file exists, else the `pos_cand_list` of its queries."""
    if task.qrels_path.is_file():
        return {qid: set(dids) for qid, dids in read_qrels(task.qrels_path).items()}
    return {record.qid: set(record.positives) for record in read_queries(task.query_path)}


def read_instructions(root: Path | str) -> Instructions:
    """The prompts of a folder. A key that occurs twice keeps its last line, as in UniIR."""
    path = Path(root) / "instructions" / "query_instructions.tsv"
    rows = (key_and_prompts for _, key_and_prompts in _parsed(path, _instruction, None, header=True))
    return Instructions(path, dict(rows))


def find_tasks(root: Path | str, split: Split) -> list[Task]:
    """The rows whose query file is in the folder: the paper's 16 in its order, then others by name.

    Only names and the first line of each query file are read. Raises DataError where there is no query file at all.
    """
    folder = Path(root) / "query" / split
    tasks = [_task(Path(root), path, split) for path in sorted(folder.glob(f"mbeir_*_task*_{split}.jsonl"))]
    if not tasks:
        raise DataError(
            f"{folder}: no file mbeir_{{dataset}}_task{{N}}_{split}.jsonl; give the root of a folder in M-BEIR's layout"
        )
    return sorted(tasks, key=lambda task: row_order(task.name))


def row_order(name: str) -> tuple[int, str]:
    """Sort key of rows: the paper's 16 in its order, then others by name."""
    return EVAL_ROWS.index(name) if name in EVAL_ROWS else len(EVAL_ROWS), name


def train_datasets(root: Path | str) -> list[str]:
    """Names of the data sets that have a training file, in the order in which the paper's rows name them."""
    names = [path.name for path in (Path(root) / "query" / "train").glob("mbeir_*_train.jsonl")]
    return sorted((name.removeprefix("mbeir_").removesuffix("_train.jsonl") for name in names), key=dataset_order)


def dataset_order(dataset: str) -> tuple[int, str]:
    """Sort key of data sets: in the order in which the paper's rows name them, then others by name."""
    named = [row.rpartition("_task")[0] for row in EVAL_ROWS]
    return named.index(dataset) if dataset in named else len(named), dataset


def train_path(root: Path | str, dataset: str) -> Path:
    return Path(root) / "query" / "train" / f"mbeir_{dataset}_train.jsonl"


def train_labels_path(root: Path | str, dataset: str) -> Path:
    return Path(root) / "cot" / "train" / f"mbeir_{dataset}_train_cot.jsonl"


def train_pool_path(root: Path | str) -> Path:
    return Path(root) / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"


def read_train(root: Path | str, dataset: str) -> Iterator[Record]:
    """The training queries of one data set, its tasks mixed, in file order, streamed."""
    return read_queries(train_path(root, dataset))


def dataset_id_in(qid: str, where: str) -> int:
    """The number of the data set that a qid begins with, of at most nine digits."""
    prefix = qid.partition(":")[0]
    if not _NUMBER.fullmatch(prefix):
        raise DataError(f'{where}: qid is {qid[:80]!r}; it must be "{{dataset_id}}:{{index}}" such as "9:6"')
    return int(prefix)


def to_query(record: Record, instruction: str | None, root: Path | str) -> Query:
    """The record as a Query: the instruction in its own field, `target` from the task id. Reads no image yet."""
    return Query.of(
        text=normalise(record.text) or None,
        image=open_image(record.image_path, root),
        instruction=normalise(instruction) or None,
        target=TASK_MODALITIES[record.task_id][1],
        id=record.qid,
    )


def to_item(candidate: Candidate, root: Path | str) -> Item:
    """The candidate as an Item; it gets no instruction. Reads no image yet."""
    return Item.of(text=normalise(candidate.text) or None, image=open_image(candidate.image_path, root), id=candidate.did)


def open_image(image_path: str | None, root: Path | str) -> ImageInput | None:
    return None if image_path is None else ImageInput.open(Path(root) / image_path)


def _task(root: Path, path: Path, split: Split) -> Task:
    name = path.name.removeprefix("mbeir_").removesuffix(f"_{split}.jsonl")
    match = TASK_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{path}: the name has no task id from 0 to 8; rename it mbeir_{{dataset}}_task{{N}}_{split}.jsonl")
    first = next(read_queries(path), None)
    if first is None:
        raise DataError(f"{path}: the file has no query; remove it or fill it")
    return Task(name, match["dataset"], dataset_id_in(first.qid, f"{path}:1"), int(match["task"]), split, root)


def _judgement(raw: str, where: str) -> tuple[str, str, int]:
    columns = raw.split()
    if len(columns) not in (4, 5):
        raise DataError(f"{where}: {len(columns)} columns; write `qid 0 did relevance task_id`")
    try:
        return columns[0], columns[2], int(columns[3])
    except ValueError as error:
        raise DataError(f"{where}: relevance is {columns[3]!r}; it must be an integer") from error


def _instruction(raw: str, where: str) -> tuple[tuple[int, Modality, Modality], tuple[str, ...]]:
    columns = [column.strip() for column in raw.rstrip("\r\n").split("\t")]
    if len(columns) < 5:
        raise DataError(
            f"{where}: {len(columns)} columns; write query_modality, cand_modality, dataset_name, "
            "dataset_id and one to four prompts, separated by tabs"
        )
    query, candidate = (_MODALITY_NAMES.get(name) for name in columns[:2])
    if query is None or candidate is None:
        raise DataError(f"{where}: modalities {columns[:2]}; each must be one of text; image; image,text")
    if not _NUMBER.fullmatch(columns[3]):
        raise DataError(f"{where}: dataset_id is {columns[3]!r}; it must be an integer of 1 to 9 digits")
    if not (prompts := tuple(filter(None, columns[4:]))):
        raise DataError(f"{where}: no prompt; fill the fifth column")
    return (int(columns[3]), query, candidate), prompts


def _objects(path: Path, key: str, parse: Callable[[Line], Parsed], on_broken: OnBroken | None) -> Iterator[Parsed]:
    """The objects of a file of JSON lines, each with another `key`."""
    seen: set[str] = set()

    def parse_new(raw: str, where: str) -> Parsed:
        line = Line.read(raw, where)
        identifier = line.identifier(key)
        if identifier in seen:
            raise DataError(f"{where}: {key} {identifier!r} occurs a second time; remove one of the lines or rename it")
        seen.add(identifier)
        return parse(line)

    return (parsed for _, parsed in _parsed(path, parse_new, on_broken))


def _parsed(
    path: Path, parse: Callable[[str, str], Parsed], on_broken: OnBroken | None, *, header: bool = False
) -> Iterator[tuple[int, Parsed]]:
    """What `parse` makes of each line (given its text and its location), with the line's number; blank lines are left out."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                where = f"{path}:{number}"
                text = _decoded(raw, where)
                if not text.strip() or (header and number == 1):
                    continue
                try:
                    parsed = parse(text, where)
                except DataError as error:
                    if on_broken is None:
                        raise
                    on_broken(error)
                    continue
                yield number, parsed
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
