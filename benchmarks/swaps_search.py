"""Searches and statistics of both sides of a swap, for `benchmarks.swaps`; swaps_process.py says how they are called."""

from __future__ import annotations

import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.swaps_process import Asks, Settings, warmed

ONES: Final = 8
"""Single queries that one ask searches, so that the clock's steps do not show."""


def unit(seed: list[int], rows: int, width: int) -> Any:
    made = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


# Indexes


def opened(uri: Path | str, width: int, dtype: str = "float32") -> Any:
    from traceir.index import open_index

    return open_index(uri, fingerprint="random", prompt_version="none", dim=width, create=True, dtype=dtype)


def fill(index: Any, rows: int, width: int) -> None:
    from traceir.items import Item

    for start in range(0, rows, 1000):
        some = range(start, min(rows, start + 1000))
        items = [Item.of(text=f"item {number}", id=str(number), fields={"group": number % 100}) for number in some]
        index.upsert(items, unit([0, start], len(items), width))


def searches(index: Any, width: int, *, exact: bool, batch: int) -> Asks:
    """What is asked of any index; the ids that were found come out."""
    from traceir.index import Eq

    queries = unit([1], batch, width)

    def ids(some: Any, **options: Any) -> list[list[str]]:
        return [[hit.id for hit in hits] for hits in index.search(some, k=10, exact=exact, **options)]

    return {
        "one query": lambda: [ids(query[None]) for query in queries[:ONES]],
        f"a batch of {batch}": lambda: ids(queries),
        "one query, 1 % pass": lambda: [ids(query[None], where=Eq("group", 7)) for query in queries[:ONES]],
    }


def index(role: str, settings: Settings) -> Asks:
    """One file for both sides, which the earlier one writes; with lists, so that it can be searched approximately too."""
    path, width, dtype = Path(settings["scratch"]) / f"index-{settings['dtype']}", settings["width"], settings["dtype"]
    there = path.exists()
    found = opened(path, width, dtype)
    if not there:
        fill(found, settings["rows"], width)
        if dtype == "float32":
            (found.build_approximate if role == "before" else found.build_ann)()
    asks = searches(found, width, exact=True, batch=64)
    if dtype == "float32":
        approximate = searches(found, width, exact=False, batch=64)["one query"]
        asks["one query, approximate"] = lambda: approximate() and None  # the two probe different lists of a batch
    return warmed(asks if dtype == "float32" else {f"{name}, {dtype}": ask for name, ask in asks.items()})


def add(role: str, settings: Settings) -> Asks:
    path = Path(settings["scratch"]) / f"add-{role}"

    def add_all() -> None:
        with opened(path, settings["width"]) as new:
            fill(new, settings["add"], settings["width"])
        shutil.rmtree(path)

    return {f"bulk add of {settings['add']:,}": add_all}


def milvus(role: str, settings: Settings) -> Asks:
    found = opened(f"milvus-lite:{Path(settings['scratch']) / role}.db", settings["width"])
    fill(found, settings["milvus_rows"], settings["width"])
    asks = searches(found, settings["width"], exact=True, batch=64)
    return warmed({name: asks[name] for name in ("one query", "a batch of 64")})


def viewed(settings: Settings) -> Any:
    """The rows of an index as its searches see them, without the file."""
    from traceir.index.vectors import Codec, VectorTable

    vectors_ND = unit([2], settings["rows"], settings["width"])
    table = VectorTable(Codec(settings["width"], "float32", vectors_ND[:0]))
    numbers = list(range(len(vectors_ND)))
    table.append(numbers, list(map(str, numbers)), vectors_ND, np.full(len(vectors_ND), -1, dtype=np.int32))
    return table.view()


