"""Runs the ablations: each variant is trained and evaluated once for each seed, by any number of processes, after any kill.

OUT/ablation.json holds the base configuration, OUT/runs/VARIANT/seedK/ a training run and, once it is evaluated, `result.json`.
Whoever works on a run holds a lock on its file `lock`; the system releases it when the process ends, however it ends, so the
next process goes on where that one stopped. (Child processes of that one may hold the lock for a few seconds more.)
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tqdm import tqdm

from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.errors import InputError, TraceError
from traceir.evaluation.evaluate import choose_tasks, evaluate
from traceir.evaluation.results import QueryOutcome, describe_machine, read_outcomes
from traceir.files import write_whole
from traceir.items import Encoding, Query, Route
from traceir.lab.ablations import FORMAT, ROWS, TIMED, AblationRun, Table, check_result, identity, plan_runs, write_plan
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
    scores: Score | None = None,
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
        _report(f"{name} is skipped: {reason}")
    worker = _Worker(runs, jobs, poll, time.time(), trains, scores or score)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=worker.work_as_child) for _ in range(jobs - 1)]
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

    def work_as_child(self) -> None:
        with suppress(KeyboardInterrupt):  # the parent says so
            self.work()

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
        _report(f"[{done}/{len(self.runs)}] {run.name}{scored}; {self.spent[-1]:.0f} s, about {left / 60:.0f} min left")

    def _fail(self, run: AblationRun, reason: str) -> None:
        _report(f"{run.name} failed: {reason}")
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

    The lock is the system's (flock) and ends with its holder, so a file left by a killed process stops nobody.
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
    clock = [0.0, *(float(line.get("seconds", 0.0)) for line in lines)]
    total = sum(now - before if now >= before else now for before, now in pairwise(clock))
    last = lines[-1] if lines else {}
    return total, {k: v for k, v in last.items() if k not in ("step", "seconds") and isinstance(v, int | float)}


def _report(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


# --- evaluation of a run ----------------------------------------------------------------------------------------------

LOST: Final = 11
"""Ranks are kept up to 10; this stands for all beyond."""
SPEED_QUERIES: Final = 128
SPEED_ROUNDS: Final = 5


def score(run: AblationRun) -> dict[str, Any]:
    """Evaluates a run as its variant says: its checkpoint, the pipeline of two others, or their speed."""
    torch.set_num_threads(run.config.threads)
    if run.variant.work == "speed":
        return measure_speed(run)
    checkpoints = [folder / "checkpoint" for folder in run.uses or (run.folder,)]
    encoders = [Encoder.from_pretrained(checkpoint, device=device_of(run.config)) for checkpoint in checkpoints]
    encoder = TwoStage(*encoders) if run.variant.work == "pipeline" else encoders[0]
    out = run.folder / "evaluation"
    shutil.rmtree(out, ignore_errors=True)
    routes, cache = run.variant.routes, run.folder / "embeddings"
    results = evaluate(encoder, Path(run.config.data), out, routes=routes, rows=run.rows, cache=cache, progress=False)
    assert results is not None
    return {"data": results["data"], "routes": {route: outcomes_by_row(out / f"queries-{route}.jsonl") for route in routes}}


def outcomes_by_row(file: Path) -> dict[str, dict[str, Any]]:
    """Row: shares of hits, routing, length and exactness of the reasoning, and each query's rank (up to LOST), in file order."""
    outcomes = read_outcomes(file)
    rows = dict.fromkeys(outcome.row for outcome in outcomes)
    return {row: _summarise([outcome for outcome in outcomes if outcome.row == row]) for row in rows}


def _summarise(outcomes: Sequence[QueryOutcome]) -> dict[str, Any]:
    count = len(outcomes)
    exact = [outcome.exact for outcome in outcomes if outcome.exact is not None]
    return {
        "queries": count,
        **{f"hit@{k}": sum(outcome.rank <= k for outcome in outcomes) / count for k in (1, 5, 10)},
        "reasoned": sum(outcome.route == "reason" for outcome in outcomes) / count,
        "tokens_per_query": sum(outcome.tokens for outcome in outcomes) / count,
        "truncated": sum(outcome.truncated for outcome in outcomes) / count,
        "exact": sum(exact) / len(exact) if exact else None,
        "ranks": [min(outcome.rank, LOST) for outcome in outcomes],
    }


class TwoStage(Encoder):
    """One model writes, another encodes: what the writer wrote is put behind the query's text, which goes by the direct route.

    Candidates are the second model's. The Encodings have the writer's route and words with the second model's vector.
    """

    def __init__(self, writer: Encoder, second: Encoder) -> None:
        super().__init__(second.model)
        self.writer = writer

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} after {self.writer.fingerprint}"

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        written = self.writer.encode_queries(queries, route=route, progress=progress)
        longer = [append_text(query, own.reasoning) for query, own in zip(queries, written, strict=True)]
        encoded = super().encode_queries(longer, route="direct", progress=progress)
        return [replace(first, vector=second.vector) for first, second in zip(written, encoded, strict=True)]


def append_text(query: Query, written: str) -> Query:
    """The query with these words behind its last text, or as its text where it has none."""
    texts = [number for number, part in enumerate(query.parts) if isinstance(part, str)]
    if not written or not texts:
        return replace(query, parts=(*query.parts, written)) if written else query
    last = texts[-1]
    return replace(query, parts=(*query.parts[:last], f"{query.parts[last]} {written}", *query.parts[last + 1 :]))


def measure_speed(run: AblationRun) -> dict[str, Any]:
    """Times TIMED on the first queries of each row: one warm-up, then rounds of one after the other."""
    device, data = device_of(run.config), Path(run.config.data)
    encoders = {folder.parent.name: Encoder.from_pretrained(folder / "checkpoint", device=device) for folder in run.uses}
    instructions = mbeir.read_instructions(data)
    speeds: dict[str, Any] = {}
    for task in choose_tasks(mbeir.find_tasks(data, "test"), run.rows, data):
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        records = islice(mbeir.read_queries(task.query_path), SPEED_QUERIES)
        queries = [mbeir.to_query(record, prompt, data) for record in records]
        seconds: dict[str, list[float]] = {f"{name}:{route}": [] for name, route in TIMED}
        for _ in range(SPEED_ROUNDS + 1):
            for name, route in TIMED:
                begun = time.perf_counter()
                encoders[name].encode_queries(queries, route=route)
                seconds[f"{name}:{route}"].append(time.perf_counter() - begun)
        times = relative_speeds({way: own[1:] for way, own in seconds.items()})
        speeds[task.name] = {"queries": len(queries), **times}
    return {"speed": speeds}


def relative_speeds(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Speed of each way as a multiple of the first's: the median over rounds of the ratio within a round."""
    first = next(iter(seconds.values()))
    relative = {name: float(np.median(np.array(first) / times)) for name, times in seconds.items()}
    return {"relative": relative, "seconds": {name: list(times) for name, times in seconds.items()}}


def device_of(config: TrainConfig) -> str:
    """The torch device of a run: what `auto` stands for, or what is named."""
    if config.device != "auto":
        return config.device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
