# ruff: noqa: UP013 - the published formats as a table: one a line, and some of their keys are no names in Python
"""The readers of the zero-shot sets: the authors' files as they are published, and nothing beside them (docs/unseen.md).

Each takes the folder of all sets and which part of its own is wanted ("" where there is one), and returns what `catalogue.py`
makes a task of. The types say what the files hold; `annotations.py` checks them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import Count, FileName, Id, Text, check, read_annotations, read_bytes
from traceir.evaluation.unseen.task import Source, UnseenQuery, files_in

CAPTION_WANTED: Final = "Find an image caption describing the following everyday image."
CHANGE_WANTED: Final = "I'm looking for a similar everyday image with the described changes."
SAME_WANTED: Final = "I'm looking for an image with the same attributes as described."
DIALOG_WANTED: Final = "Find me an everyday image that matches the given dialog."
STORY_WANTED: Final = (
    "I will provide you with a series of images and captions from a story, "
    "and I need you to retrieve the image corresponding to the last caption."
)
TURNS_WANTED: Final = "Find me a similar fashion image based on the following multi-round modifications."
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


@dataclass(frozen=True, slots=True)
class UnseenData:
    """What a reader found: the file of the queries, the queries, the pool, and files of annotations that are not there."""

    source: Path
    cases: Sequence[UnseenQuery]
    pool: Mapping[str, Source]
    absent: tuple[Path, ...] = ()


CaptionedImage = TypedDict("CaptionedImage", {"image_name": FileName, "caption": Text})


def read_sharegpt4v(root: Path, way: str) -> UnseenData:
    """Long-CLIP's 1,000 pairs (arXiv 2403.15378)."""
    source = root / "sharegpt4v" / "datas_for_validation.json"
    entries = read_annotations(source, list[CaptionedImage])
    images = {str(n): root / "sharegpt4v" / "val_data" / entry["image_name"] for n, entry in enumerate(entries)}
    captions = {str(n): entry["caption"].replace("\n", " ") for n, entry in enumerate(entries)}
    return _one_way(source, images, captions, {name: (name,) for name in images}, way)


def read_urban1k(root: Path, way: str) -> UnseenData:
    """Urban-1K (arXiv 2403.15378). The caption is the first line of its file, the image has the file's name."""
    folder = root / "Urban1k" / "caption"
    files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise DataError(f"{folder}: holds no caption file N.txt; docs/unseen.md lists the files of each set")
    captions = {path.stem: _first_line(path) for path in files}
    images = {name: root / "Urban1k" / "image" / f"{name}.jpg" for name in captions}
    return _one_way(folder, images, captions, {name: (name,) for name in images}, way)


