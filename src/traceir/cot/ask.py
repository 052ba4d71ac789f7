"""What a teacher is asked at each stage (paper, section 3: M-BEIR-CoT), and what its reply says.

Its prompts are in prompts.toml. A question shows the same few blocks to every teacher, each between tags (`<task>`,
`<instruction>`, `<query>`, `<target>`, `<proposal>`), and then its images; text from data cannot close a block.

A reply is read whatever its model, its chat template or its server put around it. Models that reason write their thoughts first:
between tags, of which the first may lie in the prompt and the last may be missing, or in channels. Others add fences, words, a
second object, or write numbers as texts. What is said stays as it is.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.outside import valid_all

Stage = Literal["assess", "reason", "verify"]
VERSION: Final = "cot-1"
BLOCKS: Final = ("task", "instruction", "query", "target", "proposal")
_BLOCK_TAG: Final = re.compile(rf"</?({'|'.join(BLOCKS)})>")
REASON_TOKENS: Final = 512
"""Tokens of a reply that reasons, thoughts of its own not counted."""
WORD_TOKENS: Final = 128
"""Tokens of an assessment or a verdict, likewise."""

CUT: Final = "it was cut at max_tokens"
MOST_TRIED: Final = 1000
"""Opening braces of a reply, counted from its end, at which an object is looked for."""
_THOUGHT: Final = r"(?:(?:seed:)?think(?:ing)?|thoughts?|analysis|reflection|scratchpad)"
_OPENED: Final = re.compile(
    rf"<{_THOUGHT}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel>\s*thought",
    re.IGNORECASE,
)
_CLOSED: Final = re.compile(rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<channel\|>", re.IGNORECASE)
"""The tags of Qwen, DeepSeek, Seed, Magistral, Kimi, OpenThinker and Gemma."""
_FINAL: Final = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
"""Before the answer in OpenAI's harmony format (gpt-oss)."""
_BARE_FINAL: Final = "assistantfinal"
"""The same where the server left out the special tokens: `analysis ... assistantfinal ...`."""
_MARK: Final = re.compile(r"<\|[a-z_]{1,24}\|>|</?s>|<end_of_turn>|<eos>")
_FENCED: Final = re.compile(r"```[\w-]*[ \t]*\n(.*?)\s*```|```(?:json|xml)?(.*?)```", re.DOTALL)
_FENCES: Final = re.compile(r"[\s`]*(?:json)?[\s`]*")
_FLAT: Final = re.compile(r"\{[^{}\\]{0,4000}\}")
_WORDS: Final = {"true": "True", "false": "False", "null": "None"}
_NUMBER: Final = re.compile(r"[+~≈]?\s*([0-9]{0,12}(?:[.,][0-9]{1,30})?)\s*(%|/\s*[0-9]{1,12})?")
_YES: Final = ("true", "yes", "y", "1")
_DECODER: Final = json.JSONDecoder(strict=False)
TEMPLATES: Final[Mapping[str, str]] = MappingProxyType(
    tomllib.loads((Path(__file__).parent / "prompts.toml").read_text(encoding="utf-8"))
)
"""Templates by name. `reason` holds `{strategy}`, filled by that of the case."""


@dataclass(frozen=True, slots=True)
class CotCase:
    """A training query with all that its questions may show. `positives` are those in the train pool, at least one."""

    record: mbeir.Record
    task: str
    instruction: str
    positives: tuple[mbeir.Candidate, ...]
    root: Path = field(compare=False)

    @property
    def strategy(self) -> str:
        """What its reasoning follows: `composed`, `knowledge` or `visual`."""
        query, candidate = mbeir.TASK_MODALITIES[self.record.task_id]
        if query == "image,text":
            return "composed" if candidate == "image" else "knowledge"
        return "visual" if "image" in query or candidate == "image" else "knowledge"


@dataclass(frozen=True, slots=True)
class TeacherQuestion:
    """One request to a teacher, whatever it is reached by.

    `parts` are texts (str) and image files (Path) in reading order; `attempt` counts from 0 and changes the seed, so that a
    question can be asked anew.
    """

    stage: Stage
    qid: str
    task: str
    attempt: int
    system: str
    parts: tuple[str | Path, ...]
    max_tokens: int
    temperature: float
    seed: int

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(part for part in self.parts if isinstance(part, Path))


