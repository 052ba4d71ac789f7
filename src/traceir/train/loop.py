"""The loop of training: Hugging Face's Trainer with our turns, our step and step folders that are whole or not there.

The Trainer owns launch and DDP, mixed precision, clipping, the optimiser's and the scheduler's calls, and trackers. We own what a
turn holds (batches.py), how it goes forward and backward (gradcache.py), how weights are divided among processes (shard.py) and
what is kept of a run: `steps/NNNNNN/` with the checkpoint, `optimiser.safetensors` and `step.json`, written beside and renamed;
no pickles. They hold whole tensors, so that a run may go on with another number of processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from traceir.errors import TrainError
from traceir.train.batches import Chunk, Turn, Turns
from traceir.train.gradcache import Distribution, Objective, Reader, step
from traceir.train.shard import fetched, gathered, own_part

log = logging.getLogger(__name__)

STATE: Final = "step.json"
OPTIMISER: Final = "optimiser.safetensors"
KNOWN: Final = 20
"""Turns of a task before a loss of it can count as diverged."""


class TraceTrainer(Trainer):
    """Trains a Reader over Turns. `save_model(folder)` writes a whole checkpoint of the model as it stands.

    `rate` maps a step to its factor of the learning rate, `groups` are the optimiser's parameters. Raises TrainError that
    names task and queries where a loss is not finite, or is `diverged` times what it was on average (0: never). `sharded` says
    that the reader's weights are divided among processes (shard.py).
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        reader: Reader,
        turns: Turns,
        args: TrainingArguments,
        *,
        objective: Objective,
        grad_cache: bool,
        rate: Callable[[int], float],
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        keep: tuple[int, ...],
        diverged: float,
        save_model: Callable[[Path, dict[str, torch.Tensor] | None], None],
        check_memory: Callable[[Turns, Callable[[Turn], object], torch.device], None] | None,
        out: Path,
        sharded: bool,
    ) -> None:
        try:
            super().__init__(model=reader, args=args, train_dataset=turns)
        except (ImportError, RuntimeError, ValueError) as error:
            raise TrainError(f"the training cannot be set up as asked: {error}") from error
        self.sharded = sharded
        if sharded:  # what accelerate calls evaluation is a model without DDP around it
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.objective, self.grad_cache, self.rate = objective, grad_cache, rate
        self.groups, self.betas = groups, betas
        self.keep, self.diverged, self.check_memory = keep, diverged, check_memory
        self.write_checkpoint, self.out = save_model, out
        self.started = time.monotonic()
        self.sums: dict[str, list[float]] = {}
        self.usual: dict[str, list[float]] = {}
        for unwanted in (ProgressCallback, PrinterCallback):
            self.remove_callback(unwanted)
        self.add_callback(_Progress(keep))

    # What the loop asks for

    def get_train_dataloader(self) -> DataLoader[Turn]:
        """One Turn an item; each process makes its own share, so nothing is sharded or sent between them."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=_OneByOne(len(self.train_dataset)),
            collate_fn=_only,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=False,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (paper, section 2). Vectors such as norms and biases do not decay."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups, lr=self.args.learning_rate, betas=self.betas, eps=1e-8)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Turn, num_items_in_batch: Any = None) -> torch.Tensor:
        """One turn forward and backward; returns its loss, scaled as the loop's report wants it."""
        model.train()
        share = 1.0 / self.current_gradient_accumulation_steps
        if self.check_memory is not None:
            self.check_memory(self.train_dataset, lambda turn: self._step(model, turn, share, None), self.args.device)
            model.zero_grad()
        self.check_memory = None
        losses = self._step(model, inputs, share, lambda found: self._check(inputs, found))
        for name, value in losses.items():
            self.sums.setdefault(f"{inputs.task}/{name}", []).append(value)
        return torch.tensor(self._total(losses) * share, device=self.args.device)

    def _step(self, model: Any, turn: Turn, share: float, check: Callable[[dict[str, float]], None] | None) -> dict[str, float]:
        with self.compute_loss_context_manager():
            return step(
                model, to_device(turn, self.args.device), self.objective, self._backward, cache=self.grad_cache, share=share,
                seed=self.args.seed, ranks=self._ranks(model), check=check,
            )  # fmt: skip

    def _get_num_items_in_batch(self, batch_samples: list[Turn], device: torch.device) -> None:
        """Turns scale themselves (gradcache.py)."""

    def floating_point_ops(self, inputs: Turn) -> int:
        """Not counted; benchmarks/train.py does."""
        return 0

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        self.accelerator.backward(loss)

    def _ranks(self, model: Any) -> Distribution:
        if self.args.world_size == 1:
            return Distribution()
        # Only DDP gains by waiting: shards would have to hold their gradients whole meanwhile.
        quiet = contextlib.nullcontext if self.sharded else model.no_sync
        return Distribution(self.args.process_index, self.args.world_size, quiet, even=self.sharded)

    def _total(self, losses: dict[str, float]) -> float:
        aim = self.objective
        weights = {"gen": aim.lambda_gen, "ret": aim.lambda_ret, "distil": aim.distil, "direct_ret": aim.direct_ret}
        return sum(weights[name] * value for name, value in losses.items() if name in weights)

    def _check(self, turn: Turn, losses: dict[str, float]) -> None:
        total, step_now = self._total(losses), self.state.global_step
        place = f"step {step_now}: loss of {turn.task} is {total:.4g} on queries {', '.join(turn.asked)}"
        if not math.isfinite(total):
            raise TrainError(f"{place}; lower the learning rate, or look at these queries")
        count, mean = self.usual.get(turn.task, (0.0, 0.0))
        if self.diverged and count >= KNOWN and total > self.diverged * max(mean, 1.0):
            raise TrainError(
                f"{place}, {total / max(mean, 1e-9):.0f} times what it was; the newest step folder is from before: lower "
                "learning_rate and go on from it, look at these queries, or raise `diverged`"
            )
        self.usual[turn.task] = [count + 1, total if not count else 0.95 * mean + 0.05 * total]

    # What is written

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of log.jsonl, and the same to the trackers: the mean of each task's terms since the line before."""
        if "loss" in logs:
            means = {name: round(sum(values) / len(values), 6) for name, values in sorted(self.sums.items())}
            self.sums.clear()
            logs = {
                "seconds": round(time.monotonic() - self.started, 1),
                **means,
                "rate": logs["learning_rate"],
                "norm": round(float(logs.get("grad_norm", 0.0)), 6),
            }
            if self.is_world_process_zero():
                with (self.out / "log.jsonl").open("a") as journal:
                    journal.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")
        super().log(logs, start_time)
        self.state.log_history.clear()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A step folder, renamed into place by the first process when every process has written its part."""
        done = self.state.global_step
        fresh, target = self.out / "steps" / f".writing.{done:06d}", self.out / "steps" / f"{done:06d}"
        if self.is_world_process_zero():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.parent.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(fresh), _internal_call=True)
        self._save_optimizer_and_scheduler(str(fresh))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(fresh / "trainer_state.json"))
            (fresh / STATE).write_text(json.dumps({"step": done, "sums": self.sums, "usual": self.usual}))
            if target.exists():
                shutil.rmtree(target)
            os.replace(fresh, target)
            for old in sorted(target.parent.iterdir()):
                if (old.name.isdigit() and int(old.name) < done and int(old.name) not in self.keep) or ".writing" in old.name:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.sharded:
            state_dict = gathered(self.model, keep=self.args.should_save)
        if self.args.should_save and output_dir is not None:
            self.write_checkpoint(Path(output_dir), state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()["state"]
        keep = self.args.should_save
        flat = {
            f"{n}.{key}": fetched(value, keep=keep).contiguous() for n, entry in state.items() for key, value in entry.items()
        }
        if keep:
            flat["log_temperature"] = self.accelerator.unwrap_model(self.model).log_temperature.detach().clone()
            save_file(flat, Path(output_dir) / OPTIMISER)

    # What is read again

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the weights were restored before the loop began (train.py)."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        kept = json.loads((Path(checkpoint) / STATE).read_text())
        self.sums, self.usual = kept.get("sums", {}), kept.get("usual", {})
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        with safe_open(Path(checkpoint) / OPTIMISER, framework="pt") as file:
            for key in sorted(file.keys()):
                number, dot, name = key.partition(".")
                if dot:
                    state.setdefault(int(number), {})[name] = own_part(file.get_tensor(key), parameters[int(number)])
                else:
                    with torch.no_grad():
                        self.accelerator.unwrap_model(self.model).log_temperature.copy_(file.get_tensor(key))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        now = self.args.learning_rate * self.rate(kept["step"])
        place = {"last_epoch": kept["step"], "_step_count": kept["step"] + 1, "_last_lr": [now] * len(self.groups)}
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **place})
        for group in self.optimizer.param_groups:
            group["lr"] = now

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every draw of a run is a function of (seed, turn, chunk, rank)."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing was saved."""


