"""The loop of training: batches in their order, forward and backward (gradcache.py), clipping, AdamW, log, resume points.

accelerate gives the device, mixed precision, DDP and trackers. A run folder's `steps/NNNNNN/` holds the checkpoint as it stands,
`optimiser.safetensors` and `step.json`, written beside and renamed; no pickles. They hold whole tensors, so that a run may go on
with another number of processes, sharded (shard.py) or not. No random state is kept: every draw of a run is a function of (seed,
batch, chunk, rank).
"""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from traceir.data.samples import Example, TaskData
from traceir.errors import TrainError
from traceir.files import replacing_folder
from traceir.train.batches import TrainBatch, TrainBatches
from traceir.train.config import TrainConfig, nested_widths
from traceir.train.gradcache import Distribution, Objective, Reader, step
from traceir.train.shard import fetched, gathered, own_part, shard

log = logging.getLogger(__name__)

STATE: Final = "step.json"
OPTIMISER: Final = "optimiser.safetensors"
SCANNED: Final = 2048
KNOWN: Final = 20
"""Batches of a task before a loss of it can count as diverged."""
Check = Callable[[dict[str, float]], None]
SaveModel = Callable[[Path, dict[str, torch.Tensor] | None], None]
"""Writes a whole checkpoint of the model as it stands; given are the whole weights where this process holds only a part."""


class Loop:
    """Trains a Reader over the batches of a run. Raises TrainError that names task and queries where a loss is not finite, or is
    `diverged` times what it was on average (0: never)."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, reader: Reader, batches: TrainBatches, save_model: SaveModel
    ) -> None:
        self.config, self.accelerator, self.batches, self.write_model = config, accelerator, batches, save_model
        self.reader, self.out, self.device = reader, Path(config.out), accelerator.device
        self.objective = Objective(
            config.lambda_gen, config.lambda_ret, config.symmetric, config.distil, config.direct_ret,
            nested_widths(config, reader.model.width),
        )  # fmt: skip
        if config.shard:
            shard(reader, self.device)
        # What accelerate calls evaluation is a model without DDP around it.
        self.model: Any = accelerator.prepare_model(reader, evaluation_mode=config.shard)
        # Matrices decay (paper, section 2); vectors such as norms and biases do not.
        trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]
        matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta), eps=1e-8)
        self.done, self.started = 0, time.monotonic()
        self.sums: dict[str, list[float]] = {}
        self.usual: dict[str, list[float]] = {}

    def run(self, resumed: Path | None) -> None:
        """Trains from the step folder `resumed`, or from the start, to the last step."""
        config = self.config
        if resumed is not None:
            self._read_state(resumed)
        self.model.train()
        if config.precheck and self.done < config.steps:
            precheck(self.batches, lambda batch: self._train_on(batch, last=True), self.device)
            self.optimiser.zero_grad()
        bar = tqdm(
            desc="training", initial=self.done, total=config.steps, mininterval=5.0, disable=not self.accelerator.is_main_process
        )
        # Each process makes its own share of every batch, so nothing is sharded or sent between them.
        numbers, ahead = range(self.done * config.accumulate, len(self.batches)), 4 if config.workers else None
        batches = iter(
            DataLoader(self.batches, batch_size=None, sampler=numbers, num_workers=config.workers, prefetch_factor=ahead)
        )
        while self.done < config.steps:
            rate, norm = self._step(batches)
            bar.update()
            if self.done % config.log_every == 0:
                self._log(rate, norm)
            if self.done % config.save_every == 0 or self.done in (config.steps, *config.keep):
                self._save_step()
        bar.close()

    def _step(self, batches: Iterator[TrainBatch]) -> tuple[float, float]:
        """One step of the optimiser over `accumulate` batches; returns its learning rate and the gradient's norm."""
        config = self.config
        rate = config.learning_rate * config.rate(self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for number in range(config.accumulate):
            batch = next(batches)
            losses = self._train_on(batch, last=number == config.accumulate - 1, check=partial(self._check, batch))
            for name, value in losses.items():
                self.sums.setdefault(f"{batch.task}/{name}", []).append(value)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip if config.clip > 0 else math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        return rate, float(norm)

    def _train_on(self, batch: TrainBatch, *, last: bool, check: Check = lambda losses: None) -> dict[str, float]:
        """Forward and backward; the gradients of all processes are summed with the `last` batch of a step."""
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        # Only DDP gains by waiting: shards would have to hold their gradients whole meanwhile.
        no_sync = nullcontext if world == 1 or config.shard else self.model.no_sync
        with nullcontext() if last else no_sync():
            return step(
                self.model, batch.to(self.device), self.objective, cache=config.grad_cache, share=1.0 / config.accumulate,
                seed=config.seed, ranks=Distribution(rank, world, no_sync, even=config.shard), check=check,
            )  # fmt: skip

    def _check(self, batch: TrainBatch, losses: dict[str, float]) -> None:
        total, limit = self.objective.total(losses), self.config.diverged
        where = f"step {self.done}: loss of {batch.task} is {total:.4g} on queries {', '.join(batch.queried)}"
        if not math.isfinite(total):
            raise TrainError(f"{where}; lower the learning rate, or look at these queries")
        count, mean = self.usual.get(batch.task, (0.0, 0.0))
        if limit and count >= KNOWN and total > limit * max(mean, 1.0):
            raise TrainError(
                f"{where}, {total / max(mean, 1e-9):.0f} times what it was; the newest step folder is from before: lower "
                "learning_rate and go on from it, look at these queries, or raise `diverged`"
            )
        self.usual[batch.task] = [count + 1, total if not count else 0.95 * mean + 0.05 * total]

    def _log(self, rate: float, norm: float) -> None:
        """A line of log.jsonl, and the same to the trackers: the mean of each task's terms since the line before."""
        means = {name: round(sum(values) / len(values), 6) for name, values in sorted(self.sums.items())}
        self.sums.clear()
        line = {"seconds": round(time.monotonic() - self.started, 1), **means, "rate": rate, "norm": round(norm, 6)}
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a") as journal:
                journal.write(json.dumps({"step": self.done, **line}) + "\n")
        self.accelerator.log({f"train/{name}": value for name, value in line.items()}, step=self.done)

    def _save_step(self) -> None:
        """A step folder, renamed into place by the first process when every process has given its part."""
        steps, main = self.out / "steps", self.accelerator.is_main_process
        with replacing_folder(steps / f"{self.done:06d}") if main else nullcontext(steps) as fresh:
            self.save_model(fresh)
            self._write_optimiser(fresh / OPTIMISER)
            if main:
                (fresh / STATE).write_text(json.dumps({"step": self.done, "sums": self.sums, "usual": self.usual}))
        for old in steps.iterdir() if main else ():
            if not old.name.isdigit() or (int(old.name) < self.done and int(old.name) not in self.config.keep):
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def save_model(self, target: Path) -> None:
        main = self.accelerator.is_main_process
        state = gathered(self.reader, keep=main) if self.config.shard else None
        if main:
            self.write_model(target, state)

    def _write_optimiser(self, file: Path) -> None:
        main = self.accelerator.is_main_process
        flat = {
            f"{number}.{key}": fetched(value, keep=main).contiguous()
            for number, entry in self.optimiser.state_dict()["state"].items()
            for key, value in entry.items()
        }
        if main:
            save_file({**flat, "log_temperature": self.reader.log_temperature.detach().clone()}, file)

    def _read_state(self, folder: Path) -> None:
        """Step, sums, AdamW's state and the temperature of a step folder; its weights are in the model already."""
        kept = json.loads((folder / STATE).read_text())
        self.done, self.sums, self.usual = kept["step"], kept.get("sums", {}), kept.get("usual", {})
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        with safe_open(folder / OPTIMISER, framework="pt") as file:
            for key in sorted(set(file.keys()) - {"log_temperature"}):
                number, _, name = key.partition(".")
                state.setdefault(int(number), {})[name] = own_part(file.get_tensor(key), parameters[int(number)])
            with torch.no_grad():
                self.reader.log_temperature.copy_(file.get_tensor("log_temperature"))
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})


