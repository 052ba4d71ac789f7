"""One batch forward and backward: exact InfoNCE over a batch of any size in the memory of one chunk, with a language-model term.

GradCache (Gao et al., 2021, arXiv 2101.06983): embed all chunks without a graph, compute the loss and its gradient at the
embeddings, then run every chunk again and send that gradient through it. The language-model term is a sum over tokens, so it is
added in that second pass, once. Without the cache the graphs of all chunks are kept and nothing runs twice. Both give the same
gradient (tests/test_gradcache.py).

Every process computes the loss over the embeddings of all processes, and takes the gradient at its own; no graph crosses the
border between processes, and one process equals many. Dropout is drawn from (batch, chunk, rank), so both passes drop the same.

Shapes: b queries and n candidates of this process; B, N of all processes; D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from traceir.model import TraceModel
from traceir.retrieval.rerank import answer_tokens
from traceir.train.batches import Chunk, TrainBatch
from traceir.train.losses import distillation_loss, generation_loss, nested_retrieval_loss, rerank_loss

Context = contextlib.AbstractContextManager[Any]
Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of one chunk: embeddings [b, D], states that predict each row's first supervised token [b, D], sum of the cross-entropy."""
Gradients = tuple[torch.Tensor, torch.Tensor | None]
"""Of one chunk: at its embeddings and at its first states."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Weights and shape of the loss. `distil` and `direct_ret` teach the prefill state of queries that reason (not in the paper):
    the one to be near the reasoned embedding, the other to find the target by itself. `widths`: those of nested InfoNCE, and the
    weight of each (losses.py)."""

    lambda_gen: float = 1.0
    lambda_ret: float = 1.0
    symmetric: bool = False
    distil: float = 0.0
    direct_ret: float = 0.0
    widths: Mapping[int, float] = field(default_factory=dict)

    def total(self, losses: dict[str, float]) -> float:
        """The weighted sum of the terms that `step` returns."""
        weights = {
            "gen": self.lambda_gen,
            "ret": self.lambda_ret,
            "distil": self.distil,
            "direct_ret": self.direct_ret,
            "rank": 1.0,
        }
        return sum(weights[name] * value for name, value in losses.items() if name in weights)


class Reader(torch.nn.Module):
    """The part of a training step that is wrapped for distribution and mixed precision: one chunk in, its states and its
    cross-entropy out. Holds the logarithm of the temperature, which trains where it is learnt. `rerank`: a row's candidates are
    asked for yes or no, and the differences of the two logits [R], row by row, stand for the embeddings."""

    def __init__(self, model: TraceModel, temperature: float, *, learn_temperature: bool = False, rerank: bool = False) -> None:
        super().__init__()
        self.answers = answer_tokens(model.processor) if rerank else None
        self.model, self.network, self.temperature = model, model.network, temperature
        self.log_temperature = torch.nn.Parameter(torch.tensor(temperature).log(), requires_grad=learn_temperature)

    def forward(self, chunk: Chunk, gen: bool, touch: bool) -> Output:
        """`gen` false leaves the cross-entropy at 0. `touch` makes every trainable part take part in the graph, as wrappers for
        several processes demand, whether or not the chunk holds an image."""
        batch, rows = chunk.batch, torch.arange(len(chunk.rows), device=chunk.batch.ids.device)
        # Before the language model, as images are: shards must be gathered in one order by all processes.
        blank = 0.0 * self._blank(batch.ids.device) if touch and batch.patches is None else 0.0
        with _quick_attention():
            hidden_BTD = self.model.hidden(batch)
        supervised_BT = batch.targets >= 0
        first_B = torch.where(supervised_BT.any(dim=1), supervised_BT.int().argmax(dim=1), batch.pooling_index)
        total = hidden_BTD.new_zeros(())
        if gen:
            total = generation_loss(self.model.logits(hidden_BTD[supervised_BT]), batch.targets[supervised_BT])
        if touch:
            total = total + 0.0 * self.log_temperature + blank
        pooled_BD = hidden_BTD[rows, batch.pooling_index]
        if self.answers is not None and batch.segments is not None:
            ends_BT = functional.pad(batch.segments[:, 1:] != batch.segments[:, :-1], (0, 1), value=True) & (batch.segments > 0)
            yes, no = self.model.logits(hidden_BTD[ends_BT])[:, self.answers].float().unbind(1)
            pooled_BD = yes - no
        return pooled_BD, hidden_BTD[rows, first_B], total

    def _blank(self, device: torch.device) -> torch.Tensor:
        """The sum of the features of the smallest image there is, for chunks without any."""
        image = self.model.processor.image
        patches = torch.zeros(image.merge**2, 3 * image.temporal * image.patch**2, device=device)
        features, layers = self.model.image_features(patches, torch.tensor([[1, image.merge, image.merge]], device=device))
        return sum((layer.sum() for layer in layers), features.sum())


