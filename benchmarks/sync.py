"""`index sync` of a folder of generated pictures: what a run costs, and whether kill -9 at any moment costs an item.

    python -m benchmarks.sync --markdown docs/results/sync.md --out benchmarks/results/sync.json
    python -m benchmarks.sync --encoder bundled --files 500 --kills 0

Pictures of 16x16 random pixels (PNG, seed 0), 1,000 a folder. First sync, second sync, then one after 1,000 renames, 1,000
deletions and 1,000 changes (a hundredth of the files each, where there are fewer), each in seconds of wall and CPU of this
process, and as a ratio to an `os.scandir` walk with the stat of every file, timed right after it. Then a process that syncs over
and over is killed `--kills` times, every other one soon after its first write, while files are added, changed, renamed, exchanged
and deleted. After every tenth kill one sync runs to its end, and the index must equal the folder: the same ids, paths and content
hashes, and the vectors that a fresh index would hold. The encoder is by default a stand-in that makes a vector of the content's
hash, so that what is measured is `sync`; `--encoder bundled` is the bundled model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from traceir.collection.sync import SyncReport, sync
from traceir.index import open_index
from traceir.items import Encoding, Item, Query, Route, Vector
from traceir.library import load_encoder
from traceir.retrieval.search import EncoderLike

WIDTH: Final = 256
FOLDER: Final = 1000


class HashEncoder:
    """Vectors that follow from the content's hash; the image is read for that, and not decoded."""

    fingerprint, prompt_version, width = "benchmark", "1", WIDTH

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        return [Encoding(vector_of(item.content_hash()), "direct", "", 0, 1.0, False) for item in items]

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        raise NotImplementedError


def vector_of(content_hash: str) -> Vector:
    drawn = np.random.default_rng(int(content_hash[:16], 16)).standard_normal(WIDTH, dtype=np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn), dtype=np.float32)


