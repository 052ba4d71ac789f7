"""A trial before the first step: the longest samples of every task go forward and backward once, and the gradient is thrown away.

What would fail hours later, on the one turn that holds the longest texts and the largest pictures, fails here, with the numbers
that have to change. The longest are found by their texts, among at most `SCANNED` samples of each task; pictures are not opened
for it.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from traceir.data.samples import Example, TaskData
from traceir.errors import TrainError
from traceir.train.batches import Turn, Turns

log = logging.getLogger(__name__)

SCANNED: Final = 2048


def precheck(turns: Turns, run: Callable[[Turn], object], device: torch.device) -> None:
    """Runs one turn of the longest samples of the task that has the longest; TrainError naming them if memory runs out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drawn = [turns.schedule.tasks[number] for number in sorted(set(turns.schedule.chosen.tolist()))]
    found = max(((_longest(task, turns.schedule.batch), task) for task in drawn), key=lambda one: _length(one[0][0]))
    examples, task = found
    turn = turns.turn(len(turns), task.name, examples)
    widest = max(chunk.batch.ids.shape[1] for chunk in (*turn.queries, *turn.candidates))
    try:
        run(turn)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"memory runs out on the longest samples (task {task.name}, {widest} tokens, queries {', '.join(turn.asked[:4])}, "
            "...): "
            "lower chunk_tokens, set grad_cache=true and checkpointing=true, or cut max_text_tokens"
        ) from error
    log.info("the longest samples (%s, %d tokens) fit: peak %.2f GiB", task.name, widest, peak_gib(device))


def peak_gib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _longest(task: TaskData, rows: int) -> list[Example]:
    """The `rows` samples with the most text, longest first; fewer are repeated."""
    draw = np.random.default_rng(0)
    places = np.linspace(0, len(task) - 1, min(len(task), SCANNED)).astype(int)
    seen = sorted((task.example(int(place), draw) for place in dict.fromkeys(places.tolist())), key=_length, reverse=True)[:rows]
    return [seen[row % len(seen)] for row in range(rows)]


def _length(example: Example) -> int:
    candidate = example.candidate.text if example.candidate is not None else ""
    return len(example.query.text) + len(example.completion) + len(candidate) + len(example.described)