def newest_step(out: Path) -> Path | None:
    """The newest whole step folder of a run."""
    return max((folder for folder in (out / "steps").glob("[0-9]*") if (folder / STATE).is_file()), default=None)


def step_of(folder: Path | None) -> int:
    """The step that a step folder was written at; 0 for None."""
    return int(json.loads((folder / STATE).read_text())["step"]) if folder is not None else 0


def precheck(batches: TrainBatches, run: Callable[[TrainBatch], object], device: torch.device) -> None:
    """A trial before the first step: one batch of the longest samples of the task that has the longest.

    What would fail hours later, on the batch that holds the longest texts and the largest images, fails here, as a TrainError
    with the numbers that have to change. They are found by their texts, among `SCANNED` samples of each task; images are not
    opened for it.
    """
    schedule, on_cuda = batches.schedule, device.type == "cuda"
    drawn = [schedule.tasks[number] for number in sorted(set(schedule.chosen.tolist()))]
    longest = {task.name: _longest(task, schedule.batch) for task in drawn}
    name = max(longest, key=lambda name: _length(longest[name][0]))
    batch = batches.batch(len(batches), name, longest[name])
    widest = max(chunk.batch.ids.shape[1] for chunk in batch.chunks)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run(batch)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"memory runs out on the longest samples (task {name}, {widest} tokens, queries {', '.join(batch.queried[:4])}, "
            "...): lower chunk_tokens, set grad_cache=true and checkpointing=true, or cut max_text_tokens"
        ) from error
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.info("the longest samples (%s, %d tokens) fit: peak %.2f GiB", name, widest, peak / 2**30)


def _longest(task: TaskData, rows: int) -> list[Example]:
    """The `rows` samples with the most text, longest first; fewer are repeated."""
    draw = np.random.default_rng(0)
    numbers = dict.fromkeys(np.linspace(0, len(task) - 1, min(len(task), SCANNED)).astype(int).tolist())
    examples = sorted((task.example(number, draw) for number in numbers), key=_length, reverse=True)[:rows]
    return [examples[row % len(examples)] for row in range(rows)]


def _length(example: Example) -> int:
    candidate = example.candidate.text if example.candidate is not None else ""
    return len(example.query.text) + len(example.completion) + len(candidate) + len(example.described)
