# ruff: noqa: PTH116, PTH118, PTH120, PTH206 - paths are texts here: to make a Path of each would take most of a run that finds nothing to do
"""The folders that an index is kept in step with, which the index itself remembers, and what stands for a file's state there.

A file's id is its path below the innermost root that holds it, with that root's prefix before it, so that whoever adds it, by
whatever folder, means the same item.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.errors import InputError, StoreError
from traceir.index.store import Index

NOTE: Final = "roots"
"""The note of an index that holds its roots: a JSON list of {folder, prefix}."""
COARSE_NS: Final = 2_000_000_000
FINE_NS: Final = 100_000_000
"""How old a file must be for its times to tell of a later change: FAT counts in steps of 2 s, others in a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Root:
    """A folder (absolute, links resolved) and what stands before the ids of its files."""

    folder: str
    prefix: str = ""

    def holds(self, path: str) -> bool:
        return is_below(path, self.folder)

    def id_of(self, path: str) -> str:
        """The id of a file below it."""
        return self.prefix + path.removeprefix(os.path.join(self.folder, "")).replace(os.sep, "/")


class Roots:
    """The roots of an index, innermost first."""

    def __init__(self, roots: Iterable[Root] = ()) -> None:
        self.all = sorted(roots, key=lambda root: (-len(root.folder), root.folder))
        self._of_folder: dict[str, Root | None] = {root.folder: root for root in self.all}

    @classmethod
    def read(cls, index: Index) -> Roots:
        try:
            return cls(Root(str(kept["folder"]), str(kept["prefix"])) for kept in json.loads(index.note(NOTE) or "[]"))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"the roots of index {index.info().uri} cannot be read; repair its note {NOTE!r}") from error

    def keep(self, index: Index) -> None:
        index.keep_note(NOTE, json.dumps([{"folder": root.folder, "prefix": root.prefix} for root in self.all]))

    def of(self, path: str) -> Root | None:
        """The innermost root that holds a path."""
        if path in self._of_folder:
            return self._of_folder[path]
        folder = os.path.dirname(path)
        if folder not in self._of_folder:
            self._of_folder[folder] = next((root for root in self.all if is_below(folder, root.folder)), None)
        return self._of_folder[folder]

    def is_hidden(self, path: str) -> bool:
        """Whether a path below a root has a hidden part there."""
        root = self.of(path)
        return root is not None and any(part.startswith(".") for part in path[len(root.folder) :].split(os.sep))

    def with_folder(self, folder: str, prefix: str | None) -> Roots:
        """These and a folder, where it is not in one of them already; roots below it that have no prefix become part of it.

        A prefix makes a folder a root of its own, and gives one that is a root already another prefix.
        """
        own = next((root for root in self.all if root.folder == folder), None)
        if prefix is None and (own or any(root.holds(folder) for root in self.all)):
            return self
        root = Root(folder, check_prefix(prefix or ""))
        return Roots(
            [root, *(other for other in self.all if other != own and not (root.holds(other.folder) and not other.prefix))]
        )

    def without(self, folder: str) -> Roots:
        """These without the folder and what is below it."""
        return Roots(root for root in self.all if not is_below(root.folder, folder))


def file_path(path: Path) -> str:
    """The absolute path of a file, with the links of its folder resolved; where it is a link itself, the link's own."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is the folder, or lies below it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def check_prefix(prefix: str) -> str:
    """A prefix of ids, which ends in a slash; InputError for one that is not plain text."""
    if not prefix.isprintable():
        raise InputError(f"prefix {prefix!r} holds characters that cannot be printed; give plain text such as card1")
    return prefix.strip("/") + "/" if prefix.strip("/") else ""


def stat_text(stat: os.stat_result) -> str:
    """Size and times of a file, which differ once it has been written to or exchanged for another."""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def settled_stat(path: str | Path) -> str:
    """`stat_text` of a file; its size alone where it is so new that a change might leave its times as they are; "" of none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return ""
    step = COARSE_NS if stat.st_mtime_ns % 1_000_000_000 == 0 else FINE_NS
    now = time.time_ns()
    is_new = any(0 <= now - then < step for then in (stat.st_mtime_ns, stat.st_ctime_ns))
    return f"{stat.st_size}:" if is_new else stat_text(stat)
