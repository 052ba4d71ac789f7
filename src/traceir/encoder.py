"""The adaptive encoder: prefill once, route on the arg-max, let only complex queries write, pool before `<|emb|>`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from traceir.batch import Layout
from traceir.checkpoint import bundled_model, is_library
from traceir.decoding import DecodeBatch, Decoder, Finished, merge_batches
from traceir.errors import InputError, ModelError
from traceir.forward import TraceModel
from traceir.items import Encoding, Item, Query, Route, check_route
from traceir.model import load
from traceir.precision import bfloat16_on
from traceir.prompts import Prompt
from traceir.world import World

log = logging.getLogger(__name__)


class Encoder:
    """Queries and items to Encodings with one TraceModel.

    `token_budget` bounds the padded tokens of one prefill batch, `decode_rows` the rows that decode together, `batch_rows` the
    rows of a prefill. `threshold`, if given, bypasses reasoning wherever P(`<|emb|>`) at the first step reaches it, instead of
    asking for the arg-max: lower is faster, 1 never bypasses. `dim` keeps the first so many components of each vector, scaled to
    unit length again; InputError for a width that the checkpoint was not trained for. Greedy and deterministic; a batch of n
    equals n singles up to floating-point rounding. Thread-safe.
    """

    def __init__(
        self,
        model: TraceModel,
        *,
        token_budget: int = 8192,
        batch_rows: int = 64,
        decode_rows: int = 128,
        max_reasoning_tokens: int | None = None,
        threshold: float | None = None,
        dim: int | None = None,
    ) -> None:
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise InputError(f"threshold {threshold} is not a probability; give a value in [0, 1]")
        self.model, self.threshold = model, threshold
        self.dim = model.settings.checked_dim(dim, model.width)
        self.width = self.dim or model.width
        self.world: World | None = model.settings.world
        """The only things that the model knows; None for a model without such bounds."""
        self.token_budget, self.batch_rows, self.decode_rows = token_budget, batch_rows, decode_rows
        self.budget = max_reasoning_tokens or model.settings.max_reasoning_tokens
        half = next(model.network.parameters()).dtype == torch.bfloat16
        if half and (speed := bfloat16_on(str(model.device), model.width)).slow:
            log.warning("the weights are in bfloat16, which is slow here: %s; leave dtype at float32", speed.why)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, *, device: str = "cpu", **options: Any) -> Encoder:
        """An Encoder over a checkpoint directory or hub id; over the bundled miniature, which knows MiniBEIR alone, if None.

        Raises ModelError for a model of sentence-transformers, which `traceir.load_encoder` takes too.
        """
        name = str(source or bundled_model())
        if is_library(name):
            raise ModelError(f"{name} is a model of sentence-transformers; load it with traceir.load_encoder({name!r})")
        return cls(load(name, device=device, inference=True), **options)

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def prompt_version(self) -> str:
        return self.model.settings.vector_version(self.dim)

    @property
    def widths(self) -> tuple[int, ...]:
        """What its vectors may be cut to: those that the checkpoint was trained for."""
        return self.model.settings.widths(self.width)

    @property
    def vector_settings(self) -> dict[str, str | int | float | None]:
        """What else decides a vector: budgets of text and images, the closing text, the type of the weights."""
        image, settings = self.model.processor.image, self.model.settings
        return {
            "max_text_tokens": settings.max_text_tokens,
            "closing": settings.closing,
            "min_pixels": image.min_pixels,
            "max_pixels": image.max_pixels,
            "dtype": str(next(self.model.network.parameters()).dtype),
        }

    @property
    def run_settings(self) -> dict[str, str | int | float | None]:
        """What an evaluation says of how it was run."""
        return {"token_budget": self.token_budget, "threshold": self.threshold, "max_reasoning_tokens": self.budget}

    def as_written(self, text: str) -> str:
        """A text as the tokenizer gives it back, which is comparable with text the model wrote."""
        return self.model.processor.decode(self.model.processor.plain_ids(text))

    def encode_items(self, items: Sequence[Item], *, progress: bool = False) -> list[Encoding]:
        """Candidates: one prefill each, never any reasoning (paper, section 1, asymmetry), unless a profile lets them write."""
        route: Route = "auto" if self.model.writes("candidate") else "direct"
        return self._encode([self.model.prompt(item, direct=route == "direct") for item in items], route, progress)

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto", progress: bool = False) -> list[Encoding]:
        """Queries by the given route: `auto` lets the model decide, `reason` and `direct` force it. Order is kept."""
        check_route(route)
        if not self.model.writes("query"):
            route = "direct"  # there is no token for the model to predict
        return self._encode([self.model.prompt(query, direct=route == "direct") for query in queries], route, progress)

    def decoder(self) -> Decoder:
        """The steps of encoding, for whoever schedules them."""
        return Decoder(self.model, self.budget, self.threshold, self.dim)

    def _encode(self, prompts: Sequence[Prompt], route: Route, progress: bool) -> list[Encoding]:
        lay_out = self.model.processor.forced if route == "direct" else self.model.processor.lay_out
        layouts = [lay_out(prompt) for prompt in prompts]
        done: dict[int, Encoding] = {}
        with tqdm(total=len(layouts), desc="encoding", disable=not progress, mininterval=2.0) as bar:
            asked = [prompt.role == "query" and not prompt.closed for prompt in prompts]
            for finished in self._finished(layouts, asked, route):
                done.update(finished)
                bar.update(len(finished))
        for number, layout in enumerate(layouts):
            if layout.cut:
                done[number] = replace(done[number], cut=layout.cut, text_limit=self.model.text_limit)
        return [done[number] for number in range(len(layouts))]

    def _finished(self, layouts: Sequence[Layout], asked: Sequence[bool], route: Route) -> Iterator[Finished]:
        """Rows as they are done; those that write wait for each other. `asked`: whose P(`<|emb|>`) the direct route tells."""
        decoder = self.decoder()
        waiting: list[DecodeBatch] = []
        for numbers in self._chunks(layouts):
            chunk = [layouts[number] for number in numbers]
            if route == "direct":
                yield decoder.prefill_direct(numbers, chunk, probability=[asked[number] for number in numbers])
                continue
            finished, writing = decoder.prefill(numbers, chunk, route)
            yield finished
            waiting += [] if writing is None else [writing]
            if sum(len(batch.rows) for batch in waiting) >= self.decode_rows:
                yield from _write(decoder, waiting)
                waiting = []
        if waiting:
            yield from _write(decoder, waiting)

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


def _write(decoder: Decoder, batches: Sequence[DecodeBatch]) -> Iterator[Finished]:
    batch = merge_batches(batches)
    while batch.rows:
        yield decoder.step(batch)
