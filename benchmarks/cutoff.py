"""How much a cut-off keeps of what is there, and what it lets pass of what is not: docs/results/cutoff.md.

`python -m benchmarks.cutoff --emoji EMOJI --emoji-model CHECKPOINT` measures MiniBEIR (the bundled model) and a folder of emoji
in M-BEIR's layout, each row against its local pool. What is encoded lies in --cache and is not encoded again.

Present are a row's own test queries. Absent are
- foreign: test queries of the same modality from other worlds of MiniBEIR;
- family gone: the row's own, where the pool has lost their right candidates and those that M-BEIR lists as wrong (near ones);
- answer gone: the row's own, where it has lost only what is right, and every near miss stays.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from traceir.background import choose_queries
from traceir.checkpoint import bundled_model
from traceir.data import mbeir
from traceir.data.folder import Listing, Problems, Row, read_row
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.evaluation.embeddings import Embedder
from traceir.evaluation.results import describe_machine
from traceir.images import ImageInput
from traceir.items import Modality, Query, Route
from traceir.retrieval.cutoff import thresholds

Scores = npt.NDArray[np.float32]
RATE: Final = 0.01
RATES: Final = (0.1, 0.01)
IMAGES: Final = 500
"""Of one world, in a background of images."""
SEED: Final = 0
FOREIGN: Final = 2
"""The column of foreign queries."""
WORLDS: Final = {
    "visualnews": "news", "edis": "news", "mscoco": "scenes", "cirr": "scenes", "nights": "scenes", "fashion200k": "garments",
    "fashioniq": "garments", "webqa": "entities", "oven": "entities", "infoseek": "entities",
}  # fmt: skip
STATISTICS: Final[dict[str, Callable[[Scores, Scores], Scores]]] = {
    "best score": lambda best, spread: best[:, 0],
    "less the mean over the pool": lambda best, spread: best[:, 0] - spread[0],
    "the same in standard deviations": lambda best, spread: (best[:, 0] - spread[0]) / spread[1],
    "less the mean of ranks 2 to 11": lambda best, spread: best[:, 0] - best[:, 1:11].mean(axis=1),
    "less the mean of ranks 11 to 50": lambda best, spread: best[:, 0] - best[:, 10:50].mean(axis=1),
    "excess over rank 50, by an exponential tail": lambda best, spread: (
        (best[:, 0] - best[:, 49]) / (best[:, 1:49].mean(axis=1) - best[:, 49])
    ),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A row with its vectors; `right` and `near` are places in the pool, by query."""

    row: Row
    world: str
    pool: Scores
    queries: Scores
    right: list[list[int]]
    near: list[list[int]]

    @property
    def name(self) -> str:
        return self.row.task.name

    @property
    def modality(self) -> Modality:
        return self.row.task.query_modality

    def without(self, positions: Sequence[Sequence[int]]) -> Scores:
        """The scores of the queries where the pool has lost these places."""
        scores = self.queries @ self.pool.T
        for own, lost in zip(scores, positions, strict=True):
            own[list(lost)] = -1.0
        return scores


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many; means over backgrounds have fractions."""

    count: float
    of: float

    def __str__(self) -> str:
        low, high = wilson(self.count, self.of)
        return f"{100 * self.count / self.of:.1f} ({100 * low:.1f} to {100 * high:.1f})" if self.of else "-"

    def __add__(self, other: Share) -> Share:
        return Share(self.count + other.count, self.of + other.of)

    def __truediv__(self, times: float) -> Share:
        return Share(self.count / times, self.of / times)


def wilson(count: float, of: float, z: float = 1.96) -> tuple[float, float]:
    """A 95 % interval of a share, which has a width also where none or all are counted (Wilson, 1927)."""
    if not of:
        return 0.0, 1.0
    share = count / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half) / (1 + z * z / of), min(1.0, (middle + half) / (1 + z * z / of))


def over(best: Scores, threshold: float) -> Share:
    return Share(int(np.count_nonzero(best > threshold)), len(best))


# What is measured


def read_rows(data: Path, embedder: Embedder, route: Route) -> list[Measured]:
    problems, listing, instructions = Problems("stop"), Listing(data), mbeir.read_instructions(data)
    measured: list[Measured] = []
    for task in mbeir.find_tasks(data, "test"):
        row = read_row(task, problems, listing, None)
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        positions = {did: position for position, did in enumerate(row.dids)}
        right = [[positions[did] for did in row.relevant[record.qid] if did in positions] for record in row.records]
        wrong = [[positions[did] for did in record.negatives if did in positions] for record in row.records]
        measured.append(
            Measured(
                row, WORLDS.get(task.dataset, task.dataset),
                matrix(embedder.items(row.items, len(row.dids))),
                embed(embedder, [mbeir.to_query(record, prompt, data) for record in row.records], route),
                right, [rights + other for rights, other in zip(right, wrong, strict=True)],
            )
        )  # fmt: skip
    problems.settle()
    return measured


def embed(embedder: Embedder, queries: Sequence[Query], route: Route) -> Scores:
    return matrix(embedder.queries(lambda: iter(queries), len(queries), route))


def matrix(embeddings: Any) -> Scores:
    assert embeddings is not None, "one process has all shares"
    matrix: Scores = embeddings.matrix()
    return matrix


def foreign_queries(data: Path, embedder: Embedder, route: Route) -> dict[tuple[str, Modality], Scores]:
    """Test queries of MiniBEIR by world and modality, with the instructions of their own rows."""
    scores: dict[tuple[str, Modality], list[Scores]] = {}
    for row in read_rows_without_pools(data, embedder, route):
        scores.setdefault(row[0], []).append(row[1])
    return {key: np.concatenate(own) for key, own in scores.items()}


def read_rows_without_pools(data: Path, embedder: Embedder, route: Route) -> Iterator[tuple[tuple[str, Modality], Scores]]:
    instructions = mbeir.read_instructions(data)
    for task in mbeir.find_tasks(data, "test"):
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        queries = [mbeir.to_query(record, prompt, data) for record in mbeir.read_queries(task.query_path)]
        yield (WORLDS[task.dataset], task.query_modality), embed(embedder, queries, route)


def images_of(data: Path, world: str) -> list[Query]:
    """Images of validation queries of a world of MiniBEIR, as somebody's folder of images that are not in a collection."""
    tasks = [task for task in mbeir.find_tasks(data, "val") if WORLDS[task.dataset] == world]
    records = chain.from_iterable(mbeir.read_queries(task.query_path) for task in tasks)
    paths = dict.fromkeys(record.image_path for record in records if record.image_path)
    return [Query.of(image=ImageInput.open(data / path)) for path in islice(paths, IMAGES)]


