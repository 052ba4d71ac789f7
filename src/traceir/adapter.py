"""LoRA adapters over a checkpoint, by PEFT (paper, section 2: LoRA on the language model): attach, save, add to a base.

An adapter trains LoRA on the linear layers of the language model, the row of `<|emb|>` in the input and output matrices, and
the projector (the mergers of the vision tower) as a whole; all else is frozen. On disk it is PEFT's own folder with TraceIR's
files beside it (docs/formats.md). It names its base by path and fingerprint and loads over no other.
PEFT is imported where it is used, so that plain checkpoints load without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from traceir.checkpoint import ADAPTER, fetch, fingerprint, is_hub_id, read_object
from traceir.checkpoint import ADAPTER_WEIGHTS as WEIGHTS
from traceir.errors import InputError, ModelError
from traceir.files import replacing_folder
from traceir.forward import TraceModel
from traceir.network import Network
from traceir.settings import SETTINGS, write_companions, write_settings

LINEARS: Final = (
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)"
)
"""Of a Gated DeltaNet (Qwen3.5) the two gates stay as they are: they have a row for each head, fewer than a usual rank."""
PROJECTOR: Final = "visual.merger"
SCALING: Final = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
"""Fields of adapter_config.json that change the merged weights even where the adapter's tensors are equal."""
_RENAMED: Final = ((r"model\.(layers|norm|embed_tokens)\b", r"model.language_model.\2"), (r"visual\.", "model.visual."))
"""Where transformers before 4.52 had the parts of Qwen2-VL and Qwen2.5-VL, and where they are now."""
HUB: Final = "hub:"


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint an adapter belongs to: folder or hub id, and 16 hex digits of its weights (after `hub:` for a hub id)."""

    source: str
    fingerprint: str

    @property
    def on_hub(self) -> bool:
        return self.fingerprint.startswith(HUB)


def attach(model: TraceModel, *, rank: int, alpha: int, dropout: float, train_projector: bool, seed: int) -> Any:
    """Puts a new adapter into `model.network`, in place, and returns the PeftModel around it; what it computes is still the same.

    Afterwards only LoRA, the row of `<|emb|>` (one if input and output are tied, else two) and, if asked for, the projector
    have requires_grad. They are float32 whatever the base is. `seed` draws the LoRA matrices; the global generator is left alone.
    """
    network = model.network
    if rank < 1 or alpha < 1 or not 0.0 <= dropout < 1.0:
        raise InputError(f"LoRA of rank {rank}, alpha {alpha}, dropout {dropout}: give at least 1, at least 1, and from [0, 1)")
    if hasattr(network, "peft_config"):
        raise ModelError("this model has an adapter attached already; save it and merge it before the next one")
    emb, trained = model.processor.emb_id, projectors(network) if train_projector else {}
    config = _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LINEARS,
        modules_to_save=list(trained) or None,
        # Where the matrices are tied, PEFT ties the two rows as well: one parameter, one gradient.
        trainable_token_indices={"embed_tokens": [emb], "lm_head": [emb]},
    )
    adapter = _with_adapter(network, config, seed)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for projector in projectors(network).values() if train_projector else ():
        projector.modules_to_save["default"].register_forward_pre_hook(_in_its_own_type)
    adapter.train(network.training)  # new dropout layers begin in training mode
    return adapter


def _in_its_own_type(module: torch.nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A projector that trains is float32, and what comes to it has the base's type: outside autocast nothing else casts it."""
    return tuple(state.to(next(module.parameters()).dtype) for state in states)


def projectors(network: Any) -> dict[str, Any]:
    """The modules that bring images into the language model's width, by name: the merger, and those of DeepStack (Qwen3-VL)."""
    visual = network.model.visual
    deeper = getattr(visual, "deepstack_merger_list", ())
    return {PROJECTOR: visual.merger, **{f"visual.deepstack_merger_list.{n}": merger for n, merger in enumerate(deeper)}}


def save_adapter(
    model: TraceModel, adapter: Any, target: Path, base: str, *, state: dict[str, torch.Tensor] | None = None
) -> Path:
    """The adapter folder, written beside the target and renamed: never half there. `base` is the folder or hub id it belongs to;
    a relative one is looked for from the working directory and from the adapter folder when the adapter is loaded.

    `state` are the network's weights by name where the network in memory holds only a part of them.
    """
    folder = Path(base) if Path(base).is_dir() else local_base(base, Path(target))
    known = Base(base, f"{HUB}{fingerprint(fetch(base))}" if folder is None else weights_fingerprint(folder))
    with replacing_folder(Path(target)) as fresh:
        adapter.peft_config["default"].base_model_name_or_path = base
        whole = None if state is None else {f"base_model.model.{name}": value for name, value in state.items()}
        # "auto" would ask the hub whether the vocabulary has grown.
        adapter.save_pretrained(fresh, save_embedding_layers=False, state_dict=whole)
        (fresh / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `traceir push` writes one
        write_companions(model.processor, model.network.config.model_type, fresh)
        settings = replace(model.settings, fingerprint=adapter_fingerprint(fresh, known.fingerprint))
        write_settings(settings, fresh, base=asdict(known))
    return Path(target)


def read_base(folder: Path) -> Base:
    """The base that an adapter folder names; ModelError where the folder is not whole or was changed after it was written."""
    for name in (SETTINGS, WEIGHTS, "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} holds {ADAPTER} but no {name}, so it is no whole adapter of TraceIR; copy it again, or give the "
                "--profile of the project that it comes from"
            )
    written = read_object(folder / SETTINGS)
    try:
        base = Base(str(written["base"]["source"]), str(written["base"]["fingerprint"]))
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / SETTINGS} names no base with source and fingerprint; save the adapter again") from error
    if (actual := adapter_fingerprint(folder, base.fingerprint)) != written.get("fingerprint"):
        raise ModelError(
            f"{folder} does not hold what was saved there: its fingerprint is {actual}, traceir.json says "
            f"{written.get('fingerprint')}; copy the folder again"
        )
    return base


