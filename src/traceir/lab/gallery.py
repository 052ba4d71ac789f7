"""A contact sheet of searches: one HTML file with queries, routes, reasoning and hits, which opens anywhere, offline.

Pictures are inlined as small JPEGs, texts are escaped, and the page's own policy forbids scripts and outside addresses.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

from traceir.errors import ImageError
from traceir.images import ImageInput
from traceir.items import Encoding, Hit, Query

FILE_NAME: Final = "index.html"
THUMBNAIL: Final = 288
"""Longest side of an inlined picture in pixels."""
CARDS: Final = 5
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One search to show. `right` holds the ids that answer the query; empty where nobody knows."""

    title: str
    query: Query
    encoding: Encoding
    hits: Sequence[Hit]
    right: frozenset[str] = frozenset()
    note: str = ""


def write_gallery(
    entries: Sequence[Entry], out_dir: Path, *, title: str = "TraceIR: searches", intro: str = "", cards: int = CARDS
) -> Path:
    """Writes `index.html` into the folder and returns its path; of each entry the first `cards` hits become cards.

    A picture that cannot be read any more is shown as such; nothing is raised for it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    body = "\n".join(_section(number, entry, cards) for number, entry in enumerate(entries, start=1))
    page = _PAGE.format(
        title=_text(title),
        intro=f"<p>{_text(intro)}</p>" if intro else "",
        summary=_summary(entries),
        style=_STYLE,
        body=body,
    )
    target = out_dir / FILE_NAME
    fresh = out_dir / f".{FILE_NAME}.{os.getpid()}.tmp"
    fresh.write_bytes(page.encode("utf-8", "replace"))
    os.replace(fresh, target)
    return target


def reasoning_steps(reasoning: str) -> list[str]:
    """A reasoning split into its steps at each "; ", without the blanks that a tokenizer leaves before punctuation."""
    tidy = re.sub(r"\s+([,.;:?!])", r"\1", reasoning.strip())
    return [step for step in re.split(r";(?:\s+|$)", tidy) if step]


def cost(encoding: Encoding) -> str:
    """What routing saw and what reasoning cost, in words."""
    tokens = f", {encoding.tokens} token{'' if encoding.tokens == 1 else 's'}" if encoding.tokens else ""
    stopped = f", {_ENDED[encoding.ended]}" if encoding.truncated else ""
    return f"P(<|emb|>) {encoding.emb_probability:.3f}{tokens}{stopped}"


_ENDED: Final = {
    "turn": "ended its turn without <|emb|>",
    "budget": "cut off at the budget before <|emb|>",
    None: "ended without <|emb|>",
}


def first_right(hits: Sequence[Hit], right: frozenset[str]) -> int | None:
    """Rank of the first right hit, from 1; None where none of them is."""
    return next((hit.rank for hit in hits if hit.id in right), None)


def verdict(hits: Sequence[Hit], right: frozenset[str]) -> str:
    """Where the right one came, in words."""
    place = first_right(hits, right)
    if place == 1:
        return "right one first"
    return f"wrong: the right one came at rank {place}" if place else f"wrong: no right one among the first {len(hits)}"


def _summary(entries: Sequence[Entry]) -> str:
    judged = [entry for entry in entries if entry.right]
    first = sum(first_right(entry.hits, entry.right) == 1 for entry in judged)
    reasoned = sum(entry.encoding.route == "reason" for entry in entries)
    found = f"<b>{first} of {len(judged)}</b> have the right one first, " if judged else ""
    return f"{len(entries)} queries: {found}<b>{reasoned}</b> reasoned, <b>{len(entries) - reasoned}</b> went the direct road."


def _section(number: int, entry: Entry, cards: int) -> str:
    judged = ""
    if entry.right:
        good = first_right(entry.hits, entry.right) == 1
        judged = f'<span class="verdict {"good" if good else "bad"}">{_text(verdict(entry.hits, entry.right))}</span>'
    shown = "".join(_card(hit, entry.right) for hit in entry.hits[:cards]) or '<p class="none">no hits</p>'
    return (
        f'<section><header><h2><span class="number">{number}</span> {_text(entry.title)}</h2>{_badge(entry.encoding)}{judged}'
        f"{f'<small>{_text(entry.note)}</small>' if entry.note else ''}</header>"
        f'<div class="row"><div class="asked">{_query(entry.query)}{_reasoning(entry.encoding)}</div>'
        f'<div class="hits">{shown}</div></div></section>'
    )


def _badge(encoding: Encoding) -> str:
    hint = _text(cost(encoding))
    return f'<span class="badge {encoding.route}" title="{hint}">{encoding.route}</span><small>{hint}</small>'


def _query(query: Query) -> str:
    images = "".join(_image(image, "the query's picture") for image in query.images)
    words = f'<p class="words">{_text(query.text)}</p>' if query.text else ""
    instruction = f'<p class="instruction">{_text(query.instruction)}</p>' if query.instruction else ""
    wanted = f'<p class="wanted">looks for: {_text(query.target or "anything")}</p>'
    return f"{images}{words}{instruction}{wanted}"


def _reasoning(encoding: Encoding) -> str:
    if encoding.route != "reason":
        return '<p class="unspent">No reasoning: the model took it for a simple query.</p>'
    steps = "".join(f"<li>{_text(step)}</li>" for step in reasoning_steps(encoding.reasoning))
    return f'<div class="reasoning"><h3>Reasoning</h3><ol>{steps}</ol></div>'


def _card(hit: Hit, right: frozenset[str]) -> str:
    good = hit.id in right
    image = _image(ImageInput.open(hit.image), f"hit {hit.rank}") if hit.image else ""
    words = f'<p class="words">{_text(hit.text)}</p>' if hit.text else ""
    mark = '<span class="mark">&#10003; right</span>' if good else ""
    return (
        f'<article class="card{" right" if good else ""}">{image}{words}'
        f"<footer><b>{hit.rank}</b> <span>{hit.score:.3f}</span>{mark}<code>{_text(hit.id)}</code></footer></article>"
    )


def _image(image: ImageInput, alt: str) -> str:
    try:
        pil = image.load(shrink_to=THUMBNAIL)
    except ImageError as error:
        return f'<p class="lost">{_text(str(error))}</p>'
    pil.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = BytesIO()
    pil.save(stream, format="JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_text(alt)}" width="{pil.width}" height="{pil.height}">'


def _text(text: str | None) -> str:
    return html.escape(_CONTROL.sub(" ", text or ""), quote=True)


_STYLE: Final = """
:root { color-scheme: light dark; --paper: #f6f5f1; --card: #ffffff; --ink: #20242b; --pale: #6b717c; --edge: #dedbd2;
  --reason: #6d3fc4; --direct: #1d7a6c; --good: #1f7a3d; --bad: #a8401f; --tint: #f0ecf9; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --card: #1e2127; --ink: #e7e6e1; --pale: #9aa0ab;
  --edge: #343841; --reason: #b79bf2; --direct: #6fd0bf; --good: #79d397; --bad: #f19a78; --tint: #262233; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.1rem; margin: 0; } h3 { font-size: .8rem; margin: 0;
  color: var(--reason); text-transform: uppercase; letter-spacing: .06em; }
