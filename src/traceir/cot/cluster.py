"""A build on a cluster: Ray Data spreads the parts over workers, each of which runs the very functions of build.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from traceir.cot.build import WINDOW, BuildSummary, run_parts
from traceir.cot.plan import BuildConfig
from traceir.cot.reach import Reach, open_cache, work_of
from traceir.cot.source import CaseSource, DataPart
from traceir.ray_session import ONE_CPU, on_ray


class PartWorker:
    """What Ray keeps on a worker: its source and its connections. Called with batches of parts."""

    def __init__(self, config: BuildConfig, out: str, reach: Reach) -> None:
        self.config, self.out, self.reach = config, Path(out), reach
        self.source = CaseSource(Path(config.data), config.tasks)
        self.cache = open_cache(self.out, reach)
        self.stopped = ""

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        columns = [batch[name].tolist() for name in DataPart.__dataclass_fields__]
        parts = [DataPart(*values) for values in zip(*columns, strict=True)]
        if self.stopped:  # what stopped it would stop it again, for more money
            summary = BuildSummary(unfinished={part.name: self.stopped for part in parts}, stopped=self.stopped)
        else:
            summary = run_parts(work_of(self.config, self.out, self.reach, self.source, self.cache), parts, progress=False)
        self.stopped = summary.stopped
        yield {
            "parts": [summary.parts],
            "unfinished": ["\n".join(f"{name}\t{why}" for name, why in summary.unfinished.items())],
            "stopped": [summary.stopped],
            **{name: [summary.counts[name]] for name in ("samples", "complex", "kept")},
        }


def run_on_ray(config: BuildConfig, out: Path, parts: Sequence[DataPart], reach: Reach, *, workers: int) -> BuildSummary:
    """Takes the parts through all stages on a Ray cluster ($RAY_ADDRESS), or on this machine where there is none.

    Every worker gets an equal share of the limits on concurrency, rate and spend. `out`, the data and the cache of answers must
    lie on a file system that all workers see. Resumes like any build: finished parts are not in `parts`, answers in the cache.
    """
    if not parts:
        return BuildSummary()
    # Settings with paths that do not depend on a worker's working directory.
    paths = {name: _absolute(getattr(config, name)) for name in ("data", "captions", "templates")}
    config, reach = replace(config, **paths), replace(reach, journal=_absolute(reach.journal), workers=workers)
    with on_ray(workers, ONE_CPU):
        import ray

        rows = [asdict(part) for part in parts]
        done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // WINDOW)).map_batches(
            PartWorker,
            fn_constructor_args=(config, str(out.resolve()), reach),
            batch_size=WINDOW,
            concurrency=workers,
        )
        return _total(done.take_all())


def _absolute(path: str) -> Any:
    return str(Path(path).resolve()) if path else ""


def _total(rows: Sequence[dict[str, Any]]) -> BuildSummary:
    total = BuildSummary()
    for row in rows:
        total.parts += int(row["parts"])
        total.counts.update({name: int(row[name]) for name in ("samples", "complex", "kept")})
        total.unfinished |= dict(line.split("\t", 1) for line in str(row["unfinished"]).splitlines())
        total.stopped = total.stopped or str(row["stopped"])
    return total
