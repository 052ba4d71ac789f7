"""Figures that others published, to stand beside ours; every table that shows one says "published".

Source: TRACE, arXiv 2603.02929v2, Table 1, and the figures of its peers as that paper gives them (its Table 3 stands in
`evaluation/unseen/catalogue.py`). They are scores on the real M-BEIR (local pools, hit@5, hit@10 for the fashion rows), in per
cent; beside scores on a miniature they show the shape of a result, not a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from traceir.data.mbeir import EVAL_ROWS

SOURCE: Final = "arXiv 2603.02929v2, Table 1"

_TABLE_1: Final[Mapping[str, tuple[float, ...]]] = {
    "CLIP-L": (43.3, 61.1, 6.6, 36.2, 43.3, 45.1, 41.3, 79.0, 7.7, 26.1, 24.2, 20.5, 7.0, 13.2, 38.8, 26.4),
    "UniIR CLIP-SF": (42.6, 81.1, 18.0, 84.7, 59.4, 78.7, 43.1, 92.3, 18.3, 32.0, 45.5, 27.9, 24.4, 44.6, 67.6, 48.9),
    "Qwen2.5-VL-7B zero-shot": (9.3, 55.1, 5.0, 42.0, 26.2, 9.4, 5.4, 46.6, 4.0, 21.3, 21.4, 22.5, 4.3, 16.3, 43.6, 36.2),
    "LamRA-Ret": (41.6, 81.5, 28.7, 86.0, 62.6, 81.2, 39.6, 90.6, 30.4, 32.1, 54.1, 52.1, 33.2, 53.1, 76.2, 63.3),
    "TRACE": (42.1, 82.3, 30.5, 87.8, 64.1, 82.5, 41.2, 91.3, 33.2, 33.6, 57.4, 55.8, 36.4, 57.3, 78.5, 67.1),
}

MBEIR: Final[Mapping[str, Mapping[str, float]]] = {
    method: dict(zip(EVAL_ROWS, scores, strict=True)) for method, scores in _TABLE_1.items()
}
"""Method -> row -> score on M-BEIR's local pool, in per cent."""


def average(method: str) -> float:
    """The plain mean of a method's 16 rows, in per cent, to one decimal as the paper prints it."""
    return round(sum(MBEIR[method].values()) / len(EVAL_ROWS), 1)
