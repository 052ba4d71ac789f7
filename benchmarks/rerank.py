"""What reranking gains and costs: MiniBEIR's rows, the best 10, 20 and 50 of the first stage read again with the query.

    python -m benchmarks.rerank --data data/minibeir --markdown docs/results/rerank.md

The first stage is the adaptive encoder, route auto, over each row's local pool. R@1 before and after, over complex queries (2
steps and more by the label) and simple ones; differences are paired, with a 95 % bootstrap interval. The cost is given as
multiples of encoding the query, both timed in turn over the same drawn complex queries in this process, and in tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from traceir.batch import Pixels, Processor
from traceir.data import mbeir
from traceir.data.folder import Listing, Problems, data_fingerprint, read_row
from traceir.data.report import markdown_table
from traceir.encoder import Encoder
from traceir.errors import TraceError
from traceir.evaluation.embeddings import Embedder
from traceir.evaluation.metrics import bootstrap_difference
from traceir.evaluation.ranking import NO_POSITION, Pool, rank_queries
from traceir.evaluation.results import describe_machine
from traceir.files import write_whole
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query
from traceir.prompts import TURN_END, render_query
from traceir.rerank_prompts import asked_to_describe, render_asked, render_offered
from traceir.retrieval.rerank import TEMPERATURE, UNREADABLE, Reranker, TraceReranker, load_reranker, rerank, target_of

COMPLEX = 2
"""Steps from which a query is complex."""


@dataclass
class Asked:
    """One query: what the first stage found, best first, and whether each of these is right."""

    row: str
    steps: int
    query: Query
    encoding: Encoding
    found: list[Item]
    right: list[bool]
    similarities: list[float]
    scores: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    """Scores that know nothing of the first stage's."""

    def hit(self, top: int, *, alone: bool = False) -> bool:
        """Whether the first is right once the best `top` have been reranked."""
        scores = self.alone if alone else self.scores
        return self.right[min(range(min(top, len(scores))), key=lambda number: (-scores[number], number))]


class Remembered(dict[str, Pixels]):
    """The images of candidates, which come up for many queries, read once; for what is not timed."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.processor = processor

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = self.processor.pixels(ImageInput.open(name))
        return self[name]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        results = measure(options)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(results)
    print(text)
    if options.out:
        write_whole(options.out, json.dumps(results, indent=1) + "\n")
    if options.markdown:
        write_whole(options.markdown, f"# Reranking on MiniBEIR\n\n{text}\n")
    gained = results["gains"]["complex"][str(options.depths[0])]["difference"][0]
    if options.at_least is not None and gained < options.at_least:
        print(f"bound does not hold: {gained:.2f} points, at least {options.at_least} are asked", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    encoder = Encoder.from_pretrained(options.model)
    reranker = load_reranker(options.reranker, encoder if options.reranker == "trace" else None)
    asked = first_stage(encoder, options)
    own = reranker.model if isinstance(reranker, TraceReranker) else None
    if own is not None:
        own.processor.pixel_store = Remembered(copy(own.processor))
    for one in tqdm(asked, desc="reranking", file=sys.stderr, mininterval=5.0):
        reasoning = "" if options.without_reasoning else one.encoding.reasoning
        one.alone = one.scores = reranker.score(one.query, one.found, reasoning=reasoning)
        if own is not None:
            temperature = own.settings.rerank_temperature or TEMPERATURE
            one.scores = [score + cosine / temperature for score, cosine in zip(one.alone, one.similarities, strict=True)]
    if own is not None:
        own.processor.pixel_store = None
    results: dict[str, Any] = {
        "format": 1,
        "model": encoder.fingerprint,
        "reranker": reranker.name if own is None else own.fingerprint,
        "data": data_fingerprint(options.data / "meta.json"),
        "split": options.split,
        "seed": options.seed,
        "reasoning": not options.without_reasoning,
        "machine": describe_machine(),
        "torch": torch.__version__,
        "gains": {},
        "rows": {},
    }
    for name, kind in (
        ("complex", [one for one in asked if one.steps >= COMPLEX]),
        ("simple", [one for one in asked if one.steps < COMPLEX]),
    ):
        results["gains"][name] = gains(kind, options.depths) if kind else {}
        rows = dict.fromkeys(one.row for one in kind)
        results["rows"][name] = {row: gains([one for one in kind if one.row == row], options.depths) for row in rows}
    scored = [number for number, one in enumerate(asked) if one.steps >= COMPLEX and max(one.scores) > UNREADABLE]
    results["reranked"] = len(scored)
    drawn = np.random.default_rng(options.seed).permutation(scored)
    results["cost"] = cost(encoder, reranker, [asked[number] for number in drawn[: options.timed].tolist()], options.depths)
    return results


def first_stage(encoder: Encoder, options: argparse.Namespace) -> list[Asked]:
    """Every query with the best of its row's pool; embeddings are kept in `options.cache`."""
    embedder, problems, listing = Embedder(encoder, options.cache, progress=True), Problems("stop"), Listing(options.data)
    asked: list[Asked] = []
    for task in mbeir.find_tasks(options.data, options.split):
        if options.rows and task.name not in options.rows:
            continue
        row = read_row(task, problems, listing, options.limit)
        prompt = mbeir.read_instructions(options.data).prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        queries = [mbeir.to_query(record, prompt, options.data) for record in row.records]
        items = list(row.items())
        vectors, pool = (
            embedder.queries(lambda queries=queries: iter(queries), len(queries), "auto"),
            embedder.items(row.items, len(items)),
        )
        assert vectors is not None and pool is not None
        ranking = rank_queries(vectors.matrix(), Pool([(row.dids, pool)]), [()] * len(queries), top_k=max(options.depths))
        simple = 0
        ranked = zip(queries, vectors.encodings(), ranking.positions, ranking.scores, strict=True)
        for query, encoding, positions, cosines in ranked:
            simple += (steps := row.labels[str(query.id)].steps) < COMPLEX
            if steps < COMPLEX and options.simple is not None and simple > options.simple:
                continue
            found = [items[at] for at in positions.tolist() if at != NO_POSITION]
            right = [item.id in row.relevant[str(query.id)] for item in found]
            asked.append(Asked(task.name, steps, query, encoding, found, right, cosines[: len(found)].tolist()))
    return asked


