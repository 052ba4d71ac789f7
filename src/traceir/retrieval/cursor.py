"""Cursors: what a page says for the next one. A cursor carries a hash of every hit shown so far, so that the next page is the
best of those not shown yet, and nothing is shown twice or left out, whatever is added or removed in between."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from traceir.errors import InputError

MAX_SHOWN: Final = 10_000
"""Hits that a cursor can carry, folded ones included: 107 KB of text."""
_HEAD: Final = struct.Struct(">4sI")  # and then 8 bytes for each hit
_MARK: Final = b"tir1"
_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Cursor:
    """The hashes of the hits shown so far, and the last rank among them, which is less where some were folded."""

    shown: frozenset[bytes] = frozenset()
    rank: int = 0

    @classmethod
    def read(cls, text: str) -> Cursor:
        """Of what `write` made; InputError for anything else, and for more than MAX_SHOWN hits."""
        try:
            packed = base64.b64decode(text, altchars=b"-_", validate=True)
            mark, rank = _HEAD.unpack_from(packed)
            hashes = packed[_HEAD.size :]
            shown = frozenset(hashes[at : at + _BYTES] for at in range(0, len(hashes), _BYTES))
            if mark != _MARK or len(hashes) % _BYTES or rank > len(shown):
                raise ValueError(text)
        except (ValueError, TypeError, struct.error) as error:
            raise InputError(
                f"the cursor (after) {str(text)[:40]!r} is none; give what the page before said is `next`, as it is"
            ) from error
        if len(shown) > MAX_SHOWN:
            raise InputError(f"the cursor (after) stands behind {len(shown)} hits, more than {MAX_SHOWN}; narrow the search")
        return cls(shown, rank)

    def write(self) -> str:
        return base64.urlsafe_b64encode(_HEAD.pack(_MARK, self.rank) + b"".join(sorted(self.shown))).decode()

    def has(self, id: str) -> bool:
        return _hash(id) in self.shown

    def past(self, ids: Iterable[str], ranks: int) -> Cursor:
        """Behind these hits too, of so many more ranks."""
        return Cursor(self.shown.union(map(_hash, ids)), self.rank + ranks)


def _hash(id: str) -> bytes:
    return hashlib.blake2b(id.encode(), digest_size=_BYTES).digest()
