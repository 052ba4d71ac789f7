"""What became of each training query: the files of all stages read back as one stream, part by part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from traceir.cot.ask import CotCase
from traceir.cot.build import Line, is_finished, passed, read_lines, stage_file
from traceir.cot.plan import STAGES, BuildConfig, read_build, read_config
from traceir.cot.rules import duplicate_key
from traceir.cot.source import CaseSource, DataPart, find_parts
from traceir.errors import DataError

Status = Literal["direct", "kept", "dropped"]


@dataclass(frozen=True, slots=True)
class CotOutcome:
    """One training query after all stages.

    `status`: `direct` (z = 0), `kept` or `dropped`. `rule`: what dropped it, one of `rules.RULES`, `verifier`, or `teacher`
    (the endpoint refused the question, or its reply could not be read); "" otherwise. `detail`: why, in words, with the text
    that broke the rule. `verdict`: the verifier's yes or no, None where it was not asked; `verdict_confidence` from 0 to 1, -1.0
    where not asked. `raw` is the teacher's reply as it came, "" where there was none; `reasoning` and `answer` are without tags,
    "" where they could not be read. `provenance`: a JSON object: teacher, prompt version, seed, keys, cost.
    """

    case: CotCase
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


def read_outcomes(out: Path, *, partial: bool = False, source: CaseSource | None = None) -> Iterator[CotOutcome]:
    """The outcomes of a build in the order of its data, streamed; in memory are one part and 16 bytes a kept answer.

    `partial` leaves out parts that are not finished; without it they are a DataError. `source` is one that is open on the
    build's data; without it one is opened.
    """
    prompts, config = str(read_build(out)["prompts"]), read_config(out)
    parts = find_parts(Path(config.data), config.part_size)
    finished = [part for part in parts if is_finished(out, part)]
    if not partial and len(finished) < len(parts):
        first = next(part.name for part in parts if part not in finished)
        shown = f"{len(parts) - len(finished)} of {len(parts)} parts are not finished ({first} ...)"
        raise DataError(f"{out}: {shown}; run `traceir reasoning build` again")
    seen: set[bytes] = set()
    with nullcontext(source) if source else closing(CaseSource(Path(config.data), config.tasks)) as opened:
        for part in finished:
            yield from _outcomes(out, part, opened, config, prompts, seen)


def _outcomes(
    out: Path, part: DataPart, source: CaseSource, config: BuildConfig, prompts: str, seen: set[bytes]
) -> Iterator[CotOutcome]:
    files = {stage: {line["qid"]: line for line in read_lines(stage_file(out, stage, part))} for stage in STAGES}
    for case in source.cases(part):
        lines = {stage: by_qid[case.record.qid] for stage, by_qid in files.items() if case.record.qid in by_qid}
        if "assess" not in lines:
            where = f"{stage_file(out, 'assess', part)}: no line for {case.record.qid}"
            raise DataError(f"{where}; the data have changed since, build into another folder")
        assessed, verified = lines["assess"], lines.get("verify", {})
        texts = lines.get("filter", {"reasoning": "", "answer": ""})
        status, rule, detail = _status(lines, config)
        if status == "kept":
            key = duplicate_key(case, texts["answer"])
            if key in seen:
                status, rule, detail = "dropped", "duplicate", "the task has this query and answer already"
            seen.add(key)
        yield CotOutcome(
            case=case,
            z=assessed["z"],
            assessment=assessed["reason"],
            confidence=assessed["confidence"],
            reasoning=texts["reasoning"],
            answer=texts["answer"],
            raw=lines.get("reason", {"raw": ""})["raw"],
            status=status,
            rule=rule,
            detail=detail,
            verdict=verified.get("yes"),
            verdict_confidence=verified.get("confidence", -1.0),
            verdict_reason=verified.get("reason", ""),
            provenance=_provenance(lines, config, prompts),
        )


def _status(lines: Mapping[str, Line], config: BuildConfig) -> tuple[Status, str, str]:
    """Status, rule and detail, without the rule on duplicates."""
    assessed, filtered, verified = (lines.get(stage) for stage in ("assess", "filter", "verify"))
    if assessed and assessed["error"]:
        return "dropped", "teacher", assessed["error"]
    if not assessed or not assessed["z"]:
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


def _provenance(lines: Mapping[str, Line], config: BuildConfig, prompts: str) -> str:
    asked = {stage: line for stage, line in lines.items() if stage != "filter"}
    provenance = {
        "teacher": asked.get("reason", asked["assess"])["model"] or config.model,
        "verifier": asked.get("verify", {"model": ""})["model"],
        "prompts": prompts,
        "seed": config.seed,
        "attempts": {stage: line["attempt"] + 1 for stage, line in asked.items()},
        "keys": {stage: line["key"][:16] for stage, line in asked.items() if line["key"]},
        "prompt_tokens": sum(line["prompt_tokens"] for line in asked.values()),
        "completion_tokens": sum(line["completion_tokens"] for line in asked.values()),
    }
    return json.dumps(provenance, ensure_ascii=False)
