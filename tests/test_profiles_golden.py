"""Each profile against what the project's own code gave for twelve inputs: literal token ids, positions, grids and pixels.

`golden_profiles.json` was written from runs of that code, not of ours, on small random checkpoints with Qwen's vocabulary as
PyPI's dashscope 2.0.2 has it; `source` names file, commit and version. The tokenizer in it is cut down to the tokens and merges
that these inputs need, at their real ids.

Ids: a list [N, id, ...] stands for N times those ids. Positions, the same in all three rows but for images: [start, N] counts
on from start, [start, rows, columns] is an image. Pixels: the mean of the patches, and six of their values. None of an image
with transparency where the project drops alpha, which we set on white (docs/third-party.md). A prompt ends at its pooling
position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_profiles import checkpoint
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from traceir.items import Item, Query
from traceir.model import load
from traceir.profiles import PROFILES

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_profiles.json").read_text())
PROJECTS: dict[str, Any] = GOLDEN["profiles"]
VOCABULARY = 151_936


def shown(width: int, height: int, mode: str) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    bands = [(x * 7 + y * 3) % 256, (x * 2 + y * 11) % 256, (x * y // 5) % 256, (x * 5) % 256][: len(mode)]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8), mode)


def tokenizer(special: list[str]) -> Qwen2Tokenizer:
    vocabulary = GOLDEN["vocab"] | {token: 151_643 + number for number, token in enumerate(special)}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in GOLDEN["merges"]])
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def ids_of(runs: list[Any]) -> Iterator[int]:
    for run in runs:
        yield from run[1:] * run[0] if isinstance(run, list) else [run]


def positions_of(blocks: list[list[int]]) -> np.ndarray:
    """[3, T] of blocks."""
    parts = []
    for start, *sides in blocks:
        if len(sides) == 1:
            parts.append(np.broadcast_to(np.arange(sides[0]), (3, sides[0])) + start)
        else:
            rows, columns = sides
            plane = [np.zeros(rows * columns, int), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)]
            parts.append(np.stack(plane) + start)
    return np.concatenate(parts, axis=1)


def inputs() -> Iterator[Query | Item]:
    for side, instruction, text, times, image in GOLDEN["inputs"]:
        content: dict[str, Any] = {"text": text and text * times, "image": image and shown(*image)}
        yield Query.of(**content, instruction=instruction) if side == "query" else Item.of(**content)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_reads_what_its_project_reads(tmp_path: Path, name: str) -> None:
    project, third = PROJECTS[name], name == "embed-rl"
    size = {"shortest_edge": project["min_pixels"], "longest_edge": project["max_pixels"]}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if third else {}
    kind, words = "qwen3_vl" if third else "qwen2_vl", tokenizer(project["special"])
    folder = checkpoint(tmp_path / name, kind, [], tokenizer=words, vocabulary=VOCABULARY, width=16, size=size, **statistics)
    model = load(folder, profile=name)
    for content, case in zip(inputs(), project["cases"], strict=True):
        layout = model.processor.forced(model.prompt(content, direct=True))
        assert layout.ids.tolist() == list(ids_of(case["ids"]))
        assert np.array_equal(layout.positions, positions_of(case["positions"]))
        assert layout.pooling_index == len(layout.ids) - 1
        batch = model.processor.collate([layout])
        assert ([] if batch.grids is None else batch.grids.tolist()) == [case[key] for key in ("grid",) if key in case]
        if "pixels" in case:
            assert batch.patches is not None
            patches = batch.patches.numpy()
            rows, columns = patches.shape
            points = [(int(rows * a), int(columns * b)) for a, b in ((0, 0), (0.2, 0.4), (0.4, 0.1), (0.6, 0.9), (0.8, 0.3))]
            values = [patches.mean(dtype=np.float64), *(patches[point] for point in (*points, (-1, -1)))]
            assert np.allclose(values, case["pixels"], atol=1e-5)
