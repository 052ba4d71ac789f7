"""Qwen2.5-VL in plain torch, for inference alone: what a checkpoint of ours runs on where nothing is trained.

transformers' class takes twice as long to import as torch itself. This one reads the same files, names its parts as transformers
does, so that callers need not know which of the two they have, and gives the same numbers
(tests/test_network.py). It has what a saved checkpoint of TraceIR may ask for and no more; `fits` says whether that is enough.
Shapes: B rows, T tokens, K cached and new tokens, N images of one grid, P patches, D width, H heads, E width of a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

from traceir.checkpoint import weight_files
from traceir.errors import ModelError

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, which may be multiplied with heads [..., E]."""


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, [B, H, K, E]."""

    keys: torch.Tensor
    values: torch.Tensor


class Cache:
    """Keys and values of the tokens read so far, by layer; the part of transformers' DynamicCache that decoding needs."""

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends to a layer, and returns all that it holds."""
        if layer < len(self.layers):
            held = self.layers[layer]
            held.keys, held.values = torch.cat([held.keys, keys], dim=2), torch.cat([held.values, values], dim=2)
        else:
            self.layers.append(LayerCache(keys, values))
        return self.layers[layer].keys, self.layers[layer].values

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Leaves these rows, in their order."""
        for held in self.layers:
            held.keys, held.values = held.keys[rows], held.values[rows]


class Part(nn.Module):
    """A module whose call returns a tensor."""

    __call__: Callable[..., torch.Tensor]


class Linear(Part):
    """Without the initial weights of torch's own, which on the meta device import much of torch's compiler."""

    def __init__(self, inner: int, outer: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = _parameter(outer, inner), _parameter(outer) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight, self.bias)


