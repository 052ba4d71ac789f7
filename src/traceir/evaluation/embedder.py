"""An encoder over a store: inputs are encoded once, in shares, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from traceir.evaluation.embeddings import Embeddings, EmbeddingStore, Maker, Shard, check_shard
from traceir.items import Encoding, Item, Query, Route
from traceir.search import EncoderLike

AT_ONCE: Final = 512
"""Inputs whose pictures are in memory together while they are encoded."""


class Embedder:
    """Embeddings of items and queries by one encoder, kept below `cache`; the i-th of n shares is encoded here (`shard`).

    `repair` encodes damaged blocks again and logs them; without it they are a StoreError that names the file.
    """

    def __init__(
        self, encoder: EncoderLike, cache: Path, *, shard: Shard = (0, 1), repair: bool = False, progress: bool = False
    ) -> None:
        self.encoder, self.cache, self.shard, self.progress = encoder, cache, check_shard(shard), progress
        self.repair = repair
        self._turn = 0

    def items(self, make: Callable[[], Iterator[Item]], count: int) -> Embeddings | None:
        """Candidates, in order; None while other shares are not encoded. `make` begins the inputs anew."""
        store = EmbeddingStore(self.cache, Maker.of(self.encoder, more=self._more()))
        return self._embed(store, _Inputs(make, count), self.encoder.encode_items)

    def queries(self, make: Callable[[], Iterator[Query]], count: int, route: Route) -> Embeddings | None:
        """Queries by one route, in order; None while other shares are not encoded."""
        threshold, budget = getattr(self.encoder, "threshold", None), getattr(self.encoder, "budget", None)
        maker = Maker.of(self.encoder, route, threshold=threshold, max_reasoning_tokens=budget, more=self._more())
        store = EmbeddingStore(self.cache, maker)

        def encode(queries: Sequence[Query]) -> list[Encoding]:
            return self.encoder.encode_queries(queries, route=route)

        return self._embed(store, _Inputs(make, count), encode)

    def _more(self) -> dict[str, str | int | float | None]:
        """Settings of the encoder that decide vectors, where it tells them."""
        return dict(getattr(self.encoder, "vector_settings", {}))

    def _embed(
        self, store: EmbeddingStore, inputs: _Inputs, encode: Callable[[Sequence[Any]], Sequence[Encoding]]
    ) -> Embeddings | None:
        plan = store.fill(inputs, in_pieces(encode), shard=self._share(), repair=self.repair, progress=self.progress)
        if self.shard[1] > 1:
            plan = store.plan(inputs)
        return None if store.missing(plan) else store.open(plan)

    def _share(self) -> Shard:
        """The shard, turned by one at every call: first blocks, of which many inputs have no more, go to all shards alike."""
        number, count = self.shard
        self._turn += 1
        return (number + self._turn - 1) % count, count


class _Inputs:
    """Inputs made anew at each iteration, of known number."""

    def __init__(self, make: Callable[[], Iterator[Any]], size: int) -> None:
        self._make, self._size = make, size

    def __iter__(self) -> Iterator[Any]:
        return self._make()

    def __len__(self) -> int:
        return self._size


def in_pieces(encode: Callable[[Sequence[Any]], Sequence[Encoding]]) -> Callable[[Sequence[Any]], list[Encoding]]:
    """`encode` over pieces of a block, so that few pictures are in memory at a time."""

    def encode_all(inputs: Sequence[Any]) -> list[Encoding]:
        return [one for first in range(0, len(inputs), AT_ONCE) for one in encode(inputs[first : first + AT_ONCE])]

    return encode_all
