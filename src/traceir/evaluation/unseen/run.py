"""The zero-shot sets by name, and a checkpoint scored on them, route by route, beside the published figures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from traceir.data.report import markdown_table, points
from traceir.errors import DataError, InputError
from traceir.evaluation.results import continue_results, describe_machine, header_of
from traceir.evaluation.unseen import readers
from traceir.evaluation.unseen.score import rank_pool, score
from traceir.evaluation.unseen.task import LeftOut, Missing, UnseenTask, settle
from traceir.files import write_whole
from traceir.items import Route
from traceir.retrieval.search import EvaluatedEncoder
from traceir.suggest import did_you_mean

log = logging.getLogger(__name__)

FORMAT: Final = 1
SUBMITTED: Final = 50
"""Images that CIRCO's server takes for each query."""


@dataclass(frozen=True, slots=True)
class UnseenSet:
    """One task: its title, its folder below the root, its reader and which part that reads, and its metrics (the first: `main`).

    `published` is TRACE's score on the real set, by the same metric, in per cent (arXiv 2603.02929v2, table 3).
    """

    title: str
    folder: str
    read: Callable[[Path, str], readers.UnseenData]
    part: str
    metrics: tuple[str, ...]
    main: str
    published: float | None = None
    by_group: bool = False


_HITS: Final = ("hit@1", "hit@5", "hit@10")
_FIQ: Final = ("hit@10", "hit@50")
SETS: Final[Mapping[str, UnseenSet]] = {
    "sharegpt4v_t2i": UnseenSet("ShareGPT4V t-i", "sharegpt4v", readers.read_sharegpt4v, "t2i", _HITS, "hit@1", 94.9),
    "urban1k_t2i": UnseenSet("Urban-1K t-i", "Urban1k", readers.read_urban1k, "t2i", _HITS, "hit@1", 94.8),
    "flickr30k_t2i": UnseenSet("Flickr30K t-i", "flickr", readers.read_flickr30k, "t2i", _HITS, "hit@1", 84.5),
    "sharegpt4v_i2t": UnseenSet("ShareGPT4V i-t", "sharegpt4v", readers.read_sharegpt4v, "i2t", _HITS, "hit@1", 89.1),
    "urban1k_i2t": UnseenSet("Urban-1K i-t", "Urban1k", readers.read_urban1k, "i2t", _HITS, "hit@1", 94.1),
    "flickr30k_i2t": UnseenSet("Flickr30K i-t", "flickr", readers.read_flickr30k, "i2t", _HITS, "hit@1", 94.5),
    "circo": UnseenSet("CIRCO", "circo", readers.read_circo, "val", ("map@5", "map@10", "map@25", "map@50"), "map@5", 34.8),
    "genecis": UnseenSet("GeneCIS", "genecis", readers.read_genecis, "", ("hit@1", "hit@2", "hit@3"), "hit@1", 20.5, True),
    "visdial": UnseenSet("VisDial", "visdial", readers.read_visdial, "", _HITS, "hit@1", 65.4),
    "vist": UnseenSet("VIST", "vist", readers.read_vist, "", _HITS, "hit@1", 25.8),
    "mtfiq": UnseenSet("MT-FIQ", "multiturnfashion", readers.read_mtfiq, "", ("hit@5", "hit@8", "hit@10"), "hit@5", 63.2),
    "ccneg": UnseenSet("CC-Neg", "ccneg", readers.read_ccneg, "", ("accuracy",), "accuracy", 84.1),
    "sugarcrepe": UnseenSet("SugarCrepe", "sugar-crepe", readers.read_sugarcrepe, "", ("accuracy",), "accuracy", 87.5),
    "cirr": UnseenSet("CIRR R@K", "cirr", readers.read_cirr, "", ("hit@1", "hit@2", "hit@5", "hit@10", "hit@50"), "hit@5"),
    "cirr_subset": UnseenSet("CIRR R_subset@K", "cirr", readers.read_cirr, "subset", ("hit@1", "hit@2", "hit@3"), "hit@1"),
    "fashioniq_dress": UnseenSet("FashionIQ dress", "fashion-iq", readers.read_fashioniq, "dress", _FIQ, "hit@10"),
    "fashioniq_shirt": UnseenSet("FashionIQ shirt", "fashion-iq", readers.read_fashioniq, "shirt", _FIQ, "hit@10"),
    "fashioniq_toptee": UnseenSet("FashionIQ toptee", "fashion-iq", readers.read_fashioniq, "toptee", _FIQ, "hit@10"),
}
TASKS: Final = tuple(SETS)
COLUMNS: Final = TASKS[:13]
CIRCO_TEST: Final = UnseenSet("CIRCO", "circo", readers.read_circo, "test", SETS["circo"].metrics, "map@5")
"""Without truth: for a submission to the authors' server."""


def find_columns(root: Path) -> list[str]:
    """The tasks whose folder is below `root`, in the order of the table. Nothing is read."""
    return [name for name, about in SETS.items() if (root / about.folder).is_dir()]


def read_columns(root: Path, names: Iterable[str], missing: Missing = "stop") -> Iterator[UnseenTask]:
    """The tasks of the named columns, each read when its turn comes, so that only one set is in memory."""
    chosen = list(names)
    if unknown := [name for name in chosen if name not in SETS]:
        raise InputError(f"columns {unknown} are unknown{did_you_mean(unknown[0], TASKS)}; choose from {', '.join(TASKS)}")
    for name in chosen:
        yield read_set(root, name, SETS[name], missing)


