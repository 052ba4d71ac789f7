"""From paths to an index: every source, bad files beside good ones, running again, and kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder, vector_of
from PIL import Image

from traceir.collection.ingest import AddReport, add
from traceir.collection.records import MAX_TEXT_BYTES
from traceir.collection.sources import FILE_FIELD, STAT_FIELD, Failure, Source, find_sources
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.index import Eq, SqliteIndex, open_index
from traceir.index.sql import read_number
from traceir.items import Item


def opened(folder: Path) -> SqliteIndex:
    return open_index(folder, fingerprint="fake-1", prompt_version="p1", dim=16, create=True)


def paint(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(path)
    return path


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def ids(*paths: Path) -> list[str]:
    return [source.id for source in find_sources(paths) if isinstance(source, Source)]


def failures(*paths: Path) -> dict[str, str]:
    return {source.location: source.reason for source in find_sources(paths) if isinstance(source, Failure)}


def counts(report: AddReport) -> tuple[int, int, int, int]:
    return report.added, report.updated, report.skipped, len(report.failed)


class Adding:
    """An index, and `add` into it."""

    def __init__(self, index: SqliteIndex) -> None:
        self.index, self.encoder = index, FakeEncoder()

    def __call__(self, *paths: Path, batch: int = 4, progress: bool = False) -> AddReport:
        self.encoder.encoded.clear()
        return add(paths, self.index, self.encoder, batch=batch, progress=progress)

    def count(self, *paths: Path) -> tuple[int, int, int, int]:
        return counts(self(*paths))

    def fields(self, id: str) -> dict[str, Any]:
        return dict(self.index.get([id])[id].fields)


@pytest.fixture
def into(tmp_path: Path) -> Iterator[Adding]:
    with opened(tmp_path / "index") as index:
        yield Adding(index)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    root = tmp_path / "gallery"
    for number, name in enumerate(["b.png", "a.JPG", "deep/er/c.webp", "deep/d.gif", "e.bmp", "f.tiff", "g.jpeg"]):
        paint(root / name, 10 * number)
    (root / "deep" / "notes.txt").write_text("a short note", encoding="utf-8")
    (root / "page.md").write_text("# a page", encoding="utf-8")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "table.csv").write_text("1,2")
    return root


def test_what_is_added_has_a_stable_id_can_be_found_and_is_skipped_the_second_time(
    gallery: Path, into: Adding, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ["a.JPG", "b.png", "e.bmp", "f.tiff", "g.jpeg", "page.md", "deep/d.gif", "deep/notes.txt", "deep/er/c.webp"]
    assert ids(gallery) == expected
    with monkeypatch.context() as patch:
        patch.chdir(gallery.parent)
        assert ids(Path("gallery")) == expected and ids(gallery / "b.png") == ["b.png"]
    with pytest.raises(InputError, match="does not exist"):
        ids(gallery / "none")
    assert into.count(gallery) == (9, 0, 0, 0)
    stored = into.index.get(["deep/notes.txt", "b.png"], with_vectors=True)
    assert stored["deep/notes.txt"].text == "a short note" and stored["b.png"].modality == "image"
    assert stored["b.png"].image == str((gallery / "b.png").resolve())
    expected = Item.of(image=ImageInput.open(gallery / "b.png")).content_hash()
    np.testing.assert_array_equal(stored["b.png"].vector, vector_of(expected, 16))
    assert into.count(gallery) == (0, 0, 9, 0) and into.encoder.encoded == []
    paint(gallery / "b.png", 200)
    paint(gallery / "new.png", 201)
    assert into.count(gallery) == (1, 1, 8, 0) and sorted(map(str, into.encoder.encoded)) == ["b.png", "new.png"]


def test_bad_files_are_reported_and_the_rest_goes_on(gallery: Path, into: Adding) -> None:
    whole = (gallery / "b.png").read_bytes()
    bad = {"cut.png": whole[:-20], "empty.jpg": b"", "words.gif": b"words", "blank.txt": b" \n", "latin.txt": b"caf\xe9",
           "wide.txt": "words".encode("utf-16")}  # fmt: skip
    for name, data in bad.items():
        (gallery / name).write_bytes(data)
    report = into(gallery)
    reasons = {Path(failure.location).name: failure.reason for failure in report.failed}
    assert counts(report) == (9, 0, 0, 6) and set(reasons) == set(bad)
    assert "not an image" in reasons["words.gif"] and "UTF-8" in reasons["latin.txt"] and "is UTF-16" in reasons["wide.txt"]
    assert into.count(gallery) == (0, 0, 9, 6)
    (gallery / "cut.png").write_bytes(whole)
    assert into.count(gallery) == (1, 0, 9, 5)


def test_lines_with_text_image_and_fields(gallery: Path, into: Adding) -> None:
    path = lines(
        gallery / "items.jsonl",
        {"id": "one", "text": "words", "year": 1999, "ok": True, "by": None, "file": "a.pdf", "tags": ["red", "blue", 5, None]},
        {"id": 2, "image": "deep/d.gif"},
        {"id": "three", "text": "both", "image": "a.JPG", "modality": "image,text"},
        "",
        {"id": "taken", "text": "x", FILE_FIELD: "/etc/passwd"},
    )
    report = into(path)
    assert counts(report) == (3, 0, 0, 1) and repr(FILE_FIELD) in report.failed[0].reason
    stored = into.index.get(["one", "2", "three"])
    assert into.fields("one") == {"year": 1999, "ok": True, "by": None, "file": "a.pdf", "tags": ["red", "blue", 5, None]}
    assert [row.id for row in into.index.scan(Eq("tags", "blue"))] == ["one"]
    assert stored["2"].image == str((gallery / "deep/d.gif").resolve())
    assert [stored[id].modality for id in ("one", "2", "three")] == ["text", "image", "image,text"]
    for fields in ({"year": 1999, "tags": ["red"]}, {"year": 1999.0, "tags": ["red"]}):
        lines(path, {"id": "one", "text": "words", **fields})
        assert into.count(path) == (0, 1, 0, 0) and into.encoder.encoded == []  # a changed field alone costs no encoding
        assert into.fields("one") == fields
    file = gallery / "a.JPG"  # as an index of an older release keeps it
    into.index.upsert([Item.of(image=file, id="a.JPG", fields={"file": str(file)})], np.eye(1, 16, dtype=np.float32))
    assert into.count(file) == (0, 1, 0, 0)
    fields = into.fields("a.JPG")
    assert str(fields.pop(STAT_FIELD)).startswith(f"{file.stat().st_size}:")
    assert fields == {FILE_FIELD: str(file.resolve()), "width": 8, "height": 8}


BAD_LINES: list[tuple[Any, str]] = [
    ("{broken", "not JSON"),
    ("[1]", "not a JSON object"),
    ({"text": "x"}, "id None is missing"),
    ({"id": True, "text": "x"}, "missing"),
    ({"id": "empty"}, "empty"),
    ({"id": "list", "text": "x", "tags": [[1]]}, "tags"),
    ({"id": "object", "text": "x", "meta": {"a": 1}}, "meta"),
    ({"id": "number", "text": 5}, "text of 'number' is 5"),
    ({"id": "gone", "image": "none.png"}, "does not exist"),
    ({"id": "far", "image": "http://a.example/x.png"}, "address"),
    ({"id": "nan", "text": "x", "n": float("nan")}, "finite"),
    ({"id": "half", "text": "\ud800"}, "Unicode"),
    ({"id": "odd", "image": "\ud800.png"}, "file name"),
    ({"id": "wrong", "text": "x", "modality": "image"}, "says it is 'image'"),
    ('{"id": "digits", "text": "x", "n": ' + "9" * 5000 + "}", "cannot be read"),
    ({"did": "1:1", "txt": None, "img_path": "mbeir_images/none.jpg", "modality": "image"}, "unpack the images"),
]


def test_bad_lines_are_named_and_a_file_of_none_is_said_once(tmp_path: Path, into: Adding) -> None:
    path = lines(tmp_path / "items.jsonl", *(line for line, _ in BAD_LINES), {"id": "good", "text": "x"})
    report = into(path)
    assert counts(report) == (1, 0, 0, len(BAD_LINES))
    reasons = {failure.location: failure.reason for failure in report.failed}
    for number, (_, reason) in enumerate(BAD_LINES, start=1):
        assert reason in reasons[f"{path}:{number}"]
    whole = [b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n', b"\r\n", b"# no comment\n"]
    long = b'{"id": "long", "text": "' + b"y" * (2 * MAX_TEXT_BYTES + 9) + b'"}\n'
    path.write_bytes(b"".join([*whole, long, b'{"id": "b", "text": "z"}']))
    assert ids(path) == ["a", "b"] and [location.rpartition(":")[2] for location in failures(path)] == ["3", "4"]
    assert "longer than" in failures(path)[f"{path}:4"]
    for data, why in (
        (json.dumps([{"id": "a", "text": "x"}], indent=2).encode(), "one JSON text over many lines"),
        (b'{\n"id": "a"}', "one JSON text over many lines"),
        ('{"id": "a", "text": "x"}\n'.encode("utf-16"), "UTF-16"),
        (b'[{"id": "a", "text": "x"}]', "not a JSON object but a list"),
        (b"\n \n", "holds no lines"),
    ):
        path.write_bytes(data)
        (reason,) = failures(path).values()
        assert why in reason


def test_a_pool_of_mbeir_finds_its_images_from_the_root(tmp_path: Path, into: Adding, monkeypatch: pytest.MonkeyPatch) -> None:
    root, image = tmp_path / "M-BEIR", "mbeir_images/x_images/a.jpg"
    paint(root / image, 5)
    pool = lines(
        root / "cand_pool" / "local" / "mbeir_x_task0_cand_pool.jsonl",
        {"txt": None, "img_path": image, "modality": "image", "did": "9:1", "src_content": None},
        {"txt": "words", "img_path": None, "modality": "text", "did": "9:2", "src_content": None},
        {"txt": "w", "img_path": image, "modality": "text,image", "did": "9:3"},
        {"txt": "w", "img_path": None, "modality": "image,text", "did": "9:4"},
    )
    monkeypatch.chdir(root)
    report = into(pool.relative_to(root))
    assert counts(report) == (3, 0, 0, 1) and "9:4" in report.failed[0].reason
    stored = into.index.get(["9:1", "9:2", "9:3"])
    assert [row.modality for row in stored.values()] == ["image", "text", "image,text"]
    assert stored["9:1"].image == str((root / image).resolve())


def test_of_one_id_the_first_source_counts(tmp_path: Path, into: Adding) -> None:
    first, second = paint(tmp_path / "one" / "a.png", 1), paint(tmp_path / "two" / "a.png", 2)
    with pytest.raises(InputError, match="does not exist"):
        into(first.parent, tmp_path / "none", batch=1)
    assert into.index.count() == 0
    report = into(first.parent, second.parent, batch=1)
    assert counts(report) == (1, 0, 0, 1)
    assert re.search(r"'a\.png' is given twice.*one/a\.png.*two/a\.png", report.failed[0].reason)
    records = [*({"id": id, "text": text} for id, text in ("x1", "y2", "x3", "24")), {"id": 2, "text": "5"}]
    twice = lines(tmp_path / "t.jsonl", *records)
    for batch, expected in ((1, (3, 0, 0, 2)), (64, (0, 0, 3, 2))):
        report = into(twice, batch=batch)
        assert counts(report) == expected and [failure.location[-2:] for failure in report.failed] == [":3", ":5"]
        assert re.search(r"t\.jsonl:1 and .*t\.jsonl:3", report.failed[0].reason)
    assert into.index.get(["x"])["x"].text == "1"
    assert into.count(first, first.parent, tmp_path / "one" / "." / "a.png") == (0, 0, 3, 0)
    assert into.count(twice, twice)[2:] == (6, 4)
    report = into(second.parent)
    assert counts(report) == (0, 0, 0, 1) and "already belongs to" in report.failed[0].reason
    first.unlink()
    assert into.count(second.parent) == (0, 1, 0, 0)


def test_what_a_folder_leaves_out_is_counted_by_suffix_and_a_named_file_is_judged_by_what_it_holds(
    tmp_path: Path, into: Adding
) -> None:
    root, empty, hidden = tmp_path / "phone", tmp_path / "empty", tmp_path / "hidden"
    for folder in (root, empty, hidden / ".git"):
        folder.mkdir(parents=True)
    for name in ("1.psd", "2.PSD", "a.m4a", "table.csv", "more.jsonl", "README", ".hidden"):
        (root / name).write_bytes(b"x")
    (root / "link").symlink_to(tmp_path, target_is_directory=True)
    report = into(root, empty, hidden)
    assert counts(report) == (0, 0, 0, 3) and report.notes == []
    reason, of_empty, of_hidden = (failure.reason for failure in report.failed)
    left_out = "2 .psd, 1 without a suffix, 1 .csv, 1 .jsonl, 1 .m4a, 1 linked folder"
    for part in (f"({left_out}, 1 hidden)", ".jpg", ".txt", "convert images", "sound is not read", "and .csv where"):
        assert part in reason
    assert "it is empty" in of_empty and "1 hidden" in of_hidden
    data = paint(root / "sub" / "one.PNG", 3).read_bytes()
    report = into(root, progress=True)
    assert counts(report) == (1, 0, 0, 0) and [note.what.partition(";")[0] for note in report.notes] == [f"left out: {left_out}"]
    good = [tmp_path / name for name in ("photo.heic", "photo", "photo.jpg", "PHOTO.TIFF")]  # a file that is named is read
    bad = [tmp_path / name for name in ("real.heic", "table.csv", "clip.mp4", "paper.pdf", "sheet.xlsx", "nothing", "cut.jpg")]
    for path in (*good, *bad):
        path.write_bytes(data if path in good else b"no image")
    report = into(*good, *bad)
    assert counts(report) == (4, 0, 0, 7) and {failure.location for failure in report.failed} == set(map(str, bad))
    assert "no column `id`" in failures(tmp_path / "table.csv")[str(tmp_path / "table.csv")]


def test_a_folder_without_rights_fails_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "open" / "a.png", 1)
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # whoever runs the tests may have every right
    for folder in (tmp_path, tmp_path / "shut"):
        assert "check its rights" in failures(folder)[str(tmp_path / "shut")]


def test_a_line_without_text_is_known_by_its_title(tmp_path: Path, into: Adding) -> None:
    paint(tmp_path / "p.png", 1)
    path = lines(
        tmp_path / "t.jsonl",
        {"id": "a", "title": "a red door", "shelf": 3},
        {"id": "b", "text": " ", "caption": "a cup", "title": "no"},
        {"id": "c", "image": "p.png", "title": "stays a field"},
        {"id": "d", "title": "", "name": 5},
    )
    report = into(path)
    assert counts(report) == (3, 0, 0, 1) and "is empty" in report.failed[0].reason
    assert [row.text for row in into.index.get(["a", "b", "c"]).values()] == ["a red door", "a cup", None]
    assert into.fields("a") == {"title": "a red door", "shelf": 3}
    title_taken = "it has no `text`: its `{}` was taken"
    assert [(note.location[-2:], note.what) for note in report.notes] == [
        (":1", title_taken.format("title")),
        (":2", title_taken.format("caption")),
    ]


def test_a_text_stays_where_its_image_cannot_be_used(tmp_path: Path, into: Adding) -> None:
    cut = paint(tmp_path / "cut.png", 1)
    cut.write_bytes(cut.read_bytes()[:-20])
    bad = ["none.png", "cut.png", "http://a.example/x.png"]
    path = lines(
        tmp_path / "t.jsonl",
        *({"id": f"{n}", "text": f"words {n}", "image": image, "n": n} for n, image in enumerate(bad)),
        {"id": "stated", "text": "words", "image": "none.png", "modality": "image,text"},
        {"id": "alone", "image": "none.png"},
    )
    for expected in ((3, 0, 0, 2), (0, 0, 3, 2)):
        report = into(path)
        assert counts(report) == expected and [failure.location[-2:] for failure in report.failed] == [":4", ":5"]
        assert sorted(note.location[-2:] for note in report.notes) == [":1", ":2", ":3"]
        assert all("its text alone" in note.what for note in report.notes)
    kept = into.index.get(["0", "1", "2"]).values()
    assert [(row.text, row.modality, dict(row.fields)) for row in kept] == [(f"words {n}", "text", {"n": n}) for n in range(3)]
    paint(tmp_path / "none.png", 7)
    assert into.count(path) == (2, 1, 2, 0) and into.index.get(["0"])["0"].modality == "image,text"


def test_batches_commit_as_they_go(tmp_path: Path, into: Adding, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "t.jsonl", *({"id": f"{n}", "text": f"t{n}"} for n in range(10)))
    plain, encoder = FakeEncoder.encode_items, into.encoder

    def stop(items: Any) -> Any:
        if encoder.calls == 2:
            raise KeyboardInterrupt
        return plain(encoder, items)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode_items", stop)
        with pytest.raises(KeyboardInterrupt):
            into(path)
    assert into.index.count() == 8 and into.count(path) == (2, 0, 8, 0)
    with pytest.raises(InputError, match="batch is 0"):
        into(path, batch=0)


CHILD = """
import sys
from fakes import FakeEncoder
from traceir.index import open_index
from traceir.collection.ingest import add

