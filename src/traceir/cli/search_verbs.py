"""What `traceir search`, `explain`, `demo` and `serve` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Final

from traceir.cli.terminal import (
    check_model_options,
    load_encoder,
    load_own_encoder,
    one_line,
    open_encoder,
    say,
    shows_progress,
)
from traceir.cutoff import check_rate
from traceir.errors import InputError
from traceir.index import open_index
from traceir.index.filters import And, Filter, In, is_value
from traceir.items import Item, Query, as_image
from traceir.media.part import file_of
from traceir.search import Searcher, SearchResult
from traceir.serve.config import ServeConfig
from traceir.world import notice

_HIT_FIELDS: Final = ("rank", "score", "id", "modality", "text", "image")


def search(args: argparse.Namespace) -> int:
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
    if args.candidate and (args.instruction or args.modality):
        raise InputError("--candidate takes neither --instruction nor --modality; those belong to queries")
    text = _text(args)
    content = Item.of(text=text, image=args.image or None) if args.candidate else _query(args, text)
    check_model_options(args)
    from traceir.explain import describe, explain

    model = load_own_encoder(args).model
    print(describe(explain(model, model.prompt(content), args.completion)))
    return 0


def demo(args: argparse.Namespace) -> int:
    from traceir.lab import demo as demonstration

    check_model_options(args)
    print(f"preparing the gallery in {args.out}", file=sys.stderr)
    pool, questions = demonstration.prepare(args.out)
    encoder = load_encoder(args)
    index, report = demonstration.fill(pool, args.out, encoder, progress=shows_progress())
    with index:
        counts, uri = index.info().counts, index.info().uri
        described = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        print(f"gallery: {sum(counts.values())} items ({described}), {report.skipped} of them indexed before\n")
        answers = demonstration.ask(questions, encoder, index)
    for number, answer in enumerate(answers, start=1):
        print(*map(one_line, demonstration.describe(number, answer).split("\n")), sep="\n", end="\n\n")
    right = sum(answer.is_right for answer in answers)
    reasoned = sum(answer.encoding.route == "reason" for answer in answers)
    print(f"{right} of {len(answers)} queries have the right one first; {reasoned} were reasoned about, the others not.")
    print("The queries are the first of their row and kind (WISHES in demo.py), whatever comes of them.")
    print(f"contact sheet: {demonstration.write_page(answers, args.out)}")
    if args.serve == "yes" or (args.serve == "terminal" and sys.stdout.isatty()):
        from traceir.serve.run import serve

        config = ServeConfig(index=uri, title="TraceIR, the gallery of the demonstration")
        serve(config, lambda: encoder, lambda line: print(f"{line} (Ctrl-C ends it)", flush=True), open_browser=True)
    else:
        print(f"search it on a page: traceir serve --index {uri} --open")
    return 0


def parse_where(conditions: Sequence[str]) -> Filter | None:
    """FIELD=VALUE conditions, all of which must hold.

    A value matches the text and also, where it reads as one, the number, true, false or null (a missing field).
    """
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
    if not (text or args.image or args.instruction):
        raise InputError("there is nothing to search with; give a text, --image, or both")
    image = as_image(args.image) if args.image else None
    if image is not None and not Path(file_of(args.image)).is_file():
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
    for hit in result.hits:
        words = hit.text or ""
        shown = words if len(words) <= 160 else words[:159] + "…"
        lines.append(f"{hit.rank:3d}  {hit.score:.4f}  " + "  ".join(filter(None, (hit.id, hit.image, shown))))
    if not result.hits and (cut := result.cut) is not None and cut.best is not None:
        lines.append(f"nothing found above the cut-off of {cut.rate:g} (the best scored {cut.best:.4f})")
    elif not result.hits:
        lines.append("no hits")
    return "\n".join(map(one_line, lines))


def serve(args: argparse.Namespace) -> int:
    """The options bear the names of the fields of ServeConfig."""
    options: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(ServeConfig)}
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    config = ServeConfig(**options)
    check_model_options(args)
    if args.keys is not None and not args.keys.is_file():
        raise InputError(f"--keys {args.keys} is not there; make it with `traceir keys add NAME --file {args.keys}`")
    try:
        from traceir.serve.run import serve
    except ImportError as error:
        raise InputError(f"serving needs more packages ({error}); pip install 'traceir[serve]'") from error
    load = partial(open_encoder, args, in_flight=args.capacity)
    serve(config, load, partial(print, flush=True), open_browser=args.open)
    return 0
