"""Builds M-BEIR-CoT: parts through assess, reason, filter and verify (paper, section 3), any number of processes, any kill, one
result.

A part's stage is a file that is written whole and renamed; what is there is not done again. What a stage had asked before a kill
lies in the cache of answers, so the stage is replayed from it and only what was in flight is asked again. Lines are JSON objects
without nulls, so that any reader infers the same columns from every file (docs/formats.md). A teacher whose first replies are all
of no use is asked no more.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import (
    CUT,
    REASON_TOKENS,
    CotCase,
    Questions,
    ReplyFormatError,
    Stage,
    TeacherQuestion,
    read_assessment,
    read_verdict,
)
from traceir.cot.files import json_lines, write_json, write_text
from traceir.cot.plan import STAGES, BuildConfig
from traceir.cot.rules import FORM, RuleFilter
from traceir.cot.source import CaseSource, DataPart
from traceir.cot.teachers.asker import Asker
from traceir.cot.teachers.teacher import Reply, UnansweredError
from traceir.errors import ImageError, TeacherError

log = logging.getLogger(__name__)
WINDOW: Final = 4
"""Parts in work at a time, so that the end of one does not leave the teacher idle."""
SILENT: Final = 8
"""So many parts in a row that lack answers end a run."""
PATIENCE: Final = 24
"""So many replies to one stage, with none of use before, between or after them, end a run: a teacher that keeps 3 in 10 is taken
for such a one less than once in 5,000 times."""
MORE_ROOM: Final = (
    f"give its thoughts room, --set max_tokens={REASON_TOKENS + 4096} with another --out, or turn them off by --extra"
)
LOOK: Final = (
    "look at them in the cache of answers and change the teacher, --extra or --templates, or go on with --patience 0; these "
    "replies are asked for anew, all others are kept"
)
_SHOWN: Final = 3
_VARIES: Final = re.compile(r"(?<!\w)'[^']*'|(?<!^)\b[0-9]{2,}\b")
Line = dict[str, Any]
Ask = Callable[[TeacherQuestion], Awaitable[Reply]]
UNREADABLE: Final = "the reply cannot be read"


@dataclass(slots=True)
class ReplyMonitor:
    """Sees every reply of a run, and every file made of them. `stop` gets the error that ends the run, and the keys of the
    replies that were of no use; files made of them alone are removed.

    `patience` 0 never ends it. A stage is left alone from its first reply of use on.
    """

    patience: int
    stop: Callable[[TeacherError, Sequence[str]], None]
    _of_use: set[str] = field(default_factory=set)
    _reasons: dict[str, Counter[str]] = field(default_factory=dict)
    _keys: dict[str, list[str]] = field(default_factory=dict)
    _doubtful: list[Path] = field(default_factory=list)
    _ended: bool = False

    def note(self, stage: Stage, reply: Reply, problem: str) -> None:
        """`problem`: why the reply is of no use, "" where it is of use."""
        if not problem:
            self._of_use.add(stage)
        if stage in self._of_use or not self.patience or not reply.model:  # without a model it is no reply, nobody was asked
            return
        reasons, keys = self._reasons.setdefault(stage, Counter()), self._keys.setdefault(stage, [])
        reasons[reason_kind(problem)] += 1
        keys += [reply.key] if reply.key else []
        if (count := reasons.total()) < self.patience:
            return
        shown = summarise(reasons)
        remedy = MORE_ROOM if CUT in shown else LOOK
        error = TeacherError(f"{reply.model}: {count} replies to stage {stage!r} and none of use ({shown}); {remedy}")
        self.stop(error, keys)
        keys.clear()
        self._ended = True
        self._remove()

    def wrote(self, file: Path) -> None:
        """A stage's file is there; it is in doubt while a stage has had replies and none of use."""
        self._doubtful += [file]
        if self._reasons.keys() <= self._of_use:
            self._doubtful.clear()
        elif self._ended:
            self._remove()

    def _remove(self) -> None:
        while self._doubtful:
            self._doubtful.pop().unlink(missing_ok=True)


def reason_kind(problem: str) -> str:
    """A reason without what differs from query to query: texts in quotation marks, and numbers."""
    return _VARIES.sub("...", problem)[:160]


def summarise(reasons: Counter[str]) -> str:
    """The most frequent reasons in words, with their numbers."""
    shown = reasons.most_common(_SHOWN)
    rest = reasons.total() - sum(count for _, count in shown)
    return "; ".join([*(f"{count} x {reason}" for reason, count in shown), *([f"{rest} others"] if rest else [])])


