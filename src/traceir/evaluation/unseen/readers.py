# ruff: noqa: UP013 - the published formats as a table: one a line, and some of their keys are no names in Python
"""The readers of the zero-shot sets: the authors' files as they are published, and nothing beside them (docs/unseen.md).

Each takes the folder of all sets and which part of its own is wanted ("" where there is one), and returns what `run.py` makes a
task of. Files are checked against declared types: errors name the file, the location in it, the value and what it must be.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from traceir.data.folder import file_names
from traceir.errors import DataError
from traceir.evaluation.unseen.task import Source, UnseenQuery

CAPTION_WANTED: Final = "Find an image caption describing the following everyday image."
CHANGE_WANTED: Final = "I'm looking for a similar everyday image with the described changes."
SAME_WANTED: Final = "I'm looking for an image with the same attributes as described."
DIALOG_WANTED: Final = "Find me an everyday image that matches the given dialog."
STORY_WANTED: Final = (
    "I will provide you with a series of images and captions from a story, "
    "and I need you to retrieve the image corresponding to the last caption."
)
ROUNDS_WANTED: Final = "Find me a similar fashion image based on the following multi-round modifications."
GARMENT_WANTED: Final = "Find a garment like the one in the image, with the described changes."

FLICKR_CAPTIONS: Final = 5
"""Captions of one Flickr30K image; caption i belongs to image i // 5."""
GENECIS_FILES: Final = ("change_object", "focus_object", "change_attribute", "focus_attribute")
VIST_SUFFIXES: Final = (".jpg", ".png", ".gif")
CCNEG_ITEMS: Final = 40_000
"""The authors evaluate on the last 40,000 of 228,246 items and train on the others."""
CCNEG_PREFIX: Final = "datasets/cc3m/"
SUGARCREPE_FILES: Final = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
"""In the order of the authors' table."""

Checked = TypeVar("Checked")


def _form(pattern: str, wanted: str) -> AfterValidator:
    """A validator of strings that match a pattern as a whole."""

    def check_form(value: str) -> str:
        if not re.fullmatch(pattern, value, re.DOTALL):
            raise ValueError(wanted)
        return value

    return AfterValidator(check_form)


def _integer_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Text = Annotated[str, _form(r".*\S.*", "it must be a text that is not blank")]
"""A text that is not blank, as published."""
Id = Annotated[str, BeforeValidator(_integer_as_text), _form(r"(?!\.+\Z)[^\s/\\\0]+", "it must be an id: a word or an integer")]
"""Published as a string or as an integer, without blanks and slashes, so that it can name a file."""
FileName = Annotated[str, _form(r"(?!/)(?!(.*/)?\.\.(/|\Z))[^\\\0]+", "it is not a file below the folder of the set")]
"""The relative path of a file that cannot leave its folder."""
Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, slots=True)
class UnseenData:
    """What a reader makes: the file of the queries, the queries, the pool, and files of annotations that are not there."""

    source: Path
    cases: Sequence[UnseenQuery]
    pool: Mapping[str, Source]
    absent: tuple[Path, ...] = ()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the path and rights") from error


def _check(path: Path, content: Any, kind: type[Checked]) -> Checked:
    """The content of a file, JSON as bytes or what was read from it, of the type `kind`."""
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_json(content) if isinstance(content, bytes) else adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        line = re.search(r"line (\d+)", what)
        raise DataError(f"{path}:{line[1] if line else 1}: {what}; download the file again")
    where = ""
    for step in first["loc"]:
        where += f" {step}" if isinstance(step, int) and where else f", {f'entry {step}' if isinstance(step, int) else step}"
    raise DataError(f"{path}{where}: is {repr(first['input'])[:120]}: {what}; download the file again")


def _read_json(path: Path, kind: type[Checked]) -> Checked:
    return _check(path, _read(path), kind)


def _wrong(source: Path, number: int, name: str, value: object, wanted: str) -> DataError:
    return DataError(f"{source}, entry {number}: {name} is {repr(value)[:120]}; it must be {wanted}; download the file again")


CaptionedImage = TypedDict("CaptionedImage", {"image_name": FileName, "caption": Text})


def read_sharegpt4v(root: Path, way: str) -> UnseenData:
    """Long-CLIP's 1,000 pairs (arXiv 2403.15378)."""
    source = root / "sharegpt4v" / "datas_for_validation.json"
    entries = _read_json(source, list[CaptionedImage])
    images = {str(n): root / "sharegpt4v" / "val_data" / entry["image_name"] for n, entry in enumerate(entries)}
    captions = {str(n): entry["caption"].replace("\n", " ") for n, entry in enumerate(entries)}
    return _one_way(source, images, captions, {name: (name,) for name in images}, way)