def batch(role: str, settings: Settings) -> Asks:
    """The best 10 of 64 queries by matrix products on both sides; ours are a few more rows, to be scored again in float64."""
    import faiss

    from traceir.index.vectors import candidates

    faiss.cvar.distance_compute_blas_threshold = 20 * settings["width"]  # its default is slower for a batch
    view, queries = viewed(settings), unit([1], 64, settings["width"])
    if role == "ours":
        return warmed({"a batch of 64": lambda: candidates(view, queries, 10, None) and None})
    return warmed({"a batch of 64": lambda: faiss.knn(queries, view.codes_ND, 10, metric=faiss.METRIC_INNER_PRODUCT) and None})


def kmeans(role: str, settings: Settings) -> Asks:
    """As many lists as an index of these rows gets, ten rounds over 64 rows a list, then the list of every row."""
    import faiss

    from traceir.index.vectors import fit_lists

    view, width = viewed(settings), settings["width"]
    lists = max(1, round(2 * len(view) ** 0.5))

    def library() -> None:
        sample = np.random.default_rng(0).choice(len(view), size=min(len(view), 64 * lists), replace=False)
        trained = faiss.Kmeans(width, lists, niter=10, spherical=True, seed=1, max_points_per_centroid=64)
        trained.train(view.codes_ND[np.sort(sample)])
        trained.index.search(view.codes_ND, 1)

    return {f"{lists} lists": library if role == "library" else lambda: fit_lists(view, None, 0) and None}


# Statistics


def metric_values(count: int = 2000) -> tuple[Any, Any]:
    """A metric of as many values as queries, and hits."""
    draw = np.random.default_rng(3)
    return draw.random(count), draw.integers(0, 2, count).astype(np.float64)


def statistics(role: str, _: Settings) -> Asks:
    metrics = import_module("traceir.learn.metrics" if role == "before" else "traceir.evaluation.metrics")
    report = import_module("traceir.learn.ablate_report" if role == "before" else "traceir.lab.ablate_report")
    values, hits = metric_values()
    others = np.random.default_rng(4).permutation(hits)
    seeds = values[:3].tolist()
    return warmed(
        {
            "bootstrap of 2,000 values": lambda: metrics.bootstrap_mean(values) and None,
            "bootstrap of 2,000 hits": lambda: metrics.bootstrap_mean(hits) and None,
            "binomial test": lambda: [round(metrics.mcnemar_test(hits, others), 9) for _ in range(200)],
            "Student's t": lambda: [str([round(end, 3) for end in spread(report.t_interval(seeds))]) for _ in range(500)],
        }
    )


def spread(estimate: Any) -> list[float]:
    return [estimate.mean, estimate.low, estimate.high]


def permutation(role: str, _: Settings) -> Asks:
    """The paired randomisation test with 10,000 draws; p-values differ by the draw."""
    values, hits = metric_values()
    draw = np.random.default_rng(4)
    pairs = {"2,000 values": (values, draw.permutation(values)), "2,000 hits": (hits, draw.permutation(hits))}

    def ours(first: Any, second: Any) -> None:
        import_module("traceir.learn.metrics").randomisation_test(first, second)

    def library(first: Any, second: Any) -> None:
        from scipy import stats

        stats.permutation_test(
            (first - second,), np.sum, permutation_type="samples", n_resamples=10_000, batch=1000, vectorized=True, rng=draw
        )

    chosen = ours if role == "ours" else library
    return warmed({name: partial(chosen, *pair) for name, pair in pairs.items()})


def wilson(role: str, _: Settings) -> Asks:
    """The interval of 7 wrong samples among 100, a hundred times; both sides have the same four decimals."""
    from scipy import stats

    from traceir.cot.quality.quality import Stratum, estimate_share

    strata = {"one": Stratum(kept=1000, reviewed=100, wrong=7)}

    def ours() -> list[float]:
        shares = [estimate_share(strata) for _ in range(100)]
        return [shares[0]["low"], shares[0]["high"]]

    def library() -> list[float]:
        intervals = [stats.binomtest(7, 100).proportion_ci(method="wilson") for _ in range(100)]
        return [round(float(end), 4) for end in intervals[0]]

    return warmed({"7 of 100": ours if role == "ours" else library})
