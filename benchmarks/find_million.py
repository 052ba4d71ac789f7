"""Browsing and keyword search over a million items, beside plain SQL over an ordinary table in a file of its own.

The items are drawn: ids like 2021/03/IMG_000123.jpg, texts of 6 to 12 words out of 20,000 by Zipf's law, and the fields date (a
minute of ten years), camera (20 names by Zipf's law, one of a thousand items another) and width (8 numbers); vectors of width 8.
The plain side keeps them as columns with an index on (date, id), (camera, id) and (width, id), ANALYZE was run, and an FTS5 table
with content and unicode61 whose rows are those of the plain table. Both sides answer the same question in turn, and return whole
items; answers must be equal, to the id and for words to the score. Milliseconds are medians of CPU time, which other work on the
machine does not stretch, and a ratio is that of the medians.

    python -m benchmarks.find_million --markdown docs/results/find-million.md      # minutes
    python -m benchmarks.find_million --rows 50000                                 # seconds
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from traceir.index import Filter, SqliteIndex, open_index, parse_filter, position_of
from traceir.index.store import Stored
from traceir.index.words import columns_of
from traceir.items import Item

T = TypeVar("T")
Row = tuple[str, str, str, str, int]  # id, text, date, camera, width
LIMIT = 50
K = 10
CAMERAS = [
    f"{maker} {model}" for maker in ("Canon", "Nikon", "Sony", "Pixel", "Galaxy") for model in ("one", "two", "pro", "max")
]
RARE = "Leica mono"
WIDTHS = (640, 800, 1024, 1280, 1600, 2048, 3000, 4000)
COLUMNS = "id, text, date, camera, width"
TABLES = (
    "CREATE TABLE photos (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, text TEXT, date TEXT, camera TEXT, width INTEGER)",
    *(f"CREATE INDEX photos_{name} ON photos ({name}, id)" for name in ("date", "camera", "width")),
    "CREATE VIRTUAL TABLE words USING fts5(text, name, fields, tokenize='unicode61 remove_diacritics 2')",
)
BROWSED: list[tuple[str, str, str, float]] = [
    # what, filter, order, and after which part of the items the page begins
    ("newest first", "", "-date", 0.0),
    ("newest first, from the middle", "", "-date", 0.5),
    ("one camera in 20, newest first", f"camera='{CAMERAS[3]}'", "-date", 0.0),
    ("one item in 1,000, oldest first", f"camera='{RARE}'", "date", 0.0),
    ("three months, oldest first", "date>='2021-05' and date<'2021-08'", "date", 0.0),
    ("three months and two widths, newest first", "date>='2021-05' and date<'2021-08' and width in (800, 1600)", "-date", 0.0),
    ("before 2015, not one maker, newest first", "not camera~'Canon*' and date<'2015'", "-date", 0.0),
    ("one day, by width", "date>='2021-05-04' and date<'2021-05-05'", "width", 0.0),
    ("by camera, from the middle", "", "camera", 0.5),
    ("one camera or one width, widest first", f"camera='{CAMERAS[9]}' or width=640", "-width", 0.0),
    ("one item in 1,000, by id", f"camera='{RARE}'", "id", 0.0),
]  # fmt: skip
NOTES = """\
Pages under a filter are walked to in order, so what the filter refuses on the way costs time; where a walk gives up, as for
`one camera or one width`, all that pass are gathered and sorted. A word costs what FTS5 takes to score every text that has
it; the filter of a keyword search is looked up row by row.
"""
CONDITIONS = {"not camera~'Canon*'": "camera NOT GLOB 'Canon*'"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those that are there")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(options.folder or Path(temporary), options.rows, options.repetitions, options.seed)
    page = as_markdown(results)
    print(page)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(page)
    return int(not results["same"])


def measure(folder: Path, rows: int, repetitions: int, seed: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / "plain.sqlite").exists()
    with open_index(folder / "index", dim=8, fingerprint="f", prompt_version="p", create=True) as index:
        plain = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
        seconds = fill(index, plain, rows, seed) if is_new else {}
        started = time.process_time()
        index.search_keywords("anything", 1)
        if is_new:
            seconds["keyword table, at the first search"] = time.process_time() - started
        pages = [browse_both(index, plain, *case, repetitions) for case in BROWSED]
        words = [search_both(index, plain, what, text, where, repetitions) for what, text, where in searched(seed)]
        sizes = {"index": index.info().bytes, "plain": (folder / "plain.sqlite").stat().st_size}
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
        )
    same = all(row["same"] for row in pages + words)
    setup = {"rows": rows, "repetitions": repetitions, "seed": seed, "machine": machine}
    return {"setup": setup, "seconds": seconds, "bytes": sizes, "same": same, "pages": pages, "words": words}


def drawn(rows: int, seed: int) -> Iterator[Row]:
    draw = np.random.default_rng(seed)
    vocabulary = vocabulary_of(seed)
    for numbers in batched(range(rows), 10_000):
        lengths = draw.integers(6, 13, len(numbers))
        chosen = iter(((draw.zipf(1.2, 13 * len(numbers)) - 1) % len(vocabulary)).tolist())
        minutes = draw.integers(0, 10 * 365 * 24 * 60, len(numbers)).astype("timedelta64[m]") + np.datetime64("2014-01-01T00:00")
        cameras = (draw.zipf(1.5, len(numbers)) - 1) % len(CAMERAS)
        rare, widths = draw.random(len(numbers)) < 0.001, draw.choice(WIDTHS, len(numbers))
        for at, number in enumerate(numbers):
            text = " ".join(vocabulary[next(chosen)] for _ in range(lengths[at]))
            date = str(minutes[at])
            id = f"{date[:4]}/{date[5:7]}/IMG_{number:07d}.jpg"
            yield id, text, date, RARE if rare[at] else CAMERAS[cameras[at]], int(widths[at])


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part


def vocabulary_of(seed: int) -> list[str]:
    """Words of two to five syllables, the same for one seed."""
    draw = np.random.default_rng([seed, 1])
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = {"".join(draw.choice(syllables, draw.integers(2, 6))): None for _ in range(25_000)}
    return list(words)[:20_000]


def fill(index: SqliteIndex, plain: sqlite3.Connection, rows: int, seed: int) -> dict[str, float]:
    """Both sides; seconds of each."""
    seconds = {"index": 0.0, "plain table": 0.0, "plain FTS5 table": 0.0}
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *TABLES):
        plain.execute(statement)
    draw = np.random.default_rng([seed, 2])
    for number, block in enumerate(batched(drawn(rows, seed), 5_000)):
        vectors = draw.standard_normal((len(block), 8), dtype=np.float32)
        items = [item_of(row) for row in block]
        with clock(seconds, "index"):
            index.upsert(items, vectors)
        with clock(seconds, "plain table"):
            plain.execute("BEGIN")
            numbered = [(5_000 * number + at + 1, *row) for at, row in enumerate(block)]
            plain.executemany("INSERT INTO photos VALUES (?, ?, ?, ?, ?, ?)", numbered)
            plain.execute("COMMIT")
        cut = [
            (n, *map(" ".join, columns_of(str(item.id), item.text, item.fields)))
            for (n, *_), item in zip(numbered, items, strict=True)
        ]
        with clock(seconds, "plain FTS5 table"):
            plain.execute("BEGIN")
            plain.executemany("INSERT INTO words (rowid, text, name, fields) VALUES (?, ?, ?, ?)", cut)
            plain.execute("COMMIT")
    plain.execute("ANALYZE")
    return seconds


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds what its block takes to an entry."""
    started = time.process_time()
    yield
    seconds[name] += time.process_time() - started


