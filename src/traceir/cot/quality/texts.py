"""What the texts of samples have in common with each other, with a target, and with people: lexical diversity, near duplicates,
runs of words copied from a target; and terms about people that a teacher may bring in: gender, age, skin, origin, religion, body,
orientation.

A term counts by its concept: who is told of a `woman` is told of `she`. Adjectives that also describe things (`white`, `old`,
`French`) count only beside a word for people. Known false friends (`baby blue`, `boyfriend jeans`, `male plug`) do not count.

Limits: English only; the lists are short and a term that is not in them is not seen; names, clothes and professions that suggest
a gender or a religion are not terms; `he` of an animal counts; a sentence that denies a term holds it; no term is judged right or
wrong. A count is a reason to look, not a verdict.
"""

from __future__ import annotations

import re
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from traceir.cot.rules import runs_of
from traceir.errors import DataError

Words = list[str]

WINDOW: Final = 50
"""Words of the moving window of the type-token ratio."""
SHINGLE: Final = 3
NEAR: Final = 0.8
"""Jaccard similarity of word 3-shingles from which two texts are near duplicates."""
BANDS, ROWS = 21, 6
"""Of MinHash: a pair at similarity 0.8 is looked at with probability 0.998, and then compared exactly."""
COMPARED: Final = 20
"""Candidates of a text that are compared exactly, those with the most equal values of MinHash first."""
QUERY_RUN: Final = 3
"""Words in a row that the query must share with a target for them not to count as copied."""
GROUPS: Final = ("gender", "age", "skin", "origin", "religion", "body", "orientation")


def diversity(texts: Sequence[Words]) -> dict[str, Any]:
    """distinct-1 and distinct-2 (different words and word pairs / all of them; Li et al. 2016) and the moving-average type-token
    ratio (Covington and McFall 2010) over windows of 50 words of all texts one after the other.

    distinct-n falls as text grows: compare figures of like numbers of words.
    """
    words = [word for text in texts for word in text]
    pairs = [pair for text in texts for pair in pairwise(text)]
    width = min(WINDOW, len(words))
    kinds = [len(set(words[start : start + width])) for start in range(len(words) - width + 1)]
    return {
        "samples": len(texts),
        "words": len(words),
        "distinct_1": round(len(set(words)) / max(len(words), 1), 4),
        "distinct_2": round(len(set(pairs)) / max(len(pairs), 1), 4),
        "moving_ratio": round(sum(kinds) / max(len(kinds) * width, 1), 4),
    }


def near_duplicates(texts: Sequence[Words]) -> list[bool]:
    """Whether each text is a near duplicate (Jaccard at least 0.8 on word 3-shingles) of one before it that is none itself.

    By MinHash LSH. Time and memory grow with the number of texts: give a sample.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise DataError("near duplicates need the package datasketch; pip install 'traceir[reasoning]'") from error
    empty = MinHash(num_perm=BANDS * ROWS, hashfunc=int)
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    originals: list[tuple[frozenset[int], Any]] = []
    known: set[frozenset[int]] = set()
    repeated: list[bool] = []
    for words in tqdm(texts, desc="looking for near duplicates", unit="text", delay=2.0):
        runs = runs_of(words, SHINGLE) if len(words) >= SHINGLE else [tuple(words)]
        own = frozenset(zlib.crc32("\x00".join(run).encode("utf-8", "surrogatepass")) for run in runs)
        if own in known:
            repeated.append(True)
            continue
        known.add(own)
        sign = empty.copy()
        sign.update_batch(own)
        candidates = [originals[number] for number in sorted(index.query(sign))]
        if len(candidates) > COMPARED:
            candidates.sort(key=lambda original: -int(np.sum(original[1] == sign.hashvalues)))
        near = any(len(own & other) >= NEAR * len(own | other) for other, _ in candidates[:COMPARED])
        repeated.append(near)
        if not near:
            index.insert(len(originals), sign)
            originals.append((own, sign.hashvalues))
    return repeated


def longest_copy(texts: Sequence[Words], target: Words, query: Words) -> Words:
    """The longest run of words that a target shares with one of the texts, the first of equal ones; [] if none.

    What the query shares with the target in runs of three words and more is cut out of the target first.
    """
    pieces = _without_query(target, query)
    low, high, longest = 0, max((len(piece) for piece in pieces), default=0), []
    while low < high:
        size = (low + high + 1) // 2
        grams = {gram for text in texts for gram in runs_of(text, size)}
        run = next((gram for piece in pieces for gram in runs_of(piece, size) if gram in grams), None)
        if run is None:
            high = size - 1
        else:
            low, longest = size, list(run)
    return longest


def holds(texts: Sequence[Words], run: Words) -> bool:
    """Whether one of the texts holds this run of words."""
    return any(tuple(run) in set(runs_of(text, len(run))) for text in texts)


def _without_query(target: Words, query: Words) -> list[Words]:
    """The pieces of the target between the runs that the query holds too."""
    known = set(runs_of(query, QUERY_RUN))
    cut = {
        position + step for position, gram in enumerate(runs_of(target, QUERY_RUN)) if gram in known for step in range(QUERY_RUN)
    }
    pieces: list[Words] = [[]]
    for position, word in enumerate(target):
        if position in cut:
            pieces.append([])
        else:
            pieces[-1].append(word)
    return [piece for piece in pieces if piece]


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
