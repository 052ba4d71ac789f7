"""What comes back from an OpenAI-compatible address: a chat completion, or an error, in whatever shape, as a Reply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

from traceir.errors import TeacherError
from traceir.outside import read_json, valid

_FINISHES: Final = dict.fromkeys(("length", "max_tokens", "model_length"), "length") | dict.fromkeys(
    ("content_filter", "safety"), "content_filter"
)
"""What servers say of how a reply ended, and our word for it; whatever else they say is `stop`."""
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which servers send thoughts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `finish`: `stop`, `length`, `content_filter`, or `error` with the reason in `error`; `key`: of the request.

    Its texts are valid (outside.valid) and its tokens from 0 to 2^31 - 1, whatever a server or a file said.
    """

    text: str
    finish: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        for name in ("text", "model", "error"):
            object.__setattr__(self, name, valid(getattr(self, name)))
        for name in ("prompt_tokens", "completion_tokens"):
            object.__setattr__(self, name, tokens_in(getattr(self, name)))


@dataclass(eq=False)
class RetryableError(TeacherError):
    """A request that failed and may be sent again.

    `overloaded`: fewer requests at a time may help. `retry_after`: seconds the teacher asks to wait. `reached`: an answer came,
    if not a good one. `garbled`: it came with success and is no chat completion; it may have been paid for.
    """

    message: str
    overloaded: bool = False
    retry_after: float | None = None
    reached: bool = True
    garbled: bool = False

    def __str__(self) -> str:
        return self.message


def reply_of(text: str | bytes, model: str) -> Reply:
    """The Reply in a chat completion's JSON. Raises RetryableError where it is not one."""
    try:
        return read_completion(read_json(text), model)
    except ValueError as error:
        raise _garbled(text if isinstance(text, str) else text.decode(errors="replace")) from error


def read_completion(found: Any, model: str) -> Reply:
    """`reply_of` for parsed JSON; `model` stands in where the completion names none. One without a choice is a refusal."""
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list):
        raise _garbled(str(found))
    usage, named = found.get("usage"), str(found.get("model") or model)[:200]
    counts = usage if isinstance(usage, dict) else {}
    tokens = tokens_in(counts.get("prompt_tokens")), tokens_in(counts.get("completion_tokens"))
    if not choices or not isinstance(choices[0], dict):
        return Reply("", "error", named, *tokens, "the completion holds no choice")
    message, finish = choices[0].get("message"), str(choices[0].get("finish_reason")).lower()
    return Reply(_content(message) if isinstance(message, dict) else "", _FINISHES.get(finish, "stop"), named, *tokens)


def tokens_in(value: object) -> int:
    """A number of tokens, also as a text or a float; 0, which is unknown, for what cannot be one."""
    whole = re.fullmatch(r"([0-9]{1,10})(\.0*)?", str(value)) if isinstance(value, (str, float)) else None
    value = int(whole[1]) if whole else value
    return value if type(value) is int and 0 <= value < 2**31 else 0


def error_of(text: str) -> tuple[str, str]:
    """Code and message of an error's body, on one line, cut to 500 characters; the body itself where it has no such fields."""
    code = ""
    try:
        found = read_json(text)
        found = found.get("error", found)
        if isinstance(found, dict):
            code, text = str(found.get("code") or ""), str(found.get("message") or text)
    except (ValueError, AttributeError):
        pass
    return code, " ".join(valid(text[:500]).split())


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date (`now`: epoch s)."""
    try:
        if (value := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(value) / 1000)
        if (value := headers.get("retry-after")) is None:
            return None
        seconds = float(value) if re.fullmatch(r"[\d.]+", value.strip()) else parsedate_to_datetime(value).timestamp() - now
        return max(0.0, seconds)
    except (ValueError, TypeError, OverflowError):
        return None


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, of a list of parts those that are no thought; of a refusal without text its words.

    Where a server has put all into the field of the thoughts, they come as one that has no end (replies.spoken).
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    text = json.dumps(content) if isinstance(content, dict) else "" if content is None else str(content)
    if text.strip():
        return text
    if refused := message.get("refusal"):
        return str(refused)
    thought = next((value for name in _THOUGHTS if isinstance(value := message.get(name), str)), "")
    return f"<think>{thought}" if thought.strip() else text


def _part(part: object) -> str:
    if not isinstance(part, dict):
        return part if isinstance(part, str) else ""
    return str(part.get("text") or "") if part.get("type") not in ("thinking", "reasoning") else ""


def _garbled(text: str) -> RetryableError:
    return RetryableError(f"the teacher's answer is not a chat completion: {text[:200]!r}", garbled=True)
