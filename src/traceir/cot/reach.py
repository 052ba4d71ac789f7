"""How a build reaches its teacher, and how fast: nothing in here decides what the data are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from traceir.cot.build import Work
from traceir.cot.plan import BuildConfig, gather_captions
from traceir.cot.reply_monitor import PATIENCE
from traceir.cot.rules import RuleFilter
from traceir.cot.source import CaseSource, read_captions
from traceir.cot.teachers.answer_cache import AnswerCache
from traceir.cot.teachers.asker import Asker, Budget
from traceir.cot.teachers.batch_files import BatchTeacher
from traceir.cot.teachers.pace import Pacer
from traceir.cot.teachers.teacher import OpenAITeacher, RecordedTeacher, Teacher
from traceir.errors import InputError

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
    """The teacher at an address. Raises InputError where a name or a key is missing."""
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
