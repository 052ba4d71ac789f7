"""One turn forward and backward: exact InfoNCE over a batch of any size in the memory of one chunk, with a language-model term.

GradCache (Gao et al., 2021, arXiv 2101.06983): embed all chunks without a graph, compute the loss and its gradient at the
embeddings, then run every chunk again and send that gradient through it. The language-model term is a sum over tokens, so it is
added in that second pass, once. Without the cache the graphs of all chunks are kept and nothing runs twice. Both give the same
gradient (tests/test_gradcache.py).

Every process computes the loss over the embeddings of all processes, and takes the gradient at its own; nothing of a graph
crosses the border, and one process equals many. Dropout is drawn from (turn, chunk, rank), so both passes drop the same.

Shapes: b queries and n candidates of this process; B, N of all processes; D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from traceir.model import TraceModel
from traceir.train.batches import Chunk, Turn
from traceir.train.losses import distillation_loss, generation_loss, retrieval_loss


@dataclass(frozen=True, slots=True)
class Objective:
    """Weights and shape of the loss. `distil` and `direct_ret` teach the prefill state of queries that reason (not in the paper):
    the one to be near the reasoned embedding, the other to find the target by itself."""

    lambda_gen: float = 1.0
    lambda_ret: float = 1.0
    symmetric: bool = False
    distil: float = 0.0
    direct_ret: float = 0.0

    @property
    def reads_first(self) -> bool:
        return self.distil > 0 or self.direct_ret > 0


class Reader(torch.nn.Module):
    """The part of a training step that is wrapped for distribution and mixed precision: one chunk in, its states and its
    cross-entropy out. Holds the logarithm of the temperature, which trains where it is learnt."""

    def __init__(self, model: TraceModel, temperature: float, *, learn_temperature: bool = False) -> None:
        super().__init__()
        self.network = model.network
        self.temperature = temperature
        self.log_temperature = torch.nn.Parameter(torch.tensor(temperature).log(), requires_grad=learn_temperature)
        self._model = [model]  # in a list, so that the network is registered once
        self._no_split_modules = getattr(model.network, "_no_split_modules", None)

    @property
    def model(self) -> TraceModel:
        return self._model[0]

    def forward(self, chunk: Chunk, gen: bool, touch: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read-out states [b, D], the states that predict each row's first supervised token [b, D], and the sum of the
        cross-entropy. `gen` false leaves that at 0. `touch` makes every trainable part take part in the graph, as
        wrappers for several processes demand, whether or not the chunk holds a picture.
        """
        batch, rows = chunk.batch, torch.arange(len(chunk.places), device=chunk.batch.ids.device)
        # Before the language model, as pictures are: shards must be gathered in one order by all processes.
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
        return hidden_BTD[rows, batch.pooling_index], hidden_BTD[rows, first_B], total

    def _blank(self, device: torch.device) -> torch.Tensor:
        """The sum of the features of the smallest picture there is, for chunks without any."""
        image = self.model.processor.image
        cells = image.merge**2
        patches = torch.zeros(cells, 3 * image.temporal * image.patch**2, device=device)
        features, layers = self.model.image_features(patches, torch.tensor([[1, image.merge, image.merge]], device=device))
        return sum((layer.sum() for layer in layers), features.sum())


def _quick_attention() -> contextlib.AbstractContextManager[Any]:
    """On a CPU in bfloat16 the backward of fused attention is several times slower than plain products (LOG.md, 2026-11-23)."""
    return sdpa_kernel(SDPBackend.MATH) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def recomputing() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """What checkpointed layers run in, first and when computed again: in both the attention that the forward had."""
    return contextlib.nullcontext(), _quick_attention()


@dataclass(frozen=True, slots=True)
class Distribution:
    """How this process stands among the others, and how gradients are summed: `no_sync` keeps a chunk's backward to this
    process (all but the last), `even` demands that all processes run equally many forwards (sharded weights)."""

    rank: int = 0
    world: int = 1
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    even: bool = False


ALONE = Distribution()


