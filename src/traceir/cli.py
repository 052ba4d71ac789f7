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

from traceir.errors import InputError, ModelError, TraceError
from traceir.parser import MODEL_VARIABLE, ROUTES, assemble

if TYPE_CHECKING:
    from traceir.encoder import Encoder
    from traceir.index.filters import Filter
    from traceir.items import Hit, Query
    from traceir.search import SearchResult

PARTLY: Final = 1
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
    return assemble(
        {
            "index add": _index_add,
            "index info": _index_info,
            "index rm": _index_remove,
            "index optimise": _index_optimise,
            "search": _search,
            "explain": _explain,
            "evaluate": _evaluate,
            "unseen": _unseen,
            "faithfulness": _faithfulness,
            "report": _report,
            "compare": _compare,
            "minibeir build": _minibeir_build,
            "minibeir sheet": _minibeir_sheet,
            "minibeir unseen": _minibeir_unseen,
            "train": _train,
            "ablate": _ablate,
            "merge": _merge,
            "push": _push,
            "demo": _demo,
        }
    )


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

    if args.candidate and (args.instruction or args.modality):
        raise InputError("--candidate takes neither --instruction nor --modality; those belong to queries")
    item = Item.of(text=args.text, image=Picture.open(args.image) if args.image else None) if args.candidate else None
    query = None if args.candidate else _query(args)
    model = _encoder(args).model
    content = item or query
    assert content is not None
    print(describe(explain(model, model.prompt(content), args.completion)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from traceir.learn.report import named_runs, run_report

    if args.kind == "scoreboard":
        from traceir.learn.scoreboard import write_scoreboard

        if not args.out:
            raise InputError("report scoreboard writes a page and a table too; name the Markdown file with --out")
        print(write_scoreboard(args.folders, Path(args.out)))
        return 0
    if args.kind == "examples":
        from traceir.learn.examples import write_examples

        if not args.out or not args.data or len(args.folders) != 1:
            raise InputError(
                "report examples takes one evaluation, the folder it was made of (--data), and --out DIR for the page"
            )
        ((folder, route),) = named_runs(args.folders).values()
        print(write_examples(folder, Path(args.data), Path(args.out), route=route))
        return 0
    print(run_report(args.kind, args.folders, Path(args.out) if args.out else None))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from traceir.learn.compare import compare

    print(compare(args.first, args.second, k=args.k, out=Path(args.out) if args.out else None, shown=args.shown))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from traceir.learn.embeddings import shard_from_environment
    from traceir.learn.evaluate import evaluate, rehearse
    from traceir.learn.judged import table

    routes = _routes(args)
    if not Path(args.data).is_dir():
        raise InputError(f"data folder {args.data} does not exist; make one with `traceir minibeir build --out {args.data}`")
    rows = _split(args.rows) if args.rows is not None else None
    data, out = Path(args.data), Path(args.out)
    if args.dry_run:
        print(rehearse(_encoder(args), data, split=args.split, routes=routes, rows=rows, limit=args.limit))
        return 0
    pools: list[Any] = ["local", "global"] if args.pool == "both" else [args.pool]
    results = evaluate(
        _encoder(args), data, out, split=args.split, routes=routes, pools=pools, prompt=args.prompt, seed=args.seed, rows=rows,
        limit=args.limit, cache=Path(args.cache) if args.cache else None,
        shard=_shard(args.shard) if args.shard else shard_from_environment(), on_error=args.on_error, progress=_shows_progress(),
    )  # fmt: skip
    if results is None:
        print("this share is encoded; what others encode is not all there yet, the last to finish scores", file=sys.stderr)
        return 0
    print(table(results))
    print(f"wrote {Path(args.out) / 'results.json'}", file=sys.stderr)
    return 0


def _unseen(args: argparse.Namespace) -> int:
    from traceir.learn.unseen.run import evaluate_unseen, rehearse_unseen, submit_circo, table

    columns = _split(args.columns) if args.columns is not None else None
    if args.dry_run:
        print(rehearse_unseen(Path(args.data), columns))
        return 0
    data, out, encoder = Path(args.data), Path(args.out), _encoder(args)
    cache = Path(args.cache) if args.cache else out / "embeddings"
    if args.circo_submission:
        print(submit_circo(encoder, data, Path(args.circo_submission), cache=cache, progress=_shows_progress()))
        return 0
    results = evaluate_unseen(
        encoder, data, out, routes=_routes(args), columns=columns, missing=args.on_error, cache=cache, progress=_shows_progress()
    )
    print(table(results))
    print(f"wrote {out / 'results.json'}", file=sys.stderr)
    return 0


def _routes(args: argparse.Namespace) -> list[Any]:
    routes: list[Any] = list(dict.fromkeys(_split(",".join(args.route or ["auto"]))))
    if unknown := [route for route in routes if route not in ROUTES]:
        raise InputError(f"route {unknown[0]!r} is unknown; choose among {', '.join(ROUTES)}")
    return routes


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal():
        raise InputError(f"--shard {text!r} is not of the form I/N; write 0/4 for the first of four")
    return int(number), int(count)


def _faithfulness(args: argparse.Namespace) -> int:
    from traceir.learn.faithful import probe, table

    rows = _split(args.rows) if args.rows is not None else None
    encoder = _encoder(args)
    found = probe(
        encoder, Path(args.data), Path(args.out), split=args.split, rows=rows, limit=args.limit, progress=_shows_progress()
    )
    print(table(found, encoder.fingerprint))
    return 0


def _minibeir_build(args: argparse.Namespace) -> int:
    from traceir.learn.minibeir.build import build

    print(build(Path(args.out), scale=args.scale, seed=args.seed, workers=args.workers))
    return 0


def _minibeir_unseen(args: argparse.Namespace) -> int:
    from traceir.learn.minibeir.unseen.build import build_unseen

    print(build_unseen(Path(args.out), scale=args.scale, seed=args.seed, progress=_shows_progress()))
    return 0


def _minibeir_sheet(args: argparse.Namespace) -> int:
    from traceir.learn.minibeir.sheet import write_sheet

    print(write_sheet(Path(args.data), Path(args.out)))
    return 0


def _train(args: argparse.Namespace) -> int:
    from traceir.learn.presets import resolve
    from traceir.learn.train import train

    if args.init is None and args.data is None:
        _train_before(args.preset, args.threads)
    threads = [f"threads={args.threads}"] if args.threads else []
    config = resolve(args.preset, data=args.data, out=args.out, init=args.init, settings=[*threads, *args.settings])
    if args.resume_from is not None and not (args.resume_from / "step.json").is_file():
        raise InputError(f"{args.resume_from} is not a step folder (it has no step.json); give RUN/steps/NNNNNN")
    print(train(config, resume_from=args.resume_from))
    return 0


def _train_before(preset: str, threads: int | None) -> None:
    """Trains the presets whose checkpoints this one starts from, where they are not there."""
    from traceir.learn.presets import resolve, stages_before
    from traceir.learn.train import train

    for stage in stages_before(preset):
        print(f"preset {preset} starts from {stage}, which is trained first", file=sys.stderr)
        train(resolve(stage, settings=[f"threads={threads}"] if threads else []))


def _ablate(args: argparse.Namespace) -> int:
    from traceir.learn.ablate import ablate, list_tables
    from traceir.learn.ablate_report import write_report
    from traceir.learn.ablations import choose_tables
    from traceir.learn.presets import resolve

    if not all(part.isdecimal() for part in _split(args.seeds)):
        raise InputError(f"--seeds {args.seeds!r} is not a list of whole numbers; write 0,1,2")
    tables, seeds = choose_tables(_split(args.tables)), [int(part) for part in _split(args.seeds)]
    if args.list:
        print(list_tables(tables, seeds))
        return 0
    if not args.out:
        raise InputError("name the folder of the runs with --out")
    if args.report_only and not args.report:
        raise InputError("--report-only needs the folder to write to; name it with --report")
    out, code = Path(args.out), 0
    if not args.report_only:
        if args.data is None:
            _train_before("ablation", args.threads)
        threads = [f"threads={args.threads}"] if args.threads else []
        base = resolve("ablation", data=args.data, out=args.out, settings=[*threads, *args.settings])
        outcome = ablate(tables, out, base, seeds=seeds, jobs=args.jobs)
        print(f"{outcome.done} of {outcome.planned} runs are done, {len(outcome.skipped)} variants skipped")
        for name, reason in outcome.failed.items():
            print(_line(f"failed: {name}: {reason}"), file=sys.stderr)
        code = PARTLY if outcome.failed else 0
    if args.report:
        data = f" --data {args.data}" if args.data else ""
        settings = "".join(f" --set {one}" for one in args.settings)
        command = f"traceir ablate {args.tables} --out {args.out} --seeds {args.seeds}{data}{settings}"
        print(write_report(out, Path(args.report), tables=tables, command=command))
    return code


def _merge(args: argparse.Namespace) -> int:
    import torch

    from traceir.adapter import merge

    print(merge(args.adapter, args.out, dtype=getattr(torch, args.dtype)))
    return 0


def _push(args: argparse.Namespace) -> int:
    from traceir.learn.card import push, write_card

    readme = args.folder / "README.md"
    if args.run or args.evaluation or args.licence or not readme.is_file():
        write_card(args.folder, run=args.run, evaluations=args.evaluation, repo=args.repo, licence=args.licence)
        print(f"wrote {readme}", file=sys.stderr)
    print(push(args.folder, args.repo, private=args.private, dry_run=args.dry_run, revision=args.revision))
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
    return Encoder(load(name, device=str(device), dtype=getattr(torch, args.dtype), profile=args.profile))


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
