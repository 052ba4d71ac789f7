"""Faults on demand for the scripted teacher, decided by the content of a question alone, so that a resumed run sees the same; and
the ways in which models that reason by themselves, and their servers, send their thoughts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import TEMPLATES, Stage
from traceir.cot.rules import plain
from traceir.cot.scripted.oracle import Oracle, ReadQuestion
from traceir.errors import InputError

Message = dict[str, Any]
_DATA: Final = json.loads((Path(__file__).parent / "faults.json").read_text(encoding="utf-8"))
MEANT: Final[Mapping[str, str]] = {kind: fault["rule"] for kind, fault in _DATA["content"].items()} | {"bad_json": "teacher"}
"""Fault -> what is meant to drop its reply: one of rules.RULES, `verifier`, or `teacher` where the reply cannot be read."""
CONTENT: Final[tuple[str, ...]] = tuple(_DATA["content"])
"""Faults of replies that write reasoning."""
UNREADABLE: Final = ("bad_json",)
"""Faults of the other replies."""
TRANSPORT: Final = ("rate_limit", "server_error", "stall", "cut")
"""Faults of the connection, at any stage: status 429, status 500, a reply that never comes, one that breaks off."""
ALL: Final = (*CONTENT, *UNREADABLE, *TRANSPORT)
STYLES: Final[Mapping[str, Message]] = _DATA["styles"]
"""How models and servers send thoughts -> the message of a completion, with $DRAFT for thoughts that hold all that may not be
taken for the answer, and $TEXT for the answer; `cut` is one that ran into its limit within its thoughts, `texts` writes the
numbers and booleans of an object as texts."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Which questions meet a fault: a share of `rate`, drawn by `seed`.

    Of the questions for reasoning, `rate` get a fault of content, and of the rest `rate` one of transport; of all other questions
    `rate` get one of transport or an unreadable reply. Kinds have equal shares. Raises InputError for a bad rate or kind.
    """

    rate: float
    seed: int = 0
    kinds: Collection[str] = ALL

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(f"the rate of faults is {self.rate}; it must be from 0 to 1")
        if unknown := sorted(set(self.kinds) - set(ALL)):
            raise InputError(f"fault {unknown[0]!r} is unknown; the faults are {', '.join(ALL)}")

    def fault_of(self, digest: str, stage: Stage, barred: Collection[str] = ()) -> str | None:
        """The fault of a question by the digest of its content; None for most. `barred` kinds cannot be shown by its reply."""
        drawn = hashlib.sha256(f"{self.seed}:{digest}".encode()).digest()
        draws = (int.from_bytes(drawn[start : start + 4]) / 2**32 for start in range(0, 32, 4))
        for group in (CONTENT, TRANSPORT) if stage == "reason" else ((*UNREADABLE, *TRANSPORT),):
            left = [kind for kind in group if kind in self.kinds and kind not in barred]
            met, kind_draw = next(draws) < self.rate, next(draws)
            if met and left:
                return left[int(kind_draw * len(left))]
        return None


def barred_for(asked: ReadQuestion, oracle: Oracle) -> tuple[str, ...]:
    """The faults that the reply to this question cannot show: no image to copy from, no other answer to mistake it for."""
    if asked.stage != "reason":
        return ()
    source, answer = plain(asked.known.source), plain(asked.known.answer)
    copied = () if len(source.split()) > 1 and source != answer else ("source_copy",)
    return copied if oracle.other(asked.known, 0) else (*copied, "hallucination")


def spoil(kind: str, asked: ReadQuestion, oracle: Oracle) -> tuple[str, str]:
    """The spoilt reply and its finish reason, equal for equal questions. `kind`: of CONTENT or UNREADABLE."""
    draw, known = random.Random(int(asked.digest, 16)), asked.known
    if kind == "bad_json":
        return draw.choice(_DATA["unreadable"][asked.stage]), "stop"
    other = oracle.other(known, draw.getrandbits(32)) or known
    sentences = re.split(r"(?<=[.:])\s", f"{asked.system} {TEMPLATES['reason']}")
    text = draw.choice(_DATA["content"][kind]["texts"]).format(
        reasoning=known.reasoning,
        answer=known.answer,
        source=known.source,
        other_reasoning=other.reasoning,
        other_answer=other.answer,
        start=" ".join(known.reasoning.split()[:12]),
        leak=next(text.strip() for text in sentences if len(text.split()) > 8 and not set("<{") & set(text)),
    )
    return (text[: int(len(text) * draw.uniform(0.3, 0.85))], "length") if kind == "truncated" else (text, "stop")


def styled(style: str, text: str) -> Message:
    """The message of a completion that says `text` in this style; "" is plain."""
    if style == "texts" and text.startswith("{"):
        words = {True: "yes", False: "No"}
        fields = {name: words[value] if isinstance(value, bool) else value for name, value in json.loads(text).items()}
        text = json.dumps(fields | {"confidence": f"{fields['confidence']:.0%}"})
    template = json.dumps(STYLES[style] if style else {"content": "$TEXT"})
    for name, shown in (("$DRAFT", _DATA["draft"]), ("$TEXT", text)):
        template = template.replace(name, json.dumps(shown)[1:-1])
    message: Message = json.loads(template)
    return message
