"""Prefill, route, write and read out, in steps small enough that rows may join and leave between them.

The decoding loop is our own because plain `generate` keeps finished rows to the end and every layer of every step in memory.
Greedy and deterministic; a batch of n equals n singles up to floating-point rounding. Shapes: B rows, T tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn import functional

from traceir.batch import Layout
from traceir.items import Encoding, Ended, Road, Route, Vector
from traceir.model import TraceModel
from traceir.network import Cache
from traceir.prompts import TURN_END

RECURRENT: Final = ("conv_states", "recurrent_states")
"""What a linear-attention layer of transformers' cache keeps of what was read: by number, [B, ...] without an axis of time."""
TRIM: Final = 64
"""Columns that no row of a wave reads any more are cut off once there are so many."""


@dataclass(slots=True)
class Row:
    """One query that is still writing: its number with the caller, what it wrote, where its next token goes, and the vector read
    so far where it writes on behind its embedding token."""

    number: int
    probability: float
    written: list[int] = field(default_factory=list)
    place: int = 0
    vector: Vector | None = None


@dataclass(slots=True)
class Wave:
    """Rows that decode together over one cache: mask [B, T] over the cached tokens, `next_B` the tokens to feed."""

    rows: list[Row]
    cache: Cache
    mask_BT: torch.Tensor
    next_B: torch.Tensor


Finished = list[tuple[int, Encoding]]
"""Numbers of rows, and what they read out."""


class Decoder:
    """The steps of encoding over one TraceModel; what a row is called is the caller's business.

    `budget` is the most tokens a row may write. `threshold`, if given, bypasses reasoning wherever P(`<|emb|>`) at the first
    step reaches it, instead of asking for the arg-max. Not to be called from two threads about one Wave.
    """

    def __init__(self, model: TraceModel, budget: int, threshold: float | None) -> None:
        self.model, self.budget, self.threshold = model, budget, threshold
        profile = model.settings.profile
        self.writes_on = profile is not None and profile.writes_on

    @torch.inference_mode()
    def prefill_direct(self, numbers: Sequence[int], layouts: Sequence[Layout], *, probability: Sequence[bool]) -> Finished:
        """Read-outs of rows that end in their own `<|emb|>` (Processor.forced); their P(`<|emb|>`) where asked for,
        else 1."""
        batch = self.model.processor.collate(layouts).to(self.model.device)
        hidden_BTD = self.model.hidden(batch)
        rows = torch.arange(len(layouts), device=hidden_BTD.device)
        state_BD = hidden_BTD[rows, batch.readout]
        predicting = batch.readout - 1 if self.model.settings.read_out == "at_token" else batch.readout
        asked = [row for row, wanted in enumerate(probability) if wanted]
        known = [1.0] * len(layouts)
        if asked:
            probability_B = self._emb_probability(self.model.logits(hidden_BTD[asked, predicting[asked]]))
            for row, one in zip(asked, probability_B.tolist(), strict=True):
                known[row] = one
        vectors = _unit(state_BD)
        return [(numbers[row], Encoding(vectors[row].copy(), "direct", "", 0, known[row], False)) for row in range(len(layouts))]

    @torch.inference_mode()
    def prefill(self, numbers: Sequence[int], layouts: Sequence[Layout], route: Route) -> tuple[Finished, Wave | None]:
        """Read-outs of the rows that bypass, and the others as a wave that is ready to write."""
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
        at_token = self.model.settings.read_out == "at_token"
        vectors = _unit(state_BD)
        done = [] if at_token else torch.nonzero(bypass_B).flatten().tolist()
        finished = [
            (numbers[row], Encoding(vectors[row].copy(), "direct", "", 0, float(probability_B[row]), False)) for row in done
        ]
        keep = torch.nonzero(~bypass_B | at_token).flatten()
        if not len(keep):
            return finished, None
        if len(keep) < len(layouts):
            cache.reorder_cache(keep)
        rows = [
            Row(numbers[row], float(probability_B[row]), place=int(layouts[row].positions.max()) + 1) for row in keep.tolist()
        ]
        return finished, Wave(rows, cache, batch.mask[keep], logits_BV[keep].argmax(dim=-1))

    @torch.inference_mode()
    def step(self, wave: Wave) -> Finished:
        """One token for every row; those that read out leave the wave."""
        emb, turn_end = self.model.processor.emb_id, self.model.processor.special[TURN_END]
        at_token = self.model.settings.read_out == "at_token"
        places = [row.place + len(row.written) for row in wave.rows]
        place_B = torch.tensor(places, device=wave.mask_BT.device)
        wave.mask_BT = functional.pad(wave.mask_BT, (0, 1), value=1)
        state_BD = self.model.step(wave.next_B, place_B, wave.mask_BT, wave.cache)
        chosen_B = self.model.logits(state_BD).argmax(dim=-1)
        vectors: Vector | None = None
        live: list[int] = []
        finished: Finished = []
        for number, (row, fed, chosen) in enumerate(zip(wave.rows, wave.next_B.tolist(), chosen_B.tolist(), strict=True)):
            row.written.append(fed)
            read_now = fed == emb if at_token else chosen == emb
            spent = len(row.written) >= self.budget or chosen == turn_end
            if read_now:
                vectors = _unit(state_BD) if vectors is None else vectors
                row.vector = vectors[number].copy()
            read = row.vector is not None
            if (self.writes_on or not read) and (not spent or (at_token and chosen == emb and not read)):
                live.append(number)
                continue
            ended: Ended = None if read else "turn" if chosen == turn_end else "budget"
            if row.vector is not None:
                vector = row.vector
            elif self._closing():
                vector = self._close(wave, number)
            else:
                vectors = _unit(state_BD) if vectors is None else vectors
                vector = vectors[number].copy()
            finished.append((row.number, self._encoding(row, vector, ended)))
        wave.next_B = chosen_B
        if len(live) < len(wave.rows):
            keep_rows(wave, live)
        return finished

    def text_of(self, row: Row) -> str:
        """What a row has written so far."""
        return self.model.processor.decode([token for token in row.written if token != self.model.processor.emb_id])

    def _closing(self) -> list[int]:
        return list(self.model.processor.plain_ids(self.model.settings.closing)) if self.model.settings.closing else []

    def _close(self, wave: Wave, number: int) -> Vector:
        """The row stopped short of `<|emb|>`: feeds the trained closing text to one row and reads the state that follows it."""
        cache, mask_BT = _copy_row(wave.cache, number), wave.mask_BT[number : number + 1]
        row, state_BD = wave.rows[number], None
        for offset, token in enumerate(self._closing()):
            mask_BT = functional.pad(mask_BT, (0, 1), value=1)
            place = torch.tensor([row.place + len(row.written) + offset], device=mask_BT.device)
            state_BD = self.model.step(torch.tensor([token], device=mask_BT.device), place, mask_BT, cache)
        assert state_BD is not None
        vector: Vector = _unit(state_BD)[0]
        return vector

    def _encoding(self, row: Row, vector: Vector, ended: Ended) -> Encoding:
        """`ended`: why it stopped, where it did so before `<|emb|>`."""
        written = [token for token in row.written if token != self.model.processor.emb_id]
        road: Road = "reason" if written else "direct"
        text = self.model.processor.decode(written)
        return Encoding(vector, road, text, len(written), row.probability, ended is not None, ended=ended)

    def _emb_probability(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits_BV.float(), dim=-1)[:, self.model.processor.emb_id]


