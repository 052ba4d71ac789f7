"""The checkpoint: load, create, save, add `<|emb|>`, and the two forward passes everything else is built on.

A checkpoint is an ordinary Hugging Face directory of one of NETWORKS plus `traceir.json` (docs/formats.md). Checkpoints of other
projects are read by a profile (profiles.py). transformers is imported where it is used: a checkpoint of ours over Qwen2.5-VL that
only encodes runs without it (network.py) and starts in a third of the time.
Shapes: B rows, T tokens, D hidden width, V vocabulary, N pictures.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from torch.nn import functional

from traceir.batch import Batch, ImageBudget, Processor, ReadOut, check_read_out
from traceir.catalogue import profile_for
from traceir.checkpoint import ADAPTER, MODULES, OWN_MODULE, fetch
from traceir.errors import ModelError
from traceir.items import Item, Query
from traceir.network import Cache, Network, Words, fits, read_network, see
from traceir.profiles import Profile, profile_of, resolve_profile
from traceir.prompts import (
    EMB,
    IMAGE_PAD,
    TURN_END,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Prompt,
    PromptVersion,
    Role,
    render_candidate,
    render_query,
)
from traceir.prompts import check_version as check_prompt_version
from traceir.weights import fingerprint, weight_files
from traceir.world import World, world_of

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

log = logging.getLogger(__name__)

FORMAT: Final = 1
NETWORKS: Final = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
"""Model type in config.json -> class in transformers."""
PROCESSORS: Final = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}
"""Model type -> the processor that transformers makes for it."""
HEAD: Final = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What traceir.json holds beside the weights: how the checkpoint was taught to read and to be read."""

    prompt_version: PromptVersion = "trace-1"
    read_out: ReadOut = "before_token"
    candidates_write: bool = False
    """Whether candidates may write too, as no checkpoint of TRACE does; the paper's Table 6 tries it."""
    max_reasoning_tokens: int = 256
    max_text_tokens: int = 1024
    closing: str = ""
    fingerprint: str = ""
    world: World | None = None
    """What alone it knows; None for a model without such bounds."""
    profile: Profile | None = None
    """How a checkpoint of another project is prompted and read; where it is given, `prompt_version` says nothing."""


