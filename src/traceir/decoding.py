"""Prefill, route, write and pool, in steps small enough that rows may join and leave between them.

The decoding loop is our own because plain `generate` keeps finished rows to the end and every layer of every step in memory.
Greedy and deterministic; a batch of n equals n singles up to floating-point rounding.
Shapes: B rows, T cached tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn import functional

from traceir.batch import Layout
from traceir.forward import TraceModel
from traceir.items import Encoding, Ended, Route, TakenRoute, Vector
from traceir.network import Cache
from traceir.prompts import TURN_END

RECURRENT: Final = ("conv_states", "recurrent_states")
"""The recurrent states of a linear-attention layer in transformers' cache: dictionaries of [B, ...] without a time axis."""
TRIM: Final = 64
"""Columns that no row of a batch reads any more are cut off once there are so many."""


@dataclass(slots=True)
class DecodeRow:
    """One query that is still writing: its number with the caller, what it wrote, the M-RoPE position of its first written token,
    and the vector read so far where it writes on behind its embedding token."""

    number: int
    probability: float
    start: int
    written: list[int] = field(default_factory=list)
    vector: Vector | None = None


@dataclass(slots=True)
class DecodeBatch:
    """Rows that decode together over one cache: mask [B, T] over the cached tokens, `next_B` the tokens to feed."""

    rows: list[DecodeRow]
    cache: Cache
    mask_BT: torch.Tensor
    next_B: torch.Tensor


Finished = list[tuple[int, Encoding]]
"""Numbers of rows, and their encodings."""


