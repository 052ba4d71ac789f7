"""How models that reason by themselves, and their servers, send a reply: thoughts before it, around it, or in a field apart.

The scripted teacher speaks in any of these ways, so that a build can be tried against each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

Message = dict[str, Any]
DRAFT: Final = (
    'The form {"complex": ..., "confidence": ...} is asked for. A draft: {"complex": false, "verdict": "no", "confidence": 0.1}, '
    "or <reasoning>a draft</reasoning><answer>draft</answer>? I'm sorry, I can't tell yet. Wait, look again."
)
"""Thoughts that hold all that may not be taken for the answer."""


def _said(content: Any, **more: Any) -> Message:
    return {"content": content, **more}


STYLES: Final[Mapping[str, Callable[[str], Message]]] = MappingProxyType(
    {
        "think": lambda text: _said(f"<think>\n{DRAFT}\n</think>\n\n{text}"),
        "thinking": lambda text: _said(f"<thinking>{DRAFT}</thinking>{text}"),
        "closed": lambda text: _said(f"{DRAFT}\n</think>\n\n{text}"),
        "unclosed": lambda text: _said(f"<think>\n{text}"),
        "field": lambda text: _said(text, reasoning_content=DRAFT),
        "null": lambda text: _said(None, reasoning_content=f"{DRAFT}</think>{text}"),
        "empty": lambda text: _said("", reasoning=text),
        "parts": lambda text: _said(
            [{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}, {"type": "text", "text": text}]
        ),
        "harmony": lambda text: _said(
            f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"
        ),
        "bare-harmony": lambda text: _said(f"analysis{DRAFT}assistantfinal{text}"),
        "magistral": lambda text: _said(f"[THINK]{DRAFT}[/THINK]{text}"),
        "fence": lambda text: _said(f"<think>{DRAFT}</think>\n```json\n{text}\n```"),
        "texts": lambda text: _said(f"<think>{DRAFT}</think>{_as_texts(text)}"),
    }
)
"""Way of speaking -> the message of a completion that says `text`."""


def cut(text: str) -> Message:
    """A reply that ran into its limit within its thoughts."""
    return _said(f"<think>\n{DRAFT} {DRAFT[:90]}")


def _as_texts(text: str) -> str:
    """An object with its numbers and booleans as texts; another text as it is."""
    if not text.startswith("{"):
        return text
    fields: Message = json.loads(text)
    fields = {name: "yes" if one is True else "No" if one is False else one for name, one in fields.items()}
    return json.dumps(fields | {"confidence": f"{fields['confidence']:.0%}"})
