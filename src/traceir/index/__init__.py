"""The index: vectors and what belongs to them, behind one small interface; `open_index` chooses the adapter by URI."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Unpack, overload

from traceir.errors import StoreError
from traceir.index.filter_text import as_filter, parse_filter
from traceir.index.filters import And, Eq, Filter, Glob, In, Not, Or, Range, Where
from traceir.index.pages import Position, position_of
from traceir.index.sqlite import SqliteIndex
from traceir.index.store import Index, IndexInfo, ModelIdentity, OpenOptions, Stored

__all__ = [
    "And", "Eq", "Filter", "Glob", "In", "Index", "IndexInfo", "Not", "Or", "Position", "Range", "SqliteIndex", "Stored", "Where",
    "as_filter", "open_index", "parse_filter", "position_of",
]  # fmt: skip


@overload
def open_index(uri: Path, encoder: ModelIdentity | None = None, **options: Unpack[OpenOptions]) -> SqliteIndex: ...


@overload
def open_index(uri: str | os.PathLike[str], encoder: ModelIdentity | None = None, **options: Unpack[OpenOptions]) -> Index: ...


def open_index(uri: str | os.PathLike[str], encoder: ModelIdentity | None = None, **options: Unpack[OpenOptions]) -> Index:
    """The index at `uri`, made now if `create` and not there yet.

    A path names a folder, `milvus-lite:./FILE.db` a local file of Milvus, `http://HOST:19530/NAME` a collection on a Milvus
    server or cluster (without /NAME, the one called `traceir`).

    `encoder` is who makes the vectors; another model's index is refused (StoreError). Without one the index can be looked at and
    pruned (info, get, scan, delete), not searched or added to. What is asked of an encoder can be told instead: its
    `fingerprint`, its `prompt_version`, and `dim`, its width, which is needed to create and checked otherwise. `dtype`
    ("float32", "float16", or "int8": a folder that keeps float32 and is searched by a quarter of its bytes in memory)
    counts at creation only. `timeout`: seconds to wait for a writer, or for a server to answer (10).
    """
    if encoder is not None:
        options |= {"fingerprint": encoder.fingerprint, "prompt_version": encoder.prompt_version, "dim": encoder.width}
    text = os.fspath(uri)
    if not isinstance(uri, Path) and text.startswith(("milvus-lite:", "http://", "https://")):
        from traceir.index.milvus import MilvusIndex

        return MilvusIndex(text, **options)
    if re.match(r"[A-Za-z][A-Za-z0-9+-]+:", text) or not text:
        raise StoreError(
            f"index {text!r} has no adapter in this version; "
            "give the path of a folder, milvus-lite:./FILE.db, or http://HOST:19530/NAME"
        )
    return SqliteIndex(Path(text), **options)