class Decoder:
    """The steps of encoding over one TraceModel; rows bear numbers of the caller.

    `budget` is the most tokens a row may write. `threshold`, if given, bypasses reasoning wherever P(`<|emb|>`) at the first
    step reaches it, instead of asking for the arg-max. `dim`: components that are kept of a vector. A DecodeBatch belongs to one
    thread at a time.
    """

    def __init__(self, model: TraceModel, budget: int, threshold: float | None, dim: int | None = None) -> None:
        self.model, self.budget, self.threshold, self.dim = model, budget, threshold, dim
        profile = model.settings.profile
        self.writes_on = profile is not None and profile.writes_on
        self.at_token = model.settings.pooling_position == "at_token"

    @torch.inference_mode()
    def prefill_direct(self, numbers: Sequence[int], layouts: Sequence[Layout], *, probability: Sequence[bool]) -> Finished:
        """Rows that end where they are pooled (Processor.forced); their P(`<|emb|>`) where asked for, else 1."""
        batch = self.model.processor.collate(layouts).to(self.model.device)
        hidden_BTD = self.model.hidden(batch)
        vectors = self._unit(hidden_BTD[torch.arange(len(layouts), device=hidden_BTD.device), batch.pooling_index])
        known = [1.0] * len(layouts)
        if asked := [row for row, wanted in enumerate(probability) if wanted]:
            predicting = batch.pooling_index - 1 if self.at_token else batch.pooling_index
            probability_B = self._emb_probability(self.model.logits(hidden_BTD[asked, predicting[asked]]))
            for row, value in zip(asked, probability_B.tolist(), strict=True):
                known[row] = value
        return [(number, _direct(vectors[row], known[row])) for row, number in enumerate(numbers)]

    @torch.inference_mode()
    def prefill(self, numbers: Sequence[int], layouts: Sequence[Layout], route: Route) -> tuple[Finished, DecodeBatch | None]:
        """Encodings of the rows that bypass, and the others as a batch that is ready to write.

        Under `at_token` every row is fed its first token, those that bypass `<|emb|>` itself.
        """
        batch = self.model.processor.collate(layouts).to(self.model.device)
        cache = self.model.new_cache()
        state_BD = self.model.hidden(batch, cache)[:, -1]
        logits_BV = self.model.logits(state_BD)
        probability_B = self._emb_probability(logits_BV)
        emb = self.model.processor.emb_id
        if route == "reason":
            bypass_B = torch.zeros_like(probability_B, dtype=torch.bool)
        elif self.threshold is not None:
            bypass_B = probability_B >= self.threshold
        else:
            bypass_B = logits_BV.argmax(dim=-1) == emb
        logits_BV[~bypass_B, emb] = float("-inf")
        logits_BV[bypass_B, emb] = float("inf")
        probability = probability_B.tolist()
        vectors = self._unit(state_BD)
        done = [] if self.at_token else torch.nonzero(bypass_B).flatten().tolist()
        finished = [(numbers[row], _direct(vectors[row], probability[row])) for row in done]
        keep = torch.nonzero(~bypass_B | self.at_token).flatten()
        if not len(keep):
            return finished, None
        if len(keep) < len(layouts):
            cache.reorder_cache(keep)
        rows = [DecodeRow(numbers[row], probability[row], int(layouts[row].positions.max()) + 1) for row in keep.tolist()]
        return finished, DecodeBatch(rows, cache, batch.mask[keep], logits_BV[keep].argmax(dim=-1))

    @torch.inference_mode()
    def step(self, batch: DecodeBatch) -> Finished:
        """One token for every row; those that are done leave the batch.

        A row is pooled at the state that predicts `<|emb|>`, under `at_token` at that of `<|emb|>` itself. It ends there, unless
        a profile has it write on, or earlier with the chat turn or its token budget.
        """
        emb, device = self.model.processor.emb_id, batch.mask_BT.device
        position_B = torch.tensor([row.start + len(row.written) for row in batch.rows], device=device)
        batch.mask_BT = functional.pad(batch.mask_BT, (0, 1), value=1)
        state_BD = self.model.step(batch.next_B, position_B, batch.mask_BT, batch.cache)
        chosen_B = self.model.logits(state_BD).argmax(dim=-1)
        fed, chosen = batch.next_B.tolist(), chosen_B.tolist()
        pooled = [index for index, token in enumerate(fed if self.at_token else chosen) if token == emb]
        for index, vector in zip(pooled, self._unit(state_BD[pooled]) if pooled else (), strict=True):
            batch.rows[index].vector = vector.copy()
        live: list[int] = []
        finished: Finished = []
        for index, row in enumerate(batch.rows):
            row.written.append(fed[index])
            if self._goes_on(row, chosen[index]):
                live.append(index)
            else:
                finished.append((row.number, self._encoding(batch, index, chosen[index], state_BD)))
        batch.next_B = chosen_B
        if len(live) < len(batch.rows):
            keep_rows(batch, live)
        return finished

    def _goes_on(self, row: DecodeRow, chosen: int) -> bool:
        """Whether a row that has chosen its next token writes it; `<|emb|>` itself is read whatever the budget."""
        if row.vector is not None and not self.writes_on:
            return False
        if row.vector is None and self.at_token and chosen == self.model.processor.emb_id:
            return True
        return len(row.written) < self.budget and chosen != self.model.processor.special[TURN_END]

    def _encoding(self, batch: DecodeBatch, index: int, chosen: int, state_BD: torch.Tensor) -> Encoding:
        row, closing = batch.rows[index], self.model.settings.closing
        vector = row.vector
        ended: Ended = None
        if vector is None:
            ended = "turn" if chosen == self.model.processor.special[TURN_END] else "budget"
            vector = self._close(batch, index, closing) if closing else self._unit(state_BD[index : index + 1])[0]
        written = [token for token in row.written if token != self.model.processor.emb_id]
        taken: TakenRoute = "reason" if written else "direct"
        return Encoding(vector, taken, self.text_of(row), len(written), row.probability, ended is not None, ended=ended)

    def _close(self, batch: DecodeBatch, index: int, closing: str) -> Vector:
        """The row stopped short of `<|emb|>`: feeds the trained closing text to it alone and reads the state that follows."""
        row, cache = batch.rows[index], copy(batch.cache)
        cache.layers = [copy(layer) for layer in batch.cache.layers]
        for layer in filter(_recurs, cache.layers):
            for name in RECURRENT:
                setattr(layer, name, dict(getattr(layer, name)))
        cache.reorder_cache(torch.tensor([index]))
        mask_BT, device = batch.mask_BT[index : index + 1], batch.mask_BT.device
        state_BD = torch.empty(0)
        for position, token in enumerate(self.model.processor.plain_ids(closing), start=row.start + len(row.written)):
            mask_BT = functional.pad(mask_BT, (0, 1), value=1)
            fed_B, position_B = torch.tensor([token], device=device), torch.tensor([position], device=device)
            state_BD = self.model.step(fed_B, position_B, mask_BT, cache)
        vector: Vector = self._unit(state_BD)[0]
        return vector

    def text_of(self, row: DecodeRow) -> str:
        """What a row has written so far."""
        return self.model.processor.decode([token for token in row.written if token != self.model.processor.emb_id])

    def _emb_probability(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits_BV.float(), dim=-1)[:, self.model.processor.emb_id]

    def _unit(self, state_BD: torch.Tensor) -> Vector:
        """Rows of unit length [B, D], or [B, dim]; copy a row to keep it, since a view keeps all rows in memory."""
        vectors: Vector = functional.normalize(state_BD[:, : self.dim].float(), dim=-1).cpu().numpy()
        return vectors


