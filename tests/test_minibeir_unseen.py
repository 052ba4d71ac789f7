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
import torch
from PIL import Image

from traceir.errors import DataError, InputError
from traceir.minibeir.build import fingerprint
from traceir.minibeir.garments import Garment
from traceir.minibeir.scenes import Scene
from traceir.minibeir.sprites import Photo
from traceir.minibeir.unseen import captions, changes, pairs
from traceir.minibeir.unseen.build import IMAGES_FILE, MANIFEST, SETS, build_unseen
from traceir.minibeir.unseen.states import StatePart, is_beside, shows

SCENE = Scene((("red", "cube"), ("blue", "ball"), ("red", "star")))
COAT = Garment("coat", "red", "white dots", "long", "sleeveless", "v-neck", False)
FAIR = Photo("Hupu", "Drinu", "fair", "Wobbis", "night")
RIGHT, CONE = SCENE.put(1, ("green", "cone")), "any cone instead of the middle one"
TRADED = Scene((("red", "star"), ("white", "mug"), ("red", "cube")))
TRADE = "swap the outer two, and the other one becomes any mug"


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
    manifest, paths = json.loads((out / MANIFEST).read_bytes()), torch.load(out / "ccneg/ccneg_preprocessed.pt")["image_paths"]
    assert manifest["fingerprint"] == fingerprint(out, MANIFEST)
    assert manifest["sets"] == {"ccneg": {"queries": 12, "candidates": 24, "pictures": 12}}
    shown = [json.loads(line)["path"] for line in (out / IMAGES_FILE).read_text().splitlines()]
    assert shown == [f"ccneg/{path.partition('datasets/')[2]}" for path in paths]
    assert {Image.open(out / name).size for name in shown} == {(192, 192)}
    before = (out / MANIFEST).stat().st_mtime_ns
    assert build_unseen(out, scale="small", seed=0, progress=False) == out and (out / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"seed 0, asked for is 1"):
        build_unseen(out, scale="small", seed=1, progress=False)
    with pytest.raises(InputError, match="not empty"):
        build_unseen(tmp_path, scale="small", seed=0, progress=False)
    unknown: Any = "huge"
    with pytest.raises(InputError, match="scale"):
        build_unseen(tmp_path / "new", scale=unknown, seed=0, progress=False)


RED_COAT, CAPTION = "a red coat with white dots and no sleeves", "a red cube and a blue ball"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (shows(SCENE, ["a red cube", "a star"]), shows(SCENE, ["a red cube", "a cube"])),
        (shows(SCENE, ["a ball", "no green ball"]), shows(SCENE, ["no red cube"])),
        (is_beside(SCENE, "a star", "right", "a cube"), is_beside(SCENE, "a ball", "left", "a cube")),
        (pairs.is_true(RED_COAT, COAT), pairs.is_true("a coat with red dots", COAT)),
        (pairs.is_true("a coat with no belt", COAT), pairs.is_true("a coat with no v-neck", COAT)),
        (pairs.is_true("Hupu and no Vupi in Wobbis", FAIR), pairs.is_true("Hupu at no fair in Wobbis", FAIR)),
        (pairs.is_true("Hupu left of Drinu in Wobbis", FAIR), pairs.is_true("Hupu right of Drinu in Wobbis", FAIR)),
        (pairs.is_small_edit("swap_att", CAPTION, "a blue cube and a red ball"),
         pairs.is_small_edit("swap_att", CAPTION, "a blue cube and a green ball")),
        (pairs.is_small_edit("add_obj", CAPTION, f"{CAPTION} and a mug"),
         pairs.is_small_edit("add_att", CAPTION, "a cube and a blue ball")),
        (pairs.is_small_edit("replace_obj", CAPTION, "a white cube and a blue ball"),
         pairs.is_small_edit("replace_obj", CAPTION, "a white cube and a blue star")),
        (CONE in changes.list_conditions(SCENE, RIGHT), CONE in changes.list_conditions(SCENE, RIGHT.swap(0, 1))),
        (TRADE in changes.list_conditions(SCENE, TRADED), TRADE in changes.list_conditions(SCENE, TRADED.swap(0, 2))),
        (True, changes.list_conditions(SCENE, SCENE)),
    ],
)  # fmt: skip
def test_what_is_seen_is_decided_as_a_person_would(right: bool, wrong: bool) -> None:
    assert right and not wrong


def test_rounds_and_dialogs_refer_to_what_was_before() -> None:
    asked = ["what colour is the right one", "what shape is it", "how many objects have the colour red"]
    assert captions.hold_dialog(asked, SCENE) == ["red", "star", "two"]
    first = changes.apply_round(["has a green base", "has a belt"], [COAT])
    assert (first.colour, first.belt, first.pattern) == ("green", True, "white dots")
    last = changes.apply_round(["has its old colour again", "has no pattern"], [COAT, first])
    assert (last.colour, last.belt, last.pattern) == ("red", True, "plain")
