"""Single-stage training (paper, section 2): a configuration to a checkpoint, on one process or many, with exact resume.

A run is a folder: `log.jsonl` (one line every few steps), `steps/NNNNNN/` (resume points, renamed into place when whole),
`checkpoint/` (the result: an ordinary checkpoint, or an adapter) and `meta.json` (configuration, data, outcome). What a turn
holds is in batches.py, how it goes forward and backward in gradcache.py, the loop in trainer.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from traceir import __version__
from traceir.adapter import attach, projectors, save_adapter
from traceir.batch import PoolingPosition
from traceir.data.cot import is_cot, read_cot, source_folder
from traceir.data.image_store import pixel_store
from traceir.data.samples import Schedule, TaskData, image_names, read_lessons, read_pairs, task_shares, texts
from traceir.errors import InputError, TrainError
from traceir.files import write_whole
from traceir.model import TraceModel, TraceSettings, load, save
from traceir.precision import WIDEST, bfloat16_on
from traceir.train.batches import Turns
from traceir.train.gradcache import Objective, Reader, recomputing
from traceir.train.launch import check_world, refuse_plugins
from traceir.train.loop import TraceTrainer, barrier, newest_step, step_of
from traceir.train.precheck import precheck
from traceir.train.shard import shard
from traceir.train.small import SmallSize, small_model, train_tokenizer

log = logging.getLogger(__name__)

FREE = (
    "threads",
    "log_every",
    "cache",
    "device",
    "workers",
    "report_to",
    "precheck",
    "keep",
    "shard",
    "chunk_tokens",
    "save_every",
    "grad_cache",
    "checkpointing",
    "diverged",
)
"""Fields that may change when a run goes on: they decide where and how it runs, not what it learns."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. `--set key=value` overrides any field; the resolved whole goes into meta.json."""

    data: str
    out: str
    cache: str = ""
    """Folder for resized pictures, shared by runs on the same data; `pixels` in the run's own folder if empty."""
    init: str = "random"
    """`random`, or the checkpoint to start from."""
    teach: Literal["pairs", "lessons", "both"] = "pairs"
    """`pairs` (the TRACE objective), `lessons` (pretraining: language-model loss on lessons/), or `both`."""
    cot: Literal["both", "reasoning", "answer", "tagged", "none"] = "both"
    """What a complex query writes before `<|emb|>` (paper, Table 5): reasoning and answer (`both`), `reasoning`, `answer`;
    `tagged` is both and the closing tag in plain text (Table 4); `none` trains the baseline that never reasons."""
    candidates: Literal["direct", "answer", "reason"] = "direct"
    """What candidates write (Table 6): nothing (`direct`), `answer`, or `reason`."""
    reasoned: float = 1.0
    """Share of the complex queries that keep their reasoning; the others are taught as simple ones."""
    read_out: PoolingPosition = "before_token"
    """Which state is the embedding (Table 4): the one that predicts `<|emb|>`, or `at_token`, that of `<|emb|>` itself."""
    steps: int = 1000
    epochs: float = 0.0
    """If above 0, the steps are as many as it takes to draw that many times the number of pairs; `steps` says nothing then."""
    batch: int = 32
    """Pairs of one turn over all processes, all of one task: its in-batch negatives."""
    accumulate: int = 1
    """Turns, of different tasks as far as the rotation goes, whose gradients make one step."""
    family: int = 4
    """Neighbours in a train file that stay together in a batch; builders write near twins side by side."""
    negatives: int = 0
    """Hard negatives of a query, from its neg_cand_list."""
    sampling: Literal["balanced", "proportional", "temperature"] = "balanced"
    """A task's share of the turns: weight times size^0 (`balanced`), times size (`proportional`), size^(1/T) (`temperature`)."""
    sampling_temperature: float = 2.0
    grad_cache: bool = False
    """Two passes over chunks of `chunk_tokens`, in the memory of one chunk whatever the batch (gradcache.py)."""
    chunk_tokens: int = 8192
    """Padded tokens of one forward."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, about a third more work."""
    learning_rate: float = 7e-4
    warmup: int = 200
    curve: Literal["hold", "cosine"] = "hold"
    """After the warm-up: `hold`, then a linear fall to zero over the last `decay` of the steps; or `cosine` to zero (paper)."""
    decay: float = 0.2
    weight_decay: float = 0.01
    beta: float = 0.98
    """AdamW's second beta; the first is 0.9."""
    clip: float = 1.0
    temperature: float = 0.04
    learn_temperature: bool = False
    """Its logarithm trains too, at the rate of everything else; `temperature` is where it starts."""
    lambda_gen: float = 1.0
    lambda_ret: float = 1.0
    symmetric: bool = False
    """Candidates look for their queries as well; the mean of both directions."""
    distil: float = 0.0
    """Weight of 1 - cosine between the prefill state of a query that reasons and its embedding (not in the paper)."""
    direct_ret: float = 0.0
    """Weight of InfoNCE from that prefill state (not in the paper)."""
    lora_rank: int = 0
    """0 trains all weights; otherwise LoRA on the linears of the language model, and the row of `<|emb|>`."""
    lora_alpha: int = 256
    lora_dropout: float = 0.0
    train_vision: bool = True
    """False freezes the vision encoder (paper); with LoRA it is always frozen."""
    train_projector: bool = True
    any_target: float = 0.1
    """Share of queries that do not name the modality they look for, so that a search without one is no surprise."""
    min_pixels: int = 0
    max_pixels: int = 0
    """Picture budget in pixels; 0 keeps the checkpoint's own."""
    augment: int = 0
    """Pictures are shifted by up to this many pixels (of the model's view) in training; 0 shows them as they are."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of a task in the rotation; tasks not named count 1, 0 leaves a task out."""
    seed: int = 0
    mixed_precision: Literal["auto"] | bool = "auto"
    """Forward and backward in bfloat16; weights that train stay float32. `auto`: where the device is faster in it (precision.py),
    decided at the first start and kept for the whole run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in memory; `bfloat16` halves a frozen base under LoRA."""
    device: Literal["cpu", "auto"] = "cpu"
    """`cpu`, or `auto`: the accelerator that is there."""
    threads: int = 1
    workers: int = 0
    """Processes that decode pictures and lay out turns ahead of the loop; 0 does it in the loop."""
    store_pixels: bool = True
    """All pictures are decoded once, before the first step, into `cache`; False decodes them as they come, in the workers."""
    precheck: bool = True
    """A trial of the longest samples before the first step, so that memory runs out in the first minute or not at all."""
    diverged: float = 10.0
    """A loss this many times a task's usual one (at least 1) stops the run; 0 never does."""
    report_to: tuple[str, ...] = ()
    """Trackers: tensorboard, trackio, wandb, as Hugging Face's Trainer knows them; each must be installed."""
    shard: bool = False
    """Weights, gradients and the optimiser's state are divided among the processes (FSDP2); False gives each the whole (DDP)."""
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
    Under torchrun or accelerate every process calls it. Raises TrainError for a changed configuration, a loss that is not
    finite or runs away, too little memory, or an empty folder.
    """
    if config.device == "cpu":
        torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)
        # oneDNN keeps a kernel for every shape it has met, by default a thousand: hundreds of megabytes.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        return _train(config, resume_from)
    finally:
        if config.device == "cpu":
            torch.set_flush_denormal(False)  # what the caller computes afterwards is its own business


def _train(config: TrainConfig, resume_from: Path | None) -> Path:
    out = Path(config.out)
    finished = out / "checkpoint"
    refuse_plugins(os.environ)
    args = arguments(check(config), out)
    check_world(batch=config.batch, shard=config.shard, world=args.world_size)
    if args.process_index == 0:
        begun = out if (out / "config.json").is_file() or resume_from is None else resume_from.parent.parent
        _claim(out, settled(config, args.device.type, begun / "config.json"))
    barrier()
    if not (out / "config.json").is_file():
        raise TrainError(f"{out} is not where the first process writes it; name an --out on a file system that all nodes share")
    config = replace(config, mixed_precision=begun_in(out / "config.json"))
    args = arguments(config, out)
    if (finished / "traceir.json").is_file():
        log.info("%s is finished already", out)
        return finished
    run = Run(config, args)
    resumed = run.restore(newest_step(out) or resume_from)
    trainer, started, first = run.trainer(), time.monotonic(), step_of(resumed)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    run.finish(trainer, seconds=time.monotonic() - started, first=first)
    return finished


class Run:
    """What one process holds of a run: data, model, and what it takes to write them."""

    def __init__(self, config: TrainConfig, args: TrainingArguments) -> None:
        self.tasks = _tasks(config)
        self.config, self.args, self.out = config, args, Path(config.out)
        if config.epochs > 0:
            pairs = sum(len(task) for task in self.tasks)
            steps = max(1, math.ceil(config.epochs * pairs / (config.batch * config.accumulate)))
            self.config, args.max_steps = replace(config, steps=steps), steps
        self.model = _initial(config, self.tasks)
        self.adapter = _trainable(self.model, config)
        names = image_names(self.tasks) if config.store_pixels else []
        if names:
            with args.main_process_first(local=False, desc="decoding pictures"):
                store = pixel_store(self.tasks[0].root, Path(config.cache or self.out / "pixels"), self.model.processor, names)
            self.model.processor.pixel_store = store
        self.reader = Reader(self.model, config.temperature, learn_temperature=config.learn_temperature)

    def turns(self) -> Turns:
        config = self.config
        weights = [config.weights.get(task.name, 1.0) for task in self.tasks]
        sizes = [len(task) for task in self.tasks]
        shares = task_shares(sizes, weights, config.sampling, config.sampling_temperature)
        turns = config.steps * config.accumulate
        schedule = Schedule(self.tasks, shares, batch=config.batch, family=config.family, steps=turns, seed=config.seed)
        return Turns(
            schedule, self.model.processor, self.model.settings.prompt_version, turns=turns, chunk_tokens=config.chunk_tokens,
            seed=config.seed, augment=config.augment, teach_candidates=config.candidates != "direct",
            rank=self.args.process_index, world=self.args.world_size,
        )  # fmt: skip

    def trainer(self) -> TraceTrainer:
        config = self.config
        if config.shard:
            shard(self.reader, self.args.device)
        objective = Objective(config.lambda_gen, config.lambda_ret, config.symmetric, config.distil, config.direct_ret)
        return TraceTrainer(
            self.reader, self.turns(), self.args, objective=objective, grad_cache=config.grad_cache,
            rate=lambda step: rate(step, config), groups=_groups(self.reader, config), betas=(0.9, config.beta),
            keep=config.keep, diverged=config.diverged, save_model=self.save, out=self.out,
            check_memory=precheck if config.precheck else None, sharded=config.shard,
        )  # fmt: skip

    def save(self, target: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """The checkpoint as it stands; `state` are the whole weights where this process holds only a part of them."""
        if self.adapter is None:
            save(self.model, target, state=state)
        else:
            save_adapter(self.model, self.adapter, target, self.config.init, state=state)

    def restore(self, folder: Path | None) -> Path | None:
        """Loads the weights of a step folder; checks that it lies within this run."""
        if folder is None:
            return None
        step = step_of(folder)
        if step > self.config.steps:
            raise TrainError(f"{folder} is at step {step}, beyond the {self.config.steps} of this run; raise steps")
        if self.adapter is None:
            self.model.network.load_state_dict(load(folder).network.state_dict())
        else:
            import peft

            peft.set_peft_model_state_dict(self.adapter, load_file(folder / "adapter_model.safetensors"))
        if self.args.process_index == 0:
            _cut_log(self.out / "log.jsonl", step)
        log.info("going on from %s", folder)
        return folder

    def finish(self, trainer: TraceTrainer, *, seconds: float, first: int) -> None:
        if self.args.process_index == 0:
            _write_meta(self.out, self.config, self.tasks, seconds=seconds, first_step=first, world=self.args.world_size)
        trainer.save_model(str(self.out / "checkpoint"), _internal_call=True)
        barrier()


def check(config: TrainConfig) -> TrainConfig:
    """The configuration itself; InputError for fields that do not go together."""
    if config.curve not in ("hold", "cosine"):
        raise InputError(f"curve {config.curve!r} is unknown; choose hold or cosine")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {config.dtype!r} is unknown; choose float32 or bfloat16")
    if config.dtype == "bfloat16" and not config.lora_rank:
        raise InputError("dtype bfloat16 is for a frozen base: set lora_rank, or dtype=float32 with mixed_precision=true")
    if config.read_out == "at_token" and (config.distil or config.direct_ret):
        raise InputError("distil and direct_ret compare with the state that predicts <|emb|>; set read_out=before_token")
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        raise InputError(f"min_pixels {config.min_pixels} is above max_pixels {config.max_pixels}; swap them")
    if config.lora_rank and config.init == "random":
        raise InputError("lora_rank adapts a checkpoint, and init is random; name one with --init")
    if config.mixed_precision not in ("auto", True, False):
        raise InputError(f"mixed_precision {config.mixed_precision!r} is unknown; choose auto, True or False")
    for name in ("temperature", "batch", "accumulate", "chunk_tokens", "learning_rate", "log_every", "save_every"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; give a value above 0")
    if config.epochs <= 0 and config.steps < 1:
        raise InputError(f"steps is {config.steps}; give at least 1, or epochs")
    return config


def settled(config: TrainConfig, device: str, begun: Path) -> TrainConfig:
    """The configuration with `mixed_precision` true or false: as asked, else as the file `begun` says, else the faster one."""
    if config.mixed_precision != "auto":
        chosen, why = config.mixed_precision, "as asked"
    elif (before := begun_in(begun)) != "auto":
        chosen, why = bool(before), f"as {begun} says"
    else:
        speed = bfloat16_on(device, _width(config))
        chosen, why = speed.fast, speed.why
    log.info("%s: %s", "bfloat16" if chosen else "float32", why)
    half = [name for name, on in (("mixed_precision=true", chosen), ("dtype=bfloat16", config.dtype == "bfloat16")) if on]
    if half and (speed := bfloat16_on(device, _width(config))).slow:
        log.warning("%s is slow here: %s; float32 is the faster type for a new run", " and ".join(half), speed.why)
    return replace(config, mixed_precision=chosen)


def _width(config: TrainConfig) -> int:
    """Of the language model; that of a large one where the start is no folder with a config.json."""
    if config.init == "random":
        return config.size.hidden
    file = Path(config.init) / "config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return int(found.get("text_config", found).get("hidden_size", WIDEST))


def begun_in(file: Path) -> Any:
    """`mixed_precision` of a configuration on disk (config.json of a run, or the `base` of ablation.json); `auto` without one."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found.get("base", found).get("mixed_precision", "auto")


def arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    """What Hugging Face's Trainer is told; how processes are launched and wrapped comes from torchrun or accelerate."""
    if config.workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args = TrainingArguments(
            output_dir=str(out),
            max_steps=max(1, config.steps),
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            max_grad_norm=config.clip,
            seed=config.seed,
            bf16=config.mixed_precision is True,
            use_cpu=config.device == "cpu",
            logging_steps=config.log_every,
            save_strategy="steps",
            save_steps=config.save_every,
            dataloader_num_workers=config.workers,
            dataloader_prefetch_factor=4 if config.workers else None,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            report_to=list(config.report_to) or "none",
            log_level="warning",
        )
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise TrainError(f"the training cannot be set up as asked: {error}") from error
    args.mixed_precision = "bf16" if args.bf16 else "no"  # where accelerate's launcher says another, the configuration counts
    args.per_device_train_batch_size = max(1, config.batch // args.world_size)
    if args.world_size == 1 and args.n_gpu > 1:
        args._n_gpu = 1  # without a launcher one accelerator trains: DataParallel cannot split a Turn
    return args


def rate(step: int, config: TrainConfig) -> float:
    """Learning-rate factor in [0, 1] of step 0, 1, ...: linear warm-up, then `hold` and a linear fall, or `cosine` (paper)."""
    if config.curve == "cosine":
        warm = min(config.warmup, config.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))
    falling = max(1, round(config.steps * config.decay))
    return max(0.0, min(1.0, (step + 1) / max(1, config.warmup), (config.steps - step) / falling))


