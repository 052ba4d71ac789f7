# ruff: noqa: PTH110, PTH112, PTH116, PTH122, PTH208 - paths are texts here: to make a Path of each would take most of a run that finds nothing to do
"""What lies in a folder: the files that are read there and their stats, found without opening any."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from traceir.collection.records import Failure, Note
from traceir.collection.roots import is_below, stat_text
from traceir.collection.sources import readable_suffixes
from traceir.index.sqlite import FILE_NAME


@dataclass(slots=True)
class FolderListing:
    """Files that are read, by path, with their stats (`stat_text`; "" of a link to nothing); what else was met below `top`.

    `unknown` are files and folders that could not be looked at: of what lies below them nothing is known.
    """

    top: str
    stats: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Failure] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    links: int = 0

    def notes(self) -> list[Note]:
        """What was left out."""
        counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.others.most_common()]
        counts += [f"{self.links} linked folder{'s' if self.links > 1 else ''}"] if self.links else []
        return [Note(self.top, f"left out: {', '.join(counts)}")] if counts else []


def list_files(top: str) -> FolderListing:
    """The files in a folder and all below it, or the one file `top`; nothing where it is not there.

    Left out are hidden files and folders, linked folders, and a folder that is an index.
    """
    listing, suffixes = FolderListing(top), readable_suffixes()
    if os.path.exists(top) and not os.path.isdir(top):
        if os.path.splitext(top)[1].lower() in suffixes:
            listing.stats[top] = stat_text(os.stat(top))
        return listing
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                names = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            listing.unknown[folder] = Failure(folder, f"the folder cannot be read: {error.strerror}; check its rights")
            continue
        if folder == top or not any(entry.name == FILE_NAME for entry in names):
            folders += _take(names, listing, suffixes)
    return listing


def _take(entries: list[os.DirEntry[str]], listing: FolderListing, suffixes: frozenset[str]) -> Iterator[str]:
    """Lists the files of one folder; the folders in it."""
    for entry in entries:
        if entry.name.startswith("."):
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        try:
            if entry.is_dir():
                listing.links += entry.is_symlink()
                if not entry.is_symlink():
                    yield entry.path
            elif suffix in suffixes:
                listing.stats[entry.path] = stat_text(entry.stat())
            else:
                listing.others[suffix] += 1
        except FileNotFoundError:
            if entry.is_symlink():
                listing.stats[entry.path] = ""
        except OSError as error:
            listing.unknown[entry.path] = Failure(entry.path, f"it cannot be looked at: {error.strerror}; check its rights")


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths without those below another."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: (len(path), path)):
        if not any(is_below(path, other) for other in kept):
            kept.append(path)
    return kept


def is_there(path: str) -> bool:
    """Whether a file of exactly this name is there, also where case does not count."""
    folder, name = os.path.split(path)
    try:
        return name in os.listdir(folder) and not os.path.isdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def read_ahead(paths: Iterable[str]) -> None:
    """Tell the system, where it can be told, that these files are read next, which it may do while the encoder works."""
    for path in paths:
        with suppress(OSError, AttributeError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
