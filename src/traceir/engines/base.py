"""What encoders over HTTP servers share: the connection, inputs as they are sent, checks of what comes back. Shapes: D width."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

import numpy as np

from traceir.connection import Connected, Connection
from traceir.errors import ModelError
from traceir.items import Item, Query, Vector

WEIGHTS: Final = "are its weights whole, is its precision right?"
REQUEST_BYTES: Final = 24 * 1024 * 1024
"""Bytes of inputs in one request, in JSON with images in base64, beyond which no input joins."""


class ConnectionOptions(TypedDict, total=False):
    """Options of a Connection, with its defaults."""

    api_key: str
    in_flight: int
    timeout_s: float
    tries: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class Payload:
    """One input as it is sent: its number in the call, what its request states once, and its bytes in JSON."""

    number: int
    content: Item | Query
    body: Any
    fields: Mapping[str, Any]
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", len(json.dumps(self.body)))


def batches(payloads: Iterable[Payload], most: int) -> Iterator[list[Payload]]:
    """In order, each of like fields, of at most `most` inputs and `REQUEST_BYTES`, or of one larger input."""
    batch: list[Payload] = []
    for payload in payloads:
        size = sum(other.bytes for other in batch) + payload.bytes
        if batch and (len(batch) == most or size > REQUEST_BYTES or batch[0].fields != payload.fields):
            yield batch
            batch = []
        batch.append(payload)
    if batch:
        yield batch


class HttpEngine(Connected):
    """A server at `address`, checked at once (`_meet`). Thread-safe; all threads share the connection."""

    kind = "engine"

    def __init__(self, address: str, options: ConnectionOptions) -> None:
        self._connection = Connection(address, **options)
        self._path = ""
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        """Raises ModelError where the server is not the one that is needed."""
        raise NotImplementedError

    def _unit(self, values: Any, what: str, width: int) -> Vector:
        """Numbers as a vector [D] of unit length; ModelError for others, also of another width than `width` (0: any)."""
        try:
            with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is told of below
                vector = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._wrong(f"returned a {what} that is no list of numbers: {str(values)[:80]}") from error
        if vector.ndim != 1 or not len(vector):
            raise self._wrong(f"returned a {what} of shape {vector.shape}; only models of one vector an input can be used")
        if not np.isfinite(vector).all() or not vector.any():
            raise self._wrong(f"returned a {what} that is not finite or all zero; {WEIGHTS}")
        if width and len(vector) != width:
            raise self._wrong(f"returned a {what} of {len(vector)} components where {width} are due")
        return vector / np.linalg.norm(vector)

    def _wrong(self, what: str, error: type[ModelError] = ModelError) -> ModelError:
        return error(f"the {self.kind} {self.address}{self._path} {what}")