class TraceModel:
    """One loaded checkpoint: the Hugging Face model, its Processor and its TraceSettings.

    The forward passes are pure: position ids come from the batch, so nothing is kept on the module between calls and threads
    may share one TraceModel.
    """

    def __init__(self, network: Any, processor: Processor, settings: TraceSettings) -> None:
        self.network = network
        self.processor = processor
        self.settings = settings

    @property
    def device(self) -> torch.device:
        return torch.device(self.network.device)

    @property
    def width(self) -> int:
        """D, the number of components of an embedding."""
        return int(self.network.config.text_config.hidden_size)

    @property
    def fingerprint(self) -> str:
        return self.settings.fingerprint

    def prompt(self, content: Query | Item, *, direct: bool = False) -> Prompt:
        """What the model reads for a query or an item; `direct` where it shall write nothing (profiles may put that in words)."""
        if self.settings.profile is not None:
            return self.settings.profile.render(content, direct=direct)
        if isinstance(content, Query):
            return render_query(content, self.settings.prompt_version)
        return render_candidate(content, self.settings.prompt_version)

    def writes(self, role: Role) -> bool:
        """Whether this side may write before its embedding: queries under TRACE, whoever the profile names otherwise."""
        if self.settings.profile is not None:
            return role in self.settings.profile.writes
        return (role == "query" or self.settings.candidates_write) and self.settings.read_out != "last"

    @property
    def text_limit(self) -> int | None:
        """The most tokens of a text that are read; None under a profile, which may count them otherwise."""
        return None if self.settings.profile is not None else self.processor.max_text_tokens

    def new_cache(self) -> Cache:
        """An empty cache of the kind that the network fills; transformers' own has the same methods and more.

        Qwen3.5's is made of its configuration: of four layers three keep a recurrent state in place of keys and values.
        """
        if isinstance(self.network, Network):
            return Cache()
        from transformers.cache_utils import DynamicCache

        hybrid = self.network.config.model_type == "qwen3_5"
        made: Cache = DynamicCache(config=self.network.config.text_config if hybrid else None)
        return made

    def hidden(self, batch: Batch, cache: Cache | None = None) -> torch.Tensor:
        """Last-layer states after the final norm, [B, T, D]; fills `cache` if given."""
        text = self.network.model.language_model
        embedded_BTD = text.embed_tokens(batch.ids)
        deeper: dict[str, Any] = {}
        if batch.patches is not None and batch.grids is not None:
            patches = self.processor.normalise(batch.patches) if batch.patches.dtype == torch.uint8 else batch.patches
            slots_BT = batch.ids == self.network.config.image_token_id
            features, layers = self.image_features(patches, batch.grids)
            if layers:
                deeper = {"visual_pos_masks": slots_BT, "deepstack_visual_embeds": layers}
            embedded_BTD = embedded_BTD.masked_scatter(slots_BT.unsqueeze(-1), features.to(embedded_BTD.dtype))
        mask = None if bool(batch.mask.all()) else batch.mask
        out = text(
            inputs_embeds=embedded_BTD,
            attention_mask=mask,
            position_ids=batch.positions,
            use_cache=cache is not None,
            cache=cache,
            **deeper,
        )
        states: torch.Tensor = out.last_hidden_state
        return states

    def step(self, token_B: torch.Tensor, place_B: torch.Tensor, mask_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One decoding step: tokens [B] at M-RoPE positions [B] over a filled cache; states [B, D]."""
        text = self.network.model.language_model
        out = text(
            inputs_embeds=text.embed_tokens(token_B[:, None]),
            attention_mask=mask_BT,
            position_ids=place_B.view(1, -1, 1).expand(3, -1, 1),
            use_cache=True,
            cache=cache,
        )
        states: torch.Tensor = out.last_hidden_state[:, -1]
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token scores for states [..., D]: [..., V]."""
        scores: torch.Tensor = self.network.lm_head(hidden)
        return scores

    def image_features(self, patches: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Merged vision tokens of N pictures, concatenated: [sum of tokens, D]; and what the first layers of a Qwen3-VL add to
        the same positions (DeepStack), nothing for the others.

        Pictures of one grid run as one batch; the stock class, which Qwen2.5-VL's relatives take, walks picture by picture. Both
        give the same numbers (tests/test_model.py).
        """
        visual = self.network.model.visual
        patches = patches.to(visual.dtype)
        shapes = [tuple(int(side) for side in grid) for grid in grids.tolist()]
        if self.network.config.model_type != "qwen2_5_vl" or any(time != 1 for time, _, _ in shapes):
            found = self.network.model.get_image_features(patches, grids, return_dict=True)
            layers = getattr(found, "deepstack_features", None) or ()
            return torch.cat(found.pooler_output), [torch.cat(layer) for layer in layers]
        pieces = torch.split(patches, [high * wide for _, high, wide in shapes])
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(number)
        done: dict[int, torch.Tensor] = {}
        for shape, numbers in groups.items():
            features = see(visual, torch.stack([pieces[n] for n in numbers]), shape[1], shape[2])
            done.update(zip(numbers, features, strict=True))
        return torch.cat([done[number] for number in range(len(shapes))]), []


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

    `inference` takes the network of network.py where it can: the same numbers, at once, and neither to be trained nor saved.

    Any checkpoint of NETWORKS will do: one without traceir.json gets `<|emb|>` added (untrained) and default TraceSettings; one
    without an output matrix, as embedding models are saved, writes with its input rows, untrained too, and says so.
    `profile` reads the checkpoint of another project instead, and adds nothing to it. A hub id that catalogue.py knows finds its
    own, unless `as_published` is false, as where TRACE's training starts from it.
    An adapter folder loads with its base and is merged in memory (adapter.py). `overrides` replace fields of TraceSettings.
    Raises ModelError for other architectures and damaged directories.
    """
    name, folder = str(source), fetch(str(source))
    profile = profile or (profile_for(name) if as_published else None)
    if inference and profile is None and _is_our_own(folder):
        return _load_our_own(folder, device=device, dtype=dtype or torch.float32, **overrides)
    from transformers import AutoTokenizer, PreTrainedConfig

    from traceir.adapter import load_adapter, load_foreign_adapter  # which imports this module

    try:
        if (folder / ADAPTER).is_file():
            if profile is not None:
                return load_foreign_adapter(folder, resolve_profile(profile), device=device, dtype=dtype, **overrides)
            return load_adapter(folder, device=device, dtype=dtype, **overrides)
        kind = str(PreTrainedConfig.get_config_dict(folder)[0].get("model_type"))
        if kind not in NETWORKS:
            raise ModelError(f"{name} is a {kind!r} checkpoint; TraceIR runs on {', '.join(NETWORKS)}")
        weight_files(folder)  # an error of ours where there are only pickles
        network_class = getattr(importlib.import_module("transformers"), NETWORKS[kind])
        config = network_class.config_class.from_pretrained(folder)
        network, told = network_class.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True
        )
        _complete(network, told["missing_keys"], name)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load {name}: {error}") from error
    settings = read_settings(_companion(folder, "traceir.json")) or TraceSettings()
    if profile is not None:
        settings = _under_profile(settings, resolve_profile(profile))
    settings = overridden(settings, overrides)
    if settings.profile is None:
        add_emb_token(network, tokenizer)
    if not settings.fingerprint:
        settings = replace(settings, fingerprint=fingerprint(folder) if Path(name).is_dir() else f"hub:{name}")
    network.eval().to(device)
    return wrap(network, tokenizer, settings, image_budget(_companion(folder, "preprocessor_config.json"), config))


def _complete(network: Any, missing: Iterable[str], name: str) -> None:
    """Takes the input rows for the output matrix where that alone is missing; ModelError where other weights are, which
    transformers would draw at random."""
    lost = sorted(set(missing) - {HEAD})
    if lost:
        raise ModelError(f"cannot load {name}: it lacks {len(lost)} tensors of its architecture such as {lost[0]}; copy it again")
    if HEAD in missing:
        log.warning("%s has no output matrix (%s): an embedding model; what it writes is untrained", name, HEAD)
        network.lm_head.weight = network.get_input_embeddings().weight
        network.config.tie_word_embeddings = network.config.text_config.tie_word_embeddings = True


def _is_our_own(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint that TraceIR saved, of which Network runs all there is."""
    files = ("traceir.json", "config.json", "tokenizer.json")
    if (folder / ADAPTER).is_file() or not all((folder / file).is_file() for file in files):
        return False
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        return False  # the other road says what is wrong
    return isinstance(config, dict) and fits(config)


def _load_our_own(folder: Path, *, device: str, dtype: torch.dtype, **overrides: Any) -> TraceModel:
    settings = overridden(read_settings(folder / "traceir.json") or TraceSettings(), overrides)
    if not settings.fingerprint:
        settings = replace(settings, fingerprint=fingerprint(folder))
    network = read_network(folder, dtype).to(device)
    budget = image_budget(_companion(folder, "preprocessor_config.json"), network.config)
    return wrap(network, Words(folder / "tokenizer.json"), settings, budget)


def wrap(network: Any, tokenizer: Any, settings: TraceSettings, image: ImageBudget) -> TraceModel:
    """A TraceModel around a network in memory; swaps the patch convolution for an equal matrix product."""
    _linear_patches(network.model.visual.patch_embed)
    read_out = check_read_out(settings.read_out)
    check_prompt_version(settings.prompt_version)
    profile, budget = settings.profile, settings.max_text_tokens
    if profile is None:
        return TraceModel(network, Processor(tokenizer, image, read_out=read_out, max_text_tokens=budget), settings)
    image = replace(
        image,
        min_pixels=profile.min_pixels or image.min_pixels,
        max_pixels=profile.max_pixels or image.max_pixels,
        resize=profile.resize,
    )
    if profile.add_token and profile.token is not None:
        _add_known_token(network, tokenizer, profile.token)
    processor = Processor(tokenizer, image, read_out=read_out, max_text_tokens=budget, emb_token=profile.token, rope=profile.rope)
    return TraceModel(network, processor, settings)


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
    with written_whole(target) as fresh:
        model.network.save_pretrained(fresh, safe_serialization=True, state_dict=state)
        ends = [model.processor.special[token] for token in (EMB, TURN_END) if token in model.processor.special]
        generation = {"do_sample": False, "eos_token_id": ends}
        (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_companions(model, fresh)
    return Path(target)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside the target, renamed into its place when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        fresh = Path(folder) / "checkpoint"
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.replace(target, Path(folder) / "old")
        os.replace(fresh, target)


def save_companions(model: TraceModel, folder: Path) -> None:
    """Tokenizer, preprocessor_config.json, modules.json and, last, traceir.json with the fingerprint of the weights there.

    modules.json tells sentence-transformers which module reads the folder; without it the library would make a model of its own
    with other vectors.
    """
    model.processor.tokenizer.save_pretrained(folder)
    image = model.processor.image
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": PROCESSORS[model.network.config.model_type],
        "patch_size": image.patch,
        "merge_size": image.merge,
        "temporal_patch_size": image.temporal,
        "size": {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels},
        "min_pixels": image.min_pixels,
        "max_pixels": image.max_pixels,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    module = {"idx": 0, "name": "0", "path": "", "type": OWN_MODULE}
    (folder / MODULES).write_text(json.dumps([module], indent=2) + "\n")
    written = {"format": FORMAT, **asdict(replace(model.settings, fingerprint=fingerprint(folder)))}
    # What is not used is left out, so that earlier releases read the file too.
    written["world"] = model.settings.world and model.settings.world.as_json()
    unused = {name for name in ("profile", "candidates_write", "world") if not written[name]}
    written = {name: value for name, value in written.items() if name not in unused}
    (folder / "traceir.json").write_text(json.dumps(written, indent=2) + "\n")


def add_emb_token(network: Any, tokenizer: Any) -> int:
    """Makes `<|emb|>` a token of model and tokenizer and returns its id; a no-op where it is there already.

    Qwen's embedding matrix is padded beyond its tokenizer, so the new id usually has a row; the matrix grows only if it has
    none and is never shrunk. A new row starts as the mean of the real rows, in input and output alike (they learn in training).
    """
    known = tokenizer.convert_tokens_to_ids(EMB)
    if known is not None and known != tokenizer.unk_token_id:
        return int(known)
    tokenizer.add_special_tokens({"additional_special_tokens": [EMB]}, replace_extra_special_tokens=False)
    new = int(tokenizer.convert_tokens_to_ids(EMB))
    rows = network.get_input_embeddings().weight.shape[0]
    if new >= rows:
        network.resize_token_embeddings(new + 1, mean_resizing=False)
    with torch.no_grad():
        for matrix in {network.get_input_embeddings().weight, network.get_output_embeddings().weight}:
            matrix[new] = matrix[:new].mean(dim=0)
    return new


def _add_known_token(network: Any, tokenizer: Any, token: str) -> None:
    """Makes a token one of the tokenizer: the next id, whose row was trained though the tokenizer was not saved with it."""
    if tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id):
        return
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    new, rows = int(tokenizer.convert_tokens_to_ids(token)), network.get_input_embeddings().weight.shape[0]
    if new >= rows:
        raise ModelError(f"{token} would be token {new}, and the checkpoint has {rows} rows; is --profile the right one?")


def create(config: Qwen2_5_VLConfig, tokenizer: Any, settings: TraceSettings, image: ImageBudget, seed: int) -> TraceModel:
    """A model with random weights: `config` names the sizes, token ids are taken from the tokenizer."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    for field, token in (
        ("image_token_id", IMAGE_PAD),
        ("video_token_id", VIDEO_PAD),
        ("vision_start_token_id", VISION_START),
        ("vision_end_token_id", VISION_END),
    ):
        setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    config.text_config.pad_token_id = None
    network = Qwen2_5_VLForConditionalGeneration(config)
    add_emb_token(network, tokenizer)
    return wrap(network.eval(), tokenizer, settings, image)


def _companion(folder: Path, file: str) -> Path | None:
    """A file beside the weights; None where the checkpoint has none."""
    return folder / file if (folder / file).is_file() else None


def overridden(settings: TraceSettings, overrides: Mapping[str, Any]) -> TraceSettings:
    known = {field.name for field in fields(TraceSettings)}
    if unknown := set(overrides) - known:
        raise ModelError(f"unknown settings {sorted(unknown)}; traceir.json has {sorted(known)}")
    return replace(settings, **overrides)


def read_settings(file: Path | None) -> TraceSettings | None:
    """What a traceir.json says, without the `base` of an adapter; None where there is no file."""
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}:{error.lineno}: not JSON ({error.msg}); save the checkpoint again") from error
    if found.pop("format", None) != FORMAT:
        raise ModelError(f"{file}: format is not {FORMAT}; this checkpoint needs another release of traceir")
    found.pop("base", None)
    found["world"] = world_of(found.get("world"), str(file))
    if found.get("profile") is not None:
        found["profile"] = profile_of(found["profile"], str(file))
    try:
        return TraceSettings(**found)
    except TypeError as error:
        raise ModelError(f"{file}: {error}") from error


