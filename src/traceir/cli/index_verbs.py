"""What `traceir index ...` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from traceir import ingest
from traceir.background import choose_queries
from traceir.checkpoint import plain_name
from traceir.cli.terminal import (
    PARTLY,
    check_model_options,
    filled_by,
    is_endpoint,
    model_name,
    one_line,
    open_encoder,
    say,
    shows_progress,
)
from traceir.errors import InputError
from traceir.index import IndexInfo, open_index
from traceir.index import copy as index_copy
from traceir.index.store import ModelIdentity
from traceir.ingest_cluster import add_on_ray, describe_encoder
from traceir.items import MODALITIES
from traceir.ray_session import Share, on_ray
from traceir.records import Failure
from traceir.search import Searcher
from traceir.world import World


def add(args: argparse.Namespace) -> int:
    if nothing := ingest.nothing_below(args.paths):
        _print_failures(nothing)
        raise InputError("nothing was added: none of what is named can be read; see above")
    check_model_options(args)
    report, info = _add_here(args) if args.workers is None else _add_on_ray(args)
    print(
        f"added {report.added}, updated {report.updated}, skipped {report.skipped} already there, "
        f"failed {len(report.failed)}; {info.count} items in {info.uri}"
    )
    locations: dict[str, list[str]] = {}
    for note in report.notes:
        locations.setdefault(note.what, []).append(note.location)
    for what, own in locations.items():
        say(f"{own[0] if len(own) == 1 else f'{own[0]} and {len(own) - 1} more'}: {what}")
    _print_failures(report.failed)
    return PARTLY if report.failed else 0


def _add_here(args: argparse.Namespace) -> tuple[ingest.AddReport, IndexInfo]:
    encoder = open_encoder(args)
    _say_if_unknown(encoder, args.paths)
    with open_index(args.index, encoder, create=True, dtype=args.store) as index:
        return ingest.add(args.paths, index, encoder, batch=args.batch, progress=shows_progress()), index.info()


def _add_on_ray(args: argparse.Namespace) -> tuple[ingest.AddReport, IndexInfo]:
    """What `index add --workers` does. A worker takes --threads CPUs (default: 1), and one GPU with --device cuda."""
    if args.engine is None and args.device.startswith("cuda:"):
        raise InputError(f"--device {args.device}: Ray gives each worker a GPU of its own; write --device cuda")
    share = Share(cpus=args.threads or 1, gpus=1 if args.engine is None and args.device == "cuda" else 0)
    make_encoder = partial(open_encoder, encoder_anywhere(args), known=filled_by(args))
    with on_ray(args.workers, share):
        identity = describe_encoder(make_encoder, share)
        _say_if_unknown(identity, args.paths)
        make_encoder = partial(make_encoder, known=identity.fingerprint)
        workers, shown = args.workers, shows_progress()
        with open_index(args.index, identity, create=True, dtype=args.store) as index:
            report = add_on_ray(args.paths, index, make_encoder, workers=workers, batch=args.batch, share=share, progress=shown)
            return report, index.info()


def _say_if_unknown(encoder: ModelIdentity, paths: Sequence[str]) -> None:
    """The notice of the encoder's world where the first of what lies below the paths is not of it."""
    world: World | None = getattr(encoder, "world", None)
    if world is not None and not all(map(world.knows, ingest.first_items(paths))):
        say(world.notice)


def _print_failures(failures: Sequence[Failure]) -> None:
    for failure in failures:
        print(one_line(f"failed: {failure.location}: {failure.reason}"), file=sys.stderr)


def encoder_anywhere(args: argparse.Namespace) -> argparse.Namespace:
    """What `open_encoder` reads of the arguments, with paths that do not depend on the folder it is called in."""
    names = ("device", "dtype", "dim", "threads", "verbose", "engine")
    # The model of an endpoint is a name there, whatever folder has the same one here.
    model = args.model if is_endpoint(args) else _absolute(model_name(args))
    return argparse.Namespace(model=model, profile=_absolute(args.profile), **{name: getattr(args, name) for name in names})


def _absolute(path: str | None) -> str | None:
    """A path, which may have `st:` before it, as an absolute one; anything else as it is."""
    if path is None or not Path(plain := plain_name(path)).exists():
        return path
    return f"{path.removesuffix(plain)}{Path(plain).absolute()}"


def info(args: argparse.Namespace) -> int:
    with open_index(args.index) as index:
        info = index.info()
    if args.json:
        print(json.dumps({**asdict(info), "count": info.count}))
        return 0
    counts = ", ".join(f"{info.counts[name]} {name}" for name in sorted(info.counts)) or "none"
    queries = ", ".join(f"{count} {name}" for name, count in info.background.items())
    calibrated = f"calibrated with {queries} queries ({info.background_source})"
    for name, value in (
        ("index", info.uri),
        ("items", f"{info.count} ({counts})"),
        ("vectors", f"{info.dim} x {info.dtype}"),
        ("model", f"{info.fingerprint}, prompt version {info.prompt_version}"),
        (
            "approximate",
            f"{info.cells} IVF lists, {info.probes} visited" if info.cells else "not built (`traceir index build-ann`)",
        ),
        ("cut-off", calibrated if queries else "not calibrated (`traceir index calibrate`)"),
        ("created", info.created),
        ("size", f"{info.bytes / 2**20:.1f} MB, format {info.format}"),
    ):
        print(f"{name:12} {value}")
    return 0


def remove(args: argparse.Namespace) -> int:
    with open_index(args.index) as index:
        missing = sorted(set(args.ids) - set(index.get(args.ids)))
        print(f"removed {index.delete(args.ids)}")
    if missing:
        print(one_line(f"not there: {', '.join(missing)}"), file=sys.stderr)
    return PARTLY if missing else 0


def build_ann(args: argparse.Namespace) -> int:
    with open_index(args.index) as index:
        index.build_ann()
        info = index.info()
    print(f"{info.count} items in {info.cells} IVF lists; an approximate search visits {info.probes} of each modality's")
    return 0


def calibrate(args: argparse.Namespace) -> int:
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


def copy(args: argparse.Namespace) -> int:
    with open_index(args.source) as source:
        info = source.info()
        identity = {"fingerprint": info.fingerprint, "prompt_version": info.prompt_version}
        with open_index(args.target, dim=info.dim, create=True, dtype=args.store, **identity) as target:
            written = index_copy.copy(source, target, batch=args.batch, progress=shows_progress())
            made = target.info()
    print(f"copied {written}, skipped {info.count - written} already there; {made.count} items in {made.uri}")
    return 0
