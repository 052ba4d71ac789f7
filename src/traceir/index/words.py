"""Words as keyword search sees them: how texts and names fall into them, and what a query asks for.

Every index cuts texts by `cut_words`, so that all find the same. Words are folded: case, width, accents of Latin, Greek,
Cyrillic, Arabic and Hebrew. An emoji is a word. Scripts that are written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar)
are cut into single characters, and a run of them is looked for by its overlapping pieces of 2 characters, of 3 outside Han and
kana. Nothing is stemmed: `cat` does not find `cats`, `cat*` does, and `strand*` finds `Strandkorb`.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from traceir.errors import InputError
from traceir.index.filters import shown, values_of
from traceir.items import Value

MAX_TERMS: Final = 64
MAX_QUERY: Final = 4_096
"""So many words and phrases, and characters, of a query are looked for; what is further on is ignored."""
WEIGHTS: Final = (1.0, 0.5, 0.5)
"""What a word counts in a text, a name, and a field."""
_MAX_LENGTH: Final = 64
_ASCII_WORD: Final = re.compile("[a-z0-9]+")
_KANA_AND_HAN: Final = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS: Final = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"
_MARKS: Final = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u3099\u309a"
)
_UNSPACED: Final = re.compile(f"[{_KANA_AND_HAN}{_OTHERS}][{_MARKS}]*")
_PART: Final = re.compile(r'(?<![^\s(])(-?)(?:"([^"]*)"|([^\s"]+))|([^\s"]+)')
_QUOTES: Final = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "−": "-"})
_DIGITS: Final = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")
_HUMPS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_IN_PARTS: Final = re.compile(f"{_DIGITS.pattern}|{_HUMPS.pattern}")
_APART: Final = re.compile(r"[,;:/\\|()\[\]{}!?，、。；：（）！？・]+")


@dataclass(frozen=True, slots=True)
class SearchTerm:
    """Words that follow each other; of the last one any longer word too, where it is a prefix."""

    words: tuple[str, ...]
    is_prefix: bool = False

    def is_in(self, words: Sequence[str]) -> bool:
        size = len(self.words)
        for start in range(len(words) - size + 1):
            own = tuple(words[start : start + size])
            if own == self.words or (self.is_prefix and own[:-1] == self.words[:-1] and own[-1].startswith(self.words[-1])):
                return True
        return False


@dataclass(frozen=True, slots=True)
class KeywordQuery:
    """What is looked for: every phrase of `required`, none of `without`, and the more of `wanted` the better."""

    wanted: tuple[SearchTerm, ...]
    required: tuple[SearchTerm, ...]
    without: tuple[SearchTerm, ...]

    def allows(self, columns: Sequence[Sequence[str]]) -> bool:
        """Whether an item with these columns of words is found."""

        def has(term: SearchTerm) -> bool:
            return any(term.is_in(words) for words in columns)

        return any(map(has, self.required + self.wanted)) and all(map(has, self.required)) and not any(map(has, self.without))


def parse_words(text: str) -> KeywordQuery:
    """A query: words, any of which may occur; "phrases", all of which must; -words and -"phrases" that must not; prefix*.

    A word with a dash, dot or underscore in it, such as IMG_2034.JPG, is found where its parts follow each other.
    """
    if not isinstance(text, str):
        raise InputError(f"the words to look for are {shown(text)}; give a text")
    wanted, required, without = list[SearchTerm](), list[SearchTerm](), list[SearchTerm]()
    for match in _PART.finditer(text[:MAX_QUERY].translate(_QUOTES)):
        is_without, is_phrase = bool(match[1]), match[2] is not None
        part = match[2] or match[3] or match[4] or ""
        for own in [part] if is_phrase or is_without else _APART.split(part):
            if words := tuple(cut_words(own)):
                whole = SearchTerm(words, own.endswith("*") and not is_phrase and len(words[-1]) > 1)
                if is_phrase or is_without:
                    (without if is_without else required).append(whole)
                else:
                    wanted += _pieces(whole)
                    wanted += [SearchTerm(parts) for parts in [tuple(cut_words(_DIGITS.sub(" ", own)))] if parts != words]
    if not wanted and not required:
        what = "only words that must not occur" if without else "no word or number"
        raise InputError(f"the keyword query {shown(text)} has {what}; give at least one that is looked for")
    return KeywordQuery(*(tuple(dict.fromkeys(terms))[:MAX_TERMS] for terms in (wanted, required, without)))


def _pieces(whole: SearchTerm) -> Iterator[SearchTerm]:
    """What is looked for of a word as it was typed, which may mix scripts."""
    for is_unspaced, run in itertools.groupby(whole.words, lambda word: bool(_UNSPACED.fullmatch(word))):
        words = tuple(run)
        size = 2 if is_unspaced and re.match(f"[{_KANA_AND_HAN}]", words[0]) else 3
        if is_unspaced and len(words) > size:
            yield from (SearchTerm(words[start : start + size]) for start in range(len(words) - size + 1))
        else:
            yield SearchTerm(words, whole.is_prefix and words[-1] == whole.words[-1])


def cut_words(text: str) -> list[str]:
    """The words of a text, folded, in its order."""
    if text.isascii():
        words = _ASCII_WORD.findall(text.lower())
    else:
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFKD", text.casefold()).translate(_LETTERS))
        words = _UNSPACED.sub(r" \g<0> ", plain).split()
    return words if len(text) <= _MAX_LENGTH else [word[:_MAX_LENGTH] for word in words]


def name_words(text: str) -> list[str]:
    """The words of a name or identifier, and after them the parts of those that have any.

    `beachParty2024` is beachparty2024, and also beachparty, 2024, beach and party.
    """
    parts: list[str] = []
    for word in filter(_IN_PARTS.search, re.findall(r"[^\W_]+", text)):
        for cut in (own := _DIGITS.split(word), [part for piece in own for part in _HUMPS.split(piece)]):
            parts += cut if len(cut) > 1 and cut != parts[-len(cut) :] else []
    return cut_words(text) + cut_words(" ".join(parts))


def columns_of(id: str, text: str | None, fields: Mapping[str, Value]) -> tuple[list[str], list[str], list[str]]:
    """The words of an item's text, of the last three parts of its id, and of its text fields.

    What begins with `_` is the program's own: fields of such names, and `_x:y:` before an id.
    """
    name = "/".join(re.split(r"[/\\]", re.sub(r"\A_[^:/]*:[^:/]*:", "", id))[-3:])
    values = [part for key, value in fields.items() if not key.startswith("_") for part in values_of(value)]
    return cut_words(text or ""), name_words(name), name_words(" \n".join(part for part in values if isinstance(part, str)))


class _Letters(dict[int, str]):
    """What becomes of a character, looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind, mark = unicodedata.category(character), unicodedata.combining(character)
        if mark >= 200 or 10 <= mark <= 36 or kind in ("Cf", "Sk") or character in "\u0640\ufe0f\ufe0e":
            kept = ""  # accents and vowel points, joiners, skin tones, the tatweel
        elif kind == "So":
            kept = f" {character} "
        else:
            kept = character if kind[0] in "LNM" else " "
        self[code] = kept
        return kept


_LETTERS: Final = _Letters()
