"""Long texts as passages that a model reads whole, cut where paragraphs or sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

WORDS: Final = 200
"""Of a passage, about: within the reach of any text encoder, and enough to be about something."""
WHOLE: Final = 300
"""Words of a text that stays one item."""
OVERLAP: Final = 30
"""Words at the end of a passage with which the next one begins, where a paragraph is cut."""
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*|\n(?=#{1,6} )|\f")
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])")
_WORD = re.compile(
    r"[\u0e00-\u0fff\u3000-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\s\u0e00-\u0fff\u3000-\u9fff\uac00-\ud7af\uf900-\ufaff]{1,20}"
)
"""Scripts that leave no space between words count each character; so does each 20 characters of what has no space."""
Span = tuple[int, int]


def passages(text: str) -> list[str]:
    """The text itself where it has at most WHOLE words, else its passages in order: nothing is left out."""
    if _words(text, 0, len(text), most=WHOLE + 1) <= WHOLE:
        return [text]
    return [shown for start, end in _spans(text) if (shown := text[start:end].strip())]


def _spans(text: str) -> Iterator[Span]:
    start, words = 0, 0
    tail: list[tuple[int, int]] = []  # where the passage's last sentences start, and their words
    for (begin, end), opens in _sentences(text):
        size = _words(text, begin, end)
        if words and (words + size > WORDS or (opens and words >= 0.6 * WORDS)):
            yield start, begin
            start, words = _overlap(tail) if not opens else (begin, 0)
            start = begin if not words or words + size > WORDS else start
            words, tail = (0, []) if start == begin else (words, tail)
        words += size
        tail = [*tail, (begin, size)][-8:]
    yield start, len(text)


def _overlap(tail: list[tuple[int, int]]) -> tuple[int, int]:
    """Start and words of the last sentences that are short enough together; (0, 0) where even the last is too long."""
    start = words = 0
    for begin, size in reversed(tail):
        if words + size > OVERLAP:
            break
        start, words = begin, words + size
    return start, words


def _sentences(text: str) -> Iterator[tuple[Span, bool]]:
    """Spans that make up the whole text, none of more than WORDS words, and whether they open a paragraph."""
    for first, last in pairwise([0, *(cut.end() for cut in _PARAGRAPH.finditer(text)), len(text)]):
        opens = True
        for begin, end in pairwise([first, *(cut.end() for cut in _SENTENCE.finditer(text, first, last)), last]):
            for span in _pieces(text, begin, end):
                yield span, opens
                opens = False


def _pieces(text: str, begin: int, end: int) -> Iterator[Span]:
    starts = [word.start() for word in _WORD.finditer(text, begin, end)][WORDS::WORDS]
    yield from (span for span in pairwise([begin, *starts, end]) if span[0] < span[1])


def _words(text: str, begin: int, end: int, most: int | None = None) -> int:
    count = 0
    for count, _ in enumerate(_WORD.finditer(text, begin, end), start=1):
        if count == most:
            break
    return count
