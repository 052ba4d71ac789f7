"""The command `traceir`: every verb of the project. Data go to stdout, progress and messages to stderr.

Each verb imports what it needs when it runs, so that `traceir --help` is instant. Exit codes: 0 done, 1 done in part or an
unexpected error, 2 an error that names its remedy, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from traceir.checkpoint import plain_name
from traceir.cli import cot_verbs as reasoning
from traceir.cli import learn_verbs as verbs
from traceir.cli import serve_verbs as serving
from traceir.cli.parser import assemble
from traceir.cli.terminal import (
    PARTLY,
    check_model_options,
    clean_lines,
    filled_by,
    is_endpoint,
    load_encoder,
    load_own_encoder,
    model_name,
    one_line,
    open_encoder,
    say,
    shows_progress,
)
from traceir.errors import InputError, TraceError

if TYPE_CHECKING:
    from traceir.index.filters import Filter
    from traceir.index.store import IndexInfo, Maker
    from traceir.ingest import AddReport
    from traceir.items import Hit, Query
    from traceir.search import SearchResult
    from traceir.sources import Failure, Note
    from traceir.world import World


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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    return assemble(
        {
            "index add": _index_add,
            "index info": _index_info,
            "index rm": _index_remove,
            "index build-ann": _index_build_ann,
            "index optimise": _index_optimise,
            "index calibrate": _index_calibrate,
            "index copy": _index_copy,
            "search": _search,
            "explain": _explain,
            "models": _models,
            "serve": serving.serve,
            "keys add": serving.keys_add,
            "keys list": serving.keys_list,
            "keys revoke": serving.keys_revoke,
            "evaluate": verbs.evaluate,
            "unseen": verbs.unseen,
            "mteb": verbs.mteb,
            "faithfulness": verbs.faithfulness,
            "report": verbs.report,
            "compare": verbs.compare,
            "minibeir build": verbs.minibeir_build,
            "minibeir sheet": verbs.minibeir_sheet,
            "minibeir unseen": verbs.minibeir_unseen,
            "reasoning build": reasoning.build,
            "reasoning assemble": reasoning.assemble,
            "reasoning import": reasoning.import_answers,
            "reasoning review": reasoning.review,
            "reasoning report": reasoning.report,
            "reasoning push": reasoning.push,
            "reasoning teacher": reasoning.teacher,
            "train": verbs.train,
            "ablate": verbs.ablate,
            "merge": verbs.merge,
            "push": verbs.push,
            "demo": _demo,
        }
    )


# The verbs


def _index_add(args: argparse.Namespace) -> int:
    from traceir.index import open_index
    from traceir.ingest import add, nothing_below

    if nothing := nothing_below(args.paths):
        _tell_failures(nothing)
        raise InputError("nothing was added: none of what is named can be read; see above")
    check_model_options(args)
    if args.workers is None:
        encoder = open_encoder(args)
        say(_notice_of_paths(encoder, args.paths))
        with open_index(args.index, encoder, create=True, dtype=args.store) as index:
            report = add(args.paths, index, encoder, batch=args.batch, progress=shows_progress())
            info = index.info()
    else:
        report, info = _add_on_ray(args)
    print(
        f"added {report.added}, updated {report.updated}, skipped {report.skipped} already there, "
        f"failed {len(report.failed)}; {info.count} items in {info.uri}"
    )
    _tell_notes(report.notes)
    _tell_failures(report.failed)
    return PARTLY if report.failed else 0


def _notice_of_paths(encoder: Maker, paths: Sequence[str]) -> str | None:
    """What is told where the first of what lies below the paths is not of the encoder's world."""
    from traceir.ingest import first_items

    world: World | None = getattr(encoder, "world", None)
    if world is None or all(map(world.knows, first_items(paths))):
        return None
    return world.notice


