"""What the adaptive encoder costs and whether batching changes its results, measured on one checkpoint in one process.

(a) queries/s of route `auto` against route `direct` on simple queries: the price of being able to reason.
(b) queries/s of batched `auto` against transformers' own `generate`, one query at a time, on complex queries; same vectors?
(c) a batch of n against n singles, over queries of every row; same vectors, same reasoning?

Speeds are compared in pairs: every repetition runs both sides one after the other, the order alternates, and the figure is the
median of the repetitions' ratios, so that a machine that slows down for a while slows both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError, TraceError
from traceir.items import Query, Vector
from traceir.model import TraceModel, load
from traceir.prompts import PAD, TURN_END, render_query

LEAST_REPETITIONS = 7


@dataclass(frozen=True)
class Labelled:
    """One query of a data folder with its row and number of steps."""

    row: str
    steps: int
    query: Query


@dataclass(frozen=True)
class Speed:
    """Paired repetitions of two sides over the same queries: queries/s (medians) and the ratio first to second."""

    queries: int
    rows: int
    reasoned: float
    first_per_second: float
    second_per_second: float
    ratio: float
    least_ratio: float
    greatest_ratio: float
    cpu_ratio: float
    seconds: list[tuple[float, float]]


@dataclass(frozen=True)
class Sameness:
    """How alike two ways to encode the same queries are; `unlike` names the queries whose reasoning differs."""

    queries: int
    rows: int
    reasoned: float
    truncated: int
    least_cosine: float
    same_text: float
    unlike: list[str]


Written = tuple[Vector, str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        results = measure(options)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failures = broken_bounds(results, options)
    for failure in failures:
        print(f"bound does not hold: {failure}", file=sys.stderr)
    return 1 if failures else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All chosen parts; the header says what was measured, on what, and where."""
    model = load(options.model, device=options.device)
    encoder = Encoder(model)
    by_row = read_labelled(options.data, options.split)
    draw = np.random.default_rng(options.seed)
    results: dict[str, Any] = {**_header(options, model), "parts": {}}
    parts = results["parts"]
    if "a" in options.parts:
        simple = sample(by_row, options.queries, draw, 0, 1)
        parts["auto_to_direct"] = asdict(auto_against_direct(encoder, simple, options.repetitions))
    if "b" in options.parts:
        complex_ = sample(by_row, options.queries, draw, 2, 99)
        speed, same = batch_against_generate(encoder, complex_, options.repetitions)
        parts["batch_to_generate"], parts["same_as_generate"] = asdict(speed), asdict(same)
    if "c" in options.parts:
        mixed = sample(by_row, options.queries, draw, 0, 99)
        parts["batch_as_singles"] = asdict(batch_against_singles(encoder, mixed))
    return results


def read_labelled(data: Path, split: mbeir.Split) -> dict[str, list[Labelled]]:
    """The queries of every row that have a label, under each row's first instruction."""
    instructions = mbeir.read_instructions(data)
    labelled: dict[str, list[Labelled]] = {}
    for task in mbeir.find_tasks(data, split):
        labels = mbeir.read_labels(task.labels_path)
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        records = [record for record in mbeir.read_queries(task.query_path) if record.qid in labels]
        if records:
            labelled[task.name] = [
                Labelled(task.name, labels[record.qid].steps, mbeir.to_query(record, prompt, data)) for record in records
            ]
    if not labelled:
        raise DataError(f"{data} has no labels in cot/{split}; this benchmark needs a MiniBEIR folder")
    return labelled


def sample(
    by_row: Mapping[str, Sequence[Labelled]], count: int, draw: np.random.Generator, low: int, high: int
) -> list[Labelled]:
    """At most `count` queries of `low` to `high` steps, spread evenly over the rows that have such, in random order."""
    kinds = [[example for example in own if low <= example.steps <= high] for own in by_row.values()]
    shuffled = [[own[index] for index in draw.permutation(len(own))] for own in kinds if own]
    spread = [own[rank] for rank in range(max(map(len, shuffled), default=0)) for own in shuffled if rank < len(own)]
    if not spread:
        raise DataError(f"the data folder has no query of {low} to {high} steps; choose other --parts")
    chosen = spread[:count]
    return [chosen[index] for index in draw.permutation(len(chosen))]


def auto_against_direct(encoder: Encoder, chosen: Sequence[Labelled], repetitions: int) -> Speed:
    queries = [example.query for example in chosen]
    reasoned = [encoding.route == "reason" for encoding in encoder.encode_queries(queries)]
    encoder.encode_queries(queries, route="direct")  # warm-up, like the line before
    return _time_pairs(
        lambda: encoder.encode_queries(queries, route="auto"),
        lambda: encoder.encode_queries(queries, route="direct"),
        chosen,
        float(np.mean(reasoned)),
        repetitions,
    )