def gains(asked: Sequence[Asked], depths: Sequence[int]) -> dict[str, Any]:
    """R@1 before and after, in points, and what could at most be had: that a right one is among the best."""
    before = np.array([one.right[0] for one in asked], dtype=float)
    made: dict[str, Any] = {"queries": len(asked), "first": 100 * float(before.mean())}
    for depth in depths:
        after, alone = (np.array([one.hit(depth, alone=by_itself) for one in asked], float) for by_itself in (False, True))
        apart = bootstrap_difference(after, before)
        made[str(depth)] = {
            "after": 100 * float(after.mean()),
            "alone": 100 * float(alone.mean()),
            "difference": [100 * apart.mean, 100 * apart.low, 100 * apart.high],
            "most": 100 * float(np.mean([any(one.right[:depth]) for one in asked])),
        }
    return made


def cost(encoder: Encoder, reranker: Reranker, timed: Sequence[Asked], depths: Sequence[int]) -> dict[str, Any]:
    """CPU seconds of reranking as multiples of the query's own encoding, taken in turn, query by query: medians, and over all."""
    spent: dict[str, list[float]] = {name: [] for name in ("query", *map(str, depths))}
    for one in tqdm(timed, desc="timing", file=sys.stderr, mininterval=5.0):
        for name, seconds in spent.items():
            started = time.process_time()
            if name == "query":
                encoder.encode_queries([one.query])
            else:
                known: dict[str, Any] = {"reasoning": one.encoding.reasoning, "similarities": one.similarities}
                rerank(reranker, one.query, one.found, top=int(name), **known)
            seconds.append(time.process_time() - started)
    started = time.process_time()
    encoder.encode_queries([one.query for one in timed])
    batched = time.process_time() - started
    own = sum(len(encoder.model.processor.lay_out(encoder.model.prompt(one.query))) + one.encoding.tokens for one in timed)
    made: dict[str, Any] = {
        "queries": len(timed),
        "query_ms": 1000 * statistics.median(spent["query"]),
        "query_tokens": own / len(timed),
    }
    for depth in depths:
        tokens = sum(tokens_read(reranker, one, depth) for one in timed) if isinstance(reranker, TraceReranker) else None
        seconds = spent[str(depth)]
        made[str(depth)] = {
            "ms": 1000 * statistics.median(seconds),
            "to_query": sum(seconds) / sum(spent["query"]),
            "to_batched_query": sum(seconds) / batched,
            "tokens_to_query": tokens and tokens / own,
        }
    return made