def _tell_failures(failures: Sequence[Failure]) -> None:
    for failure in failures:
        print(one_line(f"failed: {failure.place}: {failure.reason}"), file=sys.stderr)


def _tell_notes(notes: Sequence[Note]) -> None:
    """Notes that say the same in one line, with their number and the first of them."""
    places: dict[str, list[str]] = {}
    for note in notes:
        places.setdefault(note.what, []).append(note.place)
    for what, own in places.items():
        where = own[0] if len(own) == 1 else f"{own[0]} and {len(own) - 1} more"
        print(one_line(f"note: {where}: {what}"), file=sys.stderr)


def _add_on_ray(args: argparse.Namespace) -> tuple[AddReport, IndexInfo]:
    """What `index add --workers` does. A worker takes --threads CPUs (default: 1), and one GPU with --device cuda."""
    from traceir.index import open_index
    from traceir.ingest_cluster import add_on_ray, describe_encoder
    from traceir.ray_session import Share, on_ray

    if args.engine is None and args.device.startswith("cuda:"):
        raise InputError(f"--device {args.device}: Ray gives each worker a GPU of its own; write --device cuda")
    share = Share(cpus=args.threads or 1, gpus=1 if args.engine is None and args.device == "cuda" else 0)
    make_encoder = partial(open_encoder, _encoder_anywhere(args), known=filled_by(args))
    with on_ray(args.workers, share):
        maker = describe_encoder(make_encoder, share)
        say(_notice_of_paths(maker, args.paths))
        with open_index(args.index, maker, create=True, dtype=args.store) as index:
            report = add_on_ray(
                args.paths, index, partial(make_encoder, known=maker.fingerprint),
                workers=args.workers, batch=args.batch, share=share, progress=shows_progress(),
            )  # fmt: skip
            return report, index.info()


def _encoder_anywhere(args: argparse.Namespace) -> argparse.Namespace:
    """What `open_encoder` reads of the arguments, with paths that do not depend on the folder it is called in."""
    named = is_endpoint(args)  # then the model is a name there, whatever folder has the same one here
    paths = {"model": None if named else model_name(args), "profile": args.profile}
    whole = {name: _anywhere(path) for name, path in paths.items()}
    plain = {name: getattr(args, name) for name in ("device", "dtype", "dim", "threads", "verbose", "engine")}
    return argparse.Namespace(**{**whole, **plain, **({"model": args.model} if named else {})})


def _anywhere(path: str | None) -> str | None:
    """A path, which may have `st:` before it, as an absolute one; anything else as it is."""
    if path is None or not Path(plain := plain_name(path)).exists():
        return path
    return f"{path.removesuffix(plain)}{Path(plain).absolute()}"


def _index_info(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index) as index:
        info = index.info()
    if args.json:
        print(json.dumps({**asdict(info), "count": info.count}))
        return 0
    counts = ", ".join(f"{info.counts[name]} {name}" for name in sorted(info.counts)) or "none"
    approximate = f"{info.cells} IVF lists, {info.probes} visited" if info.cells else "not built (`traceir index build-ann`)"
    queries = ", ".join(f"{count} {name}" for name, count in info.background.items())
    background = f"calibrated with {queries} queries ({info.background_source})" if queries else _NOT_CALIBRATED
    for name, value in (
        ("index", info.uri),
        ("items", f"{info.count} ({counts})"),
        ("vectors", f"{info.dim} x {info.dtype}"),
        ("model", f"{info.fingerprint}, prompt version {info.prompt_version}"),
        ("approximate", approximate),
        ("cut-off", background),
        ("created", info.created),
        ("size", f"{info.bytes / 2**20:.1f} MB, format {info.format}"),
    ):
        print(f"{name:12} {value}")
    return 0


def _index_remove(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index) as index:
        missing = sorted(set(args.ids) - set(index.get(args.ids)))
        removed = index.delete(args.ids)
    print(f"removed {removed}")
    if missing:
        print(f"not there: {', '.join(one_line(one) for one in missing)}", file=sys.stderr)
    return PARTLY if missing else 0


