"""Single-stage training (paper, section 2): a configuration to a checkpoint, on one process or many, with exact resume.

A run is a folder: `config.json`, `log.jsonl` (one line every few steps), `steps/NNNNNN/` (resume points, renamed into place when
whole), `checkpoint/` (the result: an ordinary checkpoint, or an adapter) and `meta.json` (configuration, data, outcome). What a
batch holds is in batches.py, how it goes forward and backward in gradcache.py, the loop in loop.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file

from traceir import __version__
from traceir.adapter import attach, projectors, save_adapter
from traceir.data.cot import is_cot, read_cot, source_folder
from traceir.data.image_store import pixel_store
from traceir.data.samples import Schedule, TaskData, read_described, read_pairs, read_pretraining, task_shares
from traceir.errors import TrainError
from traceir.files import write_whole
from traceir.model import TraceModel, TraceSettings, load, save
from traceir.rerank_prompts import DESCRIBE, RERANK
from traceir.train.batches import TrainBatches, check_shares
from traceir.train.config import REMEDY, TrainConfig, begun_in, check, claim, nested_widths, settled
from traceir.train.gradcache import Reader, recomputing
from traceir.train.loop import Loop, newest_step, step_of
from traceir.train.small import small_model, train_tokenizer

log = logging.getLogger(__name__)

PLUGINS: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""What accelerate's launcher sets for wrappings that a joint loss over many chunks does not go through."""
TEMPLATE_WORDS: Final = ("query text find image. candidate text. user assistant system image any",) * 100


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
            torch.set_flush_denormal(False)  # restored for what the caller computes afterwards


def _train(config: TrainConfig, resume_from: Path | None) -> Path:
    out = Path(config.out)
    state = joined(check(config))
    if state.is_main_process:
        begun = out if (out / "config.json").is_file() or resume_from is None else resume_from.parent.parent
        claim(out, settled(config, state.device.type, begun / "config.json"))
    state.wait_for_everyone()
    if not (out / "config.json").is_file():
        raise TrainError(f"{out} is not where the first process writes it; name an --out on a file system that all nodes share")
    config = replace(config, mixed_precision=begun_in(out / "config.json"))
    finished = out / "checkpoint"
    if (finished / "traceir.json").is_file():
        log.info("%s is finished already", out)
        return finished
    accelerator = accelerated(config)
    run = Run(config, accelerator)
    resumed = run.restore(newest_step(out) or resume_from)
    loop = Loop(run.config, accelerator, run.reader, run.batches(), run.save)
    started, first = time.monotonic(), step_of(resumed)  # whose folder goes when later ones are written
    loop.run(resumed)
    if accelerator.is_main_process:
        run.write_meta(seconds=time.monotonic() - started, first_step=first)
    loop.save_model(finished)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return finished


def joined(config: TrainConfig) -> PartialState:
    """This process among those of its launch; TrainError where their number or the launcher's plugins cannot be."""
    for variable, plugin in PLUGINS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise TrainError(f"accelerate was told to use {plugin} ({variable}=true), which is not supported; {REMEDY}")
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process may have had another device
    state = PartialState(cpu=config.device == "cpu")
    check_shares(config.batch, state.num_processes)
    if config.shard and state.num_processes == 1:
        raise TrainError("shard=true divides the weights among processes, and this is the only one; start it with torchrun")
    return state


def accelerated(config: TrainConfig) -> Accelerator:
    """accelerate as the configuration asks, whatever its launcher says; TrainError for trackers that are not there."""
    wanted = [name for name in config.report_to if name != "none"]
    known = ["all", *map(str, get_available_trackers())]
    if missing := sorted(set(wanted) - set(known)):
        raise TrainError(f"report_to names {', '.join(missing)}: not installed, or unknown; here are {', '.join(known)}")
    if config.workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    accelerator = Accelerator(
        mixed_precision="bf16" if config.mixed_precision is True else "no",
        cpu=config.device == "cpu",
        log_with=wanted or None,
        project_dir=config.out,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in asdict(config).items()}
    accelerator.init_trackers("traceir", config=plain)
    return accelerator


