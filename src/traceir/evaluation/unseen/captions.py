"""Pictures and their captions, both ways: ShareGPT4V, Urban-1K (Long-CLIP, arXiv 2403.15378), Flickr30K (Karpathy's test split).

Each direction is encoded on its own. A picture that looks for its caption carries an instruction; captions and pools carry none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import below, read_entries, read_list
from traceir.evaluation.unseen.task import Case, Missing, Source, Task, settle

CAPTION_WANTED: Final = "Find an image caption describing the following everyday image."
METRICS: Final = ("hit@1", "hit@5", "hit@10")
FLICKR_CAPTIONS: Final = 5
"""Captions of one Flickr30K picture; caption i belongs to picture i // 5."""


def read_sharegpt4v(root: Path, missing: Missing = "stop") -> tuple[Task, Task]:
    """Long-CLIP's 1,000 pairs: text to image, image to text."""
    source = root / "sharegpt4v" / "datas_for_validation.json"
    images: dict[str, Path] = {}
    captions: dict[str, str] = {}
    for number, entry in enumerate(read_entries(source)):
        images[str(number)] = below(root / "sharegpt4v" / "val_data", entry.text("image_name"), entry.where)
        captions[str(number)] = entry.text("caption").replace("\n", " ")
    return _both_ways("sharegpt4v", "ShareGPT4V", source, images, captions, _pairs(images), missing)


def read_urban1k(root: Path, missing: Missing = "stop") -> tuple[Task, Task]:
    """Urban-1K: text to image, image to text. The caption is the first line of its file, the picture has the file's name."""
    folder = root / "Urban1k" / "caption"
    files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise DataError(f"{folder}: holds no caption file N.txt; docs/unseen.md lists the files of each set")
    captions = {path.stem: _first_line(path) for path in files}
    images = {name: root / "Urban1k" / "image" / f"{name}.jpg" for name in captions}
    return _both_ways("urban1k", "Urban-1K", folder, images, captions, _pairs(images), missing)


def read_flickr30k(root: Path, missing: Missing = "stop") -> tuple[Task, Task]:
    """Flickr30K: 5,000 captions to 1,000 pictures, and back, where any of a picture's five captions is right."""
    source = root / "flickr" / "flickr_text.json"
    texts = read_list(source)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{source}, entry {number}: is {text!r}; it must be a caption; download the file again")
    if len(texts) % FLICKR_CAPTIONS:
        raise DataError(f"{source}: {len(texts)} captions are not five for each picture; download the file again")
    captions: dict[str, str] = {str(number): text for number, text in enumerate(texts)}
    images = {str(number): root / "flickr" / "images" / f"{number}.png" for number in range(len(texts) // FLICKR_CAPTIONS)}
    of_image = {name: _captions_of(int(name)) for name in images}
    return _both_ways("flickr30k", "Flickr30K", source, images, captions, of_image, missing)


def _captions_of(number: int) -> tuple[str, ...]:
    return tuple(str(FLICKR_CAPTIONS * number + place) for place in range(FLICKR_CAPTIONS))


def _pairs(images: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in images}


def _both_ways(
    name: str,
    title: str,
    source: Path,
    images: Mapping[str, Source],
    captions: Mapping[str, Source],
    captions_of: Mapping[str, Sequence[str]],
    missing: Missing,
) -> tuple[Task, Task]:
    image_of = {caption: image for image, own in captions_of.items() for caption in own}
    to_image = tuple(Case(id, (text,), (image_of[id],), target="image") for id, text in captions.items())
    to_text = tuple(
        Case(id, (path,), tuple(captions_of[id]), instruction=CAPTION_WANTED, target="text") for id, path in images.items()
    )
    return (
        settle(Task(f"{name}_t2i", f"{title} t-i", source, to_image, images, METRICS, "hit@1"), missing),
        settle(Task(f"{name}_i2t", f"{title} i-t", source, to_text, captions, METRICS, "hit@1"), missing),
    )


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the path and rights") from error
    if not lines or not lines[0].strip():
        raise DataError(f"{path}:1: is blank; it must hold the caption; download the file again")
    return lines[0]
