"""Keyword search in the SQLite file: an FTS5 table beside the items, filled when words are first looked for.

A row's number is never used twice and a row never changes, so the table is only ever added to: a search first brings in the rows
above the highest number in it. Rows of removed items stay behind, are dropped where hits are read, and go when the table is made
anew, once a quarter of it is such. So writing items costs nothing more, a file of an earlier version gains the table at its first
keyword search, and that version may go on writing to it.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Final

from traceir.index import store
from traceir.index.filters import Filter
from traceir.index.sql import COLUMNS, compile_filter, read_counter, read_number
from traceir.index.words import WEIGHTS, KeywordQuery, SearchTerm, columns_of
from traceir.items import Modality

CHUNK: Final = 1_000
"""Rows brought in by one transaction, for which all else waits."""
_STALE: Final = 0.25
_SMALL: Final = 1_000
"""Rows below which it is not worth while to make the table anew."""
_TABLE: Final = "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, name, fields, content='', tokenize='ascii')"
"""Words come cut and folded by `cut_words`, parted by spaces; `ascii` parts at nothing else."""
_WEIGHTS: Final = ", ".join(map(str, WEIGHTS))


@dataclass(frozen=True, slots=True)
class TableState:
    """Up to which number rows are in the table, how many, and whether it has once held all."""

    top: int = 0
    rows: int = 0
    whole: bool = False


class KeywordTable:
    """The table of one open index; every method runs within a transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._fresh = -1  # the deletions at which few rows were found to be stale

    def state(self) -> TableState:
        if not read_number(self._connection, "SELECT count(*) FROM sqlite_master WHERE name = 'words'"):
            return TableState()
        row = self._connection.execute("SELECT value FROM meta WHERE name = 'words'").fetchone()
        try:
            return TableState(**json.loads(row[0])) if row else TableState()
        except (ValueError, TypeError) as error:
            raise store.DamageError("its keyword table cannot be read; restore it from a copy") from error

    def is_behind(self) -> bool:
        state = self.state()
        return not state.whole or read_number(self._connection, "SELECT max(n) FROM items") > state.top or self._is_stale(state)

    def catch_up(self) -> None:
        """Bring in the next CHUNK rows, within a transaction that writes."""
        self._connection.execute(_TABLE)
        state = self.state()
        if self._is_stale(state) or not state.rows:
            self._connection.execute("INSERT INTO words (words) VALUES ('delete-all')")
            state = TableState()
        rows = self._connection.execute(f"SELECT {COLUMNS} FROM items i WHERE i.n > ? ORDER BY i.n LIMIT {CHUNK}", (state.top,))
        kept = [(row[0], store.stored_of(*row[1:], vector=None)) for row in rows.fetchall()]
        cut = ((n, *map(" ".join, columns_of(item.id, item.text, item.fields))) for n, item in kept)
        self._connection.executemany("INSERT INTO words (rowid, text, name, fields) VALUES (?, ?, ?, ?)", cut)
        top = kept[-1][0] if kept else state.top
        state = TableState(top, state.rows + len(kept), state.whole or len(kept) < CHUNK)
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('words', ?)", (json.dumps(asdict(state)),))

    def search(self, words: KeywordQuery, k: int, where: Filter | None, modality: Modality | None) -> list[tuple[float, int]]:
        """BM25 and number of the best k, best first, equal ones in order of id."""
        condition, values = compile_filter(where, row_by_row=True)
        of_modality, own = ("i.modality = ?", [modality]) if modality else ("1", [])
        rows = self._connection.execute(
            f"SELECT bm25(words, {_WEIGHTS}) AS score, i.n FROM words CROSS JOIN items i ON i.n = words.rowid "
            f"WHERE words MATCH ? AND {of_modality} AND ({condition}) ORDER BY score, i.id LIMIT ?",
            [match_of(words), *own, *values, min(k, 2**62)],
        )
        return [(-score, n) for score, n in rows.fetchall()]

    def _is_stale(self, state: TableState) -> bool:
        deletions = read_counter(self._connection, "deletions")
        if deletions == self._fresh or state.rows < _SMALL:
            return False
        alive = read_number(self._connection, "SELECT count(*) FROM items WHERE n <= ?", [state.top])
        if state.rows - alive > _STALE * state.rows:
            return True
        self._fresh = deletions
        return False


def match_of(words: KeywordQuery) -> str:
    """A query in FTS5's language; words hold no character that means anything in it."""
    required = [_quoted(term) for term in words.required]
    wanted = [_quoted(term) for term in words.wanted]
    if wanted:
        required.append(f"({' OR '.join(required + wanted)})")
    matched = " AND ".join(required)
    return f"({matched}) NOT ({' OR '.join(map(_quoted, words.without))})" if words.without else matched


def _quoted(term: SearchTerm) -> str:
    return f'"{" ".join(term.words)}"{" *" if term.is_prefix else ""}'
