"""Whether an SGLang server gives what the in-process encoder gives, and how much faster: run it where the GPU is.

The same queries go through both by `direct`, which computes the same tokens on both sides, and by `auto`, where each side writes
for itself; the same contents go through both as candidates. Speeds are taken in pairs. Commands: docs/engines.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.encoder import Labelled, read_labelled, sample
from traceir.encoder import Encoder
from traceir.engines.sglang import SGLangEncoder
from traceir.errors import InputError, TraceError
from traceir.items import Encoding, Item
from traceir.model import load


@dataclass(frozen=True)
class Parity:
    """How alike the two sides are over the same inputs.

    Cosines of all, and of those whose text (and so every token) is the same; shares of the same route and text; the greatest
    difference of P(`<|emb|>`) at the first step; inputs that differ in route or text.
    """

    inputs: int
    least_cosine: float
    median_cosine: float
    least_cosine_same_text: float
    same_route: float
    same_text: float
    probability_gap: float
    truncated: tuple[int, int]
    unlike: list[str]


@dataclass(frozen=True)
class Speed:
    """Inputs/s of both sides (medians) and the median ratio of neighbouring runs, engine to in-process."""

    engine_per_second: float
    here_per_second: float
    ratio: float
    seconds: list[tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
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
    """All parts, and on what they were measured."""
    chosen = sample(read_labelled(options.data, "test"), options.queries, np.random.default_rng(options.seed), 0, 99)
    encoder = Encoder(load(options.model, device=options.device, dtype=getattr(torch, options.dtype)))
    with SGLangEncoder(options.engine, options.model, api_key=options.api_key, in_flight=options.in_flight) as engine:
        results: dict[str, Any] = {
            "format": 1,
            "model": encoder.fingerprint,
            "queries": len(chosen),
            "seed": options.seed,
            "in_flight": options.in_flight,
            "machine": {"device": _device(options.device), "dtype": options.dtype, "torch": torch.__version__},
            "parity": {name: asdict(parity) for name, parity in _parities(engine, encoder, chosen).items()},
        }
        if options.repetitions:
            results["speed"] = asdict(_speed(engine, encoder, chosen, options.repetitions))
    return results


def _parities(engine: SGLangEncoder, encoder: Encoder, chosen: Sequence[Labelled]) -> dict[str, Parity]:
    queries = [example.query for example in chosen]
    names = [f"{example.row} {example.query.id}" for example in chosen]
    items = [Item(query.parts) for query in queries if query.parts]
    return {
        "direct": compare(engine.encode_queries(queries, route="direct"), encoder.encode_queries(queries, route="direct"), names),
        "auto": compare(engine.encode_queries(queries), encoder.encode_queries(queries), names),
        "items": compare(engine.encode_items(items), encoder.encode_items(items), [str(index) for index in range(len(items))]),
    }


def compare(ours: Sequence[Encoding], theirs: Sequence[Encoding], names: Sequence[str]) -> Parity:
    """The engine's encodings against the in-process ones."""
    pairs = list(zip(ours, theirs, strict=True))
    cosines = [float(own.vector.astype(np.float64) @ other.vector.astype(np.float64)) for own, other in pairs]
    if not np.isfinite(cosines).all():
        raise InputError("a vector is not finite; look at the engine's log")
    route = [own.route == other.route for own, other in pairs]
    text = [own.reasoning == other.reasoning and alike for (own, other), alike in zip(pairs, route, strict=True)]
    return Parity(
        len(pairs),
        min(cosines),
        statistics.median(cosines),
        min((cosine for cosine, alike in zip(cosines, text, strict=True) if alike), default=float("-inf")),
        float(np.mean(route)),
        float(np.mean(text)),
        max(abs(own.emb_probability - other.emb_probability) for own, other in pairs),
        (sum(encoding.truncated for encoding in ours), sum(encoding.truncated for encoding in theirs)),
        [name for name, alike in zip(names, text, strict=True) if not alike],
    )


