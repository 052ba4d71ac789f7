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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import KINDS, published
from conftest import FORKS
from safetensors.torch import load_file, save_file
from train_folder import TINY, make_folder, tiny_model

from traceir.adapter import adapter_fingerprint, weights_fingerprint
from traceir.checkpoint import fingerprint
from traceir.data.samples import Example, Schedule, TaskData
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError, TrainError
from traceir.items import Item, Query
from traceir.lab.mini_presets import resolve
from traceir.model import load, merge, save
from traceir.precision import Speed, bfloat16_on
from traceir.train.batches import TrainBatches
from traceir.train.config import TrainConfig, settled
from traceir.train.losses import distillation_loss, generation_loss, nested_retrieval_loss, retrieval_loss
from traceir.train.train import train

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "m")


def config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    """Twelve steps in float32, which every processor is quick in."""
    base = TrainConfig(
        data=str(folder), out=str(out), steps=12, batch=8, group=4, warmup=2, size=TINY, save_every=4, log_every=2, decay=0.0,
        mixed_precision=False,
    )  # fmt: skip
    return replace(base, **changes)


def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints, or adapters, hold the same weights to the last bit."""
    names = {file.name for file in (*first.glob("*.safetensors"), *second.glob("*.safetensors"))} - {"optimiser.safetensors"}
    for name in names:
        weights, other = load_file(first / name), load_file(second / name)
        if weights.keys() != other.keys() or not all(torch.equal(weights[key], other[key]) for key in weights):
            return False
    return bool(names)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def log_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# Losses and batches


def nll(own: float, *others: float) -> float:
    """-log of the softmax of one score among all."""
    return -math.log(math.exp(own) / sum(map(math.exp, (own, *others))))


def test_retrieval_loss_by_hand() -> None:
    query, candidate = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    further, half = torch.cat([candidate, torch.tensor([[0.0, 1.0]])]), math.sqrt(2.0)  # half a right angle over 0.5
    rows, columns = [nll(2, half), nll(half, 0)], [nll(2, 0), nll(half, half)]
    shared = torch.tensor([[True, True], [False, False]])
    for loss, wanted in (
        (retrieval_loss(query, candidate, 0.5), sum(rows) / 2),
        (retrieval_loss(query, candidate, 0.5, symmetric=True), sum(rows + columns) / 4),
        (retrieval_loss(query, further, 0.5), (nll(2, half, 0) + nll(half, 0, 2)) / 2),
        (retrieval_loss(query, candidate, 0.5, rows_B=torch.tensor([False, True])), rows[1]),
        (retrieval_loss(query, candidate, 0.5, shared), rows[1] / 2),  # its own counts, whatever it collides with
    ):
        assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_nested_loss_is_the_weighted_sum_over_first_components() -> None:
    query, candidate = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 9.0]])
    half = math.sqrt(2.0)  # half a right angle over 0.5
    first_two = (nll(2, half) + nll(half, 0)) / 2  # [1, 0] and [0, 1] against [1, 0] and [1, 1] / sqrt 2
    whole = retrieval_loss(query, candidate, 0.5).item()
    nested = nested_retrieval_loss(query, candidate, 0.5, widths={3: 1.0, 2: 0.25})
    assert nested.item() == pytest.approx(whole + 0.25 * first_two, abs=1e-6)
    assert nested_retrieval_loss(query, candidate, 0.5, widths={}).item() == pytest.approx(whole)
    left_out, rows = torch.tensor([[False, True], [False, False]]), torch.tensor([True, False])
    assert nested_retrieval_loss(query, candidate, 0.5, left_out, widths={2: 1.0}, rows_B=rows).item() == pytest.approx(0.0)


def test_generation_and_distillation_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert generation_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert generation_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).item() == 0.0
    direct = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    reasoned = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = distillation_loss(direct, reasoned, torch.tensor([True, False]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and reasoned.grad is None
    assert direct.grad is not None and direct.grad[0].abs().sum() > 0 and direct.grad[1].abs().sum() == 0


def batches_of(rows: int, **changes: int) -> TrainBatches:
    model = tiny_model()
    schedule = Schedule([TaskData("made up", range(rows))], [1.0], batch=rows, group=1, batches=1, seed=0)
    return TrainBatches(schedule, model.processor, "brief-1", 200, **changes)


def test_chunks_hold_every_row_once_longest_first_within_the_budget() -> None:
    words = ["red " * (1 + 7 * number % 31) for number in range(16)]
    rows = [Example(Query.of(text=text), "", Item.of(text="a thing", id=f"1:{n}"), frozenset()) for n, text in enumerate(words)]
    batch = batches_of(16).batch(0, "made up", rows)
    for side in (batch.queries, batch.candidates):
        assert sorted(row for chunk in side for row in chunk.rows.tolist()) == list(range(16))
        widths = [chunk.batch.ids.shape[1] for chunk in side]
        assert widths == sorted(widths, reverse=True)
        assert all(chunk.batch.ids.numel() <= 200 or len(chunk.rows) == 1 for chunk in side)
    assert batch.tokens == 16, "<|emb|> is a target of every simple query, and of no candidate"


def test_a_batch_is_shared_out_in_the_order_of_the_rows() -> None:
    rows = [Example(Query.of(text=f"red {n}", id=f"q{n}"), "", Item.of(text="x", id=f"1:{n}"), frozenset()) for n in range(6)]
    parts = [batches_of(6, rank=rank, world=3).batch(0, "made up", rows) for rank in range(3)]
    assert [name for part in parts for name in part.queried] == [f"q{n}" for n in range(6)]
    assert all(part.sizes == ((2, 0), (2, 0), (2, 0)) and part.collision_BN.shape == (6, 6) for part in parts)
    with pytest.raises(TrainError, match="batch 6 does not divide among 4 processes"):
        batches_of(6, rank=0, world=4)


# Configurations


def test_rate_warms_up_holds_and_falls(folder: Path) -> None:
    plan = config(folder, folder, steps=100, warmup=10, decay=0.2)
    assert [plan.rate(step) for step in (0, 50, 90, 99)] == pytest.approx([0.1, 1.0, 0.5, 0.05])
    assert [replace(plan, curve="cosine").rate(step) for step in (0, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])


def test_names_of_earlier_releases_are_read_and_settings_that_never_ran_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolve("emoji", data=str(tmp_path), settings=["family=8", "teach=lessons", "read_out=at_token", "steps=3"])
    assert (config.group, config.teach, config.steps, config.pooling_position) == (8, "pretraining", 3, "at_token")
    assert "--set family=8 is now --set group=8" in caplog.text and TrainConfig("d", "o", teach="lessons").teach == "pretraining"
    for setting in ("deepspeed=zero3.json", "fsdp=fsdp.json"):
        with pytest.raises(InputError, match=r"not supported; start it with torchrun, and set shard=true"):
            resolve("emoji", data="nowhere", settings=[setting])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curve": "round"}, "hold or cosine"),
        ({"dtype": "bfloat16"}, "lora_rank"),
        ({"pooling_position": "at_token", "distil": 0.5}, "before_token"),
        ({"lora_rank": 4}, "--init"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"mixed_precision": "yes"}, "choose auto, True or False"),
        ({"cot": "most"}, "most"),
        ({"matryoshka_dims": (16, 16)}, "each width once"),
        ({"matryoshka_dims": (0,)}, "each width once"),
        ({"matryoshka_dims": (16, 8), "matryoshka_weights": (1.0,)}, "a weight for each or none"),
        ({"matryoshka_dims": (16,), "matryoshka_weights": (0.0,)}, "above 0"),
        ({"matryoshka_dims": (16,), "teach": "pretraining"}, "this run has none"),
        ({"matryoshka_dims": (64,)}, "names 64, and vectors of this model have 32"),
        ({"report_to": ("nosuchtracker",)}, "nosuchtracker"),
        ({"weights": {"nosuch_task9": 1.0}}, "nosuch_task9"),
        ({"shard": True}, "this is the only one; start it with torchrun"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_made(
    folder: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises((InputError, TrainError), match=message):
        train(config(folder, tmp_path / "run", **changes))


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launch_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(TrainError, match=rf"{plugin}=true.*torchrun.*shard=true"):
        train(config(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# bfloat16 or float32


@pytest.mark.parametrize("fast", [True, False])
def test_the_faster_type_is_taken_told_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool
) -> None:
    def processor(quick: bool) -> None:
        monkeypatch.setattr("traceir.train.config.bfloat16_on", lambda *_: Speed(quick, "made up", slow=not quick))

    caplog.set_level(logging.INFO, "traceir.train.config")
    processor(fast)
    plan, file = config(folder, tmp_path / "run", mixed_precision="auto"), tmp_path / "config.json"
    assert settled(plan, "cpu", file).mixed_precision == fast
    assert f"{'bfloat16' if fast else 'float32'}: made up" in caplog.text and "is slow here" not in caplog.text
    file.write_text(json.dumps({"mixed_precision": fast}))
    processor(not fast)
    caplog.clear()
    assert settled(plan, "cpu", file).mixed_precision == fast, "a run that goes on elsewhere keeps its type"
    assert f"as {file} says" in caplog.text and ("mixed_precision=true is slow here" in caplog.text) == fast
    assert settled(replace(plan, mixed_precision=not fast), "cpu", file).mixed_precision != fast, "what is asked for counts more"
    half = replace(plan, mixed_precision=False, lora_rank=2, dtype="bfloat16")
    assert not settled(half, "cpu", file).mixed_precision and ("dtype=bfloat16 is slow here" in caplog.text) == fast


@pytest.fixture
def untried() -> Iterator[None]:
    """No answer is remembered, before and afterwards."""
    bfloat16_on.cache_clear()
    yield
    bfloat16_on.cache_clear()


@pytest.mark.parametrize(("ratio", "slow_here", "taken"), [(0.5, False, True), (0.94, False, False), (1.3, True, False)])
def test_weights_in_a_slow_type_are_told(
    untried: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ratio: float, slow_here: bool, taken: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("traceir.precision._seconds", lambda width, length, half: ratio if half else 1.0)
    assert bfloat16_on("cpu", 32).fast == taken
    model = tiny_model()
    model.network.to(torch.bfloat16)
    Encoder(model)
    assert ("the weights are in bfloat16, which is slow here" in caplog.text) == slow_here


@pytest.mark.parametrize("native", [True, False])
def test_asking_draws_no_random_number_and_emulation_is_not_fast(
    untried: None, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    before = torch.get_rng_state()
    bfloat16_on("cpu", 32)
    assert torch.equal(torch.get_rng_state(), before) and not bfloat16_on("mps").fast
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    precision = bfloat16_on("cuda:1")
    assert precision.fast == native and precision.why.startswith("A GPU has " if native else "A GPU has no bfloat16 units")


@slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's limit is one of x86")
def test_a_processor_without_the_instructions_is_seen() -> None:
    asked = "from traceir.precision import bfloat16_on; print(bfloat16_on('cpu').fast)"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@slow
def test_the_type_asked_for_is_computed_in_and_checkpointing_changes_nothing(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever accelerate's launcher says. Attention runs as it ran the first time when it is computed again."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    plan = config(folder, tmp_path / "half", init=str(trained), steps=1, grad_cache=True, mixed_precision=True)
    half = train(plan)
    assert same(half, train(replace(plan, out=str(tmp_path / "again"), checkpointing=True)))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    full = train(replace(plan, out=str(tmp_path / "full"), mixed_precision=False))
    assert not same(half, full)
    assert same(full, train(replace(plan, out=str(tmp_path / "other"), mixed_precision=False, checkpointing=True)))
    assert json.loads((tmp_path / "half/meta.json").read_text())["config"]["mixed_precision"] is True


# Runs


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, undisturbed."""
    return train(config(folder, tmp_path_factory.mktemp("trained") / "run", keep=(8,)))


