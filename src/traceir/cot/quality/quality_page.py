"""The quality and bias report of a build as one HTML page that opens anywhere, its plots inlined, beside its figures.

All text from data and models is escaped; the page's own policy forbids scripts and outside addresses.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from traceir.cot.cot_card import write_cot_card
from traceir.cot.files import write_text
from traceir.cot.outcomes import read_outcomes
from traceir.cot.plan import DATASET, gather_captions, read_config
from traceir.cot.quality.people_terms import GROUPS
from traceir.cot.quality.quality import (
    FILE,
    Figures,
    Quality,
    measure,
    percent,
    save_quality,
    summary,
    told_estimate,
)
from traceir.cot.quality.tally import BINS
from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import settle
from traceir.cot.source import read_captions
from traceir.data.cot import NAME as COT_NAME
from traceir.errors import InputError

STAGES: Final = ("complex", "reasoned", "passed_rules", "verified", "kept", "curated")
_NOTES: Final = {
    "funnel": "Complex: z = 1. Reasoned: with a reply. Passed rules: all rules on single replies. Verified: a yes above the "
    "threshold. Kept: no duplicates. Curated: after the decisions of reviewers. Share: curated of "
    "complex. Queries whose assessment failed are none of these; below they count under teacher.",
    "lengths": "Words without punctuation; tokens as the rules count them. distinct-1, distinct-2: different words and word "
    "pairs as a share of all; they fall as text grows. Moving ratio: different words in windows of 50.",
    "openings": "The first four words of kept reasonings. A large share means that the teacher fills in a template.",
    "duplicates": "Exact: the words of an earlier kept reasoning. Near: Jaccard similarity of word 3-shingles of at least 0.8 "
    "with another one, within a sample chosen by hash.",
    "people": "Terms in reasoning or answer whose concept neither query, instruction nor target tells in words. Where the "
    "target is a picture without words, what it shows is not told, and the terms are counted apart: they may be right. The "
    "query's picture is not read either. English word lists; adjectives such as colours count beside a word for people. A count "
    "is a reason to look.",
    "copied": "Runs of at least 8 words that reasoning or answer share with the target's text, and targets of 3 to 7 words said "
    "whole, without what the query says too (runs of 3 words and more). Samples whose target has no text are left out.",
    "hallucination": "From decisions on kept samples drawn at random, weighted by task. Hallucinated: dropped for that reason. "
    "Faulty: dropped for any reason, or edited. Interval: Wilson's, with Kish's effective number of reviews.",
    "confidence": "What the verifier said of answers that passed the rules.",
}


def write_quality(out: Path, to: Path) -> str:
    """Measures a build into `to`: `quality.json`, `quality.html`, `quality.md`; returns the text of the last.

    The data card beside the assembled files, where there are any, is written anew. Raises DataError where a part is not finished.
    """
    config = read_config(out)
    captions = read_captions(gather_captions(out, config))
    found = measure(
        read_outcomes(out),
        decisions=read_decisions(out),
        settled=settle(out).settled,
        captions=captions,
        tokenizer=config.limits.tokenizer,
    )
    to.mkdir(parents=True, exist_ok=True)
    save_quality(to / FILE, found)
    text = f"# Quality of {COT_NAME}\n\n{summary(found)}"
    write_text(to / "quality.md", text)
    write_text(to / "quality.html", page(found))
    if (out / DATASET / "manifest.json").is_file():
        write_cot_card(out / DATASET, out, quality=found)
    return text


def page(quality: Quality) -> str:
    """The whole page as text; equal figures give equal pages."""
    sections = (
        ("What was kept", _funnel(quality), "funnel"),
        ("What dropped the others", _rules(quality), ""),
        ("The verifier", _plot(_confidence, quality, 2.6), "confidence"),
        ("Wrong among the kept", _estimates(quality), "hallucination"),
        ("Length and diversity", _plot(_lengths, quality, 2.8) + _diversity(quality), "lengths"),
        ("Openings", _openings(quality), "openings"),
        ("Repeated reasoning", _duplicates(quality), "duplicates"),
        ("Terms about people", _people(quality), "people"),
        ("Copied from the target", _copied(quality), "copied"),
        ("Made by", _made_by(quality), ""),
    )
    body = "".join(
        f"<section><h2>{_text(title)}</h2>{f'<p>{_text(_NOTES[note])}</p>' if note else ''}{content}</section>\n"
        for title, content, note in sections
    )
    return _PAGE.format(body=body, title=f"{COT_NAME}: quality")


def _named(quality: Quality) -> list[tuple[str, Figures]]:
    return [*quality.tasks.items(), ("all", quality.overall)]


def _funnel(quality: Quality) -> str:
    header = ["task", "queries", *(name.replace("_", " ") for name in STAGES), "share"]
    lines = [
        [name, *(f"{own.funnel[stage]:,}" for stage in ("queries", *STAGES)), percent(own.kept_share)]
        for name, own in _named(quality)
    ]
    return _plot(_kept, quality, 1.0 + 0.32 * len(quality.tasks)) + _table(header, lines)


def _rules(quality: Quality) -> str:
    overall = quality.overall
    used = [rule for rule, count in overall.rules.items() if count]
    if not used:
        return "<p>Nothing was dropped.</p>"
    lines = [[name, *(f"{own.rules[rule]:,}" for rule in used)] for name, own in _named(quality)]
    shown = "".join(
        f"<details><summary>{_text(rule)}: {overall.rules[rule]:,}</summary>"
        f"{_examples(overall.examples.get(rule, []), 'text')}</details>"
        for rule in used
    )
    return _plot(_drops, quality, 0.8 + 0.3 * len(used)) + _table(["task", *used], lines) + shown


def _estimates(quality: Quality) -> str:
    lines = []
    for name, own in quality.hallucination["tasks"].items():
        fault = quality.fault["tasks"][name]
        shown = [
            "–" if one["share"] is None else f"{percent(one['share'])} [{percent(one['low'])}, {percent(one['high'])}]"
            for one in (own, fault)
        ]
        lines.append([name, f"{own['kept']:,}", str(own["reviewed"]), *shown])
    told = "".join(
        f"<p><b>{word}</b>: {_text(told_estimate(found))}.</p>"
        for word, found in (("Hallucinated", quality.hallucination), ("Faulty", quality.fault))
    )
    return told + _table(["task", "kept", "reviewed", "hallucinated", "faulty"], lines, last=False)


def _diversity(quality: Quality) -> str:
    header = ["task", "reasoning words, 5 / 50 / 95 %", "reasoning tokens", "answer words", "answer tokens"]
    header += ["measured words", "distinct-1", "distinct-2", "moving ratio"]
    lines = []
    for name, own in _named(quality):
        spans = [
            " / ".join(str(one["quantiles"].get(share, "–")) for share in ("0.05", "0.50", "0.95"))
            for one in (own.lengths[key] for key in ("reasoning_words", "reasoning_tokens", "answer_words", "answer_tokens"))
        ]
        found = own.diversity
        shares = [f"{found[key]:.3f}" for key in ("distinct_1", "distinct_2", "moving_ratio")]
        lines.append([name, *spans, f"{found['words']:,}", *shares])
    return _table(header, lines)


def _openings(quality: Quality) -> str:
    lines = [
        [name, f"{own.openings['different']:,}", percent(own.openings["share"])]
        + [f"{one['words']} ({one['samples']:,})" for one in own.openings["top"][:1]]
        for name, own in _named(quality)
    ]
    top = [[one["words"], f"{one['samples']:,}"] for one in quality.overall.openings["top"]]
    return _table(["task", "different", "share of the first 10", "most frequent"], lines) + _table(
        ["all", "samples"], top, last=False
    )


def _duplicates(quality: Quality) -> str:
    lines = []
    for name, own in _named(quality):
        exact, near = own.duplicates["exact"], own.duplicates["near"]
        lines.append([name, f"{exact['samples']:,}", percent(exact["share"]), f"{near['samples']:,}", percent(near["share"])])
    return _table(["task", "kept", "exact", "looked at", "near"], lines)


def _people(quality: Quality) -> str:
    lines = []
    for name, own in _named(quality):
        for kind, word in (("told", "words"), ("untold", "a picture alone")):
            found = own.people[kind]
            if found["samples"]:
                groups = ", ".join(f"{group} {one['samples']:,}" for group, one in found["groups"].items())
                lines.append([name, word, f"{found['samples']:,}", percent(found["share"]), groups or "–"])
    shown = ""
    for kind, word in (("told", "not told by query or target"), ("untold", "not told by the data")):
        for group, one in quality.overall.people[kind]["groups"].items():
            terms = "".join(
                f"<dt>{_text(term['term'])} ({term['samples']:,})</dt><dd>{_examples(term['examples'], 'words')}</dd>"
                for term in one["terms"]
            )
            shown += f"<details><summary>{_text(group)}, {word}: {one['samples']:,} samples</summary><dl>{terms}</dl></details>"
    plot = _plot(_groups, quality, 2.8) if any(quality.overall.people[kind]["groups"] for kind in ("told", "untold")) else ""
    return plot + _table(["task", "target has", "samples", "with terms", "groups, in samples"], lines, last=False) + shown


def _copied(quality: Quality) -> str:
    lines = []
    for name, own in _named(quality):
        found = own.copied
        counts = [f"{found[key]:,}" for key in ("samples", "run", "whole")]
        lines.append([name, *counts, percent(found["share"]), str(found["longest"]["most"])])
    header = ["task", "targets with text", "runs of 8 words", "said whole", "share", "longest run"]
    return _table(header, lines) + _examples(quality.overall.copied["examples"], "copied")


def _made_by(quality: Quality) -> str:
    lines = [[name, one, f"{count:,}"] for name, found in quality.made_by.items() for one, count in found.items()]
    cost = ", ".join(f"{name.replace('_', ' ')} {amount:,.2f}".removesuffix(".00") for name, amount in quality.cost.items())
    note = f"<p>Cost of the answers that stand: {_text(cost)}. Repeated attempts are not in it.</p>"
    return _table(["", "name", "samples"], lines, last=False) + note


def _examples(examples: Sequence[dict[str, str]], field: str) -> str:
    items = "".join(
        f"<li><code>{_text(one['qid'])}</code> {_text(one['task'])}"
        f"{': ' + _text(one['detail']) if one.get('detail') else ''}<blockquote>{_text(one[field])}</blockquote></li>"
        for one in examples
    )
    return f"<ul>{items}</ul>" if items else ""


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], *, last: bool = True) -> str:
    """`last`: the last line is the sum."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return (
        f"<div class=wide><table{' class=sum' if last else ''}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _text(text: object) -> str:
    return html.escape("".join(sign if sign.isprintable() else " " for sign in str(text)))


