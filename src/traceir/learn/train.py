"""Single-stage training (paper, section 2) for models that fit one process: joint loss, task-aware batches, exact resume.

A run is a folder: `log.jsonl` (one line every few steps), `steps/NNNNNN/` (a checkpoint with optimiser state, renamed into
place when whole), `checkpoint/` (the result, an ordinary checkpoint) and `meta.json` (configuration, data, outcome).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from traceir import __version__
from traceir.batch import Layout
from traceir.errors import TrainError
from traceir.learn.data import (
    Example,
    Schedule,
    TaskData,
    picture_names,
    pixel_store,
    read_lessons,
    read_pairs,
    texts,
)
from traceir.learn.losses import generation_loss, retrieval_loss
from traceir.learn.small import SmallSize, small_model, train_tokenizer
from traceir.model import TraceModel, TraceSettings, load, save
from traceir.prompts import EMB, TURN_END, render_candidate, render_query

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. `--set key=value` overrides any field; the resolved whole goes into meta.json."""

    data: str
    out: str
    cache: str = ""
    """Folder for resized pictures, shared by runs on the same data; `pixels` in the run's own folder if empty."""
    init: str = "random"
    """`random`, or the checkpoint to start from."""
    teach: str = "pairs"
    """`pairs` (the TRACE objective), `lessons` (pretraining: language-model loss on lessons/), or `both`."""
    reasoning: bool = True
    """False trains the baseline that never reasons: same pairs, every completion empty."""
    steps: int = 1000
    batch: int = 32
    """Pairs of one sub-batch, which is of one task: its in-batch negatives."""
    accumulate: int = 1
    """Sub-batches, of different tasks as far as the rotation goes, whose gradients make one step."""
    family: int = 4
    learning_rate: float = 7e-4
    warmup: int = 200
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to zero; it is constant before."""
    weight_decay: float = 0.01
    clip: float = 1.0
    temperature: float = 0.04
    lambda_gen: float = 1.0
    lambda_ret: float = 1.0
    any_target: float = 0.1
    """Share of queries that do not name the modality they look for, so that a search without one is no surprise."""
    augment: int = 0
    """Pictures are shifted by up to this many pixels (of the model's view) in training; 0 shows them as they are."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task in the rotation; tasks not named count 1, 0 leaves a task out."""
    seed: int = 0
    mixed_precision: bool = True
    device: str = "cpu"
    threads: int = 1
    save_every: int = 500
    keep: tuple[int, ...] = ()
    """Steps whose checkpoints are kept for good; of the others only the newest is."""
    log_every: int = 20
    size: SmallSize = field(default_factory=SmallSize)
    prompt_version: str = "brief-1"
    max_reasoning_tokens: int = 96
    max_text_tokens: int = 256


def train(config: TrainConfig, *, resume_from: Path | None = None) -> Path:
    """Runs or resumes a training and returns the folder of the final checkpoint.

    Restarting with the same configuration goes on from the newest whole step and ends in the same weights as an uninterrupted
    run. `resume_from` starts at another run's step folder instead, for instance to decay from the middle of a longer run.
    Raises TrainError for a changed configuration, a loss that is not finite, or an empty folder.
    """
    torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)
    out = Path(config.out)
    finished = out / "checkpoint"
    _claim(out, config)
    if (finished / "traceir.json").is_file():
        log.info("%s is finished already", out)
        return finished
    tasks = _tasks(config)
    model = _initial(config, tasks)
    model.network.to(config.device)
    _attach_pixels(model, tasks, Path(config.data), Path(config.cache or out / "pixels"))
    schedule = _schedule(config, tasks)
    optimiser = _optimiser(model, config)
    step = _restore(model, optimiser, out, resume_from, config)
    started = time.monotonic()
    with (out / "log.jsonl").open("a") as journal:
        _loop(model, optimiser, schedule, config, step, out, journal)
    _write_meta(out, config, tasks, seconds=time.monotonic() - started, first_step=step)
    save(model, finished)
    return finished


def _loop(
    model: TraceModel, optimiser: Any, schedule: Schedule, config: TrainConfig, first: int, out: Path, journal: Any
) -> None:
    model.network.train()
    sums: dict[str, list[float]] = {}
    started = time.monotonic()
    for step in tqdm(range(first, config.steps), initial=first, total=config.steps, desc="training", mininterval=5.0):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rate(step, config)
        turns = range(step * config.accumulate, (step + 1) * config.accumulate)
        parts = update(model, optimiser, [schedule.examples(turn) for turn in turns], config, step)
        for turn, losses in zip(turns, parts, strict=True):
            for name, value in losses.items():
                sums.setdefault(f"{schedule.task(turn).name}/{name}", []).append(value)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            line = {key: round(sum(values) / len(values), 4) for key, values in sums.items()}
            spent = round(time.monotonic() - started, 1)
            journal.write(json.dumps({"step": done, "seconds": spent, **line}) + "\n")
            journal.flush()
            sums.clear()
        if (done % config.save_every == 0 or done in config.keep) and done < config.steps:
            _save_step(model, optimiser, out, done, config)


