"""Asks a teacher each question once: from the journal, or paced and tried again, within what may be spent."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from traceir.cot.ask import Question
from traceir.cot.teachers.completion import Reply, TransientError
from traceir.cot.teachers.journal import Journal
from traceir.cot.teachers.pace import Pace, Slot
from traceir.cot.teachers.teacher import BodyTeacher, Request, Teacher, read_image
from traceir.errors import TeacherError

log = logging.getLogger(__name__)

FIRST_TRIES: Final = 4
"""A teacher that has never been reached is given up after so many tries of one question."""
FIRST_GARBLED: Final = 12
"""A teacher that has sent so many answers, none of which was a chat completion, is given up; any other teacher's question after
FIRST_TRIES of them: they may have been paid for."""
CHARACTERS_PER_TOKEN: Final = 3
TOKENS_PER_IMAGE: Final = 400
_RATE_OVER: Final = 512
_ENDING: Final = "the build is ending before this question was asked; run again to go on"


class UnansweredError(TeacherError):
    """A question that all tries left without an answer, or that was put into a batch file; it is asked anew by a later run."""


class SpendLimitError(TeacherError):
    """The next question might pass the spend limit."""


class Asker:
    """`ask` gives the reply to a question, at once where the journal has it.

    Prices are in USD for a million tokens, `spend_limit` in USD over all that the journal holds: before each request, what is
    spent and what those in flight and it will take at most must be within it. What fails for a time is tried `attempts` times,
    with waits drawn evenly from 0 to `base_s` doubled each time, `cap_s` at most. What cannot get better (a refused key, a full
    disk, the spend limit) is raised for this and all later questions. Requests run in tasks of their own: whoever stops asking
    does not end them, so `close` it before the loop ends. For one event loop at a time.
    """

    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        pace: Pace,
        *,
        attempts: int = 8,
        price_in: float = 0.0,
        price_out: float = 0.0,
        spend_limit: float | None = None,
        seed: int = 0,
        base_s: float = 0.5,
        cap_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.teacher, self.journal, self.pace, self.attempts = teacher, journal, pace, attempts
        self.price_in, self.price_out, self.spend_limit = price_in, price_out, spend_limit
        self.asked = self.reused = self.answered = self.retried = self.refused = self.unanswered = 0
        self._body_teacher = teacher if isinstance(teacher, BodyTeacher) else None
        self._random, self._base_s, self._cap_s, self._clock = random.Random(seed), base_s, cap_s, clock
        self._window = self._make_window()
        self._tasks: dict[str, asyncio.Task[Reply]] = {}
        self._sending: set[str] = set()
        self._largest: dict[str, int] = {}
        self._garbled = 0
        self._reached = self._draining = self._warned = False
        self._stop: TeacherError | None = None
        self._times: deque[float] = deque(maxlen=_RATE_OVER)

    @property
    def spent(self) -> float:
        """USD for all answers in the journal."""
        return self._cost(self.journal.prompt_tokens, self.journal.completion_tokens)

    @property
    def rate(self) -> float:
        """Answers a second from the teacher, over the last 512 of them."""
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return 0.0
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    async def ask(self, question: Question) -> Reply:
        """The reply, also one with finish `error` where the teacher refuses the question.

        Raises UnansweredError for a question that failed for a time, SpendLimitError, TeacherError for what cannot get better,
        and PictureError for a picture that cannot be sent.
        """
        self.asked += 1
        async with self._window:  # so many bodies are in memory at most
            request = await self._request(question)
            if (known := self.journal.get(request.key)) is not None:
                self.reused += 1
                return known
            task = self._tasks.get(request.key)
            if task is None:
                self._check()
                task = self._tasks[request.key] = asyncio.create_task(self._answer(request, question))
                task.add_done_callback(lambda done: self._forget(request.key, done))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                asking = asyncio.current_task()
                if task.cancelled() and asking is not None and not asking.cancelling():
                    raise UnansweredError(_ENDING) from None  # `drain` took the task, nobody took the one that asks
                raise

    def stop(self, error: TeacherError, worthless: Iterable[str] = ()) -> None:
        """Asks nothing more: this and all later questions raise the error, what is in flight ends and is kept.

        Answers with `worthless` keys are taken back, so that a later run asks for them anew.
        """
        self._stopped(error)
        for key in worthless:
            if key in self.journal:
                self.journal.take_back(key)

    def status(self) -> str:
        """A few words for a progress line."""
        told = f"{self.rate:.1f} answers/s, {self.pace.limits.in_flight} in flight"
        if self.reused:
            told += f", {self.reused:,} from the journal"
        if self.retried:
            told += f", {self.retried:,} tried again"
        return f"{told}, {self.spent:.2f} USD" if self.price_in or self.price_out else told

    async def close(self) -> None:
        """Drains, and closes the teacher's connections; after it another event loop may go on with this asker."""
        await self.drain()
        await self.teacher.close()
        self._draining, self._window = False, self._make_window()

    async def drain(self) -> None:
        """Lets the requests in flight end and be journaled, and starts no others; until then nothing is lost that was paid."""
        self._draining = True
        for key, task in list(self._tasks.items()):
            if key not in self._sending:
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _make_window(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(2 * self.pace.limits.concurrency)

    def _forget(self, key: str, task: asyncio.Task[Reply]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: whoever asked may be gone

    async def _request(self, question: Question) -> Request:
        if self._body_teacher is not None:
            return await self._body_teacher.request(question)
        return Request(content_key(self.teacher.name, question), b"", question.stage, question.qid)

    async def _answer(self, request: Request, question: Question) -> Reply:
        prompt, last, garbled = self._guess(question), None, 0
        for tries in range(self.attempts):
            if tries:
                self._check()
                self.retried += 1
                await asyncio.sleep(self._random.uniform(0.0, min(self._cap_s, self._base_s * 2 ** (tries - 1))))
            slot = await self._start(prompt, question.max_tokens)
            self._note(request.key, prompt, question.max_tokens)
            try:
                return self._keep(request, question, await self._send(request, question, slot))
            except TransientError as error:
                last = error
                self._reached = self._reached or error.reached
                if not self._reached and tries + 1 >= FIRST_TRIES:
                    raise self._stopped(TeacherError(f"the teacher was never reached: {error}")) from error
                garbled += error.garbled
                self._garbled += error.garbled
                if self._garbled >= FIRST_GARBLED and not self.answered:
                    raise self._stopped(TeacherError(f"{error}; check that the address is that of chat completions")) from error
                log.info("%s of %s: %s", question.stage, question.qid, error)
                if garbled >= FIRST_TRIES:
                    break
            finally:
                self._note(request.key, -prompt, -question.max_tokens)
        self.unanswered += 1
        shown = f"no answer to {question.stage} of {question.qid} in {tries + 1} tries; the last: {last}; run again later"
        raise UnansweredError(shown) from last

    async def _start(self, prompt: int, completion: int) -> Slot:
        """A slot of the pace, once all that could stop a request has been looked at."""
        slot, journal = await self.pace.start(prompt + completion), self.journal
        try:
            self._check()
            pending = self._cost(journal.pending_prompt_tokens, journal.pending_completion_tokens)
            if self.spend_limit is not None and self.spent + pending + self._cost(prompt, completion) > self.spend_limit:
                shown = f"{self.spent:.4f} USD are spent, up to {pending:.4f} in flight, the limit is {self.spend_limit:g}"
                raise self._stopped(SpendLimitError(f"{shown}; raise the spend limit to go on, all answers are kept"))
        except TeacherError:
            self.pace.unstart(slot)
            raise
        return slot

    def _note(self, key: str, prompt: int, completion: int) -> None:
        """Notes a request's start, or with negative tokens its end."""
        if completion > 0:
            self._sending.add(key)
        else:
            self._sending.discard(key)
        self.journal.pending_prompt_tokens += prompt
        self.journal.pending_completion_tokens += completion

    async def _send(self, request: Request, question: Question, slot: Slot) -> Reply:
        """One try; the pace learns what came of it."""
        tokens: int | None = None
        overloaded, wait = False, None
        try:
            if self._body_teacher is not None:
                reply = await self._body_teacher.send(request)
            else:
                reply = await self.teacher.reply(question)
            tokens = reply.prompt_tokens + reply.completion_tokens or slot.tokens
            return reply
        except TransientError as error:
            overloaded, wait = error.overloaded, error.retry_after
            raise
        except UnansweredError:
            self.unanswered += 1
            raise
        except TeacherError as error:
            self._stopped(error)
            raise
        finally:
            self.pace.end(slot, tokens=tokens, overloaded=overloaded, retry_after=wait)

    def _keep(self, request: Request, question: Question, reply: Reply) -> Reply:
        """Journals an answer before anyone sees it."""
        reply = dataclasses.replace(reply, key=request.key)
        try:
            self.journal.put(request.key, question, reply)
        except TeacherError as error:
            self._stopped(error)
            raise
        self._reached = True
        self.answered += 1
        self.refused += reply.finish == "error"
        self._times.append(self._clock())
        self._largest[question.stage] = max(self._largest.get(question.stage, 0), reply.prompt_tokens)
        if self.price_in + self.price_out > 0 and not reply.prompt_tokens and reply.finish != "error" and not self._warned:
            self._warned = True
            log.warning("the teacher's answers tell no usage: what is spent is not known, and the spend limit does not hold")
        return reply

    def _guess(self, question: Question) -> int:
        """Prompt tokens at most: by the length of the text, or the largest prompt of the stage so far."""
        characters = len(question.system) + sum(len(part) for part in question.parts if isinstance(part, str))
        guess = characters // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(question.images)
        return max(guess, self._largest.get(question.stage, 0))

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def _check(self) -> None:
        if self._stop is not None:
            raise type(self._stop)(str(self._stop)) from self._stop
        if self._draining:
            raise UnansweredError(_ENDING)

    def _stopped(self, error: TeacherError) -> TeacherError:
        """Remembers what stops all later questions: the first such error."""
        if self._stop is None:
            self._stop = error
        return error


def content_key(name: str, question: Question) -> str:
    """The journal key of a question to a teacher without bodies: over its name and all that the question shows."""
    parts = [
        part if isinstance(part, str) else {"picture": hashlib.sha256(read_image(part)).hexdigest()} for part in question.parts
    ]
    told = [name, question.stage, question.qid, question.attempt, question.system, parts]
    return hashlib.sha256(json.dumps(told, separators=(",", ":")).encode("ascii")).hexdigest()
