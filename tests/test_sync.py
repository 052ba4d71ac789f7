"""An index kept in step with folders: every kind of change, roots and prefixes, disks that are gone, kills at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder, vector_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from PIL import Image

from traceir.cli import index_verbs
from traceir.cli.main import main
from traceir.collection import roots
from traceir.collection import sync as sync_module
from traceir.collection.ingest import add
from traceir.collection.sources import FILE_FIELD, STAT_FIELD
from traceir.collection.sync import SyncReport, sync, sync_paths
from traceir.collection.watch import watch
from traceir.errors import InputError, TraceError
from traceir.index import SqliteIndex, open_index
from traceir.items import Item

Command = Callable[..., tuple[int, str, str]]


def opened(folder: Path) -> SqliteIndex:
    return open_index(folder, FakeEncoder(), create=True)


def paint(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


class Syncing:
    """A folder `f`, an index, and `sync` of one into the other."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder, self.encoder = home, home / "f", FakeEncoder()
        self.folder.mkdir()
        self.index = opened(home / "index")

    def __call__(self, *folders: Path, **options: Any) -> SyncReport:
        self.encoder.encoded.clear()
        options = {"batch": 4, "progress": False} | options
        return sync(folders or [self.folder], self.index, self.encoder, **options)

    def counts(self, *folders: Path, **options: Any) -> dict[str, int]:
        """What a run did, without zeros; `encoded` is how many contents were."""
        report = self(*folders, **options)
        counts = {name: getattr(report, name) for name in ("added", "updated", "renamed", "removed", "skipped")}
        counts |= {"failed": len(report.failed), "encoded": len(set(self.encoder.encoded))}
        return {name: count for name, count in counts.items() if count}

    def ids(self) -> list[str]:
        return [stored.id for stored in self.index.scan()]

    def check(self, *tops: Path) -> None:
        """The index equals the folders: ids, paths, hashes, vectors."""
        check_equal(
            self.index, {f"{path.relative_to(top).as_posix()}": path for top in tops or [self.folder] for path in pictures(top)}
        )


def pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.png") if ".hidden" not in path.parts]


def check_equal(index: SqliteIndex, truth: dict[str, Path]) -> None:
    kept = {stored.id: stored for stored in index.scan(with_vectors=True)}
    assert kept.keys() == truth.keys()
    for id, path in truth.items():
        hash = Item.of(image=path).content_hash()
        assert (kept[id].content_hash, kept[id].fields[FILE_FIELD], kept[id].image) == (hash, str(path), str(path))
        np.testing.assert_array_equal(kept[id].vector, vector_of(hash, 16))


