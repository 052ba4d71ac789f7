"""How models that reason by themselves, and their servers, send a reply: thoughts before it, around it, or in a field apart.

The scripted teacher speaks in any of these ways, so that a build can be tried against each.
"""

from __future__ import annotations

import json
from typing import Any, Final

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