def _index_optimise(args: argparse.Namespace) -> int:
    print("`index optimise` is now called `index build-ann`", file=sys.stderr)
    return _index_build_ann(args)


def _index_build_ann(args: argparse.Namespace) -> int:
    from traceir.index import open_index

    with open_index(args.index) as index:
        index.build_approximate()
        info = index.info()
    print(f"{info.count} items in {info.cells} IVF lists; an approximate search visits {info.probes} of each modality's")
    return 0


_NOT_CALIBRATED: Final = "not calibrated (`traceir index calibrate`)"


def _index_calibrate(args: argparse.Namespace) -> int:
    from traceir.background import choose_queries
    from traceir.index import open_index
    from traceir.items import MODALITIES
    from traceir.search import Searcher

    check_model_options(args)
    queries, source = choose_queries(args.background, Path(model_name(args)), count=args.count, instruction=args.instruction)
    open_index(args.index).close()  # a wrong path shows before the model is loaded
    encoder = open_encoder(args)
    with open_index(args.index, encoder) as index:
        searcher = Searcher(encoder, index)
        made = searcher.calibrate(queries, source, progress=shows_progress())
        print(f"calibrated with {', '.join(f'{count} {name}' for name, count in made.counts.items())} queries ({source})")
        for query, count in made.counts.items():
            rate = max(0.01, 1 / (count + 1))
            for target in MODALITIES:
                for least in searcher.calibration.thresholds(query, target, rate).values():
                    print(f"at 1 in {1 / rate:.0f}, a query of {query} finds {target} that scores more than {least:.4f}")
    return 0


def _index_copy(args: argparse.Namespace) -> int:
    from traceir.index import open_index
    from traceir.index.copy import copy

    with open_index(args.source) as source:
        info = source.info()
        with open_index(
            args.target,
            fingerprint=info.fingerprint,
            prompt_version=info.prompt_version,
            dim=info.dim,
            create=True,
            dtype=args.store,
        ) as target:
            written = copy(source, target, batch=args.batch, progress=shows_progress())
            made = target.info()
    print(f"copied {written}, skipped {info.count - written} already there; {made.count} items in {made.uri}")
    return 0


def _search(args: argparse.Namespace) -> int:
    from traceir.cutoff import check_rate
    from traceir.index import open_index
    from traceir.search import Searcher

    query, where = _query(args, _text(args)), parse_where(args.where)
    if args.cutoff is not None:
        check_rate(args.cutoff)
    check_model_options(args)
    open_index(args.index).close()  # a wrong path shows before the model is loaded
    from traceir.world import notice

    encoder = open_encoder(args)
    with open_index(args.index, encoder) as index:
        found = Searcher(encoder, index).search(
            query, k=args.k, route=args.route, where=where, exact=not args.approximate, cutoff=args.cutoff
        )
    say(note := notice(encoder, query, found.hits))
    print(json.dumps(_result_as_json(found, note)) if args.json else _result_as_text(found))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from traceir.images import ImageInput
    from traceir.items import Item

    if args.candidate and (args.instruction or args.modality):
        raise InputError("--candidate takes neither --instruction nor --modality; those belong to queries")
    text = _text(args)
    item = Item.of(text=text, image=ImageInput.open(args.image) if args.image else None) if args.candidate else None
    query = None if args.candidate else _query(args, text)
    check_model_options(args)
    from traceir.explain import describe, explain

    model = load_own_encoder(args).model
    content = item or query
    assert content is not None
    print(describe(explain(model, model.prompt(content), args.completion)))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from traceir.lab import demo

    check_model_options(args)
    print(f"preparing the gallery in {args.out}", file=sys.stderr)
    pool, questions = demo.prepare(args.out)
    encoder = load_encoder(args)
    index, report = demo.fill(pool, args.out, encoder, progress=shows_progress())
    with index:
        counts, place = index.info().counts, index.info().uri
        described = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        print(f"gallery: {sum(counts.values())} items ({described}), {report.skipped} of them indexed before\n")
        answers = demo.ask(questions, encoder, index)
    for number, answer in enumerate(answers, start=1):
        print(clean_lines(demo.describe(number, answer)) + "\n")
    right, thought = sum(one.is_right for one in answers), sum(one.result.encoding.route == "reason" for one in answers)
    print(f"{right} of {len(answers)} queries have the right one first; {thought} were reasoned about, the others not.")
    print("The queries are the first of their row and kind (WISHES in demo.py), whatever comes of them.")
    print(f"contact sheet: {demo.write_page(answers, args.out)}")
    if args.serve == "yes" or (args.serve == "terminal" and sys.stdout.isatty()):
        return serving.serve_demo(place, encoder)
    print(f"search it on a page: traceir serve --index {place} --open")
    return 0


