"""Losses by hand; runs that are killed, resumed, split over two processes, or stopped with a reason."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing.process
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from backbones import KINDS, published
from conftest import FORKS, picture
from safetensors.torch import load_file, save_file

from traceir.adapter import Base, _adapter_fingerprint, merge, weights_fingerprint
from traceir.data.samples import Example, Schedule, TaskData
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError, TrainError
from traceir.items import Item, Query
from traceir.lab.mini_presets import resolve
from traceir.model import load, save
from traceir.precision import bfloat16_on
from traceir.train.batches import TrainBatches
from traceir.train.gradcache import Reader
from traceir.train.losses import distillation_loss, generation_loss, retrieval_loss
from traceir.train.small import SmallSize
from traceir.train.train import TrainConfig, train
from traceir.weights import fingerprint

TINY = SmallSize(hidden=32, layers=1, heads=2, inner=48, vision_hidden=32, vision_layers=1, vision_heads=2,
                 vision_inner=32, vocabulary=420)  # fmt: skip


def write_lines(file: Path, records: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-made training folder in M-BEIR's layout: 24 picture-to-text pairs and 24 composed ones with reasoning."""
    root = tmp_path_factory.mktemp("data")
    (root / "mbeir_images").mkdir()
    colours = ("red", "green", "blue", "white", "black", "pink")
    queries, pool, labels = [], [], []
    for number in range(48):
        name = f"mbeir_images/{number}.png"
        picture(number).load().save(root / name)
        composed = number >= 24
        text = f"make it {colours[number % 6]} then {colours[number % 5]}" if composed else None
        queries.append(
            {
                "qid": f"8:{number}",
                "query_txt": text,
                "query_img_path": name,
                "query_src_content": None,
                "query_modality": "image,text" if composed else "image",
                "pos_cand_list": [f"8:{number + 100}"],
                "neg_cand_list": [],
                "task_id": 7 if composed else 3,
            }
        )
        pool.append(
            {
                "did": f"8:{number + 100}",
                "txt": None if composed else f"a {colours[number % 6]} thing {number}",
                "img_path": name if composed else None,
                "modality": "image" if composed else "text",
                "src_content": None,
            }
        )
        if composed:
            labels.append({"qid": f"8:{number}", "steps": 2, "z": 1, "reasoning": f"see {number}", "answer": "a thing"})
    write_lines(root / "query/train/mbeir_cirr_train.jsonl", queries)
    write_lines(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool)
    write_lines(root / "cot/train/mbeir_cirr_train_cot.jsonl", labels)
    write_lines(
        root / "lessons/counting.jsonl",
        [{"img_path": None, "prompt": f"count {n}", "target": " ".join(["one"] * (n % 7 + 1))} for n in range(40)],
    )
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
        "image\ttext\tcirr\t8\tname it\tsay it\nimage,text\timage\tcirr\t8\tchange it\tedit it\n"
    )
    return root


def config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    """Twelve steps in float32, which every processor is quick in."""
    base = TrainConfig(
        data=str(folder), out=str(out), steps=12, batch=8, group=4, warmup=2, size=TINY, save_every=4, log_every=2, decay=0.0,
        mixed_precision=False,
    )  # fmt: skip
    return replace(base, **changes)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_retrieval_loss_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidate = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    rows = [-math.log(math.exp(2) / (math.exp(2) + math.exp(2 * half))), -math.log(math.exp(2 * half) / (math.exp(2 * half) + 1))]
    assert retrieval_loss(query, candidate, 0.5).item() == pytest.approx(sum(rows) / 2, abs=1e-6)
    back = [-math.log(math.exp(2) / (math.exp(2) + 1)), -math.log(math.exp(2 * half) / (2 * math.exp(2 * half)))]
    both = retrieval_loss(query, candidate, 0.5, symmetric=True)
    assert both.item() == pytest.approx((sum(rows) + sum(back)) / 4, abs=1e-6)
    further = torch.cat([candidate, torch.tensor([[0.0, 1.0]])])
    third = [
        -math.log(math.exp(2) / (math.exp(2) + math.exp(2 * half) + 1)),
        -math.log(math.exp(2 * half) / (math.exp(2 * half) + 1 + math.exp(2))),
    ]
    assert retrieval_loss(query, further, 0.5).item() == pytest.approx(sum(third) / 2, abs=1e-6)
    only = retrieval_loss(query, candidate, 0.5, rows_B=torch.tensor([False, True]))
    assert only.item() == pytest.approx(rows[1], abs=1e-6)


