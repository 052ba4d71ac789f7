"""What a build would ask and cost, from a sample of the data and no request at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from traceir.cot.ask import Case, Question
from traceir.cot.build import read_lines, stage_file
from traceir.cot.plan import BuildConfig
from traceir.cot.rules import count_tokens
from traceir.cot.source import Part, Source
from traceir.errors import ImageError

SAMPLE: Final = 400
"""Queries looked at."""
PATCH: Final = 28
"""Side, in pixels, of the square of a picture that is one token (Qwen2.5-VL)."""
REPLY_TOKENS: Final = {"assess": 40, "reason": 150, "verify": 40}
"""Tokens of a reply that is not known yet; a reasoning of the paper has 16 to 256, its answer 2 to 64."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Requests and tokens of one stage."""

    stage: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def estimate(
    config: BuildConfig, source: Source, parts: Sequence[Part], out: Path | None = None, *, complex_share: float = 0.525
) -> list[Estimate]:
    """The three stages that ask. `complex_share` is the share of queries that reason where no assessment is done yet (the
    paper: 575,442 of 1,093,753); parts in `out` that are assessed tell their own. All complex ones are taken to pass the rules,
    and no question is asked twice, so this is what a build costs at most but for repeated attempts.
    """
    looked = _looked_at(parts)
    cases = [source.cases(part) for part in looked]
    there = sum(len(found) for found in cases)
    if not there:
        return [Estimate(stage, 0, 0, 0) for stage in REPLY_TOKENS]
    sampled = [case for found in cases for case in found][:: max(1, there // SAMPLE)]
    queries = there * sum(part.lines for part in parts) / sum(part.lines for part in looked)
    unasked = sum(case.task in config.direct or case.task in config.complex for case in sampled) / len(sampled)
    share = _complex_share(config, sampled, parts, out, complex_share)
    made = config.questions()
    each = {
        "assess": [made.assess(case) for case in sampled],
        "reason": [made.reason(case) for case in sampled],
        "verify": [made.verify(case, " ".join(["word"] * 16)) for case in sampled],
    }
    counts = {"assess": queries * (1 - unasked), "reason": queries * share, "verify": queries * share}
    found = []
    for stage, questions in each.items():
        requests = round(counts[stage])
        prompt = sum(tokens_of(question, config) for question in questions) / len(questions)
        found.append(Estimate(stage, requests, round(requests * prompt), requests * REPLY_TOKENS[stage]))
    return found


def tokens_of(question: Question, config: BuildConfig) -> int:
    """Prompt tokens of a question: its words, and a token for every 28 x 28 pixels of its pictures as they are sent."""
    texts = [question.system, *(part for part in question.parts if isinstance(part, str))]
    return sum(count_tokens(text, config.limits.tokenizer) for text in texts) + sum(
        image_tokens(path, config.pixels) for path in question.images
    )


def image_tokens(path: Path, pixels: int) -> int:
    """Tokens of a picture shrunk to at most `pixels` (0: as it is). Reads its header alone."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: cannot be read as a picture ({error}); replace the file") from error
    area = min(width * height, pixels) if pixels else width * height
    return math.ceil(area / PATCH**2)


def estimate_table(found: Sequence[Estimate], price_in: float, price_out: float) -> str:
    """The estimate as text; prices in USD for a million tokens."""
    lines = [f"{'stage':<10}{'requests':>12}{'prompt tokens':>16}{'reply tokens':>15}{'USD':>12}"]
    total = Estimate(
        "all",
        sum(one.requests for one in found),
        sum(one.prompt_tokens for one in found),
        sum(one.completion_tokens for one in found),
    )
    for one in [*found, total]:
        money = (one.prompt_tokens * price_in + one.completion_tokens * price_out) / 1e6
        lines.append(f"{one.stage:<10}{one.requests:>12,}{one.prompt_tokens:>16,}{one.completion_tokens:>15,}{money:>12,.2f}")
    return "\n".join(lines)


def _looked_at(parts: Sequence[Part]) -> Sequence[Part]:
    """Some 25 to 50 parts, evenly spread, or all where there are fewer."""
    return parts[:: max(1, len(parts) // 25)]


def _complex_share(
    config: BuildConfig, sampled: Sequence[Case], parts: Sequence[Part], out: Path | None, otherwise: float
) -> float:
    assessed = [stage_file(out, "assess", part) for part in parts] if out else []
    lines = [line for file in assessed if file.exists() for line in read_lines(file)]
    if lines:
        return sum(int(line["z"]) for line in lines) / len(lines)
    known = [1.0 if case.task in config.complex else 0.0 if case.task in config.direct else otherwise for case in sampled]
    return sum(known) / len(known)