@dataclass(frozen=True, slots=True)
class Questions:
    """Renders questions. `templates` override those of this file by name; `seed` is sent with every request.

    `max_tokens` is for replies that reason; what it has above the default is room for the thoughts of a model that reasons by
    itself, and is added to all questions.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = REASON_TOKENS

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.templates) - set(TEMPLATES)):
            raise DataError(f"template {unknown[0]!r} is unknown; the templates are {', '.join(TEMPLATES)}")

    @property
    def version(self) -> str:
        """`cot-1`, with eight hex digits of the overriding templates where there are any."""
        overriding = json.dumps(dict(self.templates), sort_keys=True, ensure_ascii=False).encode()
        return f"{VERSION}+{hashlib.sha256(overriding).hexdigest()[:8]}" if self.templates else VERSION

    def assess(self, case: CotCase, attempt: int = 0) -> TeacherQuestion:
        return self._question("assess", case, attempt, self._text("assess"))

    def reason(self, case: CotCase, attempt: int = 0) -> TeacherQuestion:
        return self._question("reason", case, attempt, self._text("reason").replace("{strategy}", self._text(case.strategy)))

    def verify(self, case: CotCase, answer: str, attempt: int = 0) -> TeacherQuestion:
        """The verifier sees the query and the true target, the first positive; of a text target its first 2,000 characters."""
        target = case.positives[0]
        shown = [block("target", target.text[:2000])] if target.text else []
        image = [case.root / target.image_path] if target.image_path else []
        kind = "image" if target.modality == "image" else "text"
        system = f"{self._text(f'verify-{kind}')}\n{self._text('verdict')}"
        return self._question("verify", case, attempt, system, *shown, block("proposal", answer), *image)

    def _text(self, name: str) -> str:
        return self.templates.get(name, TEMPLATES[name])

    def _question(self, stage: Stage, case: CotCase, attempt: int, system: str, *more: str | Path) -> TeacherQuestion:
        record = case.record
        query = [block("query", record.text)] if record.text else []
        text = "\n".join([block("task", case.task), block("instruction", case.instruction), *query])
        parts = (text, *([case.root / record.image_path] if record.image_path else []), *more)
        tokens = self.max_tokens if stage == "reason" else WORD_TOKENS + max(0, self.max_tokens - REASON_TOKENS)
        temperature = self.temperature if attempt == 0 else max(self.temperature, 0.7)
        return TeacherQuestion(
            stage, record.qid, case.task, attempt, system, parts, tokens, temperature, seed=self.seed + attempt
        )


def block(name: str, text: str) -> str:
    """`<name>text</name>`; a tag of any block within the text loses its angle brackets."""
    return f"<{name}>{_BLOCK_TAG.sub(lambda match: match[0][1:-1], text)}</{name}>"


def blocks(text: str) -> dict[str, str]:
    """The blocks of a question's text by name, as `block` wrote them."""
    return {match[1]: match[2] for match in re.finditer(rf"<({'|'.join(BLOCKS)})>(.*?)</\1>", text, re.DOTALL)}


class ReplyFormatError(ValueError):
    """A reply that does not say what was asked; the message says why, in words without anything of the reply."""


def spoken(text: str, finish: str = "stop") -> str:
    """What a reply says after its thoughts, without special tokens at its ends and a fence around the whole.

    Where it says nothing after them, the thoughts, unless it was cut off in their midst: a model may forget to end them, and a
    server may take an answer for one.
    """
    answer = _after_thoughts(text)
    if not answer.strip() and finish == "stop":
        answer = _OPENED.sub("", _CLOSED.sub("", text))
    answer = answer.strip()
    for _ in range(8):
        if mark := _MARK.match(answer):
            answer = answer[mark.end() :].strip()
        start = answer.rfind("<")
        if start >= 0 and _MARK.fullmatch(answer, start):
            answer = answer[:start].strip()
    fenced = _FENCED.fullmatch(answer)
    return (fenced[1] or fenced[2] or "").strip() if fenced else answer