def _speed(engine: SGLangEncoder, encoder: Encoder, chosen: Sequence[Labelled], repetitions: int) -> Speed:
    """Both sides by `auto`, in turn; each was run once before."""
    queries = [example.query for example in chosen]
    seconds: list[tuple[float, float]] = []
    for repetition in range(repetitions):
        spent: dict[int, float] = {}
        for side in (0, 1) if repetition % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (engine if side == 0 else encoder).encode_queries(queries)
            spent[side] = time.perf_counter() - start
        seconds.append((spent[0], spent[1]))
    return Speed(
        len(queries) / statistics.median(ours for ours, _ in seconds),
        len(queries) / statistics.median(theirs for _, theirs in seconds),
        statistics.median(theirs / ours for ours, theirs in seconds),
        seconds,
    )


def broken_bounds(results: Mapping[str, Any], options: argparse.Namespace) -> list[str]:
    """One line for each bound that does not hold. What is computed over the same tokens must agree, whatever was written."""
    parity = results["parity"]
    wanted = [
        *((name, "least_cosine", options.cosine) for name in ("direct", "items")),
        ("auto", "least_cosine_same_text", options.cosine),
        ("auto", "same_route", options.same_route),
        ("auto", "same_text", options.same_text),
    ]
    failures = [
        f"{name}: {figure} is {parity[name][figure]:.6g}, at least {bound} is asked"
        for name, figure, bound in wanted
        if bound is not None and not parity[name][figure] >= bound
    ]
    if options.at_least is not None and not results.get("speed", {}).get("ratio", 0.0) >= options.at_least:
        failures.append(f"speed: the ratio is below {options.at_least}")
    return failures


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"Model {results['model']}, {results['queries']} queries, seed {results['seed']}, {results['in_flight']} in flight. "
        f"In process: {machine['device']}, {machine['dtype']}, torch {machine['torch']}.\n",
        "| engine, in-process | inputs | least cosine | median | least, same text | same route | same text | P gap | truncated |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, parity in results["parity"].items():
        lines.append(
            f"| {name} | {parity['inputs']} | {parity['least_cosine']:.6f} | {parity['median_cosine']:.6f} "
            f"| {parity['least_cosine_same_text']:.6f} | {100 * parity['same_route']:.2f} % | {100 * parity['same_text']:.2f} % "
            f"| {parity['probability_gap']:.2g} | {parity['truncated'][0]}, {parity['truncated'][1]} |"
        )
    if speed := results.get("speed"):
        lines.append(
            f"\n{speed['engine_per_second']:.1f} queries/s by the engine, {speed['here_per_second']:.1f} in process, "
            f"ratio **{speed['ratio']:.2f}** (median of {len(speed['seconds'])} pairs)."
        )
    return "\n".join(lines)


def _device(name: str) -> str:
    return str(torch.cuda.get_device_name(name)) if name.startswith("cuda") else platform.processor() or platform.machine()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, metavar="URL", help="the SGLang server, such as http://localhost:30000")
    parser.add_argument("--model", required=True, help="the checkpoint directory that it serves")
    parser.add_argument("--data", required=True, type=Path, help="MiniBEIR folder")
    parser.add_argument("--queries", type=int, default=256, help="at most so many, evenly over the rows")
    parser.add_argument("--repetitions", type=int, default=5, help="timed pairs; 0 times nothing")
    parser.add_argument("--in-flight", type=int, default=64, help="requests under way at the engine")
    parser.add_argument("--device", default="cuda", help="of the in-process side")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the in-process side")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--seed", type=int, default=0, help="draws the queries")
    parser.add_argument("--out", type=Path, help="JSON file, such as benchmarks/results/engine.json")
    parser.add_argument("--cosine", type=float, help="bound on the least cosine over the same tokens, such as 0.999")
    parser.add_argument("--same-route", type=float, metavar="SHARE", help="bound, such as 0.98")
    parser.add_argument("--same-text", type=float, metavar="SHARE", help="bound, such as 0.9")
    parser.add_argument("--at-least", type=float, metavar="RATIO", help="bound on the ratio of queries/s")
    options = parser.parse_args(arguments)
    if options.queries < 1 or options.in_flight < 1 or options.repetitions < 0:
        parser.error("--queries and --in-flight start at 1, --repetitions at 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
