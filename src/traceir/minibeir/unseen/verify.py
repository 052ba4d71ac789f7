"""Reads the unseen sets back and holds what their files say against what their pictures show.

Nothing here knows how a query was drawn: texts are read by the phrases of their set, pictures by the composition they are
listed with, and every picture of a pool is asked whether it too would be right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from tqdm import tqdm

from traceir.errors import DataError
from traceir.minibeir.garments import Garment
from traceir.minibeir.photos import Scene as Photo
from traceir.minibeir.scenes import Scene
from traceir.minibeir.unseen import captions, dialogs, edits, pairs, turns
from traceir.minibeir.unseen.language import Phrase, S, read
from traceir.minibeir.unseen.states import State, find_state

IMAGES_FILE: Final = "unseen_pictures.jsonl"
"""Lines of {"path", "key"}: what each picture shows, which no reader of the sets needs."""

T = TypeVar("T")
Shown = Mapping[str, State]
"""What each picture shows, by its path."""


def verify_unseen(root: Path, *, progress: bool = False) -> None:
    """Reads all sets back and checks them. Raises DataError naming file and query where a set breaks a rule."""
    shown = read_images(root)
    for check in tqdm(_CHECKS, desc="unseen: checks", unit="set", leave=False, disable=None if progress else True):
        check(root, shown)


def read_images(root: Path) -> dict[str, State]:
    """What each picture shows, by its path. Raises DataError where a picture is missing, not listed, or not of the test split."""
    lines = (root / IMAGES_FILE).read_text(encoding="utf-8").splitlines()
    keys = {entry["path"]: entry["key"] for entry in map(json.loads, lines)}
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".jpg", ".png", ".gif")}
    for name in sorted(there ^ keys.keys()):
        what = "is listed but missing" if name in keys else "is not listed"
        raise DataError(f"{root / name}: the picture {what} in {IMAGES_FILE}; remove {root} and build again")
    return {name: find_state(key) for name, key in keys.items()}


def read_torch(path: Path) -> Any:
    """What a torch file holds; only plain data is loaded."""
    import torch

    return torch.load(path, weights_only=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _see(shown: Shown, name: str, kind: type[T], where: str) -> T:
    state = shown.get(name)
    if not isinstance(state, kind):
        raise DataError(f"{where}: {name} shows {state!r}, not a {kind.__name__}; draw the picture that the query means")
    return state


def _demand(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise DataError(f"{where}: {what}; draw another query")


def _is_all_true(bank: Iterable[Phrase[S, bool]], sentences: Sequence[str]) -> Callable[[S], bool]:
    readings = [read(bank, sentence) for sentence in sentences]
    return lambda state: all(reading.mean(state) for reading in readings)


def _check_one_to_one(
    told: Mapping[str, str], bank: Collection[Phrase[S, bool]], shown: Shown, kind: type[S], where: Path
) -> None:
    """Every caption is true of its own picture and of no other."""
    states = {name: _see(shown, name, kind, f"{where}") for name in told}
    for name, caption in told.items():
        is_true = _is_all_true(bank, captions.split_caption(caption))
        right = [other for other, state in states.items() if is_true(state)]
        _demand(right == [name], f"{where}: caption of {name}", f"{caption!r} is true of {right}")


def _check_long(root: Path, shown: Shown) -> None:
    path = root / "sharegpt4v" / "datas_for_validation.json"
    long = {f"sharegpt4v/val_data/{entry['image_name']}": entry["caption"] for entry in _read_json(path)}
    _check_one_to_one(long, captions.LONG_SCENE.values(), shown, Scene, path)
    folder = root / "Urban1k" / "caption"
    texts = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in folder.iterdir()}
    _demand(set(texts) == {str(number + 1) for number in range(len(texts))}, f"{folder}", "captions are not numbered from 1")
    urban = {f"Urban1k/image/{stem}.jpg": text for stem, text in texts.items()}
    _check_one_to_one(urban, captions.LONG_PHOTO.values(), shown, Photo, folder)


def _check_flickr(root: Path, shown: Shown) -> None:
    path = root / "flickr" / "flickr_text.json"
    texts: list[str] = _read_json(path)
    states = [shown[f"flickr/images/{place}.png"] for place in range(len(texts) // captions.FIVE)]
    for number, text in enumerate(texts):
        own = states[number // captions.FIVE]
        reading = read(captions.find_five(own), text)
        right = [state for state in states if type(state) is type(own) and reading.mean(state)]
        _demand(right == [own], f"{path}: caption {number}", f"{text!r} is true of {len(right)} pictures")
    _demand(len(set(texts)) == len(texts), f"{path}", "a caption stands twice")


def _check_circo(root: Path, shown: Shown) -> None:
    folder = root / "circo" / "annotations"
    images = _read_json(folder / "image_info_unlabeled2017.json")["images"]
    pool = {each["id"]: _see(shown, f"circo/unlabeled2017/{each['file_name']}", Scene, f"{folder}") for each in images}
    for split in ("val", "test"):
        for entry in _read_json(folder / f"{split}.json"):
            condition = read(edits.CONDITIONS, entry["relative_caption"])
            reference = pool[entry["reference_img_id"]]
            right = {number for number, scene in pool.items() if condition.mean(reference, scene)}
            where = f"{folder / split}.json: query {entry['id']}"
            _demand(len(right) >= 2 and entry["reference_img_id"] not in right, where, f"{len(right)} pictures are right")
            if split == "val":
                told = set(entry["gt_img_ids"])
                _demand(told == right and entry["target_img_id"] in told, where, f"answers are {told}, right are {right}")


def _check_genecis(root: Path, shown: Shown) -> None:
    for name, size in edits.GALLERY.items():
        path = root / "genecis" / "annotations" / f"{name}.json"
        for sample, entry in enumerate(_read_json(path)):
            where = f"{path}: query {sample}"
            row = [entry["reference"], entry["target"], *entry["gallery"]]
            _demand(len(entry["gallery"]) == size, where, f"the gallery has {len(entry['gallery'])} pictures, not {size}")
            if name.endswith("object"):
                names = [f"genecis/val2017/{each['val_image_id']:012}.jpg" for each in row]
                scenes = [_see(shown, each, Scene, where) for each in names]
                right = _list_right(edits.SCENE_FOCUS[name], entry["condition"], scenes)
                unlike = len(set(scenes))
            else:
                folder = f"genecis/visual_genome/{name}"
                names = [f"{folder}/{each['image_id']}_{sample}_{crop}.jpg" for crop, each in enumerate(row)]
                worn = [_see(shown, each, Garment, where) for each in names]
                right = _list_right(edits.GARMENT_FOCUS[name], entry["condition"], worn)
                unlike = len(set(worn))
            _demand(unlike == len(row), where, "a picture stands twice in it")
            _demand(right == [1], where, f"right for {entry['condition']!r} are the pictures {right}, not the target alone")


def _list_right(bank: Iterable[Phrase[S, bool]], text: str, states: Sequence[S]) -> list[int]:
    """Which pictures after the first, which is the reference, fulfil the condition."""
    condition = read(bank, text)
    return [place for place, state in enumerate(states) if place and condition.mean(states[0], state)]


def _check_visdial(root: Path, shown: Shown) -> None:
    path = root / "visdial" / "visdial_1.0_val.json"
    data = _read_json(path)["data"]
    folder = "visdial/VisualDialog_val2018/VisualDialog_val2018"
    states = [shown[f"{folder}_{dialog['image_id']:012}.jpg"] for dialog in data["dialogs"]]
    scenes = [state for state in states if isinstance(state, Scene)]
    photos = [state for state in states if isinstance(state, Photo)]
    for dialog, own in zip(data["dialogs"], states, strict=True):
        where = f"{path}: dialog of {dialog['image_id']}"
        questions = [data["questions"][each["question"]] for each in dialog["dialog"]]
        answers = [data["answers"][each["answer"]] for each in dialog["dialog"]]
        _demand(len(set(questions)) + questions.count("what shape is it") >= dialogs.ROUNDS, where, "a question is asked twice")
        right: list[State] = []
        if isinstance(own, Scene):
            right += [each for each in scenes if dialogs.hold_dialog(dialogs.SCENE_QUESTIONS, questions, each) == answers]
        else:
            right += [each for each in photos if dialogs.hold_dialog(dialogs.PHOTO_QUESTIONS, questions, each) == answers]
        _demand(right == [own], where, f"{len(right)} pictures give these answers")


def _check_vist(root: Path, shown: Shown) -> None:
    path = root / "vist" / "sis" / "val.story-in-sequence.json"
    names = {Path(name).stem: name for name in shown if name.startswith("vist/images/")}
    stories: dict[str, list[tuple[int, str, State]]] = {}
    for (line,) in _read_json(path)["annotations"]:
        told = (line["worker_arranged_photo_order"], line["text"], shown[names[line["photo_flickr_id"]]])
        stories.setdefault(line["story_id"], []).append(told)
    every = [state for story in stories.values() for _, _, state in story]
    _demand(len(set(every)) == len(every), f"{path}", "a picture stands in two stories")
    for number, story in stories.items():
        where = f"{path}: story {number}"
        orders, texts, states = zip(*story, strict=True)
        _demand(orders == tuple(range(turns.IMAGES)), where, f"the order of pictures is {orders}")
        if all(isinstance(state, Scene) for state in states):
            _check_story(turns.SCENE_CHANGES, turns.SCENE_SIGHTS, texts, states, where)
        else:
            _check_story(turns.PHOTO_CHANGES, turns.PHOTO_SIGHTS, texts, states, where)


def _check_story(
    changes: Sequence[Phrase[S, S]], sights: Sequence[Phrase[S, bool]], texts: Sequence[str], states: Sequence[S], where: str
) -> None:
    """Every sentence is true where it stands, and the last one leads to the last picture."""
    for place, text in enumerate(texts):
        if text.startswith("then "):
            _demand(read(changes, text).mean(*states[:place]) == states[place], where, f"{text!r} does not lead to its picture")
        else:
            _demand(read(sights, text).mean(states[place]), where, f"{text!r} is not what its picture shows")
    _demand(texts[-1].startswith("then "), where, f"the last sentence {texts[-1]!r} does not lead to a picture")


def _check_multiturn(root: Path, shown: Shown) -> None:
    folder = root / "multiturnfashion"
    path = folder / "data" / "all.val.json"
    pool: list[str] = _read_json(folder / "image_splits" / "split.all.val.json")
    images = "mbeir_images/fashioniq_images"
    garments = {name: _see(shown, f"{images}/{name}.jpg", Garment, f"{folder}: {name}") for name in pool}
    _demand(len(set(garments.values())) == len(pool), f"{folder}", "a garment stands twice in the pool")
    for number, entry in enumerate(_read_json(path)):
        where = f"{path}: query {number}"
        states = [garments[name] for _, _, name in entry["reference"]]
        for turn, (_, texts, _) in enumerate(entry["reference"]):
            after = turns.apply_round(texts, states[: turn + 1])
            wanted = states[turn + 1] if turn + 1 < len(states) else garments[entry["target"][1]]
            _demand(after == wanted and after not in states[: turn + 1], where, f"round {turn} leads to {after}")


def _check_ccneg(root: Path, shown: Shown) -> None:
    path = root / "ccneg" / "ccneg_preprocessed.pt"
    data = read_torch(path)
    for place, (name, notes) in enumerate(zip(data["image_paths"], data["annotations"], strict=True)):
        where = f"{path}: picture {place}"
        state = shown["ccneg/cc3m/" + name.removeprefix(pairs.PREFIX)]
        caption, negative = notes["json"]["caption"], notes["sop_data"]["negative-prompt"]
        _demand("," not in caption + negative, where, "a caption has a comma, which readers remove from one side only")
        _demand(f" {negative}".count(" no ") == 1 and " no " not in f" {caption}", where, f"{negative!r} does not negate once")
        _check_pair(state, caption, negative, where)


def _check_pair(state: State, caption: str, negative: str, where: str) -> None:
    _demand(pairs.is_true(caption, state), where, f"{caption!r} is false")
    _demand(not pairs.is_true(negative, state), where, f"{negative!r} is true")


def _check_sugarcrepe(root: Path, shown: Shown) -> None:
    for kind in pairs.KINDS:
        path = root / "sugar-crepe" / "data" / f"{kind}.json"
        for index, entry in _read_json(path).items():
            where = f"{path}: picture {index}"
            caption, negative = entry["caption"], entry["negative_caption"]
            _check_pair(shown[f"sugar-crepe/val2017/{entry['filename']}"], caption, negative, where)
            _demand(pairs.is_small_edit(kind, caption, negative), where, f"{negative!r} is no small edit of {caption!r}")


_CHECKS: Final[Sequence[Callable[[Path, Shown], None]]] = (
    _check_long,
    _check_flickr,
    _check_circo,
    _check_genecis,
    _check_visdial,
    _check_vist,
    _check_multiturn,
    _check_ccneg,
    _check_sugarcrepe,
)
