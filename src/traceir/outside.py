"""Text and JSON that others wrote, made valid where they come in, so that whatever holds them can be written again.

JSON can spell what is no text (half of a surrogate pair, as `"\\ud83d"`) or what no file name and few readers take (NUL).
Such a character becomes U+FFFD here, so that later code need not expect it. The server refuses it (serve/bodies.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from traceir.errors import InputError

REPLACED: Final = "\ufffd"
_INVALID: Final = re.compile("[\ud800-\udfff\x00]")


def valid(text: str) -> str:
    """The text with U+FFFD for each lone surrogate and each NUL."""
    return text if text.isascii() and "\x00" not in text else _INVALID.sub(REPLACED, text)


def valid_all(value: Any) -> Any:
    """Plain JSON with `valid` texts and names, at any depth."""
    if isinstance(value, str):
        return valid(value)
    if isinstance(value, dict):
        return {valid(name): valid_all(inner) for name, inner in value.items()}
    return [valid_all(inner) for inner in value] if isinstance(value, list) else value


def read_json(raw: bytes | str) -> Any:
    """The value of JSON in UTF-8, with or without a mark; invalid bytes and characters become U+FFFD.

    Raises ValueError, and nothing else, for what is no JSON, nested too deeply, or a number of more than 4,300 digits. NaN and
    infinity come as floats and integers at any size: who uses a number checks it.
    """
    text = raw.decode("utf-8-sig", "replace") if isinstance(raw, bytes) else valid(raw).removeprefix("\ufeff")
    try:
        value = json.loads(text)
        return valid_all(value) if "\\u" in text else value
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def lines_of(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, each `what`, as they are; InputError where it cannot be read or is no such text."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a text file, one {what} a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, one {what} a line") from error
