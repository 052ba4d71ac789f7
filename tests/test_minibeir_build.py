"""The builder of MiniBEIR on a plain fake world: layout, determinism, resumption, shared images, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.data import mbeir
from traceir.errors import DataError, InputError
from traceir.minibeir import rows
from traceir.minibeir.build import Album, build, fingerprint, spare_distractors
from traceir.minibeir.rows import GROUP, ROWS, SPLITS, WORLDS, CandidateDraft, DrawnRow, DrawnWorld, QueryDraft, Sketch
from traceir.minibeir.sheet import write_sheet

DRAWN: Counter[str] = Counter()
NAMED = {row.name: row for row in ROWS}
Change = Callable[[DrawnRow, str, QueryDraft], QueryDraft]


def sketch(key: str) -> Sketch:
    def draw() -> Image.Image:
        DRAWN[key] += 1
        return Image.new("RGB", (16, 16), tuple(hashlib.sha256(key.encode()).digest()[:3]))

    return Sketch(key, draw)


def candidate(row: DrawnRow, key: str) -> CandidateDraft:
    text = f"passage {key}" if "text" in row.cand_modality else None
    shown = key if text is None else "emblem"  # few images make a fast test
    return CandidateDraft(text, sketch(shown) if "image" in row.cand_modality else None)


def fake_worlds(change: Change = lambda row, split, draft: draft, extra: int = 0, fills: bool = True) -> dict[str, DrawnWorld]:
    def make(row: DrawnRow, split: str, count: int, seed: int) -> Iterator[QueryDraft]:
        for number in range(count + extra):
            steps = number % 5 if row.task_id in (6, 7, 8) else number % 2
            source = f"{split}-{row.task_id}-{seed}-{number // GROUP}"
            names = ("source", "middle", *(f"twin-{twin}" for twin in range(9)))
            draft = QueryDraft(
                text=f"edit {number}" if "text" in row.query_modality else None,
                sketch=sketch(source) if "image" in row.query_modality else None,
                positives=(candidate(row, f"{source}-goal-{0 if split == 'train' else number % GROUP}"),),
                distractors=tuple(candidate(row, f"{source}-{name}") for name in names),
                steps=steps,
                reasoning=f"think {number}" if steps >= 2 else None,
                answer=f"goal {number}" if steps >= 2 else None,
            )
            yield change(row, split, draft)

    def fill(name: str, count: int, seed: int) -> Iterator[CandidateDraft]:
        return (candidate(NAMED[name], f"fill-{seed}-{number // 2}") for number in range(count if fills else 0))

    def teach(count: int, seed: int) -> Iterator[rows.PretrainingDraft]:
        for number in range(count):
            shown = sketch(f"train-7-{seed}-{number // 8}") if number % 2 else None
            yield rows.PretrainingDraft(shown, "see", f"a thing {number}", "naming" if number % 2 else "facts")

    def world(name: str) -> DrawnWorld:
        return DrawnWorld({row.name: partial(make, row) for row in ROWS if row.world == name}, fill, teach)

    return {name: world(name) for name in WORLDS}


def build_fake(out: Path, worlds: dict[str, DrawnWorld] | None = None, **options: Any) -> Path:
    return build(out, **{"scale": "small", "worlds": worlds or fake_worlds()} | options)


def text_files(root: Path) -> dict[str, bytes]:
    kinds = (".jsonl", ".json", ".tsv", ".txt")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.suffix in kinds}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    DRAWN.clear()
    return build_fake(tmp_path_factory.mktemp("mini") / "built")


def test_the_layout_is_that_of_mbeir_and_its_reader_reads_it(root: Path) -> None:
    names = set(text_files(root))
    assert tuple(row.name for row in ROWS) == mbeir.EVAL_ROWS
    assert {f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl" for split in SPLITS} <= names
    assert sum(name.startswith("query/train/") for name in names) == 10
    assert sum(name.startswith("cand_pool/local/") for name in names) == 18 and not list(root.rglob("*.new"))
    instructions = mbeir.read_instructions(root)
    for split, count in (("val", 8), ("test", 24)):
        tasks = mbeir.find_tasks(root, split)
        assert [task.name for task in tasks] == list(mbeir.EVAL_ROWS)
        union = {each.did for each in mbeir.read_pool(root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl")}
        assert union == {each.did for task in tasks for each in mbeir.read_pool(task.pool_path)}
        for task in tasks:
            records, pool = list(mbeir.read_queries(task.query_path)), list(mbeir.read_pool(task.pool_path))
            assert len(records) == count and len({(each.text, each.image_path) for each in pool}) == len(pool) >= 120
            prompts = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)
            assert len(set(prompts)) == 4 and all(len(prompt.split()) <= 8 for prompt in prompts)
            steps = {qid: label.steps for qid, label in mbeir.read_labels(task.labels_path).items()}
            assert steps == {record.qid: json.loads(record.source or "")["steps"] for record in records}
    labels = mbeir.read_labels(mbeir.train_labels_path(root, "cirr"))
    assert {(label.steps, label.z, label.reasoning is None) for label in labels.values()} == {
        (0, 0, True), (1, 0, True), (2, 1, False), (3, 1, False), (4, 1, False),
    }  # fmt: skip


def test_training_mixes_tasks_by_whole_groups_and_images_are_drawn_once(root: Path) -> None:
    tasks = [record.task_id for record in mbeir.read_train(root, "mscoco")]
    assert tasks[: 2 * GROUP] == [0] * GROUP + [3] * GROUP and Counter(tasks) == {0: 64, 3: 64}
    files = sorted((root / "lessons").iterdir())
    assert [file.name for file in files] == [f"{world}_{kind}.jsonl" for world in sorted(WORLDS) for kind in ("facts", "naming")]
    pretraining = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(pretraining) == 4 * 64 and pretraining[0] == {"img_path": None, "prompt": "see", "target": "a thing 0"}
    assert {example["img_path"] for example in pretraining} & {record.image_path for record in mbeir.read_train(root, "cirr")}
    assert max(DRAWN.values()) <= len(WORLDS)  # each world draws its own
    meta = json.loads((root / "meta.json").read_text())
    assert (meta["scale"], meta["seed"], meta["lessons"], meta["fingerprint"]) == ("small", 0, 256, fingerprint(root))
    assert meta["rows"]["cirr_task7"]["train"] == {"queries": 64} and meta["rows"]["cirr_task7"]["test"]["steps"]["4"] == 4
    assert meta["pictures"] == len(list((root / "mbeir_images").rglob("*.jpg")))


@pytest.mark.slow
def test_a_rebuild_is_byte_identical_and_a_finished_one_is_left_alone(root: Path, tmp_path: Path) -> None:
    again = build_fake(tmp_path / "again", workers=2)
    assert text_files(again) == text_files(root)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert build_fake(again) == again and {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before
    with pytest.raises(InputError, match=r"meta\.json: the folder holds seed 0, asked for is 1"):
        build_fake(again, seed=1)
    with pytest.raises(InputError, match="holds splits"):
        build_fake(again, splits=("test",))
    (again / "meta.json").write_text("no")
    with pytest.raises(DataError, match="not JSON"):
        build_fake(again)
    other = build_fake(tmp_path / "other", seed=1, splits=("test",))
    assert fingerprint(other) != fingerprint(root) and not (other / "query/train").exists() and not (other / "lessons").exists()


def test_an_interrupted_build_goes_on(root: Path, tmp_path: Path) -> None:
    def stop(row: DrawnRow, split: str, draft: QueryDraft) -> QueryDraft:
        if row.name == "oven_task6":
            raise KeyboardInterrupt
        return draft

    with pytest.raises(KeyboardInterrupt):
        build_fake(tmp_path, fake_worlds(stop))
    assert not (tmp_path / "meta.json").exists()
    with pytest.raises(InputError, match="seed"):
        build_fake(tmp_path, seed=5)
    assert text_files(build_fake(tmp_path)) == text_files(root)


@pytest.mark.slow
def test_a_killed_build_goes_on(root: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_fake, args=(tmp_path,))
    process.start()
    while sum(1 for _ in tmp_path.rglob("*.jpg")) < 200 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "meta.json").exists()
    assert text_files(build_fake(tmp_path)) == text_files(root)
    assert all(path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes() for path in tmp_path.rglob("*.jpg"))


def bad(split: str = "test", fills: bool = True, **changes: Any) -> dict[str, DrawnWorld]:
    """Worlds whose queries of one row are changed."""

    def change(row: DrawnRow, of: str, draft: QueryDraft) -> QueryDraft:
        return dataclasses.replace(draft, **changes) if row.name == "cirr_task7" and of in (split, "test") else draft

    return fake_worlds(change, fills=fills)


LEAK = (CandidateDraft(sketch=sketch("leak")),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worlds": bad(text=None)}, "is image; the row asks for image,text"),
        ({"worlds": bad(distractors=())}, "0 distractors, fewer than 8"),
        ({"worlds": bad(positives=())}, "has no positive"),
        ({"worlds": bad(steps=5, reasoning="r", answer="a")}, "has 5 steps"),
        ({"worlds": bad(positives=LEAK, distractors=LEAK)}, "is both positive and distractor"),
        ({"worlds": bad("train", positives=LEAK), "splits": SPLITS}, "is a training answer too"),
        ({"worlds": fake_worlds(extra=-21)}, "makes 3 of 24"),
        ({"worlds": bad(fills=False, distractors=())}, "candidates, fewer than 120"),
    ],
)
def test_what_breaks_a_rule_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_fake(tmp_path / "bad", **{"splits": ("test",)} | options)
    assert not (tmp_path / "bad/meta.json").exists()


def test_large_pools_keep_sources_states_and_twins() -> None:
    row, drafts = NAMED["cirr_task7"], []
    for number in range(10):
        names = ("source", "middle", *(f"other-{n}" for n in range(30)), *(f"twin-{n}" for n in range(8)))
        goal, *beside = (candidate(row, f"{number}-{name}") for name in ("goal", *names))
        drafts.append(QueryDraft("edit", sketch("s"), (goal,), tuple(beside), 2, "r", "a"))
    for number, distractors in enumerate(spare_distractors(drafts, 150)):
        kept = {each.sketch.key for each in distractors if each.sketch}
        assert len(kept) == 14  # 10 queries of 14 distractors and a positive make 150
        assert {f"{number}-source", f"{number}-middle", *(f"{number}-twin-{n}" for n in range(8))} <= kept
    assert spare_distractors(drafts, 10_000) == [draft.distractors for draft in drafts]


def test_keys_that_file_systems_refuse_become_digests(tmp_path: Path) -> None:
    album = Album(tmp_path, 1)
    names = [album.place(sketch(key), "w", "f") for key in ("scene-1_a.b", "A/B", "a/b", "..", "x" * 300)]
    assert names[0] == "mbeir_images/f/scene-1_a.b.jpg"
    assert len(set(names)) == 5 and all(len(Path(name or "").name) == 36 and (name or "").count("/") == 2 for name in names[1:])


def test_options_that_cannot_be_and_foreign_folders(tmp_path: Path) -> None:
    for name, value in (("seed", -1), ("splits", ()), ("splits", ("dev",)), ("workers", 0), ("scale", "huge")):
        with pytest.raises(InputError, match=name):
            build_fake(tmp_path / "none", **{name: value})
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        build_fake(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_contact_sheet_has_a_line_for_each_row(folder: Path, tmp_path: Path) -> None:
    with Image.open(write_sheet(folder, tmp_path / "one.png", per_row=1)) as sheet:
        assert sheet.format == "PNG" and sheet.height > 16 * 150
    with pytest.raises(InputError, match="per_row is 0"):
        write_sheet(folder, tmp_path / "none.png", per_row=0)