def batch_against_generate(encoder: Encoder, chosen: Sequence[Labelled], repetitions: int) -> tuple[Speed, Sameness]:
    _check_comparable(encoder)
    queries = [example.query for example in chosen]
    batched = encoder.encode_queries(queries)  # warm-up of one side, and its results
    single = [generate_one(encoder, query) for query in queries]  # and of the other
    reasoned = float(np.mean([encoding.route == "reason" for encoding in batched]))
    speed = _time_pairs(
        lambda: encoder.encode_queries(queries),
        lambda: [generate_one(encoder, query) for query in queries],
        chosen,
        reasoned,
        repetitions,
    )
    written = [(encoding.vector, encoding.reasoning) for encoding in batched]
    return speed, _compare(chosen, written, single, reasoned, sum(encoding.truncated for encoding in batched))


def batch_against_singles(encoder: Encoder, chosen: Sequence[Labelled]) -> Sameness:
    queries = [example.query for example in chosen]
    together = encoder.encode_queries(queries)
    alone = [encoder.encode_queries([query])[0] for query in queries]
    return _compare(
        chosen,
        [(encoding.vector, encoding.reasoning) for encoding in together],
        [(encoding.vector, encoding.reasoning) for encoding in alone],
        float(np.mean([encoding.route == "reason" for encoding in together])),
        sum(encoding.truncated for encoding in together),
    )


def generate_one(encoder: Encoder, query: Query) -> Written:
    """The reference: transformers' generate over one query; the vector is the state that predicted the last token."""
    model = encoder.model
    batch = model.processor.collate([model.processor.lay_out(render_query(query, model.settings.prompt_version))])
    batch = batch.to(model.device)
    images: dict[str, Any] = {}
    if batch.patches is not None:
        types = (batch.ids == model.network.config.image_token_id).int()
        images = {"pixel_values": batch.patches, "image_grid_thw": batch.grids, "mm_token_type_ids": types}
    special = model.processor.special
    out = model.network.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        **images,
        do_sample=False,
        max_new_tokens=encoder.budget + 1,
        eos_token_id=[model.processor.emb_id, special[TURN_END]],
        pad_token_id=special[PAD],
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    written = out.sequences[0, batch.ids.shape[1] :].tolist()
    state = out.hidden_states[len(written) - 1][-1][0, -1].float()
    vector: Vector = torch.nn.functional.normalize(state, dim=-1).cpu().numpy()
    return vector, model.processor.decode(written[:-1])


