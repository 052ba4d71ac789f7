"""From one index to another, of whatever kind; a copy that was cut off is simply repeated and goes on."""

from __future__ import annotations

from itertools import islice
from operator import attrgetter
from typing import Final, cast

import numpy as np
from tqdm import tqdm

from traceir.errors import InputError, StoreError
from traceir.images import ImageInput
from traceir.index.filters import same_fields
from traceir.index.store import Index, Stored, check_identity
from traceir.items import Item, Vector

_MOST_BYTES: Final = 32 * 2**20


def copy(source: Index, target: Index, *, batch: int = 500, progress: bool = True) -> int:
    """Put every item of `source` with its vector into `target`, and return how many had to be written.

    An item that `target` has with the same content hash, text, image name and fields is skipped; one that differs is replaced;
    what only `target` has stays. Each batch is durable before the next. StoreError where the two were filled by different models.
    A `target` of float16 rounds the vectors as it always does. The background of `source`, where it has one, replaces that of
    `target`.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; give at least 1")
    left, right = source.info(), target.info()
    check_identity(right.uri, "model", right.fingerprint, left.fingerprint)
    check_identity(right.uri, "prompt version", right.prompt_version, left.prompt_version)
    if left.dim != right.dim:
        raise StoreError(f"index {right.uri} holds vectors of width {right.dim}, not {left.dim} as {left.uri}; fill a new index")
    rows, written = source.scan(with_vectors=True), 0
    with tqdm(total=left.count, unit="item", desc="copying", disable=not progress) as bar:
        while page := list(islice(rows, max(1, min(batch, _MOST_BYTES // (4 * left.dim))))):
            known = target.get([stored.id for stored in page])
            missing = [stored for stored in page if not _is_same(stored, known.get(stored.id))]
            if missing:
                vectors = np.stack([cast(Vector, stored.vector) for stored in missing])
                target.upsert([Copied(stored) for stored in missing], vectors)
                written += len(missing)
            bar.update(len(page))
    if (background := source.background()) is not None:
        target.keep_background(background)
    if (roots := source.note("roots")) is not None:  # of the folders it is kept in step with
        target.keep_note("roots", roots)
    return written


class Copied(Item):
    """An item as an index keeps it: the bytes of its images are not there any more, only their hash."""

    __slots__ = ("_content_hash",)

    def __init__(self, stored: Stored) -> None:
        image = () if stored.modality == "text" else (ImageInput.from_bytes(b"", name=stored.image or ""),)
        text = () if stored.text is None else (stored.text,)
        Item.__init__(self, (*image, *text), id=stored.id, fields=stored.fields)
        object.__setattr__(self, "_content_hash", stored.content_hash)

    def content_hash(self) -> str:
        kept: str = object.__getattribute__(self, "_content_hash")
        return kept


def _is_same(stored: Stored, other: Stored | None) -> bool:
    kept = attrgetter("content_hash", "modality", "text", "image")
    return other is not None and kept(stored) == kept(other) and same_fields(stored.fields, other.fields)
