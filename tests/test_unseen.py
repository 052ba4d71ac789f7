"""The zero-shot sets over invented files in the published formats: what is asked, right, refused, and how it is scored."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import image_of
from evaluations import Planned, write
from fakes import FakeEncoder

from traceir.errors import DataError, InputError, ModelError
from traceir.evaluation.unseen import readers
from traceir.evaluation.unseen.run import (
    CIRCO_TEST,
    COLUMNS,
    dry_run_unseen,
    find_columns,
    read_columns,
    read_set,
    write_submission,
)
from traceir.evaluation.unseen.score import NAMED, UnseenOutcome, rank_pool, score
from traceir.evaluation.unseen.task import LeftOut, Missing, Source, UnseenQuery, UnseenTask

SETS = json.loads((Path(__file__).parent / "fixtures" / "unseen_sets.json").read_text())
FILES, IMAGES = SETS["files"], SETS["images"]
"""Annotation files of every set by name, with their content, and the images that they need."""
DIALOGS = FILES["visdial/visdial_1.0_val.json"]["data"]
CHANGE = FILES["circo/annotations/test.json"][0]


def write_ccneg(root: Path, paths: Sequence[object]) -> None:
    pairs = [{"json": {"caption": f"cup, {n}"}, "sop_data": {"negative-prompt": f"cup, not {n},"}} for n in range(len(paths))]
    torch.save({"image_paths": list(paths), "annotations": pairs}, root / "ccneg/ccneg_preprocessed.pt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folders of all sets, with images by name alone."""
    for name, content in {**FILES, **dict.fromkeys(IMAGES, "an image")}.items():
        write(tmp_path / name, content)
    write_ccneg(tmp_path, [f"/authors/datasets/cc3m/part/{n}.jpg" for n in range(3)])
    return tmp_path


def read(root: Path, name: str, missing: Missing = "stop") -> UnseenTask:
    return next(read_columns(root, [name], missing))


def names(*sources: object) -> list[object]:
    return [source.name if isinstance(source, Path) else source for source in sources]


