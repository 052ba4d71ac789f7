"""What an index refuses, and in which words: filters beyond their bound, rows and files that are damaged, memory that stays."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_conformance import clustered, damage, drawn, opened, texts

from traceir.errors import InputError, StoreError
from traceir.index import And, Eq, Filter, In, Range, sql
from traceir.index.filters import matches
from traceir.items import Item

HALF_MEGABYTE = "x" * 2**19
FULL = tuple(In(f"f{n}", tuple(range(10_000))) for n in range(3))
TOO_LARGE: list[tuple[Callable[[], Filter], str]] = [
    (
        lambda: And(tuple(In("f", tuple(range(10_000))) for _ in range(26))),
        "260000 values to be one of in all; give at most 30000",
    ),
    (lambda: And((And((*FULL[:2], Eq("f", 1))), And((FULL[2], And((In("f", ("a",)),)))))), "30001 values"),
    (lambda: And(tuple(Eq("f", n) for n in range(257))), "257 conditions in all; give at most 256"),
    (lambda: In("f", tuple(f"{n}{HALF_MEGABYTE}" for n in range(8))), "bytes of text in all; give at most 4194304"),
    (lambda: Eq("f", "ü" * 2**21 + "x"), "4194305 bytes of text"),
    (lambda: Range("f", None, "x" * (2**22 + 1)), "4194305 bytes of text"),
    (lambda: In("f", tuple(range(10_001))), "10001 values"),
]
NO_FILTERS: list[Callable[[], Any]] = [
    lambda: Range("a"), lambda: Range("a", 1, "b"), lambda: Range("a", True, None), lambda: Range("a", HALF_MEGABYTE, 1),
    lambda: Range("a", -(2**63) - 1, 1), lambda: In("a", "abc"), lambda: In("a", 5), lambda: In("a", b"ab"),
    lambda: In("a", (10**5000,)), lambda: In("a", HALF_MEGABYTE), lambda: Eq("", 1), lambda: Eq("a", float("inf")),
    lambda: Eq("a", [HALF_MEGABYTE]), lambda: Eq(HALF_MEGABYTE, 1), lambda: Eq(10**5000, 1), lambda: Eq("a", "nul\0"),
    lambda: Eq("a", "\ud800"), lambda: And(("year = 1",)), lambda: And((None,)), lambda: And(Eq("a", 1)),
]  # fmt: skip


def test_filters_that_are_too_large_or_none_are_refused_in_a_short_message() -> None:
    for make, why in [*TOO_LARGE, *((make, "a|filter") for make in NO_FILTERS)]:
        with pytest.raises(InputError, match=why) as refused:
            make()
        assert len(str(refused.value)) < 400
    deep: Filter = Eq("f", 1)
    for n in range(255):
        deep = And((deep, Range("f", n, None)) if n % 2 else (And(()), deep, Range("f", n, None)))
    assert isinstance(deep, And) and len(deep.parts) == 256  # an And in an And is its parts, so no depth is too deep
    assert matches(deep, "a", "text", {"f": 1}) is False and matches(And((And(()),)), "a", "text", {})


def test_what_is_not_the_disks_fault_is_not_blamed_on_it(tmp_path: Path) -> None:
    with opened(tmp_path) as index:
        index.upsert(texts([f"{n}" for n in range(50)], v=1), drawn(50, 4))
        limit = index._connection.setlimit
        for which, low, action in (
            (sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 5, lambda: index.count(In("v", tuple(range(9))))),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 9, lambda: index.count(And(tuple(Eq("v", n) for n in range(9))))),
            (sqlite3.SQLITE_LIMIT_LENGTH, 5000, lambda: index.upsert([Item.of(text="x" * 9000, id="b")], drawn(1, 4))),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 200, lambda: index.delete(In("v", tuple(range(99))))),
        ):
            before = limit(which, low)
            with pytest.raises(StoreError, match="smaller parts") as refused:
                action()
            assert "disk " not in str(refused.value) and str(tmp_path) in str(refused.value)
            limit(which, before)
        index._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StoreError, match="is full"):
            index.upsert(texts([f"b{n}" for n in range(500)]), drawn(500, 4))
        index._connection.execute("PRAGMA max_page_count = 1000000")
        assert index.count() == 50
    for code, text, words in (
        (sqlite3.SQLITE_IOERR_READ, "disk I/O error", "check the disk"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "attempt to write a readonly database", "rights"),
        (sqlite3.SQLITE_PROTOCOL, "locking protocol", "longer timeout"),
        (sqlite3.SQLITE_ERROR, "no such table: cells", "damaged"),
        (sqlite3.SQLITE_ERROR, "something new", "repeat"),
    ):
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        message = str(sql.explain_error(error, tmp_path, 3))
        assert words in message and ("disk," in message) == (words == "check the disk")


def broken_vectors(dtype: str) -> dict[str, Any]:
    kind = "<f2" if dtype == "float16" else "<f4"
    rows = {
        "NaN": [np.nan, 0, 0, 0], "infinity": [0, np.inf, 0, 0], "zero": [0, 0, 0, 0], "long": [30, 0, 0, 0],
        "overflows": [60_000, 0, 0, 60_000], "other width": [1, 0, 0],
    }  # fmt: skip
    vectors: dict[str, Any] = {name: np.asarray(row, dtype=kind).tobytes() for name, row in rows.items()}
    return vectors | {"cut": vectors["zero"][:-1], "empty": b"", "text": "1, 0, 0, 0", "number": 1.0, "gone": None}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_row_that_poisons_a_search_is_named_and_never_empties_it(tmp_path: Path, dtype: Any) -> None:
    broken, vectors = broken_vectors(dtype), drawn(40, 4)
    ids = [*(f"{n:02}" for n in range(40 - len(broken))), *broken]
    with opened(tmp_path, dtype=dtype) as index:
        index.upsert(texts(ids, x=1), vectors)
        index.build_ann(cells=4, probes=2)
    for id, vector in broken.items():
        damage(tmp_path, "UPDATE OR IGNORE vectors SET vector = ? WHERE n = (SELECT n FROM items WHERE id = ?)", vector, id)
    damage(tmp_path, "DELETE FROM vectors WHERE n = (SELECT n FROM items WHERE id = 'gone')")
    with opened(tmp_path, dtype=dtype) as index:
        for search in (
            lambda: index.search(vectors[:1], 3),
            lambda: index.search(vectors, 3, where=Eq("x", 1), modality="text"),
            lambda: index.search(vectors[:1], 3, exact=False),
            index.build_ann,
            lambda: index.get(ids, with_vectors=True),
            lambda: list(index.scan(with_vectors=True)),
        ):
            with pytest.raises(StoreError, match=rf"damaged: {len(broken)} items.*(index rm|restore)") as named:
                search()
            assert str(tmp_path) in str(named.value) and all(repr(name) in str(named.value) for name in broken)
        assert index.info().count == 40 and len(list(index.scan(Eq("x", 1)))) == 40  # what needs no vector goes on
        names = list(broken)
        index.upsert(texts(names[:2]), drawn(2, 4))
        with pytest.raises(StoreError, match=f"{len(broken) - 2} items"):
            index.search(vectors[:1], 3)
        assert index.delete(names[2:]) == len(broken) - 2
        for exact in (True, False):
            assert len(index.search(vectors[:1], 99, exact=exact)[0]) == 42 - len(broken)


def test_rows_broken_or_removed_beside_an_open_index_are_noticed(tmp_path: Path) -> None:
    with opened(tmp_path) as index, opened(tmp_path) as other:
        index.upsert(texts(["a", "b"]), drawn(2, 4))
        assert len(index.search(drawn(1, 4), 9)[0]) == 2
        other.upsert(texts(["c"]), drawn(1, 4))
        damage(tmp_path, "UPDATE vectors SET vector = x'00' WHERE n = 3")
        for _ in range(2):  # and the failed load leaves nothing half read behind
            with pytest.raises(StoreError, match="item 'c' has no whole vector of finite numbers"):
                index.search(drawn(1, 4), 9)
        index.upsert(texts(["c"]), drawn(1, 4))
        assert len(index.search(drawn(1, 4), 9)[0]) == 3
        damage(tmp_path, "DELETE FROM items WHERE id = 'a'")
        with pytest.raises(StoreError, match="another program"):
            index.search(drawn(1, 4), 3)
    with opened(tmp_path) as index:
        assert sorted(hit.id for hit in index.search(drawn(1, 4), 3)[0]) == ["b", "c"]


def test_lists_that_cannot_be_used_hide_no_row(tmp_path: Path) -> None:
    vectors = clustered(300)
    with opened(tmp_path, dim=24) as index:
        index.upsert(texts([f"{n:03}" for n in range(300)]), vectors)
    for change in ("UPDATE cells SET cell = ? WHERE n > 290", "DELETE FROM cells WHERE n > 290 AND ?"):
        for cell in ("text", b"\xff", 2**60, -7, 99, 1.5) if "UPDATE" in change else (1,):
            with opened(tmp_path, dim=24) as index:
                index.build_ann(cells=8, probes=1)
            damage(tmp_path, change, cell)
            with opened(tmp_path, dim=24) as index:
                for row in range(291, 300):
                    assert index.search(vectors[row : row + 1], 1, exact=False)[0][0].id == f"{row:03}", cell
    nan = np.full(24, np.nan, dtype="<f4").tobytes()
    for what, value in (("vector", nan), ("vector", b"short"), ("vector", "text"), ("cell", 77), ("modality", "video")):
        damage(tmp_path, f"UPDATE centroids SET {what} = ? WHERE cell = 3", value)
        with opened(tmp_path, dim=24) as index:
            with pytest.raises(StoreError, match="cannot be read; make all anew with `traceir index build-ann`"):
                index.search(vectors[:1], 1, exact=False)
            assert index.search(vectors[:1], 1)[0][0].id == "000"
            index.build_ann(cells=8, probes=1)
            assert index.search(vectors[:1], 1, exact=False)[0][0].id == "000"


@pytest.mark.slow
def test_what_clients_filter_by_is_not_kept(tmp_path: Path) -> None:
    def resident_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    with opened(tmp_path) as index:
        index.upsert(texts(["a", "b"], x="1"), drawn(2, 4))
        before = 0
        for number in range(25):
            values = tuple(f"{number}-{index}-{'x' * 2000}" for index in range(1000 + number))
            assert len(index.search(drawn(1, 4), 2, where=In("x", (*values, "1")))[0]) == 2
            before = before or resident_bytes()
        assert resident_bytes() - before < 48 * 2**20  # of 48 MiB of values, which took three times as much


# Files that are damaged anywhere


VECTORS = drawn(60, 8)
USES: list[Callable[[Any], object]] = [
    lambda index: index.info(),
    lambda index: index.count(Range("x", 1, None)),
    lambda index: index.search(VECTORS[:2], 99),
    lambda index: index.search(VECTORS[:2], 99, exact=False),
    lambda index: index.search(VECTORS[:1], 5, where=And((Eq("x", 1), In("y", ("w0", "w1"))))),
    lambda index: index.get([f"{n:02}" for n in range(60)], with_vectors=True),
    lambda index: list(index.scan(Eq("x", None))),
    lambda index: index.upsert(texts(["07"], x=1), VECTORS[:1]),
    lambda index: index.delete(Eq("x", 2)),
    lambda index: index.build_ann(3, 1),
    lambda index: index.search(VECTORS[:2], 99),
]


def use_all(folder: Path) -> list[str]:
    """What is refused of all uses of an index that may be damaged, which is by StoreError."""
    messages: list[str] = []
    for create in (False, True):
        try:
            index = opened(folder, dim=8, create=create, timeout=0.2)
        except StoreError as error:
            messages.append(str(error))
            continue
        with index:
            for use in USES:
                try:
                    use(index)
                except StoreError as error:
                    messages.append(str(error))
    assert all(str(folder) in message and "; " in message for message in messages), messages
    return messages


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    with opened(folder, dim=8) as index:
        fields = [{"x": n % 5, "y": f"w{n % 3}"} for n in range(60)]
        many = [Item.of(text=f"text of {n} " * (n % 9 + 1), id=f"{n:02}", fields=own) for n, own in enumerate(fields)]
        index.upsert(many, VECTORS)
        index.build_ann(4, 2)
        index.upsert(many[3:4], drawn(1, 8))
    return (folder / "index.sqlite").read_bytes()


def test_a_file_cut_or_overwritten_anywhere_is_named_as_damaged(tmp_path: Path, whole_file: bytes) -> None:
    for size in [0, 1, 15, 99, 101, 511, 4095, 4097, *range(8192, len(whole_file), 4096), len(whole_file) - 1]:
        folder = tmp_path / f"{size}"
        folder.mkdir()
        (folder / "index.sqlite").write_bytes(whole_file[:size])
        with pytest.raises(StoreError, match=r"index\.sqlite.*(damaged|cut off).*; ") as refused:
            opened(folder, dim=8, create=False)
        assert str(folder) in str(refused.value)
    lost = 0
    for start in range(4096, len(whole_file), 4096):  # pages that lost their rows hide none
        (tmp_path / "index.sqlite").write_bytes(whole_file[: start + 3] + bytes(2) + whole_file[start + 5 :])  # how many it has
        try:
            with opened(tmp_path, dim=8, create=False) as index:
                assert len(index.search(drawn(1, 8), 99)[0]) == 60
        except StoreError as error:
            lost += "items can be read" in str(error)
        for log in tmp_path.glob("*-*"):
            log.unlink()
    assert lost
    (tmp_path / "index.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        opened(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_end_in_a_store_error_or_an_answer(tmp_path: Path, whole_file: bytes, seed: int) -> None:
    draw, data = random.Random(seed), bytearray(whole_file)
    start, length = draw.randrange(len(data)), draw.choice([16, 512, 4096])
    if seed % 3 == 0:
        data[start : start + length] = draw.randbytes(len(data[start : start + length]))
    for _ in range(draw.choice([1, 8, 60])):
        data[draw.randrange(0, 4096 if seed % 4 == 0 else len(data))] ^= 1 << draw.randrange(8)
    (tmp_path / "index.sqlite").write_bytes(data)
    use_all(tmp_path)


def test_tables_that_are_not_ours_are_named(tmp_path: Path, whole_file: bytes) -> None:
    for change in (
        *(f"DROP TABLE {table}" for table in ("meta", "items", "vectors", "fields", "cells", "centroids")),
        "ALTER TABLE items RENAME COLUMN fields TO others",
        *(f"DELETE FROM meta WHERE name = '{name}'" for name in ("format", "dim", "dtype", "fingerprint", "created")),
        *(f"UPDATE meta SET value = '{value}' WHERE name = 'dim'" for value in ("", "0", "-1", "²", "99999", "9" * 5000)),
        "UPDATE meta SET value = 'one' WHERE name = 'format'",
        "UPDATE meta SET value = 'float64' WHERE name = 'dtype'",
        "UPDATE meta SET value = x'ff' WHERE name IN ('prompt_version', 'probes', 'built')",
        *(f"UPDATE items SET fields = '{text}' WHERE n = 7" for text in ("", "{", "[1]", "1", "[" * 9999)),
        *(f"UPDATE items SET fields = '{text}' WHERE n = 7" for text in ('{"a": {"b": 1}}', '{"a": NaN}')),
        *(f"UPDATE items SET fields = {text} WHERE n = 7" for text in ("x'00ff'", "CAST(x'ff' AS TEXT)")),
        "UPDATE items SET text = CAST(x'ff' AS TEXT) WHERE n = 7",
        "UPDATE items SET text = x'00', content_hash = x'00' WHERE n = 7",
        *(f"UPDATE items SET {column} WHERE n = 7" for column in ("id = x'00'", "id = ''", "modality = 'video'")),
        *(f"UPDATE sqlite_sequence SET seq = {value}" for value in ("'many'", 9223372036854775807, 3)),
    ):
        (tmp_path / "index.sqlite").write_bytes(whole_file)
        damage(tmp_path, change)
        messages = use_all(tmp_path)
        assert messages and not any("repeat the call" in message or "disk" in message for message in messages), (change, messages)
        for log in tmp_path.glob("*-*"):
            log.unlink()


def test_logs_and_folders_in_the_way_are_named(tmp_path: Path, whole_file: bytes) -> None:
    path = tmp_path / "index.sqlite"
    for name, data in (("-wal", b"foreign" * 999), ("-shm", b"foreign" * 9999), ("-journal", b"foreign" * 999)):
        path.write_bytes(whole_file)
        (tmp_path / f"index.sqlite{name}").write_bytes(data)
        with opened(tmp_path, dim=8, create=False) as index:  # a log without a valid header holds nothing
            assert len(index.search(VECTORS[:1], 99)[0]) == 60
    path.write_bytes(whole_file)
    (tmp_path / "index.sqlite-wal").mkdir()
    with pytest.raises(StoreError, match=r"index\.sqlite.*check its folder and rights"), opened(tmp_path, dim=8) as index:
        index.search(VECTORS[:1], 9)
    (tmp_path / "folder" / "index.sqlite").mkdir(parents=True)
    with pytest.raises(StoreError, match="there is no index at"):
        opened(tmp_path / "folder", create=False)
    with pytest.raises(StoreError, match=r"index\.sqlite.*check its folder and rights"):
        opened(tmp_path / "folder")
    for folder, create in itertools.product((path, tmp_path / ("n" * 300), tmp_path / "nul\0"), (False, True)):
        with pytest.raises(StoreError, match=r"choose another|there is no index"):
            opened(folder, create=create)
