"""Prompts to tensors: the one place that decides token ids, supervised tokens, M-RoPE positions and the pooling position.

Shapes: B rows, T tokens (left-padded), N images, P patches, C features of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer

from traceir.errors import ImageError, ModelError
from traceir.images import ImageInput
from traceir.prompts import EMB, IMAGE_PAD, PAD, TURN_END, Prompt, Span, UserText

PoolingPosition = Literal["before_token", "at_token", "last"]
Rope = Literal["mrope", "sequential"]
Resize = Literal["processor", "utils", "both"]
IGNORE: Final = -100
_SHORT: Final = 512
"""Characters of a text whose token ids are remembered."""
Pixels = npt.NDArray[np.uint8]
_Ids = npt.NDArray[np.int64]
# OpenAI's CLIP statistics, the ones in Qwen2.5-VL's preprocessor_config.json.
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Layout:
    """One row before padding.

    `ids` [T] is what the model reads; `targets` [T] the token to be predicted at each position, IGNORE where none is supervised;
    `positions` [3, T] the M-RoPE positions (time, height, width); `pooling_index` the index whose state is the embedding; `cut`
    the number of text tokens the budget removed. `segments` [T], where several continuations of one beginning lie side by side:
    0 for the beginning, which all of them read, then 1, 2 ... for those, which do not read each other.
    """

    ids: _Ids
    targets: _Ids
    positions: _Ids
    pixels: tuple[Pixels, ...]
    pooling_index: int
    cut: int
    segments: _Ids | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, *behind: Layout) -> Layout:
        """This layout and each of the others behind it, as one; each continues it as if it stood alone."""
        every, start = (self, *behind), int(self.positions.max()) + 1
        return Layout(
            np.concatenate([part.ids for part in every]),
            np.concatenate([part.targets for part in every]),
            np.concatenate([self.positions, *(part.positions + start for part in behind)], axis=1),
            tuple(image for part in every for image in part.pixels),
            sum(map(len, every)) - 1,
            sum(part.cut for part in every),
            np.repeat(np.arange(len(every)), [len(part) for part in every]),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded rows: ids, mask, targets [B, T]; positions [3, B, T]; patches [P, C]; grids [N, 3]; pooling_index [B].

    Patches are float32 as the vision tower reads them, or uint8 [P, 3 * patch * patch] (an eighth of the size), which the model
    brings into that form on its own device. `segments` [B, T] as in a Layout, -1 for padding; None where no row has any.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    patches: torch.Tensor | None
    grids: torch.Tensor | None
    pooling_index: torch.Tensor
    segments: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if value is not None})


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """How images become patches: Qwen's smart resize between `min_pixels` and `max_pixels`, patches of `patch` px.

    `resize` names the implementation: transformers' image `processor`; qwen_vl_`utils`, which differs for sides below half a
    token; or `both`, qwen_vl_utils first with its own bounds of 4 and 16,384 tokens.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: Resize = "processor"

    @property
    def factor(self) -> int:
        """Side in pixels of what becomes one token."""
        return self.patch * self.merge


