"""The store of embeddings: resuming, shards, processes that end while they write, damage, and keys of images."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_of
from fakes import FakeEncoder, vector_of

from traceir.errors import InputError, ModelError, StoreError
from traceir.evaluation import embeddings
from traceir.evaluation.embeddings import EmbeddingStore, EncoderIdentity, shard_from_environment
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query

PLAIN = EncoderIdentity.of(FakeEncoder())
ASKED = replace(PLAIN, route="auto", threshold=0.5, max_reasoning_tokens=12)

FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from test_embeddings import PLAIN, passages
from fakes import FakeEncoder
from traceir.evaluation.embeddings import EmbeddingStore
EmbeddingStore(sys.argv[1], PLAIN, block_rows=3).fill(passages(60), FakeEncoder(delay=0.01).encode_items, progress=False)
"""


def passages(count: int) -> list[Item]:
    return [Item.of(text=f"passage {number} about nothing", id=f"2:{number}") for number in range(count)]


def asked(count: int) -> list[Query]:
    return [Query.of(text=f"find {n}" + " then turn" * (n % 2), instruction="look", id=f"2:{n}") for n in range(count)]


def fill(store: EmbeddingStore, inputs: Iterable[Any], **options: Any) -> FakeEncoder:
    encoder = FakeEncoder()
    encode: Any = encoder.encode_items if store.identity.route is None else encoder.encode_queries
    store.fill(inputs, encode, progress=False, **options)
    return encoder


def scaled(factor: float) -> Callable[[Sequence[Item]], list[Encoding]]:
    def encode(chunk: Sequence[Item]) -> list[Encoding]:
        encodings = FakeEncoder().encode_items(chunk)
        return [replace(encoding, vector=encoding.vector * np.float32(factor)) for encoding in encodings]

    return encode


def vectors_of(items: Sequence[Item]) -> Any:
    return np.stack([vector_of(item.content_hash(), 16) for item in items])


def contents(store: EmbeddingStore) -> dict[str, bytes]:
    """The bytes of all blocks; how long they took is not part of them."""
    files = [file for file in (store.folder / "blocks").rglob("*") if file.is_file() and file.name != "block.json"]
    return {str(file.relative_to(store.folder)): file.read_bytes() for file in files}


def test_what_was_encoded_is_read_back_and_not_encoded_again(tmp_path: Path) -> None:
    items = passages(20)
    store = EmbeddingStore(tmp_path, PLAIN, block_rows=6)
    assert fill(store, items).calls == 4
    whole = store.open(store.plan(iter(items)))
    assert [len(block) for block in whole] == [6, 6, 6, 2] and len(whole) == 20
    np.testing.assert_array_equal(whole.matrix(), vectors_of(items))
    assert isinstance(next(iter(whole)), np.memmap) and whole.seconds >= 0.0
    with pytest.raises(InputError, match="holds candidates"):
        next(whole.encodings())
    again = EmbeddingStore(tmp_path, PLAIN, block_rows=6)
    assert fill(again, [replace(item, id=f"other {item.id}") for item in items]).calls == 0
    assert fill(again, items[:8] + passages(30)[20:] + items[8:]).calls == 4  # the first block is the same, the others moved
    half = EmbeddingStore(tmp_path, replace(PLAIN, dtype="float16"))
    fill(half, items)
    (rounded,) = half.open(half.plan(items))
    assert rounded.dtype == np.float16
    np.testing.assert_array_equal(rounded, vectors_of(items).astype(np.float16))


def test_encodings_of_queries_come_back_whole(tmp_path: Path) -> None:
    queries = asked(11)
    wanted = FakeEncoder().encode_queries(queries)
    text = 'two\\nlines, \\u2028 "quotes", \\ud83d\\ude00 é'
    wanted[4] = replace(wanted[4], reasoning=text, emb_probability=1 / 3, truncated=True)
    store = EmbeddingStore(tmp_path, ASKED, block_rows=4)
    store.fill(queries, lambda chunk: [wanted[queries.index(query)] for query in chunk], progress=False)
    for ours, theirs in zip(store.open(store.plan(queries)).encodings(), wanted, strict=True):
        np.testing.assert_array_equal(ours.vector, theirs.vector)
        assert replace(ours, vector=theirs.vector) == theirs
    assert {encoding.route for encoding in wanted} == {"reason", "direct"}


