"""Asks a teacher each question once: from the cache, or at a pace and tried again, within what may be spent."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from traceir.cot.ask import TeacherQuestion
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.teacher import Reply, RetryableError, Teacher, TeacherRequest, UnansweredError
from traceir.errors import InputError, TeacherError

log = logging.getLogger(__name__)
LONGEST_HOLD_S: Final = 600.0
"""A teacher that asks to wait longer is asked again after this."""
FIRST_TRIES: Final = 4
"""A teacher that has never been reached is given up after so many tries of one question."""
FIRST_GARBLED: Final = 12
"""A teacher that has sent so many answers, none of which was a chat completion, is given up; any other teacher's question after
FIRST_TRIES of them: they may have been paid for."""
CHARACTERS_PER_TOKEN: Final = 3
TOKENS_PER_IMAGE: Final = 400
_RATE_OVER: Final = 512
_ENDING: Final = "the build is ending before this question was asked; run again to go on"
Clock = Callable[[], float]


class TokenBucket:
    """So many a minute, None for any number; what one second brings (at least 1) is the most that may come at once."""

    def __init__(self, per_minute: float | None, clock: Clock = time.monotonic) -> None:
        if per_minute is not None and not per_minute > 0:
            raise InputError(f"a rate of {per_minute} a minute; give rates above 0, or none")
        self._rate, self._clock, self._at = (per_minute or 0.0) / 60, clock, clock()
        self._level = self._most = max(1.0, self._rate)

    def delay(self, amount: float) -> float:
        """Seconds until `amount` may be taken; more than one second's worth waits for a full bucket and leaves a debt."""
        self.take(0.0)
        return max(0.0, (min(amount, self._most) - self._level) / self._rate) if self._rate else 0.0

    def take(self, amount: float) -> None:
        """Takes `amount`; a negative one gives back."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate) - amount * bool(self._rate)
        self._at = now


class Pacer:
    """Lets requests start, first come, first served. For one event loop.

    Additive increase, multiplicative decrease: an answer adds 1 / `permitted`, up to `concurrency`; an overload halves it, once
    for the requests that were in flight together, down to 1. Starts are held while the teacher asks to wait, and by the rates;
    tokens are taken by estimate and put right after the answer. Times are in seconds of `clock`.
    """

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"{concurrency} at a time; give at least 1 request at a time")
        self.concurrency, self.permitted, self.in_flight = concurrency, float(concurrency), 0
        self._requests, self._tokens = TokenBucket(requests_per_minute, clock), TokenBucket(tokens_per_minute, clock)
        self._clock, self._number, self._halved_at, self._held_until = clock, 0, 0, -math.inf
        self._first, self._freed = asyncio.Lock(), asyncio.Event()

    def delay(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may start; infinite where one in flight has to end first."""
        if self.in_flight >= int(self.permitted):
            return math.inf
        return max(0.0, self._held_until - self._clock(), self._requests.delay(1.0), self._tokens.delay(tokens))

    async def start(self, tokens: int = 0) -> int:
        """Waits until a request of about so many tokens may start, and numbers it; each number must be handed to `end`."""
        async with self._first:
            while (wait := self.delay(tokens)) > 0:
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if wait == math.inf else wait):
                        await self._freed.wait()
        return self.take(tokens)

    def take(self, tokens: int) -> int:
        """Starts a request now, and returns its number."""
        self._requests.take(1.0)
        self._tokens.take(tokens)
        self.in_flight += 1
        self._number += 1
        return self._number

    def end(
        self, number: int, more_tokens: int | None = None, *, overloaded: bool = False, retry_after: float | None = None
    ) -> None:
        """A request is over. `more_tokens`: those an answer took beyond the estimate, None where there was no answer."""
        self.in_flight -= 1
        if retry_after is not None:
            self._held_until = max(self._held_until, self._clock() + min(retry_after, LONGEST_HOLD_S))
        if overloaded and number > self._halved_at:
            self.permitted, self._halved_at = max(1.0, self.permitted / 2), self._number
        elif more_tokens is not None:
            self.permitted = min(float(self.concurrency), self.permitted + 1 / self.permitted)
            self._tokens.take(more_tokens)
        self._freed.set()


