"""The unseen sets at small scale: published layouts, equal bytes, texts that are true of their pictures, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from traceir.errors import DataError, InputError
from traceir.minibeir.drawing import split_of
from traceir.minibeir.garments import Garment
from traceir.minibeir.news import assign_split
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import Scene
from traceir.minibeir.unseen import captions, dialogs, edits, pairs, turns
from traceir.minibeir.unseen.build import MANIFEST, SETS, build_unseen, fingerprint
from traceir.minibeir.unseen.language import WORDS, Phrase, read
from traceir.minibeir.unseen.states import find_state, has_trim, is_beside, shows
from traceir.minibeir.unseen.verify import IMAGES_FILE, read_images, read_torch, verify_unseen

BANKS: list[Any] = [
    tuple(captions.LONG_SCENE.values()),
    tuple(captions.LONG_PHOTO.values()),
    captions.FIVE_SCENE,
    captions.FIVE_GARMENT,
    captions.FIVE_PHOTO,
    edits.CONDITIONS,
    edits.GARMENT_FOCUS["change_attribute"],
    dialogs.SCENE_QUESTIONS,
    dialogs.PHOTO_QUESTIONS,
    turns.SCENE_CHANGES,
    turns.PHOTO_CHANGES,
    (*turns.GARMENT_CHANGES, *turns.GARMENT_RETURNS),
    pairs.SCENE_CAPTIONS,
    pairs.GARMENT_CAPTIONS,
    pairs.PHOTO_CAPTIONS,
]
SCENE = Scene((("red", "cube"), ("blue", "ball"), ("red", "star")))
COAT = Garment("coat", "red", "white dots", "long", "sleeveless", "v-neck", False)
FAIR = Photo("Hupu", "Drinu", "fair", "Wobbis", "night")


@pytest.fixture(scope="module")
def root(unseen_folder: Path) -> Path:
    return unseen_folder


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_layouts_are_the_published_ones(root: Path) -> None:
    named = [
        root / "sharegpt4v" / "val_data" / each["image_name"] for each in load(root / "sharegpt4v/datas_for_validation.json")
    ]
    named += [root / f"Urban1k/image/{number}.jpg" for number in range(1, 13)]
    assert len(list((root / "Urban1k/caption").glob("*.txt"))) == 12
    named += [root / f"flickr/images/{place}.png" for place in range(len(load(root / "flickr/flickr_text.json")) // 5)]
    circo = root / "circo/annotations"
    files = {each["id"]: each["file_name"] for each in load(circo / "image_info_unlabeled2017.json")["images"]}
    assert all(each["reference_img_id"] in files and set(each["gt_img_ids"]) <= files.keys() for each in load(circo / "val.json"))
    assert {tuple(each) for each in load(circo / "test.json")} == {("id", "reference_img_id", "relative_caption")}
    named += [root / "circo/unlabeled2017" / name for name in files.values()]
    for name in ("focus_object", "change_attribute"):
        for sample, each in enumerate(load(root / f"genecis/annotations/{name}.json")):
            for crop, shown in enumerate([each["reference"], each["target"], *each["gallery"]]):
                file = f"visual_genome/{name}/{shown['image_id']}_{sample}_{crop}.jpg" if "image_id" in shown else None
                named.append(root / "genecis" / (file or f"val2017/{shown['val_image_id']:012}.jpg"))
    data = load(root / "visdial/visdial_1.0_val.json")["data"]
    assert all(len(dialog["dialog"]) == 10 for dialog in data["dialogs"])
    assert not any(text.endswith(("?", ".")) for text in (*data["questions"], *data["answers"]))
    for dialog in data["dialogs"]:
        named.append(root / f"visdial/VisualDialog_val2018/VisualDialog_val2018_{dialog['image_id']:012}.jpg")
    lines = [line for (line,) in load(root / "vist/sis/val.story-in-sequence.json")["annotations"]]
    assert [line["worker_arranged_photo_order"] for line in lines] == [0, 1, 2, 3, 4] * 12
    shown_in = {path.stem: path for path in (root / "vist/images").iterdir()}
    assert {path.suffix for path in shown_in.values()} == {".jpg", ".png", ".gif"}
    named += [shown_in[line["photo_flickr_id"]] for line in lines]
    pool = load(root / "multiturnfashion/image_splits/split.all.val.json")
    for each in load(root / "multiturnfashion/data/all.val.json"):
        assert {each["target"][1], *(item[2] for item in each["reference"])} <= set(pool)
    named += [root / f"mbeir_images/fashioniq_images/{name}.jpg" for name in pool]
    data = read_torch(root / "ccneg/ccneg_preprocessed.pt")
    assert len(data["image_paths"]) == len(data["annotations"]) == 12
    named += [root / "ccneg/cc3m" / path.partition("datasets/cc3m/")[2] for path in data["image_paths"]]
    for name in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        entries = load(root / f"sugar-crepe/data/{name}.json")
        assert list(entries) == ["0", "1"]
        named += [root / "sugar-crepe/val2017" / each["filename"] for each in entries.values()]
    assert {Image.open(path).size for path in named} == {(192, 192)}


def test_a_build_is_a_function_of_its_seed(root: Path, tmp_path: Path) -> None:
    again = build_unseen(tmp_path / "again", scale="small", seed=0, progress=False)
    assert contents(again) == contents(root)
    manifest = load(root / MANIFEST)
    assert manifest["fingerprint"] == fingerprint(root) and manifest["sets"].keys() == SETS.keys()
    for name in ("sharegpt4v", "circo", "vist", "sugarcrepe"):
        one, other = (SETS[name].make(2, random.Random(seed)) for seed in (1, 2))
        assert one.files != other.files, name


def test_only_test_compositions_are_shown(root: Path) -> None:
    for state in read_images(root).values():
        assert (assign_split(state) if isinstance(state, Photo) else split_of(state.code)) == "test"
    taught = next(scene for scene in edits.itertools.product(edits.ITEMS, repeat=3) if split_of(Scene(scene).code) == "train")
    with pytest.raises(DataError, match="no composition of the test split"):
        find_state(Scene(taught).sketch(5).key)


def test_no_caption_is_in_a_phrasing_of_training(root: Path) -> None:
    shown = read_images(root)
    for place, text in enumerate(load(root / "flickr/flickr_text.json")):
        state = shown[f"flickr/images/{place // 5}.png"]
        if not isinstance(state, Photo):
            assert text not in {state.caption(style) for style in range(4)}
    for each in load(root / "sharegpt4v/datas_for_validation.json"):
        assert len(each["caption"].split()) > 35


def edit_json(path: str, change: Callable[[Any], object]) -> tuple[str, Callable[[str], str]]:
    def rewrite(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return path, rewrite


DAMAGES: list[tuple[str, Callable[[str], str]]] = [
    edit_json("sharegpt4v/datas_for_validation.json", lambda c: c[0].update(caption=c[1]["caption"])),
    ("Urban1k/caption/1.txt", lambda text: text.replace("left", "right", 1) if "left" in text else text.replace("right", "left")),
    edit_json("flickr/flickr_text.json", lambda c: c.insert(0, c.pop())),
    edit_json("circo/annotations/val.json", lambda c: c[0]["gt_img_ids"].pop()),
    edit_json("circo/annotations/val.json", lambda c: c[0]["gt_img_ids"].append(c[0]["reference_img_id"])),
    edit_json("genecis/annotations/focus_object.json", lambda c: c[0]["gallery"].__setitem__(3, c[0]["target"])),
    edit_json("genecis/annotations/change_object.json", lambda c: c[0].update(target=c[0]["gallery"][1])),
    edit_json("visdial/visdial_1.0_val.json", lambda c: c["data"]["dialogs"][0].update(dialog=c["data"]["dialogs"][2]["dialog"])),
    edit_json("vist/sis/val.story-in-sequence.json", lambda c: c["annotations"][4].__setitem__(0, c["annotations"][14][0])),
    edit_json("multiturnfashion/data/all.val.json", lambda c: c[0]["target"].__setitem__(1, c[0]["reference"][0][2])),
    edit_json("sugar-crepe/data/swap_att.json", lambda c: c["0"].update(negative_caption=c["0"]["caption"])),
    edit_json("sugar-crepe/data/add_obj.json", lambda c: c["1"].update(caption=c["1"]["negative_caption"])),
    (IMAGES_FILE, lambda text: text.partition("\n")[2]),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[0])
def test_verify_notices(root: Path, damage: tuple[str, Callable[[str], str]]) -> None:
    path = root / damage[0]
    whole = path.read_text(encoding="utf-8")
    assert damage[1](whole) != whole
    try:
        path.write_text(damage[1](whole), encoding="utf-8")
        with pytest.raises(DataError, match=r"draw another|draw the picture|build again|phrases"):
            verify_unseen(root)
    finally:
        path.write_text(whole, encoding="utf-8", newline="\n")


def test_a_folder_is_left_alone_or_refused(root: Path, tmp_path: Path) -> None:
    before = (root / MANIFEST).stat().st_mtime_ns
    assert build_unseen(root, scale="small", seed=0, progress=False) == root
    assert (root / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"seed 0, asked for is 1"):
        build_unseen(root, scale="small", seed=1, progress=False)
    (tmp_path / "mine.txt").write_text("invented")
    with pytest.raises(InputError, match="not empty"):
        build_unseen(tmp_path, scale="small", seed=0, progress=False)
    unknown: Any = "huge"
    with pytest.raises(InputError, match="scale"):
        build_unseen(tmp_path / "new", scale=unknown, seed=0, progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.txt"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_said_is_read_back(data: st.DataObject) -> None:
    bank = data.draw(st.sampled_from(BANKS))
    phrase: Phrase[Any, Any] = data.draw(st.sampled_from(bank))
    names = [part.partition("}")[0] for part in phrase.template.split("{")[1:]]
    slots = {name: data.draw(st.sampled_from(WORDS[name.rstrip("23")])) for name in names}
    reading = read(bank, phrase.say(**slots))
    assert (reading.phrase, reading.slots) == (phrase, slots)


def test_what_no_phrase_says_is_refused() -> None:
    with pytest.raises(DataError, match="said by 0 phrases"):
        read(edits.CONDITIONS, "any banana instead of the left one")


def test_sights_are_judged_as_a_person_would() -> None:
    assert shows(SCENE, ["a red cube", "a red object"]) and not shows(SCENE, ["a red cube", "a cube"])
    assert shows(SCENE, ["a ball", "no green ball"]) and not shows(SCENE, ["no red cube"])
    assert is_beside(SCENE, "a star", "right", "a cube") and not is_beside(SCENE, "a ball", "left", "a cube")
    assert has_trim(COAT, "white dots") and has_trim(COAT, "no sleeves") and has_trim(COAT, "no belt")
    assert not has_trim(COAT, "red dots") and not has_trim(COAT, "no v-neck") and not has_trim(COAT, "a belt")
    assert pairs.is_true("Hupu and no Vupi in Wobbis", FAIR) and not pairs.is_true("Hupu at no fair in Wobbis", FAIR)
    assert not pairs.is_true("Hupu right of Drinu in Wobbis", FAIR)
    asked = ["what colour is the right one", "what shape is it", "how many objects have the colour red"]
    assert dialogs.hold_dialog(dialogs.SCENE_QUESTIONS, asked, SCENE) == ["red", "star", "two"]


def test_a_condition_leaves_open_what_it_does_not_say() -> None:
    condition = read(edits.CONDITIONS, "any cone instead of the middle one")
    right = [Scene((SCENE.objects[0], (colour, "cone"), SCENE.objects[2])) for colour in ("green", "blue")]
    assert all(condition.mean(SCENE, scene) for scene in right)
    assert not condition.mean(SCENE, SCENE) and not condition.mean(SCENE, right[0].swap(0, 1))
    other = read(edits.CONDITIONS, "swap the outer two, and the other one becomes any mug")
    assert other.mean(SCENE, Scene((("red", "star"), ("white", "mug"), ("red", "cube"))))
    assert not other.mean(SCENE, Scene((("red", "cube"), ("white", "mug"), ("red", "star"))))


def test_rounds_build_on_each_other_and_look_back() -> None:
    first = turns.apply_round(["has a green base", "has a belt"], [COAT])
    assert (first.colour, first.belt, first.pattern) == ("green", True, "white dots")
    last = turns.apply_round(["has its old colour again", "has no pattern"], [COAT, first])
    assert (last.colour, last.belt, last.pattern) == ("red", True, "plain")


@pytest.mark.parametrize(
    ("kind", "negative", "small"),
    [
        ("swap_att", "a blue cube and a red ball", True),
        ("swap_att", "a blue cube and a green ball", False),
        ("add_obj", "a red cube and a blue ball and a green mug", True),
        ("add_att", "a cube and a blue ball", False),
        ("replace_att", "a white cube and a blue ball", True),
        ("replace_obj", "a white cube and a blue star", False),
    ],
)
def test_small_edits_are_told_from_others(kind: str, negative: str, small: bool) -> None:
    assert pairs.is_small_edit(kind, "a red cube and a blue ball", negative) is small