class RMSNorm(Part):
    """Computed in float32, whatever the states are."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = _parameter(width), eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        exact = states.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(states.dtype)


class MLP(Part):
    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(width, inner, bias=bias), Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))


class Attention(Part):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        width, self.number = config.hidden_size, number
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(width, width)
        self.k_proj, self.v_proj = (Linear(width, self.shared * (width // self.heads)) for _ in range(2))
        self.o_proj = Linear(width, width, bias=False)

    def forward(self, states: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        rows, length, width = states.shape
        query = self.q_proj(states).view(rows, length, self.heads, -1).transpose(1, 2)
        key, value = (part(states).view(rows, length, self.shared, -1).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        query, key = (_rotated(part, rotation) for part in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=self.shared != self.heads
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, width))


class Layer(Part):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, number)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: torch.Tensor, rotation: Rotation, mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        states = states + self.self_attn(self.input_layernorm(states), rotation, mask, cache)
        return states + self.mlp(self.post_attention_layernorm(states))


class Language(nn.Module):
    """The decoder: embedded tokens [B, T, D] at positions [3, B, T] to states [B, T, D] after the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape, device="meta"))
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.theta, self.width = float(config.rope_parameters["rope_theta"]), config.hidden_size // config.num_attention_heads
        self.sections: list[int] = list(config.rope_parameters["mrope_section"])

    def forward(
        self,
        *,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """`attention_mask` [B, K] is 1 where a token counts, or [B, 1, T, K] true where one attends to another; None where all
        count."""
        states = inputs_embeds
        # Each frequency rotates by the time, the row or the column (Qwen2-VL's M-RoPE): [B, 1, T, E].
        parts = torch.split(_angles(position_ids, self.theta, self.width), self.sections, dim=-1)
        angles = torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        rotation = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        mask = attention_mask
        if mask is not None and mask.ndim == 2:
            mask = _causal(mask, states.shape[1])
        for layer in self.layers:
            states = layer(states, rotation, mask, cache)
        return SimpleNamespace(last_hidden_state=self.norm(states))


class VisionBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.norm1, self.norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = Linear(width, 3 * width), Linear(width, width)
        self.attn.num_heads, self.attn.scaling = heads, (width // heads) ** -0.5
        self.mlp = MLP(width, config.intermediate_size, bias=True)


class Merger(Part):
    def __init__(self, patch: int, merge: int, out: int) -> None:
        super().__init__()
        self.ln_q = RMSNorm(patch, 1e-6)
        self.width = width = patch * merge**2
        self.mlp = nn.Sequential(Linear(width, width), nn.GELU(), Linear(width, out))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        merged: torch.Tensor = self.mlp(self.ln_q(states).view(-1, self.width))
        return merged


class Vision(nn.Module):
    """The parts of the vision tower; `vision_states` runs them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = Linear(1, 1, bias=False)
        self.patch_embed.proj.weight = _parameter(config.hidden_size, config.in_channels, *kernel)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config.hidden_size, config.spatial_merge_size, config.out_hidden_size)
        self.theta, self.width = float(config.rope_parameters["rope_theta"]), config.hidden_size // config.num_heads

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.patch_embed.proj.weight.dtype
        return dtype

    def rotary_pos_emb(self, states: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """[P, E] of patches at these positions, rows and columns [P, 2]."""
        angles = _angles(positions, self.theta, self.width // 2).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class Network(nn.Module):
    """The whole model over `config`, the content of config.json; its parameters are given by `load_state_dict(assign=True)`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = _namespace(config)
        self.model: Any = nn.Module()
        self.model.visual = Vision(self.config.vision_config)
        self.model.language_model = Language(self.config.text_config)
        self.lm_head = Linear(self.config.text_config.hidden_size, self.config.text_config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device


def vision_states(visual: Any, patches_NPC: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """The vision tower over N images of one grid of `high` x `wide` patches: [N, tokens, D]. `visual` may be of transformers.

    Patches come in Qwen's order, those that are merged side by side. Nothing is reordered for windowed attention: it alone asks
    where a patch lies, so windows are gathered there, those of one size as one batch.
    """
    count, per_image = patches_NPC.shape[:2]
    config, merge = visual.config, visual.config.spatial_merge_size
    rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    rows, columns = (side.view(high // merge, merge, wide // merge, merge).transpose(1, 2).flatten() for side in (rows, columns))
    positions = torch.stack((rows, columns), dim=-1).to(patches_NPC.device)
    side = config.window_size // config.patch_size // merge * merge
    windows = [index.to(patches_NPC.device) for index in _windows(rows, columns, side)]
    states = visual.patch_embed(patches_NPC.flatten(0, 1)).view(count, per_image, -1)
    cosine, sine = (part[None, :, None, :] for part in visual.rotary_pos_emb(states, positions))
    for number, block in enumerate(visual.blocks):
        whole = number in config.fullatt_block_indexes or (len(windows) == 1 and len(windows[0]) == 1)
        states = states + _vision_attention(block.attn, block.norm1(states), (cosine, sine), None if whole else windows)
        states = states + block.mlp(block.norm2(states))
    merged: torch.Tensor = visual.merger(states).view(count, per_image // merge**2, -1)
    return merged


def _windows(rows: torch.Tensor, columns: torch.Tensor, side: int) -> list[torch.Tensor]:
    """Which patches attend to each other within windows of `side` x `side` patches: for each size L of window, indices [n, L]."""
    across = int(columns.max()) // side + 1
    of_patch = rows // side * across + columns // side
    order, sizes = torch.argsort(of_patch, stable=True), torch.bincount(of_patch)
    by_size: dict[int, list[torch.Tensor]] = {}
    for window in torch.split(order, sizes.tolist()):
        by_size.setdefault(len(window), []).append(window)
    return [torch.stack(alike) for alike in by_size.values()]


def _vision_attention(
    attention: Any, states_NPD: torch.Tensor, rotation: Rotation, windows: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    count, length, _ = states_NPD.shape
    query, key, value = attention.qkv(states_NPD).view(count, length, 3, attention.num_heads, -1).unbind(2)
    query, key = (_rotated(part, rotation).to(value.dtype) for part in (query, key))
    if windows is None:
        mixed = _attend(query, key, value, attention.scaling)
    else:
        mixed = torch.empty_like(query)
        for index in windows:
            here = [part[:, index].flatten(0, 1) for part in (query, key, value)]
            mixed[:, index] = _attend(here[0], here[1], here[2], attention.scaling).view(count, *index.shape, *query.shape[2:])
    projected: torch.Tensor = attention.proj(mixed.reshape(count, length, -1))
    return projected


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of all to all: [N, P, H, E] to the same."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def _angles(positions: torch.Tensor, theta: float, width: int) -> torch.Tensor:
    """The angles of a rotary embedding of `width`: positions [...] to [..., width / 2]."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    return positions[..., None].float() * (1.0 / theta ** (steps / width))


def _rotated(part: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    first, second = part.chunk(2, dim=-1)
    return part * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]


def _causal(mask: torch.Tensor, new: int) -> torch.Tensor:
    """Whether each of the last `new` tokens of a mask [B, K] may attend to each: [B, 1, new, K]. Padding attends to itself."""
    length = mask.shape[1]
    if new == 1:
        return mask.bool()[:, None, None, :]
    before = torch.ones(new, length, dtype=torch.bool, device=mask.device).tril(length - new)
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)[length - new :]
    return (before & mask.bool()[:, None, None, :]) | itself


def side_by_side(segments_BT: torch.Tensor) -> torch.Tensor:
    """Which token may attend to which, [B, 1, T, T]: to earlier ones of its own segment and of segment 0. Padding to itself."""
    reader, read, length = segments_BT[:, :, None], segments_BT[:, None, :], segments_BT.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (before & ((reader == read) | (read == 0)))[:, None]


class InferenceTokenizer:
    """A tokenizer.json by the library `tokenizers`, with the part of transformers' interface that TraceIR uses."""

    unk_token_id: Final = None

    def __init__(self, file: Path) -> None:
        self.backend_tokenizer = Tokenizer.from_file(str(file))
        self.convert_tokens_to_ids = self.backend_tokenizer.token_to_id
        self.convert_ids_to_tokens = self.backend_tokenizer.id_to_token

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: number for number, token in self.backend_tokenizer.get_added_tokens_decoder().items()}


def fits(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json asks for nothing that `Network` lacks."""
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    rope = text.get("rope_parameters") or {}
    return bool(
        config.get("model_type") == "qwen2_5_vl"
        and "quantization_config" not in config
        and rope.get("rope_type") == "default" and "mrope_section" in rope and "rope_theta" in rope
        and not text.get("use_sliding_window") and set(text.get("layer_types", ())) <= {"full_attention"}
        and text.get("hidden_act") == vision.get("hidden_act") == "silu"
        and (vision.get("rope_parameters") or {}).get("rope_type") == "axial"
    )  # fmt: skip


def read_network(folder: Path, dtype: torch.dtype) -> Network:
    """The network of a checkpoint folder on the CPU, in evaluation mode; ModelError where its weights are not what it needs."""
    try:
        network = Network(json.loads((folder / "config.json").read_text()))
        weights: dict[str, torch.Tensor] = {}
        for file in weight_files(folder):
            weights |= {_own_name(name): value.to(dtype) for name, value in load_file(file).items()}
        weights.setdefault("lm_head.weight", weights["model.language_model.embed_tokens.weight"])
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load {folder}: {error}; copy the checkpoint again") from error
    return network.eval().requires_grad_(False)


def _own_name(name: str) -> str:
    """The name of a tensor here, from the one in published files (`visual.`, `model.layers.`) or transformers' newer one."""
    if name.startswith(("lm_head.", "model.visual.", "model.language_model.")):
        return name
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def _namespace(config: Mapping[str, Any]) -> Any:
    """Attributes for keys, also of the configurations within; all else, rope_parameters too, stays as it is."""
    inner = {name: _namespace(value) if name in ("text_config", "vision_config") else value for name, value in config.items()}
    return SimpleNamespace(**inner)


def _parameter(*shape: int) -> nn.Parameter:
    """A parameter without memory, which the loaded one replaces."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