def _tasks(config: TrainConfig) -> list[TaskData]:
    root = Path(config.data)
    tasks: list[TaskData] = []
    if config.teach in ("lessons", "both"):
        tasks += read_lessons(source_folder(root) if is_cot(root) else root)
    if config.teach in ("pairs", "both"):
        read: Any = read_cot if is_cot(root) else read_pairs
        tasks += read(
            root, cot=config.cot, candidates=config.candidates, reasoned=config.reasoned, negatives=config.negatives,
            any_target=config.any_target, seed=config.seed,
        )  # fmt: skip
    if not tasks:
        raise TrainError(f"teach={config.teach!r} is unknown; choose pairs, lessons or both")
    names = {task.name for task in tasks}
    if unknown := set(config.weights) - names:
        raise TrainError(f"weights name unknown tasks {sorted(unknown)}; {config.data} has {sorted(names)}")
    return [task for task in tasks if config.weights.get(task.name, 1.0) > 0]


def _initial(config: TrainConfig, tasks: list[TaskData]) -> TraceModel:
    if config.init != "random":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        model = load(
            config.init, dtype=dtype, as_published=False, max_text_tokens=config.max_text_tokens,
            max_reasoning_tokens=config.max_reasoning_tokens, pooling_position=config.read_out,
            candidates_write=config.candidates != "direct", world="",
        )  # fmt: skip
        if model.settings.profile is not None:
            raise TrainError(
                f"{config.init} is read by the profile of another project; training goes on from TRACE's checkpoints only"
            )
        own = model.processor.image
        least, most = config.min_pixels or own.min_pixels, config.max_pixels or own.max_pixels
        model.processor.image = replace(own, min_pixels=least, max_pixels=most)
        return model
    # The tokenizer reads everything the folder teaches, so that a model pretrained on lessons can go on with pairs.
    root = Path(config.data)
    readable: list[TaskData] = [*(tasks if is_cot(root) else read_pairs(root))]
    if (root / "lessons").is_dir():
        readable += read_lessons(root)
    tokenizer = train_tokenizer([*texts(readable), *TEMPLATE_WORDS], config.size.vocabulary)
    settings = TraceSettings(
        prompt_version="brief-1" if config.prompt_version == "brief-1" else "trace-1",
        pooling_position=config.read_out,
        max_reasoning_tokens=config.max_reasoning_tokens,
        max_text_tokens=config.max_text_tokens,
        candidates_write=config.candidates != "direct",
    )
    return small_model(tokenizer, config.size, settings, config.seed)


