"""The step of training: cached and uncached, one process and two, against autograd on the loss written out plainly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FORKS, picture, random_model
from torch.nn import functional

from traceir.data.samples import Example, Schedule, TaskData
from traceir.items import Item, Query
from traceir.model import TraceModel
from traceir.train.batches import TrainBatch, TrainBatches
from traceir.train.gradcache import Objective, Reader, step


def examples(count: int, negatives: int = 0) -> list[Example]:
    """Pairs of all modalities; every third query is complex, and two neighbours share a positive."""
    found = []
    for number in range(count):
        shown = picture(number, 48 + 48 * (number % 4 == 3), 48) if number % 2 else None
        text = " ".join(["red", "cube", "then", "blue"][: 1 + number % 4])
        did = f"1:{number - number % 2 if number < 4 else number}"
        wrong = tuple(Item.of(text=f"wrong {number} {n}", id=f"2:{number}{n}") for n in range(negatives * (number % 2)))
        item = Item.of(text=f"ball {number}", image=picture(number + 50) if number % 3 == 0 else None, id=did)
        completion = "left red cube, middle blue ball" if number % 3 == 2 else ""
        found.append(Example(Query.of(text=text, image=shown), completion, item, frozenset({did, "1:0"}), wrong))
    return found


def batches(model: TraceModel, chunk_tokens: int, rank: int = 0, world: int = 1, batch: int = 8) -> TrainBatches:
    schedule = Schedule([TaskData("made up", range(batch))], [1.0], batch=batch, group=1, batches=1, seed=0)
    return TrainBatches(schedule, model.processor, "brief-1", chunk_tokens, rank=rank, world=world)


def gradients(
    model: TraceModel, turn: TrainBatch, objective: Objective, *, cache: bool, learn: bool = False
) -> dict[str, torch.Tensor]:
    reader = Reader(model, 0.1, learn_temperature=learn).train()
    reader.zero_grad(set_to_none=True)
    step(reader, turn, objective, cache=cache)
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
    turn = batches(model, 10**9, batch=len(rows)).batch(0, "made up", rows)
    (asked,), (offered,) = turn.queries, turn.candidates
    for parameter in model.network.parameters():
        parameter.grad = None
    hidden = model.hidden(asked.batch)
    targets = asked.batch.targets
    gen = functional.cross_entropy(model.logits(hidden[targets >= 0]), targets[targets >= 0])
    query = hidden[torch.arange(len(rows)), asked.batch.readout][asked.places.argsort()]
    candidate = model.hidden(offered.batch)[:, -1][offered.places.argsort()]
    scores = functional.normalize(query, dim=-1) @ functional.normalize(candidate, dim=-1).T / 0.1
    keep = ~turn.collision_BN
    keep[torch.arange(len(rows)), torch.arange(len(rows))] = True
    scores = scores.masked_fill(~keep, float("-inf"))
    ret = functional.cross_entropy(scores, torch.arange(len(rows)))
    (objective.lambda_gen * gen + objective.lambda_ret * ret).backward()
    return {f"network.{name}": p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cache", [True, False])
def test_gradients_equal_those_of_the_loss_written_out(double: TraceModel, cache: bool) -> None:
    objective, rows = Objective(lambda_gen=0.7, lambda_ret=1.3), examples(8, negatives=2)
    turn = batches(double, 90).batch(0, "made up", rows)
    assert len(turn.queries) > 2 and len(turn.candidates) > 2, "several chunks a side"
    assert furthest(gradients(double, turn, objective, cache=cache), plain_gradients(double, objective, rows)) < 1e-9


def test_gradients_are_equal_with_dropout_too(double: TraceModel) -> None:
    text = double.network.model.language_model
    for layer in text.layers:
        layer.self_attn.attention_dropout = 0.2
    hooks = [layer.mlp.register_forward_hook(lambda _, __, out: functional.dropout(out, 0.3)) for layer in text.layers]
    try:
        turn = batches(double, 90).batch(5, "made up", examples(8))
        cached = gradients(double, turn, Objective(), cache=True)
        again = gradients(double, replace(turn, number=6), Objective(), cache=True)
        assert furthest(cached, gradients(double, turn, Objective(), cache=False)) < 1e-9
        assert furthest(cached, again) > 1e-3, "another turn drops others"
    finally:
        for hook in hooks:
            hook.remove()
        for layer in text.layers:
            layer.self_attn.attention_dropout = 0.0


def test_every_term_has_one_gradient_with_and_without_the_cache(double: TraceModel) -> None:
    objective = Objective(symmetric=True, distil=0.5, direct_ret=0.5)
    turn = batches(double, 90).batch(0, "made up", examples(8, negatives=1))
    cached = gradients(double, turn, objective, cache=True, learn=True)
    assert furthest(cached, gradients(double, turn, objective, cache=False, learn=True)) < 1e-9
    assert "log_temperature" in cached
    plain = gradients(double, turn, Objective(), cache=True)
    assert furthest({n: g for n, g in cached.items() if n in plain}, plain) > 1e-3


def test_lessons_teach_by_language_model_loss_alone(double: TraceModel) -> None:
    rows = [Example(Query.of(text=f"count {n}"), "red " * (n % 4 + 1), None, frozenset()) for n in range(8)]
    turn = batches(double, 60).batch(0, "lessons", rows)
    assert not turn.candidates and len(turn.queries) > 1
    found = gradients(double, turn, Objective(lambda_gen=2.0), cache=True)
    batch = batches(double, 10**9).batch(0, "lessons", rows).queries[0].batch
    for parameter in double.network.parameters():
        parameter.grad = None
    supervised = batch.targets >= 0
    loss = functional.cross_entropy(double.logits(double.hidden(batch)[supervised]), batch.targets[supervised])
    (2.0 * loss).backward()
    plain = {f"network.{n}": p.grad for n, p in double.network.named_parameters() if p.grad is not None}
    assert furthest(found, plain) < 1e-9


def test_a_loss_that_is_refused_leaves_no_gradient(double: TraceModel) -> None:
    class RefusedError(Exception):
        pass

    def refuse(losses: dict[str, float]) -> None:
        raise RefusedError(losses)

    reader = Reader(double, 0.1)
    reader.zero_grad(set_to_none=True)
    turn = batches(double, 90).batch(0, "made up", examples(8))
    with pytest.raises(RefusedError):
        step(reader, turn, Objective(), cache=True, check=refuse)
    assert all(parameter.grad is None for parameter in reader.parameters())


def worker(rank: int, world: int, folder: Path) -> None:
    """One of two processes: DDP around the Reader, then shards of it, cached and uncached; the first writes the gradients."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.nn.parallel import DistributedDataParallel

    from traceir.train.gradcache import Distribution
    from traceir.train.shard import fetched, shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    model = random_model(3)
    model.network.double()
    turn = batches(model, 90, rank, world).batch(0, "made up", examples(8, negatives=2))
    for cache in (True, False):
        reader = Reader(model, 0.1, learn_temperature=True).train()
        reader.zero_grad(set_to_none=True)
        wrapped = DistributedDataParallel(reader, broadcast_buffers=False)
        step(
            wrapped, turn, Objective(symmetric=True), cache=cache,
            ranks=Distribution(rank, world, wrapped.no_sync),
        )  # fmt: skip
        if rank == 0:
            found = {name: p.grad.contiguous() for name, p in reader.named_parameters() if p.grad is not None}
            save_file(found, folder / f"{cache}.safetensors")
    shard(reader, torch.device("cpu"))
    for cache in (True, False):
        reader.zero_grad(set_to_none=True)
        step(
            reader, turn, Objective(symmetric=True), cache=cache,
            ranks=Distribution(rank, world, even=True),
        )  # fmt: skip
        found = {name: fetched(p.grad, keep=rank == 0) for name, p in reader.named_parameters() if p.grad is not None}
        if rank == 0:
            save_file(found, folder / f"sharded-{cache}.safetensors")
    del wrapped  # else its reducer ends gloo while it holds Python's lock, which gloo's thread may be waiting for
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(double: TraceModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    running = [FORKS.Process(target=worker, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    turn = batches(double, 90).batch(0, "made up", examples(8, negatives=2))
    alone = gradients(double, turn, Objective(symmetric=True), cache=True, learn=True)
    for file in ("True", "False", "sharded-True", "sharded-False"):
        assert furthest(load_file(tmp_path / f"{file}.safetensors"), alone) < 1e-9, file
