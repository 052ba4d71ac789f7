"""The step of training: cached and uncached, one process and two, against autograd on the loss written out plainly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FORKS, image_of, random_model
from safetensors.torch import load_file, save_file
from torch.nn import functional

from traceir.data.samples import Example, Schedule, TaskData
from traceir.items import Item, Query
from traceir.model import TraceModel
from traceir.train.batches import TrainBatch, TrainBatches
from traceir.train.gradcache import Distribution, Objective, Reader, step


def examples(count: int = 8, negatives: int = 0) -> list[Example]:
    """Pairs of all modalities; every third query is complex, and two neighbours share a positive."""
    made = []
    for number in range(count):
        shown = image_of(number, 48 + 48 * (number % 4 == 3), 48) if number % 2 else None
        text = " ".join(["red", "cube", "then", "blue"][: 1 + number % 4])
        did = f"1:{number - number % 2 if number < 4 else number}"
        wrong = tuple(Item.of(text=f"wrong {number} {n}", id=f"2:{number}{n}") for n in range(negatives * (number % 2)))
        item = Item.of(text=f"ball {number}", image=image_of(number + 50) if number % 3 == 0 else None, id=did)
        completion = "left red cube, middle blue ball" if number % 3 == 2 else ""
        made.append(Example(Query.of(text=text, image=shown), completion, item, frozenset({did, "1:0"}), wrong))
    return made


def pretraining() -> list[Example]:
    return [Example(Query.of(text=f"count {n}"), "red " * (n % 4 + 1), None, frozenset()) for n in range(8)]


def batch_of(model: TraceModel, rows: list[Example], chunk_tokens: int = 90, rank: int = 0, world: int = 1) -> TrainBatch:
    schedule = Schedule([TaskData("made up", range(8))], [1.0], batch=8, group=1, batches=1, seed=0)
    return TrainBatches(schedule, model.processor, "brief-1", chunk_tokens, rank=rank, world=world).batch(0, "made up", rows)


def gradients(
    model: TraceModel, batch: TrainBatch, objective: Objective, *, cache: bool, learn: bool = False
) -> dict[str, torch.Tensor]:
    reader = Reader(model, 0.1, learn_temperature=learn).train()
    reader.zero_grad(set_to_none=True)
    step(reader, batch, objective, cache=cache)
    return {name: p.grad.clone() for name, p in reader.named_parameters() if p.grad is not None}


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The greatest difference of any parameter's gradient, relative to that gradient's largest entry."""
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max() / second[n].abs().max().clamp_min(1e-30)) for n in first)


@pytest.fixture(scope="module")
def double() -> TraceModel:
    model = random_model(3)
    model.network.double()
    return model


def plain_gradients(model: TraceModel, objective: Objective, rows: list[Example]) -> dict[str, torch.Tensor]:
    """The joint loss of the paper in one graph: no chunks, no cache, no surrogate."""
    batch = batch_of(model, rows, 10**9)
    model.network.zero_grad(set_to_none=True)
    queries = batch.queries[0]
    hidden, targets, own = model.hidden(queries.batch), queries.batch.targets, torch.arange(len(rows))
    loss = objective.lambda_gen * functional.cross_entropy(model.logits(hidden[targets >= 0]), targets[targets >= 0])
    if batch.candidates:
        query = hidden[own, queries.batch.pooling_index][queries.rows.argsort()]
        candidate = model.hidden(batch.candidates[0].batch)[:, -1][batch.candidates[0].rows.argsort()]
        left_out = batch.collision_BN.clone()
        left_out[own, own] = False
        for width, weight in (objective.widths or {query.shape[1]: 1.0}).items():
            scores = functional.normalize(query[:, :width], dim=-1) @ functional.normalize(candidate[:, :width], dim=-1).T / 0.1
            contrast = functional.cross_entropy(scores.masked_fill(left_out, float("-inf")), own)
            loss = loss + objective.lambda_ret * weight * contrast
    loss.backward()
    return {f"network.{name}": p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("rows", "widths"),
    [(examples(negatives=2), {}), (examples(negatives=2), {32: 1.0, 8: 0.5, 4: 2.0}), (pretraining(), {})],
    ids=["pairs", "nested", "pretraining"],
)
def test_gradients_equal_those_of_the_loss_written_out(
    double: TraceModel, rows: list[Example], widths: dict[int, float], cache: bool
) -> None:
    objective, batch = Objective(lambda_gen=0.7, lambda_ret=1.3, widths=widths), batch_of(double, rows, 60)
    assert len(batch.queries) > 1 and len(batch.candidates) != 1, "several chunks a side"
    assert furthest(gradients(double, batch, objective, cache=cache), plain_gradients(double, objective, rows)) < 1e-9