source, folder = sys.argv[1:]
with open_index(folder, fingerprint="fake-1", prompt_version="p1", dim=16, create=True) as index:
    add([source], index, FakeEncoder(delay=0.004), batch=8, progress=False)
"""


@pytest.mark.slow
def test_kill_nine_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")]))
    texts = {f"n{n:03d}": f"thing {n}" for n in range(320)}
    source = lines(tmp_path / "t.jsonl", *({"id": id, "text": text} for id, text in texts.items()))
    randomness, kept, kills = random.Random(5), 0, 0
    with opened(tmp_path / "index") as index:
        while kept < len(texts):
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(tmp_path / "index")])
            while index.count() == kept and child.poll() is None:  # so that it dies at work, not while Python starts
                time.sleep(0.001)
            time.sleep(randomness.uniform(0.0, 0.02))
            child.kill()
            assert child.wait(60) in (0, -signal.SIGKILL)
            kills += child.returncode != 0
            before, rows = kept, list(index.scan(with_vectors=True))
            kept = len(rows)
            assert kept > before and kept % 8 == 0 and {row.id: row.text for row in rows}.items() <= texts.items()
            for row in rows:
                np.testing.assert_array_equal(row.vector, vector_of(Item.of(text=row.text).content_hash(), 16))
            sizes = {read_number(index._connection, f"SELECT count(*) FROM {table}") for table in ("items", "vectors")}
            assert sizes == {kept} and index._connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert kills >= 3
