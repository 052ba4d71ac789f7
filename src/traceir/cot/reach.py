"""How a build reaches its teacher, how fast, and on which machines: nothing in here decides what the data are.

On a cluster Ray Data spreads the parts over workers, each of which runs the very functions of build.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from traceir.cot.build import WINDOW, BuildSummary, Work, run_parts
from traceir.cot.plan import BuildConfig, gather_captions
from traceir.cot.rules import RuleFilter
from traceir.cot.source import CaseSource, DataPart, read_captions
from traceir.cot.stages import PATIENCE
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.asker import Asker, Budget, Pacer
from traceir.cot.teachers.batch_files import BatchTeacher
from traceir.cot.teachers.teacher import OpenAITeacher, RecordedTeacher, Teacher
from traceir.errors import InputError
from traceir.ray_session import ONE_CPU, on_ray

RECORDED: Final = "recorded:"
BATCH: Final = "batch:"


@dataclass(frozen=True, slots=True)
class Reach:
    """Addresses and limits. `teacher`: a base URL, `recorded:FILE.jsonl` or `batch:FOLDER`; `verifier` "": the same.

    `key_variable` names the environment variable that holds the key, `journal` the folder of answers. Rates count for this
    process; prices are USD for a million tokens; `spend_limit` is USD for all that was ever answered there; of what is left of
    it, and of concurrency and rates, each of `workers` takes an equal share. `extra` goes into every request body. A question
    that fails for a time is tried `tries` times, some minutes in all, before its part is left for a later run. `patience`: see
    reply_monitor.py; replies of a recorded file or an imported batch cost nothing any more and do not try it.
    """

    teacher: str
    verifier: str = ""
    key_variable: str = "OPENAI_API_KEY"
    journal: str = ""
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0
    tries: int = 20
    price_in: float = 0.0
    price_out: float = 0.0
    spend_limit: float | None = None
    patience: int = PATIENCE
    workers: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for address in filter(None, (self.teacher, self.verifier)):
            if not address.startswith(("http://", "https://", RECORDED, BATCH)):
                remedy = "give http://HOST:PORT/v1, recorded:FILE.jsonl or batch:FOLDER"
                raise InputError(f"teacher {address!r} is not an address; {remedy}")
        if self.patience < 0:
            raise InputError(f"patience is {self.patience}; give a number of replies, or 0 to go on whatever they are")
        if self.spend_limit is not None and not (self.price_in or self.price_out):
            raise InputError("a spend limit needs prices; give --price-in and --price-out, in USD for a million tokens")


def open_cache(out: Path, reach: Reach, writer: str = "") -> AnswerCache:
    return AnswerCache(Path(reach.journal) if reach.journal else out / "journal", writer)


@contextmanager
def open_work(config: BuildConfig, out: Path, reach: Reach, writer: str) -> Iterator[Work]:
    """The source, the rules and the askers of one worker, of which there is one a `writer`."""
    with closing(CaseSource(Path(config.data), config.tasks)) as source, open_cache(out, reach, writer) as cache:
        yield work_of(config, out, reach, source, cache)


def work_of(config: BuildConfig, out: Path, reach: Reach, source: CaseSource, cache: AnswerCache) -> Work:
    """As `open_work`, over a source and a cache that are open."""
    captions = read_captions(gather_captions(out, config))
    questions, pace, budget = config.questions(), _pacer(reach), Budget(cache, reach.price_in, reach.price_out)
    if reach.spend_limit is not None:
        budget.limit = budget.spent + max(0.0, reach.spend_limit - budget.spent) / reach.workers
    asker = Asker(open_teacher(reach.teacher, config.model, config, reach), cache, pace, budget, attempts=reach.tries)
    verifier = asker
    if reach.verifier or (config.verifier and config.verifier != config.model):
        other = open_teacher(reach.verifier or reach.teacher, config.verifier or config.model, config, reach)
        verifier = Asker(other, cache, _pacer(reach) if reach.verifier else pace, budget, attempts=reach.tries)
    rules = RuleFilter(config.limits, captions, questions.templates)
    patience = 0 if reach.teacher.startswith((BATCH, RECORDED)) else reach.patience
    return Work(config, out, source, questions, rules, asker, verifier, reach.teacher.startswith(BATCH), patience)


def open_teacher(address: str, model: str, config: BuildConfig, reach: Reach) -> Teacher:
    if address.startswith(RECORDED):
        return RecordedTeacher(Path(address.removeprefix(RECORDED)))
    if address.startswith(BATCH):
        return BatchTeacher(Path(address.removeprefix(BATCH)), model, pixels=config.pixels, extra=reach.extra)
    key = os.environ.get(reach.key_variable, "") or "none"
    return OpenAITeacher(model, address, key, timeout_s=reach.timeout_s, pixels=config.pixels, extra=reach.extra)


def _pacer(reach: Reach) -> Pacer:
    """The pace of one worker."""
    share, requests, tokens = reach.workers, reach.requests_per_minute, reach.tokens_per_minute
    return Pacer(max(1, reach.concurrency // share), requests and requests / share, tokens and tokens / share)


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
    """`run_parts` on a Ray cluster ($RAY_ADDRESS), or on this machine where there is none.

    Every worker gets an equal share of the limits on concurrency, rate and spend. `out`, the data and the cache of answers must
    lie on a file system that all workers see.
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
