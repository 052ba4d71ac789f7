"""Files and folders that never appear half-written: made beside the target, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(file: Path, *, binary: bool = False, durable: bool = False) -> Iterator[IO[Any]]:
    """A stream into a new file that takes the place of `file` when the block ends, and leaves it alone where the block raises.

    Text is UTF-8 with line feeds. `durable` returns when file and name are on the disk. Missing folders are made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        with fresh.open("xb") if binary else fresh.open("x", encoding="utf-8", newline="\n") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(fresh, file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(file.parent)


def write_whole(file: Path, content: str | bytes, *, durable: bool = False) -> None:
    """`content` as the whole of `file`, at once."""
    with replacing(file, binary=isinstance(content, bytes), durable=durable) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.replace(target, Path(folder) / "old")
        os.replace(fresh, target)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