def update(
    model: TraceModel, optimiser: Any, batches: list[list[Example]], config: TrainConfig, step: int
) -> list[dict[str, float]]:
    """One optimiser step on the mean gradient of the sub-batches; returns their losses.

    Raises TrainError naming the queries if a loss is not finite.
    """
    draw = np.random.default_rng((config.seed, 3, step))
    parts = []
    for examples in batches:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.mixed_precision):
            total, losses = objective(model, examples, config, draw)
        if not torch.isfinite(total):
            asked = [example.query.id for example in examples]
            remedy = "lower the learning rate or check them"
            raise TrainError(f"step {step}: loss is {float(total.detach())} on queries {asked}; {remedy}")
        torch.autograd.backward(total / len(batches))
        parts.append(losses)
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), config.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return parts


def objective(
    model: TraceModel, examples: list[Example], config: TrainConfig, draw: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """The joint loss of one batch (paper, section 2) and its two terms."""
    processor, version = model.processor, model.settings.prompt_version
    lessons = examples[0].candidate is None
    end = TURN_END if lessons else EMB
    asked = [processor.lay_out(render_query(e.query, version), e.completion, end=end) for e in examples]
    asked = [_shifted(layout, config.augment, draw) for layout in asked]
    batch = processor.collate(asked).to(model.device)
    hidden_BTD = model.hidden(batch)
    supervised = batch.targets >= 0
    generation = generation_loss(model.logits(hidden_BTD[supervised]), batch.targets[supervised])
    if lessons:
        return config.lambda_gen * generation, {"gen": float(generation.detach())}
    offered = [processor.forced(render_candidate(e.candidate, version)) for e in examples if e.candidate is not None]
    offered = [_shifted(layout, config.augment, draw) for layout in offered]
    candidates = processor.collate(offered).to(model.device)
    rows = torch.arange(len(examples), device=model.device)
    query_BD = hidden_BTD[rows, batch.readout].float()
    candidate_BD = model.hidden(candidates)[rows, candidates.readout].float()
    with torch.autocast(model.device.type, enabled=False):
        retrieval = retrieval_loss(query_BD, candidate_BD, config.temperature, _collisions(examples).to(model.device))
    total = config.lambda_gen * generation + config.lambda_ret * retrieval
    return total, {"gen": float(generation.detach()), "ret": float(retrieval.detach())}


def _shifted(layout: Layout, reach: int, draw: np.random.Generator) -> Layout:
    """The layout with each picture moved by up to `reach` pixels, its edge repeated into the gap."""
    if not reach or not layout.pixels:
        return layout
    moved = []
    for picture in layout.pixels:
        down, right = (int(value) for value in draw.integers(0, 2 * reach + 1, size=2))
        padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        moved.append(padded[down : down + picture.shape[0], right : right + picture.shape[1]])
    return replace(layout, pixels=tuple(moved))


def rate(step: int, config: TrainConfig) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, constant, linear decay over the last `decay` of the steps."""
    falling = max(1, round(config.steps * config.decay))
    return min(1.0, (step + 1) / max(1, config.warmup), (config.steps - step) / falling)


def _collisions(examples: list[Example]) -> torch.Tensor:
    """[B, B], true where candidate j is among all positives of query i (not only the sampled one)."""
    dids = [example.candidate.id if example.candidate else None for example in examples]
    return torch.tensor([[did in example.right for did in dids] for example in examples])


def _tasks(config: TrainConfig) -> list[TaskData]:
    root = Path(config.data)
    tasks: list[TaskData] = []
    if config.teach in ("lessons", "both"):
        tasks += read_lessons(root)
    if config.teach in ("pairs", "both"):
        tasks += read_pairs(root, reasoning=config.reasoning, any_target=config.any_target)
    if not tasks:
        raise TrainError(f"teach={config.teach!r} is unknown; choose pairs, lessons or both")
    names = {task.name for task in tasks}
    if unknown := set(config.weights) - names:
        raise TrainError(f"weights name unknown tasks {sorted(unknown)}; {config.data} has {sorted(names)}")
    return [task for task in tasks if config.weights.get(task.name, 1.0) > 0]


def _initial(config: TrainConfig, tasks: list[TaskData]) -> TraceModel:
    if config.init != "random":
        model = load(config.init, max_reasoning_tokens=config.max_reasoning_tokens)
        if model.settings.profile is not None:
            raise TrainError(
                f"{config.init} is read by the profile of another project; training goes on from TRACE's checkpoints only"
            )
        return model
    # The tokenizer reads everything the folder teaches, so that a model pretrained on lessons can go on with pairs.
    root = Path(config.data)
    readable: list[TaskData] = [*read_pairs(root, reasoning=True)]
    if (root / "lessons").is_dir():
        readable += read_lessons(root)
    tokenizer = train_tokenizer([*texts(readable), *TEMPLATE_WORDS], config.size.vocabulary)
    settings = TraceSettings(
        prompt_version="brief-1" if config.prompt_version == "brief-1" else "trace-1",
        max_reasoning_tokens=config.max_reasoning_tokens,
        max_text_tokens=config.max_text_tokens,
    )
    return small_model(tokenizer, config.size, settings, config.seed)


TEMPLATE_WORDS = ("query text find image. candidate text. user assistant system image any",) * 100


def _attach_pixels(model: TraceModel, tasks: list[TaskData], root: Path, cache: Path) -> None:
    names = picture_names(tasks)
    if names:
        model.processor.pixel_store = pixel_store(root, cache, model.processor, names)


def _schedule(config: TrainConfig, tasks: list[TaskData]) -> Schedule:
    weights = [config.weights.get(task.name, 1.0) for task in tasks]
    turns = config.steps * config.accumulate
    return Schedule(tasks, weights, batch=config.batch, family=config.family, steps=turns, seed=config.seed)


def _optimiser(model: TraceModel, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.network.parameters() if p.ndim >= 2]
    others = [p for p in model.network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def _save_step(model: TraceModel, optimiser: Any, out: Path, step: int, config: TrainConfig) -> None:
    folder = out / "steps"
    folder.mkdir(exist_ok=True)
    state = optimiser.state_dict()
    flat = {f"{n}.{key}": value for n, entry in state["state"].items() for key, value in entry.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing.") as scratch:
        fresh = Path(scratch) / "step"
        save(model, fresh)
        save_file({key: value.contiguous() for key, value in flat.items()}, fresh / "optimiser.safetensors")
        (fresh / "step.json").write_text(json.dumps({"step": step}))
        target = folder / f"{step:06d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)
    for old in sorted(folder.iterdir()):
        if old.name.isdigit() and int(old.name) < step and int(old.name) not in config.keep:
            shutil.rmtree(old)


def _restore(model: TraceModel, optimiser: Any, out: Path, resume_from: Path | None, config: TrainConfig) -> int:
    """Loads the newest whole step of this run, else `resume_from`; returns the step to go on from."""
    steps = sorted(p for p in (out / "steps").glob("[0-9]*") if (p / "step.json").is_file())
    folder = steps[-1] if steps else resume_from
    if folder is None:
        return 0
    step = int(json.loads((folder / "step.json").read_text())["step"])
    if step >= config.steps:
        raise TrainError(f"{folder} is at step {step}, beyond the {config.steps} of this run; raise steps")
    model.network.load_state_dict(load(folder).network.state_dict())
    flat = load_file(folder / "optimiser.safetensors")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    _cut_log(out / "log.jsonl", step)
    log.info("going on from %s", folder)
    return step


def _cut_log(file: Path, step: int) -> None:
    if file.is_file():
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break
        file.write_text("".join(f"{line}\n" for line in kept))


def _claim(out: Path, config: TrainConfig) -> None:
    """Writes the configuration into an empty folder, or checks that the folder's own is the same."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "config.json"
    written = json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"
    if file.is_file():
        old, new = json.loads(file.read_text()), json.loads(written)
        changed = sorted(
            key for key in new if old.get(key) != new[key] and key not in ("threads", "log_every", "cache", "device")
        )
        if changed:
            pairs = ", ".join(f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed)
            raise TrainError(f"{out} holds a run with another configuration ({pairs}); choose another --out")
        return
    fresh = file.with_suffix(".tmp")
    fresh.write_text(written)
    os.replace(fresh, file)


def _write_meta(out: Path, config: TrainConfig, tasks: list[TaskData], *, seconds: float, first_step: int) -> None:
    data_meta = Path(config.data) / "meta.json"
    about = json.loads(data_meta.read_text()) if data_meta.is_file() else {}
    meta = {
        "format": 1,
        "traceir": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.threads} thread(s) used",
        "config": asdict(config),
        "data_fingerprint": about.get("fingerprint"),
        "tasks": {task.name: len(task) for task in tasks},
        "examples_seen": config.steps * config.accumulate * config.batch,
        "seconds_since_last_start": round(seconds, 1),
        "last_start_at_step": first_step,
    }
    fresh = out / "meta.json.tmp"
    fresh.write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(fresh, out / "meta.json")
