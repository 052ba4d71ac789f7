"""What a teacher is asked at each stage (paper, section 3: M-BEIR-CoT).

Its prompts are in prompts.toml. A question shows the same few blocks to every teacher, each between tags (`<task>`,
`<instruction>`, `<query>`, `<target>`, `<proposal>`), and then its images; text from data cannot close a block.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from traceir.data import mbeir
from traceir.errors import DataError

Stage = Literal["assess", "reason", "verify"]
VERSION: Final = "cot-1"
BLOCKS: Final = ("task", "instruction", "query", "target", "proposal")
_BLOCK_TAG: Final = re.compile(rf"</?({'|'.join(BLOCKS)})>")
REASON_TOKENS: Final = 512
"""Tokens of a reply that reasons, thoughts of its own not counted."""
WORD_TOKENS: Final = 128
"""Tokens of an assessment or a verdict, likewise."""

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