class _OneByOne(Sampler[list[int]]):
    """The turns in their order, one a batch."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def __iter__(self) -> Iterator[list[int]]:
        return iter([number] for number in range(self.turns))

    def __len__(self) -> int:
        return self.turns


class _Progress(TrainerCallback):
    """A bar on stderr, and a step folder at every step that is to be kept."""

    def __init__(self, keep: tuple[int, ...]) -> None:
        self.keep = keep
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", mininterval=5.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.bar is not None:
            self.bar.update()
        if state.global_step in self.keep:
            control.should_save = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def to_device(turn: Turn, device: torch.device) -> Turn:
    """The turn with all its tensors on the device."""

    def moved(chunk: Chunk) -> Chunk:
        return Chunk(chunk.batch.to(device), chunk.places.to(device))

    return Turn(
        turn.number, turn.task, tuple(map(moved, turn.queries)), tuple(map(moved, turn.candidates)),
        turn.collision_BN.to(device), turn.sizes, turn.asked, turn.tokens,
    )  # fmt: skip


def newest_step(out: Path) -> Path | None:
    """The newest whole step folder of a run."""
    found = sorted(folder for folder in (out / "steps").glob("[0-9]*") if (folder / STATE).is_file())
    return found[-1] if found else None


def step_of(folder: Path | None) -> int:
    """The step that a step folder was written at; 0 for None."""
    return int(json.loads((folder / STATE).read_text())["step"]) if folder is not None else 0


def _only(turns: list[Turn]) -> Turn:
    return turns[0]


def barrier() -> None:
    """Waits for all processes of a launch; nothing in a lone one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
