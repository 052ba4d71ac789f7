"""How much texts repeat each other: lexical diversity, near duplicates, and runs of words copied from a target."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
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


def shingles(words: Words) -> frozenset[int]:
    """Hashes (32 bits) of all runs of three words; a shorter text is one shingle."""
    runs = runs_of(words, SHINGLE) if len(words) >= SHINGLE else [tuple(words)]
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
    originals: list[tuple[frozenset[int], Any]] = []
    known: set[frozenset[int]] = set()
    repeated: list[bool] = []
    for words in tqdm(texts, desc="looking for near duplicates", unit="text", delay=2.0):
        own = shingles(words)
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