class Run:
    """What one process holds of a run: data, model, and what it takes to write them. `config` has the steps of its `epochs`."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.tasks = _tasks(config)
        if config.epochs > 0:
            pairs = sum(len(task) for task in self.tasks)
            config = replace(config, steps=max(1, math.ceil(config.epochs * pairs / (config.batch * config.accumulate))))
        self.config, self.accelerator, self.out = config, accelerator, Path(config.out)
        self.model = _initial(config, self.tasks)
        widths = tuple(
            nested_widths(config, self.model.width)
        )  # those of the start hold no longer, unless this run trains them too
        self.model.settings = replace(self.model.settings, matryoshka_dims=widths)
        self.adapter = _trainable(self.model, config)
        names = sorted({name for task in self.tasks for name in task.image_paths()}) if config.store_pixels else []
        if names:
            with accelerator.main_process_first():
                store = pixel_store(self.tasks[0].root, Path(config.cache or self.out / "pixels"), self.model.processor, names)
            self.model.processor.pixel_store = store
        self.reader = Reader(
            self.model, config.temperature, learn_temperature=config.learn_temperature, rerank=config.teach == "rerank"
        )

    def batches(self) -> TrainBatches:
        config = self.config
        weights = [config.weights.get(task.name, 1.0) for task in self.tasks]
        shares = task_shares(list(map(len, self.tasks)), weights, config.sampling, config.sampling_temperature)
        schedule = Schedule(
            self.tasks, shares, batch=config.batch, group=config.group, batches=config.steps * config.accumulate, seed=config.seed
        )
        return TrainBatches(
            schedule, self.model.processor, self.model.settings.prompt_version, config.chunk_tokens, config.augment,
            config.candidates != "direct", self.accelerator.process_index, self.accelerator.num_processes,
            config.teach == "rerank",
        )  # fmt: skip

    def save(self, target: Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """The checkpoint as it stands; `state` are the whole weights where this process holds only a part of them."""
        if self.adapter is None:
            save(self.model, target, state=state)
        else:
            save_adapter(self.model, self.adapter, target, self.config.init, state=state)

    def write_meta(self, *, seconds: float, first_step: int) -> None:
        config, root = self.config, Path(self.config.data)
        about = root / ("manifest.json" if is_cot(root) else "meta.json")
        data = json.loads(about.read_text()) if about.is_file() else {}
        meta = {
            "format": 1,
            "traceir": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.threads} thread(s) used",
            "processes": self.accelerator.num_processes,
            "config": asdict(config),
            "data_fingerprint": data.get("fingerprint") or data.get("source_fingerprint"),
            "tasks": {task.name: len(task) for task in self.tasks},
            "examples_seen": config.steps * config.accumulate * config.batch,
            "seconds_since_last_start": round(seconds, 1),
            "last_start_at_step": first_step,
        }
        write_whole(self.out / "meta.json", json.dumps(meta, indent=2) + "\n")

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
        if self.accelerator.is_main_process:
            _cut_log(self.out / "log.jsonl", step)
        log.info("going on from %s", folder)
        return folder


def _tasks(config: TrainConfig) -> list[TaskData]:
    root = Path(config.data)
    tasks: list[TaskData] = []
    if config.teach in ("pretraining", "both"):
        tasks += read_pretraining(source_folder(root) if is_cot(root) else root)
    if config.teach == "describe":
        tasks += read_described(root)
    elif config.teach != "pretraining":
        read: Any = read_cot if is_cot(root) else read_pairs
        names = ("cot", "candidates", "reasoned", "negatives", "any_target", "seed")
        tasks += read(root, **{name: getattr(config, name) for name in names})
    known = {task.name for task in tasks}
    if unknown := set(config.weights) - known:
        raise TrainError(f"weights name unknown tasks {sorted(unknown)}; {config.data} has {sorted(known)}")
    return [task for task in tasks if config.weights.get(task.name, 1.0) > 0]


def _initial(config: TrainConfig, tasks: list[TaskData]) -> TraceModel:
    """The model that training starts from: a checkpoint, or a small one with random weights and a tokenizer of the data."""
    written: Mapping[str, Any] = {
        "pooling_position": config.pooling_position,
        "max_reasoning_tokens": config.max_reasoning_tokens,
        "max_text_tokens": config.max_text_tokens,
        "candidates_write": config.candidates != "direct",
        "rerank": {"rerank": RERANK, "describe": DESCRIBE}.get(config.teach, ""),
        "rerank_temperature": config.temperature if config.teach == "rerank" else 0.0,
    }
    if config.init == "random":
        # The tokenizer reads everything the folder teaches, so that a pretrained model can go on with pairs.
        root = Path(config.data)
        readable: list[TaskData] = [*tasks] if is_cot(root) else [*read_pairs(root)]
        readable += read_pretraining(root) if (root / "lessons").is_dir() else []
        texts = [*(text for task in readable for text in task.texts()), *TEMPLATE_WORDS]
        tokenizer = train_tokenizer(texts, config.size.vocabulary)
        settings = TraceSettings(prompt_version=config.prompt_version, **written)
        return small_model(tokenizer, config.size, settings, config.seed)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = load(config.init, dtype=dtype, as_published=False, world="", **written)
    if model.settings.profile is not None:
        raise TrainError(f"{config.init} is read by another project's profile; training goes on from TRACE's checkpoints only")
    own = model.processor.image
    least, most = config.min_pixels or own.min_pixels, config.max_pixels or own.max_pixels
    model.processor.image = replace(own, min_pixels=least, max_pixels=most)
    return model


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


def _cut_log(file: Path, step: int) -> None:
    """Leaves out of the log what was written after the step, and a line that was not finished."""
    if not file.is_file():
        return
    kept = []
    with contextlib.suppress(json.JSONDecodeError):
        for line in file.read_text().splitlines():
            if json.loads(line)["step"] > step:
                break
            kept.append(f"{line}\n")
    write_whole(file, "".join(kept))
