"""Figures of a build of M-BEIR-CoT: what was kept and why, how it reads, how often it is wrong, what it says of people.

One pass over the outcomes in bounded memory (8 bytes a kept sample, and a sample of texts chosen by hash). `quality.json` holds
the figures (docs/formats.md), `quality.html` shows them (quality_page.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.files import write_json
from traceir.cot.outcomes import CotOutcome
from traceir.cot.quality.likeness import NEAR, Words, diversity, near_duplicates
from traceir.cot.quality.reviewed import Stratum, estimate_share
from traceir.cot.quality.sketches import HashSample
from traceir.cot.quality.tally import COPIED, DROPPED_BY, FUNNEL, Tally, Texts
from traceir.cot.review.decisions import Decision
from traceir.cot.review.review import Settled, sample_hash
from traceir.data.mbeir import EVAL_ROWS
from traceir.errors import DataError, InputError

NAME: Final = "M-BEIR-CoT quality"
FORMAT: Final = 1
FILE: Final = "quality.json"
SAMPLE: Final = 20_000
"""Kept reasonings among which near duplicates are looked for."""
DIVERSITY: Final = 2_000
"""Of these, the first whose lexical diversity is measured, of each task and of all."""
TOP: Final = 10
"""Openings that are listed."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one task, or of all, as plain data; shares are from 0 to 1.

    `funnel`: samples that reached each stage. `rules`: samples that each rule dropped, in the order of the stages, with up to 3
    `examples`. `people`: `told` counts the samples whose target has words, `untold` those whose target is a picture alone.
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
    """All figures of a build. `hallucination` and `fault` are the estimates of reviewed.estimate_share."""

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
    price_in: float = 0.0,
    price_out: float = 0.0,
) -> Quality:
    """The figures of a stream of outcomes as the filter left them, that is before people's decisions are applied.

    `decisions` (reviewer -> qid -> decision) give the estimates; `settled` (qid -> what its reviewers settled) is applied to all
    other figures. `captions`: picture path -> its words, where the data have any. `tokenizer` as of rules.Limits; prices in USD
    for a million tokens. Raises DataError where a package is missing.
    """
    tallies: dict[str, Tally] = {}
    strata: dict[str, Stratum] = {}
    sample: HashSample[tuple[str, Words]] = HashSample(SAMPLE)
    votes = _by_qid(decisions or {})
    for outcome in tqdm(outcomes, desc="measuring samples", unit="sample", delay=2.0):
        qid, task = outcome.case.record.qid, outcome.case.task
        tally = tallies.setdefault(task, Tally())
        decided = (settled or {}).get(qid) if outcome.status != "direct" else None
        kept = decided.decision == "keep" if decided else outcome.status == "kept"
        tally.add(outcome, kept, decided is not None)
        if outcome.status == "kept":
            strata.setdefault(task, Stratum()).add(_valid(votes.get(qid, ()), outcome))
        if kept:
            reasoning, answer = (decided or outcome).reasoning, (decided or outcome).answer
            words = tally.add_kept(Texts(outcome, reasoning, answer, captions or {}), tokenizer)
            sample.add(f"{task} {qid}", (task, words))
    if not tallies:
        raise InputError("there is no outcome to measure; run `traceir reasoning build` first")
    return _quality(tallies, strata, sample.entries(), price_in, price_out)


def save_quality(file: Path, quality: Quality) -> None:
    """The figures as `quality.json`, atomically."""
    write_json(file, {"name": NAME, "format": FORMAT, **asdict(quality)})


