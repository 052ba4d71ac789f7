"""LoRA adapters over a checkpoint, by PEFT: attach, save, load, merge (paper, section 2: LoRA on the language model).

An adapter trains LoRA on the linear layers of the language model, the row of `<|emb|>` in the input and output matrices, and
the projector (the mergers of the vision tower) as a whole; all else is frozen. On disk it is PEFT's own folder with TraceIR's
files beside it (docs/formats.md): it belongs to one base, which it names by place and by fingerprint, and no other is taken.
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
from transformers import AutoTokenizer

from traceir.checkpoint import ADAPTER, fetch, is_hub_id
from traceir.errors import InputError, ModelError
from traceir.model import (
    TraceModel,
    TraceSettings,
    image_budget,
    load,
    overridden,
    read_settings,
    save,
    save_companions,
    wrap,
    written_whole,
)
from traceir.profiles import Profile
from traceir.weights import ADAPTER_WEIGHTS as WEIGHTS
from traceir.weights import fingerprint, weight_files

LINEARS: Final = (
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)"
)
"""Of a Gated DeltaNet (Qwen3.5) the two gates stay as they are: they have a row for each head, fewer than a usual rank."""
PROJECTOR: Final = "visual.merger"
SCALING: Final = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
"""Fields of adapter_config.json that decide what the same tensors make of a base."""
_RENAMED: Final = ((r"model\.(layers|norm|embed_tokens)\b", r"model.language_model.\2"), (r"visual\.", "model.visual."))
"""Where transformers before 4.52 had the parts of Qwen2-VL and Qwen2.5-VL, and where they are now."""


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint an adapter belongs to: folder or hub id, and 16 hex digits of its weights (after `hub:` for a hub id)."""

    source: str
    fingerprint: str

    @property
    def on_hub(self) -> bool:
        return self.fingerprint.startswith("hub:")


def attach(model: TraceModel, *, rank: int, alpha: int, dropout: float, train_projector: bool, seed: int) -> Any:
    """Puts a new adapter into `model.network`, in place, and returns the PeftModel around it; what it computes is still the same.

    Afterwards only LoRA, the row of `<|emb|>` (one if input and output are tied, else two) and, if asked for, the projector
    have requires_grad. They are float32 whatever the base is. `seed` draws the LoRA matrices; the global generator is left alone.
    """
    peft = _peft()
    network = model.network
    if rank < 1 or alpha < 1 or not 0.0 <= dropout < 1.0:
        raise InputError(f"LoRA of rank {rank}, alpha {alpha}, dropout {dropout}: give at least 1, at least 1, and from [0, 1)")
    if hasattr(network, "peft_config"):
        raise ModelError("this model has an adapter attached already; save it and merge it before the next one")
    _say_whether_tied(network)
    emb = model.processor.emb_id
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LINEARS,
        modules_to_save=list(projectors(network)) if train_projector else None,
        # Where the matrices are tied, PEFT ties the two rows as well: one parameter, one gradient.
        trainable_token_indices={"embed_tokens": [emb], "lm_head": [emb]},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = peft.get_peft_model(network, config)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for projector in projectors(network).values() if train_projector else ():
        projector.modules_to_save["default"].register_forward_pre_hook(_in_its_own_type)
    adapter.train(network.training)  # new dropout layers begin in training mode
    return adapter


