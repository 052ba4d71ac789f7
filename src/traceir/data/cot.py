"""M-BEIR-CoT as files: training samples with their labels and candidates inline, so that no pool has to be in memory.

A folder (format 1, docs/formats.md) holds `train-00000-of-00007.parquet` or `.jsonl`, one row a sample, and `manifest.json`,
written last. Pictures and instructions stay where they are: in the data folder that the manifest names. `datasets` turns the
files into a memory-mapped Arrow cache once (cot_table.py); a row is read when its example is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.data import mbeir
from traceir.data.cot_table import FORMATS, GROUP_ROWS, Files, count_rows, every_row, load_table, write_lines, write_parquet
from traceir.data.samples import Pairs, Sample, Teaching, first_tellers, join, task_prompts
from traceir.errors import DataError

NAME: Final = "M-BEIR-CoT"
FORMAT: Final = 1
_TASK = re.compile(r"(?P<dataset>.+)_task(?P<task>\d+)")
_FILE = re.compile(r"train-\d{5}-of-\d{5}\.(parquet|jsonl)")


class PoolFile(Mapping[str, mbeir.Candidate]):
    """A candidate pool of which only the place of each line is in memory: 16 bytes a candidate, a read for each look-up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        hashes, starts = array("Q"), array("q")
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; check the path and the layout of the folder") from error
        start = 0
        for number, raw in enumerate(tqdm(self._stream, desc="reading the pool", unit="line", mininterval=2.0), 1):
            if raw.strip():
                hashes.append(_hash(mbeir.candidate_in(raw, f"{path}:{number}").did))
                starts.append(start)
            start += len(raw)
        order = np.argsort(np.frombuffer(hashes, dtype=np.uint64), kind="stable")
        self.hashes = np.frombuffer(hashes, dtype=np.uint64)[order]
        self.starts = np.frombuffer(starts, dtype=np.int64)[order]
        self._check_unique()

    def __getitem__(self, did: str) -> mbeir.Candidate:
        wanted = np.uint64(_hash(did))
        place = int(np.searchsorted(self.hashes, wanted))
        while place < len(self) and self.hashes[place] == wanted:
            candidate = self._at(place)
            if candidate.did == did:
                return candidate
            place += 1
        raise KeyError(did)

    def __iter__(self) -> Iterator[str]:
        return (self._at(place).did for place in range(len(self)))

    def __len__(self) -> int:
        return len(self.hashes)

    def close(self) -> None:
        self._stream.close()

    def _at(self, place: int) -> mbeir.Candidate:
        start = int(self.starts[place])
        self._stream.seek(start)
        return mbeir.candidate_in(self._stream.readline(), f"{self.path}, at byte {start}")

    def _check_unique(self) -> None:
        for place in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]).tolist():
            if (did := self._at(place).did) == self._at(place + 1).did:
                raise DataError(f"{self.path}: did {did!r} occurs a second time; remove one of the lines or rename it")


def cot_rows(root: Path, *, negatives: bool = True) -> Iterator[dict[str, Any]]:
    """The train split of an M-BEIR folder as rows, streamed data set by data set, in the order of its files.

    In memory are the qids and labels of one data set and the places of the pool's lines. Raises DataError where a query has no
    positive in the pool or a negative is missing.
    """
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


def write_cot(
    root: Path, out: Path, *, format: str = "parquet", rows_per_file: int = 50_000, negatives: bool = True
) -> dict[str, Any]:
    """Writes the train split of an M-BEIR folder, labels joined, as M-BEIR-CoT; returns its manifest.

    `negatives` false leaves out the hard negatives. Streams: see `cot_rows`. Raises DataError for a broken source, a row that
    cannot be whole, and a folder that holds a finished M-BEIR-CoT.
    """
    return write_rows(cot_rows(root, negatives=negatives), root, out, format=format, rows_per_file=rows_per_file)