def broken_bounds(results: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    """One line for each stated bound that a measured part misses."""
    wanted = [
        ("auto_to_direct", "ratio", options.at_least_auto),
        ("batch_to_generate", "ratio", options.at_least_batch),
        *((part, "least_cosine", options.cosine) for part in ("same_as_generate", "batch_as_singles")),
        *((part, "same_text", options.same_text) for part in ("same_as_generate", "batch_as_singles")),
    ]
    parts = results["parts"]
    return [
        f"{part}: {name} is {parts[part][name]:.6g}, at least {bound} is asked"
        for part, name, bound in wanted
        if bound is not None and part in parts and not parts[part][name] >= bound
    ]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts, machine = results["parts"], results["machine"]
    lines = [
        f"Model {results['model']}, data {results['data']}, split {results['split']}, seed {results['seed']}, "
        f"{results['repetitions']} paired repetitions. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} thread(s), device {machine['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}.\n",
        "| queries/s | queries | rows | reasoned | first | second | ratio (median) | least | greatest | ratio of CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = {"auto_to_direct": "simple: auto, direct", "batch_to_generate": "complex: batched auto, generate one by one"}
    for part, name in names.items():
        if (figures := parts.get(part)) is not None:
            lines.append(
                f"| {name} | {figures['queries']} | {figures['rows']} | {100 * figures['reasoned']:.1f} % "
                f"| {figures['first_per_second']:.1f} | {figures['second_per_second']:.1f} | **{figures['ratio']:.3f}** "
                f"| {figures['least_ratio']:.3f} | {figures['greatest_ratio']:.3f} | {figures['cpu_ratio']:.3f} |"
            )
    lines += ["", "| same results | queries | rows | reasoned | truncated | least cosine | same reasoning |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    names = {"same_as_generate": "batched auto, generate one by one", "batch_as_singles": "batch of n, n singles"}
    for part, name in names.items():
        if (cost := parts.get(part)) is not None:
            lines.append(
                f"| {name} | {cost['queries']} | {cost['rows']} | {100 * cost['reasoned']:.1f} % | {cost['truncated']} "
                f"| **{cost['least_cosine']:.7f}** | **{100 * cost['same_text']:.2f} %** |"
            )
    return "\n".join(lines)


def _time_pairs(
    first: Callable[[], object], second: Callable[[], object], chosen: Sequence[Labelled], reasoned: float, repetitions: int
) -> Speed:
    """Times both sides in turn, changing which goes first; every ratio is of two neighbours in time."""
    elapsed: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    for repetition in range(repetitions):
        sides = (first, second) if repetition % 2 == 0 else (second, first)
        spent = [_seconds(side) for side in sides]
        ours, theirs = spent if repetition % 2 == 0 else reversed(spent)
        elapsed.append((ours[0], theirs[0]))
        cpu.append((ours[1], theirs[1]))
    ratios = [theirs / ours for ours, theirs in elapsed]
    count = len(chosen)
    return Speed(
        queries=count,
        rows=len({example.row for example in chosen}),
        reasoned=reasoned,
        first_per_second=count / statistics.median(ours for ours, _ in elapsed),
        second_per_second=count / statistics.median(theirs for _, theirs in elapsed),
        ratio=statistics.median(ratios),
        least_ratio=min(ratios),
        greatest_ratio=max(ratios),
        cpu_ratio=statistics.median(theirs / ours for ours, theirs in cpu),
        seconds=elapsed,
    )


def _seconds(side: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one pass. Both sides end in numpy vectors, so a GPU has finished too."""
    started, cpu = time.perf_counter(), time.process_time()
    side()
    return time.perf_counter() - started, time.process_time() - cpu


def _compare(
    chosen: Sequence[Labelled], ours: Sequence[Written], theirs: Sequence[Written], reasoned: float, truncated: int
) -> Sameness:
    cosines = [float(a.astype(np.float64) @ b.astype(np.float64)) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    same = [a == b for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    unlike = [f"{example.row} {example.query.id}" for example, alike in zip(chosen, same, strict=True) if not alike]
    rows = len({example.row for example in chosen})
    # A NaN must not hide behind min(): it is no cosine at all.
    least = min(cosines) if np.isfinite(cosines).all() else float("-inf")
    return Sameness(len(chosen), rows, reasoned, truncated, least, float(np.mean(same)), unlike)


def _check_comparable(encoder: Encoder) -> None:
    settings = encoder.model.settings
    if settings.pooling_position != "before_token":
        raise InputError(
            f"pooling position is {settings.pooling_position!r}; part b compares checkpoints read before the token only"
        )
    if settings.closing:
        raise InputError(f"closing text is {settings.closing!r}; plain generate feeds none, leave part b out (--parts ac)")


def _header(options: argparse.Namespace, model: TraceModel) -> dict[str, Any]:
    about = options.data / "meta.json"
    return {
        "format": 1,
        "model": model.fingerprint,
        "data": json.loads(about.read_text(encoding="utf-8")).get("fingerprint") if about.is_file() else None,
        "split": options.split,
        "seed": options.seed,
        "repetitions": options.repetitions,
        "max_reasoning_tokens": model.settings.max_reasoning_tokens,
        "machine": {
            "processor": _processor_name(options.device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": options.device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _processor_name(device: str) -> str:
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--data", required=True, type=Path, help="MiniBEIR folder (its labels tell simple from complex)")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--queries", type=_positive, default=256, help="at most so many queries a part, evenly over the rows")
    parser.add_argument("--repetitions", type=_positive, default=9, help=f"paired repetitions, at least {LEAST_REPETITIONS}")
    parser.add_argument("--parts", default="abc", help="which of the parts a, b, c to measure")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="draws the queries")
    parser.add_argument("--out", type=Path, help="JSON file, such as benchmarks/results/encoder.json")
    parser.add_argument("--at-least-auto", type=float, metavar="RATIO", help="bound on part a's ratio, such as 0.95")
    parser.add_argument("--at-least-batch", type=float, metavar="RATIO", help="bound on part b's ratio, such as 5")
    parser.add_argument("--cosine", type=float, help="bound on the least cosine of parts b and c, such as 0.9999")
    parser.add_argument("--same-text", type=float, metavar="SHARE", help="bound on the share of equal reasoning, such as 1")
    options = parser.parse_args(arguments)
    if options.repetitions < LEAST_REPETITIONS:
        parser.error(f"--repetitions {options.repetitions}: fewer than {LEAST_REPETITIONS} say little")
    if not options.parts or set(options.parts) - set("abc"):
        parser.error(f"--parts {options.parts!r}: give some of the letters a, b, c")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