def test_a_shared_positive_is_not_a_negative() -> None:
    query = torch.eye(3)
    candidate = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    shared = torch.zeros(3, 3, dtype=torch.bool)
    shared[0, 1] = shared[0, 0] = True
    with_mask = retrieval_loss(query[:1].expand(3, 3), candidate, 0.1, shared)
    without = retrieval_loss(query[:1].expand(3, 3), candidate, 0.1)
    assert with_mask < without
    candidate.requires_grad_()
    rows = retrieval_loss(query, candidate, 0.1, shared)
    rows.backward()
    assert torch.isfinite(candidate.grad).all()


def test_generation_loss_is_cross_entropy_and_zero_without_targets() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert generation_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert generation_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).item() == 0.0


def test_distillation_moves_the_direct_side_alone() -> None:
    direct = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    reasoned = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = distillation_loss(direct, reasoned, torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and reasoned.grad is None
    assert direct.grad is not None and direct.grad[0].abs().sum() > 0 and direct.grad[1].abs().sum() == 0


def batches_of(model_folder: Path, rows: int, **changes: int) -> TrainBatches:
    model = load(model_folder)
    schedule = Schedule([TaskData("made up", range(rows))], [1.0], batch=rows, group=1, batches=1, seed=0)
    return TrainBatches(schedule, model.processor, "brief-1", 200, **changes)


def test_chunks_hold_every_row_once_longest_first_within_the_budget(trained: Path) -> None:
    words = ["red " * (1 + 7 * number % 31) for number in range(16)]
    rows = [Example(Query.of(text=text), "", Item.of(text="a thing", id=f"1:{n}"), frozenset()) for n, text in enumerate(words)]
    turn = batches_of(trained, 16).batch(0, "made up", rows)
    for side in (turn.queries, turn.candidates):
        assert sorted(place for chunk in side for place in chunk.places.tolist()) == list(range(16))
        widths = [chunk.batch.ids.shape[1] for chunk in side]
        assert widths == sorted(widths, reverse=True)
        assert all(chunk.batch.ids.numel() <= 200 or len(chunk.places) == 1 for chunk in side)
    assert turn.tokens == 16, "<|emb|> is a target of every simple query, and of no candidate"


def test_a_turn_is_shared_out_in_the_order_of_the_rows(trained: Path) -> None:
    rows = [Example(Query.of(text=f"red {n}", id=f"q{n}"), "", Item.of(text="x", id=f"1:{n}"), frozenset()) for n in range(6)]
    parts = [batches_of(trained, 6, rank=rank, world=3).batch(0, "made up", rows) for rank in range(3)]
    assert [name for part in parts for name in part.queried] == [f"q{n}" for n in range(6)]
    assert all(part.sizes == ((2, 0), (2, 0), (2, 0)) and part.collision_BN.shape == (6, 6) for part in parts)
    with pytest.raises(TrainError, match="4 processes"):
        batches_of(trained, 6, rank=0, world=4)


def test_rate_warms_up_holds_and_falls(folder: Path) -> None:
    plan = config(folder, folder, steps=100, warmup=10, decay=0.2)
    assert plan.rate(0) == pytest.approx(0.1) and plan.rate(50) == 1.0
    assert plan.rate(90) == pytest.approx(0.5) and plan.rate(99) == pytest.approx(0.05)
    round_ = replace(plan, curve="cosine")
    assert round_.rate(0) == pytest.approx(0.1) and round_.rate(10) == 1.0
    assert round_.rate(55) == pytest.approx(0.5) and round_.rate(100) == pytest.approx(0.0)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, undisturbed."""
    return train(config(folder, tmp_path_factory.mktemp("trained") / "run"))


def test_killed_ten_times_and_resumed_equals_undisturbed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments drawn anew each time; dropout of the adapter's kind is off, shifted pictures are on."""
    settings = {"steps": 24, "save_every": 1, "augment": 2, "accumulate": 2}
    whole = train(config(folder, tmp_path / "whole", **settings))
    broken = config(folder, tmp_path / "broken", **settings)
    draw, kills = random.Random(), 0
    for target in sorted(draw.sample(range(1, 24), 10)):
        child = FORKS.Process(target=train, args=(broken,))
        child.start()
        deadline = time.monotonic() + 120
        while _steps_of(tmp_path / "broken") < target and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        child.kill()
        child.join()
        kills += child.exitcode == -9
    assert kills >= 8, "a kill that came too late is no test"
    resumed = train(broken)
    assert same(whole, resumed)
    curves = [
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in file.read_text().splitlines()]
        for file in (tmp_path / "whole/log.jsonl", tmp_path / "broken/log.jsonl")
    ]
    assert curves[0] == curves[1], "the loss curve is the same, to the last digit"
    assert [line["step"] for line in curves[0]] == list(range(2, 25, 2))
    assert train(broken) == resumed, "a finished run is left alone"


