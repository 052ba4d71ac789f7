"""How much texts repeat each other: lexical diversity, near duplicates, and runs of words copied from a target."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from tqdm import tqdm

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
"""Candidates of a text that are compared exactly, those with the most alike MinHash first."""
TOLD_RUN: Final = 3
"""Words in a row that the query must share with a target for them not to count as copied."""
SHORT_TARGET: Final = 3
"""Words from which a target counts as copied whole; a name of one or two words is the answer itself."""


def diversity(texts: Iterable[Words]) -> dict[str, Any]:
    """distinct-1 and distinct-2 (different words and word pairs / all of them; Li et al. 2016) and the moving-average type-token
    ratio (Covington and McFall 2010) over windows of 50 words of all texts one after the other.

    distinct-n falls as text grows: compare figures of like numbers of words.
    """
    ones: set[str] = set()
    twos: set[tuple[str, str]] = set()
    samples = words = pairs = 0
    window: deque[str] = deque()
    inside: Counter[str] = Counter()
    ratios = windows = 0
    for text in texts:
        samples, words, pairs = samples + 1, words + len(text), pairs + max(0, len(text) - 1)
        ones.update(text)
        twos.update(pairwise(text))
        for word in text:
            window.append(word)
            inside[word] += 1
            if len(window) > WINDOW:
                gone = window.popleft()
                inside[gone] -= 1
                if not inside[gone]:
                    del inside[gone]
            if len(window) == WINDOW:
                ratios, windows = ratios + len(inside), windows + 1
    moving = ratios / (windows * WINDOW) if windows else (len(ones) / words if words else 0.0)
    return {
        "samples": samples,
        "words": words,
        "distinct_1": round(len(ones) / words, 4) if words else 0.0,
        "distinct_2": round(len(twos) / pairs, 4) if pairs else 0.0,
        "moving_ratio": round(moving, 4),
    }


def shingles(words: Words) -> frozenset[int]:
    """Hashes (32 bits) of all runs of three words; a shorter text is one shingle."""
    runs = zip(*(words[start:] for start in range(SHINGLE)), strict=False) if len(words) >= SHINGLE else [tuple(words)]
    return frozenset(zlib.crc32("\x00".join(run).encode("utf-8", "surrogatepass")) for run in runs)


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
    first: list[frozenset[int]] = []
    signs: list[Any] = []
    known: set[frozenset[int]] = set()
    found: list[bool] = []
    for words in tqdm(texts, desc="looking for near duplicates", unit="text", delay=2.0):
        own = shingles(words)
        if own in known:
            found.append(True)
            continue
        known.add(own)
        sign = empty.copy()
        sign.update_batch(own)
        places = sorted(index.query(sign))
        if len(places) > COMPARED:
            alike = np.array([signs[place] for place in places]) == sign.hashvalues
            places = [places[at] for at in np.argsort(-alike.sum(axis=1), kind="stable")[:COMPARED]]
        near = any(len(own & first[place]) >= NEAR * len(own | first[place]) for place in places)
        found.append(near)
        if not near:
            index.insert(len(first), sign)
            first.append(own)
            signs.append(sign.hashvalues)
    return found


def longest_copy(said: Sequence[Words], target: Words, told: Sequence[Words]) -> Words:
    """The longest run of words that a target shares with one of the texts `said`, the first of equal ones; [] if none.

    What the texts `told` share with the target in runs of three words and more is cut out of the target first.
    """
    pieces = _untold(target, told)
    low, high, found = 0, max((len(piece) for piece in pieces), default=0), []
    while low < high:
        size = (low + high + 1) // 2
        grams = {gram for text in said for gram in _grams(text, size)}
        run = next((gram for piece in pieces for gram in _grams(piece, size) if gram in grams), None)
        if run is None:
            high = size - 1
        else:
            low, found = size, list(run)
    return found


def holds(texts: Sequence[Words], run: Words) -> bool:
    """Whether one of the texts holds this run of words."""
    return any(tuple(run) in set(_grams(text, len(run))) for text in texts)


def _untold(target: Words, told: Sequence[Words]) -> list[Words]:
    """The pieces of the target between the runs that the told texts hold too."""
    known = {gram for text in told for gram in _grams(text, TOLD_RUN)}
    cut = {place + step for place, gram in enumerate(_grams(target, TOLD_RUN)) if gram in known for step in range(TOLD_RUN)}
    pieces: list[Words] = [[]]
    for place, word in enumerate(target):
        if place in cut:
            pieces.append([])
        else:
            pieces[-1].append(word)
    return [piece for piece in pieces if piece]


def _grams(words: Words, size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)
