"""Terms about people that a teacher may bring into a text: gender, age, skin, origin, religion, body, orientation.

A term counts by its concept: who is told of a `woman` is told of `she`. Adjectives that also describe things (`white`, `old`,
`French`) count only beside a word for people. Known false friends (`baby blue`, `boyfriend jeans`, `male plug`) do not count.

Limits: English only; the lists are short and a term that is not in them is not seen; names, clothes and professions that suggest
a gender or a religion are not terms; `he` of an animal counts; a sentence that denies a term holds it; no term is judged right or
wrong. A count is a reason to look, not a verdict.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

GROUPS: Final = ("gender", "age", "skin", "origin", "religion", "body", "orientation")


@dataclass(frozen=True, slots=True)
class Term:
    """One term: `pattern` is where a text holds it, `concept` where a text tells its concept in whatever words; both are
    regular expressions, compiled at their first use."""

    group: str
    name: str
    pattern: str
    concept: str


def introduced(text: str, known: str) -> dict[Term, str]:
    """The terms of a text whose concept the text `known` does not tell, each with the words that first hold it."""
    low, index = _lowered(text), _index()
    tried = dict.fromkeys(term for word in _WORD.findall(low) for term in index.get(word, ()))
    terms = {term: match[0] for term in tried if (match := _compiled(term.pattern).search(low))}
    known = _lowered(known) if terms else ""
    return {term: words for term, words in terms.items() if not _compiled(term.concept).search(known)}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _lowered(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split())


def _either(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(word) for word in words)})"


_LISTS: Final = tomllib.loads((Path(__file__).parent / "people_terms.toml").read_text(encoding="utf-8"))
_PEOPLE, _BETWEEN = _either(_LISTS["people"].split()), _either(_LISTS["between"].split())
_THINGS: Final = "|".join(_LISTS["not_skin"].split())
_WORD: Final = re.compile(r"[a-z]+")
_START, _END = r"(?<![\w-])", r"(?![\w-])"
"""Of a word: a hyphen is part of it, `'s` is not."""


@cache
def _index() -> dict[str, tuple[Term, ...]]:
    """The first word of a term -> the terms that begin with it."""
    index: dict[str, list[Term]] = {}
    for term in _terms():
        index.setdefault(_WORD.findall(term.name)[0], []).append(term)
    return {word: tuple(terms) for word, terms in index.items()}


def _terms() -> Iterator[Term]:
    for group, concept, words in _LISTS["plain"]:
        known = {word for row in _LISTS["plain"] if row[:2] == [group, concept] for word in row[2].split()}
        # the bare colour tells nothing of a person
        telling = f"{_any(known)}|{_of_skin(concept.lower())}" if group == "skin" else _any(known | {concept.lower()})
        yield from (Term(group, word, f"{_own(word)}{_END}", telling) for word in words.split())
    for group, concept, words, more in _LISTS["beside"]:
        skin = group == "skin"
        patterns = {word: _of_skin(word) if skin else _of_people(word) for word in words.split()}
        if skin:
            telling = "|".join([*patterns.values(), _any({*more.split()})])
        else:
            telling = _any({*patterns, *more.split(), concept.lower()})
        yield from (Term(group, word, pattern, telling) for word, pattern in patterns.items())
    for adjectives, people, more in _LISTS["origins"]:
        names = adjectives.lower().split(", ")
        telling = _any({*names, *people.split(), *more.split()})
        for name in names:
            descent = rf"{_own(name)}[\s-]+(?:descent|origin|ancestry|heritage|ethnicity)\b"
            yield Term("origin", name, f"{_of_people(name)}|{descent}", telling)
        yield from (Term("origin", word, _any({word}), telling) for word in people.split())


def _of_people(word: str) -> str:
    """The word before a word for people, or as what they are said to be: `old man`, `the man looks old`."""
    verb = r"(?:\s+who)?\s+(?:is|are|was|were|looks?|seems?|appears?)(?:\s+to\s+be)?(?:\s+(?:a|an|very))?"
    return rf"{_before_people(word)}|{_START}{_PEOPLE}{verb}\s+{_own(word)}{_END}"


def _of_skin(word: str) -> str:
    """The colour before a word for people, or before `skin` in a text about people: `white man`, `a man with pale skin`."""
    skin = rf"{_own(word)}[\s-]+(?:skin|complexion)\b"
    return rf"{_before_people(word)}(?!'|\s+(?:{_THINGS})\b)|{skin}(?=.*\b{_PEOPLE}\b)|\b{_PEOPLE}\b.*?{skin}"


def _before_people(word: str) -> str:
    return rf"{_own(word)}(?:[\s,-]+{_BETWEEN}){{0,2}}[\s-]+{_PEOPLE}{_END}"


def _own(word: str) -> str:
    """The word from its start, where it is no false friend."""
    before = "".join(rf"(?<!\b{friend}[ -])" for friend in _LISTS["before"].get(word, ()))
    friends = "|".join(_LISTS["after"].get(word, "").split())
    after = rf"(?![\s-]+(?:{friends})\b)" if friends else ""
    return f"{_START}{before}{re.escape(word).replace(chr(92) + ' ', '[ -]')}{after}"


def _any(words: set[str]) -> str:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return f"{_START}{_either(longest_first)}{_END}"
