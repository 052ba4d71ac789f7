"""What became of each training query: the files of all stages read back as one stream, part by part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from traceir.cot.ask import Case
from traceir.cot.build import is_finished, passed, read_lines, stage_file
from traceir.cot.plan import STAGES, BuildConfig, read_build, read_config
from traceir.cot.rules import duplicate_key
from traceir.cot.source import Part, Source, find_parts
from traceir.cot.stages import Line
from traceir.errors import DataError

Status = Literal["direct", "kept", "dropped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One training query after all stages.

    `status`: `direct` (z = 0), `kept` or `dropped`. `rule`: what dropped it, one of `rules.RULES`, `verifier`, or `teacher`
    (the endpoint refused the question, or its reply could not be read); "" otherwise. `detail`: why, in words, with the text
    that broke the rule. `verdict`: the verifier's yes or no, None where it was not asked; `verdict_confidence` from 0 to 1, -1.0
    where not asked. `raw` is the teacher's reply as it came, "" where there was none; `reasoning` and `answer` are without tags,
    "" where they could not be read. `provenance`: a JSON object: teacher, prompt version, seed, keys, cost.
    """

    case: Case
    z: int
    assessment: str
    confidence: float
    reasoning: str
    answer: str
    raw: str
    status: Status
    rule: str
    detail: str
    verdict: bool | None
    verdict_confidence: float
    verdict_reason: str
    provenance: str


def read_outcomes(out: Path, *, partial: bool = False, source: Source | None = None) -> Iterator[Outcome]:
    """The outcomes of a build in the order of its data, streamed; in memory are one part and 16 bytes a kept answer.

    `partial` leaves out parts that are not finished; without it they are a DataError. `source` is one that is open on the
    build's data; without it one is opened.
    """
    told, config = read_build(out), read_config(out)
    parts = find_parts(Path(config.data), config.part_size)
    if not partial and (missing := [part.name for part in parts if not is_finished(out, part)]):
        shown = f"{len(missing)} of {len(parts)} parts are not finished ({missing[0]} ...)"
        raise DataError(f"{out}: {shown}; run `traceir reasoning build` again")
    seen: set[bytes] = set()
    with nullcontext(source) if source else closing(Source(Path(config.data), config.tasks)) as opened:
        for part in parts:
            if is_finished(out, part):
                yield from _outcomes(out, part, opened, config, str(told["prompts"]), seen)


def _outcomes(out: Path, part: Part, source: Source, config: BuildConfig, prompts: str, seen: set[bytes]) -> Iterator[Outcome]:
    lines = {stage: {line["qid"]: line for line in read_lines(stage_file(out, stage, part))} for stage in STAGES}
    for case in source.cases(part):
        qid = case.record.qid
        found = [lines[stage].get(qid) for stage in STAGES]
        if found[0] is None:
            place = stage_file(out, "assess", part)
            raise DataError(f"{place}: no line for {qid}; the data have changed since, build into another folder")
        yield _outcome(case, found[0], found[1], found[2], found[3], config, prompts, seen)


def _outcome(
    case: Case, assessed: Line, reasoned: Line | None, filtered: Line | None, verified: Line | None,
    config: BuildConfig, prompts: str, seen: set[bytes],
) -> Outcome:  # fmt: skip
    status, rule, detail = _status(assessed, filtered, verified, config)
    answer = filtered["answer"] if filtered else ""
    if status == "kept":
        key = duplicate_key(case, answer)
        if key in seen:
            status, rule, detail = "dropped", "duplicate", "the task has this query and answer already"
        seen.add(key)
    return Outcome(
        case=case,
        z=assessed["z"],
        assessment=assessed["reason"],
        confidence=assessed["confidence"],
        reasoning=filtered["reasoning"] if filtered else "",
        answer=answer,
        raw=reasoned["raw"] if reasoned else "",
        status=status,
        rule=rule,
        detail=detail,
        verdict=verified["yes"] if verified else None,
        verdict_confidence=verified["confidence"] if verified else -1.0,
        verdict_reason=verified["reason"] if verified else "",
        provenance=_provenance(assessed, reasoned, verified, config, prompts),
    )


def _status(assessed: Line, filtered: Line | None, verified: Line | None, config: BuildConfig) -> tuple[Status, str, str]:
    """Status, rule and detail, without the rule on duplicates."""
    if assessed["error"]:
        return "dropped", "teacher", assessed["error"]
    if not assessed["z"]:
        return "direct", "", ""
    if filtered is None:
        return "dropped", "teacher", "there is no reply"
    if filtered["rule"]:
        return "dropped", filtered["rule"], filtered["detail"]
    if verified is None or verified["error"]:
        return "dropped", "teacher", verified["error"] if verified else "there is no verdict"
    if not passed(verified, config):
        word = "yes" if verified["yes"] else "no"
        return "dropped", "verifier", f"{word} at {verified['confidence']:.2f}: {verified['reason']}"
    return "kept", "", ""


def _provenance(assessed: Line, reasoned: Line | None, verified: Line | None, config: BuildConfig, prompts: str) -> str:
    asked = {stage: line for stage, line in (("assess", assessed), ("reason", reasoned), ("verify", verified)) if line}
    told = {
        "teacher": (reasoned or assessed)["model"] or config.model,
        "verifier": verified["model"] if verified else "",
        "prompts": prompts,
        "seed": config.seed,
        "attempts": {stage: line["attempt"] + 1 for stage, line in asked.items()},
        "keys": {stage: line["key"][:16] for stage, line in asked.items() if line["key"]},
        "prompt_tokens": sum(line["prompt_tokens"] for line in asked.values()),
        "completion_tokens": sum(line["completion_tokens"] for line in asked.values()),
    }
    return json.dumps(told, ensure_ascii=False)
