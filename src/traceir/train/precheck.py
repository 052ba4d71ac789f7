"""A trial before the first step: the longest samples of every task go forward and backward once, and the gradient is thrown away.

What would fail hours later, on the one batch that holds the longest texts and the largest images, fails here, with the numbers
that have to change. The longest are found by their texts, among at most `SCANNED` samples of each task; images are not opened
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
from traceir.train.batches import TrainBatch, TrainBatches

log = logging.getLogger(__name__)

SCANNED: Final = 2048


def precheck(batches: TrainBatches, run: Callable[[TrainBatch], object], device: torch.device) -> None:
    """Runs one batch of the longest samples of the task that has the longest; TrainError naming them if memory runs out."""
    schedule = batches.schedule
    drawn = [schedule.tasks[number] for number in sorted(set(schedule.chosen.tolist()))]
    longest = {task.name: _longest(task, schedule.batch) for task in drawn}
    name = max(longest, key=lambda name: _length(longest[name][0]))
    batch = batches.batch(len(batches), name, longest[name])
    widest = max(chunk.batch.ids.shape[1] for chunk in batch.chunks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run(batch)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"memory runs out on the longest samples (task {name}, {widest} tokens, queries {', '.join(batch.queried[:4])}, "
            "...): lower chunk_tokens, set grad_cache=true and checkpointing=true, or cut max_text_tokens"
        ) from error
    on_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.info("the longest samples (%s, %d tokens) fit: peak %.2f GiB", name, widest, peak / 2**30)


def _longest(task: TaskData, rows: int) -> list[Example]:
    """The `rows` samples with the most text, longest first; fewer are repeated."""
    draw = np.random.default_rng(0)
    places = dict.fromkeys(np.linspace(0, len(task) - 1, min(len(task), SCANNED)).astype(int).tolist())
    examples = sorted((task.example(place, draw) for place in places), key=_length, reverse=True)[:rows]
    return [examples[row % len(examples)] for row in range(rows)]


def _length(example: Example) -> int:
    candidate = example.candidate.text if example.candidate is not None else ""
    return len(example.query.text) + len(example.completion) + len(candidate) + len(example.described)
