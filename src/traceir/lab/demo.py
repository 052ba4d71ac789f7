"""The demonstration: a small mixed gallery of images, texts and pairs, searched in every way there is, judged by labels.

Which queries are asked is fixed by a rule (`WISHES`: the first of a row with so many steps, in file order), never by outcome.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from traceir.collection.ingest import AddReport, add
from traceir.data import mbeir
from traceir.errors import DataError
from traceir.files import write_whole
from traceir.index import SqliteIndex, open_index
from traceir.items import Query
from traceir.lab.fixture import unpack
from traceir.lab.gallery import Entry, cost, reasoning_steps, verdict, write_gallery
from traceir.prompts import normalise
from traceir.retrieval.search import EncoderLike, Searcher

PER_ROW: Final = 60
"""Candidates that each row lends to the gallery: what its chosen queries are judged with, then others of its pool."""
DEPTH: Final = 10
"""How far down the list a right hit counts as found."""


class Wish(NamedTuple):
    """Ask the first query of a row that needs so many steps."""

    title: str
    row: str
    steps: int


WISHES: Final = (
    Wish("words to picture", "mscoco_task0", 0),
    Wish("indirect words to picture", "mscoco_task0", 2),
    Wish("picture to text", "visualnews_task3", 0),
    Wish("picture to picture", "nights_task4", 0),
    Wish("picture and one edit", "cirr_task7", 1),
    Wish("garment and one edit", "fashioniq_task7", 1),
    Wish("picture and a chain of two edits", "cirr_task7", 2),
    Wish("picture and a chain of three edits", "cirr_task7", 3),
    Wish("emblem and a question of one hop", "infoseek_task6", 1),
    Wish("emblem and a question of two hops", "infoseek_task6", 2),
    Wish("emblem and a question of three hops", "infoseek_task6", 3),
    Wish("words to picture with text", "edis_task2", 0),
)


@dataclass(frozen=True, slots=True)
class Question:
    """One query of the demonstration, the ids that answer it, and where it comes from."""

    title: str
    row: str
    steps: int
    query: Query
    right: frozenset[str]


def prepare(out: Path) -> tuple[Path, list[Question]]:
    """The gallery as a pool file, and the questions; unpacks the small frozen MiniBEIR first where it is missing."""
    data = unpack(out / "minibeir")
    tasks = {task.name: task for task in mbeir.find_tasks(data, "test")}
    instructions = mbeir.read_instructions(data)
    questions: list[Question] = []
    asked: dict[str, list[mbeir.Record]] = {}
    for wish in WISHES:
        task = tasks[wish.row]
        labels = mbeir.read_labels(task.labels_path)
        fitting = {qid for qid, label in labels.items() if label.steps == wish.steps}
        record = next((record for record in mbeir.read_queries(task.query_path) if record.qid in fitting), None)
        if record is None:
            raise DataError(f"{task.query_path} has no query of {wish.steps} steps; unpack the folder again")
        prompts = instructions.prompts(task.dataset_id, task.query_modality, task.cand_modality)
        questions.append(Question(*wish, mbeir.to_query(record, prompts[0], data), frozenset(record.positives)))
        asked.setdefault(wish.row, []).append(record)
    lent = {candidate.did: candidate for row, records in asked.items() for candidate in _lend(tasks[row], records)}
    pool = data / "cand_pool" / "demo" / "mbeir_demo_cand_pool.jsonl"
    write_whole(pool, "".join(map(_line, lent.values())))
    return pool, questions


def fill(pool: Path, out: Path, encoder: EncoderLike, *, progress: bool = True) -> tuple[SqliteIndex, AddReport]:
    """The index of the gallery, one a model, filled by the same code as `traceir index add`; close it after use."""
    folder = out / f"index-{encoder.fingerprint.replace('/', '-').replace(':', '-')}"
    version, dim = encoder.prompt_version, encoder.width
    index = open_index(folder, fingerprint=encoder.fingerprint, prompt_version=version, dim=dim, create=True)
    try:
        report = add([pool], index, encoder, progress=progress)
        if report.failed:
            failure = report.failed[0]
            raise DataError(f"{failure.location}: {failure.reason}; remove {out} and run the demo again")
    except BaseException:
        index.close()
        raise
    return index, report


def ask(questions: Sequence[Question], encoder: EncoderLike, index: SqliteIndex) -> list[Entry]:
    """Every question with its answer, by the `auto` route, one call each, as a user's would be."""
    searcher, entries = Searcher(encoder, index), []
    for question in questions:
        result = searcher.search(question.query, k=DEPTH)
        assert result.encoding is not None
        source = f"{question.row}, {question.steps} step{'' if question.steps == 1 else 's'}"
        entries.append(Entry(question.title, question.query, result.encoding, result.hits, question.right, source))
    return entries


def write_page(answers: Sequence[Entry], out: Path) -> Path:
    """The contact sheet; returns the path of its page."""
    intro = (
        "A small mixed gallery searched by words, by a picture, and by a picture with words. The queries were chosen by a fixed "
    )
    intro += "rule, not by success; hits are judged by the benchmark's labels."
    return write_gallery(answers, out / "page", title="TraceIR: reason, then retrieve", intro=intro)


def describe(number: int, answer: Entry, *, top: int = 3) -> str:
    """One answer for people: query, route, reasoning, the first hits, and whether the right one was first."""
    images = ", ".join(image.name for image in answer.query.images)
    asked = " + ".join(part for part in (f"[{images}]" if images else "", answer.query.text) if part)
    lines = [f"{number}. {answer.title} ({answer.note})", f"   query      {asked}"]
    lines.append(f"   route      {answer.encoding.route} ({cost(answer.encoding)})")
    for position, step in enumerate(reasoning_steps(answer.encoding.reasoning)):
        lines.append(f"   {'reasoning' if position == 0 else '':9}  {step}")
    for hit in answer.hits[:top]:
        shown = " | ".join(part for part in (Path(hit.image).name if hit.image else "", hit.text or "") if part)
        lines.append(f"   {'*' if hit.id in answer.right else ' '} {hit.rank}  {hit.score:.3f}  {shown}  ({hit.id})")
    return "\n".join([*lines, f"   {verdict(answer.hits, answer.right)}"])


def _lend(task: mbeir.Task, records: Sequence[mbeir.Record]) -> list[mbeir.Candidate]:
    """All positives and distractors of the records, then others in the pool's order up to PER_ROW."""
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    needed = {did for record in records for did in (*record.positives, *record.negatives) if did in pool}
    others = [did for did in pool if did not in needed]
    chosen = {*needed, *others[: max(0, PER_ROW - len(needed))]}
    # In the pool's order, which is scattered, so that equal scores favour nobody.
    return [candidate for did, candidate in pool.items() if did in chosen]


def _line(candidate: mbeir.Candidate) -> str:
    """The candidate with its text in the form the models are trained on."""
    text, image = normalise(candidate.text) or None, candidate.image_path
    line = {"did": candidate.did, "txt": text, "img_path": image, "modality": candidate.modality}
    return json.dumps(line, ensure_ascii=False) + "\n"
