"""The quality and bias report of a build: `quality.json`, and the same as `quality.md` and as one HTML page that opens anywhere.

All text from data and models is escaped (data/report.py); the page's own policy forbids scripts and outside addresses.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from traceir.cot.cot_card import write_cot_card
from traceir.cot.files import write_text
from traceir.cot.outcomes import read_outcomes
from traceir.cot.plan import DATASET, gather_captions, read_config
from traceir.cot.quality.people_terms import GROUPS
from traceir.cot.quality.quality import FILE, Figures, Quality, estimate_in_words, measure, save_quality
from traceir.cot.quality.samples import BINS, FUNNEL, MEASURES
from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import settle
from traceir.cot.source import read_captions
from traceir.data.cot import NAME as COT_NAME
from traceir.data.report import number, percent, render
from traceir.errors import InputError

STAGES: Final = FUNNEL[1:]


def write_quality(out: Path, to: Path) -> str:
    """Measures a build into `to`: `quality.json`, `quality.html`, `quality.md`; returns the text of the last.

    The data card beside the assembled files, where there are any, is written anew. Raises DataError where a part is not finished.
    """
    config = read_config(out)
    captions = read_captions(gather_captions(out, config))
    quality = measure(
        read_outcomes(out),
        decisions=read_decisions(out),
        settled=settle(out).settled,
        captions=captions,
        tokenizer=config.limits.tokenizer,
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
    return render("cot/quality.md.j2", **_shared(quality))


def page(quality: Quality) -> str:
    """The whole page as text; equal figures give equal pages."""
    overall, draws = (
        quality.overall,
        {"kept": _kept, "drops": _drops, "confidence": _confidence, "lengths": _lengths, "groups": _groups},
    )
    dropped_by = [rule for rule, count in overall.rules.items() if count]
    heights = {"kept": 1.0 + 0.32 * len(quality.tasks), "drops": 0.8 + 0.3 * len(dropped_by), "confidence": 2.6, "lengths": 2.8}
    if any(overall.people[kind]["groups"] for kind in ("told", "untold")):
        heights["groups"] = 2.8
    if not dropped_by:
        del heights["drops"]
    return render(
        "cot/quality.html.j2",
        **_shared(quality),
        all=overall,
        plots={name: _plot(draws[name], quality, heights[name]) if name in heights else "" for name in draws},
        dropped_by=dropped_by,
        tables=_tables(quality, dropped_by),
        cost=", ".join(f"{name.replace('_', ' ')} {amount:,.2f}".removesuffix(".00") for name, amount in quality.cost.items()),
    )


def _shared(quality: Quality) -> dict[str, Any]:
    estimates = {"hallucinated": quality.hallucination, "faulty": quality.fault}
    return {
        "dataset": COT_NAME,
        "quality": quality,
        "named": [*quality.tasks.items(), ("all", quality.overall)],
        "estimates": {name: Markup(estimate_in_words(estimate)) for name, estimate in estimates.items()},
    }


def _tables(quality: Quality, dropped_by: list[str]) -> dict[str, list[Any]]:
    """The cells of each table whose rows are the tasks, then all of them."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("funnel", "rules", "diversity", "openings", "duplicates", "people", "copied")
    }
    for name, own in [*quality.tasks.items(), ("all", quality.overall)]:
        exact, near, copied, opening = own.duplicates["exact"], own.duplicates["near"], own.copied, own.openings
        rows["funnel"].append([name, *(number(own.funnel[stage]) for stage in FUNNEL), percent(own.kept_share)])
        rows["rules"].append([name, *(number(own.rules[rule]) for rule in dropped_by)])
        rows["diversity"].append([name, *_spans(own), *_diversity(own)])
        most = [f"{first['words']} ({first['samples']:,})" for first in opening["top"][:1]]
        rows["openings"].append([name, number(opening["different"]), percent(opening["share"]), *most])
        shares = percent(exact["share"]), number(near["samples"]), percent(near["share"])
        rows["duplicates"].append([name, number(exact["samples"]), *shares])
        rows["people"] += _people_rows(name, own)
        counts = (number(copied[key]) for key in ("samples", "run", "whole"))
        rows["copied"].append([name, *counts, percent(copied["share"]), copied["longest"]["most"]])
    rows["estimates"] = [
        [name, number(own["kept"]), own["reviewed"], _interval(own), _interval(quality.fault["tasks"][name])]
        for name, own in quality.hallucination["tasks"].items()
    ]
    rows["top"] = [[top["words"], number(top["samples"])] for top in quality.overall.openings["top"]]
    rows["made_by"] = [[role, name, number(count)] for role, made in quality.made_by.items() for name, count in made.items()]
    return rows