def test_a_run_is_whole_goes_on_bit_for_bit_and_is_left_alone_at_its_end(folder: Path, tmp_path: Path) -> None:
    small = config(folder, tmp_path / "run", steps=2, save_every=1, log_every=1, keep=(1,), precheck=False)
    done = train(small)
    files = [file.name for file in done.parent.rglob("*") if file.is_file() and file.name != "pixels.bin"]
    assert {"config.json", "meta.json", "log.jsonl", "step.json", "optimiser.safetensors"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert sorted(step.name for step in (done.parent / "steps").iterdir()) == ["000001", "000002"]
    again = replace(small, out=str(tmp_path / "again"))
    assert same(done, train(again, resume_from=tmp_path / "run/steps/000001"))
    assert log_of(tmp_path / "run")[1:] == log_of(tmp_path / "again")
    before = (done / "traceir.json").stat().st_mtime_ns
    assert train(small) == done and (done / "traceir.json").stat().st_mtime_ns == before
    with pytest.raises(TrainError, match="learning_rate"):
        train(replace(small, learning_rate=1.0))


def steps_of(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # another process makes and removes it
        return max((int(folder.name) for folder in (run / "steps").glob("[0-9]*")), default=0)
    return 0


@slow
def test_killed_ten_times_and_resumed_equals_undisturbed(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments drawn anew each time; shifted images are on."""
    settings = {"steps": 24, "save_every": 1, "augment": 2, "accumulate": 2}
    whole = train(config(folder, tmp_path / "whole", **settings))
    broken = config(folder, tmp_path / "broken", **settings)
    draw, kills = random.Random(), 0
    for target in sorted(draw.sample(range(1, 24), 10)):
        child = FORKS.Process(target=train, args=(broken,))
        child.start()
        deadline = time.monotonic() + 120
        while steps_of(tmp_path / "broken") < target and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        child.kill()
        child.join()
        kills += child.exitcode == -9
    assert kills >= 8, "a kill that came too late is no test"
    assert same(whole, train(broken))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken"), "the loss curve is the same, to the last digit"
    assert [line["step"] for line in log_of(tmp_path / "whole")] == list(range(2, 25, 2))


@pytest.fixture(scope="module")
def adapted(folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of six steps with LoRA over `trained`, whose third step is kept."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    made = config(
        folder, run, init=str(trained), lora_rank=4, lora_alpha=8, lora_dropout=0.2, steps=6, save_every=3, keep=(3,)
    )  # fmt: skip
    train(made)
    return made


@slow
def test_a_resume_point_with_lora_is_a_model(folder: Path, adapted: TrainConfig, tmp_path: Path) -> None:
    whole, step, bare = Path(adapted.out) / "checkpoint", Path(adapted.out) / "steps/000003", tmp_path / "bare"
    assert same(whole, train(replace(adapted, out=str(tmp_path / "again"), keep=()), resume_from=step)), "dropout is drawn alike"
    assert not same(whole, step) and load(whole).settings.pooling_position == "before_token"
    shutil.copytree(step, bare, ignore=shutil.ignore_patterns("optimiser.safetensors", "*step.json"))
    assert load(step).fingerprint == load(bare).fingerprint != load(whole).fingerprint
    assert load(merge(step, tmp_path / "merged")).fingerprint == weights_fingerprint(tmp_path / "merged")
    further = train(config(folder, tmp_path / "run", init=str(step), steps=1, lora_rank=2, lora_alpha=4))
    assert json.loads((further / "traceir.json").read_text())["base"]["fingerprint"] == weights_fingerprint(bare)
    assert load(further).fingerprint != load(step).fingerprint


@slow
def test_a_resume_point_of_all_weights_is_a_base(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Also for adapters of earlier releases, which counted what lay beside its weights."""
    step = shutil.copytree(trained.parent / "steps/000012", tmp_path / "step")
    assert weights_fingerprint(step) == load(step).fingerprint == load(trained).fingerprint
    made = train(config(folder, tmp_path / "run", init=str(step), steps=1, lora_rank=2, lora_alpha=4))
    assert load(made).fingerprint
    every = fingerprint(step, list(step.glob("*.safetensors")))
    record = json.loads((made / "traceir.json").read_text())
    record["base"]["fingerprint"] = every
    record["fingerprint"] = adapter_fingerprint(made, every)
    (made / "traceir.json").write_text(json.dumps(record))
    assert load(made).fingerprint == record["fingerprint"]
    save_file({"x": torch.zeros(1)}, step / "optimiser.safetensors")
    with pytest.raises(ModelError, match="is an adapter over weights"):
        load(made)


@slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_backbones_train_by_gradcache_and_resume_to_the_same_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    start = save(load(published(tmp_path / "hub", kind), prompt_version="brief-1"), tmp_path / "start")
    plan = config(
        folder, tmp_path / "whole", init=str(start), lora_rank=2, lora_alpha=4, steps=2, batch=4, group=2, save_every=1,
        keep=(1,), grad_cache=True, checkpointing=True, chunk_tokens=128, min_pixels=2 * 32 * 32, max_pixels=4 * 32 * 32,
    )  # fmt: skip
    whole = train(plan)
    assert same(whole, train(replace(plan, out=str(tmp_path / "again")), resume_from=tmp_path / "whole/steps/000001"))
    assert load(whole).processor.image.max_pixels == 4 * 32 * 32 and load(whole).fingerprint != load(start).fingerprint
    frozen = train(config(folder, tmp_path / "frozen", init=str(start), steps=1, batch=4, train_vision=False, learning_rate=0.01))
    before, after = weights(start), weights(frozen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("deepstack_merger_list" in name for name in changed) == (kind == "qwen3_vl")
    assert any("visual.merger" in name for name in changed) and any("mlp" in name for name in changed)
    assert not [name for name in changed if "visual" in name and "merger" not in name], "a frozen encoder's mergers train"


@slow
def test_workers_and_pixels_change_nothing_that_is_learnt(folder: Path, trained: Path, tmp_path: Path) -> None:
    assert same(train(config(folder, tmp_path / "workers", workers=2, store_pixels=False)), trained)


@slow
def test_a_loss_that_is_not_finite_or_runs_away_stops_with_the_batch_named(folder: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"loss of \w+_task\d is nan on queries \d:"):
        train(config(folder, tmp_path / "nan", lambda_ret=float("nan"), precheck=False))
    plan = config(
        folder, tmp_path / "run", init=str(trained), steps=80, learning_rate=5.0, warmup=60, clip=1e9, diverged=3.0, log_every=1
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"step \d+: loss of \w+_task\d is .* on queries \d:.* times what it was"):
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


@slow
def test_the_tracker_gets_every_line_of_the_log_and_epochs_decide_the_steps(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(folder, tmp_path / "run", epochs=2.0, steps=1000, report_to=("tensorboard",)))
    events = min(tmp_path.rglob("events.out.tfevents*"), key=lambda file: len(file.parts))
    logged = EventAccumulator(str(events.parent))
    logged.Reload()
    norms = {event.step: event.value for event in logged.Scalars("train/norm")}
    assert norms == {line["step"]: pytest.approx(line["norm"], abs=2e-6) for line in log_of(tmp_path / "run")}
    assert json.loads((tmp_path / "run/meta.json").read_text())["config"]["steps"] == 6, "21 pairs, twice, 8 a step"


@slow
def test_a_checkpoint_names_the_widths_that_it_was_trained_for_last(folder: Path, tmp_path: Path) -> None:
    nested = train(config(folder, tmp_path / "nested", steps=2, matryoshka_dims=(8, 16), matryoshka_weights=(0.5, 1.0)))
    assert load(nested).settings.matryoshka_dims == (32, 16, 8)
    assert Encoder.from_pretrained(nested, dim=8).encode_items([Item.of(text="x")])[0].vector.shape == (8,)
    lora = {"init": str(nested), "steps": 1, "lora_rank": 2, "lora_alpha": 4}
    for name, dims, known in (("again", (16,), (32, 16)), ("plain", (), ())):
        adapter = train(config(folder, tmp_path / name, **lora, matryoshka_dims=dims))
        assert load(adapter).settings.matryoshka_dims == known
        assert load(merge(adapter, tmp_path / f"{name}-merged")).settings.matryoshka_dims == known
    assert "matryoshka_dims" not in (tmp_path / "plain-merged/traceir.json").read_text(), "earlier releases read it"


@slow
def test_pretraining_then_pairs_share_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = train(config(folder, tmp_path / "lessons", teach="pretraining", steps=3))
    second = train(config(folder, tmp_path / "pairs", init=str(first), teach="both", steps=3))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    assert {name for line in log_of(tmp_path / "lessons") for name in line} == {"step", "lessons_counting/gen", "rate", "norm"}


# Several processes


def command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """The command itself in a process of its own; what it says on stderr goes into `told`."""
    from traceir.cli.main import main

    os.environ.update(environment)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    sys.exit(main(arguments))


def started(arguments: list[str], processes: int, log: Path) -> list[multiprocessing.process.BaseProcess]:
    """The command under the environment that torchrun sets, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(processes):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(FORKS.Process(target=command, args=(arguments, environment, log.with_name(f"{log.name}-{rank}"))))
        running[-1].start()
    return running


def ended(running: list[multiprocessing.process.BaseProcess], log: Path) -> None:
    for process in running:
        process.join(timeout=240)
    shown = "\n".join(file.read_text()[-2000:] for file in log.parent.glob(f"{log.name}-*"))
    assert [process.exitcode for process in running] == [0] * len(running), shown


def small_run(folder: Path, start: Path, out: Path, *settings: str) -> list[str]:
    """Six steps in several chunks a side."""
    every = ("steps=6", "batch=8", "group=4", "save_every=100", "mixed_precision=false", "grad_cache=true", "chunk_tokens=120",
             "learn_temperature=true", "warmup=2", "log_every=2", "augment=0", *settings)  # fmt: skip
    sets = [word for setting in every for word in ("--set", setting)]
    return ["--threads", "1", "train", "--preset", "emoji", "--data", str(folder), "--init", str(start), *sets, "--out", str(out)]


@slow
@pytest.mark.parametrize(
    "settings", [("shard=false", "accumulate=2"), ("shard=false", "grad_cache=false"), ("shard=true", "symmetric=true")]
)
def test_two_processes_train_what_one_does(folder: Path, trained: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """The command, DDP or shards over gloo."""
    single = started(small_run(folder, trained, tmp_path / "one", *settings[1:]), 1, tmp_path / "told-one")
    two = started(small_run(folder, trained, tmp_path / "two", *settings), 2, tmp_path / "told-two")
    ended(single, tmp_path / "told-one")
    ended(two, tmp_path / "told-two")
    before, first, second = (weights(folder) for folder in (trained, tmp_path / "one/checkpoint", tmp_path / "two/checkpoint"))
    assert first.keys() == second.keys()
    moved = math.sqrt(sum(float((first[n] - before[n]).square().sum()) for n in first))
    apart = math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in first))
    assert moved > 0.01 and apart < 1e-3 * moved, (moved, apart)
    for line, other in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert line == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in other.items()}


@slow
def test_a_sharded_adapter_goes_on_after_a_kill(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit in shards again; and in one process, which reads the same step folder, up to rounding."""
    settings = ("lora_rank=4", "lora_alpha=8", "save_every=1", "keep=2")
    broken = small_run(folder, trained, tmp_path / "broken", *settings, "shard=true")
    whole = started(small_run(folder, trained, tmp_path / "whole", *settings, "shard=true"), 2, tmp_path / "told-whole")
    running = started(broken, 2, tmp_path / "told-broken")
    deadline = time.monotonic() + 120
    while steps_of(tmp_path / "broken") < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in running:
        process.kill()
        process.join()
    assert not (tmp_path / "broken/checkpoint").exists(), "a kill that came too late is no test"
    alone = [*small_run(folder, trained, tmp_path / "alone", *settings), "--resume-from", str(tmp_path / "broken/steps/000002")]
    lone, resumed = started(alone, 1, tmp_path / "told-alone"), started(broken, 2, tmp_path / "told-resumed")
    for name, processes in (("whole", whole), ("alone", lone), ("resumed", resumed)):
        ended(processes, tmp_path / f"told-{name}")
    assert same(tmp_path / "whole/checkpoint", tmp_path / "broken/checkpoint")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    first, third = (load_file(tmp_path / name / "checkpoint/adapter_model.safetensors") for name in ("whole", "alone"))
    assert max(float((first[name] - third[name]).abs().max() / first[name].abs().max()) for name in first) < 1e-3
