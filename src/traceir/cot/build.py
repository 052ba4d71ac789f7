"""Builds M-BEIR-CoT: parts through the four stages, any number of processes, any kill, one result.

A part's stage is a file that is written whole and renamed; what is there is not done again. What a stage had asked before a kill
lies in the journal (journal.py), so the stage is replayed from it and only what was in flight is asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from tqdm import tqdm

from traceir.cot import stages
from traceir.cot.ask import Question, Questions
from traceir.cot.heard import PATIENCE, Heard
from traceir.cot.plan import STAGES, BuildConfig, write_json, write_text
from traceir.cot.rules import RuleFilter
from traceir.cot.source import Part, Source
from traceir.cot.stages import Line
from traceir.cot.teachers.asker import UnansweredError
from traceir.cot.teachers.completion import Reply
from traceir.errors import DataError, ImageError, TeacherError
from traceir.outside import read_json

log = logging.getLogger(__name__)
WINDOW: Final = 4
"""Parts in work at a time, so that the end of one does not leave the teacher idle."""
SILENT: Final = 8
"""So many parts in a row that lack answers end a run."""


class AskerLike(Protocol):
    """What the stages ask through: a journal, a teacher and its pace (asker.Asker), or what stands in for them."""

    async def ask(self, question: Question) -> Reply: ...

    def stop(self, error: TeacherError, worthless: Iterable[str] = ()) -> None:
        """Nothing more is asked, what is in flight ends; answers with `worthless` keys are asked for anew by a later run."""
        ...

    def status(self) -> str:
        """A few words for the progress line: rate, requests in flight, spend."""
        ...

    async def close(self) -> None:
        """Lets what is in flight end and be journaled; nothing is asked after it."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker needs for its parts."""

    config: BuildConfig
    out: Path
    source: Source
    questions: Questions
    rules: RuleFilter
    teacher: AskerLike
    verifier: AskerLike
    waits: bool = False
    """Whether answers come later (a Batch API), so that parts without them are no sign of an outage."""
    patience: int = PATIENCE
    """So many replies of no use, and none of use, end a run; 0: none do, as they cost nothing any more."""


@dataclass(slots=True)
class Tally:
    """What came of a run. `unfinished`: parts that lack answers, with the reason; `stopped`: why nothing more was asked."""

    parts: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unfinished: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def run_parts(work: Work, parts: Sequence[Part], *, progress: bool = True) -> Tally:
    """Takes the parts through all stages; a first Ctrl-C lets what is in flight end, a second one does not wait.

    Where the teacher refuses, or the spend limit is reached, nothing more is asked, what is in flight ends in the journal, and
    `stopped` says why. Raises DataError for broken data and for a disk that takes no more stage files.
    """
    return asyncio.run(_run(work, parts, progress))


async def _run(work: Work, parts: Sequence[Part], progress: bool) -> Tally:
    tally, waiting = Tally(), iter(parts)
    bar = tqdm(total=sum(part.lines for part in parts), desc="building", unit="query", disable=not progress, mininterval=1.0)
    stop: list[TeacherError] = []
    silent: list[str] = []
    askers = list(dict.fromkeys((work.teacher, work.verifier)))

    def done(count: int) -> None:
        bar.update(count)
        kept, tried = tally.counts["kept"], tally.counts["complex"]
        bar.set_postfix_str(f"{work.teacher.status()}" + (f", kept {kept / tried:.0%}" if tried else ""), refresh=False)

    def halt(error: TeacherError, worthless: Sequence[str] = ()) -> None:
        """Nothing more is asked, by no part: most of their questions wait in the askers already."""
        stop.append(error)
        for asker in askers:
            asker.stop(stop[0], worthless)

    heard = Heard(work.patience, halt)

    async def worker() -> None:
        for part in waiting:
            if stop:
                return
            try:
                await _take(work, part, tally, done, heard, stop)
                tally.parts += 1
                silent.clear()
            except UnansweredError as error:
                log.warning("%s is left unfinished: %s", part.name, error)
                tally.unfinished[part.name] = str(error)
                silent.append(part.name)
                if len(silent) == SILENT and not work.waits:
                    halt(TeacherError(f"{SILENT} parts in a row have no answer, the last one: {error}"))
            except TeacherError as error:
                halt(error)
                tally.unfinished[part.name] = str(error)

    _on_interrupt(halt)
    workers = [asyncio.create_task(worker()) for _ in range(WINDOW)]
    try:
        results = await asyncio.gather(*workers, return_exceptions=True)
    finally:
        for asker in askers:
            await asker.close()
        bar.close()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if stop:
        tally.stopped = str(stop[0])
    return tally


