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

EVAL_ROWS: Final[tuple[str, ...]] = (
    "visualnews_task0",
    "mscoco_task0",
    "fashion200k_task0",
    "webqa_task1",
    "edis_task2",
    "webqa_task2",
    "visualnews_task3",
    "mscoco_task3",
    "fashion200k_task3",
    "nights_task4",
    "oven_task6",
    "infoseek_task6",
    "fashioniq_task7",
    "cirr_task7",
    "oven_task8",
    "infoseek_task8",
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
_TASK_NAME = re.compile(r"(?P<dataset>.+)_task(?P<task>\d+)")


@dataclass(frozen=True)
class Task:
    """One evaluation row of a folder and where its files are; a path may name a file that does not exist."""

    name: str
    dataset: str
    dataset_id: int
    task_id: int
    split: Split
    query_modality: Modality
    cand_modality: Modality
    metric_k: int
    root: Path
    query_path: Path
    pool_path: Path
    qrels_path: Path
    labels_path: Path


@dataclass(frozen=True, slots=True)
class Record:
    """One query line. `image_path` is relative to the root of the folder."""

    qid: str
    text: str | None
    image_path: str | None
    modality: Modality
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    task_id: int
    source: str | None = None


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
        found = self.table.get((dataset_id, query_modality, cand_modality))
        if found is None:
            raise DataError(
                f"{self.path}: no instructions for dataset {dataset_id}, query {query_modality!r}, candidate "
                f"{cand_modality!r}; add a line with these first, second and fourth columns"
            )
        return found


class _Line:
    """One JSON object of a file, whose fields are read with checks that name the place."""

    __slots__ = ("fields", "where")

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def fail(self, name: str, wanted: str) -> DataError:
        shown = repr(self.fields[name])[:120] if name in self.fields else "missing"
        return DataError(f"{self.where}: {name} is {shown}; it must be {wanted}")

    def optional(self, name: str) -> str | None:
        """A string, or None for null, an absent field and blank text."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(name, "a string or null")
        return valid(value) if value and value.strip() else None

    def identifier(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value or value.split() != [value]:
            raise self.fail(name, 'a string without blanks such as "9:6"')
        return value

    def identifiers(self, name: str) -> tuple[str, ...]:
        """A list of dids, given as strings (M-BEIR's files) or as objects with a `did` (M-BEIR's README)."""
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.fail(name, "a list of dids")
        found = [entry.get("did") if isinstance(entry, dict) else entry for entry in value]
        dids = tuple(entry for entry in found if isinstance(entry, str) and entry.split() == [entry])
        if len(dids) != len(found):
            raise self.fail(name, 'a list of did strings such as "9:6", or of objects {"did": "9:6"}')
        return dids

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def modality(self, name: str) -> Modality:
        value = self.fields.get(name)
        if not isinstance(value, str) or value not in _MODALITY_NAMES:
            raise self.fail(name, "one of text; image; image,text")
        return _MODALITY_NAMES[value]

    def image(self, name: str) -> str | None:
        value = self.optional(name)
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise self.fail(name, "a path below the root of the data folder, without '..'")
        return value


OnBroken = Callable[[DataError], None]
"""Told of each broken line, which is then left out; without one, the first broken line is raised."""


def read_queries(path: Path, on_broken: OnBroken | None = None) -> Iterator[Record]:
    """The queries of one file, streamed. Raises DataError on a broken line and on a qid met before."""
    seen: set[str] = set()

    def parse(line: _Line) -> Record:
        _new_identifier(line, "qid", seen)
        return _to_record(line)

    return _parse_lines(path, parse, on_broken)


def read_pool(path: Path, on_broken: OnBroken | None = None) -> Iterator[Candidate]:
    """The candidates of one pool, streamed. Raises DataError on a broken line and on a did met before."""
    seen: set[str] = set()

    def parse(line: _Line) -> Candidate:
        _new_identifier(line, "did", seen)
        return _to_candidate(line)

    return _parse_lines(path, parse, on_broken)


def read_qrels(path: Path, on_broken: OnBroken | None = None) -> dict[str, set[str]]:
    """qid -> dids with a relevance above 0, from lines `qid 0 did relevance task_id` (the last column may be absent).

    Dids may be absent from the local pool: the positives of OVEN and InfoSeek name each other's candidates.
    """
    return {qid: set(dids) for qid, dids in read_judgements(path, on_broken).items()}


def read_judgements(path: Path, on_broken: OnBroken | None = None) -> dict[str, dict[str, int]]:
    """As `read_qrels`, with the number of the line that names each did."""
    relevant: dict[str, dict[str, int]] = {}
    for number, raw in _read_raw(path):
        columns = raw.split()
        try:
            if len(columns) not in (4, 5):
                raise DataError(f"{path}:{number}: {len(columns)} columns; write `qid 0 did relevance task_id`")
            try:
                relevance = int(columns[3])
            except ValueError as error:
                raise DataError(f"{path}:{number}: relevance is {columns[3]!r}; it must be an integer") from error
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(error)
            continue
        if relevance > 0:
            relevant.setdefault(columns[0], {}).setdefault(columns[2], number)
    return relevant


def read_relevant(task: Task) -> dict[str, set[str]]:
    """qid -> positives of a task: its qrels where that file exists, else the `pos_cand_list` of its queries."""
    if task.qrels_path.is_file():
        return read_qrels(task.qrels_path)
    return {record.qid: set(record.positives) for record in read_queries(task.query_path)}


def read_labels(path: Path, on_broken: OnBroken | None = None) -> dict[str, Label]:
    """qid -> label, from lines `{"qid", "steps", "z", "reasoning", "answer"}`; {} where the file is absent."""
    if not path.exists():
        return {}
    seen: set[str] = set()

    def parse(line: _Line) -> Label:
        _new_identifier(line, "qid", seen)
        return _to_label(line)

    return {label.qid: label for label in _parse_lines(path, parse, on_broken)}


def read_instructions(root: Path | str) -> Instructions:
    """The prompts of a folder. A key that occurs twice keeps its last line, as in UniIR."""
    path = Path(root) / "instructions" / "query_instructions.tsv"
    table: dict[tuple[int, Modality, Modality], tuple[str, ...]] = {}
    for number, raw in _read_raw(path):
        if number == 1:
            continue  # the header
        columns = [column.strip() for column in raw.rstrip("\r\n").split("\t")]
        if len(columns) < 5:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns; write query_modality, cand_modality, dataset_name, "
                "dataset_id and one to four prompts, separated by tabs"
            )
        query, candidate = (_MODALITY_NAMES.get(name) for name in columns[:2])
        if query is None or candidate is None:
            raise DataError(f"{path}:{number}: modalities {columns[:2]}; each must be one of text; image; image,text")
        if not _NUMBER.fullmatch(columns[3]):
            raise DataError(f"{path}:{number}: dataset_id is {columns[3]!r}; it must be an integer of 1 to 9 digits")
        prompts = tuple(column for column in columns[4:] if column)
        if not prompts:
            raise DataError(f"{path}:{number}: no prompt; fill the fifth column")
        table[int(columns[3]), query, candidate] = prompts
    return Instructions(path, table)


def find_tasks(root: Path | str, split: Split) -> list[Task]:
    """The rows whose query file is in the folder: the paper's 16 in its order, then others by name.

    Only names and the first line of each query file are read. Raises DataError where there is no query file at all.
    """
    folder = Path(root) / "query" / split
    found = sorted(folder.glob(f"mbeir_*_task*_{split}.jsonl"))
    tasks = [_describe(Path(root), path, split) for path in found]
    if not tasks:
        raise DataError(
            f"{folder}: no file mbeir_{{dataset}}_task{{N}}_{split}.jsonl; give the root of a folder in M-BEIR's layout"
        )
    return sorted(tasks, key=lambda task: (_place(task.name), task.name))


def train_datasets(root: Path | str) -> list[str]:
    """Names of the data sets that have a training file, in the order in which the paper's rows name them."""
    found = [path.name for path in (Path(root) / "query" / "train").glob("mbeir_*_train.jsonl")]
    names = [name.removeprefix("mbeir_").removesuffix("_train.jsonl") for name in found]
    return sorted(names, key=dataset_order)


def dataset_order(dataset: str) -> tuple[int, str]:
    """Sort key of data sets: in the order in which the paper's rows name them, then others by name."""
    order = {row.rsplit("_task", 1)[0]: place for place, row in reversed(list(enumerate(EVAL_ROWS)))}
    return order.get(dataset, len(EVAL_ROWS)), dataset


def train_path(root: Path | str, dataset: str) -> Path:
    return Path(root) / "query" / "train" / f"mbeir_{dataset}_train.jsonl"


def train_labels_path(root: Path | str, dataset: str) -> Path:
    return Path(root) / "cot" / "train" / f"mbeir_{dataset}_train_cot.jsonl"


def train_pool_path(root: Path | str) -> Path:
    return Path(root) / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"


def read_train(root: Path | str, dataset: str) -> Iterator[Record]:
    """The training queries of one data set, its tasks mixed, in file order, streamed."""
    return read_queries(train_path(root, dataset))


def pool_path(root: Path | str, dataset: str, task_id: int, split: Split) -> Path:
    """The local pool of a row: the file of that split where there is one (MSCOCO), else the one val and test share."""
    folder = Path(root) / "cand_pool" / "local"
    own = folder / f"mbeir_{dataset}_task{task_id}_{split}_cand_pool.jsonl"
    shared = folder / f"mbeir_{dataset}_task{task_id}_cand_pool.jsonl"
    return own if own.exists() or (dataset == "mscoco" and not shared.exists()) else shared


def record_of(fields: dict[str, Any], where: str) -> Record:
    """One query from the fields of a query line; `where` names its place in the DataError of a broken one."""
    return _to_record(_Line(fields, where))


def candidate_of(fields: dict[str, Any], where: str) -> Candidate:
    """One candidate from the fields of a pool line; `where` as in `record_of`."""
    return _to_candidate(_Line(fields, where))


def label_of(fields: dict[str, Any], where: str) -> Label:
    """One label from the fields of a label line; `where` as in `record_of`."""
    return _to_label(_Line(fields, where))


def record_in(raw: bytes, where: str) -> Record:
    """One query from the bytes of its line; `where` as in `record_of`."""
    return _to_record(_read_line(where, _decoded(raw, where)))


def candidate_in(raw: bytes, where: str) -> Candidate:
    """One candidate from the bytes of its line; `where` as in `record_of`."""
    return _to_candidate(_read_line(where, _decoded(raw, where)))


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def dataset_id_in(qid: str, where: str) -> int:
    """The number of the data set that a qid begins with, of at most nine digits; `where` as in `record_of`."""
    prefix = qid.partition(":")[0]
    if not _NUMBER.fullmatch(prefix):
        raise DataError(f'{where}: qid is {qid[:80]!r}; it must be "{{dataset_id}}:{{index}}" such as "9:6"')
    return int(prefix)


def query_text(record: Record, prompt: str) -> str:
    """Prompt and query text as one text, the way UniIR and LamRA hand it to a model."""
    return normalise(f"{normalise(prompt)} {record.text or ''}")


def candidate_text(candidate: Candidate) -> str:
    """The candidate's text; "" for a picture alone. Candidates get no instruction."""
    return normalise(candidate.text)


def to_query(record: Record, instruction: str | None, root: Path | str) -> Query:
    """The record as a Query: the instruction in its own field, `target` from the task id. Reads no picture yet."""
    return Query.of(
        text=normalise(record.text) or None,
        image=_open_image(record.image_path, root),
        instruction=normalise(instruction) or None,
        target=TASK_MODALITIES[record.task_id][1],
        id=record.qid,
    )


def to_item(candidate: Candidate, root: Path | str) -> Item:
    """The candidate as an Item. Reads no picture yet."""
    return Item.of(text=candidate_text(candidate) or None, image=_open_image(candidate.image_path, root), id=candidate.did)


def _open_image(image_path: str | None, root: Path | str) -> ImageInput | None:
    return None if image_path is None else ImageInput.open(Path(root) / image_path)


def _to_record(line: _Line) -> Record:
    qid = line.identifier("qid")
    text, image = line.optional("query_txt"), line.image("query_img_path")
    modality = line.modality("query_modality")
    _check_modality(line, modality, ("query_txt", text), ("query_img_path", image))
    positives, negatives = line.identifiers("pos_cand_list"), line.identifiers("neg_cand_list")
    task_id = line.integer("task_id", 0, max(TASK_MODALITIES))
    source = line.fields.get("query_src_content")
    return Record(qid, text, image, modality, positives, negatives, task_id, source if isinstance(source, str) else None)


def _to_candidate(line: _Line) -> Candidate:
    did = line.identifier("did")
    text, image = line.optional("txt"), line.image("img_path")
    modality = line.modality("modality")
    _check_modality(line, modality, ("txt", text), ("img_path", image))
    return Candidate(did, text, image, modality)


def _to_label(line: _Line) -> Label:
    qid = line.identifier("qid")
    steps, z = line.integer("steps", 0, 99), line.integer("z", 0, 1)
    reasoning, answer = line.optional("reasoning"), line.optional("answer")
    if z == 1 and reasoning is None:
        raise line.fail("reasoning", "a text where z is 1")
    if z == 0 and (reasoning or answer):
        raise line.fail("reasoning" if reasoning else "answer", "null where z is 0")
    return Label(qid, steps, z, reasoning, answer)


def _describe(root: Path, path: Path, split: Split) -> Task:
    name = path.name.removeprefix("mbeir_").removesuffix(f"_{split}.jsonl")
    match = _TASK_NAME.fullmatch(name)
    task_id = int(match["task"]) if match else -1
    if match is None or task_id not in TASK_MODALITIES:
        raise DataError(f"{path}: the name has no task id from 0 to 8; rename it mbeir_{{dataset}}_task{{N}}_{split}.jsonl")
    dataset = match["dataset"]
    query, candidate = TASK_MODALITIES[task_id]
    return Task(
        name=name,
        dataset=dataset,
        dataset_id=_first_dataset_id(path),
        task_id=task_id,
        split=split,
        query_modality=query,
        cand_modality=candidate,
        metric_k=10 if dataset in FASHION else 5,
        root=root,
        query_path=path,
        pool_path=pool_path(root, dataset, task_id, split),
        qrels_path=root / "qrels" / split / f"mbeir_{name}_{split}_qrels.txt",
        labels_path=root / "cot" / split / f"mbeir_{name}_{split}_cot.jsonl",
    )


def _first_dataset_id(path: Path) -> int:
    for record in read_queries(path):
        return dataset_id_in(record.qid, f"{path}:1")
    raise DataError(f"{path}: the file has no query; remove it or fill it")


def _place(name: str) -> int:
    return EVAL_ROWS.index(name) if name in EVAL_ROWS else len(EVAL_ROWS)


def _new_identifier(line: _Line, name: str, seen: set[str]) -> str:
    value = line.identifier(name)
    if value in seen:
        raise DataError(f"{line.where}: {name} {value!r} occurs a second time; remove one of the lines or rename it")
    seen.add(value)
    return value


def _check_modality(line: _Line, modality: Modality, text: tuple[str, str | None], image: tuple[str, str | None]) -> None:
    """Refuse a modality whose picture, or whose only text, is not there; a picture may lack the text beside it."""
    if modality != "text" and image[1] is None:
        raise line.fail(image[0], f"a path, because the modality is {modality}")
    if modality == "text" and text[1] is None:
        raise line.fail(text[0], "a text that is not blank, because the modality is text")


def _read_raw(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines from 1, blank ones left out."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
                if text.strip():
                    yield number, text
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error


def _parse_lines(path: Path, parse: Callable[[_Line], Parsed], on_broken: OnBroken | None) -> Iterator[Parsed]:
    for number, raw in _read_raw(path):
        try:
            parsed = parse(_read_line(f"{path}:{number}", raw))
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(error)
            continue
        yield parsed


def _read_line(where: str, raw: str) -> _Line:
    try:
        fields = read_json(raw)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): {raw[:80].strip()!r}; write one object per line") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {raw[:80].strip()!r} is not an object; write one JSON object per line")
    return _Line(fields, where)