def read_quality(file: Path) -> Quality:
    """What `save_quality` wrote. Raises InputError where it is not there, DataError where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} is not there; make it with `traceir reasoning report`") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}; make it again") from error
    if not isinstance(found, dict) or found.get("name") != NAME or found.get("format") != FORMAT:
        raise DataError(f"{file}: not {NAME} of format {FORMAT}; make it again with this release")
    try:
        tasks = {name: Figures(**own) for name, own in found["tasks"].items()}
        rest = {name: found[name] for name in ("hallucination", "fault", "made_by", "cost")}
        return Quality(Figures(**found["overall"]), tasks, **rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: figures are missing ({error}); make it again") from error


def summary(quality: Quality) -> str:
    """The figures in short, as Markdown without any text of the data but task and model names."""
    lines = [
        "| task | queries | complex | kept | share | words | top 10 openings | near duplicates | people terms | copied |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in [*quality.tasks.items(), ("**all**", quality.overall)]:
        words = own.lengths["reasoning_words"]["quantiles"].get("0.50", "–")
        cells = [str(own.funnel["queries"]), str(own.funnel["complex"]), str(own.funnel["curated"]), percent(own.kept_share)]
        cells += [str(words), percent(own.openings["share"]), percent(own.duplicates["near"]["share"])]
        cells += [percent(own.people["told"]["share"]), percent(own.copied["share"])]
        shown = name if name.startswith("**") else name.replace("|", "\\|").replace("`", "")
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    for name, found in (("Hallucinated", quality.hallucination), ("Faulty (dropped or edited by a reviewer)", quality.fault)):
        lines.append(f"\n{name}: {told_estimate(found)}.")
    return "\n".join(lines) + "\n"


def told_estimate(found: Mapping[str, Any]) -> str:
    """An estimate in words."""
    if found["share"] is None:
        return "not reviewed"
    reach = "" if found["covered"] >= 0.99995 else f"; the reviewed tasks hold {percent(found['covered'])} of the kept samples"
    return (
        f"{percent(found['share'])} of kept samples (95 % interval {percent(found['low'])} to {percent(found['high'])}; "
        f"{found['wrong']} of {found['reviewed']} reviewed at random{reach})"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _by_qid(decisions: Mapping[str, Mapping[str, Decision]]) -> dict[str, list[Decision]]:
    votes: dict[str, list[Decision]] = {}
    for own in decisions.values():
        for qid, decision in own.items():
            votes.setdefault(qid, []).append(decision)
    return votes


def _valid(votes: Iterable[Decision], outcome: CotOutcome) -> list[Decision]:
    """Those on the very text that the sample has now."""
    found = list(votes)
    return [vote for vote in found if vote.sample == sample_hash(outcome)] if found else []


def _quality(
    tallies: Mapping[str, Tally],
    strata: Mapping[str, Stratum],
    sample: list[tuple[str, Words]],
    price_in: float,
    price_out: float,
) -> Quality:
    near = near_duplicates([words for _, words in sample])
    whole = Tally()
    tasks: dict[str, Figures] = {}
    for task in sorted(tallies, key=_task_order):
        whole.absorb(tallies[task])
        own = [(words, again) for (name, words), again in zip(sample, near, strict=True) if name == task]
        tasks[task] = _figures(tallies[task], own)
    everything = _figures(whole, [(words, again) for (_, words), again in zip(sample, near, strict=True)])
    tokens = {name: float(whole.tokens[name]) for name in ("prompt_tokens", "completion_tokens")}
    money = (tokens["prompt_tokens"] * price_in + tokens["completion_tokens"] * price_out) / 1e6
    spent = {"usd": round(money, 4)} if price_in or price_out else {}
    ordered = {task: strata[task] for task in sorted(strata, key=_task_order)}
    return Quality(
        overall=everything,
        tasks=tasks,
        hallucination=estimate_share(ordered, "hallucinated"),
        fault=estimate_share(ordered, "faulty"),
        made_by={name: dict(counts.most_common()) for name, counts in whole.made_by.items()},
        cost=tokens | spent,
    )


def _figures(tally: Tally, sampled: list[tuple[Words, bool]]) -> Figures:
    surplus = sum(again for _, again in sampled)
    top = tally.openings.top(TOP)
    complex_, kept = tally.funnel["complex"], tally.openings.total
    compared = tally.copies.counts.total()
    return Figures(
        funnel={name: tally.funnel[name] for name in FUNNEL},
        kept_share=_share(tally.funnel["curated"], complex_),
        rules={name: tally.rules[name] for name in DROPPED_BY},
        examples={name: tally.examples[name] for name in DROPPED_BY if name in tally.examples},
        lengths={name: lengths.summary() for name, lengths in tally.lengths.items()},
        diversity=diversity(words for words, _ in sampled[:DIVERSITY]),
        openings={
            "samples": kept,
            "different": len(tally.openings.counts),
            "share": _share(sum(count for _, count in top), kept),
            "error": tally.openings.error,
            "top": [{"words": words, "samples": count} for words, count in top],
        },
        duplicates={
            "exact": tally.exact(),
            "near": {"samples": len(sampled), "surplus": surplus, "share": _share(surplus, len(sampled)), "threshold": NEAR},
        },
        people={"told": tally.told.summary(), "untold": tally.untold.summary()},
        copied={
            "samples": compared,
            "least": COPIED,
            **{name: tally.copied[name] for name in ("run", "whole", "either")},
            "share": _share(tally.copied["either"], compared),
            "longest": tally.copies.summary(),
            "examples": tally.copy_examples,
        },
        confidence=tally.confidence,
    )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _task_order(name: str) -> tuple[int, str]:
    return EVAL_ROWS.index(name) if name in EVAL_ROWS else len(EVAL_ROWS), name
