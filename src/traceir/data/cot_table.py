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


def count_rows(path: Path) -> int:
    """The rows of one file; blank lines are none."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        _check_columns(path)
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as stream:
        return sum(1 for raw in stream if raw.strip())


def write_file(path: Path, rows: Iterator[dict[str, Any]]) -> int:
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
