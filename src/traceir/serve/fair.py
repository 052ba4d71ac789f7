"""Fair sharing among callers: of places and bytes, of slots and threads, of queues and of the model's time.

A caller is a key, or an address where there are no keys. All but `FairExecutor` are used in one event loop, or under a lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")
caller: ContextVar[str] = ContextVar("caller", default="")  # on whose behalf the current task works; "": nobody in particular
patient: ContextVar[bool] = ContextVar("patient", default=False)
"""Whether the current task is part of long work, which waits for a free place instead of being refused."""
MANY: Final = 1000
FEW: Final = 32
ALONE_S: Final = 10.0  # seconds without any other caller after which one counts as alone


class Usage:
    """What each caller has used lately, halved every ALONE_S, and whether there are several callers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._had: dict[str, tuple[float, float]] = {}  # amount and time, the latest last

    def of(self, who: str) -> float:
        had, at = self._had.get(who, (0.0, 0.0))
        return float(had * 0.5 ** ((self._clock() - at) / ALONE_S)) if had else 0.0

    def add(self, who: str, amount: float) -> None:
        had, now = self.of(who) + amount, self._clock()
        self._had.pop(who, None)
        self._had[who] = had, now
        if len(self._had) > MANY:
            self._had = {name: had for name, had in self._had.items() if now - had[1] <= ALONE_S or self.of(name) > 1e-3}

    def note(self, who: str) -> None:
        """A caller has asked."""
        self.add(who, 0.0)

    @property
    def crowded(self) -> bool:
        """Whether more than one has asked in the last ALONE_S."""
        latest = list(self._had.values())[-2:]  # a copy, since another thread may note meanwhile
        return len(latest) > 1 and self._clock() - latest[0][1] <= ALONE_S


class Shares:
    """Places or bytes; a caller may hold at most as many as then remain free, so that some are left for a new caller.

    Up to `least` a caller is bound by the total only. The caller "" is only bound by the total.
    """

    def __init__(self, total: int, least: int = 1) -> None:
        self.total, self.least, self.held = total, least, 0
        self._by: Counter[str] = Counter()

    def fits(self, who: str, count: int = 1, weight: int = 1) -> bool:
        """Whether `count` more may be taken now; with `weight` 2 a caller may hold half of what then stays free."""
        mine, free = self._by[who] + count, self.total - self.held - count
        return free >= 0 and (not who or mine <= self.least or mine * weight <= free)

    def take(self, who: str, count: int = 1) -> bool:
        if not self.fits(who, count):
            return False
        self.hold(who, count)
        return True

    def hold(self, who: str, count: int = 1) -> None:
        """Takes without a check."""
        self.held += count
        self._by[who] += count
        if not self._by[who]:
            del self._by[who]

    def give(self, who: str, count: int = 1) -> None:
        self.hold(who, -count)

    def of(self, who: str) -> int:
        return self._by[who]


class Places(Shares):
    """Shares with a queue, served one caller after the other. Work that waits gets at most a third of all, so that short work of
    its caller finds places too, and with several callers at most FEW a caller, so that long work is spread evenly."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.usage = Usage()
        self._waiting: Rounds[asyncio.Future[None]] = Rounds()

    def is_open(self, who: str) -> bool:
        """Whether the next waiting task of a caller may go on."""
        return self.fits(who, weight=2) and (self.of(who) < FEW or not self.usage.crowded)

    async def wait(self, who: str) -> None:
        """Takes a place once there is one."""
        self.usage.note(who)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(who, mine)
        self._grant()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give(who)
            raise

    def take(self, who: str, count: int = 1) -> bool:
        self.usage.note(who)
        return super().take(who, count)

    def give(self, who: str, count: int = 1) -> None:
        super().give(who, count)
        self._grant()

    def _grant(self) -> None:
        while (who := next(filter(self.is_open, self._waiting.callers()), None)) is not None:
            mine = self._waiting.take(who)
            if not mine.done():
                self.hold(who)
                mine.set_result(None)


class Slots(Places):
    """So many tasks at a time, one caller after the other. With several callers, one that holds a slot never gets the last."""

    def is_open(self, who: str) -> bool:
        return self.held < self.total - (self.of(who) > 0 and self.usage.crowded)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds a slot for the current caller."""
        who = caller.get()
        await self.wait(who)
        try:
            yield
        finally:
            self.give(who)


class FairExecutor(ThreadPoolExecutor):
    """Threads shared as `Slots` are, by the `caller` in whose context the work is submitted."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._slots, self._lock = Slots(count), threading.Lock()
        self._submitted: Rounds[tuple[str, Future[Any], Callable[[], Any]]] = Rounds()

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        who, done = caller.get(), Future[T]()
        with self._lock:
            self._slots.usage.note(who)
            self._submitted.put(who, (who, done, partial(work, *args, **named)))
        super().submit(self._work)
        return done

    def _work(self) -> None:
        """Runs work while there is any that may start."""
        while (taken := self._take()) is not None:
            who, done, work = taken
            try:
                if done.set_running_or_notify_cancel():
                    done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            finally:
                with self._lock:
                    self._slots.give(who)
            del taken, done, work  # nothing keeps a result alive

    def _take(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        with self._lock:
            who = next(filter(self._slots.is_open, self._submitted.callers()), None)
            if who is None:
                return None
            self._slots.hold(who)
            return self._submitted.take(who)


class Rounds(Generic[T]):
    """A queue for each caller; iterating takes one from each in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(self, who: str, entry: T) -> None:
        self._queues.setdefault(who, deque()).append(entry)

    def put_back(self, who: str, entry: T) -> None:
        """Puts an entry back as the first of its caller; a caller without other entries is next."""
        if who not in self._queues:
            self._queues[who] = deque()
            self.first(who)
        self._queues[who].appendleft(entry)

    def first(self, who: str) -> None:
        """Makes a caller that has something here the next."""
        self._queues.move_to_end(who, last=False)

    def callers(self) -> list[str]:
        """In the order in which they come next."""
        return list(self._queues)

    def take(self, who: str) -> T:
        """The first that this caller has; then all others come before it."""
        queue = self._queues.pop(who)
        entry = queue.popleft()
        if queue:
            self._queues[who] = queue
        return entry

    def __iter__(self) -> Iterator[T]:
        """Removes and yields entries until none is left."""
        while self._queues:
            yield self.take(next(iter(self._queues)))
