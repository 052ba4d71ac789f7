"""The same index from `add` and from two workers on Ray, also where a worker is killed midway."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import published
import pytest
from fakes import FakeEncoder
from PIL import Image
from test_ingest import counts, lines, opened

from traceir.cli.main import main
from traceir.collection.ingest import AddReport, add
from traceir.collection.ingest_cluster import MOST_STARTS, ItemWorker, add_on_ray, describe_encoder
from traceir.collection.sources import find_batches, find_sources
from traceir.errors import InputError, ModelError
from traceir.index import SqliteIndex, open_index
from traceir.items import Encoding, Item
from traceir.library import load_encoder
from traceir.ray_session import Share, on_ray
from traceir.retrieval.search import EncoderLike

TESTS = Path(__file__).parent
PATHS = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for the tests of this file; its workers find the encoders below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([PATHS, os.environ.get("PYTHONPATH", "")]))
        patch.delenv("RAY_ADDRESS", raising=False)
        with on_ray(2, Share()):
            yield


on_workers = [pytest.mark.slow, pytest.mark.usefixtures("ray")]


class Deadly(FakeEncoder):
    """Kills its process at the item called `at`, as often as there are files below `lives` to use up."""

    def __init__(self, at: str, lives: Path) -> None:
        super().__init__()
        self.at, self.lives = at, lives

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        left = sorted(self.lives.iterdir())
        if left and any(item.id == self.at for item in items):
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_items(items)


class Foreign(FakeEncoder):
    fingerprint = "fake-2"


def broken() -> EncoderLike:
    raise ModelError("the weights of this invented model are gone")


def many(path: Path, count: int) -> Path:
    return lines(path, *({"id": f"n{n:03d}", "text": f"thing {n}"} for n in range(count)))


def rows(index: SqliteIndex) -> list[tuple[Any, ...]]:
    """All that an index keeps, vectors bit for bit."""
    stored = index.scan(with_vectors=True)
    return [(row.id, row.modality, row.text, row.image, dict(row.fields), row.vector.tobytes()) for row in stored]


def on_two_workers(paths: Sequence[Path], index: SqliteIndex, make_encoder: Any = FakeEncoder, batch: int = 4) -> AddReport:
    return add_on_ray(paths, index, make_encoder, workers=2, batch=batch, progress=False)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Images, texts and lines, one in three of them bad in some way."""
    root = tmp_path / "shelf"
    (root / "deep").mkdir(parents=True)
    for number in range(9):
        Image.new("RGB", (8, 8), (20 * number, 0, 99)).save(root / f"p{number}.png")
        (root / "deep" / f"t{number}.txt").write_text(f"note {number}", encoding="utf-8")
    (root / "cut.png").write_bytes((root / "p1.png").read_bytes()[:-20])
    (root / "words.gif").write_text("words")
    (root / "deep" / "blank.txt").write_text(" \n")
    (root / "deep" / "ünï.txt").write_text("Ærø 日本", encoding="utf-8")
    good = [{"id": f"both {n}", "text": f"pair {n}", "image": f"p{n}.png", "year": 1990 + n, "by": [n, "x"]} for n in range(6)]
    bad = [{"id": "gone", "image": "none.png"}, {"id": "odd", "text": "\ud800"}, {"text": "no id"}, {"id": "empty"}]
    more = [{"id": "both 0", "text": "again"}, {"id": "titled", "title": "x"}, {"id": "kept", "text": "w", "image": "none.png"}]
    records = "".join(json.dumps(record) + "\n" for record in [*good, *bad, *more])
    (root / "lines.jsonl").write_text("{broken\n" + records, encoding="utf-8")
    return root


def test_a_worker_answers_with_what_an_index_keeps(shelf: Path, tmp_path: Path) -> None:
    (batch,) = find_batches(find_sources([shelf / "lines.jsonl"]), 64)
    with opened(tmp_path / "index") as index:
        info = index.info()
    encoded, moved, rest = ItemWorker(FakeEncoder, info).process(batch.sources, {})
    assert [stored.id for stored, _ in encoded] == [f"both {n}" for n in range(6)] + ["titled", "kept"] and not moved
    assert len(rest.rest.failed) == 3 and len(rest.rest.notes) == 2 and not rest.encoded
    known = {stored.id: stored for stored, _ in encoded}
    assert ItemWorker(broken, info).process(batch.sources, known)[2].rest.skipped == 8, "nothing is new, so no encoder is made"
    for make_encoder, why in ((Foreign, "with model 'fake-1' but 'fake-2' is in use"), (broken, "invented model are gone")):
        with pytest.raises(ModelError, match=rf"a worker stopped: .*{why}"):
            ItemWorker(make_encoder, info).process(batch.sources, {})


