"""Figures of a build of M-BEIR-CoT: what was kept and why, how it reads, how often it is wrong, what it says of people.

One pass writes a row of measures for each outcome (samples.py), SQL makes figures of them, of each task and of all. They are in
`quality.json` (docs/formats.md), and shown by `quality.html` (cot/products.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from traceir.cot.files import read_document, write_json
from traceir.cot.outcomes import CotOutcome
from traceir.cot.quality.samples import BINS, COPIED, DROPPED_BY, FUNNEL, MEASURES, SampleTable, measures_of, sample_table
from traceir.cot.quality.texts import GROUPS, NEAR, Words, diversity, near_duplicates
from traceir.cot.review.decisions import Decision
from traceir.cot.review.review import Settled
from traceir.errors import DataError, InputError

NAME: Final = "M-BEIR-CoT quality"
FORMAT: Final = 1
FILE: Final = "quality.json"
DIVERSITY: Final = 2_000
"""The first kept reasonings whose lexical diversity is measured, of each task and of all."""
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM: Final = 40
"""Most bins of a histogram, but for one that begins before the least value."""

Z: Final = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """Kept samples of one task, and of those that were reviewed at random: how many, and how many of these were wrong."""

    kept: int
    reviewed: int
    wrong: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one task, or of all, as plain data; shares are from 0 to 1.

    `funnel`: samples that reached each stage. `rules`: samples that each rule dropped, in the order of the stages, with up to 3
    `examples`. `people`: `told` counts the samples whose target has words, `untold` those whose target is an image alone.
    """

    funnel: dict[str, int]
    kept_share: float
    rules: dict[str, int]
    examples: dict[str, list[dict[str, str]]]
    lengths: dict[str, dict[str, Any]]
    diversity: dict[str, Any]
    openings: dict[str, Any]
    duplicates: dict[str, dict[str, Any]]
    people: dict[str, dict[str, Any]]
    copied: dict[str, Any]
    confidence: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Quality:
    """All figures of a build. `hallucination` and `fault` are the estimates of estimate_share."""

    overall: Figures
    tasks: dict[str, Figures]
    hallucination: dict[str, Any]
    fault: dict[str, Any]
    made_by: dict[str, dict[str, int]]
    cost: dict[str, float]


def measure(
    outcomes: Iterable[CotOutcome],
    *,
    decisions: Mapping[str, Mapping[str, Decision]] | None = None,
    settled: Mapping[str, Settled] | None = None,
    captions: Mapping[str, str] | None = None,
    tokenizer: str = "",
) -> Quality:
    """The figures of a stream of outcomes as the filter left them, that is before people's decisions are applied.

    `decisions` (reviewer -> qid -> decision) give the estimates; `settled` (qid -> what its reviewers settled) is applied to all
    other figures. `captions`: image path -> its words, where the data have any. `tokenizer` as of rules.RuleLimits.
    Raises DataError where a package is missing.
    """
    votes: dict[str, list[Decision]] = defaultdict(list)
    for own in (decisions or {}).values():
        for qid, decision in own.items():
            votes[qid].append(decision)
    settled, captions = settled or {}, captions or {}
    rows = (
        measures_of(outcome, settled.get(outcome.case.record.qid), votes.get(outcome.case.record.qid, ()), captions, tokenizer)
        for outcome in tqdm(outcomes, desc="measuring samples", unit="sample", delay=2.0)
    )
    with sample_table(rows) as table:
        if not table.tasks:
            raise InputError("there is no outcome to measure; run `traceir reasoning build` first")
        drawn = [(task, words.split()) for task, words in table.rows("sample")]
        repeated = near_duplicates([words for _, words in drawn])
        sample = [(task, words, again) for (task, words), again in zip(drawn, repeated, strict=True)]
        tasks = {task: _figures(table, task, sample) for task in table.tasks}
        overall = _figures(table, None, sample)
        strata = table.rows("strata")
        hallucination, fault = ({row[0]: Stratum(row[1], row[2], row[wrong]) for row in strata} for wrong in (3, 4))
        made_by: dict[str, dict[str, int]] = {"teacher": {}, "verifier": {}, "prompts": {}}
        for role, name, count in table.rows("made_by"):
            made_by[role][name] = count
        [tokens] = table.rows("tokens")
        cost = dict(zip(("prompt_tokens", "completion_tokens"), map(float, tokens), strict=True))
    return Quality(overall, tasks, estimate_share(hallucination), estimate_share(fault), made_by, cost)


def save_quality(file: Path, quality: Quality) -> None:
    """The figures as `quality.json`, atomically."""
    write_json(file, {"name": NAME, "format": FORMAT, **asdict(quality)})


