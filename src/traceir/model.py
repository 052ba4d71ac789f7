"""The checkpoint: load, save, merge.

A checkpoint is an ordinary Hugging Face directory of one of NETWORKS plus `traceir.json` (docs/formats.md). Checkpoints of other
projects are read by a profile (profiles.py). transformers is imported where it is used: a checkpoint of ours over Qwen2.5-VL that
only encodes runs without it (network.py) and starts in a third of the time.
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from traceir.adapter import adapter_fingerprint, checked_base, foreign_base, merged, merged_plainly, plain
from traceir.catalogue import profile_for
from traceir.checkpoint import ADAPTER, CONFIG, fetch, fingerprint, read_object, weight_files
from traceir.errors import ModelError
from traceir.files import replacing_folder
from traceir.forward import TraceModel, add_token, wrap
from traceir.network import InferenceTokenizer, Network, fits, read_network
from traceir.profiles import Profile, resolve_profile
from traceir.prompts import EMB, TURN_END
from traceir.settings import (
    PREPROCESSOR,
    SETTINGS,
    TraceSettings,
    image_budget,
    read_settings,
    write_companions,
    write_settings,
)

__all__ = ["NETWORKS", "TraceModel", "TraceSettings", "image_budget", "load", "merge", "read_settings", "save", "wrap"]

log = logging.getLogger(__name__)

NETWORKS: Final = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
"""Model type in config.json -> class in transformers."""
HEAD: Final = "lm_head.weight"


def load(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    profile: Profile | str | Path | None = None,
    as_published: bool = True,
    inference: bool = False,
    **overrides: Any,
) -> TraceModel:
    """A checkpoint directory or hub id as a TraceModel, in evaluation mode.

    `inference` uses network.py where it can: equal numbers and a faster start, but no training and no saving.

    Any checkpoint of NETWORKS will do: one without traceir.json gets `<|emb|>` added (untrained) and default TraceSettings; one
    without an output matrix, as embedding models are saved, writes with its input rows, untrained too, and says so.
    `profile` reads the checkpoint of another project instead, and adds nothing to it. A hub id that catalogue.py knows finds its
    own, unless `as_published` is false, as where TRACE's training starts from it.
    An adapter folder loads with its base and is merged in memory (adapter.py). `overrides` replace fields of TraceSettings.
    Raises ModelError for other architectures and damaged directories.
    """
    name, folder, dtype = str(source), fetch(str(source)), dtype or torch.float32
    if as_published and profile is None:
        profile = profile_for(name)
    profile = None if profile is None else resolve_profile(profile)
    settings = read_settings(folder / SETTINGS) or TraceSettings()
    settings = (settings if profile is None else settings.under(profile)).overridden(overrides)
    try:
        if (folder / ADAPTER).is_file():
            model = _with_adapter(folder, settings, dtype, profile, inference, overrides)
        else:
            network: Any
            tokenizer: Any
            files = (SETTINGS, CONFIG, "tokenizer.json")
            ours = all((folder / file).is_file() for file in files)
            if inference and profile is None and ours and fits(read_object(folder / CONFIG)):
                network, tokenizer = read_network(folder, dtype), InferenceTokenizer(folder / "tokenizer.json")
            else:
                network, tokenizer = _stock(folder, name, dtype)
                if settings.profile is None:
                    add_token(network, tokenizer, EMB)
            if not settings.fingerprint:
                settings = replace(settings, fingerprint=fingerprint(folder) if Path(name).is_dir() else f"hub:{name}")
            model = wrap(network, tokenizer, settings, image_budget(folder / PREPROCESSOR, network.config))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load {name}: {error}") from error
    model.network.eval().to(device)
    return model


def network_class(kind: str, name: str) -> Any:
    """transformers' class for a model type; ModelError where `name` is of another."""
    if kind not in NETWORKS:
        raise ModelError(f"{name} is a {kind!r} checkpoint; TraceIR runs on {', '.join(NETWORKS)}")
    return getattr(importlib.import_module("transformers"), NETWORKS[kind])


def _stock(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Network and tokenizer by transformers' classes; no weight that is missing is drawn at random, as they would."""
    from transformers import AutoTokenizer, PreTrainedConfig

    made = network_class(str(PreTrainedConfig.get_config_dict(folder)[0].get("model_type")), name)
    weight_files(folder)  # an error of ours where there are only pickles
    network, loaded = made.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if lost := sorted(set(loaded["missing_keys"]) - {HEAD}):
        raise ModelError(f"cannot load {name}: it lacks {len(lost)} tensors of its architecture such as {lost[0]}; copy it again")
    if HEAD in loaded["missing_keys"]:
        log.warning("%s has no output matrix (%s): an embedding model; what it writes is untrained", name, HEAD)
        network.lm_head.weight = network.get_input_embeddings().weight
        network.config.tie_word_embeddings = network.config.text_config.tie_word_embeddings = True
    return network, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _with_adapter(
    folder: Path, settings: TraceSettings, dtype: torch.dtype, profile: Profile | None, inference: bool, overrides: dict[str, Any]
) -> TraceModel:
    """The base with the adapter merged in memory; one of another project lacks TraceIR's files and takes those of its base."""
    weight_files(folder)  # an error of ours where there are only pickles
    if inference and profile is None and plain(folder):
        base = load(checked_base(folder), dtype=dtype, as_published=False, inference=True)
        if isinstance(base.network, Network):
            image = image_budget(folder / PREPROCESSOR, base.network.config)
            return wrap(merged_plainly(base.network, folder), InferenceTokenizer(folder / "tokenizer.json"), settings, image)
    from transformers import AutoTokenizer

    if profile is None:
        base = load(checked_base(folder), dtype=dtype, as_published=False)
        image = image_budget(folder / PREPROCESSOR, base.network.config)
    else:
        base = load(foreign_base(folder), dtype=dtype, profile=profile, **overrides)
        image = base.processor.image
        settings = replace(base.settings, fingerprint=adapter_fingerprint(folder, base.fingerprint))
    own = profile is None or (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if own else base.processor.tokenizer
    return wrap(merged(base.network, folder), tokenizer, settings, image)


def save(model: TraceModel, target: Path, *, state: dict[str, torch.Tensor] | None = None) -> Path:
    """An ordinary Hugging Face checkpoint plus traceir.json, written beside the target and renamed: never half there.

    `state` are the weights to write where the network in memory holds only a part of them (training over several processes).
    The stored fingerprint is that of the weights as written; the folder's own is returned through `load`.
    """
    if isinstance(model.network, Network):
        raise ModelError(
            f"cannot save {target}: the model was loaded for inference; load it with `traceir.model.load`, then save"
        )
    if hasattr(model.network, "peft_config"):
        raise ModelError(f"cannot save {target} as a checkpoint: an adapter is attached; save it by `save_adapter`, then merge")
    with replacing_folder(Path(target)) as fresh:
        model.network.save_pretrained(fresh, safe_serialization=True, state_dict=state)
        ends = [model.processor.special[token] for token in (EMB, TURN_END) if token in model.processor.special]
        generation = {"do_sample": False, "eos_token_id": ends}
        (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_companions(model.processor, model.network.config.model_type, fresh)
        write_settings(replace(model.settings, fingerprint=fingerprint(fresh)), fresh)
    return Path(target)


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
    model = load(folder, as_published=False)
    if dtype is not None:
        model.network.to(dtype)
    return save(model, target)