@pytest.fixture
def into(tmp_path: Path) -> Iterator[Syncing]:
    syncing = Syncing(tmp_path.resolve())
    with syncing.index:
        yield syncing


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as written long ago."""
    monkeypatch.setattr(roots, "FINE_NS", 0)
    monkeypatch.setattr(roots, "COARSE_NS", 0)


def test_every_change_to_a_folder_is_followed_and_nothing_known_is_encoded_again(into: Syncing) -> None:
    folder = into.folder
    for number, name in enumerate(("a", "b", "c", "sub/d", "sub/e", "Case")):
        paint(folder / f"{name}.png", number)
    paint(folder / ".hidden" / "x.png", 50)
    (folder / "film.xyz").write_bytes(b"x")
    report = into()
    assert (report.added, len(into.encoder.encoded)) == (6, 6) and "1 .xyz" in report.notes[0].what
    into.check()
    assert into.counts() == {"skipped": 6}
    for old, new in (("a", "aside"), ("b", "a"), ("aside", "b")):  # exchanged
        (folder / f"{old}.png").rename(folder / f"{new}.png")
    assert into.counts() == {"updated": 2, "skipped": 4}
    into.check()
    (folder / "sub").rename(folder / "other")
    (folder / "Case.png").rename(folder / "case.png")
    assert into.counts() == {"renamed": 3, "skipped": 3}
    into.check()
    shutil.copy(folder / "c.png", folder / "copy.png")
    paint(folder / "a.png", 60)
    (folder / "b.png").unlink()
    paint(folder / "new.png", 61)
    assert into.counts() == {"added": 2, "updated": 1, "removed": 1, "skipped": 4, "encoded": 2}
    into.check()
    names = sorted(pictures(folder))
    for path in names:
        path.rename(path.with_suffix(".tmp"))
    for path, following in zip(names, [*names[1:], names[0]], strict=True):  # each has the name of the one after it
        path.with_suffix(".tmp").rename(following)
    assert into.counts() == {"updated": 7}
    into.check()


def test_a_vector_that_is_not_there_any_more_is_made_again(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "_SPARE_BYTES", 0)  # vectors that are overwritten are not kept for those to come
    one, other, aside = paint(into.folder / "a.png", 1), paint(into.folder / "b.png", 2), into.folder / "aside"
    into()
    one.rename(aside), other.rename(one), aside.rename(other)
    assert into.counts(batch=1) == {"updated": 2, "encoded": 1}
    into.check()


def test_a_run_that_finds_nothing_to_do_opens_no_file_and_writes_nothing(
    into: Syncing, old: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        paint(into.folder / f"{number}.png", number)
    into()
    version = into.index.version()
    os.utime(into.folder / "0.png", ns=(1, 1))
    assert into.counts() == {"skipped": 5} and into.index.version() != version  # the stat that is kept
    version = into.index.version()
    monkeypatch.setattr(sync_module, "sources_of_file", None)
    monkeypatch.setattr(sync_module, "process", None)
    assert into.counts() == {"skipped": 5} and into.index.version() == version


def test_a_file_that_changes_within_the_tick_of_its_clock_is_read_again(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    for tick in ("FINE_NS", "COARSE_NS"):
        monkeypatch.setattr(roots, tick, 600 * 10**9)
    path = paint(into.folder / "a.png", 1)
    into()
    assert into.index.get(["a.png"])["a.png"].fields[STAT_FIELD] == f"{path.stat().st_size}:"
    paint(path, 2)
    into()
    into.check()


def test_a_subfolder_doubles_nothing_and_a_parent_takes_its_folders_in(into: Syncing) -> None:
    for number, name in enumerate(("x/a.png", "x/y/b.png", "z/a.png")):
        paint(into.folder / name, number)
    x, y = into.folder / "x", into.folder / "x" / "y"
    assert into.counts(x) == {"added": 2, "encoded": 2}
    assert into.counts(y) == {"skipped": 1}
    assert add([y, y / "b.png"], into.index, into.encoder, progress=False).skipped == 2
    paint(y / "c.png", 9)
    assert add([y], into.index, into.encoder, progress=False).added == 1
    assert into.ids() == ["a.png", "y/b.png", "y/c.png"] and into.counts(x)["skipped"] == 3
    paint(into.folder / "a.png", 8)  # which has the id that x/a.png had
    assert into.counts(into.folder) == {"added": 2, "updated": 1, "renamed": 2, "encoded": 2}
    into.check()
    assert json.loads(str(into.index.note("roots"))) == [{"folder": str(into.folder), "prefix": ""}]
    assert into.counts(x, prefix="mine") == {"renamed": 3}  # now a root of its own
    assert into.ids() == ["a.png", "mine/a.png", "mine/y/b.png", "mine/y/c.png", "z/a.png"]
    assert into.counts(into.folder) == {"skipped": 5}


def test_of_two_cards_one_needs_a_prefix(into: Syncing) -> None:
    one, two = into.home / "one", into.home / "two"
    paint(one / "IMG_1.png", 1), paint(two / "IMG_1.png", 2)
    into(one)
    notes, version = into.index.note("roots"), into.index.version()
    with pytest.raises(InputError, match=r"IMG_1.png, which already|--prefix NAME"):
        into(two)
    assert (into.index.note("roots"), into.index.version()) == (notes, version)
    assert into.counts(two, prefix="two") == {"added": 1, "encoded": 1}
    assert sync([], into.index, into.encoder, progress=False).skipped == 2 and into.ids() == ["IMG_1.png", "two/IMG_1.png"]
    with pytest.raises(InputError, match=r"/b/x.png has the id 'x.png'"):
        into(paint(into.home / "a" / "x.png", 1).parent, paint(into.home / "b" / "x.png", 2).parent)


def test_what_was_not_made_from_files_of_the_folder_is_left_alone(into: Syncing, tmp_path: Path) -> None:
    paint(into.folder / "a.png", 1), paint(tmp_path / "other" / "b.png", 2)
    lines = into.folder / "lines.jsonl"
    lines.write_text(json.dumps({"id": "line", "text": "words"}) + "\n")
    add([lines, tmp_path / "other"], into.index, into.encoder, progress=False)
    into.index.upsert([Item.of(text="by a server", id="a.png")], np.eye(1, 16, dtype=np.float32))
    with pytest.raises(InputError, match="an item that was not made from a file"):
        into()
    into.index.delete(["a.png"])
    assert into.counts() == {"added": 1, "encoded": 1}
    lines.unlink()
    paint(into.folder / "c.png", 3)
    into.index.upsert([Item.of(text="by a server", id="c.png")], np.eye(1, 16, dtype=np.float32))
    assert into.counts() == {"failed": 1, "skipped": 1}
    assert into.ids() == ["a.png", "b.png", "c.png", "line"] and into.index.get(["c.png"])["c.png"].text == "by a server"


def test_a_disk_that_is_not_mounted_empties_nothing(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "MOST_LOST", 2)
    for number in range(6):
        paint(into.folder / f"{number}.png", number)
    into()
    away = into.home / "away"
    into.folder.rename(away)
    with pytest.raises(InputError, match="not a folder that is there"):
        into()
    report = sync([], into.index, into.encoder, progress=False)
    assert "is not there" in report.failed[0].reason and into.index.count() == 6
    into.folder.mkdir()
    for left, removed in ((0, 0), (1, 0), (3, 3)):  # all, more than half, half
        for path in list(pictures(away))[: left - len(pictures(into.folder))]:
            path.rename(into.folder / path.name)
        report = into()
        assert report.removed == removed and bool(report.failed) == (not removed)
    assert into.counts(allow_empty=True) == {"skipped": 3}
    shutil.rmtree(into.folder)
    report = into(allow_empty=True)
    assert report.removed == 3 and "forgotten" in report.notes[-1].what and into.index.count() == 0
    with pytest.raises(InputError, match="no folder to be kept in step"):
        sync([], into.index, into.encoder, progress=False)


def test_a_root_that_has_moved_keeps_its_vectors(into: Syncing) -> None:
    for number in range(4):
        paint(into.folder / f"{number}.png", number)
    into()
    moved = into.home / "moved"
    into.folder.rename(moved)
    with pytest.raises(InputError, match="which already belongs"):  # not where most are other pictures
        other = into.home / "other"
        for number in range(4):
            Image.new("RGB", (9, 9)).save(paint(other / f"{number}.png", 0))
        into(other)
    Image.new("RGB", (9, 9)).save(moved / "3.png")
    report = into(moved)
    assert report.updated == 3 and into.encoder.encoded == [] and into.index.count() == 4
    assert [failure.location for failure in report.failed] == [str(moved / "3.png")]
    assert "f/3.png" in report.failed[0].reason
    assert main(["index", "rm", "--index", str(into.home / "index"), "--folder", str(into.folder)]) == 0
    assert into.counts(moved) == {"added": 1, "skipped": 3, "encoded": 1}
    into.check(moved)


def test_what_cannot_be_read_is_told_each_time_and_read_again_only_when_it_has_changed(
    into: Syncing, old: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(into.folder / "good.png", 1), paint(into.folder / "cut.png", 2)
    into()
    for name in ("cut.png", "bad.png"):
        (into.folder / name).write_bytes(b"no picture")
    first = into().failed
    assert {Path(failure.location).name for failure in first} == {"bad.png", "cut.png"} and into.ids() == ["cut.png", "good.png"]
    with monkeypatch.context() as patch:
        patch.setattr(sync_module, "sources_of_file", None)
        assert into().failed == first
        patch.setattr("traceir.collection.failures.OPTIONAL", ("json",))  # what reads more files
        with pytest.raises(TypeError):
            into()
    paint(into.folder / "bad.png", 3)
    (into.folder / "cut.png").unlink()
    assert into.counts() == {"added": 1, "removed": 1, "skipped": 1, "encoded": 1}
    into.check()
    assert into().failed == []


def test_of_a_folder_that_cannot_be_looked_into_all_stays(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(into.folder / "a.png", 1), paint(into.folder / "shut" / "b.png", 2)
    into()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = into()
    assert "check its rights" in report.failed[0].reason and into.ids() == ["a.png", "shut/b.png"]


def test_a_file_of_many_items_is_complete_or_read_again(into: Syncing, old: None) -> None:
    path = into.folder / "long.txt"
    path.write_text("\n\n".join(f"Passage {number}. " + f"word{number} " * 400 for number in range(12)))
    encode, calls = FakeEncoder.encode_items, 0

    def stop(items: Any) -> Any:
        nonlocal calls
        if (calls := calls + 1) == 3:
            raise KeyboardInterrupt
        return encode(into.encoder, items)

    into.encoder.encode_items = stop
    with pytest.raises(KeyboardInterrupt):
        into(batch=2)
    partly = into.index.count()
    into(batch=2)
    whole = into.index.count()
    assert 0 < partly < whole and {stored.fields[STAT_FIELD] for stored in into.index.scan()} == {sync_module_stat(path)}
    assert into.counts() == {"skipped": whole}
    path.write_text("a short text now")
    assert into.counts() == {"added": 1, "removed": whole, "encoded": 1} and into.ids() == ["long.txt"]


def sync_module_stat(path: Path) -> str:
    return roots.stat_text(path.stat())


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(into: Syncing) -> None:
    for name in ("sub/a", "sub/deep/b", "c.png/d", "e"):
        paint(into.folder / f"{name}.png", len(name))
    into()
    shutil.rmtree(into.folder / "sub")
    (into.folder / "sub").write_text("no folder")
    (into.folder / "e.png").unlink()
    paint(into.folder / "e.png" / "f.png", 21)
    shutil.rmtree(into.folder / "c.png")
    paint(into.folder / "c.png", 20)
    assert into.counts() == {"added": 2, "removed": 4, "encoded": 2}
    assert into.ids() == ["c.png", "e.png/f.png"]


def test_a_pipe_is_told_and_never_waited_for(into: Syncing) -> None:
    for suffix in ("png", "txt", "pdf", "mp4"):
        os.mkfifo(into.folder / f"pipe.{suffix}")
    for _ in range(2):
        assert {failure.reason.partition(";")[0] for failure in into().failed} >= {"it is not a regular file"}
    pipe = str(into.folder / "pipe.txt")
    (failure,) = sync_paths([pipe], into.index, into.encoder).failed
    assert failure.location == pipe and failure.reason.startswith("it is not a regular file")


def test_single_paths_are_synced_without_a_look_at_the_rest(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("a.png", "sub/b.png", "c.png")):
        paint(into.folder / name, number)
    into()
    (into.folder / "sub" / "b.png").rename(into.folder / "d.png")
    (into.folder / "c.png").unlink()
    paths = [str(into.folder / name) for name in ("sub", "d.png", ".git/x.png")]
    report = sync_paths([*paths, "/elsewhere/x.png"], into.index, into.encoder)
    assert (report.renamed, report.removed) == (1, 0) and into.ids() == ["a.png", "c.png", "d.png"]


# The command line


@pytest.fixture
def command(
    into: Syncing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`traceir index VERB --index ...`: exit code, output, messages."""
    monkeypatch.setattr(index_verbs, "open_encoder", lambda args: into.encoder)

    def run(verb: str, *words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["index", verb, "--index", str(into.home / "index"), *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_command_lists_and_removes_what_is_named(into: Syncing, command: Command) -> None:
    for number, name in enumerate(("holiday/a.png", "holiday/b.png", "home/c.png")):
        paint(into.folder / name, number)
    (into.folder / "bad.png").write_bytes(b"x")
    code, out, err = command("sync", into.folder)
    assert (code, out) == (1, "added 3, updated 0, renamed 0, removed 0, unchanged 0, failed 1\n") and "bad.png" in err
    (into.folder / "bad.png").unlink()
    (into.folder / "home" / "c.png").unlink()
    assert command("ls", "--missing")[1].split() == ["home/c.png", "image"]
    described = [json.loads(line) for line in command("ls", "--json", "--sort=-id", "--limit", 2)[1].splitlines()]
    assert [line["id"] for line in described] == ["home/c.png", "holiday/b.png"]
    assert described[1]["file"] == str(into.folder / "holiday/b.png") and "_stat" not in described[1]["fields"]
    assert command("ls", "--folder", into.folder / "holiday", "--where", "id~'*b*'")[1].split() == ["holiday/b.png", "image"]
    assert command("rm")[0] == 2 and command("rm", "--glob", "*")[0] == 2 and into.index.count() == 3
    assert command("rm", "--missing", "--dry-run")[1] == "home/c.png\n" and into.index.count() == 3
    assert command("rm", "--missing")[:2] == (0, "removed 1\n")
    code, out, err = command("rm", "holiday/a.png", "nothing")
    assert (code, out) == (1, "removed 1\n") and "of 1 of them are still there" in err and "not there: nothing" in err
    assert command("sync")[1].startswith("added 1, ")
    assert command("rm", "--folder", into.folder, "--all")[:2] == (0, "removed 2\n")
    code, _, err = command("sync")
    assert code == 2 and "no folder to be kept in step" in err


def test_nothing_to_encode_loads_no_model(into: Syncing, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(into.folder / "a.png", 1)
    into()
    monkeypatch.setattr(index_verbs, "open_encoder", None)
    (into.folder / "a.png").rename(into.folder / "b.png")
    assert command("sync")[0] == 0 and into.ids() == ["b.png"]
    other = FakeEncoder()
    other.fingerprint = "another"
    monkeypatch.setattr(index_verbs, "open_encoder", lambda args: other)
    paint(into.folder / "c.png", 2)
    code, _, err = command("sync")
    assert code == 2 and "was made with model 'fake-1'" in err


# What takes longer: watching, kills, random histories


@pytest.mark.slow
def test_what_happens_is_followed_until_it_is_stopped(into: Syncing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceir.collection.watch.QUIET_S", 0.3)
    paint(into.folder / "a.png", 1)
    into()
    stop, told = threading.Event(), list[SyncReport | TraceError]()
    arguments: dict[str, Any] = {"tell": told.append, "stop": stop}
    thread = threading.Thread(target=watch, args=([str(into.folder)], into.index, into.encoder), kwargs=arguments)
    thread.start()
    try:
        wait_until(lambda: bool(told))
        paint(into.folder / "sub" / "b.png", 2)
        wait_until(lambda: into.ids() == ["a.png", "sub/b.png"])
        (into.folder / "sub").rename(into.folder / "other")
        wait_until(lambda: into.ids() == ["a.png", "other/b.png"])
        (into.folder / "a.png").unlink()
        wait_until(lambda: into.ids() == ["other/b.png"])
        into.folder.rename(into.home / "away")
        wait_until(lambda: any("is not there" in str(getattr(report, "failed", "")) for report in told))
        (into.home / "away").rename(into.folder)
        paint(into.folder / "c.png", 3)
        wait_until(lambda: into.ids() == ["c.png", "other/b.png"])
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    into.check()


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(400):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to be")


@pytest.mark.slow
def test_a_watching_command_ends_well_by_a_signal(into: Syncing) -> None:
    paint(into.folder / "a.png", 1)
    into()
    for kind in (signal.SIGTERM, signal.SIGINT):
        words = [sys.executable, "-m", "traceir", "index", "sync", "--index", str(into.home / "index"), "--watch-every", "0.2"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert "unchanged 1" in process.stdout.readline() and "watching" in process.stdout.readline()
            process.send_signal(kind)
            assert process.wait(30) == 0


NAMES = st.sampled_from([f"{folder}{name}.png" for folder in ("", "x/", "x/y/") for name in "abc"])


class Histories(RuleBasedStateMachine):
    """Random changes to files, syncs, and syncs that end at a random write, before or after it is done."""

    @initialize()
    def begin(self) -> None:
        self.home = Path(tempfile.mkdtemp()).resolve()
        self.into = Syncing(self.home)
        self.is_synced = False

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.into.index.close()
            shutil.rmtree(self.home)

    @rule(name=NAMES, seed=st.integers(0, 5))
    def write(self, name: str, seed: int) -> None:
        paint(self.into.folder / name, seed)
        self.is_synced = False

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        (self.into.folder / name).unlink(missing_ok=True)
        self.is_synced = False

    @rule(old=NAMES, new=NAMES, copied=st.booleans())
    def move(self, old: str, new: str, copied: bool) -> None:
        source, target = self.into.folder / old, self.into.folder / new
        if source.exists() and old != new:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target) if copied else source.rename(target)
            self.is_synced = False

    @rule()
    def exchange_folders(self) -> None:
        x, aside = self.into.folder / "x", self.into.folder / "x-aside"
        if (x / "y").exists():
            (x / "y").rename(aside)
            shutil.rmtree(x)
            aside.rename(x)
            self.is_synced = False

    @rule(top=st.sampled_from(["", "x"]))
    def touch(self, top: str) -> None:
        for path in pictures(self.into.folder / top):
            os.utime(path)

    @rule(batch=st.integers(1, 4))
    def sync(self, batch: int) -> None:
        assert self.into(batch=batch, allow_empty=True).failed == []
        self.is_synced = True

    @rule(after=st.integers(1, 6), is_done=st.booleans(), batch=st.integers(1, 3))
    def be_killed(self, after: int, is_done: bool, batch: int) -> None:
        left = after
        index, plain = self.into.index, {name: getattr(self.into.index, name) for name in ("upsert", "delete", "keep_note")}

        def wrap(name: str) -> Callable[..., Any]:
            def written(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0 and not is_done:
                    raise KeyboardInterrupt
                made = plain[name](*arguments)
                if left == 0:
                    raise KeyboardInterrupt
                return made

            return written

        for name in plain:
            setattr(index, name, wrap(name))
        try:
            with suppress(KeyboardInterrupt):
                self.into(batch=batch, allow_empty=True)
        finally:
            for name in plain:
                delattr(index, name)
        self.is_synced = False

    @invariant()
    def equals(self) -> None:
        if getattr(self, "is_synced", False):
            self.into.check()


TestHistories = pytest.mark.slow(Histories.TestCase)
TestHistories.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
