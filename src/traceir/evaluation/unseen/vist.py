"""VIST: a story told in pictures and captions, in search of its last picture.

The data are Visual Storytelling's (arXiv 1604.03968), the protocol FROMAGe's (arXiv 2301.13823, table 1): the query is every
caption and every picture but the last; pictures already shown in the story may not be found.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from traceir.errors import DataError
from traceir.evaluation.unseen.annotations import Entry, read_object
from traceir.evaluation.unseen.task import Case, Missing, Source, Task, files_in, settle

PICTURE_WANTED: Final = (
    "I will provide you with a series of images and captions from a story, "
    "and I need you to retrieve the image corresponding to the last caption."
)
METRICS: Final = ("hit@1", "hit@5", "hit@10")
SUFFIXES: Final = (".jpg", ".png", ".gif")


def read_vist(root: Path, missing: Missing = "stop") -> Task:
    """Story to picture, over all pictures that the stories use.

    A story whose last picture was shown before cannot be answered and counts as a miss, as in the authors' code. Many pictures
    are gone from Flickr: `missing="skip"` leaves out the stories that need one, as the authors do.
    """
    source = root / "vist" / "sis" / "val.story-in-sequence.json"
    stories: dict[str, list[tuple[int, str, str]]] = {}
    for number, wrapped in enumerate(read_object(source).values("annotations")):
        entry = _unwrap(wrapped, f"{source}, annotations {number}")
        stories.setdefault(entry.name("story_id"), []).append((_place(entry), entry.name("photo_flickr_id"), entry.text("text")))
    paths = _find_files(root / "vist" / "images", {photo for story in stories.values() for _, photo, _ in story})
    cases = tuple(_case(id, sorted(story, key=lambda step: step[0]), paths) for id, story in stories.items())
    return settle(Task("vist", "VIST", source, cases, paths, METRICS, "hit@1"), missing)


def _unwrap(wrapped: object, where: str) -> Entry:
    if not isinstance(wrapped, list) or len(wrapped) != 1:
        raise DataError(f"{where}: is {repr(wrapped)[:120]}; it must be a list of one object; download the file again")
    return Entry(wrapped[0], where)


def _place(entry: Entry) -> int:
    name = entry.name("worker_arranged_photo_order")
    if not name.isdecimal():
        raise entry.fail("worker_arranged_photo_order", "an integer of at least 0")
    return int(name)


def _case(id: str, story: list[tuple[int, str, str]], paths: dict[str, Path]) -> Case:
    *shown, (_, last, ending) = story
    parts: list[Source] = [part for _, photo, text in shown for part in (text, paths[photo])]
    masked = tuple(dict.fromkeys(photo for _, photo, _ in shown))
    return Case(id, (*parts, ending), (last,), instruction=PICTURE_WANTED, masked=masked)


def _find_files(folder: Path, photos: Iterable[str]) -> dict[str, Path]:
    """The file of each photo, by the first ending that is there; photos in a fixed order."""
    there = files_in(folder)
    found: dict[str, Path] = {}
    for photo in sorted(photos):
        names = [f"{photo}{suffix}" for suffix in SUFFIXES]
        found[photo] = folder / next((name for name in names if name in there), names[0])
    return found