def test_shards_write_the_same_blocks_as_one_process(tmp_path: Path) -> None:
    items = passages(50)
    stores = [EmbeddingStore(tmp_path / str(count), PLAIN, block_rows=4) for count in (1, 2, 3)]
    for count, store in enumerate(stores, start=1):
        for number in reversed(range(count)):
            plan = store.plan(items)
            before = store.missing(plan)
            assert before == [block for block in range(13) if block % count <= number]
            with pytest.raises(StoreError, match=f"{len(before)} of 13 blocks are not encoded"):
                store.open(plan)
            encoder = fill(store, (item for item in items), shard=(number, count))
            assert encoder.encoded == [item.id for index, item in enumerate(items) if index // 4 % count == number]
        assert store.missing(store.plan(items)) == []
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2]) and len(contents(stores[0])) == 13


@pytest.mark.slow
def test_a_process_killed_at_any_time_loses_one_block_at_most(tmp_path: Path) -> None:
    store, clean = (EmbeddingStore(tmp_path / name, PLAIN, block_rows=3) for name in ("killed", "clean"))
    fill(clean, passages(60))
    for wait in (0.0, 0.01, 0.03, 0.05):
        before = contents(store)
        with subprocess.Popen([sys.executable, "-c", FILL, tmp_path / "killed", Path(__file__).parent]) as process:
            while contents(store) == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        after = contents(store)
        assert before.items() <= after.items() <= contents(clean).items()
    assert len(after) >= 3  # each process wrote something
    assert fill(store, passages(60)).calls == 20 - len(after) and contents(store) == contents(clean)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_dying_between_writing_and_renaming_loses_one_block(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, clean = (EmbeddingStore(tmp_path / name, ASKED, block_rows=4) for name in ("died", "clean"))
    fill(clean, asked(8))
    fill(store, asked(4))
    before, real, calls = contents(store), getattr(os, moment), iter(range(99))

    def crash(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, moment, crash)
        fill(store, asked(8))
    assert store.missing(store.plan(asked(8))) == [1] and contents(store) == before
    (left,) = (store.folder / "writing").iterdir()
    fill(store, asked(8))
    assert contents(store) == contents(clean) and left.exists(), "another process might still write there"
    os.utime(left, (1.0, 1.0))
    fill(store, asked(8))
    assert not list((store.folder / "writing").iterdir())


def test_two_processes_with_the_same_block_keep_the_first(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, PLAIN, block_rows=4), passages(4)

    def slow(chunk: Sequence[Item]) -> list[Encoding]:
        fill(EmbeddingStore(tmp_path, PLAIN, block_rows=4), chunk)
        return scaled(-1.0)(chunk)

    store.fill(items, slow, progress=False)
    np.testing.assert_array_equal(store.open(store.plan(items)).matrix(), vectors_of(items))
    assert not list((store.folder / "writing").iterdir())


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "shorter": lambda data: data[:-7], "longer": lambda data: data + b"more", "removed": lambda data: b"",
    "scrambled": lambda data: b"PK" + data[2:], "other shape": lambda data: data.replace(b"(4, 16)", b"(8, 8) "),
    "other type": lambda data: data.replace(b"<f4", b"<i4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "name"), [*((harm, "vectors.npy") for harm in HARMS), *((harm, "encodings.jsonl") for harm in [*HARMS][:4])]
)
def test_damaged_blocks_are_named_and_can_be_encoded_again(tmp_path: Path, harm: str, name: str) -> None:
    store, queries = EmbeddingStore(tmp_path, ASKED, block_rows=4), asked(12)
    fill(store, queries)
    plan, whole = store.plan(queries), contents(store)
    file = store.folder / "blocks" / str(plan[1][0]) / name
    before = file.read_bytes()
    file.unlink()
    if after := HARMS[harm](before):
        file.write_bytes(after)
    for use in (lambda: fill(store, queries), lambda: list(store.open(plan).encodings())):
        with pytest.raises(StoreError, match=rf"{re.escape(str(file))} .*repair=True"):
            use()
    fill(store, queries, repair=True)
    assert contents(store) == whole


@pytest.mark.parametrize(
    ("dtype", "encode", "message"),
    [
        ("float32", scaled(float("nan")), r"2:0.*not finite"),
        ("float16", scaled(1e7), "not finite as float16"),
        ("float32", lambda chunk: [], r"shape \[0\], the store needs \[4, 16\]"),
    ],
)
def test_vectors_that_mean_nothing_are_not_written(tmp_path: Path, dtype: Any, encode: Any, message: str) -> None:
    store, items = EmbeddingStore(tmp_path, replace(PLAIN, dtype=dtype), block_rows=4), passages(8)
    with pytest.raises(ModelError, match=message):
        store.fill(items, encode, progress=False)
    assert store.missing(store.plan(items)) == [0, 1]


def test_values_that_are_not_finite_are_met_when_read_and_repaired(tmp_path: Path) -> None:
    store, items = EmbeddingStore(tmp_path, PLAIN, block_rows=4), passages(8)
    fill(store, items)
    plan = store.plan(items)
    file = store.folder / "blocks" / str(plan[1][0]) / "vectors.npy"
    vectors = np.load(file)
    vectors[2, 3] = np.inf
    np.save(file, vectors)
    with pytest.raises(StoreError, match=r"vectors.npy is damaged .*not finite"):
        store.open(plan).matrix()
    assert fill(store, items, repair=True).calls == 1 and np.isfinite(store.open(plan).matrix()).all()


def write_image(file: Path, seed: int) -> Path:
    image_of(seed, 8, 8).load().save(file)
    return file


def test_images_are_read_once_and_then_known_by_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that cannot be read any more is not missed where its times are known, and its change is seen in them."""
    monkeypatch.setattr(embeddings, "YOUNG_NS", -1_000_000_000)
    files = [write_image(tmp_path / f"{number}.bmp", number) for number in range(6)]

    def items() -> list[Item]:
        return [Item.of(image=ImageInput.open(file), text="an image", id=file.name) for file in files]

    store = EmbeddingStore(tmp_path / "store", PLAIN, block_rows=2)
    assert store.missing(store.plan(items())) == [0, 1, 2] and fill(store, items()).calls == 3
    plan = store.plan(items())
    with monkeypatch.context() as patch:
        for kind, name in ((ImageInput, "load"), (Item, "content_hash")):
            patch.setattr(kind, name, lambda *_: pytest.fail("it is known by its times"))
        assert store.plan(items()) == plan and fill(store, items()).calls == 0
    times = files[3].stat()
    write_image(files[3], 99)  # of the same size, with the modification time set back
    os.utime(files[3], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fill(store, items()).encoded == ["2.bmp", "3.bmp"]
    files[:] = [Path(shutil.copy(file, tmp_path / f"copy-{file.name}")) for file in files]
    assert fill(store, items()).calls == 0, "copies are read, and turn out to be the same"
    monkeypatch.setattr(embeddings, "YOUNG_NS", 3_600_000_000_000)
    fresh = EmbeddingStore(tmp_path / "fresh", PLAIN, block_rows=3)
    files[0].unlink()  # images of other shards are not touched
    assert fill(fresh, items(), shard=(1, 2)).encoded == [file.name for file in files[3:]]
    assert not list((fresh.folder / "known").iterdir()), "fresh files are not trusted to their times"


def test_every_setting_has_a_folder_of_its_own_and_others_are_refused(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"fingerprint": "fake-2"}, {"prompt_version": "p2"}, {"width": 17}, {"route": "direct"}, {"threshold": None},
        {"max_reasoning_tokens": 13}, {"dtype": "float16"}, {"more": {"max_pixels": 1024}},
    ]  # fmt: skip
    stores = [EmbeddingStore(tmp_path, replace(ASKED, **change)) for change in changes]
    manifests = [(store.folder / "manifest.json").read_text() for store in stores]
    assert len({store.folder for store in stores}) == len(set(manifests)) == len(changes)
    assert json.loads(manifests[0])["maker"]["threshold"] == 0.5
    store = EmbeddingStore(tmp_path, PLAIN, block_rows=4)
    with pytest.raises(StoreError, match=r"block_rows are \[4\], this run has \[5\]"):
        EmbeddingStore(tmp_path, PLAIN, block_rows=5)
    (store.folder / "manifest.json").write_text("[1]")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        EmbeddingStore(tmp_path, PLAIN, block_rows=4)


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, (0, 1)),
        ({"SLURM_NTASKS": "8"}, (0, 1)),
        (SLURM, (3, 8)),
        (SLURM | {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "first", "WORLD_SIZE": "2"}, None),
    ],
)
def test_shards_from_the_environment(environment: dict[str, str], shard: tuple[int, int] | None) -> None:
    if shard is not None:
        assert shard_from_environment(environment) == shard
    else:
        with pytest.raises(InputError):
            shard_from_environment(environment)