def read_quality(file: Path) -> Quality:
    """What `save_quality` wrote. Raises InputError where it is not there, DataError where it cannot be read."""
    content = read_document(file, NAME, FORMAT, "make it with `traceir reasoning report`", "make it again with this release")
    try:
        tasks = {name: Figures(**own) for name, own in content["tasks"].items()}
        rest = {name: content[name] for name in ("hallucination", "fault", "made_by", "cost")}
        return Quality(Figures(**content["overall"]), tasks, **rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: figures are missing ({error}); make it again") from error


def estimate_share(strata: Mapping[str, Stratum]) -> dict[str, Any]:
    """The share of kept samples that are wrong, with its 95 % interval, as plain data.

    Stratified by task: each stratum's share weighs as much as its kept samples. The interval is Wilson's for the stratified share
    and Kish's effective number of reviews, 1 / sum(weight^2 / reviews). Tasks without reviews are left out; `covered` is the
    share of kept samples in the others. `share`, `low` and `high` are null where nothing was reviewed.
    """
    asked = [stratum for stratum in strata.values() if stratum.reviewed]
    reached, kept = sum(stratum.kept for stratum in asked), sum(stratum.kept for stratum in strata.values())
    share = sum(stratum.kept / reached * stratum.wrong / stratum.reviewed for stratum in asked)
    effective = 1 / sum((stratum.kept / reached) ** 2 / stratum.reviewed for stratum in asked) if asked else 0.0
    return {
        "reviewed": sum(stratum.reviewed for stratum in asked),
        "wrong": sum(stratum.wrong for stratum in asked),
        **_with_interval(share, effective),
        "covered": round(reached / kept, 4) if kept else 0.0,
        "effective": round(effective, 2),
        "tasks": {
            name: {"kept": own.kept, "reviewed": own.reviewed, "wrong": own.wrong}
            | _with_interval(own.wrong / max(own.reviewed, 1), own.reviewed)
            for name, own in strata.items()
        },
    }


def _with_interval(share: float, count: float) -> dict[str, float | None]:
    """A share seen in `count` trials, which need not be a whole number as scipy asks, with Wilson's 95 % score interval."""
    if not count:
        return {"share": None, "low": None, "high": None}
    scale = 1 + Z * Z / count
    centre = (share + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return {"share": round(share, 4), "low": round(max(0.0, centre - reach), 4), "high": round(min(1.0, centre + reach), 4)}


def _figures(table: SampleTable, task: str | None, sample: list[tuple[str, Words, bool]]) -> Figures:
    """The figures of a task, or of all. `sample`: task and words of some rows, and whether they repeat others."""
    table.choose(task)
    [counts] = table.rows("counts")
    funnel = dict(zip(FUNNEL, counts, strict=False))
    different, compared, run, whole, copied, copies = counts[len(FUNNEL) :]
    rules, openings, lengths = table.rows("rules"), table.rows("openings"), _lengths(table.rows("lengths"))
    dropped, examples = {rule: n for rule, n, _ in rules}, {rule: shown for rule, _, shown in rules}
    own = [(words, again) for name, words, again in sample if task in (None, name)]
    verdicts = {(verdict, bin_): count for verdict, bin_, count in table.rows("confidence")}
    kept, repeated = funnel["curated"], sum(again for _, again in own)
    return Figures(
        funnel=funnel,
        kept_share=_share(kept, funnel["complex"]),
        rules={name: dropped.get(name, 0) for name in DROPPED_BY},
        examples={name: examples[name] for name in DROPPED_BY if name in examples},
        lengths={name: lengths[name] for name in MEASURES},
        diversity=diversity([words for words, _ in own[:DIVERSITY]]),
        openings={
            "samples": kept,
            "different": openings[0][2] if openings else 0,
            "share": _share(sum(amount for _, amount, _ in openings), kept),
            "error": 0,
            "top": [{"words": opening, "samples": amount} for opening, amount, _ in openings],
        },
        duplicates={
            "exact": {"samples": kept, "surplus": kept - different, "share": _share(kept - different, kept)},
            "near": {"samples": len(own), "surplus": repeated, "share": _share(repeated, len(own)), "threshold": NEAR},
        },
        people=_people(table.rows("people"), table.rows("terms")),
        copied={
            "samples": compared, "least": COPIED, "run": run, "whole": whole, "either": copied,
            "share": _share(copied, compared), "longest": lengths["longest_copy"], "examples": copies or [],
        },
        confidence={word: [verdicts.get((word, step), 0) for step in range(BINS)] for word in ("yes", "no")},
    )  # fmt: skip


def _lengths(rows: list[Any]) -> dict[str, dict[str, Any]]:
    """Of each measure, from the counts of its lengths in ascending order: samples, mean, least, most, quantiles, histogram."""
    return {name: _summary(*(np.array([row[at] for row in rows if row[0] == name], int) for at in (1, 2)))
            for name in (*MEASURES, "longest_copy")}  # fmt: skip


def _summary(lengths: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A quantile is the least length that at least this share of the samples do not exceed. A histogram is `[first length, last
    length, samples]` of bins of equal width (1, 2, 5, 10, ...) that begin at its multiples, empty ones in between counted."""
    if not len(lengths):
        return {"samples": 0, "mean": 0.0, "least": 0, "most": 0, "quantiles": {}, "histogram": []}
    total, below, least, most = int(counts.sum()), counts.cumsum(), int(lengths[0]), int(lengths[-1])
    widths = (digit * 10**power for power in range(6) for digit in (1, 2, 5))
    width = next(width for width in widths if (most - least) // width < HISTOGRAM)
    binned = np.bincount(lengths // width - least // width, weights=counts)
    return {
        "samples": total,
        "mean": round(int(lengths @ counts) / total, 3),
        "least": least,
        "most": most,
        "quantiles": {f"{share:.2f}": int(lengths[np.searchsorted(below, share * total)]) for share in QUANTILES},
        "histogram": [[at * width, (at + 1) * width - 1, int(n)] for at, n in enumerate(binned, least // width)],
    }


def _people(samples: list[Any], groups: list[Any]) -> dict[str, dict[str, Any]]:
    """Samples that hold terms about people which the data do not tell: by group, by term, with examples."""
    people: dict[str, dict[str, Any]] = {}
    for kind in ("told", "untold"):
        total, holding = next((counts for name, *counts in samples if name == kind), (0, 0))
        by_group = {group: {"samples": count, "terms": terms} for name, group, count, terms in groups if name == kind}
        ordered = {group: by_group[group] for group in GROUPS if group in by_group}
        people[kind] = {"samples": total, "holding": holding, "share": _share(holding, total), "groups": ordered}
    return people


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