def test_every_term_has_one_gradient_with_and_without_the_cache_and_under_dropout(double: TraceModel) -> None:
    objective = Objective(symmetric=True, distil=0.5, direct_ret=0.5, widths={32: 1.0, 8: 1.0})
    text, batch = double.network.model.language_model, batch_of(double, examples(negatives=1))
    hooks = [layer.mlp.register_forward_hook(lambda _, __, out: functional.dropout(out, 0.3)) for layer in text.layers]
    try:
        cached = gradients(double, batch, objective, cache=True, learn=True)
        assert furthest(cached, gradients(double, batch, objective, cache=False, learn=True)) < 1e-9
        assert "log_temperature" in cached
        other = gradients(double, replace(batch, number=6), objective, cache=True, learn=True)
        assert furthest(cached, other) > 1e-3, "another batch drops others"
        plain = gradients(double, batch, Objective(), cache=True)
        assert furthest({n: g for n, g in cached.items() if n in plain}, plain) > 1e-3
    finally:
        for hook in hooks:
            hook.remove()


def test_a_loss_that_is_refused_leaves_no_gradient(double: TraceModel) -> None:
    def refuse(losses: dict[str, float]) -> None:
        raise ArithmeticError(losses)

    reader = Reader(double, 0.1)
    reader.zero_grad(set_to_none=True)
    with pytest.raises(ArithmeticError):
        step(reader, batch_of(double, examples()), Objective(), cache=True, check=refuse)
    assert all(parameter.grad is None for parameter in reader.parameters())


NESTED = Objective(symmetric=True, widths={32: 1.0, 8: 0.5})


def worker(rank: int, world: int, folder: Path) -> None:
    """One of two processes: DDP around the Reader, then shards of it, cached and uncached; the first writes the gradients."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from traceir.train.shard import fetched, shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    model = random_model(3)
    model.network.double()
    batch = batch_of(model, examples(negatives=2), rank=rank, world=world)
    for sharded in (False, True):
        reader = Reader(model, 0.1, learn_temperature=True).train()
        if sharded:
            shard(reader, torch.device("cpu"))
        for cache in (True, False):
            reader.zero_grad(set_to_none=True)
            wrapped = reader if sharded else DistributedDataParallel(reader, broadcast_buffers=False)
            ranks = Distribution(rank, world, even=True) if sharded else Distribution(rank, world, wrapped.no_sync)
            losses = step(wrapped, batch, NESTED, cache=cache, ranks=ranks)
            held = {name: fetched(p.grad, keep=True) for name, p in reader.named_parameters() if p.grad is not None}
            if rank == 0:
                held = {name: gradient.contiguous() for name, gradient in held.items()}
                save_file(held | {"gen": torch.tensor(losses["gen"])}, folder / f"{sharded}-{cache}.safetensors")
            del wrapped  # else its reducer ends gloo while it holds Python's lock, which gloo's thread may be waiting for
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(double: TraceModel, tmp_path: Path) -> None:
    running = [FORKS.Process(target=worker, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    batch = batch_of(double, examples(negatives=2))
    alone = gradients(double, batch, NESTED, cache=True, learn=True)
    alone["gen"] = torch.tensor(step(Reader(double, 0.1), batch, Objective(), cache=True)["gen"])
    for file in sorted(tmp_path.glob("*.safetensors")):
        joint = load_file(file)
        assert (
            joint["gen"].item() == pytest.approx(alone["gen"].item()) and furthest({**joint, "gen": alone["gen"]}, alone) < 1e-9
        ), file
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
