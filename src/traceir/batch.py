"""Prompts to tensors: the one function that decides token ids, supervised tokens and the read-out position.

Shapes: B rows, T tokens (left-padded), N pictures, P patches, C features of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer

from traceir.errors import ImageError, InputError, ModelError
from traceir.images import ImageInput
from traceir.prompts import EMB, IMAGE_PAD, PAD, TURN_END, Joined, Prompt, Special, UserText

ReadOut = Literal["before_token", "at_token", "last"]
READ_OUTS: Final[tuple[ReadOut, ...]] = ("before_token", "at_token", "last")
Rope = Literal["mrope", "sequential"]
ROPES: Final[tuple[Rope, ...]] = ("mrope", "sequential")
Resize = Literal["processor", "utils", "both"]
RESIZES: Final[tuple[Resize, ...]] = ("processor", "utils", "both")
IGNORE: Final = -100
_SHORT: Final = 512
"""Characters of a text whose token ids are remembered."""
Pixels = npt.NDArray[np.uint8]
# OpenAI's CLIP statistics, the ones in Qwen2.5-VL's preprocessor_config.json.
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Layout:
    """One row before padding.

    `ids` [T] is what the model reads; `targets` [T] the token to be predicted at each position, IGNORE where none is supervised;
    `positions` [3, T] the M-RoPE positions (time, height, width); `readout` the index whose state is the embedding; `cut` the
    number of text tokens the budget removed.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    pixels: tuple[Pixels, ...]
    readout: int
    cut: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded rows: ids, mask, targets [B, T]; positions [3, B, T]; patches [P, C]; grids [N, 3]; readout [B].

    Patches are float32 as the vision tower reads them, or uint8 [P, 3 * patch * patch] (an eighth of the size), which the model
    brings into that form on its own device.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    patches: torch.Tensor | None
    grids: torch.Tensor | None
    readout: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.ids.to(device),
            self.mask.to(device),
            self.targets.to(device),
            self.positions.to(device),
            None if self.patches is None else self.patches.to(device),
            None if self.grids is None else self.grids.to(device),
            self.readout.to(device),
        )


