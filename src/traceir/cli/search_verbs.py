"""What `traceir search`, `explain`, `demo` and `serve` do."""

from __future__ import annotations

import argparse
import json
import re
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
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.index import open_index
from traceir.index.filter_text import parse_filter
from traceir.index.filters import And, Filter
from traceir.items import Hit, Item, Query, as_image
from traceir.media.part import file_of
from traceir.retrieval.pipeline import MAX_WEIGHT, SearchKeywords, SearchOptions
from traceir.retrieval.search import Searcher, SearchResult
from traceir.serve.config import ServeConfig
from traceir.world import notice

_HIT_FIELDS: Final = ("rank", "score", "id", "modality", "text", "image", "similar")


def search(args: argparse.Namespace) -> int:
    query, terms = _query(args, _text(args)), _terms(args)
    keywords: SearchKeywords = {
        "k": args.k, "where": parse_where(args.where), "exact": not args.approximate, "cutoff": args.cutoff, "mode": args.mode,
        "keyword_weight": args.keyword_weight, "sort": args.sort, "fold": args.fold, "after": args.after,
        "rerank_top": args.rerank_top,
    }  # fmt: skip
    SearchOptions(**keywords)  # what is wrong shows before the model is loaded, as does a wrong path
    reads_words_alone = args.mode == "keyword"
    if not reads_words_alone or args.rerank:
        check_model_options(args)
    open_index(args.index).close()
    encoder = None if reads_words_alone else open_encoder(args)
    if args.rerank:
        from traceir.retrieval.rerank import load_reranker

        keywords["rerank"] = load_reranker(args.rerank, encoder, device=args.device)
    with open_index(args.index, encoder) as index:
        result = Searcher(encoder, index).search(query, route=args.route, terms=terms, **keywords)
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
    """Conditions in the language of filters, all of which must hold."""
    parts = [parse_filter(condition) for condition in conditions]
    return And(parts) if parts else None


def parse_term(text: str) -> tuple[float, str]:
    """Weight and content of [W:]TEXT."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+):(.+)", text, re.DOTALL | re.ASCII)
    if match is None:
        return 1.0, text
    if (weight := float(match[1])) > MAX_WEIGHT:
        raise InputError(
            f"{text[:80]!r} would have the weight {match[1]}, more than {MAX_WEIGHT:g}; if that is no weight, write 1:{text[:80]}"
        )
    return weight, match[2]


def _terms(args: argparse.Namespace) -> list[tuple[float, Query]]:
    """What the query is moved towards and away from."""
    terms: list[tuple[float, Query]] = []
    for option, sign in (("plus", 1), ("minus", -1), ("plus_image", 1), ("minus_image", -1)):
        for weight, content in map(parse_term, getattr(args, option)):
            is_image = option.endswith("image")
            term = {"image": _image(content)} if is_image else {"text": content}
            terms.append((sign * weight, Query.of(**term, instruction=args.instruction, target=args.modality)))
    return terms


def _text(args: argparse.Namespace) -> str | None:
    """The words of an input, given as arguments of their own or by --text."""
    words = " ".join(args.words)
    if words and args.text is not None:
        raise InputError(f"the text is given twice, as {words[:80]!r} and by --text; leave out one of them")
    return words or args.text


def _query(args: argparse.Namespace, text: str | None) -> Query:
    if not (text or args.image or args.instruction):
        raise InputError("there is nothing to search with; give a text, --image, or both")
    image = _image(args.image) if args.image else None
    return Query.of(text=text, image=image, instruction=args.instruction, target=args.modality)


def _image(file: str) -> ImageInput:
    if not Path(file_of(file)).is_file():
        raise InputError(f"image {file} does not exist; give the path of an image file")
    return as_image(file)


def _result_as_json(result: SearchResult, note: str | None) -> dict[str, Any]:
    about = ("route", "reasoning", "tokens", "emb_probability", "truncated", "cut")
    return {
        "note": note,
        **{name: getattr(result.encoding, name, None) for name in about},
        "seconds": asdict(result.seconds),
        "cutoff": None if result.cut is None else asdict(result.cut),
        "hits": [
            {
                **{name: getattr(hit, name) for name in _HIT_FIELDS},
                **{name: dict(getattr(hit, name)) for name in ("fields", "scores")},
            }
            for hit in result.hits
        ],
        "next": result.next,
    }


def _result_as_text(result: SearchResult) -> str:
    spent = 1000 * (result.seconds.encode + result.seconds.search + result.seconds.rerank)
    if result.encoding is None:
        lines = [f"mode       keyword ({spent:.0f} ms)"]
    else:
        from traceir.lab.gallery import cost, reasoning_steps

        lines = [f"route      {result.encoding.route} ({cost(result.encoding)}, {spent:.0f} ms)"]
        for number, step in enumerate(reasoning_steps(result.encoding.reasoning)):
            lines.append(f"{'' if number else 'reasoning':9}  {step}")
    lines += map(_hit_as_text, result.hits)
    if not result.hits and (cut := result.cut) is not None and cut.best is not None:
        lines.append(f"nothing found above the cut-off of {cut.rate:g} (the best scored {cut.best:.4f})")
    elif not result.hits:
        lines.append("no hits")
    return "\n".join(map(one_line, lines))


def _hit_as_text(hit: Hit) -> str:
    words = hit.text or ""
    shown = words if len(words) <= 160 else words[:159] + "…"
    scores = ", ".join(f"{name} {score:.4g}" for name, score in hit.scores.items()) if len(hit.scores) > 1 else ""
    more = (f"({scores})" if scores else "", f"(+{len(hit.similar)} like it)" if hit.similar else "")
    return f"{hit.rank:3d}  {hit.score:.4f}  " + "  ".join(filter(None, (hit.id, hit.image, shown, *more)))


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
