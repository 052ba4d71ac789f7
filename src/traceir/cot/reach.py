"""How a build reaches its teacher, how fast, on which machines and at what cost: nothing in here decides what the data are.

On a cluster Ray Data spreads the parts over workers, each of which runs the very functions of build.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import CotCase, TeacherQuestion
from traceir.cot.build import PATIENCE, WINDOW, BuildSummary, Work, read_lines, run_parts, stage_file
from traceir.cot.plan import BuildConfig, gather_captions
from traceir.cot.rules import RuleFilter, count_tokens
from traceir.cot.source import CaseSource, DataPart, read_captions
from traceir.cot.teachers.answer_cache import AnswerCache, BatchTeacher
from traceir.cot.teachers.asker import Asker, Budget, Pacer
from traceir.cot.teachers.teacher import OpenAITeacher, RecordedTeacher, Teacher
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.ray_session import ONE_CPU, on_ray

RECORDED: Final = "recorded:"
BATCH: Final = "batch:"
SAMPLE: Final = 400
"""Queries that an estimate looks at."""
PATCH: Final = 28
"""Side, in pixels, of the square of an image that is one token (Qwen2.5-VL)."""
REPLY_TOKENS: Final = {"assess": 40, "reason": 150, "verify": 40}
"""Tokens of a reply that is not known yet; a reasoning of the paper has 16 to 256, its answer 2 to 64."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Addresses and limits. `teacher`: a base URL, `recorded:FILE.jsonl` or `batch:FOLDER`; `verifier` "": the same.

    `key_variable` names the environment variable that holds the key, `journal` the folder of answers. Rates count for this
    process; prices are USD for a million tokens; `spend_limit` is USD for all that was ever answered there; of what is left of
    it, and of concurrency and rates, each of `workers` takes an equal share. `extra` goes into every request body. A question
    that fails for a time is tried `tries` times, some minutes in all, before its part is left for a later run. `patience`: see
    build.ReplyMonitor; replies of a recorded file or an imported batch cost nothing any more and do not try it.
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
        yield {"summary": [json.dumps({name: getattr(summary, name) for name in BuildSummary.__dataclass_fields__})]}


def run_on_ray(config: BuildConfig, out: Path, parts: Sequence[DataPart], reach: Reach, *, workers: int) -> BuildSummary:
    """`run_parts` on a Ray cluster ($RAY_ADDRESS), or on this machine where there is none.

    Every worker gets an equal share of the limits on concurrency, rate and spend. `out`, the data and the cache of answers must
    lie on a file system that all workers see.
    """
    total = BuildSummary()
    if not parts:
        return total
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
        for row in done.take_all():
            summary = BuildSummary(**json.loads(row["summary"]))
            total.parts += summary.parts
            total.counts.update(summary.counts)
            total.unfinished |= summary.unfinished
            total.stopped = total.stopped or summary.stopped
    return total


def _absolute(path: str) -> Any:
    return str(Path(path).resolve()) if path else ""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """Requests and tokens of one stage."""

    stage: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def estimate(
    config: BuildConfig, source: CaseSource, parts: Sequence[DataPart], out: Path | None = None, *, complex_share: float = 0.525
) -> list[StageEstimate]:
    """The three stages that ask. `complex_share` is the share of queries that reason where no assessment is done yet (the
    paper: 575,442 of 1,093,753); parts in `out` that are assessed tell their own. All complex ones are taken to pass the rules,
    and no question is asked twice, so this is what a build costs at most but for repeated attempts.
    """
    looked_at = parts[:: max(1, len(parts) // 25)]  # 25 to 50 parts, evenly spread, or all where there are fewer
    cases = [case for part in looked_at for case in source.cases(part)]
    if not cases:
        return [StageEstimate(stage, 0, 0, 0) for stage in REPLY_TOKENS]
    sampled, made = cases[:: max(1, len(cases) // SAMPLE)], config.questions()
    queries = len(cases) * sum(part.lines for part in parts) / sum(part.lines for part in looked_at)
    unasked = sum(case.task in (*config.direct, *config.complex) for case in sampled) / len(sampled)
    share = _complex_share(config, sampled, parts, out, complex_share)
    stages = {
        "assess": (1 - unasked, [made.assess(case) for case in sampled]),
        "reason": (share, [made.reason(case) for case in sampled]),
        "verify": (share, [made.verify(case, " ".join(["word"] * 16)) for case in sampled]),
    }
    estimates = []
    for stage, (asked_share, questions) in stages.items():
        requests = round(queries * asked_share)
        prompt = sum(_tokens_of(question, config) for question in questions) / len(questions)
        estimates.append(StageEstimate(stage, requests, round(requests * prompt), requests * REPLY_TOKENS[stage]))
    return estimates


def _tokens_of(question: TeacherQuestion, config: BuildConfig) -> int:
    """Prompt tokens of a question: its words, and a token for every 28 x 28 pixels of its images as they are sent."""
    texts = [question.system, *(part for part in question.parts if isinstance(part, str))]
    areas = [math.prod(ImageInput.open(path).size()) for path in question.images]
    patches = [math.ceil(min(area, config.pixels or area) / PATCH**2) for area in areas]
    return sum(count_tokens(text, config.limits.tokenizer) for text in texts) + sum(patches)


def estimate_table(estimates: Sequence[StageEstimate], price_in: float, price_out: float) -> str:
    """The estimate as text; prices in USD for a million tokens."""
    lines = [f"{'stage':<10}{'requests':>12}{'prompt tokens':>16}{'reply tokens':>15}{'USD':>12}"]
    columns = zip(*((row.requests, row.prompt_tokens, row.completion_tokens) for row in estimates), strict=True)
    for row in [*estimates, StageEstimate("all", *map(sum, columns))]:
        money = (row.prompt_tokens * price_in + row.completion_tokens * price_out) / 1e6
        lines.append(f"{row.stage:<10}{row.requests:>12,}{row.prompt_tokens:>16,}{row.completion_tokens:>15,}{money:>12,.2f}")
    return "\n".join(lines)


def _complex_share(
    config: BuildConfig, sampled: Sequence[CotCase], parts: Sequence[DataPart], out: Path | None, otherwise: float
) -> float:
    assessed = [stage_file(out, "assess", part) for part in parts] if out else []
    if shares := [int(line["z"]) for file in assessed if file.exists() for line in read_lines(file)]:
        return sum(shares) / len(shares)
    known = dict.fromkeys(config.direct, 0.0) | dict.fromkeys(config.complex, 1.0)
    return sum(known.get(case.task, otherwise) for case in sampled) / len(sampled)
