"""The builder of MiniBEIR on a plain fake world: layout, determinism, resumption, shared pictures, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from traceir.data import mbeir
from traceir.errors import DataError, InputError
from traceir.minibeir import album
from traceir.minibeir import build as building
from traceir.minibeir.build import build, fingerprint
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Sketch, Split
from traceir.minibeir.rows import FAMILY, LESSON_FOLDER, ROWS, WORLDS, Row, World, row_named
from traceir.minibeir.sheet import write_sheet

DRAWN: Counter[str] = Counter()
Change = Callable[[Row, Split, QueryDraft], QueryDraft]


def sketch(key: str) -> Sketch:
    def draw() -> Image.Image:
        DRAWN[key] += 1
        return Image.new("RGB", (16, 16), tuple(hashlib.sha256(key.encode()).digest()[:3]))

    return Sketch(key, draw)


def candidate(row: Row, key: str) -> CandidateDraft:
    text = f"passage {key}" if "text" in row.cand_modality else None
    shown = key if text is None else "emblem"  # few pictures make a fast test
    return CandidateDraft(text, sketch(shown) if "image" in row.cand_modality else None)


def make_rows(row: Row, change: Change) -> Callable[[Split, int, int], Iterator[QueryDraft]]:
    def make(split: Split, count: int, seed: int) -> Iterator[QueryDraft]:
        for number in range(count):
            steps = number % 5 if row.task_id in (6, 7, 8) else number % 2
            source = f"{split}-{row.task_id}-{seed}-{number // FAMILY}"
            goal = 0 if split == "train" else number % FAMILY
            draft = QueryDraft(
                text=f"edit {number}" if "text" in row.query_modality else None,
                sketch=sketch(source) if "image" in row.query_modality else None,
                positives=(candidate(row, f"{source}-goal-{goal}"),),
                distractors=tuple(candidate(row, f"{source}-{state}") for state in ("source", "middle"))
                + tuple(candidate(row, f"{source}-twin-{twin}") for twin in range(9)),
                steps=steps,
                reasoning=f"think {number}" if steps >= 2 else None,
                answer=f"goal {number}" if steps >= 2 else None,
            )
            yield change(row, split, draft)

    return make


def fill(row: str, count: int, seed: int) -> Iterator[CandidateDraft]:
    for number in range(count):
        yield candidate(row_named(row), f"fill-{seed}-{number // 2}")


def teach(count: int, seed: int) -> Iterator[LessonDraft]:
    for number in range(count):
        yield LessonDraft(
            sketch(f"train-7-{seed}-{number // 8}") if number % 2 else None,
            "see",
            f"a thing {number}",
            "naming" if number % 2 else "facts",
        )


def fake_worlds(change: Change = lambda row, split, draft: draft) -> dict[str, World]:
    return {name: World({row.name: make_rows(row, change) for row in ROWS if row.world == name}, fill, teach) for name in WORLDS}


def build_fake(out: Path, change: Change = lambda row, split, draft: draft, **options: object) -> Path:
    return build(out, scale="small", worlds=fake_worlds(change), **options)


def text_files(root: Path) -> dict[str, bytes]:
    found = [path for path in root.rglob("*") if path.suffix in (".jsonl", ".json", ".tsv", ".txt")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    DRAWN.clear()
    return build_fake(tmp_path_factory.mktemp("mini") / "built")


def test_the_rows_are_those_of_mbeir() -> None:
    assert tuple(row.name for row in ROWS) == mbeir.EVAL_ROWS
    for row in ROWS:
        assert len(set(row.prompts)) == 4
        assert all(len(prompt.split()) <= 8 for prompt in row.prompts)


def test_the_layout_is_that_of_mbeir(root: Path) -> None:
    names = set(text_files(root))
    for split in ("val", "test"):
        for row in ROWS:
            pool = f"{row.name}_{split}" if row.dataset == "mscoco" else row.name
            assert f"query/{split}/mbeir_{row.name}_{split}.jsonl" in names
            assert f"qrels/{split}/mbeir_{row.name}_{split}_qrels.txt" in names
            assert f"cot/{split}/mbeir_{row.name}_{split}_cot.jsonl" in names
            assert f"cand_pool/local/mbeir_{pool}_cand_pool.jsonl" in names
    assert {f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl" for split in ("train", "val", "test")} <= names
    assert len([name for name in names if name.startswith("query/train/")]) == 10
    assert len([name for name in names if name.startswith("cand_pool/local/")]) == 18
    line = json.loads((root / "query/test/mbeir_cirr_task7_test.jsonl").read_text().splitlines()[0])
    assert list(line) == [
        "qid",
        "query_txt",
        "query_img_path",
        "query_modality",
        "query_src_content",
        "pos_cand_list",
        "neg_cand_list",
        "task_id",
    ]
    assert json.loads(line["query_src_content"]) == {"steps": 0}
    assert not list(root.rglob("*.tmp"))


def test_the_reader_reads_what_the_builder_writes(root: Path) -> None:
    instructions = mbeir.read_instructions(root)
    sizes: dict[Split, int] = {"val": 8, "test": 24}
    for split, count in sizes.items():
        tasks = mbeir.find_tasks(root, split)
        assert [task.name for task in tasks] == list(mbeir.EVAL_ROWS)
        for task in tasks:
            records = list(mbeir.read_queries(task.query_path))
            pool = {found.did: found for found in mbeir.read_pool(task.pool_path)}
            assert len(records) == count and len(pool) >= 120
            assert len(instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)) == 4
            assert {found.modality for found in pool.values()} == {task.cand_modality}
            for record in records:
                assert set(record.positives) | set(record.negatives) <= pool.keys()
                assert len(record.negatives) >= 8 and not set(record.positives) & set(record.negatives)
                assert record.image_path is None or (root / record.image_path).is_file()


def test_labels_follow_the_steps(root: Path) -> None:
    task = next(task for task in mbeir.find_tasks(root, "test") if task.name == "cirr_task7")
    labels = mbeir.read_labels(task.labels_path)
    assert {(label.steps, label.z, label.reasoning is None) for label in labels.values()} == {
        (0, 0, True),
        (1, 0, True),
        (2, 1, False),
        (3, 1, False),
        (4, 1, False),
    }
    assert labels.keys() == {record.qid for record in mbeir.read_queries(task.query_path)}
    trained = mbeir.read_labels(mbeir.train_labels_path(root, "cirr"))
    assert trained.keys() == {record.qid for record in mbeir.read_train(root, "cirr")}


def test_training_mixes_tasks_by_whole_families(root: Path) -> None:
    records = list(mbeir.read_train(root, "mscoco"))
    tasks = [record.task_id for record in records]
    assert tasks[: 2 * FAMILY] == [0] * FAMILY + [3] * FAMILY
    families = [tasks[start : start + FAMILY] for start in range(0, len(tasks), FAMILY)]
    assert all(len(set(family)) == 1 for family in families)
    assert Counter(tasks) == {0: 64, 3: 64}


def test_a_distractor_met_by_a_family_has_one_did(root: Path) -> None:
    task = next(task for task in mbeir.find_tasks(root, "test") if task.name == "cirr_task7")
    families = [set(record.negatives) for record in mbeir.read_queries(task.query_path)][:FAMILY]
    assert len(set.intersection(*families)) >= 1
    contents = [(found.text, found.image_path) for found in mbeir.read_pool(task.pool_path)]
    assert len(set(contents)) == len(contents)


def test_the_global_pool_is_the_union_of_the_local_ones(root: Path) -> None:
    splits: tuple[Split, ...] = ("val", "test")
    for split in splits:
        local = {found.did for task in mbeir.find_tasks(root, split) for found in mbeir.read_pool(task.pool_path)}
        path = root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        assert {found.did for found in mbeir.read_pool(path)} == local


def test_a_image_is_drawn_once_for_queries_pools_and_lessons(root: Path) -> None:
    files = sorted((root / LESSON_FOLDER).iterdir())
    assert [file.name for file in files] == [f"{world}_{kind}.jsonl" for world in sorted(WORLDS) for kind in ("facts", "naming")]
    lessons = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(lessons) == 4 * 64 and lessons[0] == {"img_path": None, "prompt": "see", "target": "a thing 0"}
    shared = {lesson["img_path"] for lesson in lessons} & {record.image_path for record in mbeir.read_train(root, "cirr")}
    assert shared
    assert max(DRAWN.values()) <= len(WORLDS)  # each world draws its own


def test_the_manifest_counts(root: Path) -> None:
    meta = json.loads((root / "meta.json").read_text())
    cirr = meta["rows"]["cirr_task7"]
    assert meta["fingerprint"] == fingerprint(root)
    assert (meta["scale"], meta["seed"], meta["lessons"]) == ("small", 0, 256)
    assert cirr["train"]["queries"] == 64
    assert cirr["test"]["queries"] == 24 and cirr["test"]["steps"]["4"] == 4
    assert meta["pictures"] == len(list((root / "mbeir_images").rglob("*.jpg")))


def test_a_rebuild_is_byte_identical_and_a_finished_one_is_left_alone(root: Path, tmp_path: Path) -> None:
    again = build_fake(tmp_path / "again", workers=2)
    assert text_files(again) == text_files(root)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert build_fake(again) == again
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before


def test_another_seed_changes_the_files_and_needs_another_folder(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"meta\.json: the folder holds seed 0, asked for is 1"):
        build_fake(root, seed=1)
    with pytest.raises(InputError, match="holds splits"):
        build_fake(root, splits=("test",))
    other = build_fake(tmp_path / "other", seed=1, splits=("test",))
    assert fingerprint(other) != fingerprint(root)
    assert not (other / "query/train").exists() and not (other / "lessons").exists()


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        build_fake(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_interrupted_build_goes_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"

    def stop(row: Row, split: Split, draft: QueryDraft) -> QueryDraft:
        if row.name == "oven_task6":
            raise KeyboardInterrupt
        return draft

    with pytest.raises(KeyboardInterrupt):
        build_fake(out, stop)
    assert not (out / "meta.json").exists()
    with pytest.raises(InputError, match="seed"):
        build_fake(out, seed=5)
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    build_fake(out)
    assert text_files(out) == text_files(root)
    assert drawn == {path: path.stat().st_mtime_ns for path in drawn}


def test_a_killed_build_goes_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=build_fake, args=(out,))
    process.start()
    while sum(1 for _ in out.rglob("*.jpg")) < 200 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (out / "meta.json").exists()
    build_fake(out)
    assert text_files(out) == text_files(root)
    for path in out.rglob("*.jpg"):
        assert path.read_bytes() == (root / path.relative_to(out)).read_bytes()


def bad_split(wanted: Split, **changes: object) -> Change:
    def change(row: Row, split: Split, draft: QueryDraft) -> QueryDraft:
        return dataclasses.replace(draft, **changes) if split == wanted and row.name == "cirr_task7" else draft

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_split("test", positives=(CandidateDraft(text="words"),)), "a candidate is text; the row asks for image"),
        (bad_split("test", text=None), "cirr_task7 test query 1 is image; the row asks for image,text"),
        (bad_split("test", distractors=()), "0 distractors, fewer than 8"),
        (bad_split("test", positives=()), "has no positive"),
        (bad_split("test", steps=2, reasoning=None), "need reasoning and answer"),
        (bad_split("test", steps=5), "has 5 steps"),
    ],
)
def test_drafts_that_break_a_rule(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_fake(tmp_path / "bad", change, splits=("test",))
    assert not (tmp_path / "bad/meta.json").exists()


def test_a_distractor_equal_to_the_positive(tmp_path: Path) -> None:
    def change(row: Row, split: Split, draft: QueryDraft) -> QueryDraft:
        return dataclasses.replace(draft, distractors=draft.distractors + draft.positives)

    with pytest.raises(DataError, match="both positive and distractor"):
        build_fake(tmp_path / "bad", change, splits=("test",))


def test_a_test_answer_seen_in_training(tmp_path: Path) -> None:
    def leak(row: Row, split: Split, draft: QueryDraft) -> QueryDraft:
        leaks = row.name == "cirr_task7" and split in ("train", "test")
        return dataclasses.replace(draft, positives=(candidate(row, "leak"),)) if leaks else draft

    with pytest.raises(DataError, match="is a training answer too"):
        build_fake(tmp_path / "bad", leak)


def test_a_world_that_makes_too_few_or_too_many_queries(tmp_path: Path) -> None:
    worlds = fake_worlds()
    scenes = worlds["scenes"]
    for count, message in ((3, "makes 3 of 24"), (25, "makes more than 24")):

        def make(split: Split, _: int, seed: int, count: int = count) -> Iterator[QueryDraft]:
            return scenes.rows["nights_task4"](split, count, seed)

        changed = worlds | {"scenes": dataclasses.replace(scenes, rows={**scenes.rows, "nights_task4": make})}
        with pytest.raises(DataError, match=f"{message} test queries for nights_task4"):
            build(tmp_path / str(count), scale="small", splits=("test",), worlds=changed)


def test_a_pool_without_enough_fill(tmp_path: Path) -> None:
    def thin(row: Row, split: Split, draft: QueryDraft) -> QueryDraft:
        shared = tuple(candidate(row, f"shared-{number}") for number in range(8))
        return dataclasses.replace(draft, distractors=shared)

    worlds = {name: dataclasses.replace(world, pool_fill=lambda row, count, seed: iter(())) for name, world in
              fake_worlds(thin).items()}  # fmt: skip
    with pytest.raises(DataError, match=r"mbeir_visualnews_task0_cand_pool\.jsonl: 32 candidates, fewer than 120"):
        build(tmp_path / "bad", scale="small", splits=("test",), worlds=worlds)
    built = build(tmp_path / "good", scale="small", splits=("test",), worlds=fake_worlds(thin))
    assert {count["test"]["pool"] for count in json.loads((built / "meta.json").read_text())["rows"].values()} == {120}


def pose_crowded(number: int) -> QueryDraft:
    """A draft of two steps: source and state, 30 other edits, 8 twins."""
    row = row_named("cirr_task7")
    names = ("source", "middle", *(f"other-{n}" for n in range(30)), *(f"twin-{n}" for n in range(8)))
    distractors = tuple(candidate(row, f"{number}-{name}") for name in names)
    return QueryDraft("edit", sketch("s"), (candidate(row, f"{number}-goal"),), distractors, 2, "r", "a")


def test_large_pools_keep_sources_states_and_twins() -> None:
    drafts = [pose_crowded(number) for number in range(10)]
    kept = building._spare_distractors(drafts, 150)
    for number, distractors in enumerate(kept):
        names = [each.sketch.key for each in distractors if each.sketch]
        assert len(names) == 14  # 10 queries of 14 distractors and a positive make 150
        assert {f"{number}-source", f"{number}-middle", *(f"{number}-twin-{n}" for n in range(8))} <= set(names)
    assert building._spare_distractors(drafts, 10_000) == [draft.distractors for draft in drafts]


def test_keys_that_file_systems_refuse_become_digests() -> None:
    assert album._file_name("scene-1_a.b") == "scene-1_a.b.jpg"
    odd = [album._file_name(key) for key in ("A/B", "a/b", "..", "x" * 300)]
    assert len(set(odd)) == 4 and all(len(name) == 36 and "/" not in name for name in odd)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options in ({"seed": -1}, {"splits": ()}, {"splits": ("dev",)}, {"workers": 0}):
        with pytest.raises(InputError):
            build_fake(tmp_path / "none", **options)
    with pytest.raises(InputError, match="scale 'huge'"):
        build(tmp_path / "none", scale="huge")
    assert not (tmp_path / "none").exists()


def test_the_contact_sheet_has_a_line_for_each_row(root: Path, tmp_path: Path) -> None:
    path = write_sheet(root, tmp_path / "sheet.png", per_row=2)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 16 * 150
        one = write_sheet(root, tmp_path / "one.png", per_row=1)
        with Image.open(one) as narrow:
            assert narrow.width < sheet.width