def item_of(row: Row) -> Item:
    id, text, date, camera, width = row
    return Item.of(text=text, id=id, fields={"date": date, "camera": camera, "width": width})


def row_of(stored: Stored) -> Row:
    fields: Any = stored.fields
    return stored.id, stored.text or "", fields["date"], fields["camera"], fields["width"]


def browse_both(
    index: SqliteIndex, plain: sqlite3.Connection, what: str, where: str, sort: str, start: float, repetitions: int
) -> dict[str, Any]:
    name, is_down = sort.removeprefix("-"), sort.startswith("-")
    order = f"ORDER BY {name} {'DESC' if is_down else ''}, id" if name != "id" else "ORDER BY id"
    condition = sql_of(where)
    after, behind, values = None, "1", list[Any]()
    if start:
        count = plain.execute("SELECT count(*) FROM photos").fetchone()[0]
        after = plain.execute(f"SELECT {name}, id FROM photos {order} LIMIT 1 OFFSET ?", [int(start * count)]).fetchone()
        behind = f"{name} {'<=' if is_down else '>='} ? AND ({name} {'<' if is_down else '>'} ? OR id > ?)"
        values = [after[0], after[0], after[1]]
    statement = f"SELECT {COLUMNS} FROM photos WHERE ({condition}) AND ({behind}) {order} LIMIT {LIMIT}"
    ours, theirs, seconds = in_turn(
        lambda: [row_of(stored) for stored in index.browse(where or None, sort=sort, after=after, limit=LIMIT)],
        lambda: plain.execute(statement, values).fetchall(),
        repetitions,
    )
    assert not ours or position_of(index.get([ours[-1][0]])[ours[-1][0]], sort)[1] == ours[-1][0]
    return {"what": what, "where": where, "sort": sort, "same": ours == theirs, "hits": len(ours), **seconds}


def sql_of(where: str) -> str:
    """The same condition as SQL, which differs little."""
    for text, condition in CONDITIONS.items():
        where = where.replace(text, condition)
    return where or "1"


