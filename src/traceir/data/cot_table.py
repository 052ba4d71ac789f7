"""The rows of M-BEIR-CoT (cot.py) in Parquet or JSON lines, written in bounded memory and read as a memory-mapped Arrow table."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from traceir.errors import DataError, TrainError

FORMATS: Final = ("parquet", "jsonl")
GROUP_ROWS: Final = 2_000
"""Rows of a Parquet row group, and rows read at once where all are read."""


@dataclass(frozen=True, slots=True)
class Files:
    """The data files of a read, and which row of which one a row of the whole is."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...] = field(repr=False)

    def where(self, row: int) -> str:
        """`FILE:NUMBER` of a row, numbers from 1 within each file."""
        place = min(bisect_right(self.ends, row), len(self.paths) - 1)
        return f"{self.paths[place]}:{row + 1 - (self.ends[place - 1] if place else 0)}"


def load_table(paths: tuple[Path, ...], cache: Path) -> Any:
    """The files as a memory-mapped table whose rows come as Arrow; made in `cache` at the first call."""
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise TrainError("reading M-BEIR-CoT needs the package datasets; pip install 'traceir[learn]'") from error
    features = datasets.Features.from_arrow_schema(_schema())
    parquet = paths[0].suffix == ".parquet"
    if parquet:
        _check_columns(paths)
    read = datasets.Dataset.from_parquet if parquet else datasets.Dataset.from_json
    try:
        table = read([str(path.resolve()) for path in paths], features=features, cache_dir=str(cache.resolve()))
    except (OSError, ValueError, TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        _find_broken(paths)
        raise DataError(f"{paths[0].parent}: cannot be read as M-BEIR-CoT ({_cause(error)}); write its files again") from error
    return table.with_format("arrow")


def _check_columns(paths: tuple[Path, ...]) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    wanted = _schema()
    for path in paths:
        try:
            found = pq.read_schema(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: not a Parquet file that can be read ({error}); copy or write it again") from error
        wrong = [f"{one.name} ({one.type})" for one in wanted if one.name not in found.names]
        if wrong or set(found.names) - set(wanted.names):
            more = sorted(set(found.names) - set(wanted.names))
            raise DataError(f"{path}: columns are missing: {wrong}, or not known: {more}; write it as docs/formats.md says")


def _find_broken(paths: tuple[Path, ...]) -> None:
    """Raises DataError for the first line of JSON-lines files that is no row; returns where none is found."""
    import pyarrow

    known = _schema()
    for path in paths:
        if path.suffix != ".jsonl":
            continue
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if not raw.strip():
                    continue
                try:
                    fields = json.loads(raw)
                    pyarrow.RecordBatch.from_pylist([fields], schema=known)
                except (ValueError, TypeError, AttributeError, pyarrow.ArrowException) as error:
                    raise DataError(f"{path}:{number}: not a row of M-BEIR-CoT ({error}); write it again") from error
                if more := sorted(set(fields) - set(known.names)):
                    raise DataError(f"{path}:{number}: fields are not known: {more}; remove them")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:200]}"


def count_rows(path: Path) -> int:
    """The rows of one file; blank lines are none."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        _check_columns((path,))
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as stream:
        return sum(1 for raw in stream if raw.strip())


def every_row(table: Any) -> Iterator[dict[str, Any]]:
    """All rows of a table, a group of them in memory at a time."""
    for first in range(0, len(table), GROUP_ROWS):
        yield from table[first : first + GROUP_ROWS].to_pylist()


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes the rows and returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, schema = 0, _schema()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes the rows and returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _schema() -> Any:
    """The columns of a row, as Arrow has them."""
    import pyarrow as pa

    text = pa.string()
    candidates = pa.list_(pa.struct([(name, text) for name in ("did", "txt", "img_path", "modality")]))
    return pa.schema(
        [
            ("qid", text),
            ("task", text),
            ("task_id", pa.int32()),
            ("dataset_id", pa.int32()),
            ("query_txt", text),
            ("query_img_path", text),
            ("query_modality", text),
            ("cand_modality", text),
            ("z", pa.int32()),
            ("reasoning", text),
            ("answer", text),
            ("steps", pa.int32()),
            ("pos_cand_list", pa.list_(text)),
            ("positives", candidates),
            ("negatives", candidates),
            ("provenance", text),
        ]
    )
