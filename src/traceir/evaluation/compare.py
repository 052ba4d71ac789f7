"""Two evaluations, query by query: what the second won and lost against the first, and whether that can be chance.

Input is what `traceir evaluate` wrote for the same queries. A query is hit by its row's own rule (hit@5, on fashion rows hit@10)
unless `k` says otherwise. Significance is McNemar's exact test on the queries that only one of the two hits; the interval of the
difference is a paired bootstrap over queries. Rows are tested one by one, without correction for their number; the text says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from traceir.errors import InputError
from traceir.evaluation.metrics import bootstrap_difference, mcnemar_test
from traceir.lab.report import Key, Run, Values, named_runs, read_run, same_queries

SHOWN = 5


def compare(first: str, second: str, *, k: int | None = None, out: Path | None = None, shown: int = SHOWN) -> str:
    """The comparison as Markdown, also written to `out` if given; `first` and `second` are `[LABEL=]FOLDER[:ROUTE]`.

    `shown` is how many won and how many lost queries are named. Raises InputError where the two judged different queries.
    """
    if k is not None and k < 1:
        raise InputError(f"k is {k}; give a depth of at least 1")
    one, other = (read_run(folder, route, label) for label, (folder, route) in named_runs([first, second]).items())
    keys = same_queries([one, other])
    depth = "the row's own depth" if k is None else f"depth {k}"
    text = "\n".join(
        [
            f"# {other.label} against {one.label}\n",
            f"Data {one.results.get('data') or '(no fingerprint)'}, split {one.results.get('split')}, {len(keys)} queries, "
            f"hits at {depth}.\n",
            *(f"- {run.label}: model {run.results.get('model')}, route {run.route}" for run in (one, other)),
            "",
            _rows_table(one, other, keys, k),
            *_moved(one, other, keys, k, shown),
        ]
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    return text


def _rows_table(one: Run, other: Run, keys: Sequence[Key], k: int | None) -> str:
    lines = [
        f"| row | n | {one.label} | {other.label} | difference | won | lost | both | neither | p |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    rows = {"**all**": list(keys)} | _kinds(one, keys)
    rows |= {row: [key for key in keys if key[0] == row] for row in dict.fromkeys(key[0] for key in keys)}
    for name, own in rows.items():
        before, after = _hits(one, own, k), _hits(other, own, k)
        apart = bootstrap_difference(after, before)
        counts = [
            int(((after == now) & (before == then)).sum()) for now, then in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
        ]
        cells = [f"{100 * before.mean():.1f}", f"{100 * after.mean():.1f}"]
        cells.append(f"{100 * apart.mean:+.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]")
        cells += [*(str(count) for count in counts), _chance(mcnemar_test(after, before))]
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    note = (
        "Difference in points with its 95 % bootstrap interval, paired by query. p: McNemar's exact test, two-sided; rows are "
        "tested one by one, so that about one in twenty falls below 0.05 by chance alone.\n"
    )
    return "\n".join([*lines, "", note])


def _kinds(run: Run, keys: Sequence[Key]) -> dict[str, list[Key]]:
    """The queries by the steps that their labels say they need; {} where none has a label."""
    steps = {key: run.judged[key].steps for key in keys}
    simple = [key for key, count in steps.items() if count is not None and count < 2]
    complex_ = [key for key, count in steps.items() if count is not None and count >= 2]
    return {"**simple** (0 and 1 steps)": simple, "**complex** (2 and more)": complex_} if simple and complex_ else {}


def _moved(one: Run, other: Run, keys: Sequence[Key], k: int | None, shown: int) -> list[str]:
    """The queries that moved furthest, won and lost, with what each run wrote."""
    before, after = _hits(one, keys, k), _hits(other, keys, k)
    parts: list[str] = []
    for word, now, then in (("Won", 1.0, 0.0), ("Lost", 0.0, 1.0)):
        moved = [key for key, a, b in zip(keys, after, before, strict=True) if (a, b) == (now, then)]
        moved.sort(key=lambda key: (-abs(one.judged[key].rank - other.judged[key].rank), key))
        parts.append(f"## {word}: {len(moved)}, the {min(shown, len(moved))} furthest\n")
        for key in moved[:shown]:
            ranks = f"rank {one.judged[key].rank} to {other.judged[key].rank}"
            parts.append(f"- {key[0]} {key[1]}: {ranks}{_wrote(one, key)}{_wrote(other, key)}")
        parts.append("")
    return parts


def _wrote(run: Run, key: Key) -> str:
    reasoning = run.judged[key].reasoning
    return f"\n  - {run.label} wrote: {reasoning}" if reasoning else ""


def _hits(run: Run, keys: Sequence[Key], k: int | None) -> Values:
    return run.metric_hits(keys) if k is None else run.hits(keys, k)


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
