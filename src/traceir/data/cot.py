"""M-BEIR-CoT as files: training samples with their labels and candidates inline, so that no pool has to be in memory.

A folder (format 1, docs/formats.md) holds `train-00000-of-00007.parquet` or `.jsonl`, one row a sample, and `manifest.json`,
written last. Images and instructions stay where they are: in the data folder that the manifest names. `datasets` turns the
files into a memory-mapped Arrow cache once; a row is read when its example is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from traceir.data import mbeir
from traceir.data.folder import data_fingerprint
from traceir.data.samples import Pairs, Sample, Supervision, descriptions_of, join, task_prompts
from traceir.errors import DataError, TrainError

NAME: Final = "M-BEIR-CoT"
FORMAT: Final = 1
FORMATS: Final = ("parquet", "jsonl")
GROUP_ROWS: Final = 2_000
"""Rows of a Parquet row group, and rows read at once where all are read."""
_FILE = re.compile(r"train-\d{5}-of-\d{5}\.(parquet|jsonl)")


class PoolFile(Mapping[str, mbeir.Candidate]):
    """A candidate pool of which only the offset of each line is in memory: 16 bytes a candidate, a read for each look-up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        hashes, starts, start = array("Q"), array("q"), 0
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error
        for number, raw in enumerate(tqdm(self._stream, desc="reading the pool", unit="line", mininterval=2.0), 1):
            if raw.strip():
                hashes.append(_hash(mbeir.to_candidate(mbeir.Line.read(raw, f"{path}:{number}")).did))
                starts.append(start)
            start += len(raw)
        order = np.argsort(np.frombuffer(hashes, dtype=np.uint64), kind="stable")
        self.hashes = np.frombuffer(hashes, dtype=np.uint64)[order]
        self.starts = np.frombuffer(starts, dtype=np.int64)[order]
        for row in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]).tolist():
            if (did := self._at(row).did) == self._at(row + 1).did:
                raise DataError(f"{path}: did {did!r} occurs a second time; remove one of the lines or rename it")

    def __getitem__(self, did: str) -> mbeir.Candidate:
        wanted = np.uint64(_hash(did))
        row = int(np.searchsorted(self.hashes, wanted))
        while row < len(self) and self.hashes[row] == wanted:
            candidate = self._at(row)
            if candidate.did == did:
                return candidate
            row += 1
        raise KeyError(did)

    def __iter__(self) -> Iterator[str]:
        return (self._at(row).did for row in range(len(self)))

    def __len__(self) -> int:
        return len(self.hashes)

    def close(self) -> None:
        self._stream.close()

    def _at(self, row: int) -> mbeir.Candidate:
        start = int(self.starts[row])
        self._stream.seek(start)
        return mbeir.to_candidate(mbeir.Line.read(self._stream.readline(), f"{self.path}, at byte {start}"))


def _hash(did: str) -> int:
    return int.from_bytes(hashlib.blake2b(did.encode(), digest_size=8).digest(), "little")


# Writing


def write_cot(
    root: Path, out: Path, *, format: str = "parquet", rows_per_file: int = 50_000, negatives: bool = True
) -> dict[str, Any]:
    """Writes the train split of an M-BEIR folder, labels joined, as M-BEIR-CoT; returns its manifest.

    `negatives` false leaves out the hard negatives. Streams: in memory are the qids and labels of one data set and the offsets
    of the pool's lines. Raises DataError for a broken source, a row that cannot be whole, and a folder that holds a finished
    M-BEIR-CoT.
    """
    return write_rows(_rows_of(root, negatives), root, out, format=format, rows_per_file=rows_per_file)


def _rows_of(root: Path, negatives: bool) -> Iterator[dict[str, Any]]:
    with closing(PoolFile(mbeir.train_pool_path(root))) as pool:
        for dataset in mbeir.train_datasets(root):
            labels = mbeir.read_labels(mbeir.train_labels_path(root, dataset))
            for record in mbeir.read_train(root, dataset):
                yield to_row(join(record, labels.get(record.qid), pool, str(pool.path), negatives=negatives), dataset)


