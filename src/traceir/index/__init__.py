"""The index: vectors and what belongs to them, behind one small interface; `open_index` chooses the adapter by URI."""

from __future__ import annotations

import os
import re
from pathlib import Path

from traceir.errors import StoreError
from traceir.index.filters import And, Eq, Filter, In, Range
from traceir.index.sqlite import SqliteIndex
from traceir.index.store import Index, IndexInfo, Stored, StoredType

__all__ = ["And", "Eq", "Filter", "In", "Index", "IndexInfo", "Range", "SqliteIndex", "Stored", "open_index"]


def open_index(
    uri: str | os.PathLike[str],
    *,
    fingerprint: str | None,
    prompt_version: str | None,
    dim: int | None = None,
    create: bool = False,
    dtype: StoredType = "float32",
    timeout: float = 10.0,
) -> SqliteIndex:
    """The index in the folder `uri`, made now if `create` and not there yet.

    `fingerprint` and `prompt_version` are the encoder's; another model's index is refused (StoreError). With None the
    index can be looked at and pruned (info, get, scan, delete), not searched or added to. `dim`, the encoder's width,
    is needed to create and checked otherwise. `dtype` counts at creation only. `timeout`: seconds to wait for a writer.
    """
    text = os.fspath(uri)
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+-]+):", text)
    if scheme is not None or not text:
        raise StoreError(f"index {text!r} has no adapter in this version; give the path of a folder")
    return SqliteIndex(
        Path(text),
        fingerprint=fingerprint,
        prompt_version=prompt_version,
        dim=dim,
        create=create,
        dtype=dtype,
        timeout=timeout,
    )
