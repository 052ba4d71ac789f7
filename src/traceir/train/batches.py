"""Training batches as tensors: which rows this process reads, cut into chunks of like length, ready for a forward each.

A TrainBatch is one InfoNCE batch of one task (or one batch of a pretraining task); `accumulate` of them make one optimiser step.
Its rows are sorted by length and cut into chunks of at most `chunk_tokens` padded tokens, so little is spent on padding and the
memory of a forward is bounded whatever the size of the batch (gradcache.py). Everything here runs in the workers of a DataLoader;
a batch is a pure function of (seed, number, rank), so resuming needs no state.

A sample on its way from file to tensors: JSON line, Record and Candidates, Sample, Example, Prompt, Layout, TrainBatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch.utils.data import Dataset

from traceir.batch import IGNORE, Batch, Layout, Processor
from traceir.data.samples import Example, Schedule
from traceir.errors import TrainError
from traceir.items import Item
from traceir.prompts import EMB, TURN_END, PromptVersion, render_candidate, render_query
from traceir.rerank_prompts import render_asked, render_offered

WIDTHS: Final = 8
"""The padded width of a chunk is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that share one forward; `rows` are their positions among this process's rows of its side."""

    batch: Batch
    rows: torch.Tensor

    def to(self, device: torch.device) -> Chunk:
        return Chunk(self.batch.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one process reads of one batch, and what it must know of the others' rows.

    `candidates` is empty for a pretraining task. `collision_BN` is true where a candidate is among all positives of a query
    (not only the sampled one) and so no negative of it; it covers all processes: queries by candidates, in the order of the
    ranks, all positives before all further negatives. `sizes` is (queries, further negatives) of each rank. `queried` names this
    process's queries; `tokens` counts its supervised tokens. `groups`, for a reranker alone: each row of `queries` is
    a query and so many candidates side by side, the right one first; `similarities` are theirs, () where they are not known.
    """

    number: int
    task: str
    queries: tuple[Chunk, ...]
    candidates: tuple[Chunk, ...]
    collision_BN: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    queried: tuple[str, ...]
    tokens: int
    groups: tuple[int, ...] = ()
    similarities: tuple[tuple[float, ...], ...] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return (*self.queries, *self.candidates)

    def to(self, device: torch.device) -> TrainBatch:
        queries, candidates = (tuple(chunk.to(device) for chunk in side) for side in (self.queries, self.candidates))
        return replace(self, queries=queries, candidates=candidates, collision_BN=self.collision_BN.to(device))


@dataclass(frozen=True)
class TrainBatches(Dataset[TrainBatch]):
    """All batches of a run as this process sees them; decoding, tokenising and padding happen on access.

    `augment` shifts images by up to so many pixels; `teach_candidates` lets candidates write (paper, Table 6); `rerank` makes
    the batches of a reranker.
    """

    schedule: Schedule
    processor: Processor
    version: PromptVersion
    chunk_tokens: int
    augment: int = 0
    teach_candidates: bool = False
    rank: int = 0
    world: int = 1
    rerank: bool = False

    def __post_init__(self) -> None:
        check_shares(self.schedule.batch, self.world)

    def __len__(self) -> int:
        return len(self.schedule.chosen)

    def __getitem__(self, number: int) -> TrainBatch:
        return self.batch(number, self.schedule.task(number).name, self.schedule.examples(number))

    def batch(self, number: int, task: str, examples: Sequence[Example]) -> TrainBatch:
        """The batch of these examples, which are those of all processes."""
        share = len(examples) // self.world
        shares = [examples[rank * share : (rank + 1) * share] for rank in range(self.world)]
        mine, first = shares[self.rank], self.rank * share
        queried = tuple(example.query.id or f"row {row}" for row, example in enumerate(mine))
        if self.rerank:
            rows = [self._shifted(self._group(example), number, 0, first + row) for row, example in enumerate(mine)]
            collision, sizes = (
                torch.zeros(len(examples), 0, dtype=torch.bool),
                tuple(1 + len(example.negatives) for example in mine),
            )
            known = tuple(example.similarities for example in mine)
            return TrainBatch(number, task, self.chunks(rows), (), collision, (), queried, 0, sizes, known)
        queries = [self._shifted(self._query(example), number, 0, first + row) for row, example in enumerate(mine)]
        offered = [(1, row, example.candidate, example.described) for row, example in enumerate(mine) if example.candidate]
        offered += [(2 + n, row, item, "") for row, example in enumerate(mine) for n, item in enumerate(example.negatives)]
        candidates = [self._shifted(self._candidate(item, text), number, n, first + row) for n, row, item, text in offered]
        dids = [example.candidate.id for example in examples if example.candidate is not None]
        dids += [item.id for example in examples for item in example.negatives]
        return TrainBatch(
            number,
            task,
            self.chunks(queries),
            self.chunks(candidates),
            torch.tensor([[did in example.right for did in dids] for example in examples], dtype=torch.bool),
            tuple((len(part), sum(len(example.negatives) for example in part)) for part in shares),
            queried,
            sum(int((layout.targets != IGNORE).sum()) for layout in (*queries, *candidates)),
        )

    def chunks(self, layouts: Sequence[Layout]) -> tuple[Chunk, ...]:
        """Longest first, so that the first forward of a batch asks for the most memory; few different widths, so that kernels and
        buffers made for one shape serve again."""
        chunks: list[Chunk] = []
        order = sorted(range(len(layouts)), key=lambda row: (-len(layouts[row]), row))
        while order:
            width = -(-len(layouts[order[0]]) // WIDTHS) * WIDTHS
            rows = max(1, self.chunk_tokens // width)
            chosen, order = order[:rows], order[rows:]
            batch = self.processor.collate([layouts[row] for row in chosen], raw=True, multiple=WIDTHS)
            chunks.append(Chunk(batch, torch.tensor(chosen)))
        return tuple(chunks)

    def _query(self, example: Example) -> Layout:
        end = TURN_END if example.candidate is None else EMB
        return self.processor.lay_out(render_query(example.query, self.version), example.completion, end=end)

    def _candidate(self, item: Item, described: str) -> Layout:
        """Candidates are read directly and teach nothing (paper, section 1), unless Table 6 is what is being tried."""
        prompt = render_candidate(item, self.version)
        if self.teach_candidates:
            return self.processor.lay_out(prompt, described)
        layout = self.processor.forced(prompt)
        return replace(layout, targets=np.full_like(layout.targets, IGNORE))

    def _group(self, example: Example) -> Layout:
        """The query, which is read once, and its candidates side by side, the right one first."""
        if example.candidate is None:
            raise TrainError("pretraining examples have no candidates to rerank; set teach=rerank, which reads pairs alone")
        asked = self.processor.lay_out(render_asked(example.query, self.version, example.completion))
        items = (example.candidate, *example.negatives)
        return asked.joined(*(self.processor.lay_out(render_offered(item, self.version)) for item in items))

    def _shifted(self, layout: Layout, number: int, side: int, row: int) -> Layout:
        """The layout with each image moved by up to `augment` pixels, alike for any number of processes; its edge is repeated."""
        reach = self.augment
        if not reach or not layout.pixels:
            return layout
        draw = np.random.default_rng((self.schedule.seed, 3, number, side, row))
        moved = []
        for image in layout.pixels:
            down, right = draw.integers(0, 2 * reach + 1, size=2).tolist()
            padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            moved.append(padded[down : down + image.shape[0], right : right + image.shape[1]])
        return replace(layout, pixels=tuple(moved))


def check_shares(batch: int, world: int) -> None:
    """TrainError where a batch cannot be dealt out evenly."""
    if batch % world:
        raise TrainError(f"batch {batch} does not divide among {world} processes; choose a multiple")