TEMPLATE_WORDS = ("query text find image. candidate text. user assistant system image any",) * 100


def _trainable(model: TraceModel, config: TrainConfig) -> Any:
    """Marks what trains; returns the PEFT model with LoRA, else None."""
    network = model.network
    if config.checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recomputing})
    if config.lora_rank:
        return attach(
            model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout,
            train_projector=config.train_projector, seed=config.seed,
        )  # fmt: skip
    network.requires_grad_(True)
    network.model.visual.requires_grad_(config.train_vision)
    for projector in projectors(network).values():
        projector.requires_grad_(config.train_projector)
    return None


def _groups(reader: Reader, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; nor does the temperature."""
    trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]
    matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
        changed = sorted(key for key in new if key in old and old[key] != new[key] and key not in FREE)
        if changed:
            pairs = ", ".join(f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed)
            raise TrainError(f"{out} holds a run with another configuration ({pairs}); choose another --out")
        return
    write_whole(file, written)


def _write_meta(out: Path, config: TrainConfig, tasks: list[TaskData], *, seconds: float, first_step: int, world: int) -> None:
    data_meta = Path(config.data) / ("manifest.json" if is_cot(Path(config.data)) else "meta.json")
    about = json.loads(data_meta.read_text()) if data_meta.is_file() else {}
    meta = {
        "format": 1,
        "traceir": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.threads} thread(s) used",
        "processes": world,
        "config": asdict(config),
        "data_fingerprint": about.get("fingerprint") or about.get("source_fingerprint"),
        "tasks": {task.name: len(task) for task in tasks},
        "examples_seen": config.steps * config.accumulate * config.batch,
        "seconds_since_last_start": round(seconds, 1),
        "last_start_at_step": first_step,
    }
    write_whole(out / "meta.json", json.dumps(meta, indent=2) + "\n")