def _on_interrupt(halt: Callable[[TeacherError], None]) -> None:
    """The first interrupt or termination stops new questions; after it the usual handlers are back."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        halt(TeacherError("interrupted; the same command goes on"))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, interrupted)
        except (ValueError, NotImplementedError, RuntimeError):  # not the main thread, or a system without them
            return


async def _take(
    work: Work, part: Part, tally: Tally, done: Callable[[int], None], heard: Heard, stop: Sequence[TeacherError]
) -> None:
    """One part through the stages that it lacks."""
    files = {stage: stage_file(work.out, stage, part) for stage in STAGES}
    cases = {case.record.qid: case for case in work.source.cases(part)}

    def asking(asker: AskerLike) -> stages.Ask:
        async def ask(question: Question) -> Reply:
            if stop:
                raise stop[0]
            try:
                return await asker.ask(question)
            except ImageError as error:
                log.warning("%s of %s is not asked: %s", question.stage, question.qid, error)
                return Reply("", "error", "", 0, 0, str(error))

        return ask

    teacher, verifier, hear = asking(work.teacher), asking(work.verifier), heard.note
    lines: dict[str, list[Line]] = {}
    for stage, file in files.items():
        if file.exists():
            lines[stage] = read_lines(file)
            done(_ended(stage, lines[stage], part.lines - len(cases)))
        elif stage == "assess":
            lines[stage] = await stages.assess(list(cases.values()), work.config, work.questions, teacher, hear, done)
            done(part.lines - len(cases))
        elif stage == "reason":
            lines[stage] = await stages.reason(cases, lines["assess"], work.config, work.questions, work.rules, teacher, hear)
        elif stage == "filter":
            lines[stage] = await stages.filter_replies(cases, lines["reason"], work.rules, done)
        else:
            lines[stage] = await stages.verify(cases, lines["filter"], work.config, work.questions, verifier, hear, done)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[stage]))
            heard.wrote(file)
    tally.counts["samples"] += len(cases)
    tally.counts["complex"] += len(lines["reason"])
    tally.counts["kept"] += sum(1 for line in lines["verify"] if passed(line, work.config))


def _ended(stage: str, lines: Sequence[Line], left_out: int) -> int:
    """Cases that came to their end in a stage."""
    if stage == "assess":
        return left_out + sum(1 for line in lines if not line["z"])
    if stage == "filter":
        return sum(1 for line in lines if line["rule"])
    return len(lines) if stage == "verify" else 0


def passed(line: Line, config: BuildConfig) -> bool:
    """Whether a line of the verifier keeps its sample: yes, with a confidence above the limit."""
    return bool(line["yes"]) and float(line["confidence"]) > config.verify_above


def stage_file(out: Path, stage: str, part: Part) -> Path:
    return out / stage / f"{part.name}.jsonl"


def is_finished(out: Path, part: Part) -> bool:
    return all(stage_file(out, stage, part).exists() for stage in STAGES)


def read_lines(file: Path) -> list[Line]:
    """The lines of one stage file. Raises DataError with `file:line`."""
    found: list[Line] = []
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    found.append(read_json(line))
                except ValueError as error:
                    raise DataError(
                        f"{file}:{number}: not JSON; remove the file and build again, nothing is paid twice"
                    ) from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; build again") from error
    return found


def write_manifests(out: Path, parts: Sequence[Part]) -> None:
    """`manifest.json` of each stage, once all its parts are there: names, lines and digests in order."""
    for stage in STAGES:
        if (out / stage / "manifest.json").exists():
            continue
        files = list(_described(out, stage, parts))
        total = sum(int(one["rows"]) for one in files)
        write_json(out / stage / "manifest.json", {"stage": stage, "format": 1, "rows": total, "files": files})


def _described(out: Path, stage: str, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    for part in parts:
        content = stage_file(out, stage, part).read_bytes()
        yield {"name": f"{part.name}.jsonl", "rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
