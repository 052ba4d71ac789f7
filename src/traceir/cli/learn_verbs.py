"""What the verbs of evaluation, MiniBEIR and training do; what needs torch is imported once their input has been checked."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from traceir.checkpoint import check_model, hub_answers
from traceir.cli.terminal import (
    PARTLY,
    check_model_options,
    load_encoder,
    load_own_encoder,
    model_name,
    one_line,
    open_encoder,
    parse_shard,
    shows_progress,
    split,
)
from traceir.errors import InputError
from traceir.items import Route, check_route
from traceir.minibeir import build as minibeir
from traceir.minibeir.sheet import write_sheet
from traceir.minibeir.unseen.build import build_unseen


def report(args: argparse.Namespace) -> int:
    from traceir.evaluation.results import named_runs
    from traceir.lab.report import run_report

    if args.kind == "scoreboard":
        from traceir.lab.scoreboard import write_scoreboard

        if not args.out:
            raise InputError("report scoreboard writes a page and a table too; name the Markdown file with --out")
        print(write_scoreboard(args.folders, args.out))
        return 0
    if args.kind == "examples":
        from traceir.lab.examples import write_examples

        if not args.out or not args.data or len(args.folders) != 1:
            raise InputError(
                "report examples takes one evaluation, the folder it was made of (--data), and --out DIR for the page"
            )
        ((folder, route),) = named_runs(args.folders).values()
        print(write_examples(folder, args.data, args.out, route=route))
        return 0
    print(run_report(args.kind, args.folders, args.out))
    return 0


def compare(args: argparse.Namespace) -> int:
    from traceir.evaluation.compare import compare

    print(compare(args.first, args.second, k=args.k, out=args.out, shown=args.shown))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    _check_folders(args)
    routes = _routes(args)
    from traceir.evaluation.embeddings import shard_from_environment
    from traceir.evaluation.evaluate import dry_run, evaluate
    from traceir.evaluation.results import table

    options: dict[str, Any] = {"split": args.split, "routes": routes, "rows": _names(args.rows), "limit": args.limit}
    if args.dry_run:
        print(dry_run(load_encoder(args), args.data, **options))
        return 0
    options |= {"pools": ["local", "global"] if args.pool == "both" else [args.pool], "cache": args.cache}
    options |= {"prompt": args.prompt, "seed": args.seed, "on_error": args.on_error, "progress": shows_progress()}
    options["shard"] = parse_shard(args.shard) if args.shard else shard_from_environment()
    results = evaluate(load_encoder(args), args.data, args.out, **options)
    if results is None:
        print("this share is encoded; what others encode is not all there yet, the last to finish scores", file=sys.stderr)
        return 0
    print(table(results))
    print(f"wrote {args.out / 'results.json'}", file=sys.stderr)
    return 0


def unseen(args: argparse.Namespace) -> int:
    _check_folders(args)
    from traceir.evaluation.unseen.run import dry_run_unseen, evaluate_unseen, submit_circo, table

    columns, data, out = _names(args.columns), args.data, args.out
    if args.dry_run:
        print(dry_run_unseen(data, columns))
        return 0
    encoder, cache, shown = load_encoder(args), args.cache or out / "embeddings", shows_progress()
    if args.circo_submission:
        print(submit_circo(encoder, data, args.circo_submission, cache=cache, progress=shown))
        return 0
    options: dict[str, Any] = {"columns": columns, "missing": args.on_error, "cache": cache, "progress": shown}
    print(table(evaluate_unseen(encoder, data, out, routes=_routes(args), **options)))
    print(f"wrote {out / 'results.json'}", file=sys.stderr)
    return 0


def mteb(args: argparse.Namespace) -> int:
    benchmarks, names = list(args.benchmark), split(",".join(args.tasks))
    if not (benchmarks or names or args.tasks_from):
        raise InputError('there is nothing to score; give -b "MIEB(lite)", -t TASK, or --tasks-from MODULE')
    if args.name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.name):
        raise InputError(f"--name {args.name!r} is not of the form OWNER/NAME")
    check_model_options(args)
    if not (online := hub_answers()):
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are imported: nothing is then tried again and again
        print("note: the Hugging Face hub does not answer; tasks can run whose data are on this machine", file=sys.stderr)
    if not shows_progress():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not args.verbose:
        warnings.simplefilter("ignore")  # scikit-learn's about labels that were never predicted, and mteb's, which it logs too
    try:
        from traceir.evaluation import mteb_run
        from traceir.evaluation.mteb_model import TraceEncoder
    except ImportError as error:
        raise InputError(f"mteb is not there ({error}); pip install 'traceir[mteb]'") from error

    tasks = mteb_run.choose_tasks(benchmarks, names, args.tasks_from)
    encoder = open_encoder(args)
    if world := getattr(encoder, "world", None):
        print(f"note: {world.says}", file=sys.stderr)
    model = TraceEncoder.of(encoder, args.name or mteb_run.label(model_name(args)), route=args.route)
    run = mteb_run.MtebRun(model, args.out, batch_size=args.batch_size, online=online, progress=shows_progress())
    if args.dry_run:
        print("\n".join(mteb_run.plan(run, tasks)))
        return 0
    outcomes = mteb_run.score(run, tasks, benchmarks=benchmarks, tell=lambda line: print(one_line(line), file=sys.stderr))
    print(mteb_run.table(outcomes))
    print(f"wrote {run.out / 'results.json'}, and beside it what mteb's own commands read", file=sys.stderr)
    return PARTLY if any(outcome.score is None for outcome in outcomes) else 0


def _check_folders(args: argparse.Namespace) -> None:
    """What can be told to be wrong with --data, --model and --device before anything heavy is imported."""
    if not args.data.is_dir():
        raise InputError(f"data folder {args.data} does not exist; make one with `traceir minibeir build --out {args.data}`")
    check_model_options(args)


def _routes(args: argparse.Namespace) -> list[Route]:
    return [check_route(route) for route in dict.fromkeys(split(",".join(args.route or ["auto"])))]


def _names(text: str | None) -> list[str] | None:
    return None if text is None else split(text)


def faithfulness(args: argparse.Namespace) -> int:
    _check_folders(args)
    from traceir.lab.faithful import probe, table

    encoder = load_own_encoder(args)
    options = {"split": args.split, "rows": _names(args.rows), "limit": args.limit}
    print(table(probe(encoder, args.data, args.out, **options, progress=shows_progress()), encoder.fingerprint))
    return 0


def minibeir_build(args: argparse.Namespace) -> int:
    print(minibeir.build(args.out, scale=args.scale, seed=args.seed, workers=args.workers))
    return 0


def minibeir_unseen(args: argparse.Namespace) -> int:
    print(build_unseen(args.out, scale=args.scale, seed=args.seed, progress=shows_progress()))
    return 0


def minibeir_sheet(args: argparse.Namespace) -> int:
    print(write_sheet(args.data, args.out))
    return 0


def train(args: argparse.Namespace) -> int:
    if args.data is not None and not Path(args.data).is_dir():
        raise InputError(f"data folder {args.data} does not exist; give a folder in M-BEIR's layout or of M-BEIR-CoT")
    if args.init not in (None, "random"):
        check_model(args.init)
    if args.resume_from is not None and not (args.resume_from / "step.json").is_file():
        raise InputError(f"{args.resume_from} is not a step folder (it has no step.json); give RUN/steps/NNNNNN")
    from traceir.lab.mini_presets import resolve
    from traceir.train.train import train

    for part in ("config", "train", *(["memory"] if args.card else [])):  # said without -v: precision, where it goes on, chunks
        logging.getLogger(f"traceir.train.{part}").setLevel(logging.INFO)
    threads = [f"threads={args.threads}"] if args.threads else []
    if args.init is None and args.data is None:
        _train_before(args.preset, threads)
    settings = [*threads, *args.settings]
    config = resolve(args.preset, data=args.data, out=args.out, init=args.init, settings=settings, card=args.card)
    print(train(config, resume_from=args.resume_from))
    return 0


def mine(args: argparse.Namespace) -> int:
    if not args.data.is_dir():
        raise InputError(f"data folder {args.data} does not exist; give a folder in M-BEIR's layout")
    from traceir.evaluation.mine import mine

    print(mine(load_encoder(args), args.data, args.out, k=args.k, limit=args.limit, seed=args.seed, progress=shows_progress()))
    return 0


def _train_before(preset: str, settings: list[str]) -> None:
    """Trains the presets whose checkpoints this one starts from, where they are not there."""
    from traceir.lab.mini_presets import resolve, stages_before
    from traceir.train.train import train

    for stage in stages_before(preset):
        print(f"preset {preset} starts from {stage}, which is trained first", file=sys.stderr)
        train(resolve(stage, settings=settings))


def ablate(args: argparse.Namespace) -> int:
    from traceir.lab.ablate import ablate, list_tables
    from traceir.lab.ablate_report import write_report
    from traceir.lab.ablations import choose_tables
    from traceir.lab.mini_presets import resolve

    if not all(part.isdecimal() for part in split(args.seeds)):
        raise InputError(f"--seeds {args.seeds!r} is not a list of whole numbers; write 0,1,2")
    tables, seeds = choose_tables(split(args.tables)), [int(part) for part in split(args.seeds)]
    if args.list:
        print(list_tables(tables, seeds))
        return 0
    if not args.out:
        raise InputError("name the folder of the runs with --out")
    if args.report_only and not args.report:
        raise InputError("--report-only needs the folder to write to; name it with --report")
    out, code = Path(args.out), 0
    threads = [f"threads={args.threads}"] if args.threads else []
    if not args.report_only:
        if args.data is None:
            _train_before("ablation", threads)
        base = resolve("ablation", data=args.data, out=args.out, settings=[*threads, *args.settings])
        outcome = ablate(tables, out, base, seeds=seeds, jobs=args.jobs)
        print(f"{outcome.done} of {outcome.planned} runs are done, {len(outcome.skipped)} variants skipped")
        for name, reason in outcome.failed.items():
            print(one_line(f"failed: {name}: {reason}"), file=sys.stderr)
        code = PARTLY if outcome.failed else 0
    if args.report:
        data = f" --data {args.data}" if args.data else ""
        settings = "".join(f" --set {setting}" for setting in args.settings)
        command = f"traceir ablate {args.tables} --out {args.out} --seeds {args.seeds}{data}{settings}"
        print(write_report(out, Path(args.report), tables=tables, command=command))
    return code


def merge(args: argparse.Namespace) -> int:
    check_model(args.adapter)
    import torch

    from traceir.model import merge

    print(merge(args.adapter, args.out, dtype=getattr(torch, args.dtype)))
    return 0


def push(args: argparse.Namespace) -> int:
    from traceir.train.card import push, write_card

    readme = args.folder / "README.md"
    if args.run or args.evaluation or args.licence or not readme.is_file():
        write_card(args.folder, run=args.run, evaluations=args.evaluation, repo=args.repo, licence=args.licence)
        print(f"wrote {readme}", file=sys.stderr)
    print(push(args.folder, args.repo, private=args.private, dry_run=args.dry_run, revision=args.revision))
    return 0