def step(
    reader: Any,
    turn: Turn,
    objective: Objective,
    backward: Callable[[torch.Tensor, bool], None],
    *,
    cache: bool,
    share: float = 1.0,
    seed: int = 0,
    ranks: Distribution = ALONE,
    check: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Adds `share` times the gradient of the turn's loss to the parameters and returns the loss over all processes, by term.

    `reader` is a Reader or what wraps one; its gradients are the mean over processes, as DDP and FSDP leave them. `backward` is
    called with a scalar and whether it is the last of the turn. `check` sees the terms before anything is sent back (lessons:
    after it), and may raise.
    """
    device, chunks = turn.collision_BN.device, (*turn.queries, *turn.candidates)
    tokens = max(1.0, float(_summed(torch.tensor(float(turn.tokens), device=device), ranks)))
    plan = _Plan(reader, chunks, objective.lambda_gen > 0, seed, turn.number, ranks)
    if not turn.candidates:
        return _only_text(plan, tokens, objective.lambda_gen * share, backward, check)
    outputs: list[tuple[torch.Tensor, ...]] = []
    for number in range(len(chunks)):
        with torch.set_grad_enabled(not cache), plan.quiet(number):
            outputs.append(plan.forward(number, touch=ranks.even or (not cache and ranks.world > 1)))
    surrogates: list[torch.Tensor] = []
    plan.fill_up(backward=None if cache else lambda total, _: surrogates.append(total))
    gen = float(_summed(torch.stack([out[2].detach() for out in outputs]).sum().float(), ranks)) / tokens
    found, gradients = _at_embeddings(plan.reader, turn, outputs, objective, ranks, share)
    losses = {"gen": gen, **found}
    if check is not None:
        check(losses)
    for number in range(len(chunks)):
        out, last = outputs[number], number == len(chunks) - 1
        with plan.quiet(number):
            if cache:
                out = plan.forward(number, touch=ranks.world > 1)
            total = out[2] * (objective.lambda_gen * share * ranks.world / tokens)
            for state, gradient in zip(out[:2], gradients[number], strict=True):
                if gradient is not None:
                    total = total + (state * (gradient * ranks.world)).sum()
            if cache:
                backward(total, last)
            else:
                surrogates.append(total)
    if cache:
        plan.fill_up(backward=backward)
    else:
        backward(torch.stack(surrogates).sum(), True)
    return losses


def _only_text(
    plan: _Plan,
    tokens: float,
    weight: float,
    backward: Callable[[torch.Tensor, bool], None],
    check: Callable[[dict[str, float]], None] | None,
) -> dict[str, float]:
    """A turn of lessons: no embedding is compared, so each chunk goes forward and backward at once."""
    total = 0.0
    for number in range(len(plan.chunks)):
        with plan.quiet(number):
            _, _, value = plan.forward(number, touch=plan.ranks.world > 1)
            total += float(value.detach())
            backward(value * (weight * plan.ranks.world / tokens), number == len(plan.chunks) - 1)
    plan.fill_up(backward=backward)
    device = plan.chunks[0].batch.ids.device
    losses = {"gen": float(_summed(torch.tensor(total, device=device), plan.ranks)) / tokens}
    if check is not None:
        check(losses)
    return losses


class _Plan:
    """The forwards of one turn, each with its own seed."""

    def __init__(self, reader: Any, chunks: Sequence[Chunk], gen: bool, seed: int, number: int, ranks: Distribution) -> None:
        self.wrapped, self.chunks, self.gen, self.ranks = reader, chunks, gen, ranks
        self.reader: Reader = getattr(reader, "module", reader)
        self.seed = (seed * 1_000_003 + number) * 64 + ranks.rank
        # Asked before the first forward: between forwards each process would ask at another moment.
        self.most = _most(len(chunks), chunks[0].batch.ids.device) if ranks.even else len(chunks)

    def forward(self, number: int, *, touch: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed((self.seed * 4096 + number) % 2**63)
        found: tuple[torch.Tensor, ...] = self.wrapped(self.chunks[number], self.gen, touch)
        return found

    def quiet(self, number: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if number == len(self.chunks) - 1 else self.ranks.no_sync()

    def fill_up(self, backward: Callable[[torch.Tensor, bool], None] | None) -> None:
        """Runs the smallest chunk again, to no effect, until this process has run as many as the one with the most."""
        for _ in range(self.most - len(self.chunks)):
            with torch.set_grad_enabled(backward is not None):
                state, _, total = self.forward(len(self.chunks) - 1, touch=True)
            if backward is not None:
                backward((state.sum() + total) * 0.0, True)


def _most(count: int, device: torch.device) -> int:
    """The greatest count of any process."""
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _at_embeddings(
    reader: Reader,
    turn: Turn,
    outputs: Sequence[tuple[torch.Tensor, ...]],
    objective: Objective,
    ranks: Distribution,
    share: float,
) -> tuple[dict[str, float], list[tuple[torch.Tensor | None, torch.Tensor | None]]]:
    """The terms that compare embeddings of all processes, and each chunk's gradient at (read-out states, first states)."""
    asked = len(turn.queries)
    query_bD = _in_order(turn.queries, [out[0] for out in outputs[:asked]])
    offered_nD = _in_order(turn.candidates, [out[0] for out in outputs[asked:]])
    sizes = [size for size, _ in turn.sizes], [further for _, further in turn.sizes]
    own = sizes[0][ranks.rank]
    positive_bD, further_nD = offered_nD[:own], offered_nD[own:]
    query_BD = _gathered(query_bD, sizes[0], ranks).requires_grad_()
    candidate_ND = torch.cat([_gathered(positive_bD, sizes[0], ranks), _gathered(further_nD, sizes[1], ranks)]).requires_grad_()
    leaves = [query_BD, candidate_ND]
    first_BD: torch.Tensor | None = None
    complex_B = torch.zeros(len(query_BD), dtype=torch.bool, device=query_BD.device)
    if objective.reads_first:
        first_bD = _in_order(turn.queries, [out[1] for out in outputs[:asked]])
        first_BD = _gathered(first_bD, sizes[0], ranks).requires_grad_()
        # A row that writes nothing reads out where its first token is predicted: both states are the same one.
        complex_B = (first_BD != query_BD).any(dim=1).detach()
        leaves.append(first_BD)
    learnt = reader.log_temperature.requires_grad
    log_temperature = reader.log_temperature.detach().clone().requires_grad_(learnt)
    with torch.enable_grad(), torch.autocast(query_BD.device.type, enabled=False):
        temperature = log_temperature.exp() if learnt else reader.temperature
        terms = _terms(query_BD, candidate_ND, first_BD, complex_B, temperature, turn.collision_BN, objective)
        total = torch.stack([weight * value for weight, value in terms.values()]).sum() * share
        found = torch.autograd.grad(total, [*leaves, log_temperature] if learnt else leaves, allow_unused=True)
    if learnt and found[-1] is not None:
        known = reader.log_temperature.grad
        reader.log_temperature.grad = found[-1].clone() if known is None else known + found[-1]
    gradients = _by_chunk(turn, found[: len(leaves)], sizes, ranks)
    losses = {name: float(value.detach()) for name, (_, value) in terms.items()}
    return (losses | {"temperature": float(log_temperature.detach().exp())} if learnt else losses), gradients


def _terms(
    query_BD: torch.Tensor,
    candidate_ND: torch.Tensor,
    first_BD: torch.Tensor | None,
    complex_B: torch.Tensor,
    temperature: float | torch.Tensor,
    collision_BN: torch.Tensor,
    objective: Objective,
) -> dict[str, tuple[float, torch.Tensor]]:
    """Weight and value of every term, by its name in the log."""
    retrieval = retrieval_loss(query_BD, candidate_ND, temperature, collision_BN, symmetric=objective.symmetric)
    terms = {"ret": (objective.lambda_ret, retrieval)}
    if first_BD is not None and objective.distil:
        terms["distil"] = objective.distil, distillation_loss(first_BD, query_BD, complex_B)
    if first_BD is not None and objective.direct_ret:
        direct = retrieval_loss(first_BD, candidate_ND, temperature, collision_BN, rows_B=complex_B)
        terms["direct_ret"] = objective.direct_ret, direct
    return terms


def _by_chunk(
    turn: Turn, found: Sequence[torch.Tensor | None], sizes: tuple[list[int], list[int]], ranks: Distribution
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """This process's rows of the gradients, dealt out to its chunks: queries first, then candidates."""
    start, stop = sum(sizes[0][: ranks.rank]), sum(sizes[0][: ranks.rank + 1])
    total = sum(sizes[0])
    further = slice(total + sum(sizes[1][: ranks.rank]), total + sum(sizes[1][: ranks.rank + 1]))
    query, candidate, first = found[0], found[1], found[2] if len(found) > 2 else None
    assert query is not None and candidate is not None
    offered = torch.cat([candidate[start:stop], candidate[further]])
    dealt: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
    for chunk in turn.queries:
        dealt.append((query[start:stop][chunk.places], None if first is None else first[start:stop][chunk.places]))
    dealt += [(offered[chunk.places], None) for chunk in turn.candidates]
    return dealt


def _in_order(chunks: Sequence[Chunk], states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several chunks in the order of their places, without their graphs; at least float32."""
    places = torch.cat([chunk.places for chunk in chunks])
    rows = torch.cat([state.detach() for state in states])
    ordered = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    ordered[places] = rows.to(ordered.dtype)
    return ordered


def _gathered(rows_bD: torch.Tensor, sizes: Sequence[int], ranks: Distribution) -> torch.Tensor:
    """The rows of all processes, in the order of the ranks; `sizes` says how many each has."""
    if ranks.world == 1:
        return rows_bD.clone()
    most = max(sizes)
    if most == 0:
        return rows_bD.clone()
    padded = rows_bD.new_zeros(most, rows_bD.shape[1])
    padded[: len(rows_bD)] = rows_bD
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[:size] for rows, size in zip(everyone, sizes, strict=True)])


def _summed(value: torch.Tensor, ranks: Distribution) -> torch.Tensor:
    if ranks.world > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