def checked_base(folder: Path) -> Path:
    """The folder of the checkpoint that an adapter belongs to; ModelError where it is missing or is another one."""
    base = read_base(folder)
    path = local_base(base.source, folder)
    if path is None and not base.on_hub:
        tried = " nor at ".join(dict.fromkeys((base.source, str(folder / base.source))))
        raise ModelError(f"{folder} is an adapter over {base.source}, which is not at {tried}; put the checkpoint there")
    path = path or fetch(base.source)
    recorded, actual = base.fingerprint.removeprefix(HUB), weights_fingerprint(path)
    # The fingerprint of earlier releases covered every .safetensors file of the folder.
    if recorded != actual and recorded != fingerprint(path, list(path.glob("*.safetensors"))):
        raise ModelError(
            f"{folder} is an adapter over weights {base.fingerprint}, but {path} holds {actual}; give it the checkpoint it was "
            f"trained from, or write into base.source of {folder / SETTINGS} where that is"
        )
    return path


def foreign_base(folder: Path) -> str:
    """The folder or hub id of the base that PEFT's folder of another project names; ModelError where it is missing."""
    source = str(read_object(folder / ADAPTER).get("base_model_name_or_path") or "")
    path = local_base(source, folder) if source else None
    if path is None and not is_hub_id(source):
        raise ModelError(
            f"{folder} is an adapter over {source or 'a base that it does not name'}, which is not here; write into "
            f"base_model_name_or_path of {folder / ADAPTER} where it is"
        )
    return str(path or source)


def local_base(source: str, folder: Path) -> Path | None:
    """The base as a folder: from the adapter folder, else from the working directory; None where there is none."""
    folders = (folder / source, Path(source))
    return next((path for path in folders if path.is_dir() and path.resolve() != folder.resolve()), None)


def weights_fingerprint(folder: Path) -> str:
    """The fingerprint of a checkpoint folder by its files, whatever its traceir.json says; an adapter may be a base, too."""
    return adapter_fingerprint(folder, read_base(folder).fingerprint) if (folder / ADAPTER).is_file() else fingerprint(folder)


def adapter_fingerprint(folder: Path, base: str) -> str:
    """16 hex digits over the adapter's tensors and tokenizer, how they are scaled, and the fingerprint of the base."""
    config = read_object(folder / ADAPTER)
    parts = [fingerprint(folder), base, {name: config.get(name) for name in SCALING}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def merged(network: Any, folder: Path) -> Any:
    """The network with the folder's adapter added to its weights, as plain modules without PEFT's wrappers."""
    peft = _peft()
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None
        adapter = _with_adapter(network, config)
        tensors = load_file(folder / WEIGHTS)
        for old, new in _RENAMED:
            tensors = {re.sub(rf"^(base_model\.model\.){old}", rf"\g<1>{new}", name): value for name, value in tensors.items()}
        wanted = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)
        if strange := sorted(set(wanted) ^ set(tensors)):
            raise ModelError(
                f"{folder / WEIGHTS} does not fit its base: {len(strange)} tensors such as {strange[0]} are only in one"
            )
        peft.set_peft_model_state_dict(adapter, tensors)
        return adapter.merge_and_unload(safe_merge=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot apply the adapter {folder} to its base: {error}") from error


def merged_plainly(network: Network, folder: Path) -> Network:
    """As `merged` for network.py's network, without PEFT: for what `attach` makes and `save_adapter` writes, else ModelError."""
    config, tensors = read_object(folder / ADAPTER), {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    weights = dict(network.named_parameters())
    written, read = network.lm_head, network.model.language_model.embed_tokens
    tied = written.weight.data_ptr() == read.weight.data_ptr()
    for name, value in tensors.items():
        part = name.removeprefix("base_model.model.")
        if part.endswith(".lora_B.weight"):
            continue
        if part.endswith(".lora_A.weight"):
            part = part.replace(".lora_A.", ".")
            change = tensors[name.replace(".lora_A.", ".lora_B.")] @ value * (alpha / rank)
            new = weights[part] + change if part in weights else None
        elif part.endswith(".token_adapter.trainable_tokens_delta"):
            part = part.replace("token_adapter.trainable_tokens_delta", "weight")
            new = weights[part].clone() if part in weights else None
            if new is not None:
                new[config["trainable_token_indices"][part.split(".")[-2]]] = value.to(new.dtype)
        else:
            new = value
        if new is None or new.shape != weights[part].shape:
            raise ModelError(f"{folder / WEIGHTS} does not fit its base: {name}")
        weights[part].data = new.to(weights[part].dtype)
    if tied:
        written.weight = read.weight
    return network


def plain(folder: Path) -> bool:
    """Whether an adapter asks for nothing that `merged_plainly` lacks."""
    config = read_object(folder / ADAPTER)
    special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
    return config.get("peft_type") == "LORA" and not any(config.get(name) for name in special)


def _with_adapter(network: Any, config: Any, seed: int | None = None) -> Any:
    """PEFT's model around a network."""
    # PEFT asks the configuration, and transformers leaves a checkpoint untied that holds both matrices, whatever that says.
    tied = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    for part in (network.config, network.config.text_config):
        part.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return _peft().get_peft_model(network, config)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError('adapters need PEFT, which is not installed; run: pip install "traceir[learn]"') from error
    return peft