p { margin: .35rem 0; overflow-wrap: anywhere; } small, .wanted, .unspent, .none, .lost { color: var(--pale); font-size: .82rem; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 14px; margin-top: 1.25rem; padding: 1.1rem; }
section > header { display: flex; flex-wrap: wrap; align-items: center; gap: .45rem .7rem; margin-bottom: .9rem; }
.number { color: var(--pale); font-weight: 400; }
.badge, .verdict { border-radius: 99px; padding: .1rem .65rem; font-size: .8rem; font-weight: 600; border: 1.5px solid; }
.badge.reason { color: var(--reason); } .badge.direct { color: var(--direct); }
.verdict.good { color: var(--good); } .verdict.bad { color: var(--bad); }
.row { display: grid; grid-template-columns: minmax(13rem, 1fr) 3fr; gap: 1.25rem; }
.asked img { max-width: 11rem; } img { display: block; width: 100%; height: auto; border-radius: 9px; background: #fff; }
.asked .words { font-size: 1.02rem; font-weight: 600; } .instruction { font-style: italic; color: var(--pale); }
.reasoning { background: var(--tint); border-left: 3px solid var(--reason); border-radius: 0 9px 9px 0; margin-top: .8rem;
  padding: .6rem .8rem; } .reasoning ol { margin: .3rem 0 0; padding-left: 1.3rem; font-size: .88rem; overflow-wrap: anywhere; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .8rem; align-content: start; }
.card { border: 1px solid var(--edge); border-radius: 12px; padding: .55rem; display: flex; flex-direction: column; gap: .4rem; }
.card.right { border: 2px solid var(--good); padding: calc(.55rem - 1px); } .card .words { font-size: .86rem; }
.card footer { margin-top: auto; display: flex; flex-wrap: wrap; gap: .15rem .5rem; font-size: .78rem; color: var(--pale); }
.card footer b { color: var(--ink); } .mark { color: var(--good); font-weight: 600; } code { overflow-wrap: anywhere; }
@media (max-width: 44rem) { .row { grid-template-columns: 1fr; } }
"""

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{intro}
<p>{summary}</p>
{body}
</body>
</html>
"""