class SpendLimitError(TeacherError):
    """The next question might pass the spend limit."""


@dataclass(slots=True)
class Budget:
    """Prices in USD for a million tokens, and what all answers in the cache and those in flight (`pending`, at most) may cost."""

    cache: AnswerCache
    price_in: float = 0.0
    price_out: float = 0.0
    limit: float | None = None
    pending: float = 0.0
    _warned: bool = False

    @property
    def spent(self) -> float:
        return self.cost(self.cache.prompt_tokens, self.cache.completion_tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def hold(self, cost: float) -> None:
        """Sets `cost` aside for a request, whose end takes it from `pending` again. Raises SpendLimitError."""
        if self.limit is not None and self.spent + self.pending + cost > self.limit:
            spent = f"{self.spent:.4f} USD are spent, up to {self.pending:.4f} in flight, the limit is {self.limit:g}"
            raise SpendLimitError(f"{spent}; raise the spend limit to go on, all answers are kept")
        self.pending += cost

    def check_usage(self, reply: Reply) -> None:
        """Warns, once, of a teacher whose answers do not say what they took."""
        if self.price_in + self.price_out > 0 and not (reply.prompt_tokens or reply.error or self._warned):
            self._warned = True
            log.warning("the teacher's answers tell no usage: what is spent is not known, and the spend limit does not hold")


class Asker:
    """What fails for a time is tried `attempts` times, after waits drawn evenly from 0 to `base_s` doubled each time, `cap_s` at
    most. What cannot get better (a refused key, a full disk, the spend limit) is raised for this and all later questions.
    Requests run in tasks of their own: whoever stops asking does not end them, so `close` it before the loop ends.
    """

    def __init__(
        self,
        teacher: Teacher,
        cache: AnswerCache,
        pace: Pacer,
        budget: Budget | None = None,
        *,
        attempts: int = 8,
        base_s: float = 0.5,
        cap_s: float = 30.0,
    ) -> None:
        self.teacher, self.cache, self.pace, self.budget = teacher, cache, pace, budget or Budget(cache)
        self.attempts, self._base_s, self._cap_s = attempts, base_s, cap_s
        self.reused = self.answered = self.retried = 0
        self._window = asyncio.Semaphore(2 * pace.concurrency)  # so many bodies are in memory at most
        self._tasks: dict[str, asyncio.Task[Reply]] = {}
        self._sending: set[str] = set()
        self._largest: dict[str, int] = {}
        self._times: deque[float] = deque(maxlen=_RATE_OVER)
        self._garbled, self._reached, self._draining = 0, False, False
        self._stop: TeacherError | None = None

    async def ask(self, question: TeacherQuestion) -> Reply:
        """The reply, also one with finish `error` where the teacher refuses the question.

        Raises UnansweredError for a question that failed for a time, SpendLimitError, TeacherError for what cannot get better,
        and ImageError for an image that cannot be sent.
        """
        async with self._window:
            request = await self.teacher.request(question)
            if (known := await asyncio.wrap_future(self.cache.get(request.key))) is not None:
                self.reused += 1
                return known
            task = self._tasks.get(request.key)
            if task is None:
                self._check()
                task = self._tasks[request.key] = asyncio.create_task(self._answer(request))
                task.add_done_callback(partial(self._forget, request.key))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                asking = asyncio.current_task()
                if task.cancelled() and asking is not None and not asking.cancelling():
                    raise UnansweredError(_ENDING) from None  # `close` took the task, nobody took the one that asks
                raise

    def stop(self, error: TeacherError, worthless: Sequence[str] = ()) -> None:
        """Asks nothing more: this and all later questions raise the error, what is in flight ends and is kept.

        Answers with `worthless` keys are taken back, so that a later run asks for them anew.
        """
        self._stopped(error)
        if worthless:
            self.cache.take_back(list(worthless))

    def status(self) -> str:
        """A few words for a progress line."""
        spread = self._times[-1] - self._times[0] if self._times else 0.0
        words = [f"{(len(self._times) - 1) / spread if spread else 0.0:.1f} answers/s, {self.pace.in_flight} in flight"]
        words += [f"{self.reused:,} known before"] if self.reused else []
        words += [f"{self.retried:,} tried again"] if self.retried else []
        words += [f"{self.budget.spent:.2f} USD"] if self.budget.price_in or self.budget.price_out else []
        return ", ".join(words)

    async def close(self) -> None:
        """Lets the requests in flight end and be kept, starts no others, and closes the teacher's connections."""
        self._draining = True
        for key, task in list(self._tasks.items()):
            if key not in self._sending:
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self.teacher.close()

    def _forget(self, key: str, task: asyncio.Task[Reply]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: whoever asked may be gone

    async def _answer(self, request: TeacherRequest) -> Reply:
        garbled = 0
        for tried in range(1, self.attempts + 1):
            try:
                return await self._try(request)
            except RetryableError as error:
                last, garbled = error, garbled + error.garbled
                self._check_reached(error, tried)
            except UnansweredError:
                raise
            except TeacherError as error:
                raise self._stopped(error) from None
            if garbled >= FIRST_TRIES or tried == self.attempts:
                break
            self.retried += 1
            await asyncio.sleep(random.uniform(0.0, min(self._cap_s, self._base_s * 2 ** (tried - 1))))
        what = f"no answer to {request.question.stage} of {request.question.qid} in {tried} tries"
        raise UnansweredError(f"{what}; the last: {last}; run again later") from last

    async def _try(self, request: TeacherRequest) -> Reply:
        """The teacher's reply, which is on the disk before anyone sees it; the pace learns what came of the request."""
        stage, key, tokens = request.question.stage, request.key, (self._prompt_tokens(request), request.question.max_tokens)
        cost, more, overloaded, wait = self.budget.cost(*tokens), None, False, None
        number = await self.pace.start(sum(tokens))
        try:
            self._check()
            self.budget.hold(cost)
        except TeacherError:
            self.pace.end(number)
            raise
        self._sending.add(key)
        try:
            try:
                reply = replace(await self.teacher.send(request), key=key)
                more = (reply.prompt_tokens + reply.completion_tokens or sum(tokens)) - sum(tokens)
                written = self.cache.put(stage, request.question.qid, reply)
            except RetryableError as error:
                overloaded, wait = error.overloaded, error.retry_after
                raise
            finally:
                self.pace.end(number, more, overloaded=overloaded, retry_after=wait)
                self.budget.pending -= cost
            await asyncio.wrap_future(written)
        finally:
            self._sending.discard(key)
        self._reached = True
        self.answered += 1
        self._times.append(time.monotonic())
        self._largest[stage] = max(self._largest.get(stage, 0), reply.prompt_tokens)
        self.budget.check_usage(reply)
        return reply

    def _check_reached(self, error: RetryableError, tried: int) -> None:
        """Raises TeacherError where a teacher that has given no answer yet is not worth another try."""
        log.info("try %d: %s", tried, error)
        self._reached |= error.reached
        self._garbled += error.garbled
        if not self._reached and tried >= FIRST_TRIES:
            raise self._stopped(TeacherError(f"the teacher was never reached: {error}")) from error
        if self._garbled >= FIRST_GARBLED and not self.answered:
            raise self._stopped(TeacherError(f"{error}; check that the address is that of chat completions")) from error

    def _prompt_tokens(self, request: TeacherRequest) -> int:
        """Prompt tokens at most: by the length of the text, or the largest prompt of the stage so far."""
        question = request.question
        characters = len(question.system) + sum(len(part) for part in question.parts if isinstance(part, str))
        guess = characters // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(question.images)
        return max(guess, self._largest.get(question.stage, 0))

    def _check(self) -> None:
        if self._stop is not None:
            raise type(self._stop)(str(self._stop)) from self._stop
        if self._draining:
            raise UnansweredError(_ENDING)

    def _stopped(self, error: TeacherError) -> TeacherError:
        """Remembers what stops all later questions: the first such error."""
        self._stop = self._stop or error
        return error