def _quick_attention() -> Context:
    """On a CPU in bfloat16 the backward of fused attention is several times slower than plain products (LOG.md, 2026-11-23)."""
    return sdpa_kernel(SDPBackend.MATH) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def recomputing() -> tuple[Context, Context]:
    """What checkpointed layers run in, first and when computed again: in both the attention that the forward had."""
    return contextlib.nullcontext(), _quick_attention()


@dataclass(frozen=True, slots=True)
class Distribution:
    """How this process stands among the others, and how gradients are summed: `no_sync` keeps a chunk's backward to this
    process (all but the last), `even` demands that all processes run equally many forwards (sharded weights)."""

    rank: int = 0
    world: int = 1
    no_sync: Callable[[], Context] = contextlib.nullcontext
    even: bool = False

    def sum(self, value: torch.Tensor) -> float:
        """The sum over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value)

    def gather(self, rows_bD: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The rows of all processes, in the order of the ranks; `sizes` says how many each has. Gradients reach one's own."""
        if self.world == 1 or not max(sizes):
            return rows_bD
        padded = rows_bD.new_zeros(max(sizes), rows_bD.shape[1])
        padded[: len(rows_bD)] = rows_bD.detach()
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded)
        parts = [rows[:size] for rows, size in zip(everyone, sizes, strict=True)]
        parts[self.rank] = rows_bD
        return torch.cat(parts)


ALONE = Distribution()


def step(
    reader: Any,
    batch: TrainBatch,
    objective: Objective,
    *,
    cache: bool,
    share: float = 1.0,
    seed: int = 0,
    ranks: Distribution = ALONE,
    check: Callable[[dict[str, float]], None] = lambda losses: None,
    backward: Callable[[torch.Tensor], None] = torch.autograd.backward,
) -> dict[str, float]:
    """Adds `share` times the gradient of the batch's loss to the parameters and returns the loss over all processes, by term.

    `reader` is a Reader or what wraps one; its gradients are the mean over processes, as DDP and FSDP leave them. `check` sees
    the terms before anything is sent back (of a pretraining task: after it), and may raise. `backward` gets each scalar.
    """
    forwards, own = _Forwards(reader, batch, objective.lambda_gen > 0, seed, ranks), len(batch.chunks)
    tokens = max(1.0, ranks.sum(torch.tensor(float(batch.tokens), device=batch.collision_BN.device)))
    outputs: list[Output] = []
    losses, gradients = dict[str, float](), list[Gradients]()
    if batch.candidates or batch.groups:
        for number in range(forwards.count):
            with torch.set_grad_enabled(not cache), forwards.synced(number):
                outputs.append(forwards(number))
        if batch.groups:
            terms, gradients = _at_scores(batch, outputs[:own], forwards.reader.temperature, ranks, share)
        else:
            losses["gen"] = ranks.sum(torch.stack([output[2].detach() for output in outputs[:own]]).sum().float()) / tokens
            terms, gradients = _at_embeddings(forwards.reader, batch, outputs, objective, ranks, share)
        losses |= terms
        check(losses)
    again, surrogates, entropies = cache or not (batch.candidates or batch.groups), list[torch.Tensor](), list[torch.Tensor]()
    for number in range(forwards.count):
        with forwards.synced(number):
            output = forwards(number) if again else outputs[number]
            surrogate = output[2] * (objective.lambda_gen * share * ranks.world / tokens)
            for state, gradient in zip(output, gradients[number] if number < len(gradients) else (), strict=False):
                if gradient is not None:
                    surrogate = surrogate + (state * (gradient * ranks.world)).sum()
            if number >= own:
                surrogate = (output[0].sum() + output[2]) * 0.0
            if again:
                backward(surrogate)
                entropies.append(output[2].detach())
            else:
                surrogates.append(surrogate)
    if not again:
        backward(torch.stack(surrogates).sum())
    if not (batch.candidates or batch.groups):
        losses["gen"] = ranks.sum(torch.stack(entropies[:own]).sum().float()) / tokens
        check(losses)
    return losses


