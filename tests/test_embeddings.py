"""The store of embeddings: resuming, shards, killed processes, damage, and keys of pictures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder, vector_of
from PIL import Image

from traceir.errors import InputError, ModelError, StoreError
from traceir.evaluation import embeddings
from traceir.evaluation.embeddings import EmbeddingStore, Maker, shard_from_environment
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query

MAKER = Maker.of(FakeEncoder())
ASKED = Maker.of(FakeEncoder(), "auto", threshold=0.5, max_reasoning_tokens=12)

FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from test_embeddings import MAKER, passages
from fakes import FakeEncoder
from traceir.evaluation.embeddings import EmbeddingStore
EmbeddingStore(sys.argv[1], MAKER, block_rows=3).fill(passages(60), FakeEncoder(delay=0.01).encode_items, progress=False)
"""


def passages(count: int) -> list[Item]:
    return [Item.of(text=f"passage {number} about nothing", id=f"2:{number}") for number in range(count)]


def asked(count: int) -> list[Query]:
    return [Query.of(text=f"find {n}" + " then turn" * (n % 2), instruction="look", id=f"2:{n}") for n in range(count)]


def fill(store: EmbeddingStore, inputs: Iterable[Any], encoder: FakeEncoder | None = None, **options: Any) -> FakeEncoder:
    encoder = encoder or FakeEncoder()
    encode = encoder.encode_items if store.maker.route is None else lambda chunk: encoder.encode_queries(chunk)
    store.fill(inputs, encode, progress=False, **options)
    return encoder


def contents(store: EmbeddingStore) -> dict[str, bytes]:
    """The bytes of all blocks; how long they took is not part of them."""
    files = [file for file in (store.folder / "blocks").rglob("*") if file.is_file() and file.name != "block.json"]
    return {str(file.relative_to(store.folder)): file.read_bytes() for file in files}


def test_what_was_encoded_is_read_back_and_not_encoded_again(tmp_path: Path) -> None:
    items = passages(20)
    store = EmbeddingStore(tmp_path, MAKER, block_rows=6)
    assert fill(store, items).calls == 4
    plan = store.plan(iter(items))
    found = store.open(plan)
    assert [len(block) for block in found] == [6, 6, 6, 2] == [block.rows for block in plan.blocks] and len(found) == 20
    np.testing.assert_array_equal(found.matrix(), np.stack([one.vector for one in FakeEncoder().encode_items(items)]))
    assert isinstance(next(iter(found)), np.memmap) and found.seconds >= 0.0
    again = EmbeddingStore(tmp_path, MAKER, block_rows=6)
    assert fill(again, items).calls == 0
    assert fill(again, items[:8] + passages(30)[20:] + items[8:]).calls == 4  # the first block is the same, the others moved
    renamed = [replace(item, id=f"other {item.id}") for item in items]
    assert fill(again, renamed).calls == 0


def test_encodings_of_queries_come_back_whole(tmp_path: Path) -> None:
    queries, encoder = asked(11), FakeEncoder()
    wanted = encoder.encode_queries(queries)
    wanted[4] = replace(
        wanted[4], reasoning='two\\nlines, \\u2028 "quotes", \\ud83d\\ude00 é', emb_probability=1 / 3, truncated=True
    )
    store = EmbeddingStore(tmp_path, ASKED, block_rows=4)
    store.fill(queries, lambda chunk: [wanted[queries.index(query)] for query in chunk], progress=False)
    found = list(store.open(store.plan(queries)).encodings())
    assert {one.route for one in found} == {"reason", "direct"}
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours.vector, theirs.vector)
        assert replace(ours, vector=theirs.vector) == theirs
    with pytest.raises(InputError, match="holds candidates"):
        candidates = EmbeddingStore(tmp_path, MAKER)
        next(candidates.open(candidates.plan(())).encodings())


def test_shards_write_the_same_blocks_as_one_process(tmp_path: Path) -> None:
    items = passages(50)
    stores = [EmbeddingStore(tmp_path / str(count), MAKER, block_rows=4) for count in (1, 2, 3)]
    for count, store in enumerate(stores, start=1):
        for number in reversed(range(count)):
            plan = store.plan(items)
            before = store.missing(plan)
            assert before == [block for block in range(13) if block % count <= number]
            with pytest.raises(StoreError, match=f"{len(before)} of 13 blocks are not encoded"):
                store.open(plan)
            encoder = fill(store, (item for item in items), shard=(number, count))
            assert encoder.encoded == [item.id for place, item in enumerate(items) if place // 4 % count == number]
        assert store.missing(store.plan(items)) == []
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2]) and len(contents(stores[0])) == 13