# Plots


def _plot(draw: Callable[[Any, Quality], None], quality: Quality, height: float) -> str:
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
    return f"<div class=wide>{text[text.index('<svg') :]}</div>"


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
    for number, (kind, label) in enumerate((("told", "target has words"), ("untold", "target is a picture alone"))):
        found = quality.overall.people[kind]
        counts = [found["groups"].get(group, {}).get("samples", 0) for group in GROUPS]
        places = [place + 0.4 * number for place in range(len(GROUPS))]
        axes.bar(places, [100 * count / max(found["samples"], 1) for count in counts], width=0.38, label=label)
    axes.set_xticks([place + 0.2 for place in range(len(GROUPS))], GROUPS)
    axes.set(ylabel="of these samples, %")
    axes.legend()


def _label(name: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in name)[:40]


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #f6f5f1; --ink: #20242b; --card: #fff; --line: #dedbd2; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #17191d; --ink: #e4e2dc; --card: #202329; --line: #3a3e46; }} }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; background: var(--card); font-size: .86rem; margin: .6rem 0; }}
th, td {{ border: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }} .sum tbody tr:last-child {{ font-weight: 600; }}
.wide {{ overflow-x: auto; }} .wide > svg {{ background: #fff; border-radius: .4rem; max-width: 100%; height: auto; }}
section > p {{ max-width: 48rem; }} details {{ margin: .3rem 0; }} dt {{ font-weight: 600; }}
blockquote {{ margin: .1rem 0 .6rem; padding-left: .8rem; border-left: 3px solid var(--line); overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}</body>
</html>
"""