def read_flickr30k(root: Path, way: str) -> UnseenData:
    """Karpathy's test split: 5,000 captions, 1,000 images; any of an image's five captions is right."""
    source = root / "flickr" / "flickr_text.json"
    captions = {str(n): text for n, text in enumerate(read_annotations(source, list[Text]))}
    if len(captions) % FLICKR_CAPTIONS:
        raise DataError(f"{source}: {len(captions)} captions are not five for each image; download the file again")
    images = {str(n): root / "flickr" / "images" / f"{n}.png" for n in range(len(captions) // FLICKR_CAPTIONS)}
    own = {name: tuple(str(FLICKR_CAPTIONS * int(name) + n) for n in range(FLICKR_CAPTIONS)) for name in images}
    return _one_way(source, images, captions, own, way)


def _one_way(
    source: Path,
    images: Mapping[str, Path],
    captions: Mapping[str, str],
    captions_of: Mapping[str, tuple[str, ...]],
    way: str,
) -> UnseenData:
    """Text to image, or image to text. An image that looks for its caption carries an instruction; captions carry none."""
    if way == "i2t":
        cases = [UnseenQuery(id, (path,), captions_of[id], CAPTION_WANTED, "text") for id, path in images.items()]
        return UnseenData(source, cases, captions)
    image_of = {caption: image for image, own in captions_of.items() for caption in own}
    return UnseenData(source, [UnseenQuery(id, (text,), (image_of[id],)) for id, text in captions.items()], images)


def _first_line(path: Path) -> str:
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
    if not lines or not lines[0].strip():
        raise DataError(f"{path}:1: is blank; it must hold the caption; download the file again")
    return lines[0]


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
    listed = read_annotations(folder / "image_info_unlabeled2017.json", CocoImages)
    pool = {str(image["id"]): root / "circo" / "unlabeled2017" / image["file_name"] for image in listed["images"]}
    source = folder / f"{split}.json"
    cases = []
    for number, entry in enumerate(read_annotations(source, list[CircoQuery])):
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

    A gallery image that is the target itself counts as right wherever it stands; one that stands twice counts twice against it.
    """
    folder = root / "genecis"
    files = {kind: folder / "annotations" / f"{kind}.json" for kind in GENECIS_FILES}
    absent = tuple(path for path in files.values() if not path.is_file())
    cases: list[UnseenQuery] = []
    pool: dict[str, Source] = {}
    for kind in (kind for kind, path in files.items() if path not in absent):
        sample_type: Any = CocoSample if kind.endswith("_object") else CropSample
        for number, sample in enumerate(read_annotations(files[kind], list[sample_type])):
            ids = [id for place in (sample["reference"], sample["target"], *sample["gallery"]) for id in place.values()]
            (_, reference), *gallery = _genecis_images(folder, kind, number, ids)
            pool |= dict(gallery)
            names = tuple(id for id, _ in gallery)
            wanted = SAME_WANTED if kind == "focus_attribute" else CHANGE_WANTED
            parts = (reference, sample["condition"])
            cases.append(UnseenQuery(f"{kind}/{number}", parts, names[:1], wanted, gallery=names, group=kind))
    return UnseenData(folder / "annotations", cases, pool, absent)


def _genecis_images(folder: Path, kind: str, number: int, ids: Iterable[str]) -> list[tuple[str, Path]]:
    """Id and file of the reference, the target, and the gallery in order: whole COCO images, or crops named by image, sample and
    place (0 the reference, 1 the target)."""
    if kind.endswith("_object"):
        return [(f"coco/{id:0>12}.jpg", folder / "val2017" / f"{id:0>12}.jpg") for id in ids]
    names = [f"{id}_{number}_{place}.jpg" for place, id in enumerate(ids)]
    return [(f"{kind}/{name}", folder / "visual_genome" / kind / name) for name in names]


DialogRound = TypedDict("DialogRound", {"question": Count, "answer": Count})
Dialog = TypedDict("Dialog", {"image_id": Count, "dialog": Annotated[list[DialogRound], Field(min_length=1)]})
Dialogs = TypedDict("Dialogs", {"questions": list[str], "answers": list[str], "dialogs": list[Dialog]})
VisDialFile = TypedDict("VisDialFile", {"data": Dialogs})


def read_visdial(root: Path, _: str) -> UnseenData:
    """VisDial v1.0 (arXiv 1611.08669) by the protocol of FROMAGe (arXiv 2301.13823): ten rounds of question and answer in search
    of their image, over the images of the validation split. The caption that comes with each dialog is not shown."""
    folder = root / "visdial"
    source = folder / "visdial_1.0_val.json"
    data = read_annotations(source, VisDialFile)["data"]
    cases, pool = [], {}
    for number, dialog in enumerate(data["dialogs"]):
        rounds = []
        for place, turn in enumerate(dialog["dialog"]):
            if turn["question"] >= len(data["questions"]) or turn["answer"] >= len(data["answers"]):
                counts = f"fewer than {len(data['questions'])} and {len(data['answers'])}"
                raise DataError(
                    f"{source}, data, dialogs {number}, dialog {place}: is {turn}; it must hold numbers of {counts} texts"
                )
            rounds.append(f"Q: {data['questions'][turn['question']]}? A: {data['answers'][turn['answer']]}.")
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
    for (step,) in read_annotations(source, VistFile)["annotations"]:
        stories.setdefault(step["story_id"], []).append(step)
    paths: dict[str, Source] = {}
    folder = root / "vist" / "images"
    there = files_in(folder)
    for photo in sorted({step["photo_flickr_id"] for story in stories.values() for step in story}):
        names = [f"{photo}{suffix}" for suffix in VIST_SUFFIXES]
        paths[photo] = folder / next((name for name in names if name in there), names[0])
    return UnseenData(source, [_story(id, story, paths) for id, story in stories.items()], paths)


def _story(id: str, steps: Iterable[StoryStep], paths: Mapping[str, Source]) -> UnseenQuery:
    *shown, last = sorted(steps, key=lambda step: step["worker_arranged_photo_order"])
    parts = [part for step in shown for part in (step["text"], paths[step["photo_flickr_id"]])]
    masked = tuple(dict.fromkeys(step["photo_flickr_id"] for step in shown))
    return UnseenQuery(id, (*parts, last["text"]), (last["photo_flickr_id"],), STORY_WANTED, masked=masked)


GarmentSearch = TypedDict(
    "GarmentSearch",
    {"target": tuple[Any, Id], "reference": Annotated[list[tuple[Any, list[str], Id]], Field(min_length=1)]},
)
"""`target` is [address, name]; a turn of `reference` is [address, texts, name]."""


def read_mtfiq(root: Path, _: str) -> UnseenData:
    """Multi-turn FashionIQ (arXiv 2106.04128): all categories together, over the names of the validation split."""
    source = root / "multiturnfashion" / "data" / "all.val.json"
    folder = root / "mbeir_images" / "fashioniq_images"
    pool = _garments(root / "multiturnfashion" / "image_splits" / "split.all.val.json", folder)
    cases = []
    for number, entry in enumerate(read_annotations(source, list[GarmentSearch])):
        parts = [part for _, texts, name in entry["reference"] for part in _feedback(folder / f"{name}.jpg", texts)]
        cases.append(UnseenQuery(str(number), tuple(parts), (entry["target"][1],), TURNS_WANTED))
    return UnseenData(source, cases, pool)


GarmentChange = TypedDict("GarmentChange", {"candidate": Id, "target": Id, "captions": list[str]})


def read_fashioniq(root: Path, category: str) -> UnseenData:
    """FashionIQ (arXiv 1905.12794) from its authors' files, one category over the images of its own split; the authors report the
    mean of the three. The two captions are joined by "and". Nothing is masked: the authors rank the reference image too."""
    folder, images = root / "fashion-iq", root / "fashion-iq" / "images"
    source = folder / f"cap.{category}.val.json"
    pool = _garments(folder / f"split.{category}.val.json", images)
    cases = []
    for number, entry in enumerate(read_annotations(source, list[GarmentChange])):
        parts = _feedback(images / f"{entry['candidate']}.jpg", entry["captions"])
        cases.append(UnseenQuery(str(number), parts, (entry["target"],), GARMENT_WANTED))
    return UnseenData(source, cases, pool)


def _garments(split: Path, folder: Path) -> dict[str, Source]:
    """The pool that a split file lists. A name that is listed twice is one garment."""
    return {name: folder / f"{name}.jpg" for name in read_annotations(split, list[Id])}


def _feedback(image: Path, texts: Iterable[str]) -> tuple[Source, ...]:
    """An image, and what is said of it as one text, where anything is."""
    feedback = " and ".join(text.strip() for text in texts if text.strip())
    return (image, feedback) if feedback else (image,)


ImageSet = TypedDict("ImageSet", {"members": list[Id]})
CirrQuery = TypedDict("CirrQuery", {"pairid": Id, "reference": Id, "target_hard": Id, "caption": Text, "img_set": ImageSet})


def read_cirr(root: Path, part: str) -> UnseenData:
    """CIRR (arXiv 2108.04024) from its authors' files: R@K over the whole split, where the reference image is no candidate of its
    own query, or R_subset@K over the other members of the query's image set (`part` "subset"). Right is the hard target."""
    folder = root / "cirr"
    source = folder / "cap.rc2.val.json"
    split = folder / "split.rc2.val.json"
    pool = {name: folder / "images" / file for name, file in read_annotations(split, dict[str, FileName]).items()}
    cases = []
    for number, entry in enumerate(read_annotations(source, list[CirrQuery])):
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
    folder = root / "sugar-crepe" / "data"
    if not folder.is_dir():
        folder = folder.parent  # the authors' folder `data` by itself
    files = {kind: folder / f"{kind}.json" for kind in SUGARCREPE_FILES}
    absent = tuple(path for path in files.values() if not path.is_file())
    images = root / "sugar-crepe" / "val2017"
    pairs = [
        (f"{kind}/{key}", kind, images / pair["filename"], pair["caption"], pair["negative_caption"])
        for kind, path in files.items()
        if path not in absent
        for key, pair in read_annotations(path, dict[str, CaptionPair]).items()
    ]
    return _choose(folder, pairs, absent)


TrueCaption = TypedDict("TrueCaption", {"caption": Text})
WrongCaption = TypedDict("WrongCaption", {"negative-prompt": Text})
NegatedCaption = TypedDict("NegatedCaption", {"json": TrueCaption, "sop_data": WrongCaption})
CcNegFile = TypedDict("CcNegFile", {"image_paths": list[Any], "annotations": list[Any]})


def read_ccneg(root: Path, _: str) -> UnseenData:
    """CC-Neg (arXiv 2403.20312): a caption against its negation, which loses its commas, and it alone, as by the authors."""
    source = root / "ccneg" / "ccneg_preprocessed.pt"
    data = check(source, _load_tensors(source), CcNegFile)
    paths, annotations = data["image_paths"], data["annotations"]
    if len(paths) != len(annotations):
        raise DataError(f"{source}: {len(paths)} image_paths, {len(annotations)} annotations; download the file again")
    used = range(max(0, len(paths) - CCNEG_ITEMS), len(paths))
    texts = check(source, {number: annotations[number] for number in used}, dict[int, NegatedCaption])
    pairs = []
    for number in used:
        name = paths[number].rpartition(CCNEG_PREFIX)[2] if CCNEG_PREFIX in str(paths[number]) else ""
        if not name or ".." in Path(name).parts:
            raise _wrong(source, number, "image_paths", paths[number], f"a path through {CCNEG_PREFIX}")
        true, wrong = texts[number]["json"]["caption"], texts[number]["sop_data"]["negative-prompt"].replace(",", "")
        pairs.append((str(number), "", root / "ccneg" / "cc3m" / name, true, wrong))
    return _choose(source, pairs)


def _choose(source: Path, pairs: Iterable[CaptionChoice], absent: tuple[Path, ...] = ()) -> UnseenData:
    """The image is the query and the two captions are its gallery."""
    cases: list[UnseenQuery] = []
    pool: dict[str, Source] = {}
    for id, group, image, true, wrong in pairs:
        gallery = (f"{id}/true", f"{id}/wrong")
        pool |= dict(zip(gallery, (true, wrong), strict=True))
        cases.append(UnseenQuery(id, (image,), gallery[:1], target="text", gallery=gallery, group=group))
    return UnseenData(source, cases, pool, absent)


def _load_tensors(path: Path) -> object:
    """The content of a file written by torch.save, where it is plain data: nothing that the file names is ever run."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: is refused ({str(error.__context__ or error)[:200]}): reading anything but plain lists, dicts and texts "
            "could run code. Download it from its authors, or load it where that is safe and save its lists again"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        reason = str(error)[:200] or "it ends too early"
        raise DataError(f"{path}: is not a whole file of torch.save: {reason}; download it again") from error
    return content


def _wrong(source: Path, number: int, name: str, value: object, wanted: str) -> DataError:
    return DataError(f"{source}, entry {number}: {name} is {repr(value)[:120]}; it must be {wanted}; download the file again")