def write_rows(
    rows: Iterable[dict[str, Any]], root: Path, out: Path, *, format: str = "parquet", rows_per_file: int = 50_000
) -> dict[str, Any]:
    """Rows (as of `to_row`) as a folder of files; returns its manifest. `root` is the folder of pictures and instructions.

    Written below `out/writing` and renamed, the manifest last: until it is there the folder is not read, and the next call
    begins anew.
    """
    if format not in FORMATS or rows_per_file < 1:
        raise DataError(f"format {format!r}, {rows_per_file} rows a file; choose {' or '.join(FORMATS)}, and at least 1 row")
    if (out / "manifest.json").exists():
        raise DataError(f"{out} holds a manifest.json; choose another folder, or remove it")
    writing = out / "writing"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    tasks: dict[str, dict[str, int]] = {}
    made: list[tuple[Path, int]] = []
    stream = iter(_counted(tqdm(rows, desc="writing samples", unit="sample", mininterval=2.0), tasks))
    for first in stream:
        path = writing / f"{len(made):05d}.{format}"
        batch = chain((first,), islice(stream, rows_per_file - 1))
        made.append((path, write_parquet(path, batch) if format == "parquet" else write_lines(path, batch)))
    if not made:
        raise DataError(f"{root} has no training queries; build or download the train split first")
    for stale in [old for old in out.iterdir() if _FILE.fullmatch(old.name)]:
        stale.unlink()  # of a call that ended before its manifest
    files = []
    for number, (path, count) in enumerate(made):
        target = out / f"train-{number:05d}-of-{len(made):05d}.{format}"
        files.append({"name": target.name, "rows": count, "bytes": path.stat().st_size, "sha256": _digest(path)})
        os.replace(path, target)
    manifest = _manifest(root, out, files, tasks)
    fresh = writing / "manifest.json"
    fresh.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, out / "manifest.json")
    writing.rmdir()
    return manifest


class CotData(Pairs):
    """Pairs of one task whose samples are rows of a memory-mapped table that all tasks share."""

    def __init__(
        self,
        name: str,
        rows: npt.NDArray[np.int64],
        table: Any,
        files: Files,
        root: Path,
        prompts: tuple[str, ...],
        teaching: Teaching,
        tellers: Mapping[str, int],
    ) -> None:
        super().__init__(name, rows, root, prompts, teaching)
        self.rows, self.table, self.files, self.tellers = rows, table, files, tellers

    def sample(self, number: int) -> Sample:
        row = int(self.rows[number])
        return _to_sample(self.table[row].to_pylist()[0], self.files.where(row), self.teaching)

    def samples(self) -> Iterator[Sample]:
        for first in range(0, len(self.rows), GROUP_ROWS):
            places = self.rows[first : first + GROUP_ROWS].tolist()
            for row, fields in zip(places, self.table[places].to_pylist(), strict=True):
                yield _to_sample(fields, self.files.where(row), self.teaching)

    def description(self, did: str) -> str:
        row = self.tellers.get(did)
        if row is None:
            return ""
        return self.teaching.description(_to_label(self.table[row].to_pylist()[0], self.files.where(row)))


def is_cot(path: Path | str) -> bool:
    """Whether this is M-BEIR-CoT: a folder whose manifest says so, or one `.parquet` or `.jsonl` file."""
    path = Path(path)
    if path.is_file():
        return path.suffix.removeprefix(".") in FORMATS
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("name") == NAME


def source_folder(path: Path | str) -> Path:
    """The data folder of pictures, instructions and lessons that M-BEIR-CoT, a folder or one of its files, names."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return _root(folder, _read_manifest(folder))


def read_cot(
    path: Path | str,
    *,
    root: Path | None = None,
    cache: Path | None = None,
    cot: str = "both",
    candidates: str = "direct",
    reasoned: float = 1.0,
    negatives: int = 0,
    any_target: float = 0.0,
    seed: int = 0,
) -> list[CotData]:
    """M-BEIR-CoT, a folder or one of its files, as one CotData a task; settings, tasks and Examples are those of `read_pairs`.

    `root` is the folder of pictures and instructions, by default the one that the manifest names. The Arrow cache lies in
    `cache`, by default `arrow` beside the files. Every row is checked once, streamed; a broken one is a DataError that names
    file and row. Memory: 8 bytes a row, and where candidates are described, one entry a described did. Nothing is fetched.
    """
    teaching = Teaching(cot, candidates, reasoned, negatives, any_target, seed)
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; give a folder of M-BEIR-CoT or one of its files")
    folder = path if path.is_dir() else path.parent
    manifest = _read_manifest(folder) if path.is_dir() or root is None else None
    root = root or _root(folder, manifest)
    paths, counts = _data_files(path, manifest)
    table = load_table(paths, cache or folder / "arrow")
    files = Files(paths, tuple(accumulate(counts)))
    if not len(table) or files.ends[-1] != len(table):
        raise DataError(f"{path}: {len(table)} rows where {files.ends[-1]} were written; copy or write the files again")
    rows, tellers = _index(table, files, teaching)
    instructions = mbeir.read_instructions(root)
    found: list[CotData] = []
    for name in sorted(rows, key=_task_order):
        places = np.frombuffer(rows[name], dtype=np.int64)
        fields = table[int(places[0])].to_pylist()[0]
        prompts = task_prompts(instructions, fields["qid"], fields["task_id"])
        found.append(CotData(name, places, table, files, root, prompts, teaching, tellers))
    return found


def _index(table: Any, files: Files, teaching: Teaching) -> tuple[dict[str, array[int]], dict[str, int]]:
    """One pass over all rows, checking each: task -> its rows, and did -> the row that tells what the candidate writes."""
    rows: dict[str, array[int]] = {}

    def tellers() -> Iterator[tuple[str, list[str], int]]:
        for row, fields in enumerate(tqdm(every_row(table), total=len(table), desc="checking samples", mininterval=2.0)):
            where = files.where(row)
            sample = _to_sample(fields, where, teaching)
            rows.setdefault(_task_name(fields, where), array("q")).append(row)
            if teaching.description(sample.label):
                yield fields["qid"], fields["pos_cand_list"], row

    return rows, first_tellers(tellers())


def _to_sample(fields: dict[str, Any], where: str, teaching: Teaching) -> Sample:
    record = mbeir.record_of(fields | {"neg_cand_list": fields["negatives"]}, where)
    label = _to_label(fields, where)
    positives = tuple(mbeir.candidate_of(one or {}, where) for one in fields["positives"] or ())
    wrong = tuple(mbeir.candidate_of(one or {}, where) for one in fields["negatives"] or ())
    if not positives or not {one.did for one in positives} <= set(record.positives):
        raise DataError(f"{where}: positives must hold at least one candidate, each named in pos_cand_list; write the row again")
    if named := set(record.positives) & {one.did for one in wrong}:
        raise DataError(f"{where}: {sorted(named)[0]} is a positive and among the negatives; remove it from one of them")
    return Sample(record, label if teaching.labelled else None, positives, wrong if teaching.negatives else ())


def _to_label(fields: dict[str, Any], where: str) -> mbeir.Label:
    return mbeir.label_of(fields if fields["steps"] is not None else fields | {"steps": 0}, where)


def _task_name(fields: dict[str, Any], where: str) -> str:
    """The row's task, checked against its ids."""
    name, task_id, prefix = fields["task"], fields["task_id"], fields["qid"].partition(":")[0]
    match = _TASK.fullmatch(name or "")
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
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); write the folder again") from error
    if not isinstance(found, dict) or found.get("name") != NAME or found.get("format") != FORMAT:
        raise DataError(f"{file}: not a manifest of {NAME}, format {FORMAT}; write the folder again with this release")
    return found