@dataclass(frozen=True, slots=True)
class Backgrounds:
    """Background queries as `traceir index calibrate` makes them: texts, and by world what it makes of a folder of images."""

    texts: Scores
    images: Mapping[str, Mapping[Modality, Scores]]

    def of(self, modality: Modality, strange_to: str) -> dict[str, Scores]:
        """By the world that the images show; a row's own world gives none."""
        if modality == "text":
            return {"": self.texts}
        return {world: own[modality] for world, own in self.images.items() if world != strange_to}


def read_backgrounds(data: Path, embedder: Embedder, model: Path, route: Route) -> Backgrounds:
    texts, _ = choose_queries([], model)
    images: dict[str, dict[Modality, Scores]] = {}
    for world in sorted(set(WORLDS.values())):
        if own := images_of(data, world):
            pairs = [Query((*query.parts, *texts[number % len(texts)].parts)) for number, query in enumerate(own)]
            images[world] = {"image": embed(embedder, own, route), "image,text": embed(embedder, pairs, route)}
    return Backgrounds(embed(embedder, texts, route), images)


# The tables


def compare_statistics(rows: Sequence[Measured], foreign: Mapping[tuple[str, Modality], Scores]) -> str:
    """At 1 % of false alarms on one half of the absent queries: false alarms on the other half, and present queries kept."""
    draw = np.random.default_rng(SEED)
    sums: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        strangers = np.concatenate([own for (world, kind), own in foreign.items() if world != row.world and kind == row.modality])
        present = features(row.queries @ row.pool.T)
        absent = {
            "foreign": strangers @ row.pool.T, "family gone": row.without(row.near), "answer gone": row.without(row.right),
        }  # fmt: skip
        for kind, scores in absent.items():
            order = draw.permutation(len(scores))
            first, other = (features(scores[half]) for half in np.array_split(order, 2))
            for name, statistic in STATISTICS.items():
                [threshold] = thresholds({"text": statistic(*first)}, RATE).values()
                alarms, kept = (over(statistic(*asked), threshold) for asked in (other, present))
                sums.setdefault((name, kind), []).append((alarms.count / alarms.of, kept.count / kept.of))
    kinds = ("foreign", "family gone", "answer gone")
    lines = ["| statistic | " + " | ".join(f"{kind}: alarms | kept" for kind in kinds) + " |", "|---" * 7 + "|"]
    for name in STATISTICS:
        means = [100 * np.mean(sums[name, kind], axis=0) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(f"{alarms:.1f} | {kept:.1f}" for alarms, kept in means) + " |")
    return "\n".join(lines)


