"""Sharing between callers: of places and bytes, of turns, of threads, of a queue. All but `Rounds` belong to one event loop.

Who a caller is stands in `caller`, which the gate sets for each request: a key, or an address where there are no keys.
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
caller: ContextVar[str] = ContextVar("caller", default="")
"""On whose behalf the current task works."""
patient: ContextVar[bool] = ContextVar("patient", default=False)
"""Whether the current task is part of a long work that waits where there is no room, rather than to be refused."""
MANY: Final = 1000
FEW: Final = 32
ALONE_S: Final = 10.0
"""Seconds without any other caller after which one counts as alone."""


class Company:
    """Who has asked lately: what one caller may take for itself depends on whether there are others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}

    def note(self, who: str) -> None:
        now = self._seen[who] = self._clock()
        if len(self._seen) > 1:
            self._seen = {one: at for one, at in self._seen.items() if now - at <= ALONE_S}

    @property
    def crowded(self) -> bool:
        """Whether more than one has asked in the last ALONE_S."""
        now = self._clock()
        return sum(now - at <= ALONE_S for at in list(self._seen.values())) > 1


class Shares:
    """Places or bytes of which a caller may hold as much as then stays free for others: half of all when alone, a third when
    another takes all it gets. So there is always something left for one that comes anew, however greedy the others are.

    `least` is never refused for the share's sake. The caller "" is nobody in particular, and only bound by the total.
    """

    def __init__(self, total: int, least: int = 1) -> None:
        self.total, self.least, self.held = total, least, 0
        self._by: Counter[str] = Counter()

    def room(self, who: str, count: int = 1) -> bool:
        """Whether `count` more may be taken now."""
        return self._fits(who, count, 1)

    def _fits(self, who: str, count: int, weight: int) -> bool:
        mine, free = self._by[who] + count, self.total - self.held - count
        return free >= 0 and (not who or mine <= self.least or mine * weight <= free)

    def take(self, who: str, count: int = 1) -> bool:
        if not self.room(who, count):
            return False
        self._hold(who, count)
        return True

    def _hold(self, who: str, count: int) -> None:
        self.held += count
        self._by[who] += count

    def give(self, who: str, count: int = 1) -> None:
        self._hold(who, -count)
        if not self._by[who]:
            del self._by[who]

    def of(self, who: str) -> int:
        return self._by[who]


class Places(Shares):
    """Shares that can be waited for, one caller after the other. Those that are waited for are at most a third of all, so that
    who does not wait still finds some beside its own long work; and FEW where there are several callers, so that long work comes
    in evenly, as it is done, and not all at once before another's."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._company = Company()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def wait(self, who: str) -> None:
        """Takes a place once there is one."""
        self._company.note(who)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(mine)
        self._grant()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give(who)
            raise

    def give(self, who: str, count: int = 1) -> None:
        super().give(who, count)
        self._grant()

    def take(self, who: str, count: int = 1) -> bool:
        self._company.note(who)
        return super().take(who, count)

    def _open(self, who: str) -> bool:
        return self._fits(who, 1, 2) and (self._by[who] < FEW or not self._company.crowded)

    def _grant(self) -> None:
        while (who := next(filter(self._open, self._waiting), None)) is not None:
            queue = self._waiting.pop(who)
            mine = queue.popleft()
            if queue:
                self._waiting[who] = queue  # behind all others
            if not mine.done():
                self._hold(who, 1)
                mine.set_result(None)


class Pace:
    """Between the bodies of one caller, while there are several: reading a body holds up whatever else this process does."""

    def __init__(self, bytes_a_second: int) -> None:
        self._rate, self._company = bytes_a_second, Company()
        self._next: dict[str, float] = {}

    async def wait(self, who: str, count: int) -> None:
        """Until a body of `count` bytes may be read."""
        self._company.note(who)
        now = asyncio.get_running_loop().time()
        self._next = {one: at for one, at in self._next.items() if at > now}
        if self._company.crowded:
            at = self._next.get(who, now)
            self._next[who] = at + count / self._rate
            await asyncio.sleep(at - now)


class Usage:
    """What each caller has had lately, forgotten by half every ALONE_S; who has had less goes first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._had: dict[str, tuple[float, float]] = {}

    def of(self, who: str) -> float:
        had, at = self._had.get(who, (0.0, 0.0))
        return float(had * 0.5 ** ((self._clock() - at) / ALONE_S)) if had else 0.0

    def add(self, who: str, amount: float) -> None:
        self._had[who] = self.of(who) + amount, self._clock()
        if len(self._had) > MANY:
            self._had = {who: had for who, had in self._had.items() if self.of(who) > 1e-3}


class Turns(Places):
    """So many at a time, one caller after the other. Where there are several callers, none takes the last turn beside its own."""

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        who = await self.enter()
        try:
            yield
        finally:
            self.give(who)

    async def enter(self) -> str:
        """Waits for a turn of the current caller, and under which name to give it back."""
        who = caller.get()
        await self.wait(who)
        return who

    def _open(self, who: str) -> bool:
        if self.held >= self.total:
            return False
        return not self._by[who] or self.held < self.total - 1 or not self._company.crowded


class FairExecutor(ThreadPoolExecutor):
    """Threads that work for one caller after the other, whoever is `caller` where the work is submitted. Where there are several
    callers, none takes the last thread beside others of its own."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._count, self._lock = count, threading.Lock()
        self._waiting: Rounds[tuple[str, Future[Any], Callable[[], Any]]] = Rounds()
        self._busy: Counter[str] = Counter()
        self._company = Company()

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        who, done = caller.get(), Future[T]()
        self._company.note(who)
        with self._lock:
            self._waiting.put(who, (who, done, partial(work, *args, **named)))
        super().submit(self._work)
        return done

    def _work(self) -> None:
        """Works as long as there is something that may be done."""
        while (taken := self._take()) is not None:
            who, done, work = taken
            try:
                if done.set_running_or_notify_cancel():
                    done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            finally:
                with self._lock:
                    self._busy[who] -= 1
            del taken, done, work  # nothing keeps a result alive

    def _take(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        with self._lock:
            for who in self._waiting.callers():
                if not self._busy[who] or self._busy.total() < self._count - 1 or not self._company.crowded:
                    self._busy[who] += 1
                    return self._waiting.take(who)
        return None


class Rounds(Generic[T]):
    """A queue for each caller; iterating takes one from each in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def put(self, who: str, one: T) -> None:
        self._queues.setdefault(who, deque()).append(one)

    def put_back(self, who: str, one: T) -> None:
        """Something that was taken too early: first again of what this caller has, and the caller's turn is next if it has come
        back."""
        if who not in self._queues:
            self._queues[who] = deque()
            self._queues.move_to_end(who, last=False)
        self._queues[who].appendleft(one)

    def first(self, who: str) -> None:
        """Gives the next turn to a caller that has something here."""
        self._queues.move_to_end(who, last=False)

    def callers(self) -> list[str]:
        """Whose turn it is, and who comes next."""
        return list(self._queues)

    def take(self, who: str) -> T:
        """The first that this caller has; then all others come before it."""
        queue = self._queues.pop(who)
        one = queue.popleft()
        if queue:
            self._queues[who] = queue
        return one

    def __iter__(self) -> Iterator[T]:
        """Takes what it gives, until nothing is left."""
        while self._queues:
            yield self.take(next(iter(self._queues)))