def read_set(root: Path, name: str, about: UnseenSet, missing: Missing = "stop") -> UnseenTask:
    """One set as a task. Raises DataError for broken files, and by `missing` for what is not there."""
    data = about.read(root, about.part)
    shape = data.source, tuple(data.cases), data.pool, about.metrics, about.main, about.by_group, LeftOut(files=data.absent)
    return settle(UnseenTask(name, about.title, *shape), missing)


def evaluate_unseen(
    encoder: EvaluatedEncoder,
    root: Path,
    out: Path,
    *,
    routes: Sequence[Route] = ("auto",),
    columns: Iterable[str] | None = None,
    missing: Missing = "stop",
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores the columns found below `root` and writes results.json and outcomes-ROUTE.jsonl to `out`; returns the results.

    `columns` names some of them. `cache` holds the embeddings (default: `out`/embeddings), so that an interruption costs a block.
    Columns and routes scored earlier into the same `out` are kept. Raises InputError where `root` has no column.
    """
    if missing == "keep":
        raise InputError("missing='keep' is for dry runs; choose stop or skip to score")
    for route in routes:
        encoder.encode_queries([], route=route)  # a route that the model lacks is told now, not behind the candidates
    chosen = _chosen(root, columns)
    settings = {name: encoder.run_settings[name] for name in ("threshold", "max_reasoning_tokens")}
    header = header_of(encoder, FORMAT, root / "unseen.json") | {"missing": missing, **settings, "machine": describe_machine()}
    results = continue_results(out, header)
    for task in read_columns(root, chosen, missing):
        for route in routes:
            outcomes, summary = score(encoder, task, route=route, cache=cache or out / "embeddings", progress=progress)
            log.info("%s %s: %s %.1f", task.name, route, task.main, 100 * summary["value"])
            file = out / f"outcomes-{route}.jsonl"
            lines = (
                [line for line in file.read_text().splitlines() if json.loads(line)["task"] != task.name]
                if file.is_file()
                else []
            )
            lines += (json.dumps(asdict(outcome)) for outcome in outcomes)
            write_whole(file, "".join(f"{line}\n" for line in lines))
            scored = results["routes"].get(route, {}) | {task.name: summary}
            results["routes"][route] = {name: scored[name] for name in TASKS if name in scored}
            write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def dry_run_unseen(root: Path, columns: Iterable[str] | None = None) -> str:
    """A dry run: reads every annotation file, counts, and says what is missing, as Markdown. Nothing is encoded."""
    rows = []
    for task in read_columns(root, _chosen(root, columns), "keep"):
        gone = task.left_out
        counts = len(gone.images), len(gone.unknown), len(gone.files)
        rows.append((task.name, len(task.cases), len(task.pool), task.main, *counts))
    names = ("column", "queries", "pool", "metric", "missing images", "ids not in the pool", "missing files")
    return markdown_table(names, "lrrlrrr", rows)


def submit_circo(
    encoder: EvaluatedEncoder, root: Path, file: Path, *, route: Route = "auto", cache: Path, progress: bool = True
) -> Path:
    """The file that CIRCO's test server takes: the first 50 images of each query of its test split."""
    task = read_set(root, "circo_test", CIRCO_TEST)
    write_submission(file, rank_pool(encoder, task, SUBMITTED, route=route, cache=cache, progress=progress))
    return file


def write_submission(path: Path, rankings: Mapping[str, Sequence[str]]) -> None:
    """Writes {query id: [50 image ids]} from query ids and at least 50 image ids each, best first (`score.rank_pool`).

    Raises DataError where one has fewer, or an id twice.
    """
    for query, ids in rankings.items():
        if (count := len(set(ids[:SUBMITTED]))) != SUBMITTED:
            raise DataError(f"query {query}: {count} different images; the server takes {SUBMITTED} for each")
    write_whole(path, json.dumps({query: [int(id) for id in ids[:SUBMITTED]] for query, ids in rankings.items()}))


def table(results: dict[str, Any]) -> str:
    """One line a column: its metric by each route, and what the paper published on the real set, marked as published."""
    routes: dict[str, Any] = results["routes"]
    rows = []
    for name, about in SETS.items():
        known = [scored[name] for scored in routes.values() if name in scored]
        if known:
            cells = [points(scored[name]["value"]) if name in scored else None for scored in routes.values()]
            auto = routes.get("auto", {}).get(name)
            reasoned = f"{points(auto['reasoned'], 0)} %" if auto else None
            sizes = known[0]["queries"], known[0]["pool"], known[0]["main"]
            rows.append((name, *sizes, *cells, reasoned, about.published))
    names = ("column", "queries", "pool", "metric", *routes, "reasoned (auto)", "TRACE, published, real set")
    lines = [markdown_table(names, f"lrrl{'r' * (len(routes) + 2)}", rows)]
    lost = []
    for name, summary in next(iter(routes.values()), {}).items():
        if counts := [f"{what} {about['count']}" for what, about in summary.get("left_out", {}).items()]:
            lost.append(f"- {name}: {', '.join(counts)}")
    return "\n".join([*lines, *(["", "Left out, because files were missing:", *lost] if lost else [])])


def _chosen(root: Path, columns: Iterable[str] | None) -> list[str]:
    chosen = list(columns) if columns is not None else find_columns(root)
    if not chosen:
        raise InputError(f"{root} has the folder of no zero-shot set; docs/unseen.md names the folders of {', '.join(TASKS)}")
    return chosen
