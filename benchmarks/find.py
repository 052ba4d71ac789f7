"""What finds more: vectors, words, or both; and which cosine makes two images one: docs/results/find.md.

    python -m benchmarks.find --emoji EMOJI --markdown docs/results/find.md --out benchmarks/results/find.json

The rows of MiniBEIR that have words on both sides, each test query against its local pool, by the bundled model. EMOJI, which may
be left out, is a folder of emoji in M-BEIR's layout: each picture under its name. A search of every mode follows the other for
each query, the query is encoded once; times are medians of the search without the encoder, and their ratio to mode vector.

Near-duplicates are made: each image again as JPEG, smaller, cropped, brighter, and moved a little, as a second shot is. What is
no near-duplicate is the nearest other image of the set, for bursts any two images."""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageEnhance

from traceir.checkpoint import bundled_model
from traceir.data import mbeir
from traceir.encoder import Encoder
from traceir.evaluation.results import describe_machine
from traceir.images import ImageInput
from traceir.index import open_index
from traceir.items import Encoding, Item, Query, Route
from traceir.retrieval.folding import BURST, SAME
from traceir.retrieval.pipeline import MODES
from traceir.retrieval.search import Searcher

ROWS: Final = ("webqa_task1", "webqa_task2", "edis_task2")
FOLDED: Final = ("mscoco_task0_test", "nights_task4", "visualnews_task0", "fashion200k_task0")
COSINES: Final = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)
AT_ONCE: Final = 64


class Remembering:
    """An encoder that encodes each query once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.known = encoder, dict[str, Encoding]()
        self.fingerprint, self.prompt_version, self.width = encoder.fingerprint, encoder.prompt_version, encoder.width

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        for query in queries:
            if query.content_hash() not in self.known:
                [self.known[query.content_hash()]] = self.encoder.encode_queries([query], route=route)
        return [self.known[query.content_hash()] for query in queries]

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return [
            own for start in range(0, len(items), AT_ONCE) for own in self.encoder.encode_items(items[start : start + AT_ONCE])
        ]


def measure(name: str, encoder: Encoder, items: Sequence[Item], asked: Sequence[tuple[Query, set[str]]]) -> dict[str, Any]:
    """Recall and seconds of every mode over one collection."""
    remembering = Remembering(encoder)
    ranks: dict[str, list[float]] = {mode: [] for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder, open_index(Path(folder) / "index", remembering, create=True) as index:
        searcher = Searcher(remembering, index)
        searcher.add(items)
        for mode in MODES:
            searcher.search(asked[0][0], mode=mode)
        for query, right in asked:
            for mode in MODES:
                result = searcher.search(query, mode=mode)
                ranks[mode].append(next((hit.rank for hit in result.hits if hit.id in right), np.inf))
                seconds[mode].append(result.seconds.search)
    found = {
        mode: {
            "r1": float(np.mean(np.array(own) <= 1)), "r10": float(np.mean(np.array(own) <= 10)),
            "ms": 1000 * statistics.median(seconds[mode]),
            "ratio": statistics.median(map(lambda a, b: a / b, seconds[mode], seconds["vector"])),
        }
        for mode, own in ranks.items()
    }  # fmt: skip
    return {"name": name, "items": len(items), "queries": len(asked), "modes": found}


def rows_of(data: Path, limit: int) -> Iterator[tuple[str, list[Item], list[tuple[Query, set[str]]]]]:
    instructions = mbeir.read_instructions(data)
    for task in mbeir.find_tasks(data, "test"):
        if task.name not in ROWS:
            continue
        prompt = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)[0]
        items = [mbeir.to_item(candidate, data) for candidate in mbeir.read_pool(task.pool_path)]
        records = list(mbeir.read_queries(task.query_path))[:limit]
        asked = [(mbeir.to_query(record, prompt, data), set(record.positives)) for record in records]
        yield f"MiniBEIR {task.name}", items, asked


def emoji(data: Path, limit: int) -> Iterator[tuple[str, list[Item], list[tuple[Query, set[str]]]]]:
    """Pictures under their names, by the names themselves and by CLDR's keywords, from which other words may be missing."""
    local = data / "cand_pool" / "local"
    names = {own.did: own.text for own in mbeir.read_pool(local / "mbeir_emoji_task1_cand_pool.jsonl")}
    items = []
    for candidate in mbeir.read_pool(local / "mbeir_emoji_task0_cand_pool.jsonl"):
        set_id, _, number = candidate.did.partition(":")
        item = mbeir.to_item(candidate, data)
        items.append(Item(item.parts, id=item.id, fields={"name": names[f"{set_id}:{int(number) + 1}"] or ""}))
    records = list(mbeir.read_queries(data / "query" / "test" / "mbeir_emoji_task0_test.jsonl"))
    for kind in ("names", "keywords"):
        own = [record for record in records if ("," in (record.text or "")) == (kind == "keywords")][:limit]
        yield f"emoji by {kind}", items, [(Query.of(text=record.text, target="image"), set(record.positives)) for record in own]


# Near-duplicates


