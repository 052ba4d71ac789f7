"""Builds M-BEIR-CoT: parts through the four stages, any number of processes, any kill, one result.

A part's stage is a file that is written whole and renamed; what is there is not done again. What a stage had asked before a kill
lies in the cache of answers, so the stage is replayed from it and only what was in flight is asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import Questions, TeacherQuestion
from traceir.cot.files import json_lines, write_json, write_text
from traceir.cot.plan import STAGES, BuildConfig
from traceir.cot.rules import RuleFilter
from traceir.cot.source import CaseSource, DataPart
from traceir.cot.stages import PATIENCE, Ask, Line, PartStages, ReplyMonitor
from traceir.cot.teachers.asker import Asker
from traceir.cot.teachers.teacher import Reply, UnansweredError
from traceir.errors import ImageError, TeacherError

log = logging.getLogger(__name__)
WINDOW: Final = 4
"""Parts in work at a time, so that the end of one does not leave the teacher idle."""
SILENT: Final = 8
"""So many parts in a row that lack answers end a run."""


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
