"""Makes the frozen data of the demonstration and the tests: `python -m benchmarks.fixture`.

`src/traceir/lab/minibeir.zip` is a cut of the small MiniBEIR: the first test queries of each row that show all its numbers of
steps, their answers and near twins; a few training queries and pretraining examples. `tests/fixtures/unseen.zip` holds a few
cases of each unseen set. Images are compressed more. Both are byte-identical on a rebuild with the same version of Pillow.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from traceir.lab.fixture import ARCHIVE
from traceir.minibeir.build import FORMATS, build
from traceir.minibeir.rows import ROWS, derive_seed
from traceir.minibeir.unseen.build import SETS, write_parts

UNSEEN = Path("tests/fixtures/unseen.zip")
QUERIES, TRAIN, PRETRAINING = 8, 4, 4
POOLS = {"webqa_task2": 24, "oven_task8": 24, "infoseek_task8": 24, "fashion200k_task0": 24, "visualnews_task0": 24}
"""Candidates of a row, where they are not forty."""
CASES = {"genecis": 1, "sugarcrepe": 1, "circo": 12, "vist": 2, "multiturnfashion": 3}
"""Cases of an unseen set, where they are not four."""
JPEG_QUALITY = 25


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _dump(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _choose(queries: list[dict[str, Any]], steps: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
    """The first of each number of steps, then the first others, in file order."""
    first = {steps(query): query["qid"] for query in reversed(queries)}
    others = [query["qid"] for query in queries if query["qid"] not in first.values()]
    chosen = {*first.values(), *others[: QUERIES - len(first)]}
    return [query for query in queries if query["qid"] in chosen]


def _cut_row(root: Path, name: str, pool_name: str) -> Iterator[tuple[str, bytes]]:
    queries = _choose(
        _read(root / f"query/test/mbeir_{name}_test.jsonl"), lambda query: json.loads(query["query_src_content"])["steps"]
    )
    pool_path = f"cand_pool/local/mbeir_{pool_name}_cand_pool.jsonl"
    pool = _read(root / pool_path)
    most = POOLS.get(name, 40)
    kept = {did: None for query in queries for did in query["pos_cand_list"]}
    for index in range(16):  # near twins of all queries by turns, then fill
        for query in queries:
            if index < len(query["neg_cand_list"]) and len(kept) < most:
                kept[query["neg_cand_list"][index]] = None
    kept |= dict.fromkeys([each["did"] for each in pool if each["did"] not in kept][: max(0, most - len(kept))])
    for query in queries:
        query["neg_cand_list"] = [did for did in query["neg_cand_list"] if did in kept]
    qids = {query["qid"] for query in queries}
    yield f"query/test/mbeir_{name}_test.jsonl", _dump(queries)
    yield pool_path, _dump(each for each in pool if each["did"] in kept)
    labels = f"cot/test/mbeir_{name}_test_cot.jsonl"
    yield labels, _dump(each for each in _read(root / labels) if each["qid"] in qids)
    qrels = f"qrels/test/mbeir_{name}_test_qrels.txt"
    lines = (root / qrels).read_text(encoding="utf-8").splitlines(keepends=True)
    yield qrels, "".join(line for line in lines if line.split()[0] in qids).encode()


def _cut_train(root: Path) -> Iterator[tuple[str, bytes]]:
    """The first queries of each data set; the answers of a hard-negative group are each other's negatives."""
    union = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    kept: set[str] = set()
    for dataset in dict.fromkeys(row.dataset for row in ROWS):
        queries = _read(root / f"query/train/mbeir_{dataset}_train.jsonl")[:TRAIN]
        for start in range(0, TRAIN, 4):
            group = queries[start : start + 4]
            answers = [query["pos_cand_list"][0] for query in group]
            for query in group:
                query["neg_cand_list"] = [did for did in answers if did not in query["pos_cand_list"]]
            kept.update(answers)
        yield f"query/train/mbeir_{dataset}_train.jsonl", _dump(queries)
        qids = {query["qid"] for query in queries}
        labels = f"cot/train/mbeir_{dataset}_train_cot.jsonl"
        yield labels, _dump(each for each in _read(root / labels) if each["qid"] in qids)
        qrels = f"qrels/train/mbeir_{dataset}_train_qrels.txt"
        lines = (root / qrels).read_text(encoding="utf-8").splitlines(keepends=True)
        yield qrels, "".join(line for line in lines if line.split()[0] in qids).encode()
    yield union, _dump(each for each in _read(root / union) if each["did"] in kept)


def cut(root: Path) -> dict[str, bytes]:
    """The files of the fixture, from a small MiniBEIR."""
    files: dict[str, bytes] = {}
    for row in ROWS:
        files.update(_cut_row(root, row.name, f"{row.name}_test" if row.split_pools else row.name))
    union = dict.fromkeys(line for name in files if "/local/" in name for line in files[name].splitlines(keepends=True))
    files["cand_pool/global/mbeir_union_test_cand_pool.jsonl"] = b"".join(union)
    files.update(_cut_train(root))
    for path in (root / "lessons").glob("*.jsonl"):
        files[f"lessons/{path.name}"] = _dump(_read(path)[:PRETRAINING])
    table = "instructions/query_instructions.tsv"
    lines = [json.loads(line) for name, content in files.items() if name.endswith(".jsonl") for line in content.splitlines()]
    images = {line[key] for line in lines for key in ("img_path", "query_img_path") if line.get(key)}
    return files | {table: (root / table).read_bytes()} | {name: _compress(root / name) for name in images}


def _compress(path: Path) -> bytes:
    if path.suffix not in FORMATS:
        return path.read_bytes()
    packed = io.BytesIO()
    with Image.open(path) as image:
        shown = image.convert("RGB") if path.suffix == ".jpg" else image.convert("RGB").quantize(32)
        shown.save(packed, format=FORMATS[path.suffix], quality=JPEG_QUALITY, optimize=True)
    return packed.getvalue()


def pack(files: Mapping[str, bytes], out: Path) -> None:
    """One zip file, the same for the same files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in sorted(files.items()):
            kind = zipfile.ZIP_STORED if Path(name).suffix in FORMATS else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, kind, 9)
    print(f"{out}: {len(files)} files, {out.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    work = Path(tempfile.mkdtemp())
    try:
        pack(cut(build(work / "small", scale="small", splits=("train", "test"))), ARCHIVE)
        parts = {name: each.make(CASES.get(name, 4), random.Random(derive_seed("fixture", name))) for name, each in SETS.items()}
        for name, part in parts.items():
            SETS[name].check(part)
        write_parts(work / "unseen", parts, {"name": "MiniBEIR unseen", "scale": "fixture"})
        paths = [path for path in (work / "unseen").rglob("*") if path.is_file()]
        pack({path.relative_to(work / "unseen").as_posix(): _compress(path) for path in paths}, UNSEEN)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
