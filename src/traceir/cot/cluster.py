"""A build on a cluster: Ray Data spreads the parts over workers, each of which runs the very functions of build.py."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from traceir.cot.build import WINDOW, Tally, run_parts
from traceir.cot.plan import BuildConfig
from traceir.cot.reach import Reach, work_of
from traceir.cot.source import Part, Source
from traceir.cot.teachers.journal import Journal
from traceir.ray_session import ONE_CPU, on_ray


class PartWorker:
    """What Ray keeps on a worker: its source, its connection and its own journal file. Called with batches of parts."""

    def __init__(self, config: BuildConfig, out: str, reach: Reach) -> None:
        self.config, self.out, self.reach = config, Path(out), reach
        folder = Path(reach.journal) if reach.journal else self.out / "journal"
        self.source = Source(Path(config.data), config.tasks)
        self.journal = Journal(folder, f"ray-{os.uname().nodename}-{uuid.uuid4().hex[:8]}")
        self.stopped = ""

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        columns = zip(*(batch[name] for name in ("dataset", "number", "first", "lines", "start")), strict=True)
        parts = [Part(str(name), *(int(number) for number in numbers)) for name, *numbers in columns]
        if self.stopped:  # what stopped it would stop it again, for more money
            tally = Tally(unfinished={part.name: self.stopped for part in parts}, stopped=self.stopped)
        else:
            tally = run_parts(work_of(self.config, self.out, self.reach, self.source, self.journal), parts, progress=False)
        self.stopped = tally.stopped
        yield {
            "parts": [tally.parts],
            "unfinished": ["\n".join(f"{name}\t{why}" for name, why in tally.unfinished.items())],
            "stopped": [tally.stopped],
            **{name: [tally.counts[name]] for name in ("samples", "complex", "kept")},
        }


def run_on_ray(config: BuildConfig, out: Path, parts: Sequence[Part], reach: Reach, *, workers: int) -> Tally:
    """Takes the parts through all stages on a Ray cluster ($RAY_ADDRESS), or on this machine where there is none.

    Every worker gets an equal share of the limits on concurrency, rate and spend. `out`, the data and the journal must lie on a
    file system that all workers see, and each worker has a journal file of its own. Resumes like any build: finished parts are
    not in `parts`, answers are in the journal.
    """
    if not parts:
        return Tally()
    with on_ray(workers, ONE_CPU):
        import ray

        rows = [{"dataset": p.dataset, "number": p.number, "first": p.first, "lines": p.lines, "start": p.start} for p in parts]
        done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // WINDOW)).map_batches(
            PartWorker,
            fn_constructor_args=(_everywhere(config), str(out.resolve()), _reached_everywhere(reach, workers)),
            batch_size=WINDOW,
            concurrency=workers,
        )
        return _total(done.take_all())


def _everywhere(config: BuildConfig) -> BuildConfig:
    """The settings with paths that do not depend on a worker's working directory."""
    paths = {"data": config.data, "captions": config.captions, "templates": config.templates}
    whole: dict[str, Any] = {name: _absolute(path) for name, path in paths.items()}
    return replace(config, **whole)


def _reached_everywhere(reach: Reach, workers: int) -> Reach:
    return replace(reach, journal=_absolute(reach.journal), workers=workers)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def _total(rows: Sequence[dict[str, Any]]) -> Tally:
    total = Tally()
    for row in rows:
        total.parts += int(row["parts"])
        total.counts.update({name: int(row[name]) for name in ("samples", "complex", "kept")})
        for line in str(row["unfinished"]).splitlines():
            name, _, why = line.partition("\t")
            total.unfinished[name] = why
        total.stopped = total.stopped or str(row["stopped"])
    return total
