"""The quality and bias report of a build: `quality.json`, and the same as `quality.md` and as one HTML page that opens anywhere.

All text from data and models is escaped (data/report.py); the page's own policy forbids scripts and outside addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from traceir.cot.cot_card import write_cot_card
from traceir.cot.files import write_text
from traceir.cot.outcomes import read_outcomes
from traceir.cot.plan import DATASET, gather_captions, read_config
from traceir.cot.quality.people_terms import GROUPS
from traceir.cot.quality.quality import FILE, Quality, estimate_in_words, measure, save_quality
from traceir.cot.quality.samples import BINS, FUNNEL
from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import settle
from traceir.cot.source import read_captions
from traceir.data.cot import NAME as COT_NAME
from traceir.data.report import render

PlotRow = tuple[str, list[float]]
"""A label, and a value for each part of its bar."""


def write_quality(out: Path, to: Path) -> str:
    """Measures a build into `to`: `quality.json`, `quality.html`, `quality.md`; returns the text of the last.

    The data card beside the assembled files, where there are any, is written anew. Raises DataError where a part is not finished.
    """
    config = read_config(out)
    captions = read_captions(gather_captions(out, config))
    decisions, settled = read_decisions(out), settle(out).settled
    quality = measure(
        read_outcomes(out), decisions=decisions, settled=settled, captions=captions, tokenizer=config.limits.tokenizer
    )
    to.mkdir(parents=True, exist_ok=True)
    save_quality(to / FILE, quality)
    text = summary(quality)
    write_text(to / "quality.md", text)
    write_text(to / "quality.html", page(quality))
    if (out / DATASET / "manifest.json").is_file():
        write_cot_card(out / DATASET, out, quality=quality)
    return text


def summary(quality: Quality) -> str:
    """The figures in short, as Markdown without any text of the data but task names."""
    return _render("cot/quality.md.j2", quality)


def page(quality: Quality) -> str:
    """The whole page as text; equal figures give equal pages."""
    dropped_by = {rule: count for rule, count in quality.overall.rules.items() if count}
    plots = {
        "kept": [
            (task, [100 * own.funnel[stage] / max(own.funnel["complex"], 1) for stage in FUNNEL[1:]])
            for task, own in quality.tasks.items()
        ],
        "drops": [(rule, [own.rules[rule] for own in quality.tasks.values()]) for rule in dropped_by],
        "confidence": [
            (f"{place / BINS:.2f}", [quality.overall.confidence[word][place] for word in ("yes", "no")]) for place in range(BINS)
        ],
        "groups": list(_groups(quality)),
        **{name: list(_lengths(quality, name)) for name in ("reasoning_words", "answer_words")},
    }
    stages = [name.replace("_", " ") for name in FUNNEL]
    return _render("cot/quality.html.j2", quality, plots=plots, dropped_by=dropped_by, stages=stages)


def _render(template: str, quality: Quality, **more: object) -> str:
    return render(
        template,
        dataset=COT_NAME,
        quality=quality,
        all=quality.overall,
        named=[*quality.tasks.items(), ("all", quality.overall)],
        hallucination=Markup(estimate_in_words(quality.hallucination)),
        fault=Markup(estimate_in_words(quality.fault)),
        **more,
    )


def _lengths(quality: Quality, measure_name: str) -> Iterator[PlotRow]:
    for first, last, count in quality.overall.lengths[measure_name]["histogram"]:
        yield f"{first}–{last}" if first < last else str(first), [count]


def _groups(quality: Quality) -> Iterator[PlotRow]:
    """Samples of each group of terms, in percent of those whose target has words, and of the others."""
    people: list[dict[str, Any]] = [quality.overall.people[kind] for kind in ("told", "untold")]
    for group in GROUPS if any(kind["groups"] for kind in people) else ():
        counts = ((kind["groups"].get(group, {"samples": 0})["samples"], max(kind["samples"], 1)) for kind in people)
        yield group, [100 * count / total for count, total in counts]
