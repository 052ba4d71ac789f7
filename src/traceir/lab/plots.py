"""Plots as SVG text: the same figures give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from traceir.errors import InputError


class Series(NamedTuple):
    """One row of an ablation: by number of the line, its value of each seed, mean with half the interval, the paper's figure."""

    label: str
    dots: Mapping[int, Sequence[float]]
    means: Mapping[int, tuple[float, float]]
    paper: Mapping[int, float]
    paper_label: str


def plot_lines(lines: Sequence[str], series: Sequence[Series], quantity: str) -> str:
    """Every line of an ablation with its interval, each seed a dot, the paper's figure a hollow mark."""
    with _drawing(7.2, 1.4 + 0.5 * len(lines)) as (axes, svg):
        for number, own in enumerate(series):
            colour, shift = f"C{number}", -0.12 + 0.24 * number
            for at, values in own.dots.items():
                axes.plot(values, [at + shift] * len(values), ".", color=colour, alpha=0.45, markersize=5)
            means, widths = [mean for mean, _ in own.means.values()], [width for _, width in own.means.values()]
            style = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 5, "label": own.label}
            axes.errorbar(means, [at + shift for at in own.means], xerr=widths, **style)
            if own.paper:
                style = {"color": colour, "fillstyle": "none", "markersize": 5, "label": own.paper_label}
                axes.plot(list(own.paper.values()), [at + shift for at in own.paper], "D", **style)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set(xlim=(0, 102), xlabel=quantity)
        axes.grid(axis="x", alpha=0.3)
        axes.figure.legend(loc="outside lower center", ncols=4)
    return svg.getvalue()


def plot_steps(measured: pd.DataFrame) -> str:
    """Recall@1 against steps, one line with error bars a run; `measured` has run, steps, queries, mean, low, high."""
    runs, counts = measured.groupby("run", sort=False), measured.drop_duplicates("steps")
    with _drawing(6.4, 4.0) as (axes, svg):
        for number, (label, own) in enumerate(runs):
            positions = own["steps"] + 0.06 * (number - (len(runs) - 1) / 2)
            axes.errorbar(positions, 100 * own["mean"], yerr=_errors(own), marker="o", capsize=3, label=label)
        axes.set_xticks(counts["steps"], [f"{own.steps}\nn = {own.queries}" for own in counts.itertuples()])
        axes.set(xlabel="dependent steps a query needs", ylabel="recall@1, %", ylim=(0, 103))
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    return svg.getvalue()


def plot_rows(measured: pd.DataFrame) -> str:
    """Bars of every row with their intervals, one colour a run; `measured` has run, row, mean, low, high."""
    runs, rows = measured.groupby("run", sort=False), measured["row"].unique()
    height = 0.8 / len(runs)
    with _drawing(8.6, 0.6 + 0.16 * len(rows) * (len(runs) + 0.8)) as (axes, svg):
        for number, (label, own) in enumerate(runs):
            positions, style = np.arange(len(rows)) + height * number, {"height": height, "error_kw": {"linewidth": 0.8}}
            axes.barh(positions, 100 * own["mean"], xerr=_errors(own), label=label, **style)
        axes.set_yticks(np.arange(len(rows)) + height * (len(runs) - 1) / 2, rows)
        axes.set_ylim(len(rows) - 0.2 - height / 2, -0.2 - height / 2)
        axes.set(xlim=(0, 100), xlabel="the row's metric, %")
        axes.grid(axis="x", alpha=0.3)
        axes.figure.legend(loc="outside lower center", ncols=2)
    return svg.getvalue()


def plot_cost(queries: pd.DataFrame) -> str:
    """Recall against reasoning tokens: a run as a large mark, each of its rows as a small one."""
    with _drawing(6.8, 4.2) as (axes, svg):
        for number, (label, own) in enumerate(queries.groupby("run", sort=False)):
            for _, row in own.groupby("row", sort=False):
                axes.plot(row["tokens"].mean(), 100 * row["hit"].mean(), ".", color=f"C{number}", alpha=0.4)
            axes.plot(own["tokens"].mean(), 100 * own["hit"].mean(), "o", color=f"C{number}", markersize=10, label=label)
        axes.set(xlabel="reasoning tokens a query", ylabel="the rows' metric, %", ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside lower center", ncols=2)
    return svg.getvalue()


def _errors(measured: pd.DataFrame) -> list[pd.Series]:
    """Down to the lower ends of the intervals, and up to the upper ones, in per cent."""
    return [(100 * (measured[high] - measured[low])).clip(0) for low, high in (("low", "mean"), ("mean", "high"))]


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, and where their SVG is when the block ends."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the plots need matplotlib; install it with `pip install 'traceir[learn]'`") from error
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "traceir", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), stream
        figure.savefig(stream, format="svg", metadata={"Date": None})