def _in_its_own_type(module: torch.nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A projector that trains is float32, and what comes to it has the base's type: outside autocast nothing else casts it."""
    return tuple(one.to(next(module.parameters()).dtype) for one in states)


def projectors(network: Any) -> dict[str, Any]:
    """The modules that bring pictures into the language model's width, by name: the merger, and those of DeepStack (Qwen3-VL)."""
    visual = network.model.visual
    deeper = getattr(visual, "deepstack_merger_list", ())
    return {PROJECTOR: visual.merger, **{f"visual.deepstack_merger_list.{n}": one for n, one in enumerate(deeper)}}


def save_adapter(
    model: TraceModel, adapter: Any, target: Path, base: str, *, state: dict[str, torch.Tensor] | None = None
) -> Path:
    """The adapter folder, written beside the target and renamed: never half there. `base` is the folder or hub id it belongs to.

    `state` are the network's weights by name where the network in memory holds only a part of them.

    A relative base is looked for from the working directory and from the adapter folder when the adapter is loaded.
    """
    target = Path(target)
    found = _locate(base, target)
    told = Base(base, weights_fingerprint(found)) if found is not None else Base(base, hub_fingerprint(base))
    with written_whole(target) as fresh:
        adapter.peft_config["default"].base_model_name_or_path = base
        # "auto" would ask the hub whether the vocabulary has grown.
        whole = None if state is None else {f"base_model.model.{name}": value for name, value in state.items()}
        adapter.save_pretrained(fresh, save_embedding_layers=False, state_dict=whole)
        (fresh / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `traceir push` writes one
        save_companions(model, fresh)
        file = fresh / "traceir.json"
        written = json.loads(file.read_text())
        written |= {"fingerprint": _adapter_fingerprint(fresh, told), "base": asdict(told)}
        file.write_text(json.dumps(written, indent=2) + "\n")
    return target


def load_adapter(folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, **overrides: Any) -> TraceModel:
    """The base with the adapter merged in memory, in evaluation mode; its fingerprint is the adapter folder's.

    The sum is made in `dtype` (float32 unless told otherwise). Raises ModelError where the base is missing or another one, and
    where the folder is not whole.
    """
    base = read_base(folder)
    settings = overridden(read_settings(folder / "traceir.json") or TraceSettings(), overrides)
    place = _locate(base.source, folder)
    if place is not None:
        _check_base(base, _as_recorded(place, base), str(place), folder)
    elif not base.on_hub:
        tried = " nor at ".join(dict.fromkeys(str(one) for one in _places(base.source, folder)))
        raise ModelError(f"{folder} is an adapter over {base.source}, which is not at {tried}; put the checkpoint there")
    model = load(place or base.source, dtype=dtype, as_published=False)
    if place is None:
        _check_base(base, hub_fingerprint(base.source), base.source, folder)
    network = _merged(model.network, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    budget = image_budget(folder / "preprocessor_config.json", network.config)
    return wrap(network.eval().to(device), tokenizer, settings, budget)


def load_foreign_adapter(
    folder: Path, profile: Profile, *, device: str = "cpu", dtype: torch.dtype | None = None, **overrides: Any
) -> TraceModel:
    """PEFT's folder of another project, merged in memory into the base that its adapter_config.json names, and read by a profile.

    The tokenizer is the adapter's, where it has one. Raises ModelError where the base or safetensors weights are missing, or do
    not fit.
    """
    weight_files(folder)  # an error of ours where there are only pickles
    source = str(_read_config(folder).get("base_model_name_or_path") or "")
    place = _locate(source, folder) if source else None
    if place is None and not is_hub_id(source):
        raise ModelError(
            f"{folder} is an adapter over {source or 'a base that it does not name'}, which is not here; write into "
            f"base_model_name_or_path of {folder / ADAPTER} where it is"
        )
    model = load(place or source, dtype=dtype, profile=profile, **overrides)
    settings = replace(model.settings, fingerprint=_adapter_fingerprint(folder, Base(source, model.fingerprint)))
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if own else model.processor.tokenizer
    return wrap(_merged(model.network, folder).eval().to(device), tokenizer, settings, model.processor.image)


def merge(source: str | Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """An adapter folder or hub id as a plain checkpoint that needs neither PEFT nor the base.

    The sum is made in float32 and then stored in `dtype` (float32 if None, which gives the very embeddings of the adapter).
    The target must not exist yet.
    """
    folder, target = fetch(str(source)), Path(target)
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{source} holds no {ADAPTER}, so there is nothing to merge; give the folder of an adapter")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists already; choose another place for the merged checkpoint")
    model = load_adapter(folder)
    if dtype is not None:
        model.network.to(dtype)
    return save(model, target)


def read_base(folder: Path) -> Base:
    """The base that an adapter folder names; ModelError where the folder is not whole or was changed after it was written."""
    for name in ("traceir.json", WEIGHTS, "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} holds {ADAPTER} but no {name}, so it is no whole adapter of TraceIR; copy it again, or give the "
                "--profile of the project that it comes from"
            )
    read_settings(folder / "traceir.json")
    written = json.loads((folder / "traceir.json").read_text())
    try:
        base = Base(str(written["base"]["source"]), str(written["base"]["fingerprint"]))
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'traceir.json'} names no base with source and fingerprint; save the adapter again"
        ) from error
    if (actual := _adapter_fingerprint(folder, base)) != written.get("fingerprint"):
        raise ModelError(
            f"{folder} does not hold what was saved there: its fingerprint is {actual}, traceir.json says "
            f"{written.get('fingerprint')}; copy the folder again"
        )
    return base


def weights_fingerprint(folder: Path) -> str:
    """The fingerprint of a checkpoint folder by its files, whatever its traceir.json says; an adapter may be a base, too."""
    if (folder / ADAPTER).is_file():
        return _adapter_fingerprint(folder, read_base(folder))
    return fingerprint(folder)


def _as_recorded(place: Path, base: Base) -> str:
    """The fingerprint of the folder where a base lies; earlier releases took in every .safetensors file beside the weights."""
    actual, recorded = weights_fingerprint(place), base.fingerprint.removeprefix("hub:")
    if actual != recorded and not (place / ADAPTER).is_file():
        every = fingerprint(place, list(place.glob("*.safetensors")))
        return recorded if every == recorded else actual
    return actual


def hub_fingerprint(name: str) -> str:
    """`hub:` and 16 hex digits of the weights of a hub id as they lie in the local cache, where `load` has put them."""
    return f"hub:{fingerprint(fetch(name))}"


def _check_base(base: Base, actual: str, place: str, folder: Path) -> None:
    if actual.removeprefix("hub:") != base.fingerprint.removeprefix("hub:"):
        raise ModelError(
            f"{folder} is an adapter over weights {base.fingerprint}, but {place} holds {actual}; give it the checkpoint it was "
            f"trained from, or write into base.source of {folder / 'traceir.json'} where that is"
        )


def _adapter_fingerprint(folder: Path, base: Base) -> str:
    """16 hex digits over the adapter's tensors and tokenizer, how they are scaled, and the weights they belong to."""
    config = _read_config(folder)
    parts = [fingerprint(folder), base.fingerprint, {name: config.get(name) for name in SCALING}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / ADAPTER).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder / ADAPTER}: {error}; copy the folder again") from error
    return found