def read_urban1k(root: Path, way: str) -> UnseenData:
    """Urban-1K (arXiv 2403.15378). The caption is the first line of its file, the image has the file's name."""
    folder = root / "Urban1k" / "caption"
    captions: dict[str, str] = {}
    for path in sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem)):
        try:
            captions[path.stem] = next(iter(_read(path).decode().splitlines()), "")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
        if not captions[path.stem].strip():
            raise DataError(f"{path}:1: is blank; it must hold the caption; download the file again")
    if not captions:
        raise DataError(f"{folder}: holds no caption file N.txt; docs/unseen.md lists the files of each set")
    images = {name: root / "Urban1k" / "image" / f"{name}.jpg" for name in captions}
    return _one_way(folder, images, captions, {name: (name,) for name in images}, way)


def read_flickr30k(root: Path, way: str) -> UnseenData:
    """Karpathy's test split: 5,000 captions, 1,000 images; any of an image's five captions is right."""
    source = root / "flickr" / "flickr_text.json"
    captions = {str(n): text for n, text in enumerate(_read_json(source, list[Text]))}
    if len(captions) % FLICKR_CAPTIONS:
        raise DataError(f"{source}: {len(captions)} captions are not five for each image; download the file again")
    images = {str(n): root / "flickr" / "images" / f"{n}.png" for n in range(len(captions) // FLICKR_CAPTIONS)}
    own = {name: tuple(str(FLICKR_CAPTIONS * int(name) + n) for n in range(FLICKR_CAPTIONS)) for name in images}
    return _one_way(source, images, captions, own, way)


def _one_way(
    source: Path, images: Mapping[str, Path], captions: Mapping[str, str], own: Mapping[str, tuple[str, ...]], way: str
) -> UnseenData:
    """Text to image, or image to text; `own` names the captions of each image. Only an image that looks for its caption carries
    an instruction."""
    if way == "i2t":
        cases = [UnseenQuery(id, (path,), own[id], CAPTION_WANTED, "text") for id, path in images.items()]
        return UnseenData(source, cases, captions)
    image_of = {caption: image for image, ids in own.items() for caption in ids}
    return UnseenData(source, [UnseenQuery(id, (text,), (image_of[id],)) for id, text in captions.items()], images)


CocoImage = TypedDict("CocoImage", {"id": Count, "file_name": FileName})
CocoImages = TypedDict("CocoImages", {"images": list[CocoImage]})
CircoQuery = TypedDict(
    "CircoQuery", {"id": Id, "reference_img_id": Id, "relative_caption": Text, "gt_img_ids": NotRequired[list[Id]]}
)


def read_circo(root: Path, split: str) -> UnseenData:
    """CIRCO (arXiv 2303.15247) over the whole of COCO unlabeled2017, several right images each.

    The truth of the test split is held by the authors' server. Nothing is masked: the authors rank the reference image too.
    """
    folder = root / "circo" / "annotations"
    listed = _read_json(folder / "image_info_unlabeled2017.json", CocoImages)["images"]
    pool = {str(image["id"]): root / "circo" / "unlabeled2017" / image["file_name"] for image in listed}
    source = folder / f"{split}.json"
    cases = []
    for number, entry in enumerate(_read_json(source, list[CircoQuery])):
        reference, relevant = entry["reference_img_id"], tuple(entry.get("gt_img_ids", ())) if split == "val" else ()
        if reference not in pool:
            raise _wrong(source, number, "reference_img_id", reference, "one of the ids of image_info_unlabeled2017.json")
        if split == "val" and not relevant:
            raise _wrong(source, number, "gt_img_ids", [], "a list of at least one id")
        cases.append(UnseenQuery(entry["id"], (pool[reference], entry["relative_caption"]), relevant, CHANGE_WANTED))
    return UnseenData(source, cases, pool)


CocoPlace = TypedDict("CocoPlace", {"val_image_id": Id})
CropPlace = TypedDict("CropPlace", {"image_id": Id})
CocoSample = TypedDict("CocoSample", {"reference": CocoPlace, "target": CocoPlace, "gallery": list[CocoPlace], "condition": Text})
CropSample = TypedDict("CropSample", {"reference": CropPlace, "target": CropPlace, "gallery": list[CropPlace], "condition": Text})


def read_genecis(root: Path, _: str) -> UnseenData:
    """GeneCIS (arXiv 2306.07969): four files as four groups. Each query ranks its own target and gallery.

    Images are whole, of COCO, or crops named by image, sample and number (0 the reference, 1 the target). A gallery image that
    is the target itself counts as right wherever it stands; one that stands twice counts twice against it.
    """
    folder = root / "genecis"
    files, absent = _parts(folder / "annotations", GENECIS_FILES)
    cases: list[UnseenQuery] = []
    pool: dict[str, Source] = {}
    for kind, path in files.items():
        whole = kind.endswith("_object")
        images, prefix = (folder / "val2017", "coco") if whole else (folder / "visual_genome" / kind, kind)
        sample_type: Any = CocoSample if whole else CropSample
        wanted = SAME_WANTED if kind == "focus_attribute" else CHANGE_WANTED
        for number, sample in enumerate(_read_json(path, list[sample_type])):
            ids = [id for region in (sample["reference"], sample["target"], *sample["gallery"]) for id in region.values()]
            names = [f"{id:0>12}.jpg" if whole else f"{id}_{number}_{index}.jpg" for index, id in enumerate(ids)]
            gallery = tuple(f"{prefix}/{name}" for name in names[1:])
            pool |= {id: images / name for id, name in zip(gallery, names[1:], strict=True)}
            parts = (images / names[0], sample["condition"])
            cases.append(UnseenQuery(f"{kind}/{number}", parts, gallery[:1], wanted, gallery=gallery, group=kind))
    return UnseenData(folder / "annotations", cases, pool, absent)


def _parts(folder: Path, kinds: Sequence[str]) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """Of a set in several files those that are there, by kind, and those that are not."""
    files = {kind: folder / f"{kind}.json" for kind in kinds}
    absent = tuple(path for path in files.values() if not path.is_file())
    return {kind: path for kind, path in files.items() if path not in absent}, absent


DialogRound = TypedDict("DialogRound", {"question": Count, "answer": Count})
Dialog = TypedDict("Dialog", {"image_id": Count, "dialog": Annotated[list[DialogRound], Field(min_length=1)]})
Dialogs = TypedDict("Dialogs", {"questions": list[str], "answers": list[str], "dialogs": list[Dialog]})
VisDialFile = TypedDict("VisDialFile", {"data": Dialogs})


def read_visdial(root: Path, _: str) -> UnseenData:
    """VisDial v1.0 (arXiv 1611.08669) by the protocol of FROMAGe (arXiv 2301.13823): ten rounds of question and answer in search
    of their image, over the images of the validation split. The caption that comes with each dialog is not shown."""
    folder = root / "visdial"
    source = folder / "visdial_1.0_val.json"
    data = _read_json(source, VisDialFile)["data"]
    cases, pool = [], {}
    for number, dialog in enumerate(data["dialogs"]):
        rounds = []
        for position, round_ in enumerate(dialog["dialog"]):
            if round_["question"] >= len(data["questions"]) or round_["answer"] >= len(data["answers"]):
                counts = f"fewer than {len(data['questions'])} and {len(data['answers'])}"
                raise DataError(
                    f"{source}, data, dialogs {number}, dialog {position}: is {round_}; it must hold numbers of {counts} texts"
                )
            rounds.append(f"Q: {data['questions'][round_['question']]}? A: {data['answers'][round_['answer']]}.")
        image = str(dialog["image_id"])
        pool[image] = folder / "VisualDialog_val2018" / f"VisualDialog_val2018_{image:0>12}.jpg"
        cases.append(UnseenQuery(str(number), (" ".join(rounds),), (image,), DIALOG_WANTED))
    return UnseenData(source, cases, pool)


StoryStep = TypedDict(
    "StoryStep",
    {"story_id": Id, "photo_flickr_id": Id, "worker_arranged_photo_order": Annotated[int, Field(ge=0)], "text": Text},
)
VistFile = TypedDict("VistFile", {"annotations": list[tuple[StoryStep]]})


def read_vist(root: Path, _: str) -> UnseenData:
    """VIST (arXiv 1604.03968) by the protocol of FROMAGe (arXiv 2301.13823, table 1), over all images that the stories use.

    The query is every caption and every image but the last; images already shown may not be found, so that a story whose last
    image was shown before is a miss, as in the authors' code. Many images are gone from Flickr: `missing="skip"` leaves out the
    stories that need one, as the authors do.
    """
    source = root / "vist" / "sis" / "val.story-in-sequence.json"
    stories: dict[str, list[StoryStep]] = {}
    for (step,) in _read_json(source, VistFile)["annotations"]:
        stories.setdefault(step["story_id"], []).append(step)
    pool: dict[str, Source] = {}
    folder = root / "vist" / "images"
    there = file_names(folder)
    for photo in sorted({step["photo_flickr_id"] for story in stories.values() for step in story}):
        names = [f"{photo}{suffix}" for suffix in VIST_SUFFIXES]
        pool[photo] = folder / next((name for name in names if name in there), names[0])
    cases = []
    for id, story in stories.items():
        *shown, last = sorted(story, key=lambda step: step["worker_arranged_photo_order"])
        parts = [part for step in shown for part in (step["text"], pool[step["photo_flickr_id"]])]
        masked = tuple(dict.fromkeys(step["photo_flickr_id"] for step in shown))
        cases.append(UnseenQuery(id, (*parts, last["text"]), (last["photo_flickr_id"],), STORY_WANTED, masked=masked))
    return UnseenData(source, cases, pool)


GarmentSearch = TypedDict(
    "GarmentSearch",
    {"target": tuple[Any, Id], "reference": Annotated[list[tuple[Any, list[str], Id]], Field(min_length=1)]},
)
"""`target` is [address, name]; a round of `reference` is [address, texts, name]."""


def read_mtfiq(root: Path, _: str) -> UnseenData:
    """Multi-turn FashionIQ (arXiv 2106.04128): all categories together, over the names of the validation split."""
    folder, images = root / "multiturnfashion", root / "mbeir_images" / "fashioniq_images"
    source = folder / "data" / "all.val.json"
    searches = [(entry["target"][1], entry["reference"]) for entry in _read_json(source, list[GarmentSearch])]
    return _garments(source, folder / "image_splits" / "split.all.val.json", images, searches, ROUNDS_WANTED)


GarmentChange = TypedDict("GarmentChange", {"candidate": Id, "target": Id, "captions": list[str]})


def read_fashioniq(root: Path, category: str) -> UnseenData:
    """FashionIQ (arXiv 1905.12794) from its authors' files, one category over the images of its own split; the authors report the
    mean of the three. The two captions are joined by "and". Nothing is masked: the authors rank the reference image too."""
    folder = root / "fashion-iq"
    source = folder / f"cap.{category}.val.json"
    searches = [
        (entry["target"], [(None, entry["captions"], entry["candidate"])]) for entry in _read_json(source, list[GarmentChange])
    ]
    return _garments(source, folder / f"split.{category}.val.json", folder / "images", searches, GARMENT_WANTED)


def _garments(
    source: Path, split: Path, images: Path, searches: Iterable[tuple[str, Iterable[tuple[Any, list[str], str]]]], wanted: str
) -> UnseenData:
    """Searches by target and rounds (address, texts, name), over the pool that a split file lists; a name listed twice is one
    garment. Each round is its image, and what is said of it as one text, where anything is."""
    cases = []
    for number, (target, rounds) in enumerate(searches):
        parts: list[Source] = []
        for _, texts, name in rounds:
            feedback = " and ".join(text.strip() for text in texts if text.strip())
            parts += [images / f"{name}.jpg", feedback] if feedback else [images / f"{name}.jpg"]
        cases.append(UnseenQuery(str(number), tuple(parts), (target,), wanted))
    return UnseenData(source, cases, {name: images / f"{name}.jpg" for name in _read_json(split, list[Id])})


ImageSet = TypedDict("ImageSet", {"members": list[Id]})
CirrQuery = TypedDict("CirrQuery", {"pairid": Id, "reference": Id, "target_hard": Id, "caption": Text, "img_set": ImageSet})


def read_cirr(root: Path, part: str) -> UnseenData:
    """CIRR (arXiv 2108.04024) from its authors' files: R@K over the whole split, where the reference image is no candidate of its
    own query, or R_subset@K over the other members of the query's image set (`part` "subset"). Right is the hard target."""
    folder = root / "cirr"
    source, split = folder / "cap.rc2.val.json", folder / "split.rc2.val.json"
    pool = {name: folder / "images" / file for name, file in _read_json(split, dict[str, FileName]).items()}
    cases = []
    for number, entry in enumerate(_read_json(source, list[CirrQuery])):
        reference, target, members = entry["reference"], entry["target_hard"], entry["img_set"]["members"]
        if reference not in pool:
            raise _wrong(source, number, "reference", reference, f"an image of {split}")
        if target not in members or target == reference:
            raise _wrong(source, number, "target_hard", target, "another member of img_set than the reference")
        others = tuple(member for member in members if member != reference) if part == "subset" else None
        masked = () if part == "subset" else (reference,)
        parts = (pool[reference], entry["caption"])
        cases.append(UnseenQuery(entry["pairid"], parts, (target,), CHANGE_WANTED, gallery=others, masked=masked))
    return UnseenData(source, cases, pool)


CaptionChoice = tuple[str, str, Path, str, str]
"""Id, group, image, true caption, wrong caption: right only where the true caption scores strictly higher."""
CaptionPair = TypedDict("CaptionPair", {"filename": FileName, "caption": Text, "negative_caption": Text})


def read_sugarcrepe(root: Path, _: str) -> UnseenData:
    """SugarCrepe (arXiv 2306.14610), its files as groups. The authors give one accuracy a file; ours is over all."""
    folder, images = root / "sugar-crepe" / "data", root / "sugar-crepe" / "val2017"
    if not folder.is_dir():
        folder = folder.parent  # the authors' folder `data` by itself
    files, absent = _parts(folder, SUGARCREPE_FILES)
    pairs = [
        (f"{kind}/{key}", kind, images / pair["filename"], pair["caption"], pair["negative_caption"])
        for kind, path in files.items()
        for key, pair in _read_json(path, dict[str, CaptionPair]).items()
    ]
    return _choose(folder, pairs, absent)


TrueCaption = TypedDict("TrueCaption", {"caption": Text})
WrongCaption = TypedDict("WrongCaption", {"negative-prompt": Text})
NegatedCaption = TypedDict("NegatedCaption", {"json": TrueCaption, "sop_data": WrongCaption})
CcNegFile = TypedDict("CcNegFile", {"image_paths": list[Any], "annotations": list[Any]})


def read_ccneg(root: Path, _: str) -> UnseenData:
    """CC-Neg (arXiv 2403.20312): a caption against its negation, which loses its commas, and it alone, as by the authors."""
    source = root / "ccneg" / "ccneg_preprocessed.pt"
    data = _check(source, _load_tensors(source), CcNegFile)
    paths, annotations = data["image_paths"], data["annotations"]
    if len(paths) != len(annotations):
        raise DataError(f"{source}: {len(paths)} image_paths, {len(annotations)} annotations; download the file again")
    used = range(max(0, len(paths) - CCNEG_ITEMS), len(paths))
    texts = _check(source, {number: annotations[number] for number in used}, dict[int, NegatedCaption])
    pairs = []
    for number in used:
        name = paths[number].rpartition(CCNEG_PREFIX)[2] if CCNEG_PREFIX in str(paths[number]) else ""
        if not name or ".." in Path(name).parts:
            raise _wrong(source, number, "image_paths", paths[number], f"a path through {CCNEG_PREFIX}")
        true, wrong = texts[number]["json"]["caption"], texts[number]["sop_data"]["negative-prompt"].replace(",", "")
        pairs.append((str(number), "", root / "ccneg" / "cc3m" / name, true, wrong))
    return _choose(source, pairs)


def _load_tensors(path: Path) -> object:
    """The content of a file written by torch.save, where it is plain data: nothing that the file names is ever run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: is refused ({str(error.__context__ or error)[:200]}): reading anything but plain lists, dicts and texts "
            "could run code. Download it from its authors, or load it where that is safe and save its lists again"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        reason = str(error)[:200] or "it ends too early"
        raise DataError(f"{path}: is not a whole file of torch.save: {reason}; download it again") from error


def _choose(source: Path, pairs: Iterable[CaptionChoice], absent: tuple[Path, ...] = ()) -> UnseenData:
    """The image is the query and the two captions are its gallery."""
    cases: list[UnseenQuery] = []
    pool: dict[str, Source] = {}
    for id, group, image, true, wrong in pairs:
        gallery = (f"{id}/true", f"{id}/wrong")
        pool |= dict(zip(gallery, (true, wrong), strict=True))
        cases.append(UnseenQuery(id, (image,), gallery[:1], target="text", gallery=gallery, group=group))
    return UnseenData(source, cases, pool, absent)