def test_what_cannot_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = many(tmp_path / "t.jsonl", 3)
    with opened(tmp_path / "index") as index:
        for wrong, why in (({"workers": 0}, "workers is 0"), ({"batch": 0}, "batch is 0")):
            with pytest.raises(InputError, match=why):
                add_on_ray([source], index, FakeEncoder, **{"workers": 1, **wrong})
    words = ["index", "add", str(source), "--index", str(tmp_path / "three"), "--workers", "2"]
    assert main([*words, "--device", "cuda:1"]) == 2 and "--device cuda" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words) == 2 and "pip install 'traceir[cluster]'" in capsys.readouterr().err


class TestOnWorkers:
    pytestmark = on_workers

    def test_two_workers_fill_an_index_as_one_process_does(
        self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("traceir.collection.roots.FINE_NS", 0)  # how new a file is plays no part
        paths = [shelf, shelf / "lines.jsonl"]
        with opened(tmp_path / "one") as alone, opened(tmp_path / "two") as two:
            for expected in ((27, 0, 0, 9), (0, 3, 24, 8)):
                report = add(paths, alone, FakeEncoder(), batch=4, progress=False)
                assert counts(report) == expected and len(report.notes) == 3
                assert on_two_workers(paths, two) == report and rows(two) == rows(alone)
                (shelf / "p3.png").write_bytes((shelf / "p4.png").read_bytes())  # new content, also of the line `both 3`
                (shelf / "cut.png").unlink(missing_ok=True)
                changed = (shelf / "lines.jsonl").read_text("utf-8").replace("1990", "2020")  # a field alone, of `both 0`
                (shelf / "lines.jsonl").write_text(changed, encoding="utf-8")

    def test_a_worker_that_is_killed_is_replaced_and_its_items_are_done_again(self, tmp_path: Path) -> None:
        source, lives = many(tmp_path / "t.jsonl", 40), tmp_path / "lives"
        lives.mkdir()
        deadly = partial(Deadly, "n021", lives)
        with opened(tmp_path / "one") as alone, opened(tmp_path / "two") as two:
            for number in range(MOST_STARTS):
                (lives / f"{number}").touch()
            blamed = rf"{MOST_STARTS} workers crashed on the batch from .*{source.name}:21 to .*{source.name}:24"
            with pytest.raises(ModelError, match=blamed):
                on_two_workers([source], two, deadly)
            kept = two.count()
            (lives / "one more").touch()
            assert counts(on_two_workers([source], two, deadly)) == (40 - kept, 0, kept, 0) and not list(lives.iterdir())
            add([source], alone, FakeEncoder(), progress=False)
            assert rows(two) == rows(alone)

    def test_what_stops_a_worker_stops_the_run_in_its_own_words(self, tmp_path: Path) -> None:
        source = many(tmp_path / "t.jsonl", 3)
        with opened(tmp_path / "index") as index:
            with pytest.raises(ModelError, match="a worker stopped"):
                on_two_workers([source], index, Foreign)
            with pytest.raises(ModelError, match=r"^the weights of this invented model are gone$"):
                describe_encoder(broken, Share())
            with pytest.raises(InputError, match="64 GPU"):
                add_on_ray([source], index, FakeEncoder, workers=1, share=Share(gpus=64))
            assert index.count() == 0

    def test_the_command_line_takes_workers_also_for_a_published_model(
        self, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--threads", "1", "index", "add", str(shelf), "--batch", "8", "--index"]
        assert main([*words, str(tmp_path / "one")]) == 1
        plain = capsys.readouterr()
        assert main([*words, str(tmp_path / "two"), "--workers", "1"]) == 1
        spread = capsys.readouterr()
        assert spread.out == plain.out.replace(str(tmp_path / "one"), str(tmp_path / "two"))
        assert spread.err == plain.err and "cut.png" in plain.err
        make_encoder = partial(load_encoder, published.save_bert(tmp_path / "bert"), dim=16)
        encoder = make_encoder()
        with open_index(tmp_path / "3", encoder, create=True) as alone, open_index(tmp_path / "4", encoder, create=True) as two:
            report = add([shelf / "deep"], alone, encoder, batch=4, progress=False)
            assert add_on_ray([shelf / "deep"], two, make_encoder, workers=1, batch=4, progress=False) == report
            assert counts(report) == (10, 0, 0, 1) and rows(two) == rows(alone)