def _steps_of(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # another process makes and removes it
        return max((int(place.name) for place in (run / "steps").glob("[0-9]*")), default=0)
    return 0


@pytest.fixture(scope="module")
def adapted(folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of six steps with LoRA over `trained`, whose third step is kept."""
    place = tmp_path_factory.mktemp("adapted") / "run"
    made = config(
        folder, place, init=str(trained), lora_rank=4, lora_alpha=8, lora_dropout=0.2, steps=6, save_every=3, keep=(3,)
    )  # fmt: skip
    train(made)
    return made


def test_an_adapter_with_dropout_resumes_to_the_same_weights(adapted: TrainConfig, tmp_path: Path) -> None:
    whole, step = Path(adapted.out) / "checkpoint", Path(adapted.out) / "steps/000003"
    again = train(replace(adapted, out=str(tmp_path / "again"), keep=()), resume_from=step)
    first, second = (load_file(place / "adapter_model.safetensors") for place in (whole, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    untouched = load_file(step / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], untouched[name]) for name in first)
    assert load(whole).settings.read_out == "before_token", "an adapter folder loads like any checkpoint"


def test_field_report_04_a_resume_point_with_lora_is_a_model(folder: Path, adapted: TrainConfig, tmp_path: Path) -> None:
    step, bare = Path(adapted.out) / "steps/000003", tmp_path / "bare"
    assert (step / "optimiser.safetensors").is_file()
    shutil.copytree(step, bare, ignore=shutil.ignore_patterns("optimiser.safetensors", "*step.json", "trainer_state.json"))
    assert load(step).fingerprint == load(bare).fingerprint != load(Path(adapted.out) / "checkpoint").fingerprint
    assert load(merge(step, tmp_path / "merged")).fingerprint == weights_fingerprint(tmp_path / "merged")
    further = train(config(folder, tmp_path / "run", init=str(step), steps=1, lora_rank=2, lora_alpha=4))
    assert json.loads((further / "traceir.json").read_text())["base"]["fingerprint"] == weights_fingerprint(bare)
    assert load(further).fingerprint != load(step).fingerprint


def test_field_report_04_a_resume_point_of_all_weights_is_a_base(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Also for adapters of earlier releases, which counted what lay beside its weights."""
    step = shutil.copytree(trained.parent / "steps/000012", tmp_path / "step")
    assert weights_fingerprint(step) == load(step).fingerprint == load(trained).fingerprint
    made = train(config(folder, tmp_path / "run", init=str(step), steps=1, lora_rank=2, lora_alpha=4))
    assert load(made).fingerprint
    every = fingerprint(step, list(step.glob("*.safetensors")))
    told = json.loads((made / "traceir.json").read_text())
    told["base"]["fingerprint"] = every
    told["fingerprint"] = _adapter_fingerprint(made, Base(str(step), every))
    (made / "traceir.json").write_text(json.dumps(told))
    assert load(made).fingerprint == told["fingerprint"]
    save_file({"x": torch.zeros(1)}, step / "optimiser.safetensors")
    with pytest.raises(ModelError, match="is an adapter over weights"):
        load(made)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_backbones_train_by_gradcache_and_resume_to_the_same_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    start = save(load(published(tmp_path / "hub", kind), prompt_version="brief-1"), tmp_path / "start")
    plan = config(
        folder, tmp_path / "whole", init=str(start), lora_rank=2, lora_alpha=4, steps=2, batch=4, group=2, save_every=1,
        keep=(1,), grad_cache=True, checkpointing=True, chunk_tokens=128, min_pixels=2 * 32 * 32, max_pixels=4 * 32 * 32,
    )  # fmt: skip
    whole = train(plan)
    again = train(replace(plan, out=str(tmp_path / "again"), keep=()), resume_from=tmp_path / "whole/steps/000001")
    first, second = (load_file(place / "adapter_model.safetensors") for place in (whole, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any("visual.merger" in name for name in first)
    assert any("deepstack_merger_list" in name for name in first) == (kind == "qwen3_vl")
    assert any("linear_attn.in_proj_qkv.lora_A" in name for name in first) == (kind == "qwen3_5")
    assert load(whole).processor.image.max_pixels == 4 * 32 * 32 and load(whole).fingerprint != load(start).fingerprint


def test_a_frozen_vision_encoder_still_trains_the_mergers_of_deepstack(folder: Path, tmp_path: Path) -> None:
    start = save(load(published(tmp_path / "hub", "qwen3_vl"), prompt_version="brief-1"), tmp_path / "start")
    done = train(config(folder, tmp_path / "run", init=str(start), steps=1, batch=4, train_vision=False))
    before, after = weights(start), weights(done)
    changed = {name for name in before if "visual" in name and not torch.equal(before[name], after[name])}
    assert any("deepstack_merger_list" in name for name in changed) and all("merger" in name for name in changed)


def command(arguments: list[str], environment: dict[str, str], told: Path) -> None:
    """The command itself in a process of its own; what it says on stderr goes into `told`."""
    from traceir.cli.main import main

    os.environ.update(environment)
    with told.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    sys.exit(main(arguments))


def started(arguments: list[str], processes: int, told: Path) -> list[multiprocessing.process.BaseProcess]:
    """The command under the environment that torchrun sets, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if processes > 1 else {}
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(FORKS.Process(target=command, args=(arguments, shared | place, told.with_name(f"{told.name}-{rank}"))))
        running[-1].start()
    return running


def ended(running: list[multiprocessing.process.BaseProcess], told: Path) -> None:
    for process in running:
        process.join(timeout=240)
    said = "\n".join(file.read_text()[-2000:] for file in told.parent.glob(f"{told.name}-*"))
    assert [process.exitcode for process in running] == [0] * len(running), said


def small_run(folder: Path, start: Path, out: Path, *settings: str) -> list[str]:
    """Six steps in several chunks a side."""
    every = ("steps=6", "batch=8", "family=4", "save_every=100", "mixed_precision=false", "grad_cache=true", "chunk_tokens=120",
             "learn_temperature=true", "warmup=2", "log_every=2", "augment=0", *settings)  # fmt: skip
    sets = [word for setting in every for word in ("--set", setting)]
    return ["--threads", "1", "train", "--preset", "emoji", "--data", str(folder), "--init", str(start), *sets, "--out", str(out)]


def log_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_what_one_does(folder: Path, trained: Path, tmp_path: Path, sharded: bool) -> None:
    """The command, DDP or shards over gloo."""
    launches = {"one": started(small_run(folder, trained, tmp_path / "one"), 1, tmp_path / "told-one")}
    asked = small_run(folder, trained, tmp_path / "two", f"shard={str(sharded).lower()}")
    launches["two"] = started(asked, 2, tmp_path / "told-two")
    for name, running in launches.items():
        ended(running, tmp_path / f"told-{name}")
    before, one, two_ = (weights(place) for place in (trained, tmp_path / "one/checkpoint", tmp_path / "two/checkpoint"))
    assert one.keys() == two_.keys()
    moved = math.sqrt(sum(float((one[n] - before[n]).square().sum()) for n in one))
    apart = math.sqrt(sum(float((one[n] - two_[n]).square().sum()) for n in one))
    assert moved > 0.01 and apart < 1e-3 * moved, (moved, apart)
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert first == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in second.items()}


def test_a_sharded_adapter_goes_on_after_a_kill(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit in shards again; and in one process, which reads the same step folder, up to rounding."""
    settings = ("lora_rank=4", "lora_alpha=8", "save_every=1", "keep=2")
    broken = small_run(folder, trained, tmp_path / "broken", *settings, "shard=true")
    whole = started(small_run(folder, trained, tmp_path / "whole", *settings, "shard=true"), 2, tmp_path / "told-whole")
    running = started(broken, 2, tmp_path / "told-broken")
    deadline = time.monotonic() + 120
    while _steps_of(tmp_path / "broken") < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in running:
        process.kill()
        process.join()
    assert not (tmp_path / "broken/checkpoint").exists(), "a kill that came too late is no test"
    alone = [*small_run(folder, trained, tmp_path / "alone", *settings), "--resume-from", str(tmp_path / "broken/steps/000002")]
    lone, resumed = started(alone, 1, tmp_path / "told-alone"), started(broken, 2, tmp_path / "told-resumed")
    for name, processes in (("whole", whole), ("alone", lone), ("resumed", resumed)):
        ended(processes, tmp_path / f"told-{name}")
    places = (tmp_path / name / "checkpoint/adapter_model.safetensors" for name in ("whole", "broken", "alone"))
    first, second, third = map(load_file, places)
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys() == third.keys()
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    apart = max(float((first[name] - third[name]).abs().max() / first[name].abs().max()) for name in first)
    assert apart < 1e-3


PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


@pytest.mark.parametrize("variable", PLUGINS)
def test_a_launch_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(TrainError, match=rf"{variable}=true.*torchrun.*shard=true"):
        train(config(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_settings_that_never_ran_are_refused_with_the_remedy() -> None:
    for setting in ("deepspeed=zero3.json", "fsdp=fsdp.json"):
        with pytest.raises(InputError, match=r"not supported; start it with torchrun, and set shard=true"):
            resolve("emoji", data="nowhere", settings=[setting])


def test_the_number_of_processes_is_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match="this is the only one; start it with torchrun"):
        train(config(tmp_path / "nowhere", tmp_path / "run", shard=True))
    monkeypatch.setattr(PartialState, "num_processes", 3)
    with pytest.raises(TrainError, match="batch 8 does not divide among 3 processes"):
        train(config(tmp_path / "nowhere", tmp_path / "run"))


def test_workers_and_chunks_change_nothing_that_is_learnt(folder: Path, trained: Path, tmp_path: Path) -> None:
    plan = config(folder, tmp_path / "workers", workers=2, store_pixels=False)
    assert same(train(plan), trained)


def test_checkpointing_in_bfloat16_changes_nothing_that_is_learnt(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Attention runs as it ran the first time when it is computed again."""
    plan = config(folder, tmp_path / "plain", init=str(trained), steps=1, grad_cache=True, mixed_precision=True)
    assert same(train(plan), train(replace(plan, out=str(tmp_path / "run"), checkpointing=True)))


def test_frozen_parts_stay_as_they_were(folder: Path, trained: Path, tmp_path: Path) -> None:
    frozen = train(config(folder, tmp_path / "run", init=str(trained), steps=2, train_vision=False, learning_rate=0.01))
    before, after = weights(trained), weights(frozen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("visual.merger" in name for name in changed) and any("self_attn" in name for name in changed)
    assert not [name for name in changed if "visual" in name and "merger" not in name]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Sets whether the processor is the faster one in bfloat16."""

    def set_to(fast: bool) -> None:
        bfloat16_on.cache_clear()
        monkeypatch.setattr("traceir.precision._seconds", lambda *given: 0.5 if given[-1] == fast else 1.0)

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    yield set_to
    bfloat16_on.cache_clear()


def recorded(run: Path) -> list[object]:
    return [json.loads((run / "config.json").read_text())["mixed_precision"],
            json.loads((run / "meta.json").read_text())["config"]["mixed_precision"]]  # fmt: skip


@pytest.mark.parametrize("fast", [True, False])
def test_field_report_01_the_faster_type_is_taken_recorded_and_kept(
    folder: Path, tmp_path: Path, processor: Callable[[bool], None], caplog: pytest.LogCaptureFixture, fast: bool
) -> None:
    caplog.set_level(logging.INFO, "traceir.train.config")
    processor(fast)
    plan = config(folder, tmp_path / "run", steps=2, save_every=1, keep=(1,), mixed_precision="auto")
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "forward", _noting_autocast(Reader.forward, seen))
        done = train(plan)
    assert set(seen) == {fast} and recorded(done.parent) == [fast, fast]
    name, times = ("bfloat16", "0.50") if fast else ("float32", "2.00")
    assert f"{name}: layers of width 32 take {times} times as long in bfloat16 on this processor" in caplog.text
    shutil.rmtree(done)
    processor(not fast)
    caplog.clear()
    train(plan)
    assert recorded(done.parent) == [fast, fast], "a run that goes on elsewhere keeps its type"
    assert f"{name}: as {tmp_path}/run/config.json says" in caplog.text
    assert ("mixed_precision=true is slow here" in caplog.text) == fast
    train(replace(plan, out=str(tmp_path / "branch")), resume_from=tmp_path / "run/steps/000001")
    assert recorded(tmp_path / "branch") == [fast, fast], "and so does one that starts at its step"
    with pytest.raises(TrainError, match="mixed_precision"):
        train(replace(plan, mixed_precision=not fast))


def _noting_autocast(forward: Callable[..., object], seen: list[bool]) -> Callable[..., object]:
    def noting(*args: object, **options: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **options)

    return noting


@pytest.mark.parametrize("asked", [True, False])
def test_field_report_01_what_is_asked_for_counts_more(
    folder: Path, tmp_path: Path, processor: Callable[[bool], None], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, asked: bool,
) -> None:  # fmt: skip
    processor(not asked)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if asked else "bf16")
    seen: list[bool] = []
    monkeypatch.setattr(Reader, "forward", _noting_autocast(Reader.forward, seen))
    train(config(folder, tmp_path / "run", steps=1, mixed_precision=asked))
    assert set(seen) == {asked} and recorded(tmp_path / "run") == [asked, asked]
    assert ("mixed_precision=true is slow here" in caplog.text) == asked


def test_field_report_01_weights_in_a_slow_type_are_told(
    folder: Path, trained: Path, tmp_path: Path, processor: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    processor(False)
    train(config(folder, tmp_path / "run", init=str(trained), steps=1, lora_rank=2, dtype="bfloat16", mixed_precision="auto"))
    assert recorded(tmp_path / "run") == [False, False] and "dtype=bfloat16 is slow here" in caplog.text
    caplog.clear()
    Encoder(load(trained, dtype=torch.bfloat16))
    assert "the weights are in bfloat16, which is slow here" in caplog.text
    caplog.clear()
    Encoder(load(trained))
    processor(True)
    Encoder(load(trained, dtype=torch.bfloat16))
    assert not caplog.text


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's limit is one of x86")
def test_field_report_01_a_processor_without_the_instructions_is_seen() -> None:
    asked = "from traceir.precision import bfloat16_on; print(bfloat16_on('cpu').fast)"
    told = subprocess.run(
        [sys.executable, "-c", asked], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert told.stdout == "False\n"


def test_field_report_01_a_gpu_that_emulates_is_not_taken_for_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        bfloat16_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: including_emulation or native
        )
        found = bfloat16_on("cuda:1")
        assert found.fast == native and found.why.startswith("A GPU has " if native else "A GPU has no bfloat16 units")
    bfloat16_on.cache_clear()
    assert not bfloat16_on("mps").fast


@pytest.mark.parametrize(("ratio", "told"), [(0.94, False), (1.01, False), (1.3, True)])
def test_a_type_that_is_as_fast_and_half_as_large_is_no_reason_for_a_warning(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ratio: float, told: bool
) -> None:
    bfloat16_on.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("traceir.precision._seconds", lambda *given: ratio if given[-1] else 1.0)
    Encoder(load(trained, dtype=torch.bfloat16))
    assert ("which is slow here" in caplog.text) == told and not bfloat16_on("cpu", 32).fast
    bfloat16_on.cache_clear()


def test_field_report_01_asking_draws_no_random_number() -> None:
    bfloat16_on.cache_clear()
    before = torch.get_rng_state()
    bfloat16_on("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    train(config(folder, tmp_path / "run", steps=2))
    with pytest.raises(TrainError, match="learning_rate"):
        train(config(folder, tmp_path / "run", steps=2, learning_rate=1.0))
    with pytest.raises(TrainError, match="nosuch_task9"):
        train(config(folder, tmp_path / "other", weights={"nosuch_task9": 1.0}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curve": "round"}, "hold or cosine"),
        ({"dtype": "bfloat16"}, "lora_rank"),
        ({"read_out": "at_token", "distil": 0.5}, "before_token"),
        ({"lora_rank": 4}, "--init"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"mixed_precision": "yes"}, "choose auto, True or False"),
        ({"cot": "most"}, "most"),
        ({"report_to": ("nosuchtracker",)}, "nosuchtracker"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(folder: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises((InputError, TrainError), match=said):
        train(config(folder, tmp_path / "run", **changes))


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"loss of cirr_task\d is nan on queries 8:"):
        train(config(folder, tmp_path / "run", lambda_ret=float("nan"), precheck=False))


def test_a_loss_that_runs_away_stops_with_the_batch_named(folder: Path, trained: Path, tmp_path: Path) -> None:
    plan = config(
        folder, tmp_path / "run", init=str(trained), steps=60, learning_rate=5.0, warmup=45, clip=1e9, diverged=3.0, log_every=1
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"step \d+: loss of cirr_task\d is .* on queries 8:.* times what it was"):
        train(plan)


def test_memory_that_runs_out_is_told_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> dict[str, float]:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr("traceir.train.loop.step", full)
    with pytest.raises(TrainError, match=r"longest samples \(task cirr_task7, \d+ tokens, queries 8:.*chunk_tokens"):
        train(config(folder, tmp_path / "run"))
    assert not (tmp_path / "run/checkpoint").exists()


def test_the_tracker_gets_every_line_of_the_log(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(folder, tmp_path / "run", steps=4, report_to=("tensorboard",)))
    (events,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents*")}
    found = EventAccumulator(str(events))
    found.Reload()
    told = {one.step: one.value for one in found.Scalars("train/norm")}
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert told == {line["step"]: pytest.approx(line["norm"], abs=2e-6) for line in lines}, "float32, and six decimals"


def test_epochs_decide_the_steps(folder: Path, tmp_path: Path) -> None:
    train(config(folder, tmp_path / "run", epochs=0.5, steps=1000))
    assert json.loads((tmp_path / "run/meta.json").read_text())["config"]["steps"] == 3, "48 pairs, half of them, 8 a step"


def test_lessons_then_pairs_share_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = train(config(folder, tmp_path / "lessons", teach="lessons", steps=3))
    second = train(config(folder, tmp_path / "pairs", init=str(first), steps=3))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_runs_leave_no_pickles(folder: Path, trained: Path) -> None:
    files = [file.suffix for file in trained.parent.rglob("*") if file.is_file() and file.name != "pixels.bin"]
    assert files and not {".bin", ".pt", ".pth", ".pkl"} & set(files)