@dataclass(frozen=True, slots=True)
class PartStages:
    """The stages over the cases of one part, by qid. `note` is told of every reply, and why it is of no use ("": it is of use);
    `done`, how many cases have just come to their end."""

    cases: Mapping[str, CotCase]
    config: BuildConfig
    questions: Questions
    rules: RuleFilter
    teacher: Ask
    verifier: Ask
    note: Callable[[Stage, Reply, str], None]
    done: Callable[[int], None]

    async def run(self, stage: str, before: Mapping[str, Sequence[Line]]) -> list[Line]:
        """The lines of a stage, in the order of the data."""
        if stage == "assess":
            return await _all(self._assess(case) for case in self.cases.values())
        if stage == "reason":
            return await _all(self._reason(line["qid"]) for line in before["assess"] if line["z"] and not line["error"])
        if stage == "filter":
            return await self._filter(before["reason"])
        return await _all(self._verify(line["qid"], line["answer"]) for line in before["filter"] if not line["rule"])

    async def _assess(self, case: CotCase) -> Line:
        """z with reason and confidence; tasks that are `direct` or `complex` by the settings are not asked about."""
        fields: Line = {"z": 0, "reason": "", "confidence": 0.0}
        if case.task in (*self.config.direct, *self.config.complex):
            line = _line(case, None, 0, "")
            fields = {"z": int(case.task in self.config.complex), "reason": "by the settings", "confidence": 1.0}
        else:
            assessment, line = await self._ask(self.teacher, case, partial(self.questions.assess, case), read_assessment)
            fields |= assessment
        if not fields["z"]:
            self.done(1)
        return line | fields

    async def _reason(self, qid: str) -> Line:
        """The reply for a complex case, asked anew while it breaks a rule and `attempts` are left; the last one stands."""
        case = self.cases[qid]
        for attempt in range(self.config.attempts):
            reply = await self.teacher(self.questions.reason(case, attempt))
            checked = self.rules.check(case, reply.text, reply.finish)
            problem = CUT if checked.rule == "truncated" else f"rule {checked.rule!r}" if checked.rule in FORM else ""
            self.note("reason", reply, reply.error or problem)
            if reply.error or not checked.rule:
                break
        return _line(case, reply, attempt, reply.error) | {"raw": reply.text, "finish": reply.finish}

    async def _filter(self, reasoned: Sequence[Line]) -> list[Line]:
        """The texts of every reply without tags, and the rule that drops it ("": none); `teacher` where there is no reply."""
        lines = []
        for number, line in enumerate(reasoned):
            if number % 16 == 0:
                await asyncio.sleep(0)  # others' answers are read in between
            case = self.cases[line["qid"]]
            checked = self.rules.check(case, line["raw"], line["finish"])
            rule, detail = ("teacher", line["error"]) if line["error"] else (checked.rule, checked.detail)
            if rule:
                self.done(1)
            texts = {"reasoning": checked.reasoning, "answer": checked.answer, "rule": rule, "detail": detail}
            lines.append({"qid": case.record.qid, "task": case.task} | texts)
        return lines

    async def _verify(self, qid: str, answer: str) -> Line:
        """The verifier's word on an answer that the rules let pass."""
        case = self.cases[qid]
        verdict, line = await self._ask(self.verifier, case, partial(self.questions.verify, case, answer), read_verdict)
        self.done(1)
        return line | {"yes": False, "confidence": 0.0, "reason": ""} | verdict

    async def _ask(
        self, ask: Ask, case: CotCase, question: Callable[[int], TeacherQuestion], read: Callable[[str, str], Line]
    ) -> tuple[Line, Line]:
        """What the reply to a question says, asked anew while it cannot be read and `attempts` are left; and its line."""
        fields: Line = {}
        for attempt in range(self.config.attempts):
            asked = question(attempt)
            reply = await ask(asked)
            error = reply.error
            if not error:
                try:
                    fields = read(reply.text, reply.finish)
                except ReplyFormatError as problem:
                    error = f"{UNREADABLE}: {problem}"
            self.note(asked.stage, reply, error)
            if fields or reply.error:
                break
        return fields, _line(case, reply, attempt, error)


def _line(case: CotCase, reply: Reply | None, attempt: int, error: str) -> Line:
    """What the lines of all stages that ask have in common."""
    reply = reply or Reply("", "", "")
    tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    about = {"qid": case.record.qid, "task": case.task, "attempt": attempt, "error": error}
    return about | {"model": reply.model, "key": reply.key} | tokens


