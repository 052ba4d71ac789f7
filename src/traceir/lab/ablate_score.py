"""The evaluation of one run of the ablations: its checkpoint, a pipeline of two others, or the speed of their routes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.evaluation.evaluate import choose_tasks, evaluate
from traceir.evaluation.judged import QueryOutcome, read_outcomes
from traceir.items import Encoding, Query, Route
from traceir.lab.ablations import TIMED, AblationRun
from traceir.train.config import TrainConfig

LOST: Final = 11
"""Ranks are kept up to 10; this stands for all beyond."""
SPEED_QUERIES: Final = 128
SPEED_ROUNDS: Final = 5


def score(run: AblationRun) -> dict[str, Any]:
    """Evaluates a run as its variant says: its checkpoint, the pipeline of two others, or their speed."""
    torch.set_num_threads(run.config.threads)
    if run.variant.work == "speed":
        return measure_speed(run)
    checkpoints = [folder / "checkpoint" for folder in run.uses or (run.folder,)]
    encoders = [Encoder.from_pretrained(checkpoint, device=device_of(run.config)) for checkpoint in checkpoints]
    encoder = TwoStage(*encoders) if run.variant.work == "pipeline" else encoders[0]
    out = run.folder / "evaluation"
    shutil.rmtree(out, ignore_errors=True)
    routes, cache = run.variant.routes, run.folder / "embeddings"
    results = evaluate(encoder, Path(run.config.data), out, routes=routes, rows=run.rows, cache=cache, progress=False)
    assert results is not None
    return {"data": results["data"], "routes": {route: outcomes_by_row(out / f"queries-{route}.jsonl") for route in routes}}


def outcomes_by_row(file: Path) -> dict[str, dict[str, Any]]:
    """Row: shares of hits, routing, length and exactness of the reasoning, and each query's rank (up to LOST), in file order."""
    judged = read_outcomes(file)
    rows = {row: [one for one in judged if one.row == row] for row in dict.fromkeys(one.row for one in judged)}
    return {row: _outcome(own) for row, own in rows.items()}


def _outcome(judged: Sequence[QueryOutcome]) -> dict[str, Any]:
    count = len(judged)
    exact = [one.exact for one in judged if one.exact is not None]
    return {
        "queries": count,
        **{f"hit@{k}": sum(one.rank <= k for one in judged) / count for k in (1, 5, 10)},
        "reasoned": sum(one.route == "reason" for one in judged) / count,
        "tokens_per_query": sum(one.tokens for one in judged) / count,
        "truncated": sum(one.truncated for one in judged) / count,
        "exact": sum(exact) / len(exact) if exact else None,
        "ranks": [min(one.rank, LOST) for one in judged],
    }


class TwoStage(Encoder):
    """One model writes, another encodes: what the writer wrote is put behind the query's text, which goes by the direct route.

    Candidates are the second model's. The Encodings have the writer's route and words with the second model's vector.
    """

    def __init__(self, writer: Encoder, second: Encoder) -> None:
        super().__init__(second.model)
        self.writer = writer

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} after {self.writer.fingerprint}"

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        written = self.writer.encode_queries(queries, route=route, progress=progress)
        longer = [append_text(query, one.reasoning) for query, one in zip(queries, written, strict=True)]
        encoded = super().encode_queries(longer, route="direct", progress=progress)
        return [replace(first, vector=second.vector) for first, second in zip(written, encoded, strict=True)]


def append_text(query: Query, written: str) -> Query:
    """The query with these words behind its last text, or as its text where it has none."""
    texts = [number for number, part in enumerate(query.parts) if isinstance(part, str)]
    if not written or not texts:
        return replace(query, parts=(*query.parts, written)) if written else query
    last = texts[-1]
    return replace(query, parts=(*query.parts[:last], f"{query.parts[last]} {written}", *query.parts[last + 1 :]))


def measure_speed(run: AblationRun) -> dict[str, Any]:
    """Times TIMED on the first queries of each row: one warm-up, then rounds of one after the other."""
    device, data = device_of(run.config), Path(run.config.data)
    encoders = {folder.parent.name: Encoder.from_pretrained(folder / "checkpoint", device=device) for folder in run.uses}
    instructions = mbeir.read_instructions(data)
    speeds: dict[str, Any] = {}
    for task in choose_tasks(mbeir.find_tasks(data, "test"), run.rows, data):
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        records = islice(mbeir.read_queries(task.query_path), SPEED_QUERIES)
        queries = [mbeir.to_query(record, prompt, data) for record in records]
        seconds: dict[str, list[float]] = {f"{name}:{route}": [] for name, route in TIMED}
        for _ in range(SPEED_ROUNDS + 1):
            for name, route in TIMED:
                begun = time.perf_counter()
                encoders[name].encode_queries(queries, route=route)
                seconds[f"{name}:{route}"].append(time.perf_counter() - begun)
        times = relative_speeds({way: own[1:] for way, own in seconds.items()})
        speeds[task.name] = {"queries": len(queries), **times}
    return {"speed": speeds}


def relative_speeds(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Speed of each way as a multiple of the first's: the median over rounds of the ratio within a round."""
    first = next(iter(seconds.values()))
    relative = {name: float(np.median(np.array(first) / times)) for name, times in seconds.items()}
    return {"relative": relative, "seconds": {name: list(times) for name, times in seconds.items()}}


def device_of(config: TrainConfig) -> str:
    """The torch device of a run: what `auto` stands for, or what is named."""
    if config.device != "auto":
        return config.device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