def test_other_shards_images_are_not_touched(tmp_path: Path) -> None:
    items = [Item.of(image=ImageInput.open(tmp_path / f"{number}.bmp"), id=str(number)) for number in range(4)]
    write_image(tmp_path / "2.bmp", 2)
    write_image(tmp_path / "3.bmp", 3)  # 0.png and 1.png do not exist
    store = EmbeddingStore(tmp_path, MAKER, block_rows=2)
    assert fill(store, items, shard=(1, 2)).encoded == ["2", "3"]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_process_killed_at_any_time_loses_one_block_at_most(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    store, clean = (EmbeddingStore(tmp_path / name, MAKER, block_rows=3) for name in ("killed", "clean"))
    fill(clean, passages(60))
    for _ in range(3):
        before = contents(store)
        with subprocess.Popen([sys.executable, "-c", FILL, tmp_path / "killed", Path(__file__).parent]) as process:
            while contents(store) == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.06))
            process.send_signal(signal.SIGKILL)
        after = contents(store)
        assert before.items() <= after.items() <= contents(clean).items()
    assert len(after) >= 3  # each process wrote something
    encoder = fill(store, passages(60))
    assert encoder.calls == 20 - len(after) and contents(store) == contents(clean)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_dying_between_writing_and_renaming_leaves_no_block(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Death(BaseException):
        pass

    def die(*_: object) -> None:
        raise Death

    store = EmbeddingStore(tmp_path, ASKED, block_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(f"traceir.evaluation.embeddings.os.{moment}", die)
        with pytest.raises(Death):
            fill(store, asked(4))
    assert store.missing(store.plan(asked(4))) == [0] and not contents(store)
    left = list((store.folder / "writing").iterdir())
    assert len(left) == 1
    fill(store, asked(4))
    assert list((store.folder / "writing").iterdir()) == left  # another process might still write there
    os.utime(left[0], (1.0, 1.0))
    fill(store, asked(4))
    assert not list((store.folder / "writing").iterdir()) and len(contents(store)) == 2


def test_two_processes_with_the_same_block_keep_the_first(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, MAKER, block_rows=4), passages(4)

    def slow(chunk: Sequence[Item]) -> list[Encoding]:
        fill(EmbeddingStore(tmp_path, MAKER, block_rows=4), chunk)
        return [replace(one, vector=-one.vector) for one in FakeEncoder().encode_items(chunk)]

    store.fill(items, slow, progress=False)
    found = store.open(store.plan(items)).matrix()
    np.testing.assert_array_equal(found, np.stack([one.vector for one in FakeEncoder().encode_items(items)]))
    assert not list((store.folder / "writing").iterdir())


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def scramble(file: Path) -> None:
    file.write_bytes(b"PK" + file.read_bytes()[2:])


def change_shape(file: Path) -> None:
    np.save(file, np.zeros((4, 3), np.float32))


def change_type(file: Path) -> None:
    np.save(file, np.zeros((4, 16), np.float64))


HARMS = [(harm, name) for name in ("vectors.npy", "encodings.jsonl") for harm in (shorten, lengthen, empty, remove, scramble)]


@pytest.mark.parametrize(("harm", "name"), [*HARMS, (change_shape, "vectors.npy"), (change_type, "vectors.npy")])
def test_damaged_blocks_are_named_and_can_be_encoded_again(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    store, queries = EmbeddingStore(tmp_path, ASKED, block_rows=4), asked(12)
    fill(store, queries)
    plan, whole = store.plan(queries), contents(store)
    file = store.folder / "blocks" / str(plan.blocks[1].key) / name
    harm(file)
    with pytest.raises(StoreError, match=r"repair=True") as refused:
        fill(store, queries)
    assert str(file) in str(refused.value)
    with pytest.raises(StoreError, match=r"repair=True"):
        list(store.open(plan).encodings())
    calls: list[list[str | None]] = []

    def encode(chunk: Sequence[Query]) -> list[Encoding]:
        calls.append([query.id for query in chunk])
        return FakeEncoder().encode_queries(chunk)

    store.fill(queries, encode, repair=True, progress=False)
    assert calls == [["2:4", "2:5", "2:6", "2:7"]] and contents(store) == whole


def test_field_report_11_what_float16_cannot_hold_is_refused_and_not_written_as_infinity(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, replace(MAKER, dtype="float16"), block_rows=4), passages(4)

    def long(chunk: Sequence[Item]) -> list[Encoding]:
        return [replace(one, vector=one.vector * np.float32(1e7)) for one in FakeEncoder().encode_items(chunk)]

    with pytest.raises(ModelError, match="not finite as float16"):
        store.fill(items, long, progress=False)
    assert store.missing(store.plan(items)) == [0]


def test_values_that_are_not_finite_are_refused_when_written_read_or_repaired(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, MAKER, block_rows=4), passages(8)

    def diverged(chunk: Sequence[Item]) -> list[Encoding]:
        return [replace(one, vector=one.vector * np.float32("nan")) for one in FakeEncoder().encode_items(chunk)]

    with pytest.raises(ModelError, match=r"2:0.*not finite"):
        store.fill(items, diverged, progress=False)
    with pytest.raises(ModelError, match="0 encodings for 4 inputs"):
        store.fill(items, lambda chunk: [], progress=False)
    fill(store, items)
    plan = store.plan(items)
    file = store.folder / "blocks" / str(plan.blocks[1].key) / "vectors.npy"
    vectors = np.load(file)
    vectors[2, 3] = np.inf
    np.save(file, vectors)
    with pytest.raises(StoreError, match=r"vectors.npy holds values that are not finite"):
        store.open(plan).matrix()
    assert fill(store, items, repair=True).calls == 1
    assert np.isfinite(store.open(plan).matrix()).all()


def write_image(file: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The picture files read so far; files of any age may be known by their times."""
    files: list[Path] = []
    original = ImageInput._read

    def counted(self: ImageInput, limits: Any) -> bytes:
        files.append(self.path or Path())
        return original(self, limits)

    monkeypatch.setattr(ImageInput, "_read", counted)
    monkeypatch.setattr(embeddings, "YOUNG_NS", -1_000_000_000)
    yield files


def test_images_are_read_once_and_then_known_by_their_times(tmp_path: Path, read: list[Path]) -> None:
    files = [write_image(tmp_path / f"{number}.bmp", number) for number in range(6)]

    def items() -> Iterator[Item]:
        return (Item.of(image=ImageInput.open(file), text="a picture", id=file.name) for file in files)

    store = EmbeddingStore(tmp_path / "store", MAKER, block_rows=2)
    plan = store.plan(items())
    assert sorted(read) == files and store.missing(plan) == [0, 1, 2]
    fill(store, list(items()))
    assert sorted(read) == sorted(files * 2)  # to encode them; their hashes are known
    read.clear()
    assert store.plan(items()) == plan and fill(store, list(items())).calls == 0 and not read
    times = files[3].stat()
    write_image(files[3], 99)  # of the same size, with the modification time set back
    os.utime(files[3], ns=(times.st_atime_ns, times.st_mtime_ns))
    encoder = fill(store, list(items()))
    assert encoder.encoded == ["2.bmp", "3.bmp"] and set(read) == set(files[2:4])
    read.clear()
    for number, file in enumerate(files):
        files[number] = Path(shutil.copy(file, tmp_path / f"copy-{file.name}"))
    assert fill(store, list(items())).calls == 0 and sorted(read) == sorted(files)  # copies: read, and found to be the same


def test_fresh_files_are_not_trusted_to_their_times(tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "YOUNG_NS", 3_600_000_000_000)
    file = write_image(tmp_path / "new.bmp", 1)
    store = EmbeddingStore(tmp_path / "store", MAKER)
    for _ in range(2):
        store.plan([Item.of(image=ImageInput.open(file))])
    assert len(read) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "fake-2"}, {"prompt_version": "p2"}, {"width": 17}, {"route": "direct"}, {"threshold": None},
        {"max_reasoning_tokens": 13}, {"dtype": "float16"}, {"more": {"max_pixels": 1024}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_setting_has_a_folder_of_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    store, other = EmbeddingStore(tmp_path, ASKED), EmbeddingStore(tmp_path, replace(ASKED, **change))
    assert store.folder != other.folder
    assert json.loads((other.folder / "manifest.json").read_text())["maker"] != json.loads(
        (store.folder / "manifest.json").read_text()
    )["maker"]  # fmt: skip


def test_a_folder_of_other_blocks_or_another_maker_is_refused(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, MAKER, block_rows=4)
    with pytest.raises(StoreError, match=r"block_rows are \[4\], this run has \[5\]"):
        EmbeddingStore(tmp_path, MAKER, block_rows=5)
    (store.folder / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        EmbeddingStore(tmp_path, MAKER, block_rows=4)
    with pytest.raises(InputError, match="never reason"):
        Maker("m", "p", 4, max_reasoning_tokens=3)


def test_half_precision_rounds_and_says_so(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, replace(MAKER, dtype="float16")), passages(3)
    fill(store, items)
    found = store.open(store.plan(items))
    wanted = np.stack([vector_of(item.content_hash(), 16) for item in items]).astype(np.float16)
    assert next(iter(found)).dtype == np.float16
    np.testing.assert_array_equal(found.matrix(), wanted.astype(np.float32))


def test_shards_from_the_environment() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
    assert shard_from_environment({}) == (0, 1) and shard_from_environment({"SLURM_NTASKS": "8"}) == (0, 1)
    assert shard_from_environment(slurm) == (3, 8)
    assert shard_from_environment({**slurm, "RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "first", "WORLD_SIZE": "2"}):
        with pytest.raises(InputError):
            shard_from_environment(wrong)