# What the verbs share


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


def _models(args: argparse.Namespace) -> int:
    from traceir.catalogue import KNOWN, described

    print(json.dumps([one.as_json() for one in KNOWN], indent=2) if args.json else described())
    return 0


def _text(args: argparse.Namespace) -> str | None:
    """The words of an input, given as arguments of their own or by --text."""
    words = " ".join(args.words)
    if words and args.text is not None:
        raise InputError(f"the text is given twice, as {words[:80]!r} and by --text; leave out one of them")
    return words or args.text


def _query(args: argparse.Namespace, text: str | None) -> Query:
    from traceir.images import ImageInput
    from traceir.items import Query

    if not (text or args.image or args.instruction):
        raise InputError("there is nothing to search with; give a text, --image, or both")
    image = ImageInput.open(args.image) if args.image else None
    if image is not None and not Path(args.image).is_file():
        raise InputError(f"picture {args.image} does not exist; give the path of a picture file")
    return Query.of(text=text, image=image, instruction=args.instruction, target=args.modality)


def _result_as_json(found: SearchResult, note: str | None) -> dict[str, Any]:
    encoding = found.encoding
    return {
        "note": note,
        "route": encoding.route,
        "reasoning": encoding.reasoning,
        "tokens": encoding.tokens,
        "emb_probability": encoding.emb_probability,
        "truncated": encoding.truncated,
        "cut": encoding.cut,
        "seconds": asdict(found.seconds),
        "cutoff": None if found.cut is None else asdict(found.cut),
        "hits": [{**{name: getattr(hit, name) for name in _HIT_FIELDS}, "fields": dict(hit.fields)} for hit in found.hits],
    }


_HIT_FIELDS: Final = ("rank", "score", "id", "modality", "text", "image")


def _result_as_text(found: SearchResult) -> str:
    from traceir.lab.gallery import cost, reasoning_steps

    encoding = found.encoding
    spent = 1000 * (found.seconds.encode + found.seconds.search)
    lines = [f"route      {encoding.route} ({cost(encoding)}, {spent:.0f} ms)"]
    for place, step in enumerate(reasoning_steps(encoding.reasoning)):
        lines.append(f"{'' if place else 'reasoning':9}  {step}")
    lines += [_hit_as_text(hit) for hit in found.hits] or [_nothing(found)]
    return "\n".join(one_line(line) for line in lines)


def _nothing(found: SearchResult) -> str:
    if found.cut is None or found.cut.best is None:
        return "no hits"
    return f"nothing found above the cut-off of {found.cut.rate:g} (the best scored {found.cut.best:.4f})"


def _hit_as_text(hit: Hit) -> str:
    words = hit.text or ""
    shown = words if len(words) <= 160 else words[:159] + "…"
    return f"{hit.rank:3d}  {hit.score:.4f}  " + "  ".join(part for part in (hit.id, hit.image or "", shown) if part)


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