@torch.inference_mode()
def merge_batches(batches: Sequence[DecodeBatch]) -> DecodeBatch:
    """One batch of all rows, in the cache of the first; the others are used up.

    Keys and values are padded on the left to the longest, where the mask hides them. A recurrent state (Qwen3.5's) stands for all
    that its row has read and has no columns: rows of any lengths lie side by side as they are.
    """
    if len(batches) == 1:
        return batches[0]
    length = max(batch.mask_BT.shape[1] for batch in batches)
    merged = batches[0].cache
    for number, layer in enumerate(merged.layers):
        layers = [batch.cache.layers[number] for batch in batches]
        if not _recurs(layer):
            for name in ("keys", "values"):
                parts = (getattr(part, name) for part in layers)
                setattr(layer, name, torch.cat([functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in parts]))
        for name in RECURRENT if _recurs(layer) else ():
            states = getattr(layer, name)
            states |= {key: torch.cat([getattr(part, name)[key] for part in layers]) for key in states}
    masks = (functional.pad(batch.mask_BT, (length - batch.mask_BT.shape[1], 0)) for batch in batches)
    rows = [row for batch in batches for row in batch.rows]
    return DecodeBatch(rows, merged, torch.cat([*masks]), torch.cat([batch.next_B for batch in batches]))


@torch.inference_mode()
def keep_rows(batch: DecodeBatch, live: Sequence[int]) -> None:
    """Leaves these rows alone in a batch, in their order."""
    kept = torch.tensor(live, dtype=torch.long, device=batch.mask_BT.device)
    batch.rows = [batch.rows[index] for index in live]
    if live:
        batch.cache.reorder_cache(kept)
    batch.mask_BT, batch.next_B = batch.mask_BT[kept], batch.next_B[kept]


@torch.inference_mode()
def trim(batch: DecodeBatch) -> None:
    """Cuts off the columns on the left that no row reads, so that a batch that rows keep joining does not grow for ever."""
    unread = int(batch.mask_BT.any(dim=0).to(torch.int).argmax()) if batch.rows else 0
    if unread < TRIM:
        return
    for layer in batch.cache.layers:
        if not _recurs(layer):
            layer.keys, layer.values = layer.keys[:, :, unread:].contiguous(), layer.values[:, :, unread:].contiguous()
    batch.mask_BT = batch.mask_BT[:, unread:]


def _recurs(layer: Any) -> bool:
    """Whether a layer of a cache holds recurrent states, in dictionaries, and no keys and values."""
    return hasattr(layer, RECURRENT[0])


def _direct(vector: Vector, probability: float) -> Encoding:
    return Encoding(vector.copy(), "direct", "", 0, probability, False)
