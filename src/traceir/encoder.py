"""The adaptive encoder: prefill once, route on the arg-max, let only complex queries write, read out before `<|emb|>`.

The decoding loop is our own because plain `generate` keeps finished rows to the end and every layer of every step in memory.
Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from traceir.batch import Batch, Layout
from traceir.errors import InputError
from traceir.items import ROUTES, Encoding, Item, Query, Route, Vector
from traceir.model import TraceModel, load
from traceir.prompts import TURN_END, Prompt


@dataclass(slots=True)
class _Row:
    """One query that is still writing: its place in the call, what it wrote, and where its next token goes."""

    number: int
    probability: float
    written: list[int] = field(default_factory=list)
    place: int = 0


@dataclass(slots=True)
class _Wave:
    """Rows that decode together over one cache: mask [B, T] over the cached tokens, `next_B` the tokens to feed."""

    rows: list[_Row]
    cache: DynamicCache
    mask_BT: torch.Tensor
    next_B: torch.Tensor


class Encoder:
    """Queries and items to Encodings with one TraceModel.

    `token_budget` bounds the padded tokens of one prefill batch, `wave_rows` the rows that decode together, `batch_rows` the
    rows of a prefill. `threshold`, if given, bypasses reasoning wherever P(`<|emb|>`) at the first step reaches it, instead of
    asking for the arg-max: lower is faster, 1 never bypasses. Greedy and deterministic; a batch of n equals n singles up to
    floating-point rounding. Thread-safe.
    """

    def __init__(
        self,
        model: TraceModel,
        *,
        token_budget: int = 8192,
        batch_rows: int = 64,
        wave_rows: int = 128,
        max_reasoning_tokens: int | None = None,
        threshold: float | None = None,
    ) -> None:
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InputError(f"threshold {threshold} is not a probability; give a value in [0, 1]")
        self.model = model
        self.token_budget, self.batch_rows, self.wave_rows = token_budget, batch_rows, wave_rows
        self.budget = max_reasoning_tokens or model.settings.max_reasoning_tokens
        self.threshold = threshold

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str = "cpu", **options: Any) -> Encoder:
        """An Encoder over a checkpoint directory or hub id."""
        return cls(load(source, device=device), **options)

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def prompt_version(self) -> str:
        """Prompt version, and the read-out where it is not the usual one, or the profile: they change every vector."""
        version, read_out = self.model.settings.prompt_version, self.model.settings.read_out
        if self.model.settings.profile is not None:
            return self.model.settings.profile.version
        return version if read_out == "before_token" else f"{version}, read {read_out}"

    @property
    def width(self) -> int:
        return self.model.width

    @property
    def vector_settings(self) -> dict[str, str | int | float | None]:
        """What else decides a vector: budgets of text and pictures, the closing text, the type of the weights."""
        image, settings = self.model.processor.image, self.model.settings
        return {
            "max_text_tokens": settings.max_text_tokens,
            "closing": settings.closing,
            "min_pixels": image.min_pixels,
            "max_pixels": image.max_pixels,
            "dtype": str(next(self.model.network.parameters()).dtype),
        }

    def encode_items(self, items: Sequence[Item], *, progress: bool = False) -> list[Encoding]:
        """Candidates: one prefill each, never any reasoning (paper, section 1, asymmetry), unless a profile lets them write."""
        route: Route = "auto" if self.model.writes("candidate") else "direct"
        prompts = [self.model.prompt(item, direct=route == "direct") for item in items]
        return self._encode(prompts, route, progress, keep_probability=False)

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        """Queries by the given route: `auto` lets the model decide, `reason` and `direct` force it. Order is kept."""
        if route not in ROUTES:
            raise InputError(f"route {route!r} is unknown; choose one of {', '.join(ROUTES)}")
        if not self.model.writes("query"):
            route = "direct"  # there is no token for the model to predict
        prompts = [self.model.prompt(query, direct=route == "direct") for query in queries]
        return self._encode(prompts, route, progress, keep_probability=not any(prompt.closed for prompt in prompts))

    @torch.inference_mode()
    def _encode(self, prompts: Sequence[Prompt], route: Route, progress: bool, *, keep_probability: bool) -> list[Encoding]:
        lay_out = self.model.processor.forced if route == "direct" else self.model.processor.lay_out
        layouts = [lay_out(prompt) for prompt in prompts]
        done: dict[int, Encoding] = {}
        waiting: list[_Wave] = []
        with tqdm(total=len(layouts), desc="encoding", disable=not progress, mininterval=2.0) as bar:

            def finish(number: int, encoding: Encoding) -> None:
                done[number] = encoding
                bar.update()

            for numbers in self._chunks(layouts):
                batch = self.model.processor.collate([layouts[n] for n in numbers]).to(self.model.device)
                if route == "direct":
                    self._prefill_direct(numbers, batch, finish, keep_probability)
                    continue
                wave = self._prefill(numbers, [layouts[n] for n in numbers], batch, route, finish)
                if wave is not None:
                    waiting.append(wave)
                if sum(len(wave.rows) for wave in waiting) >= self.wave_rows:
                    self._decode(merge_waves(waiting), finish)
                    waiting = []
            if waiting:
                self._decode(merge_waves(waiting), finish)
        return [done[number] for number in range(len(layouts))]

    def _chunks(self, layouts: Sequence[Layout]) -> Iterator[list[int]]:
        """Row numbers, sorted by length, in chunks of at most `batch_rows` rows and `token_budget` padded tokens."""
        chunk: list[int] = []
        for number in sorted(range(len(layouts)), key=lambda n: (len(layouts[n]), n)):
            if chunk and (len(chunk) >= self.batch_rows or (len(chunk) + 1) * len(layouts[number]) > self.token_budget):
                yield chunk
                chunk = []
            chunk.append(number)
        if chunk:
            yield chunk

    def _prefill_direct(
        self, numbers: list[int], batch: Batch, finish: Callable[[int, Encoding], None], keep_probability: bool
    ) -> None:
        hidden_BTD = self.model.hidden(batch)
        rows = torch.arange(len(numbers), device=hidden_BTD.device)
        state_BD = hidden_BTD[rows, batch.readout]
        predicting = batch.readout - 1 if self.model.settings.read_out == "at_token" else batch.readout
        probability_B = self._emb_probability(self.model.logits(hidden_BTD[rows, predicting])) if keep_probability else None
        for row, vector in enumerate(_unit(state_BD)):
            chance = float(probability_B[row]) if probability_B is not None else 1.0
            finish(numbers[row], Encoding(vector, "direct", "", 0, chance, False))

    def _prefill(
        self,
        numbers: list[int],
        layouts: Sequence[Layout],
        batch: Batch,
        route: Route,
        finish: Callable[[int, Encoding], None],
    ) -> _Wave | None:
        """Finishes the rows that bypass and returns the others, ready to decode."""
        cache = DynamicCache()
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
        for row in torch.nonzero(bypass_B).flatten().tolist() if not at_token else ():
            finish(numbers[row], Encoding(vectors[row], "direct", "", 0, float(probability_B[row]), False))
        keep = torch.nonzero(~bypass_B | at_token).flatten()
        if not len(keep):
            return None
        if len(keep) < len(numbers):
            cache.batch_select_indices(keep)
        rows = [
            _Row(numbers[row], float(probability_B[row]), place=int(layouts[row].positions.max()) + 1) for row in keep.tolist()
        ]
        return _Wave(rows, cache, batch.mask[keep], logits_BV[keep].argmax(dim=-1))

    def _decode(self, wave: _Wave, finish: Callable[[int, Encoding], None]) -> None:
        """Writes greedily until every row has read out; rows that end leave the batch."""
        emb, turn_end = self.model.processor.emb_id, self.model.processor.special[TURN_END]
        at_token = self.model.settings.read_out == "at_token"
        while wave.rows:
            places = [row.place + len(row.written) for row in wave.rows]
            place_B = torch.tensor(places, device=wave.mask_BT.device)
            wave.mask_BT = functional.pad(wave.mask_BT, (0, 1), value=1)
            state_BD = self.model.step(wave.next_B, place_B, wave.mask_BT, wave.cache)
            chosen_B = self.model.logits(state_BD).argmax(dim=-1)
            vectors: Vector | None = None
            live: list[int] = []
            for number, (row, fed, chosen) in enumerate(zip(wave.rows, wave.next_B.tolist(), chosen_B.tolist(), strict=True)):
                row.written.append(fed)
                read_now = fed == emb if at_token else chosen == emb
                spent = len(row.written) >= self.budget or chosen == turn_end
                if not read_now and (not spent or (at_token and chosen == emb)):
                    live.append(number)
                    continue
                if read_now or not self._closing():
                    vectors = _unit(state_BD) if vectors is None else vectors
                    vector = vectors[number]
                else:
                    vector = self._close(wave, number)
                finish(row.number, self._encoding(row, vector, truncated=not read_now))
            wave.next_B = chosen_B
            if len(live) < len(wave.rows):
                _keep(wave, live)

    def _closing(self) -> list[int]:
        return list(self.model.processor.plain_ids(self.model.settings.closing)) if self.model.settings.closing else []

    def _close(self, wave: _Wave, number: int) -> Vector:
        """The budget is spent: feeds the trained closing text to one row and reads the state that follows it."""
        cache, mask_BT = _copy_row(wave.cache, number), wave.mask_BT[number : number + 1]
        row, state_BD = wave.rows[number], None
        for offset, token in enumerate(self._closing()):
            mask_BT = functional.pad(mask_BT, (0, 1), value=1)
            place = torch.tensor([row.place + len(row.written) + offset], device=mask_BT.device)
            state_BD = self.model.step(torch.tensor([token], device=mask_BT.device), place, mask_BT, cache)
        assert state_BD is not None
        vector: Vector = _unit(state_BD)[0]
        return vector

    def _encoding(self, row: _Row, vector: Vector, *, truncated: bool) -> Encoding:
        written = [token for token in row.written if token != self.model.processor.emb_id]
        if not written:
            return Encoding(vector, "direct", "", 0, row.probability, truncated)
        text = self.model.processor.decode(written)
        return Encoding(vector, "reason", text, len(written), row.probability, truncated)

    def _emb_probability(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits_BV.float(), dim=-1)[:, self.model.processor.emb_id]


def merge_waves(waves: Sequence[_Wave]) -> _Wave:
    """One wave of all rows: caches are padded on the left to the longest, where the mask hides them."""
    if len(waves) == 1:
        return waves[0]
    length = max(wave.mask_BT.shape[1] for wave in waves)
    merged = DynamicCache()
    for layer in range(len(waves[0].cache.layers)):
        keys, values = (
            torch.cat([_left_pad(getattr(wave.cache.layers[layer], side), length) for wave in waves])
            for side in ("keys", "values")
        )
        merged.update(keys, values, layer)
    return _Wave(
        [row for wave in waves for row in wave.rows],
        merged,
        torch.cat([functional.pad(wave.mask_BT, (length - wave.mask_BT.shape[1], 0)) for wave in waves]),
        torch.cat([wave.next_B for wave in waves]),
    )


def _left_pad(part_BHTD: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(part_BHTD, (0, 0, length - part_BHTD.shape[2], 0))


def _keep(wave: _Wave, live: list[int]) -> None:
    kept = torch.tensor(live, dtype=torch.long, device=wave.mask_BT.device)
    wave.rows = [wave.rows[number] for number in live]
    if live:
        wave.cache.batch_select_indices(kept)
    wave.mask_BT, wave.next_B = wave.mask_BT[kept], wave.next_B[kept]


def _copy_row(cache: DynamicCache, number: int) -> DynamicCache:
    single = DynamicCache()
    for layer, kept in enumerate(cache.layers):
        single.update(kept.keys[number : number + 1], kept.values[number : number + 1], layer)
    return single


def _unit(state_BD: torch.Tensor) -> Vector:
    vectors: Vector = functional.normalize(state_BD.float(), dim=-1).cpu().numpy()
    return vectors
