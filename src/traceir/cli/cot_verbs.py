"""What `traceir reasoning ...` does."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from traceir.cli.terminal import PARTLY, one_line, parse_shard, shows_progress, split
from traceir.cot import products
from traceir.cot.build import BuildSummary, is_finished, run_parts, summarise, write_manifests
from traceir.cot.plan import DATASET, BuildConfig, begin, read_build
from traceir.cot.products import push_cot, write_cot_card, write_quality
from traceir.cot.reach import Reach, estimate, estimate_table, open_work, run_on_ray
from traceir.cot.review.review import Sampling, agreement_table
from traceir.cot.source import CaseSource, DataPart, check_tasks, find_parts
from traceir.cot.teachers.answer_cache import AnswerCache, read_batch_results
from traceir.data.settings import override
from traceir.errors import InputError
from traceir.outside import read_json


def build(args: argparse.Namespace) -> int:
    out, config = args.out, _config(args)
    if not Path(config.data).is_dir():
        raise InputError(f"data folder {config.data} does not exist; give the root of a folder in M-BEIR's layout")
    check_tasks(Path(config.data), [*config.tasks, *config.direct, *config.complex])
    parts = find_parts(Path(config.data), config.part_size)
    if args.dry_run:
        with closing(CaseSource(Path(config.data), config.tasks)) as source:
            stages = estimate(config, source, parts, out, complex_share=args.complex_share)
        print(estimate_table(stages, args.price_in, args.price_out))
        return 0
    reach, (number, count) = _reach(args), parse_shard(args.shard)
    begin(out, config)
    mine = [part for part in parts[number::count] if not is_finished(out, part)]
    summary = _run(args, config, reach, mine, f"{number:04d}-of-{count:04d}")
    for name, reason in [item for item in summary.unfinished.items() if item[1] != summary.stopped][:5]:
        print(one_line(f"unfinished: {name}: {reason}"), file=sys.stderr)
    if summary.stopped or summary.unfinished:
        left = summary.stopped or f"{len(summary.unfinished)} parts lack answers"
        print(one_line(f"stopped: {left}; the same command goes on where this one ended"), file=sys.stderr)
        return PARTLY
    if left_over := sum(not is_finished(out, part) for part in parts):
        print(f"this share is done; {left_over} of {len(parts)} parts are not, the last share to finish assembles")
        return 0
    write_manifests(out, parts)
    return 0 if args.no_assemble else assemble(args)


def _run(args: argparse.Namespace, config: BuildConfig, reach: Reach, parts: list[DataPart], writer: str) -> BuildSummary:
    if args.engine == "ray":
        return run_on_ray(config, args.out, parts, reach, workers=args.workers)
    with open_work(config, args.out, reach, writer) as work:
        return run_parts(work, parts, progress=shows_progress())


def assemble(args: argparse.Namespace) -> int:
    out = args.out
    funnel = products.assemble(out, format=args.format, dropped=args.dropped, negatives=not args.no_negatives)
    write_cot_card(out / DATASET, out)
    print(funnel.table())
    print(f"wrote {out / DATASET}", file=sys.stderr)
    if problem := funnel.problem():
        print(one_line(f"warning: {problem}"), file=sys.stderr)
        return PARTLY
    if funnel.unread:
        print(one_line(f"dropped without a word of use from the teacher: {summarise(funnel.unread)}"), file=sys.stderr)
    return 0


def import_answers(args: argparse.Namespace) -> int:
    with AnswerCache(Path(args.journal or args.out / "journal"), "batch") as cache:
        counts = read_batch_results(args.files, cache)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0


def review(args: argparse.Namespace) -> int:
    if args.agreement:
        read_build(args.out)  # a folder without a build has no agreement either
        print(agreement_table(args.out))
        return 0
    from traceir.cot.review.review_server import serve_review

    sampling, browser = Sampling(args.per_stratum, args.order, seed=args.seed), not args.no_browser
    serve_review(args.out, sampling, port=args.port, reviewer=args.reviewer, open_browser=browser, announce=print)
    return 0


def report(args: argparse.Namespace) -> int:
    print(write_quality(args.out, Path(args.to or args.out / "quality")))
    return 0


def teacher(args: argparse.Namespace) -> int:
    from traceir.cot.scripted.teacher_server import KEY_VARIABLE, ScriptedOptions, serve

    key, named = args.key or os.environ.get(KEY_VARIABLE, ""), ("data", "host", "port", "model", "faults", "latency", "stall")
    serve(ScriptedOptions(key=key, fault_seed=args.seed, log=args.log, **{name: getattr(args, name) for name in named}))
    return 0


def push(args: argparse.Namespace) -> int:
    print(push_cot(args.out / DATASET, args.repo, dry_run=args.dry_run, private=args.private))
    return 0


def _config(args: argparse.Namespace) -> BuildConfig:
    named: dict[str, Any] = {name: tuple(split(getattr(args, name))) for name in ("tasks", "direct", "complex")}
    named |= {name: getattr(args, name) for name in ("data", "captions", "templates")}
    return override(BuildConfig(model=_model(args), verifier=args.verifier_model, **named), args.settings)


def _model(args: argparse.Namespace) -> str:
    """The teacher's name: options, or that of a recorded file."""
    if args.model:
        return str(args.model)
    if args.teacher.startswith("recorded:"):
        return "recorded"
    if args.dry_run:
        return "none"
    raise InputError("name the model that the teacher's address serves with --model; its /v1/models lists them")


def _reach(args: argparse.Namespace) -> Reach:
    if not args.teacher:
        raise InputError("name the teacher with --teacher: http://HOST:PORT/v1, recorded:FILE.jsonl or batch:FOLDER")
    try:
        extra = read_json(args.extra or "{}")
        if not isinstance(extra, dict):
            raise ValueError(f"it is a {type(extra).__name__}")
    except ValueError as error:
        raise InputError(f"--extra {args.extra!r} is not a JSON object ({error})") from error
    named = ("teacher", "key_variable", "concurrency", "requests_per_minute", "tokens_per_minute", "price_in", "price_out",
             "spend_limit", "patience", "verifier", "journal")  # fmt: skip
    return Reach(**{name: getattr(args, name) for name in named}, timeout_s=args.timeout, extra=extra)