def _under_profile(settings: TraceSettings, profile: Profile) -> TraceSettings:
    return replace(
        settings,
        profile=profile,
        read_out=profile.read_out,
        max_text_tokens=profile.max_text_tokens or settings.max_text_tokens,
        max_reasoning_tokens=profile.max_reasoning_tokens or settings.max_reasoning_tokens,
    )


def image_budget(file: Path | None, config: Any) -> ImageBudget:
    """What a preprocessor_config.json says. As in transformers, `min_pixels` and `max_pixels` at its top go before `size`."""
    vision = config.vision_config
    budget = ImageBudget(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if file is None:
        return budget
    found = json.loads(file.read_text())
    size = found.get("size") or {}
    return replace(
        budget,
        min_pixels=found.get("min_pixels") or size.get("shortest_edge") or budget.min_pixels,
        max_pixels=found.get("max_pixels") or size.get("longest_edge") or budget.max_pixels,
        mean=tuple(found.get("image_mean", budget.mean)),
        std=tuple(found.get("image_std", budget.std)),
    )


def _linear_patches(patch_embed: Any) -> None:
    """Patch embedding as one matrix product: stride equals kernel, so the 3-D convolution is the same sum, slower on CPUs."""
    projection = patch_embed.proj

    def forward(patches: torch.Tensor) -> torch.Tensor:
        return functional.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)

    patch_embed.forward = forward