async def _all(waiting: Iterable[Coroutine[Any, Any, Line]]) -> list[Line]:
    """The results in order. All are awaited before the first failure is raised, so that no paid answer is thrown away."""
    lines: list[Line] = []
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        lines.append(result)
    return lines


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker needs for its parts."""

    config: BuildConfig
    out: Path
    source: CaseSource
    questions: Questions
    rules: RuleFilter
    teacher: Asker
    verifier: Asker
    waits: bool = False
    """Whether answers come later (a Batch API), so that parts without them are no sign of an outage."""
    patience: int = PATIENCE
    """So many replies of no use, and none of use, end a run; 0: none do, as they cost nothing any more."""


@dataclass(slots=True)
class BuildSummary:
    """What came of a run. `unfinished`: parts that lack answers, with the reason; `stopped`: why nothing more was asked."""

    parts: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unfinished: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def run_parts(work: Work, parts: Sequence[DataPart], *, progress: bool = True) -> BuildSummary:
    """Takes the parts through all stages; a first Ctrl-C lets what is in flight end, a second one does not wait.

    Where the teacher refuses, or the spend limit is reached, nothing more is asked, what is in flight is kept, and `stopped` says
    why. Raises DataError for broken data and for a disk that takes no more stage files.
    """
    return asyncio.run(_Run(work, parts, progress).run())


class _Run:
    def __init__(self, work: Work, parts: Sequence[DataPart], progress: bool) -> None:
        self.work, self.parts, self.summary = work, iter(parts), BuildSummary()
        lines = sum(part.lines for part in parts)
        self.bar = tqdm(total=lines, desc="building", unit="query", disable=not progress, mininterval=1.0)
        self.askers = list(dict.fromkeys((work.teacher, work.verifier)))
        self.monitor = ReplyMonitor(work.patience, self.halt)
        self.stop: TeacherError | None = None
        self.silent = 0

    async def run(self) -> BuildSummary:
        self._halt_on_interrupt()
        try:
            results = await asyncio.gather(*(self.worker() for _ in range(WINDOW)), return_exceptions=True)
        finally:
            for asker in self.askers:
                await asker.close()
            self.bar.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self.summary.stopped = str(self.stop or "")
        return self.summary

    async def worker(self) -> None:
        for part in self.parts:
            if self.stop:
                return
            try:
                await self.take(part)
                self.summary.parts += 1
                self.silent = 0
            except UnansweredError as error:
                log.warning("%s is left unfinished: %s", part.name, error)
                self.summary.unfinished[part.name] = str(error)
                self.silent += 1
                if self.silent == SILENT and not self.work.waits:
                    self.halt(TeacherError(f"{SILENT} parts in a row have no answer, the last one: {error}"))
            except TeacherError as error:
                self.halt(error)
                self.summary.unfinished[part.name] = str(error)

    async def take(self, part: DataPart) -> None:
        """One part through the stages that it lacks."""
        work, lines = self.work, dict[str, list[Line]]()
        cases = {case.record.qid: case for case in work.source.cases(part)}
        asks = self.asking(work.teacher), self.asking(work.verifier)
        stages = PartStages(cases, work.config, work.questions, work.rules, *asks, self.monitor.note, self.done)
        self.done(part.lines - len(cases))
        for stage in STAGES:
            file = stage_file(work.out, stage, part)
            if file.exists():
                lines[stage] = read_lines(file)
                self.done(sum(stage == "verify" or bool(line.get("rule")) or line.get("z") == 0 for line in lines[stage]))
                continue
            lines[stage] = await stages.run(stage, lines)
            write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[stage]))
            self.monitor.wrote(file)
        kept = sum(passed(line, work.config) for line in lines["verify"])
        self.summary.counts.update(samples=len(cases), complex=len(lines["reason"]), kept=kept)

    def asking(self, asker: Asker) -> Ask:
        async def ask(question: TeacherQuestion) -> Reply:
            if self.stop:
                raise self.stop
            try:
                return await asker.ask(question)
            except ImageError as error:
                log.warning("%s of %s is not asked: %s", question.stage, question.qid, error)
                return Reply("", "error", "", error=str(error))

        return ask

    def halt(self, error: TeacherError, worthless: Sequence[str] = ()) -> None:
        """Nothing more is asked, by no part: most of their questions wait in the askers already."""
        self.stop = self.stop or error
        for asker in self.askers:
            asker.stop(self.stop, worthless)

    def done(self, count: int) -> None:
        self.bar.update(count)
        kept, tried = self.summary.counts["kept"], self.summary.counts["complex"]
        self.bar.set_postfix_str(self.work.teacher.status() + (f", kept {kept / tried:.0%}" if tried else ""), refresh=False)

    def _halt_on_interrupt(self) -> None:
        """The first interrupt or termination stops new questions; after it the usual handlers are back."""
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            self.halt(TeacherError("interrupted; the same command goes on"))
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, interrupted)
            except (ValueError, NotImplementedError, RuntimeError):  # not the main thread, or a system without them
                return


def passed(line: Line, config: BuildConfig) -> bool:
    """Whether a line of the verifier keeps its sample: yes, with a confidence above the limit."""
    return bool(line["yes"]) and float(line["confidence"]) > config.verify_above


def stage_file(out: Path, stage: str, part: DataPart) -> Path:
    return out / stage / f"{part.name}.jsonl"


def is_finished(out: Path, part: DataPart) -> bool:
    return all(stage_file(out, stage, part).exists() for stage in STAGES)


def read_lines(file: Path) -> list[Line]:
    """The lines of one stage file. Raises DataError with `file:line`."""
    return list(json_lines(file, dict, "remove the file and build again, nothing is paid twice"))


def write_manifests(out: Path, parts: Sequence[DataPart]) -> None:
    """`manifest.json` of each stage, once all its parts are there: names, lines and digests in order."""
    for stage in STAGES:
        if (out / stage / "manifest.json").exists():
            continue
        files: list[dict[str, Any]] = []
        for part in parts:
            content = stage_file(out, stage, part).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            files.append({"name": f"{part.name}.jsonl", "rows": content.count(b"\n"), "sha256": digest})
        total = sum(file["rows"] for file in files)
        write_json(out / stage / "manifest.json", {"stage": stage, "format": 1, "rows": total, "files": files})