@torch.inference_mode()
def merge_waves(waves: Sequence[Wave]) -> Wave:
    """One wave of all rows, in the cache of the first; the others are used up.

    Keys and values are padded on the left to the longest, where the mask hides them. A recurrent state (Qwen3.5's) stands for all
    that its row has read and has no columns: rows of any lengths lie side by side as they are.
    """
    if len(waves) == 1:
        return waves[0]
    length = max(wave.mask_BT.shape[1] for wave in waves)
    merged = waves[0].cache
    for number, layer in enumerate(merged.layers):
        alike = [wave.cache.layers[number] for wave in waves]
        if not _recurs(layer):
            layer.keys = torch.cat([_left_pad(one.keys, length) for one in alike])
            layer.values = torch.cat([_left_pad(one.values, length) for one in alike])
        for name in RECURRENT if _recurs(layer) else ():
            states = getattr(layer, name)
            states |= {place: torch.cat([getattr(one, name)[place] for one in alike]) for place in states}
    return Wave(
        [row for wave in waves for row in wave.rows],
        merged,
        torch.cat([functional.pad(wave.mask_BT, (length - wave.mask_BT.shape[1], 0)) for wave in waves]),
        torch.cat([wave.next_B for wave in waves]),
    )


@torch.inference_mode()
def keep_rows(wave: Wave, live: Sequence[int]) -> None:
    """Leaves these rows alone in a wave, in their order."""
    kept = torch.tensor(live, dtype=torch.long, device=wave.mask_BT.device)
    wave.rows = [wave.rows[number] for number in live]
    if live:
        wave.cache.reorder_cache(kept)
    wave.mask_BT, wave.next_B = wave.mask_BT[kept], wave.next_B[kept]


@torch.inference_mode()
def trim(wave: Wave) -> None:
    """Cuts off the columns on the left that no row reads, so that a wave that rows keep joining does not grow for ever."""
    if not wave.rows:
        return
    unread = int(wave.mask_BT.any(dim=0).to(torch.int).argmax())
    if unread < TRIM:
        return
    for layer in wave.cache.layers:
        if not _recurs(layer):
            layer.keys, layer.values = layer.keys[:, :, unread:].contiguous(), layer.values[:, :, unread:].contiguous()
    wave.mask_BT = wave.mask_BT[:, unread:]


def _left_pad(part_BHTD: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(part_BHTD, (0, 0, length - part_BHTD.shape[2], 0))


def _copy_row(cache: Cache, number: int) -> Cache:
    single = copy(cache)
    single.layers = [copy(layer) for layer in cache.layers]
    for layer in single.layers:
        for name in RECURRENT if _recurs(layer) else ():
            setattr(layer, name, dict(getattr(layer, name)))
    single.reorder_cache(torch.tensor([number]))
    return single


def _recurs(layer: Any) -> bool:
    """Whether a layer of a cache holds recurrent states, in dictionaries, and no keys and values."""
    return hasattr(layer, RECURRENT[0])


def _unit(state_BD: torch.Tensor) -> Vector:
    """Rows of unit length [B, D]; who keeps one copies it, or it keeps them all."""
    vectors: Vector = functional.normalize(state_BD.float(), dim=-1).cpu().numpy()
    return vectors
