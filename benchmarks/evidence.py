"""Recomputes the README's quick claims on the bundled model and says which still hold; exit status 1 if one does not.

`python -m benchmarks.evidence` takes data/minibeir, or builds MiniBEIR's full test split (minutes, once), scores the bundled
checkpoint by every route, and measures the encoder. `--write` also rewrites the measured part of docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import encoder as encoder_benchmark
from traceir.checkpoint import bundled_model
from traceir.encoder import Encoder
from traceir.evaluation.evaluate import evaluate
from traceir.evaluation.results import QueryOutcome, read_outcomes
from traceir.minibeir.build import build

WHOLE, TEST = Path("data/minibeir"), Path("data/minibeir-test")
OUT = Path("out/evidence")
DOC = Path("docs/evidence.md")
OPENING, CLOSING = "<!-- measured: begin -->", "<!-- measured: end -->"
ROUTES: tuple[Any, ...] = ("auto", "direct", "reason")


@dataclass(frozen=True)
class Figure:
    """One claim: what was promised, what was measured, whether it holds."""

    claim: str
    bound: str
    value: str
    holds: bool


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite the measured part of {DOC}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = WHOLE if (WHOLE / "meta.json").is_file() else build(TEST, scale="full", splits=("test",))
    encoder = Encoder.from_pretrained(bundled_model())
    results = evaluate(encoder, data, OUT / encoder.fingerprint, routes=ROUTES)
    assert results is not None
    judged = {route: read_outcomes(OUT / encoder.fingerprint / f"queries-{route}.jsonl") for route in ROUTES}
    figures = [*quality(results), *routing(judged["auto"]), *forced(judged), *speed(data)]
    text = table(figures, encoder.fingerprint, str(results["data"]))
    print(text)
    if options.write:
        rewrite(text)
    return 0 if all(figure.holds for figure in figures) else 1


def quality(results: dict[str, Any]) -> list[Figure]:
    """The average over the 16 rows and the lowest row."""
    mean, lowest = results["average"]["auto"]["mean"], results["average"]["auto"]["lowest"]
    return [
        Figure("MiniBEIR, 16 rows, route auto: average (hit@5; hit@10 fashion)", ">= 80", f"{100 * mean:.2f}", mean >= 0.80),
        Figure("its lowest row", ">= 50", f"{100 * lowest:.1f}", lowest >= 0.50),
    ]


def routing(judged: list[QueryOutcome]) -> list[Figure]:
    """Routing query by query against the label, everywhere and within rows that hold both kinds."""
    kinds: dict[str, set[bool]] = {}
    for outcome in judged:
        kinds.setdefault(outcome.row, set()).add((outcome.steps or 0) >= 2)
    mixed = {row for row, complexities in kinds.items() if len(complexities) == 2}
    figures = []
    for which, chosen in (("all rows", judged), ("mixed rows", [outcome for outcome in judged if outcome.row in mixed])):
        simple = _share([outcome.route == "reason" for outcome in chosen if (outcome.steps or 0) < 2])
        complex_ = _share([outcome.route == "reason" for outcome in chosen if (outcome.steps or 0) >= 2])
        figures.append(Figure(f"simple queries that reason, {which}", "<= 5 %", f"{100 * simple:.1f} %", simple <= 0.05))
        figures.append(Figure(f"complex queries that reason, {which}", ">= 90 %", f"{100 * complex_:.1f} %", complex_ >= 0.90))
    return figures


def forced(judged: dict[str, list[QueryOutcome]]) -> list[Figure]:
    """What thinking is worth: complex queries by their own route against the forced bypass."""
    hits = {route: _share([own.rank == 1 for own in judged[route] if (own.steps or 0) >= 2]) for route in ("auto", "direct")}
    gain = 100 * (hits["auto"] - hits["direct"])
    value = f"{100 * hits['auto']:.1f} against {100 * hits['direct']:.1f}"
    return [Figure("complex queries, R@1: auto against forced bypass", "auto higher", value, gain > 0)]


def speed(data: Path) -> list[Figure]:
    """The encoder benchmark on fewer queries than its own default run."""
    file = OUT / "encoder.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    encoder_benchmark.main(
        ["--model", str(bundled_model()), "--data", str(data), "--queries", "64", "--threads", "1", "--out", str(file)]
    )
    parts = json.loads(file.read_text())["parts"]
    auto, batch = parts["auto_to_direct"], parts["batch_to_generate"]
    least = min(parts[name]["least_cosine"] for name in ("same_as_generate", "batch_as_singles"))
    return [
        Figure("queries/s of auto to direct, simple queries", ">= 0.95", f"{auto['ratio']:.3f}", auto["ratio"] >= 0.95),
        Figure("queries/s of batched auto to a generate loop", ">= 5", f"{batch['ratio']:.1f}", batch["ratio"] >= 5),
        Figure("least cosine to generate and to singles", ">= 0.9999", f"{least:.7f}", least >= 0.9999),
    ]


def table(figures: Sequence[Figure], model: str, data: str) -> str:
    lines = [
        f"Model `{model}`, data `{data[:16]}` (MiniBEIR full, seed 0, test split), {platform.machine()}, {os.cpu_count()} cores, "
        f"1 thread, torch {torch.__version__}. Command: `make evidence`.",
        "",
        "| claim | bound | figure | holds |",
        "|---|---|---|---|",
        *(f"| {f.claim} | {f.bound} | {f.value} | {'yes' if f.holds else '**no**'} |" for f in figures),
    ]
    return "\n".join(lines)


def rewrite(text: str) -> None:
    """Replaces the part of docs/evidence.md between its two marks."""
    before, rest = DOC.read_text().split(OPENING)
    _, after = rest.split(CLOSING)
    fresh = DOC.with_suffix(".tmp")
    fresh.write_text(f"{before}{OPENING}\n{text}\n{CLOSING}{after}")
    os.replace(fresh, DOC)


def _share(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    sys.exit(main())
