"""Where the entries of large files begin, in 16 bytes an entry."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from traceir.errors import DataError

FOLD: Final = 65_536
"""New entries are in a dict up to this many, and then merged into the sorted arrays."""
OPEN_FILES: Final = 64
_OFFSET_BITS: Final = 48


class Places:
    """Hashes of 64 bits to places (file number, byte offset). Entries may share a hash: whoever looks up reads and compares."""

    def __init__(self) -> None:
        self._hashes: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._places: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._new: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._hashes) + len(self._new)

    def add(self, hash: int, file: int, offset: int) -> None:
        """Remembers an entry; of entries with the same hash the first added is the first found."""
        if hash in self._new or len(self._new) >= FOLD:
            self._fold()
        self._new[hash] = file << _OFFSET_BITS | offset

    def find(self, hash: int) -> Iterator[tuple[int, int]]:
        """The (file number, offset) of every entry with this hash, in the order in which they were added."""
        wanted = np.uint64(hash)
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            yield _unpack(int(self._places[place]))
            place += 1
        if (new := self._new.get(hash)) is not None:
            yield _unpack(new)

    def _fold(self) -> None:
        hashes = np.fromiter(self._new, dtype=np.uint64, count=len(self._new))
        places = np.fromiter(self._new.values(), dtype=np.uint64, count=len(self._new))
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order]
        where = np.searchsorted(self._hashes, hashes, side="right")
        self._hashes = np.insert(self._hashes, where, hashes)
        self._places = np.insert(self._places, where, places)
        self._new.clear()


class LineFiles:
    """Files from which lines are read at known offsets; at most OPEN_FILES of them are open at a time."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self._open: OrderedDict[int, int] = OrderedDict()

    def add(self, path: Path) -> int:
        """The number of a file from now on."""
        self.paths.append(path)
        return len(self.paths) - 1

    def line(self, file: int, offset: int) -> bytes:
        """The line that begins at `offset`, without its end. Raises DataError where the file cannot be read."""
        try:
            found, size = b"", 8192
            while b"\n" not in found:
                more = os.pread(self._descriptor(file), size, offset + len(found))
                if not more:
                    break
                found, size = found + more, size * 2
        except OSError as error:
            raise DataError(f"{self.paths[file]}: {error.strerror or error}; check the file and its rights") from error
        return found.partition(b"\n")[0]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]


def whole_bytes(fd: int) -> int:
    """How many bytes of a file end with a whole line."""
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - 65_536)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _unpack(place: int) -> tuple[int, int]:
    return place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
