"""The two sides of `benchmarks.train throughput`: our training step, and the loop anyone would write first.

Shapes: B pairs, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from benchmarks.train_shapes import optimiser_of
from traceir.batch import Batch
from traceir.data.samples import Schedule
from traceir.model import TraceModel
from traceir.prompts import PromptVersion, render_candidate, render_query
from traceir.train.batches import TrainBatches
from traceir.train.config import TrainConfig
from traceir.train.gradcache import Objective, Reader, step


class Clock:
    """Wall seconds by part; an inner part stops the outer one's clock."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.open = device, dict[str, float](), list[str]()
        self.since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._note()
        self.open.append(name)
        try:
            yield
        finally:
            self._note()
            self.open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time on this clock."""

        def run(*args: Any) -> Any:
            with self.part(name):
                return function(*args)

        return run

    def _note(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


class Side:
    """One way to train on the batches of a schedule: forward and backward of a batch, then a step."""

    def __init__(self, module: torch.nn.Module, config: TrainConfig, device: str) -> None:
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimiser = optimiser_of(module, config)
        self.config, self.device, self.clock = config, device, Clock(device)
        self.tokens = self.padded = 0

    def losses(self, number: int) -> dict[str, float]:
        """The terms of one batch; their gradient is added to the parameters."""
        raise NotImplementedError

    def train(self, number: int) -> tuple[float, float]:
        """Wall and CPU seconds of one batch from its files to the changed weights."""
        started, cpu = time.perf_counter(), time.process_time()
        self.losses(number)
        with self.clock.part("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return time.perf_counter() - started, time.process_time() - cpu

    def forget(self) -> None:
        """Starts to count anew, after the warm-up."""
        self.clock.seconds.clear()
        self.tokens = self.padded = 0

    def count(self, batch: Batch) -> None:
        self.tokens += int(batch.mask.sum())
        self.padded += batch.mask.numel()


class Ours(Side):
    """The step of `traceir train`, as its loop calls it."""

    def __init__(self, model: TraceModel, batches: TrainBatches, config: TrainConfig, device: str) -> None:
        self.reader: Any = Reader(model, config.temperature).to(device)
        super().__init__(self.reader, config, device)
        self.batches = batches
        model.processor.__dict__["pixels"] = self.clock.timed("pictures", model.processor.pixels)

    def losses(self, number: int) -> dict[str, float]:
        with self.clock.part("layout"):
            batch = self.batches[number].to(torch.device(self.device))
        for chunk in batch.chunks:
            self.count(chunk.batch)
        with self.clock.part("forward"):
            return step(self.reader, batch, Objective(), cache=self.config.grad_cache, backward=self._backward)

    def _backward(self, loss: torch.Tensor) -> None:
        with self.clock.part("backward"):
            torch.autograd.backward(loss)


class Plain(Side):
    """The loop anyone would write first, over transformers' network as it is."""

    def __init__(self, model: TraceModel, schedule: Schedule, config: TrainConfig, device: str) -> None:
        self.network = model.network
        # Its own patch convolution again: `wrap` had put a matrix product in the place.
        self.network.model.visual.patch_embed.__dict__.pop("forward")
        super().__init__(self.network, config, device)
        self.schedule, self.processor, self.autocast = schedule, model.processor, False
        self.version: PromptVersion = model.settings.prompt_version
        self.processor.__dict__["pixels"] = self.clock.timed("pictures", self.processor.pixels)

    def losses(self, number: int) -> dict[str, float]:
        with self.clock.part("layout"):
            examples = self.schedule.examples(number)
            queries = self.processor.collate(
                [self.processor.lay_out(render_query(example.query, self.version), example.completion) for example in examples]
            ).to(torch.device(self.device))
            items = [example.candidate for example in examples if example.candidate is not None]
            candidates = self.processor.collate(
                [self.processor.forced(render_candidate(item, self.version)) for item in items]
            ).to(torch.device(self.device))
            right_BB = torch.tensor([[item.id in example.right for item in items] for example in examples], device=self.device)
        for batch in (queries, candidates):
            self.count(batch)
        with self.clock.part("forward"):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                (logits_BTV, query_BD), (_, candidate_BD) = self._read(queries), self._read(candidates)
            generation = functional.cross_entropy(logits_BTV.float().flatten(0, 1), queries.targets.flatten())
            query_BD, candidate_BD = (functional.normalize(state.float(), dim=-1) for state in (query_BD, candidate_BD))
            scores_BB = query_BD @ candidate_BD.T / self.config.temperature
            own = torch.eye(len(items), dtype=torch.bool, device=self.device)
            scores_BB = scores_BB.masked_fill(right_BB & ~own, float("-inf"))
            retrieval = functional.cross_entropy(scores_BB, torch.arange(len(items), device=self.device))
        with self.clock.part("backward"):
            torch.autograd.backward(generation + retrieval)
        return {"gen": float(generation.detach()), "ret": float(retrieval.detach())}

    def _read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """All logits [B, T, V] and the pooled states [B, D]; position ids are transformers' own."""
        images = {} if batch.patches is None else {"pixel_values": batch.patches, "image_grid_thw": batch.grids}
        out = self.network(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            mm_token_type_ids=(batch.ids == self.network.config.image_token_id).int(),
            use_cache=False,
            output_hidden_states=True,
            **images,
        )
        return out.logits, out.hidden_states[-1][torch.arange(len(batch.ids)), batch.pooling_index]
