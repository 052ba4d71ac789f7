"""Sharing between callers: of places and bytes, of turns, of threads, of a queue. All but `Rounds` belong to one event loop.

Who a caller is stands in `caller`, which the gate sets for each request: a key, or an address where there are no keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Final, Generic, TypeVar

T = TypeVar("T")
caller: ContextVar[str] = ContextVar("caller", default="")
"""On whose behalf the current task works."""
ALONE_S: Final = 10.0
"""Seconds without any other caller after which one counts as alone."""


class Shares:
    """Places or bytes of which a caller may hold as much as then stays free for others: half of all when alone, a third each when
    two take what they get. So there is always something left for one that comes anew, however greedy the others are.

    `least` is never refused for the share's sake, only where all together would have more than `total`.
    """

    def __init__(self, total: int, least: int = 1) -> None:
        self.total, self.least, self.held = total, least, 0
        self._by: Counter[str] = Counter()

    def room(self, who: str, count: int = 1) -> bool:
        """Whether `count` more may be taken now."""
        mine, free = self._by[who] + count, self.total - self.held - count
        return free >= 0 and mine <= max(free, self.least)

    def take(self, who: str, count: int = 1) -> bool:
        if not self.room(who, count):
            return False
        self.held += count
        self._by[who] += count
        return True

    def give(self, who: str, count: int = 1) -> None:
        self.held -= count
        self._by[who] -= count
        if not self._by[who]:
            del self._by[who]

    def of(self, who: str) -> int:
        return self._by[who]


class Company:
    """Who has asked lately, so that what one caller may take depends on whether there are others. Thread-safe enough: a late
    answer costs one turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}

    def alone(self, who: str) -> bool:
        """Notes that `who` asks; whether nobody else did in the last ALONE_S."""
        now = self._seen[who] = self._clock()
        for other in [one for one, at in self._seen.copy().items() if now - at > ALONE_S]:
            self._seen.pop(other, None)
        return len(self._seen) == 1


class Turns:
    """So many at a time, one caller after the other. One that is not alone leaves a turn free for others, where there are two."""

    def __init__(self, count: int) -> None:
        self._count, self._free = count, count
        self._busy: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._company = Company()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        who = await self.take()
        try:
            yield
        finally:
            self.give(who)

    async def take(self) -> str:
        """Waits for a turn of the current caller, who must `give` it back under the name that is returned."""
        who = caller.get()
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(mine)
        self._grant()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give(who)
            raise
        return who

    def give(self, who: str) -> None:
        self._free += 1
        self._busy[who] -= 1
        if not self._busy[who]:
            del self._busy[who]
        self._grant()

    def _grant(self) -> None:
        while self._free and (who := next(filter(self._may, self._waiting), None)) is not None:
            queue = self._waiting.pop(who)
            mine = queue.popleft()
            if queue:
                self._waiting[who] = queue  # at the end, behind all others
            if not mine.done():
                self._free -= 1
                self._busy[who] += 1
                mine.set_result(None)

    def _may(self, who: str) -> bool:
        return self._busy[who] < self._count - 1 or not self._busy[who] or self._company.alone(who)


class Threads:
    """A few threads that work for one caller after the other."""

    def __init__(self, count: int, name: str) -> None:
        self._pool, self._turns = ThreadPoolExecutor(count, name), Turns(count)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. The turn lasts until the thread is done, also where the caller has gone meanwhile."""
        who = await self._turns.take()
        loop = asyncio.get_running_loop()

        def done(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._turns.give, who)

        try:
            running = self._pool.submit(work)
        except BaseException:
            self._turns.give(who)
            raise
        running.add_done_callback(done)
        return await asyncio.wrap_future(running)

    def shutdown(self) -> None:
        self._pool.shutdown()


class Rounds(Generic[T]):
    """A queue for each caller; iterating takes one from each in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(self, who: str, one: T) -> None:
        self._queues.setdefault(who, deque()).append(one)

    def put_back(self, who: str, one: T) -> None:
        """Something that was taken and is not wanted yet: first again of what this caller has."""
        self._queues.setdefault(who, deque()).appendleft(one)

    def __iter__(self) -> Iterator[T]:
        """Takes what it gives, until nothing is left."""
        while self._queues:
            who, queue = self._queues.popitem(last=False)
            one = queue.popleft()
            if queue:
                self._queues[who] = queue
            yield one