def _merged(network: Any, folder: Path) -> Any:
    """The network with the folder's adapter added to its weights; PEFT leaves nothing of itself behind."""
    peft = _peft()
    _say_whether_tied(network)
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None
        with torch.random.fork_rng(devices=[]):
            adapter = peft.get_peft_model(network, config)
        tensors = {_today(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        wanted = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)
        if strange := sorted(set(wanted) ^ set(tensors)):
            raise ModelError(
                f"{folder / WEIGHTS} does not fit its base: {len(strange)} tensors such as {strange[0]} are only in one"
            )
        peft.set_peft_model_state_dict(adapter, tensors)
        return adapter.merge_and_unload(safe_merge=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"cannot apply the adapter {folder} to its base: {error}") from error


def _today(name: str) -> str:
    """The name of an adapter's tensor in today's layout."""
    for old, new in _RENAMED:
        name = re.sub(rf"^(base_model\.model\.){old}", rf"\g<1>{new}", name)
    return name


def _say_whether_tied(network: Any) -> None:
    """Writes into the configuration whether input and output rows are one matrix, which PEFT reads there.

    transformers leaves a checkpoint untied that holds both matrices, whatever its configuration says.
    """
    tied = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    for config in (network.config, network.config.text_config):
        config.tie_word_embeddings = tied


def _places(source: str, folder: Path) -> tuple[Path, Path]:
    return Path(source), folder / source


def _locate(source: str, folder: Path) -> Path | None:
    """The base as a folder: from the working directory, else from the adapter folder; None where there is none."""
    found = [place for place in _places(source, folder) if place.is_dir() and place.resolve() != folder.resolve()]
    return found[0] if found else None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError('adapters need PEFT, which is not installed; run: pip install "traceir[learn]"') from error
    return peft
