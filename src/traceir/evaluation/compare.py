"""Two evaluations, query by query: what the second won and lost against the first, and whether that can be chance.

Input is what `traceir evaluate` wrote for the same queries. A query is hit by its row's own rule (hit@5, on fashion rows hit@10)
unless `k` says otherwise. Significance is McNemar's exact test on the queries that only one of the two hits; the interval of the
difference is a paired bootstrap over queries. Rows are tested one by one, without correction for their number; the text says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from traceir.data.report import markdown_table, points
from traceir.errors import InputError
from traceir.evaluation.metrics import bootstrap_difference, mcnemar_test
from traceir.evaluation.results import Key, ScoredRun, named_runs, read_run, same_queries
from traceir.files import write_whole

SHOWN = 5
_NOTE = (
    "Difference in points with its 95 % bootstrap interval, paired by query. p: McNemar's exact test, two-sided; rows are "
    "tested one by one, so that about one in twenty falls below 0.05 by chance alone.\n"
)


def compare(first: str, second: str, *, k: int | None = None, out: Path | None = None, shown: int = SHOWN) -> str:
    """The comparison as Markdown, also written to `out` if given; `first` and `second` are `[LABEL=]FOLDER[:ROUTE]`.

    `shown` is how many won and how many lost queries are named. Raises InputError where the two judged different queries.
    """
    if k is not None and k < 1:
        raise InputError(f"k is {k}; give a depth of at least 1")
    old, new = (read_run(folder, route, label) for label, (folder, route) in named_runs([first, second]).items())
    keys = same_queries([old, new])
    depth = "the row's own depth" if k is None else f"depth {k}"
    parts = [
        f"# {new.label} against {old.label}\n",
        f"Data {old.results.get('data') or '(no fingerprint)'}, split {old.results.get('split')}, {len(keys)} queries, "
        f"hits at {depth}.\n",
        *(f"- {run.label}: model {run.results.get('model')}, route {run.route}" for run in (old, new)),
        "",
        _rows_table(old, new, keys, k),
        "",
        _NOTE,
        *_moved(old, new, keys, k, shown),
    ]
    text = "\n".join(parts)
    if out is not None:
        write_whole(out, text)
    return text


def _rows_table(old: ScoredRun, new: ScoredRun, keys: Sequence[Key], k: int | None) -> str:
    groups = {"**all**": list(keys)}
    simple = [key for key in keys if 0 <= old.steps(key) < 2]
    if complex_ := [key for key in keys if simple and old.steps(key) >= 2]:  # by the steps that their labels say they need
        groups |= {"**simple** (0 and 1 steps)": simple, "**complex** (2 and more)": complex_}
    groups |= {row: [key for key in keys if key[0] == row] for row in dict.fromkeys(key[0] for key in keys)}
    rows = []
    for name, own in groups.items():
        before, after = old.hits(own, k), new.hits(own, k)
        apart, p = bootstrap_difference(after, before), mcnemar_test(after, before)
        difference = f"{100 * apart.mean:+.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
        counts = [np.count_nonzero((after == now) & (before == then)) for now, then in ((1, 0), (0, 1), (1, 1), (0, 0))]
        chance = "< 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append((name, len(own), points(before.mean()), points(after.mean()), difference, *counts, chance))
    names = ("row", "n", old.label, new.label, "difference", "won", "lost", "both", "neither", "p")
    return markdown_table(names, "lrrrlrrrrr", rows)


def _moved(old: ScoredRun, new: ScoredRun, keys: Sequence[Key], k: int | None, shown: int) -> list[str]:
    """The queries that moved furthest, won and lost, with what each run wrote."""
    before, after = old.hits(keys, k), new.hits(keys, k)
    parts: list[str] = []
    for word, wanted in (("Won", 1.0), ("Lost", -1.0)):
        moved = [key for key, change in zip(keys, after - before, strict=True) if change == wanted]
        moved.sort(key=lambda key: (-abs(old.judged[key].rank - new.judged[key].rank), key))
        parts.append(f"## {word}: {len(moved)}, the {min(shown, len(moved))} furthest\n")
        for key in moved[:shown]:
            written = [f"\n  - {run.label} wrote: {text}" for run in (old, new) if (text := run.judged[key].reasoning)]
            ranks = f"rank {old.judged[key].rank} to {new.judged[key].rank}"
            parts.append(f"- {key[0]} {key[1]}: {ranks}{''.join(written)}")
        parts.append("")
    return parts
