"""One loaded checkpoint, and the two forward passes that everything else is built on: a prompt's states, and one more token.

Shapes: B rows, T tokens, D hidden width, V vocabulary, N images, P patches, C features of a patch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from traceir.batch import Batch, ImageBudget, Processor, by_shape
from traceir.errors import ModelError
from traceir.items import Item, Query
from traceir.network import Cache, Network, side_by_side, vision_states
from traceir.prompts import EMB, Prompt, Role, render_candidate, render_query
from traceir.settings import TraceSettings


class TraceModel:
    """A network, its Processor and its TraceSettings.

    The network is transformers' or, for inference alone, network.py's. The forward passes are pure: position ids come from the
    batch, so nothing is kept on the module between calls and threads may share one TraceModel.
    """

    def __init__(self, network: Any, processor: Processor, settings: TraceSettings) -> None:
        self.network, self.processor, self.settings = network, processor, settings

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

    @property
    def text_limit(self) -> int | None:
        """The most tokens of a text that are read; None under a profile, which may count them otherwise."""
        return None if self.settings.profile is not None else self.processor.max_text_tokens

    def prompt(self, content: Query | Item, *, direct: bool = False) -> Prompt:
        """What the model reads for a query or an item; `direct` where it shall write nothing (profiles may put that in words)."""
        if self.settings.profile is not None:
            return self.settings.profile.render(content, direct=direct)
        if isinstance(content, Query):
            return render_query(content, self.settings.prompt_version)
        return render_candidate(content, self.settings.prompt_version)

    def writes(self, role: Role) -> bool:
        """Whether this side may write before its embedding: queries under TRACE, else those that the profile names."""
        if self.settings.profile is not None:
            return role in self.settings.profile.writes
        return (role == "query" or self.settings.candidates_write) and self.settings.pooling_position != "last"

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
        """Last-layer states after the final norm, [B, T, D]; fills `cache` if given.

        Over a cache that holds tokens already, the batch's mask covers them too, [B, K].
        """
        embedded_BTD = self.network.model.language_model.embed_tokens(batch.ids)
        deeper: dict[str, Any] = {}
        if batch.patches is not None and batch.grids is not None:
            patches = self.processor.normalise(batch.patches) if batch.patches.dtype == torch.uint8 else batch.patches
            image_BT = batch.ids == self.network.config.image_token_id
            features, layers = self.image_features(patches, batch.grids)
            if layers:
                deeper = {"visual_pos_masks": image_BT, "deepstack_visual_embeds": layers}
            embedded_BTD = embedded_BTD.masked_scatter(image_BT.unsqueeze(-1), features.to(embedded_BTD.dtype))
        mask = None if batch.mask.shape == batch.ids.shape and bool(batch.mask.all()) else batch.mask
        if batch.segments is not None:
            mask = side_by_side(batch.segments)
        return self._states(embedded_BTD, mask, batch.positions, cache, **deeper)

    def step(self, token_B: torch.Tensor, position_B: torch.Tensor, mask_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One decoding step: tokens [B] at M-RoPE positions [B] over a filled cache; states [B, D]."""
        embedded_BTD = self.network.model.language_model.embed_tokens(token_B[:, None])
        return self._states(embedded_BTD, mask_BT, position_B.view(1, -1, 1).expand(3, -1, 1), cache)[:, -1]

    def _states(
        self, embedded_BTD: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Cache | None, **deeper: Any
    ) -> torch.Tensor:
        states: torch.Tensor = self.network.model.language_model(
            inputs_embeds=embedded_BTD,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            cache=cache,
            **deeper,
        ).last_hidden_state
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token scores for states [..., D]: [..., V]."""
        scores: torch.Tensor = self.network.lm_head(hidden)
        return scores

    def image_features(self, patches_PC: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Merged vision tokens of N images, concatenated: [sum of tokens, D]; and what the first layers of a Qwen3-VL add to
        the same positions (DeepStack), nothing for the others.

        Images of one grid run as one batch; the stock class, which Qwen2.5-VL's relatives take, walks image by image. Both
        give the same numbers (tests/test_model.py).
        """
        visual = self.network.model.visual
        patches_PC = patches_PC.to(visual.dtype)
        shapes = [tuple(int(side) for side in grid) for grid in grids.tolist()]
        if self.network.config.model_type != "qwen2_5_vl" or any(time != 1 for time, _, _ in shapes):
            output = self.network.model.get_image_features(patches_PC, grids, return_dict=True)
            layers = getattr(output, "deepstack_features", None) or ()
            return torch.cat(output.pooler_output), [torch.cat(layer) for layer in layers]
        images = torch.split(patches_PC, [high * wide for _, high, wide in shapes])

        def features(numbers: list[int]) -> torch.Tensor:
            _, high, wide = shapes[numbers[0]]
            return vision_states(visual, torch.stack([images[number] for number in numbers]), high, wide)

        return by_shape(shapes, features), []


def wrap(network: Any, tokenizer: Any, settings: TraceSettings, image: ImageBudget) -> TraceModel:
    """A TraceModel around a network in memory; swaps the patch convolution for an equal matrix product."""
    patch_embed, profile = network.model.visual.patch_embed, settings.profile
    projection = patch_embed.proj

    def forward(patches: torch.Tensor) -> torch.Tensor:
        """Stride equals kernel, so the 3-D convolution is the same sum, slower on CPUs."""
        return functional.linear(patches.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)

    patch_embed.forward = forward
    if profile is not None:
        if profile.add_token and profile.token is not None:
            add_token(network, tokenizer, profile.token, trained=True)
        least, most = profile.min_pixels or image.min_pixels, profile.max_pixels or image.max_pixels
        image = replace(image, min_pixels=least, max_pixels=most, resize=profile.resize)
    processor = Processor(
        tokenizer,
        image,
        pooling_position=settings.pooling_position,
        max_text_tokens=settings.max_text_tokens,
        emb_token=EMB if profile is None else profile.token,
        rope="mrope" if profile is None else profile.rope,
    )
    return TraceModel(network, processor, settings)


def add_token(network: Any, tokenizer: Any, token: str, *, trained: bool = False) -> int:
    """Makes `token` one of model and tokenizer and returns its id; a no-op where it is there already.

    Qwen's embedding matrix is padded beyond its tokenizer, so the new id usually has a row; the matrix grows only if it has
    none and is never shrunk. A new row starts as the mean of the real rows, in input and output alike (they learn in training).
    `trained`: its row was trained though the tokenizer was not saved with it; ModelError where there is none.
    """
    known = tokenizer.convert_tokens_to_ids(token)
    if known is not None and known != tokenizer.unk_token_id:
        return int(known)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    new, rows = int(tokenizer.convert_tokens_to_ids(token)), network.get_input_embeddings().weight.shape[0]
    if trained and new >= rows:
        raise ModelError(f"{token} would be token {new}, and the checkpoint has {rows} rows; is --profile the right one?")
    if trained:
        return new
    if new >= rows:
        network.resize_token_embeddings(new + 1, mean_resizing=False)
    with torch.no_grad():
        for matrix in {network.get_input_embeddings().weight, network.get_output_embeddings().weight}:
            matrix[new] = matrix[:new].mean(dim=0)
    return new