def _root(folder: Path, manifest: dict[str, Any] | None) -> Path:
    root = Path(os.path.normpath(folder.resolve() / manifest["root"])) if manifest else None
    if root is None or not root.is_dir():
        shown = f"{root}, which is not there" if root else "no manifest.json"
        raise DataError(f"{folder} names its data folder by {shown}; give the folder of pictures and instructions as root")
    return root


def _data_files(path: Path, manifest: dict[str, Any] | None) -> tuple[tuple[Path, ...], list[int]]:
    """The files to read, and the rows of each."""
    if path.is_file():
        if path.suffix.removeprefix(".") not in FORMATS:
            raise DataError(f"{path}: neither .parquet nor .jsonl; give a file or a folder of M-BEIR-CoT")
        return (path,), [count_rows(path)]
    if manifest is None:
        raise DataError(f"{path} has no manifest.json; it is not M-BEIR-CoT, or was not written to its end: write it again")
    paths = tuple(path / one["name"] for one in manifest["files"])
    if missing := next((file for file in paths if not file.is_file()), None):
        raise DataError(f"{missing} is missing, but named by the manifest; copy or write it again")
    return paths, [int(one["rows"]) for one in manifest["files"]]


def _counted(rows: Iterable[dict[str, Any]], tasks: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        task = tasks.setdefault(row["task"], {"samples": 0, "complex": 0, "negatives": 0, "positives_outside_pool": 0})
        task["samples"] += 1
        task["complex"] += int(row["z"])
        task["negatives"] += len(row["negatives"])
        task["positives_outside_pool"] += len(row["pos_cand_list"]) - len(row["positives"])
        yield row


def _manifest(root: Path, out: Path, files: list[dict[str, Any]], tasks: dict[str, dict[str, int]]) -> dict[str, Any]:
    about = root / "meta.json"
    source = json.loads(about.read_text(encoding="utf-8")).get("fingerprint") if about.is_file() else None
    return {
        "name": NAME,
        "format": FORMAT,
        "root": Path(os.path.relpath(root.resolve(), out.resolve())).as_posix(),
        "source_fingerprint": source,
        "samples": sum(int(one["rows"]) for one in files),
        "tasks": {name: tasks[name] for name in sorted(tasks, key=_task_order)},
        "files": files,
    }


def _inline(candidate: mbeir.Candidate) -> dict[str, str | None]:
    return {
        "did": candidate.did,
        "txt": candidate.text,
        "img_path": candidate.image_path,
        "modality": candidate.modality,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash(did: str) -> int:
    return int.from_bytes(hashlib.blake2b(did.encode(), digest_size=8).digest(), "little")
