"""Runs the ablations: each variant is trained and evaluated once for each seed, by any number of processes, after any kill.

OUT/ablation.json holds the base configuration, OUT/runs/VARIANT/seedK/ a training run and, once it is evaluated, `result.json`.
Whoever works on a run holds a lock on its file `lock`; the system releases it when the process dies, however it dies, so the
next process goes on where that one stopped. (Child processes of the dead one may hold the lock for a few seconds more.)
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from traceir.errors import InputError, TraceError
from traceir.evaluation.judged import describe_machine
from traceir.files import write_whole
from traceir.lab.ablate_score import device_of, score
from traceir.lab.ablations import FORMAT, ROWS, AblationRun, Table, check_result, identity, plan_runs, write_plan
from traceir.train.config import TrainConfig, settled
from traceir.train.train import train

Score = Callable[[AblationRun], dict[str, Any]]
"""The part of result.json that a run's evaluation gives: `routes`, `speed`, `data`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call leaves: runs done of all planned, what failed and what was skipped, each with the reason."""

    done: int
    planned: int
    failed: Mapping[str, str]
    skipped: Mapping[str, str]


def ablate(
    tables: Sequence[Table],
    out: Path,
    base: TrainConfig,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rows: Sequence[str] = ROWS,
    jobs: int = 1,
    poll: float = 2.0,
    trains: Callable[[TrainConfig], Path] = train,
    scores: Score = score,
) -> Outcome:
    """Does all runs of these tables that are not done: the first seed of every variant, then the second, and so on.

    Called again, or twice at a time, it goes on or shares the work, and returns when every run is done or has failed; what failed
    in an earlier call is tried again. `rows` names the complex row, then the simple one. `jobs` processes work side by side.
    Raises InputError where OUT holds results of another configuration or other data.
    """
    if len(rows) != 2 or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"rows {list(rows)}, seeds {list(seeds)}: give a complex and a simple row, and each seed once")
    base = settled(base, device_of(base), out / "ablation.json")
    runs, skipped = plan_runs(tables, out, base, seeds, rows)
    write_plan(out, base, seeds, rows)
    for run in runs:
        check_result(run)
    for name, reason in skipped.items():
        _tell(f"{name} is skipped: {reason}")
    worker = _Worker(runs, jobs, poll, time.time(), trains, scores)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_work_as_child, args=(worker,)) for _ in range(jobs - 1)]
    for child in children:
        child.start()
    try:
        worker.work()  # and what a child left that ended early
    finally:
        for child in children:
            child.join()
    failed = {run.name: worker.failure(run) for run in runs if not run.is_done and worker.failure(run)}
    return Outcome(sum(run.is_done for run in runs), len(runs), failed, skipped)


def list_tables(tables: Sequence[Table], seeds: Sequence[int]) -> str:
    """The tables and their runs as text: a run that several tables show is counted once."""
    lines = []
    for table in tables:
        lines.append(f"{table.id:12} {table.title} ({table.paper or 'not in the paper'})")
        lines += [f"{'':12}   {line.label}: run {line.variant.name}, route {line.route}" for line in table.lines]
    count = len({variant.name for table in tables for variant in table.variants})
    return "\n".join([*lines, f"{count} runs x {len(seeds)} seeds"])


@dataclass(slots=True)
class _Worker:
    """One process's way through the runs. `started`: seconds since 1970; what failed before is tried again."""

    runs: list[AblationRun]
    jobs: int
    poll: float
    started: float
    trains: Callable[[TrainConfig], Path]
    scores: Score
    spent: list[float] = field(default_factory=list)

    def work(self) -> None:
        """Takes runs that nobody works on until none is left, waiting for those that others work on."""
        while waiting := [run for run in self.runs if self._is_open(run)]:
            if not any(self._take(run) for run in waiting):
                time.sleep(self.poll)

    def failure(self, run: AblationRun) -> str:
        """Why the run failed in this call, or in one beside it; "" where it did not."""
        try:
            failure = json.loads(run.failure.read_text())
        except FileNotFoundError:
            return ""
        return str(failure["reason"]) if failure["time"] >= self.started else ""

    def _is_open(self, run: AblationRun) -> bool:
        return not run.is_done and not self.failure(run)

    def _take(self, run: AblationRun) -> bool:
        """Does the run; False where it has to wait: for another process, or for the runs that it uses."""
        unmet = [other for other in self.runs if other.folder in run.uses and not other.is_done]
        if any(map(self._is_open, unmet)):
            return False
        with claim(run.folder) as claimed:
            if claimed and self._is_open(run):
                self._do(run, unmet)
            return claimed

    def _do(self, run: AblationRun, unmet: Sequence[AblationRun]) -> None:
        if unmet:
            return self._fail(run, f"it needs {unmet[0].name}, which failed")
        begun = time.monotonic()
        try:
            result = _do_run(run, self.trains, self.scores)
        except (TraceError, RuntimeError) as error:  # RuntimeError: what torch raises, lack of memory among it
            return self._fail(run, f"{type(error).__name__}: {' '.join(str(error).split())}")
        self.spent.append(time.monotonic() - begun)
        done = sum(other.is_done for other in self.runs)
        left = statistics.mean(self.spent) * (len(self.runs) - done) / self.jobs
        recalls = [f"{route} {100 * own[run.rows[0]]['hit@5']:.1f}" for route, own in result.get("routes", {}).items()]
        scored = f": R@5 on {run.rows[0]} {', '.join(recalls)}" if recalls else ""
        _tell(f"[{done}/{len(self.runs)}] {run.name}{scored}; {self.spent[-1]:.0f} s, about {left / 60:.0f} min left")

    def _fail(self, run: AblationRun, reason: str) -> None:
        _tell(f"{run.name} failed: {reason}")
        write_whole(run.failure, json.dumps({"time": time.time(), "reason": reason}) + "\n")


def _do_run(run: AblationRun, trains: Callable[[TrainConfig], Path], scores: Score) -> dict[str, Any]:
    """Trains (or goes on, or finds it trained), evaluates, removes what only helped, and writes result.json last."""
    begun = time.monotonic()
    if run.variant.work == "train":
        trains(run.config)
    trained = time.monotonic()
    scored = scores(run)
    ended = time.monotonic()
    seconds, losses = read_log(run.folder / "log.jsonl")
    for name in ("steps", "embeddings", "evaluation/runs"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    result = {
        "format": FORMAT,
        "variant": run.variant.name,
        "seed": run.seed,
        "identity": identity(run),
        "machine": describe_machine(),
        "seconds": {"train": round(seconds or trained - begun, 1), "evaluate": round(ended - trained, 1)},
        "losses": losses,
        **scored,
    }
    write_whole(run.result, json.dumps(result) + "\n")
    run.failure.unlink(missing_ok=True)
    return result


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process now holds the folder's lock; its file names the holder's process id.

    The lock is the system's (flock) and dies with its holder, so a file left by a dead process stops nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield True


def read_log(file: Path) -> tuple[float, dict[str, float]]:
    """Seconds of training over all starts, from a run's log.jsonl, and the losses of its last line; 0 and {} without one.

    `seconds` of a line counts from the last start, so a fall marks a new one.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    total = before = 0.0
    for line in lines:
        now = float(line.get("seconds", 0.0))
        total += now - before if now >= before else now
        before = now
    last = lines[-1] if lines else {}
    return total, {k: v for k, v in last.items() if k not in ("step", "seconds") and isinstance(v, int | float)}


def _work_as_child(worker: _Worker) -> None:
    try:
        worker.work()
    except KeyboardInterrupt:
        sys.exit(130)


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