def shot_again(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=75)
    (width, height), edge = image.size, max(1, round(0.03 * min(image.size)))
    moved = max(1, round(0.02 * width))
    yield "JPEG", Image.open(packed).convert("RGB")
    yield "3/4 size", image.resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.LANCZOS)
    yield "brighter", ImageEnhance.Brightness(image).enhance(1.1)
    yield "cropped", image.crop((edge, edge, width - edge, height - edge))
    yield "moved", image.transform(image.size, Image.Transform.AFFINE, (1, 0, moved, 0, 1, moved), Image.Resampling.BILINEAR)


def measure_folding(name: str, encoder: Encoder, paths: Sequence[Path], again: int) -> dict[str, Any]:
    """Cosines of images to themselves shot again, to the nearest other, and to any other."""
    remembering = Remembering(encoder)
    images = [ImageInput.open(path).load() for path in paths]
    vectors = np.stack([own.vector for own in remembering.encode_items([Item.of(image=image) for image in images])])
    made = [(kind, row, other) for row, image in enumerate(images[:again]) for kind, other in shot_again(image)]
    others = np.stack([own.vector for own in remembering.encode_items([Item.of(image=other) for _, _, other in made])])
    cosines: dict[str, list[float]] = {}
    for (kind, row, _), vector in zip(made, others, strict=True):
        cosines.setdefault(kind, []).append(float(vectors[row] @ vector))
    between = vectors @ vectors.T
    cosines["any other"] = between[np.triu_indices(len(images), 1)].tolist()
    np.fill_diagonal(between, -1)
    cosines["nearest other"] = between.max(axis=1).tolist()
    return {"name": name, "images": len(images), "shares": {
        kind: [float(np.mean(np.array(own) >= cosine)) for cosine in COSINES] for kind, own in cosines.items()
    }}  # fmt: skip


def image_sets(data: Path, emoji: Path | None, count: int) -> Iterator[tuple[str, list[Path]]]:
    draw = np.random.default_rng(0)
    pools = [(name, data, f"mbeir_{name}_cand_pool.jsonl") for name in FOLDED]
    pools += [("emoji", emoji, "mbeir_emoji_task0_cand_pool.jsonl")] if emoji else []
    for name, folder, file in pools:
        pool = mbeir.read_pool(folder / "cand_pool" / "local" / file)
        paths = list(dict.fromkeys(folder / own.image_path for own in pool if own.image_path))
        yield name, [paths[at] for at in draw.choice(len(paths), min(count, len(paths)), replace=False)]


# The tables


def recall_table(measured: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| collection | items | queries | " + " | ".join(f"{mode} R@1 / R@10, %" for mode in MODES) + " | ms of a search | "
        "keyword / vector | hybrid / vector |",
        "|---" * 9 + "|",
    ]
    for own in measured:
        modes = own["modes"]
        recalls = " | ".join(f"{100 * modes[mode]['r1']:.1f} / {100 * modes[mode]['r10']:.1f}" for mode in MODES)
        times = " / ".join(f"{modes[mode]['ms']:.1f}" for mode in MODES)
        ratios = " | ".join(f"{modes[mode]['ratio']:.2f}" for mode in ("keyword", "hybrid"))
        lines.append(f"| {own['name']} | {own['items']} | {own['queries']} | {recalls} | {times} | {ratios} |")
    return "\n".join(lines)


def folding_table(measured: Iterable[dict[str, Any]]) -> str:
    lines = ["| set, % of cosines at or above | " + " | ".join(map(str, COSINES)) + " |", "|---" * (len(COSINES) + 1) + "|"]
    for own in measured:
        for kind, shares in own["shares"].items():
            lines.append(f"| {own['name']}: {kind} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/minibeir"), metavar="DIR")
    parser.add_argument("--emoji", type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=320, help="queries of a row")
    parser.add_argument("--images", type=int, default=250, help="of a set, a third of which are shot again")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the report there, text before the first table as it is"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(arguments)
    encoder = Encoder.from_pretrained(bundled_model())
    collections = [*rows_of(args.data, args.limit), *(emoji(args.emoji, args.limit) if args.emoji else ())]
    found = []
    for name, items, asked in collections:
        print(f"{name}: {len(items)} items, {len(asked)} queries", file=sys.stderr)
        found.append(measure(name, encoder, items, asked))
    sets = image_sets(args.data, args.emoji, args.images)
    folded = [measure_folding(name, encoder, paths, args.images // 3) for name, paths in sets]
    about = f"Model `{encoder.fingerprint}`, {describe_machine()}, seed 0; `fold` is {SAME}, for bursts {BURST}."
    tables = f"{about}\n\n{recall_table(found)}\n\n{folding_table(folded)}\n"
    print(tables)
    if args.markdown:
        before = args.markdown.read_text(encoding="utf-8").partition("\nModel `")[0] if args.markdown.exists() else "# Finding\n"
        args.markdown.write_text(f"{before}\n{tables}", encoding="utf-8")
    if args.out:
        args.out.write_text(json.dumps({"about": about, "found": found, "cosines": COSINES, "folded": folded}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
