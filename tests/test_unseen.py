"""The readers of the zero-shot sets, over invented files in the published formats: what is asked, right, and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from traceir.errors import DataError, InputError
from traceir.evaluation.unseen import catalogue, pairs
from traceir.evaluation.unseen.captions import CAPTION_WANTED, read_flickr30k, read_sharegpt4v, read_urban1k
from traceir.evaluation.unseen.circo import CHANGE_WANTED, read_circo
from traceir.evaluation.unseen.genecis import SAME_WANTED, read_genecis
from traceir.evaluation.unseen.mtfiq import read_mtfiq
from traceir.evaluation.unseen.originals import read_cirr, read_fashioniq
from traceir.evaluation.unseen.pairs import read_ccneg, read_sugarcrepe
from traceir.evaluation.unseen.run import rehearse_unseen
from traceir.evaluation.unseen.task import Missing, Task
from traceir.evaluation.unseen.visdial import read_visdial
from traceir.evaluation.unseen.vist import read_vist


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, "a picture, by name alone")
    return folder


def write_sharegpt4v(root: Path) -> None:
    pairs = [
        {"image_name": "a/one.jpg", "caption": "A blue boat.\nIt rests."},
        {"image_name": "two.jpg", "caption": "A red gate."},
    ]
    write(root / "sharegpt4v/datas_for_validation.json", pairs)
    touch(root / "sharegpt4v/val_data", "a/one.jpg", "two.jpg")


def write_urban1k(root: Path) -> None:
    for number in ("1", "2", "10"):
        write(root / f"Urban1k/caption/{number}.txt", f"Street {number}.\nA second line.\n")
        touch(root / "Urban1k/image", f"{number}.jpg")


def write_flickr(root: Path) -> None:
    write(root / "flickr/flickr_text.json", [f"caption {number}" for number in range(10)])
    touch(root / "flickr/images", "0.png", "1.png")


def write_circo(root: Path) -> None:
    images = [{"id": 7, "file_name": "07.jpg"}, {"id": 8, "file_name": "08.jpg"}, {"id": 9, "file_name": "09.jpg"}]
    write(root / "circo/annotations/image_info_unlabeled2017.json", {"images": images})
    query = {"id": 0, "reference_img_id": 7, "relative_caption": "has  two dogs", "shared_concept": "a dog"}
    write(root / "circo/annotations/val.json", [query | {"target_img_id": 8, "gt_img_ids": [8, 9]}])
    write(root / "circo/annotations/test.json", [query])
    touch(root / "circo/unlabeled2017", "07.jpg", "08.jpg", "09.jpg")


def write_genecis(root: Path) -> None:
    def sample(field: str) -> dict[str, Any]:
        reference, target, *gallery = ({field: number} for number in (11, 12, 13, 14))
        return {"reference": reference, "target": target, "gallery": gallery, "condition": "colour"}

    for kind in ("change_object", "focus_object"):
        write(root / f"genecis/annotations/{kind}.json", [sample("val_image_id")])
    for kind in ("change_attribute", "focus_attribute"):
        write(root / f"genecis/annotations/{kind}.json", [sample("image_id"), sample("image_id")])
        crops = [f"{11 + place}_{number}_{place}.jpg" for number in (0, 1) for place in range(4)]
        touch(root / "genecis/visual_genome" / kind, *crops)
    touch(root / "genecis/val2017", *(f"{number:012}.jpg" for number in (11, 12, 13, 14)))


def write_visdial(root: Path) -> None:
    turns = [{"question": 1, "answer": 0, "answer_options": [0]}, {"question": 0, "answer": 1}]
    dialogs = [{"image_id": 42, "caption": "not shown", "dialog": turns}]
    data = {"questions": ["is it big", "is it red"], "answers": ["yes", "no"], "dialogs": dialogs}
    write(root / "visdial/visdial_1.0_val.json", {"split": "val", "data": data})
    touch(root / "visdial/VisualDialog_val2018", "VisualDialog_val2018_000000000042.jpg")


def write_vist(root: Path) -> None:
    def step(story: str, photo: str, place: int, text: str) -> list[dict[str, Any]]:
        return [{"story_id": story, "photo_flickr_id": photo, "worker_arranged_photo_order": place, "text": text}]

    steps = [
        step("s1", "b", 1, "then b"),
        step("s1", "a", 0, "first a"),
        step("s1", "c", 2, "last c"),
        step("s2", "a", 0, "only a"),
    ]
    write(root / "vist/sis/val.story-in-sequence.json", {"images": [], "annotations": steps})
    touch(root / "vist/images", "a.jpg", "b.png", "c.gif")


def write_mtfiq(root: Path) -> None:
    turns = [["http://x", ["is  blue ", ""], "B1"], ["http://y", [" is longer", "has sleeves"], "B2"]]
    write(root / "multiturnfashion/data/all.val.json", [{"target": ["http://z", "B3"], "reference": turns}])
    write(root / "multiturnfashion/image_splits/split.all.val.json", ["B1", "B2", "B3", "B4"])
    touch(root / "mbeir_images/fashioniq_images", "B1.jpg", "B2.jpg", "B3.jpg", "B4.jpg")


def write_ccneg(root: Path, count: int = 3) -> None:
    annotations = [
        {"json": {"caption": f"cup, {n}"}, "sop_data": {"negative-prompt": f"cup, not {n},"}, "num": n} for n in range(count)
    ]
    paths = [f"/authors/datasets/cc3m/part/{n}.jpg" for n in range(count)]
    (root / "ccneg").mkdir(parents=True, exist_ok=True)
    torch.save({"image_paths": paths, "annotations": annotations}, root / "ccneg/ccneg_preprocessed.pt")
    touch(root / "ccneg/cc3m/part", *(f"{n}.jpg" for n in range(count)))


def write_sugarcrepe(root: Path) -> None:
    for kind in pairs.SUGARCREPE_FILES:
        entry = {"filename": "000000000001.jpg", "caption": f"{kind} true", "negative_caption": f"{kind} wrong"}
        write(root / f"sugar-crepe/data/{kind}.json", {"0": entry, "2": entry})
    touch(root / "sugar-crepe/val2017", "000000000001.jpg")


WRITERS: tuple[Callable[[Path], None], ...] = (
    write_sharegpt4v, write_urban1k, write_flickr, write_circo, write_genecis,
    write_visdial, write_vist, write_mtfiq, write_ccneg, write_sugarcrepe,
)  # fmt: skip


def names(*sources: object) -> list[object]:
    return [source.name if isinstance(source, Path) else source for source in sources]


def test_pairs_of_image_and_caption_are_asked_both_ways(tmp_path: Path) -> None:
    write_sharegpt4v(tmp_path)
    to_image, to_text = read_sharegpt4v(tmp_path)
    assert [(case.parts, case.relevant, case.instruction, case.target) for case in to_image.cases] == [
        (("A blue boat. It rests.",), ("0",), None, "image"),
        (("A red gate.",), ("1",), None, "image"),
    ]
    assert names(*to_image.pool.values()) == ["one.jpg", "two.jpg"]
    assert [(names(*case.parts), case.relevant, case.instruction, case.target) for case in to_text.cases] == [
        (["one.jpg"], ("0",), CAPTION_WANTED, "text"),
        (["two.jpg"], ("1",), CAPTION_WANTED, "text"),
    ]
    assert to_text.pool == {"0": "A blue boat. It rests.", "1": "A red gate."}


def test_urban1k_pairs_by_file_name_and_reads_the_first_line(tmp_path: Path) -> None:
    write_urban1k(tmp_path)
    to_image, _ = read_urban1k(tmp_path)
    assert [case.parts for case in to_image.cases] == [("Street 1.",), ("Street 2.",), ("Street 10.",)]
    assert [str(to_image.pool[case.relevant[0]]).rpartition("/")[2] for case in to_image.cases] == ["1.jpg", "2.jpg", "10.jpg"]
    write(tmp_path / "Urban1k/caption/2.txt", "\nnot the first line")
    with pytest.raises(DataError, match=r"2\.txt:1: is blank"):
        read_urban1k(tmp_path)


def test_a_flickr_image_has_five_right_captions(tmp_path: Path) -> None:
    write_flickr(tmp_path)
    to_image, to_text = read_flickr30k(tmp_path)
    assert [case.relevant for case in to_text.cases] == [("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")]
    assert [case.relevant for case in to_image.cases] == [("0",)] * 5 + [("1",)] * 5
    write(tmp_path / "flickr/flickr_text.json", ["caption"] * 6)
    with pytest.raises(DataError, match="6 captions are not five"):
        read_flickr30k(tmp_path)


def test_circo_ranks_all_images_and_has_several_right_ones(tmp_path: Path) -> None:
    write_circo(tmp_path)
    task = read_circo(tmp_path)
    (case,) = task.cases
    assert (names(*case.parts), case.relevant, case.instruction) == (["07.jpg", "has  two dogs"], ("8", "9"), CHANGE_WANTED)
    assert list(task.pool) == ["7", "8", "9"] and not case.masked and task.main == "map@5"
    assert read_circo(tmp_path, split="test").cases[0].relevant == ()


def test_genecis_names_coco_images_and_crops(tmp_path: Path) -> None:
    write_genecis(tmp_path)
    task = read_genecis(tmp_path)
    cases = {case.id: case for case in task.cases}
    assert list(cases) == ["change_object/0", "focus_object/0"] + [
        f"{k}_attribute/{n}" for k in ("change", "focus") for n in (0, 1)
    ]
    whole, crop = cases["focus_object/0"], cases["focus_attribute/1"]
    assert names(*whole.parts) == ["000000000011.jpg", "colour"] and whole.instruction == CHANGE_WANTED
    assert names(*(task.pool[id] for id in whole.gallery or ())) == [f"{number:012}.jpg" for number in (12, 13, 14)]
    assert names(*crop.parts) == ["11_1_0.jpg", "colour"] and crop.instruction == SAME_WANTED
    assert names(*(task.pool[id] for id in crop.gallery or ())) == ["12_1_1.jpg", "13_1_2.jpg", "14_1_3.jpg"]
    assert crop.gallery is not None and crop.relevant == crop.gallery[:1] and crop.group == "focus_attribute"
    assert task.by_group and task.main == "hit@1"


def test_a_dialog_is_one_text_without_its_caption(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    task = read_visdial(tmp_path)
    assert task.cases[0].parts == ("Q: is it red? A: yes. Q: is it big? A: no.",) and task.cases[0].relevant == ("42",)


def test_a_story_alternates_captions_and_images_and_masks_what_it_showed(tmp_path: Path) -> None:
    write_vist(tmp_path)
    task = read_vist(tmp_path)
    story, single = task.cases
    assert names(*story.parts) == ["first a", "a.jpg", "then b", "b.png", "last c"]
    assert (story.relevant, story.masked) == (("c",), ("a", "b"))
    assert (names(*single.parts), single.relevant, single.masked) == (["only a"], ("a",), ())
    assert names(*task.pool.values()) == ["a.jpg", "b.png", "c.gif"]


def test_every_turn_of_a_search_for_a_garment_is_image_then_feedback(tmp_path: Path) -> None:
    write_mtfiq(tmp_path)
    task = read_mtfiq(tmp_path)
    assert names(*task.cases[0].parts) == ["B1.jpg", "is  blue", "B2.jpg", "is longer and has sleeves"]
    assert task.cases[0].relevant == ("B3",) and list(task.pool) == ["B1", "B2", "B3", "B4"]
    elsewhere = touch(tmp_path / "elsewhere", "B1.jpg", "B2.jpg", "B3.jpg", "B4.jpg")
    assert read_mtfiq(tmp_path, images=elsewhere).pool["B4"] == elsewhere / "B4.jpg"


def test_ccneg_takes_the_last_items_and_the_commas_out_of_the_negation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "CCNEG_ITEMS", 2)
    write_ccneg(tmp_path)
    task = read_ccneg(tmp_path)
    assert [case.id for case in task.cases] == ["1", "2"]
    assert [task.pool[id] for id in task.cases[1].gallery or ()] == ["cup, 2", "cup not 2"]
    assert task.cases[1].parts == (tmp_path / "ccneg/cc3m/part/2.jpg",) and task.cases[1].instruction is None
    write_ccneg(tmp_path, count=1)
    assert len(read_ccneg(tmp_path).cases) == 1


class Unsafe:
    """What a hostile file asks for when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_file_that_asks_to_run_code_is_refused(tmp_path: Path) -> None:
    write_ccneg(tmp_path)
    torch.save({"image_paths": [Unsafe(tmp_path / "harm")], "annotations": []}, tmp_path / "ccneg/ccneg_preprocessed.pt")
    with pytest.raises(DataError, match=r"ccneg_preprocessed\.pt: is refused .*mkdir.*could run code"):
        read_ccneg(tmp_path)
    assert not (tmp_path / "harm").exists()
    for damaged in (b"", b"PK\x03\x04 cut off", b"<html>"):
        (tmp_path / "ccneg/ccneg_preprocessed.pt").write_bytes(damaged)
        with pytest.raises(DataError, match=r"(?i)download it"):
            read_ccneg(tmp_path)


