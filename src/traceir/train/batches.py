"""Turns of training as tensors: which rows this process reads, cut into chunks of like length, ready for a forward each.

A turn is one InfoNCE batch of one task (or one batch of lessons); `accumulate` turns make one optimiser step. Its rows are sorted
by length and cut into chunks of at most `chunk_tokens` padded tokens, so little is spent on padding and the memory of a forward
is bounded whatever the size of the batch (gradcache.py). Everything here runs in the workers of a DataLoader; a turn is a pure
function of (seed, turn, rank), so resuming needs no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch.utils.data import Dataset

from traceir.batch import Batch, Layout, Processor
from traceir.data.samples import Example, Schedule
from traceir.items import Item
from traceir.prompts import EMB, TURN_END, PromptVersion, render_candidate, render_query
from traceir.train.launch import check_shares

WIDTHS: Final = 8
"""The padded width of a chunk is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that share one forward; `places` says where each stands among this process's rows of its side."""

    batch: Batch
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class Turn:
    """What one process reads of one turn, and what it must know of the others'.

    `candidates` is empty for lessons. `collision_BN` covers all processes: queries by candidates, in the order of the ranks, all
    positives before all further negatives. `sizes` is (queries, positives and negatives) of each rank. `asked` names this
    process's queries; `tokens` counts its supervised tokens.
    """

    number: int
    task: str
    queries: tuple[Chunk, ...]
    candidates: tuple[Chunk, ...]
    collision_BN: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    asked: tuple[str, ...]
    tokens: int


class Turns(Dataset[Turn]):
    """All turns of a run as this process sees them; decoding, tokenising and padding happen on access."""

    def __init__(
        self,
        schedule: Schedule,
        processor: Processor,
        version: PromptVersion,
        *,
        turns: int,
        chunk_tokens: int,
        seed: int,
        augment: int = 0,
        teach_candidates: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_shares(schedule.batch, world)
        self.schedule, self.processor, self.version = schedule, processor, version
        self.turns, self.chunk_tokens, self.seed, self.augment = turns, chunk_tokens, seed, augment
        self.teach_candidates = teach_candidates
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.turns

    def __getitem__(self, number: int) -> Turn:
        return self.turn(number, self.schedule.task(number).name, self.schedule.examples(number))

    def turn(self, number: int, task: str, examples: Sequence[Example]) -> Turn:
        """The turn of these examples, which are those of all processes."""
        share = len(examples) // self.world
        shares = [examples[rank * share : (rank + 1) * share] for rank in range(self.world)]
        mine = shares[self.rank]
        first = self.rank * share
        asked = [self._shifted(self._query(example), number, (0, first + row)) for row, example in enumerate(mine)]
        offered: list[Layout] = []
        for row, example in enumerate(mine):
            if example.candidate is not None:
                layout = self._candidate(example.candidate, example.described)
                offered.append(self._shifted(layout, number, (1, first + row)))
        for row, example in enumerate(mine):
            offered += [
                self._shifted(self._candidate(item, ""), number, (2 + place, first + row))
                for place, item in enumerate(example.negatives)
            ]
        queries, candidates = self.chunks(asked), self.chunks(offered)
        tokens = sum(int((chunk.batch.targets >= 0).sum()) for chunk in (*queries, *candidates))
        sizes = tuple((len(one), sum(len(e.negatives) for e in one)) for one in shares)
        names = tuple(example.query.id or f"row {place}" for place, example in enumerate(mine))
        return Turn(number, task, queries, candidates, collisions(examples), sizes, names, tokens)

    def chunks(self, layouts: Sequence[Layout]) -> tuple[Chunk, ...]:
        """Longest first, so that the first forward of a turn asks for the most memory; few different widths, so that kernels and
        buffers made for one shape serve again."""
        done: list[Chunk] = []
        order = sorted(range(len(layouts)), key=lambda place: (-len(layouts[place]), place))
        while order:
            width = -(-len(layouts[order[0]]) // WIDTHS) * WIDTHS
            rows = max(1, self.chunk_tokens // width)
            places, order = order[:rows], order[rows:]
            batch = self.processor.collate([layouts[place] for place in places], raw=True, multiple=WIDTHS)
            done.append(Chunk(batch, torch.tensor(places)))
        return tuple(done)

    def _query(self, example: Example) -> Layout:
        end = TURN_END if example.candidate is None else EMB
        return self.processor.lay_out(render_query(example.query, self.version), example.completion, end=end)

    def _candidate(self, item: Item, described: str) -> Layout:
        """Candidates are read directly and teach nothing (paper, section 1), unless Table 6 is what is being tried."""
        prompt = render_candidate(item, self.version)
        if self.teach_candidates:
            return self.processor.lay_out(prompt, described)
        layout = self.processor.forced(prompt)
        return replace(layout, targets=np.full_like(layout.targets, -100))

    def _shifted(self, layout: Layout, number: int, place: tuple[int, int]) -> Layout:
        """The layout with each picture moved by up to `augment` pixels, its edge repeated into the gap.

        How far depends on (seed, turn, side, row of the whole turn) alone, whatever the number of processes.
        """
        reach = self.augment
        if not reach or not layout.pixels:
            return layout
        draw = np.random.default_rng((self.seed, 3, number, *place))
        moved = []
        for image in layout.pixels:
            down, right = (int(value) for value in draw.integers(0, 2 * reach + 1, size=2))
            padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            moved.append(padded[down : down + image.shape[0], right : right + image.shape[1]])
        return replace(layout, pixels=tuple(moved))


def collisions(examples: Sequence[Example]) -> torch.Tensor:
    """[B, N], true where a candidate is among all positives of a query (not only the sampled one): no negative of it."""
    if examples[0].candidate is None:
        return torch.zeros(len(examples), 0, dtype=torch.bool)
    dids = [example.candidate.id for example in examples if example.candidate is not None]
    dids += [item.id for example in examples for item in example.negatives]
    return torch.tensor([[did in example.right for did in dids] for example in examples])
