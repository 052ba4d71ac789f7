"""The unseen sets: published layouts, frozen bytes, texts that are true of their images alone, refusals."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from traceir.errors import DataError, InputError
from traceir.minibeir.build import fingerprint, read_torch
from traceir.minibeir.garments import Garment
from traceir.minibeir.scenes import Scene
from traceir.minibeir.sprites import Photo
from traceir.minibeir.unseen import captions, changes, pairs
from traceir.minibeir.unseen.build import IMAGES_FILE, MANIFEST, SETS, build_unseen
from traceir.minibeir.unseen.states import StatePart, is_beside, shows

SCENE = Scene((("red", "cube"), ("blue", "ball"), ("red", "star")))
COAT = Garment("coat", "red", "white dots", "long", "sleeveless", "v-neck", False)
FAIR = Photo("Hupu", "Drinu", "fair", "Wobbis", "night")


@cache
def make(name: str) -> StatePart:
    return SETS[name].make(2 if name in ("genecis", "sugarcrepe") else 4, random.Random(f"seed {name}"))


def test_the_sets_stay_as_published() -> None:
    """The digest changes only with a new version of the benchmark."""
    digest = hashlib.sha256()
    for name in SETS:
        SETS[name].check(make(name))
        assert all(state.split == "test" for state in make(name).shown.values())
        digest.update(str([make(name).files, list(make(name).shown.items())]).encode())
    assert digest.hexdigest()[:16] == "c6fb631b7af4ecff"


def test_the_layouts_are_the_published_ones(unseen_folder: Path) -> None:
    root = unseen_folder

    def load(name: str) -> Any:
        return json.loads((root / name).read_bytes())

    named = {f"sharegpt4v/val_data/{each['image_name']}" for each in load("sharegpt4v/datas_for_validation.json")}
    named |= {f"Urban1k/image/{path.stem}.jpg" for path in (root / "Urban1k/caption").iterdir()}
    named |= {f"flickr/images/{place}.png" for place in range(len(load("flickr/flickr_text.json")) // 5)}
    circo = {split: load(f"circo/annotations/{split}.json") for split in ("val", "test", "image_info_unlabeled2017")}
    assert {tuple(each) for each in circo["test"]} == {("id", "reference_img_id", "relative_caption")}
    assert {tuple(each)[3:] for each in circo["val"]} == {("target_img_id", "gt_img_ids")}
    named |= {f"circo/unlabeled2017/{each['file_name']}" for each in circo["image_info_unlabeled2017"]["images"]}
    data = load("visdial/visdial_1.0_val.json")["data"]
    assert all(len(dialog["dialog"]) == 10 for dialog in data["dialogs"])
    assert not any(text.endswith(("?", ".")) for text in (*data["questions"], *data["answers"]))
    lines = [line for (line,) in load("vist/sis/val.story-in-sequence.json")["annotations"]]
    assert [line["worker_arranged_photo_order"] for line in lines] == [0, 1, 2, 3, 4] * (len(lines) // 5)
    assert {path.stem for path in (root / "vist/images").iterdir()} == {line["photo_flickr_id"] for line in lines}
    pool = load("multiturnfashion/image_splits/split.all.val.json")
    named |= {f"mbeir_images/fashioniq_images/{name}.jpg" for name in pool}
    paths = read_torch(root / "ccneg/ccneg_preprocessed.pt")["image_paths"]
    named |= {f"ccneg/cc3m/{path.partition('datasets/cc3m/')[2]}" for path in paths}
    for kind in pairs.KINDS:
        named |= {f"sugar-crepe/val2017/{each['filename']}" for each in load(f"sugar-crepe/data/{kind}.json").values()}
    shown = {json.loads(line)["path"] for line in (root / IMAGES_FILE).read_text().splitlines()}
    assert named <= shown and {Image.open(root / name).size for name in shown} == {(192, 192)}
    manifest = load(MANIFEST)
    assert manifest["fingerprint"] == fingerprint(root, MANIFEST) and manifest["sets"].keys() == SETS.keys()


DAMAGES: list[tuple[str, str, Callable[[Any], object]]] = [
    ("sharegpt4v", "sharegpt4v/datas_for_validation.json", lambda c: c[0].update(caption=c[1]["caption"])),
    ("flickr", "flickr/flickr_text.json", lambda c: c.insert(0, c.pop())),
    ("circo", "circo/annotations/val.json", lambda c: c[0]["gt_img_ids"].pop()),
    ("circo", "circo/annotations/val.json", lambda c: c[0]["gt_img_ids"].append(c[0]["reference_img_id"])),
    ("genecis", "genecis/annotations/focus_object.json", lambda c: c[0]["gallery"].__setitem__(3, c[0]["target"])),
    ("genecis", "genecis/annotations/change_object.json", lambda c: c[0].update(target=c[0]["gallery"][1])),
    (
        "visdial",
        "visdial/visdial_1.0_val.json",
        lambda c: c["data"]["dialogs"][0].update(dialog=c["data"]["dialogs"][2]["dialog"]),
    ),
    ("vist", "vist/sis/val.story-in-sequence.json", lambda c: c["annotations"][4].__setitem__(0, c["annotations"][14][0])),
    ("vist", "vist/sis/val.story-in-sequence.json", lambda c: c["annotations"][0][0].update(text="now the left one is a mug")),
    ("multiturnfashion", "multiturnfashion/data/all.val.json", lambda c: c[0]["target"].__setitem__(1, c[0]["reference"][0][2])),
    ("ccneg", "ccneg/ccneg_preprocessed.pt", lambda c: c["annotations"][0]["json"].update(caption="a cube, and a ball")),
    ("sugarcrepe", "sugar-crepe/data/swap_att.json", lambda c: c["0"].update(negative_caption=c["0"]["caption"])),
    ("sugarcrepe", "sugar-crepe/data/add_obj.json", lambda c: c["1"].update(caption=c["1"]["negative_caption"])),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[1])
def test_what_breaks_a_rule_is_noticed(damage: tuple[str, str, Callable[[Any], object]]) -> None:
    name, file, change = damage
    part = copy.deepcopy(make(name))
    change(part.files[file])
    assert part.files[file] != make(name).files[file]
    with pytest.raises((DataError, KeyError)):
        SETS[name].check(part)


def test_a_build_is_whole_or_not_there_and_other_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traceir.minibeir.unseen.build.SETS", {"ccneg": SETS["ccneg"]})
    out = build_unseen(tmp_path / "built", scale="small", seed=0, progress=False)
    again = build_unseen(tmp_path / "again", scale="small", seed=0, progress=False)
    assert fingerprint(again) == fingerprint(out) and sorted(path.name for path in tmp_path.iterdir()) == ["again", "built"]
    before = (out / MANIFEST).stat().st_mtime_ns
    assert build_unseen(out, scale="small", seed=0, progress=False) == out and (out / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"seed 0, asked for is 1"):
        build_unseen(out, scale="small", seed=1, progress=False)
    with pytest.raises(InputError, match="not empty"):
        build_unseen(tmp_path, scale="small", seed=0, progress=False)
    unknown: Any = "huge"
    with pytest.raises(InputError, match="scale"):
        build_unseen(tmp_path / "new", scale=unknown, seed=0, progress=False)


def test_sights_are_judged_as_a_person_would() -> None:
    assert shows(SCENE, ["a red cube", "a star"]) and not shows(SCENE, ["a red cube", "a cube"])
    assert shows(SCENE, ["a ball", "no green ball"]) and not shows(SCENE, ["no red cube"])
    assert is_beside(SCENE, "a star", "right", "a cube") and not is_beside(SCENE, "a ball", "left", "a cube")
    assert pairs.is_true("a red coat with white dots and no sleeves", COAT) and not pairs.is_true("a coat with red dots", COAT)
    assert pairs.is_true("a coat with no belt", COAT) and not pairs.is_true("a coat with no v-neck", COAT)
    assert pairs.is_true("Hupu and no Vupi in Wobbis", FAIR) and not pairs.is_true("Hupu at no fair in Wobbis", FAIR)
    assert pairs.is_true("Hupu left of Drinu in Wobbis", FAIR) and not pairs.is_true("Hupu right of Drinu in Wobbis", FAIR)
    caption = "a red cube and a blue ball"
    assert pairs.is_small_edit("swap_att", caption, "a blue cube and a red ball")
    assert not pairs.is_small_edit("swap_att", caption, "a blue cube and a green ball")
    assert not pairs.is_small_edit("add_att", caption, "a cube and a blue ball")
    assert not pairs.is_small_edit("replace_obj", caption, "a white cube and a blue star")
    asked = ["what colour is the right one", "what shape is it", "how many objects have the colour red"]
    assert captions.hold_dialog(asked, SCENE) == ["red", "star", "two"]
    first = changes.apply_round(["has a green base", "has a belt"], [COAT])
    assert (first.colour, first.belt, first.pattern) == ("green", True, "white dots")
    last = changes.apply_round(["has its old colour again", "has no pattern"], [COAT, first])
    assert (last.colour, last.belt, last.pattern) == ("red", True, "plain")


def test_a_condition_leaves_open_what_it_does_not_say() -> None:
    right = SCENE.put(1, ("green", "cone"))
    assert "any cone instead of the middle one" in changes.list_conditions(SCENE, right)
    assert not changes.list_conditions(SCENE, SCENE)
    assert "any cone instead of the middle one" not in changes.list_conditions(SCENE, right.swap(0, 1))
    swapped = Scene((("red", "star"), ("white", "mug"), ("red", "cube")))
    condition = "swap the outer two, and the other one becomes any mug"
    assert condition in changes.list_conditions(SCENE, swapped) and condition not in changes.list_conditions(
        SCENE, swapped.swap(0, 2)
    )
