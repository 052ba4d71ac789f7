"""Text from elsewhere in Markdown: shown as it is, in one line."""

from __future__ import annotations

import re
from typing import Final

_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]()<>#!|~&$@])")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def line(text: object) -> str:
    """One line without control characters."""
    return _CONTROL.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """One line of Markdown that shows the text as it is, in a paragraph or in a table."""
    return _SPECIAL.sub(r"\\\1", line(text))


def code(text: object) -> str:
    """One line for a code span: no backtick can end it, no bar a table's cell."""
    return re.sub(r"[`|]", "", line(text))


def size(count: int) -> str:
    """Bytes in words, such as 1.5 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