def features(scores: Scores) -> tuple[Scores, Scores]:
    """The 50 best scores of each query, best first, and mean and standard deviation of all."""
    best = -np.sort(-np.partition(scores, -50, axis=1)[:, -50:], axis=1)
    return best, np.stack([scores.mean(axis=1), scores.std(axis=1)])


def measure_rows(
    rows: Sequence[Measured], backgrounds: Backgrounds, foreign: Mapping[tuple[str, Modality], Scores], rate: float
) -> str:
    """As a user has it: thresholds from the background, whatever the absent queries are."""
    lines = [
        f"| row, at 1 in {1 / rate:.0f} | present: kept | right one kept | foreign: alarms | family gone | answer gone | "
        "kept at that rate |",
        "|---" * 7 + "|",
    ]
    total: list[Share] = []
    for row in rows:
        try:
            shares = measure_row(row, backgrounds, foreign, rate)
        except InputError:
            lines.append(f"| {row.name} | the background is too small |" + " |" * 5)
            continue
        total = [own + other for own, other in zip(total, shares, strict=True)] if total else shares
        lines.append(f"| {row.name} | " + " | ".join(map(str, shares)) + " |")
    if total:
        lines.append("| **all** | " + " | ".join(map(str, total)) + " |")
    return "\n".join(lines)


def measure_row(
    row: Measured, backgrounds: Backgrounds, foreign: Mapping[tuple[str, Modality], Scores], rate: float
) -> list[Share]:
    """The shares of `measure_rows`; for images means over the worlds that the background may show, which are never tested."""
    present, hard = row.queries @ row.pool.T, row.without(row.right).max(axis=1)
    best, easy = present.max(axis=1), row.without(row.near).max(axis=1)
    rights = np.array(
        [max((own[position] for position in positions), default=-1.0) for own, positions in zip(present, row.right, strict=True)]
    )
    tenth = np.partition(present, -10, axis=1)[:, -10]
    sums: list[Share] = []
    chosen = backgrounds.of(row.modality, row.world)
    for shown, vectors in chosen.items():
        [threshold] = thresholds({"text": (vectors @ row.pool.T).max(axis=1)}, rate).values()
        strangers = [own for (world, kind), own in foreign.items() if world not in (row.world, shown) and kind == row.modality]
        above = rights[rights >= tenth]
        shares = [
            over(best, threshold), over(above, threshold),
            sum((over((own @ row.pool.T).max(axis=1), threshold) for own in strangers), Share(0, 0)),
            over(easy, threshold), over(hard, threshold),
        ]  # fmt: skip
        sums = [own + other for own, other in zip(sums, shares, strict=True)] if sums else shares
    # A foreign query is asked under every background but that of its own world.
    times = [len(chosen) - (column == FOREIGN and len(chosen) > 1) for column in range(len(sums))]
    every = np.concatenate([own for (world, kind), own in foreign.items() if world != row.world and kind == row.modality])
    [exact] = thresholds({"text": (every @ row.pool.T).max(axis=1)}, rate).values()
    return [*(own / by for own, by in zip(sums, times, strict=True)), over(best, exact)]


