"""The four stages of M-BEIR-CoT over one part: assess, reason, filter, verify (paper, section 3).

Each takes the cases of a part and the lines of the stages before, and gives its own lines: JSON objects without nulls, so that
any reader of JSON lines infers the same columns from every file (docs/formats.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from traceir.cot.ask import Assessment, Case, Question, Questions, Stage, Verdict, read_assessment, read_verdict
from traceir.cot.plan import BuildConfig
from traceir.cot.replies import CUT, UnreadableError
from traceir.cot.rules import RuleFilter
from traceir.cot.teachers.completion import Reply

Line = dict[str, Any]
Read = TypeVar("Read", Assessment, Verdict)
Ask = Callable[[Question], Awaitable[Reply]]
Hear = Callable[[Stage, Reply, str], None]
"""Told of every reply, and why it is of no use ("": it is)."""
Done = Callable[[int], None]
"""Told how many cases have just come to their end."""
UNREADABLE: Final = "the reply cannot be read"


async def assess(
    cases: Sequence[Case], config: BuildConfig, questions: Questions, ask: Ask, hear: Hear, done: Done
) -> list[Line]:
    """z of every case, with reason and confidence; tasks that are `direct` or `complex` by the settings are not asked about."""

    async def one(case: Case) -> Line:
        if case.task in config.direct or case.task in config.complex:
            found: Assessment | None = Assessment(int(case.task in config.complex), "by the settings", 1.0)
            told = _line(case, None, 0, "")
        else:
            found, told = await _asked(case, config, lambda attempt: questions.assess(case, attempt), ask, hear, read_assessment)
        if found is None or found.z == 0:
            done(1)
        return told | {
            "z": found.z if found else 0,
            "reason": found.reason if found else "",
            "confidence": found.confidence if found else 0.0,
        }

    return await _all(one(case) for case in cases)


async def reason(
    cases: Mapping[str, Case], assessed: Sequence[Line], config: BuildConfig, questions: Questions, rules: RuleFilter,
    ask: Ask, hear: Hear,
) -> list[Line]:  # fmt: skip
    """The reply for every complex case, asked anew while it breaks a rule and `attempts` are left; the last one stands."""

    async def one(case: Case) -> Line:
        for attempt in range(config.attempts):
            reply = await ask(questions.reason(case, attempt))
            checked = rules.check(case, reply.text, reply.finish)
            form = CUT if checked.rule == "truncated" else f"rule {checked.rule!r}" if checked.formless else ""
            hear("reason", reply, reply.error or form)
            if reply.error or not checked.rule:
                break
        return _line(case, reply, attempt, reply.error) | {"raw": reply.text, "finish": reply.finish}

    return await _all(one(cases[line["qid"]]) for line in assessed if line["z"] and not line["error"])


async def filter_replies(cases: Mapping[str, Case], reasoned: Sequence[Line], rules: RuleFilter, done: Done) -> list[Line]:
    """The texts of every reply without tags, and the rule that drops it ("": none); `teacher` where there is no reply."""
    found = []
    for number, line in enumerate(reasoned):
        if number % 16 == 0:
            await asyncio.sleep(0)  # others' answers are read in between
        case = cases[line["qid"]]
        checked = rules.check(case, line["raw"], line["finish"])
        rule, detail = ("teacher", line["error"]) if line["error"] else (checked.rule, checked.detail)
        if rule:
            done(1)
        told = {"reasoning": checked.reasoning, "answer": checked.answer, "rule": rule, "detail": detail}
        found.append({"qid": case.record.qid, "task": case.task} | told)
    return found


async def verify(
    cases: Mapping[str, Case], filtered: Sequence[Line], config: BuildConfig, questions: Questions,
    ask: Ask, hear: Hear, done: Done,
) -> list[Line]:  # fmt: skip
    """The verifier's word on every answer that the rules let pass."""

    async def one(case: Case, answer: str) -> Line:
        found, told = await _asked(case, config, lambda attempt: questions.verify(case, answer, attempt), ask, hear, read_verdict)
        done(1)
        verdict = found or Verdict(False, 0.0, "")
        return told | {"yes": verdict.yes, "confidence": verdict.confidence, "reason": verdict.reason}

    return await _all(one(cases[line["qid"]], line["answer"]) for line in filtered if not line["rule"])


async def _asked(
    case: Case,
    config: BuildConfig,
    question: Callable[[int], Question],
    ask: Ask,
    hear: Hear,
    read: Callable[[str, str], Read],
) -> tuple[Read | None, Line]:
    """What the reply to a question says, asked anew while it cannot be read and `attempts` are left; and its line."""
    found: Read | None = None
    for attempt in range(config.attempts):
        asked = question(attempt)
        reply = await ask(asked)
        error = reply.error
        if not error:
            try:
                found = read(reply.text, reply.finish)
            except UnreadableError as why:
                error = f"{UNREADABLE}: {why}"
        hear(asked.stage, reply, error)
        if found is not None or reply.error:
            break
    return found, _line(case, reply, attempt, error)


def _line(case: Case, reply: Reply | None, attempt: int, error: str) -> Line:
    """What the lines of all stages that ask have in common."""
    return {
        "qid": case.record.qid,
        "task": case.task,
        "attempt": attempt,
        "error": error,
        "model": reply.model if reply else "",
        "key": reply.key if reply else "",
        "prompt_tokens": reply.prompt_tokens if reply else 0,
        "completion_tokens": reply.completion_tokens if reply else 0,
    }


async def _all(waiting: Iterable[Coroutine[Any, Any, Line]]) -> list[Line]:
    """The results in order. All are awaited before the first failure is raised, so that no paid answer is thrown away."""
    found: list[Line] = []
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found
