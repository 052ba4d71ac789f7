"""Stand-ins for tests: an encoder whose vectors follow from content alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from traceir.items import Encoding, Item, Query, Route, Vector


def vector_of(content_hash: str, width: int) -> Vector:
    """The unit vector that belongs to a content hash."""
    seed = int.from_bytes(hashlib.sha256(content_hash.encode()).digest()[:8], "little")
    drawn = np.random.default_rng(seed).normal(size=width)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


class FakeEncoder:
    """Reads every image, as a real encoder does; queries with a step word ("then") reason."""

    fingerprint = "fake-1"
    prompt_version = "p1"

    def __init__(self, width: int = 16, delay: float = 0.0) -> None:
        self.width = width
        self.delay = delay
        self.encoded: list[str | None] = []
        self.calls = 0

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        return [self._encode_query(query, route) for query in queries]

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        self.calls += 1
        time.sleep(self.delay)
        self.encoded += [item.id for item in items]
        return [Encoding(self._vector(item), "direct", "", 0, 1.0, False) for item in items]

    def _encode_query(self, query: Query, route: Route) -> Encoding:
        vector = self._vector(Item(query.parts or (query.instruction or "",)))
        if route == "reason" or (route == "auto" and "then" in query.text.split()):
            return Encoding(vector, "reason", "first this, then that", 5, 0.1, False)
        return Encoding(vector, "direct", "", 0, 0.9, False)

    def _vector(self, item: Item) -> Vector:
        for image in item.images:
            image.load()
        return vector_of(item.content_hash(), self.width)
