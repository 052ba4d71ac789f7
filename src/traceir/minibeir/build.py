"""Writes MiniBEIR in M-BEIR's layout: queries, pools, relevance, instructions, pictures, reasoning labels, lessons.

A build is a function of its scale, seed and splits: every JSON, TSV and TXT file is byte-identical on a rebuild.
Pictures are written whole or not at all, so that a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.errors import DataError, InputError
from traceir.minibeir.album import Album
from traceir.minibeir.draft import CandidateDraft, LessonDraft, QueryDraft, Split
from traceir.minibeir.rows import (
    FAMILY,
    LESSON_FOLDER,
    LESSONS,
    ROWS,
    SCALES,
    SPLITS,
    TWINS,
    WORLDS,
    Row,
    Scale,
    World,
    check_candidate,
    check_query,
    datasets,
    instructions_table,
    load_worlds,
)
from traceir.minibeir.verify import verify

FORMAT: Final = 1

_MARK = "building.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What determines the files of a build."""

    scale: Scale
    seed: int
    splits: tuple[Split, ...]

    def manifest(self) -> dict[str, Any]:
        return {"name": "MiniBEIR", "format": FORMAT, **json.loads(json.dumps(asdict(self)))}


def build(
    out: Path,
    *,
    scale: Scale,
    seed: int = 0,
    splits: Sequence[Split] = SPLITS,
    workers: int = 1,
    worlds: Mapping[str, World] | None = None,
) -> Path:
    """Writes the benchmark into `out` and returns it; a folder that is complete already is left as it is.

    `workers` processes draw pictures (by fork; one process where the system cannot fork). `worlds` replaces the shipped
    worlds. Raises InputError where `out` holds something else, DataError where a world or the result breaks a rule.
    """
    plan = _check_plan(scale, seed, splits, workers)
    if _claim(out, plan):
        return out
    with tqdm(total=_work(plan), unit="draft", desc="minibeir", disable=None, smoothing=0.0) as bar:
        builder = _Builder(out, plan, load_worlds() if worlds is None else worlds, Album(out, workers), bar)
        builder.write()
    counts = verify(out, plan.scale, plan.splits)
    meta = plan.manifest() | counts | {"fingerprint": fingerprint(out)}
    _write_text(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    (out / _MARK).unlink(missing_ok=True)
    logger.info("MiniBEIR %s is complete in %s: %d pictures", scale, out, counts["pictures"])
    return out


def fingerprint(root: Path) -> str:
    """SHA-256 (hex) over names and bytes of all JSON, TXT and TSV files but the manifest; pictures are not in it."""
    digest = hashlib.sha256()
    found = [path for path in root.rglob("*") if path.suffix in (".jsonl", ".json", ".txt", ".tsv") and path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in found}
    for name in sorted(set(names) - {"meta.json", _MARK}):
        content = hashlib.sha256(names[name].read_bytes()).hexdigest()
        digest.update(f"{name}\n{content}\n".encode())
    return digest.hexdigest()


@dataclass
class _Shelf:
    """The candidates of one data set: equal drafts are one candidate with one did."""

    dataset: str
    dataset_id: int
    lines: dict[tuple[str | None, str | None], tuple[str, str]] = field(default_factory=dict)
    queries: int = 0

    def next_qid(self) -> str:
        self.queries += 1
        return f"{self.dataset_id}:{self.queries}"

    def did(self, draft: CandidateDraft, row: Row, album: Album) -> str:
        key = _content(draft)
        known = self.lines.get(key)
        if known is not None:
            return known[0]
        did = f"{self.dataset_id}:{len(self.lines) + 1}"
        line = {
            "txt": draft.text,
            "img_path": album.place(draft.sketch, row.world, f"{self.dataset}_images"),
            "modality": row.cand_modality,
            "did": did,
            "src_content": None,
        }
        self.lines[key] = (did, _dump(line))
        return did

    def pool(self, dids: Iterable[str]) -> list[str]:
        lines = list(self.lines.values())
        return [lines[int(did.partition(":")[2]) - 1][1] for did in dids]


@dataclass
class _Sheet:
    """The lines of one query file and of its companions."""

    queries: list[str] = field(default_factory=list)
    qrels: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def write(self, root: Path, split: Split, name: str) -> None:
        _write_lines(root / "query" / split / f"mbeir_{name}_{split}.jsonl", self.queries)
        _write_lines(root / "qrels" / split / f"mbeir_{name}_{split}_qrels.txt", self.qrels)
        _write_lines(root / "cot" / split / f"mbeir_{name}_{split}_cot.jsonl", self.labels)


class _Builder:
    def __init__(self, root: Path, plan: Plan, worlds: Mapping[str, World], album: Album, bar: tqdm[Any]) -> None:
        self.root = root
        self.plan = plan
        self.worlds = worlds
        self.album = album
        self.bar = bar
        self.union: dict[Split, list[str]] = {split: [] for split in plan.splits}

    def write(self) -> None:
        for dataset in datasets():
            self._write_dataset([row for row in ROWS if row.dataset == dataset])
        if "train" in self.plan.splits:
            self._write_lessons()
        self.album.draw()
        for split, lines in self.union.items():
            path = self.root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"
            _write_lines(path, list(dict.fromkeys(lines)))
        _write_text(self.root / "instructions" / "query_instructions.tsv", instructions_table())

    def _write_dataset(self, rows: Sequence[Row]) -> None:
        shelf = _Shelf(rows[0].dataset, rows[0].dataset_id)
        if "train" in self.plan.splits:
            self._write_train(rows, shelf)
        for row in rows:
            splits = [split for split in self.plan.splits if split != "train"]
            groups = [[split] for split in splits] if row.split_pools else [splits]
            for group in groups:
                if group:
                    self._write_row(row, group, shelf)

    def _write_train(self, rows: Sequence[Row], shelf: _Shelf) -> None:
        sheet = _Sheet()
        pool: dict[str, None] = {}
        counts = [row.sizes(self.plan.scale).train for row in rows]
        streams = [self._drafts(row, "train") for row in rows]
        for which, draft in _interleave(streams, counts):
            positives, _ = self._add(sheet, draft, rows[which], shelf, ())
            pool.update(dict.fromkeys(positives))
        sheet.write(self.root, "train", shelf.dataset)
        self.union["train"] += shelf.pool(pool)

    def _write_row(self, row: Row, splits: Sequence[Split], shelf: _Shelf) -> None:
        """The val and test files of a row that share a pool, and that pool."""
        sizes = row.sizes(self.plan.scale)
        drafts = [(split, draft) for split in splits for draft in self._drafts(row, split)]
        spared = _spare_distractors([draft for _, draft in drafts], sizes.pool_most)
        pool: dict[str, None] = {}
        sheets = {split: _Sheet() for split in splits}
        for (split, draft), distractors in zip(drafts, spared, strict=True):
            positives, negatives = self._add(sheets[split], draft, row, shelf, distractors)
            pool.update(dict.fromkeys((*positives, *negatives)))
        wanted = sizes.pool_least - len(pool)
        fill = self.worlds[row.world].pool_fill(row.name, 4 * wanted + 64, self.plan.seed) if wanted > 0 else iter(())
        for candidate in fill:
            if len(pool) >= sizes.pool_least:
                break
            check_candidate(candidate, row, "pool fill")
            pool[shelf.did(candidate, row, self.album)] = None
        lines = sorted(shelf.pool(pool), key=_scatter)
        name = f"{row.name}_{splits[0]}" if row.split_pools else row.name
        _write_lines(self.root / "cand_pool" / "local" / f"mbeir_{name}_cand_pool.jsonl", lines)
        for split, sheet in sheets.items():
            sheet.write(self.root, split, row.name)
            self.union[split] += lines

    def _drafts(self, row: Row, split: Split) -> Iterator[QueryDraft]:
        """Exactly as many drafts as the table asks for, each checked."""
        wanted = row.sizes(self.plan.scale).queries(split)
        made = 0
        for draft in self.worlds[row.world].rows[row.name](split, wanted, self.plan.seed):
            made += 1
            if made > wanted:
                raise DataError(f"world {row.world} makes more than {wanted} {split} queries for {row.name}; stop there")
            check_query(draft, row, f"{row.name} {split} query {made}")
            self.bar.update()
            yield draft
        if made < wanted:
            raise DataError(f"world {row.world} makes {made} of {wanted} {split} queries for {row.name}; make them all")

    def _add(
        self, sheet: _Sheet, draft: QueryDraft, row: Row, shelf: _Shelf, distractors: Sequence[CandidateDraft]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        qid = shelf.next_qid()
        positives, negatives = (
            tuple(dict.fromkeys(shelf.did(candidate, row, self.album) for candidate in candidates))
            for candidates in (draft.positives, distractors)
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
        thinks = draft.steps >= 2
        label = {
            "qid": qid,
            "steps": draft.steps,
            "z": int(thinks),
            "reasoning": draft.reasoning if thinks else None,
            "answer": draft.answer if thinks else None,
        }
        sheet.queries.append(_dump(query))
        sheet.labels.append(_dump(label))
        sheet.qrels += [f"{qid} 0 {did} 1 {row.task_id}" for did in positives]
        return positives, negatives

    def _write_lessons(self) -> None:
        """A file for each world and kind of lesson, in the order of their first lessons."""
        lines: dict[str, list[str]] = {}
        for world in WORLDS:
            wanted = LESSONS[self.plan.scale][world]
            for lesson in self.worlds[world].lessons(wanted, self.plan.seed):
                lines.setdefault(f"{world}_{lesson.kind}", []).append(_dump(self._lesson(lesson, world)))
                self.bar.update()
        for name, told in lines.items():
            _write_lines(self.root / LESSON_FOLDER / f"{name}.jsonl", told)

    def _lesson(self, lesson: LessonDraft, world: str) -> dict[str, str | None]:
        folder = f"lessons_images/{world}"
        return {
            "img_path": self.album.place(lesson.sketch, world, folder),
            "prompt": lesson.prompt,
            "target": lesson.target,
        }


def _check_plan(scale: Scale, seed: int, splits: Sequence[Split], workers: int) -> Plan:
    if scale not in SCALES:
        raise InputError(f"scale {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    if seed < 0:
        raise InputError(f"seed is {seed}; give an integer of at least 0")
    if not splits or any(split not in SPLITS for split in splits):
        raise InputError(f"splits are {tuple(splits)}; choose some of {', '.join(SPLITS)}")
    if workers < 1:
        raise InputError(f"workers is {workers}; give at least 1")
    return Plan(scale, seed, tuple(split for split in SPLITS if split in splits))


def _claim(out: Path, plan: Plan) -> bool:
    """Whether `out` holds this very build already; else marks it as being built."""
    wanted = plan.manifest()
    for name in ("meta.json", _MARK):
        path = out / name
        if not path.exists():
            continue
        found = _read_manifest(path)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            key = differing[0]
            raise InputError(
                f"{path}: the folder holds {key} {found.get(key)!r}, asked for is {wanted[key]!r}; "
                "give another folder or remove this one"
            )
        if name == "meta.json":
            return True
        _remove_temporaries(out)
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no MiniBEIR; give a new or an empty folder")
    _write_text(out / _MARK, json.dumps(wanted) + "\n")
    return False


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}:1: not JSON ({error}); remove the folder and build again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}:1: not an object; remove the folder and build again")
    return found


def _remove_temporaries(out: Path) -> None:
    """Removes what killed builds left half written; files younger than a minute may belong to a live one."""
    for path in out.rglob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()
        except FileNotFoundError:
            continue


def _content(draft: CandidateDraft) -> tuple[str | None, str | None]:
    return draft.text, draft.sketch.key if draft.sketch else None


def _spare_distractors(drafts: Sequence[QueryDraft], pool_most: int) -> list[tuple[CandidateDraft, ...]]:
    """The distractors that go into the pool: all, or so many fewer for each query that the pool keeps to `pool_most`.

    The source and the intermediate states (first of a draft's distractors) and the last `TWINS` twins always stay, so
    that a pool may still end up larger.
    """
    most = max((len(draft.distractors) for draft in drafts), default=0)
    for spare in range(most, -1, -1):
        kept = [_thin(draft, spare) for draft in drafts]
        pool = {_content(each) for draft in drafts for each in draft.positives}
        pool.update(_content(each) for distractors in kept for each in distractors)
        if len(pool) <= pool_most:
            break
    return kept if drafts else []


def _thin(draft: QueryDraft, spare: int) -> tuple[CandidateDraft, ...]:
    first = max(draft.steps, 1)
    last = max(len(draft.distractors) - TWINS, first)
    source = draft.sketch.key if draft.sketch else None
    return tuple(
        each
        for place, each in enumerate(draft.distractors)
        if not first + spare <= place < last or (each.sketch is not None and each.sketch.key == source)
    )


def _interleave(streams: Sequence[Iterator[QueryDraft]], counts: Sequence[int]) -> Iterator[tuple[int, QueryDraft]]:
    """Mixes the rows of a data set in proportion to their counts, whole families at a time."""
    done = [0] * len(streams)
    while any(made < count for made, count in zip(done, counts, strict=True)):
        which = min(range(len(streams)), key=lambda place: (done[place] / max(counts[place], 1), place))
        for _ in range(min(FAMILY, counts[which] - done[which])):
            yield which, next(streams[which])
            done[which] += 1
    for stream in streams:
        next(stream, None)  # lets the stream notice drafts beyond its count


def _work(plan: Plan) -> int:
    queries = sum(row.sizes(plan.scale).queries(split) for row in ROWS for split in plan.splits)
    return queries + (sum(LESSONS[plan.scale].values()) if "train" in plan.splits else 0)


def _scatter(line: str) -> str:
    """Sort key that takes answers and their twins apart, so that equal scores do not favour either."""
    return hashlib.sha256(line.encode()).hexdigest()


def _dump(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    _write_text(path, "".join(f"{line}\n" for line in lines))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