class Processor:
    """Tokenizer and image settings of one checkpoint, turning Prompts into Layouts and Layouts into a Batch.

    `pixel_store` maps an image's path to already resized pixels (training fills it so that no image is decoded twice).
    `emb_token` is the token written before or at the pooling position, None for checkpoints that have none; `rope` "sequential"
    counts an image's tokens one by one, as models trained without M-RoPE positions expect. Thread-safe for reading.
    """

    def __init__(
        self,
        tokenizer: Any,
        image: ImageBudget,
        *,
        pooling_position: PoolingPosition = "before_token",
        max_text_tokens: int = 1024,
        pixel_store: Mapping[str, Pixels] | None = None,
        emb_token: str | None = EMB,
        rope: Rope = "mrope",
    ) -> None:
        self.tokenizer, self.image, self.rope = tokenizer, image, rope
        self.pooling_position, self.max_text_tokens, self.pixel_store = pooling_position, max_text_tokens, pixel_store
        self.special = {token: _id_of(tokenizer, token) for token in (PAD, TURN_END, IMAGE_PAD)}
        if emb_token is not None:
            self.special[EMB] = _id_of(tokenizer, emb_token)
        core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._short_ids = lru_cache(maxsize=8192)(self._encode_plain)
        self._template_ids = lru_cache(maxsize=4096)(self._read_span)
        names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special_token = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")  # without names it matches nothing

    @property
    def emb_id(self) -> int:
        """The id of the embedding token. Raises ModelError for checkpoints that are read at their last token and have none."""
        if EMB not in self.special:
            raise ModelError("this checkpoint is read at the last token of its prompt; it has no embedding token to ask for")
        return self.special[EMB]

    def lay_out(self, prompt: Prompt, completion: str | None = None, *, end: str = EMB) -> Layout:
        """Token ids, supervised targets and pooling position of a prompt and, in training, of the completion that follows it.

        `completion` None lays out a prompt to be continued (pooled at the last token, which predicts the next). A string, "" for
        the bypass, is followed by `<|emb|>`; completion and `<|emb|>` are supervised, the prompt never is. Under `before_token`
        the position that predicts `<|emb|>` is pooled (paper, section 1); under `at_token` `<|emb|>` is read too and its own
        state counts; under `last` (models that know no such token) the last token of all.
        `end` replaces `<|emb|>` where a plain answer is taught (pretraining tasks end the turn).
        """
        ids, positions, pixels, cut = self._prompt_ids(prompt)
        targets = [IGNORE] * len(ids)
        if completion is not None:
            written = [*(self.plain_ids(completion) if completion.strip() else ()), self.special[end]]
            read = written if self.pooling_position == "at_token" else written[:-1]
            targets = [*targets[:-1], *written, IGNORE][: len(ids) + len(read)]
            positions = np.concatenate([positions, _text_positions(int(positions[:, -1].max()) + 1, len(read))], axis=1)
            ids += read
        return Layout(np.array(ids), np.array(targets), positions, tuple(pixels), len(ids) - 1, cut)

    def forced(self, prompt: Prompt) -> Layout:
        """The layout of the direct route: nothing is written before the embedding, whatever the model predicts."""
        return self.lay_out(prompt, "" if self.pooling_position == "at_token" and not prompt.closed else None)

    def _prompt_ids(self, prompt: Prompt) -> tuple[list[int], _Ids, list[Pixels], int]:
        """Ids, positions [3, T], resized images, and the number of text tokens cut."""
        ids: list[int] = []
        blocks: list[_Ids] = []
        pixels: list[Pixels] = []
        left, cut, start, shown_to = self.max_text_tokens, 0, 0, 0
        for piece in prompt.pieces:
            if isinstance(piece, Span):
                of_template = all(isinstance(part, str) for part in piece.parts)
                span_ids, used, lost = self._template_ids(piece, 0) if of_template else self._read_span(piece, left)
                left, cut = left - used, cut + lost
                ids += span_ids
                block = _text_positions(start, len(span_ids))
            else:
                image = self.pixels(piece)
                pixels.append(image)
                block = _grid_positions(image.shape[0] // self.image.factor, image.shape[1] // self.image.factor) + start
                ids += [self.special[IMAGE_PAD]] * block.shape[1]
                shown_to = len(ids)
            blocks.append(block)
            start = int(block.max()) + 1 if block.size else start
        positions = _text_positions(0, len(ids)) if self.rope == "sequential" else np.concatenate(blocks, axis=1)
        if prompt.max_tokens is not None and len(ids) > prompt.max_tokens:
            kept = max(prompt.max_tokens, shown_to)
            ids, positions, cut = ids[:kept], positions[:, :kept], cut + len(ids) - kept
        return ids, positions, pixels, cut

    def _read_span(self, span: Span, left: int) -> tuple[list[int], int, int]:
        """Token ids, and how many of the user's tokens were used and cut: at most `left` are kept."""
        ids: list[int] = []
        used, cut = 0, 0
        for special, run in self._runs(span):
            run_ids, kept, lost = self._run_ids(run, left - used)
            ids += [*special, *run_ids]
            used, cut = used + kept, cut + lost
        return ids, used, cut

    def _runs(self, span: Span) -> list[tuple[list[int], list[str | UserText]]]:
        """A span divided at its template's special tokens: the id of each, none at the beginning, and the parts behind it."""
        runs: list[tuple[list[int], list[str | UserText]]] = [([], [])]
        for part in span.parts:
            if isinstance(part, UserText):
                runs[-1][1].append(part)
                continue
            plain, *rest = self._special_token.split(part)
            runs[-1][1].append(plain)
            runs += [([_id_of(self.tokenizer, token)], [text]) for token, text in zip(rest[::2], rest[1::2], strict=True)]
        return runs

    def _run_ids(self, run: Sequence[str | UserText], left: int) -> tuple[Sequence[int], int, int]:
        """Parts without special tokens, as one text where the user's fit into `left`, else part by part and cut."""
        texts = [part if isinstance(part, str) else part.text for part in run]
        asked = [part for part in run if isinstance(part, UserText)]
        wanted = sum(len(self.plain_ids(part.text)) for part in asked)
        dropped = sum(len(self.plain_ids(part.dropped)) for part in asked if part.dropped)
        if wanted <= left:
            return self.plain_ids("".join(texts)), wanted, dropped
        ids: list[int] = []
        free = left
        for part, text in zip(run, texts, strict=True):
            part_ids = self.plain_ids(text)
            if isinstance(part, UserText):
                part_ids = part_ids[:free]
                free -= len(part_ids)
            ids += part_ids
        return ids, left - free, wanted - (left - free) + dropped

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without special tokens. Those of short texts alone are remembered, which bounds what is kept."""
        return self._short_ids(text) if len(text) <= _SHORT else self._encode_plain(text)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._core.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Written tokens as text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def collate(self, layouts: Sequence[Layout], *, raw: bool = False, multiple: int = 1) -> Batch:
        """Left-padded tensors on the CPU; the pooling index counts from the left edge of the padded row.

        `raw` leaves the patches as uint8, to be sent to the model's device so. The width is a multiple of `multiple`.
        """
        rows = len(layouts)
        width = -(-max(len(layout) for layout in layouts) // multiple) * multiple
        ids = np.full((rows, width), self.special[PAD], dtype=np.int64)
        targets = np.full((rows, width), IGNORE, dtype=np.int64)
        mask = np.zeros((rows, width), dtype=np.int64)
        positions = np.zeros((3, rows, width), dtype=np.int64)
        for row, layout in enumerate(layouts):
            start = width - len(layout)
            ids[row, start:], targets[row, start:], mask[row, start:] = layout.ids, layout.targets, 1
            positions[:, row, start:] = layout.positions
        pooling_index = torch.tensor([width - len(layout) + layout.pooling_index for layout in layouts])
        pixels = [image for layout in layouts for image in layout.pixels]
        patches, grids = self.patches(pixels, raw=raw) if pixels else (None, None)
        text = (torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(targets), torch.from_numpy(positions))
        return Batch(*text, patches, grids, pooling_index, _segments(layouts, width))

    def pixels(self, image: ImageInput) -> Pixels:
        """The image at the model's budget: uint8 [H, W, 3], H and W multiples of patch x merge (Qwen's smart resize)."""
        stored = None if self.pixel_store is None else self.pixel_store.get(str(image.path or image.name))
        if stored is not None:
            return stored
        pil = image.load()
        for height, width in _sizes(pil.height, pil.width, self.image, image.name):
            if (pil.height, pil.width) != (height, width):
                pil = pil.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(pil, dtype=np.uint8)

    def patches(self, pixels: Sequence[Pixels], *, raw: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [P, C] in Qwen's order (merge groups together), float32 or `raw`, and grids [N, 3] in patches."""

        def cut(numbers: list[int]) -> torch.Tensor:
            stacked = torch.from_numpy(np.stack([pixels[number] for number in numbers])).permute(0, 3, 1, 2)
            count, channels, height, width = stacked.shape
            patch, merge, side = self.image.patch, self.image.merge, self.image.factor
            rows, columns = height // side, width // side
            patches = stacked.reshape(count, channels, rows, merge, patch, columns, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
            return patches.reshape(count, rows * columns * merge**2, -1)

        patches = by_shape([image.shape for image in pixels], cut)
        grids = torch.tensor([[1, image.shape[0] // self.image.patch, image.shape[1] // self.image.patch] for image in pixels])
        return patches if raw else self.normalise(patches), grids

    def normalise(self, patches_PC: torch.Tensor) -> torch.Tensor:
        """Raw patches, uint8 [P, 3 * patch**2], as the vision tower reads them: float32 [P, 3 * temporal * patch**2]."""
        mean, std = (torch.tensor(value, device=patches_PC.device).view(3, 1) for value in (self.image.mean, self.image.std))
        values = (patches_PC.view(len(patches_PC), 3, -1).float() / 255.0 - mean) / std
        return values.unsqueeze(2).expand(-1, -1, self.image.temporal, -1).reshape(len(patches_PC), -1)


def _segments(layouts: Sequence[Layout], width: int) -> torch.Tensor | None:
    """Those of a batch; a row that has none is all beginning."""
    if all(layout.segments is None for layout in layouts):
        return None
    segments = np.full((len(layouts), width), -1, dtype=np.int64)
    for row, layout in enumerate(layouts):
        segments[row, width - len(layout) :] = 0 if layout.segments is None else layout.segments
    return torch.from_numpy(segments)


def by_shape(shapes: Sequence[Hashable], run: Callable[[list[int]], Iterable[torch.Tensor]]) -> torch.Tensor:
    """What `run` gives for each number, concatenated in order; it is called once with all numbers of one shape."""
    groups: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    done: dict[int, torch.Tensor] = {}
    for numbers in groups.values():
        done.update(zip(numbers, run(numbers), strict=True))
    return torch.cat([done[number] for number in range(len(shapes))])


def _sizes(height: int, width: int, budget: ImageBudget, name: str) -> Iterator[tuple[int, int]]:
    """Heights and widths that an image is brought to, one after the other."""
    if budget.resize != "processor":
        area = budget.factor**2
        bounds = replace(budget, min_pixels=4 * area, max_pixels=16_384 * area) if budget.resize == "both" else budget
        height, width = smart_resize(height, width, bounds, name, least=budget.factor)
        yield height, width
    if budget.resize != "utils":
        yield smart_resize(height, width, budget, name)


def smart_resize(height: int, width: int, budget: ImageBudget, name: str = "image", least: int = 0) -> tuple[int, int]:
    """Height and width, multiples of patch x merge, whose product lies within the budget and whose ratio stays close.

    The rule is Qwen2-VL's; qwen_vl_utils takes a side for `least` pixels at least. Raises ImageError for an aspect ratio
    beyond 200, which that rule refuses as well.
    """
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{name}: aspect ratio {width}x{height} is beyond 200; crop the image")
    unit = budget.factor
    high, wide = max(least, round(height / unit) * unit), max(least, round(width / unit) * unit)
    if high * wide > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        high, wide = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif high * wide < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return high, wide


def _text_positions(start: int, length: int) -> _Ids:
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int64), (3, length))


@lru_cache(maxsize=256)
def _grid_positions(rows: int, columns: int) -> _Ids:
    """M-RoPE positions [3, rows * columns] of one image: one time, its rows, its columns."""
    high, wide = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([np.zeros(rows * columns, dtype=np.int64), high.ravel(), wide.ravel()])


@lru_cache(maxsize=256)
def _id_of(tokenizer: Any, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    # Of Qwen's tokenizers <|endoftext|> itself is the unknown token, as transformers 5 makes them.
    if number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ModelError(
            f"the tokenizer has no token {token!r}; is this a Qwen-VL checkpoint, and is its --profile the right one?"
        )
    return int(number)
