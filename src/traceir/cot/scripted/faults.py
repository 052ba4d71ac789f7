"""Faults on demand for the scripted teacher, decided by the content of a question alone, so that a resumed run sees the same; and
the ways in which models that reason by themselves, and their servers, send their thoughts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from traceir.cot.ask import TEMPLATES, Stage
from traceir.cot.rules import plain
from traceir.cot.scripted.oracle import Oracle, ReadQuestion, well_formed
from traceir.errors import InputError

_GOOD: Final = well_formed("{reasoning}", "{answer}")
_STEPS: Final = "; ".join(f"In step {n} all parts are looked at again and compared with part {n}, which stays" for n in range(24))
_THINGS: Final = ", not ".join(f"a {colour} {shape}" for colour in ("red", "green", "blue", "black") for shape in
                               ("lamp", "boat", "tree", "chair", "kite", "door"))  # fmt: skip
_LOOPS: Final = ("; so it is the same one", "; wait, look at it again")
_FOREIGN: Final = (
    well_formed(
        "Auf dem Bild sieht man einen kleinen roten Würfel und eine Kugel, und daneben liegen noch zwei weitere Dinge auf dem "
        "Tisch. Deshalb muss das gesuchte Bild eine andere Farbe haben.",
        "ein kleiner blauer Würfel neben einer Kugel",
    ),
    well_formed(
        "La photo montre une longue veste verte à rayures, et derrière se trouve une grande maison au bord de l'eau. Tout le "
        "reste demeure exactement comme il était avant.",
        "une veste courte et jaune sans rayures",
    ),
    well_formed(
        "На картинке виден маленький красный куб и рядом с ним шар, а на столе лежат ещё два других предмета. Поэтому искомый "
        "предмет должен быть другого цвета.",
        "маленький синий куб рядом с шаром",
    ),
    well_formed(
        "图片里，有一个红色的方块，旁边，是一个绿色的球，桌子上，还放着两样东西，一大，一小。所以，要找的东西，应该是另一种颜色。",
        "{answer}",
    ),
)
_TAGS: Final = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_FAULTS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "refusal": (
        "refusal",
        (
            "I'm sorry, but I can't help with this request.",
            "As an AI language model, I have no eyes and see no pictures.",
            "Unfortunately I am not able to view the picture that was attached.",
            well_formed("I cannot assist with this. What the picture shows cannot be told from what was sent.", "no answer"),
        ),
    ),
    "truncated": ("truncated", (_GOOD,)),
    "missing_tag": ("tags", tuple(_GOOD.replace(tag, "") for tag in _TAGS)),
    "doubled_tag": ("tags", (*(_GOOD.replace(tag, tag * 2) for tag in _TAGS), f"{_GOOD}<answer>{{answer}}</answer>")),
    "swapped": ("order", ("<answer>{answer}</answer><reasoning>{reasoning}</reasoning>",)),
    "nested": (
        "nesting",
        (
            "<reasoning>{reasoning}<answer>{answer}</answer></reasoning>",
            "<reasoning>{reasoning}<answer></reasoning>{answer}</answer>",
            "<answer><reasoning>{reasoning}</reasoning>{answer}</answer>",
        ),
    ),
    "text_before": ("outside", (f"Sure! Here is the reasoning that was asked for:\n{_GOOD}", f"```xml\n{_GOOD}")),
    "text_after": ("outside", (f"{_GOOD}\n\nNote: the picture is small.", f"{_GOOD}\n```", f"{_GOOD}\nConfidence: 0.95")),
    "prompt_leak": ("prompt_leak", (well_formed("{leak} {reasoning}", "{answer}"),)),
    "too_short": ("reasoning_length", (well_formed("As shown.", "{answer}"), well_formed("Obvious.", "{answer}"))),
    "too_long": ("reasoning_length", (well_formed(f"{{reasoning}}; {_STEPS}", "{answer}"),)),
    "answer_short": ("answer_length", (well_formed("{reasoning}", "it"), well_formed("{reasoning}", "yes"))),
    "answer_long": ("answer_length", (well_formed("{reasoning}", f"{{answer}}, which is not {_THINGS}"),)),
    "loop": ("repetition", tuple(well_formed("{start}" + loop * 12, "{answer}") for loop in _LOOPS)),
    "wrong_language": ("language", _FOREIGN),
    "source_copy": ("source_copy", (well_formed("{reasoning}", "{source}"),)),
    "hallucination": ("verifier", (well_formed("{other_reasoning}", "{other_answer}"),)),
}
"""Fault of a reply that writes reasoning -> what is meant to drop it (one of rules.RULES, or `verifier`), and its wordings."""
MEANT: Final[Mapping[str, str]] = {**{kind: rule for kind, (rule, _) in _FAULTS.items()}, "bad_json": "teacher"}
"""`teacher`: a reply that cannot be read."""
CONTENT: Final = tuple(_FAULTS)
"""Faults of replies that write reasoning."""
UNREADABLE: Final = ("bad_json",)
"""Faults of the other replies."""
TRANSPORT: Final = ("rate_limit", "server_error", "stall", "cut")
"""Faults of the connection, at any stage: status 429, status 500, a reply that never comes, one that breaks off."""
ALL: Final = (*CONTENT, *UNREADABLE, *TRANSPORT)
_NO_JSON: Final[Mapping[Stage, tuple[str, ...]]] = {
    "assess": (
        "I would call this query complex.",
        '{"complex": true, "reason": "the change is',
        '{"complex": "maybe", "reason": "hard to tell", "confidence": 0.8}',
        '{"z": 1}',
    ),
    "verify": (
        "Yes, that fits the picture.",
        '{"verdict": "yes", "confid',
        '{"verdict": "yes", "confidence": "high", "reason": "it fits"}',
        '{"verdict": "perhaps", "confidence": 0.8}',
    ),
}


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
        draws = _draws(f"{self.seed}:{digest}")
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
        return draw.choice(_NO_JSON[asked.stage]), "stop"
    other = oracle.other(known, draw.getrandbits(32)) or known
    sentences = re.split(r"(?<=[.:])\s", f"{asked.system} {TEMPLATES['reason']}")
    text = draw.choice(_FAULTS[kind][1]).format(
        reasoning=known.reasoning,
        answer=known.answer,
        source=known.source,
        other_reasoning=other.reasoning,
        other_answer=other.answer,
        start=" ".join(known.reasoning.split()[:12]),
        leak=next(text.strip() for text in sentences if len(text.split()) > 8 and not set("<{") & set(text)),
    )
    return (text[: int(len(text) * draw.uniform(0.3, 0.85))], "length") if kind == "truncated" else (text, "stop")


def _draws(seed: str) -> Iterator[float]:
    """Eight numbers from 0 to below 1."""
    digest = hashlib.sha256(seed.encode()).digest()
    return (int.from_bytes(digest[start : start + 4], "big") / 2**32 for start in range(0, 32, 4))


Message = dict[str, Any]
DRAFT: Final = (
    'The form {"complex": ..., "confidence": ...} is asked for. A draft: {"complex": false, "verdict": "no", "confidence": 0.1}, '
    "or <reasoning>a draft</reasoning><answer>draft</answer>? I'm sorry, I can't tell yet. Wait, look again."
)
"""Thoughts that hold all that may not be taken for the answer."""
STYLES: Final[dict[str, Message]] = {
    "think": {"content": "<think>\n$DRAFT\n</think>\n\n$TEXT"},
    "thinking": {"content": "<thinking>$DRAFT</thinking>$TEXT"},
    "closed": {"content": "$DRAFT\n</think>\n\n$TEXT"},
    "unclosed": {"content": "<think>\n$TEXT"},
    "field": {"content": "$TEXT", "reasoning_content": "$DRAFT"},
    "null": {"content": None, "reasoning_content": "$DRAFT</think>$TEXT"},
    "empty": {"content": "", "reasoning": "$TEXT"},
    "parts": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "$DRAFT"}]},
            {"type": "text", "text": "$TEXT"},
        ]
    },
    "harmony": {
        "content": "<|channel|>analysis<|message|>$DRAFT<|end|><|start|>assistant<|channel|>final<|message|>$TEXT<|return|>"
    },
    "bare-harmony": {"content": "analysis$DRAFTassistantfinal$TEXT"},
    "magistral": {"content": "[THINK]$DRAFT[/THINK]$TEXT"},
    "fence": {"content": "<think>$DRAFT</think>\n```json\n$TEXT\n```"},
    "texts": {"content": "<think>$DRAFT</think>$TEXT"},
    "cut": {"content": "<think>\n$DRAFT What is it"},
}
"""Way of speaking -> the message of a completion; `cut` is one that ran into its limit within its thoughts, `texts` writes the
numbers and booleans of an object as texts."""


def styled(style: str, text: str) -> Message:
    """The message of a completion that says `text` in this way; "" is plain."""
    if style == "texts" and text.startswith("{"):
        words = {True: "yes", False: "No"}
        fields = {name: words[value] if isinstance(value, bool) else value for name, value in json.loads(text).items()}
        text = json.dumps(fields | {"confidence": f"{fields['confidence']:.0%}"})
    filled: Message = _fill(STYLES[style] if style else {"content": "$TEXT"}, text)
    return filled


def _fill(template: Any, text: str) -> Any:
    if isinstance(template, dict):
        return {name: _fill(value, text) for name, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, text) for value in template]
    return template.replace("$DRAFT", DRAFT).replace("$TEXT", text) if isinstance(template, str) else template