def searched(seed: int) -> list[tuple[str, str, str]]:
    word = vocabulary_of(seed)
    return [
        ("a rare word", word[9_000], ""),
        ("a word of one text in 100", word[40], ""),
        ("five words", " ".join(word[at] for at in (30, 90, 400, 2_000, 7_000)), ""),
        ("the most frequent word", word[0], ""),
        ("a phrase", f'"{word[0]} {word[1]}"', ""),
        ("two words without a third", f"{word[40]} {word[90]} -{word[0]}", ""),
        ("a prefix", f"{word[300][:4]}*", ""),
        ("a file name", "IMG_0000123", ""),
        ("a word of one in 100, one camera in 20", word[40], f"camera='{CAMERAS[3]}'"),
        ("a frequent word, one item in 1,000", word[2], f"camera='{RARE}'"),
    ]


def search_both(
    index: SqliteIndex, plain: sqlite3.Connection, what: str, text: str, where: str, repetitions: int
) -> dict[str, Any]:
    words, _, without = text.partition(" -")
    match = (
        words if words[0] == '"' else " OR ".join(f'"{word.rstrip("*")}"{" *" * word.endswith("*")}' for word in words.split())
    )
    match = f'({match}) NOT "{without}"' if without else match
    statement = (
        f"SELECT {COLUMNS}, bm25(words, 1.0, 0.5, 0.5) AS score FROM words JOIN photos p ON p.n = words.rowid "
        f"WHERE words MATCH ? AND {sql_of(where)} ORDER BY score, id LIMIT {K}"
    ).replace(COLUMNS, ", ".join(f"p.{name}" for name in COLUMNS.split(", ")))
    narrowed: Filter | None = parse_filter(where) if where else None
    ours, theirs, seconds = in_turn(
        lambda: [(hit.id, hit.text, round(hit.score, 9)) for hit in index.search_keywords(text, K, where=narrowed)],
        lambda: [(id, text, round(-score, 9)) for id, text, *_, score in plain.execute(statement, [match])],
        repetitions,
    )
    return {"what": what, "where": where, "same": ours == theirs, "hits": len(ours), **seconds}


def in_turn(
    ours: Callable[[], list[Any]], theirs: Callable[[], list[Any]], repetitions: int
) -> tuple[list[Any], list[Any], dict[str, float]]:
    """The answers of both, and the median seconds of each."""
    answers, taken = [ours(), theirs()], [list[float](), list[float]()]
    for repetition in range(2 * repetitions):
        side = repetition % 2
        started = time.process_time()
        (ours, theirs)[side]()
        taken[side].append(time.process_time() - started)
    medians = [statistics.median(own) for own in taken]
    return answers[0], answers[1], {"ours": medians[0], "plain": medians[1], "ratio": medians[0] / medians[1]}


def as_markdown(results: dict[str, Any]) -> str:
    setup, seconds, size = results["setup"], results["seconds"], results["bytes"]
    lines = [
        "# Browsing and keyword search over a million items",
        "",
        "    python -m benchmarks.find_million --markdown docs/results/find-million.md",
        "",
        f"{setup['rows']:,} drawn items, seed {setup['seed']}; {setup['machine']}, shared with other work, so seconds are",
        "CPU seconds. The plain side is a table with an index for each order and an FTS5 table with content, in SQL as written",
        f"by hand; both return whole items. Medians of {setup['repetitions']} turns. Answers are "
        f"{'the same' if results['same'] else 'NOT the same'} on both sides.",
        "",
    ]
    if seconds:
        table = seconds["keyword table, at the first search"] / seconds["plain FTS5 table"]
        lines += [
            "| filling | seconds | per 100,000 items |",
            "|---|---|---|",
            *(f"| {name} | {value:.1f} | {1e5 * value / setup['rows']:.2f} |" for name, value in seconds.items()),
            "",
            "Adding items writes nothing of the keyword table. They are cut into words in Python and inserted at the next",
            f"keyword search, in {table:.2f} of the time in which the plain side inserts words that were cut beforehand.",
            f"On disk: index {size['index'] / 1e6:.0f} MB, plain {size['plain'] / 1e6:.0f} MB.",
            "",
        ]
    for title, kind in ((f"a page of {LIMIT} items", "pages"), (f"the best {K} by BM25", "words")):
        lines += [f"| {title} | items | ours, ms | plain, ms | ratio |", "|---|---|---|---|---|"]
        for row in results[kind]:
            mark = "" if row["same"] else " (differs)"
            times = f"{1e3 * row['ours']:.2f} | {1e3 * row['plain']:.2f} | {row['ratio']:.2f}"
            lines.append(f"| {row['what']}{mark} | {row['hits']} | {times} |")
        lines.append("")
    return "\n".join(lines) + f"\n{NOTES}"


if __name__ == "__main__":
    sys.exit(main())
