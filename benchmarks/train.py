"""What a training step costs: against the plainest correct loop, in memory whatever the batch, and on one accelerator.

`throughput`: pairs/s of our step (chunks of rows of like length, images decoded once, logits only where a token is supervised)
and of the loop anyone would write first: transformers' own network once over the queries and once over the candidates, each
padded to its longest row, all logits, images decoded from their files every time. Both sides take the same batches with the same
optimiser and precision, one after the other in one process, and neither has workers. That losses and gradients agree is checked
first.
`memory`: the peak of training at two batch sizes with GradCache and without, each in a process of its own.
`capacity`: the largest batch of made-up batches with GradCache and LoRA on one device, tokens/s, share of its peak.
`precision`: a step in bfloat16 against one in float32, with this processor's instructions and with AVX2 only, and whether the
default takes the faster (train_precision.py).
`cards`: what `--card` makes of the published shapes, by its arithmetic; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from benchmarks import train_precision
from benchmarks.train_shapes import (
    SHAPES,
    Lengths,
    build,
    capacity,
    capacity_table,
    empty_network,
    machine,
    peak_mib,
    prepared,
    reset_peak,
    resident_mib,
)
from benchmarks.train_sides import Ours, Plain
from traceir.batch import Processor
from traceir.data.image_store import pixel_store
from traceir.data.samples import Schedule, TaskData, read_pairs
from traceir.errors import InputError, TraceError
from traceir.lab.mini_presets import PRESETS
from traceir.model import TraceModel
from traceir.precision import bfloat16_on
from traceir.train.batches import TrainBatches
from traceir.train.config import TrainConfig
from traceir.train.presets import largest, need_of

TASKS: Final = "cirr_task7,mscoco_task3,mscoco_task0"
AGREE: Final = {"float32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of loss and gradient between the two sides, by the precision that the check runs in."""


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides over the same batches; every round is one batch of each task, and its ratio is of neighbours in time."""
    lora, config = SHAPES[options.shape].fields is not None, _config(options)
    config = replace(config, grad_cache=False)
    batches_needed = len(options.tasks) * (options.rounds + 1)
    ours_model, plain_model = (build(options.shape, options.device, lora=lora, precision=options.precision) for _ in range(2))
    batches = _batches(options, config, ours_model, batches_needed)
    ours, plain = Ours(ours_model, batches, config, options.device), Plain(plain_model, batches.schedule, config, options.device)
    with tempfile.TemporaryDirectory() as cache:
        stored = _store(ours_model.processor, options.data, batches.schedule, batches_needed, Path(cache))
        agreement = agree(ours, plain, "bf16" if lora and options.precision == "bf16" else "float32")
        ours.reader = prepared(ours.reader, options.device, options.precision)
        plain.autocast = options.precision == "bf16"
        rounds = _rounds(ours, plain, options)
    elapsed = [(sum(task["ours"][0] for task in steps), sum(task["plain"][0] for task in steps)) for steps in rounds]
    cpus = [(sum(task["ours"][1] for task in steps), sum(task["plain"][1] for task in steps)) for steps in rounds]
    ratios, pairs = [theirs / own for own, theirs in elapsed], config.batch * len(options.tasks)
    return {
        "agreement": agreement,
        "pixel_store": stored,
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
        "cpu_ratio": statistics.median(theirs / own for own, theirs in cpus),
        "ours_pairs_per_second": pairs / statistics.median(own for own, _ in elapsed),
        "plain_pairs_per_second": pairs / statistics.median(theirs for _, theirs in elapsed),
        "by_task": {
            task: statistics.median(own["plain"][0] / own["ours"][0] for steps in rounds for own in steps if own["task"] == task)
            for task in options.tasks
        },
        "padding": {name: 1 - side.tokens / side.padded for name, side in (("ours", ours), ("plain", plain))},
        "tokens_per_turn": ours.tokens / (options.rounds * len(options.tasks)),
        "milliseconds_per_turn": {
            name: {part: 1000 * spent / (options.rounds * len(options.tasks)) for part, spent in side.clock.seconds.items()}
            for name, side in (("ours", ours), ("plain", plain))
        },
        "rounds": rounds,
    }


def agree(ours: Ours, plain: Plain, precision: str) -> dict[str, float]:
    """Relative differences of both losses and of the whole gradient on the first batch; TraceError above the tolerance."""
    plain.autocast, terms = precision == "bf16", (ours.losses(0), plain.losses(0))
    apart = {name: abs(terms[0][name] - terms[1][name]) / abs(terms[1][name]) for name in ("gen", "ret")}
    gradients = [torch.cat([p.grad.flatten().float() for p in side.trained if p.grad is not None]) for side in (ours, plain)]
    if len(gradients[0]) != len(gradients[1]):
        raise TraceError("the two sides train different parameters, so their speeds say nothing; look at build()")
    apart["gradient"] = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    for side in (ours, plain):
        side.optimiser.zero_grad()
    if not max(apart.values()) <= AGREE[precision]:
        raise TraceError(f"the two sides do not compute the same: {apart}, at most {AGREE[precision]} is allowed in {precision}")
    return {**apart, "tolerance": AGREE[precision]}


def _rounds(ours: Ours, plain: Plain, options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Seconds of every batch, a list for each round; the first round warms up and is not among them."""
    rounds: list[list[dict[str, Any]]] = []
    for number in tqdm(range(len(options.tasks) * (options.rounds + 1)), desc="batches"):
        if number == len(options.tasks):
            rounds.clear()
            ours.forget()
            plain.forget()
        if number % len(options.tasks) == 0:
            rounds.append([])
        sides = (("ours", ours), ("plain", plain)) if number % 2 == 0 else (("plain", plain), ("ours", ours))
        spent = {name: side.train(number) for name, side in sides}
        rounds[-1].append({"task": ours.batches.schedule.task(number).name, **spent})
    return rounds


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks of both batch sizes with the cache and without, each in a child process, one after the other."""
    processes: list[dict[str, Any]] = []
    tried = [(batch, cache) for cache in (True, False) for batch in options.batch]
    for batch, cache in tqdm(tried, desc="child processes"):
        asked = ["memory", "--child", "--cache" if cache else "--no-cache", "--batch", str(batch), "--shape", options.shape]
        asked += ["--data", str(options.data), "--tasks", ",".join(options.tasks), "--precision", options.precision]
        asked += ["--threads", str(options.threads), "--seed", str(options.seed), "--device", options.device]
        asked += ["--chunk-tokens", str(options.chunk_tokens), "--pairs", str(max(options.pairs, *options.batch))]
        command = [sys.executable, "-m", "benchmarks.train", *asked]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        ended = {"batch": batch, "grad_cache": cache, "ended": f"status {done.returncode}"}
        processes.append(ended if done.returncode else json.loads(done.stdout))
    return {"processes": processes, "ratios": _memory_ratios(processes)}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: one small step to set everything up, then the peak while batches are made and trained on.

    Both batch sizes train on the same number of pairs, since some of what a step leaves behind grows with the shapes seen so far
    (kernels kept for them, gaps between blocks of memory), not with the batch. The peak of the first batch alone is noted too.
    """
    config = replace(_config(options), grad_cache=options.cache)
    steps = max(1, options.pairs // config.batch)
    lora = SHAPES[options.shape].fields is not None
    model = build(options.shape, options.device, lora=lora, precision=options.precision)
    batches = _batches(options, config, model, steps)
    side = Ours(model, batches, config, options.device)
    side.reader = prepared(side.reader, options.device, options.precision)
    with tempfile.TemporaryDirectory() as cache:
        _store(model.processor, options.data, batches.schedule, steps, Path(cache))
        side.batches = _batches(options, replace(config, batch=config.group), model, 1)
        side.train(0)
        side.forget()
        side.batches, resident = batches, resident_mib(options.device)
        reset, started, peaks = reset_peak(options.device), time.perf_counter(), []
        for number in tqdm(range(steps), desc=f"batch {config.batch}", disable=steps < 2):
            side.train(number)
            peaks.append(peak_mib(options.device))
        spent = time.perf_counter() - started
    return {
        "batch": config.batch,
        "grad_cache": config.grad_cache,
        "chunk_tokens": config.chunk_tokens,
        "steps": steps,
        "resident_mib": resident,
        "peak_mib": peaks[-1],
        "growth_mib": peaks[-1] - resident,
        "first_step_peak_mib": peaks[0],
        "peak_was_reset": reset,
        "seconds": spent / steps,
        "padded_tokens": side.padded / steps,
    }


def _memory_ratios(processes: Sequence[dict[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Largest batch to smallest: of the peak, of its growth, of the peak of one step; None where one did not end well."""
    ratios: dict[str, dict[str, float] | None] = {}
    for cache, name in ((True, "grad_cache"), (False, "no_cache")):
        own = [process for process in processes if process["grad_cache"] == cache]
        keys = ("peak_mib", "growth_mib", "first_step_peak_mib")
        ratios[name] = None if any("ended" in process for process in own) else {key: own[-1][key] / own[0][key] for key in keys}
    return ratios


# What both need


def _config(options: argparse.Namespace) -> TrainConfig:
    """The preset of the shape with the sizes asked for on the command line."""
    config = PRESETS[SHAPES[options.shape].preset]()
    batch, tokens = options.batch[0], options.chunk_tokens or config.chunk_tokens
    return replace(config, data=str(options.data), batch=batch, chunk_tokens=tokens, seed=options.seed)


def _batches(options: argparse.Namespace, config: TrainConfig, model: TraceModel, count: int) -> TrainBatches:
    """So many batches of the chosen tasks, one after the other."""
    tasks: list[TaskData] = [task for task in read_pairs(options.data, seed=config.seed) if task.name in options.tasks]
    if missing := set(options.tasks) - {task.name for task in tasks}:
        raise InputError(f"{options.data} has no train rows {sorted(missing)}; choose others with --tasks")
    schedule = Schedule(tasks, [1.0] * len(tasks), batch=config.batch, group=config.group, batches=count, seed=config.seed)
    version = model.settings.prompt_version
    return TrainBatches(schedule, model.processor, version, config.chunk_tokens)


def _store(processor: Processor, data: Path, schedule: Schedule, batches: int, cache: Path) -> dict[str, float]:
    """Gives the processor a store of the images of these batches, as `traceir train` makes one of all before its first step."""
    names: set[str] = set()
    for number in range(batches):
        for example in schedule.examples(number):
            shown = [*example.query.images, *(example.candidate.images if example.candidate is not None else ())]
            names.update(str(image.path.relative_to(data)) for image in shown if image.path is not None)
    started = time.perf_counter()
    if names:
        processor.pixel_store = pixel_store(data, cache, processor, sorted(names))
    return {"pictures": len(names), "seconds": time.perf_counter() - started}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    measured, about, config = results["found"], results["machine"], results["config"]
    lines = [
        f"`python -m benchmarks.train {results['measurement']}`: shape {results['shape']} ({results['source']}), "
        f"{results['precision']}, batch {_listed(config['batch'])}, {_listed(config['chunk_tokens'])} tokens a chunk, seed "
        f"{results['seed']}, data {str(results['data'] or 'made up')[:16]}. {about['processor']}, {about['cores']} cores, "
        f"{about['threads']} thread(s), device {about['device']}, torch {about['torch']}, transformers {about['transformers']}.",
        "",
    ]
    made = {"throughput": _throughput_table, "memory": _memory_table, "capacity": capacity_table}
    return "\n".join([*lines, *made[results["measurement"]](measured)])


def _listed(numbers: int | Sequence[int]) -> str:
    return str(numbers) if isinstance(numbers, int) else ", ".join(map(str, numbers))


def _throughput_table(run: dict[str, Any]) -> list[str]:
    agreement, padding = run["agreement"], run["padding"]
    parts = sorted({part for side in run["milliseconds_per_turn"].values() for part in side})
    lines = [
        f"Same work: losses differ by {agreement['gen']:.1e} and {agreement['ret']:.1e}, gradients by "
        f"{agreement['gradient']:.1e} (relative; at most {agreement['tolerance']:g}). {len(run['rounds'])} rounds of one batch "
        f"a task. Our images were decoded before: {run['pixel_store']['pictures']:.0f} in "
        f"{run['pixel_store']['seconds']:.1f} s, once for all epochs.",
        "",
        "| | ours | plain loop | ratio (median) | least | greatest | ratio of CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| pairs/s | {run['ours_pairs_per_second']:.1f} | {run['plain_pairs_per_second']:.1f} | **{run['ratio']:.2f}** "
        f"| {run['least_ratio']:.2f} | {run['greatest_ratio']:.2f} | {run['cpu_ratio']:.2f} |",
        *(f"| {task} | | | {ratio:.2f} | | | |" for task, ratio in run["by_task"].items()),
        f"| padding | {100 * padding['ours']:.1f} % | {100 * padding['plain']:.1f} % | | | | |",
        "",
        f"| milliseconds a batch | {' | '.join(parts)} |",
        f"|---|{'---:|' * len(parts)}",
    ]
    for name, spent in run["milliseconds_per_turn"].items():
        lines.append(f"| {name} | {' | '.join(f'{spent.get(part, 0.0):.1f}' for part in parts)} |")
    return lines


def _memory_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "Peak of one process while it makes batches and trains on them, over the same number of pairs at every batch size; "
        "`before` is resident when model, data and optimiser are there.",
        "",
        "| GradCache | batch | steps | before MiB | peak MiB | growth MiB | peak of the first step MiB | seconds a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for process in results["processes"]:
        head = f"| {'yes' if process['grad_cache'] else 'no'} | {process['batch']} |"
        if "ended" in process:
            lines.append(f"{head} {process['ended']} | | | | | |")
            continue
        sizes = " | ".join(f"{process[key]:.0f}" for key in ("resident_mib", "peak_mib", "growth_mib", "first_step_peak_mib"))
        lines.append(f"{head} {process['steps']} | {sizes} | {process['seconds']:.1f} |")
    for name, ratios in results["ratios"].items():
        if ratios is not None:
            lines += [
                "",
                f"{name}, largest batch to smallest: peak **{ratios['peak_mib']:.2f}**, growth {ratios['growth_mib']:.2f}, "
                f"peak of the first step {ratios['first_step_peak_mib']:.2f}.",
            ]
    return lines


def cards() -> list[str]:
    """The shares of memory of each published shape with its preset, and the chunks that fit, as Markdown."""
    lines = ["| preset | LoRA | frozen | trains | 1,000 tokens of a chunk | `--card 24` | `--card 80` |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for shape, rank in (("2b", 128), ("3b", 128), ("7b", 128), ("7b", 64), ("7b", 32)):
        network, preset = empty_network(SHAPES[shape], "meta"), SHAPES[shape].preset
        need = need_of(replace(PRESETS[preset](), lora_rank=rank), network)
        fits = [largest(need, card) for card in (24, 80)]
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (need.frozen, need.trained, 1000 * need.token))
        lines.append(f"| `{preset}` | {rank} | {sizes} | " + " | ".join(f"{batch:,}" if batch else "no" for batch in fits) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING)
    options = _parse(arguments)
    if options.measurement == "cards":
        print("\n".join(cards()))
        return 0
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    try:
        if options.measurement == "precision":
            return _precision(options)
        if options.measurement == "memory" and options.child:
            print(json.dumps(child(options)))
            return 0
        measured = {"throughput": throughput, "memory": memory, "capacity": capacity}[options.measurement](options)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {**_header(options), "found": measured}
    print(table(results))
    _write(options, results)
    return _bound(options, measured)


def _precision(options: argparse.Namespace) -> int:
    """Prints and writes the comparison of types; 1 where the default is not the faster one."""
    if options.child:
        print(json.dumps(train_precision.child(options)))
        return 0
    results = train_precision.precision(options)
    print(train_precision.table(results))
    _write_as(
        options.out,
        f"train-precision-{options.preset}{f'-{options.width}' if options.width else ''}-cpu",
        results,
        train_precision.table(results),
    )
    if slower := train_precision.wrong(results):
        print(f"the default is not the faster type on the processor {' and '.join(slower)}", file=sys.stderr)
    return int(bool(slower))


def _bound(options: argparse.Namespace, measured: dict[str, Any]) -> int:
    """1 and a word on stderr where a bound that was asked for does not hold."""
    if options.measurement == "throughput" and options.at_least and not measured["ratio"] >= options.at_least:
        print(f"bound does not hold: ratio is {measured['ratio']:.3f}, at least {options.at_least} is asked", file=sys.stderr)
        return 1
    ratios = measured["ratios"]["grad_cache"] if options.measurement == "memory" and options.at_most else None
    if options.measurement == "memory" and options.at_most and not (ratios and ratios["peak_mib"] <= options.at_most):
        print(f"bound does not hold: peaks with GradCache are {ratios}, at most {options.at_most} is asked", file=sys.stderr)
        return 1
    return 0


def _header(options: argparse.Namespace) -> dict[str, Any]:
    about, preset = options.data / "meta.json", SHAPES[options.shape].preset
    known = options.measurement != "capacity" and about.is_file()
    tokens = options.chunk_tokens or PRESETS[preset]().chunk_tokens
    return {
        "format": 1,
        "measurement": options.measurement,
        "shape": options.shape,
        "source": SHAPES[options.shape].source,
        "precision": options.precision,
        "data": json.loads(about.read_text()).get("fingerprint") if known else None,
        "seed": options.seed,
        "machine": machine(options.device),
        "config": {"preset": preset, "batch": options.batch, "chunk_tokens": tokens},
    }


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    middle = "" if options.measurement == "capacity" else f"{options.measurement}-"
    last = "" if options.precision == "bf16" else f"-{options.precision}"
    _write_as(options.out, f"train-{middle}{options.shape}-{options.device}{last}", results, table(results))


def _write_as(out: Path, name: str, results: dict[str, Any], text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text + "\n")):
        target = out / f"{name}{suffix}"
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, target)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="measurement", required=True)
    made = {name: verbs.add_parser(name) for name in ("throughput", "memory", "capacity")}
    for name, verb in made.items():
        verb.add_argument("--shape", choices=SHAPES, default="mini")
        verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        verb.add_argument("--precision", choices=("bf16", "float32"), help="(default: the faster one on the device)")
        verb.add_argument("--data", type=Path, default=Path("data/minibeir"), help="M-BEIR folder with a train split")
        verb.add_argument("--threads", type=int, default=1)
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the Markdown")
        if name != "capacity":
            verb.add_argument("--tasks", type=_words, default=_words(TASKS), help=f"train rows, such as {TASKS}")
            verb.add_argument("--chunk-tokens", type=int, default=0, help="padded tokens of a chunk; 0: the preset's")
    made["throughput"].add_argument("--batch", type=_numbers, default=(32,), help="pairs of a batch")
    made["throughput"].add_argument("--rounds", type=int, default=9, help="each is one batch of every task on both sides")
    made["throughput"].add_argument("--at-least", type=float, metavar="RATIO", help="bound on the ratio, such as 1.5")
    made["memory"].add_argument("--batch", type=_numbers, default=(64, 1024), help="batch sizes, smallest first")
    made["memory"].add_argument("--pairs", type=int, default=1024, help="pairs that each process trains on, at least a batch")
    made["memory"].add_argument("--at-most", type=float, metavar="RATIO", help="bound on the ratio of the peaks with GradCache")
    made["memory"].add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    made["memory"].add_argument("--cache", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    grown = made["capacity"]
    grown.add_argument(
        "--batch", type=_numbers, default=(64, 128, 256, 512, 1024), help="growing batch sizes; the last is the aim"
    )
    grown.add_argument(
        "--chunk-tokens", type=_numbers, default=(16384, 8192, 4096), help="tokens of a chunk to try, largest first"
    )
    grown.add_argument(
        "--seconds", type=float, default=20.0, help="after a step that takes this long only the last batch is tried"
    )
    grown.add_argument(
        "--lengths", type=_lengths, default=Lengths(), metavar="Q,P,R,C", help="tokens: query, its image, reasoning, candidate"
    )
    verbs.add_parser("cards")
    types = verbs.add_parser("precision")
    types.add_argument("--preset", choices=PRESETS, default="emoji", help="what is trained, from random weights")
    types.add_argument("--data", type=Path, default=Path("data/minibeir"), help="M-BEIR folder with a train split")
    types.add_argument("--width", type=int, default=0, help="of the language model, a multiple of 32; 0: the preset's")
    types.add_argument("--batch", type=int, default=64)
    types.add_argument("--rounds", type=int, default=5, help="batches that both types take")
    types.add_argument("--threads", type=int, default=1)
    types.add_argument("--seed", type=int, default=0)
    types.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the Markdown")
    types.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measurement not in ("precision", "cards") and options.precision is None:
        options.precision = "bf16" if bfloat16_on(options.device).fast else "float32"
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _words(text))


def _lengths(text: str) -> Lengths:
    return Lengths(*_numbers(text))


if __name__ == "__main__":
    sys.exit(main())