def test_sugarcrepe_keeps_its_files_apart(tmp_path: Path) -> None:
    write_sugarcrepe(tmp_path)
    task = read_sugarcrepe(tmp_path)
    assert [case.id for case in task.cases[:3]] == ["add_obj/0", "add_obj/2", "add_att/0"]
    assert {case.group for case in task.cases} == set(pairs.SUGARCREPE_FILES) and not task.by_group
    assert [task.pool[id] for id in task.cases[2].gallery or ()] == ["add_att true", "add_att wrong"]
    (tmp_path / "sugar-crepe/data/swap_obj.json").unlink()
    with pytest.raises(DataError, match=r"1 annotation files are missing, first .*swap_obj\.json"):
        read_sugarcrepe(tmp_path)
    assert names(*read_sugarcrepe(tmp_path, "skip").left_out.files) == ["swap_obj.json"]


def test_cirr_masks_the_reference_and_ranks_its_image_set(tmp_path: Path) -> None:
    split = write(tmp_path / "split.json", {name: f"./dev/{name}.png" for name in "abcd"})
    touch(tmp_path / "dev", "a.png", "b.png", "c.png", "d.png")
    entry = {"pairid": 5, "reference": "b", "target_hard": "c", "caption": "add one", "img_set": {"members": ["a", "b", "c"]}}
    captions = write(tmp_path / "cap.json", [entry])
    whole, subset = read_cirr(captions, split, tmp_path)
    (case,), (small,) = whole.cases, subset.cases
    assert (names(*case.parts), case.relevant, case.masked, case.gallery) == (["b.png", "add one"], ("c",), ("b",), None)
    assert (small.gallery, small.relevant, list(whole.pool)) == (("a", "c"), ("c",), ["a", "b", "c", "d"])
    write(captions, [entry | {"target_hard": "d"}])
    with pytest.raises(DataError, match=r"cap\.json, entry 0: target_hard is 'd'"):
        read_cirr(captions, split, tmp_path)