@dataclass(frozen=True, slots=True)
class ImageBudget:
    """How pictures become patches: Qwen's smart resize between `min_pixels` and `max_pixels`, patches of `patch` px.

    `resize` says whose: that of transformers' image processor, that of the package qwen_vl_utils, which differs for sides below
    half a cell, or `both`, first qwen_vl_utils with its own bounds of 4 and 16,384 cells.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: Resize = "processor"


class Processor:
    """Tokenizer and picture settings of one checkpoint, turning Prompts into Layouts and Layouts into a Batch.

    `pixel_store` maps a picture's path to already resized pixels (training fills it so that no picture is decoded twice).
    `emb_token` is the token written before or at the read-out, None for checkpoints that have none; `rope` "sequential" counts
    a picture's tokens one by one, as peers trained without M-RoPE positions expect. Thread-safe for reading.
    """

    def __init__(
        self,
        tokenizer: Any,
        image: ImageBudget,
        *,
        read_out: ReadOut = "before_token",
        max_text_tokens: int = 1024,
        pixel_store: Mapping[str, Pixels] | None = None,
        emb_token: str | None = EMB,
        rope: Rope = "mrope",
    ) -> None:
        self.tokenizer = tokenizer
        self.image = image
        self.read_out = read_out
        self.max_text_tokens = max_text_tokens
        self.pixel_store = pixel_store
        self.rope = rope
        self.special = {token: _id_of(tokenizer, token) for token in (PAD, TURN_END, IMAGE_PAD)}
        if emb_token is not None:
            self.special[EMB] = _id_of(tokenizer, emb_token)
        core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._short_ids = lru_cache(maxsize=8192)(self._encode_plain)
        self.split_template = lru_cache(maxsize=4096)(self._split_template)

    @property
    def emb_id(self) -> int:
        """The id of the embedding token. Raises ModelError for checkpoints that are read at their last token and have none."""
        if EMB not in self.special:
            raise ModelError("this checkpoint is read at the last token of its prompt; it has no embedding token to ask for")
        return self.special[EMB]

    def lay_out(self, prompt: Prompt, completion: str | None = None, *, end: str = EMB) -> Layout:
        """Token ids, supervised targets and read-out of a prompt and, in training, of the completion that should follow it.

        `completion` None lays out a prompt to be continued (read-out: the last token, which predicts the next). A string, "" for
        the bypass, is followed by `<|emb|>`; completion and `<|emb|>` are supervised, the prompt never is. Under `before_token`
        the read-out is the position that predicts `<|emb|>` (paper, section 1); under `at_token` `<|emb|>` is read too and its
        own state counts; under `last` (peers that know no such token) the last token of all.
        `end` replaces `<|emb|>` where a plain answer is taught (pretraining lessons end the turn).
        """
        ids, positions, pixels, cut = self._prompt_ids(prompt)
        targets = [IGNORE] * len(ids)
        if completion is not None:
            written = [*(self.plain_ids(completion) if completion.strip() else ()), self.special[end]]
            targets[-1] = written[0]
            kept = written if self.read_out == "at_token" else written[:-1]
            ids += kept
            targets += [*written[1:], IGNORE][: len(kept)]
            start = int(positions[:, -1].max()) + 1
            positions = np.concatenate([positions, _text_positions(start, len(kept))], axis=1)
        return Layout(np.array(ids), np.array(targets), positions, tuple(pixels), len(ids) - 1, cut)

    def forced(self, prompt: Prompt) -> Layout:
        """The layout of the direct road: nothing is written before the embedding, whatever the model would like."""
        return self.lay_out(prompt, "" if self.read_out == "at_token" and not prompt.closed else None)

    def collate(self, layouts: Sequence[Layout], *, raw: bool = False, multiple: int = 1) -> Batch:
        """Left-padded tensors on the CPU; the read-out index counts from the left edge of the padded row.

        `raw` leaves the patches as uint8, to be sent to the model's device so. The width is a multiple of `multiple`.
        """
        width, rows = max(len(layout) for layout in layouts), len(layouts)
        width = -(-width // multiple) * multiple
        ids = np.full((rows, width), self.special[PAD], dtype=np.int64)
        targets = np.full((rows, width), IGNORE, dtype=np.int64)
        mask = np.zeros((rows, width), dtype=np.int64)
        positions = np.zeros((3, rows, width), dtype=np.int64)
        for row, layout in enumerate(layouts):
            start = width - len(layout)
            ids[row, start:], targets[row, start:], mask[row, start:] = layout.ids, layout.targets, 1
            positions[:, row, start:] = layout.positions
        readout = [width - len(layout) + layout.readout for layout in layouts]
        pixels = [image for layout in layouts for image in layout.pixels]
        patches, grids = self._patches(pixels, raw) if pixels else (None, None)
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(targets), torch.from_numpy(positions),
            patches, grids, torch.tensor(readout),
        )  # fmt: skip

    def pixels(self, image: ImageInput) -> Pixels:
        """The picture at the model's budget: uint8 [H, W, 3], H and W multiples of patch x merge (Qwen's smart resize)."""
        if self.pixel_store is not None:
            stored = self.pixel_store.get(str(image.path or image.name))
            if stored is not None:
                return stored
        pil = image.load()
        for height, width in sizes(pil.height, pil.width, self.image, image.name):
            if (pil.height, pil.width) != (height, width):
                pil = pil.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(pil, dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Written tokens as text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _prompt_ids(self, prompt: Prompt) -> tuple[list[int], npt.NDArray[np.int64], list[Pixels], int]:
        ids: list[int] = []
        blocks: list[npt.NDArray[np.int64]] = []
        pixels: list[Pixels] = []
        left, cut, place, shown_to = self.max_text_tokens, 0, 0, 0
        for piece in prompt.pieces:
            if isinstance(piece, ImageInput):
                shown = self.pixels(piece)
                pixels.append(shown)
                unit = self.image.patch * self.image.merge
                block = _grid_positions(shown.shape[0] // unit, shown.shape[1] // unit) + place
                token_ids = [self.special[IMAGE_PAD]] * block.shape[1]
            else:
                if isinstance(piece, Special):
                    token_ids = [_id_of(self.tokenizer, piece.token)]
                elif isinstance(piece, UserText):
                    whole = self.plain_ids(piece.text)
                    token_ids = list(whole[:left])
                    cut += len(whole) - len(token_ids)
                    left -= len(token_ids)
                elif isinstance(piece, Joined):
                    token_ids, used, lost = self._joined_ids(piece, left)
                    left, cut = left - used, cut + lost
                else:
                    token_ids = list(self.plain_ids(piece))
                block = _text_positions(place, len(token_ids))
            ids += token_ids
            blocks.append(block)
            place = int(block.max()) + 1 if block.size else place
            shown_to = len(ids) if isinstance(piece, ImageInput) else shown_to
        positions = _text_positions(0, len(ids)) if self.rope == "sequential" else np.concatenate(blocks, axis=1)
        if prompt.max_tokens is not None and len(ids) > prompt.max_tokens:
            kept = max(prompt.max_tokens, shown_to)
            ids, positions, cut = ids[:kept], positions[:, :kept], cut + len(ids) - kept
        return ids, positions, pixels, cut

    def _joined_ids(self, piece: Joined, left: int) -> tuple[list[int], int, int]:
        """Token ids, and how many of the user's tokens were used and cut: at most `left` are kept."""
        runs: list[list[str | UserText]] = [[]]
        marks: list[int] = []
        for part in piece.parts:
            if isinstance(part, UserText):
                runs[-1].append(part)
                continue
            plain, *rest = self.split_template(part)
            runs[-1].append(plain)
            for token, text in zip(rest[::2], rest[1::2], strict=True):
                marks.append(_id_of(self.tokenizer, token))
                runs.append([text])
        ids, used, cut = self._run_ids(runs[0], left)
        cut += sum(len(self.plain_ids(part.dropped)) for part in piece.parts if isinstance(part, UserText) and part.dropped)
        for mark, run in zip(marks, runs[1:], strict=True):
            more, here, lost = self._run_ids(run, left - used)
            ids, used, cut = [*ids, mark, *more], used + here, cut + lost
        return ids, used, cut

    def _run_ids(self, run: Sequence[str | UserText], left: int) -> tuple[list[int], int, int]:
        """Parts without special tokens, as one text where the user's fit into `left`, else part by part and cut."""
        texts = [part.text if isinstance(part, UserText) else part for part in run]
        asked = sum(len(self.plain_ids(part.text)) for part in run if isinstance(part, UserText))
        if asked <= left:
            return list(self.plain_ids("".join(texts))), asked, 0
        ids: list[int] = []
        room = left
        for part, text in zip(run, texts, strict=True):
            found = self.plain_ids(text)
            if isinstance(part, UserText):
                found = found[:room]
                room -= len(found)
            ids += found
        return ids, left - room, asked - (left - room)

    def _split_template(self, text: str) -> tuple[str, ...]:
        """Template text around the tokens that the tokenizer knows by name: text, token, text, ..., text."""
        names = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return tuple(re.split(f"({'|'.join(re.escape(name) for name in names)})", text)) if names else (text,)

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without special tokens. Those of short texts alone are remembered, which bounds what is kept."""
        return self._short_ids(text) if len(text) <= _SHORT else self._encode_plain(text)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._core.encode(text, add_special_tokens=False).ids)

    def _patches(self, pixels: Sequence[Pixels], raw: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches in Qwen's order (merge groups together), float32 or `raw`, and grids [N, 3] in patches."""
        grids = torch.tensor([[1, p.shape[0] // self.image.patch, p.shape[1] // self.image.patch] for p in pixels])
        done: dict[int, torch.Tensor] = {}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(pixels):
            shapes.setdefault(image.shape, []).append(number)
        for numbers in shapes.values():
            cut = self._cut(torch.from_numpy(np.stack([pixels[n] for n in numbers])).permute(0, 3, 1, 2))
            done.update(zip(numbers, cut, strict=True))
        patches = torch.cat([done[n] for n in range(len(pixels))])
        return patches if raw else self.normalise(patches), grids

    def normalise(self, patches_PC: torch.Tensor) -> torch.Tensor:
        """Raw patches, uint8 [P, 3 * patch**2], as the vision tower reads them: float32 [P, 3 * temporal * patch**2]."""
        mean = torch.tensor(self.image.mean, dtype=torch.float32, device=patches_PC.device).view(3, 1)
        std = torch.tensor(self.image.std, dtype=torch.float32, device=patches_PC.device).view(3, 1)
        values = (patches_PC.view(len(patches_PC), 3, -1).float() / 255.0 - mean) / std
        return values.unsqueeze(2).expand(-1, -1, self.image.temporal, -1).reshape(len(patches_PC), -1)

    def _cut(self, image: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = image.shape
        patch, merge = self.image.patch, self.image.merge
        rows, columns = height // (patch * merge), width // (patch * merge)
        cells = image.reshape(count, channels, rows, merge, patch, columns, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
        return cells.reshape(count, rows * columns * merge**2, -1)


def sizes(height: int, width: int, budget: ImageBudget, place: str) -> Iterator[tuple[int, int]]:
    """Heights and widths that a picture is brought to, one after the other."""
    unit = budget.patch * budget.merge
    if budget.resize != "processor":
        bounds = replace(budget, min_pixels=4 * unit**2, max_pixels=16_384 * unit**2) if budget.resize == "both" else budget
        height, width = smart_resize(height, width, bounds, place, least=unit)
        yield height, width
    if budget.resize != "utils":
        yield smart_resize(height, width, budget, place)


def smart_resize(height: int, width: int, budget: ImageBudget, place: str = "picture", least: int = 0) -> tuple[int, int]:
    """Height and width, multiples of patch x merge, whose product lies within the budget and whose ratio stays close.

    The rule is Qwen2-VL's; qwen_vl_utils takes a side for `least` pixels at least. Raises PictureError for an aspect ratio
    beyond 200, which that rule refuses as well.
    """
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"{place}: aspect ratio {width}x{height} is beyond 200; crop the picture")
    unit = budget.patch * budget.merge
    high, wide = max(least, round(height / unit) * unit), max(least, round(width / unit) * unit)
    if high * wide > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        high = max(unit, math.floor(height / shrink / unit) * unit)
        wide = max(unit, math.floor(width / shrink / unit) * unit)
    elif high * wide < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        high, wide = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return high, wide


def check_read_out(name: str) -> ReadOut:
    for known in READ_OUTS:
        if name == known:
            return known
    raise InputError(f"read-out {name!r} is unknown; choose one of {', '.join(READ_OUTS)}")


def _text_positions(start: int, length: int) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int64), (3, length))


@lru_cache(maxsize=256)
def _grid_positions(rows: int, columns: int) -> npt.NDArray[np.int64]:
    """M-RoPE positions [3, rows * columns] of one picture: one time, its rows, its columns."""
    high, wide = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack([np.zeros(rows * columns, dtype=np.int64), high.ravel(), wide.ravel()])


@lru_cache(maxsize=256)
def _id_of(tokenizer: Any, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    # Of Qwen's tokenizers <|endoftext|> itself is the unknown token, as transformers 5 makes them.
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ModelError(
            f"the tokenizer has no token {token!r}; is this a Qwen-VL checkpoint, and is its --profile the right one?"
        )
    return int(found)
