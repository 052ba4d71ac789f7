"""The keyword table of the embedded index: filled late, made anew, left behind by kills, locks and earlier versions."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sqlite3
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_index_conformance import FILTERS, damage, drawn, in_process, opened, texts

from traceir.errors import StoreError
from traceir.index import SqliteIndex, keywords, open_index
from traceir.index.filters import Eq, Or, matches
from traceir.items import Item

WORDS = ("cup", "jug", "red", "sea", "Küste")
QUOTE = '"'
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
NUMBERS = st.integers(0, 9)
ASKED = st.lists(st.tuples(st.sampled_from(["", "-", '"']), TEXTS), min_size=1, max_size=3)


def ids(index: Any, text: str, k: int = 10_000, **options: Any) -> list[str]:
    return sorted(hit.id for hit in index.search_keywords(text, k, **options))


def rows_in_table(index: SqliteIndex) -> tuple[int, int]:
    """Rows that the table says it has, and has."""
    counted = index._connection.execute("SELECT count(*) FROM words").fetchone()[0]
    return index._keywords.state().rows, counted


def compare_with_python(folder: Path, steps: list[Any], asked: list[tuple[str, str]], where: Any) -> None:
    """Whatever two handles wrote between the searches; with a table made anew as soon as a quarter is stale."""
    parts = [(mark, " ".join(words.split()[:1]) if mark == "-" else words) for mark, words in asked]
    query = " ".join(f"{mark}{words}{mark if mark == QUOTE else ''}" for mark, words in parts)
    there: dict[str, tuple[str, Any]] = {}

    def finds(text: str) -> bool:
        padded = f" {text} "
        phrases = [f" {words} " in padded for mark, words in parts if mark == QUOTE]
        plain = [f" {word} " in padded for mark, words in parts if mark == "" for word in words.split()]
        without = [f" {words} " in padded for mark, words in parts if mark == "-"]
        return any(phrases + plain) and all(phrases) and not any(without)

    with pytest.MonkeyPatch.context() as patch, opened(folder) as index, opened(folder) as other:
        patch.setattr(keywords, "_SMALL", 3)
        patch.setattr(keywords, "CHUNK", 2)
        for writer, (put, gone) in zip((index, other) * 2, steps, strict=False):
            items = [Item.of(text=text, id=f"i{n}", fields={"x": value}) for n, (text, value) in put.items()]
            writer.upsert(items, drawn(len(items), 4)) if items else None
            there |= {str(item.id): (item.text, item.fields["x"]) for item in items}
            writer.delete([f"i{n}" for n in gone])
            there = {id: kept for id, kept in there.items() if int(id[1:]) not in gone}
            if all(mark == "-" for mark, _ in parts):
                continue
            expected = [
                id for id, (text, x) in there.items() if finds(text) and (where is None or matches(where, id, "text", {"x": x}))
            ]
            assert ids(index, query, where=where) == ids(other, query.upper(), where=where) == sorted(expected)
            said, counted = rows_in_table(index)
            assert said == counted <= max(3, len(there) / 0.75)


def test_what_is_found_is_what_plain_python_finds(tmp_path: Path) -> None:
    texts = ("red cup", "cup red sea", "jug", "Küste jug red", "sea sea", "cup")
    put = {n: (texts[n % 6], (0, "a", True)[n % 3]) for n in range(10)}
    again = {n: (texts[(n + 1) % 6], "a") for n in (1, 3, 5, 7)}
    steps = [(put, {2}), (again, {0, 9}), ({}, {1, 4, 6}), ({0: put[0]}, set())]
    compare_with_python(tmp_path / "words", steps, [("", "red Küste"), ("-", "sea")], None)
    compare_with_python(tmp_path / "phrase", steps, [('"', "red cup"), ("", "jug")], Or((Eq("x", "a"), Eq("x", True))))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 9), st.tuples(TEXTS, st.sampled_from([0, "a", True]))), st.sets(st.integers(0, 9))
        ),
        min_size=1,
        max_size=4,
    ),
    asked=ASKED,
    where=st.one_of(st.none(), FILTERS),
)
def test_what_is_found_after_any_steps_is_what_plain_python_finds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], asked: list[tuple[str, str]], where: Any
) -> None:
    compare_with_python(tmp_path_factory.mktemp("index"), steps, asked, where)


def test_others_are_answered_while_words_are_brought_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keywords, "CHUNK", 2)
    with opened(tmp_path) as index:
        index.upsert([Item.of(text=f"strand {n}", id=str(n)) for n in range(40)], drawn(40, 4))
        free: list[bool] = []
        monkeypatch.setattr("traceir.index.sqlite.time.sleep", lambda _: free.append(not index._connection.in_transaction))
        assert len(ids(index, "strand")) == 40
        assert len(free) >= 20 and all(free), "the lock, let go and taken at once, would pass by those that wait for it"


def test_a_prefix_is_found_and_ranked_with_its_words(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert([Item.of(text=text, id=text) for text in ("Strandkorb", "Strand", "Sand", "am Strand liegen")], drawn(4, 4))
        assert ids(index, "strand") == ["Strand", "am Strand liegen"]
        assert ids(index, "strand*") == ["Strand", "Strandkorb", "am Strand liegen"] == ids(index, "str*")
        assert (
            ids(index, "sa* st* -strand*") == ["Sand"]
            and ids(index, "s*") == []
            and ids(index, "am* liegen") == ["am Strand liegen"]
        )
        assert index.search_keywords("strand", 1)[0].id == "Strand", "the shorter text"


def test_a_file_of_an_earlier_version_gains_keyword_search_and_may_be_written_by_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / "c33a2b9.zip") as archive:
        archive.extractall(tmp_path)
    with open_index(tmp_path / "index") as index:
        everything = list(index.scan())
        word = next(item.text for item in everything if item.text).split()[-1].strip(".")
        named = [item.id for item in everything if item.text and word.lower() in item.text.lower().replace(".", "").split()]
        assert named and set(named) <= set(ids(index, word))
        page = index.browse(sort="colour", limit=5)
        assert [item.fields["colour"] for item in page] == sorted(item.fields["colour"] for item in page)
        # What earlier versions do, which do not know of the table.
        damage(tmp_path / "index", "DELETE FROM items WHERE id = ?", named[0])
        insert = "INSERT INTO items (id, modality, text, fields, content_hash) VALUES ('later', 'text', ?, '{}', '')"
        damage(tmp_path / "index", insert, f"a later {word}")
        assert "later" in ids(index, word) and named[0] not in ids(index, word)


def test_while_another_process_writes_what_was_there_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, timeout=0.05) as index:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
        other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked.*0\.05 seconds"):
            index.search_keywords("text", 9)  # nothing was ever brought in
        other.execute("ROLLBACK")
        assert ids(index, "text") == ["a", "b"]
        index.upsert(texts(["c"]), drawn(1, 4))
        other.execute("BEGIN IMMEDIATE")
        assert ids(index, "text") == ["a", "b"] and "leaves out" in caplog.text
        other.execute("ROLLBACK")
        other.close()
        assert ids(index, "text") == ["a", "b", "c"]


def fill(folder: Path, count: int) -> None:
    with opened(folder) as index:
        for start in range(0, count, 2000):
            index.upsert(texts([f"{n:05}" for n in range(start, start + 2000)]), drawn(2000, 4))


def look(folder: str, answers: Any) -> None:
    keywords.CHUNK = 200
    with opened(Path(folder), create=False, timeout=30) as index:
        answers.put(len(ids(index, "text")))


@pytest.mark.slow
def test_a_kill_while_the_table_is_filled_loses_and_doubles_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "index", 8000)
    code = f"import test_index_keywords as k; k.keywords.CHUNK = 100; i = suite.opened(suite.Path({str(tmp_path / 'index')!r})); "
    tops = []
    for _ in range(8):
        with in_process(f"{code} print('ready', flush=True); i.search_keywords('text', 3)") as looker:
            assert looker.stdout is not None and looker.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.02, 0.2))
            looker.send_signal(signal.SIGKILL)
        with opened(tmp_path / "index") as index:
            tops.append(rows_in_table(index)[0] if index._keywords.state().top else 0)
    assert tops == sorted(tops) and any(0 < top < 8000 for top in tops), "no kill came in between"
    with opened(tmp_path / "index") as index:
        assert len(ids(index, "text")) == 8000 and rows_in_table(index) == (8000, 8000)


@pytest.mark.slow
def test_processes_that_look_at_once_fill_the_table_together(tmp_path: Path) -> None:
    fill(tmp_path, 6000)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    lookers = [context.Process(target=look, args=(str(tmp_path), answers)) for _ in range(3)]
    for looker in lookers:
        looker.start()
    assert [answers.get(timeout=300) for _ in lookers] == [6000] * 3
    for looker in lookers:
        looker.join()
    with opened(tmp_path) as index:
        assert rows_in_table(index) == (6000, 6000)