class _Forwards:
    """The forwards of one batch, each with its own seed for dropout; `count` of them, as many as the process with the most
    (sharded weights): beyond its own chunks a process runs its smallest again, to no effect."""

    def __init__(self, wrapped: Any, batch: TrainBatch, gen: bool, seed: int, ranks: Distribution) -> None:
        self.wrapped, self.chunks, self.gen, self.ranks = wrapped, batch.chunks, gen, ranks
        self.reader: Reader = getattr(wrapped, "module", wrapped)
        self.seed = (seed * 1_000_003 + batch.number) * 64 + ranks.rank
        self.count = len(self.chunks)
        if ranks.even:
            most = torch.tensor(self.count, device=batch.collision_BN.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            self.count = int(most)

    def __call__(self, number: int) -> Output:
        number = min(number, len(self.chunks) - 1)
        torch.manual_seed((self.seed * 4096 + number) % 2**63)
        touch = self.ranks.even or (self.ranks.world > 1 and torch.is_grad_enabled())
        output: Output = self.wrapped(self.chunks[number], self.gen, touch)
        return output

    def synced(self, number: int) -> Context:
        """Gradients are summed over the processes with the last chunk's."""
        return contextlib.nullcontext() if number == self.count - 1 else self.ranks.no_sync()


def _at_embeddings(
    reader: Reader, batch: TrainBatch, outputs: Sequence[Output], objective: Objective, ranks: Distribution, share: float
) -> tuple[dict[str, float], list[Gradients]]:
    """The terms that compare embeddings of all processes, and the gradient of their weighted sum at each chunk's states."""
    states = [[state.detach() for state in output[:2]] for output in outputs[: len(batch.chunks)]]
    leaves = [state.to(torch.promote_types(state.dtype, torch.float32)).requires_grad_() for pair in states for state in pair]
    embeddings, firsts, count = leaves[0::2], leaves[1::2], len(batch.queries)
    sizes, further = ([size[side] for size in batch.sizes] for side in (0, 1))
    learnt = reader.log_temperature.requires_grad
    log_temperature = reader.log_temperature.detach().clone().requires_grad_(learnt)
    with torch.enable_grad(), torch.autocast(batch.collision_BN.device.type, enabled=False):
        temperature = log_temperature.exp() if learnt else reader.temperature
        query_BD = ranks.gather(_in_order(batch.queries, embeddings[:count]), sizes)
        candidate_nD = _in_order(batch.candidates, embeddings[count:])
        positive_nD, negative_nD = candidate_nD[: sizes[ranks.rank]], candidate_nD[sizes[ranks.rank] :]
        candidate_ND = torch.cat([ranks.gather(positive_nD, sizes), ranks.gather(negative_nD, further)])
        contrast = partial(nested_retrieval_loss, widths=objective.widths)
        retrieval = contrast(query_BD, candidate_ND, temperature, batch.collision_BN, symmetric=objective.symmetric)
        terms = {"ret": (objective.lambda_ret, retrieval)}
        if objective.distil > 0 or objective.direct_ret > 0:
            first_BD = ranks.gather(_in_order(batch.queries, firsts[:count]), sizes)
            # A query that writes nothing has its embedding where its first token is predicted: both states are the same one.
            complex_B = (first_BD != query_BD).any(dim=1)
            if objective.distil:
                terms["distil"] = objective.distil, distillation_loss(first_BD, query_BD, complex_B)
            if objective.direct_ret:
                direct = contrast(first_BD, candidate_ND, temperature, batch.collision_BN, rows_B=complex_B)
                terms["direct_ret"] = objective.direct_ret, direct
        total = torch.stack([weight * value for weight, value in terms.values()]).sum() * share
        gradients = torch.autograd.grad(total, [*leaves, log_temperature] if learnt else leaves, allow_unused=True)
    losses = {name: float(value.detach()) for name, (_, value) in terms.items()}
    if learnt:
        losses["temperature"] = float(log_temperature.detach().exp())
        known, more = reader.log_temperature.grad, gradients[-1]
        reader.log_temperature.grad = more.clone() if known is None else known + more
    return losses, list(zip(gradients[0::2], gradients[1::2], strict=False))


def _at_scores(
    batch: TrainBatch, outputs: Sequence[Output], temperature: float, ranks: Distribution, share: float
) -> tuple[dict[str, float], list[Gradients]]:
    """The loss of a reranker over the groups of all processes, and its gradient at this process's scores, which are added to the
    first stage's over `temperature` where these are known."""
    leaves = [output[0].detach().float().requires_grad_() for output in outputs]
    groups = ranks.sum(torch.tensor(float(len(batch.groups)), device=leaves[0].device))
    numbers = [chunk.rows.tolist() for chunk in batch.queries]
    with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
        parts = [torch.split(leaf, [batch.groups[row] for row in rows]) for leaf, rows in zip(leaves, numbers, strict=True)]
        known = [[batch.similarities[row] for row in rows] for rows in numbers]
        added = [
            scores + torch.tensor(first, device=scores.device) / temperature if first else scores
            for part, firsts in zip(parts, known, strict=True)
            for scores, first in zip(part, firsts, strict=True)
        ]
        loss = rerank_loss(added) / groups
        gradients = torch.autograd.grad(loss * share, leaves)
    return {"rank": ranks.sum(loss.detach())}, [(gradient, None) for gradient in gradients]


def _in_order(chunks: Sequence[Chunk], states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several chunks in the order of their positions."""
    return torch.cat(list(states))[torch.cat([chunk.rows for chunk in chunks]).argsort()]
