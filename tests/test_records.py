"""Tables as records: separators, encodings, numbers, and rows that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from traceir.collection.records import Failure, FileRecord, Note
from traceir.collection.records import read_records as read
from traceir.collection.sources import Source, find_sources


def table(folder: Path, data: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [dict(record.values) for record in read(path) if isinstance(record, FileRecord)]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_rows_are_records_whatever_separates_their_cells(separator: str, tmp_path: Path) -> None:
    rows = (
        ("ID", " Text ", "price", "code", "title"),
        ("1", '"two, or; more\tlines\r\nof a ""text"" | here"', "3.50", "007", "1984"),
        ("b", "x", "-12", "1e3", ""),
        ("", "", "", "", ""),
    )
    path = table(tmp_path, "\r\n".join(separator.join(row) for row in rows))
    text = 'two, or; more\tlines\r\nof a "text" | here'
    assert values(path) == [
        {"id": "1", "text": text, "price": 3.5, "code": "007", "title": "1984"},
        {"id": "b", "text": "x", "price": -12, "code": 1000.0},
    ]
    assert [type(record["price"]) for record in values(path)] == [float, int]


def test_a_name_may_go_over_lines_and_a_cell_be_as_long_as_a_line(tmp_path: Path) -> None:
    path = table(tmp_path, f'sep=,\nid,"price\n(EUR)"\na,5\nb,{"x" * 200_000}\nc,1,2\n')
    assert values(path) == [{"id": "a", "price\n(EUR)": 5}, {"id": "b", "price\n(EUR)": "x" * 200_000}]
    assert [record.location for record in read(path) if isinstance(record, Failure)] == [f"{path}:6"]


def test_encodings_are_recognised_and_told(tmp_path: Path) -> None:
    text = "id;text\na;Käse – 5 €\n"
    for encoding, what in (("utf-8", ""), ("utf-8-sig", ""), ("cp1252", "Windows-1252"), ("utf-16", "UTF-16")):
        path = table(tmp_path, text.encode(encoding))
        assert values(path) == [{"id": "a", "text": "Käse – 5 €"}]
        assert [note.what for note in read(path) if isinstance(note, Note) and what in note.what] == [
            note.what for note in read(path) if isinstance(note, Note)
        ] and bool(what) == any(isinstance(note, Note) for note in read(path))
    assert values(table(tmp_path, "sep=;\nid;text\na;x,y\n")) == [{"id": "a", "text": "x,y"}]


def test_bad_rows_are_named_by_their_line_and_bad_tables_once(tmp_path: Path) -> None:
    path = table(tmp_path, 'id,text\na,"two\nlines"\nb,x,too many\nc,"broken" quote\nd,y\n"e,never closed')
    failed = {record.location.rpartition(":")[2]: record.reason for record in read(path) if isinstance(record, Failure)}
    assert [record["id"] for record in values(path)] == ["a", "d"] and list(failed) == ["4", "5", "7"]
    assert "3 cells, but 2 columns" in failed["4"] and "quotes" in failed["5"]
    for data, why in (("name,price\na,1\n", "no column `id`"), ("id,n,n\n", "'n' occurs twice"), ("", "no column `id`")):
        (failure,) = read(table(tmp_path, data))
        assert isinstance(failure, Failure) and why in failure.reason


def test_rows_become_items_where_the_table_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, "id,title,price\na,a lamp,3\n,no id,4\n", "stock.tsv".replace(".tsv", ".csv"))
    outcomes = list(find_sources([path]))
    assert [outcome.id for outcome in outcomes if isinstance(outcome, Source)] == ["a"]
    assert [outcome.location for outcome in outcomes if isinstance(outcome, Failure)] == [f"{path}:3"]
    item, notes = next(outcome for outcome in outcomes if isinstance(outcome, Source)).make_item()
    assert (item.text, dict(item.fields)) == ("a lamp", {"title": "a lamp", "price": 3}) and "`title` was taken" in notes[0].what
    assert not [outcome for outcome in find_sources([tmp_path]) if isinstance(outcome, Source)]