def test_what_each_set_asks_and_what_is_right(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each the names of a query's parts, its right ids, its masked ids, its gallery, and the names of what it may find."""
    monkeypatch.setattr(readers, "CCNEG_ITEMS", 2)
    garments = [f"B{n}.jpg" for n in range(1, 5)]
    crops = [f"{kind}_attribute/{n}" for kind in ("change", "focus") for n in (0, 1)]
    wanted: dict[str, list[Any]] = {
        "sharegpt4v_t2i": [["A blue boat. It rests."], ("0",), (), None, ["one.jpg", "two.jpg"]],
        "sharegpt4v_i2t": [["one.jpg"], ("0",), (), None, ["A blue boat. It rests.", "A red gate."]],
        "urban1k_t2i": [["Street 1."], ("1",), (), None, ["1.jpg", "2.jpg", "10.jpg"]],
        "flickr30k_i2t": [["0.png"], ("0", "1", "2", "3", "4"), (), None, [f"caption {n}" for n in range(10)]],
        "circo": [["07.jpg", "has  two dogs"], ("8", "9"), (), None, ["07.jpg", "08.jpg", "09.jpg"]],
        "visdial": [["Q: is it red? A: yes. Q: is it big? A: no."], ("42",), (), None, [Path(IMAGES[10]).name]],
        "vist": [["first a", "a.jpg", "then b", "b.png", "last c"], ("c",), ("a", "b"), None, ["a.jpg", "b.png", "c.gif"]],
        "mtfiq": [["B1.jpg", "is  blue", "B2.jpg", "is longer and has sleeves"], ("B3",), (), None, garments],
        "ccneg": [["1.jpg"], ("1/true",), (), ("1/true", "1/wrong"), ["cup, 1", "cup not 1", "cup, 2", "cup not 2"]],
        "cirr": [["b.png", "add one"], ("c",), ("b",), None, ["a.png", "b.png", "c.png", "d.png"]],
        "cirr_subset": [["b.png", "add one"], ("c",), (), ("a", "c"), ["a.png", "b.png", "c.png", "d.png"]],
        "fashioniq_dress": [["A.jpg", "is blue and longer"], ("B",), (), None, ["A.jpg", "B.jpg"]],
    }
    for name, expected in wanted.items():
        task = read(root, name)
        case = task.cases[0]
        assert [names(*case.parts), case.relevant, case.masked, case.gallery, names(*task.pool.values())] == expected, name
        assert task.main in task.metrics and case.query().id == case.id and not task.left_out
        assert case.target == ("text" if name.endswith("i2t") or name == "ccneg" else "image")
        assert (case.instruction is None) == (name.endswith("t2i") or name == "ccneg")
    assert [case.relevant for case in read(root, "flickr30k_t2i").cases] == [("0",)] * 5 + [("1",)] * 5
    genecis, sugarcrepe = read(root, "genecis"), read(root, "sugarcrepe")
    cases = {case.id: case for case in genecis.cases}
    assert [*cases] == ["change_object/0", "focus_object/0", *crops] and genecis.by_group and not sugarcrepe.by_group
    for name, images in (("focus_object/0", [f"{n:012}.jpg" for n in (11, 12, 13, 14)]),
                         ("focus_attribute/1", ["11_1_0.jpg", "12_1_1.jpg", "13_1_2.jpg", "14_1_3.jpg"])):  # fmt: skip
        gallery = cases[name].gallery or ()
        assert names(*cases[name].parts, *(genecis.pool[id] for id in gallery)) == [images[0], "colour", *images[1:]]
        assert cases[name].relevant == gallery[:1] and cases[name].group == name.partition("/")[0]
    assert [case.id for case in sugarcrepe.cases[:3]] == ["add_obj/0", "add_obj/2", "add_att/0"]
    assert {case.group for case in sugarcrepe.cases} == set(readers.SUGARCREPE_FILES)
    assert read_set(root, "circo_test", CIRCO_TEST).cases[0].relevant == ()


def test_the_13_columns_come_in_the_order_of_the_table(root: Path) -> None:
    assert find_columns(root)[:13] == list(COLUMNS) and find_columns(root / "vist") == []
    tasks = list(read_columns(root, COLUMNS))
    assert [task.name for task in tasks] == list(COLUMNS) and len(tasks) == 13
    assert [task.main for task in tasks[6:]] == ["map@5", "hit@1", "hit@1", "hit@1", "hit@5", "accuracy", "accuracy"]
    with pytest.raises(InputError, match="did you mean 'flickr30k_t2i'"):
        next(read_columns(root, ["flickr30k_t2"]))


TURN = DIALOGS | {"dialogs": [{"image_id": 1, "dialog": [{"question": 2, "answer": 0}]}]}
BROKEN: list[tuple[str, str, object, str]] = [
    ("visdial", "visdial/visdial_1.0_val.json", '{"data":\n }', r"val\.json:2: .*line 2"),
    ("visdial", "visdial/visdial_1.0_val.json", {"data": TURN}, "dialogs 0, dialog 0: is .*'question': 2.*fewer than 2"),
    ("circo", "circo/annotations/val.json", [], "circo has no queries"),
    ("circo", "circo/annotations/val.json", [CHANGE | {"gt_img_ids": [8]}] * 2, "query id '0' occurs a second time"),
    ("circo", "circo/annotations/val.json", [CHANGE | {"reference_img_id": 5}], "entry 0: reference_img_id is '5'"),
    ("circo", "circo/annotations/val.json", [CHANGE], r"entry 0: gt_img_ids is \[\]"),
    ("circo", "circo/annotations/image_info_unlabeled2017.json", {"images": [{"id": 1, "file_name": "../key"}]},
     r"images 0, file_name: is '\.\./key': it is not a file below"),
    ("genecis", "genecis/annotations/focus_object.json", FILES["genecis/annotations/focus_attribute.json"],
     "entry 0, reference, val_image_id: is .*required"),
    ("mtfiq", "multiturnfashion/image_splits/split.all.val.json", [], "the pool of mtfiq is empty"),
    ("mtfiq", "multiturnfashion/image_splits/split.all.val.json", ["B1"], "1 ids are not in the pool"),
    ("mtfiq", "multiturnfashion/image_splits/split.all.val.json", ["a b"], "entry 0: is 'a b': it must be an id"),
    ("sugarcrepe", "sugar-crepe/data/add_att.json", {"9": {"filename": "a.jpg", "caption": " "}}, "9, caption: is ' '"),
    ("cirr", "cirr/cap.rc2.val.json", [FILES["cirr/cap.rc2.val.json"][0] | {"target_hard": "d"}], "entry 0: target_hard is 'd'"),
    ("flickr30k_t2i", "flickr/flickr_text.json", ["caption"] * 6, "6 captions are not five"),
    ("urban1k_t2i", "Urban1k/caption/2.txt", "\nnot the first line", r"2\.txt:1: is blank"),
    ("ccneg", "ccneg/ccneg_preprocessed.pt", "<html>", "(?i)download it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), BROKEN, ids=[row[3] for row in BROKEN])
def test_broken_files_are_refused_with_their_place(root: Path, name: str, file: str, content: object, message: str) -> None:
    write(root / file, content)
    with pytest.raises(DataError, match=message):
        read(root, name)


class Unsafe:
    """What a hostile file asks for when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_file_that_asks_to_run_code_is_refused(root: Path) -> None:
    write_ccneg(root, [Unsafe(root / "harm")])
    with pytest.raises(DataError, match=r"ccneg_preprocessed\.pt: is refused .*mkdir.*could run code"):
        read(root, "ccneg")
    assert not (root / "harm").exists()
    for path in ("/elsewhere/1.jpg", "/authors/datasets/cc3m/../1.jpg"):
        write_ccneg(root, [path])
        with pytest.raises(DataError, match=f"entry 0: image_paths is '{path}'"):
            read(root, "ccneg")


def test_what_is_missing_stops_or_is_left_out_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "vist/images/b.png").unlink()
    with pytest.raises(DataError, match=r"1 images are missing, first .*b\.jpg"):
        read(root, "vist")
    task = read(root, "vist", "skip")
    assert [case.id for case in task.cases] == ["s2"] and list(task.pool) == ["a", "c"]
    assert (task.left_out.cases, task.left_out.candidates) == (("s1",), ("b",))
    assert names(*task.left_out.images) == ["b.jpg"] and "left out 1 of 2 queries (first: s1)" in caplog.text
    (root / "vist/images/a.jpg").unlink()
    with pytest.raises(DataError, match="no query of vist is left: 2 images are missing"):
        read(root, "vist", "skip")
    (root / "genecis/visual_genome/focus_attribute/14_1_3.jpg").unlink()
    assert read(root, "genecis", "skip").left_out.cases == ("focus_attribute/1",), "its gallery is not whole"
    write(root / "circo/annotations/val.json", [CHANGE | {"gt_img_ids": [8, 9]}, CHANGE | {"id": 1, "gt_img_ids": [8]}])
    (root / "circo/unlabeled2017/09.jpg").unlink()
    task = read(root, "circo", "skip")
    assert ([case.id for case in task.cases], list(task.pool), task.left_out.cases) == (["1"], ["7", "8"], ("0",))
    (root / "sugar-crepe/data/swap_obj.json").unlink()
    with pytest.raises(DataError, match=r"1 annotation files are missing, first .*swap_obj\.json"):
        read(root, "sugarcrepe")
    assert names(*read(root, "sugarcrepe", "skip").left_out.files) == ["swap_obj.json"]
    counts = dry_run_unseen(root, ["vist", "sugarcrepe"]).splitlines()[2:]
    assert counts == ["| vist | 2 | 3 | hit@1 | 2 | 0 | 0 |", "| sugarcrepe | 12 | 24 | accuracy | 0 | 0 | 1 |"]
    (root / "sugar-crepe/data").rename(root / "moved")
    write(root / "sugar-crepe/swap_obj.json", FILES["sugar-crepe/data/swap_obj.json"])
    assert "| sugarcrepe | 2 | 4 | accuracy | 0 | 0 | 6 |" in dry_run_unseen(root, ["sugarcrepe"]), "the files by themselves"


CLOCK = [(1.0, 0.0), (0.9, 0.4358899), (0.6, 0.8), (0.0, 1.0), (-0.6, 0.8), (-1.0, 0.0)]
"""Unit vectors ever further away from the first, where the query `q` points."""
LETTERS = Planned({"q": CLOCK[0]} | dict(zip("abcdef", CLOCK, strict=True)))
TWINS = Planned({"q": CLOCK[0], "true": CLOCK[1], "wrong": CLOCK[1], "worse": CLOCK[2]})


def task_of(cases: Sequence[UnseenQuery], pool: Sequence[str] | Mapping[str, Source], *metrics: str) -> UnseenTask:
    items = pool if isinstance(pool, Mapping) else {text: text for text in pool}
    metrics = metrics or ("hit@1",)
    return UnseenTask("sample", "Sample", Path("sample.json"), tuple(cases), items, metrics, metrics[0])


def asks(*right: str, **options: Any) -> UnseenQuery:
    return UnseenQuery(options.pop("id", "x"), ("q",), right, **options)


def values(outcomes: Sequence[UnseenOutcome], metric: str) -> list[float]:
    return [round(outcome.values[metric], 6) for outcome in outcomes]


def test_metrics_masks_galleries_and_ties_by_hand() -> None:
    outcomes, summary = score(LETTERS, task_of([asks("a", "c", "f"), asks("b"), asks(*"abcdef")], "abcdef", "map@5", "map@2"))
    assert values(outcomes, "map@5") == [round((1 + 2 / 3) / 3, 6), 0.5, 1.0] and values(outcomes, "map@2") == [0.5, 0.5, 1.0]
    assert summary["metrics"]["map@5"] == round((5 / 9 + 0.5 + 1.0) / 3, 4) == summary["value"] and summary["pool"] == 6
    cases = [asks("c", masked=("a", "b")), asks("c"), asks("a", masked=("a",))]
    outcomes, _ = score(LETTERS, task_of(cases, "abcdef", "hit@1", "hit@50"))
    assert [outcome.rank for outcome in outcomes] == [1, 3, 7] and values(outcomes, "hit@1") == [1, 0, 0]
    assert values(outcomes, "hit@50") == [1, 1, 0], "a right image that may not be found is a miss at any depth"
    galleries = [("e", "f", "f"), ("f", "e", "e"), ("c", "c", "d"), ("c", "b"), None]
    cases = [asks((gallery or "c")[0], gallery=gallery) for gallery in galleries]
    outcomes, _ = score(LETTERS, task_of(cases, "abcdef"))
    assert [outcome.rank for outcome in outcomes] == [1, 3, 1, 2, 3], "what stands twice counts twice, but not against itself"
    cases = [asks("true", gallery=("true", other)) for other in ("wrong", "worse")]
    assert score(TWINS, task_of(cases, ["true", "wrong", "worse"], "accuracy"))[1]["value"] == 0.5


def test_groups_their_mean_and_what_was_left_out(tmp_path: Path) -> None:
    whole = task_of([asks("a", group="g"), asks("a", group="g"), asks("b", group="h")], "ab")
    outcomes, summary = score(LETTERS, whole, cache=tmp_path)
    assert summary["groups"] == {"g": {"queries": 2, "hit@1": 1.0}, "h": {"queries": 1, "hit@1": 0.0}}
    assert summary["mean_over_groups"] == {"hit@1": 0.5} and summary["value"] == summary["metrics"]["hit@1"] == 0.6667
    assert score(TWINS, whole, cache=tmp_path) == (outcomes, summary), "embeddings come from the cache"
    lost = LeftOut(images=(Path("gone.jpg"),), cases=tuple(str(n) for n in range(150)))
    _, summary = score(LETTERS, replace(whole, by_group=True, left_out=lost))
    assert summary["value"] == 0.5 and summary["left_out"]["pictures"] == {"count": 1, "names": ["gone.jpg"]}
    assert summary["left_out"]["queries"]["count"] == 150 and len(summary["left_out"]["queries"]["names"]) == NAMED
    with pytest.raises(ModelError, match="not finite"):
        score(Planned({"q": CLOCK[0], "a": (float("nan"), 0.0)}), whole)
    with pytest.raises(InputError, match=r"metrics \['ndcg@5'\] are unknown"):
        score(LETTERS, task_of([asks("a")], "ab", "ndcg@5"))


def test_a_submission_holds_fifty_image_ids_best_first(tmp_path: Path) -> None:
    angles = np.linspace(0, np.pi / 2, 60)
    encoder = Planned({"q": CLOCK[0]} | {f"p{n}": (np.cos(angle), np.sin(angle)) for n, angle in enumerate(angles)})
    images: dict[str, Source] = {str(1000 + n): f"p{n}" for n in range(60)}
    unanswered = task_of([asks(id="0"), asks(id="1", masked=("1001",))], images, "map@5")
    with pytest.raises(InputError, match="query 0 has no right candidate"):
        score(encoder, unanswered)
    rankings = rank_pool(encoder, unanswered, 50)
    path = tmp_path / "out" / "submission.json"
    write_submission(path, rankings)
    written = json.loads(path.read_text())
    assert written["0"] == list(range(1000, 1050)) and written["1"] == [1000, *range(1002, 1051)]
    assert [file.name for file in path.parent.iterdir()] == ["submission.json"]
    with pytest.raises(DataError, match="query 0: 49 different images"):
        write_submission(path, {"0": rankings["0"][:49]})
    with pytest.raises(InputError, match="galleries of their own"):
        rank_pool(encoder, task_of([asks(gallery=("1000",))], images), 1)


def test_images_are_read_and_equal_content_is_best(tmp_path: Path) -> None:
    files: dict[str, Source] = {str(number): tmp_path / f"{number}.png" for number in range(4)}
    for number, file in enumerate(files.values()):
        image_of(number).load().save(file)
    cases = [UnseenQuery(name, (file,), (name,), instruction="find it") for name, file in files.items()]
    outcomes, summary = score(FakeEncoder(), task_of(cases, files))
    assert [outcome.rank for outcome in outcomes] == [1, 1, 1, 1] and summary["reasoned"] == 0.0