def fields_of(text: str, finish: str, *wanted: str) -> dict[str, Any]:
    """The last whole JSON object of a reply that has all these fields, names in small letters. Raises ReplyFormatError.

    Of a reply that was cut only an object at its very beginning or end counts: any other may be from its thoughts.
    """
    try:
        whole = list(_holding(valid_all(_DECODER.decode(text)), wanted))  # also where a text within it looks like a tag
    except (ValueError, RecursionError):
        whole = []
    answer = spoken(text, finish)
    there = list(_objects(answer))
    if finish == "length":
        there = [
            (start, end, row)
            for start, end, row in there
            if _FENCES.fullmatch(answer, 0, start) or _FENCES.fullmatch(answer, end)
        ]
    held = whole or [fields for _, _, row in there for fields in _holding(row, wanted)]
    if held:
        return held[-1]
    if finish == "length":
        raise ReplyFormatError(CUT)
    if finish == "content_filter":
        raise ReplyFormatError("the teacher's content filter stopped it")
    if not answer:
        raise ReplyFormatError("it is empty")
    names = {name.strip().lower() for _, _, row in there for name in row}
    missing = [name for name in wanted if name not in names]
    if 0 < len(missing) < len(wanted):
        raise ReplyFormatError(f"its object has no {missing[0]}")
    raise ReplyFormatError(f"it holds no whole JSON object with {' and '.join(wanted)}")


def read_assessment(text: str, finish: str = "stop") -> dict[str, Any]:
    """z (1: complex), reason and confidence (0 to 1) of the assessment in a reply. Raises ReplyFormatError."""
    fields = _decided(text, finish, "complex")
    return {"z": int(fields["complex"]), "reason": fields["reason"], "confidence": fields["confidence"]}


def read_verdict(text: str, finish: str = "stop") -> dict[str, Any]:
    """What the verifier says of an answer: yes (or no), confidence (0 to 1) and reason. Raises ReplyFormatError."""
    fields = _decided(text, finish, "verdict")
    return {"yes": fields["verdict"], "confidence": fields["confidence"], "reason": fields["reason"]}


def _decided(text: str, finish: str, name: str) -> dict[str, Any]:
    """The fields of a reply of which `name` is yes or no, also as a boolean, a number or another word, and `confidence` is a
    number from 0 to 1, also as a text: 0.9, 0,9, 90 %, 9/10."""
    fields = fields_of(text, finish, name, "confidence")
    word, value = str(fields[name]).strip(" \t\n.!*'\"`").lower(), fields["confidence"]
    if word not in (*_YES, "false", "no", "n", "0"):
        raise ReplyFormatError(f"its {name} is neither yes nor no")
    if isinstance(value, str):
        number = _NUMBER.fullmatch(value.strip(" \t\n*'\"`"))
        divisor = (100.0 if number[2] == "%" else float((number[2] or "/1")[1:])) if number and number[1] else 0.0
        value = float(number[1].replace(",", ".")) / divisor if number and divisor else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ReplyFormatError("its confidence is no number from 0 to 1")
    return {name: word in _YES, "confidence": float(value), "reason": str(fields.get("reason") or "")}


def _after_thoughts(text: str) -> str:
    """What stands behind the last thought that has an end, and before one that has none; "" where there is nothing."""
    if finals := list(_FINAL.finditer(text)):
        return text[finals[-1].end() :].partition("<|start|>")[0]
    if "<|channel|>" in text:
        return ""
    final = text.rfind(_BARE_FINAL)
    if final > 0 and text.lstrip().startswith("analysis"):
        return text[final + len(_BARE_FINAL) :]
    closed = list(_CLOSED.finditer(text))
    answer = text[closed[-1].end() :] if closed else text
    opened = _OPENED.search(answer)
    return answer[: opened.start()] if opened else answer


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Whole objects that are in no other, with their positions, in order; also those written as Python writes them."""
    end = 0
    for brace in [match.start() for match in re.finditer(r"\{", text)][-MOST_TRIED:]:
        if brace < end:
            continue
        try:
            value, end = _DECODER.raw_decode(text, brace)
            yield brace, end, valid_all(value)
        except (ValueError, RecursionError):
            flat = _FLAT.match(text, brace)
            if flat and isinstance(value := _as_python(flat[0]), dict) and all(isinstance(name, str) for name in value):
                end = flat.end()
                yield brace, end, valid_all(value)


def _as_python(text: str) -> Any:
    """`{'complex': True, }`, with JSON's words or Python's; None where it is not that."""
    try:
        return ast.literal_eval(re.sub(r"\b(?:true|false|null)\b", lambda match: _WORDS[match[0]], text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _holding(value: Any, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects in JSON, itself or within it, that have all the wanted fields, in order."""
    if isinstance(value, dict):
        named = {str(name).strip().lower(): field for name, field in value.items()}
        if all(name in named for name in wanted):
            yield named
            return
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _holding(inner, wanted)
