"""What the replies of a run are worth: a teacher whose first replies are all of no use is asked no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from traceir.cot.ask import REASON_TOKENS, Stage
from traceir.cot.replies import CUT
from traceir.cot.teachers.completion import Reply
from traceir.errors import TeacherError

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