def tokens_read(reranker: TraceReranker, asked: Asked, depth: int) -> int:
    """Those of the candidates; and of the query, once, where it is part of the prompt."""
    lay_out, version = reranker.model.processor.lay_out, reranker.model.settings.prompt_version
    if reranker.answers is None:
        written = target_of(asked.encoding.reasoning)
        return sum(
            len(lay_out(render_query(asked_to_describe(item), version), written, end=TURN_END)) for item in asked.found[:depth]
        )
    offered = sum(len(lay_out(render_offered(item, version))) for item in asked.found[:depth])
    return offered + len(lay_out(render_asked(asked.query, version, asked.encoding.reasoning)))


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    depths = [key for key in results["cost"] if key.isdigit()]
    named = {"model": "model", "reranker": "reranker", "data": "data", "split": "split", "seed": "seed"}
    about = ", ".join(f"{word} {results[name]}" for name, word in named.items())
    part = "part" if results["reasoning"] else "no part"
    header = ["queries", "n", "first stage"]
    header += [f"{word} {depth}" for word in ("top", "gain, top", "by itself, top", "right in top") for depth in depths]
    rows = [
        (name, figures)
        for kind, gained in results["gains"].items()
        for name, figures in ((f"**{kind}**", gained), *results["rows"][kind].items())
        if figures
    ]
    spent = results["cost"]
    costs = [
        (
            f"top {depth}",
            f"{spent[depth]['ms']:.1f}",
            f"**{spent[depth]['to_query']:.2f}**",
            f"{spent[depth]['to_batched_query']:.2f}",
            f"{spent[depth]['tokens_to_query'] or math.nan:.1f}",
        )
        for depth in depths
    ]
    return "\n".join([
        f"`python -m benchmarks.rerank`; {about}; {results['machine']}, torch {results['torch']}. What the encoder wrote is "
        f"{part} of what is read. R@1 in points, `by itself` without the first stage, intervals are paired bootstraps over "
        "queries.\n",
        markdown_table(header, "l" + "r" * (len(header) - 1), [_gain_row(*row, depths) for row in rows]),
        f"\n{results['reranked']} of the complex queries were reranked, of the others nothing was computed. Cost over "
        f"{spent['queries']} of them, drawn by the seed. Encoding one by route auto takes {spent['query_ms']:.1f} ms of CPU "
        f"alone (median) and {spent['query_tokens']:.0f} tokens.\n",
        markdown_table(
            ("reranked", "ms of CPU", "times the query alone", "times the query in a batch", "times its tokens"), "lrrrr", costs
        ),
    ])  # fmt: skip


def _gain_row(name: str, kind: Mapping[str, Any], depths: Sequence[str]) -> list[str]:
    after = [f"{kind[depth]['after']:.1f}" for depth in depths]
    differences = [kind[depth]["difference"] for depth in depths]
    gained = [f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" for mean, low, high in differences]
    alone, most = ([f"{kind[depth][key]:.1f}" for depth in depths] for key in ("alone", "most"))
    return [name, str(kind["queries"]), f"{kind['first']:.1f}", *after, *gained, *alone, *most]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of the first stage (default: the bundled one)")
    parser.add_argument("--reranker", default="trace", help="as traceir search --rerank takes it")
    parser.add_argument("--data", required=True, type=Path, help="MiniBEIR folder (its labels tell simple from complex)")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--rows", nargs="*", help="these alone")
    parser.add_argument("--limit", type=int, help="the first so many queries of a row")
    parser.add_argument("--simple", type=int, help="at most so many simple queries of a row (default: all)")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--timed", type=int, default=200, help="complex queries whose cost is measured")
    parser.add_argument("--without-reasoning", action="store_true", help="leave what the query wrote out of the prompt")
    parser.add_argument("--cache", type=Path, default=Path("out/rerank/embeddings"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="draws the queries that are timed")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--markdown", type=Path, help="such as docs/results/rerank.md")
    parser.add_argument(
        "--at-least", type=float, metavar="POINTS", help="bound on the gain of complex queries at the first depth"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
