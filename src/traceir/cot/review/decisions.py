"""What reviewers decide on samples of M-BEIR-CoT, one append-only file for each reviewer: `OUT/review/REVIEWER.jsonl`.

A line counts once its newline is on the disk; a half-written last line is the trace of a kill.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from traceir.cot.files import json_lines
from traceir.cot.outcomes import CotOutcome
from traceir.errors import DataError, InputError
from traceir.outside import valid

Choice = Literal["keep", "drop"]

DECISIONS: Final = ("keep", "drop", "edit", "undo")
REASONS: Final = ("hallucination", "wrong answer", "vague", "leaks the target", "language or form", "other")
"""Why a reviewer drops a sample."""
MAX_TEXT: Final = 8_000
"""Characters of an edited reasoning, answer or note."""
MAX_REVIEWERS: Final = 100
"""Files of decisions that the page begins for one build."""
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,40}")
_TAG: Final = re.compile(r"</?(reasoning|answer)>|<\|")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of a reviewer's file; `sample` is the hash of what was judged, `time` is UTC in ISO 8601.

    `undo` takes back this reviewer's decision on the same qid, and what was decided before it stands again. `reasoning` and
    `answer` are filled by an `edit` alone, `why` (one of REASONS) by a `drop`; `how` says how the sample was drawn.
    """

    qid: str
    task: str
    decision: str
    sample: str
    why: str = ""
    reasoning: str = ""
    answer: str = ""
    note: str = ""
    how: str = "random"
    time: str = ""

    @property
    def choice(self) -> Choice:
        """Keep or drop; an edit keeps."""
        return "drop" if self.decision == "drop" else "keep"


class Journal:
    """The decisions of one reviewer, appended one fsynced line at a time; not to be shared between threads.

    Opening cuts off a half-written last line with a warning. Raises InputError for a name that is none, and where another process
    has the file open; DataError for a broken line.
    """

    def __init__(self, out: Path, reviewer: str) -> None:
        self.path = journal_path(out, reviewer)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}; make room on the disk, or check its rights") from error
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._standing, whole = _read_file(self.path)
            self._stream.truncate(whole)
        except (OSError, DataError) as error:
            self._stream.close()
            if isinstance(error, BlockingIOError):
                raise InputError(f"{self.path} is open in another review; end that one, or choose another name") from error
            if isinstance(error, OSError):
                raise DataError(f"{self.path}: {error.strerror or error}; the folder must allow locks and writing") from error
            raise

    def add(self, decision: Decision) -> None:
        """Writes the decision with the time of now; it is on the disk when this returns. Raises DataError on a full disk."""
        self._standing.append(self._write(decision))

    def undo(self, among: Collection[str]) -> Decision | None:
        """Takes back the newest decision on one of these qids; returns it, or None where there is none."""
        if (index := _newest(self._standing, among)) is None:
            return None
        last = self._standing[index]
        self._write(Decision(last.qid, last.task, "undo", last.sample, how=last.how))
        return self._standing.pop(index)

    def latest(self) -> dict[str, Decision]:
        """qid -> the decision that stands."""
        return {decision.qid: decision for decision in self._standing}

    def close(self) -> None:
        self._stream.close()

    def _write(self, decision: Decision) -> Decision:
        decision = replace(decision, time=datetime.now(UTC).isoformat(timespec="microseconds"))
        line = valid(json.dumps(asdict(decision), ensure_ascii=False)).encode() + b"\n"
        before = os.fstat(self._stream.fileno()).st_size
        try:
            if (written := self._stream.write(line)) != len(line):
                raise OSError(f"{written} of {len(line)} bytes written")
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._stream.truncate(before)
            raise DataError(f"{self.path}: not saved ({error}); make room on the disk and decide again") from error
        return decision


def check_name(reviewer: str) -> str:
    """A reviewer's name, which is also a file's. Raises InputError."""
    if not _NAME.fullmatch(reviewer) or set(reviewer) == {"."}:
        raise InputError(f"reviewer {reviewer[:60]!r}: a name has 1 to 40 of the signs A-Z a-z 0-9 . _ -")
    return reviewer


def check_decision(decision: Decision, outcome: CotOutcome) -> None:
    """Raises InputError for a decision that cannot be applied to this outcome."""
    if decision.decision not in DECISIONS[:3]:
        raise InputError(f"decision is {decision.decision[:60]!r}; choose keep, drop or edit")
    if decision.decision == "drop" and decision.why not in REASONS:
        raise InputError(f"why is {decision.why[:60]!r}; choose one of {'; '.join(REASONS)}")
    if decision.decision == "keep" and not (outcome.reasoning and outcome.answer):
        raise InputError("there is no reasoning and answer to keep; write them by an edit, or drop the sample")
    for name, text in (("reasoning", decision.reasoning), ("answer", decision.answer), ("note", decision.note)):
        if len(text) > MAX_TEXT:
            raise InputError(f"the {name} has {len(text):,} characters, more than {MAX_TEXT:,}; shorten it")
        if decision.decision == "edit" and name != "note":
            if not text.strip():
                raise InputError(f"the edited {name} is empty; write it, or drop the sample")
            if tag := _TAG.search(text):
                raise InputError(f"the edited {name} holds {tag[0]!r}, which is the template's; take it out")


def journal_path(out: Path, reviewer: str) -> Path:
    """The file of a reviewer's decisions. Raises InputError for a name that is none."""
    return out / "review" / f"{check_name(reviewer)}.jsonl"


def reviewers(out: Path) -> list[str]:
    """Everybody who has a file of decisions, by name."""
    return sorted(path.stem for path in (out / "review").glob("*.jsonl") if _NAME.fullmatch(path.stem))


def read_decisions(out: Path) -> dict[str, dict[str, Decision]]:
    """Reviewer -> qid -> the decision that stands. A half-written last line is left out with a warning."""
    return {name: {own.qid: own for own in _read_file(journal_path(out, name))[0]} for name in reviewers(out)}


def _read_file(path: Path) -> tuple[list[Decision], int]:
    """The decisions that were not undone, oldest first; and how many bytes of the file are whole lines."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        _logger.warning("%s: the last line is half-written (%d bytes) and is left out", path, len(data) - whole)
    standing: list[Decision] = []
    for decision in json_lines(path, _decision_of, "no decision; repair or remove this line", ended=True):
        if decision.decision != "undo":
            standing.append(decision)
        elif (index := _newest(standing, (decision.qid,))) is not None:
            del standing[index]
    return standing, whole


def _newest(standing: list[Decision], qids: Collection[str]) -> int | None:
    return next((index for index in reversed(range(len(standing))) if standing[index].qid in qids), None)


def _decision_of(row: dict[str, Any]) -> Decision:
    decision = Decision(**{name: row[name] for name in Decision.__dataclass_fields__})
    if decision.decision not in DECISIONS or not all(isinstance(value, str) for value in asdict(decision).values()):
        raise ValueError(f"decision {decision.decision!r}, or a field that is no text")
    return decision
