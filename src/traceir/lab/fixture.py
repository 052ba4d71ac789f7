"""The small frozen MiniBEIR that comes with the package: what `traceir demo` searches, and what the tests read."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from traceir.errors import InputError

ARCHIVE: Final = Path(__file__).with_name("minibeir.zip")
"""A folder in M-BEIR's layout, made by `python -m benchmarks.fixture`."""


def unpack(out: Path, archive: Path = ARCHIVE) -> Path:
    """Makes `out` the folder of the archive, whole or not at all, and returns it; a data folder that is there stays as it is.

    Several processes may unpack to one folder at once. Raises InputError where `out` holds something else.
    """
    marks = (out / "query" / "test", out / "unseen.json")
    if any(mark.exists() for mark in marks) and not (out / "building.json").exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no data folder; give a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        work.chmod(0o755)
        with zipfile.ZipFile(archive) as files:
            files.extractall(work)
        os.replace(work, out)
    except OSError:
        if not any(mark.exists() for mark in marks):  # else another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out
