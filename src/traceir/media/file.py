"""Files that are too large to be read whole: checked, and hashed once for as long as they stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Final

from traceir.errors import ImageError

Version = tuple[int, int, int, int]
"""Device, inode, size and time of change: a file's content is the same while these are."""
_PACKAGES: Final = {"pillow_heif": "pillow-heif", "rawpy": "rawpy", "pypdfium2": "pypdfium2", "av": "av"}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an OSError of this file into an ImageError that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}; check the path and rights") from error


def version_of(path: Path) -> Version:
    """Raises ImageError for what is no regular file, is empty, or cannot be reached."""
    with readable(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path} is not a regular file; give the path of a file")
    if not status.st_size:
        raise ImageError(f"{path} is empty (0 bytes); replace or remove it")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def digest_of(path: Path) -> str:
    """Hex SHA-256 of the file's bytes, which are not read again while the file stays as it is."""
    return _digest(path, version_of(path))


@lru_cache(maxsize=256)
def _digest(path: Path, version: Version) -> str:
    with readable(path), path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        status = os.fstat(file.fileno())
    if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != version:
        raise ImageError(f"{path} changed while in use; open it again once nothing writes it any more")
    return digest


def package(name: str, what: str) -> ModuleType:
    """The optional package of that module; ImageError where it is not installed."""
    try:
        return __import__(name)
    except (ImportError, OSError) as error:
        raise ImageError(f"{what} needs the package {_PACKAGES[name]}; pip install 'traceir[files]'") from error
