"""The command `traceir`: every verb of the project. Data go to stdout, progress and messages to stderr.

Each verb imports what it needs when it runs, so that `traceir --help` is instant. Exit codes: 0 done, 1 done in part or an
unexpected error, 2 an error that names its remedy, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from traceir import __version__
from traceir.errors import InputError, ModelError, TraceError

if TYPE_CHECKING:
    from traceir.encoder import Encoder
    from traceir.index.filters import Filter
    from traceir.items import Hit, Query
    from traceir.search import SearchResult

# Copies, so that the parser imports nothing; tests/test_cli.py holds them to the originals.
ROUTES: Final = ("auto", "reason", "direct")
MODALITIES: Final = ("image", "text", "image,text")
REPORTS: Final = ("steps", "routing", "routes")
PRESETS: Final = ("mini-pretrain", "mini", "mini-direct", "emoji")
SCALES: Final = ("small", "full")

PARTLY: Final = 1
MODEL_VARIABLE: Final = "TRACEIR_MODEL"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; only argparse's own refusals leave by SystemExit."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    _soften(sys.stdout)
    try:
        verb: Callable[[argparse.Namespace], int] = args.verb
        code = verb(args)
        sys.stdout.flush()
        return code
    except TraceError as error:
        return _fail(args, f"{error}", 2)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", 130)
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        hint = "" if args.verbose else " (unexpected; run it again with -v for the traceback)"
        return _fail(args, f"{type(error).__name__}: {error}{hint}", PARTLY)


def bundled_model() -> Path:
    """The checkpoint used where no `--model` is given: $TRACEIR_MODEL, else `models/mini` of the repository."""
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return Path(named)
    folder = Path(__file__).parents[2] / "models" / "mini"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"there is no bundled checkpoint at {folder}; give --model DIR_OR_HUB_ID, or set {MODEL_VARIABLE}, "
            "or train one with `traceir train --preset mini`"
        )
    return folder


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="traceir", description="Universal multimodal retrieval that thinks when a query needs it."
    )
    parser.add_argument("--version", action="version", version=f"traceir {__version__}")
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for where in (parser, shared):
        where.add_argument("--threads", type=_count, metavar="N", help="CPU threads for the model (default: torch's choice)")
        where.add_argument("-v", "--verbose", action="store_true", help="log what happens; show tracebacks")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_index(verbs, shared)
    _add_search(verbs, shared)
    _add_explain(verbs, shared)
    _add_evaluate(verbs, shared)
    _add_report(verbs, shared)
    _add_minibeir(verbs, shared)
    _add_train(verbs, shared)
    _add_demo(verbs, shared)
    return parser


# The parsers of the verbs


def _add_index(verbs: Any, shared: argparse.ArgumentParser) -> None:
    parts = verbs.add_parser("index", help="fill, describe, prune an index").add_subparsers(required=True, metavar="VERB")
    add = _verb(parts, shared, "add", _index_add, "add folders, pictures, texts, .jsonl files or M-BEIR pools")
    add.add_argument("paths", nargs="+", metavar="PATH", help="folder, picture, .txt, .md, or .jsonl of {id, text, image}")
    add.add_argument("--index", required=True, metavar="DIR", help="folder of the index, made if it is not there")
    add.add_argument("--batch", type=_count, default=64, metavar="N", help="items encoded and stored at a time (default: 64)")
    _add_model(add)
    info = _verb(parts, shared, "info", _index_info, "describe an index")
    info.add_argument("--index", required=True, metavar="DIR")
    info.add_argument("--json", action="store_true", help="one JSON object")
    remove = _verb(parts, shared, "rm", _index_remove, "remove items by id")
    remove.add_argument("--index", required=True, metavar="DIR")
    remove.add_argument("ids", nargs="+", metavar="ID")
    optimise = _verb(parts, shared, "optimise", _index_optimise, "build what `search --approximate` needs")
    optimise.add_argument("--index", required=True, metavar="DIR")


def _add_search(verbs: Any, shared: argparse.ArgumentParser) -> None:
    search = _verb(verbs, shared, "search", _search, "search an index by words, a picture, or both")
    search.add_argument("--index", required=True, metavar="DIR")
    _add_query(search)
    search.add_argument("--route", choices=ROUTES, default="auto", help="who decides about reasoning (default: auto, the model)")
    search.add_argument("-k", type=_count, default=10, metavar="N", help="number of hits (default: 10)")
    search.add_argument("--approximate", action="store_true", help="faster on large indexes; needs `index optimise`")
    search.add_argument(
        "--where", action="append", default=[], metavar="FIELD=VALUE", help="only items whose field has the value; repeatable"
    )
    search.add_argument("--json", action="store_true", help="one JSON object")
    _add_model(search)


def _add_explain(verbs: Any, shared: argparse.ArgumentParser) -> None:
    explain = _verb(verbs, shared, "explain", _explain, "show the prompt, its tokens, the read-out and the route of an input")
    _add_query(explain)
    explain.add_argument("--completion", metavar="TEXT", help='what the model should write before <|emb|> ("": nothing)')
    explain.add_argument("--candidate", action="store_true", help="explain it as a candidate, not as a query")
    _add_model(explain)


def _add_evaluate(verbs: Any, shared: argparse.ArgumentParser) -> None:
    evaluate = _verb(verbs, shared, "evaluate", _evaluate, "score a model on a folder in M-BEIR's layout")
    evaluate.add_argument("--data", required=True, metavar="DIR")
    evaluate.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and the outcome of each query")
    evaluate.add_argument("--route", action="append", metavar="ROUTE[,ROUTE]", help="auto, reason, direct (default: auto)")
    evaluate.add_argument("--rows", metavar="A,B", help="rows such as cirr_task7, or whole data sets such as cirr (default: all)")
    evaluate.add_argument("--limit", type=_count, metavar="N", help="only the first N queries of each row")
    evaluate.add_argument("--split", choices=("val", "test"), default="test")
    _add_model(evaluate)


def _add_report(verbs: Any, shared: argparse.ArgumentParser) -> None:
    parser = _verb(verbs, shared, "report", _report, "tables and plots from evaluation folders")
    parser.add_argument("kind", choices=REPORTS, help="steps: recall by reasoning steps; routing; routes: the cost of each")
    parser.add_argument("folders", nargs="+", metavar="[LABEL=]FOLDER[:ROUTE]", help="what `traceir evaluate --out` wrote")
    parser.add_argument("--out", metavar="FILE.md", help="write the report here too, plots beside it")


def _add_minibeir(verbs: Any, shared: argparse.ArgumentParser) -> None:
    parts = verbs.add_parser("minibeir", help="build and look at the benchmark in miniature")
    parts = parts.add_subparsers(required=True, metavar="VERB")
    build = _verb(parts, shared, "build", _minibeir_build, "write the benchmark; goes on where it was cut off")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument("--scale", choices=SCALES, default="small")
    build.add_argument("--seed", type=int, default=0, metavar="N")
    build.add_argument("--workers", type=_count, default=1, metavar="N", help="processes that draw pictures (default: 1)")
    sheet = _verb(parts, shared, "sheet", _minibeir_sheet, "draw a contact sheet of a folder's queries and answers")
    sheet.add_argument("--data", required=True, metavar="DIR")
    sheet.add_argument("--out", required=True, metavar="FILE", help="a .png file")


def _add_train(verbs: Any, shared: argparse.ArgumentParser) -> None:
    train = _verb(verbs, shared, "train", _train, "train a model; the same command again resumes")
    train.add_argument("--preset", required=True, choices=PRESETS)
    train.add_argument("--data", metavar="DIR", help="folder in M-BEIR's layout (default: the preset's)")
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: the preset's)")
    train.add_argument("--init", metavar="MODEL", help="checkpoint to start from, or random (default: the preset's)")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="override a field: steps=500, size.hidden=128, weights.cirr_task7=4; repeatable",
    )  # fmt: skip
    train.add_argument("--resume-from", type=Path, metavar="STEPDIR", help="start at another run's steps/NNNNNN")


def _add_demo(verbs: Any, shared: argparse.ArgumentParser) -> None:
    demo = _verb(verbs, shared, "demo", _demo, "search a small gallery in every way, and write a contact sheet")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="working folder (default: out/demo)")
    _add_model(demo)


def _verb(
    parts: Any, shared: argparse.ArgumentParser, name: str, run: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parts.add_parser(name, help=help, description=help, parents=[shared])
    parser.set_defaults(verb=run)
    return parser


def _add_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="FILE", help="a picture to search with")
    parser.add_argument("--text", metavar="T", help="words to search with, or what to change in the picture")
    parser.add_argument("--instruction", metavar="I", help="what kind of thing is wanted, in words")
    parser.add_argument(
        "--modality", choices=MODALITIES, metavar="image|text|image,text", help="the modality looked for (default: any)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help=f"checkpoint folder or hub id (default: ${MODEL_VARIABLE}, else the bundled one)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device, for instance cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")


def _count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


# The verbs


def _index_add(args: argparse.Namespace) -> int:
    from traceir.index import open_index
    from traceir.ingest import add

    for path in args.paths:
        if not Path(path).exists():
            raise InputError(f"{path} does not exist; give folders, pictures, text files or .jsonl files")
    encoder = _encoder(args)
    with open_index(
        args.index,
        fingerprint=encoder.fingerprint,
        prompt_version=encoder.prompt_version,
        dim=encoder.width,
        create=True,
    ) as index:
        report = add(args.paths, index, encoder, batch=args.batch, progress=_shows_progress())
        total = index.info().count
    print(
        f"added {report.added}, updated {report.updated}, skipped {report.skipped} already there, "
        f"failed {len(report.failed)}; {total} items in {args.index}"
    )
    for failure in report.failed:
        print(_line(f"failed: {failure.place}: {failure.reason}"), file=sys.stderr)
    return PARTLY if report.failed else 0


def _index_info(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index, fingerprint=None, prompt_version=None) as index:
        info = index.info()
    if args.json:
        print(json.dumps({**asdict(info), "count": info.count}))
        return 0
    counts = ", ".join(f"{info.counts[name]} {name}" for name in sorted(info.counts)) or "none"
    approximate = f"{info.cells} cells, {info.probes} visited" if info.cells else "not built (`traceir index optimise`)"
    for name, value in (
        ("index", info.uri),
        ("items", f"{info.count} ({counts})"),
        ("vectors", f"{info.dim} x {info.dtype}"),
        ("model", f"{info.fingerprint}, prompt version {info.prompt_version}"),
        ("approximate", approximate),
        ("created", info.created),
        ("size", f"{info.bytes / 2**20:.1f} MB, format {info.format}"),
    ):
        print(f"{name:12} {value}")
    return 0


def _index_remove(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index, fingerprint=None, prompt_version=None) as index:
        missing = sorted(set(args.ids) - set(index.get(args.ids)))
        removed = index.delete(args.ids)
    print(f"removed {removed}")
    if missing:
        print(f"not there: {', '.join(_line(one) for one in missing)}", file=sys.stderr)
    return PARTLY if missing else 0


def _index_optimise(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index, fingerprint=None, prompt_version=None) as index:
        index.build_approximate()
        info = index.info()
    print(f"{info.count} items in {info.cells} cells; an approximate search visits {info.probes} of each modality's")
    return 0


def _search(args: argparse.Namespace) -> int:
    from traceir.index import open_index
    from traceir.search import Searcher

    query, where = _query(args), parse_where(args.where)
    open_index(args.index, fingerprint=None, prompt_version=None).close()  # a wrong path shows before the model is loaded
    encoder = _encoder(args)
    with open_index(
        args.index, fingerprint=encoder.fingerprint, prompt_version=encoder.prompt_version, dim=encoder.width
    ) as index:
        found = Searcher(encoder, index).search(query, k=args.k, route=args.route, where=where, exact=not args.approximate)
    print(json.dumps(_result_as_json(found)) if args.json else _result_as_text(found))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from traceir.explain import describe, explain
    from traceir.items import Item
    from traceir.pictures import Picture
    from traceir.prompts import render_candidate, render_query

    if args.candidate and (args.instruction or args.modality):
        raise InputError("--candidate takes neither --instruction nor --modality; those belong to queries")
    item = Item.of(text=args.text, image=Picture.open(args.image) if args.image else None) if args.candidate else None
    query = None if args.candidate else _query(args)
    model = _encoder(args).model
    version = model.settings.prompt_version
    prompt = render_candidate(item, version) if item else render_query(query, version) if query else None
    assert prompt is not None
    print(describe(explain(model, prompt, args.completion)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from traceir.learn.report import run_report

    print(run_report(args.kind, args.folders, Path(args.out) if args.out else None))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from traceir.learn.evaluate import evaluate, table

    routes: list[Any] = list(dict.fromkeys(_split(",".join(args.route or ["auto"]))))
    if unknown := [route for route in routes if route not in ROUTES]:
        raise InputError(f"route {unknown[0]!r} is unknown; choose among {', '.join(ROUTES)}")
    if not Path(args.data).is_dir():
        raise InputError(f"data folder {args.data} does not exist; make one with `traceir minibeir build --out {args.data}`")
    rows = _split(args.rows) if args.rows is not None else None
    results = evaluate(
        _encoder(args), Path(args.data), Path(args.out), split=args.split, routes=routes, rows=rows, limit=args.limit,
        progress=_shows_progress(),
    )  # fmt: skip
    print(table(results))
    print(f"wrote {Path(args.out) / 'results.json'}", file=sys.stderr)
    return 0


def _minibeir_build(args: argparse.Namespace) -> int:
    from traceir.learn.minibeir.build import build

    print(build(Path(args.out), scale=args.scale, seed=args.seed, workers=args.workers))
    return 0


def _minibeir_sheet(args: argparse.Namespace) -> int:
    from traceir.learn.minibeir.sheet import write_sheet

    print(write_sheet(Path(args.data), Path(args.out)))
    return 0


def _train(args: argparse.Namespace) -> int:
    from traceir.learn.presets import resolve
    from traceir.learn.train import train

    threads = [f"threads={args.threads}"] if args.threads else []
    config = resolve(args.preset, data=args.data, out=args.out, init=args.init, settings=[*threads, *args.settings])
    if args.resume_from is not None and not (args.resume_from / "step.json").is_file():
        raise InputError(f"{args.resume_from} is not a step folder (it has no step.json); give RUN/steps/NNNNNN")
    print(train(config, resume_from=args.resume_from))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from traceir import demo

    model = _model_name(args)
    print(f"preparing the gallery in {args.out}", file=sys.stderr)
    pool, questions = demo.prepare(args.out, workers=min(4, os.cpu_count() or 1))
    encoder = _encoder(args, model)
    index, report = demo.fill(pool, args.out, encoder, progress=_shows_progress())
    with index:
        counts = index.info().counts
        described = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        print(f"gallery: {sum(counts.values())} items ({described}), {report.skipped} of them indexed before\n")
        answers = demo.ask(questions, encoder, index)
    for number, answer in enumerate(answers, start=1):
        print(_lines(demo.describe(number, answer)) + "\n")
    right, thought = sum(one.is_right for one in answers), sum(one.result.encoding.route == "reason" for one in answers)
    print(f"{right} of {len(answers)} queries have the right one first; {thought} were reasoned about, the others not.")
    print("The queries are the first of their row and kind (WISHES in demo.py), whatever comes of them.")
    print(f"contact sheet: {demo.write_page(answers, args.out)}")
    return 0


# What the verbs share


def parse_where(conditions: Sequence[str]) -> Filter | None:
    """FIELD=VALUE conditions, all of which must hold.

    A value matches the text and also, where it reads as one, the number, true, false or null (a missing field).
    """
    from traceir.index.filters import And, In

    parts: list[Filter] = []
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals or not name:
            raise InputError(f"--where {condition!r} is not of the form FIELD=VALUE; write for instance year=1999")
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            read = value
        plain = read is None or isinstance(read, bool | int | float)
        parts.append(In(name, (value, read) if plain else (value,)))
    return And(tuple(parts)) if parts else None


def _query(args: argparse.Namespace) -> Query:
    from traceir.items import Query
    from traceir.pictures import Picture

    if not (args.text or args.image or args.instruction):
        raise InputError("there is nothing to search with; give --text, --image, or both")
    image = Picture.open(args.image) if args.image else None
    if image is not None and not Path(args.image).is_file():
        raise InputError(f"picture {args.image} does not exist; give the path of a picture file")
    return Query.of(text=args.text, image=image, instruction=args.instruction, target=args.modality)


def _model_name(args: argparse.Namespace) -> str:
    return str(args.model or bundled_model())


def _encoder(args: argparse.Namespace, model: str | None = None) -> Encoder:
    """The encoder of `--model`; transformers keeps quiet unless asked."""
    name = model or _model_name(args)
    import torch
    from transformers.utils import logging as transformers_logging

    from traceir.encoder import Encoder
    from traceir.model import load

    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.verbose:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise InputError(f"--device {args.device!r} is unknown to torch; write for instance cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; leave --device out to run on the CPU")
    return Encoder(load(name, device=str(device), dtype=getattr(torch, args.dtype)))


def _result_as_json(found: SearchResult) -> dict[str, Any]:
    encoding = found.encoding
    return {
        "route": encoding.route,
        "reasoning": encoding.reasoning,
        "tokens": encoding.tokens,
        "emb_probability": encoding.emb_probability,
        "truncated": encoding.truncated,
        "seconds": asdict(found.seconds),
        "hits": [{**{name: getattr(hit, name) for name in _HIT_FIELDS}, "fields": dict(hit.fields)} for hit in found.hits],
    }


_HIT_FIELDS: Final = ("rank", "score", "id", "modality", "text", "image")


def _result_as_text(found: SearchResult) -> str:
    from traceir.gallery import cost, reasoning_steps

    encoding = found.encoding
    spent = 1000 * (found.seconds.encode + found.seconds.search)
    lines = [f"route      {encoding.route} ({cost(encoding)}, {spent:.0f} ms)"]
    for place, step in enumerate(reasoning_steps(encoding.reasoning)):
        lines.append(f"{'' if place else 'reasoning':9}  {step}")
    lines += [_hit_as_text(hit) for hit in found.hits] or ["no hits"]
    return "\n".join(_line(line) for line in lines)


def _hit_as_text(hit: Hit) -> str:
    words = hit.text or ""
    shown = words if len(words) <= 160 else words[:159] + "…"
    return f"{hit.rank:3d}  {hit.score:.4f}  " + "  ".join(part for part in (hit.id, hit.image or "", shown) if part)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _line(text: str) -> str:
    """One line without control characters, so that a stored text can neither break the layout nor steer a terminal."""
    return _CONTROL.sub(" ", text)


def _lines(text: str) -> str:
    return "\n".join(_line(line) for line in text.split("\n"))


def _shows_progress() -> bool:
    return sys.stderr.isatty()


def _soften(stream: Any) -> None:
    """Characters that the terminal's encoding lacks are replaced, not fatal."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    print(f"traceir: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