def to_row(sample: Sample, dataset: str, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The row of one sample. `provenance` says where its label is from (teacher, prompt version, seed, ...)."""
    record, label = sample.record, sample.label
    return {
        "qid": record.qid,
        "task": f"{dataset}_task{record.task_id}",
        "task_id": record.task_id,
        "dataset_id": mbeir.dataset_id_in(record.qid, f"data set {dataset}"),
        "query_txt": record.text,
        "query_img_path": record.image_path,
        "query_modality": record.modality,
        "cand_modality": mbeir.TASK_MODALITIES[record.task_id][1],
        "z": label.z if label else 0,
        "reasoning": label.reasoning if label else None,
        "answer": label.answer if label else None,
        "steps": label.steps if label else None,
        "pos_cand_list": list(record.positives),
        "positives": [_inline(candidate) for candidate in sample.positives],
        "negatives": [_inline(candidate) for candidate in sample.negatives],
        "provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True) if provenance else None,
    }


def _inline(candidate: mbeir.Candidate) -> dict[str, str | None]:
    return {"did": candidate.did, "txt": candidate.text, "img_path": candidate.image_path, "modality": candidate.modality}


def write_rows(
    rows: Iterable[dict[str, Any]], root: Path, out: Path, *, format: str = "parquet", rows_per_file: int = 50_000
) -> dict[str, Any]:
    """Rows (as of `to_row`) as a folder of files; returns its manifest. `root` is the folder of images and instructions.

    Written below `out/writing` and renamed, the manifest last: until it is there the folder is not read, and the next call
    begins anew.
    """
    if format not in FORMATS or rows_per_file < 1:
        raise DataError(f"format {format!r}, {rows_per_file} rows a file; choose {' or '.join(FORMATS)}, and at least 1 row")
    if (out / "manifest.json").exists():
        raise DataError(f"{out} holds a manifest.json; choose another folder, or remove it")
    staging, tasks = out / "writing", dict[str, dict[str, int]]()
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    stream = _counted(tqdm(rows, desc="writing samples", unit="sample", mininterval=2.0), tasks)
    written: list[tuple[Path, int]] = []
    for first in stream:
        path = staging / f"{len(written):05d}.{format}"
        written.append((path, _write_file(path, chain((first,), islice(stream, rows_per_file - 1)))))
    if not written:
        raise DataError(f"{root} has no training queries; build or download the train split first")
    for stale in [file for file in out.iterdir() if _FILE.fullmatch(file.name)]:
        stale.unlink()  # of a call that ended before its manifest
    files = [_put(path, count, out / f"train-{n:05d}-of-{len(written):05d}.{format}") for n, (path, count) in enumerate(written)]
    manifest = {
        "name": NAME,
        "format": FORMAT,
        "root": Path(os.path.relpath(root.resolve(), out.resolve())).as_posix(),
        "source_fingerprint": data_fingerprint(root / "meta.json"),
        "samples": sum(count for _, count in written),
        "tasks": {name: tasks[name] for name in sorted(tasks, key=_task_order)},
        "files": files,
    }
    fresh = staging / "manifest.json"
    fresh.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, out / "manifest.json")
    staging.rmdir()
    return manifest


def _put(path: Path, rows: int, target: Path) -> dict[str, Any]:
    """Moves a whole file into its place and describes it."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    os.replace(path, target)
    return {"name": target.name, "rows": rows, "bytes": target.stat().st_size, "sha256": digest}


def _counted(rows: Iterable[dict[str, Any]], tasks: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        task = tasks.setdefault(row["task"], {"samples": 0, "complex": 0, "negatives": 0, "positives_outside_pool": 0})
        task["samples"] += 1
        task["complex"] += int(row["z"])
        task["negatives"] += len(row["negatives"])
        task["positives_outside_pool"] += len(row["pos_cand_list"]) - len(row["positives"])
        yield row


def _write_file(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes the rows as the path's suffix says and returns their number."""
    count = 0
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        return count
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def _schema() -> Any:
    """The columns of a row, as Arrow has them."""
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    candidates = pa.list_(pa.struct([(name, text) for name in ("did", "txt", "img_path", "modality")]))
    columns = dict.fromkeys(("qid", "task"), text) | dict.fromkeys(("task_id", "dataset_id"), number)
    columns |= dict.fromkeys(("query_txt", "query_img_path", "query_modality", "cand_modality"), text) | {"z": number}
    columns |= dict.fromkeys(("reasoning", "answer"), text) | {"steps": number, "pos_cand_list": pa.list_(text)}
    return pa.schema([*columns.items(), ("positives", candidates), ("negatives", candidates), ("provenance", text)])


# Reading


def is_cot(path: Path | str) -> bool:
    """Whether this is M-BEIR-CoT: a folder whose manifest says so, or one `.parquet` or `.jsonl` file."""
    path = Path(path)
    if path.is_file():
        return path.suffix.removeprefix(".") in FORMATS
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("name") == NAME


def source_folder(path: Path | str) -> Path:
    """The data folder of images, instructions and pretraining tasks that M-BEIR-CoT, a folder or one of its files, names."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    manifest = _read_manifest(folder)
    root = Path(os.path.normpath(folder.resolve() / manifest["root"])) if manifest else None
    if root is None or not root.is_dir():
        shown = f"{root}, which is not there" if root else "no manifest.json"
        raise DataError(f"{folder} names its data folder by {shown}; give the folder of images and instructions as root")
    return root


def read_cot(path: Path | str, *, root: Path | None = None, cache: Path | None = None, **settings: Any) -> list[Pairs]:
    """M-BEIR-CoT, a folder or one of its files, as one Pairs a task; settings, tasks and Examples are those of `read_pairs`.

    `root` is the folder of images and instructions, by default the one that the manifest names. The Arrow cache lies in
    `cache`, by default `arrow` beside the files. Every row is checked once, streamed; a broken one is a DataError that names
    file and row. Memory: 8 bytes a row, and where candidates are described, their descriptions. Nothing is fetched.
    """
    supervision, path = Supervision(**settings), Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; give a folder of M-BEIR-CoT or one of its files")
    root = root or source_folder(path)
    paths, counts = _data_files(path)
    table = _load_table(paths, cache or paths[0].parent / "arrow")
    if not len(table) or sum(counts) != len(table):
        raise DataError(f"{path}: {len(table)} rows where {sum(counts)} were written; copy or write the files again")
    by_task: dict[str, array[int]] = {}
    every = TableRows(range(len(table)), table, paths, tuple(accumulate(counts)), supervision)
    descriptions = descriptions_of(every.checked(by_task), supervision)
    instructions = mbeir.read_instructions(root)
    tasks: list[Pairs] = []
    for name in sorted(by_task, key=_task_order):
        samples = replace(every, rows=by_task[name])
        record = samples[0].record
        prompts = task_prompts(instructions, record.qid, record.task_id)
        tasks.append(Pairs(name, samples, root, prompts, supervision, descriptions))
    return tasks


@dataclass(frozen=True, slots=True)
class TableRows(Sequence[Sample]):
    """The Samples in some rows of a memory-mapped table; `ends` counts the rows up to the end of each file."""

    rows: Sequence[int] = field(repr=False)
    table: Any = field(repr=False)
    paths: tuple[Path, ...]
    ends: tuple[int, ...] = field(repr=False)
    supervision: Supervision

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        row = self.rows[number]
        return _to_sample(self.table[row].to_pylist()[0], self._where(row), self.supervision)

    def __iter__(self) -> Iterator[Sample]:
        return (_to_sample(fields, self._where(row), self.supervision) for row, fields in self._fields())

    def checked(self, by_task: dict[str, array[int]]) -> Iterator[Sample]:
        """One pass that checks every row and notes it with its task."""
        for row, fields in tqdm(self._fields(), total=len(self), desc="checking samples", mininterval=2.0):
            where = self._where(row)
            yield _to_sample(fields, where, self.supervision)
            by_task.setdefault(_task_name(fields, where), array("q")).append(row)

    def _where(self, row: int) -> str:
        """`FILE:NUMBER` of a row, numbers from 1 within each file."""
        shard = min(bisect_right(self.ends, row), len(self.paths) - 1)
        return f"{self.paths[shard]}:{row + 1 - (self.ends[shard - 1] if shard else 0)}"

    def _fields(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows with their numbers, a group of them in memory at a time."""
        for first in range(0, len(self.rows), GROUP_ROWS):
            numbers = self.rows[first : first + GROUP_ROWS]
            group = self.table[numbers if isinstance(numbers, range) else list(numbers)]
            yield from zip(numbers, group.to_pylist(), strict=True)


def _load_table(paths: tuple[Path, ...], cache: Path) -> Any:
    """The files as a memory-mapped table whose rows come as Arrow; made in `cache` at the first call."""
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise TrainError("reading M-BEIR-CoT needs the package datasets; pip install 'traceir[learn]'") from error
    parquet = paths[0].suffix == ".parquet"
    for path in paths if parquet else ():
        _check_columns(path)
    read = datasets.Dataset.from_parquet if parquet else datasets.Dataset.from_json
    features = datasets.Features.from_arrow_schema(_schema())
    try:
        table = read([str(path.resolve()) for path in paths], features=features, cache_dir=str(cache.resolve()))
    except (OSError, ValueError, TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        for path in paths if not parquet else ():
            _find_broken_line(path)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        shown = f"{type(cause).__name__}: {str(cause)[:200]}"
        raise DataError(f"{paths[0].parent}: cannot be read as M-BEIR-CoT ({shown}); write its files again") from error
    return table.with_format("arrow")


def _check_columns(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    wanted = _schema()
    try:
        names = pq.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}); copy or write it again") from error
    missing = [f"{column.name} ({column.type})" for column in wanted if column.name not in names]
    unknown = sorted(set(names) - set(wanted.names))
    if missing or unknown:
        raise DataError(f"{path}: columns are missing: {missing}, or not known: {unknown}; write it as docs/formats.md says")


def _find_broken_line(path: Path) -> None:
    """Raises DataError for the first line that is no row; returns where none is found."""
    import pyarrow

    schema = _schema()
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            try:
                fields = json.loads(raw)
                pyarrow.RecordBatch.from_pylist([fields], schema=schema)
            except (ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
                raise DataError(f"{path}:{number}: not a row of M-BEIR-CoT ({error}); write it again") from error
            if more := sorted(set(fields) - set(schema.names)):
                raise DataError(f"{path}:{number}: fields are not known: {more}; remove them")


def _count_rows(path: Path) -> int:
    """The rows of one file; blank lines are none."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        _check_columns(path)
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as stream:
        return sum(1 for raw in stream if raw.strip())


def _to_sample(fields: dict[str, Any], where: str, supervision: Supervision) -> Sample:
    record = mbeir.to_record(mbeir.Line(fields | {"neg_cand_list": fields["negatives"]}, where))
    label = mbeir.to_label(mbeir.Line(fields | {"steps": fields["steps"] or 0}, where))
    positives, wrong = (
        tuple(mbeir.to_candidate(mbeir.Line(candidate or {}, where)) for candidate in fields[name] or ())
        for name in ("positives", "negatives")
    )
    right = set(record.positives)
    if not positives or not {candidate.did for candidate in positives} <= right:
        raise DataError(f"{where}: positives must hold at least one candidate, each named in pos_cand_list; write the row again")
    if both := right & {candidate.did for candidate in wrong}:
        raise DataError(f"{where}: {min(both)} is a positive and among the negatives; remove it from one of them")
    return Sample(record, label if supervision.labelled else None, positives, wrong if supervision.negatives else ())


def _task_name(fields: dict[str, Any], where: str) -> str:
    """The row's task, checked against its ids."""
    name, task_id, prefix = fields["task"], fields["task_id"], fields["qid"].partition(":")[0]
    match = mbeir.TASK_NAME.fullmatch(name or "")
    if match is None or int(match["task"]) != task_id or prefix != str(fields["dataset_id"]):
        shown = f"task {name!r}, task_id {task_id}, dataset_id {fields['dataset_id']}, qid {fields['qid']!r}"
        raise DataError(f"{where}: {shown} do not agree; write for instance cirr_task7, 7, 8 and 8:24103")
    return str(name)


def _task_order(name: str) -> tuple[tuple[int, str], int]:
    dataset, _, task = name.rpartition("_task")
    return mbeir.dataset_order(dataset), int(task)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); write the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("name") != NAME or manifest.get("format") != FORMAT:
        raise DataError(f"{file}: not a manifest of {NAME}, format {FORMAT}; write the folder again with this release")
    return manifest


def _data_files(path: Path) -> tuple[tuple[Path, ...], list[int]]:
    """The files to read, and the rows of each."""
    if path.is_file():
        if path.suffix.removeprefix(".") not in FORMATS:
            raise DataError(f"{path}: neither .parquet nor .jsonl; give a file or a folder of M-BEIR-CoT")
        return (path,), [_count_rows(path)]
    manifest = _read_manifest(path)
    if manifest is None:
        raise DataError(f"{path} has no manifest.json; it is not M-BEIR-CoT, or was not written to its end: write it again")
    paths = tuple(path / file["name"] for file in manifest["files"])
    if missing := next((file for file in paths if not file.is_file()), None):
        raise DataError(f"{missing} is missing, but named by the manifest; copy or write it again")
    return paths, [int(file["rows"]) for file in manifest["files"]]
