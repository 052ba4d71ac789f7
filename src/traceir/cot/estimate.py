"""What a build would ask and cost, from a sample of the data and no request at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.cot.ask import CotCase, TeacherQuestion
from traceir.cot.build import read_lines, stage_file
from traceir.cot.plan import BuildConfig
from traceir.cot.rules import count_tokens
from traceir.cot.source import CaseSource, DataPart
from traceir.images import ImageInput

SAMPLE: Final = 400
"""Queries looked at."""
PATCH: Final = 28
"""Side, in pixels, of the square of a image that is one token (Qwen2.5-VL)."""
REPLY_TOKENS: Final = {"assess": 40, "reason": 150, "verify": 40}
"""Tokens of a reply that is not known yet; a reasoning of the paper has 16 to 256, its answer 2 to 64."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """Requests and tokens of one stage."""

    stage: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


def estimate(
    config: BuildConfig, source: CaseSource, parts: Sequence[DataPart], out: Path | None = None, *, complex_share: float = 0.525
) -> list[StageEstimate]:
    """The three stages that ask. `complex_share` is the share of queries that reason where no assessment is done yet (the
    paper: 575,442 of 1,093,753); parts in `out` that are assessed tell their own. All complex ones are taken to pass the rules,
    and no question is asked twice, so this is what a build costs at most but for repeated attempts.
    """
    looked_at = parts[:: max(1, len(parts) // 25)]  # 25 to 50 parts, evenly spread, or all where there are fewer
    cases = [case for part in looked_at for case in source.cases(part)]
    if not cases:
        return [StageEstimate(stage, 0, 0, 0) for stage in REPLY_TOKENS]
    sampled, made = cases[:: max(1, len(cases) // SAMPLE)], config.questions()
    queries = len(cases) * sum(part.lines for part in parts) / sum(part.lines for part in looked_at)
    unasked = sum(case.task in (*config.direct, *config.complex) for case in sampled) / len(sampled)
    share = _complex_share(config, sampled, parts, out, complex_share)
    stages = {
        "assess": (1 - unasked, [made.assess(case) for case in sampled]),
        "reason": (share, [made.reason(case) for case in sampled]),
        "verify": (share, [made.verify(case, " ".join(["word"] * 16)) for case in sampled]),
    }
    found = []
    for stage, (asked_share, questions) in stages.items():
        requests = round(queries * asked_share)
        prompt = sum(tokens_of(question, config) for question in questions) / len(questions)
        found.append(StageEstimate(stage, requests, round(requests * prompt), requests * REPLY_TOKENS[stage]))
    return found


def tokens_of(question: TeacherQuestion, config: BuildConfig) -> int:
    """Prompt tokens of a question: its words, and a token for every 28 x 28 pixels of its images as they are sent."""
    texts = [question.system, *(part for part in question.parts if isinstance(part, str))]
    areas = [math.prod(ImageInput.open(path).size()) for path in question.images]
    patches = [math.ceil(min(area, config.pixels or area) / PATCH**2) for area in areas]
    return sum(count_tokens(text, config.limits.tokenizer) for text in texts) + sum(patches)


def estimate_table(found: Sequence[StageEstimate], price_in: float, price_out: float) -> str:
    """The estimate as text; prices in USD for a million tokens."""
    lines = [f"{'stage':<10}{'requests':>12}{'prompt tokens':>16}{'reply tokens':>15}{'USD':>12}"]
    columns = zip(*((row.requests, row.prompt_tokens, row.completion_tokens) for row in found), strict=True)
    for row in [*found, StageEstimate("all", *map(sum, columns))]:
        money = (row.prompt_tokens * price_in + row.completion_tokens * price_out) / 1e6
        lines.append(f"{row.stage:<10}{row.requests:>12,}{row.prompt_tokens:>16,}{row.completion_tokens:>15,}{money:>12,.2f}")
    return "\n".join(lines)


def _complex_share(
    config: BuildConfig, sampled: Sequence[CotCase], parts: Sequence[DataPart], out: Path | None, otherwise: float
) -> float:
    assessed = [stage_file(out, "assess", part) for part in parts] if out else []
    if shares := [int(line["z"]) for file in assessed if file.exists() for line in read_lines(file)]:
        return sum(shares) / len(shares)
    known = dict.fromkeys(config.direct, 0.0) | dict.fromkeys(config.complex, 1.0)
    return sum(known.get(case.task, otherwise) for case in sampled) / len(sampled)
