"""What `traceir index ...` does."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

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
from traceir.collection import ingest
from traceir.collection.ingest_cluster import add_on_ray, describe_encoder
from traceir.collection.records import Failure
from traceir.collection.roots import Roots
from traceir.collection.sources import FILE_FIELD, STAT_FIELD
from traceir.collection.sync import SyncReport, below, check_folders
from traceir.collection.sync import sync as sync_index
from traceir.collection.watch import watch
from traceir.errors import InputError, StoreError, TraceError
from traceir.index import And, Filter, Index, IndexInfo, Stored, open_index
from traceir.index import copy as index_copy
from traceir.index.filter_text import as_filter
from traceir.index.filters import Glob, Or
from traceir.index.pages import position_of
from traceir.index.store import ModelIdentity, Opening
from traceir.items import MODALITIES, Encoding, Item, Query, Route
from traceir.media.part import file_of
from traceir.ray_session import Share, on_ray
from traceir.retrieval.search import EncoderLike, Searcher
from traceir.world import World

_AT_ONCE: Final = 1000


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
    _print_notes(report)
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


def _print_notes(report: ingest.AddReport) -> None:
    locations: dict[str, list[str]] = {}
    for note in report.notes:
        locations.setdefault(note.what, []).append(note.location)
    for what, own in locations.items():
        say(f"{own[0] if len(own) == 1 else f'{own[0]} and {len(own) - 1} more'}: {what}")
    _print_failures(report.failed)


def _print_failures(failures: Sequence[Failure]) -> None:
    for failure in failures:
        print(one_line(f"failed: {failure.location}: {failure.reason}"), file=sys.stderr)


class LateEncoder:
    """The encoder of the options, loaded when something is first encoded; StoreError where another one filled the index."""

    def __init__(self, args: argparse.Namespace, info: IndexInfo) -> None:
        self.args, self.info = args, info
        self.fingerprint, self.prompt_version, self.width = info.fingerprint, info.prompt_version, info.dim

    @cached_property
    def loaded(self) -> EncoderLike:
        encoder = open_encoder(self.args)
        self.info.check(self.info.uri, Opening(encoder.fingerprint, encoder.prompt_version, encoder.width))
        return encoder

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return self.loaded.encode_items(items)

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        return self.loaded.encode_queries(queries, route=route)


def sync(args: argparse.Namespace) -> int:
    check_model_options(args)
    check_folders(() if args.allow_empty else args.folders)
    encoder = _encoder_of_index(args)
    options = {"batch": args.batch, "progress": shows_progress()}
    with open_index(args.index, encoder, create=True, dtype=args.store) as index:
        report = sync_index(args.folders, index, encoder, prefix=args.prefix, allow_empty=args.allow_empty, **options)
        _print_sync(report)
        _print_notes(report)
        if args.watch or args.watch_every:
            return _watch(args, index, encoder)
    return PARTLY if report.failed else 0


def _encoder_of_index(args: argparse.Namespace) -> EncoderLike:
    """The encoder of the options, which is not loaded yet where there is an index that says which one it should be."""
    try:
        with open_index(args.index) as index:
            return LateEncoder(args, index.info())
    except StoreError:
        if not args.folders:
            raise
    encoder = open_encoder(args)
    _say_if_unknown(encoder, args.folders)
    return encoder


def _watch(args: argparse.Namespace, index: Index, encoder: EncoderLike) -> int:
    """Until SIGTERM or Ctrl-C, which end it well."""

    def tell(news: SyncReport | TraceError) -> None:
        now = f"{datetime.datetime.now():%H:%M:%S}"
        if isinstance(news, TraceError):
            print(one_line(f"{now} {news}; it is tried again"), file=sys.stderr)
        elif news.added or news.updated or news.renamed or news.removed or news.failed:
            _print_sync(news, f"{now} ")
            _print_failures(news.failed)

    folders = [os.path.realpath(folder) for folder in args.folders] or [root.folder for root in Roots.read(index).all]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"watching {', '.join(folders)}; Ctrl-C ends it", flush=True)
        watch(folders, index, encoder, tell=tell, stop=threading.Event(), batch=args.batch, every=args.watch_every)
    except KeyboardInterrupt:
        print("ended")
    return 0


def _print_sync(report: SyncReport, before: str = "") -> None:
    counts = f"added {report.added}, updated {report.updated}, renamed {report.renamed}, removed {report.removed}"
    print(f"{before}{counts}, unchanged {report.skipped}, failed {len(report.failed)}", flush=True)


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
        info, roots = index.info(), Roots.read(index)
    if args.json:
        print(json.dumps({**asdict(info), "count": info.count, "folders": [asdict(root) for root in roots.all]}))
        return 0
    counts = ", ".join(f"{info.counts[name]} {name}" for name in sorted(info.counts)) or "none"
    queries = ", ".join(f"{count} {name}" for name, count in info.background.items())
    folders = ", ".join(root.folder + f" (ids from {root.prefix})" * bool(root.prefix) for root in roots.all)
    calibrated = f"calibrated with {queries} queries ({info.background_source})"
    for name, value in (
        ("index", info.uri),
        ("items", f"{info.count} ({counts})"),
        ("in step with", folders or "no folder (`traceir index sync`)"),
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


def list_items(args: argparse.Namespace) -> int:
    with open_index(args.index) as index:
        for number, stored in enumerate(_chosen(index, _where(args), args.missing, args.sort)):
            if number == args.limit:
                say(f"these are the first {args.limit}; more with a higher --limit")
                break
            print(json.dumps(_described(stored)) if args.json else one_line(_line(stored)))
    return 0


def remove(args: argparse.Namespace) -> int:
    where = _where(args)
    is_search = where is not None or args.missing or args.all
    if not args.ids and not is_search:
        raise InputError("nothing is named; give ids, --glob, --folder, --where or --missing, or --all for every item")
    with open_index(args.index) as index:
        named = index.get(args.ids)
        chosen = {stored.id: stored for stored in _chosen(index, where, args.missing)} if is_search else named
        if args.ids:
            chosen = {id: stored for id, stored in chosen.items() if id in named}
        elif not args.all and not args.dry_run and len(chosen) == index.count() > 1:
            raise InputError(f"these are all {len(chosen)} items of {args.index}, and nothing was removed; add --all to mean it")
        if args.dry_run:
            for id in chosen:
                print(one_line(id))
        else:
            ids = list(chosen)
            print(f"removed {sum(index.delete(ids[at : at + _AT_ONCE]) for at in range(0, len(ids), _AT_ONCE))}")
            _forget(args, index)
            _say_if_back(chosen.values(), Roots.read(index))
    absent = sorted(set(args.ids) - named.keys())
    if absent:
        print(one_line(f"not there: {', '.join(absent)}"), file=sys.stderr)
    return PARTLY if absent else 0


def _forget(args: argparse.Namespace, index: Index) -> None:
    """The roots of which all was removed by --folder or --all alone: they are kept in step no longer."""
    folder = os.path.realpath(args.folder or os.sep)
    if (args.folder or args.all) and not (args.ids or args.where or args.glob or args.missing):
        roots = Roots.read(index)
        left = roots.without(folder)
        if left.all != roots.all:
            left.keep(index)
            say(f"no longer kept in step: {', '.join(root.folder for root in roots.all if root not in left.all)}")


def _say_if_back(removed: Iterable[Stored], roots: Roots) -> None:
    files = [str(stored.fields[FILE_FIELD]) for stored in removed if FILE_FIELD in stored.fields]
    if count := sum(roots.of(file) is not None and os.path.lexists(file) for file in files):
        say(f"the files of {count} of them are still there; the next `traceir index sync` adds them again")


def _where(args: argparse.Namespace) -> Filter | None:
    """What --where, --glob and --folder choose together; None where none is given."""
    parts = [part for part in map(as_filter, args.where) if part is not None]
    parts += [Or(Glob("id", pattern) for pattern in args.glob)] if args.glob else []
    parts += [below(os.path.realpath(args.folder))] if args.folder else []
    return And(parts) if parts else None


def _chosen(index: Index, where: Filter | None, missing: bool, sort: str = "id") -> Iterator[Stored]:
    """The items of a filter in order of a field, or those of them whose file is not there."""
    after = None
    while page := index.browse(where, sort=sort, after=after, limit=_AT_ONCE):
        yield from (stored for stored in page if not missing or _is_missing(stored))
        after = position_of(page[-1], sort)


def _is_missing(stored: Stored) -> bool:
    file = _file_of(stored)
    return file is not None and not os.path.lexists(file)


def _file_of(stored: Stored) -> str | None:
    """The path of the file that an item was made from, or of its image."""
    file = stored.fields.get(FILE_FIELD) or (stored.image and file_of(stored.image))
    return file if isinstance(file, str) and Path(file).is_absolute() else None


def _described(stored: Stored) -> dict[str, Any]:
    fields = {name: value for name, value in stored.fields.items() if name not in (FILE_FIELD, STAT_FIELD)}
    return {"id": stored.id, "modality": stored.modality, "text": stored.text, "file": _file_of(stored), "fields": fields}


def _line(stored: Stored) -> str:
    return "  ".join(filter(None, (stored.id, stored.modality, str(stored.fields.get("date") or ""), (stored.text or "")[:60])))


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