class Pictures:
    """The folder, and what is done to its files."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.draw, self.pixels = folder, random.Random(seed), np.random.default_rng(seed)
        self.files: list[Path] = []
        self.made = 0

    def add(self) -> None:
        path = self.folder / f"{self.made // FOLDER:03d}" / f"IMG_{self.made:06d}.png"
        self.made += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        self.paint(path)
        self.files.append(path)

    def paint(self, path: Path) -> None:
        Image.fromarray(self.pixels.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, compress_level=0)

    def take(self) -> Path:
        """A file, no more among the files."""
        at = self.draw.randrange(len(self.files))
        self.files[at], self.files[-1] = self.files[-1], self.files[at]
        return self.files.pop()

    def rename(self) -> None:
        old = self.take()
        new = old.parent.with_name(f"{self.draw.randrange(100):03d}") / f"renamed_{self.made:06d}.png"
        self.made += 1
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
        self.files.append(new)

    def exchange(self) -> None:
        one, other, aside = *self.draw.sample(self.files, 2), self.folder / "aside"
        for old, new in ((one, aside), (other, one), (aside, other)):
            old.rename(new)

    def delete(self) -> None:
        self.take().unlink()

    def change(self) -> None:
        self.paint(self.draw.choice(self.files))

    def disturb(self) -> None:
        self.draw.choice((self.add, self.rename, self.exchange, self.delete, self.change))()


def walk(folder: Path) -> int:
    """How many files `os.scandir` finds; each is asked for its stat."""
    count, folders = 0, [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds of wall and of CPU, and what the work returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return time.perf_counter() - wall, time.process_time() - cpu, made


def differences(folder: Path, index: Path, encoder: EncoderLike) -> list[str]:
    """How the index differs from the folder; the vectors must be those that the encoder makes of the files."""
    truth = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}
    wrong: list[str] = []
    with open_index(index) as opened:
        kept = {stored.id: stored for stored in opened.scan(with_vectors=True)}
    wrong += [f"lost {id}" for id in truth.keys() - kept.keys()] + [f"left {id}" for id in kept.keys() - truth.keys()]
    for ids in batches([id for id in truth if id in kept], 64):
        items = [Item.of(image=truth[id], id=id) for id in ids]
        for id, item, encoding in zip(ids, items, encoder.encode_items(items), strict=True):
            stored = kept[id]
            same = stored.content_hash == item.content_hash() and stored.fields["_file"] == str(truth[id])
            if not same or stored.vector is None or not np.allclose(stored.vector, encoding.vector, atol=1e-5):
                wrong.append(f"stale {id}")
    return wrong


def batches(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def run_sync(folder: Path, index: Path, encoder: EncoderLike) -> SyncReport:
    with open_index(index, encoder, create=True) as opened:
        return sync([folder], opened, encoder, progress=False)


def measure(pictures: Pictures, index: Path, encoder: EncoderLike) -> list[dict[str, Any]]:
    few = min(1000, max(1, len(pictures.files) // 100))

    def row(name: str, repetitions: int = 1) -> dict[str, Any]:
        rounds = []
        for _ in range(repetitions):
            wall, cpu, report = timed(lambda: run_sync(pictures.folder, index, encoder))
            walk_wall, walk_cpu, _ = timed(lambda: walk(pictures.folder))
            rounds.append((wall, cpu, wall / walk_wall, cpu / walk_cpu))
        wall, cpu, ratio, cpu_ratio = (statistics.median(values) for values in zip(*rounds, strict=True))
        counts = {n: getattr(report, n) for n in ("added", "updated", "renamed", "removed", "skipped")}
        made = {
            "sync": name,
            "wall": wall,
            "cpu": cpu,
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            **counts,
            "failed": len(report.failed),
        }
        print(json.dumps(made), flush=True)
        return made

    rows = [row("first"), row("second: nothing has changed", 3)]
    for work in (pictures.rename, pictures.delete, pictures.change):
        for _ in range(few):
            work()
    rows += [row(f"after {few:,} renames, {few:,} deletions and {few:,} changes"), row("again", 3)]
    return rows


def kill(pictures: Pictures, index: Path, encoder: EncoderLike, kills: int) -> tuple[int, int, list[str]]:
    """Changes to files before and during the runs, runs killed after they had begun to write, and how the index differed."""
    touched = at_work = 0
    wrong: list[str] = []
    log = index / "index.sqlite-wal"
    command = [sys.executable, "-m", "benchmarks.sync", "--again", str(pictures.folder), str(index)]

    def written() -> float:
        return log.stat().st_mtime if log.exists() else 0.0

    for number in range(1, kills + 1):
        for _ in range(200):
            pictures.disturb()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            before, end = written(), time.monotonic() + pictures.draw.uniform(0.0, 12.0)
            if number % 2:  # at work, after its first write
                while written() == before and time.monotonic() < end + 60:
                    time.sleep(0.002)
                end = time.monotonic() + pictures.draw.uniform(0.0, 0.5)
            while time.monotonic() < end:
                pictures.disturb()
                touched += 1
                time.sleep(0.002)
            child.kill()
        at_work += written() != before
        touched += 200
        if number % 10 == 0 or number == kills:
            run_sync(pictures.folder, index, encoder)
            wrong += differences(pictures.folder, index, encoder)
            print(
                f"killed {number} times, {at_work} after writes, {touched} changes, {len(wrong)} differences {wrong[:3]}",
                flush=True,
            )
    return touched, at_work, wrong


def again(folder: Path, index: Path) -> None:
    """What is killed: one sync after the other."""
    print("ready", flush=True)
    while True:
        run_sync(folder, index, HashEncoder())


def table(rows: Sequence[dict[str, Any]], options: argparse.Namespace, outcome: str) -> str:
    head = "| sync | wall s | CPU s | to a walk, wall | to a walk, CPU | added | updated | renamed | removed | as before |"
    lines = [head, "|---" * 10 + "|"]
    for row in rows:
        times = f"{row['wall']:.2f} | {row['cpu']:.2f} | {row['ratio']:.1f} | {row['cpu_ratio']:.1f}"
        counts = " | ".join(f"{row[name]:,}" for name in ("added", "updated", "renamed", "removed", "skipped"))
        lines.append(f"| {row['sync']} | {times} | {counts} |")
    what = "a stand-in that makes a vector of the content's hash" if options.encoder == "stand-in" else "the bundled model"
    config = f"{options.files:,} pictures, encoder: {what}, seed {options.seed}; {machine()}."
    return "\n".join([config, "", *lines, "", outcome])


def machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores ({model.partition(':')[2].strip() or platform.machine()}), Python {platform.python_version()}"


def main() -> int:
    if sys.argv[1:2] == ["--again"]:
        again(Path(sys.argv[2]), Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--encoder", choices=["stand-in", "bundled"], default="stand-in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the pictures and the index are made (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--at-most", type=float, help="CPU seconds of the second sync")
    options = parser.parse_args()
    encoder: EncoderLike = HashEncoder() if options.encoder == "stand-in" else load_encoder()
    work = Path(tempfile.mkdtemp(prefix="traceir-sync-", dir=options.folder)).resolve()
    try:
        pictures, index = Pictures(work / "pictures", options.seed), work / "index"
        for _ in range(options.files):
            pictures.add()
        rows = measure(pictures, index, encoder)
        wrong = differences(pictures.folder, index, encoder)
        outcome = f"After these runs the index equals the folder: {'no' if wrong else 'yes'}."
        if options.kills:
            touched, at_work, more = kill(pictures, index, encoder, options.kills)
            wrong += more
            outcome += (
                f" Killed {options.kills} times by SIGKILL, {at_work} of them between the writes of a run, with {touched:,} "
                f"changes to files before and during them: {len(more)} of {len(pictures.files):,} items lost, doubled or stale."
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = table(rows, options, outcome)
    print(text)
    if options.markdown:
        options.markdown.write_text(
            f"# A folder and its index kept in step\n\n    python -m benchmarks.sync\n\n{text}\n", encoding="utf-8"
        )
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "kills": options.kills, "wrong": wrong[:100]}, indent=1) + "\n")
    if wrong or (options.at_most is not None and rows[1]["cpu"] > options.at_most):
        print(f"a bound does not hold: {wrong[:5] or rows[1]['cpu']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