def report(title: str, data: Path, model: Path, mini: Path, cache: Path, route: Route, note: str) -> str:
    encoder = Encoder.from_pretrained(model)
    embedder = Embedder(encoder, cache, progress=True)
    rows, foreign = read_rows(data, embedder, route), foreign_queries(mini, embedder, route)
    backgrounds = read_backgrounds(mini, embedder, model, route)
    tables = "\n\n".join(measure_rows(rows, backgrounds, foreign, rate) for rate in RATES)
    return (
        f"## {title}\n\nModel `{encoder.fingerprint}`{note}, route {route}.\n\n{tables}\n\n### Which statistic\n\n"
        f"{compare_statistics(rows, foreign)}\n"
    )


HEAD: Final = """# The cut-off, measured

    {command}

Seed {seed}, {machine}. Shares in %, with Wilson's 95 % interval. Each row is searched in its local pool.

Of the present queries, the row's own, `kept` are those that get any hit; `right one kept` is of those that have a right candidate
among the first ten, how many keep it. Absent queries and their false alarms: `foreign` are queries of MiniBEIR's other worlds;
`family gone` are the row's own in a pool without their right candidates and the near ones that M-BEIR lists beside them;
`answer gone` are the same where only the right ones are taken out, so that every near miss stays: no measure of similarity
can tell these from present ones, and a user often would not want it to.

`kept at that rate` are the present queries that get a hit above the threshold which just this share of the row's foreign queries
passes: what the score itself can do, whatever the background.

Thresholds are those of `traceir index calibrate`: texts are its defaults (the bundled model's own, else the built-in ones).
Images, and pairs of them with these texts, are validation images of one world of MiniBEIR, and the foreign queries then those
of the worlds that are neither the row's nor the background's, mean over all such choices.

A cut-off is worth what the model's scores are. The emoji model is small, made from random weights and a few thousand images,
and has seen no other kind: where foreign images lie as near to its emoji as emoji do, `kept at that rate` shows that no
threshold tells them apart. Texts it tells better.

"Which statistic" sets the threshold of each on one half of the absent queries and measures on the other half, mean over the rows.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/minibeir"), metavar="DIR")
    parser.add_argument("--emoji", type=Path, metavar="DIR", help="a folder of emoji in M-BEIR's layout")
    parser.add_argument("--emoji-model", type=Path, metavar="CHECKPOINT", help="of `traceir train --preset emoji`")
    parser.add_argument("--emoji-note", default="", metavar="T", help="how it was trained")
    parser.add_argument("--cache", type=Path, default=Path("out/cutoff"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("docs/results/cutoff.md"), metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = "python -m benchmarks.cutoff --emoji EMOJI --emoji-model out/runs/emoji/checkpoint"
    parts = [HEAD.format(command=command, seed=SEED, machine=describe_machine())]
    parts.append(report("MiniBEIR full", args.data, bundled_model(), args.data, args.cache, "auto", ", the bundled one"))
    if args.emoji is not None:
        note = f", `{f'traceir train --preset emoji {args.emoji_note}'.strip()}`"
        parts.append(report("Emoji", args.emoji, args.emoji_model, args.data, args.cache, "direct", note))
    args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
