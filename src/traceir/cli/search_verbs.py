"""What `traceir search`, `explain`, `models` and `demo` do. Like all verbs these import what they need when they run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from traceir.cli.terminal import (
    check_model_options,
    clean_lines,
    load_encoder,
    load_own_encoder,
    open_encoder,
    say,
    shows_progress,
)
from traceir.errors import InputError

if TYPE_CHECKING:
    from traceir.index.filters import Filter
    from traceir.items import Hit, Query
    from traceir.search import SearchResult

_HIT_FIELDS: Final = ("rank", "score", "id", "modality", "text", "image")


def search(args: argparse.Namespace) -> int:
    from traceir.cutoff import check_rate
    from traceir.index import open_index
    from traceir.search import Searcher
    from traceir.world import notice

    query, where = _query(args, _text(args)), parse_where(args.where)
    if args.cutoff is not None:
        check_rate(args.cutoff)
    check_model_options(args)
    open_index(args.index).close()  # a wrong path shows before the model is loaded
    encoder = open_encoder(args)
    with open_index(args.index, encoder) as index:
        result = Searcher(encoder, index).search(
            query, k=args.k, route=args.route, where=where, exact=not args.approximate, cutoff=args.cutoff
        )
    say(note := notice(encoder, query, result.hits))
    print(json.dumps(_result_as_json(result, note)) if args.json else _result_as_text(result))
    return 0


def explain(args: argparse.Namespace) -> int:
    from traceir.items import Item

    if args.candidate and (args.instruction or args.modality):
        raise InputError("--candidate takes neither --instruction nor --modality; those belong to queries")
    text = _text(args)
    content = Item.of(text=text, image=args.image or None) if args.candidate else _query(args, text)
    check_model_options(args)
    from traceir.explain import describe, explain

    model = load_own_encoder(args).model
    print(describe(explain(model, model.prompt(content), args.completion)))
    return 0


def models(args: argparse.Namespace) -> int:
    from traceir.catalogue import KNOWN, described

    print(json.dumps([known.as_json() for known in KNOWN], indent=2) if args.json else described())
    return 0


def demo(args: argparse.Namespace) -> int:
    from traceir.cli.serve_verbs import serve_demo
    from traceir.lab import demo

    check_model_options(args)
    print(f"preparing the gallery in {args.out}", file=sys.stderr)
    pool, questions = demo.prepare(args.out)
    encoder = load_encoder(args)
    index, report = demo.fill(pool, args.out, encoder, progress=shows_progress())
    with index:
        counts, uri = index.info().counts, index.info().uri
        described = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        print(f"gallery: {sum(counts.values())} items ({described}), {report.skipped} of them indexed before\n")
        answers = demo.ask(questions, encoder, index)
    for number, answer in enumerate(answers, start=1):
        print(clean_lines(demo.describe(number, answer).split("\n")) + "\n")
    right = sum(answer.is_right for answer in answers)
    reasoned = sum(answer.encoding.route == "reason" for answer in answers)
    print(f"{right} of {len(answers)} queries have the right one first; {reasoned} were reasoned about, the others not.")
    print("The queries are the first of their row and kind (WISHES in demo.py), whatever comes of them.")
    print(f"contact sheet: {demo.write_page(answers, args.out)}")
    if args.serve == "yes" or (args.serve == "terminal" and sys.stdout.isatty()):
        return serve_demo(uri, encoder)
    print(f"search it on a page: traceir serve --index {uri} --open")
    return 0


def parse_where(conditions: Sequence[str]) -> Filter | None:
    """FIELD=VALUE conditions, all of which must hold.

    A value matches the text and also, where it reads as one, the number, true, false or null (a missing field).
    """
    from traceir.index.filters import And, In, is_value

    parts: list[Filter] = []
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise InputError(f"--where {condition!r} is not of the form FIELD=VALUE; write for instance year=1999")
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            read = value
        plain = not isinstance(read, str) and is_value(read)  # NaN, or a number of many digits, is a text all the same
        parts.append(In(name, (value, read) if plain else (value,)))
    return And(tuple(parts)) if parts else None


def _text(args: argparse.Namespace) -> str | None:
    """The words of an input, given as arguments of their own or by --text."""
    words = " ".join(args.words)
    if words and args.text is not None:
        raise InputError(f"the text is given twice, as {words[:80]!r} and by --text; leave out one of them")
    return words or args.text


def _query(args: argparse.Namespace, text: str | None) -> Query:
    from traceir.items import Query, as_image

    if not (text or args.image or args.instruction):
        raise InputError("there is nothing to search with; give a text, --image, or both")
    image = as_image(args.image) if args.image else None
    if image is not None and not Path(args.image).is_file():
        raise InputError(f"image {args.image} does not exist; give the path of an image file")
    return Query.of(text=text, image=image, instruction=args.instruction, target=args.modality)


def _result_as_json(result: SearchResult, note: str | None) -> dict[str, Any]:
    encoding = result.encoding
    return {
        "note": note,
        **{name: getattr(encoding, name) for name in ("route", "reasoning", "tokens", "emb_probability", "truncated", "cut")},
        "seconds": asdict(result.seconds),
        "cutoff": None if result.cut is None else asdict(result.cut),
        "hits": [{**{name: getattr(hit, name) for name in _HIT_FIELDS}, "fields": dict(hit.fields)} for hit in result.hits],
    }


def _result_as_text(result: SearchResult) -> str:
    from traceir.lab.gallery import cost, reasoning_steps

    spent = 1000 * (result.seconds.encode + result.seconds.search)
    lines = [f"route      {result.encoding.route} ({cost(result.encoding)}, {spent:.0f} ms)"]
    for number, step in enumerate(reasoning_steps(result.encoding.reasoning)):
        lines.append(f"{'' if number else 'reasoning':9}  {step}")
    return clean_lines([*lines, *(map(_hit_as_text, result.hits) if result.hits else [_nothing(result)])])


def _nothing(result: SearchResult) -> str:
    if result.cut is None or result.cut.best is None:
        return "no hits"
    return f"nothing found above the cut-off of {result.cut.rate:g} (the best scored {result.cut.best:.4f})"


def _hit_as_text(hit: Hit) -> str:
    words = hit.text or ""
    shown = words if len(words) <= 160 else words[:159] + "…"
    return f"{hit.rank:3d}  {hit.score:.4f}  " + "  ".join(part for part in (hit.id, hit.image or "", shown) if part)