def _interval(estimate: dict[str, Any]) -> str:
    share, low, high = (estimate[key] for key in ("share", "low", "high"))
    return "–" if share is None else f"{percent(share)} [{percent(low)}, {percent(high)}]"


def _spans(own: Figures) -> Iterator[str]:
    for name in MEASURES:
        yield " / ".join(str(own.lengths[name]["quantiles"].get(share, "–")) for share in ("0.05", "0.50", "0.95"))


def _diversity(own: Figures) -> list[str]:
    shares = (f"{own.diversity[key]:.3f}" for key in ("distinct_1", "distinct_2", "moving_ratio"))
    return [number(own.diversity["words"]), *shares]


def _people_rows(name: str, own: Figures) -> Iterator[list[str]]:
    for kind, target in (("told", "words"), ("untold", "a picture alone")):
        people = own.people[kind]
        if people["samples"]:
            groups = ", ".join(f"{group} {count['samples']:,}" for group, count in people["groups"].items())
            yield [name, target, number(people["samples"]), percent(people["share"]), groups or "–"]


# Plots


def _plot(draw: Callable[[Any, Quality], None], quality: Quality, height: float) -> Markup:
    """A figure as an inline SVG on white; the same figures give the same text."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plots need matplotlib; install it with `pip install 'traceir[learn]'`") from error
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "traceir", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(8.4, height), layout="constrained")
        draw(figure, quality)
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    return Markup(f"<div class=wide>{text[text.index('<svg') :]}</div>")


def _kept(figure: Any, quality: Quality) -> None:
    axes = figure.add_subplot()
    names = [_label(name) for name in quality.tasks]
    for stage in STAGES:
        shares = [100 * own.funnel[stage] / max(own.funnel["complex"], 1) for own in quality.tasks.values()]
        axes.plot(shares, range(len(names)), "o", label=stage.replace("_", " "), alpha=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 102), ylim=(len(names) - 0.5, -0.5), xlabel="of the complex queries, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=6, fontsize="small")


def _drops(figure: Any, quality: Quality) -> None:
    axes = figure.add_subplot()
    rules = [rule for rule, count in quality.overall.rules.items() if count]
    start = [0] * len(rules)
    for name, own in quality.tasks.items():
        counts = [own.rules[rule] for rule in rules]
        axes.barh(range(len(rules)), counts, left=start, label=_label(name))
        start = [done + count for done, count in zip(start, counts, strict=True)]
    axes.set_yticks(range(len(rules)), rules)
    axes.set(ylim=(len(rules) - 0.5, -0.5), xlabel="samples dropped")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")


def _confidence(figure: Any, quality: Quality) -> None:
    axes = figure.add_subplot()
    places = [place / BINS for place in range(BINS)]
    start = [0] * BINS
    for word, colour in (("yes", "C0"), ("no", "C3")):
        counts = quality.overall.confidence[word]
        axes.bar(places, counts, width=1 / BINS, align="edge", bottom=start, color=colour, label=word)
        start = [done + count for done, count in zip(start, counts, strict=True)]
    axes.set(xlabel="the verifier's confidence", ylabel="answers", xlim=(0, 1))
    axes.legend()


def _lengths(figure: Any, quality: Quality) -> None:
    shown = (("reasoning_words", "words of reasoning"), ("answer_words", "words of answer"))
    for axes, (name, label) in zip(figure.subplots(1, 2), shown, strict=True):
        bins = quality.overall.lengths[name]["histogram"]
        width = bins[0][1] - bins[0][0] + 1 if bins else 1
        axes.bar([low for low, _, _ in bins], [count for _, _, count in bins], width=width, align="edge")
        axes.set(xlabel=label, ylabel="kept samples")


def _groups(figure: Any, quality: Quality) -> None:
    axes = figure.add_subplot()
    for place, (kind, label) in enumerate((("told", "target has words"), ("untold", "target is a picture alone"))):
        found = quality.overall.people[kind]
        counts = [found["groups"].get(group, {}).get("samples", 0) for group in GROUPS]
        places = [group + 0.4 * place for group in range(len(GROUPS))]
        axes.bar(places, [100 * count / max(found["samples"], 1) for count in counts], width=0.38, label=label)
    axes.set_xticks([group + 0.2 for group in range(len(GROUPS))], GROUPS)
    axes.set(ylabel="of these samples, %")
    axes.legend()


def _label(name: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in name)[:40]
