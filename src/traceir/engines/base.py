"""What encoders over HTTP servers share: the connection, requests asked again, checks of what comes back. Shapes: D width."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypedDict, TypeVar

import numpy as np

from traceir.connection import Answer, Connection, TransientError
from traceir.errors import ModelError
from traceir.items import Vector

T = TypeVar("T")
WEIGHTS: Final = "are its weights whole, is its precision right?"


class ConnectionOptions(TypedDict, total=False):
    """Options of a Connection, with its defaults."""

    api_key: str
    in_flight: int
    timeout_s: float
    tries: int
    pause_s: float


class HttpEngine:
    """A server at `address`, asked at once (`_meet`) whether it will do. Thread-safe; all threads share the connection."""

    kind = "engine"

    def __init__(self, address: str, options: ConnectionOptions) -> None:
        self._connection = Connection(address, **options)
        self._path = ""
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._connection.address

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _meet(self) -> None:
        """Raises ModelError where the server is not the one that is needed."""
        raise NotImplementedError

    async def _ask(self, path: str, body: Mapping[str, Any], refused: Sequence[int], read: Callable[[Answer], T]) -> T:
        """What `read` makes of the answer; asked again, after doubling pauses, while it raises TransientError and tries last."""
        for attempt in range(self._connection.tries):
            answer = await self._connection.request("POST", path, body, refused=refused)
            try:
                return read(answer)
            except TransientError:
                if attempt + 1 == self._connection.tries:
                    raise
            await asyncio.sleep(self._connection.pause_s * 2**attempt)
        raise AssertionError("unreachable")

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
