"""From outcomes to M-BEIR-CoT: direct samples and kept reasoning in the order of the data, tags stripped, provenance kept."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

from traceir.cot.files import write_json
from traceir.cot.outcomes import CotOutcome, read_outcomes
from traceir.cot.plan import DATASET, read_config
from traceir.cot.replies import CUT
from traceir.cot.review.review import Settled, settle
from traceir.cot.source import CaseSource
from traceir.cot.stages import MORE_ROOM, reason_kind, summarise
from traceir.data import mbeir
from traceir.data.cot import to_row, write_rows
from traceir.data.samples import join
from traceir.errors import DataError, InputError

Dropped = Literal["leave_out", "direct"]
REASONS: Final = 100


@dataclass(slots=True)
class Funnel:
    """What became of the queries of one task, and of all: counts by status and, of the dropped, by rule."""

    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    """Why replies of the teacher could not be used at all: the first REASONS kinds."""

    @property
    def total(self) -> Counter[str]:
        return Counter(dict(sorted(sum(self.tasks.values(), Counter[str]()).items())))

    def count(self, task: str, *names: str) -> None:
        self.tasks.setdefault(task, Counter()).update(names)

    def count_unread(self, problem: str) -> None:
        """Counts a reply of no use."""
        kind = reason_kind(problem)
        self.unread[kind if kind in self.unread or len(self.unread) < REASONS else "another reason"] += 1

    def as_json(self) -> dict[str, Any]:
        return {"all": dict(self.total), "tasks": {name: dict(sorted(counts.items())) for name, counts in self.tasks.items()}}

    def problem(self) -> str:
        """Why nothing was made that is worth training on, or "": all queries, or all that are complex, were dropped."""
        total = self.total
        if total["kept"] or (total["direct"] and not total["complex"]):
            return ""
        rules = Counter(
            {f"rule {name[5:]}": n for name, n in total.items() if name.startswith("rule:") and name[5:] != "teacher"}
        )
        all_dropped = f"all {total['queries']} queries were dropped"
        what = f"none of {total['complex']} complex queries was kept" if total["direct"] else all_dropped
        reasons = summarise(rules + self.unread)
        return f"{what}: {reasons}" + (f"; {MORE_ROOM}" if CUT in reasons else "")

    def table(self) -> str:
        """The funnel as text: a line for each task."""
        lines = [f"{'task':<20}{'queries':>9}{'direct':>9}{'complex':>9}{'kept':>9}{'share':>8}  dropped by"]
        for name, counts in {**self.tasks, "all": self.total}.items():
            rules = ", ".join(f"{rule[5:]} {n}" for rule, n in counts.most_common() if rule.startswith("rule:"))
            share = f"{counts['kept'] / counts['complex']:.1%}" if counts["complex"] else ""
            numbers = "".join(f"{counts[column]:>9}" for column in ("queries", "direct", "complex", "kept"))
            lines.append(f"{name:<20}{numbers}{share:>8}  {rules}".rstrip())
        return "\n".join(lines)


def assemble(
    out: Path, *, format: str = "parquet", dropped: Dropped = "leave_out", negatives: bool = True, rows_per_file: int = 50_000
) -> Funnel:
    """Writes `OUT/dataset` (M-BEIR-CoT, docs/formats.md) and `OUT/funnel.json`; replaces what an earlier call wrote.

    Decisions of reviewers are applied (review.settle). What was dropped is left out, or trained as a direct query where
    `dropped` is "direct". Raises DataError where a part is not finished, and, once the funnel is written, where nothing is left.
    """
    if dropped not in ("leave_out", "direct"):
        raise InputError(f"dropped is {dropped!r}; choose leave_out or direct")
    config, funnel, settled = read_config(out), Funnel(), settle(out)
    root, target = Path(config.data), out / DATASET
    fresh, old = target.with_suffix(".new"), target.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    with closing(CaseSource(root, config.tasks)) as source:
        rows = _rows(read_outcomes(out, source=source), source.pool, settled, dropped, negatives, funnel)
        first = next(rows, None)
        if first is None:
            write_json(out / "funnel.json", funnel.as_json())
            raise DataError(f"{out}: there is nothing to assemble, {funnel.problem() or 'its data have no query'}")
        write_rows(chain((first,), rows), root, fresh, format=format, rows_per_file=rows_per_file)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)
    write_json(out / "funnel.json", funnel.as_json())
    return funnel


def _rows(
    outcomes: Iterator[CotOutcome],
    pool: Mapping[str, mbeir.Candidate],
    settled: Mapping[str, Settled],
    dropped: Dropped,
    negatives: bool,
    funnel: Funnel,
) -> Iterator[dict[str, Any]]:
    for outcome in outcomes:
        record, task = outcome.case.record, outcome.case.task
        decision = settled.get(record.qid)
        status, label = _decided(outcome, decision)
        funnel.count(task, "queries", status, *(["complex"] if outcome.z else []))
        if status == "dropped":
            funnel.count(task, f"rule:{'reviewer' if decision else outcome.rule}")
            if outcome.rule == "teacher" and not decision:
                funnel.count_unread(outcome.detail)
            if dropped == "leave_out":
                continue
        reviewed = {"reviewers": list(decision.reviewers), "edited": decision.edited} if decision else {}
        sample = join(record, label, pool, "the train pool", negatives=negatives)
        yield to_row(sample, task.rpartition("_task")[0], json.loads(outcome.provenance) | reviewed)


def _decided(outcome: CotOutcome, decision: Settled | None) -> tuple[str, mbeir.Label]:
    """Status and label once people have had their word."""
    status: str = outcome.status
    reasoning, answer = outcome.reasoning, outcome.answer
    if decision is not None and status != "direct":
        status = "dropped" if decision.decision == "drop" else "kept"
        reasoning, answer = decision.reasoning or reasoning, decision.answer or answer
    if status == "kept" and reasoning:
        return status, mbeir.Label(outcome.case.record.qid, 0, 1, reasoning, answer or None)
    return ("dropped" if status == "kept" else status), mbeir.Label(outcome.case.record.qid, 0, 0, None, None)
