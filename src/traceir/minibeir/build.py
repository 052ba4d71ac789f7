"""Writes MiniBEIR in M-BEIR's layout: queries, pools, relevance, instructions, images, reasoning labels, pretraining examples.

A build is a function of its scale, seed and splits: every file is byte-identical on a rebuild. Images are written whole or not at
all, so that a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.data import mbeir
from traceir.data.mbeir import Split
from traceir.errors import DataError, InputError
from traceir.files import replacing, write_whole
from traceir.minibeir import rows
from traceir.minibeir.rows import CandidateDraft, DrawnRow, DrawnWorld, QueryDraft, Scale, Sketch

FORMAT: Final = 1
META: Final = "meta.json"
MARK: Final = "building.json"
JPEG_QUALITY: Final = 92
FORMATS: Final = {".jpg": "JPEG", ".png": "PNG", ".gif": "GIF"}

_PENDING = 8192  # images drawn at a time: bounds memory and the number of forks
_SAFE_KEY = re.compile(r"[a-z0-9][a-z0-9_.,=-]{0,99}")

logger = logging.getLogger(__name__)


def build(
    out: Path,
    *,
    scale: Scale,
    seed: int = 0,
    splits: Sequence[Split] = rows.SPLITS,
    workers: int = 1,
    worlds: Mapping[str, DrawnWorld] | None = None,
) -> Path:
    """Writes the benchmark into `out` and returns it; a folder that is complete already is left as it is.

    `workers` processes draw images (by fork; one process where the system cannot fork). `worlds` replaces the shipped worlds.
    Raises InputError where `out` holds something else, DataError where the result breaks a rule.
    """
    check_plan(scale, seed)
    if not splits or any(split not in rows.SPLITS for split in splits):
        raise InputError(f"splits are {tuple(splits)}; choose some of {', '.join(rows.SPLITS)}")
    if workers < 1:
        raise InputError(f"workers is {workers}; give at least 1")
    ordered = [split for split in rows.SPLITS if split in splits]
    plan = {"name": "MiniBEIR", "format": FORMAT, "scale": scale, "seed": seed, "splits": ordered}
    if holds(out, META, plan, MARK):
        return out
    write_whole(out / MARK, json.dumps(plan) + "\n")
    for path in [*out.rglob(".*.new"), *out.rglob(".*.tmp")]:  # of killed builds; younger ones may belong to a live one
        if time.time() - path.stat().st_mtime > 60:
            path.unlink(missing_ok=True)
    work = sum(row.count(scale, split) for row in rows.ROWS for split in ordered)
    work += sum(rows.PRETRAINING[scale].values()) if "train" in ordered else 0
    with tqdm(total=work, unit="draft", desc="minibeir", disable=None, smoothing=0.0) as bar:
        _Builder(Album(out, workers), scale, seed, ordered, rows.load_worlds() if worlds is None else worlds, bar).write()
    meta = plan | verify(out, scale, ordered)
    write_whole(out / META, json.dumps(meta | {"fingerprint": fingerprint(out)}, indent=1) + "\n")
    (out / MARK).unlink(missing_ok=True)
    logger.info("MiniBEIR %s is complete in %s: %d images", scale, out, meta["pictures"])
    return out


def check_plan(scale: str, seed: int) -> None:
    if scale not in rows.SCALES:
        raise InputError(f"scale {scale!r} is unknown; choose one of {', '.join(rows.SCALES)}")
    if seed < 0:
        raise InputError(f"seed is {seed}; give an integer of at least 0")


def holds(out: Path, manifest: str, plan: Mapping[str, Any], mark: str = "") -> bool:
    """Whether `out` holds the build of a plan, by its manifest. Raises InputError where it holds anything else, unless a `mark`
    says that this build was begun, DataError where manifest or mark is no JSON."""
    path = next((out / name for name in (manifest, mark) if name and (out / name).is_file()), None)
    if path is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is not empty and holds no {manifest}; give a new or an empty folder")
        return False
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON ({error}); remove the folder and build again") from error
    for key, wanted in plan.items():
        shown = content.get(key) if isinstance(content, dict) else content
        if shown != wanted:
            raise InputError(
                f"{path}: the folder holds {key} {shown!r}, asked for is {wanted!r}; give another folder or remove this one"
            )
    return path.name == manifest


def fingerprint(root: Path, *but: str) -> str:
    """SHA-256 (hex) over names and bytes of all JSON, TXT, TSV and torch files but manifests; images are not in it.

    A torch file counts by the JSON of what it holds, because its bytes may differ between versions of torch.
    """
    digest = hashlib.sha256()
    kinds = (".jsonl", ".json", ".txt", ".tsv", ".pt")
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.suffix in kinds}
    for name in sorted(set(names) - {META, MARK, *but}):
        if name.endswith(".pt"):
            import torch

            content = dump(torch.load(names[name], weights_only=True)).encode()
        else:
            content = names[name].read_bytes()
        digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def dump(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)


# --- images -----------------------------------------------------------------------------------------------------------


class Album:
    """The image files: each (world, key) is drawn once and shared by all rows, pools and pretraining examples that show it."""

    def __init__(self, root: Path, workers: int) -> None:
        self.root = root
        self.workers = workers if "fork" in multiprocessing.get_all_start_methods() else 1
        self.paths: dict[tuple[str, str], str] = {}
        self.pending: list[tuple[Sketch, Path]] = []

    def place(self, sketch: Sketch | None, world: str, folder: str) -> str | None:
        """The image's path relative to the root: its key where every file system takes that, else the key's digest."""
        if sketch is None:
            return None
        if (world, sketch.key) not in self.paths:
            safe = _SAFE_KEY.fullmatch(sketch.key)
            stem = sketch.key if safe else hashlib.sha256(sketch.key.encode()).hexdigest()[:32]
            self.add(sketch, f"mbeir_images/{folder}/{stem}.jpg")
            self.paths[world, sketch.key] = f"mbeir_images/{folder}/{stem}.jpg"
        return self.paths[world, sketch.key]

    def add(self, sketch: Sketch, name: str) -> None:
        """Queues an image for drawing, unless it is there."""
        if not (self.root / name).exists():
            self.pending.append((sketch, self.root / name))
        if len(self.pending) >= _PENDING:
            self.draw()

    def draw(self, quiet: bool | None = None) -> None:
        """Draws what is queued. What a worker leaves undone is drawn here, so that its error is raised here.

        This process draws a share of its own: forks inherit what the worlds have cached of earlier drawing.
        """
        fork = multiprocessing.get_context("fork" if self.workers > 1 else None)
        shards = [self.pending[start :: self.workers] for start in range(1, self.workers)]
        processes = [fork.Process(target=_draw, args=(shard, os.getpid())) for shard in shards if shard]
        for process in processes:
            process.start()
        _draw(tqdm(self.pending[:: self.workers], desc="images", unit="image", leave=False, disable=quiet))
        for process in processes:
            process.join()
        _draw((sketch, path) for sketch, path in self.pending if not path.exists())
        self.pending.clear()


def _draw(shard: Iterable[tuple[Sketch, Path]], parent: int | None = None) -> None:
    for sketch, path in shard:
        if parent is not None and os.getppid() != parent:
            return  # the build was killed; leave the rest to the next one
        with replacing(path, binary=True) as stream:
            sketch.draw().save(stream, format=FORMATS[path.suffix], quality=JPEG_QUALITY)


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass
class _Builder:
    """The lines of all files of a build, and the candidates of each data set: equal drafts are one candidate with one did."""

    album: Album
    scale: Scale
    seed: int
    splits: Sequence[Split]
    worlds: Mapping[str, DrawnWorld]
    bar: tqdm[Any]
    files: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dids: defaultdict[int, dict[CandidateDraft, str]] = field(default_factory=lambda: defaultdict(dict))
    lines: dict[str, str] = field(default_factory=dict)
    queries: Counter[int] = field(default_factory=Counter)

    def write(self) -> None:
        for _, group in itertools.groupby(sorted(rows.ROWS, key=lambda row: row.dataset_id), key=lambda row: row.dataset_id):
            self._add_dataset(sorted(group, key=rows.ROWS.index))
        for world in rows.WORLDS if "train" in self.splits else ():
            for example in self.worlds[world].pretraining(rows.PRETRAINING[self.scale][world], self.seed):
                image = self.album.place(example.sketch, world, f"lessons_images/{world}")
                line = {"img_path": image, "prompt": example.prompt, "target": example.target}
                self.files[f"{rows.PRETRAINING_FOLDER}/{world}_{example.kind}.jsonl"].append(dump(line))
                self.bar.update()
        self.album.draw()
        for name, lines in self.files.items():
            unique = dict.fromkeys(lines) if name.startswith("cand_pool/global") else lines
            write_whole(self.album.root / name, "".join(f"{line}\n" for line in unique))
        table = resources.files("traceir.minibeir").joinpath("instructions.tsv").read_text(encoding="utf-8")
        write_whole(self.album.root / "instructions" / "query_instructions.tsv", table)

    def _drafts(self, row: DrawnRow, split: Split) -> Iterator[QueryDraft]:
        for draft in self.worlds[row.world].rows[row.name](split, row.count(self.scale, split), self.seed):
            self.bar.update()
            yield draft

    def _add_dataset(self, group: Sequence[DrawnRow]) -> None:
        if "train" in self.splits:
            union = self.files["cand_pool/global/mbeir_union_train_cand_pool.jsonl"]
            counts = [row.count(self.scale, "train") for row in group]
            for which, draft in _interleave([self._drafts(row, "train") for row in group], counts):
                union += [self.lines[did] for did in self._add("train", group[which].dataset, group[which], draft, ())]
        splits = [split for split in self.splits if split != "train"]
        for row in group:
            for shared in [[split] for split in splits] if row.split_pools else [splits]:
                if shared:
                    self._add_row(row, shared)

    def _add_row(self, row: DrawnRow, splits: Sequence[Split]) -> None:
        """The val and test files of a row that share a pool, and that pool, scattered so that equal scores favour nobody."""
        least, most = rows.POOLS[self.scale]
        drafts = [(split, draft) for split in splits for draft in self._drafts(row, split)]
        spared = spare_distractors([draft for _, draft in drafts], most)
        pool: dict[str, None] = {}
        for (split, draft), distractors in zip(drafts, spared, strict=True):
            pool |= dict.fromkeys(self._add(split, row.name, row, draft, distractors))
        missing = least - len(pool)
        for candidate in self.worlds[row.world].pool_fill(row.name, 4 * missing + 64, self.seed) if missing > 0 else ():
            if len(pool) < least:
                pool[self._did(candidate, row)] = None
        lines = sorted((self.lines[did] for did in pool), key=lambda line: hashlib.sha256(line.encode()).hexdigest())
        name = f"{row.name}_{splits[0]}" if row.split_pools else row.name
        self.files[f"cand_pool/local/mbeir_{name}_cand_pool.jsonl"] = lines
        for split in splits:
            self.files[f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"] += lines

    def _did(self, draft: CandidateDraft, row: DrawnRow) -> str:
        dids = self.dids[row.dataset_id]
        if draft not in dids:
            dids[draft] = did = f"{row.dataset_id}:{len(dids) + 1}"
            image = self.album.place(draft.sketch, row.world, f"{row.dataset}_images")
            line = {"txt": draft.text, "img_path": image, "modality": row.cand_modality, "did": did, "src_content": None}
            self.lines[did] = dump(line)
        return dids[draft]

    def _add(self, split: Split, name: str, row: DrawnRow, draft: QueryDraft, distractors: Sequence[CandidateDraft]) -> list[str]:
        """A query with its labels and judgements; returns its candidates."""
        self.queries[row.dataset_id] += 1
        qid = f"{row.dataset_id}:{self.queries[row.dataset_id]}"
        positives, negatives = (
            list(dict.fromkeys(self._did(candidate, row) for candidate in some)) for some in (draft.positives, distractors)
        )
        query = {
            "qid": qid,
            "query_txt": draft.text,
            "query_img_path": self.album.place(draft.sketch, row.world, f"{row.dataset}_images"),
            "query_modality": row.query_modality,
            "query_src_content": json.dumps({"steps": draft.steps}),
            "pos_cand_list": positives,
            "neg_cand_list": negatives,
            "task_id": row.task_id,
        }
        written = {"reasoning": draft.reasoning, "answer": draft.answer}
        label = {"qid": qid, "steps": draft.steps, "z": int(draft.steps >= 2), **written}
        self.files[f"query/{split}/mbeir_{name}_{split}.jsonl"].append(dump(query))
        self.files[f"cot/{split}/mbeir_{name}_{split}_cot.jsonl"].append(dump(label))
        self.files[f"qrels/{split}/mbeir_{name}_{split}_qrels.txt"] += [f"{qid} 0 {did} 1 {row.task_id}" for did in positives]
        return [*positives, *negatives]


def spare_distractors(drafts: Sequence[QueryDraft], pool_most: int) -> list[tuple[CandidateDraft, ...]]:
    """The distractors that go into the pool: all, or so many fewer for each query that the pool keeps to `pool_most`.

    The source and the intermediate states (first of a draft's distractors) and the last TWINS twins always stay, so that a
    pool may still end up larger.
    """
    kept: list[tuple[CandidateDraft, ...]] = []
    for spare in range(max((len(draft.distractors) for draft in drafts), default=0), -1, -1):
        kept = []
        for draft in drafts:
            first = max(draft.steps, 1)
            spared = range(first + spare, max(len(draft.distractors) - rows.TWINS, first))
            source = CandidateDraft(sketch=draft.sketch)
            numbered = enumerate(draft.distractors)
            kept.append(tuple(each for index, each in numbered if index not in spared or (each.sketch and each == source)))
        if len({each for draft in drafts for each in draft.positives}.union(*kept)) <= pool_most:
            break
    return kept


def _interleave(streams: Sequence[Iterator[QueryDraft]], counts: Sequence[int]) -> Iterator[tuple[int, QueryDraft]]:
    """Mixes the rows of a data set in proportion to their counts, whole hard-negative groups at a time."""
    done = [0] * len(streams)
    while done != list(counts):
        which = min(range(len(streams)), key=lambda stream: (done[stream] / max(counts[stream], 1), stream))
        for _ in range(min(rows.GROUP, counts[which] - done[which])):
            yield which, next(streams[which])
            done[which] += 1


# --- checks -----------------------------------------------------------------------------------------------------------

_Content = tuple[str | None, str | None]
"""Text and image path of a candidate."""


def verify(root: Path, scale: Scale, splits: Sequence[Split]) -> dict[str, Any]:
    """Reads the files back, checks what the benchmark promises, and counts. Raises DataError naming the file."""
    counts: dict[str, Any] = {"rows": {row.name: {} for row in rows.ROWS}, "lessons": 0}
    images: set[str | None] = set()
    trained: dict[str, set[_Content]] = {row.world: set() for row in rows.ROWS}
    if "train" in splits:
        train_counts = _verify_train(root, trained, images)
        pretraining = [json.loads(line) for file in (root / rows.PRETRAINING_FOLDER).glob("*.jsonl") for line in file.open("rb")]
        images.update(example["img_path"] for example in pretraining)
        counts["lessons"] = len(pretraining)
    for split in [split for split in splits if split != "train"]:
        for task, row in zip(mbeir.find_tasks(root, split), rows.ROWS, strict=True):
            seen = trained[row.world] if split == "test" and row.world in rows.HELD_OUT_WORLDS else set()
            counts["rows"][row.name][split] = _verify_task(task, row, scale, seen, images)
    for row in rows.ROWS if "train" in splits else ():
        counts["rows"][row.name]["train"] = {"queries": train_counts[row.name]}
    images.discard(None)
    for name in sorted(map(str, images)):
        if not (root / name).is_file():
            raise DataError(f"{root / name}: the image is named by a file but missing; remove {root} and build again")
    return counts | {"pictures": len(images)}


def _verify_train(root: Path, trained: dict[str, set[_Content]], images: set[str | None]) -> Counter[str]:
    """Training queries for each row; adds the contents of training answers by world."""
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(mbeir.train_pool_path(root))}
    counts: Counter[str] = Counter()
    for dataset in mbeir.train_datasets(root):
        world = next(row.world for row in rows.ROWS if row.dataset == dataset)
        for record in mbeir.read_train(root, dataset):
            counts[f"{dataset}_task{record.task_id}"] += 1
            images.add(record.image_path)
            for did in record.positives:
                if did not in pool:
                    raise DataError(f"{mbeir.train_pool_path(root)}: positive {did} of {record.qid} is not in the pool")
                trained[world].add((pool[did].text, pool[did].image_path))
    images.update(candidate.image_path for candidate in pool.values())
    return counts


def _verify_task(
    task: mbeir.Task, row: DrawnRow, scale: Scale, trained: set[_Content], images: set[str | None]
) -> dict[str, Any]:
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    relevant, labels = mbeir.read_qrels(task.qrels_path), mbeir.read_labels(task.labels_path)
    steps: Counter[int] = Counter()

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise DataError(what)

    def demand_modality(where: str, each: mbeir.Record | mbeir.Candidate, wanted: str) -> None:
        images.add(each.image_path)
        shown = ",".join(name for name, part in (("image", each.image_path), ("text", each.text)) if part)
        demand(shown == wanted, f"{where} is {shown}; the row asks for {wanted}")

    for did, candidate in pool.items():
        demand_modality(f"{task.pool_path}: candidate {did}", candidate, row.cand_modality)
    least = rows.POOLS[scale][0]
    demand(len(pool) >= least, f"{task.pool_path}: {len(pool)} candidates, fewer than {least}; make more pool fill")
    for record in mbeir.read_queries(task.query_path):
        where = f"{task.query_path}: query {record.qid}"
        positives, negatives = set(record.positives), set(record.negatives)
        both, missing = positives & negatives, (positives | negatives) - pool.keys()
        leaked = [did for did in positives & pool.keys() if (pool[did].text, pool[did].image_path) in trained]
        demand_modality(where, record, row.query_modality)
        demand(bool(positives), f"{where} has no positive; give at least one")
        demand(
            relevant.get(record.qid, {}).keys() == positives,
            f"{where}: its qrels differ from its positives; write both from one list",
        )
        demand(not missing, f"{where}: candidates {sorted(missing)} are not in {task.pool_path.name}; add them to the pool")
        demand(not both, f"{where}: {sorted(both)} is both positive and distractor; make them differ")
        twins = task.split != "test" or len(negatives) >= rows.TWINS
        demand(twins, f"{where} has {len(negatives)} distractors, fewer than {rows.TWINS}; make more near twins")
        demand(not leaked, f"{where}: positive {leaked} is a training answer too; hold its composition out")
        demand(labels[record.qid].steps <= 4, f"{where} has {labels[record.qid].steps} steps; it must have 0 to 4")
        steps[labels[record.qid].steps] += 1
    made, wanted = sum(steps.values()), row.count(scale, task.split)
    demand(made == wanted, f"{task.query_path}: world {row.world} makes {made} of {wanted} queries; make exactly as many")
    return {"queries": made, "pool": len(pool), "steps": {str(count): steps[count] for count in sorted(steps)}}