def test_fashioniq_joins_its_two_captions(tmp_path: Path) -> None:
    entry = {"candidate": "A", "target": "B", "captions": ["is blue", " longer "]}
    captions = write(tmp_path / "cap.json", [entry, entry | {"captions": [" ", "red"]}])
    split = write(tmp_path / "split.json", ["A", "B"])
    task = read_fashioniq("dress", captions, split, touch(tmp_path / "images", "A.jpg", "B.jpg"))
    assert [names(*case.parts) for case in task.cases] == [["A.jpg", "is blue and longer"], ["A.jpg", "red"]]
    assert task.cases[0].masked == () and task.cases[0].relevant == ("B",) and task.main == "hit@10"


def test_the_catalogue_reads_the_13_columns_in_the_order_of_the_table(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    assert catalogue.find_columns(tmp_path) == ["visdial"]
    for one in WRITERS:
        one(tmp_path)
    assert catalogue.find_columns(tmp_path) == list(catalogue.COLUMNS)
    tasks = list(catalogue.read_columns(tmp_path, catalogue.COLUMNS))
    assert [task.name for task in tasks] == list(catalogue.COLUMNS) and len(tasks) == 13
    assert [task.main for task in tasks[6:]] == ["map@5", "hit@1", "hit@1", "hit@1", "hit@5", "accuracy", "accuracy"]
    for task in tasks:
        assert task.main in task.metrics and task.cases[0].query().id == task.cases[0].id
        assert task.item(next(iter(task.pool))).parts and not task.left_out
    with pytest.raises(InputError, match="unknown"):
        next(catalogue.read_columns(tmp_path, ["flickr8k"]))


Read = Callable[[Path, Missing], Task]
BROKEN: list[tuple[Callable[[Path], None], Read, str, object, str]] = [
    (write_visdial, read_visdial, "visdial/visdial_1.0_val.json", '{"data":\n {', r"val\.json:2: column 3"),
    (write_visdial, read_visdial, "visdial/visdial_1.0_val.json", {"data": {"questions": []}}, "data: answers is missing"),
    (write_circo, read_circo, "circo/annotations/val.json", [], "circo has no queries"),
    (write_circo, read_circo, "circo/annotations/val.json", [{"id": 0, "reference_img_id": 5}], "entry 0: reference_img_id is 5"),
    (write_circo, read_circo, "circo/annotations/image_info_unlabeled2017.json", {"images": 3}, "images is 3; it must be a list"),
    (write_circo, read_circo, "circo/annotations/image_info_unlabeled2017.json",
     {"images": [{"id": 1, "file_name": "../key"}]}, "'../key' is not a file below"),
    (write_genecis, read_genecis, "genecis/annotations/focus_object.json",
     [{"reference": {}, "target": {}, "gallery": []}], r"entry 0, reference: val_image_id is missing"),
    (write_vist, read_vist, "vist/sis/val.story-in-sequence.json", {"annotations": [{}]}, "annotations 0: is {}"),
    (write_mtfiq, read_mtfiq, "multiturnfashion/image_splits/split.all.val.json", [], "the pool of mtfiq is empty"),
    (write_mtfiq, read_mtfiq, "multiturnfashion/image_splits/split.all.val.json", ["B1"], "1 ids are not in the pool"),
    (write_mtfiq, read_mtfiq, "multiturnfashion/data/all.val.json",
     [{"target": ["", "B1"], "reference": [["", "blue", "B1"]]}], "it must be a list of turns"),
    (write_sugarcrepe, read_sugarcrepe, "sugar-crepe/data/add_att.json",
     {"9": {"filename": "a.jpg", "caption": " "}}, r"add_att\.json, 9: caption is ' '"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "read", "file", "content", "message"), BROKEN, ids=[row[4] for row in BROKEN])
def test_broken_files_are_refused_with_their_place(
    tmp_path: Path, build: Callable[[Path], None], read: Read, file: str, content: object, message: str
) -> None:
    build(tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, "stop")


def test_a_number_beyond_the_questions_is_refused(tmp_path: Path) -> None:
    write_visdial(tmp_path)
    path = tmp_path / "visdial/visdial_1.0_val.json"
    content = json.loads(path.read_text())
    content["data"]["dialogs"][0]["dialog"][1]["question"] = 2
    write(path, content)
    with pytest.raises(
        DataError, match="dialogs 0, dialog 1: question is 2; it must be an integer of at least 0 and less than 2"
    ):
        read_visdial(tmp_path)


def test_missing_images_stop_or_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_vist(tmp_path)
    (tmp_path / "vist/images/b.png").unlink()
    with pytest.raises(DataError, match=r"1 pictures are missing, first .*b\.jpg"):
        read_vist(tmp_path)
    task = read_vist(tmp_path, "skip")
    assert [case.id for case in task.cases] == ["s2"] and list(task.pool) == ["a", "c"]
    assert (task.left_out.cases, task.left_out.candidates) == (("s1",), ("b",))
    assert names(*task.left_out.images) == ["b.jpg"] and "left out 1 of 2 queries (first: s1)" in caplog.text
    (tmp_path / "vist/images/a.jpg").unlink()
    with pytest.raises(DataError, match="no query of vist is left: 2 pictures are missing"):
        read_vist(tmp_path, "skip")


def test_a_query_without_its_whole_gallery_or_all_its_right_images_is_left_out(tmp_path: Path) -> None:
    write_genecis(tmp_path)
    (tmp_path / "genecis/visual_genome/focus_attribute/14_1_3.jpg").unlink()
    assert read_genecis(tmp_path, "skip").left_out.cases == ("focus_attribute/1",)
    write_circo(tmp_path)
    queries = json.loads((tmp_path / "circo/annotations/val.json").read_text())
    write(tmp_path / "circo/annotations/val.json", [*queries, queries[0] | {"id": 1, "gt_img_ids": [8]}])
    (tmp_path / "circo/unlabeled2017/09.jpg").unlink()
    task = read_circo(tmp_path, "skip")
    assert ([case.id for case in task.cases], list(task.pool), task.left_out.cases) == (["1"], ["7", "8"], ("0",))


def test_a_query_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    write_circo(tmp_path)
    path = tmp_path / "circo/annotations/val.json"
    write(path, json.loads(path.read_text()) * 2)
    with pytest.raises(DataError, match="query id '0' occurs a second time"):
        read_circo(tmp_path)


def test_annotations_alone_are_counted_in_a_dry_run(tmp_path: Path) -> None:
    """The authors' folders side by side, without a picture: SugarCrepe's files by themselves, CIRR, one FashionIQ category."""
    for folder in ("sugar-crepe", "cirr", "fashion-iq"):
        (tmp_path / folder).mkdir()
    pair = {"0": {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}}
    (tmp_path / "sugar-crepe" / "swap_obj.json").write_text(json.dumps(pair))
    members = ["dev-1", "dev-2", "dev-3"]
    asked = {"pairid": 7, "reference": "dev-1", "target_hard": "dev-2", "caption": "in red", "img_set": {"members": members}}
    (tmp_path / "cirr" / "cap.rc2.val.json").write_text(json.dumps([asked]))
    (tmp_path / "cirr" / "split.rc2.val.json").write_text(json.dumps({name: f"./dev/{name}.png" for name in members}))
    names = ["sugarcrepe", "cirr", "cirr_subset"]
    text = rehearse_unseen(tmp_path, names)
    assert "| sugarcrepe | 1 | 2 | accuracy | 1 | 0 | 6 |" in text
    assert "| cirr | 1 | 3 | hit@5 | 3 | 0 | 0 |" in text and "| cirr_subset | 1 | 3 | hit@1 | 3 | 0 | 0 |" in text
    assert catalogue.find_columns(tmp_path) == [*names, "fashioniq_dress", "fashioniq_shirt", "fashioniq_toptee"]
    with pytest.raises(DataError, match=r"split\.dress\.val\.json"):
        rehearse_unseen(tmp_path)
